"""Jenkins aborts a build: SIGTERM to all that has its cookie, children first, by its own user."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ..conftest import PATIENCE
from .test_build import TODAY, Build

pytestmark = pytest.mark.usefixtures("machine")

COOKIE = "JENKINS_SERVER_COOKIE=durable-0123456789abcdef"
# After these it goes on without waiting for a process any longer.
SOFT_KILL_SECONDS = 5


def processes() -> Iterator[tuple[int, int, int, str, str]]:
    """Give id, parent, user, name and environment of all processes."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":\t", 1) for line in (directory / "status").read_text().splitlines())
            environment = (directory / "environ").read_bytes().decode(errors="replace")
            uid = int(fields["Uid"].split()[0])
            yield int(directory.name), int(fields["PPid"]), uid, fields["Name"], environment


def abort_as_jenkins(uid: int) -> set[str]:
    """Do as Jenkins' ProcessTree does on Linux; return the names of the processes that were meant."""
    tree = list(processes())
    meant = set()

    def kill(pid: int, name: str, owner: int, deadline: float) -> None:
        for child, parent, child_owner, child_name, _ in tree:
            if parent == pid:
                kill(child, child_name, child_owner, deadline)
        meant.add(name)
        if owner == uid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}/status").exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    for pid, _, owner, name, environment in tree:
        if owner == uid and COOKIE in environment.split("\0"):
            kill(pid, name, owner, time.monotonic() + SOFT_KILL_SECONDS)
    return meant


def test_aborted_while_installing(user_build: Build) -> None:
    cookie = dict([COOKIE.split("=", 1)])
    build = replace(user_build, user=replace(user_build.user, environment={**user_build.user.environment, **cookie}))
    build.configure(arguments="stand-in=hang")
    with build.started() as process:
        build.wait_for_guest("stand-in: ")
        meant = abort_as_jenkins(build.user.uid)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert len(meant) > 1
    # Other builds of the same user need their libvirt.
    assert not {name for name in meant if name.startswith(("libvirtd", "virtqemud", "qemu-system"))}
    assert build.stderr().splitlines()[-1] == "image-factory: error: Stopped by SIGTERM."
    assert build.files() == {"answers.cfg", "image-factory.conf", "stderr", f"stand-in-{TODAY}.console.log"}
