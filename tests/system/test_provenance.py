"""What a build says of how it was made: the form of in-toto and SLSA, what it names, and that it has no secret."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from image_factory import pipeline
from image_factory.base import command, events, log
from image_factory.finishing import provenance, sign
from image_factory.model import Artifact, Build
from image_factory.told.witness import Witness

from .test_manifest import named, published

# What the two specifications require, in-toto's Statement v1 and SLSA's Provenance v1.
DIGEST = {"type": "object", "required": ["sha256"], "properties": {"sha256": {"pattern": "^[0-9a-f]{64}$"}}}
URI = {"type": "string", "pattern": "^[a-z][a-z0-9+.-]*:"}
MOMENT = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"}
DESCRIPTOR = {
    "type": "object",
    "anyOf": [{"required": ["digest"]}, {"required": ["uri"]}],
    "properties": {
        "name": {"type": "string"},
        "uri": URI,
        "digest": DIGEST,
        "annotations": {"type": "object"},
    },
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "required": ["_type", "subject", "predicateType", "predicate"],
    "additionalProperties": False,
    "properties": {
        "_type": {"const": "https://in-toto.io/Statement/v1"},
        "subject": {"type": "array", "minItems": 1, "items": DESCRIPTOR | {"required": ["name", "digest"]}},
        "predicateType": {"const": "https://slsa.dev/provenance/v1"},
        "predicate": {
            "type": "object",
            "required": ["buildDefinition", "runDetails"],
            "additionalProperties": False,
            "properties": {
                "buildDefinition": {
                    "type": "object",
                    "required": ["buildType", "externalParameters"],
                    "additionalProperties": False,
                    "properties": {
                        "buildType": URI,
                        "externalParameters": {"type": "object"},
                        "internalParameters": {"type": "object"},
                        "resolvedDependencies": {"type": "array", "items": DESCRIPTOR},
                    },
                },
                "runDetails": {
                    "type": "object",
                    "required": ["builder"],
                    "additionalProperties": False,
                    "properties": {
                        "builder": {"type": "object", "required": ["id"], "properties": {"id": URI}},
                        "metadata": {
                            "type": "object",
                            "properties": {
                                "invocationId": {"type": "string"},
                                "startedOn": MOMENT,
                                "finishedOn": MOMENT,
                            },
                        },
                        "byproducts": {"type": "array", "items": DESCRIPTOR},
                    },
                },
            },
        },
    },
}


def checked(path: Path) -> dict[str, Any]:
    """Return the statement in *path*, which has the form of both specifications."""
    text = path.read_text()
    assert text.isascii()
    found: dict[str, Any] = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return found


def stated(path: Path, seen: Witness, extra: str = "") -> tuple[list[Artifact], dict[str, Any]]:
    """Return artifacts with the statement of what *seen* has noted, and that."""
    artifacts = published(path)
    plan = named(path, extra=f"provenance = yes\n{extra}")
    found = provenance.add_statement(Build(plan, plan.output_dir, "vm"), artifacts, seen)
    return found, checked(plan.output_dir / "x-2024-02-29.provenance.json")


def test_statement_says_from_what_and_how(tmp_path: Path) -> None:
    kernel, gone = tmp_path / "linux", tmp_path / "gone"
    kernel.write_text("kernel")
    gone.write_text("was here")
    seen = Witness()
    with seen.observing():
        events.tell(events.CommandRun(("before", "any", "step")))
        for origin, path, by in (("https://me:pw@example.com/linux?token=s3cret", kernel, "SHA256SUMS signed by A"),
                                 ("/srv/initrd", gone, None), ("/srv/tree", tmp_path, None)):  # fmt: skip
            key = "initrd" if path == gone else "linux"
            events.tell(events.InputUsed(key, origin, path, by))
        # What takes its place is not what was used.
        gone.unlink()
        gone.write_text("another")
        with log.step("Installing"):
            command.run(["true", "--password=s3cret", "a b"])
            command.run(["true", "quiet"], quiet=True)
        with log.step("Writing the provenance"):
            artifacts, found = stated(tmp_path, seen)
    assert [(each["name"], each["digest"]["sha256"]) for each in found["subject"]] == [
        (artifact.path.name, artifact.sha256) for artifact in artifacts
    ]
    definition = found["predicate"]["buildDefinition"]
    # The test reads a configuration, too.
    *used, configuration = definition["resolvedDependencies"]
    assert configuration["name"] == "configuration"
    assert used == [
        {
            "name": "linux",
            "uri": "https://example.com/linux",
            "digest": {"sha256": hashlib.sha256(b"kernel").hexdigest()},
            "annotations": {"verifiedBy": "SHA256SUMS signed by A"},
        },
        {"name": "initrd", "uri": "file:/srv/initrd", "digest": {"sha256": hashlib.sha256(b"was here").hexdigest()}},
        {"name": "linux", "uri": "file:/srv/tree"},
    ]
    [step] = definition["internalParameters"]["steps"]
    assert step == {"name": "Installing", "commands": ["true '--password=***' 'a b'"]}
    assert definition["externalParameters"]["image"] == "x"
    assert definition["externalParameters"]["settings"]["format"] == ["qcow2", "raw"]
    assert "linux" not in definition["externalParameters"]["settings"]
    assert [each["name"] for each in found["predicate"]["runDetails"]["byproducts"]] == [
        name for artifact in artifacts for name, _ in artifact.companions[:-1]
    ]


def test_an_answer_file_is_known_by_itself_and_not_by_what_the_guest_got(tmp_path: Path) -> None:
    """The digest of what has a password in it would let others try passwords."""
    template, copy = tmp_path / "a.yaml.j2", tmp_path / "copy"
    template.write_text("password: {{ password }}")
    copy.write_text("password: secret")
    seen = Witness()
    with seen.observing():
        for key in ("bootstrap", "preseed"):
            events.tell(events.InputUsed(key, str(template), copy))
        digests = {used.sha256 for used in seen.inputs()}
    assert digests == {hashlib.sha256(template.read_bytes()).hexdigest()}


def test_what_is_no_file_is_named_without_a_digest_and_nothing_stays_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    seen = Witness()
    with pytest.raises(ZeroDivisionError), seen.observing():
        for path in (tmp_path / "fifo", tmp_path, tmp_path / "none", None):
            events.tell(events.InputUsed("linux", str(path), path))
        (tmp_path / "linux").write_text("x")
        events.tell(events.InputUsed("linux", "linux", tmp_path / "linux"))
        assert [used.sha256 is None for used in seen.inputs()] == [True, True, True, True, False]
        raise ZeroDivisionError
    assert len(os.listdir("/proc/self/fd")) == before


def test_statement_is_signed_uploaded_and_listed_once(tmp_path: Path) -> None:
    with Witness().observing():
        artifacts, _ = stated(tmp_path, Witness())
    name = "x-2024-02-29.provenance.json"
    assert all(artifact.companions[-1][0] == name for artifact in artifacts)
    lines = sign._sums(artifacts).splitlines()
    assert len(lines) == len({*lines})
    assert sum(name in line for line in lines) == 1
    plan = named(tmp_path, extra="provenance = yes")
    assert provenance.named(plan, published(tmp_path))[0].companions[-1] == (name, "")
    assert provenance.named(named(tmp_path), artifacts) == artifacts


def test_only_where_it_is_wanted(tmp_path: Path) -> None:
    for extra, expected in (("provenance = yes", ["Writing the provenance"]), ("", [])):
        build = Build(named(tmp_path, extra=extra), tmp_path, "vm")
        assert [step.name for step in provenance.steps(build)] == expected
    assert any(part.steps is provenance.steps for stage in pipeline.STAGES for part in stage.parts)
