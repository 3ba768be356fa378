"""Faults at the steps that make a disk from packages: nothing is left, whosever namespaces they happen in.

The tree is on a disk, with files of users that only the namespaces have: the memory of a tmpfs goes by itself.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..bootstrap_scene import BUILD, WORK, Place, new_place
from ..conftest import PATIENCE, User, run, wait_for
from ..fault_table import ALL, BOOTSTRAP, CHECKED, KILLED, SIGNALS, Cell
from ..small_archive import Archive
from .test_faults import TABLE

# What a program does at which the fault strikes: it is known by its seconds.
SECONDS = "471104"
BODIES = {"fails": "echo injected >&2; exit 3", "full": "cat /dev/zero >{filler}", "else": f"exec sleep {SECONDS}"}
# Directories which not even their owner's group can enter, of a user that only the namespaces have.
SCRIPT = "mkdir -p -m 700 /srv/own/deeper && echo x >/srv/own/deeper/file && chown -R 1000:1000 /srv/own\n"


@pytest.fixture
def place(cell: Cell, users: dict[str, User], small_archive: Archive) -> Iterator[Place]:
    found = new_place(users[cell.user], small_archive)
    found.user.run("mkdir", found.out)
    if cell.fault == "full":
        # The disk is sparse, and looked at beforehand; tasks have layers.
        size = "340m" if cell.step == "task" else "170m"
        run("mount", "-t", "tmpfs", "-o", f"size={size},mode=755,uid={found.user.uid}", "tmpfs", found.out)
    try:
        yield found
    finally:
        if cell.fault == "full" and os.path.ismount(found.out):
            run("umount", found.out)


def armed(place: Place, cell: Cell) -> list[str]:
    """Return the command of a build in which the fault of *cell* strikes."""
    filler = place.out / WORK / "filler" if cell.step == "layout" else Path("/filler")
    body = BODIES.get(cell.fault, BODIES["else"]).format(filler=filler)
    script = SCRIPT
    if cell.step == "bootstrap":
        script += body
    elif cell.step == "loader":
        script += f"printf '%s\\n' '#!/bin/sh' '{body}' >/usr/sbin/grub-mkconfig"
    place.configure(work_in_memory="no", **({"tasks": "./work.sh"} if cell.step == "task" else {}))
    (place.directory / "work.sh").write_text(f"#!/bin/sh\n{body}\n")
    place.recipe(script=script)
    programs = place.directory / "programs"
    programs.mkdir()
    if cell.step == "layout":
        (programs / "mke2fs").write_text(f'#!/bin/sh\n{body}\nexec /usr/sbin/mke2fs "$@"\n')
        (programs / "mke2fs").chmod(0o755)
    return place.argv(*BUILD, PATH=f"{programs}:/usr/bin:/bin")


def sleeping(user: User) -> list[str]:
    """Return the processes of *user* that wait, those in namespaces among them."""
    lines = run("ps", "-eo", "pid,args").stdout.splitlines()
    return [line.split()[0] for line in lines if line.endswith(f" sleep {SECONDS}")]


def holders(place: Place) -> list[str]:
    """Return the first processes of the namespaces of the build."""
    log = (place.out / WORK / "namespaces.log").read_text()
    return [pid for pid in log.split() if Path(f"/proc/{pid}").exists()]


def strike(place: Place, cell: Cell, process: "subprocess.Popen[str]") -> None:
    wait_for(lambda: sleeping(place.user) or process.poll() is not None, "the step")
    [holder] = holders(place)
    # The build is the last that env and runuser become.
    pid = process.pid if place.user.is_root else place.user.build_process()
    if cell.fault == "killed-child":
        run("kill", "-KILL", holder)
    elif cell.fault == "killed-group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        run("kill", f"-{cell.fault.removeprefix('signal-')}", str(pid))


def check_words(cell: Cell, errors: str) -> None:
    """The step is told, and the reason in one line, perhaps with a hint."""
    said = [line for line in errors.splitlines() if line.startswith("image-factory: ")]
    assert said and said[0].startswith("image-factory: error: ") and len(said) <= 2, errors
    assert all(line.startswith("image-factory: hint: ") for line in said[1:]), errors
    assert "Internal error" not in said[0] and "Traceback" not in errors, errors
    assert f"INFO: {BOOTSTRAP[cell.step]}: failed after" in errors, errors
    reasons = {"fails": "injected", "full": "No space left on device", "killed-child": ""}
    assert reasons.get(cell.fault, f"Stopped by {cell.fault.replace('signal-', 'SIG')}.") in said[0], errors


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=str(cell), marks=[] if cell in CHECKED else [pytest.mark.slow_faults])
        for cell in ALL
        if cell.step in BOOTSTRAP
    ],
)
def test_fault(place: Place, cell: Cell) -> None:
    TABLE[cell] = "failed"
    with subprocess.Popen(
        armed(place, cell), cwd=place.directory, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            if cell.fault not in BODIES:
                strike(place, cell, process)
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    killed = cell.fault in KILLED
    status = SIGNALS.get(cell.fault.removeprefix("signal-"), -9 if killed else 1)
    assert process.returncode in ({-9, 137} if status == -9 else {status}), errors
    wait_for(lambda: not sleeping(place.user), "the end of what ran in the namespaces")
    if killed:
        assert (place.out / WORK / "tree").is_dir()
        recover(place, cell)
    else:
        check_words(cell, errors)
    if cell.step == "task" and not killed:
        check_kept(place, errors)
    assert [path.name for path in place.out.iterdir() if not path.name.endswith(".junit.xml")] == []
    if cell.fault == "full":
        run("umount", place.out)
    assert place.left() == [], errors
    TABLE[cell] = "survived"


def check_kept(place: Place, errors: str) -> None:
    """What is kept is the tree as the first task found it; it is told, and --cleanup removes it."""
    assert "'image-factory --resume small' goes on here" in errors or "Stopped by" in errors, errors
    kept = sorted(path.suffix for path in (place.out / WORK).iterdir())
    assert kept == [".json", ".tar"], kept
    done = place.run("--cleanup", "--output-dir", str(place.out))
    assert f"directory {place.out / WORK}" in done.stdout.splitlines()


def recover(place: Place, cell: Cell) -> None:
    """Clean up after a build that was killed: with --cleanup, or the next build."""
    if cell.step == "loader":
        place.recipe(script="exit 3")
        done = place.run(check=False)
        assert "Cleaning up after a build of small that was killed." in done.stderr
        assert done.returncode == 1, done.stderr
    else:
        done = place.run("--cleanup", "--output-dir", str(place.out))
        # Other builds of root may have been killed, too.
        assert f"directory {place.out / WORK}" in done.stdout.splitlines()
