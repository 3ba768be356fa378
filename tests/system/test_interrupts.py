"""Signals end a build where it can take them, once."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ..conftest import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

HEAD = f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from image_factory.base import interrupts
from image_factory.base.errors import Interrupted
number = signal.Signals(int(sys.argv[1]))
def send(other=number):
    os.kill(os.getpid(), other)
def say(text):
    print(text, flush=True)
"""


def run(program: str, number: signal.Signals, *before: str) -> subprocess.CompletedProcess[str]:
    """Run *program*, which has send() and say()."""
    return subprocess.run(
        [*before, sys.executable, "-c", HEAD + textwrap.dedent(program), str(int(number))],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_inside(number: signal.Signals) -> None:
    """It ends what waits, at once."""
    program = """
        start = time.monotonic()
        with interrupts.handled():
            signal.signal(signal.SIGALRM, lambda *_: send())
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            try:
                with interrupts.interruptible():
                    time.sleep(60)
            except Interrupted as error:
                say(error.message)
                assert error.signum == number
                assert time.monotonic() - start < 50
                sys.exit(error.exit_status)
    """
    done = run(program, number)
    assert (done.returncode, done.stdout) == (128 + number, f"Stopped by {number.name}.\n"), done.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_before_waits_for_the_next_place(number: signal.Signals) -> None:
    program = """
        with interrupts.handled():
            send()
            say("acquired")
            try:
                with interrupts.interruptible():
                    say("never")
            except Interrupted as error:
                say(error.signum)
    """
    done = run(program, number)
    assert done.stdout.splitlines() == ["acquired", str(int(number))], done.stderr


def test_signal_after_the_place_waits_for_the_next_one() -> None:
    program = """
        with interrupts.handled():
            with interrupts.interruptible():
                pass
            send()
            say("between")
            try:
                with interrupts.interruptible():
                    say("never")
            except Interrupted:
                say("raised")
    """
    assert run(program, signal.SIGTERM).stdout.splitlines() == ["between", "raised"]


def test_place_in_a_place() -> None:
    program = """
        with interrupts.handled():
            try:
                with interrupts.interruptible():
                    with interrupts.interruptible():
                        pass
                    send()
                    time.sleep(1)
                    say("never")
            except Interrupted:
                say("raised")
    """
    assert run(program, signal.SIGTERM).stdout == "raised\n"


def test_signal_that_python_drops_is_raised_again() -> None:
    program = """
        class Dropping:
            def __del__(self):
                send()
                time.sleep(1)
        with interrupts.handled():
            try:
                with interrupts.interruptible():
                    Dropping()
                    say("went on")
                    interrupts.check()
                    say("never")
            except Interrupted:
                say("raised")
    """
    done = run(program, signal.SIGTERM)
    assert (done.stdout.splitlines(), done.stderr) == (["went on", "raised"], "")


@pytest.mark.parametrize("second", SIGNALS)
def test_second_signal_does_not_disturb_the_clean_up(second: signal.Signals) -> None:
    program = f"""
        from image_factory.base import log
        log.set_up()
        with interrupts.handled():
            try:
                with interrupts.interruptible():
                    send()
                    time.sleep(1)
            except Interrupted as error:
                send({int(second)})
                with interrupts.interruptible():
                    send({int(second)})
                    time.sleep(0.2)
                say("clean " + str(error.exit_status))
    """
    done = run(program, signal.SIGTERM)
    assert (done.returncode, done.stdout) == (0, "clean 143\n")
    assert done.stderr.count("WARNING: Already stopping: cleaning up.\n") == 2


def test_first_of_two_signals_counts() -> None:
    program = """
        with interrupts.handled():
            send()
            send(signal.SIGINT)
            try:
                with interrupts.interruptible():
                    say("never")
            except Interrupted as error:
                say(error.signum)
    """
    assert run(program, signal.SIGTERM).stdout == f"{int(signal.SIGTERM)}\n"


def test_handlers_are_put_back() -> None:
    program = """
        before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        try:
            with interrupts.handled():
                assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
                raise ValueError
        except ValueError:
            pass
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
        send()
    """
    assert run(program, signal.SIGTERM).returncode == -signal.SIGTERM


def test_next_build_begins_anew() -> None:
    program = """
        for _ in range(2):
            with interrupts.handled():
                with interrupts.interruptible():
                    pass
                send()
                try:
                    with interrupts.interruptible():
                        say("never")
                except Interrupted:
                    say("raised")
    """
    assert run(program, signal.SIGTERM).stdout == "raised\nraised\n"


STAYS_IGNORED = """
    with interrupts.handled():
        with interrupts.interruptible():
            send()
            time.sleep(0.2)
        say("goes on")
        with interrupts.interruptible():
            pass
    assert signal.getsignal(number) is signal.SIG_IGN
    send()
    say("still")
"""


def test_signal_that_nohup_ignores_stays_ignored() -> None:
    done = run(STAYS_IGNORED, signal.SIGHUP, "nohup")
    assert (done.returncode, done.stdout) == (0, "goes on\nstill\n"), done.stderr


def test_signal_that_a_shell_ignores_for_its_background_jobs_stays_ignored() -> None:
    done = run(STAYS_IGNORED, signal.SIGINT, "sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    assert (done.returncode, done.stdout) == (0, "goes on\nstill\n"), done.stderr


def test_program_started_under_nohup_can_be_stopped() -> None:
    """It doesn't inherit that the signal is ignored, so that image-factory itself can stop it by it."""
    program = """
        from image_factory.base import command
        with interrupts.handled():
            print(command.run(["grep", "SigIgn", "/proc/self/status"], capture=True))
    """
    done = run(program, signal.SIGHUP, "nohup")
    assert int(done.stdout.split()[1], 16) & 1 << (signal.SIGHUP - 1) == 0
    assert done.returncode == 0


def test_signal_while_the_log_is_written_is_not_swallowed(tmp_path: Path) -> None:
    """Logging catches what a stream raises."""
    program = f"""
        from pathlib import Path
        from image_factory.base import log
        class Stream:
            def write(self, text):
                send()
            def flush(self):
                pass
        sys.stderr = Stream()
        log.set_up()
        with interrupts.handled(), log.also_to_file(Path({str(tmp_path / "log")!r})):
            try:
                with interrupts.interruptible():
                    log.logger.info("a line")
                    say("never")
            except Interrupted:
                say("raised")
    """
    assert run(program, signal.SIGTERM).stdout == "raised\n"


def test_signal_is_deferred_to_the_end_of_a_body() -> None:
    program = """
        with interrupts.handled():
            try:
                with interrupts.interruptible():
                    with interrupts.deferred():
                        send()
                        time.sleep(0.1)
                        say("whole")
                    say("never")
            except Interrupted:
                say("raised")
            with interrupts.deferred():
                say("cleaned up")
    """
    assert run(program, signal.SIGTERM).stdout.splitlines() == ["whole", "raised", "cleaned up"]


def test_deferring_where_no_signal_is_taken_takes_none() -> None:
    program = """
        with interrupts.handled():
            with interrupts.deferred():
                send()
            say("goes on")
            try:
                interrupts.check()
            except Interrupted:
                say("raised")
    """
    assert run(program, signal.SIGTERM).stdout.splitlines() == ["goes on", "raised"]
