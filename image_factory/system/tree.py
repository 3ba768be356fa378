"""The files of an installed system, whose filesystems are mounted each at a place of its own.

They are not mounted below each other: a link where a mount point belongs leads nowhere then, and the
places for mounts stay the ones that image-factory-sudo-helper allows.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from ..base import interrupts
from ..base.errors import BuildError
from ..base.units import format_size
from ..model import Change, Entry, Filesystem, LogicalVolumes, Placed, Volume

# What programs keep snapshots in, beside what they know of each: snapper, Timeshift.
_OF_SNAPSHOT = re.compile(r"(?:.*/)?\.snapshots/[0-9]+|(?:.*/)?timeshift-btrfs/snapshots/[^/]+")

# So much is read of one system in all: rpm's database of a large one has 200 MiB.
_MOST_BYTES = 2 << 30
_MOST_NAMES = 1_000_000


@dataclass(frozen=True)
class Branch:
    """Directory *top* of *filesystem*, which is *point* of the system: ``""`` or such as ``var/log``."""

    filesystem: Filesystem
    top: str
    point: str

    @property
    def is_bound(self) -> bool:
        """Whether it is a directory that the system shows a second time."""
        subvolumes = [subvolume.path for subvolume in self.filesystem.subvolumes]
        return bool(self.point and self.top) and self.top not in subvolumes

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
class Unreached:
    """What is *point* of the system and on its disk, but can't be looked into; *error* says why."""

    point: str
    error: BuildError

    def has(self, path: str) -> bool:
        """Return whether *path* of the system is there, or is it."""
        return path == self.point or path.startswith(f"{self.point}/")


@dataclass(frozen=True)
class Snapshot:
    """A subvolume of *filesystem* that is a snapshot of the system's, or of a snapshot of it."""

    filesystem: Filesystem
    path: str

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"subvolume {self.path} of {self.filesystem.volume.name}"


@dataclass(frozen=True)
class Tree:
    """An installed system: *branches* has the root last, and what is mounted deeper before.

    *filesystems* are all that are mounted, those that the system's fstab doesn't name among them.
    Patterns are paths below the root, and the operations those of ``Filesystem``; they raise the error of what of
    *unreached* they lead to.  *logical* is there where the disk has logical volumes.  *copies* are phrases for
    what else on the disk is a system or a snapshot, and *snapshots* those that can be removed.  All that reads the
    guest does so here, within one *budget*.
    """

    branches: tuple[Branch, ...]
    filesystems: tuple[Filesystem, ...]
    volumes: tuple[Volume, ...]
    logical: LogicalVolumes | None = None
    unreached: tuple[Unreached, ...] = ()
    copies: tuple[str, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    budget: Budget = field(default_factory=Budget, compare=False)

    @property
    def root(self) -> Branch:
        """The root directory."""
        return self.branches[-1]

    def show(self, patterns: Sequence[str]) -> str:
        """Return the regular files that *patterns* match, and those below directories, with headings."""
        texts = []
        for branch, inner in self._routed(self._with_mounts_below(patterns)):
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

    def look(self, paths: Sequence[str]) -> dict[str, Entry]:
        """Return those of *paths*, which are no patterns, that are there, links with where they lead to."""
        found: dict[str, Entry] = {}
        for branch, inner in self._routed(paths):
            entries = branch.filesystem.look(inner)
            self.budget.spend(names=len(entries))
            for entry in entries:
                path = branch.outer(entry.path)
                found[path] = dataclasses.replace(entry, path=path)
        return found

    def put(self, items: Sequence[Placed], contents: Path) -> None:
        """Make *items*, whose bytes are in the file *contents*; see ``Filesystem``."""
        for branch, inner in self._routed([item.path for item in items]):
            own = [item for item in items if self._branch_of(item.path) is branch]
            placed = [dataclasses.replace(item, path=path) for item, path in zip(own, inner, strict=True)]
            branch.filesystem.put(placed, contents)

    def rename(self, path: str, name: str) -> None:
        """Give *path* another *name* in its directory, which nothing there has."""
        branch = self._branch_of(path)
        branch.filesystem.rename(branch.inner(path), name)

    def remove(self, patterns: Sequence[str]) -> list[Change]:
        """Remove what *patterns* match, a link itself; return what is gone."""
        routed = self._routed(self._with_mounts_below(patterns))
        return self._changes((branch, branch.filesystem.remove(inner)) for branch, inner in routed)

    def truncate(self, patterns: Sequence[str]) -> list[Change]:
        """Empty the regular files that *patterns* match, and those below directories; return what is gone."""
        routed = self._routed(self._with_mounts_below(patterns))
        return self._changes((branch, branch.filesystem.truncate(inner)) for branch, inner in routed)

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

    def key_files(self) -> dict[str, bytes]:
        """Return the regular files of at most 1 MiB that may have a private key, by their paths."""
        found: dict[str, bytes] = {}
        for branch in self.branches:
            if not self._is_seen_elsewhere(branch):
                files = branch.filesystem.key_files(branch.top)
                self.budget.spend(size=sum(map(len, files.values())), names=len(files))
                found |= {branch.outer(path): data for path, data in files.items()}
        return found

    def _is_seen_elsewhere(self, bound: Branch) -> bool:
        """Whether *bound* shows at another place what is in a branch that is not bound."""
        return bound.is_bound and any(
            not other.is_bound
            and other.filesystem is bound.filesystem
            and (not other.top or f"{bound.top}/".startswith(f"{other.top}/"))
            for other in self.branches
        )

    def contents(self, options: Sequence[str]) -> AbstractContextManager[list[str]]:
        """Give the command that prints a tar of the whole system, with *options* for tar(1).

        BuildError if a part of it can't be looked into.  What is bound to another place is there once.
        """
        for place in self.unreached:
            raise place.error
        # The last one at a point is the one that is seen there.
        found = [branch for branch in reversed(self.branches) if not branch.is_bound]
        places = {branch.point: (branch.filesystem, branch.top) for branch in found}
        return self.root.filesystem.contents(places, options)

    def usage(self) -> dict[str, int]:
        """Return the bytes that each directory at the top of the system takes; ``.`` is what lies there itself.

        A filesystem that fstab names for several places counts once, and so does what is bound to another place.
        """
        found: dict[str, int] = {}
        once = {(branch.filesystem.volume.name, branch.top): branch for branch in self.branches if not branch.is_bound}
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
        branch = next(branch for branch in self.branches if branch.has(directory))
        for place in self.unreached:
            deeper = len(place.point) > len(branch.point)
            if place.point == pattern or (deeper and place.has(directory)):
                raise place.error
        return branch

    def _with_mounts_below(self, patterns: Sequence[str]) -> list[str]:
        """Return *patterns*, and those for what is mounted in the directories that they match."""
        found = list(patterns)
        places: list[Branch | Unreached] = [*self.branches, *self.unreached]
        for place in places:
            parts = place.point.split("/")
            for pattern in patterns:
                parent, _, name = pattern.rpartition("/")
                level = pattern.count("/")
                inside = len(parts) > level and "/".join(parts[:level]) == parent
                if place.point and inside and fnmatch.fnmatchcase(parts[level], name):
                    found.append(f"{place.point}/*")
                    break
        return list(dict.fromkeys(found))

    def delete_snapshots(self) -> None:
        """Remove *snapshots*, with what the program that made one knows of it."""
        for filesystem in self.filesystems:
            paths = [snapshot.path for snapshot in self.snapshots if snapshot.filesystem is filesystem]
            if not paths:
                continue
            # Those that lie in others come first.
            filesystem.delete_subvolumes(sorted(paths, key=lambda path: path.count("/"), reverse=True))
            left = [subvolume.path for subvolume in filesystem.subvolumes if subvolume.path not in paths]
            directories = [
                directory
                for directory in dict.fromkeys(path.rpartition("/")[0] for path in paths)
                if _OF_SNAPSHOT.fullmatch(directory) and not any(path.startswith(f"{directory}/") for path in left)
            ]
            if directories:
                filesystem.remove(directories)


def _with_paths_of(branch: Branch, text: str) -> str:
    """Return what a filesystem shows, with the paths of the system in its headings."""
    if not branch.top and not branch.point:
        return text
    return re.sub(r"^==> /(.*) <==$", lambda match: f"==> /{branch.outer(match[1])} <==", text, flags=re.MULTILINE)
