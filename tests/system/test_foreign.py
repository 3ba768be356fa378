"""Images that others have made, opened without a configuration: whole, hostile, in use."""

import gzip
import io
import lzma
import os
import signal
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from image_factory import foreign, workspace
from image_factory.base import command, locks
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.model import Artifact
from tests.conftest import wait_for

SIZE = 8 << 20
TABLE = "label: dos\nstart=2048, type=83\n"
# The same for all users, and nothing to be found out.
WAY = {"mount-via": "guestfs", "virt-type": "qemu"}


@pytest.fixture(scope="module", autouse=True)
def reaping() -> Iterator[None]:
    with command.reaping():
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["sfdisk", "--quiet", path], input=TABLE, text=True, check=True, capture_output=True)
    return path


def left() -> list[Path]:
    """Return the directories that none of the runs at once has in use."""
    found = []
    for path in Path("/var/tmp").glob(".image-factory-foreign.*"):
        with suppress(OSError):
            descriptor = locks.lock(path)
            if descriptor is not None:
                os.close(descriptor)
                found.append(path)
    return found


def look(path: Path, **given: str) -> tuple[Artifact, bytes]:
    """Return what is opened of *path*, with what it begins with, when nothing is left of it."""
    before = left()
    state = path.stat()
    plan = foreign.plan_of("--audit", path, {"audit": "yes"}, {**WAY, **given}, {})
    with foreign.opened(plan, path) as (build, artifact):
        assert artifact.path.parent.parent == build.directory
        found = artifact, artifact.path.read_bytes()[:SIZE]
    assert left() == before
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    return found


def converted(disk: Path, driver: str) -> bytes:
    path = disk.with_name(f"converted.{driver}")
    subprocess.run(["qemu-img", "convert", "-O", driver, disk, path], check=True, capture_output=True)
    return path.read_bytes()


def tarred(*names: str, data: bytes = b"text\n", **others: bytes) -> bytes:
    """Return a tar of regular files *names* with *data*, after the *others* with their own."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, text in others.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


# How the file is made, and the format of the artifact.
OPENED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "raw": (Path.read_bytes, "raw"),
    "qcow2": (lambda disk: converted(disk, "qcow2"), "qcow2"),
    "vmdk": (lambda disk: converted(disk, "vmdk"), "vmdk"),
    "vpc": (lambda disk: converted(disk, "vpc"), "vhd"),
    "vhdx": (lambda disk: converted(disk, "vhdx"), "vhdx"),
    "vdi": (lambda disk: converted(disk, "vdi"), "vdi"),
    "xz": (lambda disk: lzma.compress(converted(disk, "qcow2")), "qcow2"),
    "disk in a tar": (lambda disk: gzip.compress(tarred("disk.raw", data=disk.read_bytes())), "raw"),
    "OVA": (lambda disk: tarred("x.vmdk", data=converted(disk, "vmdk"), **{"x.ovf": b"<", "x.mf": b"SHA"}), "vmdk"),
    "tree": (lambda disk: tarred("./etc/os-release", "./etc/fstab"), "tar"),
    "packed tree": (lambda disk: gzip.compress(tarred("./etc/os-release", "./etc/fstab")), "tar"),
}


@pytest.mark.parametrize("kind", OPENED)
@pytest.mark.parametrize("name", ["audit.raw", "-x y\n;$(id),\udcff.img", "a" * 250])
def test_opened(disk: Path, tmp_path: Path, kind: str, name: str) -> None:
    make, expected = OPENED[kind]
    path = tmp_path / name
    path.write_bytes(make(disk))
    artifact, begin = look(path)
    assert artifact.format == expected
    assert expected == "tar" or artifact.virtual_size >= SIZE
    assert "tree" not in kind or b"etc/fstab" in begin


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_disk_without_a_partition_table(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bare"
    with path.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", path], check=True, capture_output=True)
    assert look(path)[0].format == "raw"


def test_file_that_others_can_change_is_copied(disk: Path) -> None:
    disk.chmod(0o666)
    plan = foreign.plan_of("--audit", disk, {}, WAY, {})
    with foreign.opened(plan, disk) as (_, artifact):
        assert not artifact.path.is_symlink()
        assert stat.S_IMODE(artifact.path.stat().st_mode) == 0o600
        assert artifact.path.stat().st_blocks * 512 < SIZE


def test_huge_and_sparse(tmp_path: Path) -> None:
    path = tmp_path / "huge.raw"
    with path.open("wb") as file:
        file.truncate(8 << 40)
    subprocess.run(["sfdisk", "--quiet", path], input="label: gpt\n,\n", text=True, check=True, capture_output=True)
    # Whether it is copied or not.
    for mode in (0o600, 0o666):
        path.chmod(mode)
        plan = foreign.plan_of("--audit", path, {}, WAY, {})
        with foreign.opened(plan, path) as (_, artifact):
            assert artifact.virtual_size == 8 << 40


def backed(disk: Path) -> bytes:
    path = disk.with_name("overlay")
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "raw", path]
    subprocess.run(argv, check=True, capture_output=True)
    return path.read_bytes()


UNFIT: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty": (lambda disk: b"", "is empty"),
    "text": (lambda disk: b"no image\n" * 1000, "is no disk image"),
    "one byte": (lambda disk: b"\0", "is no disk image"),
    "LUKS": (lambda disk: b"LUKS\xba\xbe\0\2" + bytes(SIZE), "is encrypted with LUKS"),
    "backing file": (backed, "has a backing file"),
    "cut-off qcow2": (lambda disk: converted(disk, "qcow2")[:100], "ends within its own header"),
    "cut-off xz": (lambda disk: lzma.compress(disk.read_bytes())[:-20], "can't be unpacked"),
    "empty tar": (lambda disk: tarred(), "no disk image|has no disk"),
    "text in a tar": (lambda disk: tarred("x"), "is no disk image"),
    "cut-off tar": (lambda disk: tarred("a", data=bytes(5000))[:1000], "tar that is cut off|tar that can't be read"),
    "packed again and again": (
        lambda disk: gzip.compress(gzip.compress(gzip.compress(gzip.compress(gzip.compress(b"x"))))),
        "is packed again and again",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_unfit(disk: Path, kind: str) -> None:
    make, message = UNFIT[kind]
    path = disk.with_name("bad\n.img")
    path.write_bytes(make(disk))
    before = left()
    with pytest.raises(ConfigurationError, match=message):
        look(path)
    assert left() == before


def no_file(path: Path) -> None:
    pass


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "absent": (no_file, "is not there"),
    "directory": (Path.mkdir, "is not a file"),
    "FIFO": (os.mkfifo, "is not a file"),
    "socket": (a_socket, "is not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
    "link to itself": (lambda path: path.symlink_to(path), "is not there|can't be read"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_no_file(tmp_path: Path, kind: str) -> None:
    make, message = NO_FILES[kind]
    make(tmp_path / "x")
    with pytest.raises(ConfigurationError, match=f"^--audit: .*({message})"):
        foreign.plan_of("--audit", tmp_path / "x", {}, {}, {})


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_image_in_use(disk: Path, driver: str) -> None:
    path = disk.with_name("used")
    path.write_bytes(converted(disk, driver))
    # As a virtual machine has it.
    argv = ["qemu-io", "-f", driver, path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0) as holder:
        assert holder.stdin and holder.stdout
        print("length", file=holder.stdin, flush=True)
        wait_for(lambda: "MiB" in holder.stdout.readline(), "qemu-io")
        for mode in (0o600, 0o666):
            path.chmod(mode)
            with pytest.raises(ConfigurationError, match="is in use, as of a virtual machine"):
                look(path)
        holder.stdin.close()
    assert look(path)[0].format == driver


def test_settings_are_checked(disk: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"\[disk.raw\] ram: '2 GX' is not accepted"):
        foreign.plan_of("--audit", disk, {}, {"ram": "2 GX"}, {})
    plan = foreign.plan_of("--audit", disk, {"audit": "yes"}, {"audit": "no", "ram": "2G"}, {"output-dir": "/srv"})
    assert (plan.settings.audit, plan.settings.ram, plan.junit_path) == (True, 2 << 30, Path("/srv/disk.raw.junit.xml"))


PROGRAM = """\
import signal, sys
from pathlib import Path
from image_factory import foreign
from image_factory.base import command, locks
path = Path(sys.argv[1])
with command.reaping():
    given = {"mount-via": "guestfs", "virt-type": "qemu"}
    plan = foreign.plan_of("--audit", path, {}, given, {})
    with foreign.opened(plan, path) as (build, _):
        print(build.directory, flush=True)
        signal.pause()
"""


def test_what_a_killed_one_leaves_goes_with_the_next(disk: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", PROGRAM, disk]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        directory = Path(process.stdout.readline().strip())
        # One that runs is let be.
        assert not [line for line in workspace.remove_left(tmp_path) if str(directory) in line]
        process.send_signal(signal.SIGKILL)
    assert directory.is_dir()
    plan = foreign.plan_of("--audit", disk, {}, WAY, {})
    with foreign.opened(plan, disk):
        pass
    assert not directory.exists()


def test_failure_inside_leaves_nothing(disk: Path) -> None:
    plan = foreign.plan_of("--audit", disk, {}, WAY, {})
    with pytest.raises(BuildError), foreign.opened(plan, disk) as (build, _):
        raise BuildError("x")
    assert not build.directory.exists()
