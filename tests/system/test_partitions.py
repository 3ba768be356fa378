"""Partition tables as installers make them, and disks without one."""

import random
import struct
import subprocess
from pathlib import Path

import pytest

from image_factory.base.errors import NoSystemError
from image_factory.model import Partition, Volume
from image_factory.system import partitions

M = 1 << 20


class Image:
    """A disk that is made step by step."""

    def __init__(self, path: Path, size: int = 64 * M) -> None:
        self.path = path
        with path.open("wb") as file:
            file.truncate(size)

    def table(self, script: str) -> "Image":
        argv = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", self.path]
        subprocess.run(argv, input=script, text=True, check=True, capture_output=True)
        return self

    def filesystem(self, kind: str, offset: int, size: int) -> "Image":
        """Make a filesystem of *kind* at *offset*, both in MiB."""
        argv = [f"mkfs.{kind}", "-q", "-F", "-E", f"offset={offset * M}", self.path, f"{size}M"]
        subprocess.run(argv, check=True, capture_output=True)
        return self

    def swap(self, offset: int, size: int = 8, *options: str) -> "Image":
        """Make swap space at *offset*, both in MiB; mkswap knows no offset."""
        part = self.path.with_name("swap")
        part.write_bytes(bytes(size * M))
        subprocess.run(["/usr/sbin/mkswap", "-q", *options, part], check=True, capture_output=True)
        return self.magic(offset * M, part.read_bytes())

    def magic(self, position: int, magic: bytes) -> "Image":
        """Write what tells the kind of a filesystem, where its mkfs isn't installed everywhere."""
        with self.path.open("r+b") as file:
            file.seek(position)
            file.write(magic)
        return self


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path / "disk.raw")


def one_line(action: object, *arguments: object) -> str:
    with pytest.raises(NoSystemError) as caught:
        action(*arguments)  # type: ignore[operator]
    assert caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_status == 1
    return caught.value.message


def filesystems(image: Image) -> list[tuple[str, str | None]]:
    return [(found.name, found.filesystem) for found in partitions.read_volumes(image.path)]


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_one_partition(image: Image, label: str, kind: str) -> None:
    image.table(f"label: {label}\nstart=2048, size=60M, type=L\n").filesystem(kind, 1, 60)
    assert partitions.read_partitions(image.path) == [Partition(number=1, offset=M, size=60 * M)]
    [found] = partitions.read_volumes(image.path)
    assert (found.name, found.size, found.filesystem) == ("partition 1", 60 * M, kind)
    assert (found.partition, found.label) == (Partition(1, M, 60 * M), None)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_other_root_filesystems(tmp_path: Path, kind: str) -> None:
    image = Image(tmp_path / "disk.raw", 400 * M).table("label: gpt\nstart=2048, size=320M\n")
    part = tmp_path / "part"
    part.write_bytes(b"")
    with part.open("r+b") as file:
        file.truncate(320 * M)
    subprocess.run([f"/usr/sbin/mkfs.{kind}", "-q", part], check=True, capture_output=True)
    subprocess.run(["dd", f"if={part}", f"of={image.path}", "bs=1M", "seek=1", "conv=notrunc,sparse"], check=True)
    assert filesystems(image) == [("partition 1", kind)]


def test_names_of_partitions_and_filesystems(image: Image) -> None:
    """UEFI as Debian has it: ESP, /boot, swap and root; with names that have all kinds of characters."""
    uuids = [f"0A3407DE-014B-458B-B5C1-848E92A327A{number}" for number in range(4)]
    image.table(
        "label: gpt\n"
        f'start=1MiB, size=4MiB, type=U, name="EFI System", uuid={uuids[0]}\n'
        f"start=5MiB, size=10MiB, uuid={uuids[1]}\nstart=15MiB, size=8MiB, type=S, uuid={uuids[2]}\n"
        f"start=23MiB, size=30MiB, uuid={uuids[3]}\n"
    )
    esp = image.path.with_name("esp")
    subprocess.run(["/usr/sbin/mkfs.fat", "-C", "-i", "1234ABCD", "-n", "MY ESP", esp, "4096"], check=True)
    image.magic(M, esp.read_bytes()).filesystem("ext4", 23, 30).filesystem("ext2", 5, 10).swap(15, 8, "-L", "sw ap")
    label = 'a b\\c"d=e'[:16]
    subprocess.run(["e2label", f"{image.path}?offset={5 * M}", label], check=True)
    volumes = partitions.read_volumes(image.path)
    assert [(found.name, found.filesystem, found.label, found.part_label) for found in volumes] == [
        ("partition 1", "vfat", "MY ESP", "EFI System"),
        ("partition 2", "ext2", label, None),
        ("partition 3", "swap", "sw ap", None),
        ("partition 4", "ext4", None, None),
    ]
    assert [found.part_uuid for found in volumes] == uuids
    assert volumes[0].uuid == "1234-ABCD"


def test_logical_partitions(image: Image) -> None:
    """As the Debian installer makes them: a root, and swap in an extended partition."""
    image.table(
        "label: dos\nlabel-id: 0x0000beef\n"
        "start=1MiB, size=20MiB, type=83, bootable\nstart=22MiB, size=40MiB, type=5\n"
        "start=23MiB, size=10MiB, type=82\nstart=34MiB, size=20MiB, type=83\n"
    )
    image.filesystem("ext4", 1, 20).filesystem("ext4", 34, 20)
    volumes = partitions.read_volumes(image.path)
    assert [found.partition for found in volumes] == [
        Partition(1, M, 20 * M), Partition(5, 23 * M, 10 * M), Partition(6, 34 * M, 20 * M),
    ]  # fmt: skip
    # As the kernel makes them of the number of the table.
    assert [found.part_uuid for found in volumes] == ["0000beef-01", "0000beef-05", "0000beef-06"]
    assert partitions.describe(volumes) == "partition 1 (ext4), partition 5 (no known filesystem), partition 6 (ext4)"


def test_partitions_are_in_the_order_of_the_disk(image: Image) -> None:
    image.table("label: gpt\n2: start=1MiB, size=20MiB\n1: start=21MiB, size=30MiB\n")
    assert [found.number for found in partitions.read_partitions(image.path)] == [2, 1]


def test_disk_of_an_odd_size(tmp_path: Path) -> None:
    image = Image(tmp_path / "disk.raw", 64 * M + 512 * 7)
    image.table("label: dos\nstart=2048, type=83\n")
    assert [found.size for found in partitions.read_partitions(image.path)] == [63 * M + 512 * 7]


def test_name_of_the_disk_is_no_option(tmp_path: Path) -> None:
    image = Image(tmp_path / "-a b,c.raw").table("label: dos\nstart=2048, size=60M\n")
    assert filesystems(image) == [("partition 1", None)]


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_table_without_partitions(image: Image, label: str) -> None:
    image.table(f"label: {label}\n")
    found = partitions.read_partitions(image.path)
    assert found == []
    message = partitions.no_root(partitions.read_volumes(image.path)).message
    assert message == "The disk has no root filesystem, only a partition table without partitions."


def test_no_root_filesystem(image: Image) -> None:
    image.table("label: dos\nstart=1MiB, size=10MiB, type=82\nstart=11MiB, size=30MiB, type=83\n")
    image.swap(1)
    message = partitions.no_root(partitions.read_volumes(image.path)).message
    assert message == "The disk has no root filesystem, only partition 1 (swap), partition 2 (no known filesystem)."


@pytest.mark.parametrize(("kind", "reason"), [("crypto_LUKS", "encrypted"), ("linux_raid_member", "a part of a RAID")])
def test_root_that_is_not_reached(kind: str, reason: str) -> None:
    error = partitions.no_root([Volume("partition 1", M, "ext4"), Volume("partition 2", M, kind)])
    assert error.message == f"No root filesystem can be reached: partition 2 is {reason}."
    assert error.hint


def test_encrypted_partition(image: Image) -> None:
    """LUKS as cryptsetup writes it: the first sectors of a header of version 1."""
    image.table("label: gpt\nstart=2048, size=60M\n")
    header = b"LUKS\xba\xbe" + struct.pack(">H32s32s32sII20s32sI40s", 1, b"aes", b"xts-plain64", b"sha256", 4096, 64,
        bytes(20), bytes(32), 1000, b"0a3407de-014b-458b-b5c1-848e92a327a3")  # fmt: skip
    image.magic(M, header)
    assert filesystems(image) == [("partition 1", "crypto_LUKS")]


def test_two_filesystems_in_one_place(image: Image) -> None:
    """What can't be told from each other is not taken for the one or the other."""
    image.table("label: gpt\nstart=2048, size=60M\n").filesystem("ext4", 1, 60).magic(M + 65536 + 64, b"_BHRfS_M")
    image.magic(M, struct.pack(">4sIQ", b"XFSB", 4096, 60 * M // 4096))
    assert filesystems(image)[0][1] in (None, "ext4")


def test_filesystem_without_a_table(image: Image) -> None:
    image.filesystem("ext4", 0, 60)
    assert filesystems(image) == [("the whole disk", "ext4")]
    assert partitions.read_partitions(image.path) == [Partition(partitions.WHOLE_DISK, 0, image.path.stat().st_size)]


def test_empty_disk(image: Image) -> None:
    message = one_line(partitions.read_partitions, image.path)
    assert message.startswith("The disk has no partition table that can be read: ")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_tiny_disk(tmp_path: Path, size: int) -> None:
    one_line(partitions.read_partitions, Image(tmp_path / "disk.raw", size).path)


def test_disk_that_is_not_there(tmp_path: Path) -> None:
    assert one_line(partitions.read_partitions, tmp_path / "absent").startswith("The disk can't be read: ")


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes(image: Image, seed: int) -> None:
    noise = random.Random(seed).randbytes(4 * M)
    image.magic(0, noise)
    one_line(partitions.read_partitions, image.path)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_damaged_table_is_read_or_refused_in_one_line(image: Image, label: str, seed: int) -> None:
    """Nothing but NoSystemError, whatever a guest writes; and no partition outside of the disk."""
    image.table(f"label: {label}\nstart=1MiB, size=20MiB\nstart=30MiB, size=20MiB, type=L\n")
    numbers = random.Random(seed)
    for _ in range(12):
        position = numbers.choice([numbers.randrange(440, 512), numbers.randrange(512, 2048)])
        image.magic(position, numbers.randbytes(1))
    before = image.path.stat()
    try:
        on_disk = partitions.read_partitions(image.path)
    except NoSystemError as error:
        assert "\n" not in error.message
    else:
        assert all(found.offset > 0 and found.offset + found.size <= 64 * M for found in on_disk)
    assert image.path.stat().st_mtime_ns == before.st_mtime_ns


def test_disk_that_was_cut_off(image: Image) -> None:
    """Its GPT says that it is longer, and the copy at its end is missing."""
    image.table("label: gpt\nstart=2048, size=40M\n").filesystem("ext4", 1, 40)
    with image.path.open("r+b") as file:
        file.truncate(50 * M)
    data = image.path.read_bytes()
    try:
        on_disk = partitions.read_partitions(image.path)
    except NoSystemError as error:
        assert "\n" not in error.message
    else:
        assert [found.size for found in on_disk] == [40 * M]
    assert image.path.read_bytes() == data


def test_reading_prints_nothing(image: Image, capfd: pytest.CaptureFixture[str]) -> None:
    image.magic(0, random.Random(1).randbytes(M))
    one_line(partitions.read_partitions, image.path)
    image.magic(0, bytes(M)).table("label: gpt\nstart=2048, size=40M\n")
    with image.path.open("r+b") as file:
        file.truncate(80 * M)
    partitions.read_partitions(image.path)
    assert capfd.readouterr() == ("", "")
