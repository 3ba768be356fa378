"""Run programs: the only module that uses subprocess."""

import contextlib
import io
import os
import secrets
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import interrupts
from .errors import BuildError, CommandError, ConfigurationError
from .log import logger

# The Debian package that has each program; see require().
PACKAGES = {
    "cpio": "cpio",
    "guestfish": "guestfish",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "rsync": "rsync",
    "sudo": "sudo",
    "virsh": "libvirt-clients",
    "virt-install": "virtinst",
    "xorriso": "xorriso",
    "zerofree": "zerofree",
}

_LAST_LINES = 20
# A program that never ends its line doesn't fill the memory.
_LONGEST_LINE = 64 * 1024
# What is left in the pipe when a program has exited is read for so long: a daemon that it
# started may hold the pipe open for ever.
_DRAIN_SECONDS = 0.2


def search_path() -> str:
    """Return PATH with the system directories that an ordinary user's PATH lacks on Debian."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def require(programs: Iterable[str]) -> None:
    """Raise ConfigurationError, naming every one of *programs* that is missing and its package."""
    missing = [name for name in programs if not shutil.which(name, path=search_path())]
    if missing:
        packages = sorted({PACKAGES.get(name, name) for name in missing})
        raise ConfigurationError(
            f"Missing programs: {', '.join(missing)}.",
            hint=f"Install them: apt-get install {' '.join(packages)}",
        )


class _Lines:
    """Cut a stream of bytes into lines, and hand each to *sink*.

    Of a line that a progress bar has overwritten with carriage returns, only the last state counts.
    """

    def __init__(self, sink: Callable[[str], None]) -> None:
        self._sink = sink
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._emit(line)
        if len(self._rest) > _LONGEST_LINE:
            self._emit(self._rest)
            self._rest = b""

    def close(self) -> None:
        if self._rest:
            self._emit(self._rest)
            self._rest = b""

    def _emit(self, line: bytes) -> None:
        states = [state for state in line.split(b"\r") if state.strip()]
        if states:
            self._sink(states[-1].decode("utf-8", errors="replace").rstrip())


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
) -> str:
    """Run *argv*, log the command and what it prints, and return its stdout if *capture* is set.

    The program gets stdin from /dev/null, LC_ALL=C.UTF-8, and no controlling terminal: nothing can
    wait for an answer, and Ctrl-C reaches only image-factory, which stops the program in good order:
    *stop_signal*, and after *stop_seconds* SIGKILL.  *env* replaces the environment.  With
    *new_session* false the program keeps the terminal's session, by which sudo remembers a password.

    Raises CommandError if it fails, BuildError if it can't be started or takes longer than *timeout*
    seconds, Interrupted if a signal came.
    """
    logger.info("Running: %s", shlex.join(argv))
    environment = dict(os.environ if env is None else env) | {"LC_ALL": "C.UTF-8"}
    try:
        process = subprocess.Popen(
            [shutil.which(argv[0], path=search_path()) or argv[0], *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if capture else subprocess.STDOUT,
            cwd=cwd,
            env=environment,
            bufsize=0,
            start_new_session=new_session,
            process_group=None if new_session else 0,
        )
    except OSError as error:
        hint = f"Install it: apt-get install {PACKAGES[argv[0]]}" if argv[0] in PACKAGES else None
        raise BuildError(f"Can't run {argv[0]}: {error.strerror}", hint=hint) from error
    last_lines: deque[str] = deque(maxlen=_LAST_LINES)
    captured = bytearray()
    with process:
        try:
            with interrupts.interruptible():
                finished = _communicate(process, captured if capture else None, last_lines, timeout)
        except BaseException:
            _stop(process, stop_signal, stop_seconds)
            raise
        if not finished:
            _stop(process, stop_signal, stop_seconds)
            raise BuildError(
                f"{argv[0]} did not end within {timeout:.0f} s", hint=f"The command was: {shlex.join(argv)}"
            )
    if process.returncode:
        raise CommandError(argv, process.returncode, last_lines)
    return captured.decode("utf-8", errors="replace")


def _communicate(
    process: subprocess.Popen[bytes],
    captured: bytearray | None,
    last_lines: deque[str],
    timeout: float | None,
) -> bool:
    """Read what *process* prints until it exits; return whether it did so within *timeout*."""
    name = Path(str(process.args[0] if isinstance(process.args, list) else process.args)).name

    def log_line(line: str) -> None:
        logger.info("%s: %s", name, line)
        last_lines.append(line)

    deadline = None if timeout is None else time.monotonic() + timeout
    lines = _Lines(log_line)
    sinks: dict[int, Callable[[bytes], None]] = {}
    if process.stdout is not None:
        sinks[process.stdout.fileno()] = lines.feed if captured is None else captured.extend
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
                ready = [key.fd for key, _ in selector.select(wait)]
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


class Conversation:
    """A program that reads commands, one a line, and knows the command ``echo``; see ``conversation``."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._argv = argv
        # What the program itself or a guest's file prints can't be taken for it.
        self._end = secrets.token_hex(16)
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env) | {"LC_ALL": "C.UTF-8"},
            bufsize=0,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin = self.process.stdin
        self._stdout = io.BufferedReader(self.process.stdout)  # type: ignore[type-var]

    def do(self, line: str) -> list[str]:
        """Give the command *line*, log it and what it prints; return what it prints."""
        logger.info("%s> %s", self._argv[0], line)
        lines = self.ask(line)
        for answer in lines:
            logger.info("%s: %s", self._argv[0], answer)
        return lines

    def ask(self, line: str) -> list[str]:
        """Give the command *line*, return what it prints; CommandError if the program ends."""
        lines: list[str] = []
        with interrupts.interruptible():
            with contextlib.suppress(BrokenPipeError):
                self._stdin.write(f"{line}\necho {self._end}\n".encode())
            for answer in self._lines():
                if answer == self._end:
                    return lines
                lines.append(answer)
        raise self.failure()

    def end(self) -> None:
        """Let the program come to its end, which is to be a good one."""
        with interrupts.interruptible():
            self._stdin.close()
            for _ in self._lines():
                pass
        if self.process.wait():
            raise self.failure()

    def _lines(self) -> Iterator[str]:
        while data := self._stdout.readline(_LONGEST_LINE):
            line = data.decode("utf-8", errors="replace").rstrip()
            self._last_lines.append(line)
            yield line

    def failure(self) -> CommandError:
        """Return why the program, which has closed its output, did not answer."""
        return CommandError(self._argv, self.process.wait(), self._last_lines)


@contextmanager
def conversation(argv: Sequence[str], *, env: Mapping[str, str], stop_seconds: float) -> Iterator[Conversation]:
    """Give a conversation with the program *argv*, which ends at the end of its input.

    After an exception it has *stop_seconds* for that.  When image-factory is killed it sees the end
    of its input, too.
    """
    logger.info("Running: %s", shlex.join(argv))
    try:
        talk = Conversation(argv, env)
    except OSError as error:
        raise BuildError(f"Can't run {argv[0]}: {error.strerror}") from error
    with talk.process:
        try:
            yield talk
            talk.end()
        except BaseException:
            if talk.process.stdin is not None:
                talk.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                talk.process.wait(stop_seconds)
            _stop(talk.process, signal.SIGTERM, 10)
            raise


def _stop(process: subprocess.Popen[bytes], stop_signal: signal.Signals, seconds: float) -> None:
    """End *process* and its group; what sudo runs as root can't be killed, but is waited for."""
    for number, patience in ((stop_signal, seconds), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, number)
        except PermissionError:
            patience = max(patience, 60.0)
        except ProcessLookupError:
            pass
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
    # What the program has started in its group and left behind.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def read_until(argv: Sequence[str], wanted: bytes, seconds: float) -> bytes:
    """Run *argv* until it has printed *wanted* or *seconds* have passed; return what it printed.

    The program is stopped then; its status doesn't matter.
    """
    logger.info("Running: %s", shlex.join(argv))
    output = bytearray()
    deadline = time.monotonic() + seconds
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        start_new_session=True,
    )
    with process:
        try:
            with interrupts.interruptible(), selectors.DefaultSelector() as selector:
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ)
                while wanted not in output and (wait := deadline - time.monotonic()) > 0:
                    if selector.select(wait):
                        data = os.read(process.stdout.fileno(), 65536)
                        if not data:
                            break
                        output += data
        finally:
            _stop(process, signal.SIGKILL, 5.0)
    return bytes(output)
