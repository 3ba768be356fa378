"""The disk as it is."""

import os
from pathlib import Path

from ..base import command
from ..model import Build
from ..parts import State
from .kind import Output


def _commands(build: Build, path: Path) -> list[list[str]]:
    return []


def _write(output: Output, state: State, path: Path) -> None:
    """Give the disk itself the artifact's name, so that it's the last format to be written."""
    path.unlink(missing_ok=True)
    try:
        # A second name, as a build that fails later goes on from the disk.
        os.link(state.disk.path, path)
    except OSError:
        # There are filesystems that have no such thing.
        command.run(["cp", "--sparse=always", "--reflink=auto", str(state.disk.path), str(path)])
    # libvirt's QEMU may have changed who can read it.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


RAW = Output("Naming the raw image", "raw", _commands, _write, driver="raw", takes_disk=True)
