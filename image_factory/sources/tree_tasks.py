"""Tasks in the tree that a source makes, and the layers of it from which --resume goes on."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ..base import events, files
from ..base.errors import BuildError
from ..base.log import logger
from ..configuration.settings import Task
from ..elements import applying
from ..finishing import copying
from ..inside.namespaces import Namespaces
from ..model import Build
from ..parts import State, Step, doing
from ..tasks import namespace, running
from ..tasks.layers import Layers

_UNFINISHED = "unfinished-layer"


class TreeTasks:
    """The tasks of *build* in its *tree*, if it has any there, in the namespaces that *outer* gives.

    *proxy* is the URI of one that brings packages, if there is one.
    """

    def __init__(self, build: Build, tree: Path, proxy: str | None, outer: Callable[[], Namespaces]) -> None:
        self._build, self._tree, self._proxy, self._outer = build, tree, proxy, outer
        self._layers = Layers(build) if namespace.tasks(build.plan) else None

    @property
    def kept(self) -> list[Path]:
        """The layers of an earlier build that this one goes on from."""
        return self._layers.kept() if self._layers else []

    def restoring_argvs(self) -> list[list[str]]:
        """Return the commands of ``restore``."""
        return namespace.restoring_argvs(self._build, self._tree, self.kept)

    def restore(self) -> None:
        """Make the tree from its layers, in the place of what its source does."""
        assert self._layers
        self._layers.remove(self.kept)
        for argv in self.restoring_argvs():
            self._outer().run(*argv)
        events.tell(events.LayerKept())

    def steps(self) -> Iterator[Step]:
        """Give the steps of the tasks, each with what keeps its layer."""
        if not self._layers:
            return
        place = self._place("PID")
        unfinished = self._build.directory / _UNFINISHED
        keeping = applying.shown(self._build, namespace.keeping_argv(self._build, self._tree, unfinished))
        if not self.kept:
            yield Step("Keeping the tree", doing(partial(self._keep, self._layers, 0)), keeping)
        for count, task in self._layers.left():
            run = partial(self._carry_out, self._layers, count, task)
            yield Step(f"Task {task.name}", doing(run), [*place.commands(task), *keeping])

    def _keep(self, layers: Layers, count: int, state: State) -> None:
        """Keep what has changed in the tree since the layer before."""
        unfinished = self._build.directory / _UNFINISHED
        # It has the system's passwords, too.
        unfinished.touch(mode=0o600)
        self._outer().run(*namespace.keeping_argv(self._build, self._tree, unfinished))
        files.move(unfinished, layers.path(count))
        events.tell(events.LayerKept())

    def _carry_out(self, layers: Layers, count: int, task: Task, state: State) -> None:
        """Carry out *task*, and keep what the *count* tasks have done."""
        place = self._place(self._outer().pid)
        place.prepare()
        try:
            running.run_task(task, place.place)
        except BuildError as error:
            if state.attended:
                error.attended = True
                logger.error("%s", error.message)
                logger.error("A shell is opened in the tree; the build ends when you leave it.")
                place.look()
            raise
        if layers.is_sure(count):
            self._keep(layers, count, state)

    def _place(self, pid: int | str) -> namespace.InTree:
        return namespace.InTree(self._build, self._tree, pid, self._proxy, copying.copy_task)
