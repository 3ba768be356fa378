"""SHA-256 of an artifact, in the form that sha256sum reads."""

import dataclasses
import hashlib
import io
import os

from ..base import events, interrupts
from ..base.log import logger, step
from ..model import Artifact, Build

_PART_SIZE = 1 << 20


def add_sha256(build: Build, artifact: Artifact) -> Artifact:
    """Write the checksum beside *artifact*, and return it with the checksum."""
    with step(f"Checksumming {artifact.path.name}"):
        with artifact.path.open("rb", buffering=0) as file, interrupts.interruptible():
            digest = _sha256(file)
        artifact.checksum_path.write_text(f"{digest}  {artifact.path.name}\n", encoding="utf-8")
        logger.info("SHA-256 of %s: %s", artifact.path.name, digest)
    return dataclasses.replace(artifact, sha256=digest)


def _sha256(file: io.FileIO) -> str:
    digest = hashlib.sha256()
    meter = events.Meter()
    size = os.fstat(file.fileno()).st_size
    part = memoryview(bytearray(_PART_SIZE))
    done = 0
    while length := file.readinto(part):
        digest.update(part[:length])
        done += length
        meter.at(done, size)
    return digest.hexdigest()
