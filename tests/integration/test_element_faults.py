"""Faults at the phases of elements: nothing is left, whosever namespaces they happen in."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import PATIENCE, User, run, wait_for
from ..fault_table import ALL, CHECKED, ELEMENTS, KILLED, SIGNALS, Cell
from ..system.test_elements_run import Place, system
from .test_faults import TABLE

__all__ = ["system"]

# What the script does at which the fault strikes: it is known by its seconds.
SECONDS = "471108"
BODIES = {"fails": "echo injected >&2; exit 3", "full": 'cat /dev/zero >"${TMPDIR-}/filler"'}
# What is mounted and runs when the fault strikes.
WAITS = f"""\
mkdir -p "${{TMPDIR-}}/over"
mount -t tmpfs over "${{TMPDIR-}}/over"
sleep {SECONDS} &
sleep {SECONDS}"""
WORK = ".image-factory-x"


@pytest.fixture
def place(cell: Cell, users: dict[str, User], system: Path) -> Iterator[Place]:
    user = users[cell.user]
    found = Place(user.directory(f"elements-{cell}"), system)
    found.cache.mkdir()
    if cell.fault == "full":
        run("mount", "-t", "tmpfs", "-o", "size=340m,mode=755", "tmpfs", found.out)
    for directory in (found.out, found.cache):
        shutil.chown(directory, user.name)
    try:
        yield found
    finally:
        if cell.fault == "full" and os.path.ismount(found.out):
            run("umount", found.out)


def armed(place: Place, cell: Cell, user: User) -> list[str]:
    """Return the command of a build in which the fault of *cell* strikes."""
    phase = ELEMENTS[cell.step].removeprefix("Running ").removesuffix(".d")
    place.element("struck", **{phase.replace("-", "_"): BODIES.get(cell.fault, WAITS)})
    place.command("struck", keys="work-in-memory = no" if cell.fault == "full" else "")
    conf = place.path / "conf"
    text = conf.read_text(encoding="utf-8")
    if not user.is_root:
        text = text.replace("format = tar", "format = raw").replace("mount-via = loop", "mount-via = fuse")
    conf.write_text(text, encoding="utf-8")
    return user.argv(user.program, "x", IMAGE_FACTORY_CONFIG=str(conf))


def sleeping() -> bool:
    """Return whether a script waits, in whatever namespaces."""
    return f" {SECONDS}" in run("ps", "-eo", "args").stdout


def strike(place: Place, cell: Cell, user: User, process: "subprocess.Popen[str]") -> None:
    wait_for(lambda: sleeping() or process.poll() is not None, "the phase")
    # The build is the last that env and runuser become.
    pid = str(process.pid if user.is_root else user.build_process())
    if cell.fault == "killed-child":
        run("kill", "-KILL", (place.out / WORK / "namespaces.log").read_text(encoding="utf-8").strip())
    elif cell.fault == "killed-group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        run("kill", f"-{cell.fault.removeprefix('signal-')}", pid)


def check_words(cell: Cell, errors: str) -> None:
    """The phase is told, and the reason in one line, perhaps with a hint."""
    said = [line for line in errors.splitlines() if line.startswith("image-factory: ")]
    assert said and said[0].startswith("image-factory: error: ") and len(said) <= 2, errors
    assert "Internal error" not in said[0] and "Traceback" not in errors, errors
    assert f"INFO: {ELEMENTS[cell.step]}: failed after" in errors, errors
    reasons = {"fails": "of the element struck failed with status 3: injected", "full": "No space left on device"}
    reasons |= {"killed-child": ".d/50-struck of the element struck was killed by SIGKILL"}
    assert reasons.get(cell.fault, f"Stopped by {cell.fault.replace('signal-', 'SIG')}.") in said[0], errors


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=str(cell), marks=[] if cell in CHECKED else [pytest.mark.slow_faults])
        for cell in ALL
        if cell.step in ELEMENTS
    ],
)
def test_fault(place: Place, cell: Cell, users: dict[str, User]) -> None:
    TABLE[cell] = "failed"
    user = users[cell.user]
    with subprocess.Popen(
        armed(place, cell, user), cwd=place.path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            if cell.fault not in BODIES:
                strike(place, cell, user, process)
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    killed = cell.fault in KILLED
    status = SIGNALS.get(cell.fault.removeprefix("signal-"), -9 if killed else 1)
    assert process.returncode in ({-9, 137} if status == -9 else {status}), errors
    wait_for(lambda: not sleeping(), "the end of what ran in the namespaces")
    if killed:
        argv = user.argv(user.program, "--cleanup", "-o", place.out, IMAGE_FACTORY_CONFIG=str(place.path / "conf"))
        assert f"directory {place.out / WORK}" in run(*argv, cwd=place.path).stdout.splitlines()
    else:
        check_words(cell, errors)
    assert os.listdir(place.out) == [], errors
    if cell.fault == "full":
        run("umount", place.out)
    assert f"{place.path}/" not in Path("/proc/self/mountinfo").read_text(encoding="utf-8"), errors
    TABLE[cell] = "survived"
