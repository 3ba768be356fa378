"""Upload with rsync: what is run, what is tried again, and whether the files have arrived whole."""

import dataclasses
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base import command, scratch
from ..base.errors import BuildError, CommandError, command_line
from ..base.log import logger
from ..configuration.settings import Destination
from ..model import Artifact
from . import tries
from .tries import FailedTry, digests_of, files_of, persist

KEYS: tuple[str, ...] = ("upload-index", "upload-keep")

# For logging in there and for each byte that is checksummed there: a slow disk's 10 MB/s.
_LOGIN_SECONDS = 180.0
_SECONDS_PER_BYTE = 1e-7
_REMOVAL_SECONDS = 30.0
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
# With these rsync ends where the one there has, of whatever reason: that may not have come here.
_ENDED = (10, 11, 12)
_NOT_ALL = 23
_TRANSIENT = (5, 10, 11, 12, 20, 23, 24, 30, 35, 124, 125, 255)
_PROGRESS = re.compile(r"\s*[0-9.,]+[KMGTP]?\s+([0-9]{1,3})%\s+\S+\s+[0-9:?]+(?:\s+\([^)]*\))?\s*")
# POSIX on df -P: total, used and free blocks, and what is used in percent.
_FREE = re.compile(r"\s[0-9]+\s+[0-9]+\s+(-?[0-9]+)\s+[0-9]+%\s")
_FULL_KILOBYTES = 1024
_STAYS = re.compile(r'skipping non-regular file "(.*)"|cannot delete non-empty directory: (.*)')
# Who says why: ssh, rsync's daemon, rsync.  The line "rsync error" has only the status.
_SPEAKERS = re.compile(r"ssh\b|kex_|client_loop|packet_|Connection |Timeout, |@ERROR|rrsync error|rsync: |\[sender\]")

_ROOM_HINT = "Make room there."
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
    _Cause(re.compile(r"No space left on device|Disk quota exceeded"), _ROOM_HINT, leaves=True),
    _Cause(
        re.compile(r"Permission denied|Operation not permitted|Read-only file system|module is read only"),
        "Give the user that logs in there the right to write to the target.",
    ),
    _Cause(re.compile(r"rsync: (command )?not found"), "Install rsync there."),
    _Cause(re.compile(r"No such file or directory|Unknown module"), "Make the directory there, or mend upload_target."),
    _Cause(re.compile(r"auth failed on module"), "Mend the user or the --password-file in upload_args."),
    _Cause(re.compile(r"rrsync error"), "Look at what rrsync allows there."),
)


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


def check(destination: Destination, file_name: str) -> None:
    """Do nothing: whether rsync takes what it is given is seen when it runs."""


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
    options = ["--info=progress2", f"--timeout={tries.STALL_SECONDS}"]
    # rsync writes to a temporary name anyway.  With this one both files get theirs at the end, one
    # right after the other, and what a broken upload leaves is of use to the next try.
    if not arguments & _IN_PLACE:
        options.append("--delay-updates")
    if destination.makes_directory:
        options.append("--mkpath")
    # It is an error where rsync doesn't connect by itself.
    if _DAEMON_TARGET.match(destination.target) and _remote_shell(destination.arguments) is None:
        options.append("--contimeout=60")
    return options


def _upload_argv(destination: Destination, artifact: Artifact, options: Sequence[str]) -> list[str]:
    files = [path.name for path in files_of(artifact)]
    return ["rsync", *options, *destination.arguments, *files, destination.target]


def _verify_argv(destination: Destination, artifact: Artifact) -> list[str] | None:
    shell = _shell(destination)
    if shell is None:
        return None
    files = " ".join(path.name for path in files_of(artifact))
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

    def attempt(failed: FailedTry | None) -> None:
        nonlocal options
        # What is damaged there has the size and perhaps the time of what it should be.
        if failed and failed.damaged and "--checksum" not in options:
            options = [*options, "--checksum"]
        options = _transfer(destination, artifact, options)
        _verify(destination, artifact)

    def give_up(failure: FailedTry) -> None:
        if failure.leaves and "--delay-updates" in options:
            _remove_partial(destination, artifact)

    persist(destination, artifact, attempt, command_line(_upload_argv(destination, artifact, [])), give_up)


def probe(destination: Destination, directory: Path) -> bool:
    """Raise BuildError with the reason unless rsync could upload to *destination* from beside *directory*'s files.

    Nothing is uploaded, and nothing changed there.
    """
    with scratch.directory() as scrap:
        file = scrap / _PROBE_FILE
        file.touch()
        options = ["--dry-run", f"--timeout={tries.PROBE_SECONDS:.0f}"]
        argv = ["rsync", *destination.arguments, *options, str(file), destination.target]
        cwd = directory if directory.is_dir() else None
        try:
            command.run(argv, quiet=True, cwd=cwd, env=_environment(), timeout=tries.PROBE_SECONDS)
        except CommandError as error:
            failed = _failed_try(error, destination)
            raise BuildError(f"{failed.reason}.", hint=failed.hint or None) from error
    return True


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
        failed = _failed_try(error, destination)
        # rsync there may end before its reason has come here.
        if failed.again and error.status in _ENDED and _is_full(destination, artifact):
            failed = FailedTry("No space left on device", again=False, hint=_ROOM_HINT, leaves=True)
        raise failed from error
    return options


def _is_full(destination: Destination, artifact: Artifact) -> bool:
    """Return whether the disk there is known to be full; what has come of a file stays on it until the last try."""
    shell = _shell(destination)
    if shell is None:
        return False
    argv = [*shell, _in_target(destination, "df -Pk .")]
    try:
        text = command.run(argv, capture=True, cwd=artifact.path.parent, env=_environment(), timeout=_REMOVAL_SECONDS)
    except BuildError as error:
        logger.info("Whether the disk at %s is full can't be known: %s", destination.section, error.message)
        return False
    free = _FREE.findall(text)
    return bool(free) and int(free[-1]) < _FULL_KILOBYTES


def _place(destination: Destination, name: str) -> str:
    slash = "" if destination.target.endswith((":", "/")) else "/"
    return f"{destination.target}{slash}{name}"


def below(destination: Destination, directory: str) -> Destination:
    """Return *destination* with the place *directory* in it, which rsync makes from 3.2.3 on."""
    return dataclasses.replace(destination, target=f"{_place(destination, directory)}/", makes_directory=True)


def read_argv(destination: Destination, name: str, place: str = "DIRECTORY/") -> list[str]:
    """Return the command that copies the file *name* of *destination* to *place*."""
    options = [f"--timeout={tries.STALL_SECONDS}", *destination.arguments]
    return ["rsync", *options, _place(destination, name), place]


def read(destination: Destination, name: str) -> bytes | None:
    """Return the file *name* of *destination*, None if it is not there; FailedTry if that can't be known."""
    with scratch.directory() as scrap:
        try:
            command.run(read_argv(destination, name, f"{scrap}/"), cwd=scrap, env=_environment())
        except CommandError as error:
            absent = [line for line in error.last_lines if "No such file or directory" in line]
            # rrsync of rsync 3.5 itself looks for the file.
            if absent and (error.status == _NOT_ALL or any("rrsync error" in line for line in absent)):
                return None
            raise _failed_try(error, destination) from error
        return (scrap / name).read_bytes()


def removing(destination: Destination, names: Sequence[str]) -> list[list[str]]:
    """Return the command that removes the files *names* of *destination*; it runs in an empty directory.

    rsync(1): each file that is missing here is removed there.  That needs no shell there, and no filter, among which
    the user's own would count.
    """
    options = ["--delete-missing-args", f"--timeout={tries.STALL_SECONDS}"]
    return [["rsync", *options, *destination.arguments, *names, _place(destination, "")]]


def remove(destination: Destination, names: Sequence[str]) -> dict[str, FailedTry]:
    """Remove the files *names* of *destination*; return why those that are left are, FailedTry if some may be."""
    [argv] = removing(destination, names)
    with scratch.directory() as empty:
        try:
            text = command.run(argv, cwd=empty, env=_environment(), capture=True)
        except CommandError as error:
            raise _failed_try(error, destination) from error
    # A daemon that refuses to delete takes what is missing for a file of a strange kind, and all is well for it.
    matches = [match for match in map(_STAYS.fullmatch, text.splitlines()) if match]
    return {name: FailedTry(match[0], again=False) for match in matches if (name := match[1] or match[2]) in names}


def _refuses(error: CommandError) -> bool:
    """Whether rsync, here or there, doesn't take an option of ours."""
    said = "\n".join(error.last_lines)
    return bool(re.search(r"refuse|disabled|unknown|unrecognized|invalid|cannot be used", said)) and bool(
        re.search(r"--?(delay-updates|timeout|contimeout|info|checksum|mkpath)\b", said)
    )


def _failed_try(error: CommandError, destination: Destination) -> FailedTry:
    lines = [line for line in (_PROGRESS.sub("", line, count=1) for line in error.last_lines) if line]
    shell = command_line(_shell(destination) or [])
    for cause in _CAUSES:
        for line in lines:
            if cause.text.search(line):
                hint = cause.hint.format(shell=shell)
                return FailedTry(line.rstrip("."), again=False, hint=hint, leaves=cause.leaves)
    said = [line for line in lines if _SPEAKERS.match(line)]
    reason = re.sub(r" at \S+\([0-9]+\) \[.*", "", (said or lines)[0]) if lines and error.status > 0 else error.message
    return FailedTry(reason.rstrip("."), again=error.status in _TRANSIENT, leaves=True)


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
            raise FailedTry(f"it can't be verified: {failed.reason}", again=True, hint=failed.hint) from error
        reason = error.message
    except BuildError as error:
        raise FailedTry(f"it can't be verified: {error.message}", again=True) from error
    found = dict(_checksums("\n".join(lines)))
    if artifact.path.name not in found:
        logger.warning(
            "%s is not verified at %s, where it seems there is no shell: %s",
            artifact.path.name, destination.section, reason,
        )  # fmt: skip
        return
    for name, wanted in digests_of(artifact).items():
        # The user's arguments may leave the others out.
        if found.get(name, wanted) != wanted:
            raise FailedTry(
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
    files = " ".join(f"{_PARTIAL_DIR}/{path.name}" for path in files_of(artifact))
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
