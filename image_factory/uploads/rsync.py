"""Upload with rsync: what is run, what is tried again, and whether the files have arrived whole."""

import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base import command, files, interrupts, scratch
from ..base.errors import BuildError, CommandError, command_line
from ..base.log import logger
from ..configuration.settings import Destination
from ..model import Artifact

# Between the tries, of which there is one more.
PAUSE_SECONDS = (5.0, 15.0, 45.0)
# An upload in which nothing has come or gone for so long is given up.
STALL_SECONDS = 180
# For logging in there and for each byte that is checksummed there: a slow disk's 10 MB/s.
_LOGIN_SECONDS = 180.0
_SECONDS_PER_BYTE = 1e-7
_REMOVAL_SECONDS = 30.0
PROBE_SECONDS = 15.0
_PROBE_FILE = "image-factory-check"

# Where rsync has, with --delay-updates, what is not complete.
_PARTIAL_DIR = ".~tmp~"
# rsync refuses --delay-updates beside these, which write into the file itself.
_IN_PLACE = {"--inplace", "--append", "--append-verify", "--write-devices"}
# The short options of rsync that take a value; -e is the remote shell.
_SHORT_WITH_VALUE = re.compile(r"-[A-Za-z0-9]*?([BTefM@])=?(.*)", re.DOTALL)
# rsync(1): [USER@]HOST:PATH; a slash before the colon makes it a local path, two colons a daemon.
_HOST_TARGET = re.compile(r"(?:([^:/]*)@)?(\[[^]/]+\]|[^:/@[]+):(?!:)(.*)", re.DOTALL)
_DAEMON_TARGET = re.compile(r"(?i:rsync://)|(?:[^:/]*@)?(?:\[[^]/]+\]|[^:/@[]+)::")

# rsync(1): client-server protocol, socket and file I/O, protocol stream, files left out, timeouts;
# ssh(1) has 255.  The text tells whether another try is of use where they don't.
_TRANSIENT = (5, 10, 11, 12, 20, 23, 24, 30, 35, 124, 125, 255)
_PROGRESS = re.compile(r"\s*[0-9.,]+[KMGTP]?\s+([0-9]{1,3})%\s+\S+\s+[0-9:?]+(?:\s+\([^)]*\))?\s*")
# Who says why: ssh, rsync's daemon, rsync.  The line "rsync error" has only the status.
_SPEAKERS = re.compile(r"ssh\b|kex_|client_loop|packet_|Connection |Timeout, |@ERROR|rrsync error|rsync: |\[sender\]")

_LOGIN_HINT = "ssh has to log in without a password. Try it as the same user: {shell} true"


@dataclass(frozen=True)
class _Cause:
    """What another try can't cure: the text that tells it, the user's next move, and whether it *leaves* something."""

    text: re.Pattern[str]
    hint: str
    leaves: bool = False


_CAUSES = (
    _Cause(re.compile(r"Failed to exec"), "Install it, or change the --rsh in upload_args."),
    _Cause(re.compile(r"Permission denied(, please| \([a-z])|Too many authentication failures"), _LOGIN_HINT),
    _Cause(
        re.compile(r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED"),
        "Check the host's key, and log in once by hand to accept it: {shell}",
    ),
    _Cause(re.compile(r"No space left on device|Disk quota exceeded"), "Make room there.", leaves=True),
    _Cause(
        re.compile(r"Permission denied|Operation not permitted|Read-only file system|module is read only"),
        "Give the user that logs in there the right to write to the target.",
    ),
    _Cause(re.compile(r"rsync: (command )?not found"), "Install rsync there."),
    _Cause(re.compile(r"No such file or directory|Unknown module"), "Make the directory there, or mend upload_target."),
    _Cause(re.compile(r"auth failed on module"), "Mend the user or the --password-file in upload_args."),
    _Cause(re.compile(r"rrsync error"), "Look at what rrsync allows there."),
)


class _FailedTry(Exception):
    """A try has failed: why, in one line, and what the user does; *again* if another may succeed.

    *leaves* if there may be something left there of it, *damaged* if the file there is another.
    """

    def __init__(
        self, reason: str, *, again: bool, hint: str = "", leaves: bool = False, damaged: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.again = again
        self.hint = hint
        self.leaves = leaves
        self.damaged = damaged


def _remote_shell(arguments: Sequence[str]) -> str | None:
    """Return the remote shell that *arguments* of rsync name, the last if several do, None if none does."""
    found = None
    words = iter(arguments)
    for word in words:
        if word == "--rsh":
            found = next(words, found)
        elif word.startswith("--rsh="):
            found = word.removeprefix("--rsh=")
        elif match := _SHORT_WITH_VALUE.fullmatch(word):
            value = match[2] or next(words, "")
            found = value if match[1] == "e" else found
    return found


def _shell_words(text: str) -> list[str]:
    """Split *text* as rsync splits its remote shell: there are quotes, a backslash is one."""
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split = True
    lexer.escape = lexer.commenters = ""
    try:
        return list(lexer)
    except ValueError:
        # rsync itself complains of it.
        return text.split()


def _shell(destination: Destination) -> list[str] | None:
    """Return the argv whose next word is a command where the target is, None for a daemon."""
    if _DAEMON_TARGET.match(destination.target):
        return None
    host = _HOST_TARGET.fullmatch(destination.target)
    if not host:
        return ["sh", "-c"]
    rsh = _remote_shell(destination.arguments) or os.environ.get("RSYNC_RSH") or "ssh"
    return [*_shell_words(rsh), *(["-l", host[1]] if host[1] else []), host[2].strip("[]")]


def programs(destination: Destination) -> list[str]:
    """Return the programs that uploading to *destination* needs here."""
    shell = _shell(destination) if _HOST_TARGET.fullmatch(destination.target) else None
    return ["rsync", *(shell[:1] if shell else [])]


def _in_target(destination: Destination, words: str) -> str:
    """Return the shell command that runs the command *words* in the target's directory."""
    host = _HOST_TARGET.fullmatch(destination.target)
    directory = host[3] if host else destination.target
    # The far shell knows whose home it is, if nothing up to the slash is quoted; rsync leaves it that too.
    home = re.match(r"~[A-Za-z0-9._-]*(/|$)", directory) if host else None
    start = home[0] if home else ""
    rest = directory[len(start) :]
    if directory.startswith("-"):
        rest = f"./{rest}"
    # No parentheses: it may be a csh there.
    return f"cd {start}{shlex.quote(rest) if rest else ''} && {words}" if directory else words


def _own_options(destination: Destination) -> list[str]:
    """Return our options; the user's come after them and win."""
    arguments = set(destination.arguments)
    options = ["--info=progress2", f"--timeout={STALL_SECONDS}"]
    # rsync writes to a temporary name anyway.  With this one both files get theirs at the end, one
    # right after the other, and what a broken upload leaves is of use to the next try.
    if not arguments & _IN_PLACE:
        options.append("--delay-updates")
    # It is an error where rsync doesn't connect by itself.
    if _DAEMON_TARGET.match(destination.target) and _remote_shell(destination.arguments) is None:
        options.append("--contimeout=60")
    return options


def _files(artifact: Artifact) -> tuple[Path, ...]:
    return artifact.path, *artifact.others


def _upload_argv(destination: Destination, artifact: Artifact, options: Sequence[str]) -> list[str]:
    files = [path.name for path in _files(artifact)]
    return ["rsync", *options, *destination.arguments, *files, destination.target]


def _verify_argv(destination: Destination, artifact: Artifact) -> list[str] | None:
    shell = _shell(destination)
    if shell is None:
        return None
    files = " ".join(path.name for path in _files(artifact))
    # BSD and macOS have the second.
    return [*shell, _in_target(destination, f"sha256sum {files} || shasum -a 256 {files}")]


def commands(destination: Destination, artifact: Artifact) -> list[list[str]]:
    """Return the commands that upload *artifact* and what belongs to it and verify them; they run beside the files."""
    verify = _verify_argv(destination, artifact)
    return [_upload_argv(destination, artifact, _own_options(destination)), *([verify] if verify else [])]


def upload(destination: Destination, artifact: Artifact) -> None:
    """Upload *artifact* and what belongs to it, and verify them there; BuildError has the reason and the next move.

    A failure that may pass is tried again.
    """
    options = _own_options(destination)
    for pause in (*PAUSE_SECONDS, None):
        try:
            options = _transfer(destination, artifact, options)
            _verify(destination, artifact)
            return
        except _FailedTry as failure:
            if not failure.again or pause is None:
                if failure.leaves and "--delay-updates" in options:
                    _remove_partial(destination, artifact)
                raise BuildError(_tries(failure, pause), hint=_hint(failure, destination, artifact)) from failure
            # What is damaged there has the size and perhaps the time of what it should be.
            if failure.damaged and "--checksum" not in options:
                options = [*options, "--checksum"]
            logger.warning(
                "Uploading %s to %s: %s; trying again in %.0f s.",
                artifact.path.name, destination.section, failure.reason, pause,
            )  # fmt: skip
        with interrupts.interruptible():
            time.sleep(pause)


def probe(destination: Destination, directory: Path) -> None:
    """Raise BuildError with the reason unless rsync could upload to *destination* from beside *directory*'s files.

    Nothing is uploaded, and nothing changed there.
    """
    with scratch.directory() as scrap:
        file = scrap / _PROBE_FILE
        file.touch()
        options = ["--dry-run", f"--timeout={PROBE_SECONDS:.0f}"]
        argv = ["rsync", *destination.arguments, *options, str(file), destination.target]
        cwd = directory if directory.is_dir() else None
        try:
            command.run(argv, quiet=True, cwd=cwd, env=_environment(), timeout=PROBE_SECONDS)
        except CommandError as error:
            failed = _failed_try(error, destination)
            raise BuildError(f"{failed.reason}.", hint=failed.hint or None) from error


def _tries(failure: _FailedTry, pause: float | None) -> str:
    return f"{failure.reason} ({len(PAUSE_SECONDS) + 1} tries)" if pause is None else failure.reason


def _hint(failure: _FailedTry, destination: Destination, artifact: Artifact) -> str:
    again = command_line(_upload_argv(destination, artifact, []))
    return " ".join(filter(None, (failure.hint, f"To upload it by hand, in {artifact.path.parent}: {again}")))


def _environment() -> dict[str, str]:
    """Return the environment in which ssh asks no one for a password, in a window neither."""
    return os.environ | {"SSH_ASKPASS_REQUIRE": "never"}


def _transfer(destination: Destination, artifact: Artifact, options: list[str]) -> list[str]:
    """Let rsync upload; return the options that it took."""
    try:
        command.run(
            _upload_argv(destination, artifact, options),
            cwd=artifact.path.parent,
            env=_environment(),
            progress=_parse_progress,
        )
    except CommandError as error:
        if options and _refuses(error):
            logger.warning("rsync at %s refuses our options: trying without them.", destination.section)
            return _transfer(destination, artifact, [])
        raise _failed_try(error, destination) from error
    return options


def _refuses(error: CommandError) -> bool:
    """Whether rsync, here or there, doesn't take an option of ours."""
    said = "\n".join(error.last_lines)
    return bool(re.search(r"refuse|disabled|unknown|unrecognized|invalid|cannot be used", said)) and bool(
        re.search(r"--?(delay-updates|timeout|contimeout|info|checksum)\b", said)
    )


def _failed_try(error: CommandError, destination: Destination) -> _FailedTry:
    lines = [line for line in (_PROGRESS.sub("", line, count=1) for line in error.last_lines) if line]
    shell = command_line(_shell(destination) or [])
    for cause in _CAUSES:
        for line in lines:
            if cause.text.search(line):
                hint = cause.hint.format(shell=shell)
                return _FailedTry(line.rstrip("."), again=False, hint=hint, leaves=cause.leaves)
    said = [line for line in lines if _SPEAKERS.match(line)]
    reason = re.sub(r" at \S+\([0-9]+\) \[.*", "", (said or lines)[0]) if lines and error.status > 0 else error.message
    return _FailedTry(reason.rstrip("."), again=error.status in _TRANSIENT, leaves=True)


def _parse_progress(line: str) -> float | None:
    """Return the fraction in a line of ``--info=progress2``, None if it is another line."""
    match = _PROGRESS.fullmatch(line)
    return int(match[1]) / 100 if match else None


def _verify(destination: Destination, artifact: Artifact) -> None:
    """Compare the checksums there; where they can't be had, say so."""
    argv = _verify_argv(destination, artifact)
    if argv is None:
        logger.warning("%s is not verified at %s: a daemon has no shell.", artifact.path.name, destination.section)
        return
    lines: list[str] = []

    def collect(line: str) -> None:
        lines.append(line)

    reason = "no checksum came"
    seconds = _LOGIN_SECONDS + artifact.path.stat().st_size * _SECONDS_PER_BYTE
    try:
        command.run(argv, cwd=artifact.path.parent, env=_environment(), progress=collect, timeout=seconds)
    except CommandError as error:
        if error.status == 255:
            failed = _failed_try(error, destination)
            raise _FailedTry(f"it can't be verified: {failed.reason}", again=True, hint=failed.hint) from error
        reason = error.message
    except BuildError as error:
        raise _FailedTry(f"it can't be verified: {error.message}", again=True) from error
    found = dict(_checksums("\n".join(lines)))
    if artifact.path.name not in found:
        logger.warning(
            "%s is not verified at %s, where it seems there is no shell: %s",
            artifact.path.name, destination.section, reason,
        )  # fmt: skip
        return
    for name, wanted in (
        (artifact.path.name, artifact.sha256),
        (artifact.checksum_path.name, files.digest_of(artifact.checksum_path)),
        *artifact.companions,
    ):
        # The user's arguments may leave the others out.
        if found.get(name, wanted) != wanted:
            raise _FailedTry(
                f"{name} has another SHA-256 there, {found[name]}",
                again=True,
                damaged=True,
                hint="It is damaged, or upload_args keep it from being replaced: look at that machine's disk.",
            )
    logger.info("%s is verified at %s: SHA-256 %s", artifact.path.name, destination.section, artifact.sha256)


def _checksums(text: str) -> list[tuple[str, str]]:
    return [(name, digest) for digest, name in re.findall(r"^([0-9a-f]{64}) [ *](\S+)\r?$", text, re.MULTILINE)]


def _remove_partial(destination: Destination, artifact: Artifact) -> None:
    """Remove what the tries have left there, where that is possible."""
    shell = _shell(destination)
    files = " ".join(f"{_PARTIAL_DIR}/{path.name}" for path in _files(artifact))
    try:
        if shell is None:
            raise BuildError("a daemon has no shell")
        # A second, as the rsync there may be about to notice that it is alone, and to put it there.
        words = f"sleep 1 && rm -f {files} && test ! -d {_PARTIAL_DIR} || rmdir {_PARTIAL_DIR}"
        command.run(
            [*shell, _in_target(destination, words)],
            cwd=artifact.path.parent,
            env=_environment(),
            timeout=_REMOVAL_SECONDS,
        )
    except BuildError as error:
        logger.warning(
            "Something of %s may be left in %s/ at %s: %s",
            artifact.path.name, _PARTIAL_DIR, destination.target, error.message,
        )  # fmt: skip
