"""How the filesystems of a disk are reached: each way is a module with the functions of ``Way``."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from ..base import command
from ..base.errors import BuildError, ConfigurationError
from ..base.log import logger, step
from ..model import Build, Disk, Plan, Volume
from . import appliance, assembly, loop, partitions, privileged
from .rehearsal import Call
from .tree import Tree

STEP = "Reading the partition table"


class Way(Protocol):
    """A way to mount the root filesystem."""

    def programs(self, plan: Plan) -> list[str]:
        """Return the programs that it needs."""

    def check(self, plan: Plan) -> None:
        """Raise ConfigurationError if it is known already that it can't be gone here."""

    def mounting(self, build: Build, disk: Path) -> list[list[str]]:
        """Return the commands that mount the system on *disk*."""

    def commands(self, build: Build, calls: Sequence[Call]) -> list[list[str]]:
        """Return the commands that *calls* on the system are."""

    def unmounting(self, build: Build) -> list[list[str]]:
        """Return the commands that unmount it."""

    def mounted(self, build: Build, disk: Disk, volumes: Sequence[Volume]) -> AbstractContextManager[Tree]:
        """Give the system on *volumes*, the partitions of *disk*, mounted; NoSystemError if there is none."""

    def shell(self, build: Build, disk: Disk, volumes: Sequence[Volume]) -> None:
        """Let the user look into the system on *disk*, on the terminal; NoSystemError if there is none."""


WAYS: dict[str, Way] = {"loop": loop, "guestfs": appliance}


def programs(plan: Plan) -> list[str]:
    """Return the programs that are needed to mount the disk of *plan*."""
    return ["sfdisk", "blkid", *_way(plan).programs(plan)]


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it is known already that the disk of *plan* can't be mounted here."""
    _way(plan).check(plan)


Described = list[tuple[str, list[list[str]]]]


def around(build: Build, disk: Path) -> tuple[Described, Described]:
    """Return the steps that mount the system on *disk*, and those that unmount it, each with its commands."""
    way = _way(build.plan)
    reading = [partitions.table_argv(disk), partitions.probe_argv(disk, "OFFSET", "SIZE")]
    mounting = [(STEP, reading), (assembly.MOUNTING, way.mounting(build, disk))]
    return mounting, [(assembly.UNMOUNTING, way.unmounting(build))]


def commands(build: Build, calls: Sequence[Call]) -> list[list[str]]:
    """Return the commands that *calls* on the mounted system are."""
    return _way(build.plan).commands(build, calls)


@contextmanager
def mounted(build: Build, disk: Disk) -> Iterator[Tree]:
    """Give the system on *disk*, mounted; NoSystemError if there is none."""
    volumes = _volumes(build.plan, disk)
    with _way_to(volumes, build.plan).mounted(build, disk, volumes) as tree:
        yield tree


def shell(build: Build, disk: Disk) -> None:
    """Let the user look into the system on *disk*, on the terminal; NoSystemError if there is none."""
    volumes = _volumes(build.plan, disk)
    _way_to(volumes, build.plan).shell(build, disk, volumes)


def _volumes(plan: Plan, disk: Disk) -> list[Volume]:
    with step(STEP):
        volumes = partitions.read_volumes(disk.path)
        logger.info("The disk has %s.", partitions.describe(volumes))
        if plan.settings.require_single_partition and len(volumes) > 1:
            raise BuildError(
                f"The disk has {len(volumes)} partitions, and require-single-partition = yes: "
                f"{partitions.describe(volumes)}.",
                hint="Have the answer file make one partition, or set require-single-partition = no.",
            )
        return volumes


def _way(plan: Plan) -> Way:
    """Return the way of *plan*, for which it is chosen."""
    return WAYS[plan.settings.mount_via]


def _way_to(volumes: Sequence[Volume], plan: Plan) -> Way:
    """Return the way of *plan*, or guestfs for what this machine's kernel must not or can't mount."""
    way = _way(plan)
    if way is not loop:
        return way
    # The guest's LVM must not meet this machine's.
    group = next((volume for volume in volumes if volume.filesystem == partitions.LVM), None)
    if group is not None:
        return _guestfs_for_lvm(group, plan)
    lacking = next((volume for volume in volumes if loop.lacks_driver(volume.filesystem)), None)
    if lacking is None or not plan.guestfs_allowed:
        return way
    what = f"{lacking.name} has {lacking.filesystem}, for which this machine's kernel has no driver"
    try:
        command.require(appliance.programs(plan))
        appliance.check(plan)
    except ConfigurationError as error:
        # Perhaps nothing there is of any interest.
        logger.warning("%s, and guestfs can't be used: %s", what, error.message)
        return way
    logger.info("%s: the disk is mounted by way of guestfs.", what)
    return appliance


def _guestfs_for_lvm(group: Volume, plan: Plan) -> Way:
    if not plan.guestfs_allowed:
        raise BuildError(
            f"The disk has LVM on {group.name}, which mount-via = loop can't reach.",
            hint="Set mount-via to guestfs or auto.",
        )
    try:
        command.require(appliance.programs(plan))
        appliance.check(plan)
    except ConfigurationError as error:
        raise BuildError(
            f"The disk has LVM on {group.name}, which only guestfish can reach: {error.message}",
            hint=f"Install both: apt-get install guestfish {appliance.KERNEL_PACKAGE}. {error.hint}",
        ) from error
    logger.info("The disk has LVM on %s: it is mounted by way of guestfs.", group.name)
    return appliance


def chosen(plan: Plan) -> Plan:
    """Return *plan* with the way that ``auto`` means here: loop for who may use it, else guestfs."""
    if plan.settings.mount_via != "auto":
        return plan
    name, reason = "loop", "root may"
    if plan.late_tasks:
        name, reason = "guestfs", "tasks after cleaning run in its appliance"
    elif (unsuited := loop.unsuited(plan)) is not None:
        name, reason = "guestfs", unsuited
    elif not plan.as_root:
        try:
            privileged.check()
            reason = f"sudo allows {privileged.HELPER}"
        except ConfigurationError as error:
            name, reason = "guestfs", f"{error.message.rstrip('.')}. {error.hint}"
    logger.info("mount-via = %s is chosen: %s", name, reason)
    settings = dataclasses.replace(plan.settings, mount_via=name)
    return dataclasses.replace(plan, settings=settings, guestfs_allowed=True)
