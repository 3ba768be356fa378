"""contrib/disk-image-create: builds of elements by diskimage-builder's command line, as an existing job has it."""

import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from image_factory.base.files import digest_of

from ..conftest import REPOSITORY, User, run, wait_for
from .test_elements_run import INSTALL_PACKAGES, Place, running
from .test_elements_run import place as place
from .test_elements_run import system as system

PROGRAM = REPOSITORY / "contrib/disk-image-create"


class Job:
    """What calls diskimage-builder's programs in the directory of *place*, by links to ours."""

    def __init__(self, place: Place) -> None:
        self.path = place.path
        self.bin = place.path / "bin"
        self.bin.mkdir()
        for name in ("disk-image-create", "diskimage-builder", "ramdisk-image-create"):
            (self.bin / name).symlink_to(PROGRAM)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(place.path / "home"),
            "ELEMENTS_PATH": str(place.path / "elements"),
        }
        self.before = set(os.listdir(place.path))

    def argv(self, line: str) -> list[str]:
        name, *words = line.split()
        return [str(self.bin / name), *words]

    def run(self, line: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        done = run(*self.argv(line), cwd=self.path, env={**self.environment, **environment}, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def made(self) -> list[str]:
        """Return the names of what the job has made in its directory, but for the cache."""
        return sorted(set(os.listdir(self.path)) - self.before - {"home"})


@pytest.fixture
def job(place: Place) -> Job:
    return Job(place)


def test_formats_checksums_and_manifests(place: Place, job: Job) -> None:
    place.element(
        "work",
        install=INSTALL_PACKAGES,
        cleanup='mkdir -p "$DIB_MANIFEST_SAVE_DIR"; cp "$TMP_MOUNT_PATH/var/order" "$DIB_MANIFEST_SAVE_DIR"',
    )
    line = "disk-image-create -n -t qcow2,tar,tgz,squashfs -o my --checksum --min-tmpfs 4 -p jq system work"
    said = job.run(line, DIB_IMAGE_EXTRA_SIZE="64")
    assert said.stderr == (
        "disk-image-create: --min-tmpfs has no meaning here: it is free memory that counts, or --no-tmpfs.\n"
    )
    # The log of diskimage-builder is there, too.
    assert "INFO: Running install.d ..." in said.stdout and "Image file my.tgz created..." in said.stdout
    files = [f"my.{suffix}" for suffix in ("qcow2", "squash", "tar", "tgz")]
    assert job.made() == sorted(
        ["my.d", *files, *(f"{name}.md5" for name in files), *(f"{name}.sha256" for name in files)]
    )
    for kind in ("md5", "sha256"):
        digest = digest_of(job.path / "my.tar", kind)
        assert (job.path / f"my.tar.{kind}").read_text(encoding="utf-8") == f"{digest}  my.tar\n"
    assert (job.path / "my.d/order").read_text(encoding="utf-8") == "install\njq \n"
    with tarfile.open(job.path / "my.tar") as one, tarfile.open(job.path / "my.tgz") as other:
        assert one.getnames() == other.getnames() and "./.dotfile" in one.getnames()
    disk = json.loads(run("qemu-img", "info", "--output=json", job.path / "my.qcow2").stdout)
    assert disk["format-specific"]["data"]["compression-type"] == "zlib"
    assert disk["virtual-size"] < 256 << 20


def test_a_job_with_a_log_file_and_an_older_image(job: Job) -> None:
    job.run("disk-image-create -n -o there/my.raw -t raw --image-size 0.25 --logfile my.log system")
    assert os.stat(job.path / "there/my.raw").st_size == 256 << 20
    assert "Running root.d" in (job.path / "my.log").read_text(encoding="utf-8")
    assert "cloudimg-rootfs" in run("dumpe2fs", "-h", job.path / "there/my.raw", check=True).stdout
    line = "disk-image-create -n -o there/my -t raw,qcow2 --image-size 0.25 --logfile my.log"
    said = job.run(f"{line} --qemu-img-options compat=0.10 system")
    assert re.search(r"^Output logs going to: my.log\nImage file .*my.qcow2 created...\nOld image found. ", said.stdout)
    assert said.stderr == ""
    first, *others = sorted(os.listdir(job.path / "there"))
    assert re.fullmatch(r"my-[0-9.]{10}-[0-9.]{8}\.raw", first) and others == ["my.qcow2", "my.raw"]
    assert "compat: 0.10" in run("qemu-img", "info", job.path / "there/my.qcow2").stdout
    job.run(f"{line} system", OVERWRITE_OLD_IMAGE="1")
    assert len(os.listdir(job.path / "there")) == 3


def test_what_fails(place: Place, job: Job) -> None:
    place.element("bad", install="echo this one fails; exit 3")
    said = job.run("disk-image-create -n -o my --logfile my.log system bad", 1)
    assert "install.d/50-bad of the element bad failed with status 3: this one fails" in said.stderr
    assert said.stderr.endswith("image-factory has failed with status 1; nothing of my is kept.\n")
    assert job.made() == ["my.log"]
    assert "There is no element 'gone'" in job.run("disk-image-create -n system gone", 2).stdout
    assert job.run("disk-image-create", 1).stderr.startswith("disk-image-create: error: no element is named")
    assert "its elements are obsolete" in job.run("ramdisk-image-create -o x system", 1).stderr
    assert "/gone/" in job.run("disk-image-create -n system", 1, TMP_DIR="/gone").stderr
    assert job.made() == ["my.log"]


def test_layouts(place: Place, job: Job) -> None:
    line = "disk-image-create --section -n system"
    assert "\nlayout = filesystem\n" in job.run(line).stdout
    place.element("disk", root="true")
    (place.path / "elements/disk/element-provides").write_text("block-device\n", encoding="utf-8")
    place.element("machine", root="true")
    (place.path / "elements/machine/element-deps").write_text("disk\n", encoding="utf-8")
    assert "layout" not in job.run(f"{line} machine").stdout
    assert job.made() == []


def test_several_images_of_a_yaml_file(place: Place, job: Job) -> None:
    place.element("bad", install="exit 3")
    (job.path / "images.yaml").write_text(
        """\
- imagename: one
  types: [tar]
  skip-base: true
  elements: [system, bad]
- imagename: two
  types: [tar]
  skip-base: true
  environment: {NOTE: a b}
  elements: [system, note]
- imagename: three
  ramdisk: true
  elements: [system]
""",
        encoding="utf-8",
    )
    place.element("note", install='[ "$NOTE" = "a b" ]')
    said = job.run("diskimage-builder --dry-run images.yaml")
    assert said.stderr.splitlines() == [
        "disk-image-create -o one -t tar -n system bad",
        "NOTE='a b' disk-image-create -o two -t tar -n system note",
        "ramdisk-image-create -o three system",
    ]
    assert job.made() == ["images.yaml"]
    job.run("diskimage-builder --stop-on-failure images.yaml", 1)
    assert job.made() == ["images.yaml"]
    assert "its elements are obsolete" in job.run("diskimage-builder images.yaml", 1).stderr
    assert job.made() == ["images.yaml", "two.tar"]


@contextmanager
def waiting(job: Job, place: Place) -> Iterator["subprocess.Popen[bytes]"]:
    """Give a job, in a group of its own, whose script of install.d waits; what runs of it has ended on the way out."""
    place.element("wait", install="sleep 471108")
    process = subprocess.Popen(
        job.argv("disk-image-create -n -o my system wait"),
        cwd=job.path,
        env=job.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(lambda: running("471108"), "the script of install.d")
    yield process
    process.wait()
    wait_for(lambda: not running("471108"), "its end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_ended(place: Place, job: Job, number: signal.Signals) -> None:
    with waiting(job, place) as process:
        # Ctrl-C reaches all that are on the terminal.
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait() == 128 + number
        assert not running("471108")
        assert job.made() == []


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_job_that_is_killed(place: Place, job: Job, whole_group: bool) -> None:
    with waiting(job, place) as process:
        os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()
    [left] = job.made()
    working = job.path / left / ".image-factory-my"
    wait_for(lambda: whole_group or not working.exists(), "the end of the build")
    said = job.run("disk-image-create -n -o my -t tar system").stderr
    assert said == f"disk-image-create: {left}, which a call has left that was killed, is removed.\n"
    assert job.made() == ["my.tar"]


def test_an_ordinary_user(users: dict[str, User], system: Path) -> None:
    user = users["c"]
    place = Place(user.directory("job"), system)
    program = user.program.parents[1] / "share/image-factory/disk-image-create"
    place.element("work", install="[ $(id -u) = 0 ]", cleanup='sudo cp /etc/hostname "$DIB_MANIFEST_SAVE_DIR"')
    (place.path / "out").chmod(0o755)
    shutil.chown(place.path / "out", user.name)
    line = "-n -o out/my --image-size 0.25 system work"
    argv = user.argv(program, *line.split(), ELEMENTS_PATH=str(place.path / "elements"))
    done = run(*argv, cwd=place.path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(place.out)) == ["my.d", "my.qcow2"]
    assert {path.owner() for path in place.out.iterdir()} == {user.name}
    assert os.listdir(place.out / "my.d") == ["hostname"]
