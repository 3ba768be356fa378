"""What boots over the network: the kernel of the system, its initrd, and a ramdisk with the whole tree."""

import re
import shutil
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from ..base import command, interrupts
from ..base.cleanup import released
from ..base.errors import BuildError
from ..model import Build
from . import oci

KERNEL, INITRD, RAMDISK = FILES = ("vmlinuz", "initrd.img", "ramdisk.img")
# What is in the ramdisk and not what the tree has: the disks that the system's fstab names are not there.
INIT, FSTAB = OWN = ("./init", "./etc/fstab")
_FSTAB = b"# The root is a ramdisk.\n"
_INITS = {f"./{directory}/init" for directory in ("sbin", "usr/sbin", "bin", "usr/bin")}
_KERNEL = re.compile(
    r"\./boot/(?:vmlinu[xz]|Image)-(?P<version>[^/]+)|\./(?:usr/)?lib/modules/(?P<other>[^/]+)/vmlinuz"
)
_INITRD = re.compile(r"\./boot/(?:initrd\.img-(?P<debian>[^/]+)|initramfs-(?P<el>[^/]+)\.img|initrd-(?P<suse>[^/]+))")

_BLOCK = 1 << 20
# The numbers in a header of cpio's have 8 hexadecimal digits.
_LARGEST = (1 << 32) - 1
_KINDS = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def tree_path(path: Path) -> Path:
    """Return where the tar of the tree is while the archive *path* is made."""
    return path.with_name(f"{path.name}.tree")


def _parts_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _cpio_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.cpio")


def commands(build: Build, path: Path, compressing: Sequence[str]) -> list[list[str]]:
    """Return the commands that make the archive *path*, after what this module does itself."""
    return [[*compressing, str(_cpio_path(path))], _archiving_argv(build, path, FILES)]


def _archiving_argv(build: Build, path: Path, names: Sequence[str]) -> list[str]:
    return oci.archiving_argv(build, path, _parts_path(path), *names)


def assemble(build: Build, path: Path, compressing: Sequence[str]) -> None:
    """Make the archive *path* of the tar of the tree, which is gone then.

    A ramdisk has each file before the links to it, and says how many there are: so the tar is read twice.
    """
    tree, parts, cpio = tree_path(path), _parts_path(path), _cpio_path(path)
    with (
        released(partial(shutil.rmtree, parts, ignore_errors=True)),
        released(partial(cpio.unlink, missing_ok=True)),
        released(partial(tree.unlink, missing_ok=True)),
    ):
        parts.mkdir()
        # What is read here changes nothing, and a signal may come at any point.
        with interrupts.interruptible():
            found = _look(tree)
            _write(tree, found, cpio, parts)
        # There may be little room.
        tree.unlink()
        command.flow([*compressing, str(cpio)], [(parts / RAMDISK, [])])
        command.run(_archiving_argv(build, path, [name for name in FILES if (parts / name).exists()]))


@dataclass
class _Found:
    """What is in a tar of a tree: how many links there are to files, and which are the kernel and its initrd."""

    links: Counter[str] = field(default_factory=Counter)
    kernels: dict[str, str] = field(default_factory=dict)
    initrds: dict[str, str] = field(default_factory=dict)
    has_init: bool = False

    def chosen(self) -> dict[str, str]:
        """Return the names of the newest kernel and of its initrd, if it has one, and what they are to be called."""
        if not self.kernels:
            raise BuildError(
                "The system has no kernel, which the format netboot needs.",
                hint="Have one installed: in Debian it is the package linux-image-amd64.",
            )
        version = max(self.kernels, key=lambda name: (name in self.initrds, _sorting(name)))
        initrd = self.initrds.get(version)
        return {self.kernels[version]: KERNEL} | ({initrd: INITRD} if initrd else {})


def _sorting(version: str) -> list[tuple[int, str]]:
    """Return by what versions are to be sorted: 6.9 is less than 6.12."""
    return [(int(number or 0), text) for number, text in re.findall(r"([0-9]*)([^0-9]*)", version)]


def _look(tree: Path) -> _Found:
    found = _Found()
    for _, member in _members(tree):
        if member.islnk():
            found.links[member.linkname] += 1
        found.has_init = found.has_init or member.name in _INITS
        if not member.isreg():
            continue
        for pattern, names in ((_KERNEL, found.kernels), (_INITRD, found.initrds)):
            if match := pattern.fullmatch(member.name):
                version = next(filter(None, match.groups()))
                # An image may have it twice; what is in /boot comes first.
                names.setdefault(version, member.name)
    if not found.has_init:
        raise BuildError("The system has no /sbin/init, which a ramdisk starts.")
    return found


def _members(tree: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    with _readable(), tarfile.open(tree, "r:", encoding="utf-8", errors="surrogateescape") as archive:
        while (member := archive.next()) is not None:
            yield archive, member
            # They take more memory than all else.
            archive.members = []  # type: ignore[attr-defined]


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise BuildError(f"The tar of the system can't be read: {error}") from error


def _write(tree: Path, found: _Found, cpio: Path, parts: Path) -> None:
    """Write the ramdisk, and beside it what was found."""
    chosen = found.chosen()
    numbers: dict[str, int] = {}
    with cpio.open("wb") as file:
        for number, (archive, member) in enumerate(_members(tree), 1):
            kind = _KINDS.get(member.type, stat.S_IFREG)
            linked = member.linkname if member.islnk() else member.name
            links = found.links[linked] + 1 if kind == stat.S_IFREG else 1
            if links > 1:
                numbers.setdefault(linked, number)
            data = member.linkname.encode("utf-8", "surrogateescape") if member.issym() else b""
            size = member.size if member.isreg() else len(data)
            if size > _LARGEST:
                raise BuildError(
                    f"/{member.name.removeprefix('./')} has {size} bytes, and no file in a ramdisk has 4 GiB.",
                    hint="Leave it out: tar-exclude.",
                )
            header = _Header(numbers.get(linked, number), kind | stat.S_IMODE(member.mode), size, links)
            file.write(header.encoded(member))
            file.write(data)
            if member.isreg():
                with _extracted(archive, member) as contents:
                    shutil.copyfileobj(contents, file, _BLOCK)
            file.write(bytes(-size % 4))
            if member.name in chosen:
                with _extracted(archive, member) as contents, (parts / chosen[member.name]).open("wb") as copy:
                    shutil.copyfileobj(contents, copy, _BLOCK)
        file.write(_own(INIT, stat.S_IFLNK | 0o777, b"sbin/init"))
        file.write(_own(FSTAB, stat.S_IFREG | 0o644, _FSTAB))
        file.write(_own("TRAILER!!!", 0, b""))


def _extracted(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    contents = archive.extractfile(member)
    assert contents is not None
    return contents


@dataclass(frozen=True)
class _Header:
    """The header of a member of cpio's format newc (Linux, driver-api/early-userspace/buffer-format)."""

    number: int
    mode: int
    size: int
    links: int

    def encoded(self, member: tarfile.TarInfo) -> bytes:
        """Return the header of *member* with its name."""
        name = member.name.encode("utf-8", "surrogateescape") + b"\0"
        device = (member.devmajor, member.devminor) if member.isdev() else (0, 0)
        time = min(max(0, int(member.mtime)), _LARGEST)
        numbers = (self.number, self.mode, member.uid, member.gid, self.links, time, self.size, 0, 0, *device)
        header = b"070701" + b"".join(b"%08X" % number for number in (*numbers, len(name), 0)) + name
        return header + bytes(-len(header) % 4)


def _own(name: str, mode: int, data: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    text = _Header(0, mode, len(data), 1).encoded(member) + data
    return text + bytes(-len(text) % 4)


def reading_argv(path: Path) -> list[str]:
    """Return the command that turns the archive *path*, which it reads from stdin, into a tar of the ramdisk."""
    script = 'tar -xOf - "$0" | gzip -dc | bsdtar -cf - --format=gnutar @-'
    return ["bash", "-o", "pipefail", "-c", script, RAMDISK]
