"""A build for ARM, whose machine is emulated where this one is no ARM itself."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, User, run
from .test_build import TODAY, Build, new_build, unused_blocks_left

pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture(scope="module")
def stand_in_aarch64(base: Path) -> Path:
    directory = base / "stand-in-aarch64"
    run(REPOSITORY / "tests/stand_in/build", "--arch", "aarch64", directory)
    return directory


@pytest.fixture
def arm_build(request: pytest.FixtureRequest, users: dict[str, User], stand_in_aarch64: Path) -> Iterator[Build]:
    yield from new_build(users["a"], request, stand_in_aarch64)


def test_aarch64(arm_build: Build) -> None:
    """Without the word for secure boot the firmware would refuse the kernel, and the guest stay silent for ever."""
    arm_build.configure(
        arguments="console=ttyAMA0 stand-in=gpt", extra="arch = aarch64\nfirmware = uefi\nformat = raw,qcow2"
    )
    done = arm_build.run()
    assert "--arch aarch64 --machine virt --boot firmware=efi," in done.stderr
    assert "Removed /var/log/installer" in done.stderr
    console = (arm_build.directory / f"stand-in-{TODAY}.console.log").read_text(errors="replace")
    assert "EFI stub: Booting Linux Kernel..." in console
    assert "-arm64\n" in console.partition("stand-in: started on Linux ")[2].replace("\r", "")

    raw, qcow2 = (arm_build.directory / f"stand-in-{TODAY}.{image_format}" for image_format in ("raw", "qcow2"))
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, qcow2)
    table = json.loads(run("sfdisk", "--json", raw).stdout)["partitiontable"]
    esp = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
    assert (table["label"], len(table["partitions"]), table["partitions"][0]["type"]) == ("gpt", 3, esp)
    root = table["partitions"][1]["start"] * table["sectorsize"]
    assert unused_blocks_left(raw, root) == 0
    listing = run("debugfs", "-R", "ls -p /var/log", f"{raw}?offset={root}").stdout
    assert "/dpkg.log/" in listing
    assert "/installer/" not in listing
