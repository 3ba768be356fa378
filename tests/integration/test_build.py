"""Whole builds with the stand-in installer in real virtual machines."""

import hashlib
import http.server
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, TODAY, User, left_behind, machine_state, run, vms, wait_for

pytestmark = pytest.mark.usefixtures("machine")

WORK = ".image-factory-stand-in"
ANSWERS = "stand-in/hostname string golden\nd-i passwd/root-password password s3cret\n"
# An ended child that the build waits for is a zombie for a moment, and longer while it is busy.
ZOMBIE_SECONDS = 8.0
SURVIVORS = ("var/log/dpkg.log", "var/log/installer-not-really", "root/.bashrc", "etc/fstab")
INSTALLER_LOGS = (
    "root/anaconda-ks.cfg",
    "root/original-ks.cfg",
    "root/install.log",
    "root/install.log.syslog",
    "var/log/anaconda",
    "var/log/anaconda.syslog",
    "var/log/installer",
    "var/log/YaST2",
    "var/lib/YaST2",
    "var/adm/autoinstall",
    "var/log/agama-installation",
)


@dataclass
class Build:
    """A place to build the stand-in in, as one user."""

    user: User
    directory: Path
    stand_in: Path

    def configure(
        self, *, arguments: str = "", extra: str = "", netboot: str | None = None, size: str = "512M"
    ) -> None:
        """Write a configuration whose installer gets the kernel *arguments*.

        On a busy machine the timer of an emulated one comes too late for the kernel's check, which panics then.
        """
        netboot = netboot or str(self.stand_in)
        (self.directory / "answers.cfg").write_text(ANSWERS)
        (self.directory / "image-factory.conf").write_text(
            f"""
[DEFAULT]
format = qcow2
max-parallel = none
[stand-in]
linux = {netboot}/linux
initrd = {netboot}/initrd.gz
preseed = {self.directory}/answers.cfg
append = console=ttyS0 no_timer_check {arguments}
image-size = {size}
ram = 512M
virt-type = qemu
{extra}
"""
        )

    def go_on_from(self, left: Path) -> None:
        """Have --resume go on from a copy of what another build has *left*, whose disk is as it is configured here."""
        run("cp", "--archive", "--sparse=always", left, self.directory / WORK)
        run("chown", "--recursive", self.user.name, self.directory / WORK)

    def argv(self, *flags: str | Path) -> list[str]:
        configuration = str(self.directory / "image-factory.conf")
        program = [self.user.program, *flags, "stand-in"]
        return self.user.argv(*program, IMAGE_FACTORY_CONFIG=configuration, SSH_AUTH_SOCK="")

    def run(self, *flags: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*self.argv(*flags), check=check, cwd=self.directory)

    @contextmanager
    def started(self, *flags: str | Path) -> Iterator["subprocess.Popen[str]"]:
        """Start a build whose stderr goes to the file stderr; killed on the way out."""
        with (self.directory / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                self.argv(*flags),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def stderr(self) -> str:
        return (self.directory / "stderr").read_text()

    def pid(self) -> int:
        """Return the process of image-factory itself, below runuser."""
        return self.user.build_process()

    def wait_for_guest(self, line: str) -> None:
        """Wait until the guest has printed *line*."""
        console = self.directory / ".image-factory-stand-in/console.log"
        wait_for(lambda: console.is_file() and line in console.read_text(errors="replace"), f"{line!r} on the console")

    def files(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}

    def errors(self, done: subprocess.CompletedProcess[str]) -> list[str]:
        return [line for line in done.stderr.splitlines() if line.startswith("image-factory: ")]


def new_build(user: User, request: pytest.FixtureRequest, stand_in: Path, name: str = "") -> Iterator[Build]:
    """Give a place to build in, by *name* if there is one; nothing but files may be left there."""
    before = set(machine_state())
    directory = user.directory(name or re.sub(r"[^a-z]+", "-", request.node.name)[:24] + os.urandom(2).hex())
    made = Build(user, directory, stand_in)
    yield made
    if (directory / WORK / "checkpoint.json").is_file():
        # What is kept for --resume.
        run(*made.argv("--cleanup"), cwd=directory)
    assert [*left_behind(user, directory), *(set(machine_state()) - before)] == []


@contextmanager
def mounted(image: Path) -> Iterator[Path]:
    """Give the root filesystem of a raw *image* (MBR, one partition), mounted read-only."""
    directory = image.parent / "mnt"
    directory.mkdir()
    run("mount", "-o", "ro,noload,loop,offset=1048576", image, directory)
    try:
        yield directory
    finally:
        run("umount", directory)
        directory.rmdir()


def logged_commands(log: str) -> list[list[str]]:
    mark = " INFO: Running: "
    return [shlex.split(line.partition(mark)[2]) for line in log.splitlines() if mark in line]


def normal(argv: list[str]) -> list[str]:
    """Replace what a dry run can't know."""
    text = "\0".join(argv)
    text = re.sub(r"/tmp/image-factory\.[^/]+/", "/tmp/image-factory.XXXXXXXX/", text)
    text = re.sub(r"image-factory-stand-in-[0-9a-f]{8}\b", "image-factory-stand-in-XXXXXXXX", text)
    text = re.sub(r"disk\.raw\x00[0-9]+\x00[0-9]+", "disk.raw\0OFFSET\0SIZE", text)
    text = re.sub(r"-O\x00[0-9]+\x00-S\x00[0-9]+", "-O\0OFFSET\0-S\0SIZE", text)
    text = re.sub(r"/partition-[0-9]+\b", "/partition-N", text)
    text = re.sub(r"\?offset=[0-9]+", "?offset=OFFSET", text)
    return text.split("\0")


def unused_blocks_left(raw: Path, offset: int) -> int:
    """Return how many unused blocks of the ext filesystem are not zeros."""
    # With -v the last line is "to be zeroed/free/all blocks".
    return int(run("zerofree", "-n", "-v", f"{raw}?offset={offset}").stdout.splitlines()[-1].partition("/")[0])


@contextmanager
def children_reaped(build: Build) -> Iterator[None]:
    """Watch the children of *build*, which runs inside: fail if one stays a zombie for long."""
    ended = threading.Event()
    running: set[int] = set()
    # When each zombie was seen first, and the name of each that stayed.
    since: dict[int, float] = {}
    left: dict[int, str] = {}

    def watch() -> None:
        while not ended.wait(0.2):
            found = run("pgrep", "-u", build.user.name, "-f", f"^/usr/bin/python3 {build.user.program}", check=False)
            zombies = set()
            for stat in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError):
                    before, _, after = stat.read_text().rpartition(")")
                    number, state, parent = int(stat.parent.name), *after.split()[:2]
                    if parent in found.stdout.split():
                        running.add(number)
                        if state == "Z":
                            zombies.add(number)
                            if time.monotonic() - since.setdefault(number, time.monotonic()) > ZOMBIE_SECONDS:
                                left[number] = before.partition("(")[2]
            for number in since.keys() - zombies:
                del since[number]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert len(running) >= 5
    assert left == {}


def test_whole_build(build: Build) -> None:
    upload = build.user.directory(f"upload-{build.directory.name}")
    build.configure(
        size="520M",
        extra=f"""
format = raw,qcow2
installer-logs = yes
log-file = yes
upload_destinations = here
post-build-command = sh -c 'echo built "$$@"' post-build
[here]
upload_type = rsync
upload_target = {upload}/
upload_args = --times
post-upload-command = stat --format 'uploaded %n' {upload}/${{image}}
post-upload-command1 = sh -c 'echo one "$$1"' command ${{image}}
""",
    )
    older = build.directory / f"stand-in-{TODAY}.qcow2"
    older.write_text("older")

    dry = build.run("--dry-run")
    assert build.files() == {"answers.cfg", "image-factory.conf", older.name}
    with children_reaped(build):
        # Of each program the build record asks the version, and takes the answers at the end.
        done = build.run("--json", "record.json")

    raw, qcow2 = (build.directory / f"stand-in-{TODAY}.{image_format}" for image_format in ("raw", "qcow2"))
    log = build.directory / f"stand-in-{TODAY}.log"
    checksums = {f"{path.name}.sha256sum" for path in (raw, qcow2)}
    console = f"stand-in-{TODAY}.console.log"
    sources = {"answers.cfg", "image-factory.conf", "record.json"}
    assert build.files() == {*sources, raw.name, qcow2.name, log.name, console, *checksums}
    for name in checksums:
        assert run("sha256sum", "--check", "--strict", name, cwd=build.directory).stdout.endswith(": OK\n")
    assert {path.name for path in upload.iterdir()} == {raw.name, qcow2.name, *checksums}
    run("cmp", qcow2, upload / qcow2.name)

    # What the image has: the answer file and the arguments arrived, the logs are gone, the rest is there.
    info = json.loads(run("qemu-img", "info", "--output=json", qcow2).stdout)
    assert info["virtual-size"] == 520 << 20
    assert info["format-specific"]["data"]["compression-type"] == "zstd"
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, qcow2)
    assert raw.stat().st_blocks * 512 < 64 << 20
    assert unused_blocks_left(raw, 1 << 20) == 0
    with mounted(raw) as tree:
        assert (tree / "etc/hostname").read_text() == "golden\n"
        assert hashlib.sha256(ANSWERS.encode()).hexdigest() in (tree / "etc/stand-in/answer-file.sha256").read_text()
        assert "preseed/url=file:///answers.cfg console=ttyS0" in (tree / "etc/stand-in/cmdline").read_text()
        assert [path for path in INSTALLER_LOGS if os.path.lexists(tree / path)] == []
        assert [path for path in SURVIVORS if not os.path.lexists(tree / path)] == []
        assert (tree / "root").stat().st_mode & 0o7777 == 0o700

    # What was said: steps with seconds, every command, what commands printed, the installer's logs.
    text = log.read_text()
    for step in ("Creating the disk", "Caching the installer", "Installing", "Removing installer logs", "Publishing"):
        assert re.search(rf"INFO: {step}: done in [0-9]+\.[0-9] s$", text, re.MULTILINE)
    for line in (
        "| ==> /var/log/installer/syslog <==",
        "| stand-in installer log: installer/syslog",
        "| stand-in installer log: YaST2/y2log",
        "Removed /var/log/installer",
        f"stat: uploaded {upload}/{qcow2.name}",
        f"sh: one {raw.name}",
        f"sh: built {raw.name} {qcow2.name}",
        f"SHA-256 of {raw.name}: ",
    ):
        assert f" INFO: {line}" in text
    assert "s3cret" not in text
    assert "\x1b" not in text + done.stderr
    assert done.stdout in text
    assert f"{qcow2}\n  virtual size  520.0 MiB\n" in done.stdout

    # A dry run tells exactly the commands of the build, in their order.
    announced = [normal(shlex.split(line)) for line in dry.stdout.splitlines() if not line.startswith("#")]
    ran = [normal(argv) for argv in logged_commands(text) if argv[-1] != "uri"]
    # From 512 MiB on ext4 has blocks as large as the host's, which can all be freed; and there is no swap.
    assert ran == [argv for argv in announced if argv[0] not in ("zerofree", "fallocate")]
    named = [line[2:] for line in dry.stdout.splitlines() if re.match("# [A-Z]", line)]
    named.remove("Zeroing logical volumes")
    named.remove("Zeroing unused blocks")
    named.remove("Zeroing swap space")
    assert named == re.findall(r" INFO: (.*): done in [0-9.]+ s$", text, re.M)


def test_cached_downloads(user_build: Build) -> None:
    """Kernel and initrd come over HTTP once; an unchanged file is not downloaded again."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code: object = "-", size: object = "-") -> None:
            requests.append(f"{self.path} {int(str(code))}")

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(user_build.stand_in))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        netboot = f"http://127.0.0.1:{server.server_port}"
        # With the disk untouched a build ends after two seconds, and its cache is there all the same.
        user_build.configure(netboot=netboot, arguments="stand-in=empty-disk")
        user_build.run(check=False)
        assert requests == ["/linux 200", "/initrd.gz 200"]
        user_build.run(check=False)
        assert requests[2:] == ["/linux 304", "/initrd.gz 304"]
        server.shutdown()
    cache = user_build.user.home / ".cache/image-factory/stand-in"
    assert {path.name for path in cache.iterdir() if path.name[0] != "."} == {"linux", "initrd.gz"}


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("empty-disk", "The disk has no partition table that can be read"),
        ("no-filesystem", "The disk has no root filesystem, only partition 1 (no known filesystem)"),
    ],
)
def test_no_system_on_the_disk(user_build: Build, mode: str, reason: str) -> None:
    user_build.configure(arguments=f"stand-in={mode}")
    done = user_build.run(check=False)
    assert done.returncode == 1
    assert user_build.errors(done)[0].startswith(f"image-factory: error: {reason}")
    assert re.search(r" ERROR: console: stand-in: ", done.stderr)
    console = user_build.directory / f"stand-in-{TODAY}.console.log"
    assert user_build.files() == {"answers.cfg", "image-factory.conf", console.name}
    assert console.stat().st_mode & 0o777 == 0o600


def test_hostile_links(build: Build) -> None:
    """A guest whose log directories are links to the host's /etc changes nothing of the host."""
    # Of users, and rules for them, another run makes and removes some meanwhile.
    users = r"/etc/sudoers\.d.*\|/etc/\(passwd\|shadow\|group\|gshadow\|subuid\|subgid\|\.pwd\)[-.+a-z0-9]*"
    listing = ("find", "/etc", "-mindepth", "1", "-path", "/etc/libvirt", "-prune", "-o", "!", "-regex", users, "-ls")
    before = run(*listing).stdout
    build.configure(arguments="stand-in=links", extra="installer-logs = yes\nformat = raw")
    done = build.run()
    assert run(*listing).stdout == before
    assert "| root:" not in done.stderr
    with mounted(build.directory / f"stand-in-{TODAY}.raw") as tree:
        assert (tree / "var/log").is_symlink()
        assert (tree / "etc/installer/syslog").exists()


def test_no_root_at_all(rootless_build: Build) -> None:
    """A user with no sudo rule builds an image: libguestfs is taken by itself, and does the same."""
    build = rootless_build
    build.configure(size="520M", extra="format = raw\ninstaller-logs = yes\nlog-file = yes")
    dry = build.run("--dry-run")
    done = build.run()
    assert "INFO: mount-via = guestfs is chosen: image-factory-sudo-helper can't be run as root: sudo: " in done.stderr
    raw = build.directory / f"stand-in-{TODAY}.raw"
    text = (build.directory / f"stand-in-{TODAY}.log").read_text()
    assert raw.stat().st_blocks * 512 < 64 << 20
    assert unused_blocks_left(raw, 1 << 20) == 0
    with mounted(raw) as tree:
        assert [path for path in INSTALLER_LOGS if os.path.lexists(tree / path)] == []
        assert [path for path in SURVIVORS if not os.path.lexists(tree / path)] == []
        assert (tree / "root").stat().st_mode & 0o7777 == 0o700
    for line in ("| ==> /var/log/installer/syslog <==", "Removed /var/log/installer"):
        assert f" INFO: {line}\n" in text
    announced = [normal(shlex.split(line)) for line in dry.stdout.splitlines() if not line.startswith("#")]
    ran = [normal(argv) for argv in logged_commands(text) if argv[-1] != "uri"]
    assert ran == [argv for argv in announced if argv[0] != "zerofree" and "--offset" not in argv]
    assert not any("sudo" in argv for argv in ran)
    # libguestfs keeps nothing here but its appliance.
    assert [path for path in Path("/tmp").iterdir() if path.stat().st_uid == build.user.uid] == []


def test_hostile_links_in_the_appliance(rootless_build: Build) -> None:
    rootless_build.configure(arguments="stand-in=links", extra="installer-logs = yes\nformat = raw")
    done = rootless_build.run()
    assert "INFO: | " not in done.stderr
    with mounted(rootless_build.directory / f"stand-in-{TODAY}.raw") as tree:
        assert (tree / "var/log").is_symlink()
        assert (tree / "etc/installer/syslog").exists()
        assert (tree / "etc/anaconda-ks.cfg").exists()
        assert not os.path.lexists(tree / "var/lib/YaST2")
        assert not os.path.lexists(tree / "var/adm/autoinstall")


def test_root_between_other_partitions(build: Build) -> None:
    """This root is so small that its blocks are smaller than the host's: zerofree has something to do."""
    build.configure(arguments="stand-in=gpt", extra="compression = none\nkeep-raw = yes")
    done = build.run()
    assert "Zeroing unused blocks: done" in done.stderr
    assert unused_blocks_left(build.directory / f"stand-in-{TODAY}.raw", 33 << 20) == 0
    info = json.loads(run("qemu-img", "info", "--output=json", build.directory / f"stand-in-{TODAY}.qcow2").stdout)
    assert info["format-specific"]["data"]["compression-type"] == "zlib"


def test_full_disk_and_reboot(user_build: Build) -> None:
    """A guest that has filled its disk is finished too, and one that reboots stays off."""
    arguments, extra = "stand-in=fill-disk,reboot", "keep-raw = yes\ncompression = zlib"
    user_build.configure(size="96M", arguments=arguments, extra=extra)
    user_build.run()
    assert {path.suffix for path in user_build.directory.glob(f"stand-in-{TODAY}.*")} == {
        ".raw", ".qcow2", ".sha256sum", ".log",
    }  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_while_installing(build: Build, number: signal.Signals) -> None:
    build.configure(arguments="stand-in=hang", extra="log-file = yes")
    older = build.directory / f"stand-in-{TODAY}.qcow2"
    older.write_text("older")
    with build.started() as process:
        build.wait_for_guest("stand-in: ")
        os.kill(build.pid(), number)
        assert process.wait(60) == 128 + number
        assert process.stdout is not None
        assert process.stdout.read() == ""
    assert build.stderr().splitlines()[-1] == f"image-factory: error: Stopped by {number.name}."
    assert older.read_text() == "older"
    log, console = (f"stand-in-{TODAY}.{suffix}" for suffix in ("log", "console.log"))
    assert build.files() == {"answers.cfg", "image-factory.conf", "stderr", older.name, log, console}


def test_second_build_of_the_same_image(user_build: Build) -> None:
    user_build.configure(arguments="stand-in=hang")
    with user_build.started() as process:
        user_build.wait_for_guest("stand-in: ")
        second = user_build.run(check=False)
        assert second.returncode == 2
        assert user_build.errors(second)[0] == (
            f"image-factory: error: Another build of stand-in is under way in {user_build.directory}."
        )
        assert len(vms(user_build.user, user_build.directory)) == 1
        os.kill(user_build.pid(), signal.SIGTERM)
        assert process.wait(60) == 143


def test_build_after_a_killed_one(build: Build) -> None:
    build.configure(arguments="stand-in=hang")
    with build.started() as process:
        build.wait_for_guest("stand-in: ")
        os.kill(build.pid(), signal.SIGKILL)
        process.wait(60)
    assert vms(build.user, build.directory)
    build.configure(arguments="stand-in=empty-disk")
    done = build.run(check=False)
    assert "WARNING: Cleaning up after a build of stand-in that was killed." in done.stderr
    assert build.errors(done)[0].startswith("image-factory: error: The disk has no partition table")


def test_killed_machine(user_build: Build) -> None:
    user_build.configure(arguments="stand-in=hang")
    with user_build.started() as process:
        user_build.wait_for_guest("stand-in: ")
        run("pkill", "-KILL", "-u", user_build.user.name, "qemu-system")
        assert process.wait(60) == 1
    error, hint = user_build.stderr().splitlines()[-2:]
    assert error == "image-factory: error: The installation machine did not power off by itself: shut off (crashed)."
    assert hint.startswith("image-factory: hint: What it printed is in ")


def test_unmounting_what_a_killed_build_left(build: Build, tmp_path: Path) -> None:
    """A build that is killed while the disk is mounted leaves a mount; the next one removes it."""
    build.configure(arguments="stand-in=slow:1", extra=f"post-build-command = {REPOSITORY}/none")
    work = build.directory / ".image-factory-stand-in"
    work.mkdir()
    disk = work / "disk.raw"
    run("truncate", "-s", "64M", disk)
    run("mke2fs", "-q", "-t", "ext4", disk)
    for path in (work, disk):
        run("chown", build.user.name, path)
    point = Path(build.user.run("mktemp", "-d", "/tmp/image-factory.XXXXXXXX").stdout.strip())
    build.user.run("mkdir", "-m", "700", point / "tree")
    sudo = [] if build.user.is_root else ["sudo", "-n"]
    build.user.run(*sudo, build.user.helper, "mount-image", disk, "0", str(64 << 20), point / "tree")
    assert os.path.ismount(point / "tree")
    build.configure(arguments="stand-in=empty-disk")
    done = build.run(check=False)
    assert "WARNING: Cleaning up after a build of stand-in that was killed." in done.stderr
    assert build.errors(done)[0].startswith("image-factory: error: The disk has no partition table")


def test_image_that_a_command_takes_away(user_build: Build, installed_disk: Path) -> None:
    user_build.configure(extra="post-build-command = rm")
    user_build.go_on_from(installed_disk)
    done = user_build.run("--resume")
    assert "size on disk  moved away by a command" in done.stdout


def test_directory_that_goes_away(user_build: Build) -> None:
    """No traceback, and no 'internal error', where the working directory is removed by someone."""
    user_build.configure(arguments="stand-in=slow:2")
    with user_build.started() as process:
        user_build.wait_for_guest("stand-in: ")
        run("rm", "-r", user_build.directory / ".image-factory-stand-in")
        assert process.wait(60) == 1
    error = next(line for line in user_build.stderr().splitlines() if line.startswith("image-factory: error: "))
    assert "Internal" not in error


def test_failing_upload(user_build: Build, installed_disk: Path) -> None:
    """The image is there when an upload fails, and the post-build command is not run."""
    user_build.configure(
        extra="""
upload_destinations = nowhere
post-build-command = touch post-build-ran
[nowhere]
upload_type = rsync
upload_target = /nonexistent/directory/
"""
    )
    user_build.go_on_from(installed_disk)
    done = user_build.run("--resume", check=False)
    assert done.returncode == 1
    error = user_build.errors(done)[0]
    assert error.startswith(f"image-factory: error: Uploading stand-in-{TODAY}.qcow2 to nowhere failed: ")
    assert "No such file or directory" in error
    assert f"stand-in-{TODAY}.qcow2.sha256sum" in user_build.files()
    assert "post-build-ran" not in user_build.files()
