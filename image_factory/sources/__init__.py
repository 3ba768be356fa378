"""The ways to make a disk: each source is a module with the functions of ``Source``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..base.events import InputUsed
from ..configuration.settings import Dependent, ImageSettings
from ..model import Build, Given, Plan
from ..parts import Steps
from . import image, installer


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


class Source(Protocol):
    """A way to make a disk; a section that has any of its *KEYS* is an image.

    *ANSWER_FILES* are the settings of which one may name its answer file, perhaps a template.  *DEPENDENT* are those of
    its keys that do nothing beside some settings, and *DEFAULTS* its own defaults of settings.
    """

    KEYS: tuple[str, ...]
    ANSWER_FILES: tuple[str, ...]
    DEPENDENT: Dependent
    DEFAULTS: dict[str, str | None]

    def check_settings(self, name: str, settings: ImageSettings) -> None:
        """Raise ConfigurationError unless the *settings* of image *name* say what to make the disk from."""

    def template_keys(self, path: Path) -> set[str] | None:
        """Return the keys that the answer file *path* asks for, with dashes; None for any.

        What can't be read asks for nothing.
        """

    def declared_keys(self, path: Path, arch: str) -> Mapping[str, Key]:
        """Return the keys that the answer file *path* declares for images of *arch*, by name.

        ConfigurationError if it can't be read.
        """

    def answers_of(self, plan: Plan) -> bytes | None:
        """Return the answer file as its guest gets it, None if there is none; ConfigurationError says what is wrong."""

    def identity(self, plan: Plan, used: Sequence[InputUsed] = ()) -> dict[str, str]:
        """Return a digest of each setting that makes the disk another one, by key.

        *used* is what the disk was made from; without it, the digests are those of a disk that would be made now.
        """

    def original(self, plan: Plan, used: InputUsed) -> InputUsed | None:
        """Return the input *used* of a build that is resumed, None if the build had no copy of it."""

    def check_machine(self, plan: Plan) -> None:
        """Raise ConfigurationError if there is no machine for it, whatever is installed here."""

    def check_here(self, plan: Plan) -> None:
        """Raise ConfigurationError unless what it needs runs here; its programs are there."""

    def warn(self, plan: Plan) -> None:
        """Warn of what may go wrong when the disk is made."""

    def measure(self, plan: Plan) -> None:
        """Warn of what is slow on this machine, which takes a while to find out."""

    def programs(self, plan: Plan) -> list[str]:
        """Return the programs that it needs."""

    def check(self, plan: Plan) -> None:
        """Raise ConfigurationError if it is known already that the disk can't be made."""

    def downloads(self, plan: Plan) -> bool:
        """Return whether making it brings files into the cache."""

    def remote(self, plan: Plan) -> list[tuple[str, str, bool]]:
        """Return the settings and URIs of what it needs from elsewhere, each with whether that is a file."""

    def disk_size(self, plan: Plan) -> int:
        """Return the bytes that the disk may grow to, 0 where that is not known yet."""

    def urls_of_guest(self, plan: Plan) -> dict[str, str]:
        """Return the URLs that its guest fetches from, by key."""

    def steps(self, build: Build) -> Steps:
        """Give the steps that make the disk; InstalledError of one where the disk is of use all the same."""

    def explain(self, build: Build) -> None:
        """Log why the disk may have no system."""

    def given(self, build: Build) -> Given:
        """Return what its guest was given; of a user's own file that is gone meanwhile, nothing."""


SOURCES: dict[str, Source] = {"installer": installer, "image": image}
