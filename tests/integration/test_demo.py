"""`make demo` and `make demo-installer` as root, beside a /dev/kvm that may be useless: what a new user runs first."""

import re
import shutil
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, run

OWN_MACHINE = REPOSITORY / "tests/with-own-machine"


def test_demo_without_its_mirror(machine: None, prefix: Path) -> None:
    """The program says what is wrong, and of all that was made nothing is left."""
    before = set(Path("/var/tmp").glob("image-factory-demo*"))
    done = run("make", "--silent", "-C", REPOSITORY, "demo", "MIRROR=http://127.0.0.1:9/debian", check=False)
    assert done.returncode == 2
    [error] = re.findall(r"^image-factory: error: (.*)$", done.stderr, re.MULTILINE)
    assert "127.0.0.1" in error
    assert "based_on = Debian-13-cloud\n" in done.stdout
    assert set(Path("/var/tmp").glob("image-factory-demo*")) == before


def test_demo_with_an_installer(machine: None, prefix: Path) -> None:
    """On a machine where nothing of libvirt runs."""
    done = run(OWN_MACHINE, "make", "--silent", "-C", REPOSITORY, "demo-installer")
    said = f"{done.stdout}\n{done.stderr}"
    image = re.search(
        r"^==> The image is (/var/tmp/image-factory-demo\.\w+)/(stand-in-[-0-9]+\.qcow2)$", said, re.MULTILINE
    )
    assert image
    try:
        assert {image[2], f"{image[2]}.sha256sum"} <= {path.name for path in Path(image[1]).iterdir()}
    finally:
        shutil.rmtree(image[1])
    assert "==> Starting libvirtd for the time of the demo" in said
    # With it in sight, libvirt would start each QEMU anew at each query.
    assert "==> libvirt gets no KVM: /dev/kvm: " in said
    assert "--virt-type qemu" in said


@pytest.mark.parametrize("is_mount", [False, True])
def test_daemon_without_kvm(machine: None, tmp_path: Path, is_mount: bool) -> None:
    """It has all other devices; and each mount is there once, as libvirt wants it.  So where KVM's node is a mount."""
    loader = SourceFileLoader("demo", str(REPOSITORY / "tests/programs/demo"))
    spec = spec_from_loader("demo", loader)
    assert spec
    demo = module_from_spec(spec)
    loader.exec_module(demo)
    look = "[ -e /dev/kvm ] || echo none; ls /dev; ls /dev/pts/ptmx; grep -c ' /dev ' /proc/mounts"
    inside = ["unshare", "--mount", "sh", "-c", demo.WITHOUT_KVM, tmp_path, "sh", "-c", look]
    bind = "mount --bind /dev/null /dev/kvm" if is_mount else ":"
    script = f'{bind}; {look}; echo; "$@"'
    # Both make a /dev, the one with a node for KVM and the other without.
    outer = [OWN_MACHINE, "sh", "-c", f'{bind}; exec "$@"', "sh", OWN_MACHINE]
    outside, within = run(*outer, "sh", "-c", script, "sh", *inside).stdout.split("\n\n")
    assert "none" not in outside.splitlines()
    assert within.splitlines() == ["none", *(line for line in outside.splitlines() if line != "kvm")]
    assert within.splitlines()[-1] == "1"
