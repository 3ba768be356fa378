"""The nouns of a build: frozen, and passed from step to step."""

import datetime
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from .configuration.settings import Destination, ImageSettings, Task

# What the names of working directories and virtual machines begin with; an image's name follows.
WORK_PREFIX = ".image-factory-"
VM_PREFIX = "image-factory-"

# What the names of the files that belong to an artifact end with, after its own name: an SBOM of CycloneDX
# is known by that name to other programs.
MANIFEST_SUFFIX = ".manifest.json"
SBOM_SUFFIX = ".cdx.json"
# And of those that belong to a build, after IMAGE-DATE.
SUMS_SUFFIX = ".SHA256SUMS"
SIGNATURE_SUFFIX = ".asc"
PROVENANCE_SUFFIX = ".provenance.json"
RECORD_SUFFIX = ".build.json"

# In the working directory.
DISK_NAME = "disk.raw"
INVENTORY_NAME = "inventory.json"
# What a system that is mounted has read-only, and is writable for a while.
READ_ONLY_NAME = "read-only-subvolumes"

# What an artifact can be made from.
Origin = Literal["disk", "tree", "plan"]


@dataclass(frozen=True)
class Plan:
    """What is to be built; made from text, checked, and not changed any more.

    *output_dir* is absolute.  *destinations* has the upload destinations of each format's file, in
    the order of the formats.  *variables* has the texts of the section's keys, for a template.
    *name* is what ``image-name`` makes of it, *text_name* what ``manifest-text`` does, and *ident* what ``${ident}`` is
    in both.  *tasks* are before cleaning, *late_tasks* after it, in their order.
    *guestfs_allowed* is whether a disk that the chosen way can't reach may be mounted by guestfs.  *source_date* is
    the time, in seconds since 1970, that a build which can be repeated takes for the present.
    """

    image: str
    settings: ImageSettings
    date: datetime.date
    output_dir: Path
    destinations: dict[str, tuple[Destination, ...]]
    # It may have secrets, which are nobody's business who sees a plan in a message.
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    guestfs_allowed: bool = False
    source_date: int | None = None
    tasks: tuple[Task, ...] = ()
    late_tasks: tuple[Task, ...] = ()
    name: str = ""
    text_name: str = ""
    ident: str = ""

    @property
    def base_name(self) -> str:
        """What the names of all files of the build begin with, ``IMAGE-YYYY-MM-DD`` if nothing else is asked for."""
        return self.name or f"{self.image}-{self.date.isoformat()}"

    def file_name(self, suffix: str) -> str:
        """Return the name of the artifact whose format has *suffix*."""
        return f"{self.base_name}.{suffix}"

    @property
    def log_path(self) -> Path | None:
        """Where the log file is to be, None if none is wanted."""
        if not self.settings.log_file:
            return None
        return self.output_dir / (self.settings.log_filename or f"{self.base_name}.log")

    @property
    def console_path(self) -> Path:
        """Where the log of the guest's serial console is to be."""
        return self.output_dir / f"{self.base_name}.console.log"

    @property
    def junit_path(self) -> Path:
        """Where the results of the test boot are to be."""
        return self.output_dir / f"{self.base_name}.junit.xml"

    @property
    def screenshot_path(self) -> Path:
        """Where a picture of the guest's screen is to be when its installation has failed."""
        return self.output_dir / f"{self.base_name}.png"

    @property
    def work_path(self) -> Path:
        """The hidden working directory of builds of this image."""
        return self.output_dir / f"{WORK_PREFIX}{self.image}"

    @property
    def cache_dir(self) -> Path:
        """Where the downloads of this image are kept."""
        return self.settings.cache_dir.absolute() / self.image

    @property
    def as_root(self) -> bool:
        """Whether the build runs as root, so in the system's libvirt and without sudo."""
        return os.geteuid() == 0


@dataclass(frozen=True)
class Build:
    """A build under way: its plan, its own *directory* and the name of its virtual machine.

    *virt_type* is what virtual machines can use here, ``kvm`` or ``qemu``.  *resumed* is whether it goes on from what
    another one has left, and *until_task* what ``--until`` calls the task after which it stops.
    """

    plan: Plan
    directory: Path
    vm_name: str
    virt_type: str = "qemu"
    resumed: bool = False
    until_task: str | None = None

    @property
    def disk_path(self) -> Path:
        """The raw disk that the system is installed on."""
        return self.directory / DISK_NAME

    @property
    def vm_record(self) -> Path:
        """The file with the name of the virtual machine, there as long as there may be one."""
        return self.directory / "vm-name"

    @property
    def console_path(self) -> Path:
        """What the guest printed to its serial console, while the build runs."""
        return self.directory / "console.log"


@dataclass(frozen=True)
class Disk:
    """A raw disk with an installed system, which nobody who mounts it changes where it is *read_only*."""

    path: Path
    read_only: bool = False


@dataclass(frozen=True)
class Partition:
    """An entry of a partition table: *offset* and *size* in bytes."""

    number: int
    offset: int
    size: int


@dataclass(frozen=True)
class Volume:
    """What can hold a filesystem: a partition, or a logical volume, whose *name* is /dev/GROUP/NAME.

    *filesystem* is named as blkid does, None where nothing is known.  *partition* is None for a logical
    volume, which is a snapshot of the one that *origin* names in its group, if that is not None.  *part_type* is
    the type in the partition table: a UUID, or hexadecimal digits.
    """

    name: str
    size: int
    filesystem: str | None = None
    uuid: str | None = None
    label: str | None = None
    part_uuid: str | None = None
    part_label: str | None = None
    partition: Partition | None = None
    part_type: str | None = None
    origin: str | None = None


@dataclass(frozen=True)
class Subvolume:
    """A subvolume of btrfs: *path* is below the top, which itself is number 5 and has the path ``""``.

    *source* is the UUID of what it is a snapshot of, None if it is none.
    """

    number: int
    path: str
    uuid: str
    source: str | None = None
    read_only: bool = False


@dataclass(frozen=True)
class Entry:
    """A name in a guest's filesystem; *kind* is ``file``, ``directory``, ``link`` or ``other``.

    *target* is where a link leads to, where that was asked for.
    """

    path: str
    kind: str
    target: str = ""


@dataclass(frozen=True)
class Placed:
    """What is to be at *path* in a guest's filesystem; *kind* is ``file``, ``directory`` or ``link``.

    A file or a directory has *mode*, a link leads to *target*.  A file has the *size* bytes at *offset* of the file
    that has the contents of all.
    """

    path: str
    kind: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    target: str = ""
    offset: int = 0
    size: int = 0


@dataclass(frozen=True)
class Change:
    """What has gone from *path*: *files* files and directories, with *size* bytes in all.

    The path has nothing that a terminal would obey.
    """

    path: str
    files: int
    size: int


class Filesystem(Protocol):
    """A filesystem of a disk, mounted by one of the ways in ``mounts``.

    Patterns are paths below its top; only the last part may have ``*``, which does not mean
    lost+found.  No operation follows a link: what is behind one is not there.  That a file or a
    directory is immutable or append-only stops none, and it is so no more when it was changed.
    """

    @property
    def volume(self) -> Volume:
        """What it is on."""

    @property
    def subvolumes(self) -> tuple[Subvolume, ...]:
        """All subvolumes of btrfs, the default one first and the top among them; none of another filesystem."""

    def delete_subvolumes(self, paths: Sequence[str]) -> None:
        """Remove the subvolumes at *paths*, and have nothing of them be left; others must not lie in them."""

    def set_read_only(self, path: str, value: bool) -> None:
        """Make the subvolume at *path* of btrfs read-only, or writable."""

    def has(self, path: str) -> bool:
        """Return whether *path* is there."""

    def show(self, patterns: Sequence[str]) -> str:
        """Return the regular files that *patterns* match, and those below directories, with headings."""

    def entries(self, patterns: Sequence[str]) -> list[Entry]:
        """Return what *patterns* match."""

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        """Return the regular files of at most 1 MiB that *patterns* match, by their paths."""

    def write(self, path: str, data: bytes, mode: int) -> None:
        """Have *data* in the regular file *path*, whose owner, mode and attributes stay.

        One that is not there is made, with the directories on the way: root's, with *mode* and the
        SELinux label of its directory.
        """

    def look(self, paths: Sequence[str]) -> list[Entry]:
        """Return those of *paths*, which are no patterns, that are there, links with where they lead to."""

    def put(self, items: Sequence[Placed], contents: Path) -> None:
        """Make *items*, whose bytes are in the file *contents*, in their order.

        The directory of each is there, or is an item before.  A directory that is there stays as it is; a file takes
        the place of a file and keeps its SELinux label, a link that of a link; nothing takes that of anything else.
        What is new has the label of its directory.
        """

    def rename(self, path: str, name: str) -> None:
        """Give *path* another *name* in its directory, which nothing there has."""

    def remove(self, patterns: Sequence[str]) -> list[Change]:
        """Remove what *patterns* match, a link itself; return what is gone."""

    def truncate(self, patterns: Sequence[str]) -> list[Change]:
        """Empty the regular files that *patterns* match, and those below directories; return what is gone.

        Owner, mode and attributes stay.
        """

    def load(self, path: str, most: int, offset: int = 0) -> bytes | None:
        """Return at most *most* bytes at *offset* of the regular file *path*; None if there is none.

        All users of the guest may read the file.  It is much faster than ``show``: it takes no root.
        """

    def usage(self, top: str) -> dict[str, int]:
        """Return the bytes that each entry of the directory *top*, with all below it, takes on the disk."""

    def key_files(self, top: str) -> dict[str, bytes]:
        """Return the regular files of at most 1 MiB in and below the directory *top* that may have a private key."""

    def contents(
        self, places: "Mapping[str, tuple[Filesystem, str]]", options: Sequence[str]
    ) -> AbstractContextManager[list[str]]:
        """Give the command that prints a tar of a system, of which this is the root.

        *places* has what is at each of its points: a filesystem, mounted by the same way, and a directory of it.
        *options* are those of tar(1).
        """

    def trim(self) -> int | None:
        """Free the unused blocks; return their bytes, None where this is not possible."""

    def block_size(self) -> int:
        """Return the bytes of a block."""

    def discard_size(self) -> int:
        """Return the bytes that what it is on frees at once, where that can be more than a block; else 0."""


class LogicalVolumes(Protocol):
    """What can be done to logical volumes, which only a kernel finds in their partitions."""

    def zero_unused_blocks(self, volume: Volume) -> None:
        """Unmount the ext filesystem on *volume*, and zero its unused blocks."""

    def fill_unused_blocks(self, volume: Volume) -> bool:
        """Write zeros to the unused blocks of the mounted *volume*, and free them; return whether there is room."""

    def zero_swap(self, volume: Volume) -> None:
        """Zero the swap space on *volume*, and keep its UUID and its label."""


@dataclass(frozen=True)
class Given:
    """What the guest that makes a disk is given, and what of it nobody is to find on an image.

    *name* is the name by which the guest knows its answer file, None if it has none, and *pieces* are what of that
    file it writes nowhere as it stands there.  *contents* is the whole of all its files, with the passwords and keys
    that are asked for.  *marks* are whole texts that are to be nowhere.
    """

    name: str | None = None
    pieces: tuple[bytes, ...] = field(default=(), repr=False)
    contents: bytes = field(default=b"", repr=False)
    marks: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Artifact:
    """A finished file of a disk of *virtual_size* bytes.

    *upload* is false for one that is only kept, as ``keep-raw`` asks.  *sha256* is None until it is
    known.  *companions* are the files beside it that belong to it, beside its checksum: their names, each
    with its SHA-256.
    """

    path: Path
    format: str
    virtual_size: int
    upload: bool = True
    sha256: str | None = None
    companions: tuple[tuple[str, str], ...] = ()

    @property
    def checksum_path(self) -> Path:
        """The file beside it that sha256sum reads."""
        return self.path.with_name(f"{self.path.name}.sha256sum")

    @property
    def others(self) -> tuple[Path, ...]:
        """All files beside it that belong to it: its checksum, then its companions."""
        return self.checksum_path, *(self.path.with_name(name) for name, _ in self.companions)
