"""The watch over an installation, with recorded and made consoles; a virsh on PATH has the statistics.

integration/test_watchdog.py has real machines.
"""

import datetime
import math
import os
import re
from pathlib import Path

import pytest

from image_factory.base import events
from image_factory.base.errors import InstallationError, InstalledError
from image_factory.configuration.files import Configuration
from image_factory.machines import libvirt
from image_factory.model import Build, Plan
from image_factory.sources.installer import installers
from image_factory.sources.installer.watch import Limits, Watcher

REPOSITORY = Path(__file__).resolve().parents[2]


class Watched:
    """An installation whose console and statistics are what a test says, second by second."""

    def __init__(self, directory: Path, *, answers: str = "preseed", limits: Limits | None = None) -> None:
        configuration = directory / "image-factory.conf"
        configuration.write_text(f"[x]\nlinux = /l\ninitrd = /i\n{answers} = /a.json\n")
        settings = Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}).image("x", {})
        self.build = Build(Plan("x", settings, datetime.date.today(), directory, {}), directory, "vm")
        self.statistics = directory / "statistics"
        self.now = 0.0
        self.events: list[events.Event] = []
        self.watcher = Watcher(self.build, limits or Limits(math.inf, math.inf), clock=lambda: self.now)

    def notice(self, event: events.Event) -> None:
        """Keep it."""
        self.events.append(event)

    def prints(self, data: str | bytes) -> None:
        """Have the guest print *data*, and look."""
        with self.build.console_path.open("ab") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        self.look()

    def look(self) -> None:
        """Look a second later."""
        self.now += 1
        with events.observed(self):
            self.watcher.look()

    def look_for(self, seconds: float) -> float:
        """Look for so long; return after how many of them the installation was ended."""
        start = self.now
        while self.now - start < seconds:
            try:
                self.look()
            except InstallationError:
                return self.now - start
        raise AssertionError(f"it went on for {seconds} s")

    def look_at_the_end(self) -> None:
        """Look until nothing more will come of it."""
        for _ in range(10):
            self.look()

    def virsh(self, verb: str) -> list[str]:
        """Return the arguments of the one command of libvirt that changes something."""
        words = (self.build.directory / "destroyed").read_text().split()
        assert verb in words
        return words

    def of(self, kind: type) -> list[events.Event]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "virsh").write_text(
        f"""#!/bin/sh
case $3 in
    domstats) exec cat {tmp_path}/statistics ;;
    destroy) printf '%s\\n' "$@" >{tmp_path}/destroyed; [ ! -e {tmp_path}/refuses ] ;;
    *) exit 1 ;;
esac
"""
    )
    (programs / "virsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return Watched(tmp_path)


def test_phases_and_fractions(watched: Watched) -> None:
    watched.look()
    watched.prints("[    0.1] Linux version 6.1\r\nLoading additional components  ... 0%")
    watched.prints("... 10%")
    # The status line of the terminal, and the rest of the line behind it.
    watched.prints("\x1b[H\x1b[7m (1*installer) 2 shell  Nov 21 12:19 \x1b[10;59H\x1b[0m... 40%... 100%\r\n")
    watched.prints("Installing the base system  ... 7%\r\n7% of something else\r\n")
    assert [event.name for event in watched.events if isinstance(event, events.PhaseStarted)] == [
        "Loading installer components", "Installing the base system",
    ]  # fmt: skip
    assert [event.fraction for event in watched.events if isinstance(event, events.Progressed)] == [
        0.0, 0.1, 1.0, 0.07,
    ]  # fmt: skip
    assert events.ConsoleLine("Installing the base system  ... 7%") in watched.events


def test_anaconda_counts(tmp_path: Path) -> None:
    watched = Watched(tmp_path, answers="kickstart")
    watched.prints("Installing glibc.x86_64 (12/48)\r\nInstalling bash.x86_64 (24/48)\r\n")
    assert watched.of(events.PhaseStarted) == [events.PhaseStarted("Installing packages")]
    assert watched.of(events.Progressed) == [events.Progressed(0.25), events.Progressed(0.5)]


# Of the real installer of Debian 13, in its text frontend.
PHASES = [
    "Configuring the network", "Checking the mirror", "Loading installer components", "Partitioning",
    "Loading installer components", "Partitioning", "Formatting", "Installing the base system", "Configuring apt",
    "Installing software", "Installing the boot loader", "Finishing the installation",
]  # fmt: skip

RECORDED = {
    "success": (PHASES, None, None),
    "ram": ([], r"The installation machine has too little memory\.", "Set a larger ram"),
    "disk": (PHASES[:6], r"The disk is too small for what is to be installed\.", "Set a larger image-size"),
    "question": (PHASES[:6], r"The installer waits for an answer: Partition disks\.", "answer file"),
    # A frame that comes again is no news.
    "newt-question": (PHASES[:4], r"The installer waits for an answer: Partition disks\.", "answer file"),
    "mirror-deb": (PHASES[:8], r"Debian's base system can't be installed\.", "mirror"),
    "mirror": (PHASES[:3], r"A download from the mirror has failed\.", "another mirror"),
}


def replay(watched: Watched, data: bytes) -> None:
    """Have the guest print *data*, 256 bytes a second, and wait."""
    for start in range(0, len(data), 256):
        watched.prints(data[start : start + 256])
    for _ in range(20):
        watched.look()


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_installation(watched: Watched, name: str) -> None:
    phases, message, hint = RECORDED[name]
    data = (REPOSITORY / f"tests/data/consoles/debian-13-{name}.log").read_bytes()
    error = None
    try:
        replay(watched, data)
    except InstallationError as raised:
        error = raised
    assert [event.name for event in watched.events if isinstance(event, events.PhaseStarted)] == phases
    assert not [e for e in watched.events if isinstance(e, events.Progressed) and not 0 <= e.fraction <= 1]
    if message is None:
        assert error is None
        watched.watcher.finish()
        return
    assert error is not None
    assert re.fullmatch(message, error.message)
    assert hint in str(error.hint)
    # It was told within 10 seconds of its last word; what came after that is the terminal's clock.
    assert watched.now <= math.ceil(len(data) / 256) + 10


FAILURES = [
    ("preseed", "[  1.0] Kernel panic - not syncing: Attempted to kill init!", "kernel has panicked", "ram"),
    ("preseed", "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)", "no initrd", "ram"),
    ("preseed", "[!!] Installation step failed", "A step of the installer has failed", "answer file"),
    ("preseed", "The installer failed to download a file from the mirror.", "download from the mirror", "mirror"),
    ("preseed", "No kernel modules were found. This probably is due to", "different versions", "linux and initrd"),
    ("preseed", "!! ERROR: Failed to run preseeded command", "command of the answer file has failed", "late_command"),
    ("preseed", "!! ERROR: What no one has thought of", "has stopped with an error", "console log"),
    ("preseed", "Failed to partition the selected disk", "disk is too small", "image-size"),
    ("kickstart", "Pane is dead (status 1)", "Anaconda has died", "ram = 4G"),
    ("kickstart", "Traceback (most recent call last):", "has crashed", "ram"),
    ("kickstart", "Out of memory: Killed process 811 (anaconda)", "run out of memory", "ram"),
    ("kickstart", "Not enough space in file systems for the current software selection.", "too small", "image-size"),
    ("kickstart", "The following problem occurred on line 5 of the kickstart file:", "Kickstart file", "ksvalidator"),
    ("kickstart", "Non interactive installation failed: X", "Anaconda has stopped", "console log"),
    ("kickstart", "Some packages, groups or modules are missing.", "what can't be had", "console log"),
    ("yast", "No repository found.", "source can't be read", "install="),
    ("yast", "No bootable device.", "nothing to boot from", "installer"),
]


@pytest.mark.parametrize(("answers", "line", "message", "hint"), FAILURES, ids=[line for _, line, _, _ in FAILURES])
def test_failure_ends_the_installation_within_ten_seconds(
    watched: Watched, tmp_path: Path, answers: str, line: str, message: str, hint: str
) -> None:
    watched = Watched(tmp_path, answers=answers)
    watched.prints("something before\r\n")
    watched.prints(f"{line}\r\n")
    assert watched.look_for(10) <= 3
    with pytest.raises(InstallationError) as raised:
        watched.look()
    assert message in raised.value.message
    assert hint in str(raised.value.hint)


def test_what_says_the_most_counts(watched: Watched) -> None:
    """The general comes first on the console, the cause a moment later."""
    watched.prints("[!!] Installation step failed\r\n")
    watched.prints("Failed to partition the selected disk\r\n")
    with pytest.raises(InstallationError, match="disk is too small"):
        for _ in range(5):
            watched.look()


QUESTIONS = [
    ("preseed", "Prompt: '?' for help, default=1> "),
    ("preseed", "     <Go Back>                                       <Yes>    <No>     "),
    ("kickstart", "Please make a selection from the above ['c' to continue, 'q' to quit]: "),
    ("preseed", "stand-in: Please choose [1-3]: "),
]

SHELLS = [
    "Give root password for maintenance\r\n(or press Control-D to continue): ",
    "Press Enter for maintenance",
    "dracut:/# ",
    "(initramfs) ",
    "sh-5.2# ",
    "grub> ",
]


@pytest.mark.parametrize("prompt", SHELLS)
def test_emergency_shell(tmp_path: Path, watched: Watched, prompt: str) -> None:
    watched = Watched(tmp_path, answers="yast")
    watched.prints(f"something before\r\n{prompt}")
    assert watched.look_for(10) <= 6
    with pytest.raises(InstallationError, match=r"^The guest has stopped at an emergency shell\.$"):
        watched.look()


@pytest.mark.parametrize(("answers", "question"), QUESTIONS)
def test_question_that_is_not_answered(watched: Watched, tmp_path: Path, answers: str, question: str) -> None:
    watched = Watched(tmp_path, answers=answers)
    watched.prints(question)
    # The clock of the terminal, and the kernel, don't answer.
    watched.prints("\x1b[H (1*installer)  Nov 21 12:19 \x1b[5;5H[    7.1] random: crng init done\r\n")
    assert watched.look_for(10) <= 6
    with pytest.raises(InstallationError, match=r"^The installer waits for an answer\.$"):
        watched.look()


def test_question_that_is_answered(watched: Watched) -> None:
    watched.prints("Prompt: '?' for help, default=1> ")
    watched.look()
    watched.prints("1\r\nDetecting network hardware  ... 2%")
    for _ in range(30):
        watched.look()


def test_repetition_is_no_sign_of_life(tmp_path: Path, watched: Watched) -> None:
    watched = Watched(tmp_path, limits=Limits(math.inf, 60))
    for second in range(40):
        watched.prints(f"[{second:5}.123456] still waiting at 12:{second:02} /\r\n")
    assert watched.look_for(60) == 21
    with pytest.raises(InstallationError, match="no sign of life for 60 s") as raised:
        watched.look()
    assert "stall-timeout" in str(raised.value.hint)


def test_output_disk_and_network_are_signs_of_life(tmp_path: Path, watched: Watched) -> None:
    watched = Watched(tmp_path, limits=Limits(math.inf, 10))
    for second in range(60):
        written, received = (second, 7) if second < 30 else (30, second)
        watched.statistics.write_text(
            f"Domain: 'vm'\n  block.count=1\n  block.0.name=vda\n  block.0.rd.bytes=5\n  block.0.wr.bytes={written}\n"
            f"  net.0.rx.bytes={received}\n  net.0.tx.bytes=1\n"
        )
        watched.look()
    assert watched.of(events.GuestActive)[-1] in (events.GuestActive(5, 30, 59), events.GuestActive(5, 30, 60))
    for second in range(30):
        watched.prints(f"line {second}\r\n")
    assert watched.look_for(20) == 10


def test_network_that_is_not_counted(watched: Watched) -> None:
    """QEMU's own network has no interface on this machine."""
    watched.statistics.write_text("net.count=1\nblock.0.rd.bytes=1\nblock.0.wr.bytes=2\n")
    watched.look()
    assert watched.of(events.GuestActive) == [events.GuestActive(1, 2, None)]


def test_time_for_the_whole(tmp_path: Path, watched: Watched) -> None:
    watched = Watched(tmp_path, limits=Limits(3600, math.inf))
    watched.prints("Installing the base system  ... 7%\r\n")
    with pytest.raises(InstallationError, match=r"did not end within 60 min\. It was at: Installing the base system\."):
        for second in range(4000):
            watched.prints(f"line {second}\r\n") if second % 100 == 0 else watched.look()


def test_guest_that_boots_again_and_again(watched: Watched) -> None:
    for _ in range(5):
        watched.prints("[    0.000000] Linux version 6.1.0")
        watched.look()
        watched.prints(" (gcc)\r\n")
    assert watched.look_for(10) <= 3
    with pytest.raises(InstallationError, match="boots again and again"):
        watched.look()


def test_failure_that_is_printed_last(watched: Watched) -> None:
    """The machine may be off before the next look."""
    with watched.build.console_path.open("w") as file:
        file.write("Kernel panic - not syncing: Fatal exception\n")
    with pytest.raises(InstallationError, match="panicked"):
        watched.watcher.finish()


def test_question_does_not_matter_when_the_guest_is_off(watched: Watched) -> None:
    with watched.build.console_path.open("w") as file:
        file.write("Press ENTER to continue.\n")
    watched.watcher.finish()


@pytest.mark.parametrize("line", ["Pane is dead (status 1, Sat)", "Traceback (most recent call last):"])
def test_word_in_passing_does_not_matter_when_the_guest_is_off(tmp_path: Path, line: str) -> None:
    watched = Watched(tmp_path, answers="kickstart")
    with watched.build.console_path.open("w") as file:
        file.write(f"{line}\n")
    watched.watcher.finish()


HEALTHY = [
    ("preseed", "[    3.2] psmouse serio1: Failed to get extended button data, assuming 3 buttons"),
    ("preseed", "[    4.0] ACPI: insufficient memory for the log"),
    ("preseed", "[    4.0] loop: No space left on device"),
    ("preseed", "systemd-journald: Failed to get machine id: No medium found"),
    ("preseed", "modprobe: ERROR: could not insert 'x': Cannot allocate memory"),
    ("kickstart", "Pane is dead (status 0, Sat Nov 21 12:00:00 2026)"),
    ("kickstart", "[  130.1] dracut-initqueue[811]: Warning: dracut-initqueue timeout - starting timeout scripts"),
    ("kickstart", "Exception ignored in: <function x>\r\nTraceback (most recent call last):\r\n  File"),
    ("yast", " [Help]     [Abort]     [Back]     [Next] "),
    ("yast", "[  OK  ] Started something."),
    ("yast", "SeaBIOS: Boot failed: not a bootable disk"),
    ("yast", "dmesg says: Linux version 6.4 " * 5),
]


@pytest.mark.parametrize(("answers", "line"), HEALTHY, ids=[line[:40] for _, line in HEALTHY])
def test_what_a_healthy_installation_prints(tmp_path: Path, answers: str, line: str) -> None:
    watched = Watched(tmp_path, answers=answers)
    watched.prints(f"{line}\r\n")
    for _ in range(20):
        watched.look()
    watched.watcher.finish()


HALTS = [
    "reboot: System halted",
    "[  812.345678] reboot: System halted",
    "[  812.345678][    T1] reboot: System halted",
    "System halted.",
    "[ 12.1] reboot: Power off not available: System halted instead",
    "Requesting system halt[  812.345678] reboot: System halted",
    "[  812.3] reboot: System halted\r\n[  813.1] random: crng init done",
]


@pytest.mark.parametrize("line", HALTS)
@pytest.mark.parametrize("answers", ["preseed", "kickstart", "agama"])
def test_guest_that_halts_is_switched_off(watched: Watched, tmp_path: Path, answers: str, line: str) -> None:
    watched = Watched(tmp_path, answers=answers)
    watched.prints("something before\r\n")
    watched.prints(f"{line}\r\n")
    for _ in range(9):
        watched.look()
    assert watched.virsh("destroy") == ["--connect", libvirt.uri(), "destroy", "vm"]
    assert watched.watcher.switched_off
    watched.watcher.finish()


def test_libvirt_that_is_away_when_the_guest_halts(watched: Watched, tmp_path: Path) -> None:
    """It is asked again, until it answers."""
    (tmp_path / "refuses").touch()
    watched.prints("reboot: System halted\r\n")
    for _ in range(5):
        watched.look()
    assert not watched.watcher.switched_off
    (tmp_path / "refuses").unlink()
    for _ in range(5):
        watched.look()
    assert watched.watcher.switched_off


@pytest.mark.parametrize(
    "line",
    [
        "[    5.1] usb 1-1: System halted by nobody",
        "Unpacking halt (System halted) ...",
        "reboot: Power down",
        "Setting up systemd-sysv: System halt is masked",
        # Of programs, which may have more to say, and of services' logs.
        "check: Will now halt.\r\nInstalling bar (2/3)",
        "[  812.3] systemd-shutdown[1]: Halting system.",
        "Requesting system halt",
        "[info] Will now halt.",
        "test: System halted\r\nInstalling bar (2/3)",
        "[   33.5] check[99]: System halted",
        "System halted\r\nInstalling bar (2/3)",
        "reboot: System halted\r\n[   33.5] check[99]: it was only the word",
    ],
)
def test_what_is_no_halt(watched: Watched, line: str) -> None:
    watched.prints(f"{line}\r\n")
    for _ in range(9):
        watched.look()
    assert not watched.watcher.switched_off


def test_failure_before_the_halt(watched: Watched) -> None:
    """A failure that is certain counts; of another one nobody knows, so that the disk is kept."""
    watched.prints("!! ERROR: Failed to run preseeded command\r\nreboot: System halted\r\n")
    with pytest.raises(InstallationError, match="A command of the answer file has failed") as raised:
        watched.look_at_the_end()
    assert not isinstance(raised.value, InstalledError)


def test_word_in_passing_before_the_halt(tmp_path: Path, watched: Watched) -> None:
    watched = Watched(tmp_path, answers="kickstart")
    watched.prints("Traceback (most recent call last):\r\nreboot: System halted\r\n")
    with pytest.raises(InstalledError, match=r"A program of the installer has crashed\. Then the guest has halted\."):
        watched.look_at_the_end()


def test_kernel_that_can_not_be_unpacked(watched: Watched) -> None:
    watched.prints("XZ-compressed data is corrupt\r\n\r\n -- System halted\r\n")
    with pytest.raises(InstallationError, match="kernel can't be started"):
        watched.look_at_the_end()
    assert not watched.watcher.switched_off


SECOND_START = "[    0.000000] Linux version 6.1\r\n"


@pytest.mark.parametrize(
    ("answers", "before", "ends"),
    [
        ("kickstart", "", True),
        ("preseed", "", True),
        ("yast", "Performing Installation\r\n" + SECOND_START, True),
        # Their live systems have such a prompt, from the start.
        ("autoinstall", SECOND_START, False),
        ("agama", SECOND_START + "Installing packages\r\n", False),
        # Firmware and drivers have the words of phases.
        ("agama", "Probing EDD (edd=off to disable)... ok\r\n" + SECOND_START, False),
        (
            "agama",
            "[    0.0] ACPI: Probing\r\n" + SECOND_START + "[    1.0] fake: Installing packages\r\n" + SECOND_START,
            False,
        ),
        ("agama", SECOND_START + "Installing packages\r\n" + SECOND_START, True),
    ],
)
@pytest.mark.parametrize("prompt", ["localhost login: ", "my-host.example.com login: [   31.2] random: crng\r\n"])
def test_login_prompt(watched: Watched, tmp_path: Path, answers: str, before: str, ends: bool, prompt: str) -> None:
    watched = Watched(tmp_path, answers=answers)
    watched.prints(before)
    watched.prints(f"Fedora Linux 44\r\nKernel 6.19 on an x86_64 (ttyS0)\r\n\r\n{prompt}")
    if not ends:
        for _ in range(20):
            watched.look()
        return
    assert watched.look_for(10) <= 6
    with pytest.raises(InstalledError, match="The installed system was started") as raised:
        watched.look()
    assert installers.POWER_OFF[answers] in str(raised.value.hint)


def test_login_that_others_do(watched: Watched) -> None:
    """A machine that goes on by itself is left alone."""
    watched.prints("localhost login: root (automatic login)\r\n")
    watched.prints("last login: ")
    watched.prints("yesterday\r\n")
    for _ in range(9):
        watched.look()


def test_question_that_comes_again(watched: Watched) -> None:
    """The same words at the second time are no news, and a question all the same."""
    watched.prints("Prompt: '?' for help, default=1> \r\nsomething\r\n")
    for _ in range(10):
        watched.look()
    watched.prints("Prompt: '?' for help, default=1> ")
    assert watched.look_for(10) <= 6


def test_console_log_that_begins_anew(watched: Watched) -> None:
    """virtlogd does so at 2 MiB."""
    watched.prints("line\r\n" * 1000)
    watched.build.console_path.write_text("Kernel panic - not syncing: Fatal exception\n")
    assert watched.look_for(10) <= 3


def test_job_that_runs_and_runs(tmp_path: Path, watched: Watched) -> None:
    watched = Watched(tmp_path, limits=Limits(math.inf, 20))
    stars = ["[*     ]", "[ ***  ]", "[   ***]"]
    with pytest.raises(InstallationError, match="no sign of life"):
        for second in range(40):
            watched.prints(f"\r{stars[second % 3]} A start job is running for x (1min {second}s / no limit)")


def test_service_that_says_it_by_the_journal(tmp_path: Path) -> None:
    watched = Watched(tmp_path, answers="kickstart")
    watched.prints("[   33.5] anaconda[2628]: Installing glibc.x86_64 (12/48)\r\n")
    assert watched.of(events.PhaseStarted) == [events.PhaseStarted("Installing packages")]
    watched.prints("[   34.5] anaconda[2628]: Traceback (most recent call last):\r\n")
    assert watched.look_for(10) <= 3


def test_flood(watched: Watched) -> None:
    """A guest that prints a hundred megabytes between two looks: the end of it counts."""
    with watched.build.console_path.open("wb") as file:
        file.truncate(100 << 20)
        file.seek(0, 2)
        file.write(b"\nKernel panic - not syncing: Fatal exception\n")
    assert watched.look_for(10) <= 4


@pytest.mark.parametrize("installer", installers.possible(None), ids=lambda installer: installer.name)
def test_tables(installer: installers.Installer) -> None:
    """Each pattern can match, each failure has a sentence and a next move, and no phase is a failure."""
    for pattern, phase in installer.phases:
        assert phase[0].isupper() and phase[-1].isalnum(), phase
        assert installers.phase_of((installer,), "nothing of all that") is None, pattern
    for failure in (*installer.failures, *installers.COMMON):
        assert failure.message.endswith(".") and failure.hint.endswith("."), failure
        assert installers.failure_of((installer,), "nothing of all that") is None
