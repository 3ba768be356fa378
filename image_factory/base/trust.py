"""Whose files are believed: root's and one's own, in places where nobody else can put others."""

import grp
import os
import pwd
import re
import stat
from contextlib import suppress
from pathlib import Path

_ACL = "system.posix_acl_access"
_NAME_SERVICES = Path("/etc/nsswitch.conf")


def name_of(uid: int) -> str:
    """Return the name of the user *uid*."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def why_not(directory: Path) -> str | None:
    """Return how other users than root and this one can change what is in *directory*; None if they can't.

    It need not be there yet.  A directory above it may be one in which all may make files but remove only their own.
    """
    directory = Path(os.path.realpath(directory))
    for path in (directory, *directory.parents):
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            return f"{path} can't be looked at: {error.strerror}"
        if status.st_uid not in (0, os.geteuid()):
            return f"{path} belongs to {name_of(status.st_uid)}"
        writers = _other_writers(path, status)
        if writers and not (status.st_mode & stat.S_ISVTX and path != directory):
            return f"{path} can be written by {writers}"
    return None


def make(directory: Path) -> None:
    """Make *directory* and those above it, for their user to write only, whatever the umask is."""
    for path in (*reversed(directory.parents), directory):
        if not path.is_dir():
            path.mkdir(mode=0o755, exist_ok=True)


def own(path: Path) -> bool:
    """Whether *path* is a regular file, no link, that only root and this user can write."""
    with suppress(OSError):
        status = path.lstat()
        return stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.geteuid()) and not _other_writers(path, status)
    return False


def _other_writers(path: Path, status: os.stat_result) -> str | None:
    """Return which other users the mode of *path* lets write, None if there are none."""
    if status.st_mode & stat.S_IWOTH:
        return "all users"
    if not status.st_mode & stat.S_IWGRP:
        return None
    # The group's bits are then the most that the list allows to anybody.
    with suppress(OSError):
        if _ACL in os.listxattr(path, follow_symlinks=False):
            return "users of its access control list"
    return _other_members(status.st_gid)


def _other_members(gid: int) -> str | None:
    """Return a name of the group *gid* unless nobody else than root and this user is in it."""
    try:
        group = grp.getgrgid(gid)
        user = pwd.getpwuid(os.geteuid())
    except KeyError:
        return f"the group {gid}"
    members = {*group.gr_mem, *(other.pw_name for other in pwd.getpwall() if other.pw_gid == gid)}
    # A group of the user's name is the user's own, as Debian makes one.
    all_known = group.gr_name == user.pw_name or _all_users_are_listed()
    return None if all_known and not members - {user.pw_name, "root"} else f"the group {group.gr_name}"


def _all_users_are_listed() -> bool:
    """Whether all users are this machine's own: a directory of users in the network seldom lists those of a group."""
    try:
        text = _NAME_SERVICES.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    match = re.search(r"^[ \t]*passwd:([^#\n]*)", text, re.MULTILINE)
    return match is not None and set(match[1].split()) <= {"files", "compat", "systemd"}
