"""What a build shows: one live display on a terminal of any size, lines in the log elsewhere."""

import fcntl
import io
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyte
import pytest

from image_factory.base import events
from image_factory.told import display, estimates

from ..conftest import PATIENCE
from ..unit.test_estimates import Clock, make_plan

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = [(80, 24), (200, 50)]

# Each program draws into its terminal, and has its log in the file that it is given.
HEAD = f"""
import datetime, logging, os, signal, sys, time
from contextlib import ExitStack
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from image_factory.told import display, estimates
from image_factory.base import events, interrupts, log
from image_factory.base.errors import Interrupted
from image_factory.base.events import *
from image_factory.model import Plan
from image_factory.configuration.files import Configuration
here = Path(sys.argv[1])
(here / "x.conf").write_text(f"[x]\\nlinux=l\\ninitrd=i\\ncache-dir={{here}}/cache\\nvirt-type=qemu\\n")
settings = Configuration({{"IMAGE_FACTORY_CONFIG": str(here / "x.conf")}}).image("x", {{}})
timeline = estimates.Timeline(Plan("x", settings, datetime.date(2026, 1, 2), here, {{}}))

def shown(level=logging.WARNING):
    log.set_up(level)
    stack = ExitStack()
    stack.enter_context(log.also_to_file(here / "log"))
    stack.enter_context(events.observed(timeline, display.LogLines(timeline, console=True)))
    stack.enter_context(display.live("x", timeline))
    return stack

def tell(*told):
    for event in told:
        events.tell(event)
    # Longer than the display waits until it draws again.
    time.sleep(0.25)
"""

INSTALLATION = """
with shown():
    with log.step("Creating the disk"):
        pass
    with log.step("Installing"):
        tell(PhaseStarted("Partitioning"), GuestActive(0, 0, 0))
        time.sleep(1)
        tell(Progressed(0.25), GuestActive(1 << 20, 1 << 26, 1 << 22), ConsoleLine("\\x1b[31mhello"))
        log.logger.info("for the file")
        log.logger.warning("mind \\x1b[31mthe gap" + "!" * 300)
        tell(PhaseStarted("Installing the base system with a name that is so long that it does not fit" + "." * 90))
        tell(Progressed(0.999))
    with log.step("Checksumming x"):
        tell(Progressed(0.5))
print("the summary")
"""


@dataclass
class Terminal:
    """A terminal with a program in it; all that the program has written, and the screens that a user saw."""

    columns: int
    rows: int
    output: bytes = b""
    screens: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.screen = pyte.Screen(self.columns, self.rows)
        # A line that is too long for the terminal is seen here in its whole length.
        self.wide = pyte.Screen(1000, 200)
        self._streams = [pyte.ByteStream(self.screen), pyte.ByteStream(self.wide)]
        self.master, slave = pty.openpty()
        self._slave: int | None = slave
        self.resize(self.columns, self.rows)

    def resize(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @contextmanager
    def started(self, argv: list[str], *, cwd: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """Give the program *argv* in the terminal; it has ended at the end."""
        slave = self._slave
        assert slave is not None
        process = subprocess.Popen(
            argv, cwd=cwd, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self._slave = None
        try:
            yield process
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()

    def read(self, until: Callable[["Terminal"], bool] = lambda terminal: False) -> None:
        """Read until *until* holds, or the program has closed the terminal."""
        deadline = time.monotonic() + PATIENCE
        while not until(self):
            assert select.select([self.master], [], [], deadline - time.monotonic())[0], self.output[-2000:]
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            self.output += data
            for stream in self._streams:
                stream.feed(data)
            self.screens.append([line.rstrip() for line in self.screen.display])

    def shows(self, text: str) -> bool:
        return any(text in line for line in self.screen.display)

    @property
    def seen(self) -> str:
        """All screens, one below the other."""
        return "\n".join(line for screen in self.screens for line in screen)

    @property
    def lines(self) -> list[str]:
        """What is on the screen now."""
        return [line.rstrip() for line in self.screen.display if line.strip()]


ENVIRONMENT = {
    "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
    "TERM": "xterm-256color",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def started(
    terminal: Terminal, program: str, here: Path, **environment: str
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-c", HEAD + textwrap.dedent(program), str(here)]
    return terminal.started(argv, cwd=here, env={**ENVIRONMENT, "HOME": str(here), **environment})


def run(program: str, here: Path, size: tuple[int, int] = (80, 24), **environment: str) -> Terminal:
    terminal = Terminal(*size)
    with started(terminal, program, here, **environment) as process:
        terminal.read()
    assert process.returncode == 0, terminal.output.decode()
    return terminal


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_display(tmp_path: Path, size: tuple[int, int]) -> None:
    terminal = run(INSTALLATION, tmp_path, size)
    assert "✓ Creating the disk" in terminal.seen
    assert re.search(r"▸ Installing · Partitioning +0:[0-9]{2}$", terminal.seen, re.MULTILINE)
    assert "━━━━━━━━━━──────────────────────────────  25 %" in terminal.seen
    # 100 % is the end.
    assert "  99 %" in terminal.seen
    assert re.search(r"disk [0-9]+\.[0-9] MiB/s written, .* KiB/s read; network [1-3]\.[0-9] MiB/s", terminal.seen)
    assert "about" not in terminal.seen
    # What is logged below a warning is for the file.
    assert "for the file" not in terminal.seen
    assert "hello" not in terminal.seen
    # What stays.
    *warning, end, summary = terminal.lines
    assert "".join(warning) == "warning: mind the gap" + "!" * 300
    assert re.fullmatch(r"✓ x: 3 steps in [0-9]+\.[0-9] s", end)
    assert summary == "the summary"
    assert not terminal.screen.cursor.hidden
    assert b"\x1b[?25l" in terminal.output


@pytest.mark.parametrize("size", [*SIZES, (20, 5), (1, 1), (40, 24), (99, 30), (102, 30)], ids=str)
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, size: tuple[int, int]) -> None:
    terminal = run(INSTALLATION.replace('log.logger.warning("mind', '("mind'), tmp_path, size)
    written = re.split(rb"\r|\n", re.sub(rb"\x1b\[[0-?]*[A-Za-z]", b"", terminal.output))
    lines = [line.decode() for line in written]
    assert "the summary" in lines
    assert max(len(line) for line in lines if line != "the summary") <= size[0]
    assert not terminal.screen.cursor.hidden


def test_file_has_it_all_and_no_escape_sequences(tmp_path: Path) -> None:
    run(INSTALLATION, tmp_path)
    text = (tmp_path / "log").read_text()
    assert not set(text) & set("\x1b\r━▸✓")
    messages = re.findall(r"^[-0-9]{10} [:,0-9]+ image-factory \[[0-9]+\] ([A-Z]+: .*)$", text, re.MULTILINE)
    assert len(messages) == len(text.splitlines())
    for message in (
        "INFO: Installing ...",
        "INFO: Partitioning ...",
        "INFO: console: hello",
        "INFO: for the file",
        "WARNING: mind the gap" + "!" * 300,
    ):
        assert message in messages


def test_time_left(tmp_path: Path) -> None:
    program = """
        def build():
            with log.step("Installing"):
                time.sleep(1)
            with log.step("Checksumming x-2026-01-02.raw"):
                time.sleep(1)
        with events.observed(timeline):
            build()
        timeline.keep()
        timeline = estimates.Timeline(Plan("x", settings, datetime.date(2026, 1, 3), here, {}))
        with shown():
            build()
    """
    assert re.search(r"^x +about [2-9] s left · 0:0[0-9]$", run(program, tmp_path).seen, re.MULTILINE)


def test_failure_leaves_the_steps(tmp_path: Path) -> None:
    program = """
        try:
            with shown():
                with log.step("Creating the disk"):
                    pass
                with log.step("Installing"):
                    tell(PhaseStarted("Partitioning"))
                    log.logger.error("the console")
                    raise ValueError
        except ValueError:
            print("the error", file=sys.stderr)
    """
    terminal = run(program, tmp_path)
    patterns = (
        "error: the console",
        r"x +0:[0-9]{2}",
        r"✓ Creating the disk +[0-9]+\.[0-9] s",
        r"✗ Installing · Partitioning +[0-9]+\.[0-9] s",
        "the error",
    )
    assert len(terminal.lines) == len(patterns)
    for pattern, line in zip(patterns, terminal.lines, strict=True):
        assert re.fullmatch(pattern, line)
    assert not terminal.screen.cursor.hidden


STEPS = """
with shown():
    for number in range(40):
        with log.step(f"Step {number}"):
            tell(Progressed(0.5), GuestActive(0, 0, None))
"""


def test_more_steps_than_lines(tmp_path: Path) -> None:
    terminal = run(STEPS.replace("0.25", "0"), tmp_path, (80, 10))
    screens = [screen for screen in terminal.screens if any("Step 39" in line for line in screen)]
    assert re.fullmatch(r"x +0:[0-9]{2}", screens[0][0])
    assert re.search(r"^  3[0-9] steps before +[0-9.]+ s$", "\n".join(screens[0]), re.MULTILINE)
    # Nothing has scrolled out of sight, which would be seen above later.
    assert all(screen[0].startswith("x ") for screen in terminal.screens[2:-2])
    assert re.fullmatch(r"✓ x: 40 steps in .*", terminal.lines[0])
    assert len(terminal.lines) == 1


@pytest.mark.parametrize(("columns", "rows"), [(50, 24), (120, 40), (80, 8)])
def test_resized(tmp_path: Path, columns: int, rows: int) -> None:
    program = """
        with shown():
            with log.step("Installing"):
                tell(PhaseStarted("Partitioning" + "." * 60))
                tell(Progressed(0.5))
                input()
                tell(TimePassed())
                tell(PhaseStarted("Base" + "." * 100))
    """
    terminal = Terminal(80, 24)
    with started(terminal, program, tmp_path) as process:
        terminal.read(until=lambda terminal: terminal.shows("50 %"))
        terminal.resize(columns, rows)
        terminal.screen.resize(rows, columns)
        before = len(terminal.screens)
        os.write(terminal.master, b"\n")
        terminal.read()
    assert process.returncode == 0
    later = [line for screen in terminal.screens[before:] for line in screen]
    width = min(columns - 1, 100)
    assert any(len(line) == width and line.startswith("▸ Installing · Base...") for line in later)
    assert re.fullmatch(r"✓ x: 1 steps in .*", terminal.lines[-1])


def test_lines_that_the_terminal_has_broken_anew_are_found_again() -> None:
    """Many terminals break the lines on the screen anew when they shrink, pyte doesn't."""
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(slave, "w", encoding="utf-8") as stream, tempfile.TemporaryDirectory() as directory:
        timeline = estimates.Timeline(make_plan(Path(directory)))
        shown = display._LiveDisplay("x", timeline, stream)
        shown.start()
        for name in ("a", "b"):
            for event in (events.StepStarted(name), events.StepEnded(name, 1, failed=False)):
                timeline.notice(event)
                shown.notice(event)
        while select.select([master], [], [], 0.2)[0]:
            os.read(master, 65536)
        # Three lines of 79 columns become nine.
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
        shown.show(logging.INFO, "above")
        written = os.read(master, 65536).partition(b"above")[0]
        assert written.count(b"\x1b[1A") == 8
        shown.end(failed=False)
    os.close(master)


# Colours and characters.

COLOUR = re.compile(rb"\x1b\[[0-9;]*[34][0-9][0-9;]*m")


def test_colours(tmp_path: Path) -> None:
    assert COLOUR.search(run(INSTALLATION, tmp_path).output)
    assert not COLOUR.search(run(INSTALLATION, tmp_path, NO_COLOR="1").output)


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"TERM": "linux"}, {"PYTHONIOENCODING": "latin-1"}], ids=str
)
def test_characters_that_every_terminal_has(tmp_path: Path, environment: dict[str, str]) -> None:
    terminal = run(INSTALLATION, tmp_path, **environment)
    assert terminal.output.isascii()
    assert "+ Creating the disk" in terminal.seen
    assert "##########..............................  25 %" in terminal.seen


WAITING = """
from image_factory.machines import turns
turns._PREFIX = f"test-display-{os.getpid()}"
places = [ExitStack() for _ in range(2)]
for number, place in enumerate(places):
    place.enter_context(turns._named(f"installation/1/1/0/0000000{number}"))
def write(text):
    # Each ends when it was seen that it waits for it.
    for said, place in zip(("2 run ", "1 runs "), places):
        if said in text:
            place.close()
    return original(text)
original, sys.stderr.write = sys.stderr.write, write
with shown(logging.WARNING):
    with turns.taken(1, 1, 1):
        with log.step("Installing"):
            tell(TimePassed())
"""


def drawn(terminal: Terminal) -> str:
    """All that was drawn, whether a screen was read between that and what was drawn over it or not."""
    return re.sub(r"\x1b\[[0-?]*[A-Za-z]", "", terminal.output.decode()).replace("\r\n", "\n")


def test_why_it_waits(tmp_path: Path) -> None:
    """Said as it changes, and not any more when it goes on."""
    text = drawn(run(WAITING, tmp_path))
    waits = r"▸ Waiting for other installations +0:[0-9]+\n  {} on this machine \(of root\), and max-parallel = 1\.\r"
    two, one = (re.search(waits.format(run), text) for run in ("2 run", "1 runs"))
    assert two and one, text
    assert two.start() < one.start() < text.index("▸ Installing")
    assert "on this machine" not in text[text.index("▸ Installing") :]


def test_why_it_waits_in_a_narrow_terminal(tmp_path: Path) -> None:
    text = drawn(run(WAITING, tmp_path, (40, 24)))
    assert "\n  1 runs on this machine (of root), and" + "\n  max-parallel = 1." in text


def test_columns_of_the_environment_are_not_believed(tmp_path: Path) -> None:
    terminal = run(INSTALLATION, tmp_path, COLUMNS="300", LINES="100")
    assert max(len(line) for line in terminal.seen.splitlines()) <= 80


def test_names_can_not_control_the_terminal(tmp_path: Path) -> None:
    program = r"""
        with shown():
            with log.step("a\x1b[2J\nb\tc[red]d"):
                tell(PhaseStarted("e\x1b]0;f\x07\x9bg\udce9"))
    """
    terminal = run(program, tmp_path)
    assert b"\x1b[2J" not in terminal.output
    assert r"▸ a b c[red]d · e?g\udce9" in terminal.seen


# Ways out.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["waiting", "drawing"])
def test_signal_gives_the_terminal_back(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    program = f"""
        def write(text):
            if {moment == "drawing"} and timeline.step and not interrupts._state.raised:
                signal.raise_signal({int(number)})
            return original(text)
        original, sys.stderr.write = sys.stderr.write, write
        try:
            with interrupts.handled(), shown(), log.step("Installing"), interrupts.interruptible():
                tell(Progressed(0.5))
                signal.raise_signal({int(number)})
                print("never")
        except Interrupted as error:
            print(error.message)
    """
    terminal = run(program, tmp_path)
    assert not terminal.screen.cursor.hidden
    assert re.fullmatch(r"✗ Installing +[0-9]+\.[0-9] s", terminal.lines[-2])
    assert terminal.lines[-1] == f"Stopped by {number.name}."
    # Drawn whole: what is on the screen is the last state and nothing of an earlier one.
    assert len(terminal.lines) == 3


def test_second_signal_is_answered_above(tmp_path: Path) -> None:
    program = """
        def write(text):
            if "Unmounting" in text and not sent:
                sent.append(True)
                signal.raise_signal(signal.SIGTERM)
            return original(text)
        sent = []
        original, sys.stderr.write = sys.stderr.write, write
        try:
            with interrupts.handled(), shown(), log.step("Installing"):
                try:
                    with interrupts.interruptible():
                        signal.raise_signal(signal.SIGTERM)
                finally:
                    with log.step("Unmounting"):
                        tell(Progressed(0.5))
        except Interrupted:
            pass
    """
    terminal = run(program, tmp_path)
    assert terminal.lines[0] == "warning: Already stopping: cleaning up."
    assert len(terminal.lines) == 4


def test_terminal_that_has_gone(tmp_path: Path) -> None:
    program = """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with shown():
            with log.step("Installing"):
                tell(TimePassed())
                tell(Progressed(0.5))
                while not (here / "gone").exists():
                    time.sleep(0.05)
                for number in range(3):
                    log.logger.warning("into the void")
                    tell(Progressed(0.7))
        (here / "end").touch()
    """
    terminal = Terminal(80, 24)
    with started(terminal, program, tmp_path) as process:
        terminal.read(until=lambda terminal: terminal.shows("50 %"))
        os.close(terminal.master)
        (tmp_path / "gone").touch()
    # 120: Python itself could not flush stderr at its end.
    assert process.returncode in (0, 120)
    assert (tmp_path / "end").exists()
    assert (tmp_path / "log").read_text().count("into the void") == 3


def test_no_thread_is_started(tmp_path: Path) -> None:
    """The program forks, and a fork of several threads may hang."""
    program = """
        import threading
        with shown(), log.step("Installing"):
            tell(Progressed(0.5))
            assert threading.active_count() == 1
            assert len(os.listdir("/proc/self/task")) == 1
    """
    run(program, tmp_path)


# Lines of the log.


def minutes(
    clock: Clock, lines: display.LogLines, timeline: estimates.Timeline, count: int, *told: events.Event
) -> None:
    for _ in range(count * 60):
        clock.now += 1
        for event in told:
            timeline.notice(event)
            lines.notice(event)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_lines(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="image-factory")
    timeline = estimates.Timeline(make_plan(tmp_path))
    lines = display.LogLines(timeline)

    def tell(event: events.Event) -> None:
        timeline.notice(event)
        lines.notice(event)

    minutes(clock, lines, timeline, 2, events.TimePassed())
    tell(events.StepStarted("Installing"))
    minutes(clock, lines, timeline, 2, events.GuestActive(0, 0, 0))
    tell(events.PhaseStarted("Base"))
    clock.now += 59
    tell(events.Progressed(0.455))
    assert caplog.messages == ["Installing: 60 s", "Installing: 120 s", "Base ..."]
    minutes(clock, lines, timeline, 1, events.Progressed(0.455), events.ConsoleLine("x"))
    assert caplog.messages[3:] == ["Base: 45 %, 60 s"]
    tell(events.StepEnded("Installing", 239, failed=False))
    timeline.keep()

    caplog.clear()
    timeline = estimates.Timeline(make_plan(tmp_path))
    lines = display.LogLines(timeline, console=True)
    tell(events.StepStarted("Installing"))
    clock.now += 10
    tell(events.PhaseStarted("Base"))
    minutes(clock, lines, timeline, 1, events.Progressed(0.5))
    tell(events.ConsoleLine("hello"))
    assert caplog.messages == ["Base ... about 119 s left", "Base: 50 %, 60 s, about 60 s left", "console: hello"]


# The program itself, with stand-ins for libvirt's.

CONFIGURATION = """
[x]
linux = linux
initrd = initrd
image-size = 1M
virt-type = qemu
mount-via = loop
# Whatever else this machine does.
max-parallel = none
"""
VIRSH = '#!/bin/sh\ncase "$*" in *domstate*) echo "shut off (shutdown)" ;; esac\n'


@pytest.fixture
def place() -> Iterator[Path]:
    """A place that QEMU of the system's libvirt can get into, unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="image-factory-test.", dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "own.conf").write_text(CONFIGURATION)
        (directory / "bin").mkdir()
        for name, text in (
            ("virsh", VIRSH),
            ("virt-install", "#!/bin/sh\necho installing\nexec sleep ${INSTALL_PATIENCE:-3}\n"),
        ):
            (directory / "bin" / name).write_text(text)
            (directory / "bin" / name).chmod(0o755)
        for name in ("linux", "initrd"):
            (directory / name).write_text("a file\n")
        yield directory


def program(place: Path, *arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    variables = {
        "PATH": f"{place}/bin:{ENVIRONMENT['PATH']}",
        "HOME": str(place),
        "IMAGE_FACTORY_CONFIG": str(place / "own.conf"),
    }
    return ["/usr/bin/python3", str(REPOSITORY / "image-factory"), "x", *arguments], {
        **ENVIRONMENT,
        **variables,
        **environment,
    }


def run_program(terminal: Terminal, place: Path, *arguments: str, **environment: str) -> int:
    argv, variables = program(place, *arguments, **environment)
    with terminal.started(argv, cwd=place, env=variables) as process:
        terminal.read()
    return process.returncode


LOG_LINE = re.compile(r"[-0-9]{10} [:,0-9]+ image-factory \[[0-9]+\] (?:INFO|WARNING|ERROR): .*")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_program_on_a_terminal(place: Path, size: tuple[int, int]) -> None:
    terminal = Terminal(*size)
    # What it has installed is an empty disk.
    assert run_program(terminal, place, "--log-file", "--log-filename", "x.log") == 1
    # Time goes on while a program says nothing.
    assert re.search(r"▸ Installing +0:02", terminal.seen)
    assert not LOG_LINE.search(terminal.seen)
    assert not terminal.screen.cursor.hidden
    assert re.fullmatch(r"✓ Installing +[3-9]\.[0-9] s", terminal.lines[3])
    assert re.fullmatch(r"✗ Reading the partition table +[0-9]+\.[0-9] s", terminal.lines[4])
    assert terminal.lines[5].startswith("image-factory: error: ")
    messages = (place / "x.log").read_text()
    assert all(LOG_LINE.fullmatch(line) for line in messages.splitlines())
    assert "INFO: virt-install: installing" in messages


def test_program_that_is_stopped(place: Path) -> None:
    terminal = Terminal(80, 24)
    argv, variables = program(place, INSTALL_PATIENCE="60")
    with terminal.started(argv, cwd=place, env=variables) as process:
        terminal.read(until=lambda terminal: terminal.shows("▸ Installing"))
        process.send_signal(signal.SIGTERM)
        terminal.read()
    assert process.returncode == 143
    assert not terminal.screen.cursor.hidden
    assert terminal.lines[-1] == "image-factory: error: Stopped by SIGTERM."
    assert "✗ Installing" in terminal.lines[-2]


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": ""}], ids=str)
def test_terminal_that_can_not_be_drawn_on(place: Path, environment: dict[str, str]) -> None:
    terminal = Terminal(200, 50)
    assert run_program(terminal, place, **environment) == 1
    assert b"\x1b" not in terminal.output
    assert LOG_LINE.fullmatch(terminal.lines[0])


def test_verbose_on_a_terminal(place: Path) -> None:
    terminal = Terminal(200, 50)
    assert run_program(terminal, place, "--verbose") == 1
    assert "virt-install: installing" in terminal.lines
    assert any("✓ Installing " in line for line in terminal.lines)


def test_pipe(place: Path) -> None:
    argv, variables = program(place)
    done = subprocess.run(argv, cwd=place, env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    *lines, error = [line for line in done.stderr.splitlines() if "hint: " not in line]
    assert all(LOG_LINE.fullmatch(line) for line in lines)
    assert any(line.endswith("INFO: virt-install: installing") for line in lines)
    assert error.startswith("image-factory: error: ")


@pytest.mark.parametrize("terminal", [Terminal(80, 24), None], ids=["terminal", "pipe"])
def test_quiet(place: Path, terminal: Terminal | None) -> None:
    flags = ("--quiet", "--log-file", "--log-filename", "x.log")
    if terminal is None:
        argv, variables = program(place, *flags)
        done = subprocess.run(argv, cwd=place, env=variables, capture_output=True, text=True)
        assert done.stdout == ""
        shown = done.stderr.splitlines()
    else:
        assert run_program(terminal, place, *flags) == 1
        assert b"\x1b" not in terminal.output
        shown = terminal.lines
    assert shown[0].startswith("image-factory: error: ")
    assert "INFO: virt-install: installing" in (place / "x.log").read_text()


@pytest.mark.parametrize("flags", [("-q", "-v"), ("--verbose", "--quiet")])
def test_quiet_and_verbose(place: Path, flags: tuple[str, str]) -> None:
    argv, variables = program(place, *flags)
    done = subprocess.run(argv, cwd=place, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "not allowed with argument" in done.stderr.splitlines()[0]


def test_list_needs_no_rich(place: Path) -> None:
    (place / "without/rich").mkdir(parents=True)
    (place / "without/rich/__init__.py").write_text("raise ImportError\n")
    argv, variables = program(place, "--list", PYTHONPATH=str(place / "without"))
    done = subprocess.run(argv, cwd=place, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "x  -  -  x86_64  bios\n", "")


def test_stream_that_is_closed() -> None:
    stream = io.StringIO()
    stream.close()
    with tempfile.TemporaryDirectory() as directory:
        shown = display._LiveDisplay("x", estimates.Timeline(make_plan(Path(directory))), stream)
        shown.start()
        shown.end(failed=True)
