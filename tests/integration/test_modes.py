"""Who may read and write what a build makes, whatever umask it is given; and its children while it runs."""

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import User, run
from .test_build import ZOMBIE_SECONDS, Build, new_build

# In the working directory: others than the user may read none of them.
SECRET = ("disk.raw", "audit.raw", "answers.cfg", "checkpoint.json")


@pytest.fixture(params=[("root", "000"), ("a", "000"), ("root", "077")], ids=" ".join)
def place(request: pytest.FixtureRequest, users: dict[str, User], stand_in: Path) -> Iterator[tuple[Build, str]]:
    name, umask = request.param
    for build in new_build(users[name], request, stand_in):
        yield build, umask


def below(directory: Path) -> Iterator[tuple[Path, int]]:
    """Give what is in *directory* with its mode; files may come and go meanwhile."""
    # Path.rglob() of Debian 12's Python fails at a directory that has gone.
    for place, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(place, name)
            try:
                mode = path.lstat().st_mode
            except OSError:
                continue
            if not stat.S_ISLNK(mode) and not stat.S_ISSOCK(mode):
                yield path, mode


def zombies(pid: int) -> set[str]:
    found = run("ps", "--no-headers", "--ppid", pid, "-o", "pid,stat,comm", check=False).stdout.splitlines()
    return {line for line in found if line.split()[1].startswith("Z")}


def test_modes_and_children(place: tuple[Build, str]) -> None:
    build, umask = place
    build.configure(extra="seal = yes\naudit = yes\nmanifest = yes\nlog-file = yes")
    argv = build.argv("--json", "record.json", "-o", "new/images", "-c", "cache")
    at = argv.index(str(build.user.program))
    argv[at:at] = ["sh", "-c", f'umask {umask}; exec "$@"', "sh"]
    loose, shown, dead = {}, {}, {}
    with (build.directory / "stderr").open("w") as stderr:
        process = subprocess.Popen(argv, cwd=build.directory, stdout=subprocess.PIPE, stderr=stderr, text=True)
    with process:
        while process.poll() is None:
            for path, mode in below(build.directory):
                if mode & 0o022:
                    loose[path] = oct(mode)
                if path.parent.name == ".image-factory-stand-in" and path.name in SECRET and mode & 0o077:
                    shown[path] = oct(mode)
            found = run("pgrep", "-u", build.user.name, "-f", f"^/usr/bin/python3 {build.user.program}", check=False)
            now = {line for pid in found.stdout.split() for line in zombies(int(pid))}
            dead = {line: dead.get(line, time.monotonic()) for line in now}
            assert all(time.monotonic() - since < ZOMBIE_SECONDS for since in dead.values()), dead
            time.sleep(0.1)
    assert process.returncode == 0, build.stderr()
    assert loose == shown == {}
    left = {str(path.relative_to(build.directory)): mode for path, mode in below(build.directory)}
    assert not {path: oct(mode) for path, mode in left.items() if mode & 0o022}
    assert len([path for path in left if path.startswith("new/images/")]) >= 6
    private = [path for path, mode in left.items() if not mode & 0o044]
    own = ("new", "cache", "record.json")
    # How long builds take is for all to see who may enter the cache.
    left.pop("cache/stand-in/.durations.json")
    if umask == "077":
        assert {path for path in left if path.startswith(own)} == {path for path in private if path.startswith(own)}
    else:
        assert not [path for path in private if path.startswith(own) and ".console.log" not in path]
