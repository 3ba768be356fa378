"""The audit of images that are really opened, and mounted in each way."""

import dataclasses
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_factory import checkpoint, outputs, pipeline
from image_factory.base import events
from image_factory.base.errors import BuildError, NoSystemError
from image_factory.checks import audit
from image_factory.model import Artifact, Build, Plan
from image_factory.parts import carry_out
from image_factory.system import registrations

from ..conftest import REPOSITORY, machine_state, state_of
from ..leftovers import LEFTOVERS
from ..unit.test_leftovers import CLEAN, HASH, KEY, PLANTED, Contents, fill
from .test_audit import PROXY, M, Told, build_of

ASKED_FOR = f"root_password_hash = {HASH.replace('$', '$$')}\nauthorized_keys = ssh-ed25519 {KEY} me\nproxy = {PROXY}\n"


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sys.argv", [str(REPOSITORY / "image-factory")])
    before = set(machine_state())
    yield
    assert set(machine_state()) - before == set()


def make_build(directory: Path, way: str, extra: str = "") -> Build:
    directory.mkdir()
    (directory / "own.cfg").write_text(f"d-i passwd/root-password-crypted password {HASH}\n# The key: {KEY}\n" * 3)
    return build_of(directory, f"{ASKED_FOR}audit = yes\nmount-via = {way}\npreseed = {directory}/own.cfg\n{extra}")


def make_artifacts(build: Build, top: Path, *formats: str) -> list[Artifact]:
    """Return artifacts of a disk with an ext4 filesystem that has what is below *top*."""
    (top / "etc").mkdir(exist_ok=True, parents=True)
    (top / "etc/fstab").write_text("/dev/vda1 / ext4 defaults 0 1\n")
    size = 80
    with build.disk_path.open("wb") as file:
        file.truncate((size + 2) * M)
    table = f"label: gpt\nstart=1MiB, size={size}MiB\n"
    subprocess.run(["/usr/sbin/sfdisk", "--quiet", build.disk_path], input=table, text=True, check=True)
    argv = ["mke2fs", "-q", "-t", "ext4", "-d", top, "-E", f"offset={M}", build.disk_path, f"{size}M"]
    subprocess.run(list(map(str, argv)), check=True)
    artifacts = []
    for name in formats:
        path = build.directory / f"x.{name}"
        options = ["-c"] if name == "qcow2" else []
        argv = ["qemu-img", "convert", "-f", "raw", "-O", name, *options, build.disk_path, path]
        subprocess.run(list(map(str, argv)), check=True)
        artifacts.append(Artifact(path, name, (size + 2) * M))
    return artifacts


def audited(build: Build, artifacts: list[Artifact]) -> events.Audited:
    """Audit *artifacts*, which stay as they are; return what is told of it."""

    def state() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in build.directory.iterdir()}

    before, observer = state(), Told()
    with events.observed(observer):
        try:
            carry_out(state_of(build, artifacts), audit.steps(build))
        except BuildError:
            assert observer.events
            assert observer.events[0].findings
        else:
            assert not observer.events[0].findings
    # libguestfs' file to talk by is the build's own.
    assert {name: digest for name, digest in state().items() if name != "appliance-file"} == before
    [event] = observer.events
    return event


def test_clean_image_of_two_formats(tmp_path: Path) -> None:
    build = make_build(tmp_path / "build", "loop", "format = qcow2, raw\n")
    fill(tmp_path / "top", CLEAN)
    event = audited(build, make_artifacts(build, tmp_path / "top", "qcow2", "raw"))
    assert event == events.Audited("x.qcow2", audit.NAMES, ())


def test_clean_image_of_packed_formats(tmp_path: Path) -> None:
    """Each is opened as it is published; where one of them has something else, none is."""
    build = make_build(tmp_path / "build", "loop", "format = raw.zst, ova, vhdx, dd.tgz\n")
    fill(tmp_path / "top", CLEAN)
    make_artifacts(build, tmp_path / "top")
    artifacts = [*carry_out(state_of(build), outputs.steps(build)).artifacts]
    names = [artifact.path.name for artifact in artifacts]
    event = audited(build, artifacts)
    assert event == events.Audited(names[0], audit.NAMES, ())
    with build.disk_path.open("r+b") as file:
        file.seek(40 * M)
        file.write(b"another")
    alone = dataclasses.replace(build.plan, settings=dataclasses.replace(build.plan.settings, format=("dd.tgz",)))
    carry_out(state_of(build), outputs.steps(dataclasses.replace(build, plan=alone)))
    with pytest.raises(BuildError, match=rf"^{re.escape(names[3])} has not the contents of {re.escape(names[0])}\.$"):
        carry_out(state_of(build, artifacts), audit.steps(build))


def compatible(every: int) -> Contents:
    """Return as many of *every* so many planted leftovers as one system can have."""
    contents = dict(CLEAN)
    for _, name, data in PLANTED[::every]:
        parents = {str(parent) for parent in Path(name).parents}
        if not parents & contents.keys() and not any(other.startswith(f"{name}/") for other in contents):
            contents[name] = data
    return contents


# Under emulation each question takes its time.
@pytest.mark.parametrize(("way", "every", "least"), [("loop", 1, 90), ("guestfs", 9, 9)])
def test_the_same_is_found_as_in_a_directory(tmp_path: Path, way: str, every: int, least: int) -> None:
    """Leftovers of the table at once; that each is found is in test_leftovers."""
    contents = compatible(every)
    files = fill(tmp_path / "top", contents)
    (tmp_path / "top/var/lib/dbus/link").symlink_to("/etc/machine-id")
    (tmp_path / "top/home/linked").symlink_to("/root")
    os.mkfifo(tmp_path / "top/etc/ssh/pipe")
    build = make_build(tmp_path / "build", way)
    event = audited(build, make_artifacts(build, tmp_path / "top", "qcow2"))
    asked, _ = audit.secrets_of(build)
    expected = [(found.check, found.what) for found in audit.audit_files(files, asked)]
    assert len(expected) > least
    found = [finding for finding in event.findings if " of the disk " not in finding[1]]
    assert sorted(found) == sorted(expected)


def test_deleted_and_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was removed from the files is found in their blocks, and no message has it."""
    build = make_build(tmp_path / "build", "loop", "audit-skip = identity")
    answers = (tmp_path / "build/own.cfg").read_bytes()
    fill(tmp_path / "top", CLEAN | {"gone": answers + b"build:s;cret-pw@"})
    artifacts = make_artifacts(build, tmp_path / "top", "raw")
    argv = ["debugfs", "-w", "-R", "rm gone", f"{artifacts[0].path}?offset={M}"]
    subprocess.run(argv, check=True, capture_output=True)
    with pytest.raises(BuildError) as caught:
        carry_out(state_of(build, artifacts), audit.steps(build))
    assert caught.value.message.startswith("x.raw has what must not be cloned: the hash of a password, elsewhere than")
    assert (caught.value.hint or "").endswith("audit-skip = passwords, answer-file, proxy-password")
    for text in (caplog.text, str(caught.value), caught.value.hint or ""):
        assert HASH not in text
        assert "s;cret" not in text


def test_image_without_a_system(tmp_path: Path) -> None:
    build = make_build(tmp_path / "build", "loop")
    artifacts = make_artifacts(build, tmp_path / "top", "raw")
    subprocess.run(["mke2fs", "-q", "-F", "-E", f"offset={M}", artifacts[0].path, "80M"], check=True)
    with pytest.raises(NoSystemError):
        carry_out(state_of(build, artifacts), audit.steps(build))
    assert not audit.copy_path(build).exists()


def installed(directory: Path, contents: Contents) -> Build:
    """Return a build whose disk is installed and cleaned, as --resume finds it."""
    build = make_build(directory, "loop", "format = qcow2, raw\n")
    fill(directory / "top", contents)
    make_artifacts(build, directory / "top")
    done = checkpoint.begin(build, checkpoint.InputsUsed())
    done.reach(checkpoint.Reached.CLEANED)
    return build


def published(plan: Plan) -> list[str]:
    return sorted(path.name for path in plan.output_dir.glob(f"{plan.base_name}*"))


def test_build_publishes_what_passes(tmp_path: Path) -> None:
    plan = installed(tmp_path / "build", CLEAN).plan
    artifacts = pipeline.build_image(plan, resume=True)
    assert len(artifacts) == 2
    assert len(published(plan)) == 4
    assert not plan.work_path.exists()


def test_build_publishes_nothing_else(tmp_path: Path) -> None:
    """However often it is resumed, until the user wants it."""
    plan = installed(tmp_path / "build", CLEAN | {"etc/machine-id": "0" * 32}).plan
    for _ in range(3):
        with pytest.raises(BuildError, match=r"/etc/machine-id has a machine-id\.$") as caught:
            pipeline.build_image(plan, resume=True)
        assert "--resume x" in (caught.value.hint or "")
        assert published(plan) == []
        assert sorted(path.name for path in plan.work_path.iterdir()) == [
            "checkpoint.json",
            "disk.raw",
            *(f"{plan.base_name}.{name}{more}" for name in ("qcow2", "raw") for more in ("", ".sha256sum")),
        ]
    stage = checkpoint.read(plan.work_path)
    assert stage is not None
    assert stage.stage == "converted"
    pipeline.build_image(plan, resume=True, until="convert")
    settings = dataclasses.replace(plan.settings, audit_skip=("machine-id",))
    pipeline.build_image(dataclasses.replace(plan, settings=settings), resume=True)
    assert len(published(plan)) == 4


def test_dry_run_has_its_commands(tmp_path: Path) -> None:
    plan = make_build(tmp_path / "build", "loop", "format = qcow2, raw\n").plan
    described = pipeline.described(plan)
    steps, names = dict(described), [name for name, _ in described]
    raw, qcow2 = (plan.file_name(name) for name in ("raw", "qcow2"))
    first = names.index(f"Reopening {qcow2}")
    assert names[first:-1] == [
        f"Reopening {qcow2}",
        f"Comparing {raw}",
        f"Searching {qcow2}",
        "Reading the partition table",
        "Mounting the filesystems",
        f"Auditing {qcow2}",
        "Unmounting",
    ]
    assert names[-1] == "Publishing"
    [[program, verb, *_, target]] = steps[f"Reopening {qcow2}"]
    assert (program, verb, target) == ("qemu-img", "convert", str(plan.work_path / "audit.raw"))
    off = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, audit=False))
    assert not {name.split()[0] for name, _ in pipeline.described(off)} & {"Comparing", "Reopening", "Auditing"}


@pytest.mark.parametrize("sealed", ["yes", "no"])
def test_what_is_sealed_passes(tmp_path: Path, sealed: str) -> None:
    """With all that the tests of sealing plant, and no more than sealing to remove it."""
    build = make_build(tmp_path / "build", "loop", f"format = qcow2\nseal = {sealed}\n")
    planted = {planted.path: planted.content for planted in LEFTOVERS if planted.kind == "file"}
    # A key of a service is removed only where something makes another one.
    makers = {maker: "x" for key in (registrations.DROPBEAR, *registrations.KEYS) for maker in key.makers[:1]}
    system = {"usr/sbin/sshd": "x", "usr/bin/ssh-keygen": "x"}
    # Accounts as they are after it, and no kernel that has the name already.
    clean = {name: data for name, data in CLEAN.items() if "Default" not in name}
    accounts = {name: CLEAN[name] for name in ("etc/passwd", "etc/shadow")}
    fill(tmp_path / "top", clean | makers | planted | system | accounts)
    make_artifacts(build, tmp_path / "top")
    checkpoint.begin(build, checkpoint.InputsUsed())
    if sealed == "yes":
        assert len(pipeline.build_image(build.plan, resume=True)) == 1
        return
    observer = Told()
    with pytest.raises(BuildError, match="must not be cloned"), events.observed(observer):
        pipeline.build_image(build.plan, resume=True)
    [event] = observer.events
    assert len(event.findings) >= 40
