"""The build record: what it says of builds that end well, fail, are interrupted or don't start."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from image_factory import __version__, cli, pipeline
from image_factory.base import command, events, interrupts, log
from image_factory.base.cleanup import released
from image_factory.base.errors import BuildError, CommandError, ConfigurationError, Interrupted
from image_factory.configuration.files import Configuration
from image_factory.told import record

from ..conftest import run
from .test_cli import REPOSITORY, Place, fill, place

__all__ = ["place"]

SCHEMA: dict[str, Any] = json.loads((REPOSITORY / "data/build-record.schema.json").read_text())
REAL_BUILD_SECONDS = 3000


def checked(text: str) -> dict[str, Any]:
    """Return the record in *text*, which keeps to the schema."""
    assert text.isascii()
    found: dict[str, Any] = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker()).validate(found)
    started, ended = (datetime.fromisoformat(found[key]) for key in ("started", "ended"))
    assert abs((ended - started).total_seconds() - found["seconds"]) < 10
    return found


def checked_file(path: Path) -> dict[str, Any]:
    assert not list(path.parent.glob(".image-factory-record*"))
    return checked(path.read_text())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The schema.


def objects(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each object that *schema* describes, with the path to it."""
    for name, inner in schema.get("properties", {}).items():
        yield from objects(inner, f"{path}/{name}")
    if "items" in schema:
        yield from objects(schema["items"], f"{path}/*")
    if "object" in schema.get("type", ""):
        yield path, schema


def properties(value: Any, path: str = "") -> Iterator[str]:
    """Give the path of each property in *value*."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{path}/{name}"
            yield from properties(inner, f"{path}/{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from properties(inner, f"{path}/*")


def test_the_schema_is_one_and_describes_all() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for path, schema in objects(SCHEMA):
        # The names of programs are anybody's.
        assert schema["additionalProperties"] is False or path == "/programs", path
        assert set(schema.get("required", [])) == set(schema.get("properties", [])) or path == "/programs", path
        for name, inner in [*schema.get("properties", {}).items(), *schema.get("patternProperties", {}).items()]:
            text = inner["description"]
            assert text.endswith("."), f"{path}/{name}"
            words = text.lower()
            if inner.get("$ref", "").endswith(("seconds", "bytes")):
                assert inner["$ref"].rpartition("/")[2] in words, f"{path}/{name}"


def plan_of(directory: Path, text: str) -> Any:
    fill(directory)
    (directory / "own.conf").write_text(f"[x]\nlinux = linux\ninitrd = initrd\n{text}\n[up]\n{UPLOAD}")
    return pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(directory / "own.conf")}), "x", {})


UPLOAD = "upload_type = rsync\nupload_target = /srv\nupload_args = --password-file=s3cret\n"


def test_each_property_is_in_some_record(tmp_path: Path) -> None:
    """What happens in a build, as it is told."""
    image = tmp_path / "x.qcow2"
    image.write_bytes(b"image")
    kept = record.Record("x")
    with kept.observing():
        plan = plan_of(tmp_path, "upload_destinations = up\nappend = password=s3cret\ncores = 3\nsizee = 1")
        kept.plan_made(plan)
        log.logger.warning("\x1b[31mred\x1b[0m %s", "tape")
        log.logger.error("no warning")
        events.tell(events.Sealed("logs", 3, 4096, 0))
        events.tell(events.TaskEnded("nginx", "playbook", "0" * 64, 1.23456, "allowed", "failed with status 1"))
        with pytest.raises(CommandError) as caught, log.step("Installing"):
            origin = "https://me:s3cret@example.com:8443/linux?token=s3cret"
            events.tell(events.InputUsed("linux", origin, tmp_path, "linux-sha256"))
            events.tell(events.VirtTypeChosen("kvm"))
            events.tell(events.PhaseStarted("partition"))
            time.sleep(0.02)
            events.tell(events.PhaseStarted("packages"))
            raise CommandError(["false", "--password=my secret", "\x1b"], -9, ["last"])
        events.tell(events.Audited("x.qcow2", ("logs",), (("logs", "/var/log/x is a log of the build"),)))
        check = events.BootCheck("units", "failed", "a.service failed")
        events.tell(events.BootTested("x.qcow2", "bios", 61.0004, (check,)))
        events.tell(events.ChangesSought("x-2024-02-28", ("linux",), ("Nobody knows",)))
        events.tell(events.Published(image, "qcow2", 1 << 30, True, "0" * 64))
        companions = (("x.qcow2.manifest.json", "1" * 64),)
        events.tell(events.Published(image, "qcow2", 1 << 30, True, "0" * 64, companions))
        package = {"name": "bash", "architecture": "amd64"}
        sizes = {"before": 1, "after": 2}
        changes = {"added": [{**package, "version": "1"}], "removed": [{**package, "version": "0"}]}
        events.tell(
            events.Compared(
                {
                    "previous": "x-2024-02-28",
                    "packages": {**changes, "changed": [{**package, "before": "1", "after": "2"}]},
                    "directories": sizes,
                    "artifacts": [{"format": "qcow2", **sizes}],
                }
            )
        )
    events.tell(events.StepStarted("too late"))
    log.logger.warning("too late")
    kept.fail(caught.value, caught.value.message, caught.value.hint, 1)
    text = kept.text()
    found = checked(text)

    described = {f"{path}/{name}" for path, schema in objects(SCHEMA) for name in schema.get("properties", {})}
    assert described == {path for path in properties(found) if not re.match("/(settings|programs)/", path)}
    assert "s3cret" not in text
    unused = "[x] sizee: nothing uses this key. Remove it, or name it in a value: ${sizee}."
    assert found["warnings"] == [unused, "red tape"]
    origin = "https://example.com:8443/linux"
    assert found["inputs"][-1] == {"key": "linux", "origin": origin, "sha256": None, "verified_by": "linux-sha256"}
    (boot,) = found["test_boots"]
    assert (boot["seconds"], boot["checks"][0]["message"]) == (61.0, "a.service failed")
    (step,) = found["steps"]
    assert (step["name"], step["outcome"]) == ("Installing", "failed")
    partition, packages = step["phases"]
    assert (partition["name"], partition["outcome"]) == ("partition", "done")
    assert (packages["name"], packages["outcome"]) == ("packages", "failed")
    assert 0.02 <= partition["seconds"] <= step["seconds"]
    assert partition["started"] < packages["started"]
    assert found["artifacts"][0]["size"] == 5
    findings = [{"check": "logs", "message": "/var/log/x is a log of the build"}]
    assert found["audit"] == {"artifact": "x.qcow2", "checks": ["logs"], "findings": findings, "unsearched": []}
    assert found["artifacts"][0]["upload"] is True
    assert found["settings"]["cores"] == 3
    assert found["settings"]["format"] == ["raw"]
    assert "append" not in found["settings"]
    assert found["failure"] == {
        "kind": "build",
        "message": "false was killed by SIGKILL: last",
        "hint": "The command was: false '--password=***' '?'",
        "exit_status": 1,
        "step": "Installing",
        "command": {"argv": ["false", "--password=***", "\x1b"], "status": -9},
    }


def test_the_digest_of_settings_is_of_all(tmp_path: Path) -> None:
    digests = []
    for text in ("", "", "append = a", "ram = 2G"):
        kept = record.Record("x")
        kept.plan_made(plan_of(tmp_path, text))
        digests.append(checked(kept.text())["settings_sha256"])
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_phases_without_a_step_and_steps_in_steps() -> None:
    kept = record.Record("x")
    with kept.observing(), log.step("outer"):
        with pytest.raises(BuildError), log.step("inner"):
            raise OSError(28, "No space left on device")
        events.tell(events.PhaseStarted("of the outer"))
    with kept.observing():
        events.tell(events.PhaseStarted("of none"))
    steps = checked(kept.text())["steps"]
    assert [(step["name"], step["outcome"], len(step["phases"])) for step in steps] == [
        ("outer", "done", 1),
        ("inner", "failed", 0),
    ]


def test_the_step_that_failed() -> None:
    """Not one of the clean-up, nor one that could be done without."""
    kept = record.Record("x")
    with pytest.raises(BuildError) as caught, kept.observing():
        with contextlib.suppress(BuildError), log.step("optional"):
            raise BuildError("not there")
        with contextlib.ExitStack() as stack:
            stack.enter_context(released(partial(clean_up, "failing", fail=True)))
            stack.enter_context(released(partial(clean_up, "good", fail=False)))
            with log.step("outer"), log.step("inner"):
                raise OSError(28, "No space left on device")
    kept.fail(caught.value, *cli._explain(caught.value))
    found = checked(kept.text())
    assert found["failure"]["step"] == "inner"
    assert [step["name"] for step in found["steps"] if step["outcome"] == "failed"] == [
        "optional", "outer", "inner", "failing",
    ]  # fmt: skip


def clean_up(name: str, *, fail: bool) -> None:
    with log.step(name):
        if fail:
            raise BuildError(name)


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (BuildError("x"), "build", 1),
        (OSError(28, "No space left on device"), "build", 1),
        (ConfigurationError("x", hint="y"), "configuration", 2),
        (Interrupted(signal.SIGTERM), "interrupted", 143),
        (KeyboardInterrupt(), "interrupted", 130),
        (ZeroDivisionError("x"), "internal", 1),
    ],
)
def test_kinds_of_failure(error: BaseException, kind: str, status: int) -> None:
    kept = record.Record("x")
    kept.fail(error, *cli._explain(error))
    failure = checked(kept.text())["failure"]
    assert (failure["kind"], failure["exit_status"], failure["step"], failure["command"]) == (kind, status, None, None)


# Digests and versions.


def test_a_file_is_digested_as_it_was_used(tmp_path: Path) -> None:
    """What takes its place later is not what the installer got."""
    kernel, newer = tmp_path / "linux", tmp_path / "newer"
    kernel.write_bytes(b"old" * 1000000)
    newer.write_bytes(b"new")
    expected = sha256(kernel)
    kept = record.Record("x")
    kept.notice(events.InputUsed("linux", str(kernel), kernel))
    newer.replace(kernel)
    assert checked(kept.text())["inputs"][0]["sha256"] == expected


def test_what_can_not_be_digested(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    kept = record.Record("x")
    for path in (tmp_path / "absent", tmp_path / "pipe", tmp_path, None):
        kept.notice(events.InputUsed("linux", "x", path))
    assert [found["sha256"] for found in checked(kept.text())["inputs"]] == [None] * 4


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def test_programs_that_tell_no_version(tmp_path: Path, fakes: Path) -> None:
    """One that hangs, fails, prints much or is missing holds nothing up, and the user's own are not run."""
    scripts = {
        "cpio": "sleep 600",
        "rsync": "exit 3",
        "virsh": "echo none",
        "sudo": "yes | head -c 1000000",
        "guestfish": "echo guestfish 1.2.3rc1, and; yes | head -c 1000000",
        "my-command": f"touch {tmp_path}/was-run",
    }
    for name, script in scripts.items():
        (fakes / name).write_text(f"#!/bin/sh\n{script}\n")
        (fakes / name).chmod(0o755)
    kept = record.Record("x")
    start = time.monotonic()
    kept.plan_checked(plan_of(tmp_path, "mount-via = guestfs"), [*scripts, "zerofree"])
    found = checked(kept.text())["programs"]
    assert time.monotonic() - start < 300
    libvirtd, zerofree = found.pop("libvirtd"), found.pop("zerofree")
    assert re.fullmatch(r"[0-9]+\.[0-9.]+", libvirtd)
    assert zerofree == run("dpkg-query", "-W", "-f", "${Version}", "zerofree").stdout
    nothing = dict.fromkeys(scripts)
    assert found == {**nothing, "guestfish": "1.2.3rc1", "python": platform.python_version()}
    assert not (tmp_path / "was-run").exists()
    assert run("pgrep", "-f", str(fakes), check=False).stdout == ""


def test_asking_for_versions_is_unlogged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(tmp_path, "mount-via = loop")
    kept = record.Record("x")
    with caplog.at_level(logging.DEBUG):
        kept.plan_checked(plan, [*command.PACKAGES])
        found = checked(kept.text())["programs"]
    assert caplog.records == []
    assert [name for name, version in found.items() if version is None] == []
    assert found[record.HELPER] == __version__
    assert set(found) == {"python", "libvirtd", record.HELPER, *command.PACKAGES}


# Builds that don't start.


@pytest.mark.parametrize("mode", ["--list", "--check", "--dry-run", "--cleanup"])
def test_refused_without_a_build(place: Place, mode: str) -> None:
    assert place.refused("x", mode, "--json", "r.json")[0] == f"--json is the record of a build, {mode} makes none."


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("", "is not a file"),
        (".", "is not a file"),
        ("/dev/null", "is not a file"),
        ("absent/r.json", "can't be written: No such file or directory"),
        ("linux/r.json", "can't be written: Not a directory"),
        ("/proc/r.json", "can't be written: "),
        ("r" * 300, "can't be written: File name too long"),
    ],
)
def test_file_that_can_not_be_written(place: Place, file: str, reason: str) -> None:
    error, _ = place.refused("x", "--json", file)
    assert error.startswith(f"--json: {file} {reason}")


def test_directory_that_is_not_the_users(place: Place) -> None:
    error, _ = place.refused("x", "--json", "r.json", before=("setpriv", "--reuid", "65534", "--clear-groups"))
    assert error == "--json: r.json can't be written: Permission denied."


# What is in the way, the image, and what the failure says.
UNFIT: dict[str, tuple[str, str, str]] = {
    "file that can't be read": ("[x]\nlinux\n", "x", "line 2"),
    "no such image": ("[x]\nlinux = linux\n", "\u00fc\n\udce9", "is no image name."),
    "bad value": ("[x]\nlinux = linux\ninitrd = initrd\nram = s3cret\n", "x", "[x] ram"),
    "no such file": ("[x]\nlinux = absent\ninitrd = initrd\n", "x", "[x] linux: absent is not there."),
    "no such command": (
        "[x]\nlinux = linux\ninitrd = initrd\npost-build-command = no-such\ncoress = 1\n", "x", "Missing programs"
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", UNFIT)
def test_build_that_can_not_start(place: Place, row: str) -> None:
    text, image, said = UNFIT[row]
    (place.path / "own.conf").write_text(text)
    (place.path / "r.json").write_text("older")
    done = place.run(image, "--json", "r.json")
    assert done.returncode == 2
    found = checked_file(place.path / "r.json")
    assert found["image"] == image.replace("\udce9", "\\xe9")
    assert said in found["failure"]["message"]
    assert f"image-factory: error: {' '.join(found['failure']['message'].splitlines())}" in done.stderr
    assert (found["failure"]["kind"], found["failure"]["exit_status"]) == ("configuration", 2)
    own = place.path / "own.conf"
    expected = {"key": "configuration", "origin": str(own), "sha256": sha256(own), "verified_by": None}
    assert found["inputs"] == [expected]
    assert (found["settings"] is None) == (row not in ("no such file", "no such command"))
    assert (found["steps"], found["artifacts"], list(found["programs"])) == ([], [], ["python"])
    assert len(found["warnings"]) == (row == "no such command")


def test_record_on_stdout(place: Place) -> None:
    done = place.run("no-file", "--json", "-")
    assert done.returncode == 2
    assert checked(done.stdout)["failure"]["message"] == "[no-file] linux: absent is not there."


def test_record_through_a_link_and_with_the_umask(place: Place) -> None:
    (place.path / "there").mkdir()
    (place.path / "r.json").symlink_to("there/r.json")
    place.run("no-file", "--json", "r.json", before=("sh", "-c", 'umask 027; exec "$@"', "sh"))
    assert (place.path / "r.json").is_symlink()
    assert (place.path / "there/r.json").stat().st_mode & 0o777 == 0o640
    checked_file(place.path / "there/r.json")


def test_internal_error(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*arguments: object, resume: bool) -> None:
        raise ZeroDivisionError("no\x1b[2Jthing")

    monkeypatch.chdir(place.path)
    monkeypatch.setenv("IMAGE_FACTORY_CONFIG", "own.conf")
    monkeypatch.setattr(pipeline, "make_plan", fail)
    monkeypatch.setattr(log, "set_up", lambda level: None)
    assert cli.main(["x", "--json", "r.json"]) == 1
    failure = checked_file(place.path / "r.json")["failure"]
    assert failure["kind"] == "internal"
    assert failure["message"] == "Internal error: ZeroDivisionError: nothing"
    assert "Internal error: ZeroDivisionError: nothing\n" in capsys.readouterr().err


def test_failing_build_whose_record_fails_too(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The build's failure is the one that is told at the end."""

    def fail(*arguments: object, resume: bool) -> None:
        (place.path / "there").rmdir()
        raise BuildError("The step failed.")

    monkeypatch.setenv("IMAGE_FACTORY_CONFIG", str(place.path / "own.conf"))
    monkeypatch.setattr(pipeline, "make_plan", fail)
    monkeypatch.setattr(log, "set_up", lambda level: None)
    (place.path / "there").mkdir()
    assert cli.main(["x", "--json", str(place.path / "there/r.json")]) == 1
    assert capsys.readouterr().err == "image-factory: error: The step failed.\n"
    assert [entry.getMessage() for entry in caplog.records if entry.levelno == logging.ERROR] == [
        f"The build record {place.path}/there/r.json can't be written: No such file or directory."
    ]


def test_name_that_is_no_text(place: Place) -> None:
    odd = os.fsdecode(b"\xe9 \x1b[31m")
    (place.path / "own.conf").rename(place.path / odd)
    place.environment["IMAGE_FACTORY_CONFIG"] = odd
    assert place.run("no-file", "--json", f"{odd}.json").returncode == 2
    found = checked_file(place.path / f"{odd}.json")
    digest = sha256(place.path / odd)
    expected = {"key": "configuration", "origin": "\\xe9 \x1b[31m", "sha256": digest, "verified_by": None}
    assert found["inputs"] == [expected]


@contextmanager
def full_disk(directory: Path) -> Iterator[None]:
    """Have a filesystem at *directory* with room for names only."""
    run("mount", "-t", "tmpfs", "-o", "size=4k,mode=1777", "tmpfs", directory)
    try:
        (directory / "filler").write_bytes(b"\0" * 4096)
        yield
    finally:
        run("umount", directory)


def test_signal_does_not_cut_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes while it is written is too late, and leaves it whole."""
    monkeypatch.setattr(log, "set_up", lambda level: None)
    monkeypatch.setenv("IMAGE_FACTORY_CONFIG", str(tmp_path / "absent"))
    real_write = record.write

    def write(path: Path, text: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real_write(path, text)

    monkeypatch.setattr(record, "write", write)
    assert cli.main(["x", "--json", str(tmp_path / "r.json")]) == 2
    assert checked_file(tmp_path / "r.json")["failure"]["kind"] == "configuration"
    interrupts._state.pending = None


def test_time_without_end(tmp_path: Path) -> None:
    """JSON has no infinity; Python's own reader would take it."""
    kept = record.Record("x")
    kept.plan_made(plan_of(tmp_path, "install-timeout = none\nstall-timeout = none\nmax-parallel = none"))
    text = kept.text()
    assert "Infinity" not in text
    settings = checked(text)["settings"]
    assert [settings[key] for key in ("install-timeout", "stall-timeout", "max-parallel")] == ["none"] * 3


def test_link_of_another_user(tmp_path: Path) -> None:
    """What it leads to is neither removed nor replaced."""
    (tmp_path / "target").write_text("theirs")
    link = tmp_path / "r.json"
    link.symlink_to("target")
    os.lchown(link, 65534, -1)
    with pytest.raises(ConfigurationError, match=r"r\.json is another user's link\.$"):
        record.prepared(str(link))
    assert (tmp_path / "target").read_text() == "theirs"
