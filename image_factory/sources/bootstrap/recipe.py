"""What a tree is bootstrapped from: the YAML that the answer file of a section becomes."""

from dataclasses import dataclass
from typing import Any

import yaml

from ...base.errors import ConfigurationError
from ...model import Plan
from .. import answers


@dataclass(frozen=True)
class Recipe:
    """A system of Debian's kind.

    *variant* is mmdebstrap's, which says what a system has at least.  *sources* are lines of apt's sources.list,
    *debconf* what debconf-set-selections reads, *script* is run by sh as root of the finished tree.
    """

    suite: str
    variant: str
    sources: tuple[str, ...]
    packages: tuple[str, ...]
    recommends: bool
    debconf: str
    script: str
    proxy: str


_VARIANTS = ("minbase", "important", "standard")

# What each key may be, for people, and what tells.
_TEXT = ("a text", lambda value: isinstance(value, str))
_KINDS: dict[str, tuple[str, Any]] = {
    "suite": _TEXT,
    "variant": (" or ".join(_VARIANTS), lambda value: value in _VARIANTS),
    "sources": (
        "a list of texts",
        lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    ),
    "packages": _TEXT,
    "recommends": ("true or false", lambda value: isinstance(value, bool)),
    "debconf": _TEXT,
    "script": _TEXT,
    "proxy": _TEXT,
}
_NEEDED = ("suite", "sources")


def read(plan: Plan) -> Recipe:
    """Return the recipe of *plan*; ConfigurationError names file, line and key of what is wrong."""
    where = answers.where(plan)
    try:
        values = yaml.safe_load(answers.content(plan).decode())
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{where} is not UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigurationError(f"{where}{line}: it is no well-formed YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{where}: it is no well-formed YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{where} has no keys and values.", hint="--show-answers shows a recipe's.")
    for key, value in values.items():
        if key not in _KINDS:
            raise ConfigurationError(f"{where}: {key!r} is no key of it.", hint=f"It has {', '.join(_KINDS)}.")
        accepted, is_it = _KINDS[key]
        if not is_it(value):
            raise ConfigurationError(f"{where}: {key} is not accepted, only {accepted}.")
    if missing := [key for key in _NEEDED if not values.get(key)]:
        raise ConfigurationError(f"{where} lacks {' and '.join(missing)}.")
    return Recipe(
        suite=values["suite"],
        variant=values.get("variant", "important"),
        sources=tuple(values["sources"]),
        packages=tuple(dict.fromkeys(values.get("packages", "").split())),
        recommends=values.get("recommends", True),
        debconf=values.get("debconf", ""),
        script=values.get("script", ""),
        proxy=values.get("proxy", ""),
    )
