"""Servers on loopback that uploads go to, and what breaks a connection to them."""

import base64
import contextlib
import hashlib
import http.server
import itertools
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from image_factory.base.errors import BuildError
from image_factory.configuration.settings import Destination
from image_factory.finishing import checksum
from image_factory.model import Artifact
from image_factory.uploads import UPLOADS, tries

from .conftest import run, wait_for

NAME, SUM = "x-2024-02-29.raw", "x-2024-02-29.raw.sha256sum"
SIZE = 3 << 20
TRIES = len(tries.PAUSE_SECONDS) + 1

USER, PASSWORD, TOKEN = "robin", "sesame-open-77", "eyJhbGciOi.token-99"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "PAUSE_SECONDS", (0.1, 0.1, 0.1))


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="image-factory")
    return caplog


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A file that no compression makes smaller, with its checksum."""
    path = tmp_path / "output" / NAME
    path.parent.mkdir()
    path.write_bytes(os.urandom(SIZE))
    return checksum.add_sha256(Artifact(path, "raw", SIZE))


def failure(destination: Destination, artifact: Artifact) -> BuildError:
    """Return the error of an upload that fails: in one line, with the command in its hint, and without a secret."""
    with pytest.raises(BuildError) as caught:
        UPLOADS[destination.type].upload(destination, artifact)
    error = caught.value
    assert "\n" not in error.message
    assert f"To upload it by hand, in {artifact.path.parent}: " in (error.hint or "")
    assert not any(secret in f"{error.message} {error.hint}" for secret in (PASSWORD, TOKEN))
    return error


# Below those of which the kernel takes one for a connection, so that none comes in between; each process has its own.
_PORTS = itertools.count(20000 + os.getpid() * 64 % 12000)


def free_port() -> int:
    """Return a port on which nobody listens, another at each call."""
    for port in _PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError


@contextlib.contextmanager
def server(port: int, *argv: str | Path, env: dict[str, str] | None = None) -> Iterator[None]:
    """Run a server in the foreground."""
    process = subprocess.Popen([str(word) for word in argv], stdin=subprocess.DEVNULL, env=env)

    def listens() -> bool:
        assert process.poll() is None
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listens, f"{argv[0]} to listen")
        yield
    finally:
        process.terminate()
        process.wait(20)


class Proxy:
    """Passes connections on, and cuts the nth after limits[n] bytes, later ones as the last; None never."""

    def __init__(self, port: int, limits: Sequence[int | None]) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.server.getsockname()[1]
        self.connections = 0
        self._to, self._limits = port, limits
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.server.accept()
                limit = self._limits[min(self.connections, len(self._limits) - 1)]
                self.connections += 1
                there = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._pass, args=(client, there, limit), daemon=True).start()
                threading.Thread(target=self._pass, args=(there, client, None), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while (limit is None or passed < limit) and (data := source.recv(65536)):
                sink.sendall(data)
                passed += len(data)
        # So long it takes to come in.
        time.sleep(0 if limit is None else 0.3)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxy(port: int, *limits: int | None) -> Iterator[Proxy]:
    """Give a proxy in front of *port*."""
    made = Proxy(port, limits)
    try:
        yield made
    finally:
        made.server.close()


@dataclass
class Store:
    """A web server that keeps what it is sent, and what it was asked.

    *answers* are statuses with which it refuses the next requests that bring something, and fields of those answers.
    *digest_field* has the checksum of a file; *lies* is how many times it has another file.  *login* is what it
    wants.  With *hangs* it says nothing once a file has come.  What is asked for is at *moved*, if that is set.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    digest_field: str = "X-Checksum-Sha256"
    make_digest: Callable[[bytes], str] = lambda data: hashlib.sha256(data).hexdigest()
    lies: int = 0
    login: str | None = None
    hangs: bool = False
    moved: str = ""
    port: int = 0

    @property
    def url(self) -> str:
        """The URL of its root."""
        return f"http://127.0.0.1:{self.port}/"


class StoreHandler(http.server.BaseHTTPRequestHandler):
    """Serves a Store."""

    protocol_version = "HTTP/1.1"
    store: ClassVar[Store]

    def handle_expect_100(self) -> bool:
        """Refuse before the body comes, as servers do."""
        if not self._allowed() or self.store.answers:
            self._note()
            self._refuse()
            self.close_connection = True
            return False
        return super().handle_expect_100()

    def _allowed(self) -> bool:
        return self.store.login is None or self.headers.get("Authorization") == self.store.login

    def _refuse(self) -> None:
        status, fields = self.store.answers.pop(0) if self._allowed() else (401, {})
        self.close_connection = True
        self._answer(status, b"The store refuses it.\n", fields)

    def _answer(self, status: int, body: bytes = b"", fields: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "text/plain", "Content-Length": str(len(body)), **(fields or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _note(self) -> None:
        self.store.requests.append((self.command, self.path))

    def _take(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.store.hangs:
            time.sleep(300)
        if not self._allowed() or self.store.answers:
            self._refuse()
            return
        self.store.files[self.path] = body
        self._answer(201, b'{"Path": "x", "Size": 1}\n', {"Content-Type": "application/json"})

    def _give(self) -> None:
        self._note()
        if not self._allowed():
            self._answer(401)
        elif self.store.moved:
            self._answer(302, b"", {"Location": self.store.moved + self.path})
        elif self.path not in self.store.files:
            self._answer(404)
        else:
            body = self.store.files[self.path]
            if self.store.lies:
                self.store.lies -= 1
                body = body[::-1]
            digest = self.store.make_digest(body)
            self._answer(200, body, {self.store.digest_field: digest})

    def _drop(self) -> None:
        self._note()
        if not self._allowed() or self.store.answers:
            self._refuse()
        else:
            self._answer(404 if self.store.files.pop(self.path, None) is None else 204)

    do_PUT = do_POST = _take  # noqa: N815
    do_GET = do_HEAD = _give  # noqa: N815
    do_DELETE = _drop  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def serving(store: Store, handler: type[StoreHandler] = StoreHandler) -> Iterator[Store]:
    """Have *store* served."""
    kind = type("Handler", (handler,), {"store": store})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as listening:
        listening.daemon_threads = True
        listening.block_on_close = False
        store.port = listening.server_address[1]
        threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield store
        finally:
            listening.shutdown()


def basic() -> str:
    """Return the value of the field that has the login."""
    return "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


def make_certificate(directory: Path) -> tuple[Path, Path, str]:
    """Make a certificate for loopback that nobody has signed; return its file, its key's and the pin of that."""
    certificate, key = directory / "own.pem", directory / "own.key"
    run(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-subj", "/CN=own", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-keyout", key, "-out", certificate,
    )  # fmt: skip
    public = subprocess.run(
        f"openssl x509 -in {certificate} -pubkey -noout | openssl pkey -pubin -outform der",
        shell=True, capture_output=True, check=True,
    ).stdout  # fmt: skip
    return certificate, key, "sha256//" + base64.b64encode(hashlib.sha256(public).digest()).decode()
