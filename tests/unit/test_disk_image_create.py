"""contrib/disk-image-create: what becomes of diskimage-builder's options and YAML files."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..conftest import REPOSITORY, imported

PROGRAM = REPOSITORY / "contrib/disk-image-create"
# All that diskimage-builder's own has: in its help, or accepted by it.
FLAGS = """\
-a -o -t -x -u -c -n -p -h --help --version --checksum --image-size --image-extra-size --image-cache --max-online-resize
--min-tmpfs --mkfs-journal-size --mkfs-options --no-tmpfs --offline --qemu-img-options --root-label --ramdisk-element
--install-type --docker-target --logfile
"""
KEYS = """\
imagename arch types environment ramdisk debug-trace uncompressed clear logfile checksum image-size image-extra-size
image-cache max-online-resize min-tmpfs mkfs-journal-size mkfs-options no-tmpfs offline qemu-img-options root-label
ramdisk-element install-type docker-target packages skip-base elements
"""


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """The program as a module."""
    with imported(PROGRAM) as module:
        yield module


def test_all_options_are_there(program: ModuleType) -> None:
    said = program.help_text()
    for flag in FLAGS.split():
        assert f"  {flag}" in said or f", {flag} " in said
    assert sorted(program.KEYS) == sorted(KEYS.split())


# What is said, and what the section has then beside what it always has.
TRANSLATED: list[tuple[str, dict[str, str], dict[str, str]]] = [
    ("-a arm64 a", {}, {"arch": "arm64"}),
    ("a", {"ARCH": "amd64"}, {"arch": "amd64"}),
    ("-t qcow2,tgz a", {}, {"format": "qcow2, tgz"}),
    ("-t tar -t vhd,squashfs a", {}, {"format": "vhd-dynamic, squashfs"}),
    ("-u a", {}, {"compression": "none"}),
    ("-n a b", {}, {"skip-base": "yes", "elements": "a b"}),
    ("a -p jq,g++ b -pless", {}, {"extra-packages": "jq g++ less", "elements": "a b"}),
    ("--image-size 4.5 a", {"DIB_IMAGE_EXTRA_SIZE": "3"}, {"image-size": "4.5G"}),
    ("a", {"DIB_IMAGE_SIZE": "5"}, {"image-size": "5G"}),
    ("--image-extra-size=300 a", {}, {"image-size": "fit", "extra-size": "300M"}),
    ("--max-online-resize 99 --mkfs-options -F a", {}, {"mkfs-options": "-E resize=99 -F"}),
    ("--mkfs-journal-size 64 a", {}, {"mkfs-options": "-J size=64"}),
    ("--offline a", {}, {"offline": "yes"}),
    ("--qemu-img-options compat=0.10 -t qcow2,tar a", {}, {"format": "raw, tar"}),
    ("--qemu-img-options compat=0.10 -t tar a", {}, {"format": "tar"}),
    ("--root-label top a", {}, {"root-label": "top"}),
    ("a", {"FS_TYPE": "xfs"}, {"filesystem": "xfs", "root-label": "img-rootfs"}),
    ("a", {"DIB_BLOCK_DEVICE_CONFIG": "file:///srv/disk.yaml"}, {"layout": "/srv/disk.yaml"}),
    ("a", {"DIB_BLOCK_DEVICE_CONFIG": "- a:\n  b"}, {"layout": "layout.yaml"}),
    ("a -o there/x.qcow2", {}, {"image-name": "x"}),
    ("a -o x.tar -t tar,qcow2", {}, {"image-name": "x.tar", "format": "tar, qcow2"}),
    ("a --logfile /srv/x.log", {}, {"log-file": "yes", "log-filename": "/srv/x.log"}),
    ("a --checksum --min-tmpfs 4 -x -c", {"DIB_IMAGE_SIZE": "5", "DIB_NO_TMPFS": "0"}, {}),
    ("--no-tmpfs a", {}, {"work-in-memory": "no"}),
    ("a", {"DIB_NO_TMPFS": "1"}, {"work-in-memory": "no"}),
]
ALWAYS = {
    "source": "elements",
    "elements": "a",
    "filesystem": "ext4",
    "root-label": "cloudimg-rootfs",
    "image-size": "fit",
    "extra-size": "1G",
    "format": "qcow2",
    "compression": "zlib",
    "image-name": "image",
}


@pytest.mark.parametrize(("line", "environment", "expected"), TRANSLATED)
def test_what_becomes_of_options(
    program: ModuleType, line: str, environment: dict[str, str], expected: dict[str, str]
) -> None:
    keys = program.translated(*program.parsed(line.split()), environment).keys
    always = {**ALWAYS}
    if "G" in expected.get("image-size", ""):
        del always["extra-size"]
    if "qcow2" not in expected.get("format", "qcow2"):
        del always["compression"]
    assert keys == {**always, **expected}


def test_an_element_with_a_layout(program: ModuleType, tmp_path: Path) -> None:
    assert not program.has_layout("named; provides operating-system, x", tmp_path)
    assert program.has_layout("needed by vm; provides x, block-device", tmp_path)
    (tmp_path / "block-device-default.yaml").touch()
    assert program.has_layout("named", tmp_path)


def test_what_elements_are_told(program: ModuleType) -> None:
    line = "-x -x --offline --checksum --install-type package --image-cache /srv/cache a"
    found = program.translated(*program.parsed(line.split()), {"HOME": "/home/me", "DIB_RELEASE": "trixie"})
    assert found.environment == {
        "HOME": "/home/me",
        "DIB_RELEASE": "trixie",
        "DIB_DEBUG_TRACE": "2",
        "DIB_OFFLINE": "1",
        "DIB_CHECKSUM": "1",
        "DIB_DEFAULT_INSTALLTYPE": "package",
        "DIB_IMAGE_CACHE": "/srv/cache",
        "DIB_LOCKFILES": "/home/me/.cache/dib/lockfiles",
    }
    assert found.checksums == ["md5", "sha256"]
    cleared = program.translated({"clear": True}, ["a"], {"PATH": "/bin", "DIB_RELEASE": "trixie", "SECRET": "x"})
    assert cleared.environment.keys() == {"PATH", "DIB_DEBUG_TRACE", "DIB_IMAGE_CACHE", "DIB_LOCKFILES"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no element is named"),
        ("-t docker a", "-t docker: it is not imported into Docker here. -t oci makes"),
        ("-t aci a", "-t aci: nothing runs"),
        ("--image-size big a", "--image-size: 'big' is no number"),
        ("--mkfs-journal-size 1.5 a", "--mkfs-journal-size: '1.5' is no number"),
        ("--image-sise 5 a", "option --image-sise not recognized; --help lists the options"),
        ("a -p", "option -p requires argument"),
        ("-o / a", "-o /: that is no name of an image"),
    ],
)
def test_what_is_refused(program: ModuleType, line: str, message: str) -> None:
    with pytest.raises(program.Refused) as caught:
        program.translated(*program.parsed(line.split()), {})
    assert str(caught.value).startswith(message)


def test_values_that_a_section_can_not_have(program: ModuleType) -> None:
    assert program.section("x", {"a": "$b"}) == "[x]\na = $$b\n"
    with pytest.raises(program.Refused, match="a: 'b\\\\nc = d' has characters"):
        program.section("x", {"a": "b\nc = d"})


def argvs(program: ModuleType, path: Path, text: str) -> list[Sequence[str]]:
    path.write_text(text, encoding="utf-8")
    return [program.options_of(image) for image in program.merged(program.entries_of(str(path)))]


def test_yaml(program: ModuleType, tmp_path: Path) -> None:
    text = """\
- imagename: one
  types: [qcow2, tar]
  elements: [a]
  environment: {DIB_RELEASE: trixie}
  debug-trace: 2
  no-tmpfs: true
  uncompressed: false
  image-size: 5
- packages: [jq]
  elements: [b]
  image-size: 6
  environment: {OTHER: x}
- imagename: two
  qemu-img-options: {compat: '0.10', cluster_size: 2M}
  elements: [c]
"""
    first, second = argvs(program, tmp_path / "x.yaml", text)
    assert " ".join(first) == "-o one -t qcow2,tar -x -x -p jq --image-size 6 --no-tmpfs a b"
    assert " ".join(second) == "-o two --qemu-img-options compat=0.10,cluster_size=2M c"
    images = program.merged(program.entries_of(str(tmp_path / "x.yaml")))
    assert images[0]["environment"] == {"DIB_RELEASE": "trixie", "OTHER": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b", "is no list of images"),
        ("[a]", "is no list of images"),
        ("- [", "is no YAML: "),
        ("- {imagname: x}", "image 1: there is no key 'imagname', but imagename"),
        ("- {elements: a}", "image 1: elements is a list of strings, not 'a'"),
        ("- {image-size: true}", "image 1: image-size is a number, not True"),
        ("- {environment: {A: 1}}", "image 1: environment is a map of strings, not {'A': 1}"),
        ("- {debug-trace: 3}", "image 1: debug-trace is 0, 1 or 2, not 3"),
    ],
)
def test_yaml_that_is_refused(program: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(program.Refused) as caught:
        argvs(program, tmp_path / "x.yaml", text)
    assert message in str(caught.value)


def test_yaml_that_is_not_there(program: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(program.Refused, match="can't be read: No such file or directory"):
        program.entries_of(str(tmp_path / "gone"))


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    """The descriptor of the lock that a program holds, too."""
    with (tmp_path / "lock").open("w") as file:
        yield file.fileno()


def test_signal_before_the_program_is_there(program: ModuleType, lock: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the program, which ends by it."""
    running, start = program.Running(), subprocess.Popen

    def started(*words: Any, **options: Any) -> "subprocess.Popen[bytes]":
        running.take(signal.SIGTERM, None)
        return start(*words, **options)

    monkeypatch.setattr(program.subprocess, "Popen", started)
    assert running.run(["sleep", "600"], {"PATH": os.environ["PATH"]}, None, lock) == 128 + signal.SIGTERM


def test_signal_when_no_program_runs(program: ModuleType) -> None:
    with pytest.raises(SystemExit) as ended:
        program.Running().take(signal.SIGTERM, None)
    assert ended.value.code == 128 + signal.SIGTERM


def test_signal_that_comes_too_late(program: ModuleType, lock: int, monkeypatch: pytest.MonkeyPatch) -> None:
    running = program.Running()
    monkeypatch.setattr(program.subprocess.Popen, "send_signal", lambda process, number: None)
    monkeypatch.setattr(running, "_taken", signal.SIGTERM)
    with pytest.raises(SystemExit):
        running.run(["true"], {"PATH": os.environ["PATH"]}, None, lock)
