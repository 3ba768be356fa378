"""Copy the user's files into a system: the mounted one, without anything of it being run, or where a task runs.

All is read and checked first, what is in the image too, and written then.
"""

import dataclasses
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from ..base import events, files, interrupts
from ..base.errors import BuildError, ConfigurationError, reason_of
from ..base.log import logger
from ..base.units import format_size
from ..configuration.parsers import Copy
from ..configuration.settings import Task
from ..model import Build, Entry, Placed, Plan
from ..parts import Step, on_tree
from ..sources import answers
from ..system.rehearsal import Call
from ..system.tree import Tree
from ..tasks.copies import told

KEY = "copy"

# As image-factory-sudo-helper takes them.
_LEVELS = 200
_LONGEST_PATH = 4096
_MOST_ITEMS = 100_000
# As the kernel follows them.
_LINKS = 40
_NOBODY = (1 << 32) - 1
_PIECE = 1 << 20
_DIRECTORY_MODE = 0o755
_ACCOUNTS = ("etc/passwd", "etc/group")


@dataclass(frozen=True)
class Item:
    """What is to be at *path* of the image, as the user writes that; *kind* is ``file``, ``directory`` or ``link``.

    *owner* and *group* are names or numbers.  A file has what is in *source*, which has *state*, or *data*.
    """

    path: str
    kind: str
    mode: int = _DIRECTORY_MODE
    owner: str = "root"
    group: str = "root"
    target: str = ""
    source: Path | None = None
    state: tuple[int, ...] = ()
    data: bytes = field(default=b"", repr=False)


class Target(Protocol):
    """A system that something is copied into, as ``Tree`` has it."""

    def look(self, paths: Sequence[str]) -> dict[str, Entry]:
        """Return those of *paths* that are there, links with where they lead to."""

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        """Return the regular files of at most 1 MiB at *patterns*, by their paths."""

    def put(self, items: Sequence[Placed], contents: Path) -> None:
        """Make *items*, whose bytes are in the file *contents*."""


@dataclass(frozen=True)
class Wanted:
    """The *copies* that *key* of *plan*, a setting or a task, asks for."""

    plan: Plan
    key: str
    copies: tuple[Copy, ...]

    @property
    def where(self) -> str:
        """How a message names them."""
        return f"[{self.plan.image}] {self.key}"


def of_task(plan: Plan, task: Task) -> Wanted:
    """Return what *task* of *plan* copies."""
    return Wanted(plan, f"task {task.name}", task.copies)


def _of_setting(plan: Plan) -> Wanted:
    return Wanted(plan, KEY, plan.settings.copy)


def check(plan: Plan) -> None:
    """Raise ConfigurationError unless all that is to be copied can be read, and its templates rendered."""
    for wanted in (_of_setting(plan), *(of_task(plan, task) for task in (*plan.tasks, *plan.late_tasks))):
        for item in _items(wanted):
            if item.kind == "file":
                assert item.source is not None
                if not os.access(item.source, os.R_OK):
                    raise ConfigurationError(f"{wanted.where}: {item.source} can't be read.")
                _rendered(wanted, item)


def identity(plan: Plan) -> list[str]:
    """Return what tells what the setting copies apart from something else; what can't be read is left out."""
    return identity_of(_of_setting(plan))


def identity_of(wanted: Wanted) -> list[str]:
    """Return what tells what is *wanted* apart from something else; what can't be read is left out."""
    try:
        return [
            repr((item.path, item.kind, item.mode, item.owner, item.group, item.target, _digest(wanted, item)))
            for item in _items(wanted)
        ]
    except (ConfigurationError, OSError):
        return []


def _digest(wanted: Wanted, item: Item) -> str:
    if item.source is None or item.kind != "file":
        return ""
    text = _rendered(wanted, item)
    return files.digest_of(item.source) if text is None else repr(text)


def templates(copies: Iterable[Copy]) -> Iterator[Path]:
    """Give the templates among what *copies* have copied; what can't be read is left out."""
    for each in copies:
        inside = (Path(where) / name for where, _, names in os.walk(each.path) for name in names)
        yield from filter(_is_template, inside if os.path.isdir(each.path) else [each.path])


def _is_template(path: Path) -> bool:
    return answers.is_template(path) and os.path.isfile(path) and not os.path.islink(path)


def steps(build: Build) -> Iterator[Step]:
    """Give the step on the mounted system, if something is to be copied."""
    copies = build.plan.settings.copy
    if copies:
        named = any(not name.isdigit() and name != "root" for each in copies for name in (each.owner, each.group))
        calls = [Call("look"), *([Call("read", _ACCOUNTS)] if named else []), Call("put")]
        yield Step("Copying files", on_tree(copy_files), told(copies), calls=calls, rehearsed=False)


def copy_files(build: Build, tree: Tree) -> None:
    """Copy what the user names into the system *tree*; BuildError, with nothing written, if a part of it can't be."""
    copy_into(build, tree, _of_setting(build.plan))
    for each in build.plan.settings.copy:
        is_file = os.path.isfile(each.path) and not os.path.islink(each.path)
        events.tell(events.InputUsed(KEY, str(each.path), each.path if is_file else None))


def copy_task(build: Build, target: Target, task: Task) -> None:
    """Copy what *task* names into *target*; BuildError, with nothing written, if a part of it can't be."""
    wanted = of_task(build.plan, task)
    try:
        # What was done is kept as that of the files which there were when the build began.
        if task.given and task.given != "\n".join(identity_of(wanted)):
            raise BuildError(
                f"{wanted.where}: what is copied changed since the build began.",
                hint="Try again when nothing writes to it.",
            )
        copy_into(build, target, wanted)
    except ConfigurationError as error:
        # It could be read before the build.
        raise BuildError(error.message, hint=error.hint) from error


def copy_into(build: Build, target: Target, wanted: Wanted) -> None:
    """Copy what is *wanted* into *target*; BuildError, with nothing written, if a part of it can't be."""
    items = list(_items(wanted))
    put(build, target, items, wanted.key, lambda: list(_items(wanted)) == items)


# What is to be copied.


def _items(wanted: Wanted) -> Iterator[Item]:
    """Give what is to be in the image, directories before what they have; ConfigurationError if it can't be copied."""
    count = 0
    for each in wanted.copies:
        for item in _items_of(wanted, each):
            count += 1
            interrupts.check()
            if count > _MOST_ITEMS:
                raise ConfigurationError(f"{wanted.where}: there are more than {_MOST_ITEMS} files.")
            if len(os.fsencode(item.path)) >= _LONGEST_PATH or item.path.count("/") >= _LEVELS:
                raise ConfigurationError(f"{wanted.where}: {each.source}: a path in it is too long.")
            yield item


def _items_of(wanted: Wanted, each: Copy) -> Iterator[Item]:
    path = each.path
    directory = "/".join(filter(None, each.destination.split("/")))
    whole = each.source.endswith("/")
    try:
        status = path.stat() if whole else path.lstat()
        if whole and not stat.S_ISDIR(status.st_mode):
            raise ConfigurationError(
                f"{wanted.where}: {path} is no directory.", hint="Write it without a slash at its end."
            )
        name = path.name
        if stat.S_ISREG(status.st_mode):
            name = answers.installer_name(path)
        if each.destination.endswith("/") and not whole:
            directory = _joined(directory, name)
        yield from _walked(wanted, each, path, status, directory)
    except OSError as error:
        shown = error.filename or path
        raise ConfigurationError(f"{wanted.where}: {shown} can't be read: {error.strerror}.") from error


def _walked(wanted: Wanted, each: Copy, path: Path, status: os.stat_result, target: str) -> Iterator[Item]:
    kind = _kind(wanted, path, status)
    mode = stat.S_IMODE(status.st_mode) & 0o777 if each.mode is None else each.mode
    if kind == "link":
        yield Item(target, kind, 0o777, each.owner, each.group, os.readlink(path), path, _state(status))
    elif kind == "file":
        yield Item(target, kind, mode, each.owner, each.group, "", path, _state(status))
    else:
        # Who may read the files of a directory may enter it.
        mode = mode if each.mode is None else mode | (mode & 0o444) >> 2
        if target:
            yield Item(target, kind, mode, each.owner, each.group, "", path, _state(status))
        for name in sorted(os.listdir(path)):
            below = path / name
            inner = below.lstat()
            shown = answers.installer_name(below) if stat.S_ISREG(inner.st_mode) else name
            yield from _walked(wanted, each, below, inner, _joined(target, shown))


def _kind(wanted: Wanted, path: Path, status: os.stat_result) -> str:
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    others = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    found = stat.S_IFMT(status.st_mode)
    if found not in kinds:
        raise ConfigurationError(
            f"{wanted.where}: {path} is {others.get(found, 'a device')}.",
            hint="Files, directories and links are copied, and nothing else.",
        )
    return kinds[found]


def _state(status: os.stat_result) -> tuple[int, ...]:
    # Reading a file changes when it was read, and listing a directory, too.
    return status.st_dev, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _joined(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def _rendered(wanted: Wanted, item: Item) -> bytes | None:
    """Return what the template that *item* is becomes, None if it is none."""
    if item.source is None or not answers.is_template(item.source):
        return None
    named = answers.Named(wanted.plan, wanted.key, item.source)
    return answers.rendered(named, named.read(item.source))


# What becomes of it in the image.


def put(
    build: Build, tree: Target, items: Sequence[Item], key: str, unchanged: Callable[[], bool] = lambda: True
) -> None:
    """Have *items*, which *key* of the plan names, in the system *tree*.

    BuildError, with nothing written, if that has something else there, or *unchanged* says after all has been read that
    it was not the same all the time.
    """
    wanted = Wanted(build.plan, key, ())
    where = wanted.where
    placed = _placed(tree, items, where)
    contents = build.directory / "files-to-copy"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        with open(os.open(contents, flags, 0o600), "wb") as file:
            placed = [_with_bytes(wanted, each, item, file) for each, item in placed]
        if not unchanged():
            raise _changed(where)
        tree.put([each for each, _ in placed], contents)
    except BuildError as error:
        if "No space left on device" in error.message:
            raise BuildError(
                f"{where}: the image has no space left for it.", hint="Make its disk larger with image-size."
            ) from error
        raise
    finally:
        contents.unlink(missing_ok=True)
    size = sum(each.size for each, _ in placed)
    logger.info("%s: %d files and directories, %s.", where, len(placed), format_size(size))


def _changed(where: str, path: Path | None = None) -> BuildError:
    return BuildError(
        f"{where}: {path or 'something'} changed while it was copied.", hint="Try again when nothing writes to it."
    )


def _with_bytes(wanted: Wanted, placed: Placed, item: Item | None, contents: IO[bytes]) -> tuple[Placed, Item | None]:
    """Return *placed* with the place of its bytes in the file *contents*, to which they are written."""
    if item is None or item.kind != "file":
        return placed, item
    offset = contents.tell()
    if item.source is None:
        contents.write(item.data)
    elif (text := _rendered(wanted, item)) is not None:
        contents.write(text)
    else:
        _copy_bytes(item, contents, wanted.where)
    return dataclasses.replace(placed, offset=offset, size=contents.tell() - offset), item


def _copy_bytes(item: Item, contents: IO[bytes], where: str) -> None:
    """Write the bytes of the file that *item* is made of to *contents*; BuildError if it is not the same any more."""
    assert item.source is not None
    try:
        descriptor = os.open(item.source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            if _state(os.fstat(descriptor)) != item.state:
                raise _changed(where, item.source)
            left = item.state[3]
            while left and (piece := file.read(min(left, _PIECE))):
                interrupts.check()
                contents.write(piece)
                left -= len(piece)
            if left or _state(os.fstat(descriptor)) != item.state:
                raise _changed(where, item.source)
    except OSError as error:
        if error.filename is None:
            # That is of *contents*.
            raise
        raise BuildError(f"{where}: {reason_of(error)}.") from error


def _placed(tree: Target, items: Sequence[Item], where: str) -> list[tuple[Placed, Item | None]]:
    """Return what is to be made of *items* in the system *tree*, with directories that are missing on the way."""
    ids = _ids(tree, items, where)
    image = _Image(tree, where)
    image.look([item.path for item in items])
    found: dict[str, tuple[Placed, Item | None]] = {}

    def add(placed: Placed, item: Item | None) -> None:
        other = found.get(placed.path)
        if other is not None and other[0].kind != placed.kind:
            raise BuildError(f"{where}: /{placed.path} is to be a {other[0].kind} and a {placed.kind}.")
        if other is None or item is not None:
            # What is named last counts; a directory has been made by then.
            found[placed.path] = (placed, item)

    for item in items:
        path = image.resolved(item)
        for length in range(path.count("/")):
            directory = "/".join(path.split("/")[: length + 1])
            if directory in found or image.entry(directory) is None:
                add(Placed(directory, "directory"), None)
        if item.kind != "directory" or image.entry(path) is None:
            owner, group = ids[item.owner, False], ids[item.group, True]
            add(Placed(path, item.kind, item.mode, owner, group, item.target), item)
    return list(found.values())


class _Image:
    """What is in the system *tree* where something is to be put, with its links followed as the system follows them."""

    def __init__(self, tree: Target, where: str) -> None:
        self._tree, self._where = tree, where
        self._known: dict[str, Entry | None] = {"": Entry("", "directory")}

    def look(self, paths: Iterable[str]) -> None:
        """Look at *paths* and at all directories on the way at once."""
        wanted = {
            "/".join(parts[:length]): None
            for parts in (path.split("/") for path in paths)
            for length in range(1, len(parts) + 1)
        }
        unknown = [path for path in wanted if path not in self._known]
        found = self._tree.look(unknown)
        self._known |= {path: found.get(path) for path in unknown}

    def entry(self, path: str) -> Entry | None:
        """Return what is at *path* itself, None if nothing is."""
        if path not in self._known:
            parent = self.entry(path.rpartition("/")[0])
            if parent is not None and parent.kind == "directory":
                self.look([path])
            else:
                self._known[path] = None
        return self._known[path]

    def resolved(self, item: Item) -> str:
        """Return where in the tree the path of *item* leads to; BuildError if it can't be put there."""
        directory, _, name = item.path.rpartition("/")
        if item.kind == "directory":
            return self._followed(item.path)
        path = _joined(self._followed(directory), name)
        entry = self.entry(path)
        if entry is None or entry.kind == item.kind:
            return path
        hints = {
            "directory": "Write a slash at the end of the destination to have it in that directory.",
            "link": f"It leads to {entry.target}: name that.",
        }
        kind = {"other": "device, a pipe or a socket"}.get(entry.kind, entry.kind)
        raise BuildError(
            f"{self._where}: /{path} of the image is a {kind}, and is to be a {item.kind}.", hint=hints.get(entry.kind)
        )

    def _followed(self, path: str) -> str:
        """Return the directory that *path* means, of which parts at its end may be missing."""
        # What is left to follow, each part with whether a link has it.
        left = [(part, "") for part in path.split("/")] if path else []
        here, links = "", 0
        while left:
            part, link = left.pop(0)
            if part == "..":
                if not here:
                    raise BuildError(f"{self._where}: /{link} of the image is a link that leads out of it.")
                here = here.rpartition("/")[0]
                continue
            here = _joined(here, part)
            entry = self.entry(here)
            if entry is None and link:
                raise BuildError(f"{self._where}: /{link} of the image is a link to something that is not there.")
            if entry is not None and entry.kind == "link":
                links += 1
                if links > _LINKS:
                    raise BuildError(f"{self._where}: /{path} of the image leads through links without an end.")
                parts = [(part, here) for part in entry.target.split("/") if part not in ("", ".")]
                left = [*parts, *left]
                here = "" if entry.target.startswith("/") else here.rpartition("/")[0]
            elif entry is not None and entry.kind != "directory":
                raise BuildError(f"{self._where}: /{here} of the image is no directory.")
        return here


def _ids(tree: Target, items: Sequence[Item], where: str) -> dict[tuple[str, bool], int]:
    """Return the numbers of the users and groups of *items*, by their names and whether it is a group."""
    wanted = {(item.owner, False): None for item in items} | {(item.group, True): None for item in items}
    names = [(name, is_group) for name, is_group in wanted if not name.isdigit() and name != "root"]
    accounts = tree.read(_ACCOUNTS) if names else {}
    found = {("root", False): 0, ("root", True): 0}
    for path, is_group in ((_ACCOUNTS[0], False), (_ACCOUNTS[1], True)):
        for line in accounts.get(path, b"").decode(errors="replace").split("\n"):
            name, *fields = line.split(":")
            if len(fields) > 2 and fields[1].isdecimal():
                found.setdefault((name, is_group), int(fields[1]))
    found |= {(name, is_group): int(name) for name, is_group in wanted if name.isdigit()}
    for name, is_group in wanted:
        number = found.get((name, is_group))
        if number is None:
            what = "group" if is_group else "user"
            raise BuildError(
                f"{where}: the image has no {what} {name}.",
                hint=f"Name one of /{_ACCOUNTS[is_group]} of the image, or its number.",
            )
        if number >= _NOBODY:
            raise BuildError(f"{where}: {name} is no number of a user or a group.")
    return {key: found[key] for key in wanted}
