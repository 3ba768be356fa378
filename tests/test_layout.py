"""Partition tables as installers make them, and disks without one."""

import random
import struct
import subprocess
from pathlib import Path

import pytest

from image_factory import layout
from image_factory.errors import NoSystemError
from image_factory.model import Partition

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

    def swap(self, offset: int) -> "Image":
        """Make swap space at *offset* in MiB, as mkswap can't."""
        return self.magic(offset * M + 1024, struct.pack("=3I", 1, 255, 0)).magic(offset * M + 4086, b"SWAPSPACE2")

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


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_one_partition(image: Image, label: str, kind: str) -> None:
    image.table(f"label: {label}\nstart=2048, size=60M, type=L\n").filesystem(kind, 1, 60)
    expected = [Partition(number=1, offset=M, size=60 * M, filesystem=kind)]
    assert layout.read_partitions(image.path) == expected
    assert layout.root_candidates(expected) == expected


@pytest.mark.parametrize(
    ("kind", "position", "magic"),
    [("xfs", M, struct.pack(">4sIQ", b"XFSB", 4096, 60 * M // 4096)), ("btrfs", M + 65536 + 64, b"_BHRfS_M")],
)
def test_other_root_filesystems(image: Image, kind: str, position: int, magic: bytes) -> None:
    image.table("label: gpt\nstart=2048, size=60M\n").magic(position, magic)
    assert [found.filesystem for found in layout.root_candidates(layout.read_partitions(image.path))] == [kind]


def test_several_partitions_and_the_largest_root_first(image: Image) -> None:
    """UEFI as Debian has it: ESP, /boot, swap and root."""
    image.table(
        "label: gpt\n"
        "start=1MiB, size=4MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\n"
        "start=5MiB, size=10MiB\nstart=15MiB, size=8MiB, type=S\nstart=23MiB, size=30MiB\n"
    )
    image.filesystem("ext4", 23, 30).filesystem("ext2", 5, 10).swap(15)
    partitions = layout.read_partitions(image.path)
    assert [(found.number, found.offset // M, found.size // M, found.filesystem) for found in partitions] == [
        (1, 1, 4, None),
        (2, 5, 10, "ext2"),
        (3, 15, 8, "linux-swap(v1)"),
        (4, 23, 30, "ext4"),
    ]
    assert [found.number for found in layout.root_candidates(partitions)] == [4, 2]


def test_logical_partitions(image: Image) -> None:
    """As the Debian installer makes them: a root, and swap in an extended partition."""
    image.table(
        "label: dos\nstart=1MiB, size=20MiB, type=83, bootable\nstart=22MiB, size=40MiB, type=5\n"
        "start=23MiB, size=10MiB, type=82\nstart=34MiB, size=20MiB, type=83\n"
    )
    image.filesystem("ext4", 1, 20).filesystem("ext4", 34, 20)
    partitions = layout.read_partitions(image.path)
    assert [(found.number, found.offset // M, found.size // M, found.filesystem) for found in partitions] == [
        (1, 1, 20, "ext4"),
        (5, 23, 10, None),
        (6, 34, 20, "ext4"),
    ]
    assert layout.describe(partitions) == "partition 1 (ext4), partition 5 (no known filesystem), partition 6 (ext4)"


def test_partitions_are_in_the_order_of_the_disk(image: Image) -> None:
    image.table("label: gpt\n2: start=1MiB, size=20MiB\n1: start=21MiB, size=30MiB\n")
    assert [found.number for found in layout.read_partitions(image.path)] == [2, 1]


def test_disk_of_an_odd_size(tmp_path: Path) -> None:
    image = Image(tmp_path / "disk.raw", 64 * M + 512 * 7)
    image.table("label: dos\nstart=2048, type=83\n")
    assert [found.size for found in layout.read_partitions(image.path)] == [63 * M + 512 * 7]


def test_name_of_the_disk_is_no_option(tmp_path: Path) -> None:
    image = Image(tmp_path / "-a b,c.raw").table("label: dos\nstart=2048, size=60M\n")
    assert len(layout.read_partitions(image.path)) == 1


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_table_without_partitions(image: Image, label: str) -> None:
    image.table(f"label: {label}\n")
    partitions = layout.read_partitions(image.path)
    assert partitions == []
    message = one_line(layout.root_candidates, partitions)
    assert message == "The disk has no root filesystem, only a partition table without partitions."


def test_no_root_filesystem(image: Image) -> None:
    image.table("label: dos\nstart=1MiB, size=10MiB, type=82\nstart=11MiB, size=30MiB, type=83\n")
    image.swap(1)
    message = one_line(layout.root_candidates, layout.read_partitions(image.path))
    assert message == (
        "The disk has no root filesystem, only partition 1 (linux-swap(v1)), partition 2 (no known filesystem)."
    )


def test_filesystem_without_a_table(image: Image) -> None:
    image.filesystem("ext4", 0, 60)
    assert one_line(layout.read_partitions, image.path) == "The disk has no partition table, only a filesystem."


def test_empty_disk(image: Image) -> None:
    message = one_line(layout.read_partitions, image.path)
    assert message.startswith("The disk has no partition table that can be read: ")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_tiny_disk(tmp_path: Path, size: int) -> None:
    one_line(layout.read_partitions, Image(tmp_path / "disk.raw", size).path)


def test_disk_that_is_not_there(tmp_path: Path) -> None:
    assert one_line(layout.read_partitions, tmp_path / "absent").startswith("The disk can't be read: ")


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes(image: Image, seed: int) -> None:
    noise = random.Random(seed).randbytes(4 * M)
    image.magic(0, noise)
    one_line(layout.read_partitions, image.path)


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
        partitions = layout.read_partitions(image.path)
    except NoSystemError as error:
        assert "\n" not in error.message
    else:
        assert all(found.offset > 0 and found.offset + found.size <= 64 * M for found in partitions)
    assert image.path.stat().st_mtime_ns == before.st_mtime_ns


def test_disk_that_was_cut_off(image: Image) -> None:
    """Its GPT says that it is longer, and the copy at its end is missing."""
    image.table("label: gpt\nstart=2048, size=40M\n").filesystem("ext4", 1, 40)
    with image.path.open("r+b") as file:
        file.truncate(50 * M)
    data = image.path.read_bytes()
    try:
        partitions = layout.read_partitions(image.path)
    except NoSystemError as error:
        assert "\n" not in error.message
    else:
        assert [found.size for found in partitions] == [40 * M]
    assert image.path.read_bytes() == data


def test_reading_prints_nothing(image: Image, capfd: pytest.CaptureFixture[str]) -> None:
    image.magic(0, random.Random(1).randbytes(M))
    one_line(layout.read_partitions, image.path)
    image.magic(0, bytes(M)).table("label: gpt\nstart=2048, size=40M\n")
    with image.path.open("r+b") as file:
        file.truncate(80 * M)
    layout.read_partitions(image.path)
    assert capfd.readouterr() == ("", "")
