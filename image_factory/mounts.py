"""Mount the root filesystem of a disk, and let go of it."""

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import layout, privileged
from .errors import CommandError, NoSystemError
from .log import logger, step
from .model import Disk, Partition, Plan, Tree
from .release import released

STEP = "Mounting the root partition"

# The helper mounts nowhere else.
MOUNT_DIRECTORY = Path("/tmp")
MOUNT_PREFIX = "image-factory."

# A root filesystem has one of these.
_ROOT_MARKS = ("etc/fstab", "etc/os-release", "usr/lib/os-release")

# Something such as an indexer may hold a mount for a moment.
_UMOUNT_SECONDS = 5.0


@contextmanager
def mounted(disk: Disk) -> Iterator[Tree]:
    """Give the root filesystem of *disk*, mounted; NoSystemError if there is none."""
    partitions = layout.read_partitions(disk.path)
    candidates = layout.root_candidates(partitions)
    for partition in candidates:
        with _mounted_partition(disk, partition) as tree:
            if any(os.path.lexists(tree.path / mark) for mark in _ROOT_MARKS):
                yield tree
                return
    raise NoSystemError(
        f"None of the disk's filesystems is a root filesystem (with {' or '.join(_ROOT_MARKS)}): "
        f"{layout.describe(partitions)}."
    )


@contextmanager
def _mounted_partition(disk: Disk, partition: Partition) -> Iterator[Tree]:
    # The directory around the mount point is the user's alone: no one else sees the guest's files.
    with _mount_point() as path:
        with step(STEP):
            logger.info("Partition %d has %s.", partition.number, partition.filesystem)
            # The helper takes no path with a link in it.
            privileged.mount_image(disk.path.resolve(), partition.offset, partition.size, path)
        with released(partial(umount, path)):
            yield Tree(path, partition)


@contextmanager
def _mount_point() -> Iterator[Path]:
    """Give an empty directory, and remove it on the way out unless something is still mounted there."""
    directory = Path(tempfile.mkdtemp(prefix=MOUNT_PREFIX, dir=MOUNT_DIRECTORY))
    path = directory / "tree"
    try:
        path.mkdir(mode=0o700)
        yield path
    finally:
        _remove_mount_point(path)


def _remove_mount_point(path: Path) -> None:
    # That it could not be unmounted has been said.  rmdir spares a guest's files in any case.
    if not os.path.ismount(path):
        path.rmdir()
        path.parent.rmdir()


def umount(path: Path) -> None:
    """Unmount *path*, and try again for a short while if it is busy."""
    deadline = time.monotonic() + _UMOUNT_SECONDS
    while True:
        try:
            with step("Unmounting"):
                privileged.umount(path)
            return
        except CommandError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def release_left_mounts(plan: Plan, directory: Path) -> None:
    """Unmount what a killed build of *plan* has left mounted from the images in *directory*."""
    for device, mount_point in _loop_mounts():
        backing_file = Path("/sys/block", device, "loop/backing_file")
        try:
            image = Path(backing_file.read_text(encoding="utf-8").rstrip("\n"))
        except OSError:
            continue
        if image.parent == directory.resolve():
            umount(mount_point)
            parent = mount_point.parent
            if parent.parent == MOUNT_DIRECTORY and parent.name.startswith(MOUNT_PREFIX):
                _remove_mount_point(mount_point)


def _loop_mounts() -> list[tuple[str, Path]]:
    """Return the loop devices that are mounted here, with their mount points."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        mount_point, source = line.split()[4], line.partition(" - ")[2].split()[1]
        match = re.fullmatch(r"/dev/(loop[0-9]+)", source)
        if match:
            found.append((match[1], Path(mount_point)))
    return found
