"""The disk as it is."""

import os

from ..base import command
from ..model import Artifact, Build, Disk, Origin

MADE_FROM: Origin = "disk"
STEP = "Naming the raw image"


def commands(build: Build) -> list[list[str]]:
    """Return the commands it will run: none."""
    return []


def write(build: Build, disk: Disk) -> Artifact:
    """Give the disk itself the artifact's name, so that it's the last format to be written."""
    path = build.directory / build.plan.file_name("raw")
    virtual_size = disk.path.stat().st_size
    path.unlink(missing_ok=True)
    try:
        # A second name, as a build that fails later goes on from the disk.
        os.link(disk.path, path)
    except OSError:
        # There are filesystems that have no such thing.
        command.run(["cp", "--sparse=always", "--reflink=auto", str(disk.path), str(path)])
    # libvirt's QEMU may have changed who can read it.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)
    return Artifact(path, "raw", virtual_size)
