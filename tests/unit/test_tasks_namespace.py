"""What a task in a tree is given: whatever links the tree has, nothing is mounted outside of it."""

import os
import subprocess
from pathlib import Path

import pytest

from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.model import Plan
from image_factory.pipeline import make_plan
from image_factory.tasks import namespace

DIRECTORIES = ("proc", "sys", "dev", "run", "tmp", "etc", "usr/sbin")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree with 'blanks'"
    for name in DIRECTORIES:
        (tree / name).mkdir(parents=True)
    return tree


def carried_out(tree: Path, *words: str, network: str = "no") -> "subprocess.CompletedProcess[str]":
    """Run the command *words* as a task of *tree*, in namespaces where this user is root."""
    users = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    argv = ["unshare", *users, "--mount", "--pid", "--net", "--fork", "--kill-child", "sh", "-c", namespace.RUN, "sh"]
    return subprocess.run([*argv, str(tree), network, *words], capture_output=True, text=True, check=False)


def test_nothing_is_left(tree: Path) -> None:
    """Not even when the tree has had no such files; the status is the command's."""
    link = tree / "etc/resolv.conf"
    link.symlink_to("/run/some/service/names")
    before = sorted(str(path) for path in tree.rglob("*"))
    seen = [str(tree / name) for name in ("dev/null", "proc/self", "usr/sbin/policy-rc.d", "run/some/service/names")]
    done = carried_out(
        tree, "sh", "-c", 'for file; do [ -e "$file" ] || exit 4; done; exit 3', "sh", *seen, network="yes"
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert sorted(str(path) for path in tree.rglob("*")) == before
    assert carried_out(tree, "kill", "-9", "$$").returncode != 125
    assert str(tree) not in Path("/proc/self/mountinfo").read_text()


def test_what_the_system_has_of_its_own_stays(tree: Path) -> None:
    (tree / "etc/resolv.conf").write_text("nameserver 192.0.2.1\n")
    (tree / "usr/sbin/policy-rc.d").write_text("own")
    (tree / "tmp/file").write_text("own")
    script = f"echo x >{str(tree / 'etc/resolv.conf')!r}; rm -f {str(tree / 'tmp')!r}/*"
    assert carried_out(tree, "sh", "-c", script, network="yes").returncode == 0
    assert (tree / "etc/resolv.conf").read_text() == "nameserver 192.0.2.1\n"
    assert (tree / "usr/sbin/policy-rc.d").read_text() == (tree / "tmp/file").read_text() == "own"


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("name", [*DIRECTORIES, "usr/sbin/policy-rc.d", "etc/resolv.conf"])
def test_link_that_leads_out(tree: Path, tmp_path: Path, name: str, up: bool) -> None:
    """None is followed: a link of names that begins with a slash is one in the tree."""
    path, outside = tree / name, tmp_path / "outside"
    outside.mkdir()
    if path.is_dir():
        path.rmdir()
    path.symlink_to("../" * 20 + str(outside)[1:] if up else outside)
    done = carried_out(tree, "true", network="yes")
    assert done.returncode == 125, done.stderr
    assert str(outside) in done.stderr
    assert [*outside.iterdir()] == []


def make_x(directory: Path, text: str) -> Plan:
    """Return the plan of an image with a task."""
    (directory / "x.sh").write_text("#!/bin/sh\n")
    configuration = directory / "image-factory.conf"
    configuration.write_text(f"[x]\ntasks = {directory}/x.sh\n{text}\n")
    return make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}), "x", {})


def test_where_tasks_of_a_tree_run(tmp_path: Path) -> None:
    """In the tree, unless the guest is wanted; only then do they make another tree, and without a network one more."""
    made = {}
    for keys in ("", "tasks-network = no", "tasks-via = guest"):
        plan = make_x(tmp_path, f"source = bootstrap\nbootstrap = /b.yaml\nimage-size = 1G\n{keys}")
        assert namespace.tasks(plan) == (() if "guest" in keys else plan.tasks)
        made[keys] = namespace.identity(plan)
    assert made.pop("tasks-via = guest") == {}
    assert made[""] != made["tasks-network = no"]


@pytest.mark.parametrize(
    ("keys", "in_tree"),
    [("", False), ("layout = filesystem", True), ("tasks-via = namespace", True), ("tasks-via = guest", False)],
)
def test_where_tasks_of_elements_run(tmp_path: Path, keys: str, in_tree: bool) -> None:
    """Where their disk may be one already, in the booted system, unless the tree is wanted."""
    plan = make_x(tmp_path, f"source = elements\nelements = a\nimage-size = 1G\n{keys}")
    assert namespace.tasks(plan) == (plan.tasks if in_tree else ())
    namespace.check(plan)


def test_source_without_a_tree(tmp_path: Path) -> None:
    """No task is left out silently."""
    plan = make_x(tmp_path, "linux = /l\ninitrd = /i\ntasks-via = namespace")
    with pytest.raises(
        ConfigurationError, match="tasks-via = namespace: only source = bootstrap and elements have"
    ) as caught:
        namespace.check(plan)
    assert caught.value.hint == "Set tasks-via = guest."
