"""Shells in the run of elements: where a user wants one, where something fails, and where there is no terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..conftest import PATIENCE
from .test_elements_run import Place
from .test_elements_run import place as place
from .test_elements_run import system as system


class Terminal:
    """A build on a terminal of its own."""

    def __init__(self, master: int, process: "subprocess.Popen[bytes]") -> None:
        self.master, self.process = master, process
        self.text = ""
        self._seen = 0

    def read(self, wanted: str) -> str:
        """Read until there is *wanted*; return what came before it, since the last time."""
        deadline = time.monotonic() + PATIENCE
        while wanted not in self.text[self._seen :]:
            assert select.select([self.master], [], [], deadline - time.monotonic())[0], self.text[-3000:]
            try:
                data = os.read(self.master, 65536)
            except OSError:
                break
            self.text += data.decode(errors="replace").replace("\r\n", "\n")
        before, found, _ = self.text[self._seen :].partition(wanted)
        assert found, self.text[-3000:]
        self._seen += len(before) + len(found)
        return before

    def do(self, line: str) -> str:
        """Give the shell *line*; return what it prints."""
        os.write(self.master, f"{line}; echo done'.'\n".encode())
        return self.read("\ndone.\n").rpartition("done'.'\n")[2]

    def leave(self) -> None:
        os.write(self.master, b"exit\n")

    def ended(self) -> int:
        """Read all that is left; return the exit status."""
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return self.process.wait(PATIENCE)
            if not data:
                return self.process.wait(PATIENCE)
            self.text += data.decode(errors="replace").replace("\r\n", "\n")


@contextmanager
def on_terminal(argv: list[str], place: Place, **environment: str) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    env = {**place.environment, "TERM": "dumb", **environment}
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *argv], cwd=place.path, env=env, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_before_and_after_phases(place: Place) -> None:
    place.element("work", extra_data="true", install="[ -e /var/by-hand ]; echo installed >/var/work")
    with on_terminal(place.command("work"), place, **{"break": "after-extra-data,before-install"}) as terminal:
        terminal.read("A shell is opened after extra-data.d; the build goes on when you leave it.")
        said = terminal.do('echo "$PWD $TARGET_ROOT.$IMAGE_ELEMENT"; [ -d "$TMP_MOUNT_PATH/proc/self" ] && echo proc')
        assert str(place.path) in said and "work" in said and said.endswith("proc")
        terminal.leave()
        terminal.read("A shell is opened before install.d")
        said = terminal.do(
            'touch /var/by-hand; echo "$PWD $HOME"; ls /tmp/in_target.d; [ ! -e /var/work ] && echo not-yet'
        )
        assert "/ /root" in said and "install.d" in said and said.endswith("not-yet")
        # A shell has the terminal for itself.
        terminal.do("sleep 471109 & kill %1")
        terminal.leave()
        assert terminal.ended() == 0, terminal.text
    assert "no job control" not in terminal.text and "terminal process group" not in terminal.text
    assert "./var/by-hand" in place.names() and "./tmp/in_target.d" not in place.names()


@pytest.mark.parametrize("outside", ["", "1"])
@pytest.mark.parametrize("way", ["variable", "option"])
def test_where_a_script_fails(place: Place, way: str, outside: str) -> None:
    place.element("bad", install="touch /var/tried; echo this fails; exit 3")
    argv = place.command("bad", *(["--shell-on-error"] if way == "option" else []))
    wanted = {"break": "after-error"} if way == "variable" else {}
    with on_terminal(argv, place, break_outside_target=outside, **wanted) as terminal:
        terminal.read("A shell is opened where install.d has failed; the build ends when you leave it.")
        said = terminal.do('[ -e /var/tried ] && echo inside; [ -e "$TMP_MOUNT_PATH/var/tried" ] && echo outside')
        assert said.split()[-1] == ("outside" if outside else "inside")
        terminal.leave()
        assert terminal.ended() == 1
    assert terminal.text.count("A shell is opened") == 1
    assert "install.d/50-bad of the element bad failed with status 3: this fails" in terminal.text
    assert os.listdir(place.out) == []
    assert str(place.out) not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")


def test_a_build_that_is_ended_in_a_shell(place: Place) -> None:
    place.element("work", install="true")
    with on_terminal(place.command("work"), place, **{"break": "before-install"}) as terminal:
        terminal.read("A shell is opened before install.d")
        assert terminal.do("echo here").endswith("here")
        # setsid is the build itself by now.
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.ended() == 143
    assert os.listdir(place.out) == []


def test_without_a_terminal(place: Place) -> None:
    place.element("work", install="true")
    place.environment["break"] = "before-install,after-error"
    said = place.build("work")
    assert "WARNING: break=after-error,before-install opens no shell, as there is no terminal." in said
    assert "A shell is opened" not in said


def test_a_command_of_the_users(place: Place) -> None:
    place.element("bad", install="touch /var/tried; exit 3")
    place.environment |= {"break": "after-error", "break_cmd": "ls /var/tried; exit 9"}
    said = place.build("bad", status=1)
    assert re.search(
        r"break_cmd is run where install.d has failed.*nsenter: /var/tried\n.*failed with status 3", said, re.S
    )
    assert "opens no shell" not in said


def test_a_place_that_is_none(place: Place) -> None:
    place.environment["break"] = "before-instal"
    said = place.build("", "--check", status=2)
    assert "The variable break: 'before-instal' is no place in the run of elements." in said
    assert "before-PHASE, after-PHASE, after-error; PHASE is root, extra-data," in said
