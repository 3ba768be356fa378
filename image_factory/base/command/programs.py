"""Programs that are run: to their end, on the user's terminal, until they have said something, or in the background."""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from .. import events, interrupts, terminal
from ..errors import BuildError, CommandError, command_hint, command_line, reason_of
from ..log import logger
from ..units import format_size
from . import output
from .children import KILL_SECONDS, announce, closed, forget, start, stop

# What is left in the pipe when a program has exited is read for so long: a daemon that it
# started may hold the pipe open for ever.
_DRAIN_SECONDS = 0.2
# Jenkins kills a process tree leaves first.  After a program died of SIGTERM, our own SIGTERM is waited for so long.
_TREE_SECONDS = 2.0


def run(
    argv: Sequence[str],
    *,
    capture: bool = False,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    stop_signal: signal.Signals = signal.SIGTERM,
    stop_seconds: float = 10,
    new_session: bool = True,
    umask: int = -1,
    quiet: bool = False,
    watch: Callable[[], None] | None = None,
    progress: Callable[[str], float | None] | None = None,
    stdin: bytes | Path | None = None,
) -> str:
    """Run *argv*, log the command and what it prints, and return its stdout if *capture* is set.

    The program gets *stdin* (bytes, or those of a file), else /dev/null, LC_ALL=C.UTF-8, and no controlling
    terminal: nothing can wait for an answer, and Ctrl-C reaches only image-factory, which stops the program
    in good order: *stop_signal*, and after *stop_seconds* SIGKILL.  *env* replaces the environment.  With
    *new_session* false the program keeps the terminal's session, by which sudo remembers a password.
    *umask* is the program's, if it is not negative.  With *quiet* the log has nothing of a command that
    succeeds.  *watch* is called every second; what it raises stops the program.  *progress* is given
    each line that goes to the log; one in which it finds a fraction does not, observers are told of it.

    Raises CommandError if it fails, BuildError if it can't be started or takes longer than *timeout*
    seconds, Interrupted if a signal came.
    """
    if not quiet:
        announce(argv)
    try:
        with _input(stdin) as descriptor:
            process = start(
                argv,
                stdin=descriptor,
                stderr=subprocess.PIPE if capture else subprocess.STDOUT,
                cwd=cwd,
                env=env,
                umask=umask,
                group="session" if new_session else "group",
                heeds=stop_signal,
                ends_with_us=stop_signal,
            )
    except OSError as error:
        raise BuildError(f"Can't run {argv[0]}: {reason_of(error)}") from error
    last_lines: deque[str] = deque(maxlen=output.LAST_LINES)
    captured = bytearray()
    with closed(process):
        try:
            with interrupts.interruptible():
                finished = _communicate(
                    process, captured if capture else None, last_lines, timeout, quiet, watch, progress
                )
        except BaseException:
            stop(process, stop_signal, stop_seconds)
            raise
        if not finished:
            stop(process, stop_signal, stop_seconds)
            raise BuildError(f"{argv[0]} did not end within {timeout:.0f} s", hint=command_hint(argv))
    if process.returncode:
        heed_our_signal(process.returncode)
        if quiet:
            logger.info("Running failed: %s", command_line(argv))
        raise CommandError(argv, process.returncode, last_lines)
    return captured.decode("utf-8", errors="replace")


def heed_our_signal(status: int) -> None:
    """Raise Interrupted if the signal that has ended a program with *status* comes to us, too."""
    number = -status if status < 0 else status - 128
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        with interrupts.interruptible():
            time.sleep(_TREE_SECONDS)


@contextlib.contextmanager
def _input(data: bytes | Path | None) -> Iterator[int]:
    """Give a descriptor to read *data* from: a file, so that nobody has to write to a pipe meanwhile."""
    if data is None:
        yield subprocess.DEVNULL
        return
    if isinstance(data, Path):
        with data.open("rb") as file:
            yield file.fileno()
        return
    descriptor = os.memfd_create("stdin")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def interact(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    watch: Callable[[], None] = lambda: None,
    ends_with_us: signal.Signals | None = None,
) -> int:
    """Run *argv* on the user's terminal until the user ends it; return its status as subprocess has it.

    On a terminal Ctrl-C is the program's own affair.  *watch* is called every second; what it raises kills the
    program.  Where the program stops itself, image-factory stops, too, and goes on with it.  It gets *ends_with_us*
    when image-factory is killed.
    """
    announce(argv)

    with ExitStack() as stack:
        if os.isatty(0):
            stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))
        stack.enter_context(terminal.kept())
        process = start(
            argv,
            stdin=None,
            stdout=None,
            stderr=None,
            cwd=cwd,
            env=env,
            locale=None,
            group="ours",
            heeds=signal.SIGINT,
            ends_with_us=ends_with_us,
        )
        try:
            with interrupts.interruptible():
                _attend(process, watch)
        finally:
            process.kill()
            process.wait()
            forget(process)
    return process.returncode


def _attend(process: subprocess.Popen[bytes], watch: Callable[[], None]) -> None:
    """Wait for the end of *process*, which is on the user's terminal."""
    exited = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(exited, selectors.EVENT_READ)
            while not selector.select(output.TICK_SECONDS):
                watch()
                # The shell that has started us waits for us, not for what we have started.
                if os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG):
                    os.kill(os.getpid(), signal.SIGSTOP)
                    process.send_signal(signal.SIGCONT)
    finally:
        os.close(exited)


def _communicate(
    process: subprocess.Popen[bytes],
    captured: bytearray | None,
    last_lines: deque[str],
    timeout: float | None,
    quiet: bool,
    watch: Callable[[], None] | None,
    progress: Callable[[str], float | None] | None,
) -> bool:
    """Read what *process* prints until it exits; return whether it did so within *timeout*."""
    name = Path(str(process.args[0] if isinstance(process.args, list) else process.args)).name

    left = output.MOST_LOGGED

    def log_line(line: str) -> None:
        nonlocal left
        last_lines.append(line)
        if not quiet and left >= 0:
            logger.info("%s: %s", name, line)
            left -= len(line) + 1
            if left < 0:
                logger.warning(
                    "%s prints more than %s: the log has no more of it.", name, format_size(output.MOST_LOGGED)
                )

    deadline = None if timeout is None else time.monotonic() + timeout
    lines = output.Lines(log_line, None if progress is None else partial(_tell_progress, events.Meter(), progress))
    sinks: dict[int, Callable[[bytes], None]] = {}
    if process.stdout is not None:
        sinks[process.stdout.fileno()] = lines.feed if captured is None else partial(_capture, name, captured)
    if process.stderr is not None:
        sinks[process.stderr.fileno()] = lines.feed
    exited = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for descriptor in sinks:
                selector.register(descriptor, selectors.EVENT_READ)
            selector.register(exited, selectors.EVENT_READ)
            while sinks or process.poll() is None:
                wait = None if deadline is None else deadline - time.monotonic()
                if wait is not None and wait <= 0:
                    return process.poll() is not None
                ready = output.ready(selector, deadline, watch)
                if exited in ready:
                    selector.unregister(exited)
                    process.wait()
                    deadline = time.monotonic() + _DRAIN_SECONDS
                for descriptor in ready:
                    if descriptor == exited:
                        continue
                    data = os.read(descriptor, 65536)
                    if data:
                        sinks[descriptor](data)
                    else:
                        selector.unregister(descriptor)
                        del sinks[descriptor]
        return True
    finally:
        os.close(exited)
        lines.close()


def _capture(name: str, captured: bytearray, data: bytes) -> None:
    captured += data
    if len(captured) > output.MOST_PRINTED:
        raise output.too_much(name)


def _tell_progress(meter: events.Meter, progress: Callable[[str], float | None], text: str) -> bool:
    fraction = progress(text)
    if fraction is not None:
        meter.at(fraction, 1.0)
    return fraction is not None


def read_until(argv: Sequence[str], wanted: bytes, seconds: float) -> bytes:
    """Run *argv* until it has printed *wanted* or *seconds* have passed; return the end of what it printed.

    The program is stopped then; its status doesn't matter.
    """
    announce(argv)
    printed = bytearray()
    deadline = time.monotonic() + seconds
    process = start(argv)
    with closed(process):
        try:
            with interrupts.interruptible(), selectors.DefaultSelector() as selector:
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ)
                while wanted not in printed and (wait := deadline - time.monotonic()) > 0:
                    if selector.select(wait):
                        data = os.read(process.stdout.fileno(), 65536)
                        if not data:
                            break
                        printed += data
                        if wanted not in printed:
                            del printed[: -output.LONGEST_LINE]
        finally:
            stop(process, signal.SIGKILL, 5.0)
    return bytes(printed)


@contextmanager
def background(
    argv: Sequence[str], path: Path, *, cwd: Path | None = None, pass_fds: Sequence[int] = ()
) -> Iterator[Callable[[], int | None]]:
    """Have *argv* run inside, and kill it on the way out; give what returns its status, None while it runs.

    What it prints goes to the file *path*.  It has the descriptors *pass_fds*.  It is killed with image-factory, too.
    """
    announce(argv)
    try:
        with path.open("wb") as file:
            process = start(argv, stdout=file.fileno(), cwd=cwd, pass_fds=pass_fds)
    except OSError as error:
        raise BuildError(f"Can't run {argv[0]}: {reason_of(error)}") from error
    with closed(process):
        try:
            yield process.poll
        finally:
            stop(process, signal.SIGKILL, KILL_SECONDS)


class Query:
    """A program that is asked something while the build goes on; neither it nor its answer is logged.

    It ends with image-factory, or when its answer is taken.
    """

    def __init__(self, argv: Sequence[str], stdin: int = subprocess.DEVNULL) -> None:
        """Start *argv* with the descriptor *stdin*."""
        self._process: subprocess.Popen[bytes] | None = None
        # What can't be started gives no answer: that is no reason to end a build.
        with contextlib.suppress(BuildError):
            self._process = start(argv, stdin=stdin, attended=False)

    def answer(self, deadline: float) -> str | None:
        """Return what it prints; None if it fails, or is not through at *deadline* (time.monotonic)."""
        if self._process is None:
            return None
        # Past the deadline there is still time to read what it has printed long ago.
        seconds = max(_DRAIN_SECONDS, deadline - time.monotonic())
        with closed(self._process):
            try:
                printed, _ = self._process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                # Long after its end, another process may have its number.
                if self._process.poll() is None:
                    stop(self._process, signal.SIGKILL, KILL_SECONDS)
        return None if self._process.returncode else printed.decode("utf-8", errors="replace")
