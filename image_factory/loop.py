"""Mount the root filesystem of a disk on this machine, with a loop device, through the privileged helper."""

import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import layout, privileged
from .errors import CommandError
from .log import logger, step
from .model import Build, Disk, Partition, Plan
from .release import released

STEP = "Mounting the root partition"

# The helper mounts nowhere else.
MOUNT_DIRECTORY = Path("/tmp")
MOUNT_PREFIX = "image-factory."

# Something such as an indexer may hold a mount for a moment.
_UMOUNT_SECONDS = 5.0


@dataclass(frozen=True)
class LoopTree:
    """A ``Tree`` that is mounted at *path*."""

    path: Path
    partition: Partition

    def show(self, patterns: Sequence[str]) -> str:
        """Return the files that *patterns* match."""
        return privileged.show(self.path, patterns)

    def remove(self, patterns: Sequence[str]) -> list[str]:
        """Remove what *patterns* match."""
        return privileged.remove(self.path, patterns)

    def trim(self) -> int | None:
        """Free the unused blocks."""
        return privileged.trim(self.path)

    def block_size(self) -> int:
        """Return the size of a block."""
        return os.statvfs(self.path).f_bsize


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    return [] if plan.as_root else ["sudo"]


def check(plan: Plan) -> None:
    """Raise ConfigurationError unless the helper can be run as root."""
    privileged.check()


def describe(build: Build, shown: Sequence[str], removed: Sequence[str]) -> list[tuple[str, list[list[str]]]]:
    """Return the steps on the tree with their commands; nothing is *shown* if that is empty."""
    tree = f"{MOUNT_DIRECTORY}/{MOUNT_PREFIX}XXXXXXXX/tree"
    helper = privileged.helper_argv
    return [
        (STEP, [helper("mount-image", str(build.disk_path), "OFFSET", "SIZE", tree)]),
        *([("Showing installer logs", [helper("show", tree, *shown)])] if shown else []),
        ("Removing installer logs", [helper("remove", tree, *removed)]),
        ("Freeing unused blocks", [helper("trim", tree)]),
        ("Unmounting", [helper("umount", tree)]),
    ]


@contextmanager
def mounted(build: Build, disk: Disk) -> Iterator[LoopTree]:
    """Give the root filesystem of *disk*, mounted; NoSystemError if there is none."""
    partitions = layout.read_partitions(disk.path)
    candidates = layout.root_candidates(partitions)
    for partition in candidates:
        with _mounted_partition(disk, partition) as tree:
            if any(os.path.lexists(tree.path / mark) for mark in layout.ROOT_MARKS):
                yield tree
                return
    raise layout.no_root(partitions)


@contextmanager
def _mounted_partition(disk: Disk, partition: Partition) -> Iterator[LoopTree]:
    # The directory around the mount point is the user's alone: no one else sees the guest's files.
    with _mount_point() as path:
        with step(STEP):
            logger.info("Partition %d has %s.", partition.number, partition.filesystem)
            # The helper takes no path with a link in it.
            privileged.mount_image(disk.path.resolve(), partition.offset, partition.size, path)
        with released(partial(umount, path)):
            yield LoopTree(path, partition)


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
