"""The index at a destination: made, grown, replaced in part, shared, and refused."""

import dataclasses
import datetime
import itertools
import json
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from image_factory import publish
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.files import FILE_VARIABLE, Configuration
from image_factory.configuration.settings import Destination, ImageSettings
from image_factory.finishing import checksum
from image_factory.model import Artifact, Build, Plan
from image_factory.parts import carry_out
from image_factory.uploads import READERS, UPLOADS, index
from image_factory.uploads import tries as uploads_tries

from ..conftest import run, shown, state_of
from ..upload_scene import PASSWORD, TOKEN, USER, Store, StoreHandler, logged, serving, short_pauses
from .test_drp_uploads import Rebar

__all__ = ["logged", "short_pauses"]

DATE = datetime.date(2024, 2, 29)


@pytest.fixture
def settings(tmp_path: Path) -> ImageSettings:
    (tmp_path / "own.conf").write_text(
        "[x]\nlinux = /l\ninitrd = /i\ndistribution = Debian\nrelease = 13\narch = x86_64\n"
    )
    return Configuration({FILE_VARIABLE: str(tmp_path / "own.conf")}).image("x", {})


Make = Callable[..., tuple[Plan, list[Artifact]]]


@pytest.fixture
def made(tmp_path: Path, settings: ImageSettings) -> Make:
    """Make the plan and the artifact of a build that has published it."""

    def make(
        destination: Destination, name: str = "x", date: datetime.date = DATE, number: str = ""
    ) -> tuple[Plan, list[Artifact]]:
        output = tmp_path / "output"
        output.mkdir(exist_ok=True)
        path = output / f"{name}-{date.isoformat()}{number}.raw"
        path.write_bytes(os.urandom(3000))
        plan = Plan(name, settings, date, output, {"raw": (destination,)}, name=path.stem)
        return plan, [checksum.add_sha256(Artifact(path, "raw", 4096))]

    return make


def upload(plan: Plan, artifacts: list[Artifact]) -> None:
    build = Build(plan, plan.work_path, "vm")
    carry_out(state_of(build, artifacts), publish.upload_steps(build))


@dataclasses.dataclass
class There:
    """A destination with an index, and how what it has is read."""

    destination: Destination
    read: Callable[[str], bytes]


@pytest.fixture(params=["rsync", "http", "drp", "rclone"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[There]:
    directory = tmp_path / "there"
    directory.mkdir()
    plain = Destination("up", request.param, f"{directory}/", (), (), index="yes")
    if request.param == "rsync":
        yield There(plain, lambda name: (directory / name).read_bytes())
        return
    if request.param == "rclone":
        configuration = tmp_path / "rclone.conf"
        configuration.touch(0o600)
        configuration.write_text(f"[here]\ntype = alias\nremote = {directory}\n")
        destination = dataclasses.replace(plain, target="here:", credentials=configuration)
        yield There(destination, lambda name: (directory / name).read_bytes())
        return
    login = tmp_path / "login"
    login.touch(0o600)
    login.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    drp = request.param == "drp"
    store = Store(login=f"Bearer {TOKEN}" if drp else None, digest_field="X-DRP-SHA256SUM")
    with serving(store, Rebar if drp else StoreHandler):
        keys: dict[str, Any] = {"credentials": login, "tls": "none"} if drp else {}
        root = "/api/v3/files/" if drp else "/"
        yield There(dataclasses.replace(plain, target=store.url, **keys), lambda name: store.files[root + name])


def images(there: There) -> list[tuple[str, str, bool]]:
    document = json.loads(there.read("index.json"))
    return [(each["name"], each["date"], each["latest"]) for each in document["images"]]


def test_index_grows(there: There, made: Make, logged: pytest.LogCaptureFixture) -> None:
    """One entry for each build; the newest of a name is the latest, whenever it was made."""
    plan, [artifact] = made(there.destination)
    build = Build(plan, plan.work_path, "vm")
    upload(plan, [artifact])
    document = json.loads(there.read("index.json"))
    assert document == {
        "program": "image-factory",
        "version": 1,
        "images": [
            {
                "name": "x",
                "build": "x-2024-02-29",
                "date": "2024-02-29",
                "distribution": "Debian",
                "release": "13",
                "architecture": "x86_64",
                "firmware": "bios",
                "files": [
                    {
                        "path": artifact.path.name,
                        "format": "raw",
                        "size": 3000,
                        "virtual_size": 4096,
                        "sha256": artifact.sha256,
                        "companions": [artifact.checksum_path.name],
                    }
                ],
                "latest": True,
            }
        ],
    }
    assert there.read(artifact.path.name) == artifact.path.read_bytes()
    ran = [message.removeprefix("Running: ") for message in logged.messages if message.startswith("Running: ")]
    ran = [re.sub(r"/tmp/image-factory-scratch\.\w+/", "DIRECTORY/", text) for text in ran]
    announced = shown(build, publish.upload_steps(build))["Updating the index at up"]
    # What stands below a comment is for other remotes.
    certain = [argv for before, argv in itertools.pairwise([[""], *announced]) if "#" not in before[0] + argv[0]]
    assert len(certain) >= 2
    for argv in certain:
        assert shlex.join(argv) in ran
    upload(*made(there.destination, date=datetime.date(2024, 2, 1)))
    upload(*made(there.destination, name="a"))
    _, [replaced] = again = made(there.destination)
    upload(*again)
    assert images(there) == [("a", "2024-02-29", True), ("x", "2024-02-29", True), ("x", "2024-02-01", False)]
    assert replaced.sha256 in there.read("index.json").decode()
    assert artifact.sha256 not in there.read("index.json").decode()
    upload(*made(there.destination, number="-2"))
    builds = [each["build"] for each in json.loads(there.read("index.json"))["images"]]
    assert builds == ["a-2024-02-29", "x-2024-02-29-2", "x-2024-02-29", "x-2024-02-01"]


def test_index_of_someone_else_stays(there: There, made: Make, tmp_path: Path) -> None:
    plan, artifacts = made(there.destination)
    other = tmp_path / "index.json"
    other.write_text('{"images": []}\n')
    alone = uploads_tries.Alone(other, "json", 0, sha256=run("sha256sum", other).stdout.split()[0])
    UPLOADS[there.destination.type].upload(there.destination, alone)
    with pytest.raises(BuildError) as caught:
        upload(plan, artifacts)
    assert caught.value.message == "Uploading index.json to up failed: index.json at up is not one of image-factory"
    assert caught.value.hint == "Have it renamed there, or set upload-index = no."
    assert there.read("index.json") == b'{"images": []}\n'


def test_builds_at_once_lose_no_entry(tmp_path: Path, made: Make) -> None:
    directory = tmp_path / "there"
    directory.mkdir()
    destination = Destination("up", "rsync", f"{directory}/", (), (), index="yes")
    names = ["a", "b", "c"]
    builds = [made(destination, name=name) for name in names]
    failures: list[BaseException] = []

    def update(plan: Plan, artifacts: list[Artifact]) -> None:
        try:
            index.update(plan, destination, artifacts)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=update, args=build) for build in builds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    document = json.loads((directory / "index.json").read_text())
    assert [each["name"] for each in document["images"]] == names


class Racing(StoreHandler):
    """Another machine's index is written right after ours, so often."""

    times = 1

    def do_PUT(self) -> None:  # noqa: N802
        self._take()
        if self.path == "/index.json" and type(self).times:
            type(self).times -= 1
            other = {"name": "other", "build": "other-2024-01-01", "date": "2024-01-01", "latest": True}
            document = {"program": "image-factory", "version": 1, "images": [other]}
            self.store.files[self.path] = json.dumps(document).encode()


@pytest.mark.parametrize("times", [1, 99])
def test_index_that_another_machine_has_replaced(made: Make, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    monkeypatch.setattr(Racing, "times", times)
    with serving(Store(), Racing) as store:
        destination = Destination("up", "http", store.url, (), (), verify="none", index="yes")
        plan, artifacts = made(destination)
        if times == 1:
            upload(plan, artifacts)
            document = json.loads(store.files["/index.json"])
            assert [each["name"] for each in document["images"]] == ["other", "x"]
        else:
            with pytest.raises(BuildError, match=r"^Uploading index.json to up failed: others write index.json there"):
                upload(plan, artifacts)


class Refusing(StoreHandler):
    """It takes images only."""

    def do_PUT(self) -> None:  # noqa: N802
        if self.path == "/index.json":
            self.store.answers = [(403, {})]
        self._take()


def test_server_that_refuses_the_index(made: Make) -> None:
    """What could be uploaded by hand is gone: the hint has no command."""
    with serving(Store(), Refusing) as store:
        plan, artifacts = made(Destination("up", "http", store.url, (), (), index="yes"))
        with pytest.raises(BuildError) as caught:
            upload(plan, artifacts)
        assert caught.value.message.startswith("Uploading index.json to up failed: the server answers 403 Forbidden")
        assert caught.value.hint == "Give the login of upload-credentials the right to write there."
        assert len(store.files) == 2


def test_index_needs_one_directory(made: Make, tmp_path: Path) -> None:
    plan, [artifact] = made(Destination("up", "rsync", f"{tmp_path}/x-2024-02-29.raw.d/", (), (), index="yes"))
    with pytest.raises(ConfigurationError) as caught:
        publish.check(plan)
    assert caught.value.message == "[up] upload-index: with ${image} in upload-target it has no place."
    assert artifact.path.exists()


def test_types_with_an_index_can_read_it_and_remove() -> None:
    for key in ("upload-index", "upload-keep"):
        assert READERS.keys() == {name for name, upload in UPLOADS.items() if key in upload.KEYS}


# Older builds, which go.


def day(number: int) -> datetime.date:
    return datetime.date(2024, 2, number)


def has(there: There, name: str) -> bool:
    try:
        there.read(name)
    except (FileNotFoundError, KeyError):
        return False
    return True


def test_older_builds_go(there: There, made: Make, logged: pytest.LogCaptureFixture) -> None:
    """Those of other images stay, and so does what no index has; the commands are what a dry run shows."""
    all_stay, two_stay = (dataclasses.replace(there.destination, keep=keep) for keep in (None, 2))
    upload(*made(all_stay, "a", day(1)))
    for number in range(1, 4):
        upload(*made(all_stay, date=day(number)))
    old = "x-2024-02-01.raw"
    # One that is gone already, as after a removal that was broken.
    READERS[there.destination.type].remove(there.destination, [old])
    assert not has(there, old) and has(there, f"{old}.sha256sum")
    logged.clear()
    plan, artifacts = made(two_stay, date=day(4))
    upload(plan, artifacts)
    assert images(there) == [("a", "2024-02-01", True), ("x", "2024-02-04", True), ("x", "2024-02-03", False)]
    for name, number in (("a", 1), ("x", 3), ("x", 4)):
        assert has(there, f"{name}-2024-02-0{number}.raw") and has(there, f"{name}-2024-02-0{number}.raw.sha256sum")
    for number in range(1, 3):
        assert not has(there, f"x-2024-02-0{number}.raw") and not has(there, f"x-2024-02-0{number}.raw.sha256sum")
    warnings = [record.message for record in logged.records if record.levelname == "WARNING"]
    said = f"{old}: here:{old} is a directory or doesn't exist"
    told = f"These files of older builds may be left at up, and are not in index.json any more: {said}"
    # rclone doesn't tell what is not there from what it can't ask for.
    assert warnings == ([told] if there.destination.type == "rclone" else [])
    messages = [*logged.messages]
    assert "Removed x-2024-02-02.raw at up" in messages
    build = Build(plan, plan.work_path, "vm")
    [announced] = shown(build, publish.upload_steps(build))["Removing older builds at up"]
    before, after = shlex.join(announced).split("OLDER-FILE")
    removing = [text for text in messages if text.startswith(f"Running: {before}") and text.endswith(after)]
    assert removing and all("x-2024-02-0" in text for text in removing)
    # The index has lost them before the files go.
    written = [number for number, text in enumerate(messages) if "index.json" in text and text.startswith("Running: ")]
    assert max(written) < messages.index(removing[0])


class Stubborn(StoreHandler):
    """It answers *statuses* to the first that want something removed."""

    statuses: ClassVar[list[int]] = []

    def do_DELETE(self) -> None:  # noqa: N802
        if self.statuses:
            self.store.answers = [(self.statuses.pop(0), {})]
        self._drop()


@pytest.mark.parametrize(
    ("statuses", "left", "said"),
    [
        ([405], ["x-2024-02-01.raw"], "the server answers 405 Method Not Allowed: The store refuses it"),
        # The file that stays is asked for once more when the other is.
        ([405, 503, 405], ["x-2024-02-01.raw"], "the server answers 405 Method Not Allowed: The store refuses it"),
        ([503], [], ""),
        (
            [503] * 99,
            ["x-2024-02-01.raw", "x-2024-02-01.raw.sha256sum"],
            "the server answers 503 Service Unavailable: The store refuses it (4 tries)",
        ),
    ],
)
def test_what_can_not_be_removed_is_named(
    made: Make,
    monkeypatch: pytest.MonkeyPatch,
    logged: pytest.LogCaptureFixture,
    statuses: list[int],
    left: list[str],
    said: str,
) -> None:
    """The build is good all the same."""
    monkeypatch.setattr(Stubborn, "statuses", [*statuses])
    with serving(Store(), Stubborn) as store:
        destination = Destination("up", "http", store.url, (), (), index="yes", keep=1)
        upload(*made(destination, date=day(1)))
        upload(*made(destination, date=day(2)))
        assert b"x-2024-02-01" not in store.files["/index.json"]
        assert sorted(name for name in store.files if "x-2024-02-01" in name) == [f"/{name}" for name in left]
    told = [message for message in logged.messages if "of older builds may be left" in message]
    names = f"These files of older builds may be left at up, and are not in index.json any more: {', '.join(left)}"
    assert told == ([f"{names}: {said}"] if left else [])


def test_number_of_builds_needs_an_index(made: Make, tmp_path: Path) -> None:
    plan, _ = made(Destination("up", "rsync", f"{tmp_path}/", (), (), keep=2))
    with pytest.raises(ConfigurationError) as caught:
        publish.check(plan)
    assert caught.value.message == "[up] upload-keep: only an index tells which builds are there."
    assert caught.value.hint == "Set upload-index = yes, or upload-keep = all."
