"""Put the artifacts where they belong: final names, uploads, post-build command."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .base import command, events, files
from .base.errors import BuildError, reason_of
from .base.log import logger, step
from .checkpoint import Checkpoint
from .configuration.settings import Destination
from .model import MANIFEST_SUFFIX, SBOM_SUFFIX, SIGNATURE_SUFFIX, SUMS_SUFFIX, Artifact, Build, Plan
from .uploads import UPLOADS

# In the working directory while artifacts are published: their names.
_RECORD = "publishing"


def move_into_place(build: Build, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Give *artifacts* and what belongs to them their final names: all, or none and BuildError.

    Older files of these names are replaced; they come back if one can't be.
    """
    target = build.plan.output_dir
    with step("Publishing"), _recorded(build, artifacts), contextlib.ExitStack() as undo:
        for path in _files(artifacts):
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
    possible = [
        *(f"{artifact.path.name}{suffix}" for artifact in artifacts for suffix in (MANIFEST_SUFFIX, SBOM_SUFFIX)),
        sums,
        f"{sums}{SIGNATURE_SUFFIX}",
    ]
    for name in {*possible} - {path.name for path in _files(artifacts)}:
        try:
            (plan.output_dir / name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is of an older build, and can't be removed: %s.", name, reason_of(error))


@contextlib.contextmanager
def _recorded(build: Build, artifacts: Sequence[Artifact]) -> Iterator[None]:
    """Have a record of what is published inside, so that of a build that is killed nothing is."""
    record = build.directory / _RECORD
    names = [path.name for path in _files(artifacts)]
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
        if os.path.lexists(older):
            files.move(older, target)
        else:
            target.unlink()

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


def upload_commands(
    plan: Plan, artifacts: Sequence[Artifact]
) -> Iterator[tuple[Artifact, Destination, list[list[str]]]]:
    """Give the uploads, destination by destination: file, destination and the commands in their order."""
    for destinations in _uploads(plan, artifacts):
        for artifact, destination in destinations:
            yield (
                artifact,
                destination,
                [*UPLOADS[destination.type].commands(destination, artifact), *map(list, destination.commands)],
            )


def _uploads(plan: Plan, artifacts: Sequence[Artifact]) -> list[list[tuple[Artifact, Destination]]]:
    """Return for each destination what is uploaded to it."""
    uploaded = [artifact for artifact in artifacts if artifact.upload]
    return [
        list(zip(uploaded, destinations, strict=True))
        for destinations in zip(*(plan.destinations[artifact.format] for artifact in uploaded), strict=True)
    ]


def upload(plan: Plan, artifacts: Sequence[Artifact], done: Checkpoint | None = None) -> None:
    """Upload *artifacts* to each destination in turn; BuildError, after all of them, names each that failed.

    A destination gets nothing more after a failure: what failed for one file takes as long to fail
    for the next.  One that has all already, as *done* knows, is left out.
    """
    failures: list[tuple[str, BuildError]] = []
    for destinations in _uploads(plan, artifacts):
        whole = [destination for _, destination in destinations]
        if done and done.has_served(whole):
            logger.info("%s has all files already.", whole[0].section)
            continue
        for artifact, destination in destinations:
            try:
                with step(f"Uploading {artifact.path.name} to {destination.section}"):
                    UPLOADS[destination.type].upload(destination, artifact)
                    for argv in destination.commands:
                        command.run(argv, cwd=plan.output_dir)
            except BuildError as error:
                logger.error("Uploading %s to %s failed: %s", artifact.path.name, destination.section, error.message)
                failures.append((f"{artifact.path.name} to {destination.section}", error))
                break
        else:
            if done:
                done.serve(whole)
    if failures:
        raise _upload_error(failures) from failures[-1][1]


def _upload_error(failures: Sequence[tuple[str, BuildError]]) -> BuildError:
    """Return the error that names all *failures*."""
    message = "; ".join(f"Uploading {what} failed: {error.message}" for what, error in failures)
    if len(failures) == 1:
        return BuildError(message, hint=failures[0][1].hint)
    return BuildError(message, hint=" ".join(f"{what}: {error.hint}" for what, error in failures if error.hint))


def post_build_argv(plan: Plan, artifacts: Sequence[Artifact]) -> list[str] | None:
    """Return the user's command with the artifacts' file names, None if there is none."""
    if not plan.settings.post_build_command:
        return None
    names = [artifact.path.name for artifact in artifacts if artifact.upload]
    return [*plan.settings.post_build_command, *names]


def run_post_build_command(plan: Plan, artifacts: Sequence[Artifact]) -> None:
    """Run the user's command beside the artifacts, with their file names."""
    argv = post_build_argv(plan, artifacts)
    if argv:
        with step("Running the post-build command"):
            command.run(argv, cwd=plan.output_dir)
