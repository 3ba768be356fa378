"""Checksums of an artifact, in the form that sha256sum and its like read."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

from ..base import events, files
from ..base.log import logger
from ..configuration.settings import MORE_CHECKSUMS
from ..model import Artifact, Build, Plan
from ..outputs import file_name, formats
from ..parts import State, Step


def suffix_of(algorithm: str) -> str:
    """Return what the name of a file with checksums by *algorithm* ends with."""
    return f".{algorithm}sum"


def steps(build: Build) -> Iterator[Step]:
    """Give the steps that checksum the artifacts."""
    for number, name in enumerate(formats(build.plan)):
        yield Step(f"Checksumming {file_name(build.plan, name)}", partial(_add, number))


def _add(number: int, state: State) -> State:
    artifacts = [*state.artifacts]
    artifacts[number] = add_more(add_sha256(artifacts[number]), _more(state.build.plan))
    return dataclasses.replace(state, artifacts=tuple(artifacts))


def _more(plan: Plan) -> list[str]:
    return [name for name in MORE_CHECKSUMS if name in plan.settings.checksums]


def add_sha256(artifact: Artifact) -> Artifact:
    """Write the checksum beside *artifact*, and return it with the checksum."""
    digest = files.digest_of(artifact.path, meter=events.Meter())
    artifact.checksum_path.write_text(f"{digest}  {artifact.path.name}\n", encoding="utf-8")
    logger.info("SHA-256 of %s: %s", artifact.path.name, digest)
    return dataclasses.replace(artifact, sha256=digest)


def add_more(artifact: Artifact, algorithms: Sequence[str]) -> Artifact:
    """Write the checksums by *algorithms* beside *artifact*, and return it with these files."""
    written = []
    for name in algorithms:
        digest = files.digest_of(artifact.path, name, events.Meter())
        path = artifact.path.with_name(artifact.path.name + suffix_of(name))
        path.write_text(f"{digest}  {artifact.path.name}\n", encoding="utf-8")
        written.append((path.name, files.digest_of(path)))
    return dataclasses.replace(artifact, companions=(*artifact.companions, *written))


def named(plan: Plan, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return *artifacts* with the names of what add_more will write, for --dry-run."""
    suffixes = [suffix_of(name) for name in _more(plan)]
    return [
        dataclasses.replace(found, companions=(*found.companions, *((found.path.name + each, "") for each in suffixes)))
        for found in artifacts
    ]
