"""Disks that are the same each time, bit for bit: of a build with SOURCE_DATE_EPOCH in its environment."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base import command
from ..base.errors import ConfigurationError

PROGRAMS = ("tune2fs", "dumpe2fs", "debugfs")
VARIABLE = "SOURCE_DATE_EPOCH"
# FAT knows no time before 1980, and not all programs one after January 2038.
_FIRST, _LAST = 315532800, 2**31 - 1

# Inodes with times of their own: that of bad blocks, the root, that of growing, the journal, and all files.
_SPECIAL = (1, 2, 7, 8)
_FIRST_FILE = 11

# What debugfs says of inodes becomes the commands that make them those of the time $1.  The times are hexadecimal,
# and a second number has nanoseconds and, in its last two bits, what the first has no room for.  A time before 1970 is
# kept.  Only of a file whose extents all lie in its inode the generation is part of no other checksum.
_SETTLE_INODES = r"""
function told() {
    if (!inode) return
    for (i = 1; i <= 3; i++) {
        name = i == 1 ? "ctime" : i == 2 ? "atime" : "crtime"
        printf "sif <%s> %s @%s\nsif <%s> %s_extra 0\n", inode, name, seconds, inode, name
    }
    if (late) printf "sif <%s> mtime @%s\nsif <%s> mtime_extra 0\n", inode, seconds, inode
    if (plain && generation != "0") printf "sif <%s> generation 0\n", inode
    if (version != "0x00000000:00000000") printf "sif <%s> version 0\nsif <%s> version_hi 0\n", inode, inode
}
/^Inode: / { told(); inode = $2; late = 0; plain = $4 == "regular" || $4 == "symlink" }
/^Generation: / { generation = $2; version = $4 }
/^ *mtime: / {
    split(substr($2, 3), half, ":")
    late = (half[1] < "8" && half[1] > latest) || half[2] ~ /[1-35679abdef]$/
}
/\(ETB/ { plain = 0 }
END { told() }
"""

_SUPERBLOCK = {
    "mtime": "0",
    "mnt_count": "0",
    "wtime": "@{date}",
    "lastcheck": "@{date}",
    "mkfs_time": "@{date}",
    # What debugfs itself writes afterwards is the same each time.
    "kbytes_written": "0",
}


def source_date(environment: Mapping[str, str]) -> int | None:
    """Return the time that a build takes for the present, in seconds since 1970; None if nothing says so."""
    text = environment.get(VARIABLE, "")
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,10}", text) or not _FIRST <= int(text) <= _LAST:
        raise ConfigurationError(
            f"{VARIABLE}: {text!r} is not accepted, only seconds since 1970, from {_FIRST} (1980) to {_LAST} (2038).",
            hint=f"For the present unset {VARIABLE}.",
        )
    return int(text)


def with_date(date: int | None, *words: str) -> list[str]:
    """Return the command *words*, in which a program of e2fsprogs or mtools takes *date* for the present."""
    return ["env", "TZ=UTC", f"{VARIABLE}={date}", f"E2FSPROGS_FAKE_TIME={date}", *words] if date else [*words]


def run(argv: Sequence[str], **keywords: Any) -> str:
    """Run *argv* as ``command.run`` does; what it runs itself, such as env and sh do, is found in the same places."""
    return command.run(argv, env=os.environ | {"PATH": command.search_path()}, **keywords)


def clamp_argv(tree: Path, date: int) -> list[str]:
    """Return the command after which no file of *tree* was changed later than *date*."""
    touch = ["touch", "--no-dereference", f"--date=@{date}"]
    return ["find", str(tree), "-xdev", "-newermt", f"@{date}", "-exec", *touch, "{}", "+"]


def settle_argvs(
    disk: Path, offset: int | str, directory: Path, date: int, journal: int | str = "SIZE"
) -> list[list[str]]:
    """Return the commands of ``settle``; *journal* is the size of the journal in MiB."""
    at = f"{disk}?offset={offset}"
    superblock = _debugfs_argv(directory / "superblock", at, date)
    # The journal remembers what was written to the filesystem while it was mounted.  tune2fs copies the superblock to
    # all places that have one.
    return [
        ["dumpe2fs", at],
        superblock,
        with_date(date, "tune2fs", "-M", "", "-O", "^has_journal", at),
        with_date(date, "tune2fs", "-J", f"size={journal}", at),
        ["sh", "-c", 'debugfs -f "$1" "$2" | awk -v seconds="$3" -v latest="$4" "$5" >"$6"', "sh",
         str(directory / "inodes"), at, str(date), f"{date:08x}", _SETTLE_INODES, str(directory / "settle")],
        _debugfs_argv(directory / "settle", at, date),
        superblock,
    ]  # fmt: skip


def _debugfs_argv(commands: Path, at: str, date: int) -> list[str]:
    """Return the command that has debugfs carry out the file *commands*, each of which it would repeat on stdout."""
    return with_date(date, "sh", "-c", 'exec debugfs -w -f "$1" "$2" >/dev/null', "sh", str(commands), at)


def settle(disk: Path, offset: int, directory: Path, date: int) -> None:
    """Have nothing in the ext4 filesystem at *offset* of *disk* tell when, or how often, it was changed."""
    listed = run(settle_argvs(disk, offset, directory, date)[0], capture=True, quiet=True)
    groups, size = [*groups_of(listed)], journal_size(listed)
    argvs = settle_argvs(disk, offset, directory, date, size or 0)
    _, superblock, without_journal, with_journal, looking, inodes, _ = argvs
    (directory / "superblock").write_text(
        "".join(f"ssv {name} {value.format(date=date)}\n" for name, value in _SUPERBLOCK.items()), encoding="ascii"
    )
    for argv in (superblock, without_journal, *([with_journal] if size else [])):
        run(argv)
    with (directory / "inodes").open("w", encoding="ascii") as file:
        file.writelines(f"stat <{inode}>\n" for inode in _SPECIAL)
        file.writelines(f"stat <{inode}>\n" for group in groups for inode in group.used() if inode >= _FIRST_FILE)
    for argv in (looking, inodes, superblock):
        run(argv)
    with disk.open("r+b") as written:
        for group in groups:
            for position, size in group.freed():
                os.pwrite(written.fileno(), bytes(size), offset + position)
    for name in ("inodes", "settle", "superblock"):
        (directory / name).unlink()


@dataclass(frozen=True)
class Inodes:
    """The inodes of a group: the first one and how many there are, where in the filesystem, the free ones among them.

    Those from *unused* on were never used.
    """

    first: int
    count: int
    offset: int
    size: int
    free: frozenset[int]
    unused: int

    def used(self) -> Iterator[int]:
        """Give those that have files."""
        return (inode for inode in range(self.first, self.first + self.count) if inode not in self.free)

    def freed(self) -> Iterator[tuple[int, int]]:
        """Give offset and size of each that may have had a file, and has none now."""
        freed = (inode for inode in sorted(self.free) if inode < self.unused)
        return ((self.offset + (inode - self.first) * self.size, self.size) for inode in freed)


def journal_size(text: str) -> int | None:
    """Return the MiB of the journal of a filesystem, as dumpe2fs shows it in *text*; None if it has none."""
    found = re.search(r"^Total journal size:\s+([0-9]+)([kM])$", text, re.MULTILINE)
    return int(found[1]) // (1024 if found[2] == "k" else 1) if found else None


def groups_of(text: str) -> Iterator[Inodes]:
    """Give the groups of a filesystem as dumpe2fs shows them in *text*."""
    block, size, count = (
        int(re.findall(rf"^{name}:\s+([0-9]+)$", text, re.MULTILINE)[0])
        for name in ("Block size", "Inode size", "Inodes per group")
    )
    first = 1
    for group in re.split("^Group [0-9]+: ", text, flags=re.MULTILINE)[1:]:
        table = re.search("^  Inode table at ([0-9]+)", group, re.MULTILINE)
        listed = re.search("^  Free inodes: *(.*)$", group, re.MULTILINE)
        assert table and listed
        free: set[int] = set()
        for part in filter(None, listed[1].split(", ")):
            start, _, last = part.partition("-")
            free.update(range(int(start), int(last or start) + 1))
        never = re.search("([0-9]+) unused inodes$", group, re.MULTILINE)
        unused = first + count - (int(never[1]) if never else 0)
        yield Inodes(first, count, int(table[1]) * block, size, frozenset(free), unused)
        first += count
