"""A disk as devices of a build's namespaces, with its filesystems mounted: for root alone."""

import sys
from pathlib import Path

from .layouts import Layout

# Run in the namespaces: the disk $1 is attached, and its filesystems mounted below the tree $2; the file $3 gets the
# places.  The other words are filesystems, "NUMBER:KIND:POINT", a place before those below it.
#
# The kernel itself detaches the disk when the last of these mounts goes, whatever ends the build (autoclear), and takes
# back the partitions that partx has told it of (partscan, without which they would stay); devices are made here, as
# those of the machine are not seen in the namespaces.  A kernel that reads tables itself is told nothing new.
PROGRAM = """\
import errno, fcntl, os, stat, struct, subprocess, sys
disk, tree, record, *filesystems = sys.argv[1:]
GET_FREE, CONFIGURE, AUTOCLEAR, PARTSCAN = 0x4C82, 0x4C0A, 4, 8

def node(name, kind, number):
    path = f"/dev/{name}"
    if not os.path.exists(path):
        os.mknod(path, kind | 0o660, number)
    return path

def number_of(place):
    with open(f"/sys/{place}/dev", encoding="ascii") as file:
        return os.makedev(*map(int, file.read().split(":")))

def attached(image):
    control = os.open(node("loop-control", stat.S_IFCHR, os.makedev(10, 237)), os.O_RDWR)
    while True:
        name = f"loop{fcntl.ioctl(control, GET_FREE)}"
        loop = os.open(node(name, stat.S_IFBLK, number_of(f"block/{name}")), os.O_RDWR)
        settings = struct.pack("52xI176x", AUTOCLEAR | PARTSCAN)
        try:
            fcntl.ioctl(loop, CONFIGURE, struct.pack("II", image, 512) + settings + bytes(64))
            return name, loop
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        # Another program was faster.
        os.close(loop)

try:
    name, loop = attached(os.open(disk, os.O_RDWR))
    numbers = [int(each.partition(":")[0]) for each in filesystems]
    if any(numbers):
        subprocess.run(["partx", "--update", f"/dev/{name}"], check=True)
        for found in sorted(os.listdir(f"/sys/block/{name}")):
            if found.startswith(f"{name}p"):
                node(found, stat.S_IFBLK, number_of(f"block/{name}/{found}"))
    with open(record, "w", encoding="utf-8") as places:
        for number, each in zip(numbers, filesystems):
            _, kind, point = each.split(":", 2)
            device = f"/dev/{name}p{number}" if number else f"/dev/{name}"
            place = tree + point.rstrip("/")
            places.write(f"{place}\\n")
            subprocess.run(["mount", "-t", kind, device, place], check=True)
except OSError as error:
    sys.exit(f"{error.filename or disk}: {error.strerror}")
except subprocess.CalledProcessError as error:
    sys.exit(f"{error.cmd[0]} failed with status {error.returncode}")
print(name)
"""

PROGRAMS = ("partx", "mount", "umount")


def attach_argv(disk: Path, tree: Path, record: Path, layout: Layout) -> list[str]:
    """Return the command that mounts the filesystems of *disk* below *tree*, and prints the name of its device."""
    mounted = [f"{piece.number}:{each.kind}:{each.point}" for piece, each in reversed(layout.mounted)]
    return [sys.executable, "-I", "-c", PROGRAM, str(disk), str(tree), str(record), *mounted]


def devices(name: str, layout: Layout) -> dict[str, str]:
    """Return the devices of a disk with *layout* that is attached as *name*, by what they are called in the layout."""
    pieces = {piece.name: f"/dev/{name}p{piece.number}" for piece in layout.pieces if piece.number}
    return {"image0": f"/dev/{name}", **pieces}
