"""Completion of the command line in bash, with the function that is installed."""

import os
from pathlib import Path

import pytest

from image_factory.outputs import OUTPUTS

from ..conftest import REPOSITORY, run


@pytest.mark.parametrize(
    ("line", "words"),
    {
        "image-factory --dry": ["--dry-run"],
        "image-factory Rocky-10-": ["Rocky-10-server", "Rocky-10-minimal", "Rocky-10-cloud-image", "Rocky-10-rackn"],
        "image-factory --key": ["--keys"],
        "image-factory --check Rocky-10-s": ["Rocky-10-server"],
        "image-factory --format ": [*OUTPUTS],
        "image-factory -f raw,q": ["raw,qcow2"],
        "image-factory -t azure,aw": ["azure,aws"],
        "image-factory --format=q": ["qcow2"],
        "image-factory --until c": ["clean", "convert", "check"],
        "image-factory --output-dir /usr/sb": ["/usr/sbin/"],
        "image-factory --run Rocky-10-s": ["Rocky-10-server"],
        "image-factory --run /usr/sb": ["/usr/sbin/"],
        "image-factory --no-such": [],
    }.items(),
)
def test_completion(line: str, words: list[str], prefix: Path, tmp_path: Path) -> None:
    script = """
        . "$1"
        COMP_LINE=$2 COMP_POINT=${#2} COMP_TYPE=9
        _python_argcomplete image-factory
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    completions = prefix / "share/bash-completion/completions/image-factory"
    environment = ("env", "-i", f"PATH={prefix}/bin:/usr/bin:/bin", f"HOME={tmp_path}")
    found = run(*environment, "bash", "-c", script, "bash", completions, line).stdout.split()
    assert found == words


@pytest.mark.parametrize("broken", ["argcomplete", "configuration"])
def test_completion_builds_nothing(broken: str, tmp_path: Path) -> None:
    """The shell gives the program no arguments, and IMAGE may be in its environment."""
    (tmp_path / "x").mkdir()
    environment = {**os.environ, "_ARGCOMPLETE": "1", "IMAGE": "Debian-13-server", "COMP_LINE": "image-factory D"}
    environment |= {"COMP_POINT": "15", "COMP_TYPE": "9", "IFS": "\v"}
    if broken == "argcomplete":
        (tmp_path / "argcomplete.py").write_text("raise ImportError\n")
        environment["PYTHONPATH"] = str(tmp_path)
    else:
        environment["IMAGE_FACTORY_CONFIG"] = "/nonexistent"
    program = ("sh", "-c", '"$1" 8>&1 9>&2', "sh", REPOSITORY / "image-factory")
    done = run(*program, check=False, env=environment, cwd=tmp_path / "x")
    assert done.stdout == ""
    assert (done.returncode != 0) == (broken == "argcomplete")
    assert list((tmp_path / "x").iterdir()) == []
