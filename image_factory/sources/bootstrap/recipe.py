"""What a tree is bootstrapped from: the YAML that the answer file of a section becomes."""

import dataclasses
import difflib
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from ...base.errors import ConfigurationError
from ...machines import arch
from ...model import Plan
from .. import answers


@dataclass(frozen=True)
class Recipe:
    """A system of Debian's kind.

    *variant* is mmdebstrap's, which says what a system has at least.  *sources* are lines of apt's sources.list, each
    as its mirrors have it, in the order in which they are tried.  *debconf* is what debconf-set-selections reads,
    *script* is run by sh as root of the finished tree.
    """

    suite: str
    variant: str
    sources: tuple[tuple[str, ...], ...]
    packages: tuple[str, ...]
    recommends: bool
    debconf: str
    script: str
    proxy: str

    @property
    def lines(self) -> tuple[str, ...]:
        """The sources at the first of their mirrors."""
        return tuple(mirrors[0] for mirrors in self.sources)

    def without(self, uri: str) -> "Recipe | None":
        """Return the recipe without the mirror that *uri* is on; None if a source has no other, or none is there."""
        found = [mirror for mirror in map(_mirror, self.lines) if _plain(uri).startswith(mirror)]
        if not found:
            return None
        gone = max(found, key=len)
        sources = tuple(tuple(line for line in mirrors if _mirror(line) != gone) for mirrors in self.sources)
        return dataclasses.replace(self, sources=sources) if all(sources) else None


# Of packages that a variant has besides the essential ones.
PRIORITIES = {
    "minbase": (),
    "important": ("required", "important"),
    "standard": ("required", "important", "standard"),
}
_VARIANTS = tuple(PRIORITIES)

# A name of a package with what apt lets follow it: the version, the suite, the architecture.  No option is one.
_PACKAGE = r"[a-z0-9][a-z0-9.+-]*(?::[a-z0-9-]+)?(?:[=/][A-Za-z0-9.+~:-]+)?"
_SOURCE = r"deb(?:-src)?(?: +\[[^\]\n]*\])? +(?P<uri>[a-z][a-z0-9+.-]*:\S+) +(?P<suite>\S+)(?: +\S+)*"

# What each key may be, for people, and the pattern of its text, or of each text where it is a list.
_KINDS: dict[str, tuple[str, str]] = {
    "suite": ("the name of one", "[A-Za-z0-9][A-Za-z0-9._+~/-]*"),
    "variant": (" or ".join(_VARIANTS), "|".join(_VARIANTS)),
    "sources": ("a list of lines of sources.list, deb URI SUITE COMPONENTS, or of lists of them, mirrors", _SOURCE),
    "packages": ("names of packages, with blanks between", rf"\s*(?:{_PACKAGE}(?:\s+|$))*"),
    "recommends": ("true or false", "true|false"),
    "debconf": ("a text", r"[\s\S]*"),
    "script": ("a text", r"[\s\S]*"),
    # It stands in quotes in a line of apt's configuration.
    "proxy": ("a URL without quotes", r"(?:https?|socks5h)://[^\s\"';{}\\]+|"),
}
_LISTS = ("sources",)
_NEEDED = ("suite", "sources")


def architecture(plan: Plan) -> str:
    """Return Debian's name of the tree's architecture."""
    return arch.debian_arch(plan.variables.get("arch", ""), plan.settings.arch)


def read(plan: Plan) -> Recipe:
    """Return the recipe of *plan*; ConfigurationError names file, line and key of what is wrong."""
    where = answers.where(plan)
    found: dict[str, list[tuple[str, ...]]] = {}
    for key, value in _nodes(plan):
        place = f"{where}, line {key.start_mark.line + 1}"
        name = str(key.value)
        if name not in _KINDS:
            near = difflib.get_close_matches(name, _KINDS, n=1)
            meant = f"Perhaps {near[0]} is meant. " if near else ""
            raise ConfigurationError(f"{place}: {name!r} is no key of it.", hint=f"{meant}It has {', '.join(_KINDS)}.")
        if name in found:
            raise ConfigurationError(f"{place}: {name} is there twice.", hint="Leave one of the two out.")
        found[name] = _texts(where, name, value)
    if missing := [key for key in _NEEDED if not any(found.get(key, []))]:
        raise ConfigurationError(f"{where} lacks {' and '.join(missing)}.", hint="--show-answers shows all of it.")
    one = {key: texts[0][0] for key, texts in found.items() if key not in _LISTS}
    return Recipe(
        suite=one["suite"],
        variant=one.get("variant", "important"),
        sources=tuple(found["sources"]),
        packages=tuple(dict.fromkeys(one.get("packages", "").split())),
        recommends=one.get("recommends", "true") == "true",
        debconf=one.get("debconf", ""),
        script=one.get("script", ""),
        proxy=one.get("proxy", ""),
    )


def lists(wanted: Recipe) -> list[str]:
    """Return the URIs of what each of the sources of *wanted* lists, at all their mirrors."""
    found = []
    lines = (line for mirrors in wanted.sources for line in mirrors)
    for match in filter(None, (re.fullmatch(_SOURCE, line) for line in lines)):
        uri, suite = match["uri"].rstrip("/"), match["suite"]
        # Where it ends with a slash it is the directory itself.
        found.append(f"{uri}/{suite}InRelease" if suite.endswith("/") else f"{uri}/dists/{suite}/InRelease")
    return list(dict.fromkeys(found))


def suite_of(line: str) -> str:
    """Return the suite of the *line* of sources; nothing if it is no such line."""
    match = re.fullmatch(_SOURCE, line)
    return match["suite"] if match else ""


def mirrors(lines: Sequence[str]) -> list[str]:
    """Return the URIs of the archives that *lines* of sources name."""
    return list(dict.fromkeys(_mirror(line) for line in lines))


def _mirror(line: str) -> str:
    """Return the URI of the archive that the *line* names, as apt prints it, with a slash at its end."""
    match = re.fullmatch(_SOURCE, line)
    return _plain(match["uri"]) if match else ""


def _plain(uri: str) -> str:
    """Return *uri* without a user and a password, and with a slash at its end."""
    parts = urllib.parse.urlsplit(uri)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/") + "/"


def _nodes(plan: Plan) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the keys and values of the recipe of *plan*, which know their lines."""
    where = answers.where(plan)
    try:
        top = yaml.compose(answers.content(plan).decode(), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{where} is not UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigurationError(f"{where}{line}: it is no well-formed YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{where}: it is no well-formed YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise ConfigurationError(f"{where}: it is no well-formed YAML: too many lists in lists.") from error
    if not isinstance(top, yaml.MappingNode):
        raise ConfigurationError(f"{where} has no keys and values.", hint="--show-answers shows a recipe's.")
    return list(top.value)


def _texts(where: str, name: str, node: yaml.Node) -> list[tuple[str, ...]]:
    """Return the texts of the value of the key *name*: one, or those of a list, each of which may be a list itself.

    ConfigurationError if one is wrong.
    """
    if name not in _LISTS:
        return [(_checked(where, name, node),)]
    if not isinstance(node, yaml.SequenceNode):
        raise _unaccepted(where, name, node)
    return [tuple(_checked(where, name, text) for text in _listed(each)) for each in node.value]


def _listed(node: yaml.Node) -> list[yaml.Node]:
    return list(node.value) if isinstance(node, yaml.SequenceNode) and node.value else [node]


def _checked(where: str, name: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or not re.fullmatch(_KINDS[name][1], _text(node)):
        raise _unaccepted(where, name, node)
    return _text(node)


def _unaccepted(where: str, name: str, node: yaml.Node) -> ConfigurationError:
    accepted, _ = _KINDS[name]
    return ConfigurationError(f"{where}, line {node.start_mark.line + 1}: {name} is not accepted, only {accepted}.")


def _text(node: yaml.ScalarNode) -> str:
    """Return the text of *node*: true and false are small, nothing is empty."""
    if node.tag.endswith(":bool"):
        return "true" if node.value.lower() in ("true", "yes", "on") else "false"
    return "" if node.tag.endswith(":null") else str(node.value)
