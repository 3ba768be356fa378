"""Completion of the command line in shells, by argcomplete: the options are argparse's, their values are found here."""

import argparse
import os
from collections.abc import Callable, Iterable

from .base.errors import ConfigurationError
from .configuration.files import Configuration
from .outputs import OUTPUTS
from .outputs.targets import TARGETS
from .pipeline import UNTIL

# argcomplete's shell function sets it.
VARIABLE = "_ARGCOMPLETE"


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks how its command line goes on, and exit; return only where argcomplete is missing."""
    try:
        import argcomplete
        from argcomplete.completers import DirectoriesCompleter, FilesCompleter
    except ImportError:
        return
    directories, files = DirectoriesCompleter(), FilesCompleter()
    completers = {
        "format": _some_of(OUTPUTS),
        "target": _some_of(TARGETS),
        "cache_dir": directories,
        "output_dir": directories,
        "verify": directories,
        "until": _stops,
        "run": lambda prefix, **_: [*_images(prefix), *files(prefix)],
    }
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


def _stops(prefix: str, **_context: object) -> list[str]:
    return [*UNTIL]


def _some_of(names: Iterable[str]) -> Callable[..., list[str]]:
    def complete(prefix: str, **_context: object) -> list[str]:
        before, comma, _ = prefix.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{name}" for name in names if name not in given]

    return complete
