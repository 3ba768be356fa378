"""Namespaces of a build's own: whatever happens, the kernel ends their processes and removes their mounts.

In them an ordinary user is root of a range of users, which newuidmap (package uidmap) gives; it needs no sudo rule.
"""

import os
import pwd
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import command, interrupts
from ..base.errors import BuildError, CommandError, ConfigurationError

# So many users and groups a distribution expects to have.
_USERS = 65536
_RANGES = (Path("/etc/subuid"), Path("/etc/subgid"))
# Variables that change what programs write.
_HABITS = ("TZ", "LANG", "LANGUAGE", "TMPDIR", "XZ_OPT", "XZ_DEFAULTS", "GZIP", "ZSTD_CLEVEL", "POSIXLY_CORRECT")
# Programs take them for a word of their user, or of who called them.
_NO_PART = ("DPKG_", "SUDO_")
# Shared memory of System V, which a database leaves that is killed, ends with that of IPC.
_KINDS = ("--mount", "--uts", "--pid", "--ipc")
_START_SECONDS = 30.0
_POLL_SECONDS = 0.02

# Each forbids user namespaces with the first value: those of the kernel, of Debian's, and of AppArmor in Ubuntu's.
_SETTINGS = {
    Path("/proc/sys/user/max_user_namespaces"): ("0", "15000"),
    Path("/proc/sys/kernel/unprivileged_userns_clone"): ("0", "1"),
    Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"): ("1", "0"),
}

# A function of shell that makes the directory $1 a /proc in which the kernel can't be told anything.
MAKE_PROC = """\
make_proc() {
    mount -t proc -o nosuid,nodev,noexec proc "$1"
    mount --bind "$1/sys" "$1/sys"
    mount -o remount,bind,ro,nosuid,nodev,noexec "$1/sys"
    [ ! -e "$1/sysrq-trigger" ] || mount --bind /dev/null "$1/sysrq-trigger"
    # Packages of emulators mount it to register them, if it is not there, and the kernel has one for all systems.
    if mount -t binfmt_misc -o nosuid,nodev,noexec binfmt_misc "$1/sys/fs/binfmt_misc" 2>/dev/null; then
        mount -o remount,bind,ro,nosuid,nodev,noexec "$1/sys/fs/binfmt_misc"
    fi
}
"""

# A function of shell that makes the directory $1 a /dev of its own, with what each system has there.
MAKE_DEVICES = """\
make_devices() {
    mount -t tmpfs -o nosuid,mode=755,size=1M dev "$1"
    for name in null zero full random urandom tty; do
        : >"$1/$name"
        mount --bind "/dev/$name" "$1/$name"
    done
    mkdir "$1/pts" "$1/shm"
    mount -t devpts -o newinstance,nosuid,noexec,ptmxmode=666,mode=620,gid=5 devpts "$1/pts"
    mount -t tmpfs -o nosuid,nodev,mode=1777,size=1G shm "$1/shm"
    ln -s pts/ptmx "$1/ptmx"
    ln -s /proc/self/fd "$1/fd"
    ln -s /proc/self/fd/0 "$1/stdin"
    ln -s /proc/self/fd/1 "$1/stdout"
    ln -s /proc/self/fd/2 "$1/stderr"
}
"""

# Packages such as mail servers keep the name of the machine that they are installed on.  proc of this machine is still
# mounted: it has the number that the process has outside.
_HOLD = 'hostname localhost && read -r pid rest </proc/self/stat && echo "$pid" && exec sleep infinity'


def programs(*, as_root: bool) -> list[str]:
    """Return the programs that are needed."""
    return ["unshare", "nsenter", "hostname", *([] if as_root else ["newuidmap"])]


def check(*, as_root: bool) -> None:
    """Raise ConfigurationError unless this user can have namespaces here; the programs are there."""
    if as_root:
        return
    user = pwd.getpwuid(os.geteuid())
    for path in _RANGES:
        if not any(_has_range(line, user) for line in _lines(path)):
            raise ConfigurationError(
                f"{path} has no range of {_USERS} for {user.pw_name}.",
                hint=f"Add one: sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user.pw_name}",
            )
    try:
        command.run([*_unshare(as_root=False), "true"], quiet=True, timeout=_START_SECONDS)
    except BuildError as error:
        setting, wanted = _forbidden()
        if setting:
            raise ConfigurationError(
                f"This machine gives {user.pw_name} no user namespace, as sysctl {setting} forbids it.",
                hint=f"Allow them: sudo sysctl {setting}={wanted}; a file in /etc/sysctl.d has it stay.",
            ) from error
        raise ConfigurationError(
            f"This machine gives {user.pw_name} no user namespace: {error.said}.",
            hint="Build as root, or see newuidmap(1) and user_namespaces(7) for what it may lack.",
        ) from error


def _forbidden() -> tuple[str, str]:
    """Return the setting of this machine's kernel that forbids user namespaces, and what allows them; else nothing."""
    for path, (forbids, allows) in _SETTINGS.items():
        if _lines(path) == [forbids]:
            return _setting_name(path), allows
    return "", ""


def _setting_name(path: Path) -> str:
    """Return what sysctl calls the setting at *path*, below /proc/sys."""
    return ".".join(path.parts[3:])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _has_range(line: str, user: pwd.struct_passwd) -> bool:
    name, _, numbers = line.partition(":")
    count = numbers.rpartition(":")[2]
    return name in (user.pw_name, str(user.pw_uid)) and count.isdigit() and int(count) >= _USERS - 1


def _unshare(*, as_root: bool) -> list[str]:
    users = [] if as_root else ["--user", "--map-root-user", "--map-auto"]
    return ["unshare", *users, *_KINDS, "--fork", "--kill-child"]


def holding_argv(*, as_root: bool, within: int | str | None = None) -> list[str]:
    """Return the command that has the namespaces until it is killed, *within* those of a process if one is given."""
    if within is None:
        return [*_unshare(as_root=as_root), "sh", "-c", _HOLD]
    # Who has them is root there already.
    return entering_argv(within, *_unshare(as_root=True), "sh", "-c", _HOLD, as_root=as_root)


def entering_argv(pid: int | str, *words: str, as_root: bool) -> list[str]:
    """Return the command that runs *words* in the namespaces of process *pid*."""
    users = [] if as_root else ["--user"]
    return ["nsenter", f"--target={pid}", *users, *_KINDS, "--", *words]


def _environment() -> dict[str, str]:
    """Return the environment of what runs inside: root's programs are found, and no paths of the user's are there."""
    own = ("TMPDIR", "APT_CONFIG", "HOME", "LD_LIBRARY_PATH", "LD_PRELOAD", *_HABITS)
    kept = {name: value for name, value in os.environ.items() if name not in own and not name.startswith(_NO_PART)}
    return kept | {"PATH": command.search_path(), "HOME": "/root"}


@dataclass(frozen=True)
class Namespaces:
    """Those of process *pid*, in which commands can be run as root."""

    pid: int
    as_root: bool

    def run(self, *words: str, variables: Mapping[str, str] | None = None, **keywords: Any) -> str:
        """Run the command *words* inside, as ``command.run`` does, with *variables* besides those of all."""
        argv = entering_argv(self.pid, *words, as_root=self.as_root)
        # A user's umask, like the variables, has no part in what is made.
        return command.run(argv, env=_environment() | dict(variables or {}), umask=0o022, **keywords)

    def read(self, source: Sequence[str], *words: str, **keywords: Any) -> list[CommandError]:
        """Run the command *words* inside, which reads what the command *source* prints, as ``command.stream`` does."""
        argv = entering_argv(self.pid, *words, as_root=self.as_root)
        return command.stream(source, argv, env=_environment(), **keywords)


@contextmanager
def entered(directory: Path, *, as_root: bool, within: int | None = None) -> Iterator[Namespaces]:
    """Give namespaces, which end on the way out; what their first process says is in a file in *directory*.

    They are *within* those of a process if one is given: they see what is mounted there, and end with it.
    """
    path = directory / "namespaces.log"
    with command.background(holding_argv(as_root=as_root, within=within), path) as ended:
        pid = _pid(path, ended)
        try:
            holder = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise BuildError("Namespaces can't be had: their first process was killed.") from error
        try:
            yield Namespaces(pid, as_root)
        finally:
            _end(holder, ended)
            os.close(holder)
    path.unlink()


def _end(holder: int, ended: Callable[[], int | None]) -> None:
    """Kill the first process; the one outside ends when the kernel has ended all of them, and removed their mounts."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(holder, signal.SIGKILL)
    deadline = time.monotonic() + _START_SECONDS
    while ended() is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def remove(path: Path) -> None:
    """Remove *path* and all below it; OSError if that fails.

    What scripts have made immutable goes too, and what belongs to users that only namespaces have.
    """
    try:
        _remove(path)
    except PermissionError as error:
        if os.geteuid() == 0:
            with suppress(BuildError):
                command.run(["chattr", "-R", "-f", "-i", "-a", str(path)], quiet=True)
            _remove(path)
            return
        try:
            command.run(
                [*_unshare(as_root=False), "rm", "--recursive", "--force", "--one-file-system", "--", str(path)],
                quiet=True,
            )
        except BuildError as reason:
            raise PermissionError(error.errno, f"{error.strerror} ({reason.said})", str(error.filename)) from error


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _pid(path: Path, ended: Callable[[], int | None]) -> int:
    """Return the number of the process that holds the namespaces, which it writes to *path*."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        has_ended = ended() is not None
        said = path.read_text(encoding="utf-8", errors="replace")
        if said.endswith("\n") and said.strip().isdigit():
            return int(said)
        if has_ended or time.monotonic() > deadline:
            raise BuildError(f"Namespaces can't be had: {said.strip() or 'nothing was said'}.")
        with interrupts.interruptible():
            time.sleep(_POLL_SECONDS)
