"""Formats that qemu-img makes."""

import os
import re
import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..configuration.settings import ImageSettings
from ..model import Build
from .kind import Output, as_it_is


def _compression(settings: ImageSettings) -> list[str]:
    return [] if settings.compression == "none" else ["-c", "-o", f"compression_type={settings.compression}"]


def _options(text: str, settings: ImageSettings) -> list[str]:
    return ["-o", text] if text else []


# Several clusters are compressed at once, and written as they are ready.
_UNORDERED = "-W"
_SIDE_BY_SIDE = ("-m", "16", _UNORDERED)

# The footer of a VHD, its type for dynamic ones, and when its time begins: with the year 2000.
_FOOTER = 512
_DYNAMIC = 3
_VHD_BEGINS = 946684800


def convert_argv(
    driver: str, options: Callable[[ImageSettings], Sequence[str]], ways: Sequence[str], build: Build, path: Path
) -> list[str]:
    """Return the command that writes the disk of *build* to *path* in the format *driver*."""
    return [
        "qemu-img", "convert",
        "-f", "raw",
        "-O", driver,
        "-p",
        *options(build.plan.settings),
        *ways,
        str(build.disk_path),
        str(path),
    ]  # fmt: skip


def _row(
    name: str,
    driver: str,
    options: str | Callable[[ImageSettings], Sequence[str]] = "",
    ways: Sequence[str] = (),
    settle: Callable[[Path, int], None] = as_it_is,
) -> Output:
    find = partial(_options, options) if isinstance(options, str) else options

    def commands(build: Build, path: Path) -> list[list[str]]:
        # As they are ready is not the same each time.
        same = [way for way in ways if build.plan.source_date is None or way != _UNORDERED]
        return [convert_argv(driver, find, same, build, path)]

    return Output(f"Converting to {name}", name, commands, settle=settle, programs=("qemu-img",), driver=driver)


# What QEMU makes up anew each time, and who repeats a build does not want.


def _settle_vmdk(path: Path, date: int) -> None:
    """Give the VMDK at *path* the number *date* as the one that changes with its contents."""
    with path.open("r+b") as file:
        start, length = struct.unpack_from("<QQ", file.read(512), 28)
        file.seek(start * 512)
        text = file.read(length * 512)
        # QEMU writes the number without zeros before it, so that what follows moves, the last line's end out of sight.
        text = re.sub(rb"^CID=[0-9a-f]+$", b"CID=%08x" % date, text.rstrip(b"\0\n"), count=1, flags=re.MULTILINE)
        file.seek(start * 512)
        file.write((text + b"\n").ljust(length * 512, b"\0"))


def _settle_vhd(path: Path, date: int) -> None:
    """Have the VHD at *path* be made at *date*, with an ID that follows from that and its size."""
    with path.open("r+b") as file:
        file.seek(-_FOOTER, os.SEEK_END)
        footer = bytearray(file.read())
        struct.pack_into(">I", footer, 24, max(0, date - _VHD_BEGINS))
        footer[64:84] = bytes(4) + uuid.uuid5(uuid.NAMESPACE_OID, f"{date} {footer[48:56].hex()}").bytes
        struct.pack_into(">I", footer, 64, ~sum(footer) & 0xFFFFFFFF)
        # That of a dynamic one is at its beginning, too.
        dynamic = struct.unpack_from(">I", footer, 60)[0] == _DYNAMIC
        for place, whence in ((-_FOOTER, os.SEEK_END), *([(0, os.SEEK_SET)] if dynamic else [])):
            file.seek(place, whence)
            file.write(footer)


# VHD counts sectors in 32 bits, and QEMU has its limit at 2040 GiB, as Hyper-V has.  Without ``force_size`` the disk
# would be one of whole cylinders, which is larger.  Azure takes whole MiB only.
_vhd = partial(replace, suffix="vhd", largest=2040 << 30, unit=1 << 20)

OUTPUTS = {
    "qcow2": replace(_row("qcow2", "qcow2", _compression, _SIDE_BY_SIDE), compresses=True),
    # Importers read it as a stream, so its clusters are in the order of the disk.  No disk at IDE and hardware of
    # version 6: what vSphere takes.
    "vmdk": _row("vmdk", "vmdk", "subformat=streamOptimized,adapter_type=lsilogic,compat6", settle=_settle_vmdk),
    "vhd": _vhd(_row("vhd", "vpc", "subformat=fixed,force_size", settle=_settle_vhd)),
    "vhd-dynamic": _vhd(_row("vhd-dynamic", "vpc", "subformat=dynamic,force_size", settle=_settle_vhd)),
    "vhdx": replace(_row("vhdx", "vhdx", "subformat=dynamic"), largest=64 << 40),
    "vdi": _row("vdi", "vdi"),
}
