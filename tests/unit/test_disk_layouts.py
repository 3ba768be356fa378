"""Layouts of disks that are made from trees: built in, and in diskimage-builder's notation."""

import json
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
from image_factory.disks import grub, layouts, making, notation
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
    assert layout.scheme.size_around(layout.root.size) <= size


def test_one_filesystem(tmp_path: Path) -> None:
    layout = Layout(layouts.scheme("filesystem", "x86_64", ROOT), None, "x86_64", 10 * MIB + 5)
    [piece] = layout.pieces
    assert (piece.offset, piece.size, layout.core, layout.esp) == (0, 10 * MIB, None, None)
    assert layout.scheme.size_around(10 * MIB - 1) == 10 * MIB
    build = Build(cast(Plan, None), tmp_path, "vm")
    words = [each.words[0] for each in making.making_commands(tmp_path, build, layout)]
    assert words == ["mke2fs", "sh"]


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
    "lvm": ("- mkfs:\n", "- lvm:\n", "line 30: lvm: layouts with LVM can't be made yet."),
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


@pytest.mark.parametrize("name", WRONG)
def test_error_names_file_line_and_key(tmp_path: Path, name: str) -> None:
    before, after, message = WRONG[name]
    assert before in GPT
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, GPT.replace(before, after, 1))
    assert caught.value.message.startswith(f"{tmp_path}/own.yaml, line ")
    assert message in caught.value.message
    assert caught.value.message.count("\n") == 0


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
        ("layout = DIR/none.yaml", "The layout DIR/none.yaml can't be read: No such file or directory."),
        ("layout = DIR/gpt.yaml\nimage-size = 100M\nfirmware = uefi", "DIR/gpt.yaml, line 20: boot of 286.1 MiB"),
        ("layout = DIR/gpt.yaml\nimage-size = fit\nfirmware = uefi", "[x] image-size = fit: the layout has no"),
        ("layout = DIR/uefi.yaml\nfirmware = bios", "The layout DIR/uefi.yaml has no place for the boot loader that"),
        ("filesystem = xfs\nroot-label = 0123456789abc", "[x] root-label: xfs has labels of at most 12 characters."),
        ("filesystem = xfs\nimage-size = fit", "[x] image-size = fit: the layout has no ext4 root"),
        ("image-size = fitt", "[x] image-size: 'fitt' is not accepted, only a size above zero such as"),
    ],
)  # fmt: skip
def test_contradictions(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "gpt.yaml").write_text(GPT)
    (tmp_path / "uefi.yaml").write_text(GPT.replace("EF02", "8300"))
    with pytest.raises(ConfigurationError) as caught:
        bootstrap.check(make_plan(tmp_path, text.replace("DIR", str(tmp_path))))
    assert caught.value.message.startswith(message.replace("DIR", str(tmp_path)))


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
