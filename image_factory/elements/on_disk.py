"""Applies elements to the system on a disk that is there already: one that was installed, or an image.

They have a copy of the disk, which takes its place when all of them have run: what fails leaves nothing of itself.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ..base import command, files
from ..base.cleanup import released
from ..base.errors import BuildError, ConfigurationError
from ..base.log import step
from ..inside import namespaces
from ..inside.namespaces import Namespaces
from ..machines.arch import default_arch
from ..model import Build, Disk, Plan, Volume
from ..parts import Group, Shown, State, Step, carry_out, doing, show, tree_of
from ..system import loop, mounts, partitions
from ..system.tree import Branch, Tree
from ..tasks import layers
from . import applying, engine, system
from .engine import Engine
from .hooks import Phase
from .layout import Mounted

# Of sources that make a tree, these belong to what the disk was made from.
_SOURCES = ("image", "installer")
KEYS = ("elements", "element-environment", "extra-packages")


def has_any(plan: Plan) -> bool:
    """Return whether *plan* has elements that are applied to a disk."""
    return bool(plan.settings.elements) and plan.settings.source in _SOURCES


def identity(plan: Plan) -> dict[str, bytes]:
    """Return what the elements that are applied to the disk of *plan* make of it, by key."""
    return applying.identity(plan) if has_any(plan) else {}


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    return [*engine.PROGRAMS, "cp", *namespaces.programs(as_root=True)] if has_any(plan) else []


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it is known that the elements of *plan* can't be applied to its disk here."""
    if not has_any(plan):
        return
    applying.check(plan)
    where = f"[{plan.image}] elements"
    if not plan.as_root:
        # What a user wants root to run is no part of the sudo rule.
        raise ConfigurationError(
            f"{where}: to a disk that is there already only root can apply them, as this machine's kernel mounts it.",
            hint="Build as root, or have tasks in their place. With source = bootstrap or elements any user can.",
        )
    if plan.settings.mount_via != "loop":
        raise ConfigurationError(
            f"{where}: they run on this machine, and mount-via = {plan.settings.mount_via} has the disk elsewhere.",
            hint="Set mount-via = loop.",
        )
    if plan.settings.arch != default_arch():
        raise ConfigurationError(
            f"{where}: this machine runs no programs of {plan.settings.arch}.",
            hint="With source = bootstrap those of another architecture are emulated.",
        )


def _copy(build: Build) -> Path:
    return build.directory / "applied.raw"


def _copying_argv(build: Build) -> list[str]:
    return ["cp", "--sparse=always", "--reflink=auto", str(build.disk_path), str(_copy(build))]


def _showing_argvs(path: Path | str, tree: Path) -> list[list[str]]:
    """Return the commands that have what is mounted at *path* at *tree*, with programs that run.

    The helper mounts the guest's filesystems for what reads them: no program, no device, no link.
    """
    return [
        ["mount", "--bind", str(path), str(tree)],
        ["mount", "-o", "remount,bind,exec,suid,symfollow,nodev", str(tree)],
    ]


def _volumes(disk: Path) -> list[Volume]:
    """Return what *disk* has; BuildError if there is LVM, which must not meet that of this machine."""
    with step(mounts.STEP):
        found = partitions.read_volumes(disk)
    group = next((volume for volume in found if volume.filesystem == partitions.LVM), None)
    if group is not None:
        raise BuildError(
            f"Elements can't be applied: the disk has LVM on {group.name}.",
            hint="They need a system on plain partitions; tasks run in any.",
        )
    return found


def _path_of(branch: Branch) -> Path:
    filesystem = branch.filesystem
    assert isinstance(filesystem, loop.LoopFilesystem)
    return filesystem.path / branch.top


def _mounted(tree: Tree, size: int) -> Mounted:
    """Return what elements are told of a disk of *size* bytes, with the system *tree*."""
    labels = {branch.point: branch.filesystem.volume.label or "" for branch in tree.branches}
    kind = tree.root.filesystem.volume.filesystem or ""
    points = "|".join(f"/{branch.point}" for branch in reversed(tree.branches))
    variables = {"DIB_ROOT_LABEL": labels[""], "DIB_ROOT_FSTYPE": kind, "DIB_BOOT_LABEL": labels.get("boot", "")}
    return Mounted(kind, variables | {"DIB_MOUNTPOINTS": points}, size)


def _packages(tree: Tree) -> str | None:
    """Return the kind of packages that the system has."""
    found = {entry.path for entry in tree.entries([*system.MARKS.values()])}
    return next((kind for kind, mark in system.MARKS.items() if mark in found), None)


class _OnDisk:
    """What the steps tell each other."""

    def __init__(self, build: Build) -> None:
        self._engine = Engine(build, applying.of_plan(build.plan), Mounted("FILESYSTEM", {}))
        self._tree = engine.tree_of(build)
        self._inside: Namespaces | None = None
        # What elements there are is known when the system is there.
        self._held = contextlib.ExitStack()

    def mounted(self, state: State, steps: Sequence[Step | Group]) -> State:
        """Carry out *steps* with the system of a copy of the disk, which takes the place of that."""
        build, copy = state.build, _copy(state.build)
        top = self._tree.parent
        with released(partial(copy.unlink, missing_ok=True)):
            command.run(_copying_argv(build), umask=0o077)
            with loop.mounted(build, Disk(copy), _volumes(copy)) as tree, released(partial(namespaces.remove, top)):
                top.mkdir()
                with self._held, namespaces.entered(top, as_root=True) as self._inside:
                    carry_out(dataclasses.replace(state, tree=tree), steps)
            # They are over the disk as it was.
            for layer in layers.all_in(build.directory):
                layer.unlink()
            files.move(copy, build.disk_path)
        return state

    def shown(self, state: State, steps: Sequence[Step | Group]) -> list[Shown]:
        before, after = mounts.around(state.build, Disk(_copy(state.build)))
        first, *others = (Shown(*found) for found in before)
        copying = Shown(first.name, [_copying_argv(state.build), *first.commands])
        return [copying, *others, *show(state, steps), *(Shown(*found) for found in after)]

    def merge(self, state: State) -> None:
        assert self._inside is not None
        build, tree = state.build, tree_of(state)
        # Now the system can be looked at.
        image = applying.of_plan(build.plan, _packages(tree))
        self._engine = Engine(build, image, _mounted(tree, build.disk_path.stat().st_size))
        self._held.enter_context(self._engine.holding_packages())
        applying.tell(image)
        self._engine.merge()
        places = {self._tree / branch.point: branch for branch in reversed(tree.branches)}
        for place, branch in places.items():
            for argv in _showing_argvs(_path_of(branch), place):
                self._inside.run(*argv)
        self._engine.keep_mounted([*places])
        self._engine.prepare(self._inside)

    def run(self, phase: Phase, state: State) -> None:
        assert self._inside is not None
        self._engine.run(self._inside, phase, attended=state.attended)

    def steps(self, build: Build) -> Iterator[Step]:
        preparing = [*_showing_argvs(loop.PLACE, self._tree), self._engine.prepare_argv()]
        commands = [namespaces.holding_argv(as_root=True), *applying.shown(build, *preparing)]
        yield Step("Merging elements", doing(self.merge), commands)
        yield from applying.phase_steps(build, self._engine, self.run)


def steps(build: Build) -> Iterator[Group]:
    """Give the steps that apply the elements of *build*, if it has any, to its disk."""
    if has_any(build.plan):
        work = _OnDisk(build)
        yield Group([*work.steps(build)], work.mounted, work.shown)
