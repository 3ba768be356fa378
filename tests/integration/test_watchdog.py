"""The stand-in installer misbehaves in a real machine, and image-factory notices."""

import re
import shlex
import signal
import subprocess

import pytest

from ..conftest import PATIENCE, run, vms, wait_for
from .test_build import TODAY, Build

pytestmark = pytest.mark.usefixtures("machine")

# Mode, settings, and the error.
MISBEHAVIOURS = {
    "panic": ("", r"The guest's kernel has panicked\."),
    "oom": ("", r"The guest has run out of memory\."),
    "question": ("", r"The installer waits for an answer\."),
    "loop": (
        "stall-timeout = 8s",
        r"The installation has shown no sign of life for 8 s\. It was at: Partitioning\.",
    ),
    "hang": (
        "stall-timeout = 8s",
        r"The installation has shown no sign of life for 8 s\. It was at: Partitioning\.",
    ),
    "slow:600": ("install-timeout = 20s", r"The installation did not end within 20 s\. It was at: Partitioning\."),
    "no-such-mode": ("", r"The stand-in installer has failed\."),
}


@pytest.mark.parametrize("mode", MISBEHAVIOURS)
def test_misbehaviour(user_build: Build, mode: str) -> None:
    extra, error = MISBEHAVIOURS[mode]
    user_build.configure(arguments=f"stand-in={mode}", extra=f"{extra}\nlog-file = yes")
    with user_build.started() as process:
        user_build.wait_for_guest("stand-in: ")
        # Sooner than by the limits of time that nothing sets.
        assert process.wait(PATIENCE) == 1
    said = [line for line in user_build.stderr().splitlines() if line.startswith("image-factory: ")]
    assert re.fullmatch(f"image-factory: error: {error}", said[0])
    assert said[1].startswith("image-factory: hint: ")
    assert vms(user_build.user, user_build.directory) == []
    log = (user_build.directory / f"stand-in-{TODAY}.log").read_text()
    assert "ERROR: console: " in log
    assert "ERROR: To repeat the installation by hand: mkdir " in log


def test_guest_that_halts(user_build: Build) -> None:
    """Its machine is switched off, and the build goes on with the disk."""
    user_build.configure(arguments="stand-in=halt", extra="stall-timeout = 10m")
    with user_build.started() as process:
        user_build.wait_for_guest("reboot: System halted")
        wait_for(lambda: "The guest has halted" in user_build.stderr(), "the end of the halted machine")
        assert process.wait(PATIENCE) == 0
    assert (
        "WARNING: The guest has halted, and its machine was switched off. "
        "Have 'd-i debian-installer/exit/poweroff boolean true' in the preseed file."
    ) in user_build.stderr()
    assert (user_build.directory / f"stand-in-{TODAY}.qcow2").exists()
    assert vms(user_build.user, user_build.directory) == []


def test_installed_system_that_comes_up(user_build: Build) -> None:
    """The build ends, and what a first start has left is sealed when it is resumed."""
    user_build.configure(arguments="stand-in=login", extra="seal = yes\nstall-timeout = 10m")
    with user_build.started() as process:
        user_build.wait_for_guest("login:")
        assert process.wait(PATIENCE) == 1
    said = [line for line in user_build.stderr().splitlines() if line.startswith("image-factory: ")]
    assert said[0] == "image-factory: error: The installed system was started: it asks for a login."
    assert "'image-factory --resume stand-in' goes on here" in said[1]
    assert vms(user_build.user, user_build.directory) == []
    done = user_build.run("--resume")
    assert re.search("Sealing|machine-id", done.stderr)
    assert (user_build.directory / f"stand-in-{TODAY}.qcow2").exists()


def test_commands_by_hand(user_build: Build) -> None:
    """What the log says is what a person can type: the same installation, with its console."""
    user_build.configure(arguments="stand-in=no-such-mode", extra="vnc = localhost")
    done = user_build.run(check=False)
    by_hand, attach = (
        re.search(f" ERROR: {text}: (.*)", done.stderr) for text in ("To repeat.*hand", "To attach.*where")
    )
    assert by_hand and attach
    # The machine was off by then.
    assert "WARNING: There is no picture of the screen: " in done.stderr
    name = shlex.split(attach[1])[-1]
    try:
        script = ["script", "--quiet", "--return", "--command", by_hand[1], "/dev/null"]
        shown = run(*user_build.user.argv(*script), check=False, cwd=user_build.directory, timeout=PATIENCE).stdout
        assert "stand-in: error: unknown mode 'no-such-mode'" in shown
    finally:
        virsh = user_build.user.argv("virsh", "--connect", user_build.user.libvirt_uri)
        run(*virsh, "destroy", name, check=False)
        run(*virsh, "undefine", name, "--remove-all-storage", check=False)
        run(*virsh, "pool-destroy", name, check=False)
        run("rm", "-r", user_build.directory / "stand-in-by-hand")


def test_picture_of_the_screen(user_build: Build) -> None:
    user_build.configure(arguments="stand-in=question", extra="vnc = localhost")
    done = user_build.run(check=False)
    picture = user_build.directory / f"stand-in-{TODAY}.png"
    assert f" ERROR: The screen is in {picture}\n" in done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_mode & 0o7777 == 0o600


def test_phases_in_the_log(user_build: Build) -> None:
    user_build.configure(arguments="stand-in=slow:1")
    done = user_build.run()
    phases = re.findall(r" INFO: (.*) \.\.\.", done.stderr)
    start = phases.index("Starting the installer")
    assert phases[start : start + 3] == ["Starting the installer", "Partitioning", "Formatting"]


def test_machine_that_is_gone(user_build: Build) -> None:
    """Someone destroys the machine: the build ends, and says so."""
    user_build.configure(arguments="stand-in=hang")
    with user_build.started() as process:
        user_build.wait_for_guest("stand-in: partitioning")
        [name] = vms(user_build.user, user_build.directory)
        run(*user_build.user.argv("virsh", "--connect", user_build.user.libvirt_uri, "destroy", name))
        assert process.wait(60) == 1
    assert "did not power off by itself: shut off (destroyed)." in user_build.stderr()


def test_signal_while_it_is_watched(user_build: Build) -> None:
    user_build.configure(arguments="stand-in=loop")
    with user_build.started() as process:
        user_build.wait_for_guest("still waiting")
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", str(user_build.pid())], check=True)
        assert process.wait(30) == 143
