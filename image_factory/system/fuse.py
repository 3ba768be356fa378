"""Mount the filesystems of a disk in namespaces of the build's own: no root, no sudo rule, no virtual machine.

fuse2fs(1) has ext2 to ext4 there.  FAT, which no kernel mounts for a user, becomes a copy in memory, and mtools put
back what has changed.  Processes and mounts go with the namespaces, however the build ends.  fuse2fs writes without a
journal, so it is given a copy of the build's disk, which takes the disk's place when it is unmounted.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..base import command, files, interrupts
from ..base.cleanup import released
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..base.log import logger, step
from ..inside import namespaces
from ..inside.namespaces import Namespaces
from ..model import Build, Disk, Partition, Plan, Volume
from . import assembly, loop, partitions, privileged
from .rehearsal import Call
from .tree import Tree

DEVICE = Path("/dev/fuse")
EXT = ("ext2", "ext3", "ext4")
# What it can reach, beside what is never mounted.
FILESYSTEMS = (*EXT, "vfat")

_POLL_SECONDS = 0.02
_MOUNT_SECONDS = 60.0
# No link of the guest's leads out.
_OPTIONS = "remount,bind,nosymfollow,nosuid,nodev,noexec"
# All rights are those of its user.  Nothing else changes it, so that the kernel need not ask for everything each time:
# with fuse2fs' own options a look at all files takes twice as long.
_CACHED = "fakeroot,no_default_opts,use_ino,kernel_cache,attr_timeout=3600,entry_timeout=3600,subtype=ext4"
# What e2fsck says of one that was in order, and of one that is now.
_IN_ORDER = (0, 1)
_HINT = "Set mount-via = guestfs, which has the kernel's own driver."


@dataclass(frozen=True)
class FuseFilesystem(loop.LoopFilesystem):
    """A ``Filesystem`` that is mounted in the namespaces of process *holder*."""

    holder: int = 0

    @property
    def seen(self) -> Path:
        """Where this process finds it."""
        return Path(f"/proc/{self.holder}/root{self.path}")

    def trim(self) -> int | None:
        """Return how many bytes are unused; they are freed when it is unmounted."""
        status = os.statvfs(self.seen)
        return status.f_bfree * status.f_frsize


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    own = ["fuse2fs", "e2fsck", "mcopy", "mdir", "mdel", "mdeltree", "mmd", "mount", "umount", "find"]
    return [*namespaces.programs(as_root=False), *own]


def check(plan: Plan) -> None:
    """Raise ConfigurationError unless this user can mount filesystems in namespaces here."""
    if plan.as_root:
        raise ConfigurationError("mount-via = fuse is for ordinary users.", hint="Root can do with loop.")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise ConfigurationError(
            f"mount-via = fuse needs {DEVICE}, which this user can't open.", hint="Load it: sudo modprobe fuse"
        )
    namespaces.check(as_root=False)


# For the dry run.


def _shown(*words: str) -> list[str]:
    return namespaces.entering_argv("PID", *words, as_root=False)


def mounting(build: Build, disk: Disk) -> list[list[str]]:
    """Return the commands that mount the system on *disk*: those of FAT, and of ext."""
    path = _path(build, disk.path)
    return [
        *([] if path == disk.path else [duplicate_argv(disk.path, path)]),
        namespaces.holding_argv(as_root=False),
        _shown(*_fat_argv(loop.PLACE, "SIZE")),
        _shown(*_copy_argv(path, "OFFSET", loop.PLACE)),
        check_argv(path, "OFFSET"),
        _shown(*mount_argv(path, "OFFSET", loop.PLACE)),
        _shown(*_guard_argv(loop.PLACE)),
        *(_shown(*_helper_words(verb, loop.PLACE, *words)) for verb, words in loop.LOOKS),
    ]


def commands(build: Build, calls: Sequence[Call]) -> list[list[str]]:
    """Return the commands that *calls* on the system are."""
    known = [(loop.VERBS[call.operation], call.words) for call in calls if call.operation in loop.VERBS]
    # Blocks are freed when it is unmounted.
    return [_shown(*_helper_words(verb, loop.PLACE, *filter(None, words))) for verb, words in known if verb != "trim"]


def unmounting(build: Build, disk: Disk) -> list[list[str]]:
    """Return the commands that unmount the system on *disk*."""
    return [_shown("umount", loop.PLACE), free_argv(_path(build, disk.path), "OFFSET")]


def _helper_words(*words: str) -> list[str]:
    return [privileged.helper_path(by_sudo=False), *words]


def _path(build: Build, disk: Path) -> Path:
    """Return what is mounted for *disk*: a copy of the one that a later build goes on from."""
    return build.directory / "mounted.raw" if disk == build.disk_path else disk


def duplicate_argv(disk: Path, path: Path) -> list[str]:
    """Return the command that copies *disk* to *path*."""
    return ["cp", "--sparse=always", "--reflink=auto", str(disk), str(path)]


def _at(disk: Path, offset: int | str) -> str:
    return f"{disk}?offset={offset}"


def check_argv(disk: Path, offset: int | str) -> list[str]:
    """Return the command that checks the ext filesystem at *offset* of *disk*, and plays its journal."""
    return ["e2fsck", "-p", _at(disk, offset)]


def mount_argv(disk: Path, offset: int | str, path: Path | str) -> list[str]:
    """Return the command that mounts the ext filesystem at *offset* of *disk*, and runs as long as it is mounted."""
    return ["fuse2fs", "-f", "-s", "-o", f"{_CACHED},offset={offset}", str(disk), str(path)]


def _guard_argv(path: Path | str) -> list[str]:
    return ["mount", "-o", _OPTIONS, str(path)]


def _fat_argv(path: Path | str, size: int | str) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"mode=755,size={size}", "copy", str(path)]


def _copy_argv(disk: Path, offset: int | str, path: Path | str) -> list[str]:
    return ["mcopy", "-s", "-Q", "-m", "-n", "-i", f"{disk}@@{offset}", "::/", str(path)]


def free_argv(disk: Path, offset: int | str) -> list[str]:
    """Return the command that checks the ext filesystem at *offset* of *disk*, and makes holes of unused blocks."""
    return ["e2fsck", "-f", "-p", "-E", "discard", _at(disk, offset)]


# Mounting.


@contextmanager
def mounted(build: Build, disk: Disk, volumes: Sequence[Volume]) -> Iterator[Tree]:
    """Give the system on *volumes* of *disk*, mounted; NoSystemError if there is none."""
    directory = disk.path.parent
    with (
        _duplicated(build, disk) as mounted_disk,
        loop.mount_directory(loop.mount_record(directory)) as points,
        namespaces.entered(directory, as_root=False) as inside,
        ExitStack() as stack,
    ):
        with step(assembly.MOUNTING):
            place = _Place(mounted_disk, points, inside)
            found, failures = [], {}
            for volume in volumes:
                if volume.filesystem in partitions.MOUNTED_FILESYSTEMS:
                    try:
                        found.append(place.mounted(volume, stack))
                    except BuildError as error:
                        logger.warning(
                            "%s (%s) can't be mounted: its unused blocks stay.", volume.name, volume.filesystem
                        )
                        failures[volume.name] = error
            tree = assembly.assemble(found, volumes, failures)
        with _unmounting_told(stack, mounted_disk, disk), assembly.writable(tree, directory):
            yield tree


@contextmanager
def _duplicated(build: Build, disk: Disk) -> Iterator[Disk]:
    """Give what is mounted for *disk*; a copy is gone at the end."""
    path = _path(build, disk.path)
    if path == disk.path:
        yield disk
        return
    with released(partial(path.unlink, missing_ok=True)):
        command.run(duplicate_argv(disk.path, path))
        yield Disk(path)


@contextmanager
def _unmounting_told(stack: ExitStack, mounted_disk: Disk, disk: Disk) -> Iterator[None]:
    """Unmount all on the way out, as a step of the build, and have *mounted_disk* take the place of *disk*."""

    def unmount() -> None:
        with step(assembly.UNMOUNTING):
            stack.close()
            files.move(mounted_disk.path, disk.path)

    with released(unmount):
        yield


@dataclass(frozen=True)
class _Place:
    """Where the filesystems of *disk* are mounted: in the directory *points*, in the namespaces *inside*."""

    disk: Disk
    points: Path
    inside: Namespaces

    def mounted(self, volume: Volume, stack: ExitStack) -> FuseFilesystem:
        """Mount *volume* until *stack* is closed."""
        assert volume.partition is not None
        path = self.points / f"partition-{volume.partition.number}"
        path.mkdir(mode=0o700)
        mounting = self._ext if volume.filesystem in EXT else self._fat
        stack.enter_context(mounting(volume.partition, path))
        return FuseFilesystem(path, volume, _mounted_once, run=self._helper, holder=self.inside.pid)

    def _helper(self, *arguments: str, stdin: bytes | None = None) -> str:
        with privileged.refusal_told():
            argv = _helper_words(*arguments)
            return self.inside.run(*argv, capture=True, timeout=privileged.SECONDS, stdin=stdin)

    @contextmanager
    def _ext(self, partition: Partition, path: Path) -> Iterator[None]:
        _check(check_argv(self.disk.path, partition.offset))
        log = self.disk.path.parent / f"{path.name}.log"
        argv = namespaces.entering_argv(
            self.inside.pid, *mount_argv(self.disk.path, partition.offset, path), as_root=False
        )
        with command.background(argv, log) as ended:
            _wait_until(lambda: self._has(path) or ended() is not None, "mount")
            if ended() is not None:
                said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise BuildError(f"fuse2fs can't mount it: {said[-1] if said else 'it says nothing'}.", hint=_HINT)
            self.inside.run(*_guard_argv(path))
            with released(partial(self._unmount, path, ended)):
                yield
        log.unlink()
        _check(free_argv(self.disk.path, partition.offset))

    def _has(self, path: Path) -> bool:
        return os.path.ismount(f"/proc/{self.inside.pid}/root{path}")

    def _unmount(self, path: Path, ended: Callable[[], int | None]) -> None:
        self.inside.run("umount", str(path))
        # FUSE has it write what is left when nothing is mounted any more.
        _wait_until(lambda: ended() is not None, "unmount")
        if ended():
            raise BuildError(f"fuse2fs has failed with status {ended()}.", hint=_HINT)

    @contextmanager
    def _fat(self, partition: Partition, path: Path) -> Iterator[None]:
        image = f"{self.disk.path}@@{partition.offset}"
        self.inside.run(*_fat_argv(path, partition.size))
        self.inside.run(*_copy_argv(self.disk.path, partition.offset, path))
        before = self._listed(path)
        yield
        after = self._listed(path)
        if after != before:
            self._put_back(image, partition, path, before, after)

    def _listed(self, path: Path) -> dict[str, str]:
        """Return what is below *path*: kind, size and time of each by its path."""
        words = ["find", str(path), "-mindepth", "1", "-printf", r"%y %s %T@ %P\0"]
        found = (entry.split(" ", 3) for entry in self.inside.run(*words, capture=True, quiet=True).split("\0")[:-1])
        # The size of a directory, and its time, tell nothing that its entries don't.
        return {name: kind if kind == "d" else f"{kind} {size} {at}" for kind, size, at, name in found}

    def _put_back(
        self, image: str, partition: Partition, path: Path, before: dict[str, str], after: dict[str, str]
    ) -> None:
        """Do to the FAT filesystem *image* what was done to its copy at *path*, and zero its unused clusters."""
        gone = [name for name in before if after.get(name, " ")[0] != before[name][0]]
        for name in gone:
            if not any(name.startswith(f"{other}/") for other in gone):
                self.inside.run("mdeltree", "-i", image, f"::/{name}")
        for name in sorted(name for name in after if before.get(name) != after[name] or name in gone):
            if after[name] == "d":
                self.inside.run("mmd", "-i", image, f"::/{name}")
            else:
                self.inside.run("mcopy", "-o", "-Q", "-m", "-i", image, str(path / name), f"::/{name}")
        last = self.inside.run("mdir", "-i", image, "::/", capture=True, quiet=True).strip().splitlines()[-1]
        zeros = self.disk.path.parent / "zeros"
        with zeros.open("wb") as file:
            file.truncate(int(re.sub("[^0-9]", "", last) or 0))
        self.inside.run("mcopy", "-Q", "-i", image, str(zeros), "::/zeros")
        self.inside.run("mdel", "-i", image, "::/zeros")
        zeros.unlink()


def _mounted_once() -> None:
    """Do nothing: only btrfs is mounted anew."""


def _check(argv: list[str]) -> None:
    try:
        command.run(argv)
    except CommandError as error:
        if error.status not in _IN_ORDER:
            raise BuildError(f"The filesystem is not in order: {error.said}.", hint=_HINT) from error


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + (_MOUNT_SECONDS if what == "mount" else privileged.SECONDS)
    with interrupts.interruptible():
        while not condition():
            if time.monotonic() > deadline:
                raise BuildError(f"fuse2fs has come to no end: it can't {what}.", hint=_HINT)
            time.sleep(_POLL_SECONDS)


def shell(build: Build, disk: Disk, volumes: Sequence[Volume]) -> None:
    """Open a shell in the root filesystem of *disk*, in the namespaces."""
    with mounted(build, disk, volumes) as found:
        root, *others = reversed(found.branches)
        for branch in others:
            assert isinstance(branch.filesystem, FuseFilesystem)
            logger.info("/%s is in %s.", branch.point, branch.filesystem.path)
        filesystem = root.filesystem
        assert isinstance(filesystem, FuseFilesystem)
        words = ["sh", "-c", 'cd "$1" && exec "${SHELL:-sh}"', "sh", str(filesystem.path / root.top)]
        command.interact(namespaces.entering_argv(filesystem.holder, *words, as_root=False))
