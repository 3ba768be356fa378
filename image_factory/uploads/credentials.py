"""Files of logins: who may read them, what form they have, and what of them nobody is to see."""

import base64
import netrc
import os
import re
import stat
from pathlib import Path

from ..base import log
from ..base.errors import ConfigurationError
from ..base.files import check_readable
from ..configuration.settings import Destination

# The place of a shorter one would tell it; a field of HTTP may be a common word, which is masked in the whole log.
_SHORTEST_PASSWORD, _SHORTEST_FIELD = 4, 8
_LARGEST_FILE = 1 << 20
# With a blank behind the colon, which USER:PASSWORD has not.
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+:[ \t]+(\S.*)")


def check_private(destination: Destination) -> None:
    """Raise ConfigurationError unless the file of the login of *destination* is there, for nobody else to read."""
    path = destination.credentials
    if path is None:
        return
    where = where_of(destination)
    check_readable(where, path)
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigurationError(f"{where}: {path} is another user's file.", hint="Make a file of your own.")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigurationError(f"{where}: others may read {path}.", hint=f"chmod 600 {path}")


def where_of(destination: Destination) -> str:
    """Return how an error names the key."""
    return f"[{destination.section}] upload-credentials"


def login_for(destination: Destination, host: str) -> tuple[str, str] | None:
    """Return the user and the password for *host* of a file in netrc's form, None if it has fields of HTTP.

    From here on nothing shows what is secret of it.  ConfigurationError if it has neither.
    """
    path = destination.credentials
    assert path is not None
    where = where_of(destination)
    text = _text_of(where, path)
    if re.match(r"\s*(#.*\s+)*(machine|default|macdef)\b", text):
        return _login_of(where, path, host)
    lines = [line for line in text.splitlines() if line.strip()]
    fields = [_HEADER.fullmatch(line.strip()) for line in lines]
    if not lines or not all(fields):
        raise ConfigurationError(
            f"{where}: {path} is no file of logins.",
            hint="It has lines as netrc has them, 'machine HOST login USER password PASSWORD', or fields of HTTP "
            "such as 'Authorization: Bearer TOKEN'.",
        )
    values = [field[1].strip() for field in fields if field]
    _hide([*values, *(value.split()[-1] for value in values)], _SHORTEST_FIELD)
    return None


def _text_of(where: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_LARGEST_FILE).decode()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{where}: {path} is no text that can be read.") from error


def _login_of(where: str, path: Path, host: str) -> tuple[str, str]:
    try:
        found = netrc.netrc(str(path)).authenticators(host)
    except (netrc.NetrcParseError, UnicodeError) as error:
        # Its message has the word at which it stopped, which may be a password.
        line = getattr(error, "lineno", None)
        raise ConfigurationError(f"{where}: {path} is no netrc file: look at line {line}.") from None
    if found is None or not found[0] or not found[2]:
        raise ConfigurationError(
            f"{where}: {path} has no login and password for {host}.",
            hint=f"Add a line: machine {host} login USER password PASSWORD",
        )
    user, password = found[0], found[2]
    basic = base64.b64encode(f"{user}:{password}".encode()).decode()
    _hide([password, basic], _SHORTEST_PASSWORD)
    return user, password


def _hide(secrets: list[str], shortest: int) -> None:
    log.hide(secret for secret in secrets if len(secret) >= shortest)
