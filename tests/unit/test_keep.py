"""Older builds go when a newer one is good: all that they made, and nothing else."""

import contextlib
import datetime
import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from image_factory import keep, publish
from image_factory.base.errors import BuildError
from image_factory.configuration.files import Configuration
from image_factory.finishing import checksum
from image_factory.model import Artifact, Build, Plan
from image_factory.parts import carry_out

from ..conftest import shown, state_of

STEP = "Removing older builds"
SUFFIXES = (".raw", ".raw.sha256sum", ".raw.note", ".log", ".console.log", ".junit.xml", ".build.json")


class Place:
    """A directory in which images are built."""

    def __init__(self, path: Path) -> None:
        self.output = path / "output"
        self.output.mkdir()
        self._configuration = path / "own.conf"

    def plan(self, day: int, image: str = "x", **keys: str) -> Plan:
        texts = {"linux": "/l", "initrd": "/i", "log-file": "yes", "keep": "2"} | keys
        self._configuration.write_text(f"[{image}]\n" + "".join(f"{key} = {text}\n" for key, text in texts.items()))
        configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(self._configuration)})
        date = datetime.date(2026, 1, day)
        name = texts.get("image-name", "${image}-${date}")
        name = name.replace("${image}", image).replace("${date}", str(date)).replace("${ident}", f"{day:010x}")
        return Plan(image, configuration.image(image, {}), date, self.output, {"raw": ()}, name=name)

    def build(
        self,
        day: int,
        image: str = "x",
        *,
        fails: str = "",
        before: Callable[[], None] = lambda: None,
        record: str | None = None,
        **keys: str,
    ) -> None:
        """Do what a build does with its files; *before* is called before older ones are removed."""
        plan = self.plan(day, image, **keys)
        work = plan.work_path
        work.mkdir()
        with contextlib.suppress(BuildError), keep.noting() as made:
            try:
                made.begin(plan, self.output / record if record else None, resume=False)
                assert plan.log_path is not None
                plan.log_path.write_text(f"log of {plan.base_name}, {fails}\n")
                plan.console_path.write_text("console\n")
                if fails == "early":
                    raise BuildError("It fails.")
                (work / f"{plan.base_name}.raw.note").write_text("note\n")
                digest = hashlib.sha256(b"note\n").hexdigest()
                path = work / f"{plan.base_name}.raw"
                path.write_text(f"image {plan.base_name}\n")
                artifact = checksum.add_sha256(
                    Artifact(path, "raw", 4096, True, None, ((f"{path.name}.note", digest),))
                )
                build = Build(plan, work, "vm")
                artifacts = publish.move_into_place(build, [artifact])
                plan.junit_path.write_text("<x/>\n")
                before()
                if fails:
                    raise BuildError("It fails.")
                carry_out(state_of(build, artifacts), keep.steps(build))
                if record:
                    (self.output / record).write_text("{}\n")
            finally:
                work.rmdir()

    def names(self) -> set[str]:
        return {path.name for path in self.output.iterdir()}


@pytest.fixture
def place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Place:
    caplog.set_level(logging.INFO, logger="image-factory")
    return Place(tmp_path)


def of_days(*days: int, image: str = "x") -> set[str]:
    return {f"{image}-2026-01-0{day}{suffix}" for day in days for suffix in SUFFIXES}


def test_older_builds_go(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """All that they made goes with them, as was announced; it is as many that stay as were asked for."""
    for day in (1, 2):
        place.build(day)
    assert place.names() == of_days(1, 2)
    plan = place.plan(3)
    build = Build(plan, plan.work_path, "vm")
    announced = shown(build, keep.steps(build))[STEP]
    place.build(3)
    assert place.names() == of_days(2, 3)
    assert sorted(announced) == [["#", "remove", str(place.output / name)] for name in sorted(of_days(1))]
    assert f"Removed {place.output}/x-2026-01-01.raw" in caplog.messages
    place.build(4, keep="1")
    assert place.names() == of_days(4)


def test_nothing_is_written_down_where_all_stay(place: Place) -> None:
    for day in (1, 2, 3):
        place.build(day, keep="all")
    assert place.names() == {name for name in of_days(1, 2, 3) if not name.endswith(".build.json")}
    plan = place.plan(3, keep="all")
    assert not [*keep.steps(Build(plan, plan.work_path, "vm"))]
    place.build(4, keep="1")
    assert of_days(1, 2, 3) - place.names() == {f"x-2026-01-0{day}.build.json" for day in (1, 2, 3)}


def test_other_images(place: Place) -> None:
    """Another image's name may begin with the same words, or its files be named as this one's would be."""
    for image in ("x-2026", "x-2026-01-01", "xx"):
        place.build(1, image)
    others = place.names()
    place.build(1, "other", **{"image-name": "x-${date}"})
    own = place.names() - others
    for day in (2, 3, 4):
        place.build(day, keep="1")
    assert place.names() == others | own | of_days(4)


@pytest.mark.parametrize("template", ["golden-${ident}", "${ident}", "${image}.${date}_${ident}"])
def test_names_of_any_pattern(place: Place, template: str) -> None:
    for day in (1, 2, 3, 4):
        place.build(day, **{"image-name": template})
    assert len(place.names()) == 2 * len(SUFFIXES)
    assert all("0000000003" in name or "0000000004" in name for name in place.names())


def test_build_that_fails_removes_nothing(place: Place) -> None:
    """It is one of those that stay if it was published; of one that was not there is a log, which nobody knows."""
    place.build(1, keep="1")
    place.build(2, keep="1", fails="upload")
    assert place.names() == of_days(1, 2)
    place.build(3, keep="1", fails="early")
    left = {"x-2026-01-03.log", "x-2026-01-03.console.log"}
    assert place.names() == of_days(1, 2) | left
    place.build(4, keep="1")
    assert place.names() == of_days(4) | left


def test_build_that_fails_on_the_day_of_a_good_one(place: Place) -> None:
    """The log that it replaces goes with the good one."""
    place.build(1)
    place.build(1, fails="early")
    place.build(2, keep="1")
    assert place.names() == of_days(2)


def test_one_log_for_all(place: Place) -> None:
    """What a newer build has written is its own: the log, and the build record."""
    for day in (1, 2, 3):
        place.build(day, keep="1", record="last.json", **{"log-filename": "last.log"})
    assert place.names() == {name for name in of_days(3) if name != "x-2026-01-03.log"} | {"last.log", "last.json"}
    assert (place.output / "last.log").read_text().startswith("log of x-2026-01-03")


def test_build_record_goes_too(place: Place) -> None:
    for day in (1, 2):
        place.build(day, keep="1", record=f"record-{day}.json")
    assert place.names() == of_days(2) | {"record-2.json"}


def test_logs_that_were_there_are_not_of_the_build(place: Place) -> None:
    mine = place.output / "x-2026-01-01.junit.xml"
    mine.write_text("mine\n")
    plan = place.plan(1)
    with keep.noting() as made:
        made.begin(plan, None, resume=False)
        made.write()
        assert not (place.output / "x-2026-01-01.build.json").exists()
    with keep.noting() as made:
        made.begin(plan, None, resume=False)
        made._published["x-2026-01-01.raw"] = None
    assert json.loads((place.output / "x-2026-01-01.build.json").read_text())["files"] == []


# What must not go.


def changed(path: Path) -> None:
    path.write_text(path.read_text().swapcase())


def longer(path: Path) -> None:
    with path.open("a") as file:
        file.write("mine\n")


def linked(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def another_users(path: Path) -> None:
    os.chown(path, 65534, 65534)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [changed, longer, linked, another_users, piped, directory])
@pytest.mark.parametrize("name", ["x-2026-01-01.raw", "x-2026-01-01.log"])
def test_what_is_not_what_was_made_stays(
    place: Place, change: Callable[[Path], None], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of once, and the rest goes."""
    place.build(1)
    change(place.output / name)
    moved = {"moved"} if change is linked else set()
    place.build(2, keep="1")
    assert place.names() == of_days(2) | {name} | moved
    assert f"{place.output / name} is not what was built: it stays." in caplog.messages
    caplog.clear()
    place.build(3, keep="1")
    assert place.names() == of_days(3) | {name} | moved
    assert not [entry for entry in caplog.records if entry.levelno > logging.INFO]


def test_what_somebody_has_taken_away(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.build(1)
    (place.output / "x-2026-01-01.raw").unlink()
    place.build(2, keep="1")
    assert place.names() == of_days(2)
    assert not [entry for entry in caplog.records if entry.levelno > logging.INFO]


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Have another process have *path* open."""
    with path.open("rb") as file:
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[file.fileno()])
    yield
    process.communicate()


def test_image_in_use_stays(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """A machine that runs from it has it open; its checksum and the rest stay with it, until a later build."""
    place.build(1)
    with held(place.output / "x-2026-01-01.raw"):
        place.build(2, keep="1")
        assert place.names() == of_days(1, 2)
    assert "x-2026-01-01 stays until a later build: x-2026-01-01.raw is in use." in caplog.messages
    place.build(3, keep="1")
    assert place.names() == of_days(3)


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return run


def naming(name: object) -> Callable[[Path], None]:
    """Return what has a record name the file *name*, with the digest and the size of the user's."""
    entry = {"name": name, "size": 5, "sha256": hashlib.sha256(b"mine\n").hexdigest()}
    return rewritten(lambda document: document["files"].append(entry))


FORGED = [
    naming("../mine"),
    naming("/mine"),
    naming(".mine"),
    naming("x-2026-01-02.build.json"),
    naming(""),
    naming("a\0b"),
    naming(3),
    rewritten(lambda document: document.update(version=2)),
    rewritten(lambda document: document.update(program="another")),
    rewritten(lambda document: document.update(build="y")),
    rewritten(lambda document: document.update(ended=0)),
    rewritten(lambda document: document.update(files=None)),
    rewritten(lambda document: document.update(image="y")),
    lambda path: path.write_text("["),
    lambda path: path.write_text("[" * 100000),
    lambda path: path.write_bytes(b"\xff"),
    lambda path: path.chmod(0o666),
    another_users,
    linked,
    piped,
    directory,
]


@pytest.mark.parametrize("forge", FORGED)
def test_record_that_no_build_has_written(place: Place, forge: Callable[[Path], None]) -> None:
    """Nothing of such a build goes, whatever it says."""
    place.build(1)
    (place.output / ".mine").write_text("mine\n")
    (place.output.parent / "mine").write_text("mine\n")
    forge(place.output / "x-2026-01-01.build.json")
    before = place.names()
    place.build(2, keep="1")
    place.build(3, keep="1")
    assert place.names() == before | of_days(3)
    assert (place.output.parent / "mine").exists()


def test_other_files_stay(place: Place) -> None:
    """Whatever they are called."""
    others = {"x-2026-01-01.qcow2", "x-2026-01-01.raw.bak", "x-2026-01-01", "x-2026-01-01.png", "x-2025-01-01.raw"}
    for name in others:
        (place.output / name).write_text("mine\n")
    for day in (1, 2, 3):
        place.build(day, keep="1")
    assert place.names() == others | of_days(3)


def test_newest_stay_whatever_the_clock_says(place: Place) -> None:
    """A build of the future is newer; the one that is there now is never too old."""
    place.build(1)
    rewritten(lambda document: document.update(ended="2999-01-01"))(place.output / "x-2026-01-01.build.json")
    place.build(2)
    place.build(3)
    assert place.names() == of_days(1, 3)
    place.build(4, keep="1")
    assert place.names() == of_days(4)


def test_record_that_cannot_be_written(
    place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("image_factory.base.files.replace", no_room)
    with keep.noting() as made:
        made.begin(place.plan(1), None, resume=False)
        made._published["x-2026-01-01.raw"] = None
    path = place.output / "x-2026-01-01.build.json"
    assert f"Later builds will not remove this one: {path}: No space left on device." in caplog.messages


def test_file_that_cannot_be_removed(
    place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build is good all the same, and a later one tries again."""
    place.build(1)
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name == "x-2026-01-01.log":
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refused)
        place.build(2, keep="1")
    assert "x-2026-01-01 stays until a later build: it can't be removed: Operation not permitted." in caplog.messages
    place.build(3, keep="1")
    assert place.names() == of_days(3)


def test_resumed_build(place: Place) -> None:
    """What the build before has left of it is its own."""
    shutil.copy("/etc/hostname", place.output / "x-2026-01-01.console.log")
    with keep.noting() as made:
        made.begin(place.plan(1), None, resume=True)
        made._published["x-2026-01-01.raw"] = None
    files = json.loads((place.output / "x-2026-01-01.build.json").read_text())["files"]
    assert [file["name"] for file in files] == ["x-2026-01-01.console.log"]
