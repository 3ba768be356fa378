"""Parsers: text -> value, or ValueError with what is accepted and, if it is known, the next move."""

import configparser
import difflib
import math
import os
import re
import shlex
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..base.units import parse_duration, parse_size
from ..machines.arch import ARCHITECTURES, NAMES
from ..machines.devices import KINDS

# The partitions of a disk, by the firmware that boots it; the last is a filesystem without a table.
LAYOUTS = ("bios", "uefi", "hybrid", "filesystem")

_FILE_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*")


def parse_option(text: str) -> str:
    """The value of an option of virt-install."""
    if not text.strip() or not text.strip().isprintable() or text.strip().startswith("-"):
        raise ValueError("a value that virt-install takes")
    return text.strip()


def parse_line(text: str) -> str:
    """Any text; the line breaks of a value over several lines become blanks."""
    return " ".join(line.strip() for line in text.strip().splitlines())


def parse_boolean(text: str) -> bool:
    """A boolean as configparser reads them."""
    try:
        return configparser.ConfigParser.BOOLEAN_STATES[text.strip().lower()]
    except KeyError:
        raise ValueError("yes, no, true, false, on, off, 1 or 0") from None


def parse_count(text: str) -> int:
    """A whole number above zero."""
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text.strip()):
        raise ValueError("a whole number from 1 to 9999")
    return int(text)


def parse_retries(text: str) -> int:
    """How often: a whole number."""
    if not re.fullmatch(r"[0-9]{1,2}", text.strip()):
        raise ValueError("a whole number from 0 to 99")
    return int(text)


def parse_template(text: str) -> str:
    """A part of a file's name, with variables in it."""
    name = parse_line(text)
    if not re.fullmatch(r"(?:[A-Za-z0-9._+~@ -]|\$\{[a-z]+\})+", name) or name.startswith((".", "-")):
        raise ValueError("letters, digits, . _ + ~ @ - and variables such as ${image} and ${date}")
    return name


def parse_text(text: str) -> str:
    """Any text, over as many lines as it has."""
    return text.strip()


def parse_environment(text: str) -> tuple[tuple[str, str], ...]:
    """Variables of a program: words ``NAME=VALUE``, split like a shell does."""
    parts = [word.partition("=") for word in parse_words(text)]
    if not all(equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) for name, equals, _ in parts):
        raise ValueError("words NAME=VALUE, whose names have only letters, digits and _")
    return tuple((name, value) for name, _, value in parts)


def parse_elements(text: str) -> tuple[str, ...]:
    """Names of elements with blanks between them."""
    names = tuple(text.split())
    if not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name) for name in names):
        raise ValueError("names of elements, which have letters, digits and _ . + -, with blanks between them")
    return names


def parse_search_path(text: str) -> tuple[Path, ...]:
    """Directories with colons between them; ``~`` is the home directory."""
    if "\0" in text:
        raise ValueError("directories, with colons between them")
    return tuple(parse_path(word) for word in text.split(":") if word.strip())


def parse_limit(text: str) -> float | None:
    """How many: a whole number, infinity for ``none`` or 0, None for ``auto``."""
    word = text.strip().lower()
    if word in ("auto", "none", "0"):
        return None if word == "auto" else math.inf
    try:
        return parse_count(text)
    except ValueError as error:
        raise ValueError(f"auto, none or {error}") from None


def parse_keep(text: str) -> int | None:
    """How many of several stay: a whole number from 1 up, None for ``all``."""
    try:
        return None if text.strip().lower() == "all" else parse_count(text)
    except ValueError as error:
        raise ValueError(f"all or {error}") from None


def parse_large_size(text: str) -> int:
    """A size of at least 1 MiB."""
    size = parse_size(text)
    if size < 1 << 20:
        accepted = "a size of at least 1 MiB such as 1G, 512 MiB or 2 GB"
        number = text.strip()
        if number.isdigit():
            unit = "M" if int(number) >= 64 else "G"
            raise ValueError(accepted, f"{number} is {number} bytes. Did you mean {number}{unit}?")
        raise ValueError(accepted)
    return size


# The size of a disk that is as small as what is on it lets it.
FIT = 0


def parse_disk_size(text: str) -> int:
    """The size of a disk, FIT for ``fit``."""
    if text.strip().lower() == "fit":
        return FIT
    try:
        return parse_large_size(text)
    except ValueError as error:
        accepted, *hint = error.args
        raise ValueError(f"{accepted}, or fit", *hint) from None


def parse_layout(text: str) -> str | Path:
    """The name of a layout, or the path of a YAML file, which has a slash or ends so."""
    word = text.strip()
    if word.lower() in LAYOUTS:
        return word.lower()
    if "/" in word or word.endswith((".yaml", ".yml")):
        return parse_file_name(text)
    raise ValueError(f"{', '.join(LAYOUTS)}, or the path of a YAML file", *_meant(word.lower(), LAYOUTS))


def parse_label(text: str) -> str:
    """The label of a filesystem."""
    if not re.fullmatch(r"[A-Za-z0-9._+-]{1,16}", text.strip()):
        raise ValueError("1 to 16 letters, digits and . _ + -")
    return text.strip()


def parse_long_duration(text: str) -> float:
    """A time; a number alone, which is of seconds, is at least a minute."""
    seconds = parse_duration(text)
    number = text.strip()
    if number.isdigit() and seconds < 60:
        raise ValueError(
            "a time with its unit such as 90s, 10m, 2h or 1h 30m, or none",
            f"{number} is {number} seconds. Did you mean {number}m or {number}h?",
        )
    return seconds


def parse_mac(text: str) -> str:
    """A MAC address of one station, not of a group: libvirt refuses those."""
    mac = text.strip().lower()
    if not re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", mac) or int(mac[:2], 16) & 1:
        raise ValueError("a unicast MAC address such as 52:54:00:12:34:56")
    return mac


def parse_vnc(text: str) -> tuple[str, int | None]:
    """``HOST:DISPLAY``, or ``HOST`` for a free display; gives the host and the display."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(?::([0-9]{1,5}))?", text.strip())
    # VNC's display N is TCP port 5900 + N.
    if not text.strip() or not match or int(match[2] or 0) > 65535 - 5900:
        raise ValueError("HOST:DISPLAY with a display from 0 to 59635, or HOST")
    return match[1].strip("[]"), None if match[2] is None else int(match[2])


def parse_words(text: str) -> tuple[str, ...]:
    """Words, split like a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"words as a shell has them ({str(error).lower()})") from None


def parse_packages(text: str) -> tuple[str, ...]:
    """Names of packages, with blanks or commas."""
    words = parse_words(text.replace(",", " "))
    # dnf 5 knows no "--" that would end its options.
    if any(word.startswith("-") for word in words):
        raise ValueError("names of packages, and no option")
    return words


def parse_command(text: str) -> tuple[str, ...]:
    """A command, split like a shell does."""
    words = parse_words(text)
    if not words:
        raise ValueError("a command")
    return words


def parse_target(text: str) -> str:
    """The place of an upload."""
    if not text.strip():
        raise ValueError("a place to upload to")
    return text.strip()


# Header fields that are secret as a rule: what names one of them is no place for it.
_SECRET_HEADER = re.compile(r"auth|cookie|token|secret|key|password|signature", re.IGNORECASE)
_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"


def parse_headers(text: str) -> tuple[str, ...]:
    """Fields of an HTTP request, ``NAME: VALUE``, one a line."""
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    for line in lines:
        if not re.fullmatch(rf"{_TOKEN}:\s*\S[\x20-\x7e]*", line):
            raise ValueError("fields NAME: VALUE, one a line")
        if _SECRET_HEADER.search(line.partition(":")[0]):
            raise ValueError("fields that are no secrets", "Write it into the file of upload-credentials.")
    return lines


def parse_tls(text: str) -> str | Path:
    """How a server is trusted: the path of a CA's file, or the pin of its key as curl takes it; or ``none``."""
    word = text.strip()
    if word.lower() == "none" or re.fullmatch(r"sha256//[A-Za-z0-9+/]{43}=", word):
        return word.lower() if word.lower() == "none" else word
    if not word or word.startswith("sha256"):
        raise ValueError("the path of a CA's file, sha256//PIN (base64) or none")
    return parse_path(word)


def parse_verification(text: str) -> str:
    """How an upload is verified: ``header:NAME``, ``etag``, ``download`` or ``none``."""
    word = text.strip()
    if re.fullmatch(rf"(?i:header):\s*{_TOKEN}", word):
        return f"header:{word.partition(':')[2].strip()}"
    if word.lower() not in ("etag", "download", "none"):
        raise ValueError("header:NAME, etag, download or none")
    return word.lower()


def split_list(text: str) -> tuple[str, ...]:
    """Words with commas or line breaks between them."""
    return tuple(word.strip() for word in re.split(r"[,\n]", text) if word.strip())


def parse_tar_patterns(text: str) -> tuple[str, ...]:
    """Patterns of tar(1) for paths, each without what it begins with, "/" or "./", so that it is below the root."""
    patterns = tuple(re.sub(r"^\.?/+", "", word) for word in split_list(text))
    if not all(re.fullmatch(r"[^\x00-\x1f\x7f]{1,1000}", pattern) for pattern in patterns):
        raise ValueError("paths below the root, such as /etc/default/grub or var/cache/*")
    return patterns


def parse_path(text: str) -> Path:
    """A path; ``~`` is the home directory."""
    if not text.strip() or "\0" in text:
        raise ValueError("a path")
    return Path(os.path.expanduser(text.strip()))


def parse_answer_file(text: str) -> Path:
    """The path of an answer file, whose name goes on the kernel's command line."""
    path = parse_path(text)
    if not _FILE_NAME.fullmatch(path.name):
        raise ValueError("a path whose last part has only letters, digits and . _ + -")
    return path


@dataclass(frozen=True)
class InstallerFile:
    """A further file for the installer: the user's *path*, and the *name* by which the installer finds it."""

    path: Path
    name: str


def parse_answer_files(text: str) -> tuple[InstallerFile, ...]:
    """Further files for the installer: ``PATH`` or ``PATH:NAME``, with commas or line breaks."""
    accepted = "PATH or PATH:NAME, or several with commas; names have only letters, digits and . _ + - /"
    found = []
    for word in split_list(text):
        given, separator, name = word.rpartition(":")
        path = parse_path(given if separator else word)
        name = name.strip() if separator else path.name
        if not all(_FILE_NAME.fullmatch(part) for part in name.split("/")):
            raise ValueError(accepted)
        found.append(InstallerFile(path, name))
    return tuple(found)


@dataclass(frozen=True)
class Copy:
    """What the user has copied into the image: *source*, and the *destination* there, as the user writes both.

    *owner* and *group* are names or numbers.  *mode* is None for that of each file.
    """

    source: str
    destination: str
    owner: str = "root"
    group: str = "root"
    mode: int | None = None

    @property
    def path(self) -> Path:
        """The source's path."""
        return Path(os.path.expanduser(self.source))


_USER = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}[$]?"
_COPY = re.compile(rf"(\S.*?):(/[^:\0]*)(?::({_USER}):({_USER})(?::([0-7]{{3,4}}))?)?")


def parse_copies(text: str) -> tuple[Copy, ...]:
    """What is copied into an image: ``SOURCE:DESTINATION``, ``:OWNER:GROUP`` and ``:MODE`` behind it, one a line."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        match = _COPY.fullmatch(line)
        if not match or "\0" in line or {".", ".."} & {*match[2].split("/")}:
            raise ValueError(
                "SOURCE:DESTINATION, SOURCE:DESTINATION:OWNER:GROUP or SOURCE:DESTINATION:OWNER:GROUP:MODE, one a line",
                "A destination is absolute and has no . and .. in it; a mode is octal, such as 0644.",
            )
        source, destination, owner, group, mode = match.groups()
        found.append(Copy(source, destination, owner or "root", group or "root", int(mode, 8) if mode else None))
    return tuple(found)


# Their numbers have two digits.
_MOST_SCRIPTS = 99


def parse_scripts(text: str) -> tuple[Path, ...]:
    """Paths of scripts, with commas or line breaks, which are known by the last part of their names."""
    paths = tuple(parse_answer_file(word) for word in split_list(text))
    if len(paths) > _MOST_SCRIPTS:
        raise ValueError(f"at most {_MOST_SCRIPTS} paths")
    return paths


def parse_filesystem(text: str) -> str:
    """The name of a kind of filesystem: which ones there are, the source and its template say."""
    if not re.fullmatch("[A-Za-z0-9]+", text.strip()):
        raise ValueError("a name such as ext4")
    return text.strip().lower()


def parse_bootstrap_file(text: str) -> Path:
    """Return the path of what a tree is bootstrapped from."""
    return parse_answer_file(text)


@dataclass(frozen=True)
class Origin:
    """The system that is captured: a directory or a tar at *path*, or that of *host*, where ssh logs in as *user*.

    What is empty, and a *port* of 0, is as ssh's configuration has it.
    """

    path: Path | None = None
    host: str = ""
    user: str = ""
    port: int = 0

    def __str__(self) -> str:
        """Return it as a user writes it."""
        if self.path is not None:
            return str(self.path)
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"


_SSH = re.compile(
    r"ssh://(?:(\w[\w.-]*)@)?([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?/?", re.ASCII
)


def parse_origin(text: str) -> Origin:
    """Where a system is that is captured: a host that ssh reaches, or a path."""
    accepted = "ssh://USER@HOST, ssh://USER@HOST:PORT, or the path of a directory or a tar"
    match = _SSH.fullmatch(text.strip())
    if match:
        user, host, port = match.groups()
        if int(port or 1) in range(1, 65536):
            return Origin(host=host.strip("[]"), user=user or "", port=int(port or 0))
    if not text.strip() or "\0" in text or "://" in text:
        raise ValueError(accepted)
    return Origin(parse_path(text))


def parse_mount_points(text: str) -> tuple[str, ...]:
    """Mount points of a system, each without a slash at its end but for the root."""
    points = tuple(word.rstrip("/") or "/" for word in split_list(text))
    for point in points:
        if not re.fullmatch(r"/(?!/).*", point) or not point.isprintable() or os.path.normpath(point) != point:
            raise ValueError("mount points such as /, /var or /srv/data, with commas")
    return points


def parse_agama_file(text: str) -> Path:
    """The path of an answer file of Agama, which knows its language by the suffix."""
    path = parse_answer_file(text)
    if not path.name.removesuffix(".j2").endswith((".json", ".jsonnet", ".xml")):
        raise ValueError("a path that ends in .json, .jsonnet or .xml, and then in .j2 if it is a template")
    return path


def parse_file_name(text: str) -> Path:
    """The path of a file."""
    path = parse_path(text)
    if text.strip().endswith("/") or path.name in ("", ".", ".."):
        raise ValueError("the name of a file")
    return path


def parse_patterns(text: str) -> tuple[str, ...]:
    """Regular expressions, one a line."""
    patterns = tuple(line.strip() for line in text.splitlines() if line.strip())
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"regular expressions, one a line ({error})") from None
    return patterns


def parse_key(text: str) -> str:
    """A key by its fingerprint or user ID, or the path of its file, which has a slash; ``~`` is the home directory."""
    if not text.strip() or not text.isprintable():
        raise ValueError("a fingerprint, a user ID, or the path of a key file, which has a slash")
    return os.path.expanduser(text.strip())


@dataclass(frozen=True)
class Source:
    """Where a file comes from: a local *path*, or a *uri* to fetch, from one of *mirrors* if it isn't there."""

    uri: str
    path: Path | None = None
    mirrors: tuple[str, ...] = ()

    @property
    def uris(self) -> tuple[str, ...]:
        """All places to fetch it from, in the order in which they are tried."""
        return self.uri, *self.mirrors

    @property
    def by_rsync(self) -> bool:
        """Whether rsync fetches it; else, unless it is local, HTTP does."""
        return any(uri.lower().startswith("rsync:") for uri in self.uris)

    @property
    def name(self) -> str:
        """The file's name, empty for a URI that has none, as it ends in a slash."""
        if self.path is not None:
            return self.path.name
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.uri).path.rpartition("/")[2])
        return "" if name in (".", "..") or set(name) & set("/\0") else name


def parse_source(text: str) -> Source:
    """A path, or a URI of the schemes file, http, https and rsync."""
    accepted = "a path, or a URI that begins with file:, http://, https:// or rsync://"
    text = text.strip()
    try:
        parts = urllib.parse.urlsplit(text)
        # Reading it is what checks it.
        _ = parts.port
    except ValueError:
        raise ValueError(accepted) from None
    scheme = parts.scheme.lower()
    # A name need not be UTF-8.
    path = urllib.parse.unquote(parts.path, errors="surrogateescape")
    if scheme == "file" and path and parts.netloc in ("", "localhost") and "\0" not in path:
        return Source(text, Path(path))
    if scheme in ("http", "https", "rsync") and parts.hostname and parts.path.strip("/") and not re.search(r"\s", text):
        return Source(text)
    if not scheme and not parts.netloc and parts.path and "\0" not in text:
        return Source(text, Path(os.path.expanduser(text)))
    raise ValueError(accepted)


def parse_mirrors(text: str) -> Source:
    """What parse_source reads, or the URIs of several mirrors with blanks, commas or line breaks between them."""
    # A URI has no blanks, but a path may have them.
    words = [word.rstrip(",") for word in text.split()]
    if len(words) < 2 or not all(re.match(r"(?:https?|rsync)://", word, re.IGNORECASE) for word in words):
        return parse_source(text)
    sources = [parse_source(word) for word in dict.fromkeys(words)]
    if len({source.name for source in sources}) > 1:
        raise ValueError("mirrors of one file, whose URIs have the same last part")
    return Source(sources[0].uri, None, tuple(source.uri for source in sources[1:]))


def parse_sha256(text: str) -> str:
    """A SHA-256 in hexadecimal digits."""
    if not re.fullmatch(r"[0-9a-f]{64}", text.strip().lower()):
        raise ValueError("a SHA-256, which has 64 hexadecimal digits")
    return text.strip().lower()


def _meant(text: str, choices: Iterable[str]) -> list[str]:
    """Return the question whether one of *choices* was meant, if one is near to *text*."""
    near = difflib.get_close_matches(text.strip().lower(), list(choices), n=1)
    return [f"Did you mean {near[0]}?"] if near else []


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a parser of one of *choices*, whatever its case."""

    def parse(text: str) -> str:
        if text.strip().lower() not in choices:
            accepted = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
            raise ValueError(accepted, *_meant(text, choices))
        return text.strip().lower()

    return parse


def some_of(*choices: str) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of one or several of *choices*, with commas."""

    def parse(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(split_list(text)))
        if not words or not set(words) <= set(choices):
            others = [word for word in words if word not in choices]
            raise ValueError(f"{' or '.join(choices)}, or several with commas", *_meant(" ".join(others), choices))
        return words

    return parse


def any_of(*choices: str) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of one or several of *choices*, with commas, or of none."""
    some = some_of(*choices)

    def parse(text: str) -> tuple[str, ...]:
        return some(text) if text.strip() else ()

    return parse


def parse_matrix(text: str) -> tuple[str, ...]:
    """What machines are made of, with blanks and commas: each word says by itself what kind of device it is of."""
    words = tuple(dict.fromkeys(text.replace(",", " ").lower().split()))
    others = [word for word in words if not any(word in kind for kind in KINDS)]
    if others:
        known = [word for kind in KINDS for word in kind]
        raise ValueError(", ".join(" ".join(kind) for kind in KINDS), *_meant(others[0], known))
    return words


def parse_arch(text: str) -> str:
    """An architecture, by its name or by a distribution's."""
    name = text.strip().lower()
    if name not in NAMES:
        raise ValueError(", ".join(ARCHITECTURES), *_meant(name, NAMES))
    return NAMES[name]
