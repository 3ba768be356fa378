"""Namespaces of a build: what happens in them ends with them, and what forbids them is told."""

import os
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest

from ..bootstrap_scene import Place, new_place
from ..conftest import REPOSITORY, User, run, wait_for
from ..small_archive import Archive

SECONDS = "471211"

# A program that has namespaces, mounts something there and runs something; then what the test says.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
from image_factory.base import interrupts
from image_factory.base.errors import BuildError
from image_factory.inside import namespaces

directory = Path({directory!r})
as_root = os.geteuid() == 0
try:
    with interrupts.handled(), namespaces.entered(directory, as_root=as_root) as inside:
        (directory / "tree").mkdir()
        inside.run("mount", "-t", "tmpfs", "tree", str(directory / "tree"))
        inside.run("sh", "-c", "mkdir {directory}/own && chown 1000 {directory}/own && chmod 700 {directory}/own")
        inside.run("sh", "-c", "sleep {seconds} & touch {directory}/tree/file")
        assert list((directory / "tree").iterdir()) == []
        {body}
except BuildError as error:
    print(error.message)
except ZeroDivisionError:
    print("raised")
namespaces.remove(directory / "own")
print(sorted(path.name for path in directory.iterdir()), (directory / "namespaces.log").exists())
"""
BODIES = {
    "the end": ("pass", ""),
    "an exception": ("raise ZeroDivisionError", "raised"),
    "a time-out": (f"inside.run('sleep', '{SECONDS}', timeout=0.5)", "nsenter did not end within"),
    "the death of what holds them": (
        f"os.kill(inside.pid, signal.SIGKILL); time.sleep(0.2); inside.run('sleep', '{SECONDS}')",
        "nsenter failed with status",
    ),
}


@pytest.fixture(params=["root", "c"])
def user(request: pytest.FixtureRequest, users: dict[str, User]) -> User:
    return users[request.param]


@pytest.fixture
def directory(user: User, request: pytest.FixtureRequest) -> Path:
    return user.directory(f"namespaces-{abs(hash(request.node.name))}")


def argv_of(user: User, directory: Path, body: str) -> list[str]:
    text = textwrap.dedent(PROGRAM).format(
        repository=str(REPOSITORY), directory=str(directory), body=body, seconds=SECONDS
    )
    return user.argv("/usr/bin/python3", "-B", "-c", text)


def running() -> list[str]:
    """Return what runs of the program, also what has ended and nobody has waited for."""
    lines = run("ps", "-eo", "stat,args").stdout.splitlines()
    return [line for line in lines if line.endswith(f"sleep {SECONDS}")]


@pytest.mark.parametrize("name", BODIES)
def test_all_ends_with_them(user: User, directory: Path, name: str) -> None:
    """When the program goes on, nothing is left for it to wait for."""
    body, said = BODIES[name]
    done = run(*argv_of(user, directory, f"{body}"), cwd=directory)
    assert said in done.stdout
    log_stays = name != "the end"
    names = ["namespaces.log", "tree"] if log_stays else ["tree"]
    assert f"{names} {log_stays}" in done.stdout
    assert running() == []


def test_killed(user: User, directory: Path) -> None:
    body = f"inside.run('sleep', '{SECONDS}')"
    with subprocess.Popen(argv_of(user, directory, body), cwd=directory) as process:
        wait_for(lambda: len([line for line in running() if "runuser" not in line]) > 1, "what runs in them")
        children = run("pgrep", "-u", user.name, "-f", f"{directory}").stdout.split()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        process.kill()
    wait_for(lambda: running() == [], "their end")
    assert list((directory / "tree").iterdir()) == []


@pytest.fixture
def user_place(users: dict[str, User], small_archive: Archive) -> Place:
    return new_place(users["c"], small_archive)


def refused(place: Place, argv: list[str], message: str, hint: str) -> None:
    done = run(*argv, check=False, cwd=place.directory)
    said = [line for line in done.stderr.splitlines() if line.startswith("image-factory: ")]
    assert done.returncode == 2, done.stderr
    assert said == [f"image-factory: error: {message}", f"image-factory: hint: {hint}"]
    assert place.left() == [] and not place.out.exists() and not place.cache.exists()


FLAGS = [("--check", "small"), ("small",)]


@pytest.mark.parametrize("flags", FLAGS)
def test_no_range_of_users(user_place: Place, flags: tuple[str, ...]) -> None:
    """In a mount namespace of the test's own, /etc/subuid has another user's only."""
    name = user_place.user.name
    other = user_place.directory / "subuid"
    other.write_text(f"{name}x:100000:65536\n{name}:100000:1000\n")
    argv = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/subuid && exec "$@"', str(other)]
    refused(
        user_place,
        [*argv, *user_place.argv(*flags)],
        f"/etc/subuid has no range of 65536 for {name}.",
        f"Add one: sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}",
    )


@pytest.mark.parametrize("flags", FLAGS)
def test_no_newuidmap(user_place: Place, flags: tuple[str, ...]) -> None:
    hidden = "mount --bind /dev/null /usr/bin/newuidmap"
    refused(
        user_place,
        ["unshare", "--mount", "sh", "-c", f'{hidden} && exec "$@"', "sh", *user_place.argv(*flags)],
        "Missing programs: newuidmap.",
        "Install them: apt-get install uidmap",
    )


@pytest.mark.parametrize("flags", FLAGS)
def test_forbidden_by_sysctl(user_place: Place, flags: tuple[str, ...]) -> None:
    """In a user namespace of the test's own, which has a limit of its own for those below it."""
    forbid = 'read -r go && echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'
    argv = ["unshare", "--user", "--keep-caps", "sh", "-c", forbid, "sh", *user_place.argv(*flags)]
    with subprocess.Popen(
        argv, cwd=user_place.directory, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: own_namespace(process.pid), "the namespace")
        for kind in ("uid", "gid"):
            Path(f"/proc/{process.pid}/{kind}_map").write_text("0 0 4294967295\n")
        _, errors = process.communicate("go\n", timeout=60)
    said = [line for line in errors.splitlines() if line.startswith("image-factory: ")]
    assert process.returncode == 2, errors
    assert said == [
        f"image-factory: error: This machine gives {user_place.user.name} no user namespace, as sysctl "
        "user.max_user_namespaces forbids it.",
        "image-factory: hint: Allow them: sudo sysctl user.max_user_namespaces=15000; a file in /etc/sysctl.d has it "
        "stay.",
    ]
    assert user_place.left() == [] and not user_place.out.exists()


def own_namespace(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user")
