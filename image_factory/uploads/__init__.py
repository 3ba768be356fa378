"""How artifacts get to upload destinations: each type is a module with the functions of ``Upload``."""

from pathlib import Path
from typing import Protocol

from ..configuration.settings import Destination
from ..model import Artifact
from . import rsync


class Upload(Protocol):
    """A type of uploads."""

    def programs(self, destination: Destination) -> list[str]:
        """Return the programs that uploads to *destination* need."""

    def commands(self, destination: Destination, artifact: Artifact) -> list[list[str]]:
        """Return the commands that upload *artifact* with what belongs to it, and verify it."""

    def upload(self, destination: Destination, artifact: Artifact) -> None:
        """Upload *artifact* with what belongs to it, and verify it; BuildError if that fails."""

    def probe(self, destination: Destination, directory: Path) -> None:
        """Raise BuildError unless something could be uploaded to *destination* now, from *directory*."""


UPLOADS: dict[str, Upload] = {"rsync": rsync}
