"""How the filesystems of a disk are reached: each way is a module with the functions of ``Way``."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from ..base import command
from ..base.errors import BuildError, ConfigurationError
from ..base.log import logger, step
from ..configuration.settings import BOOTSTRAP_KEY
from ..model import Build, Disk, Plan, Volume
from . import appliance, assembly, fuse, loop, partitions, privileged
from .rehearsal import Call
from .tree import Tree

# The sources whose disks a build lays out itself.
_LAYING_OUT = (BOOTSTRAP_KEY, "elements")

STEP = "Reading the partition table"


class Way(Protocol):
    """A way to mount the root filesystem."""

    def programs(self, plan: Plan) -> list[str]:
        """Return the programs that it needs."""

    def check(self, plan: Plan) -> None:
        """Raise ConfigurationError if it is known already that it can't be gone here."""

    def mounting(self, build: Build, disk: Disk) -> list[list[str]]:
        """Return the commands that mount the system on *disk*."""

    def commands(self, build: Build, calls: Sequence[Call]) -> list[list[str]]:
        """Return the commands that *calls* on the system are."""

    def unmounting(self, build: Build, disk: Disk) -> list[list[str]]:
        """Return the commands that unmount the system on *disk*."""

    def mounted(self, build: Build, disk: Disk, volumes: Sequence[Volume]) -> AbstractContextManager[Tree]:
        """Give the system on *volumes*, the partitions of *disk*, mounted; NoSystemError if there is none."""

    def shell(self, build: Build, disk: Disk, volumes: Sequence[Volume]) -> None:
        """Let the user look into the system on *disk*, on the terminal; NoSystemError if there is none."""


WAYS: dict[str, Way] = {"loop": loop, "fuse": fuse, "guestfs": appliance}


def programs(plan: Plan) -> list[str]:
    """Return the programs that are needed to mount the disk of *plan*."""
    return ["sfdisk", "blkid", *_way(plan).programs(plan)]


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it is known already that the disk of *plan* can't be mounted here."""
    _way(plan).check(plan)


Described = list[tuple[str, list[list[str]]]]


def around(build: Build, disk: Disk) -> tuple[Described, Described]:
    """Return the steps that mount the system on *disk*, and those that unmount it, each with its commands."""
    way = _shown_way(build, disk)
    reading = [partitions.table_argv(disk.path), partitions.probe_argv(disk.path, "OFFSET", "SIZE")]
    mounting = [(STEP, reading), (assembly.MOUNTING, way.mounting(build, disk))]
    return mounting, [(assembly.UNMOUNTING, way.unmounting(build, disk))]


def commands(build: Build, disk: Disk, calls: Sequence[Call]) -> list[list[str]]:
    """Return the commands that *calls* on the system on *disk*, which is mounted, are."""
    return _shown_way(build, disk).commands(build, calls)


def _shown_way(build: Build, disk: Disk) -> Way:
    return reading_way(build.plan) if disk.read_only else _way(build.plan)


@contextmanager
def mounted(build: Build, disk: Disk) -> Iterator[Tree]:
    """Give the system on *disk*, mounted; NoSystemError if there is none."""
    volumes = _volumes(build.plan, disk)
    with _way_of(disk, volumes, build.plan).mounted(build, disk, volumes) as tree:
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


def _way_of(disk: Disk, volumes: Sequence[Volume], plan: Plan) -> Way:
    """Return the way for the system on *volumes* of *disk*: not fuse where all that its files are is to be read."""
    way = _way_to(volumes, plan)
    return reading_way(plan) if disk.read_only and way is fuse else way


def reading_way(plan: Plan) -> Way:
    """Return the way of *plan* to read all that the files of a system are; ConfigurationError if there is none."""
    if _way(plan) is not fuse:
        return _way(plan)
    # In a user namespace the kernel gives no ACL of a filesystem of FUSE.
    if not plan.guestfs_allowed:
        raise ConfigurationError(
            f"[{plan.image}] mount-via = fuse can't read the ACLs of files, which a format of the tree has.",
            hint="Set mount-via to loop, guestfs or auto.",
        )
    command.require(appliance.programs(plan))
    appliance.check(plan)
    return appliance


def _way_to(volumes: Sequence[Volume], plan: Plan) -> Way:
    """Return the way of *plan*, or another for what this machine's kernel must not or can't mount."""
    way = _way(plan)
    if way is fuse:
        return _fuse_or_guestfs(volumes, plan)
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
    if not plan.as_root and _without_root(plan) == "fuse" and _lacking_in_fuse(volumes) is None:
        logger.info("%s: the disk is mounted by way of fuse.", what)
        return fuse
    try:
        command.require(appliance.programs(plan))
        appliance.check(plan)
    except ConfigurationError as error:
        # Perhaps nothing there is of any interest.
        logger.warning("%s, and guestfs can't be used: %s", what, error.message)
        return way
    logger.info("%s: the disk is mounted by way of guestfs.", what)
    return appliance


def _lacking_in_fuse(volumes: Sequence[Volume]) -> Volume | None:
    """Return one of *volumes* with what fuse can't reach, None if there is none."""
    known = (None, partitions.SWAP, *fuse.FILESYSTEMS)
    return next((volume for volume in volumes if volume.filesystem not in known), None)


def _fuse_or_guestfs(volumes: Sequence[Volume], plan: Plan) -> Way:
    """Return fuse, or guestfs for filesystems that it has not."""
    lacking = _lacking_in_fuse(volumes)
    if lacking is None:
        return fuse
    what = f"{lacking.name} has {lacking.filesystem}, which mount-via = fuse can't reach"
    if not plan.guestfs_allowed:
        raise BuildError(f"{what[0].upper()}{what[1:]}.", hint="Set mount-via to guestfs or auto.")
    try:
        command.require(appliance.programs(plan))
        appliance.check(plan)
    except ConfigurationError as error:
        raise BuildError(
            f"{what[0].upper()}{what[1:]}, and guestfs can't be used: {error.message}", hint=error.hint
        ) from error
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
    """Return *plan* with the way that ``auto`` means here: loop for who may use it, else fuse or guestfs."""
    if plan.settings.mount_via != "auto":
        return plan
    name, reason = "loop", "root may"
    if plan.late_tasks:
        name, reason = "guestfs", "tasks after cleaning run in its appliance"
    elif (unsuited := loop.unsuited(plan)) is not None:
        name, reason = _without_root(plan), unsuited
    elif not plan.as_root:
        try:
            privileged.check()
            reason = f"sudo allows {privileged.HELPER}"
        except ConfigurationError as error:
            name, reason = _without_root(plan), f"{error.message.rstrip('.')}. {error.hint}"
    logger.info("mount-via = %s is chosen: %s", name, reason)
    settings = dataclasses.replace(plan.settings, mount_via=name)
    return dataclasses.replace(plan, settings=settings, guestfs_allowed=True)


def chosen_for_laid_out(plan: Plan) -> Plan:
    """Return *plan*, which has a way that was chosen, with the one for a disk that is laid out here."""
    if not plan.guestfs_allowed or plan.settings.mount_via != "guestfs" or plan.as_root:
        return plan
    settings = dataclasses.replace(plan.settings, mount_via=_without_root(plan, laid_out=True))
    return dataclasses.replace(plan, settings=settings)


def _without_root(plan: Plan, *, laid_out: bool = False) -> str:
    """Return the way that needs no root: fuse for a disk that is *laid_out* here, where it can be gone."""
    # What others have laid out may have what only the kernel's driver knows.
    if not laid_out and plan.settings.source not in _LAYING_OUT:
        return "guestfs"
    try:
        command.require(fuse.programs(plan))
        fuse.check(plan)
    except ConfigurationError as error:
        logger.info("mount-via = fuse would be faster: %s %s", error.message, error.hint)
        return "guestfs"
    return "fuse"
