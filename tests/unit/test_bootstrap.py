"""Trees that are bootstrapped: where they are made."""

from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.base.errors import ConfigurationError
from image_factory.configuration import files, unused
from image_factory.model import Build, Plan
from image_factory.sources import bootstrap

from ..conftest import shown

ANSWERS = "suite: trixie\nsources: [deb http://mirror.example.com/debian trixie main]\n"


def make_plan(directory: Path, text: str = "") -> Plan:
    (directory / "own.yaml").write_text(ANSWERS)
    path = directory / "own.conf"
    path.write_text(f"[x]\nsource = bootstrap\nbootstrap = {directory}/own.yaml\nimage-size = 3G\n{text}\n")
    configuration = files.Configuration({files.FILE_VARIABLE: str(path)})
    return pipeline.make_plan(configuration, "x", {"output-dir": str(directory)})


def commands_of(plan: Plan) -> list[str]:
    """Return what a dry run shows of the tree, a line each."""
    build = Build(plan, plan.work_path, "vm")
    return [" ".join(words) for commands in shown(build, bootstrap.steps(build)).values() for words in commands]


@pytest.mark.parametrize(
    ("wish", "free", "found"),
    [
        ("auto", 4096, True),
        ("auto", 4095, False),
        ("yes", 4096, True),
        ("yes", 4095, "4.0 GiB of memory are free, and a tree in memory needs 4.0 GiB."),
        ("yes", 100, "100.0 MiB of memory are free, and a tree in memory needs 4.0 GiB."),
        ("no", 1 << 20, False),
    ],
)
def test_tree_is_in_memory_where_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str, free: int, found: bool | str
) -> None:
    memory = tmp_path / "meminfo"
    memory.write_text(f"MemTotal: 99999999 kB\nMemFree: 10 kB\nMemAvailable:   {free << 10} kB\n")
    monkeypatch.setattr(bootstrap, "_MEMORY", memory)
    plan = make_plan(tmp_path, f"work-in-memory = {wish}")
    if isinstance(found, str):
        with pytest.raises(ConfigurationError) as caught:
            bootstrap.check_here(plan)
        assert caught.value.message == found
        assert "work-in-memory = auto" in str(caught.value.hint)
        return
    bootstrap.check_here(plan)
    # A limit above what was asked for would take memory that others were promised.
    mounts = [line for line in commands_of(plan) if " mount -t tmpfs " in line and "size=" in line]
    assert [f"mode=755,size={4 << 30} tree" in line for line in mounts] == [True] * found


def test_memory_is_of_trees_only(tmp_path: Path) -> None:
    path = tmp_path / "own.conf"
    path.write_text("[x]\nlinux = /l\ninitrd = /i\nwork-in-memory = no\n")
    configuration = files.Configuration({files.FILE_VARIABLE: str(path)})
    sentences = unused.idle_keys(configuration, "x", configuration.image("x", {}), [])
    assert sentences == ["[x] work-in-memory does nothing without source = bootstrap."]
