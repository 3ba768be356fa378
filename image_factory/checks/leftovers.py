"""What must not be cloned with an image: a table of checks that look at the files of an installed system.

The guest has written the files, so they can be anything: what is read of them has limits, and what can't
be read where a secret belongs counts as one.
"""

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..system.privileged import takes_directory
from ..system.registrations import (
    CONTAINER_AUTHS,
    KEYS,
    REGISTRATIONS,
    UNITS,
    WIREGUARD,
    has_wireguard_key,
    without_auths,
)

# Of a directory, of the users and their homes, and of the logs, which are read one by one.
_NAMES = 4096
_HOMES = 256
_LOGS = 256

_ASKED_AGAIN = ("etc/passwd", "etc/ssh/sshd_config")

# So many files of at most 1 MiB image-factory-sudo-helper reads at once, however large they are.
_AT_ONCE = 15

# Of what a check has found, and of a guest's name in a message.
MOST = 100
_LONGEST_QUOTE = 120


class Entry(Protocol):
    """A name in a guest's filesystem, as ``model.Filesystem`` tells it."""

    @property
    def path(self) -> str:
        """The path below the root; an odd character may have become another."""

    @property
    def kind(self) -> str:
        """``file``, ``directory``, ``link`` or ``other``."""


class Files(Protocol):
    """The files of an installed system, as ``tree.Tree`` has them: what is behind a link is not there.

    Patterns are paths below the root, whose last part may have ``*``.
    """

    def entries(self, patterns: Sequence[str]) -> Sequence[Entry]:
        """Return what *patterns* match."""

    def read(self, patterns: Sequence[str]) -> Mapping[str, bytes]:
        """Return the regular files that *patterns* match, by their paths; none that are too long."""


@dataclass(frozen=True)
class Asked:
    """What the user asked for: *hashes* of passwords, and public *keys* (the part in base64).

    *answer_name* is the name by which the installer knows the answer file, None if there is none.  *own* are the
    files and directories with image-factory's name that belong into the image.
    """

    hashes: frozenset[bytes] = field(default=frozenset(), repr=False)
    keys: frozenset[bytes] = field(default=frozenset(), repr=False)
    answer_name: str | None = None
    own: frozenset[str] = frozenset()


class Look:
    """*Files* that are asked for each directory once, for those of *known* at once, and only for files that are there.

    Each question may cost the call of a privileged program.
    """

    def __init__(self, files: Files, known: Iterable[str] = ()) -> None:
        self._files = files
        self._kinds: dict[str, dict[str, str]] = {}
        # Of the last files that were read, and of those that several checks ask for.
        self._data: dict[str, bytes | None] = {}
        self._ask([directory for directory in dict.fromkeys(known) if is_askable(directory)])

    def _ask(self, directories: list[str]) -> None:
        if not directories:
            return
        for directory in directories:
            self._kinds[directory] = {}
        for entry in self._files.entries([joined(directory, "*") for directory in directories]):
            directory, _, name = entry.path.rpartition("/")
            if name not in ("", ".", "..") and len(self._kinds.get(directory, ())) < _NAMES:
                self._kinds.setdefault(directory, {})[name] = entry.kind

    def _kinds_in(self, directory: str) -> dict[str, str]:
        if directory not in self._kinds:
            # No way to tell it to who is asked.
            self._kinds[directory] = {}
            self._ask([directory] if is_askable(directory) else [])
        return self._kinds[directory]

    def kind(self, path: str) -> str | None:
        """Return what *path* is, None if it is not there."""
        directory, kind = "", "directory"
        for part in path.split("/") if path else []:
            found = self._kinds_in(directory).get(part) if kind == "directory" else None
            if found is None:
                return None
            directory, kind = joined(directory, part), found
        return kind

    def has_any(self, paths: Sequence[str]) -> bool:
        """Return whether one of *paths* is there; their directories may have more names than are looked at."""
        return bool(self._files.entries(paths))

    def names(self, directory: str) -> list[str]:
        """Return the names in *directory*, sorted; none if it is no directory."""
        return sorted(self._kinds_in(directory)) if self.kind(directory) == "directory" else []

    def read(self, path: str) -> bytes | None:
        """Return the contents of the regular file *path*, None if there is none or it is too long."""
        if path not in self._data:
            self._fetch([path])
        return self._data[path]

    def together(self, paths: Iterable[str]) -> Iterator[str]:
        """Give *paths*, several of which are read at once."""
        left = iter(paths)
        while group := list(itertools.islice(left, _AT_ONCE)):
            self._fetch(group)
            yield from group

    def _fetch(self, paths: Sequence[str]) -> None:
        patterns = {}
        for path in paths:
            directory, _, name = path.rpartition("/")
            if self.kind(path) == "file" and is_askable(directory):
                # What is in a name and can't be told is left open.
                patterns[path] = joined(directory, re.sub(r"^-|[^A-Za-z0-9._@-]", "*", name))
        found = self._files.read(list(dict.fromkeys(patterns.values()))) if patterns else {}
        kept = {path: data for path, data in self._data.items() if path in _ASKED_AGAIN}
        self._data = kept | {path: found.get(path) for path in paths}

    def lines(self, path: str) -> list[bytes]:
        """Return the lines of *path* that are no comments, none if it is no regular file."""
        lines = (line.strip() for line in (self.read(path) or b"").splitlines())
        return [line for line in lines if line and not line.startswith(b"#")]

    def matching(self, pattern: str) -> list[str]:
        """Return the paths that *pattern* matches; only its last part may have ``*``."""
        parent, _, name_pattern = pattern.rpartition("/")
        return [joined(parent, name) for name in self.names(parent) if fnmatch.fnmatchcase(name, name_pattern)]

    def is_too_long(self, path: str) -> bool:
        """Return whether *path* is a regular file that can't be read."""
        return self.kind(path) == "file" and self.read(path) is None

    def is_link(self, path: str) -> bool:
        """Return whether *path* is there, and neither a regular file nor a directory."""
        return self.kind(path) not in (None, "file", "directory")

    def has_content(self, path: str) -> bool:
        """Return whether *path* is a regular file with more than zeros, or a directory with something in it."""
        if self.kind(path) == "directory":
            return bool(self.names(path))
        return self.is_too_long(path) or bool((self.read(path) or b"").strip(b"\0"))

    def files_at(self, path: str, depth: int = 4) -> Iterator[str]:
        """Give the regular files at and below *path*."""
        if self.kind(path) == "directory":
            for name in self.names(path) if depth else []:
                yield from self.files_at(joined(path, name), depth - 1)
        elif self.kind(path) == "file":
            yield path


def is_askable(directory: str) -> bool:
    """Return whether what is in *directory* can be asked for."""
    return not directory or takes_directory(directory)


def joined(directory: str, name: str) -> str:
    """Return the path of *name* in *directory*."""
    return f"{directory}/{name}" if directory else name


def quoted(path: str | bytes) -> str:
    """Return *path* for a message: short, and without what a terminal would obey."""
    text = path.decode("utf-8", "replace") if isinstance(path, bytes) else path
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


# What a check finds, as phrases that name the place.
Found = Iterable[str]
Find = Callable[[Look, Asked], Found]


def _users(look: Look) -> list[tuple[str, str]]:
    """Return the users that *look* has, with their home directories, and more homes that there may be."""
    found = {("root", "root"): None, ("root", "var/roothome"): None, ("*", "etc/skel"): None}
    for line in look.lines("etc/passwd"):
        fields = line.split(b":")
        if len(fields) > 5:
            user, home = (fields[number].decode("utf-8", "surrogateescape") for number in (0, 5))
            found[user, "/".join(part for part in home.split("/") if part)] = None
    # Those of users that passwd doesn't know; and a link to them is not followed.
    for parent in ("home", "var/home"):
        found |= {(name, f"{parent}/{name}"): None for name in look.names(parent)}
    return list(found)


def _homes(look: Look) -> list[str]:
    return list(dict.fromkeys(home for _, home in _users(look)))[:_HOMES]


def _sshd_values(look: Look, keyword: str) -> Iterator[str]:
    """Give what the configuration of sshd says for *keyword*."""
    patterns = [f"{top}/{name}" for top in _SSHD for name in ("sshd_config", "sshd_config.d/*.conf")]
    for path in (path for pattern in patterns for path in look.matching(pattern)):
        for line in look.lines(path):
            match = re.fullmatch(r"(\w+)[\s=]+(.*)", line.decode("utf-8", "surrogateescape"))
            if match and match[1].lower() == keyword:
                yield from (word.strip('"') for word in match[2].split())


_SSHD = ("etc/ssh", "usr/etc/ssh", "usr/local/etc/ssh", "etc/openssh", "opt/openssh/etc")

# Where ssh servers keep their host keys: OpenSSH, Dropbear (in the initramfs too), TinySSH.
_HOST_KEY_PLACES = (
    *_SSHD,
    "etc",
    "usr/local/etc",
    "var/lib/ssh",
    "etc/dropbear",
    "etc/dropbear-initramfs",
    "etc/dropbear/initramfs",
    "var/lib/dropbear",
    "etc/tinyssh/sshkeydir",
    "var/lib/tinyssh/sshkeydir",
)
_HOST_KEY = re.compile(r"ssh_host_(?:\w+_)?key.*|.*_host_key(?:\.pub|-cert\.pub)?|\.?ed25519\.[sp]k")
_PRIVATE_KEY = re.compile(rb"\s*-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----")


def host_keys(look: Look, asked: Asked) -> Found:
    """Find keys of ssh servers, public ones too."""
    named = [path.strip("/") for key in ("hostkey", "hostcertificate") for path in _sshd_values(look, key)]
    places = [joined(directory, name) for directory in _HOST_KEY_PLACES for name in look.names(directory)]
    for path in dict.fromkeys([*places, *(path for path in named if look.kind(path) == "file")]):
        directory, _, name = path.rpartition("/")
        is_key = bool(_HOST_KEY.fullmatch(name)) or path in named
        if is_key or (directory in _SSHD and _PRIVATE_KEY.match(look.read(path) or b"")):
            yield f"/{quoted(path)} is an ssh host key"


# Its private keys, also as before version 2.1.
_GNUPG_KEYS = ("private-keys-v1.d/*.key", "secring.gpg")
# Of Arch's package manager, which makes a key of each machine's.
_PACMAN_KEYS = "etc/pacman.d/gnupg"


def gnupg_keys(look: Look, asked: Asked) -> Found:
    """Find private keys of GnuPG."""
    homes = [*(joined(home, ".gnupg") for home in _homes(look)), _PACMAN_KEYS]
    for path in (path for home in homes for name in _GNUPG_KEYS for path in look.matching(joined(home, name))):
        if look.has_content(path):
            yield f"/{quoted(path)} has a private key of GnuPG"


_ID = re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{32}(?![0-9A-Za-z])")

# Directories where names have the machine-id: boot-loader entries, kernels, the journal.
_NAMED_BY_ID = (
    "boot",
    "boot/efi",
    "efi",
    *(f"{root}/{name}" for root in ("boot", "boot/efi", "efi") for name in ("loader/entries", "EFI/Linux")),
    "var/log/journal",
)

# Files that tell boot loaders and kernels of it.
_WITH_ID = (
    "etc/kernel/entry-token",
    "etc/kernel/cmdline",
    "etc/machine-info",
    "boot/grub/grubenv",
    "boot/grub2/grubenv",
    *(f"{root}/loader/loader.conf" for root in ("boot", "boot/efi", "efi")),
)


def machine_ids(look: Look, asked: Asked) -> Found:
    """Find the identity of an installed machine."""
    for path in ("etc/machine-id", "var/lib/dbus/machine-id"):
        if look.is_too_long(path) or (look.read(path) or b"").strip() not in (b"", b"uninitialized"):
            yield f"/{path} has a machine-id"
    for path in look.together(path for path in _WITH_ID if look.kind(path) == "file"):
        if _ID.search((look.read(path) or b"").decode("ascii", "replace")):
            yield f"/{path} has a machine-id"
    for directory in _NAMED_BY_ID:
        for name in look.names(directory):
            if _ID.search(name):
                yield f"/{quoted(joined(directory, name))} is named by a machine-id"


_LINK = "no regular file"
_LONG = "too long to be read"

# Files with passwords, copies of them that tools leave, and which of their fields has it.
_PASSWORD_FILE = re.compile(r"(g?shadow|passwd|group)(?:[-.+~_].*)?")
_PASSWORD_PLACES = ("etc", "usr/etc", "var/backups", "var/lib/extrausers")


def passwords(look: Look, asked: Asked) -> Found:
    """Find passwords that nobody asked for, accounts that need none, and hashes that everybody can read."""
    paths = [joined(directory, name) for directory in _PASSWORD_PLACES for name in look.names(directory)]
    kinds = {path: match[1] for path in paths if (match := _PASSWORD_FILE.fullmatch(path.rpartition("/")[2]))}
    for path in look.together(path for path in kinds if look.kind(path) != "directory"):
        yield from _passwords_in(look, path, kinds[path], asked)
    if look.lines("etc/security/opasswd"):
        yield "/etc/security/opasswd has old passwords"


def _passwords_in(look: Look, path: str, kind: str, asked: Asked) -> Found:
    if look.is_link(path) or look.is_too_long(path):
        yield f"/{quoted(path)} is {_LONG if look.is_too_long(path) else _LINK}, so that it may have any password"
        return
    for line in look.lines(path):
        fields = line.split(b":")
        # The lines of NIS have none of their own.
        if len(fields) < 2 or line[:1] in b"+-":
            continue
        user, password = quoted(fields[0]), fields[1].strip()
        if not password:
            # A group without one has no password that anybody could give.
            if kind in ("shadow", "passwd"):
                yield f"/{quoted(path)} lets {user} in without a password"
        elif kind in ("passwd", "group"):
            if not re.fullmatch(rb"x|[*!].{0,12}", password):
                yield f"/{quoted(path)}, which everybody can read, has a password of {user}"
        elif not password.startswith((b"*", b"!")) and password not in asked.hashes:
            yield f"/{quoted(path)} has a password of {user} that nobody asked for"


_KEY_BLOB = re.compile(rb"(?:^|[\s,\"])(AAAA[0-9A-Za-z+/]{16,}={0,3})(?=\s|$)")

# Beside those in homes, and those that sshd's configuration names.
_KEY_PLACES = (
    "etc/ssh/authorized_keys",
    "etc/ssh/authorized_keys2",
    "etc/ssh/authorized_keys/*",
    "etc/ssh/authorized_keys.d/*",
    "etc/ssh/keys/*",
    "usr/etc/ssh/authorized_keys",
    "etc/dropbear/authorized_keys",
    "etc/dropbear/initramfs/authorized_keys",
    "etc/dropbear-initramfs/authorized_keys",
    "etc/initramfs-tools/root/.ssh/authorized_keys",
    "authorized_keys*",
)


def blobs(data: bytes) -> list[bytes]:
    """Return the public keys in lines of authorized_keys, each the part in base64."""
    return [match[1] for line in data.splitlines() for match in _KEY_BLOB.finditer(line)]


def authorized_keys(look: Look, asked: Asked) -> Found:
    """Find keys that open an account, and that nobody asked for."""
    if len(_users(look)) > _HOMES:
        yield f"/etc/passwd and /home have more than {_HOMES} homes, so that any of them may have keys"
    for home in _homes(look):
        # It is empty for who can't ask.
        if look.kind(home) == "directory" and not is_askable(home):
            yield f"/{quoted(home)} has a name by which it can't be looked into, so that it may have any key"
    for path in dict.fromkeys(_key_files(look)):
        if look.is_link(path) or look.is_too_long(path):
            yield f"/{quoted(path)} is {_LINK if look.is_link(path) else _LONG}, so that it may have any key"
            continue
        unknown = [line for line in look.lines(path) if not _is_asked_for(line, asked)]
        if unknown:
            yield f"/{quoted(path)} has {len(unknown)} key{'s' * (len(unknown) > 1)} that nobody asked for"


def _is_asked_for(line: bytes, asked: Asked) -> bool:
    found = set(blobs(line))
    return bool(found) and found <= asked.keys


def _key_files(look: Look) -> Iterator[str]:
    named = list(_sshd_values(look, "authorizedkeysfile"))[:16]
    for user, home in _users(look)[:_HOMES]:
        yield from look.matching(joined(home, ".ssh/authorized_keys*"))
        for path in named:
            # sshd_config(5): relative to the home, unless they begin with a slash.
            text = path.replace("%u", user).replace("%h", f"/{home}").replace("%%", "%")
            own = text.strip("/") if text.startswith("/") else joined(home, text)
            yield from [own] if look.kind(own) else []
    for pattern in _KEY_PLACES:
        yield from look.matching(pattern)


# Where installers leave the answer file, or what they made of it.
_ANSWER_PLACES = (
    "root/anaconda-ks.cfg",
    "root/original-ks.cfg",
    "root/initial-setup-ks.cfg",
    "root/autoinst.*",
    "etc/install.inf",
    "var/lib/autoinstall",
    "root/preseed*.cfg",
    "root/autoinstall.*",
    "preseed*.cfg",
    "ks*.cfg",
    "autoinst*.xml",
    "autoinst*.json",
    "autoinst*.jsonnet",
    "autoinstall.yaml",
    "user-data",
    "run/install/ks.cfg",
    "var/log/installer/autoinstall-user-data",
    "var/log/installer/subiquity-curtin-install.conf",
    "var/log/installer/cdebconf",
    "var/lib/YaST2",
    "var/adm/autoinstall",
    "var/lib/agama",
    "var/lib/cloud/seed/nocloud",
    "var/lib/cloud/seed/nocloud-net",
    "etc/cloud/cloud.cfg.d/99-installer.cfg",
)
_ANSWER_DIRECTORIES = ("", "root", "tmp", "var/tmp", "var/log", "boot", "etc", "media", "mnt", "opt", "srv")


def answer_files(look: Look, asked: Asked) -> Found:
    """Find answer files where installers leave them, and this build's wherever one may have been put."""
    patterns = list(_ANSWER_PLACES)
    if asked.answer_name:
        patterns += [joined(directory, asked.answer_name) for directory in (*_ANSWER_DIRECTORIES, *_homes(look))]
    for pattern in dict.fromkeys(patterns):
        for path in look.matching(pattern):
            if look.has_content(path):
                yield f"/{quoted(path)} is an answer file, or is made from one"


# Beside all files in /var/log.
_LOG_PLACES = (
    "root/install.log*",
    "root/*.log",
    "tmp/*.log",
    "var/tmp/*.log",
    "var/lib/YaST2/install.inf",
    "var/adm/autoinstall/logs",
)


def logs(look: Look, asked: Asked) -> Found:
    """Find what the installer and the installed system have logged while the image was built."""
    paths = [path for pattern in ("var/log", *_LOG_PLACES) for path in look.matching(pattern)]
    files = list(dict.fromkeys(file for path in paths for file in look.files_at(path)))
    for file in look.together(files[:_LOGS]):
        if look.has_content(file):
            yield f"/{quoted(file)} is a log of the build"
    if len(files) > _LOGS:
        yield f"/var/log has more than {_LOGS} files"


# What else tells machines apart, or has to be a secret of each one.
_IDENTITIES = (
    "var/lib/systemd/random-seed",
    "var/lib/systemd/credential.secret",
    "var/lib/urandom/random-seed",
    "boot/loader/random-seed",
    "boot/efi/loader/random-seed",
    "efi/loader/random-seed",
    "var/lib/NetworkManager/secret_key",
    "var/lib/NetworkManager/seen-bssids",
    "var/lib/NetworkManager/*.lease",
    "var/lib/dhcp/*.lease*",
    "var/lib/dhclient/*.lease*",
    "var/lib/dhcpcd/*.lease*",
    "var/lib/dhcpcd/duid",
    "etc/dhcpcd.duid",
    "var/lib/wicked/lease-*",
    "var/lib/cloud/instances",
    "var/lib/cloud/data",
    "var/lib/zypp/AnonymousUniqueId",
    "etc/nvme/hostid",
    "etc/nvme/hostnqn",
    "etc/lvm/devices/system.devices",
    "etc/udev/rules.d/70-persistent-*",
)

# What packages made at their installation.
_SERVICE_KEYS = tuple(path for key in KEYS for path in key.removed)


def identities(look: Look, asked: Asked) -> Found:
    """Find what else must be different on each machine: seeds, secrets, leases, cloud-init's instances."""
    for path in (path for pattern in _IDENTITIES for path in look.matching(pattern)):
        if look.has_content(path):
            yield f"/{quoted(path)} belongs to one machine"
    for key in KEYS:
        paths = [path for pattern in key.removed for path in look.matching(pattern) if look.has_content(path)]
        # Sealing leaves them then.
        lost = "" if not paths or look.has_any(key.makers) else ", and nothing here makes another"
        yield from (f"/{quoted(path)} belongs to one machine{lost}" for path in paths)
    # As Debian's package ships it, the file asks for a name at the first start.
    if any(line.startswith(b"InitiatorName=") for line in look.lines("etc/iscsi/initiatorname.iscsi")):
        yield "/etc/iscsi/initiatorname.iscsi has the name of one machine"


def registered(look: Look, asked: Asked) -> Found:
    """Find what makes the system known to a service, and passwords for registries of containers."""
    for found in REGISTRATIONS:
        for path in (path for pattern in found.secret for path in look.matching(pattern)):
            if look.has_content(path):
                yield f"/{quoted(path)} makes this machine known to {found.service}"
    for path in look.together(joined(home, name) for home in _homes(look) for name in CONTAINER_AUTHS):
        if without_auths(look.read(path) or b"") is not None:
            yield f"/{quoted(path)} has passwords for registries of containers"
    for path in look.together(look.matching(WIREGUARD)):
        if look.is_too_long(path) or has_wireguard_key(look.read(path) or b""):
            yield f"/{quoted(path)} has a private key of WireGuard"


# Files of image-factory's that belong into images.
WANTED = (
    "etc/systemd/system/image-factory-boot-entries.service",
    "etc/systemd/system/image-factory-ssh-host-keys.service",
    *(f"etc/systemd/system/{name}" for name in UNITS),
)

# Not /etc: an image may have image-factory installed.
_OWN_DIRECTORIES = (
    "",
    "tmp",
    "var/tmp",
    "root",
    "run",
    "opt",
    "srv",
    "mnt",
    "media",
    "etc/cloud/cloud.cfg.d",
    "etc/cron.d",
    "etc/sudoers.d",
    "etc/systemd/system",
    "usr/local/bin",
    "usr/local/sbin",
    "usr/local/lib",
    "var/lib",
    "var/log",
    "boot",
)
_OWN_NAME = re.compile(r"\.?image[-_]factory.*", re.IGNORECASE)


def own_files(look: Look, asked: Asked) -> Found:
    """Find what image-factory, its tests of the image or a user's script under its name has left."""
    for directory in (*_OWN_DIRECTORIES, *(home for home in _homes(look) if home not in _OWN_DIRECTORIES)):
        for name in look.names(directory):
            if _OWN_NAME.fullmatch(name) and joined(directory, name) not in WANTED:
                yield from _own_leftovers(look, joined(directory, name), asked)


def _own_leftovers(look: Look, path: str, asked: Asked) -> Found:
    """Find what is at *path*, or in that directory, and was not *asked* for."""
    if path not in asked.own:
        yield f"/{quoted(path)} is a leftover of image-factory"
    else:
        for name in look.names(path):
            yield from _own_leftovers(look, joined(path, name), asked)


# Where administrators put what no package has, and units and jobs of their own.
UNJUDGED = ("opt", "srv", "usr/local/bin", "usr/local/sbin", "usr/local/etc", "usr/local/lib", "var/www", "home",
            "etc/cron.d", "etc/systemd/system", "etc/sudoers.d", "etc/nftables.d", "etc/iptables")  # fmt: skip
# Those of packages, and directories that each system has there.
_USUAL = re.compile(r"\.placeholder|README|python3.*|e2scrub_all|lost\+found|.*\.(?:wants|requires|d)|image-factory-.*")


def unjudged(look: Look) -> Iterator[str]:
    """Give what in a system that was lived in may be anything."""
    for directory in UNJUDGED:
        for name in look.names(directory):
            path = joined(directory, name)
            is_links = directory == "etc/systemd/system" and look.kind(path) == "link"
            if not _USUAL.fullmatch(name) and not is_links:
                yield path


def _directories_of(patterns: Iterable[str]) -> Iterator[str]:
    """Give the directories that *patterns* are in, and those on the way there."""
    for pattern in patterns:
        parts = pattern.split("/")[:-1]
        yield from ("/".join(parts[:length]) for length in range(len(parts) + 1))


# Those that are always looked into.
DIRECTORIES = tuple(
    dict.fromkeys(
        _directories_of(
            [
                *(f"{place}/x" for place in (*_HOST_KEY_PLACES, *_NAMED_BY_ID, *_PASSWORD_PLACES, "home", "var/home")),
                *(f"{place}/x" for place in (*_OWN_DIRECTORIES, *_ANSWER_DIRECTORIES) if place),
                *(f"{place}/sshd_config.d/x" for place in _SSHD),
                *(*_KEY_PLACES, *_ANSWER_PLACES, *_LOG_PLACES, *_IDENTITIES, *_SERVICE_KEYS, *_WITH_ID, WIREGUARD),
                *(path for found in REGISTRATIONS for path in found.secret),
                *(f"{home}/.ssh/x" for home in ("root", "etc/skel", "var/roothome")),
                *(f"{home}/{name}" for home in ("root/.gnupg", _PACMAN_KEYS) for name in _GNUPG_KEYS),
                *("etc/iscsi/x", "etc/security/x", "var/lib/dbus/x", "var/log/x"),
            ]
        )
    )
)
