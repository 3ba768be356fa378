"""What a build is made from and what it does, noted for those who tell of it when it is through."""

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ..base import events, files, interrupts
from ..base.errors import command_line
from ..configuration.settings import ANSWER_FILE_KEYS, BOOTSTRAP_KEY
from .record import iso, without_secrets


@dataclass(frozen=True)
class Input:
    """A file that a build is made from, as ``InputUsed`` names it; *sha256* is None where it has no digest."""

    key: str
    origin: str
    sha256: str | None
    verified_by: str | None


@dataclass
class Done:
    """A step, and the *commands* that it has run, as the log has them."""

    name: str
    commands: list[str] = field(default_factory=list)


class Witness:
    """An observer that notes the inputs, steps and commands of a build."""

    def __init__(self) -> None:
        self.started = iso(datetime.now(UTC))
        self.steps: list[Done] = []
        self._used: list[tuple[events.InputUsed, int | None]] = []
        self._digests: dict[int, str] = {}
        self._open = ExitStack()

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Note what happens inside; what is digested then is the files as they were used."""
        with self._open, events.observed(self):
            yield

    def notice(self, event: events.Event) -> None:
        """Note *event* if it is one of those."""
        match event:
            case events.InputUsed():
                self._used.append((event, self._opened(event)))
            case events.StepStarted():
                self.steps.append(Done(event.name))
            case events.CommandRun() if self.steps:
                self.steps[-1].commands.append(command_line(event.argv))

    def _opened(self, event: events.InputUsed) -> int | None:
        # What a template became has secrets, and is known but for them: a digest that others may read lets them try
        # passwords.  The template itself has none.
        is_answer_file = event.key in (*ANSWER_FILE_KEYS, BOOTSTRAP_KEY)
        path = Path(event.origin) if is_answer_file else event.path
        if path is None:
            return None
        try:
            # O_NONBLOCK: a named pipe would be waited for.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return None
        self._open.callback(os.close, descriptor)
        return descriptor

    def inputs(self) -> list[Input]:
        """Return the files that were used, in this order, once each."""
        found = (
            Input(event.key, without_secrets(event.origin), self._digest(descriptor), event.verified_by)
            for event, descriptor in self._used
        )
        return list(dict.fromkeys(found))

    def _digest(self, descriptor: int | None) -> str | None:
        if descriptor is None:
            return None
        if descriptor not in self._digests:
            with suppress(OSError), interrupts.interruptible(), open(descriptor, "rb", closefd=False) as file:
                file.seek(0)
                self._digests[descriptor], _ = files.digest_of_stream(file)
        return self._digests.get(descriptor)
