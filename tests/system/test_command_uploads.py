"""Uploads by a command of the user's own."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from image_factory import pipeline, publish
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.files import FILE_VARIABLE, Configuration
from image_factory.configuration.settings import Destination
from image_factory.model import Artifact
from image_factory.uploads import command

from ..upload_scene import NAME, artifact, logged, short_pauses

__all__ = ["artifact", "logged", "short_pauses"]


def up(script: str, *arguments: str) -> Destination:
    return Destination("up", "command", f"sh -c {shlex.quote(script)} put", arguments, ())


def test_command_gets_the_files(tmp_path: Path, artifact: Artifact, logged: pytest.LogCaptureFixture) -> None:
    """After the user's arguments, in the directory of the files, with nothing to read."""
    destination = up(f'echo "$1" >{tmp_path}/first; shift; cat; cp "$@" {tmp_path}', "--bucket=it's")
    command.check(destination, NAME)
    command.upload(destination, artifact)
    assert (tmp_path / "first").read_text() == "--bucket=it's\n"
    for path in (artifact.path, artifact.checksum_path):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    ran = [message.removeprefix("Running: ") for message in logged.messages if message.startswith("Running: ")]
    assert ran == [shlex.join(argv) for argv in command.commands(destination, artifact)]
    assert f"{NAME} is at up, as its command says." in logged.messages


def test_command_that_asks_for_another_try(tmp_path: Path, artifact: Artifact) -> None:
    count = tmp_path / "count"
    command.upload(up(f"echo x >>{count}; [ $(wc -l <{count}) -ge 3 ] || exit 75"), artifact)
    assert count.read_text() == "x\n" * 3
    count.unlink()
    with pytest.raises(BuildError, match=r"^sh failed with status 75: busy \(4 tries\)$"):
        command.upload(up(f"echo x >>{count}; echo busy; exit 75"), artifact)
    assert count.read_text() == "x\n" * 4


def test_command_that_fails(tmp_path: Path, artifact: Artifact) -> None:
    with pytest.raises(BuildError, match=r"^sh failed with status 7: no such bucket$") as caught:
        command.upload(up(f"echo x >>{tmp_path}/count; echo no such bucket >&2; exit 7"), artifact)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"To upload it by hand, in {artifact.path.parent}: sh -c ")
    assert (tmp_path / "count").read_text() == "x\n"


@pytest.mark.parametrize("target", ["put 'it", "''", '""'])
def test_target_that_is_no_command(tmp_path: Path, target: str) -> None:
    destination = dataclasses.replace(up(""), target=target)
    with pytest.raises(ConfigurationError, match=r"^\[up\] upload-target: .* is no command\.$"):
        command.check(destination, NAME)


def test_program_that_is_missing_is_known_before_the_build(tmp_path: Path) -> None:
    (tmp_path / "linux").touch()
    (tmp_path / "own.conf").write_text(
        f"[x]\nlinux = {tmp_path}/linux\ninitrd = {tmp_path}/linux\nupload-destinations = up\n"
        "[up]\nupload-type = command\nupload-target = put-image --to ${image}\n"
    )
    configuration = Configuration({FILE_VARIABLE: str(tmp_path / "own.conf")})
    plan = pipeline.make_plan(configuration, "x", {"output-dir": str(tmp_path)})
    assert publish.programs(plan) == ["put-image"]


def test_only_an_upload_can_tell(tmp_path: Path) -> None:
    assert not command.probe(up("exit 3"), tmp_path)
