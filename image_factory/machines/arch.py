"""Facts per architecture."""

import platform
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What differs between architectures.

    *machines* are the machine types of libvirt by firmware, empty for virt-install's choice; a
    firmware that is not among them can't be had.  *uefi_package* is Debian's, with UEFI for it.
    *probe_options* are QEMU's for a kernel that is started directly with KVM.  *test_machine* is QEMU's
    machine type for the test boot, *test_cpu* its processor under emulation, and *flawed_feature* one of
    that which QEMU emulates badly, but Enterprise Linux does not run without.
    *installer_kernels* are the places of the kernel on installation media, relative to their root.
    """

    name: str
    qemu: str
    console: str
    machines: dict[str, str]
    uefi_package: str
    probe_options: tuple[str, ...]
    test_machine: str
    test_cpu: str
    flawed_feature: str
    installer_kernels: tuple[str, ...]


ARCHITECTURES = {
    "x86_64": Architecture(
        name="x86_64",
        qemu="qemu-system-x86_64",
        console="ttyS0",
        machines={"bios": "", "uefi": "q35", "hybrid": "q35"},
        uefi_package="ovmf",
        probe_options=(),
        test_machine="q35",
        test_cpu="max",
        # With QEMU 7.2 the flags are wrong after cmpxchg16b now and then, by which kernels since 6.5 manage
        # memory: three of five boots of Linux 6.12 had an oops.
        flawed_feature="cx16",
        installer_kernels=(
            "install.amd/vmlinuz",
            "casper/vmlinuz",
            "images/pxeboot/vmlinuz",
            "boot/x86_64/loader/linux",
        ),
    ),
    "aarch64": Architecture(
        name="aarch64",
        qemu="qemu-system-aarch64",
        console="ttyAMA0",
        machines={"uefi": "virt"},
        uefi_package="qemu-efi-aarch64",
        probe_options=("-machine", "virt", "-cpu", "host"),
        test_machine="virt",
        # The architecture's own algorithm of pointer authentication takes emulation a quarter of its time.
        test_cpu="max,pauth-impdef=on",
        flawed_feature="",
        installer_kernels=(
            "install.a64/vmlinuz",
            "casper/vmlinuz",
            "images/pxeboot/vmlinuz",
            "boot/aarch64/linux",
        ),
    ),
}


def is_host(name: str) -> bool:
    """Return whether *name* is this machine's architecture, whose programs KVM runs."""
    return platform.machine() == name
