"""What programs print, as lines."""

import selectors
import time
from collections.abc import Callable

from .. import events, interrupts
from ..errors import BuildError
from ..log import LONGEST_SECRET, masked_bytes

# So many lines are kept, to say why a program failed.
LAST_LINES = 20
# A program that never ends its line doesn't fill the memory.
LONGEST_LINE = 64 * 1024
# What a program prints is taken into memory whole where its caller wants it: at most so much.
MOST_PRINTED = 64 << 20
# So much of what a program prints goes to the log, whose disk it would fill.
MOST_LOGGED = 16 << 20
# So often a silent program is looked at, and observers are told that it goes on.
TICK_SECONDS = 1.0


class Lines:
    """Cut a stream of bytes into lines, and hand each to *sink*.

    Of a line that a progress bar has overwritten with carriage returns, only the last state counts.
    With *progress*, each state is taken as it comes: those for which it returns true go no further.
    """

    def __init__(self, sink: Callable[[str], None], progress: Callable[[str], bool] | None = None) -> None:
        self._sink = sink
        self._progress = progress
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what comes next."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._emit(line)
        if self._progress is not None:
            states, overwritten, self._rest = self._rest.rpartition(b"\r")
            if overwritten:
                self._emit(states)
        if len(self._rest) > LONGEST_LINE:
            # No part of a secret may be in one line, and the other in the next.
            text = masked_bytes(self._rest)
            self._emit(text[:-LONGEST_SECRET])
            self._rest = text[-LONGEST_SECRET:]

    def close(self) -> None:
        """Take what has come as the last line."""
        if self._rest:
            self._emit(self._rest)
            self._rest = b""

    def _emit(self, line: bytes) -> None:
        states = [state for state in line.split(b"\r") if state.strip()]
        if states:
            state = states[-1].decode("utf-8", errors="replace").rstrip()
            if self._progress is None or not self._progress(state):
                self._sink(state)


def ready(
    selector: selectors.BaseSelector, deadline: float | None, watch: Callable[[], None] | None = None
) -> list[int]:
    """Wait for the descriptors of *selector*; return those that are ready, none at *deadline*."""
    while True:
        interrupts.check()
        if watch is not None:
            watch()
        wait = TICK_SECONDS if deadline is None else deadline - time.monotonic()
        found = [key.fd for key, _ in selector.select(max(0.0, min(wait, TICK_SECONDS)))]
        if found or wait < TICK_SECONDS:
            return found
        events.tell(events.TimePassed())


def too_much(name: str) -> BuildError:
    """Return the error for a program that has printed more than is taken."""
    return BuildError(f"{name} printed more than {MOST_PRINTED >> 20} MiB, which no answer of its has.")
