"""Several builds by one command: in their order, whatever comes of each, and released whatever ends them."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from image_factory import cli, fleet
from image_factory.fleet import Failure, Outcome

from ..conftest import PATIENCE, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]

# Each build notes what it does, with the time, in a file of its own.
HEAD = f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from image_factory import cli, fleet
from image_factory.base import events, interrupts
from image_factory.base.errors import Interrupted
here, images = Path(sys.argv[1]), sys.argv[2:]

def note(image, text):
    with (here / image).open("a") as file:
        file.write(f"{{time.monotonic()}} {{text}}\\n")

def wait(seconds=60):
    with interrupts.interruptible():
        time.sleep(seconds)

def begin(image, send):
    note(image, f"begun {{os.getpid()}}")
    return fleet.Teller(send)

def show(image, on_stderr, line):
    print("err" if on_stderr else "out", image, line, flush=True)

def run(build):
    builds = fleet.Fleet(images, build, show)
    try:
        with interrupts.handled():
            builds.run()
    except Interrupted as error:
        print(error.message)
        sys.exit(error.exit_status)
    finally:
        for outcome in builds.outcomes.values():
            print("outcome", outcome.image, outcome.seconds is not None, outcome.failure, flush=True)
"""

# Builds that end when they are told to, and clean up.
WAITING = """
def build(image, send):
    teller = begin(image, send)
    try:
        if image != "installing":
            teller.notice(events.Installed())
        wait()
    except Interrupted as error:
        teller.failed(error.message, None)
    finally:
        time.sleep(0.2)
        note(image, "released")
run(build)
"""


@contextmanager
def started(program: str, directory: Path, *images: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(program), str(directory), *images],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run(program: str, directory: Path, *images: str) -> list[str]:
    """Return the lines that *program* prints, sorted: those of different builds come as they come."""
    with started(program, directory, *images) as process:
        stdout, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stdout
    return sorted(stdout.splitlines())


def times(directory: Path, image: str) -> dict[str, float]:
    lines = (directory / image).read_text().splitlines()
    return {text.split()[0]: float(at) for at, text in (line.split(" ", 1) for line in lines)}


def test_finishing_runs_beside_the_next_installation(tmp_path: Path) -> None:
    program = """
    def build(image, send):
        teller = begin(image, send)
        wait(0.3)
        note(image, "installed")
        teller.notice(events.Installed())
        wait(3)
        note(image, "ended")
        teller.done()
    run(build)
    """
    lines = run(program, tmp_path, "a", "b", "c")
    assert lines == [f"outcome {image} True None" for image in "abc"]
    a, b, c = (times(tmp_path, image) for image in "abc")
    assert a["begun"] < a["installed"] < b["begun"] < b["installed"] < c["begun"]
    assert b["installed"] < a["ended"]


def test_no_more_are_finished_at_once_than_there_are_processors(tmp_path: Path) -> None:
    program = """
    os.cpu_count = lambda: 1
    def build(image, send):
        teller = begin(image, send)
        teller.notice(events.Installed())
        wait(2)
        note(image, "ended")
        teller.done()
    run(build)
    """
    run(program, tmp_path, "a", "b", "c")
    a, b, c = (times(tmp_path, image) for image in "abc")
    assert b["begun"] < a["ended"] < c["begun"]


def test_failure_of_one_does_not_stop_the_others(tmp_path: Path) -> None:
    """Whether it is told, or its process ends without a word."""
    program = """
    def build(image, send):
        teller = begin(image, send)
        print("begins", flush=True)
        print("half a line", end="", file=sys.stderr)
        if image == "fails":
            teller.failed("The disk is full.", "Free some space.")
        elif image == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif image == "raises":
            raise ValueError("a mistake")
        else:
            teller.done()
    run(build)
    """
    lines = run(program, tmp_path, "fails", "killed", "raises", "good")
    assert [line for line in lines if line.startswith("outcome")] == [
        "outcome fails True Failure(message='The disk is full.', hint='Free some space.')",
        "outcome good True None",
        "outcome killed True Failure(message='The build was killed by SIGKILL.', hint=None)",
        "outcome raises True Failure(message='The build failed with status 1.', hint=None)",
    ]
    for image in ("fails", "killed", "good"):
        assert {f"out {image} begins", f"err {image} half a line"} <= set(lines)
    assert "err raises ValueError: a mistake" in lines


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_stops_all(tmp_path: Path, number: signal.Signals, status: int) -> None:
    """All get the one that has come, the next is not begun, and the end is when all have released what they had."""
    with started(WAITING, tmp_path, "a", "installing", "later") as process:
        wait_for((tmp_path / "installing").exists, "the installation")
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == status
    stopped = f"Failure(message='Stopped by {number.name}.', hint=None)"
    assert sorted(stdout.splitlines()) == [
        f"Stopped by {number.name}.",
        f"outcome a True {stopped}",
        f"outcome installing True {stopped}",
        "outcome later False None",
    ]
    assert all("released" in times(tmp_path, image) for image in ("a", "installing"))


def test_ctrl_c_reaches_the_builds_once(tmp_path: Path) -> None:
    """A terminal sends it to the whole group of processes."""
    with started(WAITING, tmp_path, "a", "installing") as process:
        wait_for((tmp_path / "installing").exists, "the installation")
        os.killpg(process.pid, signal.SIGINT)
        stdout, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Already stopping" not in stdout


def test_killed_fleet_takes_its_builds_with_it(tmp_path: Path) -> None:
    """They release what they have, though no one reads what they say any more."""
    with started(WAITING, tmp_path, "a", "installing") as process:
        wait_for((tmp_path / "installing").exists, "the installation")
        process.kill()
        process.wait(30)
        wait_for(lambda: all("released" in times(tmp_path, image) for image in ("a", "installing")), "both turns")


def test_much_output_of_all_comes_through(tmp_path: Path) -> None:
    program = """
    def build(image, send):
        teller = begin(image, send)
        teller.notice(events.Installed())
        for number in range(20000):
            print(f"line {number}", file=sys.stderr)
        teller.done()
    run(build)
    """
    lines = run(program, tmp_path, "a", "b", "c")
    expected = [f"err {image} line {number}" for image in "abc" for number in range(20000)]
    assert [line for line in lines if line.startswith("err")] == sorted(expected)


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    program = """
    def build(image, send):
        fleet.Teller(send).done()
    before = len(os.listdir("/proc/self/fd"))
    run(build)
    print(len(os.listdir("/proc/self/fd")) - before)
    """
    assert run(program, tmp_path, *"abcdef")[0] == "0"


def test_summary_names_each_image_with_the_reason_of_its_failure() -> None:
    outcomes = [
        Outcome("a", 61.04),
        Outcome("b", 2, Failure("No\x1b[31m space.", "Free\nsome.")),
        Outcome("c", 2, Failure("Stopped by SIGTERM.", None)),
        Outcome("d"),
    ]
    assert cli.fleet_summary(outcomes, 62) == (
        "Images:\n"
        "    61.0  a: done\n"
        "     2.0  b: failed: No space.\n"
        "          Free some.\n"
        "     2.0  c: failed: Stopped by SIGTERM.\n"
        "          d: not begun\n"
        "    62.0  in all"
    )


def test_teller_of_a_fleet_that_has_gone() -> None:
    def send(message: object) -> None:
        raise BrokenPipeError

    fleet.Teller(send).failed("x", None)
