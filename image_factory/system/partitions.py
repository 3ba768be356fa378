"""Partition tables, and what the partitions hold, read from a disk image with no root and no device."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _ped
import parted

from ..base import command
from ..base.errors import BuildError, CommandError, CrashError, NoSystemError
from ..model import Partition, Volume

# Names of blkid for the filesystems that can hold a root.
ROOT_FILESYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs")
# Filesystems that are mounted.
MOUNTED_FILESYSTEMS = (*ROOT_FILESYSTEMS, "vfat")
SWAP = "swap"
LVM = "LVM2_member"

# Filesystems in these are not reached.
CONTAINERS = {
    "crypto_LUKS": "encrypted",
    "BitLocker": "encrypted",
    "linux_raid_member": "a part of a RAID",
    "isw_raid_member": "a part of a RAID",
    "ddf_raid_member": "a part of a RAID",
    "bcache": "a part of bcache",
}

# Filesystems that can hold a root, and that nothing here knows.
_UNSUPPORTED_ROOTS = ("bcachefs", "erofs", "f2fs", "jfs", "nilfs2", "reiserfs", "squashfs", "ubifs", "zfs_member")

# A root filesystem has one of these.
ROOT_MARKS = ("etc/fstab", "etc/os-release", "usr/lib/os-release")

SUPPORTED_ROOT = "Have the answer file put the root filesystem on ext4, xfs or btrfs."

# The number of what is on a disk without a partition table.
WHOLE_DISK = 0

_SECTOR = 512
_GPT = b"EFI PART"

# blkid exits with these where it knows nothing of what is there, or finds several things at once.
_NOTHING_FOR_SURE = (2, 8)

_SECONDS = 60.0


def read_partitions(image: Path) -> list[Partition]:
    """Return the partitions of *image* in the order of the disk; NoSystemError if there is nothing that is known.

    A filesystem without a table is the only partition, WHOLE_DISK.
    """
    try:
        # libparted aborts the process on some tables, and a guest can write any.
        return command.call_apart(_read_partitions, image, _SECONDS)
    except CrashError as error:
        raise NoSystemError(f"The disk has no partition table that can be read: libparted {error.message}.") from error
    except MemoryError as error:
        raise NoSystemError("The disk has no partition table that can be read: it takes too much memory.") from error


def _read_partitions(image: Path) -> list[Partition]:
    try:
        with image.open("rb") as file:
            tables = [os.pread(file.fileno(), len(_GPT), size) == _GPT for size in (_SECTOR, 4096)]
        # A GUID partition table begins in the second sector.
        if tables == [False, True]:
            raise NoSystemError(
                "The disk has sectors of 4 KiB, which are not supported: its partition table begins at byte 4096.",
                hint="Have it installed on a disk with sectors of 512 bytes.",
            )
        device = parted.getDevice(str(image))
        disk = parted.newDisk(device)
    except (parted.DeviceException, parted.IOException, OSError) as error:
        raise NoSystemError(f"The disk can't be read: {_one_line(error)}") from error
    except (parted.DiskException, _ped.PartedException) as error:
        raise NoSystemError(f"The disk has no partition table that can be read: {_one_line(error)}") from error
    # libparted's name for a filesystem on the whole disk.
    if disk.type == "loop":
        return [Partition(WHOLE_DISK, 0, image.stat().st_size)]
    return [
        Partition(
            number=partition.number,
            offset=partition.geometry.start * device.sectorSize,
            size=partition.geometry.length * device.sectorSize,
        )
        for partition in sorted(disk.partitions, key=lambda partition: partition.geometry.start)
        if partition.type in (parted.PARTITION_NORMAL, parted.PARTITION_LOGICAL)
    ]


def is_gpt(image: Path) -> bool:
    """Whether *image* has a GUID partition table."""
    with image.open("rb") as file:
        return os.pread(file.fileno(), len(_GPT), _SECTOR) == _GPT


def read_volumes(image: Path) -> list[Volume]:
    """Return the partitions of *image* with what they hold; NoSystemError if there is no table."""
    partitions = read_partitions(image)
    names = _names(image)
    return [_volume(image, partition, *names.get(partition.number, (None, None, None))) for partition in partitions]


def table_argv(image: Path) -> list[str]:
    """Return the command that tells the UUIDs, names and types of partitions, which libparted doesn't."""
    return ["sfdisk", "--json", str(image)]


def probe_argv(image: Path, offset: int | str, size: int | str) -> list[str]:
    """Return the command that tells what *size* bytes at *offset* of *image* hold."""
    return ["blkid", "-p", "-o", "export", "-O", str(offset), "-S", str(size), str(image)]


def _names(image: Path) -> dict[int, tuple[str | None, str | None, str | None]]:
    """Return UUID, name and type of each partition, by its number; nothing of a table that sfdisk doesn't take."""
    try:
        table: dict[str, Any] = json.loads(command.run(table_argv(image), capture=True, timeout=_SECONDS))
        table = table["partitiontable"]
        found = {}
        for entry in table.get("partitions", []):
            number = int(entry["node"].removeprefix(str(image)).lstrip("p"))
            # The kernel makes such a UUID where a table's partitions have none.
            uuid = entry.get("uuid") or f"{table['id'].removeprefix('0x')}-{number:02x}"
            found[number] = uuid, entry.get("name"), entry.get("type")
        return found
    except (BuildError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _volume(
    image: Path, partition: Partition, part_uuid: str | None, part_label: str | None, part_type: str | None
) -> Volume:
    try:
        argv = probe_argv(image, partition.offset, partition.size)
        text = command.run(argv, capture=True, timeout=_SECONDS)
    except CommandError as error:
        if error.status not in _NOTHING_FOR_SURE:
            raise
        text = ""
    values = {key: re.sub(r"\\(.)", r"\1", value) for key, value in re.findall(r"^([A-Z_]+)=(.*)$", text, re.MULTILINE)}
    return Volume(
        f"partition {partition.number}" if partition.number != WHOLE_DISK else "the whole disk",
        partition.size,
        values.get("TYPE"),
        values.get("UUID"),
        values.get("LABEL"),
        part_uuid,
        part_label,
        partition,
        part_type,
    )


def no_root(volumes: Sequence[Volume]) -> NoSystemError:
    """Return the error that none of *volumes* has a root filesystem."""
    for volume in volumes:
        if volume.filesystem in CONTAINERS:
            return NoSystemError(
                f"No root filesystem can be reached: {volume.name} is {CONTAINERS[volume.filesystem]}.",
                hint="Have the root filesystem on a partition or on LVM, without encryption or RAID.",
            )
    for volume in volumes:
        if volume.filesystem in _UNSUPPORTED_ROOTS:
            return NoSystemError(
                f"The root filesystem seems to be on {volume.name}: {volume.filesystem.removesuffix('_member')}, which "
                "is not supported.",
                hint=SUPPORTED_ROOT,
            )
    if not any(volume.filesystem in ROOT_FILESYSTEMS for volume in volumes):
        return NoSystemError(f"The disk has no root filesystem, only {describe(volumes)}.")
    return NoSystemError(
        f"None of the disk's filesystems is a root filesystem (with {' or '.join(ROOT_MARKS)}): {describe(volumes)}."
    )


def describe(volumes: Sequence[Volume]) -> str:
    """Return *volumes* as a phrase."""
    if not volumes:
        return "a partition table without partitions"
    return ", ".join(f"{volume.name} ({volume.filesystem or 'no known filesystem'})" for volume in volumes)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
