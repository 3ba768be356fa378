"""Disk images and tars that others have made: opened to be looked into, without a configuration, and never written."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from . import pipeline, workspace
from .base import events
from .base.errors import ConfigurationError
from .base.files import check_readable
from .base.log import step
from .configuration.files import Configuration
from .machines import kvm
from .model import Artifact, Build, Plan
from .outputs import OUTPUTS
from .sources.image import formats, opening, unpacking
from .system import mounts

# A tree of several files in a tar; the formats of disks are those of the table.
TREE = "tar"

_LONGEST_NAME = 120


def name_of(path: Path) -> str:
    """Return the name of the file at *path* as an image may be called, and files of results."""
    known = re.sub("[^A-Za-z0-9._+~@-]", "_", path.name).lstrip("-.+~@")
    return known[:_LONGEST_NAME] or "image"


def plan_of(
    where: str, path: Path, settings: Mapping[str, str], given: Mapping[str, str], flags: Mapping[str, str]
) -> Plan:
    """Return the plan for the image at *path*, which the user names by *where*, such as ``--audit``.

    *settings* are those of what is done with it, *given* those of ``--set``, *flags* those that have one: texts by key.
    ConfigurationError if one of them is wrong, or the file can't be read.
    """
    check_readable(where, path)
    name = name_of(path)
    texts = {"image-name": "${image}", **given, **settings, "source": "image", "source-image": path.absolute().as_uri()}
    plan = pipeline.make_plan(Configuration.without_files(name, texts), name, flags)
    return mounts.chosen(plan)


@contextmanager
def opened(plan: Plan, path: Path) -> Iterator[tuple[Build, Artifact]]:
    """Give the image at *path* as an artifact that can be opened, and a build of *plan* with a directory for that.

    The artifact's file is a link to the image, or what was packed in it: it is not to be written.  Its format is TREE,
    of a size of 0, or one of a disk.  ConfigurationError if it is no image, or one that can't be opened.
    """
    with workspace.apart(plan) as build:
        with step(f"Opening {plan.image}"):
            events.tell(events.InputUsed("source-image", str(path), path))
            # Whatever its name is, it is that of none of a build's files.
            own = build.directory / "given" / plan.image
            own.parent.mkdir(mode=0o700)
            try:
                artifact = _opened(path.absolute(), own)
            except formats.UnfitError as error:
                raise ConfigurationError(error.message, hint=error.hint) from error
        yield _with_virt_type(build), artifact


def _opened(path: Path, own: Path) -> Artifact:
    opening.take(path, own)
    unpacking.unpack(own, str(path), trees=True)
    if unpacking.is_tar(own):
        return Artifact(own, TREE, 0, upload=False)
    found = opening.checked(own, str(path))
    name = next(name for name, output in OUTPUTS.items() if output.driver == found.driver and not output.packs)
    return Artifact(own, name, found.size, upload=False)


def _with_virt_type(build: Build) -> Build:
    """Return *build* with what virtual machines can use here, if it has one."""
    settings = build.plan.settings
    virt_type = "kvm" if settings.virt_type == "kvm" else "qemu"
    if settings.test_boot or settings.mount_via == "guestfs":
        if kvm.has_to_probe(settings.virt_type, settings.arch):
            with step("Probing KVM"):
                virt_type = kvm.probed_virt_type(kvm.kernel_here(), settings.arch, as_root=False)
        events.tell(events.VirtTypeChosen(virt_type))
    return Build(build.plan, build.directory, build.vm_name, virt_type)
