"""Read a database of rpm that is not to be trusted, without rpm.

Debian 12's rpm has no reader for openSUSE's form, takes such a database for an empty one, and is C
that was not made for other people's data.
"""

import contextlib
import mmap
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..base import command
from ..base.errors import BuildError, CrashError

_T = TypeVar("_T")

# rpm's lib/backend: SQLite has one file, and beside it one with what is not in it yet.
SQLITE = "rpmdb.sqlite"
SQLITE_WAL = "rpmdb.sqlite-wal"
NDB = "Packages.db"

_SECONDS = 300.0
_MOST_HEADERS = 100_000
_LARGEST_HEADER = 64 << 20
# Of all headers, and of the texts that are taken from them.
_HEADERS = 1 << 30
_TEXTS = 64 << 20

# include/rpm/rpmtag.h
_TAGS = {1000: "name", 1001: "version", 1002: "release", 1003: "epoch", 1014: "license", 1022: "arch", 1044: "source"}
_FILE_DIGESTS = 1035
_INT32, _STRING, _STRING_ARRAY, _I18N_STRING = 4, 6, 8, 9
_LONGEST_STRING = 1024

# lib/backend/ndb/rpmpkg.c
_NDB_PAGE = 4096
_NDB_BLOCK = 16
_NDB_SLOT = struct.Struct("<4sIII")
_NDB_FIRST_SLOT = 32


@dataclass(frozen=True)
class Header:
    """What a header says of a package: *version* with epoch and release, *source* the file name of its source."""

    name: str
    version: str
    architecture: str
    source: str
    license: str


def read(database: Path) -> list[Header]:
    """Return the headers of the packages in *database*, a copy with its own name; BuildError if it is damaged.

    SQLite may change the copy, and what is beside it.
    """
    return _apart(_headers_of, database)


def known_digests(database: Path, wanted: Set[str]) -> set[str]:
    """Return which of *wanted*, digests in hexadecimal, files of the packages in *database* have, as read has it."""
    return _apart(partial(_known_digests, wanted=frozenset(wanted)), database)


def _apart(function: Callable[[Path], _T], database: Path) -> _T:
    try:
        return command.call_apart(function, database, _SECONDS)
    except CrashError as error:
        raise BuildError(f"Reading the image's rpm database {error.message}.") from error
    except MemoryError as error:
        raise BuildError("The image's rpm database takes too much memory to be read.") from error
    except (ValueError, struct.error, sqlite3.Error) as error:
        raise BuildError(f"The image's rpm database is damaged: {error}.") from error


def _headers_of(database: Path) -> list[Header]:
    with _blobs(database) as blobs:
        return _parsed(blobs)


def _known_digests(database: Path, wanted: frozenset[str]) -> set[str]:
    found: set[str] = set()
    size = 0
    with _blobs(database) as blobs:
        for blob in blobs:
            size += len(blob)
            if size > _HEADERS:
                raise ValueError("it has more than any system has")
            found |= wanted.intersection(_strings(blob, _FILE_DIGESTS))
    return found


def _strings(blob: bytes, wanted: int) -> list[str]:
    """Return the strings that tag *wanted* of a header has."""
    entries, _ = struct.unpack_from(">II", blob)
    start = 8 + 16 * entries
    for tag, kind, offset, count in struct.iter_unpack(">IIII", blob[8:start]):
        if tag == wanted and kind == _STRING_ARRAY:
            return [text.decode("ascii", "replace") for text in blob[start + offset :].split(b"\0", count)[:count]]
    return []


@contextlib.contextmanager
def _blobs(database: Path) -> Iterator[Iterator[bytes]]:
    if database.name == NDB:
        with database.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _ndb_blobs(data)
        return
    with contextlib.closing(sqlite3.connect(database)) as connection:
        query = "SELECT blob FROM Packages WHERE length(blob) <= ? LIMIT ?"
        rows = connection.execute(query, (_LARGEST_HEADER, _MOST_HEADERS))
        yield (data for (data,) in rows if isinstance(data, bytes))


def _ndb_blobs(data: mmap.mmap) -> Iterator[bytes]:
    magic, version, _, pages = struct.unpack_from("<4sIII", data)
    if magic != b"RpmP" or version != 0:
        raise ValueError("it has not the form that its name says")
    for offset in range(_NDB_FIRST_SLOT, min(pages * _NDB_PAGE, len(data)), _NDB_SLOT.size)[: _MOST_HEADERS * 2]:
        magic, number, block, count = _NDB_SLOT.unpack_from(data, offset)
        # Free slots have no package, and no blocks.
        if magic != b"Slot" or not number or not count:
            continue
        start = block * _NDB_BLOCK
        magic, again, _, length = struct.unpack_from("<4sIII", data, start)
        if magic != b"BlbS" or again != number or length > min(count * _NDB_BLOCK, _LARGEST_HEADER):
            raise ValueError("an entry is not where it should be")
        yield data[start + 16 : start + 16 + length]


def _parsed(blobs: Iterable[bytes]) -> list[Header]:
    found, size, texts = [], 0, 0
    for blob in blobs:
        values = _values(blob)
        size, texts = size + len(blob), texts + sum(map(len, values.values()))
        if size > _HEADERS or texts > _TEXTS:
            raise ValueError("it has more than any system has")
        found.append(_header(values))
    return found


def _header(values: Mapping[str, str]) -> Header:
    epoch = f"{values['epoch']}:" if "epoch" in values else ""
    version = f"{epoch}{values.get('version', '')}-{values.get('release', '')}"
    name, architecture, source, text = (values.get(key, "") for key in ("name", "arch", "source", "license"))
    return Header(name, version, architecture, source, text)


def _values(blob: bytes) -> dict[str, str]:
    """Return the texts of _TAGS in a header: entries of 16 bytes, and after them what they point to."""
    entries, size = struct.unpack_from(">II", blob)
    start = 8 + 16 * entries
    if start + size > len(blob):
        raise ValueError("a header is cut off")
    store = blob[start : start + size]
    found = {}
    for tag, kind, offset, count in struct.iter_unpack(">IIII", blob[8:start]):
        key = _TAGS.get(tag)
        if key is None or not count:
            continue
        if kind == _INT32:
            found[key] = str(struct.unpack_from(">I", store, offset)[0])
        elif kind in (_STRING, _I18N_STRING):
            text = store[offset : offset + _LONGEST_STRING].partition(b"\0")[0]
            found[key] = text.decode("utf-8", errors="replace")
    return found
