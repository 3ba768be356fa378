"""Places to build in; the table of the faults, shown at the end of the tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

from ..conftest import User
from .test_build import WORK, Build, new_build
from .test_faults import TABLE, shown_table


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    if not TABLE:
        return
    terminalreporter.section("faults")
    terminalreporter.write(shown_table())
    if target := os.environ.get("FAULT_TABLE"):
        Path(target).write_text(shown_table())


@pytest.fixture(scope="session")
def installed_disk(users: dict[str, User], stand_in: Path) -> Path:
    """What a build of user a's with no settings of its own has left that stopped after the installation."""
    build = Build(users["a"], users["a"].directory("installed-disk"), stand_in)
    build.configure()
    build.run("--until", "install")
    return build.directory / WORK


@pytest.fixture(params=["root", "a"])
def build(request: pytest.FixtureRequest, users: dict[str, User], stand_in: Path) -> Iterator[Build]:
    yield from new_build(users[request.param], request, stand_in)


@pytest.fixture
def user_build(request: pytest.FixtureRequest, users: dict[str, User], stand_in: Path) -> Iterator[Build]:
    yield from new_build(users["a"], request, stand_in)


@pytest.fixture
def root_build(request: pytest.FixtureRequest, users: dict[str, User], stand_in: Path) -> Iterator[Build]:
    yield from new_build(users["root"], request, stand_in)


@pytest.fixture
def rootless_build(request: pytest.FixtureRequest, users: dict[str, User], stand_in: Path) -> Iterator[Build]:
    """As the user who has no sudo rule."""
    yield from new_build(users["c"], request, stand_in)


@pytest.fixture(scope="session", autouse=True)
def machine_without_useless_kvm(no_useless_kvm: None) -> None:
    """What is chosen for a machine is the same wherever the tests run."""
