"""What has the tree of a machine that was captured start on any other one."""

import re
from collections.abc import Sequence
from pathlib import Path

from ...base.errors import BuildError, CommandError
from ...base.log import logger
from ...disks import bounds, making
from ...disks.layouts import Layout
from ...inside.namespaces import MAKE_DEVICES, MAKE_PROC, Namespaces
from ...system import fstab

# ELF's numbers of machines, each with Debian's name of the architecture.
_MACHINES = {3: "i386", 21: "ppc64el", 22: "s390x", 40: "armhf", 62: "amd64", 183: "arm64", 243: "riscv64"}

# Prints what of the tree $1 tells that it is a system, and the first bytes of a program that each has.
_LOOK = """\
cd "$1"
[ -d etc ] || { echo "no /etc"; exit; }
for file in usr/bin/env bin/env usr/bin/sh bin/sh usr/bin/bash bin/bash usr/bin/busybox bin/busybox; do
    if [ -f "$file" ] && [ ! -L "$file" ]; then
        od -A n -t u1 -N 20 "$file"
        exit
    fi
done
echo "no program in /usr/bin or /bin"
"""

# What a running system has mounted there is in no capture of it.
_DIRECTORIES = """\
mkdir -p /dev /proc /sys /run /tmp /var/tmp
chmod 1777 /tmp /var/tmp
"""

# In the tree: what names disks of the old machine goes, and what its boot loader has made for them.
_FORGET = """\
[ ! -s /etc/crypttab ] || echo "/etc/crypttab is emptied: what it unlocks is no disk of a clone."
[ ! -e /etc/crypttab ] || : >/etc/crypttab
[ ! -e /etc/initramfs-tools/conf.d/resume ] || echo RESUME=none >/etc/initramfs-tools/conf.d/resume
old='resume|resume_offset|cryptdevice|rd\\.luks\\.[a-z]+'
for file in /etc/default/grub /etc/default/grub.d/*.cfg /etc/kernel/cmdline; do
    [ ! -f "$file" ] || sed -i -E 's/(^|["[:space:]])('"$old"')=[^"[:space:]]*/\\1/g' "$file"
done
rm -rf /boot/grub/i386-pc /boot/grub/x86_64-efi /boot/grub/arm64-efi /boot/grub/device.map /boot/grub/grubenv
[ "$1" != loader ] || rm -rf /boot/efi/EFI /boot/efi/loader
"""

# In the tree: an initramfs for each kernel, with the drivers of all machines and no more of this one than its fstab.
_INITRAMFS = """\
umask 022
made=
for kernel in /boot/vmlinuz-*; do
    version=${kernel#/boot/vmlinuz-}
    [ -e "$kernel" ] && [ -d "/lib/modules/$version" ] || continue
    if command -v mkinitramfs >/dev/null; then
        printf 'MODULES=most\\nRESUME=none\\n' >/etc/initramfs-tools/conf.d/zz-image-factory
        trap 'rm -f /etc/initramfs-tools/conf.d/zz-image-factory' EXIT
        mkinitramfs -o "/boot/initrd.img-$version" "$version"
    elif command -v dracut >/dev/null; then
        target=/boot/initramfs-$version.img
        [ ! -e "/boot/initrd.img-$version" ] || target=/boot/initrd.img-$version
        dracut --force --no-hostonly --kver "$version" "$target"
    else
        echo "image-factory: no initramfs: $version"
        continue
    fi
    made=yes
done
[ "$made" ] || echo "image-factory: no initramfs: none of /boot"
"""

# Runs the rest in the tree $1, which has devices and /proc meanwhile: the mount namespace ends with it.
_INSIDE = f"""\
{MAKE_PROC}{MAKE_DEVICES}tree=$1; shift
make_proc "$tree/proc"
make_devices "$tree/dev"
mount -t tmpfs -o nosuid,nodev,mode=1777 tmp "$tree/tmp"
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 TERM=dumb \\
    chroot "$tree" "$@"
"""
_NO_INITRAMFS = "image-factory: no initramfs: "

# Filesystems of a fstab that no disk has; those of a network and of other disks are not a clone's.
_KEPT_KINDS = ("tmpfs", "proc", "sysfs", "devpts", "debugfs", "tracefs", "hugetlbfs", "mqueue", "configfs", "overlay")


def look_argv(tree: Path) -> list[str]:
    """Return the command that finds out what is in *tree*."""
    return ["sh", "-c", _LOOK, "sh", str(tree)]


def architecture(inside: Namespaces, tree: Path, where: str) -> str:
    """Return Debian's name of the architecture of *tree*; BuildError if that, from *where*, is no system."""
    printed = inside.run(*look_argv(tree), capture=True, quiet=True)
    numbers = [int(word) for word in printed.split() if word.isdigit()]
    if numbers[:4] != [127, *b"ELF"] or len(numbers) < 20:
        said = printed.strip() if "no " in printed else "its programs are none of Linux"
        raise BuildError(
            f"{where} is no system that can be captured: {said}.",
            hint="A directory or a tar has the root of a system at its top: /etc, /usr and the rest.",
        )
    number = numbers[18] + (numbers[19] << 8) if numbers[5] == 1 else (numbers[18] << 8) + numbers[19]
    return _MACHINES.get(number, f"machine {number} of ELF")


def check_loader(inside: Namespaces, tree: Path, layout: Layout) -> None:
    """Raise BuildError unless *tree* has the programs of its filesystems and of its boot loader."""
    making.check_tools(inside, tree, layout)
    if not layout.firmware:
        return
    wanted = {"grub-common": ["usr/sbin/grub-mkconfig"]}
    if layout.core:
        wanted["grub-pc-bin"] = ["usr/lib/grub/i386-pc/boot.img", "usr/bin/grub-mkimage"]
    if layout.esp:
        kind = making.EFI_KIND[layout.arch]
        package = f"grub-efi-{'arm64' if layout.arch == 'aarch64' else 'amd64'}"
        wanted |= {
            f"{package}-bin": [f"usr/lib/grub/{kind}"],
            f"{package}-signed": [f"usr/lib/grub/{kind}-signed"],
            "shim-signed": ["usr/lib/shim"],
        }
    for package, paths in wanted.items():
        for path in paths:
            try:
                inside.run("test", "-e", str(tree / path), quiet=True)
            except CommandError as error:
                raise BuildError(
                    f"The captured system has no {package} (/{path}), which firmware = {layout.firmware} needs.",
                    hint="Install it there, choose the firmware that the machine starts with, or set "
                    "layout = filesystem, which has no boot loader.",
                ) from error


def commands(tree: Path, layout: Layout) -> list[making.Inside]:
    """Return what makes *tree* start on any machine, but for the boot loader; its fstab is the disk's then."""
    loader = "loader" if layout.firmware else "none"
    directories = [str(tree / name) for name in ("dev", "proc", "tmp")]
    return [
        # What is a link goes before it is looked where it leads.
        making.Inside(("chroot", str(tree), "rm", "-f", "/etc/fstab")),
        making.Inside(("chroot", str(tree), "sh", "-e", "-c", _DIRECTORIES)),
        making.Inside(("chroot", str(tree), "sh", "-e", "-c", _FORGET, "sh", loader)),
        *bounds.guarded(tree, making.fstab_commands(tree, layout)),
        making.Inside(bounds.check_argv(tree, directories)),
        making.Inside(("unshare", "--mount", "sh", "-e", "-c", _INSIDE, "sh", str(tree), "sh", "-e", "-c", _INITRAMFS)),
    ]


def make(inside: Namespaces, tree: Path, layout: Layout) -> None:
    """Carry out ``commands``; BuildError says in a line what has failed."""
    missing: list[str] = []

    def take(line: str) -> None:
        if line.startswith(_NO_INITRAMFS):
            missing.append(line.removeprefix(_NO_INITRAMFS))

    for each in commands(tree, layout):
        try:
            inside.run(*each.words, stdin=each.text.encode(), progress=take)
        except CommandError as error:
            raise BuildError(
                f"The captured system can't be made one for any machine: {error.said}.",
                hint="Mend it where it comes from; the log has all that its programs have said.",
            ) from error
    if missing and layout.firmware:
        logger.warning("No initramfs was made anew (%s): it may lack the drivers of other machines.", missing[0])


def kept_lines(inside: Namespaces, tree: Path, layout: Layout) -> list[str]:
    """Return the lines of the old fstab of *tree* that hold for any machine; others than of *layout*'s are told."""
    mounted = [(filesystem.point or "").strip("/") for _, filesystem in layout.mounted]
    text = inside.run("chroot", str(tree), "sh", "-c", "cat /etc/fstab 2>/dev/null || :", capture=True, quiet=True)
    kept = []
    for line in text.split("\n"):
        for entry in fstab.parse(line):
            if entry.kind in _KEPT_KINDS or entry.bound is not None:
                kept.append(line.strip())
            elif entry.point not in mounted:
                logger.info("fstab no longer has /%s, which was of %s.", entry.point, entry.spec)
    return kept


def keep_command(tree: Path, lines: Sequence[str]) -> making.Inside:
    """Return what adds *lines* to the fstab of *tree*."""
    text = "".join(f"{re.sub(r'[^ -~]', '?', line)}\n" for line in lines)
    return making.Inside(("chroot", str(tree), "sh", "-c", "cat >>/etc/fstab"), text)
