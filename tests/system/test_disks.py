"""Disks that are made from trees: what was in the tree is in the filesystem, as it was there."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from image_factory.base.command import search_path

from ..conftest import REPOSITORY, User, run

# A tree with all that a filesystem can tell of its files; $1 is its top.
_TREE = r"""
cd "$1"; export TZ=UTC
mkdir -p etc dir/sub dir/fat 'dir/with blank' .hidden empty many
echo root >etc/fstab
echo a >dir/a; ln dir/a dir/sub/b; ln dir/a c
echo x >.dot; echo x >.hidden/..x; : >zero
for number in $(seq 200); do ln .hidden/..x "many/$number"; done
head -c 8000000 /dev/urandom >old; head -c 100000 /dev/urandom >late
truncate -s 50M sparse; truncate -s 1M hole
printf hi | dd of=sparse bs=1 seek=20M conv=notrunc status=none
ln -s etc/fstab link; ln -s "$(printf 'l%.0s' $(seq 300))" long
echo x >"dir/quo\"te'\\b"; echo x >"dir/$(printf 'q%.0s' $(seq 255))"; echo x >"$(printf 'dir/\377\376 ')"
echo x >'dir/new
line'
touch -d '2001-02-03 04:05:06' 'dir/new
line'
mkfifo fifo; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("sock")'
if [ "$(id -u)" = "$2" ]; then mknod null c 1 3; mknod disk b 259 300000; fi
chown 1000:65534 dir/a; chown -h 33:0 link; chown 5:6 .
chmod 4755 .dot; chmod 2775 dir; chmod 1777 empty; chmod 2711 .; chmod 0 zero
setfacl -m u:1000:rwx,g:33:r dir/a; setfacl -d -m u:5:rwx dir/sub
python3 - <<'END'
import os
capability = bytes.fromhex("0100000200200000000000000000000000000000")
os.setxattr(".dot", "security.capability", capability)
os.setxattr("dir", "security.test", b"v" * 500)
os.setxattr(".", "security.test", b"top")
os.setxattr("link", "security.selinux", b"system_u:object_r:etc_t:s0\0", follow_symlinks=False)
os.setxattr("fifo", "security.selinux", b"system_u:object_r:etc_t:s0\0", follow_symlinks=False)
END
touch -h -d '2001-02-03 04:05:06.123456789' link dir/a dir/sub
touch -d '1960-01-01 00:00:00.25' old; touch -d '2100-01-01 00:00:01.999999999' late
touch -d '2002-02-02 02:02:02.02' .
"""

# Prints what there is to know of the tree at argv[1].
_LOOK = r"""
import hashlib, json, os, stat, sys
os.chdir(sys.argv[1])
found, first = {}, {}
for path in sorted(os.path.join(top, name) for top, names, files in os.walk(b".") for name in [*names, *files, b"."]):
    path = os.path.normpath(path)
    if path == b"lost+found" or os.fsdecode(path) in found:
        continue
    status = os.lstat(path)
    attributes = {name: os.getxattr(path, name, follow_symlinks=False).hex()
                  for name in sorted(os.listxattr(path, follow_symlinks=False))
                  # xfs shows ACLs a second time.
                  if not name.startswith("trusted.SGI_ACL_")}
    told = [oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev, attributes]
    if not stat.S_ISDIR(status.st_mode):
        told += [status.st_nlink, os.fsdecode(first.setdefault(status.st_ino, path))]
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            told += [status.st_size, hashlib.sha256(file.read()).hexdigest()]
        # Of what is sparse, blocks of a filesystem may be larger than those of the other.
        told += [status.st_blocks * 512 < status.st_size // 2]
    if stat.S_ISLNK(status.st_mode):
        told += [os.fsdecode(os.readlink(path))]
    found[os.fsdecode(path)] = told
json.dump(found, sys.stdout)
"""

# A layout with all that is made without libguestfs.
_LAYOUT = """\
- local_loop: {name: image0}
- partitioning:
    base: image0
    label: LABEL
    partitions:
    - name: swap
      size: 8MiB
      mkfs: {type: swap, label: swap, mount: {mount_point: swap}}
    - name: fat
      size: 64MiB
      mkfs: {type: vfat, label: fat, mount: {mount_point: /dir/fat}}
    - name: root
      size: 100MiB
      mkfs: {label: the-root, opts: "-m 1", mount: {mount_point: /}}
    - name: dir
      size: 50%
      mkfs: {type: ext3, uuid: 11111111-2222-3333-4444-555555555555, mount: {mount_point: /dir}}
    - name: deep
      size: 100%
      mkfs: {type: ext2, mount: {mount_point: /dir/sub, fstab: {options: nodev, dump-freq: 1, fsck-passno: 0}}}
"""

# And those that are made with it: the mount point is nothing that the tree has elsewhere.
_IN_APPLIANCE = """\
- local_loop: {name: image0}
- partitioning:
    base: image0
    label: gpt
    partitions:
    - name: root
      size: 320MiB
      mkfs: {type: xfs, label: the-root, mount: {mount_point: /}}
    - name: dir
      size: 100%
      mkfs: {type: btrfs, opts: "--metadata single", mount: {mount_point: /dir}}
"""

# And volumes of LVM: of two partitions, the first of which has room for the first two volumes.
_ON_LVM = """\
- local_loop: {name: image0}
- partitioning:
    base: image0
    label: gpt
    partitions:
    - {name: one, type: 8E00, size: 421MiB}
    - {name: two, type: 8E00, size: 100%}
- lvm:
    name: lvm
    pvs: [{name: pv1, base: one}, {name: pv2, base: two}]
    vgs: [{name: the-vg, base: [pv1, pv2]}]
    lvs:
    - {name: the-root, base: the-vg, size: 123MiB}
    - {name: dir, base: the-vg, size: 300MiB}
    - {name: swap, base: the-vg, extents: 100%FREE}
- mkfs: {base: the-root, type: ext4, label: the-root, opts: "-m 1", mount: {mount_point: /}}
- mkfs: {base: dir, type: xfs, mount: {mount_point: /dir}}
- mkfs: {base: swap, type: swap, mount: {mount_point: swap}}
"""

# Filesystems of a share of the disk, of which the root is not the last: all that is measured.
_SHARES = """\
- local_loop: {name: image0}
- partitioning:
    base: image0
    label: gpt
    partitions:
    - name: swap
      size: 8MiB
      mkfs: {type: swap, mount: {mount_point: swap}}
    - name: root
      size: 60%
      mkfs: {mount: {mount_point: /}}
    - name: dir
      size: 50%
      mkfs: {type: ext2, mount: {mount_point: /dir}}
    - name: rest
      size: 100%
      mkfs: {type: ext4}
"""

# Makes the tree and disks of it in namespaces, in the directory argv[3], and prints what the tree was.
_MAKE = r"""
import dataclasses, datetime, os, sys
from pathlib import Path
from image_factory.base.errors import BuildError
from image_factory.disks import layouts, making, notation
from image_factory.inside import namespaces
from image_factory.model import Build, Plan
script, look, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3])
tree = directory / "tree"
tree.mkdir()
root = layouts.root_of("ext4", "", [])

def make(inside, name, scheme, size):
    build = Build(Plan("x", None, datetime.date.today(), directory, {}), directory / name, "vm")
    build.directory.mkdir()
    extra = None if size else 3 << 20
    layout = layouts.Layout(scheme, None, "x86_64", size, layouts.random_identity(), extra=extra)
    if not size:
        layout = making.fitted(inside, tree / "root", build, layout)
    making.make_disk(inside, tree / "root", build, layout)

with namespaces.entered(directory, as_root=os.geteuid() == 0) as inside:
    inside.run("mount", "-t", "tmpfs", "tree", str(tree))
    inside.run("mkdir", str(tree / "root"))
    inside.run("sh", "-e", "-c", script, "sh", str(tree / "root"), str(os.geteuid()))
    print(inside.run("python3", "-c", look, str(tree / "root"), capture=True))
    if (directory / "appliance.yaml").exists():
        for name in ("appliance", "lvm"):
            make(inside, name, notation.read(directory / f"{name}.yaml", root), 512 << 20)
            inside.run("umount", "--quiet", str(tree / "root/dir"))
        (directory / "small.yaml").write_text((directory / "lvm.yaml").read_text().replace("123MiB", "8MiB"))
        try:
            make(inside, "small", notation.read(directory / "small.yaml", root), 512 << 20)
        except BuildError as error:
            print(error.message, error.hint)
        inside.run("umount", "--quiet", str(tree / "root/dir"))
        for kind, name in {"xfs": "filesystem", "btrfs": "bios"}.items():
            make(inside, f"fit-{kind}", layouts.scheme(name, "x86_64", layouts.root_of(kind, "", [])), 0)
        sys.exit()
    whole = layouts.scheme("filesystem", "x86_64", root)
    make(inside, "fit", whole, 0)
    fits = (directory / "fit/disk.raw").stat().st_size
    try:
        make(inside, "small", layouts.scheme("bios", "x86_64", root), (3 << 20) + fits // 2)
    except BuildError as error:
        print(error.message, error.hint)
    make(inside, "gpt", notation.read(directory / "gpt.yaml", root), 260 << 20)
    inside.run("umount", str(tree / "root/dir"))
    make(inside, "mbr", notation.read(directory / "mbr.yaml", root), 260 << 20)
    inside.run("umount", str(tree / "root/dir"))
    make(inside, "shares", notation.read(directory / "shares.yaml", root), 0)
"""


@contextmanager
def mounted(disk: Path, offset: int, size: int, point: Path) -> Iterator[None]:
    """Mount the filesystem of *size* bytes at *offset* of *disk*."""
    point.mkdir()
    run("mount", "-o", f"loop,ro,offset={offset},sizelimit={size}", disk, point)
    try:
        yield
    finally:
        run("umount", point)


def look(top: Path) -> dict[str, Any]:
    """Return what the tree at *top* is."""
    found: dict[str, Any] = json.loads(run("/usr/bin/python3", "-c", _LOOK, top).stdout)
    return found


def partitions_of(disk: Path) -> list[dict[str, Any]]:
    """Return the partitions of *disk* as sfdisk tells them."""
    found: list[dict[str, Any]] = json.loads(run("sfdisk", "--json", disk).stdout)["partitiontable"]["partitions"]
    return found


def probed(disk: Path, offset: int) -> dict[str, str]:
    """Return what blkid tells of what is at *offset* of *disk*."""
    text = run("blkid", "-p", "-o", "export", "-O", str(offset), disk).stdout
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def made(user: User, directory: Path, **layouts: str) -> list[str]:
    """Make the tree, and disks of it with *layouts*, as *user* in *directory*; return the lines that are said."""
    for name, text in layouts.items():
        (directory / f"{name}.yaml").write_text(text)
    environment = f"PYTHONPATH={REPOSITORY}", f"PATH={search_path()}"
    argv = user.argv("env", *environment, "/usr/bin/python3", "-c", _MAKE, _TREE, _LOOK, directory)
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.mark.parametrize("name", ["root", "c"])
def test_all_of_a_tree_is_in_its_filesystems(users: dict[str, User], tmp_path: Path, name: str) -> None:
    """Owners, modes, times, capabilities, ACLs, attributes, links, holes, devices, names."""
    user = users[name]
    directory = user.directory(f"tree-{name}")
    texts = {label: _LAYOUT.replace("LABEL", label) for label in ("gpt", "mbr")}
    tree, too_small = made(user, directory, **texts, shares=_SHARES)
    wanted = json.loads(tree)
    # What the tree was made for was in it.
    assert wanted["dir/a"][:4] == ["0o100674", 1000, 65534, 981173106123456789]
    assert ("null" in wanted) == user.is_root

    fit = directory / "fit/disk.raw"
    with mounted(fit, 0, fit.stat().st_size, tmp_path / "fit"):
        assert look(tmp_path / "fit") == wanted
    run("e2fsck", "-f", "-n", fit)
    # The smallest one has some blocks of 4 KiB less: those of extra-size, and what nobody knew.
    least = int(run("resize2fs", "-P", fit).stdout.split()[-1]) * 4096
    assert fit.stat().st_size - least < 8 << 20
    needed = (fit.stat().st_size >> 20) - 3 + 3
    assert too_small.startswith("/ of the tree can't be put on its filesystem of ")
    assert f"Set image-size to at least {needed}M, or to fit." in too_small

    for label in ("gpt", "mbr"):
        disk = directory / label / "disk.raw"
        pieces = [piece for piece in partitions_of(disk) if piece["type"] != "5"]
        places = [(piece["start"] * 512, piece["size"] * 512) for piece in pieces]
        kinds = [probed(disk, offset) for offset, _ in places]
        assert [kind["TYPE"] for kind in kinds] == ["swap", "vfat", "ext4", "ext3", "ext2"]
        assert [kind.get("LABEL") for kind in kinds] == ["swap", "FAT", "the-root", None, None]
        assert kinds[3]["UUID"] == "11111111-2222-3333-4444-555555555555"
        root, below, deep = (tmp_path / label / part for part in ("root", "dir", "deep"))
        (tmp_path / label).mkdir()
        with mounted(disk, *places[2], root), mounted(disk, *places[3], below), mounted(disk, *places[4], deep):
            found = look(root)
            assert not [path for path in found if path.startswith("dir/")]
            assert found["dir"][:5] == look(below)["."][:5] == wanted["dir"][:5]
            assert look(below)["sub"][:3] == look(deep)["."][:3] == wanted["dir/sub"][:3]
            assert look(deep)["b"][:6] == wanted["dir/sub/b"][:6]
            assert found["many/1"] == wanted["many/1"]
        for offset, _ in places[2:]:
            run("e2fsck", "-f", "-n", f"{disk}?offset={offset}")

    # One of the two has no room to spare, and a mebibyte less would be too small.
    disk = directory / "shares/disk.raw"
    places = [(piece["start"] * 512, piece["size"] * 512) for piece in partitions_of(disk)]
    with mounted(disk, *places[1], tmp_path / "root"), mounted(disk, *places[2], tmp_path / "dir"):
        assert look(tmp_path / "root")["many/1"] == wanted["many/1"]
        assert look(tmp_path / "dir")["a"][:6] == wanted["dir/a"][:6]
        free = [os.statvfs(tmp_path / name) for name in ("root", "dir")]
    assert min(each.f_bfree * each.f_frsize for each in free) < 8 << 20
    for offset, _ in places[1:]:
        run("e2fsck", "-f", "-n", f"{disk}?offset={offset}")


def check_parts(root: dict[str, Any], below: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Assert that *root* and *below*, the filesystem that is mounted at dir, have what the tree *wanted* had."""
    # The links of these lead from one filesystem to the other.
    apart = {"c", "dir/a", "dir/sub/b"}
    # Of a directory that is a mount point, what lies below it is on the other.
    assert {path: root[path] for path in root if path not in apart} == {
        path: told for path, told in wanted.items() if path not in apart and not path.startswith("dir/")
    } | {"dir": root["dir"]}
    names = {path: "." if path == "dir" else path.removeprefix("dir/") for path in wanted}
    within = {path for path in wanted if path == "dir" or path.startswith("dir/")} - apart
    assert {path: below[names[path]][:6] for path in within} == {path: wanted[path][:6] for path in within}
    assert below["a"][:7] == [*wanted["dir/a"][:6], 2]
    assert root["c"][:7] == [*wanted["c"][:6], 1]


def test_all_of_a_tree_is_on_xfs_btrfs_and_lvm(users: dict[str, User], tmp_path: Path) -> None:
    directory = users["c"].directory("tree-appliance")
    tree, too_small = made(users["c"], directory, appliance=_IN_APPLIANCE, lvm=_ON_LVM)
    assert too_small.startswith("/ of the tree can't be put on its filesystem of 8.0 MiB: it needs ")
    assert re.search(r" Have the-root be of at least [0-9]+MiB in the layout\.$", too_small)
    wanted = json.loads(tree)
    disk = directory / "appliance/disk.raw"
    places = [(piece["start"] * 512, piece["size"] * 512) for piece in partitions_of(disk)]
    kinds = [probed(disk, offset) for offset, _ in places]
    assert [(kind["TYPE"], kind.get("LABEL")) for kind in kinds] == [("xfs", "the-root"), ("btrfs", None)]
    with mounted(disk, *places[0], tmp_path / "xfs"), mounted(disk, *places[1], tmp_path / "btrfs"):
        check_parts(look(tmp_path / "xfs"), look(tmp_path / "btrfs"), wanted)

    # Volumes are where LVM puts them: behind each other, a mebibyte after the beginning of the partition.
    disk = directory / "lvm/disk.raw"
    one, two = (piece["start"] * 512 for piece in partitions_of(disk))
    starts = [one + (1 << 20), one + (121 << 20), two + (1 << 20)]
    assert [probed(disk, start)["TYPE"] for start in (one, two)] == ["LVM2_member"] * 2
    assert [probed(disk, start)["TYPE"] for start in starts] == ["ext4", "xfs", "swap"]
    assert probed(disk, starts[0])["LABEL"] == "the-root"
    with (
        mounted(disk, starts[0], 120 << 20, tmp_path / "lvm-root"),
        mounted(disk, starts[1], 300 << 20, tmp_path / "lvm-dir"),
    ):
        check_parts(look(tmp_path / "lvm-root"), look(tmp_path / "lvm-dir"), wanted)
    run("e2fsck", "-f", "-n", f"{disk}?offset={starts[0]}")
    # What its own programs read is right; of the files that the volumes were made from, none is left.
    with disk.open("rb") as file:
        file.seek(one)
        label = file.read(1 << 20)
    (tmp_path / "pv").write_bytes(label)
    told = run("pvck", "--dump", "metadata", tmp_path / "pv").stdout
    assert re.findall("extent_count = ([0-9]+)", told) == ["30", "75", "22"]
    assert not [*directory.glob("lvm/*.volume")]

    disk = directory / "fit-xfs/disk.raw"
    # No smaller one is made.
    assert disk.stat().st_size == 300 << 20
    with mounted(disk, 0, 300 << 20, tmp_path / "fit-xfs"):
        assert look(tmp_path / "fit-xfs") == wanted
    disk = directory / "fit-btrfs/disk.raw"
    _, last = partitions_of(disk)
    start, size = last["start"] * 512, last["size"] * 512
    # The table is that of the disk when it had become smaller: its copy is at the end, and all is used.
    assert "GPT" not in run("sfdisk", "--verify", disk).stderr
    assert start + size == disk.stat().st_size - (1 << 20)
    with mounted(disk, start, size, tmp_path / "fit-btrfs"):
        assert look(tmp_path / "fit-btrfs") == wanted
        status = os.statvfs(tmp_path / "fit-btrfs")
        assert size - (1 << 20) < status.f_blocks * status.f_frsize <= size
    # As large it was made.
    assert size < 320 << 20
