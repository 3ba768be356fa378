"""What the guest of a test boot says while it runs, on its console and in its reports, and whether it comes up."""

import os
import re
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...base import events, interrupts
from ...base.units import format_duration
from ...machines.console import Console
from .machine import Machine
from .report import LONGEST_LINE, Message, parse

# A kernel that starts says so on the console, or writes to its root filesystem well within these; a machine without a
# boot loader never does.
_START_SECONDS = {"kvm": 60.0, "qemu": 480.0}

# A system that asks for a login has started before, or starts at the same time, what it was told to.
SILENT_SECONDS = {"kvm": 60.0, "qemu": 180.0}

# Seconds to wait after a sign: a failure prints several lines, and a system that is up in spite of it may still report.
_SETTLE_SECONDS = 2.0
_READ_BYTES = 64 * 1024
_KEPT_LINES = 400
# What the kernel, and systemd by its log, print while the system starts.
_KERNEL_LINE = re.compile(r"\[ *[0-9]+\.[0-9]{6}\] ")


@dataclass(frozen=True)
class _Sign:
    """A line on the console, by its *pattern*, that tells why there will be no report.

    *problem* is what the build says of it, with the pattern's groups, and *seconds* how long a report is still
    waited for.  *lasting* is whether a system that was up is lost with it, and *of_root* whether a driver of the disk
    may be missing.
    """

    pattern: str
    problem: str
    seconds: float = _SETTLE_SECONDS
    lasting: bool = True
    of_root: bool = False


# The first in this order counts where several are seen.
_SIGNS = (
    _Sign(r"(?<!end )Kernel panic - not syncing: VFS: Unable to mount root fs",
          "its kernel did not find the root filesystem", of_root=True),
    _Sign(r"(?<!end )Kernel panic - not syncing: (.{1,160})", r"its kernel panicked: \1"),
    _Sign(r"ALERT! +(\S{1,100}) does not exist", r"its initramfs did not find the root filesystem \1", of_root=True),
    _Sign(r"dracut-initqueue.*timeout", "its initramfs did not find the root filesystem", 60.0, of_root=True),
    _Sign(r"[Ee]ntering emergency mode|You are in emergency mode", "it came up in emergency mode", of_root=True),
    _Sign(r"No bootable device|No bootable option|>>Start (?:PXE|HTTP) over|UEFI Interactive Shell",
          "the firmware found no boot loader on its disk"),
    _Sign(r"grub rescue>", "its boot loader did not find its files"),
    _Sign(r"[Nn]o space left on device", "its root filesystem is full", 60.0, False),
)  # fmt: skip

UNTOLD = ": no cloud-init has run in it, and its systemd is older than 256"


class PortTakenError(Exception):
    """Another program took the port before QEMU did."""


class Guest:
    """What a guest says while QEMU runs, on its console and in its reports.

    *ended* returns QEMU's exit status, None while it runs; *console* and *report* are the descriptors of the pipes
    that are read.  *is_rootless* is whether it has failed without a sign of its root filesystem.
    """

    WENT_OFF = "it went off"

    def __init__(self, machine: Machine, ended: Callable[[], int | None], console: int, report: int) -> None:
        self._machine = machine
        self._ended = ended
        self.descriptors = (console, report)
        self._console = Console()
        self._unread = b""
        self._sign: tuple[int, str, float] | None = None
        self._refused = ""
        self._has_kernel = False
        self._asked: float | None = None
        self._untouched = _state_of(machine.overlay) if machine.has_disk else None
        self._start = time.monotonic()
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.message: Message | None = None
        # What is given all that comes from its console, as it comes.
        self.echo: Callable[[bytes], None] | None = None
        self.is_rootless = False

    def look(self) -> None:
        """Read what the guest has said since, without waiting; a report that is no such ends the wait for it."""
        console, report = self.descriptors
        self._read_console(_read(console))
        data = _read(report)
        if self._refused:
            return
        self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            if line.strip() and not self._refused:
                self._take(line)
        if len(self._unread) > LONGEST_LINE:
            self._refused = "what it reported is too long"

    def _take(self, line: bytes) -> None:
        try:
            self.message = parse(line)
        except ValueError as error:
            self._refused = f"what it reported is not readable: {error}"

    def _read_console(self, data: bytes) -> None:
        if self.echo:
            self.echo(data)
        lines = self._console.feed(data)
        for line in lines:
            self.lines.append(line)
            events.tell(events.ConsoleLine(line))
            self._has_kernel = self._has_kernel or _KERNEL_LINE.match(line) is not None
        if self._asked is None and self._console.line.endswith("login:"):
            self._asked = time.monotonic()
        for line in [*lines, self._console.line]:
            for order, sign in enumerate(_SIGNS):
                match = re.search(sign.pattern, line)
                problem = match and match.expand(sign.problem)
                if problem and (self._sign is None or order < self._sign[0]):
                    self._sign = order, problem, time.monotonic() + sign.seconds
                elif problem and self._sign and problem.startswith(self._sign[1]):
                    # Take the longer text: the line was not whole before.
                    self._sign = order, problem, self._sign[2]

    def off(self) -> str:
        """Return how the machine has ended, empty if it runs."""
        status = self._ended()
        return "" if status is None else self.WENT_OFF if status == 0 else self._why_off(status)

    def lost(self) -> str:
        """Return why a system that was up is lost, as far as it is known now; empty if it is not."""
        if problem := self.off():
            return problem
        if self._sign and _SIGNS[self._sign[0]].lasting and time.monotonic() >= self._sign[2]:
            return self._sign[1]
        return "it rebooted" if self.message and self.message.stage == "started" else ""

    def wait_for_report(self, seconds: float, beside: Callable[[], None] = lambda: None) -> str:
        """Wait until the system is up and has reported; return why it has not, empty if it has.

        *beside* is called each second.
        """
        deadline = self._start + seconds
        with interrupts.interruptible():
            while not (self.message and self.message.stage == "finished"):
                status = self._ended()
                select.select(self.descriptors, [], [], 1.0 if status is None else 0.0)
                if status is not None:
                    time.sleep(0.1)
                self.look()
                beside()
                events.tell(events.TimePassed())
                now = time.monotonic()
                if self._refused:
                    return self._refused
                if self._sign and (now >= self._sign[2] or now >= deadline or status is not None):
                    self.is_rootless = _SIGNS[self._sign[0]].of_root
                    return self._sign[1]
                if status is not None:
                    return self._why_off(status)
                start = min(seconds, _START_SECONDS[self._machine.virt_type])
                has_begun = self._has_kernel or self.message is not None
                if now >= self._start + start and not has_begun and self._is_untouched():
                    self.is_rootless = True
                    return (
                        f"it did not start: within {format_duration(start)} its disk was not written to{self._last()}"
                    )
                silent = SILENT_SECONDS[self._machine.virt_type]
                if self._asked is not None and now >= self._asked + silent and self.message is None:
                    return f"it reported nothing within {format_duration(silent)} after it asked for a login{UNTOLD}"
                if now >= deadline:
                    self.is_rootless = self.message is None
                    return self._why_late(seconds)
        return ""

    def _is_untouched(self) -> bool:
        return self._untouched is not None and _state_of(self._machine.overlay) == self._untouched

    def _last(self) -> str:
        return f"; the last line on its console was: {self.lines[-1]}" if self.lines else ""

    def _why_off(self, status: int) -> str:
        if status == 0:
            return "it went off or rebooted before it reported"
        said = (self._machine.directory / "qemu.log").read_text(encoding="utf-8", errors="replace").split("\n")
        if any("Could not set up host forwarding rule" in line for line in said):
            raise PortTakenError
        return f"QEMU ended with status {status}: {' '.join(said[-2:]).strip()}"

    def _why_late(self, seconds: float) -> str:
        within = f"within {format_duration(seconds)}"
        if self.message is None:
            if not self._console.line.endswith("login:"):
                return f"it did not report {within}{self._last()}"
            return f"it reported nothing {within}, though it asks for a login{UNTOLD}"
        jobs = self.message.lines("jobs")
        waiting = f"; it waits for {', '.join(line.split()[1] for line in jobs[:5] if len(line.split()) > 1)}"
        return f"it did not come up {within}{waiting if jobs else ''}"


def _state_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_blocks


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _READ_BYTES)
    except BlockingIOError:
        return b""
