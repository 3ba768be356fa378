"""The files of an installed system, whose filesystems are mounted each at a place of its own.

They are not mounted below each other: a link where a mount point belongs leads nowhere then, and the
places for mounts stay the ones that image-factory-sudo-helper allows.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from . import fstab, interrupts, layout
from .errors import BuildError
from .log import logger
from .model import Change, Entry, Filesystem, LogicalVolumes, Volume
from .units import format_size

# The directory of a btrfs subvolume, as patterns may begin with it: no part of it is ``.`` or ``..``.
_PART = r"\.?[A-Za-z0-9_@][A-Za-z0-9._@-]{0,254}"
_TOP = re.compile(rf"(?:{_PART}/){{0,7}}{_PART}")

# Of a guest's text in a message.
_LONGEST_QUOTE = 100

# So much is read of one system in all: rpm's database of a large one has 200 MiB.
_MOST_BYTES = 2 << 30
_MOST_NAMES = 1_000_000


def is_top(name: str) -> bool:
    """Return whether *name* can be the directory of a subvolume in what follows."""
    return name == "" or bool(_TOP.fullmatch(name))


@dataclass(frozen=True)
class Branch:
    """Directory *top* of *filesystem*, which is *point* of the system: ``""`` or such as ``var/log``."""

    filesystem: Filesystem
    top: str
    point: str

    def has(self, path: str) -> bool:
        """Return whether *path* of the system is on it."""
        return not self.point or path == self.point or path.startswith(f"{self.point}/")

    def inner(self, pattern: str) -> str:
        """Return the pattern in the filesystem for *pattern* of the system."""
        return "/".join(filter(None, (self.top, pattern.removeprefix(self.point).lstrip("/"))))

    def outer(self, path: str) -> str:
        """Return the path of the system for *path* in the filesystem."""
        return "/".join(filter(None, (self.point, path.removeprefix(self.top).lstrip("/"))))


@dataclass
class Budget:
    """How much of a guest may still be read, as *size* bytes and *names*, whoever reads it."""

    size: int = _MOST_BYTES
    names: int = _MOST_NAMES

    def spend(self, *, size: int = 0, names: int = 0) -> None:
        """Count what was read; BuildError if it was too much, Interrupted if a signal has come."""
        interrupts.check()
        self.size -= size
        self.names -= names
        if self.size < 0:
            raise BuildError(f"The system has more than {format_size(_MOST_BYTES)} where packages and settings are.")
        if self.names < 0:
            raise BuildError(f"The system has more than {_MOST_NAMES} files in the directories that are looked into.")


@dataclass(frozen=True)
class Tree:
    """An installed system: *branches* has the root last, and what is mounted deeper before.

    *filesystems* are all that are mounted, those that the system's fstab doesn't name among them.
    Patterns are paths below the root, and the operations those of ``Filesystem``.  *logical* is there
    where the disk has logical volumes.  All that reads the guest does so here, within one *budget*.
    """

    branches: tuple[Branch, ...]
    filesystems: tuple[Filesystem, ...]
    volumes: tuple[Volume, ...]
    logical: LogicalVolumes | None = None
    budget: Budget = field(default_factory=Budget, compare=False)

    @property
    def root(self) -> Branch:
        """The root directory."""
        return self.branches[-1]

    def show(self, patterns: Sequence[str]) -> str:
        """Return the regular files that *patterns* match, and those below directories, with headings."""
        texts = []
        for branch, inner in self._routed(patterns):
            texts.append(_with_paths_of(branch, branch.filesystem.show(inner)))
            self.budget.spend(size=len(texts[-1]))
        return "".join(texts)

    def entries(self, patterns: Sequence[str]) -> list[Entry]:
        """Return what *patterns* match."""
        entries = []
        for branch, inner in self._routed(patterns):
            found = branch.filesystem.entries(inner)
            self.budget.spend(names=len(found))
            entries += [dataclasses.replace(entry, path=branch.outer(entry.path)) for entry in found]
        return entries

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        """Return the regular files of at most 1 MiB that *patterns* match, by their paths."""
        files: dict[str, bytes] = {}
        for branch, inner in self._routed(patterns):
            found = branch.filesystem.read(inner)
            self.budget.spend(size=sum(map(len, found.values())), names=len(found))
            files |= {branch.outer(path): data for path, data in found.items()}
        return files

    def write(self, path: str, data: bytes, mode: int) -> None:
        """Have *data* in the regular file *path*; a new one is root's, with *mode*."""
        branch = self._branch_of(path)
        branch.filesystem.write(branch.inner(path), data, mode)

    def rename(self, path: str, name: str) -> None:
        """Give *path* another *name* in its directory, which nothing there has."""
        branch = self._branch_of(path)
        branch.filesystem.rename(branch.inner(path), name)

    def remove(self, patterns: Sequence[str]) -> list[Change]:
        """Remove what *patterns* match, a link itself; return what is gone."""
        return self._changes((branch, branch.filesystem.remove(inner)) for branch, inner in self._routed(patterns))

    def truncate(self, patterns: Sequence[str]) -> list[Change]:
        """Empty the regular files that *patterns* match, and those below directories; return what is gone."""
        return self._changes((branch, branch.filesystem.truncate(inner)) for branch, inner in self._routed(patterns))

    def _changes(self, gone: Iterable[tuple[Branch, list[Change]]]) -> list[Change]:
        changes = []
        for branch, found in gone:
            self.budget.spend(names=len(found))
            changes += [dataclasses.replace(change, path=branch.outer(change.path)) for change in found]
        return changes

    def load(self, path: str, most: int, offset: int = 0) -> bytes | None:
        """Return at most *most* bytes at *offset* of the regular file *path*; None if there is none.

        All users of the guest may read the file.
        """
        [(branch, [inner])] = self._routed([path])
        data = branch.filesystem.load(inner, most, offset)
        self.budget.spend(size=len(data or b""), names=1)
        return data

    def usage(self) -> dict[str, int]:
        """Return the bytes that each directory at the top of the system takes; ``.`` is what lies there itself.

        A filesystem that fstab names for several places counts once.
        """
        found: dict[str, int] = {}
        once = {(branch.filesystem.volume.name, branch.top): branch for branch in self.branches}
        for branch in once.values():
            self.budget.spend()
            for name, size in branch.filesystem.usage(branch.top).items():
                name = branch.point.split("/")[0] or name
                found[name] = found.get(name, 0) + size
        return dict(sorted(found.items()))

    def _routed(self, patterns: Sequence[str]) -> Iterator[tuple[Branch, list[str]]]:
        """Give the branches that *patterns* are on, each with those for its filesystem.

        In the order of the first pattern for each: one call for a branch, whatever their order is.
        """
        branches = [self._branch_of(pattern) for pattern in patterns]
        for point in dict.fromkeys(branch.point for branch in branches):
            [branch] = [branch for branch in self.branches if branch.point == point]
            yield (
                branch,
                [branch.inner(pattern) for pattern, own in zip(patterns, branches, strict=True) if own is branch],
            )

    def _branch_of(self, pattern: str) -> Branch:
        directory = pattern.rpartition("/")[0]
        return next(branch for branch in self.branches if branch.has(directory))


def _with_paths_of(branch: Branch, text: str) -> str:
    """Return what a filesystem shows, with the paths of the system in its headings."""
    if not branch.top and not branch.point:
        return text
    return re.sub(r"^==> /(.*) <==$", lambda match: f"==> /{branch.outer(match[1])} <==", text, flags=re.MULTILINE)


def assemble(
    filesystems: Sequence[Filesystem],
    volumes: Sequence[Volume],
    failures: Mapping[str, BuildError],
    logical: LogicalVolumes | None = None,
) -> Tree:
    """Return the system on *filesystems*: the root is found by what is in it, the rest by its fstab.

    *failures* are the reasons why filesystems are not mounted, by the names of their *volumes*: one of
    them is raised if the system needs that filesystem.  NoSystemError if there is no root.
    """
    root = _find_root(filesystems)
    if root is None:
        candidates = [volume.name for volume in volumes if volume.filesystem in layout.ROOT_FILESYSTEMS]
        raise next((failures[name] for name in candidates if name in failures), None) or layout.no_root(volumes)
    branches = {"": root}
    _say(root)
    mounted = {filesystem.volume.name: filesystem for filesystem in filesystems}
    for entry in fstab.parse(_text_of_fstab(root)):
        # The root is the one that was found.
        if not entry.point:
            continue
        volume = fstab.find(entry.spec, volumes)
        if volume is None:
            if entry.is_of_this_disk():
                logger.warning("The disk has no %s, which its fstab names for %s.", *_quoted(entry.spec, entry.point))
            continue
        if volume.name not in mounted:
            # No installer writes its logs to a filesystem that is not Linux's own.
            if volume.name in failures and volume.filesystem in layout.ROOT_FILESYSTEMS:
                raise failures[volume.name]
            continue
        top = _top_of(entry, mounted[volume.name])
        if top is None:
            logger.warning("The subvolume that fstab names for %s is not looked into.", *_quoted(entry.point))
            continue
        branches[entry.point] = Branch(mounted[volume.name], top, entry.point)
        _say(branches[entry.point])
    deepest_first = sorted(branches.values(), key=lambda branch: len(branch.point), reverse=True)
    return Tree(tuple(deepest_first), tuple(filesystems), tuple(volumes), logical)


def _find_root(filesystems: Iterable[Filesystem]) -> Branch | None:
    """Return the largest filesystem that is a root, None if there is none."""
    candidates = [found for found in filesystems if found.volume.filesystem in layout.ROOT_FILESYSTEMS]
    for filesystem in sorted(candidates, key=lambda found: found.volume.size, reverse=True):
        for top in filesystem.tops:
            branch = Branch(filesystem, top, "")
            if any(filesystem.has(branch.inner(mark)) for mark in layout.ROOT_MARKS):
                return branch
    return None


def _text_of_fstab(root: Branch) -> str:
    # Its first line is the heading.  The text is not the whole one of a fstab that is too long.
    return root.filesystem.show([root.inner("etc/fstab")]).partition("\n")[2]


def _top_of(entry: fstab.Entry, filesystem: Filesystem) -> str | None:
    """Return the directory of *filesystem* that *entry* mounts, None if it can't be told."""
    if filesystem.volume.filesystem != "btrfs":
        return ""
    subvolume, number = entry.option("subvol"), entry.option("subvolid")
    if subvolume is None and number is None:
        return filesystem.tops[0]
    top = "" if subvolume is None else subvolume.strip("/")
    # The number of the top itself.
    return top if is_top(top) and (subvolume is not None or number in ("0", "5")) else None


def _say(branch: Branch) -> None:
    [point] = _quoted(branch.point)
    volume = branch.filesystem.volume
    subvolume = f", subvolume {branch.top}" if branch.top else ""
    logger.info("/%s is on %s (%s%s).", point, volume.name, volume.filesystem, subvolume)


def _quoted(*texts: str) -> list[str]:
    return [text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..." for text in texts]
