"""Boot the finished image on throw-away overlays, and have it report from inside whether it came up well.

QEMU is started directly and not by libvirt: the kernel kills it when image-factory ends, however that ends,
and there is no machine to undefine.  All files are in the working directory.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial

from ...base import command, events, files
from ...base.errors import BuildError, ConfigurationError
from ...base.events import BootCheck, BootTested
from ...base.log import logger
from ...configuration.settings import ImageSettings
from ...machines import arch
from ...model import Artifact, Build, Plan
from ...outputs import planned
from ...parts import State, Step, doing
from ...told import junit
from .guest import Guest, PortTakenError
from .login import LOGIN, RUN_SCRIPT, login_checks, ssh_argv
from .machine import (
    HOST,
    Machine,
    firmware_for,
    free_port,
    key_argv,
    other_mac,
    overlay_argv,
    pipes,
    prepared,
    qemu_argv,
    seed_argv,
    time_limit,
)
from .report import Message, Subject, checks_of, identity_checks, judged

# Two boots show that each one gets an identity of its own.
_BOOTS = 2
_PORT_TRIES = 5
_SHOWN_LINES = 40


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it can be known now that the image of *plan* can't be booted here."""
    settings = plan.settings
    script = settings.test_script
    if not settings.test_boot:
        if script:
            logger.warning("[%s] test-script is not run without 'test-boot = yes'.", plan.image)
        return
    if script and not (script.is_file() and os.access(script, os.R_OK)):
        raise ConfigurationError(f"[{plan.image}] test-script: {script} is not a file that can be read.")
    if settings.arch not in arch.BOOTABLE:
        raise ConfigurationError(f"[{plan.image}] test-boot: nothing boots {settings.arch} here.", hint="Set it to no.")
    if "uefi" in firmwares(settings):
        firmware_for(settings.arch)


def programs(plan: Plan) -> list[str]:
    """Return the programs that the test boot of *plan* needs."""
    if not plan.settings.test_boot:
        return []
    return [arch.ARCHITECTURES[plan.settings.arch].qemu, "qemu-img", "ssh", "ssh-keygen", "xorriso"]


def firmwares(settings: ImageSettings) -> tuple[str, ...]:
    """Return what the image claims to boot with."""
    return ("bios", "uefi") if settings.firmware == "hybrid" else (settings.firmware,)


def boots(settings: ImageSettings, artifacts: Sequence[Artifact]) -> list[tuple[Artifact, str]]:
    """Return which artifact is booted with which firmware: each of both at least once, and two boots at least."""
    names = firmwares(settings)
    count = max(_BOOTS, len(names), len(artifacts))
    return [(artifacts[number % len(artifacts)], names[number % len(names)]) for number in range(count)]


def steps(build: Build) -> Iterator[Step]:
    """Give the steps of the test boot, if it is wanted."""
    settings = build.plan.settings
    if not settings.test_boot:
        return
    test = _TestBoot()
    for number, (artifact, firmware) in enumerate(boots(settings, planned(build.plan, build.directory)), 1):
        machine = Machine(build, artifact, firmware, build.virt_type, number)
        commands = [
            overlay_argv(machine),
            key_argv(machine),
            seed_argv(machine),
            qemu_argv(machine, "02:XX:XX:XX:XX:XX", "PORT"),
            ssh_argv(machine, "PORT", LOGIN),
        ]
        if settings.test_script:
            commands.append(ssh_argv(machine, "PORT", RUN_SCRIPT))
        boot = doing(partial(test.boot, number, firmware))
        yield Step(f"Booting {artifact.path.name} with {firmware}", boot, commands)


class _TestBoot:
    """The boots of a build's artifacts: their results are told to observers, and written beside the artifacts."""

    def __init__(self) -> None:
        self._done: list[BootTested] = []
        self._reports: list[Message] = []

    def boot(self, number: int, firmware: str, state: State) -> None:
        """Boot an artifact for the *number*-th time; BuildError says what is wrong with it."""
        build = state.build
        artifact, _ = boots(build.plan.settings, state.artifacts)[number - 1]
        start = time.monotonic()
        checks, report, lines = _boot(Machine(build, artifact, firmware, build.virt_type, number), self._reports)
        checks.append(judged("unchanged", _why_changed(artifact)))
        self._done.append(BootTested(artifact.path.name, firmware, time.monotonic() - start, tuple(checks)))
        events.tell(self._done[-1])
        _write_results(build, self._done, lines)
        _log(checks)
        problems = [check.message for check in checks if check.outcome == "failed"]
        if problems:
            _explain(report, lines)
            raise BuildError(
                f"{artifact.path.name} failed its test boot with {firmware}: {'; '.join(problems)}.",
                hint=f"All results are in {build.plan.junit_path}.",
            )
        if report:
            self._reports.append(report)


def _boot(machine: Machine, earlier: Sequence[Message]) -> tuple[list[BootCheck], Message | None, list[str]]:
    """Boot *machine*; return the checks, what it reported, and what it printed."""
    with prepared(machine):
        for _ in range(_PORT_TRIES):
            port = free_port()
            argv = qemu_argv(machine, other_mac(), port)
            with (
                pipes(machine) as (console, report),
                command.background(argv, machine.directory / "qemu.log") as ended,
                contextlib.suppress(PortTakenError),
            ):
                found = Guest(machine, ended, console, report)
                return [*_checks(machine, found, port, earlier)], found.message, [*found.lines]
    raise BuildError(f"No port of {HOST} could be had for the machine.", hint="Try again.")


def _checks(machine: Machine, found: Guest, port: int, earlier: Sequence[Message]) -> Iterator[BootCheck]:
    problem = found.wait_for_report(time_limit(machine.build.plan.settings, machine.virt_type))
    yield judged("boot", problem)
    message = found.message
    if problem or message is None:
        return
    subject = Subject(machine.artifact.virtual_size, machine.larger_size, machine.errors_allowed)
    checks = checks_of(message, subject)
    yield from checks
    yield from identity_checks(message, earlier)
    yield from login_checks(machine, found, port, message, checks)


def _why_changed(artifact: Artifact) -> str:
    return "" if files.digest_of(artifact.path) == artifact.sha256 else "its file is not the one that was made"


def _write_results(build: Build, done: Sequence[BootTested], lines: Sequence[str]) -> None:
    plan = build.plan
    document = junit.document(plan.image, done, "\n".join(lines))
    try:
        files.replace(plan.junit_path, document, directory=build.directory)
    except OSError as error:
        if error.errno != errno.EISDIR:
            raise
        raise BuildError(f"The results of the test boot can't be written: {plan.junit_path} is a directory.") from error


def _log(checks: Sequence[BootCheck]) -> None:
    for found in checks:
        logger.info("Check %s: %s%s", found.name, found.outcome, f": {found.message}" if found.message else "")


def _explain(report: Message | None, lines: Sequence[str]) -> None:
    if report:
        for line in report.lines("kernel")[:_SHOWN_LINES]:
            logger.error("error of the guest's kernel: %s", line)
        for line in report.lines("journal")[-_SHOWN_LINES:]:
            logger.error("guest's journal: %s", line)
    for line in list(lines)[-_SHOWN_LINES:]:
        logger.error("console: %s", line)
