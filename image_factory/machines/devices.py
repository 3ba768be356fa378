"""The machines of a boot matrix: their disks, network cards and TPM, each as QEMU and as the guest's kernel have it."""

from collections.abc import Collection, Iterable
from typing import NamedTuple


class Device(NamedTuple):
    """The *options* of QEMU's ``-device``, the last of them that of the device itself, and the kernel's *modules*."""

    options: tuple[str, ...]
    modules: tuple[str, ...]


# The first of each is that of a machine of which nothing is said.  virtio-scsi differs from the installation's
# virtio-blk, so an initramfs that was made for one machine only fails.
DISKS = {
    "virtio-scsi": Device(("scsi-hd,bus=controller.0",), ("virtio_pci", "virtio_scsi", "sd_mod")),
    "virtio-blk": Device(("virtio-blk-pci",), ("virtio_pci", "virtio_blk")),
    "nvme": Device(("nvme,serial=image-factory",), ("nvme",)),
    "sata": Device(("ich9-ahci,id=sata", "ide-hd,bus=sata.0"), ("ahci", "sd_mod")),
    "usb": Device(("qemu-xhci", "usb-storage"), ("xhci_pci", "usb_storage", "sd_mod")),
}
NETWORKS = {
    "virtio-net": Device(("virtio-net-pci",), ("virtio_pci", "virtio_net")),
    "e1000e": Device(("e1000e",), ("e1000e",)),
}
# That of UEFI with Microsoft's keys, which starts only what is signed.
SECURE_BOOT = "secure-boot"
FIRMWARES = ("bios", "uefi", SECURE_BOOT)
TPM = "tpm"
TPMS = ("no-tpm", TPM)

# What a matrix has words of.
KINDS = (tuple(DISKS), FIRMWARES, tuple(NETWORKS), TPMS)


def of_kind(kind: Collection[str], words: Iterable[str]) -> list[str]:
    """Return those of *words* that are of *kind*; the first of the kind if there are none."""
    return [word for word in words if word in kind] or [*kind][:1]
