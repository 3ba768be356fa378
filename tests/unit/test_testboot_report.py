"""What is made of a guest's report: each check, and answers of a guest that lies."""

import base64
import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from image_factory.base.log import printable
from image_factory.checks.testboot import report
from image_factory.checks.testboot.report import Message, Subject, checks_of, identity_checks, parse

GIB = 1 << 30
SUBJECT = Subject(2 * GIB, 4 * GIB, first_boot=True)
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE5TLs7pWqWKmVvVx5YqEo5Ww8rZ0mLv5o2c1cVbQm9k"
GOOD = {
    "state": "running\n",
    "failed": "",
    "machine-id": "0123456789abcdef0123456789abcdef\n",
    "host-keys": f"{KEY} root@host\n",
    "addresses": "2: ens2    inet 10.0.2.15/24 brd 10.0.2.255 scope global dynamic ens2\\       valid_lft 86374sec\n",
    "routes": "default via 10.0.2.2 dev ens2\n",
    "root": "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda3 4040000 900000 2900000 24% /\n",
    "root-device": "/dev/sda3\n",
    "partitions": "sda1 sda 2048 2048\nsda2 sda 4096 69632\nsda3 sda 73728 8314847\nsr0 sr0 0 100\n",
    "growpart": "/usr/bin/growpart\n",
    "has-cloud-init": "/usr/bin/cloud-init\n",
    "cloud-init": '{"v1": {"datasource": "DataSourceNoCloud [seed=/dev/sr0][dsmode=net]", "errors": []}}',
    "sshd": "/usr/sbin/sshd\n",
    "kernel": "",
}


def problems(changes: dict[str, str], subject: Subject = SUBJECT) -> dict[str, str]:
    """Return the messages of the checks that did not pass, by name."""
    checks = checks_of(Message("finished", GOOD | changes), subject)
    return {check.name: check.message for check in checks if check.outcome != "passed"}


def test_a_good_report_passes() -> None:
    assert problems({}) == {}


def test_a_machine_with_secure_boot_and_a_tpm() -> None:
    """Their checks are there for these alone."""
    subject = dataclasses.replace(SUBJECT, secure_boot=True, tpm=True)
    assert problems({"secure-boot": "   1\n", "tpm": "2\n"}, subject) == {}
    assert problems({"secure-boot": " 0", "tpm": ""}, subject) == {
        "secure-boot": "its kernel was not booted securely", "tpm": "its kernel knows no TPM 2.0",
    }  # fmt: skip
    assert not {check.name for check in checks_of(Message("finished", GOOD), SUBJECT)} & {"secure-boot", "tpm"}


FULL = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda3 4040000 2040000 1800000 50% /\n"
NOT_GROWN = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda3 2000000 900000 900000 50% /\n"


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"state": "degraded", "failed": "a.service loaded failed failed A\nb.mount x"}, "units",
         "a.service, b.mount failed"),
        ({"state": "maintenance"}, "units", "its state is maintenance"),
        ({"state": ""}, "units", "its state is unknown"),
        ({"machine-id": "uninitialized"}, "machine-id", "its machine-id is none"),
        ({"machine-id": "0" * 32}, "machine-id", "its machine-id is none"),
        ({"host-keys": ""}, "host-keys", "it has no SSH host keys"),
        ({"host-keys": "ssh-ed25519 $(reboot)"}, "host-keys", "it has no SSH host keys"),
        ({"addresses": ""}, "network", "it has no network: no card has an IPv4 address"),
        ({"routes": ""}, "network", "it has no network: there is no default route"),
        ({"sshd": ""}, "sshd-installed", "sshd is not installed"),
        ({"root": FULL}, "root-space", "its root filesystem is full: 1.9 GiB of a disk of 2.0 GiB"),
        ({"root": NOT_GROWN}, "root-size", "its root filesystem did not grow: 1.9 GiB on a disk of 4.0 GiB"),
        ({"growpart": ""}, "root-size", "the image has no growpart"),
        ({"root-device": "/dev/mapper/vg-root"}, "root-size", "the root filesystem is not on a partition of its own"),
        ({"root-device": "/dev/sda2"}, "root-size", "the root's partition is not the last one of the disk"),
        ({"has-cloud-init": ""}, "cloud-init", "it is not installed"),
        ({"cloud-init": ""}, "cloud-init", "cloud-init did not run to its end"),
        ({"cloud-init": "[" * 100000}, "cloud-init", "cloud-init did not run to its end"),
        ({"cloud-init": '{"v1": {"datasource": "DataSourceNone", "errors": []}}'}, "cloud-init",
         "cloud-init did not take the NoCloud seed: DataSourceNone"),
        ({"cloud-init": '{"v1": {"datasource": "x", "errors": ["a\\nb"]}}'}, "cloud-init", "cloud-init failed: a b"),
        ({"first-boot-left": "/var/lib/image-factory/first-boot\n", "first-boot-log": "a\nb\x1b\nc\nd\n"}, "first-boot",
         "its first-boot scripts did not succeed: b? / c / d"),
        ({"first-boot-left": "/var/lib/image-factory/first-boot\n"}, "first-boot",
         "its first-boot scripts did not succeed"),
        ({"kernel": "ata1: error\nscsi: error\n"}, "kernel-log",
         "its kernel logged an error: ata1: error (and 1 more)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(changes: dict[str, str], name: str, message: str) -> None:
    assert problems(changes)[name] == message


def test_scripts_that_the_image_has_not() -> None:
    found = problems({"first-boot-left": "/x"}, Subject(2 * GIB, 4 * GIB))
    assert found == {"first-boot": "the image has no scripts for it"}


def test_a_root_on_a_subvolume_has_its_partition() -> None:
    assert problems({"root-device": "/dev/sda3[/@]"}) == {}


def test_errors_that_are_allowed() -> None:
    allowed = Subject(2 * GIB, 4 * GIB, ("^ata1:",), first_boot=True)
    assert problems({"kernel": "ata1: error"}, allowed) == {}
    assert "kernel-log" in problems({"kernel": "ata1: error\nata2: error"}, allowed)


def test_an_unknown_size_is_no_good_one() -> None:
    assert set(problems({"root": "9" * 5000})) == {"root-space", "root-size"}


def test_nothing_of_a_guest_reaches_a_terminal_unseen() -> None:
    found = problems({"state": "\x1b[2Jdegraded", "failed": "\x1b]0;x\x07a.service x", "kernel": "\x1b[31mred"})
    assert "\x1b" not in "".join(found.values())


def test_identity() -> None:
    first, second = Message("finished", GOOD), Message("finished", GOOD | {"machine-id": "f" * 32})
    assert identity_checks(first, []) == []
    found = {check.name: check.outcome for check in identity_checks(second, [first])}
    assert found == {"machine-id-new": "passed", "host-keys-new": "failed"}


def test_fingerprint_is_that_of_ssh_keygen(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text(f"{KEY}\n")
    shown = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "key.pub"], capture_output=True, text=True, check=True)
    assert Message("finished", GOOD).fingerprints == [shown.stdout.split()[1]]


@pytest.mark.parametrize(
    "line",
    [b"", b"x", b"[]", b"{}", b'{"stage": 1}', b'{"stage": "x", "a": "!"}', b'{"stage": "x", "a": 1}', b"[" * 100000,
     b"\xff", b'{"stage": "x", "a": "\xc3\xa4"}'],
)  # fmt: skip
def test_what_is_no_report_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        parse(line)
    assert str(caught.value) == printable(line[:60].decode("utf-8", errors="replace"))


def test_a_line_is_read() -> None:
    line = json.dumps({"stage": "starting", "jobs": base64.b64encode(b"a\xff").decode()}).encode()
    assert parse(line) == Message("starting", {"jobs": "a\ufffd"})


def test_the_script_is_one_of_the_shell(tmp_path: Path) -> None:
    """The command of the unit, as systemd and cloud-init start it, makes a script that sh can read."""
    (command,) = [
        line.removeprefix("ExecStart=/bin/sh -c '").removesuffix("'")
        for line in report.credentials(KEY)[f"systemd.extra-unit.{report.UNIT}.service"].splitlines()
        if line.startswith("ExecStart=")
    ]
    assert not set(command) & set("'\"\\$%")
    seed = report.seed_files(KEY, "x")["user-data"]
    document = json.loads(seed.removeprefix("#cloud-config\n"))
    assert command in document["bootcmd"][0][2]
    script = base64.b64decode(command.split()[1])
    (tmp_path / "script").write_bytes(script)
    subprocess.run(["sh", "-n", tmp_path / "script"], check=True)
    assert f"echo '{KEY}'".encode() in script
