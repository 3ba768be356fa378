"""What a source is: the functions by which all else knows it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..base.events import InputUsed
from ..configuration.parsers import FIT, Source
from ..configuration.settings import ANSWER_FILE_KEYS, BOOTSTRAP_KEY, Dependent, ImageSettings
from ..model import Build, Given, Plan
from ..parts import Steps

# The settings of a disk that a tree is put on, those of a tree that a source makes, then those that some sources go by.
_OF_DISKS = ("layout", "filesystem", "root-label", "mkfs-options", "extra-size")
_OF_TREES = ("work-in-memory", *_OF_DISKS)
_OF_SOURCES = {
    "installer": (
        "linux", "initrd", "installer-image", "linux-sha256", "initrd-sha256", "installer-image-sha256", "append",
        *ANSWER_FILE_KEYS, "answer-files", "mac", "vnc", "osinfo", "cpu", "network", "max-parallel",
        "install-timeout", "stall-timeout",
    ),
    "image": ("source-image", "source-image-sha256"),
    "bootstrap": (BOOTSTRAP_KEY, "cache-tree", *_OF_TREES),
    "elements": _OF_TREES,
    "capture": ("capture-from", "capture-mounts", *_OF_DISKS),
}  # fmt: skip


# What does something beside a disk only that is as small as its tree lets it.
BESIDE_FIT: Dependent = {"extra-size": ("image-size = fit", lambda settings: settings.image_size == FIT)}


def idle_beside(source: str) -> Dependent:
    """Return the settings of all sources but *source*, which do nothing beside it."""
    others: dict[str, list[str]] = {}
    for other, keys in _OF_SOURCES.items():
        for key in keys:
            others.setdefault(key, []).append(other)
    return {
        key: (f"source = {' or '.join(takers)}", lambda settings: False)
        for key, takers in others.items()
        if source not in takers
    }


class Key(Protocol):
    """A key that a template declares."""

    @property
    def name(self) -> str:
        """The key, with dashes."""

    @property
    def default(self) -> str:
        """The value where the section has none."""

    @property
    def accepted(self) -> str:
        """The values that it may have, for people."""

    @property
    def help(self) -> str:
        """The meaning of the key, for people."""


def _nothing(of: object) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class DiskSource:
    """A way to make a disk; a section that has any of its *keys* is an image.

    *check_settings*
        raises ConfigurationError unless the settings of an image, which is named, say what to make the disk from.
    *identity*
        returns a digest of each setting that makes the disk another one, by key: of a disk that was made from what is
        given, or of one that would be made now if that is empty.
    *steps*
        gives the steps that make the disk; InstalledError of one where the disk is of use all the same.
    *programs*
        returns the programs that it needs.
    *check*
        raises ConfigurationError if it is known already that the disk can't be made.
    *disk_size*
        returns the bytes that the disk may grow to, 0 where that is not known yet.
    *downloads*
        returns whether making it brings files into the cache.
    *remote*
        returns the settings and URIs of what it needs from elsewhere, each with whether that is a file.

    The others are of some sources only.  *defaults* are its own defaults of settings, and *dependent* its keys that do
    nothing beside some settings.

    *files*
        returns the files that the disk is made from and that are no answer files, by key; None where only making the
        disk tells what it is made from.
    *original*
        returns an input of a build that is resumed, None if the build had no copy of it.
    *check_machine*
        raises ConfigurationError if there is no machine for it, whatever is installed here.
    *check_here*
        raises ConfigurationError unless what it needs runs here; its programs are there.
    *warn*
        warns of what may go wrong when the disk is made.
    *measure*
        warns of what is slow on this machine, which takes a while to find out.
    *explain*
        logs why the disk may have no system.

    *fits* is whether it makes a tree, and so a disk that can be as small as the tree lets it.

    *answer_files* are the settings of which one may name its answer file, perhaps a template.

    *template_keys*
        returns the keys that the answer file at a path asks for, with dashes; None for any.  A file that can't be read
        asks for nothing.
    *declared_keys*
        returns the keys that the answer file at a path declares for images of an architecture, by name;
        ConfigurationError if it can't be read.
    *answers_of*
        returns the answer file as its guest gets it, None if there is none; ConfigurationError says what is wrong.
    *given*
        returns what its guest was given; of a user's own file that is gone meanwhile, nothing.
    *urls_of_guest*
        returns the URLs that its guest fetches from, by key.
    """

    keys: tuple[str, ...]
    check_settings: Callable[[str, ImageSettings], None]
    identity: Callable[[Plan, Sequence[InputUsed]], dict[str, str]]
    steps: Callable[[Build], Steps]
    programs: Callable[[Plan], list[str]]
    check: Callable[[Plan], None]
    disk_size: Callable[[Plan], int]
    downloads: Callable[[Plan], bool]
    remote: Callable[[Plan], list[tuple[str, str, bool]]]
    defaults: Mapping[str, str | None] = field(default_factory=dict)
    dependent: Dependent = field(default_factory=dict)
    files: Callable[[Plan], dict[str, Source] | None] = lambda plan: {}
    original: Callable[[Plan, InputUsed], InputUsed | None] = lambda plan, used: None
    check_machine: Callable[[Plan], None] = _nothing
    check_here: Callable[[Plan], None] = _nothing
    warn: Callable[[Plan], None] = _nothing
    measure: Callable[[Plan], None] = _nothing
    explain: Callable[[Build], None] = _nothing
    fits: bool = False
    answer_files: tuple[str, ...] = ()
    template_keys: Callable[[Path], set[str] | None] = lambda path: set()
    declared_keys: Callable[[Path, str], Mapping[str, Key]] = lambda path, arch: {}
    answers_of: Callable[[Plan], bytes | None] = lambda plan: None
    given: Callable[[Build], Given] = lambda build: Given()
    urls_of_guest: Callable[[Plan], dict[str, str]] = lambda plan: {}
