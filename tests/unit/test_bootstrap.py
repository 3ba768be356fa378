"""Trees that are bootstrapped: where they are made, and of which architecture."""

import os
import re
from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.base import command
from image_factory.base.errors import ConfigurationError
from image_factory.configuration import files, unused
from image_factory.machines import arch
from image_factory.model import Build, Plan
from image_factory.sources import bootstrap
from image_factory.sources.bootstrap import recipe

from ..conftest import REPOSITORY, shown

ANSWERS = "suite: trixie\nsources: [deb http://mirror.example.com/debian trixie main]\n"


def make_plan(directory: Path, text: str = "", answers: Path | None = None) -> Plan:
    (directory / "own.yaml").write_text(ANSWERS)
    path, answers = directory / "own.conf", answers or directory / "own.yaml"
    path.write_text(f"[x]\nsource = bootstrap\nbootstrap = {answers}\nimage-size = 3G\n{text}\n")
    configuration = files.Configuration({files.FILE_VARIABLE: str(path)})
    return pipeline.make_plan(configuration, "x", {"output-dir": str(directory)})


def commands_of(plan: Plan) -> list[str]:
    """Return what a dry run shows of the tree, a line each."""
    build = Build(plan, plan.work_path, "vm")
    return [" ".join(words) for commands in shown(build, bootstrap.steps(build)).values() for words in commands]


@pytest.mark.parametrize(
    ("wish", "free", "found"),
    [
        ("auto", 4096, True),
        ("auto", 4095, False),
        ("yes", 4096, True),
        ("yes", 4095, "4.0 GiB of memory are free, and a tree in memory needs 4.0 GiB."),
        ("yes", 100, "100.0 MiB of memory are free, and a tree in memory needs 4.0 GiB."),
        ("no", 1 << 20, False),
    ],
)
def test_tree_is_in_memory_where_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str, free: int, found: bool | str
) -> None:
    memory = tmp_path / "meminfo"
    memory.write_text(f"MemTotal: 99999999 kB\nMemFree: 10 kB\nMemAvailable:   {free << 10} kB\n")
    monkeypatch.setattr("image_factory.base.memory._MEMORY", memory)
    plan = make_plan(tmp_path, f"work-in-memory = {wish}")
    if isinstance(found, str):
        with pytest.raises(ConfigurationError) as caught:
            bootstrap.check_here(plan)
        assert caught.value.message == found
        assert "work-in-memory = auto" in str(caught.value.hint)
        return
    bootstrap.check_here(plan)
    # A limit above what was asked for would take memory that others were promised.
    mounts = [line for line in commands_of(plan) if " mount -t tmpfs " in line and "size=" in line]
    assert [f"mode=755,size={4 << 30} tree" in line for line in mounts] == [True] * found


def test_memory_is_of_trees_only(tmp_path: Path) -> None:
    path = tmp_path / "own.conf"
    path.write_text("[x]\nlinux = /l\ninitrd = /i\nwork-in-memory = no\n")
    configuration = files.Configuration({files.FILE_VARIABLE: str(path)})
    sentences = unused.idle_keys(configuration, "x", configuration.image("x", {}), [])
    assert sentences == ["[x] work-in-memory does nothing without source = bootstrap or elements."]


HOST = arch.ARCHITECTURES[arch.default_arch()].debian
# What a user calls an architecture, and what Debian does.
NAMES = {
    "x86_64": "amd64", "amd64": "amd64", "i386": "i386", "I686": "i386", "aarch64": "arm64", "arm64": "arm64",
    "armhf": "armhf", "armv7l": "armhf", "ppc64le": "ppc64el", "ppc64el": "ppc64el", "riscv64": "riscv64",
    "s390x": "s390x",
}  # fmt: skip


@pytest.mark.parametrize(("name", "debian"), NAMES.items())
def test_tree_is_of_an_architecture(tmp_path: Path, name: str, debian: str) -> None:
    plan = make_plan(tmp_path, f"arch = {name}\nlayout = filesystem")
    bootstrap.check(plan)
    assert recipe.architecture(plan) == debian
    [argv] = [line for line in commands_of(plan) if " mmdebstrap " in line]
    assert (f" --architectures={debian} --skip=check/qemu " in argv) == (debian != HOST)
    assert ("arch-test" in bootstrap.programs(plan)) == (debian != HOST)


def test_disks_of_two_architectures_are_two(tmp_path: Path) -> None:
    """Also where they have one machine: a 32-bit system is no other build of the 64-bit one."""
    plans = [make_plan(tmp_path, f"arch = {name}\nfirmware = bios") for name in ("amd64", "i386")]
    first, second = map(bootstrap.identity, plans)
    assert [key for key in first if first[key] != second[key]] == ["arch", "layout"]
    assert [bootstrap.layout_of(plan).pieces[-1].kind[:8] for plan in plans] == ["4F68BCE3", "44479540"]


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("arch = i386\nfirmware = uefi", "[x] firmware: i386 has no uefi.", "Use bios."),
        ("arch = i386\nlayout = hybrid", "[x] firmware: i386 has no hybrid.", "Use bios."),
        ("arch = arm64\nfirmware = bios", "[x] firmware: arm64 has no bios.", "Use uefi."),
        ("arch = riscv64", "[x] arch: a tree of riscv64 can be made, and no disk that boots.", "Set layout = files"),
    ],
)
def test_disk_that_boots_nowhere_is_refused(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        bootstrap.check(make_plan(tmp_path, text))
    assert caught.value.message == message
    assert str(caught.value.hint).startswith(hint)


def test_machine_that_runs_no_foreign_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path, f"arch = {'arm64' if HOST == 'amd64' else 'amd64'}\nfirmware = uefi")
    name = recipe.architecture(plan)
    asked = tmp_path / "bin/arch-test"
    asked.parent.mkdir()
    for status in (0, 1):
        asked.write_text(f'#!/bin/sh\necho "$1: $0"; [ "$1" = {name} ] && exit {status}\n')
        asked.chmod(0o755)
        monkeypatch.setenv("PATH", f"{asked.parent}:{os.environ['PATH']}")
        if not status:
            bootstrap.check_here(plan)
    with pytest.raises(ConfigurationError) as caught:
        bootstrap.check_here(plan)
    assert caught.value.message == f"[x] arch: this machine runs no programs of {name}."
    assert str(caught.value.hint).endswith("apt-get install qemu-user-static")


def test_this_machine_runs_its_own_programs() -> None:
    command.run(bootstrap.emulation_argv(HOST))


@pytest.mark.parametrize(
    ("text", "packages"),
    [
        (
            "arch = amd64\nfirmware = hybrid",
            "linux-image-amd64 grub-efi-amd64 grub-efi-amd64-signed shim-signed grub-pc-bin",
        ),
        ("arch = i386\nsuite = bookworm\nfirmware = bios", "linux-image-686-pae grub-pc"),
        ("arch = arm64\nfirmware = uefi", "linux-image-arm64 grub-efi-arm64 grub-efi-arm64-signed shim-signed"),
        ("arch = armhf\nlayout = filesystem", "linux-image-armmp"),
        ("arch = ppc64el\nlayout = filesystem", "linux-image-powerpc64le"),
        ("arch = riscv64\nlayout = filesystem", "linux-image-riscv64"),
        ("arch = s390x\nlayout = filesystem", "linux-image-s390x"),
        ("arch = i386\nfirmware = bios", "Debian has no kernel for i386 since 13."),
        ("arch = riscv64\nsuite = bookworm\nlayout = filesystem", "Debian has riscv64 since 13."),
    ],
)
def test_kernel_and_boot_loader_are_of_the_architecture(tmp_path: Path, text: str, packages: str) -> None:
    plan = make_plan(tmp_path, f"{text}\n", REPOSITORY / "data/debian.bootstrap.yaml.j2")
    if packages.endswith("."):
        with pytest.raises(ConfigurationError, match=re.escape(packages)):
            bootstrap.check(plan)
        return
    found = recipe.read(plan).packages
    assert [name for name in found if re.match("linux-|grub-|shim-", name)] == packages.split()
