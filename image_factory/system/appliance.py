"""Mount the filesystems of a disk in libguestfs' appliance: a small virtual machine, which needs no root.

guestfish(1) runs it, and reads commands from image-factory.  The guest's filesystem never meets the
kernel of this machine.
"""

import fnmatch
import os
import re
import shlex
import stat
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..base import command
from ..base.cleanup import released
from ..base.command import Conversation
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..base.log import logger, step
from ..model import Build, Change, Disk, Entry, Filesystem, Placed, Plan, Subvolume, Volume
from . import assembly, partitions
from .rehearsal import Call
from .tree import Branch, Tree

XFS_PACKAGE = "libguestfs-xfs"
BOOT = Path("/boot")
MODULES = Path("/lib/modules")
KERNEL_PACKAGE = "linux-image-cloud-amd64"

_ARGV = ["guestfish"]

# guestfish shuts the appliance down when its input ends, but it doesn't look at that while it boots.
_STOP_SECONDS = 30.0

# Under emulation the appliance boots slowly, but nothing is waited for for ever.
_ANSWER_SECONDS = 1800.0

_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}

# As in image-factory-sudo-helper: what is shown of a file at most, and of all.  A heading counts, too.
_DEEPEST = 8
_SHOWN_OF_FILE = 1 << 20
_SHOWN = 16 << 20
_HEADING = 1 << 10
# A file that is read as a whole has at most so many bytes.
_WHOLE = 1 << 20
# Of files that are written at once.
_LARGEST_ARCHIVE = 64 << 20
# So long is a list of names at most.
_LARGEST_ANSWER = 65 << 20
# So much of a file is asked for at once: a message of libguestfs has 4 MiB at most.
_AT_ONCE = 2 << 20
# Of so many names the status is asked for at once: guestfish takes no line of 8 KiB, and longer names one by one.
_NAMES_AT_ONCE = 64
_LONGEST_NAME = 48
_LOST_AND_FOUND = "lost+found"
_LABEL = "security.selinux"

# As in the helper; an archive has some more.
_KEYS_SHOWN = 48 << 20
_KEY_MARK = "PRIVATE KEY"
_KEY_STORES = ("bks", "der", "jceks", "jks", "key", "keystore", "p12", "p8", "pfx", "pk8")

# For names that it reads, du counts a directory with several names once, and doesn't go there again.
_USED = 'printf ".\\0" | du -s -k --files0-from=-'

# What the kernel says of a name that is not there, or of one that can't be.
_NOT_THERE = (": No such file or directory", ": Not a directory", ": File name too long")

# A structure of numbers of libguestfs', as those of lstatns and statvfs.
Status = dict[str, int]

# So many entries of a top directory are measured.
_USAGES = 256

# A hostile filesystem has directories that are linked into each other, and any number of paths of a few names.
_WALK_SECONDS = 600
_ENTRIES = 1 << 20


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    return _ARGV


def check(plan: Plan) -> None:
    """Raise ConfigurationError unless libguestfs finds a kernel for its appliance."""
    check_kernel("mount-via = guestfs")


def check_kernel(what: str) -> None:
    """Raise ConfigurationError unless libguestfs finds a kernel for its appliance, which *what* needs."""
    kernels = [path for path in BOOT.glob("vmlinuz-*") if (MODULES / _version(path) / "modules.dep").is_file()]
    if not kernels:
        raise ConfigurationError(
            f"{what} needs a kernel in {BOOT} with its modules in {MODULES}.",
            hint=f"Install one: apt-get install {KERNEL_PACKAGE}",
        )
    # libguestfs takes the newest.
    kernel = max(kernels, key=_sort_key)
    if not os.access(kernel, os.R_OK):
        raise ConfigurationError(
            f"{what} needs to read the kernel {kernel}.", hint=f"Allow it: sudo chmod a+r {kernel}"
        )


def _version(kernel: Path) -> str:
    return kernel.name.partition("-")[2]


def _sort_key(kernel: Path) -> list[tuple[int, str]]:
    return [(int(digits or 0), other) for digits, other in re.findall(r"([0-9]+)|([^0-9]+)", _version(kernel))]


# The commands of guestfish, by the operations of a filesystem, for each of their paths.
_LINES = {
    "show": "pread {place}/{}",
    "entries": "ls0 {place}/{}",
    "read": "pread {place}/{}",
    "load": "pread {place}/{}",
    "write": "upload LOCAL {place}/{}",
    "look": "lstatns {place}/FILE",
    "put": "tar-in LOCAL {place}/ xattrs:true",
    "rename": "rename {place}/{} {place}/NAME",
    "remove": "rm-rf {place}/{}",
    "truncate": "truncate {place}/{}",
    "usage": "du {place}/{}",
    "zero_unused_blocks": "zerofree {}",
    "fill_unused_blocks": "zero-free-space {place}",
    "zero_swap": "mkswap {}",
}
_PLACE = "/partition-N"


def mounting(build: Build, disk: Disk) -> list[list[str]]:
    """Return the commands that mount the system on *disk*; those for guestfish itself are none for a shell."""
    lines = (f"mkmountpoint {_PLACE}", _mount_line("DEVICE", _PLACE))
    return [_ARGV, *_comments(_add_line(disk), "run", *lines)]


def commands(build: Build, calls: Sequence[Call]) -> list[list[str]]:
    """Return the commands that *calls* on the system are."""
    found: list[list[str]] = []
    for call in calls:
        if call.operation == "contents":
            found += [
                *_comments(f"debug sh {quoted(_PRINT)}", f"download {_CONTENTS}/pipe LOCAL"),
                contents_argv(build),
            ]
        elif call.operation == "trim":
            found += [_punch_argv(build), *_comments("sync", f"-fstrim {_PLACE}")]
        elif line := _LINES.get(call.operation):
            # What is behind a path is its new name or its mode.  Paths that no word names are known in the build only.
            paths = call.words[:1] if call.operation in ("write", "rename") else call.words or ("",)
            found += _comments(*(line.format(path, place=_PLACE) for path in paths))
    return found


def unmounting(build: Build, disk: Disk) -> list[list[str]]:
    """Return the commands that unmount the system on *disk*."""
    return _comments("umount-all", "shutdown")


def _comments(*lines: str) -> list[list[str]]:
    return [["#", line] for line in lines]


def _add_line(disk: Disk) -> str:
    # What is written goes to an overlay then.
    if disk.read_only:
        return f"add {quoted(str(disk.path))} format:raw readonly:true"
    # ``unsafe``: like the installation, the build starts anew if the machine crashes.
    return f"add {quoted(str(disk.path))} format:raw discard:besteffort cachemode:unsafe"


def _mount_line(device: str, place: str, *options: str) -> str:
    return f"mount-options {','.join(('noatime', *options))} {quoted(device)} {place}"


def _mount_volume_line(volume: Volume, place: str) -> str:
    # As the helper does: of btrfs all subvolumes.
    options = {"btrfs": ["subvolid=5"], "vfat": ["umask=0077", "tz=UTC"]}
    return _mount_line(_device(volume), place, *options.get(volume.filesystem or "", []))


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


def environment(build: Build) -> dict[str, str]:
    """Return the environment of guestfish: no libvirt, and no KVM where it can't be used."""
    # Its files go away with the working directory, also when it is killed.
    variables = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_TMPDIR": str(build.directory)}
    if build.virt_type == "qemu":
        variables["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
    return {**os.environ, **variables}


@dataclass(frozen=True)
class ApplianceFilesystem:
    """A ``Filesystem`` that is mounted at *place* in the appliance that *guestfish* runs."""

    build: Build
    guestfish: Conversation
    place: str
    volume: Volume
    subvolumes: tuple[Subvolume, ...] = ()
    # Those that are known to be there, without a link on the way.
    _directories: set[str] = field(default_factory=set, compare=False, repr=False)

    def has(self, path: str) -> bool:
        """Return whether *path* is there, without a link on the way."""
        return bool(self._matching(path))

    def show(self, patterns: Sequence[str]) -> str:
        """Return the files that *patterns* match; of a long one the end."""
        texts, left = [], _SHOWN
        found = (path for pattern in patterns for path in self._matching(pattern))
        deadline = time.monotonic() + _WALK_SECONDS
        for path in (file for top in found for file in self._files(top, deadline)):
            if left <= _HEADING:
                texts.append("... The other files are not shown.\n")
                break
            text, count = self._shown(path, min(left - _HEADING, _SHOWN_OF_FILE))
            texts.append(text)
            left -= _HEADING + count
        return "".join(texts)

    def _files(self, path: str, deadline: float, depth: int = 0) -> Iterator[str]:
        if time.monotonic() > deadline:
            raise _endless(path)
        kind = self._kind(path)
        if kind == "directory":
            for name in self._names(path) if depth < _DEEPEST else []:
                yield from self._files(f"{path}/{name}", deadline, depth + 1)
        elif kind == "file":
            yield path

    def _shown(self, path: str, limit: int) -> tuple[str, int]:
        """Return what shows the last *limit* bytes of the file *path*, and how many they are."""
        size = self._size(path)
        hidden = max(0, size - limit)
        data = self._content(path, hidden, size - hidden)
        text = data.decode("utf-8", errors="replace")
        heading = f"==> /{_shown_name(path)} <==\n" + (f"... {hidden} bytes are not shown.\n" if hidden else "")
        return heading + text + ("" if text.endswith("\n") or not text else "\n"), len(data)

    def entries(self, patterns: Sequence[str]) -> list[Entry]:
        """Return what *patterns* match."""
        return [Entry(path, _kind_of(status)) for path, status in self._statuses(self._matching_any(patterns)).items()]

    def _kind(self, path: str) -> str | None:
        """Return what *path* is, None if it is not there."""
        status = self._status(path)
        return _kind_of(status) if status else None

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        """Return the files that *patterns* match."""
        return {
            path: self._content(path, 0, status["st_size"])
            for path, status in self._statuses(self._matching_any(patterns)).items()
            if _kind_of(status) == "file" and status["st_size"] <= _WHOLE
        }

    def write(self, path: str, data: bytes, mode: int) -> None:
        """Have *data* in the file *path*."""
        directory = self._made(path.rpartition("/")[0])
        is_new = not self.has(path)
        if not is_new and self._kind(path) != "file":
            raise BuildError(f"/{_shown_name(path)} of the guest is no regular file.")
        self._make_changeable(directory, *([] if is_new else [path]))
        file = _scratch(self.build)
        file.write_bytes(data)
        # It keeps the file that is there.
        self.guestfish.do(f"upload {quoted(str(file))} {self._word(path)}")
        if is_new:
            self.guestfish.do(f"chmod {mode:04o} {self._word(path)}")
            self._copy_label(directory, path)

    def _made(self, path: str) -> str:
        """Return *path*, a directory, whose missing parts are made."""
        parent, _, name = path.rpartition("/")
        if path and name not in self._names(self._made(parent)):
            self._make_changeable(parent)
            self.guestfish.do(f"mkdir-mode {self._word(path)} 0755")
            self._copy_label(parent, path)
        elif path and self._kind(path) != "directory":
            raise BuildError(f"/{_shown_name(path)} of the guest is no directory.")
        return path

    def _copy_label(self, directory: str, new: str) -> None:
        """Give what is *new* in *directory* the label that SELinux, where it is on, would give it."""
        label = self._label(directory)
        if label:
            self.guestfish.do(f"lsetxattr {_LABEL} {quoted(label)} {len(label)} {self._word(new)}")

    def _label(self, path: str) -> str:
        """Return the label of *path*, empty if it has none."""
        # lgetxattr prints a value without the end of a line, so the answer would have none.
        text = "\n".join(self.guestfish.ask(f"-lgetxattrs {self._word(path)}"))
        found = re.search(rf"attrname: {re.escape(_LABEL)}\n *attrval: ([!-~]+)", text)
        return found[1].removesuffix("\\x00") if found else ""

    def look(self, paths: Sequence[str]) -> list[Entry]:
        """Return those of *paths* that are there."""
        known = [path for path in paths if self._is_directory(path.rpartition("/")[0])]
        return [self._entry(path, _kind_of(status)) for path, status in self._statuses(known).items()]

    def _entry(self, path: str, kind: str) -> Entry:
        lines = self.guestfish.do(f"readlink {self._word(path)}") if kind == "link" else []
        return Entry(path, kind, "\n".join(lines))

    def put(self, items: Sequence[Placed], contents: Path) -> None:
        """Make *items*, whose bytes are in the file *contents*."""
        # A whole archive takes no longer than a single file.
        labels: dict[str, str] = {}
        file = _scratch(self.build)
        with contents.open("rb") as data:
            for group in _groups_to_put(items):
                with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
                    for item, label in self._prepared(group, labels):
                        data.seek(item.offset)
                        archive.addfile(_member(item, label), data if item.size else None)
                self.guestfish.do(f"tar-in {quoted(str(file))} {self._word('')} xattrs:true")

    def _prepared(self, items: Sequence[Placed], made: dict[str, str]) -> Iterator[tuple[Placed, str]]:
        """Give those of *items* that an archive is to have, with their labels.

        *made* has the labels of the directories that are, or will be, made before.
        """
        outside = [item.path for item in items if _directory_of(item.path) not in made]
        kinds = {entry.path: entry.kind for entry in self.look(outside)}
        seen: dict[str, str] = {}
        for item in items:
            directory, kind = _directory_of(item.path), kinds.get(item.path)
            if kind not in (None, item.kind):
                raise BuildError(f"/{_shown_name(item.path)} of the guest is no {item.kind}.")
            if directory not in made and directory not in seen:
                if not self._is_directory(directory):
                    raise BuildError(f"/{_shown_name(directory)} of the guest is no directory.")
                self._make_changeable(directory)
                seen[directory] = self._label(directory)
            if kind == "directory":
                continue
            label = made.get(directory, seen.get(directory, ""))
            if kind == "file":
                self._make_changeable(item.path)
                label = self._label(item.path)
            if item.kind == "directory":
                made[item.path] = label
            yield item, label

    def rename(self, path: str, name: str) -> None:
        """Give *path* another *name*."""
        directory = path.rpartition("/")[0]
        new = os.path.join(directory, name)
        if not self.has(path) or self.has(new):
            raise BuildError(f"/{_shown_name(path)} of the guest can't be named {name}.")
        self._make_changeable(directory, path)
        self._directories.clear()
        self.guestfish.do(f"rename {self._word(path)} {self._word(new)}")

    def remove(self, patterns: Sequence[str]) -> list[Change]:
        """Remove what *patterns* match; the size of a directory is what it takes on the disk."""
        removed = []
        paths = self._matching_any(patterns)
        self._directories.clear()
        for path in paths:
            gone = self._measured(path)
            if self.guestfish.do(f"-rm-rf {self._word(path)}"):
                self._make_changeable(path.rpartition("/")[0], path)
                if self._kind(path) == "directory":
                    self._walk(path, "chattr -R -f -i -a .")
                self.guestfish.do(f"rm-rf {self._word(path)}")
            removed.append(gone)
        return removed

    def _measured(self, path: str) -> Change:
        kind = self._kind(path)
        if kind == "directory":
            count = self._number(path, f"find . -printf . | head -c {_ENTRIES + 1} | wc -c")
            if count > _ENTRIES:
                raise BuildError(f"/{_shown_name(path)} of the guest has more than {_ENTRIES} entries.")
            return Change(_shown_name(path), count, self._number(path, _USED) << 10)
        return Change(_shown_name(path), 1, self._size(path) if kind == "file" else 0)

    def _number(self, directory: str, script: str) -> int:
        """Return the number that the shell's *script* prints first; see _walk."""
        lines = self._walk(directory, script)
        if not lines:
            raise BuildError(f"/{_shown_name(directory)} of the guest can't be looked into.")
        return int(lines[0].split()[0])

    def _walk(self, directory: str, script: str) -> list[str]:
        """Return what the shell's *script* prints in *directory*; BuildError if it comes to no end."""
        # libguestfs' calls for it know no limit.
        inner = f"cd {_shell_word(f'/sysroot{self.place}/{directory}')} && {script}"
        outer = f"timeout {_WALK_SECONDS} sh -c {_shell_word(inner)} 2>&-; echo $?"
        *lines, status = self.guestfish.ask(f"debug sh {quoted(outer)}")
        # See timeout(1).
        if status == "124":
            raise _endless(directory)
        return lines

    def truncate(self, patterns: Sequence[str]) -> list[Change]:
        """Empty the files that *patterns* match."""
        emptied = []
        deadline = time.monotonic() + _WALK_SECONDS
        for top in self._matching_any(patterns):
            sizes = {path: self._size(path) for path in self._files(top, deadline)}
            files = [path for path, size in sizes.items() if size]
            self._make_changeable(*files)
            for path in files:
                self.guestfish.do(f"truncate {self._word(path)}")
            if files:
                emptied.append(Change(_shown_name(top), len(files), sum(sizes.values())))
        return emptied

    def _make_changeable(self, *paths: str) -> None:
        """Take the attributes from *paths* that keep root from changing them, where there are some."""
        for path in paths:
            # Neither a link nor FAT has any, and it says so.
            self.guestfish.ask(f"-set-e2attrs {self._word(path)} ia clear:true")

    def _size(self, path: str) -> int:
        return (self._status(path) or {}).get("st_size", 0)

    def load(self, path: str, most: int, offset: int = 0) -> bytes | None:
        """Return at most *most* bytes at *offset* of the file *path*."""
        status = self._status(path) if self._is_directory(path.rpartition("/")[0]) else None
        if status is None or _kind_of(status) != "file":
            return None
        return self._content(path, offset, min(most, status["st_size"] - offset))

    def _content(self, path: str, offset: int, size: int) -> bytes:
        """Return *size* bytes at *offset* of the file *path*, which has them."""
        # libguestfs' download waits for udev each time, which takes 0.3 s under emulation.
        parts = []
        for start in range(offset, offset + size, _AT_ONCE):
            count = min(_AT_ONCE, offset + size - start)
            parts.append(self.guestfish.ask_bytes(f"pread {self._word(path)} {count} {start}", _AT_ONCE))
        return b"".join(parts)

    def _is_directory(self, path: str) -> bool:
        """Return whether *path* is a directory, and no link is on the way there."""
        parent, _, name = path.rpartition("/")
        if path and path not in self._directories:
            if name in ("", ".", "..") or not self._is_directory(parent) or self._kind(path) != "directory":
                return False
            self._directories.add(path)
        return True

    def _status(self, path: str) -> Status | None:
        """Return the status of *path*, a link itself, None if it is not there."""
        lines = self.guestfish.ask(f"-lstatns {self._word(path)}")
        # The path of what is wrong has bytes of the guest's.
        if lines and lines[0].startswith("st_dev: "):
            return _numbers(lines)
        if lines and lines[-1].endswith(_NOT_THERE):
            return None
        reason = lines[-1].rpartition(": ")[2] if lines else "libguestfs says nothing of it"
        raise BuildError(f"/{_shown_name(path)} of the guest can't be looked at: {_shown_name(reason)}")

    def _statuses(self, paths: Sequence[str]) -> dict[str, Status]:
        """Return the statuses of those of *paths* that are there, of many of a directory at once."""
        known: dict[str, Status] = {}
        for directory, names in _groups(paths):
            answer = "\n".join(self.guestfish.ask(f'lstatnslist {self._word(directory)} "{" ".join(names)}"'))
            statuses = (_numbers(part.splitlines()) for part in answer.split("\n}"))
            for name, status in zip(names, statuses, strict=False):
                # Of what it can't look at the inode is -1.
                if status.get("st_ino", -1) >= 0:
                    known[os.path.join(directory, name)] = status
        found = {path: known.get(path) or self._status(path) for path in paths}
        return {path: status for path, status in found.items() if status}

    def usage(self, top: str) -> dict[str, int]:
        """Return what the entries of the directory *top* take; what has several names counts once."""
        names = [os.path.join(top, name) for name in self._names(top)[:_USAGES]]
        others = (status for status in self._statuses(names).values() if _kind_of(status) != "directory")
        found = {".": sum(status["st_blocks"] * 512 for status in others)}
        script = (
            f'find . -mindepth 1 -maxdepth 1 -type d -printf "%P/\\0" | sort -z | head -z -n {_USAGES} | '
            'du -s -k -0 --files0-from=- | tr "\\n\\0" "?\\n"'
        )
        for line in self._walk(top, script):
            size, _, name = line.partition("\t")
            found[_shown_name(name.rstrip("/").replace("\ufffd", "?"))] = int(size) << 10
        return found

    def delete_subvolumes(self, paths: Sequence[str]) -> None:
        """Remove the subvolumes at *paths*."""
        self._directories.clear()
        for path in paths:
            self.guestfish.do(f"btrfs-subvolume-delete {self._word(path)}")
        # Their blocks are given back some time later, and no command of libguestfs waits for that.
        self.guestfish.do(f'debug sh "btrfs subvolume sync /sysroot{self.place}"')

    def set_read_only(self, path: str, value: bool) -> None:
        """Make the subvolume at *path* read-only, or writable."""
        # libguestfs has no call for it.  One that was received is changed, too.
        place = _shell_word(os.path.join(f"/sysroot{self.place}", path))
        line = f"btrfs property set -f -t subvol {place} ro {'true' if value else 'false'}"
        self.guestfish.do(f"debug sh {quoted(line)}")

    def key_files(self, top: str) -> dict[str, bytes]:
        """Return the files in the directory *top* that may have a private key, as the helper does."""
        # libguestfs has no call that searches a tree.  In an archive the files come at once, whatever their names are.
        archive = f"{self.place}.keys"
        stores = "[.](" + "|".join(_KEY_STORES) + r")\$"
        script = (
            'find . -type f -size -1025k ! -name "*.py[co]" -print0 >/tmp/all && '
            f'{{ xargs -0 -r grep -lZaF -e "{_KEY_MARK}" </tmp/all; grep -ziE "{stores}" /tmp/all; }} | '
            "sort -zu >/tmp/some && tar -cf - --null --no-recursion --hard-dereference -T /tmp/some | "
            f"head -c {_KEYS_SHOWN + 1} >/sysroot{archive} && echo done"
        )
        if self._walk(top, script) != ["done"]:
            raise BuildError(f"/{_shown_name(top)} of the guest can't be searched for private keys.")
        file = _scratch(self.build)
        self.guestfish.do(f"download {archive} {quoted(str(file))}")
        self.guestfish.do(f"rm {archive}")
        if file.stat().st_size > _KEYS_SHOWN:
            raise BuildError(f"The files that may have private keys are more than {_KEYS_SHOWN >> 20} MiB.")
        with tarfile.open(file, "r:") as members:
            return {
                os.path.join(top, member.name.removeprefix("./")): content.read()
                for member in members
                if member.isreg() and (content := members.extractfile(member))
            }

    @contextmanager
    def contents(self, places: Mapping[str, tuple[Filesystem, str]], options: Sequence[str]) -> Iterator[list[str]]:
        """Give the command that prints a tar of the system with *places*, which is in a file meanwhile."""
        found = [(point, filesystem, top) for point, (filesystem, top) in sorted(places.items())]
        words = shlex.join(tar_words([*places], options))
        script = _together(found, f"/sysroot{_CONTENTS}/root") + _HIDDEN + f"cd root && exec {words}\n"
        self.guestfish.do(f"mkmountpoint {_CONTENTS}")
        self.guestfish.do(f"debug sh {quoted(f'mkdir /sysroot{_CONTENTS}/root')}")
        _upload(self.guestfish, f"{_CONTENTS}/script", script.encode())
        file = self.build.directory / "contents.tar"
        with released(partial(file.unlink, missing_ok=True)):
            self.guestfish.do(f"debug sh {quoted(_PRINT)}")
            self.guestfish.do(f"download {_CONTENTS}/pipe {quoted(str(file))}")
            *said, status = ["", *self.guestfish.ask(f"debug sh {quoted(_PRINTED_LAST)}")]
            if status != "0":
                raise BuildError(f"The system can't be read in the appliance: {_shown_name(said[-1]) or status}")
            yield contents_argv(self.build)

    def trim(self) -> int | None:
        """Free the unused blocks."""
        # QEMU doesn't say it when the filesystem that the disk is on can't free blocks.
        _scratch(self.build).write_bytes(bytes(4096))
        try:
            command.run(_punch_argv(self.build))
        except CommandError:
            return None
        anew = [f"umount {self.place}", _mount_volume_line(self.volume, self.place)]
        # See loop.  Twice, as one build in twenty kept a leaf of metadata: probably in a group of blocks that a thread
        # of btrfs was just removing, as it does once it is mounted.
        rounds = [anew, anew] if self.volume.filesystem == "btrfs" else [[]]
        for lines in rounds:
            for line in [*lines, "sync"]:
                self.guestfish.do(line)
            if any("error:" in line for line in self.guestfish.do(f"-fstrim {self.place}")):
                return None
        return self._statvfs("bfree") * self._statvfs("frsize")

    def block_size(self) -> int:
        """Return the size of a block."""
        return self._statvfs("bsize")

    def discard_size(self) -> int:
        """Return what a logical volume frees at once: one in a thin pool whole chunks, 64 KiB at least."""
        if self.volume.partition is not None:
            return 0
        name = f"$(basename $(readlink -f {self.volume.name}))"
        # libguestfs has no call that tells it.
        lines = self.guestfish.ask(f"-debug sh {quoted(f'cat /sys/class/block/{name}/queue/discard_granularity')}")
        return next((int(line) for line in lines if line.isdigit()), 0)

    def forget(self) -> None:
        """Forget which directories are there."""
        self._directories.clear()

    def _statvfs(self, name: str) -> int:
        return _numbers(self.guestfish.ask(f"statvfs {self.place}"))[name]

    def _word(self, path: str) -> str:
        return quoted(f"{self.place}/{path}")

    def _matching(self, pattern: str) -> list[str]:
        """Return the paths that *pattern* matches; none where the way there leads through a link."""
        return self._matching_any([pattern])

    def _matching_any(self, patterns: Sequence[str]) -> list[str]:
        """Return the paths that *patterns* match, each once; a directory is read once for all."""
        names: dict[str, list[str]] = {}
        found = []
        for pattern in patterns:
            parent, _, name_pattern = pattern.rpartition("/")
            if parent not in names:
                names[parent] = self._names(parent) if self._is_directory(parent) else []
            for name in names[parent]:
                if fnmatch.fnmatchcase(name, name_pattern) and name != _LOST_AND_FOUND:
                    found.append(os.path.join(parent, name))
        return list(dict.fromkeys(found))

    def _names(self, directory: str) -> list[str]:
        file = _scratch(self.build)
        self.guestfish.ask(f"ls0 {self._word(directory)} {quoted(str(file))}")
        if file.stat().st_size > _LARGEST_ANSWER:
            where = _shown_name(directory)
            raise BuildError(f"/{where} of the guest has more than {_LARGEST_ANSWER >> 20} MiB of names.")
        return sorted(os.fsdecode(name) for name in file.read_bytes().split(b"\0") if name)


def _directory_of(path: str) -> str:
    return path.rpartition("/")[0]


def _groups_to_put(items: Sequence[Placed]) -> Iterator[list[Placed]]:
    """Give *items* in groups whose archives are not too large, but for that of a single large file."""
    group: list[Placed] = []
    size = 0
    for item in items:
        if group and size + item.size > _LARGEST_ARCHIVE:
            yield group
            group, size = [], 0
        group.append(item)
        size += item.size
    if group:
        yield group


def _member(item: Placed, label: str) -> tarfile.TarInfo:
    """Return what an archive has of *item*, with the *label* of SELinux, if it has one."""
    member = tarfile.TarInfo(item.path)
    types = {"file": tarfile.REGTYPE, "directory": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}
    member.type, member.mode, member.size = types[item.kind], item.mode, item.size
    member.uid, member.gid, member.linkname = item.uid, item.gid, item.target
    member.mtime = int(time.time())
    if label:
        member.pax_headers = {f"SCHILY.xattr.{_LABEL}": label}
    return member


def _numbers(lines: Iterable[str]) -> Status:
    """Return the fields of a structure that guestfish prints in *lines*, all of which are numbers."""
    found = (re.fullmatch(r" *(\w+): (-?[0-9]+)", line) for line in lines)
    return {match[1]: int(match[2]) for match in found if match}


def _kind_of(status: Status) -> str:
    return _KINDS.get(stat.S_IFMT(status["st_mode"]), "other")


def _groups(paths: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Give directories with names of *paths* in them, some at once, that are words of guestfish's lists as they are."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        directory, _, name = path.rpartition("/")
        if len(name) <= _LONGEST_NAME and re.fullmatch(r"[A-Za-z0-9._+@-]+", name):
            group = groups.setdefault(directory, [])
            group.append(name)
            if len(group) == _NAMES_AT_ONCE:
                yield directory, groups.pop(directory)
    yield from groups.items()


def _shell_word(text: str) -> str:
    """Return *text* as one word for a shell, without single quotes, which guestfish takes for its own."""
    return '"' + re.sub(r'(["$`\\])', r"\\\1", text) + '"'


def _endless(path: str) -> BuildError:
    return BuildError(f"/{_shown_name(path)} of the guest has too much below it to be looked at in {_WALK_SECONDS} s.")


def _shown_name(path: str) -> str:
    """Return *path* as the helper prints it: without what a terminal would obey, or would be another line."""
    return "".join(character if character.isprintable() else "?" for character in path)


@dataclass(frozen=True)
class ApplianceLogicalVolumes:
    """The ``LogicalVolumes`` of a disk."""

    guestfish: Conversation
    places: dict[str, str]

    def zero_unused_blocks(self, volume: Volume) -> None:
        """Unmount the ext filesystem on *volume*, and zero its unused blocks."""
        self.guestfish.do(f"umount {self.places[volume.name]}")
        if self.guestfish.do(f"-zerofree {quoted(volume.name)}"):
            logger.warning("The unused blocks of %s are not zeroed.", volume.name)

    def fill_unused_blocks(self, volume: Volume) -> bool:
        """Fill the filesystem with zeros, and free its blocks again; not where a thin pool could run full."""
        if self._room() < 0:
            return False
        place = self.places[volume.name]
        self.guestfish.do(f"zero-free-space {place}")
        self.guestfish.do("sync")
        self.guestfish.do(f"-fstrim {place}")
        return True

    def _room(self) -> int:
        """Return how much larger the thin pools are than the volumes in them: less than 0 if they can run full."""
        text = "\n".join(self.guestfish.ask("lvs-full"))
        volumes = re.findall(r"lv_attr: (.).*\n(?:.*\n)*? *lv_size: ([0-9]+)", text)
        return sum(int(size) * {"t": 1, "V": -1}.get(kind, 0) for kind, size in volumes)

    def zero_swap(self, volume: Volume) -> None:
        """Zero the swap space on *volume*, and make it anew with its UUID and its label."""
        names = [f"{key}:{quoted(value)}" for key, value in (("label", volume.label), ("uuid", volume.uuid)) if value]
        # Where it makes no hole, the next one writes zeros.
        self.guestfish.do(f"-blkdiscard {quoted(volume.name)}")
        self.guestfish.do(f"zero-device {quoted(volume.name)}")
        self.guestfish.do(" ".join(["mkswap", quoted(volume.name), *names]))


@contextmanager
def mounted(build: Build, disk: Disk, volumes: Sequence[Volume]) -> Iterator[Tree]:
    """Give the system on *volumes* of *disk*, mounted in the appliance; NoSystemError if there is none."""
    environ = environment(build)
    with ExitStack() as stack:
        with step(assembly.MOUNTING):
            guestfish = stack.enter_context(
                command.conversation(_ARGV, env=environ, timeout=_ANSWER_SECONDS, stop_seconds=_STOP_SECONDS)
            )
            guestfish.do(_add_line(disk))
            guestfish.do("run")
            found = _mount_all(build, guestfish, [*volumes, *_logical_volumes(guestfish, volumes)])
        with nullcontext() if disk.read_only else assembly.writable(found, disk.path.parent):
            yield found
        with step(assembly.UNMOUNTING):
            guestfish.do("umount-all")
            guestfish.do("shutdown")


# A directory in the appliance for what prints a tar of the system.
_CONTENTS = "/contents"
# Something is at the other end of the pipe at once, and the status is written before its end.  A pipe is opened when
# somebody reads from it, so nothing before that has the descriptors which libguestfs waits for.
_TAR = "unshare --mount --pid --fork sh script 2>log; echo $? >status"
_PRINT = f"cd /sysroot{_CONTENTS}; mkfifo pipe; {{ {{ {_TAR}; }} >pipe; }} </dev/null >/dev/null 2>&1 &"
_PRINTED_LAST = f"cd /sysroot{_CONTENTS} && tail -n 1 log; cat status"
# Where programs learn the names of users, and what of a tree the kernel shows on a machine that runs: as in the helper.
_HIDDEN = "for path in /etc /run; do mount -t tmpfs none $path || exit 125; done\n"
_UNSEEN = ("dev", "proc", "run", "sys")


def contents_argv(build: Build) -> list[str]:
    """Return the command that prints the tar which has come from the appliance."""
    return ["cat", str(build.directory / "contents.tar")]


def tar_words(points: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return the command that writes the tar of what is mounted at *points*, as the helper has it, which says why."""
    found = [os.path.join("./", point, _LOST_AND_FOUND) for point in sorted(points)]
    found += [f"./{name}/*" for name in _UNSEEN]
    clamp = ["--clamp-mtime"] if any(word.startswith("--mtime") for word in options) else []
    return [
        "/usr/bin/tar", "--create", "--file=-", "--format=posix", "--sort=name", "--numeric-owner",
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
        "--acls", "--selinux", "--xattrs", "--xattrs-include=user.*", "--xattrs-include=security.*",
        "--sparse", "--hole-detection=raw", "--warning=no-file-ignored",
        "--anchored", "--wildcards", "--no-wildcards-match-slash",
        *(f"--exclude={pattern}" for pattern in found),
        *options,
        *clamp,
        ".",
    ]  # fmt: skip


# A tmpfs in the appliance, which has what a script reads.
_SCRIPTS = "/scripts"
ROOT = f"/sysroot{_SCRIPTS}/root"
_PRINTED = 60_000
# Nothing of what the script starts outlives it.
_RUN = (
    f"cd /sysroot{_SCRIPTS}; {{ unshare --mount --pid --uts --ipc --net --fork --kill-child sh script <input; "
    f"echo $? >status; }} 2>&1 | tail -c {_PRINTED}; echo; cat status"
)


def run_script(tree: Tree, script: str, data: bytes, seconds: float) -> tuple[int, list[str]]:
    """Run the shell's *script* in the appliance that has *tree* mounted; return its status, and what it prints last.

    It reads *data*, and finds the system, put together, at ROOT.  It has a mount and a pid namespace of its own,
    and no network.  BuildError if it takes more than *seconds*, which ends the appliance.
    """
    filesystem = tree.branches[-1].filesystem
    assert isinstance(filesystem, ApplianceFilesystem)
    guestfish = filesystem.guestfish
    guestfish.do(f"mkmountpoint {_SCRIPTS}")
    place = f"/sysroot{_SCRIPTS}"
    guestfish.do(f"debug sh {quoted(f'mount -t tmpfs -o mode=700 scripts {place} && mkdir {ROOT}')}")
    branches = [(branch.point, branch.filesystem, branch.top) for branch in reversed(tree.branches)]
    _upload(guestfish, f"{_SCRIPTS}/script", (_together(branches, ROOT) + script).encode())
    _upload(guestfish, f"{_SCRIPTS}/input", data)
    *lines, status = ["", *guestfish.do(f"debug sh {quoted(_RUN)}", seconds=seconds)]
    if not status.isdigit():
        raise BuildError(f"The appliance can't run programs of the system: {status or 'it says nothing'}.")
    guestfish.do(f"debug sh {quoted(f'umount {place}')}")
    guestfish.do(f"rmmountpoint {_SCRIPTS}")
    # What was a directory may be a link now.
    for each in tree.filesystems:
        assert isinstance(each, ApplianceFilesystem)
        each.forget()
    return int(status), [line for line in lines if line]


def _together(places: Iterable[tuple[str, Filesystem, str]], root: str) -> str:
    """Return lines of shell that mount *places* below each other at *root*: points, filesystems and their directories.

    They are in the order in which they are mounted.
    """
    lines = []
    for point, filesystem, top in places:
        assert isinstance(filesystem, ApplianceFilesystem)
        source = _shell_word(os.path.join(f"/sysroot{filesystem.place}", top))
        point = _shell_word(os.path.join(root, point)) if point else root
        # The status by which tasks tell that their script did not begin.
        lines.append(f"mount --bind {source} {point} || exit 125\n")
    return "".join(lines)


def _upload(guestfish: Conversation, path: str, data: bytes) -> None:
    """Have *data*, which no file of this machine gets, in the new file *path* of the appliance."""
    descriptor = os.memfd_create("upload")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        guestfish.do(f"upload /proc/{os.getpid()}/fd/{descriptor} {path}")
    finally:
        os.close(descriptor)


def script_commands() -> list[list[str]]:
    """Return the commands of ``run_script``."""
    return _comments(f"upload LOCAL {_SCRIPTS}/script", f"debug sh {quoted(_RUN)}")


# The commands of guestfish that have a filesystem fill its partition; all but ext's want it mounted.
_GROW = {
    "ext2": ("e2fsck {device} correct:true", "resize2fs {device}"),
    "ext3": ("e2fsck {device} correct:true", "resize2fs {device}"),
    "ext4": ("e2fsck {device} correct:true", "resize2fs {device}"),
    "xfs": ("mount {device} /", "xfs-growfs /", "umount-all"),
    "btrfs": ("mount {device} /", "btrfs-filesystem-resize /", "umount-all"),
}


def growing(disk: Disk) -> list[list[str]]:
    """Return the commands of ``grow``, for a filesystem that only the build knows."""
    return [_ARGV, *_comments(_add_line(disk), "run", "GROW DEVICE", "shutdown")]


def grow(build: Build, disk: Disk, volume: Volume) -> None:
    """Have the filesystem on *volume* fill its partition, which has become larger; BuildError if it can't."""
    with command.conversation(
        _ARGV, env=environment(build), timeout=_ANSWER_SECONDS, stop_seconds=_STOP_SECONDS
    ) as guestfish:
        guestfish.do(_add_line(disk))
        guestfish.do("run")
        # Debian has its programs in a package of their own.
        if volume.filesystem == "xfs" and guestfish.do("feature-available xfs") != ["true"]:
            raise BuildError(
                "The appliance can't make xfs larger.", hint=f"Install {XFS_PACKAGE}, or leave image-size out."
            )
        for line in _GROW[volume.filesystem or ""]:
            guestfish.do(line.format(device=_device(volume)))
        guestfish.do("shutdown")


def shell(build: Build, disk: Disk, volumes: Sequence[Volume]) -> None:
    """Open guestfish, which has a shell's commands, on the system on *disk*."""
    with mounted(build, disk, volumes) as found:
        # What is bound to another place is in the first one, too.
        root, *others = [_mount_words(branch) for branch in reversed(found.branches) if not branch.is_bound]
    for device, point, *options in others:
        # Not at once: where the mount point is a link of the guest's, it would be mounted somewhere else.
        logger.info("For %s: mount-options %s %s %s", point, ",".join(options) or '""', device, point)
    argv = [*_ARGV, "--format=raw", "--add", str(disk.path), "--mount", ":".join(root)]
    command.interact(argv, env=environment(build))


def _mount_words(branch: Branch) -> tuple[str, ...]:
    """Return the device, the mount point and the options of *branch*."""
    words = _device(branch.filesystem.volume), f"/{branch.point}"
    return (*words, f"subvol=/{branch.top}") if branch.filesystem.volume.filesystem == "btrfs" else words


def _device(volume: Volume) -> str:
    """Return the path of *volume* in the appliance, where the disk is the first one."""
    # What has the number 0 has no table around it.
    return volume.name if volume.partition is None else f"/dev/sda{volume.partition.number or ''}"


def _logical_volumes(guestfish: Conversation, volumes: Sequence[Volume]) -> list[Volume]:
    """Return the logical volumes that lie in *volumes*."""
    if not any(volume.filesystem == partitions.LVM for volume in volumes):
        return []

    def ask(verb: str, name: str) -> str:
        # Nothing, or an error, for one that it knows nothing of.
        lines = guestfish.ask(f"-{verb} {quoted(name)}")
        return "" if any("error:" in line for line in lines) else "".join(lines[-1:])

    origins = _origins(guestfish)
    names = [*guestfish.do("lvs"), *(name for name in origins)]
    found = [
        Volume(
            name,
            int(ask("blockdev-getsize64", name) or 0),
            ask("vfs-type", name) or None,
            ask("vfs-uuid", name) or None,
            ask("vfs-label", name) or None,
            origin=origins.get(name),
        )
        for name in dict.fromkeys(names)
        if re.fullmatch(r"/dev/[^/]+/[^/]+", name)
    ]
    # A snapshot has the UUID of what it is of, so that not both can be mounted.
    return sorted(found, key=lambda volume: volume.origin is not None)


def _origins(guestfish: Conversation) -> dict[str, str]:
    """Return the logical volumes that are snapshots, with the names of what they are of."""
    groups = {
        uuid.replace("-", ""): group
        for group in guestfish.do("vgs")
        for uuid in guestfish.do(f"vglvuuids {quoted(group)}")
    }
    text = "\n".join(guestfish.do("lvs-full"))
    found = re.findall(r"lv_name: (\S+)\n *lv_uuid: (\S+)\n(?: .*\n)*? *origin: (\S*)\n", text)
    return {
        f"/dev/{groups[uuid.replace('-', '')]}/{name}": origin
        for name, uuid, origin in found
        if origin and uuid.replace("-", "") in groups
    }


def _mount_all(build: Build, guestfish: Conversation, volumes: Sequence[Volume]) -> Tree:
    """Mount what can be mounted of *volumes*, each at a place of its own."""
    filesystems: list[ApplianceFilesystem] = []
    failures: dict[str, BuildError] = {}
    for volume in volumes:
        if volume.filesystem not in partitions.MOUNTED_FILESYSTEMS:
            continue
        place = f"/partition-{volume.partition.number}" if volume.partition else f"/volume-{volumes.index(volume)}"
        guestfish.do(f"mkmountpoint {place}")
        said = guestfish.do("-" + _mount_volume_line(volume, place))
        if said:
            logger.warning("%s (%s) can't be mounted: its unused blocks stay.", volume.name, volume.filesystem)
            failures[volume.name] = BuildError(f"{volume.name} can't be mounted: {said[-1]}")
            continue
        subvolumes = _subvolumes(guestfish, place) if volume.filesystem == "btrfs" else ()
        filesystems.append(ApplianceFilesystem(build, guestfish, place, volume, subvolumes))
    logical = ApplianceLogicalVolumes(guestfish, {found.volume.name: found.place for found in filesystems})
    return assembly.assemble(filesystems, volumes, failures, logical)


def _subvolumes(guestfish: Conversation, place: str) -> tuple[Subvolume, ...]:
    """Return the subvolumes of btrfs, the default one first and the top among them."""
    text = "\n".join(guestfish.ask(f"-btrfs-subvolume-list {place}"))
    paths = {5: ""} | {
        int(number): path
        for number, path in re.findall(r"btrfssubvolume_id: ([0-9]+)\n.*\n *btrfssubvolume_path: (.*)", text)
    }
    default = "".join(guestfish.ask(f"-btrfs-subvolume-get-default {place}")[-1:])
    found = []
    for number in sorted(paths, key=lambda number: (str(number) != default, number)):
        shown = "\n".join(guestfish.ask(f"-btrfs-subvolume-show {quoted(os.path.join(place, paths[number]))}"))
        uuids = dict(re.findall(r"^(UUID|Parent UUID): ([0-9a-f-]{8,})$", shown, re.MULTILINE))
        read_only = bool(re.search(r"^Flags:.*\breadonly\b", shown, re.MULTILINE))
        found.append(Subvolume(number, paths[number], uuids.get("UUID", ""), uuids.get("Parent UUID"), read_only))
    return tuple(found)
