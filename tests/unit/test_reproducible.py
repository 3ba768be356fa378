"""Disks that come out the same each time."""

import subprocess
from pathlib import Path

import pytest

from image_factory.base.command import search_path
from image_factory.base.errors import ConfigurationError
from image_factory.disks import layouts, reproducible

DATE = 1700000000


def test_time_of_a_build() -> None:
    assert reproducible.source_date({}) is None
    assert reproducible.source_date({"SOURCE_DATE_EPOCH": ""}) is None
    assert reproducible.source_date({"SOURCE_DATE_EPOCH": "1700000000"}) == DATE


@pytest.mark.parametrize("text", ["now", "-1", "0", "315532799", "2147483648", "17e8", " 1700000000", "1700000000\n"])
def test_what_is_no_time_of_a_build(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^SOURCE_DATE_EPOCH: .* is not accepted, only seconds since 1970"):
        reproducible.source_date({"SOURCE_DATE_EPOCH": text})


def test_identity_is_derived_from_all_that_is_asked_for() -> None:
    first, again, other = (layouts.derived_identity(text) for text in ("a", "a", "b"))
    assert first == again
    values = [each.uuid(name) for each in (first, other, layouts.random_identity()) for name in ("root", "esp", "hash")]
    assert len({*values}) == len(values)


_GROUPS = """\
Block size:               4096
Inode size:               256
Inodes per group:         16
Group 0: (Blocks 0-32767) csum 0x1 [ITABLE_ZEROED]
  Inode table at 5-5 (+5)
  10 free blocks, 4 free inodes, 2 directories, 1 unused inodes
  Free blocks: 5-14
  Free inodes: 12, 14-16
Group 1: (Blocks 32768-65535)
  Inode table at 6-6 (bg #0 + 6)
  10 free blocks, 0 free inodes, 2 directories
  Free blocks: 5-14
  Free inodes:
Group 2: (Blocks 65536-98303)
  Inode table at 7-7 (bg #0 + 7)
  10 free blocks, 16 free inodes, 0 directories, 16 unused inodes
  Free blocks: 5-14
  Free inodes: 33-48
Group 3: (Blocks 98304-131071)
  Inode table at 8-8 (bg #0 + 8)
  10 free blocks, 1 free inodes, 0 directories
  Free blocks: 5-14
  Free inodes: 64
"""


def test_inodes_are_told_apart() -> None:
    groups = [*reproducible.groups_of(_GROUPS)]
    assert [inode for group in groups for inode in group.used()] == [*range(1, 12), 13, *range(17, 33), *range(49, 64)]
    places = [(block << 12) + (number << 8) for block, number in ((5, 11), (5, 13), (5, 14), (8, 15))]
    assert [freed for group in groups for freed in group.freed()] == [(place, 256) for place in places]


def debugfs(disk: Path, request: str) -> str:
    argv = ["debugfs", "-R", request, f"{disk}?offset=4096"]
    env = {"PATH": search_path(), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    return subprocess.run(argv, capture_output=True, text=True, check=True, env=env).stdout


def make(disk: Path, tree: Path, journal: list[str], *times: int) -> None:
    """Make a filesystem of *tree* at byte 4096 of *disk*, as if a kernel had worked on it at *times*."""
    env = {"PATH": search_path(), "LC_ALL": "C.UTF-8", "E2FSPROGS_FAKE_TIME": str(times[0])}
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    options = f"offset=4096,hash_seed={layouts.derived_identity('a').uuid('hash')},lazy_itable_init=0"
    argv = [
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-U",
        layouts.derived_identity("a").uuid("root"),
        "-E",
        options,
        "-d",
        str(tree),
    ]
    subprocess.run([*argv, *journal, str(disk), "15000k"], check=True, env=env)
    requests = [
        "rm /gone",
        "kill_file /gone",
        "ssv mnt_count 3",
        "ssv last_mounted /mnt/here",
        f"ssv mtime @{times[1]}",
    ]
    requests += ["sif /kept generation 12345", "sif /kept version 7", f"sif /late mtime @{times[1]}"]
    requests += [f"sif /late mtime_extra {times[1] % 1000 * 4 + 4}", f"sif /old mtime_extra {250000000 * 4}"]
    subprocess.run(
        ["debugfs", "-w", "-f", "-", f"{disk}?offset=4096"],
        input="\n".join(requests), text=True, capture_output=True, check=True, env=env,
    )  # fmt: skip


@pytest.mark.parametrize(("journal", "size"), [([], 1), (["-J", "size=3"], 3), (["-O", "^has_journal"], 0)])
def test_filesystem_does_not_tell_when_it_was_changed(tmp_path: Path, journal: list[str], size: int) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for name in ("kept", "gone", "late", "old", "sub/c"):
        (tree / name).write_text(name)
    subprocess.run(["touch", "--date=1960-01-01 00:00:00.25 UTC", str(tree / "old")], check=True)
    disks = []
    for times in ((1800000000, 1800000001), (1900000000, 1900000111)):
        disk = tmp_path / f"{times[0]}.raw"
        # This moment becomes its ctime.
        (tree / "kept").chmod(0o600)
        subprocess.run(reproducible.clamp_argv(tree, DATE), check=True)
        make(disk, tree, journal, *times)
        reproducible.settle(disk, 4096, tmp_path, DATE)
        disks.append(disk)
    first, second = disks
    assert first.read_bytes() == second.read_bytes()
    argv = ["e2fsck", "-fn", f"{first}?offset=4096"]
    checked = subprocess.run(argv, capture_output=True, text=True, check=False, env={"PATH": search_path()})
    assert checked.returncode == 0, checked.stdout
    told = debugfs(first, "stat /late")
    assert told.count("0x6553f100:00000000 -- Tue Nov 14 22:13:20 2023") == 4
    assert f"mtime: 0x{2**32 - 315619200:08x}:3b9aca00 " in debugfs(first, "stat /old")
    assert "Generation: 0    Version: 0x00000000:00000000" in debugfs(first, "stat /kept")
    shown = debugfs(first, "stats -h")
    assert "Last mounted on:          <not available>" in shown
    assert "Mount count:              0" in shown
    assert f" Size: {size << 20}\n" in debugfs(first, "stat <8>")
    assert ("has_journal" in shown) == bool(size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1800000000.raw", "1900000000.raw", "tree"]
