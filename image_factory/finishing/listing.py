"""The manifest for people and shells: what RackN's image-builder tells of a tar, and the list of its files."""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..base import files
from ..base.errors import ConfigurationError
from ..base.log import logger
from ..model import Artifact, Build, Plan
from ..outputs import OUTPUTS, planned, trees
from ..parts import State, Step
from ..uploads import place_of


def check(plan: Plan) -> None:
    """Raise ConfigurationError if a list is asked for of files that no format of *plan* has."""
    if plan.settings.manifest_text and not _of_tree(planned(plan, plan.output_dir)):
        names = ", ".join(name for name, output in OUTPUTS.items() if output.made_from == "tree")
        raise ConfigurationError(
            f"[{plan.image}] manifest-text: no format has the files of the tree.", hint=f"Those that do are {names}."
        )


def _of_tree(artifacts: Sequence[Artifact]) -> list[Artifact]:
    return [artifact for artifact in artifacts if OUTPUTS[artifact.format].made_from == "tree"]


def steps(build: Build) -> Iterator[Step]:
    """Give the step that writes the manifest, if it is wanted."""

    def run(state: State) -> State:
        return dataclasses.replace(state, artifacts=tuple(_add(state.build, state.artifacts)))

    if build.plan.settings.manifest_text:
        yield Step(f"Writing the list {build.plan.text_name}", run)


def _add(build: Build, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Write the manifest beside *artifacts*; return these with it."""
    path = build.directory / build.plan.text_name
    lines = [line for artifact in _of_tree(artifacts) for line in _lines(build.plan, artifact, path)]
    for line in lines:
        logger.info("%s", line)
    with path.open("wb") as file, trees.list_path(build).open("rb") as names:
        file.write("".join(f"{line}\n" for line in [*lines, ""]).encode())
        shutil.copyfileobj(names, file)
    return _with(artifacts, (path.name, files.digest_of(path)))


def _with(artifacts: Sequence[Artifact], written: tuple[str, str]) -> list[Artifact]:
    """Return *artifacts*, to each of the tree of which the file *written* belongs."""
    of_tree = _of_tree(artifacts)
    return [
        dataclasses.replace(found, companions=(*found.companions, written)) if found in of_tree else found
        for found in artifacts
    ]


def _lines(plan: Plan, artifact: Artifact, path: Path) -> list[str]:
    """Return what is told of *artifact*; *path* is the manifest itself."""
    places = [
        place_of(destination, artifact, each)
        for destination in plan.destinations.get(artifact.format, ())
        if artifact.upload and (destination.formats is None or artifact.format in destination.formats)
        for each in (artifact.path, path)
    ]
    return [
        f"filename: {artifact.path.name}",
        f"ident: {plan.ident}",
        f"date: {plan.date.isoformat()}",
        f"size: {artifact.path.stat().st_size}",
        f"md5sum: {files.digest_of(artifact.path, 'md5')}",
        *(f"upload: {place}" for place in dict.fromkeys(places)),
    ]


def places(plan: Plan) -> list[str]:
    """Return where the artifacts of *plan* are uploaded to."""
    return [
        place_of(destination, artifact, artifact.path)
        for artifact in planned(plan, plan.output_dir)
        for destination in plan.destinations.get(artifact.format, ())
    ]


def named(plan: Plan, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return *artifacts* with the name of what will be written, for --dry-run."""
    return _with(artifacts, (plan.text_name, "")) if plan.settings.manifest_text else [*artifacts]
