"""Systems that are captured: from a directory, from a tar and from a machine that ssh reaches."""

import io
import json
import os
import re
import shutil
import socket
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from image_factory.finishing.seal.captured import CAPTURED

from ..capture_scene import Scene, make_system, new_scene
from ..conftest import User, run
from ..small_archive import Archive


@pytest.fixture(scope="module")
def system(base: Path, small_archive: Archive) -> Path:
    """The tree of a system that was lived in; all may read it."""
    tree = base / "captured"
    make_system(small_archive, tree)
    os.chown(tree / "home/ann", 1000, 1000)
    os.chown(tree / "home/ann/notes", 1000, 1000)
    return tree


@pytest.fixture
def tar(system: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of it, which all may read."""
    path = system.parent / "captured.tar.gz"
    if not path.exists():
        run("tar", "--create", "--gzip", "--xattrs", "--numeric-owner", f"--file={path}", f"--directory={system}", ".")
        path.chmod(0o644)
    return path


@pytest.fixture(params=["root", "c"])
def scene(request: pytest.FixtureRequest, users: dict[str, User]) -> Scene:
    """A place of root, and one of a user who has no sudo rule."""
    return new_scene(users[request.param])


@pytest.fixture
def user_scene(users: dict[str, User]) -> Scene:
    return new_scene(users["c"])


def in_disk(disk: Path, request: str) -> str:
    """Return what debugfs answers on the last partition of *disk*, the root filesystem."""
    table = json.loads(run("sfdisk", "--json", disk).stdout)["partitiontable"]
    offset = table["partitions"][-1]["start"] * 512
    return run("debugfs", "-R", request, f"{disk}?offset={offset}").stdout


def check_system(scene: Scene) -> None:
    """Check that the disk has the system, which can start on any machine."""
    disk = scene.disk
    assert in_disk(disk, "cat /srv/data") == "lived in\n"
    for name in ("tmp/scrap", "run/pid"):
        assert in_disk(disk, f"cat /{name}") == ""
    assert "Mode:  01777" in in_disk(disk, "stat /tmp")
    table = in_disk(disk, "cat /etc/fstab")
    assert [line.split()[1] for line in table.splitlines()] == ["/", "/boot/efi", "/srv/scratch"]
    assert "0815" not in table and "nas:" not in table
    assert in_disk(disk, "cat /etc/crypttab") == ""
    assert in_disk(disk, "cat /etc/default/grub") == 'GRUB_CMDLINE_LINUX="quiet  nosplash"\n'
    initramfs = in_disk(disk, "cat /boot/initrd.img-1.0").splitlines()
    assert initramfs[:3] == ["RESUME=none", "MODULES=most", "RESUME=none"] and initramfs[-1] == "1.0"
    assert table.splitlines()[0] in initramfs
    assert in_disk(disk, "cat /etc/initramfs-tools/conf.d/zz-image-factory") == ""
    assert "vmlinuz" in in_disk(disk, "cat /boot/grub/grub.cfg")
    assert in_disk(disk, "cat /boot/grub/i386-pc/normal.mod") == "a module"


def test_tar_becomes_a_disk(scene: Scene, tar: Path) -> None:
    """With its owners; then nothing else is left."""
    scene.configure(tar)
    scene.run()
    check_system(scene)
    status = in_disk(scene.disk, "stat /home/ann")
    assert "Mode:  0700" in status and "User:  1000   Group:  1000" in status, status
    assert "User:     0   Group:     0" in in_disk(scene.disk, "stat /etc/passwd")
    work = scene.disk.parent
    kept = json.loads((work / "checkpoint.json").read_text())["kept"]
    assert {path.name for path in work.iterdir()} <= set(kept)
    scene.run("--cleanup", "--output-dir", str(scene.out))
    assert scene.left() == []


def test_directory_becomes_a_disk(scene: Scene, system: Path) -> None:
    """An ordinary user's files become root's."""
    tree = scene.directory / "tree"
    run("cp", "-a", system, tree)
    if not scene.user.is_root:
        scene.own(tree)
    scene.configure(tree)
    scene.run()
    check_system(scene)
    owner = "User:  1000" if scene.user.is_root else "User:     0"
    assert owner in in_disk(scene.disk, "stat /home/ann")


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """Return a member that is a link."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def file(name: str) -> tarfile.TarInfo:
    """Return a member with four bytes."""
    member = tarfile.TarInfo(name)
    member.size = 4
    return member


def device(name: str) -> tarfile.TarInfo:
    """Return a member that is a device, from which bytes never end."""
    member = tarfile.TarInfo(name)
    member.type, member.devmajor, member.devminor = tarfile.CHRTYPE, 1, 5
    return member


# Members that lead to OUTSIDE, a directory of the user's, and what is said of them, empty where the system is built.
HOSTILE: dict[str, tuple[list[tarfile.TarInfo], str]] = {
    "through a link": ([link("srv/out", "OUTSIDE"), file("srv/out/file")], "srv/out/file: Cannot open"),
    "through a link and back": ([link("srv/out", "../../../../../../OUTSIDE"), file("srv/out/file")], "Cannot open"),
    "upwards": ([file("../../../../../OUTSIDE/new")], "Member name contains '\\.\\.'"),
    "by its whole path": ([file("OUTSIDE/new")], ""),
    "hard link": ([link("srv/hard", "OUTSIDE/file", tarfile.LNKTYPE), file("srv/hard")], "srv/hard: Cannot hard link"),
    "devices": ([device("usr/lib/grub/i386-pc/boot.img")], "boot|grub-pc-bin"),
    "directory of devices": ([link("dev", "OUTSIDE")], "can't be made one for any machine"),
    "table": ([link("etc/fstab", "OUTSIDE/file")], ""),
    "boot": ([link("boot/grub", "OUTSIDE")], "leads out of it"),
    "boot loader": ([link("boot/efi", "OUTSIDE")], "leads out of it"),
    "memory": ([link("tmp", "OUTSIDE")], "can't be made one for any machine|leads out of it"),
    "crypttab": ([link("etc/crypttab", "OUTSIDE/file")], ""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tar_reaches_nothing(scene: Scene, system: Path, name: str) -> None:
    outside = scene.directory / "outside"
    outside.mkdir()
    (outside / "file").write_text("file")
    scene.own(outside)
    before = [(path.name, path.read_text(), path.stat().st_mode) for path in outside.iterdir()]
    path = scene.directory / "hostile.tar"
    members, message = HOSTILE[name]
    replaced = {f"./{member.name}" for member in members}
    with tarfile.open(path, "w") as target:
        target.add(system, ".", filter=lambda found: None if found.name in replaced else found)
        for member in members:
            member.name = member.name.replace("OUTSIDE", str(outside))
            member.linkname = member.linkname.replace("OUTSIDE", str(outside))
            target.addfile(member, io.BytesIO(b"evil") if member.isreg() else None)
    scene.configure(path)
    if message:
        said = scene.fail()
        assert re.search(message, said[0]), said
    else:
        scene.run()
    assert [(path.name, path.read_text(), path.stat().st_mode) for path in outside.iterdir()] == before


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def other_machine(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[18:20] = b"\xb7\0"
    path.write_bytes(data)


# What is wrong with the tar of a tree, by what is done to the tree and then to the tar.
BAD: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str, str]] = {
    "no tar": (
        lambda tree: None, lambda tar: tar.write_bytes(b"no tar " * 999), "does not look like a tar", "gzip, xz",
    ),
    "empty": (lambda tree: None, lambda tar: tar.write_bytes(b""), "does not look like", "gzip, xz"),
    "cut off": (lambda tree: None, cut, "Unexpected EOF", "log"),
    "no system": (lambda tree: shutil.rmtree(tree / "etc"), lambda tar: None, "no system .*: no /etc", "at its top"),
    "no program": (lambda tree: shutil.rmtree(tree / "usr"), lambda tar: None, "no program in /usr/bin", "at its top"),
    "text for a program": (
        lambda tree: (tree / "usr/bin/env").write_text("#!/bin/sh"), lambda tar: None, "none of Linux", "at its top",
    ),
    "another architecture": (
        lambda tree: other_machine(tree / "usr/bin/env"), lambda tar: None, "is one of arm64, and arch is amd64",
        "Set arch = aarch64",
    ),
    "no boot loader": (
        lambda tree: shutil.rmtree(tree / "usr/lib/grub/i386-pc"), lambda tar: None, "has no grub-pc-bin", "firmware",
    ),
    "no filesystem": (
        lambda tree: (tree / "usr/sbin/mke2fs").unlink(), lambda tar: None, "no e2fsprogs", "packages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told_in_a_line(user_scene: Scene, system: Path, name: str) -> None:
    """And nothing is left."""
    change, spoil, message, hint = BAD[name]
    tree, tar = user_scene.directory / "tree", user_scene.directory / "system.tar"
    run("cp", "-a", system, tree)
    change(tree)
    run("tar", "--create", f"--file={tar}", f"--directory={tree}", ".")
    spoil(tar)
    user_scene.configure(tar)
    said = user_scene.fail()
    assert re.search(message, said[0]) and re.search(hint, said[1]), said


def test_huge_holes_take_nothing(scene: Scene, system: Path) -> None:
    """Sockets are left out, and devices where nobody could make them."""
    tree = scene.directory / "tree"
    run("cp", "-a", system, tree)
    with (tree / "srv/sparse").open("wb") as file:
        file.truncate(1 << 40)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tree / "srv/socket"))
    os.mknod(tree / "srv/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    tar = scene.directory / "system.tar"
    run("tar", "--create", "--sparse", f"--file={tar}", f"--directory={tree}", ".")
    scene.configure(tar)
    done = scene.run()
    status = in_disk(scene.disk, "stat /srv/sparse")
    assert f"Size: {1 << 40}" in status and "Blockcount: 0" in status, status
    assert in_disk(scene.disk, "stat /srv/socket") == ""
    assert ("no devices, so these are left out: /srv/null" in done.stderr) != scene.user.is_root
    assert ("Type: character" in in_disk(scene.disk, "stat /srv/null")) == scene.user.is_root


# What a system that was lived in has, by the operation of sealing that takes it away.
LIVED_IN = {
    "passwords": "etc/gshadow",
    "user-keys": "home/ann/.ssh/id_ed25519",
    "user-traces": "home/ann/.cache/thumbnails",
    "tls-keys": "etc/letsencrypt/live/example.com",
    "domain": "etc/sssd/sssd.conf",
    "agents": "etc/zabbix/agent.psk",
    "containers": "var/lib/docker/overlay2",
    "databases": "var/lib/mysql/ibdata1",
    "cron-spools": "var/spool/cron/crontabs/ann",
    "queues": "var/spool/postfix/deferred/1",
    "host-name": "etc/hostname",
    "static-addresses": "etc/network/interfaces",
    "swap-files": "swapfile",
    "disk-keys": "etc/cryptsetup-keys.d/data.key",
    "usage": "var/lib/fail2ban/fail2ban.sqlite3",
}
SECRET = "ann:secret::\n"
ADDRESSES = "auto ens3\niface ens3 inet static\n    address 10.0.0.7/24\n"


def test_what_was_lived_in_is_sealed(users: dict[str, User], system: Path) -> None:
    """Without a word of the configuration; what the audit can't judge is told, and one that is left it finds."""
    assert LIVED_IN.keys() == {operation.name for operation in CAPTURED}
    scene = new_scene(users["root"])
    tree = scene.directory / "tree"
    run("cp", "-a", system, tree)
    for name, path in LIVED_IN.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(ADDRESSES if name == "static-addresses" else SECRET)
    for path in ("opt/tool/bin", "srv/site"):
        (tree / path).mkdir(parents=True)
    (tree / "home/ann/notes").write_text("-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\n")
    scene.configure(tree)
    done = scene.run("small", check=False)
    for name, path in LIVED_IN.items():
        found = re.search(f"Sealing: {name}: (.*)", done.stderr)
        assert found and found[1] != "nothing", name
        if name not in ("passwords", "host-name", "static-addresses"):
            assert in_disk(scene.disk, f'stat "/{path}"') == "", path
    assert in_disk(scene.disk, "cat /etc/gshadow") == "ann:!::\n"
    assert in_disk(scene.disk, "cat /etc/hostname") == "localhost\n"
    assert in_disk(scene.disk, "cat /etc/network/interfaces") == "auto ens3\niface ens3 inet dhcp\n"
    assert "/home/ann/notes has a private key" in done.stderr.splitlines()[-2]
    judged = re.search("can't judge: (.*)", done.stderr)
    assert judged and {"/opt/tool", "/srv/site", "/srv/data", "/home/ann"} <= {*re.split(", |\\.$", judged[1])}, (
        done.stderr
    )


def test_full_disk_is_told(users: dict[str, User], tar: Path) -> None:
    scene = new_scene(users["root"])
    scene.out.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=2M", "small", scene.out)
    try:
        scene.configure(tar)
        said = scene.run(check=False).stderr
        assert [path for path in scene.out.iterdir() if path.name != "lost+found"] == []
    finally:
        run("umount", scene.out)
    assert re.search("error: .*No space left.*\n.*hint: Free some space", said), said


def test_directory_that_has_the_output_is_refused(user_scene: Scene) -> None:
    user_scene.configure(user_scene.directory)
    assert "the output directory is in" in user_scene.fail()[0]


def test_owners_that_nobody_can_have_are_told(user_scene: Scene, system: Path) -> None:
    """Of root's files an ordinary user can't say whose they are."""
    user_scene.configure(system)
    assert "has owners that an ordinary user" in user_scene.fail()[0]
    far = user_scene.directory / "far.tar"
    with tarfile.open(far, "w") as target:
        target.add(system, ".")
        member = tarfile.TarInfo("./srv/far")
        member.uid = 1_000_000
        target.addfile(member)
    user_scene.configure(far)
    said = user_scene.fail()
    assert "Cannot change ownership to uid 1000000" in said[0] and "build as root" in said[1], said
