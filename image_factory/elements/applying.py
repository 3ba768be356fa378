"""Applies elements to a tree of a system that another source than elements has made."""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ..base import events, files
from ..base.cleanup import released
from ..base.errors import ConfigurationError
from ..disks.layouts import Layout
from ..inside import namespaces
from ..inside.namespaces import Namespaces
from ..machines import arch
from ..model import Build, Plan
from ..parts import Group, State, Step, carry_out, doing
from . import breaks, engine, image, layout
from .engine import Engine
from .hooks import File, Phase
from .image import Image
from .resolve import BLOCK_DEVICE

# What these do is done to a disk, which is made of the tree when all elements have run.
_OF_DISKS = ("bootloader", *layout.REFUSED)


def of_plan(plan: Plan, packages: str | None = None) -> Image:
    """Return the elements of *plan*, whose system has *packages* of a kind where that is seen.

    ConfigurationError says what is wrong with them.
    """
    architecture = arch.debian_arch(plan.variables.get("arch", ""), plan.settings.arch)
    return image.read(plan.image, plan.settings, plan.variables, architecture, os.environ, packages)


def check(plan: Plan) -> None:
    """Raise ConfigurationError if the elements of *plan*, if it has any, can't be applied to a tree."""
    if not plan.settings.elements:
        return
    for each in of_plan(plan).elements:
        if each.element.texts:
            continue
        if each.element.name in _OF_DISKS or BLOCK_DEVICE in each.element.provides:
            raise ConfigurationError(
                f"[{plan.image}] elements: {each.element.name} ({each.why}) works on a disk, and here elements make a "
                "tree, of which image-factory makes the disk.",
                hint="Leave it out, and what needs it, vm perhaps: 'layout' says how the disk is laid out and boots.",
            )
    breaks.warn(breaks.read(os.environ))


def identity(plan: Plan) -> dict[str, bytes]:
    """Return what the elements of *plan*, if it has any, make of a tree, by key."""
    if not plan.settings.elements:
        return {}
    found = of_plan(plan)
    scripts = {name: _digest(file) for name, file in found.hooks.items()}
    variables = {name: value for name, value in found.given.items() if os.environ.get(name) != value}
    return {
        "elements": json.dumps([found.names, scripts], sort_keys=True).encode(),
        "element-environment": json.dumps(variables, sort_keys=True).encode(),
        "extra-packages": json.dumps(plan.settings.extra_packages).encode(),
    }


def _digest(file: File) -> str:
    if file.text is not None:
        return hashlib.sha256(file.text.encode()).hexdigest()
    mode = file.path.lstat().st_mode
    return os.readlink(file.path) if stat.S_ISLNK(mode) else f"{files.digest_of(file.path)} {mode:o}"


def shown(build: Build, *commands: Sequence[str]) -> list[list[str]]:
    """Return *commands* as a dry run shows those in the namespaces."""
    return [namespaces.entering_argv("PID", *words, as_root=build.plan.as_root) for words in commands]


def phase_steps(build: Build, runs: Engine, run: Callable[[Phase, State], None]) -> Iterator[Step]:
    """Give a step for each phase of *runs*, which *run* carries out."""
    return (phase_step(build, runs, phase, run) for phase in runs.phases)


def phase_step(build: Build, runs: Engine, phase: Phase, run: Callable[[Phase, State], None]) -> Step:
    """Return the step of *phase* of *runs*, which *run* carries out."""
    scripts = [["#", line] for line in runs.scripts(phase)]
    argvs = [*scripts, *shown(build, *runs.phase_argvs(phase))]
    return Step(f"Running {phase.directory}", doing(partial(run, phase)), argvs)


def tell(found: Image) -> None:
    """Tell which elements the disk is made from."""
    for each in found.elements:
        if not each.element.texts:
            events.tell(events.InputUsed("elements", str(each.element.path), None))


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    return [*engine.PROGRAMS] if plan.settings.elements else []


class _Applied:
    """What the steps tell each other: *tree* is in the namespaces that *outer* gives, and elements have some below."""

    def __init__(self, build: Build, tree: Path, disk: Layout, proxy: str, outer: Callable[[], Namespaces]) -> None:
        self._image = of_plan(build.plan)
        self._engine = Engine(build, self._image, disk, proxy)
        self._top, self._tree, self._outer = engine.tree_of(build).parent, tree, outer
        self._inside: Namespaces | None = None

    def entered(self, state: State, steps: Sequence[Step | Group]) -> State:
        """Carry out *steps* in namespaces in which the machine can be read-only, and no more than these."""
        with released(partial(namespaces.remove, self._top)):
            self._top.mkdir()
            as_root, pid = state.build.plan.as_root, self._outer().pid
            with (
                self._engine.holding_packages(),
                namespaces.entered(self._top, as_root=as_root, within=pid) as self._inside,
            ):
                return carry_out(state, steps)

    def merge(self, state: State) -> None:
        assert self._inside is not None
        tell(self._image)
        self._engine.merge()
        for argv in self._preparing_argvs(state.build):
            self._inside.run(*argv)

    def _preparing_argvs(self, build: Build) -> list[list[str]]:
        # Elements know it by this name.
        return [["mount", "--bind", str(self._tree), str(engine.tree_of(build))], self._engine.prepare_argv()]

    def run(self, phase: Phase, state: State) -> None:
        assert self._inside is not None
        self._engine.run(self._inside, phase, attended=state.attended)

    def steps(self, build: Build) -> Iterator[Step]:
        holding = namespaces.holding_argv(as_root=build.plan.as_root, within="PID")
        yield Step("Merging elements", doing(self.merge), [holding, *shown(build, *self._preparing_argvs(build))])
        yield from phase_steps(build, self._engine, self.run)


def steps(
    build: Build, tree: Path, disk: Layout, proxy: str, outer: Callable[[], Namespaces]
) -> Iterator[Step | Group]:
    """Give the steps that run the elements of *build*, if it has any, on the *tree* of a system.

    It is in the namespaces that *outer* gives, and will be on *disk*.  *proxy* is the URI of one that brings packages,
    if there is one.
    """
    if build.plan.settings.elements:
        work = _Applied(build, tree, disk, proxy, outer)
        yield Group([*work.steps(build)], work.entered)
