"""Uploads by the real curl to nginx and to a server of our own: broken, refused, lying, not trusted, and mended."""

import base64
import contextlib
import dataclasses
import hashlib
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from image_factory.base import events, interrupts
from image_factory.base.errors import BuildError, ConfigurationError, Interrupted
from image_factory.base.log import masked
from image_factory.configuration.settings import Destination
from image_factory.model import Artifact
from image_factory.uploads import curl, http
from image_factory.uploads import tries as uploads_tries

from ..conftest import run
from ..upload_scene import (
    NAME,
    PASSWORD,
    SIZE,
    SUM,
    TOKEN,
    TRIES,
    USER,
    Store,
    artifact,
    basic,
    failure,
    free_port,
    logged,
    make_certificate,
    proxy,
    server,
    serving,
    short_pauses,
)

__all__ = ["artifact", "logged", "short_pauses"]


@pytest.fixture
def store() -> Iterator[Store]:
    with serving(Store()) as found:
        yield found


@pytest.fixture
def login(tmp_path: Path) -> Path:
    return private(tmp_path / "netrc", f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def private(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


def up(target: str, **keys: Any) -> Destination:
    return dataclasses.replace(Destination("up", "http", target, (), ()), **keys)


def tries(logged: pytest.LogCaptureFixture) -> int:
    """Return how often curl was run to upload the image."""
    return sum(f"--upload-file {NAME} " in message for message in logged.messages if message.startswith("Running: "))


# nginx, as it is used.


class Nginx:
    """nginx that takes files with a login, over TLS with a certificate of its own, and has them below *root*."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.port = free_port()
        self.certificate, key, self.pin = make_certificate(directory)
        self.url = f"https://127.0.0.1:{self.port}/images/"
        done = run("openssl", "passwd", "-apr1", PASSWORD)
        (directory / "logins").write_text(f"{USER}:{done.stdout}")
        self.configuration = directory / "nginx.conf"
        self.configuration.write_text(
            f"user root; daemon off; worker_processes 1; pid {directory}/pid; error_log {directory}/log;\n"
            "events {}\nhttp {\naccess_log off; client_max_body_size 0;\n"
            + "".join(f"{kind}_temp_path {directory}/root/tmp/{kind};\n" for kind in ("client_body",))
            + "".join(f"{kind}_temp_path {directory}/{kind};\n" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
            + f"server {{\nlisten 127.0.0.1:{self.port} ssl;\nssl_certificate {self.certificate};\n"
            f"ssl_certificate_key {key};\nroot {self.root};\nlocation /images/ {{\n"
            f"auth_basic images; auth_basic_user_file {directory}/logins;\n"
            "dav_methods PUT DELETE; create_full_put_path on;\n}\nlocation /none/ { return 405; }\n}\n}\n"
        )

    def check(self, artifact: Artifact) -> None:
        """Both files are there, whole, and nothing else."""
        where = self.root / "images"
        assert sorted(path.name for path in where.iterdir()) == [NAME, SUM]
        run("cmp", artifact.path, where / NAME)
        run("sha256sum", "--check", "--strict", SUM, cwd=where)


@pytest.fixture(scope="module")
def running_nginx(base: Path) -> Iterator[Nginx]:
    directory = base / "nginx"
    directory.mkdir()
    found = Nginx(directory)
    (found.root / "tmp").mkdir(parents=True)
    with server(found.port, "nginx", "-e", directory / "log", "-c", found.configuration):
        yield found


@pytest.fixture
def nginx(running_nginx: Nginx) -> Iterator[Nginx]:
    yield running_nginx
    shutil.rmtree(running_nginx.root / "images", ignore_errors=True)


class Progress:
    def __init__(self) -> None:
        self.fractions: list[float] = []

    def notice(self, event: events.Event) -> None:
        if isinstance(event, events.Progressed):
            self.fractions.append(event.fraction)


def test_upload_below_a_directory_that_nginx_makes(nginx: Nginx, artifact: Artifact, login: Path) -> None:
    destination = http.below(up(nginx.url, credentials=login, tls=nginx.certificate), "streams/v1")
    assert http.read(destination, SUM) is None
    http.upload(destination, artifact)
    assert sorted(path.name for path in (nginx.root / "images/streams/v1").iterdir()) == [NAME, SUM]
    assert http.read(destination, SUM) == artifact.checksum_path.read_bytes()


def test_upload_to_nginx_is_read_back(
    nginx: Nginx, artifact: Artifact, login: Path, logged: pytest.LogCaptureFixture
) -> None:
    progress = Progress()
    destination = up(nginx.url, credentials=login, tls=nginx.certificate)
    http.check(destination, NAME)
    with events.observed(progress):
        http.upload(destination, artifact)
    nginx.check(artifact)
    assert f"{NAME} is verified at up: SHA-256 {artifact.sha256}" in logged.messages
    assert progress.fractions[-1] == 1.0
    assert not any("%" in message or "#" in message for message in logged.messages)
    assert PASSWORD not in "".join(logged.messages) and basic().split()[1] not in "".join(logged.messages)


def test_what_runs_is_what_is_announced(
    nginx: Nginx, artifact: Artifact, login: Path, logged: pytest.LogCaptureFixture
) -> None:
    destination = up(nginx.url, credentials=login, tls=nginx.pin, headers=("X-Kind: image",))
    http.upload(destination, artifact)
    nginx.check(artifact)
    ran = [message.removeprefix("Running: ") for message in logged.messages if message.startswith("Running: ")]
    announced = [shlex.join(argv) for argv in http.commands(destination, artifact)]
    assert [text.replace("--include --upload-file", "--upload-file") for text in ran] == announced
    assert len(announced) == 4
    assert "X-Kind: image" in announced[0]


def test_command_of_the_hint_uploads(nginx: Nginx, artifact: Artifact, login: Path, tmp_path: Path) -> None:
    destination = up(nginx.url, credentials=login, tls=nginx.certificate)
    with proxy(nginx.port, 100) as cutting:
        error = failure(
            dataclasses.replace(destination, target=nginx.url.replace(str(nginx.port), str(cutting.port))), artifact
        )
    assert error.hint is not None
    by_hand = error.hint.partition(": curl ")[2].replace(str(cutting.port), str(nginx.port))
    subprocess.run(f"curl {by_hand}", shell=True, cwd=artifact.path.parent, check=True)
    run("cmp", artifact.path, nginx.root / "images" / NAME)


def test_files_there_are_removed_by_their_names(nginx: Nginx, login: Path, tmp_path: Path) -> None:
    images = nginx.root / "images"
    images.mkdir()
    for name in ("a.raw", "b c+~@.raw", "a.raw.sha256sum"):
        (images / name).write_text("x")
    destination = up(nginx.url, credentials=login, tls=nginx.certificate)
    assert http.remove(destination, ["a.raw", "b c+~@.raw", "gone"]) == {}
    wrong = private(tmp_path / "wrong", f"machine 127.0.0.1 login {USER} password x{PASSWORD}\n")
    left = http.remove(dataclasses.replace(destination, credentials=wrong), ["a.raw.sha256sum"])
    assert [(name, failed.reason, failed.again) for name, failed in left.items()] == [
        ("a.raw.sha256sum", "the server answers 401 Unauthorized", False)
    ]
    assert [path.name for path in images.iterdir()] == ["a.raw.sha256sum"]


def test_certificate_that_is_not_trusted(
    nginx: Nginx, artifact: Artifact, login: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    error = failure(up(nginx.url, credentials=login), artifact)
    assert "self-signed certificate" in error.message
    assert error.hint is not None
    assert error.hint.startswith("If the server's certificate is your own, name its CA's file")
    other = tmp_path / "other"
    other.mkdir()
    certificate, _, pin = make_certificate(other)
    assert "certificate" in failure(up(nginx.url, credentials=login, tls=certificate), artifact).message
    error = failure(up(nginx.url, credentials=login, tls=pin), artifact)
    assert "public key" in error.message
    assert error.hint is not None and error.hint.startswith("The server has another key than upload-tls says")
    assert tries(logged) == 3
    assert not (nginx.root / "images").exists()


def test_wrong_password(nginx: Nginx, artifact: Artifact, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    login = private(tmp_path / "wrong", f"default login {USER} password {PASSWORD}x\n")
    error = failure(up(nginx.url, credentials=login, tls=nginx.certificate), artifact)
    assert error.message == "the server answers 401 Unauthorized"
    assert error.hint is not None and error.hint.startswith("The server wants a login, or another one")
    assert tries(logged) == 1


def test_full_disk_there(nginx: Nginx, artifact: Artifact, login: Path, logged: pytest.LogCaptureFixture) -> None:
    """An older file stays as it was."""
    images = nginx.root / "images"
    images.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", nginx.root)
    try:
        (nginx.root / "tmp").mkdir()
        images.mkdir()
        (images / NAME).write_text("older\n")
        error = failure(up(nginx.url, credentials=login, tls=nginx.certificate), artifact)
        assert error.message == f"the server answers 500 Internal Server Error ({TRIES} tries)"
        assert [path.name for path in images.iterdir()] == [NAME]
        assert (images / NAME).read_text() == "older\n"
    finally:
        run("umount", nginx.root)


def test_method_that_the_server_does_not_take(
    nginx: Nginx, artifact: Artifact, login: Path, logged: pytest.LogCaptureFixture
) -> None:
    destination = up(nginx.url.replace("images", "none"), tls=nginx.certificate)
    error = failure(destination, artifact)
    assert error.message == "the server answers 405 Not Allowed"
    assert error.hint is not None and error.hint.startswith("The server takes another upload-method")
    assert tries(logged) == 1


def test_connection_that_breaks_once(
    nginx: Nginx, artifact: Artifact, login: Path, logged: pytest.LogCaptureFixture
) -> None:
    with proxy(nginx.port, SIZE * 2 // 3, None) as cutting:
        url = nginx.url.replace(str(nginx.port), str(cutting.port))
        http.upload(up(url, credentials=login, tls=nginx.certificate), artifact)
    nginx.check(artifact)
    assert tries(logged) == 2
    assert any(message.endswith("trying again in 0 s.") for message in logged.messages)


def test_connection_that_always_breaks(
    nginx: Nginx, artifact: Artifact, login: Path, logged: pytest.LogCaptureFixture
) -> None:
    """An older file stays as it was, and nothing of the new one is left."""
    images = nginx.root / "images"
    images.mkdir()
    (images / NAME).write_text("older\n")
    with proxy(nginx.port, SIZE // 10) as cutting:
        url = nginx.url.replace(str(nginx.port), str(cutting.port))
        error = failure(up(url, credentials=login, tls=nginx.certificate), artifact)
    assert error.message.endswith(f" ({TRIES} tries)")
    assert tries(logged) == TRIES
    assert [path.name for path in images.iterdir()] == [NAME]
    assert (images / NAME).read_text() == "older\n"


def test_nobody_listens(artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    error = failure(up(f"http://127.0.0.1:{free_port()}/"), artifact)
    assert "Failed to connect" in error.message or "Couldn't connect" in error.message
    assert tries(logged) == TRIES


def test_etag_of_nginx_is_no_checksum(nginx: Nginx, artifact: Artifact, login: Path) -> None:
    error = failure(up(nginx.url, credentials=login, tls=nginx.certificate, verify="etag"), artifact)
    assert error.message.startswith(f"the server can't be asked whether {NAME} is whole: its ETag is ")
    assert error.hint is not None and error.hint.startswith("upload-verify = download reads it back")


# A server that does what no real one can be made to do.


@pytest.mark.parametrize("method", ["put", "post"])
def test_method_and_place_of_the_name(store: Store, artifact: Artifact, method: str) -> None:
    for target in (store.url + "a%20b/", f"{store.url}{NAME}/x?file={NAME}"):
        store.files.clear()
        store.requests.clear()
        http.upload(up(target, method=method), artifact)
        first, second = (f"/{NAME}/x?file={name}" if "?" in target else f"/a%20b/{name}" for name in (NAME, SUM))
        assert store.requests == [(method.upper(), first), ("GET", first), (method.upper(), second), ("GET", second)]
        assert store.files == {first: artifact.path.read_bytes(), second: artifact.checksum_path.read_bytes()}


@pytest.mark.parametrize(
    ("verify", "field", "make"),
    [
        ("header:x-checksum-sha256", "X-Checksum-Sha256", lambda data: hashlib.sha256(data).hexdigest()),
        ("etag", "ETag", lambda data: f'"{hashlib.md5(data).hexdigest()}"'),
        ("etag", "ETag", lambda data: f'"SHA256:{hashlib.sha256(data).hexdigest().upper()}"'),
        (
            "header:Repr-Digest",
            "Repr-Digest",
            lambda data: f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:",
        ),
    ],
)
def test_verified_by_a_field(
    store: Store, artifact: Artifact, verify: str, field: str, make: Callable[[bytes], str],
    monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    store.digest_field = field
    store.make_digest = make
    http.upload(up(store.url, verify=verify), artifact)
    assert [method for method, _ in store.requests] == ["PUT", "HEAD", "PUT", "HEAD"]
    assert sum(message.startswith(f"{NAME} is verified at up: ") for message in logged.messages) == 1


@pytest.mark.parametrize("verify", ["download", "header:X-Checksum-Sha256"])
def test_file_that_is_damaged_there_is_sent_again(
    store: Store, artifact: Artifact, verify: str, logged: pytest.LogCaptureFixture
) -> None:
    store.lies = 1
    http.upload(up(store.url, verify=verify), artifact)
    assert tries(logged) == 2
    store.lies = 99
    error = failure(up(store.url, verify=verify), artifact)
    assert error.message.startswith(f"{NAME} has another ")
    assert error.message.endswith(f" ({TRIES} tries)")
    assert error.hint is not None and error.hint.startswith("It is damaged: look at that machine's disk.")


def test_file_that_is_not_verified_is_told(store: Store, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    store.lies = 99
    http.upload(up(store.url, verify="none"), artifact)
    warnings = [record.message for record in logged.records if record.levelno == logging.WARNING]
    assert warnings == [f"{name} is not verified at up, as upload-verify says." for name in (NAME, SUM)]


def test_field_that_is_not_there(store: Store, artifact: Artifact) -> None:
    error = failure(up(store.url, verify="header:X-None"), artifact)
    assert error.message == f"the server can't be asked whether {NAME} is whole: it has no X-None"


def test_answers_that_may_pass_and_others(store: Store, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    store.answers = [(503, {}), (429, {})]
    http.upload(up(store.url), artifact)
    assert tries(logged) == 3
    for status, hint in (
        (403, "Give the login"),
        (409, "Make the directory"),
        (507, "Make room there."),
        (413, "The server"),
    ):
        logged.clear()
        store.answers = [(status, {})]
        error = failure(up(store.url), artifact)
        assert error.message.startswith(f"the server answers {status} ")
        assert error.message.endswith(": The store refuses it")
        assert error.hint is not None and error.hint.startswith(hint)
        assert tries(logged) == 1


def test_server_that_hangs(store: Store, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_tries, "STALL_SECONDS", 1)
    monkeypatch.setattr(uploads_tries, "PAUSE_SECONDS", ())
    store.hangs = True
    error = failure(up(store.url), artifact)
    assert error.message.startswith("Operation too slow. ") and error.message.endswith("(1 tries)")


def test_signal_ends_an_upload(store: Store, artifact: Artifact) -> None:
    store.hangs = True
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    start = time.monotonic()
    with interrupts.handled(), pytest.raises(Interrupted):
        timer.start()
        http.upload(up(store.url), artifact)
    assert 0.9 < time.monotonic() - start < 100
    assert store.files == {}
    assert run("pgrep", "-f", f"curl .*:{store.port}/", check=False).stdout == ""


def test_server_that_speaks_no_http(artifact: Artifact) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    client.sendall(b"220 mail.example.com ESMTP\r\n")
                    client.close()

        threading.Thread(target=serve, daemon=True).start()
        error = failure(up(f"http://127.0.0.1:{listening.getsockname()[1]}/"), artifact)
    assert error.message


# Logins.


@pytest.mark.parametrize("form", ["netrc", "fields"])
def test_login(store: Store, artifact: Artifact, tmp_path: Path, form: str, logged: pytest.LogCaptureFixture) -> None:
    """It is on no command line, in no log, and masked where a server says it."""
    texts = {
        "netrc": f"# of the images\nmachine 127.0.0.1\n  login {USER}\n  password {PASSWORD}\n",
        "fields": f"Authorization: Bearer {TOKEN}\n\nX-Project: files\n",
    }
    store.login = basic() if form == "netrc" else f"Bearer {TOKEN}"
    destination = up(store.url, credentials=private(tmp_path / "login", texts[form]), tls="none")
    http.check(destination, NAME)
    http.upload(destination, artifact)
    assert set(store.files) == {f"/{NAME}", f"/{SUM}"}
    text = "".join([*logged.messages, *(word for argv in http.commands(destination, artifact) for word in argv)])
    for secret in (PASSWORD, TOKEN, basic().split()[1]):
        assert secret not in text
        if secret in f"{store.login}{texts[form]}":
            assert secret not in masked(f"It was {secret}.")
    assert masked("the files") == "the files"


def test_redirects(store: Store, artifact: Artifact, login: Path) -> None:
    """To the same server they are followed, to another only without a login."""
    with serving(Store()) as other:
        store.answers = [(307, {"Location": "/moved"})]
        http.upload(up(store.url, verify="none"), artifact)
        assert store.files["/moved"] == artifact.path.read_bytes()
        store.answers = [(307, {"Location": f"{other.url}moved"})]
        http.upload(up(store.url, verify="none"), artifact)
        assert other.files["/moved"] == artifact.path.read_bytes()
        other.requests.clear()
        store.login = basic()
        store.answers = [(307, {"Location": f"{other.url}moved"})]
        error = failure(up(store.url, credentials=login, tls="none"), artifact)
        assert error.message == (
            f"the server sends it on to http://127.0.0.1:{other.port}, which is not to get the login"
        )
        assert other.requests == []
        store.login = None
        store.answers = [(307, {"Location": "/"})] * 9
        assert "more than 5 times" in failure(up(store.url), artifact).message


def test_file_that_is_read_back_elsewhere(store: Store, artifact: Artifact, login: Path) -> None:
    """The login does not go there."""
    with serving(Store()) as other:
        store.moved = other.url.rstrip("/")
        other.files = {f"/{path.name}": path.read_bytes() for path in (artifact.path, artifact.checksum_path)}
        http.upload(up(store.url), artifact)
        assert [path for _, path in other.requests] == [f"/{NAME}", f"/{SUM}"]
        store.login = basic()
        error = failure(up(store.url, credentials=login, tls="none"), artifact)
        assert error.message == "it can't be verified: Maximum (0) redirects followed"
        assert len(other.requests) == 2


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("ftp://host/", {}, "[up] upload-target: 'ftp://host/' is no URL that begins with https:// or http://."),
    ("https:///x/", {}, "[up] upload-target: 'https:///x/' is no URL"),
    ("https://host:99999/", {}, "[up] upload-target: 'https://host:99999/' is no URL"),
    ("https://host/ä/", {}, "[up] upload-target: 'https://host/ä/' is no URL"),
    ("https://me:x@host/", {}, "[up] upload-target: a URL is no place for a login."),
    ("https://host/images", {}, "[up] upload-target: it has no place for the names of files."),
    ("http://127.0.0.1/", {"credentials": "good"}, "[up] upload-target: with http:// anyone on the way"),
    ("http://host/", {"tls": "sha256//x"}, "[up] upload-tls: http:// has no TLS."),
    ("https://host/", {"tls": "none"}, "[up] upload-tls: https:// has TLS, and none would trust any server."),
    ("https://host/", {"tls": Path("/absent")}, "[up] upload-tls: /absent is not there."),
    ("https://host/", {"credentials": "absent"}, "[up] upload-credentials: {dir}/absent is not there."),
    ("https://host/", {"credentials": "open"}, "[up] upload-credentials: others may read {dir}/open."),
    ("https://host/", {"credentials": "other"}, "[up] upload-credentials: {dir}/other is another user's file."),
    ("https://host/", {"credentials": "empty"}, "[up] upload-credentials: {dir}/empty is no file of logins."),
    ("https://host/", {"credentials": "words"}, "[up] upload-credentials: {dir}/words is no file of logins."),
    ("https://host/", {"credentials": "binary"}, "[up] upload-credentials: {dir}/binary is no text that can"),
    ("https://host/", {"credentials": "broken"}, "[up] upload-credentials: {dir}/broken is no netrc file: look at"),
    ("https://host/", {"credentials": "good"}, "[up] upload-credentials: {dir}/good has no login and password"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "keys", "message"), BAD)
def test_what_is_refused_before_a_build(tmp_path: Path, target: str, keys: dict[str, Any], message: str) -> None:
    texts = {
        "open": "A: b\n", "other": "A: b\n", "empty": "", "words": f"{USER}:{PASSWORD}\n", "binary": "",
        "broken": f"machine host login {USER} passwort {PASSWORD}\n",
        "good": f"machine 127.0.0.1 login {USER} password {PASSWORD}\n",
    }  # fmt: skip
    for name, text in texts.items():
        private(tmp_path / name, text)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "open").chmod(0o640)
    shutil.chown(tmp_path / "other", 65534)
    if "credentials" in keys:
        keys = keys | {"credentials": tmp_path / keys["credentials"]}
    with pytest.raises(ConfigurationError) as caught:
        http.check(up(target, **keys), NAME)
    assert caught.value.message.startswith(message.format(dir=tmp_path))
    assert PASSWORD not in f"{caught.value.message} {caught.value.hint}"


# --check --online.


def test_probe(store: Store, nginx: Nginx, login: Path, tmp_path: Path) -> None:
    http.probe(up(store.url), tmp_path)
    http.probe(up(nginx.url, tls=nginx.certificate, credentials=login), tmp_path)
    assert store.files == {}
    assert not (nginx.root / "images").exists()
    for destination, reason in [
        (up(nginx.url, tls=nginx.certificate), "the server answers 401 Unauthorized"),
        (up(nginx.url), "self-signed certificate"),
        (up(f"http://127.0.0.1:{free_port()}/"), "connect"),
    ]:
        with pytest.raises(BuildError, match=reason):
            http.probe(destination, tmp_path)


# What curl prints.


@pytest.mark.parametrize(
    ("line", "fraction"),
    [
        ("#####                                 12.5%", 0.125),
        ("######################### 100.0%", 1.0),
        ("-=O=-                     #     #", 0.0),
        ("curl: (55) Send failure", None),
    ],
)
def test_progress(line: str, fraction: float | None) -> None:
    assert curl.parse_progress(line) == fraction


def test_answers_that_only_say_to_go_on_are_none() -> None:
    text = 'HTTP/1.1 100 Continue\r\n\r\nHTTP/2 201 \r\nETag: "a"\r\nX: y: z\r\n\r\nbody\n'
    assert curl.parse_answer(text) == curl.Answer(201, "", {"etag": '"a"', "x": "y: z"}, "body\n")
    assert curl.parse_answer("220 mail\r\n").status == 0


def test_more_is_waited_for_of_a_large_file() -> None:
    words = curl.argv(up("https://host/"), curl.Login(), [], "https://host/", 10**10)
    assert words[words.index("--speed-time") + 1] == str(uploads_tries.STALL_SECONDS + 100)
