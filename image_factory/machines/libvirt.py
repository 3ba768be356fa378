"""The libvirt of this user: its machines, and the QEMU that it runs."""

import contextlib
import itertools
import os
import pwd
import re
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from ..base import command
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..base.log import logger, waiting

QEMU_USER = "libvirt-qemu"
_QEMU_CONFIGURATION = Path("/etc/libvirt/qemu.conf")
_QEMU_USER_CHANGED = re.compile(r"^\s*user\s*=", re.MULTILINE)
VIRSH_SECONDS = 60.0
# A libvirtd that was killed is started again by systemd, or by the next command of the session's user.
_LIBVIRT_SECONDS = 10.0
_KILL_SECONDS = 10.0


def uri() -> str:
    """Return the libvirt that this user's machines run in: root's is the system's."""
    return "qemu:///system" if os.geteuid() == 0 else "qemu:///session"


def virsh(*words: str) -> list[str]:
    """Return the command of virsh with *words*."""
    return ["virsh", "--connect", uri(), *words]


def check() -> None:
    """Raise ConfigurationError unless libvirt answers."""
    try:
        command.run(virsh("uri"), capture=True, timeout=VIRSH_SECONDS)
    except BuildError as error:
        raise ConfigurationError(f"libvirt is not reachable at {uri()}: {error.said}", hint=how_to_start()) from error


def how_to_start() -> str:
    """Return a hint for users whose libvirt does not answer."""
    if os.geteuid() == 0:
        return "Start it: systemctl start libvirtd (package libvirt-daemon-system)."
    return "The session's libvirt starts by itself where the package libvirt-daemon is installed."


def qemu_may(path: Path, mode: int) -> bool:
    """Return whether the QEMU of the system's libvirt has *mode*, bits of S_IRWXO, at *path*; OSError from stat."""
    if _QEMU_USER_CHANGED.search(_text_of(_QEMU_CONFIGURATION)):
        return True
    try:
        account = pwd.getpwnam(QEMU_USER)
    except KeyError:
        return True
    status = path.stat()
    if status.st_uid == account.pw_uid:
        shift = 6
    elif status.st_gid in os.getgrouplist(QEMU_USER, account.pw_gid):
        shift = 3
    else:
        shift = 0
    return status.st_mode >> shift & mode == mode


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
                    f"The virtual machine {name} can't be removed from {uri()}: {error.said}{ended}."
                ) from error
            time.sleep(0.5)


def _kill_qemu(name: str) -> bool:
    """Kill the QEMU of the machine *name*, and wait for its end; return whether there was one."""
    killed = False
    for process in Path("/proc").glob("[0-9]*"):
        # Processes of other users can't be reached, and some end meanwhile.
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
    return virsh(what, "--name", *states)


def _undefine_argv(name: str) -> list[str]:
    return virsh("undefine", name, "--nvram")


def _pool_destroy_argv(name: str) -> list[str]:
    return virsh("pool-destroy", name)


def removing_argvs(name: str) -> list[list[str]]:
    """Return the commands of ``remove_vm`` where the machine *name* is off."""
    return [
        _names_argv(),
        _names_argv("--all"),
        _undefine_argv(name),
        _names_argv("--all"),
        _names_argv(what="pool-list"),
        _pool_destroy_argv(name),
    ]


def _remove_vm(name: str) -> None:
    def names(*states: str, what: str = "list") -> list[str]:
        return command.run(_names_argv(*states, what=what), capture=True, timeout=VIRSH_SECONDS).split()

    if name in names():
        # The machine may power off by itself at this moment.
        with contextlib.suppress(CommandError):
            command.run(virsh("destroy", name), timeout=VIRSH_SECONDS)
    if name in names("--all"):
        command.run(_undefine_argv(name), timeout=VIRSH_SECONDS)
    if name in names("--all"):
        raise BuildError("it is still there")
    if name in names(what="pool-list"):
        command.run(_pool_destroy_argv(name), timeout=VIRSH_SECONDS)


def machines(prefix: str) -> Iterator[tuple[str, Path]]:
    """Give the machines of this user whose names begin with *prefix*: name, and directory of each disk.

    Warns where libvirt can't be asked: builds without an installation have none, and need no libvirt.
    """
    try:
        names = command.run(_names_argv("--all"), capture=True, timeout=VIRSH_SECONDS).split()
    except BuildError as error:
        logger.warning("Whether a killed build has left a virtual machine is not known: %s.", error.said.rstrip("."))
        return
    for name in names:
        if not name.startswith(prefix):
            continue
        try:
            xml = command.run(virsh("dumpxml", name), capture=True, timeout=VIRSH_SECONDS)
        except CommandError:
            # The machine has gone meanwhile.
            continue
        for source in ElementTree.fromstring(xml).iterfind("devices/disk[@device='disk']/source[@file]"):
            yield name, Path(source.attrib["file"]).parent
