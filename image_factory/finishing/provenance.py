"""The statement of how a build was made, in the forms of in-toto (Statement v1) and SLSA (Provenance v1)."""

import dataclasses
import json
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from .. import __version__
from ..base import files
from ..model import PROVENANCE_SUFFIX, Artifact, Build, Plan
from ..parts import State, Step
from ..told import record
from ..told.witness import Input, Witness

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
_BUILD_TYPE = "urn:image-factory:build:v1"
_BUILDER = "urn:image-factory"


def steps(build: Build) -> Iterator[Step]:
    """Give the step that writes the statement, if it is wanted."""

    def run(state: State) -> State:
        assert isinstance(state.witness, Witness)
        return dataclasses.replace(state, artifacts=tuple(add_statement(state.build, state.artifacts, state.witness)))

    if build.plan.settings.provenance:
        yield Step("Writing the provenance", run)


def add_statement(build: Build, artifacts: Sequence[Artifact], witness: Witness) -> list[Artifact]:
    """Write what *witness* has seen of how *artifacts* were made, and return these with the file."""
    path = build.directory / f"{build.plan.base_name}{PROVENANCE_SUFFIX}"
    # In ASCII no control character reaches a terminal.
    path.write_text(json.dumps(record.shown(statement(build, artifacts, witness)), indent=2) + "\n", encoding="ascii")
    return _with(artifacts, (path.name, files.digest_of(path)))


def named(plan: Plan, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return *artifacts* with the name of what add_statement will write, for --dry-run."""
    return _with(artifacts, (f"{plan.base_name}{PROVENANCE_SUFFIX}", "")) if plan.settings.provenance else [*artifacts]


def _with(artifacts: Sequence[Artifact], written: tuple[str, str]) -> list[Artifact]:
    return [dataclasses.replace(found, companions=(*found.companions, written)) for found in artifacts]


def statement(build: Build, artifacts: Sequence[Artifact], witness: Witness) -> dict[str, Any]:
    """Return the statement of *artifacts*, with secrets that ``record.shown`` masks."""
    plan = build.plan
    beside = dict.fromkeys(pair for artifact in artifacts for pair in artifact.companions)
    return {
        "_type": STATEMENT,
        "subject": [_described(artifact.path.name, artifact.sha256) for artifact in artifacts],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {
                    "image": plan.image,
                    "settings": record.public(record.settings_of(plan)),
                },
                "internalParameters": {
                    "resumed": build.resumed,
                    "virtType": build.virt_type,
                    # The last one writes this.
                    "steps": [dataclasses.asdict(step) for step in witness.steps[:-1]],
                },
                "resolvedDependencies": [_dependency(used) for used in witness.inputs()],
            },
            "runDetails": {
                "builder": {"id": _BUILDER, "version": {"image-factory": __version__}},
                "metadata": {
                    "invocationId": f"urn:uuid:{uuid.uuid4()}",
                    "startedOn": witness.started,
                    "finishedOn": record.iso(datetime.now(UTC)),
                },
                "byproducts": [_described(name, digest) for name, digest in beside],
            },
        },
    }


def _described(name: str, sha256: str | None) -> dict[str, Any]:
    """Return a resource descriptor, as in-toto calls it."""
    return {"name": name, "digest": {"sha256": sha256}}


def _dependency(used: Input) -> dict[str, Any]:
    digest = {"digest": {"sha256": used.sha256}} if used.sha256 else {}
    vouched = {"annotations": {"verifiedBy": used.verified_by}} if used.verified_by else {}
    return {"name": used.key, "uri": _uri(used.origin), **digest, **vouched}


def _uri(origin: str) -> str:
    return origin if "://" in origin else f"file:{origin}"
