"""The disk as it is."""

import os

from ..log import step
from ..model import Artifact, Build, Disk


def commands(build: Build) -> list[list[str]]:
    """Return the commands it will run: none."""
    return []


def write(build: Build, disk: Disk) -> Artifact:
    """Give the disk itself the artifact's name."""
    path = build.directory / build.plan.file_name("raw")
    with step("Naming the raw image"):
        # A second name: the disk is still there for other formats, and no block is copied.
        os.link(disk.path, path)
        # libvirt's QEMU may have changed who can read it.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(path, 0o666 & ~umask)
    return Artifact(path, "raw", disk.path.stat().st_size)
