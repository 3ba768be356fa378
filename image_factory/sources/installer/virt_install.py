"""The installation in a virtual machine: virt-install's command line, its run, and how it has ended."""

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...base import command, files, interrupts
from ...base.cleanup import released
from ...base.errors import BuildError, CommandError, command_line
from ...base.log import logger
from ...base.units import parse_duration
from ...configuration.settings import ImageSettings
from ...machines import arch, console, libvirt
from ...model import VM_PREFIX, Build
from . import delivery
from .installers import POWER_OFF
from .watch import Limits, Watcher

# An installer's kernel without a boot loader is not signed, so UEFI starts it without secure boot only.
_UEFI = ("firmware=efi", "firmware.feature0.name=secure-boot", "firmware.feature0.enabled=no")

# libvirt's client says this when the daemon goes away under it.
_CONNECTION_LOST = re.compile(
    r"Cannot (?:write|read|recv) data|End of file while reading data|client socket is closed|[Ff]ailed to connect"
)

# ``cache=unsafe``: the disk is thrown away when the installation fails.
# ``error_policy=report``: when the host's disk is full the guest gets an error; by default QEMU would
# stop it and wait for ever.
_DISK_OPTIONS = ("bus=virtio", "format=raw", "cache=unsafe", "discard=unmap", "error_policy=report")
# A display that libvirt has picked may turn out to be taken; another one is picked for so long.
_DISPLAY_SECONDS = 60.0
# libvirt loses the reason why a machine is off where the guest was faster than its start, or a libvirtd ended.
_REASON_LOST = ("unknown", "crashed", "daemon", "failed")
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

    The parts have no double quotes themselves; see machinecheck.check_output_dir.
    """
    escaped = (part.replace("\\", "\\\\") for part in parts)
    return ",".join(f'"{part}"' if set(part) & set(",\\") else part for part in escaped)


def _picks_display(settings: ImageSettings) -> bool:
    """Return whether libvirt picks the display of the screen; each user's picks, not knowing another's choice."""
    return settings.vnc is not None and settings.vnc[1] is None


def _graphics(settings: ImageSettings) -> str:
    if settings.vnc is None:
        return "none"
    host, display = settings.vnc
    parts = ["vnc", f"port={-1 if display is None else 5900 + display}"]
    return ",".join([*parts, f"listen={host}"] if host else parts)


@dataclass(frozen=True)
class Media:
    """Arguments for what virt-install boots: *arguments* while the build is under way, *kept* also later."""

    arguments: tuple[str, ...]
    kept: tuple[str, ...]


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
        "--connect", libvirt.uri(),
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
        # virt-install takes a bus that the machine has, where none is named, and makes the disk read-only.
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
    return libvirt.virsh("pool-create-as", build.vm_name, "dir", "--target", str(build.directory))


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


def installing_argvs(build: Build, media: Sequence[str], virt_type: str) -> list[list[str]]:
    """Return the commands of an installation whose guest powers off by itself."""
    return [
        pool_argv(build),
        virt_install_argv(build, media, virt_type),
        _state_argv(build),
        *libvirt.removing_argvs(build.vm_name),
    ]


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
        attach = libvirt.virsh("console", _by_hand(build).vm_name)
        logger.error("To attach to it from elsewhere: %s", command_line(attach))
        raise


def _keep_screenshot(build: Build) -> None:
    """Keep the machine's screen, where it has one, next to the log of its console."""
    if build.plan.settings.vnc is None:
        return
    path = build.directory / "screen.png"
    argv = libvirt.virsh("screenshot", build.vm_name, str(path))
    try:
        command.run(argv, capture=True, timeout=libvirt.VIRSH_SECONDS)
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
        libvirt.remove_vm(build.vm_name)
        build.vm_record.unlink(missing_ok=True)

    deadline = time.monotonic() + _DISPLAY_SECONDS
    with released(remove), _explained(build, media, virt_type):
        # The record stands before there is a machine: it says what a killed build has left.
        build.vm_record.write_text(build.vm_name + "\n", encoding="utf-8")
        argv = virt_install_argv(build, media.arguments, virt_type)
        while True:
            command.run(pool_argv(build), timeout=libvirt.VIRSH_SECONDS)
            watcher = _run_virt_install(build, argv, virt_type, deadline)
            if watcher:
                break
            logger.info("Another machine has just taken the display; another one is picked.")
            # The machine goes with its pool, which the next one makes anew.
            libvirt.remove_vm(build.vm_name)
        _check_end(build, watcher)


def _check_end(build: Build, watcher: Watcher) -> None:
    """Raise BuildError unless the machine, which is off, has come to its end by itself."""
    if watcher.switched_off:
        logger.warning(
            "The guest has halted, and its machine was switched off. Have %s.",
            POWER_OFF[build.plan.settings.answer_file_key],
        )
        return
    state = command.run(_state_argv(build), capture=True, timeout=libvirt.VIRSH_SECONDS).strip()
    if not powered_off(build, state):
        raise BuildError(
            f"The installation machine did not power off by itself: {state}.",
            hint=f"What it printed is in {build.plan.console_path}.",
        )


def _state_argv(build: Build) -> list[str]:
    return libvirt.virsh("domstate", "--reason", build.vm_name)


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
        if any(map(_POWERED_OFF.search, console.tail(build.console_path, 1))):
            said = "the last words of its kernel are that it powers off"
        elif any(line.endswith(": shutting down, reason=shutdown") for line in console.tail(_log_of(build), 1)):
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
            # virt-install writes an initrd with the answer file, which nobody else is to read.
            umask=0o077,
            watch=watcher.look,
        )
    except CommandError as error:
        if any(map(_CONNECTION_LOST.search, error.last_lines)):
            raise BuildError(
                f"libvirt at {libvirt.uri()} went away during the installation: {error.said}",
                hint=libvirt.how_to_start(),
            ) from error
        taken = _picks_display(build.plan.settings) and any(
            "Address already in use" in line for line in error.last_lines
        )
        if taken and time.monotonic() < deadline:
            return None
        raise
    watcher.finish()
    return watcher


def log_console(build: Build) -> None:
    """Log the end of what the guest of *build* printed, as it tells why the installation failed."""
    path = build.console_path if build.console_path.exists() else build.plan.console_path
    for line in console.tail(path):
        logger.error("console: %s", line)
