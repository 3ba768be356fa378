"""Disks with snapshots, subvolumes and a system partition, mounted in both ways for real, and sealed."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from image_factory.base.errors import BuildError
from image_factory.checks import audit
from image_factory.model import Build, Disk
from image_factory.parts import carry_out
from image_factory.system import appliance, loop, mounts

from ..conftest import REPOSITORY, done_stage, machine_state, run
from .test_appliance import make_build as any_build
from .test_seal import make_build

M = 1 << 20
KEY = b"the host key of the build machine\n"
ESP = "type=c12a7328-f81f-11d2-ba4b-00a0c93ec93b"


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sys.argv", [str(REPOSITORY / "image-factory")])
    before = set(machine_state())
    yield
    assert set(machine_state()) - before == set()


@contextmanager
def partitioned(path: Path, size: int, *table: str) -> Iterator[Path]:
    """Give a directory for what the second partition of *size* MiB is mounted on, of a new disk: the first has 20."""
    run("truncate", "-s", f"{size + 24}M", path)
    lines = f"label: gpt\nstart=1MiB, size=20MiB, {table[0]}\nstart=22MiB, size={size}MiB\n"
    subprocess.run(["sfdisk", "--quiet", path], input=lines, text=True, check=True)
    point, part = path.parent / "point", path.parent / "part"
    point.mkdir()
    run("truncate", "-s", f"{size}M", part)
    run(*table[1].split(), part)
    run("mount", "-o", "loop", part, point)
    try:
        yield point
    finally:
        run("umount", point)
        point.rmdir()
    run("dd", f"if={part}", f"of={path}", "bs=1M", "seek=22", "conv=notrunc,sparse", "status=none")
    part.unlink()


def make_system(top: Path, fstab: str) -> None:
    for name in ("etc/ssh", "etc/systemd", "usr/lib", "var/log/installer", "home"):
        (top / name).mkdir(parents=True, exist_ok=True)
    (top / "etc/fstab").write_text(fstab)
    (top / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (top / "etc/ssh/ssh_host_ed25519_key").write_bytes(KEY)
    (top / "var/log/installer/syslog").write_text("log\n")
    (top / "var/log/dpkg.log").write_text("log\n")


def make_snapshots(disk: Path) -> None:
    """Make a disk with a root that is neither the first nor the default subvolume, and with copies of it."""
    with partitioned(disk, 160, ESP, "mkfs.btrfs -q -L system") as top:
        for name in ("home", "root", "@", "@/.snapshots"):
            run("btrfs", "subvolume", "create", top / name)
        (top / "root/var").mkdir()
        run("btrfs", "subvolume", "create", top / "root/var/log")
        make_system(top / "root", "LABEL=system / btrfs subvol=root 0 0\nLABEL=system /home btrfs subvol=/home 0 0\n")
        run("btrfs", "subvolume", "snapshot", top / "root", top / "before-hardening")
        (top / "@/.snapshots/7").mkdir()
        (top / "@/.snapshots/7/info.xml").write_text("<snapshot/>\n")
        run("btrfs", "subvolume", "snapshot", "-r", top / "root", top / "@/.snapshots/7/snapshot")
        # Whoever builds can't look in there.
        (top / "@/.snapshots").chmod(0o700)


COPIES = [f"subvolume {path} of partition 2 is a snapshot" for path in ("@/.snapshots/7/snapshot", "before-hardening")]


@pytest.mark.parametrize("way", ["loop", "guestfs"])
def test_snapshots_are_found_and_sealed(tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture) -> None:
    build = make_build(tmp_path / "build", f"seal = yes\nmount-via = {way}\n")
    make_snapshots(build.disk_path)
    assert KEY in build.disk_path.read_bytes()
    caplog.set_level("INFO", logger="image-factory")
    done_stage(build, "clean")
    assert "/ is on partition 2 (btrfs, subvolume root)." in caplog.messages
    assert sorted(message.partition("system: ")[2] for message in caplog.messages if "more than the" in message) == [
        f"{copy}." for copy in COPIES
    ]
    assert "Sealing: snapshots: 2 snapshots" in caplog.messages
    # Those in a subvolume of the root's are cleaned with it.
    assert {"Removed /var/log/installer", "Emptied /var/log/dpkg.log"} <= set(caplog.messages)
    assert KEY not in build.disk_path.read_bytes()
    caplog.clear()
    with mounts.mounted(build, Disk(build.disk_path)) as tree:
        assert (tree.root.top, tree.copies, tree.snapshots) == ("root", (), ())
        assert tree.root.filesystem.entries(["*", "@/.snapshots/*"]) == tree.root.filesystem.entries(
            ["@", "home", "root"]
        )
        assert tree.read(["etc/machine-id", "var/log/dpkg.log"]) == {
            "etc/machine-id": b"uninitialized\n",
            "var/log/dpkg.log": b"",
        }


def test_snapshots_are_a_finding_of_the_audit(tmp_path: Path) -> None:
    build = make_build(tmp_path / "build", "seal = yes\nseal-skip = snapshots\naudit = yes\nmount-via = loop\n")
    make_snapshots(build.disk_path)
    done_stage(build, "clean")
    state = done_stage(build, "convert")
    with pytest.raises(BuildError, match="has what must not be cloned: ") as caught:
        carry_out(state, audit.steps(build))
    assert all(copy in caught.value.message for copy in COPIES)
    assert "audit-skip = copies" in (caught.value.hint or "")


def test_system_partition(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that no line of fstab names is sealed, too; where that can't be, the other way is taken, or it's an error."""
    build = make_build(tmp_path / "build", "seal = yes\nmount-via = guestfs\n")
    esp = tmp_path / "esp"
    run("mkfs.fat", "-C", esp, "20480")
    for name in ("loader", "EFI", "EFI/Linux"):
        run("mmd", "-i", esp, f"::/{name}")
    seed = tmp_path / "random-seed"
    seed.write_text("a seed of the build machine\n")
    run("mcopy", "-i", esp, seed, "::/loader/random-seed")
    with partitioned(build.disk_path, 40, ESP, "mkfs.ext4 -q") as top:
        make_system(top, "/dev/vda2 / ext4 defaults 0 1\n")
    run("dd", f"if={esp}", f"of={build.disk_path}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none")
    caplog.set_level("INFO", logger="image-factory")
    if loop.lacks_driver("vfat"):
        only_loop = any_build(tmp_path / "other", "loop", seal=True)
        only_loop.disk_path.symlink_to(build.disk_path)
        with pytest.raises(BuildError) as caught:
            done_stage(only_loop, "clean")
        assert caught.value.message == (
            "/efi can't be looked into: partition 1 has vfat, for which this machine's kernel has no driver."
        )
        assert "mount-via = guestfs" in (caught.value.hint or "")
    done_stage(build, "clean")
    assert {"/efi is on partition 1 (vfat).", "Removed /efi/loader/random-seed"} <= set(caplog.messages)
    with mounts.mounted(build, Disk(build.disk_path)) as tree:
        assert [entry.path for entry in tree.entries(["efi/*", "efi/loader/*"])] == ["efi/EFI", "efi/loader"]


def lvm_disk(build: Build) -> Disk:
    disk = Disk(build.disk_path)
    run("truncate", "-s", "300M", disk.path)
    lines = [
        f"add {appliance.quoted(str(disk.path))} format:raw",
        "run",
        "part-disk /dev/sda mbr",
        "pvcreate /dev/sda1",
        "vgcreate a-group /dev/sda1",
        "lvcreate system a-group 100",
        "mkfs ext4 /dev/a-group/system",
        "set-label /dev/a-group/system system",
        "mount /dev/a-group/system /",
        "mkdir-p /var/log/installer",
        "mkdir /etc",
        'write /etc/fstab "LABEL=system / ext4"',
        "umount-all",
        'debug sh "lvm lvcreate -s -L 40M -n before a-group/system"',
    ]
    script = build.directory / "script"
    script.write_text("\n".join(lines) + "\n")
    run("guestfish", "-f", script, env=appliance.environment(build))
    return disk


def test_logical_volume_and_its_snapshot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A root on LVM, which this machine's kernel need not know, in a directory with an odd name.

    The snapshot has UUID and label of the root, and a name before it in the alphabet.
    """
    caplog.set_level("INFO", logger="image-factory")
    build = any_build(tmp_path / "a, b=\"c\" 'd'\\x:é*", "guestfs")
    lvm_disk(build)
    done_stage(build, "clean")
    done_stage(build, "convert")
    assert {
        "/ is on /dev/a-group/system (ext4).",
        "The disk has more than the system: /dev/a-group/before is a snapshot of system.",
        "Removed /var/log/installer",
    } <= set(caplog.messages)
    assert any(message.startswith("Freeing unused blocks: done in ") for message in caplog.messages)
