"""What makes a playbook another one: all that Ansible finds beside it."""

import os
from pathlib import Path

import pytest

from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.model import Build, Plan
from image_factory.pipeline import make_plan
from image_factory.tasks import digest_of, digest_with_secrets, layers, playbooks

FILES = {
    "site.yml": "- hosts: all\n  roles: [web]\n",
    "other.yml": "- hosts: all\n",
    "roles/web/tasks/main.yml": "[]\n",
    "roles/web/files/script": "one\n",
    "group_vars/all": "x: 1\n",
    "filter_plugins/own.py": "",
    "beside.txt": "",
    "args/vars.json": "{}",
    "notes/text": "",
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def digest(directory: Path, release: str = "1") -> str:
    """Return what a resumed build, and the record, know the task by."""
    plan = plan_of(directory, release)
    return digest_of(plan.tasks[0]) + digest_with_secrets(plan.tasks)


def plan_of(directory: Path, release: str = "1") -> Plan:
    conf = directory / "image-factory.conf"
    conf.write_text(
        f"[x]\nlinux = /l\ninitrd = /i\nrelease = {release}\ntasks = site\n"
        f"[site]\ntask-file = {directory}/site.yml\ntask-args = -e @args/vars.json\n"
    )
    return make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(conf)}), "x", {"output-dir": str(directory)})


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("beside.txt", "notes/text")])
def test_what_it_finds_makes_it_another_one(directory: Path, name: str) -> None:
    before = digest(directory)
    assert digest(directory) == before
    (directory / name).write_text(FILES[name] + "# more\n")
    assert digest(directory) != before


def test_what_else_makes_it_another_one(directory: Path) -> None:
    """A mode, a new file, one that is gone, what is behind a link, and the variables that it gets."""
    outside = directory / "notes/role/tasks"
    outside.mkdir(parents=True)
    (directory / "roles/linked").symlink_to("../notes/role")
    found = [digest(directory), digest(directory, "2")]
    (directory / "roles/web/files/script").chmod(0o755)
    found.append(digest(directory))
    (directory / "roles/web/files/new").touch()
    found.append(digest(directory))
    (directory / "group_vars/all").unlink()
    found.append(digest(directory))
    (outside / "main.yml").touch()
    found.append(digest(directory))
    assert len({*found}) == 6


def test_what_changes_while_it_runs(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was done is no layer of what there is now, nor of what there was."""
    found = layers.Layers(Build(plan_of(directory), directory, "none"))
    assert found.is_sure(1)
    (directory / "roles/web/tasks/main.yml").write_text("[] # more\n")
    assert found.is_sure(0) and not found.is_sure(1)
    assert "Tasks were changed while the build carried them out" in caplog.text


def test_what_is_nothing_of_it(directory: Path) -> None:
    """Neither what lies beside it, nor what Python and git leave; a loop of links and a pipe are no harm."""
    (directory / "roles/loop").symlink_to(".")
    os.mkfifo(directory / "files")
    before = digest(directory)
    for name in ("beside.txt", "notes/text", "filter_plugins/__pycache__/own.pyc", "roles/web/.git/index"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("more")
    assert digest(directory) == before


def test_too_many_files(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playbooks, "_MOST_FILES", 3)
    with pytest.raises(ConfigurationError, match=r"task site: .* has more than 3 files for it") as caught:
        digest(directory)
    assert caught.value.hint == "Give the playbook a directory of its own."


def test_a_large_file_is_not_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known by its size and its time."""
    monkeypatch.setattr(playbooks, "_LARGEST_READ", 1)
    path = directory / "roles/web/files/script"
    os.utime(path, ns=(0, 0))
    found = [digest(directory)]
    os.utime(path, ns=(0, 1))
    found.append(digest(directory))
    path.write_text("longer")
    os.utime(path, ns=(0, 1))
    found.append(digest(directory))
    assert len({*found}) == 3
