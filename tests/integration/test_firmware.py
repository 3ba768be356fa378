"""A build in a machine with UEFI."""

from .test_build import TODAY, Build


def test_uefi(user_build: Build) -> None:
    user_build.configure(arguments="stand-in=gpt", extra="firmware = uefi\ncpu = qemu64,+nx")
    done = user_build.run()
    assert "--machine q35 --boot firmware=efi," in done.stderr
    assert "--cpu qemu64,+nx" in done.stderr
    assert "efi: EFI v" in (user_build.directory / f"stand-in-{TODAY}.console.log").read_text(errors="replace")
    assert f"stand-in-{TODAY}.qcow2" in user_build.files()
    # libvirt keeps what UEFI has in its memory of a machine.
    assert list(user_build.user.home.glob(".config/libvirt/qemu/nvram/*")) == []
