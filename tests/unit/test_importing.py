"""The files that say how a target gets an image."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from image_factory import pipeline, publish
from image_factory.configuration.files import Configuration
from image_factory.finishing import importing
from image_factory.machines.arch import ARCHITECTURES
from image_factory.model import Artifact, Plan
from image_factory.outputs import planned
from image_factory.outputs.targets import TARGETS

Make = Callable[..., Plan]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(**keys: str) -> Plan:
        values = {"linux": "/l", "initrd": "/i", "output_dir": str(tmp_path), "image_size": "2.5G"} | keys
        lines = "".join(f"{key.replace('_', '-')} = {text}\n" for key, text in values.items())
        (tmp_path / "x.conf").write_text(f"[Rocky-9]\n{lines}")
        plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "x.conf")}), "Rocky-9", {})
        return dataclasses.replace(plan, name=plan.base_name.replace(plan.date.isoformat(), "2026-01-31"))

    return make


def made(plan: Plan) -> list[Artifact]:
    """Return the artifacts of *plan*, which are there, with their files."""
    artifacts = [dataclasses.replace(each, sha256="ab" * 32) for each in planned(plan, plan.output_dir)]
    return importing.add_texts(plan, artifacts)


def test_each_target_has_its_file_beside_the_image_that_is_for_it(make: Make, tmp_path: Path) -> None:
    plan = make(target="azure, openstack, libvirt, incus", keep_raw="yes")
    artifacts = made(plan)
    names = {each.format: [name for name, _ in each.companions] for each in artifacts}
    base = "Rocky-9-2026-01-31"
    assert names == {
        "vhd": [f"{base}.vhd.azure.txt"],
        "qcow2": [f"{base}.qcow2.{name}.txt" for name in ("openstack", "libvirt", "incus")],
        # The text names both files.
        "squashfs": [f"{base}.squashfs.incus.txt"],
        "incus": [],
        "raw": [],
    }
    assert f"incus image import {base}.incus" in (tmp_path / f"{base}.squashfs.incus.txt").read_text()
    assert [[name for name, _ in each.companions] for each in importing.named(plan, planned(plan, tmp_path))] == [
        *names.values()
    ]
    written = {name for found in names.values() for name in found}
    assert written <= {path.name for each in publish.published(plan) for path in each.others}


def test_the_text(make: Make, tmp_path: Path) -> None:
    made(make(target="openstack", distribution="Rocky Linux", release="9.6", firmware="hybrid", arch="x86_64"))
    text = (tmp_path / "Rocky-9-2026-01-31.qcow2.openstack.txt").read_text()
    assert text.startswith("Rocky-9-2026-01-31.qcow2 is for: OpenStack Glance. Format: qcow2 or raw. ")
    assert f"\n\nSHA-256: {'ab' * 32}\nSize of the disk: {5 << 29} bytes\n\nopenstack image create " in text
    words = shlex.split(text.splitlines()[-1])
    # The disk has room in 3 GB.
    assert words[words.index("--min-disk") + 1] == "3"
    assert {"--property=os_distro=rocky", "--property=os_version=9.6", "hw_firmware_type=uefi"} <= {*words}
    assert words[-1] == "Rocky-9-2026-01-31"


def test_what_is_not_known_is_left_out(make: Make, tmp_path: Path) -> None:
    made(make(target="openstack, maas"))
    assert "os_distro" not in (tmp_path / "Rocky-9-2026-01-31.qcow2.openstack.txt").read_text()
    assert "base_image" not in (tmp_path / "Rocky-9-2026-01-31.tgz.maas.txt").read_text()
    made(make(target="maas", distribution="Rocky Linux", release="9.6"))
    assert " base_image=rhel/9 filetype=tgz " in (tmp_path / "Rocky-9-2026-01-31.tgz.maas.txt").read_text()
    made(make(target="maas", format="raw.xz", distribution="Debian", release="13"))
    text = (tmp_path / "Rocky-9-2026-01-31.raw.xz.maas.txt").read_text()
    assert "name=custom/rocky-9-2026-01-31 " in text
    assert " filetype=ddxz content@=Rocky-9-2026-01-31.raw.xz\n" in text
    assert "base_image" not in text


def test_words_of_the_commands(make: Make, tmp_path: Path) -> None:
    odd = {"distribution": "it's;mine", "release": "`1` or 2"}
    made(make(target="aws, kubevirt, openstack", image_name="my ${image}", firmware="uefi", arch="aarch64", **odd))
    text = (tmp_path / "my-Rocky-9.raw.aws.txt").read_text()
    copied, imported, registered = map(shlex.split, text.splitlines()[-3:])
    assert copied == ["aws", "s3", "cp", "my-Rocky-9.raw", "s3://BUCKET/my-Rocky-9.raw"]
    assert imported[-1] == "Format=RAW,UserBucket={S3Bucket=BUCKET,S3Key=my-Rocky-9.raw}"
    assert [registered[registered.index(name) + 1] for name in ("--architecture", "--boot-mode")] == ["arm64", "uefi"]
    # Both formats are for it.
    for name in ("raw", "qcow2"):
        text = (tmp_path / f"my-Rocky-9.{name}.kubevirt.txt").read_text()
        assert f"virtctl image-upload dv my-rocky-9 --size=3Gi --image-path=my-Rocky-9.{name}\n" in text
    words = shlex.split((tmp_path / "my-Rocky-9.qcow2.openstack.txt").read_text().splitlines()[-1])
    # A word stays one whatever is in it, and none is a command.
    assert words[-3:] == ["--property=os_distro=it's;mine", "--property=os_version=`1` or 2", "my-Rocky-9"]


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_has_commands_for_all_that_it_takes(make: Make, tmp_path: Path, name: str) -> None:
    target = TARGETS[name]
    for formats in (value.split("+") for value in target.taken("format")):
        for arch in target.architectures or ["x86_64", "aarch64"]:
            for firmware in ARCHITECTURES[arch].machines:
                keys = {"format": ", ".join(formats), "arch": arch, "firmware": firmware}
                made(make(target=name, image_size="3G", distribution="Debian", release="13", **keys))
                text = (tmp_path / f"Rocky-9-2026-01-31.{made_name(formats[0])}.{name}.txt").read_text()
                commands = text.split("\n\n")[2].splitlines()
                assert "Rocky-9-2026-01-31." in commands[0]
                assert "${" not in text
                if name != "hyperv":
                    assert all(len(shlex.split(line)) > 2 for line in commands)


def made_name(name: str) -> str:
    return {"vagrant": "box"}.get(name, name)
