"""Measure six builds that two users start at the same moment against the same builds one after another.

make bench runs it; pytest does not collect it by itself.
"""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ..conftest import User
from ..integration.test_build import Build, new_build
from ..integration.test_fleet import TODAY, configure, machine_names, started

pytestmark = pytest.mark.usefixtures("machine")

IMAGES = ("one", "two", "three")


@pytest.fixture
def builds(request: pytest.FixtureRequest, users: dict[str, User], stand_in: Path) -> Iterator[list[Build]]:
    first = new_build(users["a"], request, stand_in)
    second = new_build(users["b"], request, stand_in)
    yield [next(first), next(second)]
    for made in (first, second):
        assert next(made, None) is None


def measured(builds: list[Build], directory: str, *, at_once: bool) -> float:
    """Build all images of all users into a new *directory* of each; return the seconds that it took."""
    start = time.monotonic()
    said = []
    with ExitStack() as stack:
        processes = []
        for build in builds:
            for image in IMAGES:
                processes.append(stack.enter_context(started(build, image, "--output-dir", directory)))
                if not at_once:
                    said.append(processes[-1].communicate(timeout=600)[0])
        if at_once:
            said = [process.communicate(timeout=1200)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    seconds = time.monotonic() - start
    # None has disturbed another.
    assert len(set.union(*map(machine_names, said))) == len(said)
    for build in builds:
        for image in IMAGES:
            assert (build.directory / directory / f"{image}-{TODAY}.qcow2").is_file()
            console = (build.directory / directory / f"{image}-{TODAY}.console.log").read_text()
            assert console.count("stand-in: started on Linux ") == 1
    return seconds


def test_six_builds_at_once(builds: list[Build]) -> None:
    for build in builds:
        configure(build, extra="vnc = localhost\nmax-parallel = auto", **dict.fromkeys(IMAGES, ""))
    one_after_another = measured(builds, "apart", at_once=False)
    at_once = measured(builds, "at-once", at_once=True)
    print(
        f"\n{len(builds) * len(IMAGES)} builds of {len(builds)} users on {os.cpu_count()} processors: "
        f"{one_after_another:.0f} s one after another, {at_once:.0f} s at once, ratio {at_once / one_after_another:.2f}"
    )
    assert at_once < one_after_another
