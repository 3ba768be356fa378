"""QEMU's monitor, by which a machine that runs is told what to do: a line of JSON (QMP), and its answer."""

import json
import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...base import interrupts
from ...base.errors import BuildError

_ANSWER_SECONDS = 60.0
_READ_BYTES = 64 * 1024


class Monitor:
    """The monitor that QEMU has at the pipe *path*; *watch* is called while it is waited for.

    BuildError if QEMU refuses something, or does not answer.
    """

    def __init__(self, path: Path, watch: Callable[[], None]) -> None:
        self._watch = watch
        self._unread = b""
        try:
            # QEMU, which reads there, can be written to without waiting.
            self._commands = os.open(f"{path}.in", os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            raise BuildError("QEMU does not listen any more: the machine has ended.") from error
        self._answers = os.open(f"{path}.out", os.O_RDONLY | os.O_NONBLOCK)

    def close(self) -> None:
        """Leave QEMU alone."""
        os.close(self._commands)
        os.close(self._answers)

    def tell(self, command: str, **arguments: Any) -> None:
        """Have QEMU carry out *command*."""
        asked = {"execute": command, "arguments": arguments}
        try:
            os.write(self._commands, json.dumps(asked).encode() + b"\n")
        except OSError as error:
            raise BuildError(f"QEMU can't be told to {command}: {error.strerror}.") from error
        deadline = time.monotonic() + _ANSWER_SECONDS
        with interrupts.interruptible():
            while (answer := self._answer()) is None:
                self._watch()
                if time.monotonic() >= deadline:
                    raise BuildError(f"QEMU does not answer to {command}.")
                select.select([self._answers], [], [], 1.0)
        if "error" in answer:
            raise BuildError(f"QEMU refuses to {command}: {answer['error'].get('desc')}")

    def _answer(self) -> dict[str, Any] | None:
        """Return the next answer, None if there is none yet; what QEMU says unasked is left out."""
        with suppress(BlockingIOError):
            self._unread += os.read(self._answers, _READ_BYTES)
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            said: dict[str, Any] = json.loads(line) if line.strip() else {}
            if said.keys() & {"return", "error"}:
                return said
        return None
