"""Watch an installation: tell its phases, and end it when nothing more will come of it."""

import contextlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...base import command, events
from ...base.errors import BuildError, InstallationError, InstalledError
from ...base.units import format_duration
from ...machines import libvirt
from ...machines.console import Console
from ...model import Build
from . import installers
from .installers import Failure

# How often libvirt is asked what the guest does, and how long it may take to answer.
_STATISTICS_SECONDS = 2.0
_VIRSH_SECONDS = 5.0
# QEMU has 15 seconds to end before libvirt kills it.
_DESTROY_SECONDS = 30.0

# What a failure prints comes in several lines, of which a later one may say more.
_SETTLE_SECONDS = 2.0
# A question that nothing follows for so long is not one that the installer answers itself.
_QUESTION_SECONDS = 5.0

# A kernel starts once for the installer, and perhaps once more by kexec; each may say so twice.
_BOOTS = 5

# In one look, so that a guest that floods its console doesn't keep the build from all else.
_READ_BYTES = 256 * 1024
_REMEMBERED_LINES = 2000

# What differs in each repetition of the same screen: times, those of the kernel's log, spinners, and
# systemd's "[ ***  ] A start job is running for ... (1min 2s / no limit)".
_CHANGING = re.compile(
    r"[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?|^\[ *[0-9]+\.[0-9]+\]|[-\\|/]$|^\[[ *]+\]|\([^()]*[0-9]s / [^()]*\)"
)
# Of GNU screen in Debian's installer, of tmux in Anaconda: painted now and then, whatever happens.
_STATUS_LINE = re.compile(r"\([0-9]\*installer\)|\[anaconda\][0-9]:")
# The kernel of the installer says this and that while a question waits.
_KERNEL_LOG = re.compile(r"^\[ *[0-9]+\.[0-9]+\]")
# Debian's text frontend underlines the title of a question, the other one has it in the frame.
_UNDERLINE = re.compile("-{3,}")
_FRAMED = re.compile(r"^(?:l?q+u|┌─*┤) (?:\[!+\] )?(\S.*?) (?:tq+k?|├─*┐)$")
# What is drawn below the buttons of a dialogue.
_BELOW_BUTTONS = re.compile(r"[mjqx│└┘─ ]+|<(?:F1|Tab)> .*")
# What a service says on the console goes through the kernel's log, or systemd's journal.
_FORWARDED = re.compile(r"^\[ *[0-9]+\.[0-9]+\] [\w.-]+\[[0-9]+\]: ")
# Python says what it can do nothing about: the program goes on.
_HARMLESS = re.compile("Exception ignored in|--- Logging error ---")
# A line that goes on after a terminal's status line was painted, and a gauge.
_GAUGE = re.compile(r"^(?:\.\.\.|\W*[0-9]{1,3} ?%)")


@dataclass(frozen=True)
class Limits:
    """Seconds that an installation may take in all, and without a sign of life."""

    whole: float
    stall: float


class Watcher:
    """Looks at the console and at libvirt's statistics of one installation machine."""

    def __init__(self, build: Build, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = build.vm_name
        self._console = _Follower(build.console_path)
        self._answer_file_key = build.plan.settings.answer_file_key
        self._installers = installers.possible(self._answer_file_key)
        self._limits = limits
        self._clock = clock
        self._start = self._alive = clock()
        self._next_statistics = self._start
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._activity: tuple[int, int | None] | None = None
        self._phase: str | None = None
        self._fraction: float | None = None
        self._boots = 0
        self._found: Failure | None = None
        self._found_at = 0.0
        self._question: Failure | None = None
        self._question_at = 0.0
        self._booted_again = False
        self._halted_at: float | None = None
        # Whether the guest had halted, and this has switched its machine off.
        self.switched_off = False
        self._line_before = ""
        self._title = ""

    def look(self) -> None:
        """See what has happened since the last time; InstallationError if the installation is to end."""
        now = self._clock()
        self._read(now)
        if self._found and now - self._found_at >= _SETTLE_SECONDS:
            raise self._error_of(self._found)
        if self._question and now - self._question_at >= _QUESTION_SECONDS:
            raise self._error_of(self._question)
        if self._halted_at is not None and now - self._halted_at >= _SETTLE_SECONDS and not self.switched_off:
            self._switch_off()
            self._halted_at = now
        if now >= self._next_statistics:
            self._next_statistics = now + _STATISTICS_SECONDS
            self._ask_libvirt(now)
        self._check_limits(now)

    def finish(self) -> None:
        """Read the rest when the guest is off; InstallationError if it has printed that it failed."""
        self._read(self._clock())
        if self._found and self._found.certain:
            raise self._error_of(self._found)

    def _read(self, now: float) -> None:
        lines = self._console.read()
        for line in lines:
            events.tell(events.ConsoleLine(line))
            self._count_boots(line, now)
            self._notice(line, now)
        if self._console.line:
            self._notice(self._console.line, now)

    def _count_boots(self, line: str, now: float) -> None:
        if installers.KERNEL_BANNER.search(line):
            self._boots += 1
            # The installer's own kernel has started before any phase, and has said so only if it was not quiet.
            self._booted_again = self._phase is not None
            if self._boots >= _BOOTS:
                self._find(_REBOOTS, now)

    def _notice(self, line: str, now: float) -> None:
        is_halt = bool(installers.HALTED.search(line))
        line = _FORWARDED.sub("", line)
        if not line or _STATUS_LINE.search(line):
            return
        before, self._line_before = self._line_before, line
        framed = _FRAMED.search(line)
        if framed or _UNDERLINE.fullmatch(line):
            self._title = framed[1] if framed else before
        is_kernels = bool(_KERNEL_LOG.search(line))
        # What a driver says has the same words.
        failure = installers.failure_of(() if is_kernels else self._installers, line)
        if failure is None and self._is_login(line):
            failure = _STARTED
        if is_halt:
            self._halted_at = now if self._halted_at is None else self._halted_at
        elif not is_kernels and not self.switched_off:
            # A program that runs says that nothing has halted.
            self._halted_at = None
        if failure and failure.question:
            if self._question is None:
                self._question, self._question_at = failure, now
        elif not is_kernels and not _BELOW_BUTTONS.fullmatch(line):
            self._question = None
        if failure and not failure.question and not _HARMLESS.search(before):
            self._find(failure, now)
        normal = _CHANGING.sub("", line).strip()
        if not normal:
            return
        if normal in self._seen:
            self._seen.move_to_end(normal)
            return
        self._seen[normal] = None
        if len(self._seen) > _REMEMBERED_LINES:
            self._seen.popitem(last=False)
        if not is_kernels or self._phase is None:
            self._alive = now
        # The words of a driver may be those of a phase.
        if not is_kernels:
            self._follow_phase(line)

    def _is_login(self, line: str) -> bool:
        """Whether *line* is the login prompt of the installed system."""
        shows_login = any(installer.shows_login for installer in self._installers)
        return bool(installers.LOGIN_PROMPT.search(line)) and (self._booted_again or not shows_login)

    def _switch_off(self) -> None:
        """Switch the machine off; one that libvirt can't reach now stays on."""
        argv = libvirt.virsh("destroy", self._name)
        with contextlib.suppress(BuildError):
            command.run(argv, capture=True, timeout=_DESTROY_SECONDS)
            self.switched_off = True

    def _find(self, failure: Failure, now: float) -> None:
        order = (_REBOOTS, *installers.failures_of(self._installers))
        if self._found is None:
            self._found, self._found_at = failure, now
        elif order.index(failure) < order.index(self._found):
            self._found = failure

    def _error_of(self, failure: Failure) -> InstallationError:
        title = f": {self._title}" if failure.titled and self._title else ""
        message = f"{failure.message.removesuffix('.')}{title}."
        if failure is _STARTED:
            return InstalledError(message, hint=failure.hint.format(installers.POWER_OFF[self._answer_file_key]))
        if self._halted_at is not None and not failure.certain:
            return InstalledError(f"{message} Then the guest has halted.", hint=failure.hint)
        return InstallationError(message, hint=failure.hint)

    def _follow_phase(self, line: str) -> None:
        phase = installers.phase_of(self._installers, line)
        if phase and phase != self._phase:
            self._phase, self._fraction = phase, None
            events.tell(events.PhaseStarted(phase))
        if phase or _GAUGE.search(line):
            fraction = installers.fraction_of(line)
            # Where only the digits that change are written, 56 % after 52 % comes as 6 %.
            if fraction is not None and (phase or self._fraction is None or fraction > self._fraction):
                if fraction != self._fraction:
                    events.tell(events.Progressed(fraction))
                self._fraction = fraction

    def _ask_libvirt(self, now: float) -> None:
        try:
            statistics = _statistics(self._name)
        except BuildError:
            # The machine is not there yet, or not any more, or libvirt is not: no sign of life.
            return
        read, written = _sum(statistics, r"block\.\d+\.rd\.bytes"), _sum(statistics, r"block\.\d+\.wr\.bytes")
        counted = [key for key in statistics if key.startswith("net.") and key.endswith(".bytes")]
        network = _sum(statistics, r"net\.\d+\.[rt]x\.bytes") if counted else None
        activity = (written, network)
        if self._activity is not None and activity != self._activity:
            self._alive = now
        self._activity = activity
        events.tell(events.GuestActive(read, written, network))

    def _check_limits(self, now: float) -> None:
        phase = f" It was at: {self._phase}." if self._phase else ""
        if now - self._start >= self._limits.whole:
            raise InstallationError(
                f"The installation did not end within {format_duration(self._limits.whole)}.{phase}",
                hint="Set a larger install-timeout if it takes that long; the console log shows what it was doing.",
            )
        if now - self._alive >= self._limits.stall:
            raise InstallationError(
                f"The installation has shown no sign of life for {format_duration(self._limits.stall)}.{phase}",
                hint="The console log shows where it stopped; stall-timeout says how long to wait.",
            )


_REBOOTS = Failure(
    "",
    "The guest boots again and again.",
    "The console log shows what comes before each start. Often ram is too small.",
)


_STARTED = Failure(
    "",
    "The installed system was started: it asks for a login.",
    "Have {}. What a first start makes is on the disk, so take it away with seal = yes",
    question=True,
)


class _Follower:
    """Reads what is appended to a file that may not be there yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._console = Console()

    def read(self) -> list[str]:
        """Return the new lines."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:
                    # virtlogd begins a new file when one is large.
                    self._offset = 0
                # The guest may print faster than anyone could read: the end is what matters.
                self._offset = max(self._offset, size - _READ_BYTES)
                file.seek(self._offset)
                data = file.read(_READ_BYTES)
        except OSError:
            return []
        self._offset += len(data)
        return self._console.feed(data)

    @property
    def line(self) -> str:
        return self._console.line


def _statistics(name: str) -> dict[str, int]:
    """Return libvirt's numbers of the machine's disks and network interfaces; see virsh(1), domstats."""
    argv = libvirt.virsh("domstats", "--raw", "--block", "--interface", name)
    found = {}
    for line in command.run(argv, capture=True, timeout=_VIRSH_SECONDS, quiet=True).splitlines():
        key, _, value = line.strip().partition("=")
        if value.isdigit():
            found[key] = int(value)
    return found


def _sum(statistics: dict[str, int], pattern: str) -> int:
    return sum(value for key, value in statistics.items() if re.fullmatch(pattern, key))
