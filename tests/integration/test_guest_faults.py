"""Faults while tasks run in a guest: the disk is as it was, and a resumed build does what is left.

QEMU and ssh are those of test_tasks_guest.py, as a real boot for each cell would take hours; the rest is real.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_factory import checkpoint
from image_factory.parts import State
from image_factory.tasks import layers

from ..conftest import PATIENCE, REPOSITORY, run, wait_for
from ..fault_table import ALL, CHECKED, GUEST, KILLED, SIGNALS, Cell
from ..system.test_tasks_guest import APART, MIB, PART, UP, Scene, command_lines, scene, sections
from .test_faults import TABLE

__all__ = ["scene"]

# Each says that it has begun, and waits until it may go on.
WAITING = "touch {here}/begun; while [ -e {here}/wait ]; do sleep 0.1; done"
SYSTEMCTL = """\
#!/bin/sh
case $1 in
poweroff) {body}; touch {here}/off ;;
is-system-running) cat {here}/state ;;
esac
"""
QEMU_IMG = """\
#!/bin/sh
[ "$1" = commit ] && {{ {body}; }}
exec {real} "$@"
"""


@pytest.fixture
def place(cell: Cell, scene: Scene) -> Iterator[Scene]:
    """Give a directory of its own to build in; it has little space where that is to be filled."""
    directory = scene.directory / "out"
    directory.mkdir()
    if cell.fault == "full":
        run("mount", "-t", "tmpfs", "-o", "size=48m,mode=755", "tmpfs", directory)
    try:
        yield scene._replace(directory=directory)
    finally:
        if os.path.ismount(directory):
            run("umount", directory)


def programs(place: Scene) -> Path:
    """Return the directory of the programs that are none."""
    return place.here.parent / "bin"


def all_ended(place: Scene) -> None:
    wait_for(lambda: str(place.here.parent) not in command_lines(), "all programs to end")


def armed(place: Scene, cell: Cell) -> State:
    """Have the fault of *cell* strike; return the state of the build."""
    waiting = WAITING.format(here=place.here)
    fails = "echo injected >&2; exit 3"
    bodies = dict.fromkeys(GUEST, ":")
    bodies[cell.step] = fails if cell.fault == "fails" else waiting
    log = place.directory / "log"
    state = place.state(sections(one=f"echo one >>{log}", two=f"echo two >>{log}; {bodies['guest-task']}"))
    # As an installer leaves it: what is written needs space.
    os.truncate(state.build.disk_path, 0)
    os.truncate(state.build.disk_path, MIB)
    (place.here / "wait").touch()
    if cell.step == "guest-boot":
        # QEMU says that the system begins to start.
        (place.here / ("none" if cell.fault == "fails" else "stuck")).touch()
        (place.here / "report").write_text('{"stage":"finished","sshd":""}\n')
    for name, text, body in (
        ("ssh", APART, ""),
        ("systemctl", SYSTEMCTL, bodies["guest-off"]),
        ("qemu-img", QEMU_IMG, bodies["guest-write"]),
    ):
        path = programs(place) / name
        real = shutil.which("qemu-img", path="/usr/bin:/bin")
        path.write_text(text.format(here=place.here, body=body, real=real))
        path.chmod(0o755)
    checkpoint.begin(state.build, checkpoint.InputsUsed())
    return state


def argv_of(place: Scene, step: str) -> list[str]:
    until = "clean" if step == "guest-write" else "tasks"
    words = ["--resume", "--until", until, "--output-dir", str(place.directory), "x"]
    return [str(REPOSITORY / "image-factory"), *words]


def strike(place: Scene, state: State, cell: Cell, process: "subprocess.Popen[str]") -> None:
    sign = place.here / ("argv" if cell.step == "guest-boot" else "begun")
    wait_for(lambda: sign.exists() or process.poll() is not None, "the step")
    if cell.fault == "killed-child":
        name = "qemu-img commit" if cell.step == "guest-write" else "qemu-system-x86_64"
        run("pkill", "-KILL", "-f", f"{programs(place)}/{name}")
        # ssh ends with QEMU, which has its connection.
        (place.here / "wait").unlink()
    elif cell.fault == "killed-group":
        os.killpg(process.pid, signal.SIGKILL)
    elif cell.fault == "full":
        with (state.build.directory / "filler").open("wb") as file:
            free = shutil.disk_usage(state.build.directory).free
            file.write(bytes(free if cell.step == "guest-write" else free - (4 << 20)))
        if cell.step == "guest-write":
            (place.here / "wait").unlink()
    else:
        process.send_signal(getattr(signal, cell.fault.replace("signal-", "SIG")))


def check_words(cell: Cell, errors: str) -> None:
    """The step is told, and the reason in one line, perhaps with a hint."""
    said = [line for line in errors.splitlines() if line.startswith("image-factory: ")]
    assert said and said[0].startswith("image-factory: error: ") and len(said) <= 2, errors
    assert "Traceback" not in errors, errors
    assert f"INFO: {GUEST[cell.step]}: failed after" in errors, errors
    reasons = {
        "fails": "no sshd" if cell.step == "guest-boot" else "injected",
        "full": "No space left on device" if cell.step == "guest-write" else "has less than 16.0 MiB free.",
        "killed-child": "",
    }
    assert reasons.get(cell.fault, f"Stopped by {cell.fault.replace('signal-', 'SIG')}.") in said[0], errors
    assert len(said) == 1 or "--resume x" in said[1] or cell.fault.startswith("signal"), errors


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=str(cell), marks=[] if cell in CHECKED else [pytest.mark.slow_faults])
        for cell in ALL
        if cell.step in GUEST
    ],
)
def test_fault(place: Scene, cell: Cell) -> None:
    TABLE[cell] = "failed"
    state = armed(place, cell)
    environment = {**os.environ, "IMAGE_FACTORY_CONFIG": str(place.directory / "x.conf")}
    argv = argv_of(place, cell.step)
    with subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            if cell.fault != "fails":
                strike(place, state, cell, process)
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    killed = cell.fault in KILLED
    assert process.returncode == SIGNALS.get(cell.fault.removeprefix("signal-"), -9 if killed else 1), errors
    if not killed:
        check_words(cell, errors)
    disk = state.build.disk_path
    if cell.step != "guest-write" or cell.fault != "full":
        assert disk.read_bytes() == bytes(MIB)
    (place.here / "wait").unlink(missing_ok=True)
    all_ended(place)
    go_on(place, state, cell)
    TABLE[cell] = "survived"


def go_on(place: Scene, state: State, cell: Cell) -> None:
    """Resume the build without the fault: what was done is not done again."""
    for name in ("stuck", "begun", "off", "argv"):
        (place.here / name).unlink(missing_ok=True)
    (place.here / "report").write_text(UP)
    disk, log = state.build.disk_path, place.directory / "log"
    (state.build.directory / "filler").unlink(missing_ok=True)
    (programs(place) / "qemu-img").write_text('#!/bin/sh\nexec /usr/bin/qemu-img "$@"\n')
    done = log.read_text().split() if log.exists() else []
    assert done == ([] if cell.step == "guest-boot" else ["one", "two"])
    if cell.step == "guest-task" and cell.fault == "fails":
        # It is another task then, and the one before it is none.
        place.plan(sections(one=f"echo one >>{log}", two=f"echo two >>{log}"))
    environment = {**os.environ, "IMAGE_FACTORY_CONFIG": str(place.directory / "x.conf")}
    # Its name may go.
    with disk.open("rb") as written:
        last = subprocess.run(
            argv_of(place, cell.step), env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        again = {"guest-boot": ["one", "two"], "guest-task": ["two"]}.get(cell.step, [])
        assert log.read_text().split() == [*done, *again], last.stderr
        if cell.step == "guest-write":
            # There is no system on it to be cleaned.
            assert (last.returncode, written.read()[:PART]) == (1, b"A" * PART), last.stderr
        else:
            assert last.returncode == 0, last.stderr
            assert layers.are_unwritten(state.build.directory)
            assert disk.read_bytes() == bytes(MIB)
    all_ended(place)
    left = [path for path in Path(place.directory).glob(".image-factory-x/*") if not path.name.startswith("layer-")]
    assert {path.name for path in left} <= {"disk.raw", "checkpoint.json"}
