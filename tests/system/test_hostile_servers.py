"""Servers that answer with anything: each answer is a failure of that server, in time, and the next one is asked."""

import gzip
import io
import math
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from image_factory.base.errors import BuildError
from image_factory.configuration.parsers import Source
from image_factory.downloads import fetch

from .test_fetch import LARGE, Server, rsync, server, verified
from .test_fetch import RsyncDaemon as RsyncDaemon

__all__ = ["rsync", "server"]

Script = Callable[[socket.socket], None]


class RawServer:
    """A server on loopback that does with each connection, once a request has come, what *script* does."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.connections = 0
        self.ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def uri(self, path: str = "/netboot/linux", scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.port}{path}"

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            connection.recv(65536)
            self.script(connection)
            connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.ended.set()
        # A thread that accepts holds it open otherwise.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def raw() -> Iterator[Callable[[Script], RawServer]]:
    servers: list[RawServer] = []

    def make(script: Script) -> RawServer:
        servers.append(RawServer(script))
        return servers[-1]

    yield make
    for found in servers:
        found.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PAUSE_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(fetch, "_TIMEOUT_SECONDS", 0.6)
    monkeypatch.setattr(fetch, "_FILE_SIZE", 1 << 20)
    monkeypatch.setattr(fetch, "LIST_SIZE", 1 << 20)


def says(data: bytes) -> Script:
    return lambda connection: connection.sendall(data)


def redirects(to: bytes) -> bytes:
    return b"HTTP/1.1 302 Found\r\nLocation: " + to + b"\r\nContent-Length: 0\r\n\r\n"


def answers(headers: bytes, body: bytes = b"abc", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 " + status + b"\r\n" + headers + b"\r\n\r\n" + body


LOCATIONS = {
    "empty": b"",
    "no scheme": b"//",
    "no host": b"http:///linux",
    "port 99999": b"http://127.0.0.1:99999/linux",
    "port 0": b"http://127.0.0.1:0/linux",
    "port of letters": b"http://127.0.0.1:abc/linux",
    "negative port": b"http://127.0.0.1:-1/linux",
    "half an IPv6 address": b"http://[::1/linux",
    "host that none can have": b"http://a..b/linux",
    "long host": b"http://" + b"a" * 300 + b"/linux",
    "blank": b"http://127.0.0.1/a b",
    "control character": b"http://127.0.0.1/a\x01",
    "next line": b"http://127.0.0.1/a\r\n Set-Cookie: x",
    "no ASCII": b"http://h\xff\xfe/linux",
    "ftp": b"ftp://127.0.0.1/linux",
    "file": b"file:///etc/passwd",
    "script": b"javascript:alert(1)",
    "twice": b"/a\r\nLocation: /b",
    "itself": b"/netboot/linux",
    "very long": b"/" + b"a" * 70000,
}

ANSWERS = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "bytes": bytes(range(256)) * 8,
    "zeros": bytes(100_000),
    "half a status line": b"HTTP/1.1 2",
    "no status": b"HTTP/1.1\r\n\r\n",
    "status of letters": answers(b"Content-Length: 3", status=b"abc OK"),
    "status 99": answers(b"Content-Length: 3", status=b"99 OK"),
    "status 1000": answers(b"Content-Length: 3", status=b"1000 OK"),
    "another version": b"HTTP/9.9 200 OK\r\nContent-Length: 3\r\n\r\nabc",
    "upgrade": answers(b"Upgrade: h2c", status=b"101 Switching Protocols"),
    "no content": answers(b"X: 1", b"", b"204 No Content"),
    "unasked unchanged": answers(b"X: 1", b"", b"304 Not Modified"),
    "long status line": b"HTTP/1.1 200 " + b"a" * 100_000 + b"\r\n\r\nabc",
    "long header": answers(b"X: " + b"a" * 100_000),
    "many headers": answers(b"\r\n".join([b"X: 1"] * 1000)),
    "length twice": answers(b"Content-Length: 3\r\nContent-Length: 4"),
    "length twice the same": answers(b"Content-Length: 3\r\nContent-Length: 3"),
    "length of letters": answers(b"Content-Length: three"),
    "negative length": answers(b"Content-Length: -3"),
    "length with a sign": answers(b"Content-Length: +3"),
    "length of 5000 digits": answers(b"Content-Length: " + b"9" * 5000),
    "length past the limit": answers(b"Content-Length: 99999999999"),
    "length past what comes": answers(b"Content-Length: 4"),
    "chunk of letters": answers(b"Transfer-Encoding: chunked", b"zz\r\nabc\r\n0\r\n\r\n"),
    "negative chunk": answers(b"Transfer-Encoding: chunked", b"-5\r\nabc\r\n0\r\n\r\n"),
    "vast chunk": answers(b"Transfer-Encoding: chunked", b"f" * 16 + b"\r\nabc"),
    "chunk without end": answers(b"Transfer-Encoding: chunked", b"3\r\nab"),
    "packed transfer": answers(b"Transfer-Encoding: gzip, chunked"),
    "gzip that is none": answers(b"Content-Encoding: gzip"),
    "gzip in half": answers(b"Content-Encoding: gzip", gzip.compress(LARGE)[:-20]),
    "deflate": answers(b"Content-Encoding: deflate"),
    "zlib": answers(b"Content-Encoding: zlib"),
    "unknown encoding": answers(b"Content-Encoding: br"),
    "two encodings": answers(b"Content-Encoding: identity\r\nContent-Encoding: gzip"),
    "packed error page": answers(b"Content-Encoding: deflate\r\nContent-Length: 3", status=b"404 Not Found"),
    "part without a range": answers(b"Content-Length: 3", status=b"206 Partial"),
    "part past the limit": answers(b"Content-Range: bytes 0-2/99999999999", status=b"206 Partial"),
    "part of too many digits": answers(b"Content-Range: bytes 0-2/" + b"9" * 30, status=b"206 Partial"),
    "part the wrong way round": answers(b"Content-Range: bytes 2-0/3", status=b"206 Partial"),
    "range twice": answers(b"Content-Range: bytes 0-2/3\r\nContent-Range: bytes 0-2/4", status=b"206 Partial"),
    "odd challenge": answers(b'WWW-Authenticate: Digest ,,=="\xff, Basic realm', status=b"401 Unauthorized"),
    "long wait": answers(b"Retry-After: 99999999", status=b"503 Busy"),
    **{f"to {name}": redirects(to) for name, to in LOCATIONS.items()},
}


def assert_next_is_asked(bad: RawServer, good: Server, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fetch from *bad*, and from *good* where that fails."""
    source = Source(bad.uri(), None, (good.uri(),))
    found = fetch.fetch_from_mirrors(source, directory, lambda uri: None)
    assert (found.uri, found.path.read_bytes()) == (good.uri(), LARGE)
    assert f"Can't fetch {bad.uri()}: " in caplog.text
    assert "The next mirror is tried." in caplog.text
    assert {path.name for path in directory.iterdir()} == {"linux", ".linux.validators"}


@pytest.mark.parametrize("kind", ANSWERS)
def test_any_answer_is_a_failure_of_that_mirror(
    raw: Callable[[Script], RawServer], server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    assert_next_is_asked(raw(says(ANSWERS[kind])), server, tmp_path, caplog)


def test_what_another_try_may_cure_is_tried_again(raw: Callable[[Script], RawServer]) -> None:
    broken, wrong = raw(says(ANSWERS["length past what comes"])), raw(says(ANSWERS["length of letters"]))
    for bad in (broken, wrong):
        with pytest.raises(BuildError):
            fetch.read(bad.uri())
    assert (broken.connections, wrong.connections) == (3, 1)


def test_redirection_from_https_to_http_is_refused() -> None:
    client = fetch._Client("https://host/linux", 10, io.BytesIO(), lambda message: None, secure=False)
    with pytest.raises(BuildError, match="the server redirects to http://host/linux"):
        client._redirected("https://host/linux", "http://host/linux")
    assert client._redirected("https://host/linux", "other") == "https://host/other"


def changed(data: bytes, number: int) -> bytes:
    """Return *data* with some bytes changed, left out, doubled, or cut off, each time in another way."""
    chance = random.Random(number)
    mutable = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        # More often in the headers.
        at = chance.randrange(len(mutable) if chance.random() < 0.2 else min(200, len(mutable)))
        match chance.randrange(5):
            case 0:
                mutable[at] = chance.randrange(256)
            case 1:
                del mutable[at : at + chance.randint(1, 20)]
            case 2:
                mutable[at:at] = mutable[at : at + 30]
            case 3:
                mutable[at:at] = chance.choice([b"\r\n", b"\n", b"\0", b":", b"9" * 30, b"-", b"\xff", b" "])
            case 4:
                del mutable[max(at, 1) :]
    return bytes(mutable)


def test_answers_with_changes(raw: Callable[[Script], RawServer], tmp_path: Path) -> None:
    """The file that is expected, or one clear error."""
    good = [
        answers(b'ETag: "1"\r\nContent-Length: 2500', LARGE),
        answers(b"Content-Range: bytes 0-2499/2500\r\nContent-Length: 2500", LARGE, b"206 Partial Content"),
        answers(b"Transfer-Encoding: chunked", b"9c4\r\n" + LARGE + b"\r\n0\r\n\r\n"),
        redirects(b"http://127.0.0.1:1/netboot/linux?x=%20#y"),
    ]
    bad = raw(says(b""))
    outcomes = set()
    for number in range(120):
        bad.script = says(changed(good[number % len(good)], number))
        directory = tmp_path / f"{number}"
        directory.mkdir()
        try:
            found = fetch.fetch_from_mirrors(Source(bad.uri()), directory, verified(LARGE))
        except BuildError as error:
            assert error.message.startswith((f"Can't fetch {bad.uri()}: ", f"{bad.uri()} is not what a list lists: "))
            assert "\n" not in error.message
            assert list(directory.iterdir()) == []
            outcomes.add("refused")
        else:
            assert found.path.read_bytes() == LARGE
            outcomes.add("whole")
    assert outcomes == {"refused", "whole"}


# What has no end.


def again(data: bytes, pause: float = 0.0, first: bytes = b"") -> Script:
    """Return a script that sends *data* until nobody reads any more."""

    def script(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(data)
            time.sleep(pause)

    return script


PLAIN = b"HTTP/1.1 200 OK\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = bytes(65536)
ENDLESS = {
    "body": (again(PIECE, first=PLAIN), r"it has more than 1\.0 MiB, which no such file has\.$"),
    "chunks": (again(b"10000\r\n" + PIECE + b"\r\n", first=CHUNKED), r"it has more than 1\.0 MiB"),
    "bomb": (again(PIECE, first=PLAIN.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")), "compresses it"),
    "bytes": (again(b"x", 0.05, PLAIN), r"timed out: [0-9]+ bytes came in 1 s \(3 tries\)\.$"),
    "small chunks": (again(b"1\r\nx\r\n", 0.05, CHUNKED), "timed out"),
    "trailers": (again(b"X: 1\r\n", first=CHUNKED + b"1\r\nx\r\n0\r\n"), "timed out"),
    "headers": (again(b"X: 1\r\n", 0.05, b"HTTP/1.1 200 OK\r\n"), "timed out"),
    "header": (again(b"x", 0.05, b"HTTP/1.1 200 OK\r\nX: "), "timed out"),
    "continue": (again(b"HTTP/1.1 100 Continue\r\n\r\n"), "timed out"),
    "silence": (lambda connection: time.sleep(20), "timed out: 0 bytes came"),
    "error page": (again(PIECE, first=b"HTTP/1.1 404 Not Found\r\n\r\n"), "the server says 404 Not Found"),
    "redirection": (again(PIECE, first=b"HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n"), "more than 5 redirections"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_answer_without_end(
    raw: Callable[[Script], RawServer], server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """It ends for files and for lists, and the next mirror is asked."""
    script, message = ENDLESS[kind]
    bad = raw(script)
    if kind in ("body", "bomb", "bytes"):
        assert_next_is_asked(bad, server, tmp_path, caplog)
    with pytest.raises(BuildError, match=message) as caught:
        fetch.read(bad.uri())
    assert caught.value.message.startswith(f"Can't fetch {bad.uri()}: ")


def test_handshake_without_end(raw: Callable[[Script], RawServer]) -> None:
    bad = raw(lambda connection: time.sleep(20))
    with pytest.raises(BuildError, match="timed out"):
        fetch.read(bad.uri(scheme="https"))


def test_name_that_no_server_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver waits for as long as its configuration says, and no signal ends that."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: time.sleep(60))
    with pytest.raises(BuildError, match="timed out: 0 bytes came"):
        fetch.read("http://a-mirror.example/list")


def test_proxy_that_refuses(raw: Callable[[Script], RawServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, and asked again."""
    proxy = raw(says(b"HTTP/1.1 403 Forbidden by it\r\n\r\n"))
    monkeypatch.setenv("http_proxy", proxy.uri(""))
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(BuildError, match=r"the proxy of http_proxy or https_proxy refuses: .*403.* \(3 tries\)\.$"):
        fetch.read("http://a-mirror.example/list")
    assert proxy.connections == 3


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_proxy_that_is_no_uri(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setenv(name, "http://proxy.example:port")
    with pytest.raises(BuildError, match=f": {name} is no URI\\.$") as caught:
        fetch.read("http://a-mirror.example/list")
    assert caught.value.hint == "Write it as http://HOST:PORT"


def test_library_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.httplib2, "Http", lambda **keywords: os.kill(os.getpid(), 9))
    with pytest.raises(BuildError, match="the process that fetches it was killed by SIGKILL"):
        fetch.read("http://a-mirror.example/list")


@pytest.mark.parametrize("error", [EOFError, ValueError, MemoryError, RecursionError, KeyError, AssertionError])
def test_library_that_raises_anything(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**keywords: object) -> None:
        raise error("a fault")

    monkeypatch.setattr(fetch.httplib2, "Http", fail)
    with pytest.raises(BuildError, match=f"Can't fetch http://a-mirror.example/list: {error.__name__} .?a fault"):
        fetch.read("http://a-mirror.example/list")


def test_download_that_does_not_come_ends_within_90_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert fetch.TRIES * fetch._TIMEOUT_SECONDS + sum(fetch._PAUSE_SECONDS) < 90


# rsync.


def test_rsync_of_a_file_that_is_too_large(rsync: RsyncDaemon, tmp_path: Path) -> None:
    (rsync.root / "linux").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(BuildError, match=r"it has more than 1\.0 MiB, which no such file has\.$"):
        fetch.fetch(Source(rsync.uri()), tmp_path / "cache")
    with pytest.raises(BuildError, match=r"it has more than 1\.0 MiB"):
        fetch.read(rsync.uri())


def test_rsync_of_a_server_that_says_nothing(
    raw: Callable[[Script], RawServer], server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = raw(lambda connection: time.sleep(20))
    found = fetch.fetch_from_mirrors(Source(bad.uri(scheme="rsync"), None, (server.uri(),)), tmp_path, lambda uri: None)
    assert found.uri == server.uri()
    assert re.search(r"Can't fetch rsync://\S+: .*(timed out|timeout|status 30|status 35)", caplog.text)


def test_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow download goes on as long as enough comes in each while, however long it takes in all."""
    now = [0.0]
    monkeypatch.setattr(fetch.time, "monotonic", lambda: now[0])
    pace = fetch._Pace("http://h/linux", 1 << 30)
    enough = math.ceil(fetch._LEAST_RATE * fetch._TIMEOUT_SECONDS)
    for number in range(1, 100):
        now[0] += fetch._TIMEOUT_SECONDS - 0.1
        pace.watch((number * enough, 1 << 30))
    now[0] += fetch._TIMEOUT_SECONDS + 0.1
    with pytest.raises(fetch._Transient, match=f"timed out: {enough - 1} bytes came"):
        pace.watch((number * enough + enough - 1, 1 << 30))
