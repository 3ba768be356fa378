"""Who vouches for a download: signed lists of checksums, and what they say of a file.

Each distribution has its own way; LAYOUTS tells by its URI which one a file has.
"""

import configparser
import contextlib
import datetime
import difflib
import email.utils
import hashlib
import lzma
import os
import re
import shutil
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..base import command, openpgp, trust
from ..base.errors import BuildError, ConfigurationError
from ..base.log import logger
from ..base.units import format_size
from ..configuration.parsers import Source
from ..configuration.settings import ImageSettings
from ..model import Plan
from . import fetch
from .fetch import Expected, Fetched

KEYRINGS = Path("/usr/share/keyrings")

# What a list may have, unpacked, and what xz may take for it: a few bytes unpack to gigabytes.
_UNPACKED_SIZE = 64 << 20
_UNPACKING_MEMORY = 128 << 20

_BELIEVED = (
    "It and each directory above have to belong to root or you, with nobody else writing: "
    "chown, chmod go-w, or another --cache-dir."
)

# x86's boot protocol (Documentation/arch/x86/boot.rst): a magic number, and where the version's text is.
_KERNEL_MAGIC = slice(0x202, 0x206)
_KERNEL_VERSION = slice(0x20E, 0x210)
_KERNEL_VERSION_BASE = 0x200


class _Unverifiable(Exception):
    """Nobody vouches for a file, or nobody that this machine knows; says why, and what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class _Release:
    """What a Debian archive's InRelease says: when it is from, and the SHA-256 of its files by path."""

    base: str
    signed_by: str
    date: datetime.datetime
    checksums: dict[str, str]


@dataclass(frozen=True)
class Layout:
    """A way to publish files and their checksums.

    *pattern* matches whole URIs.  *keyring* is the file of the public keys, in the Debian package *package*;
    a layout without one has no signatures.
    """

    name: str
    pattern: re.Pattern[str]
    find: Callable[["Verifier", "Layout", re.Match[str]], Expected]
    keyring: str | None = None
    package: str | None = None


class Verifier:
    """Fetches the files of one build, and verifies them as its settings say."""

    def __init__(self, plan: Plan) -> None:
        self._image = plan.image
        self._settings = plan.settings
        # What a link leads to: who could change the link could choose another directory after it was looked at.
        self._directory = Path(os.path.realpath(plan.cache_dir))
        self._own_directory = plan.work_path / "downloads"
        # What a list says holds for the whole build: kernel and initrd are of one version.
        self._texts: dict[str, bytes] = {}
        self._releases: dict[str, _Release] = {}
        self._installers: dict[str, str] = {}
        self._found: dict[str, str] = {}
        self._newest: dict[str, datetime.datetime] = {}

    @contextlib.contextmanager
    def locked(self, sources: Iterable[Source]) -> Iterator[None]:
        """Keep other builds from changing the cache inside, if one of *sources* is to be in it.

        So files that are fetched in one go belong together, and the lists that vouch for them too.
        """
        if all(source.path is not None for source in sources):
            yield
            return
        doubt = trust.why_not(self._directory)
        if doubt:
            # The check has warned of it.
            logger.info("The cache is not used: %s.", doubt)
            self._directory = self._own_directory
        with fetch.locked(self._directory):
            yield

    def fetch(self, key: str, source: Source) -> Fetched:
        """Return *source*, which the setting *key* names; in the cache, which is ``locked``, unless it is local.

        BuildError if it can't be had, or is not what it should be.
        """
        pinned = self._pinned(key)
        if source.path is not None:
            if pinned:
                _check_local(self._image, key, source.path, pinned)
            return Fetched(source.path, source.uri, f"{key}-sha256" if pinned else None)
        if self._settings.offline:
            return self._cached(key, source)
        if pinned:
            expected = Expected(pinned, f"{key}-sha256 of [{self._image}]", f"{key}-sha256")
            return fetch.fetch_from_mirrors(source, self._directory, lambda uri: expected)
        found = fetch.fetch_from_mirrors(source, self._directory, self._expect)
        # Only now: a mirror whose file was refused has no say in what the next one may have.
        self._installers |= self._found
        self._remember_dates()
        return found

    def check_cache(self, sources: dict[str, Source]) -> None:
        """Warn if the cache is not used for *sources*.

        Raises ConfigurationError, naming all of them that a build without a network lacks.
        """
        is_asked = any(source.path is None for source in sources.values())
        doubt = trust.why_not(self._directory) if is_asked else None
        if not self._settings.offline:
            if doubt:
                logger.warning(
                    "The cache is not used, all is downloaded for this build alone: %s. %s", doubt, _BELIEVED
                )
            return
        if doubt:
            raise ConfigurationError(
                f"--offline: what is in {self._directory} is not believed: {doubt}.", hint=_BELIEVED
            )
        missing = [
            f"{key} ({source.uri})"
            for key, source in sources.items()
            if source.path is None and self._usable(key, source) is None
        ]
        if missing:
            raise ConfigurationError(
                f"--offline: {self._directory} lacks {', '.join(missing)}, or what is there was never verified.",
                hint="Build once without --offline"
                + ("" if self._settings.verify == "none" else "; verify = none uses what is there as it is"),
            )

    def _pinned(self, key: str) -> str | None:
        pinned: str | None = getattr(self._settings, f"{key.replace('-', '_')}_sha256")
        return pinned

    def _usable(self, key: str, source: Source) -> Fetched | None:
        """Return *source* as it is in the cache, None if a build without a network can't have that."""
        target = self._directory / source.name
        if not source.name or not trust.own(target):
            return None
        pinned = self._pinned(key)
        if pinned:
            is_it = Expected(pinned, "", "").is_that_of(target)
            return Fetched(target, source.uri, f"{key}-sha256") if is_it else None
        verified_by = fetch.known_verified(target, source.uris)
        return Fetched(target, source.uri, verified_by) if verified_by or self._settings.verify == "none" else None

    def _cached(self, key: str, source: Source) -> Fetched:
        found = self._usable(key, source)
        if found is None:
            raise BuildError(f"--offline: {source.name} is not in {self._directory}, or was never verified.")
        logger.info("%s is taken from the cache.", found.path.name)
        return found

    def _expect(self, uri: str) -> Expected | None:
        """Return what the file at *uri* must be, None if nobody can tell; BuildError if that is not accepted."""
        if self._settings.verify == "none":
            return None
        try:
            layout, match = _layout_of(uri)
            expected = layout.find(self, layout, match)
            logger.info(
                "%s must have the %s %s, as %s lists: %s.",
                uri, expected.algorithm, expected.checksum, expected.listed_in, expected.by,
            )  # fmt: skip
            return expected
        except _Unverifiable as error:
            if self._settings.verify == "required":
                raise BuildError(f"{uri} can't be verified: {error}.", hint=error.hint) from error
            logger.warning("%s is not verified: %s. %s.", uri, error, error.hint)
            return None

    def read(self, uri: str, *, secure: bool = False) -> bytes:
        """Return the list at *uri*, which is fetched once in a build."""
        if uri not in self._texts:
            self._texts[uri] = fetch.read(uri, secure=secure)
        return self._texts[uri]

    @property
    def has_own_keyring(self) -> bool:
        """Whether the user has said whose signatures count."""
        return self._settings.keyring is not None

    def keyring(self, layout: Layout) -> Path:
        """Return the file of the keys that sign what *layout* has."""
        if not all(shutil.which(name, path=command.search_path()) for name in openpgp.VERIFIERS):
            raise _Unverifiable("there is no gpgv here", "Install it: apt-get install gpgv")
        if self._settings.keyring:
            return self._settings.keyring
        if layout.keyring is None:
            raise _Unverifiable(
                f"which keys are those of {layout.name} is not known here",
                "Get them from a place that you trust, and name their file with 'keyring'",
            )
        path = KEYRINGS / layout.keyring
        if not path.is_file():
            raise _Unverifiable(
                f"{path} is missing", f"Install it: apt-get install {layout.package}, or name another with 'keyring'"
            )
        return path

    def release(self, layout: Layout, archive: str, suite: str) -> _Release:
        """Return what the InRelease of *suite* says; BuildError if it is not genuine, or out of date."""
        base = f"{archive}dists/{suite}/"
        if base not in self._releases:
            where = f"{base}InRelease"
            keyring = self.keyring(layout)
            text, signed_by = check_signature(keyring, self.read(where), None, where)
            found = _parse_release(text, where, base, suite, signed_by)
            newest = self._newest.get(suite) or self._newest_before(suite)
            if newest and found.date < newest:
                raise BuildError(
                    f"{where} is of {found.date:%Y-%m-%d %H:%M}, older than one of {newest:%Y-%m-%d %H:%M} "
                    "that was seen before: the mirror is out of date.",
                    hint=f"Try another mirror; if you want an older archive, remove {self._date_path(suite)}",
                )
            self._newest[suite] = found.date
            self._releases[base] = found
        return self._releases[base]

    def _date_path(self, suite: str) -> Path:
        return self._directory / f".{suite}.release-date"

    def _newest_before(self, suite: str) -> datetime.datetime | None:
        """Return the date of the newest InRelease that builds before have taken files by."""
        try:
            path = self._date_path(suite)
            found = datetime.datetime.fromisoformat(path.read_text(encoding="ascii") if trust.own(path) else "")
            return found if found.tzinfo else None
        except (OSError, ValueError):
            return None

    def _remember_dates(self) -> None:
        """Write down the dates of the releases: an old one has good signatures for ever."""
        for suite, date in self._newest.items():
            if self._newest_before(suite) != date:
                fetch.write_whole(self._date_path(suite), date.isoformat().encode())

    def listed_in(self, release: _Release, path: str) -> bytes:
        """Return the file at *path* of the archive that *release* lists."""
        where = f"{release.base}{path}"
        if path not in release.checksums:
            raise BuildError(f"{release.base}InRelease does not list {path}.")
        data = self.read(where)
        found = hashlib.sha256(data).hexdigest()
        if found != release.checksums[path]:
            self._texts.pop(where, None)
            raise BuildError(
                f"{where} is not what {release.base}InRelease lists: "
                f"expected SHA-256 {release.checksums[path]}, found {found}.",
                hint="The mirror is being updated, or broken. Try again later, or another mirror",
            )
        return data

    def one_installer(self, name: str, checksums: bytes, where: str) -> None:
        """Raise BuildError if *checksums* are those of another installer *name* than this build has begun with."""
        digest = hashlib.sha256(checksums).hexdigest()
        self._found[name] = digest
        if self._installers.get(name, digest) != digest:
            raise BuildError(f"{where} is of another version of the installer than the file fetched before.")

    def check_modules(self, uri: str, kernel: Path) -> None:
        """Raise BuildError if the Debian archive of *uri* has no more modules for the installer's *kernel*.

        The installer itself finds out after minutes.  What can't be known here is no error.
        """
        if self._settings.verify == "none" or self._settings.offline:
            return
        match = _DEBIAN.pattern.fullmatch(uri)
        version = kernel_version(kernel)
        if not match or not version:
            return
        try:
            release = self.release(_DEBIAN, match["archive"], match["suite"])
            available = set(self._installer_kernels(release, match["arch"]))
        except (BuildError, _Unverifiable) as error:
            logger.warning("Whether the archive has modules for the installer's kernel is not known: %s", error)
            return
        if available and version not in available:
            raise BuildError(
                f"{uri} is of kernel {version}, but the archive's installer components are for "
                f"{', '.join(sorted(available))}: the installation would find no kernel modules.",
                hint="Take the installer from 'current', or from the archive that it is of",
            )

    def _installer_kernels(self, release: _Release, arch: str) -> Iterator[str]:
        index = f"main/debian-installer/binary-{arch}/Packages"
        suffix = next((suffix for suffix in _UNPACKERS if index + suffix in release.checksums), None)
        if suffix is None:
            raise BuildError(f"{release.base}InRelease lists no {index}.")
        data = _unpacked(self.listed_in(release, index + suffix), suffix, f"{release.base}{index}{suffix}")
        text = data.decode("utf-8", errors="replace")
        yield from re.findall(r"^Kernel-Version: (\S+)$", text, re.MULTILINE)


_UNPACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lambda data: lzma.LZMADecompressor(memlimit=_UNPACKING_MEMORY).decompress(data, _UNPACKED_SIZE + 1),
    ".gz": lambda data: zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(data, _UNPACKED_SIZE + 1),
    "": bytes,
}


def _unpacked(data: bytes, suffix: str, where: str) -> bytes:
    """Return what is packed in *data*, which is from *where* and packed as *suffix* says; BuildError if it can't be."""
    try:
        found = _UNPACKERS[suffix](data)
    except (lzma.LZMAError, zlib.error) as error:
        raise BuildError(f"{where} can't be unpacked: {error}.") from error
    if len(found) > _UNPACKED_SIZE:
        raise BuildError(f"{where} unpacks to more than {format_size(_UNPACKED_SIZE)}, which no such list has.")
    return found


def _check_local(image: str, key: str, path: Path, pinned: str) -> None:
    found = Expected(pinned, "", "").found_in(path)
    if found != pinned:
        raise BuildError(
            f"{path} is not what {key}-sha256 of [{image}] says: expected SHA-256 {pinned}, found {found}."
        )


def _layout_of(uri: str) -> tuple[Layout, re.Match[str]]:
    for layout in LAYOUTS:
        match = layout.pattern.fullmatch(uri)
        if match:
            return layout, match
    raise _Unverifiable(
        "its URI is of no known distribution", "Pin it with linux-sha256, source-image-sha256 and the like"
    )


def programs(settings: ImageSettings, sources: Iterable[Source]) -> list[str]:
    """Return the programs that a build can't verify *sources* without, where it has to."""
    if settings.verify != "required" or settings.offline:
        return []
    signed = any(
        (layout.keyring or settings.keyring) and layout.find is not _find_treeinfo and layout.pattern.fullmatch(uri)
        for source in sources
        if source.path is None
        for uri in source.uris
        for layout in LAYOUTS
    )
    return [*openpgp.VERIFIERS] if signed else []


# Signatures.


def check_signature(keyring: Path, data: bytes, signature: bytes | None, where: str) -> tuple[bytes, str]:
    """Return what ``openpgp.check_signature`` does, or raise its BuildError with what to do about a mirror."""
    try:
        return openpgp.check_signature(keyring, data, signature, where)
    except openpgp.SignatureError as error:
        if fetch.is_web_page(data):
            raise openpgp.SignatureError(where, "a web page came instead", hint=fetch.PORTAL_HINT) from error
        hint = "A good mirror has a good signature: try another, and update the package of the keyring"
        raise openpgp.SignatureError(where, error.reason, hint=hint) from error


# Debian's archive.


def _parse_release(text: bytes, where: str, base: str, suite: str, signed_by: str) -> _Release:
    lines = text.decode("utf-8", errors="replace").splitlines()
    fields = dict(re.findall(r"^([A-Za-z0-9-]+): *(.*?) *$", "\n".join(lines), re.MULTILINE))
    # Else a mirror could serve one suite, with all its holes, for another.
    if suite not in (fields.get("Suite"), fields.get("Codename")):
        raise BuildError(f"{where} is that of {fields.get('Codename') or 'no suite'}, not of {suite}.")
    date = _parse_date(fields.get("Date", ""), where)
    if "Valid-Until" in fields:
        until = _parse_date(fields["Valid-Until"], where)
        if until < datetime.datetime.now(datetime.UTC):
            raise BuildError(
                f"{where} was valid until {until:%Y-%m-%d %H:%M}: the mirror is out of date.", hint="Try another mirror"
            )
    checksums = {}
    inside = False
    for line in lines:
        if not line.startswith(" "):
            inside = line.strip() == "SHA256:"
        elif inside and len(words := line.split()) == 3:
            checksums[words[2]] = words[0].lower()
    return _Release(base, signed_by, date, checksums)


def _parse_date(text: str, where: str) -> datetime.datetime:
    try:
        found = email.utils.parsedate_to_datetime(text)
    except ValueError as error:
        raise BuildError(f"{where} has no date that can be read.") from error
    # "UTC", as Debian writes it, is no zone to the parser.
    return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)


def _find_in_archive(verifier: Verifier, layout: Layout, match: re.Match[str]) -> Expected:
    """InRelease, signed -> the installer's SHA256SUMS -> the file."""
    release = verifier.release(layout, match["archive"], match["suite"])
    sums = f"{match['images']}SHA256SUMS"
    where = f"{release.base}{sums}"
    text = verifier.listed_in(release, sums)
    verifier.one_installer(f"{match['suite']}/{match['images']}", text, where)
    return _listed(text, match["path"], where, f"InRelease signed by {release.signed_by}")


def kernel_version(path: Path) -> str | None:
    """Return the version of the x86 kernel at *path*, None if it is no such file."""
    with path.open("rb") as file:
        head = file.read(64 << 10)
    if head[_KERNEL_MAGIC] != b"HdrS":
        return None
    start = int.from_bytes(head[_KERNEL_VERSION], "little") + _KERNEL_VERSION_BASE
    words = head[start : start + 256].split(b"\0")[0].split()
    return words[0].decode("ascii", errors="replace") if words else None


# Lists of checksums.


def _parse_checksums(text: bytes) -> dict[str, str]:
    """Return the checksum of each file in a list as sha256sum and sha512sum write them, with --tag too.

    ``*`` marks a binary file.
    """
    lines = text.decode("utf-8", "replace")
    usual = re.findall(r"^((?:[0-9A-Fa-f]{64}){1,2}) [ *](?:\./)?(\S.*?)\s*$", lines, re.MULTILINE)
    tagged = re.findall(r"^SHA(?:256|512) \((\S.*?)\) = ((?:[0-9A-Fa-f]{64}){1,2})\s*$", lines, re.MULTILINE)
    return {path: digest.lower() for digest, path in [*usual, *((digest, path) for path, digest in tagged)]}


def _name_in_own_list(path: str, text: bytes) -> str:
    """Return the name of *path* in the list *text* of its own.

    What openSUSE calls Media or Current, or nothing, is a link to a build, and the list has the name of that.
    """
    link = re.sub(r"-(?:Media|Current)(?=\.)", "", path)
    for name in _parse_checksums(text):
        if re.sub(r"-(?:Build|Snapshot)[0-9]+(?:\.[0-9]+)*|-Media(?=\.)", "", name) == link:
            return name
    return path


def _listed(text: bytes, path: str, where: str, by: str) -> Expected:
    checksums = _parse_checksums(text)
    if path not in checksums:
        # Not just unverified: a mirror could give the genuine list of something else to get there.
        near = difflib.get_close_matches(path, checksums, n=1, cutoff=0.8)
        raise BuildError(
            f"{where} does not list {path}.",
            hint=f"It lists {near[0]}: is that a newer release of it?" if near else "See what the mirror has now.",
        )
    return Expected(checksums[path], where, by)


def _find_in_sums(
    sums: str, signature: str, *, complete: bool = True
) -> Callable[[Verifier, Layout, re.Match[str]], Expected]:
    """Return a way to find files in the list *sums* with a *signature* beside it; ``{path}`` in them is the file.

    Unless the lists are *complete*, nobody vouches for a file that is not in them.
    """

    def find(verifier: Verifier, layout: Layout, match: re.Match[str]) -> Expected:
        keyring = verifier.keyring(layout)
        name = sums.format(path=match["path"])
        where = match["base"] + name
        signed = verifier.read(match["base"] + signature.format(path=match["path"]))
        text, key = check_signature(keyring, verifier.read(where), signed, where)
        path = match["path"] if name == sums else _name_in_own_list(match["path"], text)
        if not complete and path not in _parse_checksums(text):
            raise _Unverifiable(
                f"{where} does not list {path}", "Pin it with linux-sha256, source-image-sha256 and the like"
            )
        return _listed(text, path, where, f"{name} signed by {key}")

    return find


# Where nobody signs: one host of the distribution's own, which has all that its mirrors have.

CANONICAL = (
    (re.compile(r".*/(releases/[0-9]+/[^/]+/[^/]+/os/)"), "https://dl.fedoraproject.org/pub/fedora/linux/"),
    (re.compile(r".*/([0-9]+-stream/[^/]+/[^/]+/os/)"), "https://mirror.stream.centos.org/"),
    (re.compile(r".*/rocky(?:linux)?/([0-9.]+/[^/]+/[^/]+/os/)"), "https://download.rockylinux.org/pub/rocky/"),
    (re.compile(r".*/almalinux/([0-9.]+/[^/]+/[^/]+/os/)"), "https://repo.almalinux.org/almalinux/"),
    # Disk images.
    (re.compile(r".*/images/cloud/([^/]+/.+/)"), "https://cloud.debian.org/images/cloud/"),
    (re.compile(r".*/(releases/[0-9]+/Cloud/[^/]+/images/)"), "https://dl.fedoraproject.org/pub/fedora/linux/"),
    (re.compile(r".*/([0-9]+-stream/[^/]+/images/)"), "https://cloud.centos.org/centos/"),
    (re.compile(r".*/rocky(?:linux)?/([0-9.]+/images/[^/]+/)"), "https://download.rockylinux.org/pub/rocky/"),
    (re.compile(r".*/almalinux/([0-9.]+/cloud/[^/]+/images/)"), "https://repo.almalinux.org/almalinux/"),
)


def _secure(base: str) -> str:
    """Return what *base* is on the distribution's own host, or itself if it is read by https."""
    for pattern, host in CANONICAL:
        if known := pattern.fullmatch(base):
            return host + known[1]
    if not base.lower().startswith("https:"):
        raise _Unverifiable(
            "nobody signs what is there, and the distribution's own host is not known",
            "Name an https mirror, or pin it",
        )
    return base


def _find_in_list(sums: str, signature: str | None = None) -> Callable[[Verifier, Layout, re.Match[str]], Expected]:
    """Return a way to find files in the list *sums* of the distribution's own host; ``{path}`` in it is the file.

    With a ``keyring`` it is the mirror's, and its *signature* counts: the name of a file, or ``""`` for one that is
    in the list itself.
    """

    def find(verifier: Verifier, layout: Layout, match: re.Match[str]) -> Expected:
        name = sums.format(**match.groupdict())
        if signature is not None and verifier.has_own_keyring:
            where = match["base"] + name
            signed = verifier.read(match["base"] + signature) if signature else None
            text, key = check_signature(verifier.keyring(layout), verifier.read(where), signed, where)
            return _listed(text, match["path"], where, f"{name} signed by {key}")
        where = _secure(match["base"]) + name
        text = verifier.read(where, secure=True)
        return _listed(text, match["path"], where, f"{name} by https from {urllib.parse.urlsplit(where).hostname}")

    return find


def _find_treeinfo(verifier: Verifier, layout: Layout, match: re.Match[str]) -> Expected:
    base = _secure(match["base"])
    where = f"{base}.treeinfo"
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        parser.read_string(verifier.read(where, secure=True).decode())
        kind, _, digest = parser.get("checksums", match["path"]).partition(":")
    except configparser.NoOptionError as error:
        raise BuildError(f"{where} does not list {match['path']}.") from error
    except (configparser.Error, UnicodeDecodeError) as error:
        raise BuildError(f"{where} can't be read: {' '.join(str(error).split())}.") from error
    if kind != "sha256" or not re.fullmatch(r"[0-9A-Fa-f]{64}", digest):
        raise BuildError(f"{where} has no SHA-256 of {match['path']}.")
    return Expected(digest.lower(), where, f".treeinfo by https from {urllib.parse.urlsplit(base).hostname}")


_DEBIAN = Layout(
    "Debian",
    re.compile(
        r"(?P<archive>.+/)dists/(?P<suite>[^/]+)/(?P<images>main/installer-(?P<arch>[^/]+)/[^/]+/images/)(?P<path>.+)"
    ),
    _find_in_archive,
    "debian-archive-keyring.gpg",
    "debian-archive-keyring",
)
_UBUNTU = ("ubuntu-archive-keyring.gpg", "ubuntu-keyring")
LAYOUTS = (
    _DEBIAN,
    Layout(
        "Debian's ISOs",
        re.compile(r"(?P<base>.+/)(?P<path>debian-[^/]+\.iso)"),
        _find_in_sums("SHA256SUMS", "SHA256SUMS.sign"),
        "debian-role-keys.gpg",
        "debian-keyring",
    ),
    Layout(
        "Ubuntu",
        re.compile(r"(?P<base>.+/)(?P<path>ubuntu-[^/]+\.iso)"),
        _find_in_sums("SHA256SUMS", "SHA256SUMS.gpg"),
        *_UBUNTU,
    ),
    Layout(
        "Ubuntu",
        re.compile(r"(?P<base>.+/[0-9]{2}\.[0-9]{2}[^/]*/)(?P<path>netboot/.+)"),
        _find_in_sums("SHA256SUMS", "SHA256SUMS.gpg", complete=False),
        *_UBUNTU,
    ),
    Layout(
        "openSUSE",
        re.compile(r"(?P<base>.+/)(?P<path>openSUSE[^/]*\.iso)"),
        _find_in_sums("{path}.sha256", "{path}.sha256.asc"),
    ),
    # Since 16.0.
    Layout(
        "openSUSE",
        re.compile(r"(?P<base>.+/)(?P<path>Leap-[^/]*\.iso)"),
        _find_in_sums("{path}.sha512", "{path}.sha512.asc"),
    ),
    # The whole installation repository has one list.
    Layout(
        "openSUSE",
        re.compile(r"(?P<base>.+/)(?P<path>boot/[^/]+/loader/[^/]+)"),
        _find_in_sums("CHECKSUMS", "CHECKSUMS.asc"),
    ),
    Layout("Fedora and Enterprise Linux", re.compile(r"(?P<base>.+/)(?P<path>images/pxeboot/[^/]+)"), _find_treeinfo),
    Layout(
        "Debian's cloud images",
        re.compile(r"(?P<base>.+/)(?P<path>debian-[0-9]+-[a-z]+-[^/]+\.(?:qcow2|raw|tar\.xz))"),
        _find_in_list("SHA512SUMS"),
    ),
    Layout(
        "Ubuntu's cloud images",
        re.compile(r"(?P<base>.+/)(?P<path>(?:ubuntu-[0-9.]+|[a-z]+)-[a-z]+-cloudimg-[^/]+)"),
        _find_in_sums("SHA256SUMS", "SHA256SUMS.gpg"),
        "ubuntu-cloudimage-keyring.gpg",
        _UBUNTU[1],
    ),
    Layout(
        "Fedora's cloud images",
        re.compile(
            r"(?P<base>.+/)"
            r"(?P<path>Fedora-Cloud-[^/]+-(?P<version>[0-9]+-[0-9.]+)\.(?P<arch>[a-z0-9_]+)\.(?:qcow2|raw\.xz|vmdk|vhd[a-z]*))"
        ),
        _find_in_list("Fedora-Cloud-{version}-{arch}-CHECKSUM", ""),
    ),
    Layout(
        "CentOS Stream's cloud images",
        re.compile(r"(?P<base>.+/)(?P<path>CentOS-Stream-[^/]+\.qcow2)"),
        _find_in_list("{path}.SHA256SUM"),
    ),
    Layout(
        "Rocky Linux' cloud images",
        re.compile(r"(?P<base>.+/)(?P<path>Rocky-[0-9]+-[^/]+\.qcow2)"),
        _find_in_list("{path}.CHECKSUM"),
    ),
    Layout(
        "AlmaLinux' cloud images",
        re.compile(r"(?P<base>.+/)(?P<path>AlmaLinux-[0-9]+-[^/]+\.qcow2)"),
        _find_in_list("CHECKSUM", "CHECKSUM.asc"),
    ),
)
