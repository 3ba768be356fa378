"""Tasks after cleaning: in libguestfs' appliance, which has the system mounted, and no network."""

import shlex
from collections.abc import Iterator
from functools import partial

from ..base.errors import CommandError, ConfigurationError
from ..configuration.settings import Task
from ..finishing import copying
from ..machines.arch import default_arch
from ..model import Build, Plan
from ..parts import State, Step, doing, tree_of
from ..system import appliance
from ..system.tree import Tree
from . import payload, receiving, script_of
from .copies import told
from .namespace import DIRECTORY, RUN, chroot_argv
from .running import GRACE_SECONDS, Place, run_task

_FOREVER = 365 * 86400.0


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it is known that a task after cleaning can't be carried out here."""
    where = f"[{plan.image}] tasks-after-cleaning"
    if not plan.late_tasks:
        return
    if plan.settings.mount_via in ("loop", "fuse"):
        # The sudo rule would be one for all that a user wants root to run.
        raise ConfigurationError(
            f"{where}: these run in an appliance only, and mount-via = {plan.settings.mount_via} has none.",
            hint="Set mount-via = guestfs.",
        )
    if plan.settings.arch != default_arch():
        raise ConfigurationError(
            f"{where}: this machine's appliance runs no programs of {plan.settings.arch}.",
            hint="Move them to tasks, which run in the system itself.",
        )
    for task in plan.late_tasks:
        if task.type == "packages":
            raise ConfigurationError(
                f"{where}: {task.name} installs packages, and these run without network.", hint="Move it to tasks."
            )


def steps(build: Build) -> Iterator[Step]:
    """Give the steps on the mounted system."""
    for task in build.plan.late_tasks:
        # No rehearsal has an appliance.
        run = doing(partial(_carry_out, task))
        shown = told(task.copies) if task.type == "copy" else appliance.script_commands()
        yield Step(f"Task {task.name}", run, shown, rehearsed=False)


def _carry_out(task: Task, state: State) -> None:
    tree = tree_of(state)

    def copy(task: Task, _: float | None) -> None:
        copying.copy_task(state.build, tree, task)

    own = {"copy": copy}
    run_task(task, Place(partial(chroot_argv, appliance.ROOT), DIRECTORY, own=own, script=partial(_run, tree)))


def _run(tree: Tree, task: Task, limit: float | None) -> None:
    script = script_of(task)
    words = [appliance.ROOT, "no", *chroot_argv(appliance.ROOT, receiving(script, DIRECTORY, limit))]
    text = f"set -- {shlex.join(words)}\n{RUN}"
    seconds = _FOREVER if limit is None else limit + GRACE_SECONDS
    status, lines = appliance.run_script(tree, text, payload(script), seconds)
    if status:
        raise CommandError([task.name], status, lines)
