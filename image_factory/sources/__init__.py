"""What a disk is made from: each source is a module with the functions of ``Source``."""

from collections.abc import Sequence
from typing import Protocol

from ..base.events import InputUsed
from ..configuration.settings import ImageSettings
from ..model import Build, Plan
from ..parts import Steps
from . import installer


class Source(Protocol):
    """A way to make a disk; a section that has any of its *KEYS* is an image."""

    KEYS: tuple[str, ...]

    def check_settings(self, name: str, settings: ImageSettings) -> None:
        """Raise ConfigurationError unless the *settings* of image *name* say what to make the disk from."""

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

    def programs(self, plan: Plan) -> list[str]:
        """Return the programs that it needs."""

    def check(self, plan: Plan) -> None:
        """Raise ConfigurationError if it is known already that the disk can't be made."""

    def downloads(self, plan: Plan) -> bool:
        """Return whether making it brings files into the cache."""

    def remote(self, plan: Plan) -> list[tuple[str, str, bool]]:
        """Return the settings and URIs of what it needs from elsewhere, each with whether that is a file."""

    def urls_of_guest(self, plan: Plan) -> dict[str, str]:
        """Return the URLs that its guest fetches from, by key."""

    def steps(self, build: Build) -> Steps:
        """Give the steps that make the disk; InstalledError of one where the disk is of use all the same."""


SOURCES: dict[str, Source] = {"installer": installer}
