"""What a disk is turned into: each format is a module with the functions of ``Output``."""

from typing import Protocol

from ..model import Artifact, Build, Disk, Origin
from . import qcow2, raw


class Output(Protocol):
    """A format of artifacts; *STEP* is the name of the step that writes it.

    *MADE_FROM* is ``disk`` where it is written from the closed disk, ``tree`` where from the mounted system.
    """

    STEP: str
    MADE_FROM: Origin

    def commands(self, build: Build) -> list[list[str]]:
        """Return the commands it will run."""

    def write(self, build: Build, disk: Disk) -> Artifact:
        """Make the artifact in the working directory; BuildError if that fails."""


OUTPUTS: dict[str, Output] = {"raw": raw, "qcow2": qcow2}
