"""Facts per architecture."""

import platform
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What differs between architectures.

    *debian* is Debian's name, *other_names* are the distributions' names of it; a 32-bit system runs on the machine
    of the 64-bit one.
    *machines* are the machine types of libvirt by firmware, the one that is usual first, empty for
    virt-install's choice; a firmware that is not among them can't be had.  Without any of them trees can be made of
    the architecture, and nothing boots here.
    *uefi_package* is Debian's, with UEFI for it.
    *probe_options* are QEMU's for a kernel that is started directly with KVM.  *test_machine* is QEMU's
    machine type for the test boot, *test_cpu* its processor under emulation, and *flawed_feature* one of
    that which QEMU emulates badly, but systems for x86-64-v2 do not run without.  *tpm* is QEMU's TPM for it.
    *installer_kernels* are the places of the kernel on installation media, relative to their root.
    """

    name: str
    debian: str
    qemu: str
    console: str
    other_names: tuple[str, ...]
    machines: dict[str, str]
    uefi_package: str
    probe_options: tuple[str, ...]
    test_machine: str
    test_cpu: str
    flawed_feature: str
    tpm: str
    installer_kernels: tuple[str, ...]


def _of_trees(name: str, *other_names: str) -> Architecture:
    return Architecture(name, name, "", "", other_names, {}, "", (), "", "", "", "", ())


_OF_TREES = (("armhf", "armv7l"), ("ppc64el", "ppc64le"), ("riscv64",), ("s390x",))

ARCHITECTURES = {
    "x86_64": Architecture(
        name="x86_64",
        debian="amd64",
        qemu="qemu-system-x86_64",
        console="ttyS0",
        other_names=("amd64", "i386", "i586", "i686"),
        machines={"bios": "", "uefi": "q35", "hybrid": "q35"},
        uefi_package="ovmf",
        probe_options=(),
        test_machine="q35",
        # Page tables of five levels take emulation a twentieth of its time.
        test_cpu="max,-la57",
        # With QEMU 7.2 the flags are wrong after cmpxchg16b now and then, by which kernels since 6.5 manage
        # memory: three of five boots of Linux 6.12 had an oops.
        flawed_feature="cx16",
        tpm="tpm-crb",
        installer_kernels=(
            "install.amd/vmlinuz",
            "casper/vmlinuz",
            "images/pxeboot/vmlinuz",
            "boot/x86_64/loader/linux",
        ),
    ),
    "aarch64": Architecture(
        name="aarch64",
        debian="arm64",
        qemu="qemu-system-aarch64",
        console="ttyAMA0",
        other_names=("arm64",),
        machines={"uefi": "virt"},
        uefi_package="qemu-efi-aarch64",
        probe_options=("-machine", "virt", "-cpu", "host"),
        test_machine="virt",
        # The architecture's own algorithm of pointer authentication takes emulation a quarter of its time.
        test_cpu="max,pauth-impdef=on",
        flawed_feature="",
        tpm="tpm-tis-device",
        installer_kernels=(
            "install.a64/vmlinuz",
            "casper/vmlinuz",
            "images/pxeboot/vmlinuz",
            "boot/aarch64/linux",
        ),
    ),
    **{name: _of_trees(name, *others) for name, *others in _OF_TREES},
}

# Those that images boot on.
BOOTABLE = tuple(each.name for each in ARCHITECTURES.values() if each.machines)


# What any of them can boot with.
FIRMWARES = tuple(dict.fromkeys(firmware for each in ARCHITECTURES.values() for firmware in each.machines))

# The architectures by all of their names, which configuration files may have in a variable 'arch' of their own.
NAMES = {name: each.name for each in ARCHITECTURES.values() for name in (each.name, *each.other_names)}
# What images can't be built for, but files may be of.
_OTHERS = ("loongarch64",)


def is_arch(name: str, arch: str) -> bool:
    """Return whether *name*, in which ``-`` may stand for ``_``, is one of the architecture *arch*."""
    name = name.replace("-", "_")
    return NAMES.get(name, name) == arch


def named_architectures(text: str) -> set[str]:
    """Return the architectures that the words of *text*, a path or a URI, name."""
    names = NAMES | {name: name for name in _OTHERS}
    found = re.findall(rf"(?<![a-z0-9])({'|'.join(names)})(?![a-z0-9])", text.lower())
    return {names[name] for name in found}


def default_arch() -> str:
    """Return the architecture of this machine, x86_64 if images can't be built for it."""
    machine = platform.machine()
    return machine if machine in BOOTABLE else "x86_64"


def default_firmware(arch: str) -> str:
    """Return the firmware of machines of *arch* when nothing is said of it, empty where there are none."""
    return next(iter(ARCHITECTURES[arch].machines), "")


def debian_arch(text: str, arch: str) -> str:
    """Return Debian's name of *arch*, or of the 32-bit system on it that *text*, as a user wrote it, names."""
    return "i386" if re.fullmatch("i[3-6]86", text.strip().lower()) else ARCHITECTURES[arch].debian


def is_host(name: str) -> bool:
    """Return whether *name* is this machine's architecture, whose programs KVM runs."""
    return platform.machine() == name
