"""How far a build has come: what is written down, and what is made of a file that is not as it should be.

integration/test_resume.py goes on with real builds.
"""

import dataclasses
import datetime
import json
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_factory import checkpoint, outputs, pipeline, workspace
from image_factory.base import events, files
from image_factory.base.errors import ConfigurationError
from image_factory.checkpoint import Checkpoint, Reached
from image_factory.configuration.files import Configuration
from image_factory.model import READ_ONLY_NAME, Artifact, Build, Plan

from ..conftest import state_of


def make_plan(directory: Path, extra: str = "") -> Plan:
    (directory / "a.cfg").write_text("answers")
    configuration = directory / "image-factory.conf"
    configuration.write_text(f"[x]\nlinux = {directory}/linux\ninitrd = /i\npreseed = {directory}/a.cfg\n{extra}")
    settings = Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}).image("x", {})
    return Plan("x", settings, datetime.date(2026, 1, 31), directory, {})


def build_in(directory: Path, extra: str = "") -> Build:
    """Return a build whose disk is installed."""
    plan = make_plan(directory, extra)
    plan.work_path.mkdir(exist_ok=True)
    build = Build(plan, plan.work_path, "vm")
    build.disk_path.write_text("disk")
    return build


def begin(build: Build) -> Checkpoint:
    used = checkpoint.InputsUsed()
    (build.plan.output_dir / "linux").write_text("kernel")
    for key, path in (("linux", build.plan.output_dir / "linux"), ("preseed", build.plan.output_dir / "a.cfg")):
        used.notice(events.InputUsed(key, str(path), path))
    used.notice(events.InputUsed("installer-image", "http://tree", None, "somebody"))
    used.notice(events.VirtTypeChosen("qemu"))
    return checkpoint.begin(build, used)


def test_what_is_to_be_read_only_again_is_known_to_who_goes_on(tmp_path: Path) -> None:
    """Also when that one fails, too."""
    build = build_in(tmp_path)
    begin(build).write()
    record = build.directory / READ_ONLY_NAME
    record.write_text("[]")
    with pytest.raises(ZeroDivisionError), workspace.opened(build.plan, resume=True):
        assert record.exists()
        raise ZeroDivisionError
    assert record.exists()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    build = build_in(tmp_path)
    done = begin(build)
    done.reach(Reached.CLEANED)
    done.serve(["there"])
    assert checkpoint.read(build.directory) == checkpoint.resumed(build.plan, build.directory)
    found = checkpoint.resumed(build.plan, build.directory)
    assert (found.stage, found.date, found.virt_type) == ("cleaned", "2026-01-31", "qemu")
    assert found.has_served(["there"])
    assert not found.has_served(["elsewhere"])


def test_inputs_that_were_used(tmp_path: Path) -> None:
    build = build_in(tmp_path)
    begin(build)
    linux, answers = tmp_path / "linux", tmp_path / "a.cfg"
    found = checkpoint.resumed(build.plan, build.directory)
    tree = events.InputUsed("installer-image", "http://tree", None, "somebody")
    unchanged = [events.InputUsed("linux", str(linux), linux), events.InputUsed("preseed", str(answers), answers), tree]
    assert list(found.inputs_used(build.plan)) == unchanged
    linux.write_text("another kernel")
    assert next(iter(found.inputs_used(build.plan))) == events.InputUsed("linux", str(linux), None)
    linux.unlink()
    assert next(iter(found.inputs_used(build.plan))) == events.InputUsed("linux", str(linux), None)


def test_answers_that_change_during_the_installation(tmp_path: Path) -> None:
    """What counts is what the installer got."""
    build = build_in(tmp_path)
    copy = tmp_path / "copy.cfg"
    copy.write_text("answers")
    used = checkpoint.InputsUsed()
    used.notice(events.InputUsed("preseed", str(tmp_path / "a.cfg"), copy))
    (tmp_path / "a.cfg").write_text("other answers")
    checkpoint.begin(build, used)
    with pytest.raises(ConfigurationError, match=r"^\[x\] preseed changed since the disk was installed\.$"):
        checkpoint.resumed(build.plan, build.directory)
    (tmp_path / "a.cfg").write_text("answers")
    checkpoint.resumed(build.plan, build.directory)


def test_disk_is_gone(tmp_path: Path) -> None:
    build = build_in(tmp_path)
    begin(build)
    build.disk_path.unlink()
    assert checkpoint.read(build.directory) is None
    with pytest.raises(ConfigurationError, match="nothing of x to resume"):
        checkpoint.resumed(build.plan, build.directory)


@contextmanager
def no_room() -> Iterator[None]:
    """Have no file of this process grow inside."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)


def test_file_that_can_not_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The build goes on; but a raw image, which is the disk, can't be gone on from."""
    build = build_in(tmp_path)
    done = begin(build)
    before = sorted(build.directory.iterdir())
    with no_room():
        done.reach(Reached.CLEANED)
        assert "--resume will not know how far the build has come: File too large" in caplog.messages[-1]
        assert sorted(build.directory.iterdir()) == before
        assert checkpoint.read(build.directory) is not None
        with pytest.raises(OSError, match="File too large"):
            done.write()
        done.reach(Reached.PUBLISHED, [Artifact(tmp_path / "x.raw", "raw", 1, True)])
    assert checkpoint.read(build.directory) is None


def publish(build: Build, path: Path) -> None:
    """Have *path* be what the build has published."""
    path.write_text("x")
    digest = files.digest_of(path)
    path.with_name(f"{path.name}.sha256sum").write_text(f"{digest}  {path.name}\n")
    companion = path.with_name("x.qcow2.manifest.json")
    companion.write_text("{}")
    companions = ((companion.name, files.digest_of(companion)),)
    begin(build).reach(Reached.PUBLISHED, [Artifact(path, "qcow2", 1, True, digest, companions)])


@pytest.mark.parametrize("links", [True, False])
def test_raw_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """It is a second name of the disk, or a copy on a filesystem that has no second names."""

    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", link)
    build = build_in(tmp_path)
    done = begin(build)
    [step] = outputs.steps(build)
    [artifact] = step.run(state_of(build)).artifacts
    assert artifact.path.read_text() == "disk"
    assert artifact.path.samefile(build.disk_path) == links
    done.reach(Reached.CONVERTED, [dataclasses.replace(artifact, sha256="0" * 64)])
    done.reach(Reached.PUBLISHED, [dataclasses.replace(artifact, sha256="0" * 64)])
    assert not build.disk_path.exists()
    assert checkpoint.read(build.directory) is not None


@pytest.mark.parametrize(
    "change", ["format = qcow2", "compression = none", "keep-raw = yes", "manifest = yes", "sign-key = a"]
)
def test_other_artifacts_are_asked_for(tmp_path: Path, change: str) -> None:
    build = build_in(tmp_path)
    path = tmp_path / "x.qcow2"
    publish(build, path)
    assert checkpoint.resumed(build.plan, build.directory).stage == "published"
    assert checkpoint.resumed(build_in(tmp_path, change).plan, build.directory).stage == "cleaned"
    build.disk_path.unlink()
    key = change.partition(" ")[0].replace("-", "_")
    with pytest.raises(ConfigurationError, match=f"{key} changed since the images were made; its disk is gone"):
        checkpoint.resumed(make_plan(tmp_path, change), build.directory)


@pytest.mark.parametrize("change", ["seal = yes", "seal-only = logs", "seal-skip = logs, mail"])
def test_sealing_has_changed(tmp_path: Path, change: str) -> None:
    """Before the disk was cleaned that is no matter, and after that it can't be undone."""
    build = build_in(tmp_path)
    done = begin(build)
    changed = make_plan(tmp_path, change)
    assert checkpoint.resumed(changed, build.directory).stage == "installed"
    for stage in (Reached.CLEANED, Reached.CONVERTED, Reached.PUBLISHED):
        done.reach(stage)
        with pytest.raises(ConfigurationError) as caught:
            checkpoint.resumed(changed, build.directory)
        key = change.partition(" ")[0]
        assert caught.value.message == f"[x] {key} changed since the disk was cleaned."


@pytest.mark.parametrize("key", ["copy", "first-boot"])
def test_what_is_copied_has_changed(tmp_path: Path, key: str) -> None:
    """The disk has what the files had; that they are gone is a change, too."""
    file = tmp_path / "file"
    file.write_text("#!/bin/sh\n")
    text = f"copy = {file}:/etc/" if key == "copy" else f"first-boot = {file}"
    build = build_in(tmp_path, text)
    done = begin(build)
    done.reach(Reached.CLEANED)
    assert checkpoint.resumed(make_plan(tmp_path, text), build.directory).stage == "cleaned"
    for change in (lambda: file.write_text("#!/bin/sh\ntrue\n"), file.unlink):
        change()
        with pytest.raises(ConfigurationError) as caught:
            checkpoint.resumed(make_plan(tmp_path, text), build.directory)
        assert caught.value.message == f"[x] {key} changed since the disk was cleaned."


@pytest.mark.parametrize("damage", ["image", "checksum", "manifest", "no image", "no checksum", "no manifest"])
def test_artifact_that_is_not_as_it_was(tmp_path: Path, damage: str) -> None:
    build = build_in(tmp_path)
    path = tmp_path / "x.qcow2"
    publish(build, path)
    suffix = {"image": "", "checksum": ".sha256sum", "manifest": ".manifest.json"}[damage.split()[-1]]
    changed = path.with_name(f"x.qcow2{suffix}")
    changed.unlink() if damage.startswith("no ") else changed.write_text("damaged")
    assert checkpoint.resumed(build.plan, build.directory).stage == "cleaned"


def test_what_is_kept_for_a_manifest(tmp_path: Path) -> None:
    build = build_in(tmp_path, "manifest = yes")
    done = begin(build)
    assert "inventory.json" in done.kept
    artifact = Artifact(build.directory / "x.raw", "raw", 1, True, "0" * 64, (("x.raw.cdx.json", "1" * 64),))
    done.reach(Reached.CONVERTED, [artifact])
    assert done.kept[2:] == ["inventory.json", "x.raw", "x.raw.sha256sum", "x.raw.cdx.json"]
    found = checkpoint.read(build.directory)
    assert found is not None
    assert found.artifacts == [artifact]


def test_checkpoint_of_a_version_that_knew_no_companions(tmp_path: Path) -> None:
    build = build_in(tmp_path)
    publish(build, tmp_path / "x.qcow2")
    file = build.directory / checkpoint.FILE_NAME
    texts = json.loads(file.read_text())
    del texts["artifacts"][0]["companions"]
    file.write_text(json.dumps(texts))
    assert checkpoint.resumed(build.plan, build.directory).stage == "published"


@pytest.mark.parametrize(
    "companions", [1, [1], ["ab"], [["a"]], [["a", 1]], [["../a", "b"]], [["a", "b", "c"]], {"a": 1}]
)
def test_companions_that_were_edited(tmp_path: Path, companions: object) -> None:
    build = build_in(tmp_path)
    publish(build, tmp_path / "x.qcow2")
    file = build.directory / checkpoint.FILE_NAME
    texts = json.loads(file.read_text())
    texts["artifacts"][0]["companions"] = companions
    file.write_text(json.dumps(texts))
    found = checkpoint.read(build.directory)
    assert found is None or checkpoint.resumed(build.plan, build.directory).stage == "cleaned"


def test_answer_file_that_is_left_out(tmp_path: Path) -> None:
    build = build_in(tmp_path)
    begin(build)
    text = (tmp_path / "image-factory.conf").read_text()
    (tmp_path / "image-factory.conf").write_text(re.sub("preseed.*", "", text))
    settings = Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "image-factory.conf")}).image("x", {})
    with pytest.raises(ConfigurationError, match="preseed changed since the disk was installed"):
        checkpoint.resumed(dataclasses.replace(build.plan, settings=settings), build.directory)


def test_answer_file_that_is_gone(tmp_path: Path) -> None:
    """Its copy is there until the build ends; without the file itself there is nothing to compare later."""
    build = build_in(tmp_path)
    copy = tmp_path / "copy.cfg"
    (tmp_path / "a.cfg").rename(copy)
    used = checkpoint.InputsUsed()
    used.notice(events.InputUsed("preseed", str(tmp_path / "a.cfg"), copy))
    checkpoint.begin(build, used)
    assert checkpoint.read(build.directory)


def test_further_files_of_the_answers(tmp_path: Path) -> None:
    """What the installer got counts, not what is there when the installation ends."""
    (tmp_path / "b").write_text("b")
    build = build_in(tmp_path, f"answer-files = {tmp_path}/b:c")
    copy = tmp_path / "copy"
    copy.write_text("b")
    used = checkpoint.InputsUsed()
    used.notice(events.InputUsed("answer-files", str(tmp_path / "b"), copy))
    (tmp_path / "b").write_text("changed")
    found = checkpoint.begin(build, used)
    with pytest.raises(ConfigurationError, match="answer-files changed since the disk was installed"):
        checkpoint.resumed(build.plan, build.directory)
    (tmp_path / "b").write_text("b")
    copy.unlink()
    checkpoint.resumed(build.plan, build.directory)
    assert [event.path for event in found.inputs_used(build.plan)] == [tmp_path / "b"]


def test_machine_that_was_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What QEMU wrote may not have reached the disk; what has the right checksum has."""
    build = build_in(tmp_path)
    begin(build)
    (tmp_path / "boot_id").write_text("another")
    monkeypatch.setattr(checkpoint, "_BOOT_ID", tmp_path / "boot_id")
    with pytest.raises(ConfigurationError, match=r"this machine was started anew since the installation"):
        checkpoint.resumed(build.plan, build.directory)
    monkeypatch.undo()
    publish(build, tmp_path / "x.qcow2")
    monkeypatch.setattr(checkpoint, "_BOOT_ID", tmp_path / "boot_id")
    assert checkpoint.resumed(build.plan, build.directory).stage == "published"


def test_disk_that_is_the_published_image(tmp_path: Path) -> None:
    """A build was killed between the publishing and the note of it; someone may have booted the image."""
    build = build_in(tmp_path)
    begin(build).reach(Reached.CLEANED)
    os.link(build.disk_path, build.directory / "x.raw")
    checkpoint.resumed(build.plan, build.directory)
    (build.directory / "x.raw").rename(tmp_path / "x.raw")
    with pytest.raises(ConfigurationError, match="its disk is the published image, which may have been used"):
        checkpoint.resumed(build.plan, build.directory)


def test_file_is_its_owners(tmp_path: Path) -> None:
    """URIs may have a password, and others get through root's working directory."""
    build = build_in(tmp_path)
    begin(build)
    path = build.directory / checkpoint.FILE_NAME
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "elsewhere").write_text(path.read_text())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert checkpoint.read(build.directory) is None
    path.unlink()
    os.mkfifo(path)
    assert checkpoint.read(build.directory) is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["inputs", "outputs", "date", "virt_type", "used", "stage", "artifacts", "uploaded", "kept", "name", "another"]


@given(key=st.sampled_from(KEYS), value=values)
def test_damaged_file(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    """It is as if there were none, or it is refused, or it does no harm."""
    directory = tmp_path_factory.mktemp("damaged")
    build = build_in(directory)
    begin(build)
    path = build.directory / checkpoint.FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    try:
        found = checkpoint.resumed(build.plan, build.directory)
    except ConfigurationError:
        return
    assert all(type(name) is str and "/" not in name for name in found.kept)
    found.has_served(["x"])
    list(found.inputs_used(build.plan))


def test_space_that_a_failed_build_takes(tmp_path: Path) -> None:
    """A new build removes it first, so it counts as free."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10M", "tmpfs", tmp_path], check=True)
    try:
        plan = make_plan(tmp_path, "image-size = 9M")
        (tmp_path / "something").write_bytes(bytes(5 << 20))
        with pytest.raises(ConfigurationError, match="the disk may grow to 9"):
            pipeline._check_space(plan)
        plan.work_path.mkdir()
        (tmp_path / "something").rename(plan.work_path / "disk.raw")
        pipeline._check_space(plan)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
