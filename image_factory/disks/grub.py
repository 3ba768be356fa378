"""GRUB on a disk that is made from a tree, by the programs of that tree; nothing is mounted, no root is needed."""

import os
import struct
from pathlib import Path

from ..base.errors import BuildError
from .layouts import EXT, LVM, SECTOR, Layout, Piece

# boot.img (GRUB's grub-core/boot/i386/pc/boot.S): so much of it is code, and in it are the sector of the core image and
# a jump that keeps the drive that the BIOS names.
_BOOT_CODE = 440
_KERNEL_SECTOR = 0x5C
_DRIVE_CHECK = 0x66
# The first sector of the core image ends with the list of the blocks of the others.
_BLOCK_LIST = 0x1F4

CORE_NAME = "core.img"
_MODULES = "biosdisk part_gpt part_msdos ext2 xfs btrfs search search_fs_uuid configfile normal linux"


def core_configuration(layout: Layout) -> str:
    """Return what the core image for BIOS does before all else; then GRUB reads grub.cfg in its prefix by itself.

    The lists of commands and their modules are read only on that way.
    """
    _, filesystem = layout.at("/boot")
    directory = "/boot/grub" if filesystem.point == "/" else "/grub"
    return f"search --no-floppy --fs-uuid --set=root {layout.uuid_of(filesystem)}\nset prefix=($root){directory}\n"


def stub_configuration(layout: Layout) -> str:
    """Return the configuration that the signed GRUB finds on the ESP: that of the root is read in its place."""
    return f"{core_configuration(layout)}configfile $prefix/grub.cfg\n"


def core_argv(tree: Path, configuration: str, target: str, layout: Layout) -> list[str]:
    """Return the command that makes the core image for BIOS in *tree*; the paths are those inside of it."""
    piece, _ = layout.at("/boot")
    return [
        "chroot", str(tree),
        "grub-mkimage",
        "--format=i386-pc",
        "--prefix=/boot/grub",
        f"--config={configuration}",
        f"--output={target}",
        *_MODULES.split(),
        *([LVM] if piece.group else []),
    ]  # fmt: skip


def embed(disk: Path, offset: int, room: int, boot: bytes, core: bytes) -> None:
    """Write *boot*, the boot sector, to *disk*, and *core* to *offset*, where there are *room* bytes for it."""
    if len(core) > room:
        raise BuildError(f"GRUB's core image of {len(core)} bytes does not fit into the {room} bytes that it has.")
    if len(boot) < SECTOR or len(core) < SECTOR:
        raise BuildError("The tree's boot.img, or the core image that its grub-mkimage has made, is no whole sector.")
    start = offset // SECTOR
    image = bytearray(core)
    struct.pack_into("<Q", image, _BLOCK_LIST, start + 1)
    sector = bytearray(boot[:_BOOT_CODE])
    struct.pack_into("<Q", sector, _KERNEL_SECTOR, start)
    sector[_DRIVE_CHECK : _DRIVE_CHECK + 2] = b"\x90\x90"
    with disk.open("r+b") as file:
        os.pwrite(file.fileno(), bytes(sector), 0)
        os.pwrite(file.fileno(), bytes(image), offset)


def device_of(piece: Piece, layout: Layout) -> str:
    """Return the node that grub-mkconfig takes for *piece*; what a kernel's arguments call the root.

    That of a volume of LVM tells an initramfs which one it has to activate.
    """
    assert piece.filesystem
    return piece.device if piece.group else f"/dev/disk/by-uuid/{layout.uuid_of(piece.filesystem)}"


# grub-mkconfig asks where a path or a device is; the answers are of a disk that nothing is mounted from.
def probe_script(layout: Layout) -> str:
    """Return a program that answers in the place of grub-probe."""
    cases = "".join(
        f"    {_pattern(filesystem.point or '')} | */{layout.uuid_of(filesystem)} | {device_of(piece, layout)})"
        f" uuid={layout.uuid_of(filesystem)} partition={layout.partition_uuid(piece)}"
        f" device={device_of(piece, layout)} abstraction={LVM if piece.group else ''}"
        f" kind={'ext2' if filesystem.kind in EXT else filesystem.kind} ;;\n"
        for piece, filesystem in layout.mounted
    )
    return f"""\
#!/bin/sh
for word; do
    case $word in
    --target=*) target=${{word#--target=}} ;;
    -t) target=next ;;
    *) [ "$target" = next ] && target=$word ;;
    esac
    case $word in
{cases}    esac
done
case $target in
device) echo $device ;;
abstraction) echo $abstraction ;;
fs_uuid) echo $uuid ;;
partuuid) echo $partition ;;
fs) echo $kind ;;
partmap) echo {"msdos" if layout.scheme.table == "dos" else layout.scheme.table} ;;
esac
"""


def path_script(layout: Layout) -> str:
    """Return a program that answers in the place of grub-mkrelpath: what a path is called on its filesystem."""
    cases = "".join(
        f'{_pattern(filesystem.point or "")}) echo "/${{word#{(filesystem.point or "").rstrip("/")}/}}" ;;\n'
        for _, filesystem in layout.mounted
    )
    return f"""\
#!/bin/sh
for word; do :; done
case $word in
{cases}esac
"""


def _pattern(point: str) -> str:
    """Return the shell's pattern of what lies on the filesystem that is mounted at *point*."""
    return "/*" if point == "/" else f"{point} | {point}/*"
