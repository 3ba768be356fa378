"""Completion of the command line in shells, by argcomplete: the options are argparse's, their values are found here."""

import argparse
import os

from .base.errors import ConfigurationError
from .configuration.files import Configuration
from .outputs import OUTPUTS

# argcomplete's shell function sets it.
VARIABLE = "_ARGCOMPLETE"


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks how its command line goes on, and exit; return only where argcomplete is missing."""
    try:
        import argcomplete
        from argcomplete.completers import DirectoriesCompleter
    except ImportError:
        return
    directories = DirectoriesCompleter()
    completers = {"format": _formats, "cache_dir": directories, "output_dir": directories}
    for action in parser._actions:
        completer = completers.get(action.dest) if action.option_strings else _images
        if completer is not None:
            action.completer = completer  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _images(prefix: str, **_context: object) -> list[str]:
    try:
        return Configuration(os.environ).images()
    except ConfigurationError:
        # The shell has no place for a message.
        return []


def _formats(prefix: str, **_context: object) -> list[str]:
    before, comma, _ = prefix.rpartition(",")
    given = before.split(",")
    return [f"{before}{comma}{name}" for name in OUTPUTS if name not in given]
