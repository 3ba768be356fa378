"""Several images by one command: each in a process of its own, one installation after the other.

A build stays one process, with its own log, record, console and lock, as if it had been started alone.
"""

import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from .base import events, interrupts
from .base.command import Companion
from .base.errors import CrashError, Interrupted

Send = Callable[[Any], None]
# Is given an image, and what ``Teller`` sends its messages by.
BuildOne = Callable[[str, Send], None]
# Is given an image, whether it goes to stderr, and a line.
Show = Callable[[str, bool, str], None]


@dataclass(frozen=True)
class Failure:
    """Why a build has failed, as the user is told it."""

    message: str
    hint: str | None


@dataclass(frozen=True)
class Outcome:
    """How the build of *image* has ended, after *seconds*; None where it has not begun.

    *is_unchanged* is whether nothing was built, as nothing has changed.
    """

    image: str
    seconds: float | None = None
    failure: Failure | None = None
    is_unchanged: bool = False


@dataclass(frozen=True)
class _Done:
    """The build is through; nothing was built if it *is_unchanged*."""

    is_unchanged: bool = False


class Teller:
    """An observer that tells the fleet what it waits for: that there is no installation machine any more."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_unchanged = False

    def notice(self, event: events.Event) -> None:
        """Tell of *event* if it is that."""
        if isinstance(event, events.Installed):
            self._tell(event)
        elif isinstance(event, events.ChangesSought):
            self._is_unchanged = not event.builds

    def done(self) -> None:
        """Tell that the build is through."""
        self._tell(_Done(self._is_unchanged))

    def failed(self, message: str, hint: str | None) -> None:
        """Tell that it has failed, and why."""
        self._tell(Failure(message, hint))

    def _tell(self, message: object) -> None:
        # The fleet's process was killed, and this one gets its signal.
        with suppress(OSError):
            self._send(message)


@dataclass
class _Running:
    image: str
    companion: Companion
    start: float
    installed: bool = False
    result: Failure | _Done | None = None


class Fleet:
    """The builds of several images.

    The next begins when the one before it has left its installation, or has failed, and no more are being finished
    than this machine has processors.
    """

    def __init__(self, images: Sequence[str], build: BuildOne, show: Show) -> None:
        self.outcomes = {image: Outcome(image) for image in images}
        self._waiting = list(images)
        self._running: list[_Running] = []
        self._build = build
        self._show = show

    def run(self) -> None:
        """Build all images, whatever comes of each; *outcomes* has that.

        On a signal all builds are given it, and have released what they had when Interrupted is raised.
        """
        try:
            while self._waiting or self._running:
                if self._waiting and self._has_room():
                    self._start(self._waiting.pop(0))
                else:
                    with interrupts.interruptible():
                        self._wait()
                    self._attend()
        except BaseException as error:
            number = error.signum if isinstance(error, Interrupted) else signal.SIGTERM
            for running in self._running:
                running.companion.send(signal.Signals(number))
            while self._running:
                self._wait()
                self._attend()
            raise

    def _has_room(self) -> bool:
        # Converting takes a processor, and libguestfs' appliance memory: finishing must not pile up either.
        room = len(self._running) <= (os.cpu_count() or 1)
        return room and all(running.installed for running in self._running)

    def _start(self, image: str) -> None:
        others = [running.companion for running in self._running]
        companion = Companion(partial(self._build, image), partial(self._show, image), others)
        self._running.append(_Running(image, companion, time.monotonic()))

    def _wait(self) -> None:
        """Wait until there is something to attend to."""
        with selectors.DefaultSelector() as selector:
            for running in self._running:
                for descriptor in running.companion.descriptors():
                    selector.register(descriptor, selectors.EVENT_READ)
            selector.select()

    def _attend(self) -> None:
        """Take what comes from the builds."""
        for running in list(self._running):
            # Before what it has said last is taken.
            ended = running.companion.has_ended
            for message in running.companion.take():
                if isinstance(message, events.Installed):
                    running.installed = True
                else:
                    running.result = message
            if ended:
                self._end(running)

    def _end(self, running: _Running) -> None:
        status = running.companion.close()
        self._running.remove(running)
        result = running.result
        if result is None:
            # It could say nothing any more.
            result = Failure(f"The build {CrashError.with_status(status).message}.", None)
        failure = result if isinstance(result, Failure) else None
        is_unchanged = isinstance(result, _Done) and result.is_unchanged
        self.outcomes[running.image] = Outcome(
            running.image, time.monotonic() - running.start, failure, is_unchanged=is_unchanged
        )
