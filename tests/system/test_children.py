"""No child of image-factory stays a zombie, and the status of each program is known, whatever its parent is."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ..conftest import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]

HEAD = f"""
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from image_factory.base import command, interrupts
from image_factory.base.command.children import Children
from image_factory.base.errors import BuildError

def zombies():
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = path.read_text().rpartition(")")[::2]
        except OSError:
            continue
        if fields.split()[:2] == ["Z", str(os.getpid())]:
            found.append(name)
    return found

def wait_until_all_have_ended():
    deadline = time.monotonic() + {PATIENCE}
    while time.monotonic() < deadline and zombies() + children():
        time.sleep(0.02)
    return zombies() + children()

def children():
    return Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
"""


def run(program: str, *before: str) -> subprocess.CompletedProcess[str]:
    argv = [*before, sys.executable, "-c", HEAD + textwrap.dedent(program)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE)


def test_programs_that_are_asked_are_gone_before_their_answer_is_taken() -> None:
    """A record asks all programs for their versions at the beginning, and takes the answers at the end."""
    program = """
        with command.reaping():
            queries = [command.Query(["echo", str(number)]) for number in range(20)]
            print(wait_until_all_have_ended())
            print([query.answer(0.0) for query in queries] == [f"{number}\\n" for number in range(20)])
            print(Children.own, Children.unattended)
    """
    assert run(program).stdout == "[]\nTrue\nset() []\n"


def test_status_is_known_where_the_parent_has_left_sigchld_ignored() -> None:
    """Python would say that each program succeeds; and programs would inherit it."""
    program = """
        with command.reaping():
            try:
                command.run(["false"])
            except BuildError as error:
                print(error.message)
            try:
                command.call_apart(os._exit, 3, 60)
            except BuildError as error:
                print(error.message)
            ignored = int(command.run(["grep", "SigIgn", "/proc/self/status"], capture=True).split()[1], 16)
            print(bool(ignored & 1 << signal.SIGCHLD - 1))
        print(signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN)
    """
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    done = run(program, sys.executable, "-c", ignoring)
    assert done.stdout == "false failed with status 1\nfailed with status 3\nFalse\nTrue\n", done.stderr


ORPHANS = """
    with command.reaping():
        for number in range(5):
            # Its children are left when it ends, one before and one after that.
            command.run(["sh", "-c", "setsid sleep 0 & setsid sleep 0.3 &"])
        print(wait_until_all_have_ended())
        # Whoever's children come and go meanwhile, its own are not taken from it.
        for number in range(30):
            try:
                command.run(["sh", "-c", "(exit 0 & ) ; exit 7"])
            except BuildError as error:
                assert error.status == 7, error.message
            assert command.run(["echo", "x"], capture=True) == "x\\n"
        print(wait_until_all_have_ended())
"""


def test_first_process_of_a_container() -> None:
    """The orphans of the container are its children: daemons such as gpg-agent, and what programs leave."""
    done = run(ORPHANS, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    assert done.stdout == "[]\n[]\n", done.stderr


def test_subreaper() -> None:
    """A supervisor may have made it one, which it stays when image-factory is executed in its place."""
    before = "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    done = run(ORPHANS, sys.executable, "-c", before)
    assert done.stdout == "[]\n[]\n", done.stderr


def test_children_of_others_in_this_process_are_left_alone() -> None:
    """Where orphans have another parent, what image-factory has not started is a library's."""
    program = """
        with command.reaping():
            other = subprocess.Popen(["sh", "-c", "exit 9"])
            command.run(["sleep", "0.2"])
            print(other.wait())
    """
    assert run(program).stdout == "9\n"


@pytest.mark.parametrize("how", ["run", "read_until", "background", "conversation", "call_apart", "companion"])
def test_each_way_to_start_a_process_waits_for_it(how: str) -> None:
    program = f"""
        def run():
            command.run(["true"])
        def read_until():
            command.read_until(["sh", "-c", "echo a; sleep 60"], b"a", 60)
        def background():
            with command.background(["sleep", "60"], Path("/dev/null")):
                pass
        def conversation():
            with command.conversation(["sh"], env=dict(os.environ), timeout=60, stop_seconds=10) as talk:
                talk.ask(":")
        def call_apart():
            command.call_apart(len, "abc", 60)
        def companion():
            companion = command.Companion(lambda send: command.Query(["sleep", "60"]), lambda *_: None, [])
            companion.send(signal.SIGKILL)
            companion.close()
        with command.reaping():
            {how}()
            print(zombies(), children(), Children.own)
    """
    assert run(program).stdout == "[] [] set()\n"
