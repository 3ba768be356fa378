"""Uploads by the real rclone to its own servers and to a directory: broken, refused, full, damaged, and mended."""

import dataclasses
import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from image_factory.base import events
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.base.log import masked
from image_factory.configuration.settings import Destination
from image_factory.model import Artifact
from image_factory.uploads import rclone

from ..conftest import run
from ..upload_scene import (
    NAME,
    PASSWORD,
    SIZE,
    SUM,
    TRIES,
    USER,
    artifact,
    failure,
    free_port,
    logged,
    make_certificate,
    proxy,
    server,
    short_pauses,
)

__all__ = ["artifact", "logged", "short_pauses"]


@pytest.fixture(autouse=True)
def few_tries_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rclone, "LOW_LEVEL_RETRIES", 1)


class Remotes:
    """rclone's own WebDAV server, which knows no checksums, and a directory, which has all of them."""

    def __init__(self, directory: Path) -> None:
        self.served, self.here = directory / "served", directory / "here"
        self.served.mkdir()
        self.here.mkdir()
        self.port = free_port()
        self.certificate, self.key, _ = make_certificate(directory)
        self._obscured = run("rclone", "obscure", PASSWORD).stdout.strip()
        self._wrong = run("rclone", "obscure", f"{PASSWORD}x").stdout.strip()

    def configuration(self, path: Path, port: int | None, sftp_port: int | None, *, wrong: bool = False) -> Path:
        path.touch(0o600)
        path.write_text(
            f"[dav]\ntype = webdav\nurl = https://127.0.0.1:{port or self.port}/\nvendor = other\nuser = {USER}\n"
            f"pass = {self._wrong if wrong else self._obscured}\n[here]\ntype = alias\nremote = {self.here}\n"
            f"[sftp]\ntype = sftp\nhost = 127.0.0.1\nport = {sftp_port or 1}\nuser = {USER}\npass = {self._obscured}\n"
        )
        return path


@pytest.fixture(scope="module")
def serving(base: Path) -> Iterator[Remotes]:
    directory = base / "rclone"
    directory.mkdir()
    found = Remotes(directory)
    argv = ("--config", "/dev/null", "serve", "webdav", found.served, "--addr", f"127.0.0.1:{found.port}")
    login = ("--user", USER, "--pass", PASSWORD, "--cert", found.certificate, "--key", found.key)
    with server(found.port, "rclone", *argv, *login):
        yield found


@pytest.fixture
def remotes(serving: Remotes) -> Iterator[Remotes]:
    yield serving
    for directory in (serving.served, serving.here):
        for path in directory.iterdir():
            shutil.rmtree(path)


def up(remotes: Remotes, tmp_path: Path, target: str = "dav:images", **keys: Any) -> Destination:
    ports = keys.pop("port", None), keys.pop("sftp_port", None)
    configuration = remotes.configuration(tmp_path / "rclone.conf", *ports, wrong=keys.pop("wrong", False))
    values = {"credentials": configuration, "tls": remotes.certificate} | keys
    destination = dataclasses.replace(Destination("up", "rclone", target, (), ()), **values)
    rclone.check(destination, NAME)
    return destination


def tries(logged: pytest.LogCaptureFixture) -> int:
    return sum(message.startswith("Running: rclone backend features") for message in logged.messages)


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


class Progress:
    def __init__(self) -> None:
        self.fractions: list[float] = []

    def notice(self, event: events.Event) -> None:
        if isinstance(event, events.Progressed):
            self.fractions.append(event.fraction)


@pytest.mark.parametrize("target", ["dav:images/a b", "dav:", "here:images/"])
def test_upload(
    remotes: Remotes, artifact: Artifact, tmp_path: Path, target: str, logged: pytest.LogCaptureFixture
) -> None:
    """Without checksums there it is read back."""
    progress = Progress()
    with events.observed(progress):
        rclone.upload(up(remotes, tmp_path, target), artifact)
    remote, _, path = target.partition(":")
    where = (remotes.served if remote == "dav" else remotes.here) / path
    assert names(where) == [NAME, SUM]
    run("cmp", artifact.path, where / NAME)
    assert f"{NAME} is verified at up by rclone." in logged.messages
    assert any("--download" in message for message in logged.messages) == (remote == "dav")
    assert progress.fractions[-1] == 1.0
    assert not any("%" in message for message in logged.messages)
    for path in names(where) if target == "dav:" else ():
        (where / path).unlink()


def test_what_runs_is_what_is_announced(
    remotes: Remotes, artifact: Artifact, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    destination = up(remotes, tmp_path)
    rclone.upload(destination, artifact)
    ran = [message.removeprefix("Running: ") for message in logged.messages if message.startswith("Running: ")]
    announced = [argv for argv in rclone.commands(destination, artifact) if not argv[0].startswith("#")]
    assert ran == [shlex.join(argv) for argv in announced]
    assert PASSWORD not in "".join(logged.messages)


def test_object_store_gets_a_file_by_its_name(
    remotes: Remotes, artifact: Artifact, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """rclone keeps this one in its own memory, which ends with it: nothing is found there."""
    error = failure(up(remotes, tmp_path, ":memory:images"), artifact)
    assert error.message.startswith(f"{SUM}: file not in ") or error.message.startswith(f"{NAME}: file not in ")
    assert any(" copyto " in message and f":memory:images/{NAME}" in message.split() for message in logged.messages)
    assert not any(" moveto " in message for message in logged.messages)


def test_connection_that_breaks_once(
    remotes: Remotes, artifact: Artifact, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """In the middle of the image, by SFTP, which has checksums."""
    port = free_port()
    argv = ("--config", "/dev/null", "serve", "sftp", remotes.served, "--addr", f"127.0.0.1:{port}")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with (
        server(port, "rclone", *argv, "--user", USER, "--pass", PASSWORD, env=environment),
        proxy(port, None, SIZE // 2, None) as cutting,
    ):
        rclone.upload(up(remotes, tmp_path, "sftp:images", sftp_port=cutting.port), artifact)
    assert names(remotes.served) == [f"images/{NAME}", f"images/{SUM}"]
    assert tries(logged) == 2
    assert any(message.endswith("trying again in 0 s.") for message in logged.messages)
    assert not any("--download" in message for message in logged.messages)


def test_connection_that_always_breaks(
    remotes: Remotes, artifact: Artifact, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """An older file stays as it was."""
    images = remotes.served / "images"
    images.mkdir()
    (images / NAME).write_text("older\n")
    with proxy(remotes.port, SIZE // 10) as cutting:
        error = failure(up(remotes, tmp_path, port=cutting.port), artifact)
    assert error.message.endswith(f" ({TRIES} tries)")
    assert tries(logged) == TRIES
    assert names(images) == [NAME]
    assert (images / NAME).read_text() == "older\n"


def test_nobody_listens(remotes: Remotes, artifact: Artifact, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    error = failure(up(remotes, tmp_path, port=free_port()), artifact)
    assert "connection refused" in error.message
    assert tries(logged) == TRIES


def test_wrong_password(remotes: Remotes, artifact: Artifact, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    error = failure(up(remotes, tmp_path, wrong=True), artifact)
    assert "401 Unauthorized" in error.message
    assert error.hint is not None and error.hint.startswith("Mend rclone's configuration; see upload-credentials.")
    assert tries(logged) == 1


def test_certificate_that_is_not_trusted(remotes: Remotes, artifact: Artifact, tmp_path: Path) -> None:
    error = failure(up(remotes, tmp_path, tls=None), artifact)
    assert "x509: certificate signed by unknown authority" in error.message
    assert error.hint is not None and error.hint.startswith("Name the certificate's CA with upload-tls.")


def test_remote_that_is_not_configured(remotes: Remotes, artifact: Artifact, tmp_path: Path) -> None:
    error = failure(up(remotes, tmp_path, "absent:images"), artifact)
    assert error.message == "didn't find section in config file"


def test_full_disk_there(
    remotes: Remotes, artifact: Artifact, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """Nothing is left of it."""
    run("mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", remotes.here)
    try:
        error = failure(up(remotes, tmp_path, "here:images"), artifact)
        assert "remaining disk space" in error.message
        assert error.hint is not None and error.hint.startswith("Make room there.")
        assert tries(logged) == 1
        assert names(remotes.here) == []
    finally:
        run("umount", remotes.here)


DAMAGING = """#!/bin/sh
/usr/bin/rclone "$@" || exit
case "$1" in
moveto) if [ ! -e {once} ]; then {touch} {once}
    printf damaged | dd of={file} bs=1 seek=77777 conv=notrunc 2>/dev/null; touch -r {source} {file}; fi ;;
esac
"""


@pytest.mark.parametrize("once", [True, False])
def test_file_that_is_damaged_there(
    remotes: Remotes, artifact: Artifact, tmp_path: Path, once: bool, monkeypatch: pytest.MonkeyPatch,
    logged: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """With its size and its time as they should be: it is sent again."""
    program = tmp_path / "bin/rclone"
    program.parent.mkdir()
    file = remotes.here / "images" / NAME
    touch = "touch" if once else "true"
    program.write_text(DAMAGING.format(once=tmp_path / "once", touch=touch, file=file, source=artifact.path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    destination = up(remotes, tmp_path, "here:images")
    if once:
        rclone.upload(destination, artifact)
        run("cmp", artifact.path, file)
        assert tries(logged) == 2
    else:
        error = failure(destination, artifact)
        assert error.message.startswith(f"{NAME}: ") and " differ" in error.message
        assert error.message.endswith(f" ({TRIES} tries)")


def test_file_that_is_not_verified_is_told(
    remotes: Remotes, artifact: Artifact, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    rclone.upload(up(remotes, tmp_path, "here:", verify="none"), artifact)
    warnings = [record.message for record in logged.records if record.levelno == logging.WARNING]
    assert warnings == [f"{NAME} is not verified at up, as upload-verify says."]
    for path in remotes.here.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target": "/srv/images"}, "upload-target: '/srv/images' is no place of rclone's."),
        ({"target": f":webdav,pass={PASSWORD}:x"}, "upload-target: it is no place for a login."),
        ({"arguments": (f"--webdav-pass={PASSWORD}",)}, "upload-args: they are no place for a login."),
        ({"verify": "etag"}, "upload-verify: rclone has only download and none."),
        ({"tls": "none"}, "upload-tls: rclone takes only the path of a CA's file."),
        ({"tls": Path("/absent")}, "upload-tls: /absent is not there."),
        ({"credentials": Path("/etc/passwd")}, "upload-credentials: others may read /etc/passwd."),
    ],
)
def test_what_is_refused_before_a_build(keys: dict[str, Any], message: str) -> None:
    destination = dataclasses.replace(Destination("up", "rclone", "dav:", (), ()), **keys)
    with pytest.raises(ConfigurationError) as caught:
        rclone.check(destination, NAME)
    assert caught.value.message == f"[up] {message}"


def test_secrets_of_the_configuration_are_masked(
    remotes: Remotes, artifact: Artifact, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    up(remotes, tmp_path)
    assert masked(f"pass: {remotes._obscured}") == "pass: ***"


def test_files_there_are_removed_by_their_names(remotes: Remotes, tmp_path: Path) -> None:
    """No filter of the user's makes it more or less than that."""
    here, target = tmp_path / "here", "dav:removed"
    (here / "a.raw.d").mkdir(parents=True)
    for name in ("a.raw", "b c.raw", "a.raw.sha256sum", "a.raw.d/a.raw"):
        (here / name).write_text("x")
    destination = up(remotes, tmp_path, target, arguments=("--include", "*.sha256sum"))
    # By the server, which remembers what a directory had.
    run("rclone", "--config", destination.credentials, "--ca-cert", remotes.certificate, "copy", here, target)
    images = remotes.served / "removed"
    assert rclone.remove(destination, ["a.raw", "b c.raw"]) == {}
    left = rclone.remove(destination, ["gone", "a.raw.d"])
    assert [(name, failed.reason, failed.again) for name, failed in left.items()] == [
        (name, f"{target}/{name} is a directory or doesn't exist", False) for name in ("gone", "a.raw.d")
    ]
    assert names(images) == ["a.raw.d/a.raw", "a.raw.sha256sum"]
    wrong = rclone.remove(up(remotes, tmp_path, target, wrong=True), ["a.raw.sha256sum"])
    assert "401" in wrong["a.raw.sha256sum"].reason
    assert names(images) == ["a.raw.d/a.raw", "a.raw.sha256sum"]


def test_probe(remotes: Remotes, tmp_path: Path) -> None:
    assert rclone.probe(up(remotes, tmp_path), tmp_path)
    assert names(remotes.served) == []
    for keys, reason in (
        ({"wrong": True}, "401 Unauthorized"),
        ({"port": free_port()}, "connection refused"),
        ({"target": "absent:"}, "didn't find section in config file"),
    ):
        with pytest.raises(BuildError, match=reason):
            rclone.probe(up(remotes, tmp_path, **keys), tmp_path)
