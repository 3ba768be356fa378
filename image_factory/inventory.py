"""What is in an installed system: its packages, its name, and what its directories take.

The files of the guest are read, and none of its programs is run.  What they say is not trusted: sizes
have limits, and text without a known form is left out.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import rpmdb
from .errors import BuildError
from .log import logger, printable, step
from .model import INVENTORY_NAME, Build
from .tree import Tree

STEP = "Listing packages"

# Gives the bytes of a regular file of the guest, None if it has none of that path.
Read = Callable[[str], bytes | None]

_DPKG_STATUS = "var/lib/dpkg/status"
# A package in one of these has no files, or not all.
_DPKG_ABSENT = ("not-installed", "config-files", "half-installed")
_RPM_PLACES = ("usr/lib/sysimage/rpm", "var/lib/rpm")
# The first in /etc may be a link to the second, and links are not followed.
_OS_RELEASE = ("etc/os-release", "usr/lib/os-release")
_OS_KEYS = ("ID", "VERSION_ID", "VERSION_CODENAME", "PRETTY_NAME")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+~^-]{0,254}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~^:%-]{0,254}")
# os-release(5)
_OS_WORD = re.compile(r"[a-z0-9._-]{1,64}")
_WORD = re.compile(r"[A-Za-z0-9_-]{1,32}")
# What a kernel's package is called; Debian's has the version in its name.
_KERNEL = re.compile(
    r"linux-image-(?:unsigned-)?[0-9].*(?<!-dbg)(?<!-dbgsym)|kernel-(?:core|default|default-base|rt-core)"
)

_LONGEST_STATUS = 64 << 20
_LONGEST_TEXT = 200
_MOST_PACKAGES = 100_000
_MOST_LICENSES = 100


@dataclass(frozen=True)
class Package:
    """An installed package; *kind* is ``deb`` or ``rpm``, *version* is as its package manager shows it.

    *licenses* are the names in its copyright file or its header, None where nothing that can be read has them.
    """

    kind: str
    name: str
    version: str
    architecture: str
    source: str
    licenses: tuple[str, ...] | None


@dataclass(frozen=True)
class Inventory:
    """What is in a system: its os-release by lower-case keys, and the bytes that each top directory takes."""

    os: Mapping[str, str]
    packages: tuple[Package, ...]
    directories: Mapping[str, int]

    @property
    def kernels(self) -> list[str]:
        """The kernels' packages with their versions."""
        return [f"{found.name} {found.version}" for found in self.packages if _KERNEL.fullmatch(found.name)]


def take_inventory(build: Build, tree: Tree) -> None:
    """Write down in the working directory what is in the system *tree*, if there is to be a manifest."""
    if not build.plan.settings.manifest:
        return
    with step(STEP):
        found = Inventory(read_os(tree.load), read_packages(tree.load, build.directory), tree.usage())
        known = sum(package.licenses is not None for package in found.packages)
        name = found.os.get("pretty_name", "The system")
        logger.info("%s has %d packages; the licenses of %d are known.", name, len(found.packages), known)
        _path(build).write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")


def taken(build: Build) -> Inventory | None:
    """Return what take_inventory has written down, None if it was not called."""
    try:
        texts: dict[str, Any] = json.loads(_path(build).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    packages = [
        Package(**entry | {"licenses": entry["licenses"] and tuple(entry["licenses"])}) for entry in texts["packages"]
    ]
    return Inventory(texts["os"], tuple(packages), texts["directories"])


def _path(build: Build) -> Path:
    return build.directory / INVENTORY_NAME


def read_os(read: Read) -> dict[str, str]:
    """Return what os-release says, by lower-case keys; what has another form than os-release(5) says is told."""
    path, data = next(((path, data) for path in _OS_RELEASE if (data := read(path))), ("", b""))
    found = {}
    for line in data[: 1 << 16].decode("utf-8", errors="replace").splitlines():
        key, _, text = line.strip().partition("=")
        if key in _OS_KEYS:
            value = _os_value(path, key, text)
            if value:
                found[key.lower()] = value
    return found


def _os_value(path: str, key: str, text: str) -> str:
    """Return the value of *key* that *text* is in a shell, empty if it can't be used."""
    try:
        value = _clean(" ".join(shlex.split(text)))
    except ValueError:
        logger.warning("/%s: %s has a quote without an end: it is left out.", path, key)
        return ""
    if key == "PRETTY_NAME" or not value or _OS_WORD.fullmatch(value):
        return value
    # openEuler writes it so, and Kylin its V10; package URLs and other programs have lower case.
    lower = value.lower()
    if _OS_WORD.fullmatch(lower):
        logger.info("/%s: %s is %s there, and is taken as %s.", path, key, value, lower)
        return lower
    logger.warning("/%s: %s is %s, which os-release(5) does not allow: it is left out.", path, key, value)
    return ""


def read_packages(read: Read, directory: Path) -> tuple[Package, ...]:
    """Return the packages that dpkg and rpm know, sorted; *directory* is for files of its own.

    BuildError if rpm's database is damaged.
    """
    packages = [*_dpkg_packages(read), *_rpm_packages(read, directory)]
    if not packages:
        logger.warning("No packages are listed: the system has neither dpkg's database nor rpm's.")
    sound = [package for package in packages if _is_sound(package)]
    if len(sound) < len(packages):
        logger.warning("%d entries of the package database are no packages.", len(packages) - len(sound))
    if len(sound) > _MOST_PACKAGES:
        raise BuildError(f"The package database has {len(sound)} entries, which no system has.")
    by_key = {(package.name, package.architecture, package.version, package.kind): package for package in sound}
    return tuple(by_key[key] for key in sorted(by_key))


def _is_sound(package: Package) -> bool:
    return bool(
        _NAME.fullmatch(package.name)
        and _VERSION.fullmatch(package.version)
        and _WORD.fullmatch(package.architecture)
        and _NAME.fullmatch(package.source)
    )


def _clean(text: str) -> str:
    """Return the text of a guest as one short line without what a terminal would obey."""
    return " ".join(printable(text).split())[:_LONGEST_TEXT]


# dpkg.


def _dpkg_packages(read: Read) -> list[Package]:
    found: list[Package] = []
    # Packages of one source have one copyright file: where there are not two copies, a link leads from one to
    # the other (Debian Policy 12.5).  Links are not followed.
    licenses: dict[str, tuple[str, ...] | None] = {}
    for fields in _stanzas(read(_DPKG_STATUS) or b""):
        state = fields.get("Status", "").split()[-1:]
        if not state or state[0] in _DPKG_ABSENT:
            continue
        name = fields.get("Package", "")
        source = fields.get("Source", name).split(" ")[0]
        if _NAME.fullmatch(name) and licenses.get(source) is None:
            licenses[source] = read_licenses(read(f"usr/share/doc/{name}/copyright") or b"")
        found.append(Package("deb", name, fields.get("Version", ""), fields.get("Architecture", ""), source, None))
    return [dataclasses.replace(package, licenses=licenses.get(package.source)) for package in found]


def _stanzas(data: bytes) -> Iterator[dict[str, str]]:
    """Give the fields of each paragraph, of those with several lines the first."""
    for paragraph in data[:_LONGEST_STATUS].decode("utf-8", errors="replace").split("\n\n"):
        yield {key: value.strip() for key, value in re.findall(r"^([A-Za-z-]+):(.*)$", paragraph, re.MULTILINE)}


def read_licenses(copyright_file: bytes) -> tuple[str, ...] | None:
    """Return the names of the licenses in a machine-readable copyright file (DEP 5), None if it is none."""
    text = copyright_file[: 1 << 20].decode("utf-8", errors="replace")
    if not re.match(r"\s*Format(?:-Specification)?:", text):
        return None
    names = re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)
    return tuple(sorted({_clean(name) for name in names} - {""}))[:_MOST_LICENSES] or None


# rpm.


def _rpm_packages(read: Read, directory: Path) -> Iterator[Package]:
    for header in _rpm_headers(read, directory):
        # A public key is no package.
        if header.name == "gpg-pubkey":
            continue
        source = header.source
        source = source.removesuffix(".src.rpm").rsplit("-", 2)[0] if source.endswith(".src.rpm") else header.name
        cleaned = _clean(header.license)
        licenses = (cleaned,) if cleaned else None
        yield Package("rpm", header.name, header.version, header.architecture, source, licenses)


def _rpm_headers(read: Read, directory: Path) -> list[rpmdb.Header]:
    for place in _RPM_PLACES:
        for names in ((rpmdb.SQLITE, rpmdb.SQLITE_WAL), (rpmdb.NDB,)):
            files = {name: data for name in names if (data := read(f"{place}/{name}"))}
            if names[0] in files:
                return rpmdb.read(files, directory / "rpm")
        if read(f"{place}/Packages"):
            logger.warning("The packages of rpm are not listed: /%s/Packages is of a form before that of today.", place)
    return []
