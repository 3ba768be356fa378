"""What a system needs to report from its test boot: what it lacks is told, with the next move, before it is booted."""

from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.base.errors import BuildError
from image_factory.checks.testboot import reporting
from image_factory.configuration.files import Configuration
from image_factory.model import Build, Disk
from image_factory.parts import State
from image_factory.system.tree import Branch, Tree

from .test_fitting import Looked
from .test_tree import volume

SYSTEMD = ("usr/lib/systemd/systemd",)
CLOUD_INIT = ("usr/bin/cloud-init",)
OLD = ("usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-252.so", *SYSTEMD)
CANT = "[x] test-boot: the system can't report: it has"
OLD_CANT = f"{CANT} systemd 252, which leaves that to cloud-init, and"


def build_of(directory: Path, wanted: str = "yes") -> Build:
    path = directory / "x.conf"
    path.write_text(f"[x]\nlinux = /l\ninitrd = /i\ntest-boot = {wanted}\noutput-dir = {directory}\n")
    plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(path)}), "x", {})
    return Build(plan, directory, "x")


def check(build: Build, *paths: str, sources: str = "") -> None:
    filesystem = Looked(volume(1), dict.fromkeys(paths, "") | {"etc/cloud/cloud.cfg.d/90.cfg": sources})
    tree = Tree((Branch(filesystem, "", ""),), (filesystem,), (filesystem.volume,))
    [step] = reporting.steps(build)
    step.run(State(build, Disk(build.disk_path), tree))


@pytest.mark.parametrize(
    "paths",
    [
        # Debian 12 and 13, Fedora 42 and Enterprise Linux 9 name it so; the last has a version that is not known.
        (*OLD, *CLOUD_INIT),
        ("usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-257.so", *SYSTEMD),
        ("usr/lib64/systemd/libsystemd-shared-257.7-1.fc42.so", *SYSTEMD),
        ("usr/lib/systemd/libsystemd-shared-252.so", "usr/lib/systemd/libsystemd-shared-256~rc1.so", *SYSTEMD),
        ("lib/systemd/systemd",),
    ],
)
def test_systems_that_report(tmp_path: Path, paths: tuple[str, ...]) -> None:
    check(build_of(tmp_path), *paths)


@pytest.mark.parametrize(
    ("paths", "sources", "message", "hint"),
    [
        (CLOUD_INIT, "", f"{CANT} no systemd.", "Set test-boot = no."),
        (OLD, "", f"{OLD_CANT} no cloud-init.", "Install cloud-init in it, or systemd 256 or later."),
        ((*SYSTEMD, "usr/lib/systemd/libsystemd-shared-239.so"), "",
         f"{CANT} systemd 239, which leaves that to cloud-init, and no cloud-init.",
         "Install cloud-init in it, or systemd 256 or later."),
        ((*OLD, *CLOUD_INIT, "etc/cloud/cloud-init.disabled"), "", f"{OLD_CANT} /etc/cloud/cloud-init.disabled.",
         "Remove that file; seal = yes does."),
        ((*OLD, *CLOUD_INIT), "datasource_list: [ OpenStack, None ]\n",
         f"{OLD_CANT} one that looks for OpenStack, None alone.",
         "Add NoCloud to datasource_list in /etc/cloud/cloud.cfg.d, or take the list out."),
    ],
)  # fmt: skip
def test_systems_that_can_not_report(
    tmp_path: Path, paths: tuple[str, ...], sources: str, message: str, hint: str
) -> None:
    with pytest.raises(BuildError) as error:
        check(build_of(tmp_path), *paths, sources=sources)
    assert (error.value.message, error.value.hint) == (message, hint)


def test_cloud_init_that_looks_for_the_seed_too(tmp_path: Path) -> None:
    check(build_of(tmp_path), *OLD, *CLOUD_INIT, sources="datasource_list:\n - ConfigDrive\n - NoCloud\n")


def test_no_test_boot_no_step(tmp_path: Path) -> None:
    assert [*reporting.steps(build_of(tmp_path, "no"))] == []
