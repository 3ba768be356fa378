"""QEMU's own format, compressed."""

import re
from pathlib import Path

from ..base import command
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


def parse_progress(text: str) -> float | None:
    """Return the fraction in a line of ``qemu-img -p``, None if it is another line."""
    match = re.fullmatch(r"\s*\(([0-9]{1,3}\.[0-9]{2})/100%\)\s*", text)
    return float(match[1]) / 100 if match else None


def commands(build: Build) -> list[list[str]]:
    """Return the commands it will run."""
    return [convert_argv(build, build.directory / build.plan.file_name("qcow2"))]


def write(build: Build, disk: Disk) -> Artifact:
    """Convert the disk."""
    path = build.directory / build.plan.file_name("qcow2")
    command.run(convert_argv(build, path), progress=parse_progress)
    return Artifact(path, "qcow2", disk.path.stat().st_size)
