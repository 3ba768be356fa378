"""Builds that are left out when nothing has changed: of packages from a small archive, and of a disk image."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from image_factory import pipeline
from image_factory.base.errors import BuildError
from image_factory.configuration.files import Configuration
from image_factory.model import Plan
from image_factory.sources import offered, remove_left

from ..bootstrap_scene import Place, new_place
from ..conftest import TODAY, User
from ..small_archive import SUITE, Archive, closed_port, served
from .test_record import checked

NOT_BUILT = f"small is not built: nothing has changed since small-{TODAY}."


@pytest.fixture(params=["root", "c"])
def place(request: pytest.FixtureRequest, users: dict[str, User], small_archive: Archive) -> Place:
    """A place of root, and one of the user who has no sudo rule."""
    made = new_place(users[request.param], small_archive)
    made.archive.add("hello", files={"usr/share/hello": "hello"})
    made.archive.publish()
    made.recipe(packages="hello")
    made.configure(firmware="bios", manifest="yes")
    return made


def said(place: Place, *words: str, check: bool = True) -> str:
    """Return what a build says of changes, in a line."""
    done = place.run("--if-changed", *words, "small", check=check)
    assert "Traceback" not in done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("small is "))


def state(place: Place) -> dict[str, Any]:
    return {path.name: path.lstat().st_mtime_ns for path in place.out.iterdir()}


def test_a_system_is_built_again_only_when_its_packages_or_settings_change(place: Place) -> None:
    assert said(place) == f"small is built: {place.out} has no record of an earlier build."
    record = place.out / f"small-{TODAY}.build.json"
    assert record.stat().st_mode & 0o777 == 0o600
    before = state(place)
    assert said(place) == NOT_BUILT
    assert state(place) == before
    # A package that it does not have, and one of another version that it has.
    place.archive.add("other")
    place.archive.publish()
    assert said(place, "--json", str(place.directory / "record.json")) == NOT_BUILT
    found = checked((place.directory / "record.json").read_text())
    assert found["if_changed"] == {"previous": f"small-{TODAY}", "changed": [], "unknown": [], "builds": False}
    assert (found["artifacts"], found["failure"]) == ([], None)
    place.archive.add("hello", version="2", files={"usr/share/hello": "hello"})
    place.archive.publish()
    since = f"small is built, as this has changed since small-{TODAY}:"
    assert said(place) == f"{since} hello 1 -> 2."
    assert said(place) == NOT_BUILT
    assert [path for path in place.left() if not path.endswith(".durations.json")] == []


def test_settings_and_files_that_are_gone(users: dict[str, User], small_archive: Archive) -> None:
    place = new_place(users["root"], small_archive)
    place.configure(firmware="bios", manifest="yes")
    said(place)
    since = f"small is built, as this has changed since small-{TODAY}:"
    place.recipe(script="true")
    assert said(place) == f"{since} bootstrap."
    place.configure(firmware="bios", manifest="yes", format="qcow2")
    assert said(place) == f"{since} format."
    (place.out / f"small-{TODAY}.qcow2").unlink()
    assert said(place) == f"{since} small-{TODAY}.qcow2 is not there as it was made."
    assert said(place) == NOT_BUILT


def test_what_can_not_be_known_is_built(users: dict[str, User], small_archive: Archive) -> None:
    place = new_place(users["root"], small_archive)
    place.configure(firmware="bios")
    said(place)
    assert said(place) == (
        f"small is built: small-{TODAY} has no manifest that tells its packages; 'manifest = yes' writes one."
    )
    place.configure(firmware="bios", manifest="yes")
    said(place)
    # A mirror that does not answer is needed for the build, which says so itself.
    with served(place.archive) as mirror:
        place.recipe(mirror.uri)
        said(place)
        uri = mirror.uri
    done = place.run("--if-changed", "small", check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("small is built: ")
    assert uri.removeprefix("http://").partition("/")[0].rpartition(":")[2] in done.stdout
    place.recipe()
    said(place)
    record = place.out / f"small-{TODAY}.build.json"
    document = json.loads(record.read_text())
    # One of an older version, and one of a build that did not end.
    record.write_text(json.dumps({key: value for key, value in document.items() if key != "origins"}))
    assert "did not end well, or says nothing of what it was made from" in said(place)
    record.write_text("{")
    assert "has no record of an earlier build" in said(place)


def test_mirrors_are_asked_one_after_the_other(users: dict[str, User], small_archive: Archive) -> None:
    place = new_place(users["root"], small_archive)
    place.configure(firmware="bios", manifest="yes")
    with served(place.archive) as mirror:
        lines = [place.archive.source(uri, SUITE) for uri in (f"http://127.0.0.1:{closed_port()}", mirror.uri)]
        place.recipe(sources=[lines])
        said(place)
        assert said(place) == NOT_BUILT


def test_several_images(users: dict[str, User], small_archive: Archive) -> None:
    place = new_place(users["root"], small_archive)
    place.configure(firmware="bios", manifest="yes")
    said(place)
    configuration = place.directory / "image-factory.conf"
    text = configuration.read_text()
    configuration.write_text(f"{text}\n{text.replace('[small]', '[other]')}")
    (place.directory / "records").mkdir()
    done = place.run("--if-changed", "--json", str(place.directory / "records"), "small", "other")
    assert f"small: {NOT_BUILT}" in done.stdout
    assert "other: other is built: " in done.stdout
    summary = done.stdout.partition("Images:")[2]
    assert "small: not built, as nothing has changed" in summary
    assert "other: done" in summary
    records = {name: checked((place.directory / f"records/{name}.json").read_text()) for name in ("small", "other")}
    assert [records[name]["if_changed"]["builds"] for name in ("small", "other")] == [False, True]
    # On the same day no image is in its own way.
    configuration.write_text(text.replace("[small]", "[small]\nreplace = no"))
    assert said(place) == NOT_BUILT
    place.recipe(script="true")
    done = place.run("--if-changed", "small", check=False)
    assert "replace = no, and " in done.stderr


@pytest.mark.parametrize("words", [["--resume"], ["--until", "install"], ["--check"], ["--dry-run"]])
def test_it_is_for_whole_builds(users: dict[str, User], small_archive: Archive, words: list[str]) -> None:
    done = new_place(users["root"], small_archive).run("--if-changed", *words, "small", check=False)
    assert done.returncode == 2
    assert "--if-changed is for whole builds." in done.stderr


def test_sources_of_a_system_that_something_else_has_made(users: dict[str, User], small_archive: Archive) -> None:
    """As elements, installers and images have them: apt believes them by the setting keyring."""
    place = new_place(users["root"], small_archive)
    place.archive.add("hello", version="2", files={"usr/share/hello": "hello"})
    place.archive.publish()
    configuration = place.directory / "image-factory.conf"

    def plan(key: str) -> Plan:
        keyring = place.archive.keyring(key)
        text = f"[x]\nsource = image\nsource-image = /none\ncache-dir = {place.cache}\nkeyring = {keyring}\n"
        configuration.write_text(text)
        return pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}), "x", {})

    with served(place.archive) as mirror:
        sources = [f"deb [trusted=yes] {mirror.uri} {SUITE} main", "deb file:/etc x main"]
        found = offered(plan("right"), sources, ["hello:amd64", "base", "none"])
        assert {name: each.candidate for name, each in found.items()} == {"hello": "2", "base": "1"}
        with pytest.raises(BuildError, match="sign"):
            offered(plan("wrong"), sources, ["base"])
    assert not [*Path("/var/tmp").glob("image-factory-archive.*")]


def test_what_a_killed_build_has_left_of_its_look_is_removed() -> None:
    path = Path(tempfile.mkdtemp(prefix="image-factory-archive.", dir="/var/tmp"))
    (path / "tree/var/lib/apt/lists/partial").mkdir(parents=True)
    assert path in [*remove_left()]
    assert not path.exists()
