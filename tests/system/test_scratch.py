"""Directories for a moment: gone on every way out, and found again when the build was killed."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from image_factory.base import locks, scratch

from ..conftest import REPOSITORY, wait_for

HOLDER = """
import time
from image_factory.base import scratch
with scratch.directory() as path:
    (path / "file").touch()
    print(path, flush=True)
    time.sleep(60)
"""
READER = "import sys; from image_factory.downloads import fetch; fetch.read(sys.argv[1])"


def start(program: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["/usr/bin/python3", "-c", program, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


def own() -> set[Path]:
    return {path for path in Path("/tmp").glob("image-factory*") if path.lstat().st_uid == os.geteuid()}


def test_directory_is_removed_on_every_way_out() -> None:
    with scratch.directory() as path:
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "file").touch()
    assert not path.exists()
    with pytest.raises(ZeroDivisionError), scratch.directory() as path:
        raise ZeroDivisionError
    assert not path.exists()


def test_removal_that_fails_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    with pytest.raises(OSError, match="Input/output error"), scratch.directory(remove=refuse) as path:
        pass
    path.rmdir()


def test_cleanup_removes_what_a_killed_build_has_left() -> None:
    """It spares what is in use, another user's, and what a link leads to."""
    killed, used = start(HOLDER), start(HOLDER)
    others, link = Path(f"{scratch.PARENT}/{scratch.PREFIX}others"), Path(f"{scratch.PARENT}/{scratch.PREFIX}link")
    try:
        assert killed.stdout and used.stdout
        left, kept = Path(killed.stdout.readline().strip()), Path(used.stdout.readline().strip())
        killed.kill()
        killed.wait()
        others.mkdir()
        os.chown(others, 65534, 65534)
        link.symlink_to(kept)
        done = subprocess.run(
            ["/usr/bin/python3", REPOSITORY / "image-factory", "--cleanup"], capture_output=True, text=True, check=True
        )
        assert f"directory {left}" in done.stdout.splitlines()
        assert [path.exists() for path in (left, kept, others)] == [False, True, True]
        assert (kept / "file").exists() and link.is_symlink()
        used.send_signal(signal.SIGINT)
        used.wait()
        assert not kept.exists()
    finally:
        for process in (killed, used):
            process.kill()
            process.communicate()
        link.unlink(missing_ok=True)
        others.rmdir()


@pytest.mark.parametrize("scheme", ["http", "rsync"])
def test_build_that_is_killed_while_it_fetches_a_list(scheme: str) -> None:
    """What an HTTP server sends is in memory only."""
    before = own()
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader = start(READER, f"{scheme}://127.0.0.1:{server.getsockname()[1]}/pub/list")
        connection, _ = server.accept()
        with connection:
            left = own() - before
            reader.kill()
            reader.communicate()
            # What it has started ends with it.
            connection.settimeout(20)
            wait_for(lambda: connection.recv(4096) == b"", "the connection to end")
    assert len(left) == (scheme == "rsync")
    for path in left:
        assert path in scratch.remove_left()


def test_another_user_can_not_hold_it() -> None:
    with scratch.directory() as path:
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "flock", "-n", path, "true"], check=False
        )
        assert done.returncode not in (0, 1)
        assert locks.lock(path) is None
