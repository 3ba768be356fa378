"""Programs are run with everything they print in the log, and are gone afterwards."""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from image_factory.base import command, events
from image_factory.base.command import children, output
from image_factory.base.errors import BuildError, CommandError, ConfigurationError, CrashError
from image_factory.base.log import logger

from ..conftest import PATIENCE, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
# Seconds in which what is stopped has to go: less than it would run for.
QUICK = 120


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Give the messages that were logged, without the one that shows the command."""
    caplog.set_level(logging.INFO, logger="image-factory")
    return lambda: [message for message in caplog.messages if not message.startswith("Running: ")]


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def python(program: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(program)]


def gone(pid: int) -> bool:
    """Whether process *pid* has ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# Output.


def test_output_and_exact_command_are_logged(log: Callable[[], list[str]], caplog: pytest.LogCaptureFixture) -> None:
    argv = shell("echo out; echo 'two words' >&2")
    assert command.run(argv) == ""
    assert log() == ["sh: out", "sh: two words"]
    assert caplog.messages[0] == f"Running: {shlex.join(argv)}"


def test_captured_output_is_returned_and_only_stderr_logged(log: Callable[[], list[str]]) -> None:
    assert command.run(shell("printf 'a\\n b '; echo problem >&2"), capture=True) == "a\n b "
    assert log() == ["sh: problem"]


def test_output_comes_while_the_program_runs(tmp_path: Path) -> None:
    """The log shows a line at once: the program waits for what the log handler makes of it."""
    flag = tmp_path / "seen"

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == "sh: first":
                flag.touch()

    handler = Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        command.run(shell(f"echo first; until [ -e {flag} ]; do sleep 0.05; done"), timeout=20)
    finally:
        logger.removeHandler(handler)


def test_last_line_without_an_end(log: Callable[[], list[str]]) -> None:
    command.run(shell("printf 'one\\n\\n  \\ntwo'"))
    assert log() == ["sh: one", "sh: two"]


def test_only_the_last_state_of_a_progress_bar_is_logged(log: Callable[[], list[str]]) -> None:
    command.run(shell(r"printf '10%%\r 50%%\r100%%\r\ndone\r\n  (1.00/100%%)\r  (99.00/100%%)\r'"))
    assert log() == ["sh: 100%", "sh: done", "sh:   (99.00/100%)"]


def test_lines_of_progress_are_taken_as_they_come(log: Callable[[], list[str]]) -> None:
    seen: list[str] = []

    def progress(line: str) -> float | None:
        seen.append(line)
        return 0.5 if line.endswith("%") else None

    command.run(shell(r"printf '\r 1%%'; sleep 0.2; printf '\r 2%%'; sleep 0.2; echo; echo end >&2"), progress=progress)
    assert seen == [" 1%", " 2%", "end"]
    assert log() == ["sh: end"]


class Fractions:
    """An observer that keeps what is done."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def notice(self, event: events.Event) -> None:
        if isinstance(event, events.Progressed):
            self.found.append(event.fraction)


def test_programs_run_side_by_side(log: Callable[[], list[str]], tmp_path: Path) -> None:
    """Each waits for the other one here; the log has what both print, and observers the mean of what they have done."""
    told = Fractions()
    scripts = []
    for own, other in (("a", "b"), ("b", "a")):
        meets = f"touch {tmp_path}/{own}; while [ ! -e {tmp_path}/{other} ]; do sleep 0.01; done"
        scripts.append(shell(f"echo 100%; {meets}; echo {own} has met >&2"))
    with events.observed(told):
        command.together(scripts, progress=lambda line: 1.0 if line.endswith("%") else None)
    assert sorted(log()) == ["sh: a has met", "sh: b has met"]
    assert told.found == [0.5, 1.0]


def test_first_that_fails_ends_those_beside_it(tmp_path: Path) -> None:
    meets = f"while [ ! -e {tmp_path}/pid ]; do sleep 0.01; done"
    sleeps = shell(f"echo $$ >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 1000")
    with pytest.raises(CommandError, match=r"^sh failed with status 3: no room$"):
        command.together([sleeps, shell(f"{meets}; echo no room; exit 3"), sleeps], progress=lambda line: None)
    assert gone(int((tmp_path / "pid").read_text()))
    with pytest.raises(BuildError, match=r"^Can't run no-such-program: No such file"):
        command.together([sleeps, ["no-such-program"]], progress=lambda line: None)
    assert gone(int((tmp_path / "pid").read_text()))


def test_line_of_ten_megabytes(log: Callable[[], list[str]]) -> None:
    command.run(python("import sys; sys.stdout.write('x' * 10_000_000); print('end')"))
    lines = [line.partition(": ")[2] for line in log()]
    assert "".join(lines) == "x" * 10_000_000 + "end"
    assert max(map(len, lines)) < 200_000


def test_much_output_is_captured_whole() -> None:
    program = "import sys; [print('y' * 999, file=file) for _ in range(3000) for file in (sys.stdout, sys.stderr)]"
    assert command.run(python(program), capture=True) == ("y" * 999 + "\n") * 3000


def test_binary_output(log: Callable[[], list[str]]) -> None:
    command.run(python("import os; os.write(1, bytes(range(256)) + b'\\n' + b'\\xff\\n')"))
    assert log()[-1].endswith(": \N{REPLACEMENT CHARACTER}")
    assert command.run(shell(r"printf 'a\377b'"), capture=True) == "a\N{REPLACEMENT CHARACTER}b"


def test_escape_sequences_do_not_reach_the_log(tmp_path: Path) -> None:
    program = f"""
        import sys; sys.path.insert(0, {str(REPOSITORY)!r})
        from pathlib import Path
        from image_factory.base import command, errors, log
        log.set_up()
        with log.also_to_file(Path({str(tmp_path / "log")!r})):
            command.run(["printf", r"\\033[2J\\033]0;title\\007red \\033[31;1m\\233mtext\\010\\000\\n"])
            command.run(["printf", r"\\007 \\302\\2331m\\n"])
            command.run(["printf", r"x%070000d\\033[31m%065000d\\033]8;;http://a\\n", "0", "0"])
            try:
                command.run(["sh", "-c", r"printf '\\033[31mred\\n'; exit 3"])
            except errors.CommandError as error:
                print(log.printable(error.message))
    """
    done = subprocess.run(python(program), capture_output=True, check=True)
    for shown in (done.stdout, done.stderr, (tmp_path / "log").read_bytes()):
        text = shown.decode()
        assert not [character for character in text if not character.isprintable() and character != "\n"]
    assert "sh failed with status 3: red\n" in done.stdout.decode()
    assert "printf: red " in (tmp_path / "log").read_text()


# What the program is given.


def test_stdin_is_empty() -> None:
    program = f"""
        import sys; sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import command, events
        print(command.run(["sh", "-c", "cat; echo end"], capture=True))
    """
    done = subprocess.run(python(program), input="typed\n", capture_output=True, text=True, check=True)
    assert done.stdout == "end\n\n"


@pytest.mark.parametrize("data", [b"", b"a\0b\xff\n", bytes(1 << 20)], ids=len)
def test_stdin_is_given(data: bytes) -> None:
    """Also where the program doesn't read it, or all of it."""
    said = command.run(["sha256sum"], capture=True, stdin=data)
    assert said.split()[0] == hashlib.sha256(data).hexdigest()
    command.run(["true"], stdin=data)


def test_locale_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("FROM_PARENT", "yes")
    assert command.run(shell("echo $LC_ALL $FROM_PARENT"), capture=True) == "C.UTF-8 yes\n"
    assert command.run(shell("echo $LC_ALL $FROM_PARENT $OWN"), capture=True, env={"OWN": "1"}) == "C.UTF-8 1\n"


@pytest.mark.parametrize("new_session", [True, False])
def test_process_group_and_session(new_session: bool) -> None:
    program = "import os; print(os.getpid() == os.getpgrp(), os.getpid() == os.getsid(0))"
    assert command.run(python(program), capture=True, new_session=new_session) == f"True {new_session}\n"


def test_no_controlling_terminal() -> None:
    """Under a terminal of our own, which the program would otherwise get."""
    program = f"""
        import os, pty, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import command, events
        child, terminal = pty.fork()
        if child == 0:
            open("/dev/tty").close()
            command.run(["sh", "-c", "! (: </dev/tty)"])
            os._exit(0)
        os.set_blocking(terminal, True)
        try:
            while os.read(terminal, 1024):
                pass
        except OSError:
            pass
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert subprocess.run(python(program), timeout=PATIENCE).returncode == 0


def test_working_directory(tmp_path: Path) -> None:
    assert command.run(["pwd"], capture=True, cwd=tmp_path) == f"{tmp_path}\n"


def test_program_in_sbin_is_found_without_it_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert "losetup" in command.run(["losetup", "--version"], capture=True)


# Failure.


def test_status_and_last_lines_are_in_the_error() -> None:
    argv = shell("seq 30; echo reason >&2; exit 7")
    with pytest.raises(CommandError) as caught:
        command.run(argv)
    error = caught.value
    assert (error.argv, error.status) == (argv, 7)
    assert error.last_lines == [*map(str, range(12, 31)), "reason"]
    assert error.message == "sh failed with status 7: reason"
    assert error.hint == f"The command was: {shlex.join(argv)}"
    assert error.exit_status == 1


def test_signal_is_in_the_error() -> None:
    with pytest.raises(CommandError) as caught:
        command.run(shell("kill -SEGV $$"))
    assert (caught.value.status, caught.value.message) == (-signal.SIGSEGV, "sh was killed by SIGSEGV")


def test_captured_output_is_not_in_the_error() -> None:
    with pytest.raises(CommandError) as caught:
        command.run(shell("echo secret; echo reason >&2; exit 1"), capture=True)
    assert caught.value.last_lines == ["reason"]


def test_missing_program() -> None:
    with pytest.raises(BuildError) as caught:
        command.run(["no-such-program"])
    assert (caught.value.message, caught.value.hint) == ("Can't run no-such-program: No such file or directory", None)


def test_program_that_can_not_be_executed(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("")
    (tmp_path / "broken").chmod(0o644)
    with pytest.raises(BuildError, match=r"Can't run .*/broken: Permission denied"):
        command.run([str(tmp_path / "broken")])


def said_by_run(argv: list[str], _: Path) -> str:
    return command.run(argv, capture=True)


def said_by_read_until(argv: list[str], _: Path) -> str:
    return command.read_until(argv, b"no such text", 30).decode()


def said_by_background(argv: list[str], directory: Path) -> str:
    with command.background(argv, directory / "log") as ended:
        wait_for(lambda: ended() is not None, "its end")
    return (directory / "log").read_text()


def said_by_query(argv: list[str], _: Path) -> str:
    return command.Query(argv).answer(time.monotonic() + 30) or "nothing"


def said_by_conversation(argv: list[str], _: Path) -> str:
    with command.conversation(argv, env=dict(os.environ), timeout=30, stop_seconds=1) as talk:
        return "".join(f"{line}\n" for line in talk.ask("echo $LC_ALL; cat /dev/null"))


@pytest.mark.parametrize(
    "said", [said_by_run, said_by_read_until, said_by_background, said_by_query, said_by_conversation]
)
def test_programs_of_root_are_found_and_speak_english(
    said: Callable[[list[str], Path], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    # It is in /usr/sbin, and becomes the program that it starts.
    argv = ["start-stop-daemon", "--start", "--pidfile", "/nowhere", "--startas", "/bin/sh"]
    if said is not said_by_conversation:
        argv += ["--", "-c", "echo $LC_ALL"]
    assert said(argv, tmp_path) == "C.UTF-8\n"


def test_user_on_the_terminal_has_the_own_locale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    wanted = ["start-stop-daemon", "--start", "--pidfile", "/nowhere", "--startas", "/bin/sh"]
    command.interact([*wanted, "--", "-c", f"echo $LC_ALL > {tmp_path}/said"])
    assert (tmp_path / "said").read_text() == "de_DE.UTF-8\n"


@pytest.mark.parametrize("start", [command.run, lambda argv: command.read_until(argv, b"", 1)])
def test_program_that_is_missing_is_named_with_its_package(
    start: Callable[[list[str]], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"^Can't run qemu-system-x86_64: No such file or directory$") as caught:
        start(["qemu-system-x86_64"])
    assert caught.value.hint == "Install it: apt-get install qemu-system-x86"


def test_require_names_all_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command.require(["losetup"])
    with pytest.raises(ConfigurationError) as caught:
        command.require(["virsh", "losetup", "no-such-program", "qemu-img"])
    assert caught.value.message == "Missing programs: virsh, no-such-program, qemu-img."
    assert caught.value.hint == (
        "Your own have to be executable, and on PATH or named by their path: no-such-program. "
        "Install them: apt-get install libvirt-clients qemu-utils"
    )


def test_packages_are_those_that_debian_has_the_programs_in() -> None:
    for program, package in command.PACKAGES.items():
        owner = subprocess.run(["dpkg", "-S", f"*bin/{program}"], capture_output=True, text=True, check=True).stdout
        assert package in {line.partition(":")[0] for line in owner.splitlines()}, program


# The end of a program.


def test_timeout(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(BuildError) as caught:
        command.run(shell(f"echo $$ > {tmp_path}/pid; sleep 600"), timeout=1)
    assert time.monotonic() - start < QUICK
    assert caught.value.message == "sh did not end within 1 s"
    assert gone(int((tmp_path / "pid").read_text()))


def test_timeout_while_it_prints_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MOST_PRINTED", 1 << 40)
    with pytest.raises(BuildError, match="yes did not end within 1 s"):
        command.run(["yes", "x" * 4000], capture=True, timeout=1)


def test_grandchild_that_keeps_the_pipe_open_does_not_block(tmp_path: Path) -> None:
    start = time.monotonic()
    output = command.run(shell(f"setsid sleep 600 & echo $! > {tmp_path}/pid; echo done"), capture=True)
    assert time.monotonic() - start < QUICK
    assert output == "done\n"
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_grandchild_that_prints_for_ever_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MOST_PRINTED", 1 << 40)
    start = time.monotonic()
    command.run(shell(f"setsid yes & echo $! > {tmp_path}/pid"), capture=True)
    # It ends by itself when it prints to where nobody reads any more.
    with contextlib.suppress(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert time.monotonic() - start < QUICK


def test_output_may_end_before_the_program() -> None:
    start = time.monotonic()
    with pytest.raises(CommandError) as caught:
        command.run(shell("exec >&- 2>&-; sleep 1; exit 5"))
    assert caught.value.status == 5
    assert 1 <= time.monotonic() - start < QUICK


def test_stop_signal_and_patience(tmp_path: Path) -> None:
    """A program that cleans up on SIGINT is given the time to do it."""
    script = f"trap 'sleep 1; touch {tmp_path}/clean; exit' INT; trap '' TERM; while :; do sleep 0.1; done"
    with pytest.raises(BuildError):
        command.run(shell(script), timeout=0.5, stop_signal=signal.SIGINT)
    assert (tmp_path / "clean").exists()


def test_program_that_ignores_the_signal_is_killed_with_its_group(tmp_path: Path) -> None:
    script = f"trap '' TERM; sleep 600 & echo $$ $! > {tmp_path}/pids; while :; do sleep 0.1; done"
    start = time.monotonic()
    with pytest.raises(BuildError):
        command.run(shell(script), timeout=0.5, stop_seconds=0.5)
    assert time.monotonic() - start < QUICK
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    wait_for(lambda: all(map(gone, pids)), "their end", QUICK)


def test_what_a_program_leaves_behind_when_it_is_stopped_is_killed(tmp_path: Path) -> None:
    """The program goes on SIGTERM, what it has started doesn't."""
    script = f"(trap '' TERM; exec sleep 600) & echo $! > {tmp_path}/pid; trap exit TERM; wait"
    with pytest.raises(BuildError):
        command.run(shell(script), timeout=0.5)
    wait_for(lambda: gone(int((tmp_path / "pid").read_text())), "its end", QUICK)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("trap", ["", "trap '' TERM INT HUP; "], ids=["obedient", "stubborn"])
def test_signal_to_us_stops_the_program(tmp_path: Path, number: signal.Signals, trap: str) -> None:
    script = f"{trap}sleep 600 & echo $$ $! > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pids; wait; wait"
    program = f"""
        import sys; sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import command, errors, interrupts
        with interrupts.handled():
            try:
                command.run(["sh", "-c", {script!r}], stop_seconds=0.5)
            except errors.Interrupted as error:
                print(error.message)
                sys.exit(error.exit_status)
    """
    with subprocess.Popen(python(program), stdout=subprocess.PIPE, text=True) as process:
        wait_for((tmp_path / "pids").exists, "its children")
        pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stdout) == (128 + number, f"Stopped by {number.name}.\n")
    wait_for(lambda: all(map(gone, pids)), "their end", QUICK)


@pytest.mark.parametrize("end", ["kill -TERM $$", "exit 143"], ids=["killed", "told"])
def test_signal_that_comes_to_the_program_first(tmp_path: Path, end: str) -> None:
    """Jenkins ends a tree of processes from its leaves."""
    program = f"""
        import sys; sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import command, errors, interrupts
        with interrupts.handled():
            try:
                command.run(["sh", "-c", {f"touch {tmp_path}/ended; {end}"!r}])
            except errors.Interrupted as error:
                sys.exit(error.exit_status)
    """
    with subprocess.Popen(python(program)) as process:
        wait_for((tmp_path / "ended").exists, "its end", QUICK)
        time.sleep(0.5)
        process.terminate()
        assert process.wait(30) == 143


def test_signal_while_another_program_is_started() -> None:
    """The interpreter drops what is raised in its hooks of fork()."""
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import command, errors, interrupts
        armed = []
        def watch():
            if not armed:
                armed.append(True)
                command.Query(["true"])
        def strike():
            if armed:
                os.kill(os.getpid(), signal.SIGTERM)
        os.register_at_fork(after_in_parent=strike)
        with interrupts.handled():
            try:
                command.run(["sleep", "60"], watch=watch)
            except errors.Interrupted as error:
                sys.exit(error.exit_status)
    """
    done = subprocess.run(python(program), capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (143, "")


@pytest.mark.parametrize("moment", ["before", "after_in_parent", "after_in_child"])
def test_signal_while_a_program_is_started_leaves_none_behind(moment: str) -> None:
    """Also where a signal may come at any point: who is to stop the program has it in hand first."""
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import command, errors, interrupts
        us = os.getpid()
        os.register_at_fork({moment}=lambda: os.kill(us, signal.SIGTERM))
        with interrupts.handled(), command.reaping():
            try:
                with interrupts.interruptible():
                    command.run(["sleep", "60"])
            except errors.Interrupted as error:
                with open(f"/proc/self/task/{{os.getpid()}}/children") as children:
                    print(children.read())
                sys.exit(error.exit_status)
    """
    done = subprocess.run(python(program), capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (143, "\n", "")


def test_program_is_stopped_where_the_signal_for_it_is_ignored() -> None:
    """As SIGINT is in the background jobs of a shell script."""
    program = f"""
        import signal, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import command, errors
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            command.run(["sleep", "60"], timeout=0.5, stop_signal=signal.SIGINT, stop_seconds=60)
        except errors.BuildError as error:
            print(error)
    """
    done = subprocess.run(python(program), capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "sleep did not end within 0 s\n", done.stderr


def test_signal_that_comes_to_the_program_only() -> None:
    with pytest.raises(CommandError, match="sh was killed by SIGTERM"):
        command.run(shell("kill -TERM $$"))


# read_until.


def test_read_until_stops_the_program_when_it_has_said_it(tmp_path: Path) -> None:
    start = time.monotonic()
    output = command.read_until(shell(f"echo $$ > {tmp_path}/pid; echo a; echo wanted; sleep 600"), b"wanted", 30)
    assert time.monotonic() - start < QUICK
    assert output.startswith(b"a\nwanted")
    assert gone(int((tmp_path / "pid").read_text()))


def test_read_until_gives_up(tmp_path: Path) -> None:
    start = time.monotonic()
    assert command.read_until(shell(f"echo $$ > {tmp_path}/pid; echo a; sleep 600"), b"wanted", 1) == b"a\n"
    assert 1 <= time.monotonic() - start < QUICK
    assert gone(int((tmp_path / "pid").read_text()))


def test_read_until_the_end_of_the_program() -> None:
    assert command.read_until(shell("echo a; exit 3"), b"wanted", 30) == b"a\n"


# Parents.


def test_program_ends_with_its_parent_that_is_killed(tmp_path: Path) -> None:
    program = f"""
        import sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import command, events
        command.run(["sh", "-c", "echo $$ >{tmp_path}/pid; exec sleep 6000"])
    """
    parent = subprocess.Popen(python(program))
    wait_for(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()), "its start")
    pid = int((tmp_path / "pid").read_text())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(pid), "its end", QUICK)


def test_call_apart_ends_with_its_parent_that_is_killed(tmp_path: Path) -> None:
    program = f"""
        import os, sys, time
        from pathlib import Path
        sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import command, events

        def hang(path):
            path.with_suffix(".new").write_text(str(os.getpid()))
            path.with_suffix(".new").rename(path)
            time.sleep(600)

        command.call_apart(hang, Path({str(tmp_path / "pid")!r}), 600)
    """
    parent = subprocess.Popen(python(program))
    wait_for((tmp_path / "pid").exists, "its start")
    pid = int((tmp_path / "pid").read_text())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(pid), "its end", QUICK)


@pytest.mark.parametrize("what", ["fork", "pipe"])
def test_call_for_which_no_process_can_be_started(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and is no failure of the file that the call is for."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patches:
        patches.setattr(os, what, refuse)
        with pytest.raises(BuildError, match=r"^No process can be started: Resource temporarily unavailable\.$"):
            command.call_apart(len, "abc", 60)
    if what == "pipe":
        # Of those of multiprocessing itself four stay when there is no process.
        assert os.listdir("/proc/self/fd") == before
    assert command.call_apart(len, "abc", 60) == 3


def test_call_that_dies_in_the_middle_of_its_answer() -> None:
    def write_and_die(connection: Connection, data: bytes) -> None:
        os.write(connection.fileno(), data[:10])
        os.kill(os.getpid(), signal.SIGKILL)

    def answer(send: Callable[[object], None]) -> None:
        # In the process of its own only.
        Connection._send = write_and_die  # type: ignore[attr-defined]
        send("of this the length comes, and a little")

    with pytest.raises(CrashError, match="was killed by SIGKILL"):
        command.call_watched(answer, lambda message: None)


def test_program_that_can_not_be_stopped_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, log: Callable[[], list[str]]
) -> None:
    """As one of root's that hangs, which sudo runs."""

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "killpg", refuse)
    monkeypatch.setattr(children, "_ROOTS_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(children, "KILL_SECONDS", 0.1)
    start = time.monotonic()
    with pytest.raises(BuildError, match="did not end within 0 s"):
        command.run(["sleep", "600"], timeout=0.1, stop_seconds=0.1)
    assert time.monotonic() - start < QUICK
    monkeypatch.undo()
    match = re.fullmatch(r"Process ([0-9]+) can't be stopped and goes on: .*sleep 600", log()[-1])
    assert match
    os.kill(int(match[1]), signal.SIGKILL)


def talk(*, timeout: float = 20, stop_seconds: float = 5) -> contextlib.AbstractContextManager[command.Conversation]:
    """Have a conversation with a shell, which knows echo."""
    return command.conversation(["sh"], env=dict(os.environ), timeout=timeout, stop_seconds=stop_seconds)


def test_conversation_answers() -> None:
    with talk() as shell:
        assert shell.ask("echo one; echo two >&2") == ["one", "two"]
        assert shell.ask("true") == []
        assert shell.do("printf '%s' $LC_ALL; echo") == ["C.UTF-8"]


def test_conversation_of_bytes() -> None:
    """They are no lines; what is too much is taken all the same, so that the next answer is that of its question."""
    with talk() as shell:
        assert shell.ask_bytes(r"printf 'a\0\377\r\n \n b'", 9) == b"a\0\xff\r\n \n b"
        assert shell.ask_bytes("true", 0) == b""
        assert shell.ask_bytes("head -c 3000000 /dev/zero", 3000000) == bytes(3000000)
        for count in (1001, 3000000):
            with pytest.raises(BuildError, match=r"^sh printed more than 1000 bytes\.$"):
                shell.ask_bytes(f"head -c {count} /dev/zero", 1000)
            assert shell.ask("echo next") == ["next"]


def test_command_that_is_too_long_for_a_conversation() -> None:
    """guestfish would take its end for another command."""
    with talk() as shell:
        assert shell.ask("echo " + "x" * 8185) == ["x" * 8185]
        for ask in (shell.ask, shell.do, partial(shell.ask_bytes, most=9999)):
            with pytest.raises(BuildError, match=r"^sh takes no command of more than 8190 bytes\.$"):
                ask("echo " + "x" * 8186)
        assert shell.ask("echo next") == ["next"]


@pytest.mark.parametrize("way", ["ask", "ask_bytes"])
@pytest.mark.parametrize(("line", "status"), [("echo why; exit 3", 3), ("echo why; kill -KILL $$", -9)])
def test_conversation_that_the_program_ends(line: str, status: int, way: str) -> None:
    with pytest.raises(CommandError, match="why") as raised, talk() as shell:
        _ = shell.ask(line) if way == "ask" else shell.ask_bytes(line, 1)
    assert raised.value.status == status


def test_conversation_with_a_bad_end() -> None:
    with pytest.raises(CommandError, match="status 4"), talk() as shell:
        shell.ask("trap 'exit 4' EXIT")


def test_conversation_is_over_after_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), talk(stop_seconds=0.2) as shell:
        pid = int(shell.ask("(sleep 600) >/dev/null 2>&1 & echo $$")[0])
        raise ZeroDivisionError
    assert gone(pid)


@pytest.mark.parametrize(("line", "what"), [("sleep 600", "answer"), ("exec >&- 2>&-; sleep 600", "end")])
def test_conversation_with_a_program_that_hangs(line: str, what: str) -> None:
    start = time.monotonic()
    with (
        pytest.raises(BuildError, match=rf"^sh did not {what} within 0 s\.$"),
        talk(timeout=0.3, stop_seconds=0.2) as shell,
    ):
        shell.ask(line)
    assert time.monotonic() - start < QUICK


def test_conversation_with_long_lines_and_many() -> None:
    with talk() as shell:
        assert len(shell.ask("seq 50000")) == 50000
        assert sum(map(len, shell.ask("head -c 1000000 /dev/zero | tr '\\0' x; echo"))) == 1000000


def test_conversation_ends_with_its_parent_that_is_killed(tmp_path: Path) -> None:
    """In good order: it sees the end of its input."""
    program = f"""
        import os, sys, time
        sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import command, events
        with command.conversation(["sh"], env=dict(os.environ), timeout=60, stop_seconds=1) as shell:
            shell.ask("trap 'touch {tmp_path}/tidy' EXIT; echo $$ >{tmp_path}/pid")
            time.sleep(600)
    """
    parent = subprocess.Popen(python(program))
    wait_for(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()), "its start")
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(pid), "its end", QUICK)
    assert (tmp_path / "tidy").exists()


def test_conversation_with_a_program_that_is_missing() -> None:
    missing = command.conversation(["no-such-program"], env={}, timeout=1, stop_seconds=1)
    with pytest.raises(BuildError, match="Can't run no-such-program: No such file"), missing:
        pytest.fail("it was started")


def is_there(stat: Path) -> bool:
    """Return whether the process of /proc/PID/*stat* runs; what nobody has waited for does not."""
    try:
        return stat.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestBackground:
    """command.background kills what it has started on every way out."""

    def test_the_body_raises(self, tmp_path: Path) -> None:
        found: list[Any] = []
        with pytest.raises(OSError, match="x"), command.background(["sleep", "4711"], tmp_path / "log") as ended:
            found.append(ended)
            assert ended() is None
            raise OSError(errno.EIO, "x")
        assert found[0]() == -9

    def test_what_it_prints_is_kept(self, tmp_path: Path) -> None:
        with command.background(["sh", "-c", "echo out; echo err >&2; exit 3"], tmp_path / "log") as ended:
            while ended() is None:
                pass
            assert ended() == 3
        assert (tmp_path / "log").read_text() == "out\nerr\n"

    def test_a_program_that_is_not_there(self, tmp_path: Path) -> None:
        with (
            pytest.raises(BuildError, match="Can't run not-there"),
            command.background(["not-there"], tmp_path / "log"),
        ):
            pass

    def test_it_ends_with_us(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        script = (
            "import os, signal, pathlib\nfrom image_factory.base import command\n"
            f"log = pathlib.Path({str(log)!r})\n"
            "with command.background(['sh', '-c', 'echo $$; exec sleep 4712'], log):\n"
            "    while not log.read_text().endswith('\\n'): pass\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        subprocess.run(["/usr/bin/python3", "-c", script], cwd=REPOSITORY, check=False)
        pid = int(log.read_text())
        stat = Path(f"/proc/{pid}/stat")
        wait_for(lambda stat=stat: not is_there(stat), "its end", QUICK)


def test_a_program_may_read_a_file(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("text")
    assert command.run(["cat"], stdin=tmp_path / "in", capture=True) == "text"
