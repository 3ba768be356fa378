"""Which filesystem a path of the installed system is on, as its fstab has it."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from image_factory.base.errors import BuildError, NoSystemError
from image_factory.finishing import clean
from image_factory.finishing.seal.actions import System
from image_factory.finishing.seal.captured import CAPTURED
from image_factory.finishing.seal.operations import OPERATIONS
from image_factory.model import Change, Entry, Partition, Placed, Subvolume, Volume
from image_factory.system import assembly, privileged, tree
from image_factory.system.privileged import takes_directory, takes_name, takes_top


@dataclass
class Filesystem:
    """A filesystem with *files*, where each pattern is one of them, and a list of what was removed."""

    volume: Volume
    files: dict[str, str]
    subvolumes: tuple[Subvolume, ...] = ()
    removed: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    read_only: dict[str, bool] = field(default_factory=dict)

    def has(self, path: str) -> bool:
        return path in self.files

    def show(self, patterns: Sequence[str]) -> str:
        return "".join(f"==> /{path} <==\n{self.files[path]}\n" for path in patterns if path in self.files)

    def matching(self, pattern: str) -> list[str]:
        """Return what *pattern* matches of the files, and of the directories that they are in."""
        every = {"/".join(path.split("/")[:end]) for path in self.files for end in range(1, path.count("/") + 2)}
        return sorted(path for path in every if re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]*"), path))

    def entries(self, patterns: Sequence[str]) -> list[Entry]:
        found = [path for pattern in patterns for path in self.matching(pattern)]
        return [Entry(path, "file" if path in self.files else "directory") for path in found]

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        found = [path for pattern in patterns for path in self.matching(pattern)]
        return {path: self.files[path].encode() for path in found if path in self.files}

    def write(self, path: str, data: bytes, mode: int) -> None:
        self.files[path] = data.decode()

    def look(self, paths: Sequence[str]) -> list[Entry]:
        return [entry for entry in self.entries(["*", "*/*", "*/*/*"]) if entry.path in paths]

    def put(self, items: Sequence[Placed], contents: Path) -> None:
        self.files |= {item.path: item.target for item in items}

    def rename(self, path: str, name: str) -> None:
        self.files["/".join([*path.split("/")[:-1], name])] = self.files.pop(path)

    def remove(self, patterns: Sequence[str]) -> list[Change]:
        self.removed += patterns
        return [Change(path, 1, len(self.files[path])) for path in patterns if path in self.files]

    def truncate(self, patterns: Sequence[str]) -> list[Change]:
        changes = [Change(path, 1, len(self.files[path])) for path in patterns if self.files.get(path)]
        self.files |= dict.fromkeys((change.path for change in changes), "")
        return changes

    def load(self, path: str, most: int, offset: int = 0) -> bytes | None:
        return self.files[path].encode()[offset:][:most] if path in self.files else None

    def usage(self, top: str) -> dict[str, int]:
        return {".": 1, **{path.split("/")[0]: len(text) for path, text in self.files.items()}}

    def delete_subvolumes(self, paths: Sequence[str]) -> None:
        self.deleted += paths

    def set_read_only(self, path: str, value: bool) -> None:
        self.read_only[path] = value

    def key_files(self, top: str) -> dict[str, bytes]:
        found = {path: text.encode() for path, text in self.files.items() if path.endswith(".key")}
        return {path: data for path, data in found.items() if path.startswith(top)}

    def trim(self) -> int | None:
        return None

    def block_size(self) -> int:
        return 4096

    def discard_size(self) -> int:
        return 0


def volume(number: int, kind: str = "ext4", size: int = 1) -> Volume:
    return Volume(f"partition {number}", size, kind, f"u{number}", partition=Partition(number, number << 20, size))


def root(text: str, kind: str = "ext4", top: str = "", **files: str) -> Filesystem:
    inner = f"{top}/" if top else ""
    return Filesystem(volume(1, kind), {f"{inner}etc/fstab": text, **files}, subvolumes(top) if kind == "btrfs" else ())


def subvolumes(*paths: str, **sources: str) -> tuple[Subvolume, ...]:
    """Return those at *paths*, the default one first, each with its path for UUID; *sources* are those by paths."""
    found = [Subvolume(256 + number, path, path, sources.get(path)) for number, path in enumerate(paths) if path]
    return (*found, Subvolume(5, "", "top")) if paths[:1] != ("",) else (Subvolume(5, "", "top"), *found)


def assembled(*filesystems: Filesystem) -> tree.Tree:
    return assembly.assemble(filesystems, [found.volume for found in filesystems], {})


def paths(changes: Sequence[Change]) -> list[str]:
    return [change.path for change in changes]


def test_one_filesystem() -> None:
    only = root("UUID=u1 / ext4\n", **{"var/log/installer": "text"})
    found = assembled(only)
    assert found.remove(clean.INSTALLER_LOGS) == [Change("var/log/installer", 1, 4)]
    assert only.removed == list(clean.INSTALLER_LOGS)
    assert found.show(["var/log/installer"]) == "==> /var/log/installer <==\ntext\n"


def test_paths_go_to_the_deepest_mount_point() -> None:
    top = root("UUID=u1 / ext4\nUUID=u3 /var/log ext4\nUUID=u2 /var ext4\nUUID=u4 /root ext4\n")
    var, log, roots = (Filesystem(volume(number), {}) for number in (2, 3, 4))
    log.files = {"installer/syslog": "x", "anaconda*": ""}
    roots.files = {"install.log*": ""}
    found = assembled(top, var, log, roots)
    assert paths(found.remove(clean.INSTALLER_LOGS)) == ["root/install.log*", "var/log/anaconda*"]
    assert top.removed == []
    assert roots.removed == ["anaconda-ks.cfg", "original-ks.cfg", "install.log*"]
    assert log.removed == ["anaconda*", "installer", "YaST2", "agama-installation"]
    assert var.removed == ["lib/YaST2", "adm/autoinstall"]
    assert found.show(["var/log/installer/syslog"]) == "==> /var/log/installer/syslog <==\nx\n"
    assert found.filesystems == (top, var, log, roots)


def test_other_operations_go_to_the_filesystem_of_the_path() -> None:
    text = "UUID=u1 / btrfs subvol=@\nUUID=u2 /var ext4\n"
    top, var = root(text, "btrfs", "@"), Filesystem(volume(2), {"log/x": "text", "lib/y": "1"})
    found = assembled(top, var)
    assert found.entries(["etc/fstab", "var/log/x"]) == [Entry("etc/fstab", "file"), Entry("var/log/x", "file")]
    assert found.read(["var/lib/y", "etc/none", "etc/fstab"]) == {"var/lib/y": b"1", "etc/fstab": text.encode()}
    found.write("var/lib/new", b"new", 0o644)
    found.write("etc/new", b"new", 0o644)
    found.rename("var/log/x", "z")
    assert found.read(["var/lib/*"]) == {"var/lib/y": b"1", "var/lib/new": b"new"}
    assert found.truncate(["var/log/z", "etc/new", "etc/none"]) == [Change("var/log/z", 1, 4), Change("etc/new", 1, 3)]
    assert var.files == {"log/z": "", "lib/y": "1", "lib/new": "new"}
    assert top.files["@/etc/new"] == ""
    looked = found.look(["var/lib/y", "etc", "var/none", "var/log"])
    assert looked == {path: Entry(path, "file" if path == "var/lib/y" else "directory") for path in looked}
    assert set(looked) == {"var/lib/y", "etc", "var/log"}
    found.put([Placed(path, "link", target=path) for path in ("var/a", "b", "var/c/d", "etc/e")], Path("/dev/null"))
    assert {path: text for path, text in var.files.items() if text.startswith("var/")} == {
        "a": "var/a",
        "c/d": "var/c/d",
    }
    assert (top.files["@/b"], top.files["@/etc/e"]) == ("b", "etc/e")


def test_a_filesystem_is_asked_once() -> None:
    """However the patterns alternate."""
    calls: list[Sequence[str]] = []

    class Noted(Filesystem):
        def remove(self, patterns: Sequence[str]) -> list[Change]:
            calls.append(patterns)
            return []

    top, var = Noted(volume(1), {"etc/fstab": "UUID=u2 /var ext4\n"}), Noted(volume(2), {})
    assembled(top, var).remove(["etc/a", "var/b", "root/c", "var/d"])
    assert calls == [["etc/a", "root/c"], ["b", "d"]]


def test_files_and_sizes_of_the_system() -> None:
    files = {"var/log/a": "12", "log/a": "another", "usr/b": "123"}
    whole = root("UUID=u1 / ext4\nUUID=u2 /var/log ext4\nUUID=u3 /boot ext4\n", **files)
    log, boot = Filesystem(volume(2), {"a": "1234567"}), Filesystem(volume(3), {"efi": "1"})
    found = assembled(whole, log, boot)
    assert found.load("usr/b", 9) == b"123"
    assert found.load("var/log/a", 3, 2) == b"345"
    assert found.load("none", 9) is None
    etc = len(whole.files["etc/fstab"])
    assert found.usage() == {".": 1, "boot": 2, "etc": etc, "log": 7, "usr": 3, "var": 2 + 1 + 7}


def test_names_that_begin_alike() -> None:
    top, other = root("UUID=u2 /var/lo ext4\nUUID=u2 /va ext4\n"), Filesystem(volume(2), {})
    assembled(top, other).remove(["var/log/installer", "va/x", "var/lo/x"])
    assert (top.removed, other.removed) == (["var/log/installer"], ["x", "x"])


def test_subvolumes() -> None:
    text = "UUID=u1 / btrfs subvol=@rootfs\nUUID=u1 /var/log btrfs noatime,subvol=/@var-log\n"
    found = root(text, "btrfs", "@rootfs", **{"@var-log/installer": "text"})
    found.subvolumes = subvolumes("@rootfs", "@var-log")
    system = assembled(found)
    assert paths(system.remove(["root/install.log*", "var/log/installer"])) == ["var/log/installer"]
    assert found.removed == ["@rootfs/root/install.log*", "@var-log/installer"]
    assert system.show(["var/log/installer"]) == "==> /var/log/installer <==\ntext\n"


def test_default_subvolume() -> None:
    """As openSUSE has it: the root's line names no subvolume."""
    snapshot = "@/.snapshots/1/snapshot"
    found = root("UUID=u1 / btrfs\nUUID=u1 /var btrfs subvol=/@/var\nUUID=u1 /x btrfs ro\n", "btrfs", snapshot)
    found.subvolumes = subvolumes(snapshot, "@/var")
    assembled(found).remove(["root/x", "var/log/installer", "x/y"])
    assert found.removed == [f"{snapshot}/root/x", "@/var/log/installer", f"{snapshot}/y"]


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ("subvolid=256", "@rootfs/installer"),
        ("subvolid=257", "@log/installer"),
        ("subvolid=5", "installer"),
        ("subvolid=0", "installer"),
        ("subvolid=257,subvol=@log", "@log/installer"),
        ("subvol=/", "installer"),
        ("subvol=.snapshots/1/snapshot", ".snapshots/1/snapshot/installer"),
    ],
)
def test_names_of_subvolumes(options: str, removed: str) -> None:
    found = root(f"UUID=u1 /var/log btrfs {options}\n", "btrfs", "@rootfs")
    found.subvolumes = subvolumes("@rootfs", "@log", ".snapshots/1/snapshot")
    assembled(found).remove(["var/log/installer"])
    assert found.removed == [removed]


@pytest.mark.parametrize(
    "options", ["subvol=../../etc", "subvol=@/../x", "subvol=a*", f"subvol={'a/' * 20}b", "subvol=a b", "subvolid=999"]
)
def test_subvolume_that_can_not_be_looked_into(caplog: pytest.LogCaptureFixture, options: str) -> None:
    found = root(f"UUID=u1 /var/log btrfs {options.replace(' ', chr(92) + '040')}\n", "btrfs", "@rootfs")
    system = assembled(found)
    said = "/var/log can't be looked into: its subvolume of partition 1 is unknown, or has an odd name."
    assert said in caplog.text
    with pytest.raises(BuildError, match=re.escape(said)):
        system.remove(["root/x", "var/log/installer"])
    assert found.removed == []


def test_no_root() -> None:
    with pytest.raises(NoSystemError, match="None of the disk's filesystems is a root"):
        assembled(Filesystem(volume(1), {}))


@pytest.mark.parametrize(
    ("points", "pattern", "removed"),
    [
        (["var/log/audit"], "var/log/*", ["*"]),
        (["var/log/audit"], "var/log/audit", ["*"]),
        (["var/log/audit"], "var/log/aud*", ["*"]),
        (["var/log/apt/old"], "var/log/*", ["*"]),
        (["var/log/audit"], "var/log/audit/*", ["*"]),
        (["var/log/audit"], "var/log/a", []),
        (["var/log"], "var/log/*", ["*"]),
        (["var/log"], "var/log/x", ["x"]),
        (["srv"], "var/*", []),
    ],
)
def test_what_is_mounted_below_what_matches(points: list[str], pattern: str, removed: list[str]) -> None:
    """A directory and all that is in it are meant, on whatever filesystem."""
    whole = root("".join(f"UUID=u2 /{point} ext4\n" for point in points))
    below = Filesystem(volume(2), {})
    assembled(whole, below).remove([pattern])
    assert below.removed == removed


def test_snapshots_are_removed_with_what_their_program_has_of_them() -> None:
    found = root("", "btrfs", "@")
    paths = {
        "@/.snapshots/1/snapshot": True,
        "@/.snapshots/2/snapshot": True,
        "@/.snapshots/2/more": False,
        "timeshift-btrfs/snapshots/2026-01-31_00-00-01/@": True,
        "timeshift-btrfs/snapshots/2026-01-31_00-00-01/@home": True,
        "by-hand": True,
        "by-hand/inner": True,
    }
    found.subvolumes = subvolumes("@", *paths)
    gone = tuple(tree.Snapshot(found, path) for path, goes in paths.items() if goes)
    assert gone[0].name == "subvolume @/.snapshots/1/snapshot of partition 1"
    tree.Tree((tree.Branch(found, "@", ""),), (found,), (), snapshots=gone).delete_snapshots()
    assert set(found.deleted) == {path for path, goes in paths.items() if goes}
    assert found.deleted.index("by-hand/inner") < found.deleted.index("by-hand")
    assert found.removed == ["@/.snapshots/1", "timeshift-btrfs/snapshots/2026-01-31_00-00-01"]


def test_why_there_may_be_no_root() -> None:
    """The one that could not be mounted may have been it."""
    reason = BuildError("partition 2 can't be mounted")
    with pytest.raises(BuildError, match=r"^partition 2 can't be mounted$"):
        assembly.assemble([Filesystem(volume(1), {})], [volume(1), volume(2)], {"partition 2": reason})


def test_esp_that_is_not_mounted_is_no_reason() -> None:
    with pytest.raises(NoSystemError, match="The disk has no root filesystem, only partition 1"):
        assembly.assemble([], [volume(1, "vfat")], {"partition 1": BuildError("no FAT here")})


def test_filesystem_that_is_needed_and_not_mounted() -> None:
    failures = {"partition 2": BuildError("no var"), "partition 3": BuildError("no ESP")}
    volumes = [volume(1), volume(2), volume(3, "vfat"), volume(4, "ntfs")]
    others = "UUID=u3 /boot/efi vfat\nUUID=u4 /win ntfs\n"
    assert len(assembly.assemble([root(others)], volumes, failures).branches) == 1
    with pytest.raises(BuildError, match="no var"):
        assembly.assemble([root(others + "UUID=u2 /var ext4\n")], volumes, failures)


def test_what_is_not_there_is_said_in_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assembled(root("LABEL=data /srv ext4\nUUID=u9 /x ext4 noauto\nhost:/x /y nfs\ntmpfs /tmp tmpfs\n"))
    assert caplog.messages == ["The disk has no LABEL=data, which its fstab names for srv."]
    caplog.clear()
    assembled(root(f"UUID={'x' * 3000} /{'y' * 900} ext4\n" * 5000))
    assert len(caplog.messages) == 256
    assert max(map(len, caplog.messages)) < 300


def test_last_line_wins_and_the_root_is_the_one_that_was_found() -> None:
    top, other, third = (
        root("UUID=u9 / ext4\nUUID=u2 /var ext4\nUUID=u3 /var ext4\n"),
        *(Filesystem(volume(number), {}) for number in (2, 3)),
    )
    found = assembled(top, other, third)
    found.remove(["root/x", "var/log/y"])
    assert (top.removed, other.removed, third.removed) == (["root/x"], [], ["log/y"])


def test_headings_in_a_file_are_no_paths() -> None:
    """What a guest writes is at most shown as another path; no line is lost."""
    top, var = root("UUID=u2 /var ext4\n"), Filesystem(volume(2), {"log/x": "==> /etc/shadow <==\nline"})
    shown = assembled(top, var).show(["var/log/x"])
    assert shown == "==> /var/log/x <==\n==> /var/etc/shadow <==\nline\n"


@pytest.mark.parametrize("name", ["", "@", "@rootfs", "root", ".snapshots", "@/.snapshots/1/snapshot", "a..b"])
def test_directories_of_subvolumes(name: str) -> None:
    assert takes_top(name)


@pytest.mark.parametrize("name", [".", "..", "@/..", "../@", "@/./x", "/@", "@/", "a//b", "*", "a b", "a\n", "é"])
def test_no_directories_of_subvolumes(name: str) -> None:
    assert not takes_top(name)


def test_names_are_those_that_the_helper_takes(helper: ModuleType) -> None:
    assert privileged._DIRECTORY_NAME.pattern == helper.PART
    assert privileged._NAME.pattern == helper.NAME
    for levels in (1, 8, 9, 24, 25):
        path = "/".join(["x"] * levels)
        assert takes_top(path) == bool(re.fullmatch(helper.INNER, path))
        assert takes_directory(path) == bool(re.fullmatch(helper.PATTERN, f"{path}/*"))
    assert takes_name("a+b")
    assert not takes_directory("a+b")


def test_helper_takes_all_directories_of_subvolumes(helper: ModuleType) -> None:
    pattern = helper.PATTERN
    longest = "/".join([".@" + "x" * 200] * 8)
    assert takes_top(longest)
    everything = System({}, {}, ("root", "home/a"), tuple(operation.name for operation in OPERATIONS))
    sealed = [
        pattern
        for operation in (*OPERATIONS, *CAPTURED)
        for patterns in (operation.read, operation.looked_at, *vars(operation.actions(everything)).values())
        for pattern in patterns
    ]
    for logs in (*clean.INSTALLER_LOGS, *clean.SHOWN_LOGS, "etc/fstab", *sealed):
        assert re.fullmatch(pattern, f"{longest}/{logs}")
        assert not re.fullmatch(pattern, f"{longest}/../{logs}")
