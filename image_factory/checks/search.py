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
CHUNK = 4 << 20

# So many bytes before and after something are shown to what decides whether it is wanted.
CONTEXT = 64

# A disk can be full of them, and one is enough.
MOST = 100


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
            for needle in [needle for needle, count in left.items() if count]:
                hits = _hits_in(data, needle, position, done, until, left[needle])
                left[needle] -= len(hits)
                found += hits
            yield from sorted(found, key=lambda hit: hit.offset)
            if not read:
                # It has become shorter.
                return
            done = max(done, until)
            kept = max(position, done - CONTEXT)
            position, data = kept, data[kept - position :]
            meter.at(done, size)


def _hits_in(data: bytes, needle: Needle, position: int, start: int, until: int, most: int) -> list[Hit]:
    """Return where *needle* begins from *start* to *until* in *data*, which is at byte *position* of the disk."""
    found: list[Hit] = []
    last = until - position + len(needle.data) - 1
    at = data.find(needle.data, start - position, last)
    while at >= 0 and len(found) < most:
        offset = position + at
        if offset % needle.alignment == 0 and not _is_wanted(needle, offset, data, at):
            found.append(Hit(needle, offset))
        at = data.find(needle.data, at + 1, last)
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
