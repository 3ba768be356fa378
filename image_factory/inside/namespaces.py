"""Namespaces of a build's own: whatever happens, the kernel ends their processes and removes their mounts.

In them an ordinary user is root of a range of users, which newuidmap (package uidmap) gives; it needs no sudo rule.
"""

import os
import pwd
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import command, interrupts
from ..base.errors import BuildError, ConfigurationError

# So many users and groups a distribution expects to have.
_USERS = 65536
_RANGES = (Path("/etc/subuid"), Path("/etc/subgid"))
_START_SECONDS = 30.0
_POLL_SECONDS = 0.02

# proc of this machine is still mounted: it has the number that the process has outside.
_HOLD = 'read -r pid rest </proc/self/stat && echo "$pid" && exec sleep infinity'


def programs(*, as_root: bool) -> list[str]:
    """Return the programs that are needed."""
    return ["unshare", "nsenter", *([] if as_root else ["newuidmap"])]


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
        raise ConfigurationError(
            f"This machine gives {user.pw_name} no user namespace: {error.said}.",
            hint="Allow them: sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces and "
            "kernel.apparmor_restrict_unprivileged_userns",
        ) from error


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
    return ["unshare", *users, "--mount", "--pid", "--fork", "--kill-child"]


def holding_argv(*, as_root: bool) -> list[str]:
    """Return the command that has the namespaces until it is killed."""
    return [*_unshare(as_root=as_root), "sh", "-c", _HOLD]


def entering_argv(pid: int | str, *words: str, as_root: bool) -> list[str]:
    """Return the command that runs *words* in the namespaces of process *pid*."""
    users = [] if as_root else ["--user"]
    return ["nsenter", f"--target={pid}", *users, "--mount", "--pid", "--", *words]


@dataclass(frozen=True)
class Namespaces:
    """Those of process *pid*, in which commands can be run as root."""

    pid: int
    as_root: bool

    def run(self, *words: str, **keywords: Any) -> str:
        """Run the command *words* inside, as ``command.run`` does."""
        return command.run(entering_argv(self.pid, *words, as_root=self.as_root), **keywords)


@contextmanager
def entered(directory: Path, *, as_root: bool) -> Iterator[Namespaces]:
    """Give namespaces, which end on the way out; what their first process says is in a file in *directory*."""
    path = directory / "namespaces.log"
    with command.background(holding_argv(as_root=as_root), path) as ended:
        yield Namespaces(_pid(path, ended), as_root)
    path.unlink()


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
