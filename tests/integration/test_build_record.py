"""The build record of real builds."""

import os
import re
import signal
from pathlib import Path

import pytest

from image_factory import __version__
from image_factory.told import record

from ..system.test_record import checked, checked_file, full_disk, sha256
from .test_build import ANSWERS, TODAY, Build

pytestmark = pytest.mark.usefixtures("machine")

REAL_BUILD_SECONDS = 3000


def inputs_of(build: Build) -> list[dict[str, str | None]]:
    files = {
        "configuration": build.directory / "image-factory.conf",
        "linux": build.stand_in / "linux",
        "initrd": build.stand_in / "initrd.gz",
        "preseed": build.directory / "answers.cfg",
    }
    return [
        {"key": key, "origin": str(path), "sha256": sha256(path), "verified_by": None} for key, path in files.items()
    ]


def test_real_build(build: Build) -> None:
    upload = build.user.directory(f"upload-{build.directory.name}")
    build.configure(
        extra=f"""
format = qcow2
keep-raw = yes
upload_destinations = here
post-build-command = true s3cret
[here]
upload_type = rsync
upload_target = {upload}/
""",
    )
    done = build.run("--json", "r.json")
    text = (build.directory / "r.json").read_text()
    found = checked_file(build.directory / "r.json")
    assert found["failure"] is None
    assert found["image"] == "stand-in"
    assert found["version"] == __version__
    assert found["host"] == {"architecture": "x86_64", "virt_type": "qemu"}
    assert found["inputs"] == inputs_of(build)
    assert not [line for line in ANSWERS.split() if len(line) > 12 and line in text]
    assert "s3cret" not in text
    logged = re.findall(r" INFO: (.*): done in ([0-9.]+) s$", done.stderr, re.M)
    assert [step["name"] for step in found["steps"]] == [name for name, _ in logged]
    # Both are rounded.
    assert [step["seconds"] for step in found["steps"]] == pytest.approx([float(s) for _, s in logged], abs=0.0511)
    assert {step["outcome"] for step in found["steps"]} == {"done"}
    assert sum(step["seconds"] for step in found["steps"]) < found["seconds"] < REAL_BUILD_SECONDS
    qcow2, raw = found["artifacts"]
    assert (qcow2["format"], qcow2["upload"], raw["format"], raw["upload"]) == ("qcow2", True, "raw", False)
    for artifact in found["artifacts"]:
        path = Path(artifact["path"])
        assert path == build.directory / f"stand-in-{TODAY}.{artifact['format']}"
        assert artifact["sha256"] == sha256(path)
        assert artifact["size"] == path.stat().st_size
        assert artifact["virtual_size"] == 512 << 20
    assert raw["size"] == 512 << 20 > raw["size_on_disk"] > 0
    unknown = [name for name, version in found["programs"].items() if version is None]
    assert unknown == ["true"]
    assert found["programs"][record.HELPER] == __version__
    assert ("sudo" in found["programs"]) is not build.user.is_root
    assert {"virt-install", "qemu-img", "qemu-system-x86_64", "rsync", "zerofree", "cpio"} <= set(found["programs"])
    assert found["settings"]["image-size"] == 512 << 20
    assert "virsh --version" not in done.stderr
    assert f"{qcow2['path']}\n  virtual size" in done.stdout


def test_real_build_that_fails_at_its_end(user_build: Build) -> None:
    """The published files are in the record all the same."""
    user_build.configure(extra="post-build-command = sh -c 'rm *.qcow2; kill -9 $$$$'")
    done = user_build.run("--json", "-", check=False)
    assert done.returncode == 1
    found = checked(done.stdout)
    assert [artifact["format"] for artifact in found["artifacts"]] == ["qcow2"]
    assert found["artifacts"][0]["upload"] is False
    failure = found["failure"]
    assert failure["step"] == "Running the post-build command"
    assert failure["command"]["argv"][:2] == ["sh", "-c"]
    assert failure["command"]["status"] == -9
    assert f"image-factory: error: {failure['message']}" in done.stderr
    assert [step["name"] for step in found["steps"] if step["outcome"] == "failed"] == [failure["step"]]


def test_real_build_that_installs_nothing(user_build: Build) -> None:
    user_build.configure(arguments="stand-in=empty-disk")
    assert user_build.run("--json", "r.json", check=False).returncode == 1
    found = checked_file(user_build.directory / "r.json")
    assert found["inputs"] == inputs_of(user_build)
    assert found["artifacts"] == []
    reading = "Reading the partition table"
    assert (found["failure"]["step"], found["steps"][-1]["name"]) == (reading, reading)
    assert found["failure"]["message"].startswith("The disk has no partition table")
    assert found["failure"]["command"] is None


def test_real_build_that_is_interrupted(user_build: Build) -> None:
    user_build.configure(arguments="stand-in=hang")
    with user_build.started("--json", "r.json") as process:
        user_build.wait_for_guest("stand-in: ")
        assert not (user_build.directory / "r.json").exists()
        os.kill(user_build.pid(), signal.SIGTERM)
        assert process.wait(60) == 143
    found = checked_file(user_build.directory / "r.json")
    assert found["failure"] == {
        "kind": "interrupted",
        "message": "Stopped by SIGTERM.",
        "hint": None,
        "exit_status": 143,
        "step": "Installing",
        "command": None,
    }
    assert found["inputs"] == inputs_of(user_build)


def test_real_build_in_an_odd_place_with_no_room_for_the_record(user_build: Build) -> None:
    """The image stays; and a name with blanks and the like does no harm."""
    odd = user_build.directory / "odd \u00e9 %s \\"
    odd.mkdir()
    os.chown(odd, user_build.user.uid, -1)
    user_build.configure(extra="format = raw")
    name = os.fsdecode(b"r \xe9 \x1b[31m.json")
    user_build.run("--json", odd / name, "--output-dir", odd)
    found = checked_file(odd / name)
    assert [artifact["path"] for artifact in found["artifacts"]] == [f"{odd}/stand-in-{TODAY}.raw"]

    (odd / f"stand-in-{TODAY}.raw").unlink()
    full = user_build.directory / "full"
    full.mkdir()
    with full_disk(full):
        done = user_build.run("--json", full / "r.json", "--output-dir", odd, check=False)
        assert os.listdir(full) == ["filler"]
    assert done.returncode == 1
    assert user_build.errors(done) == [
        f"image-factory: error: The build record {full}/r.json can't be written: No space left on device."
    ]
    assert (odd / f"stand-in-{TODAY}.raw").exists()
    assert "virtual size" in done.stdout
