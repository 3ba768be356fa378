"""Faults at every step of a build: whatever strikes, nothing is left behind and what is said is right.

The steps up to the installation are those of a real build; the installation itself is a copy of a
disk that the stand-in installer has written once (see tests/faults/wrapper), but for the few cells of
REAL.  Where the step comes after it, the build goes on from what one that stopped there has left.  The
cells are those of fault_table.py.  The table is shown at the end, and written to the file that $FAULT_TABLE names.
"""

import contextlib
import hashlib
import http.server
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path

import pytest

from image_factory import outputs
from image_factory.downloads import fetch

from ..conftest import PATIENCE, REPOSITORY, TODAY, User, left_behind, machine_state, run, wait_for
from ..fault_table import (
    ALL,
    BOOTSTRAP,
    CHECKED,
    ELEMENTS,
    EVENTS,
    FORMATS,
    GUEST,
    IMAGE,
    KILLED,
    LOCKS,
    ORDER,
    OUTPUTS,
    PROGRAMS,
    SIGNALS,
    STALE,
    Cell,
)
from .test_build import ANSWERS, WORK, new_build

pytestmark = pytest.mark.usefixtures("machine")

FAULTS = REPOSITORY / "tests/faults"
# Where a build goes on whose fault strikes at a later step: what --until calls it, and the steps.
BEGINS = {
    "install": ("read", "mount", "remove", "seal", "copy", "free", "unmount", "zero"),
    "clean": ("convert", "checksum", *OUTPUTS),
    "convert": ("reopen", "publish"),
    "publish": ("upload", "post-build"),
}

# The last one has the durations of builds that have come to their end.
CACHED = {"linux", "initrd.gz", ".linux.validators", ".initrd.gz.validators", ".durations.json", ".lock"}

TABLE: dict[Cell, str] = {}


def shown_table() -> str:
    """Return how many cells have survived of those that were tried, step by fault."""
    lines = []
    installed = {cell.step for cell in ALL} - BOOTSTRAP.keys() - GUEST.keys() - ELEMENTS.keys()
    for title, users, chosen in (
        ("Mounted on this machine, as root and as an ordinary user", ("root", "a"), installed),
        ("Mounted in libguestfs' appliance, as a user who may run nothing as root", ("c",), installed),
        ("Bootstrapped, as root and as a user who may run nothing as root", ("root", "c"), BOOTSTRAP),
        ("Tasks in a guest", ("root",), GUEST),
        ("Elements, as root and as a user who may run nothing as root", ("root", "c"), ELEMENTS),
    ):
        table = {cell: result for cell, result in TABLE.items() if cell.user in users and cell.step in chosen}
        steps = [step for step in ("start", *ORDER) if any(cell.step == step for cell in table)]
        faults = list(dict.fromkeys(cell.fault for cell in ALL if cell in table))
        if not table:
            continue
        lines += [f"{title}: survived/tried", "", " ".join([" " * 20, *(step.rjust(5) for step in steps)])]
        for fault in faults:
            words = [fault.ljust(20)]
            for step in steps:
                results = [table[cell] for cell in table if (cell.step, cell.fault) == (step, fault)]
                shown = f"{results.count('survived')}/{len(results)}" if results else "-"
                words.append(shown.rjust(max(5, len(step))))
            lines.append(" ".join(words))
        lines.append("")
    return "\n".join([*lines, f"{len(TABLE)} cells, {list(TABLE.values()).count('survived')} survived", ""])


@pytest.fixture(scope="session")
def installed(users: dict[str, User], stand_in: Path) -> Path:
    """A disk that the stand-in has been installed on."""
    user = users["a"]
    directory = user.directory("installed")
    (directory / "answers.cfg").write_text(ANSWERS)
    (directory / "image-factory.conf").write_text(
        f"[stand-in]\nlinux = {stand_in}/linux\ninitrd = {stand_in}/initrd.gz\npreseed = {directory}/answers.cfg\n"
        "append = console=ttyS0 no_timer_check\nimage-size = 128M\nram = 512M\nvirt-type = qemu\nmax-parallel = none\n"
    )
    configuration = str(directory / "image-factory.conf")
    run(*user.argv(user.program, "stand-in", IMAGE_FACTORY_CONFIG=configuration), cwd=directory)
    return directory / f"stand-in-{TODAY}.raw"


@pytest.fixture(scope="session")
def faulty_prefix(base: Path, prefix: Path) -> Path:
    """The program with root's helper wrapped, as that is run by its path."""
    directory = base / "faulty"
    shutil.copytree(prefix, directory)
    helper = directory / "bin/image-factory-sudo-helper"
    helper.rename(f"{helper}.real")
    shutil.copy(FAULTS / "wrapper", helper)
    return directory


@pytest.fixture(scope="session")
def clock(base: Path) -> Path:
    """The library that sets the clock back."""
    library = base / "clock.so"
    run("gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", library, FAULTS / "clock.c")
    return library


class Place:
    """A directory to build in, with a fault to strike."""

    def __init__(self, user: User, directory: Path, stand_in: Path, installed: Path, faulty: Path) -> None:
        self.user, self.directory = user, directory
        self.before = set(machine_state())
        self.out, self.faults, self.programs = (directory / name for name in ("out", "faults", "bin"))
        self.cache = directory / "cache"
        self.words: tuple[str, ...] = ()
        self.formats: tuple[str, ...] = ("qcow2",)
        for path in (self.out, self.faults, self.programs, directory / "up"):
            path.mkdir()
            shutil.chown(path, user.name)
        self.helper = faulty / "bin/image-factory-sudo-helper"
        self.program = faulty / "bin/image-factory" if user.is_root else user.program
        for name in (
            "qemu-img",
            "rsync",
            "virt-install",
            "virsh",
            "zerofree",
            "blkid",
            "notify",
            "sudo",
            "zstd",
            "tar",
            "tar2sqfs",
        ):
            (self.programs / name).symlink_to(FAULTS / "wrapper")
        self.environment = {
            "HOME": str(user.home),
            "USER": user.name,
            "LANG": "C.UTF-8",
            "TZ": os.environ["TZ"],
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "PYTHONPATH": str(FAULTS),
            "PYTHONDONTWRITEBYTECODE": "1",
            "IMAGE_FACTORY_CONFIG": str(directory / "image-factory.conf"),
            "FAULTS": str(self.faults),
            "FULL": str(self.out),
            "INSTALLED": str(installed),
            "STAND_IN": str(stand_in),
            "URI": user.libvirt_uri,
            "XDG_RUNTIME_DIR": "",
        }
        (directory / "answers.cfg").write_text(ANSWERS)
        self.configure()
        self.older = self.out / IMAGE
        self.older.write_text("older")
        shutil.chown(self.older, user.name)

    def configure(self, netboot: str = "rsync://stand-in", arguments: str = "") -> None:
        (self.directory / "image-factory.conf").write_text(
            f"""
[stand-in]
linux = {netboot}/linux
initrd = {netboot}/initrd.gz
preseed = {self.directory}/answers.cfg
append = console=ttyS0 no_timer_check {arguments}
cache-dir = {self.cache}
image-size = 128M
ram = 512M
virt-type = qemu
max-parallel = none
format = {", ".join(self.formats)}
seal = yes
copy = /etc/debian_version:/etc/own/
audit = yes
upload_destinations = up
post-build-command = notify
[up]
upload_type = rsync
upload_target = {self.directory}/up/
"""
        )
        shutil.chown(self.directory, self.user.name)

    def start(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        """Start the program, as the very process that is returned."""
        variables = self.environment | environment
        ids = [f"--reuid={self.user.name}", f"--regid={pwd.getpwnam(self.user.name).pw_gid}", "--init-groups"]
        return subprocess.Popen(
            ["setpriv", *ids, "env", "-i", *(f"{key}={value}" for key, value in variables.items() if value),
             str(self.program), *(words or ("stand-in",))],
            cwd=self.out, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip

    def begin_at(self, checkpoint: Path) -> None:
        """Have the first build go on from *checkpoint*, the copy of another place."""
        run("cp", "--archive", "--sparse=always", "--no-target-directory", checkpoint / "out", self.out)
        shutil.chown(self.out, self.user.name)
        run("cp", "--archive", "--no-target-directory", checkpoint / "cache", self.cache)
        file = self.out / WORK / "checkpoint.json"
        origin = (checkpoint / "origin").read_text()
        # The owner stays.
        file.write_text(file.read_text().replace(f"{origin}/", f"{self.directory}/"))
        self.words = ("--resume", "stand-in")

    def disarm(self) -> None:
        for path in self.faults.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        for away in [*self.programs.glob("*.away"), *self.helper.parent.glob("*.away")]:
            away.rename(away.with_suffix(""))
        (self.out / "filler").unlink(missing_ok=True)


class Checkpoints:
    """What builds without a fault have left that stopped early, made when it is asked for."""

    def __init__(self, stand_in: Path, installed: Path, faulty: Path) -> None:
        self._files = stand_in, installed, faulty
        self._places: dict[str, Place] = {}

    def get(self, user: User, until: str) -> Path:
        """Return the copy of what a build of *user* has left that stopped after *until*."""
        if user.name not in self._places:
            self._places[user.name] = Place(user, user.directory("checkpoints"), *self._files)
        place = self._places[user.name]
        copy = place.directory / until
        if not copy.exists():
            earlier = list(BEGINS)[: list(BEGINS).index(until)]
            if earlier:
                self.get(user, earlier[-1])
            resume = ("--resume",) if earlier else ()
            process = place.start(*resume, "--until", until, "stand-in")
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            copy.mkdir()
            for path in (place.out, place.cache):
                run("cp", "--archive", "--sparse=always", path, copy)
            (copy / "origin").write_text(str(place.directory))
        return copy


@pytest.fixture(scope="session")
def checkpoints(users: dict[str, User], stand_in: Path, installed: Path, faulty_prefix: Path) -> Checkpoints:
    return Checkpoints(stand_in, installed, faulty_prefix)


@pytest.fixture
def place(
    request: pytest.FixtureRequest,
    users: dict[str, User],
    stand_in: Path,
    installed: Path,
    faulty_prefix: Path,
    clock: Path,
    checkpoints: Checkpoints,
) -> Iterator[Place]:
    cell: Cell = request.param
    user = users[cell.user]
    for build in new_build(user, request, stand_in):
        found = Place(user, build.directory, stand_in, installed, faulty_prefix)
        if cell.fault == "clock-back":
            found.environment["LD_PRELOAD"] = str(clock)
        if cell.fault == "full":
            run("mount", "-t", "tmpfs", "-o", f"size=300m,mode=755,uid={user.uid}", "tmpfs", found.out)
            found.older.write_text("older")
            shutil.chown(found.older, user.name)
        if cell.step in OUTPUTS:
            found.formats = FORMATS
            found.configure()
        for until, steps in BEGINS.items():
            if cell.step in steps:
                found.begin_at(checkpoints.get(user, until))
        try:
            yield found
        finally:
            found.disarm()
            if cell.fault == "full":
                run("umount", found.out)


def drop_what_can_be_resumed(place: Place) -> None:
    """Have it removed; there is nothing beside it."""
    work = place.out / WORK
    if (work / "checkpoint.json").is_file():
        kept = json.loads((work / "checkpoint.json").read_text())["kept"]
        assert {path.name for path in work.iterdir()} <= set(kept)
        process = place.start("--cleanup")
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors


def leftovers(place: Place) -> list[str]:
    """Return what the build has left, but for what can be resumed, which is removed."""
    drop_what_can_be_resumed(place)
    return what_is_there(place)


def what_is_there(place: Place) -> list[str]:
    """Return what the build has or has left."""
    left = left_behind(place.user, place.directory)
    left += sorted(set(machine_state()) - place.before)
    cache = place.cache / "stand-in"
    if cache.is_dir():
        left += [f"cache {path}" for path in cache.iterdir() if path.name not in CACHED]
    processes = run("ps", "-u", place.user.name, "-o", "args").stdout.splitlines()
    left += [f"process {line}" for line in processes if line == "sleep 600"]
    return left


def check_files(place: Place, *, published: bool) -> None:
    """What has a final name is whole."""
    names = {path.name for path in place.out.iterdir()} - {f"stand-in-{TODAY}.console.log", "filler", place.cache.name}
    if not published:
        assert names == {IMAGE}
        assert place.older.read_text() == "older"
        return
    images = [IMAGE.replace("qcow2", outputs.OUTPUTS[name].suffix) for name in place.formats]
    assert names == {*images, *(f"{image}.sha256sum" for image in images)}
    run("sha256sum", "--check", "--strict", *(f"{image}.sha256sum" for image in images), cwd=place.out)


def arm(place: Place, cell: Cell) -> None:
    """Have the fault of *cell* strike."""
    if cell.step in PROGRAMS:
        _, call = PROGRAMS[cell.step]
        if cell.fault == "missing":
            pattern = call if call[0] == "*" else f"*/{call}"
            write(place.faults / "hook", f"subprocess.Popen\n{pattern}*\nmissing\n")
        else:
            write(place.faults / "call", call)
            write(place.faults / "fault", cell.fault)
    else:
        _, event, pattern = EVENTS[cell.step]
        write(place.faults / "hook", f"{event}\n{pattern}\n{cell.fault}\n")


def write(path: Path, text: str) -> None:
    path.write_text(text)


def second_build(place: Place) -> None:
    wait_for((place.faults / "reached").exists, "the first build")
    second = place.start()
    _, errors = second.communicate(timeout=PATIENCE)
    assert second.returncode == 2
    assert f"Another build of stand-in is under way in {place.out}." in errors
    write(place.faults / "go", "")


def recover(place: Place, cell: Cell) -> bool:
    """Clean up after a build that could not do so itself: with --cleanup, or the next build.

    Returns whether that was the same build, gone on with to its end.
    """
    place.disarm()
    if (place.out / WORK / "checkpoint.json").is_file() and hash_of(cell) % 3 == 0:
        # What was killed can be gone on with, wherever it was.
        _, errors = (process := place.start("--resume", "stand-in")).communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        assert "INFO: Installing ..." not in errors
        return True
    if hash_of(cell) % 2:
        process = place.start("--cleanup")
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
        assert all(re.match("(virtual machine|mount|directory) ", line) for line in output.splitlines())
        # The cache belongs to the next build of the image.
        for path in place.cache.glob("*/.*"):
            path.unlink()
        return False
    # A build that ends before its end is enough.
    write(place.faults / "call", "qemu-img convert*")
    write(place.faults / "fault", "fails-always")
    process = place.start()
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, errors
    assert re.search("(Converting to|Making) qcow2.*: failed", errors), errors
    return False


def hash_of(cell: Cell) -> int:
    return ["cache-http", *PROGRAMS, *EVENTS, "start"].index(cell.step) + len(cell.fault)


def expected_status(cell: Cell) -> set[int]:
    if cell.fault in KILLED:
        return {-9}
    if cell.fault.startswith("signal-"):
        return {SIGNALS[cell.fault.removeprefix("signal-")]}
    if cell.fault == "hangs":
        return {143}
    if cell.fault in ("second", "clock-back"):
        return {0}
    if cell.fault == "breaks":
        return {0}
    # An umount that fails once is tried again.
    if cell.step == "unmount" and cell.fault in ("fails", "killed-child"):
        return {0}
    # The wrapped sudo is gone, the real one is found then.
    if cell.step == "unmount" and cell.fault == "missing" and cell.user != "root":
        return {0}
    # Not all that follows needs space, or a descriptor.
    if cell.fault == "full" or (cell.fault, cell.step) == ("descriptors", "post-build"):
        return {0, 1}
    return {1}


@pytest.mark.parametrize(
    ("place", "cell"),
    [
        pytest.param(cell, cell, id=str(cell), marks=[] if cell in CHECKED else [pytest.mark.slow_faults])
        for cell in ALL
        if cell.step in [*PROGRAMS, *EVENTS] and not cell.real
    ],
    indirect=["place"],
)
def test_fault(place: Place, cell: Cell) -> None:
    TABLE[cell] = "failed"
    arm(place, cell)
    process = place.start(*place.words)
    try:
        if cell.fault == "hangs":
            wait_for(lambda: (place.faults / "reached").exists() or process.poll() is not None, "the fault")
            process.terminate()
        if cell.fault == "second":
            second_build(place)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (place.faults / "struck").is_dir() or cell.fault == "fails-always", errors
    assert process.returncode in expected_status(cell), errors
    named = PROGRAMS[cell.step][0] if cell.step in PROGRAMS else EVENTS[cell.step][0]
    if process.returncode > 0:
        check_words(cell, errors, named)
    if cell.fault == "clock-back":
        yesterday = (date.fromisoformat(TODAY) - timedelta(days=1)).isoformat()
        assert re.search(rf"^{TODAY} .*\n{yesterday} ", errors, re.MULTILINE), errors
        assert re.search(rf"^{yesterday} .* INFO: {re.escape(named)}: done in [0-9]\.", errors, re.MULTILINE), errors
    assert not place.words or "INFO: Installing ..." not in errors, errors
    published = "INFO: Publishing: done" in errors or cell.step in BEGINS["publish"]
    if cell.fault not in ("full", "descriptors"):
        # A signal does not disturb the publishing itself.
        signalled = cell.step == "publish" and cell.fault in ("signal-INT", "signal-TERM", "signal-HUP")
        assert published == (cell.step in ("upload", "post-build") or process.returncode == 0 or signalled), errors
    calls_helper = cell.step in ("remove", "seal", "copy", "free", "unmount")
    helper_gone = place.user.is_root and cell.fault == "missing" and calls_helper
    if process.returncode < 0 or cell.fault in ("descriptors", "fails-always") or helper_gone:
        published = recover(place, cell) or published
    assert leftovers(place) == [], errors
    check_files(place, published=published)
    TABLE[cell] = "survived"


def check_words(cell: Cell, errors: str, named: str) -> None:
    """The step is told, and the reason in one line, perhaps with a hint."""
    lines = errors.splitlines()
    said = [line for line in lines if line.startswith("image-factory: ")]
    assert lines[-len(said) :] == said, errors
    assert said[0].startswith("image-factory: error: ") and len(said) <= 2, errors
    assert all(line.startswith("image-factory: hint: ") for line in said[1:])
    assert "Internal error" not in said[0], errors
    assert "Traceback" not in errors
    if cell.fault in ("fails", "fails-always", "killed-child", "missing", "hangs") or cell.fault.startswith("signal-"):
        reasons = {
            "missing": "Can't run ", "killed-child": "was killed by SIGKILL", "hangs": "Stopped by SIGTERM",
            "fails": "injected", "fails-always": "injected",
        }  # fmt: skip
        if cell.step in EVENTS:
            reasons["fails"] = "Input/output error"
        assert reasons.get(cell.fault, f"Stopped by SIG{cell.fault.removeprefix('signal-')}.") in said[0], errors
    # A directory that can't be read for its removal is no step.
    is_told = cell.fault == "descriptors" and "Too many open files" in said[0]
    if not is_told and (cell.step != "publish" or not cell.fault.startswith("signal-")):
        assert re.search(r" INFO: .*: failed after [0-9.]+ s$", errors, re.MULTILINE), errors
    if cell.fault in ("fails", "killed-child", "missing", "hangs"):
        assert f"{named}: failed after" in errors, errors


def machines_of(place: Place) -> list[str]:
    lines = run("ps", "-eo", "args").stdout.splitlines()
    return [line for line in lines if "qemu-system" in line and f"{place.directory}/" in line]


def kill_libvirt(user: User, *, gone: bool) -> None:
    """Kill the user's libvirtd, which comes back by itself unless it is *gone*: as under systemd, or a session's."""
    run("pkill", "-KILL", "-x", "-u", user.name, "libvirtd")
    if user.is_root and not gone:
        bring_libvirt_back(user)


def bring_libvirt_back(user: User) -> None:
    def answers() -> bool:
        # The one that was killed may take a moment to end.
        if user.is_root and run("pgrep", "-x", "-u", "root", "libvirtd", check=False).returncode:
            run("libvirtd", "-d")
        return user.run("virsh", "--connect", user.libvirt_uri, "uri", check=False).returncode == 0

    wait_for(answers, "libvirt to come back")


def strike_installation(place: Place, fault: str, process: "subprocess.Popen[str]") -> None:
    if fault.startswith("libvirt-"):
        kill_libvirt(place.user, gone=fault == "libvirt-gone")
        return
    if fault.startswith("signal-"):
        process.send_signal(getattr(signal, f"SIG{fault.removeprefix('signal-')}"))
        return
    program = {"killed-child": "/virt-install ", "killed-machine": "qemu-system"}[fault]
    lines = run("ps", "-eo", "pid,args").stdout.splitlines()
    found = [line.split()[0] for line in lines if program in line and f"{place.directory}/" in line]
    assert found
    run("kill", "-KILL", *found)


@pytest.mark.parametrize(
    ("place", "cell"),
    [
        pytest.param(cell, cell, id=str(cell), marks=[] if cell in CHECKED else [pytest.mark.slow_faults])
        for cell in ALL
        if cell.real
    ],
    indirect=["place"],
)
def test_fault_of_the_installation(place: Place, cell: Cell) -> None:
    TABLE[cell] = "failed"
    place.configure(arguments="stand-in=hang")
    console = place.out / ".image-factory-stand-in/console.log"
    gone = cell.fault == "libvirt-gone"
    bring_libvirt_back(place.user)
    # Else a session's libvirt starts by itself.
    process = place.start(REAL_INSTALLATION="yes", LIBVIRT_AUTOSTART="0" if gone else "1")
    try:
        wait_for(lambda: console.is_file() and "stand-in: " in console.read_text(errors="replace"), "the guest")
        strike_installation(place, cell.fault, process)
        _, errors = process.communicate(timeout=PATIENCE)
        machines = machines_of(place)
    finally:
        process.kill()
        bring_libvirt_back(place.user)
    if cell.fault == "killed-machine":
        assert "did not power off by itself: shut off (crashed)." in errors
    elif process.returncode > 0:
        check_words(cell, errors, "Installing")
    assert process.returncode in expected_status(cell), errors
    if cell.fault.startswith("libvirt-"):
        assert f"error: libvirt at {place.user.libvirt_uri} went away during the installation: " in errors
        assert machines == []
    # systemd may have started it again at once.
    left = gone and "tries again to remove what is left" in errors
    if left:
        assert re.search(
            r"ERROR: The virtual machine .* can't be removed from .*; its QEMU was killed\.$", errors, re.M
        )
    if process.returncode < 0 or left:
        recover(place, cell)
    assert leftovers(place) == [], errors
    check_files(place, published=False)
    TABLE[cell] = "survived"


class Mirror(http.server.ThreadingHTTPServer):
    """A server of files, in parts, whose first answer with the second part of ``initrd.gz`` stops in its middle."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.files = files
        self.reached, self.go = threading.Event(), threading.Event()
        self.fault = ""
        self.asked: list[int] = []


class MirrorHandler(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        content = self.server.files[self.path]
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.headers["If-None-Match"] == tag:
            self.send_response(304)
            self.end_headers()
            return
        start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.server.asked.append(start)
        part = content[start : end + 1]
        self.send_response(206)
        self.send_header("ETag", tag)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        # The reader may be killed.
        with contextlib.suppress(ConnectionError):
            other = self.path != "/initrd.gz" or start == 0
            if other or (self.server.fault != "breaks-always" and self.server.reached.is_set()):
                self.wfile.write(part)
                return
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.server.reached.set()
            if not self.server.fault.startswith("breaks"):
                self.server.go.wait(60)
                self.wfile.write(part[len(part) // 2 :])

    def log_request(self, code: object = "-", size: object = "-") -> None:
        pass


@pytest.fixture(scope="session")
def netboot_files(stand_in: Path) -> dict[str, bytes]:
    # Large enough for two parts.
    size = fetch._PART_SIZE + (4 << 20)
    return {
        "/linux": (stand_in / "linux").read_bytes(),
        "/initrd.gz": (stand_in / "initrd.gz").read_bytes().ljust(size, b"\0"),
    }


@contextmanager
def mirror(files: dict[str, bytes]) -> Iterator[Mirror]:
    with Mirror(files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.go.set()
            server.shutdown()
            thread.join()


def check_cache(place: Place, files: dict[str, bytes], names: set[str]) -> None:
    """What the cache has under its final name is whole."""
    found = {f"/{path.name}" for path in (place.cache / "stand-in").glob("[!.]*")}
    assert found >= names
    for name in found:
        assert (place.cache / "stand-in" / name[1:]).read_bytes() == files[name]


def strike_download(place: Place, fault: str, process: "subprocess.Popen[str]") -> None:
    if fault.startswith("signal-"):
        process.send_signal(getattr(signal, f"SIG{fault.removeprefix('signal-')}"))
        process.wait(30)
    elif fault == "killed-group":
        os.killpg(process.pid, signal.SIGKILL)
    elif fault == "full":
        place.user.run("sh", "-c", "cat /dev/zero >filler", cwd=place.out, check=False)
    elif fault == "descriptors":
        place.user.run("prlimit", "--pid", str(process.pid), "--nofile=5:5")
    elif fault == "clock-back":
        write(place.faults / "clock", "")
    elif fault == "second":
        refused(place, f"Another build of stand-in is under way in {place.out}.")


@pytest.mark.parametrize(
    ("place", "cell"),
    [
        pytest.param(cell, cell, id=str(cell), marks=[] if cell in CHECKED else [pytest.mark.slow_faults])
        for cell in ALL
        if cell.step == "cache-http"
    ],
    indirect=["place"],
)
def test_fault_of_a_download(place: Place, cell: Cell, netboot_files: dict[str, bytes]) -> None:
    TABLE[cell] = "failed"
    if cell.fault == "full":
        place.cache = place.out / "cache"
    with mirror(netboot_files) as server:
        server.fault = cell.fault
        place.configure(f"http://127.0.0.1:{server.server_port}")
        process = place.start()
        try:
            wait_for(server.reached.is_set, "the download")
            strike_download(place, cell.fault, process)
            server.go.set()
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert process.returncode in expected_status(cell), errors
        if process.returncode:
            check_cache(place, netboot_files, {"/linux"})
        if process.returncode > 0:
            check_words(cell, errors, "Caching the installer")
            assert "Caching the installer: failed after" in errors
        published = process.returncode == 0
        if cell.fault == "breaks":
            assert any(start % fetch._PART_SIZE for start in server.asked), server.asked
        if process.returncode < 0 or cell.fault == "descriptors":
            recover(place, cell)
        assert leftovers(place) == [], errors
        check_files(place, published=published)
        # The next build takes only what is whole, and fetches the rest.
        place.disarm()
        server.fault = ""
        write(place.faults / "call", "qemu-img convert*")
        write(place.faults / "fault", "fails-always")
        _, errors = place.start().communicate(timeout=PATIENCE)
        assert "Converting to qcow2: failed" in errors
        check_cache(place, netboot_files, {"/linux", "/initrd.gz"})
    assert leftovers(place) == [], errors
    TABLE[cell] = "survived"


def make_stale(place: Place, fault: str) -> None:
    """Leave what a killed build leaves."""
    user = place.user
    work = place.out / ".image-factory-stand-in"
    user.run("mkdir", "-p", work / "netboot/deeper")
    user.run("touch", work / "disk.raw", work / "netboot/linux")
    if fault == "stale-closed":
        user.run("chmod", "0", work / "disk.raw", work / "netboot/linux")
    elif fault == "stale-mount-point":
        user.run("mkdir", "-p", "-m", "700", "/tmp/image-factory.stale/tree")
        user.run("ln", "-s", "/tmp/image-factory.stale", work / "mount-point")
    elif fault == "stale-machine":
        name = "image-factory-stand-in-01234567"
        user.run("sh", "-c", f"echo {name} >{work}/vm-name")
        domain = place.directory / "domain.xml"
        domain.write_text(
            f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><os><type>hvm</type></os>"
            f"<devices><disk type='file' device='disk'><source file='{work}/disk.raw'/><target dev='vda'/></disk>"
            "</devices></domain>"
        )
        user.run("virsh", "--connect", user.libvirt_uri, "define", domain)


@pytest.mark.parametrize(
    ("place", "cell"),
    [pytest.param(cell, cell, id=str(cell)) for cell in ALL if cell.fault in STALE],
    indirect=["place"],
)
def test_stale_directory(place: Place, cell: Cell) -> None:
    TABLE[cell] = "failed"
    make_stale(place, cell.fault)
    process = place.start()
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "Cleaning up after a build of stand-in that was killed." in errors
    assert leftovers(place) == []
    check_files(place, published=True)
    TABLE[cell] = "survived"


def refused(place: Place, message: str) -> None:
    second = place.start()
    try:
        # What waits for a lock waits for ever.
        _, errors = second.communicate(timeout=PATIENCE)
    finally:
        second.kill()
    assert second.returncode == 2, errors
    assert errors.splitlines()[-2] == f"image-factory: error: {message}"


@pytest.mark.parametrize(
    ("place", "cell"),
    [pytest.param(cell, cell, id=str(cell)) for cell in ALL if cell.fault in LOCKS and cell.fault != "lock-stopped"],
    indirect=["place"],
)
def test_not_our_directory(place: Place, cell: Cell, users: dict[str, User]) -> None:
    """What is no working directory of this user's is spared, and the build is refused."""
    TABLE[cell] = "failed"
    work = place.out / ".image-factory-stand-in"
    target = place.directory / "elsewhere"
    target.mkdir()
    (target / "file").touch()
    if cell.fault == "lock-of-another":
        other = users["b"].name
        work.mkdir(mode=0o777)
        (work / "vm-name").write_text("precious\n")
        shutil.chown(work, other)
        # In a directory such as /tmp anyone can make it.
        reason = f"belongs to {other}."
    elif cell.fault == "lock-is-link":
        work.symlink_to(target)
        reason = "can't be made: Not a directory."
    else:
        work.write_text("a file")
        reason = "can't be made: File exists."
    before = sorted(map(str, place.out.rglob("*")))
    refused(place, f"The working directory {work} {reason}")
    assert sorted(map(str, place.out.rglob("*"))) == before
    assert (target / "file").exists()
    shutil.rmtree(work) if work.is_dir() and not work.is_symlink() else work.unlink()
    assert leftovers(place) == []
    check_files(place, published=False)
    TABLE[cell] = "survived"


@pytest.mark.parametrize(
    ("place", "cell"),
    [pytest.param(cell, cell, id=str(cell)) for cell in ALL if cell.fault == "lock-stopped"],
    indirect=["place"],
)
def test_lock_of_a_stopped_build(place: Place, cell: Cell) -> None:
    TABLE[cell] = "failed"
    write(place.faults / "call", "qemu-img convert*")
    write(place.faults / "fault", "second")
    first = place.start()
    try:
        wait_for((place.faults / "reached").exists, "the first build")
        first.send_signal(signal.SIGSTOP)
        refused(place, f"Another build of stand-in is under way in {place.out}.")
        first.send_signal(signal.SIGCONT)
        write(place.faults / "go", "")
        _, errors = first.communicate(timeout=PATIENCE)
    finally:
        first.kill()
    assert first.returncode == 0, errors
    assert leftovers(place) == []
    check_files(place, published=True)
    TABLE[cell] = "survived"


@pytest.mark.parametrize(
    "place", [pytest.param(Cell("start", "cleanup", user), id=user) for user in ("root", "a")], indirect=True
)
def test_cleanup_spares_what_runs(place: Place) -> None:
    """A build that runs loses nothing, also when it is looked for elsewhere; then what it leaves is removed."""
    write(place.faults / "call", "* remove *")
    write(place.faults / "fault", "hangs")
    process = place.start()
    try:
        wait_for((place.faults / "reached").exists, "the build")
        before = what_is_there(place)
        assert any("/tmp/image-factory." in line for line in before)
        for words in (["--cleanup"], ["--cleanup", "--output-dir", str(place.directory)]):
            cleanup = place.start(*words)
            output, errors = cleanup.communicate(timeout=PATIENCE)
            assert (cleanup.returncode, output) == (0, ""), errors
            assert what_is_there(place) == before
        process.kill()
    finally:
        process.kill()
    process.communicate(timeout=PATIENCE)
    place.disarm()
    # The mount of a build elsewhere is found too, its directory only where it is looked for.
    for words, kinds in ((["-o", str(place.directory)], {"mount", "directory"}), ([], {"directory"})):
        cleanup = place.start("--cleanup", *words)
        output, errors = cleanup.communicate(timeout=PATIENCE)
        assert cleanup.returncode == 0, errors
        assert {line.partition(" ")[0] for line in output.splitlines()} == kinds, errors
    cleanup = place.start("--cleanup")
    assert (*cleanup.communicate(timeout=PATIENCE)[:1], cleanup.returncode) == ("", 0)
    assert leftovers(place) == []
    check_files(place, published=False)
