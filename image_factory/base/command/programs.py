"""Run programs, and functions in processes of their own: the only module that starts processes."""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.process
import os
import resource
import secrets
import selectors
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .. import events, interrupts
from ..errors import BuildError, CommandError, ConfigurationError, CrashError, command_hint, command_line
from ..log import logger

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")
_Message = TypeVar("_Message")

# The Debian package that has each program; see require().
PACKAGES = {
    "blkid": "util-linux",
    "cpio": "cpio",
    "fallocate": "util-linux",
    "gpg": "gpg",
    "gpg-agent": "gpg-agent",
    "gpgconf": "gpgconf",
    "gpgv": "gpgv",
    "guestfish": "guestfish",
    "qemu-img": "qemu-utils",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-x86_64": "qemu-system-x86",
    "rsync": "rsync",
    "sfdisk": "fdisk",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sudo": "sudo",
    "virsh": "libvirt-clients",
    "virt-install": "virtinst",
    "xorriso": "xorriso",
    "zerofree": "zerofree",
}

_LAST_LINES = 20
# A program that never ends its line doesn't fill the memory.
_LONGEST_LINE = 64 * 1024
# What a program prints is taken into memory whole where its caller wants it: at most so much.
_MOST_PRINTED = 64 << 20
# What a library that reads somebody else's data may take of memory.
_MEMORY_APART = 1 << 30
# What is left in the pipe when a program has exited is read for so long: a daemon that it
# started may hold the pipe open for ever.
_DRAIN_SECONDS = 0.2
_KILL_SECONDS = 5.0
# So often a silent program is looked at, and observers are told that it goes on.
_TICK_SECONDS = 1.0
_WATCH_SECONDS = 0.2
# Who ends a tree of processes from its leaves, as Jenkins does, comes to this one soon after.
_TREE_SECONDS = 2.0
# What sudo runs as root ends by itself.
_ROOTS_PATIENCE_SECONDS = 60.0

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_GET_CHILD_SUBREAPER = 37
_libc = ctypes.CDLL(None)


class _Children:
    """What is to be known of the children of this process.

    *own* are the numbers of those that it has started, *unattended* those of them that nobody waits for meanwhile.
    Nothing is reaped while one is *starting*, whose number is not known yet.
    """

    own: ClassVar[set[int]] = set()
    unattended: ClassVar[list[subprocess.Popen[bytes]]] = []
    starting = 0
    reaps = False
    adopts = False


@contextmanager
def reaping() -> Iterator[None]:
    """Have no child of this process stay a zombie inside.

    Those that others have left are children of the first process in a container, which image-factory may be.
    SIGCHLD gets a handler: where it is ignored, as a parent may have left it, each program seems to succeed.
    """
    previous = signal.signal(signal.SIGCHLD, lambda *_: _reap())
    signal.siginterrupt(signal.SIGCHLD, False)
    is_subreaper = ctypes.c_int()
    _libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(is_subreaper), 0, 0, 0)
    _Children.reaps, _Children.adopts = True, os.getpid() == 1 or bool(is_subreaper.value)
    try:
        _reap()
        yield
    finally:
        _Children.reaps = False
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)


def _reap() -> None:
    """Wait for the children that have ended and that nobody else waits for."""
    if _Children.starting or not _Children.reaps:
        return
    for process in list(_Children.unattended):
        if process.poll() is not None:
            _forget(process)
    with contextlib.suppress(ChildProcessError):
        while _Children.adopts:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            # Those behind one of our own are seen when that is waited for.
            if found is None or found.si_pid in _Children.own:
                return
            os.waitpid(found.si_pid, os.WNOHANG)


@contextmanager
def _starting() -> Iterator[None]:
    _Children.starting += 1
    try:
        yield
    finally:
        _Children.starting -= 1
        _reap()


def _leave_children() -> None:
    """Forget, in a forked process, the children of its parent."""
    _Children.own.clear()
    _Children.unattended.clear()
    _Children.starting = 0
    # A subreaper's children are none, and the first process in a container has no copy.
    _Children.adopts = False


os.register_at_fork(after_in_child=_leave_children)


def _start(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start *argv* with the *options* of Popen; it has to be ``_closed``, or waited for and forgotten."""
    with _starting():
        process = subprocess.Popen(argv, **options)
        _Children.own.add(process.pid)
    return process


def _fork(target: Callable[..., None], arguments: tuple[Any, ...]) -> multiprocessing.process.BaseProcess:
    """Start *target* in a process of its own; it has to be ``_joined``."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    with _starting(), _unable_to_start():
        process.start()
        _Children.own.add(process.pid or 0)
    return process


@contextmanager
def _unable_to_start() -> Iterator[None]:
    """Raise BuildError for an OSError inside, which who waits for the answer would take for one of its files."""
    try:
        yield
    except OSError as error:
        raise BuildError(f"No process can be started: {error.strerror}.") from error


def _joined(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    _Children.own.discard(process.pid or 0)
    _reap()


def _forget(process: subprocess.Popen[bytes]) -> None:
    """Forget *process*, which was waited for."""
    with contextlib.suppress(ValueError):
        _Children.unattended.remove(process)
    _Children.own.discard(process.pid)


def search_path() -> str:
    """Return PATH with the system directories that an ordinary user's PATH lacks on Debian."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def require(programs: Iterable[str]) -> None:
    """Raise ConfigurationError, naming every one of *programs* that is missing and its package."""
    missing = [name for name in programs if not shutil.which(name, path=search_path())]
    if missing:
        packages = sorted({PACKAGES[name] for name in missing if name in PACKAGES})
        own = sorted({name for name in missing if name not in PACKAGES})
        hints = (
            [f"Your own have to be executable, and on PATH or named by their path: {', '.join(own)}."] if own else []
        )
        hints += [f"Install them: apt-get install {' '.join(packages)}"] if packages else []
        raise ConfigurationError(f"Missing programs: {', '.join(missing)}.", hint=" ".join(hints))


class _Lines:
    """Cut a stream of bytes into lines, and hand each to *sink*.

    Of a line that a progress bar has overwritten with carriage returns, only the last state counts.
    With *progress*, each state is taken as it comes: those for which it returns true go no further.
    """

    def __init__(self, sink: Callable[[str], None], progress: Callable[[str], bool] | None = None) -> None:
        self._sink = sink
        self._progress = progress
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._emit(line)
        if self._progress is not None:
            states, overwritten, self._rest = self._rest.rpartition(b"\r")
            if overwritten:
                self._emit(states)
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
            state = states[-1].decode("utf-8", errors="replace").rstrip()
            if self._progress is None or not self._progress(state):
                self._sink(state)


def _ready(
    selector: selectors.BaseSelector, deadline: float | None, watch: Callable[[], None] | None = None
) -> list[int]:
    """Wait for the descriptors of *selector*; return those that are ready, none at *deadline*."""
    while True:
        interrupts.check()
        if watch is not None:
            watch()
        wait = _TICK_SECONDS if deadline is None else deadline - time.monotonic()
        ready = [key.fd for key, _ in selector.select(max(0.0, min(wait, _TICK_SECONDS)))]
        if ready or wait < _TICK_SECONDS:
            return ready
        events.tell(events.TimePassed())


def _end_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send *number* to this process when *parent*, which started it, is killed.

    Else it would go on beside the next build, which cleans up.  A program that sudo runs is not
    reached, as the kernel takes this back where rights are gained.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        # It was killed before the kernel knew; subprocess ends this process then.
        raise ProcessLookupError


def _stop_with(parent: int, number: signal.Signals) -> None:
    """Have *number* end this process, from its *parent* and from the kernel as ``_end_with`` does.

    A job in the background of a shell script ignores SIGINT, and so would what it starts.
    """
    signal.signal(number, signal.SIG_DFL)
    _end_with(parent, number)


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
        logger.info("Running: %s", command_line(argv))
    environment = dict(os.environ if env is None else env) | {"LC_ALL": "C.UTF-8"}
    try:
        with _input(stdin) as descriptor:
            process = _start(
                [shutil.which(argv[0], path=search_path()) or argv[0], *argv[1:]],
                stdin=descriptor,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if capture else subprocess.STDOUT,
                cwd=cwd,
                env=environment,
                bufsize=0,
                start_new_session=new_session,
                process_group=None if new_session else 0,
                umask=umask,
                preexec_fn=partial(_stop_with, os.getpid(), stop_signal),
            )
    except subprocess.SubprocessError as error:
        raise BuildError(f"Can't run {argv[0]}: {error}") from error
    except OSError as error:
        hint = f"Install it: apt-get install {PACKAGES[argv[0]]}" if argv[0] in PACKAGES else None
        raise BuildError(f"Can't run {argv[0]}: {error.strerror}", hint=hint) from error
    last_lines: deque[str] = deque(maxlen=_LAST_LINES)
    captured = bytearray()
    with _closed(process):
        try:
            with interrupts.interruptible():
                finished = _communicate(
                    process, captured if capture else None, last_lines, timeout, quiet, watch, progress
                )
        except BaseException:
            _stop(process, stop_signal, stop_seconds)
            raise
        if not finished:
            _stop(process, stop_signal, stop_seconds)
            raise BuildError(f"{argv[0]} did not end within {timeout:.0f} s", hint=command_hint(argv))
    if process.returncode:
        _heed_our_signal(process.returncode)
        if quiet:
            logger.info("Running failed: %s", command_line(argv))
        raise CommandError(argv, process.returncode, last_lines)
    return captured.decode("utf-8", errors="replace")


def _heed_our_signal(status: int) -> None:
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


def interact(argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    """Run *argv* on the user's terminal until the user ends it; its status doesn't matter.

    Ctrl-C is the program's own affair.
    """
    logger.info("Running: %s", command_line(argv))

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = _start(argv, cwd=cwd, env=env, preexec_fn=prepare)
        try:
            with interrupts.interruptible():
                process.wait()
        finally:
            process.kill()
            process.wait()
            _forget(process)
    except OSError as error:
        raise BuildError(f"Can't run {argv[0]}: {error.strerror}") from error
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _closed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Close the pipes of *process* on the way out; Popen's own context would wait for it for ever."""
    try:
        yield
    finally:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        if process.poll() is None:
            logger.error("Process %d can't be stopped and goes on: %s", process.pid, _shown(process))
            _Children.unattended.append(process)
        else:
            _forget(process)
        _reap()


def _shown(process: subprocess.Popen[bytes]) -> str:
    return command_line(list(map(str, process.args))) if isinstance(process.args, list) else str(process.args)


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

    def log_line(line: str) -> None:
        if not quiet:
            logger.info("%s: %s", name, line)
        last_lines.append(line)

    deadline = None if timeout is None else time.monotonic() + timeout
    lines = _Lines(log_line, None if progress is None else partial(_tell_progress, events.Meter(), progress))
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
                ready = _ready(selector, deadline, watch)
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
    if len(captured) > _MOST_PRINTED:
        raise _too_much(name)


def _too_much(name: str) -> BuildError:
    return BuildError(f"{name} printed more than {_MOST_PRINTED >> 20} MiB, which no answer of its has.")


def _tell_progress(meter: events.Meter, progress: Callable[[str], float | None], text: str) -> bool:
    fraction = progress(text)
    if fraction is not None:
        meter.at(fraction, 1.0)
    return fraction is not None


class Conversation:
    """A program that reads commands, one a line, and knows the command ``echo``; see ``conversation``."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, seconds: float) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._name = name
        self._seconds = seconds
        self._unread = b""
        # What the program itself or a guest's file prints can't be taken for it.
        self._end = secrets.token_hex(16)
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)

    def do(self, line: str) -> list[str]:
        """Give the command *line*, log it and what it prints; return what it prints."""
        logger.info("%s> %s", self._name, line)
        lines = self.ask(line)
        for answer in lines:
            logger.info("%s: %s", self._name, answer)
        return lines

    def ask(self, line: str) -> list[str]:
        """Give the command *line*, return what it prints.

        Raises CommandError if the program ends, BuildError if it doesn't answer in time.
        """
        lines: list[str] = []
        left = _MOST_PRINTED
        with interrupts.interruptible():
            with contextlib.suppress(BrokenPipeError):
                self._stdin.write(f"{line}\necho {self._end}\n".encode())
            for answer in self._lines():
                if answer == self._end:
                    return lines
                lines.append(answer)
                left -= len(answer) + 1
                if left < 0:
                    raise _too_much(self._name)
            raise self._failure()

    def end(self) -> None:
        """Let the program come to its end, which is to be a good one."""
        with interrupts.interruptible():
            self._stdin.close()
            for _ in self._lines():
                pass
            if self._status():
                raise self._failure()

    def _lines(self) -> Iterator[str]:
        deadline = time.monotonic() + self._seconds
        while (data := self._read_line(deadline)) is not None:
            line = data.decode("utf-8", errors="replace").rstrip()
            self._last_lines.append(line)
            yield line

    def _read_line(self, deadline: float) -> bytes | None:
        """Return the next line, None at the end of the output."""
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline or len(line) > _LONGEST_LINE:
                self._unread = rest
                return line
            with selectors.DefaultSelector() as selector:
                selector.register(self._stdout, selectors.EVENT_READ)
                if not _ready(selector, deadline):
                    raise BuildError(f"{self._name} did not answer within {self._seconds:.0f} s.")
            data = os.read(self._stdout.fileno(), 65536)
            if not data:
                self._unread = b""
                return line or None
            self._unread += data

    def _failure(self) -> CommandError:
        """Return why the program, which has closed its output, did not answer."""
        return CommandError([self._name], self._status(), self._last_lines)

    def _status(self) -> int:
        try:
            return self._process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{self._name} did not end within {self._seconds:.0f} s.") from None


@contextmanager
def conversation(
    argv: Sequence[str], *, env: Mapping[str, str], timeout: float, stop_seconds: float
) -> Iterator[Conversation]:
    """Give a conversation with the program *argv*, which ends at the end of its input.

    Its files are the user's alone.  It has *timeout* seconds for each answer, and *stop_seconds* to end after an
    exception.  When image-factory is killed the program sees the end of its input; a signal would keep it from removing
    its files.
    """
    logger.info("Running: %s", command_line(argv))
    try:
        process = _start(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env) | {"LC_ALL": "C.UTF-8"},
            bufsize=0,
            start_new_session=True,
            umask=0o077,
        )
    except OSError as error:
        hint = f"Install it: apt-get install {PACKAGES[argv[0]]}" if argv[0] in PACKAGES else None
        raise BuildError(f"Can't run {argv[0]}: {error.strerror}", hint=hint) from error
    with _closed(process):
        try:
            talk = Conversation(process, argv[0], timeout)
            yield talk
            talk.end()
        except BaseException:
            if process.stdin is not None:
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(stop_seconds)
            _stop(process, signal.SIGTERM, 10)
            raise


def _stop(process: subprocess.Popen[bytes], stop_signal: signal.Signals, seconds: float) -> None:
    """End *process* and its group; what sudo runs as root can't be killed, but is waited for."""
    for number, patience in ((stop_signal, seconds), (signal.SIGKILL, _KILL_SECONDS)):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, number)
        except PermissionError:
            # The helper ends a mount when nobody reads what it prints.
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
            patience = max(patience, _ROOTS_PATIENCE_SECONDS)
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
    """Run *argv* until it has printed *wanted* or *seconds* have passed; return the end of what it printed.

    The program is stopped then; its status doesn't matter.
    """
    logger.info("Running: %s", command_line(argv))
    output = bytearray()
    deadline = time.monotonic() + seconds
    process = _start(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        start_new_session=True,
        preexec_fn=partial(_end_with, os.getpid(), signal.SIGKILL),
    )
    with _closed(process):
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
                        if wanted not in output:
                            del output[:-_LONGEST_LINE]
        finally:
            _stop(process, signal.SIGKILL, 5.0)
    return bytes(output)


@contextmanager
def background(argv: Sequence[str], output: Path) -> Iterator[Callable[[], int | None]]:
    """Have *argv* run inside, and kill it on the way out; give what returns its status, None while it runs.

    What it prints goes to the file *output*.  It is killed with image-factory, too.
    """
    logger.info("Running: %s", command_line(argv))
    try:
        with output.open("wb") as file:
            process = _start(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"LC_ALL": "C.UTF-8"},
                start_new_session=True,
                preexec_fn=partial(_end_with, os.getpid(), signal.SIGKILL),
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"Can't run {argv[0]}: {error}") from error
    with _closed(process):
        try:
            yield process.poll
        finally:
            _stop(process, signal.SIGKILL, _KILL_SECONDS)


class Query:
    """A program that is asked something while the build goes on; neither it nor its answer is logged.

    It ends with image-factory, or when its answer is taken.
    """

    def __init__(self, argv: Sequence[str], stdin: int = subprocess.DEVNULL) -> None:
        """Start *argv* with the descriptor *stdin*."""
        self._process: subprocess.Popen[bytes] | None = None
        # What can't be started gives no answer: that is no reason to end a build.
        with contextlib.suppress(OSError, subprocess.SubprocessError), _starting():
            self._process = _start(
                [shutil.which(argv[0], path=search_path()) or argv[0], *argv[1:]],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {"LC_ALL": "C.UTF-8"},
                bufsize=0,
                start_new_session=True,
                preexec_fn=partial(_end_with, os.getpid(), signal.SIGKILL),
            )
            _Children.unattended.append(self._process)

    def answer(self, deadline: float) -> str | None:
        """Return what it prints; None if it fails, or is not through at *deadline* (time.monotonic)."""
        if self._process is None:
            return None
        # Past the deadline there is still time to read what it has printed long ago.
        seconds = max(_DRAIN_SECONDS, deadline - time.monotonic())
        with _closed(self._process):
            try:
                output, _ = self._process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                # Long after its end, another process may have its number.
                if self._process.poll() is None:
                    _stop(self._process, signal.SIGKILL, _KILL_SECONDS)
        return None if self._process.returncode else output.decode("utf-8", errors="replace")


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
        self._lines = {False: _Lines(partial(show, False)), True: _Lines(partial(show, True))}
        pipes = {on_stderr: os.pipe() for on_stderr in self._lines}
        self._outputs = {reader: self._lines[on_stderr] for on_stderr, (reader, _) in pipes.items()}
        writers = [writer for _, writer in pipes.values()]
        readers = [descriptor for other in (self, *others) for descriptor in other._readers()]
        arguments = (os.getpid(), writers, readers, sender, function)
        try:
            self._process = _fork(_accompany, arguments)
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
        _joined(self._process)
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
    _end_with(parent, signal.SIGTERM)
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
    with _unable_to_start():
        receiver, sender = multiprocessing.Pipe(duplex=False)
    try:
        process = _fork(_answer, (os.getpid(), sender, function))
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
                if time.monotonic() - told >= _TICK_SECONDS:
                    told = time.monotonic()
                    events.tell(events.TimePassed())
    finally:
        process.kill()
        _joined(process)
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
        _joined(process)
        raise CrashError.with_status(process.exitcode or 0) from None


def _answer(parent: int, sender: Connection, function: Callable[[Callable[[_Message], None]], _Result]) -> None:
    # Ctrl-C reaches this process too, but its parent decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _end_with(parent, signal.SIGKILL)
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
