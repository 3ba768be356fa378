"""The Jenkins job of contrib/jenkins: its Groovy is run with a fake image-factory, its definition is rendered."""

import json
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

from ..conftest import PATIENCE, wait_for

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
JOB = REPOSITORY / "contrib/jenkins"
ENVIRONMENT = {"LANG": "C.UTF-8", "PATH": f"{TESTS}/jenkins:/usr/bin:/bin"}


@dataclass(frozen=True)
class Outcome:
    """What a run of the Jenkinsfile called."""

    status: int
    steps: list[dict]
    calls: list[list[str]]
    log: str

    def details(self, step: str, branch: str | None = None) -> list:
        return [entry["detail"] for entry in self.steps if entry["step"] == step and entry.get("branch") == branch]

    @property
    def description(self) -> list[str]:
        return sorted(self.details("description")[0].splitlines())

    def commands(self, branch: str) -> list[str]:
        return [detail["label"] for detail in self.details("sh", branch)]


@contextmanager
def pipeline(root: Path, parameters: dict[str, object]) -> Iterator[subprocess.Popen[str]]:
    """Have the Jenkinsfile run; its agents are below *root*."""
    (root / "agents").mkdir(exist_ok=True)
    argv = ["groovy", TESTS / "jenkins/run.groovy", JOB / "Jenkinsfile", root / "agents", json.dumps(parameters)]
    # Groovy leaves a directory in HOME.
    environment = {**ENVIRONMENT, "HOME": str(root), "CALLS": str(root / "calls")}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, env=environment, text=True, **streams) as process:
        yield process


def finished(process: subprocess.Popen[str], root: Path) -> Outcome:
    output, log = process.communicate(timeout=PATIENCE)
    calls = [json.loads(line) for line in (root / "calls").read_text().splitlines()]
    (root / "calls").unlink()
    try:
        return Outcome(process.returncode, [json.loads(line) for line in output.splitlines()], calls, log)
    except ValueError:
        pytest.fail(f"{output}{log}")


def run_pipeline(root: Path, **parameters: object) -> Outcome:
    with pipeline(root, parameters) as process:
        return finished(process, root)


def workspace(root: Path, image: str) -> Path:
    return root / "agents/image-factory/folder/job" / image


def test_images_are_built_beside_each_other_and_one_that_fails_stops_none(tmp_path: Path) -> None:
    outcome = run_pipeline(tmp_path, IMAGES="good.*|bad", AGENTS="builders && kvm", HOURS="3")
    assert outcome.status == 1
    assert outcome.details("parallel") == [["good", "good-again", "bad"]]
    assert outcome.calls[0] == ["--list-json"]
    assert {entry["detail"] for entry in outcome.steps if entry["step"] == "node"} == {"builders && kvm"}
    for image in ("good", "good-again", "bad"):
        build = ["--output-dir", ".", "--log-file", "--json", f"{image}.record.json", image]
        assert outcome.calls.count(build) == 1
        assert outcome.details("ws", image) == [f"image-factory/folder/job/{image}"]
        assert outcome.details("timeout", image) == [{"time": 3, "unit": "HOURS"}]
        assert outcome.commands(image) == [
            "image-factory --cleanup",
            "Remove the last build",
            f"image-factory {image}",
            "image-factory --cleanup",
        ]
        [results] = outcome.details("junit", image)
        assert results["files"] == [f"{image}-2026-01-31.junit.xml"]
    assert outcome.description == ["bad: failed: The installer has failed.", "good-again: built", "good: built"]
    assert outcome.details("echo") == [
        "good: built\ngood-again: built\nbad: failed: The installer has failed.\n    Read its log."
    ]
    # The last line of the log.
    assert outcome.details("failed") == ["bad: failed: The installer has failed. (exit status 1)"]


def archived(outcome: Outcome, image: str) -> list[str]:
    [detail] = outcome.details("archiveArtifacts", image)
    return [name.removeprefix(f"{image}-2026-01-31.") for name in detail["files"]]


def test_what_is_known_of_an_image_is_archived_and_the_image_if_wanted(tmp_path: Path) -> None:
    known = ["console.log", "junit.xml", "log", "qcow2.cdx.json", "qcow2.manifest.json", "qcow2.sha256sum"]
    assert archived(run_pipeline(tmp_path, IMAGES="good"), "good") == [*known, "good.record.json"]
    outcome = run_pipeline(tmp_path, IMAGES="good|bad", ARCHIVE_IMAGES=True)
    assert archived(outcome, "good") == [*known[:3], "qcow2", *known[3:], "good.record.json"]
    assert archived(outcome, "bad") == ["console.log", "junit.xml", "log", "bad.record.json"]


def test_the_difference_to_the_build_before_is_reported(tmp_path: Path) -> None:
    assert run_pipeline(tmp_path, IMAGES="good").description == ["good: built"]
    manifest = workspace(tmp_path, "good") / "good-2026-01-31.qcow2.manifest.json"
    manifest.rename(manifest.with_name("good-2026-01-30.qcow2.manifest.json"))
    leftover = workspace(tmp_path, "good") / "old"
    leftover.touch()
    outcome = run_pipeline(tmp_path, IMAGES="good")
    assert outcome.status == 0
    told = "good: built, 1 packages added, 0 removed, 1 changed since good-2026-01-30"
    assert outcome.description == [told]
    assert outcome.details("echo") == [f"{told}\n    + new.amd64 2\n    * libexample1.amd64 1.0 -> 1.1"]
    assert not leftover.exists()
    # It is of the build before.
    assert "good-2026-01-30.qcow2.manifest.json" not in archived(outcome, "good")


def test_no_image_matches(tmp_path: Path) -> None:
    # A part of the name is not enough.
    outcome = run_pipeline(tmp_path, IMAGES="goo")
    assert outcome.status == 1
    assert outcome.details("error") == ["No image matches 'goo'. 'image-factory --list' lists the images."]
    assert outcome.calls == [["--list-json"]]


def test_an_image_that_takes_too_long_is_stopped_alone(tmp_path: Path) -> None:
    outcome = run_pipeline(tmp_path, IMAGES="slow|good", HOURS="2")
    assert outcome.status == 1
    assert outcome.details("failed") == ["out of time"]
    assert outcome.description == ["good: built", "slow: ended without a build record"]
    assert archived(outcome, "slow") == ["console.log", "log"]
    assert outcome.commands("slow")[-1] == "image-factory --cleanup"


def test_aborting_stops_the_builds_and_keeps_the_logs(tmp_path: Path) -> None:
    with pipeline(tmp_path, {"IMAGES": "slow|good"}) as process:
        wait_for((workspace(tmp_path, "slow") / "started").exists, "the build")
        (tmp_path / "agents/abort").touch()
        outcome = finished(process, tmp_path)
    assert outcome.details("failed") == ["aborted"]
    assert archived(outcome, "slow") == ["console.log", "log"]
    assert outcome.commands("slow")[-1] == "image-factory --cleanup"


def test_the_fake_records_are_as_the_schema_has_them(tmp_path: Path) -> None:
    """Parts of such a record, so that the Jenkinsfile reads what there is."""

    def loosened(schema: object) -> object:
        if isinstance(schema, dict):
            return {key: loosened(value) for key, value in schema.items() if key != "required"}
        return schema

    schema = loosened(json.loads((REPOSITORY / "data/build-record.schema.json").read_text()))
    run_pipeline(tmp_path, IMAGES="good")
    run_pipeline(tmp_path, IMAGES="good|bad")
    for image in ("good", "bad"):
        record = json.loads((workspace(tmp_path, image) / f"{image}.record.json").read_text())
        jsonschema.validate(record, schema)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ElementTree.Element:
    """What Jenkins gets of the definition."""
    home = tmp_path_factory.mktemp("home")
    program = REPOSITORY / ".venv/bin/jenkins-jobs"
    assert program.exists(), "jenkins-jobs is missing: make .venv/bin/ruff"
    # By the interpreter, as a virtual environment that was moved names another.
    python = program.with_name("python3")
    argv = [python, program, "test", "--config-xml", "-o", home / "out", JOB / "image-factory.yaml"]
    subprocess.run(argv, check=True, env={**os.environ, "HOME": str(home)}, stdin=subprocess.DEVNULL)
    assert [path.name for path in (home / "out").iterdir()] == ["image-factory"]
    return ElementTree.parse(home / "out/image-factory/config.xml").getroot()


def test_the_job_is_a_pipeline_in_the_sandbox(job: ElementTree.Element) -> None:
    assert job.tag == "flow-definition"
    assert job.findtext("definition/script", "").strip() == (JOB / "Jenkinsfile").read_text().strip()
    assert job.findtext("definition/sandbox") == "true"


def test_the_job_runs_each_night(job: ElementTree.Element) -> None:
    specifications = [element.text for element in job.iter("spec")]
    assert specifications == ["H 1 * * *"]


def test_the_job_has_the_parameters_that_the_jenkinsfile_reads(job: ElementTree.Element) -> None:
    definitions = job.find("properties/hudson.model.ParametersDefinitionProperty/parameterDefinitions")
    assert definitions is not None
    found = {element.findtext("name"): element.findtext("defaultValue") for element in definitions}
    assert found == {"IMAGES": ".*", "AGENTS": "image-factory", "HOURS": "6", "ARCHIVE_IMAGES": "false"}
    text = (JOB / "Jenkinsfile").read_text()
    assert {name for name in found if f"params.{name}" in text} == set(found)
    assert text.count("params.") == len(found) + 1  # IMAGES, once more in a message
