"""URI -> a file in the cache that is whole and up to date."""

import base64
import errno
import fcntl
import glob
import http.client
import json
import os
import re
import shutil
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import httplib2

from ..base import command, events, files, interrupts, locks, scratch, trust
from ..base.errors import BuildError, CommandError, ConfigurationError, CrashError
from ..base.log import logger, masked, waiting
from ..base.units import format_size
from ..configuration.parsers import Source

TRIES = 3
_PAUSE_SECONDS = (1.0, 3.0)
# In so long a file has to come, or so much of it: three tries end after less than 90 s if nothing does.
_TIMEOUT_SECONDS = 25.0
_LEAST_RATE = 4 << 10
# For the connection to one address of a server.
_CONNECT_SECONDS = 10.0
_PROBE_SECONDS = 15.0
_REDIRECTIONS = 5
_POLL_SECONDS = 1.0
# Servers that break off large answers give parts, and what has come of a part is what is asked for once more.
_PART_SIZE = 8 << 20
_PIECE_SIZE = 64 << 10
# Whatever a server promises or sends.  An ISO file fills the side of a Blu-ray disc at most, and
# nobody publishes a disk image that is larger.
LIST_SIZE = 16 << 20
_FILE_SIZE = 2 << 30
_DISK_SIZE = 64 << 30
_LONGEST_REASON = 300
_SAYS = "the server says "
_ANOTHER_PART = "the server sent another part than was asked for"
_LONGEST_NOTE = 64 << 10
_RSYNC_STATUS_TRANSIENT = (5, 10, 11, 12, 30, 35)  # rsync(1): protocol start, socket, file and stream I/O, timeouts

_LOCK = ".lock"
# All users share root's cache.
_MODE = 0o644
_TEMPORARY = re.compile(r"\..+\.(?:[a-z0-9_]{8}|[A-Za-z0-9]{6})")

_DISK_NAME = re.compile(
    r"(?!initr).*\.(?:iso|img|raw|qcow2|vmdk|vhdx?|vdi|tar)(?:\.(?:xz|gz|bz2|zst))?|.*\.t[gx]z", re.DOTALL
)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")

_Result = TypeVar("_Result")
_Send = Callable[[tuple[int, int]], None]


class _Transient(Exception):
    """A failure that the next try may not meet."""


class _NotWritten(Exception):
    """The system's own refusal to write what has come, the OSError: no fault of the server's."""


@dataclass(frozen=True)
class _Answer:
    """What a server has said: the status, its reason, and the headers by their names in small letters."""

    status: int
    reason: str
    headers: dict[str, str]


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
        return files.digest_of(path, self.algorithm.replace("-", "").lower())

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
        if not trust.own(target):
            # rsync would take one of the same size and time for what it is to bring.
            target.unlink(missing_ok=True)
            _borrow(uri, target)
        _fetch(uri, target, partial(_refuse_web_page, uri))
        return True
    cached = trust.own(target) and expected.is_that_of(target)
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
        if directory != target.parent and trust.own(path) and not trust.why_not(directory):
            yield path


def _borrow_verified(uri: str, target: Path, expected: Expected) -> bool:
    """Make *target* the file of another image that is *expected*; return whether there is one."""
    for other in _others(target):
        # It may have changed meanwhile, or be gone: then it is fetched.
        with suppress(OSError, BuildError, ValueError, KeyError, TypeError):
            if _note(_verified_path(other))["checksum"] == expected.checksum:
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
    with files.staged(target, check, mode=_MODE) as path:
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
        raise _web_page(uri)


def _web_page(uri: str) -> BuildError:
    return BuildError(f"Can't fetch {uri}: a web page came instead of the file.", hint=PORTAL_HINT)


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
    known = {"uri": masked(uri), "checksum": expected.checksum, "by": expected.by}
    write_whole(_verified_path(target), json.dumps(known).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write *data* to *path* in the cache; half of it never replaces an older file."""
    try:
        with files.written(path, mode=_MODE) as file:
            file.write(data)
    except OSError as error:
        raise BuildError(f"Can't write {path}: {error.strerror or error}.", hint="See --cache-dir.") from error


def _note(path: Path) -> Any:
    """Return what is noted in the file at *path*; OSError or ValueError if there is none to believe."""
    if not trust.own(path):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
    with path.open("rb") as file:
        return json.loads(file.read(_LONGEST_NOTE))


def known_verified(target: Path, uris: Sequence[str]) -> str | None:
    """Return who vouched for *target*, as it is now, when it came from one of *uris*, else None."""
    try:
        known = _note(_verified_path(target))
        expected = Expected(str(known["checksum"]), "", str(known["by"]))
        return expected.by if known["uri"] in map(masked, uris) and expected.is_that_of(target) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read(uri: str, *, secure: bool = False) -> bytes:
    """Return what is at *uri*, a list of checksums or the like; with *secure* by https all the way."""
    if uri.lower().startswith("rsync:"):
        with scratch.directory() as directory:
            target = directory / "list"
            _persist(uri, partial(_run_rsync, uri, target, LIST_SIZE))
            data = target.read_bytes()
    else:
        data = _read_by_http(uri, secure=secure)
    if is_web_page(data):
        raise _web_page(uri)
    return data


def _read_by_http(uri: str, *, secure: bool) -> bytes:
    with open(os.memfd_create("list"), "w+b") as file:
        logger.info("Fetching %s", uri)
        _persist(uri, partial(_receive, uri, file, limit=LIST_SIZE, secure=secure))
        file.seek(0)
        return file.read()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Let no other build of this user write to the cache *directory* inside; the lock ends with its process.

    The directory is made where there is none; BuildError if that can't be.  The file that is locked can be opened by
    its user only, as whoever can open a file can keep others waiting.
    """
    try:
        trust.make(directory)
    except OSError as error:
        raise BuildError(f"The cache {directory} can't be made: {error.strerror}.", hint="See --cache-dir.") from error
    if not os.access(directory, os.W_OK):
        # What one can only read is changed by its owner, each file in one piece.
        yield
        return
    with _lock(directory / _LOCK):
        _remove_left_files(directory)
        yield


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Have the lock file at *path* inside, which goes at the end."""
    while True:
        descriptor = _open_lock(path)
        try:
            _take_lock(descriptor, path)
            if not _is_at(descriptor, path):
                # The holder before us has just removed it.
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _open_lock(path: Path) -> int:
    hint = "Remove it when no build runs."
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise BuildError(f"The lock {path} can't be opened: {error.strerror}.", hint=hint) from error
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        os.close(descriptor)
        raise BuildError(f"The lock {path} is another user's.", hint=hint)
    if status.st_mode & 0o077:
        # A filesystem without modes, such as CIFS, keeps its own.
        with suppress(OSError):
            os.fchmod(descriptor, 0o600)
    return descriptor


def _take_lock(descriptor: int, path: Path) -> None:
    def reason(who: str) -> str:
        return f"Waiting for another build that writes to {path.parent}{who}."

    try:
        if _is_taken(descriptor):
            return
        with waiting(reason(locks.by_whom(path))) as say:
            while not _is_taken(descriptor):
                # Who is about to let go of it may not be seen any more.
                if who := locks.by_whom(path):
                    say(reason(who))
                with interrupts.interruptible():
                    time.sleep(_POLL_SECONDS)
                events.tell(events.TimePassed())
    except OSError as error:
        logger.warning("%s can't be locked (%s): let no other build use it now.", path.parent, error.strerror)


def _is_taken(descriptor: int) -> bool:
    """Take the lock of what is open as *descriptor*; return whether it was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def take(path: Path, target: Path) -> None:
    """Make *target* the file that is at *path* in the cache now, whatever takes its place there later."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        # Another filesystem, or a file of another user's, to which the kernel allows no hard link.
        with interrupts.interruptible():
            shutil.copyfile(path, target)
        os.chmod(target, _MODE)


def _remove_left_files(directory: Path) -> None:
    """Remove the temporary files, ours or rsync's, that a killed build has left."""
    for path in directory.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            logger.info("Removing %s, which a killed build has left.", path)
            # In a cache that one may only read, or with the sticky bit and of another user's, it stays.
            with suppress(OSError):
                path.unlink()


def _fetch(uri: str, target: Path, check: _Check, *, afresh: bool = False) -> None:
    """Bring *target* up to date with *uri* if *check* raises nothing; *afresh* trusts nothing in the cache."""
    how = _rsync if uri.lower().startswith("rsync:") else _download
    try:
        _persist(uri, partial(how, uri, target, check, afresh=afresh))
    except OSError as error:
        raise BuildError(f"Can't write {target}: {error.strerror or error}.", hint="See --cache-dir.") from error


def _persist(uri: str, attempt: Callable[[], _Result]) -> _Result:
    """Return what *attempt* to get *uri* returns, which is made again where that may help."""
    for number in range(1, TRIES + 1):
        try:
            return attempt()
        except _Transient as error:
            if number == TRIES:
                raise BuildError(f"Can't fetch {uri}: {error} ({TRIES} tries).") from error
            pause = _PAUSE_SECONDS[number - 1]
            logger.warning("Fetching %s: %s; trying again in %.0f s.", uri, error, pause)
            with interrupts.interruptible():
                time.sleep(pause)
    raise AssertionError("unreachable")


class _Pace:
    """Whether a download comes fast enough, and is not too large; tells observers how far it is."""

    def __init__(self, uri: str, limit: int, seconds: float | None = None) -> None:
        self._uri = uri
        self._limit = limit
        self._seconds = seconds or _TIMEOUT_SECONDS
        self._meter = events.Meter()
        self._done = self._mark = 0
        self._since = time.monotonic()

    def watch(self, message: tuple[int, int] | None) -> None:
        """Take note that so many bytes of so many have come, None for nothing new; raise what ends the try."""
        now = time.monotonic()
        if message is not None:
            self._done = message[0]
            self._meter.at(*message)
        if self._done > self._limit:
            raise _too_large(self._uri, self._limit)
        if self._done - self._mark >= _LEAST_RATE * self._seconds:
            self._mark, self._since = self._done, now
        elif now - self._since > self._seconds:
            came = self._done - self._mark
            raise _Transient(f"timed out: {came} bytes came in {self._seconds:.0f} s")


def _too_large(uri: str, limit: int) -> BuildError:
    return BuildError(f"Can't fetch {uri}: it has more than {format_size(limit)}, which no such file has.")


def _limit_of(target: Path) -> int:
    """Return how many bytes what is to be at *target* may have."""
    return _DISK_SIZE if _DISK_NAME.fullmatch(target.name.lower()) else _FILE_SIZE


def command_of(uri: str, target: Path) -> list[str]:
    """Return the command that brings the file at *uri* to *target*; what httplib2 does is none, but a comment."""
    return rsync_argv(uri, target) if uri.lower().startswith("rsync:") else ["#", "GET", uri, "->", str(target)]


def rsync_argv(uri: str, target: Path, limit: int | None = None) -> list[str]:
    """Return the command that brings the file at *uri* to *target*; rsync itself renames at the end."""
    # ``-ii``: say which files are there, unchanged ones too.
    # ``--whole-file``: to compare a large file in the cache takes so long that the mirror seems to send nothing.
    # ``--min-size``: an empty file is no reason to lose the one in the cache.
    return [
        "rsync", "--no-motd",
        "--times",
        "--copy-links",
        "--whole-file",
        "-ii",
        "--info=skip1",
        "--chmod=F644",
        "--min-size=1",
        f"--max-size={limit or _limit_of(target)}",
        f"--contimeout={_CONNECT_SECONDS:.0f}",
        f"--timeout={_TIMEOUT_SECONDS:.0f}",
        uri,
        str(target),
    ]  # fmt: skip


def _rsync(uri: str, target: Path, check: _Check, *, afresh: bool) -> None:
    # They are of what a web server had; one may be another mirror of the file.
    _validators_path(target).unlink(missing_ok=True)
    if afresh:
        with files.staged(target, check, mode=_MODE) as path:
            _run_rsync(uri, path, _limit_of(target))
    else:
        _run_rsync(uri, target, _limit_of(target))


def _run_rsync(uri: str, target: Path, limit: int) -> None:
    pace = _Pace(uri, limit)

    def watch() -> None:
        # A server may send more than it has said.
        parts = target.parent.glob(f".{glob.escape(target.name)}.??????")
        pace.watch((sum(_size(part) for part in parts), 0))

    try:
        items = command.run(rsync_argv(uri, target, limit), capture=True, watch=watch)
    except CommandError as error:
        if error.status in _RSYNC_STATUS_TRANSIENT:
            raise _Transient(error.message) from error
        raise BuildError(f"Can't fetch {uri}: {error.message}", hint=error.hint) from error
    if re.search(r" is over max-size$", items, re.MULTILINE):
        raise _too_large(uri, limit)
    if not re.search(r"^[>.]f", items, re.MULTILINE):
        raise BuildError(f"Can't fetch {uri}: what is there is empty, or no file.")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _validators_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.validators")


def _known_validators(uri: str, target: Path) -> dict[str, str]:
    """Return the request headers that ask whether *target* is still what is at *uri*."""
    try:
        known = _note(_validators_path(target))
        if trust.own(target) and known["uri"] == masked(uri) and known["size"] == target.stat().st_size:
            headers: dict[str, str] = known["headers"]
            return headers
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def _remember_validators(uri: str, target: Path, answer: _Answer) -> None:
    headers = {}
    if "etag" in answer.headers:
        headers["if-none-match"] = answer.headers["etag"]
    if "last-modified" in answer.headers:
        headers["if-modified-since"] = answer.headers["last-modified"]
    if headers:
        _write_validators(uri, target, headers)


def _write_validators(uri: str, target: Path, headers: dict[str, str]) -> None:
    if "?" in uri:
        # It may be another file's next time, and the note has no secrets to tell that by.
        return
    known = {"uri": masked(uri), "size": target.stat().st_size, "headers": headers}
    with files.written(_validators_path(target), mode=_MODE) as file:
        file.write(json.dumps(known).encode())


def _download(uri: str, target: Path, check: _Check, *, afresh: bool) -> None:
    """Bring *target* up to date with *uri*."""
    logger.info("Fetching %s", uri)
    validators = {} if afresh else _known_validators(uri, target)

    def accept(path: Path) -> None:
        check(path)
        _validators_path(target).unlink(missing_ok=True)

    try:
        with files.written(target, accept, mode=_MODE) as file:
            answer = _receive(uri, file, limit=_limit_of(target), validators=validators)
            if answer.status == 304:
                raise _Unchanged
            size = os.fstat(file.fileno()).st_size
    except _Unchanged:
        logger.info("%s is unchanged.", target.name)
        return
    _remember_validators(uri, target, answer)
    logger.info("Fetched %s: %s", target.name, format_size(size))


class _Unchanged(Exception):
    """The server has what is in the cache already."""


def _receive(
    uri: str, file: IO[bytes], *, limit: int, validators: Mapping[str, str] | None = None, secure: bool = False
) -> _Answer:
    """Write what is at *uri* to *file*, at most *limit* bytes; the answer is 304 if *validators* say that it is known.

    All of HTTP is done in a process of its own.  Whatever the libraries or the resolver wait for, it ends in time, and
    whatever an answer makes of them is that server's failure: BuildError, or _Transient if another try may help.
    """

    def get(send: _Send) -> _Answer:
        with open(file.fileno(), "wb", closefd=False) as out:
            out.seek(0)
            out.truncate()
            return _Client(uri, limit, out, send, secure=secure).get(validators or {})

    try:
        return command.call_watched(get, _Pace(uri, limit).watch)
    except _NotWritten as error:
        raise error.args[0] from None
    except CrashError as error:
        raise BuildError(f"Can't fetch {uri}: the process that fetches it {error.message}.") from error


@dataclass(frozen=True)
class Probe:
    """How a URI is asked for: whether a file is to be there, *any_answer* will do, and no proxy is to be used."""

    is_file: bool = False
    any_answer: bool = False
    direct: bool = False


def probe(uri: str, how: Probe) -> None:
    """Raise BuildError unless what is at *uri* is served, which is asked for as a download does, and not fetched."""
    try:
        if uri.lower().startswith("rsync:"):
            _probe_by_rsync(uri)
            return

        def ask(send: _Send) -> None:
            with open(os.devnull, "wb") as nothing:
                _Client(uri, _DISK_SIZE, nothing, send, secure=False).probe(how)

        command.call_watched(ask, _Pace(uri, _DISK_SIZE, _PROBE_SECONDS).watch)
    except (_Transient, CrashError) as error:
        raise BuildError(f"Can't fetch {uri}: {error}.") from error


def _probe_by_rsync(uri: str) -> None:
    argv = ["rsync", "--no-motd", "--list-only", f"--contimeout={_CONNECT_SECONDS:.0f}", uri]
    try:
        command.run(argv, quiet=True, timeout=_PROBE_SECONDS)
    except CommandError as error:
        raise BuildError(f"Can't fetch {uri}: {error.message}") from error


class _Client:
    """Gets the file at *uri* by HTTP, in parts where the server can, and writes it to *file*."""

    def __init__(self, uri: str, limit: int, file: IO[bytes], send: _Send, *, secure: bool) -> None:
        self._uri = uri
        self._limit = limit
        self._file = file
        self._send = send
        # There is no way back from https.
        self._schemes = ("https",) if secure or uri.lower().startswith("https:") else ("http", "https")
        self._wanted: tuple[int, ...] = ()
        self._done = 0

    def get(self, validators: Mapping[str, str]) -> _Answer:
        """Get it, unless *validators* say that it is known: then the answer's status is 304."""
        try:
            answer = self._whole(validators)
            self._write(b"")
            return answer
        except (BuildError, _Transient, _NotWritten):
            raise
        except Exception as error:
            raise self._failure(error) from error

    def probe(self, how: Probe) -> None:
        """Ask for the first byte, and leave it there; BuildError or _Transient if it is not to be had."""
        try:
            _, _, answer = self._follow({"range": "bytes=0-0"}, (), direct=how.direct)
        except BuildError:
            raise
        except _Transient as error:
            if how.any_answer and str(error).startswith(_SAYS):
                return
            raise
        except Exception as error:
            raise self._failure(error) from error
        if how.any_answer or answer.status in (200, 206):
            page = answer.headers.get("content-type", "").lower().startswith("text/html")
            if how.is_file and page:
                raise _web_page(self._uri)
        elif how.is_file or answer.status in (404, 410):
            raise self._refused(f"{_SAYS}{answer.status} {answer.reason}")

    def _failure(self, error: Exception) -> Exception:
        """Return what *error*, of whatever library, means for the download."""
        reason = " ".join([type(error).__name__, *str(error).split()])[:_LONGEST_REASON]
        # Debian's httplib2 brings this module; another may have none.
        socks = getattr(httplib2, "socks", None)
        if socks and isinstance(error, socks.ProxyError):
            return _Transient(f"the proxy of http_proxy or https_proxy refuses: {reason}")
        may_pass = isinstance(error, OSError | httplib2.HttpLib2Error | http.client.HTTPException)
        if may_pass and not isinstance(error, ssl.SSLCertVerificationError):
            return _Transient(reason)
        return self._refused(reason)

    def _refused(self, reason: str, hint: str | None = None) -> BuildError:
        return BuildError(f"Can't fetch {self._uri}: {reason}.", hint=hint)

    def _whole(self, validators: Mapping[str, str]) -> _Answer:
        client, where, answer = self._follow({**validators, "range": f"bytes=0-{_PART_SIZE - 1}"})
        if answer.status == 304 and validators:
            return answer
        # A server that knows no ranges of an empty file says 416.
        if (answer.status in (200, 206) and not self._done) or answer.status == 416:
            raise self._refused("the file there is empty")
        if answer.status not in (200, 206):
            gone = answer.status in (404, 410)
            raise self._refused(
                f"the server says {answer.status} {answer.reason}",
                "See what the server has there now; of a newer release it may have another name." if gone else None,
            )
        if answer.status == 206:
            # From the same place: redirections may lead to another mirror each time.
            self._rest(client, where, answer)
        return answer

    def _follow(
        self, headers: dict[str, str], wanted: tuple[int, ...] = (200, 206), *, direct: bool = False
    ) -> tuple[httplib2.Http, str, _Answer]:
        """Follow redirections; return a client, where they end, and the answer there.

        httplib2 itself would drop the validators on the way, and not say where it has come to.
        """
        where = self._uri
        for _ in range(_REDIRECTIONS):
            # A new one for each: what comes with a redirection stays unread.
            client = self._new_client(direct=direct)
            answer = self._ask(client, where, headers, wanted)
            if answer.status not in (301, 302, 303, 307, 308) or "location" not in answer.headers:
                return client, where, answer
            where = self._redirected(where, answer.headers["location"])
        raise self._refused(f"more than {_REDIRECTIONS} redirections")

    def _new_client(self, *, direct: bool = False) -> httplib2.Http:
        client = httplib2.Http(timeout=_CONNECT_SECONDS, proxy_info=None if direct else self._proxy)
        client.follow_redirects = False
        return client

    def _proxy(self, scheme: Literal["http", "https"]) -> httplib2.ProxyInfo | None:
        try:
            return httplib2.proxy_info_from_environment(scheme)
        except ValueError as error:
            name = f"{scheme}_proxy"
            used = name if name in os.environ else name.upper()
            raise self._refused(f"{used} is no URI", "Write it as http://HOST:PORT") from error

    def _redirected(self, where: str, location: str) -> str:
        try:
            to = urllib.parse.urljoin(where, location)
            parts = urllib.parse.urlsplit(to)
            # Reading the port is what checks it.
            names_host = parts.hostname or parts.scheme not in ("http", "https")
            is_uri = bool(parts.port != 0 and names_host and re.fullmatch(r"[^\x00-\x20\x7f]+", location))
        except ValueError:
            is_uri = False
        if not is_uri:
            raise self._refused(f"the server redirects to {location[:_LONGEST_REASON]!r}, which is no URI")
        if parts.scheme not in self._schemes:
            raise self._refused(f"the server redirects to {to}")
        return to

    def _rest(self, client: httplib2.Http, where: str, first: _Answer) -> None:
        """Get the parts after the *first*, which is in the file already."""
        size = self._size_of_all(first, 0)
        # The parts are of one file only while its validator is the same; a weak one doesn't do.
        strong = first.headers.get("etag", "")
        same = strong if strong and not strong.startswith("W/") else first.headers.get("last-modified", "")
        while (start := self._done) < size:
            end = min(start + _PART_SIZE, size)
            part = {"range": f"bytes={start}-{end - 1}"} | ({"if-range": same} if same else {})
            try:
                answer = self._ask(client, where, part, (206,))
            except (_Transient, OSError, http.client.HTTPException):
                if not same or self._done == start:
                    raise
                # What has come stays, where a validator tells that the rest is of the same file.
                client = self._new_client()
                continue
            if answer.status == 200:
                raise _Transient("the file changed on the server meanwhile")
            if answer.status != 206:
                raise self._refused(f"the server says {answer.status} {answer.reason}")
            if self._size_of_all(answer, start) != size or self._done == start:
                raise _Transient("the file changed on the server meanwhile")

    def _size_of_all(self, answer: _Answer, start: int) -> int:
        """Return the size of the whole file, of which *answer* has brought the part from *start* on."""
        match = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if not match or int(match[1]) != start or int(match[2]) != self._done - 1:
            raise self._refused(_ANOTHER_PART)
        if int(match[3]) > self._limit:
            raise _too_large(self._uri, self._limit)
        return int(match[3])

    def _ask(self, client: httplib2.Http, uri: str, headers: Mapping[str, str], wanted: tuple[int, ...]) -> _Answer:
        """Return the answer, whose body is in the file if its status is *wanted*; _Transient for a passing failure."""
        parts = urllib.parse.urlsplit(uri)
        login, _, host = parts.netloc.rpartition("@")
        # The file itself is wanted, not what a server makes of a name that ends in .gz.
        headers = {"accept-encoding": "identity", **headers}
        if login:
            # httplib2 takes no URI with a user's name in it.
            uri = urllib.parse.urlunsplit(parts._replace(netloc=host))
            words = urllib.parse.unquote_to_bytes(login)
            headers["authorization"] = f"Basic {base64.b64encode(words).decode('ascii')}"
        self._wanted = wanted
        response, _ = client.request(uri, headers=headers, connection_type=_connection_type(parts.scheme, self._take))
        if response.status >= 500 or response.status in (408, 429):
            raise _Transient(f"{_SAYS}{response.status} {response.reason}")
        return _Answer(response.status, response.reason, dict(response.items()))

    def _take(self, response: http.client.HTTPResponse) -> None:
        """Write the body of *response* to the file, as it comes: httplib2 would keep and unpack all of it in memory."""
        if response.status not in self._wanted:
            # So that httplib2 does not unpack nothing.
            del response.headers["content-encoding"]
            return
        if _joined(response, "content-encoding") not in ("", "identity"):
            raise self._refused("the server compresses it, though it was asked not to")
        if _joined(response, "transfer-encoding") not in ("", "identity", "chunked"):
            raise self._refused("the server transfers it in a form that it was not asked for")
        length = self._length(response)
        part = _CONTENT_RANGE.fullmatch(_joined(response, "content-range"))
        if response.status == 206 and (not part or int(part[1]) != self._done):
            # Before it is written: what has come stays when the connection breaks.
            raise self._refused(_ANOTHER_PART)
        total = int(part[3]) if part else self._done + (length or 0)
        start = self._done
        while piece := http.client.HTTPResponse.read(response, _PIECE_SIZE):
            if self._done + len(piece) > self._limit:
                raise _too_large(self._uri, self._limit)
            self._write(piece)
            self._done += len(piece)
            self._send((self._done, total))
        if length is not None and self._done - start != length:
            raise _Transient(f"{self._done - start} of {length} bytes came")

    def _length(self, response: http.client.HTTPResponse) -> int | None:
        text = _joined(response, "content-length")
        if not text or response.chunked:
            return None
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise self._refused(f"the server says that it has {text[:_LONGEST_REASON]!r} bytes")
        if int(text) > self._limit:
            raise _too_large(self._uri, self._limit)
        return int(text)

    def _write(self, piece: bytes) -> None:
        try:
            self._file.write(piece) if piece else self._file.flush()
        except OSError as error:
            raise _NotWritten(error) from error


def _joined(response: http.client.HTTPResponse, name: str) -> str:
    return ", ".join(response.headers.get_all(name) or []).strip().lower()


def _connection_type(scheme: str, take: Callable[[http.client.HTTPResponse], None]) -> type[http.client.HTTPConnection]:
    """Return a class of connections whose answers give their bodies to *take*, and not to httplib2."""

    class Response(http.client.HTTPResponse):
        def read(self, amt: int | None = None) -> bytes:
            take(self)
            return b""

    base: Any = httplib2.HTTPSConnectionWithTimeout if scheme == "https" else httplib2.HTTPConnectionWithTimeout

    class Connection(base):  # type: ignore[misc]
        response_class = Response

        def connect(self) -> None:
            super().connect()
            # How long the rest may take is watched from outside.
            self.sock.settimeout(None)

    return Connection
