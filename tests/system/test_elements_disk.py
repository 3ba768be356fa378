"""Elements that lay out the disk, and scripts that run on it: what they are told, and what is left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, User, run, wait_for
from .test_elements_run import LOOK, Place, running, script, variables
from .test_elements_run import place as place
from .test_elements_run import system as system

LAYOUT = """\
- local_loop: {name: image0}
- partitioning:
    base: image0
    label: gpt
    partitions:
      - {name: BSP, type: EF02, size: 1MiB}
      - name: boot
        size: 32MiB
        mkfs:
          type: ext4
          label: START
          mount: {mount_point: /boot}
      - name: home
        size: 16MiB
        mkfs:
          type: ext4
          mount: {mount_point: /home}
      - name: root
        size: 100%
        mkfs:
          mount: {mount_point: /}
"""
ON_DISK = ("pre-finalise", "finalise", "cleanup")
BEFORE = ("post-root", "block-device")
# What bash of the system does on the disk.
INSIDE = """\
set -eu
[ -b "$IMAGE_BLOCK_DEVICE" ] && [ ! -d /lost ]
declare -A devices
eval devices=( $IMAGE_BLOCK_DEVICES )
[ -b "${devices[root]}" ] && [ "${devices[image0]}" = "$IMAGE_BLOCK_DEVICE" ]
echo kernel >/boot/kernel
echo >/home/was-here
mkdir /var/tmp/seen
echo "$IMAGE_BLOCK_DEVICES" >/var/tmp/seen/devices
while read -r line; do echo "$line"; done </proc/self/mountinfo >/var/tmp/seen/mounts
"""


def disks_of(place: Place) -> list[str]:
    """Return the loop devices of builds of *place*."""
    found = [
        path for path in Path("/sys/block").glob("loop*/loop/backing_file") if _text(path).startswith(str(place.out))
    ]
    return [path.parent.parent.name for path in found]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def is_left(name: str) -> bool:
    """Return whether partitions of *name* are there, and no disk that they are of."""
    device = Path("/sys/block", name)
    return any(device.glob(f"{name}p*")) and not (device / "loop").exists()


@pytest.fixture
def disk_place(place: Place) -> Place:
    place.element("disk", finalise=INSIDE)
    (place.path / "elements/disk/element-provides").write_text("block-device\n", encoding="utf-8")
    (place.path / "elements/disk/block-device-default.yaml").write_text(LAYOUT, encoding="utf-8")
    return place


def keyed(place: Place, size: str = "256M") -> None:
    """Have the disk itself, in the place of a tar of a tree, be what is made."""
    text = (place.path / "conf").read_text(encoding="utf-8")
    text = text.replace("layout = filesystem\n", "").replace("format = tar", "format = raw")
    (place.path / "conf").write_text(text.replace("size = 256M", f"size = {size}"), encoding="utf-8")


def build(place: Place, elements: str, keys: str = "", size: str = "256M", status: int = 0) -> str:
    argv = place.command(elements, keys=keys)
    keyed(place, size)
    done = run(*argv, env=place.environment, cwd=place.path, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    # After an error the kernel is at it.
    wait_for(lambda: disks_of(place) == [], "the end of the loop device")
    return done.stdout + done.stderr


def test_what_scripts_see_of_the_disk(disk_place: Place) -> None:
    place = disk_place
    seen = place.cache / "elements/seen"
    look = LOOK.format(out=seen)
    place.element("look", post_root=look, block_device=look, pre_finalise=look, cleanup=look)
    place.element("out", cleanup=f'cp -r "$TARGET_ROOT/var/tmp/seen/." {seen}; rm -r "$TARGET_ROOT/var/tmp/seen"')
    build(place, "disk look out")
    found = {phase: variables(seen / f"{phase}.d/environment") for phase in (*BEFORE, "pre-finalise", "cleanup")}
    for phase, told in found.items():
        assert (told["DIB_ROOT_LABEL"], told["DIB_ROOT_FSTYPE"]) == ("cloudimg-rootfs", "ext4")
        assert (told["DIB_BOOT_LABEL"], told["DIB_MOUNTPOINTS"]) == ("START", "/|/boot|/home")
        assert ("IMAGE_BLOCK_DEVICE" in told) == ("IMAGE_BLOCK_DEVICES" in told) == (phase in ON_DISK)
    device = found["cleanup"]["IMAGE_BLOCK_DEVICE"]
    assert re.fullmatch("/dev/loop[0-9]+", device)
    devices = (seen / "devices").read_text(encoding="utf-8")
    assert (
        devices == f" [image0]={device}  [BSP]={device}p1  [boot]={device}p2  [home]={device}p3  [root]={device}p4 \n"
    )
    mounts = [line.split() for line in (seen / "mounts").read_text(encoding="utf-8").splitlines()]
    places = {words[4]: words[-2] for words in mounts}
    assert (places["/"], places["/boot"], places["/home"]) == (f"{device}p4", f"{device}p2", f"{device}p3")
    assert {"/proc", "/sys", "/dev", "/tmp/in_target.d"} <= places.keys()
    assert not is_left(device.removeprefix("/dev/"))
    [disk] = place.out.glob("*.raw")
    table = json.loads(run("sfdisk", "--json", disk).stdout)["partitiontable"]
    held = [f"{disk}?offset={each['start'] * 512}" for each in table["partitions"]]
    assert run("debugfs", "-R", "cat /kernel", held[1]).stdout == "kernel\n"
    assert "was-here" in run("debugfs", "-R", "ls /", held[2]).stdout
    root = held[3]
    listed = run("debugfs", "-R", "ls /", root).stdout
    assert ".dotfile" in listed and "lost+found" in listed
    assert run("debugfs", "-R", "cat /etc/resolv.conf", root).stdout == "of the system\n"
    assert "null" not in run("debugfs", "-R", "ls /dev", root).stdout
    assert " /boot ext4 " in run("debugfs", "-R", "cat /etc/fstab", root).stdout
    for each in held[1:]:
        run("e2fsck", "-f", "-n", each)
    assert [run("e2label", each).stdout.strip() for each in held[1:]] == ["START", "mkfs_home", "cloudimg-rootfs"]


def test_layout_of_a_variable(place: Place) -> None:
    (place.path / "own.yaml").write_text(LAYOUT, encoding="utf-8")
    place.element(
        "see", finalise='[ "$IMAGE_BLOCK_DEVICE" ] && echo $DIB_ROOT_LABEL >/label && mount -t tmpfs over /home'
    )
    keys = f"DIB_BLOCK_DEVICE_CONFIG = file://{place.path}/own.yaml\nroot-label = MINE"
    build(place, "see", keys=keys, size="fit")
    [disk] = place.out.glob("*.raw")
    # Some room is left for what scripts bring.
    assert 110 << 20 < disk.stat().st_size < 256 << 20
    table = json.loads(run("sfdisk", "--json", disk).stdout)["partitiontable"]
    root = f"{disk}?offset={table['partitions'][3]['start'] * 512}"
    assert run("debugfs", "-R", "cat /label", root).stdout == "MINE\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_ended_on_the_disk(disk_place: Place, number: signal.Signals) -> None:
    place = disk_place
    place.element("wait", finalise="sleep 471109")
    argv = place.command("disk wait")
    keyed(place)
    process = subprocess.Popen(
        argv, cwd=place.path, env=place.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: running("471109"), "the script of finalise.d")
        [name] = disks_of(place)
    finally:
        process.send_signal(number)
        process.wait()
    wait_for(lambda: not running("471109") and not disks_of(place), "its end")
    assert not is_left(name)
    if number == signal.SIGKILL:
        run(sys.executable, REPOSITORY / "image-factory", "--cleanup", "-o", place.out, env=place.environment)
    assert os.listdir(place.out) == []


def test_script_that_fails_on_the_disk(disk_place: Place) -> None:
    script(disk_place.path / "elements/disk/cleanup.d/10-bad", "echo is bad; exit 4")
    said = build(disk_place, "disk", status=1)
    assert "cleanup.d/10-bad of the element disk failed with status 4: is bad" in said
    assert os.listdir(disk_place.out) == []


# GRUB's, as far as it matters: it finds its filesystem by mountinfo, and writes to the disk.
LOADER = """\
read -r _ _ _ _ place _ _ kind device _ </proc/self/mountinfo
[ "$place $kind $device" = "/ ext4 /dev/loop0p4" ] && [ -s "$device" ] || { echo "$place $kind $device"; exit 5; }
echo of the loader >/boot/loader
printf code 1<>"$1"
printf core | dd of="$1" bs=1M seek=1 conv=notrunc
"""
CONFIGURE = """\
echo "$(/usr/sbin/grub-probe --target=fs_uuid /) $(/usr/sbin/grub-mkrelpath /boot/kernel)" >/boot/grub.cfg
"""


def test_loader_of_an_ordinary_user(users: dict[str, User], system: Path) -> None:
    user = users["c"]
    place = Place(user.directory("elements-disk"), system)
    for directory in (place.out, place.cache):
        directory.mkdir(exist_ok=True)
        shutil.chown(directory, user.name)
    for name, text in {
        "grub-install": LOADER,
        "grub-mkconfig": CONFIGURE,
        "grub-probe": "",
        "grub-mkrelpath": "",
    }.items():
        script(place.path / "tree/usr/sbin" / name, text)
    for name in ("dd", "unshare"):
        shutil.copy2(str(shutil.which(name)), place.path / "tree/usr/bin")
    (place.path / "tree/boot").mkdir()
    script(place.path / "tree/boot/kernel", "")
    place.element(
        "disk", finalise='grub-mkconfig && grub-install "$IMAGE_BLOCK_DEVICE" && echo ${IMAGE_BLOCK_DEVICES} >/x'
    )
    (place.path / "elements/disk/block-device-default.yaml").write_text(LAYOUT, encoding="utf-8")
    place.command("disk")
    keyed(place)
    text = (place.path / "conf").read_text(encoding="utf-8").replace("mount-via = loop", "mount-via = fuse")
    (place.path / "conf").write_text(text, encoding="utf-8")
    argv = user.argv(user.program, "x", IMAGE_FACTORY_CONFIG=str(place.path / "conf"))
    done = run(*argv, cwd=place.path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [disk] = place.out.glob("*.raw")
    with disk.open("rb") as file:
        assert file.read(4) == b"code" and os.pread(file.fileno(), 4, 1 << 20) == b"core"
    table = json.loads(run("sfdisk", "--json", disk).stdout)["partitiontable"]
    boot, _, root = [f"{disk}?offset={each['start'] * 512}" for each in table["partitions"]][1:]
    assert run("debugfs", "-R", "cat /loader", boot).stdout == "of the loader\n"
    uuid = run(
        "blkid", "-p", "-O", str(table["partitions"][3]["start"] * 512), "-s", "UUID", "-o", "value", disk
    ).stdout
    assert run("debugfs", "-R", "cat /grub.cfg", boot).stdout == f"{uuid.strip()} /kernel\n"
    assert "[root]=/dev/loop0p4" in run("debugfs", "-R", "cat /x", root).stdout
    assert "grub" not in run("debugfs", "-R", "ls /usr/local/sbin", root).stdout
    assert "kernel" not in run("debugfs", "-R", "ls /boot", root).stdout


def test_disk_that_is_laid_out_twice(disk_place: Place) -> None:
    argv = disk_place.command("disk", "--check")
    done = run(*argv, env=disk_place.environment, cwd=disk_place.path, check=False)
    assert done.returncode == 2
    path = disk_place.path / "elements/disk/block-device-default.yaml"
    assert f"[x] layout: the disk is laid out by {path} already." in done.stderr
