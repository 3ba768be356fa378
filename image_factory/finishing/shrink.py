"""Free the blocks that no file uses, and what has been swapped out."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..base import command, interrupts
from ..base.errors import CommandError
from ..base.log import logger
from ..base.units import format_size
from ..model import Build, Disk, Partition, Plan, Volume
from ..parts import State, Step, doing, tree_of
from ..system import partitions
from ..system.rehearsal import Call
from ..system.tree import Tree

_ZEROFREE_FILESYSTEMS = ("ext2", "ext3", "ext4")

# The header of swap space fills a page of the guest's kernel, and ends with this (linux/swap.h).
_SWAP_MAGIC = b"SWAPSPACE2"
_PAGES = (4096, 8192, 16384, 65536)

_CHUNK = 1 << 20


def mounted_steps(build: Build) -> Iterator[Step]:
    """Give the steps on the mounted system."""

    def trim(state: State) -> State:
        return dataclasses.replace(state, unfreed=tuple(trim_filesystems(state.disk, tree_of(state))))

    yield Step("Freeing unused blocks", trim)
    # Only a system with logical volumes has them.
    calls = (Call("zero_unused_blocks", ("VOLUME",)), Call("zero_swap", ("VOLUME",)))
    yield Step(
        "Zeroing logical volumes",
        doing(lambda state: zero_logical_volumes(tree_of(state), state.unfreed)),
        when=lambda state: has_logical_to_zero(tree_of(state), state.unfreed),
        calls=calls,
    )


def steps(build: Build) -> Iterator[Step]:
    """Give the steps on the disk, which is mounted no more."""
    disk = build.disk_path
    yield Step(
        "Zeroing unused blocks",
        doing(lambda state: zero_unused_blocks(state.disk, state.unfreed)),
        [zerofree_argv(disk, "OFFSET")],
        when=lambda state: bool(_with_unused_blocks(state.unfreed)),
    )
    yield Step(
        "Zeroing swap space",
        doing(lambda state: zero_swap(state.disk, state.volumes)),
        [punch_argv(disk, "OFFSET", "SIZE")],
        when=lambda state: bool(_with_swap(state.volumes)),
    )


def programs(plan: Plan) -> list[str]:
    """Return the programs that freeing and zeroing need."""
    return ["fallocate", "zerofree"]


def trim_filesystems(disk: Disk, tree: Tree) -> list[Volume]:
    """Give the unused blocks of the mounted filesystems back; return those that are not all zeros then.

    They are holes of the disk's file then.  A file has no holes that are smaller than a block of
    the filesystem that it is on, and a thin pool of LVM frees no less than a chunk.
    """
    unfreed = []
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


def _with_unused_blocks(unfreed: Sequence[Volume]) -> list[Partition]:
    """Return the partitions among *unfreed* whose unused blocks can be zeroed."""
    return [volume.partition for volume in unfreed if volume.filesystem in _ZEROFREE_FILESYSTEMS and volume.partition]


def zero_unused_blocks(disk: Disk, unfreed: Sequence[Volume]) -> None:
    """Zero what is in the unused blocks of those of *unfreed* that are partitions with ext2, ext3 or ext4.

    It reads them one by one, which takes longer than the conversion of the disk: only for what could
    not be freed.
    """
    for partition in _with_unused_blocks(unfreed):
        command.run(zerofree_argv(disk.path, partition.offset))


def _logical(tree: Tree, unfreed: Sequence[Volume]) -> tuple[list[Volume], list[Volume]]:
    """Return the logical volumes of *tree* whose blocks are to be zeroed, and those with swap space."""
    swap = [volume for volume in tree.volumes if not volume.partition and volume.filesystem == partitions.SWAP]
    return [volume for volume in unfreed if not volume.partition], swap


def has_logical_to_zero(tree: Tree, unfreed: Sequence[Volume]) -> bool:
    """Return whether ``zero_logical_volumes`` has something to do."""
    return tree.logical is not None and any(_logical(tree, unfreed))


def zero_logical_volumes(tree: Tree, unfreed: Sequence[Volume]) -> None:
    """Do to the logical volumes of *tree* what the other two do to partitions, while it is mounted."""
    assert tree.logical is not None
    blocks, swap = _logical(tree, unfreed)
    thin = {found.volume.name for found in tree.filesystems if found.discard_size() > found.block_size()}
    for volume in blocks:
        if volume.filesystem in _ZEROFREE_FILESYSTEMS:
            tree.logical.zero_unused_blocks(volume)
        elif volume.name in thin and not tree.logical.fill_unused_blocks(volume):
            logger.warning("The unused blocks of %s are not zeroed: its thin pool is too small.", volume.name)
    for volume in swap:
        tree.logical.zero_swap(volume)


def _with_swap(volumes: Sequence[Volume]) -> list[tuple[Volume, Partition]]:
    """Return those of *volumes* that are partitions with swap space."""
    return [
        (volume, volume.partition) for volume in volumes if volume.filesystem == partitions.SWAP and volume.partition
    ]


def zero_swap(disk: Disk, volumes: Sequence[Volume]) -> None:
    """Zero what was swapped out to those of *volumes* that are partitions, but for the header: UUID and label stay."""
    swap = _with_swap(volumes)
    if not swap:
        return
    with disk.path.open("r+b") as file:
        for volume, partition in swap:
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
