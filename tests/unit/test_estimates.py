"""How long a build takes: kept from build to build, and what is left of it."""

import datetime
import json
import os
import time
from pathlib import Path

import pytest

from image_factory.base import events
from image_factory.configuration.files import Configuration
from image_factory.model import Plan
from image_factory.told import estimates
from image_factory.told.estimates import FILE_NAME, Timeline

CHECKSUM = "Checksumming x-2026-01-02.raw"


class Clock:
    """The time, which goes on only when a test has it go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def make_plan(directory: Path, *, day: int = 2, virt_type: str = "qemu") -> Plan:
    configuration = directory / "x.conf"
    configuration.write_text(f"[x]\nlinux=l\ninitrd=i\ncache-dir={directory}/cache\nvirt-type={virt_type}\n")
    settings = Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}).image("x", {})
    return Plan("x", settings, datetime.date(2026, 1, day), directory, {})


def build(timeline: Timeline, clock: Clock, *, scale: float = 1.0, checksum: str = CHECKSUM) -> None:
    """Install for 10 + 40 + 50 s, checksum for 20 s, times *scale*."""

    def wait(seconds: float) -> None:
        clock.now += seconds * scale

    timeline.notice(events.StepStarted("Installing"))
    wait(10)
    timeline.notice(events.PhaseStarted("Base"))
    wait(40)
    timeline.notice(events.PhaseStarted("Packages"))
    wait(50)
    timeline.notice(events.StepEnded("Installing", 100, failed=False))
    timeline.notice(events.StepStarted(checksum))
    wait(20)
    timeline.notice(events.StepEnded(checksum, 20, failed=False))


def kept(directory: Path) -> Path:
    return directory / "cache/x" / FILE_NAME


def build_and_keep(directory: Path, clock: Clock, *, scale: float = 1.0, virt_type: str = "qemu") -> None:
    timeline = Timeline(make_plan(directory, virt_type=virt_type))
    build(timeline, clock, scale=scale)
    timeline.keep()


def test_first_build_has_no_estimate(tmp_path: Path, clock: Clock) -> None:
    timeline = Timeline(make_plan(tmp_path))
    build(timeline, clock)
    assert timeline.left() is None
    assert not kept(tmp_path).exists()


def test_what_is_left(tmp_path: Path, clock: Clock) -> None:
    build_and_keep(tmp_path, clock)
    # Another day's file has another name.
    timeline = Timeline(make_plan(tmp_path, day=3))
    assert timeline.left() == pytest.approx(120)
    timeline.notice(events.StepStarted("Installing"))
    clock.now += 4
    assert timeline.left() == pytest.approx(116)
    clock.now += 20
    # It takes longer than it did, so that it is about to end.
    assert timeline.left() == pytest.approx(110)
    timeline.notice(events.PhaseStarted("Base"))
    timeline.notice(events.Progressed(0.25))
    assert timeline.left() == pytest.approx(0.75 * 40 + 70)
    clock.now += 80
    # The pace is that of this build where it is slower.
    assert timeline.left() == pytest.approx(0.75 * 80 + 70)
    timeline.notice(events.PhaseStarted("Unheard of"))
    assert timeline.left() == pytest.approx(70)
    timeline.notice(events.StepEnded("Installing", 104, failed=False))
    timeline.notice(events.StepStarted("Checksumming x-2026-01-03.raw"))
    clock.now += 5
    assert timeline.left() == pytest.approx(15)


def test_state(tmp_path: Path, clock: Clock) -> None:
    timeline = Timeline(make_plan(tmp_path))
    assert (timeline.step, timeline.phase, timeline.fraction) == (None, "", None)
    timeline.notice(events.PhaseStarted("Of no step"))
    timeline.notice(events.StepEnded("Never begun", 1, failed=False))
    timeline.notice(events.StepStarted("Installing"))
    clock.now += 3
    timeline.notice(events.PhaseStarted("Base"))
    clock.now += 4
    timeline.notice(events.Progressed(0.5))
    assert (timeline.step, timeline.phase, timeline.fraction) == ("Installing", "Base", 0.5)
    assert (timeline.seconds, timeline.step_seconds, timeline.phase_seconds) == (7, 7, 4)
    timeline.notice(events.PhaseStarted("Packages"))
    assert timeline.fraction is None


def test_median_of_the_last_builds(tmp_path: Path, clock: Clock) -> None:
    for scale in (100, 1, 2, 3, 2, 1):
        build_and_keep(tmp_path, clock, scale=scale)
    assert len(json.loads(kept(tmp_path).read_text())["qemu"]) == 5
    # The first, and slowest, is forgotten.
    assert Timeline(make_plan(tmp_path)).left() == pytest.approx(2 * 120)


def test_build_that_was_resumed_spoils_nothing(tmp_path: Path, clock: Clock) -> None:
    build_and_keep(tmp_path, clock)
    timeline = Timeline(make_plan(tmp_path))
    timeline.notice(events.StepStarted(CHECKSUM))
    clock.now += 30
    timeline.notice(events.StepEnded(CHECKSUM, 30, failed=False))
    timeline.keep()
    assert Timeline(make_plan(tmp_path)).left() == pytest.approx(100 + 25)


def test_kvm_and_emulation_are_apart(tmp_path: Path, clock: Clock) -> None:
    build_and_keep(tmp_path, clock, scale=10)
    build_and_keep(tmp_path, clock, virt_type="kvm")
    assert Timeline(make_plan(tmp_path)).left() == pytest.approx(1200)
    assert Timeline(make_plan(tmp_path, virt_type="kvm")).left() == pytest.approx(120)


@pytest.mark.parametrize("usable", [True, False])
def test_auto_is_what_the_device_says(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, usable: bool
) -> None:
    device = tmp_path / "kvm"
    if usable:
        device.touch()
    monkeypatch.setattr(estimates, "_KVM_DEVICE", str(device))
    build_and_keep(tmp_path, clock, virt_type="auto")
    assert list(json.loads(kept(tmp_path).read_text())) == ["kvm" if usable else "qemu"]


def test_file_is_readable_for_all_and_alone(tmp_path: Path, clock: Clock) -> None:
    umask = os.umask(0o077)
    try:
        build_and_keep(tmp_path, clock)
    finally:
        os.umask(umask)
    assert kept(tmp_path).stat().st_mode & 0o777 == 0o644
    assert [path.name for path in kept(tmp_path).parent.iterdir()] == [FILE_NAME]


FOREIGN = {
    "empty": b"",
    "not text": b"\xff\xfe\x00",
    "not JSON": b"{",
    "list": b"[1, 2]",
    "number": b"7",
    "null": b"null",
    "builds": b'{"qemu": 7}',
    "build": b'{"qemu": [7]}',
    "part": b'{"qemu": [[7]]}',
    "short part": b'{"qemu": [[["a", "b"]]]}',
    "seconds": b'{"qemu": [[["a", "b", "c"]]]}',
    "no seconds": b'{"qemu": [[["a", "b", null]]]}',
    "infinite": b'{"qemu": [[["a", "b", Infinity]]]}',
    "no number": b'{"qemu": [[["a", "b", NaN]]]}',
    "negative": b'{"qemu": [[["a", "b", -1]]]}',
    "digits": b'{"qemu": [[["a", "b", ' + b"9" * 5000 + b"]]]}",
    "deep": b"[" * 100_000,
    "long": b" " * (2 << 20) + b"{}",
}


@pytest.mark.parametrize("row", FOREIGN)
def test_damaged_file_is_ignored_and_replaced(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, row: str
) -> None:
    kept(tmp_path).parent.mkdir(parents=True)
    kept(tmp_path).write_bytes(FOREIGN[row])
    assert Timeline(make_plan(tmp_path)).left() is None
    build_and_keep(tmp_path, clock)
    assert Timeline(make_plan(tmp_path)).left() == pytest.approx(120)
    assert caplog.text == ""


def test_part_that_came_twice_counts_once(tmp_path: Path, clock: Clock) -> None:
    timeline = Timeline(make_plan(tmp_path))
    timeline.notice(events.StepStarted("Installing"))
    for name in ("a", "b", "a"):
        timeline.notice(events.PhaseStarted(name))
        clock.now += 5
    timeline.notice(events.StepEnded("Installing", 15, failed=False))
    timeline.keep()
    assert json.loads(kept(tmp_path).read_text())["qemu"] == [
        [["Installing", "", 0.0], ["Installing", "a", 10.0], ["Installing", "b", 5.0]]
    ]


@pytest.mark.parametrize("obstacle", ["file for the cache", "file for the directory", "directory for the file"])
def test_cache_that_can_not_be_written(tmp_path: Path, clock: Clock, obstacle: str) -> None:
    if obstacle == "file for the cache":
        (tmp_path / "cache").touch()
    elif obstacle == "file for the directory":
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache/x").touch()
    else:
        kept(tmp_path).mkdir(parents=True)
    build_and_keep(tmp_path, clock)
    assert Timeline(make_plan(tmp_path)).left() is None
    if kept(tmp_path).is_dir():
        assert list(kept(tmp_path).parent.iterdir()) == [kept(tmp_path)]
