"""Guests that would have us read without end: sums have limits, memory too, and a signal ends each step."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from image_factory.base import command
from image_factory.base.command import output
from image_factory.base.errors import BuildError
from image_factory.finishing import seal
from image_factory.model import Change
from image_factory.system import inventory, rpmdb

from ..conftest import REPOSITORY, run
from ..unit.test_inventory import having, stanza, status
from ..unit.test_tree import Filesystem, assembled, root, volume

PACKAGES = 900


@pytest.fixture(scope="module")
def hostile_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk whose packages each have a copyright file of 64 MiB, with long licenses."""
    directory = tmp_path_factory.mktemp("hostile")
    names = [f"p{number}" for number in range(PACKAGES)]
    places = [directory / "tree/usr/share/doc" / name for name in names]
    for place in places:
        place.mkdir(parents=True)
    first = places[0] / "copyright"
    with first.open("w") as file:
        file.write("Format: x\n" + "".join(f"License: {number:0199d}\n" for number in range(100)))
        file.truncate(64 << 20)
    for place in places[1:]:
        os.link(first, place / "copyright")
    for name in ("etc", "var/lib/dpkg"):
        (directory / "tree" / name).mkdir(parents=True)
    (directory / "tree/etc/fstab").touch()
    (directory / "tree/var/lib/dpkg/status").write_text("\n\n".join(map(stanza, names)))
    disk = directory / "disk.raw"
    run("truncate", "-s", "66M", disk)
    subprocess.run(["sfdisk", "--quiet", disk], input="label: gpt\nstart=1MiB, size=64MiB\n", text=True, check=True)
    run("mke2fs", "-q", "-t", "ext4", "-d", directory / "tree", "-E", f"offset={1 << 20}", disk, "64M")
    return disk


PROGRAM = f"""
import os, signal, sys
from pathlib import Path
from typing import cast
sys.path.insert(0, {str(REPOSITORY)!r})
sys.argv[0] = {str(REPOSITORY / "image-factory")!r}
from image_factory.base import interrupts, log
from image_factory.system import inventory, loop, partitions
from image_factory.base.errors import Interrupted
from image_factory.model import Build, Disk
log.set_up()
disk = Disk(Path(sys.argv[1]))
stop_at = int(sys.argv[2])
count = 0
def load(path, most, offset=0):
    global count
    count += "copyright" in path
    if count == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
    return tree.load(path, most, offset)
try:
    with interrupts.handled(), loop.mounted(cast(Build, None), disk, partitions.read_volumes(disk.path)) as tree:
        found = inventory.read_packages(load, disk.path.parent)
        print(len(found), sum(package.licenses is not None for package in found))
except Interrupted as error:
    print(error.message)
# Not ru_maxrss, which has what the process that started this one had.
[peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(count, int(peak.split()[1]) // 1024)
"""


def take_inventory(disk: Path, stop_at: int) -> tuple[list[str], int, int, str]:
    """Have the packages of *disk* listed; return what is said of it, how many files were read, and MiB of memory."""
    argv = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(disk), str(stop_at)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(disk) not in run("losetup", "--list", "--noheadings", "--output", "BACK-FILE").stdout
    *said, last = done.stdout.splitlines()
    count, memory = map(int, last.split())
    return said, count, memory, done.stderr


def test_hostile_copyright_files(hostile_disk: Path) -> None:
    """There are 56 GiB of them: the first part of some is read, and a list of packages is made."""
    said, count, memory, log = take_inventory(hostile_disk, -1)
    assert said == [f"{PACKAGES} {count}"]
    assert count < 600
    assert memory < 250
    assert "The copyright files are too many or too long: those after" in log
    assert f"Of {count} copyright files only the first 1.0 MiB are read." in log


def test_signal_while_a_hostile_system_is_read(hostile_disk: Path) -> None:
    """No other file is read after it, and the disk is unmounted."""
    said, count, memory, _ = take_inventory(hostile_disk, 5)
    assert (said, count) == (["Stopped by SIGTERM."], 5)
    assert memory < 250


# Sums.


def test_what_is_read_of_a_system_has_a_sum() -> None:
    found = assembled(root("", a="x" * 1000))
    found.budget.size = 2500
    assert found.load("a", 1000) == b"x" * 1000
    assert len(found.read(["a"])["a"]) == 1000
    with pytest.raises(BuildError, match=r"The system has more than 2\.0 GiB where"):
        found.show(["a"])
    found = assembled(root("", a="x", b="x"))
    found.budget.names = 5
    assert len(found.entries(["a", "b"])) == len(found.truncate(["a", "b"])) == 2
    with pytest.raises(BuildError, match="more than 1000000 files"):
        found.remove(["etc/fstab", "a"])


@pytest.mark.parametrize("operation", ["show", "entries", "read", "remove", "truncate", "load", "usage"])
def test_signal_ends_whatever_reads_a_guest(operation: str) -> None:
    """It does so in each loop over a guest's files, at the next of them."""
    program = f"""
        import os, signal, sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from image_factory.base import interrupts
        from image_factory.base.errors import Interrupted
        from tests.unit.test_tree import assembled, root
        tree = assembled(root("", a="x"))
        arguments = {{"load": ("a", 9), "usage": ()}}.get({operation!r}, (["a"],))
        with interrupts.handled():
            getattr(tree, {operation!r})(*arguments)
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                getattr(tree, {operation!r})(*arguments)
            except Interrupted:
                print("stopped")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stdout == "stopped\n", done.stderr


def test_filesystem_that_is_in_many_places_is_measured_once() -> None:
    text = "UUID=u1 / ext4\n" + "".join(f"UUID=u2 /m{number} ext4\n" for number in range(200))
    calls: list[str] = []

    class Counting(Filesystem):
        def usage(self, top: str) -> dict[str, int]:
            calls.append(top)
            return super().usage(top)

    assembled(root(text), Counting(volume(2), {})).usage()
    assert calls == [""]


def test_list_of_dpkg_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of it would be a wrong list."""
    monkeypatch.setattr(inventory, "_LONGEST_STATUS", 1000)
    with pytest.raises(BuildError, match="/var/lib/dpkg/status of the system has more than 1000 B"):
        inventory.read_packages(status(stanza() + "\n" * 2000), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(inventory, "_MOST_PACKAGES", 100)
    with pytest.raises(BuildError, match="more than 200 entries"):
        inventory.read_packages(status(*[stanza()] * 300), tmp_path)


@pytest.mark.parametrize(("name", "value"), [("_COPYRIGHTS", 99), ("_LICENSE_TEXTS", 2), ("_COPYRIGHT_SECONDS", -1.0)])
def test_licenses_beyond_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: float
) -> None:
    by_path = {f"usr/share/doc/{name}/copyright": b"Format: x\nLicense: MIT\n" + b" " * 99 for name in "abc"}
    by_path["var/lib/dpkg/status"] = "\n\n".join(map(stanza, "abc")).encode()
    monkeypatch.setattr(inventory, name, value)
    found = inventory.read_packages(having(by_path), tmp_path)
    assert [package.licenses for package in found] == [("MIT",), None, None]
    assert caplog.messages == [
        "The copyright files are too many or too long: those after /usr/share/doc/a/copyright are not read."
    ]


def test_database_of_rpm_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "_LONGEST_DATABASE", 10 << 20)

    def read(path: str, most: int, offset: int = 0, /) -> bytes | None:
        return b"x" * most if path == f"var/lib/rpm/{rpmdb.NDB}" else None

    with pytest.raises(BuildError, match=r"/var/lib/rpm/Packages.db of the system has more than 10.0 MiB"):
        inventory.read_packages(read, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_are_not_known(caplog: pytest.LogCaptureFixture) -> None:
    class Unmeasured(Filesystem):
        def usage(self, top: str) -> dict[str, int]:
            raise BuildError("it is too much")

    assert inventory._sizes(assembled(Unmeasured(volume(1), {"etc/fstab": ""}))) == {}
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["What the directories of the system take is not known: it is too much"]


def test_sealing_of_very_many_files() -> None:
    """The changes are told apart in one pass: comparing each with each would take an hour."""
    gone = [Change(f"tmp/{number}", 1, 1) for number in range(100_000)]
    changes = [*gone, Change("etc/x", 1, 1)]
    assert seal.take_matching(changes, ["tmp/*"]) == gone
    assert changes == [Change("etc/x", 1, 1)]


# What programs print, and libraries take.


def test_program_that_prints_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MOST_PRINTED", 1 << 20)
    with pytest.raises(BuildError, match="yes printed more than 1 MiB"):
        command.run(["yes"], capture=True)
    with (
        pytest.raises(BuildError, match="sh printed more than 1 MiB"),
        command.conversation(["sh", "-c", "yes"], env={}, timeout=60, stop_seconds=0) as talk,
    ):
        talk.ask("")


def takes_much(_: object) -> int:
    return len(bytearray(4 << 30))


def test_library_that_takes_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError):
        command.call_apart(takes_much, 0, 60)
    monkeypatch.setattr(rpmdb, "_headers_of", takes_much)
    with pytest.raises(BuildError, match="takes too much memory"):
        rpmdb.read(tmp_path / rpmdb.NDB)


def test_headers_of_rpm_have_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry may name the same large header."""
    monkeypatch.setattr(rpmdb, "_HEADERS", 1000)
    with pytest.raises(ValueError, match="more than any system has"):
        rpmdb._parsed([bytes(100)] * 11)
