"""Carry out one task in a system, wherever that is: its tries, its time, its secrets, and how it failed."""

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..base import command, events, interrupts
from ..base.errors import BuildError, CommandError
from ..base.events import TaskEnded
from ..base.log import logger, printable
from ..base.units import format_duration
from ..configuration.settings import Task
from . import digest_of, payload, receiving, script_of

# Statuses of the line of shell that ``receiving`` gives, and of timeout(1) in it.
_NOT_RECEIVED = 125
# busybox has no status of its own for it; a task that heeds no SIGTERM is killed.
_TOO_LONG = (124, 128 + signal.SIGTERM, 128 + signal.SIGKILL)
# Of ssh(1).
_NO_CONNECTION = 255
_BROKEN_SECONDS = 60.0
# The system ends a task that takes too long.  Where it doesn't, it is left after so many more seconds.
GRACE_SECONDS = 30.0
_LONGEST_SAID = 300


class PlaceGoneError(BuildError):
    """The system that tasks run in is there no more: no other try can help, and none of the next tasks."""


@dataclass(frozen=True)
class Place:
    """A system that tasks run in.

    *shell* makes the argv that runs a line of shell as root there.  *directory*, on a tmpfs there, is made for a task
    and removed.  *watch*, called each second, raises PlaceGoneError when the system is there no more.  *own*
    carries out those that this machine does, by their types, within a number of seconds if that is not None.
    *script* runs one that the system runs, where no command of this machine does.
    """

    shell: Callable[[str], Sequence[str]]
    directory: str
    watch: Callable[[], None] | None = None
    own: Mapping[str, Callable[[Task, float | None], None]] = field(default_factory=dict)
    script: Callable[[Task, float | None], None] | None = None


def script_argv(task: Task, place: Place) -> list[str]:
    """Return the command that carries out *task*, whose kind has a script, at *place*."""
    return [*place.shell(receiving(script_of(task), place.directory, _limit(task)))]


def run_task(task: Task, place: Place) -> None:
    """Carry out *task* at *place*; BuildError says why it failed, unless it may fail.

    Raises PlaceGoneError where the system is gone.
    """
    start = time.monotonic()
    problem = ""
    try:
        for left in range(task.retries, -1, -1):
            problem = _tried(task, place)
            if not problem or not left:
                break
            logger.warning("Task %s %s. It is tried again.", task.name, problem)
    except PlaceGoneError as error:
        _tell(task, start, "failed", error.message)
        raise PlaceGoneError(f"Task {task.name} failed: {error.message}.", hint=error.hint) from error
    if not problem:
        _tell(task, start, "passed", "")
    elif task.allow_failure:
        _tell(task, start, "allowed", problem)
        logger.warning("Task %s %s. It may fail.", task.name, problem)
    else:
        _tell(task, start, "failed", problem)
        raise BuildError(f"Task {task.name} {problem}.", hint="--shell-on-error gives a shell where a task failed.")


def _tell(task: Task, start: float, outcome: str, message: str) -> None:
    seconds = time.monotonic() - start
    events.tell(TaskEnded(task.name, task.type, digest_of(task), seconds, outcome, printable(message)))


def _limit(task: Task) -> float | None:
    return None if math.isinf(task.timeout) else task.timeout


def _tried(task: Task, place: Place) -> str:
    """Try *task* once; return how it failed, empty if it did not."""
    limit = _limit(task)
    start = time.monotonic()
    try:
        if task.type in place.own:
            place.own[task.type](task, limit)
        elif place.script:
            place.script(task, limit)
        else:
            command.run(
                script_argv(task, place),
                stdin=payload(script_of(task)),
                timeout=None if limit is None else limit + GRACE_SECONDS,
                watch=place.watch,
            )
    except PlaceGoneError:
        raise
    except CommandError as error:
        if limit is not None and error.status in _TOO_LONG and time.monotonic() - start >= limit:
            return _too_long(limit)
        said = f": {printable(error.last_line)[:_LONGEST_SAID]}" if error.last_line else ""
        if error.status == _NO_CONNECTION and place.watch:
            _look_for_a_reason(place.watch)
            raise PlaceGoneError(f"the connection to the system broke{said}") from error
        if error.status == _NOT_RECEIVED:
            return f"could not be put into the system{said}"
        return f"failed with status {error.status}{said}" if error.status > 0 else f"{_killed(error)}{said}"
    except BuildError as error:
        if limit is not None and time.monotonic() - start >= limit:
            return _too_long(limit)
        return f"can't be run: {error.message.removesuffix('.')}"
    return ""


def _look_for_a_reason(watch: Callable[[], None]) -> None:
    """Give a system that goes off, or starts anew, the time until that is seen."""
    deadline = time.monotonic() + _BROKEN_SECONDS
    with interrupts.interruptible():
        while time.monotonic() < deadline:
            watch()
            events.tell(events.TimePassed())
            time.sleep(1.0)


def _too_long(limit: float) -> str:
    return f"did not end within {format_duration(limit)}"


def _killed(error: CommandError) -> str:
    return f"was killed by signal {-error.status}"
