"""The ways to make a disk; all else knows them by this table alone."""

from .bootstrap import SOURCE as BOOTSTRAP
from .bootstrap.archive import offered, remove_left
from .capture import SOURCE as CAPTURE
from .elements import SOURCE as ELEMENTS
from .image import SOURCE as IMAGE
from .installer import SOURCE as INSTALLER
from .kind import DiskSource, Key

__all__ = ["SOURCES", "DiskSource", "Key", "offered", "remove_left"]

SOURCES: dict[str, DiskSource] = {
    "installer": INSTALLER,
    "image": IMAGE,
    "bootstrap": BOOTSTRAP,
    "elements": ELEMENTS,
    "capture": CAPTURE,
}
