"""What the scripts of elements are told: the variables that they find in each phase."""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base import log
from ..configuration.settings import ELEMENT_PREFIX
from .scripts import FUNCTIONS

# Variables of elements, by what the keys of a section begin with.
_PREFIX = ELEMENT_PREFIX.replace("-", "_")
# What follows these is the name of an element or a repository.
_OF_NAMES = ("dib_installtype_", "dib_repotype_", "dib_repolocation_", "dib_reporef_")

# Settings of which only elements know a default.
_DEFAULTS = {
    "DIB_DEBUG_TRACE": "0",
    "DIB_CHECKSUM": "0",
    "DIB_NO_TMPFS": "1",
    "DIB_MIN_TMPFS": "2",
    # The packages that scripts in Python put together come in one order, not in another one each time.
    "PYTHONHASHSEED": "0",
}
# What is not to be found in an image: a part of the name of a variable.
_SECRET = re.compile(r"PASS|PWD$|SECRET|TOKEN|CREDENTIAL|PRIVATE|(?<!PW)AUTH$|KEY$", re.IGNORECASE)
# A secret of fewer characters is a word that any output may have.
_SHORTEST_SECRET = 6
# Phases on the finished tree know its size; the first and the last one have another name for the tree.
_WITH_TARGET = ("root.d", "cleanup.d")
_WITH_DEVICES = ("pre-finalise.d", "finalise.d", "cleanup.d")
_WITH_SIZE = ("block-device.d", *_WITH_DEVICES)


def given(
    variables: Mapping[str, str], listed: Sequence[tuple[str, str]], environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the variables that the user gives: those of *environment*, the keys of the section, and those *listed*.

    *variables* has the keys of the section, with underscores; those of elements are written in capitals, but for names.
    The last one of a name counts.
    """
    keys = {_variable(name): variables[name].strip() for name in variables if name.startswith(_PREFIX)}
    return {**environment, **keys, **dict(listed)}


def secrets(given: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """Return the values of those *given* that nobody is to see; of *environment*, elements' own variables alone."""
    return [
        value
        for name, value in given.items()
        if _SECRET.search(name)
        and len(value) >= _SHORTEST_SECRET
        and (name.startswith("DIB_") or environment.get(name) != value)
    ]


def _variable(key: str) -> str:
    prefix = next((prefix for prefix in _OF_NAMES if key.startswith(prefix)), key)
    return prefix.upper() + key.removeprefix(prefix)


@dataclass(frozen=True)
class Told:
    """What the scripts of all phases are told of a build.

    *top* is the directory that the build has for its elements, *filesystem* is the root's, *disk* what all scripts are
    told of the disk; *image_size* is in bytes, 0 for that of the tree.
    """

    image_name: str
    image_type: str
    top: Path
    cache: Path
    offline: bool
    filesystem: str
    disk: Mapping[str, str]
    image_size: int

    @property
    def tree(self) -> Path:
        """The tree of the system."""
        return self.top / "mnt"

    @property
    def beside(self) -> Path:
        """Where scripts find the place of the image."""
        return self.top / "beside"

    @property
    def hooks(self) -> Path:
        """The merged hooks."""
        return self.top / "hooks"


def cache_places(given: Mapping[str, str], told: Told) -> dict[str, str]:
    """Return the directories of caches and locks, which outlast a build."""
    return {
        "DIB_IMAGE_CACHE": given.get("DIB_IMAGE_CACHE") or str(told.cache),
        "DIB_LOCKFILES": given.get("DIB_LOCKFILES") or str(told.cache / "lockfiles"),
    }


def written_places(given: Mapping[str, str], told: Told) -> list[str]:
    """Return the directories of this machine that scripts write to: caches, and where the user wants manifests."""
    manifests = given.get("DIB_MANIFEST_SAVE_DIR")
    return [*cache_places(given, told).values(), *([os.path.abspath(manifests)] if manifests else [])]


def environment(
    directory: str,
    given: Mapping[str, str],
    told: Told,
    elements: Mapping[str, Path],
    path: Mapping[str, str],
    devices: Mapping[str, str],
) -> dict[str, str]:
    """Return the variables of the phase *directory*.

    *given* are the user's, *elements* has the directory of each, *path* the variables that say where things are looked
    for, *devices* those that say what the disk is attached as.
    """
    listed = {name: value for name, value in sorted(given.items()) if name.startswith("DIB_")}
    public = {name: value for name, value in listed.items() if not _SECRET.search(name)}
    found = {
        **_DEFAULTS,
        **given,
        **cache_places(given, told),
        **path,
        "LC_ALL": "C",
        "_LIB": str(told.top / "lib"),
        "DIB_PYTHON_EXEC": str(told.top / "bin/dib-python-exec"),
        "DIB_ARGS": f"image-factory {told.image_name}",
        "DIB_ENV": "\n".join(f"declare -x {name}={shlex.quote(log.masked(value))}" for name, value in public.items()),
        "DIB_OFFLINE": given.get("DIB_OFFLINE") or ("1" if told.offline else ""),
        "DIB_MANIFEST_SAVE_DIR": given.get("DIB_MANIFEST_SAVE_DIR") or str(told.top / "manifests"),
        "FS_TYPE": told.filesystem,
        "IMAGE_TYPE": told.image_type,
        # A path, as with diskimage-builder's -o: what scripts make beside the image has this name and more.
        "IMAGE_NAME": str(told.beside / told.image_name),
        "IMAGE_ELEMENT": " ".join(elements),
        "IMAGE_ELEMENT_YAML": "".join(f"{name}: {json.dumps(str(place))}\n" for name, place in elements.items()),
        "TMP_BUILD_DIR": str(told.top),
        "TMP_IMAGE_DIR": str(told.top / "image"),
        "TMP_HOOKS_PATH": str(told.hooks),
        "TMP_MOUNT_PATH": str(told.tree),
        "TMPDIR": str(told.top / "tmp"),
        "OUT_IMAGE_PATH": "",
        "DIB_BLOCK_DEVICE_PARAMS_YAML": str(told.top / "block-device/config.yaml"),
        **told.disk,
        "PS4": "+ ",
        **{f"BASH_FUNC_{name}%%": body for name, body in FUNCTIONS.items()},
        "BASH_FUNC_get_image_element_array%%": _array(elements),
    }
    if directory in _WITH_TARGET:
        found["TARGET_ROOT"] = str(told.tree)
    if directory in _WITH_DEVICES:
        found |= devices
    if directory in _WITH_SIZE and told.image_size:
        found["DIB_IMAGE_SIZE"] = str(told.image_size // 1024)
    return found


def _array(elements: Mapping[str, Path]) -> str:
    """Return the function of bash that prints what an associative array of the elements is made of."""
    words = " ".join(f"[{name}]={shlex.quote(str(place))}" for name, place in elements.items())
    return f"() {{ echo {shlex.quote(words)}; }}"
