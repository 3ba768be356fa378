"""Filesystems of a disk that is made from a tree, each with its part of the tree; no root is needed."""

import math
import shlex
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase

from ..base.errors import BuildError, CommandError
from ..inside.namespaces import Namespaces
from . import reproducible
from .layouts import APPLIANCE, EXT, EXTENT, LVM_HEAD, MIB, SECTOR, SWAP, Filesystem, Layout, Piece

# Of e2fsprogs since 1.47.1: the GRUB of older releases reads no filesystem with them.
_FEATURES = "^metadata_csum_seed,^orphan_file"
_BLOCK = 4096
_FAT_HEADS, _FAT_SECTORS = "16", "63"

# What mke2fs leaves out of a tree: owner, mode and time of its top, and of all times the nanoseconds and the bits after
# the 32nd.  $1 is the tree.  What is printed at the end are commands of debugfs, which has no way to tell a path with a
# line break.
_REST = r"""
find "$1" -path "*
*" -prune -o -printf '%T@ %m %U %G %P\n' | awk '
{
    split($1, time, "."); seconds = time[1] + 0; part = substr(time[2] "000000000", 1, 9) + 0
    era = int((seconds + 2147483648) / 4294967296)
    path = $0; sub(/^[^ ]* [^ ]* [^ ]* [^ ]* /, "", path); gsub(/"/, "\"\"", path)
    if (path == "")
        lines[count++] = sprintf("sif / mode 04%s\nsif / uid %s\nsif / gid %s\nsif / mtime @%.0f",
            substr("0000" $2, length($2) + 1), $3, $4, seconds)
    if (part || era > 0) lines[count++] = sprintf("sif \"/%s\" mtime_extra %.0f", path, part * 4 + era)
}
END { for (i = 0; i < count; i++) print lines[i] }
' |"""
# $2 is the filesystem.
_ADD_REST = f'{_REST} debugfs -w -f - "$2" >/dev/null'
# The tree is listed while mke2fs, which follows the two, copies it.
_FILL = f'{_REST} {{ made=$2; shift 2; "$@" </dev/null && debugfs -w -f - "$made" >/dev/null; }}'

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

# Where the superblock of ext is, and in it: blocks, free ones, free inodes, the size of a block as a power of two.
_SUPERBLOCK = 1024
_BLOCKS, _FREE_BLOCKS, _FREE_INODES, _LOG_BLOCK_SIZE = 4, 12, 16, 24
# Of ext4 the kernel keeps that share of all blocks to itself, root included, and at most so many
# (ext4_calculate_resv_clusters): with no more free than these, nothing can be written to the system, by sealing or
# when it boots.
_KEPT_SHARE, _MOST_KEPT = 50, 4096
_INODE_RATIO = 16384

# Of what a filesystem that is made in the appliance takes, beside files and directories: bytes for each inode, a share
# of all, and bytes that it always has, such as xfs' log and reserve.  No smaller one is made.
_INODE_BYTES = {"xfs": 640, "btrfs": 2048, "vfat": 0}
_SHARES = {"xfs": 1.04, "btrfs": 1.15, "vfat": 1.05}
_ALWAYS = {"xfs": 112 * MIB, "btrfs": 320 * MIB, "vfat": 40 * MIB}
_LEAST = {"xfs": 300 * MIB, "btrfs": 256 * MIB, "vfat": 40 * MIB, SWAP: MIB}

# Makes the btrfs filesystem at /sysroot/made as small as it goes, but for so many bytes as the word EXTRA says.  What
# it leaves free has to last until a machine of the image makes it larger.  Quotes are lost on the way to the appliance.
_SHRINK = """\
size() { set -- $(btrfs filesystem show --raw /sysroot/made | grep devid); echo $4; }
whole=$(size)
for step in 64 16; do while btrfs filesystem resize -${step}M /sysroot/made; do :; done; done >/dev/null 2>&1
wanted=$(($(size) + EXTRA))
[ $wanted -lt $whole ] || wanted=$whole
[ $wanted = $(size) ] || btrfs filesystem resize $wanted /sysroot/made
"""
_SPARE_OF_BTRFS = 32 * MIB
# Where btrfs' superblock is, and in it its magic number and the bytes of the filesystem.
_BTRFS_SUPERBLOCK = 65536
_BTRFS_MAGIC, _BTRFS_TOTAL = 64, 112

# Sets device to the node of a partition of the first disk, as the appliance's kernel calls it: of two disks it finds
# either first, and only libguestfs' own commands know that.  Nodes come after the appliance has started.
_FIND = """\
for turn in $(seq 300); do
    for found in /sys/bus/scsi/devices/*:0:0:0/block/sd*; do
        device=/dev/${found##*/}NUMBER
        [ ! -b $device ] || break 2
    done
    sleep 0.2
done
udevadm settle
"""

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


def fill_ext_argv(disk: Path, piece: Piece, filesystem: Filesystem, layout: Layout, tree: Path) -> list[str]:
    """Return the command that makes the ext *filesystem* on *piece* of *disk*, with all that is in *tree*."""
    made = ext_argv(disk, piece, filesystem, layout, tree)
    words = ["sh", "-c", _FILL, "sh", str(tree), f"{disk}?offset={piece.offset}", *made]
    # debugfs, too.
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
    device = f"/dev/sda{piece.number or ''}"
    find = _FIND.replace("NUMBER", str(piece.number or ""))
    lines = [
        *_started(disk, [scratch] if scratch else []),
        ["debug", "sh", f"{find}{shlex.join(_mkfs_argv(filesystem, layout))} $device"],
        ["mkmountpoint", "/made"],
        ["mount", device, "/made"],
    ]
    if scratch:
        lines += [["mkmountpoint", "/tree"], ["mount-ro", "/dev/sdb", "/tree"], ["cp-a", "/tree/.", "/made"]]
        if shrinks(piece, layout):
            script = _SHRINK.replace("EXTRA", str(_SPARE_OF_BTRFS + (layout.extra or 0)))
            lines += [["sync"], ["debug", "sh", script.strip()]]
    return _guestfish_argv([*lines, ["umount-all"]])


def _mkfs_argv(filesystem: Filesystem, layout: Layout) -> list[str]:
    """Return the command that makes an xfs or btrfs *filesystem*, but for the device."""
    uuid = layout.uuid_of(filesystem)
    own = {
        # GRUB until 2.12 reads no filesystem with more than 32 bits for the number of extents.
        "xfs": ["mkfs.xfs", "-q", "-f", "-m", f"uuid={uuid}", "-i", "nrext64=0"],
        "btrfs": ["mkfs.btrfs", "-q", "-f", "-U", uuid],
    }[filesystem.kind]
    return [*own, *(["-L", filesystem.label] if filesystem.label else []), *filesystem.options]


def _started(disk: Path, others: Sequence[Path]) -> list[list[str]]:
    """Return guestfish's commands that start the appliance with *disk*, its first, and *others* that are read."""
    # The build starts anew if the machine crashes.
    first = ["add", str(disk), "format:raw", "cachemode:unsafe", "discard:besteffort"]
    return [first, *(["add", str(other), "format:raw", "readonly:true"] for other in others), ["run"]]


def _guestfish_argv(lines: Sequence[Sequence[str]]) -> list[str]:
    words = [word for line in [*lines, ["shutdown"]] for word in (*line, ":")]
    return ["guestfish", *words[:-1]]


def volume_path(directory: Path, piece: Piece) -> Path:
    """Return the file with what the volume *piece* gets: all of its filesystem, or of xfs and btrfs its files."""
    return directory / f"{piece.name}.volume"


def volumes_argv(disk: Path, layout: Layout, directory: Path) -> list[str]:
    """Return the command that makes the groups and volumes of LVM in libguestfs' appliance.

    They get what is in the files of ``volume_path``.  LVM of this machine never meets them.
    """
    made = [(piece, piece.filesystem) for piece in layout.volumes if piece.filesystem]
    images = [piece for piece, filesystem in made if filesystem.point or filesystem.kind not in APPLIANCE]
    lines = [
        *_started(disk, [volume_path(directory, piece) for piece in images]),
        ["debug", "sh", _groups_script(layout)],
    ]
    read = {piece.name: f"/dev/{_drive(number)}" for number, piece in enumerate(images, 1)}
    for piece, filesystem in made:
        if filesystem.kind not in APPLIANCE:
            lines.append(["copy-device-to-device", read[piece.name], piece.device, "sparse:true"])
            continue
        lines.append(["debug", "sh", f"{shlex.join(_mkfs_argv(filesystem, layout))} {piece.device}"])
        if piece.name in read:
            # An error tells the name.
            made_at, tree = f"/{piece.name}.made", f"/{piece.name}.tree"
            lines += [["mkmountpoint", made_at], ["mount", piece.device, made_at]]
            lines += [["mkmountpoint", tree], ["mount-ro", read[piece.name], tree], ["cp-a", f"{tree}/.", made_at]]
    return _guestfish_argv([*lines, ["umount-all"], ["vg-activate-all", "false"]])


def _drive(number: int) -> str:
    """Return what libguestfs calls the disk *number*, of which the first is 0."""
    more, last = divmod(number, 26)
    return f"sd{ascii_lowercase[more - 1] if more else ''}{ascii_lowercase[last]}"


def _groups_script(layout: Layout) -> str:
    """Return the lines of shell that make the groups and volumes of LVM in the appliance."""
    numbers = {piece.name: piece.number for piece in layout.pieces}
    lines = ["set -e"]
    for group in layout.scheme.groups:
        lines.append("devices=")
        for partition, name in group.on:
            identity = f"--uuid {layout.identity.lvm(name)} --norestorefile"
            lines += [
                _FIND.replace("NUMBER", str(numbers[partition])).strip(),
                f"lvm pvcreate --yes {identity} --dataalignment {LVM_HEAD}b $device",
                'devices="$devices $device"',
            ]
        lines.append(f"lvm vgcreate --yes --physicalextentsize {EXTENT}b {group.name} $devices")
        for piece in layout.volumes:
            if piece.group == group.name:
                extents = str(piece.size // EXTENT) if layout.size else "SIZE"
                lines.append(f"lvm lvcreate --yes --extents {extents} --name {piece.name} {group.name}")
    return "\n".join([*lines, "udevadm settle"])


def shrinks(piece: Piece, layout: Layout) -> bool:
    """Return whether the filesystem on *piece* is made smaller once it has its files, and the disk with it."""
    kind = piece.filesystem.kind if piece.filesystem else ""
    return kind == "btrfs" and layout.extra is not None and piece == layout.pieces[-1]


def size_of_btrfs(disk: Path, piece: Piece) -> int:
    """Return the bytes of the btrfs filesystem on *piece* of *disk*."""
    with disk.open("rb") as file:
        file.seek(piece.offset + _BTRFS_SUPERBLOCK)
        block = file.read(_BLOCK)
    if block[_BTRFS_MAGIC : _BTRFS_MAGIC + 8] != b"_BHRfS_M":
        raise BuildError(f"{piece.name} has no btrfs filesystem.")
    (size,) = struct.unpack_from("<Q", block, _BTRFS_TOTAL)
    return int(size)


def private_argv(path: Path, size: int, layout: Layout) -> list[str]:
    """Return the command that makes the file *path* of *size* bytes, for what not everyone may read of a system.

    Others get through the working directory of root's build.
    """
    words = ["truncate", f"--size={size if layout.size else 'SIZE'}", str(path)]
    return ["sh", "-c", 'umask 077; exec "$@"', "sh", *words]


def scratch_argvs(scratch: Path, piece: Piece, layout: Layout, tree: Path) -> list[list[str]]:
    """Return the commands that make the ext4 filesystem *scratch* with what is in *tree*, which is for *piece*."""
    # With room for what the other one can do with less.
    whole = Piece("scratch", 0, "", 0, piece.size + piece.size // 4 + _SCRATCH_ROOM)
    filesystem = Filesystem("scratch", "ext4")
    return [
        private_argv(scratch, whole.size, layout),
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
    """Return the bytes of the smallest *filesystem* with room for *need*.

    One of ext is as mke2fs makes it, another of a size that has room for sure.
    """
    if filesystem.kind not in EXT:
        kind = filesystem.kind
        content = need.size + need.inodes * _INODE_BYTES.get(kind, 0)
        size = math.ceil(content * _SHARES.get(kind, 1)) + _ALWAYS.get(kind, 0)
        return max(_LEAST[kind], -(-size // MIB) * MIB)
    scratch = directory / _SCRATCH
    size = max(-(-need.size // MIB), 1) * MIB
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
    """Return what an empty ext *filesystem* of *size* bytes has room for, beside what the kernel keeps free."""
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
    blocks, free, inodes, power = (
        struct.unpack_from("<I", block, at)[0] for at in (_BLOCKS, _FREE_BLOCKS, _FREE_INODES, _LOG_BLOCK_SIZE)
    )
    kept = min(blocks // _KEPT_SHARE, _MOST_KEPT) if filesystem.kind == "ext4" else 0
    return Need((free - kept) * (1024 << power), inodes)


def layout_of(size: int, layout: Layout) -> Layout:
    """Return *layout* for a disk of *size* bytes."""
    return replace(layout, size=size)
