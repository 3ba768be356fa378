"""Whether virtual machines can use KVM."""

import shutil
from pathlib import Path

import pytest

from image_factory.machines import kvm


class TestProbe:
    """Where no KVM works, a stand-in for QEMU on PATH tells what the probe makes of its output."""

    @pytest.fixture
    def qemu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        device = tmp_path / "kvm"
        device.touch()
        monkeypatch.setattr(kvm, "KVM_DEVICE", device)
        monkeypatch.setattr(kvm, "PROBE_SECONDS", 0.5)
        program = tmp_path / "bin/qemu-system-x86_64"
        program.parent.mkdir()
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return program

    def write(self, program: Path, script: str) -> None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def test_kernel_that_prints(self, qemu: Path, tmp_path: Path) -> None:
        self.write(qemu, f'echo "$@" > {tmp_path}/argv; echo "Linux version 6.1"; exec sleep 60')
        assert kvm.why_not_kvm(Path("/netboot/linux"), "x86_64") is None
        words = (tmp_path / "argv").read_text()
        assert "-accel kvm" in words
        assert "-kernel /netboot/linux" in words

    @pytest.mark.parametrize("script", ["exec sleep 60", "echo SeaBIOS; exec sleep 60", "echo could not; exit 1"])
    def test_kernel_that_does_not(self, qemu: Path, script: str) -> None:
        self.write(qemu, script)
        assert (
            kvm.why_not_kvm(Path("/netboot/linux"), "x86_64")
            == "the kernel that was started printed nothing under it within 0 s"
        )

    def test_no_kernel(self, qemu: Path) -> None:
        assert kvm.why_not_kvm(None, "x86_64") == "there is no kernel to probe it with"

    def test_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kvm, "KVM_DEVICE", Path("/dev/none"))
        assert kvm.why_not_kvm(Path("/netboot/linux"), "x86_64") == "/dev/none: No such file or directory"

    @pytest.mark.parametrize("chosen", ["kvm", "qemu"])
    def test_settings_decide(self, chosen: str) -> None:
        assert not kvm.has_to_probe(chosen, "x86_64")

    def test_architecture_decides(self) -> None:
        assert not kvm.has_to_probe("auto", "aarch64")
        assert kvm.has_to_probe("auto", "x86_64")
        assert kvm.probed_virt_type(None, "x86_64", as_root=True) == "qemu"


@pytest.mark.parametrize(
    ("uid", "gid", "mode", "may"),
    [
        (0, 0, 0o660, False),
        (0, 0, 0o664, False),
        (0, 0, 0o666, True),
        (0, "kvm", 0o660, True),
        (0, "kvm", 0o606, False),
        (0, "kvm", 0o640, False),
        ("libvirt-qemu", 0, 0o600, True),
        ("libvirt-qemu", "kvm", 0o066, False),
    ],
)
def test_kvm_that_the_qemu_of_libvirt_may_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int | str, gid: int | str, mode: int, may: bool
) -> None:
    device = tmp_path / "kvm"
    device.touch()
    shutil.chown(device, uid, gid)
    device.chmod(mode)
    monkeypatch.setattr(kvm, "KVM_DEVICE", device)
    reasons = [kvm.why_libvirt_has_no_kvm(None, "x86_64", as_root=as_root) for as_root in (True, False)]
    other = "there is no kernel to probe it with"
    assert reasons == [
        other if may else f"{device}: libvirt-qemu, as whom libvirt runs QEMU, may not open it",
        other,
    ]
