"""SIGINT, SIGTERM and SIGHUP, delivered only where the build can take them.

A signal handler that raises can strike between the acquisition of a resource and the ``with`` that
releases it.  So a signal is only noted, unless the program is inside ``interruptible()``, where it
waits for something long.  The first signal ends the build; later ones are ignored, as the clean-up
is under way then.

Python drops what is raised in a destructor or in a hook of fork(); Interrupted is raised again then, at
the next place.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import Interrupted
from .log import logger

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    pending: int | None = None
    raised = False
    depth = 0


_state = _State()


def _raise_pending() -> None:
    if _state.pending is not None and not _state.raised:
        _state.raised = True
        raise Interrupted(_state.pending)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if _state.raised:
        logger.warning("Already stopping: cleaning up.")
        return
    if _state.pending is None:
        _state.pending = signum
    if _state.depth:
        _raise_pending()


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Take no notice.

    Unlike SIG_IGN it isn't inherited: programs that are started can still be stopped by the signal.
    """


def _on_dropped(dropped: "sys.UnraisableHookArgs") -> None:
    if isinstance(dropped.exc_value, Interrupted):
        _state.raised = False
    else:
        sys.__unraisablehook__(dropped)


@contextmanager
def handled() -> Iterator[None]:
    """Turn the signals into Interrupted inside.

    A signal that is ignored stays ignored: nohup and a shell's background jobs rely on it.
    """
    _state.pending, _state.raised, _state.depth = None, False, 0
    previous = {}
    previous_hook, sys.unraisablehook = sys.unraisablehook, _on_dropped
    try:
        for number in _SIGNALS:
            ignored = signal.getsignal(number) is signal.SIG_IGN
            previous[number] = signal.signal(number, _ignore if ignored else _on_signal)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = previous_hook


def check() -> None:
    """Raise Interrupted if a signal has come."""
    _raise_pending()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal raise Interrupted at any point inside, also one that came before."""
    _state.depth += 1
    try:
        _raise_pending()
        yield
    finally:
        _state.depth -= 1


@contextmanager
def held() -> Iterator[None]:
    """Let a signal wait inside for the next place: what is acquired is in someone's hands then."""
    depth, _state.depth = _state.depth, 0
    try:
        yield
    finally:
        _state.depth = depth


@contextmanager
def deferred() -> Iterator[None]:
    """Have a signal raise Interrupted after the body, where it could inside: what is drawn stays whole."""
    with held():
        yield
    if _state.depth:
        _raise_pending()
