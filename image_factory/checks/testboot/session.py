"""A finished image, booted for the user: a shell in it by ssh, or its serial console, on the terminal.

The machine is that of the test boot, and ends with the session.
"""

import dataclasses
import json
import os
import re
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from signal import SIGTERM

from ... import naming
from ...base import command, events, interrupts, log, terminal
from ...base.cleanup import released
from ...base.errors import BuildError, ConfigurationError
from ...base.log import logger
from ...base.units import format_duration
from ...inside import namespaces
from ...machines import arch
from ...model import Artifact, Build, Plan
from ...outputs import OUTPUTS
from . import PORT_TRIES, Running, boots_of, explain, laying, started
from .guest import Guest, PortTakenError
from .login import ssh_argv, why_no_sshd
from .machine import HOST, MONITOR, TEST, Machine, time_limit
from .monitor import Monitor
from .report import Subject, boot_command, checks_of, unit_credentials

# Ctrl-], as in virsh(1).
_LEAVING = b"\x1d"
_STDIN, _STDOUT = 0, 1
_READ_BYTES = 64 * 1024
# The status of ssh that has lost its connection, and how long after that the machine may be seen to be gone.
_LOST = 255
_NOTICED_SECONDS = 3.0
_OFF_SECONDS = {"kvm": 90.0, "qemu": 300.0}
_NO_SHELL = "--console gives its serial console, which takes no ssh."
# A guest that hangs ends the shell after two minutes.
_KEPT_ALIVE = {"ServerAliveInterval": "15", "ServerAliveCountMax": "8", "LogLevel": "ERROR"}
# That of the seed's user is the plainest that each system has.
_LOGIN_SHELL = "command -v bash >/dev/null && exec bash -l; exec sh -l"
_NO_ACCESS = ("sshd-installed", "network")

_UNIT = "image-factory-console"
_DESCRIPTION = "Login on the serial console"
# %I is the name of the port, as in the unit itself.
_LOGIN_SCRIPT = """\
place=/run/systemd/system/serial-getty@%(console)s.service.d
mkdir -p $place
agetty=$(command -v agetty || ls /usr/sbin/agetty)
cat >$place/image-factory.conf <<.
[Service]
ExecStart=
ExecStart=-$agetty --autologin root --keep-baud 115200,57600,38400,9600 %%I vt220
.
systemctl daemon-reload
systemctl restart serial-getty@%(console)s.service
"""


def _given_for_console(machine: Machine) -> tuple[dict[str, str], dict[str, str]]:
    """Return what has root logged in on the serial console, where the system takes anything from the machine."""
    script = _LOGIN_SCRIPT % {"console": arch.ARCHITECTURES[machine.build.plan.settings.arch].console}
    seed, _ = TEST.given(machine)
    data = {"bootcmd": [boot_command(script, _UNIT, _DESCRIPTION)]}
    return seed | {"user-data": f"#cloud-config\n{json.dumps(data)}\n"}, unit_credentials(script, _UNIT, _DESCRIPTION)


_SHELL = dataclasses.replace(TEST, name="run", reboots=True, monitored=True)
_CONSOLE = dataclasses.replace(_SHELL, given=_given_for_console)


def check(kept: Path) -> None:
    """Raise ConfigurationError if no overlay can be made as *kept*."""
    if os.path.lexists(kept):
        raise ConfigurationError(f"--keep-overlay: {kept} is there already.", hint="Remove it, or name another file.")
    if not os.access(kept.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigurationError(f"--keep-overlay: {kept.absolute().parent} is no directory that can be written to.")


def newest(plan: Plan) -> Path:
    """Return the artifact of the newest build of the image of *plan* that is booted with the least to do before.

    ConfigurationError if there is none in the output directory.
    """
    suffixes = {name: output.suffix for name, output in OUTPUTS.items() if not output.packs}
    kinds = (
        [suffix for name, suffix in suffixes.items() if OUTPUTS[name].driver],
        [suffix for name, suffix in suffixes.items() if OUTPUTS[name].unpacking],
        [suffix for name, suffix in suffixes.items() if name in laying.TARS],
    )
    endings = "|".join(re.escape(suffix) for kind in kinds for suffix in kind)
    for _, paths in naming.builds(plan, rf"\.(?:{endings})"):
        for suffix in (suffix for kind in kinds for suffix in kind):
            for path in paths:
                if path.name.endswith(f".{suffix}"):
                    return path
    raise ConfigurationError(
        f"{plan.output_dir} has no build of {plan.image} that can be booted.",
        hint="Build the image, name another directory with --output-dir, or the path of a file.",
    )


class ShellError(BuildError):
    """A shell has ended with *status*, as subprocess has it, which is to be image-factory's own."""

    def __init__(self, status: int) -> None:
        self.exit_status = status if status > 0 else 128 - status
        super().__init__(f"The shell in the machine ended with status {self.exit_status}.")


class Session:
    """A *machine* that runs the image *name*."""

    def __init__(self, name: str, machine: Machine, running: Running) -> None:
        self._name = name
        self._machine = machine
        self._running = running

    @property
    def _guest(self) -> Guest:
        return self._running.guest

    def shell(self) -> None:
        """Have the user in a shell of the guest until that ends; ShellError if one without a terminal has failed.

        BuildError if the machine is lost.
        """
        # ssh would go by what stdin is only where it runs no command.
        argv = ssh_argv(self._machine, self._running.port, _LOGIN_SHELL, options=_KEPT_ALIVE)
        is_attended = os.isatty(_STDIN)
        argv.insert(1, "-t" if is_attended else "-T")
        with events.unobserved():
            status = command.interact(argv, watch=self._watch, ends_with_us=SIGTERM)
        if status == _LOST and self._goes_off():
            logger.warning("The machine has gone off.")
        # What someone has typed last is no matter of ours.
        if status and not is_attended:
            raise ShellError(status)

    def _goes_off(self) -> bool:
        """Return whether the machine has gone off: ssh may have noticed before."""
        deadline = time.monotonic() + _NOTICED_SECONDS
        while not self._off() and time.monotonic() < deadline:
            self._watch()
            time.sleep(0.1)
        return self._off()

    def console(self) -> None:
        """Have the user at the serial console, on the terminal, until Ctrl-] is typed or the machine goes off."""
        self._guest.echo = _show
        commands = os.open(f"{self._machine.pipe('console')}.in", os.O_RDWR | os.O_NONBLOCK)
        try:
            with terminal.raw(), interrupts.interruptible(), events.unobserved():
                self._relay(commands)
        finally:
            self._guest.echo = None
            os.close(commands)
        # What comes next begins a line.
        _show(b"\n")

    def _relay(self, commands: int) -> None:
        """Give what is typed to the guest by the pipe *commands*, and show what it prints."""
        pending = b""
        while not self._off():
            # Typing waits where the guest takes nothing.
            wanted = [] if pending else [_STDIN]
            ready, _, _ = select.select([*self._guest.descriptors, *wanted], [commands] if pending else [], [], 1.0)
            if _STDIN in ready:
                typed = os.read(_STDIN, _READ_BYTES)
                pending, leaving, _ = typed.partition(_LEAVING)
                if leaving or not typed:
                    return
            with suppress(BlockingIOError):
                pending = pending[os.write(commands, pending) :]
            self._guest.look()
        self._guest.look()

    def _off(self) -> bool:
        """Return whether the machine has gone off by itself; BuildError if it has ended otherwise."""
        try:
            how_ended = self._guest.off()
        except PortTakenError as error:
            raise _no_port() from error
        if how_ended and how_ended != Guest.WENT_OFF:
            raise BuildError(f"The machine is lost: {how_ended}.")
        return bool(how_ended)

    def _watch(self) -> None:
        self._guest.look()
        if not self._off() and (problem := self._guest.lost()):
            raise BuildError(f"The machine is lost: {problem}.")

    def wait(self) -> None:
        """Wait until the system is up and someone can log in; BuildError says why not."""
        machine, guest = self._machine, self._guest
        try:
            self._wait(machine, guest)
        except BuildError:
            explain(guest.message, guest.lines)
            raise

    def _wait(self, machine: Machine, guest: Guest) -> None:
        problem = guest.wait_for_report(time_limit(machine.build.plan.settings, machine.virt_type))
        report = guest.message
        if problem or not report:
            raise BuildError(f"{self._name} did not come up: {problem}.", hint=_NO_SHELL)
        subject = Subject(machine.artifact.virtual_size, machine.larger_size, machine.errors_allowed)
        failed = [check for check in checks_of(report, subject) if check.outcome == "failed"]
        problem = next((check.message for check in failed if check.name in _NO_ACCESS), "")
        if problem := problem or why_no_sshd(guest.look, self._running.port):
            raise BuildError(f"{self._name} came up, and nobody can log in: {problem}.", hint=_NO_SHELL)
        for check in failed:
            logger.warning("%s is up, but %s.", self._name, check.message)
        lines = [f"[{HOST}]:{self._running.port} {key}\n" for key in report.host_keys]
        machine.known_hosts.write_text("".join(lines), encoding="ascii")

    def shut_down(self) -> None:
        """Have the guest go off in good order; where it does not, there is a warning."""
        if self._off():
            return
        seconds = _OFF_SECONDS[self._machine.virt_type]
        with log.step("Shutting down"), closing(Monitor(self._machine.pipe(MONITOR), self._guest.look)) as monitor:
            monitor.tell("qmp_capabilities")
            monitor.tell("system_powerdown")
            deadline = time.monotonic() + seconds
            with interrupts.interruptible():
                while not self._off() and time.monotonic() < deadline:
                    self._guest.look()
                    events.tell(events.TimePassed())
                    time.sleep(0.5)
        if not self._off():
            logger.warning(
                "It did not go off within %s: its disk is as after a power failure.", format_duration(seconds)
            )


def _no_port() -> BuildError:
    return BuildError(f"No port of {HOST} could be had for the machine.", hint="Try again.")


def _show(data: bytes) -> None:
    while data:
        data = data[os.write(_STDOUT, data) :]


@contextmanager
def booted(build: Build, artifact: Artifact, *, console: bool = False, kept: Path | None = None) -> Iterator[Session]:
    """Boot *artifact* with its first firmware, and give the session when the system is up; at once for its *console*.

    The overlay is made as the file *kept*, if one is named, and stays there once there was a session.  The guest is
    shut down for that, if nothing fails inside.
    """
    # What is kept is to be of the file itself, and not of a link in a directory that goes.
    artifact = dataclasses.replace(artifact, path=artifact.path.resolve())
    boot = boots_of(build, [artifact])[0]
    has_begun = False

    def end_overlay() -> None:
        assert kept
        if not has_begun:
            kept.unlink(missing_ok=True)
        elif boot.disk.path.is_relative_to(build.directory):
            # The disk below it goes with the directory.
            command.run(["qemu-img", "rebase", "-q", "-f", "qcow2", "-b", "", str(kept)])

    with ExitStack() as stack:
        if boot.laying:
            stack.enter_context(released(partial(namespaces.remove, boot.laying.directory)))
            with log.step(boot.laying.name):
                boot.laying.carry_out()
        if kept:
            stack.enter_context(released(end_overlay))
        purpose = _CONSOLE if console else _SHELL
        machine = Machine(build, boot.disk, boot.firmware, build.virt_type, 1, purpose, kept=kept, devices=boot.devices)
        with log.step(f"Booting {artifact.path.name} with {machine.name}"):
            session = stack.enter_context(_running(artifact.path.name, machine, wait=not console))
        has_begun = True
        yield session
        if kept:
            session.shut_down()


@contextmanager
def _running(name: str, machine: Machine, *, wait: bool) -> Iterator[Session]:
    """Give the session of *machine*, which runs the image *name* and ends on the way out."""
    for _ in range(PORT_TRIES):
        running = started(machine)
        with running.stack, suppress(PortTakenError):
            session = Session(name, machine, running)
            if wait:
                session.wait()
            yield session
            return
    raise _no_port()
