"""What is in an installed system: its packages, its name, and what its directories take.

The files of the guest are read, and none of its programs is run.  What they say is not trusted: each size and
each sum has a limit, and text without a known form is left out.  More than a limit of what would only be missing is
said in the log; of what would make a wrong list it is an error.
"""

import dataclasses
import json
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..base import interrupts
from ..base.errors import BuildError
from ..base.log import logger, printable
from ..base.units import format_size
from ..model import INVENTORY_NAME, Build
from . import rpmdb
from .tree import Tree


class Read(Protocol):
    """Gives bytes of a guest's file, as ``Tree.load`` does."""

    def __call__(self, path: str, most: int, offset: int = 0, /) -> bytes | None:
        """Return at most *most* bytes at *offset* of the regular file *path*, None if there is none."""


_DPKG_STATUS = "var/lib/dpkg/status"
# A package in one of these has no files, or not all.
_DPKG_ABSENT = ("not-installed", "config-files", "half-installed")
_SOURCES = "etc/apt/sources.list"
_SOURCE = re.compile(r"deb( \[[^]]*\])? [a-z][a-z0-9+.-]*:[!-~]+( [!-~]+)+")
_MOST_SOURCES, _LONGEST_SOURCE = 100, 1000
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
_LONGEST_OS_RELEASE = 64 << 10
# rpm's database of a large system has 200 MiB.
_LONGEST_DATABASE = 512 << 20
_LONGEST_TEXT = 200
_MOST_PACKAGES = 100_000
_MOST_LICENSES = 100

# Of one copyright file, and of all: of those that are read, of the names in them, and of the time that it takes.
_LONGEST_COPYRIGHT = 1 << 20
_COPYRIGHTS = 512 << 20
_LICENSE_TEXTS = 16 << 20
_COPYRIGHT_SECONDS = 600.0

_AT_ONCE = 4 << 20


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
    """What is in a system: its os-release by lower-case keys, and the bytes that each top directory takes.

    *sources* are what apt takes packages from, as lines of sources.list, without what is secret of them.
    """

    os: Mapping[str, str]
    packages: tuple[Package, ...]
    directories: Mapping[str, int]
    sources: tuple[str, ...] = ()

    @property
    def kernels(self) -> list[str]:
        """The kernels' packages with their versions."""
        return [f"{found.name} {found.version}" for found in self.packages if _KERNEL.fullmatch(found.name)]


def take_inventory(build: Build, tree: Tree) -> None:
    """Write down in the working directory what is in the system *tree*."""
    # Reading changes nothing, so a signal may come at any point.
    with interrupts.interruptible():
        packages = read_packages(tree.load, build.directory)
        sources = read_sources(tree.read((_SOURCES, *(f"{_SOURCES}.d/*.{kind}" for kind in ("list", "sources")))))
        found = Inventory(read_os(tree.load), packages, _sizes(tree), sources)
    known = sum(package.licenses is not None for package in found.packages)
    name = found.os.get("pretty_name", "The system")
    logger.info("%s has %d packages; the licenses of %d are known.", name, len(found.packages), known)
    _path(build).write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")


def _sizes(tree: Tree) -> dict[str, int]:
    try:
        return tree.usage()
    except BuildError as error:
        logger.warning("What the directories of the system take is not known: %s", error.message)
        return {}


def taken(build: Build) -> Inventory | None:
    """Return what take_inventory has written down, None if it was not called."""
    try:
        texts: dict[str, Any] = json.loads(_path(build).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    packages = [
        Package(**entry | {"licenses": entry["licenses"] and tuple(entry["licenses"])}) for entry in texts["packages"]
    ]
    return Inventory(texts["os"], tuple(packages), texts["directories"], tuple(texts["sources"]))


def _path(build: Build) -> Path:
    return build.directory / INVENTORY_NAME


def read_os(read: Read) -> dict[str, str]:
    """Return what os-release says, by lower-case keys; what has another form than os-release(5) says is told."""
    path, data = next(((path, data) for path in _OS_RELEASE if (data := read(path, _LONGEST_OS_RELEASE))), ("", b""))
    found = {}
    for line in data.decode("utf-8", errors="replace").splitlines():
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
    copyrights = _Copyrights(read)
    # Packages of one source have one copyright file: where there are not two copies, a link leads from one to
    # the other (Debian Policy 12.5).  Links are not followed.
    licenses: dict[str, tuple[str, ...] | None] = {}
    status = read(_DPKG_STATUS, _LONGEST_STATUS + 1) or b""
    if len(status) > _LONGEST_STATUS:
        raise _too_long(_DPKG_STATUS, _LONGEST_STATUS)
    for fields in _stanzas(status):
        state = fields.get("Status", "").split()[-1:]
        if not state or state[0] in _DPKG_ABSENT:
            continue
        name = fields.get("Package", "")
        source = fields.get("Source", name).split(" ")[0]
        if _NAME.fullmatch(name) and licenses.get(source) is None:
            licenses[source] = copyrights.licenses(name)
        found.append(Package("deb", name, fields.get("Version", ""), fields.get("Architecture", ""), source, None))
    copyrights.tell()
    return [dataclasses.replace(package, licenses=licenses.get(package.source)) for package in found]


def _too_long(path: str, most: int) -> BuildError:
    return BuildError(f"/{path} of the system has more than {format_size(most)}, which no system's has.")


def _stanzas(data: bytes) -> Iterator[dict[str, str]]:
    """Give the fields of each paragraph that are used, of those with several lines the first."""
    start = 0
    for _ in range(_MOST_PACKAGES * 2):
        end = data.find(b"\n\n", start)
        paragraph = data[start : end if end >= 0 else len(data)].decode("utf-8", errors="replace")
        yield {key: value.strip() for key, value in _FIELD.findall(paragraph)}
        if end < 0:
            return
        start = end + 2
    raise BuildError(
        f"/{_DPKG_STATUS} of the system has more than {_MOST_PACKAGES * 2} entries, which no system's has."
    )


_FIELD = re.compile(r"^(Package|Status|Source|Version|Architecture):(.*)$", re.MULTILINE)


class _Copyrights:
    """The copyright files of Debian's packages, as long as there are not too many."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._left = _COPYRIGHTS
        self._texts_left = _LICENSE_TEXTS
        self._deadline = time.monotonic() + _COPYRIGHT_SECONDS
        self._is_over = False
        self._cut_off = 0

    def licenses(self, package: str) -> tuple[str, ...] | None:
        """Return the licenses of *package*; None if they are not known, or nothing more is read."""
        interrupts.check()
        if self._is_over:
            return None
        path = f"usr/share/doc/{package}/copyright"
        data = self._read(path, _LONGEST_COPYRIGHT + 1) or b""
        self._cut_off += len(data) > _LONGEST_COPYRIGHT
        found = read_licenses(data[:_LONGEST_COPYRIGHT])
        self._left -= len(data)
        self._texts_left -= sum(map(len, found or ()))
        if min(self._left, self._texts_left) < 0 or time.monotonic() > self._deadline:
            logger.warning("The copyright files are too many or too long: those after /%s are not read.", path)
            self._is_over = True
        return found

    def tell(self) -> None:
        """Log what was left out of files that are too long."""
        if self._cut_off:
            size = format_size(_LONGEST_COPYRIGHT)
            logger.warning("Of %d copyright files only the first %s are read.", self._cut_off, size)


def read_licenses(copyright_file: bytes) -> tuple[str, ...] | None:
    """Return the names of the licenses in a machine-readable copyright file (DEP 5), None if it is none."""
    text = copyright_file.decode("utf-8", errors="replace")
    if not re.match(r"\s*Format(?:-Specification)?:", text):
        return None
    names = re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)
    return tuple(sorted({_clean(name) for name in names} - {""}))[:_MOST_LICENSES] or None


def read_sources(texts: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return what the files *texts* of apt's, by their paths, have of archives of packages, in the form of one line."""
    lines: list[str] = []
    for path, data in sorted(texts.items()):
        text = data.decode("utf-8", "replace")
        lines += _stanza_lines(text) if path.endswith(".sources") else re.findall(r"^[^#\n]+", text, re.MULTILINE)
    short = (" ".join(printable(line).split()) for line in lines if len(line) <= _LONGEST_SOURCE)
    return tuple(dict.fromkeys(line for line in short if _SOURCE.fullmatch(line)))[:_MOST_SOURCES]


def _stanza_lines(text: str) -> Iterator[str]:
    """Give the lines that stand for the stanzas in *text*, of the form of sources.list(5) that has fields."""
    for stanza in re.split(r"\n[ \t]*\n", re.sub(r"^#.*\n?", "", text, flags=re.MULTILINE)):
        fields = {
            name.lower(): value.split()
            for name, value in re.findall(r"^([A-Za-z-]+):((?:.*\n?)(?:[ \t].*\n?)*)", stanza, re.MULTILINE)
        }
        if "deb" not in fields.get("types", ()) or fields.get("enabled") == ["no"]:
            continue
        keyring = fields.get("signed-by", [])
        # A key may stand in the field itself.
        options = f"[signed-by={keyring[0]}] " if len(keyring) == 1 and keyring[0].startswith("/") else ""
        for uri in fields.get("uris", ()):
            for suite in fields.get("suites", ()):
                yield f"deb {options}{uri} {suite} {' '.join(fields.get('components', ()))}".rstrip()


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


@contextmanager
def rpm_database(read: Read, directory: Path) -> Iterator[Path | None]:
    """Give a copy of the database of rpm in *directory*, None if the system has none of a form that can be read."""
    places = ((place, names) for place in _RPM_PLACES for names in ((rpmdb.SQLITE, rpmdb.SQLITE_WAL), (rpmdb.NDB,)))
    place, names = next(((place, names) for place, names in places if read(f"{place}/{names[0]}", 1)), ("", ()))
    if not names:
        yield None
        return
    copies = directory / "rpm"
    copies.mkdir(mode=0o700)
    try:
        for name in names:
            # An empty log is as good as none.
            if read(f"{place}/{name}", 1):
                _copy(read, f"{place}/{name}", copies / name)
        yield copies / names[0]
    finally:
        shutil.rmtree(copies)


def _rpm_headers(read: Read, directory: Path) -> list[rpmdb.Header]:
    with rpm_database(read, directory) as database:
        if database is not None:
            return rpmdb.read(database)
    for place in _RPM_PLACES:
        if read(f"{place}/Packages", 1):
            logger.warning("The packages of rpm are not listed: /%s/Packages is of a form before that of today.", place)
    return []


def _copy(read: Read, path: str, copy: Path) -> None:
    """Copy the file *path* of the guest to *copy*."""
    with copy.open("xb") as file:
        while data := read(path, _AT_ONCE, file.tell()):
            file.write(data)
            if file.tell() > _LONGEST_DATABASE:
                raise _too_long(path, _LONGEST_DATABASE)
