"""Images that are compressed, or a tar with one disk in it, known by their signatures."""

import os
import shutil
import signal
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...base import command, files, interrupts
from ...base.errors import CommandError, CrashError
from ...base.units import format_size
from .formats import UnfitError

STEP = "Unpacking the source image"

# A compressed tar of a compressed disk, and one more.
_LAYERS = 4
# What a program may take for it: a few bytes can ask for gigabytes.
_MEMORY = 2 << 30
_CHUNK = 4 << 20
_LOOK_SECONDS = 60.0

_TAR = (257, b"ustar")
_OVF, _OVA_DISK = ".ovf", ".vmdk"


@dataclass(frozen=True)
class Compression:
    """A way to compress files: what they begin with, the *program* that undoes it, and its *suffix* of their names.

    *warned* is the program's status where all is unpacked, and only the owner, say, could not be kept.
    """

    magic: bytes
    program: str
    suffix: str
    warned: int | None = None


COMPRESSIONS = (
    Compression(b"\xfd7zXZ\0", "xz", ".xz", 2),
    Compression(b"\x1f\x8b", "gzip", ".gz", 2),
    Compression(b"BZh", "bzip2", ".bz2"),
    Compression(b"\x28\xb5\x2f\xfd", "zstd", ".zst"),
)


def compression_of(path: Path) -> Compression | None:
    """Return how the file at *path* is compressed, None if it isn't."""
    with path.open("rb") as file:
        head = file.read(8)
    return next((found for found in COMPRESSIONS if head.startswith(found.magic)), None)


def is_tar(path: Path) -> bool:
    """Whether the file at *path* is a tar."""
    offset, magic = _TAR
    with path.open("rb") as file:
        return os.pread(file.fileno(), len(magic), offset) == magic


def is_packed(path: Path) -> bool:
    """Whether there is something to unpack at *path*."""
    return compression_of(path) is not None or is_tar(path)


def compression_named(name: str) -> Compression | None:
    """Return how a file of *name* may be compressed, which only the file itself tells for sure."""
    return next((found for found in COMPRESSIONS if name.lower().endswith(found.suffix)), None)


def unpack_argv(compression: Compression, packed: Path, most: int | str) -> list[str]:
    """Return the command that makes of *packed* what its name is without its suffix, of *most* bytes.

    The kernel holds it to that; with ``--force`` it takes links.
    """
    limits = [f"--fsize={most}", f"--as={_MEMORY}"]
    return ["prlimit", *limits, compression.program, "--quiet", "--decompress", "--keep", "--force", str(packed)]


def unpack(path: Path, name: str = "The source image", *, trees: bool = False) -> None:
    """Make *path*, which is the build's own, what is packed in it; UnfitError, which calls it *name*, where it can't.

    That is a single file.  With *trees* a tar of several is left as it is.
    """
    for _ in range(_LAYERS):
        if found := compression_of(path):
            _decompress(path, found, name)
        elif not is_tar(path) or (not _take_out(path, name, leave=trees)):
            return
    raise UnfitError(f"{name} is packed again and again.")


def _decompress(path: Path, compression: Compression, name: str) -> None:
    packed = path.with_name(path.name + compression.suffix)
    files.move(path, packed)
    most = shutil.disk_usage(path.parent).free
    try:
        # Others get through the working directory of root's builds.
        command.run(unpack_argv(compression, packed, most), umask=0o077)
    except CommandError as error:
        if error.status == -signal.SIGXFSZ:
            raise UnfitError(f"{name} unpacks to more than the {format_size(most)} that are free.") from error
        if error.status != compression.warned or not path.exists():
            raise UnfitError(f"{name} can't be unpacked: {error.said}.") from error
    packed.unlink()
    # The program has given it those of the packed file.
    path.chmod(0o600)


def _take_out(path: Path, name: str, *, leave: bool) -> bool:
    """Make the only file of the tar at *path* be at *path*; return False if there are several, and they are to stay."""
    try:
        member = command.call_apart(_only_file, path, _LOOK_SECONDS)
        if member is None and not leave:
            raise tarfile.TarError("it has several files, where one disk is wanted")
    except (tarfile.TarError, CrashError, MemoryError, OSError, ValueError) as error:
        raise UnfitError(f"{name} is a tar that can't be read: {error}.") from error
    if member is None:
        return False
    archive = path.with_name(f"{path.name}.tar")
    files.move(path, archive)
    free = shutil.disk_usage(path.parent).free
    if member.size > free:
        raise UnfitError(f"{name} unpacks to {format_size(member.size)}, of which {format_size(free)} are free.")
    with archive.open("rb") as source, open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
        target.truncate(member.size)
        position = member.offset
        # Old GNU's and pax' sparse files have the extents with data one after the other.
        for start, length in member.extents:
            target.seek(start)
            _copy(source, target, position, length, name)
            position += length
    archive.unlink()
    return True


def _copy(source: IO[bytes], target: IO[bytes], position: int, length: int, name: str) -> None:
    source.seek(position)
    while length:
        with interrupts.interruptible():
            data = source.read(min(length, _CHUNK))
        if not data:
            raise UnfitError(f"{name} is a tar that is cut off.", hint="Get it once more.")
        target.write(data)
        length -= len(data)


@dataclass(frozen=True)
class _Member:
    """A file of *size* bytes in a tar: its data begin at *offset*, and are *extents* of it."""

    size: int
    offset: int
    extents: tuple[tuple[int, int], ...]


def _extents(member: tarfile.TarInfo) -> list[tuple[int, int]]:
    """Return where the data of *member* are in it: offsets and lengths, of one that is not sparse the whole."""
    # Typeshed takes it for bytes.
    found: list[tuple[int, int]] | None = member.sparse  # type: ignore[assignment]
    return found or [(0, member.size)]


def _only_file(archive: Path) -> _Member | None:
    """Return the only file in the *archive*, of an OVA the only disk; None if there are several, TarError if none."""
    with tarfile.open(archive, "r:") as opened:
        files: list[tarfile.TarInfo] = []
        is_ova = False
        for member in opened:
            # The description comes first in an OVA, whose others are disks, checksums and a signature.
            is_ova = is_ova or (not files and member.name.endswith(_OVF))
            if not member.isdir() and (not is_ova or member.name.endswith(_OVA_DISK)):
                files.append(member)
            if len(files) > 1:
                return None
    if not files or not files[0].isreg():
        raise tarfile.TarError("it has no disk")
    [found] = files
    extents = [(start, length) for start, length in _extents(found) if length]
    end = max((start + length for start, length in extents), default=0)
    if end > found.size or any(min(extent) < 0 for extent in extents):
        raise tarfile.TarError("its file is not well-formed")
    return _Member(found.size, found.offset_data, tuple(extents))
