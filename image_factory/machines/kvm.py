"""The probe that tells whether virtual machines can use KVM on this machine."""

import contextlib
import os
import stat
from pathlib import Path

from ..base import command
from ..base.log import logger
from . import arch, libvirt

BOOT = Path("/boot")
KVM_DEVICE = Path("/dev/kvm")
# A kernel prints its banner in well under a second on a KVM that works, nested ones included.
PROBE_SECONDS = 5.0
_PROBE_BANNER = b"Linux version"


def has_to_probe(virt_type: str, architecture: str) -> bool:
    """Return whether a probe decides what stands for *virt_type*: KVM runs no other *architecture* than this one's."""
    return virt_type == "auto" and arch.is_host(architecture)


def kernel_here() -> Path | None:
    """Return a kernel of this machine's own that can be probed with, None if there is none that can be read."""
    found = [path for path in BOOT.glob("vmlinuz-*") if os.access(path, os.R_OK)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def probed_virt_type(kernel: Path | None, architecture: str, *, as_root: bool) -> str:
    """Return ``kvm`` if *kernel* of *architecture* prints under it, else ``qemu``, and log why.

    /dev/kvm may be there, and open, and useless, where this machine is a virtual one itself.
    """
    reason = why_libvirt_has_no_kvm(kernel, architecture, as_root=as_root)
    if reason is None:
        return "kvm"
    logger.warning(
        "KVM is not used: %s. Emulation takes about ten times as long. 'virt-type = kvm' or 'qemu' skips this probe.",
        reason,
    )
    return "qemu"


def probe_argv(kernel: Path, architecture: str) -> list[str]:
    """Return the command that starts *kernel* of *architecture* under KVM with its serial port on stdout."""
    machine = arch.ARCHITECTURES[architecture]
    return [
        machine.qemu,
        *machine.probe_options,
        "-accel", "kvm",
        "-m", "256",
        "-nodefaults",
        "-no-user-config",
        "-display", "none",
        "-no-reboot",
        "-serial", "stdio",
        "-kernel", str(kernel),
        "-append", f"console={machine.console} earlyprintk=serial,{machine.console} panic=-1",
    ]  # fmt: skip


def why_libvirt_has_no_kvm(kernel: Path | None, architecture: str, *, as_root: bool) -> str | None:
    """Return what is wrong with KVM as ``why_not_kvm`` does, for QEMU as the libvirt of root or the user runs it."""
    with contextlib.suppress(OSError):
        if as_root and not libvirt.qemu_may(KVM_DEVICE, stat.S_IROTH | stat.S_IWOTH):
            return f"{KVM_DEVICE}: {libvirt.QEMU_USER}, as whom libvirt runs QEMU, may not open it"
    return why_not_kvm(kernel, architecture)


def why_not_kvm(kernel: Path | None, architecture: str) -> str | None:
    """Start *kernel* of *architecture* under KVM until it prints to its serial port; return what is wrong, or None."""
    try:
        with KVM_DEVICE.open("r+b", buffering=0):
            pass
    except OSError as error:
        return f"{KVM_DEVICE}: {error.strerror}"
    if kernel is None:
        return "there is no kernel to probe it with"
    output = command.read_until(probe_argv(kernel, architecture), _PROBE_BANNER, PROBE_SECONDS)
    if _PROBE_BANNER in output:
        return None
    return f"the kernel that was started printed nothing under it within {PROBE_SECONDS:.0f} s"
