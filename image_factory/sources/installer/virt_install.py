"""The installation machine: virt-install's command line, its life and death, and its console."""

import contextlib
import itertools
import json
import os
import platform
import pwd
import re
import select
import signal
import stat
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from ...base import command, files, fuse, interrupts
from ...base.cleanup import released
from ...base.errors import BuildError, CommandError, ConfigurationError, command_line
from ...base.log import logger, waiting
from ...base.units import format_size, parse_duration
from ...configuration.parsers import Source
from ...configuration.settings import ImageSettings
from ...machines import arch
from ...machines.console import Console
from ...model import VM_PREFIX, WORK_PREFIX, Build, Plan, libvirt_uri
from . import delivery
from .installers import POWER_OFF
from .watch import Limits, Watcher

# What a progress bar writes over.  It begins only where a line does, else a long one takes time with its square.
_OVERWRITTEN = re.compile(rb"(?<![^\r\n\x1b])[^\r\n\x1b]*+\r(?=[^\r\n\x1b])")

KVM_DEVICE = Path("/dev/kvm")

# A kernel prints its banner in well under a second on a KVM that works, nested ones included.
PROBE_SECONDS = 5.0
_PROBE_BANNER = b"Linux version"

# virt-install 4.1 escapes them twice in the console's path.
_NOT_IN_PATHS = frozenset("&<>'\"")

_QEMU_USER = "libvirt-qemu"
_QEMU_CONFIGURATION = Path("/etc/libvirt/qemu.conf")
_QEMU_USER_CHANGED = re.compile(r"^\s*user\s*=", re.MULTILINE)

# Where libvirt finds the firmware that QEMU can have (firmware.json of QEMU's interop documents).
_FIRMWARE_DIRECTORIES = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
# Without secure boot, UEFI starts what nobody has signed: an installer's kernel, without a boot loader.
_UEFI = ("firmware=efi", "firmware.feature0.name=secure-boot", "firmware.feature0.enabled=no")

_VIRSH_SECONDS = 60.0
# A libvirtd that was killed is started again by systemd, or by the next command of the session's user.
_LIBVIRT_SECONDS = 10.0
_KILL_SECONDS = 10.0
# What libvirt's client says when the daemon goes away under it.
_CONNECTION_LOST = re.compile(
    r"Cannot (?:write|read|recv) data|End of file while reading data|client socket is closed|[Ff]ailed to connect"
)

# ``cache=unsafe``: the disk is thrown away when the installation fails.
# ``error_policy=report``: when the host's disk is full the guest gets an error; by default QEMU would
# stop it and wait for ever.
_DISK_OPTIONS = ("bus=virtio", "format=raw", "cache=unsafe", "discard=unmap", "error_policy=report")
# For so long a display that is picked may turn out to be taken.
_DISPLAY_SECONDS = 60.0
# Of a machine that is off, libvirt loses the reason where the guest was faster than its start, or a libvirtd ended.
_REASON_LOST = ("unknown", "crashed", "daemon", "failed")
# In less time libvirt starts no QEMU.
_SLOW_QUERY_SECONDS = 1.0
# A kernel's last words; ``--noreboot`` makes a restart the end too.  Those before 3.11 don't say "reboot:".
_POWERED_OFF = re.compile(r"^(?:\[ *[0-9]+\.[0-9]+\] )?(?:reboot: )?(?:Power down|Restarting system)\b")
# virtlogd writes what comes from QEMU through a pipe.
_LOG_SECONDS = 3.0
# virt-install removes its copies of kernel and initrd on SIGINT, but not before libvirt answers.
_VIRT_INSTALL_STOP_SECONDS = 60.0


def kernel_arguments(settings: ImageSettings) -> str:
    """Return the kernel's command line: the answer file, then what the user appends."""
    return " ".join(filter(None, (delivery.kernel_argument(settings), settings.append.strip())))


def option(*parts: str) -> str:
    """Join the *parts* of an option for virt-install, which splits it at commas but in double quotes.

    The parts have no double quotes themselves; see check_output_dir.
    """
    escaped = (part.replace("\\", "\\\\") for part in parts)
    return ",".join(f'"{part}"' if set(part) & set(",\\") else part for part in escaped)


def _picks_display(settings: ImageSettings) -> bool:
    """Whether libvirt picks the display of the screen; each user's picks without knowing what another's has picked."""
    return settings.vnc is not None and settings.vnc[1] is None


def _graphics(settings: ImageSettings) -> str:
    if settings.vnc is None:
        return "none"
    host, display = settings.vnc
    parts = ["vnc", f"port={-1 if display is None else 5900 + display}"]
    return ",".join([*parts, f"listen={host}"] if host else parts)


@dataclass(frozen=True)
class Media:
    """What virt-install boots the installer from: *arguments* while the build is under way, *kept* also later."""

    arguments: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Firmware:
    """UEFI for QEMU: its *code*, an empty *memory* to copy, and their *format*; None where it is not in flash."""

    code: str | None
    memory: str | None
    format: str
    secure_boot: bool


def virt_install_argv(build: Build, media: Sequence[str], virt_type: str, *, by_hand: bool = False) -> list[str]:
    """Return the command of the installation.

    *media* are virt-install's arguments for what is booted, *virt_type* is ``kvm`` or ``qemu``, or what
    stands for it.  *by_hand* is for a person, who sees the console.
    """
    settings = build.plan.settings
    network = settings.network + (f",mac={settings.mac}" if settings.mac else "")
    osinfo = settings.osinfo or "detect=on,require=off"
    # libvirt 9.0 knows no model ``max``.
    cpu = settings.cpu or {"kvm": "host-passthrough", "qemu": "mode=maximum"}.get(virt_type, "CPU")
    # ``--noreboot``: the guest must stay off until its logs are removed.
    # ``--channel none``: the socket of a guest agent's channel has too long a path in many homes.
    argv = [
        "virt-install",
        "--connect", build.plan.libvirt_uri,
        "--name", build.vm_name,
        "--virt-type", virt_type,
        *_machine(build),
        "--cpu", cpu,
        "--vcpus", str(settings.cores),
        "--memory", str(settings.ram >> 20),
        "--osinfo", osinfo,
        "--disk", option(f"path={build.disk_path}", *_DISK_OPTIONS),
        "--network", network,
        "--graphics", _graphics(settings),
        "--channel", "none",
        "--console", option("pty", "target_type=serial", f"log.file={build.console_path}"),
        *(["--autoconsole", "text"] if by_hand else ["--noautoconsole", "--wait", "-1"]),
        "--noreboot",
        *media,
        "--extra-args", kernel_arguments(settings),
    ]  # fmt: skip
    return [*argv, *_answer_file_arguments(build, by_hand=by_hand)]


def _answer_file_arguments(build: Build, *, by_hand: bool) -> list[str]:
    settings = build.plan.settings
    if settings.answer_file is None:
        return []
    seed = delivery.seed_path(build)
    if seed:
        # Without a bus: virt-install takes one that the machine has, and makes it read-only.
        return ["--disk", option(f"path={seed}", "device=cdrom", "format=raw")]
    # A person has no copy, and needs none but of what a template becomes.
    own = by_hand and not delivery.is_made(settings)
    paths = [settings.answer_file.absolute()] if own else delivery.copies(build)
    return [word for path in paths for word in ("--initrd-inject", str(path))]


def _machine(build: Build) -> list[str]:
    """Return virt-install's arguments for architecture, machine type and firmware, where they are not its own."""
    settings = build.plan.settings
    machine = arch.ARCHITECTURES[settings.arch].machines[settings.firmware]
    words = [] if arch.is_host(settings.arch) else ["--arch", settings.arch]
    words += ["--machine", machine] if machine else []
    if settings.firmware == "bios":
        return words
    # libvirt's own place would keep it, up to 64 MiB, where the machine fails to start.
    return [*words, "--boot", option(*_UEFI, f"nvram={build.directory / 'nvram.fd'}")]


def _by_hand(build: Build) -> Build:
    name = f"{build.plan.image}-by-hand"
    return Build(build.plan, build.plan.output_dir / name, f"{VM_PREFIX}{name}")


def pool_argv(build: Build) -> list[str]:
    """Return the command that makes a storage pool of the build's directory, with the name of the machine.

    virt-install would make one there that outlives the build, even libvirt itself: one more with each build.
    """
    virsh = ["virsh", "--connect", build.plan.libvirt_uri]
    return [*virsh, "pool-create-as", build.vm_name, "dir", "--target", str(build.directory)]


def by_hand_argvs(build: Build, media: Sequence[str], virt_type: str) -> list[list[str]]:
    """Return the commands by which a person repeats the installation, and sees its console."""
    plan, other = build.plan, _by_hand(build)
    return [
        ["mkdir", str(other.directory)],
        *delivery.by_hand_argvs(other),
        ["qemu-img", "create", "-q", "-f", "raw", str(other.disk_path), str(plan.settings.image_size)],
        pool_argv(other),
        virt_install_argv(other, media, virt_type, by_hand=True),
    ]


def check_libvirt(plan: Plan) -> None:
    """Raise ConfigurationError unless libvirt answers."""
    try:
        command.run(["virsh", "--connect", plan.libvirt_uri, "uri"], capture=True, timeout=_VIRSH_SECONDS)
    except BuildError as error:
        raise ConfigurationError(
            f"libvirt is not reachable at {plan.libvirt_uri}: {error.said}", hint=_libvirt_hint(plan)
        ) from error


def _libvirt_hint(plan: Plan) -> str:
    if plan.as_root:
        return "Start it: systemctl start libvirtd (package libvirt-daemon-system)."
    return "The session's libvirt starts by itself where the package libvirt-daemon is installed."


def check_output_dir(plan: Plan) -> None:
    """Raise ConfigurationError if virt-install or QEMU can't use the output directory.

    QEMU of the system's libvirt runs as a user of its own, libvirt-qemu on Debian, unless qemu.conf
    says otherwise.
    """
    # Of control characters and bytes that are no UTF-8, no XML can tell libvirt, and the helper takes none.
    if set(str(plan.output_dir)) & _NOT_IN_PATHS or not str(plan.output_dir).isprintable():
        raise ConfigurationError(
            f"[{plan.image}] output-dir: virt-install can't use {plan.output_dir}.",
            hint=f"Use a path of UTF-8 without control characters and {' '.join(sorted(_NOT_IN_PATHS))}",
        )
    # Only who has mounted it is let in by FUSE, not even root.
    if plan.as_root and (found := fuse.mount_of(plan.output_dir)) and "allow_other" not in found.options:
        raise ConfigurationError(
            f"QEMU, which libvirt runs as user {_QEMU_USER}, can't enter {found.point}: it is {found.kind} without "
            "allow_other.",
            hint="Build in another directory with --output-dir, or as an ordinary user.",
        )
    for directory in (plan.output_dir, *plan.output_dir.parents):
        if directory.exists() and plan.as_root and not _qemu_may(directory, stat.S_IXOTH):
            raise ConfigurationError(
                f"QEMU, which libvirt runs as user {_QEMU_USER}, can't enter {directory}.",
                hint="Build in another directory with --output-dir, or as an ordinary user.",
            )


def _qemu_may(path: Path, mode: int) -> bool:
    """Whether the QEMU of the system's libvirt has *mode*, bits as those of S_IRWXO, at *path*; OSError from stat."""
    if _QEMU_USER_CHANGED.search(_text_of(_QEMU_CONFIGURATION)):
        return True
    try:
        account = pwd.getpwnam(_QEMU_USER)
    except KeyError:
        return True
    status = path.stat()
    if status.st_uid == account.pw_uid:
        shift = 6
    elif status.st_gid in os.getgrouplist(_QEMU_USER, account.pw_gid):
        shift = 3
    else:
        shift = 0
    return status.st_mode >> shift & mode == mode


def warn_of_slow_libvirt(plan: Plan) -> None:
    """Warn where root's libvirt starts each QEMU anew for a query of what it can do, and measure how long that takes.

    libvirt does so as long as QEMU's user may open /dev/kvm and it does not work, and the other way round.
    """
    if not plan.as_root or plan.settings.virt_type != "auto" or not KVM_DEVICE.exists():
        return
    seconds = 0.0
    # The first one after libvirtd's start takes its time everywhere.
    for _ in range(2):
        start = time.monotonic()
        try:
            command.run(["virsh", "--connect", plan.libvirt_uri, "capabilities"], capture=True, timeout=_VIRSH_SECONDS)
        except BuildError as error:
            logger.warning("libvirt does not say what QEMU can do: %s", error.said)
            return
        seconds = time.monotonic() - start
        if seconds < _SLOW_QUERY_SECONDS:
            return
    logger.warning(
        "libvirt takes %.0f s for each query of what QEMU can do, of which an installation needs about ten: it tries "
        "%s each time. Where KVM works, let group kvm open it: chgrp kvm %s; chmod 660 %s. Where it does not, remove "
        "it: rm %s.",
        seconds,
        *[KVM_DEVICE] * 4,
    )


def check_machine(plan: Plan) -> None:
    """Raise ConfigurationError if there is no such machine, or not here: architecture, firmware, KVM."""
    settings = plan.settings
    facts = arch.ARCHITECTURES[settings.arch]
    if settings.firmware not in facts.machines:
        raise ConfigurationError(
            f"[{plan.image}] firmware: {settings.arch} has no {settings.firmware}.",
            hint=f"Use {' or '.join(facts.machines)}.",
        )
    if settings.firmware != "bios" and not uefi_firmware(settings.arch):
        raise ConfigurationError(
            f"[{plan.image}] firmware = {settings.firmware}: this machine has no UEFI for {settings.arch}.",
            hint=f"Install it: apt-get install {facts.uefi_package}",
        )
    if settings.virt_type == "kvm" and not arch.is_host(settings.arch):
        raise ConfigurationError(
            f"[{plan.image}] virt-type: KVM runs no {settings.arch} on {platform.machine()}.", hint="Use qemu or auto."
        )
    for doubt in _doubts(settings, plan.variables.get("arch", "")):
        logger.warning("[%s] %s", plan.image, doubt)


def _doubts(settings: ImageSettings, arch_text: str) -> list[str]:
    """Return sentences on what fits neither this machine nor the architecture of *settings*, given as *arch_text*."""
    doubts = []
    for key in ("linux", "initrd", "installer_image"):
        source: Source | None = getattr(settings, key)
        if not source:
            continue
        # The name of a host says nothing.
        path = str(source.path or urllib.parse.urlsplit(source.uri).path)
        named = arch.named_architectures(path)
        if re.fullmatch("i[356]86", arch_text.strip()) and re.search("amd64|x86_64", path):
            doubts.append(f"{key}: {path} is of 64 bits by its name, but arch is {arch_text.strip()}.")
        if named and settings.arch not in named:
            possible = sorted(named & arch.ARCHITECTURES.keys())
            move = f", or set arch = {possible[0]}" if possible else ""
            doubts.append(
                f"{key}: {path} is of {' and '.join(sorted(named))} by its name, but arch is {settings.arch}. "
                f"Name that of {settings.arch}{move}."
            )
    own = arch.ARCHITECTURES[settings.arch].console
    consoles = re.findall(r"\bconsole=(tty[A-Z]+[0-9]+)", settings.append)
    for other in arch.ARCHITECTURES.values():
        if other.console != own and other.console in consoles and own not in consoles:
            doubts.append(f"append: {settings.arch} has no console {other.console}. Write console={own}.")
    processors, memory = os.cpu_count() or 1, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if settings.cores > processors:
        doubts.append(
            f"cores: {settings.cores} are more than the {processors} of this machine, which makes nothing faster. "
            f"Set at most {processors}."
        )
    if settings.ram > memory:
        doubts.append(
            f"ram: {format_size(settings.ram)} is more than the {format_size(memory)} of this machine. Set less."
        )
    return doubts


def uefi_firmware(architecture: str) -> list[Firmware]:
    """Return what UEFI there is for *architecture*, in the order in which libvirt takes it."""
    found = []
    paths = {path.name: path for directory in reversed(_FIRMWARE_DIRECTORIES) for path in directory.glob("*.json")}
    for _, path in sorted(paths.items()):
        # What is no such description, libvirt can't use either.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            told = json.loads(path.read_bytes())
            if "uefi" in told["interface-types"] and any(
                target["architecture"] == architecture for target in told["targets"]
            ):
                code, memory = (told.get("mapping", {}).get(key, {}) for key in ("executable", "nvram-template"))
                parts = (code.get("filename"), memory.get("filename"), code.get("format", "raw"))
                found.append(Firmware(*parts, "secure-boot" in told.get("features", [])))
    return found


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def remove_vm(name: str) -> None:
    """Destroy and undefine the machine *name* of this user's, and its pool; it's no error if there is none.

    Where libvirt doesn't answer it is tried again for a short while.  Then QEMU at least is killed, as
    it goes on without libvirt, and BuildError says what is left.
    """
    deadline = time.monotonic() + _LIBVIRT_SECONDS
    try:
        _remove_vm(name)
    except BuildError as error:
        with waiting(f"Waiting for libvirt, to remove {name}: {error.said}"):
            _remove_vm_until(name, deadline)


def _remove_vm_until(name: str, deadline: float) -> None:
    while True:
        try:
            _remove_vm(name)
            return
        except BuildError as error:
            if time.monotonic() > deadline:
                ended = "; its QEMU was killed" if _kill_qemu(name) else ""
                raise BuildError(
                    f"The virtual machine {name} can't be removed from {libvirt_uri()}: {error.said}{ended}."
                ) from error
            time.sleep(0.5)


def _kill_qemu(name: str) -> bool:
    """Kill the QEMU of the machine *name*, and wait for its end; return whether there was one."""
    killed = False
    for process in Path("/proc").glob("[0-9]*"):
        # Those of others can't be reached, and others end meanwhile.
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(int(process.name))
            try:
                if _is_qemu_of(name, (process / "cmdline").read_bytes()):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    select.select([descriptor], [], [], _KILL_SECONDS)
                    killed = True
            finally:
                os.close(descriptor)
    return killed


def _is_qemu_of(name: str, cmdline: bytes) -> bool:
    program, *words = os.fsdecode(cmdline).split("\0")
    return Path(program).name.startswith("qemu-system-") and any(
        word == "-name" and value.split(",")[0] == f"guest={name}" for word, value in itertools.pairwise(words)
    )


def _names_argv(*states: str, what: str = "list") -> list[str]:
    return [*_virsh(), what, "--name", *states]


def _undefine_argv(name: str) -> list[str]:
    return [*_virsh(), "undefine", name, "--nvram"]


def _pool_destroy_argv(name: str) -> list[str]:
    return [*_virsh(), "pool-destroy", name]


def _virsh() -> list[str]:
    return ["virsh", "--connect", libvirt_uri()]


def _remove_vm(name: str) -> None:
    def names(*states: str, what: str = "list") -> list[str]:
        return command.run(_names_argv(*states, what=what), capture=True, timeout=_VIRSH_SECONDS).split()

    if name in names():
        # It may power off by itself at this moment.
        with contextlib.suppress(CommandError):
            command.run([*_virsh(), "destroy", name], timeout=_VIRSH_SECONDS)
    if name in names("--all"):
        command.run(_undefine_argv(name), timeout=_VIRSH_SECONDS)
    if name in names("--all"):
        raise BuildError("it is still there")
    if name in names(what="pool-list"):
        command.run(_pool_destroy_argv(name), timeout=_VIRSH_SECONDS)


def installing_argvs(build: Build, media: Sequence[str], virt_type: str) -> list[list[str]]:
    """Return the commands of an installation whose guest powers off by itself."""
    name = build.vm_name
    return [
        pool_argv(build),
        virt_install_argv(build, media, virt_type),
        _state_argv(build),
        _names_argv(),
        _names_argv("--all"),
        _undefine_argv(name),
        _names_argv("--all"),
        _names_argv(what="pool-list"),
        _pool_destroy_argv(name),
    ]


def machines() -> Iterator[tuple[str, Path]]:
    """Give the machines that builds of this user have made: their names, and where their disks are."""
    virsh = ["virsh", "--connect", libvirt_uri()]
    for name in command.run([*virsh, "list", "--all", "--name"], capture=True, timeout=_VIRSH_SECONDS).split():
        if not name.startswith(VM_PREFIX):
            continue
        try:
            xml = command.run([*virsh, "dumpxml", name], capture=True, timeout=_VIRSH_SECONDS)
        except CommandError:
            # It has gone meanwhile.
            continue
        for source in ElementTree.fromstring(xml).iterfind("devices/disk[@device='disk']/source[@file]"):
            directory = Path(source.attrib["file"]).parent
            if directory.name.startswith(WORK_PREFIX):
                yield name, directory


@contextmanager
def _explained(build: Build, media: Media, virt_type: str) -> Iterator[None]:
    """Log and keep what helps to understand a failure inside."""
    try:
        yield
    except BuildError:
        log_console(build)
        _keep_screenshot(build)
        commands = by_hand_argvs(build, media.kept, virt_type)
        logger.error("To repeat the installation by hand: %s", " && ".join(map(command_line, commands)))
        attach = ["virsh", "--connect", build.plan.libvirt_uri, "console", _by_hand(build).vm_name]
        logger.error("To attach to it from elsewhere: %s", command_line(attach))
        raise


def _keep_screenshot(build: Build) -> None:
    """Keep the machine's screen, where it has one, next to the log of its console."""
    if build.plan.settings.vnc is None:
        return
    path = build.directory / "screen.png"
    argv = ["virsh", "--connect", build.plan.libvirt_uri, "screenshot", build.vm_name, str(path)]
    try:
        command.run(argv, capture=True, timeout=_VIRSH_SECONDS)
        path.chmod(0o600)
        files.move(path, build.plan.screenshot_path)
    except (BuildError, OSError) as error:
        # The machine is off already.
        logger.warning("There is no picture of the screen: %s", error)
    else:
        logger.error("The screen is in %s", build.plan.screenshot_path)


def limits(settings: ImageSettings, virt_type: str) -> Limits:
    """Return how long the installation may take; emulation is slower."""
    whole, stall = settings.install_timeout, settings.stall_timeout
    if whole is None:
        whole = parse_duration("8h" if virt_type == "qemu" else "2h")
    if stall is None:
        stall = parse_duration("30m" if virt_type == "qemu" else "10m")
    return Limits(whole, stall)


def install(build: Build, media: Media) -> None:
    """Run the installer until the guest is off; BuildError unless it has come to its end by itself.

    InstalledError where the disk may have a whole system all the same.
    """

    virt_type = build.virt_type

    def remove() -> None:
        remove_vm(build.vm_name)
        build.vm_record.unlink(missing_ok=True)

    deadline = time.monotonic() + _DISPLAY_SECONDS
    with released(remove), _explained(build, media, virt_type):
        # Before there is a machine: it says what a killed build has left.
        build.vm_record.write_text(build.vm_name + "\n", encoding="utf-8")
        argv = virt_install_argv(build, media.arguments, virt_type)
        while True:
            command.run(pool_argv(build), timeout=_VIRSH_SECONDS)
            watcher = _run_virt_install(build, argv, virt_type, deadline)
            if watcher:
                break
            logger.info("Another machine has just taken the display; another one is picked.")
            # With its pool.
            remove_vm(build.vm_name)
        _check_end(build, watcher)


def _check_end(build: Build, watcher: Watcher) -> None:
    """Raise BuildError unless the machine, which is off, has come to its end by itself."""
    if watcher.switched_off:
        logger.warning(
            "The guest has halted, and its machine was switched off. Have %s.",
            POWER_OFF[build.plan.settings.answer_file_key],
        )
        return
    state = command.run(_state_argv(build), capture=True, timeout=_VIRSH_SECONDS).strip()
    if not powered_off(build, state):
        raise BuildError(
            f"The installation machine did not power off by itself: {state}.",
            hint=f"What it printed is in {build.plan.console_path}.",
        )


def _state_argv(build: Build) -> list[str]:
    return [*_virsh(), "domstate", "--reason", build.vm_name]


def powered_off(build: Build, state: str) -> bool:
    """Return whether the machine of *build*, in *state* as ``virsh domstate --reason`` has it, powered off by itself.

    Where libvirt has lost the reason, the last line of the console tells it, or that of libvirt's log of the machine.
    """
    if state == "shut off (shutdown)":
        return True
    if state not in (f"shut off ({reason})" for reason in _REASON_LOST):
        return False
    deadline = time.monotonic() + _LOG_SECONDS
    while True:
        if any(map(_POWERED_OFF.search, console_tail(build.console_path, 1))):
            said = "the last words of its kernel are that it powers off"
        elif any(line.endswith(": shutting down, reason=shutdown") for line in console_tail(_log_of(build), 1)):
            said = "libvirt's log of it says that it was shut down"
        elif time.monotonic() < deadline:
            with interrupts.interruptible():
                time.sleep(0.1)
            continue
        else:
            return False
        logger.info("The machine is %s, and %s.", state, said)
        return True


def _log_of(build: Build) -> Path:
    """Return the file where libvirt logs start and end of the machine of *build*."""
    if build.plan.as_root:
        return Path("/var/log/libvirt/qemu") / f"{build.vm_name}.log"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "libvirt/qemu/log" / f"{build.vm_name}.log"


def _run_virt_install(build: Build, argv: list[str], virt_type: str, deadline: float) -> Watcher | None:
    """Install; return None if libvirt, until *deadline*, has picked a display that was taken meanwhile."""
    watcher = Watcher(build, limits(build.plan.settings, virt_type))
    try:
        command.run(
            argv,
            stop_signal=signal.SIGINT,
            stop_seconds=_VIRT_INSTALL_STOP_SECONDS,
            # It puts the answer file into an initrd.
            umask=0o077,
            watch=watcher.look,
        )
    except CommandError as error:
        if any(map(_CONNECTION_LOST.search, error.last_lines)):
            raise BuildError(
                f"libvirt at {build.plan.libvirt_uri} went away during the installation: {error.said}",
                hint=_libvirt_hint(build.plan),
            ) from error
        taken = _picks_display(build.plan.settings) and any(
            "Address already in use" in line for line in error.last_lines
        )
        if taken and time.monotonic() < deadline:
            return None
        raise
    watcher.finish()
    return watcher


def has_to_probe(settings: ImageSettings) -> bool:
    """Return whether a probe of KVM decides what the machine uses: KVM runs no other architecture."""
    return settings.virt_type == "auto" and arch.is_host(settings.arch)


def probed_virt_type(plan: Plan, kernel: Path | None) -> str:
    """Return ``kvm`` if *kernel* prints under it, else ``qemu``.

    /dev/kvm may be there, and open, and useless, where this machine is a virtual one itself.
    """
    reason = why_libvirt_has_no_kvm(kernel, plan.settings.arch, as_root=plan.as_root)
    if reason is None:
        return "kvm"
    logger.warning(
        "KVM is not used: %s. Emulation takes about ten times as long. 'virt-type = kvm' or 'qemu' skips this probe.",
        reason,
    )
    return "qemu"


def probe_argv(kernel: Path, architecture: str) -> list[str]:
    """Return the command that starts *kernel* of *architecture* under KVM with its serial port on stdout."""
    machine = arch.ARCHITECTURES[architecture]
    return [
        machine.qemu,
        *machine.probe_options,
        "-accel", "kvm",
        "-m", "256",
        "-nodefaults",
        "-no-user-config",
        "-display", "none",
        "-no-reboot",
        "-serial", "stdio",
        "-kernel", str(kernel),
        "-append", f"console={machine.console} earlyprintk=serial,{machine.console} panic=-1",
    ]  # fmt: skip


def why_libvirt_has_no_kvm(kernel: Path | None, architecture: str, *, as_root: bool) -> str | None:
    """Return what is wrong with KVM as ``why_not_kvm`` does, for QEMU as the libvirt of root or the user runs it."""
    with contextlib.suppress(OSError):
        if as_root and not _qemu_may(KVM_DEVICE, stat.S_IROTH | stat.S_IWOTH):
            return f"{KVM_DEVICE}: {_QEMU_USER}, as whom libvirt runs QEMU, may not open it"
    return why_not_kvm(kernel, architecture)


def why_not_kvm(kernel: Path | None, architecture: str) -> str | None:
    """Start *kernel* of *architecture* under KVM until it prints to its serial port; return what is wrong, or None."""
    try:
        with KVM_DEVICE.open("r+b", buffering=0):
            pass
    except OSError as error:
        return f"{KVM_DEVICE}: {error.strerror}"
    if kernel is None:
        return "there is no kernel to probe it with"
    output = command.read_until(probe_argv(kernel, architecture), _PROBE_BANNER, PROBE_SECONDS)
    if _PROBE_BANNER in output:
        return None
    return f"the installer's kernel printed nothing under it within {PROBE_SECONDS:.0f} s"


def console_tail(path: Path, lines: int = 40) -> list[str]:
    """Return the last *lines* that the guest printed, fit to be shown; empty if there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 64 * 1024))
            data = file.read()
    except OSError:
        return []
    console = Console()
    shown = [*console.feed(_OVERWRITTEN.sub(b"", data)), console.line]
    return [line for line in shown if line][-lines:]


def log_console(build: Build) -> None:
    """Log the end of what the guest of *build* printed, as it tells why the installation failed."""
    path = build.console_path if build.console_path.exists() else build.plan.console_path
    for line in console_tail(path):
        logger.error("console: %s", line)
