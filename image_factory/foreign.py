"""Disk images and tars that others have made: opened to be looked into, without a configuration, and never written."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from . import pipeline, workspace
from .base import command, events, files
from .base.cleanup import released
from .base.errors import BuildError, ConfigurationError
from .base.files import check_readable
from .base.log import step
from .checks import audit
from .checks.testboot import laying
from .configuration.files import Configuration
from .disks import layouts, making
from .inside import namespaces
from .machines import kvm
from .model import Artifact, Build, Plan
from .outputs import OUTPUTS
from .sources.image import formats, opening, unpacking
from .system import mounts

# A tree of several files in a tar; the formats of disks are those of the table.
TREE = "tar"

_LONGEST_NAME = 120
# Bytes that are free on the disk that a tree is laid on.
_FREE = 64 << 20


def name_of(path: Path) -> str:
    """Return the name of the file at *path* as an image may be called, and files of results."""
    known = re.sub("[^A-Za-z0-9._+~@-]", "_", path.name).lstrip("-.+~@")
    return known[:_LONGEST_NAME] or "image"


def stem_of(path: Path) -> str:
    """Return that name without what it ends with as an image, and as one that is packed."""
    name = name_of(path)
    endings = [*(output.suffix for output in OUTPUTS.values()), "img", "tar"]
    packed = [found.suffix for found in unpacking.COMPRESSIONS]
    for suffixes in (packed, [f".{ending}" for ending in sorted(endings, key=len, reverse=True)]):
        name = next((name.removesuffix(each) for each in suffixes if name.lower().endswith(each)), name) or name
    return name


def plan_of(
    where: str,
    path: Path,
    settings: Mapping[str, str],
    given: Mapping[str, str],
    flags: Mapping[str, str],
    name: str = "",
) -> Plan:
    """Return the plan for the image at *path*, which the user names by *where*, such as ``--audit``.

    *settings* are those of what is done with it, *given* those of ``--set``, *flags* those that have one: texts by key.
    It has the *name* of the file if no other is given.  ConfigurationError if a setting is wrong, or the file can't be
    read.
    """
    check_readable(where, path)
    name = name or name_of(path)
    texts = {"image-name": "${image}", **given, **settings, "source": "image", "source-image": path.absolute().as_uri()}
    configuration = Configuration.without_files(name, texts)
    # Nobody is to be warned that nothing uses one of these.
    configuration.written[name] = {key for key in configuration.written[name] if not audit.reads(key)}
    return mounts.chosen(pipeline.make_plan(configuration, name, flags))


def programs(path: Path) -> list[str]:
    """Return the programs that open the image at *path*."""
    compression = unpacking.compression_of(path)
    return ["qemu-img", "cp", *(["prlimit", compression.program] if compression else [])]


@contextmanager
def opened(plan: Plan, path: Path) -> Iterator[tuple[Build, Artifact]]:
    """Give the image at *path* as an artifact that can be opened, and a build of *plan* with a directory for that.

    The artifact's file is a link to the image, or what was packed in it: it is not to be written.  Its format is TREE,
    of a size of 0, or one of a disk.  ConfigurationError if it is no image, or one that can't be opened.
    """
    command.require(programs(path))
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
        # How a tree is mounted is not known yet.
        knows = artifact.format != TREE or plan.settings.test_boot
        yield _with_virt_type(build) if knows else build, artifact


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
    return dataclasses.replace(build, virt_type=virt_type)


def laid(build: Build, artifact: Artifact) -> tuple[Build, Artifact]:
    """Return *build* and *artifact*, or of a tree the disk with a filesystem for that, in a directory of *build*.

    The build has the way to mount what is returned.  ConfigurationError if the tree can't be unpacked.
    """
    if artifact.format != TREE:
        return build, artifact
    build = _with_virt_type(dataclasses.replace(build, plan=mounts.chosen_for_laid_out(build.plan)))
    as_root = build.plan.as_root
    root = layouts.root_of("ext4", "", ())
    scheme = layouts.scheme("filesystem", build.plan.settings.arch, root)
    layout = layouts.Layout(scheme, None, build.plan.settings.arch, 0, identity=layouts.random_identity(), extra=_FREE)
    command.require([*namespaces.programs(as_root=as_root), "bash", "tar", *making.programs(layout)])
    namespaces.check(as_root=as_root)
    own = dataclasses.replace(build, directory=build.directory / "laid")
    tree = own.directory / "tree" / "root"
    own.directory.mkdir(mode=0o700)
    with step(f"Laying {artifact.path.name} on a disk"), released(lambda: namespaces.remove(tree.parent)):
        tree.mkdir(parents=True)
        for path in (tree.parent, tree):
            path.chmod(0o755)
        try:
            with namespaces.entered(own.directory, as_root=as_root) as inside:
                laying.unpack(inside, artifact, tree)
                making.make_disk(inside, tree, own, making.fitted(inside, tree, own, layout))
        except BuildError as error:
            raise ConfigurationError(error.message) from error
    # Results have the name of the image.
    disk = own.directory / artifact.path.name
    files.move(own.disk_path, disk)
    return build, Artifact(disk, "raw", disk.stat().st_size, upload=False)
