"""What the files of a build are called, and what becomes of those that have the name already."""

import dataclasses
import datetime
import json
import logging
import os
import re
from pathlib import Path

import pytest

from image_factory import checkpoint, naming, pipeline
from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.finishing import manifest
from image_factory.model import MANIFEST_SUFFIX, Build, Plan
from image_factory.system.inventory import Inventory

KEYS = "linux = /l\ninitrd = /i\ndistribution = Rocky Linux\nrelease = 10\narch = amd64\nversion = 1.4\ndate = mine\n"


def plan_of(directory: Path, text: str, *, resume: bool = False) -> Plan:
    (directory / "x.conf").write_text(f"[x]\n{KEYS}{text}\n")
    configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(directory / "x.conf")})
    return pipeline.make_plan(configuration, "x", {"output-dir": str(directory / "output")}, resume=resume)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("${image}-${date}", r"x-[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        ("${image}-rootfs-${stamp}-${ident}", r"x-rootfs-[0-9]{8}-[0-9]{6}-[0-9a-f]{10}"),
        ("${distribution}-${release}-${arch}_${version}", r"Rocky-Linux-10-x86_64_1\.4"),
        ("golden image", r"golden-image"),
    ],
)
def test_names(tmp_path: Path, template: str, expected: str) -> None:
    plan = plan_of(tmp_path, f"image-name = {template}\nlog-file = yes\n")
    assert re.fullmatch(expected, plan.base_name)
    assert plan.log_path == plan.output_dir / f"{plan.base_name}.log"
    assert re.fullmatch(naming.pattern(plan), plan.base_name)
    assert re.fullmatch(naming.pattern(plan), f"{plan.base_name}-2")


def test_manifest_text_has_the_names_of_the_image(tmp_path: Path) -> None:
    """As RackN has them: time and ident are one for both, and .txt is at the end of it once."""
    text = "format = tgz\nimage-name = t-rootfs-${stamp}-${ident}\nmanifest-text = t-MANIFEST-${stamp}-${ident}"
    for suffix in ("", ".txt"):
        plan = plan_of(tmp_path, text + suffix)
        assert plan.text_name == plan.base_name.replace("rootfs", "MANIFEST") + ".txt"
        assert plan.base_name.endswith(f"-{plan.ident}")
    assert not plan_of(tmp_path, "format = tgz").text_name
    (tmp_path / "output").mkdir()
    (tmp_path / "output/golden.tgz").touch()
    plan = plan_of(tmp_path, "format = tgz\nreplace = number\nimage-name = golden\nmanifest-text = list")
    assert (plan.base_name, plan.text_name) == ("golden-2", "list-2.txt")


def test_each_build_has_an_ident_of_its_own(tmp_path: Path) -> None:
    names = {plan_of(tmp_path, "image-name = ${image}-${ident}").base_name for _ in range(8)}
    assert len(names) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image-name = ${image}-${stmp}", "[x] image-name: ${stmp} is not defined."),
        ("manifest-text = a-${stmp}", "[x] manifest-text: ${stmp} is not defined."),
        ("manifest-text = ${distribution}\ndistribution =", "manifest-text has ${distribution}, and the image lacks"),
        (f"manifest-text = {'n' * 201}", "..' is no image name."),
        ("image-name = a/${image}", "[x] image-name: 'a/${image}' is not accepted, only letters, digits, . _ + ~ @ -"),
        ("image-name =", "[x] image-name: '' is not accepted, only letters, digits, . _ + ~ @ - and variables such"),
        ("image-name = -${date}", "[x] image-name: '-${date}' is not accepted, only letters, digits, . _ + ~ @ -"),
        ("image-name = ${distribution}\ndistribution = a/b", "[x] image-name: 'a/b' is no image name."),
        ("image-name = ${distribution}\ndistribution =", "image-name has ${distribution}, and the image lacks"),
        (f"image-name = {'n' * 201}", "..' is no image name."),
        ("image-name = ${image}-$", "[x] image-name: '${image}-$' has a '$' that begins no ${...}."),
        ("replace = maybe", "[x] replace: 'maybe' is not accepted, only yes, no or number."),
    ],
)
def test_what_is_no_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.conf").write_text(f"[x]\nlinux = /l\ninitrd = /i\n{text}\n")
    configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "x.conf")})
    with pytest.raises(ConfigurationError) as caught:
        pipeline.make_plan(configuration, "x", {})
    assert message in caught.value.message


def test_a_second_build_of_a_day(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is replaced in silence."""

    def said() -> list[str]:
        return [message for message in caplog.messages if "nothing uses this key" not in message]

    output = tmp_path / "output"
    output.mkdir()
    texts = {each: f"format = raw, vmdk\nreplace = {each}" for each in ("yes", "no", "number")}
    first = plan_of(tmp_path, texts["number"])
    for text in texts.values():
        plan = plan_of(tmp_path, text)
        assert plan.base_name == first.base_name
        naming.check(plan)
    assert said() == []
    # One of the formats is enough.
    (output / f"{first.base_name}.vmdk").touch()
    with pytest.raises(
        ConfigurationError, match=rf"^\[x\] replace = no, and {output}/{first.base_name}\.vmdk is there"
    ):
        naming.check(plan_of(tmp_path, texts["no"]))
    assert plan_of(tmp_path, texts["number"]).base_name == f"{first.base_name}-2"
    (output / f"{first.base_name}-2.raw").touch()
    assert plan_of(tmp_path, texts["number"]).base_name == f"{first.base_name}-3"
    with caplog.at_level(logging.WARNING):
        naming.check(plan_of(tmp_path, texts["yes"]))
    assert said() == [f"{first.base_name}.vmdk of an earlier build will be replaced; see 'replace'."]


def test_two_images_of_one_name(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "image-name = golden")
    other = dataclasses.replace(plan, image="other")
    with pytest.raises(
        ConfigurationError, match=r"^Its files would have the names that those of other have: golden\.$"
    ):
        naming.check_others(plan, [other])
    naming.check_others(
        plan, [dataclasses.replace(other, name="other"), dataclasses.replace(other, output_dir=tmp_path)]
    )


def test_a_resumed_build_keeps_its_name(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, text := "image-name = ${image}-${ident}\nreplace = number")
    plan.work_path.mkdir(parents=True)
    build = Build(plan, plan.work_path, "vm")
    build.disk_path.touch()
    checkpoint.begin(build, checkpoint.InputsUsed())
    assert plan_of(tmp_path, text, resume=True).base_name == plan.base_name
    assert plan_of(tmp_path, text).base_name != plan.base_name


def write_manifest(plan: Plan, name: str, image: str = "x", version: str = "1") -> None:
    document = {
        "schema_version": manifest.SCHEMA_VERSION, "image": image, "date": plan.date.isoformat(),
        "packages": [{"name": "a", "architecture": "amd64", "version": version}], "directories": {".": 1},
        "artifact": {"format": "raw.gz", "size_on_disk": 1},
    }  # fmt: skip
    (plan.output_dir / f"{name}.raw.gz{MANIFEST_SUFFIX}").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("template", "older", "newest"),
    [
        ("${image}-${stamp}-${ident}", "x-20200101-000000-0123456789", "x-20200101-000001-0123456789"),
        ("${image}-${date}", "x-2020-01-01", "x-2020-01-01-2"),
        ("${release}-${ident}", "9-ffffffffff", "10-0123456789"),
    ],
)
def test_the_build_before_is_known_by_its_name(
    tmp_path: Path, template: str, older: str, newest: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the packages of the newest one is compared; those of other images may have names of this form."""
    (tmp_path / "output").mkdir()
    plan = plan_of(tmp_path, f"image-name = {template}")
    before = dataclasses.replace(plan, date=datetime.date(2020, 1, 1))
    write_manifest(before, newest, version="2")
    write_manifest(before, older)
    times = {newest: 2, older: 1}
    for name, seconds in times.items():
        path = plan.output_dir / f"{name}.raw.gz{MANIFEST_SUFFIX}"
        os.utime(path, (seconds, seconds))
    write_manifest(before, newest.replace("0", "9").replace("2929", "2019"), image="y")
    write_manifest(before, f"other-{newest}", image="y", version="3")
    caplog.clear()
    found = manifest.find_difference(plan, Inventory({}, (), {}), {"raw.gz": 2})
    assert found
    assert found["packages"]["removed"] == [{"name": "a", "architecture": "amd64", "version": "2"}]
    assert found["artifacts"] == [{"format": "raw.gz", "before": 1, "after": 2}]
    assert caplog.messages == []
