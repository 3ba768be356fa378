"""Each format is made of a disk, and is what others expect of it; the bytes that importers look at are looked at."""

import dataclasses
import datetime
import gzip
import json
import os
import struct
import tarfile
import uuid
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from image_factory import outputs
from image_factory.base import command, files
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.model import Artifact, Build, Plan
from image_factory.outputs import OUTPUTS, qemu
from image_factory.parts import carry_out

from ..conftest import run, shown, state_of

MIB = 1 << 20
SIZE = 33 * MIB
# What it is called, and what qemu-img says that only it has.
BY_QEMU = {
    "qcow2": {"compression-type": "zstd"},
    "vmdk": {"create-type": "streamOptimized"},
    "vhd": {},
    "vhd-dynamic": {},
    "vhdx": {},
    "vdi": {},
}


def build_of(directory: Path, formats: str, size: int = SIZE, extra: str = "") -> Build:
    """Return a build whose disk has data at its beginning, its end and in between."""
    (directory / "x.conf").write_text(f"[x]\nlinux = /l\ninitrd = /i\nformat = {formats}\nimage-size = {size}\n{extra}")
    settings = Configuration({"IMAGE_FACTORY_CONFIG": str(directory / "x.conf")}).image("x", {})
    plan = Plan("x", settings, datetime.date(2026, 1, 31), directory / "output", {})
    plan.work_path.mkdir(parents=True, exist_ok=True)
    build = Build(plan, plan.work_path, "vm")
    with build.disk_path.open("wb") as disk:
        for offset in (0, min(size, SIZE) // 2, size - 512):
            disk.seek(offset)
            disk.write(bytes(range(256)) * 2)
    return build


def made(build: Build) -> dict[str, Artifact]:
    """Return the artifacts of *build* by their formats."""
    state = carry_out(state_of(build), outputs.steps(build))
    assert [artifact.format for artifact in state.artifacts] == outputs.formats(build.plan)
    return {artifact.format: artifact for artifact in state.artifacts}


def test_all_of_qemu_are_here() -> None:
    assert [*BY_QEMU] == [name for name, output in OUTPUTS.items() if output.driver and not output.packs][1:]


@pytest.mark.parametrize("name", BY_QEMU)
def test_qemu_reads_what_is_made(tmp_path: Path, name: str) -> None:
    build = build_of(tmp_path, name)
    [artifact] = made(build).values()
    driver = OUTPUTS[name].driver
    assert artifact.path.name == f"x-2026-01-31.{OUTPUTS[name].suffix}"
    assert (artifact.format, artifact.virtual_size, artifact.upload) == (name, SIZE, True)
    info = json.loads(run("qemu-img", "info", "-f", driver, "--output=json", artifact.path).stdout)
    assert (info["format"], info["virtual-size"]) == (driver, SIZE)
    assert BY_QEMU[name].items() <= info.get("format-specific", {}).get("data", {}).items()
    run("qemu-img", "compare", "-f", "raw", "-F", driver, build.disk_path, artifact.path)
    # qemu-img has no check of VHD: what there is to check of it is in the tests below.
    if driver != "vpc":
        run("qemu-img", "check", "-f", driver, artifact.path)
    # An empty block takes no space, whatever the format.
    assert artifact.path.stat().st_blocks * 512 < 12 * MIB


def test_several_formats_are_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    build = build_of(tmp_path, "raw, vhdx, vmdk", extra="keep-raw = yes\n")
    assert [step.name for step in outputs.steps(build)] == [
        "Making vhdx, vmdk", "Naming the raw image",
    ]  # fmt: skip
    assert [*made(build)] == ["raw", "vhdx", "vmdk"]


def test_a_dry_run_shows_how_each_is_made(tmp_path: Path) -> None:
    build = build_of(tmp_path, "vhd, vmdk")
    commands = shown(build, outputs.steps(build))
    assert [*commands] == ["Making vhd, vmdk"]
    [[vhd, vmdk]] = commands.values()
    assert vhd == [
        "qemu-img", "convert", "-f", "raw", "-O", "vpc", "-p", "-o", "subformat=fixed,force_size",
        str(build.disk_path), str(build.directory / "x-2026-01-31.vhd"),
    ]  # fmt: skip
    # Whoever reads a streamOptimized VMDK as a stream needs it in order.
    assert "-W" not in vmdk
    assert set(outputs.programs(build.plan)) == {"qemu-img"}


# Bytes.


def footer_of(data: bytes) -> dict[str, int | bytes]:
    """Return what the 512 bytes of a VHD's footer say (Microsoft's Virtual Hard Disk Image Format Specification)."""
    names = (
        "cookie", "features", "version", "offset", "time", "creator", "creator_version", "host", "original", "current",
        "geometry", "type", "checksum", "id",
    )  # fmt: skip
    found = dict(zip(names, struct.unpack_from(">8sIIQI4sI4sQQ4sII16s", data), strict=True))
    zeroed = data[:64] + bytes(4) + data[68:]
    assert found["checksum"] == ~sum(zeroed) & 0xFFFFFFFF
    assert (len(data), found["cookie"], found["version"]) == (512, b"conectix", 0x10000)
    assert uuid.UUID(bytes=found["id"]).int
    return found


def test_fixed_vhd_is_the_disk_and_a_footer(tmp_path: Path) -> None:
    """Azure takes it if the virtual size is of whole MiB, and the file 512 bytes longer than that."""
    build = build_of(tmp_path, "vhd")
    data = made(build)["vhd"].path.read_bytes()
    assert data[:-512] == build.disk_path.read_bytes()
    footer = footer_of(data[-512:])
    assert (footer["original"], footer["current"], footer["type"]) == (SIZE, SIZE, 2)
    assert footer["offset"] == 2**64 - 1


def test_dynamic_vhd_has_its_footer_twice(tmp_path: Path) -> None:
    data = made(build_of(tmp_path, "vhd-dynamic"))["vhd-dynamic"].path.read_bytes()
    footer = footer_of(data[-512:])
    assert data[:512] == data[-512:]
    assert (footer["current"], footer["type"]) == (SIZE, 3)
    assert data[int(footer["offset"]) :].startswith(b"cxsparse")


def test_vmdk_is_a_stream(tmp_path: Path) -> None:
    """Its header (VMware's Virtual Disk Format 5.0), its descriptor, and the mark at its end."""
    data = made(build_of(tmp_path, "vmdk"))["vmdk"].path.read_bytes()
    magic, version, flags, capacity, grain, descriptor, length = struct.unpack_from("<4sIIQQQQ", data)
    assert (magic, version, capacity, grain) == (b"KDMV", 3, SIZE // 512, 128)
    # The grains are compressed, and have markers.
    assert flags & 0x30000 == 0x30000
    text = data[descriptor * 512 : (descriptor + length) * 512].rstrip(b"\0").decode()
    assert {'createType="streamOptimized"', 'ddb.adapterType = "lsilogic"', 'ddb.virtualHWVersion = "6"'} <= {
        *text.splitlines()
    }
    assert data[-512:] == bytes(512)


# What can't be.


@pytest.mark.parametrize("name", ["vhd", "vhd-dynamic"])
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (MIB + 512, "has disks of whole MiB, and this one has 1049088 bytes."),
        ((2040 << 30) + MIB, "has disks of 2040 GiB at most, and this one has 2190434369536 bytes."),
    ],
)
def test_a_size_that_a_format_can_not_have(tmp_path: Path, name: str, size: int, reason: str) -> None:
    """It is refused before the build, or before the file is made if it was not known."""
    build = build_of(tmp_path, f"{name}, qcow2", size)
    with pytest.raises(ConfigurationError) as caught:
        outputs.check_sizes(build.plan)
    assert caught.value.message == f"[x] format: {name} {reason}"
    with pytest.raises(BuildError) as failed:
        made(build)
    assert failed.value.message == f"x-2026-01-31.vhd can't be made: {name} {reason}"
    assert [path.name for path in build.directory.iterdir()] == ["disk.raw"]
    outputs.check_sizes(build_of(tmp_path, name, 2040 << 30).plan)


def test_two_formats_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"vhd-dynamic and vhd have the same file name, x-2026-01-31\.vhd\."):
        outputs.check_names(build_of(tmp_path, "vhd-dynamic, raw, vhd").plan)
    outputs.check_names(build_of(tmp_path, "vhd-dynamic, raw, vhdx").plan)


# Packed.

PACKED = [name for name, output in OUTPUTS.items() if output.made_from == "disk" and (output.packs or output.unpacking)]
# GCE takes disks of whole GiB.
SIZES = {"gce.tar.gz": 1 << 30}


def test_packed_formats_are_these() -> None:
    assert PACKED == ["raw.gz", "raw.xz", "raw.zst", "dd.tgz", "gce.tar.gz", "ova", "vagrant"]


@pytest.mark.parametrize("name", PACKED)
def test_what_is_packed_can_be_unpacked(tmp_path: Path, name: str) -> None:
    """By the very commands of the audit, which see a difference and a file that has no end."""
    build = build_of(tmp_path, name, SIZES.get(name, SIZE))
    [artifact] = made(build).values()
    # What was only made to be packed is gone.
    assert {path.name for path in build.directory.iterdir()} == {"disk.raw", artifact.path.name}
    umask = os.umask(0)
    os.umask(umask)
    assert artifact.path.stat().st_mode & 0o777 == 0o666 & ~umask
    copy = tmp_path / "copy"
    run(*outputs.raw_copy_argv(artifact, copy))
    run("cmp", build.disk_path, copy)
    assert copy.stat().st_blocks * 512 < 2 * MIB
    run(*outputs.compare_argv(artifact, copy))
    with copy.open("r+b") as file:
        file.seek(SIZE // 2)
        file.write(b"x")
    assert run(*outputs.compare_argv(artifact, copy), check=False).returncode == 1
    run("cp", "--sparse=always", build.disk_path, copy)
    os.truncate(artifact.path, artifact.path.stat().st_size // 2)
    for argv in (outputs.compare_argv, outputs.raw_copy_argv):
        with pytest.raises(BuildError):
            command.run(argv(artifact, copy))


@pytest.mark.parametrize("name", [*PACKED, "qcow2", "vmdk", "vhd", "vhd-dynamic", "incus"])
def test_the_same_bytes_each_time(tmp_path: Path, name: str) -> None:
    """With SOURCE_DATE_EPOCH, whoever makes it, when, and wherever the disk has its holes."""
    found = set()
    for number, umask in enumerate((0o022, 0o077)):
        (tmp_path / str(number)).mkdir()
        build = build_of(tmp_path / str(number), name, SIZES.get(name, SIZE))
        if number:
            run("fallocate", "--length", "1M", "--offset", "1M", build.disk_path)
            os.utime(build.disk_path, (1, 1))
        before = os.umask(umask)
        try:
            build = dataclasses.replace(build, plan=dataclasses.replace(build.plan, source_date=1700000000))
            [artifact] = made(build).values()
        finally:
            os.umask(before)
        found.add(files.digest_of(artifact.path))
    assert len(found) == 1


def test_whatever_number_qemu_gives_a_vmdk(tmp_path: Path) -> None:
    """One in sixteen has less than eight digits, and then all that follows stands elsewhere."""
    found = set()
    for number in (b"1\n", b"abcdef0\n", b"12345678\n", b"12345678"):
        path = tmp_path / "x.vmdk"
        text = b"# Disk DescriptorFile\nparentCID=ffffffff\nCID=" + number
        header = struct.pack("<4sIIQQQQ", b"KDMV", 3, 0x30001, 66, 128, 1, 2).ljust(512, b"\0")
        path.write_bytes(header + text.ljust(1024, b"\0") + b"grains")
        qemu._settle_vmdk(path, 1700000000)
        found.add(path.read_bytes())
    [only] = found
    assert b"\nparentCID=ffffffff\nCID=6553f100\n\0" in only
    assert only.endswith(b"\0grains")


def headers(data: bytes) -> list[bytes]:
    """Return the 512 bytes of each header of a tar."""
    found, place = [], 0
    while data[place : place + 512].strip(b"\0"):
        found.append(data[place : place + 512])
        place += 512 + -(-int(found[-1][124:135], 8) // 512) * 512
    return found


def test_gce_gets_one_sparse_member_of_the_older_gnu_format(tmp_path: Path) -> None:
    packed = made(build_of(tmp_path, "gce.tar.gz", SIZES["gce.tar.gz"]))["gce.tar.gz"].path
    assert packed.stat().st_size < 100 << 10
    header, *_ = headers(gzip.decompress(packed.read_bytes()))
    assert (header[:100].rstrip(b"\0"), header[257:265], header[156:157]) == (b"disk.raw", b"ustar  \0", b"S")
    # Its real size.
    assert int(header[483:494], 8) == 1 << 30
    assert run("tar", "--list", "--file", packed).stdout == "disk.raw\n"
    with pytest.raises(ConfigurationError, match=r"gce\.tar\.gz has disks of whole GiB, and this one has 34603008 b"):
        outputs.check_sizes(build_of(tmp_path, "gce.tar.gz").plan)


def test_dd_tgz_has_the_disk_and_nothing_else(tmp_path: Path) -> None:
    """What curtin runs writes all members to the disk."""
    packed = made(build_of(tmp_path, "dd.tgz"))["dd.tgz"].path
    with tarfile.open(packed) as archive:
        [member] = archive.getmembers()
    assert (member.name, member.size, member.type, member.uid, member.mode) == ("disk.raw", SIZE, b"0", 0, 0o644)


# What curtin (curtin/commands/block_meta.py), and for the last one Eikon, pipe to ``dd bs=4M of=DISK``.
TO_DISK = {"dd.tgz": "tar -xOzf -", "raw.gz": "zcat", "raw.xz": "xzcat", "raw.zst": "zstdcat"}


@pytest.mark.parametrize("name", TO_DISK)
def test_curtin_writes_it_to_a_disk(tmp_path: Path, name: str) -> None:
    build = build_of(tmp_path, name)
    packed, disk = made(build)[name].path, tmp_path / "machine"
    # A disk with something on it, which is larger than the image.
    disk.write_bytes(b"\xff" * (SIZE + MIB))
    run("sh", "-c", f'cat "$1" | {TO_DISK[name]} | dd bs=4M conv=notrunc of="$2"', "sh", packed, disk)
    run("cmp", f"--bytes={SIZE}", disk, build.disk_path)


OVF = "{http://schemas.dmtf.org/ovf/envelope/1}"
RASD = "{http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData}"
VMW = "{http://www.vmware.com/schema/ovf}"


@pytest.mark.parametrize(("firmware", "expected"), [("bios", "bios"), ("uefi", "efi"), ("hybrid", "efi")])
def test_ova(tmp_path: Path, firmware: str, expected: str) -> None:
    """The order of its files and of what the schema has in order, its digests, and what the machine has."""
    build = build_of(tmp_path, "ova", extra=f"firmware = {firmware}\ncores = 2\nram = 3G\ndistribution = Ubuntu\n")
    packed = made(build)["ova"].path
    names = [f"x-2026-01-31.{suffix}" for suffix in ("ovf", "mf", "vmdk")]
    assert [(header[257:265], header[:100].rstrip(b"\0").decode()) for header in headers(packed.read_bytes())] == [
        (b"ustar\x0000", name) for name in names
    ]
    run("tar", "--extract", f"--directory={tmp_path}", f"--file={packed}")
    lines = [f"SHA256({name})= {files.digest_of(tmp_path / name)}" for name in (names[0], names[2])]
    assert (tmp_path / names[1]).read_text().splitlines() == lines
    root = ElementTree.parse(tmp_path / names[0]).getroot()
    assert [child.tag for child in root] == [
        OVF + name for name in ("References", "DiskSection", "NetworkSection", "VirtualSystem")
    ]
    [file], [_, disk] = root[0], root[1]
    assert (file.get(f"{OVF}href"), file.get(f"{OVF}size")) == (names[2], str((tmp_path / names[2]).stat().st_size))
    assert (disk.get(f"{OVF}capacity"), disk.get(f"{OVF}capacityAllocationUnits")) == (str(SIZE), "byte")
    assert disk.get(f"{OVF}fileRef") == file.get(f"{OVF}id")
    assert str(disk.get(f"{OVF}format")).endswith("vmdk.html#streamOptimized")
    items = root.findall(f".//{OVF}Item")
    for item in items:
        tags = [child.tag for child in item]
        assert tags == sorted(tags)
        assert {f"{RASD}ElementName", f"{RASD}InstanceID", f"{RASD}ResourceType"} <= {*tags}
    numbers = {item.findtext(f"{RASD}ResourceType"): item.findtext(f"{RASD}VirtualQuantity") for item in items}
    assert numbers == {"3": "2", "4": "3072", "6": None, "17": None, "10": None}
    [resource] = [
        item.findtext(f"{RASD}HostResource") for item in items if item.find(f"{RASD}HostResource") is not None
    ]
    assert resource == f"ovf:/disk/{disk.get(f'{OVF}diskId')}"
    [system] = root.findall(f".//{OVF}OperatingSystemSection")
    assert system.get(f"{VMW}osType") == "ubuntu64Guest"
    configured = {item.get(f"{VMW}key"): item.get(f"{VMW}value") for item in root.findall(f".//{VMW}Config")}
    assert configured == {"firmware": expected, "bootOptions.efiSecureBootEnabled": "false"}


def test_ova_has_no_place_for_a_larger_disk(tmp_path: Path) -> None:
    build = build_of(tmp_path, "ova")
    vmdk = build.directory / "x-2026-01-31.vmdk"
    vmdk.touch()
    os.truncate(vmdk, 8 << 30)
    with pytest.raises(BuildError, match=r"x-2026-01-31\.vmdk has more than the 8 GiB that there may be in an OVA\."):
        OUTPUTS["ova"].write(OUTPUTS["ova"], state_of(build), build.directory / "x-2026-01-31.ova")
    assert {path.suffix for path in build.directory.iterdir()} == {".raw", ".vmdk"}


def test_vagrant(tmp_path: Path) -> None:
    packed = made(build_of(tmp_path, "vagrant"))["vagrant"].path
    assert packed.name == "x-2026-01-31.box"
    with tarfile.open(packed) as archive:
        assert archive.getnames() == ["metadata.json", "Vagrantfile", "box.img"]
        file = archive.extractfile("metadata.json")
        assert file
        assert json.load(file) == {"provider": "libvirt", "format": "qcow2", "virtual_size": 1}
    run("tar", "--extract", f"--directory={tmp_path}", f"--file={packed}", "box.img")
    info = json.loads(run("qemu-img", "info", "--output=json", tmp_path / "box.img").stdout)
    assert (info["format"], info["virtual-size"]) == ("qcow2", SIZE)


def test_what_is_packed_is_made_once(tmp_path: Path) -> None:
    build = build_of(tmp_path, "ova, vagrant, raw.gz, vmdk, raw")
    assert [step.name for step in outputs.steps(build)] == [
        "Making raw.gz, vmdk, qcow2", "Packing vagrant", "Packing ova", "Naming the raw image",
    ]  # fmt: skip
    names = {artifact.path.name for artifact in made(build).values()}
    assert {path.name for path in build.directory.iterdir()} == {"disk.raw", *names}
    assert {"gzip", "tar", "qemu-img"} <= {*outputs.programs(build.plan)}
    assert "xz" not in outputs.programs(build.plan)


def test_a_tar_that_was_exchanged(tmp_path: Path) -> None:
    path = tmp_path / "x.ova"
    path.write_bytes(b"x" * 512)
    with pytest.raises(BuildError, match=r"^x\.ova is not what was made: "):
        outputs.opened(Artifact(path, "ova", SIZE))


# Incus.


def metadata_of(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    """Return the metadata in the tarball *path*, and all texts, as Incus reads it: cmd/incusd/images.go, shared/api.

    It looks for the very name metadata.yaml, knows architectures by the names of shared/osarch, takes a date of 0 for
    none, and decodes the rest into maps of strings.
    """
    with tarfile.open(path, "r:xz") as archive:
        opened = ((member.name, archive.extractfile(member)) for member in archive.getmembers())
        texts = {name: file.read().decode() for name, file in opened if file}
    found = yaml.safe_load(texts["metadata.yaml"])
    known = {"architecture", "creation_date", "expiry_date", "properties", "templates"}
    assert {"architecture", "creation_date"} <= found.keys() <= known
    assert found["architecture"] in ["i686", "x86_64", "armv7l", "aarch64", "ppc64le", "s390x", "riscv64"]
    assert isinstance(found["creation_date"], int) and found["creation_date"] > 0
    assert all(isinstance(word, str) for pair in found["properties"].items() for word in pair)
    for target, rule in found["templates"].items():
        assert target.startswith("/") and rule.keys() <= {
            "when",
            "create_only",
            "template",
            "properties",
            "uid",
            "gid",
            "mode",
        }
        assert {*rule["when"]} <= {"create", "copy", "start"} and f"templates/{rule['template']}" in texts
    return found, texts


@pytest.mark.parametrize(("arch", "name"), [("x86_64", "x86_64"), ("armhf", "armv7l"), ("ppc64el", "ppc64le")])
def test_what_incus_wants(tmp_path: Path, arch: str, name: str) -> None:
    extra = f"arch = {arch}\ndistribution = Debian\nrelease = 13\n"
    build = build_of(tmp_path, "incus, qcow2", extra=extra)
    found, texts = metadata_of(made(build)["incus"].path)
    assert found["architecture"] == name
    assert found["properties"] == {
        "architecture": name, "description": f"Debian 13 {name} (x-2026-01-31)", "name": "x-2026-01-31",
        "os": "Debian", "release": "13", "serial": "20260131", "variant": "x",
    }  # fmt: skip
    assert texts["templates/hostname.tpl"] == "{{ instance.name }}\n"
    # What is not known is not there, and 1970 is a time.
    (tmp_path / "other").mkdir()
    other = build_of(tmp_path / "other", "qcow2, incus", extra=f"arch = {arch}\n")
    other = dataclasses.replace(other, plan=dataclasses.replace(other.plan, source_date=0))
    found, _ = metadata_of(made(other)["incus"].path)
    assert found["creation_date"] == 1
    assert found["properties"].keys() & {"os", "release"} == set()


def test_incus_alone_is_no_image(tmp_path: Path) -> None:
    outputs.check(build_of(tmp_path, "incus, qcow2").plan)
    with pytest.raises(ConfigurationError) as caught:
        outputs.check(build_of(tmp_path, "incus, vmdk").plan)
    assert caught.value.message == "[x] format: incus only says what an image is, and goes with the image itself."
    assert "squashfs" in str(caught.value.hint) and "qcow2" in str(caught.value.hint)
