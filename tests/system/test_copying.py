"""The user's files and first-boot scripts in a system on a real disk, which is mounted here and in the appliance."""

import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.finishing import copying, firstboot
from image_factory.finishing.seal import identity
from image_factory.model import Build, Disk
from image_factory.system import mounts, partitions
from image_factory.system.tree import Tree

from ..conftest import run, wait_for

OFFSET = 1 << 20
LABEL = "security.selinux"
ETC, MOTD = (f"system_u:object_r:{name}_t:s0\0".encode() for name in ("etc", "motd"))
WAYS = ["loop", "guestfs"]


pytestmark = pytest.mark.usefixtures("own_helper")


def make_build(directory: Path, text: str) -> Build:
    directory.mkdir(exist_ok=True)
    (directory / "own.conf").write_text(f"[x]\nlinux = /l\ninitrd = /i\noutput-dir = {directory}\n{text}\n")
    plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(directory / "own.conf")}), "x", {})
    return Build(plan, directory, "none")


def make_disk(directory: Path) -> Disk:
    """Make a disk with a system whose directories are merged, and with what leads out of it."""
    tree = directory / "tree"
    for name in ("etc/nginx", "usr/bin", "usr/lib/systemd", "root", "var/lib", "srv/here", "dev"):
        (tree / name).mkdir(parents=True)
    (tree / "etc/os-release").touch()
    (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:1033:1044::/:/bin/false\n")
    (tree / "etc/group").write_text("root:x:0:\nweb:x:1044:\nadm:x:4:\n")
    (tree / "etc/motd").write_text("the distribution's\n")
    (tree / "usr/bin/sh").touch(mode=0o755)
    (tree / "usr/lib/systemd/systemd").touch(mode=0o755)
    (tree / "root").chmod(0o700)
    links = {
        "bin": "usr/bin", "lib": "usr/lib", "etc/nginx/enabled": "available", "etc/out": "../../../../tmp",
        "etc/absolute": "/srv/here", "etc/dangling": "/tmp/not-there", "etc/loop": "loop", "etc/one": "two",
        "etc/two": "one", "etc/to-file": "motd", "root/private": "../srv",
    }  # fmt: skip
    for name, target in links.items():
        (tree / name).symlink_to(target)
    os.mkfifo(tree / "dev/pipe")
    for name, label in (("etc", ETC), ("etc/nginx", ETC), ("etc/motd", MOTD)):
        os.setxattr(tree / name, LABEL, label)
    os.chown(tree / "etc/motd", 7, 8)
    disk = Disk(directory / "disk.raw")
    run("truncate", "-s", "66M", disk.path)
    subprocess.run(
        ["sfdisk", "--quiet", disk.path], input="label: gpt\nstart=1MiB, size=64MiB\n", text=True, check=True
    )
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, "-E", f"offset={OFFSET}", disk.path, "64M")
    # What the administrator has made immutable is changed like all else: EXT4_EXTENTS_FL and the flag.
    run("debugfs", "-w", "-R", 'sif "/etc/motd" flags 0x80010', f"{disk.path}?offset={OFFSET}")
    return disk


def mounted(build: Build, way: str) -> AbstractContextManager[Tree]:
    return mounts.WAYS[way].mounted(build, Disk(build.disk_path), partitions.read_volumes(build.disk_path))


@contextmanager
def looked_into(disk: Path) -> Iterator[Path]:
    run("e2fsck", "-fn", f"{disk}?offset={OFFSET}")
    point = disk.parent / "point"
    point.mkdir()
    run("mount", "-o", f"ro,noload,loop,offset={OFFSET}", disk, point)
    try:
        yield point
    finally:
        run("umount", point)
        point.rmdir()
        # Whoever looks at the device keeps it for a moment yet.
        wait_for(lambda: str(disk) not in run("losetup", "--list", "--output", "BACK-FILE").stdout, "the device to go")


def make_files(directory: Path) -> None:
    """Make what is copied."""
    site = directory / "site"
    (site / "conf d/é[1]").mkdir(parents=True)
    (site / "conf d/é[1]/-odd\\x2d name").write_text("odd\n")
    (site / "bin").mkdir()
    (site / "bin/tool").write_bytes(b"#!/bin/sh\n")
    (site / "bin/tool").chmod(0o4775)
    (site / "current").symlink_to("../../../../outside/the tree")
    (site / "empty").mkdir(mode=0o700)
    (site / "host.conf.j2").write_text("name {{ host_name }}\n")
    (site / "zero").touch(mode=0o600)
    (directory / "motd").write_text("mine\n")
    (directory / "motd").chmod(0o640)
    (directory / "link").symlink_to("/etc/motd")
    (directory / "join.sh").write_text("#!/bin/sh\necho joined\n")
    (directory / "name.j2").write_text("#!/usr/bin/env -S sh -e\necho {{ host_name }}\n")
    # Not a multiple of anything, and more than image-factory-sudo-helper is given at once.
    with (directory / "large").open("wb") as file:
        file.write(b"begin")
        file.seek(33 << 20)
        file.write(b"end")


COPIES = """\
copy = {0}/motd:/etc/motd
    {0}/site/:/srv/site/:web:adm:0640
    {0}/site/bin/tool:/bin/:0:4:4711
    {0}/site:/etc/absolute/:web:web
    {0}/large:/large
    {0}/link:/root/private/new/link
    {0}/link:/etc/to-file
    {0}/motd:/lib/deep/er/motd
host-name = box
"""

# Of copy in one line, what the error says.
REFUSED = {
    "motd:/etc/out/x": "/etc/out of the image is a link that leads out of it.",
    "motd:/etc/out/x/y/z": "/etc/out of the image is a link that leads out of it.",
    "site/:/etc/out/": "/etc/out of the image is a link that leads out of it.",
    "motd:/etc/out": "/etc/out of the image is a link, and is to be a file.",
    "motd:/etc/to-file": "/etc/to-file of the image is a link, and is to be a file.",
    "motd:/etc/dangling/x": "/etc/dangling of the image is a link to something that is not there.",
    "motd:/etc/loop/x": "/etc/loop of the image leads through links without an end.",
    "motd:/etc/one/": "/etc/one of the image leads through links without an end.",
    "motd:/etc/motd/x": "/etc/motd of the image is no directory.",
    "motd:/etc/to-file/x": "/etc/motd of the image is no directory.",
    "motd:/etc/nginx": "/etc/nginx of the image is a directory, and is to be a file.",
    "site:/etc/motd": "/etc/motd of the image is no directory.",
    "link:/etc/motd": "/etc/motd of the image is a file, and is to be a link.",
    "motd:/dev/pipe": "/dev/pipe of the image is a device, a pipe or a socket, and is to be a file.",
    "motd:/etc/x:nobody:root": "the image has no user nobody.",
    "motd:/etc/x:web:wheel": "the image has no group wheel.",
    "motd:/etc/x:4294967295:0": "4294967295 is no number of a user or a group.",
    "site/bin:/srv/x\n link:/srv/x": "/srv/x is to be a directory and a link.",
    "motd:/srv/x\n motd:/srv/x/y": "/srv/x is to be a file and a directory.",
}


@dataclass
class Done:
    """The files of a disk to which all was copied, and what errors said before."""

    root: Path
    errors: dict[str, str]


@pytest.fixture(scope="module", params=WAYS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, own_helper: None) -> Iterator[Done]:
    """All is done twice to one disk: a build that is resumed does it again."""
    directory = tmp_path_factory.mktemp("copied")
    make_files(directory)
    build = make_build(directory, COPIES.format(directory))
    make_disk(directory)
    copying.check(build.plan)
    with mounted(build, request.param) as tree:
        errors = {text: refused(directory, text, tree) for text in REFUSED} | changed(directory, tree)
        for _ in range(2):
            copying.copy_files(build, tree)
        for scripts in (f"{directory}/name.j2, {directory}/join.sh", f"{directory}/join.sh\n {directory}/name.j2"):
            build = make_build(directory, f"first-boot = {scripts}\nhost-name = box")
            firstboot.check(build.plan)
            firstboot.install(build, tree)
    assert not (directory / "files-to-copy").exists()
    with looked_into(build.disk_path) as root:
        yield Done(root, errors)


def refused(directory: Path, text: str, tree: Tree) -> str:
    """Return what the error of *text* says, which comes before anything is written: a good file neither."""
    lines = [f"{directory}/{line.strip()}" for line in ("motd:/good", *text.split("\n"))]
    build = make_build(directory, "copy = " + "\n ".join(lines) + "\nhost-name = box")
    with pytest.raises(BuildError) as caught:
        copying.copy_files(build, tree)
    assert not tree.look(["good", "srv/x", "etc/x"])
    assert tree.look(["tmp/not-there"]) == {} and not Path("/tmp/not-there").exists()
    return caught.value.message


def changed(directory: Path, tree: Tree) -> dict[str, str]:
    """Return the errors where something changes between the look at it and its copy."""
    site = directory / "site"
    changes: dict[str, Callable[[], object]] = {
        "written": lambda: (site / "zero").write_text("more"),
        "new": lambda: (site / "new").touch(),
        "another mode": lambda: (site / "bin/tool").chmod(0o700),
        "a link": lambda: (site / "zero").unlink() or (site / "zero").symlink_to("/etc/shadow"),
        "gone": lambda: (site / "bin/tool").unlink(),
    }
    errors = {}
    for name, change in changes.items():

        def look(self: Tree, paths: Sequence[str], change: Callable[[], object] = change) -> object:
            patch.undo()
            change()
            return self.look(paths)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tree, "look", look)
            errors[name] = refused(directory, "site:/etc/x", tree)
    shutil.rmtree(site)
    for path in ("motd", "link", "large", "join.sh", "name.j2"):
        (directory / path).unlink()
    make_files(directory)
    return errors


@pytest.mark.parametrize("text", REFUSED)
def test_what_does_not_fit_is_refused(done: Done, text: str) -> None:
    assert done.errors[text] == f"[x] copy: {REFUSED[text]}"


def test_what_changes_meanwhile_is_refused(done: Done) -> None:
    found = {name: text for name, text in done.errors.items() if name not in REFUSED}
    assert len(found) == 5
    assert all(
        re.fullmatch(r"\[x\] copy: .* changed while it was copied\.|.*: No such file.*|.*: Too many levels.*", text)
        for text in found.values()
    ), found


def what(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def label(path: Path) -> bytes:
    return os.getxattr(path, LABEL, follow_symlinks=False).rstrip(b"\0")


def test_a_file_takes_the_place_of_another(done: Done) -> None:
    path = done.root / "etc/motd"
    assert path.read_text() == "mine\n"
    assert what(path) == (0, 0, 0o640)
    assert label(path) == MOTD.rstrip(b"\0")


def test_a_directory_with_its_contents(done: Done) -> None:
    site = done.root / "srv/site"
    assert what(site) == (1033, 4, 0o750)
    assert (site / "conf d/é[1]/-odd\\x2d name").read_text() == "odd\n"
    assert what(site / "conf d/é[1]") == (1033, 4, 0o750)
    assert what(site / "conf d/é[1]/-odd\\x2d name") == what(site / "zero") == (1033, 4, 0o640)
    assert (site / "host.conf").read_text() == "name box\n"
    assert not (site / "host.conf.j2").exists()
    assert list((site / "empty").iterdir()) == []
    assert os.readlink(site / "current") == "../../../../outside/the tree"
    assert what(site / "current")[:2] == (1033, 4)


def test_links_in_the_image_are_followed_inside(done: Done) -> None:
    assert what(done.root / "usr/bin/tool") == (0, 4, 0o4711)
    # What is there keeps owner and mode; the modes of the source have no setuid bit.
    assert what(done.root / "srv/here") == (0, 0, 0o755)
    assert what(done.root / "srv/here/site/bin/tool") == (1033, 1044, 0o775)
    assert what(done.root / "srv/here/site/empty") == (1033, 1044, 0o700)
    assert os.readlink(done.root / "srv/new/link") == os.readlink(done.root / "etc/to-file") == "/etc/motd"
    assert (done.root / "usr/lib/deep/er/motd").read_text() == "mine\n"
    assert what(done.root / "usr/lib/deep/er") == (0, 0, 0o755)
    assert {os.readlink(done.root / name) for name in ("bin", "etc/absolute")} == {"usr/bin", "/srv/here"}


def test_what_is_new_has_the_label_of_its_directory(done: Done) -> None:
    assert label(done.root / "etc/to-file") == ETC.rstrip(b"\0")
    assert os.listxattr(done.root / "srv/site") == []


def test_a_large_file(done: Done) -> None:
    with (done.root / "large").open("rb") as file:
        assert file.read(6) == b"begin\0"
        assert file.seek(-4, os.SEEK_END) == (33 << 20) - 1
        assert file.read() == b"\0end"


# What --check says of the sources.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none:/x", "none can't be read: No such file or directory."),
        ("pipe:/x", "pipe is a pipe."),
        ("site/:/x", "site/socket is a socket."),
        ("/dev/null:/x", "/dev/null is a device."),
        ("file/:/x", "file is no directory."),
        ("bad.j2:/x", "bad.j2, line 1: there is no key 'not-there'."),
    ],
)
def test_a_source_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("site").mkdir()
    Path("file").touch()
    Path("bad.j2").write_text("{{ not_there }}\n")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("site/socket")
        with pytest.raises(ConfigurationError) as caught:
            copying.check(make_build(tmp_path / "own", f"copy = {text}").plan)
    assert caught.value.message.startswith("[x] copy: ")
    assert message in caught.value.message


# First-boot scripts


def test_first_boot_scripts(done: Done) -> None:
    directory = done.root / firstboot.DIRECTORY
    # Those of the first time have gone.
    assert sorted(path.name for path in directory.iterdir()) == ["01-join.sh", "02-name"]
    assert (directory / "02-name").read_text().endswith("echo box\n")
    assert {what(directory), *map(what, directory.iterdir())} == {(0, 0, 0o700)}
    assert what(directory.parent) == (0, 0, 0o755)
    [unit, drop_in] = [done.root / path for path in firstboot.unit_paths()]
    assert unit.read_text() == firstboot.UNIT_TEXT
    assert "Wants=image-factory-first-boot.service" in drop_in.read_text()
    assert label(unit) == label(drop_in) == ETC.rstrip(b"\0")
    assert {what(unit), what(drop_in)} == {(0, 0, 0o644)}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("#!/usr/bin/perl -w\n", r"script: the image has no /usr/bin/perl, which would run it\."),
        ("#!/usr/bin/env python3\n", r"script: the image has no python3, which would run it\."),
        (None, r"the image has no systemd, which would run the scripts\."),
    ],
)
def test_first_boot_scripts_that_nothing_runs(tmp_path: Path, script: str | None, message: str) -> None:
    build = make_build(tmp_path, f"first-boot = {tmp_path}/script")
    (tmp_path / "script").write_text(script or "#!/bin/sh\n")
    disk = make_disk(tmp_path)
    if not script:
        run("debugfs", "-w", "-R", "rm /usr/lib/systemd/systemd", f"{disk.path}?offset={OFFSET}")
    with mounted(build, "loop") as tree:
        with pytest.raises(BuildError, match=message):
            firstboot.install(build, tree)
        assert not tree.look([firstboot.DIRECTORY, *firstboot.unit_paths()])


@pytest.mark.parametrize(
    "text", ["", "echo\n", "\n#!/bin/sh\n", "#!/bin/sh\r\n", "#!sh\n", "#!\n", " #!/bin/sh\n"], ids=repr
)
def test_a_first_boot_script_needs_its_first_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.sh").write_bytes(text.encode())
    plan = make_build(tmp_path / "own", f"first-boot = {tmp_path}/a.sh").plan
    with pytest.raises(
        ConfigurationError, match=re.escape(f"{tmp_path}/a.sh: its first line doesn't say what runs it.")
    ):
        firstboot.check(plan)


def boot(root: Path) -> "subprocess.CompletedProcess[str]":
    """Carry out the unit's commands on the files below *root*, one after the other as systemd does."""
    text = firstboot.UNIT_TEXT.replace("\\\n", " ").replace("$$", "$")
    commands = re.findall(r"^ExecStart=/bin/sh -euc '(.*)'$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        for top in (firstboot.DIRECTORY.rpartition("/")[0], identity.UNITS):
            command = command.replace(f"/{top}", f"{root}/{top}")
        done = subprocess.run(["sh", "-euc", command], capture_output=True, text=True, check=False)
        if done.returncode:
            break
    return done


def test_a_script_that_fails_is_tried_again_and_those_before_it_are_not(tmp_path: Path) -> None:
    directory = tmp_path / firstboot.DIRECTORY
    directory.mkdir(parents=True)
    units = [tmp_path / path for path in firstboot.unit_paths()]
    for path in units:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / identity.UNITS / "other.service").touch()
    for number, command in enumerate(("true", f"test -e {tmp_path}/mended", "true"), 1):
        script = directory / f"0{number}-a b.sh"
        script.write_text(f"#!/bin/sh\necho {number} >>{tmp_path}/ran\n{command}\n")
        script.chmod(0o700)
    for _ in range(2):
        done = boot(tmp_path)
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1] == f"Running {directory}/02-a b.sh"
        assert [path.name for path in sorted(directory.iterdir())] == ["02-a b.sh", "03-a b.sh"]
        assert all(path.exists() for path in units)
    (tmp_path / "mended").touch()
    assert boot(tmp_path).returncode == 0
    assert (tmp_path / "ran").read_text().split() == ["1", "2", "2", "2", "3"]
    assert not directory.parent.exists() and not any(path.exists() for path in units)
    assert (tmp_path / identity.UNITS / "other.service").exists()
    # Where it was killed between the two, nothing is left to be run, and the rest goes.
    units[0].touch()
    assert boot(tmp_path).returncode == 0
    assert not units[0].exists()
