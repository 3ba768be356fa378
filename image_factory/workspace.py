"""The build's own directory, its lock, and what a killed build has left in it."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import guest, loop
from .errors import BuildError, ConfigurationError
from .log import logger
from .model import Build, Plan

_VM_FILE = "vm-name"


@contextmanager
def opened(plan: Plan) -> Iterator[Build]:
    """Give a Build with an empty working directory that is removed on the way out.

    A second build of the same image in the same place is refused: ConfigurationError.  What a
    killed build has left is cleaned up first.  The console's log is moved next to the artifacts
    whatever happens, as it says what the installer did.
    """
    with _locked_directory(plan) as directory:
        _clear(plan, directory)
        vm_name = f"image-factory-{plan.image}-{secrets.token_hex(4)}"
        (directory / _VM_FILE).write_text(vm_name + "\n", encoding="utf-8")
        build = Build(plan, directory, vm_name)
        try:
            yield build
        finally:
            if build.console_path.exists():
                os.replace(build.console_path, plan.console_path)


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
            path.mkdir(parents=True, exist_ok=True, mode=mode)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            # A link, a file or someone else's directory is in its place.
            raise BuildError(f"The working directory {path} can't be made: {error.strerror}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed what we opened.
            if not os.path.lexists(path) or not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                os.close(descriptor)
                continue
            os.fchmod(descriptor, mode)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigurationError(
                f"Another build of {plan.image} is under way in {plan.output_dir}.",
                hint="Wait for it to end, or build into another directory with --output-dir.",
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        break
    try:
        yield path
    finally:
        try:
            shutil.rmtree(path)
        finally:
            os.close(descriptor)


def _clear(plan: Plan, directory: Path) -> None:
    """Remove what a killed build has left in *directory*, its virtual machine and mounts included."""
    entries = list(directory.iterdir())
    if not entries:
        return
    logger.warning("Cleaning up after a build of %s that was killed.", plan.image)
    vm_file = directory / _VM_FILE
    if vm_file.is_file():
        guest.remove_vm(plan, vm_file.read_text(encoding="utf-8").strip())
    loop.release_left_mounts(plan, directory)
    for entry in entries:
        try:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        except OSError as error:
            raise BuildError(f"Can't remove {entry}, which a killed build has left: {error.strerror}.") from error
