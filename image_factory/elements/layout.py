"""The disk of an image as its elements lay it out, and what their scripts are told of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from ..base.errors import ConfigurationError
from ..disks import layouts, notation
from ..disks.layouts import Filesystem, Layout, Scheme
from .image import Image
from .resolve import BLOCK_DEVICE

# What these do is done to disks as there are none here.
REFUSED = ("lvm", "zipl", "iscsi-boot", "iso")

_CONFIG = "DIB_BLOCK_DEVICE_CONFIG"
_FILE = "file://"
# What bootloader goes by, and block-device-* of diskimage-builder set.
_KIND = "DIB_BLOCK_DEVICE"
_LOADER = "bootloader"
# The labels of a root that has none.
_LABELS = {"xfs": "img-rootfs"}
_LABEL = "cloudimg-rootfs"


@dataclass(frozen=True)
class Mounted:
    """A disk: the *kind* of its root filesystem, the *variables* that say what it has, and its *size* in bytes."""

    kind: str
    variables: Mapping[str, str]
    size: int = 0

    @classmethod
    def of(cls, layout: Layout) -> "Mounted":
        """Return what is known of a disk that will have *layout*."""
        return cls(layout.at("/")[1].kind, variables(layout), layout.size)


@dataclass(frozen=True)
class Source:
    """Where a layout is written down: *text*, which errors call *where*."""

    where: str
    text: str


def source(image: Image) -> Source | None:
    """Return the layout that the elements of *image* have, or their user in their variables; None if there is none."""
    given = image.given.get(_CONFIG, "")
    if given.startswith(_FILE):
        path = Path(unquote(given.removeprefix(_FILE)))
        return Source(str(path), notation.read_text(path))
    if given.strip():
        return Source(_CONFIG, given)
    # ppc64le has the files of ppc64el, as this is Debian's name.
    for each in image.elements:
        for name in (f"block-device-{image.architecture}.yaml", "block-device-default.yaml"):
            if (path := each.element.path / name).is_file():
                return Source(str(path), notation.read_text(path))
    return None


def works_on_disk(image: Image) -> bool:
    """Return whether elements of *image* lay out its disk, or have what works on it."""
    names = {_LOADER, *(name for each in image.elements for name in each.element.provides)}
    return source(image) is not None or _LOADER in image.names or BLOCK_DEVICE in names


def installs_loader(image: Image) -> bool:
    """Return whether an element of *image* installs the boot loader."""
    return _LOADER in image.names


def check(name: str, image: Image, layout: object) -> None:
    """Raise ConfigurationError if the elements of image *name* can't work on its disk, or it is laid out twice.

    *layout* is what the setting of this name has.
    """
    for each in image.elements:
        if each.element.name in REFUSED:
            raise ConfigurationError(
                f"[{name}] elements: {each.element.name} ({each.why}) works on a disk as none is made here.",
                hint="Leave it out: 'layout', or an element block-device-*, says how the disk is laid out.",
            )
    found = source(image)
    if found and layout and not image.given.get(_CONFIG):
        raise ConfigurationError(
            f"[{name}] layout: the disk is laid out by {found.where} already.",
            hint="Leave layout out, or the element that has this file.",
        )
    if installs_loader(image) and not found and not image.given.get(_KIND):
        raise ConfigurationError(
            f"[{name}] elements: {_LOADER} needs to be told what the disk boots from.",
            hint=f"Add block-device-mbr, -gpt or -efi, or set {_KIND} to mbr, gpt or efi, as 'layout' has it.",
        )


def scheme(source: Source, root: Filesystem) -> Scheme:
    """Return the layout of *source* with the labels that it does not have itself: elements find filesystems by them."""
    label = root.label or _LABELS.get(root.kind, _LABEL)
    found = notation.parse(source.text, source.where, replace(root, label=label))
    groups = tuple(replace(group, volumes=tuple(map(_labelled, group.volumes))) for group in found.groups)
    if groups:
        raise ConfigurationError(
            f"{groups[0].where}: elements can't work on a disk with LVM.",
            hint="Leave the element out, and name this file in 'layout'.",
        )
    return replace(found, wanted=tuple(map(_labelled, found.wanted)))


def _labelled(wanted: layouts.Wanted) -> layouts.Wanted:
    held = wanted.filesystem
    if held is None or held.label:
        return wanted
    name = held.name.upper() if held.kind == "vfat" else held.name
    return replace(wanted, filesystem=replace(held, label=name[: layouts.LABELS[held.kind]]))


def variables(layout: Layout) -> dict[str, str]:
    """Return what all phases are told of the disk with *layout*."""
    _, root = layout.at("/")
    _, boot = layout.at("/boot")
    points = [each.point or "" for _, each in reversed(layout.mounted)]
    return {
        "DIB_ROOT_LABEL": root.label,
        "DIB_ROOT_FSTYPE": root.kind,
        "DIB_BOOT_LABEL": boot.label if boot.point != "/" else "",
        "DIB_MOUNTPOINTS": "|".join(points),
    }


def devices(found: Mapping[str, str]) -> dict[str, str]:
    """Return what the last phases are told of the devices *found*, by what the layout calls them."""
    return {
        "IMAGE_BLOCK_DEVICE": found["image0"],
        "IMAGE_BLOCK_DEVICES": "".join(f" [{name}]={path} " for name, path in found.items()),
    }
