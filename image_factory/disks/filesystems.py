"""Filesystems of a disk that is made from a tree, each with its part of the tree; no root is needed."""

import shlex
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..base.errors import BuildError, CommandError
from ..inside.namespaces import Namespaces
from . import reproducible
from .layouts import APPLIANCE, EXT, MIB, SECTOR, SWAP, Filesystem, Layout, Piece

# Of e2fsprogs since 1.47.1: the GRUB of older releases reads no filesystem with them.
_FEATURES = "^metadata_csum_seed,^orphan_file"
_BLOCK = 4096
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

# Prints how many blocks of 4 KiB, and how many inodes, what is in the tree $1 takes, but for what is in the directories
# that follow.  A file that has much less on its own filesystem is sparse.
_MEASURE = r"""
tree=$1; shift
for place; do set -- "$@" -path "$place/*" -prune -o; shift; done
find "$tree" "$@" -printf '%y %i %s %b %f\n' | awk '
function blocks(size) { return int((size + 4095) / 4096) }
$1 == "f" && !seen[$2]++ { total += blocks($4 * 512 < $3 / 2 ? $4 * 512 : $3); inodes++ }
$1 == "l" && $3 > 59 { total++ }
$1 == "d" { total++ }
$1 ~ /^[bcdlps]$/ { inodes++ }
{ names += 12 + length($0) - length($1 $2 $3 $4) }
END { printf "%.0f %.0f\n", total + blocks(names), inodes }'
"""
# What a measure can't know: blocks of extents and attributes.
_SPARE_BLOCKS, _SPARE_SHARE = 256, 200

# Where the superblock of ext is, and in it: free blocks, free inodes, the size of a block as a power of two.
_SUPERBLOCK = 1024
_FREE_BLOCKS, _FREE_INODES, _LOG_BLOCK_SIZE = 12, 16, 24
_INODE_RATIO = 16384
_SCRATCH = "measured.ext"
_SCRATCH_ROOM = 256 * MIB
_ATTEMPTS = 16


@dataclass(frozen=True)
class Need:
    """What a tree takes in a filesystem: bytes of blocks, and inodes."""

    size: int
    inodes: int


def ext_argv(disk: Path, piece: Piece, filesystem: Filesystem, layout: Layout, tree: Path | None) -> list[str]:
    """Return the command that makes the ext *filesystem* on *piece* of *disk*, with what is in *tree*."""
    # Inode tables of zeros are holes of the disk's file.  Those that are left for later the kernel writes to when it
    # has the time, on each machine of the image.
    seed = layout.identity.uuid(f"{filesystem.name}-hash")
    words = [
        "mke2fs", "-q",
        "-t", filesystem.kind,
        "-b", str(_BLOCK),
        "-O", _FEATURES,
        "-U", layout.uuid_of(filesystem),
        *(["-L", filesystem.label] if filesystem.label else []),
        *filesystem.options,
        *(["-d", str(tree)] if tree else []),
        "-E", f"offset={piece.offset},hash_seed={seed},lazy_itable_init=0",
        str(disk),
        f"{piece.size >> 10}k" if layout.size else "SIZE",
    ]  # fmt: skip
    return reproducible.with_date(layout.date, *words)


def rest_argv(disk: Path, piece: Piece, tree: Path, layout: Layout) -> list[str]:
    """Return the command that adds to an ext filesystem what mke2fs has not copied from *tree*."""
    words = ["sh", "-c", _ADD_REST, "sh", str(tree), f"{disk}?offset={piece.offset}"]
    return reproducible.with_date(layout.date, *words)


def fat_argv(disk: Path, piece: Piece, filesystem: Filesystem, layout: Layout) -> list[str]:
    """Return the command that makes the FAT *filesystem* on *piece* of *disk*."""
    words = [
        "mformat",
        "-i", f"{disk}@@{piece.offset}",
        "-F",
        "-N", layout.uuid_of(filesystem).replace("-", ""),
        *(["-v", filesystem.label] if filesystem.label else []),
        *filesystem.options,
        "-T", str(piece.size // SECTOR),
        "-h", _FAT_HEADS,
        "-s", _FAT_SECTORS,
        "::",
    ]  # fmt: skip
    return reproducible.with_date(layout.date, *words)


def fill_fat_argv(disk: Path, piece: Piece, tree: Path, layout: Layout) -> list[str]:
    """Return the command that copies what is in *tree* to the FAT filesystem on *piece*."""
    copy = ["mcopy", "-s", "-Q", "-m", "-i", f"{disk}@@{piece.offset}", "{}", "::/"]
    words = ["find", str(tree), "-mindepth", "1", "-maxdepth", "1", "-exec", *copy, ";"]
    return reproducible.with_date(layout.date, *words)


def appliance_argv(disk: Path, piece: Piece, filesystem: Filesystem, layout: Layout, scratch: Path | None) -> list[str]:
    """Return the command that makes the xfs or btrfs *filesystem* on *piece* in libguestfs' appliance.

    It gets what is in the ext4 filesystem *scratch*: owners, attributes and times are in that as they were in the tree.
    """
    uuid = layout.uuid_of(filesystem)
    own = {
        # GRUB until 2.12 reads no filesystem with more than 32 bits for the number of extents.
        "xfs": ["mkfs.xfs", "-q", "-f", "-m", f"uuid={uuid}", "-i", "nrext64=0"],
        "btrfs": ["mkfs.btrfs", "-q", "-f", "-U", uuid],
    }[filesystem.kind]
    device = f"/dev/sda{piece.number or ''}"
    label = ["-L", filesystem.label] if filesystem.label else []
    lines = [
        # The build starts anew if the machine crashes.
        ["add", str(disk), "format:raw", "cachemode:unsafe", "discard:besteffort"],
        *([["add", str(scratch), "format:raw", "readonly:true"]] if scratch else []),
        ["run"],
        # The nodes of partitions come after the appliance has started.
        ["debug", "sh", f"udevadm settle && {shlex.join([*own, *label, *filesystem.options, device])}"],
        ["mkmountpoint", "/made"],
        ["mount", device, "/made"],
    ]
    if scratch:
        lines += [["mkmountpoint", "/tree"], ["mount-ro", "/dev/sdb", "/tree"], ["cp-a", "/tree/.", "/made"]]
    words = [word for line in [*lines, ["umount-all"], ["shutdown"]] for word in (*line, ":")]
    return ["guestfish", *words[:-1]]


def scratch_argvs(scratch: Path, piece: Piece, layout: Layout, tree: Path) -> list[list[str]]:
    """Return the commands that make the ext4 filesystem *scratch* with what is in *tree*, which is for *piece*."""
    # With room for what the other one can do with less.
    whole = Piece("scratch", 0, "", 0, piece.size + piece.size // 4 + _SCRATCH_ROOM)
    filesystem = Filesystem("scratch", "ext4")
    return [
        ["truncate", f"--size={whole.size}", str(scratch)],
        ext_argv(scratch, whole, filesystem, layout, tree),
        ["debugfs", "-w", "-R", "rmdir /lost+found", str(scratch)],
        rest_argv(scratch, whole, tree, layout),
    ]


def swap_argvs(disk: Path, piece: Piece, filesystem: Filesystem, layout: Layout, directory: Path) -> list[list[str]]:
    """Return the commands that make swap space on *piece* of *disk*."""
    scratch = directory / "swap"
    label = ["-L", filesystem.label] if filesystem.label else []
    copy = ["dd", f"if={scratch}", f"of={disk}", f"bs={_BLOCK}", "count=1", f"seek={piece.offset // _BLOCK}"]
    return [
        ["truncate", f"--size={piece.size}", str(scratch)],
        ["mkswap", "-q", "-U", layout.uuid_of(filesystem), *label, *filesystem.options, str(scratch)],
        [*copy, "conv=notrunc", "status=none"],
        ["rm", str(scratch)],
    ]


def programs(filesystems: Sequence[Filesystem]) -> list[str]:
    """Return the programs that *filesystems* need."""
    found = {
        **dict.fromkeys(EXT, ("mke2fs", *reproducible.PROGRAMS)),
        **dict.fromkeys(APPLIANCE, ("guestfish", "mke2fs", "debugfs")),
        "vfat": ("mformat", "mmd", "mcopy"),
        SWAP: ("mkswap",),
    }
    return list(dict.fromkeys(name for filesystem in filesystems for name in found.get(filesystem.kind, ())))


def measure_argv(tree: Path, without: Sequence[Path]) -> list[str]:
    """Return the command that prints how much *tree* takes, but for what is in the directories *without*."""
    return ["sh", "-c", _MEASURE, "sh", str(tree), *map(str, without)]


def measured(inside: Namespaces, tree: Path, without: Sequence[Path]) -> Need:
    """Return what *tree* takes in a filesystem, but for what is in the directories *without*."""
    blocks, inodes = map(int, inside.run(*measure_argv(tree, without), capture=True, quiet=True).split())
    return Need((blocks + blocks // _SPARE_SHARE + _SPARE_BLOCKS) * _BLOCK, inodes)


def least_size(need: Need, filesystem: Filesystem, layout: Layout, directory: Path) -> int:
    """Return the bytes of the smallest ext *filesystem* with room for *need*, as mke2fs makes it."""
    scratch = directory / _SCRATCH
    size = -(-need.size // MIB) * MIB
    try:
        for _ in range(_ATTEMPTS):
            room = _room(scratch, size, filesystem, layout)
            missing = max(need.size - room.size, (need.inodes - room.inodes) * _INODE_RATIO)
            if missing <= 0:
                return size
            size += -(-missing // MIB) * MIB
    finally:
        scratch.unlink(missing_ok=True)
    raise BuildError("No filesystem is large enough for the tree.", hint="Set image-size.")


def _room(scratch: Path, size: int, filesystem: Filesystem, layout: Layout) -> Need:
    """Return what an empty ext *filesystem* of *size* bytes has room for."""
    scratch.unlink(missing_ok=True)
    with scratch.open("xb") as file:
        file.truncate(size)
    try:
        reproducible.run(
            ext_argv(scratch, Piece("", 0, "", 0, size), filesystem, layout_of(size, layout), None), quiet=True
        )
    except CommandError as error:
        raise BuildError(f"The filesystem can't be made: {error.said}.", hint="See mkfs-options.") from error
    with scratch.open("rb") as file:
        file.seek(_SUPERBLOCK)
        block = file.read(1024)
    free, inodes, power = (
        struct.unpack_from("<I", block, at)[0] for at in (_FREE_BLOCKS, _FREE_INODES, _LOG_BLOCK_SIZE)
    )
    return Need(free * (1024 << power), inodes)


def layout_of(size: int, layout: Layout) -> Layout:
    """Return *layout* for a disk of *size* bytes."""
    return replace(layout, size=size)
