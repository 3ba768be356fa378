"""Machines that are captured over ssh: by root and by an ordinary user, and all that goes wrong on the way."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..capture_scene import Machine, Scene, new_scene, running
from ..conftest import User, run, wait_for
from ..small_archive import Archive
from .test_capture import check_system, in_disk


@pytest.fixture(scope="module")
def machine(base: Path, small_archive: Archive) -> Iterator[Machine]:
    """A machine that was lived in."""
    directory = base / "machine"
    directory.mkdir()
    directory.chmod(0o755)
    with running(small_archive, directory) as found:
        yield found


@pytest.fixture(params=["root", "c"])
def scene(request: pytest.FixtureRequest, users: dict[str, User], machine: Machine) -> Scene:
    """A place of root, and one of a user who has no sudo rule, who know the machine."""
    return known(users[request.param], machine)


@pytest.fixture
def user_scene(users: dict[str, User], machine: Machine) -> Scene:
    return known(users["c"], machine)


def known(user: User, machine: Machine) -> Scene:
    scene = new_scene(user)
    machine.know(scene)
    scene.configure(machine.origin)
    return scene


@pytest.fixture
def program(machine: Machine) -> Iterator[Callable[[str, str], None]]:
    """Have the machine run lines of shell in the place of one of its programs, until the test ends."""
    kept: dict[str, Path] = {}

    def replace(name: str, text: str) -> None:
        path = machine.tree / "usr/bin" / name
        if path.exists():
            kept[name] = path.rename(path.with_name(f"{name}.real"))
        machine.program(name, text)

    yield replace
    for path in machine.tree.glob("usr/bin/*.real"):
        path.rename(path.with_suffix(""))
    for name in ("sudo",):
        (machine.tree / "usr/bin" / name).unlink(missing_ok=True)


def listing(tree: Path) -> str:
    """Return what there is below *tree*, with times and sizes."""
    return run("find", tree, "-xdev", "-printf", "%p %y %m %s %T@ %C@\n").stdout


def test_machine_becomes_a_disk(scene: Scene, machine: Machine) -> None:
    """With what is mounted in it, its owners too; nothing is written there, and no other filesystem is taken."""
    before = listing(machine.tree)
    done = scene.run()
    assert listing(machine.tree) == before
    check_system(scene)
    assert in_disk(scene.disk, "cat /home/ann/notes") == "notes\n"
    assert "User:     0" in in_disk(scene.disk, "stat /home/ann")
    assert in_disk(scene.disk, "cat /data/file") == ""
    assert "What is captured: / (" in done.stderr and "/home (ext4)" in done.stderr
    assert in_disk(scene.disk, "ls /home/lost+found") == ""


def test_mounts_are_chosen(user_scene: Scene, machine: Machine) -> None:
    user_scene.configure(machine.origin, capture_mounts="/")
    done = user_scene.run()
    assert "/home (ext4) is left out: it is not among capture-mounts." in done.stderr
    assert in_disk(user_scene.disk, "stat /home/ann") == ""
    user_scene.configure(machine.origin, capture_mounts="/data")
    assert "/data of ssh://" in user_scene.fail()[0]
    user_scene.configure(machine.origin, capture_mounts="/nowhere")
    said = user_scene.fail()
    assert "has nothing mounted at /nowhere" in said[0] and "/home" in said[1]


def test_swap_files_and_what_changes_are_told(
    user_scene: Scene, machine: Machine, program: Callable[[str, str], None]
) -> None:
    """Memory is in no image, and files that change or vanish are no error."""
    (machine.tree / "srv/swap [1]").write_text("memory")
    program("cat", """printf '%s\\n' 'Filename Type Size Used Priority' '/srv/swap\\040[1] file 8 0 -2'""")
    program(
        "tar",
        '/usr/bin/tar.real "$@"; status=$?; [ "$1" = --create ] || exit $status\n'
        'echo "tar: ./sys: file changed as we read it" >&2\n'
        'for name in a b c d e f; do echo "tar: ./srv/$name: File removed before we read it" >&2; done\nexit 1',
    )
    done = user_scene.run()
    assert "vanished while the system was read: /srv/a, /srv/b, /srv/c, /srv/d, /srv/e and" in done.stderr
    assert in_disk(user_scene.disk, 'stat "/srv/swap [1]"') == ""
    assert in_disk(user_scene.disk, "cat /srv/data") == "lived in\n"


NOT_CREATING, TAR = '[ "$1" != --create ] ||', 'exec /usr/bin/tar.real "$@"'
# What a program of the machine does in its place; the error and the hint.
BAD: dict[str, tuple[dict[str, str], str, str]] = {
    "no tar": ({"tar": "exit 127"}, "has no GNU tar", "Install it there"),
    "busybox's tar": ({"tar": "echo tar \\(busybox\\) 1.35"}, "has no GNU tar", "Install it there"),
    "no findmnt": ({"findmnt": "exit 127"}, "does not say what it has mounted", "findmnt"),
    "findmnt of old": ({"findmnt": "echo findmnt: unknown option --json >&2; exit 1"}, "does not say", "2.27"),
    "lists for mounts": ({"findmnt": "echo '{\"filesystems\": [[]]}'"}, "does not say what it has mounted", "findmnt"),
    "root of a network": (
        {
            "findmnt": 'echo \'{"filesystems": [{"target": "/", "source": "nas:/", "fstype": "nfs4", '
            '"maj:min": "0:1", "fsroot": "/"}]}\''
        },
        "/ of ssh://.* is a filesystem of the network",
        "Capture a copy",
    ),
    "another architecture": ({"dpkg": "echo riscv64"}, "is one of riscv64, and arch is amd64", "arch = riscv64"),
    "unknown architecture": ({"dpkg": "echo m68k"}, "is one of m68k", "No disk can be made"),
    "unreadable files": (
        {"tar": f'{NOT_CREATING} {{ echo "tar: ./x: Read error at byte 0: Input/output error" >&2; exit 2; }}\n{TAR}'},
        "can't be read: ./x: Read error at byte 0: Input/output error",
        "log",
    ),
    "tar that is killed": (
        {"tar": f"{NOT_CREATING} kill -9 $$\n{TAR}"}, "can't be captured|can't be read", "",
    ),
    "full": (
        {"df": "echo 99999999999999999"}, "has .* in its filesystems, and .* are free here", "--output-dir",
    ),
    "sudo that asks": (
        {"id": "echo 1000", "sudo": "echo sudo: a password is required >&2; exit 1"}, "[Ss]udo asks for a password",
        "NOPASSWD",
    ),
    "sudo without a rule": (
        {"id": "echo 1000", "sudo": "echo ann is not in the sudoers file. >&2; exit 1"}, "does not allow", "NOPASSWD",
    ),
    "no sudo": ({"id": "echo 1000"}, "has no sudo|not all that is needed", ""),
    "user of no rights": (
        {"id": "echo 1000", "sudo": 'shift 2; exec "$@"'}, "gives no shell of root's", "Log in as root",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_machine_is_told(
    user_scene: Scene, program: Callable[[str, str], None], name: str
) -> None:
    """In a line with the next move, and nothing is left."""
    programs, message, hint = BAD[name]
    for each, text in programs.items():
        program(each, text)
    said = user_scene.fail()
    assert re.search(message, said[0]), said
    assert re.search(hint, said[1]), said


def test_user_becomes_root_by_sudo(user_scene: Scene, machine: Machine, program: Callable[[str, str], None]) -> None:
    """All that is run there is run by it; it is never to ask."""
    program("id", '[ "$ROOT" ] && echo 0 || echo 1000')
    program("sudo", '[ "$1 $2" = "-n --" ] || exit 1\nshift 2\nROOT=yes exec "$@"')
    user_scene.run()
    check_system(user_scene)


@pytest.mark.parametrize(
    ("key", "message", "hint"),
    [
        ("", "host key of ssh://.* is not known", r"ssh-keyscan -p \d+ 127\.0\.0\.1 >>~/.ssh/known_hosts"),
        ("other", "has another ssh host key", r"ssh-keygen -R '\[127\.0\.0\.1\]:\d+'"),
    ],
)
def test_host_key_has_to_be_known(user_scene: Scene, machine: Machine, key: str, message: str, hint: str) -> None:
    machine.know(user_scene, key)
    before = (user_scene.directory / "known").read_text()
    said = user_scene.fail()
    assert re.search(message, said[0]) and re.search(hint, said[1]), said
    assert (user_scene.directory / "known").read_text() == before


def test_who_is_not_let_in_is_told(user_scene: Scene, machine: Machine) -> None:
    shutil.copy(machine.directory / "other", user_scene.directory / "key")
    said = user_scene.fail()
    assert "does not let the user in" in said[0] and "key" in said[1], said
    user_scene.configure("ssh://root@127.0.0.1:1")
    assert "can't be reached" in user_scene.fail()[0]


@pytest.mark.parametrize("kind", ["session", "build"])
def test_host_that_goes_away_leaves_nothing(
    user_scene: Scene, machine: Machine, program: Callable[[str, str], None], kind: str
) -> None:
    """In the middle of a stream; and when the build is stopped there, nothing goes on on the host."""
    program("tar", '/usr/bin/tar.real "$@"\n[ "$1" != --create ] || { echo >/tmp/begun; exec sleep 987; }')
    begun = machine.tree / "tmp/begun"
    begun.unlink(missing_ok=True)
    with subprocess.Popen(user_scene.argv(), stderr=subprocess.PIPE, text=True) as build:
        wait_for(begun.exists, "the stream")
        if kind == "session":
            run("pkill", "-KILL", "-f", "^sshd: root")
        else:
            os.kill(user_scene.user.build_process(), signal.SIGTERM)
        said = build.communicate()[1]
    begun.unlink()
    assert build.returncode == (1 if kind == "session" else 143), said
    if kind == "session":
        assert re.search(r"error: ssh://.* has gone away\.\n.*hint: .*nothing is left on it", said), said
    assert user_scene.left() == []
    run("pkill", "-KILL", "-f", "sleep 987", check=False)


def test_dry_run_asks_nothing(user_scene: Scene, machine: Machine) -> None:
    """And shows what would be run."""
    os.unlink(user_scene.directory / "key")
    done = user_scene.run("--dry-run", "small")
    assert "findmnt --json" in done.stdout + done.stderr
    assert "--one-file-system --numeric-owner" in done.stdout + done.stderr
