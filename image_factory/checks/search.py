"""Search a disk for secrets, as bytes: whatever file, deleted file or gap between partitions they are in.

It sees what is on the disk, as it is: nothing that is compressed or encrypted there, in another encoding,
or torn apart by blocks of a filesystem that are not neighbours.
"""

import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..base import events, interrupts

# So much of the disk is in memory at once.
CHUNK = 1 << 20

# So many bytes before and after something are shown to what decides whether it is wanted.
CONTEXT = 64

# A disk can be full of them, and one is enough.
MOST = 100

# Those that begin alike in so many bytes are searched for at once: the keys in PEM.
_ALIKE = 8


@dataclass(frozen=True)
class Needle:
    """*data* that is not to be on a disk, found by the audit's *check*; *what* are words for it.

    It counts only at a multiple of *alignment*, and not where *is_wanted* returns true for its offset, the
    CONTEXT before it, itself and the CONTEXT after it.  No message has the data itself.
    """

    check: str
    what: str
    data: bytes = field(repr=False)
    alignment: int = 1
    is_wanted: Callable[[int, bytes, bytes, bytes], bool] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Hit:
    """A *needle* that begins at byte *offset* of the disk."""

    needle: Needle
    offset: int


def search(path: Path, needles: Sequence[Needle]) -> list[Hit]:
    """Return where *needles* are in the file *path*, at most MOST places of each, in the order of the file."""
    with path.open("rb", buffering=0) as file, interrupts.interruptible():
        return list(_hits(file, needles)) if needles else []


def _hits(file: io.FileIO, needles: Sequence[Needle]) -> Iterator[Hit]:
    meter = events.Meter()
    size = os.fstat(file.fileno()).st_size
    left = dict.fromkeys(needles, MOST)
    groups = list(_groups(needles))
    reach = max(len(needle.data) for needle in needles) + CONTEXT
    for start, end in _extents(file, size):
        # *data* begins at byte *position*; what begins before *done* is told.
        position, data, done = start, b"", start
        while done < end:
            read = os.pread(file.fileno(), min(CHUNK, end - position - len(data)), position + len(data))
            data += read
            there = position + len(data)
            # What begins later, or what follows it, may go on in the next chunk.
            until = there if there >= end or not read else there - reach
            found = []
            for begin, group in groups:
                found += _hits_in(data, begin, group, position, done, until, left)
            yield from sorted(found, key=lambda hit: hit.offset)
            if not read:
                # It has become shorter.
                return
            done = max(done, until)
            kept = max(position, done - CONTEXT)
            position, data = kept, data[kept - position :]
            meter.at(done, size)


def _groups(needles: Sequence[Needle]) -> Iterator[tuple[bytes, list[Needle]]]:
    """Give *needles* in groups, each with what all of it begin with."""
    groups: dict[bytes, list[Needle]] = {}
    for needle in needles:
        groups.setdefault(needle.data[:_ALIKE], []).append(needle)
    for begin, group in groups.items():
        yield (begin if len(group) > 1 else group[0].data), group


def _hits_in(
    data: bytes, begin: bytes, group: Sequence[Needle], position: int, start: int, until: int, left: dict[Needle, int]
) -> list[Hit]:
    """Return where those of *group*, of which all have *begin*, begin from *start* to *until*.

    *data* is at byte *position* of the disk.  *left* is how many of each are wanted yet.
    """
    found: list[Hit] = []
    last = until - position + len(begin) - 1
    at = data.find(begin, start - position, last)
    while at >= 0 and any(left[needle] for needle in group):
        offset = position + at
        for needle in group:
            is_there = offset % needle.alignment == 0 and data.startswith(needle.data, at)
            if is_there and left[needle] and not _is_wanted(needle, offset, data, at):
                left[needle] -= 1
                found.append(Hit(needle, offset))
        at = data.find(begin, at + 1, last)
    return found


def _is_wanted(needle: Needle, offset: int, data: bytes, at: int) -> bool:
    if needle.is_wanted is None:
        return False
    end = at + len(needle.data)
    return needle.is_wanted(offset, data[max(0, at - CONTEXT) : at], needle.data, data[end : end + CONTEXT])


def _extents(file: io.FileIO, size: int) -> Iterator[tuple[int, int]]:
    """Give the parts of *file* that are no holes; nothing that is searched for has zeros in it."""
    end = 0
    while end < size:
        try:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            # Only a hole is left.
            return
        yield start, end
