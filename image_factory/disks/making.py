"""A disk from a tree: partitions, filesystems and boot loader, with no loop device, no device-mapper and no root."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..base import command
from ..base.errors import BuildError, CommandError
from ..base.units import format_size
from ..inside.namespaces import Namespaces, entering_argv
from ..model import Build
from ..system import appliance
from . import filesystems, grub, layouts, reproducible
from .layouts import APPLIANCE, EXT, LVM, SWAP, Filesystem, Layout, Piece

# What is in the directory $1 is not copied once more into the filesystem that it is on: an empty one like it is.  The
# directories below it that are hidden already, the others, could not be reached any more.
_HIDE = """\
place=$1; shift
[ $# = 0 ] || umount "$@"
cd "$place"
mount -t tmpfs hidden "$place"
for change in chmod chown touch; do $change --reference=. "$place"; done
"""

_COPY_FIRST = """\
target=$1; shift
for file; do [ ! -e "$file" ] || exec cp "$file" "$target"; done
echo "no package of the system has $*" >&2; exit 1
"""

# Where a signed GRUB looks for its configuration, whoever has signed it.
_VENDORS = ("debian", "ubuntu")
# What a system needs for its filesystems, and for LVM: a file of it, and Debian's package, which has what an initramfs
# needs for it, too.
_TOOLS = {
    **dict.fromkeys(EXT, ("usr/sbin/mke2fs", "e2fsprogs")),
    "xfs": ("usr/sbin/mkfs.xfs", "xfsprogs"),
    "btrfs": ("usr/bin/btrfs", "btrfs-progs"),
    LVM: ("usr/sbin/lvm", "lvm2"),
}

_SHIM = {"x86_64": "x64", "aarch64": "aa64"}
# What GRUB calls UEFI of an architecture.
EFI_KIND = {"x86_64": "x86_64-efi", "aarch64": "arm64-efi"}


def programs(layout: Layout) -> list[str]:
    """Return the programs that are needed."""
    table = ["sfdisk"] if layout.scheme.table else []
    groups = ["guestfish"] if layout.scheme.groups else []
    return [*table, *dict.fromkeys([*groups, *filesystems.programs([*layout.scheme.filesystems])])]


@dataclass(frozen=True)
class Inside:
    """A command that is run in a build's namespaces, with *text* on its stdin."""

    words: tuple[str, ...]
    text: str = ""


@dataclass(frozen=True)
class Making:
    """A command that makes a part of the disk, with *text* on its stdin; *inside* the namespaces where a tree is read.

    *pieces* are the partitions, or the volumes of LVM, that it fills, if it does.  One of libguestfs' *appliance* has
    its own environment.
    """

    words: list[str]
    inside: bool = False
    appliance: bool = False
    text: str = ""
    pieces: tuple[Piece, ...] = ()


def _put(path: Path, text: str, mode: str = "644") -> Inside:
    """Return what writes *text* to the new file *path* of a tree."""
    return Inside(("install", "-D", "-m", mode, "/dev/stdin", str(path)), text)


def place(tree: Path, point: str | None) -> Path:
    """Return where *point* of a system is in its *tree*."""
    return tree / (point or "").lstrip("/")


def check_tools(inside: Namespaces, tree: Path, layout: Layout) -> None:
    """Raise BuildError unless *tree* has the programs of its filesystems, and of LVM."""
    groups = [LVM] if layout.scheme.groups else []
    for kind in dict.fromkeys([*(filesystem.kind for filesystem in layout.scheme.filesystems), *groups]):
        path, package = _TOOLS.get(kind, ("", ""))
        try:
            inside.run("test", "-e", str(tree / path), quiet=True)
        except CommandError as error:
            what = "layout" if kind == LVM else "filesystem"
            raise BuildError(
                f"The system has no {package}, which its {what} {'with LVM' if kind == LVM else kind} needs.",
                hint=f"Add {package} to the packages, or choose another {what}.",
            ) from error


def loader_commands(tree: Path, directory: Path, layout: Layout) -> list[Inside]:
    """Return what configures GRUB and fstab of *tree*, and copies what is in no filesystem of its to *directory*.

    What is mounted on the way goes with the namespaces if one of them fails.
    """
    return [*fstab_commands(tree, layout), *(_grub_commands(tree, directory, layout) if layout.firmware else [])]


def fstab_commands(tree: Path, layout: Layout) -> list[Inside]:
    """Return what has *tree* mount what *layout* has, and makes the places for that."""
    points = [str(place(tree, filesystem.point)) for _, filesystem in layout.mounted]
    return [
        _put(tree / "etc/fstab", "".join(f"{line}\n" for line in _fstab(layout))),
        Inside(("mkdir", "-p", *points)),
    ]


def _grub_commands(tree: Path, directory: Path, layout: Layout) -> list[Inside]:
    scratch = tree / "dev"
    replaced = {"usr/sbin/grub-probe": grub.probe_script(layout)}
    if layout.at("/boot")[1].point != "/":
        replaced["usr/bin/grub-mkrelpath"] = grub.path_script(layout)
    commands = [
        Inside(("mkdir", "-p", f"{tree}/boot/grub")),
        Inside(("mount", "-t", "tmpfs", "-o", "mode=755", "scratch", str(scratch))),
    ]
    for name in ("null", "zero", "urandom"):
        commands += [_put(scratch / name, ""), Inside(("mount", "--bind", f"/dev/{name}", str(scratch / name)))]
    # grub-mkconfig names the root by its UUID only where there is such a device.
    commands += [_put(scratch / f"disk/by-uuid/{layout.uuid_of(filesystem)}", "") for _, filesystem in layout.mounted]
    # And the root on LVM by its own name, which an initramfs activates.
    volumes = [piece.device.removeprefix("/dev/") for piece, _ in layout.mounted if piece.group]
    commands += [_put(scratch / name, "") for name in volumes]
    for path, script in replaced.items():
        name = path.rpartition("/")[2]
        commands += [
            _put(scratch / name, script, "755"),
            Inside(("mount", "--bind", str(scratch / name), str(tree / path))),
        ]
    commands.append(Inside(("chroot", str(tree), "grub-mkconfig", "-o", "/boot/grub/grub.cfg")))
    commands += [Inside(("umount", str(tree / path))) for path in replaced]
    if layout.core:
        modules = tree / "usr/lib/grub/i386-pc"
        commands += [
            _put(scratch / "early.cfg", grub.core_configuration(layout)),
            Inside(tuple(grub.core_argv(tree, "/dev/early.cfg", "/dev/core.img", layout))),
            Inside(("cp", str(scratch / "core.img"), str(modules / "boot.img"), str(directory))),
            Inside(("cp", "-r", str(modules), f"{tree}/boot/grub/i386-pc")),
        ]
    if layout.esp:
        # grub.cfg loads some that are not in the signed program.
        kind = EFI_KIND[layout.arch]
        commands += [Inside(("cp", "-r", f"{tree}/usr/lib/grub/{kind}", f"{tree}/boot/grub/{kind}"))]
        for name, paths in _signed(layout.arch):
            # Ubuntu's are alternatives: links that are right only within the tree.
            commands += [Inside(("chroot", str(tree), "sh", "-c", _COPY_FIRST, "sh", f"/dev/{name}", *paths))]
            commands += [Inside(("cp", str(scratch / name), str(directory)))]
    return [*commands, Inside(("umount", "--recursive", str(scratch)))]


def _fstab(layout: Layout) -> list[str]:
    """Return the lines of fstab, the root's first."""
    lines = [
        f"UUID={layout.uuid_of(found)} {found.point} {found.kind} {found.mount_options} {found.dump} {found.order}"
        for _, found in reversed(layout.mounted)
    ]
    swap = [filesystem for filesystem in layout.scheme.filesystems if filesystem.kind == SWAP]
    return lines + [f"UUID={layout.uuid_of(found)} none swap {found.mount_options} 0 0" for found in swap]


def _signed(arch: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the signed programs of UEFI: the name of each on the ESP, and the places that it may have in a tree."""
    suffix = _SHIM[arch]
    kind = EFI_KIND[arch]
    return [
        (f"boot{suffix}.efi", (f"/usr/lib/shim/shim{suffix}.efi.signed",)),
        # Debian has the signature in the name, Ubuntu has not.
        (f"mm{suffix}.efi", (f"/usr/lib/shim/mm{suffix}.efi.signed", f"/usr/lib/shim/mm{suffix}.efi")),
        (f"grub{suffix}.efi", (f"/usr/lib/grub/{kind}-signed/grub{suffix}.efi.signed",)),
    ]


def parts(tree: Path, layout: Layout) -> list[str]:
    """Return the directories of *tree* that get filesystems of their own."""
    return [str(place(tree, filesystem.point)) for _, filesystem in layout.mounted if filesystem.point != "/"]


def making_commands(tree: Path, build: Build, layout: Layout) -> Iterator[Making]:
    """Give the commands of ``make_disk``, but for the boot loader's."""
    disk = build.disk_path
    if layout.scheme.table:
        yield Making(layouts.table_argv(disk), text=layouts.table(layout) if layout.size else "")
    if layout.date:
        yield Making(reproducible.clamp_argv(tree, layout.date), inside=True)
    for piece, filesystem in layout.mounted:
        part = place(tree, filesystem.point)
        yield from _filling(build, piece, filesystem, layout, part)
        if filesystem.point != "/":
            below = _others(tree, layout, filesystem.point or "")
            yield Making(["sh", "-e", "-c", _HIDE, "sh", str(part), *map(str, below)], inside=True)
    for piece in layout.places:
        if piece.filesystem and not piece.filesystem.point:
            for words in _empty(build, piece, piece.filesystem, layout):
                yield Making(words, appliance=words[0] == "guestfish")
    if layout.scheme.groups:
        words = filesystems.volumes_argv(disk, layout, build.directory)
        yield Making(words, appliance=True, pieces=tuple(piece for piece, _ in layout.mounted if piece.group))
        held = [str(filesystems.volume_path(build.directory, piece)) for piece in layout.volumes if piece.filesystem]
        yield Making(["rm", "-f", *held])


def _filling(build: Build, piece: Piece, filesystem: Filesystem, layout: Layout, part: Path) -> Iterator[Making]:
    """Give the commands that make *filesystem* on *piece*, with what is in *part* of the tree."""
    disk, scratch = build.disk_path, build.directory / "scratch.ext4"
    if piece.group:
        disk = scratch = filesystems.volume_path(build.directory, piece)
        if filesystem.kind not in APPLIANCE:
            yield Making(filesystems.private_argv(disk, piece.size, layout))
    if filesystem.kind in EXT:
        argvs = [filesystems.fill_ext_argv(disk, piece, filesystem, layout, part)]
    elif filesystem.kind in APPLIANCE:
        argvs = filesystems.scratch_argvs(scratch, piece, layout, part)
    else:
        made = filesystems.fat_argv(disk, piece, filesystem, layout)
        argvs = [made, filesystems.fill_fat_argv(disk, piece, part, layout)]
    for words in argvs:
        yield Making(words, inside=True, pieces=(piece,))
    if filesystem.kind in APPLIANCE and not piece.group:
        words = filesystems.appliance_argv(disk, piece, filesystem, layout, scratch)
        yield Making(words, appliance=True, pieces=(piece,))
        yield Making(["rm", str(scratch)])


def _empty(build: Build, piece: Piece, filesystem: Filesystem, layout: Layout) -> list[list[str]]:
    """Return the commands that make *filesystem*, which nothing of the tree is in, on *piece*."""
    disk, begin = build.disk_path, list[list[str]]()
    if piece.group and filesystem.kind in APPLIANCE:
        return []
    if piece.group:
        disk = filesystems.volume_path(build.directory, piece)
        begin = [filesystems.private_argv(disk, piece.size, layout)]
    if filesystem.kind == SWAP:
        return [*begin, *filesystems.swap_argvs(disk, piece, filesystem, layout, build.directory)]
    if filesystem.kind in EXT:
        return [*begin, filesystems.ext_argv(disk, piece, filesystem, layout, None)]
    if filesystem.kind in APPLIANCE:
        return [filesystems.appliance_argv(disk, piece, filesystem, layout, None)]
    return [*begin, filesystems.fat_argv(disk, piece, filesystem, layout)]


def disk_argvs(tree: Path, build: Build, layout: Layout) -> list[list[str]]:
    """Return the commands of ``make_disk``."""

    def shown(words: list[str], inside: bool = True) -> list[str]:
        return entering_argv("PID", *words, as_root=build.plan.as_root) if inside else words

    measured = [] if layout.size else [_measured_of(tree, layout, filesystem) for filesystem in layout.scheme.shares]
    argvs = [shown(filesystems.measure_argv(*places)) for places in measured if places]
    argvs += [shown(each.words, each.inside) for each in making_commands(tree, build, layout)]
    if filesystems.shrinks(layout.pieces[-1], layout) and layout.scheme.table:
        argvs.append(layouts.table_argv(build.disk_path))
    for piece in _settled(layout):
        argvs += reproducible.settle_argvs(build.disk_path, piece.offset, build.directory, layout.date or 0)
    return [*argvs, *(esp_argvs(build.disk_path, layout.esp, build.directory, layout) if layout.esp else [])]


def _settled(layout: Layout) -> list[Piece]:
    """Return the partitions whose filesystems are to tell nothing of when they were made."""
    return [each for each in layout.pieces if layout.date and each.filesystem and each.filesystem.kind == "ext4"]


def _others(tree: Path, layout: Layout, above: str = "/") -> list[Path]:
    """Return the directories of *tree* that are filesystems of their own right below that at *above*."""
    found: list[Path] = []
    for _, filesystem in reversed(layout.mounted):
        path, top = Path(filesystem.point or ""), Path(above)
        if top in path.parents and not any(other in path.parents for other in found):
            found.append(path)
    return [place(tree, str(path)) for path in found]


def _measured_of(tree: Path, layout: Layout, filesystem: Filesystem) -> tuple[Path, list[Path]] | None:
    """Return where what *filesystem* gets of *tree* is, and what of that it does not get; None if it gets nothing."""
    point = filesystem.point
    return (place(tree, point), _others(tree, layout, point)) if point else None


def fitted(inside: Namespaces, tree: Path, build: Build, layout: Layout) -> Layout:
    """Return *layout* for the smallest disk that *tree*, and what is to be free on its root, have room on."""
    least = {}
    for filesystem in layout.scheme.shares:
        places = _measured_of(tree, layout, filesystem)
        need = filesystems.measured(inside, *places) if places else filesystems.Need(0, 0)
        if filesystem.point == "/":
            need = filesystems.Need(need.size + (layout.extra or 0), need.inodes)
        least[filesystem.name] = filesystems.least_size(need, filesystem, layout, build.directory)
    return filesystems.layout_of(layout.scheme.size_around(least), layout)


def _shrunk(disk: Path, layout: Layout) -> Layout:
    """Return *layout* for *disk*, which ends where its last filesystem does now."""
    piece = layout.pieces[-1]
    missing = (piece.size - filesystems.size_of_btrfs(disk, piece)) // layouts.MIB * layouts.MIB
    os.truncate(disk, layout.size - missing)
    shorter = filesystems.layout_of(layout.size - missing, layout)
    if layout.scheme.table:
        reproducible.run(layouts.table_argv(disk), stdin=layouts.table(shorter).encode())
    return shorter


def make_disk(inside: Namespaces, tree: Path, build: Build, layout: Layout) -> None:
    """Make the disk of *build* from *tree*; *layout* has its size."""
    disk, directory = build.disk_path, build.directory
    with open(os.open(disk, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.truncate(layout.size)
    for each in making_commands(tree, build, layout):
        try:
            if each.inside:
                inside.run(*each.words)
            elif each.appliance:
                command.run(each.words, stdin=each.text.encode(), env=appliance.environment(build))
            else:
                reproducible.run(each.words, stdin=each.text.encode())
        except BuildError as error:
            piece = _filled(each, error)
            if not piece:
                raise
            raise _does_not_fit(inside, tree, build, layout, piece, error) from error
    if filesystems.shrinks(layout.pieces[-1], layout):
        layout = _shrunk(disk, layout)
    for piece in _settled(layout):
        reproducible.settle(disk, piece.offset, directory, layout.date or 0)
    if layout.core:
        grub.embed(disk, *layout.core, (directory / "boot.img").read_bytes(), (directory / "core.img").read_bytes())
    if layout.esp:
        (directory / "grub.cfg").write_text(grub.stub_configuration(layout), encoding="ascii")
        for argv in esp_argvs(disk, layout.esp, directory, layout):
            reproducible.run(argv)


def _filled(making: Making, error: BuildError) -> Piece | None:
    """Return what *making* fills: of all volumes at once the one that *error* names, if it names one."""
    several = making.appliance and any(piece.group for piece in making.pieces)
    return next((piece for piece in making.pieces if not several or f"/{piece.name}.made" in error.said), None)


def _does_not_fit(
    inside: Namespaces, tree: Path, build: Build, layout: Layout, piece: Piece, error: BuildError
) -> BuildError:
    """Return the error that *piece* can't be filled: for *error*, or as it is too small."""
    filesystem = piece.filesystem
    assert filesystem is not None and filesystem.point
    part = place(tree, filesystem.point)
    need = filesystems.measured(inside, part, _others(tree, layout, filesystem.point))
    known = f"{filesystem.point} of the tree can't be put on its filesystem of {format_size(piece.size)}"
    if filesystem.kind not in EXT:
        larger = "image-size" if layout.extra is None else "extra-size, or an image-size"
        grows = filesystem in layout.scheme.shares
        hint = f"Set a larger {larger}." if grows else f"Have {piece.name} be larger in the layout."
        return BuildError(f"{known}: {error.said}.", hint=hint)
    least = filesystems.least_size(need, filesystem, layout, build.directory)
    if least <= piece.size:
        return BuildError(f"{known}: {error.said}.", hint="The log has all of it.")
    if filesystem in layout.scheme.shares:
        size = layout.scheme.size_around({filesystem.name: least})
        hint = f"Set image-size to at least {-(-size // layouts.MIB)}M, or to fit."
    else:
        hint = f"Have {piece.name} be of at least {-(-least // layouts.MIB)}MiB in the layout."
    return BuildError(f"{known}: it needs {format_size(least)}.", hint=hint)


def esp_argvs(disk: Path, esp: layouts.Piece, directory: Path, layout: Layout) -> list[list[str]]:
    """Return the commands that put GRUB on the ESP, at the path where all firmware looks."""
    at = f"{disk}@@{esp.offset}"
    suffix = _SHIM[layout.arch]
    files = {
        f"boot{suffix}.efi": f"EFI/BOOT/BOOT{suffix.upper()}.EFI",
        f"grub{suffix}.efi": f"EFI/BOOT/grub{suffix}.efi",
        f"mm{suffix}.efi": f"EFI/BOOT/mm{suffix}.efi",
    }
    argvs = [
        ["mmd", "-D", "s", "-i", at, "::/EFI", "::/EFI/BOOT", *(f"::/EFI/{vendor}" for vendor in _VENDORS)],
        *(["mcopy", "-o", "-i", at, str(directory / name), f"::/{place}"] for name, place in files.items()),
        *(["mcopy", "-o", "-i", at, str(directory / "grub.cfg"), f"::/EFI/{vendor}/grub.cfg"] for vendor in _VENDORS),
    ]
    return [reproducible.with_date(layout.date, *words) for words in argvs]
