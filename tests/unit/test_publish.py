"""Artifacts get their checksums and names, all or none, and are uploaded."""

import dataclasses
import datetime
import hashlib
import json
import logging
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from image_factory import publish
from image_factory.base.errors import BuildError, CommandError, ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.configuration.settings import Destination, ImageSettings
from image_factory.finishing import checksum
from image_factory.model import Artifact, Build, Plan
from image_factory.outputs import planned
from image_factory.parts import carry_out
from image_factory.uploads import tries

from ..conftest import shown, state_of

DATE = datetime.date(2024, 2, 29)
RAW, QCOW2 = "x-2024-02-29.raw", "x-2024-02-29.qcow2"
SUM = ".sha256sum"
SUMS = "x-2024-02-29.SHA256SUMS"
COMPANIONS = {f"{RAW}.manifest.json", f"{QCOW2}.manifest.json", SUMS}


class Place:
    """A build with its output directory, and two artifacts that are ready to be published."""

    def __init__(self, path: Path, **settings: object) -> None:
        self.output = path / "output"
        self.work = self.output / ".image-factory-x"
        self.work.mkdir(parents=True)
        configuration = path / "own.conf"
        configuration.write_text("[x]\nlinux = /l\ninitrd = /i\n")
        self.settings: ImageSettings = Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}).image("x", {})
        self.changed: dict[str, object] = {"format": ("raw", "qcow2"), **settings}
        self.artifacts: list[Artifact] = []
        for image_format in ("raw", "qcow2"):
            artifact = Artifact(self.work / f"x-2024-02-29.{image_format}", image_format, 4096)
            artifact.path.write_text(f"new {image_format}\n")
            self.artifacts.append(checksum.add_sha256(artifact))

    def plan(self, *destinations: Destination, command: tuple[str, ...] = ()) -> Plan:
        settings = ImageSettings(**{**self.settings.__dict__, **self.changed, "post_build_command": command})
        return Plan("x", settings, DATE, self.output, {"raw": destinations, "qcow2": destinations})

    def build(self) -> Build:
        return Build(self.plan(), self.work, "image-factory-x-00000000")

    def give_companions(self) -> None:
        """Give each artifact a file of its own, and both one of the build."""
        for number, artifact in enumerate(self.artifacts):
            names = (f"{artifact.path.name}.manifest.json", SUMS)
            for name in names:
                (self.work / name).write_text(f"new {name}\n")
            companions = tuple((name, hashlib.sha256((self.work / name).read_bytes()).hexdigest()) for name in names)
            self.artifacts[number] = dataclasses.replace(artifact, companions=companions)

    def published(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.output.iterdir() if path.is_file()}

    def older(self) -> dict[str, str]:
        files = {name: f"older {name}\n" for name in (RAW, RAW + SUM, QCOW2, QCOW2 + SUM)}
        for name, text in files.items():
            (self.output / name).write_text(text)
        return files


def build_of(plan: Plan) -> Build:
    return Build(plan, plan.work_path, "image-factory-x-00000000")


def upload(plan: Plan, artifacts: list[Artifact]) -> None:
    build = build_of(plan)
    carry_out(state_of(build, artifacts), publish.upload_steps(build))


def post_build(plan: Plan, artifacts: list[Artifact]) -> None:
    build = build_of(plan)
    carry_out(state_of(build, artifacts), publish.post_build_steps(build))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# Checksums.


def test_checksum_is_one_that_sha256sum_reads(place: Place) -> None:
    for artifact in place.artifacts:
        digest = hashlib.sha256(artifact.path.read_bytes()).hexdigest()
        assert artifact.sha256 == digest
        assert artifact.checksum_path.name == artifact.path.name + SUM
        assert artifact.checksum_path.read_text() == f"{digest}  {artifact.path.name}\n"
        subprocess.run(["sha256sum", "--check", "--strict", artifact.checksum_path.name], cwd=place.work, check=True)


def test_checksum_of_an_empty_file_and_of_one_with_holes(place: Place) -> None:
    for size in (0, 33 << 20):
        with place.artifacts[0].path.open("wb") as file:
            file.truncate(size)
        found = checksum.add_sha256(place.artifacts[0])
        done = subprocess.run(["sha256sum", found.path], capture_output=True, text=True, check=True)
        assert found.sha256 == done.stdout.split()[0]


def test_checksums_check_where_they_are_published(place: Place) -> None:
    publish.move_into_place(place.build(), place.artifacts)
    subprocess.run(["sha256sum", "--check", "--strict", RAW + SUM, QCOW2 + SUM], cwd=place.output, check=True)


def test_other_checksums_belong_to_the_image(tmp_path: Path) -> None:
    """They are published with it, as was announced, and gone with the next build that makes none."""
    others = [QCOW2 + ".sha512sum", QCOW2 + ".md5sum"]
    place = Place(tmp_path, checksums=("md5", "sha256", "sha512"))
    [_, announced] = publish.published(place.plan())
    assert [name for name, _ in announced.companions] == others
    sha256 = place.artifacts[1]
    place.artifacts[1] = checksum.add_more(sha256, ["sha512", "md5"])
    publish.move_into_place(place.build(), place.artifacts)
    for name in others:
        program = name.rpartition(".")[2]
        subprocess.run([program, "--check", "--strict", name], cwd=place.output, check=True)
    again = Place(tmp_path / "again").artifacts[1]
    again.path.rename(sha256.path)
    again.checksum_path.rename(sha256.checksum_path)
    publish.move_into_place(place.build(), [sha256])
    assert not any((place.output / name).exists() for name in others)


# Into place.


def test_all_are_published(place: Place) -> None:
    published = publish.move_into_place(place.build(), place.artifacts)
    assert [artifact.path for artifact in published] == [place.output / RAW, place.output / QCOW2]
    assert [artifact.sha256 for artifact in published] == [artifact.sha256 for artifact in place.artifacts]
    assert set(place.published()) == {RAW, RAW + SUM, QCOW2, QCOW2 + SUM}
    assert place.published()[RAW] == "new raw\n"
    assert list(place.work.iterdir()) == []


def test_older_files_are_replaced(place: Place) -> None:
    before = place.older()
    publish.move_into_place(place.build(), place.artifacts)
    after = place.published()
    assert set(after) == set(before)
    assert not set(after.values()) & set(before.values())


def test_reader_of_an_older_file_keeps_it(place: Place) -> None:
    place.older()
    with (place.output / RAW).open() as reader:
        publish.move_into_place(place.build(), place.artifacts)
        assert reader.read() == f"older {RAW}\n"


def test_older_link_is_replaced_itself(place: Place) -> None:
    (place.output / "target").write_text("untouched\n")
    (place.output / RAW).symlink_to("target")
    (place.output / QCOW2).symlink_to("nowhere")
    publish.move_into_place(place.build(), place.artifacts)
    assert not (place.output / RAW).is_symlink()
    assert not (place.output / QCOW2).is_symlink()
    assert (place.output / "target").read_text() == "untouched\n"


@pytest.mark.parametrize("name", [RAW, RAW + SUM, QCOW2, QCOW2 + SUM])
@pytest.mark.parametrize("older", [False, True])
def test_none_is_published_when_one_can_not_be(place: Place, name: str, older: bool) -> None:
    """A directory is in the way of one."""
    before = place.older() if older else {}
    before.pop(name, None)
    (place.output / name).unlink(missing_ok=True)
    (place.output / name).mkdir()
    (place.output / name / "file").touch()
    with pytest.raises(BuildError) as caught:
        publish.move_into_place(place.build(), place.artifacts)
    assert caught.value.message == f"Can't publish {place.output / name}: Is a directory."
    assert place.published() == before
    assert (place.output / name / "file").exists()


def test_links_come_back_when_one_can_not_be_published(place: Place) -> None:
    (place.output / RAW).symlink_to("nowhere")
    (place.output / QCOW2).mkdir()
    with pytest.raises(BuildError):
        publish.move_into_place(place.build(), place.artifacts)
    assert os.readlink(place.output / RAW) == "nowhere"


def test_artifact_that_has_gone(place: Place) -> None:
    before = place.older()
    place.artifacts[1].path.unlink()
    with pytest.raises(BuildError, match=f"Can't publish .*/{QCOW2}: No such file or directory"):
        publish.move_into_place(place.build(), place.artifacts)
    assert place.published() == before


# What belongs to an artifact.


def test_companions_are_published_with_the_artifacts(place: Place) -> None:
    place.give_companions()
    older = place.older()
    (place.output / SUMS).write_text("older\n")
    published = publish.move_into_place(place.build(), place.artifacts)
    assert set(place.published()) == {*older, *COMPANIONS}
    assert place.published()[SUMS] == f"new {SUMS}\n"
    assert published[0].others == tuple(place.output / name for name in (RAW + SUM, f"{RAW}.manifest.json", SUMS))
    assert not [name for name in os.listdir(place.work) if not name.startswith("older-")]


@pytest.mark.parametrize("name", sorted(COMPANIONS))
def test_none_is_published_when_a_companion_can_not_be(place: Place, name: str) -> None:
    place.give_companions()
    before = place.older()
    (place.output / name).mkdir()
    with pytest.raises(BuildError, match=f"Can't publish .*{name}: Is a directory"):
        publish.move_into_place(place.build(), place.artifacts)
    assert place.published() == before


def test_companions_of_a_replaced_artifact_go_with_it(place: Place) -> None:
    """They would say of the new one what is not true."""
    stale = {f"{RAW}.manifest.json", f"{QCOW2}.cdx.json", SUMS, f"{SUMS}.asc"}
    others = {"x-2024-02-28.raw.manifest.json", "y.SHA256SUMS", f"{RAW}.other"}
    for name in stale | others:
        (place.output / name).write_text("older\n")
    publish.move_into_place(place.build(), place.artifacts)
    assert set(place.published()) == {RAW, RAW + SUM, QCOW2, QCOW2 + SUM, *others}


def test_companion_that_can_not_be_removed_is_told(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    (place.output / SUMS).mkdir()
    publish.move_into_place(place.build(), place.artifacts)
    assert caplog.messages[-1].startswith(f"{SUMS} is of an older build, and can't be removed: Is a directory")


def test_companions_are_uploaded_and_verified_after_the_checksum(
    place: Place, tmp_path: Path, recorded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    place.give_companions()
    destination = Destination("up", "rsync", f"{there}/", (), ())
    artifacts = publish.move_into_place(place.build(), place.artifacts)
    upload(place.plan(destination), artifacts)
    assert calls(recorded, place.output) == [
        ["rsync", *OPTIONS, name, name + SUM, f"{name}.manifest.json", SUMS, f"{there}/"] for name in (RAW, QCOW2)
    ]
    assert {path.name for path in there.iterdir()} == {RAW, RAW + SUM, QCOW2, QCOW2 + SUM, *COMPANIONS}
    # One that another is in the place of there is sent again, and refused in the end.
    frozen = Destination("up", "rsync", f"{there}/", ("--ignore-existing",), ())
    (there / SUMS).write_text("another\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tries, "PAUSE_SECONDS", ())
        with pytest.raises(BuildError, match=f"{SUMS} has another SHA-256 there"):
            upload(place.plan(frozen), artifacts)


# Uploads; test_rsync.py has those that fail.

# What the user's arguments come after.
OPTIONS = ["--info=progress2", f"--timeout={tries.STALL_SECONDS}", "--delay-updates"]

# Writes down where it runs and what it is given, then does what the real one does.
RECORDER = """#!/usr/bin/python3
import json, os, sys
with open({recorded!r}, "a") as file:
    print(json.dumps([os.getcwd(), {name!r}, *sys.argv[1:]]), file=file)
if {real!r}:
    os.execv({real!r}, [{name!r}, *sys.argv[1:]])
"""


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands ``rsync`` (the real one) and ``tell`` that write themselves down in this file."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, real in (("rsync", "/usr/bin/rsync"), ("tell", "")):
        (programs / name).write_text(RECORDER.format(recorded=str(tmp_path / "recorded"), name=name, real=real))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path / "recorded"


def calls(recorded: Path, directory: Path) -> list[list[str]]:
    """Return the calls, all of which were made in *directory*."""
    found = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert {call[0] for call in found} == {str(directory)}
    return [call[1:] for call in found]


def test_uploads_in_their_order_with_the_real_rsync(place: Place, tmp_path: Path, recorded: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second place"
    first.mkdir()
    second.mkdir()
    destinations = (
        Destination("first", "rsync", f"{first}/", ("--chmod=u=rw,go=", "-q"), (("tell", "1 a", "$x"), ("tell", "1b"))),
        Destination("second", "rsync", f"{second}/", (), (("tell", "2"),)),
    )
    artifacts = publish.move_into_place(place.build(), place.artifacts)
    upload(place.plan(*destinations), artifacts)
    assert calls(recorded, place.output) == [
        ["rsync", *OPTIONS, "--chmod=u=rw,go=", "-q", RAW, RAW + SUM, f"{first}/"],
        ["tell", "1 a", "$x"],
        ["tell", "1b"],
        ["rsync", *OPTIONS, "--chmod=u=rw,go=", "-q", QCOW2, QCOW2 + SUM, f"{first}/"],
        ["tell", "1 a", "$x"],
        ["tell", "1b"],
        ["rsync", *OPTIONS, RAW, RAW + SUM, f"{second}/"],
        ["tell", "2"],
        ["rsync", *OPTIONS, QCOW2, QCOW2 + SUM, f"{second}/"],
        ["tell", "2"],
    ]
    for directory in (first, second):
        assert {path.name for path in directory.iterdir()} == {RAW, RAW + SUM, QCOW2, QCOW2 + SUM}
        subprocess.run(["sha256sum", "--check", RAW + SUM, QCOW2 + SUM], cwd=directory, check=True)
    assert (first / RAW).stat().st_mode & 0o777 == 0o600


def test_commands_are_those_that_a_dry_run_shows(place: Place) -> None:
    destination = Destination("up", "rsync", "host:/srv/", ("-e", "ssh -p 2"), (("tell", RAW),))
    sums = f"cd /srv/ && sha256sum {RAW} {RAW}{SUM} || shasum -a 256 {RAW} {RAW}{SUM}"
    commands = [
        ["rsync", *OPTIONS, "-e", "ssh -p 2", RAW, RAW + SUM, "host:/srv/"],
        ["ssh", "-p", "2", "host", sums],
        ["tell", RAW],
    ]
    build = build_of(place.plan(destination))
    found = shown(build, publish.upload_steps(build))
    assert list(found) == [f"Uploading {RAW} to up", f"Uploading {QCOW2} to up"]
    assert found[f"Uploading {RAW} to up"] == commands


def test_artifact_that_is_only_kept_is_not_uploaded(place: Place, recorded: Path) -> None:
    place.changed = {"format": ("qcow2",), "keep_raw": True}
    build = build_of(place.plan(Destination("up", "rsync", "/srv/", (), ()), command=("tell",)))
    kept, other = reversed(planned(build.plan, place.output))
    assert (kept.format, kept.upload, other.format, other.upload) == ("raw", False, "qcow2", True)
    assert publish._uploads(build.plan, [kept]) == []
    assert list(shown(build, publish.upload_steps(build))) == [f"Uploading {QCOW2} to up"]
    assert [*shown(build, publish.post_build_steps(build)).values()] == [[["tell", QCOW2]]]
    assert not recorded.exists()


def test_destination_gets_the_formats_that_it_is_for(place: Place) -> None:
    some = Destination("some", "rsync", "/srv/", (), (), formats=("qcow2",))
    build = build_of(place.plan(some, Destination("all", "rsync", "/srv/", (), ())))
    assert list(shown(build, publish.upload_steps(build))) == [
        f"Uploading {QCOW2} to some", f"Uploading {RAW} to all", f"Uploading {QCOW2} to all",
    ]  # fmt: skip
    publish.check(build.plan)
    none = Destination("none", "rsync", "/srv/", (), (), formats=("qcow2",))
    place.changed = {"format": ("raw",)}
    with pytest.raises(ConfigurationError) as caught:
        publish.check(place.plan(none))
    assert caught.value.message == "[none] upload-formats: [x] has none of them."
    assert caught.value.hint == "Its format is raw."


def test_upload_that_fails_does_not_stop_the_others(place: Place, tmp_path: Path, recorded: Path) -> None:
    """What is published stays, and the other destinations are served, each with its commands."""
    (tmp_path / "there").mkdir()
    destinations = (
        Destination("first", "rsync", f"{tmp_path}/absent/deep/", (), (("tell", "never"),)),
        Destination("second", "rsync", f"{tmp_path}/there/", (), (("tell", "2"),)),
    )
    artifacts = publish.move_into_place(place.build(), place.artifacts)
    with pytest.raises(BuildError) as caught:
        upload(place.plan(*destinations), artifacts)
    assert caught.value.message.startswith(f"Uploading {RAW} to first failed: rsync: ")
    assert caught.value.message.endswith("No such file or directory (2)")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("Make the directory there, or mend upload_target. To upload it by hand, in ")
    assert caught.value.exit_status == 1
    called = calls(recorded, place.output)
    assert [call[0] for call in called] == ["rsync", "rsync", "tell", "rsync", "tell"]
    assert ["tell", "never"] not in called
    for directory in (place.output, tmp_path / "there"):
        assert {path.name for path in directory.iterdir() if path.is_file()} == {RAW, RAW + SUM, QCOW2, QCOW2 + SUM}


def test_login_that_is_gone_when_it_is_needed(place: Place, tmp_path: Path) -> None:
    """It was there when it was checked; the other destinations are served."""
    (tmp_path / "there").mkdir()
    login = tmp_path / "login"
    web = Destination("web", "http", "https://127.0.0.1:1/", (), (), credentials=login, index="yes")
    artifacts = publish.move_into_place(place.build(), place.artifacts)
    with pytest.raises(BuildError) as caught:
        upload(place.plan(web, Destination("there", "rsync", f"{tmp_path}/there/", (), ())), artifacts)
    assert caught.value.message == (
        f"Uploading {RAW} to web failed: [web] upload-credentials: {login} is no text that can be read."
    )
    assert {path.name for path in (tmp_path / "there").iterdir()} == {RAW, RAW + SUM, QCOW2, QCOW2 + SUM}


def test_each_destination_that_fails_is_named(place: Place, tmp_path: Path) -> None:
    destinations = (
        Destination("first", "rsync", f"{tmp_path}/absent/deep/", (), ()),
        Destination("second", "rsync", f"{tmp_path}/", (), (("sh", "-c", "echo refused >&2; exit 9"),)),
    )
    artifacts = publish.move_into_place(place.build(), place.artifacts)
    with pytest.raises(BuildError) as caught:
        upload(place.plan(*destinations), artifacts)
    first, second = caught.value.message.split("; ")
    assert first.startswith(f"Uploading {RAW} to first failed: ")
    assert second == f"Uploading {RAW} to second failed: sh failed with status 9: refused"
    assert caught.value.hint is not None
    assert f"{RAW} to first: Make the directory there" in caught.value.hint
    assert f"{RAW} to second: The command was: sh -c" in caught.value.hint


def test_command_after_an_upload_that_fails_ends_what_follows_there(
    place: Place, tmp_path: Path, recorded: Path
) -> None:
    (tmp_path / "there").mkdir()
    commands = (("sh", "-c", "echo refused >&2; exit 9"), ("tell", "never"))
    destination = Destination("up", "rsync", f"{tmp_path}/there/", (), commands)
    artifacts = publish.move_into_place(place.build(), place.artifacts)
    with pytest.raises(BuildError, match="sh failed with status 9: refused"):
        upload(place.plan(destination), artifacts)
    assert [call[0] for call in calls(recorded, place.output)] == ["rsync"]


def test_post_build_command(place: Place, recorded: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="image-factory")
    plan = place.plan(command=("tell", "It is there"))
    artifacts = publish.move_into_place(place.build(), place.artifacts)
    post_build(plan, artifacts)
    assert calls(recorded, place.output) == [["tell", "It is there", RAW, QCOW2]]
    assert f"Running: {shlex.join(['tell', 'It is there', RAW, QCOW2])}" in caplog.messages


def test_first_argument_of_the_post_build_command_is_the_image(place: Place) -> None:
    plan = place.plan(command=("sh", "-c", 'test -f "$1" && sha256sum --check "$1.sha256sum"', "sh"))
    artifacts = publish.move_into_place(place.build(), place.artifacts)
    post_build(plan, artifacts)


def test_no_post_build_command(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="image-factory")
    assert list(publish.post_build_steps(place.build())) == []
    post_build(place.plan(), place.artifacts)
    assert caplog.messages == []


def test_post_build_command_that_fails(place: Place) -> None:
    with pytest.raises(CommandError):
        post_build(place.plan(command=("false",)), place.artifacts)


# Killed while it publishes.


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("renames", range(6))
def test_what_a_killed_build_has_published_is_taken_back(
    place: Place, monkeypatch: pytest.MonkeyPatch, older: bool, renames: int
) -> None:
    before = place.older() if older else {}
    real, count = os.replace, iter(range(100))

    class Killed(BaseException):
        pass

    def replace(source: Path, target: Path) -> None:
        if next(count) >= renames:
            # Nothing takes place any more.
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if renames < 5:
            with pytest.raises(Killed):
                publish.move_into_place(place.build(), place.artifacts)
        else:
            publish.move_into_place(place.build(), place.artifacts)
    monkeypatch.undo()
    publish.take_back(place.work)
    if renames < 5:
        assert place.published() == before
    else:
        assert place.published()[RAW] == "new raw\n"
    publish.take_back(place.work)
