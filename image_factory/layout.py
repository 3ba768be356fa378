"""Partition tables, read with pyparted from a disk image, with no root and no device."""

from pathlib import Path

import _ped
import parted

from . import command
from .errors import CrashError, NoSystemError
from .model import Partition

# As libparted names the filesystems that can hold a root.
ROOT_FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs")

# A root filesystem has one of these.
ROOT_MARKS = ("etc/fstab", "etc/os-release", "usr/lib/os-release")

_SECONDS = 60.0


def read_partitions(image: Path) -> list[Partition]:
    """Return the partitions of *image* in the order of the disk; NoSystemError if there is no table."""
    try:
        # libparted aborts the process on some tables, and a guest can write any.
        return command.call_apart(_read_partitions, image, _SECONDS)
    except CrashError as error:
        raise NoSystemError(f"The disk has no partition table that can be read: libparted {error.message}.") from error


def _read_partitions(image: Path) -> list[Partition]:
    try:
        device = parted.getDevice(str(image))
        disk = parted.newDisk(device)
    except (parted.DeviceException, parted.IOException) as error:
        raise NoSystemError(f"The disk can't be read: {_one_line(error)}") from error
    except (parted.DiskException, _ped.PartedException) as error:
        raise NoSystemError(f"The disk has no partition table that can be read: {_one_line(error)}") from error
    # libparted's name for a filesystem on the whole disk.
    if disk.type == "loop":
        raise NoSystemError("The disk has no partition table, only a filesystem.")
    return [
        Partition(
            number=partition.number,
            offset=partition.geometry.start * device.sectorSize,
            size=partition.geometry.length * device.sectorSize,
            filesystem=partition.fileSystem.type if partition.fileSystem else None,
        )
        for partition in sorted(disk.partitions, key=lambda partition: partition.geometry.start)
        if partition.type in (parted.PARTITION_NORMAL, parted.PARTITION_LOGICAL)
    ]


def root_candidates(partitions: list[Partition]) -> list[Partition]:
    """Return those of *partitions* that can be the root filesystem, the largest first.

    NoSystemError if there is none.
    """
    candidates = [partition for partition in partitions if partition.filesystem in ROOT_FILESYSTEMS]
    if not candidates:
        raise NoSystemError(f"The disk has no root filesystem, only {describe(partitions)}.")
    return sorted(candidates, key=lambda partition: partition.size, reverse=True)


def no_root(partitions: list[Partition]) -> NoSystemError:
    """Return the error that none of the filesystems on *partitions* is a root filesystem."""
    return NoSystemError(
        f"None of the disk's filesystems is a root filesystem (with {' or '.join(ROOT_MARKS)}): {describe(partitions)}."
    )


def describe(partitions: list[Partition]) -> str:
    """Return *partitions* as a phrase."""
    if not partitions:
        return "a partition table without partitions"
    return ", ".join(
        f"partition {partition.number} ({partition.filesystem or 'no known filesystem'})" for partition in partitions
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
