"""The kernel modules in an initramfs, and those in the kernel itself: its files are read, and none of it is run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..base import command
from ..base.errors import BuildError, CommandError, ConfigurationError

# What prints a compressed one as a cpio, by what the file begins with there.
_PROGRAMS = {
    b"\x1f\x8b": ("gzip", "-dc"),
    b"\xfd7zXZ": ("xz", "-dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "-dcq"),
    b"\x02\x21\x4c\x18": ("lz4", "-dc"),
    b"\x04\x22\x4d\x18": ("lz4", "-dc"),
    b"BZh": ("bzip2", "-dc"),
}
# Of the kernel's format (Documentation/driver-api/early-userspace/buffer-format.rst), with and without checksums.
_MAGIC = (b"070701", b"070702")
_HEADER = 110
_LAST = "TRAILER!!!"
_LONGEST_NAME = 4096
# More than any distribution's.
_MOST_MEMBERS = 200_000
_MODULE = re.compile(r"(?:.*/)?([^/]+)\.ko(?:\.(?:bz2|gz|lz4|xz|zst))?")


def module_name(path: str) -> str | None:
    """Return the name of the module that *path* is, None if it is none: ``-`` and ``_`` are the same in it."""
    match = _MODULE.fullmatch(path)
    return match[1].replace("-", "_") if match else None


def modules(path: Path) -> set[str]:
    """Return the names of the modules in the initramfs *path*, beside which a file is made for a while.

    BuildError if it is none.
    """
    unpacked = path.with_name(f"{path.name}.unpacked")
    try:
        with path.open("rb") as file:
            found = {*_modules(file)}
            start = file.tell()
            words = _program(file.read(8))
        if words:
            _require(words[0])
            rest = ["dd", f"if={path}", "iflag=skip_bytes", f"skip={start}", "bs=1M", "status=none"]
            command.flow(rest, [(unpacked, [words])])
            with unpacked.open("rb") as file:
                found |= {*_modules(file)}
        elif start < path.stat().st_size:
            raise BuildError(f"{path.name} has at byte {start} what is no initramfs.")
        return found
    except (CommandError, ValueError) as error:
        raise BuildError(f"{path.name} is no initramfs that can be read: {error}") from error
    finally:
        unpacked.unlink(missing_ok=True)


def _require(program: str) -> None:
    """Raise BuildError unless *program* is there: which one it is was not known before."""
    try:
        command.require([program])
    except ConfigurationError as error:
        raise BuildError(error.message, hint=error.hint) from error


def _program(start: bytes) -> tuple[str, ...] | None:
    """Return the command that unpacks what begins with *start*, None if nothing known does."""
    return next((words for magic, words in _PROGRAMS.items() if start.startswith(magic)), None)


def _modules(file: IO[bytes]) -> Iterator[str]:
    """Give the modules in the cpios at the beginning of *file*, which is left where they end."""
    for name in _names(file):
        module = module_name(name)
        if module:
            yield module


def _names(file: IO[bytes]) -> Iterator[str]:
    """Give the names in the cpios at the beginning of *file*, one after the other: microcode comes first."""
    for _ in range(_MOST_MEMBERS):
        _skip_zeros(file)
        start = file.tell()
        header = file.read(_HEADER)
        if header[:6] not in _MAGIC:
            file.seek(start)
            return
        if len(header) < _HEADER:
            raise ValueError("it ends in the middle")
        size, length = (int(header[at : at + 8], 16) for at in (54, 94))
        if length > _LONGEST_NAME:
            raise ValueError("a name has no end")
        name = file.read(length).rstrip(b"\0").decode(errors="surrogateescape")
        # Names and contents begin at multiples of 4.
        file.seek(_aligned(file.tell() - start) + start)
        file.seek(_aligned(size), 1)
        if name != _LAST:
            yield name
    raise ValueError(f"it has more than {_MOST_MEMBERS} files")


def _aligned(size: int) -> int:
    return -(-size // 4) * 4


def _skip_zeros(file: IO[bytes]) -> None:
    while data := file.read(4096):
        rest = data.lstrip(b"\0")
        if rest:
            file.seek(-len(rest), 1)
            return
