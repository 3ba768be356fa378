"""Layouts: the partitions of a disk that is made from a tree, and what they hold."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from ..base.errors import ConfigurationError
from ..base.units import format_size

SECTOR = 512
MIB = 1 << 20

# Types of GPT: the BIOS boot partition of GRUB, and those of UEFI's and systemd's specifications.
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
ROOTS = {
    "x86_64": "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
    "aarch64": "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",
    "i386": "44479540-F297-41B2-9AF7-D131D5F0458A",
    "armhf": "69DAD710-2CE4-4E3C-B16C-21A1D49ABED3",
    "ppc64el": "C31C45E6-3F39-412E-80FB-4809C4980599",
    "riscv64": "72EC70A6-CF74-40E6-BD49-4BDA08E8F224",
    "s390x": "5EEAD9A9-FE09-4A1E-A1D7-520D00531306",
}
# Of MBR.
EXTENDED = "5"
ESP_OF_MBR = "ef"

EXT = ("ext2", "ext3", "ext4")
# Those that are made in libguestfs' appliance.
APPLIANCE = ("xfs", "btrfs")
SWAP = "swap"
# Bytes of a label at most.
LABELS = {**dict.fromkeys(EXT, 16), "xfs": 12, "btrfs": 255, "vfat": 11, SWAP: 15}
# Firmware looks for boot loaders on what is mounted there.
ESP_POINT = "/boot/efi"

# The second table of GPT fills 33 sectors; a whole mebibyte keeps the end aligned.
_LAST = MIB

_UNKNOWN_SIZE = 1 << 60

_BIOS_BOOT_SIZE = MIB
# For shim, GRUB and what fwupd puts there; FAT32 of this size is read by all firmware.
_ESP_SIZE = 64 * MIB

# Volumes of LVM are of whole extents.  Before the first one of a partition is what it says of itself and its group.
EXTENT = 4 * MIB
LVM_HEAD = MIB
LVM = "lvm"


@dataclass(frozen=True)
class Filesystem:
    """What a partition holds: *kind* is the word of mkfs, or ``swap``; of a *point* None it is not mounted.

    *name* tells it from the others of its disk.  A *uuid* that is empty is the disk's identity's.  *options* are
    words for mkfs; the last three are the last fields of fstab.
    """

    name: str
    kind: str
    point: str | None = None
    label: str = ""
    uuid: str = ""
    options: tuple[str, ...] = ()
    mount_options: str = "defaults"
    dump: int = 0
    order: int = 2


@dataclass(frozen=True)
class Wanted:
    """A partition, or volume of LVM, that is asked for; *size* in bytes, or as a share of what those before have left.

    *kind* is its type in the table, *where* the place in the user's file that errors name.  The share of a volume may
    be one *of_all* of its group.
    """

    name: str
    kind: str
    size: int | Fraction = Fraction(1)
    filesystem: Filesystem | None = None
    bootable: bool = False
    logical: bool = False
    where: str = ""
    of_all: bool = False


@dataclass(frozen=True)
class Group:
    """A group of LVM on the partitions *on*, with what each has there: its name, and that of the physical volume."""

    name: str
    on: tuple[tuple[str, str], ...]
    volumes: tuple[Wanted, ...]
    where: str = ""


@dataclass(frozen=True)
class Piece:
    """A partition: *number* is that of the table, 0 of a disk without one; *offset* and *size* are in bytes.

    With a *group* it is a volume of LVM, which has neither: what is on it is made in a file of its own.
    """

    name: str
    number: int
    kind: str
    offset: int
    size: int
    filesystem: Filesystem | None = None
    bootable: bool = False
    group: str = ""

    @property
    def device(self) -> str:
        """The node of a volume, as the kernel's device-mapper calls it."""
        return "/dev/mapper/" + "-".join(name.replace("-", "--") for name in (self.group, self.name))


@dataclass(frozen=True)
class Scheme:
    """Partitions as they are asked for, whatever the size of the disk; *table* is ``gpt``, ``dos`` or empty.

    Without a table one filesystem is all of the disk.
    """

    table: str
    wanted: tuple[Wanted, ...]
    align: int = MIB
    groups: tuple[Group, ...] = ()

    def pieces(self, size: int) -> tuple[Piece, ...]:
        """Return the partitions of a disk of *size* bytes; ConfigurationError names one that does not fit."""
        if not self.table:
            [whole] = self.wanted
            return (Piece(whole.name, 0, "", 0, size // MIB * MIB, whole.filesystem),)
        return tuple(self._pieces(size // MIB * MIB - (_LAST if self.table == "gpt" else 0)))

    def _pieces(self, end: int) -> Iterator[Piece]:
        offset, number = self.align, 1
        for wanted in self.wanted:
            if wanted.logical:
                if number < 5:
                    yield Piece("extended", number, EXTENDED, offset, end - offset)
                    number = 5
                # Each has a table of its own before it.
                offset += self.align
            left = max(end - offset, 0)
            asked = wanted.size if isinstance(wanted.size, int) else int(left * wanted.size)
            length = asked // self.align * self.align if asked <= left else asked
            if not 0 < length <= left:
                size = f" of {format_size(wanted.size)}" if isinstance(wanted.size, int) else ""
                raise ConfigurationError(
                    f"{wanted.where or 'The layout'}: {wanted.name}{size} does not fit: {format_size(left)} of the "
                    "disk are left.",
                    hint="Set a larger image-size.",
                )
            yield Piece(wanted.name, number, wanted.kind, offset, length, wanted.filesystem, wanted.bootable)
            offset += length
            number += 1

    def volumes(self, size: int) -> Iterator[Piece]:
        """Give the volumes of LVM on a disk of *size* bytes; ConfigurationError names one that does not fit."""
        sizes = {piece.name: piece.size for piece in self.pieces(size)}
        for group in self.groups:
            extents = {name: (sizes[name] - LVM_HEAD) // EXTENT for name, _ in group.on}
            if tiny := [name for name in extents if not extents[name]]:
                raise ConfigurationError(
                    f"{group.where}: {tiny[0]} of {format_size(sizes[tiny[0]])} is too small for LVM.",
                    hint=f"Have it be of at least {(LVM_HEAD + EXTENT) // MIB}MiB.",
                )
            left = whole = sum(extents.values()) * EXTENT
            for wanted in group.volumes:
                share = whole if wanted.of_all else left
                asked = wanted.size if isinstance(wanted.size, int) else int(share * wanted.size)
                length = asked // EXTENT * EXTENT
                if not 0 < length <= left:
                    raise ConfigurationError(
                        f"{wanted.where}: {wanted.name} of {format_size(asked)} does not fit: "
                        f"{format_size(left)} of the group {group.name} are left.",
                        hint="Set a larger image-size, or have the partitions of the group be larger.",
                    )
                yield Piece(wanted.name, 0, "", 0, length, wanted.filesystem, group=group.name)
                left -= length

    @property
    def filesystems(self) -> Iterator[Filesystem]:
        """What the partitions hold, in their order, and then what the volumes of LVM do."""
        volumes = [wanted for group in self.groups for wanted in group.volumes]
        return (wanted.filesystem for wanted in (*self.wanted, *volumes) if wanted.filesystem)

    @property
    def shares(self) -> list[Filesystem]:
        """What those partitions and volumes hold that are larger on a larger disk."""
        whole = self.wanted if self.table else ()
        growing = {wanted.name for wanted in whole if not isinstance(wanted.size, int)}
        fixed = {wanted.filesystem for wanted in whole if isinstance(wanted.size, int)}
        for group in self.groups:
            grows = any(name in growing for name, _ in group.on)
            fixed |= {each.filesystem for each in group.volumes if isinstance(each.size, int) or not grows}
        return [filesystem for filesystem in self.filesystems if filesystem not in fixed]

    def size_around(self, least: Mapping[str, int]) -> int:
        """Return the bytes of the smallest disk on which those of ``shares`` have *least* bytes, by their names."""
        low, high = 0, _UNKNOWN_SIZE // MIB
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._has(middle * MIB, least) else (middle, high)
        return high * MIB

    def _has(self, size: int, least: Mapping[str, int]) -> bool:
        try:
            pieces = [*self.pieces(size), *self.volumes(size)]
        except ConfigurationError:
            return False
        found = {piece.filesystem.name: piece.size for piece in pieces if piece.filesystem}
        return all(found[name] >= wanted for name, wanted in least.items())


@dataclass(frozen=True)
class Identity:
    """What tells the filesystems and partitions of a disk from those of others: all comes from *seed*."""

    seed: uuid.UUID | None = None

    def uuid(self, name: str) -> str:
        """Return the UUID of what is called *name*; as a dry run shows it if there is no seed."""
        return str(uuid.uuid5(self.seed, name)) if self.seed else f"{name.upper()}-UUID"

    def lvm(self, name: str) -> str:
        """Return the UUID of the physical volume *name*, in the form that LVM has."""
        text = self.uuid(f"{name}-pv")
        ends = (0, 6, 10, 14, 18, 22, 26, 32)
        digits = text.replace("-", "")
        return "-".join(digits[start:end] for start, end in pairwise(ends)) if self.seed else text

    def serial(self, name: str) -> str:
        """Return the eight hexadecimal digits that tell the FAT filesystem *name*, or a table of MBR."""
        return uuid.uuid5(self.seed, name).hex[:8] if self.seed else "XXXXXXXX"


# Of UUIDs that are derived from what was asked for.
_NAMESPACE = uuid.UUID("9c1d1f63-5d9b-4c7e-8a55-0c1b7f3f2f0a")

# As a dry run shows it.
UNKNOWN = Identity()


def random_identity() -> Identity:
    """Return an identity that no other disk has."""
    return Identity(uuid.uuid4())


def derived_identity(text: str) -> Identity:
    """Return the identity of the disk that *text* says everything of: always the same one."""
    return Identity(uuid.uuid5(_NAMESPACE, text))


@dataclass(frozen=True)
class Layout:
    """A disk of *size* bytes with the partitions of *scheme*, and what tells it from others.

    It boots with *firmware*, None if nothing boots it.  With a *date*, in seconds since 1970, it is the same each time.
    With *extra* it is as small as its tree lets it, with so many bytes free: of *size* 0 it does not have its size yet.
    """

    scheme: Scheme
    firmware: str | None
    arch: str
    size: int
    identity: Identity = field(default=UNKNOWN)
    date: int | None = None
    extra: int | None = None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The partitions in their order."""
        return self.scheme.pieces(self.size or _UNKNOWN_SIZE)

    @property
    def volumes(self) -> tuple[Piece, ...]:
        """The volumes of LVM in their order."""
        return tuple(self.scheme.volumes(self.size or _UNKNOWN_SIZE))

    @property
    def places(self) -> tuple[Piece, ...]:
        """What a filesystem may be on: the partitions, then the volumes."""
        return (*self.pieces, *self.volumes)

    @property
    def mounted(self) -> list[tuple[Piece, Filesystem]]:
        """The partitions and volumes that are mounted, with what they hold, the deepest places first."""
        found = [(piece, piece.filesystem) for piece in self.places if piece.filesystem and piece.filesystem.point]
        return sorted(found, key=lambda each: _depth(each[1].point or ""), reverse=True)

    def at(self, path: str) -> tuple[Piece, Filesystem]:
        """Return the partition or volume that *path* of the system lies on."""
        return next(
            (piece, filesystem)
            for piece, filesystem in self.mounted
            if f"{path}/".startswith(f"{(filesystem.point or '').rstrip('/')}/")
        )

    @property
    def root(self) -> Piece:
        """The partition or volume of the root filesystem."""
        return self.at("/")[0]

    @property
    def esp(self) -> Piece | None:
        """The EFI system partition that gets the boot loader, None if the disk boots without."""
        if self.firmware not in ("uefi", "hybrid"):
            return None
        return next(piece for piece, filesystem in self.mounted if filesystem.point == ESP_POINT)

    @property
    def core(self) -> tuple[int, int] | None:
        """Offset and bytes of the place for GRUB's core image, None if the disk boots without it."""
        if self.firmware not in ("bios", "hybrid"):
            return None
        if self.scheme.table == "dos":
            return SECTOR, self.scheme.align - SECTOR
        return next((piece.offset, piece.size) for piece in self.pieces if piece.kind == BIOS_BOOT)

    def uuid_of(self, filesystem: Filesystem) -> str:
        """Return the UUID of *filesystem* as fstab and blkid have it."""
        if filesystem.kind == "vfat":
            serial = filesystem.uuid.replace("-", "") or self.identity.serial(filesystem.name)
            return f"{serial[:4]}-{serial[4:]}".upper()
        return filesystem.uuid or self.identity.uuid(filesystem.name)

    def partition_uuid(self, piece: Piece) -> str:
        """Return the UUID of *piece* as the kernel has it; a volume of LVM has none."""
        if piece.group:
            return ""
        if self.scheme.table == "dos":
            return f"{self.identity.serial('table')}-{piece.number:02x}"
        return self.identity.uuid(f"{piece.name}-partition")


def _depth(point: str) -> tuple[int, str]:
    return len(Path(point).parts), point


def root_of(kind: str, label: str, options: Sequence[str], name: str = "root") -> Filesystem:
    """Return the root filesystem of *kind*."""
    return Filesystem(
        name, kind, "/", label, options=tuple(options), mount_options=root_options(kind), order=order_of(kind, "/")
    )


def order_of(kind: str, point: str | None) -> int:
    """Return when fsck has its turn at a filesystem of *kind*, which may be mounted at *point*: 0 for never."""
    return 0 if kind in APPLIANCE else 1 if point == "/" else 2


def root_options(kind: str) -> str:
    """Return the mount options of a root of *kind*."""
    return "errors=remount-ro" if kind in EXT else "defaults"


def scheme(name: str, arch: str, root: Filesystem) -> Scheme:
    """Return the built-in layout *name* with *root*, which is last, and can grow."""
    if name == "filesystem":
        return Scheme("", (Wanted("root", "", filesystem=root),))
    # A system that has started needs its ESP for nothing but updates of the boot loader.  On a machine where it comes
    # late, systemd would end in its emergency mode for want of it.
    esp = Filesystem("esp", "vfat", ESP_POINT, mount_options="umask=0077,nofail", order=1)
    wanted = []
    if name in ("bios", "hybrid"):
        wanted.append(Wanted("bios", BIOS_BOOT, _BIOS_BOOT_SIZE))
    if name in ("uefi", "hybrid"):
        wanted.append(Wanted("esp", ESP, _ESP_SIZE, esp))
    return Scheme("gpt", (*wanted, Wanted("root", ROOTS[arch], filesystem=root)))


def check_firmware(scheme: Scheme, firmware: str, where: str) -> None:
    """Raise ConfigurationError unless a disk with *scheme*, which *where* says, has what *firmware* boots from."""
    kinds = [wanted.kind for wanted in scheme.wanted]
    if firmware in ("bios", "hybrid") and scheme.table == "gpt" and BIOS_BOOT not in kinds:
        raise ConfigurationError(
            f"{where} has no place for the boot loader that firmware = {firmware} starts.",
            hint="Add a BIOS boot partition (type EF02) of 1 MiB, or set firmware = uefi.",
        )
    held = [wanted.filesystem for wanted in scheme.wanted]
    points = [filesystem.point for filesystem in held if filesystem and filesystem.kind == "vfat"]
    if firmware in ("uefi", "hybrid") and (ESP_POINT not in points or not {ESP, ESP_OF_MBR} & {*kinds}):
        raise ConfigurationError(
            f"{where} has no place for the boot loader that firmware = {firmware} starts.",
            hint=f"Add an EFI system partition (type EF00) with vfat, mounted at {ESP_POINT}, or set firmware = bios.",
        )


def table(layout: Layout) -> str:
    """Return the table of *layout* as sfdisk reads it."""
    return "".join(f"{line}\n" for line in _table(layout))


def _table(layout: Layout) -> Iterator[str]:
    gpt = layout.scheme.table == "gpt"
    yield f"label: {layout.scheme.table}"
    yield f"label-id: {layout.identity.uuid('table') if gpt else '0x' + layout.identity.serial('table')}"
    for piece in layout.pieces:
        words = [f"start={piece.offset // SECTOR}", f"size={piece.size // SECTOR}", f"type={piece.kind}"]
        words += [f"uuid={layout.partition_uuid(piece)}", f'name="{piece.name}"'] if gpt else []
        words += ["bootable"] if piece.bootable else []
        yield ", ".join(words)


def table_argv(disk: Path) -> list[str]:
    """Return the command that writes the table that its stdin has to *disk*."""
    # A kernel that is told of a table is waited for, and none has this one.
    return ["sfdisk", "--quiet", "--no-tell-kernel", str(disk)]
