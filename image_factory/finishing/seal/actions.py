"""A plan of an operation gets a System, which says what was found there, and returns Actions to carry out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...system.privileged import takes_directory, takes_name

_MACHINE_ID = re.compile(rb"[0-9a-f]{32}")
# Most directories that a home is deep, as the helper takes it.
_HOME_LEVELS = 8


@dataclass(frozen=True)
class System:
    """What sealing looks at, as it was before any change.

    *files* has the contents of what operations read, *kinds* the kinds of what they look at, both by path.
    *homes* are the directories of people, *chosen* the names of the operations, *snapshots* those of the system
    that can be removed.
    """

    files: Mapping[str, bytes]
    kinds: Mapping[str, str]
    homes: tuple[str, ...]
    chosen: tuple[str, ...]
    snapshots: tuple[str, ...] = ()

    @property
    def machine_id(self) -> bytes | None:
        """The machine ID of the build, None if the system has none."""
        for path in ("etc/machine-id", "var/lib/dbus/machine-id"):
            text = self.files.get(path, b"").strip()
            if _MACHINE_ID.fullmatch(text):
                return text
        return None

    def below(self, directory: str) -> list[str]:
        """Return the names in *directory* that are known; odd ones, which no program makes, are left out."""
        split = [path.rpartition("/") for path in (*self.kinds, *self.files)]
        return sorted({name for parent, _, name in split if parent == directory and takes_name(name)})


@dataclass
class Actions:
    """What an operation does: patterns to remove and to empty, files to write, paths to rename, snapshots that go."""

    remove: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    write: dict[str, bytes] = field(default_factory=dict)
    rename: dict[str, str] = field(default_factory=dict)
    snapshots: tuple[str, ...] = ()


def is_home(path: str) -> bool:
    """Return whether the helper takes *path*, a home directory, in patterns."""
    return takes_directory(path, _HOME_LEVELS)
