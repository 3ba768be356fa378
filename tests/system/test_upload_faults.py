"""Faults in the middle of an upload: whoever is killed or told to stop, no program is left, and it is told why."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from image_factory.model import Artifact

from ..conftest import PATIENCE, REPOSITORY, run, wait_for
from ..upload_scene import PASSWORD, USER, artifact

__all__ = ["artifact"]

# A build's part that uploads, in a process of its own; there is one try.
UPLOAD = """\
import json, sys
from pathlib import Path
from image_factory.base import command, interrupts
from image_factory.base.errors import ImageFactoryError
from image_factory.configuration.settings import Destination
from image_factory.model import Artifact
from image_factory.uploads import UPLOADS, tries

tries.PAUSE_SECONDS = ()
keys = json.load(sys.stdin)
artifact = Artifact(Path(keys["path"]), keys["format"], 1, sha256=keys["sha256"])
login = keys["credentials"] and Path(keys["credentials"])
destination = Destination(
    "up", keys["type"], keys["target"], tuple(keys["arguments"]), (), credentials=login, tls="none" if login else None
)
with interrupts.handled(), command.reaping():
    try:
        UPLOADS[destination.type].upload(destination, artifact)
    except ImageFactoryError as error:
        print(error.message, flush=True)
        sys.exit(error.exit_status)
"""
PROGRAMS = {"http": "curl", "drp": "curl", "rclone": "rclone", "oci": "skopeo", "command": "sleep"}
SECONDS = "471106"


@dataclass
class Uploading:
    """An upload under way, to where it does not come to its end, and the program that it has started."""

    process: "subprocess.Popen[str]"
    kind: str
    mark: str

    def programs(self) -> list[int]:
        """Return the processes that upload."""
        lines = run("ps", "-eo", "pid=,args=").stdout.splitlines()
        found = [line.split(None, 1) for line in lines]
        name = re.compile(rf"(\S*/)?{PROGRAMS[self.kind]} .*{re.escape(self.mark)}")
        return [int(pid) for pid, arguments in found if name.match(arguments)]

    def ended(self) -> tuple[int, str]:
        """Return the status and what is told, when it has ended and no program is left."""
        told, _ = self.process.communicate(timeout=PATIENCE)
        wait_for(lambda: not self.programs(), f"the end of {PROGRAMS[self.kind]}")
        return self.process.returncode, told.strip()


@pytest.fixture(params=PROGRAMS)
def uploading(request: pytest.FixtureRequest, artifact: Artifact, tmp_path: Path) -> Iterator[Uploading]:
    kind = request.param
    login = tmp_path / "netrc"
    login.touch(0o600)
    login.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    empty = tmp_path / "rclone.conf"
    empty.touch(0o600)
    # It lets all come in, and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        target, mark, arguments = {
            "http": (f"http://{place}/", place, []),
            "drp": (f"http://{place}/images/", place, []),
            "rclone": (f":local:{tmp_path}/there", str(tmp_path), ["--bwlimit", "1k"]),
            "oci": (f"{place}/golden", place, []),
            "command": (f"sh -c 'exec sleep {SECONDS}' put", SECONDS, []),
        }[kind]
        credentials = {"http": None, "drp": str(login), "rclone": str(empty), "oci": None, "command": None}[kind]
        keys = {
            "path": str(artifact.path), "sha256": artifact.sha256, "format": artifact.format, "type": kind,
            "target": target, "arguments": arguments, "credentials": credentials,
        }  # fmt: skip
        if kind == "oci":
            make_layout(artifact.path, tmp_path)
        process = subprocess.Popen(
            [sys.executable, "-c", UPLOAD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "LC_ALL": "C.UTF-8"},
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(keys))
        process.stdin.close()
        process.stdin = None
        found = Uploading(process, kind, mark)
        try:
            wait_for(lambda: found.programs() or process.poll() is not None, PROGRAMS[kind])
            assert process.poll() is None, process.communicate()
            yield found
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


def make_layout(path: Path, directory: Path) -> None:
    """Make an image for containers with nothing in it at *path*."""
    layout = directory / "layout"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:latest")
    run("tar", "-C", layout, "-cf", path, ".")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop(uploading: Uploading, number: signal.Signals, status: int) -> None:
    uploading.process.send_signal(number)
    assert uploading.ended() == (status, f"Stopped by {number.name}.")


def test_killed(uploading: Uploading) -> None:
    uploading.process.kill()
    assert uploading.ended() == (-signal.SIGKILL, "")


def test_program_killed(uploading: Uploading) -> None:
    """It is an error like others, in one line, which says so."""

    def kill() -> bool:
        for pid in uploading.programs():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return uploading.process.poll() is not None

    # rclone is asked first what it can do there, and goes on without an answer.
    wait_for(kill, "the end of the upload")
    status, told = uploading.ended()
    assert (status, told.count("\n")) == (1, 0)
    assert re.search(r"killed|SIGKILL|signal 9|status 137", told), told
