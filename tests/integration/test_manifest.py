"""Manifest, difference and signature of real builds."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import run
from ..system.test_manifest import document_in, validated
from ..system.test_record import checked_file
from ..system.test_sign import ALICE, Keys, keys, sums_signed_by
from .test_build import TODAY, WORK, Build

pytestmark = pytest.mark.usefixtures("machine")

__all__ = ["keys"]

IMAGE = f"stand-in-{TODAY}"
COMPANIONS = [
    f"{IMAGE}.qcow2.manifest.json",
    f"{IMAGE}.qcow2.cdx.json",
    f"{IMAGE}.SHA256SUMS",
    f"{IMAGE}.SHA256SUMS.asc",
]
FILES = [f"{IMAGE}.qcow2", f"{IMAGE}.qcow2.sha256sum", *COMPANIONS]


def plant(build: Build, **versions: str) -> None:
    """Have the disk that is installed, with its partition at 1 MiB, know packages of these *versions*."""
    stanzas = [
        f"Package: {name}\nStatus: install ok installed\nArchitecture: all\nVersion: {version}\n"
        for name, version in versions.items()
    ]
    status, copyright_file = build.directory / "status", build.directory / "copyright"
    status.write_text("\n".join(stanzas))
    copyright_file.write_text("Format: x\n\nFiles: *\nLicense: ISC\n")
    lines = ["mkdir /var/lib/dpkg", f"write {status} /var/lib/dpkg/status", "mkdir /usr/share/doc"]
    lines += ["mkdir /usr/share/doc/golden", f"write {copyright_file} /usr/share/doc/golden/copyright"]
    disk = build.directory / WORK / "disk.raw"
    subprocess.run(["debugfs", "-w", f"{disk}?offset={1 << 20}"], input="\n".join(lines), text=True, check=True)


@pytest.fixture
def destination(user_build: Build) -> Iterator[Path]:
    path = user_build.user.directory(f"upload-{user_build.directory.name}")
    yield path
    run("rm", "-r", path)


def test_real_build(user_build: Build, installed_disk: Path, destination: Path, keys: Keys) -> None:
    """It is built twice on one day: the second differs from the first, which it replaces."""
    build = user_build
    key = keys.export(build.directory / "signing.key", ALICE)
    run("chown", build.user.name, key)
    build.configure(
        extra=f"""
manifest = yes
sign-key = {key}
upload_destinations = here
[here]
upload_type = rsync
upload_target = {destination}/
"""
    )
    build.go_on_from(installed_disk)
    plant(build, golden="1.0", old="1")
    done = build.run("--resume", "--json", "r.json")
    assert "Changes since" not in done.stdout
    record = checked_file(build.directory / "r.json")
    assert record["difference"] is None
    [artifact] = record["artifacts"]
    assert [entry["name"] for entry in artifact["companions"]] == COMPANIONS
    found = document_in(build.directory / COMPANIONS[0])
    assert [(entry["name"], entry["version"], entry["licenses"]) for entry in found["packages"]] == [
        ("golden", "1.0", ["ISC"]),
        ("old", "1", None),
    ]
    assert found["os"]["id"] == "stand-in"
    assert found["directories"]["root"] > 0
    assert found["artifact"]["sha256"] == artifact["sha256"]
    assert len(validated(build.directory / COMPANIONS[1])) == 2
    for directory in (build.directory, destination):
        assert sums_signed_by(directory / COMPANIONS[2], keys) == keys.fingerprint(ALICE)
        names = [line.split()[1] for line in (directory / COMPANIONS[2]).read_text().splitlines()]
        assert names == FILES[:4]
    assert sorted(path.name for path in destination.iterdir()) == sorted(FILES)

    # What is converted is gone on from with all that belongs to it; what was damaged is made anew.
    build.go_on_from(installed_disk)
    plant(build, golden="1.1", new="2")
    build.run("--resume", "--until", "convert")
    assert {path.name for path in (build.directory / WORK).iterdir()} == {
        "checkpoint.json", "disk.raw", "inventory.json", *FILES,
    }  # fmt: skip
    (build.directory / WORK / COMPANIONS[0]).write_text("{}")
    done = build.run("--resume", "--json", "r.json")
    assert "Checking the images" in done.stderr
    assert "Converting to qcow2: done" in done.stderr
    assert (
        f"""
Changes since {IMAGE}:
  packages      1 added, 1 removed, 1 changed
    + new 2
    - old 1
    * golden 1.0 -> 1.1
  installed """
        in done.stdout
    )
    record = checked_file(build.directory / "r.json")
    assert record["difference"] == json.loads((build.directory / COMPANIONS[0]).read_text())["difference"]
    assert record["difference"]["packages"]["changed"][0]["after"] == "1.1"
    assert sums_signed_by(destination / COMPANIONS[2], keys) == keys.fingerprint(ALICE)
    secret = key.read_text().splitlines()[3]
    assert secret not in done.stderr
    assert not list(Path("/tmp").glob("image-factory-gpg.*"))


def test_key_that_can_not_sign_ends_the_build_before_it_begins(user_build: Build) -> None:
    user_build.configure(extra="sign-key = /nowhere/key")
    done = user_build.run("--check", check=False)
    assert done.returncode == 2
    message = "[stand-in] sign-key: The key file /nowhere/key can't be read: No such file or directory."
    assert user_build.errors(done)[0] == f"image-factory: error: {message}"


def test_manifest_that_is_wanted_late(user_build: Build, installed_disk: Path) -> None:
    """The disk is mounted once more for it."""
    user_build.configure()
    user_build.go_on_from(installed_disk)
    user_build.run("--resume", "--until", "clean")
    user_build.configure(extra="manifest = yes")
    done = user_build.run("--resume")
    assert "WARNING: No packages are listed" in done.stderr
    found = document_in(user_build.directory / COMPANIONS[0])
    image = user_build.directory / f"{IMAGE}.qcow2"
    assert found["artifact"]["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert (found["packages"], found["os"]["version_id"]) == ([], "1")
