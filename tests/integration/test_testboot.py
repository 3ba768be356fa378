"""Test boots of a real system, good and broken in several ways, on real virtual machines, as an ordinary user."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from xml.etree import ElementTree

import pytest

from image_factory import checkpoint, pipeline
from image_factory.configuration.files import Configuration
from image_factory.finishing import firstboot
from image_factory.finishing.seal import identity
from image_factory.model import Artifact, Plan

from .. import golden
from ..conftest import TODAY, User, run, wait_for
from ..system.test_terminal import modes, on_terminal
from . import test_dry_run

WORK = ".image-factory-golden"
# So long may a boot take, on a busy machine.
SECONDS = 900
SCRIPT = """\
#!/bin/bash
# The kernel's own file, and the rights that the user of the seed has.
[[ $(sudo id -u) = 0 ]] && echo "script on $(hostname) as $(id -un)" && exit {status}
"""


@pytest.fixture(scope="module")
def golden_disk(base: Path) -> Path:
    """The disk where the user can read it."""
    path = base / "golden.raw"
    run("cp", "--sparse=always", golden.disk(), path)
    return path


@dataclass
class Scene:
    """An image of the golden disk, converted, and a build that is to be resumed there."""

    user: User
    directory: Path
    disk: Path
    # What a dry run has printed before.
    shown: str = ""

    @property
    def work(self) -> Path:
        return self.directory / WORK

    @property
    def results(self) -> Path:
        return self.directory / f"golden-{TODAY}.junit.xml"

    def configure(self, extra: str, timeout: int = SECONDS) -> Plan:
        """Write a configuration, with *extra* settings, and return its plan."""
        (self.directory / "linux").write_bytes(b"")
        (self.directory / "image-factory.conf").write_text(
            f"[golden]\nlinux = {self.directory}/linux\ninitrd = {self.directory}/linux\n"
            f"image-size = {golden.DISK_SIZE}\nformat = qcow2\nvirt-type = qemu\nram = 512M\nmount-via = guestfs\n"
            f"test-boot = yes\ntest-boot-timeout = {timeout}s\n{extra}\n"
        )
        configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(self.directory / "image-factory.conf")})
        return pipeline.make_plan(configuration, "golden", {"output-dir": str(self.directory)})

    def install(self, extra: str) -> None:
        """Have the disk there as an installation leaves it."""
        plan = self.configure(extra)
        self.work.mkdir()
        run("cp", "--sparse=always", self.disk, self.work / "disk.raw")
        self._reach(plan, "installed", [])

    def prepare(self, change: str = "", extra: str = "", timeout: int = SECONDS) -> None:
        """Make the image of a copy of the disk in which debugfs has made *change*."""
        plan = self.configure(extra, timeout)
        self.work.mkdir()
        artifact = self.work / f"golden-{TODAY}.qcow2"
        copy = self.disk
        if change:
            copy = self.directory / "changed.raw"
            run("cp", "--sparse=always", self.disk, copy)
            self._change(copy, change)
        # What is as on the disk stays there: nobody has to read and hash it again and again.
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", copy]
        run(*create, artifact)
        if change:
            run("qemu-img", "rebase", "-F", "raw", "-b", self.disk, artifact)
            copy.unlink()
        digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
        (self.work / f"{artifact.name}.sha256sum").write_text(f"{digest}  {artifact.name}\n")
        self._reach(plan, "converted", [Artifact(artifact, "qcow2", golden.DISK_SIZE, sha256=digest)])

    def _reach(self, plan: Plan, stage: str, artifacts: list[Artifact]) -> None:
        found = checkpoint.Checkpoint(
            self.work, checkpoint.inputs_of(plan), checkpoint.outputs_of(plan), TODAY, "qemu", [],
            Path("/proc/sys/kernel/random/boot_id").read_text(),
        )  # fmt: skip
        found.reach(checkpoint.Reached(stage), artifacts)
        for path in (self.work, *self.work.iterdir()):
            shutil.chown(path, self.user.name)

    def _change(self, copy: Path, change: str) -> None:
        if change == "no boot loader":
            with copy.open("r+b") as file:
                file.write(bytes(440))
            return
        root = f"{copy}?offset={golden.ROOT_OFFSET}"
        free = re.search(r"^Free blocks: +([0-9]+)$", run("debugfs", "-R", "stats -h", root).stdout, re.MULTILINE)
        assert free is not None
        commands = self.directory / "commands"
        # But for what the list of the file's own blocks takes.
        commands.write_text(change.replace("FREE", str(int(free[1]) - 200)))
        run("debugfs", "-w", "-f", commands, root)

    def argv(self, *flags: str) -> list[str]:
        configuration = str(self.directory / "image-factory.conf")
        return self.user.argv(self.user.program, *flags, "--resume", "golden", IMAGE_FACTORY_CONFIG=configuration)

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        return run(*self.argv(*flags), check=False, cwd=self.directory)

    @contextmanager
    def started(self) -> Iterator["subprocess.Popen[bytes]"]:
        with (self.directory / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                self.argv(), cwd=self.directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
            )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def qemu(self) -> list[int]:
        """Return the processes of the test boot's QEMU."""
        found = run("pgrep", "-u", self.user.name, "-f", f"qemu-system.*{self.directory}", check=False).stdout
        return [int(word) for word in found.split()]

    def checks(self) -> dict[str, str]:
        """Return how the checks ended in JUnit's file: nothing, ``failure`` or ``skipped`` with the message."""
        cases = ElementTree.parse(self.results).iter("testcase")
        return {
            f"{str(case.get('classname')).rpartition('.')[2]} {case.get('name')}": "".join(
                f"{element.tag}: {element.get('message')}" for element in case
            )
            for case in cases
        }


@pytest.fixture
def scene(request: pytest.FixtureRequest, users: dict[str, User], golden_disk: Path) -> Iterator[Scene]:
    # Without a sudo rule.
    user = users["c"]
    directory = user.directory(re.sub(r"\W", "-", request.node.name)[:40])
    found = Scene(user, directory, golden_disk)
    yield found
    assert found.qemu() == []
    shutil.rmtree(directory)


FAILING_UNIT = """\
[Unit]
Description=Fails
[Service]
Type=oneshot
ExecStart=/bin/false
"""


@dataclass
class Broken:
    """What debugfs does to the disk, which check fails, what is said, and after how many seconds at most."""

    change: str
    check: str
    reason: str
    seconds: int = SECONDS
    timeout: int = SECONDS
    script_status: int = 0


# The second one runs when the first one has succeeded; neither is there any more when people come.
FIRST_BOOT = {
    "first": "#!/bin/sh -e\nid -u\nip -4 route show default | grep default\necho $HOME first >/root/ran\n",
    "second": "#!/usr/bin/env bash\n[[ $(cat /root/ran) = '/root first' ]] && echo second >>/root/ran\n",
}
FIRST_BOOT_RAN = """\
#!/bin/bash
[[ $(sudo cat /root/ran) = "/root first
second" ]] && [[ -f /srv/new/script ]] && [[ ! -e /var/lib/image-factory ]] && echo "script as $(id -un)"
"""
BROKEN = {
    "no boot loader": Broken(
        "no boot loader", "boot", "it did not start: within 60 s .*Booting from Hard Disk", timeout=60
    ),
    "kernel panic": Broken(
        "rm /lib/systemd/systemd\nwrite /bin/false /lib/systemd/systemd\nsif /lib/systemd/systemd mode 0100755\n",
        "boot", "its kernel panicked: Attempted to kill init!",
    ),
    # There is no report: cloud-init has no room for it.
    "root full": Broken("write /dev/null /fill\nfallocate /fill 0 FREE\n", "boot", "its root filesystem is full"),
    "a failing unit, a failing script": Broken(
        "cd /etc/systemd/system\nwrite UNIT broken.service\n"
        "cd multi-user.target.wants\nsymlink broken.service /etc/systemd/system/broken.service\n"
        "mkdir /etc/systemd/system/multi-user.target.d\nmkdir /var/lib/image-factory\nmkdir /DIRECTORY\n"
        "write SCRIPT /DIRECTORY/01-script\nsif /DIRECTORY/01-script mode 0100700\n"
        "write FIRST /FIRST\nwrite DROP-IN /DROP-IN\n",
        "first-boot", r"broken\.service, image-factory-first-boot\.service failed; its first-boot scripts did not "
        r"succeed: .*no luck at the first boot.*; script failed with status 3: script on \S+ as image-factory",
        script_status=3,
    ),
    "no sshd, no network": Broken(
        "rm /usr/sbin/sshd\nrm /lib/systemd/system/ssh.service\nrm /etc/systemd/system/sshd.service\n"
        "rm /etc/systemd/system/multi-user.target.wants/ssh.service\nrm /usr/sbin/dhclient\n",
        "network", "sshd is not installed; it has no network: no card has an IPv4 address; networking.service failed",
    ),
}  # fmt: skip


# The scene, how the build ended, and after how many seconds.
Built = tuple[Scene, "subprocess.CompletedProcess[str]", float]
GOLDEN = "golden"


def with_first_boot(found: Scene, change: str) -> str:
    """Return *change* with the files of first-boot scripts, of which the first one fails."""
    (found.directory / "first").write_text("#!/bin/sh\necho no luck at the first boot\nexit 7\n")
    change = change.replace("SCRIPT", f"{found.directory}/first").replace("DIRECTORY", firstboot.DIRECTORY)
    files = identity.unit_files(firstboot.SERVICE, firstboot.UNIT_TEXT)
    for word, (path, data) in zip(("FIRST", "DROP-IN"), files.items(), strict=True):
        file = found.directory / path.rpartition("/")[2]
        file.write_bytes(data)
        change = change.replace(f"write {word} /{word}", f"write {file} /{path}")
    return change


@pytest.fixture(scope="module")
def built(users: dict[str, User], golden_disk: Path) -> Iterator[dict[str, Built]]:
    """An installed system, whose boots run side by side, and then the broken ones, of which the first boot fails.

    Each of these has one processor, so that no second machine is started in vain.
    """
    scenes = {}
    for name in (GOLDEN, *BROKEN):
        scenes[name] = found = Scene(users["c"], users["c"].directory(re.sub(r"\W", "-", name)), golden_disk)
        extra = f"test-script = {found.directory}/script"
        status = BROKEN[name].script_status if name in BROKEN else 0
        (found.directory / "script").write_text(SCRIPT.format(status=status))
        if name in BROKEN:
            (found.directory / "unit").write_text(FAILING_UNIT)
            change = BROKEN[name].change.replace("UNIT", f"{found.directory}/unit")
            if "FIRST" in change:
                change = with_first_boot(found, change)
                extra += f"\nfirst-boot = {found.directory}/first"
            found.prepare(change, extra, timeout=BROKEN[name].timeout)
        else:
            key = test_dry_run.make_key(found.user, found.directory)
            found.user.run("mkdir", found.directory / "upload")
            keys = test_dry_run.all_keys(found.user, found.directory, key)
            (found.directory / "script").write_text(FIRST_BOOT_RAN)
            for script, text in FIRST_BOOT.items():
                (found.directory / script).write_text(text)
            extra += f"\nfirst-boot = {', '.join(f'{found.directory}/{script}' for script in FIRST_BOOT)}"
            found.install(f"firmware = hybrid\n{extra}\n{keys}")
            found.shown = found.run("--dry-run").stdout

    processors: Queue[int] = Queue()
    for processor in os.sched_getaffinity(0):
        processors.put(processor)

    def build(found: Scene, *words: str) -> Built:
        start = time.monotonic()
        done = run(*words, *found.argv("--json", "record.json"), check=False, cwd=found.directory)
        return found, done, time.monotonic() - start

    def build_on_one(name: str) -> Built:
        processor = processors.get()
        try:
            return build(scenes[name], "taskset", "--cpu-list", str(processor))
        finally:
            processors.put(processor)

    golden_one = build(scenes[GOLDEN])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {GOLDEN: golden_one, **dict(zip(BROKEN, pool.map(build_on_one, BROKEN), strict=True))}
    for found in scenes.values():
        shutil.rmtree(found.directory)


def test_an_installed_system_becomes_a_golden_image(built: dict[str, Built]) -> None:
    """Sealed, listed, audited, and booted with both firmwares, as shipped recipes have it; a dry run shows it all."""
    scene, done, _ = built[GOLDEN]
    print(done.stderr)
    assert done.returncode == 0
    assert scene.shown.count("# Booting ") == 2
    test_dry_run.compare(scene.directory / "image-factory.conf", "golden", scene.shown, done.stderr)
    record = json.loads((scene.directory / "record.json").read_text())
    assert {entry["name"] for entry in record["sealed"] if entry["files"] or entry["changed"]} >= {
        "machine-id", "ssh-host-keys", "random-seed", "histories", "logs", "package-caches"
    }  # fmt: skip
    assert record["audit"]["findings"] == []
    assert [boot["firmware"] for boot in record["test_boots"]] == ["bios", "uefi"]
    found = scene.checks()
    assert set(found.values()) == {""}, found
    assert {name.split()[0] for name in found} == {"1-bios", "2-uefi"}
    assert {"2-uefi machine-id-new", "2-uefi host-keys-new", "1-bios login", "1-bios root-size"} <= set(found)
    assert "as image-factory" in done.stderr
    name = f"golden-{TODAY}.qcow2"
    run("sha256sum", "--check", f"{name}.sha256sum", cwd=scene.directory)
    packages = json.loads((scene.directory / f"{name}.manifest.json").read_text())["packages"]
    assert {"openssh-server", "cloud-init"} <= {package["name"] for package in packages if package["licenses"]}
    assert not scene.work.exists()
    for step in record["steps"]:
        print(f"{step['name']}: {step['seconds']:.0f} s")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_fails_for_its_reason(built: dict[str, Built], name: str) -> None:
    expected = BROKEN[name]
    found, done, seconds = built[name]
    print(done.stderr[-6000:])
    assert done.returncode == 1
    error = next(line for line in done.stderr.splitlines() if line.startswith("image-factory: error: "))
    assert re.search(f"golden-{TODAY}.qcow2 failed its test boot with bios: .*{expected.reason}", error)
    assert found.checks()[f"1-bios {expected.check}"].startswith("failure: ")
    assert found.checks()["1-bios unchanged"] == ""
    assert seconds < expected.seconds
    assert not (found.directory / f"golden-{TODAY}.qcow2").exists()
    # What can be resumed, and nothing of the boot.
    assert {path.suffix for path in found.work.iterdir()} == {".json", ".qcow2", ".sha256sum"}


def stopped(scene: Scene, stop: Callable[["subprocess.Popen[bytes]", int], None]) -> tuple[int, str]:
    """Start a build, have *stop* called when QEMU runs; return the status and what was printed."""
    scene.prepare()
    with scene.started() as process:
        wait_for(lambda: scene.qemu() or process.poll() is not None, "QEMU")
        stop(process, scene.qemu()[0])
        process.wait(60)
    wait_for(lambda: not scene.qemu(), "QEMU to end", 30)
    return process.returncode, (scene.directory / "stderr").read_text()


def program(scene: Scene) -> int:
    """Return the process of image-factory itself, below runuser."""
    return scene.user.build_process()


def test_sigterm(scene: Scene) -> None:
    status, printed = stopped(scene, lambda _process, _qemu: os.kill(program(scene), signal.SIGTERM))
    assert (status, "Stopped by SIGTERM" in printed) == (143, True)
    assert {path.suffix for path in scene.work.iterdir()} == {".json", ".qcow2", ".sha256sum"}


def test_qemu_is_killed(scene: Scene) -> None:
    status, printed = stopped(scene, lambda _process, qemu: os.kill(qemu, signal.SIGKILL))
    assert (status, "QEMU ended with status -9" in printed) == (1, True)
    assert {path.suffix for path in scene.work.iterdir()} == {".json", ".qcow2", ".sha256sum"}


def test_the_program_is_killed(scene: Scene) -> None:
    """QEMU ends too; what is left of the boot is removed by the next build, or like here."""
    stopped(scene, lambda _process, _qemu: os.kill(program(scene), signal.SIGKILL))
    assert (scene.work / "boot-1").is_dir()
    scene.user.run(scene.user.program, "--cleanup", "-o", scene.directory)
    assert not scene.work.exists()


def test_a_shell_in_an_image(users: dict[str, User], golden_disk: Path, tmp_path: Path) -> None:
    """By its own sshd, on a terminal; root's by sudo; what was done is in the overlay that is kept."""
    kept, raw = tmp_path / "kept.qcow2", tmp_path / "kept.raw"
    words = ["--set", "virt-type=qemu", "--set", "ram=512M", "--set", f"test-boot-timeout={SECONDS}s"]
    argv = users["root"].argv(users["root"].program, "--run", golden_disk, "--keep-overlay", kept, *words, TERM="xterm")
    with on_terminal(argv) as found:
        before = modes(found.terminal)
        found.read("This is a shell in golden.raw", SECONDS)
        found.type(b"stty -echo; echo $(id -un)-$(sudo id -u)-$TERM; sudo touch /kept; exit\n")
        found.read("image-factory-0-xterm")
        assert found.process.wait(SECONDS) == 0, found.text
        assert modes(found.terminal) == before
    print(found.text)
    run("qemu-img", "convert", "-O", "raw", kept, raw)
    assert "Inode:" in run("debugfs", "-R", "stat /kept", f"{raw}?offset={golden.ROOT_OFFSET}").stdout
    # It went off in good order.
    assert "needs_recovery" not in run("debugfs", "-R", "features", f"{raw}?offset={golden.ROOT_OFFSET}").stdout


def test_a_matrix_with_secure_boot(scene: Scene) -> None:
    """Signed code boots securely from another disk, with a TPM; Debian's kernel for clouds has no driver for SATA."""
    scene.prepare(extra="firmware = hybrid\ntest-boot-matrix = virtio-blk sata, secure-boot, tpm")
    done = scene.run("--json", "record.json")
    print(done.stderr[-8000:])
    error = next(line for line in done.stderr.splitlines() if line.startswith("image-factory: error: "))
    assert "1 of 2 test boots failed: with sata: its kernel has no driver ahci (its initramfs " in error
    found = scene.checks()
    assert {name for name, result in found.items() if "failure" in result} == {"2-secure-boot-sata-tpm boot"}
    assert {f"1-secure-boot-virtio-blk-tpm {name}" for name in ("secure-boot", "tpm", "login")} <= {*found}
    record = json.loads((scene.directory / "record.json").read_text())
    assert [boot["devices"] for boot in record["test_boots"]] == [["virtio-blk", "tpm"], ["sata", "tpm"]]
    assert {path.suffix for path in scene.work.iterdir()} == {".json", ".qcow2", ".sha256sum"}
