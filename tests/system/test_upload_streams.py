"""Simplestreams at a destination: read by Incus' rules and by Canonical's own program, grown, shared, and refused."""

import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from image_factory import publish
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.settings import Destination, ImageSettings
from image_factory.finishing import checksum
from image_factory.model import Artifact, Build, Plan
from image_factory.uploads import streams

from ..conftest import REPOSITORY, run, shown
from ..upload_scene import Store, StoreHandler, logged, serving, short_pauses
from .test_upload_index import DATE, There, settings, there, upload

__all__ = ["logged", "settings", "short_pauses", "there"]

SUFFIXES = {"incus": "incus.tar.xz"}
PRODUCTS, INDEX = "streams/v1/images.json", "streams/v1/index.json"

Make = Callable[..., tuple[Plan, list[Artifact]]]


@pytest.fixture
def made(tmp_path: Path, settings: ImageSettings) -> Make:
    """Make the plan and the artifacts of a build that has published them."""

    def make(
        destination: Destination,
        name: str = "x",
        date: datetime.date = DATE,
        number: str = "",
        formats: tuple[str, ...] = ("squashfs", "incus"),
        **keys: str,
    ) -> tuple[Plan, list[Artifact]]:
        output = tmp_path / "output"
        output.mkdir(exist_ok=True)
        base = f"{name}-{date.isoformat()}{number}"
        going = {format_: (with_streams(destination),) for format_ in formats}
        own = dataclasses.replace(settings, format=formats, **keys)
        artifacts = []
        for format_ in formats:
            path = output / f"{base}.{SUFFIXES.get(format_, format_)}"
            path.write_bytes(os.urandom(2000 + len(artifacts)))
            artifacts.append(checksum.add_sha256(Artifact(path, format_, 4096)))
        return Plan(name, own, date, output, going, name=base), artifacts

    return make


def with_streams(destination: Destination) -> Destination:
    return dataclasses.replace(destination, index="simplestreams")


def fingerprint(artifacts: list[Artifact], number: int = 0) -> str:
    """Return what Incus calls the image of the last of *artifacts*, which describes it, and another."""
    return hashlib.sha256(artifacts[-1].path.read_bytes() + artifacts[number].path.read_bytes()).hexdigest()


@dataclasses.dataclass
class Found:
    """An image as Incus finds it."""

    fingerprint: str
    kind: str
    properties: dict[str, str]
    aliases: list[str]
    paths: list[str]


KEYS = {
    "squashfs": ("combined_squashfs_sha256", "container"),
    "root.tar.xz": ("combined_rootxz_sha256", "container"),
    "disk-kvm.img": ("combined_disk-kvm-img_sha256", "virtual-machine"),
}


def incus_finds(read: Callable[[str], bytes]) -> list[Found]:
    """Return the images by the rules of ToAPI in Incus' products.go, in its order; each file is as it is said to be."""
    found = []
    for entry in json.loads(read(INDEX))["index"].values():
        assert entry["datatype"] == "image-downloads"
        products = json.loads(read(entry["path"]))
        assert (products["datatype"], products["format"]) == ("image-downloads", "products:1.0")
        assert entry["products"] == [*products["products"]]
        for product in products["products"].values():
            assert product["arch"] in {"x86_64", "aarch64"}
            for name, version in product["versions"].items():
                datetime.datetime.strptime(name[:8], "%Y%m%d")
                [metadata] = [item for item in version["items"].values() if item["ftype"] == "incus.tar.xz"]
                for item in version["items"].values():
                    data = read(item["path"])
                    assert (item["size"], item["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
                    if item is not metadata:
                        key, kind = KEYS[item["ftype"]]
                        assert metadata[key] == hashlib.sha256(read(metadata["path"]) + data).hexdigest()
                        properties = {key: product[key] for key in ("os", "release", "variant")} | {"serial": name}
                        aliases = [alias for alias in product["aliases"].split(",") if alias]
                        found.append(Found(metadata[key], kind, properties, aliases, [metadata["path"], item["path"]]))
    # sort.go: the serial backwards, containers first.
    found.sort(key=lambda each: each.kind)
    found.sort(key=lambda each: each.properties["serial"], reverse=True)
    return sorted(found, key=lambda each: [each.properties[key] for key in ("os", "release", "variant")])


def targets(found: list[Found]) -> dict[tuple[str, str], str]:
    """Return which image has each alias: applyAliases gives it to the first."""
    pairs = [((alias, each.kind), each.fingerprint) for each in found for alias in each.aliases]
    return dict(reversed(pairs))


def test_what_incus_reads(there: There, made: Make, logged: pytest.LogCaptureFixture) -> None:
    plan, [root, metadata] = built = made(there.destination)
    build = Build(plan, plan.work_path, "vm")
    upload(*built)
    product = {
        "aliases": "x",
        "arch": "x86_64",
        "os": "Debian",
        "release": "13",
        "release_title": "13",
        "variant": "x",
        "versions": {
            "20240229": {
                "items": {
                    "incus.tar.xz": {
                        "ftype": "incus.tar.xz",
                        "path": "x-2024-02-29.incus.tar.xz",
                        "size": 2001,
                        "sha256": metadata.sha256,
                        "combined_squashfs_sha256": fingerprint([root, metadata]),
                    },
                    "squashfs": {
                        "ftype": "squashfs",
                        "path": "x-2024-02-29.squashfs",
                        "size": 2000,
                        "sha256": root.sha256,
                    },
                }
            }
        },
    }
    kind = {"datatype": "image-downloads", "format": "products:1.0"}
    assert json.loads(there.read(PRODUCTS)) == {
        "content_id": "image-factory", **kind, "products": {"Debian:13:x86_64:x": product},
    }  # fmt: skip
    assert json.loads(there.read(INDEX)) == {
        "format": "index:1.0",
        "index": {"image-factory": {**kind, "path": PRODUCTS, "products": ["Debian:13:x86_64:x"]}},
    }
    ran = [message.removeprefix("Running: ") for message in logged.messages if message.startswith("Running: ")]
    ran = [re.sub(r"/tmp/image-factory-scratch\.\w+/", "DIRECTORY/", text) for text in ran]
    announced = shown(build, publish.upload_steps(build))["Updating the simplestreams at up"]
    # What stands below a comment is for other remotes.
    certain = [argv for before, argv in itertools.pairwise([[""], *announced]) if "#" not in before[0] + argv[0]]
    assert len(certain) >= 5
    for argv in certain:
        assert shlex.join(argv) in ran
    [found] = incus_finds(there.read)
    assert found.fingerprint == fingerprint([root, metadata])


def test_newest_has_the_alias(tmp_path: Path, made: Make) -> None:
    """It is the last of its day, and not what has come after it with an older date; another image has its own."""
    destination = Destination("up", "rsync", f"{tmp_path}/there/", (), ())
    (tmp_path / "there").mkdir()
    upload(*made(destination))
    newest = made(destination, number="-2")
    upload(*newest)
    upload(*made(destination, date=datetime.date(2024, 2, 1)))
    machine = made(destination, name="a", formats=("qcow2", "tar.xz", "incus"))
    upload(*machine)
    found = incus_finds(lambda name: (tmp_path / "there" / name).read_bytes())
    assert [(each.properties["variant"], each.properties["serial"], each.kind) for each in found] == [
        ("a", "20240229", "container"),
        ("a", "20240229", "virtual-machine"),
        ("x", "20240229_02", "container"),
        ("x", "20240229", "container"),
        ("x", "20240201", "container"),
    ]
    assert targets(found) == {
        ("a", "container"): fingerprint(machine[1], 1),
        ("a", "virtual-machine"): fingerprint(machine[1], 0),
        ("x", "container"): fingerprint(newest[1]),
    }


def test_newer_release_takes_the_alias(tmp_path: Path, made: Make) -> None:
    """Incus gives it to the first of its order, in which 12 comes before 13."""
    destination = Destination("up", "rsync", f"{tmp_path}/there/", (), ())
    (tmp_path / "there").mkdir()
    upload(*made(destination, release="12", date=datetime.date(2024, 1, 1)))
    newest = made(destination)
    upload(*newest)
    found = incus_finds(lambda name: (tmp_path / "there" / name).read_bytes())
    assert len(found) == 2
    assert targets(found) == {("x", "container"): fingerprint(newest[1])}


def test_removed_builds_are_not_in_them(tmp_path: Path, made: Make) -> None:
    destination = Destination("up", "rsync", f"{tmp_path}/there/", (), (), keep=1)
    (tmp_path / "there").mkdir()
    upload(*made(destination, date=datetime.date(2024, 2, 1)))
    newest = made(destination)
    upload(*newest)
    [found] = incus_finds(lambda name: (tmp_path / "there" / name).read_bytes())
    assert found.fingerprint == fingerprint(newest[1])
    assert not [*(tmp_path / "there").glob("x-2024-02-01*")]


def test_canonicals_program_mirrors_it(tmp_path: Path, made: Make) -> None:
    program = shutil.which("sstream-mirror", path=str(REPOSITORY / ".venv/bin"))
    assert program, "sstream-mirror is missing: make .venv/bin/ruff"
    directory = tmp_path / "there"
    directory.mkdir()
    destination = Destination("up", "rsync", str(directory), (), ())
    upload(*made(destination))
    upload(*made(destination, name="y", formats=("qcow2", "incus")))
    options = ("--no-verify", directory / INDEX)
    listed = json.loads(run(Path(program).with_name("sstream-query"), "--json", *options).stdout)
    names = {"x-2024-02-29.squashfs", "x-2024-02-29.incus.tar.xz", "y-2024-02-29.qcow2", "y-2024-02-29.incus.tar.xz"}
    assert {item["path"] for item in listed} == names
    # It compares each file with its SHA-256.
    run(program, *options, tmp_path / "mirror")
    for name in names:
        run("cmp", directory / name, tmp_path / "mirror" / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (PRODUCTS, '{"content_id": "images"}'),
        (PRODUCTS, "{"),
        (INDEX, '{"index": {"image-factory": {}, "images": {}}}'),
        (INDEX, '{"index": 1}'),
    ],
)
def test_streams_of_someone_else_stay(tmp_path: Path, made: Make, name: str, text: str) -> None:
    directory = tmp_path / "there"
    (directory / "streams/v1").mkdir(parents=True)
    (directory / name).write_text(text)
    with pytest.raises(BuildError) as caught:
        upload(*made(Destination("up", "rsync", f"{directory}/", (), ())))
    assert caught.value.message == f"Uploading {PRODUCTS} to up failed: {name} at up is not one of image-factory"
    assert caught.value.hint == "Have it renamed there, or set upload-index = yes."
    assert [path.name for path in (directory / "streams/v1").iterdir()] == [Path(name).name]
    assert (directory / name).read_text() == text


def test_broken_index_there(tmp_path: Path, made: Make) -> None:
    directory = tmp_path / "there"
    directory.mkdir()
    (directory / "index.json").write_text("{")
    with pytest.raises(BuildError, match=r"^Uploading index.json to up failed: index.json at up is not one of image-"):
        upload(*made(Destination("up", "rsync", f"{directory}/", (), ())))
    assert (directory / "index.json").read_text() == "{"
    assert not (directory / "streams").exists()


class Racing(StoreHandler):
    """Another machine's image is in the index right after the streams were written, so often."""

    times = 1

    def do_PUT(self) -> None:  # noqa: N802
        self._take()
        if self.path == f"/{INDEX}" and type(self).times:
            type(self).times -= 1
            document = json.loads(self.store.files["/index.json"])
            other = json.loads(json.dumps(document["images"][0]).replace('"x', f'"other{type(self).times}'))
            document["images"].insert(0, other)
            self.store.files["/index.json"] = json.dumps(document).encode()


@pytest.mark.parametrize("times", [1, 99])
def test_index_that_another_machine_has_replaced(made: Make, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    monkeypatch.setattr(Racing, "times", times)
    with serving(Store(), Racing) as store:
        built = made(Destination("up", "http", store.url, (), (), verify="none"))
        if times == 1:
            upload(*built)
            products = json.loads(store.files[f"/{PRODUCTS}"])["products"]
            assert [each["variant"] for each in products.values()] == ["other0", "x"]
        else:
            with pytest.raises(BuildError, match=rf"^Uploading {PRODUCTS} to up failed: others write index.json there"):
                upload(*built)


class Flat(StoreHandler):
    """It makes no directories."""

    def do_PUT(self) -> None:  # noqa: N802
        if self.path.count("/") > 1:
            self.store.answers = [(409, {})]
        self._take()


def test_server_that_makes_no_directories(made: Make) -> None:
    with serving(Store(), Flat) as store:
        with pytest.raises(BuildError) as caught:
            upload(*made(Destination("up", "http", store.url, (), ())))
        assert caught.value.message.startswith(f"Uploading {PRODUCTS} to up failed: the server answers 409 Conflict")
        assert caught.value.hint == "Make the directory there, or mend upload-target."
        assert "/index.json" in store.files
        assert f"/{PRODUCTS}" not in store.files


@pytest.mark.parametrize(
    ("formats", "going"),
    [
        (("squashfs",), None),
        (("incus", "tar.gz"), None),
        (("squashfs", "incus"), ("squashfs",)),
    ],
)
def test_nothing_that_incus_can_run(made: Make, formats: tuple[str, ...], going: tuple[str, ...] | None) -> None:
    plan, _ = made(Destination("up", "rsync", "/srv/images/", (), (), formats=going), formats=formats)
    with pytest.raises(ConfigurationError) as caught:
        publish.check(plan)
    assert caught.value.message == (
        "[up] upload-index: simplestreams needs incus and one of squashfs, tar.xz, qcow2 there."
    )
    assert caught.value.hint == "Add them to format, and to upload-formats if that is set, or set upload-index = yes."
    publish.check(dataclasses.replace(plan, destinations={each: (plain(plan, each),) for each in formats}))


def plain(plan: Plan, format_: str) -> Destination:
    return dataclasses.replace(plan.destinations[format_][0], index="yes")


def file(format_: str, **keys: Any) -> dict[str, Any]:
    return {"format": format_, "path": f"p.{format_}", "size": 1, "sha256": "00", **keys}


GOOD = [file("squashfs"), file("incus", fingerprints={"squashfs": "11"})]
LEFT_OUT: list[dict[str, Any]] = [
    {},
    {"files": None},
    {"files": [1]},
    {"files": [file("squashfs"), file("incus")]},
    {"files": [file("incus", fingerprints={"squashfs": "11"})]},
    {"files": [file("squashfs"), file("incus", fingerprints={"squashfs": 1})]},
    {"files": [file("squashfs"), file("incus", fingerprints="squashfs")]},
    {"files": [file("squashfs", size="1"), GOOD[1]]},
    {"files": [file("squashfs", sha256=None), GOOD[1]]},
    {"files": [{"format": []}, *GOOD]},
    {"files": GOOD, "date": "yesterday"},
]


@pytest.mark.parametrize("keys", LEFT_OUT)
def test_what_incus_can_not_use_is_left_out(keys: dict[str, Any]) -> None:
    """As an image of a build without simplestreams is."""
    named = {"name": "x", "build": "x", "date": "2024-02-29", "architecture": "x86_64"}
    good = named | {"build": "y", "files": GOOD}
    found = json.loads(streams.made_of([named | keys, good])[streams.PRODUCTS])["products"]
    assert found == json.loads(streams.made_of([good])[streams.PRODUCTS])["products"]
    assert [*found["::x86_64:x"]["versions"]] == ["20240229"]
