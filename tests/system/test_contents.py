"""The whole system on a disk as a tar: all that its files are, and the same bytes whichever way it is mounted."""

import base64
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pytest

from image_factory import outputs, pipeline
from image_factory.base import command
from image_factory.base.errors import BuildError, CommandError, ConfigurationError
from image_factory.checks import audit, testboot
from image_factory.configuration.files import Configuration
from image_factory.model import Build, Disk, Plan
from image_factory.outputs import OUTPUTS, netboot, oci, trees
from image_factory.parts import carry_out
from image_factory.system import appliance, assembly, loop, mounts, privileged

from ..conftest import REPOSITORY, machine_state, run, shown, state_of
from .test_appliance import make_build

MIB = 1 << 20
# Where the partitions begin, of 34, 100 and 20 MiB.  Not every kernel that tests run with has FAT.
OFFSETS = {"efi": 1 * MIB, "root": 35 * MIB, "home": 135 * MIB}
TABLE = "label: gpt\nstart=1MiB, size=34MiB\nstart=35MiB, size=100MiB\nstart=135MiB, size=20MiB\n"
FSTAB = (
    "LABEL=root / ext4 defaults 0 1\n"
    "LABEL=efi /boot/efi ext2 defaults 0 2\n"
    "LABEL=home /home ext4 defaults 0 2\n"
    "/srv /mnt none bind 0 0\n"
)
NAME = os.fsdecode(b"no UTF-8 \xff\xe9 and\na line")
LONG = "ü" * 110


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The helper is the one of the checkout; at the end all is as before."""
    monkeypatch.setattr("sys.argv", [str(REPOSITORY / "image-factory")])
    before = machine_state()
    yield
    assert machine_state() == before


def make_tree(directory: Path, *others: str) -> Path:
    """Make a tree that has all that a file can be, and the files *others*."""
    for name in ("etc", "boot/efi", "home", "usr/bin", "proc", "dev", "run/x", "srv", "mnt", "tmp", "a/b"):
        (directory / name).mkdir(parents=True)
    (directory / "etc/fstab").write_text(FSTAB)
    (directory / "etc/os-release").write_text("ID=debian\n")
    for name in (
        "etc/plain",
        f"etc/{NAME}",
        f"etc/{LONG}",
        ".dotfile",
        "proc/mounts",
        "dev/null",
        "run/x/y",
        "srv/one",
        *others,
    ):
        (directory / name).write_text(f"the text of {name!r}\n")
    (directory / "tmp").chmod(0o1777)
    (directory / "usr/bin/ping").write_bytes(b"#!/bin/sh\n")
    run("setcap", "cap_net_raw+ep", directory / "usr/bin/ping")
    (directory / "usr/bin/su").write_bytes(b"su")
    os.chown(directory / "usr/bin/su", 1234, 70000)
    (directory / "usr/bin/su").chmod(0o6755)
    os.link(directory / "usr/bin/su", directory / "usr/bin/zz-su")
    (directory / "etc/link").symlink_to("/etc/plain")
    os.mkfifo(directory / "etc/fifo")
    os.mknod(directory / "etc/device", 0o620 | 0o020000, os.makedev(1, 3))
    with (directory / "etc/sparse").open("wb") as file:
        file.seek(5 * MIB)
        file.write(b"in the middle")
        file.truncate(20 * MIB)
    # A user that this machine has under a name: the tar has the number.
    run("setfacl", "-m", "u:1:rw,g:70001:r", directory / "etc/plain")
    run("setfacl", "-d", "-m", "g:adm:rx", directory / "a")
    os.setxattr(directory / "etc/plain", "user.note", b"\0binary\xff")
    os.setxattr(directory / "etc/plain", "security.selinux", b"system_u:object_r:etc_t:s0\0")
    os.setxattr(directory / "etc/link", "security.selinux", b"system_u:object_r:usr_t:s0\0", follow_symlinks=False)
    os.utime(directory / "etc/plain", (1, 1_234_567_890))
    return directory


def make_disk(build: Build, tree: Path) -> Disk:
    """Make the disk of *build*: an EFI partition, a root with *tree*, and /home."""
    path = build.disk_path
    run("truncate", "-s", "160M", path)
    subprocess.run(["sfdisk", "--quiet", "--no-tell-kernel", path], input=TABLE, text=True, check=True)
    tops = {"root": tree} | {name: tree.parent / name for name in ("efi", "home")}
    (tops["home"] / "user").mkdir(parents=True, exist_ok=True)
    (tops["home"] / "user/.profile").write_text("a user's\n")
    (tops["efi"] / "EFI").mkdir(parents=True, exist_ok=True)
    (tops["efi"] / "EFI/BOOTX64.EFI").write_bytes(random.Random(1).randbytes(100_000))
    for (name, offset), (kind, size) in zip(OFFSETS.items(), [("ext2", 34), ("ext4", 100), ("ext4", 20)], strict=True):
        options = ["-t", kind, "-L", name, "-d", tops[name], "-E", f"offset={offset}"]
        run("mke2fs", "-q", *options, path, f"{size}M")
    return Disk(path, read_only=True)


def build_of(directory: Path, way: str, formats: str, extra: str = "") -> Build:
    """Return a build of *formats* in *directory*, which mounts by *way*."""
    directory.mkdir()
    text = directory / "image-factory.conf"
    text.write_text(f"[x]\nlinux = /l\ninitrd = /i\nformat = {formats}\nmount-via = {way}\n{extra}")
    settings = Configuration({"IMAGE_FACTORY_CONFIG": str(text)}).image("x", {})
    plan = Plan("x", settings, datetime.date(2026, 1, 31), directory / "output", {}, source_date=1_500_000_000)
    plan.work_path.mkdir(parents=True)
    return Build(plan, plan.work_path, "vm")


def made(build: Build) -> dict[str, Path]:
    """Return the artifacts of *build* by their formats, and nothing else is there."""
    state = carry_out(state_of(build), outputs.steps(build))
    assert [artifact.format for artifact in state.artifacts] == outputs.formats(build.plan)
    assert {*build.directory.iterdir()} == {build.disk_path, *(artifact.path for artifact in state.artifacts)}
    return {artifact.format: artifact.path for artifact in state.artifacts}


TREES = [name for name, output in OUTPUTS.items() if output.made_from == "tree"]
# What the formats wsl and netboot need in a tree.
WSL = "etc/wsl-distribution.conf"
BOOTS = ("boot/vmlinuz-6.9", "boot/vmlinuz-6.12", "boot/initrd.img-6.12", "boot/initrd.img-6.9", "usr/bin/init")
NEEDED = (WSL, *BOOTS)


def unpacked(name: str, path: Path) -> bytes:
    """Return the tar that the audit takes the file *path* for."""
    with path.open("rb") as file:
        return subprocess.run(trees.reading_argv(name, path), stdin=file, capture_output=True, check=True).stdout


def test_all_formats_have_the_same_tar(tmp_path: Path) -> None:
    assert TREES == ["tar", "tar.gz", "tgz", "tar.xz", "tar.zst", "squashfs", "oci", "wsl", "netboot"]
    build = build_of(tmp_path / "build", "loop", f"raw, {', '.join(TREES)}", "tar-exclude = /etc/sparse, ./srv/*\n")
    make_disk(build, make_tree(tmp_path / "tree", *NEEDED))
    found = made(build)
    for name in TREES:
        if name not in ("squashfs", "netboot"):
            assert unpacked(name, found[name]) == found["tar"].read_bytes()
        if name.startswith("t"):
            # By the name alone, as its users do.
            names = run("tar", "-tf", found[name], "--quoting-style=escape").stdout.splitlines()
            assert {"./", "./etc/plain", "./srv/", "./home/user/.profile", "./boot/efi/EFI/BOOTX64.EFI"} <= {*names}
            assert not {"./etc/sparse", "./srv/one"} & {*names}
    again = build_of(tmp_path / "again", "loop", "tgz, squashfs, oci, netboot", "tar-exclude = etc/sparse\n srv/*\n")
    run("cp", "--sparse=always", build.disk_path, again.disk_path)
    others = made(again)
    assert all(others[name].read_bytes() == found[name].read_bytes() for name in others)
    assert found["tgz"].read_bytes() == found["tar.gz"].read_bytes() == found["wsl"].read_bytes()


# What helpers/smtar of curtin makes of what ``file`` says of the first 1024 bytes; of all else nothing.
SMTAR = {"application/gzip": "--gzip", "application/x-xz": "--xz"}


@pytest.mark.parametrize("name", ["tar", "tgz", "tar.xz", "tar.zst"])
def test_curtin_unpacks_it(tmp_path: Path, name: str) -> None:
    """By the words of curtin/commands/extract.py, from a pipe; nothing but ACLs is lost. Zstandard is not for it."""
    build = build_of(tmp_path / "build", "loop", name)
    tree, target = make_tree(tmp_path / "tree"), tmp_path / "target"
    make_disk(build, tree)
    target.mkdir()
    path = made(build)[name]
    with path.open("rb") as file:
        kind = subprocess.run(
            ["file", "--brief", "--mime-type", "-"], input=file.read(1024), capture_output=True, check=True
        )
    words = [*filter(None, [SMTAR.get(kind.stdout.decode().strip())]), "--xattrs", "--xattrs-include=*", "-Sxpf", "-"]
    argv = ["sh", "-c", 'cat "$0" | tar -C "$@" --numeric-owner', path, target, *words]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (name != "tar.zst"), done.stderr
    if name == "tar.zst":
        assert "Archive is compressed. Use --zstd option" in done.stderr
        return
    kinds = ["find", ".", "-mindepth", "1", "(", "-path", "./boot/efi", "-o", "-path", "./proc/*", "-o", "-path"]
    kinds += ["./dev/*", "-o", "-path", "./run/*", "-o", "-path", "./home", ")", "-prune", "-o"]
    kinds += ["-printf", "%P %y %m %U %G %n %l %T@ %s\\n"]
    # The mode of a file with an ACL is that of its mask, and links to directories count their names.
    shown = [
        {line for line in run(*kinds, cwd=place).stdout.splitlines() if " d " not in line} for place in (tree, target)
    ]
    assert {*map(seconds, shown[0])} == {*map(seconds, shown[1])}
    assert run("getcap", target / "usr/bin/ping").stdout.endswith("cap_net_raw=ep\n")
    for attribute in ("user.note", "security.selinux"):
        assert os.getxattr(target / "etc/plain", attribute) == os.getxattr(tree / "etc/plain", attribute)
    assert (target / "etc/sparse").stat().st_blocks * 512 < MIB
    assert (target / "boot/efi/EFI/BOOTX64.EFI").read_bytes() == (tmp_path / "efi/EFI/BOOTX64.EFI").read_bytes()


def seconds(line: str) -> str:
    """Return *line* of find without the parts of a second, and with no time that is later than the build's date."""
    return re.sub(r" ([0-9]+)\.[0-9]+ ", lambda match: f" {min(int(match[1]), 1_500_000_000)} ", line)


def test_programs_of_formats(tmp_path: Path) -> None:
    build = build_of(tmp_path / "build", "loop", "tar, tar.zst, squashfs")
    own = ([], ["zstd"], ["tar2sqfs", "sqfs2tar"])
    assert outputs.programs(build.plan) == [word for words in own for word in ("tar", "bash", "cmp", *words)]


@pytest.mark.parametrize("name", TREES)
def test_the_audit_compares_what_is_published(tmp_path: Path, name: str) -> None:
    build = build_of(tmp_path / "build", "loop", name, "audit = yes\naudit-skip = private-keys\n")
    tree = make_tree(tmp_path / "tree", *NEEDED)
    make_disk(build, tree)
    state = carry_out(state_of(build), outputs.steps(build))
    [artifact] = state.artifacts
    steps = [*audit.steps(build)][1:]
    carry_out(state, steps)
    data = artifact.path.read_bytes()
    # A file has other contents, another has another mode.
    others = []
    for change in (lambda path: path.write_text("The text of 'etc/plain'\n"), lambda path: path.chmod(0o640)):
        other = build_of(tmp_path / f"other{len(others)}", "loop", name)
        plain = tree / "etc/plain"
        before = plain.read_bytes(), plain.stat().st_mode
        change(plain)
        os.utime(plain, (1, 1_234_567_890))
        make_disk(other, tree)
        plain.write_bytes(before[0])
        plain.chmod(before[1])
        os.utime(plain, (1, 1_234_567_890))
        others.append(made(other)[name].read_bytes())
    for wrong in (*others, data[: len(data) // 2], b""):
        artifact.path.write_bytes(wrong)
        with pytest.raises(BuildError, match=rf"^{re.escape(artifact.path.name)} (has not the files of|is not what)"):
            carry_out(state, steps)


def test_squashfs_has_all_but_acls(tmp_path: Path) -> None:
    build = build_of(tmp_path / "build", "loop", "squashfs")
    tree = make_tree(tmp_path / "tree")
    make_disk(build, tree)
    back = tmp_path / "back"
    back.mkdir()
    tar = run_bytes("sqfs2tar", "--root-becomes", ".", made(build)["squashfs"])
    options = ["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpSf", "-"]
    subprocess.run(["tar", "-C", back, *options], input=tar, check=True)
    found = comparable(back)
    wanted = {name: entry for name, entry in comparable(tree).items() if name in found}
    assert {"etc/plain", "etc/device", "usr/bin/ping", "usr/bin/zz-su", f"etc/{NAME}"} <= wanted.keys()
    assert {name: found[name] for name in wanted} == wanted


def test_ramdisk_has_the_tree(tmp_path: Path) -> None:
    """As cpio reads it, links, devices and all: what it can have beside the attributes.  The kernel is the newest."""
    build = build_of(tmp_path / "build", "loop", "netboot")
    tree = make_tree(tmp_path / "tree", *BOOTS)
    make_disk(build, tree)
    files = tmp_path / "files"
    back = tmp_path / "back"
    for directory in (files, back):
        directory.mkdir()
    run("tar", "-C", files, "-xf", made(build)["netboot"])
    assert {path.name: path.read_text() for path in files.glob("[!r]*")} == {
        "vmlinuz": "the text of 'boot/vmlinuz-6.12'\n",
        "initrd.img": "the text of 'boot/initrd.img-6.12'\n",
    }
    text = run_bytes("gzip", "-dc", files / "ramdisk.img")
    subprocess.run(["cpio", "-idmu", "--quiet", "--no-absolute-filenames"], input=text, cwd=back, check=True)
    found, wanted = comparable(back, ""), comparable(tree, "")
    assert os.readlink(back / "init") == "sbin/init" and found.pop("init")
    assert (back / "etc/fstab").read_text() == "# The root is a ramdisk.\n"
    wanted = {
        name: entry for name, entry in wanted.items() if name in found and name not in ("etc/fstab", "lost+found")
    }
    assert {"etc/plain", "etc/device", "etc/fifo", "etc/sparse", "usr/bin/zz-su", f"etc/{NAME}"} <= wanted.keys()
    assert {name: found[name] for name in wanted} == wanted
    assert (back / "usr/bin/su").samefile(back / "usr/bin/zz-su")


# What a system reports that has all but an sshd.
FACTS = {
    "state": "running",
    "addresses": "2: eth0 inet 10.0.2.15/24",
    "routes": "default via 10.0.2.2",
    "machine-id": "0123456789abcdef" * 2,
    "host-keys": "ssh-ed25519 AAAA",
    "growpart": "/usr/bin/growpart",
}
# Goes off without a report where the ramdisk has not what the tree had.
INIT_SCRIPT = """\
#!/bin/busybox sh
export PATH=/applets
busybox=/bin/busybox
$busybox mkdir /applets
$busybox --install -s /applets
[ "$(cat /etc/fstab)" = "# The root is a ramdisk." ] && [ /etc/one -ef /etc/two ] && [ -u $busybox ] || poweroff -f
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod /modules/$module.ko; done </modules/order
until [ -c /dev/vport*p1 ]; do sleep 1; done
cat /report | tee /dev/vport*p1
while :; do sleep 60; done
"""


def test_the_ramdisk_boots(tmp_path: Path, stand_in: Path) -> None:
    """With the kernel that is beside it, and nothing else: the test boot of the tar finds out what the system lacks."""
    text = "arch = x86_64\ntest-boot = yes\nram = 128M\n"
    build = build_of(tmp_path / "build", "loop", "netboot", text)
    tree = tmp_path / "tree"
    for name in ("boot/efi", "etc", "sbin", "bin", "home", "mnt", "srv", "dev", "proc", "sys"):
        (tree / name).mkdir(parents=True)
    run("cp", stand_in / "linux", tree / "boot/vmlinuz-6.12")
    modules = run_bytes("gzip", "-dc", stand_in / "initrd.gz")
    subprocess.run(["cpio", "-idm", "--quiet", "modules/*"], input=modules, cwd=tree, check=True)
    run("cp", "/bin/busybox", tree / "bin/busybox")
    (tree / "bin/busybox").chmod(0o4755)
    (tree / "etc/fstab").write_text(FSTAB)
    (tree / "etc/one").write_text("one file")
    os.link(tree / "etc/one", tree / "etc/two")
    (tree / "sbin/init").write_text(INIT_SCRIPT)
    (tree / "sbin/init").chmod(0o755)
    facts = {name: base64.b64encode(text.encode()).decode() for name, text in FACTS.items()}
    (tree / "report").write_text(json.dumps({"stage": "finished", **facts}) + "\n")
    make_disk(build, tree)
    state = carry_out(state_of(build), outputs.steps(build))
    [artifact] = state.artifacts
    with pytest.raises(BuildError) as caught:
        carry_out(state, testboot.steps(build))
    problem = f"{artifact.path.name} failed its test boot with its kernel: sshd is not installed."
    assert caught.value.message == problem
    assert {*build.directory.iterdir()} == {build.disk_path, artifact.path}
    cases = [*ElementTree.parse(build.plan.junit_path).iter("testcase")]
    assert {case.get("classname") for case in cases} == {f"{artifact.path.name}.1-kernel"}
    skipped = {case.get("name"): each.get("message") for case in cases for each in case.iter("skipped")}
    assert {name: skipped[name] for name in ("root-space", "root-size")} == dict.fromkeys(
        ("root-space", "root-size"), "its root is in memory"
    )
    passed = {case.get("name") for case in cases if not len(case)}
    assert {"boot", "network", "units", "machine-id", "host-keys", "kernel-log"} == passed


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["usr/bin/init"], "The system has no kernel, which the format netboot needs."),
        (["boot/vmlinuz-6.12"], "The system has no /sbin/init, which a ramdisk starts."),
    ],
)
def test_what_a_ramdisk_needs(tmp_path: Path, others: list[str], message: str) -> None:
    build = build_of(tmp_path / "build", "loop", "netboot")
    make_disk(build, make_tree(tmp_path / "tree", *others))
    with pytest.raises(BuildError, match=f"^{re.escape(message)}"):
        made(build)
    assert [*build.directory.iterdir()] == [build.disk_path]


def test_a_file_too_large_for_a_ramdisk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netboot, "_LARGEST", 20 * MIB - 1)
    build = build_of(tmp_path / "build", "loop", "netboot")
    make_disk(build, make_tree(tmp_path / "tree", *BOOTS))
    with pytest.raises(BuildError, match=r"^/etc/sparse has 20971520 bytes, and no file in a ramdisk has 4 GiB"):
        made(build)


def run_bytes(*words: str | Path) -> bytes:
    return subprocess.run(words, capture_output=True, check=True).stdout


def comparable(top: Path, left_out: str = "system.posix_acl") -> dict[str, object]:
    """Return what files below *top* are, without times, ACLs and holes, and what other filesystems are mounted on.

    Attributes whose names begin with *left_out* are not there either.
    """
    found = {}
    for path in [top, *sorted(top.rglob("*"))]:
        name = str(path.relative_to(top))
        if name.partition("/")[0] in ("home", "boot", "proc", "dev", "run"):
            continue
        mode, uid, gid, device, own, _, _, attributes, content = cast(tuple[Any, ...], entry(path, {}))
        kept = {key: value for key, value in attributes.items() if not key.startswith(("system.posix_acl", left_out))}
        # What an ACL allows is the group's mode without it.
        mode = mode & ~0o070 if name in ("etc/plain", "a", "a/b") else mode
        found[name] = mode, uid, gid, device, own is None, kept, content
    return found


def test_containers_have_the_tree(tmp_path: Path) -> None:
    """As programs of others read it: skopeo, and umoci, which unpacks it."""
    build = build_of(tmp_path / "build", "loop", "oci", "arch = x86_64\n")
    tree = make_tree(tmp_path / "tree")
    make_disk(build, tree)
    path = made(build)["oci"]
    told = json.loads(run("skopeo", "inspect", f"oci-archive:{path}").stdout)
    assert (told["Architecture"], told["Os"], told["Created"]) == ("amd64", "linux", "2017-07-14T02:40:00Z")
    assert len(told["Layers"]) == 1
    layout = tmp_path / "layout"
    layout.mkdir()
    run("tar", "-C", layout, "-xf", path)
    run("umoci", "unpack", "--image", f"{layout}:x", tmp_path / "bundle")
    # umoci leaves the labels to who runs a container.
    found = comparable(tmp_path / "bundle/rootfs", "security.selinux")
    wanted = {name: entry for name, entry in comparable(tree, "security.selinux").items() if name in found}
    assert {"etc/plain", "usr/bin/ping", "usr/bin/zz-su", ".dotfile"} <= wanted.keys()
    assert {name: found[name] for name in wanted} == wanted
    # Another digest than the one that the manifest has: it is read by nobody.
    [layer] = [file for file in (layout / "blobs/sha256").iterdir() if file.read_bytes()[:2] == b"\x1f\x8b"]
    layer.write_bytes(layer.read_bytes() + b"x")
    run("tar", "-C", layout, "-cf", path, "oci-layout", "index.json", "blobs")
    with pytest.raises(BuildError, match=r"is not what was made: blobs/sha256/.* has other bytes than its name says"):
        oci.reading_argv(path)


def test_what_wsl_wants(tmp_path: Path) -> None:
    build = build_of(tmp_path / "build", "loop", "wsl, tar")
    tree = make_tree(tmp_path / "tree")
    make_disk(build, tree)
    with pytest.raises(BuildError, match=f"^The system has no /{WSL}, which the format wsl needs") as failed:
        made(build)
    assert failed.value.hint == f"Have it copied: copy = wsl-distribution.conf:/{WSL}"
    assert [*build.directory.iterdir()] == [build.disk_path]
    for name in (WSL, "etc/resolv.conf"):
        (tree / name).write_text("x\n")
    build.disk_path.unlink()
    make_disk(build, tree)
    with pytest.raises(BuildError, match=r"^The system has /etc/resolv\.conf, which WSL writes itself"):
        made(build)
    build = build_of(tmp_path / "other", "loop", "wsl", "tar-exclude = /etc/resolv.conf\n")
    make_disk(build, tree)
    assert b"./etc/resolv.conf" not in unpacked("wsl", made(build)["wsl"])


def test_dry_run_shows_how_it_is_packed(tmp_path: Path) -> None:
    build = build_of(tmp_path / "build", "loop", "tar.zst, tar", "tar-exclude = a b\n")
    commands = shown(build, outputs.steps(build))
    assert [*commands] == [mounts.STEP, assembly.MOUNTING, "Packing tar.zst, tar", assembly.UNMOUNTING]
    assert commands[assembly.MOUNTING][0][-1] == "read-only"
    assert commands["Packing tar.zst, tar"] == [
        ["zstd", "--threads=0", "--quiet", "--stdout"],
        privileged.helper_argv("contents", f":{loop.PLACE}", "--exclude=./a b", "--mtime=@1500000000"),
    ]


@pytest.mark.parametrize("text", ["a\tb", "/", "x" * 1001])
def test_patterns_that_are_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match="tar-exclude"):
        build_of(tmp_path / "build", "loop", "tar", f"tar-exclude = {text}\n")


def test_no_space_is_left(tmp_path: Path) -> None:
    """The disk is full: one error, and the mounts are gone."""
    build = build_of(tmp_path / "build", "loop", "tar.gz, tar")
    make_disk(build, make_tree(tmp_path / "tree"))
    (build.directory / outputs.file_name(build.plan, "tar.gz")).symlink_to("/dev/full")
    with pytest.raises(CommandError, match=r"^pigz failed with status .*"):
        carry_out(state_of(build), outputs.steps(build))


def test_a_place_that_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    build = build_of(tmp_path / "build", "loop", "tar")
    disk = make_disk(build, make_tree(tmp_path / "tree"))
    with disk.path.open("r+b") as file:
        file.seek(OFFSETS["home"])
        file.write(b"LUKS\xba\xbe\0\1" + bytes(2 * MIB))
    run("debugfs", "-w", "-R", "rm etc/fstab", f"{disk.path}?offset={OFFSETS['root']}")
    fstab = tmp_path / "fstab"
    fstab.write_text(FSTAB.replace("LABEL=home", "/dev/vda3"))
    run("debugfs", "-w", "-R", f"write {fstab} etc/fstab", f"{disk.path}?offset={OFFSETS['root']}")
    with pytest.raises(BuildError, match=r"^/home can't be looked into: partition 3 is "):
        carry_out(state_of(build), outputs.steps(build))


def packed(build: Build, target: Path, *options: str) -> bytes:
    """Return the tar of the system on the disk of *build*, which stays as it is."""
    before = hashlib.sha256(build.disk_path.read_bytes()).hexdigest()
    with mounts.mounted(build, Disk(build.disk_path, read_only=True)) as tree, tree.contents(options) as argv:
        command.flow(argv, [(target, [])])
    assert hashlib.sha256(build.disk_path.read_bytes()).hexdigest() == before
    return target.read_bytes()


def listing(top: Path) -> dict[str, object]:
    """Return all that the files below *top* are; links that are one file have a number in common."""
    paths = [top, *sorted(top.rglob("*"))]
    numbers: dict[int, int] = {}
    return {str(path.relative_to(top)): entry(path, numbers) for path in paths if path.name != "lost+found"}


def entry(path: Path, numbers: dict[int, int]) -> object:
    status = path.lstat()
    names = os.listxattr(path, follow_symlinks=False)
    attributes = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    is_file = path.is_file() and not path.is_symlink()
    content = os.readlink(path) if path.is_symlink() else path.read_bytes() if is_file else b""
    own = numbers.setdefault(status.st_ino, len(numbers)) if status.st_nlink > 1 and is_file else None
    sparse = is_file and status.st_blocks * 512 < status.st_size
    # mke2fs has whole seconds.
    owner = status.st_uid, status.st_gid
    return status.st_mode, *owner, status.st_rdev, own, sparse, int(status.st_mtime), attributes, content


def test_all_that_files_are_is_there_and_comes_back(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    build = make_build(tmp_path / "build", "loop")
    make_disk(build, tree)
    packed(build, tmp_path / "x.tar", "--exclude=./etc/fif*")
    back = tmp_path / "back"
    back.mkdir()
    options = ["--numeric-owner", "--acls", "--selinux", "--xattrs", "--xattrs-include=*", "-xpSf"]
    run("tar", "-C", back, *options, tmp_path / "x.tar")
    found, wanted = listing(back), listing(tree)
    for name in ("proc/mounts", "dev/null", "run/x", "run/x/y", "etc/fifo"):
        assert found.get(name) is None and wanted.pop(name)
    inside = {name: found.pop(name) for name in [*found] if name.startswith(("home/", "boot/efi/"))}
    assert [*inside] == ["boot/efi/EFI", "boot/efi/EFI/BOOTX64.EFI", "home/user", "home/user/.profile"]
    assert (back / "boot/efi/EFI/BOOTX64.EFI").read_bytes() == (tmp_path / "efi/EFI/BOOTX64.EFI").read_bytes()
    # These are what is mounted there.
    for name in ("home", "boot/efi"):
        del found[name], wanted[name]
    assert found == wanted
    names = run("tar", "-tf", tmp_path / "x.tar", "--quoting-style=escape").stdout.splitlines()
    assert names == sorted(names, key=lambda name: [part.encode() for part in name.rstrip("/").split("/")])


def test_the_same_bytes_whichever_way(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    first, second = make_build(tmp_path / "loop", "loop"), make_build(tmp_path / "guestfs", "guestfs")
    disk = make_disk(first, tree)
    run("cp", "--sparse=always", disk.path, second.disk_path)
    options = ["--exclude=./srv", "--mtime=@1500000000"]
    plain = packed(first, tmp_path / "loop.tar", *options)
    assert packed(first, tmp_path / "again.tar", *options) == plain
    assert packed(second, tmp_path / "guestfs.tar", *options) == plain
    assert b"user:1:rw-" in plain and b"group:4:r-x" in plain
    # What is older keeps its time.
    assert plain.count(f"{1_234_567_890:o}\0".encode()) == 1 and b"mtime=" not in plain
    assert not (second.directory / "contents.tar").exists()


def test_several_targets_of_one_stream(tmp_path: Path) -> None:
    files = [("plain", []), ("x.gz", [["gzip", "-n"]]), ("y.zst", [["cat"], ["zstd", "-q"]])]
    command.flow(["seq", "100000"], [(tmp_path / name, filters) for name, filters in files])
    text = run("seq", "100000").stdout
    assert (tmp_path / "plain").read_text() == text
    assert run("gzip", "-dc", tmp_path / "x.gz").stdout == run("zstd", "-dc", tmp_path / "y.zst").stdout == text


@pytest.mark.parametrize("several", [False, True])
def test_error_is_that_of_the_program_that_failed(tmp_path: Path, several: bool) -> None:
    fails = [(tmp_path / "x", [["sh", "-c", "head -c 1 >/dev/null; echo no room >&2; exit 3"]])]
    with pytest.raises(CommandError, match=r"^sh failed with status 3: no room$"):
        command.flow(["yes"], fails + ([(tmp_path / "y", [["cat"]])] if several else []))
    with pytest.raises(CommandError, match=r"^sh failed with status 4: unread$"):
        command.flow(["sh", "-c", "echo unread >&2; exit 4"], [(tmp_path / "x", [["cat"]])])
    with pytest.raises(BuildError, match=r"^Can't run no-such-program: No such file"):
        command.flow(["yes"], [(tmp_path / "x", [["no-such-program"]]), (tmp_path / "y", [["cat"]])])
    with pytest.raises(BuildError, match=r"^x can't be made: No such file or directory: "):
        command.flow(["yes"], [(tmp_path / "none/x", [])])


def test_fuse_says_that_it_can_not_read_all(tmp_path: Path) -> None:
    """Before the build, and only where a format is of the tree."""
    plan = make_build(tmp_path / "build", "fuse").plan
    part = next(part for stage in pipeline.STAGES for part in stage.parts if part.steps is outputs.steps)
    part.check(plan)
    tree = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, format=("tgz",)))
    with pytest.raises(ConfigurationError, match="mount-via = fuse can't read the ACLs of files"):
        part.check(tree)


def test_both_ways_have_the_same_words() -> None:
    loader = SourceFileLoader("sudo_helper", str(REPOSITORY / "image-factory-sudo-helper"))
    spec = importlib.util.spec_from_loader("sudo_helper", loader)
    assert spec is not None
    helper: Any = importlib.util.module_from_spec(spec)
    # dataclass looks for the module of a class.
    import sys

    sys.modules["sudo_helper"] = helper
    try:
        loader.exec_module(helper)
    finally:
        del sys.modules["sudo_helper"]
    for options in ([], ["--exclude=./a*", "--mtime=@3"]):
        assert helper.tar_words(["", "boot"], options) == appliance.tar_words(["", "boot"], options)
