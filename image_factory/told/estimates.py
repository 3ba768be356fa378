"""How long the parts of a build take, kept from build to build, and how long is left."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..base import events, files, trust
from ..machines import turns
from ..model import Plan

FILE_NAME = ".durations.json"
_BUILDS = 5
# More than any build has; a file of others' is not worth more memory.
_LONGEST_FILE = 1 << 20

_LONGEST = 1e7

_KVM_DEVICE = "/dev/kvm"


class Part(NamedTuple):
    """A phase of a step, or the step before its first phase, and its *seconds*."""

    step: str
    phase: str
    seconds: float


def _machine(plan: Plan) -> str:
    """Return what the durations depend on most; whether KVM, where it is there, works is not known yet."""
    if plan.settings.virt_type != "auto":
        return plan.settings.virt_type
    return "kvm" if os.access(_KVM_DEVICE, os.R_OK | os.W_OK) else "qemu"


def _load(path: Path) -> dict[str, list[list[Part]]]:
    """Return the builds in *path* by machine, none where it is not there or not ours."""
    # What another user can put there may be a pipe, which is opened for ever.
    if trust.why_not(path.parent) or not trust.own(path):
        return {}
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_LONGEST_FILE))
        return {
            str(machine): [[_part(*values) for values in build] for build in builds] for machine, builds in data.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}


def _part(step: str, phase: str, seconds: float) -> Part:
    if not 0 <= seconds < _LONGEST:
        raise ValueError
    return Part(str(step), str(phase), float(seconds))


def _save(path: Path, builds: dict[str, list[list[Part]]]) -> None:
    trust.make(path.parent)
    files.replace(path, json.dumps(builds).encode(), mode=0o644)


@dataclass
class _Running:
    """A step under way; the seconds are those of the clock."""

    name: str
    start: float
    phase: str = ""
    phase_start: float = 0.0
    fraction: float | None = None
    waiting: str = ""


class Timeline:
    """An observer that knows where the build is, since when, and, by the last builds, for how long still."""

    def __init__(self, plan: Plan) -> None:
        # What a link leads to, as in the look at who can change it.
        self._path = Path(os.path.realpath(plan.cache_dir)) / FILE_NAME
        self._machine = _machine(plan)
        # The names of steps that have the date.
        self._dated, self._undated = plan.base_name, plan.image
        builds = _load(self._path).get(self._machine, [])
        # A build that was resumed is short of parts.
        self._order = [(part.step, part.phase) for part in max(builds, key=len, default=[])]
        self._expected = {
            key: statistics.median(part.seconds for build in builds for part in build if part[:2] == key)
            for key in self._order
        }
        self._parts: list[Part] = []
        self._running: list[_Running] = []
        self.start = time.monotonic()
        self.ended: list[events.StepEnded] = []

    def notice(self, event: events.Event) -> None:
        """Note where the build has come to."""
        now = time.monotonic()
        if isinstance(event, events.StepStarted):
            self._running.append(_Running(event.name, now, phase_start=now))
        elif isinstance(event, events.StepEnded):
            self.ended.append(event)
            if self._running:
                self._end_part(now)
                self._running.pop()
        elif self._running:
            running = self._running[-1]
            if isinstance(event, events.PhaseStarted):
                self._end_part(now)
                running.phase, running.phase_start, running.fraction = event.name, now, None
            elif isinstance(event, events.Progressed):
                running.fraction = event.fraction
            elif isinstance(event, events.Waiting):
                running.waiting = event.reason

    def _end_part(self, now: float) -> None:
        running = self._running[-1]
        if running.name == turns.STEP:
            # How long the next build waits is another matter.
            return
        self._parts.append(Part(*self._key(running), now - running.phase_start))

    def _key(self, running: _Running) -> tuple[str, str]:
        return running.name.replace(self._dated, self._undated), running.phase

    @property
    def seconds(self) -> float:
        """How long the build has been under way."""
        return time.monotonic() - self.start

    @property
    def step(self) -> str | None:
        """The step under way."""
        return self._running[-1].name if self._running else None

    @property
    def step_seconds(self) -> float:
        """How long it has been."""
        return time.monotonic() - self._running[-1].start if self._running else 0.0

    @property
    def phase(self) -> str:
        """Its phase, empty if it has none."""
        return self._running[-1].phase if self._running else ""

    @property
    def phase_seconds(self) -> float:
        """How long the phase has been, the step where it has none."""
        return time.monotonic() - self._running[-1].phase_start if self._running else 0.0

    @property
    def fraction(self) -> float | None:
        """How much of it is done, None where this is not known."""
        return self._running[-1].fraction if self._running else None

    @property
    def waiting(self) -> str:
        """What it waits for, empty where it does not."""
        return self._running[-1].waiting if self._running else ""

    def left(self) -> float | None:
        """Return the seconds that the build still needs, None if no build has been like it."""
        keys = [part[:2] for part in self._parts]
        if self._running:
            keys.append(self._key(self._running[-1]))
        places = [self._order.index(key) for key in keys if key in self._expected]
        if not self._order:
            return None
        left = sum(self._expected[key] for key in self._order[max(places, default=-1) + 1 :])
        if self._running:
            expected = self._expected.get(keys[-1], 0.0)
            if self.fraction is None:
                left += max(0.0, expected - self.phase_seconds)
            else:
                left += (1 - self.fraction) * max(expected, self.phase_seconds)
        return left

    def keep(self) -> None:
        """Keep the durations of this build, which has come to its end; it's no failure if that can't be."""
        if trust.why_not(self._path.parent):
            return
        builds = _load(self._path)
        builds[self._machine] = [*builds.get(self._machine, []), _joined(self._parts)][-_BUILDS:]
        with contextlib.suppress(OSError):
            _save(self._path, builds)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Return *parts*, with those that the build was in more than once as one."""
    seconds: dict[tuple[str, str], float] = {}
    for part in parts:
        key = part.step, part.phase
        seconds[key] = seconds.get(key, 0.0) + part.seconds
    return [Part(*key, round(total, 2)) for key, total in seconds.items()]
