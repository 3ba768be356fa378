"""The root filesystem in libguestfs' appliance: the same result as on this machine, and no way out of it."""

import dataclasses
import datetime
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_factory import appliance, interrupts, mounts, pipeline
from image_factory.errors import CommandError, ConfigurationError, Interrupted, NoSystemError
from image_factory.model import Build, Disk, Plan, Tree
from image_factory.settings import Configuration

from .conftest import machine_state, run

REPOSITORY = Path(__file__).resolve().parent.parent
OFFSET = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The helper is the one of the checkout; at the end all is as before."""
    monkeypatch.setattr("sys.argv", [str(REPOSITORY / "image-factory")])
    before = state()
    yield
    assert state() == before


def state() -> list[str]:
    return [*machine_state(), *sorted(map(str, Path("/tmp").glob("libguestfs*"))), *appliances()]


def appliances() -> list[str]:
    """Return the processes of the appliances of these tests."""
    return [line for line in run("ps", "-eo", "args").stdout.splitlines() if "qemu" in line and "/pytest-of-" in line]


def make_build(directory: Path, way: str = "guestfs", **settings: object) -> Build:
    """Return a build whose disk is in *directory*, which is made."""
    directory.mkdir()
    text = directory.parent / "image-factory.conf"
    text.write_text("[x]\nlinux = /l\ninitrd = /i\nformat = raw\ninstaller-logs = yes\n")
    configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(text)})
    chosen = dataclasses.replace(configuration.image("x", {}), mount_via=way, **settings)
    return Build(Plan("x", chosen, datetime.date.today(), directory, {}), directory, "none")


def make_disk(build: Build, tree: Path | None, filesystem: str = "ext4", *options: str, size: int = 300) -> Disk:
    """Make the disk of *build* with a partition of *filesystem* that has the files of *tree*."""
    path = build.disk_path
    run("truncate", "-s", f"{size}M", path)
    subprocess.run(["sfdisk", "--quiet", path], input="label: dos\nstart=1MiB, type=L\n", text=True, check=True)
    files = ["-d", tree] if tree else []
    run("mke2fs", "-q", "-t", filesystem, *options, *files, "-E", f"offset={OFFSET}", path, f"{size - 1}M")
    return Disk(path)


def make_tree(directory: Path) -> Path:
    """Make a tree with the installer's logs, and with all that a file can be."""
    for name in ("etc", "root", "var/log/installer/deep/er", "var/log/YaST2", "var/adm/autoinstall/logs", "usr/bin"):
        (directory / name).mkdir(parents=True)
    for name in (
        "etc/fstab",
        "root/anaconda-ks.cfg",
        "root/install.log",
        "root/install.log.syslog",
        "root/.bashrc",
        "var/log/installer/syslog",
        "var/log/installer/deep/er/file",
        "var/log/installer-not-really",
        "var/log/anaconda.log with blanks\nand a line",
        "var/log/anaconda-\"quotes'$HOME*",
        "var/log/YaST2/y2log",
        "var/adm/autoinstall/logs/y",
        "usr/bin/su",
    ):
        (directory / name).write_text(f"the text of {name!r}\n")
    (directory / os.fsdecode(b"var/log/anaconda-\xff\xfe")).write_text("no UTF-8, and no end of line")
    (directory / "var/log/anaconda-link").symlink_to("/etc/fstab")
    os.mkfifo(directory / "var/log/anaconda-fifo")
    os.mknod(directory / "usr/null", 0o666 | 0o020000, os.makedev(1, 3))
    os.link(directory / "usr/bin/su", directory / "usr/bin/su-link")
    os.chown(directory / "usr/bin/su", 1234, 4321)
    (directory / "usr/bin/su").chmod(0o6755)
    os.setxattr(directory / "usr/bin/su", "user.comment", b"an attribute")
    os.setxattr(directory / "etc/fstab", "security.capability", bytes.fromhex("0100000200040000") + bytes(12))
    os.utime(directory / "root/.bashrc", ns=(10**18 + 1, 10**18 + 123456789))
    return directory


def listing(raw: Path) -> dict[str, tuple[object, ...]]:
    """Return all that a raw image's files are."""
    point = raw.parent / "mnt"
    point.mkdir()
    run("mount", "-o", f"ro,noload,loop,offset={OFFSET}", raw, point)
    try:
        found: dict[str, tuple[object, ...]] = {}
        for path in [point, *sorted(point.rglob("*"))]:
            status = path.lstat()
            attributes = {name: os.getxattr(path, name, follow_symlinks=False) for name in xattrs(path)}
            text = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            target = os.readlink(path) if path.is_symlink() else ""
            numbers = (status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_rdev, status.st_nlink)
            times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
            found[str(path.relative_to(point))] = (numbers, times, attributes, text, target)
        return found
    finally:
        run("umount", point)
        point.rmdir()


def xattrs(path: Path) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


# The directories that logs are removed from: their times are those of the removal.
CHANGED = ("root", "var/log", "var/adm")


def same_but_for_times_of_removal(one: Path, other: Path) -> None:
    trees = listing(one), listing(other)
    assert trees[0].keys() == trees[1].keys()
    for name, entry in trees[0].items():
        if name in CHANGED:
            # Numbers, then the time of access, and all but the times.
            assert (entry[0], entry[1][0], entry[2:]) == (  # type: ignore[index]
                trees[1][name][0], trees[1][name][1][0], trees[1][name][2:],  # type: ignore[index]
            )  # fmt: skip
        else:
            assert entry == trees[1][name], name


def shown_and_removed(messages: list[str]) -> list[str]:
    return [line for line in messages if re.match(r"\| |Removed ", line)]


@pytest.mark.parametrize("block_size", ["4096", "1024"])
def test_both_ways_give_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture, block_size: str) -> None:
    """One installed disk, finished in both ways; unused blocks are zeros then, where blocks are small too."""
    caplog.set_level("INFO", logger="image-factory")
    tree = make_tree(tmp_path / "tree")
    (tree / "usr/junk").write_bytes(os.urandom(20 << 20))
    builds = {way: make_build(tmp_path / way, way) for way in ("loop", "guestfs")}
    disk = make_disk(builds["loop"], tree, "ext4", "-b", block_size)
    run("debugfs", "-w", "-R", "rm /usr/junk", f"{disk.path}?offset={OFFSET}")
    run("cp", "--sparse=always", disk.path, builds["guestfs"].disk_path)
    said = {}
    for way, build in builds.items():
        caplog.clear()
        start = time.monotonic()
        artifacts = pipeline.finish_disk(build, Disk(build.disk_path))
        print(f"{way}, blocks of {block_size}: finished in {time.monotonic() - start:.1f} s")
        said[way] = shown_and_removed(caplog.messages)
        raw = artifacts[0].path
        raw.rename(build.directory / "image.raw")
        unused = run("zerofree", "-n", "-v", f"{build.directory / 'image.raw'}?offset={OFFSET}").stdout
        assert unused.splitlines()[-1].startswith("0/")
        assert ("zerofree" in caplog.text) == (block_size == "1024")
        assert (build.directory / "image.raw").stat().st_blocks * 512 < 20 << 20
    assert said["loop"] == said["guestfs"]
    assert "Removed /var/log/anaconda-link" in said["loop"]
    same_but_for_times_of_removal(*(build.directory / "image.raw" for build in builds.values()))
    left = listing(builds["guestfs"].directory / "image.raw")
    assert {"etc/fstab", "root/.bashrc", "var/log/installer-not-really", "var/adm"} <= left.keys()
    assert not [name for name in left if re.match(r"var/log/(anaconda|installer$|YaST2)|root/(install|ana)", name)]
