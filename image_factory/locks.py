"""Locks on directories, which are gone with the process that holds them."""

import errno
import fcntl
import os
from pathlib import Path


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
