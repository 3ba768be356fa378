"""The kernels of an installed system, and which modules each has when: its files are read, and none of it is run."""

import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..base import command
from ..base.errors import BuildError
from ..base.log import logger
from . import initramfs, privileged
from .tree import Tree

_MODULES = ("usr/lib/modules", "lib/modules")
# Where distributions have the initramfs of a kernel.
_INITRAMFS = ("boot/initrd.img-{}", "boot/initramfs-{}.img", "boot/initrd-{}", "usr/lib/modules/{}/initrd")
# Lists of the kernel's have a few hundred KiB.
_LONGEST_LIST = 4 << 20
_LONGEST_INITRAMFS = 1 << 30
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Kernel:
    """A kernel: the modules that are in it, those that are in its initramfs, and those that the system has for it."""

    version: str
    built_in: frozenset[str]
    early: frozenset[str] | None
    late: frozenset[str]

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Return those of the modules *names* that neither it nor the system has."""
        return [name for name in names if name not in self.built_in | self.late]

    def absent_early(self, names: Iterable[str]) -> list[str]:
        """Return those of the modules *names* that there are, but not in the initramfs, as far as that is known."""
        if self.early is None:
            return []
        there = self.built_in | self.early
        return [name for name in names if name in self.late and name not in there]


def kernels(tree: Tree, directory: Path) -> Iterator[Kernel]:
    """Give the kernels of *tree*, and what modules each has; *directory* is for a file of its own meanwhile."""
    for top in _MODULES:
        versions = [entry.path.rpartition("/")[2] for entry in tree.entries([f"{top}/*"]) if entry.kind == "directory"]
        for version in sorted(versions):
            known = _listed(tree.load(f"{top}/{version}/modules.dep", _LONGEST_LIST))
            # Without that it is what a removed kernel has left.
            if known is not None:
                built_in = _listed(tree.load(f"{top}/{version}/modules.builtin", _LONGEST_LIST)) or frozenset()
                yield Kernel(version, built_in, _early(tree, directory, version), known)
        if versions:
            return


def _listed(data: bytes | None) -> frozenset[str] | None:
    """Return the modules that the lines of a list of depmod's begin with, None if there is no list."""
    if data is None:
        return None
    paths = (line.partition(":")[0].strip() for line in data.decode(errors="replace").splitlines())
    return frozenset(name for path in paths if (name := initramfs.module_name(path)))


def _early(tree: Tree, directory: Path, version: str) -> frozenset[str] | None:
    """Return the modules in the initramfs of the kernel *version*, None if it has none that is known."""
    places = [place.format(version) for place in _INITRAMFS]
    path = next((found.path for found in tree.look(places).values() if found.kind == "file"), None)
    if path is None:
        logger.warning("Kernel %s has no initramfs at /%s: what is in it is not known.", version, ", /".join(places))
        return None
    copy = directory / "initramfs"
    try:
        _copy(tree, path, copy)
        return frozenset(initramfs.modules(copy))
    except BuildError as error:
        raise BuildError(f"/{path}: {error.message}", hint=error.hint) from error
    finally:
        copy.unlink(missing_ok=True)


def _copy(tree: Tree, path: str, copy: Path) -> None:
    """Copy the file *path* of the system to *copy*."""
    with copy.open("wb") as file:
        while data := tree.load(path, _AT_ONCE, file.tell()):
            file.write(data)
            if file.tell() > _LONGEST_INITRAMFS:
                raise BuildError("it has more than 1 GiB.")
        if file.tell():
            return
    _copy_for_root(tree, path, copy)


def _copy_for_root(tree: Tree, path: str, copy: Path) -> None:
    """Copy the file *path*, which root alone may read, out of a tar of what is beside it."""
    top = path.partition("/")[0]
    names = [entry.path for entry in tree.entries(["*"]) if entry.path != top]
    archive = copy.with_name(f"{copy.name}.tar")
    try:
        with tree.contents([f"--exclude=./{name}" for name in names]) as argv, privileged.refusal_told():
            command.flow(argv, [(archive, [])], env=privileged.environment())
        with tarfile.open(archive, "r:") as members, copy.open("wb") as file:
            found = (members.extractfile(each) for each in members if each.isreg() and each.name == f"./{path}")
            shutil.copyfileobj(next(each for each in found if each), file, _AT_ONCE)
    finally:
        archive.unlink(missing_ok=True)
