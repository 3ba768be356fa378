"""What a guest's /etc/fstab says of the filesystems on its disk.  The guest has written it: it can say anything."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..model import Volume

# The types that can be on a disk of the guest's own.
_LOCAL_KINDS = (
    "auto", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "msdos", "nilfs2", "ntfs", "ntfs3",
    "reiserfs", "vfat", "xfs", "zfs",
)  # fmt: skip

# Longer ones are nobody's fstab.
_LINES = 4096
_LONGEST_LINE = 4096
_ENTRIES = 256

# Devices whose medium is not the disk.
_REMOVABLE = re.compile(r"/dev/(?:sr|fd|scd)[0-9]+|/dev/(?:cdrom|dvd|floppy)[0-9]*")
_TAGS = {"UUID": "uuid", "LABEL": "label", "PARTUUID": "part_uuid", "PARTLABEL": "part_label"}
# The disk is the guest's first one, whatever its bus.
_PARTITION = re.compile(r"/dev/(?:[hsv]da|xvda|nvme0n1p|mmcblk0p)([0-9]{1,5})")
_PARTITION_LINK = re.compile(r"/dev/disk/by-(?:id|path|dname)/[^/]+-part(?:/by-partnum/)?([0-9]{1,5})")
_LINK = re.compile(r"/dev/disk/(?:by-path/[^/]+-part/)?by-(uuid|label|partuuid|partlabel)/([^/]+)")
_MAPPER_LINK = "/dev/disk/by-id/dm-name-"


@dataclass(frozen=True)
class Entry:
    """A line, or a unit of systemd that says the same: *spec* is to be mounted at *point*.

    The point is a path below the root, empty for the root itself.
    """

    spec: str
    point: str
    kind: str
    options: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """Return the value of option *name*, the last one; None if there is none."""
        values = [value for key, sign, value in (text.partition("=") for text in self.options) if sign and key == name]
        return values[-1] if values else None

    @property
    def bound(self) -> str | None:
        """The path below the root that is to be seen at the point, too, None if it is no such mount."""
        return _normal(self.spec) if {"bind", "rbind"} & set(self.options) else None

    @property
    def file(self) -> bool:
        """Whether it is a file with a filesystem."""
        is_path = self.spec.startswith("/") and not self.spec.startswith(("/dev/", "//"))
        return is_path and self.bound is None and self.kind in (*_LOCAL_KINDS, "erofs", "squashfs")

    def is_of_this_disk(self) -> bool:
        """Return whether something is amiss if the disk has no such filesystem."""
        named = self.spec.startswith("/dev/") or self.spec.partition("=")[0] in _TAGS
        optional = "noauto" in self.options or bool(_REMOVABLE.fullmatch(self.spec))
        return named and not optional and self.kind in _LOCAL_KINDS


def parse(text: str) -> list[Entry]:
    """Return the entries of *text* that mount something at a place; what is no such line is left out."""
    found = []
    for line in text.split("\n", _LINES)[:_LINES]:
        # As mount(8) does: blanks and tabs alone are between the fields.
        fields = [_unescaped(field) for field in re.split(r"[ \t]+", line[:_LONGEST_LINE].strip(" \t\r"))]
        if len(line) > _LONGEST_LINE or len(fields) < 3 or fields[0].startswith("#"):
            continue
        point = _normal(fields[1])
        options = tuple((fields[3] if len(fields) > 3 else "").split(","))
        if point is not None:
            found.append(Entry(fields[0], point, fields[2], options))
    return found[:_ENTRIES]


def parse_unit(text: str) -> Entry | None:
    """Return what *text*, a mount unit of systemd, mounts; None if it says no such thing."""
    section, values = "", {"Type": "auto", "Options": ""}
    for line in text.replace("\\\n", " ").split("\n", _LINES)[:_LINES]:
        line = line.strip()
        if line.startswith("["):
            section = line
        elif section == "[Mount]" and not line.startswith(("#", ";")):
            key, _, value = line[:_LONGEST_LINE].partition("=")
            values[key.strip()] = re.sub(r"\\x([0-9a-f]{2})", _character, value.strip()).replace("%%", "%")
    point = _normal(values.get("Where", ""))
    if point is None or not values.get("What"):
        return None
    return Entry(values["What"], point, values["Type"], tuple(values["Options"].split(",")))


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-3][0-7]{2})", lambda match: chr(int(match[1], 8)), field)


def _normal(point: str) -> str | None:
    """Return mount point *point* as a path below the root; None if it is none, or leads back."""
    parts = [part for part in point.split("/") if part]
    if not point.startswith("/") or {".", ".."} & set(parts) or "\0" in point:
        return None
    return "/".join(parts)


def find(spec: str, volumes: Sequence[Volume]) -> Volume | None:
    """Return which of *volumes* the first field of an entry names, None if it is none of them."""
    return next(iter(find_all(spec, volumes)), None)


def find_all(spec: str, volumes: Sequence[Volume]) -> list[Volume]:
    """Return those of *volumes* that the first field of an entry names: copies have the same UUID.

    A snapshot is meant only where nothing else is.
    """
    found = _found(spec, volumes)
    return [volume for volume in found if volume.origin is None] or found


def _found(spec: str, volumes: Sequence[Volume]) -> list[Volume]:
    tag, sign, value = spec.partition("=")
    link = _LINK.fullmatch(spec)
    if link:
        # As udev names them.
        tag, sign, value = link[1].upper(), "=", re.sub(r"\\x([0-9a-f]{2})", _character, link[2])
    if sign and tag in _TAGS:
        return _tagged(_TAGS[tag], re.sub(r"""^(["'])(.*)\1$""", r"\2", value), volumes)
    number = _PARTITION.fullmatch(spec) or _PARTITION_LINK.fullmatch(spec)
    if number:
        return [volume for volume in volumes if volume.partition and volume.partition.number == int(number[1])]
    if spec.startswith(_MAPPER_LINK):
        spec = f"/dev/mapper/{spec.removeprefix(_MAPPER_LINK)}"
    return [volume for volume in volumes if spec in _paths(volume)]


def _character(match: re.Match[str]) -> str:
    return chr(int(match[1], 16))


def _tagged(field: str, value: str, volumes: Sequence[Volume]) -> list[Volume]:
    """Return the volumes whose *field* is *value*; UUIDs are the same in capitals."""

    def form(text: str) -> str:
        return text.lower() if field.endswith("uuid") else text

    def has_it(volume: Volume) -> bool:
        own: str | None = getattr(volume, field)
        return bool(own) and form(own or "") == form(value)

    return [volume for volume in volumes if has_it(volume)]


def _paths(volume: Volume) -> tuple[str, ...]:
    """Return the paths of a logical volume: /dev/GROUP/NAME, and what device-mapper makes of it."""
    match = re.fullmatch(r"/dev/([^/]+)/([^/]+)", volume.name)
    if not match:
        return ()
    return volume.name, "/dev/mapper/" + "-".join(part.replace("-", "--") for part in match.groups())
