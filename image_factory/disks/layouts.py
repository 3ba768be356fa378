"""Layouts: the partitions of a disk that is made from a tree."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

SECTOR = 512
MIB = 1 << 20

# Types of GPT: the BIOS boot partition of GRUB, and those of UEFI's and systemd's specifications.
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
ROOTS = {
    "x86_64": "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
    "aarch64": "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",
}

_FIRST = MIB
# The second table of GPT fills 33 sectors; a whole mebibyte keeps the end aligned.
_LAST = MIB

_BIOS_BOOT_SIZE = MIB
# For shim, GRUB and what fwupd puts there; FAT32 of this size is read by all firmware.
_ESP_SIZE = 64 * MIB


@dataclass(frozen=True)
class Piece:
    """A partition: *role* is ``bios``, ``esp`` or ``root``; *offset* and *size* are in bytes."""

    role: str
    number: int
    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class Identity:
    """What tells the filesystems and partitions of a disk from those of others: UUIDs, and *esp*, eight digits."""

    table: str
    root: str
    root_partition: str
    esp: str
    esp_partition: str
    bios_partition: str
    hash_seed: str

    def partition_of(self, role: str) -> str:
        """Return the UUID of the partition of *role*."""
        return {"root": self.root_partition, "esp": self.esp_partition, "bios": self.bios_partition}[role]

    @property
    def esp_name(self) -> str:
        """The name of the ESP's filesystem, as fstab and GRUB have it."""
        return f"{self.esp[:4]}-{self.esp[4:]}".upper()


# Of UUIDs that are derived from what was asked for.
_NAMESPACE = uuid.UUID("9c1d1f63-5d9b-4c7e-8a55-0c1b7f3f2f0a")

# As a dry run shows it.
UNKNOWN = Identity("TABLE-UUID", "ROOT-UUID", "ROOT-PARTUUID", "XXXXXXXX", "ESP-PARTUUID", "BIOS-PARTUUID", "HASH-SEED")


def random_identity() -> Identity:
    """Return an identity that no other disk has."""
    return _identity(uuid.uuid4())


def derived_identity(text: str) -> Identity:
    """Return the identity of the disk that *text* says everything of: always the same one."""
    return _identity(uuid.uuid5(_NAMESPACE, text))


def _identity(base: uuid.UUID) -> Identity:
    names = (each.name for each in fields(Identity))
    found = {name: str(uuid.uuid5(base, name)) for name in names}
    return Identity(**found | {"esp": found["esp"][:8]})


def pieces(firmware: str, arch: str, size: int) -> list[Piece]:
    """Return the partitions of a disk of *size* bytes that boots with *firmware*; the root is last, and can grow."""
    wanted = []
    if firmware in ("bios", "hybrid"):
        wanted.append(("bios", BIOS_BOOT, _BIOS_BOOT_SIZE))
    if firmware in ("uefi", "hybrid"):
        wanted.append(("esp", ESP, _ESP_SIZE))
    found = []
    offset = _FIRST
    for number, (role, kind, length) in enumerate(wanted, 1):
        found.append(Piece(role, number, kind, offset, length))
        offset += length
    rest = (size - _LAST - offset) // MIB * MIB
    return [*found, Piece("root", len(found) + 1, ROOTS[arch], offset, rest)]


def table(layout: list[Piece], identity: Identity) -> str:
    """Return the table of *layout* as sfdisk reads it."""

    def lines() -> Iterator[str]:
        yield "label: gpt"
        yield f"label-id: {identity.table}"
        for piece in layout:
            yield (
                f"start={piece.offset // SECTOR}, size={piece.size // SECTOR}, type={piece.kind}, "
                f"uuid={identity.partition_of(piece.role)}"
            )

    return "\n".join([*lines(), ""])


def table_argv(disk: Path) -> list[str]:
    """Return the command that writes the table that its stdin has to *disk*."""
    return ["sfdisk", "--quiet", str(disk)]
