"""The UEFI firmware that is installed on this machine for QEMU."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

# libvirt finds the descriptions of QEMU's firmware there (firmware.json of QEMU's interop documents).
_DIRECTORIES = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))


@dataclass(frozen=True)
class Firmware:
    """UEFI for QEMU: its *code*, a *memory* to copy, and their *format*; None where it is not in flash.

    The memory is empty, or has *enrolled* keys.  With *smm* it needs a machine with System Management Mode.
    """

    code: str | None
    memory: str | None
    format: str
    secure_boot: bool
    enrolled: bool
    smm: bool


def uefi_firmware(architecture: str) -> list[Firmware]:
    """Return what UEFI there is for *architecture*, in the order in which libvirt takes it."""
    found = []
    paths = {path.name: path for directory in reversed(_DIRECTORIES) for path in directory.glob("*.json")}
    for _, path in sorted(paths.items()):
        # libvirt skips a file that is no such description, too.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            told = json.loads(path.read_bytes())
            if "uefi" in told["interface-types"] and any(
                target["architecture"] == architecture for target in told["targets"]
            ):
                code, memory = (told.get("mapping", {}).get(key, {}) for key in ("executable", "nvram-template"))
                parts = (code.get("filename"), memory.get("filename"), code.get("format", "raw"))
                features = ("secure-boot", "enrolled-keys", "requires-smm")
                found.append(Firmware(*parts, *(name in told.get("features", []) for name in features)))
    return found
