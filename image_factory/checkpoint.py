"""How far a build has come, written down in its working directory, so that --resume can go on there."""

import dataclasses
import datetime
import enum
import errno
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import tasks
from .base import files
from .base.errors import BuildError, ConfigurationError, reason_of
from .base.events import Event, InputUsed
from .base.log import logger, step
from .elements import engine, on_disk
from .elements.engine import BESIDE
from .finishing import copying, firstboot, listing
from .model import DISK_NAME, INVENTORY_NAME, Artifact, Build, Plan
from .outputs import OUTPUTS
from .sources import SOURCES
from .tasks import layers

FILE_NAME = "checkpoint.json"

# random(4): another one each time the machine starts.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# The settings of what the disk is when it is cleaned.
_CLEANING = ("seal", "seal_only", "seal_skip", "copy", "first_boot", "target")
_LATE_TASKS = "tasks_after_cleaning"


class Reached(enum.StrEnum):
    """How far a build has come for good, in this order: each is written down when what it says is done."""

    INSTALLED = "installed"
    APPLIED = "applied"
    TASKED = "tasked"
    CLEANED = "cleaned"
    CONVERTED = "converted"
    PUBLISHED = "published"


_ORDER = tuple(Reached)


@dataclass
class Checkpoint:
    """What is done of a build in *directory*.

    *stage* is None as long as there is no disk, but layers that its source goes on from.
    *inputs* has a digest of each setting that the installed disk depends on, *outputs* of each that the
    artifacts depend on, *uploaded* one of each destination that is served.  *kept* are the names of files that
    stay in the directory when the build ends before its end; *name*, *text_name* and *ident* are the plan's.  *used*
    are the files that the disk was installed from, as InputUsed has them, each with the size and the time of change
    that it had.  *boot* tells the starts of this machine apart: QEMU writes the disk without waiting for the host's.
    """

    directory: Path
    inputs: dict[str, str]
    outputs: dict[str, str]
    date: str
    virt_type: str
    used: list[tuple[str, str, str | None, list[int], str | None]]
    boot: str
    stage: Reached | None = Reached.INSTALLED
    artifacts: list[Artifact] = field(default_factory=list)
    uploaded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=lambda: [FILE_NAME, DISK_NAME, INVENTORY_NAME])
    name: str = ""
    text_name: str = ""
    ident: str = ""

    def is_at(self, stage: Reached) -> bool:
        """Return whether *stage* is done."""
        return self.stage is not None and _ORDER.index(self.stage) >= _ORDER.index(stage)

    def reach(self, stage: Reached, artifacts: list[Artifact] | None = None) -> None:
        """Write down that *stage* is done, and what there is now."""
        self.stage = stage
        self.artifacts = artifacts or []
        self.kept = _kept(self.directory)
        if stage is Reached.CONVERTED:
            self.kept += [path.name for artifact in self.artifacts for path in (artifact.path, *artifact.others)]
        written = self.try_to_write()
        if stage is Reached.TASKED and not written:
            # What tasks have done is written to the disk next, and on that disk they must not run once more.
            raise BuildError("How far the build has come can't be written down.", hint="Free some space.")
        if stage is Reached.PUBLISHED and any(OUTPUTS[artifact.format].takes_disk for artifact in self.artifacts):
            # The disk is the published file now, which others may change.
            (self.directory / DISK_NAME).unlink(missing_ok=True)
            if not written:
                self.forget()

    def inputs_used(self, plan: Plan) -> Iterator[InputUsed]:
        """Give what the disk was installed from; of a file that has changed meanwhile, no path."""
        for key, origin, name, state, verified_by in self.used:
            used = InputUsed(key, origin, Path(name) if name else None, verified_by)
            original = SOURCES[plan.settings.source].original(plan, used)
            if original is None and _state_of(used.path) != state:
                original = dataclasses.replace(used, path=None)
            yield original or used

    def has_served(self, destination: object) -> bool:
        """Return whether *destination*, as it is now, got its files."""
        return _digest(repr(destination).encode()) in self.uploaded

    def serve(self, destination: object) -> None:
        """Write down that *destination* got its files."""
        self.uploaded.append(_digest(repr(destination).encode()))
        self.try_to_write()

    def try_to_write(self) -> bool:
        """Write the file; a full disk is no reason to end the build: return whether it is written."""
        try:
            self.write()
        except OSError as error:
            logger.warning("--resume will not know how far the build has come: %s.", reason_of(error))
            return False
        return True

    def write(self) -> None:
        """Write the file; half of it never replaces an older one."""
        texts = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        del texts["directory"]
        texts["artifacts"] = [
            dataclasses.asdict(artifact) | {"path": str(artifact.path)} for artifact in self.artifacts
        ]
        # URIs may have a password, and others get through the working directory of root's builds.
        files.replace(self.directory / FILE_NAME, json.dumps(texts).encode(), mode=0o600)

    def forget(self) -> None:
        """Remove the file: there is nothing to resume any more."""
        (self.directory / FILE_NAME).unlink(missing_ok=True)


class InputsUsed:
    """An observer that keeps what a disk is installed from, with the state that it has then."""

    def __init__(self) -> None:
        self.found: list[tuple[InputUsed, list[int]]] = []

    def notice(self, event: Event) -> None:
        """Keep *event* if it is one."""
        if isinstance(event, InputUsed):
            self.found.append((event, _state_of(event.path)))


def _kept(directory: Path) -> list[str]:
    """Return the names of the files of any build that goes on from a disk in *directory*."""
    made = engine.beside(directory)
    return [FILE_NAME, DISK_NAME, INVENTORY_NAME, *([BESIDE, *(path.name for path in made)] if made else [])]


def begin(build: Build, used: InputsUsed, stage: Reached | None = Reached.INSTALLED) -> Checkpoint:
    """Write the checkpoint of a *build* whose disk has just been installed from what it has *used*.

    With the *stage* None there is no disk yet, but layers.
    """
    plan = build.plan
    found = Checkpoint(
        build.directory,
        inputs_of(plan, [event for event, _ in used.found]),
        outputs_of(plan),
        plan.date.isoformat(),
        build.virt_type,
        [
            (event.key, event.origin, str(event.path) if event.path else None, state, event.verified_by)
            for event, state in used.found
        ],
        _BOOT_ID.read_text(),
        stage,
        name=plan.base_name,
        text_name=plan.text_name,
        ident=plan.ident,
        kept=_kept(build.directory),
    )
    found.try_to_write()
    return found


def read(directory: Path) -> Checkpoint | None:
    """Return the checkpoint in the working *directory*, None if there is none that can be used."""
    try:
        texts: dict[str, Any] = json.loads(_read_own(directory / FILE_NAME))
        artifacts = [_artifact(entry) for entry in texts.pop("artifacts")]
        stage = texts.pop("stage")
        found = Checkpoint(directory, stage=None if stage is None else Reached(stage), artifacts=artifacts, **texts)
        datetime.date.fromisoformat(found.date)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not _is_sound(found):
        return None
    there = found.stage is None or found.is_at(Reached.CONVERTED) or (directory / DISK_NAME).is_file()
    return found if there else None


def _artifact(entry: dict[str, Any]) -> Artifact:
    companions = tuple((name, digest) for name, digest in entry.get("companions", ()))
    return Artifact(**entry | {"path": Path(entry["path"]), "companions": companions})


def _read_own(path: Path) -> str:
    """Return the text of a file of ours; OSError if it is something else, of someone else."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return file.read()


def _is_sound(found: Checkpoint) -> bool:
    """Return whether each value is of its kind: someone may have edited the file."""

    def are_texts(*values: object) -> bool:
        return all(isinstance(value, str) for value in values)

    lists: tuple[object, ...] = (found.used, found.uploaded, found.kept)
    return (
        all(isinstance(value, dict) for value in (found.inputs, found.outputs))
        and all(isinstance(value, list) for value in lists)
        and are_texts(found.name, found.text_name, found.ident, found.virt_type, found.boot)
        and are_texts(*found.uploaded, *found.kept)
        and not any("/" in name for name in found.kept)
        and all(
            isinstance(entry, list) and len(entry) == 5 and are_texts(*entry[:2], entry[2] or "", entry[4] or "")
            for entry in found.used
        )
        and all(
            are_texts(artifact.format, artifact.sha256, *itertools.chain(*artifact.companions))
            and artifact.format in OUTPUTS
            and isinstance(artifact.virtual_size, int)
            and not any("/" in name for name, _ in artifact.companions)
            for artifact in found.artifacts
        )
    )


def resumed(plan: Plan, directory: Path) -> Checkpoint:
    """Return the checkpoint in the working *directory*; ConfigurationError if *plan* can't go on from it."""
    found = read(directory)
    if found is None:
        raise nothing_to_resume(plan)
    changed = _changed(found.inputs, inputs_of(plan))
    if changed == ["tasks"] and not found.is_at(Reached.PUBLISHED) and any(layers.all_in(directory)):
        # The disk is made once more, of the layers of those that have not changed.
        found.stage, found.artifacts, found.uploaded = None, [], []
        found.inputs = inputs_of(plan)
    elif changed:
        raise ConfigurationError(
            f"[{plan.image}] {' and '.join(changed)} changed since the disk was installed.",
            hint="Build it without --resume, or take the change back.",
        )
    changed = _changed(found.outputs, outputs_of(plan))
    if "tasks" in changed and found.is_at(Reached.TASKED):
        if not layers.are_unwritten(directory):
            raise ConfigurationError(
                f"[{plan.image}] tasks changed since they were carried out, and the disk has what they have done.",
                hint="Build it without --resume, or take the change back.",
            )
        found.stage = Reached.APPLIED
    applied = [key for key in changed if key in on_disk.KEYS]
    if applied and found.is_at(Reached.APPLIED):
        raise ConfigurationError(
            f"[{plan.image}] {' and '.join(applied)} changed since elements were applied to the disk.",
            hint="Build it without --resume, or take the change back.",
        )
    cleaning = [key.replace("_", "-") for key in changed if key in (*_CLEANING, _LATE_TASKS)]
    if cleaning and found.is_at(Reached.CLEANED):
        # Sealing can't put back what it has taken from the disk, nor is what was copied taken out again.
        raise ConfigurationError(
            f"[{plan.image}] {' and '.join(cleaning)} changed since the disk was cleaned.",
            hint="Build it without --resume, or take the change back.",
        )
    reason = None
    if found.is_at(Reached.CONVERTED):
        reason = _why_others(found, plan)
        if reason:
            logger.info("%s: they are made anew.", reason)
            found.stage, found.artifacts, found.uploaded = Reached.CLEANED, [], []
    if found.stage is not None and not found.is_at(Reached.CONVERTED):
        why_not = _why_not_the_disk(found, directory)
        if why_not:
            raise ConfigurationError(
                f"{plan.image} can't be resumed: {'; '.join(filter(None, (reason, why_not)))}.",
                hint="Build it without --resume.",
            )
    found.outputs = outputs_of(plan)
    return found


def nothing_to_resume(plan: Plan) -> ConfigurationError:
    """Return the error for an image of which no build has left something."""
    return ConfigurationError(
        f"There is nothing of {plan.image} to resume in {plan.output_dir}.", hint="Build it without --resume."
    )


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def _why_others(found: Checkpoint, plan: Plan) -> str | None:
    """Return why the artifacts of the checkpoint are not those that *plan* asks for, None if they are."""
    changed = _changed(found.outputs, outputs_of(plan))
    if changed:
        return f"{' and '.join(changed)} changed since the images were made"
    with step("Checking the images"):
        whole = all(_is_whole(artifact) for artifact in found.artifacts)
    return None if whole else "the images are not as they were made"


def _is_whole(artifact: Artifact) -> bool:
    try:
        text = artifact.checksum_path.read_text(encoding="utf-8")
        companions = [(artifact.path.with_name(name), digest) for name, digest in artifact.companions]
        return text.split()[:1] == [artifact.sha256] and all(
            files.digest_of(path) == digest for path, digest in [*companions, (artifact.path, artifact.sha256)]
        )
    except (OSError, ValueError):
        return False


def _why_not_the_disk(found: Checkpoint, directory: Path) -> str | None:
    """Return why nothing can be made from the disk any more, None if it can."""
    disk = directory / DISK_NAME
    if not disk.is_file():
        return "its disk is gone"
    if disk.stat().st_nlink > sum(path.samefile(disk) for path in directory.iterdir()):
        return "its disk is the published image, which may have been used"
    if found.boot != _BOOT_ID.read_text():
        return "this machine was started anew since the installation, and its disk may not be whole"
    return None


def inputs_of(plan: Plan, used: Sequence[InputUsed] = ()) -> dict[str, str]:
    """Return a digest of each setting that makes the disk another one, which its source knows.

    *used* is what it was made from; else the digests are of what it would be made from now.
    """
    source = plan.settings.source
    return {"source": _digest(source.encode())} | SOURCES[source].identity(plan, used)


def outputs_of(plan: Plan) -> dict[str, str]:
    """Return a digest of each setting that makes the artifacts other ones."""
    settings = plan.settings
    keys = (
        "format",
        "keep_raw",
        "compression",
        "tar_exclude",
        "checksums",
        "manifest",
        "manifest_text",
        "provenance",
        "sign_key",
        *_CLEANING,
    )
    texts = {key: repr(getattr(settings, key)) for key in keys}
    if settings.manifest_text:
        # It says where the images are uploaded to.
        texts["manifest_text"] += repr(listing.places(plan))
    # What the files have, too.
    texts["copy"] += "".join(copying.identity(plan))
    texts["first_boot"] += "".join(firstboot.identity(plan))
    found = {key: _digest(text.encode(errors="surrogateescape")) for key, text in texts.items()}
    found |= {key: _digest(text) for key, text in on_disk.identity(plan).items()}
    if plan.late_tasks:
        found[_LATE_TASKS] = tasks.digest_with_secrets(plan.late_tasks)
    if plan.tasks and tasks.place(plan) == "guest":
        found["tasks"] = layers.digests(plan)[-1]
    return found


def _state_of(path: Path | None) -> list[int]:
    try:
        status = path.stat() if path else None
    except OSError:
        status = None
    return [status.st_size, status.st_mtime_ns] if status else []


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
