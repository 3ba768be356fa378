"""The index of what was published at a destination, for programs that look for the newest image."""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..base import interrupts, locks, scratch
from ..base.errors import BuildError, ConfigurationError, command_line
from ..base.log import logger
from ..configuration.settings import Destination
from ..model import Artifact, Plan
from . import READERS, UPLOADS, streams
from .tries import Alone, FailedTry, persist, try_all

NAME = "index.json"
STREAMS = f"{streams.DIRECTORY}/{streams.PRODUCTS}"
_VERSION = 1
# The second names the first.
_STREAMS = (streams.PRODUCTS, streams.INDEX)
# Another machine may have written it between our reading and writing: how often that is tried again.
_WRITES = 5
_WAIT_SECONDS = 0.2
# The names that a build may give its files.
_PLAIN = re.compile(r"[A-Za-z0-9_+~@][A-Za-z0-9._+~@ -]*")
# What a dry run shows, as only the index has the names.
_OLDER = "OLDER-FILE"


def commands(destination: Destination) -> list[list[str]]:
    """Return the commands that read the index and write it anew."""
    return [
        READERS[destination.type].read_argv(destination, NAME),
        *UPLOADS[destination.type].commands(destination, Alone(Path(NAME), "json", 0)),
    ]


def streams_commands(destination: Destination) -> list[list[str]]:
    """Return the commands that read the index and what is made of it, and write that anew."""
    reader, there = READERS[destination.type], _there(destination)
    return [
        *(reader.read_argv(there, name) for name in _STREAMS),
        reader.read_argv(destination, NAME),
        *(
            argv
            for name in _STREAMS
            for argv in UPLOADS[destination.type].commands(there, Alone(Path(name), "json", 0))
        ),
    ]


def update(plan: Plan, destination: Destination, artifacts: Sequence[Artifact]) -> list[str]:
    """Have *artifacts* of *plan* in the index at *destination*; BuildError if that is not possible.

    Return the names of the files that it does not have any more, as their builds are too old to stay.
    """
    entry = _entry(plan, destination, artifacts)
    gone: list[dict[str, Any]] = []
    with _alone(plan) as directory:
        for _ in range(_WRITES):
            before = _read(destination, NAME)
            data = merged(before, entry, destination.section, destination.keep)
            # Another machine may have written the old ones once more, and they go from that too.
            gone += older(_images(before or b"") or [], entry, destination.keep)
            _write(destination, directory / NAME, data)
            after = _read(destination, NAME)
            if _has(after, entry):
                return files_of(gone, _images(after or b"") or [], destination.section)
        raise BuildError(f"others write {NAME} there all the time")


def update_streams(plan: Plan, destination: Destination) -> None:
    """Have simplestreams of the index at *destination* below it; BuildError if that is not possible.

    Whoever has written the index last has also read it last, so that in the end all of it is in them.
    """
    there = _there(destination)
    with _alone(plan) as directory:
        for name in _STREAMS:
            found = _read(there, name)
            if found is not None and not streams.is_own(name, found):
                raise _not_ours(f"{streams.DIRECTORY}/{name}", destination.section, "yes")
        data = _read(destination, NAME)
        for _ in range(_WRITES):
            made = streams.made_of(_images_of(data, destination.section))
            for name in _STREAMS:
                _write(there, directory / name, made[name])
            written, data = data, _read(destination, NAME)
            if data == written:
                return
        raise BuildError(f"others write {NAME} there all the time")


def _there(destination: Destination) -> Destination:
    return READERS[destination.type].below(destination, streams.DIRECTORY)


@contextlib.contextmanager
def _alone(plan: Plan) -> Iterator[Path]:
    """Give a directory for what is written while no other build with the output directory of *plan* does so."""
    try:
        with _one_at_a_time(plan.output_dir), scratch.directory() as directory:
            yield directory
    except BuildError as error:
        # What could be uploaded by hand is gone.
        hint = (error.hint or "").partition("To upload it by hand")[0].strip()
        raise BuildError(error.message, hint=hint or None) from error


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Let no other build with the output *directory* update an index inside."""
    with interrupts.interruptible():
        while (descriptor := locks.lock(directory)) is None:
            time.sleep(_WAIT_SECONDS)
    try:
        yield
    finally:
        os.close(descriptor)


def _write(destination: Destination, path: Path, data: bytes) -> None:
    """Write *data* to *path*, and upload that."""
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    UPLOADS[destination.type].upload(destination, Alone(path, "json", len(data), sha256=digest))


def _read(destination: Destination, name: str) -> bytes | None:
    """Return the file *name* that is there, None if there is none."""
    found: bytes | None = None
    reader = READERS[destination.type]

    def attempt(failed: FailedTry | None) -> None:
        nonlocal found
        found = reader.read(destination, name)

    persist(destination, Alone(Path(name), "json", 0), attempt, command_line(reader.read_argv(destination, name)))
    return found


def _entry(plan: Plan, destination: Destination, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    settings = plan.settings
    others = artifacts if destination.index == "simplestreams" else ()
    return {
        "name": plan.image,
        "build": plan.base_name,
        "date": plan.date.isoformat(),
        "distribution": settings.distribution,
        "release": settings.release,
        "architecture": settings.arch,
        "firmware": settings.firmware,
        "files": [
            {
                "path": artifact.path.name,
                "format": artifact.format,
                "size": artifact.path.stat().st_size,
                "virtual_size": artifact.virtual_size,
                "sha256": artifact.sha256,
                "companions": [path.name for path in artifact.others],
                **({"fingerprints": found} if (found := streams.fingerprints(artifact, others)) else {}),
            }
            for artifact in artifacts
        ],
    }


def _images(data: bytes) -> list[dict[str, Any]] | None:
    """Return the images of the index *data*, None if it is no index of ours."""
    try:
        document = json.loads(data)
        images = document["images"]
        if document["program"] != "image-factory" or document["version"] != _VERSION or not isinstance(images, list):
            return None
        known = all(isinstance(each[key], str) for each in images for key in ("name", "build", "date"))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return images if known else None


def _images_of(data: bytes | None, section: str) -> list[dict[str, Any]]:
    """Return the images of the index *data* at *section*, which may not be there; BuildError if it is not ours."""
    images = [] if data is None else _images(data)
    if images is None:
        raise _not_ours(NAME, section, "no")
    return images


def _not_ours(name: str, section: str, instead: str) -> BuildError:
    return BuildError(
        f"{name} at {section} is not one of image-factory",
        hint=f"Have it renamed there, or set upload-index = {instead}.",
    )


def _key(entry: dict[str, Any]) -> tuple[str, str]:
    return entry["name"], entry["build"]


def merged(data: bytes | None, entry: dict[str, Any], section: str, keep: int | None = None) -> bytes:
    """Return the index *data* with *entry*, in the place of a build whose files had the same names.

    The newest of a name comes first, and is the latest; *keep* builds of the name of *entry* stay, all if it is None.
    BuildError if *data* is no index of ours.
    """
    images = _images_of(data, section)
    gone = {_key(entry), *map(_key, older(images, entry, keep))}
    others = [each for each in images if _key(each) not in gone]
    # Of those of one day it is the newest.
    images = sorted([entry, *others], key=lambda each: each["date"], reverse=True)
    images.sort(key=lambda each: each["name"])
    newest = {each["name"]: each for each in reversed(images)}
    told = [{**each, "latest": each is newest[each["name"]]} for each in images]
    document = {"program": "image-factory", "version": _VERSION, "images": told}
    return (json.dumps(document, indent=2) + "\n").encode("ascii")


def older(images: Sequence[dict[str, Any]], entry: dict[str, Any], keep: int | None) -> list[dict[str, Any]]:
    """Return those of *images* that are older builds than the *keep* newest of the image of *entry*, which is one."""
    if keep is None:
        return []
    own = [each for each in images if each["name"] == entry["name"] and _key(each) != _key(entry)]
    own.sort(key=lambda each: each["date"], reverse=True)
    stay = [*dict.fromkeys(map(_key, own))][: keep - 1]
    return [each for each in own if _key(each) not in stay]


def files_of(gone: Sequence[dict[str, Any]], images: Sequence[dict[str, Any]], section: str) -> list[str]:
    """Return the names of files of the builds *gone* that can be removed: none that one of *images* may mean."""
    stay = {NAME, *(text.rpartition("/")[2] for text in _texts(images))}
    found: list[str] = []
    for name in _named(gone):
        if not _PLAIN.fullmatch(name):
            logger.warning("%r, which %s at %s had, is no name of a file of ours: it stays.", name, NAME, section)
        elif name not in stay:
            found.append(name)
    return found


def _named(images: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of all files of the builds *images*, once each."""
    found: dict[str, None] = {}
    for image in images:
        files = image.get("files")
        for file in files if isinstance(files, list) else []:
            names = [file.get("path"), *_listed(file.get("companions"))] if isinstance(file, dict) else []
            found |= dict.fromkeys(name for name in names if isinstance(name, str))
    return [*found]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(document: Any) -> Iterator[str]:
    """Give all texts that are anywhere in *document*: whatever an index of another version calls its files."""
    left = [document]
    while left:
        each = left.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, (list, dict)):
            left += each.values() if isinstance(each, dict) else each


def removing(destination: Destination) -> list[list[str]]:
    """Return the commands that remove a file of an older build."""
    return READERS[destination.type].removing(destination, [_OLDER])


def remove(destination: Destination, names: Sequence[str]) -> None:
    """Remove the files *names* of *destination*, which no index has any more; what may be left is warned of."""
    left = [*names]

    def attempt(failed: FailedTry | None) -> None:
        nonlocal left
        failures = READERS[destination.type].remove(destination, left)
        left = [*failures]
        # One that may pass is worth another try of all.
        for failure in sorted(failures.values(), key=lambda failure: not failure.again)[:1]:
            raise failure

    try:
        if names:
            try_all(attempt, f"Removing older builds at {destination.section}")
    except (FailedTry, BuildError, ConfigurationError) as error:
        reason = error.reason if isinstance(error, FailedTry) else error.message
        logger.warning(
            "These files of older builds may be left at %s, and are not in %s any more: %s: %s",
            destination.section, NAME, ", ".join(left), reason,
        )  # fmt: skip
    for name in names:
        if name not in left:
            logger.info("Removed %s at %s", name, destination.section)


def _has(data: bytes | None, entry: dict[str, Any]) -> bool:
    if any(each | entry == each for each in _images(data or b"") or []):
        return True
    logger.warning("%s was replaced by another build: trying again.", NAME)
    return False
