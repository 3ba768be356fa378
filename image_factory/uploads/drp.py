"""Upload to the files of RackN's Digital Rebar: HTTP with its paths, its tokens and its checksums."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from ..base import log
from ..base.errors import BuildError, ConfigurationError
from ..base.log import logger
from ..configuration.settings import Destination
from ..model import Artifact
from . import credentials, curl, http, tries
from .tries import FailedTry

KEYS: tuple[str, ...] = ("upload-credentials", "upload-tls", "upload-verify", "upload-index", "upload-keep")

_API = "/api/v3/"
# A token is asked for at each try, and has to last until what has come is verified.
_TOKEN_SECONDS = 4 * 3600
# The server computes it when a file has come; some say it in the other field.
_VERIFY = "header:X-DRP-SHA256SUM,ETag"
# What they call a format; image-deploy has curtin unpack it, which knows no zstd, and Eikon is RackN's own.
_DEPLOYED = {
    "tgz": "tgz", "tar.gz": "tgz", "tar.xz": "txz", "raw": "dd-raw", "raw.gz": "dd-gz", "raw.xz": "dd-xz",
    "dd.tgz": "dd-tgz",
}  # fmt: skip
_BY_EIKON = _DEPLOYED | {"tar": "tar", "tar.zst": "tar-zst", "raw.zst": "dd-zst", "qcow2": "qcow"}
_QUIET = ("--silent", "--show-error")


def programs(destination: Destination) -> list[str]:
    """Return the programs that uploading to *destination* needs here."""
    return ["curl"]


def check(destination: Destination, file_name: str) -> None:
    """Raise ConfigurationError unless *destination* has a URL for *file_name*, and a login."""
    http.check(destination, file_name)
    if urlsplit(destination.target).query:
        raise ConfigurationError(f"[{destination.section}] upload-target: a file of RackN's has no '?' in its URL.")
    if destination.credentials is None:
        raise ConfigurationError(
            f"[{destination.section}] lacks 'upload_credentials'. RackN's server wants a login.",
            hint="It is a file with a line: machine HOST login USER password PASSWORD",
        )


def _as_http(destination: Destination) -> Destination:
    """Return *destination* as the web server that its API is."""
    path = urlsplit(destination.target).path.lstrip("/")
    target = _api_url(destination, f"files/{path.removeprefix(f'{_API}files/'.lstrip('/'))}")
    return dataclasses.replace(destination, target=target, method="post", verify=destination.verify or _VERIFY)


def _api_url(destination: Destination, path: str, query: str = "") -> str:
    return urlunsplit(urlsplit(destination.target)._replace(path=f"{_API}{path}", query=query))


def _token_url(destination: Destination, user: str) -> str:
    return _api_url(destination, f"users/{quote(user, safe='')}/token", f"ttl={_TOKEN_SECONDS}")


def _user_of(destination: Destination) -> str | None:
    """Return the user who asks for a token, None where the file has the field of a login itself."""
    login = credentials.login_for(destination, curl.host_of(destination))
    return None if login is None else login[0]


def commands(destination: Destination, artifact: Artifact) -> list[list[str]]:
    """Return the commands that ask for a token, upload *artifact* and what belongs to it, and verify them."""
    user = _user_of(destination)
    if user is None:
        return http.commands(_as_http(destination), artifact)
    asking = curl.argv(destination, curl.login_of(destination), [*_QUIET, "--include"], _token_url(destination, user))
    return [asking, *http.commands_with(_as_http(destination), artifact, _with_token("TOKEN"))]


def _with_token(token: str) -> curl.Login:
    return curl.Login(("--header", "@-"), f"Authorization: Bearer {token}\n".encode())


def _log_in(destination: Destination) -> curl.Login:
    """Return the login with a token that is asked for now; FailedTry if there is none."""
    login = curl.login_of(destination)
    user = _user_of(destination)
    if user is None:
        return login
    answer = curl.ask(destination, login, _QUIET, _token_url(destination, user), timeout=tries.STALL_SECONDS)
    curl.check_answer(answer, "asked for a token, the server answers")
    try:
        token = json.loads(answer.body)["Token"]
    except (ValueError, TypeError, KeyError, RecursionError):
        token = None
    if not isinstance(token, str) or not token.isprintable() or not token:
        raise FailedTry("asked for a token, the server gives none", again=False, hint="Is it RackN's server?")
    log.hide([token])
    return _with_token(token)


def upload(destination: Destination, artifact: Artifact) -> None:
    """Upload *artifact*, then what belongs to it, each verified; BuildError has the reason and the next move.

    What is to be said to who deploys it is logged.
    """
    http.upload_with(_as_http(destination), artifact, lambda: _log_in(destination))
    for who, values in parameters(destination, artifact).items():
        logger.info("Parameters of %s: %s", who, json.dumps(values))


def parameters(destination: Destination, artifact: Artifact) -> dict[str, dict[str, str]]:
    """Return the parameters by which image-deploy and Eikon deploy *artifact*, for those that can."""
    path = urlsplit(http.url_of(_as_http(destination), artifact, artifact.path)).path
    url = f"{{{{.ProvisionerURL}}}}/{path.removeprefix(_API)}"
    found = {}
    if kind := _DEPLOYED.get(artifact.format):
        found["image-deploy"] = {"image-url": url, "image-type": kind, "image-os": "linux"}
    if kind := _BY_EIKON.get(artifact.format):
        assert artifact.sha256 is not None
        found["eikon"] = {"image-url": url, "image-type": kind, "image-checksum": artifact.sha256}
    return {who: {f"{who}/{key}": value for key, value in values.items()} for who, values in found.items()}


def below(destination: Destination, directory: str) -> Destination:
    """Return *destination* with a URL that ends with *directory* in it; the server makes it as a file comes."""
    return http.below(destination, directory)


def read_argv(destination: Destination, name: str) -> list[str]:
    """Return the command that reads the file *name* of *destination*, with a token as ``commands`` asks for one."""
    return http.read_argv_with(_as_http(destination), name, _shown_login(destination))


def _shown_login(destination: Destination) -> curl.Login:
    return curl.login_of(destination) if _user_of(destination) is None else _with_token("TOKEN")


def read(destination: Destination, name: str) -> bytes | None:
    """Return the file *name* of *destination*, None if it is not there; FailedTry if that can't be known."""
    return http.read_with(_as_http(destination), name, _log_in(destination))


def removing(destination: Destination, names: Sequence[str]) -> list[list[str]]:
    """Return the commands that remove the files *names* of *destination*, with a token too."""
    return http.removing_with(_as_http(destination), names, _shown_login(destination))


def remove(destination: Destination, names: Sequence[str]) -> dict[str, FailedTry]:
    """Remove the files *names* of *destination*; return why those that are left are, FailedTry if none could go."""
    return http.remove_with(_as_http(destination), names, _log_in(destination))


def probe(destination: Destination, directory: Path) -> bool:
    """Raise BuildError with the reason unless the server of *destination* gives a token, and lets us in."""
    try:
        _log_in(destination)
    except FailedTry as failed:
        raise BuildError(f"{failed.reason}.", hint=failed.hint or None) from failed
    return http.probe(_as_http(destination), directory)
