"""Programs of which each reads what another one prints: the bytes never come through this process."""

import contextlib
import fcntl
import os
import selectors
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from .. import events, interrupts
from ..errors import BuildError, CommandError, reason_of
from ..log import logger
from . import output
from .children import announce, closed, start, stop
from .programs import heed_our_signal

_STOP_SECONDS = 5.0
# A pipe that holds more has its programs wait less for each other.
_PIPE_SIZE = 1 << 20


def flow(
    source: Sequence[str],
    targets: Sequence[tuple[Path, Sequence[Sequence[str]]]],
    *,
    env: Mapping[str, str] | None = None,
) -> None:
    """Have what *source* prints in the files *targets*, each as the programs that it is to pass print it.

    The first of these reads what *source* prints, and each other one what the one before does.  *env* replaces the
    environment of *source*.  Raises CommandError for the program that has failed, BuildError for one that can't be
    started, Interrupted if a signal came.
    """
    with _Flow() as programs:
        sinks = [programs.begin(path, filters) for path, filters in targets]
        if len(sinks) > 1:
            reader, writer = programs.pipe()
            programs.start(["tee", *(f"/dev/fd/{sink}" for sink in sinks[1:])], reader, sinks[0], sinks[1:])
            sinks = [writer]
        programs.start(source, None, sinks[0], env=env)
        programs.wait()


def together(commands: Sequence[Sequence[str]], *, progress: Callable[[str], float | None]) -> None:
    """Run *commands* side by side, and log what they print.

    Observers are told of the mean of what *progress* finds in the lines of each, while those that tell nothing have
    come nowhere.  Raises CommandError for the first that fails, BuildError for one that can't be started, Interrupted
    if a signal came; the others are ended then.
    """
    done = [0.0] * len(commands)
    meter = events.Meter()

    def tell(number: int, line: str) -> bool:
        fraction = progress(line)
        if fraction is not None:
            done[number] = fraction
            meter.at(sum(done), len(done))
        return fraction is not None

    with _Flow() as programs:
        for number, argv in enumerate(commands):
            programs.start(argv, None, None, progress=partial(tell, number))
        programs.wait(at_once=True)


def stream(
    source: Sequence[str],
    target: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    take: Callable[[str], bool],
    follow: Callable[[str], bool],
) -> list[CommandError]:
    """Have *target* read what *source* prints; return the errors of those that have failed, the source's first.

    *env* replaces the environment of *target*.  *take* is given each line of the source's stderr and *follow* each that
    the target prints: those for which they return true are no lines of the log.  Raises BuildError for one that can't
    be started, Interrupted if a signal came.
    """
    with _Flow() as programs:
        reader, writer = programs.pipe()
        programs.start(source, None, writer, progress=take)
        programs.start(target, reader, None, env=env, progress=follow)
        return programs.ended()


class _Flow:
    """Programs that run side by side; those that are left are ended on the way out."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._running: list[tuple[Sequence[str], subprocess.Popen[bytes], output.Lines, deque[str]]] = []
        # What this process has not given away yet.
        self._own: set[int] = set()

    def __enter__(self) -> "_Flow":
        return self

    def __exit__(self, *_: object) -> None:
        # With the pipes closed, what sudo runs as root ends by itself.
        self._close(*self._own)
        self._stack.close()

    def pipe(self) -> tuple[int, int]:
        """Return the ends of a new pipe."""
        ends = os.pipe()
        self._own |= {*ends}
        # A user may have so much in pipes, and no more.
        with contextlib.suppress(OSError):
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        return ends

    def _close(self, *descriptors: int) -> None:
        for descriptor in descriptors:
            os.close(descriptor)
            self._own.discard(descriptor)

    def begin(self, path: Path, filters: Sequence[Sequence[str]]) -> int:
        """Start *filters*, the last of which writes the file *path*; return what is to be written to."""
        try:
            sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise BuildError(f"{path.name} can't be made: {reason_of(error)}") from error
        self._own.add(sink)
        for argv in reversed(filters):
            reader, writer = self.pipe()
            self.start(argv, reader, sink)
            sink = writer
        return sink

    def start(
        self,
        argv: Sequence[str],
        stdin: int | None,
        stdout: int | None,
        others: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        progress: Callable[[str], bool] | None = None,
    ) -> None:
        """Start *argv*, which gets all these descriptors, *others* by their numbers; the log gets a *stdout* of None.

        What *progress* returns true for is no line of the log.
        """
        announce(argv)
        process = start(
            argv,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.STDOUT if stdout is None else subprocess.PIPE,
            env=env,
            group="group",
            heeds=signal.SIGTERM,
            pass_fds=others,
        )
        said: deque[str] = deque(maxlen=output.LAST_LINES)
        lines = output.Lines(partial(_log, argv[0].rpartition("/")[2], said), progress)
        self._running.append((argv, process, lines, said))
        self._stack.enter_context(closed(process))
        self._stack.callback(stop, process, signal.SIGTERM, _STOP_SECONDS)
        self._close(*{found for found in (stdin, stdout, *others) if found is not None})

    def wait(self, *, at_once: bool = False) -> None:
        """Wait for the end of all, and log what they say; CommandError if one has failed, *at_once* if that is set."""
        # The last ones were started first.  Those before one that has failed have nobody who reads, and fail too.
        failed = self.ended(at_once=at_once)
        for error in [found for found in failed if found.status != -signal.SIGPIPE] or failed:
            raise error

    def ended(self, *, at_once: bool = False) -> list[CommandError]:
        """Wait for the end of all, and log what they say; return the errors of those that have failed.

        They are in the order of the start; *at_once* raises the first.
        """
        with interrupts.interruptible(), selectors.DefaultSelector() as selector:
            for running in self._running:
                pipe = running[1].stderr or running[1].stdout
                assert pipe is not None
                selector.register(pipe, selectors.EVENT_READ, running)
            while selector.get_map():
                for descriptor in output.ready(selector, None):
                    argv, process, lines, said = selector.get_key(descriptor).data
                    if data := os.read(descriptor, 65536):
                        lines.feed(data)
                        continue
                    lines.close()
                    selector.unregister(descriptor)
                    if at_once and process.wait():
                        heed_our_signal(process.returncode)
                        raise CommandError(argv, process.returncode, [*said])
            for _, process, _, _ in self._running:
                process.wait()
        return [
            CommandError(argv, process.returncode, [*said])
            for argv, process, _, said in self._running
            if process.returncode
        ]


def _log(name: str, said: deque[str], line: str) -> None:
    said.append(line)
    logger.info("%s: %s", name, line)
