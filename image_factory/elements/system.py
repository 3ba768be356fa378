"""The element of a system that is there already: it provides the system, and tells the others what that is."""

from collections.abc import Collection
from pathlib import Path

from .resolve import BLOCK_DEVICE, SYSTEM, Element

NAME = "image-factory-system"

# The element that has a program to install packages, by the kind of packages.
PACKAGERS = {"deb": "dpkg", "rpm": "yum", "suse": "zypper"}
# A program that a system with such packages has.
MARKS = {"deb": "usr/bin/dpkg", "suse": "usr/bin/zypper", "rpm": "usr/bin/rpm"}
# Of distributions, the first word of their names.
_DISTRIBUTIONS = {
    **dict.fromkeys(("debian", "ubuntu"), "deb"),
    **dict.fromkeys(("almalinux", "alma", "centos", "fedora", "oracle", "rhel", "rocky"), "rpm"),
    **dict.fromkeys(("leap", "opensuse", "sles", "suse"), "suse"),
}

# What the user gives stands.  On this machine the system is at TMP_MOUNT_PATH, which is nothing inside of it.
_ENVIRONMENT = r"""# What the system is, read from its own files.
_tell_system() {
    local root=$TMP_MOUNT_PATH file name value words word id=linux version='' codename='' mirror=''
    [ -d "$root/etc" ] || root=
    file=$root/etc/os-release
    # A link may lead to a file of this machine.
    [ ! -L "$file" ] || file=$root/usr/lib/os-release
    if [ -f "$file" ]; then
        while IFS='=' read -r name value || [ "$name" ]; do
            value=${value#[\"\']} value=${value%[\"\']}
            case $name in
            ID) id=$value ;;
            VERSION_ID) version=$value ;;
            VERSION_CODENAME) codename=$value ;;
            esac
        done <"$file"
    fi
    export EFI_BOOT_DIR=EFI/$id
    case $id in
    debian|ubuntu) version=${codename:-$version} ;;
    centos) version=${version%%.*}-stream ;;
    rhel) EFI_BOOT_DIR=EFI/redhat version=${version%%.*} ;;
    almalinux|rocky) version=${version%%.*} ;;
    opensuse*) id=opensuse EFI_BOOT_DIR=EFI/opensuse ;;
    esac
    export DISTRO_NAME=$id DIB_RELEASE=${DIB_RELEASE:-$version} DIB_PYTHON_VERSION=${DIB_PYTHON_VERSION:-3}
    if [ -e "$root/usr/lib/systemd/systemd" ] || [ -e "$root/lib/systemd/systemd" ]; then
        value=systemd
    elif [ -e "$root/sbin/openrc" ]; then
        value=openrc
    else
        value=sysv
    fi
    export DIB_INIT_SYSTEM=${DIB_INIT_SYSTEM:-$value}
    for file in "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/*.list \
        "$root"/etc/apt/sources.list.d/*.sources; do
        [ -f "$file" ] && [ ! "$mirror" ] || continue
        while read -r name words || [ "$name" ]; do
            case $name in deb|[Uu][Rr][Ii][Ss]:) ;; *) continue ;; esac
            for word in $words; do
                case $word in [a-z]*:/*) mirror=${mirror:-$word} ;; esac
            done
        done <"$file"
    done
    [ ! "$mirror" ] || export DIB_DISTRIBUTION_MIRROR=${DIB_DISTRIBUTION_MIRROR:-$mirror}
}
_tell_system
unset -f _tell_system
"""


def packages_of(distribution: str) -> str | None:
    """Return the kind of packages that *distribution*, as people write it, has; None if it is not known."""
    return _DISTRIBUTIONS.get(distribution.lower().partition(" ")[0])


def element(packages: str | None, known: Collection[str]) -> Element:
    """Return the element of a system that has *packages* of a kind, None where that is not known.

    It needs the one that installs such packages, where that is among those *known*.
    """
    needs = tuple(name for name in [PACKAGERS.get(packages or "", "")] if name in known)
    texts = {"environment.d/00-image-factory-system.bash": _ENVIRONMENT}
    return Element(NAME, Path(NAME), (SYSTEM, BLOCK_DEVICE), needs, texts)
