"""The machines on which an image is booted, and what is said of those on which it does not come up."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from ...base import command
from ...base.cleanup import released
from ...base.errors import BuildError, ConfigurationError
from ...base.log import logger
from ...configuration.settings import ImageSettings
from ...machines.devices import DISKS, FIRMWARES, NETWORKS, SECURE_BOOT, TPM, TPMS, of_kind
from ...model import Artifact, Build, Disk, Plan
from ...outputs import raw_copy_argv
from ...system import mounts
from ...system.kernels import Kernel, kernels
from .machine import Machine, firmware_for

KEY = "test-boot-matrix"
# What else than its firmware a machine may have; the first of each is the usual one.
_DEVICES = (tuple(DISKS), tuple(NETWORKS), TPMS)
_USUAL = {kind[0] for kind in _DEVICES}


class Hardware(NamedTuple):
    """What a machine has: its *firmware*, and those of its *devices* that are other than the usual ones."""

    firmware: str
    devices: tuple[str, ...] = ()


def firmwares(settings: ImageSettings) -> tuple[str, ...]:
    """Return what the image claims to boot with."""
    return ("bios", "uefi") if settings.firmware == "hybrid" else (settings.firmware,)


def hardware(settings: ImageSettings) -> list[Hardware]:
    """Return the machines that the image is booted on: of each kind of device those of the matrix, else the usual."""
    words = settings.test_boot_matrix
    named = [word for word in words if word in FIRMWARES] or firmwares(settings)
    return [
        Hardware(firmware, tuple(word for word in devices if word not in _USUAL))
        for firmware, *devices in itertools.product(named, *(of_kind(kind, words) for kind in _DEVICES))
    ]


def disk_firmware(firmware: str) -> str:
    """Return which of the image's firmwares it is that *firmware* reads a disk as."""
    return "uefi" if firmware == SECURE_BOOT else firmware


def programs(settings: ImageSettings) -> list[str]:
    """Return the programs that the devices of the machines need."""
    return ["swtpm"] if TPM in settings.test_boot_matrix else []


def check(plan: Plan) -> None:
    """Raise ConfigurationError if the image of *plan* can't be booted with a firmware, or that is not here."""
    settings = plan.settings
    claimed = firmwares(settings)
    for firmware in dict.fromkeys(machine.firmware for machine in hardware(settings)):
        if disk_firmware(firmware) not in claimed:
            raise ConfigurationError(
                f"[{plan.image}] {KEY}: an image with firmware = {settings.firmware} does not boot with {firmware}.",
                hint=f"Take {firmware} out of {KEY}, or set another firmware.",
            )
        if disk_firmware(firmware) == "uefi":
            firmware_for(settings.arch, firmware)


# Why it does not come up.


def kernels_of(build: Build, artifact: Artifact) -> list[Kernel]:
    """Return the kernels of the system in *artifact*; none, with a warning, where that can't be read."""
    copy = build.directory / "kernels.raw"
    try:
        with released(partial(copy.unlink, missing_ok=True)):
            command.run(raw_copy_argv(artifact, copy), umask=0o077)
            with mounts.mounted(build, Disk(copy)) as tree:
                return [*kernels(tree, build.directory)]
    except BuildError as error:
        logger.warning("Which drivers the image has is not known: %s", error.message)
        return []


def missing_driver(found: Sequence[Kernel], modules: Sequence[str], *, early: bool = False) -> str:
    """Return what the kernels *found* lack of *modules*, which the machine needs, empty if nothing.

    With *early* they are needed in the initramfs.
    """
    for kernel in found:
        if lacking := kernel.lacking(modules):
            return f"its kernel has no driver {' and '.join(lacking)}"
        if early and (absent := kernel.absent_early(modules)):
            return f"its initramfs has no driver {' and '.join(absent)}"
    return ""


def summary(machines: Sequence[Machine], failed: Mapping[int, str]) -> str:
    """Return a sentence on those of *machines* that have *failed*, by their numbers: where, and why."""
    reasons: dict[str, list[Machine]] = {}
    for machine in machines:
        if machine.number in failed:
            reasons.setdefault(failed[machine.number], []).append(machine)
    words = {machine.number: _words(machine) for machine in machines}
    # A word of which no machine has come up says where, if it is one of all machines with the same reason.
    bad = {
        word
        for found in words.values()
        for word in found
        if all(number in failed for number, others in words.items() if word in others)
    }
    told = []
    for reason, found in reasons.items():
        common = [
            word for word in words[found[0].number] if word in bad and all(word in words[each.number] for each in found)
        ]
        told.append(f"with {common[0] if common else '; '.join(each.name for each in found)}: {reason}")
    return f"{len(failed)} of {len(machines)} test boots failed: {'; '.join(told)}."


def _words(machine: Machine) -> list[str]:
    """Return all that *machine* has, what is usual too."""
    return [*(of_kind(kind, machine.devices)[0] for kind in _DEVICES), machine.firmware]
