"""What a build is made of: steps, which parts give for a plan, each with the commands that a dry run shows."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from .base import scratch
from .base.events import Observer, TaskEnded
from .base.log import step
from .model import Artifact, Build, Disk, Plan, Volume
from .system import mounts
from .system.rehearsal import Call, rehearsed
from .system.tree import Tree

# Each is an argv for a shell, or a comment that begins with ``#``.  What only the build knows stands in capitals.
Commands = Sequence[Sequence[str]]


class Served(Protocol):
    """Knows which upload destinations have their files already."""

    def has_served(self, destination: object) -> bool:
        """Return whether *destination*, as it is now, got its files."""

    def serve(self, destination: object) -> None:
        """Write down that *destination* got its files."""


@dataclass(frozen=True)
class State:
    """How far a build is: what its steps have made.

    *tree* is there while the disk is mounted, *volumes* are those of the disk that was, and *unfreed* those of them
    whose unused blocks are not all zeros.  *artifacts* are in the order of the formats.  *cleans* is whether this build
    itself cleans the disk, and no earlier one has.  *attended* is whether the user wants a shell where something fails.
    *tasks* are those that this build has carried out.  *witness* knows what it was made from, and how.
    """

    build: Build
    disk: Disk
    tree: Tree | None = None
    volumes: tuple[Volume, ...] = ()
    unfreed: tuple[Volume, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    served: Served | None = None
    cleans: bool = True
    attended: bool = False
    tasks: tuple[TaskEnded, ...] = ()
    witness: Observer | None = None


class Shown(NamedTuple):
    """A step as a dry run shows it."""

    name: str
    commands: Commands


def always(state: State) -> bool:
    """Return that a step is always done."""
    return True


@dataclass(frozen=True)
class Step:
    """Something that a build does: what the log calls it, how it is done, and the *commands* that it runs.

    It is left out where *when* is false, which only the build may know.  *calls* are calls on a mounted system
    that are made for some systems only, or all of them where it is not *rehearsed* on a system of which nothing is
    known.
    """

    name: str
    run: Callable[[State], State]
    commands: Commands = ()
    when: Callable[[State], bool] = always
    calls: Sequence[Call] = ()
    rehearsed: bool = True


def show(state: State, steps: "Steps") -> list[Shown]:
    """Return *steps* as a dry run shows them, those among them that only some builds have."""
    shown: list[Shown] = []
    for item in steps:
        shown += item.shown(state, item.steps) if isinstance(item, Group) else [Shown(item.name, item.commands)]
    return shown


@dataclass(frozen=True)
class Group:
    """*Steps* that belong together: *run* carries them out, by ``carry_out``.

    *shown* is how a dry run shows them, one after the other if nothing else is said.
    """

    steps: Sequence["Step | Group"]
    run: Callable[[State, Sequence["Step | Group"]], State]
    shown: Callable[[State, Sequence["Step | Group"]], list[Shown]] = show
    when: Callable[[State], bool] = always


Steps = Iterable[Step | Group]


@dataclass(frozen=True)
class Part:
    """What takes part in a build: its steps, the programs that they need, and what is checked before the first one.

    *check* raises ConfigurationError.
    """

    steps: Callable[[Build], Steps]
    programs: Callable[[Plan], list[str]] = lambda plan: []
    check: Callable[[Plan], None] = lambda plan: None


def carry_out(state: State, steps: Steps) -> State:
    """Carry out *steps* one after the other; return the state after them."""
    for item in steps:
        if not item.when(state):
            continue
        if isinstance(item, Group):
            state = item.run(state, item.steps)
        else:
            with step(item.name):
                state = item.run(state)
    return state


def doing(function: Callable[[State], None]) -> Callable[[State], State]:
    """Return *function* as what a step runs that makes nothing which later ones need."""

    def run(state: State) -> State:
        function(state)
        return state

    return run


def on_tree(function: Callable[[Build, Tree], None]) -> Callable[[State], State]:
    """Return *function* as what a step on the mounted system runs."""
    return doing(lambda state: function(state.build, tree_of(state)))


def tree_of(state: State) -> Tree:
    """Return the mounted system."""
    assert state.tree is not None
    return state.tree


def mounted(steps: Sequence[Step], disk_of: Callable[[Build], Path], *, read_only: bool = False) -> Group:
    """Return *steps* on the system on the disk that *disk_of* names, which is mounted meanwhile."""

    def run(state: State, steps: Sequence[Step | Group]) -> State:
        with mounts.mounted(state.build, Disk(disk_of(state.build), read_only)) as tree:
            state = carry_out(dataclasses.replace(state, tree=tree), steps)
        return dataclasses.replace(state, tree=None, volumes=tree.volumes)

    def shown(state: State, steps: Sequence[Step | Group]) -> list[Shown]:
        build, disk = state.build, Disk(disk_of(state.build), read_only)
        inside = [Shown(item.name, _rehearsal(build, item, disk)) for item in steps if isinstance(item, Step)]
        before, after = mounts.around(build, disk)
        return [*(Shown(*found) for found in before), *inside, *(Shown(*found) for found in after)]

    return Group(steps, run, shown)


def _rehearsal(build: Build, step: Step, on: Disk) -> Commands:
    """Return the commands of a *step* on the mounted system, found out by carrying it out on one that is empty."""
    calls: list[Call] = []
    # What only some systems need has nothing to do on an empty one.
    if step.when is always and step.rehearsed:
        with scratch.directory() as directory, rehearsed(calls) as tree:
            apart = dataclasses.replace(build, directory=directory)
            step.run(State(apart, Disk(directory), tree))
    return [*step.commands, *mounts.commands(build, on, [*calls, *step.calls])]
