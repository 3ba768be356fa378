"""Images that are tried out, ``--run`` and ``--test-boot``, in a machine that is none; a login is a shell here.

QEMU is a program that prints what a guest prints, and listens; overlay, seed and key are real.
"""

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from xml.etree import ElementTree

import pyte
import pytest

from ..conftest import PATIENCE, User, run, wait_for
from .test_terminal import Scene, modes, on_terminal

QEMU = """\
#!/usr/bin/python3 -I
import base64, json, os, pathlib, socket, sys, threading, time
here = pathlib.Path({here!r})
path = [word.partition("path=")[2] for word in sys.argv if word.startswith("pipe,")]
# As QEMU, which waits for nobody; a test boot has no monitor.
console, report, monitor = (os.fdopen(os.open(path[at] + ".out", os.O_RDWR), "wb", buffering=0) for at in (0, 1, -1))
typed, told = (os.fdopen(os.open(path[at] + ".in", os.O_RDWR), "rb", buffering=0) for at in (0, -1))
(here / "argv").write_text(json.dumps(sys.argv))
def is_there(name):
    return (here / name).exists()
def obey():
    for line in told:
        said = json.loads(line)["execute"]
        monitor.write(b'{{"return":{{}}}}\\n')
        if said == "system_powerdown":
            with (here / "off").open("a") as off:
                off.write("asked")
def listen():
    while True:
        data = typed.read(1)
        console.write(b"[" + data + b"]")
        if data == b"Q":
            (here / "off").touch()
def greet(server):
    while True:
        connection, _ = server.accept()
        connection.send(b"SSH-2.0-x\\r\\n")
        connection.close()
words = " ".join(sys.argv)
server = socket.create_server(("127.0.0.1", int(words.partition("hostfwd=tcp:127.0.0.1:")[2].partition("-")[0])))
for task, arguments in ((obey, ()), (listen, ()), (greet, (server,))):
    threading.Thread(target=task, args=arguments, daemon=True).start()
console.write(b"Welcome to \\x1b[1mNothing\\x1b[0m\\r\\n")
if is_there("says"):
    console.write((here / "says").read_bytes())
def encoded(data):
    return base64.b64encode(data).decode()
if is_there("report"):
    started, finished = (here / "report").read_bytes().splitlines()
    facts = {{
        "machine-id": encoded(os.urandom(16).hex().encode()),
        "host-keys": encoded(f"ssh-ed25519 {{encoded(os.urandom(51))}} root@host".encode()),
    }}
    report.write(started + b"\\n" + json.dumps(facts | json.loads(finished)).encode() + b"\\n")
while not is_there("off"):
    # More than a pipe takes.
    if is_there("flood"):
        console.write(b"x" * 500 + b"\\r\\n")
    time.sleep(0.02)
"""
SSH = """\
#!/bin/bash
printf '%s\\n' "$@" >{here}/ssh
cd {here}
for last; do :; done
exec sh -c "$last"
"""
FACTS = {
    "state": "running",
    "addresses": "2: ens3 inet 10.0.2.15/24 brd 10.0.2.255 scope global ens3\n",
    "routes": "default via 10.0.2.2 dev ens3\n",
    "root": "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda1 60000 10 50000 1% /\n",
    "sshd": "/usr/sbin/sshd\n",
}


class Place:
    """A directory of *user*'s with an image and a QEMU; *results* are the files that there may be beside."""

    results: tuple[str, ...] = ()

    def __init__(self, user: User, directory: Path) -> None:
        self.user = user
        self.directory = directory
        self.here = directory / "here"
        self.here.mkdir()
        programs = directory / "bin"
        programs.mkdir()
        for name, text in (("qemu-system-x86_64", QEMU), ("ssh", SSH)):
            (programs / name).write_text(text.format(here=str(self.here)))
            (programs / name).chmod(0o755)
        self.path = f"{programs}:/usr/bin:/bin"
        self.image = directory / "x.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", self.image, "64M")
        self.digest = self._digest()
        self.reports()
        for path in (directory, self.here, programs, self.image):
            shutil.chown(path, user.name)

    def _digest(self) -> str:
        return hashlib.sha256(self.image.read_bytes()).hexdigest()

    def reports(self, **facts: str) -> None:
        """Have the guest come up, and report *facts* besides those of a good one."""
        encoded = {name: base64.b64encode(text.encode()).decode() for name, text in (FACTS | facts).items()}
        line = json.dumps({"stage": "finished", **encoded})
        (self.here / "report").write_text(f'{{"stage":"started"}}\n{line}\n')

    def argv(
        self, *words: str | Path, what: str | Path | None = None, option: str = "--run", **environment: str
    ) -> list[str]:
        settings = ("--set", "virt-type=qemu", "--set", "test-boot-timeout=10m")
        more = {"PATH": self.path, "TERM": "vt100", "SHELL": "/bin/bash", **environment}
        argv = self.user.argv(self.user.program, option, what or self.image, *settings, *words, **more)
        return ["env", "-C", str(self.directory), *argv]

    def run(self, *words: str | Path, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        argv = self.argv(*words, **more)
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False)
        self.is_left_alone()
        return done

    def on_terminal(self, *words: str | Path) -> AbstractContextManager[Scene]:
        return on_terminal(self.argv(*words))

    def machines(self) -> list[str]:
        return run("pgrep", "-f", f"^/usr/bin/python3 -I {self.directory}", check=False).stdout.split()

    def is_left_alone(self) -> None:
        """See that nothing is left, and that the image is as it was."""
        wait_for(lambda: not self.machines(), "the machine's end", 10)
        assert self._digest() == self.digest
        # Those of other runs come and go.
        own = [path for path in Path("/var/tmp").glob(".image-factory-foreign.*") if path.owner() == self.user.name]
        assert self.user.is_root or not own
        assert {path.name for path in self.directory.iterdir()} <= {
            "bin", "here", "x.qcow2", "kept.qcow2", *self.results
        }  # fmt: skip


@pytest.fixture(params=["root", "c"])
def any_place(request: pytest.FixtureRequest, users: dict[str, User]) -> Iterator[Place]:
    yield from made(users[request.param], request.node.name)


@pytest.fixture
def place(request: pytest.FixtureRequest, users: dict[str, User]) -> Iterator[Place]:
    yield from made(users["c"], request.node.name)


def made(user: User, name: str) -> Iterator[Place]:
    directory = user.directory(re.sub(r"\W", "-", name)[:60])
    yield Place(user, directory)
    shutil.rmtree(directory)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall("^image-factory: (.*)$", done.stderr, re.MULTILINE)


def test_commands_from_stdin(any_place: Place) -> None:
    """They run in the guest, with stdout and status their own; the machine has a seed, a port and an overlay."""
    done = any_place.run(stdin="echo one; pwd\n")
    assert (done.returncode, done.stdout) == (0, f"one\n{any_place.here}\n"), done.stderr
    argv = (any_place.here / "ssh").read_text().splitlines()
    assert argv[0] == "-T" and "image-factory@127.0.0.1" in argv
    assert "-no-reboot" not in json.loads((any_place.here / "argv").read_text())
    done = any_place.run(stdin="exit 7\n")
    assert (done.returncode, errors(done)) == (7, ["error: The shell in the machine ended with status 7."])
    assert any_place.run(stdin="kill -9 $$\n").returncode == 137


def test_a_shell_on_a_terminal(any_place: Place) -> None:
    """It has the terminal for itself, with Ctrl-C; what it ends with is no failure."""
    with any_place.on_terminal("--quiet") as found:
        before = modes(found.terminal)
        found.read("This is a shell in x.qcow2")
        # What has the terminal by then is not the shell, which takes no line while it heeds Ctrl-C.
        found.type(b"sh -c 'echo $((6 * 7))-a; exec sleep 471112'\n")
        found.read("42-a")
        found.type(b"\x03")
        wait_for(lambda: run("pgrep", "-f", "sleep 47111[2]", check=False).returncode, "the end of sleep")
        found.type(b"echo $((6 * 8))-b; exit 9\n")
        found.read("48-b")
        assert found.process.wait(PATIENCE) == 0, found.text
        assert modes(found.terminal) == before
    assert "no job control" not in found.text
    any_place.is_left_alone()


def test_the_serial_console(any_place: Place) -> None:
    """What is typed goes to the guest key by key, Ctrl-C too, and what it prints is shown as it is."""
    screen = pyte.Screen(80, 24)
    stream = pyte.Stream(screen)
    with any_place.on_terminal("--quiet", "--console") as found:
        before = modes(found.terminal)
        found.read("Nothing")
        found.type(b"a\x03\x1a\r")
        found.read("[a][\x03][\x1a][\r]")
        found.type(b"\x1d")
        assert found.process.wait(PATIENCE) == 0, found.text
        found.rest()
        assert modes(found.terminal) == before
    stream.feed(found.text)
    shown = [line.rstrip() for line in screen.display if line.strip()]
    assert shown[0].startswith("This is the serial console of x.qcow2. Ctrl-] ends it")
    assert shown[1] == "Welcome to Nothing"
    assert screen.cursor.x == 0
    any_place.is_left_alone()
    assert not (any_place.here / "ssh").exists()


def test_the_guest_goes_off(place: Place) -> None:
    with place.on_terminal("--console") as found:
        found.read("Nothing")
        found.type(b"Q")
        assert found.process.wait(PATIENCE) == 0, found.text
    (place.here / "off").unlink()
    with place.on_terminal() as found:
        found.read("This is a shell")
        found.type(b"touch off; sleep 1; exit 255\n")
        assert found.process.wait(PATIENCE) == 0, found.text
        found.rest()
        assert "The machine has gone off." in found.text
    (place.here / "off").unlink()
    assert place.run(stdin="touch off; exit 255").returncode == 255


def test_the_machine_is_lost(place: Place) -> None:
    """The terminal is given back, and the reason told."""
    with place.on_terminal() as found:
        before = modes(found.terminal)
        found.read("This is a shell")
        found.type(b"echo here; stty raw; sleep 471113\n")
        found.read("here")
        for pid in place.machines():
            os.kill(int(pid), signal.SIGKILL)
        assert found.process.wait(PATIENCE) == 1
        found.rest()
        assert "error: The machine is lost: QEMU ended with status -9" in found.text
        assert modes(found.terminal) == before
    place.is_left_alone()


def test_a_guest_that_prints_without_end(place: Place) -> None:
    (place.here / "flood").touch()
    done = place.run("--quiet", stdin="sleep 3; echo done\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("report", "says", "reason"),
    [
        (None, b"Waiting for nothing\r\n", r"x.qcow2 did not come up: it did not start: within 2 s"),
        (None, b"Kernel panic - not syncing: x\r\n", "x.qcow2 did not come up: its kernel panicked: x"),
        ({"sshd": ""}, b"", "x.qcow2 came up, and nobody can log in: sshd is not installed"),
        ({"routes": ""}, b"", "x.qcow2 came up, and nobody can log in: it has no network: there is no default route"),
    ],
)
def test_no_shell_can_be_had(place: Place, report: dict[str, str] | None, says: bytes, reason: str) -> None:
    """The end of the console is shown, and the next move is it."""
    (place.here / "says").write_bytes(says)
    if report is None:
        (place.here / "report").unlink()
    else:
        place.reports(**report)
    # What has to come has all the time that it takes here.
    limit = ("--set", "test-boot-timeout=2s") if report is None else ()
    done = place.run("--keep-overlay", "kept.qcow2", *limit)
    error, hint = errors(done)
    assert (done.returncode, hint) == (1, "hint: --console gives its serial console, which takes no ssh.")
    assert error.startswith(f"error: {reason}")
    assert "console: Welcome to Nothing" in done.stderr
    assert not (place.directory / "kept.qcow2").exists()


def test_what_is_not_well_is_told(place: Place) -> None:
    place.reports(state="degraded", failed="a.service loaded failed failed A")
    done = place.run(stdin="echo in\n")
    assert (done.returncode, done.stdout) == (0, "in\n")
    assert "x.qcow2 is up, but a.service failed." in done.stderr


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("boot", signal.SIGINT),
        ("boot", signal.SIGTERM),
        ("shell", signal.SIGTERM),
        ("shell", signal.SIGHUP),
        ("console", signal.SIGTERM),
    ],
)
def test_signals(place: Place, moment: str, number: signal.Signals) -> None:
    """At each moment; on a terminal Ctrl-C is the shell's own, and the console's."""
    if moment == "boot":
        (place.here / "report").unlink()
    words = {"boot": (), "shell": (), "console": ("--console",)}[moment]
    with place.on_terminal("--verbose", *words) as found:
        before = modes(found.terminal)
        found.read({"boot": "Welcome", "shell": "This is a shell", "console": "Nothing"}[moment])
        if moment == "shell":
            found.type(b"echo $((6 * 7))-a; stty raw; sleep 471114\n")
            found.read("42-a")
        os.kill(place.user.build_process(), number)
        assert found.process.wait(PATIENCE) in (128 + number, -number), found.text
        found.rest()
        assert modes(found.terminal) == before
    assert f"Stopped by {number.name}" in found.text or number == signal.SIGINT
    place.is_left_alone()


def test_the_terminal_is_closed(place: Place) -> None:
    with place.on_terminal() as found:
        found.read("This is a shell")
        wait_for(lambda: (place.here / "ssh").exists(), "the shell")
        found.close()
        found.process.wait(PATIENCE)
    place.is_left_alone()


def test_ctrl_c_where_stdin_is_no_terminal(place: Place) -> None:
    process = subprocess.Popen(
        place.argv(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    with process:
        assert process.stdin and process.stdout
        process.stdin.write(b"echo in; sleep 471115\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"in\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(PATIENCE) in (130, -signal.SIGINT)
    place.is_left_alone()


def test_the_program_is_killed(place: Place) -> None:
    """Shell and machine end with it; the next one, or ``--cleanup``, removes what is left of files."""
    with place.on_terminal() as found:
        found.read("This is a shell")
        wait_for(lambda: (place.here / "ssh").exists(), "the shell")
        os.kill(place.user.build_process(), signal.SIGKILL)
        wait_for(lambda: not place.machines(), "the machine's end")
    run(*place.user.argv(place.user.program, "--cleanup"))
    place.is_left_alone()


def test_an_overlay_that_is_kept(any_place: Place) -> None:
    """It is on the image, and complete once the guest has gone off in good order."""
    place = any_place
    done = place.run("--keep-overlay", "kept.qcow2", stdin="true\n")
    assert done.returncode == 0, done.stderr
    assert (place.here / "off").read_text() == "asked"
    kept = place.directory / "kept.qcow2"
    assert kept.owner() == place.user.name
    found = json.loads(run("qemu-img", "info", "--output=json", kept).stdout)
    assert (found["full-backing-filename"], found["virtual-size"]) == (str(place.image), 128 << 20)
    done = place.run("--keep-overlay", "kept.qcow2")
    assert (done.returncode, errors(done)[0]) == (2, "error: --keep-overlay: kept.qcow2 is there already.")
    (place.here / "off").unlink()
    # What is in the overlay is booted as any image is: its own overlay is thrown away.
    run("qemu-img", "rebase", "-u", "-b", "", kept)
    assert place.run(what=kept, stdin="echo again\n").stdout == "again\n"


def test_an_overlay_of_what_was_packed_is_whole(place: Place) -> None:
    run("gzip", "--keep", place.image)
    packed = place.image.with_name("x.qcow2.gz")
    shutil.chown(packed, place.user.name)
    argv = place.argv("--keep-overlay", "kept.qcow2", what=packed)
    done = subprocess.run(argv, input="true\n", capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    packed.unlink()
    found = json.loads(run("qemu-img", "info", "--output=json", place.directory / "kept.qcow2").stdout)
    assert "backing-filename" not in found
    place.is_left_alone()


def test_the_newest_build_of_a_section(place: Place) -> None:
    configuration = place.directory / "here/image-factory.conf"
    configuration.write_text("[web]\nsource = image\nsource-image = /none\nram = 512M\n[db]\nbased-on = web\n")
    out = place.here / "out"
    out.mkdir()
    shutil.chown(out, place.user.name)
    for name in ("web-2026-01-02.qcow2", "web-2026-03-04.qcow2", "web-2026-03-04.raw.gz", "web-2-2026-05-06.qcow2"):
        shutil.copy(place.image, out / name)
        shutil.chown(out / name, place.user.name)
    given = {"IMAGE_FACTORY_CONFIG": str(configuration)}
    done = place.run("-o", out, what="web", stdin="echo up\n", **given)
    assert (done.returncode, done.stdout) == (0, "up\n"), done.stderr
    argv = json.loads((place.here / "argv").read_text())
    assert argv[argv.index("-m") + 1] == "512"
    assert f"-b {out}/web-2026-03-04.qcow2 " in done.stderr
    done = place.run("-o", out, what="db", **given)
    assert (done.returncode, errors(done)[0]) == (2, f"error: {out} has no build of db that can be booted.")
    done = place.run("-o", out, what="nosuch", **given)
    assert (done.returncode, errors(done)[0]) == (2, f"error: No image 'nosuch' is configured in {configuration}.")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--console",), "--console needs a terminal."),
        (("--keep-overlay", "nowhere/x"), "--keep-overlay: "),
        (("--json", "x.json"), "--json is the record of a build, --run makes none."),
        (("--set", "arch=riscv64"), ""),
        (("--resume",), "--resume and --run do not go together."),
        (("Debian-13",), "--run names the image itself."),
    ],
)
def test_what_is_refused(place: Place, words: tuple[str, ...], error: str) -> None:
    done = place.run(*words)
    assert done.returncode == 2
    assert errors(done)[0].startswith(f"error: {error}")
    assert not (place.here / "argv").exists()


def test_no_image(place: Place) -> None:
    (place.here / "text").write_text("nothing\n")
    done = place.run(what=place.here / "text")
    assert done.returncode == 2
    assert "is no disk image" in errors(done)[0]
    done = place.run(what=place.here / "none")
    assert done.returncode == 2
    assert shlex.quote(str(place.here / "none")) in errors(done)[0]


def test_a_test_boot(any_place: Place) -> None:
    """Two boots with all checks, told on stdout, as JUnit and as JSON; the image is only read."""
    place = any_place
    place.results = ("x.qcow2.junit.xml", "record.json")
    done = place.run("--json", "record.json", option="--test-boot")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.partition(",")[0] for line in said if not line.startswith(" ")] == ["x.qcow2", "x.qcow2"]
    for name in ("boot", "network", "machine-id-new", "host-keys-new", "login"):
        assert f"  passed   {name}" in said
    assert "  skipped  cloud-init: it is not installed" in said
    cases = ElementTree.parse(place.directory / "x.qcow2.junit.xml").iter("testcase")
    names = {(case.get("classname"), case.get("name")) for case in cases}
    assert {("x.qcow2.1-bios", "login"), ("x.qcow2.2-bios", "host-keys-new")} <= names
    record = json.loads((place.directory / "record.json").read_text())
    assert [(boot["artifact"], boot["firmware"]) for boot in record["test_boots"]] == [("x.qcow2", "bios")] * 2


def test_a_test_boot_that_fails(place: Place) -> None:
    place.results = ("x.qcow2.junit.xml",)
    place.reports(state="degraded", failed="a.service loaded failed failed A")
    script = place.here / "script"
    script.write_text("#!/bin/sh\necho hello; exit 3\n")
    done = place.run("--set", f"test-script={script}", "--set", "firmware=uefi", option="--test-boot")
    assert done.returncode == 1
    assert "x.qcow2, boot 1 with uefi" in done.stdout
    assert "  failed   units: a.service failed\n" in done.stdout
    reason = "a.service failed; script failed with status 3: hello"
    assert errors(done)[0] == f"error: x.qcow2 failed its test boot with uefi: {reason}."
    assert errors(done)[1].startswith("hint: All results are in ") and "uefi" not in errors(done)[1]
    (place.here / "report").unlink()
    done = place.run("--set", "test-boot-timeout=2s", option="--test-boot")
    assert done.returncode == 1
    assert "  failed   boot: it did not start" in done.stdout
    assert "--set firmware=uefi boots it with UEFI" in errors(done)[1]


def test_a_tar_that_is_no_system(place: Place) -> None:
    """What it lacks is a result, which is written where it is to be; of another distribution it is not tried."""
    tar = place.here / "x.tar"
    run("tar", "-C", place.directory, "-cf", tar, "bin", "x.qcow2")
    shutil.chown(tar, place.user.name)
    done = place.run("-o", place.here / "out", option="--test-boot", what=tar)
    assert done.returncode == 1
    reason = "x.tar is no system of Debian's or Ubuntu's packages, whose boot loader can be installed here"
    assert errors(done)[0] == f"error: {reason}."
    assert f"  failed   laid: {reason}\n" in done.stdout
    [case] = ElementTree.parse(place.here / "out/x.tar.junit.xml").iter("testcase")
    assert case.get("name") == "laid"
    done = place.run("--set", "distribution=Fedora", option="--test-boot", what=tar)
    assert done.returncode == 2
    assert errors(done)[0].startswith(f"error: {tar} is a tar, and is not laid on a disk: only a boot loader of ")


def test_a_test_boot_is_ended(place: Place) -> None:
    (place.here / "report").unlink()
    with on_terminal(place.argv("--verbose", option="--test-boot")) as found:
        found.read("Welcome")
        os.kill(place.user.build_process(), signal.SIGTERM)
        assert found.process.wait(PATIENCE) in (143, -signal.SIGTERM), found.text
    place.is_left_alone()
