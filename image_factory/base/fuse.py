"""Filesystems of users: what root and other users may not enter, and the privileged helper does not touch."""

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mount:
    """A filesystem of FUSE: its *kind*, where it is mounted, and the *options* of its superblock."""

    kind: str
    point: str
    options: tuple[str, ...]


def mount_of(directory: Path) -> Mount | None:
    """Return the filesystem of FUSE that *directory* is or will be on, None if it is another one or can't be seen."""
    for existing in (directory, *directory.parents):
        try:
            descriptor = os.open(existing, os.O_PATH)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        try:
            told = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii")
        finally:
            os.close(descriptor)
        [number] = re.findall(r"^mnt_id:\s*([0-9]+)$", told, re.MULTILINE)
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").split("\n"):
            words, _, end = line.partition(" - ")
            if words.split(" ")[0] == number and end.startswith("fuse"):
                kind, _, options = end.split(" ")
                return Mount(kind, words.split(" ")[4], tuple(options.split(",")))
        return None
    return None
