"""curl(1), which talks to servers: its arguments, what it says, and which of its failures may pass."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from ..base import command
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..base.files import check_readable
from ..base.log import printable
from ..configuration.settings import Destination
from . import credentials, tries
from .tries import FailedTry

CONNECT_SECONDS = 60
# The server may have to copy what has come, at 100 MB/s.
_SECONDS_PER_BYTE = 1e-8
_MOST_REDIRECTS = 5
_LONGEST_REASON = 200

# curl(1): no host, no connection, a transfer that ended early or hung, TLS or HTTP/2 broken, nothing sent or received.
_TRANSIENT = (5, 6, 7, 16, 18, 28, 35, 52, 55, 56, 92)
_FAILURE = re.compile(r"curl: \((\d+)\) (.*)")
_PROGRESS = re.compile(r"#*\s*([0-9]{1,3}\.[0-9])%")
# What curl draws where it knows no size, and before the first byte.
_NO_PROGRESS = re.compile(r"[\s#=O-]+")
_TLS_HINT = "If the server's certificate is your own, name its CA's file, or the pin of its key, with upload-tls."
_HINTS = {
    6: "Mend the host's name in upload-target.",
    60: _TLS_HINT,
    77: "Mend the file of upload-tls.",
    90: "The server has another key than upload-tls says: look whether it is the right server.",
}

_TRANSIENT_ANSWERS = (408, 425, 429, 500, 502, 503, 504)
_ANSWER_HINTS = {
    401: "The server wants a login, or another one: see upload-credentials.",
    403: "Give the login of upload-credentials the right to write there.",
    404: "Make the directory there, or mend upload-target.",
    405: "The server takes another upload-method, or another upload-target.",
    409: "Make the directory there, or mend upload-target.",
    411: "The server takes another upload-method, or another upload-target.",
    413: "The server takes no files of that size: change its configuration.",
    507: "Make room there.",
}


@dataclass(frozen=True)
class Answer:
    """What a server has answered: its *status*, that in words, the fields by their names in small letters, a body."""

    status: int
    words: str
    fields: dict[str, str]
    body: str


@dataclass(frozen=True)
class Login:
    """How curl logs in: with *options* in which there is no secret, one of which may have it read *stdin*."""

    options: tuple[str, ...] = ()
    stdin: bytes | None = field(default=None, repr=False)


def check(destination: Destination) -> None:
    """Raise ConfigurationError unless the URL of *destination*, its login and how it is trusted go together."""
    where = f"[{destination.section}] upload-target"
    parts = _parts(where, destination.target)
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(
            f"{where}: a URL is no place for a login.",
            hint="Write it into a file, and name that in upload-credentials.",
        )
    plain = parts.scheme.lower() == "http"
    tls = f"[{destination.section}] upload-tls"
    if isinstance(destination.tls, Path):
        check_readable(tls, destination.tls)
    if plain and destination.tls not in (None, "none"):
        raise ConfigurationError(f"{tls}: http:// has no TLS.", hint="Write https:// in upload-target.")
    if not plain and destination.tls == "none":
        raise ConfigurationError(
            f"{tls}: https:// has TLS, and none would trust any server.",
            hint="Name the CA's file, or the pin of the server's key.",
        )
    credentials.check_private(destination)
    if destination.credentials:
        credentials.login_for(destination, host_of(destination))
        if plain and destination.tls != "none":
            raise ConfigurationError(
                f"{where}: with http:// anyone on the way reads the login of upload-credentials.",
                hint="Use https://, or, if you know that way, set upload-tls = none.",
            )


def _parts(where: str, url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = SplitResult("", "", "", "", ""), None
    if (
        parts.scheme.lower() not in ("http", "https")
        or not parts.hostname
        or port == 0
        or parts.fragment
        or not re.fullmatch(r"[\x21-\x7e]+", url)
    ):
        raise ConfigurationError(
            f"{where}: {url!r} is no URL that begins with https:// or http://.",
            hint="Blanks and letters of other alphabets are written as %20 and the like.",
        )
    return parts


def host_of(destination: Destination) -> str:
    """Return the host of the URL of *destination*."""
    return urlsplit(destination.target).hostname or ""


def argv(destination: Destination, login: Login, options: Sequence[str], url: str, size: int = 0) -> list[str]:
    """Return the command that asks for *url*, with *options*, as *destination* says; *size* bytes come or go."""
    return [
        "curl",
        # A file of the user's may have it print what it sends.
        "--disable",
        "--globoff",
        *("--proto", "=http,https"),
        *("--connect-timeout", str(CONNECT_SECONDS)),
        *("--speed-limit", "1"),
        *("--speed-time", str(tries.STALL_SECONDS + round(size * _SECONDS_PER_BYTE))),
        "--suppress-connect-headers",
        *_trusting(destination),
        *login.options,
        *destination.arguments,
        *options,
        url,
    ]


def _trusting(destination: Destination) -> list[str]:
    if destination.tls is None or destination.tls == "none":
        return []
    if isinstance(destination.tls, Path):
        return ["--cacert", str(destination.tls.absolute())]
    # curl(1) checks the pin whatever --insecure says, which is for the certificate that no CA has signed.
    return ["--insecure", "--pinnedpubkey", destination.tls]


def login_of(destination: Destination) -> Login:
    """Return the login of *destination*, which curl reads from its file."""
    if destination.credentials is None:
        return Login()
    path = destination.credentials.absolute()
    is_netrc = credentials.login_for(destination, host_of(destination)) is not None
    return Login(("--netrc-file", str(path)) if is_netrc else ("--header", f"@{path}"))


def ask(
    destination: Destination,
    login: Login,
    options: Sequence[str],
    url: str,
    *,
    cwd: Path | None = None,
    size: int = 0,
    timeout: float | None = None,
) -> Answer:
    """Run curl with *options* for *url*, and go where the server sends it; return the answer, FailedTry if none."""
    for _ in range(_MOST_REDIRECTS + 1):
        answer = _answer(argv(destination, login, [*options, "--include"], url, size), cwd, login.stdin, timeout)
        place = answer.fields.get("location")
        if answer.status not in (301, 302, 307, 308) or place is None:
            return answer
        url = _sent_on(url, urljoin(url, place), secret=bool(login.options))
    raise FailedTry(f"the server sends it on more than {_MOST_REDIRECTS} times", again=False)


def _sent_on(url: str, place: str, *, secret: bool) -> str:
    """Return *place*, to which a server at *url* sends what it was asked; FailedTry if the login must not go there."""
    here, there = (urlsplit(each) for each in (url, place))
    same = (here.scheme, here.netloc.lower()) == (there.scheme, there.netloc.lower())
    if not same and secret:
        raise FailedTry(
            f"the server sends it on to {there.scheme}://{there.netloc}, which is not to get the login",
            again=False,
            hint=f"If that is right, write {place} into upload-target.",
        )
    if here.scheme == "https" and there.scheme != "https":
        raise FailedTry(f"the server sends it on to {place}, which has no TLS", again=False)
    return place


def _answer(words: Sequence[str], cwd: Path | None, stdin: bytes | None, timeout: float | None) -> Answer:
    try:
        text = command.run(words, cwd=cwd, capture=True, progress=parse_progress, stdin=stdin, timeout=timeout)
    except CommandError as error:
        raise failed(error.status, error.last_lines, error.message) from error
    except BuildError as error:
        raise FailedTry(error.message.rstrip("."), again=True) from error
    return parse_answer(text)


def failed(status: int, lines: Sequence[str], message: str) -> FailedTry:
    """Return why curl failed, from its *status* and the *lines* that it printed; *message* is for want of a reason."""
    said = [match[2] for match in map(_FAILURE.search, lines) if match]
    reason = said[-1] if said else message
    return FailedTry(reason.rstrip("."), again=status in _TRANSIENT, hint=_HINTS.get(status, ""), leaves=True)


def parse_progress(line: str) -> float | None:
    """Return the fraction in a line of ``--progress-bar``, None if it is another line."""
    if _NO_PROGRESS.fullmatch(line):
        return 0.0
    match = _PROGRESS.fullmatch(line.strip())
    return min(float(match[1]) / 100, 1.0) if match else None


def parse_answer(text: str) -> Answer:
    """Return the last answer in what ``--include`` prints, after those that only say to go on."""
    status, words, fields = 0, "", {}
    while status < 200 and (match := re.match(r"HTTP/[0-9.]+ ([0-9]{3}) ?([^\r\n]*)", text)):
        status, words = int(match[1]), match[2].strip()
        head, _, text = text.replace("\r\n", "\n").partition("\n\n")
        lines = (line.partition(":") for line in head.splitlines()[1:])
        fields = {name.strip().lower(): value.strip() for name, _, value in lines}
    return Answer(status, words, fields, text)


def check_answer(answer: Answer, what: str = "the server answers") -> None:
    """Raise FailedTry unless *answer* says that all is well."""
    if 200 <= answer.status < 300:
        return
    said = f"{what} {answer.status} {answer.words}".strip() if answer.status else f"{what} what is no HTTP"
    body = "" if "html" in answer.fields.get("content-type", "") else " ".join(printable(answer.body).split())
    reason = f"{said}: {body[:_LONGEST_REASON]}" if body else said
    again = answer.status in _TRANSIENT_ANSWERS
    raise FailedTry(reason.rstrip("."), again=again, hint=_ANSWER_HINTS.get(answer.status, ""))
