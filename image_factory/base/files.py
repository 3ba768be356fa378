"""Files: replacing one safely, so that it is whole or not there, checksums, what can be read, where ours are."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from . import events, interrupts
from .errors import ConfigurationError

_PART_SIZE = 1 << 20


def unfinished(target: Path) -> Path:
    """Return a free name beside *target*, for what takes its place later.

    It has no part of the name of *target*, which may be as long as a name can be.
    """
    return target.with_name(f".image-factory.{secrets.token_hex(4)}")


@contextmanager
def staged(
    target: Path,
    check: Callable[[Path], None] | None = None,
    *,
    mode: int | None = None,
    directory: Path | None = None,
) -> Iterator[Path]:
    """Give the path of an empty file that takes the place of *target* at the end.

    The file is gone if the body raises, or *check*, which is called with it after the body.  With *mode* it is its
    owner's alone until the end; else it has the mode that the umask leaves.  It is in *directory*, which has to be on
    the filesystem of *target*, else beside *target*.
    """
    path = unfinished(directory / target.name if directory else target)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600))
    try:
        yield path
        if check is not None:
            check(path)
        if mode is not None:
            path.chmod(mode)
        move(path, target)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


@contextmanager
def written(
    target: Path, check: Callable[[Path], None] | None = None, *, mode: int | None = None
) -> Iterator[IO[bytes]]:
    """Give a file that takes the place of *target* as that of ``staged`` does, when the disk has all of it."""
    with staged(target, check, mode=mode) as path, path.open("w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def replace(target: Path, data: bytes, *, mode: int | None = None, directory: Path | None = None) -> None:
    """Write *data* to *target*, all or OSError; half of it never replaces an older file.  See ``staged``."""
    with staged(target, mode=mode, directory=directory) as path:
        path.write_bytes(data)


def move(source: Path, target: Path) -> None:
    """Give *source* the name *target*, in place of what has that; both are on one filesystem."""
    os.replace(source, target)


def digest_of(path: Path, algorithm: str = "sha256", meter: events.Meter | None = None) -> str:
    """Return the checksum of the file *path* in hexadecimal digits; *meter* is told how far it is."""
    digest = hashlib.new(algorithm)
    part = memoryview(bytearray(_PART_SIZE))
    done = 0
    with path.open("rb", buffering=0) as file, interrupts.interruptible():
        size = os.fstat(file.fileno()).st_size
        while length := file.readinto(part):
            digest.update(part[:length])
            done += length
            if meter is not None:
                meter.at(done, size)
    return digest.hexdigest()


def digest_of_joined(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the files *paths*, one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file, interrupts.interruptible():
            while data := file.read(_PART_SIZE):
                digest.update(data)
    return digest.hexdigest()


def digest_of_stream(file: IO[bytes]) -> tuple[str, int]:
    """Return the SHA-256 of what is left of *file* in hexadecimal digits, and how many bytes that is."""
    digest, size = hashlib.sha256(), 0
    while data := file.read(_PART_SIZE):
        digest.update(data)
        size += len(data)
    return digest.hexdigest(), size


def check_readable(where: str, path: Path, *, directory: bool = False) -> None:
    """Raise ConfigurationError, which names *where* a user named it, unless *path* is a file that can be read."""
    if directory and os.path.isdir(path):
        return
    try:
        if not path.is_file():
            reason = "is not a file" if path.exists() else "is not there"
            raise ConfigurationError(f"{where}: {path} {reason}.")
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigurationError(f"{where}: {path} can't be read: {error.strerror}.") from error


def find_data_dir() -> Path:
    """Return the directory of the shipped recipes and configuration.

    It is ``data`` beside the package in a checkout, and ``share/image-factory`` under the prefix
    that the package is installed below.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = [package.parent / "data", *(parent / "share/image-factory" for parent in package.parents)]
    for candidate in candidates:
        if (candidate / "image-factory.conf").is_file():
            return candidate
    raise ConfigurationError(
        f"The shipped image-factory.conf isn't installed for {package}.", hint="Install image-factory again."
    )
