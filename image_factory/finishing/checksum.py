"""SHA-256 of an artifact, in the form that sha256sum reads."""

import dataclasses

from ..base import events, files
from ..base.log import logger, step
from ..model import Artifact, Build


def add_sha256(build: Build, artifact: Artifact) -> Artifact:
    """Write the checksum beside *artifact*, and return it with the checksum."""
    with step(f"Checksumming {artifact.path.name}"):
        digest = files.digest_of(artifact.path, meter=events.Meter())
        artifact.checksum_path.write_text(f"{digest}  {artifact.path.name}\n", encoding="utf-8")
        logger.info("SHA-256 of %s: %s", artifact.path.name, digest)
    return dataclasses.replace(artifact, sha256=digest)
