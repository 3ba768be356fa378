"""Upload with rclone: object stores, WebDAV, SFTP, and what else it has; verified by its own check."""

import configparser
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base import command, log
from ..base.errors import BuildError, CommandError, ConfigurationError, command_line
from ..base.files import check_readable
from ..base.log import logger
from ..configuration.settings import Destination
from ..model import Artifact
from . import credentials, tries
from .tries import FailedTry, files_of, persist

KEYS: tuple[str, ...] = ("upload-credentials", "upload-tls", "upload-verify", "upload-index", "upload-keep")

_PART = ".part"
_STATS = ("--stats", "1s", "--stats-one-line", "--stats-log-level", "NOTICE")
_PROGRESS = re.compile(r"\S+ \S+ NOTICE: +[0-9.]+ \w+ / [0-9.]+ \w+, (?:([0-9]{1,3})%|-), .*")
_REMOTE = re.compile(r":?[\w.+@ -]+[,:]")
_SECRET = re.compile(r"(pass|password|secret|token|key|key_id)$")
_SECRET_WORD = re.compile(r"--[\w-]*(pass|password|secret|token|key|key-id)(=.*)?", re.DOTALL)
_SECRET_IN_TARGET = re.compile(r"[,:]\w*(pass|password|secret|token|key|key_id)=")
_SHORTEST_SECRET = 4
# The reason of a failure, and what a check has found.
_FAILED = re.compile(r"\S+ \S+ (?:Failed to [^:\"]*(?:\"[^\"]*\")?|CRITICAL): (.*)")
_DIFFERS = re.compile(r"\S+ \S+ ERROR : (\S+: (?:.* differ|file not in ).*)")
# A directory that is not there.
_NO_DIRECTORY, _NO_FILE = 3, 4
# rclone's own tries of a request, which come before ours.
LOW_LEVEL_RETRIES = 3
_NO_HASHES = "hashes could not be checked"


@dataclass(frozen=True)
class _Cause:
    """What another try can't cure: the text that tells it, and the user's next move."""

    text: re.Pattern[str]
    hint: str


_CONFIGURATION_HINT = "Mend rclone's configuration; see upload-credentials."
_CAUSES = (
    _Cause(re.compile(r"find section in config file"), "Name one of its remotes; see upload-credentials."),
    _Cause(re.compile(r"config file|unable to decrypt"), _CONFIGURATION_HINT),
    _Cause(re.compile(r"no space left on device|for remaining disk space|\b507\b|[Qq]uota"), "Make room there."),
    _Cause(re.compile(r"\b40[13]\b|Unauthorized|Forbidden|AccessDenied|unable to authenticate"), _CONFIGURATION_HINT),
    _Cause(re.compile(r"InvalidAccessKeyId|SignatureDoesNotMatch"), _CONFIGURATION_HINT),
    _Cause(re.compile(r"permission denied|read-only file system"), "Give the login the right to write there."),
    _Cause(re.compile(r"x509: "), "Name the certificate's CA with upload-tls."),
    # An object store that can't be asked gives that too: what is to be removed may be there.
    _Cause(re.compile(r"is a directory or doesn't exist"), ""),
    _Cause(re.compile(r"unknown (flag|shorthand)|unknown command"), "Mend upload-args."),
)

# Options of each check, of which one is enough that has compared checksums.
_CHECKS: dict[str | None, list[tuple[str, ...]]] = {
    None: [(), ("--download",)],
    "download": [("--download",)],
    "none": [],
}


def programs(destination: Destination) -> list[str]:
    """Return the programs that uploading to *destination* needs here."""
    return ["rclone"]


def check(destination: Destination, file_name: str) -> None:
    """Raise ConfigurationError unless *destination* is a remote, and its configuration is there for nobody else."""
    section = destination.section
    if not _REMOTE.match(destination.target):
        raise ConfigurationError(
            f"[{section}] upload-target: {destination.target!r} is no place of rclone's.",
            hint="It is REMOTE:PATH, with a remote of rclone's configuration. For a directory here use rsync.",
        )
    if _SECRET_IN_TARGET.search(destination.target):
        raise ConfigurationError(
            f"[{section}] upload-target: it is no place for a login.",
            hint="Write it into a configuration of rclone, and name that in upload-credentials.",
        )
    if any(_SECRET_WORD.fullmatch(word) for word in destination.arguments):
        raise ConfigurationError(
            f"[{section}] upload-args: they are no place for a login.",
            hint="Write it into a configuration of rclone, and name that in upload-credentials.",
        )
    if destination.verify not in (None, "download", "none"):
        raise ConfigurationError(f"[{section}] upload-verify: rclone has only download and none.")
    if destination.tls is not None and not isinstance(destination.tls, Path):
        raise ConfigurationError(f"[{section}] upload-tls: rclone takes only the path of a CA's file.")
    if destination.tls:
        check_readable(f"[{section}] upload-tls", destination.tls)
    credentials.check_private(destination)
    _hide_secrets(destination)


def _hide_secrets(destination: Destination) -> None:
    """Have the secrets of rclone's configuration shown nowhere, if that is one that can be read."""
    if destination.credentials is None:
        return
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read(destination.credentials, encoding="utf-8")
    except (configparser.Error, UnicodeError, OSError):
        # rclone itself complains of it; an encrypted one shows nothing.
        return
    found = [value for name in parser.sections() for key, value in parser.items(name) if _SECRET.search(key)]
    log.hide(value for value in found if value and len(value) >= _SHORTEST_SECRET)


def _place(destination: Destination, name: str) -> str:
    slash = "" if destination.target.endswith((":", "/")) else "/"
    return f"{destination.target}{slash}{name}"


def _argv(destination: Destination, verb: str, *words: str) -> list[str]:
    """Return the command of rclone that does *verb*, once."""
    path = destination.credentials
    return [
        "rclone",
        *verb.split(),
        *(("--config", str(path.absolute())) if path else ()),
        *(("--ca-cert", str(destination.tls.absolute())) if isinstance(destination.tls, Path) else ()),
        *("--retries", "1"),
        *("--low-level-retries", str(LOW_LEVEL_RETRIES)),
        *("--contimeout", "60s"),
        *("--timeout", f"{tries.STALL_SECONDS}s"),
        *destination.arguments,
        *words,
    ]


def _environment() -> dict[str, str]:
    """Return the environment in which rclone asks no one for the password of its configuration."""
    return os.environ | {"RCLONE_ASK_PASSWORD": "false"}


def _check_argv(destination: Destination, artifact: Artifact, *options: str) -> list[str]:
    names = [word for path in files_of(artifact) for word in ("--include", f"/{path.name}")]
    return _argv(destination, "check", "--one-way", *options, *names, ".", destination.target)


def commands(destination: Destination, artifact: Artifact) -> list[list[str]]:
    """Return the commands that upload *artifact* and what belongs to it, and verify them; they run beside the files."""
    found = [_argv(destination, "backend features", destination.target)]
    found.append(["# An object store gets each file with its own name at once."])
    for path in files_of(artifact):
        found.append(_argv(destination, "copyto", *_STATS, path.name, _place(destination, path.name + _PART)))
    for path in files_of(artifact):
        found.append(_argv(destination, "moveto", *(_place(destination, path.name + end) for end in (_PART, ""))))
    for number, options in enumerate(_CHECKS[destination.verify]):
        if number:
            found.append(["# Where the remote has no checksums of the kind:"])
        found.append(_check_argv(destination, artifact, *options))
    return found


def upload(destination: Destination, artifact: Artifact) -> None:
    """Upload *artifact* and what belongs to it, and verify them there; BuildError has the reason and the next move."""
    _hide_secrets(destination)
    by_hand = _argv(destination, "copyto", artifact.path.name, _place(destination, artifact.path.name))
    again: tuple[str, ...] = ()

    def attempt(failed: FailedTry | None) -> None:
        nonlocal again
        if failed and failed.damaged:
            # What is damaged there has the size and the time of what it should be.
            again = ("--ignore-times",)
        _transfer(destination, artifact, again)
        _verify(destination, artifact)

    def give_up(failure: FailedTry) -> None:
        if failure.leaves:
            _remove_parts(destination, artifact)

    persist(destination, artifact, attempt, command_line(by_hand), give_up)


def _transfer(destination: Destination, artifact: Artifact, options: Sequence[str]) -> None:
    part = _PART if _renames(destination) else ""
    paths = files_of(artifact)
    for path in paths:
        _run(_argv(destination, "copyto", *_STATS, *options, path.name, _place(destination, path.name + part)), path)
    # Both get their names one right after the other.
    for path in paths if part else ():
        _run(
            _argv(destination, "moveto", *options, *(_place(destination, path.name + end) for end in (part, ""))), path
        )


def _renames(destination: Destination) -> bool:
    """Return whether the remote can give a file another name; an object store would copy it, and needs none."""
    argv = _argv(destination, "backend features", destination.target)
    try:
        features = json.loads(command.run(argv, capture=True, env=_environment()))["Features"]
        return bool(features["Move"]) and not features["BucketBased"]
    except CommandError as error:
        raise _failed_try(error) from error
    except (ValueError, TypeError, KeyError):
        return False


def _run(argv: Sequence[str], path: Path) -> None:
    try:
        command.run(argv, cwd=path.parent, env=_environment(), progress=_parse_progress)
    except CommandError as error:
        raise _failed_try(error) from error


def _failed_try(error: CommandError) -> FailedTry:
    said = [match[1] for each in (_DIFFERS, _FAILED) for match in map(each.match, error.last_lines) if match]
    reason = (said[0] if said else error.last_line or error.message).rstrip(".")
    for cause in _CAUSES:
        if cause.text.search(reason):
            return FailedTry(reason, again=False, hint=cause.hint, leaves=True)
    return FailedTry(reason, again=True, leaves=True)


def _parse_progress(line: str) -> float | None:
    """Return the fraction in a line of ``--stats-one-line``, None if it is another line."""
    match = _PROGRESS.fullmatch(line)
    return int(match[1] or 0) / 100 if match else None


def _verify(destination: Destination, artifact: Artifact) -> None:
    """Let rclone compare what is there; where the remote has no checksums, it reads all back."""
    for options in _CHECKS[destination.verify]:
        lines: list[str] = []
        try:
            argv = _check_argv(destination, artifact, *options)
            command.run(argv, cwd=artifact.path.parent, env=_environment(), progress=lines.append)
        except CommandError as error:
            failed = _failed_try(error)
            differs = any(map(_DIFFERS.match, error.last_lines))
            hint = failed.hint or ("It is damaged: look at that machine's disk." if differs else "")
            reason = failed.reason if differs else f"it can't be verified: {failed.reason}"
            raise FailedTry(reason, again=failed.again or differs, hint=hint, damaged=differs) from error
        if not any(_NO_HASHES in line for line in lines):
            logger.info("%s is verified at %s by rclone.", artifact.path.name, destination.section)
            return
    logger.warning("%s is not verified at %s, as upload-verify says.", artifact.path.name, destination.section)


def _remove_parts(destination: Destination, artifact: Artifact) -> None:
    """Remove what the tries have left there, where that is possible."""
    names = [word for path in files_of(artifact) for word in ("--include", f"/{path.name}{_PART}")]
    try:
        argv = _argv(destination, "delete", "--max-depth", "1", *names, destination.target)
        command.run(argv, quiet=True, env=_environment(), timeout=tries.STALL_SECONDS)
    except BuildError as error:
        logger.warning(
            "Something of %s may be left at %s with the name %s: %s",
            artifact.path.name, destination.section, f"{artifact.path.name}{_PART}", error.message,
        )  # fmt: skip


def below(destination: Destination, directory: str) -> Destination:
    """Return *destination* with the place *directory* in it, which rclone makes."""
    return dataclasses.replace(destination, target=_place(destination, directory))


def read_argv(destination: Destination, name: str) -> list[str]:
    """Return the command that reads the file *name* of *destination*."""
    return _argv(destination, "cat", _place(destination, name))


def read(destination: Destination, name: str) -> bytes | None:
    """Return the file *name* of *destination*, None if it is not there; FailedTry if that can't be known."""
    try:
        return command.run(read_argv(destination, name), capture=True, env=_environment()).encode()
    except CommandError as error:
        if error.status in (_NO_DIRECTORY, _NO_FILE):
            return None
        raise _failed_try(error) from error


def removing(destination: Destination, names: Sequence[str]) -> list[list[str]]:
    """Return the commands that remove the files *names* of *destination*, whatever filters upload-args have."""
    return [_argv(destination, "deletefile", _place(destination, name)) for name in names]


def remove(destination: Destination, names: Sequence[str]) -> dict[str, FailedTry]:
    """Remove the files *names* of *destination*; return why those that may be left are."""
    left = {}
    for name, argv in zip(names, removing(destination, names), strict=True):
        try:
            command.run(argv, env=_environment())
        except CommandError as error:
            left[name] = _failed_try(error)
    return left


def probe(destination: Destination, directory: Path) -> bool:
    """Raise BuildError with the reason unless rclone can look at *destination*."""
    _hide_secrets(destination)
    argv = _argv(destination, "lsf", "--max-depth", "1", destination.target)
    try:
        command.run(argv, capture=True, quiet=True, env=_environment(), timeout=tries.PROBE_SECONDS)
    except CommandError as error:
        # It is made by the upload.
        if error.status == _NO_DIRECTORY:
            return True
        failed = _failed_try(error)
        raise BuildError(f"{failed.reason}.", hint=failed.hint or None) from error
    return True
