"""Upload to a web server with curl: PUT or POST, and how a file is verified there."""

import base64
import binascii
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from ..base import command, files
from ..base.errors import BuildError, CommandError, ConfigurationError, command_line
from ..base.log import logger
from ..configuration.settings import Destination
from ..model import Artifact
from . import curl, tries
from .tries import FailedTry, digests_of, files_of, persist

KEYS: tuple[str, ...] = (
    "upload-method",
    "upload-headers",
    "upload-credentials",
    "upload-tls",
    "upload-verify",
    "upload-index",
    "upload-keep",
)

_TYPE = "Content-Type: application/octet-stream"
_QUIET = ("--silent", "--show-error")
_HEAD = (*_QUIET, "--head")
_DELETE = (*_QUIET, "--request", "DELETE")
_GONE = (404, 410)
_VERIFY_HINT = "upload-verify = download reads it back, none leaves it unverified."
# What comes is read to its end; what a broken download leaves has another digest than any file.
_DIGEST_SCRIPT = '{ "$@" || echo broken; } | sha256sum'


def programs(destination: Destination) -> list[str]:
    """Return the programs that uploading to *destination* needs here."""
    return ["curl"]


def check(destination: Destination, file_name: str) -> None:
    """Raise ConfigurationError unless *destination* has a URL for *file_name*, and a login that goes with it."""
    curl.check(destination)
    parts = urlsplit(destination.target)
    if not parts.path.endswith("/") and file_name not in f"{parts.path}?{parts.query}":
        raise ConfigurationError(
            f"[{destination.section}] upload-target: it has no place for the names of files.",
            hint="End it with a slash, or write ${image} where the file's name is to be.",
        )


def url_of(destination: Destination, artifact: Artifact, path: Path) -> str:
    """Return the URL of the file *path*, which belongs to *artifact*."""
    name = quote(path.name, safe="+~@")
    parts = urlsplit(destination.target)
    if parts.path.endswith("/"):
        return urlunsplit(parts._replace(path=parts.path + name))
    # The last one: a directory may have the name too.
    before, _, after = destination.target.rpartition(artifact.path.name)
    return f"{before}{name}{after}"


def sending(destination: Destination, path: Path) -> list[str]:
    """Return the options of curl that send the file *path*, which is in the current directory."""
    fields = [_TYPE, *destination.headers]
    if any(field.lower().startswith("content-type:") for field in destination.headers):
        fields.remove(_TYPE)
    options = ["--progress-bar", *(word for field in fields for word in ("--header", field))]
    if destination.method == "post":
        # Else curl sends what --upload-file names with PUT.
        options += ["--request", "POST"]
    return [*options, "--upload-file", path.name]


def commands(destination: Destination, artifact: Artifact) -> list[list[str]]:
    """Return the commands that upload *artifact* and what belongs to it and verify them; they run beside the files."""
    return commands_with(destination, artifact, curl.login_of(destination))


def commands_with(destination: Destination, artifact: Artifact, login: curl.Login) -> list[list[str]]:
    """Return what ``commands`` does, for another *login* than that of the file."""
    found = []
    for path in files_of(artifact):
        url = url_of(destination, artifact, path)
        found.append(curl.argv(destination, login, [*sending(destination, path), "--include"], url))
        verify = _verification(destination)
        found += [verify.argv(destination, login, url)] if verify.argv else []
    return found


def upload(destination: Destination, artifact: Artifact) -> None:
    """Upload *artifact*, then what belongs to it, each verified; BuildError has the reason and the next move.

    Who sees the checksum there finds the whole file.  A failure that may pass is tried again.
    """
    upload_with(destination, artifact, lambda: curl.login_of(destination))


def upload_with(destination: Destination, artifact: Artifact, log_in: Callable[[], curl.Login]) -> None:
    """Do what ``upload`` does with what *log_in* gives at each try; it may raise FailedTry."""
    left = [*files_of(artifact)]
    digests = digests_of(artifact)
    url = url_of(destination, artifact, artifact.path)
    by_hand = curl.argv(destination, curl.login_of(destination), sending(destination, artifact.path), url)

    def attempt(failed: FailedTry | None) -> None:
        login = log_in()
        while left:
            url = url_of(destination, artifact, left[0])
            size = left[0].stat().st_size
            answer = curl.ask(destination, login, sending(destination, left[0]), url, cwd=left[0].parent, size=size)
            curl.check_answer(answer)
            _verification(destination).verify(_Asked(destination, login, left[0], url, digests[left[0].name]))
            del left[0]

    persist(destination, artifact, attempt, command_line(by_hand))


def probe(destination: Destination, directory: Path) -> bool:
    """Raise BuildError with the reason unless the server of *destination* answers, and lets us in."""
    try:
        login = curl.login_of(destination)
        answer = curl.ask(destination, login, _HEAD, destination.target, timeout=tries.PROBE_SECONDS)
        # It may show no directory, and have no file of that name yet.
        if answer.status in (401, 407) or answer.status >= 500 or not answer.status:
            curl.check_answer(answer)
    except FailedTry as failed:
        raise BuildError(f"{failed.reason}.", hint=failed.hint or None) from failed
    return True


def below(destination: Destination, directory: str) -> Destination:
    """Return *destination* with a URL that ends with *directory* in it; many servers make it as a file comes."""
    parts = urlsplit(destination.target)
    return dataclasses.replace(destination, target=urlunsplit(parts._replace(path=f"{parts.path}{directory}/")))


def read_argv(destination: Destination, name: str) -> list[str]:
    """Return the command that reads the file *name* of *destination*."""
    return read_argv_with(destination, name, curl.login_of(destination))


def read_argv_with(destination: Destination, name: str, login: curl.Login) -> list[str]:
    """Return what ``read_argv`` does, for another *login* than that of the file."""
    return curl.argv(destination, login, [*_QUIET, "--include"], _url_in(destination, name))


def _url_in(destination: Destination, name: str) -> str:
    path = Path(name)
    return url_of(destination, Artifact(path, "", 0), path)


def read(destination: Destination, name: str) -> bytes | None:
    """Return the file *name* of *destination*, None if it is not there; FailedTry if that can't be known."""
    return read_with(destination, name, curl.login_of(destination))


def read_with(destination: Destination, name: str, login: curl.Login) -> bytes | None:
    """Do what ``read`` does with another *login* than that of the file."""
    answer = curl.ask(destination, login, _QUIET, _url_in(destination, name))
    if answer.status in _GONE:
        return None
    curl.check_answer(answer, f"asked for {name}, the server answers")
    return answer.body.encode()


def removing(destination: Destination, names: Sequence[str]) -> list[list[str]]:
    """Return the commands that remove the files *names* of *destination*."""
    return removing_with(destination, names, curl.login_of(destination))


def removing_with(destination: Destination, names: Sequence[str], login: curl.Login) -> list[list[str]]:
    """Return what ``removing`` does, for another *login* than that of the file."""
    return [curl.argv(destination, login, [*_DELETE, "--include"], _url_in(destination, name)) for name in names]


def remove(destination: Destination, names: Sequence[str]) -> dict[str, FailedTry]:
    """Remove the files *names* of *destination*; return why those that are left are."""
    return remove_with(destination, names, curl.login_of(destination))


def remove_with(destination: Destination, names: Sequence[str], login: curl.Login) -> dict[str, FailedTry]:
    """Do what ``remove`` does with another *login* than that of the file."""
    left = {}
    for name in names:
        try:
            answer = curl.ask(destination, login, _DELETE, _url_in(destination, name))
            if answer.status not in _GONE:
                curl.check_answer(answer)
        except FailedTry as failed:
            left[name] = failed
    return left


# How a file is verified.


@dataclass(frozen=True)
class _Asked:
    """The file *path*, of which the server is asked whether it has *digest* at *url*."""

    destination: Destination
    login: curl.Login
    path: Path
    url: str
    digest: str


@dataclass(frozen=True)
class _Verification:
    """A way to verify a file, and the command that it runs, if it does."""

    verify: Callable[[_Asked], None]
    argv: Callable[[Destination, curl.Login, str], list[str]] | None = None


def _verification(destination: Destination) -> _Verification:
    kind = (destination.verify or "download").partition(":")[0]
    return _VERIFICATIONS[kind]


def _head_argv(destination: Destination, login: curl.Login, url: str) -> list[str]:
    return curl.argv(destination, login, [*_HEAD, "--include"], url)


def _by_fields(asked: _Asked) -> None:
    names = (asked.destination.verify or "").partition(":")[2].split(",")
    fields = _head(asked)
    name = next((name for name in names if fields.get(name.lower())), names[0])
    _compare(asked, name, fields.get(name.lower()))


def _by_etag(asked: _Asked) -> None:
    _compare(asked, "ETag", _head(asked).get("etag"))


def _head(asked: _Asked) -> dict[str, str]:
    """Return the fields of what is at the URL; FailedTry unless it is there."""
    answer = curl.ask(asked.destination, asked.login, _HEAD, asked.url)
    try:
        curl.check_answer(answer, "asked for what came, the server answers")
    except FailedTry as failed:
        raise FailedTry(failed.reason, again=failed.again, hint=failed.hint or _VERIFY_HINT) from failed
    return answer.fields


def _compare(asked: _Asked, name: str, value: str | None) -> None:
    """Raise FailedTry unless the *value* of the field *name* is a checksum of the file."""
    found = digest_in(value or "")
    if found is None:
        said = f"its {name} is {value}, which is no checksum" if value else f"it has no {name}"
        reason = f"the server can't be asked whether {asked.path.name} is whole: {said}"
        raise FailedTry(reason, again=False, hint=_VERIFY_HINT)
    # S3 has the MD5 of what comes in one part.
    wanted = asked.digest if len(found) == 64 else files.digest_of(asked.path, "md5")
    if found != wanted:
        raise _differs(asked, f"has another checksum there, {found}")
    logger.info("%s is verified at %s: %s %s", asked.path.name, asked.destination.section, name, found)


def digest_in(value: str) -> str | None:
    """Return the SHA-256 or MD5 that the *value* of a field is, in hexadecimal digits, None if it is none."""
    word = re.sub(r"(?i)^(W/)?\"?(sha-?256[:=]|md5[:=])?", "", value.strip()).strip('":')
    if re.fullmatch(r"(?i)[0-9a-f]{64}|[0-9a-f]{32}", word):
        return word.lower()
    try:
        data = base64.b64decode(word, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data.hex() if len(data) in (16, 32) else None


def _differs(asked: _Asked, how: str) -> FailedTry:
    hint = "It is damaged: look at that machine's disk."
    return FailedTry(f"{asked.path.name} {how}", again=True, damaged=True, hint=hint)


def _download_argv(destination: Destination, login: curl.Login, url: str) -> list[str]:
    # Elsewhere fields with a login must not go, and they do with curl.
    redirects = ["--max-redirs", "0"] if login.options else []
    protocol = ["--proto-redir", "=https"] if url.lower().startswith("https:") else []
    options = ["--silent", "--show-error", "--fail", "--location", *redirects, *protocol]
    return ["sh", "-c", _DIGEST_SCRIPT, "sh", *curl.argv(destination, login, options, url)]


def _by_download(asked: _Asked) -> None:
    lines: list[str] = []
    argv = _download_argv(asked.destination, asked.login, asked.url)
    try:
        text = command.run(argv, capture=True, progress=lines.append, stdin=asked.login.stdin)
    except CommandError as error:
        raise FailedTry(f"it can't be verified: {error.message}", again=True) from error
    said = next((match for line in lines if (match := re.search(r"curl: \((\d+)\) (.*)", line))), None)
    if said:
        failed = curl.failed(int(said[1]), lines, "")
        again = failed.again or bool(re.search(r"error: (5\d\d|404|408|429)", failed.reason))
        raise FailedTry(f"it can't be verified: {failed.reason}", again=again, hint=failed.hint or _VERIFY_HINT)
    found = text.split()[0] if text.split() else "nothing"
    if found != asked.digest:
        raise _differs(asked, f"has another SHA-256 there, {found}")
    logger.info("%s is verified at %s: SHA-256 %s", asked.path.name, asked.destination.section, found)


def _not_at_all(asked: _Asked) -> None:
    logger.warning("%s is not verified at %s, as upload-verify says.", asked.path.name, asked.destination.section)


_VERIFICATIONS = {
    "header": _Verification(_by_fields, _head_argv),
    "etag": _Verification(_by_etag, _head_argv),
    "download": _Verification(_by_download, _download_argv),
    "none": _Verification(_not_at_all),
}
