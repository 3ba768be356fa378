"""Tasks that copy files by the shell of the system, which is this machine's here, and busybox's."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.finishing import copying
from image_factory.model import Build, Plan
from image_factory.pipeline import make_plan
from image_factory.tasks.copies import InSystem

from ..conftest import run

APPLETS = ("sh", "base64", "cat", "head", "mkdir", "mv", "readlink", "rm", "rmdir", "tar", "tr")
OWNER = 4711


class Scene(NamedTuple):
    """A system in a directory of this machine, and the files of the user beside it."""

    system: Path
    own: Path
    shell: Callable[[str], list[str]]

    def plan(self, text: str) -> Plan:
        (self.own / "x.conf").write_text(text)
        configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(self.own / "x.conf")})
        return make_plan(configuration, "x", {"output-dir": str(self.own)})

    def build(self, copies: str) -> Build:
        """Return the build of an image with a task that copies; SYSTEM in *copies* is the directory."""
        lines = copies.replace("SYSTEM", str(self.system)).replace("\n", "\n  ")
        plan = self.plan(f"[x]\nlinux = /l\ninitrd = /i\nsite = here\ntasks = files\n[files]\ntask-copy = {lines}\n")
        assert plan.tasks[0].type == "copy"
        return Build(plan, self.own / "work", "none")

    def copy(self, copies: str) -> Build:
        build = self.build(copies)
        copying.copy_task(build, InSystem(self.shell, str(self.own / "in-memory")), build.plan.tasks[0])
        return build


@pytest.fixture(params=["coreutils", "busybox"])
def scene(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Give a system that has no other programs than those."""
    return make_scene(tmp_path, monkeypatch, "" if request.param == "coreutils" else "/bin/busybox")


@pytest.fixture
def plain_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Give a system whose shell has no programs in itself."""
    return make_scene(tmp_path, monkeypatch, "")


def make_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> Scene:
    for name in ("system", "own/work", "own/site/empty", "programs"):
        (tmp_path / name).mkdir(parents=True)
    for name in APPLETS:
        (tmp_path / "programs" / name).symlink_to(program or str(shutil.which(name)))
    files = {"motd": "mine\n", "site/plain": "one\n", "site/odd 'name'\n-x": "odd\n", "site/host.j2": "at {{ site }}\n"}
    for name, text in files.items():
        (tmp_path / "own" / name).write_text(text)
    (tmp_path / "own/site/plain").chmod(0o750)
    (tmp_path / "own/site/out").symlink_to("../../../outside")
    monkeypatch.chdir(tmp_path / "own")
    programs = f"PATH={tmp_path}/programs"
    return Scene(tmp_path / "system", tmp_path / "own", lambda line: ["env", "-i", programs, "sh", "-c", line])


def what(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def nothing_left(scene: Scene) -> bool:
    names = [path.name for path in [*scene.system.rglob("*"), *scene.own.iterdir(), *(scene.own / "work").iterdir()]]
    return not [name for name in names if name.startswith((".image-factory", "in-memory", "files-to-copy"))]


def test_what_is_copied(scene: Scene) -> None:
    """As the setting copy does it: owners, modes, links, templates; what is there gives way to its own kind."""
    for name in ("there", "real"):
        (scene.system / name).mkdir(mode=0o711)
    (scene.system / "there/motd").write_text("the distribution's")
    (scene.system / "there/out").symlink_to("..")
    (scene.system / "way").symlink_to("real")
    scene.copy(f"motd:SYSTEM/there/:{OWNER}:7:0640\nsite/:SYSTEM/there/\nsite:SYSTEM/way/new/\nmotd:SYSTEM/way/it's")
    there, new = scene.system / "there", scene.system / "real/new/site"
    assert ((there / "motd").read_text(), what(there / "motd")) == ("mine\n", (OWNER, 7, 0o640))
    assert what(there) == (0, 0, 0o711)
    for directory in (there, new):
        assert (directory / "odd 'name'\n-x").read_text() == "odd\n"
        assert (directory / "host").read_text() == "at here\n"
        assert os.readlink(directory / "out") == "../../../outside"
        assert what(directory / "plain") == (0, 0, 0o750)
        assert [*(directory / "empty").iterdir()] == []
    assert what(new.parent) == (0, 0, 0o755)
    assert (scene.system / "real/it's").read_text() == "mine\n"
    assert nothing_left(scene)


# What is refused, with nothing written: what is there, the copies, and the error.
REFUSED = {
    "a directory": ("mkdir x", "motd:SYSTEM/x", "SYSTEM/x of the image is a directory, and is to be a file."),
    "below a file": ("touch x", "motd:SYSTEM/x/y", "SYSTEM/x of the image is no directory."),
    "a link at the end": ("ln -s y x", "motd:SYSTEM/x", "SYSTEM/x of the image is a link, and is to be a file."),
    "a link to nothing": ("ln -s y x", "motd:SYSTEM/x/", "SYSTEM/x of the image is a link to something that is not"),
    "a link that leads out": (f"ln -s {'../' * 60}tmp x", "motd:SYSTEM/x/y", "SYSTEM/x of the image is a link that l"),
    "links without an end": ("ln -s x x", "motd:SYSTEM/x/y", "SYSTEM/x of the image leads through links without an"),
    "a pipe": ("mkfifo x", "motd:SYSTEM/x", "SYSTEM/x of the image is a device, a pipe or a socket, and is to be a f"),
    "an unknown user": (":", "motd:SYSTEM/x:nobody-there:root", "the image has no user nobody-there."),
    "an unknown group": (":", "motd:SYSTEM/x:root:nobody-there", "the image has no group nobody-there."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(scene: Scene, name: str) -> None:
    before, copies, message = REFUSED[name]
    run("sh", "-c", before, cwd=scene.system)
    with pytest.raises(BuildError) as caught:
        scene.copy(f"site:SYSTEM/\n{copies}")
    assert caught.value.message.startswith(f"[x] task files: {message.replace('SYSTEM', str(scene.system))}")
    assert not (scene.system / "site").exists()
    assert nothing_left(scene)


def test_many_files_take_few_programs(plain_scene: Scene) -> None:
    """Also those that are there: each program takes a part of a second where a guest is emulated."""
    for number in range(120):
        (plain_scene.own / f"site/{number}").write_text(str(number))
    log = plain_scene.own.parent / "started"
    for name in ("mv", "base64", "rm", "rmdir"):
        program = plain_scene.own.parent / "programs" / name
        real = os.readlink(program)
        program.unlink()
        program.write_text(f'#!/bin/sh\necho {name} >>{log}\nexec {real} "$@"\n')
        program.chmod(0o755)
    plain_scene.copy("site/:SYSTEM/")
    assert len(log.read_text().split()) < 10
    (plain_scene.own / "site/7").write_text("other")
    plain_scene.copy("site/:SYSTEM/")
    assert (plain_scene.system / "7").read_text() == "other"
    assert len(log.read_text().split()) < 30
    assert nothing_left(plain_scene)


def test_what_fails_half_way_is_taken_back(plain_scene: Scene) -> None:
    (plain_scene.system / "motd").write_text("the distribution's")
    move = plain_scene.own.parent / "programs/mv"
    move.unlink()
    move.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    move.chmod(0o755)
    with pytest.raises(BuildError, match="broken"):
        plain_scene.copy("site:SYSTEM/new/\nmotd:SYSTEM/")
    assert [path.name for path in plain_scene.system.rglob("*")] == ["motd"]
    assert (plain_scene.system / "motd").read_text() == "the distribution's"
    assert nothing_left(plain_scene)


def test_a_system_without_tar(plain_scene: Scene) -> None:
    (plain_scene.own.parent / "programs/tar").unlink()
    with pytest.raises(BuildError, match="the system has no tar, which unpacks what is copied"):
        plain_scene.copy("motd:SYSTEM/")
    assert nothing_left(plain_scene)


def test_what_is_known_before_the_build(scene: Scene) -> None:
    """A source that is not there; also where it goes meanwhile the build fails, and no configuration is wrong."""
    build = scene.build("none:SYSTEM/")
    with pytest.raises(ConfigurationError, match=r"^\[x\] task files: none can't be read: No such file"):
        copying.check(build.plan)
    with pytest.raises(BuildError, match=r"^\[x\] task files: none can't be read"):
        scene.copy("none:SYSTEM/")


def test_what_changes_before_it_is_copied(plain_scene: Scene) -> None:
    """Else a resumed build would take what was copied for what there was, and be again, before."""
    build = plain_scene.build("site:SYSTEM/")
    (plain_scene.own / "site/plain").write_text("two\n")
    with pytest.raises(BuildError, match=r"^\[x\] task files: what is copied changed since the build began\.$"):
        copying.copy_task(build, InSystem(plain_scene.shell, str(plain_scene.own / "in-memory")), build.plan.tasks[0])
    assert [*plain_scene.system.iterdir()] == []


def test_keys_that_only_its_templates_ask_for(plain_scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Are used."""
    plain_scene.build("motd:/srv")
    assert "[x] site: nothing uses this key" in caplog.text
    caplog.clear()
    plain_scene.build("site:/srv")
    assert "nothing uses" not in caplog.text


def test_what_makes_another_task(scene: Scene) -> None:
    """Each byte that is copied, and what a template becomes."""
    found = {scene.build(copies).plan.tasks[0].given for copies in ("site:/srv", "site:/srv:1:1", "site:/opt")}
    (scene.own / "site/plain").write_text("two\n")
    found.add(scene.build("site:/srv").plan.tasks[0].given)
    build = scene.build("site:/srv")
    plan = scene.plan((scene.own / "x.conf").read_text().replace("site = here", "site = there"))
    assert plan.tasks[0].given != build.plan.tasks[0].given
    assert len(found) == 4
