"""Put the artifacts where they belong: final names, uploads, post-build command."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .base import command, events, files, interrupts
from .base.errors import BuildError, ConfigurationError, ImageFactoryError, reason_of
from .base.log import logger
from .configuration.settings import MORE_CHECKSUMS, Destination
from .elements import engine
from .finishing import checksum, importing, listing, manifest, provenance, sign
from .model import MANIFEST_SUFFIX, PROVENANCE_SUFFIX, SBOM_SUFFIX, SIGNATURE_SUFFIX, SUMS_SUFFIX, Artifact, Build, Plan
from .outputs import planned
from .outputs.targets import TARGETS
from .parts import Group, Shown, State, Step, carry_out, doing, show
from .uploads import UPLOADS, index, streams

# In the working directory while artifacts are published: their names.
_RECORD = "publishing"


def move_into_place(build: Build, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Give *artifacts* and what belongs to them their final names: all, or none and BuildError.

    Older files of these names are replaced; they come back if one can't be.
    """
    target = build.plan.output_dir
    paths = list(dict.fromkeys([*engine.beside(build.directory), *_files(artifacts)]))
    with _recorded(build, paths), contextlib.ExitStack() as undo:
        for path in paths:
            undo.callback(_replace(path, target / path.name, build.directory))
        undo.pop_all()
    _remove_stale(build.plan, artifacts)
    published = [dataclasses.replace(artifact, path=target / artifact.path.name) for artifact in artifacts]
    tell(published)
    return published


def tell(artifacts: Sequence[Artifact]) -> None:
    """Tell observers of *artifacts* that have their final names."""
    for item in artifacts:
        events.tell(
            events.Published(item.path, item.format, item.virtual_size, item.upload, item.sha256, item.companions)
        )


def _files(artifacts: Sequence[Artifact]) -> list[Path]:
    """Return all files of *artifacts*, once each, in the order in which they are published.

    An artifact comes after what belongs to it: at no time is there one with an older one's checksum
    but for the moment between the two.
    """
    return list(dict.fromkeys(path for artifact in artifacts for path in (*artifact.others, artifact.path)))


def _remove_stale(plan: Plan, artifacts: Sequence[Artifact]) -> None:
    """Remove what belonged to artifacts that were replaced, and is not made any more."""
    sums = f"{plan.base_name}{SUMS_SUFFIX}"
    suffixes = (
        MANIFEST_SUFFIX,
        SBOM_SUFFIX,
        *map(checksum.suffix_of, MORE_CHECKSUMS),
        *map(importing.suffix_of, TARGETS.values()),
    )
    possible = [
        *(f"{artifact.path.name}{suffix}" for artifact in artifacts for suffix in suffixes),
        f"{plan.base_name}{PROVENANCE_SUFFIX}",
        sums,
        f"{sums}{SIGNATURE_SUFFIX}",
    ]
    for name in {*possible} - {path.name for path in _files(artifacts)}:
        try:
            (plan.output_dir / name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is of an older build, and can't be removed: %s.", name, reason_of(error))


@contextlib.contextmanager
def _recorded(build: Build, paths: Sequence[Path]) -> Iterator[None]:
    """Have a record of what is published inside, *paths*, so that of a build that is killed nothing is."""
    record = build.directory / _RECORD
    names = [path.name for path in paths]
    # Half a record would be worse than none.
    files.replace(record, "".join(f"{name}\n" for name in names).encode())
    yield
    record.unlink()


def take_back(directory: Path) -> None:
    """Take back what a build that was killed while it published from *directory* has published."""
    record = directory / _RECORD
    if not record.is_file():
        return
    for name in record.read_text(encoding="utf-8").splitlines():
        older, target = _older(directory, name), directory.parent / name
        if os.path.lexists(older):
            files.move(older, target)
        elif not os.path.lexists(directory / name):
            target.unlink(missing_ok=True)
    record.unlink()


def _older(directory: Path, name: str) -> Path:
    return directory / f"older-{name}"


def _replace(source: Path, target: Path, directory: Path) -> Callable[[], None]:
    """Rename *source* to *target*; return what takes that back.  BuildError if nothing has changed."""
    older = _older(directory, target.name)

    def take_back() -> None:
        # What elements have made is not made once more when the build is resumed.
        files.move(target, source)
        if os.path.lexists(older):
            files.move(older, target)

    try:
        _keep(target, older)
        try:
            files.move(source, target)
        except BaseException:
            if os.path.lexists(older):
                files.move(older, target)
            raise
    except OSError as error:
        raise BuildError(f"Can't publish {target}: {error.strerror}.") from error
    return take_back


def _keep(target: Path, older: Path) -> None:
    """Give the file at *target*, if there is one, the name *older* too."""
    if target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    try:
        os.link(target, older, follow_symlinks=False)
    except FileNotFoundError:
        pass
    except OSError:
        # It's someone else's, or this filesystem has no hard links: for a moment it's only there.
        files.move(target, older)


def steps(build: Build) -> Iterator[Step]:
    """Give the step that publishes."""

    def run(state: State) -> State:
        # No signal disturbs the publishing itself; one that came before is not lost.
        interrupts.check()
        artifacts = move_into_place(state.build, state.artifacts)
        manifest.tell_difference(artifacts)
        return dataclasses.replace(state, artifacts=tuple(artifacts))

    yield Step("Publishing", run)


def upload_steps(build: Build) -> Iterator[Group]:
    """Give the uploads, destination by destination."""
    uploads = _uploads(build.plan, published(build.plan))
    if uploads:
        groups = [_to_destination(build.plan, destinations) for destinations in uploads]
        yield Group(groups, _upload_to_each)


def published(plan: Plan) -> list[Artifact]:
    """Return the artifacts of *plan* with their final names, and the names of what belongs to them."""
    found = checksum.named(plan, planned(plan, plan.output_dir))
    for part in (importing, manifest, listing, provenance, sign):
        found = part.named(plan, found)
    return found


def _uploads(plan: Plan, artifacts: Sequence[Artifact]) -> list[list[tuple[Artifact, Destination]]]:
    """Return for each destination what is uploaded to it."""
    uploaded = [artifact for artifact in artifacts if artifact.upload]
    each = zip(*(plan.destinations[artifact.format] for artifact in uploaded), strict=True)
    going = ([pair for pair in zip(uploaded, found, strict=True) if _goes_to(*pair)] for found in each)
    return [pairs for pairs in going if pairs]


def _goes_to(artifact: Artifact, destination: Destination) -> bool:
    return destination.formats is None or artifact.format in destination.formats


def _to_destination(plan: Plan, destinations: Sequence[tuple[Artifact, Destination]]) -> Group:
    """Return the steps that upload to one destination, which gets nothing more after a failure.

    What failed for one file takes as long to fail for the next.
    """
    whole = [destination for _, destination in destinations]

    def run(state: State, steps: Sequence[Step | Group]) -> State:
        if state.served and state.served.has_served(whole):
            logger.info("%s has all files already.", whole[0].section)
            return state
        state = carry_out(state, steps)
        if state.served:
            state.served.serve(whole)
        return state

    def shown(state: State, steps: Sequence[Step | Group]) -> list[Shown]:
        return [] if state.served and state.served.has_served(whole) else show(state, steps)

    steps = [_upload(plan, artifact, destination) for artifact, destination in destinations]
    if whole[0].index != "no":
        steps += _index(plan, whole[0])
    return Group(steps, run, shown)


def _index(plan: Plan, destination: Destination) -> list[Step]:
    """Return the steps that update the index at *destination* once all files are there, and remove older builds."""
    gone: list[str] = []

    def run(state: State) -> None:
        going = [artifact for artifact in state.artifacts if artifact.upload and _goes_to(artifact, destination)]
        try:
            gone[:] = index.update(plan, destination, going)
        except (BuildError, ConfigurationError) as error:
            logger.error("Updating the index at %s failed: %s", destination.section, error.message)
            raise _UploadError(f"{index.NAME} to {destination.section}", error) from error

    where = f"at {destination.section}"
    steps = [Step(f"Updating the index {where}", doing(run), _known(lambda: index.commands(destination)))]
    if destination.index == "simplestreams":
        steps.append(_streams(plan, destination))
    if destination.keep is not None:
        commands = _known(lambda: index.removing(destination))
        removing = doing(lambda state: index.remove(destination, gone))
        steps.append(Step(f"Removing older builds {where}", removing, commands))
    return steps


def _streams(plan: Plan, destination: Destination) -> Step:
    """Return the step that updates what Incus reads at *destination*, once the index is there."""

    def run(state: State) -> None:
        try:
            index.update_streams(plan, destination)
        except (BuildError, ConfigurationError) as error:
            logger.error("Updating the simplestreams at %s failed: %s", destination.section, error.message)
            raise _UploadError(f"{index.STREAMS} to {destination.section}", error) from error

    commands = _known(lambda: index.streams_commands(destination))
    return Step(f"Updating the simplestreams at {destination.section}", doing(run), commands)


def _upload(plan: Plan, artifact: Artifact, destination: Destination) -> Step:
    def run(state: State) -> None:
        # With its digests, which are not known before.
        made = next(found for found in state.artifacts if found.format == artifact.format)
        try:
            UPLOADS[destination.type].upload(destination, made)
            for argv in destination.commands:
                command.run(argv, cwd=plan.output_dir)
        except (BuildError, ConfigurationError) as error:
            logger.error("Uploading %s to %s failed: %s", artifact.path.name, destination.section, error.message)
            raise _UploadError(f"{artifact.path.name} to {destination.section}", error) from error

    commands = _known(lambda: UPLOADS[destination.type].commands(destination, artifact))
    name = f"Uploading {artifact.path.name} to {destination.section}"
    return Step(name, doing(run), [*commands, *destination.commands])


def _known(commands: Callable[[], list[list[str]]]) -> list[list[str]]:
    """Return *commands*; none where the file of a login has gone since it was checked, which is told by the step."""
    try:
        return commands()
    except ConfigurationError:
        return []


class _UploadError(BuildError):
    """*What* could not be uploaded, for the reason *error*."""

    def __init__(self, what: str, error: ImageFactoryError) -> None:
        super().__init__(error.message, hint=error.hint)
        self.what = what


def _upload_to_each(state: State, groups: Sequence[Step | Group]) -> State:
    """Upload to each destination in turn; BuildError, after all of them, names each that failed."""
    failures: list[_UploadError] = []
    for group in groups:
        try:
            state = carry_out(state, [group])
        except _UploadError as error:
            failures.append(error)
    if failures:
        raise _upload_error(failures) from failures[-1]
    return state


def _upload_error(failures: Sequence[_UploadError]) -> BuildError:
    """Return the error that names all *failures*."""
    message = "; ".join(f"Uploading {error.what} failed: {error.message}" for error in failures)
    if len(failures) == 1:
        return BuildError(message, hint=failures[0].hint)
    return BuildError(message, hint=" ".join(f"{error.what}: {error.hint}" for error in failures if error.hint))


def post_build_steps(build: Build) -> Iterator[Step]:
    """Give the step that runs the user's command beside the artifacts, with their file names, if there is one."""
    plan = build.plan
    if plan.settings.post_build_command:
        names = [artifact.path.name for artifact in planned(plan, plan.output_dir) if artifact.upload]
        argv = [*plan.settings.post_build_command, *names]
        run = doing(lambda state: _post_build(argv, plan))
        yield Step("Running the post-build command", run, [argv])


def _post_build(argv: Sequence[str], plan: Plan) -> None:
    command.run(argv, cwd=plan.output_dir)


def programs(plan: Plan) -> list[str]:
    """Return the programs that the uploads of *plan* need, the user's own commands among them."""
    destinations = [destination for found in plan.destinations.values() for destination in found]
    return [
        name
        for destination in destinations
        for name in (*UPLOADS[destination.type].programs(destination), *(words[0] for words in destination.commands))
    ]


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it can be known now that an image can't go to one of its destinations."""
    going = _uploads(plan, planned(plan, plan.output_dir))
    served = {destination.section for pairs in going for _, destination in pairs}
    for destination in (each for found in plan.destinations.values() for each in found):
        if destination.section not in served:
            raise ConfigurationError(
                f"[{destination.section}] upload-formats: [{plan.image}] has none of them.",
                hint=f"Its format is {', '.join(plan.settings.format)}.",
            )
    for pairs in going:
        _, destination = pairs[0]
        if destination.index == "simplestreams" and not streams.can_have([artifact.format for artifact, _ in pairs]):
            raise ConfigurationError(
                f"[{destination.section}] upload-index: simplestreams needs {streams.NEEDED} there.",
                hint="Add them to format, and to upload-formats if that is set, or set upload-index = yes.",
            )
    for artifact, destination in (pair for pairs in going for pair in pairs):
        UPLOADS[destination.type].check(destination, artifact.path.name)
        if destination.index != "no" and artifact.path.name in destination.target:
            raise ConfigurationError(
                f"[{destination.section}] upload-index: with ${{image}} in upload-target it has no place.",
                hint="Upload all images to one directory.",
            )
        if destination.keep is not None and destination.index == "no":
            raise ConfigurationError(
                f"[{destination.section}] upload-keep: only an index tells which builds are there.",
                hint="Set upload-index = yes, or upload-keep = all.",
            )


def post_build_programs(plan: Plan) -> list[str]:
    """Return the user's own program, if there is one."""
    return [*(plan.settings.post_build_command or [])[:1]]
