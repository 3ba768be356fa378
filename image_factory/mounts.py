"""How the root filesystem of a disk is reached: each way is a module with the functions of ``Way``."""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from . import appliance, loop, privileged
from .errors import ConfigurationError
from .log import logger
from .model import Build, Disk, Plan, Tree


class Way(Protocol):
    """A way to mount the root filesystem."""

    def programs(self, plan: Plan) -> list[str]:
        """Return the programs that it needs."""

    def check(self, plan: Plan) -> None:
        """Raise ConfigurationError if it is known already that it can't be gone here."""

    def describe(self, build: Build, shown: Sequence[str], removed: Sequence[str]) -> list[tuple[str, list[list[str]]]]:
        """Return the steps on the tree, each with its commands; nothing is *shown* if that is empty."""

    def mounted(self, build: Build, disk: Disk) -> AbstractContextManager[Tree]:
        """Give the root filesystem of *disk*, mounted; NoSystemError if there is none."""

    def shell(self, build: Build, disk: Disk) -> None:
        """Let the user look into the root filesystem of *disk*, on the terminal; NoSystemError if there is none."""


WAYS: dict[str, Way] = {"loop": loop, "guestfs": appliance}


def way(plan: Plan) -> Way:
    """Return the way of *plan*, for which it is chosen."""
    return WAYS[plan.settings.mount_via]


def chosen(plan: Plan) -> Plan:
    """Return *plan* with the way that ``auto`` means here: loop for who may use it, else guestfs."""
    if plan.settings.mount_via != "auto":
        return plan
    name, reason = "loop", "root may"
    if not plan.as_root:
        try:
            privileged.check()
            reason = f"sudo allows {privileged.HELPER}"
        except ConfigurationError as error:
            name, reason = "guestfs", f"{error.message} {error.hint}"
    logger.info("mount-via = %s is chosen: %s", name, reason)
    return dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, mount_via=name))
