"""Directories for what a build needs for a moment, which are found again when it was killed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import locks
from .cleanup import released
from .errors import reason_of
from .log import logger

# Not where TMPDIR says, which another run may have from elsewhere.
PARENT = Path("/tmp")
# For what may be as large as a disk: the other is in memory on some machines.
LARGE = Path("/var/tmp")
PREFIX = "image-factory-scratch."


@contextmanager
def directory(
    prefix: str = PREFIX, remove: Callable[[Path], None] = shutil.rmtree, *, large: bool = False
) -> Iterator[Path]:
    """Give a directory of this user's only, and *remove* it with all that is in it on the way out.

    One for what is *large* is on the disk.

    It is locked, which no other user can do: one without a holder is what a killed build has left, and goes.
    """
    for left in remove_left(prefix, remove):
        logger.info("Removed %s, which a killed build has left.", left)
    path, descriptor = _locked(prefix, LARGE if large else PARENT)
    try:
        with released(partial(remove, path)):
            yield path
    finally:
        os.close(descriptor)


def _locked(prefix: str, parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        descriptor = None
        with contextlib.suppress(FileNotFoundError):
            descriptor = locks.lock(path)
        if descriptor is not None:
            return path, descriptor
        # Another build took it for one that was left, before the lock.


def remove_left(prefix: str = PREFIX, remove: Callable[[Path], None] = shutil.rmtree) -> Iterator[Path]:
    """Remove the directories that killed builds of this user have left; give each."""
    for path in sorted(path for parent in (PARENT, LARGE) for path in parent.glob(f"{prefix}*")):
        try:
            if path.lstat().st_uid != os.geteuid() or path.is_symlink() or not path.is_dir():
                continue
            descriptor = locks.lock(path)
        except OSError as error:
            # It goes away meanwhile.
            logger.debug("%s", reason_of(error))
            continue
        if descriptor is None:
            continue
        try:
            remove(path)
            yield path
        finally:
            os.close(descriptor)
