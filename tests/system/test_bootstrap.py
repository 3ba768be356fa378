"""Systems that are bootstrapped from a small archive, by root and by a user who may run nothing as root."""

import json
from pathlib import Path

import pytest

from ..bootstrap_scene import WORK, Place, new_place
from ..conftest import User, run
from ..small_archive import Archive


@pytest.fixture(params=["root", "c"])
def place(request: pytest.FixtureRequest, users: dict[str, User], small_archive: Archive) -> Place:
    """A place of root, and one of the user who has no sudo rule."""
    return new_place(users[request.param], small_archive)


def in_disk(disk: Path, request: str) -> str:
    """Return what debugfs answers on the last partition of *disk*, the root filesystem."""
    table = json.loads(run("sfdisk", "--json", disk).stdout)["partitiontable"]
    offset = table["partitions"][-1]["start"] * 512
    return run("debugfs", "-R", request, f"{disk}?offset={offset}").stdout


def test_disk_has_the_tree(place: Place) -> None:
    """With the owners and modes that it had for root of the namespaces; then nothing else is left."""
    script = "echo kept >/srv/file && chown 1000:42 /srv/file && chmod 4750 /srv/file"
    place.archive.add("hello", files={"usr/share/hello": "hello"}, scripts={"postinst": "echo said >/srv/postinst"})
    place.archive.publish()
    place.recipe(packages="hello", script=script)
    place.run()
    work = place.out / WORK
    kept = json.loads((work / "checkpoint.json").read_text())["kept"]
    assert {path.name for path in work.iterdir()} <= set(kept)
    disk = work / "disk.raw"
    assert in_disk(disk, "cat /usr/share/hello") == "hello"
    assert in_disk(disk, "cat /srv/postinst") == "said\n"
    status = in_disk(disk, "stat /srv/file")
    assert "Mode:  04750" in status and "User:  1000   Group:    42" in status, status
    assert "kept" in in_disk(disk, "cat /srv/file")
    assert "User:     0   Group:     0" in in_disk(disk, "stat /etc/passwd")
    assert "vmlinuz" in in_disk(disk, "cat /boot/grub/grub.cfg")
    place.run("--cleanup", "--output-dir", str(place.out))
    assert place.left() == []
