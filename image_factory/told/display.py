"""What a build shows of its progress: one live display on a terminal, lines in the log everywhere."""

import locale
import logging
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from ..base import events, interrupts, log
from ..base.log import logger
from ..base.units import format_duration, format_size
from .estimates import Timeline

_LINE_SECONDS = 60.0
_DRAW_SECONDS = 0.2
_RATE_SECONDS = 1.0
# Wider, the eye would not find from a step to its time.
_WIDEST = 100
_WIDEST_BAR = 40
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red"}


def _about_left(timeline: Timeline) -> str:
    left = timeline.left()
    return "" if left is None else f"about {format_duration(left)} left"


def _percent(fraction: float) -> str:
    # Downwards: 100 % is the end.
    return f"{math.floor(fraction * 100)} %"


class LogLines:
    """An observer that logs each phase and, where nothing else is logged of it, once a minute how it goes on.

    With *console* it logs what the guest prints too.
    """

    def __init__(self, timeline: Timeline, *, console: bool = False) -> None:
        self._timeline = timeline
        self._console = console
        self._last = time.monotonic()

    def notice(self, event: events.Event) -> None:
        """Log *event* if it is time."""
        timeline = self._timeline
        if isinstance(event, events.ConsoleLine):
            if self._console:
                logger.info("console: %s", event.text)
        elif isinstance(event, events.StepStarted):
            self._last = time.monotonic()
        elif isinstance(event, events.PhaseStarted):
            self._last = time.monotonic()
            left = _about_left(timeline)
            logger.info("%s ...%s", event.name, f" {left}" if left else "")
        elif timeline.step is not None and time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            percent = "" if timeline.fraction is None else _percent(timeline.fraction)
            values = (percent, f"{timeline.phase_seconds:.0f} s", _about_left(timeline))
            logger.info("%s: %s", timeline.phase or timeline.step, ", ".join(filter(None, values)))


@dataclass(frozen=True)
class _Signs:
    """What lines are drawn with."""

    done: str
    failed: str
    running: str
    dot: str
    full: str
    empty: str


_UNICODE = _Signs("✓", "✗", "▸", "·", "━", "─")
_ASCII = _Signs("+", "x", ">", "-", "#", ".")


def _signs(stream: TextIO) -> _Signs:
    """Return what *stream* can show; Linux' own console has too few characters in its fonts."""
    # Python takes UTF-8 for its streams in the C locale, of which the terminal may know nothing.
    codesets = (stream.encoding or "", locale.nl_langinfo(locale.CODESET))
    able = all(codeset.lower().replace("-", "") == "utf8" for codeset in codesets)
    return _UNICODE if able and os.environ.get("TERM") != "linux" else _ASCII


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _seconds(seconds: float) -> str:
    """Return the time of a step that has ended."""
    return f"{seconds:.1f} s" if seconds < 59.95 else _clock(seconds)


class _Activity:
    """The rates of the guest's disk and network."""

    def __init__(self) -> None:
        self._last: tuple[float, events.GuestActive] | None = None
        self.text = ""

    def note(self, active: events.GuestActive) -> None:
        now = time.monotonic()
        if self._last is None:
            self._last = now, active
            return
        start, before = self._last
        # The numbers of a shorter time would jump.
        if now - start < _RATE_SECONDS:
            return
        self._last = now, active

        def rate(bytes_now: int, bytes_before: int) -> str:
            return f"{format_size(max(0, round((bytes_now - bytes_before) / (now - start))))}/s"

        written, read = rate(active.written, before.written), rate(active.read, before.read)
        self.text = f"disk {written} written, {read} read"
        if active.network is not None and before.network is not None:
            self.text += f"; network {rate(active.network, before.network)}"


class _LiveDisplay:
    """An observer that draws the build on a terminal.

    It draws when it is told of something, and never from a thread of its own: the program forks.
    """

    def __init__(self, title: str, timeline: Timeline, stream: TextIO) -> None:
        self._title = title
        self._timeline = timeline
        self._stream = stream
        self._signs = _signs(stream)
        # The size of the terminal is the stream's, whatever COLUMNS says.
        self._console = Console(file=stream, force_terminal=True, highlight=False, width=80, height=24)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._activity = _Activity()
        self._phases: dict[str, str] = {}
        self._above: list[Text] = []
        self._widths: list[int] = []
        self._drawing = False
        self._gone = False
        self._drawn = -math.inf

    def notice(self, event: events.Event) -> None:
        """Draw what has changed."""
        if isinstance(event, events.GuestActive):
            self._activity.note(event)
        elif isinstance(event, events.PhaseStarted) and self._timeline.step is not None:
            self._phases[self._timeline.step] = event.name
        elif isinstance(event, events.StepEnded):
            self._activity = _Activity()
        changed = isinstance(event, events.StepStarted | events.StepEnded | events.PhaseStarted | events.Waiting)
        if changed or time.monotonic() - self._drawn >= _DRAW_SECONDS:
            self._draw(self._lines())

    def show(self, level: int, message: str) -> None:
        """Show a *message* of the log above the display."""
        prefix = f"{logging.getLevelName(level).lower()}: " if level >= logging.WARNING else ""
        self._above.append(Text(prefix + message, _STYLES.get(level, "")))
        self._draw(self._lines())

    def start(self) -> None:
        """Begin to draw."""
        with self._whole():
            self._live.start()
        self._draw(self._lines())

    def end(self, *, failed: bool) -> None:
        """Draw how the build has ended, and give the terminal back."""
        self._draw(self._ended_lines(failed=failed))
        with self._whole():
            self._live.stop()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Let no signal cut in two what is written inside, and a terminal that has gone be no failure."""
        with interrupts.deferred():
            try:
                # What is drawn inside is written in one go.
                with self._console:
                    yield
            except (OSError, ValueError):
                self._gone = True

    def _draw(self, lines: list[Text]) -> None:
        # A signal's handler may log while this draws; what it says is shown with the rest.
        if self._drawing or self._gone:
            return
        self._drawing = True
        try:
            with self._whole():
                self._fit()
                for line in lines:
                    line.truncate(self._width, overflow="ellipsis" if self._signs is _UNICODE else "crop")
                self._widths = [line.cell_len for line in lines]
                self._live.update(Group(*lines))
                while self._above:
                    # The terminal breaks it, so that it can be copied as one line.
                    self._console.print(self._above.pop(0), soft_wrap=True)
                self._live.refresh()
        finally:
            self._drawing = False
            self._drawn = time.monotonic()

    @property
    def _width(self) -> int:
        return self._console.width - 1

    def _fit(self) -> None:
        """Adapt to the size of the terminal; go to where its last line is, as it breaks lines anew when it shrinks."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            return
        if columns <= 0 or rows <= 0:
            return
        more = sum(max(0, -(-width // columns) - 1) for width in self._widths)
        self._console.size = (columns, rows)
        if more:
            up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1))
            self._console.control(Control(ControlType.CARRIAGE_RETURN, *up * more))

    def _lines(self) -> list[Text]:
        head = [self._head(self._times())]
        running = self._running_lines()
        done = [self._ended_line(ended) for ended in self._timeline.ended]
        # The last line of the terminal stays free: a message that is shown above needs room too.
        room = max(0, self._console.height - len(head) - len(running) - 2)
        if len(done) > room:
            left_out = self._timeline.ended[: len(done) - room + 1]
            seconds = _seconds(sum(ended.seconds for ended in left_out))
            done = [
                self._row(Text.assemble((f"  {len(left_out)} steps before", "dim")), seconds),
                *done[len(left_out) :],
            ]
        return [*head, *done, *running]

    def _times(self) -> str:
        left = _about_left(self._timeline)
        return f"{left} {self._signs.dot} {_clock(self._timeline.seconds)}" if left else _clock(self._timeline.seconds)

    def _running_lines(self) -> list[Text]:
        timeline = self._timeline
        if timeline.step is None:
            return []
        named = self._named(self._signs.running, "cyan", timeline.step, timeline.phase)
        lines = [self._row(named, _clock(timeline.step_seconds))]
        if timeline.fraction is not None:
            length = min(_WIDEST_BAR, self._width - 8)
            full = math.floor(timeline.fraction * length)
            bar = (self._signs.full * full, "cyan"), (self._signs.empty * (length - full), "dim")
            lines.append(Text.assemble("  ", *bar, f" {_percent(timeline.fraction):>5}"))
        reason = log.printable(timeline.waiting)
        lines += [Text(f"  {line}", "dim") for line in textwrap.wrap(reason, max(20, min(self._width, _WIDEST) - 2))]
        if self._activity.text:
            lines.append(Text(f"  {self._activity.text}", "dim"))
        return lines

    def _ended_line(self, ended: events.StepEnded) -> Text:
        if ended.failed:
            named = self._named(self._signs.failed, "red", ended.name, self._phases.get(ended.name, ""))
        else:
            named = self._named(self._signs.done, "green", ended.name)
        return self._row(named, _seconds(ended.seconds))

    def _ended_lines(self, *, failed: bool) -> list[Text]:
        """Return what stays: all steps only where one has failed, as the summary has them else."""
        ended, seconds = self._timeline.ended, self._timeline.seconds
        if failed:
            return [self._head(_clock(seconds)), *(self._ended_line(step) for step in ended)]
        mark = (f"{self._signs.done} ", "green")
        return [Text.assemble(mark, (self._title, "bold"), f": {len(ended)} steps in {_seconds(seconds)}")]

    def _named(self, sign: str, style: str, step: str, phase: str = "") -> Text:
        text = f"{step} {self._signs.dot} {phase}" if phase else step
        return Text.assemble((f"{sign} ", style), " ".join(log.printable(text).split()))

    def _head(self, times: str) -> Text:
        return self._row(Text.assemble((self._title, "bold")), times)

    def _row(self, left: Text, right: str) -> Text:
        """Return a line with *left* and *right* at its ends."""
        width = min(self._width, _WIDEST)
        left.truncate(max(0, width - len(right) - 1), overflow="ellipsis" if self._signs is _UNICODE else "crop")
        return left + " " * max(1, width - left.cell_len - len(right)) + right


@contextmanager
def live(title: str, timeline: Timeline) -> Iterator[None]:
    """Show the build inside on stderr, which is a terminal; what is logged for stderr appears above.

    *timeline* is told of events before this is.
    """
    display = _LiveDisplay(title, timeline, sys.stderr)
    failed = True
    with log.shown_by(display.show), events.observed(display):
        try:
            display.start()
            yield
            failed = False
        finally:
            display.end(failed=failed)
