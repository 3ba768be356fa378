"""A configuration of the released program (1.0.2) goes on working."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.configuration.files import Configuration
from image_factory.model import Plan

from ..conftest import TODAY

pytestmark = pytest.mark.usefixtures("machine")

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "tests/data"
_PRESEED = "d-i debian-installer/exit/poweroff boolean true\n"
ANSWER_FILES = {
    "debian server.d/bullseye.cfg": _PRESEED,
    "ubuntu-server.cfg": _PRESEED,
    "fedora-server.ks": "poweroff\n",
    "opensuse.xml": (
        "<profile><general><mode><confirm>false</confirm><final_halt>true</final_halt></mode></general></profile>\n"
    ),
}
IMAGES = ["Debian-11-server", "Ubuntu-20.04-server", "Fedora-36-server", "openSUSE-15.4-server"]


@pytest.fixture
def configuration() -> Iterator[Path]:
    """The old file, with the directory of the test in it and the answer files that it names.

    QEMU of the system's libvirt can get into the directory, unlike tmp_path.
    """
    with tempfile.TemporaryDirectory(prefix="image-factory-test.", dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        path = directory / "image-factory.conf"
        text = (DATA / "image-factory-1.0.2.conf").read_text()
        path.write_text(text.replace("@HERE@", str(directory)))
        for name, answers in ANSWER_FILES.items():
            answer = directory / "answers" / name
            answer.parent.mkdir(parents=True, exist_ok=True)
            answer.write_text(answers)
        yield path


def run(configuration: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(configuration.parent),
        "IMAGE_FACTORY_CONFIG": str(configuration),
        "LANG": "C.UTF-8",
        "TZ": os.environ["TZ"],
    }
    return subprocess.run(
        ["/usr/bin/python3", REPOSITORY / "image-factory", *arguments],
        env=environment,
        cwd=configuration.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def plan(configuration: Path, image: str) -> Plan:
    return pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}), image, {})


def test_images_are_listed(configuration: Path) -> None:
    done = run(configuration, "--list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == IMAGES
    assert {tuple(line[1:3]) for line in lines} == {("-", "-")}


@pytest.mark.parametrize("image", IMAGES)
def test_every_image_gets_a_plan_without_a_warning(
    configuration: Path, image: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert plan(configuration, image).image == image
    assert caplog.messages == []


def test_values(configuration: Path) -> None:
    debian, ubuntu, fedora, suse = (plan(configuration, image).settings for image in IMAGES)
    here = configuration.parent
    assert debian.preseed == here / "answers/debian server.d/bullseye.cfg"
    assert fedora.kickstart == here / "answers/fedora-server.ks"
    assert suse.yast == here / "answers/opensuse.xml"
    assert [image.format for image in (debian, ubuntu, fedora, suse)] == [
        ("qcow2",),
        ("qcow2", "raw"),
        ("qcow2",),
        ("raw",),
    ]
    assert [image.image_size for image in (debian, ubuntu)] == [3 << 30, 5 << 29]
    assert [image.ram for image in (debian, fedora)] == [1 << 30, 3 << 30]
    assert {image.vnc for image in (debian, ubuntu, fedora, suse)} == {("localhost", 13)}
    assert all(image.installer_logs and image.cores == 2 for image in (debian, ubuntu, fedora, suse))
    assert [image.keep_raw for image in (debian, fedora)] == [False, True]
    assert [image.upload_destinations for image in (debian, fedora, suse)] == [
        ("intranet", "openstack"),
        ("intranet",),
        (),
    ]
    assert debian.append == (
        "auto=true priority=critical hostname=debian domain=example.com --- console=tty0 console=ttyS0,115200n8"
    )
    assert plan(configuration, "Fedora-36-server").log_path == here / "images/fedora.log"


def golden(text: str, here: Path) -> str:
    """Return what a dry run printed with what differs between machines and days in capitals."""
    return text.replace(str(here), "@HERE@").replace(str(REPOSITORY), "@REPOSITORY@").replace(TODAY, "@DATE@")


@pytest.mark.parametrize("image", ["Debian-11-server", "Fedora-36-server", "openSUSE-15.4-server"])
def test_dry_run(configuration: Path, image: str) -> None:
    """To see what a change does to all commands: UPDATE_GOLDEN=1, then git diff."""
    before = sorted(configuration.parent.rglob("*"))
    done = run(configuration, image, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert all(" INFO: " in line for line in done.stderr.splitlines()), done.stderr
    assert sorted(configuration.parent.rglob("*")) == before
    shown = golden(done.stdout, configuration.parent)
    path = DATA / f"dry-run-{image}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(shown)
    assert shown == path.read_text()
