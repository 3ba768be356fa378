"""Whole builds whose answer file comes on a seed disk, with the stand-in installer."""

import hashlib
import os
import re
import shlex
import signal
import stat
from pathlib import Path

import pytest

from ..conftest import run, wait_for
from .test_build import TODAY, Build, logged_commands, normal

pytestmark = pytest.mark.usefixtures("machine")

SECRET = "hunter2-on-the-seed-disk"
ANSWERS = {
    "autoinstall": f"#cloud-config\nautoinstall: {{version: 1, identity: {{password: {SECRET}}}}}\n",
    "agama": f'{{"root": {{"password": "{SECRET}"}}}}\n',
}
# Where an ISO of the installer has its kernel and initrd.
BOOT_FILES = {
    "autoinstall": ("casper/vmlinuz", "casper/initrd"),
    "agama": ("boot/x86_64/loader/linux", "boot/x86_64/loader/initrd"),
}
# What the guest sees on the disk.
FILES = {"autoinstall": "/seed/meta-data /seed/user-data", "agama": "/seed/autoinst.json"}


def configure(build: Build, key: str, arguments: str = "", extra: str = "") -> str:
    """Let *build* have the answer file of *key*; return its SHA-256."""
    build.configure(arguments=arguments, extra=f"log-file = yes\n{extra}")
    configuration = build.directory / "image-factory.conf"
    path = build.directory / "answers.json"
    path.write_text(ANSWERS[key])
    path.chmod(0o600)
    run("chown", build.user.name, path)
    text = re.sub("^preseed = .*$", f"{key} = {path}", configuration.read_text(), flags=re.MULTILINE)
    configuration.write_text(text)
    return hashlib.sha256(ANSWERS[key].encode()).hexdigest()


def seed(build: Build) -> Path:
    return build.directory / ".image-factory-stand-in/seed.iso"


def said(build: Build) -> str:
    """Return the log and the console's log; neither shows the secret."""
    names = ("log", "console.log")
    text = "".join((build.directory / f"stand-in-{TODAY}.{name}").read_text(errors="replace") for name in names)
    assert SECRET not in text
    return text


def delivered(key: str, digest: str, *further: str) -> str:
    """Return what the installer says of the disk, with *further* files, and the answer file."""
    files = " ".join(sorted([*FILES[key].split(), *further]))
    return f"stand-in: seed disk: {files} \nstand-in: answer file: {FILES[key].split()[-1][1:]}, sha256 {digest}\n"


def make_iso(build: Build, key: str) -> Path:
    """Make an ISO of the stand-in, as it is for the answer file *key*."""
    iso = build.directory / "installer.iso"
    kernel, initrd = BOOT_FILES[key]
    files = ("-map", build.stand_in / "linux", f"/{kernel}", "-map", build.stand_in / "initrd.gz", f"/{initrd}")
    run("xorriso", "-outdev", f"stdio:{iso}", "-volid", "INSTALLER", *files, "-commit")
    iso.chmod(0o644)
    return iso


def test_installation_from_an_iso(build: Build) -> None:
    """The installer has read the answer file, and nothing of its disk is in the image."""
    key = "autoinstall" if build.user.is_root else "agama"
    iso = make_iso(build, key)
    further = build.directory / "script.sh"
    further.write_text(f"# {SECRET}\n")
    digest = configure(
        build, key, extra=f"format = raw\ninstaller_image = {iso}\nanswer-files = {further}:late/script.sh"
    )
    dry = build.run("--dry-run")
    assert not seed(build).exists()
    build.run()
    text = said(build)
    assert delivered(key, digest, "/seed/late/script.sh") in text
    # Neither as a file nor in a block.
    assert run("grep", "-c", SECRET, build.directory / f"stand-in-{TODAY}.raw", check=False).stdout == "0\n"

    announced = [shlex.split(line) for line in dry.stdout.splitlines() if not line.startswith("#")]
    # What only some disks need: blocks that can't be freed, swap space.
    optional = ("zerofree", "fallocate")
    ran, expected = (
        [normal(argv) for argv in argvs if argv[0] not in optional and argv[-1] != "uri"]
        for argvs in (logged_commands(text), announced)
    )
    assert ran == expected


def test_failure(build: Build) -> None:
    digest = configure(build, "autoinstall", "stand-in=panic")
    done = build.run("--debug", check=False)
    assert done.returncode == 1
    assert not seed(build).exists()
    assert SECRET not in done.stderr
    assert delivered("autoinstall", digest) in said(build)
    [line] = re.findall("To repeat the installation by hand: (.*)", said(build))
    assert "xorriso" in line
    assert f"path={build.directory}/stand-in-by-hand/seed.iso,device=cdrom" in line


def test_signal(build: Build) -> None:
    """While the guest runs no one else can read the seed disk; then it goes with the machine."""
    digest = configure(build, "agama", "stand-in=hang")
    with build.started() as process:
        build.wait_for_guest("stand-in: partitioning")
        assert stat.S_IMODE(seed(build).stat().st_mode) == 0o600
        os.kill(build.pid(), signal.SIGTERM)
        wait_for(lambda: not seed(build).exists(), "the seed disk to go")
        assert process.wait(60) == 128 + signal.SIGTERM
    assert delivered("agama", digest) in said(build)
    assert SECRET not in build.stderr()
