"""Conversations: programs that are given one command after another."""

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from .. import interrupts
from ..errors import BuildError, CommandError
from ..log import logger
from . import output
from .children import announce, closed, start, stop

# guestfish reads so many bytes of a line at most, and takes the rest of it for the next one.
_LONGEST_COMMAND = 8190


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
        self._last_lines: deque[str] = deque(maxlen=output.LAST_LINES)

    def do(self, line: str, seconds: float | None = None) -> list[str]:
        """Give the command *line*, log it and what it prints; return what it prints."""
        logger.info("%s> %s", self._name, line)
        lines = self.ask(line, seconds)
        for answer in lines:
            logger.info("%s: %s", self._name, answer)
        return lines

    def ask(self, line: str, seconds: float | None = None) -> list[str]:
        """Give the command *line*, return what it prints.

        Raises CommandError if the program ends, BuildError if it doesn't answer in time: in *seconds*, if it is a
        command that may take longer than others.
        """
        lines: list[str] = []
        left = output.MOST_PRINTED
        with interrupts.interruptible():
            self._say(line)
            for answer in self._lines(seconds):
                if answer == self._end:
                    return lines
                lines.append(answer)
                left -= len(answer) + 1
                if left < 0:
                    raise output.too_much(self._name)
            raise self._failure()

    def ask_bytes(self, line: str, most: int) -> bytes:
        """Give the command *line*, return the bytes that it prints, which are no lines.

        Raises what ``ask`` does, and BuildError, when all has been taken, if they are more than *most*.
        """
        end = f"{self._end}\n".encode()
        data, is_too_much = bytearray(), False
        deadline = time.monotonic() + self._seconds
        with interrupts.interruptible():
            self._say(line)
            while not data.endswith(end):
                if is_too_much := is_too_much or len(data) > most + len(end):
                    del data[: -len(end)]
                more = self._read(deadline)
                if not more:
                    self._last_lines.extend(data.decode("utf-8", errors="replace").splitlines())
                    raise self._failure()
                data += more
        if is_too_much or len(data) > most + len(end):
            raise BuildError(f"{self._name} printed more than {most} bytes.")
        return bytes(data[: -len(end)])

    def _say(self, line: str) -> None:
        # What is beyond it would be another command.
        if len(line) > _LONGEST_COMMAND:
            raise BuildError(f"{self._name} takes no command of more than {_LONGEST_COMMAND} bytes.")
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(f"{line}\necho {self._end}\n".encode())

    def end(self) -> None:
        """Let the program come to its end, which is to be a good one."""
        with interrupts.interruptible():
            self._stdin.close()
            for _ in self._lines():
                pass
            if self._status():
                raise self._failure()

    def _lines(self, seconds: float | None = None) -> Iterator[str]:
        deadline = time.monotonic() + (seconds or self._seconds)
        while (data := self._read_line(deadline)) is not None:
            line = data.decode("utf-8", errors="replace").rstrip()
            self._last_lines.append(line)
            yield line

    def _read_line(self, deadline: float) -> bytes | None:
        """Return the next line, None at the end of the output."""
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline or len(line) > output.LONGEST_LINE:
                self._unread = rest
                return line
            data = self._read(deadline)
            if not data:
                self._unread = b""
                return line or None
            self._unread += data

    def _read(self, deadline: float) -> bytes:
        """Return what is printed next, nothing at the end of the output."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            if not output.ready(selector, deadline):
                raise BuildError(f"{self._name} did not answer within {self._seconds:.0f} s.")
        return os.read(self._stdout.fileno(), 65536)

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
    announce(argv)
    process = start(argv, stdin=subprocess.PIPE, env=env, umask=0o077, heeds=signal.SIGTERM, ends_with_us=None)
    with closed(process):
        try:
            talk = Conversation(process, argv[0], timeout)
            yield talk
            talk.end()
        except BaseException:
            if process.stdin is not None:
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(stop_seconds)
            stop(process, signal.SIGTERM, 10)
            raise
