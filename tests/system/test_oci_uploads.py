"""Uploads by the real skopeo to a real registry: with a login and TLS, refused, not trusted, lying, hanging."""

import dataclasses
import datetime
import gzip
import hashlib
import json
import os
import re
import shlex
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from image_factory.base import scratch
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.files import FILE_VARIABLE, Configuration
from image_factory.configuration.settings import Destination
from image_factory.finishing import checksum
from image_factory.model import Artifact, Build, Plan
from image_factory.outputs import oci as made
from image_factory.uploads import oci, tries

from ..conftest import run
from ..upload_scene import PASSWORD, TRIES, USER, failure, free_port, logged, make_certificate, server, short_pauses

__all__ = ["logged", "short_pauses"]

NAME = "x-2024-02-29.oci.tar"
# Of the password, by bcrypt, which alone the registry takes.
HASH = "$2b$04$1b9dWx2ZKph0WJYSC6IPUusHgGw32QWxemP1kM8I4PKB18NPfRt5e"
CONFIGURATION = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {store}}}}}
http: {{addr: "127.0.0.1:{port}", tls: {{certificate: {certificate}, key: {key}}}}}
auth: {{htpasswd: {{realm: golden, path: {passwords}}}}}
log: {{level: error}}
"""


@pytest.fixture
def image(tmp_path: Path) -> Artifact:
    """A small one, as the format makes it."""
    path = tmp_path / "output" / NAME
    path.parent.mkdir()
    run("tar", "-C", "/etc", "-cf", tmp_path / "layer.tar", "hostname", "passwd")
    data = (tmp_path / "layer.tar").read_bytes()
    made.layer_path(path).write_bytes(gzip.compress(data))
    made.digest_path(path).write_text(f"{hashlib.sha256(data).hexdigest()}  -\n")
    (tmp_path / "own.conf").write_text("[x]\nlinux = /l\ninitrd = /i\nformat = oci\n")
    settings = Configuration({FILE_VARIABLE: str(tmp_path / "own.conf")}).image("x", {})
    plan = Plan("x", settings, datetime.date(2024, 2, 29), path.parent, {})
    made.assemble(Build(plan, plan.work_path, "vm"), path)
    return checksum.add_sha256(Artifact(path, "oci", 0))


def login(path: Path, port: int, password: str = PASSWORD) -> Path:
    """Write a file of logins as podman and skopeo have them."""
    path.touch(0o600)
    word = b64encode(f"{USER}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {f"127.0.0.1:{port}": {"auth": word}}}))
    return path


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Give the port of a registry, and a directory with the CA of its certificate."""
    directory = tmp_path_factory.mktemp("registry")
    certificate, key, _ = make_certificate(directory)
    passwords = directory / "passwords"
    passwords.write_text(f"{USER}:{HASH}\n")
    port = free_port()
    text = CONFIGURATION.format(
        store=directory / "store", port=port, certificate=certificate, key=key, passwords=passwords
    )
    (directory / "registry.yml").write_text(text)
    trusted = directory / "trusted"
    trusted.mkdir()
    (trusted / "ca.crt").write_bytes(certificate.read_bytes())
    with server(port, "docker-registry", "serve", directory / "registry.yml"):
        yield port, trusted


@pytest.fixture
def up(registry: tuple[int, Path], tmp_path: Path) -> Destination:
    port, trusted = registry
    target = f"127.0.0.1:{port}/golden/{tmp_path.name.replace('_', '-').lower()}"
    found = Destination("up", "oci", target, (), (), credentials=login(tmp_path / "login", port), tls=trusted)
    oci.check(found, NAME)
    return found


@pytest.mark.parametrize("tag", ["", ":13"])
def test_upload(up: Destination, image: Artifact, logged: pytest.LogCaptureFixture, tag: str) -> None:
    """What runs is what is announced; the tag is the build's name unless the target has one."""
    destination = dataclasses.replace(up, target=up.target + tag)
    oci.upload(destination, image)
    ran = [message.removeprefix("Running: ") for message in logged.messages if message.startswith("Running: ")]
    ran = [
        re.sub(r"/var/tmp/image-factory-scratch\.\w+", "DIRECTORY", text) for text in ran if text.startswith("skopeo")
    ]
    assert ran == [shlex.join(argv) for argv in oci.commands(destination, image)]
    place = f"docker://{up.target}{tag or ':x-2024-02-29'}"
    options = [f"--authfile={up.credentials}", f"--cert-dir={up.tls}"]
    told = json.loads(run("skopeo", "inspect", *options, place).stdout)
    assert f"{NAME} is verified at up: {told['Digest']}" in logged.messages
    assert PASSWORD not in "".join(logged.messages)
    # Once more, as a build of the same name would.
    oci.upload(destination, image)


def test_what_another_try_cannot_cure(up: Destination, image: Artifact, tmp_path: Path) -> None:
    port = int(up.target.partition("/")[0].rpartition(":")[2])
    wrong = dataclasses.replace(up, credentials=login(tmp_path / "wrong", port, "no"))
    error = failure(wrong, image)
    assert "unauthorized" in error.message and "tries" not in error.message
    assert str(error.hint).startswith("See upload-credentials. To upload it by hand, in ")
    (tmp_path / "empty").mkdir()
    for tls in (None, tmp_path / "empty"):
        error = failure(dataclasses.replace(up, tls=tls), image)
        assert "x509: " in error.message and "tries" not in error.message
        assert "with upload-tls" in str(error.hint)


def test_nobody_answers(up: Destination, image: Artifact) -> None:
    error = failure(dataclasses.replace(up, target=f"127.0.0.1:{free_port()}/golden/x"), image)
    assert error.message.endswith(f"connection refused ({TRIES} tries)")


def fake(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (directory / "bin").mkdir()
    (directory / "bin/skopeo").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "bin/skopeo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}/bin:{os.environ['PATH']}")


def test_registry_with_another_image(
    up: Destination, image: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, monkeypatch, '[ "$1" = copy ] || echo sha256:0000')
    assert failure(up, image).message == f"the registry has sha256:0000 there ({TRIES} tries)"
    oci.upload(dataclasses.replace(up, verify="none"), image)


def test_registry_that_hangs(up: Destination, image: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(tries, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(tries, "PAUSE_SECONDS", (0.1,))
    assert failure(up, image).message == "skopeo did not end within 0 s (2 tries)"


def test_probe(up: Destination, image: Artifact, tmp_path: Path) -> None:
    """A registry need not have the image yet."""
    assert oci.probe(up, tmp_path)
    oci.upload(up, image)
    assert oci.probe(up, tmp_path)
    with pytest.raises(BuildError, match="unauthorized"):
        oci.probe(dataclasses.replace(up, credentials=None), tmp_path)


TAGLESS = "It is HOST/NAME or HOST/NAME:TAG, such as registry.example.com/golden/debian, in small letters."
BAD = [
    ({"target": "registry.example.com"}, NAME, "'registry.example.com' is no place of a registry."),
    ({"target": "registry.example.com/Golden"}, NAME, "'registry.example.com/Golden' is no place of a registry."),
    ({"target": "docker://a.example.com/b"}, NAME, "'docker://a.example.com/b' is no place of a registry."),
    ({"target": "a.example.com/b:"}, NAME, "'a.example.com/b:' is no place of a registry."),
    ({}, "x-2024-02-29.qcow2", "upload-type = oci takes images of the format oci, and x-2024-02-29.qcow2 is none."),
    ({}, "x~1-2024-02-29.oci.tar", "upload-target: x~1-2024-02-29 is no tag of a registry."),
    ({"verify": "etag"}, NAME, "upload-verify: oci has only none, and the registry's digest without it."),
    ({"tls": "sha256//AAAA"}, NAME, "upload-tls: for oci it is a directory with .crt files, or none."),
    ({"tls": Path("/etc/passwd")}, NAME, "upload-tls: for oci it is a directory with .crt files, or none."),
    ({"tls": Path("/none")}, NAME, "upload-tls: /none is not there."),
]


@pytest.mark.parametrize(("changes", "name", "message"), BAD)
def test_bad_input(changes: dict[str, Any], name: str, message: str) -> None:
    destination = Destination("up", "oci", "registry.example.com/golden/debian", (), ())
    oci.check(destination, NAME)
    with pytest.raises(ConfigurationError) as caught:
        oci.check(dataclasses.replace(destination, **changes), name)
    assert caught.value.message.startswith("[up] ") and caught.value.message.endswith(message)


def test_login_that_others_may_read(tmp_path: Path) -> None:
    path = login(tmp_path / "login", 1)
    path.chmod(0o644)
    destination = Destination("up", "oci", "registry.example.com/golden/debian", (), (), credentials=path)
    with pytest.raises(ConfigurationError, match="others may read"):
        oci.check(destination, NAME)


def test_nothing_is_left(up: Destination, image: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """skopeo unpacks the image, and leaves that behind when it is killed."""
    monkeypatch.setattr(scratch, "LARGE", tmp_path / "large")
    scratch.LARGE.mkdir()
    fake(tmp_path, monkeypatch, 'echo "$1" | grep -q ^--tmpdir= && touch "${1#--tmpdir=}/left" && kill -9 $$')
    error = failure(up, image)
    assert error.message == f"skopeo was killed by SIGKILL ({TRIES} tries)"
    assert [*scratch.LARGE.iterdir()] == []
