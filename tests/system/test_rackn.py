"""RackN's way of making a golden image, by the shipped recipe: tasks, cleaning, more tasks, a tar, its names, upload.

The system is bootstrapped from a small archive in place of Debian's; all else is what the recipe says.
"""

import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_factory import pipeline, uploads
from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.configuration.settings import Destination
from image_factory.finishing import listing
from image_factory.model import Artifact
from image_factory.uploads import drp

from ..bootstrap_scene import Place, new_place
from ..conftest import TODAY, User, run
from ..small_archive import Archive
from ..upload_scene import PASSWORD, TOKEN, USER, Store, serving
from .test_drp_uploads import FILES, Rebar, private

OWN = """
[centos-8]
based_on = Debian-13-rackn
tag = centos-8
bootstrap = {directory}/small.yaml
image_size = 160M
test_boot = no
audit = no
log_file = yes
output_dir = {directory}/out
cache_dir = {directory}/cache
tasks = first
tasks_after_cleaning = rackn-curtin, rackn-grub, last
upload_destinations = rackn

[first]
task_command =
    echo pre-builder >/srv/first
    mkdir -p /usr/lib/grub
    touch /usr/lib/grub/grub-multi-install
    echo x >/var/log/some.log

[last]
task_command = echo post-builder >/srv/last

[rackn]
upload_type = drp
upload_target = {url}images/
upload_credentials = {directory}/drp.netrc
upload_tls = none
upload_index = yes
"""
STEM = r"centos-8-{}-[0-9]{{8}}-[0-9]{{6}}-[0-9a-f]{{10}}\.{}"


class Workflow:
    """RackN's server, and a place of root's with what a user writes."""

    def __init__(self, place: Place, store: Store) -> None:
        self.place, self.store = place, store
        configuration = place.directory / ".config/image-factory.conf"
        configuration.parent.mkdir()
        configuration.write_text(OWN.format(directory=place.directory, url=store.url))
        private(place.directory / "drp.netrc", f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        variables = {"IMAGE_FACTORY_CONFIG": "", "HOME": str(self.place.directory)}
        return self.place.run(*words, "centos-8", check=check, **variables)

    def published(self) -> dict[str, Path]:
        """Return the files of the output directory by what follows the names of the build."""
        return {re.sub(r"-[0-9]{8}-[0-9]{6}-[0-9a-f]{10}", "", path.name): path for path in self.place.out.iterdir()}


@pytest.fixture
def workflow(users: dict[str, User], small_archive: Archive) -> Iterator[Workflow]:
    with serving(Store(login=f"Bearer {TOKEN}", digest_field="X-DRP-SHA256SUM"), Rebar) as store:
        yield Workflow(new_place(users["root"], small_archive), store)


def test_workflow(workflow: Workflow) -> None:
    """All of it; the first upload is refused: the names stay, and the build goes on there."""
    assert workflow.run("--check").stdout == "centos-8 can be built.\n"
    shown = workflow.run("--dry-run").stdout
    assert re.search(rf"^# Writing the list {STEM.format('MANIFEST', 'txt')}$", shown, re.MULTILINE)
    assert "\ntar --list --quoting-style=escape --file=-\n" in shown

    workflow.run("--until", "publish")
    workflow.store.answers = [(403, {})]
    failed = workflow.run("--resume", check=False)
    assert failed.returncode == 1
    assert "the server answers 403 Forbidden" in failed.stderr
    assert not parameters(failed.stderr)
    before = workflow.published()
    done = workflow.run("--resume")
    first = workflow.published()
    assert [path for path in before.values() if path.is_file()] == [*first.values()]
    base = "centos-8-rootfs"
    own = {f"{base}.{suffix}" for suffix in ("tgz", "tgz.sha256sum", "tgz.md5sum", "log", "junit.xml")}
    made = {f"{base}.tgz.manifest.json", f"{base}.tgz.cdx.json", "centos-8-MANIFEST.txt"}
    assert first.keys() == own | made
    archive, text = first[f"{base}.tgz"], first["centos-8-MANIFEST.txt"]
    assert re.fullmatch(STEM.format("rootfs", "tgz"), archive.name)
    assert text.name == archive.name.replace("rootfs", "MANIFEST").replace("tgz", "txt")

    # What RackN tells of it, and the list of what is in it.
    told, _, names = text.read_text().partition("\n\n")
    data = archive.read_bytes()
    assert told.splitlines() == [
        f"filename: {archive.name}",
        f"ident: {archive.stem[-10:]}",
        f"date: {TODAY}",
        f"size: {len(data)}",
        f"md5sum: {hashlib.md5(data).hexdigest()}",
        f"upload: {workflow.store.url}images/{archive.name}",
        f"upload: {workflow.store.url}images/{text.name}",
    ]
    assert names == run("tar", "-tzf", archive).stdout
    listed = set(names.splitlines())
    assert {"./curtin/", "./srv/first", "./srv/last", "./etc/os-release"} <= listed
    assert not {"./usr/lib/grub/grub-multi-install"} & listed
    # It is cleaned between the tasks.
    assert run("tar", "-xzOf", archive, "./srv/first", "./srv/last").stdout == "pre-builder\npost-builder\n"
    assert not run("tar", "-xzOf", archive, "./var/log/some.log").stdout

    # The server has all, and what deploys it is told how.
    uploaded = {path.removeprefix(FILES): body for path, body in workflow.store.files.items()}
    logs = {f"{base}.{suffix}" for suffix in ("log", "junit.xml")}
    assert uploaded.keys() == {first[name].name for name in first.keys() - logs} | {"index.json"}
    assert uploaded[archive.name] == data
    url = f"{{{{.ProvisionerURL}}}}/files/images/{archive.name}"
    digest = hashlib.sha256(data).hexdigest()
    assert parameters(done.stderr) == {
        "image-deploy": {
            "image-deploy/image-url": url,
            "image-deploy/image-type": "tgz",
            "image-deploy/image-os": "linux",
        },
        "eikon": {"eikon/image-url": url, "eikon/image-type": "tgz", "eikon/image-checksum": digest},
    }
    assert TOKEN not in done.stderr and PASSWORD not in done.stderr

    [image] = json.loads(uploaded["index.json"])["images"]
    assert (image["build"], image["latest"]) == (archive.stem, True)
    assert not [*workflow.place.out.glob(".*")]


def parameters(text: str) -> dict[str, dict[str, str]]:
    return {who: json.loads(found) for who, found in re.findall(r"Parameters of ([a-z-]+): (\{.*\})", text)}


def test_older_build_goes(users: dict[str, User], small_archive: Archive) -> None:
    """With its log, when the next one is good: one that fails removes nothing."""
    place = new_place(users["root"], small_archive)
    place.configure(keep="1", image_name="small-${ident}", log_file="yes", mount_via="loop")
    place.run("small")
    first = {path.name for path in place.out.iterdir()}
    assert len(first) == 4
    shown = place.run("--dry-run", "small").stdout.partition("# Removing older builds\n")[2]
    assert {Path(line.removeprefix("#   remove ")).name for line in shown.splitlines()} == first
    place.configure(keep="1", image_name="small-${ident}", log_file="yes", mount_via="loop", post_build_command="false")
    failed = place.run("small", check=False)
    assert failed.returncode == 1
    assert first < {path.name for path in place.out.iterdir()}
    place.configure(keep="1", image_name="small-${ident}", log_file="yes", mount_via="loop")
    place.run("--resume", "small")
    left = {path.name for path in place.out.iterdir()}
    assert len(left) == 4 and not left & first


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("tgz", ("tgz", "tgz")),
        ("tar.gz", ("tgz", "tgz")),
        ("tar.zst", (None, "tar-zst")),
        ("raw.zst", (None, "dd-zst")),
        ("raw.gz", ("dd-gz", "dd-gz")),
        ("dd.tgz", ("dd-tgz", "dd-tgz")),
        ("qcow2", (None, "qcow")),
        ("vmdk", (None, None)),
    ],
)
def test_types(tmp_path: Path, name: str, kinds: tuple[str | None, str | None]) -> None:
    """What image-deploy and Eikon call a format, none for what they can't deploy."""
    destination = Destination("up", "drp", "https://drp.example.com:8092/a/", (), ())
    found = drp.parameters(destination, Artifact(tmp_path / "x", name, 1, sha256="0" * 64))
    assert tuple(found.get(who, {}).get(f"{who}/image-type") for who in ("image-deploy", "eikon")) == kinds
    for who, values in found.items():
        assert values[f"{who}/image-url"] == "{{.ProvisionerURL}}/files/a/x"


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("rsync", "host:/srv/", "host:/srv/NOTE"),
        ("rsync", "host:", "host:NOTE"),
        ("rclone", "up:bucket/a", "up:bucket/a/NOTE"),
        ("http", "https://h/put/IMAGE?key=secret", "https://h/put/NOTE"),
        ("http", "https://h/a/", "https://h/a/NOTE"),
        ("oci", "h/name:tag", "up"),
        ("command", "put --key secret", "up"),
    ],
)
def test_places(kind: str, target: str, expected: str) -> None:
    destination = Destination("up", kind, target, (), ())
    assert uploads.place_of(destination, Artifact(Path("/a/IMAGE"), "tgz", 1), Path("/a/NOTE")) == expected


def test_list_of_a_disk(tmp_path: Path) -> None:
    """There is none, which is known before the build."""
    text = "[x]\nlinux = /l\ninitrd = /i\nformat = qcow2\nmanifest_text = ${image}-list\n"
    (tmp_path / "x.conf").write_text(text)
    plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "x.conf")}), "x", {})
    with pytest.raises(ConfigurationError) as caught:
        listing.check(plan)
    assert caught.value.message == "[x] manifest-text: no format has the files of the tree."
    assert caught.value.hint and "tar.gz" in caught.value.hint
