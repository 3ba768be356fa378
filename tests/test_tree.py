"""Which filesystem a path of the installed system is on, as its fstab has it."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from image_factory import clean, seal, tree
from image_factory.errors import BuildError, NoSystemError
from image_factory.model import Change, Entry, Partition, Volume


@dataclass
class Filesystem:
    """A filesystem with *files*, where each pattern is one of them, and a list of what was removed."""

    volume: Volume
    files: dict[str, str]
    tops: tuple[str, ...] = ("",)
    removed: list[str] = field(default_factory=list)

    def has(self, path: str) -> bool:
        return path in self.files

    def show(self, patterns: Sequence[str]) -> str:
        return "".join(f"==> /{path} <==\n{self.files[path]}\n" for path in patterns if path in self.files)

    def entries(self, patterns: Sequence[str]) -> list[Entry]:
        return [Entry(path, "file") for path in patterns if path in self.files]

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        return {path: self.files[path].encode() for path in patterns if path in self.files}

    def write(self, path: str, data: bytes, mode: int) -> None:
        self.files[path] = data.decode()

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

    def trim(self) -> int | None:
        return None

    def block_size(self) -> int:
        return 4096


def volume(number: int, kind: str = "ext4", size: int = 1) -> Volume:
    return Volume(f"partition {number}", size, kind, f"u{number}", partition=Partition(number, number << 20, size))


def root(text: str, kind: str = "ext4", top: str = "", **files: str) -> Filesystem:
    inner = f"{top}/" if top else ""
    return Filesystem(volume(1, kind), {f"{inner}etc/fstab": text, **files}, tuple(dict.fromkeys((top, ""))))


def assembled(*filesystems: Filesystem) -> tree.Tree:
    return tree.assemble(filesystems, [found.volume for found in filesystems], {})


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
    assert found.truncate(["var/log/z", "etc/new", "etc/none"]) == [Change("var/log/z", 1, 4), Change("etc/new", 1, 3)]
    assert var.files == {"log/z": "", "lib/y": "1", "lib/new": "new"}
    assert top.files["@/etc/new"] == ""


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
    system = assembled(found)
    assert paths(system.remove(["root/install.log*", "var/log/installer"])) == ["var/log/installer"]
    assert found.removed == ["@rootfs/root/install.log*", "@var-log/installer"]
    assert system.show(["var/log/installer"]) == "==> /var/log/installer <==\ntext\n"


def test_default_subvolume() -> None:
    """As openSUSE has it: the root's line names no subvolume."""
    snapshot = "@/.snapshots/1/snapshot"
    found = root("UUID=u1 / btrfs\nUUID=u1 /var btrfs subvol=/@/var\nUUID=u1 /x btrfs ro\n", "btrfs", snapshot)
    assembled(found).remove(["root/x", "var/log/installer", "x/y"])
    assert found.removed == [f"{snapshot}/root/x", "@/var/log/installer", f"{snapshot}/y"]


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ("subvol=../../etc", None),
        ("subvol=@/../x", None),
        ("subvol=a*", None),
        ("subvol=" + "a/" * 20 + "b", None),
        ("subvol=a b", None),
        ("subvolid=257", None),
        ("subvolid=5", "installer"),
        ("subvolid=0", "installer"),
        ("subvolid=257,subvol=@log", "@log/installer"),
        ("subvol=/", "installer"),
        ("subvol=.snapshots/1/snapshot", ".snapshots/1/snapshot/installer"),
    ],
)
def test_names_of_subvolumes(caplog: pytest.LogCaptureFixture, options: str, removed: str | None) -> None:
    found = root(f"UUID=u1 /var/log btrfs {options.replace(' ', chr(92) + '040')}\n", "btrfs", "@rootfs")
    assembled(found).remove(["var/log/installer"])
    assert found.removed == [removed or "@rootfs/var/log/installer"]
    assert ("The subvolume that fstab names for var/log is not looked into." in caplog.text) is (removed is None)


def test_largest_root_is_taken() -> None:
    small, large = root(""), Filesystem(volume(2, size=2), {"usr/lib/os-release": ""})
    esp = Filesystem(volume(3, "vfat", size=3), {"etc/fstab": ""})
    assert assembled(small, large, esp).root.filesystem is large


def test_no_root() -> None:
    with pytest.raises(NoSystemError, match="None of the disk's filesystems is a root"):
        assembled(Filesystem(volume(1), {}))


def test_why_there_may_be_no_root() -> None:
    """The one that could not be mounted may have been it."""
    reason = BuildError("partition 2 can't be mounted")
    with pytest.raises(BuildError, match=r"^partition 2 can't be mounted$"):
        tree.assemble([Filesystem(volume(1), {})], [volume(1), volume(2)], {"partition 2": reason})


def test_esp_that_is_not_mounted_is_no_reason() -> None:
    with pytest.raises(NoSystemError, match="The disk has no root filesystem, only partition 1"):
        tree.assemble([], [volume(1, "vfat")], {"partition 1": BuildError("no FAT here")})


def test_filesystem_that_is_needed_and_not_mounted() -> None:
    failures = {"partition 2": BuildError("no var"), "partition 3": BuildError("no ESP")}
    volumes = [volume(1), volume(2), volume(3, "vfat"), volume(4, "ntfs")]
    others = "UUID=u3 /boot/efi vfat\nUUID=u4 /win ntfs\n"
    assert len(tree.assemble([root(others)], volumes, failures).branches) == 1
    with pytest.raises(BuildError, match="no var"):
        tree.assemble([root(others + "UUID=u2 /var ext4\n")], volumes, failures)


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
        root("UUID=u2 / ext4\nUUID=u2 /var ext4\nUUID=u3 /var ext4\n"),
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
    assert tree.is_top(name)


@pytest.mark.parametrize("name", [".", "..", "@/..", "../@", "@/./x", "/@", "@/", "a//b", "*", "a b", "a\n", "é"])
def test_no_directories_of_subvolumes(name: str) -> None:
    assert not tree.is_top(name)


def test_helper_takes_all_directories_of_subvolumes() -> None:
    text = (tree.__file__ or "").replace("image_factory/tree.py", "image-factory-sudo-helper")
    with open(text, encoding="utf-8") as helper:
        [pattern] = re.findall(r'^PATTERN = r"(.*)"$', helper.read(), re.MULTILINE)
    longest = "/".join([".@" + "x" * 200] * 8)
    assert tree.is_top(longest)
    everything = seal.System({}, {}, ("root", "home/a"), tuple(operation.name for operation in seal.OPERATIONS))
    sealed = [
        pattern
        for operation in seal.OPERATIONS
        for patterns in (operation.read, operation.looked_at, *vars(operation.actions(everything)).values())
        for pattern in patterns
    ]
    for logs in (*clean.INSTALLER_LOGS, *clean.SHOWN_LOGS, "etc/fstab", *sealed):
        assert re.fullmatch(pattern, f"{longest}/{logs}")
        assert not re.fullmatch(pattern, f"{longest}/../{logs}")
