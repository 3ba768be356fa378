"""What the long parts of a build tell of how much of them is done."""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from image_factory.base import command, events, files, units
from image_factory.base.command import output
from image_factory.base.errors import BuildError
from image_factory.configuration.parsers import parse_source
from image_factory.downloads import fetch

from .test_estimates import Clock


class Everything:
    """An observer that keeps all."""

    def __init__(self) -> None:
        self.events: list[events.Event] = []

    def notice(self, event: events.Event) -> None:
        self.events.append(event)

    @property
    def fractions(self) -> list[float]:
        return [event.fraction for event in self.events if isinstance(event, events.Progressed)]


@pytest.fixture
def told() -> Iterator[Everything]:
    everything = Everything()
    with events.observed(everything):
        yield everything


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between what is told."""
    monkeypatch.setattr(events.Meter, "_SECONDS", 0.0)


def test_meter_tells_five_times_a_second_and_the_end(told: Everything, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    meter = events.Meter()
    for done in range(101):
        meter.at(done, 100)
        clock.now += 0.01
    assert len(told.fractions) == 6
    assert (told.fractions[0], told.fractions[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(("done", "total", "fractions"), [(1, 0, []), (0, 0, []), (5, 4, [1.0]), (-1, 4, [0.0])])
def test_meter_is_given_nonsense(told: Everything, done: float, total: float, fractions: list[float]) -> None:
    events.Meter().at(done, total)
    assert told.fractions == fractions


# Programs.


def test_states_of_a_progress_bar(told: Everything, often: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="image-factory")
    script = r"""
        printf 'before\n    (0.00/100%%)\r'; sleep 0.1
        printf '    (12.50/10'; sleep 0.1; printf '0%%)\r'; sleep 0.1
        printf '    (50.00/100%%)\r    (75.00/100%%)\r'; sleep 0.1
        printf '    (100.00/100%%)\nafter\n'
    """
    command.run(["sh", "-c", script], progress=units.parse_percentage)
    assert told.fractions == [0.0, 0.125, 0.75, 1.0]
    assert caplog.messages[1:] == ["sh: before", "sh: after"]


def test_no_progress_is_asked_for(told: Everything, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="image-factory")
    command.run(["printf", r"    (50.00/100%%)\r    (99.00/100%%)\r"])
    assert told.fractions == []
    assert caplog.messages[1:] == ["printf:     (99.00/100%)"]


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> float:
    """The seconds after which observers are told that a program goes on."""
    assert output.TICK_SECONDS == 1
    monkeypatch.setattr(output, "TICK_SECONDS", 0.1)
    return output.TICK_SECONDS


def test_time_passes_while_a_program_says_nothing(told: Everything, ticks: float) -> None:
    start = time.monotonic()
    command.run(["sleep", "1.5"])
    begun, *others = told.events
    assert isinstance(begun, events.CommandRun)
    assert 2 <= len(others) <= (time.monotonic() - start) / ticks
    assert set(others) == {events.TimePassed()}


def test_time_limit_holds_beside(told: Everything, ticks: float) -> None:
    start = time.monotonic()
    with pytest.raises(BuildError, match="did not end within 1 s"):
        command.run(["sleep", "600"], timeout=0.6)
    assert 0.6 <= time.monotonic() - start < 120
    begun, *others = told.events
    assert isinstance(begun, events.CommandRun)
    assert 1 <= len(others) <= 5
    assert set(others) == {events.TimePassed()}


@pytest.mark.parametrize(
    ("text", "fraction"),
    [
        ("    (0.00/100%)", 0.0),
        ("    (45.67/100%)", 0.4567),
        ("    (100.00/100%)", 1.0),
        ("qemu-img: error", None),
        ("(1.0/100%)", None),
        ("x (1.00/100%)", None),
    ],
)
def test_line_of_qemu_img(text: str, fraction: float | None) -> None:
    assert units.parse_percentage(text) == fraction


def test_real_qemu_img(told: Everything, often: None, tmp_path: Path) -> None:
    disk, target = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    disk.write_bytes(os.urandom(16 << 20))
    # A busy machine would see the beginning and the end at once: it takes a second.
    argv = ["qemu-img", "convert", "-p", "-r", "16M", "-f", "raw", "-O", "qcow2", str(disk), str(target)]
    command.run(argv, progress=units.parse_percentage)
    assert told.fractions == sorted(told.fractions)
    assert told.fractions[-1] == 1.0
    assert len(told.fractions) > 2


# Files.


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (5 << 20) + 7])
def test_checksum(told: Everything, often: None, tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert files.digest_of(path, meter=events.Meter()) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert told.fractions == [min(1.0, (part << 20) / size) for part in range(1, -(-size // (1 << 20)) + 1)]


CONTENT = os.urandom(300_000)


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges unless the path says otherwise."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/absent":
            self.send_error(404)
            return
        first, last = 0, len(CONTENT) - 1
        if self.path == "/ranges":
            first, last = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
            last = min(last, len(CONTENT) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        else:
            self.send_response(200)
        if self.path == "/no-length":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(CONTENT[first : last + 1])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("path", ["ranges", "whole", "no-length"])
def test_download(told: Everything, often: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(fetch, "_PART_SIZE", 100_000)
    monkeypatch.setattr(fetch, "_PIECE_SIZE", 50_000)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            uri = f"http://127.0.0.1:{server.server_address[1]}"
            found = fetch.fetch(parse_source(f"{uri}/{path}"), tmp_path)
            with pytest.raises(fetch.BuildError, match="404"):
                fetch.fetch(parse_source(f"{uri}/absent"), tmp_path)
        finally:
            server.shutdown()
    assert found.read_bytes() == CONTENT
    # Of a length that the server doesn't say, nothing can be told.
    expected = [] if path == "no-length" else [part / 6 for part in range(1, 7)]
    assert told.fractions == pytest.approx(expected)
