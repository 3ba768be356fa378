"""A running machine that ssh reaches: what it is asked, and what goes wrong on the way; nothing is written on it."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...base import command
from ...base.errors import BuildError, CommandError
from ...base.log import logger
from ...configuration.parsers import Origin

PROGRAMS = ("ssh",)

_ASK_SECONDS = 120.0
# ssh asks nothing, believes no new key, and leaves no process that later ones go through.
_OPTIONS = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "UpdateHostKeys=no",
    "ConnectTimeout=30",
    # A host that says nothing for a minute has gone.
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "ClearAllForwardings=yes",
    "ControlMaster=no",
    "ControlPath=none",
    "PermitLocalCommand=no",
    "RequestTTY=no",
)
# The user's shell may be any; $@ is the command.  It is root's, by sudo if need be, which asks nothing.
_AS_ROOT = """\
LC_ALL=C; export LC_ALL
[ "$(id -u)" = 0 ] || set -- sudo -n -- "$@"
exec "$@"
"""
# Prints what there is, each part under a heading.
_ASK = """\
echo "== mounts"
findmnt --json --list --output TARGET,SOURCE,FSTYPE,MAJ:MIN,FSROOT
echo "== user"
id -u
echo "== architecture"
dpkg --print-architecture 2>/dev/null || uname -m
echo "== tar"
tar --version 2>&1 | head -n 1
echo "== swap"
cat /proc/swaps 2>/dev/null
echo "== removable"
for device in /sys/dev/block/*; do
    for file in "$device/removable" "$device/../removable"; do
        [ ! -r "$file" ] || ! read -r flag <"$file" || [ "$flag" != 1 ] || echo "${device##*/}"
    done
done
echo "== end"
"""

_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "f2fs", "jfs", "reiserfs", "bcachefs", "nilfs2", "zfs")
_NETWORK = re.compile(
    r"nfs4?|cifs|smb3|smbfs|ceph|9p|afs|lustre|ncpfs|beegfs|ocfs2|gfs2|fuse\.(?:sshfs|glusterfs|s3fs).*"
)
# What is at these or below them is the system's.
_OWN = ("/usr", "/boot", "/efi", "/var", "/opt", "/srv", "/home")

# What ssh and sudo say, and what is to be told of it: HOST, NAME and PORT are the host's, as ssh and ssh-keyscan take
# them.
_FAILURES = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
        "HOST has another ssh host key than the one that is known",
        "Find out why. If the host was set up anew: ssh-keygen -R 'NAME', then add its new key.",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "The ssh host key of HOST is not known",
        "Compare it with the host's own, and add it: ssh-keyscan PORT>>~/.ssh/known_hosts",
    ),
    (
        r"sudo: .*(?:password is required|terminal is required|tty to run sudo)",
        "On HOST sudo asks for a password",
        "Allow the user there to run all as root with no password (NOPASSWD: ALL), or log in as root.",
    ),
    (
        r"(?:is not in the sudoers file|may not run sudo|is not allowed to execute)",
        "On HOST sudo does not allow the user to be root",
        "Allow it in sudoers (NOPASSWD: ALL), or log in as root.",
    ),
    (r"sudo: (?:command )?not found", "HOST has no sudo", "Log in as root: ssh://root@HOSTNAME"),
    (
        r"Permission denied \(",
        "HOST does not let the user in",
        "Give ssh a key that the host takes: an agent, or ~/.ssh.",
    ),
    (
        r"Could not resolve hostname|Connection refused|Connection timed out|No route to host|Network is unreachable",
        "HOST can't be reached",
        "Correct capture-from, or try again when the host is up.",
    ),
    (
        r"Connection (?:to .* )?closed|Connection reset|Broken pipe|not responding|Connection to .* timed out|"
        r"client_loop",
        "HOST has gone away",
        "Build again when it is there; nothing is left on it.",
    ),
)


@dataclass(frozen=True)
class Mount:
    """A filesystem at *point*; *device* are its numbers, and *top* is the directory of it that is seen there."""

    point: str
    source: str
    kind: str
    device: str
    top: str

    @property
    def what(self) -> tuple[str, str]:
        """What is seen there, at whatever point."""
        return self.device, self.top


@dataclass(frozen=True)
class Host:
    """What a host has said of itself: *architecture* is Debian's name, or the kernel's, *swap* are paths of files."""

    architecture: str
    mounts: tuple[Mount, ...]
    removable: frozenset[str]
    swap: tuple[str, ...]


def argv(origin: Origin, *words: str) -> list[str]:
    """Return the command that runs *words* on the host of *origin*, as root."""
    options = [word for option in _OPTIONS for word in ("-o", option)]
    user = ["-l", origin.user] if origin.user else []
    port = ["-p", str(origin.port)] if origin.port else []
    line = shlex.join(["sh", "-c", _AS_ROOT, "sh", "env", "LC_ALL=C", *words])
    return ["ssh", "-n", *options, *user, *port, "--", origin.host, line]


def ask_argv(origin: Origin) -> list[str]:
    """Return the command that asks the host of *origin* what it has."""
    return argv(origin, "sh", "-c", _ASK)


def ask(origin: Origin) -> Host:
    """Return what the host of *origin* says of itself; BuildError if it can't be asked, or can't be captured."""
    try:
        printed = command.run(ask_argv(origin), capture=True, timeout=_ASK_SECONDS)
    except CommandError as error:
        raise explained(origin, error) from error
    parts = re.split(r"^== (\w+)\n", printed, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=False))
    if found.get("user", "").strip() != "0":
        raise BuildError(f"{origin} gives no shell of root's.", hint="Log in as root, or have sudo give root's rights.")
    if "GNU tar" not in found.get("tar", ""):
        raise BuildError(
            f"{origin} has no GNU tar, which keeps attributes, labels and holes of files.",
            hint="Install it there (package tar), or capture a tar that was made of it elsewhere.",
        )
    return Host(
        found.get("architecture", "").strip(),
        _mounts(origin, found.get("mounts", "")),
        frozenset(found.get("removable", "").split()),
        tuple(_swap_files(found.get("swap", ""))),
    )


def _mounts(origin: Origin, text: str) -> tuple[Mount, ...]:
    """Return the mounts of findmnt's *text*, of each point the last, the one that is seen."""
    keys = ("target", "source", "fstype", "maj:min", "fsroot")
    try:
        listed = [[each[key] for key in keys] for each in json.loads(text)["filesystems"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BuildError(
            f"{origin} does not say what it has mounted.",
            hint="Its findmnt (util-linux 2.27 or later) is asked for JSON.",
        ) from error
    mounts = [Mount(*(str(value or "") for value in values)) for values in listed]
    found = {mount.point: mount for mount in mounts if mount.point.startswith("/")}
    if "/" not in found:
        raise BuildError(f"{origin} has nothing mounted at /.")
    return tuple(found.values())


def _swap_files(text: str) -> Iterable[str]:
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 1 and fields[1] == "file":
            # As the kernel writes them: blanks as \040.
            yield re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[0])


def chosen(origin: Origin, host: Host, wanted: Sequence[str]) -> list[Mount]:
    """Return which mounts of *host* are taken, from the root downwards: those at the points *wanted*, or the system's.

    BuildError names a point that is wanted and can't be taken.
    """
    mounts = {mount.point: mount for mount in host.mounts}
    for point in wanted:
        if point not in mounts:
            local = ", ".join(mount.point for mount in host.mounts if _is_local(mount, host))
            raise BuildError(f"capture-mounts: {origin} has nothing mounted at {point}.", hint=f"It has {local}.")
    taken: dict[tuple[str, str], Mount] = {}
    for mount in sorted(host.mounts, key=lambda mount: mount.point.split("/") if mount.point != "/" else []):
        is_wanted = mount.point == "/" or (mount.point in wanted if wanted else _is_own(mount.point))
        reason = _reason_against(mount, host)
        if is_wanted and (wanted or mount.point == "/") and reason:
            raise BuildError(
                f"{mount.point} of {origin} is {reason}, which is never taken.",
                hint="Capture a copy of it, as a directory or a tar."
                if mount.point == "/"
                else "Leave it out of capture-mounts.",
            )
        if is_wanted and not reason and mount.what not in taken:
            if mount.top in ("", "/") or mount.kind == "btrfs" or mount.point == "/":
                taken[mount.what] = mount
                continue
            reason = "shown a second time"
        if mount.what not in taken and (_is_local(mount, host) or _NETWORK.fullmatch(mount.kind)):
            why = reason or "not among capture-mounts" if wanted else reason or "no place of the system's"
            logger.info("%s (%s) is left out: it is %s.", mount.point, mount.kind, why)
    return list(taken.values())


def _is_own(point: str) -> bool:
    return point == "/" or any(f"{point}/".startswith(f"{own}/") for own in _OWN)


def _is_local(mount: Mount, host: Host) -> bool:
    return mount.kind in _LOCAL and mount.device not in host.removable


def _reason_against(mount: Mount, host: Host) -> str:
    """Return why *mount* can't be taken, empty if it can."""
    if _NETWORK.fullmatch(mount.kind):
        return f"a filesystem of the network ({mount.kind})"
    # The root of a container is what it is.
    if mount.point == "/":
        return ""
    if mount.device in host.removable:
        return "on a removable medium"
    return "" if mount.kind in _LOCAL else f"no filesystem of a disk ({mount.kind})"


def used(origin: Origin, mounts: Sequence[Mount]) -> int:
    """Return the bytes that the filesystems of *mounts* have in use; 0 if the host does not say."""
    words = ["df", "--block-size=1", "--output=used", "--", *(mount.point for mount in mounts)]
    try:
        printed = command.run(argv(origin, *words), capture=True, timeout=_ASK_SECONDS)
    except BuildError:
        return 0
    return sum(int(word) for word in printed.split() if word.isdigit())


def explained(origin: Origin, error: CommandError) -> BuildError:
    """Return the error for a command on the host of *origin*, for *error* of ssh."""
    text = "\n".join(error.last_lines)
    name = f"[{origin.host}]:{origin.port}" if origin.port not in (0, 22) else origin.host
    port = f"-p {origin.port} " if origin.port not in (0, 22) else ""
    for pattern, told, hint in _FAILURES:
        if re.search(pattern, text):
            hint = hint.replace("HOSTNAME", origin.host).replace("NAME", name)
            hint = hint.replace("PORT", f"{port}{origin.host} ")
            return BuildError(f"{told.replace('HOST', str(origin))}.", hint=hint)
    if error.status == 127:
        return BuildError(f"{origin} has not all that is needed: {error.said}.", hint="Install it there.")
    return BuildError(f"{origin} can't be captured: {error.said}.", hint="The log has all that was said.")
