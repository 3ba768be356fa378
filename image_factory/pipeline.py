"""One build, top to bottom.  The steps here are the steps listed in image-factory(1)."""

import contextlib
import dataclasses
import datetime
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from . import checkpoint, publish, workspace
from .base import command, events, interrupts
from .base.errors import BuildError, ConfigurationError, ImageFactoryError, NoSystemError
from .base.log import logger
from .base.units import format_size
from .checkpoint import Checkpoint
from .checks import audit, testboot
from .configuration import unused
from .configuration.files import Configuration
from .configuration.settings import check_image_name
from .finishing import checksum, clean, manifest, seal, shrink, sign
from .model import Artifact, Build, Disk, Plan
from .outputs import OUTPUTS
from .sources import SOURCES
from .sources.installer import answers, guest
from .sources.installer.watch import InstalledError
from .system import inventory, mounts
from .uploads import UPLOADS

# What --until can name; see _go_on.
UNTIL = ("install", "clean", "convert", "publish", "upload")


def make_plan(configuration: Configuration, image: str, flags: Mapping[str, str], *, resume: bool = False) -> Plan:
    """Return the plan of a build of *image*; ConfigurationError names what is wrong in the text.

    *flags* (key -> text) win over the configuration files.  A build to *resume* keeps its date.
    """
    check_image_name(image)
    settings = configuration.image(image, flags)
    variables = configuration.variables(image, flags)
    plan = Plan(image, settings, datetime.date.today(), settings.output_dir.absolute(), {}, variables)
    left = checkpoint.read(plan.work_path) if resume else None
    if left:
        plan = dataclasses.replace(plan, date=datetime.date.fromisoformat(left.date))
    destinations = {
        image_format: tuple(
            configuration.destination(section, plan.file_name(image_format), named_by=image)
            for section in settings.upload_destinations
        )
        for image_format in settings.format
    }
    audit.check(plan)
    seal.check(plan)
    doubts = unused.unused_keys(configuration, image, settings.upload_destinations, answers.keys_asked_for)
    for sentence in (*doubts, *unused.idle_keys(configuration, image, settings, flags)):
        logger.warning("%s", sentence)
    return dataclasses.replace(plan, destinations=destinations)


def check_plan(plan: Plan, *, resume: bool = False) -> Plan:
    """Raise ConfigurationError if it can be known now that *plan* can't be carried out here.

    Returns the plan with what is chosen on this machine.
    """
    source = SOURCES[plan.settings.source]
    source.check_machine(plan)
    testboot.check(plan)
    if resume and not checkpoint.read(plan.work_path):
        # Before the working directory is opened, so that what is there stays.
        raise checkpoint.nothing_to_resume(plan)
    _check_files(plan, resume=resume)
    plan = mounts.chosen(plan)
    command.require(programs(plan))
    if not resume:
        _check_space(plan)
    source.check_here(plan)
    workspace.warn_of_others(plan)
    mounts.check(plan)
    sign.check(plan)
    if not resume:
        # Last, so that an error stands alone.
        source.warn(plan)
    return plan


def programs(plan: Plan) -> list[str]:
    """Return the programs that *plan* needs, the user's own commands among them."""
    names = [
        *SOURCES[plan.settings.source].programs(plan),
        *mounts.programs(plan),
        *audit.programs(plan),
        *testboot.programs(plan),
        *sign.programs(plan),
        "fallocate",
        "zerofree",
    ]
    if plan.settings.post_build_command:
        names.append(plan.settings.post_build_command[0])
    for destinations in plan.destinations.values():
        for destination in destinations:
            names += [*UPLOADS[destination.type].programs(destination), *(words[0] for words in destination.commands)]
    # A path among them is relative to the directory that the command will run in.
    return [str(plan.output_dir / name) if "/" in name else name for name in dict.fromkeys(names)]


def _check_files(plan: Plan, *, resume: bool) -> None:
    if not resume:
        SOURCES[plan.settings.source].check(plan)
    _check_writable(f"[{plan.image}] output-dir", plan.output_dir)
    if not resume and SOURCES[plan.settings.source].downloads(plan):
        _check_writable(f"[{plan.image}] cache-dir", plan.cache_dir)
    if plan.log_path is not None and not os.access(plan.log_path.parent, os.W_OK) and plan.log_path.parent.exists():
        raise ConfigurationError(f"[{plan.image}] log-filename: {plan.log_path.parent} is not writable.")


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
    if free < plan.settings.image_size:
        raise ConfigurationError(
            f"{plan.output_dir} has {format_size(free)} free, the disk may grow to "
            f"{format_size(plan.settings.image_size)}.",
            hint="Free some space, or build elsewhere with --output-dir.",
        )


def _kept_size(plan: Plan) -> int:
    """Return how much space is free once what a failed build has kept is removed."""
    with contextlib.suppress(OSError):
        return sum(path.lstat().st_blocks * 512 for path in plan.work_path.iterdir())
    return 0


def build_image(
    plan: Plan, *, resume: bool = False, until: str | None = None, shell_on_error: bool = False
) -> list[Artifact]:
    """Carry out *plan*; what it returns exists under its final name, or nothing does.

    *resume* goes on from what a build that failed has left; *until*, one of UNTIL, stops after that and
    leaves what there is then, to be resumed.  *shell_on_error* lets the user look at the disk.
    """
    with workspace.opened(plan, resume=resume) as build, _shell_on_error(build, shell_on_error):
        if resume:
            done = checkpoint.resumed(plan, build.directory)
            disk = Disk(build.disk_path, done.virt_type)
            for used in done.inputs_used(plan):
                events.tell(used)
            events.tell(events.VirtTypeChosen(disk.virt_type))
        else:
            disk, done = _installed(build)
        events.tell(events.Installed())
        try:
            artifacts = _go_on(build, disk, done, until)
            if until:
                # Without it nothing would stay.
                done.write()
            return artifacts
        except NoSystemError:
            done.forget()
            raise
        except ImageFactoryError as error:
            _hint_at_resuming(build, error)
            raise


def _installed(build: Build) -> tuple[Disk, Checkpoint]:
    """Return the installed disk, and the checkpoint there; it is there too where the installation's end is not good."""
    inputs = checkpoint.InputsUsed()
    try:
        with events.observed(inputs):
            disk = SOURCES[build.plan.settings.source].produce(build)
    except InstalledError as error:
        if error.disk:
            checkpoint.begin(build, error.disk, inputs)
            _hint_at_resuming(build, error)
        raise
    return disk, checkpoint.begin(build, disk, inputs)


def _hint_at_resuming(build: Build, error: ImageFactoryError) -> None:
    if checkpoint.read(build.directory):
        error.add_hint(f"'image-factory --resume {build.plan.image}' goes on here, without a new installation.")


@contextlib.contextmanager
def _shell_on_error(build: Build, wanted: bool) -> Iterator[None]:
    """Have a shell opened in the root filesystem of the disk when something fails inside."""
    try:
        yield
    except BuildError as error:
        if wanted and build.disk_path.is_file():
            logger.error("%s", error.message)
            logger.error("A shell is opened where the build failed; the build ends when you leave it.")
            try:
                mounts.shell(build, Disk(build.disk_path))
            except BuildError as reason:
                logger.error("The shell, or its end, failed: %s", reason.message)
        raise


def _go_on(build: Build, disk: Disk, done: Checkpoint, until: str | None) -> list[Artifact]:
    """Do what is not *done* yet."""
    plan = build.plan
    if until == "install":
        return []
    if not done.is_at("cleaned"):
        clean_disk(build, disk)
        done.reach("cleaned")
    if until == "clean":
        return []
    if done.is_at("published"):
        publish.tell(done.artifacts)
        manifest.tell_difference(done.artifacts)
    elif not done.is_at("converted"):
        done.reach("converted", write_artifacts(build, disk))
    if until == "convert":
        return done.artifacts
    if not done.is_at("published"):
        # Also after --resume, whatever was found before: it is what is published.
        audit.audit_artifacts(build, disk, done.artifacts)
        testboot.test_boot(build, disk, done.artifacts)
        # No signal disturbs the publishing itself; one that came before or meanwhile is not lost.
        interrupts.check()
        done.reach("published", publish.move_into_place(build, done.artifacts))
        manifest.tell_difference(done.artifacts)
        interrupts.check()
    if until == "publish":
        return done.artifacts
    # Still with the lock: a second build would replace the files under the upload.
    publish.upload(plan, done.artifacts, done)
    if until != "upload":
        publish.run_post_build_command(plan, done.artifacts)
        done.forget()
    return done.artifacts


def clean_disk(build: Build, disk: Disk) -> None:
    """Remove from the installed disk what does not belong into an image."""
    try:
        with mounts.mounted(build, disk) as tree:
            clean.show_installer_logs(build, tree)
            clean.remove_installer_logs(build, tree)
            seal.seal(build, tree)
            inventory.take_inventory(build, tree)
            unfreed = shrink.trim_filesystems(build, disk, tree)
            shrink.zero_logical_volumes(build, tree, unfreed)
    except NoSystemError:
        guest.log_console(build)
        raise
    shrink.zero_unused_blocks(build, disk, unfreed)
    shrink.zero_swap(build, disk, tree.volumes)


def write_artifacts(build: Build, disk: Disk) -> list[Artifact]:
    """Write what is to be published, with checksums, manifests and signature, in the working directory."""
    if build.plan.settings.manifest and not inventory.taken(build):
        # The build is resumed, and the disk was cleaned when no manifest was wanted.
        with mounts.mounted(build, disk) as tree:
            inventory.take_inventory(build, tree)
    artifacts = [checksum.add_sha256(build, artifact) for artifact in write_outputs(build, disk)]
    return sign.sign_all(build, manifest.add_manifests(build, artifacts))


def write_outputs(build: Build, disk: Disk) -> list[Artifact]:
    """Write each format that is asked for, and the raw image if it is to be kept."""
    formats = _formats(build.plan)
    written = {name: OUTPUTS[name].write(build, disk) for name in _raw_last(formats)}
    wanted = build.plan.settings.format
    return [dataclasses.replace(written[name], upload=name in wanted) for name in formats]


def _formats(plan: Plan) -> list[str]:
    wanted = plan.settings.format
    return [*wanted, *(["raw"] if plan.settings.keep_raw and "raw" not in wanted else [])]


def _raw_last(formats: list[str]) -> list[str]:
    """Return *formats* with raw at the end: it is the disk itself, and none can be written after it."""
    return sorted(formats, key="raw".__eq__)


def describe_build(plan: Plan) -> list[tuple[str, list[list[str]]]]:
    """Return the steps of *plan* in their order, as the log names them, each with its commands.

    What is known only in the build stands in capitals or as XXXXXXXX.
    """
    build = Build(plan, plan.work_path, f"image-factory-{plan.image}-XXXXXXXX")
    steps = SOURCES[plan.settings.source].describe(build)
    shown = clean.SHOWN_LOGS if plan.settings.installer_logs else ()
    steps += mounts.describe(build, shown, clean.INSTALLER_LOGS, seal.calls(plan.settings))
    if plan.settings.manifest:
        # While the filesystems are mounted.
        names = [name for name, _ in steps]
        steps.insert(names.index("Freeing unused blocks"), (inventory.STEP, []))
    # Only where they can't be freed, and where there is some.
    steps.append(("Zeroing unused blocks", [shrink.zerofree_argv(build.disk_path, "OFFSET")]))
    steps.append(("Zeroing swap space", [shrink.punch_argv(build.disk_path, "OFFSET", "SIZE")]))
    formats = _formats(plan)
    steps += [(OUTPUTS[name].STEP, OUTPUTS[name].commands(build)) for name in _raw_last(formats)]
    artifacts = [
        Artifact(plan.output_dir / plan.file_name(name), name, plan.settings.image_size, name in plan.settings.format)
        for name in formats
    ]
    artifacts = sign.named(plan, manifest.named(plan, artifacts))
    steps += [(f"Checksumming {artifact.path.name}", []) for artifact in artifacts]
    if plan.settings.manifest:
        steps.append((manifest.STEP, []))
    steps += sign.describe(build)
    steps += audit.describe(build, formats)
    steps += testboot.describe(build, artifacts)
    steps.append(("Publishing", []))
    for artifact, destination, commands in publish.upload_commands(plan, artifacts):
        steps.append((f"Uploading {artifact.path.name} to {destination.section}", commands))
    post_build = publish.post_build_argv(plan, artifacts)
    if post_build:
        steps.append(("Running the post-build command", [post_build]))
    return steps
