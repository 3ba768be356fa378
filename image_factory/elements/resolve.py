"""Which elements an image has: found by name in directories, with all that they depend on."""

import contextlib
import difflib
import importlib.metadata
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..base.errors import ConfigurationError
from ..base.log import logger

SYSTEM = "operating-system"
BLOCK_DEVICE = "block-device"
# An image has it unless it asks for nothing but what it names.
BASE = "base"
_DISTRIBUTION, _PROGRAM, _STOCK = "diskimage-builder", "disk-image-create", "diskimage_builder/elements"
_NEAR, _CUTOFF = 3, 0.6


@dataclass(frozen=True)
class Element:
    """A directory of scripts: its *path*, the names that it *provides* and those that it *needs*.

    One that is made by a build has *texts*, by their names in it; its *path* is relative to what the build has for it.
    """

    name: str
    path: Path
    provides: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def readme(self) -> str:
        """What is to be read of it; empty if there is nothing."""
        found = sorted(path for path in self.path.iterdir() if path.stem.upper() == "README" and path.is_file())
        return _text(found[0]) if found else ""

    @property
    def summary(self) -> str:
        """The first sentence of its README that is no heading, on one line."""
        paragraphs = [[*group] for filled, group in itertools.groupby(_prose(self.readme), bool) if filled]
        text = " ".join(paragraphs[0]) if paragraphs else ""
        sentence, dot, _ = text.partition(". ")
        return sentence + dot.strip()


@dataclass(frozen=True)
class Resolved:
    """An element of an image, and *why* it is one."""

    element: Element
    why: str


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _prose(text: str) -> Iterator[str]:
    """Give the lines of *text*, which is reStructuredText or Markdown, without its headings."""
    lines = [line.strip() for line in text.splitlines()]
    for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        is_rule = len(line) > 1 and not line.strip(line[0]) and not line[0].isalnum()
        is_title = len(following) > 1 and not following.strip("=-~*^#\"'")
        if not (is_rule or is_title or line.startswith(("#", ".. "))):
            yield line


def stock_directories() -> list[Path]:
    """Return where an installed diskimage-builder has its elements: of this Python's packages, or of its program's."""
    found = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found.append(Path(str(importlib.metadata.distribution(_DISTRIBUTION).locate_file(_STOCK))))
    if program := shutil.which(_PROGRAM):
        # A link in its place may lead to the program of this name that image-factory has.
        for path in (Path(program).resolve(), Path(program)):
            found += sorted(path.parent.parent.glob(f"lib/python3*/*-packages/{_STOCK}"))
    return [path for path in found if path.is_dir()][:1]


def search_path(own: Sequence[Path], environment: Mapping[str, str]) -> list[Path]:
    """Return the directories of elements: an image's *own*, those of ``ELEMENTS_PATH``, an installed one's.

    ConfigurationError if one is no directory.
    """
    named = [("elements-path", path) for path in own]
    named += [("ELEMENTS_PATH", Path(word)) for word in environment.get("ELEMENTS_PATH", "").split(":") if word]
    for where, path in named:
        if not path.is_dir():
            raise ConfigurationError(f"{where}: {path} is not a directory.", hint="Its directories are elements.")
    return list(dict.fromkeys(path.absolute() for path in [*(path for _, path in named), *stock_directories()]))


def find(directories: Iterable[Path]) -> dict[str, Element]:
    """Return the elements of *directories* by name: of two that have one name, the one in the directory before.

    The name is that of the directory itself, whatever a link to it is called.
    """
    found: dict[str, Element] = {}
    for directory in directories:
        here: dict[str, Element] = {}
        with reading():
            for path in sorted(entry.resolve() for entry in directory.iterdir() if entry.is_dir()):
                # lost+found is nobody's but root's.
                if not os.access(path, os.R_OK | os.X_OK):
                    logger.info("%s can't be read, so it is no element.", path)
                elif path.name != "__pycache__":
                    here.setdefault(path.name, _element(path))
        for name, element in here.items():
            if name in found and found[name].path != element.path:
                logger.info("%s is taken in place of %s", found[name].path, element.path)
        found = here | found
    return found


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Have ConfigurationError say what of elements can't be read inside."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"Elements: {error.filename} can't be read: {error.strerror}.",
            hint="Let the user who builds read all of an element, as with chmod -R a+rX, or leave it out.",
        ) from error


def _element(path: Path) -> Element:
    provides, needs = (_names(path / name) for name in ("element-provides", "element-deps"))
    return Element(path.name, path, provides, needs)


def _names(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in _text(path).splitlines() if line.strip()) if path.is_file() else ()


def wanted(names: Sequence[str], architecture: str, *, with_base: bool, with_disk: bool = True) -> dict[str, str]:
    """Return the elements that an image with *names* has by itself, each with why, those first that are added to them.

    *architecture* is Debian's name of it.  A partitioned disk needs a table of partitions, unless another source than
    elements makes it and they are not *with_disk*.
    """
    added = {BASE: "in every image without skip-base"} if with_base else {}
    if with_disk and "vm" in names and not any(name.startswith("block-device-") for name in names):
        added["block-device-efi" if architecture == "arm64" else "block-device-mbr"] = "added to vm"
    return added | dict.fromkeys(names, "named")


def resolve(asked: Mapping[str, str], known: Mapping[str, Element], given: Resolved | None = None) -> list[Resolved]:
    """Return the elements *asked* for, each by a reason, and all that they need of those *known*.

    *given* is the element of a system that is there already; else one of them has to make the system.
    ConfigurationError says what is missing or provided twice.
    """
    if BASE in asked and BASE not in known and not stock_directories():
        raise ConfigurationError(
            f"The element {BASE!r}, which every image has, is not to be found.",
            hint="Install diskimage-builder, name its elements in elements-path, or set skip-base = yes.",
        )
    first = {given.element.name: given.why} if given else {}
    if given:
        known = {**known, given.element.name: given.element}
    reasons, providers, left = first | {**asked}, dict[str, str](), [*first, *asked]
    taken: list[Element] = []
    while left:
        name = left.pop(0)
        if name in providers:
            continue
        element = known_as(name, known, reasons[name])
        for provided in element.provides:
            if provided in providers and given and providers[provided] == given.element.name:
                raise ConfigurationError(
                    f"The element {name} ({reasons[name]}) provides {provided!r}: already provided by {given.why}.",
                    hint="Leave it out, or what needs it; source = elements has elements make a system.",
                )
            if provided in providers:
                raise ConfigurationError(
                    f"The elements {providers[provided]} ({reasons[providers[provided]]}) and {name} "
                    f"({reasons[name]}) both provide {provided!r}.",
                    hint="Leave one of them out.",
                )
            providers[provided] = name
        taken.append(element)
        for need in element.needs:
            if need not in reasons and need not in providers:
                reasons[need] = f"needed by {name}"
                left.append(need)
    for provided, provider in providers.items():
        if provided in asked and provided != provider:
            raise ConfigurationError(
                f"The element {provided} is named, and {provider} ({reasons[provider]}) provides it.",
                hint=f"Leave {provided} out.",
            )
    if SYSTEM not in providers:
        raise ConfigurationError(
            f"No element provides {SYSTEM!r}: none of {', '.join(asked)} makes the system.", hint=_systems(known)
        )
    return [
        Resolved(element, reasons[element.name] + _provided(element))
        for element in taken
        if providers.get(element.name, element.name) == element.name
    ]


def _provided(element: Element) -> str:
    return f"; provides {', '.join(element.provides)}" if element.provides else ""


def known_as(name: str, known: Mapping[str, Element], reason: str) -> Element:
    """Return the element *name* of those *known*, asked for by *reason*; ConfigurationError if there is none."""
    if len(name.split()) > 1:
        raise ConfigurationError(
            f"{name!r} ({reason}) is no name of an element.", hint="They have no blanks: one is on a line each."
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, n=_NEAR, cutoff=_CUTOFF)
        raise ConfigurationError(
            f"There is no element {name!r} ({reason}).",
            hint=f"Did you mean {' or '.join(near)}?" if near else "'image-factory --list-elements' lists them all.",
        )
    return known[name]


def _systems(known: Mapping[str, Element]) -> str:
    systems = sorted(element.name for element in known.values() if SYSTEM in element.provides)
    return f"These do: {', '.join(systems)}." if systems else "Write it into the file element-provides of one."
