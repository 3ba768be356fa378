"""URI -> a file in the cache that is whole and up to date."""

import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import stat
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import httplib2

from . import command, events, interrupts
from .errors import BuildError, CommandError, ConfigurationError
from .log import logger
from .settings import Source
from .units import format_size

TRIES = 3
_PAUSE_SECONDS = (1.0, 3.0)
_TIMEOUT_SECONDS = 30.0
_REDIRECTIONS = 5
# httplib2 keeps a whole response in memory, so large files are asked for in parts.
_PART_SIZE = 8 << 20
_PIECE_SIZE = 64 << 10
_RSYNC_STATUS_TRANSIENT = (5, 10, 11, 12, 30, 35)  # rsync(1): protocol start, socket, file and stream I/O, timeouts

_TEMPORARY = re.compile(r"\..+\.(?:[a-z0-9_]{8}|[A-Za-z0-9]{6})")

_Response = dict[str, Any]

_meter = events.Meter()


class _Transient(Exception):
    """A failure that the next try may not meet."""


class _Metered(http.client.HTTPResponse):
    """A response of which observers are told while it is read: httplib2 reads it whole."""

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None or self.status not in (200, 206):
            return super().read(amt)
        part = re.fullmatch(r"bytes ([0-9]{1,19})-[0-9]+/([0-9]{1,19})", self.headers.get("content-range", ""))
        done, total = (int(part[1]), int(part[2])) if part else (0, self.length or 0)
        pieces = []
        while piece := super().read(_PIECE_SIZE):
            pieces.append(piece)
            done += len(piece)
            _meter.at(done, total)
        return b"".join(pieces)


class _HttpConnection(httplib2.HTTPConnectionWithTimeout):
    response_class = _Metered


class _HttpsConnection(httplib2.HTTPSConnectionWithTimeout):
    response_class = _Metered


@dataclass(frozen=True)
class Expected:
    """The checksum that a file must have, where that is listed, and in words *by* whom that is vouched for.

    The checksum is a SHA-256 or SHA-512 in hexadecimal digits.  *by* goes into the build record: no secret
    of a URI is in it.
    """

    checksum: str
    listed_in: str
    by: str

    @property
    def algorithm(self) -> str:
        """What the checksum is, as people write it."""
        return "SHA-512" if len(self.checksum) == 128 else "SHA-256"

    def found_in(self, path: Path) -> str:
        """Return what the file at *path* has in its place."""
        with path.open("rb") as file, interrupts.interruptible():
            return hashlib.file_digest(file, self.algorithm.replace("-", "").lower()).hexdigest()

    def is_that_of(self, path: Path) -> bool:
        """Whether the file at *path* has it."""
        return self.found_in(path) == self.checksum


@dataclass(frozen=True)
class Fetched:
    """A file, the URI that it is from, and who vouches for it: None if nobody does."""

    path: Path
    uri: str
    verified_by: str | None = None


Expect = Callable[[str], Expected | None]
_Check = Callable[[Path], None]


def _expect_anything(uri: str) -> None:
    """Know nothing of what is at *uri*."""


def fetch(source: Source, directory: Path, expect: Expect = _expect_anything) -> Path:
    """Return a local path of *source*: the file itself, or a copy in *directory* as new as the server's."""
    if source.path is not None:
        return source.path
    if not source.name:
        raise ConfigurationError(f"{source.uri} names no file.")
    with locked(directory):
        return fetch_from_mirrors(source, directory, expect).path


def fetch_from_mirrors(source: Source, directory: Path, expect: Expect) -> Fetched:
    """Return a copy of *source* in *directory*, which is ``locked``.

    *expect* is asked for each mirror what the file must be; BuildError from it refuses the mirror.
    BuildError if the file can't be had; the cache has then what it had before.
    """
    target = directory / source.name
    failures = []
    for uri in source.uris:
        try:
            expected = expect(uri)
            fetched = _bring(uri, target, expected)
        except BuildError as error:
            failures.append(error)
            if uri != source.uris[-1]:
                logger.warning("%s The next mirror is tried.", error.message)
            continue
        if source.mirrors and fetched:
            logger.info("%s is served by %s", target.name, uri)
        return Fetched(target, uri, expected.by if expected else None)
    if len(failures) == 1:
        raise failures[0]
    raise BuildError(
        f"No mirror gives {target.name}: {' '.join(error.message for error in failures)}",
        hint=next((error.hint for error in failures if error.hint), None),
    )


def _bring(uri: str, target: Path, expected: Expected | None) -> bool:
    """Make *target* what is at *uri*, which is *expected*; return whether the mirror was asked for it."""
    if expected is None:
        if not target.is_file():
            _borrow(uri, target)
        _fetch(uri, target, partial(_refuse_web_page, uri))
        return True
    cached = target.is_file() and expected.is_that_of(target)
    if not cached and _borrow_verified(uri, target, expected):
        cached = True
    elif cached:
        logger.info("%s in the cache is what %s lists.", target.name, expected.listed_in)
    else:
        _fetch(uri, target, partial(_check_checksum, uri, expected), afresh=True)
    _remember_verified(uri, target, expected)
    return not cached


def _others(target: Path) -> Iterator[Path]:
    """Give the files of the name of *target* in the cache of other images, which only this user or root can change."""
    directories: list[Path] = []
    with suppress(OSError):
        directories += target.parent.parent.iterdir()
    for directory in directories:
        path = directory / target.name
        with suppress(OSError):
            status = path.lstat()
            if directory != target.parent and stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.geteuid()):
                yield path


def _borrow_verified(uri: str, target: Path, expected: Expected) -> bool:
    """Make *target* the file of another image that is *expected*; return whether there is one."""
    for other in _others(target):
        # It may have changed meanwhile, or be gone: then it is fetched.
        with suppress(OSError, BuildError, ValueError, KeyError, TypeError):
            if json.loads(_verified_path(other).read_text(encoding="utf-8"))["checksum"] == expected.checksum:
                _take_over(other, target, partial(_check_checksum, uri, expected))
                return True
    return False


def _borrow(uri: str, target: Path) -> None:
    """Make *target* a file of another image that is from *uri*; the server will be asked whether it still is."""
    for other in _others(target):
        with suppress(OSError, BuildError):
            validators = _known_validators(uri, other)
            if validators:
                _take_over(other, target, partial(_check_validators, uri, other, validators))
                _write_validators(uri, target, validators)
                return


def _check_validators(uri: str, other: Path, validators: dict[str, str], path: Path) -> None:
    """Raise BuildError unless *path* was taken from *other* while it had its *validators*, which go before it does."""
    if _known_validators(uri, other) != validators:
        raise BuildError(f"{path} may be another file: {other} has changed meanwhile.")


def _take_over(other: Path, target: Path, check: _Check) -> None:
    with _staged(target, check) as path:
        path.unlink()
        take(other, path)
    logger.info("%s is in the cache of %s already.", target.name, other.parent.name)


def is_web_page(head: bytes) -> bool:
    """Whether what begins with *head* is a web page."""
    return re.match(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head)\b", head[:1024], re.IGNORECASE) is not None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024)


PORTAL_HINT = "Does this network ask for a login? Open a page in a browser, or set http_proxy"


def _refuse_web_page(uri: str, path: Path) -> None:
    """Raise BuildError if *path* is a web page: a login page of the network, or an error page with status 200."""
    if is_web_page(_head(path)):
        raise BuildError(f"Can't fetch {uri}: a web page came instead of the file.", hint=PORTAL_HINT)


def _check_checksum(uri: str, expected: Expected, path: Path) -> None:
    _refuse_web_page(uri, path)
    found = expected.found_in(path)
    if found != expected.checksum:
        raise BuildError(
            f"{uri} is not what {expected.listed_in} lists: "
            f"expected {expected.algorithm} {expected.checksum}, found {found}.",
            hint="The mirror is broken or out of date, or somebody has changed the file. Try another mirror",
        )


def _verified_path(target: Path) -> Path:
    # A name that _TEMPORARY doesn't match.
    return target.with_name(f".{target.name}.verification")


def _remember_verified(uri: str, target: Path, expected: Expected) -> None:
    """Write down what *target* is known to be, for builds without a network."""
    known = {"uri": uri, "checksum": expected.checksum, "by": expected.by}
    write_whole(_verified_path(target), json.dumps(known).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write *data* to *path* in the cache; half of it never replaces an older file."""
    try:
        with _new_file(path) as file:
            file.write(data)
    except OSError as error:
        raise BuildError(f"Can't write {path}: {error.strerror or error}.", hint="See --cache-dir.") from error


def known_verified(target: Path, uris: Sequence[str]) -> str | None:
    """Return who vouched for *target*, as it is now, when it came from one of *uris*, else None."""
    try:
        known = json.loads(_verified_path(target).read_text(encoding="utf-8"))
        expected = Expected(str(known["checksum"]), "", str(known["by"]))
        return expected.by if known["uri"] in uris and expected.is_that_of(target) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read(uri: str, *, secure: bool = False) -> bytes:
    """Return what is at *uri*, a list of checksums or the like; with *secure* by https all the way."""
    with tempfile.TemporaryDirectory(prefix="image-factory-list.") as directory:
        target = Path(directory) / "list"
        _fetch(uri, target, partial(_refuse_web_page, uri), secure=secure)
        return target.read_bytes()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let no other build write to the cache *directory* inside; the lock ends with its process.

    The directory is made where there is none; BuildError if that can't be.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BuildError(f"The cache {directory} can't be made: {error.strerror}.", hint="See --cache-dir.") from error
    try:
        _lock(descriptor, directory)
        _remove_left_files(directory)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> None:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Waiting for another build that writes to %s.", directory)
            with interrupts.interruptible():
                fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        # NFS locks nothing that is open for reading only, as directories are.
        logger.warning("%s can't be locked (%s): let no other build use it now.", directory, error.strerror)


def take(path: Path, target: Path) -> None:
    """Make *target* the file that is at *path* in the cache now, whatever takes its place there later."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        # Another filesystem, or a file of another user's, to which the kernel allows no hard link.
        with interrupts.interruptible():
            shutil.copyfile(path, target)
        os.chmod(target, 0o644)


def _remove_left_files(directory: Path) -> None:
    """Remove the temporary files, mkstemp's or rsync's, that a killed build has left."""
    for path in directory.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            logger.info("Removing %s, which a killed build has left.", path)
            # In a cache that one may only read, or with the sticky bit and of another user's, it stays.
            with suppress(OSError):
                path.unlink()


def _fetch(uri: str, target: Path, check: _Check, *, afresh: bool = False, secure: bool = False) -> None:
    """Bring *target* up to date with *uri* if *check* raises nothing; *afresh* trusts nothing in the cache."""
    for attempt in range(1, TRIES + 1):
        try:
            if uri.lower().startswith("rsync:"):
                _rsync(uri, target, check, afresh=afresh)
            else:
                _download(uri, target, check, afresh=afresh, secure=secure)
            return
        except OSError as error:
            raise BuildError(f"Can't write {target}: {error.strerror or error}.", hint="See --cache-dir.") from error
        except _Transient as error:
            if attempt == TRIES:
                raise BuildError(f"Can't fetch {uri}: {error} ({TRIES} tries).") from error
            pause = _PAUSE_SECONDS[attempt - 1]
            logger.warning("Fetching %s: %s; trying again in %.0f s.", uri, error, pause)
            with interrupts.interruptible():
                time.sleep(pause)
    raise AssertionError("unreachable")


@contextmanager
def _staged(target: Path, check: _Check | None = None) -> Iterator[Path]:
    """Give a path whose file takes the place of *target* at the end; it is gone if the body or *check* raises."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    os.close(descriptor)
    try:
        yield Path(name)
        if check is not None:
            check(Path(name))
        # mkstemp's files are their owner's alone, but all users share root's cache.
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def _new_file(target: Path, check: _Check | None = None) -> Iterator[IO[bytes]]:
    """Give a file that takes the place of *target* at the end, and is gone if the body or *check* raises."""
    with _staged(target, check) as path, path.open("w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def rsync_argv(uri: str, target: Path) -> list[str]:
    """Return the command that brings the file at *uri* to *target*; rsync itself renames at the end."""
    # ``-ii``: say which files are there, unchanged ones too.
    # ``--min-size``: an empty file is no reason to lose the one in the cache.
    return [
        "rsync", "--no-motd",
        "--times",
        "--copy-links",
        "-ii",
        "--min-size=1",
        f"--contimeout={_TIMEOUT_SECONDS:.0f}",
        f"--timeout={_TIMEOUT_SECONDS:.0f}",
        uri,
        str(target),
    ]  # fmt: skip


def _rsync(uri: str, target: Path, check: _Check, *, afresh: bool) -> None:
    # They are of what a web server had; one may be another mirror of the file.
    _validators_path(target).unlink(missing_ok=True)
    if afresh:
        with _staged(target, check) as path:
            _run_rsync(uri, path)
    else:
        _run_rsync(uri, target)


def _run_rsync(uri: str, target: Path) -> None:
    try:
        items = command.run(rsync_argv(uri, target), capture=True)
    except CommandError as error:
        if error.status in _RSYNC_STATUS_TRANSIENT:
            raise _Transient(error.message) from error
        raise BuildError(f"Can't fetch {uri}: {error.message}", hint=error.hint) from error
    if not re.search(r"^[>.]f", items, re.MULTILINE):
        raise BuildError(f"Can't fetch {uri}: what is there is empty, or no file.")


def _validators_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.validators")


def _known_validators(uri: str, target: Path) -> dict[str, str]:
    """Return the request headers that ask whether *target* is still what is at *uri*."""
    try:
        known = json.loads(_validators_path(target).read_text(encoding="utf-8"))
        if known["uri"] == uri and known["size"] == target.stat().st_size:
            headers: dict[str, str] = known["headers"]
            return headers
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def _remember_validators(uri: str, target: Path, response: _Response) -> None:
    headers = {}
    if "etag" in response:
        headers["if-none-match"] = response["etag"]
    if "last-modified" in response:
        headers["if-modified-since"] = response["last-modified"]
    if headers:
        _write_validators(uri, target, headers)


def _write_validators(uri: str, target: Path, headers: dict[str, str]) -> None:
    known = {"uri": uri, "size": target.stat().st_size, "headers": headers}
    with _new_file(_validators_path(target)) as file:
        file.write(json.dumps(known).encode())


def _download(uri: str, target: Path, check: _Check, *, afresh: bool, secure: bool) -> None:
    """Bring *target* up to date with *uri*, in parts where the server can."""
    logger.info("Fetching %s", uri)
    client = httplib2.Http(timeout=_TIMEOUT_SECONDS)
    client.follow_redirects = False
    # The file itself is wanted, not what a server makes of a name that ends in .gz.
    plain = {"accept-encoding": "identity"}
    validators = {} if afresh else _known_validators(uri, target)
    first = plain | validators | {"range": f"bytes=0-{_PART_SIZE - 1}"}
    where, response, content = _follow(client, uri, first, ("https",) if secure else ("http", "https"))
    if response.status == 304 and validators:
        logger.info("%s is unchanged.", target.name)
        return
    # A server that knows no ranges of an empty file says 416.
    if (response.status in (200, 206) and not content) or response.status == 416:
        raise BuildError(f"Can't fetch {uri}: the file there is empty.")
    if response.status not in (200, 206):
        gone = response.status in (404, 410)
        raise BuildError(
            f"Can't fetch {uri}: the server says {response.status} {response.reason}.",
            hint="See what the server has there now; of a newer release it may have another name." if gone else None,
        )

    def accept(path: Path) -> None:
        check(path)
        _validators_path(target).unlink(missing_ok=True)

    with _new_file(target, accept) as file:
        file.write(content)
        if response.status == 206:
            # From the same place: redirections may lead to another mirror each time.
            _fetch_rest(client, where, plain, response, file)
        size = file.tell()
    _remember_validators(uri, target, response)
    logger.info("Fetched %s: %s", target.name, format_size(size))


def _fetch_rest(client: httplib2.Http, uri: str, headers: dict[str, str], first: _Response, file: IO[bytes]) -> None:
    """Fetch the parts after the *first*, which is in *file* already."""
    size = _range_size(uri, first, 0, file.tell())
    # The parts are of one file only while its validator is the same; a weak one doesn't do.
    strong = first.get("etag", "")
    same = strong if strong and not strong.startswith("W/") else first.get("last-modified", "")
    while (start := file.tell()) < size:
        end = min(start + _PART_SIZE, size)
        part = headers | {"range": f"bytes={start}-{end - 1}"} | ({"if-range": same} if same else {})
        response, content = _get(client, uri, part)
        if response.status == 200:
            raise _Transient("the file changed on the server meanwhile")
        if response.status != 206:
            raise BuildError(f"Can't fetch {uri}: the server says {response.status} {response.reason}.")
        if _range_size(uri, response, start, len(content)) != size or not content:
            raise _Transient("the file changed on the server meanwhile")
        file.write(content)


def _range_size(uri: str, response: _Response, start: int, length: int) -> int:
    """Return the whole file's size that a partial *response* of *length* bytes at *start* names."""
    match = re.fullmatch(r"bytes ([0-9]+)-([0-9]+)/([0-9]+)", response.get("content-range", ""))
    if not match or int(match[1]) != start or int(match[2]) != start + length - 1:
        raise BuildError(f"Can't fetch {uri}: the server sent another part than was asked for.")
    return int(match[3])


def _follow(
    client: httplib2.Http, uri: str, headers: dict[str, str], schemes: tuple[str, ...]
) -> tuple[str, Any, bytes]:
    """Follow redirections from *uri* to *schemes*; return where they end, response and content.

    httplib2 itself would drop the validators on the way, and not say where it has come to.
    """
    where = uri
    for _ in range(_REDIRECTIONS):
        response, content = _get(client, where, headers)
        if response.status not in (301, 302, 303, 307, 308) or "location" not in response:
            return where, response, content
        where = urllib.parse.urljoin(where, response["location"])
        if urllib.parse.urlsplit(where).scheme not in schemes:
            raise BuildError(f"Can't fetch {uri}: the server redirects to {where}.")
    raise BuildError(f"Can't fetch {uri}: more than {_REDIRECTIONS} redirections.")


def _get(client: httplib2.Http, uri: str, headers: dict[str, str]) -> tuple[Any, bytes]:
    """Return response and content; _Transient for what another try may cure."""
    try:
        with interrupts.interruptible():
            kind = _HttpsConnection if urllib.parse.urlsplit(uri).scheme == "https" else _HttpConnection
            response, content = client.request(uri, headers=headers, connection_type=kind)
    # UnicodeError: a host name that no DNS can have.
    except (ssl.SSLCertVerificationError, UnicodeError) as error:
        raise BuildError(f"Can't fetch {uri}: {error}.") from error
    except httplib2.ServerNotFoundError as error:
        raise _Transient(f"{error}") from error
    # http.client's and httplib2's own, of a connection that breaks off among others.
    except (OSError, httplib2.HttpLib2Error, http.client.HTTPException) as error:
        raise _Transient(" ".join([type(error).__name__, *str(error).split()])) from error
    if response.status >= 500 or response.status in (408, 429):
        raise _Transient(f"the server says {response.status} {response.reason}")
    if response.status in (200, 206):
        # httplib2 has unpacked it, and takes no notice of a packed stream that breaks off.
        if "-content-encoding" in response:
            raise BuildError(f"Can't fetch {uri}: the server compresses it, though it was asked not to.")
        length = response.get("content-length")
        if length is not None and int(length) != len(content):
            raise _Transient(f"{len(content)} of {length} bytes came")
    return response, content
