"""Faults at every step of a build: whatever strikes, nothing is left behind and what is said is right.

The steps up to the installation are those of a real build; the installation itself is a copy of a
disk that the stand-in installer has written once (see tests/faults/wrapper), but for the few cells of
REAL.  $FAULT_TABLE names a file for the table.
"""

import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, User, left_behind, machine_state, run, wait_for
from .test_build import ANSWERS, TODAY, new_build

FAULTS = REPOSITORY / "tests/faults"
IMAGE = f"stand-in-{TODAY}.qcow2"

# Each step: the name that the log has, the call of a program in it (a pattern of sh), or an event in Python
# with a pattern of its arguments.
PROGRAMS = {
    "create": ("Creating the disk", "qemu-img create*"),
    "cache": ("Caching the installer", "rsync*rsync://*"),
    "install": ("Installing", "virt-install *"),
    "mount": ("Mounting the root partition", "* mount-image *"),
    "remove": ("Removing installer logs", "* remove *"),
    "free": ("Freeing unused blocks", "* trim *"),
    "unmount": ("Unmounting", "* umount *"),
    "zero": ("Zeroing unused blocks", "zerofree *"),
    "convert": ("Converting to qcow2", "qemu-img convert*"),
    "upload": (f"Uploading {IMAGE} to up", "rsync *.sha256sum *"),
    "post-build": ("Running the post-build command", "notify *"),
}
EVENTS = {
    "checksum": (f"Checksumming {IMAGE}", "open", "*.qcow2 r*"),
    "publish": ("Publishing", "os.rename", "*.qcow2 *.qcow2 *"),
}
ORDER = list(dict.fromkeys([*list(PROGRAMS)[:9], "checksum", "publish", *PROGRAMS]))

SIGNALS = {"INT": 130, "TERM": 143, "HUP": 129, "KILL": -9}
AT_PROGRAMS = [
    "fails", "missing", "hangs", *(f"signal-{name}" for name in SIGNALS), "killed-group", "killed-while-hanging",
    "killed-child", "full", "descriptors",
]  # fmt: skip
AT_EVENTS = ["fails", *(f"signal-{name}" for name in SIGNALS), "killed-group", "full", "descriptors"]
KILLED = ("signal-KILL", "killed-group", "killed-while-hanging")
STALE = ["stale-files", "stale-closed", "stale-mount-point", "stale-machine"]
# The real installer and its machine.
REAL = ["signal-TERM", "signal-KILL", "killed-child", "killed-machine"]


@dataclass(frozen=True)
class Cell:
    step: str
    fault: str
    user: str
    real: bool = False

    def __str__(self) -> str:
        return f"{self.user}-{self.step}-{self.fault}{'-real' if self.real else ''}"


def cells() -> Iterator[Cell]:
    for user in ("root", "a"):
        for step in ORDER:
            if step in PROGRAMS:
                yield from (Cell(step, fault, user) for fault in AT_PROGRAMS)
                yield Cell(step, "second", user)
            elif step in EVENTS:
                yield from (Cell(step, fault, user) for fault in AT_EVENTS)
        yield Cell("unmount", "fails-always", user)
        yield from (Cell("start", fault, user) for fault in STALE)
        yield from (Cell("install", fault, user, real=True) for fault in REAL)


def is_slow(cell: Cell) -> bool:
    """Whether *cell* is no part of make check, which has each step and each fault, but not all of both."""
    if cell.real or cell.fault in ("fails-always", "second"):
        return cell.user == "root" or (cell.fault == "second" and cell.step != "convert")
    if cell.step == "start":
        return False
    faults = AT_PROGRAMS if cell.step in PROGRAMS else AT_EVENTS
    return (ORDER.index(cell.step) + faults.index(cell.fault) + (cell.user == "root")) % 3 != 0


TABLE: dict[Cell, str] = {}


@pytest.fixture(scope="session", autouse=True)
def table() -> Iterator[None]:
    yield
    target = os.environ.get("FAULT_TABLE")
    if target and TABLE:
        Path(target).write_text(shown_table())


def shown_table() -> str:
    faults = list(dict.fromkeys(cell.fault for cell in TABLE))
    steps = ["start", *ORDER]
    lines = ["step x fault: survived/tried, as root and as an ordinary user", ""]
    for fault in faults:
        entries = []
        for step in steps:
            results = [result for cell, result in TABLE.items() if (cell.step, cell.fault) == (step, fault)]
            if results:
                entries.append(f"{step} {results.count('survived')}/{len(results)}")
        lines.append(f"{fault:22} {', '.join(entries)}")
    survived = list(TABLE.values()).count("survived")
    return "\n".join([*lines, "", f"{len(TABLE)} cells, {survived} survived", ""])


@pytest.fixture(scope="session")
def installed(users: dict[str, User], stand_in: Path) -> Path:
    """A disk that the stand-in has been installed on."""
    user = users["a"]
    directory = user.directory("installed")
    (directory / "answers.cfg").write_text(ANSWERS)
    (directory / "image-factory.conf").write_text(
        f"[stand-in]\nlinux = {stand_in}/linux\ninitrd = {stand_in}/initrd.gz\npreseed = {directory}/answers.cfg\n"
        "append = console=ttyS0\nimage-size = 128M\nram = 512M\nvirt-type = qemu\n"
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


class Place:
    """A directory to build in, with a fault to strike."""

    def __init__(self, user: User, directory: Path, stand_in: Path, installed: Path, faulty: Path) -> None:
        self.user, self.directory = user, directory
        self.before = set(machine_state())
        self.out, self.faults, self.programs = (directory / name for name in ("out", "faults", "bin"))
        for path in (self.out, self.faults, self.programs, directory / "up"):
            path.mkdir()
            shutil.chown(path, user.name)
        self.helper = faulty / "bin/image-factory-sudo-helper"
        self.program = faulty / "bin/image-factory" if user.is_root else user.program
        for name in ("qemu-img", "rsync", "virt-install", "virsh", "zerofree", "notify", "sudo"):
            (self.programs / name).symlink_to(FAULTS / "wrapper")
        self.environment = {
            "HOME": str(user.home),
            "USER": user.name,
            "LANG": "C.UTF-8",
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
        self.configure(stand_in)
        self.older = self.out / IMAGE
        self.older.write_text("older")
        shutil.chown(self.older, user.name)

    def configure(self, stand_in: Path, arguments: str = "") -> None:
        (self.directory / "image-factory.conf").write_text(
            f"""
[stand-in]
linux = rsync://stand-in/linux
initrd = rsync://stand-in/initrd.gz
preseed = {self.directory}/answers.cfg
append = console=ttyS0 {arguments}
cache-dir = {self.directory}/cache
image-size = 128M
ram = 512M
virt-type = qemu
format = qcow2
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

    def disarm(self) -> None:
        for path in self.faults.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        for away in [*self.programs.glob("*.away"), *self.helper.parent.glob("*.away")]:
            away.rename(away.with_suffix(""))
        (self.out / "filler").unlink(missing_ok=True)


@pytest.fixture
def place(
    request: pytest.FixtureRequest, users: dict[str, User], stand_in: Path, installed: Path, faulty_prefix: Path
) -> Iterator[Place]:
    cell: Cell = request.param
    user = users[cell.user]
    for build in new_build(user, request, stand_in):
        found = Place(user, build.directory, stand_in, installed, faulty_prefix)
        if cell.fault == "full":
            run("mount", "-t", "tmpfs", "-o", f"size=300m,mode=755,uid={user.uid}", "tmpfs", found.out)
            found.older.write_text("older")
            shutil.chown(found.older, user.name)
        try:
            yield found
        finally:
            found.disarm()
            if cell.fault == "full":
                run("umount", found.out)


# The last one has the durations of builds that have come to their end.
CACHED = ("linux", "initrd.gz", ".durations.json")


def leftovers(place: Place) -> list[str]:
    """Return what the build has left."""
    left = left_behind(place.user, place.directory)
    left += sorted(set(machine_state()) - place.before)
    cache = place.directory / "cache/stand-in"
    if cache.is_dir():
        left += [f"cache {path}" for path in cache.iterdir() if path.name not in CACHED]
    processes = run("ps", "-u", place.user.name, "-o", "args").stdout.splitlines()
    left += [f"process {line}" for line in processes if line == "sleep 600"]
    return left


def check_files(place: Place, *, published: bool) -> None:
    """What has a final name is whole."""
    names = {path.name for path in place.out.iterdir()} - {f"stand-in-{TODAY}.console.log", "filler"}
    if not published:
        assert names == {IMAGE}
        assert place.older.read_text() == "older"
        return
    assert names == {IMAGE, f"{IMAGE}.sha256sum"}
    run("sha256sum", "--check", "--strict", f"{IMAGE}.sha256sum", cwd=place.out)


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
    wait_for((place.faults / "reached").exists, 30, "the first build")
    second = place.start()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"Another build of stand-in is under way in {place.out}." in errors
    write(place.faults / "go", "")


def recover(place: Place, cell: Cell) -> None:
    """Clean up after a build that could not do so itself: with --cleanup, or the next build."""
    place.disarm()
    if hash_of(cell) % 2:
        process = place.start("--cleanup")
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert all(re.match("(virtual machine|mount|directory) ", line) for line in output.splitlines())
        # The cache belongs to the next build of the image.
        for path in (place.directory / "cache").glob("*/.*"):
            path.unlink()
        return
    # A build that ends before its end is enough.
    write(place.faults / "call", "qemu-img convert*")
    write(place.faults / "fault", "fails-always")
    process = place.start()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "Converting to qcow2: failed" in errors


def hash_of(cell: Cell) -> int:
    return [*PROGRAMS, *EVENTS, "start"].index(cell.step) + len(cell.fault)


def expected_status(cell: Cell) -> set[int]:
    if cell.fault in KILLED:
        return {-9}
    if cell.fault.startswith("signal-"):
        return {SIGNALS[cell.fault.removeprefix("signal-")]}
    if cell.fault == "hangs":
        return {143}
    if cell.fault == "second":
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


ALL = list(cells())


@pytest.mark.parametrize(
    ("place", "cell"),
    [
        pytest.param(cell, cell, id=str(cell), marks=[pytest.mark.slow_faults] if is_slow(cell) else [])
        for cell in ALL
        if cell.step != "start" and not cell.real
    ],
    indirect=["place"],
)
def test_fault(place: Place, cell: Cell) -> None:
    TABLE[cell] = "failed"
    arm(place, cell)
    process = place.start()
    try:
        if cell.fault == "hangs":
            wait_for(lambda: (place.faults / "reached").exists() or process.poll() is not None, 30, "the fault")
            process.terminate()
        if cell.fault == "second":
            second_build(place)
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    assert (place.faults / "struck").is_dir() or cell.fault == "fails-always", errors
    assert process.returncode in expected_status(cell), errors
    named = PROGRAMS[cell.step][0] if cell.step in PROGRAMS else EVENTS[cell.step][0]
    if process.returncode > 0:
        check_words(cell, errors, named)
    published = "INFO: Publishing: done" in errors
    if cell.fault not in ("full", "descriptors"):
        # A signal does not disturb the publishing itself.
        signalled = cell.step == "publish" and cell.fault in ("signal-INT", "signal-TERM", "signal-HUP")
        assert published == (cell.step in ("upload", "post-build") or process.returncode == 0 or signalled), errors
    helper_gone = place.user.is_root and cell.fault == "missing" and cell.step in ("remove", "free", "unmount")
    if process.returncode < 0 or cell.fault in ("descriptors", "fails-always") or helper_gone:
        recover(place, cell)
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


def strike_installation(place: Place, fault: str, process: "subprocess.Popen[str]") -> None:
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
        pytest.param(cell, cell, id=str(cell), marks=[pytest.mark.slow_faults] if is_slow(cell) else [])
        for cell in ALL
        if cell.real
    ],
    indirect=["place"],
)
def test_fault_of_the_installation(place: Place, cell: Cell, stand_in: Path) -> None:
    TABLE[cell] = "failed"
    place.configure(stand_in, "stand-in=hang")
    console = place.out / ".image-factory-stand-in/console.log"
    process = place.start(REAL_INSTALLATION="yes")
    try:
        wait_for(lambda: console.is_file() and "stand-in: " in console.read_text(errors="replace"), 90, "the guest")
        strike_installation(place, cell.fault, process)
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    if cell.fault == "killed-machine":
        assert "did not power off by itself: shut off (crashed)." in errors
    elif process.returncode > 0:
        check_words(cell, errors, "Installing")
    assert process.returncode in expected_status(cell), errors
    if process.returncode < 0:
        recover(place, cell)
    assert leftovers(place) == [], errors
    check_files(place, published=False)
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
    [pytest.param(cell, cell, id=str(cell)) for cell in ALL if cell.step == "start"],
    indirect=["place"],
)
def test_stale_directory(place: Place, cell: Cell) -> None:
    TABLE[cell] = "failed"
    make_stale(place, cell.fault)
    process = place.start()
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert "Cleaning up after a build of stand-in that was killed." in errors
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
        wait_for((place.faults / "reached").exists, 30, "the build")
        before = leftovers(place)
        assert any("/tmp/image-factory." in line for line in before)
        for words in (["--cleanup"], ["--cleanup", "--output-dir", str(place.directory)]):
            cleanup = place.start(*words)
            output, errors = cleanup.communicate(timeout=60)
            assert (cleanup.returncode, output) == (0, ""), errors
            assert leftovers(place) == before
        process.kill()
    finally:
        process.kill()
    process.communicate(timeout=60)
    place.disarm()
    # The mount of a build elsewhere is found too, its directory only where it is looked for.
    for words, kinds in ((["-o", str(place.directory)], {"mount", "directory"}), ([], {"directory"})):
        cleanup = place.start("--cleanup", *words)
        output, errors = cleanup.communicate(timeout=60)
        assert cleanup.returncode == 0, errors
        assert {line.partition(" ")[0] for line in output.splitlines()} == kinds, errors
    cleanup = place.start("--cleanup")
    assert (*cleanup.communicate(timeout=60)[:1], cleanup.returncode) == ("", 0)
    assert leftovers(place) == []
    check_files(place, published=False)
