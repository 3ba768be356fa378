"""The guest's console is cut into lines, whatever comes."""

import os
import random
from pathlib import Path

import pytest

from image_factory.machines.console import Console, tail


def fed(*pieces: bytes) -> list[str]:
    console = Console()
    return [line for piece in pieces for line in console.feed(piece)] + ([console.line] if console.line else [])


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"one\r\ntwo\n\n\nthree", ["one", "two", "three"]),
        (b"10%\r20%\r\x1b[Kdone\r\n", ["10%", "20%", "done"]),
        (b"\x1b[1;31mred\x1b[0m text\n", ["red text"]),
        (b"\x1b]0;title\x07name\n", ["name"]),
        (b"first\x1b[5;10Hsecond\x1b[8Bthird", ["first", "second", "third"]),
        (b"a\x1b[3Cb\n", ["a b"]),
        (b"caf\xc3\xa9 \xff\n", ["café \ufffd"]),
        (b"\x00\x07bell\x7f\n", ["??bell?"]),
        (b"\x1b\n\x1b[\n\x1b[12;\nx", ["?", "x"]),
    ],
)
def test_lines(data: bytes, lines: list[str]) -> None:
    assert fed(data) == lines
    # However it is cut.
    assert fed(*(data[index : index + 1] for index in range(len(data)))) == lines


def test_line_that_grows() -> None:
    console = Console()
    assert console.feed(b"Installing  ... 10%") == []
    assert console.line == "Installing  ... 10%"
    assert console.feed(b"... 20%\x1b[") == []
    assert console.line == "Installing  ... 10%... 20%"
    assert console.feed(b"0m\r\n") == ["Installing  ... 10%... 20%"]
    assert console.line == ""


def test_line_without_an_end() -> None:
    console = Console()
    lines = console.feed(b"x" * 100_000)
    assert {len(line) for line in lines} == {4096}
    assert len("".join(lines)) + len(console.line) == 100_000
    assert all(len(line) <= 4096 for line in fed(b"y" * 50_000 + b"\n"))


def test_megabytes_of_anything() -> None:
    """In pieces, as they come: nothing is kept, and no time is lost over it."""
    console = Console()
    generator = random.Random(1)
    pieces = [
        generator.randbytes(1 << 18),
        b"x" * (1 << 18),
        b"\x1b" * (1 << 18),
        b"\x1b[" * (1 << 17),
        os.urandom(1 << 18),
    ]
    for number in range(20):
        for line in console.feed(pieces[number % len(pieces)]):
            assert len(line) <= 4096
        assert len(console.line) <= 4096


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"10%\r20%\r30%\n", ["30%"]),
        (b"\x1b[2J\x1b[1;31mred\x1b[0m \x07bell\n\n\n", ["red ?bell"]),
        (b"\xff\xfe\n", ["\ufffd\ufffd"]),
        (b"\x00" * 100_000, ["?" * 4096] * 16),
        (b"a question\r\x1b[22A\x1b[M\x1b[22B<Yes>\x1b[5;70H<No>", ["a question", "<Yes>", "<No>"]),
        (b"".join(b"line %d\n" % number for number in range(100)), [f"line {number}" for number in range(60, 100)]),
    ],
)
def test_tail(tmp_path: Path, data: bytes, lines: list[str]) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(data)
    assert tail(log) == lines


def test_tail_of_no_log(tmp_path: Path) -> None:
    assert tail(tmp_path / "none") == []
