"""A disk with Debian on it that boots with BIOS and with UEFI, as an installer would leave it, in half a minute.

It is made by root, with this machine's release and package sources, and kept in the cache.  Nothing is
mounted: GRUB's core image is put where its boot sector looks for it, the filesystems are made from trees.
"""

import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

# Part of the cached disk's name: another recipe makes another disk.
RECIPE = 5
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "image-factory-golden"
PACKAGES = (
    "linux-image-cloud-amd64 systemd-sysv udev dbus openssh-server cloud-init cloud-guest-utils fdisk e2fsprogs "
    "ifupdown isc-dhcp-client iproute2 sudo kmod"
)
UNUSED = "etc/apt/sources.list.d/* var/lib/apt/lists/* usr/share/man"

MIB = 1 << 20
SECTOR = 512
DISK_SIZE = 1536 * MIB
# By number: offset and size.  The first is for GRUB's core image, the second for UEFI; the root is at the end.
PARTITIONS = {1: (MIB, MIB), 2: (2 * MIB, 34 * MIB), 3: (36 * MIB, DISK_SIZE - 37 * MIB)}
ROOT_OFFSET = PARTITIONS[3][0]
MACHINE_ID = "3c1f6e2d9a7b4c5e8f00112233445566"
ROOT_UUID = "1de5f1c4-6e15-4c1d-9b83-a6f8e7a4b2c1"
# Without the check of the timer, which fails where an emulated machine's comes late.
GRUB = f"""\
search --no-floppy --fs-uuid --set=root {ROOT_UUID}
linux /vmlinuz root=UUID={ROOT_UUID} ro quiet no_timer_check console=ttyS0
initrd /initrd.img
boot
"""


def run(*argv: str | Path, text: str = "") -> str:
    """Run a program with *text* as its input; return what it prints."""
    done = subprocess.run(list(map(str, argv)), input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{argv} failed with {done.returncode}: {done.stderr}")
    return done.stdout


def disk() -> Path:
    """Return the disk, which is made if it is not in the cache; it is not to be changed."""
    release = Path("/etc/os-release").read_text(encoding="utf-8")
    match = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', release, re.MULTILINE)
    assert match is not None
    made = CACHE / f"debian-{match[1]}-{RECIPE}.raw"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            _make(Path(name), match[1])
            (Path(name) / "disk.raw").rename(made)
    return made


def _make(directory: Path, suite: str) -> None:
    target = directory / "disk.raw"
    tree = directory / "tree"
    _bootstrap(tree, suite)
    with target.open("wb") as file:
        file.truncate(DISK_SIZE)
    kinds = ("21686148-6449-6E6F-744E-656564454649", "uefi", "linux")
    lines = [
        f"start={offset // SECTOR}, size={size // SECTOR}, type={kind}"
        for (offset, size), kind in zip(PARTITIONS.values(), kinds, strict=True)
    ]
    run("sfdisk", "--quiet", target, text="\n".join(["label: gpt", *lines, ""]))
    size = PARTITIONS[3][1] >> 10
    run("mke2fs", "-q", "-t", "ext4", "-U", ROOT_UUID, "-d", tree, "-E", f"offset={ROOT_OFFSET}", target, f"{size}k")
    (directory / "grub.cfg").write_text(GRUB, encoding="utf-8")
    _install_for_bios(directory, target)
    _install_for_uefi(directory, target)


def _bootstrap(tree: Path, suite: str) -> None:
    places = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    sources = [path for path in places if path.is_file() and suite in path.read_text(encoding="utf-8").split()]
    packages = ",".join(PACKAGES.split())
    run("mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", suite, tree, *sources)
    for path in [path for pattern in UNUSED.split() for path in tree.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # What an installed system has, and no image may have; mmdebstrap leaves keys of sshd.
    (tree / "etc/machine-id").write_text(f"{MACHINE_ID}\n", encoding="ascii")
    (tree / "var/lib/systemd/random-seed").write_bytes(bytes(512))
    (tree / "var/log/dpkg.log").write_text("startup archives unpack\n", encoding="ascii")
    (tree / "root/.bash_history").write_text("passwd\n", encoding="ascii")
    (tree / "etc/fstab").write_text(f"UUID={ROOT_UUID} / ext4 defaults 0 1\n", encoding="ascii")
    # No locale has to be made, and one kind of host key is enough: emulation is slow.
    (tree / "etc/cloud/cloud.cfg.d/90-golden.cfg").write_text("locale: C.UTF-8\nssh_genkeytypes: [ed25519]\n")
    (tree / "etc/network/interfaces").write_text("source /etc/network/interfaces.d/*\n", encoding="ascii")


def _core_image(directory: Path, kind: str, name: str, modules: str) -> Path:
    path = directory / name
    words = modules.split()
    run("grub-mkimage", "-O", kind, "-c", directory / "grub.cfg", "-p", "/boot/grub", "-o", path, *words)
    return path


def _install_for_bios(directory: Path, target: Path) -> None:
    """Do what grub-bios-setup does: tell the boot sector where the core image is, and that where its rest is."""
    modules = "biosdisk part_gpt ext2 linux normal search search_fs_uuid"
    core = bytearray(_core_image(directory, "i386-pc", "core.img", modules).read_bytes())
    boot = Path("/usr/lib/grub/i386-pc/boot.img").read_bytes()
    start = PARTITIONS[1][0] // SECTOR
    # The block list at the end of the first sector: where the others are.
    struct.pack_into("<Q", core, 0x1F4, start + 1)
    with target.open("r+b") as file:
        file.write(boot[:440])
        file.seek(0x5C)
        file.write(struct.pack("<Q", start))
        file.seek(0x66)
        # As on a hard disk: the drive that the firmware names is right.
        file.write(b"\x90\x90")
        file.seek(PARTITIONS[1][0])
        file.write(core)


def _install_for_uefi(directory: Path, target: Path) -> None:
    """Put GRUB where each firmware looks for it."""
    modules = "part_gpt ext2 fat linux normal search search_fs_uuid"
    core = _core_image(directory, "x86_64-efi", "BOOTX64.EFI", modules)
    system = f"{target}@@{PARTITIONS[2][0]}"
    run("mformat", "-i", system, "-F", "-T", str(PARTITIONS[2][1] // SECTOR), "-h", "16", "-s", "63", "::")
    run("mmd", "-i", system, "::/EFI", "::/EFI/BOOT")
    run("mcopy", "-i", system, core, "::/EFI/BOOT/BOOTX64.EFI")
