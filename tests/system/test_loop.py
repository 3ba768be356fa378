"""Mounting the filesystems of a disk for real, as root, and letting go of them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import cast

import pytest

from image_factory.base import events
from image_factory.base.errors import BuildError, NoSystemError
from image_factory.model import READ_ONLY_NAME, Build, Change, Disk
from image_factory.system import loop, partitions
from image_factory.system.tree import Tree

from ..conftest import REPOSITORY, machine_state, run, wait_for


def mounted(disk: Disk) -> AbstractContextManager[Tree]:
    # It doesn't depend on the build.
    return loop.mounted(cast(Build, None), disk, partitions.read_volumes(disk.path))


def path_of(tree: Tree) -> Path:
    """Return where the root is mounted."""
    assert isinstance(tree.root.filesystem, loop.LoopFilesystem)
    return tree.root.filesystem.path


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> object:
    """The helper is the one of the checkout; at the end all is as before."""
    monkeypatch.setattr("sys.argv", [str(Path(__file__).parents[2] / "image-factory")])
    monkeypatch.setattr(loop, "_UMOUNT_SECONDS", 1.0)
    before = machine_state()
    yield
    assert machine_state() == before


def make_disk(tmp_path: Path, *filesystems: str, root: int | None = 0, fstab: str = "") -> Disk:
    """Make a disk with a partition of 20 MiB for each of *filesystems*; partition *root* has *fstab*.

    Each has installer logs, as if it was a root and as if it was /var.
    """
    path = tmp_path / "disk.raw"
    size = 20
    run("truncate", "-s", f"{2 + size * len(filesystems)}M", path)
    table = "".join(f"start={1 + size * index}MiB, size={size}MiB\n" for index in range(len(filesystems)))
    subprocess.run(["sfdisk", "--quiet", path], input=f"label: gpt\n{table}", text=True, check=True)
    for index, filesystem in enumerate(filesystems):
        tree = tmp_path / f"tree{index}"
        (tree / "etc").mkdir(parents=True)
        for name in ("var/log", "log"):
            (tree / name / "installer").mkdir(parents=True)
            (tree / name / "installer/syslog").write_text(f"log of partition {index + 1}\n")
        if index == root:
            (tree / "etc/fstab").write_text(fstab)
        offset = (1 + size * index) << 20
        if filesystem.startswith("ext"):
            options = ["-t", filesystem, "-d", tree, "-E", f"offset={offset}"]
            run("mke2fs", "-q", *options, path, f"{size}M")
    return Disk(path)


@pytest.mark.parametrize("filesystem", ["ext2", "ext3", "ext4"])
def test_root_is_mounted_and_unmounted(tmp_path: Path, filesystem: str) -> None:
    with mounted(make_disk(tmp_path, filesystem)) as tree:
        assert (path_of(tree) / "etc/fstab").exists()
        assert tree.root.filesystem.volume.filesystem == filesystem
    assert not path_of(tree).exists()


def test_root_is_found_among_others(tmp_path: Path) -> None:
    with mounted(make_disk(tmp_path, "none", "ext4", "ext4", root=2)) as tree:
        assert tree.root.filesystem.volume.name == "partition 3"
        assert [found.volume.name for found in tree.filesystems] == ["partition 2", "partition 3"]


def test_var_is_another_filesystem(tmp_path: Path) -> None:
    with mounted(make_disk(tmp_path, "ext4", "ext2", fstab="/dev/vda2 /var ext2 defaults 0 2\n")) as tree:
        assert tree.show(["var/log/installer"]) == "==> /var/log/installer/syslog <==\nlog of partition 2\n"
        assert tree.remove(["root/none", "var/log/installer"]) == [Change("var/log/installer", 2, 19)]
        # What the mount hides stays.
        assert (path_of(tree) / "var/log/installer/syslog").exists()
        assert all(found.trim() for found in tree.filesystems)


def test_mount_point_is_a_link_of_the_guest_s(tmp_path: Path) -> None:
    """It leads nowhere: nothing is mounted below the guest's directories."""
    disk = make_disk(tmp_path, "ext4", "ext4", fstab="/dev/vda2 /var ext4 defaults 0 2\n")
    run("debugfs", "-w", "-R", "rm /etc/os-release", f"{disk.path}?offset={1 << 20}")
    run("debugfs", "-w", "-R", "symlink /srv /etc", f"{disk.path}?offset={1 << 20}")
    with mounted(disk) as tree:
        assert tree.remove(["var/log/installer", "srv/fstab"]) == [Change("var/log/installer", 2, 19)]


@pytest.mark.parametrize("mode", ["0", "0600", "fifo", "directory", "link", "long", "binary"])
def test_fstab_of_any_kind(tmp_path: Path, mode: str) -> None:
    disk = make_disk(tmp_path, "ext4", "ext4", fstab="/dev/vda2 /var ext4 defaults 0 2\n")
    image, other = f"{disk.path}?offset={1 << 20}", tmp_path / "other"
    other.write_bytes(os.urandom(3 << 20) if mode == "binary" else b"/dev/vda2 /var ext4\n" * 100_000)
    commands = {
        "0": ["sif /etc/fstab mode 0100000"],
        "0600": ["sif /etc/fstab mode 0100600"],
        "fifo": ["rm /etc/fstab", "cd /etc", "mknod fstab p"],
        "directory": ["rm /etc/fstab", "mkdir /etc/fstab"],
        "link": ["rm /etc/fstab", "symlink /etc/fstab /proc/self/mounts"],
    }.get(mode, ["rm /etc/fstab", f"write {other} /etc/fstab"])
    script = tmp_path / "script"
    script.write_text("\n".join(commands) + "\n")
    run("debugfs", "-w", "-f", script, image)
    if mode in ("long", "binary"):
        # What it names would be missed.
        with pytest.raises(BuildError, match="The /etc/fstab of partition 1 is too long"), mounted(disk):
            pytest.fail("it was mounted")
        return
    with mounted(disk) as tree:
        assert len(tree.branches) == (2 if mode in ("0", "0600") else 1)


def test_many_filesystems(tmp_path: Path) -> None:
    with mounted(make_disk(tmp_path, *["ext2"] * 20, root=19)) as tree:
        assert len(tree.filesystems) == 20
        assert tree.root.filesystem.volume.name == "partition 20"


def test_damaged_filesystem_that_is_not_needed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = make_disk(tmp_path, "ext4", "ext2", "ext4")
    damage(disk, 1)
    with mounted(disk) as tree:
        assert [found.volume.name for found in tree.filesystems] == ["partition 1", "partition 3"]
    assert "can't be mounted: its unused blocks stay." in caplog.text


def test_damaged_filesystem_that_is_needed(tmp_path: Path) -> None:
    disk = make_disk(tmp_path, "ext4", "ext2", "ext4", fstab="/dev/vda2 /var ext2 defaults 0 2\n")
    damage(disk, 1)
    with pytest.raises(BuildError, match="image-factory-sudo-helper"), mounted(disk):
        pytest.fail("it was mounted")


def damage(disk: Disk, index: int) -> None:
    """Have the kernel refuse the filesystem of a partition: it needs what no kernel has."""
    with disk.path.open("r+b") as file:
        # s_feature_incompat
        file.seek(((1 + 20 * index) << 20) + 1024 + 99)
        file.write(b"\x40")


def test_no_root_among_filesystems(tmp_path: Path) -> None:
    disk = make_disk(tmp_path, "ext4", root=None)
    with pytest.raises(NoSystemError, match="None of the disk's filesystems is a root"), mounted(disk):
        pytest.fail("it was mounted")


def test_unmounted_when_the_body_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), mounted(make_disk(tmp_path, "ext4")):
        raise ZeroDivisionError


def test_unmounted_when_the_body_raises_with_several(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), mounted(make_disk(tmp_path, "ext4", "ext2", "ext3")):
        raise ZeroDivisionError


def test_release_that_fails_is_reported(tmp_path: Path) -> None:
    """A busy mount is an error, not silence, and the others are unmounted all the same."""
    disk = make_disk(tmp_path, "ext4", "ext2", "ext3")
    busy = pytest.raises(BuildError, match=r"Device or resource busy\. It is held by process [0-9]+ \(sleep\)\.$")
    with ExitStack() as stack, busy, mounted(disk) as tree:
        stack.enter_context(held(path_of(tree)))
    assert [path for path, image in loop.image_mounts() if image == disk.path] == [path_of(tree)]
    assert loop.mount_record(tmp_path).is_symlink()
    assert loop.release_left_mounts(tmp_path) == [path_of(tree)]
    assert not loop.mount_record(tmp_path).is_symlink()


def test_release_that_fails_while_an_error_is_in_flight(tmp_path: Path) -> None:
    """It's a note on that."""
    disk = make_disk(tmp_path, "ext4", "ext4")
    with ExitStack() as stack:
        with pytest.raises(ZeroDivisionError) as raised, mounted(disk) as tree:
            stack.enter_context(held(path_of(tree)))
            raise ZeroDivisionError
        assert "Device or resource busy" in raised.value.__notes__[0]
    assert loop.release_left_mounts(tmp_path) == [path_of(tree)]


# A build that mounts the disk in its first argument; what it says goes to stdout.
BUILD = """
import sys, time
from pathlib import Path
sys.argv[0] = "image-factory"
from image_factory.base import interrupts, log
from image_factory.system import loop, partitions
from image_factory.base.errors import Interrupted
from image_factory.model import Disk
log.set_up()
disk = Disk(Path(sys.argv[1]))
with interrupts.handled():
    try:
        with loop.mounted(None, disk, partitions.read_volumes(disk.path)):
            print("mounted", flush=True)
            with interrupts.interruptible():
                time.sleep(60)
    except Interrupted as error:
        sys.exit(error.exit_status)
"""


@contextmanager
def building(disk: Disk) -> Iterator["subprocess.Popen[bytes]"]:
    argv = [sys.executable, "-c", BUILD, str(disk.path)]
    with subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("count", [1, 3, 7])
def test_signal_between_the_mounts(tmp_path: Path, count: int) -> None:
    disk = make_disk(tmp_path, *["ext2"] * 8, root=7)
    with building(disk) as process:
        wait_for(lambda: len(mounts_of(disk)) >= count, "the mounts")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert mounts_of(disk) == []
    assert not loop.mount_record(tmp_path).is_symlink()


@pytest.mark.parametrize("count", [1, 3, 8])
def test_clean_up_after_a_build_that_was_killed_between_the_mounts(tmp_path: Path, count: int) -> None:
    disk = make_disk(tmp_path, *["ext2"] * 8, root=7)
    with building(disk) as process:
        wait_for(lambda: len(mounts_of(disk)) >= count, "the mounts")
        process.kill()
        process.wait()
    # The helper that was under way may come to its end yet.
    wait_for(lambda: run("pgrep", "-f", f"mount-image {disk.path}", check=False).returncode, "the helper's end")
    assert len(loop.release_left_mounts(tmp_path)) >= count
    assert mounts_of(disk) == []


def mounts_of(disk: Disk) -> list[Path]:
    return [path for path, image in loop.image_mounts() if image == disk.path]


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep *path* busy."""
    holder = subprocess.Popen(["sleep", "60"], cwd=path)
    try:
        yield
    finally:
        holder.kill()
        holder.wait()


def test_mount_that_is_busy_for_a_moment(tmp_path: Path) -> None:
    """The wait is shown, with who holds it."""
    reasons = []

    class Observer:
        def notice(self, event: events.Event) -> None:
            if isinstance(event, events.Waiting):
                reasons.append(event.reason)
                holder.kill()
                holder.wait()

    with events.observed(Observer()), mounted(make_disk(tmp_path, "ext4")) as tree:
        holder = subprocess.Popen(["sleep", "600"], cwd=path_of(tree))
    assert len(reasons) == 2
    assert reasons[0].endswith(f" to be unmounted; it is held by process {holder.pid} (sleep).")
    assert reasons[1] == ""


@pytest.fixture
def micro(tmp_path: Path) -> Disk:
    """A disk as openSUSE MicroOS has it."""
    return make_micro(tmp_path / "disk.raw")


def make_micro(path: Path) -> Disk:
    """Make a disk whose root is a read-only subvolume of btrfs."""
    place = path.parent / "place"
    run("truncate", "-s", "130M", path)
    subprocess.run(["sfdisk", "--quiet", path], input="label: gpt\nstart=1MiB, size=128MiB\n", text=True, check=True)
    device = run("losetup", "-f", "--show", "-o", str(1 << 20), "--sizelimit", str(128 << 20), path).stdout.strip()
    try:
        run("mkfs.btrfs", "-q", device)
        place.mkdir()
        run("mount", device, place)
        try:
            run("btrfs", "subvolume", "create", place / "system")
            (place / "system/etc").mkdir()
            (place / "system/etc/fstab").write_text("")
            (place / "system/etc/log").write_text("text\n")
            run("btrfs", "subvolume", "set-default", place / "system")
            run("btrfs", "property", "set", "-ts", place / "system", "ro", "true")
        finally:
            run("umount", place)
    finally:
        run("losetup", "-d", device)
    return Disk(path)


def is_read_only(disk: Disk) -> bool:
    with mounted(disk) as tree:
        filesystem = tree.root.filesystem
        assert isinstance(filesystem, loop.LoopFilesystem)
        return any(found.read_only for found in filesystem.subvolumes)


def test_root_that_is_read_only(micro: Disk, tmp_path: Path) -> None:
    """It is writable while the system is worked on, and read-only again on each way out."""
    with mounted(micro) as tree:
        assert tree.remove(["etc/log"]) == [Change("etc/log", 1, 5)]
        tree.write("etc/new", b"new", 0o644)
    assert is_read_only(micro)
    with pytest.raises(ZeroDivisionError), mounted(micro):
        raise ZeroDivisionError
    assert is_read_only(micro)
    assert not (tmp_path / READ_ONLY_NAME).exists()


def test_read_only_root_of_a_build_that_was_killed(micro: Disk, tmp_path: Path) -> None:
    with building(micro) as process:
        assert process.stdout is not None
        while process.stdout.readline() != b"mounted\n":
            pass
        process.kill()
        process.wait()
    assert loop.release_left_mounts(tmp_path)
    assert (tmp_path / READ_ONLY_NAME).exists()
    with mounted(micro) as tree:
        tree.write("etc/new", b"new", 0o644)
    assert is_read_only(micro)
    assert not (tmp_path / READ_ONLY_NAME).exists()


def test_filesystem_newer_than_the_kernel(tmp_path: Path) -> None:
    """The error has the kernel's reason and version, and the hint what helps."""
    disk = make_disk(tmp_path, "ext4")
    # s_feature_incompat with a bit that no kernel knows.
    run("debugfs", "-w", "-R", "ssv feature_incompat 0x400002c2", f"{disk.path}?offset={1 << 20}")
    with pytest.raises(BuildError, match=r"Linux [0-9.]+\S* doesn't mount its ext4: ") as raised, mounted(disk):
        pytest.fail("it was mounted")
    assert "unsupported optional features (40000000)" in raised.value.message
    assert raised.value.hint is not None
    assert "A newer kernel may mount it" in raised.value.hint
