"""What has changed since the last build: of what is told of it, and of what apt and sources.list say."""

import json
from pathlib import Path
from typing import Any

import pytest

from image_factory import changes, keep, pipeline
from image_factory.base import events, files
from image_factory.configuration.files import Configuration
from image_factory.model import Plan
from image_factory.sources.bootstrap import archive
from image_factory.system import inventory
from image_factory.told.witness import Witness

POLICY = """\
bash:
  Installed: (none)
  Candidate: 5.2.15-2+b13
  Version table:
     5.2.15-2+b13 500
        500 http://deb.debian.org/debian bookworm/main amd64 Packages
hello:i386:
  Installed: (none)
  Candidate: 1
  Version table:
     2~bpo 100
        100 http://deb.debian.org/debian bookworm-backports/main amd64 Packages
 *** 1 -1
        500 http://deb.debian.org/debian bookworm/main amd64 Packages
gone:
  Installed: (none)
  Candidate: (none)
  Version table:
"""


def test_what_apt_says() -> None:
    assert archive.parsed(POLICY) == {
        "bash": archive.Offered("5.2.15-2+b13", ("5.2.15-2+b13",)),
        "hello:i386": archive.Offered("1", ("2~bpo", "1")),
    }
    assert archive.parsed("") == {}


@pytest.mark.parametrize(
    ("version", "expected"),
    [("1", []), ("2~bpo", []), ("0.9", ["hello 0.9 -> 1"]), ("1.5", ["hello 1.5 -> 1"])],
)
def test_a_package_of_another_suite_is_as_new_as_it_can_be(version: str, expected: list[str]) -> None:
    found = archive.parsed(POLICY)
    assert [*changes._newer([("hello", "i386", version), ("own", "all", "1")], found)] == expected


DEB822 = b"""\
# The archive itself.
Types: deb deb-src
URIs: http://deb.debian.org/debian http://mirror.example.com/debian
Suites: trixie
 trixie-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
Enabled: no
URIs: http://old.example.com
Suites: trixie
Components: main

Types: deb-src
URIs: http://source.example.com
Suites: trixie
Components: main

Types: deb
URIs: http://flat.example.com
Suites: ./
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("deb http://a/d trixie main", "deb http://a/d trixie main"),
        ("deb [arch=amd64 trusted=yes] https://a/d trixie main", "deb https://a/d trixie main"),
        ("deb [signed-by=/usr/share/keyrings/none.gpg] http://a/d trixie main", "deb http://a/d trixie main"),
        ("deb [signed-by=/usr/share/keyrings/../../../etc/passwd] http://a/d x", "deb http://a/d x"),
        ("deb [signed-by=/etc/passwd] http://a/d x", "deb http://a/d x"),
        ("deb file:/etc trixie main", ""),
        ("deb copy:/etc trixie main", ""),
        ("deb ssh://a/d trixie main", ""),
        ("deb cdrom:[Debian]/ trixie main", ""),
        ("deb [", ""),
    ],
)
def test_sources_of_a_system_are_used_as_far_as_they_are_harmless(line: str, expected: str) -> None:
    assert archive._believed(line) == expected


def test_sources_of_packages() -> None:
    signed = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
    texts = {
        "etc/apt/sources.list": b"# deb http://x y z\ndeb http://10.0.2.2/debian trixie main\n"
        b"deb-src http://x y z\ndeb https://me:pw@example.com/d trixie main # mine\ndeb \x1b[31m a b\ndeb\n\xff\xfe\n",
        "etc/apt/sources.list.d/debian.sources": DEB822,
        "etc/apt/sources.list.d/junk.sources": b"\0\n:\n\n\nTypes: deb\n",
    }
    assert inventory.read_sources(texts) == (
        "deb http://10.0.2.2/debian trixie main",
        "deb https://***@example.com/d trixie main",
        f"deb {signed}http://deb.debian.org/debian trixie main contrib",
        f"deb {signed}http://deb.debian.org/debian trixie-updates main contrib",
        f"deb {signed}http://mirror.example.com/debian trixie main contrib",
        f"deb {signed}http://mirror.example.com/debian trixie-updates main contrib",
        "deb http://flat.example.com ./",
    )
    assert inventory.read_sources({}) == ()


class Place:
    """An image that was built of a disk image, as far as that is written down."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.output = path / "output"
        self.output.mkdir()
        self.source = path / "source.raw"
        self.source.write_bytes(b"disk")

    def plan(self, extra: str = "") -> Plan:
        text = f"[x]\nsource = image\nsource-image = {self.source}\n{extra}\n"
        (self.path / "x.conf").write_text(text)
        configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(self.path / "x.conf")})
        flags = {"output-dir": str(self.output), "cache-dir": str(self.path / "cache")}
        return pipeline.make_plan(configuration, "x", flags)

    def built(self, packages: list[dict[str, Any]] | None = None, extra: str = "") -> None:
        """Write down what a build has made, which ends well."""
        plan = self.plan(extra)
        name = plan.file_name("raw")
        image = self.output / name
        image.write_bytes(b"image")
        (self.output / f"{name}.sha256sum").write_text("")
        document = {"schema_version": 1, "image": "x", "date": plan.date.isoformat(), "directories": {}, "sources": []}
        document |= {"packages": packages or [], "artifact": {"size_on_disk": 0, "format": "raw"}}
        (self.output / f"{name}.manifest.json").write_text(json.dumps(document))
        seen = Witness()
        with keep.noting() as made, seen.observing():
            made.begin(plan, None, resume=False, wanted=True)
            assert made.notes
            events.tell(events.InputUsed("source-image", str(self.source), self.source))
            companions = ((f"{name}.manifest.json", files.digest_of(self.output / f"{name}.manifest.json")),)
            events.tell(events.Published(image, "raw", 5, True, files.digest_of(image), companions))
            made.origins = changes.origins(plan, changes.settings_of(plan), seen)

    def sought(self, extra: str = "") -> tuple[list[str], list[str]]:
        found = changes.sought(self.plan(extra))
        assert found.builds == bool(found.changed or found.unknown)
        return [*found.changed], [*found.unknown]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_disk_image_is_known_by_its_contents(place: Place) -> None:
    assert place.sought() == ([], [f"{place.output} has no record of an earlier build"])
    place.built()
    assert place.sought() == ([], [])
    # The same once more, at another place.
    place.source = place.source.rename(place.path / "other.raw")
    place.source.touch()
    assert place.sought() == ([], [])
    place.source.write_bytes(b"another")
    assert place.sought() == (["source-image"], [])
    place.source.unlink()
    [reason] = place.sought()[1]
    assert str(place.source) in reason


def test_settings_that_make_no_other_image_are_no_change(place: Place) -> None:
    place.built(extra="seal = yes")
    assert place.sought("seal = yes\naudit = yes\nram = 2G\nlog-file = yes") == ([], [])
    assert place.sought("seal = no") == (["seal"], [])
    script = place.path / "first"
    script.write_text("#!/bin/sh\n")
    assert place.sought(f"seal = yes\nfirst-boot = {script}") == (["first-boot"], [])
    place.built(extra=f"first-boot = {script}")
    assert place.sought(f"first-boot = {script}") == ([], [])
    script.write_text("#!/bin/sh\ntrue\n")
    assert place.sought(f"first-boot = {script}") == (["first-boot"], [])


def test_another_version_of_the_program_builds(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.built()
    monkeypatch.setattr(changes, "__version__", "9.9")
    assert place.sought() == (["image-factory"], [])


def test_packages_that_nobody_can_ask_for(place: Place) -> None:
    package = {"name": "bash", "version": "1", "architecture": "x86_64", "kind": "rpm"}
    place.built([package])
    assert place.sought() == ([], ["Which packages its archives have now is not known: they are rpm"])
    place.built([package | {"kind": "deb", "architecture": "amd64"}])
    assert place.sought() == ([], ["The sources of its packages are not known"])


def test_an_image_that_is_not_there(place: Place) -> None:
    place.built()
    [image] = place.output.glob("*.raw")
    image.write_bytes(b"longer than it was")
    assert place.sought() == ([f"{image.name} is not there as it was made"], [])


def test_a_build_that_fails_says_nothing_and_takes_nothing_back(place: Place) -> None:
    place.built()
    with keep.noting() as made:
        made.begin(place.plan(), None, resume=False, wanted=True)
    assert place.sought() == ([], [])
    [record] = place.output.glob("*.build.json")
    document = json.loads(record.read_text())
    for origins, unknown in ((None, "did not end well"), ([1], "no record"), ({"files": 1}, "no record")):
        record.write_text(json.dumps(document | {"origins": origins}))
        [reason] = place.sought()[1]
        assert unknown in reason


def test_hostile_manifests(place: Place) -> None:
    [hostile] = [{"name": "-o;reboot", "version": "1", "architecture": "amd64", "kind": "deb"}]
    place.built([hostile])
    [manifest] = place.output.glob("*.manifest.json")
    for text in ("{", "[]", json.dumps({"image": "x"})):
        manifest.write_text(text)
        [reason] = place.sought()[1]
        assert "has no manifest that tells its packages" in reason
