"""Locks on directories, which are gone with the process that holds them."""

import errno
import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

from . import trust


def lock(directory: Path) -> int | None:
    """Return a descriptor that holds the lock of *directory*, None if a running build has it.

    FileNotFoundError if the directory goes away meanwhile.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before us may have removed what we opened.
        if os.path.samestat(os.fstat(descriptor), os.lstat(directory)):
            return descriptor
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise


def by_whom(path: Path) -> str:
    """Return " (process PID of USER)" if it can be seen who has the lock of what is at *path*, else nothing."""
    with suppress(OSError):
        status = path.stat()
        place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        text = Path("/proc/locks").read_text(encoding="ascii")
        # Those who wait have an arrow.
        if match := re.search(rf"^[0-9]+: FLOCK +ADVISORY +WRITE ([0-9]+) {place} ", text, re.MULTILINE):
            return f" (process {match[1]} of {trust.name_of(Path('/proc', match[1]).stat().st_uid)})"
    return ""
