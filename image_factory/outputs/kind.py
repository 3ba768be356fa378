"""What a row of the table of formats has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base import command
from ..base.units import parse_percentage
from ..model import Build, Origin
from ..parts import State


def run_commands(output: "Output", state: State, path: Path) -> None:
    """Make the artifact by the commands that a dry run shows."""
    for argv in output.commands(state.build, path):
        command.run(argv, progress=parse_percentage)


def as_it_is(path: Path, date: int) -> None:
    """Leave the artifact at *path* as the commands made it."""


@dataclass(frozen=True)
class Output:
    """A format of artifacts, as a row of the table: what its file is called, how it is made, and who reads it.

    *step* is the name of the step that makes it, *suffix* what its file's name ends with, *programs* what is needed.
    *commands* returns the commands that make the file at a path, and *write* makes it; *settle* gives what is made up
    anew each time the date of a build that can be repeated.  It is *made_from* the closed
    disk, from the tree of the mounted system, or from what the plan says alone; of use is one of that kind only with an
    artifact of one of the formats *beside* it.  *driver* is QEMU's name of the format; empty where QEMU can't read
    it, and then neither the audit opens it by qemu-img, nor the test boot boots it.  One that *takes_disk* is the
    build's own disk under another name, which others may change once it is published.

    One that *packs* another format is a tar, whose last member QEMU opens as it is there; that one is made before, if
    it is no artifact itself.  *unpacking* are the words of the program that turns its file into the raw disk, for one
    that QEMU can't read.

    *compresses* is whether the setting ``compression`` is about it.  The size of the disk is at most *largest* bytes
    and a multiple of *unit* bytes.
    """

    step: str
    suffix: str
    commands: Callable[[Build, Path], Sequence[Sequence[str]]]
    write: Callable[["Output", State, Path], None] = run_commands
    settle: Callable[[Path, int], None] = as_it_is
    programs: tuple[str, ...] = ()
    made_from: Origin = "disk"
    beside: tuple[str, ...] = ()
    driver: str = ""
    takes_disk: bool = False
    packs: str = ""
    unpacking: tuple[str, ...] = ()
    compresses: bool = False
    largest: int | None = None
    unit: int = 1
