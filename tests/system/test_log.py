"""The log: safe to show, with the steps and their seconds, on stderr and in a file."""

import logging
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from image_factory.base import errors, events, log

from ..conftest import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
# As the released program has it.
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} image-factory \[\d+\] (INFO|WARNING|ERROR): (.*)")

PRINTABLE = {
    "plain text": "plain text",
    "a\tb\nc": "a\tb\nc",
    "grün \N{GRINNING FACE}": "grün \N{GRINNING FACE}",
    "\x1b[31mred\x1b[0m": "red",
    "\x1b[1;31;40mred\x1b[m": "red",
    "\x1b[2J\x1b[H\x1b[?25l": "",
    "\x1b[38:5:1mred": "red",
    "\x1b]0;title\x07after": "after",
    "\x1b]0;title\x1b\\after": "after",
    "\x1b]8;;http://example.com\x07link\x1b]8;;\x07": "link",
    "\x1b]52;c;aGk=\x07": "",
    "\x1b]0;no end": "",
    "\x1b(B\x1b)0text": "text",
    "\x1bc\x1b7": "?c?7",
    "\x1bM": "",
    "\x1bP1$r0m\x1b\\": "1$r0m",
    "\x1b[": "",
    "\x1b[31": "",
    "\x1b": "?",
    "\x1b\x1b[31m": "?",
    "a\rb": "a?b",
    "a\x08b\x00\x07": "a?b??",
    "a\x7fb": "a?b",
    "\x9b31mred": "?31mred",
    "\x85\x9d": "??",
    "\x0b\x0c": "??",
    "\udce9": "\udce9",
}


@pytest.mark.parametrize(("text", "shown"), PRINTABLE.items(), ids=map(ascii, PRINTABLE))
def test_printable(text: str, shown: str) -> None:
    assert log.printable(text) == shown


def test_nothing_that_controls_a_terminal_is_left() -> None:
    controls = [chr(code) for code in [*range(32), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"]
    for first in controls:
        for second in [*controls, *"[](Pc;\\ m"]:
            shown = log.printable(f"{first}{second}31m{first}x{second}")
            assert not set(shown) & set(controls)


def test_printable_takes_no_more_than_linear_time() -> None:
    start = time.monotonic()
    for text in (
        "\x1b[" + "1;" * 500_000,
        "\x1b]" * 500_000,
        "\x1b[ " * 300_000,
        "\x1b" * 1_000_000,
        "\x1b  " * 300_000,
    ):
        log.printable(text)
    assert time.monotonic() - start < 60


# Each program has log, and the path of a file.
HEAD = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from image_factory.base import log
path = Path(sys.argv[1])
log.set_up()
"""


def run(program: str, path: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(program), path], capture_output=True, text=True, timeout=PATIENCE
    )


def messages(text: str) -> list[tuple[str, str]]:
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(found), text
    return [(match[1], match[2]) for match in found if match]


def test_form_of_a_line(tmp_path: Path) -> None:
    done = run("log.logger.info('a %s', 'b'); log.logger.warning('c'); log.logger.debug('d')", tmp_path / "log")
    assert done.stdout == ""
    assert messages(done.stderr) == [("INFO", "a b"), ("WARNING", "c")]


def test_file_has_what_stderr_has_while_it_is_open(tmp_path: Path) -> None:
    program = r"""
        log.logger.info("before")
        with log.also_to_file(path):
            log.logger.info("in\x1b[31mside")
        log.logger.info("after")
    """
    (tmp_path / "log").write_text("older\n" * 100)
    done = run(program, tmp_path / "log")
    assert messages((tmp_path / "log").read_text()) == [("INFO", "inside")]
    assert messages(done.stderr) == [("INFO", "before"), ("INFO", "inside"), ("INFO", "after")]


def test_file_is_closed_when_the_body_raises(tmp_path: Path) -> None:
    program = """
        try:
            with log.also_to_file(path):
                raise ValueError
        except ValueError:
            log.logger.info("after")
        assert not [link for link in Path("/proc/self/fd").iterdir() if link.resolve() == path]
    """
    done = run(program, tmp_path / "log")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text() == ""


def test_message_for_the_file_only(tmp_path: Path) -> None:
    program = """
        import logging
        log.to_files(logging.ERROR, "not there")
        with log.also_to_file(path):
            log.to_files(logging.ERROR, "100% there")
    """
    done = run(program, tmp_path / "log")
    assert done.stderr == ""
    assert messages((tmp_path / "log").read_text()) == [("ERROR", "100% there")]


@pytest.mark.parametrize("place", ["absent/log", "."])
def test_file_that_can_not_be_made(tmp_path: Path, place: str) -> None:
    program = """
        try:
            with log.also_to_file(path):
                sys.exit(3)
        except OSError:
            log.logger.info("no file")
    """
    done = run(program, tmp_path / place)
    assert messages(done.stderr) == [("INFO", "no file")]


def test_text_that_is_not_unicode(tmp_path: Path) -> None:
    program = r"""
        with log.also_to_file(path):
            log.logger.info("caf%s \N{SNOWMAN}", os.fsdecode(b"\xe9"))
    """
    done = run(program, tmp_path / "log")
    assert messages(done.stderr) == [("INFO", r"caf\udce9 ☃")]
    assert (tmp_path / "log").read_text(encoding="utf-8") == done.stderr


def test_full_disk_gives_no_traceback() -> None:
    program = """
        with log.also_to_file(path):
            log.logger.info("goes on")
    """
    done = run(program, "/dev/full")
    assert (done.returncode, messages(done.stderr)) == (0, [("INFO", "goes on")])


# Steps.


def test_step_is_announced_and_timed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="image-factory")
    times = events.StepTimes()
    with events.observed(times):
        with log.step("Sleeping"):
            assert caplog.messages == ["Sleeping ..."]
            time.sleep(0.25)
        woken = time.monotonic()
        with log.step("Waking"):
            pass
        waking = time.monotonic() - woken
    assert [step.name for step in times.ended] == ["Sleeping", "Waking"]
    assert times.ended[0].seconds >= 0.25
    assert times.ended[1].seconds <= waking
    assert re.fullmatch(r"Sleeping: done in [0-9]+\.[0-9] s", caplog.messages[1])


def test_step_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="image-factory")
    for failure in (ValueError, KeyboardInterrupt):
        caplog.clear()
        told = Everything()
        with events.observed(told), pytest.raises(failure), log.step("Failing"):
            raise failure
        started, ended = told.events
        assert started == events.StepStarted("Failing")
        assert isinstance(ended, events.StepEnded)
        assert (ended.name, ended.failed) == ("Failing", True)
        assert re.fullmatch(r"Failing: failed after 0\.[0-9] s", caplog.messages[-1])


def test_step_that_no_one_observes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="image-factory")
    with log.step("Alone"):
        pass
    assert caplog.messages == ["Alone ...", "Alone: done in 0.0 s"]


class Everything:
    """An observer that keeps all."""

    def __init__(self) -> None:
        self.events: list[events.Event] = []

    def notice(self, event: events.Event) -> None:
        """Keep it."""
        self.events.append(event)


def test_observers_of_inner_steps() -> None:
    outer, inner = events.StepTimes(), events.StepTimes()
    with events.observed(outer):
        with events.observed(inner), log.step("a"), log.step("b"):
            pass
        with log.step("c"):
            pass
    assert [step.name for step in inner.ended] == ["b", "a"]
    assert [step.name for step in outer.ended] == ["b", "a", "c"]


MASKED = {
    "At https://me:p@ss@h/x?token=abc&b=c: timed out.": "At https://***@h/x?token=***&b=***: timed out.",
    "https://token@h/x": "https://***@h/x",
    "'https://me:pa/ss@h/x' is not accepted": "'https://***@h/x' is not accepted",
    "rsync rsync://me:s3cret@h/x": "rsync rsync://me:***@h/x",
    "rsync://me@h/x me@h:x": "rsync://me@h/x me@h:x",
    "'http://h/x?X-Amz-Signature=1%20a&X-Amz-Date=2' now": "'http://h/x?X-Amz-Signature=***&X-Amz-Date=***' now",
    "http://h/x?s3cret.": "http://h/x?***.",
    "InvalidURL: '/a?x=1&token=s3cret b'": "InvalidURL: '/a?x=1&token=*** b'",
    "-e 'sshpass -p s3cret ssh'": "-e 'sshpass -p *** ssh'",
    "--password=s3cret --password-file=/etc/p": "--password=*** --password-file=/etc/p",
    "Authorization: Bearer s3cret": "Authorization: Bearer ***",
    "http://h:80/a@b http://h/x": "http://h:80/a@b http://h/x",
    "https://bob:it's-secret@host/x": "https://***@host/x",
    "rsync 'rsync://bob:it'\"'\"'s@host/x' y": "rsync 'rsync://bob:***@host/x' y",
    "rsync -e \"sshpass -p 'my pass' ssh\" x": 'rsync -e "sshpass -p *** ssh" x',
    "rsync -e 'sshpass -p '\"'\"'my pass'\"'\"' ssh' x": "rsync -e 'sshpass -p *** ssh' x",
    "sshpass -p my\\ pass ssh": "sshpass -p *** ssh",
    "sshpass -v -P 'pass:' -p secret ssh": "sshpass -v -P 'pass:' -p *** ssh",
    "sshpass -vpsecret ssh -p 22": "sshpass -vp*** ssh -p 22",
    "sshpass -e ssh -p 22": "sshpass -e ssh -p 22",
    "--password='secret word' -v": "--password=*** -v",
    "'--password=***' --name 'a b'": "'--password=***' --name 'a b'",
}


@pytest.mark.parametrize("text", MASKED)
def test_masked(text: str) -> None:
    assert log.masked(text) == MASKED[text]
    assert log.masked(MASKED[text]) == MASKED[text]
    assert log.printable(text) == MASKED[text]


COMMANDS = [
    (["rsync", "--password=my secret", "--b c"], "rsync '--password=***' '--b c'"),
    (["curl", 'token=it\'s \n"me"', "x"], "curl 'token=***' x"),
    (["rsync", "rsync://bob:it's@host/x"], "rsync 'rsync://bob:***@host/x'"),
    (["rsync", "-e", "sshpass -p 'my pass' ssh", "x"], "rsync -e 'sshpass -p *** ssh' x"),
    (["/usr/bin/sshpass", "-v", "-p", "it's me", "ssh", "-p", "22"], "/usr/bin/sshpass -v -p *** ssh -p 22"),
    (["sshpass", "-vpit's me", "ssh"], "sshpass '-vp***' ssh"),
    (["rsync", "--password-file=/a b", "a=b"], "rsync '--password-file=/a b' a=b"),
]


@pytest.mark.parametrize(("argv", "shown"), COMMANDS)
def test_passwords_of_a_command(argv: list[str], shown: str, tmp_path: Path) -> None:
    """As a line and as words, in the log and in the hint."""
    assert log.masked(errors.command_line(argv)).replace("'***'", "***") == shown
    assert log.masked(errors.command_hint(argv)).replace("'***'", "***") == f"The command was: {shown}"
    for word in map(log.masked, errors.without_passwords(argv)):
        assert not re.search(r"secret|it's|me\b|my", word)


def test_masking_takes_no_time_with_long_lines() -> None:
    """Of a guest's console, each up to 64 KiB."""
    start = time.monotonic()
    for text in ("a.", "http://", "http://a:@", "sshpass -f ", "password='", "a:a@"):
        log.masked(text * (65536 // len(text)))
    assert time.monotonic() - start < 60


def test_link_in_the_place_of_the_log_file(tmp_path: Path) -> None:
    """One's own is followed, another user's is not: root's log would destroy a file of root's."""
    victim, link = tmp_path / "victim", tmp_path / "log"
    victim.write_text("whole\n")
    link.symlink_to(victim)
    os.lchown(link, 65534, 65534)
    with pytest.raises(OSError, match="it is another user's link"), log.also_to_file(link):
        pass
    assert victim.read_text() == "whole\n"
    os.lchown(link, 0, 0)
    with log.also_to_file(link):
        pass
    assert victim.read_text() == ""
