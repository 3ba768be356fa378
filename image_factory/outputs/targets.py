"""Where images are to run: each target is a section of data/targets.ini."""

import configparser
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..base.errors import ConfigurationError
from ..base.files import find_data_dir
from ..base.units import parse_size
from ..configuration.settings import ImageSettings
from ..model import Plan
from ..sources import SOURCES
from . import OUTPUTS

# The settings that a target has something to say of.
KEYS = ("format", "compression")
# What it needs inside, each with what people call it.
NEEDS = {
    "initramfs": "Drivers in the initramfs, or in the kernel",
    "modules": "Drivers among the kernel's",
    "needs": "Programs and files",
    "tree-needs": "In formats of the tree also",
    "kernel-arguments": "Kernel arguments",
    "users": "User",
    "datasource": "cloud-init asks one of",
}
FLAGS = {
    "screen": "Kernel messages go to the screen, whatever else they go to.",
    "no-swap": "There is no swap.",
    "curtin": "The directory /curtin is made if it is not there.",
}
# The section that is no target.
_PACKAGES = "packages"


@dataclass(frozen=True)
class Target:
    """A section of the table: what is taken there, and what an image for it has to have inside."""

    name: str
    texts: Mapping[str, str]

    @property
    def title(self) -> str:
        """What people call it."""
        return self.texts["title"]

    @property
    def architectures(self) -> list[str]:
        """Those that it has; all if none are named."""
        return self.texts.get("architectures", "").split()

    @property
    def largest(self) -> int | None:
        """How many bytes a disk has at most."""
        return parse_size(self.texts["largest"]) if "largest" in self.texts else None

    def taken(self, key: str) -> list[str]:
        """Return the values of the setting *key* that it takes, the default first; none where it takes all.

        One of ``format`` may be several with ``+``, of which it needs all.
        """
        return self.texts.get(key, "").split()

    def made_of(self, formats: Sequence[str]) -> list[str]:
        """Return those of *formats* that it takes, none of one that lacks another."""
        taken = {name for names in self.wholes(formats) for name in names}
        return [name for name in formats if name in taken]

    def wholes(self, formats: Sequence[str]) -> list[list[str]]:
        """Return the images that it takes of *formats*, each with all of its formats."""
        values = (value.split("+") for value in self.taken("format"))
        return [names for names in values if set(names) <= set(formats)]

    def needs(self, key: str, arch: str) -> list[str]:
        """Return what it needs of the kind *key* of NEEDS on *arch*; ``|`` is between what does as well."""
        return self.texts.get(f"{key}@{arch}", self.texts.get(key, "")).split()

    def says(self, key: str) -> bool:
        """Return whether it asks for *key* of FLAGS."""
        return self.texts.get(key) == "yes"


class _Table(Mapping[str, Target]):
    """The targets by their names, which are read when they are asked for."""

    def __getitem__(self, name: str) -> Target:
        return _read()[0][name]

    def __iter__(self) -> Iterator[str]:
        return iter(_read()[0])

    def __len__(self) -> int:
        return len(_read()[0])


TARGETS: Mapping[str, Target] = _Table()


@functools.cache
def _read() -> tuple[dict[str, Target], dict[str, list[str]]]:
    """Return the targets, and the packages that have what they need."""
    parser = configparser.RawConfigParser(delimiters=("=",), default_section="")
    with (find_data_dir() / "targets.ini").open(encoding="utf-8") as file:
        parser.read_file(file)
    packages = {name: text.split() for name, text in parser[_PACKAGES].items()}
    return {name: Target(name, dict(parser[name])) for name in parser.sections() if name != _PACKAGES}, packages


def packages(need: str) -> list[str]:
    """Return the packages that have *need*, a program or a path: Debian's, Red Hat's, SUSE's; none if unknown."""
    return _read()[1].get(need.lower(), [])


def chosen(settings: ImageSettings) -> list[Target]:
    """Return the targets of *settings*."""
    return [TARGETS[name] for name in settings.target]


def default(names: Sequence[str], key: str) -> str | None:
    """Return the text that the targets *names* set *key* to, None if they leave that to others.

    Formats add up; of others it is the first value that all take.
    """
    takers = [values for name in names if (values := TARGETS[name].taken(key))]
    if not takers:
        return None
    if key == "format":
        return ", ".join(dict.fromkeys(name for values in takers for name in values[0].split("+")))
    return next((value for value in takers[0] if all(value in values for values in takers)), takers[0][0])


def check(image: str, settings: ImageSettings) -> None:
    """Raise ConfigurationError unless each target of the *settings* of *image* takes what these are."""
    for target in chosen(settings):
        where = f"[{image}] target: {target.name} ({target.title})"
        if target.architectures and settings.arch not in target.architectures:
            raise ConfigurationError(
                f"{where} has no {settings.arch}.", hint=f"It has {' and '.join(target.architectures)}."
            )
        made = target.made_of(settings.format)
        if not made:
            raise ConfigurationError(
                f"{where} takes none of format = {', '.join(settings.format)}.",
                hint=f"Add one to format, or take format out: it takes {_or(target.taken('format'))}.",
            )
        allowed = target.taken("compression") or [settings.compression]
        if settings.compression not in allowed and any(OUTPUTS[name].compresses for name in made):
            raise ConfigurationError(
                f"{where} does not take compression = {settings.compression}.",
                hint=f"Set compression = {' or '.join(allowed)}, or take it out.",
            )


def check_size(plan: Plan) -> None:
    """Raise ConfigurationError if it is known now that the disk of *plan* is larger than a target takes."""
    for target in chosen(plan.settings):
        unfit = too_large(target, SOURCES[plan.settings.source].disk_size(plan))
        if unfit:
            raise ConfigurationError(f"[{plan.image}] target: {unfit}", hint="Set another image-size.")


def too_large(target: Target, size: int) -> str:
    """Return why *target* takes no disk of *size* bytes, empty if it takes one."""
    if target.largest is None or size <= target.largest:
        return ""
    return f"{target.name} has disks of {target.largest >> 30} GiB at most, and this one has {size} bytes."


def sentences(target: Target) -> list[str]:
    """Return what *target* is, sets and checks, for people."""
    found = [f"{target.title}."]
    found += [f"{key.capitalize()}: {_or(target.taken(key))}." for key in KEYS if target.taken(key)]
    if target.architectures:
        found.append(f"Architecture: {_or(target.architectures)}.")
    if target.largest is not None:
        found.append(f"The disk has at most {target.largest >> 30} GiB.")
    for key, text in target.texts.items():
        name, at, arch = key.partition("@")
        if name in NEEDS and text:
            words = ", ".join(" or ".join(word.split("|")) for word in text.split())
            found.append(f"{NEEDS[name]}{' on ' if at else ''}{arch}: {words}.")
    return found + [sentence for key, sentence in FLAGS.items() if target.says(key)]


def _or(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
