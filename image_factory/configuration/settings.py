"""The settings: each declared once, with its parser, default, help text and flags.

The INI reader, argparse, the defaults and the manual's check all come from the declarations here.
"""

import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..base.errors import ConfigurationError
from ..base.units import parse_size
from ..machines.arch import ARCHITECTURES, FIRMWARES, default_arch
from ..machines.devices import KINDS
from .parsers import (
    LAYOUTS,
    Copy,
    InstallerFile,
    Origin,
    Source,
    one_of,
    parse_agama_file,
    parse_answer_file,
    parse_answer_files,
    parse_arch,
    parse_boolean,
    parse_bootstrap_file,
    parse_copies,
    parse_count,
    parse_disk_size,
    parse_elements,
    parse_environment,
    parse_file_name,
    parse_filesystem,
    parse_headers,
    parse_keep,
    parse_key,
    parse_label,
    parse_large_size,
    parse_layout,
    parse_limit,
    parse_line,
    parse_long_duration,
    parse_mac,
    parse_matrix,
    parse_mirrors,
    parse_mount_points,
    parse_option,
    parse_origin,
    parse_packages,
    parse_path,
    parse_patterns,
    parse_retries,
    parse_scripts,
    parse_search_path,
    parse_sha256,
    parse_tar_patterns,
    parse_target,
    parse_template,
    parse_text,
    parse_tls,
    parse_verification,
    parse_vnc,
    parse_words,
    some_of,
    split_list,
)

# The file names of an image have its name, date, format and ".manifest.json": together at most 255 bytes.
_LONGEST_NAME = 200
# Beside SHA-256, in the order in which they are made.
MORE_CHECKSUMS = ("sha512", "md5")
# What a name of files may have, beside the keys of the image.
NAME_VARIABLES = ("image", "date", "stamp", "ident", "distribution", "release", "arch")
# The settings that are names with these.
NAME_TEMPLATES = ("image-name", "manifest-text")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+~@-]*")


def default_cache_dir() -> str:
    """Return where downloads are kept: root's are the machine's."""
    return "/var/cache/image-factory" if os.geteuid() == 0 else "~/.cache/image-factory"


@dataclass(frozen=True)
class Declaration:
    """What is known of a setting.  *default* is text, as a user would write it, or None.

    A setting that names entries of a table of kinds takes any word: such a table lies above the settings, as its
    entries need them.  ``files.declared`` has the names, which stand where *help* has ``{}``.
    """

    parse: Callable[[str], Any]
    help: str
    default: str | Callable[[], str] | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None

    def default_text(self) -> str | None:
        """Return the default as a user would write it, None if there is none."""
        return self.default() if callable(self.default) else self.default

    def accepting(self, parse: Callable[..., Callable[[str], Any]], names: Collection[str]) -> "Declaration":
        """Return the declaration with the *names* that it accepts, which *parse* makes a parser of."""
        return replace(self, parse=parse(*names), help=self.help.format(", ".join(names)))


def _setting(*arguments: Any, **keywords: Any) -> Any:
    return field(metadata={"declaration": Declaration(*arguments, **keywords)})


@dataclass(frozen=True)
class ImageSettings:
    """The settings of one image; sizes in bytes."""

    distribution: str | None = _setting(parse_line, "name of the distribution, for people")
    release: str | None = _setting(parse_line, "name of its release, for people")
    source: str = _setting(parse_line, "what the disk is made by: {}", "installer")
    linux: Source | None = _setting(parse_mirrors, "path or URI of the netboot kernel")
    initrd: Source | None = _setting(parse_mirrors, "path or URI of the netboot initrd")
    installer_image: Source | None = _setting(
        parse_mirrors, "ISO or installation tree for virt-install's --location, instead of linux and initrd"
    )
    linux_sha256: str | None = _setting(parse_sha256, "SHA-256 that the kernel must have")
    initrd_sha256: str | None = _setting(parse_sha256, "SHA-256 that the initrd must have")
    installer_image_sha256: str | None = _setting(parse_sha256, "SHA-256 that the ISO must have")
    source_image: Source | None = _setting(parse_mirrors, "path or URI of the disk image that the build begins with")
    bootstrap: Path | None = _setting(parse_bootstrap_file, "YAML file that says what a bootstrapped system has")
    source_image_sha256: str | None = _setting(parse_sha256, "SHA-256 that this image must have")
    capture_from: Origin | None = _setting(
        parse_origin, "system that is captured: ssh://USER@HOST[:PORT], or the path of a directory or a tar"
    )
    capture_mounts: tuple[str, ...] = _setting(
        parse_mount_points, "mount points that are captured beside the root, with commas; empty means the system's", ""
    )
    work_in_memory: str = _setting(
        one_of("auto", "yes", "no"), "whether a tree is made in memory: yes, no, or auto, where enough is free", "auto"
    )
    cache_tree: bool = _setting(
        parse_boolean, "whether a bootstrapped tree is cached, and taken again while no package has changed", "no"
    )
    elements: tuple[str, ...] = _setting(
        parse_elements, "elements of diskimage-builder that make the system, or are applied to it", ""
    )
    elements_path: tuple[Path, ...] = _setting(
        parse_search_path, "directories of elements, with colons (further ones: ELEMENTS_PATH, diskimage-builder's)", ""
    )
    element_environment: tuple[tuple[str, str], ...] = _setting(
        parse_environment, "variables of elements, as words NAME=VALUE, beside the keys that begin with DIB_", ""
    )
    element_timeout: float | None = _setting(
        parse_long_duration, "how long each phase of elements may take, or none", "2h"
    )
    skip_base: bool = _setting(parse_boolean, "leave out the element base, which is there without being named", "no")
    extra_packages: tuple[str, ...] = _setting(
        parse_packages, "packages that are installed beside those of elements, with blanks or commas", ""
    )
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
    image_size: int | None = _setting(
        parse_disk_size,
        "size of the disk (of an existing image: its own), or fit, as small as a tree lets it",
        "2G",
        ("--image-size",),
        "SIZE",
    )
    extra_size: int | None = _setting(parse_size, "bytes that are free beside the tree, with image-size = fit")
    layout: str | Path | None = _setting(
        parse_layout, f"{', '.join(LAYOUTS)}, or a YAML file with the disk's partitions (default: as firmware says)"
    )
    filesystem: str | None = _setting(parse_filesystem, "the root filesystem of a tree: ext4 (default), xfs or btrfs")
    root_label: str | None = _setting(parse_label, "label of the root filesystem")
    mkfs_options: tuple[str, ...] = _setting(parse_words, "options of mkfs for the root filesystem", "")
    image_name: str = _setting(
        parse_template,
        f"what the names of all files begin with; it may have {', '.join(f'${{{name}}}' for name in NAME_VARIABLES)}",
        "${image}-${date}",
    )
    replace: str = _setting(
        one_of("yes", "no", "number"), "whether an image of the same name is replaced: yes, no, or number", "yes"
    )
    keep: int | None = _setting(
        parse_keep, "how many builds of the image stay in the output directory: a number, or all", "all"
    )
    checksums: tuple[str, ...] = _setting(
        some_of("sha256", *MORE_CHECKSUMS),
        "checksums of each image, with commas; sha256 is always made",
        "sha256",
    )
    target: tuple[str, ...] = _setting(
        split_list,
        "what the image is for, which sets format and compression: {}, or several with commas; empty means nothing",
        "",
        ("-t", "--target"),
        "TARGET",
    )
    format: tuple[str, ...] = _setting(split_list, "{}, or several with commas", "raw", ("-f", "--format"), "FORMAT")
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
        one_of("loop", "fuse", "guestfs", "auto"),
        "how the installed disk is mounted: loop, fuse, guestfs or auto",
        "auto",
    )
    require_single_partition: bool = _setting(
        parse_boolean, "fail if the installer has made more than one partition", "no"
    )
    audit: bool = _setting(parse_boolean, "fail if an image has what must not be cloned", "no")
    audit_skip: tuple[str, ...] = _setting(split_list, "checks that the audit leaves out, with commas", "")
    seal: bool = _setting(parse_boolean, "take from the image what its clones must not have in common", "no")
    seal_only: tuple[str, ...] = _setting(split_list, "the operations of sealing, with commas; empty means all", "")
    seal_skip: tuple[str, ...] = _setting(split_list, "operations of sealing that are left out, with commas", "")
    copy: tuple[Copy, ...] = _setting(
        parse_copies, "files for the image, SOURCE:DESTINATION[:OWNER:GROUP[:MODE]], one a line; empty means none", ""
    )
    first_boot: tuple[Path, ...] = _setting(
        parse_scripts, "scripts that each clone runs once, as root, with commas; empty means none", ""
    )
    keep_raw: bool = _setting(parse_boolean, "keep the raw image too", "no")
    tar_exclude: tuple[str, ...] = _setting(
        parse_tar_patterns, "what formats of the tree leave out: paths with * and ?, and commas between them", ""
    )
    compression: str = _setting(one_of("zstd", "zlib", "none"), "compression of qcow2", "zstd")
    vnc: tuple[str, int | None] | None = _setting(
        parse_vnc, "HOST:DISPLAY of the installation machine's screen; HOST alone picks a free display"
    )
    osinfo: str | None = _setting(parse_option, "name of the operating system for virt-install")
    arch: str = _setting(
        parse_arch,
        f"architecture of the image: {', '.join(ARCHITECTURES)} (default: this machine's)",
        default_arch,
    )
    firmware: str = _setting(
        one_of(*FIRMWARES), f"what the image boots with: {', '.join(FIRMWARES)} (default: bios, uefi on aarch64)"
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
    test_boot_matrix: tuple[str, ...] = _setting(
        parse_matrix,
        "machines of the test boot, each with one of these: "
        f"{', '.join(' '.join(kind) for kind in KINDS)}; empty means the usual ones",
        "",
    )
    kernel_errors_allowed: tuple[str, ...] = _setting(
        parse_patterns, "regular expressions, one a line, of errors in the kernel's log that the test boot accepts", ""
    )
    tasks: tuple[str, ...] = _setting(
        split_list,
        "own work before the disk is cleaned: paths of scripts and playbooks, sections of tasks, with commas",
        "",
    )
    tasks_after_cleaning: tuple[str, ...] = _setting(
        split_list, "tasks after the disk is cleaned, which have no network", ""
    )
    tasks_via: str = _setting(
        one_of("auto", "guest", "namespace"),
        "where tasks run: guest, the booted system; namespace, a tree before it is a disk; or auto",
        "auto",
    )
    tasks_network: bool = _setting(parse_boolean, "let tasks before cleaning use the network", "yes")
    manifest: bool = _setting(
        parse_boolean, "write what is in the image beside it: packages, licenses, sizes; and an SBOM", "no"
    )
    manifest_text: str | None = _setting(
        parse_template,
        "name of a text file beside the image with its checksum and the list of its files, as RackN has it",
    )
    provenance: bool = _setting(
        parse_boolean, "write a statement beside the image of how it was made, in the forms of in-toto and SLSA", "no"
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
        keys = (BOOTSTRAP_KEY,) if self.source == BOOTSTRAP_KEY else ANSWER_FILE_KEYS
        return next((key for key in keys if getattr(self, key)), None)

    @property
    def answer_file(self) -> Path | None:
        """The answer file, whichever key names it."""
        path: Path | None = getattr(self, self.answer_file_key) if self.answer_file_key else None
        return path


# Keys that do nothing unless the settings are such, each with how a user says that.
Dependent = dict[str, tuple[str, Callable[[ImageSettings], bool]]]


@dataclass(frozen=True)
class UploadSettings:
    """The settings of one upload destination."""

    upload_type: str = _setting(parse_line, "kind of the upload")
    upload_target: str = _setting(parse_target, "place to upload to, in the form that the upload type has")
    upload_args: tuple[str, ...] = _setting(parse_words, "extra arguments of the upload program", "")
    upload_formats: tuple[str, ...] | None = _setting(
        split_list, "which formats of an image go there: {} (default: all that it has)"
    )
    upload_method: str | None = _setting(one_of("put", "post"), "how HTTP sends a file: put or post")
    upload_headers: tuple[str, ...] = _setting(parse_headers, "fields of the HTTP request, NAME: VALUE, one a line", "")
    upload_credentials: Path | None = _setting(parse_path, "file of the login, which only its owner may read")
    upload_tls: str | Path | None = _setting(
        parse_tls, "file of the CA that the server's certificate is of, sha256//PIN of its key, or none for http://"
    )
    upload_verify: str | None = _setting(
        parse_verification, "how it is verified there: header:NAME, etag, download or none"
    )
    upload_index: str = _setting(
        one_of("yes", "no", "simplestreams"),
        "keep an index.json there of what was published, and what Incus reads: yes, no or simplestreams (both)",
        "no",
    )
    upload_keep: int | None = _setting(
        parse_keep, "how many builds of the image stay there, of those in the index: a number, or all", "all"
    )


@dataclass(frozen=True)
class Destination:
    """An upload destination, ready to use.

    *commands* are run after the upload; ``${image}`` in them stands for the file, so they are made
    for each file by ``Configuration.destination``.  What is None or empty is as the type has it.
    With *makes_directory* the last directory of the target need not be there.
    """

    section: str
    type: str
    target: str
    arguments: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    formats: tuple[str, ...] | None = None
    method: str | None = None
    headers: tuple[str, ...] = ()
    credentials: Path | None = None
    tls: str | Path | None = None
    verify: str | None = None
    index: str = "no"
    keep: int | None = None
    makes_directory: bool = False


@dataclass(frozen=True)
class TaskSettings:
    """The settings of one task."""

    task_type: str | None = _setting(parse_line, "what the task is: {} (default: as the file's name says)")
    task_file: Path | None = _setting(parse_path, "script or playbook")
    task_packages: tuple[str, ...] = _setting(parse_packages, "packages that the task installs", "")
    task_copy: tuple[Copy, ...] = _setting(
        parse_copies, "files that the task copies, SOURCE:DESTINATION[:OWNER:GROUP[:MODE]], one a line", ""
    )
    task_command: str | None = _setting(parse_text, "lines of shell that the task runs")
    task_args: tuple[str, ...] = _setting(parse_words, "arguments of the script, or of ansible-playbook", "")
    task_environment: tuple[tuple[str, str], ...] = _setting(
        parse_environment, "variables of the task, as words NAME=VALUE", ""
    )
    task_secrets: Path | None = _setting(parse_path, "file of secrets that only the task sees")
    task_timeout: float | None = _setting(parse_long_duration, "how long the task may take, or none", "30m")
    task_retries: int = _setting(parse_retries, "how often the task is tried again when it fails", "0")
    task_reboot: str = _setting(one_of("no", "after"), "whether the guest reboots after the task", "no")
    task_allow_failure: bool = _setting(parse_boolean, "go on when the task fails", "no")


@dataclass(frozen=True)
class Task:
    """A task, ready to be carried out; *section* is empty where a path alone names it, *type* is of the table of kinds.

    *timeout* is in seconds, infinite where there is none.  *given* tells apart what the image's settings make of it.
    """

    name: str
    section: str
    type: str
    file: Path | None = None
    packages: tuple[str, ...] = ()
    command: str = ""
    args: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    secrets: Path | None = None
    timeout: float = 1800.0
    retries: int = 0
    reboot: bool = False
    allow_failure: bool = False
    copies: tuple[Copy, ...] = ()
    given: str = field(default="", repr=False)


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


# The settings that name the answer file, each for an installer of its own.
ANSWER_FILE_KEYS = tuple(
    key for key, each in declarations(ImageSettings) if each.parse in (parse_answer_file, parse_agama_file)
)


# What the keys begin with that are variables of elements.
ELEMENT_PREFIX = "dib-"

# The one that names what a tree is bootstrapped from.
BOOTSTRAP_KEY = "bootstrap"


def check_image_name(name: str) -> None:
    """Raise ConfigurationError unless *name* can be the start of a file name and the name of a VM."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        shown = name if len(name) <= 60 else name[:57] + "..."
        raise ConfigurationError(
            f"{shown!r} is no image name.",
            hint=f"It has at most {_LONGEST_NAME} letters, digits and . _ + ~ @ -, and begins with none of - . + ~ @",
        )
