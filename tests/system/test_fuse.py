"""A disk that is mounted in a user's namespaces: the same result as in the appliance, and no root."""

import dataclasses
import filecmp
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_factory.base.errors import BuildError
from image_factory.model import Volume
from image_factory.system import appliance, fuse, loop, mounts

from ..conftest import REPOSITORY, TODAY, User, machine_state, run, wait_for
from .test_appliance import make_build, make_tree

MIB = 1 << 20
ESP, ROOT = 1 * MIB, 35 * MIB
SIZE = 300 * MIB
TABLE = "label: gpt\nstart=1MiB, size=34MiB, type=uefi\nstart=35MiB, size=264MiB\n"
MACHINE = "0123456789abcdef0123456789abcdef"
SEED, DELETED = b"what the ESP has of randomness", b"what a deleted file had"
FSTAB = "UUID=aaaaaaaa-0000-4000-8000-000000000001 / ext4 defaults 0 1\nUUID=ABCD-1234 /boot/efi vfat defaults 0 2\n"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No mount, loop device or directory for mounts is left."""
    before = machine_state()
    yield
    assert machine_state() == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A disk with an ESP, and a root with all that a file can be; both have what sealing removes."""
    tree = make_tree(tmp_path / "tree")
    (tree / "boot/efi").mkdir(parents=True)
    (tree / "etc/fstab").write_text(FSTAB)
    (tree / "etc/machine-id").write_text(f"{MACHINE}\n")
    (tree / "etc/os-release").write_text("ID=debian\nVERSION_ID=13\n")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (tree / "root/.bash_history").write_text("secret words\n")
    (tree / "etc/deleted").write_bytes(DELETED * 1000)
    disk = tmp_path / "source.raw"
    run("truncate", "-s", str(SIZE), disk)
    subprocess.run(["sfdisk", "--quiet", "--no-tell-kernel", disk], input=TABLE, text=True, check=True)
    options = ["-U", "aaaaaaaa-0000-4000-8000-000000000001", "-d", tree, "-E", f"offset={ROOT}"]
    run("mke2fs", "-q", "-t", "ext4", *options, disk, "264M")
    run("debugfs", "-w", "-R", "rm /etc/deleted", f"{disk}?offset={ROOT}")
    run("mformat", "-i", f"{disk}@@{ESP}", "-N", "ABCD1234", "-T", str(34 * MIB // 512), "-h", "16", "-s", "63", "::")
    esp = tmp_path / "esp"
    for name, data in {
        "EFI/BOOT/BOOTX64.EFI": bytes(range(256)) * 4000,
        "EFI/BOOT/a long name.cfg": b"settings\n",
        "loader/random-seed": SEED,
        f"loader/entries/{MACHINE}-6.1.0.conf": f"title x\nlinux /{MACHINE}/6.1.0/linux\n".encode(),
        f"{MACHINE}/6.1.0/linux": b"a kernel",
    }.items():
        (esp / name).parent.mkdir(parents=True, exist_ok=True)
        (esp / name).write_bytes(data)
    run("mcopy", "-s", "-m", "-i", f"{disk}@@{ESP}", *sorted(esp.iterdir()), "::/")
    assert SEED in disk.read_bytes() and DELETED in disk.read_bytes()
    return disk


def configure(directory: Path, source: Path, way: str) -> None:
    """Have a sealed image made of *source* in *directory*."""
    lines = {"source": "image", "source-image": str(source), "format": "raw", "mount-via": way, "virt-type": "qemu"}
    lines |= {"seal": "yes", "installer-logs": "yes", "audit": "yes", "audit-skip": "private-keys"}
    text = "".join(f"{key} = {value}\n" for key, value in lines.items())
    (directory / "image-factory.conf").write_text(f"[x]\n{text}")
    source.chmod(0o644)
    for parent in [source.parent, *source.parent.parents][:-2]:
        parent.chmod(parent.stat().st_mode | 0o055)


def build(user: User, source: Path, way: str, check: bool = True) -> tuple[Path, str]:
    """Have *user* make an image of *source*; return its path, and what was said."""
    directory = user.directory(f"fuse-{way}-{os.urandom(2).hex()}")
    configure(directory, source, way)
    argv = user.argv(user.program, "x", IMAGE_FACTORY_CONFIG=str(directory / "image-factory.conf"))
    done = run(*argv, cwd=directory, check=check)
    return directory / f"x-{TODAY}.raw", done.stderr


def listing(raw: Path, offset: int, made: int) -> dict[str, object]:
    """Return all that the files of a filesystem are, but for times of what was changed after *made*."""
    point = raw.parent / "mnt"
    point.mkdir()
    if offset == ESP:
        run("mcopy", "-s", "-m", "-n", "-i", f"{raw}@@{offset}", "::/", point)
    else:
        run("mount", "-o", f"ro,noload,loop,offset={offset}", raw, point)
    try:
        return {str(path.relative_to(point)): entry(path, made) for path in [point, *sorted(point.rglob("*"))]}
    finally:
        if offset == ESP:
            shutil.rmtree(point)
        else:
            run("umount", point)
            point.rmdir()


def entry(path: Path, made: int) -> object:
    status = path.lstat()
    names = os.listxattr(path, follow_symlinks=False)
    attributes = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
    time = None if path.is_dir() or status.st_mtime_ns > made else status.st_mtime_ns
    return status.st_mode, status.st_uid, status.st_gid, status.st_rdev, status.st_nlink, time, attributes, content


def test_the_same_as_in_the_appliance(users: dict[str, User], source: Path) -> None:
    """Root with links, attributes and owners, and the ESP, from which things go and where others get new names."""
    images = {}
    said = {}
    # Not all kernels have FAT; the appliance's has.
    for way in ("guestfs", "fuse"):
        images[way], text = build(users["c"], source, way)
        said[way] = re.findall(r"INFO: (\| .*|(?:Removed|Emptied|Changed|Made|Renamed|Sealing: (?!done)).*)", text)
    assert said["fuse"] == said["guestfs"]
    assert "Removed /root/.bash_history" in said["fuse"]
    assert f"Renamed /boot/efi/{MACHINE} to Default" in said["fuse"]
    made = source.stat().st_mtime_ns
    for offset in (ROOT, ESP):
        found = {way: listing(raw, offset, made) for way, raw in images.items()}
        assert found["fuse"].keys() == found["guestfs"].keys()
        for name, told in found["guestfs"].items():
            assert found["fuse"][name] == told, name
    for raw in images.values():
        data = raw.read_bytes()
        assert SEED not in data and DELETED not in data
        assert b"secret words" not in data
        assert run("zerofree", "-n", "-v", f"{raw}?offset={ROOT}").stdout.splitlines()[-1].startswith("0/")
        run("e2fsck", "-f", "-n", f"{raw}?offset={ROOT}")
    # The unused clusters of the ESP are zeros, not holes.
    assert images["fuse"].stat().st_blocks <= images["guestfs"].stat().st_blocks + (ROOT >> 9)


def test_a_killed_build_goes_on(users: dict[str, User], source: Path) -> None:
    """Nothing is mounted then, no process is left, and the disk is as it was: only a copy was written to."""
    user = users["c"]

    def runs() -> bool:
        return run("pgrep", "-u", user.name, "fuse2fs", check=False).returncode == 0

    directory = user.directory("fuse-killed")
    configure(directory, source, "fuse")
    argv = user.argv(user.program, "x", IMAGE_FACTORY_CONFIG=str(directory / "image-factory.conf"))
    log = directory / "log"
    with log.open("wb") as file, subprocess.Popen(argv, cwd=directory, stderr=file, stdout=subprocess.DEVNULL):
        # In the middle of sealing.
        wait_for(lambda: "INFO: Removed " in log.read_text(errors="replace"), "the disk to be written to")
        assert runs()
        os.kill(user.build_process(), signal.SIGKILL)
    wait_for(lambda: not runs(), "fuse2fs to end")
    work = directory / ".image-factory-x"
    assert (work / "mounted.raw").exists()
    assert filecmp.cmp(work / "disk.raw", source, shallow=False)
    argv.insert(-1, "--resume")
    run(*argv, cwd=directory)
    run("e2fsck", "-f", "-n", f"{directory}/x-{TODAY}.raw?offset={ROOT}")
    assert not work.exists()


def test_what_it_has_not(users: dict[str, User], source: Path, tmp_path: Path) -> None:
    """Root, and filesystems that are not ext or FAT, are told in a line."""
    _, said = build(users["root"], source, "fuse", check=False)
    assert "image-factory: error: mount-via = fuse is for ordinary users." in said
    other = tmp_path / "other.raw"
    shutil.copy(source, other)
    btrfs = tmp_path / "btrfs.raw"
    run("truncate", "-s", "264M", btrfs)
    run("mkfs.btrfs", "-q", "-f", btrfs)
    run("dd", f"if={btrfs}", f"of={other}", "bs=1M", f"seek={ROOT // MIB}", "conv=notrunc,sparse", "status=none")
    _, said = build(users["c"], other, "fuse", check=False)
    error = "image-factory: error: Partition 2 has btrfs, which mount-via = fuse can't reach."
    assert f"{error}\nimage-factory: hint: Set mount-via to guestfs or auto" in said


@pytest.mark.parametrize(
    ("mount_via", "source", "kinds", "way"),
    [
        ("loop", "bootstrap", ["vfat", "ext4", "swap", None], fuse),
        ("loop", "bootstrap", ["vfat", "ext4", "xfs"], appliance),
        ("loop", "image", ["vfat", "ext4"], appliance),
        ("loop", "bootstrap", ["ext4"], loop),
        ("fuse", "image", ["vfat", "ext2", "ext3", "swap", None], fuse),
        ("fuse", "bootstrap", ["ext4", "LVM2_member"], appliance),
        ("fuse", "bootstrap", ["btrfs"], appliance),
    ],
)
def test_which_way(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mount_via: str,
    source: str,
    kinds: list[str | None],
    way: mounts.Way,
) -> None:
    """An ordinary user's auto has chosen *mount_via*, on a machine whose kernel has no FAT."""
    plan = make_build(tmp_path / "build", mount_via, source=source).plan
    monkeypatch.setattr(type(plan), "as_root", False)
    monkeypatch.setattr(loop, "lacks_driver", "vfat".__eq__)
    monkeypatch.setattr(fuse, "check", lambda plan: None)
    volumes = [Volume(f"partition {number}", 1, kind) for number, kind in enumerate(kinds, 1)]
    assert mounts._way_to(volumes, dataclasses.replace(plan, guestfs_allowed=True)) is way
    if mount_via == "fuse" and way is appliance:
        with pytest.raises(BuildError, match=f"^Partition {len(kinds)} has {kinds[-1]}, which mount-via = fuse"):
            mounts._way_to(volumes, plan)


HELPER = REPOSITORY / "image-factory-sudo-helper"
INSIDE = f"""
mount -t tmpfs files "$1" && echo data >"$1/file" && mkdir "$1/there" && echo other >"$1/there/other"
env --unset=SUDO_UID {HELPER} list "$1" '*'
env --unset=SUDO_UID {HELPER} rename "$1" file there && exit 1
env --unset=SUDO_UID {HELPER} rename "$1" file new && cat "$1/new"
env --unset=SUDO_UID {HELPER} list "$1/there" '*' && exit 1
SUDO_UID=1000 SUDO_GID=1000 {HELPER} list "$1" '*' && exit 1
exit 0
"""


def test_the_helper_of_namespaces(users: dict[str, User]) -> None:
    """Root of a user's own namespaces may do what that user may; real root and sudo reach loop devices only."""
    user = users["c"]
    point = Path(f"/tmp/image-factory.{os.urandom(4).hex()}")
    user.run("mkdir", "-m", "700", point)
    try:
        unshare = ["unshare", "--user", "--map-root-user", "--map-auto", "--mount"]
        done = user.run(*unshare, "sh", "-c", INSIDE, "sh", point, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == '["file", "file"]\n["there", "directory"]\ndata\n'
        assert done.stderr.count("no loop device is mounted there") == 2
        done = run("unshare", "--mount", "sh", "-c", INSIDE, "sh", point, check=False)
        assert done.stdout == ""
        assert done.stderr.count("no loop device is mounted there") >= 4
    finally:
        point.rmdir()
