"""Files that stand for the devices of a disk, for GRUB's own programs in a tree: where the disk can't be attached.

GRUB writes to a disk that is a file, and looks for its files on filesystems that are files, if only mountinfo says so.
What it has written before the first partition, or to the one that is for it, is on the disk later.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..base.errors import BuildError
from . import filesystems, grub, layouts
from .layouts import EXT, MIB, Filesystem, Layout, Piece
from .making import Inside, place

# What the first loop device is called, which no user of these has.
NAME = "loop0"
_BOOT = "/boot"
_OWN = Path("/dev/image-factory")
_WRAPPERS = Path("usr/local/sbin")
# The boot sector: its code, and where the table of MBR begins.
_CODE = 440
_FILE_SIZE = 64 * MIB
_NOMINAL_SIZE = 64 << 30

# $1 is the tree, $2 the build's directory; the others are "DEVICE:FILE:POINT".  What is below /boot is a filesystem of
# its own for GRUB, and gets what is there; one of memory is as good as any.
_STAND = """\
tree=$1 build=$2; shift 2
: >"$build/run/mounted"
for each; do
    point=${each##*:} name=${each%%:*} file=${each#*:}
    : >"/dev/$name"
    # The second one is what the tree has as /dev.
    for place in /dev "$build/dev"; do mount --bind "${file%:*}" "$place/$name"; done
    case $point in
    /boot*)
        mkdir "$build/run/held"
        cp -a "$tree$point/." "$build/run/held"
        mount -t tmpfs -o mode=755 boot "$tree$point"
        cp -a "$build/run/held/." "$tree$point"
        rm -rf "$build/run/held"
        echo "$tree$point" >>"$build/run/mounted" ;;
    esac
done
"""
_TAKE = """\
tree=$1 build=$2
tac "$build/run/mounted" | while read -r point; do
    mkdir "$build/run/held"
    cp -a "$point/." "$build/run/held"
    umount "$point"
    find "$point" -mindepth 1 -delete
    cp -a "$build/run/held/." "$point"
    rm -rf "$build/run/held"
done
rm "$build/run/mounted"
rm -rf "$tree/usr/local/sbin/grub-install" "$tree/usr/local/sbin/grub-mkconfig"
"""

# In the tree, where they are found before GRUB's own.
_INSTALL = f"""\
#!/bin/sh
# Shows GRUB files in the place of the devices of a disk, and is gone when the image is made.
mount --bind {_OWN}/mountinfo /proc/$$/mountinfo && exec /usr/sbin/grub-install "$@"
"""
_CONFIGURE = f"""\
#!/bin/sh
# Shows GRUB files in the place of the devices of a disk, and is gone when the image is made.
exec unshare --mount --propagation unchanged sh -c '
for name in grub-probe grub-mkrelpath; do
    [ ! -e /usr/bin/$name ] || mount --bind {_OWN}/$name /usr/bin/$name
    [ ! -e /usr/sbin/$name ] || mount --bind {_OWN}/$name /usr/sbin/$name
done
exec /usr/sbin/grub-mkconfig "$@"' sh "$@"
"""

PROGRAMS = ("sfdisk", "mount", "umount", "truncate")


def unsuited(layout: Layout) -> Filesystem | None:
    """Return a filesystem of *layout* that no file stands for, None if there is none."""
    found = (each for _, each in _shown(layout) if each.kind not in (*EXT, "vfat"))
    return next(found, None)


def _shown(layout: Layout) -> Iterator[tuple[Piece, Filesystem]]:
    """Give what GRUB looks at: the root, and what is mounted at /boot or below it; a place before those below it."""
    for piece, filesystem in reversed(layout.mounted):
        if filesystem.point == "/" or f"{filesystem.point}/".startswith(f"{_BOOT}/"):
            yield piece, filesystem


def disk_of(top: Path) -> Path:
    """Return the file that stands for the disk, below the directory *top* that a build has for its elements."""
    return top / "run/disk.raw"


def commands(tree: Path, top: Path, layout: Layout) -> list[Inside]:
    """Return what has files stand for the devices of a disk with *layout*, in the namespaces of a build."""
    disk = disk_of(top)
    layout = layout if layout.size else replace(layout, size=_NOMINAL_SIZE)
    found = [Inside(("truncate", f"--size={layout.size}", str(disk)))]
    if layout.scheme.table:
        found.append(Inside(tuple(layouts.table_argv(disk)), layouts.table(layout)))
    devices = [f"{NAME}:{disk}:"]
    lines = []
    for number, (piece, filesystem) in enumerate(_shown(layout), 2):
        file = top / f"run/{piece.name}.filesystem"
        whole = replace(piece, offset=0, size=_FILE_SIZE)
        if filesystem.kind in EXT:
            made = filesystems.ext_argv(file, whole, filesystem, layout, None)
        else:
            made = filesystems.fat_argv(file, whole, filesystem, layout)
        found += [Inside(("truncate", f"--size={_FILE_SIZE}", str(file))), Inside(tuple(made))]
        name = f"{NAME}p{piece.number}" if piece.number else "loop1"
        devices.append(f"{name}:{file}:{filesystem.point}")
        lines.append(f"{number} 1 7:{number} / {filesystem.point} rw - {filesystem.kind} /dev/{name} rw\n")
    found.append(Inside(("sh", "-e", "-c", _STAND, "sh", str(tree), str(top), *devices)))
    own = {
        _OWN / "mountinfo": "".join(lines),
        _OWN / "grub-probe": grub.probe_script(layout),
        _OWN / "grub-mkrelpath": grub.path_script(layout),
        place(tree, str(_WRAPPERS / "grub-install")): _INSTALL,
        place(tree, str(_WRAPPERS / "grub-mkconfig")): _CONFIGURE,
    }
    return [*found, *(Inside(("install", "-D", "-m", "755", "/dev/stdin", str(path)), own[path]) for path in own)]


def take_argv(tree: Path, top: Path) -> list[str]:
    """Return the command that has all be in the *tree* again, with nothing in it of what stood for devices."""
    return ["sh", "-e", "-c", _TAKE, "sh", str(tree), str(top)]


def copy_loader(source: Path, disk: Path, layout: Layout) -> None:
    """Copy GRUB, if it is on the disk that *source* stands for, to the *disk* with *layout*."""
    with source.open("rb") as file:
        code = os.pread(file.fileno(), _CODE, 0)
        if not any(code):
            return
        boots = replace(layout, firmware="bios")
        kinds = [piece.kind for piece in layout.pieces]
        if (layout.scheme.table == "gpt" and layouts.BIOS_BOOT not in kinds) or not layout.scheme.table:
            raise BuildError(
                "The boot loader has no place of its own on the disk.",
                hint="Have a partition of type EF02 in the layout, or build as root.",
            )
        nominal = replace(boots, size=os.fstat(file.fileno()).st_size)
        if boots.core is None or nominal.core != boots.core:
            raise BuildError(
                "The boot loader's place depends on the size of the disk, which is known when all else is done.",
                hint="Have its partition (EF02) be the first one, or give an image-size.",
            )
        offset, room = boots.core
        with disk.open("r+b") as target:
            os.pwrite(target.fileno(), code, 0)
            for start in range(0, room, MIB):
                os.pwrite(
                    target.fileno(), os.pread(file.fileno(), min(MIB, room - start), offset + start), offset + start
                )
