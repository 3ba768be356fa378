"""Builds that begin with a disk image: of several formats, as root and as users, by both ways to mount it."""

import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from ..conftest import PATIENCE, TODAY, User, machine_state, run, wait_for
from .test_build import logged_commands, normal

MIB = 1 << 20
SIZE, LARGER = 400 * MIB, 640 * MIB
ESP_SECTORS, ROOT_SECTOR = 2048 * 33, 2048 * 34
FILES = {
    "etc/os-release": 'ID=debian\nVERSION_ID="13"\n',
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "etc/fstab": "LABEL=root / auto defaults 0 1\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/hostname": "golden\n",
    "var/log/dpkg.log": "installed\n",
    "srv/data": "kept\n" * 5000,
}
MAKE = {
    "ext4": ["mke2fs", "-q", "-t", "ext4", "-L", "root", "-d"],
    "btrfs": ["mkfs.btrfs", "--quiet", "--label", "root", "--rootdir"],
}


def make_filesystem(kind: str, tree: Path, target: Path, size: int) -> None:
    with target.open("wb") as file:
        file.truncate(size)
    if kind != "xfs":
        run(*MAKE[kind], tree, target)
        return
    # What a protofile says of directories and files; it has no more than that.
    lines = ["/", "0 0", "d--755 0 0"]

    def describe(directory: Path) -> None:
        for path in sorted(directory.iterdir()):
            if path.is_dir():
                lines.append(f"{path.name} d--755 0 0")
                describe(path)
                lines.append("$")
            else:
                lines.append(f"{path.name} ---644 0 0 {path}")

    describe(tree)
    protofile = target.with_suffix(".proto")
    protofile.write_text("\n".join([*lines, "$", ""]))
    run("mkfs.xfs", "-q", "-L", "root", "-p", protofile, target)


@functools.cache
def _made(base: Path, kind: str) -> Path:
    """Return a raw disk with GPT whose last partition is a root filesystem of *kind*."""
    tree = base / f"tree-{kind}"
    for name, text in FILES.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    disk, filesystem = base / f"{kind}.raw", base / f"{kind}.filesystem"
    make_filesystem(kind, tree, filesystem, SIZE - ROOT_SECTOR * 512 - MIB)
    with disk.open("wb") as file:
        file.truncate(SIZE)
    table = f"label: gpt\nstart=2048, size={ESP_SECTORS - 2048}, type=linux\nstart={ROOT_SECTOR}, type=linux\n"
    subprocess.run(["sfdisk", "--quiet", disk], input=table, text=True, check=True, capture_output=True)
    run("dd", f"if={filesystem}", f"of={disk}", "bs=1M", f"seek={ROOT_SECTOR // 2048}", "conv=notrunc,sparse")
    return disk


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disks")


@dataclass
class Place:
    """A directory of a user's with an image to begin with."""

    user: User
    directory: Path

    def configure(self, source: str, **keys: str) -> None:
        settings = {
            "source": "image",
            "source-image": source,
            "virt-type": "qemu",
            "seal": "yes",
            "audit": "yes",
        } | keys
        lines = "".join(f"{key.replace('_', '-')} = {value}\n" for key, value in settings.items())
        (self.directory / "image-factory.conf").write_text(f"[stand-in]\n{lines}")

    def argv(self, *flags: str) -> list[str]:
        configuration = str(self.directory / "image-factory.conf")
        return self.user.argv(self.user.program, *flags, "stand-in", IMAGE_FACTORY_CONFIG=configuration)

    def argv_with(self, program: str, script: str) -> list[str]:
        """Return the command that builds with a *script* in the place of *program*."""
        programs = self.directory / "programs"
        programs.mkdir()
        (programs / program).write_text(f"#!/bin/sh\n{script}\n")
        (programs / program).chmod(0o755)
        return [word.replace("PATH=", f"PATH={programs}:", 1) for word in self.argv()]

    def run(self, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*self.argv(*flags), check=check, cwd=self.directory, timeout=PATIENCE)

    def put(self, disk: Path, name: str, *argv: str) -> Path:
        """Make the image *name* of *disk* by a command, in which SOURCE and TARGET stand for them."""
        target = self.directory / name
        names = {"SOURCE": disk, "TARGET": target}
        run(*(names.get(word, word) for word in argv))
        shutil.chown(target, self.user.name)
        return target

    def files(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}


@pytest.fixture
def place(request: pytest.FixtureRequest, users: dict[str, User]) -> Iterator[Place]:
    user = users[getattr(request, "param", "root")]
    before = set(machine_state())
    directory = user.directory(f"source-{os.urandom(3).hex()}")
    found = Place(user, directory)
    yield found
    if (directory / ".image-factory-stand-in").exists():
        found.run("--cleanup")
    left = [path for path in directory.rglob("*") if path.name.startswith(".image-factory")]
    assert [*left, *(set(machine_state()) - before)] == []


def steps_of(text: str) -> list[str]:
    return re.findall(r"INFO: (\S.*) \.\.\.$", text, re.MULTILINE)


def shown(text: str) -> tuple[list[str], list[list[str]]]:
    """Return the steps of a dry run, and their commands as the log has them."""
    steps = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    mark = " INFO: Running: "
    lines = [f"{mark}{line}" for line in text.splitlines() if not line.startswith("#")]
    return steps, logged_commands("\n".join(lines))


def root_of(disk: Path) -> tuple[int, int]:
    """Return where the last partition of *disk* begins, and its size, in bytes."""
    table = json.loads(run("sfdisk", "--json", disk).stdout)["partitiontable"]
    last = max(table["partitions"], key=lambda entry: entry["start"])
    assert "error" not in run("sfdisk", "--verify", disk).stderr
    return last["start"] * 512, last["size"] * 512


@contextmanager
def mounted(disk: Path, tmp_path: Path) -> Iterator[Path]:
    offset, size = root_of(disk)
    point = tmp_path / "mnt"
    point.mkdir()
    run("mount", "-o", f"ro,loop,offset={offset},sizelimit={size}", disk, point)
    try:
        yield point
    finally:
        run("umount", point)


CONVERT = ["qemu-img", "convert", "-f", "raw", "-O"]
# User and way, filesystem, name of the image, and how it is made of the raw disk.
BUILDS = [
    ("root", "loop", "xfs", "image.vmdk", [*CONVERT, "vmdk", "-o", "subformat=streamOptimized", "SOURCE", "TARGET"]),
    ("a", "loop", "ext4", "image", [*CONVERT, "qcow2", "-c", "SOURCE", "TARGET"]),
    (
        "c",
        "guestfs",
        "btrfs",
        "image.tar.xz",
        ["sh", "-c", 'tar -C "${0%/*}" -cSJf "$1" "${0##*/}"', "SOURCE", "TARGET"],
    ),
]


@pytest.mark.parametrize(
    ("place", "mount_via", "kind", "name", "argv"), BUILDS, indirect=["place"], ids=lambda word: str(word)[:12]
)
def test_built(
    place: Place, disks: Path, tmp_path: Path, mount_via: str, kind: str, name: str, argv: list[str]
) -> None:
    """It grows, is finished like an installed disk, and a dry run has shown what was done."""
    source = place.put(_made(disks, kind), name, *argv)
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    place.configure(name, image_size=str(LARGER), mount_via=mount_via, format="raw")
    planned, commands = shown(place.run("--dry-run").stdout)
    done = place.run()
    steps = steps_of(done.stderr)
    assert [step for step in planned if step in steps] == steps
    assert {"Copying the source image", "Growing the disk", "Sealing", "Publishing"} <= set(steps)
    # What only the image tells is shown in capitals.
    known = {word for command in commands for word in command}
    for command in map(normal, logged_commands(done.stderr)):
        assert command[0] in known, command
    image = place.directory / f"stand-in-{TODAY}.raw"
    assert image.stat().st_size == LARGER
    offset, size = root_of(image)
    assert LARGER - offset - size <= MIB
    with mounted(image, tmp_path) as point:
        status = os.statvfs(point)
        assert status.f_blocks * status.f_frsize > (SIZE + LARGER) // 2
        assert (point / "srv/data").read_text() == FILES["srv/data"]
        assert FILES["etc/machine-id"] not in (point / "etc/machine-id").read_text()
        assert (point / "var/log/dpkg.log").read_text() == ""
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before
    assert place.files() == {name, "image-factory.conf", image.name, f"{image.name}.sha256sum"}


def test_size_stays_and_a_build_goes_on(place: Place, disks: Path) -> None:
    """Without image-size; and --resume knows whether the image is still the same."""
    source = place.put(_made(disks, "ext4"), "image.img", *CONVERT, "qcow2", "SOURCE", "TARGET")
    place.configure(source.name, mount_via="loop", format="raw")
    place.run("--until", "install")
    os.utime(source)
    done = place.run("--resume", check=False)
    assert (done.returncode, "source-image changed since the disk was installed" in done.stderr) == (2, True)
    place.run("--until", "install")
    done = place.run("--resume")
    assert "Copying the source image" not in done.stderr
    assert (place.directory / f"stand-in-{TODAY}.raw").stat().st_size == SIZE


@pytest.mark.parametrize("what", ["file", "directory"])
def test_only_a_copy_is_read_of_what_others_can_change(place: Place, disks: Path, what: str) -> None:
    (place.directory / "shared").mkdir()
    source = place.put(_made(disks, "ext4"), "shared/image.img", *CONVERT, "qcow2", "SOURCE", "TARGET")
    (source if what == "file" else source.parent).chmod(0o777)
    place.configure(str(source), mount_via="loop", format="raw")
    argv = place.argv_with("qemu-img", 'stat -c %F .image-factory-stand-in/source >>seen\nexec /usr/bin/qemu-img "$@"')
    run(*argv, "--until", "install", cwd=place.directory)
    assert set((place.directory / "seen").read_text().splitlines()) == {"regular file"}


class Mirror(http.server.SimpleHTTPRequestHandler):
    """Serves a directory, and remembers what was asked of it."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *arguments: object) -> None:
        self.asked.append(self.requestline)


def test_downloaded_once(place: Place, disks: Path, tmp_path: Path) -> None:
    """The cache has it then; what is not as pinned is no image."""
    source = place.put(_made(disks, "ext4"), "image.qcow2", *CONVERT, "qcow2", "-c", "SOURCE", "TARGET")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    served = tmp_path / "served"
    served.mkdir()
    shutil.move(source, served)
    handler = functools.partial(Mirror, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            uri = f"http://127.0.0.1:{server.server_port}/image.qcow2"
            keys = {"mount_via": "loop", "format": "qcow2", "cache_dir": "cache", "source_image_sha256": digest}
            place.configure(uri, **keys)
            assert f"GET {uri}" in place.run("--dry-run").stdout
            place.run("--json", "record.json")
            record = json.loads((place.directory / "record.json").read_text())
            [used] = [entry for entry in record["inputs"] if entry["key"] == "source-image"]
            assert (used["origin"], used["sha256"], used["verified_by"]) == (uri, digest, "source-image-sha256")
            asked = len(Mirror.asked)
            place.run()
            assert len(Mirror.asked) == asked
            place.configure(uri, **keys | {"source_image_sha256": "0" * 64, "cache_dir": "other"})
            done = place.run(check=False)
            assert (done.returncode, "expected SHA-256 0000" in done.stderr) == (1, True)
        finally:
            server.shutdown()
            thread.join()
    place.configure(uri, **keys | {"offline": "yes"})
    place.run()


BACKED = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "SOURCE", "TARGET"]
TOO_SMALL = "is less than the 400.0 MiB of the source image"
REFUSED: dict[str, tuple[list[str], dict[str, str], str]] = {
    "backing file": (BACKED, {}, "has a backing file"),
    "too small": ([*CONVERT, "qcow2", "SOURCE", "TARGET"], {"image_size": "100M"}, TOO_SMALL),
    "no image": (["sh", "-c", 'echo "[x]" > "$1"', "SOURCE", "TARGET"], {}, "is no disk image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_done(place: Place, disks: Path, name: str) -> None:
    argv, keys, message = REFUSED[name]
    place.put(_made(disks, "ext4"), "image", *argv)
    place.configure("image", mount_via="loop", **keys)
    for flags in ((), ("--check",)):
        done = place.run(*flags, check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert place.files() == {"image", "image-factory.conf"}


def test_unfit_image_is_named_as_the_user_knows_it(place: Place, disks: Path) -> None:
    """When it is found out only in the build, too, where it has another name."""
    place.put(_made(disks, "ext4"), "image.gz", "sh", "-c", 'echo "[x]" | gzip >"$1"', "SOURCE", "TARGET")
    place.configure("image.gz", mount_via="loop")
    done = place.run(check=False)
    assert done.returncode == 1
    assert "image-factory: error: image.gz is no disk image" in done.stderr


def test_what_does_not_fit_is_found_when_it_is_unpacked(place: Place, disks: Path) -> None:
    place.put(_made(disks, "ext4"), "image", "sh", "-c", 'xz -c "$0" >"$1"', "SOURCE", "TARGET")
    place.configure("image", mount_via="loop", image_size="100M")
    done = place.run(check=False)
    assert done.returncode == 1
    assert TOO_SMALL in done.stderr
    assert place.files() == {"image", "image-factory.conf"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("step", ["prlimit", "qemu-img", "guestfish"])
def test_stopped(place: Place, disks: Path, step: str, number: signal.Signals) -> None:
    """Nothing is left; after SIGKILL once --cleanup was there."""
    place.put(_made(disks, "ext4"), "image", "sh", "-c", 'xz -c "$0" >"$1"', "SOURCE", "TARGET")
    place.configure("image", mount_via="loop", image_size=str(LARGER))
    # guestfish ends when nobody talks to it any more.
    waiting = "cat >/dev/null" if step == "guestfish" else "sleep 4713"
    argv = place.argv_with(step, f"echo $$ >> started\nexec {waiting}")
    started = place.directory / "started"
    with subprocess.Popen(argv, cwd=place.directory, stderr=subprocess.PIPE) as process:
        wait_for(lambda: started.exists() or process.poll() is not None, "the program")
        process.send_signal(number)
        _, log = process.communicate(timeout=PATIENCE)
    assert process.returncode == (143 if number == signal.SIGTERM else -9), log.decode()
    for pid in started.read_text().split():
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "its end")
    if number == signal.SIGKILL:
        time.sleep(0.1)
        place.run("--cleanup")
    assert place.files() == {"image", "image-factory.conf", "programs", "started"}
