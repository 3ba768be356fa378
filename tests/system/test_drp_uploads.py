"""Uploads by the real curl to a server with the API of RackN's files, as its client knows it."""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.settings import Destination
from image_factory.model import Artifact
from image_factory.uploads import drp

from ..upload_scene import (
    NAME,
    PASSWORD,
    SUM,
    TOKEN,
    USER,
    Store,
    StoreHandler,
    artifact,
    basic,
    failure,
    logged,
    serving,
    short_pauses,
)

__all__ = ["artifact", "logged", "short_pauses"]

FILES = "/api/v3/files/images/"


class Rebar(StoreHandler):
    """RackN's API: a token for a login, and files for a token, with their checksums."""

    token: ClassVar[Any] = {"Token": TOKEN, "Info": {}}

    def do_GET(self) -> None:  # noqa: N802
        path, _, query = self.path.partition("?")
        if path.startswith("/api/v3/users/"):
            self._note()
            if self.headers.get("Authorization") != basic() or path != f"/api/v3/users/{USER}/token" or not query:
                self._answer(401, b'{"Messages": ["no"]}', {"Content-Type": "application/json"})
                return
            self._answer(200, json.dumps(self.token).encode(), {"Content-Type": "application/json"})
        else:
            self._give()


@pytest.fixture
def store() -> Iterator[Store]:
    with serving(Store(login=f"Bearer {TOKEN}", digest_field="X-DRP-SHA256SUM"), Rebar) as found:
        yield found


def private(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


@pytest.fixture
def up(store: Store, tmp_path: Path) -> Destination:
    login = private(tmp_path / "netrc", f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    destination = Destination("up", "drp", f"{store.url}images/", (), (), credentials=login, tls="none")
    drp.check(destination, NAME)
    return destination


def tries(store: Store) -> int:
    return store.requests.count(("POST", FILES + NAME))


@pytest.mark.parametrize("field", ["X-DRP-SHA256SUM", "ETag"])
def test_upload(
    store: Store, up: Destination, artifact: Artifact, field: str, logged: pytest.LogCaptureFixture
) -> None:
    """A token is asked for, used, and shown nowhere; the server's own checksum is compared."""
    store.digest_field = field
    drp.upload(up, artifact)
    assert store.files == {
        FILES + NAME: artifact.path.read_bytes(),
        FILES + SUM: artifact.checksum_path.read_bytes(),
    }
    assert [(method, path.partition("?")[0]) for method, path in store.requests] == [
        ("GET", f"/api/v3/users/{USER}/token"),
        *((method, FILES + name) for name in (NAME, SUM) for method in ("POST", "HEAD")),
    ]
    assert f"{NAME} is verified at up: {field} {artifact.sha256}" in logged.messages
    text = "".join(logged.messages)
    assert not any(secret in text for secret in (PASSWORD, TOKEN, basic().split()[1]))


def test_what_runs_is_what_is_announced(up: Destination, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    drp.upload(up, artifact)
    ran = [message.removeprefix("Running: ") for message in logged.messages if message.startswith("Running: ")]
    assert ran == [shlex.join(argv) for argv in drp.commands(up, artifact)]


def test_token_of_the_file(store: Store, up: Destination, artifact: Artifact, tmp_path: Path) -> None:
    """None is asked for; a URL may have the API's path itself."""
    token = private(tmp_path / "token", f"Authorization: Bearer {TOKEN}\n")
    destination = dataclasses.replace(up, credentials=token, target=f"{store.url}api/v3/files/images/")
    drp.upload(destination, artifact)
    assert set(store.files) == {FILES + NAME, FILES + SUM}
    assert not any("token" in path for _, path in store.requests)
    assert len(drp.commands(destination, artifact)) == 4


def test_wrong_login(store: Store, up: Destination, artifact: Artifact, tmp_path: Path) -> None:
    wrong = private(tmp_path / "wrong", f"default login {USER} password no-{PASSWORD}\n")
    error = failure(dataclasses.replace(up, credentials=wrong), artifact)
    assert error.message == 'asked for a token, the server answers 401 Unauthorized: {"Messages": ["no"]}'
    assert len(store.requests) == 1


@pytest.mark.parametrize("token", [{}, {"Token": 3}, {"Token": "a\nX: b"}, [], "x"])
def test_server_that_gives_no_token(
    up: Destination, artifact: Artifact, token: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rebar, "token", token)
    assert failure(up, artifact).message == "asked for a token, the server gives none"


def test_token_that_is_refused(store: Store, up: Destination, artifact: Artifact) -> None:
    store.login = "Bearer another"
    assert failure(up, artifact).message == "the server answers 401 Unauthorized: The store refuses it"


def test_checksum_that_differs(store: Store, up: Destination, artifact: Artifact) -> None:
    store.lies = 1
    drp.upload(up, artifact)
    assert tries(store) == 2
    store.lies = 99
    error = failure(up, artifact)
    assert error.message.startswith(f"{NAME} has another checksum there, ")
    assert error.message.endswith("(4 tries)")


def test_server_that_is_busy(store: Store, up: Destination, artifact: Artifact) -> None:
    """Each try has a token of its own."""
    store.answers = [(503, {}), (502, {})]
    drp.upload(up, artifact)
    assert tries(store) == 3
    assert sum("token" in path for _, path in store.requests) == 3


def test_what_is_refused_before_a_build(up: Destination) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"credentials": None}, "[up] lacks 'upload_credentials'. RackN's server wants a login."),
        ({"target": f"{up.target}?explode=true"}, "[up] upload-target: a file of RackN's has no '?' in its URL."),
        ({"tls": None}, "[up] upload-target: with http:// anyone on the way reads the login of upload-credentials."),
    ]
    for keys, message in refused:
        with pytest.raises(ConfigurationError) as caught:
            drp.check(dataclasses.replace(up, **keys), NAME)
        assert caught.value.message == message


def test_probe(store: Store, up: Destination, tmp_path: Path) -> None:
    store.login = None
    drp.probe(up, tmp_path)
    assert store.files == {}
    wrong = private(tmp_path / "wrong", f"default login {USER} password no-{PASSWORD}\n")
    with pytest.raises(BuildError, match="asked for a token, the server answers 401"):
        drp.probe(dataclasses.replace(up, credentials=wrong), tmp_path)
