"""Boot the finished image on throw-away overlays, and have it report from inside whether it came up well.

QEMU is started directly and not by libvirt: the kernel kills it when image-factory ends, however that ends,
and there is no machine to undefine.  All files are in the working directory.

The next machines run beside the one that is waited for, as many as this machine has processors and memory for.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...base import command, events, files
from ...base.cleanup import released
from ...base.errors import BuildError, ConfigurationError
from ...base.events import BootCheck, BootTested
from ...base.log import logger
from ...base.memory import free_memory
from ...configuration.settings import ImageSettings
from ...inside import namespaces
from ...machines import arch
from ...machines.devices import SECURE_BOOT
from ...model import Artifact, Build, Plan
from ...outputs import OUTPUTS, disk_of, formats, planned
from ...parts import Group, State, Step, Steps, carry_out, doing
from ...system.kernels import Kernel
from ...told import junit
from . import laying, matrix, ramdisk
from .guest import Guest, PortTakenError
from .laying import Laying
from .login import LOGIN, RUN_SCRIPT, login_checks, ssh_argv
from .machine import (
    HOST,
    KERNEL,
    Machine,
    free_port,
    key_argv,
    other_mac,
    pipes,
    prepared,
    processors_of,
    qemu_argv,
    seed_argv,
    source_argvs,
    time_limit,
    tpm_argv,
    tpm_running,
)
from .matrix import firmwares
from .report import Message, Subject, checks_of, identity_checks, judged, skipped

# Two boots show that each one gets an identity of its own.
_BOOTS = 2
PORT_TRIES = 5
_SHOWN_LINES = 40


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it can be known now that the image of *plan* can't be booted here."""
    settings = plan.settings
    script = settings.test_script
    if not settings.test_boot:
        if script:
            logger.warning("[%s] test-script is not run without 'test-boot = yes'.", plan.image)
        return
    if script and not (os.path.isfile(script) and os.access(script, os.R_OK)):
        raise ConfigurationError(f"[{plan.image}] test-script: {script} is not a file that can be read.")
    if settings.arch not in arch.BOOTABLE:
        raise ConfigurationError(f"[{plan.image}] test-boot: nothing boots {settings.arch} here.", hint="Set it to no.")
    matrix.check(plan)
    laying.check(plan)
    for artifact in planned(plan, plan.work_path):
        if reason := laying.why_not(plan, artifact):
            logger.warning("%s is not laid on a disk and booted: %s.", artifact.path.name, reason)


def programs(plan: Plan) -> list[str]:
    """Return the programs that the test boot of *plan* needs."""
    if not plan.settings.test_boot:
        return []
    settings = plan.settings
    booting = [arch.ARCHITECTURES[settings.arch].qemu, "qemu-img", "ssh", "ssh-keygen", "xorriso"]
    of_ramdisks = ramdisk.PROGRAMS if {*ramdisk.FORMATS} & {*formats(plan)} else ()
    return [*booting, *of_ramdisks, *matrix.programs(settings), *laying.programs(plan, firmwares(settings))]


class Boot(NamedTuple):
    """A boot of *artifact* with *firmware*, or its own kernel: of itself, or of a disk that it is laid on before."""

    artifact: Artifact
    firmware: str
    laying: Laying | None = None
    devices: tuple[str, ...] = ()

    @property
    def disk(self) -> Artifact:
        """What the machine boots."""
        return self.laying.disk if self.laying else self.artifact


def boots(
    settings: ImageSettings, artifacts: Sequence[Artifact], least: int = _BOOTS
) -> list[tuple[Artifact, matrix.Hardware]]:
    """Return which artifact is booted with what: each of both at least once, and *least* boots."""
    machines = matrix.hardware(settings)
    count = max(least, len(machines), len(artifacts))
    return [(artifacts[number % len(artifacts)], machines[number % len(machines)]) for number in range(count)]


def boots_of(build: Build, artifacts: Sequence[Artifact]) -> list[Boot]:
    """Return the boots of those of *artifacts* that QEMU reads, that are laid on disks, and that need no disk.

    Where there is none of these, the disk is booted that they were made from.
    """
    settings = build.plan.settings
    disks = [found for found in artifacts if OUTPUTS[found.format].driver]
    tars = laying.laid(build.plan, artifacts)
    ramdisks = [found for found in artifacts if found.format in ramdisk.FORMATS]
    if not disks and not tars and not ramdisks:
        disks = [disk_of(build, artifacts[0].virtual_size)]
    own = boots(settings, disks) if disks else []
    laid = boots(settings, tars, 1 if disks else _BOOTS) if tars else []
    found = [Boot(artifact, firmware, None, devices) for artifact, (firmware, devices) in own]
    found += [
        Boot(artifact, firmware, Laying(build, artifact, matrix.disk_firmware(firmware)), devices)
        for artifact, (firmware, devices) in laid
    ]
    return found + [Boot(artifact, KERNEL) for artifact in ramdisks for _ in range(1 if found else _BOOTS)]


def _machine(build: Build, boot: Boot, number: int) -> Machine:
    return Machine(build, boot.disk, boot.firmware, build.virt_type, number, devices=boot.devices)


def at_once(settings: ImageSettings, virt_type: str) -> int:
    """Return how many machines of the test boot this machine takes at the same time."""
    processors = len(os.sched_getaffinity(0)) // processors_of(settings, virt_type)
    return max(1, min(processors, free_memory() // settings.ram))


def steps(build: Build) -> Iterator[Group]:
    """Give the steps of the test boot, if it is wanted."""
    if build.plan.settings.test_boot:
        yield booting(build, planned(build.plan, build.directory))


def booting(build: Build, artifacts: Sequence[Artifact]) -> Group:
    """Return the steps of a test boot of *artifacts*."""
    settings = build.plan.settings
    made = boots_of(build, artifacts)
    # Nobody knows now how much memory a machine takes that has its system there.
    alone = any(boot.firmware == KERNEL for boot in made)
    machines = [_machine(build, boot, number) for number, boot in enumerate(made, 1)]
    test = _TestBoot(
        1 if alone else at_once(settings, build.virt_type), machines, to_the_end=bool(settings.test_boot_matrix)
    )
    # The next machines start beside the one that is waited for, so all disks are there before the first one.
    shown = [
        Step(laid.name, doing(partial(test.lay, laid)), laid.commands())
        for laid in {boot.laying.directory: boot.laying for boot in made if boot.laying}.values()
    ]
    for number, (boot, machine) in enumerate(zip(made, machines, strict=True), 1):
        commands = [
            argv
            for started in machines[test.started_with(number)]
            for argv in (
                *source_argvs(started),
                key_argv(started),
                seed_argv(started),
                *([tpm_argv("TPM")] if started.has_tpm else []),
                qemu_argv(started, "02:XX:XX:XX:XX:XX", "PORT"),
            )
        ]
        commands.append(ssh_argv(machine, "PORT", LOGIN))
        if settings.test_script:
            commands.append(ssh_argv(machine, "PORT", RUN_SCRIPT))
        booting = doing(partial(test.boot, number))
        shown.append(Step(f"Booting {boot.artifact.path.name} with {machine.name}", booting, commands))
    return Group(shown, test.run)


@dataclass(frozen=True)
class Running:
    """A *guest* whose sshd is at *port*, since *start*; its machine and its files are gone when *stack* is closed."""

    guest: Guest
    port: int
    start: float
    stack: ExitStack


class _TestBoot:
    """The boots of a build's artifacts, *at_once* at the same time.

    Their results are told to observers, and written beside the artifacts, in the order of the boots.  The first one
    that fails is the last, but with *to_the_end* all of *machines* are booted, and BuildError sums up what has failed.
    """

    def __init__(self, at_once: int, machines: Sequence[Machine] = (), *, to_the_end: bool = False) -> None:
        self._at_once = at_once
        self._machines = machines
        self._to_the_end = to_the_end
        self._failed: dict[int, str] = {}
        self._kernels: dict[Path, list[Kernel]] = {}
        self._running: dict[int, Running] = {}
        self._done: list[BootTested] = []
        self._reports: list[Message] = []
        self._laid: list[Laying] = []

    def started_with(self, number: int) -> slice:
        """Return which machines are started when the *number*-th is waited for: all but those that run already."""
        return slice(0 if number == 1 else number + self._at_once - 2, number + self._at_once - 1)

    def run(self, state: State, steps: Steps) -> State:
        """Carry out *steps*, and end the machines that are left."""
        with released(self._end):
            state = carry_out(state, steps)
        if self._failed:
            raise BuildError(
                matrix.summary(self._machines, self._failed),
                hint=f"All results are in {state.build.plan.junit_path}.",
            )
        return state

    def _end(self) -> None:
        while self._running:
            _, running = self._running.popitem()
            running.stack.close()
        while self._laid:
            namespaces.remove(self._laid.pop().directory)

    def lay(self, laid: Laying, state: State) -> None:
        """Lay a tar on a disk; BuildError says what it lacks."""
        start = time.monotonic()
        self._laid.append(laid)
        try:
            laid.carry_out()
        except BuildError as error:
            problem = judged("laid", error.message.rstrip("."))
            self._tell(state, BootTested(laid.artifact.path.name, laid.firmware, time.monotonic() - start, (problem,)))
            raise

    def _tell(self, state: State, tested: BootTested, output: str = "") -> None:
        """Tell what was *tested*, whose guest printed *output*, and write it beside the artifacts."""
        plan = state.build.plan
        self._done.append(tested)
        events.tell(tested)
        left_out = [
            BootTested(found.path.name, plan.settings.firmware, 0.0, (skipped("laid", reason),))
            for found in state.artifacts
            if (reason := laying.why_not(plan, found))
        ]
        junit.write(plan, state.build.directory, [*self._done, *left_out], output, state.tasks)

    def boot(self, number: int, state: State) -> None:
        """Boot an artifact for the *number*-th time; BuildError says what is wrong with it."""
        build = state.build
        made = boots_of(build, state.artifacts)
        machines = [_machine(build, boot, each) for each, boot in enumerate(made, 1)]
        for machine in machines[self.started_with(number)]:
            self._running[machine.number] = started(machine)
        machine, artifact = machines[number - 1], made[number - 1].artifact
        checks, guest, seconds = self._checked(machine)
        checks = [self._explained(build, machine, guest, check) for check in checks]
        if artifact.sha256:
            checks.append(judged("unchanged", _why_changed(artifact)))
        tested = BootTested(artifact.path.name, machine.firmware, seconds, tuple(checks), machine.devices)
        self._tell(state, tested, "\n".join(guest.lines))
        _log(checks)
        problems = [check.message for check in checks if check.outcome == "failed"]
        if problems:
            explain(guest.message, guest.lines)
            failure = f"{artifact.path.name} failed its test boot with {machine.name}: {'; '.join(problems)}."
            if not self._to_the_end:
                raise BuildError(failure, hint=f"All results are in {build.plan.junit_path}.")
            logger.error("%s", failure)
            self._failed[number] = "; ".join(problems)
        if guest.message:
            self._reports.append(guest.message)

    def _checked(self, machine: Machine) -> tuple[list[BootCheck], Guest, float]:
        """Return the checks of *machine*, which is ended then, what was its guest, and its seconds."""
        for _ in range(PORT_TRIES):
            running = self._running.pop(machine.number, None) or started(machine)
            guest = running.guest
            with running.stack, contextlib.suppress(PortTakenError):
                checks = [*_checks(machine, guest, running.port, self._reports, self._look)]
                return checks, guest, time.monotonic() - running.start
        raise BuildError(f"No port of {HOST} could be had for the machine.", hint="Try again.")

    def _explained(self, build: Build, machine: Machine, guest: Guest, check: BootCheck) -> BootCheck:
        """Return *check* with the driver that is missing, if that may be why it failed."""
        why = ""
        if check.name == "boot" and check.outcome == "failed" and guest.is_rootless and machine.has_disk:
            why = matrix.missing_driver(self._kernels_of(build, machine.artifact), machine.disk.modules, early=True)
        elif check.name == "network" and check.outcome == "failed" and machine.has_disk:
            why = matrix.missing_driver(self._kernels_of(build, machine.artifact), machine.network.modules)
        return judged(check.name, f"{why} ({check.message})") if why else check

    def _kernels_of(self, build: Build, artifact: Artifact) -> list[Kernel]:
        if artifact.path not in self._kernels:
            self._kernels[artifact.path] = matrix.kernels_of(build, artifact)
        return self._kernels[artifact.path]

    def _look(self) -> None:
        """Read what the guests say that run beside: they stop where a pipe is full."""
        # What is shown is of the guest that is waited for.
        with events.unobserved():
            for running in self._running.values():
                running.guest.look()


def started(machine: Machine) -> Running:
    """Start *machine*, which runs until the stack of what is returned is closed."""
    with ExitStack() as stack:
        machine = stack.enter_context(prepared(machine))
        console, report = stack.enter_context(pipes(machine))
        port = free_port()
        tpm = stack.enter_context(tpm_running(machine)) if machine.has_tpm else None
        argv = qemu_argv(machine, other_mac(), port, tpm or "")
        passed_on = [tpm] if tpm else []
        ended = stack.enter_context(command.background(argv, machine.directory / "qemu.log", pass_fds=passed_on))
        return Running(Guest(machine, ended, console, report), port, time.monotonic(), stack.pop_all())


def _checks(
    machine: Machine, found: Guest, port: int, earlier: Sequence[Message], beside: Callable[[], None]
) -> Iterator[BootCheck]:
    problem = found.wait_for_report(time_limit(machine.build.plan.settings, machine.virt_type), beside)
    yield judged("boot", problem)
    message = found.message
    if problem or message is None:
        return
    has_scripts = bool(machine.build.plan.settings.first_boot)
    subject = Subject(
        machine.artifact.virtual_size,
        machine.larger_size,
        machine.errors_allowed,
        has_scripts,
        not machine.has_disk,
        machine.firmware == SECURE_BOOT,
        machine.has_tpm,
    )
    checks = checks_of(message, subject)
    yield from checks
    yield from identity_checks(message, earlier)

    def look() -> None:
        found.look()
        beside()

    yield from login_checks(machine, look, port, message, checks)


def _why_changed(artifact: Artifact) -> str:
    return "" if files.digest_of(artifact.path) == artifact.sha256 else "its file is not the one that was made"


def _log(checks: Sequence[BootCheck]) -> None:
    for found in checks:
        logger.info("Check %s: %s%s", found.name, found.outcome, f": {found.message}" if found.message else "")


def explain(report: Message | None, lines: Sequence[str]) -> None:
    """Log what a guest says of its failure in its *report*, and the end of what it printed."""
    if report:
        if report.fact("first-boot-left"):
            for line in report.lines("first-boot-log"):
                logger.error("first-boot scripts: %s", line)
        for line in report.lines("kernel")[:_SHOWN_LINES]:
            logger.error("error of the guest's kernel: %s", line)
        for line in report.lines("journal")[-_SHOWN_LINES:]:
            logger.error("guest's journal: %s", line)
    for line in [*lines][-_SHOWN_LINES:]:
        logger.error("console: %s", line)
