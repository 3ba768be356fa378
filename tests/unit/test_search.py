"""The search for secrets in a disk, as bytes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from image_factory.checks import search
from image_factory.checks.search import CHUNK, CONTEXT, MOST, Hit, Needle

M = 1 << 20
SECRET = b"$6$salt$0123456789abcdefghijklmnopqrstuvwxyz"
NEEDLE = Needle("passwords", "the hash of a password", SECRET)
SHORT = Needle("proxy-password", "a password", b"me:s3cret@")


def offsets(path: Path, *needles: Needle) -> list[int]:
    return [hit.offset for hit in search.search(path, needles or (NEEDLE,))]


def sparse(path: Path, size: int, **parts: bytes) -> Path:
    """Write a file of *size* bytes that has the *parts* at the offsets in their names, and holes else."""
    with path.open("wb") as file:
        file.truncate(size)
        for name, data in parts.items():
            os.pwrite(file.fileno(), data, int(name.removeprefix("at")))
    return path


BORDERS = [
    0,
    1,
    CHUNK - len(SECRET),
    *range(CHUNK - len(SECRET) - CONTEXT - 1, CHUNK - len(SECRET) - CONTEXT + 2),
    CHUNK - len(SECRET) + 1,
    CHUNK - 1,
    CHUNK,
    CHUNK + 1,
    *range(2 * CHUNK - len(SECRET) - CONTEXT - 1, 2 * CHUNK + 2, 7),
    2 * CHUNK + 4711,
    3 * CHUNK - len(SECRET),
]


@pytest.mark.parametrize("offset", BORDERS)
def test_it_is_found_wherever_chunks_end(tmp_path: Path, offset: int) -> None:
    data = bytearray(b"x" * (3 * CHUNK))
    data[offset : offset + len(SECRET)] = SECRET
    path = tmp_path / "disk"
    path.write_bytes(data)
    assert search.search(path, [NEEDLE, SHORT]) == [Hit(NEEDLE, offset)]


def test_all_places_are_found_once_and_in_order(tmp_path: Path) -> None:
    data = bytearray(random.Random(6).randbytes(2 * CHUNK + 12345))
    planted = sorted(random.Random(7).sample(range(0, len(data) - 100, 100), 60))
    for number, offset in enumerate(planted):
        secret = SHORT.data if number % 3 else SECRET
        data[offset : offset + len(secret)] = secret
    path = tmp_path / "disk"
    path.write_bytes(data)
    assert offsets(path, NEEDLE, SHORT) == planted


def test_overlapping_places(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"abababa")
    assert offsets(path, Needle("", "", b"aba")) == [0, 2, 4]


@pytest.mark.parametrize("size", [0, 1, len(SECRET) - 1])
def test_disk_that_is_smaller_than_the_needle(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk"
    path.write_bytes(SECRET[:size])
    assert offsets(path) == []


def test_without_needles_nothing_is_read(tmp_path: Path) -> None:
    assert search.search(sparse(tmp_path / "disk", 1 << 40), []) == []


def test_holes_are_skipped(tmp_path: Path) -> None:
    """A disk of 1 TiB with three blocks of data takes no time."""
    end = (1 << 40) - len(SECRET)
    path = sparse(
        tmp_path / "disk", 1 << 40, **{f"at{5 * M + 3}": SECRET, "at500000000000": SECRET, f"at{end}": SECRET}
    )
    start = time.monotonic()
    assert offsets(path) == [5 * M + 3, 500000000000, end]
    assert time.monotonic() - start < 60


def test_only_holes(tmp_path: Path) -> None:
    assert offsets(sparse(tmp_path / "disk", 1 << 30)) == []


def test_a_place_that_is_wanted(tmp_path: Path) -> None:
    """What is around it is known also where it's in another chunk."""
    asked: list[tuple[bytes, bytes]] = []

    def is_wanted(offset: int, before: bytes, found: bytes, after: bytes) -> bool:
        assert found == path.read_bytes()[offset : offset + len(SECRET)] == SECRET
        asked.append((before, after))
        return before.endswith(b"root:") and after.startswith(b":19000:")

    path = tmp_path / "disk"
    needle = Needle("passwords", "", SECRET, is_wanted=is_wanted)
    line = b"root:" + SECRET + b":19000:" + b"y" * CONTEXT
    for offset in range(CHUNK - len(line) - 2, CHUNK + 3, 5):
        data = bytearray(b"x" * (2 * CHUNK))
        data[offset : offset + len(line)] = line
        path.write_bytes(data)
        assert offsets(path, needle) == []
        before, after = asked.pop()
        assert (len(before), len(after), asked) == (CONTEXT, CONTEXT, [])
    path.write_bytes(b"root=" + SECRET + b":19000:")
    assert offsets(path, needle) == [5]
    path.write_bytes(b"root:" + SECRET)
    assert offsets(path, needle) == [5]


def test_alignment(tmp_path: Path) -> None:
    path = sparse(tmp_path / "disk", 2 * M, at512=SECRET, at5000=SECRET, at1049088=SECRET)
    assert offsets(path, Needle("", "", SECRET, alignment=512)) == [512, 1049088]


@pytest.mark.parametrize("at", [0, 512 * 3, CHUNK - 512, CHUNK, 2 * CHUNK - 1024])
def test_those_that_begin_alike(tmp_path: Path, at: int) -> None:
    """Each is found at its own places, also where one is the beginning of another, or a border of chunks is near."""
    texts = ("-----BEGIN PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN RSA", "-----BEGIN ")
    short, *needles = [Needle("keys", text, text.encode(), 512) for text in texts]
    first = texts[1].encode()
    path = sparse(tmp_path / "disk", 3 * CHUNK, **{f"at{at}": first, f"at{at + 512}": texts[0].encode()})
    found = search.search(path, [short, *needles, NEEDLE])
    assert {(hit.needle.what, hit.offset) for hit in found} == {
        *((text, at) for text in texts[1:]),
        (texts[0], at + 512),
        (texts[3], at + 512),
    }
    assert [hit.offset for hit in found] == sorted(hit.offset for hit in found)


def test_disk_full_of_it(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(SHORT.data * (16 * M // len(SHORT.data)))
    start = time.monotonic()
    assert len(offsets(path, SHORT)) == MOST
    assert time.monotonic() - start < 60


def test_a_secret_is_not_in_its_repr() -> None:
    assert "salt" not in repr(Hit(NEEDLE, 1))


def test_memory_is_constant(tmp_path: Path) -> None:
    """72 MiB without a hole, in a process of its own."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        for _ in range(72):
            file.write(b"0123456789abcdef" * (M // 16))
    code = (
        "import pathlib, resource, sys\n"
        "from image_factory.checks import search\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "needles = [search.Needle('', '', b'%d nothing' % number) for number in range(30)]\n"
        "assert search.search(pathlib.Path(sys.argv[1]), needles) == []\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    repository = Path(__file__).resolve().parents[2]
    argv = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(argv, cwd=repository, check=True, capture_output=True, text=True)
    # Two or three chunks.
    assert int(done.stdout) * 1024 < 6 * CHUNK
