"""The tables of kinds: what a setting accepts is what stands there, and a build goes by it."""

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, cast

import pytest

from image_factory import checkpoint, cli, model, online, pipeline, publish
from image_factory.base.errors import ConfigurationError, NoSystemError
from image_factory.base.events import InputUsed
from image_factory.checks import audit
from image_factory.configuration import files, unused
from image_factory.configuration.files import Configuration
from image_factory.configuration.settings import (
    ANSWER_FILE_KEYS,
    Dependent,
    Destination,
    ImageSettings,
    TaskSettings,
    UploadSettings,
)
from image_factory.machines import arch
from image_factory.model import Artifact, Build, Plan
from image_factory.outputs import OUTPUTS
from image_factory.parts import State, Step, carry_out
from image_factory.sources import SOURCES, Key, forms
from image_factory.sources.installer import answercheck, delivery, installers
from image_factory.uploads import UPLOADS

from ..conftest import REPOSITORY, shown, state_of


class Elsewhere:
    """A type of uploads that notes what it is asked for."""

    KEYS = ("upload-verify",)

    def __init__(self) -> None:
        self.asked: list[str] = []

    def programs(self, destination: Destination) -> list[str]:
        return ["send-elsewhere"]

    def check(self, destination: Destination, file_name: str) -> None:
        self.asked.append(f"check {file_name} for {destination.target}")

    def commands(self, destination: Destination, artifact: Artifact) -> list[list[str]]:
        return [["send-elsewhere", artifact.path.name, destination.target]]

    def upload(self, destination: Destination, artifact: Artifact) -> None:
        self.asked.append(f"upload {artifact.path.name} to {destination.target}")

    def probe(self, destination: Destination, directory: Path) -> bool:
        self.asked.append(f"probe {destination.target}")
        return True


def configuration(directory: Path, text: str) -> Configuration:
    (directory / "own.conf").write_text(f"[x]\nlinux = {directory}/l\ninitrd = {directory}/i\n{text}")
    return Configuration({files.FILE_VARIABLE: str(directory / "own.conf")})


def test_upload_goes_by_the_type_of_its_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = configuration(
        tmp_path, "mount-via = loop\nupload_destinations = up\n[up]\nupload_type = elsewhere\nupload_target = there\n"
    )
    with pytest.raises(ConfigurationError, match=r"'elsewhere' is not accepted, only rsync"):
        found.destination("up", "x.raw", named_by="x")
    elsewhere = Elsewhere()
    monkeypatch.setitem(UPLOADS, "elsewhere", elsewhere)
    settings = found.image("x", {"output-dir": str(tmp_path)})
    destination = found.destination("up", "x.raw", named_by="x")
    plan = Plan("x", settings, datetime.date(2024, 2, 29), tmp_path, {"raw": (destination,)})
    artifact = Artifact(tmp_path / "x.raw", "raw", 4096)
    assert {"send-elsewhere"} <= {*pipeline.programs(plan)}
    assert "rsync" not in pipeline.programs(plan)
    publish.check(plan)
    online.check(plan)
    build = Build(plan, tmp_path, "vm")
    carry_out(state_of(build, [artifact]), publish.upload_steps(build))
    assert elsewhere.asked == ["check x-2024-02-29.raw for there", "probe there", "upload x.raw to there"]
    [commands] = shown(build, publish.upload_steps(build)).values()
    assert commands == [["send-elsewhere", "x-2024-02-29.raw", "there"]]


def test_formats_are_the_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OUTPUTS, "tarball", dataclasses.replace(OUTPUTS["raw"], suffix="tar"))
    assert configuration(tmp_path, "format = tarball, raw\n").image("x", {}).format == ("tarball", "raw")
    with pytest.raises(ConfigurationError, match=r"only raw or qcow2 or .* or tarball, or several with commas\.$"):
        configuration(tmp_path, "format = zip\n").image("x", {})
    assert dict(files.declared(ImageSettings))["format"].help == f"{', '.join(OUTPUTS)}, or several with commas"


def test_kinds_are_those_of_settings() -> None:
    known = {key for kind in (ImageSettings, TaskSettings, UploadSettings) for key, _ in files.declared(kind)}
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
    assert arch.BOOTABLE == ("x86_64", "aarch64")
    assert {name: arch.default_firmware(name) for name in arch.BOOTABLE} == {"x86_64": "bios", "aarch64": "uefi"}
    assert arch.default_firmware("s390x") == ""
    assert [arch.NAMES[name] for name in ("x86_64", "i386", "arm64")] == ["x86_64", "x86_64", "aarch64"]


@pytest.mark.parametrize("name", ["manifest", "image-list"])
def test_schemas_have_all_architectures(name: str) -> None:
    text = (REPOSITORY / f"data/{name}.schema.json").read_text()
    [line] = [line for line in text.splitlines() if '"aarch64"' in line]
    assert re.findall('"([a-z0-9_]+)"', line)[1:] == [*arch.ARCHITECTURES]


def test_schemas_have_all_formats() -> None:
    manifest, record, images = (
        json.loads((REPOSITORY / f"data/{name}.schema.json").read_text())
        for name in ("manifest", "build-record", "image-list")
    )
    assert manifest["properties"]["artifact"]["properties"]["format"]["enum"] == [*OUTPUTS]
    assert record["properties"]["artifacts"]["items"]["properties"]["format"]["enum"] == [*OUTPUTS]
    assert images["items"]["properties"]["format"]["items"]["enum"] == [*OUTPUTS]


class Given:
    """A source whose disk is there already, and which notes what it is asked."""

    keys = ("given",)
    fits = False
    answer_files = ("yast",)
    defaults: ClassVar[dict[str, str | None]] = {}
    dependent: ClassVar[Dependent] = {"mac": ("a cable", lambda settings: False)}

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

    def template_keys(self, path: Path) -> set[str] | None:
        self.asked.append(f"keys of {path.name}")
        return {"of-given"}

    def declared_keys(self, path: Path, arch: str) -> Mapping[str, Key]:
        return (
            {"of-given": forms.Key("of-given", "1", (forms.Form("a number", str),), "how much of it")}
            if path.suffix == ".j2"
            else {}
        )

    def answers_of(self, plan: Plan) -> bytes | None:
        return b"of-given: 2\n"

    def measure(self, plan: Plan) -> None:
        self.asked.append(f"measure for {plan.image}")

    def explain(self, build: Build) -> None:
        self.asked.append(f"explain {build.plan.image}")

    def given(self, build: Build) -> model.Given:
        return model.Given("own.xml", (b"a piece of what was given " * 9,), b"$6$saltsalt$abcdefghijkl", ("a mark",))

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
    refusal = r"^\[x\] source: 'given' is not accepted, only installer, image, bootstrap, elements or capture\.$"
    with pytest.raises(ConfigurationError, match=refusal):
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


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Given, Plan]:
    """Return a source and the plan of an image by it, as the user's configuration has it."""
    source = Given()
    monkeypatch.setitem(cast(dict[str, object], SOURCES), "given", source)
    (tmp_path / "base.cfg").write_text("d-i a/question string b\n")
    (tmp_path / "own.conf").write_text(
        "[base]\nlinux = l\ninitrd = i\n"
        f"preseed = {tmp_path}/base.cfg\n[x]\nbased_on = base\nsource = given\n"
        f"yast = {tmp_path}/own.xml.j2\nof-given = 2\nmac = 52:54:00:00:00:01\nmount-via = loop\n[base2]\nram = 2G\n"
    )
    monkeypatch.setenv(files.FILE_VARIABLE, str(tmp_path / "own.conf"))
    found = Configuration(os.environ)
    return source, Plan("x", found.image("x", {}), datetime.date(2024, 2, 29), tmp_path, {}, found.variables("x", {}))


def test_answer_file_is_that_of_the_source(
    given: tuple[Given, Plan], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """What the section is based on has one for the installer, of which this source knows nothing."""
    source, plan = given
    found = Configuration(os.environ)
    assert found.answer_file("x") == tmp_path / "own.xml.j2"
    assert found.answer_file("base") == tmp_path / "base.cfg"
    assert unused.unused_keys(found, "x", ()) == []
    assert source.asked == ["settings of x", "keys of own.xml.j2"]
    listed = cli.keys_listing(found, "x", {})
    assert f"# Keys of its answer file {tmp_path}/own.xml.j2:" in listed
    assert "of-given = 2" in listed
    cli._show_answers(plan)
    assert capfdbinary.readouterr().out == b"of-given: 2\n"


def test_keys_that_do_nothing_are_those_of_the_source(given: tuple[Given, Plan]) -> None:
    _, plan = given
    found = Configuration(os.environ)
    assert unused.idle_keys(found, "x", plan.settings, []) == ["[x] mac does nothing without a cable."]
    assert unused.idle_keys(found, "base", found.image("base", {}), ["installer-image-sha256"]) == [
        "--installer-image-sha256 does nothing without installer-image."
    ]
    assert unused._unused_sections(found, "base") == [
        "[base2]: nothing uses this section, as it has no installer or image or bootstrap or elements "
        "or capture or given. "
        "Did you mean [base]?"
    ]


def test_failures_and_secrets_are_those_of_the_source(given: tuple[Given, Plan], tmp_path: Path) -> None:
    source, plan = given
    build = Build(plan, tmp_path, "vm")

    def fail(state: State) -> State:
        raise NoSystemError("There is none.")

    with pytest.raises(NoSystemError):
        pipeline._explained(state_of(build), [Step("Looking", fail)])
    assert source.asked == ["settings of x", "explain x"]
    asked, secrets = audit.secrets_of(build)
    assert asked.answer_name == "own.xml"
    assert asked.hashes == {b"$6$saltsalt$abcdefghijkl"}
    found = {needle.what: needle.data for needle in audit.needles(audit.CHECKS, secrets)}
    assert found["a part of the answer file"] in b"a piece of what was given " * 9
    assert found["a file of the seed disk"] == b"a mark"


def test_checkpoint_is_of_one_source(tmp_path: Path) -> None:
    """The disk of another source is another one, whatever else is the same."""
    settings = configuration(tmp_path, "").image("x", {})
    plan = Plan("x", settings, datetime.date(2024, 2, 29), tmp_path, {})
    assert {"source", "linux", "initrd", "append", "image-size"} == checkpoint.inputs_of(plan).keys()


def test_the_record_s_schema_has_the_keys_of_all_inputs() -> None:
    """Those of what a disk is made from, and of what a guest is given that makes it."""
    schema = json.loads((REPOSITORY / "data/build-record.schema.json").read_text())
    known = schema["properties"]["inputs"]["items"]["properties"]["key"]["enum"]
    made_from = [key for source in SOURCES.values() for key in source.keys]
    assert sorted(known) == sorted(
        ["configuration", *made_from, *ANSWER_FILE_KEYS, "answer-files", "copy", "first-boot"]
    )
