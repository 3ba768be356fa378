"""Images that are there already, booted: their test boot, and what is booted for the user."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from . import foreign, pipeline, workspace
from .base import command, events
from .base.errors import BuildError, ConfigurationError
from .base.log import printable
from .checks import testboot
from .checks.testboot import laying, session
from .checks.testboot.machine import machine_name
from .configuration.files import Configuration
from .model import Artifact, Build, Disk, Plan
from .parts import State, carry_out

# The settings that a boot takes.  Nothing is mounted, so the way to do that is not to be looked for.
WANTED = {"test-boot": "yes", "mount-via": "guestfs"}


def named(
    name: str, environment: Mapping[str, str], given: Mapping[str, str], flags: Mapping[str, str]
) -> tuple[Plan, Path]:
    """Return the image that is *name*, with the plan for it: a file, or the newest build of a section.

    *environment* names the configuration; *given* and *flags* are texts of settings by key.
    """
    if os.path.isfile(name) or "/" in name:
        return foreign.plan_of("--run", Path(name), WANTED, given, flags), Path(name)
    plan = pipeline.make_plan(Configuration(environment, {name: {**given, **WANTED}}), name, flags)
    return plan, session.newest(plan)


@contextmanager
def opened(plan: Plan, path: Path) -> Iterator[tuple[Build, Artifact]]:
    """Give the image at *path* as what can be booted, and a build for that; ConfigurationError if it can't be."""
    _check(plan)
    with foreign.opened(plan, path) as (build, artifact):
        if artifact.format == foreign.TREE:
            settings = dataclasses.replace(plan.settings, format=(foreign.TREE,))
            plan = dataclasses.replace(plan, settings=settings)
            if reason := laying.why_not(plan, artifact):
                raise ConfigurationError(f"{path} is a tar, and is not laid on a disk: {reason}.")
            _check(plan)
            build = dataclasses.replace(build, plan=plan)
        yield build, artifact


def _check(plan: Plan) -> None:
    command.require(testboot.programs(plan))
    testboot.check(plan)


class _Booted:
    """An observer that keeps what test boots have found."""

    def __init__(self) -> None:
        self.found: list[events.BootTested] = []

    def notice(self, event: events.Event) -> None:
        """Keep it."""
        if isinstance(event, events.BootTested):
            self.found.append(event)


def test_boot(plan: Plan, path: Path, tell: Callable[[str], None]) -> None:
    """Boot the image at *path*, *tell* line by line what was checked, and write it as JUnit.

    BuildError if a check fails.
    """
    pipeline.check_output_dir(plan)
    booted = _Booted()
    try:
        with events.observed(booted), opened(plan, path) as (build, artifact):
            workspace.make_output_dir(plan)
            state = State(build, Disk(build.disk_path), artifacts=(artifact,))
            carry_out(state, [testboot.booting(build, [artifact])])
    except BuildError as error:
        failed = [check.name for boot in booted.found for check in boot.checks if check.outcome == "failed"]
        if "boot" in failed and plan.settings.firmware == "bios":
            error.add_hint("--set firmware=uefi boots it with UEFI.")
        raise
    finally:
        for number, boot in enumerate(booted.found, 1):
            machine = machine_name(boot.firmware, boot.devices)
            tell(f"{boot.artifact}, boot {number} with {machine}, {boot.seconds:.0f} s:")
            for check in boot.checks:
                tell(f"  {check.outcome:<7}  {check.name}{f': {printable(check.message)}' if check.message else ''}")
