"""Installations take turns on a machine: by number, or by processors and memory, and whatever ends them."""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from image_factory.base import events
from image_factory.machines import turns
from image_factory.told import estimates

from ..conftest import PATIENCE
from ..unit.test_estimates import Clock, build, make_plan

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534
GIB = 1 << 30
CORES = os.cpu_count() or 1

# Says what it does, and keeps its turn until there is a line on stdin.
PROGRAM = f"""
import logging, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from image_factory.base import interrupts, log
from image_factory.machines import turns
from image_factory.base.errors import Interrupted
turns._PREFIX, limit, ram, cores = sys.argv[1:]
turns._POLL_SECONDS = 0.05
log.logger.addHandler(logging.StreamHandler(sys.stdout))
log.logger.setLevel(logging.INFO)
try:
    with interrupts.handled():
        with turns.taken(None if limit == "auto" else float(limit), int(ram), int(cores)):
            print("installs", flush=True)
            with interrupts.interruptible():
                sys.stdin.readline()
        print("ended", flush=True)
except Interrupted as error:
    sys.exit(error.exit_status)
"""


@dataclass
class Machine:
    """A machine of its own, as far as turns go."""

    prefix: str
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start(self, limit: str = "auto", *, ram: int = GIB // 4, cores: int = 1, user: int = 0) -> "Installation":
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, self.prefix, limit, str(ram), str(cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            user=user,
            extra_groups=[],
        )
        self.started.append(process)
        return Installation(process)


@dataclass
class Installation:
    process: "subprocess.Popen[str]"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()

    def waits(self) -> str:
        """Return why."""
        assert self.line() == f"{turns.STEP} ..."
        return self.line()

    def has_waited(self) -> bool:
        return self.line().startswith(f"{turns.STEP}: done in ") and self.line() == "installs"

    def end(self) -> None:
        self.process.communicate("\n", timeout=PATIENCE)
        assert self.process.returncode == 0


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine(f"test-{secrets.token_hex(4)}")
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def test_one_alone_always_runs(machine: Machine) -> None:
    first = machine.start("1", ram=1 << 50, cores=9999)
    assert first.line() == "installs"
    first.end()
    second = machine.start(ram=1 << 50, cores=9999)
    assert second.line() == "installs"
    second.end()


def test_number(machine: Machine) -> None:
    first, second = machine.start("2", ram=1 << 50), machine.start("2", ram=1 << 50)
    assert (first.line(), second.line()) == ("installs", "installs")
    third = machine.start("2")
    assert third.waits() == "2 run on this machine (of root), and max-parallel = 2."
    first.end()
    assert third.has_waited()
    third.end()
    second.end()


def test_none_is_no_limit(machine: Machine) -> None:
    """But others count it."""
    many = [machine.start("inf", ram=1 << 50, cores=100) for _ in range(5)]
    assert [one.line() for one in many] == ["installs"] * 5
    assert machine.start("5").waits() == "5 run on this machine (of root), and max-parallel = 5."


def test_processors(machine: Machine) -> None:
    first = machine.start(cores=CORES)
    assert first.line() == "installs"
    second = machine.start()
    taken = f"{CORES} of its {CORES} processors"
    assert second.waits() == f"1 runs on this machine (of root), with {taken}; this one needs 1 (see max-parallel)."
    first.end()
    assert second.has_waited()


def test_memory() -> None:
    """What there is is for all together; who needs less may find a place where another has to wait."""
    others = [turns._Installation(turns.memory() - 100, 0, 0)]
    assert turns._why_not(turns._Installation(100, 1, 0), None, others) is None
    reason = turns._why_not(turns._Installation(101, 1, 0), None, others)
    assert reason is not None
    assert reason.startswith("1 runs on this machine (of root), with ")
    assert reason.endswith(" GiB for them; this one needs 101.0 MiB (see max-parallel).")


def test_another_user(machine: Machine) -> None:
    """Of whom neither can take the other's place away."""
    first = machine.start("1", user=NOBODY)
    assert first.line() == "installs"
    second = machine.start("1")
    assert second.waits() == "1 runs on this machine (of nobody), and max-parallel = 1."
    first.end()
    assert second.has_waited()
    third = machine.start("1", user=NOBODY)
    assert third.waits() == "1 runs on this machine (of root), and max-parallel = 1."


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_place_of_a_crashed_holder_is_free_at_once(machine: Machine, number: signal.Signals) -> None:
    first = machine.start("1")
    assert first.line() == "installs"
    second = machine.start("1")
    second.waits()
    first.process.send_signal(number)
    start = time.monotonic()
    assert second.has_waited()
    assert time.monotonic() - start < 60
    if number != signal.SIGTERM:
        assert first.process.wait(30) == -number


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_waiting_can_be_interrupted(machine: Machine, number: signal.Signals, status: int) -> None:
    first = machine.start("1")
    assert first.line() == "installs"
    second = machine.start("1")
    second.waits()
    second.process.send_signal(number)
    assert second.process.wait(30) == status
    # It has taken nothing.
    first.end()
    assert machine.start("1").line() == "installs"


def test_never_more_than_the_number(machine: Machine) -> None:
    """Started at the same moment, 8 take turns of 2; each of them comes to its turn."""
    many = [machine.start("2") for _ in range(8)]
    running = _count(machine.prefix, lambda count: count == 2)
    assert running == 2
    for one in many:
        assert one.process.stdin is not None
        one.process.stdin.write("\n")
        one.process.stdin.flush()
    said = [one.process.communicate(timeout=PATIENCE)[0] for one in many]
    assert [text.splitlines()[-2:] for text in said] == [["installs", "ended"]] * 8


def _count(prefix: str, wanted: Callable[[int], bool]) -> int:
    deadline = time.monotonic() + PATIENCE
    while True:
        count = Path("/proc/net/unix").read_text().count(f"@{prefix}/installation/")
        if wanted(count) or time.monotonic() > deadline:
            # Were there to be more, they would come now.
            time.sleep(0.5)
            return Path("/proc/net/unix").read_text().count(f"@{prefix}/installation/")
        time.sleep(0.05)


def test_who_decides_for_ever_keeps_no_one_from_its_turn(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_PREFIX", machine.prefix)
    with turns._named("deciding"):
        first = machine.start("1")
        start = time.monotonic()
        assert first.line() == "installs"
        assert time.monotonic() - start > turns._DECISION_SECONDS / 2


def test_names_that_are_none_are_not_counted(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_PREFIX", machine.prefix)
    with turns._named("installation/1/2"), turns._named("installation/x/1/0/00000000"), turns._named("installation/"):
        assert turns._running() == []
        assert machine.start("1").line() == "installs"


def test_without_the_list_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_NAMES", tmp_path / "not-there")
    warnings: list[str] = []
    monkeypatch.setattr(turns.logger, "warning", lambda text, *values: warnings.append(text % values))
    with turns.taken(1, GIB, 1), turns.taken(1, GIB, 1):
        pass
    assert (
        warnings
        == [f"Other installations on this machine can't be counted: No such file or directory: {tmp_path}/not-there."]
        * 2
    )


def test_waiting_is_not_expected_of_the_next_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    timeline = estimates.Timeline(make_plan(tmp_path))
    timeline.notice(events.StepStarted(turns.STEP))
    clock.now += 5000
    timeline.notice(events.StepEnded(turns.STEP, 5000, failed=False))
    build(timeline, clock)
    assert timeline.seconds == 5120
    timeline.keep()
    assert estimates.Timeline(make_plan(tmp_path)).left() == 120
