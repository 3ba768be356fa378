"""Facts per architecture."""

import platform
from dataclasses import dataclass

from .errors import ConfigurationError


@dataclass(frozen=True)
class Architecture:
    """What differs between architectures.

    *installer_kernels* are the places of the kernel on installation media, relative to their root.
    """

    name: str
    qemu: str
    console: str
    installer_kernels: tuple[str, ...]


ARCHITECTURES = {
    "x86_64": Architecture(
        name="x86_64",
        qemu="qemu-system-x86_64",
        console="ttyS0",
        installer_kernels=(
            "install.amd/vmlinuz",
            "casper/vmlinuz",
            "images/pxeboot/vmlinuz",
            "boot/x86_64/loader/linux",
        ),
    ),
}


def host() -> Architecture:
    """Return the architecture of this machine, which is the one that images are built for."""
    try:
        return ARCHITECTURES[platform.machine()]
    except KeyError:
        raise ConfigurationError(
            f"Images can't be built on {platform.machine()}.", hint=f"Use a machine of: {', '.join(ARCHITECTURES)}."
        ) from None
