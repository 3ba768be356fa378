"""Formats of disk images, known by their signatures, and what makes one unfit as a source.

Nothing here opens an image by QEMU: some formats name other files, which QEMU would read into the image, and any
file of this machine could be one of them.
"""

import array
import os
import re
import struct
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...base import command
from ...base.errors import BuildError, CrashError
from ...base.units import format_size

_SECTOR = 512
_SECONDS = 60.0

# qcow2 (QEMU's docs/interop/qcow2.txt): what a reader has to understand.
_QCOW2_DIRTY, _QCOW2_CORRUPT, _QCOW2_DATA_FILE, _QCOW2_COMPRESSION, _QCOW2_EXTENDED_L2 = (1 << bit for bit in range(5))
_QCOW2_COMPRESSED = 1 << 62
_QCOW2_OFFSET = 0x00FF_FFFF_FFFF_FE00
_QCOW2_LARGEST_CLUSTER = 2 << 20
_QCOW2_MOST_TABLES = 4 << 20
_QCOW2_KNOWN = _QCOW2_DIRTY | _QCOW2_CORRUPT | _QCOW2_DATA_FILE | _QCOW2_COMPRESSION | _QCOW2_EXTENDED_L2

# VMDK: kinds whose only extent is the file itself, and the longest descriptor that is read.
_VMDK_WHOLE = ("monolithicSparse", "streamOptimized")
_VMDK_DESCRIPTOR = 64 << 10
_VMDK_MOST = 1 << 20
_VMDK_NO_PARENT = "ffffffff"

_VHD_FOOTER = 512
_VHD_FIXED, _VHD_DYNAMIC, _VHD_DIFFERENCING = 2, 3, 4

# VHDX ([MS-VHDX]): where the first region table is, and what its metadata region has.
_VHDX_REGIONS = 192 << 10
_VHDX_TABLE = 64 << 10
_VHDX_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_VHDX_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_VHDX_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_VHDX_HAS_PARENT = 2

_VDI_DYNAMIC, _VDI_FIXED = 1, 2

_CD = 0x8001
_CD_MAGIC = b"CD001"
_ENDS_OF_A_TABLE = b"\x55\xaa"
# Filesystems that a disk may be without a partition table: ext, xfs and btrfs.
_FILESYSTEMS = ((b"\x53\xef", 1080), (b"XFSB", 0), (b"_BHRfS_M", 0x1_0040))

_CUT_OFF = "It is cut off. Get it once more."
_OTHER_FILE = "It would have other files of this machine read into the image. Make it whole: qemu-img convert -O qcow2"


class UnfitError(BuildError):
    """A file is no image that can be a source."""


@dataclass(frozen=True)
class Format:
    """How an image is stored: *driver* is QEMU's name for it, *size* the bytes of the disk that it is of."""

    driver: str
    size: int


class _Image:
    """An image that is looked into."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor

    def at(self, offset: int, length: int) -> bytes:
        """Return *length* bytes at *offset*; UnfitError if the file ends before."""
        data = os.pread(self._descriptor, length, offset) if 0 <= offset < self.size else b""
        if len(data) < length:
            raise UnfitError(f"{self.name} ends within its own header.", hint=_CUT_OFF)
        return data

    def numbers(self, form: str, offset: int) -> tuple[int, ...]:
        """Return what struct's *form* finds at *offset*."""
        return struct.unpack(form, self.at(offset, struct.calcsize(form)))

    def table(self, form: str, offset: int, count: int) -> Sequence[int]:
        """Return *count* numbers of struct's *form* at *offset*."""
        found = array.array(form[1], self.at(offset, struct.calcsize(form) * count))
        if (form[0] == "<") != (sys.byteorder == "little"):
            found.byteswap()
        return found

    def has(self, magic: bytes, offset: int = 0) -> bool:
        """Return whether *magic* is at *offset*."""
        return offset >= 0 and os.pread(self._descriptor, len(magic), offset) == magic

    def unfit(self, what: str, hint: str | None = None) -> UnfitError:
        """Return the error that the image *what*."""
        return UnfitError(f"{self.name} {what}.", hint=hint)


def _qcow2(image: _Image) -> Format:
    (version,) = image.numbers(">I", 4)
    if version not in (2, 3):
        raise image.unfit(f"is qcow of version {version}", "Convert it: qemu-img convert -O qcow2")
    backing, _, _, size, encryption = image.numbers(">QIIQI", 8)
    features = image.numbers(">Q", 72)[0] if version == 3 else 0
    if backing:
        raise image.unfit("has a backing file", _OTHER_FILE)
    if features & _QCOW2_DATA_FILE:
        raise image.unfit("has an external data file", _OTHER_FILE)
    if encryption:
        raise image.unfit("is encrypted", "Decrypt it: qemu-img convert")
    if features & _QCOW2_CORRUPT:
        raise image.unfit("is marked as corrupt", "qemu-img check tells more")
    if features & ~_QCOW2_KNOWN:
        raise image.unfit(f"has features of qcow2 that are not known ({features & ~_QCOW2_KNOWN:#x})")
    _check_clusters(image, size, features)
    return Format("qcow2", size)


def _check_clusters(image: _Image, size: int, features: int) -> None:
    """Raise UnfitError if the file ends before its clusters, or their tables: QEMU takes what is missing for zeros."""
    cluster = 1 << image.numbers(">I", 20)[0]
    count, offset = image.numbers(">IQ", 36)
    if not 512 <= cluster <= _QCOW2_LARGEST_CLUSTER or count > _QCOW2_MOST_TABLES:
        raise image.unfit("has a header of qcow2 that no program writes")
    extended = bool(features & _QCOW2_EXTENDED_L2)
    # The cluster that is last in the file, where in the disk it is, and how much of it is there.
    last = (0, 0, 0)
    for number, entry in enumerate(image.table(">Q", offset, count)):
        at = entry & _QCOW2_OFFSET
        if not at:
            continue
        entries = image.table(">Q", at, cluster // 8)
        bitmaps = entries[1::2] if extended else []
        entries = entries[::2] if extended else entries
        for place, found in enumerate(entries):
            if found & _QCOW2_COMPRESSED:
                # QEMU finds out itself.
                continue
            used = (bitmaps[place] & 0xFFFF_FFFF).bit_length() * cluster // 32 if extended else cluster
            last = max(last, (found & _QCOW2_OFFSET, (number * len(entries) + place) * cluster, used))
    begin, position, used = last
    if begin and begin + min(used, size - position) > image.size:
        raise image.unfit("ends within its last cluster", _CUT_OFF)


def _vmdk(image: _Image) -> Format:
    capacity, _, offset, length = image.numbers("<QQQQ", 12)
    if not capacity or not offset:
        raise image.unfit("is a VMDK that only describes other files", _OTHER_FILE)
    descriptor = image.at(offset * _SECTOR, min(length * _SECTOR, _VMDK_DESCRIPTOR)).split(b"\0")[0]
    values = dict(re.findall(r'^\s*(\w+)\s*=\s*"?(.*?)"?\s*$', descriptor.decode("utf-8", "replace"), re.MULTILINE))
    if values.get("parentCID", _VMDK_NO_PARENT).lower() != _VMDK_NO_PARENT or "parentFileNameHint" in values:
        raise image.unfit("is a VMDK with a parent", _OTHER_FILE)
    if values.get("createType") not in _VMDK_WHOLE:
        raise image.unfit(f"is a VMDK of the kind {values.get('createType')!r}, with extents elsewhere", _OTHER_FILE)
    if values["createType"] == "monolithicSparse":
        _check_grains(image, capacity)
    return Format("vmdk", capacity * _SECTOR)


def _check_grains(image: _Image, capacity: int) -> None:
    """Raise UnfitError if the file ends before its grains: QEMU takes what is missing for zeros."""
    (grain,) = image.numbers("<Q", 20)
    (per_table,) = image.numbers("<I", 44)
    (directory,) = image.numbers("<Q", 56)
    if not grain or not per_table or max(grain, per_table, capacity // (grain * per_table)) > _VMDK_MOST:
        raise image.unfit("has a header of VMDK that no program writes")
    tables = image.table("<I", directory * _SECTOR, -(-capacity // (grain * per_table)))
    last = (0, 0)
    for number, table in enumerate(tables):
        for place, at in enumerate(image.table("<I", table * _SECTOR, per_table) if table else ()):
            last = max(last, (at, (number * per_table + place) * grain))
    begin, position = last
    # Grain 1 is one of zeros.
    if begin > 1 and (begin + min(grain, capacity - position)) * _SECTOR > image.size:
        raise image.unfit("ends within its last grain", _CUT_OFF)


def _vmdk_text(image: _Image) -> Format:
    raise image.unfit("is the descriptor of a VMDK whose extents are other files", _OTHER_FILE)


def _vhd(image: _Image) -> Format:
    footer = image.size - _VHD_FOOTER
    if not image.has(b"conectix", footer):
        raise image.unfit("is a VHD without its end", _CUT_OFF)
    (size,) = image.numbers(">Q", footer + 48)
    (kind,) = image.numbers(">I", footer + 60)
    if kind == _VHD_DIFFERENCING:
        raise image.unfit("is a VHD with a parent", _OTHER_FILE)
    if kind not in (_VHD_FIXED, _VHD_DYNAMIC):
        raise image.unfit(f"is a VHD of the unknown kind {kind}")
    return Format("vpc", size)


def _vhdx(image: _Image) -> Format:
    regions = _vhdx_entries(image, _VHDX_REGIONS, b"regi", 8, 16)
    if _VHDX_METADATA not in regions:
        raise image.unfit("is a VHDX without metadata")
    (metadata,) = struct.unpack_from("<Q", regions[_VHDX_METADATA], 16)
    entries = _vhdx_entries(image, metadata, b"metadata", 10, 32)
    if _VHDX_PARAMETERS not in entries or _VHDX_SIZE not in entries:
        raise image.unfit("is a VHDX without a size")
    parameters, size = (
        metadata + struct.unpack_from("<I", entries[key], 16)[0] for key in (_VHDX_PARAMETERS, _VHDX_SIZE)
    )
    if image.numbers("<II", parameters)[1] & _VHDX_HAS_PARENT:
        raise image.unfit("is a VHDX with a parent", _OTHER_FILE)
    return Format("vhdx", image.numbers("<Q", size)[0])


def _vhdx_entries(image: _Image, offset: int, magic: bytes, counted_at: int, begins_at: int) -> dict[uuid.UUID, bytes]:
    """Return the entries of 32 bytes of a table at *offset*, by the GUID that each begins with."""
    table = image.at(offset, _VHDX_TABLE)
    if not table.startswith(magic):
        raise image.unfit("is a VHDX whose tables can't be read")
    (count,) = struct.unpack_from("<H", table, counted_at)
    entries = [table[at : at + 32] for at in range(begins_at, min(begins_at + 32 * count, _VHDX_TABLE - 31), 32)]
    return {uuid.UUID(bytes_le=entry[:16]): entry for entry in entries}


def _vdi(image: _Image) -> Format:
    (kind,) = image.numbers("<I", 76)
    if kind not in (_VDI_DYNAMIC, _VDI_FIXED):
        raise image.unfit("is a VDI with a parent", _OTHER_FILE)
    (begin,) = image.numbers("<I", 344)
    block, _, _, allocated = image.numbers("<4I", 376)
    if begin + block * allocated > image.size:
        raise image.unfit("ends before its last block", _CUT_OFF)
    return Format("vdi", image.numbers("<Q", 368)[0])


def _encrypted(image: _Image) -> Format:
    raise image.unfit("is encrypted with LUKS", "Decrypt it first.")


def _unsupported(what: str) -> Callable[[_Image], Format]:
    def refuse(image: _Image) -> Format:
        raise image.unfit(f"is {what}, which is not supported", "Convert it: qemu-img convert -O qcow2")

    return refuse


# (magic, offset, what reads it); none of them can be at the beginning of a raw disk that starts.
_SIGNATURES: tuple[tuple[bytes, int, Callable[[_Image], Format]], ...] = (
    (b"QFI\xfb", 0, _qcow2),
    (b"KDMV", 0, _vmdk),
    (b"# Disk DescriptorFile", 0, _vmdk_text),
    (b"vhdxfile", 0, _vhdx),
    (b"conectix", 0, _vhd),
    (b"\x7f\x10\xda\xbe", 64, _vdi),
    (b"LUKS\xba\xbe", 0, _encrypted),
    (b"COWD", 0, _unsupported("an old VMDK of ESX")),
    (b"QED\0", 0, _unsupported("QED")),
    (b"OOOO\0", 0, _unsupported("cowloop")),
    (b"WithoutFreeSpace", 0, _unsupported("a disk of Parallels")),
    (b"WithouFreSpacExt", 0, _unsupported("a disk of Parallels")),
    (b"Bochs Virtual HD Image", 0, _unsupported("a disk of Bochs")),
)


def format_of(path: Path, name: str = "") -> Format:
    """Return how the image at *path* is stored; UnfitError if it is none, or needs more than this file.

    *name* is what errors call it, its path if nothing is given.
    """
    said = name or str(path)
    try:
        # Tables can be of any size, and be linked into each other.
        return command.call_apart(lambda path: _looked_into(path, said), path, _SECONDS)
    except (CrashError, MemoryError) as error:
        raise UnfitError(f"{said} can't be looked into: its tables take too long, or too much memory.") from error


def _looked_into(path: Path, name: str = "image") -> Format:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UnfitError(f"{name} can't be read: {error.strerror}.") from error
    try:
        found = _format_of(_Image(name, descriptor))
    finally:
        os.close(descriptor)
    if not found.size or found.size % _SECTOR:
        raise UnfitError(f"{name} is of a disk of {format_size(found.size)}, which is no number of whole sectors.")
    return found


def _format_of(image: _Image) -> Format:
    for magic, offset, read in _SIGNATURES:
        if image.has(magic, offset):
            return read(image)
    # A fixed VHD has its name at its end only.
    if image.has(b"conectix", image.size - _VHD_FOOTER):
        return _vhd(image)
    if not image.size:
        raise image.unfit("is empty")
    known = ((_ENDS_OF_A_TABLE, _SECTOR - len(_ENDS_OF_A_TABLE)), *_FILESYSTEMS)
    if not any(image.has(magic, offset) for magic, offset in known):
        if image.has(_CD_MAGIC, _CD):
            raise image.unfit("is an ISO file, no disk", "'installer-image' takes the ISO file of an installer.")
        raise image.unfit("is no disk image: it has no format that is known, no partition table and no filesystem")
    return Format("raw", image.size)
