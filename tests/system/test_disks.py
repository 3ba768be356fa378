"""Disks that are made from trees: what was in the tree is in the filesystem, as it was there."""

import json
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
mkdir -p etc dir/sub 'dir/with blank' .hidden empty many
echo root >etc/fstab
echo a >dir/a; ln dir/a dir/sub/b; ln dir/a c
echo x >.dot; echo x >.hidden/..x; : >zero
for number in $(seq 200); do ln .hidden/..x "many/$number"; done
head -c 100000 /dev/urandom >old; head -c 100000 /dev/urandom >late
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
                  for name in sorted(os.listxattr(path, follow_symlinks=False))}
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

# Makes the tree and the disk argv[1] of it in namespaces, and prints what the tree was.
_MAKE = r"""
import os, sys
from pathlib import Path
from image_factory.disks import layouts, making
from image_factory.inside import namespaces
script, look, directory = sys.argv[1], sys.argv[2], Path(sys.argv[3])
size = 200 << 20
root = layouts.pieces("bios", "x86_64", size)[-1]
disk, tree = directory / "disk.raw", directory / "tree"
tree.mkdir()
with open(disk, "xb") as file:
    file.truncate(size)
with namespaces.entered(directory, as_root=os.geteuid() == 0) as inside:
    inside.run("mount", "-t", "tmpfs", "tree", str(tree))
    inside.run("mkdir", str(tree / "root"))
    inside.run("sh", "-e", "-c", script, "sh", str(tree / "root"), str(os.geteuid()))
    print(inside.run("python3", "-c", look, str(tree / "root"), capture=True))
    layout = making.Layout("bios", "x86_64", size, layouts.random_identity())
    for words in making.filesystem_argvs(tree / "root", disk, root, layout):
        inside.run(*words)
print(root.offset)
"""


@contextmanager
def mounted(disk: Path, offset: int, point: Path) -> Iterator[None]:
    """Mount the filesystem at *offset* of *disk*."""
    point.mkdir()
    run("mount", "-o", f"loop,ro,offset={offset}", disk, point)
    try:
        yield
    finally:
        run("umount", point)


def look(top: Path) -> dict[str, Any]:
    """Return what the tree at *top* is."""
    found: dict[str, Any] = json.loads(run("/usr/bin/python3", "-c", _LOOK, top).stdout)
    return found


@pytest.mark.parametrize("name", ["root", "c"])
def test_all_of_a_tree_is_in_its_filesystem(users: dict[str, User], tmp_path: Path, name: str) -> None:
    """Owners, modes, times, capabilities, ACLs, attributes, links, holes, devices, names."""
    user = users[name]
    directory = user.directory(f"tree-{name}")
    environment = f"PYTHONPATH={REPOSITORY}", f"PATH={search_path()}"
    argv = user.argv("env", *environment, "/usr/bin/python3", "-c", _MAKE, _TREE, _LOOK, directory)
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tree, offset = done.stdout.strip().splitlines()
    wanted = json.loads(tree)
    with mounted(directory / "disk.raw", int(offset), tmp_path / "mounted"):
        assert look(tmp_path / "mounted") == wanted
    # What the tree was made for was in it.
    assert wanted["dir/a"][:4] == ["0o100674", 1000, 65534, 981173106123456789]
    assert ("null" in wanted) == user.is_root
    run("e2fsck", "-f", "-n", f"{directory}/disk.raw?offset={offset}")
