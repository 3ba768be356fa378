"""Images as a source: real ones of all formats, whole, cut off, packed, and such as would have other files read."""

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import subprocess
import tarfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from image_factory.base.errors import BuildError, CommandError, ConfigurationError
from image_factory.configuration.files import FILE_VARIABLE, Configuration
from image_factory.configuration.settings import ImageSettings
from image_factory.sources.image import formats, unpacking

SIZE = 8 << 20
TABLE = "label: gpt\nstart=2048, size=2048, type=uefi\nstart=4096, type=linux\n"


def run(*argv: object) -> None:
    subprocess.run([str(word) for word in argv], check=True, stdin=subprocess.DEVNULL, capture_output=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk with a partition table, and data from its begin to its end."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    noise = random.Random(1)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset in range(2 << 20, SIZE - (1 << 20), 1 << 20):
            file.seek(offset)
            file.write(noise.randbytes(100_000))
    subprocess.run(["sfdisk", "--quiet", path], input=TABLE, text=True, check=True, capture_output=True)
    return path


# (driver of QEMU, options); VHD has a size of its own, by cylinders.
WRITTEN = [
    ("raw", ""),
    ("qcow2", ""),
    ("qcow2", "compat=0.10"),
    ("qcow2", "compression_type=zstd"),
    ("qcow2", "extended_l2=on"),
    ("vmdk", ""),
    ("vmdk", "subformat=streamOptimized"),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
    ("vhdx", ""),
    ("vhdx", "subformat=fixed"),
    ("vdi", ""),
    ("vdi", "static=on"),
]


def converted(disk: Path, target: Path, driver: str, options: str) -> Path:
    flags = ["-c"] if "compression" in options else []
    run("qemu-img", "convert", "-f", "raw", "-O", driver, *flags, *(["-o", options] if options else []), disk, target)
    return target


@pytest.mark.parametrize(("driver", "options"), WRITTEN)
def test_format_is_known_by_its_signature(disk: Path, tmp_path: Path, driver: str, options: str) -> None:
    # Whatever the name says.
    image = converted(disk, tmp_path / "image.iso", driver, options)
    assert formats.format_of(image) == formats.Format(driver, SIZE)


@pytest.mark.parametrize(("driver", "options"), WRITTEN)
def test_image_that_is_cut_off_never_passes_for_whole(disk: Path, tmp_path: Path, driver: str, options: str) -> None:
    """Either something says so, or nothing of the disk is lost; QEMU alone takes what is missing for zeros."""
    whole = converted(disk, tmp_path / "whole", driver, options)
    size = whole.stat().st_size
    cuts = [100, 4096, *(size * part // 5 for part in range(1, 5)), size - 4096, size - 1]
    said = 0
    for cut in sorted({cut for cut in cuts if 0 <= cut < size}):
        image = tmp_path / "image"
        shutil.copyfile(whole, image)
        os.truncate(image, cut)
        try:
            found = formats._looked_into(image)
            if found.driver == "raw":
                # The table says where the disk ends.
                run("sfdisk", "--verify", image)
                continue
            if found.driver in ("qcow2", "vmdk", "vhdx", "vdi"):
                run("qemu-img", "check", "-q", "-f", found.driver, image)
            run("qemu-img", "convert", "-f", found.driver, "-O", "raw", image, tmp_path / "raw")
        except (formats.UnfitError, subprocess.CalledProcessError):
            said += 1
            continue
        assert (tmp_path / "raw").read_bytes() == disk.read_bytes(), f"{cut} of {size} bytes"
    assert said or driver == "raw"


def with_bytes(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def backing(disk: Path, image: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk, image)


def data_file(disk: Path, image: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={image}.data", image, "1M")


def encrypted(disk: Path, image: Path) -> None:
    converted(disk, image, "qcow2", "")
    with_bytes(image, 35, b"\2")


def vmdk_with_parent(disk: Path, image: Path) -> None:
    parent = converted(disk, image.with_name("parent"), "vmdk", "")
    run("qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", parent, image)


def vhd_with_parent(disk: Path, image: Path) -> None:
    converted(disk, image, "vpc", "")
    with_bytes(image, image.stat().st_size - 512 + 60, (4).to_bytes(4, "big"))


def vhdx_with_parent(disk: Path, image: Path) -> None:
    converted(disk, image, "vhdx", "")
    data = image.read_bytes()
    table = data.index(b"metadata")
    # Of the entry of the file's parameters the offset, at which its flags follow the size of a block.
    entry = data.index(bytes.fromhex("3767a1ca36fa434db3b633f0aa44e76b"), table)
    offset = table + int.from_bytes(data[entry + 16 : entry + 20], "little")
    with_bytes(image, offset + 4, b"\2")


def vdi_with_parent(disk: Path, image: Path) -> None:
    converted(disk, image, "vdi", "")
    with_bytes(image, 76, b"\4")


def written_as(driver: str, options: str = "") -> Callable[[Path, Path], None]:
    def make(disk: Path, image: Path) -> None:
        converted(disk, image, driver, options)

    return make


def corrupt(disk: Path, image: Path) -> None:
    converted(disk, image, "qcow2", "")
    with_bytes(image, 79, b"\2")


def unknown_feature(disk: Path, image: Path) -> None:
    converted(disk, image, "qcow2", "")
    with_bytes(image, 72, b"\1")


def unknown_version(disk: Path, image: Path) -> None:
    converted(disk, image, "qcow2", "")
    with_bytes(image, 4, (4).to_bytes(4, "big"))


def huge_table(disk: Path, image: Path) -> None:
    converted(disk, image, "qcow2", "")
    with_bytes(image, 36, b"\x7f\xff\xff\xff")


def containing(data: bytes) -> Callable[[Path, Path], None]:
    return lambda disk, image: image.write_bytes(data) and None


ISO = bytes(0x8001) + b"CD001" + bytes(4096)


def looping_table(disk: Path, image: Path) -> None:
    """A table of tables that are all the same one, and have 262,144 entries each."""
    converted(disk, image, "qcow2", "cluster_size=2M")
    data = image.read_bytes()
    offset = int.from_bytes(data[40:48], "big")
    with_bytes(image, 36, (1 << 20).to_bytes(4, "big") + (32 << 20).to_bytes(8, "big"))
    with_bytes(image, 32 << 20, data[offset : offset + 8] * (1 << 20))


UNFIT: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "backing file": (backing, "has a backing file"),
    "data file": (data_file, "has an external data file"),
    "encrypted qcow2": (encrypted, "is encrypted"),
    "LUKS": (containing(b"LUKS\xba\xbe\0\2" + bytes(1000)), "is encrypted with LUKS"),
    "corrupt": (corrupt, "is marked as corrupt"),
    "unknown feature": (unknown_feature, "features of qcow2 that are not known"),
    "unknown version": (unknown_version, "is qcow of version 4"),
    "huge table": (huge_table, "that no program writes"),
    "qcow": (written_as("qcow"), "is qcow of version 1"),
    "flat VMDK": (written_as("vmdk", "subformat=monolithicFlat"), "extents are other files"),
    "split VMDK": (written_as("vmdk", "subformat=twoGbMaxExtentSparse"), "extents are other files"),
    "VMDK with a parent": (vmdk_with_parent, "is a VMDK with a parent"),
    "VHD with a parent": (vhd_with_parent, "is a VHD with a parent"),
    "VHDX with a parent": (vhdx_with_parent, "is a VHDX with a parent"),
    "VDI with a parent": (vdi_with_parent, "is a VDI with a parent"),
    "QED": (written_as("qed"), "is QED, which is not supported"),
    "Parallels": (written_as("parallels"), "is a disk of Parallels"),
    "ISO file": (containing(ISO), "is an ISO file"),
    "text": (containing(b"[x]\n" * 1000), "is no disk image"),
    "nothing": (containing(b""), "is empty"),
    "web page": (containing(b"<!DOCTYPE html><html></html>" + bytes(1000)), "is no disk image"),
    "half a sector": (containing(bytes(510) + b"\x55\xaa" + bytes(100)), "no number of whole sectors"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_image(disk: Path, tmp_path: Path, name: str) -> None:
    make, message = UNFIT[name]
    make(disk, tmp_path / "image")
    with pytest.raises(formats.UnfitError) as caught:
        formats.format_of(tmp_path / "image")
    assert message in caught.value.message
    assert str(tmp_path / "image") in caught.value.message
    assert "\n" not in caught.value.message + (caught.value.hint or "")


def test_tables_that_are_linked_into_each_other(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_SECONDS", 1.0)
    looping_table(disk, tmp_path / "image")
    with pytest.raises(formats.UnfitError, match="take too long"):
        formats.format_of(tmp_path / "image")


def test_any_header_is_read_or_refused(disk: Path, tmp_path: Path) -> None:
    """Whatever bytes stand in it, within seconds, and in one line."""
    noise = random.Random(2)
    for driver, options in WRITTEN[1:]:
        whole = converted(disk, tmp_path / "whole", driver, options).read_bytes()
        image = tmp_path / "image"
        image.write_bytes(whole)
        begins = [*range(4, 600, 4), *(196608 + at for at in range(0, 128, 4)), len(whole) - 512 + 60]
        for offset in noise.sample(begins, 40):
            with_bytes(image, offset, noise.choice([b"\xff" * 8, bytes(8), noise.randbytes(8)]))
            try:
                formats._looked_into(image)
            except formats.UnfitError as error:
                assert "\n" not in error.message
            with_bytes(image, offset, whole[offset : offset + 8])


# Packed.


def tarred(path: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(path, "some/disk.raw")
    return stream.getvalue()


def tarred_sparse(path: Path, form: str) -> bytes:
    argv = ["tar", "--create", "--sparse", f"--format={form}", "--directory", path.parent, path.name]
    return subprocess.run(argv, check=True, capture_output=True).stdout


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "--quiet"], input=data, check=True, capture_output=True).stdout


PACKED: dict[str, Callable[[Path], bytes]] = {
    "xz": lambda path: lzma.compress(path.read_bytes()),
    "gzip": lambda path: gzip.compress(path.read_bytes()),
    "bzip2": lambda path: bz2.compress(path.read_bytes()),
    "zstd": lambda path: zstd(path.read_bytes()),
    "tar": tarred,
    "tar.xz": lambda path: lzma.compress(tarred(path)),
    "sparse tar of GNU": lambda path: tarred_sparse(path, "gnu"),
    "sparse tar of pax": lambda path: tarred_sparse(path, "posix"),
    "tar.gz of xz": lambda path: gzip.compress(packed_tar(lzma.compress(path.read_bytes()))),
}


def packed_tar(data: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        directory = tarfile.TarInfo("some")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        member = tarfile.TarInfo("some/disk")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("as_link", [False, True])
def test_unpacked(disk: Path, tmp_path: Path, how: str, as_link: bool) -> None:
    """Of a local file only a link is there, and it stays as it is."""
    source, path = tmp_path / "image.qcow2", tmp_path / "work/source"
    path.parent.mkdir()
    source.write_bytes(PACKED[how](disk))
    before = source.read_bytes()
    if as_link:
        path.symlink_to(source)
    else:
        os.link(source, path)
    assert unpacking.is_packed(path)
    unpacking.unpack(path)
    assert path.read_bytes() == disk.read_bytes()
    assert path.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["source"]
    assert source.read_bytes() == before


def two_files(disk: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("a", "b"):
            archive.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


def a_link(disk: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("disk.raw")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/shadow"
        archive.addfile(member)
    return stream.getvalue()


def again_and_again(disk: Path) -> bytes:
    data = b"data"
    for _ in range(9):
        data = gzip.compress(data)
    return data


BAD_PACKS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "two files": (two_files, "it has several files"),
    "a link": (a_link, "it has no disk"),
    "cut-off tar": (lambda disk: tarred(disk)[: SIZE // 2], "cut off|can't be read"),
    "cut-off xz": (lambda disk: lzma.compress(disk.read_bytes())[:-500], "can't be unpacked"),
    "cut-off gzip": (lambda disk: gzip.compress(disk.read_bytes())[:-500], "can't be unpacked"),
    "cut-off zstd": (lambda disk: zstd(disk.read_bytes())[:-500], "can't be unpacked"),
    "changed bzip2": (lambda disk: bz2.compress(disk.read_bytes())[:-4] + b"\0\0\0\0", "can't be unpacked"),
    "again and again": (again_and_again, "packed again and again"),
}


@pytest.mark.parametrize("name", BAD_PACKS)
def test_bad_pack(disk: Path, tmp_path: Path, name: str) -> None:
    make, message = BAD_PACKS[name]
    path = tmp_path / "source"
    path.write_bytes(make(disk))
    with pytest.raises(formats.UnfitError, match=message) as caught:
        unpacking.unpack(path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("how", ["xz", "gzip", "bzip2", "zstd", "tar"])
def test_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What is free is all that it gets, and the kernel sees to that."""
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(64 << 20)
    path = tmp_path / "source"
    path.write_bytes(PACKED[how](large))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 8 << 20))
    with pytest.raises(formats.UnfitError, match=r"8\.0 MiB"):
        unpacking.unpack(path)
    assert not path.exists() or path.stat().st_size <= 8 << 20


# As a section.


class Place:
    """A directory with a configuration of one image."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def image(self, text: str) -> ImageSettings:
        path = self.directory / "x.conf"
        path.write_text(f"[x]\n{text}\n")
        return Configuration({FILE_VARIABLE: str(path)}).image("x", {})


SECTIONS: dict[str, tuple[str, str]] = {
    "no image": ("source = image\nlinux = /x", "has source = image and no 'source-image'"),
    "no source": ("source-image = /x", "has 'source-image' and no 'source'"),
    "unknown source": (
        "source = disk\nsource-image = /x",
        "'disk' is not accepted, only installer, image, bootstrap, elements or capture",
    ),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_bad_section(tmp_path: Path, name: str) -> None:
    text, message = SECTIONS[name]
    with pytest.raises(ConfigurationError) as caught:
        Place(tmp_path).image(text)
    assert message in caught.value.message


def test_size_of_an_image_is_its_own(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.image("source = image\nsource-image = /x").image_size is None
    assert place.image("source = image\nsource-image = /x\nimage-size = 3G").image_size == 3 << 30
    assert place.image("linux = /x\ninitrd = /x").image_size == 2 << 30


def test_errors_are_of_builds() -> None:
    assert issubclass(formats.UnfitError, BuildError)
    assert not issubclass(formats.UnfitError, CommandError)
