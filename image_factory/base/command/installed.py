"""Which programs this machine has, and which Debian package has each."""

import os
import shutil
from collections.abc import Iterable

from ..errors import ConfigurationError

# The Debian package that has each program; see require().
PACKAGES = {
    "ansible-playbook": "ansible-core",
    "arch-test": "arch-test",
    "bash": "bash",
    "blkid": "util-linux",
    "bsdtar": "libarchive-tools",
    "bwrap": "bubblewrap",
    "bzip2": "bzip2",
    "cmp": "diffutils",
    "cpio": "cpio",
    "curl": "curl",
    "dd": "coreutils",
    "debugfs": "e2fsprogs",
    "dumpe2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "fallocate": "util-linux",
    "find": "findutils",
    "fuse2fs": "fuse2fs",
    "gpg": "gpg",
    "gpg-agent": "gpg-agent",
    "gpgconf": "gpgconf",
    "gpgv": "gpgv",
    "guestfish": "guestfish",
    "gzip": "gzip",
    "hostname": "hostname",
    "lz4": "lz4",
    "mcopy": "mtools",
    "mdel": "mtools",
    "mdeltree": "mtools",
    "mdir": "mtools",
    "mformat": "mtools",
    "mke2fs": "e2fsprogs",
    "mmd": "mtools",
    "mmdebstrap": "mmdebstrap",
    "mount": "mount",
    "newuidmap": "uidmap",
    "nsenter": "util-linux",
    "partx": "util-linux",
    "pigz": "pigz",
    "prlimit": "util-linux",
    "qemu-img": "qemu-utils",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-x86_64": "qemu-system-x86",
    "rclone": "rclone",
    "rsync": "rsync",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "sh": "dash",
    "skopeo": "skopeo",
    "sqfs2tar": "squashfs-tools-ng",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sudo": "sudo",
    "swtpm": "swtpm",
    "tar": "tar",
    "tar2sqfs": "squashfs-tools-ng",
    "tune2fs": "e2fsprogs",
    "umount": "mount",
    "unshare": "util-linux",
    "virsh": "libvirt-clients",
    "virt-install": "virtinst",
    "xorriso": "xorriso",
    "xz": "xz-utils",
    "zerofree": "zerofree",
    "zstd": "zstd",
}


def search_path() -> str:
    """Return PATH with the system directories that an ordinary user's PATH lacks on Debian."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def require(programs: Iterable[str]) -> None:
    """Raise ConfigurationError, naming every one of *programs* that is missing and its package."""
    missing = [name for name in programs if not shutil.which(name, path=search_path())]
    if missing:
        packages = sorted({PACKAGES[name] for name in missing if name in PACKAGES})
        own = sorted({name for name in missing if name not in PACKAGES})
        hints = (
            [f"Your own have to be executable, and on PATH or named by their path: {', '.join(own)}."] if own else []
        )
        hints += [f"Install them: apt-get install {' '.join(packages)}"] if packages else []
        raise ConfigurationError(f"Missing programs: {', '.join(missing)}.", hint=" ".join(hints))
