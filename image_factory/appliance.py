"""Mount the root filesystem of a disk in libguestfs' appliance: a small virtual machine, which needs no root.

guestfish(1) runs it, and reads commands from image-factory.  The guest's filesystem never meets the
kernel of this machine.
"""

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import command, layout
from .command import Conversation
from .errors import CommandError, ConfigurationError
from .log import logger, step
from .model import Build, Disk, Partition, Plan

STEP = "Mounting the root partition"

BOOT = Path("/boot")
MODULES = Path("/lib/modules")
KERNEL_PACKAGE = "linux-image-cloud-amd64"

_ARGV = ["guestfish"]

# guestfish shuts the appliance down when its input ends, but it doesn't look at that while it boots.
_STOP_SECONDS = 30.0

# Under emulation the appliance boots slowly, but nothing is waited for for ever.
_ANSWER_SECONDS = 1800.0

# As in image-factory-sudo-helper: what is shown of a file at most, and of all.  A heading counts, too.
_DEEPEST = 8
_SHOWN_OF_FILE = 1 << 20
_SHOWN = 16 << 20
_HEADING = 1 << 10


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    return _ARGV


def check(plan: Plan) -> None:
    """Raise ConfigurationError unless libguestfs finds a kernel for its appliance."""
    kernels = [path for path in BOOT.glob("vmlinuz-*") if (MODULES / _version(path) / "modules.dep").is_file()]
    if not kernels:
        raise ConfigurationError(
            f"mount-via = guestfs needs a kernel in {BOOT} with its modules in {MODULES}.",
            hint=f"Install one: apt-get install {KERNEL_PACKAGE}",
        )
    # libguestfs takes the newest.
    kernel = max(kernels, key=_sort_key)
    if not os.access(kernel, os.R_OK):
        raise ConfigurationError(
            f"mount-via = guestfs needs to read the kernel {kernel}.", hint=f"Allow it: sudo chmod a+r {kernel}"
        )


def _version(kernel: Path) -> str:
    return kernel.name.partition("-")[2]


def _sort_key(kernel: Path) -> list[tuple[int, str]]:
    return [(int(digits or 0), other) for digits, other in re.findall(r"([0-9]+)|([^0-9]+)", _version(kernel))]


def describe(build: Build, shown: Sequence[str], removed: Sequence[str]) -> list[tuple[str, list[list[str]]]]:
    """Return the steps on the tree with their commands; nothing is *shown* if that is empty."""
    # The commands for guestfish itself are no commands for a shell.
    return [
        (STEP, [_ARGV, *_comments(_add_line(Disk(build.disk_path)), "run", _mount_line("DEVICE"))]),
        *([("Showing installer logs", _comments(*(f"download /{pattern}" for pattern in shown)))] if shown else []),
        ("Removing installer logs", _comments(*(f"rm-rf /{pattern}" for pattern in removed))),
        ("Freeing unused blocks", [_punch_argv(build), *_comments("sync", "-fstrim /")]),
        ("Unmounting", _comments("umount /", "shutdown")),
    ]


def _comments(*lines: str) -> list[list[str]]:
    return [["#", line] for line in lines]


def _add_line(disk: Disk) -> str:
    # ``unsafe``: like the installation, the build starts anew if the machine crashes.
    return f"add {quoted(str(disk.path))} format:raw discard:besteffort cachemode:unsafe"


def _mount_line(device: str) -> str:
    return f"mount-options noatime {quoted(device)} /"


def _punch_argv(build: Build) -> list[str]:
    return ["fallocate", "--punch-hole", "--length", "4096", str(_scratch(build))]


def _scratch(build: Build) -> Path:
    return build.directory / "appliance-file"


def quoted(text: str) -> str:
    """Return *text* as one word for guestfish, whatever bytes it has."""
    if re.fullmatch(r"[A-Za-z0-9/][A-Za-z0-9/._:+@,-]*", text):
        return text
    plain = re.compile(r"[A-Za-z0-9/._:+@,-]")
    return '"' + "".join(
        chr(byte) if plain.fullmatch(chr(byte)) else f"\\x{byte:02x}" for byte in os.fsencode(text)
    ) + '"'  # fmt: skip


def environment(build: Build, disk: Disk) -> dict[str, str]:
    """Return the environment of guestfish: no libvirt, and no KVM where it can't be used."""
    # Its files go away with the working directory, also when it is killed.
    variables = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_TMPDIR": str(build.directory)}
    if disk.virt_type == "qemu":
        variables["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
    return {**os.environ, **variables}


@dataclass(frozen=True)
class ApplianceTree:
    """A ``Tree`` that is mounted in the appliance that *guestfish* runs."""

    build: Build
    guestfish: Conversation
    device: str
    partition: Partition | None

    def has(self, path: str) -> bool:
        """Return whether *path* is there, without a link on the way."""
        return bool(self._matching(path))

    def show(self, patterns: Sequence[str]) -> str:
        """Return the files that *patterns* match; of a long one the end."""
        texts, left = [], _SHOWN
        found = (path for pattern in patterns for path in self._matching(pattern))
        for path in (file for top in found for file in self._files(top)):
            if left <= _HEADING:
                texts.append("... The other files are not shown.\n")
                break
            text, count = self._shown(path, min(left - _HEADING, _SHOWN_OF_FILE))
            texts.append(text)
            left -= _HEADING + count
        return "".join(texts)

    def _files(self, path: str, depth: int = 0) -> Iterator[str]:
        if self._is("dir", path):
            for name in self._names(path) if depth < _DEEPEST else []:
                yield from self._files(f"{path}/{name}", depth + 1)
        elif self._is("file", path):
            yield path

    def _shown(self, path: str, limit: int) -> tuple[str, int]:
        """Return what shows the last *limit* bytes of the file *path*, and how many they are."""
        size = int(self.guestfish.ask(f"filesize {quoted('/' + path)}")[-1])
        hidden = max(0, size - limit)
        data = self._into_file("download-offset", path, str(hidden), str(size - hidden))
        text = data.decode("utf-8", errors="replace")
        heading = f"==> /{_shown_name(path)} <==\n" + (f"... {hidden} bytes are not shown.\n" if hidden else "")
        return heading + text + ("" if text.endswith("\n") or not text else "\n"), len(data)

    def remove(self, patterns: Sequence[str]) -> list[str]:
        """Remove what *patterns* match."""
        removed = []
        for pattern in patterns:
            for path in self._matching(pattern):
                self.guestfish.do(f"rm-rf {quoted('/' + path)}")
                removed.append(_shown_name(path))
        return removed

    def trim(self) -> int | None:
        """Free the unused blocks."""
        # QEMU doesn't say it when the filesystem that the disk is on can't free blocks.
        _scratch(self.build).write_bytes(bytes(4096))
        try:
            command.run(_punch_argv(self.build))
        except CommandError:
            return None
        self.guestfish.do("sync")
        if any("error:" in line for line in self.guestfish.do("-fstrim /")):
            return None
        return self._statvfs("bfree") * self._statvfs("frsize")

    def block_size(self) -> int:
        """Return the size of a block."""
        return self._statvfs("bsize")

    def _statvfs(self, field: str) -> int:
        values = dict(line.split(": ", 1) for line in self.guestfish.ask("statvfs /") if ": " in line)
        return int(values[field])

    def _matching(self, pattern: str) -> list[str]:
        """Return the paths that *pattern* matches; none where the way there leads through a link."""
        *parents, name_pattern = pattern.split("/")
        for length in range(1, len(parents) + 1):
            if not self._is("dir", "/".join(parents[:length])):
                return []
        parent = "/".join(parents)
        return [
            os.path.join(parent, name) for name in self._names(parent) if fnmatch.fnmatchcase(name, name_pattern)
        ]  # fmt: skip

    def _is(self, kind: str, path: str) -> bool:
        return self.guestfish.ask(f"is-{kind} {quoted('/' + path)}")[-1:] == ["true"]

    def _names(self, directory: str) -> list[str]:
        return sorted(os.fsdecode(name) for name in self._into_file("ls0", directory).split(b"\0") if name)

    def _into_file(self, verb: str, path: str, *more: str) -> bytes:
        file = _scratch(self.build)
        self.guestfish.ask(" ".join([verb, quoted("/" + path), quoted(str(file)), *more]))
        return file.read_bytes()


def _shown_name(path: str) -> str:
    """Return *path* as the helper prints it: without what a terminal would obey, or would be another line."""
    return "".join(character if character.isprintable() else "?" for character in path)


@contextmanager
def mounted(build: Build, disk: Disk) -> Iterator[ApplianceTree]:
    """Give the root filesystem of *disk*, mounted in the appliance; NoSystemError if there is none."""
    partitions = layout.read_partitions(disk.path)
    environ = environment(build, disk)
    with ExitStack() as stack:
        with step(STEP):
            guestfish = stack.enter_context(
                command.conversation(_ARGV, env=environ, timeout=_ANSWER_SECONDS, stop_seconds=_STOP_SECONDS)
            )
            guestfish.do(_add_line(disk))
            guestfish.do("run")
            tree = _mount_root(build, guestfish, partitions)
        yield tree
        with step("Unmounting"):
            guestfish.do("umount /")
            guestfish.do("shutdown")


def shell(build: Build, disk: Disk) -> None:
    """Open guestfish, which has a shell's commands, on the root filesystem of *disk*."""
    with mounted(build, disk) as tree:
        device = tree.device
    argv = [*_ARGV, "--format=raw", "--add", str(disk.path), "--mount", device]
    command.interact(argv, env=environment(build, disk))


def _mount_root(build: Build, guestfish: Conversation, partitions: list[Partition]) -> ApplianceTree:
    found = _filesystems(guestfish)
    if not found:
        # It says so, and what there is.
        layout.root_candidates(partitions)
    for device, filesystem in found:
        logger.info("%s has %s.", device, filesystem)
        guestfish.do(_mount_line(device))
        tree = ApplianceTree(build, guestfish, device, _partition_of(device, partitions))
        if any(tree.has(mark) for mark in layout.ROOT_MARKS):
            return tree
        guestfish.do("umount /")
    raise layout.no_root(partitions)


def _filesystems(guestfish: Conversation) -> list[tuple[str, str]]:
    """Return the devices that can hold a root, btrfs subvolumes among them, with their types, the largest first."""
    lines = guestfish.do("list-filesystems")
    matches = [re.fullmatch(r"((?:btrfsvol:)?/dev/\S.*): (\w+)", line) for line in lines]
    found = [(match[1], match[2]) for match in matches if match and match[2] in layout.ROOT_FILESYSTEMS]

    def size(entry: tuple[str, str]) -> int:
        device = re.sub(r"btrfsvol:(/dev/[^/]+).*", r"\1", entry[0])
        return int(guestfish.ask(f"blockdev-getsize64 {quoted(device)}")[-1])

    return sorted(found, key=size, reverse=True)


def _partition_of(device: str, partitions: list[Partition]) -> Partition | None:
    match = re.fullmatch(r"(?:btrfsvol:)?/dev/sda([0-9]+)(?:/.*)?", device)
    return next((partition for partition in partitions if match and partition.number == int(match[1])), None)
