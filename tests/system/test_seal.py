"""Sealing: what the build leaves is planted in an image and found gone, on this machine and in the appliance."""

import dataclasses
import io
import logging
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.base import events
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.checks import leftovers
from image_factory.configuration.files import Configuration
from image_factory.finishing import seal
from image_factory.finishing.seal import identity, traces
from image_factory.finishing.seal.actions import Actions, System
from image_factory.finishing.seal.captured import CAPTURED
from image_factory.finishing.seal.operations import OPERATIONS
from image_factory.model import Build, Disk
from image_factory.system import loop, mounts, partitions, registrations

from ..conftest import done_stage, run, shown, steps_of
from ..leftovers import LEFTOVERS, MACHINE_ID, PROXY, SURVIVORS, Leftover

OFFSET = 1 << 20
MEBIBYTES = 64
ID = MACHINE_ID.decode()
LABEL = "security.selinux"


pytestmark = pytest.mark.usefixtures("own_helper")


def make_build(directory: Path, text: str = "seal = yes") -> Build:
    directory.mkdir(exist_ok=True)
    (directory / "own.conf").write_text(f"[x]\nlinux = /l\ninitrd = /i\noutput-dir = {directory}\n{text}\n")
    plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(directory / "own.conf")}), "x", {})
    return Build(plan, directory, "none")


def plant(tree: Path, leftover: Leftover) -> None:
    path = tree / leftover.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if leftover.kind == "link":
        path.symlink_to(os.fsdecode(leftover.content))
    elif leftover.kind == "fifo":
        os.mkfifo(path, leftover.mode)
    else:
        path.write_bytes(leftover.content)
        path.chmod(leftover.mode)
        os.chown(path, 1234, 4321)
        os.setxattr(path, LABEL, b"system_u:object_r:" + leftover.operation.encode() + b"_t:s0\0")


def make_disk(build: Build, leftovers: tuple[Leftover, ...], *more: Callable[[Path], None]) -> Disk:
    """Make the disk of *build* with one filesystem, which has *leftovers* and what *more* make in its tree."""
    tree = build.directory / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/os-release").touch()
    for leftover in leftovers:
        plant(tree, leftover)
    for make in more:
        make(tree)
    disk = Disk(build.disk_path)
    run("truncate", "-s", f"{MEBIBYTES + 2}M", disk.path)
    subprocess.run(
        ["sfdisk", "--quiet", disk.path], input="label: gpt\nstart=1MiB, size=64MiB\n", text=True, check=True
    )
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, "-E", f"offset={OFFSET}", disk.path, f"{MEBIBYTES}M")
    # EXT4_EXTENTS_FL, and the flag itself.
    flags = {"i": "0x80010", "a": "0x80020"}
    for leftover in leftovers:
        if leftover.attributes:
            debugfs(disk, f'sif "/{leftover.path}" flags {flags[leftover.attributes]}')
    return disk


def debugfs(disk: Disk, command: str) -> None:
    run("debugfs", "-w", "-R", command, f"{disk.path}?offset={OFFSET}")


def sealed(build: Build, disk: Disk, way: mounts.Way = loop) -> None:
    with way.mounted(build, disk, partitions.read_volumes(disk.path)) as tree:
        seal.seal(build, tree)


@contextmanager
def looked_into(disk: Disk) -> Iterator[Path]:
    point = disk.path.parent / "point"
    point.mkdir()
    run("mount", "-o", f"ro,noload,loop,offset={OFFSET}", disk.path, point)
    try:
        yield point
    finally:
        run("umount", point)
        point.rmdir()


class Told:
    def __init__(self) -> None:
        self.sealed: list[events.Sealed] = []

    def notice(self, event: events.Event) -> None:
        if isinstance(event, events.Sealed):
            self.sealed.append(event)


# A disk with all leftovers, sealed by each way


@dataclasses.dataclass
class Done:
    root: Path
    log: str
    told: list[events.Sealed]


@pytest.fixture(scope="module", params=["loop", "guestfs"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, own_helper: None) -> Iterator[Done]:
    """The files of the sealed disk, and what was said; it is unmounted before what is left is looked for."""
    directory = tmp_path_factory.mktemp("sealed")
    build, told = make_build(directory), Told()
    disk = make_disk(build, (*LEFTOVERS, *SURVIVORS))
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logger = logging.getLogger(seal.logger.name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with events.observed(told):
            sealed(build, disk, mounts.WAYS[request.param])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    run("e2fsck", "-fn", f"{disk.path}?offset={OFFSET}")
    with looked_into(disk) as root:
        yield Done(root, log.getvalue(), told.sealed)


@pytest.mark.parametrize("leftover", LEFTOVERS, ids=lambda leftover: leftover.path)
def test_leftover_goes(done: Done, leftover: Leftover) -> None:
    path = done.root / (leftover.renamed or leftover.path)
    if leftover.after is None:
        assert not os.path.lexists(path)
        return
    assert leftover.renamed is None or not os.path.lexists(done.root / leftover.path)
    assert path.read_bytes() == leftover.after
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (leftover.mode, 1234, 4321)
    assert os.getxattr(path, LABEL) == b"system_u:object_r:" + leftover.operation.encode() + b"_t:s0\0"


@pytest.mark.parametrize("survivor", SURVIVORS, ids=lambda survivor: survivor.path)
def test_survivor_stays(done: Done, survivor: Leftover) -> None:
    path = done.root / survivor.path
    if survivor.kind == "link":
        assert os.fsencode(os.readlink(path)) == survivor.content
    else:
        assert path.read_bytes() == survivor.content
        assert stat.S_IMODE(path.stat().st_mode) == survivor.mode


def test_directories_stay(done: Done) -> None:
    for path in ("tmp", "var/tmp", "var/log/journal", "var/log/apt", "var/lib/cloud", "var/cache/apt/archives/partial"):
        assert (done.root / path).is_dir() or path.endswith("partial")


def test_each_operation_says_what_it_has_removed(done: Done) -> None:
    assert [told.name for told in done.told] == [operation.name for operation in OPERATIONS]
    for told in done.told:
        planted = [leftover for leftover in LEFTOVERS if leftover.operation == told.name]
        assert f"Sealing: {told.name}: " in done.log
        assert told.files + told.changed >= len([left for left in planted if left.renamed is None]), told
        # Those of btrfs are in test_assembly_mounted.
        assert (f"Sealing: {told.name}: nothing" in done.log) is (told.name == "snapshots")
    [keys] = [told for told in done.told if told.name == "ssh-host-keys"]
    size = sum(len(left.content) for left in LEFTOVERS if left.operation == "ssh-host-keys")
    assert keys == events.Sealed("ssh-host-keys", 5, size, 0)
    assert f"Sealing: ssh-host-keys: 5 files, {size} B" in done.log.splitlines()
    assert "Removed /etc/ssh/ssh_host_rsa_key" in done.log.splitlines()
    assert "Emptied /var/log/syslog" in done.log.splitlines()


def test_no_secret_is_in_the_log(done: Done) -> None:
    for secret in (PROXY.decode(), "hunter2", "-----BEGIN", "a secret of the build machine"):
        assert secret not in done.log


def test_leftovers_are_of_all_operations() -> None:
    operations = {operation.name for operation in OPERATIONS} - {"snapshots"}
    assert {leftover.operation for leftover in LEFTOVERS} == operations
    assert len(LEFTOVERS) >= 40
    paths = [leftover.path for leftover in (*LEFTOVERS, *SURVIVORS)]
    assert len(paths) == len(set(paths))


# What is chosen


def test_nothing_is_done_unless_it_is_asked_for(tmp_path: Path) -> None:
    build = make_build(tmp_path, "")
    # It would not even be looked at.
    assert list(seal.steps(build)) == []


def test_operations_are_chosen(tmp_path: Path) -> None:
    names = [operation.name for operation in OPERATIONS]
    of_captures = [operation.name for operation in CAPTURED]
    assert len({*names, *of_captures}) == len(names) + len(of_captures)
    captured = "source = capture\ncapture-from = /"
    for text, chosen in (
        ("seal = yes", names),
        ("seal = no\nseal-only = logs", []),
        ("seal = yes\nseal-only = logs, machine-id", ["machine-id", "logs"]),
        ("seal = yes\nseal-skip = logs,proxy", [name for name in names if name not in ("logs", "proxy")]),
        ("seal = yes\nseal-only = logs, mail\nseal-skip = logs", ["mail"]),
        ("seal = yes\nseal-only = logs, swap-files", ["logs", "swap-files"]),
        (f"{captured}\nseal-skip = databases", [*names, *(name for name in of_captures if name != "databases")]),
    ):
        settings = make_build(tmp_path, text).plan.settings
        assert [operation.name for operation in seal.chosen_operations(settings)] == chosen


@pytest.mark.parametrize("key", ["seal-only", "seal-skip"])
def test_unknown_operation_is_refused_with_the_list(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_build(tmp_path, f"seal = yes\n{key} = logs, machineid")
    assert caught.value.message == f"[x] {key}: 'machineid' is not accepted, only operations of sealing."
    assert caught.value.hint == f"They are {', '.join(operation.name for operation in (*OPERATIONS, *CAPTURED))}."


def test_only_what_is_chosen_goes(tmp_path: Path) -> None:
    build = make_build(tmp_path, "seal = yes\nseal-skip = machine-id, login-records, journal, cloud-init")
    disk = make_disk(build, (*LEFTOVERS, *SURVIVORS))
    sealed(build, disk)
    with looked_into(disk) as root:
        for leftover in LEFTOVERS:
            stays = leftover.operation in ("machine-id", "login-records", "journal", "cloud-init")
            path = root / leftover.path
            unchanged = os.path.lexists(path) and (leftover.kind != "file" or path.read_bytes() == leftover.content)
            assert unchanged == stays, leftover.path


def test_sealing_twice_changes_nothing(tmp_path: Path) -> None:
    build, told = make_build(tmp_path), Told()
    disk = make_disk(build, (*LEFTOVERS, *SURVIVORS))
    sealed(build, disk)
    with events.observed(told):
        sealed(build, disk)
    assert {(found.files, found.size, found.changed) for found in told.sealed} == {(0, 0, 0)}


def test_a_dry_run_shows_the_calls(tmp_path: Path) -> None:
    for way in mounts.WAYS:
        build = make_build(tmp_path, f"seal = yes\nmount-via = {way}")
        steps = shown(build, steps_of(build, "clean"))
        words = " ".join(word for command in steps["Sealing"] for word in command)
        assert "etc/ssh/ssh_host_*key*" in words
        assert "etc/machine-id" in words
        off = make_build(tmp_path, f"seal = no\nmount-via = {way}")
        assert "Sealing" not in shown(off, steps_of(off, "clean"))
    build = make_build(tmp_path, "seal = yes\nmount-via = loop")
    commands = shown(build, steps_of(build, "clean"))["Sealing"]
    verbs = [next(word for word in command if word.islower() and word.isalpha()) for command in commands]
    # What is in the homes is read when these are known.
    assert verbs == ["list", "read", "read", "remove", "truncate", "write", "rename"]


def test_nothing_is_left_in_the_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The disk is sealed before its unused blocks are freed, and no byte of what was in the files is on it."""
    caplog.set_level(logging.INFO, logger=seal.logger.name)
    build = make_build(tmp_path, "seal = yes\nmount-via = loop")
    disk = make_disk(build, (*LEFTOVERS, *SURVIVORS))
    secrets = (b"a secret of the build machine", b"hunter2", b"$6$salt", b"-----BEGIN OPENSSH", b"LPKSHHRH")
    before = disk.path.read_bytes()
    assert all(secret in before for secret in secrets)
    done_stage(build, "clean")
    after = disk.path.read_bytes()
    assert [secret for secret in secrets if secret in after] == []
    assert b"ssh-ed25519 AAAA somebody" in after
    steps = [line.removesuffix(" ...") for line in caplog.messages if line.endswith(" ...")]
    place = steps.index("Sealing")
    assert steps[place - 1 : place + 2] == ["Removing installer logs", "Sealing", "Freeing unused blocks"]


# Guests that are hostile, or odd


def test_links_lead_nowhere(tmp_path: Path) -> None:
    """Each directory of the table is a link out of the tree, to victims of the same names."""
    victims = tmp_path / "victims"
    for leftover in LEFTOVERS:
        plant(victims, leftover)
    before = run("find", victims, "-printf", "%p %m %U %s %T@ %C@ %l\n").stdout

    def link(tree: Path) -> None:
        for name in ("var", "tmp", "boot", "root", "home"):
            (tree / name).symlink_to(victims / name)
        (tree / "etc/ssh").symlink_to(victims / "etc/ssh")
        (tree / "etc/cloud").symlink_to(victims / "etc/cloud")
        for name in ("machine-id", "fstab", "environment", "resolv.conf", "passwd-"):
            (tree / "etc" / name).symlink_to(victims / "etc" / name)

    build = make_build(tmp_path / "build")
    disk = make_disk(build, (), link)
    sealed(build, disk)
    assert run("find", victims, "-printf", "%p %m %U %s %T@ %C@ %l\n").stdout == before
    with looked_into(disk) as root:
        assert (root / "etc/machine-id").read_bytes() == b"uninitialized\n"
        assert (root / "etc/resolv.conf").is_symlink()
        assert not (root / "etc/passwd-").is_symlink()


def test_directories_that_nothing_can_be_changed_in(tmp_path: Path) -> None:
    build = make_build(tmp_path)
    disk = make_disk(build, (*LEFTOVERS, *SURVIVORS))
    for path in ("etc", "etc/ssh", "tmp", "var/tmp", "var/log", "root"):
        debugfs(disk, f"sif /{path} flags {'0x80010' if path != 'tmp' else '0x80020'}")
    sealed(build, disk)
    with looked_into(disk) as root:
        for leftover in LEFTOVERS:
            assert (leftover.after is not None) == os.path.lexists(root / (leftover.renamed or leftover.path))


def test_what_is_no_file_where_one_belongs(tmp_path: Path) -> None:
    def make(tree: Path) -> None:
        for name in ("machine-id", "fstab", "environment"):
            (tree / "etc" / name).mkdir()
        os.mkfifo(tree / "etc/resolv.conf")
        (tree / "etc/passwd").write_bytes(b"\xff::::::\n" + b"x" * (2 << 20))
        (tree / "home/..x").mkdir(parents=True)
        (tree / "home/a\nb").mkdir()
        os.mknod(tree / "etc/apt.conf", 0o666 | stat.S_IFCHR, os.makedev(1, 5))

    build = make_build(tmp_path)
    disk = make_disk(build, (), make)
    sealed(build, disk)
    with looked_into(disk) as root:
        assert (root / "etc/machine-id").is_dir()


def test_a_unit_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    def make(tree: Path) -> None:
        (tree / "usr/sbin").mkdir(parents=True)
        (tree / "usr/sbin/sshd").touch()
        (tree / "etc/systemd").mkdir()
        (tree / "etc/systemd/system").symlink_to(tmp_path)

    build = make_build(tmp_path / "build")
    disk = make_disk(build, (), make)
    with pytest.raises(BuildError, match="image-factory-sudo-helper"):
        sealed(build, disk)
    assert not (tmp_path / identity.KEYS_UNIT).exists()


def test_many_users(tmp_path: Path) -> None:
    """Their histories are more than one call of the helper could take."""
    count = 5_000
    lines = "".join(f"u{number}:x:{number}:1::/srv/u{number}:/bin/sh\n" for number in range(count))

    def make(tree: Path) -> None:
        (tree / "etc/passwd").write_text(lines)
        for number in (0, count - 1):
            (tree / f"srv/u{number}").mkdir(parents=True)
            (tree / f"srv/u{number}/.bash_history").write_text("ls\n")

    build, told = make_build(tmp_path, "seal = yes\nseal-only = histories"), Told()
    disk = make_disk(build, (), make)
    with events.observed(told):
        sealed(build, disk)
    assert told.sealed == [events.Sealed("histories", 2, 6, 0)]


# What makes new host keys


def make_sshd(tree: Path) -> None:
    for name in ("usr/sbin", "etc/systemd/system"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    (tree / "usr/sbin/sshd").touch()
    os.setxattr(tree / "etc/systemd/system", LABEL, b"system_u:object_r:systemd_unit_file_t:s0\0")


@pytest.mark.parametrize("name", ["loop", "guestfs"])
def test_a_unit_is_added_with_the_label_of_its_directory(tmp_path: Path, name: str) -> None:
    build = make_build(tmp_path, "seal = yes\nseal-only = ssh-host-keys")
    disk = make_disk(build, LEFTOVERS, make_sshd)
    sealed(build, disk, mounts.WAYS[name])
    with looked_into(disk) as root:
        units = root / "etc/systemd/system"
        made = [units / identity.KEYS_UNIT, units / "multi-user.target.d/image-factory-ssh-host-keys.conf"]
        for path in (*made, made[1].parent):
            status = path.stat()
            mode = 0o755 if path.is_dir() else 0o644
            assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, mode)
            assert os.getxattr(path, LABEL).rstrip(b"\0") == b"system_u:object_r:systemd_unit_file_t:s0"
        assert made[1].read_text().endswith(f"[Unit]\nWants={identity.KEYS_UNIT}\n")


OF_KEYS = [key for key in (registrations.DROPBEAR, *registrations.KEYS) if key.commands]


@pytest.mark.parametrize(
    "text", [identity.KEYS_UNIT_TEXT, identity.ENTRIES_UNIT_TEXT, *map(identity.unit_text, OF_KEYS)]
)
def test_units_are_such(tmp_path: Path, text: str) -> None:
    unit = tmp_path / "image-factory-unit.service"
    # Programs that this machine lacks are none of the unit's faults.
    unit.write_text(
        re.sub(r"(?<=ExecStart=)/usr/\S+", lambda found: found[0] if Path(found[0]).exists() else "/bin/true", text)
    )
    said = run("systemd-analyze", "verify", "--man=no", unit, check=False)
    # What it says of other units of this machine is not ours.
    assert unit.name not in said.stderr, said.stderr


def all_units() -> dict[str, bytes]:
    """The files of all units that sealing may write."""
    kinds = [path.replace("*", "0") for key in (registrations.DROPBEAR, *registrations.KEYS) for path in key.removed]
    kinds += [path for key in (registrations.DROPBEAR, *registrations.KEYS) for path in key.makers]
    found = System({}, dict.fromkeys([*kinds, "usr/sbin/sshd"], "file"), (), ())
    entries = identity.rename_boot_entries(grub_system()).write
    units = identity.remove_service_keys(found).write | identity.have_keys_made(found).write | entries
    return {path: data for path, data in units.items() if path.startswith("etc/systemd/system/")}


def test_units_can_be_started_in_an_order(tmp_path: Path) -> None:
    """With sockets of sshd too, before which there must be keys: what makes a cycle systemd leaves out."""
    units = all_units()
    names = {Path(path).name for path in units if path.endswith(".service")}
    assert names == {Path(path).name for path in leftovers.WANTED}
    for path, data in units.items():
        file = tmp_path / path.removeprefix("etc/systemd/system/")
        file.parent.mkdir(exist_ok=True)
        # Programs that this machine lacks are none of the unit's faults.
        file.write_bytes(re.sub(rb"^Exec(.*\\\n)*.*", b"ExecStart=/bin/true", data, flags=re.MULTILINE))
    (tmp_path / "sockets.target.wants").mkdir()
    for name in ("ssh", "sshd"):
        (tmp_path / f"{name}.socket").write_text(f"[Unit]\nBefore={name}.service\n[Socket]\nListenStream=22\n")
        (tmp_path / f"{name}.service").write_text("[Service]\nExecStart=/bin/true\n")
        (tmp_path / f"sockets.target.wants/{name}.socket").symlink_to(f"../{name}.socket")
    environment = {"SYSTEMD_UNIT_PATH": f"{tmp_path}:/lib/systemd/system", "SYSTEMD_LOG_LEVEL": "debug"}
    said = run("systemd-analyze", "verify", "--man=no", "multi-user.target", env=environment, check=False)
    text = said.stdout + said.stderr
    assert "cycle" not in text, text
    # All are part of it.
    for name in (*names, "ssh.socket", "sshd.socket"):
        assert f"{name}: Installed new job" in text, text


def system(*chosen: str, files: dict[str, bytes] | None = None, **kinds: str) -> System:
    return System(files or {}, {path.replace("__", "/"): kind for path, kind in kinds.items()}, (), chosen)


def writes_unit(*paths: str, chosen: tuple[str, ...] = ()) -> bool:
    found = System({}, dict.fromkeys(paths, "file"), (), chosen)
    return f"etc/systemd/system/{identity.KEYS_UNIT}" in identity.have_keys_made(found).write


def test_where_a_unit_is_needed() -> None:
    assert not writes_unit()
    assert writes_unit("usr/sbin/sshd")
    # As it is where usr/sbin is a link.
    assert writes_unit("usr/bin/sshd")
    assert "usr/bin/sshd" in next(found for found in OPERATIONS if found.name == "ssh-host-keys").looked_at
    for maker in identity.KEY_MAKERS:
        assert not writes_unit("usr/sbin/sshd", maker)
    assert not writes_unit("usr/sbin/sshd", "usr/bin/cloud-init")
    debian = "usr/lib/systemd/system/sshd-keygen.service"
    files = {debian: b"[Unit]\nConditionFirstBoot=yes\n"}
    for chosen in ((), ("machine-id",)):
        found = System(files, {"usr/sbin/sshd": "file", debian: "file"}, (), chosen)
        assert bool(identity.have_keys_made(found).write) == (not chosen)
    disabled = ("usr/sbin/sshd", "usr/bin/cloud-init", "etc/cloud/cloud-init.disabled")
    assert writes_unit(*disabled)
    assert not writes_unit(*disabled, chosen=("cloud-init-config",))


# Registrations, and keys of services


def test_leftovers_have_each_registration_and_each_key() -> None:
    planted = {str(path) for leftover in LEFTOVERS for path in (Path(leftover.path), *Path(leftover.path).parents)}
    for found in (*registrations.REGISTRATIONS, *registrations.KEYS):
        patterns = found.removed if isinstance(found, registrations.Key) else found.secret
        assert any(registrations.is_of(path, patterns) for path in planted), found


def test_keys_go_only_where_each_clone_makes_its_own() -> None:
    """A unit is written where the key was, and stays as it is when the image is sealed again."""
    key = "etc/ssl/private/ssl-cert-snakeoil.key"
    for kinds in ([key], ["usr/sbin/make-ssl-cert"], [key, "usr/sbin/make-ssl-cert"]):
        actions = identity.remove_service_keys(System({}, dict.fromkeys(kinds, "file"), (), ()))
        assert (key in actions.remove) == ("usr/sbin/make-ssl-cert" in kinds)
        assert ("etc/systemd/system/image-factory-ssl-cert.service" in actions.write) == (len(kinds) == 2)
    kinds = ["etc/dropbear/dropbear_rsa_host_key", "usr/bin/dropbearkey"]
    actions = identity.have_keys_made(System({}, dict.fromkeys(kinds, "file"), (), ()))
    assert "etc/systemd/system/image-factory-dropbear-keys.service" in actions.write


@pytest.mark.parametrize("key", [registrations.DROPBEAR, *registrations.KEYS], ids=lambda key: key.name)
def test_each_maker_alone_makes_a_key_go(key: registrations.Key) -> None:
    """usr/sbin is a link on some systems, behind which nothing is seen: each program has two places."""
    for maker in key.makers:
        found = System({}, {maker: "file"}, (), ())
        removed = identity.remove_service_keys(found).remove if key in registrations.KEYS else key.removed
        assert set(key.removed) <= set(removed)
        assert identity.unit_of(found, key) == {}
    programs = {maker.rpartition("/")[2] for maker in key.makers if maker.startswith("usr/sbin/")}
    assert {f"usr/bin/{name}" for name in programs} <= set(key.makers)


def test_units_are_written_before_anything_goes() -> None:
    """A build that fails meanwhile and is resumed finds no key any more that would call for a unit."""
    kinds = dict.fromkeys(["etc/bind/rndc.key", "usr/sbin/rndc-confgen"], "file")
    done: list[str] = []

    class Recorded:
        def remove(self, patterns: list[str]) -> list[object]:
            done.append("remove")
            return []

        def write(self, path: str, data: bytes, mode: int) -> None:
            done.append(path)

    seal.carry_out(Recorded(), [identity.remove_service_keys(System({}, kinds, (), ()))])
    assert done == [
        "etc/systemd/system/image-factory-rndc-key.service",
        "etc/systemd/system/basic.target.d/image-factory-rndc-key.conf",
        "remove",
    ]


def test_services_of_suse_stay_where_nothing_is_registered() -> None:
    files = {"etc/zypp/services.d/a.service": b"[a]\nurl=https://x/?credentials=a\n"}
    assert registrations.of_suse(files) == []
    files["etc/zypp/credentials.d/NCCcredentials"] = b"username=x\n"
    files["etc/zypp/repos.d/a:b.repo"] = b"[b]\nservice=a\n"
    files["etc/zypp/repos.d/c.repo"] = b"[c]\nservice=ab\n"
    assert registrations.of_suse(files) == [
        "etc/zypp/services.d/a.service",
        "etc/zypp/repos.d/a:b.repo",
        "etc/zypp/credentials.d/a",
    ]


@pytest.mark.parametrize("text", [b"[Peer]\n", b"\n", b" \n", b"PrivateKey\n"])
def test_long_files_of_others_are_gone_over_once(text: bytes) -> None:
    """It would take hours if it was gone over from each line to the end."""
    data = text * ((1 << 20) // len(text))
    assert not registrations.has_wireguard_key(data)
    assert registrations.has_wireguard_key(data + b"\n PrivateKey = " + b"A" * 43 + b"=\n")
    files = {"etc/zypp/credentials.d/NCCcredentials": b"username=x\n", "etc/zypp/services.d/a.service": data}
    assert registrations.of_suse(files) == []


@pytest.mark.parametrize("link", ["0a1b2c3d.0", None])
def test_the_first_boot_makes_a_certificate_of_its_own(tmp_path: Path, link: str | None) -> None:
    """The commands of the unit, as systemd unquotes them, with Debian's own program in a tree of this machine's.

    The link to the old certificate is named by its hash, which depends on the name of the build machine.
    """
    [key] = [key for key in registrations.KEYS if key.name == "ssl-cert"]
    certificates, private = tmp_path / "certs", tmp_path / "private"
    certificates.mkdir()
    private.mkdir()
    if link:
        (certificates / link).symlink_to("ssl-cert-snakeoil.pem")
    (certificates / "ffffffff.0").symlink_to("other.pem")
    binds = "\n".join(
        f"mount --bind {path} /etc/ssl/{path.name}" for path in (certificates, private)
    )  # fmt: skip
    commands = [command.replace("\\\n", "").replace("$$", "$") for command in key.commands]
    script = "\n".join(["set -e", binds, *commands])
    run("unshare", "--mount", "sh", "-c", script, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    assert stat.S_IMODE((private / "ssl-cert-snakeoil.key").stat().st_mode) == 0o640
    text = run("openssl", "x509", "-hash", "-noout", "-in", certificates / "ssl-cert-snakeoil.pem").stdout.strip()
    assert sorted(path.name for path in certificates.iterdir()) == sorted(
        ["ffffffff.0", f"{text}.0", "ssl-cert-snakeoil.pem"]
    )


@pytest.mark.parametrize("name", ["postfix", "sendmail"])
def test_the_first_boot_makes_a_key_of_a_mail_server(tmp_path: Path, name: str) -> None:
    """The command of the unit, as systemd unquotes it, in directories of its own."""
    [key] = [key for key in registrations.KEYS if key.name == name]
    made, certificate = tmp_path / f"private/{name}.key", tmp_path / f"certs/{name}.pem"
    for path in (made, certificate):
        path.parent.mkdir()
    # What an attempt that was broken off has left.
    made.with_name(f"{name}.key.new").touch(0o600)
    [command] = key.commands
    command = command.replace("\\\n", "").replace("$$", "$").replace("/etc/pki/tls/", f"{tmp_path}/")
    run("sh", "-c", command, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    assert [path.name for path in sorted(made.parent.iterdir())] == [f"{name}.key"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (made, certificate)] == [0o600, 0o644]
    public = [
        run("openssl", *line.split(), "-in", path).stdout
        for line, path in (("pkey -pubout", made), ("x509 -pubkey -noout", certificate))
    ]
    assert public[0] == public[1]
    subject = run("openssl", "x509", "-noout", "-subject", "-nameopt", "multiline", "-in", certificate).stdout
    assert subject.split()[-1] == os.uname().nodename[:64]


# Boot-loader entries


ENTRY = f"boot/loader/entries/{ID}-5.14.0-611.el9.x86_64.conf"
RESCUE = f"boot/loader/entries/{ID}-0-rescue.conf"


def grub_system() -> System:
    """As Enterprise Linux 9 is installed."""
    files = {
        "etc/machine-id": MACHINE_ID + b"\n",
        ENTRY: b"title x\nlinux /boot/vmlinuz-5.14.0-611.el9.x86_64\nid rocky-5.14\n",
        RESCUE: b"linux /boot/vmlinuz-0-rescue-" + MACHINE_ID + b"\n",
        "boot/grub2/grubenv": (b"# GRUB Environment Block\nsaved_entry=" + MACHINE_ID + b"-5\n").ljust(1024, b"#"),
    }
    return System(files, {"boot/grub2": "directory", f"boot/vmlinuz-0-rescue-{ID}": "file", ENTRY: "file"}, (), ())


def test_boot_entries_of_grub() -> None:
    actions = identity.rename_boot_entries(grub_system())
    assert actions.rename == {
        ENTRY: "Default-5.14.0-611.el9.x86_64.conf",
        RESCUE: "Default-0-rescue.conf",
        f"boot/vmlinuz-0-rescue-{ID}": "vmlinuz-0-rescue-Default",
    }
    assert actions.write[RESCUE] == b"linux /boot/vmlinuz-0-rescue-Default\n"
    assert ENTRY not in actions.write
    assert len(actions.write["boot/grub2/grubenv"]) == 1024
    assert actions.write["boot/grub2/grubenv"].startswith(b"# GRUB Environment Block\nsaved_entry=Default-5\n#")
    assert "etc/kernel/entry-token" not in actions.write
    assert f"etc/systemd/system/{identity.ENTRIES_UNIT}" in actions.write


def test_the_first_boot_names_entries_of_grub(tmp_path: Path) -> None:
    """The commands of the unit, as systemd unquotes them, in a directory instead of /."""
    commands = re.findall(r"^ExecStart=(/bin/sh -ec '.*?')$", identity.ENTRIES_UNIT_TEXT, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    entries = tmp_path / "boot/loader/entries"
    entries.mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text("f" * 32 + "\n")
    for name in ("Default-5.14.conf", "Default-0-rescue.conf", "own.conf"):
        (entries / name).touch()
    editor = tmp_path / "bin/grub2-editenv"
    editor.parent.mkdir()
    editor.write_text(f'#!/bin/sh\n[ "$2" = list ] && echo saved_entry=Default-5.14 || echo "$@" >{tmp_path}/set\n')
    editor.chmod(0o755)
    for command in commands:
        shell = command.replace("\\\n", "").replace("$$", "$")
        shell = shell.replace("/etc/", f"{tmp_path}/etc/").replace("/boot/", f"{tmp_path}/boot/")
        run("sh", "-c", shell, env={"PATH": f"{editor.parent}:/usr/bin:/bin"})
    assert sorted(path.name for path in entries.iterdir()) == [
        f"{'f' * 32}-0-rescue.conf", f"{'f' * 32}-5.14.conf", "own.conf"
    ]  # fmt: skip
    assert (tmp_path / "set").read_text() == f"- set saved_entry={'f' * 32}-5.14\n"


def test_boot_entries_of_others() -> None:
    """Nothing is named by the machine ID on Debian, and there may be none."""
    for files in ({}, {"etc/machine-id": b"uninitialized\n"}, {"etc/machine-id": MACHINE_ID + b"\n"}):
        found = System(files, {"boot/grub": "directory", "boot/vmlinuz-6.12.43+deb13-amd64": "file"}, (), ())
        assert identity.rename_boot_entries(found) == Actions()


def test_entries_with_a_name_of_the_distribution() -> None:
    """As openSUSE's sdbootutil makes them: the ID is in the arguments of the kernel."""
    path = "boot/efi/loader/entries/opensuse-tumbleweed-6.17-1.conf"
    text = b"options root=x systemd.machine_id=" + MACHINE_ID + b" quiet\n"
    actions = identity.rename_boot_entries(System({"etc/machine-id": MACHINE_ID, path: text}, {}, (), ()))
    assert actions == Actions(write={path: b"options root=x quiet\n"})


# Others that look before they act


def test_netplan_stays_without_cloud_init() -> None:
    assert traces.remove_network_profiles(system()).remove == []
    removed = traces.remove_network_profiles(system(**{"usr/bin/cloud-init": "file"})).remove
    assert "etc/netplan/50-cloud-init.yaml" in removed


def test_iscsi_name_of_debian() -> None:
    """Its iscsid does not start without the file."""
    path, script = "etc/iscsi/initiatorname.iscsi", {"usr/lib/open-iscsi/startup-checks.sh": "file"}
    files = {path: b"InitiatorName=iqn.x\n"}
    assert identity.reset_iscsi_name(system(files=files, **script)).write == {path: b"GenerateName=yes\n"}
    assert identity.reset_iscsi_name(system(**script)) == Actions()
    assert identity.reset_iscsi_name(system(files=files)).remove == [path]


def test_a_file_that_one_operation_removes_is_not_written_by_another() -> None:
    path = "etc/zypp/repos.d/medium.repo"
    found = System({path: b"[x]\nbaseurl=cd:/\nproxy=http://x\n"}, {}, (), ())
    assert traces.forget_media(found).remove == [path]
    assert path in traces.forget_proxy(found).write
    written: list[str] = []

    class Recorded:
        def remove(self, patterns: list[str]) -> list[object]:
            return []

        def write(self, path: str, data: bytes, mode: int) -> None:
            written.append(path)

    seal.carry_out(Recorded(), [traces.forget_proxy(found), traces.forget_media(found)])
    assert written == []
