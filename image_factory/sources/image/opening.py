"""Have an image that others made be one that QEMU can open: nobody changes it meanwhile, and it is whole."""

import fcntl
import os
import struct
from pathlib import Path

from ...base import command, trust
from ...base.errors import CommandError
from . import formats

# Those that qemu-img looks through; its status when only space is lost.
CHECKED = ("qcow2", "vmdk", "vhdx", "vdi")
_LEAKS = 3
# Bytes of a file that QEMU locks as long as it may write to it, or make it larger (QEMU's block/file-posix.c); and the
# form of struct flock.
_WRITERS = (101, 103)
_FLOCK = "hhqqi4x"


def take(path: Path, own: Path) -> None:
    """Have *own* be the image at *path*: a link, or a copy where others could change it between two looks at it.

    UnfitError if a virtual machine has it in use.
    """
    if _is_written(path):
        raise formats.UnfitError(
            f"{path} is in use, as of a virtual machine that runs from it.",
            hint="Shut the machine down, or take a copy or a snapshot of its disk.",
        )
    if trust.own(path) and not trust.why_not(path.parent):
        own.symlink_to(path)
    else:
        # Others get through the working directory of root's builds.
        command.run(["cp", "--sparse=always", "--reflink=auto", str(path), str(own)], umask=0o077, quiet=True)


def _is_written(path: Path) -> bool:
    """Return whether QEMU may write to the file at *path* now."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise formats.UnfitError(f"{path} can't be read: {error.strerror}.") from error
    try:
        for byte in _WRITERS:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
            if kind != fcntl.F_UNLCK:
                return True
    finally:
        os.close(descriptor)
    return False


def check_argv(path: Path, driver: str) -> list[str]:
    """Return the command that tells whether the image at *path* is whole."""
    return ["qemu-img", "check", "-q", "-f", driver, str(path)]


def checked(path: Path, name: str) -> formats.Format:
    """Return how the image at *path* is stored; UnfitError, which calls it *name*, if it is none or is damaged."""
    found = formats.format_of(path, name)
    if found.driver in CHECKED:
        try:
            command.run(check_argv(path, found.driver))
        except CommandError as error:
            if error.status != _LEAKS:
                raise formats.UnfitError(
                    f"{name} is damaged: {error.said}.", hint="Get it once more; qemu-img check tells more."
                ) from error
    return found
