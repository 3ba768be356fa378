"""The machine of a test boot: its files, and the commands that make and start it."""

import base64
import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...base import command
from ...base.cleanup import released
from ...base.errors import ConfigurationError
from ...base.units import parse_duration
from ...configuration.settings import ImageSettings
from ...machines import arch
from ...machines.devices import DISKS, NETWORKS, SECURE_BOOT, TPM, Device, of_kind
from ...machines.firmware import Firmware, uefi_firmware
from ...model import Artifact, Build
from ...outputs import OUTPUTS, opened
from . import ramdisk
from .report import PORT, credentials, seed_files

HOST = "127.0.0.1"
# What QEMU calls the disk, and the pipe by which it is told what to do.
DISK_NODE = "disk"
MONITOR = "monitor"
# What a machine without a disk boots with, in the place of a firmware.
KERNEL = "kernel"
_UEFI = ("uefi", SECURE_BOOT)

# What the kernel logs of emulation, and not of the image.  It counts the ticks of a timer when it starts
# (arch/x86/kernel/apic/io_apic.c), which come late where the host has much to do; it then takes another way to it.
# Its watchdog (kernel/watchdog.c) can't tell a program that hangs from a processor that the host is too busy for.
_ERRORS_OF_EMULATION = (
    r"^\.\.MP-BIOS bug: 8254 timer not connected to IO-APIC",
    r"^watchdog: BUG: soft lockup - CPU#\d+ stuck for \d+s!",
)
# What a kernel logs of a TPM that knows more digests than the kernel has built in, of which it then takes others
# (security/integrity/ima/ima_crypto.c).
_ERRORS_OF_TPM = (r"^ima: Can not allocate sha\d+ \(reason: -2\)",)


# What runs on any x86-64; all other distributions are for x86-64-v2.  An image that says nothing may be of these.
_FIRST_X86_64 = (None, "Debian", "Ubuntu", "Fedora")


@dataclass(frozen=True)
class Purpose:
    """What a machine is booted for.

    Its directory is *name* with its number, its disk the image's size times *growth*, its sshd listens on *port*.
    *given* returns the files of its seed and the credentials of its SMBIOS, so many as *credentials* says, once there
    is its key.  *reboots* is whether it may, and *monitored* whether QEMU is told what to do while it runs.
    """

    name: str
    growth: int
    port: int
    given: Callable[["Machine"], tuple[dict[str, str], dict[str, str]]]
    reboots: bool = False
    monitored: bool = False
    credentials: int = 2


def _given(machine: "Machine") -> tuple[dict[str, str], dict[str, str]]:
    key = machine.public_key
    return seed_files(key, f"image-factory-{secrets.token_hex(4)}"), credentials(key)


# Twice the size shows whether the root grows.
TEST = Purpose("boot", 2, 22, _given)


@dataclass(frozen=True)
class Machine:
    """The machine of one boot of *artifact*; *number* tells the boots of a build apart.

    *restricted* is whether it reaches no network.  *layers* counts the overlays that it has filled before the one that
    it has now.  *ram* are the bytes of its memory, 0 for what the settings say; without a disk it is not known before.
    *kept* is where its overlay is made, in the place of one that goes with its directory.
    *devices* are words of a matrix; of each kind it has one, the usual one where nothing is said.
    """

    build: Build
    artifact: Artifact
    firmware: str
    virt_type: str
    number: int
    purpose: Purpose = TEST
    restricted: bool = False
    layers: int = 0
    ram: int = 0
    kept: Path | None = None
    devices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a log calls it."""
        return machine_name(self.firmware, self.devices)

    @property
    def disk(self) -> Device:
        """What its disk is on."""
        return DISKS[of_kind(DISKS, self.devices)[0]]

    @property
    def network(self) -> Device:
        """Its network card."""
        return NETWORKS[of_kind(NETWORKS, self.devices)[0]]

    @property
    def has_tpm(self) -> bool:
        """Whether it has a TPM 2.0."""
        return TPM in self.devices

    @property
    def has_disk(self) -> bool:
        """Whether it boots a disk, and not a kernel with its ramdisk."""
        return self.firmware != KERNEL

    @property
    def directory(self) -> Path:
        """The directory of all its files."""
        return self.build.directory / f"{self.purpose.name}-{self.number}"

    @property
    def errors_allowed(self) -> tuple[str, ...]:
        """The regular expressions of errors in the kernel's log that fail no check."""
        of_emulation = _ERRORS_OF_EMULATION if self.virt_type == "qemu" else ()
        of_tpm = _ERRORS_OF_TPM if self.has_tpm else ()
        return (*self.build.plan.settings.kernel_errors_allowed, *of_emulation, *of_tpm)

    @property
    def overlay(self) -> Path:
        """The file of its disk, an overlay on the image, or on those before; QEMU may open it by its name once more."""
        return self.kept or self.directory / f"overlay-{self.layers}.qcow2"

    @property
    def seed(self) -> Path:
        """The file of its CD, the NoCloud seed."""
        return self.directory / "seed.iso"

    @property
    def seed_source(self) -> Path:
        """The directory of what is on the seed."""
        return self.directory / "seed"

    @property
    def key(self) -> Path:
        """The private key of the seed's user; the public one is beside it."""
        return self.directory / "key"

    @property
    def public_key(self) -> str:
        """The public key, which is there when the machine is prepared."""
        return self.key.with_suffix(".pub").read_text(encoding="ascii").strip()

    @property
    def known_hosts(self) -> Path:
        """The file of the host keys that the guest has told."""
        return self.directory / "known_hosts"

    @property
    def nvram(self) -> Path:
        """The file of the firmware's variables, for UEFI."""
        return self.directory / "nvram.fd"

    @property
    def tpm(self) -> Path:
        """The directory of its TPM's state."""
        return self.directory / "tpm"

    @property
    def larger_size(self) -> int:
        """The size of the overlay's disk."""
        return self.purpose.growth * self.artifact.virtual_size

    def pipe(self, name: str) -> Path:
        """Return the path of the pipe *name*, to which QEMU adds .in and .out."""
        return self.directory / name

    @property
    def credentials(self) -> list[Path]:
        """The files of the strings for the machine's SMBIOS."""
        return [self.directory / f"credential-{number}" for number in range(self.purpose.credentials)]


def machine_name(firmware: str, devices: Sequence[str]) -> str:
    """Return what a machine with *firmware*, or a kernel of its own, and with *devices* is called."""
    return ", ".join(("its kernel" if firmware == KERNEL else firmware, *devices))


def time_limit(settings: ImageSettings, virt_type: str) -> float:
    """Return the seconds that a boot may take; emulation is slower."""
    limit = settings.test_boot_timeout
    return parse_duration("30m" if virt_type == "qemu" else "10m") if limit is None else limit


def processors_of(settings: ImageSettings, virt_type: str) -> int:
    """Return how many processors the machine has."""
    # Emulation of two processors now and then mixes up old and new code of a kernel that patches itself.
    return 1 if virt_type == "qemu" else settings.cores


def firmware_for(architecture: str, name: str = "uefi") -> Firmware:
    """Return the UEFI *name* of FIRMWARES, as files for QEMU; ConfigurationError if there is none.

    That of Secure Boot starts only what Microsoft has signed, the other one anything.
    """
    for found in uefi_firmware(architecture):
        is_wanted = found.enrolled if name == SECURE_BOOT else not found.secure_boot
        if is_wanted and found.code and found.memory:
            return found
    kind = "with Secure Boot and Microsoft's keys" if name == SECURE_BOOT else "without secure boot"
    raise ConfigurationError(
        f"There is no UEFI for {architecture} {kind} on this machine.",
        hint=f"Install it: apt-get install {arch.ARCHITECTURES[architecture].uefi_package}",
    )


def overlay_argv(machine: Machine) -> list[str]:
    """Return the command that makes the overlay, whose backing file QEMU opens read-only."""
    artifact = machine.artifact
    return [
        "qemu-img", "create", "-q",
        "-f", "qcow2",
        "-F", OUTPUTS[artifact.format].driver,
        "-b", opened(artifact),
        str(machine.overlay),
        str(machine.larger_size or "SIZE"),
    ]  # fmt: skip


def source_argvs(machine: Machine) -> list[list[str]]:
    """Return the commands that have there what *machine* boots."""
    if machine.has_disk:
        return [overlay_argv(machine)]
    unpacking = ramdisk.unpacking_argv(machine.artifact.path, machine.directory)
    return [unpacking, ramdisk.measuring_argv(machine.directory)]


def key_argv(machine: Machine) -> list[str]:
    """Return the command that makes the throw-away key."""
    return ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "image-factory", "-f", str(machine.key)]


def seed_argv(machine: Machine) -> list[str]:
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


def tpm_argv(descriptor: int | str) -> list[str]:
    """Return the command of a TPM 2.0, which QEMU reaches at *descriptor* and which has its state where it runs."""
    return ["swtpm", "socket", "--tpm2", "--tpmstate", "dir=.", "--ctrl", f"type=unixio,clientfd={descriptor}"]


def qemu_argv(machine: Machine, mac: str, port: int | str, tpm: int | str = "TPM") -> list[str]:
    """Return the command of the machine, whose sshd is at *port* of 127.0.0.1, and its TPM at the descriptor *tpm*."""
    settings = machine.build.plan.settings
    facts = arch.ARCHITECTURES[settings.arch]
    emulated = machine.virt_type == "qemu"
    # SeaBIOS without graphics prints on the serial port what it can't boot.
    options = [facts.test_machine, "graphics=off", f"accel={'tcg' if emulated else 'kvm'}"]
    flash: list[str] = []
    if machine.firmware in _UEFI:
        found = firmware_for(settings.arch, machine.firmware)
        options += ["pflash0=code", "pflash1=memory", *(["smm=on"] if found.smm else [])]
        # Only its own code may write to its memory.
        flash += ["-global", "driver=cfi.pflash01,property=secure,value=on"] if found.smm else []
        flash += _blockdev("code", found.format, str(found.code), read_only=True)
        flash += _blockdev("memory", found.format, str(machine.nvram))
    network = f"user,id=network,hostfwd=tcp:{HOST}:{port}-:{machine.purpose.port}"
    if machine.restricted:
        network += ",restrict=on"
    return [
        facts.qemu,
        "-name", machine.build.vm_name,
        "-machine", ",".join(options),
        "-cpu", _emulated_cpu(settings) if emulated else "host",
        "-smp", str(processors_of(settings, machine.virt_type)),
        "-m", _memory(machine),
        "-nodefaults",
        "-no-user-config",
        *([] if machine.purpose.reboots else ["-no-reboot"]),
        "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        *flash,
        # USB's disk would offer its own bus to the CD.
        "-device", "virtio-scsi-pci,id=controller",
        *(_disk_options(machine) if machine.has_disk else ramdisk.options(machine.directory, facts.console)),
        *_blockdev("seed", "raw", str(machine.seed), read_only=True),
        "-device", "scsi-cd,bus=controller.0,drive=seed",
        "-netdev", network,
        # Leave out the ROM, so that no firmware tries to boot from the network.
        *_device_options(machine.network, f"netdev=network,mac={mac},romfile="),
        "-device", "virtio-rng-pci",
        "-chardev", f"pipe,id=console,path={_escaped(machine.pipe('console'))}",
        "-serial", "chardev:console",
        "-chardev", f"pipe,id=report,path={_escaped(machine.pipe('report'))}",
        "-device", "virtio-serial-pci",
        "-device", f"virtserialport,chardev=report,name={PORT}",
        *(word for path in machine.credentials for word in ("-smbios", f"type=11,path={_escaped(path)}")),
        *(_tpm_options(facts.tpm, tpm) if machine.has_tpm else []),
        *(monitor_argv(machine) if machine.purpose.monitored else []),
    ]  # fmt: skip


def _memory(machine: Machine) -> str:
    """Return the MiB of its memory, in capitals where only the build knows them."""
    if not machine.has_disk and not machine.ram:
        return "MEMORY"
    return str((machine.ram or machine.build.plan.settings.ram) >> 20)


def _disk_options(machine: Machine) -> list[str]:
    disk = _blockdev(DISK_NODE, "qcow2", str(machine.overlay))
    return [*disk, *_device_options(machine.disk, f"drive={DISK_NODE},bootindex=1")]


def _device_options(device: Device, properties: str) -> list[str]:
    *others, own = device.options
    return [word for option in (*others, f"{own},{properties}") for word in ("-device", option)]


def _tpm_options(device: str, descriptor: int | str) -> list[str]:
    chardev = f"socket,id=tpm,fd={descriptor}"
    return ["-chardev", chardev, "-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", f"{device},tpmdev=tpm"]


def monitor_argv(machine: Machine) -> list[str]:
    """Return the options of QEMU's monitor, which reads and answers at the machine's pipe."""
    path = _escaped(machine.pipe(MONITOR))
    return ["-chardev", f"pipe,id={MONITOR},path={path}", "-mon", f"chardev={MONITOR},mode=control"]


def _emulated_cpu(settings: ImageSettings) -> str:
    facts = arch.ARCHITECTURES[settings.arch]
    is_image = settings.source == "image" and settings.distribution not in _FIRST_X86_64
    if settings.kickstart or settings.agama or is_image or not facts.flawed_feature:
        return facts.test_cpu
    return f"{facts.test_cpu},-{facts.flawed_feature}"


def block_node(name: str, image_format: str, path: str, *, read_only: bool = False) -> dict[str, object]:
    """Return what QEMU is told of the file *path*, which it calls *name*."""
    # ``no-flush``: the overlay is thrown away, so nothing has to be safe on this machine's disk.
    cache = {"no-flush": True}
    file = {"driver": "file", "filename": path, "read-only": read_only, "cache": cache}
    return {"driver": image_format, "node-name": name, "read-only": read_only, "cache": cache, "file": file}


def _blockdev(name: str, image_format: str, path: str, *, read_only: bool = False) -> list[str]:
    return ["-blockdev", json.dumps(block_node(name, image_format, path, read_only=read_only))]


def _escaped(path: Path) -> str:
    """Return *path* as a value among QEMU's options, which are separated by commas."""
    return str(path).replace(",", ",,")


def free_port() -> int:
    """Return a port of HOST that nobody has now; another program may take it before QEMU does."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


def other_mac() -> str:
    """Return a MAC address that is not the installation machine's, which may be any of QEMU's range 52:54:00."""
    # The second bit of the first byte means: locally administered.
    return ":".join(["02", *(f"{byte:02x}" for byte in secrets.token_bytes(5))])


@contextmanager
def prepared(machine: Machine) -> Iterator[Machine]:
    """Make the files of *machine*, and remove them at the end; give it with the memory that it takes."""
    machine.directory.mkdir(mode=0o700)
    with released(lambda: shutil.rmtree(machine.directory)):
        if machine.has_disk:
            command.run(overlay_argv(machine))
        else:
            command.run(ramdisk.unpacking_argv(machine.artifact.path, machine.directory))
            least = machine.build.plan.settings.ram
            machine = dataclasses.replace(machine, ram=ramdisk.memory_for(machine.directory, least))
        command.run(key_argv(machine))
        machine.seed_source.mkdir()
        seed, strings = machine.purpose.given(machine)
        for name, text in seed.items():
            (machine.seed_source / name).write_text(text, encoding="utf-8")
        command.run(seed_argv(machine))
        for path, (name, text) in zip(machine.credentials, strings.items(), strict=True):
            path.write_text(f"io.systemd.credential.binary:{name}={base64.b64encode(text.encode()).decode()}")
        if machine.firmware in _UEFI:
            found = firmware_for(machine.build.plan.settings.arch, machine.firmware)
            shutil.copyfile(str(found.memory), machine.nvram)
        yield machine


@contextmanager
def tpm_running(machine: Machine) -> Iterator[int]:
    """Have the TPM of *machine* run inside; give the descriptor at which QEMU reaches it."""
    machine.tpm.mkdir(mode=0o700, exist_ok=True)
    # What has no name is not too long for a socket's, and is gone with both.
    ours, its = socket.socketpair()
    with ours, its:
        argv = tpm_argv(its.fileno())
        with command.background(argv, machine.directory / "tpm.log", cwd=machine.tpm, pass_fds=[its.fileno()]):
            its.close()
            yield ours.fileno()


@contextmanager
def pipes(machine: Machine) -> Iterator[tuple[int, int]]:
    """Make the machine's pipes; give the ends for reading of the console and of the report."""
    for name in ("console", "report", MONITOR):
        for direction in ("in", "out"):
            path = Path(f"{machine.pipe(name)}.{direction}")
            # A try whose port was taken has left one.
            path.unlink(missing_ok=True)
            os.mkfifo(path, 0o600)
    with contextlib.ExitStack() as stack:
        descriptors = []
        for name in ("console", "report"):
            descriptor = os.open(f"{machine.pipe(name)}.out", os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, descriptor)
            descriptors.append(descriptor)
        yield descriptors[0], descriptors[1]
