"""Free the blocks that no file uses, and what has been swapped out."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..base import command, interrupts
from ..base.errors import CommandError
from ..base.log import logger, step
from ..base.units import format_size
from ..model import Build, Disk, Volume
from ..system import layout
from ..system.tree import Tree

_ZEROFREE_FILESYSTEMS = ("ext2", "ext3", "ext4")

# The header of swap space fills a page of the guest's kernel, and ends with this (linux/swap.h).
_SWAP_MAGIC = b"SWAPSPACE2"
_PAGES = (4096, 8192, 16384, 65536)

_CHUNK = 1 << 20


def trim_filesystems(build: Build, disk: Disk, tree: Tree) -> list[Volume]:
    """Give the unused blocks of the mounted filesystems back; return those that are not all zeros then.

    They are holes of the disk's file then.  A file has no holes that are smaller than a block of
    the filesystem that it is on, and a thin pool of LVM frees no less than a chunk.
    """
    unfreed = []
    with step("Freeing unused blocks"):
        for filesystem in tree.filesystems:
            volume = filesystem.volume
            freed = filesystem.trim()
            if freed is None:
                logger.info("%s can't free blocks, or what the disk is on can't.", _name(volume))
            else:
                logger.info("%s had %s unused.", _name(volume), format_size(freed))
            at_once = max(os.statvfs(disk.path).f_bsize, filesystem.discard_size())
            if freed is None or filesystem.block_size() < at_once:
                unfreed.append(volume)
    return unfreed


def _name(volume: Volume) -> str:
    return f"{volume.name[0].upper()}{volume.name[1:]} ({volume.filesystem})"


def zerofree_argv(disk: Path, offset: int | str) -> list[str]:
    """Return the command that zeroes the unused blocks of the ext filesystem at *offset* of *disk*.

    libext2fs takes an offset after the name of the file, so it needs neither root nor a device.
    """
    return ["zerofree", f"{disk}?offset={offset}"]


def punch_argv(disk: Path, offset: int | str, size: int | str) -> list[str]:
    """Return the command that makes a hole of *size* bytes at *offset* of *disk*."""
    return ["fallocate", "--punch-hole", "--offset", str(offset), "--length", str(size), str(disk)]


def zero_unused_blocks(build: Build, disk: Disk, unfreed: Sequence[Volume]) -> None:
    """Zero what is in the unused blocks of those of *unfreed* that are partitions with ext2, ext3 or ext4.

    It reads them one by one, which takes longer than the conversion of the disk: only for what could
    not be freed.
    """
    found = [volume.partition for volume in unfreed if volume.filesystem in _ZEROFREE_FILESYSTEMS]
    partitions = [partition for partition in found if partition]
    if not partitions:
        return
    with step("Zeroing unused blocks"):
        for partition in partitions:
            command.run(zerofree_argv(disk.path, partition.offset))


def zero_logical_volumes(build: Build, tree: Tree, unfreed: Sequence[Volume]) -> None:
    """Do to the logical volumes of *tree* what the other two do to partitions, while it is mounted."""
    blocks = [volume for volume in unfreed if not volume.partition]
    swap = [volume for volume in tree.volumes if not volume.partition and volume.filesystem == layout.SWAP]
    if tree.logical is None or not (blocks or swap):
        return
    thin = {found.volume.name for found in tree.filesystems if found.discard_size() > found.block_size()}
    with step("Zeroing logical volumes"):
        for volume in blocks:
            if volume.filesystem in _ZEROFREE_FILESYSTEMS:
                tree.logical.zero_unused_blocks(volume)
            elif volume.name in thin and not tree.logical.fill_unused_blocks(volume):
                logger.warning("The unused blocks of %s are not zeroed: its thin pool is too small.", volume.name)
        for volume in swap:
            tree.logical.zero_swap(volume)


def zero_swap(build: Build, disk: Disk, volumes: Sequence[Volume]) -> None:
    """Zero what was swapped out to those of *volumes* that are partitions, but for the header: UUID and label stay."""
    found = [(volume, volume.partition) for volume in volumes if volume.filesystem == layout.SWAP]
    partitions = [(volume, partition) for volume, partition in found if partition]
    if not partitions:
        return
    with step("Zeroing swap space"), disk.path.open("r+b") as file:
        for volume, partition in partitions:
            start = os.pread(file.fileno(), max(_PAGES), partition.offset)
            page = next((size for size in _PAGES if start[:size].endswith(_SWAP_MAGIC)), None)
            if page is None or page >= partition.size:
                logger.warning("The swap space on %s is of an unknown kind, and stays as it is.", volume.name)
                continue
            _zero(disk, file.fileno(), partition.offset + page, partition.size - page)


def _zero(disk: Disk, file: int, offset: int, size: int) -> None:
    try:
        command.run(punch_argv(disk.path, offset, size))
    except CommandError:
        logger.info("What the disk is on can't make holes: zeros are written.")
        with interrupts.interruptible():
            for position in range(offset, offset + size, _CHUNK):
                os.pwrite(file, bytes(min(_CHUNK, offset + size - position)), position)
