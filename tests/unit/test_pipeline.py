"""The table of a build's stages, and what is left of it for a build that goes on, or stops."""

import dataclasses
from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.checkpoint import Checkpoint, Reached
from image_factory.model import Build
from image_factory.parts import Group, State, Step, Steps, carry_out, doing, show

from ..conftest import state_of
from .test_estimates import make_plan

NAMES = ["install", "elements", "tasks", "clean", "convert", "check", "publish", "upload", "notify"]


def test_a_checkpoint_knows_the_stages_that_are_reached() -> None:
    assert [stage.name for stage in pipeline.STAGES] == NAMES
    assert [stage.reached for stage in pipeline.STAGES if stage.reached] == [*Reached]
    assert [*pipeline.UNTIL] == NAMES[:-1]


@pytest.mark.parametrize(
    ("reached", "until", "first", "last"),
    [
        (None, None, 0, 9),
        (None, "install", 0, 1),
        (None, "check", 0, 6),
        ("installed", None, 1, 9),
        ("installed", "clean", 1, 4),
        ("applied", "tasks", 2, 3),
        ("tasked", "tasks", 3, 3),
        ("cleaned", "clean", 4, 4),
        # What is published has been proved in the same build.
        ("converted", "publish", 5, 7),
        ("published", None, 7, 9),
        ("published", "convert", 7, 7),
    ],
)
def test_stages_that_are_left(tmp_path: Path, reached: str | None, until: str | None, first: int, last: int) -> None:
    done = Checkpoint(tmp_path, {}, {}, "", "", [], "", stage=Reached(reached)) if reached else None
    assert [stage.name for stage in pipeline._left(done, until)] == NAMES[first:last]


def test_steps_are_carried_out_and_shown_alike(tmp_path: Path) -> None:
    done: list[str] = []

    def step(name: str, *, when: bool = True) -> Step:
        return Step(name, doing(lambda state: done.append(name)), [[name]], when=lambda state: when)

    def both(state: State, steps: Steps) -> State:
        done.append("begin")
        return dataclasses.replace(carry_out(state, steps), cleans=False)

    steps = [step("a"), Group([step("b"), step("c", when=False)], both), step("d")]
    state = state_of(Build(make_plan(tmp_path), tmp_path, "vm"))
    assert carry_out(state, steps) == dataclasses.replace(state, cleans=False)
    assert done == ["a", "begin", "b", "d"]
    # What only some builds do is shown too.
    assert [(name, *commands) for name, commands in show(state, steps)] == [
        ("a", ["a"]), ("b", ["b"]), ("c", ["c"]), ("d", ["d"]),
    ]  # fmt: skip
