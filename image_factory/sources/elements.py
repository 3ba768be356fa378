"""Make a disk of a tree that elements of diskimage-builder make."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

from ..base import events
from ..base.cleanup import released
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..configuration.settings import Dependent, ImageSettings
from ..disks import attaching, bounds, filesystems, layouts, making, standing
from ..elements import applying, breaks, engine
from ..elements import layout as laying
from ..elements.engine import Engine
from ..elements.hooks import Phase
from ..elements.image import Image
from ..inside import namespaces
from ..model import Build, Plan
from ..parts import Group, State, Step, carry_out, doing
from ..system import loop
from ..tasks import namespace
from . import bootstrap
from .kind import BESIDE_FIT, DiskSource, idle_beside
from .tree_tasks import TreeTasks

# The first phase that runs on the disk, where elements work on that.
_ON_DISK = "pre-finalise.d"
# With image-size = fit, what diskimage-builder leaves free for what scripts bring that run on the disk: so much for
# each byte of the tree, and for the journal.
_FREE, _FREE_BESIDE = Fraction(2, 3), 64 << 20


def check_settings(name: str, settings: ImageSettings) -> None:
    """Raise ConfigurationError unless *settings* name elements, and a disk that they can be put on."""
    if not settings.elements:
        raise ConfigurationError(
            f"[{name}] has source = elements and no 'elements'.", hint="'image-factory --list-elements' lists some."
        )
    bootstrap.check_disk_settings(name, settings)


def check(plan: Plan) -> None:
    """Raise ConfigurationError if the elements or the layout are wrong."""
    found = applying.of_plan(plan)
    breaks.warn(breaks.read(os.environ))
    laying.check(plan.image, found, plan.settings.layout)
    layout = _layout(plan, found)
    unsuited = standing.unsuited(layout)
    if laying.works_on_disk(found) and not _attaches(plan, layout) and unsuited:
        raise ConfigurationError(
            f"[{plan.image}] elements: they work on a disk, and one with {unsuited.kind} at {unsuited.point} is "
            "attached for root alone, by a kernel that mounts all that is on it.",
            hint="Build as root, or have ext4 there.",
        )
    on_disk = laying.works_on_disk(found)
    if plan.tasks and on_disk and namespace.tasks(plan):
        raise ConfigurationError(
            f"[{plan.image}] tasks-via = namespace: elements work on the disk here, and there is no tree after them.",
            hint="Set tasks-via = guest, or make the tasks scripts of an element.",
        )
    if plan.tasks and not layout.firmware and not namespace.tasks(plan):
        raise ConfigurationError(
            f"[{plan.image}] tasks: they run in the booted system, and this layout has no boot loader.",
            hint="Make them scripts of an element, or choose another layout."
            if on_disk
            else "Set tasks-via = namespace.",
        )
    bootstrap.check_paths(plan)
    bootstrap.check_architecture(plan)
    source = laying.source(found)
    bootstrap.check_layout(plan, layout, source.where if source else str(plan.settings.layout))


def _layout(plan: Plan, found: Image, identity: layouts.Identity = layouts.UNKNOWN) -> layouts.Layout:
    """Return how the disk of the elements *found* is laid out, with *identity*."""
    settings, source = plan.settings, laying.source(found)
    if source is None:
        return bootstrap.layout_of(plan, identity)
    root = layouts.root_of(bootstrap.filesystem_of(settings), settings.root_label or "", settings.mkfs_options)
    return bootstrap.layout_of(plan, identity, laying.scheme(source, root))


def _attaches(plan: Plan, layout: layouts.Layout) -> bool:
    """Return whether a disk with *layout* is attached where elements work on it: else files stand for its devices."""
    return plan.as_root and not any(loop.lacks_driver(each.kind) for _, each in layout.mounted)


def identity(plan: Plan, used: Sequence[events.InputUsed] = ()) -> dict[str, str]:
    """Return a digest of each setting that makes the disk another one."""
    layout = _layout(plan, applying.of_plan(plan))
    texts = applying.identity(plan) | bootstrap.disk_identity_texts(plan, layout) | namespace.identity(plan)
    return {key: hashlib.sha256(data).hexdigest() for key, data in texts.items()}


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs; what scripts of elements need they say themselves."""
    found = applying.of_plan(plan)
    layout = _layout(plan, found)
    return [
        *engine.PROGRAMS,
        *namespaces.programs(as_root=plan.as_root),
        *namespace.programs(plan),
        *making.programs(layout),
        *((attaching if _attaches(plan, layout) else standing).PROGRAMS if laying.works_on_disk(found) else ()),
    ]


class _Elements:
    """What the steps tell each other."""

    def __init__(self, build: Build) -> None:
        self._inside: namespaces.Namespaces | None = None
        plan = build.plan
        self._image = applying.of_plan(plan)
        self._disk = _layout(plan, self._image, bootstrap.new_identity(plan, identity(plan)))
        self._on_disk = laying.works_on_disk(self._image)
        self._attaches = self._on_disk and _attaches(plan, self._disk)
        if self._on_disk:
            # Whether it boots is for elements to see to.
            self._disk = replace(self._disk, firmware=None)
        self._engine = Engine(build, self._image, self._disk)
        self._tree = engine.tree_of(build)
        self._tasks = TreeTasks(build, self._tree, None, self._outer)

    def _outer(self) -> namespaces.Namespaces:
        assert self._inside is not None
        return self._inside

    def entered(self, state: State, steps: Sequence[Step | Group]) -> State:
        """Carry out *steps* with namespaces, with which all goes that they have mounted and left running."""
        build = state.build
        top = self._tree.parent
        with released(partial(namespaces.remove, top)):
            top.mkdir()
            with namespaces.entered(build.directory, as_root=build.plan.as_root) as self._inside:
                return carry_out(state, steps)

    def apart(self, state: State, steps: Sequence[Step | Group]) -> State:
        """Carry out *steps* in namespaces in which the machine is read-only, and no more than these."""
        outer = self._outer()
        with (
            self._engine.holding_packages(),
            namespaces.entered(self._tree.parent, as_root=outer.as_root, within=outer.pid) as self._inside,
        ):
            self._engine.prepare(self._inside)
            state = carry_out(state, steps)
        self._inside = outer
        return state

    def merge(self, state: State) -> None:
        self._engine.merge()
        self._begin(state.build.plan)

    def restore(self, state: State) -> None:
        self._tree.mkdir()
        self._begin(state.build.plan)
        self._tasks.restore()

    def _begin(self, plan: Plan) -> None:
        """Say what the tree is made from, and give it memory if it gets that."""
        applying.tell(self._image)
        # Others may have taken it since the build began.
        bootstrap.check_memory(plan)
        for argv in self._memory_argvs(plan):
            self._outer().run(*argv)

    def _memory_argvs(self, plan: Plan) -> list[list[str]]:
        return [bootstrap.memory_argv(plan, self._tree)] if bootstrap.in_memory(plan) else []

    def run(self, phase: Phase, state: State) -> None:
        assert self._inside is not None
        self._engine.run(self._inside, phase, attended=state.attended)

    def install_loader(self, state: State) -> None:
        assert self._inside is not None
        if self._disk.firmware:
            # What nothing boots is a tree for others, who may have no use for them.
            making.check_tools(self._inside, self._tree, self._disk)
        for each in bootstrap.loader_commands(state.build, self._tree, self._disk):
            try:
                self._inside.run(*each.words, stdin=each.text.encode())
            except CommandError as error:
                raise BuildError(f"The boot loader can't be installed: {error.said}.", hint=error.hint) from error

    def stand(self, state: State) -> None:
        assert self._inside is not None
        for each in self._standing():
            self._inside.run(*each.words, stdin=each.text.encode())
        self._engine.stand(self._disk)

    def _standing(self) -> list[making.Inside]:
        return bounds.guarded(self._tree, self._engine.stand_commands(self._disk))

    def make_disk(self, state: State) -> None:
        assert self._inside is not None
        layout = self._disk
        stands = self._on_disk and not self._attaches
        if stands:
            self._inside.run(*self._engine.take_argv())
        if not layout.size:
            if self._attaches and state.build.plan.settings.extra_size is None:
                need = filesystems.measured(self._inside, self._tree, [])
                layout = replace(layout, extra=int(need.size * _FREE) + _FREE_BESIDE)
            layout = making.fitted(self._inside, self._tree, state.build, layout)
        making.make_disk(self._inside, self._tree, state.build, layout)
        if stands:
            self._engine.copy_loader(layout)
        self._disk = layout

    def attach(self, state: State) -> None:
        assert self._inside is not None
        self._engine.attach(self._inside, self._disk)

    def detach(self, state: State) -> None:
        assert self._inside is not None
        self._engine.detach(self._inside)

    def steps(self, build: Build) -> Iterator[Step | Group]:
        as_root = build.plan.as_root
        beginning = [namespaces.holding_argv(as_root=as_root), *applying.shown(build, *self._memory_argvs(build.plan))]
        if self._tasks.kept:
            restoring = applying.shown(build, *self._tasks.restoring_argvs())
            yield Step("Restoring the tree", doing(self.restore), [*beginning, *restoring])
        else:
            preparing = applying.shown(build, self._engine.prepare_argv())
            apart = [namespaces.holding_argv(as_root=as_root, within="PID"), *preparing]
            yield Step("Merging elements", doing(self.merge), [*beginning, *apart])
            yield Group([*self._steps_of_elements(build)], self.apart)
        if not self._on_disk:
            yield from self._tasks.steps()
        if not self._on_disk and not build.until_task:
            yield self._loader("Installing the boot loader", build)
            yield self._making(build)

    def _steps_of_elements(self, build: Build) -> Iterator[Step]:
        """Give the steps of the phases, and those of the disk that some of them work on."""
        for phase in self._engine.phases:
            if self._on_disk and phase.directory == _ON_DISK:
                yield from self._before_disk(build)
            yield applying.phase_step(build, self._engine, phase, self.run)
        if self._attaches:
            yield Step("Detaching the disk", doing(self.detach), applying.shown(build, self._engine.detach_argv()))
        elif self._on_disk:
            yield self._making(build, self._engine.take_argv())

    def _before_disk(self, build: Build) -> Iterator[Step]:
        """Give the steps that come before phases on the disk: root attaches it, for others files stand for it."""
        yield self._loader("Preparing the filesystems", build)
        if self._attaches:
            yield self._making(build)
            argvs = self._engine.attach_argvs(self._disk)
            yield Step("Attaching the disk", doing(self.attach), applying.shown(build, *argvs))
        else:
            words = [each.words for each in self._standing()]
            yield Step("Preparing devices", doing(self.stand), applying.shown(build, *words))

    def _loader(self, name: str, build: Build) -> Step:
        words = [each.words for each in bootstrap.loader_commands(build, self._tree, self._disk)]
        return Step(name, doing(self.install_loader), applying.shown(build, *words))

    def _making(self, build: Build, *before: Sequence[str]) -> Step:
        """Return the step that makes the disk of the tree, which *before* prepares."""
        argvs = [*applying.shown(build, *before), *making.disk_argvs(self._tree, build, self._disk)]
        return Step("Making the disk", doing(self.make_disk), argvs)


def steps(build: Build) -> Iterator[Step | Group]:
    """Give the steps that make the disk."""
    work = _Elements(build)
    yield Group([*work.steps(build)], work.entered)


def check_here(plan: Plan) -> None:
    """Raise ConfigurationError unless there are namespaces here, and what the tree and the layout need."""
    namespaces.check(as_root=plan.as_root)
    bootstrap.check_memory(plan)
    bootstrap.check_appliance(_layout(plan, applying.of_plan(plan)).scheme)


_DEPENDENT: Dependent = {
    **idle_beside("elements"),
    **BESIDE_FIT,
}

SOURCE = DiskSource(
    keys=("elements",),
    check_settings=check_settings,
    identity=identity,
    steps=steps,
    programs=programs,
    check=check,
    disk_size=bootstrap.disk_size,
    downloads=lambda plan: not plan.settings.offline,
    remote=lambda plan: [],
    dependent=_DEPENDENT,
    fits=True,
    check_here=check_here,
)
