"""Zeroing what has been swapped out, on disks that mkswap has made swap space on."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from image_factory.finishing import shrink
from image_factory.model import Build, Disk, Volume
from image_factory.parts import State, carry_out
from image_factory.system import partitions
from image_factory.system.tree import Tree

M = 1 << 20


def make_disk(tmp_path: Path, *options: str, size: int = 16) -> tuple[Disk, bytes]:
    """Make a disk with swap space between two partitions of random data; return it with the swap space."""
    path, part = tmp_path / "disk.raw", tmp_path / "swap"
    part.write_bytes(os.urandom(size * M))
    subprocess.run(["/usr/sbin/mkswap", "-q", "-L", "a label", *options, part], check=True, capture_output=True)
    path.write_bytes(bytes(M) + os.urandom(M) + part.read_bytes() + os.urandom(2 * M))
    table = f"label: dos\nstart=1MiB, size=1MiB\nstart=2MiB, size={size}MiB, type=S\nstart={2 + size}MiB\n"
    argv = ["/usr/sbin/sfdisk", "--quiet", "--wipe=never", "--wipe-partitions=never", path]
    subprocess.run(argv, input=table, text=True, check=True, capture_output=True)
    return Disk(path), part.read_bytes()


def swap_of(disk: Disk) -> Volume:
    [found] = [volume for volume in partitions.read_volumes(disk.path) if volume.filesystem == partitions.SWAP]
    return found


@pytest.mark.parametrize("page", [4096, 65536])
@pytest.mark.parametrize("holes", [True, False])
def test_swap_is_zeroed_but_for_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: int, holes: bool
) -> None:
    """Also where the disk is on something that can't make holes; and of machines with larger pages."""
    if not holes:
        program = tmp_path / "fallocate"
        program.write_text("#!/bin/sh\necho 'fallocate: fallocate failed: Operation not supported' >&2\nexit 1\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    disk, swap = make_disk(tmp_path, "-p", str(page))
    before, data = swap_of(disk), disk.path.read_bytes()
    shrink.zero_swap(disk, partitions.read_volumes(disk.path))
    after = disk.path.read_bytes()
    assert after == data[: 2 * M] + swap[:page] + bytes(16 * M - page) + data[18 * M :]
    assert swap_of(disk) == before
    assert (before.label, bool(before.uuid)) == ("a label", True)
    if holes:
        assert disk.path.stat().st_blocks * 512 < len(data) - 15 * M


def test_no_swap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    build = cast(Build, SimpleNamespace(disk_path=tmp_path / "none"))
    volumes = (Volume("partition 1", M, "ext4"), Volume("/dev/a/b", M, "swap"))
    carry_out(State(build, Disk(build.disk_path), volumes=volumes), shrink.steps(build))
    shrink.zero_swap(Disk(build.disk_path), volumes)
    assert caplog.messages == []


def test_swap_of_another_kind_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk, _ = make_disk(tmp_path)
    volumes = partitions.read_volumes(disk.path)
    with disk.path.open("r+b") as file:
        file.seek(2 * M + 4086)
        file.write(b"SWAP-SPACE")
    data = disk.path.read_bytes()
    shrink.zero_swap(disk, volumes)
    assert disk.path.read_bytes() == data
    assert "The swap space on partition 2 is of an unknown kind, and stays as it is." in caplog.messages


@pytest.mark.parametrize(("chunk", "filled"), [(0, []), (4096, []), (65536, ["/dev/a/root"])])
def test_only_thin_volumes_are_filled(chunk: int, filled: list[str]) -> None:
    """Others, whose blocks the host can't free, would only grow."""
    volume = Volume("/dev/a/root", M, "xfs")
    filesystem = SimpleNamespace(volume=volume, discard_size=lambda: chunk, block_size=lambda: 4096)
    found: list[str] = []
    logical = SimpleNamespace(fill_unused_blocks=lambda volume: found.append(volume.name) or True)
    tree = cast(Tree, SimpleNamespace(volumes=[volume], filesystems=[filesystem], logical=logical))
    assert shrink.has_logical_to_zero(tree, [volume])
    assert not shrink.has_logical_to_zero(tree, [])
    shrink.zero_logical_volumes(tree, [volume])
    assert found == filled
