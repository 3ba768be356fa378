"""Disks that come out the same each time, whoever makes them where and when."""

import subprocess
import time
from pathlib import Path

import pytest

from image_factory.base.command import search_path
from image_factory.disks import reproducible

from ..bootstrap_scene import WORK, new_place
from ..conftest import REPOSITORY, User, run
from ..small_archive import Archive

DATE = 1700000000

# What differs between two builds, beside the time.
_AROUND = {
    "first": ["env", "TZ=UTC", "LANG=C"],
    "second": [
        "env", "TZ=Asia/Tokyo", "LANG=de_DE.UTF-8", "LANGUAGE=de",
        "sh", "-c", 'umask 077; exec "$@"', "sh",
    ],
}  # fmt: skip

# Files in no order of their names, of before and of after the date; $1 is the top of the tree.
_TREE = r"""
cd "$1"; mkdir -p etc/ssh var/lib many boot/efi
for number in $(seq 300 -1 1) $(seq 301 400); do echo "$number" >"many/file-$number"; done
head -c 300000 /dev/zero | tr '\0' x >etc/large; ln etc/large many/link; ln -s large etc/link
hostname >etc/mailname; mkdir -m 700 private; echo key >etc/ssh/ssh_host_key; echo id >etc/machine-id
touch --date=2001-02-03 etc/large; touch --date=2100-01-01 etc/machine-id; chown 33:44 etc/ssh
"""

# Makes a disk in directory argv[2] of the tree that the script argv[1] makes.
_MAKE = r"""
import os, sys
from pathlib import Path
from image_factory.configuration.files import Configuration, FILE_VARIABLE
from image_factory import pipeline
from image_factory.disks import making
from image_factory.inside import namespaces
from image_factory.model import Build
from image_factory.sources import bootstrap
script, directory = sys.argv[1], Path(sys.argv[2])
path = directory / "own.conf"
(directory / "own.yaml").write_text("suite: trixie\nsources: [deb http://mirror.example.com/debian trixie main]\n")
path.write_text(
    f"[x]\nsource = bootstrap\nbootstrap = {directory}/own.yaml\nimage-size = 200M\nfirmware = hybrid\n"
)
work = directory / "work"
work.mkdir()
plan = pipeline.make_plan(Configuration({FILE_VARIABLE: str(path)}), "x", {"output-dir": str(directory)})
build = Build(plan, work, "vm")
layout = bootstrap.layout_of(plan, bootstrap.new_identity(plan, bootstrap.identity(plan)))
for name in ("boot.img", "core.img", "bootx64.efi", "grubx64.efi", "mmx64.efi"):
    (work / name).write_bytes(name.encode() * 100)
tree = work / "tree"
tree.mkdir()
with namespaces.entered(work, as_root=plan.as_root) as inside:
    inside.run("mount", "-t", "tmpfs", "tree", str(tree))
    inside.run("mkdir", str(tree / "root"))
    inside.run("sh", "-e", "-c", script, "sh", str(tree / "root"))
    making.make_disk(inside, tree / "root", build, layout)
print(layout.root.offset)
"""


@pytest.mark.parametrize("name", ["root", "c"])
def test_two_builds_make_one_disk(users: dict[str, User], tmp_path: Path, name: str) -> None:
    """Also after the systems were mounted and files of them changed."""
    user = users[name]
    disks = []
    for which, around in _AROUND.items():
        directory = user.directory(f"{which}-{name}")
        environment = f"PYTHONPATH={REPOSITORY}", f"PATH={search_path()}", f"SOURCE_DATE_EPOCH={DATE}"
        words = [*around, "env", *environment, "/usr/bin/python3", "-c", _MAKE, _TREE, directory]
        own_name = ["unshare", "--uts", "sh", "-c", f'hostname {which} && exec "$@"', "sh"]
        done = subprocess.run([*own_name, *user.argv(*words)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        disks.append((directory / "work/disk.raw", int(done.stdout)))
        # The kernel has the time of a change in parts of a second, and mke2fs in seconds.
        time.sleep(1.1)
    assert same(*(disk for disk, _ in disks))
    for number, (disk, offset) in enumerate(disks):
        # What other programs do meanwhile gives each of them another number of changes.
        point = tmp_path / f"{number}"
        point.mkdir()
        run("mount", "-o", f"loop,offset={offset}", disk, point)
        try:
            (point / "etc/ssh/ssh_host_key").unlink()
            # A file that is emptied first gets another block.
            with (point / "etc/machine-id").open("r+") as file:
                file.write("uninitialized\n")
            for time_of_it in range(number):
                run("touch", f"--date=@{time_of_it}", point / "etc/large")
                run("sync", "--file-system", point)
            run("touch", "--date=2001-02-03", point / "etc/large")
            # What has gone is free when the journal has it.
            run("sync", "--file-system", point)
            run("fstrim", point)
        finally:
            run("umount", point)
    assert not same(*(disk for disk, _ in disks))
    for disk, offset in disks:
        reproducible.settle(disk, offset, tmp_path, DATE)
        run("e2fsck", "-f", "-n", f"{disk}?offset={offset}")
    assert same(*(disk for disk, _ in disks))


def same(first: Path, second: Path) -> bool:
    """Return whether two files have the same contents."""
    return subprocess.run(["cmp", "--silent", first, second]).returncode == 0


@pytest.mark.parametrize(("name", "until"), [("root", "clean"), ("c", "clean")])
def test_two_systems_are_one(users: dict[str, User], small_archive: Archive, name: str, until: str) -> None:
    """What a package's script does is part of it, and that the disk was mounted is none."""
    place = new_place(users[name], small_archive)
    script = "hostname >/srv/name; mkdir /srv/made; date >/srv/date --date=@0; echo $LANG $TZ >/srv/words"
    place.archive.add("hello", files={"usr/share/hello": "hello"}, scripts={"postinst": script})
    place.archive.publish()
    place.recipe(packages="hello")
    disks = []
    for which, mask, language in (("first", "022", "C"), ("second", "077", "de_DE.UTF-8")):
        out = place.directory / which
        place.configure(output_dir=str(out))
        before = ["unshare", "--uts", "sh", "-c", f'hostname {which} && umask {mask} && exec "$@"', "sh"]
        # The zone of the tests is another one than UTC.
        zone = {"TZ": "UTC"} if which == "first" else {}
        environment = {"SOURCE_DATE_EPOCH": str(DATE), "LANG": language, **zone}
        done = run(*before, *place.argv("--until", until, "small", **environment), cwd=place.directory)
        assert name == "root" or "INFO: mount-via = fuse is chosen: " in done.stderr
        disks.append(out / WORK / "disk.raw")
    assert same(*disks)
