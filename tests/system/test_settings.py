"""The settings: files, flags, parsers, and what is said about mistakes."""

import dataclasses
import itertools
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from image_factory import sources
from image_factory.base.errors import ConfigurationError
from image_factory.base.files import find_data_dir
from image_factory.configuration import files as configuration_files
from image_factory.configuration.files import Configuration, declared
from image_factory.configuration.parsers import Copy, InstallerFile, Origin, Source
from image_factory.configuration.settings import (
    ANSWER_FILE_KEYS,
    Declaration,
    Destination,
    ImageSettings,
    TaskSettings,
    UploadSettings,
    check_image_name,
)
from image_factory.configuration.unused import unused_keys
from image_factory.machines.arch import default_arch, default_firmware, named_architectures
from image_factory.outputs import OUTPUTS
from image_factory.uploads import UPLOADS

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED_IMAGE = "Debian-13-server"
MINIMAL = "[x]\nlinux = /boot/linux\ninitrd = /boot/initrd\n"

Read = Callable[..., Configuration]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read a configuration of one file with the text, or the bytes, given."""

    def read_text(text: str | bytes) -> Configuration:
        path = tmp_path / "test.conf"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Configuration({configuration_files.FILE_VARIABLE: str(path)})

    return read_text


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The places of the system's file and the user's, neither of which is there yet."""
    monkeypatch.setattr(configuration_files, "SYSTEM_FILE", tmp_path / "etc.conf")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".config").mkdir()
    return tmp_path / "etc.conf", tmp_path / ".config/image-factory.conf"


def error_of(action: Callable[[], Any]) -> ConfigurationError:
    """Return the error that *action* raises, which has one line."""
    with pytest.raises(ConfigurationError) as caught:
        action()
    assert caught.value.message
    assert "\n" not in caught.value.message + (caught.value.hint or "")
    assert caught.value.exit_status == 2
    return caught.value


# Every setting: what a user writes, and what becomes of it.

IMAGE_ROWS: dict[str, tuple[str, Any]] = {
    "distribution": ("CentOS\n  Stream", "CentOS Stream"),
    "release": ("10", "10"),
    "source": ("Installer", "installer"),
    "linux": ("http://example.com/linux", Source("http://example.com/linux")),
    "initrd": ("/boot/initrd", Source("/boot/initrd", Path("/boot/initrd"))),
    "installer_image": ("file:///srv/a%20b.iso", Source("file:///srv/a%20b.iso", Path("/srv/a b.iso"))),
    "linux_sha256": ("AB" * 32, "ab" * 32),
    "initrd_sha256": ("01" * 32, "01" * 32),
    "installer_image_sha256": ("23" * 32, "23" * 32),
    "source_image": ("/srv/a.qcow2", Source("/srv/a.qcow2", Path("/srv/a.qcow2"))),
    "bootstrap": ("a.yaml", Path("a.yaml")),
    "source_image_sha256": ("45" * 32, "45" * 32),
    "capture_from": ("ssh://root@[fe80::1]:22/", Origin(host="fe80::1", user="root", port=22)),
    "capture_mounts": ("/var/, /srv/data", ("/var", "/srv/data")),
    "work_in_memory": ("Yes", "yes"),
    "cache_tree": ("yes", True),
    "elements": ("debian-minimal\n    vm", ("debian-minimal", "vm")),
    "elements_path": ("elements:/srv/elements", (Path("elements"), Path("/srv/elements"))),
    "element_environment": ("A=b 'C=d e'", (("A", "b"), ("C", "d e"))),
    "element_timeout": ("30m", 1800.0),
    "skip_base": ("yes", True),
    "extra_packages": ("jq, tree less", ("jq", "tree", "less")),
    "verify": ("Required", "required"),
    "keyring": ("/srv/keys.gpg", Path("/srv/keys.gpg")),
    "offline": ("yes", True),
    "append": ("console=ttyS0\n  quiet", "console=ttyS0 quiet"),
    "preseed": ("/srv/debian.cfg", Path("/srv/debian.cfg")),
    "kickstart": ("/srv/fedora.ks", Path("/srv/fedora.ks")),
    "yast": ("/srv/suse.xml", Path("/srv/suse.xml")),
    "autoinstall": ("/srv/ubuntu.yaml", Path("/srv/ubuntu.yaml")),
    "agama": ("/srv/suse.json.j2", Path("/srv/suse.json.j2")),
    "answer_files": (
        "/srv/a.ks,\n  /srv/b:c/d.ks",
        (InstallerFile(Path("/srv/a.ks"), "a.ks"), InstallerFile(Path("/srv/b"), "c/d.ks")),
    ),
    "cores": ("4", 4),
    "ram": ("1.5G", 1536 << 20),
    "image_size": ("10 GB", 10**10),
    "extra_size": ("100M", 100 << 20),
    "layout": ("Hybrid", "hybrid"),
    "filesystem": ("XFS", "xfs"),
    "root_label": ("top", "top"),
    "mkfs_options": ("-m 0 -E 'a=1'", ("-m", "0", "-E", "a=1")),
    "image_name": ("${image} ${date}", "${image} ${date}"),
    "replace": ("Number", "number"),
    "keep": ("3", 3),
    "checksums": ("sha256, md5", ("sha256", "md5")),
    "target": ("openstack, aws", ("openstack", "aws")),
    "format": ("qcow2, raw", ("qcow2", "raw")),
    "mac": ("52:54:00:AB:cd:ef", "52:54:00:ab:cd:ef"),
    "cache_dir": ("/srv/cache", Path("/srv/cache")),
    "installer_logs": ("True", True),
    "log_file": ("on", True),
    "log_filename": ("build.log", Path("build.log")),
    "output_dir": ("/srv/images", Path("/srv/images")),
    "mount_via": ("Guestfs", "guestfs"),
    "require_single_partition": ("yes", True),
    "audit": ("yes", True),
    "audit_skip": ("logs, identity", ("logs", "identity")),
    "seal": ("yes", True),
    "seal_only": ("machine-id,\n  ssh-host-keys", ("machine-id", "ssh-host-keys")),
    "seal_skip": ("logs", ("logs",)),
    "copy": (
        "a/b c/:/etc/x y/\n\n  ~/e:f:/g:web:4:0640\n :x:/y:1:2",
        (Copy("a/b c/", "/etc/x y/"), Copy("~/e:f", "/g", "web", "4", 0o640), Copy(":x", "/y", "1", "2")),
    ),
    "first_boot": ("/srv/a.sh,\n  b.j2", (Path("/srv/a.sh"), Path("b.j2"))),
    "keep_raw": ("1", True),
    "tar_exclude": ("/etc/default/grub, ./var/cache/*\n a b", ("etc/default/grub", "var/cache/*", "a b")),
    "compression": ("zlib", "zlib"),
    "vnc": ("localhost:13", ("localhost", 13)),
    "osinfo": ("debian11", "debian11"),
    "arch": ("AArch64", "aarch64"),
    "firmware": ("Hybrid", "hybrid"),
    "cpu": ("EPYC,disable=x2apic", "EPYC,disable=x2apic"),
    "virt_type": ("qemu", "qemu"),
    "network": ("bridge=br0", "bridge=br0"),
    "max_parallel": ("3", 3),
    "install_timeout": ("1h 30m", 5400.0),
    "stall_timeout": ("90s", 90.0),
    "test_boot": ("yes", True),
    "test_script": ("/srv/check.sh", Path("/srv/check.sh")),
    "test_boot_timeout": ("5m", 300.0),
    "test_boot_matrix": ("nvme SATA,\n  secure-boot, tpm", ("nvme", "sata", "secure-boot", "tpm")),
    "kernel_errors_allowed": ("\n  RAS: .*\n  no firmware$$", ("RAS: .*", "no firmware$")),
    "tasks": ("epel, ./a.yml,\n  b", ("epel", "./a.yml", "b")),
    "tasks_after_cleaning": ("./brand.sh", ("./brand.sh",)),
    "tasks_via": ("Namespace", "namespace"),
    "tasks_network": ("no", False),
    "manifest": ("yes", True),
    "manifest_text": ("a-${stamp}", "a-${stamp}"),
    "provenance": ("yes", True),
    "sign_key": (" Images <images@example.com> ", "Images <images@example.com>"),
    "upload_destinations": ("mirror-a, mirror-b", ("mirror-a", "mirror-b")),
    "post_build_command": ("/usr/bin/notify --title 'It is there'", ("/usr/bin/notify", "--title", "It is there")),
}
UPLOAD_ROWS: dict[str, tuple[str, Any]] = {
    "upload_type": ("rsync", "rsync"),
    "upload_target": ("example.com::images/it's here", "example.com::images/it's here"),
    "upload_args": ("-e 'ssh -p 2222' --chmod=a+r", ("-e", "ssh -p 2222", "--chmod=a+r")),
    "upload_formats": ("qcow2", ("qcow2",)),
    "upload_method": ("POST", "post"),
    "upload_headers": ("\n  X-Kind: image\n  X-Other: a: b", ("X-Kind: image", "X-Other: a: b")),
    "upload_credentials": ("/srv/login", Path("/srv/login")),
    "upload_tls": ("/srv/ca.pem", Path("/srv/ca.pem")),
    "upload_verify": ("header: X-Sum", "header:X-Sum"),
    "upload_index": ("Simplestreams", "simplestreams"),
    "upload_keep": ("3", 3),
}


def test_every_setting_has_a_row_and_help() -> None:
    for kind, rows in ((ImageSettings, IMAGE_ROWS), (UploadSettings, UPLOAD_ROWS)):
        known = dict(declared(kind))
        assert [key.replace("-", "_") for key in known] == list(rows)
        for key, declaration in known.items():
            assert re.fullmatch(r"\S.*[^.\s]", declaration.help), key


def rows_with_both_separators() -> list[tuple[str, str, str, Any]]:
    return [
        (key.replace("_", separator), key, *row)
        for key, row in IMAGE_ROWS.items()
        for separator in ("_-" if "_" in key else "_")
    ]


@pytest.mark.parametrize(("written", "name", "text", "value"), rows_with_both_separators())
def test_image_setting_is_set(read: Read, written: str, name: str, text: str, value: Any) -> None:
    others = "" if name in ("linux", "initrd") else "linux = /l\ninitrd = /i\n"
    missing = {"linux": "initrd = /i\n", "initrd": "linux = /l\n"}.get(name, "")
    image = read(f"[x]\n{others}{missing}{written} = {text}\n").image("x", {})
    assert getattr(image, name) == value
    default = getattr(read("[x]\nlinux = /l2\ninitrd = /i2\n").image("x", {}), name)
    # There is one source, which is the default.
    assert (default == value) == (name == "source")


@pytest.mark.parametrize("separator", "_-")
@pytest.mark.parametrize(("name", "row"), UPLOAD_ROWS.items())
def test_upload_setting_is_set(read: Read, separator: str, name: str, row: tuple[str, Any]) -> None:
    takes = any(name.replace("_", "-") in upload.KEYS for upload in UPLOADS.values())
    texts = {"upload_type": "http" if takes else "rsync", "upload_target": "/srv", "upload_args": "-v"} | {name: row[0]}
    lines = [f"{key.replace('_', separator)} = {text}\n" for key, text in texts.items()]
    destination = read("[up]\n" + "".join(lines)).destination("up", "x.raw", named_by="x")
    field = {"upload_args": "arguments"}.get(name, name.removeprefix("upload_"))
    assert getattr(destination, field) == row[1]


def test_defaults(read: Read) -> None:
    image = read(MINIMAL).image("x", {})
    assert image == ImageSettings(
        source="installer",
        source_image=None,
        bootstrap=None,
        source_image_sha256=None,
        capture_from=None,
        capture_mounts=(),
        work_in_memory="auto",
        cache_tree=False,
        elements=(),
        elements_path=(),
        element_environment=(),
        element_timeout=7200.0,
        skip_base=False,
        extra_packages=(),
        layout=None,
        filesystem=None,
        root_label=None,
        mkfs_options=(),
        extra_size=None,
        linux=Source("/boot/linux", Path("/boot/linux")),
        initrd=Source("/boot/initrd", Path("/boot/initrd")),
        append="",
        answer_files=(),
        cores=1,
        ram=1 << 30,
        image_size=2 << 30,
        image_name="${image}-${date}",
        replace="yes",
        keep=None,
        checksums=("sha256",),
        target=(),
        format=("raw",),
        cache_dir=Path("/var/cache/image-factory"),
        installer_logs=False,
        log_file=False,
        output_dir=Path("."),
        mount_via="auto",
        require_single_partition=False,
        audit=False,
        audit_skip=(),
        seal=False,
        seal_only=(),
        seal_skip=(),
        copy=(),
        first_boot=(),
        keep_raw=False,
        tar_exclude=(),
        compression="zstd",
        arch=default_arch(),
        firmware=default_firmware(default_arch()),
        cpu=None,
        virt_type="auto",
        network="user,model=virtio",
        max_parallel=None,
        install_timeout=None,
        stall_timeout=None,
        test_boot=False,
        test_script=None,
        test_boot_timeout=None,
        test_boot_matrix=(),
        kernel_errors_allowed=(),
        tasks=(),
        tasks_after_cleaning=(),
        tasks_via="auto",
        tasks_network=True,
        manifest=False,
        manifest_text=None,
        provenance=False,
        sign_key=None,
        upload_destinations=(),
        post_build_command=(),
        installer_image=None,
        linux_sha256=None,
        initrd_sha256=None,
        installer_image_sha256=None,
        verify="auto",
        keyring=None,
        offline=False,
        preseed=None,
        kickstart=None,
        yast=None,
        autoinstall=None,
        agama=None,
        distribution=None,
        release=None,
        mac=None,
        log_filename=None,
        vnc=None,
        osinfo=None,
    )


@pytest.mark.parametrize(("arch", "firmware"), [("x86_64", "bios"), ("aarch64", "uefi")])
def test_default_firmware(read: Read, arch: str, firmware: str) -> None:
    assert read(f"{MINIMAL}arch = {arch}\n").image("x", {}).firmware == firmware


def test_default_cache_of_an_ordinary_user_is_below_the_home_directory() -> None:
    program = (
        f"import os, sys; sys.path.insert(0, {str(REPOSITORY)!r}); import image_factory.configuration.settings as s; "
        "os.setuid(65534); print(s.default_cache_dir(), s.parse_path(s.default_cache_dir()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"HOME": "/home/u"}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "~/.cache/image-factory /home/u/.cache/image-factory\n"


# Parsers.

GOOD: list[tuple[str, str, Any]] = [
    ("linux", "rsync://example.com/pub/linux", Source("rsync://example.com/pub/linux")),
    ("linux", "HTTPS://example.com:8443/linux", Source("HTTPS://example.com:8443/linux")),
    ("linux", "http://[::1]:8080/linux", Source("http://[::1]:8080/linux")),
    ("linux", "http://a/linux http://b/linux", Source("http://a/linux", None, ("http://b/linux",))),
    ("linux", "http://a/linux,\n  rsync://b/c/linux", Source("http://a/linux", None, ("rsync://b/c/linux",))),
    ("linux", "http://a/linux http://a/linux", Source("http://a/linux")),
    ("linux", "file:/boot/linux", Source("file:/boot/linux", Path("/boot/linux"))),
    ("linux", "file://localhost/boot/linux", Source("file://localhost/boot/linux", Path("/boot/linux"))),
    ("linux", "netboot/linux", Source("netboot/linux", Path("netboot/linux"))),
    ("linux", "/with blank#and?more", Source("/with blank#and?more", Path("/with blank#and?more"))),
    ("linux", "~/linux", Source("~/linux", Path("/home/tester/linux"))),
    ("preseed", "~/debian.cfg", Path("/home/tester/debian.cfg")),
    ("cores", " 16 ", 16),
    ("cores", "9999", 9999),
    ("ram", "1M", 1 << 20),
    ("ram", "1073741824", 1 << 30),
    ("format", "raw", ("raw",)),
    ("format", "qcow2,qcow2,raw", ("qcow2", "raw")),
    ("format", "raw,", ("raw",)),
    ("keep-raw", "YES", True),
    ("keep-raw", "false", False),
    ("keep-raw", "off", False),
    ("keep-raw", "0", False),
    ("vnc", "localhost", ("localhost", None)),
    ("vnc", "0.0.0.0:0", ("0.0.0.0", 0)),
    ("vnc", ":1", ("", 1)),
    ("vnc", "[::1]:1", ("::1", 1)),
    ("vnc", "localhost:59635", ("localhost", 59635)),
    ("compression", "NONE", "none"),
    ("virt-type", "Auto", "auto"),
    *(("arch", text, "x86_64") for text in ("x86_64", "amd64", "i386", "i686")),
    ("arch", "arm64", "aarch64"),
    *(("stall-timeout", text, 90.0) for text in ("90", "1m30s", "1M 30S")),
    ("stall-timeout", "None", math.inf),
    ("install-timeout", "1d", 86400.0),
    ("max-parallel", "Auto", None),
    ("max-parallel", "1", 1),
    *(("max-parallel", text, math.inf) for text in ("none", "0")),
    ("virt-type", "kvm", "kvm"),
    ("upload-destinations", "", ()),
    ("upload-destinations", " , ", ()),
    ("post-build-command", "", ()),
    ("log-filename", "/var/log/x.log", Path("/var/log/x.log")),
]

URI_FORMS = "only a path, or a URI that begins with file:, http://, https:// or rsync://"
DURATION_FORMS = "only a time above zero such as 90s"
SIZE_FORMS = "only a size above zero such as 2G"
BOOLEANS = "only yes, no, true, false, on, off, 1 or 0"
MAC = "only a unicast MAC address such as 52:54:00:12:34:56"
VNC = "only HOST:DISPLAY with a display from 0 to 59635, or HOST"
FORMATS = f"only {' or '.join(OUTPUTS)}, or several with commas"
COUNT = "only a whole number from 1 to 9999"
ANSWER = "only a path whose last part has only letters, digits and . _ + -"

BAD: list[tuple[str, str, str]] = [
    *(
        ("linux", text, URI_FORMS)
        for text in (
            "",
            "ftp://example.com/linux",
            "http:///linux",
            "http://example.com",
            "http://example.com/",
            "https:linux",
            "http://[::1/linux",
            "http://example.com:port/linux",
            "http://example.com:99999/linux",
            "http://example.com/a b",
            "rsync://example.com",
            "file://example.com/linux",
            "file:",
            "//example.com/linux",
            "example.com:linux",
            "/a\0b",
        )
    ),
    *(("preseed", text, ANSWER) for text in ("/srv/a b", "/srv/a,b", "/", "/srv/..", "/srv/-a", "/srv/'a'")),
    ("preseed", "", "only a path"),
    ("cache_dir", "", "only a path"),
    ("output-dir", " ", "only a path"),
    *(("log-filename", text, "only the name of a file") for text in ("logs/", "..", "/", ".")),
    *(("cores", text, COUNT) for text in ("0", "-1", "1.5", "two", "", "10000", "0x2")),
    *(("ram", text, SIZE_FORMS) for text in ("-1G", "0", "much", "")),
    *(("ram", text, "only a size of at least 1 MiB") for text in ("1", "4", "1023K")),
    *(("image_size", text, "only a size of at least 1 MiB") for text in ("2", "1048575", "1K")),
    *((key, "10", "only a time with its unit such as 90s") for key in ("install-timeout", "stall-timeout")),
    ("test-boot-timeout", "5", "only a time with its unit such as 90s"),
    *(
        (key, text, "only a value that virt-install takes")
        for key in ("osinfo", "cpu", "network")
        for text in ("", "-x")
    ),
    *(("image_size", text, SIZE_FORMS) for text in ("-1G", "0", "G", "1e9", "2 GX", "", "0.0000001K", "9E")),
    *(("format", text, FORMATS) for text in ("zip", "raw,zip", "", ",", "raw qcow2", "RAW")),
    *(
        ("mac", text, MAC)
        for text in ("", "52:54:00:12:34", "52:54:00:12:34:5g", "52-54-00-12-34-56", "01:00:5e:00:00:01", "RANDOM")
    ),
    *(("installer-logs", text, BOOLEANS) for text in ("", "maybe", "2", "y")),
    ("log-file", "sometimes", BOOLEANS),
    ("keep-raw", "-", BOOLEANS),
    ("compression", "xz", "only zstd, zlib or none"),
    ("virt-type", "xen", "only auto, kvm or qemu"),
    *(("arch", text, "only x86_64, aarch64, armhf, ppc64el") for text in ("", "vax", "x86-64")),
    *(("max-parallel", text, "only auto, none or a whole number") for text in ("", "-1", "1.5", "all", "10000")),
    *(
        (
            "test-boot-matrix",
            text,
            "only virtio-scsi virtio-blk nvme sata usb, bios uefi secure-boot, virtio-net e1000e, no-tpm tpm",
        )
        for text in ("ide", "nvme, uefi floppy", "nvme; sata")
    ),
    ("kernel-errors-allowed", "(", "only regular expressions, one a line"),
    ("test-script", "checks/", "only the name of a file"),
    ("firmware", "efi", "only bios, uefi or hybrid"),
    *(("install-timeout", text, DURATION_FORMS) for text in ("", "0", "-1s", "2 hours", "1m1h", "1.5h", "never")),
    *(
        ("vnc", text, VNC)
        for text in ("", ":", "localhost:", "localhost:x", "localhost:-1", "localhost:59636", "a b:1")
    ),
    ("post-build-command", "notify 'me", "only words as a shell has them (no closing quotation)"),
]


@pytest.mark.parametrize(("key", "text", "value"), GOOD)
def test_value_is_read(read: Read, monkeypatch: pytest.MonkeyPatch, key: str, text: str, value: Any) -> None:
    monkeypatch.setenv("HOME", "/home/tester")
    others = "linux = /l\ninitrd = /i\n" if key != "linux" else "initrd = /i\n"
    image = read(f"[x]\n{others}{key} = {text}\n").image("x", {})
    assert getattr(image, key.replace("-", "_")) == value


@pytest.mark.parametrize(("key", "text", "accepted"), BAD)
def test_bad_value_names_section_key_value_and_what_is_accepted(read: Read, key: str, text: str, accepted: str) -> None:
    others = "linux = /l\ninitrd = /i\n" if key != "linux" else "initrd = /i\n"
    configuration = read(f"[x]\n{others}{key} = {text}\n")
    message = error_of(lambda: configuration.image("x", {})).message
    assert message.startswith(f"[x] {key.replace('_', '-')}: {text.strip()!r} is not accepted, {accepted}")


@pytest.mark.parametrize(
    ("key", "flag"), [(key, each.flags[-1]) for key, each in declared(ImageSettings) if each.metavar]
)
def test_bad_flag_names_the_flag(read: Read, key: str, flag: str) -> None:
    configuration = read(MINIMAL)
    # A flag can take the targets of the files away.
    text = "?" if key == "target" else ""
    error = error_of(lambda: configuration.image("x", {key: text}))
    assert error.message.startswith(f"{flag}: {text!r} is not accepted, only ")


# Of the others any text is accepted, but for what no argument of a program can have.
ABSURD = {
    "source": "installers", "source-image": "ftp://a/b", "source-image-sha256": "abc",
    "capture-from": "http://a", "capture-mounts": "var",
    "work-in-memory": "maybe", "cache-tree": "maybe",
    "elements": "a/b",
    "elements-path": "\0", "element-environment": "A", "element-timeout": "2", "skip-base": "maybe",
    "extra-packages": "--force",
    "bootstrap": "a b", "layout": "raid", "filesystem": "a b",
    "root-label": "a/b", "mkfs-options": "'",
    "extra-size": "0",
    "linux": "ftp://a/b", "initrd": "ftp://a/b", "installer-image": "ftp://a/b", "linux-sha256": "abc",
    "initrd-sha256": "abc", "installer-image-sha256": "abc", "verify": "maybe", "keyring": "", "offline": "maybe",
    "preseed": "a b", "kickstart": "a b", "yast": "a b", "autoinstall": "a b", "agama": "a.yaml", "cores": "none",
    "ram": "4", "image-size": "2", "target": "moon", "format": "zip", "mac": "a", "cache-dir": "",
    "installer-logs": "maybe", "log-file": "maybe", "log-filename": "a/", "output-dir": "", "mount-via": "nbd",
    "require-single-partition": "maybe", "answer-files": "a:/b", "audit": "maybe", "copy": "a", "first-boot": "a b",
    "image-name": "a/b", "replace": "maybe", "keep": "0", "checksums": "sha1",
    "seal": "maybe", "keep-raw": "maybe", "tar-exclude": "a\tb", "compression": "xz", "vnc": "a b", "osinfo": "",
    "arch": "vax", "firmware": "efi", "cpu": "", "virt-type": "xen", "network": "", "max-parallel": "-1",
    "install-timeout": "2", "stall-timeout": "2", "test-boot": "maybe", "test-script": "a/", "test-boot-timeout": "2",
    "test-boot-matrix": "ide",
    "kernel-errors-allowed": "(", "manifest": "maybe", "manifest-text": "a/b", "provenance": "maybe", "sign-key": "",
    "post-build-command": "'a",
    "upload-type": "ftp", "upload-target": "", "upload-args": "'a", "upload-formats": "zip",
    "upload-method": "get", "upload-headers": "X", "upload-credentials": "", "upload-tls": "sha256//x",
    "upload-verify": "maybe", "upload-index": "maybe", "upload-keep": "0", "tasks-via": "ssh", "tasks-network": "maybe",
    "task-type": "ftp", "task-copy": "a", "task-allow-failure": "maybe",
    "task-file": "", "task-packages": "nginx --force", "task-args": "'a", "task-environment": "1=2",
    "task-secrets": "", "task-timeout": "2", "task-retries": "-1", "task-reboot": "maybe",
}  # fmt: skip
ANY_TEXT = {
    "distribution", "release", "append", "audit-skip", "seal-only", "seal-skip", "upload-destinations", "tasks",
    "tasks-after-cleaning", "task-command",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "declaration"),
    [*declared(ImageSettings), *declared(TaskSettings), *declared(UploadSettings)],
    ids=lambda each: str(each)[:30],
)
def test_every_setting_refuses_something(key: str, declaration: Declaration) -> None:
    assert (key in ABSURD) != (key in ANY_TEXT)
    error = error_of(lambda: configuration_files._parsed(key, ABSURD.get(key, "\0"), declaration.parse))
    assert "is not accepted, only " in error.message


@pytest.mark.parametrize(
    "line",
    ["a", "a:b", "a:", ":/b", "a:/b:web", "a:/b:web:", "a:/b:web:web:", "a:/b:web:web:888", "a:/b:web:web:07777",
     "a:/b:0644", "a:/b:we b:x", "a:/b/../c", "a:/./b", "a:/b:web:web:0644:x", "a:/b:-1:0", "a:/b\0"],
)  # fmt: skip
def test_copy_of_another_form(read: Read, line: str) -> None:
    error = error_of(lambda: read(f"{MINIMAL}copy = a:/b\n  {line}\n").image("x", {}))
    assert "is not accepted, only SOURCE:DESTINATION, " in error.message
    assert error.hint == "A destination is absolute and has no . and .. in it; a mode is octal, such as 0644."


def test_more_scripts_than_numbers(read: Read) -> None:
    names = ",".join(f"s{number}" for number in range(100))
    error = error_of(lambda: read(f"{MINIMAL}first-boot = {names}\n").image("x", {}))
    assert error.message.endswith("is not accepted, only at most 99 paths.")


@pytest.mark.parametrize(("text", "meant"), [("2", "2G"), ("63", "63G"), ("64", "64M"), ("1024", "1024M")])
def test_size_without_its_unit(read: Read, text: str, meant: str) -> None:
    error = error_of(lambda: read(f"{MINIMAL}ram = {text}\n").image("x", {}))
    assert error.hint == f"{text} is {text} bytes. Did you mean {meant}?"


@pytest.mark.parametrize("name", ["a", "Debian-13-server", "_x", "a.b_c+d~e@f-1", "9", "a" * 200])
def test_image_name(name: str) -> None:
    check_image_name(name)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "-a", ".a", "..", "a" * 201, "a" * 300, "ä", "a\n", "a:b", "a,b"])
def test_bad_image_name(name: str) -> None:
    error = error_of(lambda: check_image_name(name))
    assert error.message.endswith("is no image name.")
    assert len(error.message) < 100


# Files and flags.


def test_later_files_win_and_flags_win_over_files(files: tuple[Path, Path]) -> None:
    shipped = Configuration({}).image(SHIPPED_IMAGE, {})
    system, user = files
    system.write_text(f"[{SHIPPED_IMAGE}]\nram = 2G\nCores = 3\n")
    assert Configuration({}).files == [find_data_dir() / "image-factory.conf", system]
    assert Configuration({}).image(SHIPPED_IMAGE, {}).ram == 2 << 30
    user.write_text(f"[{SHIPPED_IMAGE}]\nram = 3G\nimage_size = 5G\n")
    both = Configuration({})
    assert both.files[1:] == [system, user]
    image = both.image(SHIPPED_IMAGE, {"image-size": "7G", "format": "raw"})
    assert (image.ram, image.cores, image.image_size, image.format) == (3 << 30, 3, 7 << 30, ("raw",))
    assert image.linux == shipped.linux


def test_variable_of_a_later_file_changes_an_earlier_one(files: tuple[Path, Path]) -> None:
    files[1].write_text("[DEFAULT]\ndebian-mirror = http://mirror.example.com/debian\n")
    linux = Configuration({}).image(SHIPPED_IMAGE, {}).linux
    assert linux is not None
    assert linux.uri.startswith("http://mirror.example.com/debian/dists/trixie/")


def test_dash_and_underscore_are_the_same_between_files(files: tuple[Path, Path]) -> None:
    files[0].write_text(f"[{SHIPPED_IMAGE}]\nimage-size = 3G\n")
    files[1].write_text(f"[{SHIPPED_IMAGE}]\nimage_size = 4G\n")
    assert Configuration({}).image(SHIPPED_IMAGE, {}).image_size == 4 << 30


@pytest.mark.parametrize("reference", ["my_var", "my-var", "MY_VAR", "DEFAULT:my_var", "x:my-var"])
def test_dash_and_underscore_are_the_same_in_references(read: Read, reference: str) -> None:
    image = read(f"[DEFAULT]\nmy_var = quiet\n{MINIMAL}append = ${{{reference}}}\n").image("x", {})
    assert image.append == "quiet"


def test_named_file_replaces_all(files: tuple[Path, Path], tmp_path: Path) -> None:
    files[0].write_text("[system]\nlinux = /l\n")
    (tmp_path / "own.conf").write_text(MINIMAL)
    configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "own.conf")})
    assert configuration.images() == ["x"]
    assert configuration.files == [tmp_path / "own.conf"]


def test_empty_variable_names_no_file(files: tuple[Path, Path]) -> None:
    assert Configuration({"IMAGE_FACTORY_CONFIG": ""}).images()[0] == SHIPPED_IMAGE


def test_named_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "absent.conf"
    message = error_of(lambda: Configuration({"IMAGE_FACTORY_CONFIG": str(path)})).message
    assert message == (
        f"Can't read the configuration {path} (named by IMAGE_FACTORY_CONFIG): No such file or directory."
    )


def test_named_file_that_is_a_directory(tmp_path: Path) -> None:
    message = error_of(lambda: Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path)})).message
    assert message.endswith("Is a directory.")


def test_link_to_nowhere_is_no_missing_file(files: tuple[Path, Path]) -> None:
    files[1].symlink_to("nowhere")
    assert str(files[1]) in error_of(lambda: Configuration({})).message


def test_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.conf"
    path.write_text(MINIMAL)
    path.chmod(0)
    # The directories above are root's alone, so the child reaches the file from inside.
    tmp_path.chmod(0o711)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(tmp_path)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            Configuration({"IMAGE_FACTORY_CONFIG": path.name})
        except ConfigurationError as error:
            status = 0 if f"{path.name} (named by IMAGE_FACTORY_CONFIG): Permission denied." in error.message else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_user_without_a_home_directory() -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "image-factory", "--list"],
        env={"PATH": os.environ["PATH"]},
        user=54321,
        group=54321,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert SHIPPED_IMAGE in done.stdout.split()


def test_data_dir(read: Read) -> None:
    image = read(f"{MINIMAL}preseed = ${{data_dir}}/a.cfg\nkickstart_dir = ${{data-dir}}\n").image("x", {})
    assert image.preseed == find_data_dir() / "a.cfg"
    assert (find_data_dir() / "image-factory.conf").is_file()


def test_data_dir_can_be_set(read: Read) -> None:
    image = read(f"[DEFAULT]\ndata_dir = /srv\n{MINIMAL}preseed = ${{data_dir}}/a.cfg\n").image("x", {})
    assert image.preseed == Path("/srv/a.cfg")


def test_data_dir_with_a_dollar_sign(tmp_path: Path) -> None:
    """The program in a directory whose name would be a reference."""
    place = tmp_path / "a${b}$c"
    place.mkdir()
    subprocess.run(["cp", "-r", REPOSITORY / "image_factory", REPOSITORY / "data", place], check=True)
    (tmp_path / "own.conf").write_text(f"{MINIMAL}preseed = ${{data_dir}}/a.cfg\n")
    program = (
        "import os; from image_factory.configuration.files import Configuration;"
        "print(Configuration(os.environ).image('x', {}).preseed)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=place,
        env={"IMAGE_FACTORY_CONFIG": str(tmp_path / "own.conf"), "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{place}/data/a.cfg\n"


@pytest.mark.parametrize("place", ["share/image-factory", "lib/python3/dist-packages"])
def test_data_dir_below_the_prefix(tmp_path: Path, place: str) -> None:
    package = tmp_path / "usr" / place
    package.mkdir(parents=True)
    subprocess.run(["cp", "-r", REPOSITORY / "image_factory", package], check=True)
    (tmp_path / "usr/share/image-factory").mkdir(parents=True, exist_ok=True)
    program = "from image_factory.base.files import find_data_dir; print(find_data_dir())"
    argv = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(package)}
    missing = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "ConfigurationError: The shipped image-factory.conf isn't installed" in missing.stderr
    (tmp_path / "usr/share/image-factory/image-factory.conf").touch()
    found = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout == f"{tmp_path}/usr/share/image-factory\n"


def test_images_are_the_sections_that_can_be_installed(read: Read) -> None:
    text = """
        [DEFAULT]
        mirror = http://example.com
        [b]
        linux = /l
        [up]
        upload_type = rsync
        linux = /l
        [a]
        installer-image = /a.iso
        [variables]
        dist = trixie
        [c]
        initrd = ${unknown}
    """
    assert read("\n".join(line.strip() for line in text.splitlines())).images() == ["b", "a", "c"]


def test_unknown_image_has_near_names(read: Read) -> None:
    configuration = read("[Debian-12]\nlinux = /l\n[Debian-13]\nlinux = /l\n[Fedora]\nlinux = /l\n")
    error = error_of(lambda: configuration.image("debian-13", {}))
    assert error.message.startswith("No image 'debian-13' is configured in ")
    assert error.hint == "Did you mean Debian-13 or Debian-12? 'image-factory --list' lists them all."
    assert (
        error_of(lambda: configuration.image("zzz", {})).hint == "'image-factory --list' lists the configured images."
    )
    assert error_of(lambda: configuration.image("DEFAULT", {})).message.startswith("No image 'DEFAULT'")


# Mistakes in the text.


def unused(
    configuration: Configuration, *destinations: str, asked: str | dict[str, str] = "", image: str = "x"
) -> list[str]:
    """Return what is told of the keys, where templates, or those with these names, ask for what is *asked*."""

    def template_keys(path: Path) -> set[str]:
        of_it = asked[path.name] if isinstance(asked, dict) else asked
        return {*of_it.split()} if path.suffix == ".j2" else set()

    with pytest.MonkeyPatch.context() as patch:
        of_installer = dataclasses.replace(sources.SOURCES["installer"], template_keys=template_keys)
        patch.setitem(sources.SOURCES, "installer", of_installer)
        return unused_keys(configuration, image, destinations)


NEAR_MISSES = {
    "upload_destination": "upload-destinations",
    "imagesize": "image-size",
    "keepraw": "keep-raw",
    "post-build-comand": "post-build-command",
    "pressed": "preseed",
    "pakages": "packages",
    "package": "packages",
    "kernel_argument": "kernel-arguments",
    "linux@aarch46": "linux",
}


@pytest.mark.parametrize(("written", "meant"), NEAR_MISSES.items())
def test_near_miss_of_a_key_is_told(read: Read, written: str, meant: str) -> None:
    configuration = read(f"{MINIMAL}kickstart = a.ks.j2\n{written} = x\n")
    shown = written.replace("_", "-")
    assert unused(configuration, asked="packages kernel-arguments") == [
        f"[x] {shown}: nothing uses this key. Did you mean {meant}?"
    ]


def test_keys_that_are_used_are_not_told(read: Read) -> None:
    text = (
        "[DEFAULT]\nshared = 1\nother = ${y:there}\n"
        f"{MINIMAL}dist = trixie\nlinux@aarch64 = ${{dist}}\nappend = ${{My-Key}} ${{other}}\nmy_key = a\nfound = b\n"
        "preseed = a.j2\nseen = c\nmy_key@arm64 = d\n"
        "[y]\nlinux = ${x:seen}\ninitrd = ${shared}\nthere = 1\n"
    )
    assert unused(read(text), asked="found") == []


def test_keys_of_elements_are_used_where_there_are_elements(read: Read) -> None:
    text = "[DEFAULT]\nDIB_RELEASE = trixie\n[x]\nsource = elements\nelements = a\nDIB_NOTE = 1\n"
    assert unused(read(text)) == []
    told = unused(read(f"[DEFAULT]\nDIB_RELEASE = trixie\n{MINIMAL}DIB_NOTE = 1\n"))
    assert [each.split(":")[0] for each in told] == ["[x] dib-note", "[DEFAULT] dib-release"]


def test_keys_that_nothing_uses_are_told(read: Read) -> None:
    text = f"[DEFAULT]\ncolour = red\n{MINIMAL}dist = trixie\nlinux2@arm64 = $${{dist}}\n"
    assert unused(read(text)) == [
        "[x] dist: nothing uses this key. Remove it, or name it in a value: ${dist}.",
        "[x] linux2@arm64: nothing uses this key. Did you mean linux?",
        "[DEFAULT] colour: nothing uses this key. Remove it, or name it in a value: ${colour}.",
    ]


def test_keys_of_a_template_beside_a_plain_answer_file_are_told(read: Read) -> None:
    text = f"{MINIMAL.replace('[x]', '[base]')}kickstart = a.ks.j2\nlocale = a\n[x]\nbased_on = base\n"
    assert unused(read(f"{text}kickstart = b.ks.j2\n"), asked="locale") == []
    told = (
        "nothing uses this key, as own.ks is no template. "
        "Write it into the answer file, or call that own.ks.j2 and use the key there."
    )
    assert unused(read(f"{text}kickstart = own.ks\npackages = b\n"), asked="locale") == [
        f"[x] packages: {told}",
        f"[base] locale: {told}",
    ]


def test_keys_of_templates_that_are_copied_are_used(read: Read, tmp_path: Path) -> None:
    (tmp_path / "site/sub").mkdir(parents=True)
    (tmp_path / "site/sub/a.j2").write_text("{{ host_name }}")
    (tmp_path / "b.j2").write_text("#!/bin/sh\n{{ domain }}")
    text = (
        f"{MINIMAL}copy = {tmp_path}/site/:/etc\nfirst-boot = {tmp_path}/b.j2\nhost-name = a\ndomain = b\nthird = c\n"
    )
    assert unused(read(text)) == ["[x] third: nothing uses this key. Remove it, or name it in a value: ${third}."]


def test_keys_of_the_section_that_one_is_based_on_are_told(read: Read) -> None:
    """But not those that its own answer file asks for."""
    configuration = read(
        f"{MINIMAL.replace('[x]', '[base]')}preseed = base.j2\nof_base = 1\nof_none = 2\n"
        "[x]\nbased_on = base\npreseed = x.j2\n"
    )
    assert unused(configuration, asked={"base.j2": "of-base", "x.j2": "of-x"}) == [
        "[base] of-none: nothing uses this key. Remove it, or name it in a value: ${of-none}."
    ]


def test_shipped_keys_are_not_told(files: tuple[Path, Path]) -> None:
    """No one can change them."""
    files[1].write_text("[x]\nbased_on = Fedora-44-minimal\nkickstart = own.ks\n")
    assert unused(Configuration({})) == []


def test_section_that_nothing_uses_is_told(read: Read) -> None:
    text = (
        "[Debian-13-web]\nlinux = /l\ninitrd = /i\n[Debian-13-wbe]\nram = 2G\n[Debian-13-base]\nram = 2G\n"
        "[z]\nram = 2G\n[other]\nlinux = ${Debian-13-base:ram}\n"
    )
    assert unused(read(text), image="Debian-13-web") == [
        "[Debian-13-wbe]: nothing uses this section, as it has no installer or image or bootstrap or elements "
        "or capture. "
        "Did you mean [Debian-13-web]?"
    ]


def test_near_miss_in_an_upload_section(read: Read) -> None:
    text = (
        "[up]\nupload_type = rsync\nupload_target = ${host}:/srv\nhost = a\nupload_arg = -v\n"
        "post_upload_command7 = true\n"
    )
    assert unused(read(MINIMAL + text), "up", "up") == [
        "[up] upload-arg: nothing uses this key. Did you mean upload-args?"
    ]


ARCHITECTURES = {
    "plain": ("arch = x86_64\nkey = a\nkey@aarch64 = b", "a"),
    "other": ("arch = aarch64\nkey = a\nkey@aarch64 = b", "b"),
    "another name": ("arch = arm64\nkey = a\nkey@aarch64 = b", "b"),
    "another name of the suffix": ("arch = amd64\nkey = a\nkey@X86_64 = b", "b"),
    "a variable": ("arch = ${mine}\nmine = arm64\nkey = a\nkey@arm64 = b", "b"),
    "of the base": ("based_on = base\narch = aarch64", "base-b"),
    "base of another architecture": ("based_on = arm\narch = x86_64", "base-a"),
    "own wins": ("based_on = base\narch = aarch64\nkey = a", "a"),
    "of the defaults": ("arch = aarch64\nkey = ${general}", "arm"),
    "own wins over the defaults": ("arch = aarch64\nkey = ${general}\ngeneral = own", "own"),
}


@pytest.mark.parametrize(("text", "expected"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_keys_of_an_architecture(read: Read, text: str, expected: str) -> None:
    general = "[DEFAULT]\ngeneral = all\ngeneral@aarch64 = arm\n"
    base = "[base]\nlinux = /l\ninitrd = /i\nkey = base-a\nkey@aarch64 = base-b\n[arm]\nbased_on = base\narch = arm64\n"
    image = read(f"{general}{base}[x]\nlinux = /l\ninitrd = /i\nappend = ${{key}}\n{text}\n").image("x", {})
    assert image.append == expected


@pytest.mark.parametrize("section", ["DEFAULT", "x"])
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", "shipped-arm"),
        ("other = mine", "shipped-arm"),
        ("key = mine", "mine"),
        ("Key = mine\nkey@x86_64 = pc", "mine"),
        ("key = mine\nkey@arm64 = mine-arm", "mine-arm"),
        ("key@arm64 = mine-arm", "mine-arm"),
    ],
)
def test_key_of_a_later_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, lines: str, expected: str
) -> None:
    """It wins over that for an architecture in an earlier one, which is the shipped one most often."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "image-factory.conf").write_text(
        f"[x]\nlinux = /l\ninitrd = /i\narch = aarch64\nappend = ${{key}}\n"
        f"[{section}]\nkey = shipped\nkey@aarch64 = shipped-arm\n".replace("[x]\nkey", "key")
    )
    (tmp_path / "own.conf").write_text(f"[{section}]\n{lines}\n")
    monkeypatch.setattr(configuration_files, "find_data_dir", lambda: shipped)
    monkeypatch.setattr(configuration_files, "SYSTEM_FILE", tmp_path / "none")
    monkeypatch.setattr(configuration_files, "USER_FILE", str(tmp_path / "own.conf"))
    assert Configuration({}).image("x", {}).append == expected


def test_wrong_architecture_is_told_once(read: Read) -> None:
    configuration = read(f"{MINIMAL}arch = arm46\nappend@arm64 = a\n")
    error = error_of(lambda: configuration.image("x", {}))
    assert error.message == "[x] arch: 'arm46' is not accepted, only x86_64, aarch64, armhf, ppc64el, riscv64, s390x."
    assert error.hint == "Did you mean arm64?"


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "http://a/dists/trixie/main/installer-amd64/current/images/linux": {"x86_64"},
        "https://a/releases/44/Everything/aarch64/os/vmlinuz": {"aarch64"},
        "/srv/ubuntu-26.04-live-server-arm64.iso": {"aarch64"},
        "/srv/installer-riscv64/linux": {"riscv64"},
        "/srv/linux_amd64.x86_64": {"x86_64"},
        "/boot/linux": set(),
        "/srv/farm64/x": set(),
    }.items(),
)
def test_named_architectures(text: str, expected: set[str]) -> None:
    assert named_architectures(text) == expected


INTERPOLATIONS = [
    ("${unknown}", "[x] append: ${unknown} is not defined.", "Define unknown in [x] or [DEFAULT]"),
    ("${nowhere:key}", "[x] append: ${nowhere:key} is not defined.", "Define"),
    ("${x:unknown}", "[x] append: ${x:unknown} is not defined.", "Define"),
    ("${append}", "[x] append: its ${...} go round in a circle.", ""),
    ("${other}\nother = ${append}", "[x] append: its ${...} go round in a circle.", ""),
    ("5$", "[x] append: '5$' has a '$' that begins no ${...}.", "Write $$"),
    ("$6$salt$hunter2", "[x] append: what is there has a '$' that begins no ${...}.", "Write $$"),
    ("$HOME", "[x] append: '$HOME' has a '$' that begins no ${...}.", "Write $$"),
    ("${HOME", "[x] append: '${HOME' has a '$' that begins no ${...}.", "Write $$"),
]


@pytest.mark.parametrize(("text", "message", "hint"), INTERPOLATIONS)
def test_interpolation_error(read: Read, text: str, message: str, hint: str) -> None:
    configuration = read(f"{MINIMAL}append = {text}\n")
    error = error_of(lambda: configuration.image("x", {}))
    assert error.message == message
    assert (error.hint or "").startswith(hint)


def test_two_dollar_signs_are_one(read: Read) -> None:
    assert read(f"{MINIMAL}append = a=$$b$${{c}}\n").image("x", {}).append == "a=$b${c}"


def test_percent_sign_is_nothing_special(read: Read) -> None:
    assert read(f"{MINIMAL}append = a=%(b)s %%\n").image("x", {}).append == "a=%(b)s %%"


def test_mistake_in_another_section_doesnt_matter(read: Read) -> None:
    assert read(f"{MINIMAL}[y]\nlinux = ${{unknown}}\nram = much\n").image("x", {}).ram == 1 << 30


SYNTAX: list[tuple[str | bytes, str]] = [
    ("[x]\nlinux\n", ", line 2 is neither a [section] nor KEY = VALUE."),
    ("[x]\n= /l\n", ", line 2 is neither a [section] nor KEY = VALUE."),
    ("linux = /l\n", ", line 1 comes before any [section]."),
    ("[x\nlinux = /l\n", ", line 1 comes before any [section]."),
    ("[x]\nlinux = /l\n\n[x]\n", ", line 4: section [x] is there twice."),
    ("[x]\nimage-size = 1G\nimage_size = 2G\n", ", line 3: [x] has 'image-size' twice."),
    ("[x]\nLinux = 1G\nlinux = 2G\n", ", line 3: [x] has 'linux' twice."),
    (b"[x]\nappend = caf\xe9\n", ", line 2: byte 0xe9 is not UTF-8."),
    (b"# comment\n" * 5000 + b"\xe9\n", ", line 5001: byte 0xe9 is not UTF-8."),
    (b"\xef\xbb\xbf[x]\n# \xff\n", ", line 2: byte 0xff is not UTF-8."),
    ("[x]\n".encode("utf-16"), ", line 1: byte 0xff is not UTF-8."),
]


@pytest.mark.parametrize(("text", "message"), SYNTAX, ids=[message for _, message in SYNTAX])
def test_syntax_error_names_file_and_line(read: Read, tmp_path: Path, text: str | bytes, message: str) -> None:
    error = error_of(lambda: read(text))
    assert error.message == f"{tmp_path}/test.conf (named by IMAGE_FACTORY_CONFIG){message}"
    if "UTF-8" in message:
        assert error.hint == f"Convert it: iconv -f latin1 -t utf-8 {shlex.quote(f'{tmp_path}/test.conf')}"


def test_byte_order_mark_and_line_ends_of_windows(read: Read) -> None:
    text = ("\ufeff" + MINIMAL + "append = a\n  b\ncores = 2\n").replace("\n", "\r\n")
    image = read(text.encode()).image("x", {})
    assert (image.append, image.cores, image.linux) == ("a b", 2, Source("/boot/linux", Path("/boot/linux")))


SOURCES = [
    ("", "[x] lacks 'linux' and 'initrd'. They are the URIs of the netboot kernel and initrd."),
    ("linux = /l", "[x] lacks 'initrd'. It is the URI of the netboot initrd."),
    ("initrd = /i", "[x] lacks 'linux'. It is the URI of the netboot kernel."),
]


@pytest.mark.parametrize(("text", "message"), SOURCES)
def test_missing_installer(read: Read, text: str, message: str) -> None:
    configuration = read(f"[x]\n{text}\n")
    error = error_of(lambda: configuration.image("x", {}))
    assert (error.message, error.hint) == (
        message,
        "Or name an ISO or an installation tree with 'installer_image'.",
    )


def test_installer_image_takes_the_place_of_both(read: Read) -> None:
    assert read("[x]\ninstaller_image = /x.iso\n").image("x", {}).linux is None


@pytest.mark.parametrize("keys", itertools.combinations(ANSWER_FILE_KEYS, 2))
def test_two_answer_files(read: Read, keys: tuple[str, str]) -> None:
    configuration = read(MINIMAL + "".join(f"{key} = /a.json\n" for key in keys))
    error = error_of(lambda: configuration.image("x", {}))
    assert error.message == f"[x] has '{keys[0]}' and '{keys[1]}'. An image has one answer file."


@pytest.mark.parametrize("key", ANSWER_FILE_KEYS)
def test_answer_file(read: Read, key: str) -> None:
    image = read(f"{MINIMAL}{key} = /a.json\n").image("x", {})
    assert (image.answer_file_key, image.answer_file) == (key, Path("/a.json"))
    none = read(MINIMAL).image("x", {})
    assert (none.answer_file_key, none.answer_file) == (None, None)


SUMMARIES = {
    "nothing is known": ("arch = x86_64", ["", "", "x86_64", "bios"]),
    "all": (
        "distribution = Debian\nrelease = 13\narch = arm64\nfirmware = uefi",
        ["Debian", "13", "aarch64", "uefi"],
    ),
    "the architecture decides": ("arch = aarch64", ["", "", "aarch64", "uefi"]),
    "wrong architecture": ("release = 9\narch = vax", ["", "9", "", ""]),
    "wrong firmware": ("arch = x86_64\nfirmware = none", ["", "", "x86_64", ""]),
    "wrong reference": ("distribution = ${absent}\nrelease = $\narch = x86_64", ["", "", "x86_64", "bios"]),
    "wrong elsewhere": ("release = 9\narch = x86_64\nram = no\nlinux = ftp:", ["", "9", "x86_64", "bios"]),
}


@pytest.mark.parametrize(("text", "expected"), SUMMARIES.values(), ids=SUMMARIES)
def test_summary(read: Read, text: str, expected: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """It says what can be said, and complains of nothing."""
    assert read(f"[x]\npresseed = a\n{text}\n").summary("x") == expected
    assert caplog.messages == []


# Upload destinations.

HTTP = "[up]\nupload_type = http\nupload-target = https://host/\n"
UPLOAD = "[up]\nupload_type = rsync\nupload-target = host:/srv/\n"


def test_commands_after_an_upload_are_in_the_order_of_their_numbers(read: Read) -> None:
    configuration = read(
        f"{UPLOAD}post-upload-command10 = ten\npost_upload_command2 = two\npost-upload-command = none\n"
        "post-upload-command1 = one '${image} of $$1'\n"
    )
    assert configuration.destination("up", "x.raw", named_by="x") == Destination(
        "up", "rsync", "host:/srv/", (), (("none",), ("one", "x.raw of $1"), ("two",), ("ten",))
    )


def test_image_in_an_upload_section_wins_over_a_variable(read: Read) -> None:
    text = f"[DEFAULT]\nimage = wrong\n{UPLOAD}post-upload-command = echo ${{image}}\nupload_args = --x=${{image}}\n"
    destination = read(text).destination("up", "a$b.raw", named_by="x")
    assert (destination.commands, destination.arguments) == ((("echo", "a$b.raw"),), ("--x=a$b.raw",))


def test_image_in_a_variable_of_an_upload_section(read: Read) -> None:
    """In a text that a text of another section takes in, too; other sections keep their own."""
    text = (
        "[common]\nlink = ln ${image}\nimage = own\n[DEFAULT]\ncmd = echo ${image}\n"
        f"{UPLOAD}upload_args = ${{image}}\n"
        "post-upload-command = ${cmd} $$1\npost-upload-command2 = ${other:run}\npost-upload-command3 = ${common:link}\n"
        "[other]\nrun = run ${cmd}\n"
    )
    configuration = read(text)
    for name in ("a$b.raw", "c"):
        destination = configuration.destination("up", name, named_by="x")
        assert destination.arguments == (name,)
        assert destination.commands == (("echo", name, "$1"), ("run", "echo", name), ("ln", "own"))


BAD_UPLOADS = [
    ("", "[x] upload-destinations: there is no section [up]."),
    ("[up]\nupload_target = /srv\n", "[up] lacks 'upload_type'. It is the kind of the upload."),
    (
        "[up]\nupload_type = rsync\n",
        "[up] lacks 'upload_target'. It is the place to upload to, in the form that the upload type has.",
    ),
    ("[up]\nupload_type = ftp\nupload_target = /srv\n", "[up] upload-type: 'ftp' is not accepted, only rsync"),
    ("[up]\nupload_type =\nupload_target = /srv\n", "[up] upload-type: '' is not accepted, only rsync"),
    (
        "[up]\nupload_type = rsync\nupload_target =\n",
        "[up] upload-target: '' is not accepted, only a place to upload to.",
    ),
    (f"{UPLOAD}upload_args = 'a\n", '[up] upload-args: "\'a" is not accepted, only words as a shell has them'),
    (
        f"{UPLOAD}upload-verify = none\n",
        "[up] upload-verify: uploads of the type rsync have no such key.",
    ),
    (
        f"{UPLOAD}upload-formats = zip\n",
        "[up] upload-formats: 'zip' is not accepted, only raw",
    ),
    (f"{HTTP}upload-headers = Authorization: Basic x\n", "[up] upload-headers: "),
    (
        "[up]\nupload_type = command\nupload_target = put\nupload-index = yes\n",
        "[up] upload-index: uploads of the type command have no such key.",
    ),
    (
        "[up]\nupload_type = oci\nupload_target = host/x\nupload-keep = 2\n",
        "[up] upload-keep: uploads of the type oci have no such key.",
    ),
    (f"{HTTP}upload-headers = X: \n", "[up] upload-headers: 'X:' is not accepted, only fields NAME: VALUE"),
    (f"{HTTP}upload-tls =\n", "[up] upload-tls: '' is not accepted, only the path of a CA's file, sha256//PIN"),
    (f"{UPLOAD}post-upload-command3 =\n", "[up] post-upload-command3: '' is not accepted, only a command."),
    (f"{UPLOAD}post-upload-command = ${{imag}}\n", "[up] post-upload-command: ${imag} is not defined."),
]


@pytest.mark.parametrize(("text", "message"), BAD_UPLOADS)
def test_bad_upload_section(read: Read, text: str, message: str) -> None:
    configuration = read(MINIMAL + text)
    error = error_of(lambda: configuration.destination("up", "x.raw", named_by="x"))
    assert error.message.startswith(message)


def test_keys_of_the_default_section_are_for_the_uploads_that_take_them(read: Read) -> None:
    default = "[DEFAULT]\nupload-verify = etag\nupload-headers = A: b\n"
    configuration = read(f"{default}{UPLOAD}{HTTP.replace('up]', 'web]')}")
    rsync, web = (configuration.destination(section, "x.raw", named_by="x") for section in ("up", "web"))
    assert (rsync.verify, rsync.headers) == (None, ())
    assert (web.verify, web.headers) == ("etag", ("A: b",))


def test_section_that_is_based_on_another(read: Read) -> None:
    """The texts are taken as they are written, so that they follow the variables of the new section."""
    text = (
        "[DEFAULT]\nram = 3G\n[a]\nname = one\nlinux = /${name}\ninitrd = /i\ncores = 2\nram = 2G\n"
        "[b]\nbased-on = a\nname = two\ncores = 3\n[c]\nbased_on = b\nram = 4G\n"
    )
    configuration = read(text)
    assert configuration.images() == ["a", "b", "c"]
    image = configuration.image("b", {})
    assert (image.linux, image.cores, image.ram) == (Source("/two", Path("/two")), 3, 2 << 30)
    image = configuration.image("c", {})
    assert (image.linux, image.cores, image.ram) == (Source("/two", Path("/two")), 3, 4 << 30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x]\nbased-on = y\n", "[x] based-on: there is no section [y]."),
        ("[x]\nbased-on = x\n", "[x] based-on: x -> x goes round in a circle."),
        ("[x]\nbased-on = y\n[y]\nbased-on = x\n", "[x] based-on: x -> y -> x goes round in a circle."),
    ],
)
def test_section_that_can_not_be_based_on_another(read: Read, text: str, message: str) -> None:
    """The others are there all the same."""
    configuration = read(f"{text}[up]\nupload_type = rsync\nupload_target = /srv\n{MINIMAL.replace('[x]', '[good]')}")
    assert "x" in configuration.images()
    assert configuration.summary("x")[0] == ""
    assert configuration.image("good", {}).linux
    assert configuration.destination("up", "x.raw", named_by="good").target == "/srv"
    assert error_of(lambda: configuration.image("x", {})).message == message
    assert error_of(lambda: configuration.destination("x", "x.raw", named_by="good")).message == message


def test_near_miss_of_the_section_that_one_is_based_on(read: Read) -> None:
    configuration = read("[Debian]\nlinux = /l\ninitrd = /i\n[x]\nbased-on = Debain\n")
    assert "Did you mean Debian?" in (error_of(lambda: configuration.image("x", {})).hint or "")
