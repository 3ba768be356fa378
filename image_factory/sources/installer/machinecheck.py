"""Checks before there is a machine for the installation: whether it can be had here."""

import os
import platform
import re
import stat
import time
import urllib.parse

from ...base import command, fuse
from ...base.errors import BuildError, ConfigurationError
from ...base.log import logger
from ...base.units import format_size
from ...configuration.parsers import Source
from ...configuration.settings import ImageSettings
from ...machines import arch, firmware, kvm, libvirt
from ...model import Plan

# virt-install 4.1 escapes them twice in the console's path.
_NOT_IN_PATHS = frozenset("&<>'\"")
# libvirt starts no QEMU in less time.
_SLOW_QUERY_SECONDS = 1.0


def check_output_dir(plan: Plan) -> None:
    """Raise ConfigurationError if virt-install or QEMU can't use the output directory.

    QEMU of the system's libvirt runs as a user of its own, libvirt-qemu on Debian, unless qemu.conf
    says otherwise.
    """
    # XML can't tell libvirt of control characters and of bytes that are no UTF-8, and the helper takes none.
    if set(str(plan.output_dir)) & _NOT_IN_PATHS or not str(plan.output_dir).isprintable():
        raise ConfigurationError(
            f"[{plan.image}] output-dir: virt-install can't use {plan.output_dir}.",
            hint=f"Use a path of UTF-8 without control characters and {' '.join(sorted(_NOT_IN_PATHS))}",
        )
    # FUSE lets in only the user who has mounted it, not even root.
    if plan.as_root and (found := fuse.mount_of(plan.output_dir)) and "allow_other" not in found.options:
        raise ConfigurationError(
            f"QEMU, which libvirt runs as user {libvirt.QEMU_USER}, can't enter {found.point}: it is {found.kind} "
            "without allow_other.",
            hint="Build in another directory with --output-dir, or as an ordinary user.",
        )
    for directory in (plan.output_dir, *plan.output_dir.parents):
        if directory.exists() and plan.as_root and not libvirt.qemu_may(directory, stat.S_IXOTH):
            raise ConfigurationError(
                f"QEMU, which libvirt runs as user {libvirt.QEMU_USER}, can't enter {directory}.",
                hint="Build in another directory with --output-dir, or as an ordinary user.",
            )


def warn_of_slow_libvirt(plan: Plan) -> None:
    """Warn where root's libvirt starts each QEMU anew for a query of what it can do, and measure how long that takes.

    libvirt does so as long as QEMU's user may open /dev/kvm and it does not work, and the other way round.
    """
    if not plan.as_root or plan.settings.virt_type != "auto" or not kvm.KVM_DEVICE.exists():
        return
    seconds = 0.0
    # The first one after libvirtd's start takes its time everywhere.
    for _ in range(2):
        start = time.monotonic()
        try:
            command.run(libvirt.virsh("capabilities"), capture=True, timeout=libvirt.VIRSH_SECONDS)
        except BuildError as error:
            logger.warning("libvirt does not say what QEMU can do: %s", error.said)
            return
        seconds = time.monotonic() - start
        if seconds < _SLOW_QUERY_SECONDS:
            return
    logger.warning(
        "libvirt takes %.0f s for each query of what QEMU can do, of which an installation needs about ten: it tries "
        "%s each time. Where KVM works, let group kvm open it: chgrp kvm %s; chmod 660 %s. Where it does not, remove "
        "it: rm %s.",
        seconds,
        *[kvm.KVM_DEVICE] * 4,
    )


def check_machine(plan: Plan) -> None:
    """Raise ConfigurationError if there is no such machine, or not here: architecture, firmware, KVM."""
    settings = plan.settings
    facts = arch.ARCHITECTURES[settings.arch]
    if not facts.machines:
        raise ConfigurationError(
            f"[{plan.image}] arch: nothing is installed on {settings.arch} here.",
            hint=f"Use {' or '.join(arch.BOOTABLE)}.",
        )
    if settings.firmware not in facts.machines:
        raise ConfigurationError(
            f"[{plan.image}] firmware: {settings.arch} has no {settings.firmware}.",
            hint=f"Use {' or '.join(facts.machines)}.",
        )
    if settings.firmware != "bios" and not firmware.uefi_firmware(settings.arch):
        raise ConfigurationError(
            f"[{plan.image}] firmware = {settings.firmware}: this machine has no UEFI for {settings.arch}.",
            hint=f"Install it: apt-get install {facts.uefi_package}",
        )
    if settings.virt_type == "kvm" and not arch.is_host(settings.arch):
        raise ConfigurationError(
            f"[{plan.image}] virt-type: KVM runs no {settings.arch} on {platform.machine()}.", hint="Use qemu or auto."
        )
    for doubt in _doubts(settings, plan.variables.get("arch", "")):
        logger.warning("[%s] %s", plan.image, doubt)


def _doubts(settings: ImageSettings, arch_text: str) -> list[str]:
    """Return sentences on what fits neither this machine nor the architecture of *settings*, given as *arch_text*."""
    doubts = []
    for key in ("linux", "initrd", "installer_image"):
        source: Source | None = getattr(settings, key)
        if not source:
            continue
        # The name of a host says nothing.
        path = str(source.path or urllib.parse.urlsplit(source.uri).path)
        named = arch.named_architectures(path)
        if re.fullmatch("i[356]86", arch_text.strip()) and re.search("amd64|x86_64", path):
            doubts.append(f"{key}: {path} is of 64 bits by its name, but arch is {arch_text.strip()}.")
        if named and settings.arch not in named:
            possible = sorted(named & {*arch.BOOTABLE})
            move = f", or set arch = {possible[0]}" if possible else ""
            doubts.append(
                f"{key}: {path} is of {' and '.join(sorted(named))} by its name, but arch is {settings.arch}. "
                f"Name that of {settings.arch}{move}."
            )
    own = arch.ARCHITECTURES[settings.arch].console
    consoles = re.findall(r"\bconsole=(tty[A-Z]+[0-9]+)", settings.append)
    for other in arch.ARCHITECTURES.values():
        if other.console != own and other.console in consoles and own not in consoles:
            doubts.append(f"append: {settings.arch} has no console {other.console}. Write console={own}.")
    processors, memory = os.cpu_count() or 1, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if settings.cores > processors:
        doubts.append(
            f"cores: {settings.cores} are more than the {processors} of this machine, which makes nothing faster. "
            f"Set at most {processors}."
        )
    if settings.ram > memory:
        doubts.append(
            f"ram: {format_size(settings.ram)} is more than the {format_size(memory)} of this machine. Set less."
        )
    return doubts
