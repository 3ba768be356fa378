"""What steps do to a mounted system, found out without one: a filesystem that answers nothing notes its calls."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..base import events, log
from ..model import Change, Entry, Filesystem, Placed, Subvolume, Volume
from .tree import Branch, Tree


@dataclass(frozen=True)
class Call:
    """A call of a ``Filesystem``, or of ``LogicalVolumes``: the name of the operation, its paths and other words."""

    operation: str
    words: tuple[str, ...] = ()


@dataclass
class RecordingFilesystem:
    """A ``Filesystem`` on which nothing is; *calls* are those that were made."""

    volume: Volume = field(default_factory=lambda: Volume("partition N", 0))
    subvolumes: tuple[Subvolume, ...] = ()
    calls: list[Call] = field(default_factory=list)

    def _note(self, operation: str, *words: str) -> None:
        self.calls.append(Call(operation, words))

    def delete_subvolumes(self, paths: Sequence[str]) -> None:
        """Note it."""
        self._note("delete_subvolumes", *paths)

    def set_read_only(self, path: str, value: bool) -> None:
        """Note it."""
        self._note("set_read_only", path, str(value))

    def has(self, path: str) -> bool:
        """Note it."""
        self._note("has", path)
        return False

    def show(self, patterns: Sequence[str]) -> str:
        """Note it."""
        self._note("show", *patterns)
        return ""

    def entries(self, patterns: Sequence[str]) -> list[Entry]:
        """Note it."""
        self._note("entries", *patterns)
        return []

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        """Note it."""
        self._note("read", *patterns)
        return {}

    def write(self, path: str, data: bytes, mode: int) -> None:
        """Note it."""
        self._note("write", path, f"{mode:04o}")

    def look(self, paths: Sequence[str]) -> list[Entry]:
        """Note it."""
        self._note("look")
        return []

    def put(self, items: Sequence[Placed], contents: Path) -> None:
        """Note it."""
        self._note("put")

    def rename(self, path: str, name: str) -> None:
        """Note it."""
        self._note("rename", path, name)

    def remove(self, patterns: Sequence[str]) -> list[Change]:
        """Note it."""
        self._note("remove", *patterns)
        return []

    def truncate(self, patterns: Sequence[str]) -> list[Change]:
        """Note it."""
        self._note("truncate", *patterns)
        return []

    def load(self, path: str, most: int, offset: int = 0) -> bytes | None:
        """Note it."""
        self._note("load", path)
        return None

    def usage(self, top: str) -> dict[str, int]:
        """Note it."""
        self._note("usage", top)
        return {}

    def key_files(self, top: str) -> dict[str, bytes]:
        """Note it."""
        self._note("key_files", top)
        return {}

    @contextmanager
    def contents(self, places: Mapping[str, tuple[Filesystem, str]], options: Sequence[str]) -> Iterator[list[str]]:
        """Note it."""
        self._note("contents", *options)
        yield []

    def trim(self) -> int | None:
        """Note it."""
        self._note("trim")
        return 0

    def block_size(self) -> int:
        """Return a block's usual size."""
        return 4096

    def discard_size(self) -> int:
        """Return 0: it is as on a partition."""
        return 0


@contextmanager
def rehearsed(calls: list[Call]) -> Iterator[Tree]:
    """Give a system of which nothing is known, and add to *calls* what is done to it; nobody hears of what is told."""
    filesystem = RecordingFilesystem(calls=calls)
    with log.silenced(), events.unobserved():
        yield Tree((Branch(filesystem, "", ""),), (filesystem,), (filesystem.volume,))
