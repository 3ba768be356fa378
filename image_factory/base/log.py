"""Log lines that are safe to show, and the steps of a build."""

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO, cast

from . import events
from .errors import BuildError, Interrupted, reason_of

logger = logging.getLogger("image-factory")

# The form that the released program logs in: what reads its logs goes on working.
FORMAT = "%(asctime)s %(name)s [%(process)d] %(levelname)s: %(message)s"

# CSI and OSC sequences, then other escapes of two characters (ECMA-48).
_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]?|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_]|[ -/]+[0-~])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


# What is secret of a URI: its login, of which the user's name is none but to web servers, and the values of its query.
# A password with a slash makes no URI, but an error message; one with a quote may be quoted once more, for a shell.
# The numbers are what keeps a long line from taking the square of its length.
_LOGIN = re.compile(
    r"(?i)\b(?P<scheme>[a-z][a-z0-9+.-]{0,31})://"
    r"(?P<login>[^\s/?#]{0,4096}|[^\s/:@]{0,4096}:(?![0-9]*(?:[/?#]|$))[^\s\\'\"<>]{0,4096})@"
)
_QUERY = re.compile(
    r"(?i)\b(?P<uri>[a-z][a-z0-9+.-]{0,31}://[^\s?\\'\"<>]{0,4096}\?)(?P<query>[^\s\\'\"<>]*[^\s\\'\"<>.,:;)])"
)
_VALUE = re.compile(r"(?P<key>[^&=#;]*=)?[^&#;]+")
# The same where a part of a URI stands alone, and in arguments of programs.
_SECRETS = (
    re.compile(r"(?i)([?&][\w.-]*(?:auth|credential|key|password|secret|sig|signature|token)=)[^\s&#\\'\"]+"),
    re.compile(
        r"(?i)((?:password|passwd|passphrase|token|secret)=)"
        r"(?:(?:\\?'[^']*'|\"[^\"]*\")+[^\s&,;\\'\"]*|[^\s&,;\\'\"]+)"
    ),
    re.compile(r"(?i)(authorization: *\w+ +)[^\s\\'\"]+"),
    re.compile(r"(\bsshpass(?: +-[veVh]+| +-[Pfd] *\S+){0,8} +-[veVh]*p *)(?:\\?'[^']*'|\"[^\"]*\"|\\.|[^\s\"'\\])+"),
)
_MASK = "***"


def masked(text: str) -> str:
    """Return *text* with ``***`` for the passwords and tokens of URIs and of programs' arguments."""
    text = _LOGIN.sub(_masked_login, text)
    text = _QUERY.sub(lambda match: match["uri"] + _VALUE.sub(rf"\g<key>{_MASK}", match["query"]), text)
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<1>{_MASK}", text)
    for secret in _hidden:
        text = text.replace(secret, _MASK)
    return text


_hidden: list[str] = []
# Of a longer one, these are its first bytes.
LONGEST_SECRET = 4096


def hide(secrets: Iterable[str]) -> None:
    """Have ``***`` in the place of each of *secrets* from now on, in all that is shown."""
    cut = (secret.encode()[:LONGEST_SECRET].decode(errors="ignore") for secret in secrets)
    _hidden[:] = sorted({*_hidden, *cut}, key=len, reverse=True)


def masked_bytes(data: bytes) -> bytes:
    """Return *data* with ``***`` for what ``hide`` was told."""
    for secret in _hidden:
        data = data.replace(secret.encode(), _MASK.encode())
    return data


def _masked_login(match: re.Match[str]) -> str:
    user, colon, _ = match["login"].partition(":")
    if match["scheme"].lower() in ("http", "https"):
        return f"{match['scheme']}://{_MASK}@"
    return f"{match['scheme']}://{user}{colon}{_MASK if colon else ''}@"


def printable(text: str) -> str:
    """Return *text* without secrets of URIs and terminal escape sequences, and with other control characters as ``?``.

    Newlines and tabs stay.  What a guest or a program prints, and what is logged, is shown only through this.
    """
    return masked(_CONTROL.sub("?", _ESCAPE_SEQUENCE.sub("", text)))


def drop_output(stream: TextIO) -> None:
    """Drop what *stream*, which could not be written, has kept, and what is yet to come.

    Else it fails again wherever it is flushed: before each fork, and at exit, which gives the status 120.
    """
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), stream.fileno())


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Handler(logging.StreamHandler[TextIO]):
    """A handler that a log which can't be written doesn't disturb.

    The disk may be full, or the reader gone: no reason for logging's traceback.  But a signal may
    have come while the handler wrote, and logging would swallow what ends the build.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if isinstance(error, Interrupted):
            raise
        if isinstance(error, OSError) and self.stream is sys.stderr:
            drop_output(self.stream)


class _FileHandler(_Handler, logging.FileHandler):
    def _open(self) -> TextIOWrapper:
        return cast(
            TextIOWrapper,
            open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=_open_own),
        )


def _open_own(path: str, flags: int) -> int:
    """Open *path*; OSError for a link of another user's, who would choose which of root's files has the log."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        if os.lstat(path).st_uid not in (0, os.geteuid()):
            raise OSError(errno.ELOOP, "it is another user's link") from None
        return os.open(path, flags, 0o666)


class _ShownHandler(logging.Handler):
    def __init__(self, show: Callable[[int, str], None], level: int) -> None:
        super().__init__(level)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.levelno, printable(record.getMessage()))


_on_stderr: list[logging.Handler] = []


def _add_handler(handler: logging.Handler) -> None:
    handler.setFormatter(_PrintableFormatter(FORMAT))
    logger.addHandler(handler)


def set_up(level: int = logging.INFO) -> None:
    """Log to stderr, from here on, what is of *level* or above."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = _Handler(sys.stderr)
    handler.setLevel(level)
    _add_handler(handler)
    _on_stderr[:] = [handler]


@contextmanager
def only(level: int) -> Iterator[None]:
    """Log to stderr, inside, only what is of *level* or above."""
    stderr = _on_stderr[0]
    before = stderr.level
    stderr.setLevel(max(before, level))
    try:
        yield
    finally:
        stderr.setLevel(before)


class _Warnings(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self._texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self._texts.append(printable(record.getMessage()))


@contextmanager
def noting_warnings(texts: list[str]) -> Iterator[None]:
    """Add to *texts* what is warned of inside."""
    handler = _Warnings(texts)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def shown_by(show: Callable[[int, str], None]) -> Iterator[None]:
    """Give *show* the level and the message of what would go to stderr."""
    stderr = _on_stderr[0]
    handler = _ShownHandler(show, stderr.level)
    logger.addHandler(handler)
    logger.removeHandler(stderr)
    try:
        yield
    finally:
        logger.addHandler(stderr)
        logger.removeHandler(handler)


@contextmanager
def also_to_file(path: Path, *, append: bool = False) -> Iterator[None]:
    """Log to *path* too, which is written anew unless *append*; OSError where that is not possible."""
    # A message may have a path with bytes that are no text.
    handler = _FileHandler(path, mode="a" if append else "w", encoding="utf-8", errors="backslashreplace")
    _add_handler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        # A full disk.
        with suppress(OSError):
            handler.close()


@contextmanager
def silenced() -> Iterator[None]:
    """Log nothing of what is done inside."""
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@contextmanager
def waiting(reason: str) -> Iterator[Callable[[str], None]]:
    """Show, and log, that all inside is a wait, and why; what is given takes another *reason* when that has changed.

    Who waits tells observers of ``events.TimePassed`` about once a second, so that the time on the terminal goes on.
    """
    said = ""

    def say(reason: str) -> None:
        nonlocal said
        if reason != said:
            said = reason
            logger.info("%s", reason)
            events.tell(events.Waiting(reason))

    say(reason)
    try:
        yield say
    finally:
        events.tell(events.Waiting(""))


@contextmanager
def step(name: str) -> Iterator[None]:
    """Announce a step, and say how long it took, or that it failed.

    What the system refuses inside, as with a full disk, becomes a BuildError that names the step.
    """
    logger.info("%s ...", name)
    events.tell(events.StepStarted(name))
    start = time.monotonic()
    try:
        yield
    except BaseException as error:
        seconds = time.monotonic() - start
        logger.info("%s: failed after %.1f s", name, seconds)
        events.tell(events.StepEnded(name, seconds, failed=True, error=error))
        if isinstance(error, OSError):
            raise BuildError(f"{name} failed: {reason_of(error)}") from error
        raise
    seconds = time.monotonic() - start
    logger.info("%s: done in %.1f s", name, seconds)
    events.tell(events.StepEnded(name, seconds, failed=False))


def to_files(level: int, message: str) -> None:
    """Log *message* into the log file only, where there is one: stderr gets it in another form."""
    record = logger.makeRecord(logger.name, level, "", 0, message, (), None)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
