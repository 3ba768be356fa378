"""Functions in processes of their own: beside this one, or for what may crash, hang or take much memory."""

import contextlib
import multiprocessing
import multiprocessing.process
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from .. import events, interrupts
from ..errors import CrashError
from .children import end_with, fork, joined, unable_to_start
from .output import TICK_SECONDS, Lines

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")
_Message = TypeVar("_Message")

# What a library that reads somebody else's data may take of memory.
_MEMORY_APART = 1 << 30
_WATCH_SECONDS = 0.2


class Companion:
    """A function that goes on in a process of its own, beside this one.

    Its process is in a group of its own, so that Ctrl-C reaches only image-factory, which stops it in good
    order; when image-factory is killed, it gets SIGTERM.  It has the handlers of signals that there are now, and
    no input.
    """

    def __init__(
        self,
        function: Callable[[Callable[[Any], None]], None],
        show: Callable[[bool, str], None],
        others: Iterable["Companion"],
    ) -> None:
        """Start *function*, which is given what sends a message here.

        *show* gets each line that it prints, with whether that is on stderr.  *others* are the companions that
        there are.
        """
        self._messages, sender = multiprocessing.Pipe(duplex=False)
        self._lines = {False: Lines(partial(show, False)), True: Lines(partial(show, True))}
        pipes = {on_stderr: os.pipe() for on_stderr in self._lines}
        self._outputs = {reader: self._lines[on_stderr] for on_stderr, (reader, _) in pipes.items()}
        writers = [writer for _, writer in pipes.values()]
        readers = [descriptor for other in (self, *others) for descriptor in other._readers()]
        arguments = (os.getpid(), writers, readers, sender, function)
        try:
            self._process = fork(_accompany, arguments)
        finally:
            sender.close()
            for writer in writers:
                os.close(writer)
        for reader in self._outputs:
            os.set_blocking(reader, False)
        # Unlike multiprocessing's own sentinel, it is not held by what the process has started.
        self._exited = os.pidfd_open(self._process.pid or 0)

    def _readers(self) -> list[int]:
        return [*self._outputs, *([] if self._messages.closed else [self._messages.fileno()])]

    def descriptors(self) -> list[int]:
        """Return what is ready when there is something to ``take``, or its process has ended."""
        return [*self._readers(), self._exited]

    def take(self) -> list[Any]:
        """Return the messages that have come, and show what it has printed."""
        for reader, lines in list(self._outputs.items()):
            with contextlib.suppress(BlockingIOError):
                while data := os.read(reader, 65536):
                    lines.feed(data)
                del self._outputs[reader]
                os.close(reader)
        messages = []
        try:
            while not self._messages.closed and self._messages.poll():
                messages.append(self._messages.recv())
        except (EOFError, OSError):
            # The second is the end in the middle of one.
            self._messages.close()
        return messages

    @property
    def has_ended(self) -> bool:
        """Whether its process has."""
        return not self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send the signal *number* to its process."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def close(self) -> int:
        """Wait for its end; return its exit status, negative for the signal that killed it."""
        joined(self._process)
        for lines in self._lines.values():
            lines.close()
        for descriptor in (self._exited, *self._outputs):
            os.close(descriptor)
        self._outputs.clear()
        self._messages.close()
        return self._process.exitcode or 0


def _accompany(
    parent: int,
    outputs: Sequence[int],
    others: Iterable[int],
    sender: Connection,
    function: Callable[[Callable[[Any], None]], None],
) -> None:
    os.setpgid(0, 0)
    end_with(parent, signal.SIGTERM)
    # A pipe that a process beside this one still has open is one whose writer is not told that its reader has gone.
    for descriptor in others:
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in zip((nothing, *outputs), (0, 1, 2), strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    function(sender.send)


def call_apart(function: Callable[[_Argument], _Result], argument: _Argument, seconds: float) -> _Result:
    """Return what *function* returns for *argument*, called in a process of its own.

    It is for a library that crashes, hangs or prints when its data is bad.  What *function* raises is
    raised here, MemoryError if it takes too much; CrashError if its process dies or takes longer than *seconds*.
    """
    deadline = time.monotonic() + seconds

    def watch(_: None) -> None:
        if time.monotonic() > deadline:
            raise CrashError(f"did not end within {seconds:.0f} s")

    return call_watched(partial(_within_memory, function, argument), watch)


def call_watched(
    function: Callable[[Callable[[_Message], None]], _Result], watch: Callable[[_Message | None], None]
) -> _Result:
    """Return what *function* returns, called in a process of its own with what sends a message here.

    *watch* is given each message, and None when none has come for a moment; what it raises ends the process, whatever
    that waits for.  What *function* raises is raised here; CrashError if its process dies.
    """
    with unable_to_start():
        receiver, sender = multiprocessing.Pipe(duplex=False)
    try:
        process = fork(_answer, (os.getpid(), sender, function))
    except BaseException:
        receiver.close()
        raise
    finally:
        sender.close()
    told = time.monotonic()
    try:
        with interrupts.interruptible():
            while True:
                interrupts.check()
                if not receiver.poll(_WATCH_SECONDS):
                    watch(None)
                elif (message := _received(receiver, process))[0]:
                    break
                else:
                    watch(message[1])
                if time.monotonic() - told >= TICK_SECONDS:
                    told = time.monotonic()
                    events.tell(events.TimePassed())
    finally:
        process.kill()
        joined(process)
        receiver.close()
    _, failure, result = message
    if failure is not None:
        raise failure
    answer: _Result = result
    return answer


def _received(receiver: Connection, process: multiprocessing.process.BaseProcess) -> Any:
    """Return the next message of *process*; CrashError if that has died, be it in the middle of one."""
    try:
        return receiver.recv()
    except (EOFError, OSError):
        joined(process)
        raise CrashError.with_status(process.exitcode or 0) from None


def _answer(parent: int, sender: Connection, function: Callable[[Callable[[_Message], None]], _Result]) -> None:
    # Ctrl-C reaches this process too, but its parent decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(parent, signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    try:
        answer: tuple[bool, Exception | None, _Result | None] = True, None, function(lambda m: sender.send((False, m)))
    except Exception as error:
        answer = True, error, None
    sender.send(answer)


def _within_memory(
    function: Callable[[_Argument], _Result], argument: _Argument, _send: Callable[[None], None]
) -> _Result:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = _MEMORY_APART if hard == resource.RLIM_INFINITY else min(hard, _MEMORY_APART)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    return function(argument)
