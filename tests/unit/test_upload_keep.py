"""Which files of older builds are removed at a destination: what an index says of them is not believed."""

import json
import logging
from typing import Any

import pytest

from image_factory.uploads import index


def entry(day: int, *files: Any, name: str = "x", **values: Any) -> dict[str, Any]:
    own = files or ({"path": f"{name}-{day}.raw", "companions": [f"{name}-{day}.raw.sha256sum"]},)
    return {"name": name, "build": f"{name}-{day}", "date": f"2024-02-{day:02}", "files": [*own], **values}


def document(*images: dict[str, Any]) -> bytes:
    return json.dumps({"program": "image-factory", "version": 1, "images": images}).encode()


def builds(data: bytes) -> list[str]:
    return [each["build"] for each in json.loads(data)["images"]]


@pytest.mark.parametrize(
    ("keep", "stay"),
    [(None, ["x-5", "x-4", "x-3", "x-1"]), (1, ["x-5"]), (2, ["x-5", "x-4"]), (9, ["x-5", "x-4", "x-3", "x-1"])],
)
def test_newest_builds_of_the_image_stay(keep: int | None, stay: list[str]) -> None:
    others = [entry(1), entry(4), entry(3), entry(1, name="y"), entry(2, name="y")]
    data = index.merged(document(*others), entry(5), "up", keep)
    assert builds(data) == [*stay, "y-2", "y-1"]
    gone = [each["build"] for each in index.older(others, entry(5), keep)]
    assert sorted(gone) == sorted({"x-4", "x-3", "x-1"} - {*stay})


def test_build_of_an_older_day_stays_itself() -> None:
    data = index.merged(document(entry(4), entry(3)), entry(1), "up", 2)
    assert builds(data) == ["x-4", "x-1"]


def test_later_build_of_a_day_is_the_newer() -> None:
    first, second, third = (entry(1, build=f"x-{number}") for number in "abc")
    data = index.merged(document(), first, "up")
    for each in (second, third):
        data = index.merged(data, each, "up", 2)
    assert builds(data) == ["x-c", "x-b"]


def test_build_that_is_replaced_is_no_older_one() -> None:
    """Another section may have brought its other formats to the same place."""
    assert index.older([entry(5, {"path": "x-5.qcow2"})], entry(5), 1) == []


def test_files_of_builds_that_are_gone() -> None:
    gone = [entry(1), entry(2, {"path": "x-2.raw"}, {"path": "x-2.qcow2", "companions": ["x-2 list.txt", "x-2.raw"]})]
    assert index.files_of(gone, [entry(5)], "up") == [
        "x-1.raw", "x-1.raw.sha256sum", "x-2.raw", "x-2.qcow2", "x-2 list.txt"
    ]  # fmt: skip


BAD_NAMES = [
    "", ".", "..", "../x.raw", "/etc/passwd", "a/x.raw", "x.raw/", "./x.raw", ".htaccess", ".~tmp~", "-rf", "*", "x*",
    "[x]", "x?y", "x\\y", "x\ny", "x\0y", "x%2fy", "x:y", "$HOME", "`x`", "x;y", "x'y", "ä", " x", "x\n",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_of_an_index_that_are_none_of_a_file_of_ours(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="image-factory")
    gone = [entry(1, {"path": name, "companions": [name, "good"]})]
    assert index.files_of(gone, [entry(5)], "up") == ["good"]
    assert caplog.messages == [f"{name!r}, which index.json at up had, is no name of a file of ours: it stays."]


@pytest.mark.parametrize(
    "stays",
    [
        entry(5, {"path": "shared.raw"}),
        entry(5, {"path": "x.raw", "companions": ["shared.raw"]}),
        entry(1, {"path": "shared.raw"}, name="y"),
        entry(1, {"path": "./images/shared.raw"}, name="y"),
        {"name": "y", "build": "y", "date": "", "files": {"raw": [["shared.raw"]]}},
        {"name": "y", "build": "y", "date": "", "other": [{"file": "shared.raw"}]},
    ],
)
def test_file_that_a_build_that_stays_names_is_not_removed(stays: dict[str, Any]) -> None:
    """Whatever an index of another version calls it."""
    gone = [entry(1, {"path": "shared.raw", "companions": ["own", "index.json"]})]
    assert index.files_of(gone, [stays], "up") == ["own"]


@pytest.mark.parametrize(
    "files", [None, "x.raw", 7, {"path": "x.raw"}, ["x.raw"], [["x.raw"]], [{"path": 7, "companions": "abc"}], [{}]]
)
def test_entry_of_another_form_names_nothing(files: Any) -> None:
    assert index.files_of([{**entry(1), "files": files}], [], "up") == []
