"""What can go wrong, as exceptions that carry the message, the next move and the exit status."""

import re
import shlex
import signal
from collections.abc import Sequence

_LONGEST_QUOTE = 300


class ImageFactoryError(Exception):
    """The root of all expected errors.

    *message* is one line that says what is wrong and where, *hint* one line that says the next move.
    """

    exit_status = 1
    # Whether the user was given a shell where it happened.
    attended = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def said(self) -> str:
        """The last words of the program that failed, if one did and said something; else the message."""
        return self.message

    def add_hint(self, hint: str) -> None:
        """Add another move to the hint."""
        self.hint = f"{self.hint.removesuffix('.')}; {hint}" if self.hint else hint


class BuildError(ImageFactoryError):
    """A step of the build failed."""


class ConfigurationError(ImageFactoryError):
    """The command line, the configuration or this machine doesn't allow the build to start."""

    exit_status = 2


class InstallationError(BuildError):
    """The installation has failed, or will never end."""


class InstalledError(InstallationError):
    """The installation has failed, but its disk may have a whole system, or none: it is kept for --resume."""


class NoSystemError(BuildError):
    """The installation left a disk without a system on it."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        # Python has no names for most of the real-time signals.
        return f"signal {number}"


def _reason(status: int) -> str:
    return f"was killed by {_signal_name(-status)}" if status < 0 else f"failed with status {status}"


# guestfish names its line of input first.
_ERROR_LINE = re.compile(r"(?:\*stdin\*:\d+: )?(?:libguestfs: )?error\b", re.IGNORECASE)


_PASSWORD = re.compile(r"(-{0,2}[\w-]*(?:password|passwd|passphrase|token|secret)=).+", re.IGNORECASE | re.DOTALL)


def without_passwords(argv: Sequence[str]) -> list[str]:
    """Return *argv* with ``***`` for its passwords: where a word ends is not to be seen in text any more."""
    words = [f"{match[1]}***" if (match := _PASSWORD.fullmatch(word)) else word for word in argv]
    if words and words[0].rpartition("/")[2] == "sshpass":
        for number, word in enumerate(words[:-1]):
            if match := re.fullmatch(r"(-[veVh]*p)(.*)", word, re.DOTALL):
                words[number : number + 2] = [f"{match[1]}***", words[number + 1]] if match[2] else [word, "***"]
                break
    return words


def command_line(argv: Sequence[str]) -> str:
    """Return *argv* as a shell reads it, without passwords."""
    return shlex.join(without_passwords(argv))


def command_hint(argv: Sequence[str]) -> str:
    """Return the hint that shows the command *argv*; the log has the whole of a long one."""
    text = command_line(argv)
    return f"The command was: {text if len(text) <= _LONGEST_QUOTE else f'{text[:_LONGEST_QUOTE]}... (see the log)'}"


class CommandError(BuildError):
    """A program that the build needs failed.

    *status* is its exit status, negative for the signal that killed it, as subprocess has it; *reason* is that in
    words.  *last_lines* are the last lines that it printed.
    """

    def __init__(self, argv: Sequence[str], status: int, last_lines: Sequence[str]) -> None:
        self.reason = _reason(status)
        # Many programs, virt-install among them, say the reason first and good advice after it.
        errors = [line for line in last_lines if _ERROR_LINE.match(line)]
        said = "".join(f": {line[:_LONGEST_QUOTE]}" for line in (errors or list(last_lines))[-1:])
        super().__init__(f"{argv[0]} {self.reason}{said}", hint=command_hint(argv))
        self.argv = list(argv)
        self.status = status
        self.last_lines = list(last_lines)

    @property
    def last_line(self) -> str:
        """The last line that the program printed, ``""`` if it printed none."""
        return self.last_lines[-1] if self.last_lines else ""

    @property
    def said(self) -> str:
        """Its last line; the message if it printed none."""
        return self.last_line or self.message


class CrashError(BuildError):
    """What ran in a process of its own crashed or hung; the message goes on from its name."""

    @classmethod
    def with_status(cls, status: int) -> "CrashError":
        """Return the error for a process that ended with *status*, as CommandError has it."""
        return cls(_reason(status))


def reason_of(error: OSError) -> str:
    """Return what the system says of *error*, with the file that it is about."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}: {error.filename}" if error.filename is not None else reason


class Interrupted(ImageFactoryError):
    """A signal asked the build to stop."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"Stopped by {name}.")
        self.signum = signum
        self.exit_status = 128 + signum
