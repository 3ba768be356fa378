"""What a guest prints to its serial console, cut into lines that can be matched and shown."""

import codecs
import re
from pathlib import Path

from ..base.log import printable

# Ends of lines, and CSI sequences that move the cursor up, down or to a position (ECMA-48): a terminal
# goes on in another place there.  Full-screen programs have no other ends of lines.
_BREAK = re.compile(r"[\r\n\f\v]|\x1b\[[0-9;]*[ABEFHdf]")
_UNFINISHED_ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]{0,30})?\Z")
# Sequences that move the cursor to the right stand for a blank.
_RIGHT = re.compile(r"\x1b\[[0-9]*C")

_LONGEST_LINE = 4096

# Text that a progress bar writes over.  The match begins only where a line does; otherwise a long line would take
# time with the square of its length.
_OVERWRITTEN = re.compile(rb"(?<![^\r\n\x1b])[^\r\n\x1b]*+\r(?=[^\r\n\x1b])")


class Console:
    """Cut what comes in pieces into lines; no line is longer than 4096 characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that end in *data*, without control characters and empty ones."""
        *parts, self._rest = _BREAK.split(self._rest + self._decoder.decode(data))
        while len(self._rest) > _LONGEST_LINE:
            parts.append(self._rest[:_LONGEST_LINE])
            self._rest = self._rest[_LONGEST_LINE:]
        lines = (_clean(part[start : start + _LONGEST_LINE]) for part in parts for start in _starts(part))
        return [line for line in lines if line]

    @property
    def line(self) -> str:
        """The line that has not ended yet, where a prompt would be, or a percentage that grows."""
        return _clean(_UNFINISHED_ESCAPE.sub("", self._rest))


def _starts(part: str) -> range:
    return range(0, len(part), _LONGEST_LINE)


def _clean(text: str) -> str:
    return printable(_RIGHT.sub(" ", text)).strip()


def tail(path: Path, lines: int = 40) -> list[str]:
    """Return the last *lines* that the guest printed, fit to be shown; empty if there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 64 * 1024))
            data = file.read()
    except OSError:
        return []
    console = Console()
    shown = [*console.feed(_OVERWRITTEN.sub(b"", data)), console.line]
    return [line for line in shown if line][-lines:]
