"""Mount the root filesystem of a disk on this machine, with a loop device, through the privileged helper."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import command, layout, locks, privileged
from .errors import BuildError, CommandError
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


def shell(build: Build, disk: Disk) -> None:
    """Open a shell in the root filesystem of *disk*."""
    with mounted(build, disk) as tree:
        command.interact([os.environ.get("SHELL", "/bin/sh")], cwd=tree.path)


@contextmanager
def _mounted_partition(disk: Disk, partition: Partition) -> Iterator[LoopTree]:
    # The directory around the mount point is the user's alone: no one else sees the guest's files.
    # A signal may stop the wait for the helper when it has mounted already: umount looks.
    with _mount_point(mount_record(disk.path.parent)) as path, released(partial(umount, path)):
        with step(STEP):
            logger.info("Partition %d has %s.", partition.number, partition.filesystem)
            # The helper takes no path with a link in it.
            privileged.mount_image(disk.path.resolve(), partition.offset, partition.size, path)
        yield LoopTree(path, partition)


def mount_record(directory: Path) -> Path:
    """Return the link in the working *directory* to the mount point, there as long as there may be one."""
    return directory / "mount-point"


@contextmanager
def _mount_point(record: Path) -> Iterator[Path]:
    """Give an empty directory, and remove it on the way out unless something is still mounted there.

    The directory around it is locked: one without a holder is what a killed build has left.
    """
    descriptor, directory = _locked_directory(record)
    path = directory / "tree"
    try:
        with released(partial(_remove_mount_point, path, record)):
            path.mkdir(mode=0o700)
            yield path
    finally:
        os.close(descriptor)


def _locked_directory(record: Path) -> tuple[int, Path]:
    while True:
        # The link comes first, so that there is no moment in which a killed build leaves a
        # directory that no one knows of.
        directory = MOUNT_DIRECTORY / f"{MOUNT_PREFIX}{secrets.token_hex(4)}"
        record.unlink(missing_ok=True)
        record.symlink_to(directory)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            continue
        descriptor = None
        with contextlib.suppress(FileNotFoundError):
            descriptor = locks.lock(directory)
        if descriptor is not None:
            return descriptor, directory
        # A clean-up was faster than the lock.


def _remove_mount_point(path: Path, record: Path | None = None) -> None:
    # That it could not be unmounted has been said.  rmdir spares a guest's files in any case.
    if os.path.ismount(path):
        return
    for directory in (path, path.parent):
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()
    if record is not None:
        record.unlink(missing_ok=True)


def umount(path: Path) -> None:
    """Unmount *path* if something is mounted there, and try again for a short while if it is busy."""
    deadline = time.monotonic() + _UMOUNT_SECONDS
    while os.path.ismount(path):
        try:
            with step("Unmounting"):
                privileged.umount(path)
            return
        except BuildError as error:
            if time.monotonic() > deadline:
                said = error.last_lines[-1] if isinstance(error, CommandError) and error.last_lines else error.message
                raise BuildError(
                    f"{path} can't be unmounted: {said} It is held by {_holders(path)}.",
                    hint="End what holds it, then run image-factory --cleanup.",
                ) from error
            time.sleep(0.5)


def _holders(path: Path) -> str:
    """Return the processes that have something below *path* open, as far as this user can see."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # Those of others can't be read, and others end meanwhile.
        with contextlib.suppress(OSError):
            links = [process / name for name in ("cwd", "root", "exe")]
            with contextlib.suppress(OSError):
                links += (process / "fd").iterdir()
            if any(_is_below(link, path) for link in links):
                name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
                found.append(f"process {process.name} ({name})")
    return ", ".join(found) or "no process that this user can see"


def _is_below(link: Path, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return Path(os.readlink(link)).is_relative_to(path)
    return False


def release_left_mounts(directory: Path) -> list[Path]:
    """Unmount what a killed build has left mounted from the images in *directory*; return the mount points."""
    points = [point for point, image in image_mounts() if image.parent == directory.resolve()]
    for point in points:
        umount(point)
        if _is_ours(point.parent):
            _remove_mount_point(point)
    record = mount_record(directory)
    if record.is_symlink():
        # It was killed before it had mounted.
        left = Path(os.readlink(record))
        if _is_ours(left):
            _remove_mount_point(left / "tree")
    return points


def _is_ours(directory: Path) -> bool:
    return directory.parent == MOUNT_DIRECTORY and directory.name.startswith(MOUNT_PREFIX)


def remove_left_mount_points() -> Iterator[Path]:
    """Remove the directories for mounts that killed builds of this user have left; give each."""
    for directory in sorted(MOUNT_DIRECTORY.glob(f"{MOUNT_PREFIX}*")):
        # Another's can't be opened, or goes away meanwhile; one with other things in it is spared.
        with contextlib.suppress(OSError):
            if directory.lstat().st_uid != os.geteuid() or directory.is_symlink():
                continue
            descriptor = locks.lock(directory)
            if descriptor is None:
                continue
            try:
                _remove_mount_point(directory / "tree")
                if not directory.exists():
                    yield directory
            finally:
                os.close(descriptor)


def image_mounts() -> list[tuple[Path, Path]]:
    """Return what is mounted of loop devices here: the mount points, and the images' paths."""
    found = []
    for device, mount_point in _loop_mounts():
        with contextlib.suppress(OSError):
            backing_file = Path("/sys/block", device, "loop/backing_file").read_text(encoding="utf-8")
            found.append((mount_point, Path(backing_file.rstrip("\n"))))
    return found


def _loop_mounts() -> list[tuple[str, Path]]:
    """Return the loop devices that are mounted here, with their mount points."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        mount_point, source = line.split()[4], line.partition(" - ")[2].split()[1]
        match = re.fullmatch(r"/dev/(loop[0-9]+)", source)
        if match:
            found.append((match[1], Path(mount_point)))
    return found
