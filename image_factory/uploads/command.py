"""Upload with a command of the user's own, which is given the files."""

import shlex
from pathlib import Path

from ..base import command
from ..base.errors import CommandError, ConfigurationError, command_line
from ..base.log import logger
from ..configuration.settings import Destination
from ..model import Artifact
from .tries import FailedTry, files_of, persist

KEYS: tuple[str, ...] = ()

# sysexits.h: EX_TEMPFAIL, "the user is invited to try again".
_TRY_AGAIN = 75


def _words(destination: Destination) -> list[str]:
    """Return the command that the target is, none if it is no command."""
    try:
        return shlex.split(destination.target)
    except ValueError:
        return []


def programs(destination: Destination) -> list[str]:
    """Return the programs that uploading to *destination* needs here."""
    return _words(destination)[:1]


def check(destination: Destination, file_name: str) -> None:
    """Raise ConfigurationError unless the target of *destination* is a command."""
    if not any(_words(destination)[:1]):
        raise ConfigurationError(
            f"[{destination.section}] upload-target: {destination.target!r} is no command.",
            hint="It is split into words like a shell does.",
        )


def commands(destination: Destination, artifact: Artifact) -> list[list[str]]:
    """Return the command that uploads *artifact* and what belongs to it; it runs beside the files."""
    return [[*_words(destination), *destination.arguments, *(path.name for path in files_of(artifact))]]


def upload(destination: Destination, artifact: Artifact) -> None:
    """Have the command upload *artifact* and what belongs to it; BuildError has the reason and the next move.

    The command says with its status that it has failed, or that another try is of use.
    """
    [argv] = commands(destination, artifact)

    def attempt(failed: FailedTry | None) -> None:
        try:
            command.run(argv, cwd=artifact.path.parent)
        except CommandError as error:
            raise FailedTry(error.message.rstrip("."), again=error.status == _TRY_AGAIN) from error

    persist(destination, artifact, attempt, command_line(argv))
    logger.info("%s is at %s, as its command says.", artifact.path.name, destination.section)


def probe(destination: Destination, directory: Path) -> bool:
    """Return that only an upload can tell."""
    return False
