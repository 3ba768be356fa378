"""What needs root: one function per verb of image-factory-sudo-helper.

Root runs the helper as it is, so that there is one implementation of what touches a guest's
filesystem; an ordinary user runs it through sudo, which never asks for a password.
"""

import base64
import json
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from .. import __version__
from ..base import command
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..model import Change, Entry, Placed, Subvolume

HELPER = "image-factory-sudo-helper"

# What it prints when it fails: the reason, and the call, which the log has already.
_REFUSAL = re.compile(rf"{HELPER}: (.*)\. The call was .*\.")

# What the helper takes as names, as its PART and NAME have it: of directories on the way, and of the last part.
_DIRECTORY_NAME = re.compile(r"\.?[A-Za-z0-9_@][A-Za-z0-9._@-]{0,254}")
_NAME = re.compile(r"\.?[A-Za-z0-9_@][A-Za-z0-9._@+~-]{0,254}")
_LEVELS = 24
# The directory of a btrfs subvolume, below which patterns begin.
_TOP_LEVELS = 8

# So many bytes of files it is given at once, of which there are two copies in memory.
_PLACED_AT_ONCE = 8 << 20

# A trim or an umount may have much to write to a slow disk, but nothing is waited for for ever.
SECONDS = 1800.0


def takes_directory(path: str, levels: int = _LEVELS) -> bool:
    """Return whether the helper takes *path*, of at most *levels* parts, as the directory of a pattern."""
    parts = path.split("/")
    return len(parts) <= levels and all(map(_DIRECTORY_NAME.fullmatch, parts))


def takes_top(path: str) -> bool:
    """Return whether the helper takes *path* as the directory of a subvolume, ``""`` for the filesystem's own."""
    return path == "" or takes_directory(path, _TOP_LEVELS)


def takes_name(name: str) -> bool:
    """Return whether the helper takes *name* as the last part of a path."""
    return _NAME.fullmatch(name) is not None


def helper_path(*, by_sudo: bool = True) -> str:
    """Return the helper that belongs to this program: the one beside it, else the one on PATH.

    *by_sudo* one that an ordinary user can change is not taken, as no sudo rule should name it.
    """
    beside = Path(sys.argv[0]).resolve().parent / HELPER
    if not beside.is_file():
        return HELPER
    if not by_sudo or os.geteuid() == 0 or all(_is_roots(path) for path in (beside, beside.parent)):
        return str(beside)
    return HELPER


def _is_roots(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == 0 and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def helper_argv(*arguments: str) -> list[str]:
    """Return the command that runs the helper with *arguments* as root."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    return [*sudo, helper_path(), *arguments]


def environment() -> dict[str, str]:
    """Return the environment of the helper.

    A root shell that was started with sudo still has the SUDO_ variables of its user, whom it would take for its
    caller.
    """
    return {key: value for key, value in os.environ.items() if not key.startswith("SUDO_")}


class Run(Protocol):
    """A way to run the helper as root: of this machine, or of namespaces in which the filesystem is mounted."""

    def __call__(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Run it with *arguments*; return what it prints.  CommandError has its reason if it fails."""


def by_sudo(*arguments: str, stdin: bytes | None = None) -> str:
    """Run the helper as root of this machine: see ``Run``."""
    argv = helper_argv(*arguments)
    with refusal_told():
        return command.run(argv, capture=True, env=environment(), timeout=SECONDS, new_session=False, stdin=stdin)


@contextmanager
def refusal_told() -> Iterator[None]:
    """Have the error of a helper that fails inside say its reason."""
    try:
        yield
    except CommandError as error:
        said = _REFUSAL.fullmatch(error.last_line)
        if said is not None:
            error.message = f"{HELPER} failed with status {error.status}: {said[1]}."
            error.args = (error.message,)
        raise


def check() -> None:
    """Raise ConfigurationError unless the helper can be run as root, and is of this version."""
    if os.geteuid() == 0 and not shutil.which(helper_path(), path=command.search_path()):
        raise ConfigurationError(f"{HELPER} is missing.", hint="Install image-factory again.")
    try:
        version = by_sudo("version").strip()
    except BuildError as error:
        user = os.environ.get("USER") or str(os.getuid())
        path = helper_path() if os.path.isabs(helper_path()) else f"/usr/bin/{HELPER}"
        raise ConfigurationError(
            f"{HELPER} can't be run as root: {error.said}",
            hint=f"Allow it with a line in /etc/sudoers.d: {user} ALL = NOPASSWD: {path}",
        ) from error
    if version != __version__:
        raise ConfigurationError(
            f"{HELPER} is of version {version}, image-factory of {__version__}.", hint="Install both from one release."
        )


def mount_words(
    image: Path,
    offset: int | str,
    size: int | str,
    directory: Path | str,
    *,
    top: bool = False,
    read_only: bool = False,
) -> list[str]:
    """Return the call of the helper for ``mount_image``."""
    words = ["mount-image", str(image), str(offset), str(size), str(directory)]
    return [*words, *(["subvolid=5"] if top else []), *(["read-only"] if read_only else [])]


def mount_image(
    image: Path, offset: int, size: int, directory: Path, *, top: bool = False, read_only: bool = False
) -> None:
    """Attach *size* bytes at *offset* of *image* to a loop device and mount it at *directory*.

    The loop device goes away by itself when the filesystem is unmounted.  Of btrfs its default
    subvolume is mounted, or with *top* the one that all others are below.  What is mounted *read_only* can't change.
    """
    by_sudo(*mount_words(image, offset, size, directory, top=top, read_only=read_only))


def umount(directory: Path) -> None:
    """Unmount what is mounted at *directory*."""
    by_sudo("umount", str(directory))


def show(run: Run, directory: Path, patterns: Sequence[str]) -> str:
    """Return the regular files below the tree at *directory* that *patterns* match, with headings.

    Only the last part of a pattern may have ``*``.  No link is followed.
    """
    return run("show", str(directory), *patterns)


def entries(run: Run, directory: Path, patterns: Sequence[str]) -> list[Entry]:
    """Return what *patterns* match below the tree at *directory*."""
    return [Entry(*json.loads(line)) for line in run("list", str(directory), *patterns).splitlines()]


def read(run: Run, directory: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    """Return the regular files below the tree at *directory* that *patterns* match, by their paths."""
    lines = map(json.loads, run("read", str(directory), *patterns).splitlines())
    return {path: base64.b64decode(data) for path, data in lines}


def write(run: Run, directory: Path, path: str, data: bytes, mode: int) -> None:
    """Write *data* to the file *path* below the tree at *directory*; a new one has *mode*."""
    run("write", str(directory), f"{mode:04o}", path, stdin=data)


def look(run: Run, directory: Path, paths: Sequence[str]) -> list[Entry]:
    """Return those of *paths* below the tree at *directory* that are there, links with where they lead to."""
    lines = "".join(f"{json.dumps(path)}\n" for path in paths).encode("ascii")
    return [Entry(*json.loads(line)) for line in run("look", str(directory), stdin=lines).splitlines()]


def put(run: Run, directory: Path, items: Sequence[Placed], contents: Path) -> None:
    """Make *items*, whose bytes are in the file *contents*, below the tree at *directory*, in their order."""
    with contents.open("rb") as file:
        for pieces in _pieces(items):
            stream = bytearray()
            for item, start, size in pieces:
                words: list[str | int] = [item.target if item.kind == "link" else item.mode, item.uid, item.gid]
                words += [start, size] if item.kind == "file" else []
                stream += f"{json.dumps([item.kind, item.path, *words])}\n".encode("ascii")
                file.seek(item.offset + start)
                stream += file.read(size)
            run("put", str(directory), stdin=bytes(stream))


def _pieces(items: Sequence[Placed]) -> Iterator[list[tuple[Placed, int, int]]]:
    """Give *items* in groups of so many bytes, each with a beginning and a size: a large file goes in several."""
    group: list[tuple[Placed, int, int]] = []
    room = _PLACED_AT_ONCE
    for item in items:
        start = 0
        while True:
            size = min(item.size - start, room)
            group.append((item, start, size))
            start, room = start + size, room - size
            if not room:
                yield group
                group, room = [], _PLACED_AT_ONCE
            if start == item.size:
                break
    if group:
        yield group


def rename(run: Run, directory: Path, path: str, name: str) -> None:
    """Name what is *path* below the tree at *directory* *name*, in the same directory."""
    run("rename", str(directory), path, name)


def remove(run: Run, directory: Path, patterns: Sequence[str]) -> list[Change]:
    """Remove what *patterns* match below the tree at *directory*; return what is gone."""
    return _changes(run("remove", str(directory), *patterns))


def truncate(run: Run, directory: Path, patterns: Sequence[str]) -> list[Change]:
    """Empty the files that *patterns* match below the tree at *directory*, and those below directories."""
    return _changes(run("truncate", str(directory), *patterns))


def _changes(answer: str) -> list[Change]:
    found = (line.split(" ", 2) for line in answer.splitlines())
    return [Change(path, int(count), int(size)) for count, size, path in found]


def usage(run: Run, directory: Path, top: str) -> dict[str, int]:
    """Return the bytes that each directory in *top*, below the tree at *directory*, takes; ``.`` has the other entries.

    What is mounted elsewhere, a subvolume for example, is not in it.
    """
    lines = (line.split(" ", 1) for line in run("usage", str(directory), *([top] if top else [])).splitlines())
    return {name: int(size) for size, name in lines}


def subvolumes(directory: Path) -> list[Subvolume]:
    """Return the subvolumes of the btrfs at *directory*, the default one first and its top among them."""
    lines = map(json.loads, by_sudo("subvolumes", str(directory)).splitlines())
    return [Subvolume(*fields) for fields in lines]


def set_read_only(run: Run, directory: Path, path: str, value: bool) -> None:
    """Make the subvolume *path* below the tree at *directory* read-only, or writable."""
    run("set-read-only", str(directory), "true" if value else "false", *([path] if path else []))


def delete_subvolumes(run: Run, directory: Path, paths: Sequence[str]) -> None:
    """Remove the subvolumes at *paths* below the tree at *directory*, and wait for their end."""
    run("delete-subvolume", str(directory), *paths)


def keys(run: Run, directory: Path, top: str) -> dict[str, bytes]:
    """Return the regular files in *top*, below the tree at *directory*, that may have a private key, by their paths."""
    lines = map(json.loads, run("keys", str(directory), *([top] if top else [])).splitlines())
    return {path: zlib.decompress(base64.b64decode(data)) for path, data in lines}


def trim(run: Run, directory: Path) -> int | None:
    """Free the unused blocks of the filesystem at *directory*.

    Returns their bytes, None where the filesystem or its disk can't.
    """
    answer = run("trim", str(directory)).strip()
    return int(answer) if answer.isdigit() else None
