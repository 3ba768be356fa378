"""Elements on the command line: what is found, and what an image would run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, User
from ..unit.test_elements import put

CONFIGURATION = """\
[DEFAULT]
elements-path = {elements}
[x]
source = elements
elements = system app
skip-base = yes
DIB_INSTALLTYPE_app = package
element-environment = PLACE='the moon'
[y]
source = elements
elements = sistem
skip-base = yes
[z]
source = image
source-image = /srv/disk.raw
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return filled(tmp_path)


def filled(path: Path) -> Path:
    system = put(path / "elements/system", "x root.d/10-tree\n- README.rst\n- element-provides")
    (system / "README.rst").write_text("system\n======\nMakes a tree. Of files.\n", encoding="utf-8")
    (system / "element-provides").write_text("operating-system\n", encoding="utf-8")
    app = put(path / "elements/app", "x install.d/9-b\nx install.d/10-a\nx install.d/20.off\n- environment.d/1-app")
    put(app, "x install.d/app-package-install/50-package\nx install.d/app-source-install/50-source")
    (app / "element-deps").write_text("install-types\n", encoding="utf-8")
    put(path / "elements/install-types", "x extra-data.d/99-types")
    (path / "conf").write_text(CONFIGURATION.format(elements=path / "elements"), encoding="utf-8")
    return path


def said(place: Path, *arguments: str, status: int = 0) -> str:
    argv = [sys.executable, str(REPOSITORY / "image-factory"), *arguments]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        check=False,
        env={"IMAGE_FACTORY_CONFIG": str(place / "conf"), "PATH": "/usr/bin:/bin"},
        cwd=place,
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def test_elements_are_listed(place: Path) -> None:
    assert (
        said(place, "--list-elements")
        == f"""\
{place}/elements:
  app            -
  install-types  -
  system         Makes a tree.
"""
    )
    found = said(place, "--list-elements", "system")
    assert found.startswith(f"system: {place}/elements/system\nprovides operating-system\n\nsystem\n======\n")
    assert "Did you mean system?" in said(place, "--list-elements", "sistem", status=2)


def test_elements_are_explained(place: Path) -> None:
    assert (
        said(place, "--explain-elements", "x")
        == f"""\
Elements:
  system         named; provides operating-system  {place}/elements
  app            named                             {place}/elements
  install-types  needed by app                     {place}/elements

environment.d, before each phase:
  1-app  app

root.d, on this machine:
  10-tree  system

extra-data.d, on this machine:
  99-types  install-types

install.d, in the system:
  9-b         app
  10-a        app
  50-package  app

Never run:
  install.d/20.off  app  its name has more than letters, digits, _ and -
"""
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("y", "There is no element 'sistem' (named)."),
        ("z", "[z] has no elements."),
        ("w", "No image 'w' is configured"),
    ],
)
def test_what_can_not_be_explained(place: Path, image: str, message: str) -> None:
    assert message in said(place, "--explain-elements", image, status=2)
    assert sorted(os.listdir(place)) == ["conf", "elements"]


UNREAD = ("elements/app/install.d/9-b", "elements/app/install.d", "elements/app/element-deps", "elements")


def test_what_a_user_can_not_read(users: dict[str, User]) -> None:
    user = users["c"]
    place = filled(user.directory("unread"))
    for name in UNREAD:
        path = place / name
        mode = path.stat().st_mode
        path.chmod(0)
        argv = user.argv(user.program, "--check", "x", IMAGE_FACTORY_CONFIG=str(place / "conf"))
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        path.chmod(mode)
        error, hint = done.stderr.splitlines()
        assert error == f"image-factory: error: Elements: {path} can't be read: Permission denied."
        assert hint.startswith("image-factory: hint: Let the user who builds read all of an element")
