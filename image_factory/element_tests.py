"""Runs the tests that an element has: each is an element of its own directory of them, built together with it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import pipeline
from .base import scratch
from .base.errors import BuildError, ConfigurationError
from .configuration.files import FILE_VARIABLE, Configuration, declared
from .configuration.settings import ImageSettings, TaskSettings, UploadSettings
from .elements import applying, resolve
from .elements import layout as laying
from .elements.engine import ExpectedError
from .inside import namespaces
from .model import Plan

_TESTS, _TYPE, _DISK = "test-elements", "element-type", "disk"
_PREFIX = "image-factory-element-test."
# Of the settings that all images have, a test has these.
_TAKEN = (
    "cache-dir", "offline", "mount-via", "work-in-memory", "element-environment", "element-timeout", "arch",
    "filesystem", "image-size",
)  # fmt: skip


@dataclass(frozen=True)
class ElementTest:
    """A test of *element*: an element itself, which lies at *path*."""

    element: str
    path: Path

    @property
    def name(self) -> str:
        """The name of the test: that of its element, a slash, its own."""
        return f"{self.element}/{self.path.name}"

    @property
    def kind(self) -> str:
        """The kind of image that it makes."""
        path = self.path / _TYPE
        return path.read_text(encoding="utf-8").strip() if path.is_file() else _DISK


def tests_of(configuration: Configuration, wanted: str) -> list[ElementTest]:
    """Return the tests of the element *wanted*, or the one behind a slash; ConfigurationError if there is none."""
    element, slash, name = wanted.partition("/")
    known = resolve.find(_search_path(configuration))
    directory = resolve.known_as(element, known, "to be tested").path / _TESTS
    paths = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    found = [ElementTest(element, path) for path in paths if not slash or path.name == name]
    if not found:
        raise ConfigurationError(
            f"The element {element} has no test {name!r}." if slash else f"The element {element} has no tests.",
            hint=f"It has {', '.join(path.name for path in paths)}."
            if paths
            else f"A test is an element in its directory {_TESTS}.",
        )
    return found


def _search_path(configuration: Configuration) -> list[Path]:
    own = configuration.setting(configuration.default_section, "elements-path")
    return resolve.search_path(own, os.environ)


def _text(configuration: Configuration, test: ElementTest, directory: Path) -> str:
    """Return the configuration by which *test* is built in *directory*: what all images have, as far as it is for one.

    Nothing of it is published, uploaded or given to a command.
    """
    settings = {key for kind in (ImageSettings, UploadSettings, TaskSettings) for key, _ in declared(kind)}
    kept = {key: text for key, text in configuration.defaults.items() if key in _TAKEN or key not in settings}
    keys = {
        "image-size": "fit",
        **kept,
        "source": "elements",
        "elements": f"{test.element} {test.path.name}",
        "elements-path": _raw(":".join(map(str, [test.path.parent, *_search_path(configuration)]))),
        "skip-base": "yes",
        "format": "raw",
        "output-dir": _raw(str(directory)),
    }
    if keys["image-size"] == "fit":
        keys["extra-size"] = "256M"
    del keys["data-dir"]
    lines = ("{} = {}\n".format(key, text.replace("\n", "\n    ")) for key, text in keys.items())
    return f"[{test.path.name}]\n{''.join(lines)}"


def _raw(text: str) -> str:
    return text.replace("$", "$$")


def _plan(configuration: Configuration, test: ElementTest, flags: Mapping[str, str], directory: Path) -> Plan:
    """Return the plan to build *test* in *directory*: to one filesystem, unless its elements lay out the disk."""
    path = directory / "image-factory.conf"
    text = _text(configuration, test, directory)
    for layout in ("", "layout = filesystem\n"):
        path.write_text(f"{text}{layout}", encoding="utf-8")
        plan = pipeline.make_plan(Configuration({FILE_VARIABLE: str(path)}), test.path.name, flags)
        if laying.source(applying.of_plan(plan)):
            break
    return plan


def _build(plan: Plan) -> None:
    """Build the test of *plan*; BuildError if it fails, and was not to."""
    try:
        pipeline.build_image(pipeline.check_plan(plan))
    except ExpectedError:
        return


def run(configuration: Configuration, wanted: str, flags: Mapping[str, str], tell: Callable[[str], None]) -> None:
    """Run the tests of the element *wanted*, one after the other, and *tell* what comes of each.

    BuildError when all are run, if one has failed.
    """
    tests = tests_of(configuration, wanted)
    failed = 0
    for test in tests:
        if test.kind != _DISK:
            tell(f"not run {test.name}: it makes no disk, but a {test.kind}")
            continue
        try:
            with scratch.directory(_PREFIX, namespaces.remove, large=True) as directory:
                _build(_plan(configuration, test, flags, directory))
            tell(f"passed  {test.name}")
        except (BuildError, ConfigurationError) as error:
            failed += 1
            tell(f"failed  {test.name}: {error.message}")
    if failed:
        raise BuildError(f"{failed} of {len(tests)} tests of {wanted} failed.")
