"""Programs on the user's terminal: what they leave of it, how they stop and end, and how image-factory ends meanwhile.

Each scene is a process of its own, on a terminal that is a pair of descriptors.
"""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from ..conftest import PATIENCE, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD = f"""
import os, signal, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from image_factory.base import command, interrupts, terminal
from image_factory.base.errors import BuildError, Interrupted
def say(text):
    os.write(1, text.encode() + b"\\n")
def interact(*words, **more):
    return command.interact(["sh", "-c", *words], **more)
"""
# As ssh has a terminal.
RAW = "stty raw -echo; echo ready; exec sleep 471110"


class Scene:
    """A process with *terminal* as its own."""

    def __init__(self, terminal: int, process: "subprocess.Popen[bytes]") -> None:
        self.terminal = terminal
        self.process = process
        self.text = ""

    def read(self, wanted: str, seconds: float = PATIENCE) -> None:
        """Read until there is *wanted* in what was shown."""
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            has_ended = self.process.poll() is not None
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.text += os.read(self.terminal, 65536).decode()
            else:
                assert not has_ended and time.monotonic() < deadline, self.text

    def rest(self) -> None:
        """Read what is left when the process has ended."""
        while select.select([self.terminal], [], [], 0.1)[0]:
            self.text += os.read(self.terminal, 65536).decode()

    def close(self) -> None:
        """Close the terminal, as when its window is."""
        if self.terminal >= 0:
            os.close(self.terminal)
            self.terminal = -1

    def type(self, data: bytes) -> None:
        os.write(self.terminal, data)

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in path.read_text().split()]

    def state(self) -> str:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextmanager
def on_terminal(argv: list[str], stdin: int | None = None) -> Iterator[Scene]:
    """Have *argv* run on a terminal, or with another *stdin*, in a session of its own; the slave stays open."""
    master, slave = pty.openpty()
    try:
        own = ["setsid", *(["--ctty"] if stdin is None else []), *argv]
        process = subprocess.Popen(own, stdin=slave if stdin is None else stdin, stdout=slave, stderr=slave)
        found = Scene(master, process)
        try:
            yield found
        finally:
            process.kill()
            process.wait()
            found.close()
    finally:
        os.close(slave)


def scene(program: str, stdin: int | None = None) -> AbstractContextManager[Scene]:
    """Have *program* run on a terminal."""
    return on_terminal([sys.executable, "-c", HEAD + textwrap.dedent(program)], stdin)


def modes(terminal: int) -> list[object]:
    return termios.tcgetattr(terminal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_program_and_gives_the_terminal_back(number: signal.Signals) -> None:
    program = f"""
        with interrupts.handled():
            try:
                interact({RAW!r})
            except Interrupted as error:
                say(error.message)
                sys.exit(error.exit_status)
    """
    with scene(program) as found:
        before = modes(found.terminal)
        found.read("ready")
        assert modes(found.terminal) != before
        [child] = found.children()
        found.process.send_signal(number)
        found.read(f"Stopped by {number.name}.")
        assert found.process.wait(PATIENCE) == 128 + number
        assert modes(found.terminal) == before
        assert not Path(f"/proc/{child}").exists()


def test_what_watches_ends_the_program() -> None:
    program = f"""
        def watch():
            raise BuildError("it is lost")
        try:
            interact({RAW!r}, watch=watch)
        except BuildError as error:
            say(error.message)
    """
    with scene(program) as found:
        before = modes(found.terminal)
        found.read("it is lost")
        assert found.process.wait(PATIENCE) == 0
        assert modes(found.terminal) == before


def test_status_and_ctrl_c() -> None:
    """On a terminal Ctrl-C is the program's own."""
    program = """
        with interrupts.handled():
            one = interact("trap 'echo caught' INT; echo ready; read line; read line; exit 7")
            say(f"status {[one, interact('kill -9 $$')]}")
    """
    with scene(program) as found:
        found.read("ready")
        found.type(b"\x03")
        found.read("caught")
        found.type(b"one\ntwo\n")
        found.read("status [7, -9]")
        assert found.process.wait(PATIENCE) == 0


def test_ctrl_c_ends_what_reads_from_elsewhere() -> None:
    program = """
        with interrupts.handled():
            try:
                interact("echo ready; exec sleep 471110")
            except Interrupted as error:
                sys.exit(error.exit_status)
    """
    reader, writer = os.pipe()
    try:
        with scene(program, reader) as found:
            found.read("ready")
            os.killpg(found.process.pid, signal.SIGINT)
            assert found.process.wait(PATIENCE) == 130
    finally:
        os.close(reader)
        os.close(writer)


def test_a_program_that_stops_stops_image_factory() -> None:
    """As ssh does after ``~^Z``: the shell that waits goes on, and so do both with its ``fg``."""
    program = """
        status = interact("echo ready; kill -STOP $$; echo again")
        say(f"status {status}")
    """
    with scene(program) as found:
        found.read("ready")
        wait_for(lambda: found.state() == "T", "the stop")
        found.process.send_signal(signal.SIGCONT)
        found.read("status 0")
        assert "again" in found.text
        assert found.process.wait(PATIENCE) == 0


def test_the_program_ends_with_image_factory() -> None:
    with scene(f"interact({RAW!r}, ends_with_us=signal.SIGTERM)") as found:
        found.read("ready")
        [child] = found.children()
        found.process.kill()
        found.process.wait(PATIENCE)
        wait_for(lambda: not Path(f"/proc/{child}").exists(), "its end")


def test_raw() -> None:
    """Each key comes as it is typed, and all is as before when a signal ends that."""
    program = """
        with interrupts.handled():
            try:
                with terminal.raw(), interrupts.interruptible():
                    say(f"attended {terminal.is_attended()}")
                    say(repr(os.read(0, 1)))
                    os.read(0, 1)
            except Interrupted as error:
                sys.exit(error.exit_status)
    """
    with scene(program) as found:
        before = modes(found.terminal)
        found.read("attended True")
        found.type(b"\x03")
        found.read(r"b'\x03'")
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(PATIENCE) == 143
        assert modes(found.terminal) == before
