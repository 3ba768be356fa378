"""The tests that elements have themselves: --test-element builds them."""

import os
import sys
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, run
from .test_elements_disk import LAYOUT
from .test_elements_run import Place, script
from .test_elements_run import place as place
from .test_elements_run import system as system

# What is said of all images, and not to be done with these.
CONFIGURATION = """\
[DEFAULT]
elements-path = {place}/elements
cache-dir = {place}/cache
mount-via = loop
DIB_NOTE = of all images
format = qcow2
tasks = ./work.sh
upload-destinations = nowhere
post-build-command = touch {place}/was-run
"""


@pytest.fixture
def tests(place: Place) -> Path:
    """Return the directory of the tests of the element work."""
    place.element("work", install='[ "$DIB_NOTE" = "of all images" ]')
    directory = place.path / "elements/work/test-elements"
    kinds = {
        "does-well": '[ -d /proc/self ] && [ -n "$IMAGE_ELEMENT" ]',
        "fails": "echo it does not work; exit 4",
        "fails-well": "touch /tmp/dib-test-should-fail; exit 1",
        "of-a-ramdisk": "exit 1",
    }
    for name, text in kinds.items():
        script(directory / name / "post-install.d/50-test", text)
        (directory / name / "element-deps").write_text("system\n", encoding="utf-8")
    (directory / "of-a-ramdisk/element-type").write_text("ramdisk\n", encoding="utf-8")
    (place.path / "conf").write_text(CONFIGURATION.format(place=place.path), encoding="utf-8")
    return directory


def outcome(place: Place, *words: str, status: int) -> tuple[str, str]:
    argv = [sys.executable, REPOSITORY / "image-factory", "--test-element", *words]
    done = run(*argv, env=place.environment, cwd=place.path, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_tests_of_an_element(place: Place, tests: Path) -> None:
    before = sorted(os.listdir(place.path)), sorted(os.listdir(place.out))
    said, log = outcome(place, "work", status=1)
    assert said == (
        "passed  work/does-well\n"
        "failed  work/fails: post-install.d/50-test of the element fails failed with status 4: it does not work\n"
        "passed  work/fails-well\n"
        "not run work/of-a-ramdisk: it makes no disk, but a ramdisk\n"
    )
    assert log.endswith("image-factory: error: 1 of 4 tests of work failed.\n")
    assert (sorted({*os.listdir(place.path)} - {"cache"}), sorted(os.listdir(place.out))) == before
    said, _ = outcome(place, "work/fails-well", status=0)
    assert said == "passed  work/fails-well\n"


def test_a_test_that_can_not_be_built(place: Place, tests: Path) -> None:
    (tests / "does-well/element-deps").write_text("sistem\n", encoding="utf-8")
    said, _ = outcome(place, "work/does-well", status=1)
    assert said == "failed  work/does-well: There is no element 'sistem' (needed by does-well).\n"


def test_a_test_that_lays_out_the_disk(place: Place, tests: Path) -> None:
    directory = tests / "on-disk"
    script(directory / "cleanup.d/50-test", '[ -b "$IMAGE_BLOCK_DEVICE" ]')
    (directory / "element-deps").write_text("system\n", encoding="utf-8")
    (directory / "block-device-default.yaml").write_text(LAYOUT, encoding="utf-8")
    said, _ = outcome(place, "work/on-disk", status=0)
    assert said == "passed  work/on-disk\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["wrok"], "There is no element 'wrok' (to be tested)."),
        (["system"], "The element system has no tests."),
        (["work/gone"], "The element work has no test 'gone'."),
        (["work", "x"], "--test-element is for elements, not for images."),
        (["work", "--json", "-"], "--json is the record of a build, --test-element makes none."),
    ],
)
def test_what_is_refused(place: Place, tests: Path, words: list[str], message: str) -> None:
    assert message in outcome(place, *words, status=2)[1]
