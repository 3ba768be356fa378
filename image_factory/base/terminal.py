"""The terminal that the user sits at, which is our stdin where there is one."""

import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STDIN, _STDERR = 0, 2


def is_attended() -> bool:
    """Return whether someone can type, and sees what is asked."""
    return os.isatty(_STDIN) and os.isatty(_STDERR)


@contextmanager
def kept() -> Iterator[None]:
    """Have the terminal, where there is one, be as it is now on the way out, whatever is done to it inside."""
    try:
        modes = termios.tcgetattr(_STDIN)
    except termios.error:
        yield
        return
    try:
        yield
    finally:
        # A shell that was killed may have left us in the background, where this would stop us.
        previous = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            # One that has been closed takes none.
            with suppress(termios.error):
                termios.tcsetattr(_STDIN, termios.TCSANOW, modes)
        finally:
            signal.signal(signal.SIGTTOU, previous)


@contextmanager
def raw() -> Iterator[None]:
    """Have each key come to stdin as it is typed inside, Ctrl-C too."""
    with kept():
        tty.setraw(_STDIN, termios.TCSANOW)
        yield
