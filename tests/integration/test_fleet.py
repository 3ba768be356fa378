"""Builds beside each other: of two users at the same moment, and of several images by one command."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ..conftest import PATIENCE, User, left_behind, run, wait_for
from .test_build import TODAY, Build, new_build

pytestmark = pytest.mark.usefixtures("machine")

# No control characters but the end of a line.
PLAIN = re.compile(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f]*")


@pytest.fixture
def other_build(request: pytest.FixtureRequest, users: dict[str, User], stand_in: Path) -> Iterator[Build]:
    yield from new_build(users["b"], request, stand_in)


def configure(build: Build, *, extra: str = "", **arguments: str) -> None:
    """Have an image for each of the kernel's *arguments*."""
    build.configure()
    with (build.directory / "image-factory.conf").open("a") as file:
        for image, words in arguments.items():
            file.write(f"[{image}]\nbased_on = stand-in\nappend = console=ttyS0 no_timer_check {words}\n{extra}\n")


def argv(build: Build, *words: str) -> list[str]:
    """Return the command that builds the images among *words*, with what a Jenkins job has in its environment."""
    configuration = str(build.directory / "image-factory.conf")
    return build.user.argv(build.user.program, *words, IMAGE_FACTORY_CONFIG=configuration, SSH_AUTH_SOCK="")


@contextmanager
def started(build: Build, *words: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        argv(build, *words),
        cwd=build.directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def machine_names(text: str) -> set[str]:
    return set(re.findall(r"virt-install .*? --name (\S+)", text))


def test_builds_of_two_users_at_once(user_build: Build, other_build: Build) -> None:
    """Two install beside each other, each on a screen of its own; the third waits for its turn."""
    extra = "vnc = localhost\nmax-parallel = 2"
    configure(user_build, extra=extra, one="", two="")
    configure(other_build, extra=extra, three="")
    wanted = [(user_build, "one"), (user_build, "two"), (other_build, "three")]
    with ExitStack() as stack:
        running = [stack.enter_context(started(build, image)) for build, image in wanted]
        said = [process.communicate(timeout=400)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], "\n".join(said)
    waited = [text for text in said if "INFO: Waiting for other installations ..." in text]
    assert len(waited) == 1
    assert re.search(r"INFO: 2 run on this machine \(of .*\), and max-parallel = 2\.\n", waited[0])
    assert len(set.union(*map(machine_names, said))) == 3
    for build, image in wanted:
        files = build.files()
        assert {f"{image}-{TODAY}.{suffix}" for suffix in ("qcow2", "qcow2.sha256sum", "console.log")} <= files
        console = (build.directory / f"{image}-{TODAY}.console.log").read_text()
        assert console.count("stand-in: started on Linux ") == 1


def test_images_of_one_command(user_build: Build) -> None:
    """As in Jenkins' console: each line has its image, and the reason of the failure is the last."""
    configure(user_build, first="", bad="stand-in=empty-disk", last="")
    (user_build.directory / "records").mkdir(mode=0o777)
    (user_build.directory / "records").chmod(0o777)
    flags = ["--json", "records", "--log-file"]
    with started(user_build, "first", "bad", "last", *flags) as process:
        said, _ = process.communicate(timeout=400)
    assert process.returncode == 1, said
    lines = said.splitlines()
    assert [line for line in lines if not PLAIN.fullmatch(line)] == []
    reason = "The disk has no partition table"
    assert lines[-1].startswith(f"image-factory: error: 1 of 3 images failed: bad: {reason}"), said
    summary = lines[lines.index("Images:") :]
    assert re.fullmatch(r" +[0-9.]+  first: done", summary[1])
    assert re.fullmatch(rf" +[0-9.]+  bad: failed: {reason}.*", summary[2])
    assert any(re.fullmatch(r" +[0-9.]+  last: done", line) for line in summary)
    assert [line for line in lines[: lines.index("Images:")] if not re.match("(?:first|bad|last): ", line)] == []
    files = user_build.files()
    assert {f"{image}-{TODAY}.{suffix}" for image in ("first", "last") for suffix in ("qcow2", "log")} <= files
    assert f"bad-{TODAY}.log" in files
    assert f"bad-{TODAY}.qcow2" not in files
    records = {
        image: json.loads((user_build.directory / f"records/{image}.json").read_text())
        for image in ("first", "bad", "last")
    }
    assert [record["image"] for record in records.values()] == ["first", "bad", "last"]
    assert [record["failure"] is None for record in records.values()] == [True, False, True]
    # One after the other, but the finishing of one runs beside the installation of the next.
    installing = [span(record, "Installing") for record in records.values()]
    assert all(before[1] <= after[0] for before, after in pairwise(installing))
    began, ended = records["bad"]["started"], records["first"]["ended"]
    assert datetime.fromisoformat(began) < datetime.fromisoformat(ended)


def span(record: dict[str, Any], name: str) -> tuple[datetime, datetime]:
    """Return when the step *name* began and ended."""
    (step,) = (step for step in record["steps"] if step["name"] == name)
    start = datetime.fromisoformat(step["started"])
    return start, start + timedelta(seconds=step["seconds"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_end_of_the_command_ends_its_builds(user_build: Build, number: signal.Signals, status: int) -> None:
    """The one that finishes and the one that installs; nothing is left of both, which the fixture looks for too."""
    # The post-build command is what the finishing has come to.
    configure(user_build, extra="post-build-command = sh -c 'exec sleep 600'", first="", second="stand-in=hang")
    with started(user_build, "first", "second") as process:
        console = user_build.directory / ".image-factory-second/console.log"
        wait_for(lambda: console.is_file() and "partition" in console.read_text(errors="replace"), "the machine")
        wait_for(lambda: (user_build.directory / f"first-{TODAY}.qcow2").exists(), "the first image")
        oldest = run("pgrep", "-o", "-u", user_build.user.name, "-f", f"^/usr/bin/python3 {user_build.user.program}")
        user_build.user.run("kill", f"-{number.name.removeprefix('SIG')}", oldest.stdout.strip())
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode in (status, 128 + number), said

    def builds() -> str:
        return run("pgrep", "-u", user_build.user.name, "-f", str(user_build.user.program), check=False).stdout

    wait_for(lambda: not builds(), "the builds to end")
    assert run("pgrep", "-u", user_build.user.name, "-x", "sleep", check=False).stdout == ""
    assert left_behind(user_build.user, user_build.directory) == [
        # What --resume goes on with.
        f"file {user_build.directory}/.image-factory-first"
    ]
    run(*argv(user_build, "--cleanup"), cwd=user_build.directory)
    if number == signal.SIGTERM:
        assert said.splitlines()[-1] == "image-factory: error: Stopped by SIGTERM."
        assert "first: failed: Stopped by SIGTERM." in said, said
