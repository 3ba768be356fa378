"""Turns: how many installations run on this machine at once, whoever's they are.

An installation under way is a name in Linux' abstract namespace of sockets.  All users share it, nobody
can take another's name away, and a name is gone with its process, however that ends: there is no
directory that everybody may write to, and nothing is left to be cleaned up.
"""

import errno
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..base import events, interrupts, trust
from ..base.errors import reason_of
from ..base.log import logger, step, waiting
from ..base.units import format_size

STEP = "Waiting for other installations"

_PREFIX = "image-factory"
_NAMES = Path("/proc/net/unix")

# The rest of the memory is for this machine itself, and for what finishes images.
_SHARE_OF_MEMORY = 0.75
_POLL_SECONDS = 1.0
# Deciding takes milliseconds.  Who is longer at it doesn't keep others from their turns.
_DECISION_SECONDS = 5.0
_DECISION_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class _Installation:
    """What an installation takes of this machine, and whose it says that it is; *ram* in MiB."""

    ram: int
    cores: int
    uid: int

    @property
    def owner(self) -> str:
        return trust.name_of(self.uid)


@contextmanager
def taken(limit: float | None, ram: int, cores: int) -> Iterator[None]:
    """Wait until an installation with *ram* bytes and *cores* may run here; inside, others count it.

    *limit* is how many may run at once, infinity for any number.  With None they may have as many
    processors as this machine, and three quarters of its memory.  One alone may always run.
    """
    own = _Installation(ram >> 20, cores, os.geteuid())
    try:
        with ExitStack() as stack:
            reason = _begin(stack, own, limit)
            if reason:
                with step(STEP), waiting(reason) as say:
                    while reason := _begin(stack, own, limit):
                        say(reason)
                        with interrupts.interruptible():
                            time.sleep(_POLL_SECONDS)
                        events.tell(events.TimePassed())
            stack = stack.pop_all()
    except OSError as error:
        logger.warning("Other installations on this machine can't be counted: %s.", reason_of(error))
        stack = ExitStack()
    with stack:
        yield


def _begin(stack: ExitStack, own: _Installation, limit: float | None) -> str | None:
    """Have *stack* hold the place of *own*, if there is one for it; else return why there is none."""
    with _deciding():
        reason = _why_not(own, limit, _running())
        if reason is None:
            # Random: a process may have more than one, and in a container its ID says nothing.
            token = secrets.token_hex(4)
            stack.enter_context(_named(f"installation/{own.ram}/{own.cores}/{own.uid}/{token}"))
    return reason


def _why_not(own: _Installation, limit: float | None, others: Sequence[_Installation]) -> str | None:
    """Return why *own* has to wait for *others*, None if it may begin."""
    if not others:
        return None
    owners = ", ".join(dict.fromkeys(other.owner for other in others))
    run = f"{len(others)} {'run' if len(others) > 1 else 'runs'} on this machine (of {owners})"
    if limit is not None:
        return None if len(others) < limit else f"{run}, and max-parallel = {limit:.0f}."
    all_cores, all_ram = os.cpu_count() or 1, memory()
    cores, ram = sum(other.cores for other in others), sum(other.ram for other in others)
    if cores + own.cores > all_cores:
        return f"{run}, with {cores} of its {all_cores} processors; this one needs {own.cores} (see max-parallel)."
    if ram + own.ram > all_ram:
        sizes = (format_size(size << 20) for size in (ram, all_ram, own.ram))
        return "{}, with {} of {} for them; this one needs {} (see max-parallel).".format(run, *sizes)
    return None


def memory() -> int:
    """Return how many MiB of this machine's memory installations may have."""
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SHARE_OF_MEMORY) >> 20


def _running() -> list[_Installation]:
    """Return the installations that run on this machine."""
    pattern = re.compile(rf"@{_PREFIX}/installation/([0-9]{{1,13}})/([0-9]{{1,4}})/([0-9]{{1,10}})/[0-9a-f]{{8}}$")
    found = {}
    # The kernel gives the list in parts, and one that goes between them may hide another.
    for _ in range(2):
        for line in _NAMES.read_text(encoding="utf-8", errors="replace").splitlines():
            if match := pattern.search(line):
                found[match[0]] = _Installation(int(match[1]), int(match[2]), int(match[3]))
    return list(found.values())


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Have the abstract *name* inside; OSError if another socket has it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as holder:
        holder.bind(f"\0{_PREFIX}/{name}".encode())
        yield


@contextmanager
def _deciding() -> Iterator[None]:
    """Keep others from deciding at the same time; for a few seconds, as anybody may hold that name."""
    deadline = time.monotonic() + _DECISION_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(_named("deciding"))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                if time.monotonic() > deadline:
                    break
            with interrupts.interruptible():
                time.sleep(_DECISION_POLL_SECONDS)
        yield
