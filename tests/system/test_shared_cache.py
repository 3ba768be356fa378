"""Several builds share one cache: real processes at once, a mirror that changes under them, and one that is old."""

import datetime
import grp
import json
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_factory import checkpoint
from image_factory.base import command, events, locks, trust
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.downloads import fetch
from image_factory.model import Build
from image_factory.sources import installer
from image_factory.told import estimates

from ..conftest import PATIENCE, REPOSITORY, User, run, wait_for
from .test_verify import (
    DAY,
    INITRD,
    LINUX,
    Archive,
    Builder,
    Keys,
    Mirror,
    builder,
    impatient,
    keys,
    mirrors,
    sha256,
)

__all__ = ["builder", "impatient", "keys", "mirrors"]

FILES = {"linux": LINUX, "initrd": INITRD}
PROCESSES = 8
CHANGES = 6

# What the installation would read is looked at last, when other builds have changed the cache many times.
WORKER = """
import hashlib, json, sys
from pathlib import Path
from image_factory import pipeline
from image_factory.configuration import files
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.model import Build
from image_factory.sources import installer

own, stop = Path(sys.argv[1]), Path(sys.argv[2])
plan = pipeline.make_plan(files.Configuration({files.FILE_VARIABLE: str(own / "x.conf")}), "x", {})
ready, failures, last = [], [], False
while not last:
    last = stop.exists()
    build = Build(plan, own / f"{len(ready) + len(failures)}", "vm")
    build.directory.mkdir()
    try:
        installer.prepare_installer(build)
        ready.append(build.directory / "netboot")
    except BuildError as error:
        failures.append(error.message)
digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
print(json.dumps([[[digest(path / "linux"), digest(path / "initrd")] for path in ready], failures]))
"""

# A build that meets a change of the mirror's ends, and says so.
SEEN_A_CHANGE = re.compile(r"is not what \S+ lists: expected SHA-256|another version of the installer|is out of date")


def start(
    own: Path, cache: Path, stop: Path, keyring: Path, mirrors: tuple[Mirror, ...], *more: str
) -> subprocess.Popen[str]:
    own.mkdir()
    uris = {key: " ".join(mirror.debian(path) for mirror in mirrors) for key, path in FILES.items()}
    lines = [f"{key} = {value}" for key, value in uris.items()]
    lines += [f"keyring = {keyring}", f"cache_dir = {cache}", f"output-dir = {own}", "verify = required"]
    (own / "x.conf").write_text("\n".join(["[x]", *lines, *more, ""]))
    return subprocess.Popen(
        ["/usr/bin/python3", "-c", WORKER, own, stop],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def versions(keys: Keys) -> Iterator[Archive]:
    for number in range(CHANGES + 1):
        archive = Archive(keys, f"6.12.{40 + number}+deb13-amd64")
        archive.date += number * DAY
        yield archive


def pair(archive: Archive) -> list[str]:
    return [sha256(archive.linux), sha256(archive.initrd)]


def test_processes_that_share_a_cache(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    """Each gets a kernel and an initrd that belong together; one that is killed keeps none of the others."""
    fresh, stale = mirrors
    archives = list(versions(keys))
    published = [archive.files() for archive in archives]
    fresh.files = stale.files = published[0]
    stop, cache = builder.directory / "stop", builder.directory / "cache"
    orders = [(fresh,), (fresh, stale), (stale, fresh)]
    running = [
        start(builder.directory / f"out{number}", cache, stop, keys.keyring, orders[number % len(orders)])
        for number in range(PROCESSES)
    ]
    said = []
    try:
        wait_for(lambda: len(fresh.requests) > 2 * PROCESSES, "the first requests")
        for number, files in enumerate(published[1:]):
            fresh.files = files
            seen = len(fresh.requests)
            wait_for(lambda seen=seen: len(fresh.requests) > seen + 3 * PROCESSES, "more requests")
            if number == 2:
                running[0].kill()
        stop.touch()
        said = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert [process.returncode for process in running] == [-9] + [0] * (PROCESSES - 1), said
    outcomes = [json.loads(stdout) for stdout, _ in said[1:]]
    known = [pair(archive) for archive in archives]
    got = [one for pairs, _ in outcomes for one in pairs]
    assert [one for one in got if one not in known] == []
    # How many of them come in time depends on the machine.
    assert len({known.index(one) for one in got}) > 1
    assert [message for _, failures in outcomes for message in failures if not SEEN_A_CHANGE.search(message)] == []
    assert [pairs[-1] for pairs, _ in outcomes] == [known[-1]] * (PROCESSES - 1)
    # The cache has the newest, says so, and serves without a network.
    assert [sha256((cache / "x" / Path(path).name).read_bytes()) for path in FILES.values()] == known[-1]
    remembered = datetime.datetime.fromisoformat((cache / "x/.trixie.release-date").read_text())
    assert remembered == archives[-1].date
    left = {path.name for path in (cache / "x").iterdir()}
    assert {name for name in left if fetch._TEMPORARY.fullmatch(name)} == set()
    asked = len(fresh.requests)
    offline = start(builder.directory / "offline", cache, stop, keys.keyring, (fresh,), "offline = yes")
    assert json.loads(offline.communicate(timeout=PATIENCE)[0]) == [[known[-1]], []]
    assert len(fresh.requests) == asked


# What the installation reads is its own.


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """Another filesystem, to which there are no hard links."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="image-factory-test.") as name:
        assert Path(name).stat().st_dev != tmp_path.stat().st_dev
        yield Path(name)


@pytest.mark.parametrize("linked", [True, False])
def test_file_that_was_taken_stays(tmp_path: Path, elsewhere: Path, *, linked: bool) -> None:
    cached, own = tmp_path / "linux", (tmp_path if linked else elsewhere) / "own"
    cached.write_bytes(b"verified")
    cached.chmod(0o644)
    fetch.take(cached, own)
    fetch.write_whole(cached, b"another")
    assert own.read_bytes() == b"verified"
    assert own.stat().st_mode & 0o777 == 0o644


def build_of(builder: Builder, linux: str, initrd: str) -> Build:
    build = Build(builder.plan(linux, initrd=initrd, verify="required"), builder.directory / "work", "vm")
    build.directory.mkdir()
    return build


def test_record_says_who_vouched(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    build = build_of(builder, mirror.debian(), mirror.debian(INITRD))
    used = checkpoint.InputsUsed()
    with events.observed(used):
        installer.prepare_installer(build)
    by = f"InRelease signed by {keys.fingerprint}"
    assert [event for event, _ in used.found] == [
        events.InputUsed("linux", mirror.debian(), builder.cache / "linux", by),
        events.InputUsed("initrd", mirror.debian(INITRD), builder.cache / "initrd.gz", by),
    ]


def test_local_files_are_used_in_place(builder: Builder, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel in a copy of Debian's archive too: of what archive its components will be is not known."""
    archive = Archive(keys)
    paths = {path: builder.directory / path for path in FILES.values()}
    for path, data in archive.files().items():
        (builder.directory / path).parent.mkdir(parents=True, exist_ok=True)
        (builder.directory / path).write_bytes(data)
    caplog.set_level("INFO")
    build = build_of(builder, str(paths[LINUX]), f"file://{paths[INITRD]}")
    media, _ = installer.prepare_installer(build)
    assert [os.readlink(build.directory / "netboot" / key) for key in FILES] == [str(path) for path in paths.values()]
    assert media.kept == ("--install", f"kernel={paths[LINUX]},initrd={paths[INITRD]}")
    assert not builder.cache.exists()
    assert caplog.text == ""


def test_cache_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/x"):
        with pytest.raises(BuildError, match=f"The cache {path} can.t be made: "), fetch.locked(path):
            pass


# Other users.


NOBODY = 65534


def as_nobody(*words: str | Path) -> list[str]:
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *map(str, words)]


def others_make(cache: Path, what: str) -> None:
    """Let another user be able to change what is in the full cache, in one way."""
    match what:
        case "directory for all":
            cache.chmod(0o777)
        case "directory for all, sticky":
            cache.chmod(0o1777)
        case "directory of a group":
            # The group's user is nobody; it is in no list of members.
            os.chown(cache, 0, pwd.getpwuid(NOBODY).pw_gid)
            cache.chmod(0o2775)
        case "list of users":
            subprocess.run(["setfacl", "-m", f"u:{NOBODY}:rwx", cache], check=True)
        case "directory of another user":
            os.chown(cache, NOBODY, NOBODY)
        case "directory above for all":
            cache.parent.chmod(0o777)
        case "directory above of another user":
            os.chown(cache.parent, NOBODY, NOBODY)
        case "link above":
            cache.rename(cache.parent / "real")
            cache.symlink_to(cache.parent / "real")
            (cache.parent / "real").chmod(0o777)
        case "note of another user":
            os.chown(cache / ".linux.verification", NOBODY, NOBODY)
        case "file of another user":
            os.chown(cache / "linux", NOBODY, NOBODY)
        case "file for all":
            (cache / "linux").chmod(0o666)
        case "note for all":
            (cache / ".linux.verification").chmod(0o646)
        case "link to a file":
            (cache / "linux").rename(cache / "real")
            (cache / "linux").symlink_to("real")
        case "link to a note":
            (cache / ".linux.verification").rename(cache / ".real")
            (cache / ".linux.verification").symlink_to(".real")


OF_THE_DIRECTORY = [
    "directory for all", "directory for all, sticky", "directory of a group", "list of users",
    "directory of another user", "directory above for all", "directory above of another user", "link above",
]  # fmt: skip
OF_A_FILE = [
    "note of another user", "file of another user", "file for all", "note for all", "link to a file", "link to a note",
]  # fmt: skip


@pytest.mark.parametrize("what", [*OF_THE_DIRECTORY, *OF_A_FILE])
def test_what_others_can_change_is_not_believed(
    mirrors: tuple[Mirror, Mirror],
    builder: Builder,
    keys: Keys,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    """Without a network it is refused; with one, another file is fetched, and is what the build gets."""
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    builder.fetch(mirror.debian(), verify="required")
    builder.fetch(mirror.debian(), verify="required", offline="yes")
    others_make(builder.cache, what)
    error = builder.fails(mirror.debian(), verify="required", offline="yes")
    assert isinstance(error, ConfigurationError)
    if what in OF_THE_DIRECTORY:
        assert re.search(r"--offline: what is in \S+ is not believed: \S+ (can be written|belongs) ", error.message)
    else:
        assert f"--offline: {builder.cache} lacks linux" in error.message
    mirror.requests.clear()
    builder.fetch(mirror.debian(), verify="required")
    where = builder.fetched.path
    assert where.read_bytes() == Archive(keys).linux
    if what in OF_THE_DIRECTORY:
        (warned,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
        assert warned.startswith("The cache is not used, all is downloaded for this build alone: ")
        assert "belong to root or you" in warned
        assert not where.is_relative_to(os.path.realpath(builder.cache.parent))
    if "note" not in what:
        assert any(request.path.endswith("/linux") for request in mirror.requests)
    assert trust.own(where)


@pytest.mark.parametrize("what", OF_THE_DIRECTORY)
def test_durations_that_others_can_change(builder: Builder, what: str) -> None:
    """They are not read, a pipe in their place for ever neither, and nothing is written there."""
    plan = builder.plan("http://127.0.0.1/linux")
    builder.cache.mkdir(parents=True)
    estimates.Timeline(plan).keep()
    kept = builder.cache / estimates.FILE_NAME
    kept.write_text(kept.read_text().replace("[]", '[["a", "", 1]]'))
    assert estimates.Timeline(plan)._order == [("a", "")]
    others_make(builder.cache, what)
    assert estimates.Timeline(plan)._order == []
    kept.unlink()
    os.mkfifo(kept, 0o666)
    os.chown(kept, NOBODY, NOBODY)
    command.call_apart(lambda _: estimates.Timeline(plan).keep(), None, 20)
    assert list(builder.cache.iterdir()) == [kept]
    assert kept.is_fifo()


@pytest.mark.parametrize("what", ["own group", "group of nobody", "sticky directory above"])
def test_what_others_can_not_change_is_believed(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys, what: str
) -> None:
    """Debian gives each user a group, and a umask of 002 is common with that."""
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    builder.fetch(mirror.debian(), verify="required")
    if what == "own group":
        builder.cache.chmod(0o775)
        (builder.cache / "linux").chmod(0o664)
    elif what == "group of nobody":
        os.chown(builder.cache, 0, grp.getgrnam("staff").gr_gid)
        builder.cache.chmod(0o2775)
    else:
        builder.cache.parent.chmod(0o1777)
    builder.fetch(mirror.debian(), verify="required", offline="yes")


def test_directory_that_can_not_be_looked_at(tmp_path: Path) -> None:
    tmp_path.joinpath("file").touch()
    assert trust.why_not(tmp_path / "file/x") is None
    tmp_path.chmod(0o700)
    program = (
        "import sys, pathlib; from image_factory.base import trust; print(trust.why_not(pathlib.Path(sys.argv[1])))"
    )
    path = tmp_path / "cache"
    argv = as_nobody("env", f"PYTHONPATH={REPOSITORY}", "/usr/bin/python3", "-c", program, path)
    assert run(*argv, cwd="/").stdout == f"{path} can't be looked at: Permission denied\n"


def test_group_with_other_members(users: dict[str, User], tmp_path: Path) -> None:
    """A group of one's own is no longer so when somebody is put into it."""
    first, second = users["a"], users["b"]
    program = (
        "import sys, pathlib; from image_factory.base import trust; print(trust.why_not(pathlib.Path(sys.argv[1])))"
    )
    cache = first.directory("group-cache")
    cache.chmod(0o775)
    run("chgrp", first.name, cache)
    argv = ("env", f"PYTHONPATH={REPOSITORY}", "/usr/bin/python3", "-c", program, cache)
    assert first.run(*argv).stdout == "None\n"
    run("usermod", "-a", "-G", first.name, second.name)
    try:
        assert first.run(*argv).stdout == f"{cache} can be written by the group {first.name}\n"
        assert second.run(*argv).stdout == f"{cache} belongs to {first.name}\n"
    finally:
        run("gpasswd", "-d", second.name, first.name)


@pytest.mark.parametrize(
    ("text", "believed"),
    [("passwd: files systemd\n", True), ("passwd: files sss\n", False), ("group: files\n", False)],
)
def test_group_whose_users_a_directory_in_the_network_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, believed: bool
) -> None:
    """It seldom lists them; who has a group of the own name is alone in it all the same."""
    services, cache = tmp_path / "nsswitch.conf", tmp_path / "cache"
    services.write_text(text)
    monkeypatch.setattr(trust, "_NAME_SERVICES", services)
    cache.mkdir()
    cache.chmod(0o775)
    assert trust.why_not(cache) is None
    os.chown(cache, 0, grp.getgrnam("staff").gr_gid)
    assert trust.why_not(cache) == (None if believed else f"{cache} can be written by the group staff")


def test_release_date_of_another_user_is_not_believed(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys
) -> None:
    """Else all mirrors would be out of date."""
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    builder.cache.mkdir(parents=True)
    note = builder.cache / ".trixie.release-date"
    note.write_text("2999-01-01T00:00:00+00:00")
    assert "is out of date" in builder.fails(mirror.debian()).message
    os.chown(note, NOBODY, NOBODY)
    builder.fetch(mirror.debian())


@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_cache_is_for_its_user_to_write_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with fetch.locked(tmp_path / "new/cache/x"):
            fetch.write_whole(tmp_path / "new/cache/x/linux", b"1")
    finally:
        os.umask(before)
    assert trust.why_not(tmp_path / "new/cache/x") is None
    assert trust.own(tmp_path / "new/cache/x/linux")


def test_other_user_who_locks_what_there_is_stops_no_build(tmp_path: Path) -> None:
    """Whoever may read a directory can lock it; the file that builds lock is opened by nobody else."""
    cache = tmp_path / "x"
    tmp_path.chmod(0o755)
    with fetch.locked(cache):
        done = subprocess.run(as_nobody("flock", "-n", cache / ".lock", "true"), capture_output=True, text=True)
        assert "Permission denied" in done.stderr
    with subprocess.Popen(as_nobody("flock", cache, "sh", "-c", "echo; sleep 60"), stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout
            holder.stdout.readline()
            with fetch.locked(cache):
                pass
        finally:
            holder.kill()
            subprocess.run(["pkill", "-u", str(NOBODY), "-f", "^sleep 60$"], check=False)
    assert list(cache.iterdir()) == []


def test_waiting_names_who_has_the_lock(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from image_factory.downloads import fetch\n"
    program += "with fetch.locked(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", program, tmp_path],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as holder:  # fmt: skip
        assert holder.stdin and holder.stdout
        holder.stdout.readline()
        told: list[events.Event] = []

        class Observer:
            def notice(self, event: events.Event) -> None:
                told.append(event)
                # It ends when it is known who has it.
                if isinstance(event, events.Waiting) and event.reason:
                    holder.stdin.close()

        with events.observed(Observer()), fetch.locked(tmp_path):
            pass
    (reason, _) = [event.reason for event in told if isinstance(event, events.Waiting)]
    assert reason == f"Waiting for another build that writes to {tmp_path} (process {holder.pid} of root)."


def test_time_goes_on_while_a_build_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And who has the lock is asked again."""
    holders = iter(["one", "one", "another"])
    monkeypatch.setattr(locks, "by_whom", lambda path: f" ({next(holders, 'another')})")
    monkeypatch.setattr(fetch, "_POLL_SECONDS", 0.05)
    told: list[events.Event] = []
    with subprocess.Popen(
        ["flock", "-o", tmp_path / ".lock", "timeout", "20", "sh", "-c", "echo; read x"], stdin=-1, stdout=-1
    ) as holder:
        assert holder.stdin and holder.stdout
        holder.stdout.readline()

        class Observer:
            def notice(self, event: events.Event) -> None:
                told.append(event)
                if told.count(events.TimePassed()) == 3:
                    holder.stdin.close()

        with events.observed(Observer()), fetch.locked(tmp_path):
            pass
    reasons = [event.reason for event in told if isinstance(event, events.Waiting)]
    assert [reason.rpartition(" ")[2] for reason in reasons] == ["(one).", "(another).", ""]


@pytest.mark.parametrize("has_modes", [True, False])
def test_lock_where_files_have_no_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_modes: bool) -> None:
    """As on CIFS, where all files may be open to all."""

    def refuse(descriptor: int, mode: int) -> None:
        raise PermissionError

    if not has_modes:
        monkeypatch.setattr(os, "fchmod", refuse)
    lock = tmp_path / ".lock"
    lock.touch(mode=0o644)
    with fetch.locked(tmp_path):
        assert lock.stat().st_mode & 0o777 == (0o600 if has_modes else 0o644)


@pytest.mark.parametrize("what", ["link", "another user's"])
def test_lock_that_is_another_users(tmp_path: Path, what: str) -> None:
    lock = tmp_path / ".lock"
    lock.touch(mode=0o600)
    if what == "link":
        lock.rename(tmp_path / "elsewhere")
        lock.symlink_to("elsewhere")
    else:
        os.chown(lock, NOBODY, NOBODY)
    with pytest.raises(BuildError, match=r"The lock .* (can't be opened|is another user's)"), fetch.locked(tmp_path):
        pass


def test_cache_that_one_may_only_read_serves_without_a_network(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys, users: dict[str, User]
) -> None:
    """What root has brought there and verified, for other users."""
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    user = users["a"]
    cache = Path(tempfile.mkdtemp(prefix="if-test-cache.", dir="/var/tmp"))
    try:
        cache.chmod(0o755)
        builder.fetch(mirror.debian(), verify="required", cache_dir=str(cache))
        own = user.directory(f"offline{os.urandom(2).hex()}")
        (own / "x.conf").write_text(
            f"[x]\nlinux = {mirror.debian()}\ninitrd = /dev/null\n"
            f"cache-dir = {cache}\noffline = yes\nverify = required\n"
        )
        program = (
            "from image_factory import pipeline\nfrom image_factory.configuration import files\n"
            "from image_factory.downloads import verify\n"
            "plan = pipeline.make_plan(files.Configuration({'IMAGE_FACTORY_CONFIG': 'x.conf'}), 'x', {})\n"
            "verifier = verify.Verifier(plan)\n"
            "with verifier.locked([plan.settings.linux]): print(verifier.fetch('linux', plan.settings.linux).path)\n"
        )
        done = user.run("env", f"PYTHONPATH={REPOSITORY}", "/usr/bin/python3", "-c", program, cwd=own)
        assert done.stdout.strip() == str(cache / "x/linux")
    finally:
        shutil.rmtree(cache)
