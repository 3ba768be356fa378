"""The tars by which a system comes: what is left out of them, and what the two programs say while they are at it."""

import re
from collections.abc import Sequence
from pathlib import Path

from ...base.errors import BuildError, CommandError
from ...base.log import logger

PROGRAMS = ("tar", "gzip", "xz", "zstd", "bzip2")

_KINDS = ("--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "--selinux")
# What a system has in memory when it runs, or throws away when it starts.
_LEFT_OUT = ("/dev/*", "/proc/*", "/sys/*", "/run/*", "/tmp/*", "/var/tmp/*")
# What mkfs makes on each filesystem.
_OF_FILESYSTEMS = "lost+found"
# Directories that have nothing else on a disk.
EMPTY = tuple(path.removesuffix("/*") for path in _LEFT_OUT)
# The reader of a stream tells how far it has come after so many records of 10 KiB.
_RECORDS = 500
_RECORD = 10240
_PROGRESS = re.compile(r"(?:tar: )?image-factory ([0-9]+)")
# A guest can have any number of them.
_MOST = 10_000
_TOLD = 5

# Of GNU tar; the status is 1 then.
_CHANGED = re.compile(
    r".*tar: (.*): (?:file changed as we read it|File removed before we read it|"
    r"File shrank by [0-9]+ bytes?; padding with zeros)"
)
_ELSEWHERE = re.compile(r".*tar: (.*): file is on a different filesystem; not dumped")
_DIFFERS = 1
# Its statuses; others are of what runs it.
READ = (_DIFFERS, 2)
# It has said before what the matter was.
_LAST_WORDS = re.compile(r".*tar: (?:Exiting with failure status|Error is not recoverable|Child (?:returned|died))")
# The other end has gone, which has a reason of its own.
_OTHER_END = re.compile(
    r".*tar: (?:.*Unexpected EOF in archive|This does not look like a tar.*|-: Cannot write: Broken pipe|-: Wrote.*)"
)
_FAILED = re.compile(
    r".*tar: (?:.*: )?(?:Cannot .*|(?:Read|Seek|Write) error.*|Unexpected EOF.*|This does.*|Member name .*)"
)
_DEVICE = re.compile(r".*tar: (.*): Cannot mknod: Operation not permitted")

_HINTS = {
    "No space left on device": "Free some space, or build elsewhere with --output-dir.",
    "File too large": "The filesystem of the output directory has no files of that size: build on xfs, or remove it.",
    "Cannot change ownership": "An ordinary user can't have all owners that the system has: build as root.",
    "Permission denied": "Build as root, or as a user who may read all of it.",
    "not look like a tar": "It has to be a tar, perhaps compressed with gzip, xz, zstd or bzip2.",
}


def reading_argv(top: str, point: str = "/", files: Sequence[str] = ()) -> list[str]:
    """Return the command that prints what the directory *top* has, *point* of a system, without the *files* of that."""
    patterns = [f"--exclude={found}" for found in (*_below(point, _LEFT_OUT), f"./{_OF_FILESYSTEMS}")]
    exact = [f"--exclude={found}" for found in _below(point, files)]
    return [
        "tar", "--create", "--one-file-system", *_KINDS, "--sparse",
        "--anchored", *patterns, *(["--no-wildcards", *exact] if exact else []),
        f"--directory={top}", "--file=-", ".",
    ]  # fmt: skip


def _below(point: str, paths: Sequence[str]) -> list[str]:
    """Return those of *paths* that are below *point*, as the members of its tar are named."""
    above = point.rstrip("/") + "/"
    return [f"./{path.removeprefix(above)}" for path in paths if path.startswith(above)]


def unpacking_argv(target: Path, file: str = "-") -> list[str]:
    """Return the command that unpacks the tar *file*, or its stdin, into the empty directory *target*."""
    kept = ["--same-owner", "--preserve-permissions"]
    if file == "-":
        kept += [f"--checkpoint={_RECORDS}", "--checkpoint-action=echo=image-factory %u"]
    else:
        # Whatever its members' names begin with.
        kept += [
            "--anchored",
            *(
                f"--exclude={found}"
                for path in (*_LEFT_OUT, f"/{_OF_FILESYSTEMS}")
                for found in (f".{path}", path[1:], path)
            ),
        ]
    return ["tar", "--extract", *_KINDS, *kept, f"--directory={target}", f"--file={file}"]


class Said:
    """What the two ends of a stream have said: names of files that have *changed* or vanished, and what has failed."""

    def __init__(self) -> None:
        self.changed: list[str] = []
        self.elsewhere: list[str] = []
        self.devices: list[str] = []
        self._failures: dict[bool, list[str]] = {False: [], True: []}

    def take(self, line: str) -> bool:
        """Take *line* of the end that reads the system."""
        return self._take(line, at_end=False)

    def follow(self, line: str) -> bool:
        """Take *line* of the end that unpacks it."""
        return bool(_PROGRESS.fullmatch(line)) or self._take(line, at_end=True)

    def _take(self, line: str, *, at_end: bool) -> bool:
        for pattern, names in ((_CHANGED, self.changed), (_ELSEWHERE, self.elsewhere), (_DEVICE, self.devices)):
            match = pattern.fullmatch(line)
            if match:
                path = match[1].removeprefix(".")
                # Of what is mounted there nothing is read.
                if len(names) < _MOST and path not in EMPTY:
                    names.append(path)
                return pattern is _ELSEWHERE
        failures = self._failures[at_end]
        if len(failures) < _MOST and _FAILED.match(line) and not _LAST_WORDS.match(line):
            failures.append(line)
        return False

    def unpacked(self, line: str) -> None:
        """Take *line* of what unpacks a file, which tells no progress."""
        self.follow(line)

    @property
    def is_silent(self) -> bool:
        """Whether the end that reads has told nothing that it says of files."""
        return not self.changed and not self._failures[False]

    def check_end(self, target: CommandError | None, where: str) -> None:
        """Raise BuildError if the end that unpacks has failed, and not as the other one did."""
        at_end = [line for line in self._failures[True] if not _OTHER_END.match(line)]
        if at_end:
            raise _failed(f"{where} can't be unpacked", at_end, target)

    def check(self, source: CommandError | None, target: CommandError | None, where: str, read: str) -> None:
        """Raise BuildError if an end, of those that have not ended well, has failed; *where* a system is, *read* from.

        That files have changed is none, nor that an ordinary user can make no devices.
        """
        self.check_end(target, where)
        if source and (source.status != _DIFFERS or self._failures[False]):
            raise _failed(f"{read} can't be read", self._failures[False], source)
        if target and (self._failures[True] or not self.devices):
            raise _failed(f"{where} can't be unpacked", self._failures[True], target)

    def tell(self) -> None:
        """Warn of what the system that was read may lack."""
        if self.changed:
            logger.warning("Changed or vanished while the system was read: %s.", named(self.changed))
        if self.devices:
            logger.warning("An ordinary user can make no devices, so these are left out: %s.", named(self.devices))


def progress(line: str) -> int:
    """Return the bytes that the end which unpacks has had, as *line* says; 0 if it says no such thing."""
    match = _PROGRESS.fullmatch(line)
    return int(match[1]) * _RECORD if match else 0


def named(paths: Sequence[str]) -> str:
    """Return *paths* for a message: the first ones, and how many more there are."""
    more = f" and {len(paths) - _TOLD} more, which the log has" if len(paths) > _TOLD else ""
    return f"{', '.join(paths[:_TOLD])}{more}"


def _failed(what: str, lines: Sequence[str], error: CommandError | None) -> BuildError:
    others = [line for line in error.last_lines if not _LAST_WORDS.match(line)] if error else []
    said = re.sub(r"^(?:.*?tar: )?", "", [*lines[:1], *others[-1:], error.message if error else ""][0])
    hint = next((hint for words, hint in _HINTS.items() if words in said), "The log has all that was said.")
    return BuildError(f"{what}: {said}.", hint=hint)
