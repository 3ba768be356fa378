"""The working directory: made, locked, and gone on every way out."""

import datetime
import os
from pathlib import Path

import pytest

from image_factory import workspace
from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.model import Plan


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    path = tmp_path / "image-factory.conf"
    path.write_text("[image]\nlinux = /linux\ninitrd = /initrd\n")
    settings = Configuration({"IMAGE_FACTORY_CONFIG": str(path)}).image("image", {})
    return Plan("image", settings, datetime.date(2026, 1, 2), tmp_path / "out/put", {})


def test_directory_is_removed(plan: Plan) -> None:
    with workspace.opened(plan) as build:
        assert build.directory == plan.output_dir / ".image-factory-image"
        (build.directory / "deep/er").mkdir(parents=True)
    assert list(plan.output_dir.iterdir()) == []


def test_directory_is_removed_when_the_body_raises(plan: Plan) -> None:
    with pytest.raises(ZeroDivisionError), workspace.opened(plan):
        raise ZeroDivisionError
    assert list(plan.output_dir.iterdir()) == []


def test_console_is_kept(plan: Plan) -> None:
    with pytest.raises(ZeroDivisionError), workspace.opened(plan) as build:
        build.console_path.write_text("what the guest said")
        raise ZeroDivisionError
    assert [path.name for path in plan.output_dir.iterdir()] == ["image-2026-01-02.console.log"]


def test_second_build_is_refused(plan: Plan) -> None:
    with workspace.opened(plan) as first:
        with pytest.raises(ConfigurationError, match="Another build of image is under way"), workspace.opened(plan):
            pytest.fail("it was opened")
        assert first.directory.is_dir()
    with workspace.opened(plan):
        pass


def test_link_in_its_place_is_not_followed(plan: Plan, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    plan.output_dir.mkdir(parents=True)
    plan.work_path.symlink_to(elsewhere)
    with pytest.raises(ConfigurationError, match="Not a directory"), workspace.opened(plan):
        pytest.fail("it was opened")
    assert (elsewhere / "file").exists()


def test_directory_of_another_user_is_refused(plan: Plan) -> None:
    """Root could clear it: what it says of a machine and a mount is another's word."""
    plan.work_path.mkdir(parents=True)
    (plan.work_path / "vm-name").write_text("precious\n")
    os.chown(plan.work_path, 65534, -1)
    with pytest.raises(ConfigurationError, match="belongs to nobody"), workspace.opened(plan):
        pytest.fail("it was opened")
    assert (plan.work_path / "vm-name").exists()


def test_left_files_are_removed(plan: Plan) -> None:
    plan.work_path.mkdir(parents=True)
    (plan.work_path / "disk.raw").touch()
    (plan.work_path / "netboot").mkdir()
    (plan.work_path / "netboot/linux").symlink_to("/linux")
    with workspace.opened(plan) as build:
        assert list(build.directory.iterdir()) == []
