"""How artifacts get to upload destinations: each type is a module with the functions of ``Upload``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..configuration.settings import Destination
from ..model import Artifact
from . import command, drp, http, oci, rclone, rsync
from .tries import FailedTry


class Upload(Protocol):
    """A type of uploads; *KEYS* are the settings of a destination that not all types take."""

    KEYS: tuple[str, ...]

    def programs(self, destination: Destination) -> list[str]:
        """Return the programs that uploads to *destination* need."""

    def check(self, destination: Destination, file_name: str) -> None:
        """Raise ConfigurationError unless the file *file_name* could go to *destination*, as far as is known here."""

    def commands(self, destination: Destination, artifact: Artifact) -> list[list[str]]:
        """Return the commands that upload *artifact* with what belongs to it, and verify it."""

    def upload(self, destination: Destination, artifact: Artifact) -> None:
        """Upload *artifact* with what belongs to it, and verify it; BuildError if that fails."""

    def probe(self, destination: Destination, directory: Path) -> bool:
        """Raise BuildError unless something could be uploaded to *destination* now, from *directory*.

        Returns false if only an upload can tell.
        """


class Reader(Protocol):
    """A type of uploads that can tell what a destination has, and remove some of it."""

    def below(self, destination: Destination, directory: str) -> Destination:
        """Return *destination* with a target that is *directory* in it, which an upload makes if it can."""

    def read_argv(self, destination: Destination, name: str) -> list[str]:
        """Return the command that reads the file *name* of *destination*."""

    def read(self, destination: Destination, name: str) -> bytes | None:
        """Return the file *name* of *destination*, None if it is not there; FailedTry if that can't be known."""

    def removing(self, destination: Destination, names: Sequence[str]) -> list[list[str]]:
        """Return the commands that remove the files *names* of *destination*."""

    def remove(self, destination: Destination, names: Sequence[str]) -> dict[str, FailedTry]:
        """Remove the files *names* of *destination*, as far as they are there; return why those that are left are.

        FailedTry if that can't be told apart.
        """


UPLOADS: dict[str, Upload] = {
    "rsync": rsync, "http": http, "drp": drp, "rclone": rclone, "oci": oci, "command": command
}  # fmt: skip
READERS: dict[str, Reader] = {"rsync": rsync, "http": http, "drp": drp, "rclone": rclone}


def place_of(destination: Destination, artifact: Artifact, path: Path) -> str:
    """Return where the file *path*, which belongs to *artifact*, is at *destination*, for people."""
    if destination.type not in READERS:
        return destination.section
    # What follows may be secret.
    target = destination.target.partition("?")[0]
    before, has_name, after = target.rpartition(artifact.path.name)
    if has_name:
        return f"{before}{path.name}{after}"
    return f"{target}{path.name}" if target.endswith(("/", ":")) else f"{target}/{path.name}"
