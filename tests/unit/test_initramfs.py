"""What is in an initramfs, of all the forms that distributions have."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from image_factory.base import command
from image_factory.base.errors import BuildError
from image_factory.system import initramfs

from .. import cpio

MICROCODE = {"kernel/x86/microcode/GenuineIntel.bin": b"\1" * 5001, "early_cpio": b"1\n"}
FILES = {
    "init": b"#!/bin/sh\n",
    "usr/lib/modules/6.1/kernel/drivers/hv/hv_vmbus.ko": b"\0" * 7,
    "usr/lib/modules/6.1/kernel/drivers/scsi/vmw-pvscsi.ko.xz": b"x",
    "lib/modules/6.1/kernel/ena.ko.zst": b"y" * 100_000,
    # No modules: a directory, a list, and a file of firmware.
    "usr/lib/modules/6.1/kernel/drivers.ko.d": b"",
    "usr/lib/modules/6.1/modules.dep": b"kernel/nvme.ko:",
}
MODULES = {"hv_vmbus", "vmw_pvscsi", "ena"}
PROGRAMS = {
    "gzip": ["gzip", "-c"],
    "xz": ["xz", "--check=crc32", "-c"],
    "zstd": ["zstd", "-qc"],
    "bzip2": ["bzip2", "-c"],
    # As the kernel has it, and as lz4(1) makes it by itself.
    "lz4 of the kernel": ["lz4", "-lc"],
    "lz4": ["lz4", "-c"],
}


def packed(data: bytes, argv: list[str]) -> bytes:
    return subprocess.run(argv, input=data, capture_output=True, check=True).stdout


def written(directory: Path, data: bytes) -> Path:
    path = directory / "initramfs"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "before",
    [b"", cpio.archive(MICROCODE), cpio.archive(MICROCODE) + bytes(8192)],
    ids=["alone", "microcode", "far"],
)
def test_modules_are_found(tmp_path: Path, program: str, before: bytes) -> None:
    path = written(tmp_path, before + packed(cpio.archive(FILES), PROGRAMS[program]))
    assert initramfs.modules(path) == MODULES
    assert [*tmp_path.iterdir()] == [path]


def test_modules_before_the_compressed_part(tmp_path: Path) -> None:
    """As initramfs-tools of Debian 13 has them, whose modules are compressed each."""
    first = cpio.archive({"usr/lib/modules/6.12/kernel/nvme.ko.xz": b"x" * 511})
    rest = packed(cpio.archive(FILES), ["zstd", "-qc"])
    assert initramfs.modules(written(tmp_path, cpio.archive(MICROCODE) + first + rest)) == {*MODULES, "nvme"}
    assert initramfs.modules(written(tmp_path, cpio.archive(MICROCODE) + first)) == {"nvme"}


def test_what_cpio_makes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name, data in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    names = "\n".join([*FILES, ""]).encode()
    made = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], input=names, cwd=tree, stdout=-1, check=True).stdout
    assert initramfs.modules(written(tmp_path, made)) == MODULES


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"not at all", "initramfs has at byte 0 what is no initramfs."),
        (lambda: cpio.archive(MICROCODE) + b"#!/bin/sh\n", "what is no initramfs."),
        (lambda: cut(packed(cpio.archive(FILES), ["zstd", "-qc"])), "initramfs is no initramfs that can be read: "),
        (lambda: packed(cpio.archive(FILES)[:50], ["gzip"]), "is no initramfs that can be read: it ends in the middle"),
        (lambda: b"070701" + b"f" * 104, "is no initramfs that can be read: a name has no end"),
        (lambda: b"070701" + b"z" * 104, "is no initramfs that can be read: invalid literal"),
    ],
)
def test_what_is_none(tmp_path: Path, make: Callable[[], bytes], message: str) -> None:
    path = written(tmp_path, make())
    with pytest.raises(BuildError) as caught:
        initramfs.modules(path)
    assert message in caught.value.message
    assert [*tmp_path.iterdir()] == [path]


def test_a_program_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "_PROGRAMS", {b"\x1f\x8b": ("lz4", "-dc")})
    monkeypatch.setattr(command.installed, "search_path", lambda: str(tmp_path))
    path = written(tmp_path, packed(cpio.archive(FILES), ["gzip", "-c"]))
    with pytest.raises(BuildError) as caught:
        initramfs.modules(path)
    assert caught.value.message == "Missing programs: lz4."
    assert caught.value.hint == "Install them: apt-get install lz4"


def test_an_initramfs_of_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "_MOST_MEMBERS", 3)
    with pytest.raises(BuildError) as caught:
        initramfs.modules(written(tmp_path, cpio.archive(FILES)))
    assert "it has more than 3 files" in caught.value.message
