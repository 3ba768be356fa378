"""Layouts of disks that are made from trees: built in, and in diskimage-builder's notation."""

import json
import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import pytest

from image_factory import pipeline
from image_factory.base import command
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration import files
from image_factory.disks import filesystems, grub, layouts, making, notation
from image_factory.disks.layouts import MIB, Layout, Scheme
from image_factory.inside.namespaces import Namespaces
from image_factory.model import Build, Plan
from image_factory.sources import bootstrap
from image_factory.sources.bootstrap import recipe

from ..conftest import REPOSITORY, run, shown

ROOT = layouts.root_of("ext4", "the-label", ["-m", "1"])


def read(directory: Path, text: str) -> Scheme:
    path = directory / "own.yaml"
    path.write_text(text)
    return notation.read(path, ROOT)


def written(directory: Path, layout: Layout) -> list[dict[str, object]]:
    """Return the partitions of *layout* as sfdisk reads them from a disk that it has written."""
    disk = directory / "disk.raw"
    with disk.open("xb") as file:
        file.truncate(layout.size)
    subprocess.run(layouts.table_argv(disk), input=layouts.table(layout), text=True, check=True)
    run("sfdisk", "--verify", disk)
    found: list[dict[str, object]] = json.loads(run("sfdisk", "--json", disk).stdout)["partitiontable"]["partitions"]
    return found


@pytest.mark.parametrize("name", ["bios", "uefi", "hybrid"])
@pytest.mark.parametrize("size", [200 * MIB, 2000 * MIB + 12345])
def test_built_in(tmp_path: Path, name: str, size: int) -> None:
    layout = Layout(layouts.scheme(name, "x86_64", ROOT), name, "x86_64", size // 512 * 512, layouts.random_identity())
    found = written(tmp_path, layout)
    assert [(each["start"], each["size"], each["type"], each["name"]) for each in found] == [
        (piece.offset // 512, piece.size // 512, piece.kind, piece.name) for piece in layout.pieces
    ]
    assert [each["uuid"] for each in found] == [layout.partition_uuid(piece).upper() for piece in layout.pieces]
    assert (layout.core is not None, layout.esp is not None) == (name != "uefi", name != "bios")
    # The root is last, and ends less than 2 MiB before the disk does.
    assert layout.root == layout.pieces[-1]
    assert size - layout.root.offset - layout.root.size < 2 * MIB
    assert layout.scheme.size_around({"root": layout.root.size}) <= size


def test_smallest_disk_of_any_layout(tmp_path: Path) -> None:
    """A mebibyte less has no room for one of those that get a share; the others have their size."""
    (tmp_path / "gpt.yaml").write_text(GPT)
    scheme = notation.read(tmp_path / "gpt.yaml", ROOT)
    assert [filesystem.point for filesystem in scheme.shares] == ["/srv/data", "/"]
    for least in ({"mkfs_root": 700 * MIB, "data_fs": 10 * MIB}, {"mkfs_root": 10 * MIB, "data_fs": 50 * MIB}):
        names = {filesystem.name: least[filesystem.name] for filesystem in scheme.shares}
        size = scheme.size_around(names)

        def room(size: int) -> dict[str, int]:
            return {each.filesystem.name: each.size for each in scheme.pieces(size) if each.filesystem}

        assert all(room(size)[name] >= wanted for name, wanted in names.items())
        assert any(room(size - MIB)[name] < wanted for name, wanted in names.items())
    # All that is of a size of its own fits as it is.
    (tmp_path / "fixed.yaml").write_text(GPT.replace("25%", "5MiB").replace("100%", "90MiB"))
    fixed = notation.read(tmp_path / "fixed.yaml", ROOT)
    assert fixed.shares == []
    last = fixed.pieces(fixed.size_around({}))[-1]
    assert last.size == 90 * MIB
    assert fixed.size_around({}) - last.offset - last.size == MIB


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_shell_of_the_appliance_looks_for_the_disk(tmp_path: Path, kind: str) -> None:
    """Its kernel may call the first of two disks sdb; only commands of libguestfs' own know which one is meant."""
    root = layouts.root_of(kind, "", [])
    layout = Layout(
        layouts.scheme("bios", "x86_64", root), None, "x86_64", 512 * MIB, layouts.random_identity(), extra=0
    )
    words = filesystems.appliance_argv(tmp_path / "disk", layout.root, root, layout, tmp_path / "scratch")
    scripts = [words[number + 2] for number, word in enumerate(words) if word == "debug"]
    assert "devices/*:0:0:0/block/sd*" in scripts[0] and f"mkfs.{kind} " in scripts[0]
    assert not [script for script in scripts if re.search("/dev/sd[a-z]", script)]
    # btrfs alone can be made smaller.
    assert ["btrfs filesystem resize" in script for script in scripts[1:]] == [True] * (kind == "btrfs")


def test_files_on_the_way_to_the_appliance_are_private(tmp_path: Path) -> None:
    """They have the system's passwords, and root's working directory lets others through."""
    root = layouts.root_of("xfs", "", [])
    layout = Layout(layouts.scheme("bios", "x86_64", root), None, "x86_64", 512 * MIB, layouts.random_identity())
    scratch = tmp_path / "scratch"
    made, *_ = filesystems.scratch_argvs(scratch, layout.root, layout, tmp_path)
    run(*made)
    assert (scratch.stat().st_mode & 0o777, scratch.stat().st_size > layout.root.size) == (0o600, True)


def test_one_filesystem(tmp_path: Path) -> None:
    layout = Layout(layouts.scheme("filesystem", "x86_64", ROOT), None, "x86_64", 10 * MIB + 5)
    [piece] = layout.pieces
    assert (piece.offset, piece.size, layout.core, layout.esp) == (0, 10 * MIB, None, None)
    assert layout.scheme.size_around({"root": 10 * MIB - 1}) == 10 * MIB
    build = Build(cast(Plan, None), tmp_path, "vm")
    words = [each.words[0] for each in making.making_commands(tmp_path, build, layout)]
    assert words == ["sh"]


GPT = """\
- local_loop:
    name: image0
- partitioning:
    base: image0
    label: gpt
    partitions:
    - name: ESP
      type: 'EF00'
      size: 64MiB
      mkfs:
        type: vfat
        mount:
          mount_point: /boot/efi
          fstab:
            options: "umask=0077,nofail"
            fsck-passno: 1
    - name: BSP
      type: 'EF02'
      size: 8 MiB
    - name: boot
      size: 0.3GB
      mkfs: {type: ext2, label: boot, mount: {mount_point: /boot}}
    - name: data
      size: 25%
    - name: root
      size: 100%
      mkfs:
        mount:
          mount_point: /
- mkfs:
    name: data_fs
    base: data
    type: ext3
    opts: "-i 4096 -m 0"
    uuid: 11111111-2222-3333-4444-555555555555
- mount: {base: data_fs, mount_point: /srv/data}
- fstab: {base: mount_data_fs, options: "noatime,nodev", dump-freq: 1}
"""


def test_notation_of_a_tree_and_of_a_graph(tmp_path: Path) -> None:
    layout = Layout(read(tmp_path, GPT), "hybrid", "x86_64", 3 << 30, layouts.random_identity())
    found = written(tmp_path, layout)
    assert [each["name"] for each in found] == ["ESP", "BSP", "boot", "data", "root"]
    sizes = [piece.size for piece in layout.pieces]
    left = (3 << 30) - 2 * MIB - 72 * MIB - 286 * MIB
    assert sizes[:3] == [64 * MIB, 8 * MIB, 300_000_000 // MIB * MIB]
    assert sizes[3] == left // 4 // MIB * MIB
    assert sum(sizes) == (3 << 30) - 2 * MIB
    data = layout.at("/srv/data/a")[1]
    assert (data.kind, data.options, data.uuid[:9]) == ("ext3", ("-i", "4096", "-m", "0"), "11111111-")
    # What the file is silent of comes from the settings.
    root = layout.at("/srv")[1]
    assert (root.kind, root.label, root.options) == ("ext4", "the-label", ("-m", "1"))
    [fstab] = [each for each in making.loader_commands(tmp_path, tmp_path, layout) if "fstab" in each.words[-1]]
    esp, boot = layout.at("/boot/efi")[1], layout.at("/boot")[1]
    assert fstab.text.splitlines() == [
        f"UUID={layout.uuid_of(root)} / ext4 errors=remount-ro 0 1",
        f"UUID={layout.uuid_of(boot)} /boot ext2 defaults 0 2",
        f"UUID={layout.uuid_of(esp)} /boot/efi vfat umask=0077,nofail 0 1",
        f"UUID={data.uuid} /srv/data ext3 noatime,nodev 1 2",
    ]
    assert len(layout.uuid_of(esp)) == 9


def test_notation_of_mbr(tmp_path: Path) -> None:
    """Partitions that are not primary are logical ones, each with a table of its own."""
    text = """\
- local_loop: {name: image0}
- partitioning:
    base: image0
    label: mbr
    partitions:
    - {name: root, type: 0x83, flags: [boot, primary], size: 100MiB, mkfs: {mount: {mount_point: /}}}
    - {name: swap, type: 82, size: 20MiB, mkfs: {type: swap, mount: {mount_point: swap}}}
    - {name: rest, size: 100%}
"""
    layout = Layout(read(tmp_path, text), "bios", "x86_64", 200 * MIB, layouts.random_identity())
    found = written(tmp_path, layout)
    assert [(each["node"][-1], each["type"], each.get("bootable")) for each in found] == [  # type: ignore[index]
        ("1", "83", True), ("2", "5", None), ("5", "82", None), ("6", "83", None),
    ]  # fmt: skip
    assert [each["start"] for each in found] == [piece.offset // 512 for piece in layout.pieces]
    assert layout.core == (512, MIB - 512)
    layouts.check_firmware(layout.scheme, "bios", "x")


def test_notation_of_lvm(tmp_path: Path) -> None:
    """Sizes are of whole extents, shares those of the group or of what is left of it."""
    layout = Layout(read(tmp_path, LVM), "bios", "x86_64", 5 << 30, layouts.random_identity())
    found = written(tmp_path, layout)
    assert [each["type"] for each in found][1] == "E6D6D379-F507-44C2-A23C-238F2A3DF928"
    # Of 2 GiB a mebibyte is LVM's own, of what is left of the disk a mebibyte, too.
    extents = 511 + (3 * 1024 - 3 - 1) // 4
    sizes = [2, extents * 23 // 100, extents * 57 // 100]
    assert [piece.size // layouts.EXTENT for piece in layout.volumes] == [*sizes, extents - sum(sizes)]
    [swap, root, *_] = layout.volumes
    assert (root.name, root.group, root.device) == ("lv-root", "the-vg", "/dev/mapper/the--vg-lv--root")
    assert (layout.root, layout.at("/var/log")[0].name) == (root, "lv_var")
    assert [each.name for each in layout.scheme.shares] == ["fs_root", "fs_var", "fs_home"]
    commands = making.loader_commands(tmp_path, tmp_path, layout)
    [fstab] = [each for each in commands if "fstab" in each.words[-1]]
    assert root.filesystem and swap.filesystem
    assert fstab.text.splitlines() == [
        f"UUID={layout.uuid_of(root.filesystem)} / xfs rw,relatime 0 1",
        f"UUID={layout.uuid_of(layout.at('/var')[1])} /var ext4 defaults 0 2",
        f"UUID={layout.uuid_of(swap.filesystem)} none swap sw 0 0",
    ]
    [core] = [each.words for each in commands if "grub-mkimage" in each.words]
    assert core[-1] == "lvm"
    probe = tmp_path / "probe"
    probe.write_text(grub.probe_script(layout))

    def said(*words: str) -> str:
        return run("sh", probe, *words).stdout.strip()

    assert said("--target=device", "/boot") == root.device
    for target, answer in {"abstraction": "lvm", "partmap": "gpt", "fs": "xfs", "partuuid": ""}.items():
        assert said("--device", root.device, f"--target={target}") == answer
    assert said("--device", root.device, "--target=fs_uuid") == layout.uuid_of(layout.at("/")[1])


def test_lvm_has_a_uuid_of_the_disk(tmp_path: Path) -> None:
    """It is the same each time; its form is LVM's."""
    scheme = read(tmp_path, LVM)
    layout = Layout(scheme, "bios", "x86_64", 5 << 30, layouts.derived_identity("x"))
    words = filesystems.volumes_argv(tmp_path / "disk", layout, tmp_path)
    script = words[words.index("debug") + 2]
    found = re.findall("--uuid ([0-9a-f]{6}(?:-[0-9a-f]{4}){5}-[0-9a-f]{6}) ", script)
    assert found == [layouts.derived_identity("x").lvm(name) for name in ("pv", "pv2")]
    # The swap's, the root's and that of /var: nothing is read for what is empty.
    assert [word for word in words if word.endswith(".volume")] == [
        str(tmp_path / f"{name}.volume") for name in ("lv_swap", "lv-root", "lv_var")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("10MB", "9GiB"), "line 25: lv_swap of 9.0 GiB does not fit: 5.0 GiB of the group the-vg are left."),
        (("57%VG", "100%VG"), "line 31: lv_var of 5.0 GiB does not fit: 3.8 GiB of the group the-vg are left."),
        (("57%VG", "100%FREE"), "line 32: lv_home of 0 B does not fit: 0 B of the group the-vg are left."),
        (("2GiB", "4MiB"), "line 21: main of 4.0 MiB is too small for LVM."),
    ],
)
def test_volumes_that_do_not_fit(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _ = Layout(read(tmp_path, LVM.replace(*change)), "bios", "x86_64", 5 << 30).places
    assert caught.value.message == f"{tmp_path}/own.yaml, {message}"


def test_smallest_disk_with_lvm(tmp_path: Path) -> None:
    scheme = read(tmp_path, LVM)
    least = {"fs_root": 500 * MIB, "fs_var": 1800 * MIB, "fs_home": 256 * MIB}
    size = scheme.size_around(least)

    def room(size: int) -> dict[str, int]:
        return {each.filesystem.name: each.size for each in scheme.volumes(size) if each.filesystem}

    assert all(room(size)[name] >= wanted for name, wanted in least.items())
    assert any(room(size - MIB)[name] < wanted for name, wanted in least.items())
    # On partitions of sizes of their own nothing can grow.
    assert read(tmp_path, LVM.replace("100%}", "1GiB}")).shares == []


def test_notation_without_a_table(tmp_path: Path) -> None:
    text = "- local_loop:\n    name: image0\n    mkfs:\n      name: mkfs_root\n      mount: {mount_point: /}\n"
    assert read(tmp_path, text) == Scheme(
        "", (layouts.Wanted("root", "", filesystem=layouts.root_of("ext4", "the-label", ["-m", "1"], "mkfs_root")),)
    )


# A change of GPT, and what is said of it after the name of the file.
WRONG = {
    "no list": (GPT, "a: b\n", "line 1: a layout is a list of modules."),
    "no YAML": ("base: image0", "base: [image0", "line 5: it is no well-formed YAML: "),
    "module": ("- mkfs:\n", "- luks:\n", "line 30: luks: there is no such module."),
    "key": ("opts:", "optz:", "line 34: optz: mkfs has no such key."),
    "key of a disk": ("name: image0", "name: image0\n    size: 4G", "line 3: size: local_loop has no such key."),
    "key twice": ("    type: ext3\n", "    type: ext3\n    type: ext4\n", "line 34: type: it is there twice."),
    "disk": ("name: image0", "name: image1", "line 1: local_loop: there is one disk, and its name is image0."),
    "no disk": ("- local_loop:\n    name: image0\n", "", "base: partitioning partitioning_image0 lies on image0, "),
    "base": ("base: data\n", "base: date\n", "line 30: base: mkfs data_fs lies on date, which is nowhere."),
    "base is itself": ("base: data\n", "base: data_fs\n", "line 30: base: mkfs data_fs lies on data_fs, which is"),
    "circle": ("base: data\n", "base: mount_data_fs\n", "data_fs lies on mount_data_fs, which is a mount."),
    "no base": ("    base: data\n", "", "line 30: mkfs: it lacks a base."),
    "same base": ("base: data\n", "base: boot\n", "line 30: base: mkfs_boot of line 22 lies on boot, too."),
    "name twice": ("name: data_fs", "name: ESP", "line 30: ESP: line 7 has this name, too."),
    "name": ("name: data_fs", "name: a/b", "line 31: name: 'a/b' is not accepted, only letters, digits and . _ -."),
    "label of a table": ("label: gpt", "label: apm", "line 5: label: 'apm' is not accepted, only gpt or mbr."),
    "type": ("'EF02'", "'EF09'", "line 18: type: EF09 is not known."),
    "size": ("64MiB", "64 mebi", "line 9: size: mebi is no unit."),
    "size without a number": ("64MiB", "large", "line 9: size: 'large' is not accepted, only a size such as 550MiB"),
    "share": ("25%", "125%", "line 24: size: 125% is no share of what is left."),
    "no share": ("25%", "0%", "line 24: size: 0% is no share of what is left."),
    "tiny": ("64MiB", "64", "line 9: size: 64 is less than 1 MiB."),
    "no size": ("      size: 25%\n", "", "line 23: size: data lacks it."),
    "filesystem": ("type: ext3", "type: zfs", "line 33: type: 'zfs' is not accepted, only ext2, ext3, ext4, "),
    "no filesystem": ("    type: ext3\n", "", "line 30: type: mkfs data_fs lacks it."),
    "label": ("label: boot", "label: 0123456789abcdefg", "line 22: label: ext2 has labels of at most 16 characters."),
    "label twice": ("    type: ext3\n", "    type: ext3\n    label: boot\n", "line 34: label: the filesystem of "),
    "uuid": ("11111111-2222", "11111111-", "line 35: uuid: '11111111--3333"),
    "two roots": ("/srv/data", "/", "mount_point: the mount of line 28 has /, too."),
    "no root": ("mount_point: /\n", "mount_point: /r\n",
        "line 1: mount: no filesystem has the mount_point /, "),
    "mount point": ("/srv/data", "srv/data", "line 36: mount_point: 'srv/data' is not accepted, only a path from /."),
    "upwards": ("/srv/data", "/srv/../data", "line 36: mount_point: it has no . and .. in it."),
    "fstab": ("dump-freq: 1", "dump-freq: often", "line 37: dump-freq: 'often' is not accepted, only a digit."),
    "flags": ("size: 25%", "size: 25%\n      flags: [primary]", "line 25: flags: primary is a flag of mbr."),
    "partitions": ("- name: ESP", "name: ESP", "it is no"),
}  # fmt: skip


# As diskimage-builder's element block-device-efi-lvm has it, with a boot partition, one more of LVM, and swap.
LVM = """\
- local_loop: {name: image0}
- partitioning:
    base: image0
    label: gpt
    partitions:
    - {name: BSP, type: EF02, size: 1MiB}
    - name: main
      type: 8E00
      flags: [boot]
      size: 2GiB
    - {name: more, size: 100%}
- lvm:
    name: lvm
    base: [main, more]
    pvs:
    - name: pv
      base: main
      options: ["--force"]
    - {name: pv2, base: more}
    vgs:
    - name: the-vg
      base: ["pv", pv2]
      options: ["--force"]
    lvs:
    - name: lv_swap
      base: the-vg
      size: 10MB
    - name: lv-root
      base: the-vg
      extents: 23%VG
    - {name: lv_var, base: the-vg, extents: 57%VG}
    - {name: lv_home, base: the-vg, extents: 100%FREE}
- mkfs: {base: lv_swap, type: swap, mount: {mount_point: swap}}
- mkfs:
    name: fs_root
    base: lv-root
    type: xfs
    label: img-rootfs
    mount: {mount_point: /, fstab: {options: "rw,relatime", fsck-passno: 1}}
- mkfs: {name: fs_var, base: lv_var, type: ext4, mount: {mount_point: /var}}
- mkfs: {name: fs_home, base: lv_home, type: btrfs}
"""

WRONG_LVM = {
    "no name": ("    name: lvm\n", "", "line 12: lvm: it lacks a name."),
    "no groups": ("    vgs:\n", "    vgz:\n", "line 20: vgz: lvm has no such key."),
    "empty list": (LVM[LVM.index("    lvs:") : LVM.index("- mkfs")], "    lvs: []\n",
        "line 24: lvs: it is no list of lvs."),
    "no base": ("      base: main\n", "", "line 16: pv: it lacks a base."),
    "base": ("base: main", "base: mane", "line 16: base: pv pv lies on mane, which is nowhere."),
    "base of lvm": ("[main, more]", "[main, image0]", "line 12: base: lvm lvm lies on image0, which is a local_loop."),
    "disk": ("base: main", "base: image0", "line 16: base: pv pv lies on image0, which is a local_loop."),
    "unknown pv": ('["pv", pv2]', "[pv, pv3]", "line 21: base: vg the-vg lies on pv3, which is nowhere."),
    "partition as pv": ('["pv", pv2]', "[pv, more]", "line 21: base: vg the-vg lies on more, which is a partition."),
    "pv in no group": ('["pv", pv2]', "[pv]", "line 19: pvs: pv2 is in none of the vgs."),
    "pv in two": ("    lvs:\n", "    - {name: vg2, base: pv}\n    lvs:\n",
        "line 24: base: the-vg of line 21 lies on pv, too."),
    "partition of two": ("base: more}", "base: main}", "line 19: base: pv of line 16 lies on main, too."),
    "filesystem on it": ("- mkfs: {base: lv_swap", "- mkfs: {base: main", "base: pv of line 16 lies on main, too."),
    "group twice": ("    lvs:\n", "    - {name: the-vg, base: pv2}\n    lvs:\n",
        "line 24: the-vg: line 21 has this name, too."),
    "no group": ("base: the-vg, extents: 57%VG", "base: vg, extents: 57%VG",
        "line 31: base: lv lv_var lies on vg, which is nowhere."),
    "name of a group": ("name: the-vg", 'name: "a b"',
        "line 21: name: 'a b' is not accepted, only letters, digits and"),
    "thin": ("size: 10MB", "size: 10MB\n      type: thin", "line 28: type: volumes of thin pools can't be made."),
    "thin pool": ("10MB", "10MB\n      thin-pool: p", "line 28: thin-pool: volumes of thin pools can't be made."),
    "no size": ("      size: 10MB\n", "", "line 25: size: lv_swap has no size."),
    "two sizes": ("10MB", "10MB\n      extents: 2", "line 25: size: lv_swap has it and extents."),
    "small": ("10MB", "4MB", "line 27: size: it is less than an extent of 4 MiB."),
    "share": ("10MB", "10%", "line 27: size: a volume has no share."),
    "extents": ("57%VG", "57%",
        "line 31: extents: '57%' is not accepted, only a number of extents, or a share such as"),
    "all": ("57%VG", "157%VG", "line 31: extents: 157% is no share of a group."),
    "options": ('["--force"]', "[--metadatasize, 9m]",
        "line 18: options: '--metadatasize' is not accepted, only --force"),
    "options of a volume": ("10MB", "10MB\n      options: -y", "line 28: options: it is no list of words."),
    "mount of nothing": ("base: lv_var, type", "base: lv_vax, type",
        "base: mkfs fs_var lies on lv_vax, which is nowhere."),
    "module": ("- lvm:\n", "- vg:\n", "line 12: vg: there is no such module."),
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wrong"), [*((GPT, each) for each in WRONG.values()), *((LVM, each) for each in WRONG_LVM.values())],
    ids=[*WRONG, *(f"lvm: {name}" for name in WRONG_LVM)],
)  # fmt: skip
def test_error_names_file_line_and_key(tmp_path: Path, text: str, wrong: tuple[str, str, str]) -> None:
    before, after, message = wrong
    assert before in text
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text.replace(before, after, 1))
    assert caught.value.message.startswith(f"{tmp_path}/own.yaml, line ")
    assert message in caught.value.message
    assert caught.value.message.count("\n") == 0


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("the-vg", "disk", "line 21: name: LVM takes disk for no name of a group, as it is one in /dev."),
        ("the-vg", "sda", "line 21: name: LVM takes sda for no name of a group, as it is one in /dev."),
        ("lv_var", "root_tmeta", "line 31: name: LVM keeps names such as root_tmeta for itself."),
        ("lv_var", "snapshot1", "line 31: name: LVM keeps names such as snapshot1 for itself."),
        ("lv_var", 119 * "v", "line 31: name: with the-vg it is longer than LVM takes it."),
        ("lv_var", "disk_meta", None),
        ("the-vg", "disks", None),
    ],
)
def test_names_that_lvm_refuses(tmp_path: Path, name: str, other: str, message: str | None) -> None:
    text = LVM.replace(name, other)
    if message is None:
        read(tmp_path, text)
        return
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text)
    assert caught.value.message == f"{tmp_path}/own.yaml, {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("64MiB", "5GiB"), "line 7: ESP of 5.0 GiB does not fit: 3.0 GiB of the disk are left."),
        (("0.3GB", "100%"), "line 23: data does not fit: 0 B of the disk are left."),
    ],
)
def test_partitions_that_do_not_fit(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, GPT.replace(*change)).pieces(3 << 30)
    assert caught.value.message == f"{tmp_path}/own.yaml, {message}"


@pytest.mark.parametrize(
    ("change", "firmware", "message"),
    [
        (("EF02", "8300"), "bios", "Add a BIOS boot partition"),
        (("EF00", "0700"), "uefi", "Add an EFI system partition"),
        (("/boot/efi", "/efi"), "hybrid", "Add an EFI system partition"),
        (("EF02", "8300"), "uefi", None),
        (("EF00", "0700"), "bios", None),
    ],
)
def test_firmware_boots_the_layout(tmp_path: Path, change: tuple[str, str], firmware: str, message: str | None) -> None:
    scheme = read(tmp_path, GPT.replace(*change))
    if message is None:
        layouts.check_firmware(scheme, firmware, "it")
        return
    with pytest.raises(ConfigurationError, match=f"it has no place .* firmware = {firmware} starts") as caught:
        layouts.check_firmware(scheme, firmware, "it")
    assert message in str(caught.value.hint)


def test_grub_is_told_of_a_boot_of_its_own(tmp_path: Path) -> None:
    layout = Layout(read(tmp_path, GPT), "hybrid", "x86_64", 3 << 30, layouts.random_identity())
    boot, root = (layout.uuid_of(layout.at(path)[1]) for path in ("/boot", "/"))
    assert grub.core_configuration(layout) == (
        f"search --no-floppy --fs-uuid --set=root {boot}\nset prefix=($root)/grub\n"
    )
    probe, path = tmp_path / "probe", tmp_path / "path"
    probe.write_text(grub.probe_script(layout))
    path.write_text(grub.path_script(layout))

    def said(script: Path, *words: str) -> str:
        return run("sh", script, *words).stdout.strip()

    assert said(probe, "--target=device", "/boot") == f"/dev/disk/by-uuid/{boot}"
    assert said(probe, "-t", "fs_uuid", "/usr/share/grub") == root
    assert said(probe, "--device", f"/dev/disk/by-uuid/{boot}", "--target=fs_uuid") == boot
    assert said(probe, "--target=fs", "/boot/grub") == "ext2"
    assert said(probe, "--target=partmap", "/") == "gpt"
    assert said(probe, "--target=partuuid", "/") == layout.partition_uuid(layout.root)
    assert said(path, "/boot/vmlinuz-6") == "/vmlinuz-6"
    assert said(path, "-r", "/usr/share/grub/unicode.pf2") == "/usr/share/grub/unicode.pf2"


def make_plan(directory: Path, text: str) -> Plan:
    (directory / "system.yaml").write_text(
        "suite: trixie\nsources: [deb http://mirror.example.com/debian trixie main]\n"
    )
    path = directory / "own.conf"
    path.write_text(f"[x]\nsource = bootstrap\nbootstrap = {directory}/system.yaml\n{text}\n")
    configuration = files.Configuration({files.FILE_VARIABLE: str(path)})
    return pipeline.make_plan(configuration, "x", {"output-dir": str(directory)})


@pytest.mark.parametrize(
    ("text", "firmware", "table"),
    [
        ("arch = x86_64", "bios", ["bios", "root"]),
        ("arch = x86_64\nlayout = hybrid", "hybrid", ["bios", "esp", "root"]),
        ("layout = uefi\nfirmware = uefi", "uefi", ["esp", "root"]),
        ("layout = filesystem\nfirmware = hybrid", "hybrid", ["root"]),
    ],
)
def test_layout_and_firmware(tmp_path: Path, text: str, firmware: str, table: list[str]) -> None:
    """A layout that is named as a firmware says both; a layout that has no other name is the firmware's."""
    plan = make_plan(tmp_path, text)
    assert plan.settings.firmware == firmware
    assert [piece.name for piece in bootstrap.layout_of(plan).pieces] == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layout = uefi\nfirmware = hybrid", "[x] has layout = uefi and firmware = hybrid."),
        ("layout = raid", "[x] layout: 'raid' is not accepted, only bios, uefi, hybrid, filesystem, or the path"),
        ("layout = filesystem\ntest-boot = yes", "[x] test-boot = yes: a filesystem without a partition table"),
        ("layout = filesystem\ntest-boot = yes\nformat = netboot, tar", "[x] test-boot = yes: a filesystem without a"),
        ("layout = filesystem\ntest-boot = yes\nformat = netboot\nkeep-raw = yes", "[x] test-boot = yes: a filesystem"),
        ("layout = DIR/none.yaml", "The layout DIR/none.yaml can't be read: No such file or directory."),
        ("layout = DIR/gpt.yaml\nimage-size = 100M\nfirmware = uefi", "DIR/gpt.yaml, line 20: boot of 286.1 MiB"),
        ("layout = DIR/uefi.yaml\nfirmware = bios", "The layout DIR/uefi.yaml has no place for the boot loader that"),
        ("layout = DIR/lvm.yaml\nimage-size = 4G\nmount-via = loop", "[x] mount-via = loop can't reach a disk with"),
        ("filesystem = xfs\nroot-label = 0123456789abc", "[x] root-label: xfs has labels of at most 12 characters."),
        ("image-size = fitt", "[x] image-size: 'fitt' is not accepted, only a size above zero such as"),
    ],
)  # fmt: skip
def test_contradictions(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "gpt.yaml").write_text(GPT)
    (tmp_path / "uefi.yaml").write_text(GPT.replace("EF02", "8300"))
    (tmp_path / "lvm.yaml").write_text(LVM)
    with pytest.raises(ConfigurationError) as caught:
        bootstrap.check(make_plan(tmp_path, text.replace("DIR", str(tmp_path))))
    assert caught.value.message.startswith(message.replace("DIR", str(tmp_path)))


def test_a_netboot_image_needs_no_boot_loader(tmp_path: Path) -> None:
    bootstrap.check(make_plan(tmp_path, "layout = filesystem\ntest-boot = yes\nformat = netboot"))


@dataclass(frozen=True)
class Here:
    """Namespaces that are this machine."""

    def run(self, *words: str, **keywords: Any) -> str:
        return command.run(words, **keywords)


def test_system_has_the_programs_of_its_filesystems(tmp_path: Path) -> None:
    scheme = read(tmp_path, GPT.replace("type: ext3", "type: btrfs"))
    layout = Layout(scheme, "hybrid", "x86_64", 3 << 30)
    here = cast(Namespaces, Here())
    for path in ("usr/sbin/mke2fs", "usr/bin/btrfs"):
        with pytest.raises(BuildError) as caught:
            making.check_tools(here, tmp_path, layout)
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    assert caught.value.message == "The system has no btrfs-progs, which its filesystem btrfs needs."
    making.check_tools(here, tmp_path, layout)
    layout = Layout(read(tmp_path, LVM.replace("xfs", "ext4")), "bios", "x86_64", 5 << 30)
    with pytest.raises(BuildError) as caught:
        making.check_tools(here, tmp_path, layout)
    assert caught.value.message == "The system has no lvm2, which its layout with LVM needs."


def test_mount_point_that_leads_out_of_the_tree(tmp_path: Path) -> None:
    """Programs of this machine would copy its own files."""
    (tmp_path / "gpt.yaml").write_text(GPT)
    plan = make_plan(tmp_path, f"layout = {tmp_path}/gpt.yaml\nfirmware = hybrid\nimage-size = 3G")
    build = Build(plan, plan.work_path, "vm")
    last = list(shown(build, bootstrap.steps(build))["Installing the boot loader"][-1])
    tree = plan.work_path / "tree/root"
    for place in ("boot/efi", "srv/data"):
        assert str(tree / place) in last
        (tree / place).mkdir(parents=True)
    check = last[last.index("sh") :]
    run(*check)
    (tree / "srv/data").rmdir()
    (tree / "srv/data").symlink_to("/etc")
    done = run(*check, check=False)
    assert (done.returncode, done.stderr) == (1, "a symbolic link of the tree leads out of it, to /etc\n")


def test_recipe_has_the_programs_of_its_filesystem(tmp_path: Path) -> None:
    text = f"bootstrap = {REPOSITORY}/data/debian.bootstrap.yaml.j2\nfilesystem = "
    for kind, package in (("ext4", None), ("xfs", "xfsprogs"), ("btrfs", "btrfs-progs")):
        (tmp_path / "own.conf").write_text(f"[x]\nsource = bootstrap\n{text}{kind}\n")
        configuration = files.Configuration({files.FILE_VARIABLE: str(tmp_path / "own.conf")})
        packages = recipe.read(pipeline.make_plan(configuration, "x", {})).packages
        assert {"xfsprogs", "btrfs-progs"} & {*packages} == {*filter(None, [package])}


def test_installers_have_no_tree_to_fit(tmp_path: Path) -> None:
    path = tmp_path / "own.conf"
    path.write_text("[x]\nlinux = /l\ninitrd = /i\nimage-size = fit\n")
    configuration = files.Configuration({files.FILE_VARIABLE: str(path)})
    with pytest.raises(ConfigurationError, match="image-size = fit is only for source = bootstrap"):
        pipeline.make_plan(configuration, "x", {})


def test_dry_run_of_a_disk_that_fits(tmp_path: Path) -> None:
    plan = make_plan(
        tmp_path, "image-size = fit\nextra-size = 5M\nroot-label = top\nmkfs-options = -m 0\nfirmware = bios"
    )
    build = Build(plan, plan.work_path, "vm")
    commands = shown(build, bootstrap.steps(build))["Making the disk"]
    [making_it] = [words for words in commands if "mke2fs" in words]
    assert making_it[-1] == "SIZE"
    assert " ".join(making_it).count("-L top -m 0 -d ") == 1
    assert layouts.Wanted("a", "b").size == Fraction(1)


@pytest.mark.parametrize(("kind", "kept"), [("ext4", 4096), ("ext3", 0)])
def test_a_filesystem_that_fits_can_be_written_to(tmp_path: Path, kind: str, kept: int) -> None:
    """The kernel keeps blocks of ext4 to itself: 2 percent of all, at most 16 MiB."""
    root = layouts.root_of(kind, "", ())
    scheme = layouts.scheme("filesystem", "x86_64", root)
    layout = layouts.Layout(scheme, None, "x86_64", 0, layouts.random_identity())
    need = filesystems.Need(1 << 30, 1000)
    size = filesystems.least_size(need, root, layout, tmp_path)
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(size)
    run("mke2fs", "-q", "-t", kind, "-O", "^metadata_csum_seed,^orphan_file", disk)
    free = int(re.findall(r"^Free blocks: +([0-9]+)$", run("dumpe2fs", "-h", disk).stdout, re.MULTILINE)[0])
    assert kept <= free - need.size // 4096 < kept + 1024


def test_dry_run_of_a_disk_with_lvm(tmp_path: Path) -> None:
    """Libguestfs' appliance alone makes the volumes, after what they get; no size is made up."""
    (tmp_path / "lvm.yaml").write_text(LVM)
    plan = make_plan(tmp_path, f"image-size = fit\nlayout = {tmp_path}/lvm.yaml\nfirmware = bios")
    bootstrap.check(plan)
    assert "guestfish" in bootstrap.programs(plan)
    commands = shown(Build(plan, plan.work_path, "vm"), bootstrap.steps(Build(plan, plan.work_path, "vm")))[
        "Making the disk"
    ]
    assert [words[0] for words in commands[-2:]] == ["guestfish", "rm"]
    assert not [words for words in commands[:-2] if "lvcreate" in " ".join(words)]
    assert "lvcreate --yes --extents SIZE --name lv_var the-vg" in " ".join(commands[-2])
    assert not [words for words in commands if re.search("[0-9]{13}", " ".join(words).replace("0" * 8, ""))]


@pytest.mark.parametrize(("filesystem", "tables"), [("xfs", 1), ("btrfs", 2)])
def test_dry_run_of_other_filesystems_that_fit(tmp_path: Path, filesystem: str, tables: int) -> None:
    """The table is written again when the last filesystem has become smaller; no size is made up."""
    plan = make_plan(tmp_path, f"image-size = fit\nfilesystem = {filesystem}\nfirmware = bios")
    bootstrap.check(plan)
    build = Build(plan, plan.work_path, "vm")
    commands = shown(build, bootstrap.steps(build))["Making the disk"]
    assert [words[0] for words in commands].count("sfdisk") == tables
    assert not [words for words in commands if re.search("[0-9]{16}", " ".join(words))]
    assert "--size=SIZE" in next(words for words in commands if "truncate" in words)
