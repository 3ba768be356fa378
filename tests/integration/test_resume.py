"""What a build that failed has left is gone on with, and is bounded."""

import json
import os
import pty
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import User, machine_state, run
from .test_build import TODAY, WORK, Build, mounted, new_build

pytestmark = pytest.mark.usefixtures("machine")

IMAGE = f"stand-in-{TODAY}"
# A checkpoint names the images by their paths, so it is gone on with where it was written.
PLACE = "resume"


@pytest.fixture(scope="module")
def kept(users: dict[str, User], stand_in: Path, installed_disk: Path) -> Iterator[Path]:
    """A copy of what a build has left whose post-build command has failed."""
    build = Build(users["a"], users["a"].directory(PLACE), stand_in)
    build.configure(extra="post-build-command = false")
    build.go_on_from(installed_disk)
    done = build.run("--resume", check=False)
    assert done.returncode == 1
    hint = build.errors(done)[1]
    assert hint.endswith("; 'image-factory --resume stand-in' goes on here, without a new installation.")
    copy = build.directory.with_name(f"{PLACE}-kept")
    build.directory.rename(copy)
    yield copy
    shutil.rmtree(copy)


@pytest.fixture
def failed(request: pytest.FixtureRequest, users: dict[str, User], stand_in: Path, kept: Path) -> Iterator[Build]:
    """The build of ``kept``, as it was left; what is left of it is removed at the end."""
    for build in new_build(users["a"], request, stand_in, PLACE):
        build.directory.rmdir()
        run("cp", "--archive", "--sparse=always", kept, build.directory)
        yield build
        run(*build.argv("--cleanup"), cwd=build.directory)
        assert not (build.directory / WORK).exists()
        left = build.directory
    shutil.rmtree(left)


def steps(done: "subprocess.CompletedProcess[str]") -> list[str]:
    return re.findall(r" INFO: (\S.*): done in ", done.stderr)


def test_only_what_failed_is_done_again(failed: Build) -> None:
    qcow2 = failed.directory / f"{IMAGE}.qcow2"
    before = qcow2.stat()
    (failed.directory / WORK / "older-something").touch()
    again = failed.run("--resume", check=False)
    assert again.returncode == 1
    assert {path.name for path in (failed.directory / WORK).iterdir()} == {"checkpoint.json", "disk.raw"}
    failed.configure(extra="post-build-command = true")
    done = failed.run("--resume", "--json", "r.json")
    record = json.loads((failed.directory / "r.json").read_text())
    assert [artifact["path"] for artifact in record["artifacts"]] == [str(qcow2)]
    assert steps(done) == ["Checking the images", "Running the post-build command"]
    assert (qcow2.stat().st_ino, qcow2.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not (failed.directory / WORK).exists()
    nothing = failed.run("--resume", check=False)
    assert nothing.returncode == 2
    assert "There is nothing of stand-in to resume in " in failed.errors(nothing)[0]


def test_each_stage(failed: Build) -> None:
    """From each checkpoint the rest is done, with the same result."""
    failed.configure(extra="post-build-command = true")
    checkpoint = failed.directory / WORK / "checkpoint.json"
    text = json.loads(checkpoint.read_text())
    disk = failed.directory / WORK / "disk.raw"
    copy = failed.directory / "disk"
    run("cp", "--sparse=always", disk, copy)
    rest = {
        "published": "Checking the images",
        "installed": "Reading the partition table",
        "cleaned": "Converting to qcow2",
    }
    for stage, first in rest.items():
        (failed.directory / WORK).mkdir(exist_ok=True)
        run("cp", "--sparse=always", copy, disk)
        checkpoint.write_text(json.dumps(text | {"stage": stage}))
        run("chown", "-R", failed.user.name, failed.directory / WORK)
        assert steps(failed.run("--resume"))[0] == first
        run("sha256sum", "--check", f"{IMAGE}.qcow2.sha256sum", cwd=failed.directory)


CHANGES = {
    "image-size": ("", {"size": "513M"}),
    "append": ("", {"arguments": "quiet"}),
}


@pytest.mark.parametrize("key", CHANGES)
def test_change_that_makes_it_unusable(failed: Build, key: str) -> None:
    extra, keywords = CHANGES[key]
    failed.configure(extra=extra, **keywords)
    done = failed.run("--resume", check=False)
    assert done.returncode == 2
    assert failed.errors(done) == [
        f"image-factory: error: [stand-in] {key} changed since the disk was installed.",
        "image-factory: hint: Build it without --resume, or take the change back.",
    ]
    failed.configure(extra="post-build-command = true")
    failed.run("--resume")


def test_answer_file_that_has_changed(failed: Build) -> None:
    with (failed.directory / "answers.cfg").open("a") as file:
        file.write("# changed\n")
    done = failed.run("--resume", check=False)
    assert "[stand-in] preseed changed since the disk was installed." in failed.errors(done)[0]


def test_other_format(failed: Build) -> None:
    """The artifacts are made anew, of the disk that is there."""
    failed.configure(extra="format = raw")
    text = (failed.directory / "image-factory.conf").read_text().replace("format = qcow2\n", "")
    (failed.directory / "image-factory.conf").write_text(text)
    done = failed.run("--resume")
    assert "Installing" not in steps(done)
    with mounted(failed.directory / f"{IMAGE}.raw") as tree:
        assert (tree / "etc/os-release").exists()


def test_published_file_that_has_changed(failed: Build) -> None:
    failed.configure(extra="post-build-command = true")
    qcow2 = failed.directory / f"{IMAGE}.qcow2"
    qcow2.write_bytes(b"changed")
    assert "Converting to qcow2" in steps(failed.run("--resume"))
    run("sha256sum", "--check", f"{IMAGE}.qcow2.sha256sum", cwd=failed.directory)


def test_new_build_says_that_one_could_be_resumed(failed: Build) -> None:
    failed.configure(extra="post-build-command = true", arguments="stand-in=empty-disk")
    done = failed.run(check=False)
    assert f"WARNING: What --resume could go on with is removed: {failed.directory}/{WORK}\n" in done.stderr
    # A disk without a system is nothing to go on with.
    assert done.returncode == 1
    assert not (failed.directory / WORK).exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"stage": "none"}', "\x00\xff"])
def test_damaged_checkpoint(failed: Build, text: str) -> None:
    (failed.directory / WORK / "checkpoint.json").write_text(text)
    done = failed.run("--resume", check=False)
    assert done.returncode == 2
    assert "There is nothing of stand-in to resume in " in failed.errors(done)[0]


def test_until(user_build: Build) -> None:
    """Stop after each step in turn, and go on there."""
    user_build.configure(extra="post-build-command = touch built")
    first = {
        "install": "Creating the disk",
        "clean": "Reading the partition table",
        "convert": "Converting to qcow2",
        "publish": "Checking the images",
        "upload": "Checking the images",
    }
    for until, step in first.items():
        resume = [] if until == "install" else ["--resume"]
        done = user_build.run("--until", until, *resume)
        assert steps(done)[0] == step
        assert until == "convert" or "Converting to qcow2" not in steps(done)
        assert done.stdout.endswith(f"Stopped after {until}. 'image-factory --resume stand-in' goes on.\n")
        assert (user_build.directory / WORK / "disk.raw").exists()
        assert (user_build.directory / WORK / f"{IMAGE}.qcow2").exists() == (until == "convert")
        assert (user_build.directory / f"{IMAGE}.qcow2").exists() == (until in ("publish", "upload"))
    # What is done already is not taken back, and nothing more is done.
    done = user_build.run("--resume", "--until", "convert")
    assert steps(done) == ["Checking the images"]
    assert not (user_build.directory / "built").exists()
    user_build.run("--resume")
    assert (user_build.directory / "built").exists()
    assert not (user_build.directory / WORK).exists()


def in_terminal(argv: list[str], directory: Path) -> tuple[int, str]:
    """Run *argv* on a terminal of its own; return its status, and what it shows."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(directory)
        os.execvp(argv[0], argv)
    shown = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode(errors="replace")


@pytest.mark.parametrize("way", ["loop", "guestfs"])
def test_shell_on_error(failed: Build, way: str) -> None:
    """The shell is in the tree of the disk; when it ends, all is released."""
    before = machine_state()
    failed.configure(extra=f"mount-via = {way}\npost-build-command = false")
    shell = failed.directory / "shell"
    program = "cat etc/os-release; pwd" if way == "loop" else "true"
    shell.write_text(f"#!/bin/sh\n{program}\n")
    shell.chmod(0o755)
    argv = failed.argv("--resume", "--shell-on-error")
    at = argv.index("env") + 2
    if way == "loop":
        argv.insert(at, f"SHELL={shell}")
    else:
        programs = failed.directory / "bin"
        programs.mkdir()
        # What a person would type.
        (programs / "guestfish").write_text(
            '#!/bin/sh\ncase "$*" in *--mount*) echo "cat /etc/os-release" | /usr/bin/guestfish "$@" ;;\n'
            '*) exec /usr/bin/guestfish "$@" ;; esac\n'
        )
        (programs / "guestfish").chmod(0o755)
        argv = [word.replace("PATH=", f"PATH={programs}:") if word.startswith("PATH=") else word for word in argv]
    status, shown = in_terminal(argv, failed.directory)
    assert status == 1
    assert "Stand-in installer 1" in shown
    if way == "loop":
        assert re.search(r"^/tmp/image-factory\.\w+/partition-1\r$", shown, re.MULTILINE)
    assert set(machine_state()) - set(before) == set()


def test_shell_on_error_needs_a_terminal(user_build: Build) -> None:
    user_build.configure()
    done = user_build.run("--shell-on-error", check=False)
    assert done.returncode == 2
    assert user_build.errors(done)[0] == "image-factory: error: --shell-on-error needs a terminal."
