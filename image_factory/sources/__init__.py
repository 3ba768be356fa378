"""What a disk is made from: each source is a module with the functions of ``Source``."""

from typing import Protocol

from ..model import Build, Disk, Plan
from . import installer


class Source(Protocol):
    """A way to make a disk."""

    def programs(self, plan: Plan) -> list[str]:
        """Return the programs that it needs."""

    def check(self, plan: Plan) -> None:
        """Raise ConfigurationError if it is known already that the disk can't be made."""

    def downloads(self, plan: Plan) -> bool:
        """Return whether making it brings files into the cache."""

    def remote(self, plan: Plan) -> list[tuple[str, str, bool]]:
        """Return the settings and URIs of what it needs from elsewhere, each with whether that is a file."""

    def describe(self, build: Build) -> list[tuple[str, list[list[str]]]]:
        """Return its steps, each with the commands it will run."""

    def produce(self, build: Build) -> Disk:
        """Make the disk; BuildError if that fails."""


SOURCES: dict[str, Source] = {"installer": installer}
