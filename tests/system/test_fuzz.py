"""Bad data: never a traceback, never a hang, never a word that a terminal would obey.

The examples are the same on every run.  FUZZ_FACTOR=20 in the environment makes twenty times as many.
"""

import dataclasses
import faulthandler
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from image_factory import pipeline
from image_factory.base import command, units
from image_factory.base.errors import CommandError, ConfigurationError, ImageFactoryError, NoSystemError
from image_factory.base.log import printable
from image_factory.cli import _one_line
from image_factory.configuration.files import FILE_VARIABLE, Configuration
from image_factory.configuration.settings import ImageSettings, UploadSettings, declarations
from image_factory.machines.console import tail
from image_factory.system import mounts, partitions

from ..conftest import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
SECONDS = 20

K, M = 1 << 10, 1 << 20

# What a terminal may obey: all but newline and tab of the controls of ASCII and ISO 6429.
CONTROLS = frozenset(map(chr, [*range(0x20), *range(0x7F, 0xA0)])) - frozenset("\t\n")


def examples(number: int) -> Callable[[Any], Any]:
    """Decorate a test that is given *number* examples, always the same ones."""
    return settings(
        max_examples=number * FACTOR,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@contextmanager
def watched(seconds: int = SECONDS) -> Iterator[None]:
    """Fail what takes longer than *seconds*."""

    def expired(*_: object) -> None:
        raise AssertionError(f"it hangs for {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_one_line(error: ImageFactoryError) -> None:
    """Check that what the user sees of *error* is one line, and its hint another."""
    assert error.message.strip()
    for text in filter(None, (error.message, error.hint)):
        assert "\n" not in text
        assert not set(_one_line(text)) & CONTROLS
        assert _one_line(text).isprintable() or not _one_line(text).isascii()


def refused(action: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Return what *action* returns, None if it raises the one error that it may."""
    try:
        return action(*arguments, **keywords)
    except ConfigurationError as error:
        check_one_line(error)
        return None


# The configuration.

SECTIONS = ("x", "up", "DEFAULT", "x y", "\N{SNOWMAN}", "a:b", "a" * 70)
IMAGE_KEYS = [key for key, _ in declarations(ImageSettings)]
KEYS = [
    *IMAGE_KEYS,
    *(key for key, _ in declarations(UploadSettings)),
    *("post-upload-command", "post-upload-command7", f"post-upload-command{'7' * 5000}", "image", "image_siez"),
    *("data-dir", "there", "\N{ARABIC-INDIC DIGIT ONE}", "post-upload-command\N{ARABIC-INDIC DIGIT ONE}", "${there}"),
]
NAMES = [*KEYS[:4], "there", "image", "data_dir", "absent", "a\nb", ""]

references = st.builds(
    "${{{}}}".format,
    st.one_of(st.sampled_from(NAMES), st.builds("{}:{}".format, st.sampled_from(SECTIONS), st.sampled_from(NAMES))),
)
fragments = st.one_of(
    references,
    st.sampled_from(
        [
            *(
                "$",
                "$$",
                "${",
                "}",
                "${}",
                "${a:b:c}",
                "${${there}}",
                "%(there)s",
                "'",
                '"',
                "\\",
                ",",
                ", ",
                "\n ",
                "\n",
            ),
            *(
                "2G",
                "1",
                "-1",
                "9" * 5000,
                "1e999",
                "nan",
                "yes",
                "raw,qcow2",
                "rsync",
                "kvm",
                "none",
                "\0",
                "\x1b[31m",
            ),
            *(
                "http://",
                "http://[",
                "http://[::1]:99999/x",
                "http://\N{VULGAR FRACTION ONE HALF}/x",
                "rsync://h/",
                "file:",
            ),
            *("file:///%00", "file://host/x", "http://h/%2e%2e", "http://h/%00", "/", "~", "~nobody/x", "~\N{SNOWMAN}"),
            *("/boot/linux", "localhost:1", "[::1]:2", "host:99999", "52:54:00:12:34:56", "a.cfg", "/x/a b", " ; c"),
            *("\r", "\x0b", "\x85", "\N{LINE SEPARATOR}", "\ufeff", "\N{ZERO WIDTH SPACE}", "a" * 300, "." * 300),
        ]
    ),
    st.text(max_size=6),
)
values = st.lists(fragments, max_size=4).map("".join)
entries = st.builds(
    "{}{}{}".format, st.sampled_from(KEYS) | st.text(max_size=6), st.sampled_from([" = ", ":", "", "\n"]), values
)
lines = st.one_of(
    entries,
    entries,
    entries,
    st.builds("[{}]".format, st.sampled_from(SECTIONS) | st.text(max_size=6)),
    st.sampled_from(
        ["", "[", "[]", "[x]]", " [x]", "# c", "; c", "= v", ": v", " indented", "\tlinux = /x", "\ufeff[x]"]
    ),
)
# So that most examples get further than the first line, and many as far as the steps of a build.
STARTS = (
    "",
    "[x]\n",
    "[x]\nlinux = /boot/linux\ninitrd = /boot/initrd\n",
    "[up]\nupload_type = rsync\nupload_target = h::d\n"
    "[x]\nlinux = /boot/linux\ninitrd = /boot/initrd\nupload_destinations = up\n",
    "[x]\nlinux = /boot/linux\ninitrd = /boot/initrd\nupload_destinations = up\n"
    "[up]\nupload_type = rsync\nupload_target = h::d\n",
)
inis = st.builds(lambda start, rest: start + "\n".join(rest), st.sampled_from(STARTS), st.lists(lines, max_size=8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for the files of all examples."""
    return tmp_path_factory.mktemp("fuzz")


def read_everything(place: Path, data: bytes) -> None:
    """Read *data* as the configuration, and ask it for all that it has."""
    path = place / "fuzz.conf"
    path.write_bytes(data)
    with watched():
        configuration = refused(Configuration, {FILE_VARIABLE: str(path)})
        if configuration is None:
            return
        images = configuration.images()
        for name in dict.fromkeys([*images, *SECTIONS, ""]):
            refused(configuration.image, name, {})
            refused(configuration.destination, name, "x.raw", named_by="x")
            plan = refused(pipeline.make_plan, configuration, name, {"output-dir": str(place)})
            if plan is not None:
                # A task's script is read for it.
                shown = refused(pipeline.described, mounts.chosen(plan)) or []
                argvs = [argv for _, commands in shown for argv in commands]
                assert all(isinstance(word, str) and "\0" not in word for argv in argvs for word in argv)


@examples(150)
@given(data=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_configuration_of_random_bytes(place: Path, data: bytes) -> None:
    read_everything(place, data)


@examples(600)
@given(text=inis)
def test_configuration_of_random_entries(place: Path, text: str) -> None:
    read_everything(place, text.encode("utf-8", "surrogatepass"))


@examples(400)
@given(entry=st.tuples(st.sampled_from(KEYS), values), start=st.sampled_from(STARTS[2:]))
@example(entry=(f"post-upload-command{'7' * 5000}", "true"), start=STARTS[4])
@example(entry=("append", "\0"), start=STARTS[2])
@example(entry=("linux", "file:///%00"), start=STARTS[2])
@example(entry=("installer-image", "a" * 300), start=STARTS[2])
@example(entry=("distribution", "${\n ${distribution}"), start=STARTS[2])
def test_configuration_with_one_odd_value(place: Path, entry: tuple[str, str], start: str) -> None:
    read_everything(place, f"{start}{entry[0]} = {entry[1]}\n".encode("utf-8", "surrogatepass"))


# What a shell hands over, bytes that are no text among it.
words = st.binary(max_size=40).map(os.fsdecode).filter(lambda word: "\0" not in word) | values.filter(
    lambda word: "\0" not in word and word.isascii()
)


@examples(200)
@given(key=st.sampled_from(IMAGE_KEYS), text=words, name=words)
def test_flags_and_image_names(place: Path, key: str, text: str, name: str) -> None:
    path = place / "flags.conf"
    path.write_text(STARTS[2])
    flagged = {key for key, declaration in declarations(ImageSettings) if declaration.flags}
    with watched():
        configuration = Configuration({FILE_VARIABLE: str(path)})
        refused(pipeline.make_plan, configuration, "x", {key: text} if key in flagged else {})
        refused(pipeline.make_plan, configuration, name, {})


@pytest.mark.parametrize("depth", [9, 10, 11, 200])
def test_variables_in_variables(place: Path, depth: int) -> None:
    """configparser follows ten of them."""
    chain = "".join(f"v{number} = ${{v{number + 1}}}\n" for number in range(depth))
    read_everything(place, f"{STARTS[2]}append = ${{v0}}\n{chain}v{depth} = end\n".encode())


# Sizes.


@examples(500)
@given(
    text=st.one_of(
        st.text(max_size=12),
        st.text(
            alphabet="0123456789.,+-eExX_ kKmMgGtTpPeEiIbB\t\n\0\N{ARABIC-INDIC DIGIT ONE}\N{NO-BREAK SPACE}",
            max_size=12,
        ),
        st.builds("{}{}".format, st.integers() | st.floats(), st.sampled_from(["", "K", "KiB", "kB", "E", "EB", "b"])),
    )
)
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = units.parse_size(text)
    except ValueError as error:
        assert str(error) == units.SIZE_FORMS
    else:
        assert type(size) is int
        assert 1 <= size <= 2**63 - 512
        assert units.format_size(size).isascii()


@examples(300)
@given(size=st.integers(1, 2**63 - 512), unit=st.sampled_from(range(7)), space=st.sampled_from(["", " "]))
def test_size_is_read_as_it_was_written(size: int, unit: int, space: str) -> None:
    assert units.parse_size(str(size)) == units.parse_size(f"{size}{space}B") == size
    prefix = " KMGTPE"[unit].strip()
    if prefix:
        number = size >> 10 * unit
        for text, factor in ((prefix, 1024), (f"{prefix}iB", 1024), (f"{prefix}B", 1000)):
            if number:
                assert units.parse_size(f"{number}{space}{text}") == number * factor**unit


@examples(300)
@given(size=st.integers(1, 7 << 60))
def test_size_that_is_shown_is_about_the_size(size: int) -> None:
    assert abs(units.parse_size(units.format_size(size)) - size) <= size / 20


QEMU_SIZES = (
    *(
        "1",
        "512",
        "513",
        "65536",
        "1000000",
        "1k",
        "1K",
        "7k",
        "1.5k",
        "0.5K",
        "2.5K",
        "1023.999K",
        "1m",
        "1M",
        "2.25M",
    ),
    *(
        "1.1M",
        "0.3M",
        "3.7m",
        "1g",
        "1G",
        "2G",
        "2.5G",
        "0.001G",
        "1.333G",
        "1.999999G",
        "16g",
        "100G",
        "1T",
        "1t",
        "1.5T",
    ),
)


@pytest.mark.parametrize("text", QEMU_SIZES)
def test_qemu_img_reads_the_same_size(tmp_path: Path, text: str) -> None:
    image = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", image, text], check=True, timeout=PATIENCE)
    info = ["qemu-img", "info", "-f", "raw", "--output=json", image]
    found = json.loads(subprocess.run(info, check=True, capture_output=True, timeout=PATIENCE).stdout)["virtual-size"]
    # It makes whole sectors.
    assert found == -(-units.parse_size(text) // 512) * 512


@pytest.mark.parametrize("text", ["0x", "1.5.5G", "-1", "1GX", "G", "1,5G", "nan", "9" * 40])
def test_what_qemu_img_refuses_is_refused(tmp_path: Path, text: str) -> None:
    argv = ["qemu-img", "create", "-q", "-f", "raw", tmp_path / "disk.raw", text]
    assert subprocess.run(argv, capture_output=True, timeout=PATIENCE).returncode
    with pytest.raises(ValueError, match="a size above zero"):
        units.parse_size(text)


# Partition tables.


@pytest.fixture(scope="module", autouse=True)
def _quiet_crashes() -> Iterator[None]:
    """Keep pytest from showing where libparted aborts: it is in a process of its own, and expected."""
    enabled = faulthandler.is_enabled()
    faulthandler.disable()
    yield
    if enabled:
        faulthandler.enable(sys.__stderr__)


DISK_SIZE = 4 * M
SECTORS = DISK_SIZE // 512
LINUX_GUID = bytes.fromhex("af3dc60f838472478e793d69d8477de4")

TABLES = {
    "dos": "label: dos\nstart=2048, size=4096, type=83\n",
    "logical": "label: dos\nstart=2048, size=1024, type=83\nstart=3072, size=4096, type=5\n"
    "start=3200, size=500, type=82\nstart=4200, size=500, type=83\n",
    "gpt": "label: gpt\nstart=2048, size=4096\nstart=6144, size=1000\n",
}


@pytest.fixture(scope="module")
def disks(place: Path) -> dict[str, bytes]:
    """Disks as they should be, with an ext4 filesystem at 1 MiB."""
    found = {}
    for name, script in TABLES.items():
        path = place / f"{name}.raw"
        path.write_bytes(bytes(DISK_SIZE))
        argv = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", path]
        subprocess.run(argv, input=script, text=True, check=True, capture_output=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-E", f"offset={M}", path, "512K"], check=True, capture_output=True)
        found[name] = path.read_bytes()
    return found


def read_disk(place: Path, data: bytes, *, contents: bool = False) -> None:
    """Look for the root of a disk: its partitions are on it, or there is one line that says why not.

    With *contents*, which takes longer, what the partitions hold is looked at, too.
    """
    path = place / "fuzz.raw"
    path.write_bytes(data)
    with watched():
        try:
            if contents:
                volumes = partitions.read_volumes(path)
                check_one_line(partitions.no_root(volumes))
                on_disk = [volume.partition for volume in volumes if volume.partition]
            else:
                on_disk = partitions.read_partitions(path)
        except NoSystemError as error:
            check_one_line(error)
        else:
            for found in on_disk:
                assert found.offset >= 0
                assert found.size > 0
                assert found.offset + found.size <= len(data)
    assert path.read_bytes() == data


def patched(data: bytes, patches: dict[int, bytes]) -> bytes:
    changed = bytearray(data)
    for position, patch in patches.items():
        changed[position : position + len(patch)] = patch
    return bytes(changed[: len(data)])


# Where a table has something to say: MBR, GPT header, GPT entries, EBRs, and the copy of the GPT at the end.
table_positions = st.one_of(
    st.integers(440, 511),
    st.integers(512, 603),
    st.integers(1024, 1279),
    st.integers(3072 * 512 + 446, 3072 * 512 + 511),
    st.integers(DISK_SIZE - 33 * 512, DISK_SIZE - 32 * 512 + 255),
    st.integers(DISK_SIZE - 512, DISK_SIZE - 420),
)
odd_bytes = st.sampled_from([0, 1, 5, 0x0F, 0x7F, 0x80, 0x85, 0xEE, 0xEF, 0xFE, 0xFF]) | st.integers(0, 255)


@examples(150)
@given(
    name=st.sampled_from(list(TABLES)),
    patches=st.dictionaries(table_positions, odd_bytes.map(lambda number: bytes([number])), min_size=1, max_size=12),
)
def test_table_with_changed_bytes(place: Path, disks: dict[str, bytes], name: str, patches: dict[int, bytes]) -> None:
    read_disk(place, patched(disks[name], patches))


@examples(60)
@given(
    name=st.sampled_from(list(TABLES)),
    size=st.sampled_from([0, 1, 511, 512, 1024, 20 * 512, 34 * 512, M - 1, M]) | st.integers(0, DISK_SIZE),
)
def test_truncated_disk(place: Path, disks: dict[str, bytes], name: str, size: int) -> None:
    read_disk(place, disks[name][:size])


@examples(60)
@given(
    seed=st.integers(0, 2**32),
    position=st.sampled_from([0, 440, 446, 512, 1024]),
    magic=st.booleans(),
    size=st.integers(0, 70 * K),
)
def test_random_disk(place: Path, seed: int, position: int, magic: bool, size: int) -> None:
    noise = random.Random(seed).randbytes(size)
    read_disk(place, patched(bytes(DISK_SIZE), {position: noise, **({510: b"\x55\xaa"} if magic else {})}))


@pytest.mark.parametrize("byte", [0x00, 0x55, 0xAA, 0xFF])
def test_disk_of_one_byte_repeated(place: Path, byte: int) -> None:
    read_disk(place, bytes([byte]) * DISK_SIZE)


sectors = st.one_of(
    st.sampled_from([0, 1, 2, 33, 34, 63, 2047, 2048, SECTORS - 34, SECTORS - 33, SECTORS - 1, SECTORS, SECTORS + 1]),
    st.sampled_from([2**31 - 1, 2**31, 2**32 - 1]),
    st.integers(0, SECTORS),
)
large_sectors = sectors | st.sampled_from([2**32, 2**55, 2**63 - 1, 2**63, 2**64 - 1])


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GPT's header says; both CRCs are right unless *wrong* is added to them."""

    own: int = 1
    other: int = SECTORS - 1
    first: int = 34
    last: int = SECTORS - 34
    entries: int = 2
    count: int = 128
    size: int = 128
    header_size: int = 92
    wrong: int = 0

    def pack(self, table: bytes) -> bytes:
        covered = table[: min(self.count * self.size, len(table))].ljust(min(self.count * self.size, 16 * K), b"\0")
        fields = (self.own, self.other, self.first, self.last, bytes(range(16)), self.entries, self.count, self.size)
        crc = (zlib.crc32(covered) + self.wrong) & 0xFFFFFFFF

        def header(own_crc: int) -> bytes:
            start = struct.pack("<8s4I", b"EFI PART", 0x10000, self.header_size, own_crc, 0)
            return (start + struct.pack("<4Q16sQ3I", *fields, crc)).ljust(512, b"\0")

        return header((zlib.crc32(header(0)[: self.header_size]) + self.wrong) & 0xFFFFFFFF)


def gpt_disk(partitions: list[tuple[int, int]], header: Header, backup: Header) -> bytes:
    table = b"".join(
        struct.pack("<16s16s3Q72s", LINUX_GUID, bytes([number] * 16), first, last, 0, "p".encode("utf-16-le"))
        for number, (first, last) in enumerate(partitions, 1)
    ).ljust(128 * 128, b"\0")
    protective = struct.pack("<B3sB3s2I", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, SECTORS - 1)
    return patched(
        bytes(DISK_SIZE),
        {
            446: protective,
            510: b"\x55\xaa",
            512: header.pack(table),
            1024: table,
            DISK_SIZE - 33 * 512: table,
            DISK_SIZE - 512: backup.pack(table),
        },
    )


headers = st.builds(
    Header,
    own=st.just(1) | sectors,
    other=st.just(SECTORS - 1) | large_sectors,
    first=st.just(34) | large_sectors,
    last=st.just(SECTORS - 34) | large_sectors,
    entries=st.just(2) | large_sectors,
    count=st.just(128) | st.sampled_from([0, 1, 4, 129, 4096, 2**31, 2**32 - 1]),
    size=st.just(128) | st.sampled_from([0, 1, 127, 129, 256, 4096, 2**31, 2**32 - 1]),
    header_size=st.just(92) | st.sampled_from([0, 91, 93, 512, 513, 2**32 - 1]),
    wrong=st.sampled_from([0, 0, 0, 1]),
)


@examples(250)
@given(
    partitions=st.lists(st.tuples(large_sectors, large_sectors), max_size=5),
    header=st.just(Header()) | headers,
    backup=st.just(Header(own=SECTORS - 1, other=1, entries=SECTORS - 33)) | headers,
)
def test_gpt_that_lies(place: Path, partitions: list[tuple[int, int]], header: Header, backup: Header) -> None:
    """Entries outside of the disk, over each other, ending before they begin; sizes and CRCs that are wrong."""
    read_disk(place, gpt_disk(partitions, header, backup))


def test_gpt_that_libparted_aborts_on(place: Path) -> None:
    """It says how it ended, and that is all that is printed."""
    path = place / "abort.raw"
    path.write_bytes(gpt_disk([(2, 2**63)], Header(), Header(own=SECTORS - 1, other=1, entries=SECTORS - 33)))
    with pytest.raises(NoSystemError, match=r"^The disk has no .*: libparted was killed by SIGABRT\.$"):
        partitions.read_partitions(path)


def test_gpt_of_the_tests_is_one(place: Path) -> None:
    path = place / "good.raw"
    path.write_bytes(gpt_disk([(2048, 4095)], Header(), Header(own=SECTORS - 1, other=1, entries=SECTORS - 33)))
    assert [(found.offset, found.size) for found in partitions.read_partitions(path)] == [(M, M)]


mbr_entries = st.tuples(
    st.sampled_from([0, 0x80, 0xFF]), st.sampled_from([0x83, 0x83, 5, 0x0F, 0x85, 0x82, 0xEE, 7, 0]), sectors, sectors
)


def mbr(entries: list[tuple[int, int, int, int]]) -> bytes:
    packed = (struct.pack("<B3sB3s2I", flag, b"", kind, b"", first, size) for flag, kind, first, size in entries)
    return b"".join(packed).ljust(64, b"\0") + b"\x55\xaa"


@examples(200)
@given(
    primary=st.lists(mbr_entries, max_size=3),
    chain=st.lists(
        st.tuples(st.sampled_from([2048, 2049, 3000, 4000]), st.lists(mbr_entries, min_size=1, max_size=2)), max_size=4
    ),
    links=st.lists(st.sampled_from([0, 1, 952, 1952, SECTORS, 2**32 - 2048, 2**32 - 1]), min_size=4, max_size=4),
)
def test_mbr_that_lies(
    place: Path,
    primary: list[tuple[int, int, int, int]],
    chain: list[tuple[int, list[tuple[int, int, int, int]]]],
    links: list[int],
) -> None:
    """Partitions outside of the disk and over each other; extended ones in a circle or leading outside."""
    patches = {446: mbr([*primary, (0, 5, 2048, 4096)])}
    for (sector, entries), link in zip(chain, links, strict=False):
        # The second entry is the way to the next extended boot record, from the start of the first.
        patches[sector * 512 + 446] = mbr([entries[0], (0, 5, link, 100)])
    read_disk(place, patched(bytes(DISK_SIZE), patches))


@pytest.mark.parametrize("link", [0, 10])
def test_extended_partitions_in_a_circle(place: Path, link: int) -> None:
    first = mbr([(0, 0x83, 1, 5), (0, 5, 10, 10)])
    second = mbr([(0, 0x83, 1, 5), (0, 5, link, 10)])
    patches = {446: mbr([(0, 5, 2048, 4096)]), 2048 * 512 + 446: first, 2058 * 512 + 446: second}
    read_disk(place, patched(bytes(DISK_SIZE), patches))


# Where filesystems that libparted knows have their mark; all of them are looked for in each partition.
MARKS = (
    *((0x438, b"\x53\xef"), (0, b"XFSB"), (65600, b"_BHRfS_M"), (54, b"FAT16   "), (82, b"FAT32   "), (3, b"NTFS    ")),
    *((1024, b"BD"), (1024, b"H+"), (1024, b"HX"), (32768, b"JFS1"), (65588, b"ReIsEr2Fs"), (1030, b"\x34\x34")),
    *((4086, b"SWAPSPACE2"), (4086, b"SWAP-SPACE"), (9564, b"\x54\x19\x01\x00"), (9564, b"\x00\x01\x19\x54")),
    *((1024, b"\x10\x20\xf5\xf2"), (32769, b"NSR02"), (0, b"DOS\1"), (0, b"SFS\0"), (510, b"\x55\xaa")),
)


@examples(150)
@given(
    name=st.sampled_from(list(TABLES)),
    seed=st.integers(0, 2**32),
    fill=st.sampled_from([None, None, 0, 0xFF]),
    marks=st.lists(st.sampled_from(MARKS), max_size=3, unique=True),
)
def test_garbage_for_filesystems(
    place: Path, disks: dict[str, bytes], name: str, seed: int, fill: int | None, marks: list[tuple[int, bytes]]
) -> None:
    noise = random.Random(seed).randbytes(70 * K) if fill is None else bytes([fill]) * 70 * K
    patches = {M: noise}
    patches |= {M + position: mark for position, mark in marks}
    read_disk(place, patched(disks[name], patches), contents=True)


# Filesystems that the helper mounts.

HELPER = REPOSITORY / "image-factory-sudo-helper"
# The offset and the size of what is damaged, the filesystem's size and the program that makes it.
FILESYSTEMS: dict[str, tuple[int, int, int, list[str]]] = {
    "ext4": (1024, 1024, 4 * M, ["mkfs.ext4", "-q", "-F"]),
    "xfs": (0, 512, 300 * M, ["mkfs.xfs", "-q"]),
    "btrfs": (65536, 4096, 128 * M, ["mkfs.btrfs", "-q"]),
}


@pytest.fixture(scope="module", params=FILESYSTEMS)
def filesystem(request: pytest.FixtureRequest, place: Path) -> Path:
    """An image of the whole filesystem, made once."""
    _, _, size, argv = FILESYSTEMS[request.param]
    program = shutil.which(argv[0], path=command.search_path())
    assert program, f"{argv[0]} is not installed"
    path = place / f"good.{request.param}"
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run([program, *argv[1:], path], check=True, capture_output=True)
    return path


def helper(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    argv = [HELPER, *arguments]
    return subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
    )


def mount_and_release(image: Path) -> int:
    """Mount *image* with the helper and unmount it; return the status of the first."""
    directory = Path(tempfile.mkdtemp(prefix="image-factory.", dir="/tmp"))
    tree = directory / "tree"
    tree.mkdir(mode=0o700)
    try:
        done = helper("mount-image", image, "0", str(image.stat().st_size), tree)
        assert done.stdout == ""
        if done.returncode == 0:
            assert done.stderr == ""
            # What the build does in it has to end too.
            for words in (
                ["list", tree, "*"],
                ["truncate", tree, "*"],
                ["write", tree, "0644", "a/b"],
                ["remove", tree, "*"],
            ):
                looked = helper(*words)
                assert looked.returncode in (0, 1)
                assert len(looked.stderr.splitlines()) == looked.returncode
            unmounted = helper("umount", tree)
            assert (unmounted.returncode, unmounted.stdout, unmounted.stderr) == (0, "", "")
        else:
            assert done.returncode == 1
            assert re.fullmatch(r"image-factory-sudo-helper: [^\n]+\. The call was '[^\n]*'\.\n", done.stderr)
        assert str(directory) not in Path("/proc/self/mountinfo").read_text()
        attached = subprocess.run(["losetup", "--list", "--noheadings", "--associated", image], capture_output=True)
        assert attached.stdout == b""
    finally:
        subprocess.run(["umount", "--lazy", "--quiet", tree], capture_output=True)
        shutil.rmtree(directory)
    return done.returncode


@pytest.mark.parametrize("seed", range(12 * FACTOR))
def test_filesystem_with_a_garbage_superblock(filesystem: Path, place: Path, seed: int) -> None:
    """The kernel refuses it or takes it; nothing stays mounted or attached either way."""
    numbers = random.Random(f"{filesystem.suffix}{seed}")
    start, length, _, _ = FILESYSTEMS[filesystem.suffix[1:]]
    image = place / "damaged.img"
    subprocess.run(["cp", "--sparse=always", filesystem, image], check=True)
    with image.open("r+b") as file:
        if seed % 4 == 0:
            file.seek(start)
            file.write(numbers.randbytes(length))
        else:
            # Few enough bytes that some of the filesystems are still taken.
            for _ in range(numbers.choice([1, 2, 8])):
                file.seek(start + numbers.randrange(length))
                file.write(numbers.randbytes(1))
    mount_and_release(image)


def test_filesystem_as_it_should_be(filesystem: Path, place: Path) -> None:
    assert mount_and_release(filesystem) == 0


@pytest.mark.parametrize("size", [512, 1024, 4096, 65536, M])
def test_filesystem_that_was_cut_off(filesystem: Path, place: Path, size: int) -> None:
    image = place / "cut.img"
    with filesystem.open("rb") as file:
        image.write_bytes(file.read(size))
    mount_and_release(image)


# What a guest or a program prints.

ESCAPES = (
    *(
        b"\x1b[31m",
        b"\x1b[2J",
        b"\x1b[?1049h",
        b"\x1b[",
        b"\x1b[31",
        b"\x1b[38;2;1;2;3m",
        b"\x1b[>c",
        b"\x1b[6n",
        b"\x1b[ q",
    ),
    *(
        b"\x1b]0;title\x07",
        b"\x1b]0;title\x1b\\",
        b"\x1b]0;no end",
        b"\x1b]52;c;aGk=\x07",
        b"\x1b]",
        b"\x1b]8;;http://x\x07",
    ),
    *(
        b"\x1bP1$r0m\x1b\\",
        b"\x1bPno end",
        b"\x1b_apc\x1b\\",
        b"\x1b^pm\x1b\\",
        b"\x1bXsos\x1b\\",
        b"\x1bc",
        b"\x1b7",
        b"\x1b",
    ),
    *(
        b"\x1b(B",
        b"\x1b#8",
        b"\x1b%G",
        b"\x1b\x1b[31m",
        b"\x1b[\x1b[31m",
        b"\x1b]\x1b]x",
        b"\x1b\x00[31m",
        b"\x1b[3\x001m",
    ),
    # The same as 8-bit controls: as bytes they are no UTF-8, as characters they are.
    *(b"\x9b31m", b"\x9d0;title\x9c", b"\x90q\x9c", b"\x9f", b"\x98", b"\x85", b"\x84", b"\x8d"),
    *("\x9b31m".encode(), "\x9d0;title\x9c".encode(), "\x90q\x9c".encode(), "\x85\x84\x8d".encode()),
    *(
        b"\x00",
        b"\x07",
        b"\x08",
        b"\x0b",
        b"\x0c",
        b"\x0e",
        b"\x0f",
        b"\x7f",
        b"\r",
        b"\r\n",
        b"\n",
        b"\t",
        b"\x05",
        b"\x11",
    ),
    *(
        b"\xff",
        b"\xc3",
        b"\xc2",
        b"\xe2\x82",
        b"\xf0\x9f\x98",
        b"\xed\xa0\x80",
        b"\xc0\x9b",
        b"\xe0\x82\x9b",
        b"\xef\xbb\xbf",
    ),
)
outputs = st.lists(st.sampled_from(ESCAPES) | st.binary(max_size=8), max_size=20).map(b"".join)


@examples(500)
@given(data=outputs)
def test_output_is_shown_without_controls(data: bytes) -> None:
    for encoding in ("utf-8", "latin-1"):
        shown = printable(data.decode(encoding, errors="replace"))
        assert not set(shown) & CONTROLS
        assert printable(shown) == shown


@examples(200)
@given(data=outputs)
def test_console_is_shown_without_controls(place: Path, data: bytes) -> None:
    path = place / "console.log"
    path.write_bytes(data)
    with watched():
        shown = tail(path)
    assert len(shown) <= 40
    assert not set("".join(shown)) & (CONTROLS | {"\n"})


# It runs what is on its command line as a command of a build, and logs to stderr and to a file.
# VmHWM: the maximum of getrusage() begins with that of the process that started this one.
LOGGED = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from image_factory.base import command, log
log.set_up()
with log.also_to_file(Path(sys.argv[1])):
    if sys.argv[2] == "probe":
        command.read_until(["cat", "/dev/zero"], b"Linux version", 3)
    else:
        command.run(sys.argv[2:], timeout=120)
print(next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmHWM:")))
"""


def run_logged(log: Path, stderr: Path, *argv: str) -> int:
    """Run *argv* with the logs given; return the most memory that it took, in bytes."""
    words = [sys.executable, "-c", LOGGED, log, *argv]
    with stderr.open("wb") as file:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, timeout=PATIENCE)
    assert done.returncode == 0
    return int(done.stdout) * K


def check_log(path: Path) -> None:
    assert not set(path.read_text(encoding="utf-8", errors="strict")) & CONTROLS


@pytest.mark.parametrize("seed", range(4 * FACTOR))
def test_program_that_prints_anything(tmp_path: Path, seed: int) -> None:
    numbers = random.Random(seed)
    (tmp_path / "data").write_bytes(
        b"".join(numbers.choice(ESCAPES) + numbers.randbytes(numbers.choice([0, 1, 3])) for _ in range(100_000))
    )
    run_logged(tmp_path / "log", tmp_path / "stderr", "cat", str(tmp_path / "data"))
    check_log(tmp_path / "log")
    check_log(tmp_path / "stderr")
    assert (tmp_path / "log").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("unit", "megabytes"), [(b"x", 100), (b"\r", 100), (b"\x00", 20), (b"\x1b]", 20), (b"\xff", 20)], ids=repr
)
def test_program_that_never_ends_its_line(tmp_path: Path, unit: bytes, megabytes: int) -> None:
    """Up to 100 MB arrive in lines of some length, and memory doesn't grow with them."""
    program = f"import os\nfor _ in range({megabytes}): os.write(1, ({unit!r} * 1_000_000)[:1_000_000])"
    assert run_logged(Path("/dev/null"), Path("/dev/null"), sys.executable, "-c", program) < 64 * M


def test_probe_of_a_kernel_that_prints_without_end(tmp_path: Path) -> None:
    """Memory doesn't grow with what it prints."""
    assert run_logged(Path("/dev/null"), Path("/dev/null"), "probe") < 64 * M


@pytest.mark.parametrize("unit", [b"x", b"\x1b]", b"\n", b"\r", b"\xe2\x82"], ids=repr)
def test_console_of_a_hundred_megabytes(place: Path, unit: bytes) -> None:
    """Its end is shown, and only that is read."""
    path = place / "large-console.log"
    with path.open("wb") as file:
        for _ in range(100):
            file.write((unit * 1_000_000)[:1_000_000])
    tracemalloc.start()
    try:
        with watched():
            shown = tail(path)
        assert tracemalloc.get_traced_memory()[1] < 16 * M
    finally:
        tracemalloc.stop()
        path.unlink()
    assert sum(map(len, shown)) <= 64 * K
    assert not set("".join(shown)) & (CONTROLS | {"\n"})


@examples(200)
@given(status=st.integers(-64, 255).filter(bool), said=st.lists(st.text(max_size=400), max_size=3))
def test_command_that_fails_in_any_way(status: int, said: list[str]) -> None:
    error = CommandError(["program", "argument"], status, [line.partition("\n")[0] for line in said])
    check_one_line(error)


def test_debug_shows_no_controls(tmp_path: Path) -> None:
    """A traceback has the message of the error, and so what a program printed last."""
    program = r"""
        import sys
        sys.path.insert(0, sys.argv[1])
        from image_factory import cli
        from image_factory.base import command
        def run(argv):
            command.run(["sh", "-c", r"printf '\033]0;title\007\033[31mred\302\233\b'; exit 1"])
        cli._run = run
        sys.exit(cli.main(["--debug"]))
    """
    argv = [sys.executable, "-c", textwrap.dedent(program), REPOSITORY]
    with (tmp_path / "stderr").open("wb") as stderr:
        assert subprocess.run(argv, stderr=stderr, timeout=PATIENCE).returncode == 1
    text = (tmp_path / "stderr").read_text()
    assert "Traceback" in text
    assert "CommandError: sh failed with status 1: red??" in text
    check_log(tmp_path / "stderr")
