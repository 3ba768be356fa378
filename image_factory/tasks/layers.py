"""Layers: what each task has made over what those before it have, kept until the disk has it.

A layer is known by the digest of all that went into it and into those below, so that a build goes on at the first task
that has failed or changed.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from ..base.log import logger
from ..configuration.settings import Task
from ..model import Build, Plan
from . import digest_with_secrets, place
from .playbooks import with_given

# Of the names of layers, and of what tasks have done, before it is on the disk.
PREFIX = "layer-"
_DONE_SUFFIX = "-done.qcow2"
_WRITING_SUFFIX = "-writing.qcow2"
# ``--until`` has the name of a task behind it.
UNTIL_PREFIX = "task:"


def digests(plan: Plan) -> list[str]:
    """Return what is known of the system before the first of the tasks before cleaning, and after each."""
    given = f"{place(plan)} {plan.settings.tasks_network} {plan.settings.offline}"
    found = [hashlib.sha256(given.encode()).hexdigest()]
    for task in plan.tasks:
        below = f"{found[-1]} {digest_with_secrets([task])}"
        found.append(hashlib.sha256(below.encode()).hexdigest())
    return found


class Layers:
    """The layers of a *build*, for its tasks as they are now.

    In a guest the disk is below the first; in a tree, a layer of the system without any task.
    """

    def __init__(self, build: Build) -> None:
        self._plan, self._directory = build.plan, build.directory
        self._resumed, self._until = build.resumed, build.until_task
        self._digests = digests(build.plan)
        self._has_base = place(build.plan) == "namespace"

    def path(self, count: int) -> Path:
        """Return the layer that the system is after *count* tasks."""
        return self._directory / f"{PREFIX}{self._digests[count][:32]}.{'tar' if self._has_base else 'qcow2'}"

    @property
    def done_path(self) -> Path:
        """The uppermost overlay when all tasks in the guest are done, until it begins to be written to the disk."""
        return self._directory / f"{PREFIX}{self._digests[-1][:32]}{_DONE_SUFFIX}"

    @property
    def writing_path(self) -> Path:
        """The same while it is written: the disk is no more what the layers are over."""
        return self._directory / f"{PREFIX}{self._digests[-1][:32]}{_WRITING_SUFFIX}"

    def kept(self) -> list[Path]:
        """Return the layers that the build goes on from, the lowest first, each over all before it."""
        paths = [self.path(count) for count in range(self._lowest, len(self._digests))]
        return [*itertools.takewhile(Path.is_file, paths)] if self._resumed else []

    @property
    def _lowest(self) -> int:
        return 0 if self._has_base else 1

    def left(self) -> list[tuple[int, Task]]:
        """Return the tasks that the build has to carry out, each with how many are done with it."""
        first = max(self._lowest + len(self.kept()), 1)
        numbers = range(first, len(self._digests))
        if self._until:
            numbers = range(first, names(self._plan).index(self._until) + 2)
        return [(number, self._plan.tasks[number - 1]) for number in numbers]

    def is_sure(self, count: int) -> bool:
        """Return whether the first *count* tasks are still those that have been carried out."""
        tasks = tuple(with_given(self._plan, task) for task in self._plan.tasks)
        if digests(dataclasses.replace(self._plan, tasks=tasks))[: count + 1] == self._digests[: count + 1]:
            return True
        logger.warning("Tasks were changed while the build carried them out: --resume will do so again.")
        return False

    def remove(self, spare: list[Path]) -> None:
        """Remove all layers but *spare*, whatever tasks they are of."""
        for each in all_in(self._directory):
            if each not in spare:
                each.unlink()


def all_in(directory: Path) -> Iterator[Path]:
    """Give what is kept of tasks in the working *directory*, whatever tasks these are."""
    return directory.glob(f"{PREFIX}*")


def are_unwritten(directory: Path) -> bool:
    """Return whether all tasks are done in a guest, and the disk in the working *directory* has nothing of it."""
    return any(directory.glob(f"{PREFIX}*{_DONE_SUFFIX}"))


def names(plan: Plan) -> list[str]:
    """Return what ``--until`` calls the tasks of *plan* after which the build can stop."""
    return [f"{UNTIL_PREFIX}{task.name}" for task in plan.tasks]
