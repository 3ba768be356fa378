"""Free the blocks that no file uses."""

import os
from pathlib import Path

from . import command
from .log import logger, step
from .model import Build, Disk, Partition, Tree
from .units import format_size


def trim_filesystem(build: Build, disk: Disk, tree: Tree) -> bool:
    """Give the unused blocks of the mounted filesystem back; return whether they all are zeros now.

    They are holes of the disk's file then.  A file has no holes that are smaller than a block of
    the filesystem that it is on.
    """
    with step("Freeing unused blocks"):
        freed = tree.trim()
        if freed is None:
            logger.info("This filesystem, or the one that the disk is on, can't free blocks.")
            return False
        logger.info("%s were unused.", format_size(freed))
        return tree.block_size() >= os.statvfs(disk.path).f_bsize


def zerofree_argv(disk: Path, offset: int | str) -> list[str]:
    """Return the command that zeroes the unused blocks of the ext filesystem at *offset* of *disk*.

    libext2fs takes an offset after the name of the file, so it needs neither root nor a device.
    """
    return ["zerofree", f"{disk}?offset={offset}"]


def zero_unused_blocks(build: Build, disk: Disk, partition: Partition | None) -> None:
    """Zero what is in the unused blocks of *partition*, on ext2, ext3 and ext4.

    It reads them one by one, which takes longer than the conversion of the disk: only for what could
    not be freed.
    """
    if partition is None:
        logger.warning("The blocks that could not be freed are not zeroed, as the root is on a logical volume.")
        return
    if partition.filesystem not in ("ext2", "ext3", "ext4"):
        return
    with step("Zeroing unused blocks"):
        command.run(zerofree_argv(disk.path, partition.offset))
