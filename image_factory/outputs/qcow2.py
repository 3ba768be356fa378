"""QEMU's own format, compressed."""

from pathlib import Path

from ..base import command
from ..base.units import parse_percentage
from ..model import Artifact, Build, Disk, Origin

MADE_FROM: Origin = "disk"
STEP = "Converting to qcow2"


def convert_argv(build: Build, target: Path) -> list[str]:
    """Return the command that writes *target*."""
    compression = build.plan.settings.compression
    options = [] if compression == "none" else ["-c", "-o", f"compression_type={compression}"]
    # ``-m``, ``-W``: several clusters are compressed at once, and written as they are ready.
    return [
        "qemu-img", "convert",
        "-f", "raw",
        "-O", "qcow2",
        "-p",
        *options,
        "-m", "16",
        "-W",
        str(build.disk_path),
        str(target),
    ]  # fmt: skip


def commands(build: Build) -> list[list[str]]:
    """Return the commands it will run."""
    return [convert_argv(build, build.directory / build.plan.file_name("qcow2"))]


def write(build: Build, disk: Disk) -> Artifact:
    """Convert the disk."""
    path = build.directory / build.plan.file_name("qcow2")
    command.run(convert_argv(build, path), progress=parse_percentage)
    return Artifact(path, "qcow2", disk.path.stat().st_size)
