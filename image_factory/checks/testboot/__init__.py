"""Boot the finished image on throw-away overlays, and let it tell from inside how it is.

QEMU is started directly and not by libvirt: it is killed with image-factory by the kernel, whatever kills
that, and there is no machine to undefine.  All files are in the working directory.
"""

import base64
import contextlib
import errno
import json
import os
import re
import secrets
import select
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...base import command, events, files, interrupts
from ...base.cleanup import released
from ...base.errors import BuildError, CommandError, ConfigurationError
from ...base.events import BootCheck, BootTested
from ...base.log import logger
from ...base.units import format_duration, parse_duration
from ...configuration.settings import ImageSettings
from ...machines import arch
from ...machines.console import Console
from ...machines.firmware import Firmware, uefi_firmware
from ...model import Artifact, Build, Plan
from ...outputs import planned
from ...parts import State, Step, doing
from ...told import junit
from . import report as bootreport
from .report import Message, Subject, judged, passed, skipped

# One is needed for a new identity, another one to see that it is new.
_BOOTS = 2
_HOST = "127.0.0.1"
# Installations are on virtio-blk.  virtio-scsi is what else all kernels for clouds have, Debian's cloud kernel
# among them, which has no AHCI; and an initramfs that was made for one machine only does not.
_DISK_DEVICE = "scsi-hd"

# A kernel that starts writes to its root filesystem in well under that; a machine without a boot loader never does.
_START_SECONDS = {"kvm": 60.0, "qemu": 240.0}
_BANNER_SECONDS = 30.0
_LOGIN_SECONDS = {"kvm": 60.0, "qemu": 180.0}
# What a failure prints comes in several lines; and a system that is up in spite of it may report yet.
_SETTLE_SECONDS = 2.0
_PORT_TRIES = 5
_READ_BYTES = 64 * 1024
_KEPT_LINES = 400
_SHOWN_LINES = 40


@dataclass(frozen=True)
class _Sign:
    """A line on the console, *pattern*, that tells why there will be no report; *problem* may have its groups."""

    pattern: str
    problem: str
    seconds: float = _SETTLE_SECONDS


# Where several are seen, the first of them here counts.
_SIGNS = (
    _Sign(r"(?<!end )Kernel panic - not syncing: (.{1,160})", r"its kernel panicked: \1"),
    _Sign(r"ALERT! +(\S{1,100}) does not exist", r"its initramfs did not find the root filesystem \1"),
    _Sign(r"dracut-initqueue.*timeout", "its initramfs did not find the root filesystem", 60.0),
    _Sign(r"[Ee]ntering emergency mode|You are in emergency mode", "it came up in emergency mode"),
    _Sign(r"No bootable device|No bootable option|>>Start (?:PXE|HTTP) over|UEFI Interactive Shell",
          "the firmware found no boot loader on its disk"),
    _Sign(r"grub rescue>", "its boot loader did not find its files"),
    _Sign(r"[Nn]o space left on device", "its root filesystem is full", 60.0),
)  # fmt: skip


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
    if "uefi" in firmwares(settings):
        _firmware(settings.arch)


def programs(plan: Plan) -> list[str]:
    """Return the programs that the test boot of *plan* needs."""
    if not plan.settings.test_boot:
        return []
    return [arch.ARCHITECTURES[plan.settings.arch].qemu, "qemu-img", "ssh", "ssh-keygen", "xorriso"]


def firmwares(settings: ImageSettings) -> tuple[str, ...]:
    """Return what the image claims to boot with."""
    return ("bios", "uefi") if settings.firmware == "hybrid" else (settings.firmware,)


def _firmware(architecture: str) -> Firmware:
    """Return UEFI that starts what nobody has signed, for QEMU itself."""
    for found in uefi_firmware(architecture):
        if not found.secure_boot and found.code and found.memory:
            return found
    raise ConfigurationError(
        f"There is no UEFI for {architecture} without secure boot on this machine.",
        hint=f"Install it: apt-get install {arch.ARCHITECTURES[architecture].uefi_package}",
    )


def boots(settings: ImageSettings, artifacts: Sequence[Artifact]) -> list[tuple[Artifact, str]]:
    """Return which artifact is booted with which firmware: each of both at least once, and two boots at least."""
    names = firmwares(settings)
    count = max(_BOOTS, len(names), len(artifacts))
    return [(artifacts[number % len(artifacts)], names[number % len(names)]) for number in range(count)]


def time_limit(settings: ImageSettings, virt_type: str) -> float:
    """Return the seconds that a boot may take; emulation is slower."""
    limit = settings.test_boot_timeout
    return parse_duration("30m" if virt_type == "qemu" else "10m") if limit is None else limit


# The machine


@dataclass(frozen=True)
class _Machine:
    """A machine of its own in *directory*; *number* tells the boots of a build apart."""

    build: Build
    artifact: Artifact
    firmware: str
    virt_type: str
    number: int

    @property
    def directory(self) -> Path:
        return self.build.directory / f"boot-{self.number}"

    @property
    def overlay(self) -> Path:
        return self.directory / "overlay.qcow2"

    @property
    def seed(self) -> Path:
        return self.directory / "seed.iso"

    @property
    def seed_source(self) -> Path:
        return self.directory / "seed"

    @property
    def key(self) -> Path:
        return self.directory / "key"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    @property
    def nvram(self) -> Path:
        return self.directory / "nvram.fd"

    @property
    def larger_size(self) -> int:
        """The size of the overlay's disk: twice the image's, so that it is plain whether the root has grown."""
        return 2 * self.artifact.virtual_size

    def pipe(self, name: str) -> Path:
        """Return the path of the pipe *name*, to which QEMU adds .in and .out."""
        return self.directory / name

    @property
    def credentials(self) -> list[Path]:
        """The files of the strings for the machine's SMBIOS."""
        return [self.directory / f"credential-{number}" for number in range(len(bootreport.credentials("")))]


def overlay_argv(machine: _Machine) -> list[str]:
    """Return the command that makes the overlay, whose backing file QEMU opens read-only."""
    artifact = machine.artifact
    return [
        "qemu-img", "create", "-q",
        "-f", "qcow2",
        "-F", artifact.format,
        "-b", str(artifact.path),
        str(machine.overlay),
        str(machine.larger_size),
    ]  # fmt: skip


def key_argv(machine: _Machine) -> list[str]:
    """Return the command that makes the throw-away key."""
    return ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "image-factory", "-f", str(machine.key)]


def seed_argv(machine: _Machine) -> list[str]:
    """Return the command that makes the NoCloud seed, an ISO 9660 filesystem."""
    return [
        "xorriso",
        "-report_about", "WARNING",
        "-outdev", f"stdio:{machine.seed}",
        "-volid", "CIDATA",
        "-joliet", "on",
        "-map", str(machine.seed_source), "/",
        "-commit",
    ]  # fmt: skip


def qemu_argv(machine: _Machine, mac: str, port: int | str) -> list[str]:
    """Return the command of the machine, whose sshd is at *port* of 127.0.0.1."""
    settings = machine.build.plan.settings
    facts = arch.ARCHITECTURES[settings.arch]
    emulated = machine.virt_type == "qemu"
    # Without graphics SeaBIOS says on the serial port what it can't boot.
    options = [facts.test_machine, "graphics=off", f"accel={'tcg' if emulated else 'kvm'}"]
    flash: list[str] = []
    if machine.firmware == "uefi":
        found = _firmware(settings.arch)
        options += ["pflash0=code", "pflash1=memory"]
        flash += _blockdev("code", found.format, str(found.code), read_only=True)
        flash += _blockdev("memory", found.format, str(machine.nvram))
    return [
        facts.qemu,
        "-name", machine.build.vm_name,
        "-machine", ",".join(options),
        "-cpu", _emulated_cpu(settings) if emulated else "host",
        # With two, emulation now and then mixes up old and new code of a kernel that patches itself.
        "-smp", "1" if emulated else str(settings.cores),
        "-m", str(settings.ram >> 20),
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        *flash,
        *_blockdev("disk", "qcow2", str(machine.overlay)),
        *_blockdev("seed", "raw", str(machine.seed), read_only=True),
        "-device", "virtio-scsi-pci",
        "-device", f"{_DISK_DEVICE},drive=disk,bootindex=1",
        "-device", "scsi-cd,drive=seed",
        "-netdev", f"user,id=network,hostfwd=tcp:{_HOST}:{port}-:22",
        # Without its ROM no firmware tries to boot from the network.
        "-device", f"virtio-net-pci,netdev=network,mac={mac},romfile=",
        "-device", "virtio-rng-pci",
        "-chardev", f"pipe,id=console,path={_escaped(machine.pipe('console'))}",
        "-serial", "chardev:console",
        "-chardev", f"pipe,id=report,path={_escaped(machine.pipe('report'))}",
        "-device", "virtio-serial-pci",
        "-device", f"virtserialport,chardev=report,name={bootreport.PORT}",
        *(word for path in machine.credentials for word in ("-smbios", f"type=11,path={_escaped(path)}")),
    ]  # fmt: skip


def _emulated_cpu(settings: ImageSettings) -> str:
    facts = arch.ARCHITECTURES[settings.arch]
    if settings.kickstart or not facts.flawed_feature:
        return facts.test_cpu
    return f"{facts.test_cpu},-{facts.flawed_feature}"


def _blockdev(name: str, image_format: str, path: str, *, read_only: bool = False) -> list[str]:
    # ``cache.no-flush``: the overlay is thrown away, what the guest wants to be safe on the disk is not.
    cache = {"no-flush": True}
    file = {"driver": "file", "filename": path, "read-only": read_only, "cache": cache}
    node = {"driver": image_format, "node-name": name, "read-only": read_only, "cache": cache, "file": file}
    return ["-blockdev", json.dumps(node)]


def _escaped(path: Path) -> str:
    """Return *path* as a value among QEMU's options, which are separated by commas."""
    return str(path).replace(",", ",,")


def ssh_argv(machine: _Machine, port: int | str, remote: str) -> list[str]:
    """Return the command that logs in with the seed's user and key, and runs *remote*."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": "60",
        "GlobalKnownHostsFile": "/dev/null",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "PasswordAuthentication": "no",
        # The guest has told its keys by another way.
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": f'"{machine.known_hosts}"',
    }
    return [
        "ssh",
        "-F", "none",
        "-i", str(machine.key),
        "-p", str(port),
        *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
        f"{bootreport.USER}@{_HOST}",
        remote,
    ]  # fmt: skip


_LOGIN = "true"
_RUN_SCRIPT = "f=$(mktemp) && cat >$f && chmod 700 $f && exec $f"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((_HOST, 0))
        port: int = found.getsockname()[1]
        return port


def _other_mac(settings: ImageSettings) -> str:
    """Return a MAC address that is not the installation machine's, which may be any of QEMU's range 52:54:00."""
    # The second bit of the first byte: locally administered.
    return ":".join(["02", *(f"{byte:02x}" for byte in secrets.token_bytes(5))])


# A boot


class _PortTakenError(Exception):
    """Somebody else has taken the port meanwhile."""


class _Guest:
    """What a guest says while QEMU runs, on its console and in its reports; both come through named pipes."""

    def __init__(self, machine: _Machine, ended: Callable[[], int | None], console: int, report: int) -> None:
        self._machine = machine
        self._ended = ended
        self._descriptors = (console, report)
        self._console = Console()
        self._unread = b""
        self._sign: tuple[int, str, float] | None = None
        self._untouched = _state_of(machine.overlay)
        self._start = time.monotonic()
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.message: Message | None = None

    def look(self) -> None:
        """Read what there is."""
        console, report = self._descriptors
        self._read_console(_read(console))
        self._unread += _read(report)
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            if line.strip():
                self.message = bootreport.parse(line)
        if len(self._unread) > bootreport.LONGEST_LINE:
            raise BuildError("What the guest reported is too long.")

    def _read_console(self, data: bytes) -> None:
        lines = self._console.feed(data)
        for line in lines:
            self.lines.append(line)
            events.tell(events.ConsoleLine(line))
        for line in [*lines, self._console.line]:
            for order, sign in enumerate(_SIGNS):
                match = re.search(sign.pattern, line)
                problem = match and match.expand(sign.problem)
                if problem and (self._sign is None or order < self._sign[0]):
                    self._sign = order, problem, time.monotonic() + sign.seconds
                elif problem and self._sign and problem.startswith(self._sign[1]):
                    # The line was not whole.
                    self._sign = order, problem, self._sign[2]

    def wait_for_report(self, seconds: float) -> str:
        """Wait until the system is up and has reported; return why it has not, empty if it has."""
        deadline = self._start + seconds
        with interrupts.interruptible():
            while not (self.message and self.message.stage == "finished"):
                status = self._ended()
                select.select(self._descriptors, [], [], 1.0 if status is None else 0.0)
                if status is not None:
                    time.sleep(0.1)
                self.look()
                events.tell(events.TimePassed())
                now = time.monotonic()
                if self._sign and (now >= self._sign[2] or now >= deadline or status is not None):
                    return self._sign[1]
                if status is not None:
                    return self._why_off(status)
                start = min(seconds, _START_SECONDS[self._machine.virt_type])
                if now >= self._start + start and self.message is None and self._is_untouched():
                    return (
                        f"it did not start: within {format_duration(start)} its disk was not written to{self._last()}"
                    )
                if now >= deadline:
                    return self._why_late(seconds)
        return ""

    def _is_untouched(self) -> bool:
        return _state_of(self._machine.overlay) == self._untouched

    def _last(self) -> str:
        return f"; the last line on its console was: {self.lines[-1]}" if self.lines else ""

    def _why_off(self, status: int) -> str:
        if status == 0:
            return "it went off or rebooted before it reported"
        said = (self._machine.directory / "qemu.log").read_text(encoding="utf-8", errors="replace").split("\n")
        if any("Could not set up host forwarding rule" in line for line in said):
            raise _PortTakenError
        return f"QEMU ended with status {status}: {' '.join(said[-2:]).strip()}"

    def _why_late(self, seconds: float) -> str:
        within = f"within {format_duration(seconds)}"
        if self.message is None:
            if not self._console.line.endswith("login:"):
                return f"it did not report {within}{self._last()}"
            return f"it reported nothing {within}, though it asks for a login: its cloud-init did not run"
        jobs = self.message.lines("jobs")
        waiting = f"; it waits for {', '.join(line.split()[1] for line in jobs[:5] if len(line.split()) > 1)}"
        return f"it did not come up {within}{waiting if jobs else ''}"


def _state_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_blocks


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _READ_BYTES)
    except BlockingIOError:
        return b""


@contextmanager
def _prepared(machine: _Machine) -> Iterator[None]:
    """Have the files of *machine* there inside."""
    machine.directory.mkdir(mode=0o700)
    with released(lambda: shutil.rmtree(machine.directory)):
        command.run(overlay_argv(machine))
        command.run(key_argv(machine))
        key = machine.key.with_suffix(".pub").read_text(encoding="ascii").strip()
        machine.seed_source.mkdir()
        for name, text in bootreport.seed_files(key, f"image-factory-{secrets.token_hex(4)}").items():
            (machine.seed_source / name).write_text(text, encoding="utf-8")
        command.run(seed_argv(machine))
        for path, (name, text) in zip(machine.credentials, bootreport.credentials(key).items(), strict=True):
            path.write_text(f"io.systemd.credential.binary:{name}={base64.b64encode(text.encode()).decode()}")
        if machine.firmware == "uefi":
            shutil.copyfile(str(_firmware(machine.build.plan.settings.arch).memory), machine.nvram)
        yield


@contextmanager
def _pipes(machine: _Machine) -> Iterator[tuple[int, int]]:
    """Give the ends for reading of the console and of the report."""
    with contextlib.ExitStack() as stack:
        descriptors = []
        for name in ("console", "report"):
            for direction in ("in", "out"):
                path = Path(f"{machine.pipe(name)}.{direction}")
                # There is another one, where a port was taken.
                path.unlink(missing_ok=True)
                os.mkfifo(path, 0o600)
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, descriptor)
            descriptors.append(descriptor)
        yield descriptors[0], descriptors[1]


def _boot(machine: _Machine, earlier: Sequence[Message]) -> tuple[list[BootCheck], Message | None, list[str]]:
    """Boot *machine*; return the checks, what it reported, and what it printed."""
    with _prepared(machine):
        for _ in range(_PORT_TRIES):
            port = _free_port()
            argv = qemu_argv(machine, _other_mac(machine.build.plan.settings), port)
            with (
                _pipes(machine) as (console, report),
                command.background(argv, machine.directory / "qemu.log") as ended,
                contextlib.suppress(_PortTakenError),
            ):
                found = _Guest(machine, ended, console, report)
                return [*_checks(machine, found, port, earlier)], found.message, [*found.lines]
    raise BuildError(f"No port of {_HOST} could be had for the machine.", hint="Try again.")


def _checks(machine: _Machine, found: _Guest, port: int, earlier: Sequence[Message]) -> Iterator[BootCheck]:
    settings = machine.build.plan.settings
    problem = found.wait_for_report(time_limit(settings, machine.virt_type))
    yield judged("boot", problem)
    message = found.message
    if problem or message is None:
        return
    subject = Subject(machine.artifact.virtual_size, machine.larger_size, settings.kernel_errors_allowed)
    checks = bootreport.checks_of(message, subject)
    yield from checks
    yield from bootreport.identity_checks(message, earlier)
    yield from _login_checks(machine, found, port, message, checks)


def _login_checks(
    machine: _Machine, found: _Guest, port: int, message: Message, checks: Sequence[BootCheck]
) -> Iterator[BootCheck]:
    """Give the checks that need sshd."""
    settings = machine.build.plan.settings
    names = ("sshd", "login", *(["test-script"] if settings.test_script else []))
    gone = [check.name for check in checks if check.outcome == "failed" and check.name in ("sshd-installed", "network")]
    if gone:
        yield from (skipped(name, f"{gone[0]} failed") for name in names)
        return
    problem = _why_no_sshd(found, port)
    yield judged("sshd", problem)
    if problem:
        yield from (skipped(name, "sshd failed") for name in names[1:])
        return
    lines = [f"[{_HOST}]:{port} {key}\n" for key in message.host_keys]
    machine.known_hosts.write_text("".join(lines), encoding="ascii")
    # Each second the pipes are read, which would stop the guest when they are full.
    login_seconds = _LOGIN_SECONDS[machine.virt_type]
    try:
        command.run(ssh_argv(machine, port, _LOGIN), timeout=login_seconds, watch=found.look)
    except BuildError as error:
        yield judged("login", f"nobody can log in with the key of the seed's user: {error.said}")
        yield from (skipped(name, "login failed") for name in names[2:])
        return
    yield passed("login")
    if settings.test_script:
        limit = time_limit(settings, machine.virt_type)
        try:
            command.run(
                ssh_argv(machine, port, _RUN_SCRIPT), stdin=settings.test_script, timeout=limit, watch=found.look
            )
        except CommandError as error:
            said = f": {error.last_line}" if error.last_line else ""
            yield judged("test-script", f"{settings.test_script.name} failed with status {error.status}{said}")
        except BuildError:
            yield judged("test-script", f"{settings.test_script.name} did not end within {format_duration(limit)}")
        else:
            yield passed("test-script")


def _why_no_sshd(found: _Guest, port: int) -> str:
    """Return why no sshd answers at *port*, empty if one does."""
    deadline = time.monotonic() + _BANNER_SECONDS
    with interrupts.interruptible():
        while time.monotonic() < deadline:
            found.look()
            # QEMU takes the connection itself, and ends it if nobody in the guest does.
            with contextlib.suppress(OSError), socket.create_connection((_HOST, port), 5.0) as connection:
                if connection.recv(64).startswith(b"SSH-2.0"):
                    return ""
            time.sleep(0.5)
    return "no sshd answers"


# The step


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
        checks, report, lines = _boot(_Machine(build, artifact, firmware, build.virt_type, number), self._reports)
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


def steps(build: Build) -> Iterator[Step]:
    """Give the steps of the test boot, if it is wanted."""
    settings = build.plan.settings
    if not settings.test_boot:
        return
    test = _TestBoot()
    for number, (artifact, firmware) in enumerate(boots(settings, planned(build.plan, build.directory)), 1):
        machine = _Machine(build, artifact, firmware, build.virt_type, number)
        commands = [
            overlay_argv(machine),
            key_argv(machine),
            seed_argv(machine),
            qemu_argv(machine, "02:XX:XX:XX:XX:XX", "PORT"),
            ssh_argv(machine, "PORT", _LOGIN),
        ]
        if settings.test_script:
            commands.append(ssh_argv(machine, "PORT", _RUN_SCRIPT))
        boot = doing(partial(test.boot, number, firmware))
        yield Step(f"Booting {artifact.path.name} with {firmware}", boot, commands)


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
