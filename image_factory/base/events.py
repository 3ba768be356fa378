"""What happens in a build, told to whoever observes it: the display, the build record, the summary."""

import contextvars
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class StepStarted:
    """A step of the pipeline begins; ``log.step`` tells it."""

    name: str


@dataclass(frozen=True)
class StepEnded:
    """A step is through, or has failed with *error*, after *seconds*."""

    name: str
    seconds: float
    failed: bool
    error: BaseException | None = None


@dataclass(frozen=True)
class PhaseStarted:
    """The installer has come to another phase, which is part of the step under way."""

    name: str


@dataclass(frozen=True)
class Progressed:
    """*fraction*, from 0 to 1, of the phase is done, of the step where it has no phases."""

    fraction: float


@dataclass(frozen=True)
class GuestActive:
    """What the guest has done since it was started: bytes of its disk and its network.

    *network* is None where libvirt doesn't count it, as with a network of QEMU's own.
    """

    read: int
    written: int
    network: int | None


@dataclass(frozen=True)
class ConsoleLine:
    """The guest has printed a line, without escape sequences."""

    text: str


@dataclass(frozen=True)
class TimePassed:
    """A program goes on, and says nothing; told about once a second."""


@dataclass(frozen=True)
class Waiting:
    """The step under way waits for others, and *reason* says for whom; it goes on where that is empty.

    ``log.waiting`` tells it.
    """

    reason: str


@dataclass(frozen=True)
class InputUsed:
    """The build has read the file at *path*, or gives it to the installer.

    *key* is the setting that names it, ``configuration`` for a configuration file, and *origin* the path or
    URI that it names.  *path* is None for an installation tree, of which only the installer knows what it reads.
    *verified_by* says who vouches for the file, if anybody does.
    """

    key: str
    origin: str
    path: Path | None
    verified_by: str | None = None


@dataclass(frozen=True)
class CommandRun:
    """The program of *argv* is started, and the log says so."""

    argv: tuple[str, ...]


@dataclass(frozen=True)
class VirtTypeChosen:
    """The installation machine runs under *name*: ``kvm``, or ``qemu``, which is emulation."""

    name: str


@dataclass(frozen=True)
class Installed:
    """There is an installed disk, and no installation machine any more."""


@dataclass(frozen=True)
class Audited:
    """The audit has made *checks* of *artifact*; *findings* are names of checks with what they found.

    Those of *unsearched* had nothing to search for in its bytes, as nothing is known of how an image was made.
    """

    artifact: str
    checks: tuple[str, ...]
    findings: tuple[tuple[str, str], ...]
    unsearched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sealed:
    """Operation *name* of sealing has taken *files* files away, and *size* bytes; it has changed or made others."""

    name: str
    files: int
    size: int
    changed: int


@dataclass(frozen=True)
class LayerKept:
    """What a source has made of the disk so far is kept, and the build can go on there."""


@dataclass(frozen=True)
class TaskEnded:
    """The task *name*, of *type*, has ended after *seconds*, with all its tries.

    *digest* is the SHA-256 of what it does.  *outcome* is ``passed``, ``failed``, or ``allowed`` of one that failed and
    may, and *message* says how it failed.
    """

    name: str
    type: str
    digest: str
    seconds: float
    outcome: str
    message: str = ""


@dataclass(frozen=True)
class Published:
    """An artifact has its final name; the fields are those of ``model.Artifact``."""

    path: Path
    format: str
    virtual_size: int
    upload: bool
    sha256: str | None
    companions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Compared:
    """What has changed since the build before, as the manifest of the published image has it."""

    difference: dict[str, Any]


@dataclass(frozen=True)
class ChangesSought:
    """What has *changed* since the build *previous*, which is None if there is none, and what is *unknown* of that.

    If there is neither, nothing is built.
    """

    previous: str | None
    changed: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def builds(self) -> bool:
        """Whether the image is to be built."""
        return bool(self.changed or self.unknown)


@dataclass(frozen=True)
class BootCheck:
    """A check of the test boot.  *outcome* is ``passed``, ``failed`` or ``skipped``, and *message* says why."""

    name: str
    outcome: str
    message: str = ""


@dataclass(frozen=True)
class BootTested:
    """The artifact named *artifact* was booted with *firmware*, which took *seconds*.

    *devices* are those of the machine that are other than the usual ones, as a matrix names them.
    """

    artifact: str
    firmware: str
    seconds: float
    checks: tuple[BootCheck, ...]
    devices: tuple[str, ...] = ()


Event = (
    StepStarted
    | StepEnded
    | PhaseStarted
    | Progressed
    | GuestActive
    | ConsoleLine
    | TimePassed
    | Waiting
    | InputUsed
    | CommandRun
    | VirtTypeChosen
    | Installed
    | Audited
    | Sealed
    | LayerKept
    | TaskEnded
    | Published
    | BootTested
    | Compared
    | ChangesSought
)


class Observer(Protocol):
    """Somebody who is told of events, in their order, in the thread of the build; it raises nothing."""

    def notice(self, event: Event) -> None:
        """Take note of *event*."""


class StepTimes:
    """An observer that keeps the steps that have ended well."""

    def __init__(self) -> None:
        self.ended: list[StepEnded] = []

    def notice(self, event: Event) -> None:
        """Keep *event* if it is one."""
        if isinstance(event, StepEnded) and not event.failed:
            self.ended.append(event)


class TasksEnded:
    """An observer that keeps the tasks that have ended, however."""

    def __init__(self) -> None:
        self.found: list[TaskEnded] = []

    def notice(self, event: Event) -> None:
        """Keep *event* if it is one."""
        if isinstance(event, TaskEnded):
            self.found.append(event)


class Differences:
    """An observer that keeps what has changed since the build before, None if that is not known."""

    def __init__(self) -> None:
        self.found: dict[str, Any] | None = None

    def notice(self, event: Event) -> None:
        """Keep *event* if it is one."""
        if isinstance(event, Compared):
            self.found = event.difference


_observers: contextvars.ContextVar[tuple[Observer, ...]] = contextvars.ContextVar("observers", default=())


@contextmanager
def observed(*observers: Observer) -> Iterator[None]:
    """Have *observers* told of what happens inside, beside those of an outer context."""
    token = _observers.set(_observers.get() + observers)
    try:
        yield
    finally:
        _observers.reset(token)


@contextmanager
def unobserved() -> Iterator[None]:
    """Have nobody told of what happens inside."""
    token = _observers.set(())
    try:
        yield
    finally:
        _observers.reset(token)


def tell(event: Event) -> None:
    """Tell all observers of *event*."""
    for observer in _observers.get():
        observer.notice(event)


class Meter:
    """Tells what is done of something, at most five times a second, and that all of it is."""

    _SECONDS = 0.2

    def __init__(self) -> None:
        self._told = -math.inf

    def at(self, done: float, total: float) -> None:
        """Tell that *done* of *total* is done."""
        now = time.monotonic()
        if total > 0 and (done >= total or now - self._told >= self._SECONDS):
            self._told = now
            tell(Progressed(min(max(done / total, 0.0), 1.0)))
