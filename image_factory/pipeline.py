"""One build, top to bottom.  The steps here are the steps listed in image-factory(1)."""

import contextlib
import dataclasses
import datetime
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import checkpoint, keep, naming, outputs, publish, tasks, workspace
from .base import command, events, interrupts
from .base.cleanup import released
from .base.errors import BuildError, ConfigurationError, ImageFactoryError, InstalledError, NoSystemError
from .base.files import check_readable
from .base.log import logger
from .base.units import format_size
from .checkpoint import Checkpoint, Reached
from .checks import audit, testboot
from .checks.testboot import reporting
from .configuration import unused
from .configuration.files import Configuration
from .configuration.settings import Task, check_image_name
from .disks import reproducible
from .elements import on_disk
from .finishing import (
    checksum,
    clean,
    copying,
    firstboot,
    fitting,
    importing,
    listing,
    manifest,
    provenance,
    seal,
    settling,
    shrink,
    sign,
)
from .model import Artifact, Build, Disk, Plan
from .outputs import targets
from .parts import Group, Part, Shown, State, Step, Steps, carry_out, mounted, show
from .sources import SOURCES, DiskSource
from .system import mounts
from .tasks import guest, layers, namespace, offline, playbooks
from .told import junit
from .told.witness import Witness


@dataclass(frozen=True)
class Stage:
    """Parts of a build after which it can stop: *name* is what ``--until`` calls it.

    *reached* is what the checkpoint calls a build that is through with it, and has it for good.
    """

    name: str
    parts: tuple[Part, ...]
    reached: Reached | None = None


def _source(plan: Plan) -> DiskSource:
    return SOURCES[plan.settings.source]


def _installing(build: Build) -> Steps:
    return _source(build.plan).steps(build)


def _cleaning(build: Build) -> Steps:
    inside = [
        *clean.steps(build),
        *seal.steps(build),
        *copying.steps(build),
        *offline.steps(build),
        *firstboot.steps(build),
        *fitting.steps(build),
        *reporting.steps(build),
        *manifest.listing_steps(build),
        *shrink.mounted_steps(build),
    ]
    yield Group([mounted(inside, lambda build: build.disk_path)], _explained)


def _explained(state: State, steps: Sequence[Step | Group]) -> State:
    try:
        return carry_out(state, steps)
    except NoSystemError:
        _source(state.build.plan).explain(state.build)
        raise


def _programs_to_clean(plan: Plan) -> list[str]:
    return [*mounts.programs(plan), *fitting.programs(plan)]


def _check_cleaning(plan: Plan) -> None:
    mounts.check(plan)
    copying.check(plan)
    firstboot.check(plan)
    fitting.check(plan)


def _check_tasks(plan: Plan) -> None:
    tasks.check(plan)
    guest.check(plan)
    namespace.check(plan)
    offline.check(plan)


# The whole build, in its order.  All that has to know what a build does reads it here.
STAGES = (
    Stage("install", (Part(_installing, lambda plan: _source(plan).programs(plan)),), Reached.INSTALLED),
    Stage(
        "elements",
        (Part(on_disk.steps, on_disk.programs, on_disk.check),),
        Reached.APPLIED,
    ),
    Stage("tasks", (Part(guest.steps, guest.programs, _check_tasks),), Reached.TASKED),
    Stage(
        "clean",
        (
            Part(guest.writing_steps),
            Part(_cleaning, _programs_to_clean, _check_cleaning),
            Part(shrink.steps, shrink.programs),
            Part(settling.steps, settling.programs),
        ),
        Reached.CLEANED,
    ),
    Stage(
        "convert",
        (
            Part(manifest.late_steps),
            Part(outputs.steps, outputs.programs, outputs.check),
            Part(checksum.steps),
            Part(importing.steps),
            Part(manifest.steps),
            Part(listing.steps, check=listing.check),
            Part(provenance.steps),
            Part(sign.steps, sign.programs, sign.check),
        ),
        Reached.CONVERTED,
    ),
    Stage("check", (Part(audit.steps, audit.programs), Part(testboot.steps, testboot.programs, testboot.check))),
    Stage("publish", (Part(publish.steps),), Reached.PUBLISHED),
    Stage("upload", (Part(publish.upload_steps, publish.programs, publish.check),)),
    Stage("notify", (Part(publish.post_build_steps, publish.post_build_programs), Part(keep.steps))),
)

# --until names one of these: after the last stage nothing is left to do.
UNTIL = tuple(stage.name for stage in STAGES[:-1])


def make_plan(configuration: Configuration, image: str, flags: Mapping[str, str], *, resume: bool = False) -> Plan:
    """Return the plan of a build of *image*; ConfigurationError names what is wrong in the text.

    *flags* (key -> text) win over the configuration files.  A build to *resume* keeps its date.
    """
    check_image_name(image)
    settings = configuration.image(image, flags)
    variables = configuration.variables(image, flags)
    plan = Plan(image, settings, datetime.date.today(), settings.output_dir.absolute(), {}, variables)
    plan = dataclasses.replace(plan, source_date=reproducible.source_date(os.environ))
    left = checkpoint.read(plan.work_path) if resume else None
    if left:
        plan = dataclasses.replace(
            plan,
            date=datetime.date.fromisoformat(left.date),
            name=left.name,
            text_name=left.text_name,
            ident=left.ident,
        )
    else:
        plan = naming.named(plan, datetime.datetime.now())
    outputs.check_names(plan)
    destinations = {
        image_format: tuple(
            configuration.destination(section, outputs.file_name(plan, image_format), named_by=image)
            for section in settings.upload_destinations
        )
        for image_format in settings.format
    }
    audit.check(plan)
    seal.check(plan)
    tasks, late_tasks = (
        tuple(configuration.task(name, key, named_by=image) for name in names)
        for key, names in (("tasks", settings.tasks), ("tasks-after-cleaning", settings.tasks_after_cleaning))
    )
    sections = [task.section for task in (*tasks, *late_tasks) if task.section]
    doubts = unused.unused_keys(configuration, image, settings.upload_destinations, sections)
    for sentence in (*doubts, *unused.idle_keys(configuration, image, settings, flags)):
        logger.warning("%s", sentence)
    tasks, late_tasks = (tuple(_with_given(plan, task) for task in each) for each in (tasks, late_tasks))
    return dataclasses.replace(plan, destinations=destinations, tasks=tasks, late_tasks=late_tasks)


def _with_given(plan: Plan, task: Task) -> Task:
    """Return *task* with what tells apart what the settings of the image make of it."""
    if task.copies:
        return dataclasses.replace(task, given="\n".join(copying.identity_of(copying.of_task(plan, task))))
    return playbooks.with_given(plan, task)


def check_plan(plan: Plan, *, resume: bool = False, until: str | None = None, builds: bool = True) -> Plan:
    """Raise ConfigurationError if it can be known now that *plan* can't be carried out here, as far as *until*.

    Returns the plan with what is chosen on this machine.  Unless it is sure that it *builds*, an image that is there
    already is no matter.
    """
    _check_until(plan, until)
    source = _source(plan)
    source.check_machine(plan)
    if resume and not checkpoint.read(plan.work_path):
        # This comes before the working directory is opened, so that what is there stays.
        raise checkpoint.nothing_to_resume(plan)
    _check_files(plan, resume=resume)
    plan = mounts.chosen(plan)
    command.require(programs(plan))
    if not resume:
        _check_space(plan)
        if builds:
            naming.check(plan)
        # What the disk was made from may be gone when a build goes on.
        outputs.check_sizes(plan)
        targets.check_size(plan)
    workspace.warn_of_others(plan)
    for stage in STAGES:
        for part in stage.parts:
            part.check(plan)
    # libvirt leaves files of its own where it is asked.
    source.check_here(plan)
    if not resume:
        # Warnings come last, so that an error stands alone.
        source.warn(plan)
    return plan


def _check_until(plan: Plan, until: str | None) -> None:
    """Raise ConfigurationError if *until* names a task that *plan* does not have before cleaning."""
    names = layers.names(plan)
    if _until_task(until) and until not in names:
        raise ConfigurationError(
            f"--until {until}: {plan.image} has no such task before cleaning.",
            hint=f"It has {', '.join(names)}." if names else "'tasks' names some.",
        )


def programs(plan: Plan) -> list[str]:
    """Return the programs that *plan* needs, the user's own commands among them."""
    names = [name for stage in STAGES for part in stage.parts for name in part.programs(plan)]
    # A path among them is relative to the directory that the command will run in.
    return [str(plan.output_dir / name) if "/" in name else name for name in dict.fromkeys(names)]


def _check_files(plan: Plan, *, resume: bool) -> None:
    if plan.settings.keyring and plan.settings.verify != "none":
        check_readable(f"[{plan.image}] keyring", plan.settings.keyring)
    if not resume:
        _source(plan).check(plan)
    check_output_dir(plan)
    if not resume and _source(plan).downloads(plan):
        _check_writable(f"[{plan.image}] cache-dir", plan.cache_dir)
    if plan.log_path is not None and not os.access(plan.log_path.parent, os.W_OK) and plan.log_path.parent.exists():
        raise ConfigurationError(f"[{plan.image}] log-filename: {plan.log_path.parent} is not writable.")


def check_output_dir(plan: Plan) -> None:
    """Raise ConfigurationError unless files can be written to the output directory of *plan*."""
    _check_writable(f"[{plan.image}] output-dir", plan.output_dir)


def _existing_parent(path: Path) -> Path:
    while not os.path.lexists(path):
        path = path.parent
    return path


def _check_writable(where: str, path: Path) -> None:
    """Raise ConfigurationError unless *path* is, or can be made, a directory to write to."""
    existing = _existing_parent(path)
    if not existing.is_dir():
        raise ConfigurationError(f"{where}: {existing} is not a directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{where}: {existing} is not writable.", hint="Give another with a flag; see --help.")


def _check_space(plan: Plan) -> None:
    free = shutil.disk_usage(_existing_parent(plan.output_dir)).free + _kept_size(plan)
    size = SOURCES[plan.settings.source].disk_size(plan)
    # One is gone when the other comes.
    beside = next((f", and {what} to as much" for what, is_there in _beside_disk(plan).items() if is_there), "")
    if free < (2 * size if beside else size):
        raise ConfigurationError(
            f"{plan.output_dir} has {format_size(free)} free, the disk may grow to {format_size(size)}{beside}.",
            hint="Free some space, or build elsewhere with --output-dir.",
        )


def _beside_disk(plan: Plan) -> dict[str, bool]:
    """Return what may become as large as the disk, each with whether there is any."""
    return {"the layers of tasks": bool(plan.tasks), "the copy of it for elements": on_disk.has_any(plan)}


def _kept_size(plan: Plan) -> int:
    """Return how much space is free once what a failed build has kept is removed."""
    with contextlib.suppress(OSError):
        return sum(path.lstat().st_blocks * 512 for path in plan.work_path.iterdir())
    return 0


def build_image(
    plan: Plan,
    *,
    resume: bool = False,
    until: str | None = None,
    shell_on_error: bool = False,
    witness: Witness | None = None,
) -> list[Artifact]:
    """Carry out *plan*; what it returns exists under its final name, or nothing does.

    *resume* goes on from what a build that failed has left; *until*, one of UNTIL or a task's, stops after that and
    leaves what there is then, to be resumed.  *shell_on_error* lets the user look at the disk.  *witness* notes
    what happens; one that is given observes already.
    """
    chosen, seen = _Chosen(), witness or Witness()
    with (
        workspace.opened(plan, resume=resume) as build,
        events.observed(chosen),
        contextlib.nullcontext() if witness else seen.observing(),
        _shell_on_error(build, chosen, shell_on_error),
    ):
        build = dataclasses.replace(build, resumed=resume, until_task=_until_task(until))
        state = State(build, Disk(build.disk_path), attended=shell_on_error, witness=seen)
        done = checkpoint.resumed(plan, build.directory) if resume else None
        if done and done.stage:
            state = _gone_on(state, done)
            for used in done.inputs_used(plan):
                events.tell(used)
            events.tell(events.VirtTypeChosen(done.virt_type))
        else:
            if done:
                # There may be a disk of tasks that have changed.
                done.write()
                build.disk_path.unlink(missing_ok=True)
            state, done = _installed(state, chosen)
        if not done.stage:
            return []
        events.tell(events.Installed())
        try:
            if done.is_at(Reached.PUBLISHED):
                publish.tell(done.artifacts)
                manifest.tell_difference(done.artifacts)
            state = _carried_out(state, done, until)
            if until:
                # Without it nothing would stay.
                done.write()
            else:
                done.forget()
            return [*state.artifacts]
        except NoSystemError:
            done.forget()
            raise
        except ImageFactoryError as error:
            _hint_at_resuming(build, error)
            raise


class _Chosen:
    """An observer that keeps what virtual machines can use here: what fails has no state to tell it."""

    virt_type = "qemu"

    def notice(self, event: events.Event) -> None:
        """Keep it."""
        if isinstance(event, events.VirtTypeChosen):
            self.virt_type = event.name


def _gone_on(state: State, done: Checkpoint) -> State:
    """Return *state* with what there is of an earlier build."""
    build = dataclasses.replace(state.build, virt_type=done.virt_type)
    artifacts = tuple(done.artifacts) if done.is_at(Reached.CONVERTED) else ()
    return dataclasses.replace(
        state, build=build, artifacts=artifacts, served=done, cleans=not done.is_at(Reached.CLEANED)
    )


def _until_task(until: str | None) -> str | None:
    return until if until and until.startswith(layers.UNTIL_PREFIX) else None


def steps_of(stage: Stage, build: Build) -> Steps:
    """Give the steps of *stage* in their order."""
    return [step for part in stage.parts for step in part.steps(build)]


def _installed(state: State, chosen: _Chosen) -> tuple[State, Checkpoint]:
    """Install; return the checkpoint there, which is there too where the installation's end is not good."""
    inputs = checkpoint.InputsUsed()
    layered = _Layered(state.build, inputs)
    try:
        with events.observed(inputs, layered):
            state = _gone_through(state, STAGES[0])
    except InstalledError as error:
        checkpoint.begin(dataclasses.replace(state.build, virt_type=chosen.virt_type), inputs)
        _hint_at_resuming(state.build, error)
        raise
    except ImageFactoryError as error:
        _hint_at_resuming(state.build, error)
        raise
    done = layered.checkpoint or checkpoint.begin(state.build, inputs)
    if layered.checkpoint and not state.build.until_task:
        done.virt_type = state.build.virt_type
        done.reach(Reached.INSTALLED)
    return dataclasses.replace(state, served=done), done


class _Layered:
    """An observer that writes the checkpoint of *build*, made from *inputs*, when it can go on without a disk."""

    def __init__(self, build: Build, inputs: checkpoint.InputsUsed) -> None:
        self._build, self._inputs = build, inputs
        self.checkpoint: Checkpoint | None = None

    def notice(self, event: events.Event) -> None:
        """Write it when there is the first layer."""
        if isinstance(event, events.LayerKept) and self.checkpoint is None:
            self.checkpoint = checkpoint.begin(self._build, self._inputs, None)


def _hint_at_resuming(build: Build, error: ImageFactoryError) -> None:
    if checkpoint.read(build.directory):
        error.add_hint(f"'image-factory --resume {build.plan.image}' goes on here, without a new installation.")


@contextlib.contextmanager
def _shell_on_error(build: Build, chosen: _Chosen, wanted: bool) -> Iterator[None]:
    """Have a shell opened in the root filesystem of the disk when something fails inside."""
    try:
        yield
    except BuildError as error:
        if wanted and not error.attended and build.disk_path.is_file():
            logger.error("%s", error.message)
            logger.error("A shell is opened where the build failed; the build ends when you leave it.")
            try:
                mounts.shell(dataclasses.replace(build, virt_type=chosen.virt_type), Disk(build.disk_path))
            except BuildError as reason:
                logger.error("The shell, or its end, failed: %s", reason.message)
        raise


def _left(done: Checkpoint | None, until: str | None) -> list[Stage]:
    """Return the stages that a build has yet to go through: those that are not *done*, up to *until*."""
    last = [stage.name for stage in STAGES].index("tasks" if _until_task(until) else until or STAGES[-1].name)
    first = 0
    for number, stage in enumerate(STAGES, 1):
        if done and stage.reached and done.is_at(stage.reached):
            first = number
    return [*STAGES[first : last + 1]]


def _gone_through(state: State, stage: Stage) -> State:
    """Carry out the steps of *stage*; the results of its tasks are written, however it ends."""
    ended = events.TasksEnded()

    def write() -> None:
        if ended.found:
            tasks = (*state.tasks, *ended.found)
            junit.write(state.build.plan, state.build.directory, (), tasks=tasks)

    with released(write), events.observed(ended):
        reached = carry_out(state, steps_of(stage, state.build))
    return dataclasses.replace(reached, tasks=(*state.tasks, *ended.found))


def _carried_out(state: State, done: Checkpoint, until: str | None) -> State:
    """Go through the stages that are left; each is written down when it is reached."""
    # Still with the lock: a second build would replace the files under an upload.
    for stage in _left(done, until):
        state = _gone_through(state, stage)
        if stage.reached and not (state.build.until_task and stage.name == "tasks"):
            done.reach(stage.reached, [*state.artifacts])
        # A signal that came meanwhile is not lost.
        interrupts.check()
    return state


def described(plan: Plan, *, resume: bool = False, until: str | None = None) -> list[Shown]:
    """Return the steps of *plan* in their order, as the log names them, each with its commands.

    What is known only in the build stands in capitals or as XXXXXXXX.  *resume* and *until* are as in ``build_image``.
    """
    # Where KVM is to be probed, emulation may be what comes of it.
    virt_type = "qemu" if plan.settings.virt_type == "auto" else plan.settings.virt_type
    name = f"image-factory-{plan.image}-XXXXXXXX"
    build = Build(plan, plan.work_path, name, virt_type, resumed=resume, until_task=_until_task(until))
    state = State(build, Disk(build.disk_path))
    done = None
    if resume:
        done = checkpoint.resumed(plan, plan.work_path)
        if done.stage:
            state = _gone_on(state, done)
    return [shown for stage in _left(done, until) for shown in show(state, steps_of(stage, state.build))]
