"""The tables of kinds: what a setting accepts is what stands there, and a build goes by it."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from image_factory import checkpoint, online, pipeline, publish
from image_factory.base.errors import ConfigurationError
from image_factory.base.events import InputUsed
from image_factory.configuration import files
from image_factory.configuration.files import Configuration
from image_factory.configuration.settings import ANSWER_FILE_KEYS, Destination, ImageSettings, UploadSettings
from image_factory.machines import arch
from image_factory.model import Artifact, Build, Plan
from image_factory.outputs import OUTPUTS, raw
from image_factory.parts import carry_out
from image_factory.sources import SOURCES
from image_factory.sources.installer import answercheck, delivery, installers
from image_factory.uploads import UPLOADS

from ..conftest import REPOSITORY, shown, state_of


class Elsewhere:
    """A type of uploads that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def programs(self, destination: Destination) -> list[str]:
        return ["send-elsewhere"]

    def commands(self, destination: Destination, artifact: Artifact) -> list[list[str]]:
        return [["send-elsewhere", artifact.path.name, destination.target]]

    def upload(self, destination: Destination, artifact: Artifact) -> None:
        self.asked.append(f"upload {artifact.path.name} to {destination.target}")

    def probe(self, destination: Destination, directory: Path) -> None:
        self.asked.append(f"probe {destination.target}")


def configuration(directory: Path, text: str) -> Configuration:
    (directory / "own.conf").write_text(f"[x]\nlinux = {directory}/l\ninitrd = {directory}/i\n{text}")
    return Configuration({files.FILE_VARIABLE: str(directory / "own.conf")})


def test_upload_goes_by_the_type_of_its_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = configuration(
        tmp_path, "mount-via = loop\nupload_destinations = up\n[up]\nupload_type = elsewhere\nupload_target = there\n"
    )
    with pytest.raises(ConfigurationError, match=r"'elsewhere' is not accepted, only rsync\.$"):
        found.destination("up", "x.raw", named_by="x")
    elsewhere = Elsewhere()
    monkeypatch.setitem(UPLOADS, "elsewhere", elsewhere)
    settings = found.image("x", {"output-dir": str(tmp_path)})
    destination = found.destination("up", "x.raw", named_by="x")
    plan = Plan("x", settings, datetime.date(2024, 2, 29), tmp_path, {"raw": (destination,)})
    artifact = Artifact(tmp_path / "x.raw", "raw", 4096)
    assert {"send-elsewhere"} <= {*pipeline.programs(plan)}
    assert "rsync" not in pipeline.programs(plan)
    online.check(plan)
    build = Build(plan, tmp_path, "vm")
    carry_out(state_of(build, [artifact]), publish.upload_steps(build))
    assert elsewhere.asked == ["probe there", "upload x.raw to there"]
    [commands] = shown(build, publish.upload_steps(build)).values()
    assert commands == [["send-elsewhere", "x-2024-02-29.raw", "there"]]


def test_formats_are_the_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OUTPUTS, "tarball", raw)
    assert configuration(tmp_path, "format = tarball, raw\n").image("x", {}).format == ("tarball", "raw")
    with pytest.raises(ConfigurationError, match=r"only raw or qcow2 or tarball, or several with commas\.$"):
        configuration(tmp_path, "format = zip\n").image("x", {})
    assert dict(files.declared(ImageSettings))["format"].help == "raw, qcow2, tarball, or several with commas"


def test_each_output_says_what_it_is_made_from() -> None:
    assert {name: output.MADE_FROM for name, output in OUTPUTS.items()} == {"raw": "disk", "qcow2": "disk"}


def test_kinds_are_those_of_settings() -> None:
    known = {key for kind in (ImageSettings, UploadSettings) for key, _ in files.declared(kind)}
    assert files._KINDS
    assert files._KINDS.keys() <= known


def test_each_answer_file_has_a_row_in_each_table_of_the_installer() -> None:
    assert ANSWER_FILE_KEYS == ("preseed", "kickstart", "yast", "autoinstall", "agama")
    for table in (delivery.DELIVERIES, answercheck._CHECKS):
        assert tuple(table) == ANSWER_FILE_KEYS
    for table in (installers.POWER_OFF, installers._BY_ANSWER_FILE):
        assert tuple(table) == (*ANSWER_FILE_KEYS, None)


def test_firmwares_are_those_of_the_architectures() -> None:
    assert arch.FIRMWARES == ("bios", "uefi", "hybrid")
    assert {name: arch.default_firmware(name) for name in arch.ARCHITECTURES} == {"x86_64": "bios", "aarch64": "uefi"}
    assert [arch.NAMES[name] for name in ("x86_64", "i386", "arm64")] == ["x86_64", "x86_64", "aarch64"]


class Given:
    """A source whose disk is there already, and which notes what it is asked."""

    KEYS = ("given",)

    def __init__(self) -> None:
        self.asked: list[str] = []

    def check_settings(self, name: str, settings: ImageSettings) -> None:
        self.asked.append(f"settings of {name}")

    def identity(self, plan: Plan, used: Sequence[InputUsed] = ()) -> dict[str, str]:
        return {"given": "".join(event.origin for event in used) or "now"}

    def original(self, plan: Plan, used: InputUsed) -> InputUsed | None:
        return InputUsed(used.key, used.origin, Path("/original"))

    def programs(self, plan: Plan) -> list[str]:
        return ["find-disk"]

    def remote(self, plan: Plan) -> list[tuple[str, str, bool]]:
        self.asked.append("remote")
        return []

    def urls_of_guest(self, plan: Plan) -> dict[str, str]:
        self.asked.append("urls of the guest")
        return {}


def test_source_is_chosen_by_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.conf").write_text("[x]\ngiven = disk\nsource = given\nmount-via = loop\n[y]\nlinux = l\n")
    environment = {files.FILE_VARIABLE: str(tmp_path / "own.conf")}
    assert Configuration(environment).images() == ["y"]
    with pytest.raises(ConfigurationError, match=r"^\[x\] source: 'given' is not accepted, only installer\.$"):
        Configuration(environment).image("x", {})
    source = Given()
    monkeypatch.setitem(cast(dict[str, object], SOURCES), "given", source)
    found = Configuration(environment)
    assert found.images() == ["x", "y"]
    settings = found.image("x", {})
    assert settings.source == "given"
    plan = Plan("x", settings, datetime.date(2024, 2, 29), tmp_path, {})
    assert pipeline.programs(plan)[0] == "find-disk"
    assert "virt-install" not in pipeline.programs(plan)
    online.check(plan)
    assert source.asked == ["settings of x", "remote", "urls of the guest"]
    assert checkpoint.inputs_of(plan)["given"] == "now"
    assert checkpoint.inputs_of(plan, [InputUsed("given", "before", None)])["given"] == "before"
    with pytest.raises(ConfigurationError, match=r"^\[y\] lacks 'initrd'\."):
        found.image("y", {})


def test_checkpoint_is_of_one_source(tmp_path: Path) -> None:
    """The disk of another source is another one, whatever else is the same."""
    settings = configuration(tmp_path, "").image("x", {})
    plan = Plan("x", settings, datetime.date(2024, 2, 29), tmp_path, {})
    assert {"source", "linux", "initrd", "append", "image-size"} == checkpoint.inputs_of(plan).keys()


def test_the_record_s_schema_has_the_keys_of_all_inputs() -> None:
    """Those of what an installer is made from, and of what it is given."""
    schema = json.loads((REPOSITORY / "data/build-record.schema.json").read_text())
    known = schema["properties"]["inputs"]["items"]["properties"]["key"]["enum"]
    assert sorted(known) == sorted(["configuration", *SOURCES["installer"].KEYS, *ANSWER_FILE_KEYS, "answer-files"])
