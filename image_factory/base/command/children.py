"""The processes that this one starts: how they begin, how they end, and that none stays a zombie."""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.process
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from .. import events, interrupts
from ..errors import BuildError, command_line
from ..log import logger
from . import installed

KILL_SECONDS = 5.0
# What sudo runs as root ends by itself.
_ROOTS_PATIENCE_SECONDS = 60.0

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_GET_CHILD_SUBREAPER = 37
_libc = ctypes.CDLL(None)


def announce(argv: Sequence[str]) -> None:
    """Say that *argv* is run."""
    logger.info("Running: %s", command_line(argv))
    events.tell(events.CommandRun(tuple(argv)))


class Children:
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
    Children.reaps, Children.adopts = True, os.getpid() == 1 or bool(is_subreaper.value)
    try:
        _reap()
        yield
    finally:
        Children.reaps = False
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)


def _reap() -> None:
    """Wait for the children that have ended and that nobody else waits for."""
    if Children.starting or not Children.reaps:
        return
    for process in list(Children.unattended):
        if process.poll() is not None:
            forget(process)
    with contextlib.suppress(ChildProcessError):
        while Children.adopts:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            # Those behind one of our own are seen when that is waited for.
            if found is None or found.si_pid in Children.own:
                return
            os.waitpid(found.si_pid, os.WNOHANG)


@contextmanager
def _starting() -> Iterator[None]:
    """Have a process started inside, which nobody else waits for and no signal cuts off from who is to stop it."""
    Children.starting += 1
    try:
        with interrupts.held():
            yield
    finally:
        Children.starting -= 1
        _reap()


def _leave_children() -> None:
    """Forget, in a forked process, the children of its parent."""
    Children.own.clear()
    Children.unattended.clear()
    Children.starting = 0
    # A subreaper's children are none, and the first process in a container has no copy.
    Children.adopts = False


os.register_at_fork(after_in_child=_leave_children)


def start(
    argv: Sequence[str],
    *,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = subprocess.PIPE,
    stderr: int | None = subprocess.STDOUT,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    locale: str | None = "C.UTF-8",
    umask: int = -1,
    group: Literal["session", "group", "ours"] = "session",
    heeds: signal.Signals | None = None,
    ends_with_us: signal.Signals | None = signal.SIGKILL,
    attended: bool = True,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start the program *argv*, which is also found where only root's PATH leads; BuildError if it can't be.

    It has to be ``closed``, or waited for and forgotten, but one that is not *attended* may end before that.  The
    descriptors are those of Popen, and None is our own.  *env* replaces the environment, *locale* is LC_ALL in it, None
    for that of *env*.  *umask* is the program's, if it is not negative.  It gets a session of its own, or only a
    *group*, or ours, and the descriptors *pass_fds* by their numbers.  The signal that it *heeds* ends it even where we
    ignore that; it gets *ends_with_us* when image-factory is killed.
    """
    try:
        with _starting():
            process = subprocess.Popen(
                [shutil.which(argv[0], path=installed.search_path()) or argv[0], *argv[1:]],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=cwd,
                env=dict(os.environ if env is None else env) | ({"LC_ALL": locale} if locale else {}),
                bufsize=0,
                start_new_session=group == "session",
                process_group=0 if group == "group" else None,
                umask=umask,
                pass_fds=pass_fds,
                preexec_fn=partial(_begin, os.getpid(), heeds, ends_with_us),
            )
            Children.own.add(process.pid)
            if not attended:
                Children.unattended.append(process)
    except subprocess.SubprocessError as error:
        raise BuildError(f"Can't run {argv[0]}: {error}") from error
    except OSError as error:
        package = installed.PACKAGES.get(argv[0])
        hint = f"Install it: apt-get install {package}" if package else None
        raise BuildError(f"Can't run {argv[0]}: {error.strerror}", hint=hint) from error
    return process


def _begin(parent: int, heeds: signal.Signals | None, ends_with_us: signal.Signals | None) -> None:
    """Set up the process that *parent* has started, before it becomes the program."""
    if heeds is not None:
        # A job in the background of a shell script ignores SIGINT, and so would what it starts.
        signal.signal(heeds, signal.SIG_DFL)
    if ends_with_us is not None:
        end_with(parent, ends_with_us)


def fork(target: Callable[..., None], arguments: tuple[Any, ...]) -> multiprocessing.process.BaseProcess:
    """Start *target* in a process of its own; it has to be ``joined``."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    with _starting(), unable_to_start():
        process.start()
        Children.own.add(process.pid or 0)
    return process


@contextmanager
def unable_to_start() -> Iterator[None]:
    """Raise BuildError for an OSError inside, which who waits for the answer would take for one of its files."""
    try:
        yield
    except OSError as error:
        raise BuildError(f"No process can be started: {error.strerror}.") from error


def joined(process: multiprocessing.process.BaseProcess) -> None:
    """Wait for the end of *process*."""
    process.join()
    Children.own.discard(process.pid or 0)
    _reap()


def forget(process: subprocess.Popen[bytes]) -> None:
    """Forget *process*, which was waited for."""
    with contextlib.suppress(ValueError):
        Children.unattended.remove(process)
    Children.own.discard(process.pid)


def end_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send *number* to this process when *parent*, which started it, is killed.

    Else it would go on beside the next build, which cleans up.  A program that sudo runs is not
    reached, as the kernel takes this back where rights are gained.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        # It was killed before the kernel knew; subprocess ends this process then.
        raise ProcessLookupError


@contextlib.contextmanager
def closed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Close the pipes of *process* on the way out; Popen's own context would wait for it for ever."""
    try:
        yield
    finally:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        if process.poll() is None:
            logger.error("Process %d can't be stopped and goes on: %s", process.pid, _shown(process))
            Children.unattended.append(process)
        else:
            forget(process)
        _reap()


def _shown(process: subprocess.Popen[bytes]) -> str:
    return command_line(list(map(str, process.args))) if isinstance(process.args, list) else str(process.args)


def stop(process: subprocess.Popen[bytes], stop_signal: signal.Signals, seconds: float) -> None:
    """End *process* and its group; what sudo runs as root can't be killed, but is waited for."""
    for number, patience in ((stop_signal, seconds), (signal.SIGKILL, KILL_SECONDS)):
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
