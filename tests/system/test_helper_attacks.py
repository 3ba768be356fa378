"""Attacks on image-factory-sudo-helper: what the caller changes while it runs, its limits, signals, images.

The calls are real ones of ordinary users through sudo, and afterwards the machine is as before.
"""

import fcntl
import hashlib
import os
import pty
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from ..conftest import PATIENCE, machine_state, run, wait_for
from ..helper_scene import Scene, own_mount, scene

__all__ = ["scene"]


def refused(done: subprocess.CompletedProcess[str]) -> bool:
    """Return whether the call was refused; if so, it has to be in one line."""
    if done.returncode == 0:
        assert done.stderr == ""
        return False
    assert done.returncode == 1
    assert done.stderr.startswith("image-factory-sudo-helper: ")
    assert (done.stderr.count("\n"), done.stderr.strip().isprintable()) == (1, True)
    return True


@pytest.fixture
def image(scene: Scene) -> Iterator[Path]:
    """A copy of user a's image, in a directory two levels deep."""
    user = scene.users["a"]
    user.run("mkdir", "-p", user.home / "one/two")
    path = user.home / "one/two/image.raw"
    user.run("cp", scene.images["a"], path)
    yield path
    shutil.rmtree(user.home / "one")


@pytest.fixture
def point(scene: Scene) -> Iterator[Path]:
    """An empty directory of user a's, for mounts; at the end the machine is as it was before."""
    user, before = scene.users["a"], machine_state()
    top = Path(user.run("mktemp", "-d", "/tmp/image-factory.XXXXXXXX").stdout.strip())
    point = top / "sub/tree"
    user.run("mkdir", "-m", "700", "-p", point.parent, point)
    yield point
    # It needs no help of root's, also after a killed call.
    user.run("rm", "-rf", top)
    assert set(machine_state()) - set(before) == set()


def through_link(path: Path, position: int) -> Path:
    """Make a link beside component *position* of *path*, and return the path that leads through it."""
    target = Path(*path.parts[: position + 1])
    link = target.with_name(f"{target.name}-link")
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    return link.joinpath(*path.parts[position + 1 :])


@pytest.mark.parametrize("from_end", [1, 2, 3, 4, 5])
def test_link_in_the_way_to_the_image(scene: Scene, image: Path, point: Path, from_end: int) -> None:
    path = through_link(image, len(image.parts) - from_end)
    assert path.samefile(image)
    assert refused(scene.helper(*scene.mount_words(path, point)))
    if from_end >= 4:
        Path(*path.parts[: len(path.parts) - from_end + 1]).unlink()


@pytest.mark.parametrize("position", [2, 3, 4])
@pytest.mark.parametrize(
    "verb",
    [
        "mount",
        "mount-image",
        "umount",
        "show",
        "list",
        "read",
        "remove",
        "rename",
        "truncate",
        "write",
        "look",
        "put",
        "trim",
        "usage",
        "keys",
        "contents",
        "chmod",
    ],
)
def test_link_in_the_way_to_the_mount_point(scene: Scene, image: Path, point: Path, verb: str, position: int) -> None:
    path = through_link(point, position)
    words = {
        "mount": ["mount", "<LOOP>", str(path)],
        "mount-image": scene.mount_words(image, path),
        "umount": ["umount", str(path)],
        "show": ["show", str(path), "root/install.log"],
        "list": ["list", str(path), "root/install.log"],
        "read": ["read", str(path), "root/install.log"],
        "remove": ["remove", str(path), "root/install.log"],
        "rename": ["rename", str(path), "root/install.log", "x"],
        "truncate": ["truncate", str(path), "root/install.log"],
        "write": ["write", str(path), "0644", "root/install.log"],
        "look": ["look", str(path)],
        "put": ["put", str(path)],
        "trim": ["trim", str(path)],
        "usage": ["usage", str(path)],
        "keys": ["keys", str(path)],
        "contents": ["contents", f":{path}"],
        "chmod": ["chmod", "o+r", f"{path}/root/install.log"],
    }
    if not verb.startswith("mount"):
        assert not refused(scene.helper(*scene.mount_words(image, point)))
    before = scene.outside()
    try:
        assert refused(scene.helper(*map(scene.fill_in, words[verb])))
        assert scene.outside() == before
    finally:
        run("umount", point, check=False)
        run("chown", scene.users["a"].name, point)
        Path(*path.parts[: position + 1]).unlink()


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_link_in_the_way_inside_the_mount(scene: Scene, position: int) -> None:
    """What names one file is refused, show shows nothing, and remove removes a link at the end alone."""
    with own_mount(scene) as mounted:
        file = mounted / "var/log/installer/syslog"
        path = through_link(file, len(mounted.parts) + position).relative_to(mounted)
        for words in (("chmod", "o+r"), ("chmod", "-R", "o+r")):
            assert refused(scene.helper(*words, f"{mounted}/{path}"))
        for verb in ("show", "read", "truncate"):
            done = scene.helper(verb, str(mounted), str(path))
            assert (done.returncode, done.stdout) == (0, "")
        listed = scene.helper("list", str(mounted), str(path)).stdout
        assert listed == (f'["{path}", "link"]\n' if position == 3 else "")
        assert refused(scene.helper("write", str(mounted), "0644", str(path), stdin=b"new"))
        assert refused(scene.helper("write", str(mounted), "0644", f"{path}/x/y", stdin=b"new"))
        for name in (str(path), f"{path}/x"):
            item = f'["file", "{name}", 420, 0, 0, 0, 3]\nnew'.encode()
            assert refused(scene.helper("put", str(mounted), stdin=item))
            looked = scene.helper("look", str(mounted), stdin=f'"{name}"\n'.encode()).stdout
            assert looked.startswith(f'["{path}", "link", ') if position == 3 and name == str(path) else looked == ""
        assert refused(scene.helper("rename", str(mounted), str(path), "x")) == (position != 3)
        if position == 3:
            # The link itself got another name.
            scene.helper("rename", str(mounted), str(path.with_name("x")), path.name)
        removed = scene.helper("remove", str(mounted), str(path)).stdout
        assert removed == (f"1 0 {path}\n" if position == 3 else "")
        assert file.read_text() == "line one\nline two"


# The program of the race below: exchanges each pair of names and back, until its input ends.
SWAPPER = """
import ctypes, select, sys
libc, count = ctypes.CDLL(None), 0
pairs = [tuple(word.encode() for word in pair.split("=")) for pair in sys.argv[1:]]
print("swapping", flush=True)
while not select.select([0], [], [], 0)[0]:
    for one, other in pairs:
        for _ in range(2):
            while libc.renameat2(-100, one, -100, other, 2):
                pass
            count += 1
print(count)
"""


def test_race(scene: Scene, image: Path, point: Path) -> None:
    """Directories, the image and a directory of the guest's are links 10,000 times and more, while calls are made."""
    user, outside = scene.users["a"], scene.outside()
    others = {
        image: scene.images["b"],
        image.parent: scene.images["b"].parent,
        point.parent: scene.mounts["b"].parent,
        point.parents[1]: scene.victim.parent,
    }
    for path, target in others.items():
        user.run("ln", "-s", target, f"{path}-link")
    swapper = subprocess.Popen(
        user.argv(sys.executable, "-c", SWAPPER, *(f"{path}={path}-link" for path in others)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert swapper.stdout is not None
    assert swapper.stdout.readline() == "swapping\n"
    for number in range(25):
        for words in (
            scene.mount_words(image, point),
            ["show", str(point), "root/install.log"],
            ["read", str(point), "root/install.log"],
            ["write", str(point), "0644", "etc/fstab"],
            ["write", str(point), "0644", f"etc/new{number}/file"],
            ["rename", str(point), f"etc/new{number}", f"x{number}"],
            ["truncate", str(point), "root/install.log"],
            ["remove", str(point), "var/log/installer"],
            ["chmod", "-R", "o+rwx", f"{point}/root"],
            ["umount", str(point)],
        ):
            done = scene.helper(*words)
            assert refused(done) or "secret" not in done.stdout
    count = int(swapper.communicate("")[0])
    assert swapper.returncode == 0
    assert count >= 10_000
    if os.path.ismount(point):
        assert not refused(scene.helper("umount", str(point)))
    for path in others:
        Path(f"{path}-link").unlink()
    assert scene.outside() == outside


# Started by the user's shell, with $IMAGE and $HOME: what is done before the call.
SURROUNDINGS = {
    "file size": "ulimit -f 0;",
    "open files, 6": "ulimit -n 6;",
    "open files, 20": "ulimit -n 20;",
    "address space, 20 MB": "ulimit -v 20000;",
    "address space, 60 MB": "ulimit -v 60000;",
    "data, none": "ulimit -d 0;",
    "processor time": "ulimit -t 1;",
    "processes": "ulimit -p 0;",
    "stack, 16 kB": "ulimit -s 16;",
    "stack, 256 kB": "ulimit -s 256;",
    "locked memory": "ulimit -l 0;",
    "core files": "ulimit -c 0;",
    "deleted directory": "mkdir $HOME/gone; cd $HOME/gone; rmdir $HOME/gone;",
    "forbidden directory": "mkdir $HOME/shut; cd $HOME/shut; chmod 0 .; rmdir $HOME/shut;",
    "umask 0": "umask 0;",
    "umask 777": "umask 777;",
    "open descriptors": "exec 3<>$IMAGE 4</tmp 9<>$IMAGE;",
    "stdin is the image": "exec <$IMAGE;",
    "all are the image": "exec <>$IMAGE >&0 2>&0;",
    "no stdin": "exec <&-;",
    "full disk": "exec >/dev/full;",
    "full disk for errors": "exec 2>/dev/full;",
    "signals ignored": "trap '' HUP INT QUIT PIPE ALRM TERM CHLD USR1 TSTP XFSZ;",
    "signals blocked": "set -- env --block-signal;",
    "nice": "set -- nice -n 19;",
    "ionice": "set -- ionice -c 3;",
    "idle": "set -- chrt -i 0;",
    "personality": "set -- setarch -R --uname-2.6;",
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings(scene: Scene, image: Path, point: Path, name: str) -> None:
    """In odd surroundings a call succeeds or fails as a whole, and those that aren't bad don't matter."""
    user, outside = scene.users["a"], scene.outside()

    def call(*words: str) -> int:
        script = f'IMAGE=$1 HELPER=$2; shift 2; W="$*"; shift $#; {SURROUNDINGS[name]} exec "$@" sudo -n $HELPER $W'
        line = user.argv("sh", "-c", script, "sh", image, user.helper, *words)
        return subprocess.run(
            line, stdin=subprocess.DEVNULL, capture_output=True, cwd=user.home, timeout=PATIENCE
        ).returncode

    mounted = call(*scene.mount_words(image, point)) == 0
    assert mounted == os.path.ismount(point)
    assert mounted or point.owner() == user.name
    if not mounted:
        assert name.split(",")[0] in ("open files", "address space", "data", "stack", "processor time")
        assert not refused(scene.helper(*scene.mount_words(image, point)))
    call("show", str(point), "root/install.log")
    removed = call("remove", str(point), "root/install.log") == 0
    assert removed <= (not (point / "root/install.log").exists())
    unmounted = call("umount", str(point)) == 0
    assert unmounted != os.path.ismount(point)
    if not unmounted:
        assert not refused(scene.helper("umount", str(point)))
    assert (point.owner(), point.stat().st_mode & 0o7777) == (user.name, 0o700)
    assert scene.outside() == outside
    run("e2fsck", "-fn", image)


def test_output_that_can_not_be_written(scene: Scene) -> None:
    helper = f"sudo -n {scene.users['a'].helper} version"
    for line in (f"exec {helper} >/dev/full", f"{helper} 3>&1 >&4 4>&- 4>/dev/full", f"({helper}; exit $?) >/dev/full"):
        done = scene.users["a"].run("sh", "-c", f"exec 4>/dev/full; {line}", check=False)
        assert refused(done)
    reader, writer = os.pipe()
    os.close(reader)
    line = scene.users["a"].argv("sudo", "-n", scene.users["a"].helper, "version")
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    os.close(writer)
    assert refused(done)


def test_descriptors_are_not_kept(scene: Scene) -> None:
    """sudo closes them; the caller can't have it keep some."""
    user = scene.users["a"]
    assert user.run("sudo", "-n", "-C", "9", user.helper, "version", check=False).returncode == 1


def test_not_from_a_namespace(scene: Scene) -> None:
    """There sudo doesn't become root."""
    user = scene.users["a"]
    for options in (["-Ur"], ["-Urm"], ["-Urmpf"], ["-Uc"]):
        assert user.run("unshare", *options, "sudo", "-n", user.helper, "version", check=False).returncode != 0


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def start_helper(scene: Scene, words: list[str]) -> Callable[[], None]:
    """Start a call; return what ends the helper with SIGKILL."""
    user = scene.users["a"]
    variables = {"SUDO_UID": str(user.uid), "SUDO_GID": str(user.uid), "PATH": "/usr/bin"}
    process = subprocess.Popen(
        [user.helper, *words], env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    return partial(kill, process)


def start_sudo(scene: Scene, words: list[str]) -> Callable[[], None]:
    """Start a call; return what ends sudo with SIGKILL, while the helper goes on."""
    user = scene.users["a"]
    process = subprocess.Popen(
        ["sudo", "-n", user.helper, *words],
        user=user.uid, group=user.uid, extra_groups=[],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    return partial(kill, process)


def start_in_terminal(scene: Scene, words: list[str]) -> Callable[[], None]:
    """Start a call in a terminal; return what types Ctrl-\\ and Ctrl-C there."""
    user = scene.users["a"]
    terminal, slave = pty.openpty()
    process = subprocess.Popen(
        user.argv("sudo", "-n", user.helper, *words),
        stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)

    def interrupt() -> None:
        os.write(terminal, b"\x1c\x03")
        process.wait(60)
        os.close(terminal)

    return interrupt


@pytest.mark.parametrize(("start", "times"), [(start_helper, 100), (start_sudo, 20), (start_in_terminal, 20)])
def test_ended_at_any_time(
    scene: Scene,
    image: Path,
    point: Path,
    start: Callable[[Scene, list[str]], Callable[[], None]],
    times: int,
) -> None:
    """Whatever is ended when, the next calls get all back, or the user removes the directory."""
    user, outside = scene.users["a"], scene.outside()
    delays = random.Random(times)
    began = time.monotonic()
    assert not refused(scene.helper(*scene.mount_words(image, point)))
    duration = time.monotonic() - began
    verbs = [["remove", str(point), "usr"], ["trim", str(point)], ["umount", str(point)], ["umount", str(point)]]
    for number in range(times):
        words = verbs[number % len(verbs)] if os.path.ismount(point) else scene.mount_words(image, point)
        end = start(scene, words)
        time.sleep(delays.uniform(0, duration))
        end()
        wait_for(lambda: not calls(point), "the helper to end")
        if not os.path.ismount(point) and point.owner() != user.name:
            user.run("rmdir", point)
            user.run("mkdir", "-m", "700", point)
    if os.path.ismount(point):
        assert not refused(scene.helper("umount", str(point)))
    assert scene.outside() == outside
    run("e2fsck", "-fp", image)


def calls(point: Path) -> list[str]:
    """Return the helpers that have *point* as an argument."""
    processes = run("ps", "-eo", "args").stdout.splitlines()
    return [line for line in processes if "image-factory-sudo-helper" in line and str(point) in line]


@pytest.mark.parametrize("name", ["truncated", "overwritten", "removed", "replaced", "punched"])
def test_image_changes_while_mounted(scene: Scene, image: Path, point: Path, name: str) -> None:
    """The calls may fail, in one line each; umount never does."""
    user, outside = scene.users["a"], scene.outside()
    assert not refused(scene.helper(*scene.mount_words(image, point)))
    for words in {
        "truncated": [["truncate", "-s", "0", image]],
        "overwritten": [["dd", "if=/dev/urandom", f"of={image}", "bs=1M", "count=16", "conv=notrunc"]],
        "removed": [["rm", image]],
        "replaced": [["cp", scene.images["a"], f"{image}.new"], ["mv", f"{image}.new", image]],
        "punched": [["fallocate", "--punch-hole", "--offset", "4096", "--length", "8M", image]],
    }[name]:
        user.run(*words)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    for call in (
        ("show", str(point), "var", "root", "etc"),
        ("list", str(point), "*", "var/*", "root/*"),
        ("read", str(point), "etc/*", "root/*"),
        ("write", str(point), "0644", "etc/fstab"),
        ("write", str(point), "0644", "etc/a/b/c"),
        ("rename", str(point), "etc/fstab", "x"),
        ("truncate", str(point), "var/log", "root"),
        ("remove", str(point), "var/log", "root"),
        ("chmod", "-R", "o+rwx", f"{point}/usr"),
        ("usage", str(point)),
        ("keys", str(point)),
        ("trim", str(point)),
    ):
        refused(scene.helper(*call))
    assert not refused(scene.helper("umount", str(point)))
    assert scene.outside() == outside


def test_special_files(scene: Scene) -> None:
    with own_mount(scene) as mounted:
        log = mounted / "var/log"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(log / "zz-socket"))
        for option in ("i", "a"):
            (log / f"zz-{option}").write_text("kept\n")
            run("chattr", f"+{option}", log / f"zz-{option}")
        assert scene.helper("show", str(mounted), "var/log/zz*").stdout == (
            "==> /var/log/zz-a <==\nkept\n==> /var/log/zz-i <==\nkept\n"
        )
        for option in ("i", "a"):
            done = scene.helper("chmod", "o+w", f"{log}/zz-{option}")
            assert refused(done)
            assert "Operation not permitted" in done.stderr
        assert refused(scene.helper("chmod", "o+w", f"{log}/zz-socket"))
        assert refused(scene.helper("write", str(mounted), "0644", "var/log/zz-socket"))
        assert scene.helper("list", str(mounted), "var/log/zz-s*").stdout == '["var/log/zz-socket", "other"]\n'
        assert scene.helper("remove", str(mounted), "var/log/zz*").stdout.splitlines() == [
            "1 5 var/log/zz-a", "1 5 var/log/zz-i", "1 0 var/log/zz-socket"
        ]  # fmt: skip


def test_show_is_bounded(scene: Scene) -> None:
    mib, tib = 1 << 20, 1 << 40
    with own_mount(scene) as mounted:
        (mounted / "etc/long").touch()
        os.truncate(mounted / "etc/long", tib)
        with (mounted / "etc/long").open("ab") as file:
            file.write(b"the end\n")
        done = scene.helper("show", str(mounted), "etc/long")
        assert done.stdout == (
            f"==> /etc/long <==\n... {tib + 8 - mib} bytes are not shown.\n" + "\0" * (mib - 8) + "the end\n"
        )
        (mounted / "many").mkdir()
        for number in range(40):
            (mounted / f"many/{number:02}").touch()
            os.truncate(mounted / f"many/{number:02}", tib)
        done = scene.helper("show", str(mounted), "many", "etc/long")
        assert done.returncode == 0
        assert done.stdout.endswith("\0\n... The other files are not shown.\n")
        assert 15 * mib < len(done.stdout) < 16 * mib


def test_read_is_bounded(scene: Scene) -> None:
    with own_mount(scene) as mounted:
        (mounted / "many").mkdir()
        for number in range(20):
            (mounted / f"many/{number:02}").touch()
            os.truncate(mounted / f"many/{number:02}", 1 << 20)
        assert refused(scene.helper("read", str(mounted), "many/*"))
        done = scene.helper("read", str(mounted), "many/0*")
        assert (done.returncode, done.stdout.count("\n")) == (0, 10)
        os.truncate(mounted / "many/00", (1 << 20) + 1)
        assert scene.helper("read", str(mounted), "many/00").stdout == ""
        # What is a file full of holes says.
        os.truncate(mounted / "many/01", 1 << 40)
        assert scene.helper("truncate", str(mounted), "many/01").stdout == "1 4096 many/01\n"


def test_write_with_a_limit_of_the_caller_s(scene: Scene) -> None:
    """A file is never written in part: all of it is, or, where root may not lift the limit, nothing."""
    user = scene.users["a"]
    with own_mount(scene) as mounted:
        (mounted / "etc/fstab").write_text("before")
        for option, may_be_refused in (("-S", False), ("-H", True)):
            script = f"ulimit {option} -f 1; head -c 100000 /dev/zero | sudo -n $1 write $2 0644 $3"
            for name in ("etc/fstab", f"etc/new{option}"):
                done = user.run("sh", "-c", script, "sh", user.helper, mounted, name, check=False)
                size = (mounted / name).stat().st_size if (mounted / name).exists() else 0
                assert size == 100_000 or (refused(done) and may_be_refused and size in (0, 6))
            (mounted / "etc/fstab").write_text("before")


def test_write_to_a_full_disk(scene: Scene) -> None:
    """A file is longer only when there is room."""
    with own_mount(scene) as mounted:
        (mounted / "etc/fstab").write_text("kept\n")
        with pytest.raises(OSError, match="No space left"), (mounted / "full").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        run("sh", "-c", f"dd if=/dev/zero of={mounted}/full2 bs=1k 2>/dev/null || true")
        assert refused(scene.helper("write", str(mounted), "0644", "etc/fstab", stdin=bytes(1 << 20)))
        assert refused(scene.helper("write", str(mounted), "0644", "etc/new", stdin=bytes(1 << 20)))
        item = b'["file", "etc/put", 420, 0, 0, 0, 1048576]\n' + bytes(1 << 20)
        done = scene.helper("put", str(mounted), stdin=item)
        assert refused(done) and "No space left on device" in done.stderr


@pytest.mark.parametrize(
    "uid", ["", "-1", "+0", " 0", "0x0", "1e3", "0\n", "\u0660", "9" * 11, "0;id", "root", "1000 0"]
)
def test_bad_number_of_the_caller(scene: Scene, uid: str) -> None:
    helper = scene.users["a"].helper
    for variables in ({"SUDO_UID": uid, "SUDO_GID": "0"}, {"SUDO_UID": "0", "SUDO_GID": uid}, {"SUDO_UID": "0"}):
        done = subprocess.run(
            [helper, "umount", scene.mounts["a"]], env={"PATH": "/usr/bin", **variables}, capture_output=True, text=True
        )
        assert refused(done)
        assert "sudo didn't say who called it" in done.stderr


@pytest.mark.parametrize("uid", ["54321", "4294967295", "4294967296", "9999999999"])
def test_caller_who_is_no_user(scene: Scene, image: Path, point: Path, uid: str) -> None:
    before = scene.outside()
    for words in (scene.mount_words(image, point), ["umount", str(scene.mounts["a"])]):
        variables = {"PATH": "/usr/bin", "SUDO_UID": uid, "SUDO_GID": uid}
        done = subprocess.run([scene.users["a"].helper, *words], env=variables, capture_output=True, text=True)
        assert refused(done)
    assert scene.outside() == before


@pytest.mark.parametrize("name", ["deleted", "newline", "link", "blank at the end"])
def test_names_of_what_is_attached(scene: Scene, image: Path, point: Path, name: str) -> None:
    """The kernel's name of a loop device's file is only taken for a hint."""
    user = scene.users["a"]
    path = image.with_name({"newline": "x\ny", "blank at the end": "x "}.get(name, "x"))
    # Root's file, where user a may change names.
    run("cp", image, path)
    device = run("losetup", "--find", "--show", path).stdout.strip()
    try:
        if name == "deleted":
            user.run("rm", "-f", path)
            user.run("cp", image, f"{path} (deleted)")
        elif name == "link":
            user.run("mv", path, f"{path}-away")
            user.run("ln", "-s", image, path)
        done = scene.helper("mount", device, str(point))
        assert refused(done)
        assert "not a regular file of yours" in done.stderr
    finally:
        run("losetup", "--detach", device)


def test_directory_is_one_call_s(scene: Scene, image: Path, point: Path) -> None:
    user = scene.users["a"]
    done = user.run("flock", point, "sudo", "-n", user.helper, *scene.mount_words(image, point), check=False)
    assert refused(done)
    assert point.owner() == user.name


@pytest.fixture
def disk(scene: Scene) -> Iterator[tuple[Path, str]]:
    """A disk of root's that is not mounted, and its device."""
    path = scene.users["root"].home / "disk.raw"
    run("truncate", "-s", "128M", path)
    device = run("losetup", "--find", "--show", path).stdout.strip()
    yield path, device
    run("losetup", "--detach", device)
    path.unlink()


def big_words(image: Path, point: Path) -> list[str]:
    return ["mount-image", str(image), "0", str(image.stat().st_size), str(point)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_btrfs_that_names_another_device(scene: Scene, image: Path, point: Path, disk: tuple[Path, str]) -> None:
    """The kernel has seen root's disk; an image that claims to be of the same filesystem doesn't get at it."""
    run("truncate", "-s", "128M", image)
    second = run("losetup", "--find", "--show", image).stdout.strip()
    try:
        run("mkfs.btrfs", "-q", "-f", "-d", "single", "-m", "raid1", disk[1], second)
    finally:
        run("losetup", "--detach", second)
    run("btrfs", "device", "scan", disk[1])
    try:
        before = digest(disk[0])
        done = scene.helper(*big_words(image, point))
        assert refused(done)
        assert "another device" in done.stderr
        assert digest(disk[0]) == before
    finally:
        run("btrfs", "device", "scan", "--forget", disk[1])
        run("wipefs", "-a", disk[0])
    run("mkfs.btrfs", "-q", "-f", image)
    assert not refused(scene.helper(*big_words(image, point)))
    assert not refused(scene.helper("umount", str(point)))


def test_journal_on_another_device(scene: Scene, image: Path, point: Path, disk: tuple[Path, str]) -> None:
    run("mke2fs", "-q", "-F", "-O", "journal_dev", disk[1])
    run("mke2fs", "-q", "-F", "-J", f"device={disk[1]}", image)
    before = digest(disk[0])
    done = scene.helper(*big_words(image, point))
    assert refused(done)
    assert "its journal is on another device" in done.stderr
    assert digest(disk[0]) == before


# Of an ext filesystem's superblock: where it is, and the bytes that reach out of the image, or have the kernel wait.
SUPERBLOCK = 1024
FEATURES, JOURNAL, OPTIONS = 0x60, 0xE4, 0x200
REACHING_OUT = {
    "journal by its number": (OPTIONS, b"journal_dev=DEVICE", "mount options"),
    "journal by its path": (OPTIONS, b"journal_path=/dev/loop0", "mount options"),
    "harmless option": (OPTIONS, b"nodelalloc", "mount options"),
    "option after an empty one": (OPTIONS, b",journal_dev=DEVICE", "mount options"),
    "option after the end": (OPTIONS, b"\0journal_dev=DEVICE", "mount options"),
    "journal's number": (JOURNAL, b"NUMBER", "its journal is on another device"),
    "journal device": (FEATURES, b"\x08", "its journal is on another device"),
    "multiple mount protection": (FEATURES + 1, b"\x01", "multiple mount protection"),
}


@pytest.fixture
def with_journal_elsewhere(image: Path, disk: tuple[Path, str]) -> Path:
    """The image has a filesystem whose journal is on root's disk, but it does not say so."""
    run("mke2fs", "-q", "-F", "-O", "journal_dev", disk[1])
    run("mke2fs", "-q", "-F", "-J", f"device={disk[1]}", image)
    change(image, JOURNAL, bytes(4))
    return image


def change(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(SUPERBLOCK + offset)
        file.write(data)


def filled_in(data: bytes, device: str) -> bytes:
    """Return *data* with the number of *device*, as text and as the superblock has it."""
    number = os.stat(device).st_rdev
    return data.replace(b"DEVICE", f"{number:#x}".encode()).replace(b"NUMBER", struct.pack("<I", number))


@pytest.mark.parametrize("name", REACHING_OUT)
def test_superblock_that_reaches_out(
    scene: Scene, with_journal_elsewhere: Path, point: Path, disk: tuple[Path, str], name: str
) -> None:
    offset, data, reason = REACHING_OUT[name]
    change(with_journal_elsewhere, offset, filled_in(data, disk[1]))
    before, outside = digest(disk[0]), scene.outside()
    done = scene.helper(*big_words(with_journal_elsewhere, point))
    assert refused(done)
    assert reason in done.stderr
    assert (digest(disk[0]), scene.outside()) == (before, outside)


@pytest.mark.parametrize("name", ["log", "realtime"])
def test_xfs_with_another_device(scene: Scene, image: Path, point: Path, disk: tuple[Path, str], name: str) -> None:
    run("truncate", "-s", "400M", image)
    option = ["-l", f"logdev={disk[1]}"] if name == "log" else ["-r", f"rtdev={disk[1]}"]
    run("mkfs.xfs", "-q", "-f", *option, image)
    before = digest(disk[0])
    done = scene.helper(*big_words(image, point))
    assert refused(done)
    assert {"log": "its log is on another device", "realtime": "it has a realtime device"}[name] in done.stderr
    assert digest(disk[0]) == before


def test_btrfs_that_others_grow_from(scene: Scene, image: Path, point: Path) -> None:
    run("truncate", "-s", "128M", image)
    run("mkfs.btrfs", "-q", "-f", image)
    run("btrfstune", "-S", "1", image)
    done = scene.helper(*big_words(image, point))
    assert refused(done)
    assert "doesn't mount its btrfs" in done.stderr


def changed_helper(scene: Scene, changes: dict[str, str]) -> list[str]:
    """Return the command of a copy of the helper with *changes* of its text, as root in the name of user a."""
    user = scene.users["a"]
    text = user.helper.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    path = scene.users["root"].home / "image-factory-sudo-helper"
    path.write_text(text)
    path.chmod(0o755)
    return ["env", "-i", "PATH=/usr/bin", f"SUDO_UID={user.uid}", f"SUDO_GID={user.uid}", str(path)]


@pytest.mark.parametrize("end", ["signal", "reader", "deadline", "killed"])
def test_mount_that_the_kernel_does_not_end(scene: Scene, image: Path, point: Path, end: str) -> None:
    """It goes with its caller: here the kernel waits for another machine for 22 s, as it is not refused before."""
    run("mke2fs", "-q", "-F", "-b", "1024", "-O", "mmp", "-E", "mmp_update_interval=1", image)
    with image.open("r+b") as file:
        # s_mmp_block; the number there says that another machine has it mounted.
        file.seek(SUPERBLOCK + 0x168)
        block = int.from_bytes(file.read(8), "little")
        file.seek(1024 * block + 4)
        file.write(b"\1")
    helper = changed_helper(
        scene, {"EXT_MMP = 0x100": "EXT_MMP = 0"} | ({"= 120.0": "= 0.5"} if end == "deadline" else {})
    )
    process = subprocess.Popen(
        [*helper, *big_words(image, point)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    if end != "deadline":
        wait_for(lambda: waits_in_the_kernel(process.pid), "the mount")
    if end == "signal":
        process.terminate()
    elif end == "reader":
        process.stdout.close()
    elif end == "killed":
        process.kill()
    said = process.stderr.read()
    assert process.wait() == (-9 if end == "killed" else 1)
    reason = {
        "signal": "it was stopped by SIGTERM",
        "reader": "nobody waits for it any more",
        "deadline": "the kernel did not mount it in 0 s",
        "killed": "",
    }
    assert reason[end] in said
    wait_for(lambda: not calls(point), "the end of the mount")
    process.stdout.close()
    process.stderr.close()
    if end == "killed":
        # See the manual: what it took is the user's to remove.
        scene.users["a"].run("rmdir", point)


def waits_in_the_kernel(parent: int) -> bool:
    """Return whether a child of *parent* sleeps in the call with which it mounts."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return any(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "S" for child in children)


def test_directories_that_are_linked_into_each_other(scene: Scene, image: Path, point: Path) -> None:
    """There are 2**30 ways to the last one; each is counted once."""
    run("mke2fs", "-q", "-F", "-b", "1024", image)
    lines = [f"mkdir d{number}" for number in range(31)]
    lines += [f"link d{number + 1} d{number}/{name}" for number in range(30) for name in "ab"]
    script = image.with_name("script")
    script.write_text("\n".join(lines))
    run("debugfs", "-w", "-f", script, image)
    assert not refused(scene.helper(*big_words(image, point)))
    done = scene.helper("usage", str(point))
    sizes = {name: int(size) for size, name in map(str.split, done.stdout.splitlines())}
    assert (done.returncode, sizes.pop("lost+found")) == (0, 12 << 10)
    assert sizes == {".": 0, "d0": 31 << 10} | {f"d{number}": 0 for number in range(1, 31)}
    assert not refused(scene.helper("umount", str(point)))


def test_more_entries_than_are_looked_at(scene: Scene) -> None:
    """The limit is on all that a call looks at, in whatever directories they are; a name costs nothing."""
    helper = changed_helper(
        scene, {"ENTRIES = 1 << 20": "ENTRIES = 20", "KEYS_ENTRIES = 4_000_000": "KEYS_ENTRIES = 20"}
    )
    with own_mount(scene) as mounted:
        for directory in ("one", "two", "two/three"):
            (mounted / "var/log/installer" / directory).mkdir()
            for number in range(8):
                (mounted / "var/log/installer" / directory / f"{number}").write_text("text\n")
        for words in (
            ("list", str(mounted), *(["var/log/installer/one/*"] * 3)),
            ("show", str(mounted), "var/log/installer"),
            ("read", str(mounted), *(["var/log/installer/two/*"] * 3)),
            ("truncate", str(mounted), "var/log/installer"),
            ("usage", str(mounted), "var"),
            ("keys", str(mounted)),
            ("chmod", "-R", "o+r", f"{mounted}/var/log/installer"),
            ("remove", str(mounted), "var/log/installer"),
        ):
            done = subprocess.run([*helper, *words], capture_output=True, text=True)
            assert done.returncode == 1
            assert "it has more than 20 entries" in done.stderr
        names = [f"var/log/installer/two/three/{number}" for number in range(8)]
        done = subprocess.run([*helper, "read", str(mounted), *names * 5], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", ["usage", "keys"])
def test_call_that_nobody_reads_ends(scene: Scene, verb: str) -> None:
    """Its caller can't signal root: else the mount would be busy when it is to go."""
    with own_mount(scene) as mounted:
        argv = scene.users["a"].argv("sudo", "-n", scene.users["a"].helper, verb, mounted)
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        process.stderr.close()
        assert (process.wait(), "nobody waits for it any more" in said) == (1, True)


def test_images_that_a_namespace_holds(scene: Scene, image: Path, point: Path) -> None:
    """They count, and the refusal names who holds them."""
    helper = changed_helper(scene, {"LOOP_DEVICES = 256": "LOOP_DEVICES = 2"})
    with own_mount(scene):
        holder = subprocess.Popen(
            scene.users["b"].argv("unshare", "-Urm", "sh", "-c", "echo; read go"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdout is not None
        holder.stdout.readline()
    try:
        done = subprocess.run([*helper, *scene.mount_words(image, point)], capture_output=True, text=True)
        assert refused(done)
        assert re.search(
            r"2 images attached already, held by mounts here: 1, the namespace of process [0-9]+ \(sh\): 2\.",
            done.stderr,
        )
    finally:
        holder.communicate(b"go\n")
    assert not refused(subprocess.run([*helper, *scene.mount_words(image, point)], capture_output=True, text=True))
    assert not refused(scene.helper("umount", str(point)))
