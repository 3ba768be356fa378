"""Downloads: whole and up to date in the cache, or an error and the cache as it was."""

import base64
import copy
import gzip
import hashlib
import os
import random
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.parsers import Source, parse_source
from image_factory.downloads import fetch

from ..conftest import wait_for

OLD = b"old content\n"
PART = 1000
# Three parts, the last one short.
LARGE = random.Random(1).randbytes(2500)


class Handler(BaseHTTPRequestHandler):
    """Answers as the test's script says; keeps what was asked."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        # This object serves all requests of a connection.
        self.server.requests.append(copy.copy(self))
        self.server.script(self)

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        """Answer with *content*; the underscores in *headers* are dashes."""
        self.send_response(status)
        fields = {"content_length": str(len(content))} | headers
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def break_off(self, *, reset: bool = False) -> None:
        """End the connection."""
        self.wfile.flush()
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.wfile = open(os.devnull, "wb")  # noqa: SIM115

    def asked_range(self) -> tuple[int, int] | None:
        words = self.headers.get("range", "").removeprefix("bytes=").split("-")
        return (int(words[0]), int(words[1])) if len(words) == 2 else None


class Server(ThreadingHTTPServer):
    """A server on loopback that *script* answers for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[Handler] = []
        self.script: Callable[[Handler], None] = File(LARGE)

    def uri(self, path: str = "/netboot/linux") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, *arguments: Any) -> None:
        pass

    @property
    def ranges(self) -> list[str | None]:
        return [request.headers.get("range") for request in self.requests]


@dataclass
class File:
    """A file as a good server has it, in the ways in which good servers differ."""

    content: bytes
    etag: str | None = '"1"'
    modified: float | None = None
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)

    def __call__(self, request: Handler) -> None:
        headers = dict(self.headers)
        if self.etag:
            headers["etag"] = self.etag
        if self.modified:
            headers["last_modified"] = formatdate(self.modified, usegmt=True)
        if self._unchanged(request):
            request.send_response(304)
            request.end_headers()
            return
        asked = request.asked_range() if self.ranges else None
        validators = (None, headers.get("etag"), headers.get("last_modified"))
        if not asked or request.headers.get("if-range") not in validators:
            request.answer(self.content, **headers)
        elif asked[0] >= len(self.content):
            request.answer(b"", 416, content_range=f"bytes */{len(self.content)}")
        else:
            part = self.content[asked[0] : asked[1] + 1]
            where = f"bytes {asked[0]}-{asked[0] + len(part) - 1}/{len(self.content)}"
            request.answer(part, 206, content_range=where, **headers)

    def _unchanged(self, request: Handler) -> bool:
        if "if-none-match" in request.headers:
            return request.headers["if-none-match"] == self.etag
        since = request.headers.get("if-modified-since")
        return since is not None and self.modified is not None and since == formatdate(self.modified, usegmt=True)


def in_turn(*scripts: Callable[[Handler], None]) -> Callable[[Handler], None]:
    """Return a script that takes the next one of *scripts* each time, the last one for the rest."""
    waiting = list(scripts)
    return lambda request: (waiting.pop(0) if len(waiting) > 1 else waiting[0])(request)


def status(number: int) -> Callable[[Handler], None]:
    return lambda request: request.answer(b"an error page\n", number)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PAUSE_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(fetch, "_PART_SIZE", PART)
    monkeypatch.setattr(fetch, "_TIMEOUT_SECONDS", 5.0)


class Cache:
    """The directory with the downloads of an image."""

    def __init__(self, directory: Path, image: str = "x") -> None:
        self.directory = directory / "cache" / image

    def fetch(self, uri: str) -> Path:
        return fetch.fetch(parse_source(uri), self.directory)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.directory.iterdir()}

    def content(self, name: str = "linux") -> bytes:
        """Return the cached file's content; what else there is are its validators."""
        files = self.files()
        assert set(files) <= {name, f".{name}.validators"}
        return files[name]

    def fails(self, uri: str) -> BuildError:
        """Fetch *uri* in vain, with an empty cache and with a file in it that has to stay."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for kept in ({}, {"linux": OLD}):
            for name, content in kept.items():
                (self.directory / name).write_bytes(content)
            with pytest.raises(BuildError) as caught:
                self.fetch(uri)
            assert self.files() == kept
        (self.directory / "linux").unlink()
        assert caught.value.exit_status == 1
        assert "\n" not in caught.value.message
        assert caught.value.message.startswith(f"Can't fetch {uri}: ")
        return caught.value


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


# Files that are had.

KINDS = {
    "etag": File(LARGE),
    "modified": File(LARGE, etag=None, modified=1e9),
    "both": File(LARGE, modified=1e9),
    "weak etag": File(LARGE, etag='W/"1"', modified=1e9),
    "no validators": File(LARGE, etag=None),
    "no ranges": File(LARGE, ranges=False),
    "no ranges, no validators": File(LARGE, ranges=False, etag=None),
    "one part": File(LARGE[:PART]),
    "one byte more": File(LARGE[: PART + 1]),
    "less than a part": File(b"x"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_file_is_fetched_whole(server: Server, cache: Cache, kind: str) -> None:
    server.script = KINDS[kind]
    path = cache.fetch(server.uri())
    assert path == cache.directory / "linux"
    assert cache.content() == KINDS[kind].content
    assert path.stat().st_mode & 0o777 == 0o644
    parts = -(-len(KINDS[kind].content) // PART) if KINDS[kind].ranges else 1
    assert len(server.requests) == parts
    assert all(request.headers["accept-encoding"] == "identity" for request in server.requests)


@pytest.mark.parametrize("kind", ["etag", "modified", "both", "weak etag", "no ranges", "one part"])
def test_unchanged_file_is_not_downloaded_again(server: Server, cache: Cache, kind: str) -> None:
    server.script = KINDS[kind]
    before = cache.fetch(server.uri()).stat()
    server.requests.clear()
    after = cache.fetch(server.uri()).stat()
    assert len(server.requests) == 1
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize(
    "changed",
    [
        File(b"new", etag='"2"', modified=2e9),
        File(b"new", etag=None, modified=2e9),
        File(b"new", etag='"2"', ranges=False),
        File(b"new", etag=None),
        File(bytes(reversed(LARGE)), etag='"2"'),
    ],
)
def test_changed_file_is_downloaded_again(server: Server, cache: Cache, changed: File) -> None:
    server.script = File(LARGE, modified=1e9)
    cache.fetch(server.uri())
    server.script = changed
    cache.fetch(server.uri())
    assert cache.content() == changed.content
    server.requests.clear()
    server.script = File(b"newer", etag='"3"', modified=2.1e9)
    cache.fetch(server.uri())
    assert cache.content() == b"newer"


@pytest.mark.parametrize("content", [LARGE[:-1], LARGE + b"x", b""])
def test_cached_file_of_another_length_is_fetched_again(server: Server, cache: Cache, content: bytes) -> None:
    cache.fetch(server.uri()).write_bytes(content)
    cache.fetch(server.uri())
    assert cache.content() == LARGE


def test_cached_file_that_is_gone_is_fetched_again(server: Server, cache: Cache) -> None:
    cache.fetch(server.uri()).unlink()
    cache.fetch(server.uri())
    assert cache.content() == LARGE


@pytest.mark.parametrize("validators", [b"", b"{}", b"[]", b"\xff", b"null", b'{"uri": 1'])
def test_broken_validators_do_not_matter(server: Server, cache: Cache, validators: bytes) -> None:
    cache.fetch(server.uri())
    (cache.directory / ".linux.validators").write_bytes(validators)
    cache.fetch(server.uri())
    assert cache.content() == LARGE


def test_file_of_the_same_name_from_elsewhere_is_another(server: Server, cache: Cache) -> None:
    """With the same validators even."""
    cache.fetch(server.uri("/bookworm/linux"))
    server.script = File(b"trixie")
    cache.fetch(server.uri("/trixie/linux"))
    assert cache.content() == b"trixie"


def test_name_in_the_cache(server: Server, cache: Cache) -> None:
    assert cache.fetch(server.uri("/a%20b/initrd%2Bx.gz?version=1#here")).name == "initrd+x.gz"


def test_long_name(server: Server, cache: Cache) -> None:
    name = "a" * 240
    assert cache.fetch(server.uri(f"/{name}")).name == name
    assert cache.content(name) == LARGE


def test_large_parts_are_of_one_file(server: Server, cache: Cache) -> None:
    cache.fetch(server.uri())
    assert server.ranges == ["bytes=0-999", "bytes=1000-1999", "bytes=2000-2499"]
    assert [request.headers.get("if-range") for request in server.requests] == [None, '"1"', '"1"']


def test_server_that_sends_smaller_parts_than_asked_for(server: Server, cache: Cache) -> None:
    def miserly(request: Handler) -> None:
        asked = request.asked_range()
        assert asked
        part = LARGE[asked[0] : asked[0] + 600]
        last = asked[0] + len(part) - 1
        request.answer(part, 206, content_range=f"bytes {asked[0]}-{last}/{len(LARGE)}")

    server.script = miserly
    cache.fetch(server.uri())
    assert cache.content() == LARGE


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("missing", [0, 50])
def test_content_encoding(server: Server, cache: Cache, ranges: bool, missing: int) -> None:
    """From a server that compresses though it was asked not to, nobody knows whether it's the whole file."""
    packed = gzip.compress(LARGE)
    server.script = File(packed[: len(packed) - missing], ranges=ranges, headers={"content_encoding": "gzip"})
    message = cache.fails(server.uri("/linux")).message
    # A part can't even be unpacked.
    assert "the server compresses it" in message or "FailedToDecompressContent" in message


def test_name_that_ends_in_gz_is_left_as_it_is(server: Server, cache: Cache) -> None:
    server.script = File(gzip.compress(LARGE), headers={"content_type": "application/gzip"})
    cache.fetch(server.uri("/initrd.gz"))
    assert gzip.decompress(cache.content("initrd.gz")) == LARGE


def test_chunked_answer(server: Server, cache: Cache) -> None:
    def chunked(request: Handler) -> None:
        request.send_response(200)
        request.send_header("transfer-encoding", "chunked")
        request.end_headers()
        request.wfile.write(b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n")

    server.script = chunked
    cache.fetch(server.uri())
    assert cache.content() == b"abcdefg"


def test_validators_are_of_the_file_that_is_cached(server: Server, cache: Cache) -> None:
    """Those of an older one would tell the server that we have what it has gone back to."""
    for version in (File(LARGE), File(LARGE[::-1], etag=None), File(LARGE)):
        server.script = version
        cache.fetch(server.uri())
        assert cache.content() == version.content


def test_login_in_the_uri(server: Server, cache: Cache) -> None:
    """The server gets it, on a way that leads back to it too; another one does not."""
    server.script = lambda request: (File(LARGE) if request.path == "/there" else redirect("/there"))(request)
    cache.fetch(server.uri().replace("//", "//me:p%40ss@"))
    assert cache.content() == LARGE
    logins = [request.headers["authorization"] for request in server.requests]
    assert logins == [f"Basic {base64.b64encode(b'me:p@ss').decode()}"] * 4
    server.requests.clear()
    absolute = redirect(server.uri("/there"))
    server.script = lambda request: (File(LARGE) if request.path == "/there" else absolute)(request)
    cache.fetch(server.uri("/other/linux").replace("//127", "//me:p%40ss@127"))
    assert [bool(request.headers["authorization"]) for request in server.requests] == [True, False, False, False]


# Redirections.


def redirect(to: str, number: int = 302) -> Callable[[Handler], None]:
    return lambda request: request.answer(b"moved\n", number, location=to)


@pytest.mark.parametrize("number", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("relative", [False, True])
def test_redirection(server: Server, cache: Cache, number: int, relative: bool) -> None:
    """Followed once, not for each part, and an unchanged file behind it isn't downloaded again."""
    mirror = "../mirror/linux" if relative else server.uri("/mirror/linux")

    def script(request: Handler) -> None:
        (File(LARGE) if request.path == "/mirror/linux" else redirect(mirror, number))(request)

    server.script = script
    assert cache.fetch(server.uri()).name == "linux"
    assert cache.content() == LARGE
    assert [request.path for request in server.requests] == ["/netboot/linux", *["/mirror/linux"] * 3]
    server.requests.clear()
    before = (cache.directory / "linux").stat().st_ino
    cache.fetch(server.uri())
    assert [request.path for request in server.requests] == ["/netboot/linux", "/mirror/linux"]
    assert (cache.directory / "linux").stat().st_ino == before


def test_redirection_without_end(server: Server, cache: Cache) -> None:
    server.script = redirect("/netboot/linux")
    assert "more than 5 redirections" in cache.fails(server.uri()).message


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/linux", "file:///etc/passwd"])
def test_redirection_to_another_scheme(server: Server, cache: Cache, to: str) -> None:
    server.script = redirect(to)
    assert cache.fails(server.uri()).message.endswith(f": the server redirects to {to}.")


def test_redirection_to_nowhere(server: Server, cache: Cache) -> None:
    server.script = lambda request: request.answer(b"moved\n", 302)
    assert "the server says 302" in cache.fails(server.uri()).message


# Failures that another try won't cure.


@pytest.mark.parametrize("number", [400, 401, 403, 404, 410])
def test_refusal_is_not_tried_again(server: Server, cache: Cache, number: int) -> None:
    server.script = status(number)
    error = cache.fails(server.uri())
    assert f": the server says {number} " in error.message
    assert bool(error.hint) is (number in (404, 410))
    assert len(server.requests) == 2  # once for each of the two states of the cache


def test_refusal_of_a_later_part(server: Server, cache: Cache) -> None:
    server.script = lambda request: (status(403) if (request.asked_range() or (0,))[0] else File(LARGE))(request)
    assert ": the server says 403 Forbidden." in cache.fails(server.uri()).message


@pytest.mark.parametrize("empty", [File(b""), File(b"", ranges=False), File(b"", etag=None)])
def test_empty_file(server: Server, cache: Cache, empty: File) -> None:
    server.script = empty
    assert cache.fails(server.uri()).message.endswith(": the file there is empty.")


def test_unasked_not_modified(server: Server, cache: Cache) -> None:
    def script(request: Handler) -> None:
        request.send_response(304)
        request.end_headers()

    server.script = script
    assert "the server says 304" in cache.fails(server.uri()).message


@pytest.mark.parametrize("where", ["bytes 5-1004/2500", "bytes 0-998/2500", "pages 1-2/3", "bytes 0-999/*", ""])
def test_part_that_was_not_asked_for(server: Server, cache: Cache, where: str) -> None:
    server.script = lambda request: request.answer(LARGE[:PART], 206, content_range=where)
    assert cache.fails(server.uri()).message.endswith(": the server sent another part than was asked for.")


def test_host_name_that_none_can_have(cache: Cache) -> None:
    cache.fails("http://a..b/linux")


# Failures that another try may cure.


def breaks_off(request: Handler) -> None:
    """Promise the whole file, send a part and go."""
    request.send_response(200)
    request.send_header("content-length", str(len(LARGE)))
    request.end_headers()
    request.wfile.write(LARGE[:700])
    request.break_off()


def breaks_off_in_a_part(request: Handler) -> None:
    """Of a file without validators."""
    asked = request.asked_range()
    if not asked or asked[0] < PART:
        File(LARGE, etag=None)(request)
        return
    request.send_response(206)
    request.send_header("content-length", str(PART))
    request.send_header("content-range", f"bytes {asked[0]}-{asked[1]}/{len(LARGE)}")
    request.end_headers()
    request.wfile.write(LARGE[asked[0] : asked[0] + 10])
    request.break_off()


def breaks_off_in_a_chunk(request: Handler) -> None:
    request.send_response(200)
    request.send_header("transfer-encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"100\r\nabc")
    request.break_off()


def resets(request: Handler) -> None:
    request.break_off(reset=True)


def says_nothing(request: Handler) -> None:
    request.break_off()


def talks_nonsense(request: Handler) -> None:
    request.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    request.break_off()


TRANSIENT = {
    "500": status(500),
    "502": status(502),
    "503": status(503),
    "408": status(408),
    "429": status(429),
    "breaks off": breaks_off,
    "breaks off in a part": breaks_off_in_a_part,
    "breaks off in a chunk": breaks_off_in_a_chunk,
    "reset": resets,
    "no answer": says_nothing,
    "nonsense": talks_nonsense,
}


@pytest.mark.parametrize("kind", TRANSIENT)
def test_failure_that_stays(server: Server, cache: Cache, kind: str) -> None:
    server.script = TRANSIENT[kind]
    message = cache.fails(server.uri()).message
    assert message.endswith(" (3 tries).")
    if kind.isdigit():
        assert f": the server says {kind} " in message
        assert len(server.requests) == 6  # for the two states of the cache


@pytest.mark.parametrize("kind", TRANSIENT)
@pytest.mark.parametrize("times", [1, 2])
def test_failure_that_passes(server: Server, cache: Cache, kind: str, times: int) -> None:
    first = [File(LARGE, etag=None)] if kind == "breaks off in a part" else []
    server.script = in_turn(*[*first, TRANSIENT[kind]] * times, File(LARGE))
    cache.fetch(server.uri())
    assert cache.content() == LARGE


@pytest.mark.parametrize("same", [{}, {"etag": None, "modified": 1e9}])
def test_what_has_come_stays_when_the_connection_breaks(server: Server, cache: Cache, same: dict[str, Any]) -> None:
    server.script = in_turn(File(LARGE, **same), breaks_off_in_a_part, breaks_off_in_a_part, File(LARGE, **same))
    cache.fetch(server.uri())
    assert cache.content() == LARGE
    assert server.ranges == [f"bytes={part}" for part in ("0-999", "1000-1999", "1010-2009", "1020-2019", "2020-2499")]


@pytest.mark.parametrize("first", [File(LARGE, etag=None), File(LARGE, etag='W/"1"')])
def test_without_a_validator_all_is_fetched_again(server: Server, cache: Cache, first: File) -> None:
    server.script = in_turn(first, breaks_off_in_a_part, File(LARGE))
    cache.fetch(server.uri())
    assert server.ranges[:3] == ["bytes=0-999", "bytes=1000-1999", "bytes=0-999"]
    assert cache.content() == LARGE


def test_file_that_changes_when_the_connection_breaks(server: Server, cache: Cache) -> None:
    new = File(LARGE[::-1], etag='"2"')
    server.script = in_turn(File(LARGE), breaks_off_in_a_part, new)
    cache.fetch(server.uri())
    assert cache.content() == new.content


def test_wrong_part_that_breaks_off(server: Server, cache: Cache) -> None:
    """It is not taken for a piece of the file."""

    def wrong(request: Handler) -> None:
        request.send_response(206)
        request.send_header("content-length", str(PART))
        request.send_header("content-range", f"bytes 500-1499/{len(LARGE)}")
        request.end_headers()
        request.wfile.write(LARGE[500:510])
        request.break_off()

    server.script = lambda request: (wrong if (request.asked_range() or (0,))[0] else File(LARGE))(request)
    assert cache.fails(server.uri()).message.endswith(": the server sent another part than was asked for.")


def test_pause_between_tries(server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PAUSE_SECONDS", (0.2, 0.4))
    server.script = in_turn(status(500), status(500), File(LARGE))
    start = time.monotonic()
    cache.fetch(server.uri())
    assert time.monotonic() - start >= 0.6


def test_timeout(server: Server, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_TIMEOUT_SECONDS", 1.0)
    released = threading.Event()
    server.script = lambda request: (released.wait(200), request.break_off())[1]
    start = time.monotonic()
    try:
        assert "timed out" in cache.fails(server.uri()).message
    finally:
        released.set()
    assert time.monotonic() - start < 100
    assert len(server.requests) == 6


def test_refused_connection(cache: Cache) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert "refused" in cache.fails(f"http://127.0.0.1:{port}/linux").message


def test_unknown_host(cache: Cache) -> None:
    assert "host.invalid" in cache.fails("http://host.invalid/linux").message


@pytest.mark.parametrize(
    "new",
    [
        File(LARGE[::-1], etag='"2"'),
        File(LARGE[::-1], etag=None, modified=2e9),
        File(LARGE[::-1] * 2, etag='"2"'),
        File(LARGE[:1500], etag='"2"'),
        File(LARGE[:500], etag='"2"'),
    ],
)
def test_file_that_changes_between_its_parts(server: Server, cache: Cache, new: File) -> None:
    """No mixture: the new file, or an error."""
    old = File(LARGE) if new.etag else File(LARGE, etag=None, modified=1e9)
    server.script = in_turn(old, new)
    cache.fetch(server.uri())
    assert cache.content() == new.content


def test_file_that_changes_all_the_time(server: Server, cache: Cache) -> None:
    def script(request: Handler) -> None:
        File(LARGE, etag=f'"{len(server.requests)}"')(request)

    server.script = script
    assert "the file changed on the server meanwhile" in cache.fails(server.uri()).message


def test_size_that_changes_between_parts_without_validators(server: Server, cache: Cache) -> None:
    server.script = in_turn(*[File(LARGE, etag=None), File(LARGE * 2, etag=None)] * 3, status(404))
    with pytest.raises(BuildError, match="the file changed on the server meanwhile"):
        cache.fetch(server.uri())
    assert cache.files() == {}


def test_failure_after_a_good_fetch_keeps_file_and_validators(server: Server, cache: Cache) -> None:
    cache.fetch(server.uri())
    before = cache.files()
    assert set(before) == {"linux", ".linux.validators"}
    for script in (status(404), breaks_off, in_turn(File(LARGE[::-1], etag='"2"'), status(403))):
        server.script = script
        with pytest.raises(BuildError):
            cache.fetch(server.uri())
        assert cache.files() == before
    server.script = File(LARGE)
    server.requests.clear()
    cache.fetch(server.uri())
    assert len(server.requests) == 1


# The cache itself.


def test_full_cache(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path / "cache"], check=True)
    try:
        cache = Cache(tmp_path)
        server.script = File(random.Random(2).randbytes(100_000), ranges=False)
        with pytest.raises(BuildError, match=r"Can't write .*/linux: No space left on device\."):
            cache.fetch(server.uri())
        assert cache.files() == {}
    finally:
        subprocess.run(["umount", tmp_path / "cache"], check=True)


def test_cache_that_can_not_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(BuildError, match=r"The cache .*/cache/x can't be made: "):
        Cache(tmp_path).fetch(server.uri())
    assert server.requests == []


@pytest.mark.parametrize("path", ["/netboot/", "/..", "/a/%2e%2e", "/."])
def test_uri_that_names_no_file(server: Server, cache: Cache, path: str) -> None:
    with pytest.raises(ConfigurationError, match="names no file"):
        cache.fetch(server.uri(path))
    assert not cache.directory.exists()


def test_name_with_a_slash_in_it_stays_in_the_cache(server: Server, cache: Cache) -> None:
    with pytest.raises(ConfigurationError, match="names no file"):
        cache.fetch(server.uri("/a/..%2f..%2fescaped"))
    assert not list(cache.directory.parent.parent.rglob("escaped"))


@pytest.mark.parametrize("form", ["{path}", "file:{path}", "file://{path}", "file://localhost{path}"])
def test_local_file_is_used_in_place(cache: Cache, tmp_path: Path, form: str) -> None:
    (tmp_path / "linux").write_bytes(LARGE)
    assert cache.fetch(form.format(path=tmp_path / "linux")) == tmp_path / "linux"
    assert not cache.directory.exists()


# rsync.


@dataclass
class RsyncDaemon:
    """An rsync daemon with one module, of the directory *root*."""

    root: Path
    port: int
    log: Path

    def uri(self, path: str = "linux") -> str:
        return f"rsync://127.0.0.1:{self.port}/pub/{path}"

    def connections(self) -> int:
        return self.log.read_text().count("connect from") if self.log.exists() else 0


@pytest.fixture
def rsync(tmp_path: Path) -> Iterator[RsyncDaemon]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    found = RsyncDaemon(tmp_path / "pub", port, tmp_path / "rsyncd.log")
    found.root.mkdir()
    configuration = tmp_path / "rsyncd.conf"
    configuration.write_text(
        f"use chroot = no\nuid = root\ngid = root\nlog file = {found.log}\nmotd file = {tmp_path}/motd\n"
        f"[pub]\npath = {found.root}\nread only = yes\n"
    )
    (tmp_path / "motd").write_text("Welcome to the mirror\n")
    program = shutil.which("rsync")
    assert program
    argv = [program, "--daemon", "--no-detach", "--address=127.0.0.1", f"--port={port}", f"--config={configuration}"]

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        try:
            wait_for(listens, "rsync to listen")
            yield found
        finally:
            process.terminate()


def test_rsync(rsync: RsyncDaemon, cache: Cache) -> None:
    (rsync.root / "linux").write_bytes(LARGE)
    path = cache.fetch(rsync.uri())
    assert (path, cache.content()) == (cache.directory / "linux", LARGE)
    before = path.stat()
    cache.fetch(rsync.uri())
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (rsync.root / "linux").write_bytes(b"new")
    cache.fetch(rsync.uri())
    assert cache.content() == b"new"


def test_rsync_where_the_cache_has_a_large_old_file(
    rsync: RsyncDaemon, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read: no byte comes meanwhile."""
    monkeypatch.setattr(fetch, "_TIMEOUT_SECONDS", 1.0)
    (rsync.root / "linux.iso").write_bytes(LARGE)
    cache.directory.mkdir(parents=True)
    with (cache.directory / "linux.iso").open("wb") as old:
        old.truncate(32 << 30)
    cache.fetch(rsync.uri("linux.iso"))
    assert cache.content("linux.iso") == LARGE


def test_rsync_follows_a_link_on_the_server(rsync: RsyncDaemon, cache: Cache) -> None:
    (rsync.root / "linux-6.1").write_bytes(LARGE)
    (rsync.root / "linux").symlink_to("linux-6.1")
    assert not cache.fetch(rsync.uri()).is_symlink()
    assert cache.content() == LARGE


def test_rsync_of_a_missing_file(rsync: RsyncDaemon, cache: Cache) -> None:
    message = cache.fails(rsync.uri()).message
    assert ": rsync failed with status 23: " in message
    assert "tries" not in message


def test_rsync_of_an_unknown_module(rsync: RsyncDaemon, cache: Cache) -> None:
    assert "rsync failed with status 5" in cache.fails(rsync.uri("../other/linux").replace("pub/../", "")).message


def test_rsync_of_an_empty_file(rsync: RsyncDaemon, cache: Cache) -> None:
    (rsync.root / "linux").touch()
    assert cache.fails(rsync.uri()).message.endswith(": what is there is empty, or no file.")


def test_rsync_of_a_directory(rsync: RsyncDaemon, cache: Cache) -> None:
    (rsync.root / "linux").mkdir()
    assert cache.fails(rsync.uri()).message.endswith(": what is there is empty, or no file.")


def test_rsync_without_a_daemon(cache: Cache) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        message = cache.fails(f"rsync://127.0.0.1:{port}/pub/linux").message
    assert "rsync failed with status 10: " in message
    assert message.endswith(" (3 tries).")


def test_rsync_is_tried_again(rsync: RsyncDaemon, cache: Cache, tmp_path: Path) -> None:
    """The first connections come to a port that hangs up, in front of the daemon."""
    (rsync.root / "linux").write_bytes(LARGE)
    with socket.create_server(("127.0.0.1", 0)) as front:
        port = front.getsockname()[1]

        def serve() -> None:
            for _ in range(2):
                front.accept()[0].close()
            client, _ = front.accept()
            with socket.create_connection(("127.0.0.1", rsync.port)) as daemon:
                back = threading.Thread(target=copy, args=(daemon, client))
                back.start()
                copy(client, daemon)
                back.join()
            client.close()

        def copy(source: socket.socket, target: socket.socket) -> None:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve)
        thread.start()
        cache.fetch(f"rsync://127.0.0.1:{port}/pub/linux")
        thread.join(20)
    assert cache.content() == LARGE


# The length of a file is no matter.


def test_memory_is_that_of_a_part(server: Server, tmp_path: Path) -> None:
    """A file of 300 MiB, in a process of its own, as the server's memory is this one's."""
    size = 300 << 20
    block = random.Random(3).randbytes(1 << 20)

    def script(request: Handler) -> None:
        asked = request.asked_range()
        assert asked
        count = min(asked[1] + 1, size) - asked[0]
        # All parts but the last one are of whole blocks.
        where = f"bytes {asked[0]}-{asked[0] + count - 1}/{size}"
        request.answer(block * (count >> 20), 206, content_range=where, etag='"1"')

    server.script = script
    program = (
        "import re, sys; from pathlib import Path; from image_factory.configuration import parsers\n"
        "from image_factory.downloads import fetch\n"
        # Not getrusage's: at the start that is the parent's.
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "fetch.fetch(parsers.parse_source(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-c", program, server.uri(), tmp_path],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    with (tmp_path / "linux").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    expected = hashlib.sha256()
    for _ in range(size >> 20):
        expected.update(block)
    assert digest == expected.digest()
    assert int(done.stdout) < 40 << 10, "KiB more than before"


def test_source_of_a_path_is_not_read(tmp_path: Path) -> None:
    """That is the check's business, before the build."""
    absent = tmp_path / "absent"
    assert fetch.fetch(Source(str(absent), absent), tmp_path / "cache") == absent


# What a killed build has left.


def test_left_temporary_files_are_removed(tmp_path: Path, server: Server) -> None:
    left = [".linux.abcd_123", "..linux.validators.x1234567", ".linux.AbC123"]
    kept = ["other", ".other.validators", "linux.old", ".x"]
    for name in left + kept:
        (tmp_path / name).touch()
    fetch.fetch(parse_source(server.uri()), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & set(left)
    assert names >= {*kept, "linux"}


def test_one_build_at_a_time_writes_to_the_cache(tmp_path: Path, server: Server) -> None:
    done = threading.Event()

    def fetch_it() -> None:
        fetch.fetch(parse_source(server.uri()), tmp_path)
        done.set()

    with fetch.locked(tmp_path):
        threading.Thread(target=fetch_it, daemon=True).start()
        assert not done.wait(0.5)
        assert not (tmp_path / "linux").exists()
    assert done.wait(10)


# What other images have in the cache.


def verified(content: bytes, by: str = "a test") -> fetch.Expect:
    expected = fetch.Expected(hashlib.sha256(content).hexdigest(), "a list", by)
    return lambda uri: expected


def test_file_of_another_image_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    """The server is asked whether it is still the same."""
    first, second = Cache(tmp_path, "a"), Cache(tmp_path, "b")
    first.fetch(server.uri())
    asked = len(server.requests)
    second.fetch(server.uri())
    assert second.content() == LARGE
    (request,) = server.requests[asked:]
    assert request.headers["if-none-match"] == '"1"'
    # And from then on as with its own.
    second.fetch(server.uri())
    assert [request.headers["if-none-match"] for request in server.requests[asked:]] == ['"1"', '"1"']
    assert not [name for name in second.files() if fetch._TEMPORARY.fullmatch(name)]


def test_file_of_another_image_that_has_changed_on_the_server(server: Server, tmp_path: Path) -> None:
    """The other image's stays as it is."""
    first, second = Cache(tmp_path, "a"), Cache(tmp_path, "b")
    first.fetch(server.uri())
    server.script = File(OLD, etag='"2"')
    second.fetch(server.uri())
    assert (first.content(), second.content()) == (LARGE, OLD)


@pytest.mark.parametrize("what", ["another URI", "no validators", "another length", "a link"])
def test_file_of_another_image_that_may_be_another(server: Server, tmp_path: Path, what: str) -> None:
    first, second = Cache(tmp_path, "a"), Cache(tmp_path, "b")
    first.fetch(server.uri("/other/linux" if what == "another URI" else "/netboot/linux"))
    path = tmp_path / "cache/a/linux"
    if what == "no validators":
        (tmp_path / "cache/a/.linux.validators").unlink()
    elif what == "another length":
        path.write_bytes(OLD)
    elif what == "a link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    asked = len(server.requests)
    second.fetch(server.uri())
    assert second.content() == LARGE
    assert server.requests[asked].headers.get("if-none-match") is None


def test_file_of_another_user_is_not_taken(server: Server, tmp_path: Path) -> None:
    """Who owns it could change what is linked."""
    first, second = Cache(tmp_path, "a"), Cache(tmp_path, "b")
    first.fetch(server.uri())
    os.chown(tmp_path / "cache/a/linux", 65534, 65534)
    asked = len(server.requests)
    second.fetch(server.uri())
    assert server.requests[asked].headers.get("if-none-match") is None
    assert second.fetch(server.uri()).stat().st_uid == 0


def test_verified_file_of_another_image_is_taken_without_a_question(server: Server, tmp_path: Path) -> None:
    source = parse_source(server.uri())
    fetch.fetch(source, tmp_path / "cache/a", verified(LARGE))
    asked = len(server.requests)
    path = fetch.fetch(source, tmp_path / "cache/b", verified(LARGE, "another"))
    assert path.read_bytes() == LARGE
    assert len(server.requests) == asked
    assert fetch.known_verified(path, source.uris) == "another"


def test_file_of_another_image_that_is_not_what_it_was_verified_to_be(server: Server, tmp_path: Path) -> None:
    source = parse_source(server.uri())
    fetch.fetch(source, tmp_path / "cache/a", verified(LARGE))
    (tmp_path / "cache/a/linux").write_bytes(bytes(len(LARGE)))
    asked = len(server.requests)
    assert fetch.fetch(source, tmp_path / "cache/b", verified(LARGE)).read_bytes() == LARGE
    assert len(server.requests) > asked


@pytest.mark.parametrize("record", [b"", b"{}", b"[]", b"\xff", b'{"checksum": 1}'])
def test_broken_record_of_another_image_does_not_matter(server: Server, tmp_path: Path, record: bytes) -> None:
    source = parse_source(server.uri())
    fetch.fetch(source, tmp_path / "cache/a", verified(LARGE))
    (tmp_path / "cache/a/.linux.verification").write_bytes(record)
    assert fetch.fetch(source, tmp_path / "cache/b", verified(LARGE)).read_bytes() == LARGE


def test_file_that_changes_while_it_is_taken(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another build has just fetched it anew: what was read of it before does not belong to it."""
    first, second = Cache(tmp_path, "a"), Cache(tmp_path, "b")
    first.fetch(server.uri())
    take = fetch.take

    def take_late(path: Path, target: Path) -> None:
        server.script = File(OLD, etag='"2"')
        first.fetch(server.uri())
        take(path, target)

    monkeypatch.setattr(fetch, "take", take_late)
    asked = len(server.requests)
    second.fetch(server.uri())
    assert second.content() == OLD
    assert server.requests[asked + 1].headers.get("if-none-match") is None
