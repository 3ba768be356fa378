"""Why a system can't be bootstrapped: what mmdebstrap, apt and dpkg print, in one line with the next move."""

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...base.errors import BuildError

# So many of the last lines are looked at: dpkg goes on for a while with other packages when one has failed.
_LINES = 2000
_LONGEST = 300

_MIRROR_HINT = "Correct suite or mirror in the recipe, or try again when the mirror answers."
_SYNC_HINT = "The mirror is being updated, or something between sends another file: try again later, or another mirror."
_KEY_HINT = (
    "Install the keyring of the distribution (debian-archive-keyring, ubuntu-keyring), or name the archive's own "
    "in the source: [signed-by=/path/to/keyring.gpg]"
)

# What mmdebstrap adds to the words of the program that failed.
_FRAME = re.compile(
    r"E: (?:setup failed|mmdebstrap failed|apt-get .* failed|Sub-process .* returned an error|Some index files failed|"
    r"run_\w+ failed)|I: |W: "
)


class MirrorError(BuildError):
    """A mirror does not give what it should have; *uri* is what it was asked for, or its own."""

    def __init__(self, message: str, hint: str, uri: str) -> None:
        super().__init__(message, hint=hint)
        self.uri = uri


class Printed:
    """The last lines that a program has printed."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=_LINES)

    def take(self, line: str) -> None:
        """Keep *line*, which tells no progress."""
        self.lines.append(line.rstrip())


@dataclass(frozen=True)
class _Kind:
    """A kind of failure: it is known by *pattern*, and told by what is given the match, all lines and its number.

    The first group of the pattern begins with the URI of what is wrong where it is *of_mirror*.
    """

    pattern: str
    tell: Callable[[re.Match[str], Sequence[str], int], tuple[str, str]]
    of_mirror: bool = True


def _no_suite(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    return f"{match[1]} has no suite {match[2]}", _MIRROR_HINT


def _expired(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    hint = "Name a mirror that is updated, or one of archived releases; or set this machine's clock."
    return f"What {match[1]} lists is {match[2]}", hint


def _unknown_key(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    return f"{match[1]} is signed with the key {match[2]}, which is in no keyring here", _KEY_HINT


def _bad_signature(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    return f"The signature of {match[1]} is not valid: {match[2]}", _SYNC_HINT


def _unsigned(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    return f"{match[1]} is not signed", "Name a mirror with signatures: nothing is installed that can't be verified."


def _unlike(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    hint = "Something between may ask for a login, as a portal or a proxy does; else try another mirror."
    return f"{match[1]} is no signed list of an archive, but something else", hint


def _unfetched(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    reason = match[2].partition(" [IP:")[0].strip().removesuffix(".")
    known = re.search("unexpected size|Hash Sum mismatch|Mirror sync", reason)
    return f"{match[1]} can't be had: {reason}", _SYNC_HINT if known else _MIRROR_HINT


def _unmet(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    reasons = []
    for line in lines[number + 1 :]:
        if not line.startswith(" "):
            break
        reasons.append(" ".join(line.split()))
    hint = "Correct packages in the recipe, or name a mirror that has what they need."
    return f"Packages can't be installed together: {'; '.join(reasons)}", hint


def _full(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    hint = "Give a larger image-size, free some space, or make the tree elsewhere: work-in-memory, output-dir."
    return f"There is no space for the tree: {match[0].strip()}", hint


def _uninstalled(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    package = match[1].rpartition("/")[2]
    reason = lines[number + 1].strip() if number + 1 < len(lines) else ""
    before = lines[number - 1] if number else ""
    # What the package's script has said, if anything.
    told = not re.match(
        r"Setting up |Unpacking |Preparing to |Selecting |\(Reading |Chrooting |Processing |dpkg: ", before
    )
    words = f"{before.strip()} ({reason})" if told and before.strip() else reason
    return f"The installation of {package} failed: {words}", "The log has all that its scripts have said."


def _hook(match: re.Match[str], lines: Sequence[str], number: int) -> tuple[str, str]:
    what = {"script": "The recipe's script failed", "debconf": "The recipe's debconf is not accepted"}
    said = lines[number - 1].strip() if number and not _FRAME.match(lines[number - 1]) else "nothing was said"
    return (
        f"{what.get(match[1], 'Packages can not be taken from, or put into, the cache')}: {said}",
        "The log has all of it.",
    )


# As apt says it since Debian 13, too.
_VERIFYING = r"(?:W|E): (?:GPG error|OpenPGP signature verification failed): (\S+ \S+) \S+: "

# The first that is found anywhere counts.
_KINDS = (
    _Kind(r".*No space left on device.*", _full, of_mirror=False),
    _Kind(r"E: The repository '(\S+) (\S+) Release' does not have a Release file", _no_suite),
    _Kind(r"E: Release file for (\S+) is ((?:expired|not valid yet) \([^)]*\))", _expired),
    _Kind(_VERIFYING + r".*(?:NO_PUBKEY|Missing key) (\w+)", _unknown_key),
    _Kind(_VERIFYING + "(.*)", _bad_signature),
    _Kind(r"E: Failed to fetch (\S+)  Clearsigned file isn't valid", _unlike),
    _Kind(r"E: The repository '(\S+ \S+) \S+' is not signed", _unsigned),
    _Kind(r"E: Failed to fetch (\S+)  (.*)", _unfetched),
    _Kind(r"The following packages have unmet dependencies:", _unmet, of_mirror=False),
    _Kind(r"dpkg: error processing (?:package|archive) (\S+) ", _uninstalled, of_mirror=False),
    _Kind(
        r"E: (?:setup failed: E: )?command failed: .*/(script|debconf|take-packages|keep-packages)\b",
        _hook,
        of_mirror=False,
    ),
)
_ABSENT = re.compile(
    r"E: (?:Unable to locate package (\S+)|Package '(\S+)' has no installation candidate|"
    r"Couldn't find any package by (?:glob|regex) '([^']+)'|Version '[^']*' for '(\S+)' was not found)"
)


def explained(lines: Sequence[str], near: Callable[[str], Sequence[str]]) -> BuildError:
    """Return what the program that has printed *lines* failed of; *near* gives names of packages near one."""
    absent = list(
        dict.fromkeys(name for line in lines if (match := _ABSENT.match(line)) for name in match.groups() if name)
    )
    if absent:
        return _without(absent, near)
    for kind in _KINDS:
        for number, line in enumerate(lines):
            if match := re.match(kind.pattern, line):
                message, hint = kind.tell(match, lines, number)
                message = f"{message[:_LONGEST].removesuffix('.')}."
                if kind.of_mirror:
                    return MirrorError(message, hint, match[1].split()[0])
                return BuildError(message, hint=hint)
    said = [line for line in lines if line.strip() and not _FRAME.match(line)]
    reason = said[-1].strip().removeprefix("E: ") if said else "mmdebstrap failed and said nothing"
    return BuildError(
        f"The system can't be bootstrapped: {reason[:_LONGEST].removesuffix('.')}.", hint="The log has all of it."
    )


def together(errors: Sequence[BuildError]) -> BuildError:
    """Return the one error of several mirrors, none of which serves."""
    if len(errors) == 1:
        return errors[0]
    return BuildError(
        f"No mirror gives the packages: {' '.join(error.message for error in errors)}", hint=errors[-1].hint
    )


def _without(absent: Sequence[str], near: Callable[[str], Sequence[str]]) -> BuildError:
    words = []
    for name in absent:
        others = near(name)
        words.append(f"{name} (perhaps {' or '.join(others)})" if others else name)
    kind = "package" if len(words) == 1 else "packages"
    return BuildError(
        f"The archive has no {kind} {', '.join(words)}.", hint="Correct packages, or add the component that has it."
    )
