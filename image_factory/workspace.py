"""The build's own directory, its lock, and what a killed build has left in it and elsewhere."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import checkpoint, publish, sources
from .base import files, locks, openpgp, scratch, trust
from .base.cleanup import released
from .base.errors import BuildError, ConfigurationError
from .base.log import logger
from .inside import namespaces
from .machines import libvirt
from .model import READ_ONLY_NAME, VM_PREFIX, WORK_PREFIX, Build, Plan
from .system import loop
from .tasks import layers

_VM_FILE = "vm-name"
# Of the directories of what is looked into and not built.
_APART = f"{WORK_PREFIX}foreign."
_IN_ITS_PLACE = "Remove what is in its place, or build into another directory with --output-dir."


@contextmanager
def opened(plan: Plan, *, resume: bool = False) -> Iterator[Build]:
    """Give a Build with an empty working directory that is removed on the way out.

    A second build of the same image in the same place is refused: ConfigurationError.  What a
    killed build has left is cleaned up first; with *resume*, all but what can be resumed.  That stays
    on the way out, too, as long as there is a checkpoint.  The console's log is moved next to the
    artifacts whatever happens, as it says what the installer did.
    """
    with _locked_directory(plan) as directory:
        if resume:
            _release(directory)
            _remove_entries(directory, spare=_kept(directory))
        elif any(directory.iterdir()):
            if checkpoint.read(directory):
                logger.warning("What --resume could go on with is removed: %s", directory)
            else:
                logger.warning("Cleaning up after a build of %s that was killed.", plan.image)
            _clear(directory)
        build = Build(plan, directory, f"{VM_PREFIX}{plan.image}-{secrets.token_hex(4)}")
        with released(partial(_keep_console, build)):
            yield build


@contextmanager
def apart(plan: Plan) -> Iterator[Build]:
    """Give a Build with a directory of its own, nowhere near the artifacts, which is gone at the end.

    What killed ones of this user have left goes first.
    """
    with scratch.directory(_APART, _drop, large=True) as directory:
        yield Build(plan, directory, f"{VM_PREFIX}{plan.image}-{secrets.token_hex(4)}")


def _drop(directory: Path) -> None:
    _clear(directory)
    directory.rmdir()


def _keep_console(build: Build) -> None:
    if build.console_path.exists():
        files.move(build.console_path, build.plan.console_path)


@contextmanager
def _locked_directory(plan: Plan) -> Iterator[Path]:
    """Make and lock the working directory; remove it on the way out.

    The lock is on the directory itself, so it ends with the process, however that ends, and a
    directory without a holder is what a killed build has left.
    """
    path = plan.work_path
    # QEMU of the system's libvirt runs as a user of its own, which has to get through.
    mode = 0o711 if plan.as_root else 0o700
    while True:
        try:
            make_output_dir(plan)
            path.mkdir(exist_ok=True, mode=mode)
        except FileExistsError as error:
            raise ConfigurationError(
                f"The working directory {path} can't be made: {error.strerror}.", hint=_IN_ITS_PLACE
            ) from error
        except OSError as error:
            raise BuildError(f"The working directory {path} can't be made: {error.strerror}.") from error
        try:
            descriptor = locks.lock(path)
        except FileNotFoundError:
            # The holder before us has just removed it.
            continue
        except OSError as error:
            # A link, a file or someone else's directory is in its place.
            raise ConfigurationError(
                f"The working directory {path} can't be made: {error.strerror}.", hint=_IN_ITS_PLACE
            ) from error
        break
    if descriptor is None:
        raise ConfigurationError(
            f"Another build of {plan.image} is under way in {plan.output_dir}.",
            hint=f"Wait for it to end{locks.by_whom(path)}, or build into another directory with --output-dir.",
        )
    try:
        owner = os.fstat(descriptor).st_uid
        if owner != os.geteuid():
            # Root could clear it, but what it says of a machine to remove is not to be believed.
            raise ConfigurationError(
                f"The working directory {path} belongs to {trust.name_of(owner)}.", hint=_IN_ITS_PLACE
            )
        with released(partial(_remove, path)):
            os.fchmod(descriptor, mode)
            yield path
    finally:
        os.close(descriptor)


def warn_of_others(plan: Plan) -> None:
    """Warn where others than root can exchange the files that root's build works on."""
    # As one that is not there yet: where all may make files but remove only their own, nobody exchanges them.
    doubt = trust.why_not(plan.work_path / "x") if plan.as_root else None
    if doubt:
        logger.warning("Root builds in %s, where others can exchange what it works on: %s.", plan.output_dir, doubt)


def make_output_dir(plan: Plan) -> None:
    """Make the output directory where it is missing; of root's, whatever the umask, one that QEMU gets through."""
    for directory in (*reversed(plan.output_dir.parents), plan.output_dir):
        if os.path.lexists(directory):
            continue
        # Another build may make it at this moment.
        with contextlib.suppress(FileExistsError):
            directory.mkdir()
            if plan.as_root:
                directory.chmod(stat.S_IMODE(directory.stat().st_mode) | 0o011)


def _records(directory: Path) -> list[Path]:
    """Return the records of what could not be released; see Build.vm_record and loop.mount_record."""
    return [path for path in (directory / _VM_FILE, loop.mount_record(directory)) if os.path.lexists(path)]


def _kept(directory: Path) -> list[Path]:
    """Return what is to be resumed, and what is to be made read-only then."""
    found = checkpoint.read(directory)
    if not found:
        return []
    return [*(directory / name for name in (*found.kept, READ_ONLY_NAME)), *layers.all_in(directory)]


def _remove(directory: Path) -> None:
    """Remove the working directory, but for what can be resumed and the records of what is to be released."""
    records = _records(directory)
    spare = [*records, *_kept(directory)]
    if not spare:
        namespaces.remove(directory)
        return
    _remove_entries(directory, spare=spare)
    if records:
        logger.error("The next build, or image-factory --cleanup, tries again to remove what is left.")


def _clear(directory: Path) -> list[str]:
    """Remove what a killed build has left in *directory*, its virtual machine and mounts included.

    Returns a line for each machine and mount.
    """
    removed = _release(directory)
    _remove_entries(directory)
    return removed


def _release(directory: Path) -> list[str]:
    """Release the virtual machine and the mounts of a killed build; return a line for each."""
    removed = []
    publish.take_back(directory)
    vm_file = directory / _VM_FILE
    # The file is empty if the build was killed at that moment; there is no machine then.
    if vm_file.is_file() and (name := vm_file.read_text(encoding="utf-8").strip()):
        libvirt.remove_vm(name)
        removed.append(f"virtual machine {name}")
    vm_file.unlink(missing_ok=True)
    removed += [f"mount {path}" for path in loop.release_left_mounts(directory)]
    return removed


def _remove_entries(directory: Path, spare: list[Path] | None = None) -> None:
    for entry in directory.iterdir():
        if entry in (spare or []):
            continue
        try:
            namespaces.remove(entry)
        except OSError as error:
            raise BuildError(f"Can't remove {entry}, which a killed build has left: {error.strerror}.") from error


def remove_left(output_dir: Path) -> Iterator[str]:
    """Remove what killed builds of this user have left; give a line for each thing removed.

    These are the working directories in *output_dir* with what belongs to them, and wherever the
    working directory was: virtual machines, mounts and the directories for mounts.  A build that runs
    holds the lock of its directories.
    """
    for directory in sorted(output_dir.glob(f"{WORK_PREFIX}*")):
        if directory.is_symlink() or not directory.is_dir() or directory.stat().st_uid != os.geteuid():
            continue
        with _unused(directory) as unused:
            if unused:
                yield from _clear(directory)
                directory.rmdir()
                yield f"directory {directory}"
    for name, directory in libvirt.machines(VM_PREFIX):
        if not directory.name.startswith(WORK_PREFIX):
            continue
        with _unused(directory) as unused:
            if unused:
                libvirt.remove_vm(name)
                yield f"virtual machine {name}"
    for point, image in loop.image_mounts():
        if not image.parent.name.startswith(WORK_PREFIX) or not _is_own(point.parent):
            continue
        with _unused(image.parent) as unused:
            if unused:
                loop.umount(point)
                yield f"mount {point}"
    scratches = (*scratch.remove_left(), *scratch.remove_left(_APART, _drop), *sources.remove_left())
    for directory in (*loop.remove_left_mount_points(), *openpgp.remove_left(), *scratches):
        yield f"directory {directory}"


@contextmanager
def _unused(directory: Path) -> Iterator[bool]:
    """Tell whether no build has the working *directory*, and see to it that none takes it meanwhile."""
    try:
        descriptor = locks.lock(directory)
    except (FileNotFoundError, NotADirectoryError):
        yield True
        return
    except OSError:
        # The directory is someone else's.
        yield False
        return
    if descriptor is None:
        logger.info("A build in %s is under way.", directory)
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)


def _is_own(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except OSError:
        return False
