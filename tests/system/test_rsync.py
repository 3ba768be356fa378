"""Uploads by the real rsync to a real sshd and a real daemon: broken, refused, damaged, and mended."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from image_factory.base import events, interrupts
from image_factory.base.errors import BuildError, Interrupted
from image_factory.configuration.settings import Destination
from image_factory.model import Artifact
from image_factory.uploads import rsync
from image_factory.uploads import tries as uploads_tries

from .. import upload_scene
from ..conftest import User, run, wait_for
from ..upload_scene import NAME, SIZE, SUM, TRIES, Proxy, artifact, failure, free_port, logged, server, short_pauses

__all__ = ["artifact", "logged", "short_pauses"]


class Far:
    """An ordinary user's account behind sshd: keys, the directory to upload to, and how to get there."""

    def __init__(self, user: User, home: Path, port: int) -> None:
        self.user = user
        self.home = home
        self.port = port
        for key in ("login", "rrsync", "nobody"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / key)
        self.directory = home / "images"

    def authorize(self) -> None:
        self.directory.mkdir()
        shutil.chown(self.directory, self.user.name)
        login, limited = ((self.home / f"{key}.pub").read_text() for key in ("login", "rrsync"))
        restricted = f'command="/usr/bin/rrsync {self.directory}",restrict {limited}'
        (self.home / "authorized").write_text(login + restricted)

    def shell(self, key: str = "login", port: int | None = None, known: str = "known_hosts") -> str:
        options = f"-o UserKnownHostsFile={self.home}/{known} -o IdentitiesOnly=yes -o HostKeyAlias=far"
        return f"ssh -F /dev/null -p {port or self.port} -i {self.home}/{key} {options}"

    def destination(self, shell: str | None = None, *arguments: str, path: str | None = None) -> Destination:
        where = str(self.directory) + "/" if path is None else path
        rsh = ("-e", shell or self.shell())
        return Destination("far", "rsync", f"{self.user.name}@127.0.0.1:{where}", (*rsh, *arguments), ())

    def check(self, artifact: Artifact, directory: Path | None = None) -> None:
        """Both files are there, whole, and nothing else."""
        where = directory or self.directory
        assert sorted(path.name for path in where.iterdir()) == [NAME, SUM]
        run("cmp", artifact.path, where / NAME)
        run("sha256sum", "--check", "--strict", SUM, cwd=where)


@pytest.fixture(scope="module")
def sshd(base: Path, users: dict[str, User]) -> Iterator[Far]:
    home = base / "far"
    home.mkdir()
    # An account without a password is locked for sshd; this one only has none that fits.
    run("usermod", "--password", "*", users["a"].name)
    Path("/run/sshd").mkdir(exist_ok=True)
    far = Far(users["a"], home, free_port())
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / "host")
    (home / "known_hosts").write_text(f"far {(home / 'host.pub').read_text()}")
    (home / "none").touch()
    (home / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{far.port}\nHostKey {home}/host\nAuthorizedKeysFile {home}/authorized\n"
        f"StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )
    with server(far.port, "/usr/sbin/sshd", "-D", "-f", home / "sshd_config", "-E", home / "log"):
        yield far


@pytest.fixture
def far(sshd: Far) -> Iterator[Far]:
    sshd.authorize()
    yield sshd
    shutil.rmtree(sshd.directory)


@pytest.fixture
def proxy() -> Iterator[Callable[..., Proxy]]:
    with contextlib.ExitStack() as stack:
        yield lambda *limits: stack.enter_context(upload_scene.proxy(*limits))


def tries(logged: pytest.LogCaptureFixture) -> int:
    """Return how often rsync was run to upload."""
    return sum(message.startswith("Running: rsync ") for message in logged.messages)


# What goes well.


class Progress:
    def __init__(self) -> None:
        self.fractions: list[float] = []

    def notice(self, event: events.Event) -> None:
        if isinstance(event, events.Progressed):
            self.fractions.append(event.fraction)


def test_upload_is_verified_by_the_shell_there(far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    progress = Progress()
    with events.observed(progress):
        rsync.upload(far.destination(), artifact)
    far.check(artifact)
    assert f"{NAME} is verified at far: SHA-256 {artifact.sha256}" in logged.messages
    assert progress.fractions[-1] == 1.0
    # The states of the progress are one line.
    assert sum("%" in message for message in logged.messages) <= 1


def test_what_runs_is_what_is_announced(far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    destination = far.destination()
    rsync.upload(destination, artifact)
    ran = [message.removeprefix("Running: ") for message in logged.messages if message.startswith("Running: ")]
    assert ran == [rsync.shlex.join(argv) for argv in rsync.commands(destination, artifact)]


@pytest.mark.parametrize("path", ["", "images two's", "~/images two's/", "~"])
def test_target_below_the_home_directory(
    far: Far, artifact: Artifact, path: str, logged: pytest.LogCaptureFixture
) -> None:
    home = far.user.home
    before = set(home.iterdir())
    rsync.upload(far.destination(path=path), artifact)
    assert f"{NAME} is verified at far: SHA-256 {artifact.sha256}" in logged.messages
    where = home / "images two's" if "two" in path else home
    run("sha256sum", "--check", "--strict", SUM, cwd=where)
    for new in set(home.iterdir()) - before:
        shutil.rmtree(new) if new.is_dir() else new.unlink()


def test_local_target(tmp_path: Path, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    rsync.upload(Destination("here", "rsync", "../it's here", (), ()), artifact)
    assert sorted(path.name for path in (tmp_path / "it's here").iterdir()) == [NAME, SUM]
    assert f"{NAME} is verified at here: SHA-256 {artifact.sha256}" in logged.messages


def test_users_arguments_win(tmp_path: Path, artifact: Artifact) -> None:
    for argument in ("--inplace", "--append", "--write-devices", "--no-delay-updates", "--exclude=*sum", "-T/tmp"):
        where = tmp_path / argument.replace("/", "")
        rsync.upload(Destination("here", "rsync", f"{where}/", (argument,), ()), artifact)
        assert {path.name for path in where.iterdir()} - {SUM} == {NAME}


# What is broken.


def test_connection_that_breaks_once(
    far: Far, artifact: Artifact, proxy: Callable[..., Proxy], logged: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What has come is of use to the second try, and gone at the end."""
    # The rsync there has to see the end of the first one before.
    monkeypatch.setattr(uploads_tries, "PAUSE_SECONDS", (3.0,))
    cutting = proxy(far.port, SIZE * 2 // 3, None)
    rsync.upload(far.destination(far.shell(port=cutting.port), "--stats"), artifact)
    far.check(artifact)
    assert tries(logged) == 2
    assert any(message.endswith("trying again in 3 s.") for message in logged.messages)
    sent = [line for line in logged.messages if "Literal data: " in line]
    assert int(sent[-1].split("Literal data: ")[1].split()[0].replace(",", "")) < SIZE


def test_connection_that_always_breaks(
    far: Far, artifact: Artifact, proxy: Callable[..., Proxy], logged: pytest.LogCaptureFixture
) -> None:
    """An older file stays as it was; what has come is removed."""
    (far.directory / NAME).write_text("older\n")
    cutting = proxy(far.port, SIZE // 10)
    error = failure(far.destination(far.shell(port=cutting.port)), artifact)
    assert error.message.endswith(f" ({TRIES} tries)")
    assert tries(logged) == TRIES
    wait_for(lambda: [path.name for path in far.directory.iterdir()] == [NAME], "the rest to go")
    assert (far.directory / NAME).read_text() == "older\n"


def test_nobody_listens(far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    error = failure(far.destination(far.shell(port=free_port())), artifact)
    assert "Connection refused" in error.message
    assert tries(logged) == TRIES


def test_server_that_hangs(far: Far, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_tries, "STALL_SECONDS", 2)
    monkeypatch.setattr(uploads_tries, "PAUSE_SECONDS", (0.1,))
    monkeypatch.setattr(rsync, "_REMOVAL_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        start = time.monotonic()
        error = failure(far.destination(far.shell(port=hanging.getsockname()[1])), artifact)
        assert "timeout after" in error.message
        assert time.monotonic() - start < 120


def test_signal_in_a_pause_ends_it(far: Far, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_tries, "PAUSE_SECONDS", (600.0,))
    destination = far.destination(far.shell(port=free_port()))
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    start = time.monotonic()
    with interrupts.handled(), pytest.raises(Interrupted):
        timer.start()
        rsync.upload(destination, artifact)
    assert 1 < time.monotonic() - start < 120


# What another try can't cure.


def test_full_disk_there(far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    run("mount", "-t", "tmpfs", "-o", f"size=1M,uid={far.user.uid},mode=700", "tmpfs", far.directory)
    try:
        error = failure(far.destination(), artifact)
        assert "No space left on device" in error.message
        assert error.hint is not None
        assert error.hint.startswith("Make room there. ")
        assert tries(logged) == 1
        assert list(far.directory.iterdir()) == []
    finally:
        run("umount", far.directory)


@pytest.fixture
def program(far: Far) -> Iterator[Callable[[str], Path]]:
    """Make a script that the user there may run."""
    path = far.home / "program"

    def make(script: str) -> Path:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    yield make
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(("size", "wanted"), [("1M", 1), ("9M", TRIES)])
def test_rsync_there_that_does_not_say_why(
    far: Far, artifact: Artifact, program: Callable[[str], Path], logged: pytest.LogCaptureFixture,
    size: str, wanted: int,
) -> None:  # fmt: skip
    """The receiver of a real one may end before its reason is here; then the disk there is looked at."""
    silent = program('rsync "$@" 2>/dev/null; exit 11')
    run("mount", "-t", "tmpfs", "-o", f"size={size},uid={far.user.uid},mode=700", "tmpfs", far.directory)
    try:
        error = failure(far.destination(None, f"--rsync-path={silent}", "--msgs2stderr"), artifact)
    finally:
        run("umount", far.directory)
    assert tries(logged) == wanted
    assert error.message.startswith("No space left on device") == (wanted == 1)
    assert (error.hint or "").startswith("Make room there. ") == (wanted == 1)


def test_shell_there_that_says_nothing(
    far: Far, artifact: Artifact, program: Callable[[str], Path], logged: pytest.LogCaptureFixture
) -> None:
    error = failure(far.destination(str(program("exit 11"))), artifact)
    assert tries(logged) == TRIES
    assert error.message.endswith(f" ({TRIES} tries)")
    assert any(message.startswith("Whether the disk at far is full can't be known: ") for message in logged.messages)


def test_wrong_key(far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    error = failure(far.destination(far.shell("nobody")), artifact)
    assert error.message == f"{far.user.name}@127.0.0.1: Permission denied (publickey)"
    assert error.hint is not None
    assert error.hint.startswith("ssh has to log in without a password. Try it as the same user: ssh -F /dev/null ")
    assert f"-l {far.user.name} 127.0.0.1 true" in error.hint
    assert tries(logged) == 1


def test_unknown_host_key(far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    error = failure(far.destination(far.shell(known="none")), artifact)
    assert error.message == "Host key verification failed"
    assert error.hint is not None
    assert error.hint.startswith("Check the host's key, and log in once by hand to accept it: ssh -F /dev/null ")
    assert tries(logged) == 1


def test_directory_that_can_not_be_written(far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    shutil.chown(far.directory, "root")
    error = failure(far.destination(), artifact)
    assert "Permission denied (13)" in error.message
    assert error.hint is not None
    assert error.hint.startswith("Give the user that logs in there the right to write to the target. ")
    assert tries(logged) == 1


def test_no_rsync_there(far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    error = failure(far.destination(None, "--rsync-path=PATH=/nowhere; rsync"), artifact)
    assert "rsync: not found" in error.message
    assert tries(logged) == 1


# Damaged there.

DAMAGING = """#!/bin/sh
rsync "$@" || exit
if [ ! -e {once} ]; then {touch} {once}; printf damaged | dd of={file} bs=1 seek=77777 conv=notrunc 2>/dev/null; fi
"""


def damaging(far: Far, *, once: bool) -> str:
    """Return the rsync argument for one that damages the file there, always or the first time."""
    program = far.directory.parent / "damaging"
    touch = "touch" if once else "test"
    program.write_text(DAMAGING.format(once=f"/tmp/damaged.{os.getpid()}", touch=touch, file=far.directory / NAME))
    program.chmod(0o755)
    return f"--rsync-path={program}"


def test_file_that_is_damaged_there_is_uploaded_again(
    far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture
) -> None:
    """Also where it has the size and the time of what it should be."""
    try:
        rsync.upload(far.destination(None, "--times", damaging(far, once=True)), artifact)
    finally:
        Path(f"/tmp/damaged.{os.getpid()}").unlink()
    far.check(artifact)
    assert tries(logged) == 2


def test_file_that_is_always_damaged_there(far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    error = failure(far.destination(None, damaging(far, once=False)), artifact)
    assert error.message.startswith(f"{NAME} has another SHA-256 there, ")
    assert error.message.endswith(f" ({TRIES} tries)")


def test_file_that_is_not_replaced(far: Far, artifact: Artifact) -> None:
    (far.directory / NAME).write_text("older\n")
    error = failure(far.destination(None, "--ignore-existing"), artifact)
    assert error.message.startswith(f"{NAME} has another SHA-256 there, ")


# Below a directory that is not there.


@pytest.mark.parametrize("key", ["login", "rrsync"])
def test_directory_is_made(far: Far, artifact: Artifact, key: str) -> None:
    destination = far.destination(far.shell(key), path="/" if key == "rrsync" else None)
    below = rsync.below(destination, "streams/v1")
    assert rsync.read(below, SUM) is None
    rsync.upload(below, artifact)
    assert rsync.read(below, SUM) == artifact.checksum_path.read_bytes()
    far.check(artifact, far.directory / "streams/v1")


@pytest.mark.parametrize("there", [True, False])
def test_directory_that_an_older_rsync_can_not_make(
    far: Far, artifact: Artifact, daemon: Callable[..., contextlib.AbstractContextManager[str]],
    logged: pytest.LogCaptureFixture, there: bool,
) -> None:  # fmt: skip
    made = far.directory / "streams/v1"
    with daemon("refuse options = mkpath\n") as target:
        below = rsync.below(Destination("far", "rsync", target, (), ()), "streams/v1")
        if there:
            made.mkdir(parents=True)
            shutil.chown(made, far.user.name)
            rsync.upload(below, artifact)
            far.check(artifact, made)
        else:
            error = failure(below, artifact)
            assert error.hint is not None
            assert error.hint.startswith("Make the directory there, or mend upload_target.")
    assert "rsync at far refuses our options: trying without them." in logged.messages


# No shell there.


@pytest.mark.parametrize("key", ["login", "rrsync"])
def test_files_there_are_removed_by_their_names(far: Far, key: str) -> None:
    """No shell is needed, and no argument of the user's makes it more or less than that."""
    for name in ("a.raw", "b c.raw", "a.raw.sha256sum", "other"):
        (far.directory / name).write_text("x")
        shutil.chown(far.directory / name, far.user.name)
    mode = far.directory.stat().st_mode
    arguments = ("-a", "--delete", "--delete-excluded", "--include=*", "--force")
    destination = far.destination(far.shell(key), *arguments, path="" if key == "rrsync" else None)
    assert rsync.remove(destination, ["a.raw", "b c.raw", "gone"]) == {}
    assert sorted(path.name for path in far.directory.iterdir()) == ["a.raw.sha256sum", "other"]
    assert far.directory.stat().st_mode == mode


def test_files_that_can_not_be_removed(far: Far) -> None:
    (far.directory / "a.raw").touch()
    shutil.chown(far.directory, "root")
    with pytest.raises(uploads_tries.FailedTry, match=r'"?a.raw"?.*failed: Permission denied') as caught:
        rsync.remove(far.destination(), ["a.raw"])
    assert not caught.value.again
    assert (far.directory / "a.raw").exists()


def test_rrsync(far: Far, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    destination = far.destination(far.shell("rrsync"), path="/")
    assert rsync.read(destination, SUM) is None
    logged.clear()
    rsync.upload(destination, artifact)
    far.check(artifact)
    warnings = [record.message for record in logged.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{NAME} is not verified at far, where it seems there is no shell: ssh failed ")


@pytest.fixture
def daemon(far: Far) -> Iterator[Callable[[str], contextlib.AbstractContextManager[str]]]:
    @contextlib.contextmanager
    def start(lines: str) -> Iterator[str]:
        port = free_port()
        configuration = far.home / "rsyncd.conf"
        configuration.write_text(
            f"log file = {far.home}/rsyncd.log\nuse chroot = no\nuid = {far.user.name}\n"
            f"[images]\npath = {far.directory}\nread only = no\n{lines}"
        )
        argv = ("--daemon", "--no-detach", "--address=127.0.0.1", f"--port={port}", f"--config={configuration}")
        with server(port, "rsync", *argv):
            yield f"rsync://127.0.0.1:{port}/images/"

    yield start


@pytest.mark.parametrize("lines", ["", "refuse options = delay-updates\n"])
def test_daemon(
    far: Far, artifact: Artifact, daemon: Callable[..., contextlib.AbstractContextManager[str]],
    logged: pytest.LogCaptureFixture, lines: str,
) -> None:  # fmt: skip
    with daemon(lines) as target:
        rsync.upload(Destination("far", "rsync", target, (), ()), artifact)
    far.check(artifact)
    assert f"{NAME} is not verified at far: a daemon has no shell." in logged.messages
    refused = "rsync at far refuses our options: trying without them." in logged.messages
    assert refused == bool(lines)


def test_files_behind_a_daemon_are_removed(
    far: Far, daemon: Callable[[str], contextlib.AbstractContextManager[str]]
) -> None:
    for name in ("a.raw", "b.raw"):
        (far.directory / name).touch()
    with daemon("") as target:
        assert rsync.remove(Destination("far", "rsync", target, (), ()), ["a.raw"]) == {}
    (far.directory / "full").mkdir()
    (far.directory / "full/file").touch()
    with daemon("refuse options = delete*\n") as target:
        refused = rsync.remove(Destination("far", "rsync", target, (), ()), ["b.raw"])
    here = rsync.remove(Destination("far", "rsync", f"{far.directory}", (), ()), ["full"])
    assert [(name, failed.reason, failed.again) for name, failed in (refused | here).items()] == [
        ("b.raw", 'skipping non-regular file "b.raw"', False),
        ("full", "cannot delete non-empty directory: full", False),
    ]
    assert sorted(path.name for path in far.directory.iterdir()) == ["b.raw", "full"]


def test_module_that_is_not_there(
    far: Far, artifact: Artifact, daemon: Callable[..., contextlib.AbstractContextManager[str]],
    logged: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with daemon("") as target:
        error = failure(Destination("far", "rsync", f"{target[:-1]}x/", (), ()), artifact)
    assert "Unknown module 'imagesx'" in error.message
    assert tries(logged) == 1


# How the arguments and the target are read.


@pytest.mark.parametrize(
    ("arguments", "shell"),
    {
        (): "ssh",
        ("-e", "ssh -p 22"): "ssh -p 22",
        ("-essh -p 22",): "ssh -p 22",
        ("-e=ssh",): "ssh",
        ("-ave", "rsh x"): "rsh x",
        ("-avze rsh",): "rsh",
        ("--rsh=rsh",): "rsh",
        ("--rsh", "rsh"): "rsh",
        ("-e", "first", "--rsh=second"): "second",
        ("--rsh=first", "-ve", "second"): "second",
        ("-T", "-e", "-v"): "ssh",
        ("-vTe", "-v"): "ssh",
        ("--filter", "- *.exe"): "ssh",
        ("--exclude=-e x", "--delete"): "ssh",
        ("-e", 'ssh -i "/my keys/x\\y"'): "ssh -i '/my keys/x\\y'",
        ("-e", 'ssh -o "un'): "ssh -o '\"un'",
    }.items(),
)
def test_remote_shell(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], shell: str) -> None:
    monkeypatch.delenv("RSYNC_RSH", raising=False)
    assert rsync._shell(Destination("up", "rsync", "host:/", arguments, ())) == [*rsync.shlex.split(shell), "host"]


def test_remote_shell_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSYNC_RSH", "ssh -p 3")
    assert rsync._shell(Destination("up", "rsync", "host:/", (), ())) == ["ssh", "-p", "3", "host"]
    assert rsync._shell(Destination("up", "rsync", "host:/", ("-e", "rsh"), ())) == ["rsh", "host"]


@pytest.mark.parametrize(
    ("target", "shell", "command"),
    [
        ("host:", ["ssh", "host"], "x"),
        ("host:/srv/a b", ["ssh", "host"], "cd '/srv/a b' && x"),
        ("user@host:images", ["ssh", "-l", "user", "host"], "cd images && x"),
        ("user@[::1]:/srv", ["ssh", "-l", "user", "::1"], "cd /srv && x"),
        ("host:~/a b", ["ssh", "host"], "cd ~/'a b' && x"),
        ("host:~other", ["ssh", "host"], "cd ~other && x"),
        ("host:-x", ["ssh", "host"], "cd ./-x && x"),
        ("host:a;b", ["ssh", "host"], "cd 'a;b' && x"),
        ("/srv/images", ["sh", "-c"], "cd /srv/images && x"),
        ("./host:x", ["sh", "-c"], "cd ./host:x && x"),
        ("~/x", ["sh", "-c"], "cd '~/x' && x"),
        ("host::module/x", None, ""),
        ("user@host::module", None, ""),
        ("[::1]::module", None, ""),
        ("rsync://host/module", None, ""),
        ("RSYNC://host/module", None, ""),
    ],
)
def test_target(monkeypatch: pytest.MonkeyPatch, target: str, shell: list[str] | None, command: str) -> None:
    monkeypatch.delenv("RSYNC_RSH", raising=False)
    destination = Destination("up", "rsync", target, (), ())
    assert rsync._shell(destination) == shell
    if shell:
        assert rsync._in_target(destination, "x") == command


def test_timeout_of_a_daemons_connection() -> None:
    """rsync refuses it where it doesn't connect by itself."""
    for target, arguments, expected in (
        ("rsync://host/module", (), True),
        ("host::module", (), True),
        ("host::module", ("-e", "ssh"), False),
        ("host:/srv", (), False),
        ("/srv", (), False),
    ):
        options = rsync._own_options(Destination("up", "rsync", target, arguments, ()))
        assert ("--contimeout=60" in options) == expected


# --check --online.


def test_probe(far: Far, tmp_path: Path) -> None:
    """Real logins, and nothing is there afterwards."""
    rsync.probe(far.destination(), tmp_path)
    rsync.probe(far.destination(far.shell("rrsync"), path="/"), tmp_path)
    assert list(far.directory.iterdir()) == []
    for shell, reason in [
        (far.shell("nobody"), "Permission denied"),
        (far.shell(known="none"), "Host key verification failed"),
        (far.shell(port=free_port()), "Connection refused"),
    ]:
        with pytest.raises(BuildError, match=reason):
            rsync.probe(far.destination(shell), tmp_path)
