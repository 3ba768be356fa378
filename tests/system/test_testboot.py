"""The machine of the test boot: which boots there are, its commands, and what its console tells."""

import dataclasses
import gzip
import itertools
import logging
import os
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from image_factory import pipeline
from image_factory.base import files
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.base.events import BootTested
from image_factory.checks import testboot
from image_factory.checks.testboot import guest, matrix, ramdisk
from image_factory.checks.testboot.guest import Guest, PortTakenError
from image_factory.checks.testboot.login import LOGIN, RUN_SCRIPT, ssh_argv
from image_factory.checks.testboot.machine import (
    Machine,
    free_port,
    other_mac,
    pipes,
    prepared,
    qemu_argv,
    time_limit,
    tpm_running,
)
from image_factory.configuration.files import Configuration
from image_factory.machines.devices import DISKS, NETWORKS
from image_factory.model import Artifact, Build, Disk, Plan
from image_factory.outputs import planned
from image_factory.parts import Shown, State, carry_out
from image_factory.system.kernels import Kernel
from image_factory.told import junit

MIB, GIB = 1 << 20, 1 << 30


def plan_of(directory: Path, text: str = "", *, wanted: str = "yes") -> Plan:
    text = f"[x]\nlinux = /l\ninitrd = /i\nvirt-type = qemu\nmount-via = loop\ntest-boot = {wanted}\n{text}\n"
    (directory / "x.conf").write_text(text)
    configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(directory / "x.conf")})
    return pipeline.make_plan(configuration, "x", {"output-dir": str(directory)})


def machine(directory: Path, firmware: str = "bios", text: str = "", virt_type: str = "qemu") -> Machine:
    plan = plan_of(directory, text)
    artifact = Artifact(directory / "x,y.qcow2", "qcow2", 2 * GIB)
    return Machine(Build(plan, plan.work_path, "vm"), artifact, firmware, virt_type, 1)


def values(argv: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(argv) if name == option]


@pytest.mark.parametrize(
    ("text", "formats", "expected"),
    [
        ("", ["raw"], ["raw bios", "raw bios"]),
        ("firmware = hybrid", ["qcow2"], ["qcow2 bios", "qcow2 uefi"]),
        ("firmware = hybrid", ["qcow2", "raw"], ["qcow2 bios", "raw uefi"]),
        ("firmware = uefi", ["qcow2", "raw", "qcow2"], ["qcow2 uefi", "raw uefi", "qcow2 uefi"]),
        ("arch = aarch64", ["raw"], ["raw uefi", "raw uefi"]),
        ("firmware = hybrid\ntest-boot-matrix = secure-boot bios", ["raw"], ["raw secure-boot", "raw bios"]),
        ("firmware = hybrid\ntest-boot-matrix = tpm, nvme", ["raw", "qcow2"], ["raw bios", "qcow2 uefi"]),
    ],
)
def test_boots(tmp_path: Path, text: str, formats: list[str], expected: list[str]) -> None:
    artifacts = [Artifact(tmp_path / "x", name, GIB) for name in formats]
    found = testboot.boots(plan_of(tmp_path, text).settings, artifacts)
    assert [f"{artifact.format} {machine.firmware}" for artifact, machine in found] == expected


def test_a_matrix_is_every_combination(tmp_path: Path) -> None:
    settings = plan_of(tmp_path, "test-boot-matrix = virtio-scsi nvme, e1000e virtio-net, tpm no-tpm").settings
    assert matrix.hardware(settings) == [
        ("bios", ("e1000e", "tpm")), ("bios", ("e1000e",)), ("bios", ("tpm",)), ("bios", ()),
        ("bios", ("nvme", "e1000e", "tpm")), ("bios", ("nvme", "e1000e")),
        ("bios", ("nvme", "tpm")), ("bios", ("nvme",)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test-boot-matrix = bios uefi", "an image with firmware = bios does not boot with uefi."),
        ("firmware = uefi\ntest-boot-matrix = nvme, bios", "an image with firmware = uefi does not boot with bios."),
        ("test-boot-matrix = secure-boot", "an image with firmware = bios does not boot with secure-boot."),
        ("arch = aarch64\ntest-boot-matrix = bios", "an image with firmware = uefi does not boot with bios."),
    ],
)
def test_a_firmware_that_the_image_is_not_for(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        testboot.check(plan_of(tmp_path, text))
    assert caught.value.message == f"[x] test-boot-matrix: {message}"


def test_a_matrix_with_uefi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be checked before the build, where its firmware and the program of its TPM are asked for."""
    plan = plan_of(tmp_path, "firmware = uefi\ntest-boot-matrix = secure-boot tpm")
    testboot.check(plan)
    assert "swtpm" in testboot.programs(plan)
    assert "swtpm" not in testboot.programs(plan_of(tmp_path, "test-boot-matrix = no-tpm"))
    monkeypatch.setattr("image_factory.machines.firmware._DIRECTORIES", (tmp_path,))
    with pytest.raises(ConfigurationError, match="no UEFI for x86_64 with Secure Boot and Microsoft's keys") as caught:
        testboot.check(plan)
    assert caught.value.hint == "Install it: apt-get install ovmf"


def failures(directory: Path, text: str, failed: dict[str, str]) -> str:
    """Return the summary of a matrix in which the machines that have all words of a key have *failed*."""
    plan = plan_of(directory, text)
    build, artifact = Build(plan, plan.work_path, "vm"), Artifact(directory / "x", "raw", GIB)
    found = [
        Machine(build, artifact, firmware, "qemu", number, devices=devices)
        for number, (firmware, devices) in enumerate(matrix.hardware(plan.settings), 1)
    ]
    why = {
        each.number: next((failed[key] for key in failed if {*key.split()} <= {*words_of(each)}), "") for each in found
    }
    return matrix.summary(found, {number: reason for number, reason in why.items() if reason})


def words_of(machine: Machine) -> list[str]:
    return machine.name.split(", ")


def test_a_summary_says_where_and_why(tmp_path: Path) -> None:
    text = "firmware = hybrid\ntest-boot-matrix = virtio-scsi nvme usb, bios uefi, virtio-net e1000e"
    one = failures(tmp_path, text, {"nvme": "its initramfs has no driver nvme"})
    assert one == "4 of 12 test boots failed: with nvme: its initramfs has no driver nvme."
    both = failures(tmp_path, text, {"usb": "A", "e1000e": "B"})
    assert both == "8 of 12 test boots failed: with e1000e: B; with usb: A."
    single = failures(tmp_path, text, {"nvme uefi e1000e": "C"})
    assert single == "1 of 12 test boots failed: with uefi, nvme, e1000e: C."
    assert failures(tmp_path, "test-boot-matrix = sata", {"sata": "D"}).endswith("test boots failed: with sata: D.")


def kernel(*, built_in: str = "", early: str | None = "", late: str = "") -> Kernel:
    return Kernel("6.1", frozenset(built_in.split()), None if early is None else frozenset(early.split()),
                  frozenset(late.split()))  # fmt: skip


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (kernel(built_in="ahci", early="sd_mod", late="sd_mod"), ""),
        (kernel(early="sd_mod", late="sd_mod ahci"), "its initramfs has no driver ahci"),
        (kernel(early="ahci", late="sd_mod ahci"), "its initramfs has no driver sd_mod"),
        (kernel(early="", late=""), "its kernel has no driver ahci and sd_mod"),
        (kernel(early=None, late="sd_mod ahci"), ""),
    ],
)
def test_a_driver_that_is_missing(found: Kernel, expected: str) -> None:
    assert matrix.missing_driver([found], DISKS["sata"].modules, early=True) == expected
    assert matrix.missing_driver([], DISKS["sata"].modules, early=True) == ""


def test_all_machines_of_a_matrix_are_booted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk without a boot loader fails on each of them."""
    monkeypatch.setattr(testboot, "at_once", lambda settings, virt_type: 2)
    plan = plan_of(tmp_path, "ram = 128M\nformat = qcow2\ntest-boot-matrix = virtio-blk nvme sata, no-tpm tpm")
    build = Build(plan, plan.work_path, "vm")
    build.directory.mkdir()
    [made] = planned(plan, build.directory)
    artifact = dataclasses.replace(made, path=empty_disk(made.path), virtual_size=GIB)
    with pytest.raises(BuildError, match=r"^6 of 6 test boots failed: with .*: the firmware found no boot loader"):
        carry_out(State(build, Disk(build.disk_path), artifacts=(artifact,)), testboot.steps(build))
    names = {
        case.get("classname", "").rpartition(".")[2] for case in ElementTree.parse(plan.junit_path).iter("testcase")
    }
    assert names == {
        "1-bios-virtio-blk", "2-bios-virtio-blk-tpm", "3-bios-nvme", "4-bios-nvme-tpm", "5-bios-sata", "6-bios-sata-tpm"
    }  # fmt: skip
    assert [path.name for path in build.directory.iterdir()] == [plan.file_name("qcow2")]
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in path.read_bytes()]
    assert not running_tpms()


def running_tpms() -> list[int]:
    """Return the processes of TPMs that are ours."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == "swtpm"]


def test_an_error_of_emulation_is_none_of_the_image(tmp_path: Path) -> None:
    """A kernel that is emulated on a loaded machine finds its timer late, and its processor stuck."""
    timer = "..MP-BIOS bug: 8254 timer not connected to IO-APIC"
    stuck = "watchdog: BUG: soft lockup - CPU#0 stuck for 23s! [(udev-worker):333]"
    # A dollar sign is written twice.
    text = "kernel-errors-allowed = ^own$$"
    emulated, real = (machine(tmp_path, text=text, virt_type=name).errors_allowed for name in ("qemu", "kvm"))
    assert real == ("^own$",)
    allowed = [any(re.search(pattern, line) for pattern in emulated) for line in ("own", timer, stuck, f"x{timer}")]
    assert allowed == [True, True, True, False]
    with_tpm = dataclasses.replace(machine(tmp_path, virt_type="kvm"), devices=("tpm",)).errors_allowed
    assert any(re.search(pattern, "ima: Can not allocate sha384 (reason: -2)") for pattern in with_tpm)


def test_the_machine_is_another_one_than_that_of_the_installation(tmp_path: Path) -> None:
    argv = qemu_argv(machine(tmp_path, text="mac = 52:54:00:12:34:56"), "02:00:00:00:00:01", 4242)
    assert values(argv, "-machine") == ["q35,graphics=off,accel=tcg"]
    assert (values(argv, "-cpu"), values(argv, "-smp")) == (["max,-la57,-cx16"], ["1"])
    devices = values(argv, "-device")
    assert "scsi-hd,bus=controller.0,drive=disk,bootindex=1" in devices
    assert not [device for device in devices if device.startswith("virtio-blk")]
    assert values(argv, "-netdev") == ["user,id=network,hostfwd=tcp:127.0.0.1:4242-:22"]
    assert "52:54:00" not in " ".join(argv)
    assert other_mac().startswith("02:")


def test_kvm_has_all_processors(tmp_path: Path) -> None:
    argv = qemu_argv(machine(tmp_path, text="cores = 3\nram = 2G", virt_type="kvm"), "02:00:00:00:00:01", 1)
    assert (values(argv, "-cpu"), values(argv, "-smp"), values(argv, "-m")) == (["host"], ["3"], ["2048"])


@pytest.mark.parametrize(
    ("text", "cpu"),
    [
        ("kickstart = /k.ks", "max,-la57"),
        ("agama = /a.json", "max,-la57"),
        ("source = image\nsource-image = /rocky.qcow2\ndistribution = Rocky Linux", "max,-la57"),
        ("source = image\nsource-image = /debian.qcow2\ndistribution = Debian", "max,-la57,-cx16"),
        ("source = image\nsource-image = /own.qcow2", "max,-la57,-cx16"),
        ("distribution = Rocky Linux\npreseed = /p.cfg", "max,-la57,-cx16"),
        ("arch = aarch64", "max,pauth-impdef=on"),
    ],
)
def test_processor_of_other_systems(tmp_path: Path, text: str, cpu: str) -> None:
    argv = qemu_argv(machine(tmp_path, "uefi", text), "02:00:00:00:00:01", 1)
    assert values(argv, "-cpu") == [cpu]


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_uefi_has_an_empty_memory_and_no_secure_boot(tmp_path: Path, arch: str) -> None:
    argv = qemu_argv(machine(tmp_path, "uefi", f"arch = {arch}"), "02:00:00:00:00:01", 4242)
    assert "pflash0=code,pflash1=memory" in values(argv, "-machine")[0]
    code, memory, *_ = values(argv, "-blockdev")
    assert ".ms." not in code and ".secboot." not in code
    assert '"read-only": true' in code
    assert f'"{tmp_path}/.image-factory-x/boot-1/nvram.fd"' in memory


def test_qemu_takes_the_command(tmp_path: Path) -> None:
    """A comma in a path ends no option; a machine of each firmware comes up with all of its devices."""
    directory = tmp_path / "a,b c"
    directory.mkdir()
    everything = [*zip(DISKS, itertools.cycle(NETWORKS), strict=False)]
    kinds = [("x86_64", "bios"), *itertools.product(("x86_64", "aarch64"), ("uefi", "secure-boot"))]
    for arch, firmware in kinds:
        for devices in [(), *((*devices, "tpm") for devices in everything if firmware != "uefi")]:
            made = machine(directory, firmware, f"arch = {arch}\nram = 128M")
            made = dataclasses.replace(made, devices=devices)
            made.build.directory.mkdir(exist_ok=True)
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", made.artifact.path, "2G"], check=True)
            with prepared(made), pipes(made), tpm_running(made) as tpm:
                argv = [*qemu_argv(made, "02:00:00:00:00:01", free_port(), tpm), "-S", "-monitor", "stdio"]
                talk = "info status\nquit\n"
                done = subprocess.run(argv, input=talk, capture_output=True, text=True, check=False, pass_fds=[tpm])
                assert (done.returncode, done.stderr) == (0, ""), (firmware, devices)
            assert not made.directory.exists()
    assert not running_tpms()


def test_no_uefi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("image_factory.machines.firmware._DIRECTORIES", (tmp_path,))
    with pytest.raises(ConfigurationError) as caught:
        testboot.check(plan_of(tmp_path, "firmware = hybrid"))
    assert caught.value.hint == "Install it: apt-get install ovmf"
    testboot.check(plan_of(tmp_path, "firmware = hybrid", wanted="no"))


def test_what_qemu_can_not_read_is_booted_as_the_disk(tmp_path: Path) -> None:
    """Where there is something that it reads, that is booted; of an OVA the disk in it."""

    def booted(formats: str) -> list[Shown]:
        shown = pipeline.described(plan_of(tmp_path, f"format = {formats}"))
        return [step for step in shown if step.name.startswith("Booting ")]

    packed = booted("raw.gz, ova, dd.tgz")
    assert [step.name.split()[1].partition(".")[2] for step in packed] == ["ova"] * 2
    assert '"offset": "OFFSET"' in packed[0].commands[0][-3]
    assert [step.name for step in booted("raw.gz")] == ["Booting disk.raw with bios"] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("format = tar.gz", ["Laying tar.gz BIOS", "Booting tar.gz bios", "Booting tar.gz bios"]),
        (
            "format = tgz\nfirmware = hybrid",
            ["Laying tgz BIOS", "Laying tgz UEFI", "Booting tgz bios", "Booting tgz uefi"],
        ),
        ("format = tar, tar.xz\nfirmware = hybrid\ndistribution = Ubuntu",
         ["Laying tar BIOS", "Laying tar.xz UEFI", "Booting tar bios", "Booting tar.xz uefi"]),
        ("format = qcow2, tar.zst",
         ["Laying tar.zst BIOS", "Booting qcow2 bios", "Booting qcow2 bios", "Booting tar.zst bios"]),
        ("format = netboot", ["Booting netboot.tar kernel", "Booting netboot.tar kernel"]),
        (
            "format = qcow2, netboot\nfirmware = hybrid",
            ["Booting qcow2 bios", "Booting qcow2 uefi", "Booting netboot.tar kernel"],
        ),
        # Those for containers are not, nor those whose boot loader is not known here.
        ("format = oci, squashfs", ["Booting raw bios"] * 2),
        ("format = tar\ndistribution = Rocky Linux", ["Booting raw bios"] * 2),
        ("format = tar\nkickstart = /k.ks", ["Booting raw bios"] * 2),
    ],
)  # fmt: skip
def test_tars_are_laid_on_disks_before_they_are_booted(tmp_path: Path, text: str, expected: list[str]) -> None:
    names = [step.name for step in pipeline.described(plan_of(tmp_path, text))]
    found = [name.split() for name in names if name.startswith(("Laying ", "Booting "))]
    assert [f"{each[0]} {each[1].partition('.')[2]} {each[-1]}" for each in found] == expected


def test_a_netboot_image_is_booted_without_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for the packed ramdisk, and twice for what is in it; one after the other."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    plan = plan_of(tmp_path, "format = netboot\nram = 128M")
    first, second = [step.commands for step in pipeline.described(plan) if step.name.startswith("Booting ")]
    assert [argv[0] for argv in first] == [argv[0] for argv in second]
    [argv] = [argv for argv in first if argv[0] == "qemu-system-x86_64"]
    directory = plan.work_path / "boot-1"
    assert values(argv, "-kernel") == [str(directory / "vmlinuz")]
    assert values(argv, "-initrd") == [str(directory / "ramdisk.img")]
    assert (values(argv, "-append"), values(argv, "-m")) == (["console=ttyS0"], ["MEMORY"])
    assert not [device for device in values(argv, "-device") if device.startswith("scsi-hd")]
    assert {"tar", "gzip"} <= {*testboot.programs(plan)}
    made = Machine(
        Build(plan, plan.work_path, "vm"), Artifact(netboot_tar(tmp_path), "netboot", GIB), "kernel", "qemu", 1
    )
    made.directory.parent.mkdir()
    with prepared(made) as machine:
        packed = (machine.directory / "ramdisk.img").stat().st_size
        wanted = (packed + 2 * 5 * MIB + 512 * MIB + MIB - 1) // MIB
        assert values(qemu_argv(machine, "02:00:00:00:00:01", 1), "-m") == [str(wanted)]
    monkeypatch.setattr(ramdisk, "free_memory", lambda: 100 * MIB)
    with (
        pytest.raises(BuildError, match=r"takes 523\.0 MiB of memory, and here 100\.0 MiB are free") as caught,
        prepared(made),
    ):
        pass
    assert caught.value.hint
    assert not made.directory.exists()


def netboot_tar(directory: Path) -> Path:
    """Return a tar with a ramdisk of 4 MiB."""
    (directory / "vmlinuz").write_bytes(b"x")
    (directory / "ramdisk.img").write_bytes(gzip.compress(bytes(4 * MIB)))
    subprocess.run(["tar", "-C", directory, "-cf", directory / "x.tar", "vmlinuz", "ramdisk.img"], check=True)
    return directory / "x.tar"


def test_a_tar_that_is_not_laid_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Before the build, and in its results."""
    plan = plan_of(tmp_path, "format = qcow2, tar\ndistribution = Fedora")
    testboot.check(plan)
    reason = "only a boot loader of Debian's or Ubuntu's packages can be installed here"
    assert caplog.messages == [f"{plan.file_name('tar')} is not laid on a disk and booted: {reason}."]
    build = Build(plan, plan.work_path, "vm")
    build.directory.mkdir()
    disk, tar = planned(plan, build.directory)
    state = State(build, Disk(build.disk_path), artifacts=(disk, tar))
    testboot._TestBoot(1)._tell(state, BootTested(disk.path.name, "bios", 1.0, ()))
    [case] = ElementTree.parse(plan.junit_path).iter("testcase")
    assert (case.get("name"), case.get("classname")) == ("laid", f"{tar.path.name}.2-bios")
    assert [element.get("message") for element in case.iter("skipped")] == [reason]


def test_a_tar_of_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs have to run here."""
    plan = plan_of(tmp_path, "arch = aarch64\nformat = tar")
    assert {"arch-test", "bwrap", "mmd"} <= {*testboot.programs(plan)}
    fake = tmp_path / "bin/arch-test"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n[ $1 = arm64 ] && exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(ConfigurationError, match=r"test-boot: this machine runs no programs of aarch64"):
        testboot.check(plan)
    testboot.check(plan_of(tmp_path, "arch = aarch64\nformat = squashfs"))


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"test-script: .*none\.sh is not a file that can be read"):
        testboot.check(plan_of(tmp_path, f"test-script = {tmp_path}/none.sh"))


def test_programs(tmp_path: Path) -> None:
    assert {"qemu-system-x86_64", "ssh", "ssh-keygen", "xorriso"} <= set(testboot.programs(plan_of(tmp_path)))
    assert "ssh-keygen" not in pipeline.programs(plan_of(tmp_path, wanted="no"))
    tar = plan_of(tmp_path, "format = tar")
    assert {"bwrap", "unshare", "sfdisk", "mke2fs"} <= set(testboot.programs(tar))
    assert "bwrap" not in testboot.programs(plan_of(tmp_path, "format = tar\ndistribution = Fedora"))


def test_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testboot, "at_once", lambda settings, virt_type: 1)
    plan = plan_of(tmp_path, "firmware = hybrid\ntest-script = /srv/it's.sh")
    steps = dict(pipeline.described(plan))
    assert {f"Booting {plan.file_name('raw')} with {firmware}" for firmware in ("bios", "uefi")} < set(steps)
    build = Build(plan, plan.work_path, "image-factory-x-XXXXXXXX")
    *_, (artifact, _) = testboot.boots(plan.settings, planned(plan, plan.work_path))
    made = Machine(build, artifact, "uefi", "qemu", 2)
    commands = steps[f"Booting {plan.file_name('raw')} with uefi"]
    assert commands[-2:] == [ssh_argv(made, "PORT", words) for words in (LOGIN, RUN_SCRIPT)]
    # It is the one in the working directory, which is not published yet.
    assert str(plan.work_path / plan.file_name("raw")) in commands[0]


@pytest.mark.parametrize(
    ("text", "virt_type", "processors", "free", "expected"),
    [
        ("ram = 1G", "qemu", 2, 8 << 30, 2),
        ("ram = 1G", "qemu", 64, 3 << 30, 3),
        ("ram = 1G", "qemu", 1, 8 << 30, 1),
        ("ram = 1G", "qemu", 2, 1 << 20, 1),
        ("cores = 2", "kvm", 2, 8 << 30, 1),
        ("cores = 2", "kvm", 5, 64 << 30, 2),
    ],
)
def test_as_many_at_once_as_the_machine_takes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    virt_type: str,
    processors: int,
    free: int,
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    monkeypatch.setattr(testboot, "free_memory", lambda: free)
    assert testboot.at_once(plan_of(tmp_path, text).settings, virt_type) == expected


@pytest.mark.parametrize(
    ("at_once", "expected"), [(1, [[1], [2], [3]]), (2, [[1, 2], [3], []]), (9, [[1, 2, 3], [], []])]
)
def test_each_machine_is_started_once(at_once: int, expected: list[list[int]]) -> None:
    test = testboot._TestBoot(at_once)
    assert [[1, 2, 3][test.started_with(number)] for number in (1, 2, 3)] == expected


def test_machines_beside_one_that_fails_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(testboot, "at_once", lambda settings, virt_type: 2)
    caplog.set_level(logging.INFO)
    plan = plan_of(tmp_path, "ram = 128M\nformat = qcow2")
    build = Build(plan, plan.work_path, "vm")
    build.directory.mkdir()
    artifacts = [
        dataclasses.replace(artifact, virtual_size=GIB, sha256=files.digest_of(path))
        for artifact, path in [(made, empty_disk(made.path)) for made in planned(plan, build.directory)]
    ]
    state = State(build, Disk(build.disk_path), artifacts=tuple(artifacts))
    with pytest.raises(BuildError, match="the firmware found no boot loader on its disk"):
        carry_out(state, testboot.steps(build))
    assert len([line for line in caplog.messages if line.startswith("Running: qemu-system-x86_64 ")]) == 2
    assert [path.name for path in build.directory.iterdir()] == [plan.file_name("qcow2")]
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in path.read_bytes()]


def empty_disk(path: Path) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1G"], check=True)
    return path


def test_time_limits(tmp_path: Path) -> None:
    settings = plan_of(tmp_path).settings
    assert (time_limit(settings, "qemu"), time_limit(settings, "kvm")) == (1800.0, 600.0)
    assert time_limit(plan_of(tmp_path, "test-boot-timeout = 90s").settings, "qemu") == 90.0


class Scene:
    """A guest whose console and report are written by the test."""

    def __init__(self, directory: Path, timeout: float = 0.5) -> None:
        made = machine(directory)
        made.directory.mkdir(parents=True)
        made.overlay.write_bytes(b"x")
        self.timeout = timeout
        self.status: int | None = None
        self.console = self._pipe()
        self.report = self._pipe()
        self.guest = Guest(made, lambda: self.status, self.console[0], self.report[0])
        self.machine = made

    def _pipe(self) -> tuple[int, int]:
        return os.pipe2(os.O_NONBLOCK)

    def prints(self, text: str) -> None:
        os.write(self.console[1], text.encode())

    def reports(self, text: str) -> None:
        os.write(self.report[1], text.encode())

    def answer(self) -> str:
        return self.guest.wait_for_report(self.timeout)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[    1.2] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100",
         "its kernel panicked: Attempted to kill init! exitcode=0x00000100"),
        ("ALERT!  UUID=abc does not exist.  Dropping to a shell!",
         "its initramfs did not find the root filesystem UUID=abc"),
        ("You are in emergency mode. After logging in, type", "it came up in emergency mode"),
        ("No bootable device.", "the firmware found no boot loader on its disk"),
        ("BdsDxe: No bootable option or device was found.", "the firmware found no boot loader on its disk"),
        (">>Start PXE over IPv4.", "the firmware found no boot loader on its disk"),
        ("grub rescue> ", "its boot loader did not find its files"),
        ("cp: write error: No space left on device", "its root filesystem is full"),
    ],
)  # fmt: skip
def test_console_tells_why(scene: Scene, line: str, problem: str) -> None:
    scene.prints(f"Booting\r\n{line}")
    assert scene.answer() == problem


def test_the_gravest_sign_counts(scene: Scene) -> None:
    scene.prints("No space left on device\r\nKernel panic - not syncing: x\r\n")
    assert scene.answer() == "its kernel panicked: x"


def test_the_line_is_not_whole_at_first(scene: Scene) -> None:
    scene.prints("Kernel panic - not syncing: Fata")
    scene.guest.look()
    scene.prints("l exception\r\n---[ end Kernel panic - not syncing: Fatal exception ]---\r\n")
    assert scene.answer() == "its kernel panicked: Fatal exception"


def test_a_guest_that_comes_up(scene: Scene) -> None:
    scene.reports('{"stage":"started"}\n{"stage":"starting","jobs":""}\n{"stage":"fin')
    scene.guest.look()
    scene.reports('ished","state":"cnVubmluZwo="}\n')
    assert scene.answer() == ""
    assert scene.guest.message is not None
    assert scene.guest.message.fact("state") == "running"


def test_a_guest_that_does_not_start(scene: Scene) -> None:
    scene.prints("Booting from Hard Disk...\n")
    problem = "it did not start: within 1 s its disk was not written to; the last line on its console was: Booting"
    scene.timeout = 1.0
    assert scene.answer().startswith(problem)


def test_a_guest_that_is_slow_to_start(scene: Scene) -> None:
    """On a machine that is busy the kernel may run for long before it writes to its root filesystem."""
    scene.prints("Booting from Hard Disk...\n[  452.918208] systemd[1]: Finished systemd-fsck-root.service.\n")
    scene.timeout = 1.0
    assert scene.answer().startswith("it did not report within 1 s; the last line on its console was: [  452.918208]")


def test_a_guest_that_waits(scene: Scene) -> None:
    scene.reports('{"stage":"starting","jobs":"MTIgYS5zZXJ2aWNlIHN0YXJ0IHJ1bm5pbmcK"}\n')
    scene.timeout = 1.0
    assert scene.answer() == "it did not come up within 1 s; it waits for a.service"


def test_a_guest_that_is_silent(scene: Scene) -> None:
    scene.machine.overlay.write_bytes(b"written to")
    scene.timeout = 1.0
    scene.prints("Debian GNU/Linux 12 host ttyS0\n\nhost login: ")
    assert scene.answer() == f"it reported nothing within 1 s, though it asks for a login{guest.UNTOLD}"
    scene.prints("\nwhatever\n")
    assert scene.answer() == "it did not report within 1 s; the last line on its console was: whatever"


def test_a_guest_that_was_told_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for until the limit, but for one that has begun to report."""
    monkeypatch.setitem(guest.SILENT_SECONDS, "qemu", 0.5)
    scene.machine.overlay.write_bytes(b"written to")
    scene.timeout = 60.0
    scene.prints("host login: ")
    assert scene.answer() == f"it reported nothing within 0 s after it asked for a login{guest.UNTOLD}"
    scene.reports('{"stage":"started"}\n')
    scene.timeout = 2.0
    assert scene.answer() == "it did not come up within 2 s"


def test_a_guest_that_goes_off(scene: Scene) -> None:
    scene.status = 0
    assert scene.answer() == "it went off or rebooted before it reported"


def test_qemu_that_fails(scene: Scene) -> None:
    log = scene.machine.directory / "qemu.log"
    scene.status = 1
    log.write_text("qemu-system-x86_64: no memory\n")
    assert scene.answer() == "QEMU ended with status 1: qemu-system-x86_64: no memory"
    log.write_text("qemu-system-x86_64: -netdev user: Could not set up host forwarding rule 'tcp::1-:22'\n")
    with pytest.raises(PortTakenError):
        scene.answer()


def test_a_report_without_end_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for _ in range(100):
        scene.reports("x" * 65536)
        scene.guest.look()
    assert scene.answer() == "what it reported is too long"


def test_results_in_the_place_of_a_directory(tmp_path: Path) -> None:
    made = machine(tmp_path)
    made.build.directory.mkdir()
    made.build.plan.junit_path.mkdir()
    with pytest.raises(BuildError, match="is a directory"):
        junit.write(made.build.plan, made.build.directory, [])
