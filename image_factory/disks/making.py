"""A disk from a tree: partitions, filesystems and boot loader, with no loop device, no device-mapper and no root."""

import os
from dataclasses import dataclass
from pathlib import Path

from ..base import command
from ..base.errors import BuildError
from ..inside.namespaces import Namespaces, entering_argv
from ..model import Build
from . import grub, layouts, reproducible

# Of e2fsprogs since 1.47.1: the GRUB of older releases reads no filesystem with them.
_FEATURES = "^metadata_csum_seed,^orphan_file"
_FAT_HEADS, _FAT_SECTORS = "16", "63"

# What mke2fs leaves out of a tree: owner, mode and time of its top, and of all times the nanoseconds and the bits after
# the 32nd.  $1 is the tree, $2 the filesystem; debugfs has no way to tell a path with a line break.
_ADD_REST = r"""
find "$1" -path "*
*" -prune -o -printf '%T@ %m %U %G %P\n' | awk '
{
    split($1, time, "."); seconds = time[1] + 0; part = substr(time[2] "000000000", 1, 9) + 0
    era = int((seconds + 2147483648) / 4294967296)
    path = $0; sub(/^[^ ]* [^ ]* [^ ]* [^ ]* /, "", path); gsub(/"/, "\"\"", path)
    if (path == "")
        printf "sif / mode 04%s\nsif / uid %s\nsif / gid %s\nsif / mtime @%.0f\n",
            substr("0000" $2, length($2) + 1), $3, $4, seconds
    if (part || era > 0) printf "sif \"/%s\" mtime_extra %.0f\n", path, part * 4 + era
}' | debugfs -w -f - "$2" >/dev/null
"""

# Where a signed GRUB looks for its configuration, whoever has signed it.
_VENDORS = ("debian", "ubuntu")
_SHIM = {"x86_64": "x64", "aarch64": "aa64"}


@dataclass(frozen=True)
class Layout:
    """How a disk of *size* bytes is laid out, and what tells it from others.

    With a *date*, in seconds since 1970, it is the same each time.
    """

    firmware: str
    arch: str
    size: int
    identity: layouts.Identity
    date: int | None = None

    @property
    def pieces(self) -> list[layouts.Piece]:
        """The partitions in their order."""
        return layouts.pieces(self.firmware, self.arch, self.size)

    def piece(self, role: str) -> layouts.Piece | None:
        """Return the partition of *role*, None if there is none."""
        return next((piece for piece in self.pieces if piece.role == role), None)


def programs(firmware: str) -> list[str]:
    """Return the programs that are needed."""
    return ["sfdisk", "mke2fs", *reproducible.PROGRAMS, *([] if firmware == "bios" else ["mformat", "mmd", "mcopy"])]


@dataclass(frozen=True)
class Inside:
    """A command that is run in a build's namespaces, with *text* on its stdin."""

    words: tuple[str, ...]
    text: str = ""


def _put(path: Path, text: str, mode: str = "644") -> Inside:
    """Return what writes *text* to the new file *path* of a tree."""
    return Inside(("install", "-D", "-m", mode, "/dev/stdin", str(path)), text)


def loader_commands(tree: Path, directory: Path, layout: Layout) -> list[Inside]:
    """Return what configures GRUB and fstab of *tree*, and copies what is in no filesystem of its to *directory*.

    What is mounted on the way goes with the namespaces if one of them fails.
    """
    identity = layout.identity
    scratch, probe = tree / "dev", tree / "usr/sbin/grub-probe"
    commands = [
        _put(tree / "etc/fstab", "".join(f"{line}\n" for line in _fstab(layout))),
        Inside(("mkdir", "-p", f"{tree}/boot/efi", f"{tree}/boot/grub")),
        Inside(("mount", "-t", "tmpfs", "-o", "mode=755", "scratch", str(scratch))),
    ]
    for name in ("null", "zero", "urandom"):
        commands += [_put(scratch / name, ""), Inside(("mount", "--bind", f"/dev/{name}", str(scratch / name)))]
    commands += [
        # grub-mkconfig names the root by its UUID only where there is such a device.
        _put(scratch / f"disk/by-uuid/{identity.root}", ""),
        _put(scratch / "probe", grub.probe_script(identity), "755"),
        Inside(("mount", "--bind", str(scratch / "probe"), str(probe))),
        Inside(("chroot", str(tree), "grub-mkconfig", "-o", "/boot/grub/grub.cfg")),
        Inside(("umount", str(probe))),
    ]
    if layout.piece("bios"):
        modules = tree / "usr/lib/grub/i386-pc"
        commands += [
            _put(scratch / "early.cfg", grub.core_configuration(identity)),
            Inside(tuple(grub.core_argv(tree, "/dev/early.cfg", "/dev/core.img"))),
            Inside(("cp", str(scratch / "core.img"), str(modules / "boot.img"), str(directory))),
            Inside(("cp", "-r", str(modules), f"{tree}/boot/grub/i386-pc")),
        ]
    if layout.piece("esp"):
        for name, place in _signed(layout.arch):
            # Ubuntu's are alternatives: links that are right only within the tree.
            commands += [Inside(("chroot", str(tree), "cp", f"/{place}", f"/dev/{name}"))]
            commands += [Inside(("cp", str(scratch / name), str(directory)))]
    return [*commands, Inside(("umount", "--recursive", str(scratch)))]


def _fstab(layout: Layout) -> list[str]:
    lines = [f"UUID={layout.identity.root} / ext4 errors=remount-ro 0 1"]
    if layout.piece("esp"):
        lines.append(f"UUID={layout.identity.esp_name} /boot/efi vfat umask=0077 0 1")
    return lines


def _signed(arch: str) -> list[tuple[str, str]]:
    """Return the signed programs of UEFI: the name of each on the ESP, and its place in a tree."""
    suffix = _SHIM[arch]
    kind = {"x86_64": "x86_64-efi", "aarch64": "arm64-efi"}[arch]
    return [
        (f"boot{suffix}.efi", f"usr/lib/shim/shim{suffix}.efi.signed"),
        (f"mm{suffix}.efi", f"usr/lib/shim/mm{suffix}.efi.signed"),
        (f"grub{suffix}.efi", f"usr/lib/grub/{kind}-signed/grub{suffix}.efi.signed"),
    ]


def disk_argvs(tree: Path, build: Build, layout: Layout) -> list[list[str]]:
    """Return the commands of ``make_disk``."""
    root, esp = layout.piece("root"), layout.piece("esp")
    assert root is not None
    argvs = [layouts.table_argv(build.disk_path)]
    argvs += [
        entering_argv("PID", *words, as_root=build.plan.as_root)
        for words in filesystem_argvs(tree, build.disk_path, root, layout)
    ]
    if layout.date:
        argvs += reproducible.settle_argvs(build.disk_path, root.offset, build.directory, layout.date)
    return [*argvs, *(esp_argvs(build.disk_path, esp, build.directory, layout) if esp else [])]


def make_disk(inside: Namespaces, tree: Path, build: Build, layout: Layout) -> None:
    """Make the disk of *build* from *tree*."""
    disk, directory = build.disk_path, build.directory
    with open(os.open(disk, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.truncate(layout.size)
    command.run(layouts.table_argv(disk), stdin=layouts.table(layout.pieces, layout.identity).encode())
    root = layout.piece("root")
    assert root is not None
    try:
        for words in filesystem_argvs(tree, disk, root, layout):
            inside.run(*words)
    except BuildError as error:
        used = inside.run("du", "-sx", "--block-size=1M", str(tree), capture=True).split()[0]
        raise BuildError(
            f"The tree of {used} MiB can't be put on the disk: {error.said}.", hint="Set a larger image-size."
        ) from error
    if layout.date:
        reproducible.settle(disk, root.offset, directory, layout.date)
    if bios := layout.piece("bios"):
        grub.embed(disk, bios, (directory / "boot.img").read_bytes(), (directory / "core.img").read_bytes())
    if esp := layout.piece("esp"):
        (directory / "grub.cfg").write_text(grub.stub_configuration(layout.identity), encoding="ascii")
        for argv in esp_argvs(disk, esp, directory, layout):
            command.run(argv)


def filesystem_argvs(tree: Path, disk: Path, root: layouts.Piece, layout: Layout) -> list[list[str]]:
    """Return the commands that make the root filesystem of *tree*, with all its owners, modes, times and attributes."""
    date, identity = layout.date, layout.identity
    # Inode tables of zeros are holes of the disk's file.  Those that are left for later the kernel writes to when it
    # has the time, on each machine of the image.
    options = f"offset={root.offset},hash_seed={identity.hash_seed},lazy_itable_init=0"
    making = [
        "mke2fs", "-q",
        "-t", "ext4",
        "-O", _FEATURES,
        "-U", identity.root,
        "-d", str(tree),
        "-E", options,
        str(disk),
        f"{root.size >> 10}k",
    ]  # fmt: skip
    adding = ["sh", "-c", _ADD_REST, "sh", str(tree), f"{disk}?offset={root.offset}"]
    clamping = [reproducible.clamp_argv(tree, date)] if date else []
    return [*clamping, reproducible.with_date(date, *making), reproducible.with_date(date, *adding)]


def esp_argvs(disk: Path, esp: layouts.Piece, directory: Path, layout: Layout) -> list[list[str]]:
    """Return the commands that make the ESP, with GRUB at the path where all firmware looks."""
    at = f"{disk}@@{esp.offset}"
    suffix = _SHIM[layout.arch]
    files = {
        f"boot{suffix}.efi": f"EFI/BOOT/BOOT{suffix.upper()}.EFI",
        f"grub{suffix}.efi": f"EFI/BOOT/grub{suffix}.efi",
        f"mm{suffix}.efi": f"EFI/BOOT/mm{suffix}.efi",
    }
    sizes = ["-T", str(esp.size // layouts.SECTOR), "-h", _FAT_HEADS, "-s", _FAT_SECTORS]
    argvs = [
        ["mformat", "-i", at, "-F", "-N", layout.identity.esp, *sizes, "::"],
        ["mmd", "-i", at, "::/EFI", "::/EFI/BOOT", *(f"::/EFI/{vendor}" for vendor in _VENDORS)],
        *(["mcopy", "-i", at, str(directory / name), f"::/{place}"] for name, place in files.items()),
        *(["mcopy", "-i", at, str(directory / "grub.cfg"), f"::/EFI/{vendor}/grub.cfg"] for vendor in _VENDORS),
    ]
    return [reproducible.with_date(layout.date, *words) for words in argvs]
