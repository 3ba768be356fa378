"""The filesystems in libguestfs' appliance: the same result as on this machine, and no way out of it."""

import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from image_factory.base import interrupts
from image_factory.base.command import Conversation
from image_factory.base.errors import BuildError, CommandError, ConfigurationError, Interrupted, NoSystemError
from image_factory.configuration.files import Configuration
from image_factory.model import READ_ONLY_NAME, Build, Change, Disk, Partition, Plan, Volume
from image_factory.system import appliance, inventory, loop, mounts
from image_factory.system.tree import Branch

from ..conftest import OWN, done_stage, machine_state, run, wait_for
from .test_loop import is_read_only, make_micro

REPOSITORY = Path(__file__).resolve().parents[2]
OFFSET = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The helper is the one of the checkout; at the end all is as before."""
    monkeypatch.setattr("sys.argv", [str(REPOSITORY / "image-factory")])
    before = set(state())
    yield
    assert set(state()) - before == set()


def state() -> list[str]:
    return [*machine_state(), *sorted(map(str, Path("/tmp").glob("libguestfs*"))), *appliances()]


def appliances() -> list[str]:
    """Return the processes of the appliances of these tests."""
    lines = run("ps", "-eo", "args").stdout.splitlines()
    return [line for line in lines if "qemu" in line and any(name in line for name in OWN)]


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
    (directory / "root/install.log").write_text("the first line\n" + ("x" * 999 + "\n") * 1100)
    (directory / "root/install.log.empty").touch()
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


# Numbers, times, extended attributes, content, target of a link.
Entry = tuple[tuple[int, ...], tuple[int, ...], dict[str, bytes], bytes, str]


def listing(raw: Path) -> dict[str, Entry]:
    """Return all that a raw image's files are."""
    point = raw.parent / "mnt"
    point.mkdir()
    run("mount", "-o", f"ro,noload,loop,offset={OFFSET}", raw, point)
    try:
        found: dict[str, Entry] = {}
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
CHANGED = ("root", "var/log", "var/adm", "var/lib")


def same_but_for_times_of_removal(one: Path, other: Path) -> None:
    trees = listing(one), listing(other)
    assert trees[0].keys() == trees[1].keys()
    for name, entry in trees[0].items():
        if name in CHANGED:
            # Numbers, then the time of access, and all but the times.
            assert (entry[0], entry[1][0], entry[2:]) == (
                trees[1][name][0], trees[1][name][1][0], trees[1][name][2:],
            )  # fmt: skip
        else:
            assert entry == trees[1][name], name


def shown_and_removed(messages: list[str]) -> list[str]:
    return [line for line in messages if re.match(r"\| |Removed ", line)]


def image(build: Build) -> Path:
    return build.directory / build.plan.file_name("raw")


def finish_both(builds: dict[str, Build], caplog: pytest.LogCaptureFixture) -> dict[str, list[str]]:
    """Finish the one disk of the builds in each way, see that the trees are the same, return what was said."""
    caplog.set_level("INFO", logger="image-factory")
    said = {}
    for way, build in builds.items():
        caplog.clear()
        start = time.monotonic()
        done_stage(build, "clean")
        [artifact] = done_stage(build, "convert").artifacts
        print(f"{way}: finished in {time.monotonic() - start:.1f} s")
        artifact.path.rename(image(build))
        said[way] = shown_and_removed(caplog.messages)
    same_but_for_times_of_removal(*(image(build) for build in builds.values()))
    return said


@pytest.mark.parametrize("block_size", ["4096", "1024"])
def test_both_ways_give_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture, block_size: str) -> None:
    """One installed disk, finished in both ways; unused blocks are zeros then, where blocks are small too."""
    tree = make_tree(tmp_path / "tree")
    (tree / "usr/junk").write_bytes(os.urandom(20 << 20))
    builds = {way: make_build(tmp_path / way, way) for way in ("loop", "guestfs")}
    disk = make_disk(builds["loop"], tree, "ext4", "-b", block_size)
    run("debugfs", "-w", "-R", "rm /usr/junk", f"{disk.path}?offset={OFFSET}")
    run("cp", "--sparse=always", disk.path, builds["guestfs"].disk_path)
    said = finish_both(builds, caplog)
    assert said["loop"] == said["guestfs"]
    assert "Removed /var/log/anaconda-link" in said["loop"]
    assert f"| ... {15 + 1100 * 1000 - (1 << 20)} bytes are not shown." in said["loop"]
    for build in builds.values():
        raw = image(build)
        assert run("zerofree", "-n", "-v", f"{raw}?offset={OFFSET}").stdout.splitlines()[-1].startswith("0/")
        assert raw.stat().st_blocks * 512 < 20 << 20
    left = listing(image(builds["guestfs"]))
    assert {"etc/fstab", "root/.bashrc", "var/log/installer-not-really", "var/adm"} <= left.keys()
    assert not [name for name in left if re.match(r"var/log/(anaconda|installer$|YaST2)|root/(install|ana)", name)]


def test_hostile_links(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Links where the logs belong: what is behind them is neither shown nor removed, on no machine."""
    tree = tmp_path / "tree"
    for name in ("etc/installer", "etc/YaST2", "etc/logs", "var/adm", "var/lib", "home"):
        (tree / name).mkdir(parents=True)
    kept = {
        "etc/fstab", "etc/installer/syslog", "etc/YaST2/y2log", "etc/anaconda.log", "etc/install.log",
        "etc/anaconda-ks.cfg", "etc/logs/y",
    }  # fmt: skip
    for name in kept:
        (tree / name).write_text("the guest's own\n")
    links = {"root": "/etc", "var/log": "../etc", "var/adm/autoinstall": "/etc", "var/lib/YaST2": "/home"}
    for name, target in links.items():
        (tree / name).symlink_to(target)
    builds = {way: make_build(tmp_path / way, way) for way in ("loop", "guestfs")}
    disk = make_disk(builds["loop"], tree)
    run("cp", "--sparse=always", disk.path, builds["guestfs"].disk_path)
    said = finish_both(builds, caplog)
    assert said["loop"] == said["guestfs"] == ["Removed /var/lib/YaST2", "Removed /var/adm/autoinstall"]
    left = listing(image(builds["guestfs"])).keys()
    assert {*kept, "root", "var/log", "home"} <= left


PACKAGES = 40


def make_dpkg_tree(directory: Path) -> Path:
    """Make a tree with the first packages of this machine, and with what is not to be loaded."""
    paragraphs = Path("/var/lib/dpkg/status").read_text().split("\n\n")[:PACKAGES]
    for name in ("etc", "usr/lib", "usr/share/doc", "var/lib/dpkg", "root", "odd name"):
        (directory / name).mkdir(parents=True)
    (directory / "var/lib/dpkg/status").write_text("\n\n".join(paragraphs))
    for name in re.findall("^Package: (.*)$", "\n".join(paragraphs), re.MULTILINE):
        run("cp", "--archive", f"/usr/share/doc/{name}", directory / "usr/share/doc", check=False)
    (directory / "usr/lib/os-release").write_text("ID=debian\nVERSION_ID=12\n")
    (directory / "etc/os-release").symlink_to("../usr/lib/os-release")
    (directory / "etc/fstab").touch()
    (directory / "etc/empty").touch()
    (directory / "etc/binary").write_bytes(bytes(range(256)) * 9000)
    (directory / "host").symlink_to("/etc")
    os.mkfifo(directory / "etc/fifo")
    with (directory / "etc/huge").open("w") as file:
        file.truncate(1 << 40)
        file.write("huge")
    return directory


def test_both_ways_load_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the appliance a file takes three short questions: each program that libguestfs runs there takes its time."""
    tree_directory = make_dpkg_tree(tmp_path / "tree")
    asked: list[str] = []
    say = Conversation._say

    def note(talk: Conversation, line: str) -> None:
        asked.append(line.split()[0])
        say(talk, line)

    monkeypatch.setattr(Conversation, "_say", note)
    found, seconds = {}, {}
    for way in ("loop", "guestfs"):
        build = make_build(tmp_path / way, way)
        with mounts.mounted(build, make_disk(build, tree_directory)) as tree:
            asked.clear()
            start = time.monotonic()
            packages = inventory.read_packages(tree.load, build.directory / "rpm")
            seconds[way] = time.monotonic() - start
            assert set(asked) <= {"-lstatns", "pread"}
            assert len(asked) <= 3 * PACKAGES + 20
            whole = (tree_directory / "etc/binary").read_bytes()
            assert tree.load("etc/binary", len(whole) + 1) == whole
            assert tree.load("etc/binary", 1000, 5000) == whole[5000:6000]
            assert tree.load("etc/binary", 1000, len(whole) - 10) == whole[-10:]
            assert tree.load("etc/binary", 1000, len(whole) + 10) == tree.load("etc/empty", 9) == b""
            assert tree.load("etc/huge", 6) == b"huge\0\0"
            for path in ("etc/os-release", "etc/fifo", "etc", "host/passwd", "none", "none/none"):
                assert tree.load(path, 9) is None, path
            found[way] = packages, inventory.read_os(tree.load), tree.usage()
    assert found["loop"] == found["guestfs"]
    packages, system, usage = found["loop"]
    assert len(packages) > PACKAGES / 2 < sum(package.licenses is not None for package in packages) * 2
    assert system == {"id": "debian", "version_id": "12"}
    assert list(usage) == [".", "etc", "lost+found", "odd name", "root", "usr", "var"]
    assert usage["usr"] > 1 << 20
    print(f"Seconds for {len(packages)} packages: {seconds}")


# Names that are no words as they are, and those that a directory of an installer may have any number of.
ODD_NAMES = (b"a b", b"a\nst_dev: 1\nb", b"-l", b"{a,b}", b"'q\"$(id)`~", b"\xff", b".h", b"lost+found")


def test_what_is_asked_of_many_files(tmp_path: Path) -> None:
    """Of many at once: as of each alone, whatever they are called, and where the way leads through a link, nothing."""
    top = make_tree(tmp_path / "tree") / "etc/many"
    top.mkdir()
    data = {f"n{number}": os.urandom(number) for number in range(900)}
    for name in ODD_NAMES:
        data[os.fsdecode(name)] = name
    for name, content in data.items():
        (top / name).write_bytes(content)
    (top / "directory").mkdir()
    (top / "link").symlink_to("n1")
    os.mkfifo(top / "fifo")
    (top.parent / "linked").symlink_to("many")
    with (top / "too long").open("w") as file:
        file.truncate((1 << 20) + 1)
    build = make_build(tmp_path / "build")
    descriptor = os.open(tmp_path / "tree/var/log/installer", os.O_RDONLY)
    for _ in range(8):
        os.mkdir(b"\xff" * 255, dir_fd=descriptor)
        below = os.open(b"\xff" * 255, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    del data["lost+found"]
    with mounts.mounted(build, make_disk(build, tmp_path / "tree")) as tree:
        found = {
            entry.path: entry.kind for entry in tree.entries(["etc/many/*", "etc/linked/*", "etc/none/*", "etc/*"])
        }
        kinds = {"etc/many/directory": "directory", "etc/many/link": "link", "etc/many/fifo": "other"}
        files = {f"etc/many/{name}": content for name, content in data.items()}
        assert found == {
            **dict.fromkeys([*files, "etc/many/too long", "etc/fstab"], "file"),
            **kinds,
            "etc/many": "directory",
            "etc/linked": "link",
        }
        assert tree.read(["etc/many/*", "etc/linked/*"]) == files
        assert tree.load("etc/many/../fstab", 9) is None
        # guestfish would take the end of so long a name for a command of its own.
        with pytest.raises(BuildError, match="guestfish takes no command of more than"):
            tree.show(["var/log/installer"])
        # A directory is looked at anew when it may be another.
        assert tree.load("etc/many/n1", 9) == data["n1"]
        tree.rename("etc/many", "other")
        assert tree.load("etc/many/n1", 9) is None
        assert tree.load("etc/other/n1", 9) == data["n1"]
        tree.remove(["etc/other"])
        assert tree.load("etc/other/n1", 9) is None


def test_nothing_is_left_in_the_chunks_of_a_thin_pool(tmp_path: Path) -> None:
    """A pool frees whole chunks of 64 KiB alone; here each one has blocks of files that stay, too.

    The unused blocks of ext4 are zeroed, and btrfs is filled with zeros.
    """
    build = make_build(tmp_path / "build")
    disk = Disk(build.disk_path)
    tree = tmp_path / "tree"
    names = [f"var/log/installer/{number}" for number in range(64)]
    others = [f"var/lib/kept/{number}" for number in range(64)]
    for name, data in [(name, b"a secret of the build") for name in names] + [(name, b"kept") for name in others]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data.ljust(4096, b"."))
    (tree / "etc").mkdir()
    (tree / "etc/fstab").write_text("/dev/vg/root / ext4 defaults 0 1\n/dev/vg/var /var btrfs defaults 0 2\n")
    (tree / "root").mkdir()
    mixed = [name for pair in zip(names, others, strict=True) for name in pair]
    run("tar", "-C", tree / "var", "-cf", tmp_path / "var.tar", *(name.removeprefix("var/") for name in mixed))
    old = "root/install.log"
    for number in range(64):
        for name, data in ((f"{old}.{number}", b"a secret of the build"), (f"root/{number}", b"kept")):
            (tree / name).write_bytes(data.ljust(4096, b"."))
    mixed = [name for number in range(64) for name in (f"{old}.{number}", f"root/{number}")]
    run("tar", "-C", tree, "-cf", tmp_path / "root.tar", "etc/fstab", *mixed)
    # No larger than btrfs has to be: under emulation it takes long to fill it.
    run("truncate", "-s", "400M", disk.path)
    lines = [
        f"add {appliance.quoted(str(disk.path))} format:raw",
        "run",
        "part-disk /dev/sda mbr",
        "pvcreate /dev/sda1",
        "vgcreate vg /dev/sda1",
        # The appliance lacks a program that lvm wants to check pools with.
        'debug sh "ln -s /bin/true /usr/sbin/thin_check; lvm lvcreate -q -L 300M -T vg/pool"',
        'debug sh "lvm lvcreate -q -V 60M -T vg/pool -n root; lvm lvcreate -q -V 160M -T vg/pool -n var"',
        'debug sh "lvm vgchange -q -ay; udevadm settle"',
        *("mkfs ext4 /dev/vg/root", "mkfs btrfs /dev/vg/var"),
        *("mount /dev/vg/root /", f"tar-in {tmp_path}/root.tar /", "umount /"),
        *("mount /dev/vg/var /", f"tar-in {tmp_path}/var.tar /", "umount /"),
    ]
    script = tmp_path / "script"
    script.write_text("\n".join(lines) + "\n")
    run("guestfish", "-f", script, env=appliance.environment(build))
    assert disk.path.read_bytes().count(b"a secret of the build") >= 128
    done_stage(build, "clean")
    data = disk.path.read_bytes()
    assert data.count(b"kept....") >= 128
    assert data.count(b"a secret of the build") == 0
    # What btrfs was filled with is no data any more.
    assert disk.path.stat().st_blocks * 512 < 80 << 20


def lvm_disk(build: Build) -> Disk:
    disk = Disk(build.disk_path)
    run("truncate", "-s", "16M", disk.path)
    subprocess.run(["sfdisk", "--quiet", disk.path], input="label: gpt\nstart=1MiB\n", text=True, check=True)
    part = disk.path.with_name("part")
    run("truncate", "-s", "14M", part)
    options = 'devices{filter=["a|^/dev/loop|","r|.*|"] scan_lvs=0}'
    device = run("losetup", "--find", "--show", part).stdout.strip()
    try:
        run("pvcreate", "-q", "--config", options, device)
    finally:
        run("losetup", "--detach", device)
    with disk.path.open("r+b") as file:
        file.seek(OFFSET)
        file.write(part.read_bytes())
    part.unlink()
    return disk


def test_logical_volumes_are_not_for_loop(tmp_path: Path) -> None:
    build = make_build(tmp_path / "build", "loop")
    disk = lvm_disk(build)
    with pytest.raises(BuildError) as raised, mounts.mounted(build, disk):
        pytest.fail("it was mounted")
    assert raised.value.message == "The disk has LVM on partition 1, which mount-via = loop can't reach."
    assert raised.value.hint == "Set mount-via to guestfs or auto."


@pytest.mark.parametrize("lacking", ["guestfish", "kernel"])
def test_logical_volumes_without_guestfish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """Where auto has chosen loop, guestfs is taken; the error says what that needs."""
    build = make_build(tmp_path / "build", "loop")
    build = dataclasses.replace(build, plan=dataclasses.replace(build.plan, guestfs_allowed=True))
    disk = lvm_disk(build)
    if lacking == "kernel":
        monkeypatch.setattr(appliance, "BOOT", tmp_path)
    else:
        monkeypatch.setattr(appliance, "_ARGV", ["guestfish-that-is-not-there"])
    with pytest.raises(BuildError) as raised, mounts.mounted(build, disk):
        pytest.fail("it was mounted")
    assert raised.value.exit_status == 1
    assert raised.value.message.startswith("The disk has LVM on partition 1, which only guestfish can reach: ")
    assert "apt-get install guestfish linux-image-cloud-amd64" in (raised.value.hint or "")


@pytest.mark.parametrize(
    ("kernel", "modules", "allowed", "way"),
    [
        ("nodev\tproc\n\text4\n", "", True, appliance),
        (
            "nodev\tproc\n\text4\n",
            "kernel/fs/fat/fat.ko:\nkernel/fs/fat/msdos.ko: kernel/fs/fat/fat.ko\n",
            True,
            appliance,
        ),
        ("nodev\tproc\n\text4\n", "", False, loop),
        ("nodev\tproc\n\text4\n\tvfat\n", "", True, loop),
        ("\text4\n", "kernel/fs/fat/vfat.ko.xz: kernel/fs/fat/fat.ko.xz\n", True, loop),
    ],
)
def test_filesystem_that_the_kernel_can_not_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, modules: str, allowed: bool, way: mounts.Way
) -> None:
    """Where auto has chosen loop, guestfs is taken if there is no driver, nor a module of one."""
    (tmp_path / "filesystems").write_text(kernel)
    (tmp_path / os.uname().release).mkdir()
    (tmp_path / os.uname().release / "modules.dep").write_text(modules)
    monkeypatch.setattr(loop, "FILESYSTEMS", tmp_path / "filesystems")
    monkeypatch.setattr(loop, "MODULES", tmp_path)
    plan = dataclasses.replace(make_build(tmp_path / "build", "loop").plan, guestfs_allowed=allowed)
    volumes = [Volume("partition 1", 1, "vfat"), Volume("partition 2", 1, "ext3"), Volume("partition 3", 1, "jfs")]
    assert mounts._way_to(volumes, plan) is way
    assert mounts._way_to(volumes[1:], plan) is loop
    monkeypatch.setattr(appliance, "_ARGV", ["guestfish-that-is-not-there"])
    assert mounts._way_to(volumes, plan) is loop


@pytest.mark.parametrize(("table", "fits"), [("start=1MiB", True), ("size=4MiB\nsize=4MiB", False)])
def test_single_partition(tmp_path: Path, table: str, fits: bool) -> None:
    build = make_build(tmp_path / "build", "loop", require_single_partition=True)
    run("truncate", "-s", "16M", build.disk_path)
    subprocess.run(["sfdisk", "--quiet", build.disk_path], input=f"label: dos\n{table}\n", text=True, check=True)
    with pytest.raises(BuildError) as raised, mounts.mounted(build, Disk(build.disk_path)):
        pytest.fail("it was mounted")
    assert raised.value.message == (
        "The disk has no root filesystem, only partition 1 (no known filesystem)."
        if fits
        else "The disk has 2 partitions, and require-single-partition = yes: "
        "partition 1 (no known filesystem), partition 2 (no known filesystem)."
    )


def test_no_root(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "etc").symlink_to("usr")
    (tree / "usr").mkdir()
    (tree / "usr/fstab").touch()
    build = make_build(tmp_path / "build")
    disk = make_disk(build, tree)
    with pytest.raises(NoSystemError, match="None of the disk's filesystems is a root"), mounts.mounted(build, disk):
        pytest.fail("it was mounted")


def test_no_filesystem(tmp_path: Path) -> None:
    build = make_build(tmp_path / "build")
    disk = make_disk(build, None, size=20)
    with disk.path.open("r+b") as file:
        file.seek(OFFSET)
        file.write(bytes(19 << 20))
    with pytest.raises(NoSystemError, match=r"only partition 1 \(no known"), mounts.mounted(build, disk):
        pytest.fail("it was mounted")


def test_root_that_is_read_only(tmp_path: Path) -> None:
    """It is writable while the system is worked on, and read-only again, also where the build before was killed.

    A build whose appliance is killed ends with what guestfish says of it; QEMU's end is a release that fails, too.
    """
    build = make_build(tmp_path / "build")
    disk = make_micro(build.disk_path)
    record = build.directory / READ_ONLY_NAME
    with mounts.mounted(build, disk) as tree:
        assert json.loads(record.read_text()) == [["partition 1", "system"]]
        assert tree.remove(["etc/log"]) == [Change("etc/log", 1, 5)]
        tree.write("etc/new", b"new", 0o644)
        tree.root.filesystem.trim()
    assert not record.exists()
    assert is_read_only(disk)
    with (
        pytest.raises(CommandError, match=r"guestfish failed with status 1: .*libguestfs: error: "),
        mounts.mounted(build, disk),
    ):
        run("pkill", "-KILL", "-f", f"^[^ ]*qemu.*{tmp_path}")
    assert record.exists()
    # It is so at the end of what goes on with it, in the other way, too.
    assert not is_read_only(disk)
    assert not record.exists()
    assert is_read_only(disk)


def test_directories_that_are_linked_into_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are 2**30 ways to the last one: the appliance gives them up, and answers what comes next.

    All is released when the body raises what is no error of a build.
    """
    build = make_build(tmp_path / "build")
    disk = make_disk(build, make_tree(tmp_path / "tree"), "ext4", "-b", "1024")
    lines = ["cd /root", *(f"mkdir d{number}" for number in range(31))]
    lines += [f"link d{number + 1} d{number}/{name}" for number in range(30) for name in "ab"]
    script = tmp_path / "script"
    script.write_text("\n".join(lines))
    run("debugfs", "-w", "-f", script, f"{disk.path}?offset={OFFSET}")
    with pytest.raises(ZeroDivisionError), mounts.mounted(build, disk) as tree:
        assert tree.root.filesystem.usage("root")["d0"] == 31 << 10
        monkeypatch.setattr(appliance, "_ENTRIES", 1000)
        with pytest.raises(BuildError, match=r"^/root/d0 of the guest has more than 1000 entries\.$"):
            tree.remove(["root/d0"])
        # Fewer may be counted before the time is up.
        monkeypatch.setattr(appliance, "_ENTRIES", 1 << 30)
        monkeypatch.setattr(appliance, "_WALK_SECONDS", 1)
        too_much = r" of the guest has too much below it to be looked at in [01] s\.$"
        for action in (tree.key_files, lambda: tree.remove(["root/d0"])):
            with pytest.raises(BuildError, match=too_much):
                action()
        # What is looked at here, and not there, goes less deep.
        monkeypatch.setattr(appliance, "_WALK_SECONDS", 0)
        with pytest.raises(BuildError, match=too_much):
            tree.truncate(["root/d0"])
        assert tree.read(["root/.bashrc"]) == {"root/.bashrc": b"the text of 'root/.bashrc'\n"}
        assert tree.root.filesystem.volume.partition is not None
        raise ZeroDivisionError


def test_interrupted_while_the_appliance_boots(tmp_path: Path) -> None:
    build = make_build(tmp_path / "build")
    disk = make_disk(build, None)
    with interrupts.handled():
        timer = threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        with pytest.raises(Interrupted), mounts.mounted(build, disk):
            pytest.fail("it was mounted")
        timer.join()


def test_nothing_is_left_when_the_program_is_killed(tmp_path: Path) -> None:
    """guestfish sees the end of its input, and ends the appliance."""
    before = state()
    build = make_build(tmp_path / "build")
    make_disk(build, make_tree(tmp_path / "tree"))
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from tests.system.test_appliance import hold; hold(sys.argv[1])", tmp_path],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mounted\n"
        assert appliances()
        process.kill()
    wait_for(lambda: not set(state()) - set(before), "the appliance to end, and its files to be removed")
    assert not list((tmp_path / "holder").glob("libguestfs*"))


def hold(directory: str) -> None:
    """Mount the disk below *directory*, say so, and wait."""
    build = make_build(Path(directory, "holder"))
    with mounts.mounted(build, Disk(Path(directory, "build/disk.raw"))):
        print("mounted", flush=True)
        time.sleep(60)


def test_no_kernel_for_the_appliance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_build(tmp_path / "build").plan
    monkeypatch.setattr(appliance, "BOOT", tmp_path)
    (tmp_path / "vmlinuz-1-without-modules").touch()
    with pytest.raises(ConfigurationError, match=f"needs a kernel in {tmp_path} with its modules") as raised:
        appliance.check(plan)
    assert raised.value.hint == "Install one: apt-get install linux-image-cloud-amd64"


def test_kernel_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Ubuntu.  The newest counts."""
    plan = make_build(tmp_path / "build").plan
    for name in ("BOOT", "MODULES"):
        monkeypatch.setattr(appliance, name, tmp_path / name)
    for version in ("6.9.0-1", "6.10.0-2"):
        (tmp_path / "MODULES" / version).mkdir(parents=True)
        (tmp_path / "MODULES" / version / "modules.dep").touch()
        (tmp_path / "BOOT").mkdir(exist_ok=True)
        (tmp_path / "BOOT" / f"vmlinuz-{version}").touch()
    kernel = tmp_path / "BOOT/vmlinuz-6.10.0-2"
    # Root can read all.
    monkeypatch.setattr(os, "access", lambda path, mode: path != kernel)
    with pytest.raises(ConfigurationError, match=f"needs to read the kernel {kernel}") as raised:
        appliance.check(plan)
    assert raised.value.hint == f"Allow it: sudo chmod a+r {kernel}"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("/var/log/a-b_c.d", "/var/log/a-b_c.d"),
        ("/a b", '"/a\\x20b"'),
        ('/"\n$;|*~', '"/\\x22\\x0a\\x24\\x3b\\x7c\\x2a\\x7e"'),
        ("-x", '"-x"'),
        ("", '""'),
        (os.fsdecode(b"/\xff"), '"/\\xff"'),
    ],
)
def test_words_for_guestfish(text: str, word: str) -> None:
    assert appliance.quoted(text) == word


@pytest.mark.parametrize(
    ("name", "number", "kind", "top", "words"),
    [
        ("partition 5", 5, "ext4", "", ("/dev/sda5", "/var")),
        ("partition 5", 5, "btrfs", "@/var", ("/dev/sda5", "/var", "subvol=/@/var")),
        ("partition 5", 5, "btrfs", "", ("/dev/sda5", "/var", "subvol=/")),
        ("/dev/vg/var", None, "xfs", "", ("/dev/vg/var", "/var")),
    ],
)
def test_what_a_shell_mounts(name: str, number: int | None, kind: str, top: str, words: tuple[str, ...]) -> None:
    volume = Volume(name, 1, kind, partition=Partition(number, 0, 1) if number else None)
    filesystem = appliance.ApplianceFilesystem(cast(Build, None), cast(Conversation, None), "/place", volume)
    assert appliance._mount_words(Branch(filesystem, top, "var")) == words


def test_environment(tmp_path: Path) -> None:
    build = make_build(tmp_path / "build")
    environment = appliance.environment(dataclasses.replace(build, virt_type="qemu"))
    assert environment["LIBGUESTFS_BACKEND"] == "direct"
    assert environment["LIBGUESTFS_BACKEND_SETTINGS"] == "force_tcg"
    assert "LIBGUESTFS_BACKEND_SETTINGS" not in appliance.environment(dataclasses.replace(build, virt_type="kvm"))
