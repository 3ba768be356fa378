"""What is checked of the installation's machine before there is one."""

import re
from pathlib import Path

import pytest

from image_factory.base.errors import ConfigurationError
from image_factory.machines import firmware, kvm, libvirt
from image_factory.sources.installer import machinecheck

from .test_virt_install import plan

FIRMWARE = """{"interface-types": ["uefi"], "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}]}"""


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("arch = aarch64\nfirmware = bios", "[image] firmware: aarch64 has no bios.", "Use uefi."),
        ("arch = aarch64\nfirmware = hybrid", "[image] firmware: aarch64 has no hybrid.", "Use uefi."),
        (
            "arch = aarch64",
            "[image] firmware = uefi: this machine has no UEFI for aarch64.",
            "Install it: apt-get install qemu-efi-aarch64",
        ),
        ("firmware = uefi\narch = x86_64\nvirt-type = kvm", None, None),
        ("firmware = hybrid", None, None),
        ("", None, None),
    ],
)
def test_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str | None, hint: str | None
) -> None:
    """The others are what QEMU's packages or a user may have there, and libvirt doesn't read."""
    for name, content in {"10-bad.json": "{", "20-list.json": "[1]", "60-good.json": FIRMWARE}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "30-directory.json").mkdir()
    monkeypatch.setattr(firmware, "_DIRECTORIES", (tmp_path / "none", tmp_path))
    if message is None:
        machinecheck.check_machine(plan(tmp_path, text))
        return
    with pytest.raises(ConfigurationError) as caught:
        machinecheck.check_machine(plan(tmp_path, text))
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_no_uefi_for_hybrid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firmware, "_DIRECTORIES", (tmp_path,))
    with pytest.raises(ConfigurationError) as caught:
        machinecheck.check_machine(plan(tmp_path, "firmware = hybrid"))
    assert caught.value.hint == "Install it: apt-get install ovmf"


def test_kvm_of_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^\[image\] virt-type: KVM runs no aarch64 on x86_64\.$"):
        machinecheck.check_machine(plan(tmp_path, "arch = aarch64\nvirt-type = kvm"))


@pytest.mark.parametrize("character", "&<>'\"")
def test_output_directory_that_virt_install_cannot_use(tmp_path: Path, character: str) -> None:
    with pytest.raises(ConfigurationError, match="virt-install can't use /var/tmp/"):
        machinecheck.check_output_dir(plan(tmp_path, output_dir=Path(f"/var/tmp/{character}")))


SLOW = r"libvirt takes [0-9]+ s for each query of what QEMU can do, .*: rm /"


@pytest.mark.parametrize(
    ("text", "at_least", "device", "status", "calls", "warning"),
    [
        # The second one tells: the first may have come just after libvirtd's start.
        ("", 0, True, 0, 2, SLOW),
        ("", 1000, True, 0, 1, None),
        ("", 0, False, 0, 0, None),
        ("virt-type = qemu", 0, True, 0, 0, None),
        ("", 0, True, 1, 1, "libvirt does not say what QEMU can do: error: it is gone"),
    ],
)
def test_check_of_a_slow_libvirt(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    text: str,
    at_least: float,
    device: bool,
    status: int,
    calls: int,
    warning: str | None,
) -> None:
    monkeypatch.setattr(kvm, "KVM_DEVICE", tmp_path / ("image-factory.conf" if device else "none"))
    monkeypatch.setattr(machinecheck, "_SLOW_QUERY_SECONDS", at_least)
    program = tmp_path / "bin/virsh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\necho "error: it is gone" >&2\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / "calls").touch()
    machinecheck.warn_of_slow_libvirt(plan(tmp_path, text))
    assert (tmp_path / "calls").read_text() == "--connect qemu:///system capabilities\n" * calls
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (warning is not None)
    assert not warning or re.match(warning, warnings[0])


def test_output_directory_that_qemu_cannot_enter(tmp_path: Path) -> None:
    """pytest's directories are their owner's alone, as root's home is."""
    with pytest.raises(ConfigurationError, match=r"user libvirt-qemu, can't enter /"):
        machinecheck.check_output_dir(plan(tmp_path, output_dir=tmp_path))
    machinecheck.check_output_dir(plan(tmp_path, output_dir=Path("/var/tmp")))


def test_machines_where_libvirt_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a killed build has left besides is removed all the same, and nothing is kept in silence."""
    (tmp_path / "virsh").write_text("#!/bin/sh\necho 'error: no connection' >&2\nexit 1\n")
    (tmp_path / "virsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert list(libvirt.machines("image-factory-")) == []
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("Whether a killed build has left a virtual machine is not known: ")
    assert "no connection" in warning
