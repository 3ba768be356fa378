"""A file is replaced whole or not at all, and leaves nothing beside it."""

import hashlib
import os
import stat
from pathlib import Path

import pytest

from image_factory.base import events, files


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_replace(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    target.write_text("old")
    old = target.open()
    files.replace(target, b"new")
    assert target.read_text() == "new"
    # Whoever reads the older one reads all of it.
    assert old.read() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("mode", "mask", "expected"), [(None, 0o027, 0o640), (0o644, 0o077, 0o644), (0o600, 0, 0o600)])
def test_mode(tmp_path: Path, mode: int | None, mask: int, expected: int) -> None:
    before = os.umask(mask)
    try:
        with files.staged(tmp_path / "x", mode=mode) as path:
            assert mode_of(path) == (expected if mode is None else 0o600)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "x") == expected


def test_nothing_is_left_of_one_that_fails(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")

    def refuse(path: Path) -> None:
        assert path.read_bytes() == b"half"
        raise ValueError

    with pytest.raises(ZeroDivisionError), files.staged(target) as path:
        path.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ValueError), files.written(target, refuse) as file:
        file.write(b"half")
    # What was gone already when the body failed doesn't hide that.
    with pytest.raises(ZeroDivisionError), files.staged(target) as path:
        path.unlink()
        raise ZeroDivisionError
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        files.replace(tmp_path / "directory", b"")
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "x"]


def test_unfinished_file_is_in_another_directory(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with files.staged(tmp_path / "x", directory=tmp_path / "work") as path:
        assert path.parent == tmp_path / "work"
        assert not (tmp_path / "x").exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["work", "x"]


def test_written_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    fsync, move = os.fsync, files.move
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(files, "move", lambda source, target: (done.append("move"), move(source, target)))
    with files.written(tmp_path / "x") as file:
        file.write(b"new")
    assert done == ["fsync", "move"]
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 1])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_digest(tmp_path: Path, size: int, algorithm: str) -> None:
    data = bytes(size)
    (tmp_path / "x").write_bytes(data)
    assert files.digest_of(tmp_path / "x", algorithm, events.Meter()) == hashlib.new(algorithm, data).hexdigest()
