"""Measure images of elements against diskimage-builder, which the Makefile gets from PyPI.

make bench runs it; pytest does not collect it by itself.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator
from statistics import median

import pytest

from image_factory.elements import hooks

from ..conftest import User, run
from .bench_bootstrap import BUILDER, BUILDER_VARIABLES, REPEATS

GOAL_TIMES_OF_BUILDER = 0.6
GOAL_ENGINE_SECONDS = 1.5
GOAL_TIMES_OF_ROOT = 1.15

CONFIGURATION = """\
[ours]
source = elements
elements = {elements}
elements-path = {place}/elements
skip-base = yes
layout = filesystem
format = tar
image-size = 3G
cache-dir = {place}/cache
output-dir = {place}/out
replace = yes
"""
# The smallest system that diskimage-builder makes a tar of: no script runs in it.
SMALLEST = """\
#!/bin/bash
set -eu
for name in bin dev etc mnt proc root sys tmp var/log; do sudo mkdir -p "$TARGET_ROOT/$name"; done
sudo dd if=/dev/zero of="$TARGET_ROOT/data" bs=1M count=42 status=none
"""


class Place:
    """A directory in which *user* makes tars of elements, by image-factory and by diskimage-builder."""

    def __init__(self, user: User) -> None:
        self.user, self.path = user, user.directory("bench")
        self._write("elements/smallest/root.d/10-smallest", SMALLEST)
        self._write("elements/smallest/element-provides", "operating-system\n")
        run("chown", "--recursive", user.name, self.path)

    def _write(self, name: str, text: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def ours(self, elements: str) -> tuple[float, str]:
        """Return the seconds of image-factory, and what it has said."""
        keys = "".join(f"{name} = {value}\n" for name, value in BUILDER_VARIABLES.items())
        text = CONFIGURATION.format(elements=elements, place=self.path) + keys
        self._write("conf", text)
        path = os.pathsep.join([str(BUILDER), os.environ["PATH"]])
        words = self.user.argv(self.user.program, "ours", PATH=path, IMAGE_FACTORY_CONFIG=str(self.path / "conf"))
        start = time.monotonic()
        done = run(*words, cwd=self.path)
        return time.monotonic() - start, done.stdout + done.stderr

    def theirs(self, elements: str) -> float:
        """Return the seconds of diskimage-builder."""
        variables = {
            "PATH": os.pathsep.join([str(BUILDER), os.environ["PATH"]]),
            "HOME": str(self.path),
            "TMPDIR": str(self.path),
            "ELEMENTS_PATH": str(self.path / "elements"),
            **BUILDER_VARIABLES,
        }
        argv = [str(BUILDER / "disk-image-create"), "-n", "-t", "tar", "-o", "theirs", *elements.split()]
        start = time.monotonic()
        run(*argv, cwd=self.path, env=variables)
        return time.monotonic() - start


@pytest.fixture
def places(users: dict[str, User]) -> Iterator[dict[str, Place]]:
    made = {name: Place(users[name]) for name in ("root", "c")}
    yield made
    for place in made.values():
        shutil.rmtree(place.path)


def engine_seconds(said: str) -> float:
    """Return the seconds of the steps that elements are run in."""
    names = "|".join(["Merging elements", *(f"Running {re.escape(phase.directory)}" for phase in hooks.PHASES)])
    found = re.findall(rf"INFO: (?:{names}): done in ([0-9.]+) s$", said, re.MULTILINE)
    assert len(found) == 1 + len(hooks.PHASES), said
    return sum(map(float, found))


def test_engine_alone(places: dict[str, Place]) -> None:
    """What the smallest system costs is what the engine itself does, and the format."""
    rows = []
    for name, place in places.items():
        runs = [place.ours("smallest") for _ in range(REPEATS)]
        whole, engine = median(seconds for seconds, _ in runs), median(engine_seconds(said) for _, said in runs)
        rows.append((engine, f"smallest system to tar, {name}: {whole:.1f} s, of which the engine {engine:.2f} s"))
    theirs = median(places["root"].theirs("smallest") for _ in range(REPEATS))
    print()
    for _, row in rows:
        print(f"{row}, goal {GOAL_ENGINE_SECONDS}; diskimage-builder: {theirs:.1f} s in all")
    assert max(engine for engine, _ in rows) <= GOAL_ENGINE_SECONDS


def test_debian_minimal(places: dict[str, Place]) -> None:
    """All caches are warm after the first run of each; one more is enough, as it takes minutes."""
    elements = "debian-minimal"
    root, user = places["root"], places["c"]
    for warm in (root.ours, user.ours, root.theirs):
        warm(elements)
    ours, _ = root.ours(elements)
    theirs = root.theirs(elements)
    users, _ = user.ours(elements)
    print(
        f"\ndebian-minimal to tar: {ours:.0f} s; diskimage-builder: {theirs:.0f} s; "
        f"{ours / theirs:.2f} times, goal {GOAL_TIMES_OF_BUILDER}\n"
        f"as an ordinary user: {users:.0f} s; {users / ours:.2f} times, goal {GOAL_TIMES_OF_ROOT}"
    )
    assert ours <= theirs * GOAL_TIMES_OF_BUILDER
    assert users <= ours * GOAL_TIMES_OF_ROOT
