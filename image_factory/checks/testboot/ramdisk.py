"""A netboot image, booted as from a network: its kernel, its ramdisk, and no disk."""

from pathlib import Path

from ...base import command
from ...base.errors import BuildError
from ...base.memory import free_memory
from ...base.units import format_size
from ...outputs.netboot import KERNEL, RAMDISK

FORMATS = ("netboot",)
PROGRAMS = ("tar", "gzip")

_MIB = 1 << 20
# For the kernel, and for the programs that run.
_RUNNING = 512 * _MIB


def unpacking_argv(artifact: Path, directory: Path) -> list[str]:
    """Return the command that puts the kernel and the ramdisk of the file *artifact* into *directory*."""
    return ["tar", "-C", str(directory), "-xf", str(artifact), KERNEL, RAMDISK]


def measuring_argv(directory: Path) -> list[str]:
    """Return the command that prints how large the ramdisk in *directory* is: packed, and unpacked."""
    return ["gzip", "--list", "--quiet", str(directory / RAMDISK)]


def options(directory: Path, console: str) -> list[str]:
    """Return QEMU's options for what is in *directory*; the kernel prints at *console*."""
    files = ["-kernel", str(directory / KERNEL), "-initrd", str(directory / RAMDISK)]
    return [*files, "-append", f"console={console}"]


def memory_for(directory: Path, least: int) -> int:
    """Return the bytes of memory that a machine has for the ramdisk in *directory*, *least* or more.

    BuildError if this machine has not so much.
    """
    packed, tree = map(int, command.run(measuring_argv(directory), capture=True, quiet=True).split()[:2])
    # The kernel has half of the memory that is left beside the packed one for the tree (init_mount_tree in
    # fs/namespace.c has a tmpfs), and there each file takes whole pages.
    needed = packed + 2 * (tree + tree // 4) + _RUNNING
    found = max(least, -(-needed // _MIB) * _MIB)
    free = free_memory()
    if found > free:
        raise BuildError(
            f"A machine that unpacks the ramdisk takes {format_size(found)} of memory, and here {format_size(free)} "
            "are free.",
            hint="Have it booted on a machine with more, or set test-boot = no.",
        )
    return found
