"""The hooks of an image: the directories of all its elements merged, and the order in which their scripts run."""

import errno
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..base.errors import ConfigurationError
from .resolve import Element, reading


class Phase(NamedTuple):
    """A directory of scripts that are run together, *inside* the system or on this machine."""

    directory: str
    inside: bool


PHASES = (
    Phase("root.d", False),
    Phase("extra-data.d", False),
    Phase("pre-install.d", True),
    Phase("install.d", True),
    Phase("post-install.d", True),
    Phase("post-root.d", False),
    Phase("block-device.d", False),
    Phase("pre-finalise.d", False),
    Phase("finalise.d", True),
    Phase("cleanup.d", False),
)
# What is installed beside the packages of elements comes between two phases of these.
EXTRA_PACKAGES = Phase("extra-packages.d", True)
_BEFORE_PACKAGES = "install.d"
ENVIRONMENT = "environment.d"
# Of an element itself.
_APART = ("tests", "__pycache__")
_SCRIPT, _SOURCED = re.compile(r"[0-9A-Za-z_-]+"), re.compile(r"[0-9A-Za-z_.-]+")
_NUMBER = re.compile(r"-?[0-9]+")
_INSTALL_TYPES = "install-types"
_INSTALL = re.compile(r"install\.d/(?P<of>.+)-(?P<type>[^-/]+)-install/(?P<name>[^/]+)")


@dataclass(frozen=True)
class File:
    """A file of the hooks: the *path* that it is copied from, or its *text*, and the name of its *element*."""

    path: Path
    element: str
    text: str | None = None


Hooks = Mapping[str, File]


def phases(packages: Sequence[str]) -> list[Phase]:
    """Return the phases of an image that has *packages* beside those of its elements."""
    found = [*PHASES]
    if packages:
        names = [phase.directory for phase in found]
        found.insert(names.index(_BEFORE_PACKAGES) + 1, EXTRA_PACKAGES)
    return found


def packages_command(packages: Sequence[str]) -> str:
    """Return the command that installs *packages*, by the program that an element of the distribution has."""
    return f"install-packages {shlex.join(packages)}"


def merge(elements: Iterable[Element]) -> Hooks:
    """Return the files of the hooks of *elements* by path; ConfigurationError if two have one file in a directory.

    Or if one can't be read.  A file beside the directories is the last one's that has it, as each of them has a README.
    """
    found: dict[str, File] = {}
    for element in elements:
        found |= {name: File(element.path / name, element.name, text) for name, text in element.texts.items()}
        with reading():
            files = [] if element.texts else [*_files(element.path)]
        for name, path in files:
            if "/" in name and name in found:
                raise ConfigurationError(
                    f"The elements {found[name].element} and {element.name} both have a file {name}.",
                    hint="Leave one of them out, or rename the file in one that is yours.",
                )
            found[name] = File(path, element.name)
    for name, file in found.items():
        for parent in Path(name).parents:
            if (other := found.get(str(parent))) is not None:
                raise ConfigurationError(
                    f"{name} of the element {file.element} is in a directory that is a file of {other.element}.",
                    hint="Leave one of them out, or rename the file in one that is yours.",
                )
    return found


def _files(top: Path) -> Iterator[tuple[str, Path]]:
    """Give the files of the element at *top*, each with its path there; PermissionError of one that can't be read."""
    for name, path in _paths(top):
        # A link is copied as it is.
        if not os.access(path, os.R_OK) and not path.is_symlink():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        yield name, path


def _paths(top: Path) -> Iterator[tuple[str, Path]]:
    # Links count as what they lead to.
    for path in sorted(top.iterdir()):
        if path.is_dir():
            if path.name not in _APART:
                yield from _below(path, path.name)
        elif path.is_file() and not path.name.endswith(".pyc"):
            yield path.name, path


def _below(directory: Path, name: str) -> Iterator[tuple[str, Path]]:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        inner = f"{name}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _below(Path(entry.path), inner)
        elif entry.is_symlink() or entry.is_file():
            yield inner, Path(entry.path)


def order(name: str) -> tuple[int, bytes]:
    """Return the key by which a script is sorted: the number that it begins with, then its bytes."""
    number = _NUMBER.match(name)
    return int(number[0]) if number else 0, os.fsencode(name)


def scripts(hooks: Hooks, directory: str, types: Mapping[str, str] | None = None) -> list[tuple[str, File]]:
    """Return the scripts of *directory* that run, in their order, each with its name.

    *types* are the install types of elements that have several, by element; "" has the one of all others.
    """
    found = {
        name: file
        for name, file in _in(hooks, directory)
        if _SCRIPT.fullmatch(name) and file.path.is_file() and os.access(file.path, os.X_OK)
    }
    if (
        directory == "install.d"
        and types is not None
        and any(file.element == _INSTALL_TYPES for file in hooks.values())
    ):
        found |= _of_types(hooks, types)
    return sorted(found.items(), key=lambda item: order(item[0]))


def _in(hooks: Hooks, directory: str) -> Iterator[tuple[str, File]]:
    for path, file in hooks.items():
        parent, _, name = path.rpartition("/")
        if parent == directory:
            yield name, file


def _of_types(hooks: Hooks, types: Mapping[str, str]) -> dict[str, File]:
    """Return the scripts that the element ``install-types`` will link into install.d."""
    found = {}
    for path, file in hooks.items():
        match = _INSTALL.fullmatch(path)
        if match and types.get(match["of"], types[""]) == match["type"] and os.access(file.path, os.X_OK):
            found[match["name"]] = file
    return {name: file for name, file in found.items() if _SCRIPT.fullmatch(name)}


def sourced(hooks: Hooks) -> list[tuple[str, File]]:
    """Return the files of environment.d, which are sourced before each phase, in their order: that of their bytes."""
    found = [
        (name, file)
        for name, file in _in(hooks, ENVIRONMENT)
        if _SOURCED.fullmatch(name) and (file.text is not None or file.path.is_file())
    ]
    return sorted(found, key=lambda item: os.fsencode(item[0]))


def install_types(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the install types that *environment* asks for, by element; "" has the default."""
    prefix = "DIB_INSTALLTYPE_"
    asked = {
        name.removeprefix(prefix).replace("_", "-"): value
        for name, value in environment.items()
        if name.startswith(prefix)
    }
    return {"": environment.get("DIB_DEFAULT_INSTALLTYPE") or "source"} | asked


def left_out(hooks: Hooks, phases: Sequence[Phase] = PHASES) -> list[tuple[str, str, File]]:
    """Return the files of *phases* that look like scripts and never run, with why."""
    found = []
    for phase in phases:
        for name, file in _in(hooks, phase.directory):
            if not _SCRIPT.fullmatch(name):
                reason = "its name has more than letters, digits, _ and -"
            elif not file.path.is_file() or os.access(file.path, os.X_OK):
                continue
            else:
                reason = "it is not executable"
            found.append((f"{phase.directory}/{name}", reason, file))
    return found
