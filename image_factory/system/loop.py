"""Mount the root filesystem of a disk on this machine, with a loop device, through the privileged helper."""

import contextlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..base import command, fuse, locks
from ..base.cleanup import released
from ..base.errors import BuildError, ConfigurationError
from ..base.log import logger, step, waiting
from ..model import Build, Change, Disk, Entry, Filesystem, Placed, Plan, Subvolume, Volume
from . import assembly, partitions, privileged
from .rehearsal import Call
from .tree import Tree

# The helper mounts nowhere else.
MOUNT_DIRECTORY = Path("/tmp")
MOUNT_PREFIX = "image-factory."

# What this machine's kernel can mount by now, and what it can load for that.
FILESYSTEMS = Path("/proc/filesystems")
MODULES = Path("/lib/modules")


# The installer's mkfs may know features that this machine's kernel doesn't.
_NEWER_KERNEL = (
    "A newer kernel may mount it, on this machine or, with mount-via = guestfs, in /boot; "
    "else have the answer file make the filesystem without what is new."
)

# Something such as an indexer may hold a mount for a moment.
_UMOUNT_SECONDS = 5.0


@dataclass(frozen=True)
class LoopFilesystem:
    """A ``Filesystem`` that is mounted at *path*, where *run* has the helper; *mount* mounts it there again."""

    path: Path
    volume: Volume
    mount: Callable[[], None]
    subvolumes: tuple[Subvolume, ...] = ()
    run: privileged.Run = privileged.by_sudo

    @property
    def seen(self) -> Path:
        """Where this process finds it."""
        return self.path

    def has(self, path: str) -> bool:
        """Return whether *path* is there."""
        return os.path.lexists(self.seen / path)

    def show(self, patterns: Sequence[str]) -> str:
        """Return the files that *patterns* match."""
        return privileged.show(self.run, self.path, patterns)

    def entries(self, patterns: Sequence[str]) -> list[Entry]:
        """Return what *patterns* match."""
        return privileged.entries(self.run, self.path, patterns)

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        """Return the files that *patterns* match."""
        return privileged.read(self.run, self.path, patterns)

    def write(self, path: str, data: bytes, mode: int) -> None:
        """Have *data* in the file *path*."""
        privileged.write(self.run, self.path, path, data, mode)

    def look(self, paths: Sequence[str]) -> list[Entry]:
        """Return those of *paths* that are there."""
        return privileged.look(self.run, self.path, paths)

    def put(self, items: Sequence[Placed], contents: Path) -> None:
        """Make *items*, whose bytes are in the file *contents*."""
        privileged.put(self.run, self.path, items, contents)

    def rename(self, path: str, name: str) -> None:
        """Give *path* another *name*."""
        privileged.rename(self.run, self.path, path, name)

    def remove(self, patterns: Sequence[str]) -> list[Change]:
        """Remove what *patterns* match."""
        return privileged.remove(self.run, self.path, patterns)

    def truncate(self, patterns: Sequence[str]) -> list[Change]:
        """Empty the files that *patterns* match."""
        return privileged.truncate(self.run, self.path, patterns)

    def load(self, path: str, most: int, offset: int = 0) -> bytes | None:
        """Return at most *most* bytes at *offset* of the file *path*."""
        # What is missing, a link, or for root only.  No link on the way is followed: the helper mounts so.
        with contextlib.suppress(OSError):
            descriptor = os.open(self.seen / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return os.pread(descriptor, most, offset)
            finally:
                os.close(descriptor)
        return None

    def usage(self, top: str) -> dict[str, int]:
        """Return what the entries of the directory *top* take."""
        return privileged.usage(self.run, self.path, top)

    def delete_subvolumes(self, paths: Sequence[str]) -> None:
        """Remove the subvolumes at *paths*."""
        privileged.delete_subvolumes(self.run, self.path, paths)

    def set_read_only(self, path: str, value: bool) -> None:
        """Make the subvolume at *path* read-only, or writable."""
        privileged.set_read_only(self.run, self.path, path, value)

    def key_files(self, top: str) -> dict[str, bytes]:
        """Return the files in the directory *top* that may have a private key."""
        return privileged.keys(self.run, self.path, top)

    @contextmanager
    def contents(self, places: Mapping[str, tuple[Filesystem, str]], options: Sequence[str]) -> Iterator[list[str]]:
        """Give the command that prints a tar of the system with *places*."""
        yield self.command(*contents_words(places, options))

    def command(self, *words: str) -> list[str]:
        """Return the command that runs the helper where it is mounted."""
        return privileged.helper_argv(*words)

    def trim(self) -> int | None:
        """Free the unused blocks."""
        if self.volume.filesystem == "btrfs":
            # It frees no metadata that was in use when it was mounted (seen with Linux 6.1 and 6.18), and
            # that holds small files, such as logs.
            umount(self.path)
            self.mount()
        return privileged.trim(self.run, self.path)

    def block_size(self) -> int:
        """Return the size of a block."""
        return os.statvfs(self.seen).f_bsize

    def discard_size(self) -> int:
        """Return 0: a loop device frees what its file can."""
        return 0


def contents_words(places: Mapping[str, tuple[Filesystem, str]], options: Sequence[str]) -> list[str]:
    """Return the call of the helper that prints a tar of the system with *places*."""
    words = ["contents"]
    for point, (filesystem, top) in places.items():
        assert isinstance(filesystem, LoopFilesystem)
        words.append(f"{point}:{filesystem.path}" + (f":{top}" if top else ""))
    return [*words, *options]


def lacks_driver(filesystem: str | None) -> bool:
    """Return whether *filesystem* is one that could be mounted if this machine's kernel had its driver."""
    if filesystem not in partitions.MOUNTED_FILESYSTEMS:
        return False
    # The driver of ext4 is the one of all three.
    kind = "ext4" if filesystem.startswith("ext") else filesystem
    known = {line.split()[-1] for line in FILESYSTEMS.read_text(encoding="ascii").splitlines()}
    modules = MODULES / os.uname().release
    return kind not in known and not any(
        re.search(rf"/{kind}\.ko\b", path.read_text(encoding="utf-8", errors="replace"))
        for path in (modules / "modules.dep", modules / "modules.builtin")
        if path.is_file()
    )


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    return [] if plan.as_root else ["sudo"]


def check(plan: Plan) -> None:
    """Raise ConfigurationError unless the helper can be run as root, and mounts what is in the output directory."""
    if reason := unsuited(plan):
        raise ConfigurationError(
            reason, hint="Build in another directory with --output-dir, or set mount-via to guestfs or auto."
        )
    privileged.check()


def unsuited(plan: Plan) -> str | None:
    """Return why the helper mounts no images in the output directory of *plan*, None if it does."""
    found = fuse.mount_of(plan.output_dir)
    # See check_filesystem in the helper.
    if found is None or "user_id=0" in found.options:
        return None
    return f"{plan.output_dir} is on {found.kind}, which a user has mounted: the helper mounts no image from there."


# The verbs of the helper, by the operations of a filesystem; what is not here needs no root.
VERBS = {
    "show": "show",
    "entries": "list",
    "read": "read",
    "write": "write",
    "look": "look",
    "put": "put",
    "rename": "rename",
    "remove": "remove",
    "truncate": "truncate",
    "usage": "usage",
    "key_files": "keys",
    "contents": "contents",
    "trim": "trim",
}
# What tells which filesystem is the root, and what belongs on it.
LOOKS = (("list", partitions.ROOT_MARKS), ("read", assembly.MOUNT_LISTS))
PLACE = f"{MOUNT_DIRECTORY}/{MOUNT_PREFIX}XXXXXXXX/partition-N"


def mounting(build: Build, disk: Disk) -> list[list[str]]:
    """Return the commands that mount the system on *disk*."""
    looks = [privileged.helper_argv(verb, PLACE, *words) for verb, words in LOOKS]
    words = privileged.mount_words(disk.path, "OFFSET", "SIZE", PLACE, read_only=disk.read_only)
    return [privileged.helper_argv(*words), *looks]


def commands(build: Build, calls: Sequence[Call]) -> list[list[str]]:
    """Return the commands that *calls* on the system are."""
    known = [(VERBS[call.operation], call.words) for call in calls if call.operation in VERBS]
    return [privileged.helper_argv(*words_of(verb, words)) for verb, words in known]


def words_of(verb: str, words: Sequence[str]) -> list[str]:
    """Return a call of the helper with *words* for what is mounted at PLACE."""
    return [verb, f":{PLACE}" if verb == "contents" else PLACE, *filter(None, words)]


def unmounting(build: Build, disk: Disk) -> list[list[str]]:
    """Return the commands that unmount the system on *disk*."""
    return [privileged.helper_argv("umount", PLACE)]


@contextmanager
def mounted(build: Build, disk: Disk, volumes: Sequence[Volume]) -> Iterator[Tree]:
    """Give the system on *volumes* of *disk*, mounted; NoSystemError if there is none."""
    # The directory around the mount points is the user's alone: no one else sees the guest's files.
    with mount_directory(mount_record(disk.path.parent)) as directory, released(partial(_umount_all, directory)):
        with step(assembly.MOUNTING):
            found = _mount_all(disk, volumes, directory)
        with contextlib.nullcontext() if disk.read_only else assembly.writable(found, disk.path.parent):
            yield found


def shell(build: Build, disk: Disk, volumes: Sequence[Volume]) -> None:
    """Open a shell in the root filesystem of *disk*."""
    with mounted(build, disk, volumes) as found:
        paths = [(branch.point, _path_of(branch.filesystem, branch.top)) for branch in reversed(found.branches)]
        for point, path in paths[1:]:
            logger.info("/%s is in %s.", point, path)
        command.interact([os.environ.get("SHELL", "/bin/sh")], cwd=paths[0][1])


def _path_of(filesystem: object, top: str) -> Path:
    assert isinstance(filesystem, LoopFilesystem)
    return filesystem.path / top


def _mount_all(disk: Disk, volumes: Sequence[Volume], directory: Path) -> Tree:
    """Mount what can be mounted of *volumes* below *directory*, where the caller unmounts it."""
    filesystems: list[LoopFilesystem] = []
    failures: dict[str, BuildError] = {}
    for volume in volumes:
        if volume.filesystem in partitions.MOUNTED_FILESYSTEMS:
            with _failure_noted(volume, failures):
                filesystems.append(_mount(disk, volume, directory))
    return assembly.assemble(filesystems, volumes, failures)


def _without_driver(volume: Volume) -> BuildError:
    return BuildError(
        f"{volume.name} has {volume.filesystem}, for which this machine's kernel has no driver.",
        hint="With mount-via = guestfs the kernel of libguestfs' appliance is used.",
    )


@contextmanager
def _failure_noted(volume: Volume, failures: dict[str, BuildError]) -> Iterator[None]:
    try:
        yield
    except BuildError as error:
        logger.warning("%s (%s) can't be mounted: its unused blocks stay.", volume.name, volume.filesystem)
        if "doesn't mount" in error.message:
            error.hint = _NEWER_KERNEL
        failures[volume.name] = _without_driver(volume) if lacks_driver(volume.filesystem) else error


def _mount(disk: Disk, volume: Volume, directory: Path) -> LoopFilesystem:
    partition = volume.partition
    assert partition is not None
    path = directory / f"partition-{partition.number}"
    path.mkdir(mode=0o700)
    # The helper takes no path with a link in it.
    # Of btrfs the top, which all subvolumes are below.
    top = volume.filesystem == "btrfs"
    mount = partial(
        privileged.mount_image,
        disk.path.resolve(),
        partition.offset,
        partition.size,
        path,
        top=top,
        read_only=disk.read_only,
    )
    mount()
    return LoopFilesystem(path, volume, mount, tuple(privileged.subvolumes(path)) if top else ())


def mount_record(directory: Path) -> Path:
    """Return the link in the working *directory* to the mount point, there as long as there may be one."""
    return directory / "mount-point"


@contextmanager
def mount_directory(record: Path) -> Iterator[Path]:
    """Give an empty directory for mount points, and remove it on the way out unless something is still mounted there.

    It is locked: one without a holder is what a killed build has left.
    """
    descriptor, directory = _locked_directory(record)
    try:
        with released(partial(_remove_mount_points, directory, record)):
            yield directory
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


def _mount_points(directory: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in directory.iterdir() if path.is_dir() and not path.is_symlink())
    return []


def _remove_mount_points(directory: Path, record: Path | None = None) -> None:
    # That something could not be unmounted has been said.  rmdir spares a guest's files in any case.
    points = _mount_points(directory)
    if any(os.path.ismount(path) for path in points):
        return
    for path in (*points, directory):
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
    if record is not None:
        record.unlink(missing_ok=True)


def _umount_all(directory: Path) -> None:
    """Unmount what is mounted in *directory*; one that is held doesn't keep the others."""
    # A signal may have stopped the wait for the helper when it had mounted already, so this looks.
    points = [path for path in _mount_points(directory) if os.path.ismount(path)]
    if not points:
        return
    with step(assembly.UNMOUNTING):
        failures = []
        for path in points:
            try:
                umount(path)
            except BuildError as error:
                logger.error("%s", error.message)
                failures.append(error)
        if failures:
            raise failures[0]


def umount(path: Path) -> None:
    """Unmount *path* if something is mounted there, and try again for a short while if it is busy."""
    deadline = time.monotonic() + _UMOUNT_SECONDS
    with contextlib.suppress(BuildError):
        if os.path.ismount(path):
            privileged.umount(path)
        return
    with waiting(f"Waiting for {path} to be unmounted; it is held by {_holders(path)}."):
        _umount_until(path, deadline)


def _umount_until(path: Path, deadline: float) -> None:
    while os.path.ismount(path):
        try:
            privileged.umount(path)
            return
        except BuildError as error:
            if time.monotonic() > deadline:
                raise BuildError(
                    f"{path} can't be unmounted: {error.message} It is held by {_holders(path)}.",
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
            _remove_mount_points(point.parent)
    record = mount_record(directory)
    if record.is_symlink():
        # It was killed before it had mounted.
        left = Path(os.readlink(record))
        if _is_ours(left):
            _remove_mount_points(left, record)
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
                _remove_mount_points(directory)
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
