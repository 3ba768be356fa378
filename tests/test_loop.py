"""Mounting the root filesystem of a disk for real, as root, and letting go of it."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from image_factory import loop
from image_factory.errors import BuildError, NoSystemError
from image_factory.model import Build, Disk

from .conftest import machine_state, run

# It doesn't depend on the build.
mounted = partial(loop.mounted, cast(Build, None))


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> object:
    """The helper is the one of the checkout; at the end all is as before."""
    monkeypatch.setattr("sys.argv", [str(Path(__file__).parent.parent / "image-factory")])
    monkeypatch.setattr(loop, "_UMOUNT_SECONDS", 1.0)
    before = machine_state()
    yield
    assert machine_state() == before


def make_disk(tmp_path: Path, *filesystems: str, root: int | None = 0) -> Disk:
    """Make a disk with a partition of 20 MiB for each of *filesystems*; partition *root* has an fstab."""
    path = tmp_path / "disk.raw"
    size = 20
    run("truncate", "-s", f"{2 + size * len(filesystems)}M", path)
    table = "".join(f"start={1 + size * index}MiB, size={size}MiB\n" for index in range(len(filesystems)))
    subprocess.run(["sfdisk", "--quiet", path], input=f"label: gpt\n{table}", text=True, check=True)
    for index, filesystem in enumerate(filesystems):
        tree = tmp_path / f"tree{index}"
        (tree / "etc").mkdir(parents=True)
        if index == root:
            (tree / "etc/fstab").touch()
        offset = (1 + size * index) << 20
        if filesystem.startswith("ext"):
            options = ["-t", filesystem, "-d", tree, "-E", f"offset={offset}"]
            run("mke2fs", "-q", *options, path, f"{size}M")
    return Disk(path)


@pytest.mark.parametrize("filesystem", ["ext2", "ext3", "ext4"])
def test_root_is_mounted_and_unmounted(tmp_path: Path, filesystem: str) -> None:
    with mounted(make_disk(tmp_path, filesystem)) as tree:
        assert (tree.path / "etc/fstab").exists()
        assert tree.partition.filesystem == filesystem
    assert not tree.path.exists()


def test_root_is_found_among_others(tmp_path: Path) -> None:
    with mounted(make_disk(tmp_path, "none", "ext4", "ext4", root=2)) as tree:
        assert tree.partition.number == 3


def test_no_root_among_filesystems(tmp_path: Path) -> None:
    disk = make_disk(tmp_path, "ext4", root=None)
    with pytest.raises(NoSystemError, match="None of the disk's filesystems is a root"), mounted(disk):
        pytest.fail("it was mounted")


def test_unmounted_when_the_body_raises(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), mounted(make_disk(tmp_path, "ext4")):
        raise ZeroDivisionError


def test_release_that_fails_is_reported(tmp_path: Path) -> None:
    """A busy mount is an error, not silence; with an error in flight it's a note on that."""
    disk = make_disk(tmp_path, "ext4")
    busy = pytest.raises(BuildError, match=r"Device or resource busy\. It is held by process [0-9]+ \(sleep\)\.$")
    with ExitStack() as stack, busy, mounted(disk) as tree:
        stack.enter_context(held(tree.path))
    loop.umount(tree.path)
    remove(tree.path)


def test_release_that_fails_while_an_error_is_in_flight(tmp_path: Path) -> None:
    disk = make_disk(tmp_path, "ext4")
    with ExitStack() as stack:
        with pytest.raises(ZeroDivisionError) as raised, mounted(disk) as tree:
            stack.enter_context(held(tree.path))
            raise ZeroDivisionError
        assert "Device or resource busy" in raised.value.__notes__[0]
    loop.umount(tree.path)
    remove(tree.path)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep *path* busy."""
    holder = subprocess.Popen(["sleep", "60"], cwd=path)
    try:
        yield
    finally:
        holder.kill()
        holder.wait()


def remove(path: Path) -> None:
    path.rmdir()
    path.parent.rmdir()


def test_mount_that_is_busy_for_a_moment(tmp_path: Path) -> None:
    with mounted(make_disk(tmp_path, "ext4")) as tree:
        holder = subprocess.Popen(["sleep", "0.3"], cwd=tree.path)
    holder.wait()
