"""What targets need, looked for in systems as they are mounted: by root, and by a user who may run nothing as root."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ..bootstrap_scene import WORK, Place, new_place
from ..conftest import User, run
from ..cpio import archive
from ..small_archive import Archive
from ..unit.test_fitting import CARDS, DRIVERS, PROGRAMS

KERNEL = "6.12-small"


def add_kernel(place: Place, drivers: str) -> None:
    """Have the archive of *place* have a kernel, whose initramfs has *drivers*, and what else targets need."""
    tree = place.directory / "kernel"
    files = {f"usr/sbin/{name}": b"" for name in PROGRAMS.split()}
    files |= {f"usr/lib/grub/{name}/modinfo.sh": b"" for name in ("i386-pc", "x86_64-efi")}
    lines = "".join(f"kernel/{name}.ko.xz:\n" for name in f"{DRIVERS} {CARDS}".split())
    files[f"usr/lib/modules/{KERNEL}/modules.dep"] = lines.encode()
    files["etc/kernel/cmdline"] = b"console=tty0 console=ttyS0\n"
    early = archive({f"usr/lib/modules/{KERNEL}/kernel/{name}.ko": bytes(9999) for name in drivers.split()})
    packed = subprocess.run(["zstd", "-qc"], input=early, stdout=subprocess.PIPE, check=True).stdout
    files[f"boot/initrd.img-{KERNEL}"] = archive({"kernel/x86/microcode/a.bin": bytes(3_000_000)}) + packed
    for name, data in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    place.archive.add("linux-small", tree=tree)
    shutil.rmtree(tree)
    place.archive.publish()
    # As dracut has it.
    script = f"chmod 600 /boot/initrd.img-{KERNEL}; : cloud-init cloud-guest-utils console=ttyS0"
    place.recipe(packages="linux-small", script=script)


@pytest.mark.parametrize("name", ["root", "c"])
def test_what_is_missing_is_told_by_each_way(users: dict[str, User], small_archive: Archive, name: str) -> None:
    place = new_place(users[name], small_archive)
    place.configure(target="azure, openstack, drp", format="vhd, qcow2, tgz")
    add_kernel(place, DRIVERS.replace("hv_storvsc ", "").replace("nvme ", ""))
    done = place.run("--until", "clean", "small", check=False)
    assert done.returncode == 1
    error = (
        f"image-factory: error: [small] target azure: the initramfs of {KERNEL} has no hv_storvsc; "
        f"drp: the initramfs of {KERNEL} has no nvme."
    )
    assert error in done.stderr.splitlines()
    assert "Add to /etc/initramfs-tools/modules, and run update-initramfs: hv_storvsc." in done.stderr
    assert not [*(place.out / WORK).glob("initramfs*")]

    place.archive.remove("linux-small")
    add_kernel(place, DRIVERS)
    place.run("--until", "clean", "small")
    disk = place.out / WORK / "disk.raw"
    listed = run("debugfs", "-R", "stat /curtin", f"{disk}?offset={root_offset(disk)}").stdout
    assert "Type: directory    Mode:  0755" in listed
    assert "User:     0   Group:     0" in listed
    place.run("--cleanup", "--output-dir", str(place.out))
    assert place.left() == []


def root_offset(disk: Path) -> int:
    """Return where the last partition of *disk*, the root filesystem, begins."""
    last = run("sfdisk", "--dump", disk).stdout.splitlines()[-1]
    return int(last.partition("start=")[2].partition(",")[0]) * 512


def test_what_the_recipe_lacks_is_known_before_the_build(users: dict[str, User], small_archive: Archive) -> None:
    place = new_place(users["c"], small_archive)
    place.configure(target="azure", format="vhd")
    done = place.run("--check", "small", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "image-factory: error: [small] target azure: the recipe has no cloud-init or waagent, "
        "the recipe has no kernel argument console=ttyS0.",
        "image-factory: hint: Add to packages: cloud-init or waagent or WALinuxAgent or python-azure-agent. "
        "Add to the kernel arguments of the system: console=ttyS0.",
    ]
    assert place.left() == []
