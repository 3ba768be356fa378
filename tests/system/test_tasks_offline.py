"""Tasks after cleaning, in libguestfs' appliance."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from image_factory import checkpoint
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.base.log import printable
from image_factory.checkpoint import Reached
from image_factory.configuration.parsers import Copy
from image_factory.configuration.settings import Task
from image_factory.machines.arch import default_arch
from image_factory.model import Build
from image_factory.system import mounts
from image_factory.tasks import offline

from ..conftest import done_stage, run
from .test_appliance import make_build

SECRET = "correct-horse-battery"
APPLETS = ("sh", "base64", "cat", "chmod", "env", "hostname", "id", "ls", "mkdir", "mount", "ps", "rm", "sleep", "tr")
OFFSETS = {"root": 1 << 20, "boot": 130 << 20}

LOOK = """\
#!/bin/sh
set -e
echo "$1 $COLOUR" >/etc/issue
tr a-z n-za-m <"$TASK_SECRETS" >/etc/turned
cat "$TASK_SECRETS"
echo kernel >/boot/kernel
cat /proc/mounts >/etc/mounts
grep : /proc/net/dev >/etc/devices || :
mount -t tmpfs left /srv
sleep 471106 &
"""


def make_disk(build: Build, directory: Path) -> None:
    """Make the disk of *build* with a root filesystem that has programs, and one for /boot."""
    trees = {name: directory / name for name in OFFSETS}
    for name in ["etc", "boot", "dev", "proc", "run", "srv", "sys", "tmp", "usr/bin", "usr/sbin", "var/log/installer"]:
        (trees["root"] / name).mkdir(parents=True)
    trees["boot"].mkdir()
    (trees["root"] / "bin").symlink_to("usr/bin")
    (trees["root"] / "etc/fstab").write_text("LABEL=root / ext4 defaults 0 1\nLABEL=boot /boot ext4 defaults 0 2\n")
    (trees["root"] / "etc/resolv.conf").symlink_to("/run/names")
    (trees["root"] / "etc/os-release").write_text("ID=debian\n")
    run("cp", "/bin/busybox", trees["root"] / "usr/bin/busybox")
    for name in (*APPLETS, "grep"):
        (trees["root"] / "usr/bin" / name).symlink_to("busybox")
    run("truncate", "-s", "160M", build.disk_path)
    table = "label: gpt\nstart=1MiB, size=128MiB, type=L\nstart=130MiB, size=16MiB, type=L\n"
    subprocess.run(["sfdisk", "--quiet", build.disk_path], input=table, text=True, check=True)
    for name, size in {"root": "128M", "boot": "16M"}.items():
        offset = f"offset={OFFSETS[name]}"
        run("mke2fs", "-q", "-t", "ext4", "-L", name, "-d", trees[name], "-E", offset, build.disk_path, size)


def shown(build: Build, name: str, request: str) -> str:
    return run("debugfs", "-R", request, f"{build.disk_path}?offset={OFFSETS[name]}").stdout


def with_tasks(build: Build, *tasks: Task) -> Build:
    return dataclasses.replace(build, plan=dataclasses.replace(build.plan, late_tasks=tasks))


def test_tasks_in_the_appliance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With all filesystems, the arguments and the secrets, and no network; the first that fails is named."""
    caplog.set_level("INFO", logger="image-factory")
    script, secrets = tmp_path / "look.sh", tmp_path / "secrets"
    script.write_text(LOOK)
    secrets.write_text(f"TOKEN={SECRET}\n")
    secrets.chmod(0o600)
    look = Task(
        "look", "look", "script", script, args=("it's",), environment=(("COLOUR", "dark red"),), secrets=secrets
    )
    after = "ps >/etc/after; ls /srv >>/etc/after; ls -A /run >>/etc/after"
    (tmp_path / "motd").write_text("mine\n")
    tasks = [
        look,
        Task("files", "files", "copy", copies=(Copy(f"{tmp_path}/motd", "/boot/", "7", "8", 0o640),)),
        Task("hangs", "hangs", "command", command="sleep 471106", timeout=2.0, allow_failure=True),
        Task("fails", "fails", "command", command=f"{after}; echo reason >&2; exit 7"),
    ]
    build = with_tasks(make_build(tmp_path / "work"), *tasks)
    make_disk(build, tmp_path)
    with pytest.raises(BuildError) as caught:
        done_stage(build, "clean")
    assert caught.value.message == "Task fails failed with status 7: reason."
    assert shown(build, "root", "cat /etc/issue") == "it's dark red\n"
    assert "pbeerpg-ubefr-onggrel" in shown(build, "root", "cat /etc/turned")
    assert shown(build, "boot", "cat /kernel") == "kernel\n"
    assert shown(build, "boot", "cat /motd") == "mine\n"
    assert re.search(r"(?s)Mode: +0640 .*User: +7 +Group: +8 ", shown(build, "boot", "stat /motd"))
    assert shown(build, "root", "cat /etc/devices").split()[:1] == ["lo:"]
    assert len(shown(build, "root", "cat /etc/devices").splitlines()) == 1
    assert {"/boot", "/proc", "/dev", "/run", "/tmp"} <= {
        line.split()[1] for line in shown(build, "root", "cat /etc/mounts").splitlines()
    }
    after = shown(build, "root", "cat /etc/after")
    assert "471106" not in after and "image-factory-task" in after
    assert "Task hangs did not end within 2 s. It may fail." in caplog.text
    shown_log = printable(caplog.text)
    assert SECRET not in shown_log and "TOKEN=***" in shown_log
    for path in build.directory.iterdir():
        assert SECRET.encode() not in path.read_bytes(), path
    assert "policy" not in shown(build, "root", "ls /usr/sbin")


def test_where_they_cannot_run(tmp_path: Path) -> None:
    """Root of this machine never runs them; what can be known is told before the build."""
    build = make_build(tmp_path / "work", "auto")
    task = Task("x", "x", "command", command="true")
    assert mounts.chosen(with_tasks(build, task).plan).settings.mount_via == "guestfs"
    offline.check(with_tasks(build, task).plan)
    foreign = "aarch64" if default_arch() == "x86_64" else "x86_64"
    for settings, each, message, hint in (
        ({"mount_via": "loop"}, task, "an appliance only, and mount-via = loop has none", "mount-via = guestfs"),
        ({"arch": foreign}, task, f"runs no programs of {foreign}", "Move them to tasks"),
        ({}, Task("x", "x", "packages", packages=("y",)), "x installs packages", "Move it to tasks"),
    ):
        plan = with_tasks(build, each).plan
        plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, **settings))
        with pytest.raises(ConfigurationError, match=message) as caught:
            offline.check(plan)
        assert hint in (caught.value.hint or "")


def test_resuming_knows_them(tmp_path: Path) -> None:
    """What a task has done to a disk that is cleaned stays there."""
    build = with_tasks(make_build(tmp_path / "work"), Task("x", "x", "command", command="one"))
    build.disk_path.write_bytes(b"")
    done = checkpoint.begin(build, checkpoint.InputsUsed())
    other = with_tasks(build, Task("x", "x", "command", command="two"))
    checkpoint.resumed(other.plan, build.directory)
    done.reach(Reached.CLEANED)
    checkpoint.resumed(build.plan, build.directory)
    with pytest.raises(ConfigurationError, match="tasks-after-cleaning changed since the disk was cleaned"):
        checkpoint.resumed(other.plan, build.directory)
