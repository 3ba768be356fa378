"""Which root is the system's, what belongs where, and what else the disk has."""

import dataclasses
from typing import Any

import pytest

from image_factory.base.errors import BuildError, NoSystemError
from image_factory.model import Subvolume, Volume
from image_factory.system import assembly

from .test_tree import Filesystem, assembled, root, subvolumes, volume

ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
VAR = "4D21B016-B534-45C2-A9FB-5C16E091FD2D"


def btrfs(fstabs: dict[str, str], *others: str, number: int = 1, **sources: str) -> Filesystem:
    """Return btrfs with systems whose fstabs those are, the first one by default, and with *others*."""
    files = {f"{top}/etc/fstab".lstrip("/"): text for top, text in fstabs.items()}
    return Filesystem(volume(number, "btrfs"), files, subvolumes(*fstabs, *others, **sources))


def system(number: int, text: str, **values: Any) -> Filesystem:
    found = Filesystem(volume(number), {"etc/fstab": text, "usr/lib/os-release": ""})
    found.volume = dataclasses.replace(found.volume, **values)
    return found


def top_of(*filesystems: Filesystem) -> tuple[str, str]:
    branch = assembled(*filesystems).root
    return branch.filesystem.volume.name, branch.top


@pytest.mark.parametrize(
    ("fstabs", "top"),
    [
        # A snapshot before the root in the alphabet, as every fstab says the same.
        (dict.fromkeys(["", "before", "root"], "UUID=u1 / btrfs subvol=root"), "root"),
        (dict.fromkeys(["before", "root"], "UUID=U1 / btrfs subvol=/root,compress=zstd:1"), "root"),
        (dict.fromkeys(["before", "root"], "UUID=u1 / btrfs subvolid=257"), "root"),
        (dict.fromkeys(["root", "before"], "/dev/vda1 / btrfs subvolid=256"), "root"),
        # As openSUSE has it: the default one, however deep.
        (dict.fromkeys([f"@/.snapshots/{name}/snapshot" for name in "21"], "UUID=u1 / x"), "@/.snapshots/2/snapshot"),
        # No fstab says anything.
        ({"b": "", "a": ""}, "b"),
        ({"a": "", "b": "/dev/root / btrfs"}, "a"),
        # One names itself, others say nothing or name another one.
        ({"a": "", "b": "UUID=u1 / btrfs subvol=b"}, "b"),
        ({"a": "UUID=u1 / btrfs subvol=b", "b": ""}, "b"),
        ({"": "", "@": "UUID=u1 / btrfs subvol=@"}, "@"),
        # Both name themselves: the default one.
        ({"a": "UUID=u1 / btrfs subvol=a", "b": "UUID=u1 / btrfs subvol=b"}, "a"),
        # The last line counts.
        ({"a": "", "b": "UUID=u1 / btrfs subvol=a\nUUID=u1 / btrfs subvol=b"}, "b"),
    ],
)  # fmt: skip
def test_root_among_subvolumes(fstabs: dict[str, str], top: str) -> None:
    assert top_of(btrfs(fstabs)) == ("partition 1", top)


def test_subvolume_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    found = assembled(btrfs({"@": "UUID=u1 / btrfs subvol=@\nUUID=u1 /home btrfs subvol=@home,nofail"}))
    assert ([branch.point for branch in found.branches], found.unreached) == ([""], ())
    assert "partition 1 has no subvolume @home, which its fstab names for /home." in caplog.messages


def test_root_among_partitions() -> None:
    """Not the largest."""
    large = system(2, "UUID=u9 / ext4", size=9 << 30)
    assert top_of(system(1, "UUID=u1 / ext4"), large) == ("partition 1", "")
    assert top_of(system(1, "UUID=u2 / ext4"), large) == ("partition 2", "")
    esp = Filesystem(volume(3, "vfat"), {"etc/fstab": "UUID=u3 / vfat"})
    assert top_of(system(1, ""), esp) == ("partition 1", "")


def test_root_that_has_a_snapshot_of_lvm() -> None:
    """Which has its UUID."""
    found, before = system(1, "UUID=u1 / ext4"), system(2, "UUID=u1 / ext4", uuid="u1", origin="root")
    for filesystems in ((found, before), (before, found)):
        assert top_of(*filesystems) == ("partition 1", "")
    assert top_of(system(2, "", uuid="u1", origin="root"), system(1, "")) == ("partition 1", "")
    assert assembled(before, found).copies == ("partition 2 is a snapshot of root",)


@pytest.mark.parametrize(
    ("filesystems", "message"),
    [
        (
            [system(1, "UUID=u1 / ext4"), system(2, "UUID=u2 / ext4")],
            "The disk has several root filesystems, and nothing tells which one is meant: partition 1, partition 2.",
        ),
        (
            [system(1, "UUID=u1 / ext4"), system(2, "UUID=u1 / ext4", uuid="u1")],
            "The disk has several root filesystems, and nothing tells which one is meant: partition 1, partition 2.",
        ),
        (
            [btrfs({"a": ""}), btrfs({"b": ""}, number=2)],
            "The disk has several root filesystems, and nothing tells which one is meant: "
            "partition 1 (subvolume a), partition 2 (subvolume b).",
        ),
        (
            [btrfs({"before": "UUID=u1 / btrfs subvol=root"}, "home")],
            "No root filesystem is the one that its own /etc/fstab names for /: partition 1 (subvolume before).",
        ),
        (
            [system(1, "UUID=u2 / ext4"), Filesystem(volume(2), {})],
            "No root filesystem is the one that its own /etc/fstab names for /: partition 1.",
        ),
    ],
)
def test_root_that_can_not_be_told(filesystems: list[Filesystem], message: str) -> None:
    with pytest.raises(BuildError) as caught:
        assembled(*filesystems)
    assert (caught.value.message, type(caught.value)) == (message, BuildError)


def test_root_that_is_not_mounted_is_the_reason() -> None:
    other, reason = system(1, "UUID=u2 / ext4"), BuildError("no root here")
    with pytest.raises(BuildError, match="no root here"):
        assembly.assemble([other], [other.volume, volume(2)], {"partition 2": reason})


@pytest.mark.parametrize("top", ["", "root/"])
def test_ostree(top: str) -> None:
    found = btrfs({}, "root") if top else Filesystem(volume(1), {})
    found.files = {f"{top}ostree/repo/config": "", f"{top}ostree/deploy/x/var/y": ""}
    with pytest.raises(NoSystemError, match=r"^The system on partition 1 is one of ostree or bootc, which is not sup"):
        assembled(found)


# What is not reached


@pytest.mark.parametrize(
    ("line", "others", "reason"),
    [
        ("UUID=u2 /var jfs", [volume(2, "jfs")], "partition 2 has jfs, which is not supported"),
        ("LABEL=x\\040y /var f2fs noauto", [Volume("partition 2", 1, "f2fs", label="x y")], "partition 2 has f2fs"),
        ("UUID=u2 /var auto", [volume(2, "crypto_LUKS")], "partition 2 is encrypted"),
        ("/dev/mapper/cryptvar /var ext4", [volume(2, "crypto_LUKS")], "/dev/mapper/cryptvar seems to be in"),
        ("UUID=inner /var ext4", [volume(2, "crypto_LUKS")], "UUID=inner seems to be in partition 2, which is enc"),
        ("/dev/md0 /var xfs", [volume(2, "linux_raid_member")], "/dev/md0 seems to be in partition 2, which is a p"),
        ("/srv/var.img /var ext4 loop", [], "it is in the file /srv/var.img"),
        ("overlay /var overlay lowerdir=/a,upperdir=/b", [], "it is an overlay of directories"),
        ("/etc/fstab /var none bind", [], "/etc/fstab is no directory"),
        ("UUID=u2 /var vfat", [volume(2, "vfat")], "no driver"),
        ("/dev/vda2 /var", [], None),
        ("UUID=inner /var ext4 noauto", [volume(2, "crypto_LUKS")], None),
    ],
)  # fmt: skip
def test_what_is_not_reached(
    line: str, others: list[Volume], reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """It's said, and an error for who looks there; nothing is changed then."""
    found = root(f"{line}\n", **{"var/log/x": "", "etc/x": ""})
    failures = {"partition 2": BuildError("no driver", hint="the hint")} if "vfat" in line else {}
    whole = assembly.assemble([found], [found.volume, *others], failures)
    if reason is None:
        assert whole.unreached == ()
        return
    assert f"/var can't be looked into: {reason}" in caplog.text
    whole.remove(["etc/x", "va/y"])
    found.removed.clear()
    operations = (whole.remove, whole.truncate, whole.entries, whole.read, whole.show)
    for operation in operations:
        with pytest.raises(BuildError) as caught:
            operation(["etc/x", "var/log/*"])
        assert caught.value.message.startswith(f"/var can't be looked into: {reason}")
        assert caught.value.hint
    for act in (
        lambda: whole.write("var/x", b"", 0o644),
        lambda: whole.load("var/x", 1),
        lambda: whole.rename("var/x", "y"),
    ):
        with pytest.raises(BuildError, match=r"^/var can't be looked into"):
            act()
    # All that is in a directory is meant.
    with pytest.raises(BuildError, match=r"^/var can't be looked into"):
        whole.remove(["v*"])
    assert found.removed == []


def test_reached_all_the_same() -> None:
    """What is deeper, and what a later line mounts."""
    found = root("UUID=u2 /var jfs\nUUID=u3 /var/log ext4\nUUID=u4 /srv jfs\nUUID=u3 /srv ext4\n")
    log = Filesystem(volume(3), {"x": ""})
    volumes = [found.volume, volume(2, "jfs"), log.volume, volume(4, "jfs")]
    whole = assembly.assemble([found, log], volumes, {})
    assert [place.point for place in whole.unreached] == ["var"]
    assert [entry.path for entry in whole.entries(["var/log/x", "srv/x"])] == ["var/log/x", "srv/x"]


def test_units_of_systemd_name_places_too() -> None:
    unit = "[Mount]\nWhat=UUID=u2\nWhere=/var\n"
    found = root("", **{"etc/systemd/system/var.mount": unit, "etc/systemd/system/x.mount": "[Mount]\nWhat=x\n"})
    var = Filesystem(volume(2), {"log/x": ""})
    assert [entry.path for entry in assembled(found, var).entries(["var/log/x"])] == ["var/log/x"]
    whole = assembly.assemble([found], [found.volume, volume(2, "jfs")], {})
    assert [place.point for place in whole.unreached] == ["var"]


# Bind mounts


def test_bind_mount_is_followed() -> None:
    found = root("/srv/var /var none bind 0 0\n", **{"srv/var/log/x": "1", "var/kept": "22"})
    whole = assembled(found)
    assert [entry.path for entry in whole.entries(["var/log/x"])] == ["var/log/x"]
    whole.remove(["var/log/*"])
    assert found.removed == ["srv/var/log/*"]
    assert whole.copies == ("/var on partition 1 has files below what is mounted there",)
    # Once, where it is.
    assert whole.usage()["var"] == len(found.files["var/kept"])
    assert [branch.is_bound for branch in whole.branches] == [True, False]


def test_keys_are_searched_for_once() -> None:
    """A place that shows a part of another one is left out, and what is read is counted."""
    found = assembled(root("/srv/var /var none bind 0 0\n", **{"srv/var/a.key": "1234"}))
    left = found.budget.size
    assert found.key_files() == {"srv/var/a.key": b"1234"}
    assert left - found.budget.size == 4


def test_bind_mount_of_another_filesystem() -> None:
    found = root("UUID=u2 /data ext4\n/data/var /var none bind\n/var/log /log none bind\n/tmp /tmp none bind\n")
    found.files |= {"tmp/x": ""}
    data = Filesystem(volume(2), {"var/log/x": "1"})
    whole = assembled(found, data)
    assert [entry.path for entry in whole.entries(["var/log/x", "log/x", "tmp/x"])] == ["var/log/x", "log/x", "tmp/x"]
    assert whole.copies == ()


def test_recursive_bind_mount() -> None:
    text = "UUID=u2 /srv/var ext4\nUUID=u3 /srv/lib jfs\n/srv /x none rbind\n/srv /y none bind\n"
    found = root(text, **{"srv/var/x": "1", "srv/lib/x": "", "srv/a": ""})
    var = Filesystem(volume(2), {"x": "22"})
    whole = assembly.assemble([found, var], [found.volume, var.volume, volume(3, "jfs")], {})
    assert whole.read(["x/var/x", "y/var/x", "y/lib/x"]) == {"x/var/x": b"22", "y/var/x": b"1", "y/lib/x": b""}
    with pytest.raises(BuildError, match="/srv/lib can't be looked into"):
        whole.read(["x/lib/x"])


def test_bind_mount_of_what_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    whole = assembled(root("/srv/var /var none bind\n", **{"var/log/x": ""}))
    assert "The system has no /srv/var, which its fstab names for var." in caplog.text
    assert [entry.path for entry in whole.entries(["var/log/x"])] == ["var/log/x"]


def test_bind_mount_of_what_is_not_reached() -> None:
    found = root("UUID=u2 /data jfs\n/data/var /var none bind\n")
    whole = assembly.assemble([found], [found.volume, volume(2, "jfs")], {})
    with pytest.raises(BuildError, match="/data can't be looked into: partition 2 has jfs"):
        whole.entries(["var/log/x"])


# Partitions that their type gives a place


def test_places_by_the_type_of_the_partition() -> None:
    found = root("", var="")
    del found.files["var"]
    esp = Filesystem(dataclasses.replace(volume(2, "vfat"), part_type=ESP), {"loader/random-seed": ""})
    var = Filesystem(dataclasses.replace(volume(3), part_type=VAR), {"log/x": ""})
    whole = assembled(found, esp, var)
    expected = ["efi/loader/random-seed", "var/log/x"]
    assert [entry.path for entry in whole.entries(expected)] == expected
    # One that fstab names is where that says.
    found.files["etc/fstab"] = "UUID=u2 /boot/efi vfat\nUUID=u3 /srv ext4\n"
    assert [branch.point for branch in assembled(found, esp, var).branches] == ["boot/efi", "srv", ""]
    # systemd mounts nothing where something is.
    found.files |= {"etc/fstab": "", "var/x": ""}
    assert [branch.point for branch in assembled(found, esp, var).branches] == ["efi", ""]


@pytest.mark.parametrize("kind", [ESP, ESP.upper(), "ef"])
def test_system_partition_that_is_not_reached(kind: str) -> None:
    """A random seed and a machine ID are there, whatever fstab says."""
    found, esp = root(""), dataclasses.replace(volume(2, "vfat"), part_type=kind)
    whole = assembly.assemble([found], [found.volume, esp], {"partition 2": BuildError("no driver")})
    whole.entries(["boot/*"])
    with pytest.raises(BuildError, match="/efi can't be looked into: no driver"):
        whole.entries(["efi/loader/*"])


# What else is there


def copies_and_snapshots(filesystem: Filesystem) -> tuple[tuple[str, ...], list[str]]:
    whole = assembled(filesystem)
    return whole.copies, [snapshot.path for snapshot in whole.snapshots]


@pytest.mark.parametrize(
    ("others", "sources", "copies", "snapshots"),
    [
        (["home"], {}, [], []),
        (["before"], {"before": "@"}, ["before"], ["before"]),
        # Of a snapshot, of what the system has been, and of the same.
        (["a", "b"], {"a": "@", "b": "a"}, ["a", "b"], ["a", "b"]),
        (["a", "b"], {"@": "a", "b": "gone"}, ["b"], ["a"]),
        (["a"], {"@": "gone", "a": "gone"}, ["a"], ["a"]),
        # Of something else.
        (["data", "a"], {"a": "data"}, ["a"], []),
        (["a"], {"a": "gone"}, ["a"], []),
        # Of what lies in the system.
        (["@/srv", "a"], {"a": "@/srv"}, ["a"], ["a"]),
        # One that has something to stay in it.
        (["a", "a/data"], {"a": "@"}, ["a"], []),
        (["a", "a/b"], {"a": "@", "a/b": "@"}, ["a", "a/b"], ["a", "a/b"]),
        # Images of containers.
        (["@/var/lib/docker/btrfs/subvolumes/a", "@/var/lib/machines/b"], {"@/var/lib/machines/b": "@"}, [], []),
        # A name that the helper does not take.
        (["a b"], {"a b": "@"}, ["a b"], []),
    ],
)
def test_snapshots(others: list[str], sources: dict[str, str], copies: list[str], snapshots: list[str]) -> None:
    found = btrfs({"@": "UUID=u1 / btrfs subvol=@"}, *others, **sources)
    told, paths = copies_and_snapshots(found)
    assert list(told) == [f"subvolume {path} of partition 1 is a snapshot" for path in copies]
    assert paths == snapshots


def test_snapshots_that_are_in_use_stay() -> None:
    text = "UUID=u1 / btrfs subvol=@\nUUID=u1 /srv btrfs subvol=srv\n"
    assert copies_and_snapshots(btrfs({"@": text}, "srv", srv="@")) == ((), [])
    # What is mounted where nothing is named.
    found = btrfs({"@": text}, "a", a="@")
    found.subvolumes = (found.subvolumes[1], found.subvolumes[0], found.subvolumes[2])
    assert found.subvolumes[0].path == "a"
    assert copies_and_snapshots(found) == (("subvolume a of partition 1 is a snapshot",), [])


def test_other_systems(caplog: pytest.LogCaptureFixture) -> None:
    text = "UUID=u1 / btrfs subvol=@\n"
    found, other = btrfs({"@": text, "old": text}, "with a blank"), system(2, "UUID=u9 / ext4")
    assert assembled(found, other).copies == (
        "subvolume old of partition 1 has a system of its own",
        "subvolume with a blank of partition 1 has an odd name, and can't be looked into",
        "partition 2 has a system of its own",
    )
    assert "The disk has more than the system: partition 2 has a system of its own." in caplog.text


def test_number_of_subvolumes_is_limited() -> None:
    found = btrfs({"@": "UUID=u1 / btrfs subvol=@"})
    found.subvolumes += tuple(Subvolume(number, f"s{number}", str(number)) for number in range(1000, 2000))
    assert assembled(found).copies == ("of the subvolumes of partition 1 only 256 are looked into",)


def test_files_below_a_mount_point() -> None:
    """Directories alone are what an installer makes for mount points."""
    var, log = Filesystem(volume(2), {"log/old": ""}), Filesystem(volume(3), {})
    found = root("UUID=u2 /var ext4\nUUID=u3 /var/log ext4\n")
    assert assembled(found, var, log).copies == ("/var/log on partition 2 has files below what is mounted there",)
    var.files.clear()
    found.files["var/lib/x/y"] = ""
    # One level deeper is not looked at.
    assert assembled(found, var, log).copies == ()
    found.files["var/lib/z"] = ""
    assert assembled(found, var, log).copies == ("/var on partition 1 has files below what is mounted there",)
