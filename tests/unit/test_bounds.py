"""Commands on a tree don't follow its links out of it."""

import subprocess
from pathlib import Path

import pytest

from image_factory.disks import bounds
from image_factory.disks.making import Inside


def run_all(commands: list[Inside]) -> list[subprocess.CompletedProcess[str]]:
    return [subprocess.run(each.words, capture_output=True, text=True, check=False) for each in commands]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree with 'blanks'"
    for name in ("etc", "usr/bin", "dev"):
        (tree / name).mkdir(parents=True)
    (tree / "usr/sbin").symlink_to("bin")
    (tree / "bin").symlink_to("usr/bin")
    return tree


def test_paths_in_it(tree: Path) -> None:
    """Links of the kind that each system has, and what is not there yet."""
    commands = [Inside(("touch", str(tree / name))) for name in ("etc/fstab", "usr/sbin/probe", "bin/x", "dev/null")]
    found = bounds.guarded(tree, commands)
    assert found[1:] == commands
    assert [done.returncode for done in run_all(found)] == [0] * 5


@pytest.mark.parametrize("link", ["dev", "etc/fstab", "usr/lib/deeper"])
@pytest.mark.parametrize("up", [True, False])
def test_link_that_leads_out(tree: Path, tmp_path: Path, link: str, up: bool) -> None:
    (tree / "usr/lib").mkdir()
    path = tree / link
    path.rmdir() if path.is_dir() else None
    path.symlink_to("../" * 9 + str(tmp_path)[1:] if up else tmp_path)
    found = bounds.guarded(tree, [Inside(("cp", "/etc/hostname", f"{path}/x"))])
    done = run_all(found)[0]
    assert done.returncode == 1
    assert done.stderr == f"a symbolic link of the tree leads out of it, to {tmp_path}/x\n"


def test_link_that_a_program_of_the_tree_makes(tree: Path) -> None:
    """It is looked for again after each of them; a command that has no path of the tree needs no look."""
    chroot, copy = Inside(("chroot", str(tree), "x")), Inside(("cp", "/a", str(tree / "b")))
    found = bounds.guarded(tree, [copy, chroot, copy, chroot, Inside(("true",))])
    assert [each.words[0] for each in found] == ["sh", "cp", "chroot", "sh", "cp", "chroot", "true"]
