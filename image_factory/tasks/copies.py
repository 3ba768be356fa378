"""Copy files into a system by its own shell: what it has is looked at first, and an archive is unpacked then."""

import base64
import binascii
import io
import os
import re
import shlex
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ..base import command, interrupts
from ..base.errors import BuildError
from ..configuration.parsers import Copy
from ..model import Entry, Placed

_NOT_RECEIVED = 125
_NAMES_AT_ONCE = 50

# Say what is at $2, and what is in the file $2: a word, $1, and the rest in base64.  Programs are only started for
# what few are: each takes a part of a second where a guest is emulated.
_FUNCTIONS = f"""\
look() {{
    if [ -L "$2" ]; then echo "link $1 $(readlink -n "$2" | base64 | tr -d '\\n')"
    elif [ -d "$2" ]; then echo "directory $1 "
    elif [ -f "$2" ]; then echo "file $1 "
    elif [ -e "$2" ]; then echo "other $1 "
    fi
}}
show() {{ [ ! -f "$2" ] || [ -L "$2" ] || echo "data $1 $(head -c {1 << 20} "$2" | base64 | tr -d '\\n')"; }}
"""
_SAID = re.compile(r"(link|directory|file|other|data) (\d+) ([A-Za-z0-9+/=]*)")
# What takes the place of something is here first, in the directory of that.
_NEW = ".image-factory-new"
# Gives each file here the label of the one above whose place it takes: the kernel gives it that of its directory.
_LABEL = """\
[ ! -e /sys/fs/selinux/enforce ] || for name in {names}; do chcon "--reference=../$name" "$name"; done
"""


def told(copies: Iterable[Copy]) -> list[list[str]]:
    """Return the comments of a dry run that say what becomes of *copies*."""
    return [
        ["#", f"{each.source} to {each.destination}, of {each.owner}:{each.group}"
         + ("" if each.mode is None else f", mode {each.mode:04o}")]
        for each in copies
    ]  # fmt: skip


def putting(directory: str) -> str:
    """Return the line of shell that unpacks the archive that it reads.

    That has its scripts in *directory*, on a tmpfs.
    """
    return (
        "command -v tar >/dev/null || { echo 'the system has no tar, which unpacks what is copied' >&2; exit 1; };"
        f" umask 077; rm -rf {directory}; mkdir {directory} && cd / || exit {_NOT_RECEIVED};"
        # Its last line says only that something failed.
        f" tar -xmpf - 2>{directory}/said || {{ head -n 1 {directory}/said >&2; false; }} && sh {directory}/after;"
        f" status=$?; [ $status = 0 ] || sh {directory}/undo 2>/dev/null; rm -rf {directory}; exit $status"
    )


@dataclass
class InSystem:
    """A system that is looked at and written to by the argv that *shell* makes of a line of shell for its root.

    *directory* is there on a tmpfs.  *watch* is called each second.  After *limit* seconds, if that is not None, all
    of it has to be done.
    """

    shell: Callable[[str], Sequence[str]]
    directory: str
    watch: Callable[[], None] | None = None
    limit: float | None = None
    _start: float = field(default_factory=time.monotonic)
    _there: dict[str, Entry] = field(default_factory=dict)

    def look(self, paths: Sequence[str]) -> dict[str, Entry]:
        """Return those of *paths* that are there, links with where they lead to."""
        found = {path: Entry(path, kind, os.fsdecode(target)) for kind, path, target in self._said("look", paths)}
        self._there |= found
        return found

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        """Return the regular files of at most 1 MiB at *patterns*, by their paths."""
        return {path: data for _, path, data in self._said("show", patterns)}

    def put(self, items: Sequence[Placed], contents: Path) -> None:
        """Make *items*, whose bytes are in the file *contents*."""
        archive = contents.with_suffix(".tar")
        try:
            with open(os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
                self._pack(items, contents, file)
            self._run(putting(self.directory), archive)
        finally:
            archive.unlink(missing_ok=True)

    def _said(self, function: str, paths: Sequence[str]) -> list[tuple[str, str, bytes]]:
        """Return what *function* of the script says of *paths*: a word, the path and the rest."""
        calls = (f"{function} {number} {shlex.quote(f'/{path}')}\n" for number, path in enumerate(paths))
        said = self._run("exec sh", (_FUNCTIONS + "".join(calls)).encode(errors="surrogateescape"), quiet=True)
        matches = [match for match in map(_SAID.fullmatch, said.splitlines()) if match and int(match[2]) < len(paths)]
        return [(match[1], paths[int(match[2])], _decoded(match[3])) for match in matches]

    def _run(self, line: str, stdin: bytes | Path, *, quiet: bool = False) -> str:
        left = None if self.limit is None else max(1.0, self.limit - (time.monotonic() - self._start))
        return command.run(self.shell(line), capture=quiet, quiet=quiet, stdin=stdin, timeout=left, watch=self.watch)

    def _pack(self, items: Sequence[Placed], contents: Path, file: IO[bytes]) -> None:
        """Write the archive of *items* to *file*: what to take away if all can't be there comes first.

        What takes the place of something gets its name at the end.
        """
        names = [_new(item.path) if item.path in self._there else item.path for item in items]
        with contents.open("rb") as data, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            self._add_script(archive, "undo", _undo(items, names))
            for directory in _aside(items, names):
                archive.addfile(_member(Placed(directory, "directory", 0o700), directory))
            for item, name in zip(items, names, strict=True):
                interrupts.check()
                data.seek(item.offset)
                archive.addfile(_member(item, name), data if item.kind == "file" else None)
            self._add_script(archive, "after", _after(items, names))

    def _add_script(self, archive: tarfile.TarFile, name: str, text: str) -> None:
        data = text.encode(errors="surrogateescape")
        member = tarfile.TarInfo(f"{self.directory.lstrip('/')}/{name}")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def _member(item: Placed, name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    kinds = {"file": tarfile.REGTYPE, "directory": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}
    member.type, member.mode, member.uid, member.gid = kinds[item.kind], item.mode, item.uid, item.gid
    member.linkname, member.size = item.target, item.size
    return member


def _new(path: str) -> str:
    directory, _, name = path.rpartition("/")
    return f"{directory}/{_NEW}/{name}".lstrip("/")


def _aside(items: Sequence[Placed], names: Sequence[str]) -> dict[str, list[Placed]]:
    """Return those of *items* that have others of *names* first, by the directories of these."""
    found: dict[str, list[Placed]] = {}
    for item, name in zip(items, names, strict=True):
        if name != item.path:
            found.setdefault(name.rpartition("/")[0], []).append(item)
    return found


def _undo(items: Sequence[Placed], names: Sequence[str]) -> str:
    """Return the script that removes what *items* have made under *names*."""
    made = [shlex.quote(f"/{name}") for item, name in zip(items, names, strict=True) if item.kind != "directory"]
    directories = [item.path for item in items if item.kind == "directory"]
    lines = [f"rm -f {' '.join(each)}\n" for each in _batches(made)]
    return "".join(
        [*lines, *(f"rmdir {shlex.quote(f'/{each}')}\n" for each in (*_aside(items, names), *reversed(directories)))]
    )


def _after(items: Sequence[Placed], names: Sequence[str]) -> str:
    """Return the script that gives those of *items* whose *names* are others their own."""
    lines = ["set -e\n"]
    for directory, here in _aside(items, names).items():
        lines.append(f"cd {shlex.quote(f'/{directory}')}\n")
        for kind in ("file", "link"):
            words = [shlex.quote(f"./{item.path.rpartition('/')[2]}") for item in here if item.kind == kind]
            for batch in map(" ".join, _batches(words)):
                lines += [_LABEL.format(names=batch)] if kind == "file" else []
                lines.append(f"mv -f {batch} ..\n")
        lines.append(f"cd ..; rmdir {_NEW}\n")
    return "".join(lines)


def _batches(words: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(words), _NAMES_AT_ONCE):
        yield words[start : start + _NAMES_AT_ONCE]


def _decoded(data: str) -> bytes:
    try:
        return base64.b64decode(data)
    except binascii.Error as error:
        raise BuildError("the system does not say in base64 what it has") from error
