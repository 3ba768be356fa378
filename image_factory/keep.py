"""Older builds of an image, which go when a newer one is good: what each has left, and how that is removed.

Nothing is looked for by its name.  A build writes down which files it has made, and a later one of the same image
removes those, as long as they are what was made.
"""

import errno
import fcntl
import json
import os
import signal
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .base import events, files, interrupts
from .base.cleanup import released
from .base.errors import reason_of
from .base.log import logger
from .model import RECORD_SUFFIX, Build, Plan
from .parts import State, Step, doing

_VERSION = 1
_LARGEST_RECORD = 1 << 20


@dataclass(frozen=True)
class File:
    """A file of a build: its name in the output directory, and what it has."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Made:
    """What the build *build* of *image* has made until it *ended*, which is a time that sorts as text does.

    *origins* are digests of what it was made from, as ``changes`` compares them; None if it did not end well, or an
    older version has made it.
    """

    image: str
    build: str
    ended: str
    files: tuple[File, ...]
    origins: dict[str, dict[str, str]] | None = None


def steps(build: Build) -> Iterator[Step]:
    """Give the step that removes older builds, if not all of them are to stay."""
    if build.plan.settings.keep is not None:
        named = [["#", "remove", str(path)] for path in _paths(build.plan)]
        yield Step("Removing older builds", doing(_remove_older), named)


def _paths(plan: Plan) -> list[Path]:
    """Return what would go now, if it is what was made."""
    kept, older = _sorted(plan)
    names = [name for made in older for name in _own_names(made, kept)]
    return [plan.output_dir / name for name in names if os.path.lexists(plan.output_dir / name)]


def _sorted(plan: Plan) -> tuple[list[Made], list[Made]]:
    """Return the builds before that stay beside the one of *plan*, and those that do not, the newest first."""
    assert plan.settings.keep is not None
    others = sorted(
        (made for made in _all(plan) if made.build != plan.base_name),
        key=lambda made: (made.ended, made.build),
        reverse=True,
    )
    stay = plan.settings.keep - 1
    return others[:stay], others[stay:]


def _all(plan: Plan) -> list[Made]:
    """Return what each build of the image of *plan* has made that has written that down."""
    try:
        paths = sorted(path for path in plan.output_dir.iterdir() if path.name.endswith(RECORD_SUFFIX))
    except OSError:
        return []
    return [made for path in paths if (made := _read(path)) and made.image == plan.image]


def _own_names(made: Made, kept: Sequence[Made]) -> list[str]:
    """Return the names of what *made* has left: its files that are none of a build that is *kept*, then its record."""
    others = {file.name for each in kept for file in each.files}
    return [*(file.name for file in made.files if file.name not in others), f"{made.build}{RECORD_SUFFIX}"]


def _remove_older(state: State) -> None:
    plan = state.build.plan
    kept, older = _sorted(plan)
    now = {path.name for artifact in state.artifacts for path in (artifact.path, *artifact.others)}
    now |= {path.name for path in _logs(plan)}
    for made in older:
        own = {*_own_names(made, kept)} - now
        _remove(plan.output_dir, made, [file for file in made.files if file.name in own])


def _remove(directory: Path, made: Made, its_files: Sequence[File]) -> None:
    """Remove *its_files* and the record of the build *made* from *directory*, all or none where one is in use.

    What is not what it made is the user's, and stays.
    """
    in_use = next((file.name for file in its_files if _is_open(directory / file.name)), None)
    if in_use:
        logger.warning("%s stays until a later build: %s is in use.", made.build, in_use)
        return
    try:
        for file in its_files:
            _remove_file(directory / file.name, file)
        (directory / f"{made.build}{RECORD_SUFFIX}").unlink()
    except OSError as error:
        logger.warning("%s stays until a later build: it can't be removed: %s.", made.build, reason_of(error))


def _open(path: Path) -> int:
    """Return a descriptor of the regular file *path*, OSError if it is none: no link is followed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "It is not a regular file")


def _is_open(path: Path) -> bool:
    """Return whether a process has the file at *path* open: a virtual machine, another build, a server."""
    try:
        descriptor = _open(path)
    except OSError:
        return False
    try:
        # Who opens the file in this moment has us told, by a signal that ends nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        # fcntl(2): it is refused if there is any other descriptor of the file.
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        # Not all filesystems can tell.
        return False
    finally:
        os.close(descriptor)
    return False


def _remove_file(path: Path, made: File) -> None:
    """Remove the file at *path* if it is what was *made*; else say that it stays."""
    try:
        descriptor = _open(path)
    except FileNotFoundError:
        return
    except OSError:
        # A link is none of ours.
        logger.warning("%s is not what was built: it stays.", path)
        return
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        is_ours = status.st_uid == os.geteuid() and status.st_size == made.size
        if is_ours:
            with interrupts.interruptible():
                is_ours = files.digest_of_stream(file) == (made.sha256, made.size)
        # Another may have taken its place meanwhile.
        if is_ours and os.path.samestat(status, path.lstat()):
            path.unlink()
            logger.info("Removed %s", path)
            return
    logger.warning("%s is not what was built: it stays.", path)


# The record of what a build has made.


def _read(path: Path) -> Made | None:
    """Return what the record at *path* says, None if it is not one that this user's builds have written."""
    try:
        descriptor = _open(path)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
            document = json.loads(file.read(_LARGEST_RECORD))
        if document["program"] != "image-factory" or document["version"] != _VERSION:
            return None
        found = tuple(File(each["name"], each["size"], each["sha256"]) for each in document["files"])
        origins = document.get("origins")
        made = Made(document["image"], document["build"], document["ended"], found, origins)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = [made.image, made.build, made.ended, *(text for file in found for text in (file.name, file.sha256))]
    if not all(isinstance(text, str) for text in texts) or f"{made.build}{RECORD_SUFFIX}" != path.name:
        return None
    parts = () if origins is None else origins.values() if isinstance(origins, dict) else (None,)
    if not all(isinstance(each, dict) for each in parts):
        return None
    return made if all(_is_plain(file.name) for file in found) else None


def newest(plan: Plan) -> Made | None:
    """Return what the newest build of the image of *plan* has made, of those that have written that down."""
    return max(_all(plan), key=lambda made: (made.ended, made.build), default=None)


def is_there(plan: Plan, file: File) -> bool:
    """Return whether *file* of a build is in the output directory of *plan*, as far as its size tells."""
    with suppress(OSError):
        status = (plan.output_dir / file.name).lstat()
        return stat.S_ISREG(status.st_mode) and status.st_size == file.size
    return False


def _is_plain(name: str) -> bool:
    """Return whether *name* is that of a file in the directory itself, which is no record and not hidden."""
    return not (not name or "/" in name or "\0" in name or name.startswith(".") or name.endswith(RECORD_SUFFIX))


def _logs(plan: Plan) -> list[Path]:
    """Return where the build of *plan* may write beside its artifacts."""
    paths = [plan.log_path, plan.console_path, plan.junit_path]
    return [path for path in paths if path is not None and path.parent == plan.output_dir]


class Files:
    """An observer that notes what a build makes, and has it written down at the end, when all of it is written."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._logs: list[Path] = []
        self._before: dict[Path, tuple[int, ...]] = {}
        self._published: dict[str, str | None] = {}
        self.origins: dict[str, dict[str, str]] | None = None

    def begin(self, plan: Plan, record: Path | None, *, resume: bool, wanted: bool = False) -> None:
        """Note what is there before the build of *plan*, whose build record is at *record*, writes anything.

        What there is of a build to *resume* is its own.  Nothing is noted unless a setting needs it, or it is *wanted*.
        """
        if plan.settings.keep is None and not wanted:
            return
        self._plan = plan
        self._logs = [*_logs(plan), *([record] if record and record.parent == plan.output_dir else [])]
        self._before = {} if resume else {path: _state(path) for path in self._logs if path != record}

    @property
    def notes(self) -> bool:
        """Whether anything is written down of the build."""
        return self._plan is not None

    def notice(self, event: events.Event) -> None:
        """Note what is published."""
        if isinstance(event, events.Published):
            self._published[event.path.name] = event.sha256
            self._published[f"{event.path.name}.sha256sum"] = None
            self._published |= dict(event.companions)

    def write(self) -> None:
        """Write the record of a build that has published something; one that can't be written is warned of."""
        plan = self._plan
        if plan is None:
            return
        path = plan.output_dir / f"{plan.base_name}{RECORD_SUFFIX}"
        before = _read(path)
        if not self._published and not (before and before.image == plan.image):
            return
        # A build that has failed may have replaced the log of a good one.
        known = {file.name: file for file in before.files} if before and not self._published else {}
        digests = self._published | {found.name: None for found in self._logs if self._is_new(found)}
        try:
            for name, digest in digests.items():
                if file := _file(plan.output_dir / name, digest):
                    known[name] = file
            ended = before.ended if before and not self._published else datetime.now(UTC).isoformat()
            origins = before.origins if before and not self._published else self.origins
            made = Made(plan.image, plan.base_name, ended, tuple(known.values()), origins)
            document: dict[str, Any] = {"program": "image-factory", "version": _VERSION, **asdict(made)}
            # Others who can read the digest of what has a password in it can try passwords.
            files.replace(path, (json.dumps(document, indent=2) + "\n").encode(), mode=0o600)
        except OSError as error:
            logger.warning("Later builds will not remove this one: %s: %s.", path, reason_of(error))

    def _is_new(self, path: Path) -> bool:
        return _state(path) != self._before.get(path, ())


def _state(path: Path) -> tuple[int, ...]:
    """Return what differs when a file is written or replaced, nothing if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _file(path: Path, digest: str | None) -> File | None:
    """Return what is at *path*, None if it is no file any more; it has *digest*, if that is known."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return File(path.name, status.st_size, digest or files.digest_of(path))


@contextmanager
def noting() -> Iterator[Files]:
    """Give what notes the files of a build inside, and have them written down on the way out."""
    found = Files()
    with released(found.write), events.observed(found):
        yield found
