"""What a disk is turned into: each format is a module with the functions of ``Output``."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

from ..model import Artifact, Build, Disk, Origin, Plan
from ..parts import State, Step
from . import qcow2, raw


class Output(Protocol):
    """A format of artifacts; *STEP* is the name of the step that writes it.

    *MADE_FROM* is ``disk`` where it is written from the closed disk, ``tree`` where from the mounted system.
    """

    STEP: str
    MADE_FROM: Origin

    def commands(self, build: Build) -> list[list[str]]:
        """Return the commands it will run."""

    def write(self, build: Build, disk: Disk) -> Artifact:
        """Make the artifact in the working directory; BuildError if that fails."""


OUTPUTS: dict[str, Output] = {"raw": raw, "qcow2": qcow2}


def formats(plan: Plan) -> list[str]:
    """Return the formats of the artifacts of *plan* in their order: raw too if it is to be kept."""
    wanted = plan.settings.format
    return [*wanted, *(["raw"] if plan.settings.keep_raw and "raw" not in wanted else [])]


def planned(plan: Plan, directory: Path) -> list[Artifact]:
    """Return the artifacts that *plan* will have in *directory*, of 0 bytes where the size is not known."""
    settings = plan.settings
    return [
        Artifact(directory / plan.file_name(name), name, settings.image_size or 0, name in settings.format)
        for name in formats(plan)
    ]


def steps(build: Build) -> Iterator[Step]:
    """Give the steps that write the artifacts."""
    # The raw image is the disk itself, and none can be written after it.
    for name in sorted(formats(build.plan), key="raw".__eq__):
        yield Step(OUTPUTS[name].STEP, partial(_write, name), OUTPUTS[name].commands(build))


def _write(name: str, state: State) -> State:
    plan = state.build.plan
    artifact = OUTPUTS[name].write(state.build, state.disk)
    written = [*state.artifacts, dataclasses.replace(artifact, upload=name in plan.settings.format)]
    order = formats(plan)
    return dataclasses.replace(state, artifacts=tuple(sorted(written, key=lambda one: order.index(one.format))))
