"""A guest's fstab: as installers write them, and as an attacker would."""

import random
import time

import pytest

from image_factory.model import Partition, Volume
from image_factory.system import fstab
from image_factory.system.fstab import Entry

DEBIAN = """\
# /etc/fstab: static file system information.
#
# <file system> <mount point>   <type>  <options>       <dump>  <pass>
# / was on /dev/vda5 during installation
UUID=0a3407de-014b-458b-b5c1-848e92a327a3 /               ext4    errors=remount-ro 0       1
/dev/mapper/debian--vg-var\t/var\text4\tdefaults\t0\t2
UUID=1234-ABCD  /boot/efi       vfat    umask=0077      0       1
UUID=f9fe0b69-a280-415d-a03a-a32752370dee none            swap    sw              0       0
/dev/sr0        /media/cdrom0   udf,iso9660 user,noauto     0       0
"""

VOLUMES = (
    Volume(
        "partition 1", 1 << 20, "vfat", "1234-ABCD", "EFI SYSTEM", "AAAA-01", "EFI System Partition", Partition(1, 0, 1)
    ),
    Volume("partition 2", 1 << 20, "ext4", "0a3407de-014b", 'a"b', "AAAA-02", None, Partition(2, 1, 1)),
    Volume("partition 5", 1 << 20, partition=Partition(5, 2, 1)),
    Volume("/dev/debian-vg/var", 1 << 20, "ext4", "00ff"),
    Volume("/dev/vg/root-a", 1 << 20, "xfs", "11ff"),
)


def points(text: str) -> list[str]:
    return [entry.point for entry in fstab.parse(text)]


def test_fstab_of_an_installer() -> None:
    assert [(found.spec, found.point, found.kind) for found in fstab.parse(DEBIAN)] == [
        ("UUID=0a3407de-014b-458b-b5c1-848e92a327a3", "", "ext4"),
        ("/dev/mapper/debian--vg-var", "var", "ext4"),
        ("UUID=1234-ABCD", "boot/efi", "vfat"),
        ("/dev/sr0", "media/cdrom0", "udf,iso9660"),
    ]


def test_options() -> None:
    [entry] = fstab.parse("UUID=1 /var/log btrfs noatime,subvolid=260,subvol=/@/var/log,subvol=@x 0 0")
    assert (entry.option("subvol"), entry.option("subvolid"), entry.option("noatime")) == ("@x", "260", None)
    assert fstab.parse("UUID=1 / ext4") == [Entry("UUID=1", "", "ext4", ("",))]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("UUID=1 /srv/a\\040b ext4", ["srv/a b"]),
        ("UUID=1 /a\\134b\\043c\\011d ext4", ["a\\b#c\td"]),
        ("UUID=1 /a\\400 ext4", ["a\\400"]),
        ("UUID=1 //var///log/ ext4", ["var/log"]),
        ("  \t UUID=1 \t/var\t ext4 ", ["var"]),
        ("UUID=1 /var ext4\r", ["var"]),
        ("UUID=1 /../etc ext4", []),
        ("UUID=1 /var/\\056\\056/etc ext4", []),
        ("UUID=1 /. ext4", []),
        ("UUID=1 /var\\000/log ext4", []),
        ("UUID=1 var ext4", []),
        ("UUID=1 none swap sw", []),
        ("UUID=1 /var", []),
        ("UUID=1", []),
        ("#UUID=1 /var ext4", []),
        ("/var /mnt none bind", ["mnt"]),
        ("/../var /mnt none rw,rbind", ["mnt"]),
        ("UUID=1\u00a0/var\u2028ext4 x", []),
        ("UUID=1 /" + "x" * 5000 + " ext4", []),
        ("\0\0\0 \0 \0", []),
    ],
)
def test_lines(line: str, expected: list[str]) -> None:
    assert points(line) == expected
    assert points(f"UUID=0 /first ext4\n{line}\nUUID=9 /last ext4\n") == ["first", *expected, "last"]


def test_size_is_bounded() -> None:
    start = time.monotonic()
    assert len(fstab.parse("UUID=1 /var ext4\n" * 100_000)) == 256
    assert fstab.parse(" " * (1 << 20)) == []
    assert fstab.parse("\\040" * (1 << 18)) == []
    assert len(fstab.parse("UUID=1 /" + "a/" * 2000 + " ext4")) == 1
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("seed", range(50))
def test_garbage(seed: int) -> None:
    numbers = random.Random(seed)
    words = [
        "UUID=1",
        "LABEL=",
        "=",
        "/",
        "/..",
        "/var",
        "\\040",
        "\\",
        "#",
        "subvol=",
        ",",
        "\t",
        " ",
        "\n",
        "\0",
        "é",
    ]
    for entry in fstab.parse("".join(numbers.choices(words, k=400))):
        assert not {".", "..", ""} & set(entry.point.split("/")) or not entry.point
        fstab.find(entry.spec, VOLUMES)
        entry.is_of_this_disk()


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("UUID=1234-ABCD", "partition 1"),
        ("UUID=1234-abcd", "partition 1"),
        ('UUID="0A3407DE-014B"', "partition 2"),
        ("LABEL=EFI SYSTEM", "partition 1"),
        ("UUID='0A3407DE-014B'", "partition 2"),
        ("UUID='0A3407DE-014B\"", None),
        ('LABEL=a"b', "partition 2"),
        ("LABEL=efi system", None),
        ("PARTUUID=aaaa-02", "partition 2"),
        ("PARTLABEL=EFI System Partition", "partition 1"),
        ("/dev/vda2", "partition 2"),
        ("/dev/sda5", "partition 5"),
        ("/dev/hda5", "partition 5"),
        ("/dev/xvda1", "partition 1"),
        ("/dev/nvme0n1p2", "partition 2"),
        ("/dev/mmcblk0p2", "partition 2"),
        ("/dev/vda", None),
        ("/dev/vda3", None),
        ("/dev/sdb1", None),
        ("/dev/vda2/", None),
        ("/dev/disk/by-uuid/1234-ABCD", "partition 1"),
        ("/dev/disk/by-label/EFI\\x20SYSTEM", "partition 1"),
        ("/dev/disk/by-partuuid/AAAA-01", "partition 1"),
        ("/dev/disk/by-partlabel/EFI\\x20System\\x20Partition", "partition 1"),
        ("/dev/disk/by-path/pci-0000:04:00.0-part2", "partition 2"),
        ("/dev/disk/by-id/virtio-x-part5", "partition 5"),
        ("/dev/disk/by-dname/vda-part5", "partition 5"),
        ("/dev/disk/by-path/pci-0000:04:00.0-part/by-partnum/2", "partition 2"),
        ("/dev/disk/by-path/pci-0000:04:00.0-part/by-uuid/1234-ABCD", "partition 1"),
        ("/dev/disk/by-id/dm-name-vg-root--a", "/dev/vg/root-a"),
        ("/dev/disk/by-id/virtio-x", None),
        ("/dev/mapper/debian--vg-var", "/dev/debian-vg/var"),
        ("/dev/debian-vg/var", "/dev/debian-vg/var"),
        ("/dev/mapper/vg-root--a", "/dev/vg/root-a"),
        ("/dev/mapper/debian-vg-var", None),
        ("UUID=11ff", "/dev/vg/root-a"),
        ("UUID=", None),
        ("LABEL=", None),
        ("=", None),
        ("", None),
        ("partition 1", None),
        ("NAME=partition 1", None),
        ("proc", None),
    ],
)
def test_specs(spec: str, name: str | None) -> None:
    found = fstab.find(spec, VOLUMES)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("UUID=1 /srv ext4 defaults", True),
        ("/dev/sdb1 /srv auto nofail", True),
        ("LABEL=data /srv xfs", True),
        ("UUID=1 /srv ext4 defaults,noauto", False),
        ("UUID=1 /srv jfs", True),
        ("UUID=1 /srv f2fs x-systemd.automount", True),
        ("UUID=1 /srv nfs", False),
        ("server:/export /srv nfs defaults", False),
        ("//server/share /srv cifs guest", False),
        ("tmpfs /tmp tmpfs mode=1777", False),
        ("proc /proc proc defaults", False),
        ("/dev/sr0 /media/cdrom0 auto user", False),
        ("/dev/cdrom /media/cdrom auto user", False),
        ("/dev/fd0 /media/floppy auto rw", False),
        ("/swapfile /x auto loop", False),
    ],
)
def test_what_should_be_on_the_disk(line: str, expected: bool) -> None:
    [entry] = fstab.parse(line)
    assert entry.is_of_this_disk() is expected


def test_copies_have_the_same_uuid() -> None:
    """A snapshot is meant only where nothing else is."""
    snapshot = Volume("/dev/vg/before", 1, "ext4", "00ff", origin="root")
    whole, other = (Volume(f"/dev/vg/{name}", 1, "ext4", "00ff") for name in ("root", "var"))
    assert fstab.find_all("UUID=00FF", [snapshot, whole, other]) == [whole, other]
    assert fstab.find("UUID=00FF", [snapshot, whole]) == whole
    assert fstab.find("UUID=00FF", [snapshot]) == snapshot
    assert fstab.find("/dev/vg/before", [snapshot, whole]) == snapshot


@pytest.mark.parametrize(
    ("line", "bound"),
    [
        ("/srv/var /var none bind", "srv/var"),
        ("/srv//var/ /var none rw,rbind 0 0", "srv/var"),
        ("/srv/a\\040b /var none bind", "srv/a b"),
        ("/ /all none bind", ""),
        ("/srv/../etc /var none bind", None),
        ("srv /var none bind", None),
        ("UUID=1 /var ext4 defaults", None),
    ],
)
def test_what_is_seen_twice(line: str, bound: str | None) -> None:
    [entry] = fstab.parse(line)
    assert entry.bound == bound


@pytest.mark.parametrize(
    ("line", "is_file"),
    [
        ("/srv/disk.img /var ext4 loop", True),
        ("/srv/disk.img /var auto", True),
        ("/dev/vda1 /var ext4", False),
        ("//server/share /var cifs", False),
        ("/srv/a:/srv/b /var fuse.mergerfs", False),
        ("/srv/var /var none bind", False),
        ("LABEL=/ /var ext4", False),
    ],
)
def test_files_with_a_filesystem(line: str, is_file: bool) -> None:
    [entry] = fstab.parse(line)
    assert entry.file is is_file


UNIT = """\
[Unit]
Where=/not/this/one

[Mount]
# What=/dev/sdb1
What = /dev/disk/by-label/my\\x20data
Where=/var/lib/a\\
Type=ext4
Options=noatime,nofail
"""


def test_units_of_systemd() -> None:
    expected = Entry("/dev/disk/by-label/my data", "var/lib/a", "ext4", ("noatime", "nofail"))
    assert fstab.parse_unit(UNIT.replace("a\\\n", "a\n")) == expected
    assert fstab.parse_unit("[Mount]\nWhat=/srv/var\nWhere=/var\nOptions=bind\n") == Entry(
        "/srv/var", "var", "auto", ("bind",)
    )


@pytest.mark.parametrize(
    "text",
    ["", "[Mount]\nWhere=/var\n", "[Mount]\nWhat=/dev/vda1\nWhere=../x\n", "What=x\nWhere=/var\n", "\0[[=\n" * 9000],
)
def test_units_that_mount_nothing(text: str) -> None:
    assert fstab.parse_unit(text) is None
