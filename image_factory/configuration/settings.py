"""The settings: each declared once, with its parser, default, help text and flags.

The INI reader, argparse, the defaults and the manual's check all come from the declarations here.
"""

import codecs
import configparser
import contextlib
import copy
import difflib
import math
import os
import platform
import re
import shlex
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..base import events
from ..base.errors import ConfigurationError
from ..base.units import parse_duration, parse_size

SYSTEM_FILE = Path("/etc/image-factory.conf")
USER_FILE = Path("~/.config/image-factory.conf")
FILE_VARIABLE = "IMAGE_FACTORY_CONFIG"

FORMATS = ("raw", "qcow2")
UPLOAD_TYPES = ("rsync",)
ARCHITECTURES = ("x86_64", "aarch64")
# The distributions' names of them, which configuration files may have in a variable 'arch' of their own.
# A 32-bit system runs on the machine of the 64-bit one.
_ARCHITECTURE_NAMES = {"amd64": "x86_64", "i386": "x86_64", "i586": "x86_64", "i686": "x86_64", "arm64": "aarch64"}
# What images can't be built for, but files may be of.
_OTHER_ARCHITECTURES = ("armhf", "armv7l", "ppc64el", "ppc64le", "riscv64", "s390x", "loongarch64")
FIRMWARES = ("bios", "uefi", "hybrid")
ANSWER_FILE_KEYS = ("preseed", "kickstart", "yast", "autoinstall", "agama")
# What --list shows of an image beside its name.
LISTED_KEYS = ("distribution", "release", "arch", "firmware")
# And what --list-json tells.
DESCRIBED_KEYS = (*LISTED_KEYS, "format", "virt-type", "cores", "ram", "image-size", "install-timeout", "test-boot")

# The file names of an image have its name, date, format and ".manifest.json": together at most 255 bytes.
_LONGEST_NAME = 200
_COMMAND_KEY = re.compile(r"post-upload-command[0-9]{0,9}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+~@-]*")


# Parsers: text -> value, or ValueError with what is accepted and, if it is known, the next move.


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


def parse_limit(text: str) -> float | None:
    """How many: a whole number, infinity for ``none`` or 0, None for ``auto``."""
    word = text.strip().lower()
    if word in ("auto", "none", "0"):
        return None if word == "auto" else math.inf
    try:
        return parse_count(text)
    except ValueError as error:
        raise ValueError(f"auto, none or {error}") from None


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


def parse_formats(text: str) -> tuple[str, ...]:
    """Image formats, with commas."""
    formats = tuple(dict.fromkeys(split_list(text)))
    if not formats or not set(formats) <= set(FORMATS):
        others = [word for word in formats if word not in FORMATS]
        raise ValueError(f"{' or '.join(FORMATS)}, or several with commas", *_meant(" ".join(others), FORMATS))
    return formats


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


def split_list(text: str) -> tuple[str, ...]:
    """Words with commas or line breaks between them."""
    return tuple(word.strip() for word in re.split(r"[,\n]", text) if word.strip())


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
    path = urllib.request.url2pathname(parts.path)
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


def parse_arch(text: str) -> str:
    """An architecture, by its name or by a distribution's."""
    name = text.strip().lower()
    name = _ARCHITECTURE_NAMES.get(name, name)
    if name not in ARCHITECTURES:
        raise ValueError(" or ".join(ARCHITECTURES), *_meant(name, (*ARCHITECTURES, *_ARCHITECTURE_NAMES)))
    return name


def is_arch(name: str, arch: str) -> bool:
    """Return whether *name*, in which ``-`` may stand for ``_``, is one of the architecture *arch*."""
    name = name.replace("-", "_")
    return _ARCHITECTURE_NAMES.get(name, name) == arch


def named_architectures(text: str) -> set[str]:
    """Return the architectures that the words of *text*, a path or a URI, name."""
    names = _ARCHITECTURE_NAMES | {name: name for name in (*ARCHITECTURES, *_OTHER_ARCHITECTURES)}
    found = re.findall(rf"(?<![a-z0-9])({'|'.join(names)})(?![a-z0-9])", text.lower())
    return {names[name] for name in found}


def default_cache_dir() -> str:
    """Return where downloads are kept: root's are the machine's."""
    return "/var/cache/image-factory" if os.geteuid() == 0 else "~/.cache/image-factory"


def default_arch() -> str:
    """Return the architecture of this machine, x86_64 if images can't be built for it."""
    machine = platform.machine()
    return machine if machine in ARCHITECTURES else "x86_64"


def default_firmware(arch: str) -> str:
    """Return the firmware of machines of *arch* when nothing is said of it."""
    return "bios" if arch == "x86_64" else "uefi"


@dataclass(frozen=True)
class Declaration:
    """What is known of a setting.  *default* is text, as a user would write it, or None."""

    parse: Callable[[str], Any]
    help: str
    default: str | Callable[[], str] | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None

    def default_text(self) -> str | None:
        """Return the default as a user would write it, None if there is none."""
        return self.default() if callable(self.default) else self.default


def _setting(*arguments: Any, **keywords: Any) -> Any:
    return field(metadata={"declaration": Declaration(*arguments, **keywords)})


@dataclass(frozen=True)
class ImageSettings:
    """The settings of one image; sizes in bytes."""

    distribution: str | None = _setting(parse_line, "name of the distribution, for people")
    release: str | None = _setting(parse_line, "name of its release, for people")
    linux: Source | None = _setting(parse_mirrors, "path or URI of the netboot kernel")
    initrd: Source | None = _setting(parse_mirrors, "path or URI of the netboot initrd")
    installer_image: Source | None = _setting(
        parse_mirrors, "ISO or installation tree for virt-install's --location, instead of linux and initrd"
    )
    linux_sha256: str | None = _setting(parse_sha256, "SHA-256 that the kernel must have")
    initrd_sha256: str | None = _setting(parse_sha256, "SHA-256 that the initrd must have")
    installer_image_sha256: str | None = _setting(parse_sha256, "SHA-256 that the ISO must have")
    verify: str = _setting(
        one_of("auto", "required", "none"), "whether downloads are verified: auto, required or none", "auto"
    )
    keyring: Path | None = _setting(
        parse_path, "OpenPGP keys of who signs the downloads (default: the distribution's, from its package)"
    )
    offline: bool = _setting(parse_boolean, "download nothing, use what is cached and verified", "no", ("--offline",))
    append: str = _setting(parse_line, "extra kernel arguments", "")
    preseed: Path | None = _setting(
        parse_answer_file, "answer file of the Debian installer, which Ubuntu had until 20.04"
    )
    kickstart: Path | None = _setting(parse_answer_file, "answer file of the Fedora and Enterprise Linux installer")
    yast: Path | None = _setting(parse_answer_file, "answer file of the openSUSE installer until Leap 15")
    autoinstall: Path | None = _setting(parse_answer_file, "answer file of Ubuntu's installer since 20.04, Subiquity")
    agama: Path | None = _setting(parse_agama_file, "answer file of the openSUSE installer since Leap 16, Agama")
    answer_files: tuple[InstallerFile, ...] = _setting(
        parse_answer_files, "further files for the installer, PATH or PATH:NAME, with commas; empty means none", ""
    )
    cores: int = _setting(parse_count, "processors of the installation machine", "1")
    ram: int = _setting(parse_large_size, "memory of the installation machine", "1G")
    image_size: int = _setting(parse_large_size, "size of the disk", "2G", ("--image-size",), "SIZE")
    format: tuple[str, ...] = _setting(
        parse_formats, "raw, qcow2, or several with commas", "raw", ("-f", "--format"), "FORMAT"
    )
    mac: str | None = _setting(
        parse_mac, "MAC address of the installation machine (default: libvirt's choice)", None, ("--mac",), "MAC"
    )
    cache_dir: Path = _setting(
        parse_path, "where downloads are kept", default_cache_dir, ("-c", "--cache-dir"), "CACHE_DIR"
    )
    installer_logs: bool = _setting(
        parse_boolean, "print the installer's logs into the log before they are removed", "no", ("--installer-logs",)
    )
    log_file: bool = _setting(parse_boolean, "also log into a file", "no", ("--log-file",))
    log_filename: Path | None = _setting(
        parse_file_name, "that file (default: IMAGE-DATE.log)", None, ("--log-filename",), "FILE"
    )
    output_dir: Path = _setting(parse_path, "where the artifacts and the log go", ".", ("-o", "--output-dir"), "DIR")
    mount_via: str = _setting(
        one_of("loop", "guestfs", "auto"), "how the installed disk is mounted: loop, guestfs or auto", "auto"
    )
    require_single_partition: bool = _setting(
        parse_boolean, "fail if the installer has made more than one partition", "no"
    )
    audit: bool = _setting(parse_boolean, "fail if an image has what must not be cloned", "no")
    audit_skip: tuple[str, ...] = _setting(split_list, "checks that the audit leaves out, with commas", "")
    seal: bool = _setting(parse_boolean, "take from the image what its clones must not have in common", "no")
    seal_only: tuple[str, ...] = _setting(split_list, "the operations of sealing, with commas; empty means all", "")
    seal_skip: tuple[str, ...] = _setting(split_list, "operations of sealing that are left out, with commas", "")
    keep_raw: bool = _setting(parse_boolean, "keep the raw image too", "no")
    compression: str = _setting(one_of("zstd", "zlib", "none"), "compression of qcow2", "zstd")
    vnc: tuple[str, int | None] | None = _setting(
        parse_vnc, "HOST:DISPLAY of the installation machine's screen; HOST alone picks a free display"
    )
    osinfo: str | None = _setting(parse_option, "name of the operating system for virt-install")
    arch: str = _setting(
        parse_arch,
        f"architecture of the image: {' or '.join(ARCHITECTURES)} (default: this machine's)",
        default_arch,
    )
    firmware: str = _setting(
        one_of(*FIRMWARES), "what the image boots with: bios, uefi, or hybrid for both (default: bios, uefi on aarch64)"
    )
    cpu: str | None = _setting(
        parse_option, "virt-install's CPU (default: host-passthrough with KVM, mode=maximum without)"
    )
    virt_type: str = _setting(one_of("auto", "kvm", "qemu"), "kvm, qemu (emulation) or auto", "auto")
    network: str = _setting(parse_option, "virt-install's network", "user,model=virtio")
    max_parallel: float | None = _setting(
        parse_limit,
        "how many installations may run on this machine at once: a number, none, or auto, by memory and processors",
        "auto",
        ("--max-parallel",),
        "N",
    )
    install_timeout: float | None = _setting(
        parse_long_duration, "how long the installation may take, or none (default: 2h with KVM, else 8h)"
    )
    stall_timeout: float | None = _setting(
        parse_long_duration, "how long it may show no sign of life, or none (default: 10m with KVM, else 30m)"
    )
    test_boot: bool = _setting(parse_boolean, "boot the finished image, and fail if it doesn't come up well", "no")
    test_script: Path | None = _setting(parse_file_name, "script to run in the booted image")
    test_boot_timeout: float | None = _setting(
        parse_long_duration, "how long each test boot may take, or none (default: 10m with KVM, else 30m)"
    )
    kernel_errors_allowed: tuple[str, ...] = _setting(
        parse_patterns, "regular expressions, one a line, of errors in the kernel's log that the test boot accepts", ""
    )
    manifest: bool = _setting(
        parse_boolean, "write what is in the image beside it: packages, licenses, sizes; and an SBOM", "no"
    )
    sign_key: str | None = _setting(
        parse_key, "OpenPGP key that signs what is published: a fingerprint, a user ID or the path of a key file"
    )
    upload_destinations: tuple[str, ...] = _setting(
        split_list, "sections of upload destinations, with commas; empty means none", ""
    )
    post_build_command: tuple[str, ...] = _setting(
        parse_words, "command run at the end, with the image's file name as first argument", ""
    )

    @property
    def answer_file_key(self) -> str | None:
        """The key that names the answer file, None if none does."""
        return next((key for key in ANSWER_FILE_KEYS if getattr(self, key)), None)

    @property
    def answer_file(self) -> Path | None:
        """The answer file, whichever key names it."""
        path: Path | None = getattr(self, self.answer_file_key) if self.answer_file_key else None
        return path


@dataclass(frozen=True)
class UploadSettings:
    """The settings of one upload destination."""

    upload_type: str = _setting(one_of(*UPLOAD_TYPES), "kind of the upload")
    upload_target: str = _setting(parse_target, "place to upload to, in the form that the upload type has")
    upload_args: tuple[str, ...] = _setting(parse_words, "extra arguments of the upload program", "")


@dataclass(frozen=True)
class Destination:
    """An upload destination, ready to use.

    *commands* are run after the upload; ``${image}`` in them stands for the file, so they are made
    for each file by ``Configuration.destination``.
    """

    section: str
    type: str
    target: str
    arguments: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]


# Keys that do nothing unless the settings are such, and how a user says that.
_DEPENDENT: dict[str, tuple[str, Callable[[ImageSettings], bool]]] = {
    "test-boot-timeout": ("test-boot = yes", lambda settings: settings.test_boot),
    "kernel-errors-allowed": ("test-boot = yes", lambda settings: settings.test_boot),
    "audit-skip": ("audit = yes", lambda settings: settings.audit),
    "seal-only": ("seal = yes", lambda settings: settings.seal),
    "seal-skip": ("seal = yes", lambda settings: settings.seal),
    "log-filename": ("log-file = yes", lambda settings: settings.log_file),
    "compression": ("format = qcow2", lambda settings: "qcow2" in settings.format),
    "linux-sha256": ("linux", lambda settings: not settings.installer_image),
    "initrd-sha256": ("initrd", lambda settings: not settings.installer_image),
    "installer-image-sha256": ("installer-image", lambda settings: bool(settings.installer_image)),
    "keyring": ("verify = auto or required", lambda settings: settings.verify != "none"),
}


def accepted_by(declaration: Declaration) -> str:
    """Return what *declaration* accepts, for people, as the error of its parser has it."""
    try:
        declaration.parse("\0")
    except ValueError as error:
        return str(error.args[0])
    return "any text"


def declarations(kind: type[Any]) -> Iterator[tuple[str, Declaration]]:
    """Give the key and the declaration of each setting of *kind*, keys with dashes."""
    for entry in fields(kind):
        yield entry.name.replace("_", "-"), entry.metadata["declaration"]


def _normal_key(key: str) -> str:
    return key.lower().replace("_", "-")


def check_image_name(name: str) -> None:
    """Raise ConfigurationError unless *name* can be the start of a file name and the name of a VM."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        shown = name if len(name) <= 60 else name[:57] + "..."
        raise ConfigurationError(
            f"{shown!r} is no image name.",
            hint=f"It has at most {_LONGEST_NAME} letters, digits and . _ + ~ @ -, and begins with none of - . + ~ @",
        )


def find_data_dir() -> Path:
    """Return the directory of the shipped recipes and configuration.

    It is ``data`` beside the package in a checkout, and ``share/image-factory`` under the prefix
    that the package is installed below.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = [package.parent / "data", *(parent / "share/image-factory" for parent in package.parents)]
    for candidate in candidates:
        if (candidate / "image-factory.conf").is_file():
            return candidate
    raise ConfigurationError(
        f"The shipped image-factory.conf isn't installed for {package}.", hint="Install image-factory again."
    )


class Variables(Mapping[str, str]):
    """The texts of all keys of an image, own variables included, by key with underscores.

    A text is made when it is asked for, and ConfigurationError says what is wrong with it.
    """

    def __init__(self, keys: Iterable[str], text: Callable[[str], str]) -> None:
        """Take *text*, which gives the text of one of *keys*."""
        self._keys = {key.replace("-", "_"): key for key in keys}
        self._text = text

    def __getitem__(self, name: str) -> str:
        """Return the text of the key *name*."""
        return self._text(self._keys[name])

    def __contains__(self, name: object) -> bool:
        """Return whether there is a key *name*, without its text."""
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        """Give the keys."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Return how many keys there are."""
        return len(self._keys)


# What gives the keys that an answer file asks for, None for any.
Asked = Callable[[Path], set[str] | None]


class Configuration:
    """The configuration files, read and merged; values are parsed when they are asked for."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Read the files that apply; ConfigurationError if one can't be read."""
        self._parser = configparser.ConfigParser(
            defaults={"data-dir": str(find_data_dir()).replace("$", "$$")},
            interpolation=configparser.ExtendedInterpolation(),
        )
        self._parser.optionxform = _normal_key  # type: ignore[assignment,method-assign]
        # The keys of each section in the files of the user, which are to be warned of if nothing uses them.
        self._written: dict[str, set[str]] = {}
        if environment.get(FILE_VARIABLE):
            self.files = [Path(environment[FILE_VARIABLE])]
            self._read(self.files[0], f" (named by {FILE_VARIABLE})")
        else:
            shipped = find_data_dir() / "image-factory.conf"
            candidates = [shipped, SYSTEM_FILE, Path(os.path.expanduser(USER_FILE))]
            self.files = [path for path in candidates if os.path.lexists(path)]
            for path in self.files:
                self._read(path)
                if path == shipped:
                    self._written.clear()
        # As they are written, without what they are based on.
        self._own = {section: dict(self._own_texts(section)) for section in self._parser.sections()}
        # Of the other sections nothing is wrong: whoever asks for one of these is told.
        self._broken: dict[str, ConfigurationError] = {}
        for section in self._parser.sections():
            try:
                self._fill(section)
            except ConfigurationError as error:
                self._broken[section] = error

    def _read(self, path: Path, named: str = "") -> None:
        where = f"{path}{named}"
        try:
            data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
            events.tell(events.InputUsed("configuration", str(path), path))
            # Without their ends, lines look better in messages.
            lines = data.decode().split("\n")
            self._note_keys(lines)
            self._parser.read_file(lines, str(path))
        except OSError as error:
            raise ConfigurationError(f"Can't read the configuration {where}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ConfigurationError(
                f"{where}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8.",
                hint=f"Convert it: iconv -f latin1 -t utf-8 {shlex.quote(str(path))}",
            ) from error
        except configparser.DuplicateSectionError as error:
            raise ConfigurationError(
                f"{where}, line {error.lineno}: section [{error.section}] is there twice."
            ) from error
        except configparser.DuplicateOptionError as error:
            raise ConfigurationError(
                f"{where}, line {error.lineno}: [{error.section}] has {error.option!r} twice.",
                hint="'-' and '_' are the same in keys.",
            ) from error
        except configparser.MissingSectionHeaderError as error:
            # The line itself is not shown: this may be an answer file, with passwords in it.
            raise ConfigurationError(f"{where}, line {error.lineno} comes before any [section].") from error
        except configparser.ParsingError as error:
            line, _ = error.errors[0]
            raise ConfigurationError(f"{where}, line {line} is neither a [section] nor KEY = VALUE.") from error
        except configparser.Error as error:
            raise ConfigurationError(f"{where}: {' '.join(str(error).split())}") from error

    def _note_keys(self, lines: list[str]) -> None:
        # Without a section of defaults, [DEFAULT] is one like the others, which have their own keys alone.
        parser = configparser.RawConfigParser(default_section="")
        parser.optionxform = _normal_key  # type: ignore[assignment,method-assign]
        parser.read_file(lines)
        for section in parser.sections():
            self._written.setdefault(section, set()).update(parser.options(section))
            self._forget_architectures(section, parser.options(section))

    def _forget_architectures(self, section: str, keys: Iterable[str]) -> None:
        """Take the texts of files before for an architecture out of *section*, where this one has *keys* for any."""
        is_default = section == self._parser.default_section
        if is_default or self._parser.has_section(section):
            texts = self._parser.defaults() if is_default else self._own_texts(section)
            plain = set(keys)
            for key in [key for key in texts if key.partition("@")[0] in plain and _names_arch(key)]:
                self._parser.remove_option(section, key)

    def _bases(self, section: str) -> list[str]:
        """Return *section* and those that it is based on, the nearest first."""
        seen = [section]
        while based_on := self._own[seen[-1]].get("based-on", "").strip():
            if based_on not in self._parser.sections():
                raise ConfigurationError(
                    f"[{seen[-1]}] based-on: there is no section [{based_on}].", hint=self._suggestion(based_on)
                )
            if based_on in seen:
                raise ConfigurationError(
                    f"[{section}] based-on: {' -> '.join([*seen, based_on])} goes round in a circle."
                )
            seen.append(based_on)
        return seen

    def _fill(self, section: str) -> None:
        """Give *section* the keys that it lacks of the section that it is based on, as they are written there.

        A key with ``@ARCH`` behind it stands for the one without where that is the section's architecture.
        """
        levels = [self._own[name] for name in reversed(self._bases(section))]
        texts = self._own_texts(section)
        # Not by set(), which refuses what is to be refused when it is used, with a better message.
        for level in levels:
            texts.update(level)
        arch = self.arch(section)
        texts.clear()
        texts.update(_of_arch(self._parser.defaults(), arch))
        for level in levels:
            texts.update({**level, **_of_arch(level, arch)})

    def arch(self, section: str) -> str:
        """Return the architecture of *section*, empty if it is none."""
        try:
            return parse_arch(self._text(section, "arch")) if "arch" in self._parser[section] else default_arch()
        except (ConfigurationError, ValueError):
            # The image itself is refused, with a message.
            return ""

    def _own_texts(self, section: str) -> dict[str, str]:
        """Return the keys of *section* as they are written, without those of DEFAULT."""
        # configparser gives them out only together with those of DEFAULT.
        texts: dict[str, str] = self._parser._sections[section]  # type: ignore[attr-defined]
        return texts

    def images(self) -> list[str]:
        """Return the names of the configured images, in the order of the files."""
        return [
            name
            for name, section in self._parser.items()
            if name != self._parser.default_section
            and "upload-type" not in section
            and (name in self._broken or any(key in section for key in ("linux", "initrd", "installer-image")))
        ]

    def descriptions(self) -> list[dict[str, Any]]:
        """Return what there is to say of each configured image to machines; None where it is not known, or wrong."""
        return [
            {"name": name}
            | {key.replace("-", "_"): self._described(name, key) for key in DESCRIBED_KEYS}
            | {"based_on": self._own_texts(name).get("based-on", "").strip() or None}
            for name in self.images()
        ]

    def _described(self, name: str, key: str) -> Any:
        try:
            value = self._value(name, key, dict(declarations(ImageSettings))[key], {})
            if key == "firmware" and (arch := self._described(name, "arch")):
                return value or default_firmware(arch)
            # JSON has no infinity.
            return None if value == math.inf else value
        except ConfigurationError:
            # Whoever builds the image is told; the others are to be listed all the same.
            return () if key == "format" else None

    def summary(self, name: str) -> list[str]:
        """Return what there is to say of image *name*, by LISTED_KEYS; empty where it is not known, or wrong."""
        known = dict(declarations(ImageSettings))
        found: dict[str, str] = {}
        for key in LISTED_KEYS:
            try:
                value = self._value(name, key, known[key], {})
            except ConfigurationError:
                # Whoever builds the image is told; the others are to be listed all the same.
                found[key] = ""
                continue
            if key == "firmware" and found["arch"]:
                value = value or default_firmware(found["arch"])
            found[key] = value or ""
        return list(found.values())

    def image(self, name: str, flags: Mapping[str, str]) -> ImageSettings:
        """Return the settings of image *name*; *flags* (key -> text) win over the files."""
        self.check_image(name)
        values = self._values(name, ImageSettings, flags)
        values["firmware"] = values["firmware"] or default_firmware(values["arch"])
        settings = ImageSettings(**values)
        _check_sources(name, settings)
        return settings

    def check_image(self, name: str) -> None:
        """Raise ConfigurationError unless there is an image *name*."""
        if name not in self._parser or name == self._parser.default_section:
            raise ConfigurationError(
                f"No image {name!r} is configured in {', '.join(map(str, self.files)) or 'any file'}.",
                hint=self._suggestion(name),
            )
        if name in self._broken:
            raise self._broken[name]

    def variables(self, name: str, flags: Mapping[str, str]) -> Variables:
        """Return the texts of the keys of image *name*, for its answer file: flags, files and defaults."""
        defaults = {key: declaration.default_text() for key, declaration in declarations(ImageSettings)}
        given = {key: text for key, text in defaults.items() if text is not None and key not in self._parser[name]}
        given |= flags
        keys = dict.fromkeys([*given, *self._parser[name]])
        return Variables(keys, lambda key: given[key] if key in given else self._text(name, key))

    def destination(self, section: str, image_file: str, *, named_by: str) -> Destination:
        """Return upload destination *section* with ``${image}`` standing for *image_file*.

        *named_by* is the image whose settings name it, for the error.
        """
        if section not in self._parser or section == self._parser.default_section:
            raise ConfigurationError(
                f"[{named_by}] upload-destinations: there is no section [{section}].",
                hint=f"Add a section [{section}] with upload_type and upload_target.",
            )
        if section in self._broken:
            raise self._broken[section]
        for key, declaration in declarations(UploadSettings):
            if declaration.default_text() is None and key not in self._parser[section]:
                raise ConfigurationError(
                    f"[{section}] lacks '{key.replace('-', '_')}'. It is the {declaration.help}.",
                    hint=f"[{section}] is an upload destination of [{named_by}].",
                )
        with_image = self._defining(section, "image", image_file)
        settings = UploadSettings(**with_image._values(section, UploadSettings, {}))
        keys = sorted(filter(_COMMAND_KEY.fullmatch, self._parser[section]), key=_command_number)
        commands = tuple(with_image._parse(section, key, parse_command) for key in keys)
        return Destination(section, settings.upload_type, settings.upload_target, settings.upload_args, commands)

    def _defining(self, section: str, key: str, text: str) -> "Configuration":
        """Return a copy in which ``${key}`` is *text* in *section*, and where it takes texts from others."""
        copied = copy.deepcopy(self)
        for name in (section, self._parser.default_section):
            copied._parser.set(name, key, text.replace("$", "$$"))
        return copied

    def _suggestion(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.images(), n=3, cutoff=0.5)
        if near:
            return f"Did you mean {' or '.join(near)}? 'image-factory --list' lists them all."
        return "'image-factory --list' lists the configured images."

    def answer_file(self, name: str) -> Path | None:
        """Return the answer file of section *name*, None if it has none or does not name it well."""
        known = dict(declarations(ImageSettings))
        for key in ANSWER_FILE_KEYS:
            if key in self._parser[name]:
                with contextlib.suppress(ConfigurationError):
                    path: Path = self._value(name, key, known[key], {})
                    return path
        return None

    def unused_keys(self, image: str, destinations: Iterable[str], asked: Asked) -> list[str]:
        """Return a sentence on each key of the user's files that nothing of *image*, or of *destinations*, uses.

        *asked* gives the keys that an answer file asks for, with dashes; None for any key.
        """
        answer_file = self.answer_file(image)
        template = asked(answer_file) if answer_file else set()
        settings = {key for key, _ in declarations(ImageSettings)} | {"based-on"}
        used = settings | (template or set()) | self._references(image)
        sentences = []
        for section in self._bases(image) if template is not None else ():
            others = used
            if section != image and template and self._unused(section, used):
                # The section is an image itself, and this one has another template.
                its_own = self.answer_file(section)
                others = used | self._references(section) | ((asked(its_own) if its_own else None) or set())
            sentences += [_unused_key(section, key, used, answer_file) for key in self._unused(section, others)]
        for section in dict.fromkeys(destinations):
            known = {key for key, _ in declarations(UploadSettings)} | self._references(section)
            unused = [key for key in self._unused(section, known) if not _COMMAND_KEY.fullmatch(key)]
            sentences += [_unused_key(section, key, known) for key in unused]
        return sentences + self._unused_defaults(asked) + self._unused_sections(image)

    def idle_keys(self, image: str, settings: ImageSettings, flags: Iterable[str]) -> list[str]:
        """Return a sentence on each key of *flags* and the user's files that does nothing beside *settings*."""
        sentences = []
        for key, (needed, is_there) in _DEPENDENT.items():
            if is_there(settings):
                continue
            written = [section for section in self._bases(image) if key in self._written.get(section, ())]
            if key in flags or written:
                where = f"--{key}" if key in flags else f"[{written[0]}] {key}"
                sentences.append(f"{where} does nothing without {needed}.")
        return sentences

    def variables_named(self, image: str) -> list[str]:
        """Return the variables that the values of *image* name, in their order."""
        known = {key for key, _ in declarations(ImageSettings)} | {"based-on", "data-dir"}
        return [key for key in self._parser[image] if key in self._references(image) - known]

    def _unused(self, section: str, used: set[str]) -> list[str]:
        """Return the keys of *section* in the user's files that are not among *used*, in their order."""
        order = self._parser.defaults() if section == self._parser.default_section else self._own[section]
        return [
            key
            for key in order
            if key in self._written.get(section, ())
            and not (key in used or (key.partition("@")[0] in used and _names_arch(key)))
        ]

    def _unused_defaults(self, asked: Asked) -> list[str]:
        section = self._parser.default_section
        used = {key for kind in (ImageSettings, UploadSettings) for key, _ in declarations(kind)} | {"data-dir"}
        for texts in (self._parser.defaults(), *self._own.values()):
            used |= {_normal_key(key or name) for text in texts.values() for name, _, key in _references_in(text)}
        unused = [key for key in self._unused(section, used) if not _COMMAND_KEY.fullmatch(key)]
        if not unused:
            return []
        # Any image's template may ask for it.
        for path in dict.fromkeys(filter(None, map(self.answer_file, self.images()))):
            keys = asked(path)
            if keys is None:
                return []
            used |= keys
        return [_unused_key(section, key, used) for key in unused if key not in used]

    def _unused_sections(self, image: str) -> list[str]:
        """Return a sentence on each section that nothing uses and whose name is near to that of *image*."""
        used = {*self.images(), self._parser.default_section}
        used |= {section for section in self._parser.sections() if "upload-type" in self._parser[section]}
        for texts in self._own.values():
            used |= {texts.get("based-on", "").strip(), *split_list(texts.get("upload-destinations", ""))}
            used |= {section for text in texts.values() for section, colon, _ in _references_in(text) if colon}
        unused = [section for section in self._written if section not in used]
        return [
            f"[{section}]: nothing uses this section, as it has no installer. Did you mean [{image}]?"
            for section in difflib.get_close_matches(image, unused, n=3, cutoff=0.85)
        ]

    def _references(self, section: str) -> set[str]:
        """Return the keys of *section* that a ``${}`` of the configuration names."""
        merged = [text for _, text in self._parser.items(section, raw=True)] if section in self._parser else []
        # A key for another architecture may be the only one that names a key.
        merged += [text for texts in (self._parser.defaults(), self._own.get(section, {})) for text in texts.values()]
        found = {_normal_key(name) for text in merged for name, colon, _ in _references_in(text) if not colon}
        everywhere = [self._parser.defaults(), *self._own.values()]
        return found | {
            _normal_key(key)
            for texts in everywhere
            for text in texts.values()
            for name, _, key in _references_in(text)
            if name == section and key
        }

    def _values(self, section: str, kind: type[Any], flags: Mapping[str, str]) -> dict[str, Any]:
        return {
            key.replace("-", "_"): self._value(section, key, declaration, flags)
            for key, declaration in declarations(kind)
        }

    def _value(self, section: str, key: str, declaration: Declaration, flags: Mapping[str, str]) -> Any:
        if key in flags:
            return _parsed(f"{declaration.flags[-1]}", flags[key], declaration.parse)
        if key in self._parser[section]:
            return self._parse(section, key, declaration.parse)
        default = declaration.default_text()
        return None if default is None else declaration.parse(default)

    def _parse(self, section: str, key: str, parse: Callable[[str], Any]) -> Any:
        text = self._text(section, key)
        # An autoinstall file that is taken for a configuration begins with that key, and has secrets below it.
        shown = "a value of several lines" if key in ANSWER_FILE_KEYS and "\n" in text.strip() else None
        return _parsed(f"[{section}] {key}", text, parse, shown)

    def _text(self, section: str, key: str) -> str:
        where = f"[{section}] {key}"
        try:
            return self._parser.get(section, key)
        except configparser.InterpolationMissingOptionError as error:
            raise ConfigurationError(
                f"{where}: ${{{error.reference}}} is not defined.",
                hint=f"Define {error.reference} in [{section}] or [DEFAULT]; a dollar sign itself is written $$.",
            ) from error
        except configparser.InterpolationDepthError as error:
            raise ConfigurationError(f"{where}: its ${{...}} go round in a circle.") from error
        except configparser.InterpolationSyntaxError as error:
            raw = self._parser.get(section, key, raw=True)
            # Nobody is to find the hash of a password in a log.
            shown = "what is there" if re.search(r"\$[0-9a-z]{1,4}\$", raw) else repr(raw)
            raise ConfigurationError(
                f"{where}: {shown} has a '$' that begins no ${{...}}.",
                hint="Write $$ for a dollar sign.",
            ) from error


def _of_arch(texts: Mapping[str, str], arch: str) -> dict[str, str]:
    """Return the *texts* whose keys are for *arch*, by the keys that they stand for."""
    parts = ((key.rpartition("@"), text) for key, text in texts.items() if "@" in key)
    return {key: text for (key, _, suffix), text in parts if is_arch(suffix, arch)}


def _names_arch(key: str) -> bool:
    return any(is_arch(key.partition("@")[2], arch) for arch in ARCHITECTURES)


def _references_in(text: str) -> list[tuple[str, str, str]]:
    """Return what the ``${}`` of *text* name, parted at the colon: ``(key, "", "")`` or ``(section, ":", key)``."""
    return [name.partition(":") for name in re.findall(r"\$\{([^}]+)\}", text.replace("$$", ""))]


def _unused_key(section: str, key: str, used: Iterable[str], plain: Path | None = None) -> str:
    """Return a sentence on *key*, which nothing uses; *plain* is the answer file that is no template."""
    near = difflib.get_close_matches(key.partition("@")[0], sorted(used), n=1, cutoff=0.75)
    if near:
        return f"[{section}] {key}: nothing uses this key. Did you mean {near[0]}?"
    if plain and not plain.name.endswith(".j2"):
        return (
            f"[{section}] {key}: nothing uses this key, as {plain} is no template. "
            f"Write it into the answer file, or call that {plain.name}.j2 and use the key there."
        )
    return f"[{section}] {key}: nothing uses this key. Remove it, or name it in a value: ${{{key}}}."


def _command_number(key: str) -> int:
    """Return which of the commands after an upload *key* is: the one without a number is the first."""
    return int(key.removeprefix("post-upload-command") or -1)


def _parsed(where: str, text: str, parse: Callable[[str], Any], shown: str | None = None) -> Any:
    """Return the value of *text*; the error has *shown* in its place, if that is given."""
    try:
        value = parse(text)
        # No program takes it in an argument.
        if "\0" in text:
            raise ValueError("text without NUL characters")
        return value
    except ValueError as error:
        accepted, *hints = error.args
        raise ConfigurationError(
            f"{where}: {shown or repr(text)} is not accepted, only {accepted}.", hint=hints[0] if hints else None
        ) from error


def _named(keys: Sequence[str]) -> str:
    return " and ".join(f"'{key}'" for key in keys)


def _check_sources(name: str, settings: ImageSettings) -> None:
    answers = [key for key in ANSWER_FILE_KEYS if getattr(settings, key)]
    if len(answers) > 1:
        raise ConfigurationError(
            f"[{name}] has {_named(answers)}. An image has one answer file.", hint="Remove all but one."
        )
    if settings.installer_image:
        return
    missing = [key for key in ("linux", "initrd") if not getattr(settings, key)]
    if missing:
        what = {
            "linux": "It is the URI of the netboot kernel.",
            "initrd": "It is the URI of the netboot initrd.",
            "linux initrd": "They are the URIs of the netboot kernel and initrd.",
        }[" ".join(missing)]
        raise ConfigurationError(
            f"[{name}] lacks {_named(missing)}. {what}",
            hint="Or name an ISO or an installation tree with 'installer_image'.",
        )
