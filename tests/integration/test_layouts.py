"""Disks as installers lay them out, installed by the stand-in and finished by each kind of user.

A layout is installed once.  Each user goes on, with --resume, from a copy of what that build has left.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from image_factory.base.files import digest_of
from image_factory.system import loop

from ..conftest import User, run
from ..system.test_elements_run import script
from .test_build import ANSWERS, INSTALLER_LOGS, SURVIVORS, TODAY, WORK, Build

pytestmark = pytest.mark.usefixtures("machine")

RAW = f"stand-in-{TODAY}.raw"
DELETED, SWAPPED, LOGGED = "stand-in: this was deleted", "stand-in: this was swapped out", "stand-in installer log: "


@dataclass(frozen=True)
class Layout:
    """*mounts* has the places of the system with number of the partition and subvolume; *said* is in the log."""

    mounts: Mapping[str, tuple[int, str]]
    said: tuple[str, ...]
    swap: int | None = None


LAYOUTS = {
    "mbr": Layout(
        {"": (5, ""), "boot": (1, "")}, ("/ is on partition 5 (ext3).", "/boot is on partition 1 (ext2)."), 6
    ),
    "efi": Layout({"": (2, ""), "var": (3, "")}, ("/ is on partition 2 (xfs).", "/var is on partition 3 (ext4)."), 4),
    "btrfs": Layout(
        {"": (2, "@rootfs"), "home": (2, "@home"), "var/log": (2, "@var-log")},
        (
            "/ is on partition 2 (btrfs, subvolume @rootfs).",
            "/home is on partition 2 (btrfs, subvolume @home).",
            "/var/log is on partition 2 (btrfs, subvolume @var-log).",
        ),
    ),
    "suse": Layout(
        {"": (2, "@/.snapshots/1/snapshot"), "var": (2, "@/var")},
        (
            "/ is on partition 2 (btrfs, subvolume @/.snapshots/1/snapshot).",
            "/var is on partition 2 (btrfs, subvolume @/var).",
        ),
    ),
    # This machine's kernel has no LVM to look into the image with: see the test of it.
    "lvm": Layout(
        {},
        (
            "The disk has LVM on partition 2: it is mounted by way of guestfs.",
            "/ is on /dev/stand-in/root (ext4).",
            "/var is on /dev/stand-in/var (ext4).",
            "/boot is on partition 1 (ext2).",
        ),
    ),
}


@pytest.fixture(scope="module")
def installed(users: dict[str, User], stand_in: Path) -> Iterator[Mapping[str, Path]]:
    """The working directories of builds that have just installed a layout, made when they are asked for."""
    user = users["root"]
    directory = user.directory("layouts")

    class Installed(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            build = Build(user, directory / name, stand_in)
            build.directory.mkdir()
            configure(build, name)
            build.run("--until", "install")
            self[name] = build.directory / WORK
            return self[name]

    yield Installed()
    shutil.rmtree(directory)


def configure(build: Build, name: str, extra: str = "") -> None:
    build.configure(
        netboot=str(build.stand_in / "layouts"),
        arguments=f"stand-in=layout:{name}",
        size="640M",
        extra=f"format = raw\ninstaller-logs = yes\n{extra}",
    )
    assert (build.directory / "answers.cfg").read_text() == ANSWERS


def take(build: Build, installed: Mapping[str, Path], name: str, extra: str = "") -> None:
    """Have *build* go on from a copy of what was installed."""
    configure(build, name, extra)
    build.go_on_from(installed[name])


def finish(build: Build, installed: Mapping[str, Path], name: str, extra: str = "") -> str:
    """Finish a copy of the installed disk as the user of *build*; return the log."""
    take(build, installed, name, extra)
    return build.run("--resume").stderr


def partition(raw: Path, number: int) -> tuple[int, int]:
    """Return where a partition begins and how long it is."""
    listing = run("sfdisk", "--dump", raw).stdout
    [(start, size)] = re.findall(rf"{re.escape(raw.name)}{number} : start= *([0-9]+), size= *([0-9]+)", listing)
    return int(start) * 512, int(size) * 512


@contextmanager
def mounted(raw: Path, layout: Layout) -> Iterator[Path]:
    """Give the system in *raw*, with its filesystems below each other, read-only."""
    point = raw.parent / "mnt"
    point.mkdir()
    with ExitStack() as stack:
        stack.callback(point.rmdir)
        devices: dict[int, str] = {}
        for place, (number, subvolume) in layout.mounts.items():
            offset, size = partition(raw, number)
            if number not in devices:
                argv = ["losetup", "--find", "--show", "--offset", offset, "--sizelimit", size, "--read-only", raw]
                devices[number] = run(*map(str, argv)).stdout.strip()
                stack.callback(run, "losetup", "--detach", devices[number])
            options = f"ro,subvol={subvolume}" if subvolume else "ro"
            run("mount", "-o", options, devices[number], point / place)
            stack.callback(run, "umount", point / place)
        yield point


def lines_with(text: str, image: Path) -> int:
    """Return how many lines of the file have *text*."""
    return int(run("grep", "--text", "--count", "--fixed-strings", text, image, check=False).stdout)


def check_swap(raw: Path, offset: int, size: int) -> None:
    """The header is whole, and the rest is zeros."""
    with raw.open("rb") as file:
        file.seek(offset)
        area = file.read(size)
    assert area[4086:4096] == b"SWAPSPACE2"
    assert not area[4096:].strip(b"\0")
    found = run("blkid", "-p", "-o", "export", "-O", str(offset), "-S", str(size), raw).stdout
    assert {"TYPE=swap", "LABEL=stand-in-swap"} <= set(found.splitlines())


@pytest.mark.parametrize("name", ["mbr", "efi", "btrfs", "suse"])
def test_layout(build: Build, installed: Mapping[str, Path], name: str) -> None:
    layout = LAYOUTS[name]
    log = finish(build, installed, name, "mount-via = loop\n")
    check_finished(build.directory / RAW, log, layout)
    fat = not loop.lacks_driver("vfat")
    # Nobody can free the unused blocks of FAT with a kernel that doesn't know it, and the log says so.
    expected = name == "efi" and not fat
    assert ("partition 1 (vfat) can't be mounted: its unused blocks stay." in log) is expected
    assert (lines_with(DELETED, build.directory / RAW) > 0) is expected


# Scripts that need no shell in the system, which has none.
ELEMENT = """\
env | grep -E '^(DISTRO_NAME|DIB_ROOT_FSTYPE|DIB_MOUNTPOINTS|FS_TYPE)=' | sort >"$TARGET_ROOT/etc/told"
for place in boot home var var/log; do echo of the element >"$TARGET_ROOT/$place/of-element"; done
"""


@pytest.mark.parametrize(
    ("name", "kind", "points"),
    [("mbr", "ext3", "/|/boot"), ("efi", "xfs", "/|/var"), ("btrfs", "btrfs", "/|/home|/var/log")],
)
def test_elements(root_build: Build, installed: Mapping[str, Path], name: str, kind: str, points: str) -> None:
    """On the disk of an installer, with all that it mounts; those that fail leave it as it was."""
    build, layout = root_build, LAYOUTS[name]
    path = build.directory / "elements/look/root.d/50-look"
    script(path, f"{ELEMENT}exit 7")
    extra = f"mount-via = loop\nelements = look\nskip-base = yes\nelements-path = {path.parents[2]}\n"
    take(build, installed, name, extra)
    disk = build.directory / WORK / "disk.raw"
    before = digest_of(disk)
    failed = build.run("--resume", check=False)
    assert "root.d/50-look of the element look failed with status 7" in failed.stderr
    assert (failed.returncode, digest_of(disk)) == (1, before)
    script(path, ELEMENT)
    done = build.run("--resume")
    assert "Merging elements ..." in done.stderr and "Installing ..." not in done.stderr
    with mounted(build.directory / RAW, layout) as tree:
        told = dict(line.split("=", 1) for line in (tree / "etc/told").read_text().splitlines())
        texts = {place: (tree / place / "of-element").read_text() for place in ("boot", "home", "var", "var/log")}
    points = points if name != "efi" or loop.lacks_driver("vfat") else "/|/boot/efi|/var"
    assert told == {"DISTRO_NAME": "stand-in", "DIB_ROOT_FSTYPE": kind, "DIB_MOUNTPOINTS": points, "FS_TYPE": kind}
    # Logs are emptied when all have run.
    assert texts == {**dict.fromkeys(("boot", "home", "var"), "of the element\n"), "var/log": ""}


def check_finished(raw: Path, log: str, layout: Layout) -> None:
    for line in (*layout.said, "| ==> /var/log/installer/syslog <==", "| ==> /root/install.log <=="):
        assert f"INFO: {line}\n" in log
    assert [path for path in INSTALLER_LOGS if not re.search(rf"INFO: Removed /{path}\n", log)] == []
    assert "which its fstab names" not in log
    with mounted(raw, layout) as tree:
        assert [path for path in INSTALLER_LOGS if (tree / path).exists()] == []
        assert [path for path in SURVIVORS if not (tree / path).exists()] == []
        uuids = re.findall(r"^UUID=(\S+) none swap", (tree / "etc/fstab").read_text(), re.MULTILINE)
    assert (lines_with(SWAPPED, raw), lines_with(LOGGED, raw)) == (0, 0)
    assert raw.stat().st_blocks * 512 < 64 << 20
    if layout.swap:
        offset, size = partition(raw, layout.swap)
        check_swap(raw, offset, size)
        argv = ["blkid", "-p", "-s", "UUID", "-o", "value", "-O", str(offset), "-S", str(size)]
        assert run(*argv, raw).stdout.split() == uuids


@pytest.mark.parametrize("name", ["efi", "btrfs"])
def test_layout_without_root(rootless_build: Build, installed: Mapping[str, Path], name: str) -> None:
    log = finish(rootless_build, installed, name)
    check_finished(rootless_build.directory / RAW, log, LAYOUTS[name])
    # The appliance's kernel knows FAT.
    assert lines_with(DELETED, rootless_build.directory / RAW) == 0


def test_logical_volumes(user_build: Build, installed: Mapping[str, Path]) -> None:
    """Loop is chosen, and LVM is reached in the appliance all the same."""
    log = finish(user_build, installed, "lvm", "mount-via = auto\n")
    raw = user_build.directory / RAW
    assert "INFO: mount-via = loop is chosen: " in log
    for line in (*LAYOUTS["lvm"].said, "| ==> /var/log/installer/syslog <=="):
        assert f"INFO: {line}\n" in log
    assert [path for path in INSTALLER_LOGS if not re.search(rf"INFO: Removed /{path}\n", log)] == []
    assert [lines_with(text, raw) for text in (DELETED, SWAPPED, LOGGED)] == [0, 0, 0]
    # The header of the swap space is somewhere in the group; its UUID is the one that it had.
    data = raw.read_bytes()
    before = (installed["lvm"] / "disk.raw").read_bytes()
    headers = [image[image.index(b"SWAPSPACE2") - 4086 :][:1100] for image in (data, before)]
    # From linux/swap.h: version, last page, bad pages; then UUID and label.
    assert headers[0][1024:1068] == headers[1][1024:1068]
    assert headers[0][1052:].startswith(b"stand-in-swap\0")


def test_single_partition_is_required(user_build: Build, installed: Mapping[str, Path]) -> None:
    """The disk is kept: without the setting --resume goes on."""
    take(user_build, installed, "mbr", "require-single-partition = yes")
    done = user_build.run("--resume", check=False)
    assert done.returncode == 1
    assert user_build.errors(done)[0] == (
        "image-factory: error: The disk has 3 partitions, and require-single-partition = yes: "
        "partition 1 (ext2), partition 5 (ext3), partition 6 (swap)."
    )
    assert "image-factory --resume stand-in" in done.stderr
    configure(user_build, "mbr")
    user_build.run("--resume")
    assert (user_build.directory / RAW).exists()


def test_logical_volumes_with_loop_alone(user_build: Build, installed: Mapping[str, Path]) -> None:
    take(user_build, installed, "lvm", "mount-via = loop")
    done = user_build.run("--resume", check=False)
    assert done.returncode == 1
    error = "image-factory: error: The disk has LVM on partition 2, which mount-via = loop can't reach."
    assert user_build.errors(done)[0] == error
    assert "Set mount-via to guestfs or auto" in done.stderr
