"""Manifests and SBOMs keep to their schemas, and the difference to the build before is found."""

import dataclasses
import datetime
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from image_factory import cli, publish
from image_factory.base import events
from image_factory.configuration.files import Configuration
from image_factory.finishing import checksum, manifest
from image_factory.model import Artifact, Build, Plan
from image_factory.system import inventory
from image_factory.system.inventory import Inventory, Package

REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((REPOSITORY / "data/manifest.schema.json").read_text())
RECORD_SCHEMA = json.loads((REPOSITORY / "data/build-record.schema.json").read_text())
# The library's validator, and the one of package URLs; Debian 12 has neither.
VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
import json
for name in sys.argv[1:]:
    text = open(name, encoding="utf-8").read()
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert error is None, error.data.message
    for component in json.loads(text)["components"]:
        if "purl" in component:
            url = PackageURL.from_string(component["purl"])
            assert url.to_string() == component["purl"], component["purl"]
            assert (url.name, component["version"].endswith(url.version)) == (component["name"], True)
            print(json.dumps([url.type, url.namespace, url.qualifiers]))
"""

DEBIAN = {"id": "debian", "version_id": "13", "version_codename": "trixie", "pretty_name": "Debian GNU/Linux 13"}


def package(name: str, version: str = "1", architecture: str = "amd64", **more: Any) -> Package:
    kind, source = more.pop("kind", "deb"), more.pop("source", name)
    return Package(kind, name, version, architecture, source, more.pop("licenses", None))


PACKAGES = (
    package("bash", "5.2-1+b1", licenses=("GPL-3+", "MIT or X")),
    package("libstdc++6", "12.2.0-14~x", source="gcc-12"),
    package("linux-image-6.12-amd64", "6.12.48-1"),
    package("openssh-server", "1:9.2p1", "all"),
)


def named(path: Path, image: str = "x", date: str = "2024-02-29", extra: str = "", formats: str = "qcow2, raw") -> Plan:
    configuration = path / "own.conf"
    configuration.write_text(
        f"[{image}]\nlinux = /l\ninitrd = /i\nmanifest = yes\narch = amd64\nformat = {formats}\n{extra}"
    )
    settings = Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}).image(image, {})
    return Plan(image, settings, datetime.date.fromisoformat(date), path / "output", {})


def published(
    path: Path, date: str = "2024-02-29", packages: tuple[Package, ...] = PACKAGES, sizes: int = 4096, **more: Any
) -> list[Artifact]:
    """Publish a build with *packages*."""
    plan = named(path, date=date, **more)
    plan.work_path.mkdir(parents=True, exist_ok=True)
    build = Build(plan, plan.work_path, "vm")
    found = Inventory(DEBIAN, packages, {".": 0, "usr": sizes * 2, "var": sizes})
    (build.directory / "inventory.json").write_text(json.dumps(dataclasses.asdict(found)))
    artifacts = []
    for name in plan.settings.format:
        artifact = Artifact(build.directory / plan.file_name(name), name, 1 << 30)
        artifact.path.write_bytes(b"x" * sizes)
        artifacts.append(checksum.add_sha256(artifact))
    artifacts = publish.move_into_place(build, manifest.add_manifests(build, artifacts))
    for artifact in artifacts:
        subprocess.run(["sha256sum", "--check", "--quiet"], cwd=plan.output_dir, input=sums(artifact), check=True)
    return artifacts


def sums(artifact: Artifact) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in artifact.companions).encode()


def document(artifact: Artifact) -> dict[str, Any]:
    """Return the manifest of *artifact*, which keeps to the schema."""
    return document_in(artifact.path.with_name(f"{artifact.path.name}.manifest.json"))


def document_in(path: Path) -> dict[str, Any]:
    text = path.read_text()
    found: dict[str, Any] = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert text.isascii()
    return found


# The documents.


def objects(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, inner in schema.get("properties", {}).items():
        yield from objects(inner, f"{path}/{name}")
    if "items" in schema:
        yield from objects(schema["items"], f"{path}/*")
    if "object" in schema.get("type", ""):
        yield path, schema


def test_the_schema_describes_all_and_no_more() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for path, schema in objects(SCHEMA):
        assert set(schema.get("required", [])) == set(schema.get("properties", [])) or path == "/os", path
        assert schema["additionalProperties"] is False or path == "/directories", path
        for name, inner in schema.get("properties", {}).items():
            assert inner["description"].endswith("."), f"{path}/{name}"


def test_the_difference_is_the_same_in_manifest_and_record() -> None:
    assert SCHEMA["properties"]["difference"] == RECORD_SCHEMA["properties"]["difference"]


def test_manifest_of_each_artifact(tmp_path: Path) -> None:
    for artifact in published(tmp_path):
        found = document(artifact)
        assert found["artifact"]["name"] == artifact.path.name
        assert found["artifact"]["sha256"] == artifact.sha256
        assert found["artifact"]["size"] == 4096
        assert found["os"] == DEBIAN
        assert found["kernels"] == ["linux-image-6.12-amd64 6.12.48-1"]
        assert found["directories"] == {".": 0, "usr": 8192, "var": 4096}
        assert found["difference"] is None
        assert found["packages"][0] == {
            "kind": "deb",
            "name": "bash",
            "version": "5.2-1+b1",
            "architecture": "amd64",
            "source": "bash",
            "licenses": ["GPL-3+", "MIT or X"],
        }


def test_without_the_key_nothing_is_written(tmp_path: Path) -> None:
    artifacts = published(tmp_path, extra="[y]\n", formats="raw\nmanifest = no".replace("manifest", "Manifest_"))
    assert artifacts[0].companions
    plan = dataclasses.replace(named(tmp_path), settings=dataclasses.replace(named(tmp_path).settings, manifest=False))
    build = Build(plan, tmp_path / "none", "vm")
    assert [*manifest.listing_steps(build), *manifest.late_steps(build), *manifest.steps(build)] == []


def validated(*paths: Path) -> list[Any]:
    """Have the library's validator validate the SBOMs, and return the package URLs in them."""
    python = REPOSITORY / ".venv/bin/python3"
    done = subprocess.run([python, "-c", VALIDATE, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_sbom_is_valid_and_names_packages_as_scanners_do(tmp_path: Path) -> None:
    rpms = (
        package("dbus", "1:1.16-2.fc44", "x86_64", kind="rpm", licenses=("MIT",)),
        package("kernel-core", "6.17.1-2.fc44", "x86_64", kind="rpm", source="kernel"),
        package("kernel-core", "6.17.2-2.fc44", "x86_64", kind="rpm", source="kernel"),
    )
    paths = []
    for artifact in published(tmp_path, packages=(*PACKAGES, *rpms)):
        paths.append(artifact.path.with_name(f"{artifact.path.name}.cdx.json"))
        found = json.loads(paths[-1].read_text())
        assert found["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": artifact.sha256}]
    assert json.loads(paths[0].read_text())["serialNumber"] != json.loads(paths[1].read_text())["serialNumber"]
    found = validated(*paths)
    assert len(found) == 14
    debian = {"arch": "amd64", "distro": "debian-13"}
    assert found[:2] == [["deb", "debian", debian], ["deb", "debian", {**debian, "upstream": "gcc-12"}]]
    assert found[4] == ["rpm", "debian", {"arch": "x86_64", "distro": "debian-13", "epoch": "1"}]


def test_sbom_of_this_machine_is_valid(tmp_path: Path) -> None:
    def read(path: str, most: int, offset: int = 0, /) -> bytes | None:
        found = Path("/", path)
        return found.read_bytes()[offset:][:most] if found.is_file() else None

    packages = inventory.read_packages(read, tmp_path)
    assert len(packages) > 100
    [artifact] = published(tmp_path, packages=packages, formats="raw")
    assert len(validated(artifact.path.with_name(f"{artifact.path.name}.cdx.json"))) == len(packages)
    document(artifact)


def test_sbom_of_a_system_without_a_name(tmp_path: Path) -> None:
    hostile = package("a", "1", licenses=("\u202e\ufffd",))
    plan = named(tmp_path)
    (tmp_path / "image").write_bytes(b"x")
    artifact = Artifact(tmp_path / "image", "raw", 1, sha256="0" * 64)
    for system in ({}, {"id": "x", "version_id": "1_2.-3", "pretty_name": "\ufffd"}):
        found = manifest.sbom(plan, Inventory(system, (hostile,), {}), artifact)
        (tmp_path / "sbom").write_text(json.dumps(found))
        validated(tmp_path / "sbom")


def test_the_same_image_has_the_same_documents(tmp_path: Path) -> None:
    found = []
    for name in "ab":
        (tmp_path / name).mkdir()
        found.append([path.read_bytes() for artifact in published(tmp_path / name) for path in artifact.others])
    assert found[0] == found[1]


# The difference.


def row(*names: str) -> list[dict[str, str]]:
    """Return packages from ``name=version`` and ``name.architecture=version``."""
    found = []
    for text in names:
        name, version = text.split("=")
        name, _, architecture = name.partition(".")
        found.append({"name": name, "version": version, "architecture": architecture or "amd64"})
    return found


@pytest.mark.parametrize(
    ("before", "after", "added", "removed", "changed"),
    [
        ([], [], [], [], []),
        (["a=1"], ["a=1"], [], [], []),
        ([], ["a=1"], ["a=1"], [], []),
        (["a=1"], [], [], ["a=1"], []),
        (["a=1"], ["a=2"], [], [], ["a 1 2"]),
        (["a=2"], ["a=1"], [], [], ["a 2 1"]),
        (["a=1"], ["b=1"], ["b=1"], ["a=1"], []),
        (["a.amd64=1"], ["a.i386=1"], ["a.i386=1"], ["a.amd64=1"], []),
        (["a.amd64=1", "a.i386=1"], ["a.amd64=2", "a.i386=2"], [], [], ["a 1 2", "a.i386 1 2"]),
        (["k=1"], ["k=1", "k=2"], ["k=2"], [], []),
        (["k=1", "k=2"], ["k=2"], [], ["k=1"], []),
        (["k=1", "k=2"], ["k=2", "k=3"], [], [], ["k 1 3"]),
        (["k=1", "k=2"], ["k=3", "k=4"], ["k=3", "k=4"], ["k=1", "k=2"], []),
        (["k=1"], ["k=2", "k=3"], ["k=2", "k=3"], ["k=1"], []),
        (["b=1", "a=1", "c=1"], ["c=2", "d=1", "b=2"], ["d=1"], ["a=1"], ["b 1 2", "c 1 2"]),
    ],
)
def test_packages_that_differ(
    before: list[str], after: list[str], added: list[str], removed: list[str], changed: list[str]
) -> None:
    found = manifest.compare_packages(row(*before), row(*after))
    assert found["added"] == row(*added)
    assert found["removed"] == row(*removed)
    shown = [
        (entry["name"] + (".i386" if entry["architecture"] == "i386" else ""), entry["before"], entry["after"])
        for entry in found["changed"]
    ]
    assert shown == [tuple(text.split()) for text in changed]


NEXT = (package("bash", "5.3-1"), package("curl", "8"), *PACKAGES[1:3])


def test_difference_to_the_build_before(tmp_path: Path) -> None:
    published(tmp_path, "2024-02-27")
    published(tmp_path, "2024-02-28", NEXT[:1], sizes=1 << 20)
    published(tmp_path, "2024-03-09")
    qcow2, raw = published(tmp_path, "2024-02-29", NEXT, sizes=3 << 20)
    found = document(qcow2)["difference"]
    assert found == document(raw)["difference"]
    assert found["previous"] == "x-2024-02-28"
    assert [entry["name"] for entry in found["packages"]["added"]] == ["curl", "libstdc++6", "linux-image-6.12-amd64"]
    assert found["directories"] == {"before": 3 << 20, "after": 9 << 20}
    assert found["artifacts"][0]["format"] == "qcow2"
    assert found["artifacts"][0]["after"] >= 3 << 20
    jsonschema.Draft202012Validator(
        {**RECORD_SCHEMA["properties"]["difference"], "$defs": RECORD_SCHEMA["$defs"]}
    ).validate(found)


def test_build_of_the_same_day_is_the_one_before(tmp_path: Path) -> None:
    published(tmp_path)
    found = document(published(tmp_path, packages=NEXT)[0])["difference"]
    assert found["previous"] == "x-2024-02-29"
    assert found["packages"] == {
        "added": row("curl=8"),
        "removed": row("openssh-server.all=1:9.2p1"),
        "changed": [{"name": "bash", "architecture": "amd64", "before": "5.2-1+b1", "after": "5.3-1"}],
    }


def test_other_images_are_no_builds_before(tmp_path: Path) -> None:
    published(tmp_path, "2024-02-27", image="x-2024-02-28")
    published(tmp_path, "2024-02-27", image="xy")
    published(tmp_path, "2024-02-27", image="x.y")
    assert document(published(tmp_path)[0])["difference"] is None


def test_build_before_of_another_format(tmp_path: Path) -> None:
    published(tmp_path, "2024-02-28", formats="raw")
    found = document(published(tmp_path, packages=NEXT, formats="qcow2")[0])["difference"]
    assert found["artifacts"] == []
    assert found["packages"]["added"] == row("curl=8")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text(""),
        lambda path: path.write_text("[" * 100000),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"schema_version": 1, "date": "2024-02-28", "packages": [1]}'),
        lambda path: path.write_text(path.read_text().replace('"bash"', "[]")),
        lambda path: path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2')),
        lambda path: path.write_text(path.read_text().replace("2024-02-28", "2024-02-27")),
        lambda path: path.write_text(path.read_text().replace('"usr": 8192', '"usr": "8192"')),
        lambda path: path.write_text(path.read_text().replace('"usr": 8192', '"usr": 1e999')),
        lambda path: path.unlink() or path.mkdir(),
        lambda path: path.unlink() or os.mkfifo(path),
        lambda path: path.unlink() or path.symlink_to("/dev/zero"),
    ],
)
def test_damaged_manifest_is_passed_over(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    published(tmp_path, "2024-02-27", NEXT, formats="raw")
    [artifact] = published(tmp_path, "2024-02-28", formats="raw")
    path = artifact.path.with_name(f"{artifact.path.name}.manifest.json")
    damage(path)
    caplog.clear()
    found = document(published(tmp_path, formats="raw")[0])["difference"]
    assert found["previous"] == "x-2024-02-27"
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{path} is not a manifest that this build can be compared with."
    ]


def test_difference_is_told_once_and_shown_in_the_summary(tmp_path: Path) -> None:
    published(tmp_path, "2024-02-28", sizes=1 << 20)
    artifacts = published(tmp_path, packages=NEXT, sizes=2 << 20)
    differences = events.Differences()
    with events.observed(differences):
        manifest.tell_difference(artifacts)
    text = cli.summary(artifacts, [], 1.0, differences.found)
    assert """
Changes since x-2024-02-28:
  packages      1 added, 1 removed, 1 changed
    + curl.amd64 8
    - openssh-server 1:9.2p1
    * bash.amd64 5.2-1+b1 -> 5.3-1
  installed     3.0 MiB -> 6.0 MiB (+3.0 MiB)
  qcow2         1.0 MiB -> 2.0 MiB (+1.0 MiB)
  raw           1.0 MiB -> 2.0 MiB (+1.0 MiB)
Seconds per step:
""" in text  # fmt: skip


def test_nothing_is_told_without_a_manifest_or_when_it_has_gone(tmp_path: Path) -> None:
    published(tmp_path, "2024-02-28")
    artifacts = published(tmp_path)
    differences = events.Differences()
    with events.observed(differences):
        manifest.tell_difference([dataclasses.replace(artifact, companions=()) for artifact in artifacts])
        artifacts[0].path.with_name(f"{artifacts[0].path.name}.manifest.json").unlink()
        manifest.tell_difference(artifacts)
    assert differences.found is None
    assert "Changes" not in cli.summary(artifacts, [], 1.0, None)


def test_difference_of_an_edited_manifest_reaches_no_terminal(tmp_path: Path) -> None:
    published(tmp_path, "2024-02-28", (package("a"),))
    path = tmp_path / "output/x-2024-02-28.raw.manifest.json"
    path.write_text(path.read_text().replace('"name": "a"', '"name": "\\u001b[2Ja\\nb"'))
    found = document(published(tmp_path, formats="raw")[0])["difference"]
    assert not set("\x1b") & set(cli.summary([], [], 1.0, found))
    assert "    - ?ab" not in cli.summary([], [], 1.0, found)


def test_long_lists_are_cut(tmp_path: Path) -> None:
    published(tmp_path, "2024-02-28", ())
    many = tuple(package(f"p{number:04}") for number in range(500))
    lines = manifest.difference_lines(document(published(tmp_path, packages=many)[0])["difference"])
    assert "    + and 460 more, see the manifest" in lines
    assert len(lines) < 50
