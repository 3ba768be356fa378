"""The build record: a JSON document for machines, which data/build-record.schema.json describes."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import stat
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..base import command, events, files, log
from ..base.errors import (
    BuildError,
    CommandError,
    ConfigurationError,
    ImageFactoryError,
    Interrupted,
    without_passwords,
)
from ..configuration.settings import declarations
from ..model import Plan
from ..system.privileged import HELPER

SCHEMA_VERSION = 1

# For all answers together.  They are asked for long before, but for a build that fails at once.
_ANSWER_SECONDS = 2.0

# What they accept holds no secret.  Other texts may, so of those only a digest is told.
_SETTINGS_WITHOUT_SECRETS = (
    "source", "target", "format", "mount-via", "compression", "virt-type", "max-parallel", "install-timeout",
    "stall-timeout", "seal-only", "seal-skip", "audit-skip", "test-boot-timeout",
    "test-boot-matrix",
)  # fmt: skip

# These have no option for that.
_WITHOUT_VERSION = (
    "arch-test", "debugfs", "dumpe2fs", "e2fsck", "fuse2fs", "mke2fs", "newuidmap", "sh", "tune2fs", "zerofree",
)  # fmt: skip
_VERSION = re.compile(r"[0-9]+(?:\.[0-9]+)+[-+~.\w]*")


@dataclass
class _Span:
    """A step, or a phase of one."""

    name: str
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    start: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    failed: bool = False
    error: BaseException | None = None
    phases: "list[_Span]" = field(default_factory=list)

    def end(self, seconds: float, *, failed: bool, error: BaseException | None = None) -> None:
        self.seconds, self.failed, self.error = seconds, failed, error
        if self.phases:
            self.phases[-1].end(time.monotonic() - self.phases[-1].start, failed=failed)

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "started": iso(self.started),
            "seconds": _rounded(self.seconds or 0.0),
            "outcome": "failed" if self.failed else "done",
        }


class Record:
    """An observer that notes what happens in the build of *image*, and makes a document of it.

    *resumed* and *until* are what --resume and --until say.
    """

    def __init__(self, image: str, *, resumed: bool = False, until: str | None = None) -> None:
        self._image = image
        self._resumed = resumed
        self._until = until
        self._whole = _Span("")
        self._plan: Plan | None = None
        self._virt_type: str | None = None
        self._inputs: list[tuple[events.InputUsed, command.Query | None]] = []
        self._programs: dict[str, command.Query | None] = {}
        self._with_helper = False
        self._steps: list[_Span] = []
        self._audit: dict[str, Any] | None = None
        self._sealed: list[dict[str, Any]] = []
        self._tasks: list[dict[str, Any]] = []
        self._artifacts: list[dict[str, Any]] = []
        self._test_boots: list[events.BootTested] = []
        self._difference: dict[str, Any] | None = None
        self._if_changed: dict[str, Any] | None = None
        self._warnings: list[str] = []
        self._failure: dict[str, Any] | None = None

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Note the events and warnings inside."""
        with log.noting_warnings(self._warnings), events.observed(self):
            yield

    def plan_made(self, plan: Plan) -> None:
        """Note what is to be built."""
        self._plan = plan

    def plan_checked(self, plan: Plan, programs: Sequence[str]) -> None:
        """Ask *programs*, which *plan* needs, for their versions while the build begins."""
        asked = {name: _version_argv(name) for name in programs}
        # libvirt itself would be slow to tell where KVM doesn't work: it tries that at each query.
        asked["libvirtd"] = ["libvirtd", "--version"]
        self._programs = {name: command.Query(argv) if argv else None for name, argv in asked.items()}
        self._with_helper = plan.settings.mount_via in ("loop", "fuse")

    def notice(self, event: events.Event) -> None:
        """Note *event* if the record has a place for it."""
        match event:
            case events.StepStarted():
                self._steps.append(_Span(event.name))
            case events.StepEnded():
                under_way = [step for step in self._steps if step.seconds is None and step.name == event.name]
                for step in under_way[-1:]:
                    step.end(event.seconds, failed=event.failed, error=event.error)
            case events.PhaseStarted():
                for step in [step for step in self._steps if step.seconds is None][-1:]:
                    if step.phases:
                        step.phases[-1].end(time.monotonic() - step.phases[-1].start, failed=False)
                    step.phases.append(_Span(event.name))
            case events.InputUsed():
                self._inputs.append((event, None if event.path is None else _digest_of(event.path)))
            case events.VirtTypeChosen():
                self._virt_type = event.name
            case events.Audited():
                self._audit = {
                    "artifact": event.artifact,
                    "checks": list(event.checks),
                    "findings": [{"check": check, "message": message} for check, message in event.findings],
                    "unsearched": list(event.unsearched),
                }
            case events.Sealed():
                self._sealed.append(dataclasses.asdict(event))
            case events.TaskEnded():
                self._tasks.append(dataclasses.asdict(event) | {"seconds": _rounded(event.seconds)})
            case events.Published():
                self._artifacts.append(_artifact(event, self._plan))
            case events.BootTested():
                self._test_boots.append(event)
            case events.Compared():
                self._difference = event.difference
            case events.ChangesSought():
                self._if_changed = dataclasses.asdict(event) | {"builds": event.builds}

    def fail(self, error: BaseException, message: str, hint: str | None, exit_status: int) -> None:
        """Note that the build ends with *error*, and what the user is told of it."""
        # Steps of the clean-up come after it, and may fail too; and one may have failed that could be done without.
        reasons = list(_chain(error))
        failed = [step.name for step in self._steps if any(step.error is reason for reason in reasons)]
        self._failure = {
            "kind": _kind(error),
            "message": log.printable(message),
            "hint": hint and log.printable(hint),
            "exit_status": exit_status,
            "step": failed[-1] if failed else None,
            "command": {"argv": without_passwords(error.argv), "status": error.status}
            if isinstance(error, CommandError)
            else None,
        }

    def text(self) -> str:
        """Return the document of the build, which ends here; for one call."""
        seconds = time.monotonic() - self._whole.start
        ended = datetime.now(UTC)
        deadline = time.monotonic() + _ANSWER_SECONDS
        inputs = [(event, _answer(query, deadline)) for event, query in self._inputs]
        versions = {name: _answer(query, deadline) for name, query in self._programs.items()}
        settings = self._plan and settings_of(self._plan)
        document = {
            "schema_version": SCHEMA_VERSION,
            "program": "image-factory",
            "version": __version__,
            "image": self._image,
            "resumed": self._resumed,
            "until": self._until,
            "started": iso(self._whole.started),
            "ended": iso(ended),
            "seconds": _rounded(seconds),
            "host": {"architecture": platform.machine(), "virt_type": self._virt_type},
            "inputs": [
                {
                    "key": event.key,
                    "origin": without_secrets(event.origin),
                    "sha256": answer and answer.split()[0],
                    "verified_by": event.verified_by,
                }
                for event, answer in inputs
            ],
            "settings": settings and public(settings),
            "settings_sha256": settings and _digest(settings),
            "programs": {
                "python": platform.python_version(),
                # The checks have asked it, and refuse another version.
                **({HELPER: __version__} if self._with_helper else {}),
                **{name: _version_in(answer) for name, answer in versions.items()},
            },
            "steps": [
                step.document() | {"phases": [phase.document() for phase in step.phases]} for step in self._steps
            ],
            "audit": self._audit,
            "tasks": self._tasks,
            "sealed": self._sealed,
            "test_boots": [dataclasses.asdict(boot) | {"seconds": _rounded(boot.seconds)} for boot in self._test_boots],
            "artifacts": self._artifacts,
            "difference": self._difference,
            "if_changed": self._if_changed,
            "warnings": self._warnings,
            "failure": self._failure,
        }
        # In ASCII no control character reaches a terminal.
        return json.dumps(shown(document), indent=2) + "\n"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Give *error*, and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def iso(moment: datetime) -> str:
    """Return *moment* as the record has it."""
    return moment.isoformat(timespec="milliseconds")


def _rounded(seconds: float) -> float:
    return round(seconds, 3)


def _answer(query: command.Query | None, deadline: float) -> str | None:
    return None if query is None else query.answer(deadline)


def _version_argv(program: str) -> list[str] | None:
    """Return what tells the version of *program*; None for the user's own, which may do anything when it is run."""
    if program in _WITHOUT_VERSION:
        return ["dpkg-query", "--show", "--showformat", "${Version}", command.PACKAGES[program]]
    if program in ("ssh", "ssh-keygen"):
        # The latter has no option for that, and is of the same package.
        return ["ssh", "-V"]
    return [program, "--version"] if program in command.PACKAGES else None


def _version_in(answer: str | None) -> str | None:
    match = _VERSION.search(answer or "")
    return match and match[0]


def _digest_of(path: Path) -> command.Query | None:
    """Have the file that is at *path* now digested, whatever takes its place; None if it is no file."""
    try:
        # O_NONBLOCK: a named pipe would be waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return command.Query(["sha256sum"], descriptor) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)


def _artifact(event: events.Published, plan: Plan | None) -> dict[str, Any]:
    # Now: a command of the user's may take it elsewhere.
    status = None
    with contextlib.suppress(OSError):
        status = event.path.stat()
    return {
        "path": str(event.path),
        "format": event.format,
        "virtual_size": event.virtual_size,
        "size": status and status.st_size,
        "size_on_disk": status and status.st_blocks * 512,
        "sha256": event.sha256,
        "companions": [{"name": name, "sha256": digest} for name, digest in event.companions],
        "upload": event.upload and plan is not None and bool(plan.settings.upload_destinations),
    }


def _kind(error: BaseException) -> str:
    match error:
        case Interrupted() | KeyboardInterrupt():
            return "interrupted"
        case ConfigurationError():
            return "configuration"
        case ImageFactoryError() | OSError():
            return "build"
    return "internal"


def settings_of(plan: Plan) -> dict[str, Any]:
    """Return the settings of *plan* by key, as JSON has them."""
    settings = dataclasses.asdict(plan.settings)
    values = {key: settings[key.replace("-", "_")] for key, _ in declarations(type(plan.settings))}
    # JSON has no infinity.
    finite = {key: "none" if value == math.inf else value for key, value in values.items()}
    decoded: dict[str, Any] = json.loads(json.dumps(finite, default=str, allow_nan=False))
    return decoded


def public(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of *settings* that hold no secret."""
    return {key: value for key, value in settings.items() if _is_public(key, value)}


def _is_public(key: str, value: object) -> bool:
    return isinstance(value, int | float) or (value is not None and key in _SETTINGS_WITHOUT_SECRETS)


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def without_secrets(origin: str) -> str:
    """Return *origin*, a path or a URI, without the user, password and query that a URI may have."""
    try:
        parts = urllib.parse.urlsplit(origin)
    except ValueError:
        return origin.rpartition("@")[2]
    if "://" not in origin or not parts.scheme:
        return origin
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def shown(value: Any) -> Any:
    """Return *value* without secrets, and with each byte that was no UTF-8 as ``\\xNN``, as some readers need it."""
    match value:
        case str():
            return log.masked(value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
        case list():
            return [shown(item) for item in value]
        case dict():
            return {shown(key): shown(item) for key, item in value.items()}
    return value


def prepared(file: str) -> Path:
    """Return where the record in *file* is to be, free of an older one; ConfigurationError if it can't be there."""
    if os.path.islink(file) and os.lstat(file).st_uid not in (0, os.geteuid()):
        # The kernel refuses to follow it in /tmp, where its owner could choose what is removed.
        raise ConfigurationError(f"--json: {file} is another user's link.", hint="Take another directory.")
    # A link stays one, as with a shell's ``>``.
    path = Path(os.path.realpath(file))
    try:
        if path.exists() and not path.is_file():
            raise ConfigurationError(f"--json: {file} is not a file.", hint="'--json -' writes to stdout.")
        probe = files.unfinished(path)
        probe.touch(exist_ok=False)
        probe.unlink()
        # A build that is killed writes none, and the older one is not its own.
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--json: {file} can't be written: {error.strerror}.") from error
    return path


def write(path: Path, text: str, what: str = "The build record") -> None:
    """Write *text*, which is *what*, to *path*, all of it or BuildError."""
    try:
        files.replace(path, text.encode())
    except OSError as error:
        raise BuildError(f"{what} {path} can't be written: {error.strerror}.") from error
