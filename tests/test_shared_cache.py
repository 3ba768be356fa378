"""Several builds share one cache: real processes at once, a mirror that changes under them, and one that is old."""

import datetime
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from image_factory import checkpoint, events, fetch
from image_factory.errors import BuildError
from image_factory.model import Build
from image_factory.sources import installer

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
from image_factory import pipeline, settings
from image_factory.errors import BuildError
from image_factory.model import Build
from image_factory.sources import installer

own, stop = Path(sys.argv[1]), Path(sys.argv[2])
plan = pipeline.make_plan(settings.Configuration({settings.FILE_VARIABLE: str(own / "x.conf")}), "x", {})
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
        cwd=Path(__file__).resolve().parent.parent,
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
        wait_for(lambda: len(fresh.requests) > 2 * PROCESSES)
        for number, files in enumerate(published[1:]):
            fresh.files = files
            seen = len(fresh.requests)
            wait_for(lambda seen=seen: len(fresh.requests) > seen + 3 * PROCESSES)
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
    assert len({known.index(one) for one in got}) > CHANGES // 2
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
    assert json.loads(offline.communicate(timeout=60)[0]) == [[known[-1]], []]
    assert len(fresh.requests) == asked


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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
