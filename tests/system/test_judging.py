"""Images of others, judged as a user does it: each way to mount, hostile ones, and what is left of it."""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest

from tests.conftest import REPOSITORY, TODAY, User, machine_state, wait_for
from tests.system.test_foreign import left

OS_RELEASE = 'ID=debian\nVERSION_ID="12"\nPRETTY_NAME="A system"\n'
PACKAGE = "Package: {}\nStatus: install ok installed\nArchitecture: amd64\nVersion: {}\n\n"
HASH = "$6$abcdefgh$abcdefghijklmnopqrstuvwxyz0123456789"
ROOT = {
    "etc/os-release": OS_RELEASE,
    "etc/fstab": "",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "usr/lib/os-release": OS_RELEASE,
    "var/lib/dpkg/status": PACKAGE.format("base-files", "12.4") + PACKAGE.format("linux-image-6.1.0-1-amd64", "6.1.1"),
    "root/x": "",
}
FOUND = {
    "etc/ssh/ssh_host_rsa_key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n",
    "etc/shadow": f"root:{HASH}:19000:0:99999:7:::\n",
    "var/log/installer/x": "said\n",
}


def tree(top: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return top


def bare(path: Path, top: Path) -> Path:
    """Make a filesystem with what is in *top*."""
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", top, path, "32M"], check=True, capture_output=True)
    return path


def disk(path: Path, *parts: bytes | Path) -> Path:
    """Make a disk of *parts*, one a partition."""
    table, offset = "label: gpt\n", 1
    with path.open("wb") as file:
        for part in parts:
            data = part.read_bytes() if isinstance(part, Path) else part
            file.seek(offset << 20)
            file.write(data)
            size = -(-len(data) >> 20)
            table += f"start={offset}MiB, size={size}MiB\n"
            offset += size
        file.truncate(offset + 1 << 20)
    subprocess.run(["sfdisk", "--quiet", path], input=table, text=True, check=True, capture_output=True)
    return path


def converted(path: Path, driver: str) -> Path:
    target = path.with_suffix(f".{driver}")
    subprocess.run(["qemu-img", "convert", "-O", driver, path, target], check=True, capture_output=True)
    return target


def tar(path: Path, top: Path, *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(top, ".")
        for member in extra:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size, found.mode = kind, target, size, 0o644
    found.devmajor, found.devminor = 7, 0
    return found


@dataclass
class Place:
    """Where a *user* judges images; nothing else is to be left there, or in /var/tmp and /tmp."""

    user: User
    path: Path

    def __post_init__(self) -> None:
        self.path.chmod(0o755)
        shutil.chown(self.path, self.user.name)

    def own(self, path: Path) -> Path:
        shutil.chown(path, self.user.name)
        path.chmod(0o644)
        return path

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        before = self.left()
        state = self.state()
        done = self.user.run(self.user.program, "-q", *words, check=False, cwd=self.path)
        assert "Traceback" not in done.stderr
        assert self.left() == before
        assert {path: self.state().get(path) for path in state} == state
        return done

    def state(self) -> dict[Path, tuple[str, int]]:
        """Return what the images in the place are, and when they were changed."""
        found = [path for path in self.path.iterdir() if path.is_file() and not path.name.endswith(("json", "xml"))]
        return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in found}

    def left(self) -> list[str]:
        return [*map(str, left()), *machine_state()]


# Root; who may run the helper, and so mounts by a loop device; and who may run nothing.
@pytest.fixture(params=["root", "a"])
def place(request: pytest.FixtureRequest, users: dict[str, User], tmp_path_factory: pytest.TempPathFactory) -> Place:
    return _place(users[request.param])


@pytest.fixture
def root(users: dict[str, User]) -> Place:
    return _place(users["root"])


def _place(user: User) -> Place:
    path = user.home / "judged"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return Place(user, path)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    return tree(tmp_path / "top", ROOT)


def junit_of(place: Place, name: str) -> dict[str, str | None]:
    """Return what the cases of the results of *name* say, None where one has passed."""
    suites = ElementTree.parse(place.path / f"{name}.junit.xml")
    cases = {case.get("name", ""): case.find("failure") for case in suites.iter("testcase")}
    return {name: None if failure is None else failure.get("message") for name, failure in cases.items()}


MADE: dict[str, Callable[[Path, Path], Path]] = {
    "x.img": bare,
    "x.qcow2": lambda path, top: converted(
        disk(path.with_suffix(".raw"), bare(path.with_suffix(".part"), top)), "qcow2"
    ),
    "x.tar.gz": lambda path, top: gzipped(tar(path.with_suffix(""), top)),
}


def gzipped(path: Path) -> Path:
    target = path.with_name(f"{path.name}.gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


@pytest.mark.parametrize("name", MADE)
def test_audit(place: Place, top: Path, name: str) -> None:
    clean = place.own(MADE[name](place.path / name, top))
    done = place.run("--audit", clean)
    assert (done.returncode, done.stderr) == (0, "")
    first, last = done.stdout.splitlines()
    assert first == f"{name}: the audit has found nothing."
    assert last.endswith("by passwords, answer-file, proxy-password, task-secrets, leftovers.")
    assert set(junit_of(place, name).values()) == {None}

    (place.path / name).unlink()
    bad = place.own(MADE[name](place.path / name, tree(top, FOUND)))
    done = place.run("--audit", bad, "--json", "record.json")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == f"{name}: the audit has found 3 things."
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["ssh-host-keys", "/etc/ssh/ssh_host_rsa_key"],
        ["passwords", "/etc/shadow"],
        ["logs", "/var/log/installer/x"],
    ]
    assert done.stderr.startswith(f"image-factory: error: {name} has what must not be cloned.\n")
    found = junit_of(place, name)
    assert [check for check, message in found.items() if message] == ["ssh-host-keys", "passwords", "logs"]
    record = json.loads((place.path / "record.json").read_text())
    jsonschema.validate(record, json.loads((REPOSITORY / "data/build-record.schema.json").read_text()))
    assert [each["check"] for each in record["audit"]["findings"]] == ["ssh-host-keys", "passwords", "logs"]
    assert record["audit"]["unsearched"][0] == "passwords"
    assert record["failure"]["exit_status"] == 1

    given = ("--set", f"root-password-hash={HASH}", "--set", "audit-skip=logs,ssh-host-keys,private-keys")
    done = place.run("--audit", bad, *given)
    assert (done.returncode, done.stderr) == (0, "")
    assert "by answer-file, proxy-password" in done.stdout


def test_manifest_and_comparison(place: Place, top: Path) -> None:
    one = place.own(MADE["x.qcow2"](place.path / "one.qcow2", top))
    tree(top, {"var/lib/dpkg/status": PACKAGE.format("base-files", "13") + PACKAGE.format("added", "1")})
    two = place.own(tar(place.path / "two.tar", top))
    done = place.run("--manifest", one)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  system +A system$", done.stdout, re.MULTILINE)
    assert re.search(r"^  kernel +linux-image-6.1.0-1-amd64 6.1.1$", done.stdout, re.MULTILINE)
    written = place.path / "one.qcow2.manifest.json"
    document = json.loads(written.read_text())
    jsonschema.validate(document, json.loads((REPOSITORY / "data/manifest.schema.json").read_text()))
    assert document["artifact"]["sha256"] == hashlib.sha256(one.read_bytes()).hexdigest()
    assert json.loads((place.path / "one.qcow2.cdx.json").read_text())["bomFormat"] == "CycloneDX"

    assert place.run("--compare", one, written).returncode == 0
    done = place.run("--compare", written, two, "--json", "-")
    assert done.returncode == 1
    found = json.loads(done.stdout)["difference"]["packages"]
    assert [each["name"] for each in found["added"]] == ["added"]
    assert [each["name"] for each in found["removed"]] == ["linux-image-6.1.0-1-amd64"]
    assert [each["after"] for each in found["changed"]] == ["13"]
    assert junit_of(place, "two.tar")["packages-changed"] == "base-files.amd64 12.4 -> 13"
    assert "    * base-files.amd64 12.4 -> 13\n" in place.run("--compare", one, two).stdout


def test_sealed_copy(place: Place, top: Path) -> None:
    image = place.own(MADE["x.qcow2"](place.path / "server.qcow2", tree(top, FOUND)))
    done = place.run("--seal", image, "-o", "out", "--set", "manifest=yes")
    assert done.returncode == 0, done.stderr
    sealed = place.path / f"out/server-{TODAY}.qcow2"
    assert {path.name for path in sealed.parent.iterdir()} == {
        sealed.name, *(f"{sealed.name}.{each}" for each in ("sha256sum", "manifest.json", "cdx.json")),
    }  # fmt: skip
    assert place.run("--audit", sealed, "--set", f"root-password-hash={HASH}").returncode == 0


def test_who_may_run_nothing(users: dict[str, User], top: Path) -> None:
    """The tar is mounted by FUSE, the disk in the appliance."""
    place = _place(users["c"])
    top = tree(top, FOUND)
    for image in (tar(place.path / "x.tar", top), MADE["x.qcow2"](place.path / "x.qcow2", top)):
        done = place.run("--audit", place.own(image), "--set", "virt-type=qemu")
        assert done.returncode == 1, done.stderr
        assert done.stdout.startswith(f"{image.name}: the audit has found 3 things.\n")


# What makes no sense.
REFUSED: dict[str, tuple[list[str], str]] = {
    "an image": (["--audit", "x.img", "x"], "--audit is for files, not for images."),
    "two at once": (["--audit", "x.img", "--manifest", "x.img"], "--manifest and --audit do not go together."),
    "a list": (["--audit", "x.img", "--list"], "--list and --audit do not go together."),
    "a check": (["--audit", "x.img", "--check"], "--check and --audit do not go together."),
    "going on": (["--seal", "x.img", "--resume"], "--resume and --seal do not go together."),
    "one to compare": (["--compare", "x.img"], "Argument --compare: expected 2 arguments."),
    "bad setting": (["--audit", "x.img", "--set", "audit-skip=x"], "[x.img] audit-skip: the audit has no check 'x'."),
    "absent": (["--audit", "none"], "--audit: none is not there."),
    "no place for results": (["--audit", "x.img", "-o", "x.img/y"], "[x.img] output-dir: "),
    "tree to seal": (["--seal", "x.tar"], "is a tar of a system's files, no disk."),
    "text": (["--manifest", "/etc/passwd"], "is no disk image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(root: Place, top: Path, case: str) -> None:
    bare(root.path / "x.img", top)
    tar(root.path / "x.tar", top)
    words, message = REFUSED[case]
    done = root.run(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr.splitlines()[0]
    assert {path.name for path in root.path.iterdir()} == {"x.img", "x.tar"}


def test_file_of_another_user(users: dict[str, User], top: Path) -> None:
    place = _place(users["a"])
    image = bare(place.path / "x.img", top)
    image.chmod(0o600)
    done = place.run("--audit", image)
    assert done.returncode == 2
    assert done.stderr == f"image-factory: error: --audit: {image} can't be read: Permission denied.\n"


def several_roots(path: Path, top: Path) -> Path:
    part = bare(path.with_suffix(".part"), top)
    return disk(path, part, part)


def no_root(path: Path, top: Path) -> Path:
    return bare(path, tree(top.with_name("data"), {"a": "b"}))


def encrypted(path: Path, top: Path) -> Path:
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.truncate(20 << 20)
    words = ["cryptsetup", "luksFormat", "--batch-mode", "--pbkdf-force-iterations=4", "--pbkdf-memory=32", part, "-"]
    subprocess.run(words, input=b"x", check=True, capture_output=True)
    return disk(path, part)


def damaged(path: Path, top: Path) -> Path:
    bare(path, top)
    with path.open("r+b") as file:
        file.seek(1024 + 0x60)
        file.write(b"\xff" * 200)
    return path


# What can't be told of them, whoever asks.
HOSTILE: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "no root": (no_root, "None of the disk's filesystems is a root filesystem"),
    "several roots": (several_roots, "several root filesystems, and nothing tells which one is meant"),
    "LUKS in a partition": (encrypted, "No root filesystem can be reached: partition 1 is encrypted"),
    "damaged filesystem": (damaged, "The disk has no root filesystem"),
    "empty table": (lambda path, top: disk(path, bytes(1 << 20)), "The disk has no root filesystem"),
    "tar without a root": (
        lambda path, top: tar(path, tree(top.with_name("data"), {"a": "b", "c": "d"})),
        "None of the disk's filesystems is a root filesystem",
    ),
    "tar that is cut off": (lambda path, top: cut(tar(path, top)), "can't be (unpacked|read)"),
}


def cut(path: Path) -> Path:
    os.truncate(path, path.stat().st_size // 2 // 512 * 512 + 100)
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_what_can_not_be_told(root: Place, top: Path, case: str) -> None:
    make, message = HOSTILE[case]
    image = make(root.path / "-x y\n.img", top)
    done = root.run("--audit", image)
    assert done.returncode == 2, done.stdout
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("image-factory: error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert "-x y" in errors[0] or "x_y_.img" in errors[0]


# Members that a tar of a system may have, and what must not come of them.
MEMBERS: dict[str, list[tarfile.TarInfo]] = {
    "ways out": [
        member("../../../../judged-escape", size=5),
        member("/tmp/judged-escape", size=5),
        member("./hard", tarfile.LNKTYPE, "../../../../../../../etc/hostname"),
        member("./a", tarfile.SYMTYPE, "/etc/shadow"),
        member("./b", tarfile.SYMTYPE, "/"),
    ],
    "link out": [member("./out", tarfile.SYMTYPE, "/tmp"), member("./out/judged-escape", size=5)],
    "link up": [
        member("./up", tarfile.SYMTYPE, "../../../../../../../../tmp"),
        member("./up/judged-escape", size=5),
    ],
    "devices": [member("./dev/loop0", tarfile.BLKTYPE), member("dev/null", tarfile.CHRTYPE)],
    "device elsewhere": [member("./opt-device", tarfile.BLKTYPE)],
    "odd ones": [
        member("./fifo", tarfile.FIFOTYPE),
        *(member(name) for name in ("./new\nline", "./-rf", "./$(id)", f"./{'x' * 250}", "./\udcff")),
    ],
}


@pytest.mark.parametrize("case", MEMBERS)
def test_hostile_members(place: Place, top: Path, case: str) -> None:
    image = place.own(tar(place.path / "x.tar", tree(top, FOUND), *MEMBERS[case]))
    done = place.run("--audit", image)
    if done.returncode == 1:
        assert done.stdout.startswith("x.tar: the audit has found ")
    else:
        assert done.returncode == 2
        assert re.search(r"^image-factory: error: .*can't be unpacked: ", done.stderr, re.MULTILINE)
    assert not [*Path("/tmp").glob("judged-escape"), *Path("/").glob("judged-escape")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stopped(place: Place, top: Path, number: int) -> None:
    image = place.own(MADE["x.qcow2"](place.path / "x.qcow2", top))
    before, state = place.left(), place.state()
    argv = place.user.argv(place.user.program, "--audit", image)
    with (place.path / "log.json").open("w+") as log:
        process = subprocess.Popen(argv, cwd=place.path, stdout=log, stderr=log)
        wait_for(lambda: "Auditing x.qcow2 ..." in (place.path / "log.json").read_text(), "the audit")
        os.kill(place.user.build_process(), number)
        status = process.wait(60)
    if number == signal.SIGKILL:
        # runuser tells it so.
        assert status in (-signal.SIGKILL, 128 + signal.SIGKILL)
        # The next one removes it.
        assert place.user.run(place.user.program, "-q", "--audit", image, cwd=place.path).returncode == 0
    else:
        assert status == 128 + number
    assert place.left() == before
    assert {path: place.state()[path] for path in state} == state
