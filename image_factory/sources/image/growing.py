"""A larger disk: its table's end, its last partition, and the root filesystem on that."""

import os
from pathlib import Path

from ...base import command
from ...base.errors import BuildError, NoSystemError
from ...base.log import logger
from ...base.units import format_size
from ...model import Build, Disk, Volume
from ...system import appliance, partitions

STEP = "Growing the disk"


def relocate_argv(disk: Path) -> list[str]:
    """Return the command that moves the second GUID partition table to the end of *disk*."""
    return ["sfdisk", "--quiet", "--no-tell-kernel", "--relocate", "gpt-bak-std", str(disk)]


def extend_argv(disk: Path, number: int | str) -> list[str]:
    """Return the command that gives partition *number* of *disk* the space behind it, as its stdin says."""
    return ["sfdisk", "--quiet", "--no-tell-kernel", "--partno", str(number), str(disk)]


_TO_THE_END = b", +\n"


def commands(build: Build) -> list[list[str]]:
    """Return the commands that grow the disk of *build*."""
    disk = build.disk_path
    return [relocate_argv(disk), extend_argv(disk, "NUMBER"), *appliance.growing(Disk(disk))]


def grow(build: Build, disk: Disk, size: int) -> None:
    """Have *disk* be of *size* bytes, and its last partition and the root filesystem there be larger with it."""
    before = disk.path.stat().st_size
    if size == before:
        return
    if size < before:
        raise too_small(build.plan.image, size, before)
    volumes = _volumes(disk)
    last = max(volumes, key=lambda volume: volume.partition.offset if volume.partition else 0)
    assert last.partition is not None
    if last.partition.number == partitions.WHOLE_DISK:
        raise BuildError("The disk can't grow: it has no partition table.", hint="Leave image-size out.")
    if last.filesystem not in partitions.ROOT_FILESYSTEMS:
        raise BuildError(
            f"The disk can't grow: {partitions.describe([last])} is last on it, where a root filesystem would be.",
            hint="Leave image-size out.",
        )
    os.truncate(disk.path, size)
    if partitions.is_gpt(disk.path):
        command.run(relocate_argv(disk.path))
    command.run(extend_argv(disk.path, last.partition.number), stdin=_TO_THE_END)
    appliance.grow(build, disk, last)
    logger.info("%s has grown with the disk by %s.", last.name.capitalize(), format_size(size - before))


def too_small(image: str, size: int, least: int) -> BuildError:
    """Return the error that the source image of *least* bytes does not fit into *size*."""
    return BuildError(
        f"[{image}] image-size: {format_size(size)} is less than the {format_size(least)} of the source image.",
        hint="A disk is not made smaller. Leave image-size out, or make it larger.",
    )


def _volumes(disk: Disk) -> list[Volume]:
    volumes = partitions.read_volumes(disk.path)
    if not volumes:
        raise NoSystemError("The disk can't grow: it has no partition.")
    return volumes
