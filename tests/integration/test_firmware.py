"""A build in a machine with UEFI."""

from pathlib import Path

import pytest

from .test_build import TODAY, Build

pytestmark = pytest.mark.usefixtures("machine")


def kept_by_libvirt(build: Build) -> list[Path]:
    """Return the files in which libvirt keeps the memory of UEFI."""
    home = Path("/var/lib/libvirt/qemu") if build.user.is_root else build.user.home / ".config/libvirt/qemu"
    return list(home.glob("nvram/*stand-in*"))


def test_uefi(build: Build) -> None:
    build.configure(arguments="stand-in=gpt", extra="firmware = uefi\ncpu = qemu64,+nx")
    done = build.run()
    assert "--machine q35 --boot firmware=efi," in done.stderr
    assert "--cpu qemu64,+nx" in done.stderr
    assert "efi: EFI v" in (build.directory / f"stand-in-{TODAY}.console.log").read_text(errors="replace")
    assert f"stand-in-{TODAY}.qcow2" in build.files()
    assert kept_by_libvirt(build) == []


def test_uefi_that_does_not_start(build: Build) -> None:
    """Where the machine fails to start there is none to remove, and libvirt removes nothing."""
    build.configure(arguments="stand-in=gpt", extra="firmware = uefi\nnetwork = user,model=none-such")
    done = build.run(check=False)
    assert done.returncode == 1
    assert "image-factory: error: virt-install failed with status 1" in done.stderr
    assert kept_by_libvirt(build) == []
