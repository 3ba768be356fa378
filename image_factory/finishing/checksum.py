"""SHA-256 of an artifact, in the form that sha256sum reads."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

from ..base import events, files
from ..base.log import logger
from ..model import Artifact, Build
from ..parts import State, Step


def steps(build: Build, formats: Sequence[str]) -> Iterator[Step]:
    """Give the steps that checksum the artifacts in *formats*."""
    for number, name in enumerate(formats):
        yield Step(f"Checksumming {build.plan.file_name(name)}", partial(_add, number))


def _add(number: int, state: State) -> State:
    artifacts = [*state.artifacts]
    artifacts[number] = add_sha256(artifacts[number])
    return dataclasses.replace(state, artifacts=tuple(artifacts))


def add_sha256(artifact: Artifact) -> Artifact:
    """Write the checksum beside *artifact*, and return it with the checksum."""
    digest = files.digest_of(artifact.path, meter=events.Meter())
    artifact.checksum_path.write_text(f"{digest}  {artifact.path.name}\n", encoding="utf-8")
    logger.info("SHA-256 of %s: %s", artifact.path.name, digest)
    return dataclasses.replace(artifact, sha256=digest)
