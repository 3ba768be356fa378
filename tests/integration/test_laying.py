"""A tar is laid on disks as who deploys it does, with MBR and with GPT, and these boot; or it is said what it lacks."""

import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from image_factory import checkpoint, pipeline
from image_factory.configuration.files import Configuration
from image_factory.model import Artifact

from .. import golden
from ..conftest import TODAY, User, run, wait_for
from . import test_dry_run

# The kernel says with which status its first program has ended: 42 if the disk is as fstab says.
PROBE = """\
#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
. /etc/probe
root=$(awk '$2 == "/" {print $1 " " $3}' /etc/fstab)
[ "UUID=$(blkid -s UUID -o value "$(findmnt -n -o SOURCE /)") ext4" = "$root" ] || exit 7
[ "$(blkid -s PTTYPE -o value /dev/sda)" = "$table" ] || exit 8
[ "$(grep -c /boot/efi /etc/fstab)" = "$esp" ] || exit 9
[ -d /sys/firmware/efi ] || mount -t sysfs sysfs /sys
[ "$(ls -d /sys/firmware/efi 2>/dev/null | wc -l)" = "$esp" ] || exit 10
getcap /usr/bin/probed | grep -q cap_net_raw || exit 11
exit 42
"""
GRUB = 'GRUB_TIMEOUT=0\nGRUB_CMDLINE_LINUX="no_timer_check console=ttyS0 init=/sbin/probe"\n'
# What the kernel keeps of cap_net_raw+ep: linux/capability.h, VFS_CAP_REVISION_2.
CAPABILITY = "\1\0\0\2\0\40" + "\0" * 14
TABLES = {"bios": ("dos", 0), "uefi": ("gpt", 1)}


@dataclass
class Scene:
    """A build of *user* in *directory* that has made a tar, and is to be resumed."""

    user: User
    directory: Path

    @property
    def work(self) -> Path:
        return self.directory / ".image-factory-x"

    @property
    def artifact(self) -> Path:
        return self.work / f"x-{TODAY}.tar"

    def prepare(self, firmware: str, extra: str = "") -> None:
        """Have the configuration there, and the artifact as the one that was made."""
        (self.directory / "disk.raw").write_bytes(bytes(1 << 20))
        (self.directory / "image-factory.conf").write_text(
            f"[x]\nsource = image\nsource-image = {self.directory}/disk.raw\nverify = none\nformat = tar\n"
            f"virt-type = qemu\nram = 512M\ntest-boot = yes\nfirmware = {firmware}\n{extra}\n"
        )
        configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(self.directory / "image-factory.conf")})
        plan = pipeline.make_plan(configuration, "x", {"output-dir": str(self.directory)})
        with self.artifact.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        (self.work / f"{self.artifact.name}.sha256sum").write_text(f"{digest}  {self.artifact.name}\n")
        found = checkpoint.Checkpoint(
            self.work, checkpoint.inputs_of(plan), checkpoint.outputs_of(plan), TODAY, "qemu", [],
            Path("/proc/sys/kernel/random/boot_id").read_text(),
        )  # fmt: skip
        found.reach(checkpoint.Reached.CONVERTED, [Artifact(self.artifact, "tar", 1 << 30, sha256=digest)])
        for path in (self.work, *self.work.iterdir()):
            shutil.chown(path, self.user.name)

    def argv(self, *flags: str) -> list[str]:
        configuration = str(self.directory / "image-factory.conf")
        return self.user.argv(self.user.program, *flags, "--resume", "x", IMAGE_FACTORY_CONFIG=configuration)

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        return run(*self.argv(*flags), check=False, cwd=self.directory)

    def results(self) -> dict[str, str]:
        """Return what JUnit's file has of each check: nothing if it passed, else what is wrong."""
        cases = ElementTree.parse(self.directory / f"x-{TODAY}.junit.xml").iter("testcase")
        return {str(case.get("name")): "".join(str(element.get("message")) for element in case) for case in cases}

    def left(self) -> list[str]:
        """Return what is there beside the artifact and the checkpoint, and the processes that have to do with it."""
        files = [path.name for path in self.work.iterdir() if path.name.startswith(("laid-", "boot-"))]
        return files + run("pgrep", "-af", str(self.work), check=False).stdout.splitlines()


def scene_of(user: User, name: str) -> Scene:
    found = Scene(user, user.directory(re.sub(r"\W+", "-", name)[:40]))
    found.work.mkdir()
    return found


@pytest.fixture(params=["root", "c"])
def scene(request: pytest.FixtureRequest, users: dict[str, User]) -> Iterator[Scene]:
    """As root, and as a user without a sudo rule."""
    found = scene_of(users[request.param], request.node.name)
    yield found
    assert found.left() == []
    shutil.rmtree(found.directory)


# A system.


@pytest.fixture(scope="module")
def system(base: Path) -> Iterator[Path]:
    """A tar of Debian, whose kernel starts nothing but the probe."""
    point, path = base / "golden-root", base / "golden.tar"
    point.mkdir()
    run("mount", "-o", f"ro,noload,loop,offset={golden.ROOT_OFFSET}", golden.disk(), point)
    try:
        run("tar", "--xattrs", "--acls", "--numeric-owner", "--sparse", "-C", point, "-cf", path, ".")
    finally:
        run("umount", point)
    add(path, {"sbin/probe": PROBE, "etc/default/grub": GRUB})
    add(path, {"usr/bin/probed": ""}, {"SCHILY.xattr.security.capability": CAPABILITY})
    yield path
    path.unlink()


def add(tar: Path, files: Mapping[str, str], attributes: Mapping[str, str] | None = None) -> None:
    """Add *files*, which are executable and have *attributes* of pax, to *tar*: the last one of a name counts."""
    with tarfile.open(tar, "a") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.mode, entry.size = 0o755, len(text.encode())
            entry.pax_headers = dict(attributes or {})
            archive.addfile(entry, io.BytesIO(text.encode()))


def normal(argv: list[str]) -> str:
    """Return *argv* without what a dry run can't know."""
    text = shlex.join(argv)
    for pattern, word in {
        r"--target=(\w+)": "--target=PID",
        r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b[A-Z-]+-UUID\b": "UUID",
        r"\b[0-9A-F]{4}-[0-9A-F]{4}\b|\b[0-9A-Fa-f]{8}\b|\bX{4}-X{4}\b|\bX{8}\b": "SERIAL",
        r"\b[0-9]{4,}k?\b|\bSIZE\b": "NUMBER",
    }.items():
        text = re.sub(pattern, word, text)
    return text


def test_debian_boots_with_each_firmware(users: dict[str, User], system: Path) -> None:
    """As a user without a sudo rule: the kernel that the tree's own boot loader starts finds all as it is to be."""

    def build(firmware: str) -> tuple[Scene, str, str]:
        found = scene_of(users["c"], f"laying {firmware}")
        run("cp", "--sparse=always", system, found.artifact)
        table, esp = TABLES[firmware]
        # Of the image's own boot loader nothing may stay.
        stale = dict.fromkeys(("boot/efi/EFI/BOOT/BOOTX64.EFI", "boot/efi/EFI/debian/grub.cfg"), "of another disk")
        add(found.artifact, {"etc/probe": f"table={table} esp={esp}\n", **stale})
        found.prepare(firmware)
        return found, found.run("--dry-run").stdout, found.run().stderr

    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(build, TABLES))
    for firmware, (found, shown, said) in zip(TABLES, ended, strict=True):
        print(said[-6000:])
        name = f"Laying x-{TODAY}.tar on a disk for {firmware.upper()}"
        [expected] = [commands for step, commands in test_dry_run.announced(shown) if step == name]
        [commands] = [commands for step, commands in test_dry_run.logged(said) if step == name]
        # What measures the tree, which the log would have nothing of, is shown, too.
        wanted = [text for text in map(normal, expected) if "function blocks" not in text]
        # A boot that fails is no step that the log has an end of: its commands follow.
        assert [*map(normal, commands)][: len(wanted)] == wanted
        error = next(line for line in said.splitlines() if line.startswith("image-factory: error: "))
        assert f"x-{TODAY}.tar failed its test boot with {firmware}: its kernel panicked: " in error
        assert "exitcode=0x00002a00" in error
        assert found.left() == []
        shutil.rmtree(found.directory)


# Small trees.

DPKG = {"var/lib/dpkg/status": ""}
KERNEL = DPKG | {"boot/vmlinuz-6.1": ""}
LOADER = KERNEL | {"usr/bin/grub-mkimage": "", "usr/lib/grub/i386-pc/boot.img": ""}
WHOLE = LOADER | {"usr/sbin/grub-mkconfig": "", "usr/sbin/mke2fs": "", "usr/sbin/grub-probe": ""}
LACKING = {
    "another distribution": ({}, "bios", "is no system of Debian's or Ubuntu's packages"),
    "no kernel": (DPKG, "bios", "has no kernel: there is no /boot/vmlinuz-*."),
    "no grub": (KERNEL, "bios", "can't boot with BIOS where it is deployed: it has no grub-common, grub-pc-bin."),
    "no grub for UEFI": (
        LOADER | {"usr/sbin/grub-mkconfig": ""},
        "uefi",
        "can't boot with UEFI where it is deployed: it has no grub-efi-amd64-bin, grub-efi-amd64-signed, shim-signed.",
    ),
    "no e2fsprogs": (LOADER | {"usr/sbin/grub-mkconfig": ""}, "bios", "The system has no e2fsprogs"),
}


def make_tar(scene: Scene, files: Mapping[str, str], firmware: str = "bios") -> None:
    """Have a tar with *files*, a shell and a place for devices be the artifact."""
    with tarfile.open(scene.artifact, "w") as archive:
        archive.add("/bin/busybox", "./bin/busybox")
        place = tarfile.TarInfo("./dev")
        place.type, place.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(place)
    add(scene.artifact, files)
    scene.prepare(firmware)


@pytest.mark.parametrize("name", LACKING)
def test_what_a_tar_lacks_is_said(scene: Scene, name: str) -> None:
    files, firmware, reason = LACKING[name]
    make_tar(scene, {"etc/hostname": "x\n", **files}, firmware)
    done = scene.run()
    assert done.returncode == 1
    [error] = [line for line in done.stderr.splitlines() if line.startswith("image-factory: error: ")]
    assert reason in error
    [(check, problem)] = scene.results().items()
    assert (check, problem.rstrip(".") in error) == ("laid", True)


def test_a_tar_that_has_no_end(scene: Scene) -> None:
    make_tar(scene, KERNEL)
    os.truncate(scene.artifact, 50_000)
    scene.prepare("bios")
    done = scene.run()
    assert (done.returncode, "Unexpected EOF in archive" in done.stderr) == (1, True)
    assert "Unexpected EOF in archive" in scene.results()["laid"]


LOOKING = """\
#!/bin/busybox sh
busybox mkdir -p /tmp/in
busybox chroot /tmp/in /bin/busybox true 2>/dev/null && echo "it has a root of its own"
busybox mknod /tmp/disk b 8 0 2>/dev/null && echo "it makes devices"
echo "it sees" $(busybox ls /) "and" $(busybox ifconfig -a | busybox grep -c Link)
exit 3
"""


def test_what_a_tree_runs_reaches_nothing_else(scene: Scene) -> None:
    make_tar(scene, WHOLE | {"usr/sbin/grub-mkconfig": LOOKING})
    done = scene.run()
    [problem] = scene.results().values()
    assert done.returncode == 1
    assert "it sees bin boot dev etc tmp usr var and 1" in problem, done.stderr[-4000:]
    assert "it has" not in done.stderr and "it makes" not in done.stderr.replace(LOOKING, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_ended_leaves_nothing(scene: Scene, number: signal.Signals) -> None:
    """What a killed one has left is gone with the next build."""
    make_tar(scene, WHOLE | {"usr/sbin/grub-mkconfig": "#!/bin/busybox sh\nbusybox sleep 4242\n"})

    def sleeping() -> bool:
        return run("pgrep", "-u", scene.user.name, "-fx", "busybox sleep 4242", check=False).returncode == 0

    with subprocess.Popen(scene.argv(), cwd=scene.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as build:
        try:
            wait_for(sleeping, "the tree's program to run")
            os.kill(scene.user.build_process(), number)
            build.communicate(timeout=120)
        finally:
            build.kill()
    wait_for(lambda: not sleeping(), "the tree's program to end")
    if number == signal.SIGKILL:
        assert [path.name for path in scene.work.glob("laid-*")] == ["laid-tar-bios"]
        make_tar(scene, {})
        assert scene.run().returncode == 1
