"""Inject faults where a build runs no program: Python reads this file at its start.

The file ``hook`` of $FAULTS has lines: an audit event, a pattern of its arguments, a fault.
"""

import errno
import fnmatch
import os
import signal
import sys
import time
from pathlib import Path

_directory = Path(os.environ.get("FAULTS", "/nonexistent"))


def _watch() -> None:
    event, pattern, fault = (_directory / "hook").read_text().splitlines()
    struck = False

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal struck
        if struck or name != event or not fnmatch.fnmatchcase(" ".join(map(_text, arguments)), pattern):
            return
        struck = True
        (_directory / "struck").mkdir()
        if fault == "missing":
            os.rename(str(arguments[0]), f"{arguments[0]}.away")
        elif fault == "clock-back":
            (_directory / "clock").touch()
        elif fault == "killed-group":
            os.killpg(0, signal.SIGKILL)
        elif fault.startswith("signal-"):
            os.kill(os.getpid(), getattr(signal, f"SIG{fault.removeprefix('signal-')}"))
            time.sleep(0.05)
        else:
            number = {"full": errno.ENOSPC, "descriptors": errno.EMFILE, "fails": errno.EIO}[fault]
            raise OSError(number, os.strerror(number), "injected")

    sys.addaudithook(hook)


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


if (_directory / "hook").is_file() and any(word.endswith("/image-factory") for word in sys.orig_argv):
    _watch()
