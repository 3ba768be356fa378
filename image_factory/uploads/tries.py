"""What all types of uploads share: which files go there, and what is tried again."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..base import files, interrupts
from ..base.errors import BuildError
from ..base.log import logger
from ..configuration.settings import Destination
from ..model import Artifact

# Between the tries, of which there is one more.
PAUSE_SECONDS = (5.0, 15.0, 45.0)
# An upload in which nothing has come or gone for so long is given up.
STALL_SECONDS = 180
PROBE_SECONDS = 15.0


class FailedTry(Exception):
    """A try has failed: why, in one line, and what the user does; *again* if another may succeed.

    *leaves* if there may be something left there of it, *damaged* if the file there is another.
    """

    def __init__(
        self, reason: str, *, again: bool, hint: str = "", leaves: bool = False, damaged: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.again = again
        self.hint = hint
        self.leaves = leaves
        self.damaged = damaged


@dataclass(frozen=True)
class Alone(Artifact):
    """A file to which no others belong."""

    @property
    def others(self) -> tuple[Path, ...]:
        """None."""
        return ()


def files_of(artifact: Artifact) -> tuple[Path, ...]:
    """Return *artifact*'s file and those that belong to it."""
    return artifact.path, *artifact.others


def digests_of(artifact: Artifact) -> dict[str, str]:
    """Return the SHA-256 that each of the files has, by its name."""
    assert artifact.sha256 is not None
    own = {artifact.path.name: artifact.sha256}
    if artifact.checksum_path in artifact.others:
        own[artifact.checksum_path.name] = files.digest_of(artifact.checksum_path)
    return own | dict(artifact.companions)


def persist(
    destination: Destination,
    artifact: Artifact,
    attempt: Callable[[FailedTry | None], None],
    by_hand: str,
    give_up: Callable[[FailedTry], None] = lambda failure: None,
) -> None:
    """Call *attempt*, with why it failed the last time, until it succeeds; BuildError has the reason and the next move.

    A failure that may pass is tried again.  *give_up* is called after the last try.  *by_hand* is the command that
    the user can try.
    """
    try:
        try_all(attempt, f"Uploading {artifact.path.name} to {destination.section}")
    except FailedTry as failure:
        give_up(failure)
        raise BuildError(failure.reason, hint=_hint(failure, artifact, by_hand)) from failure


def try_all(attempt: Callable[[FailedTry | None], None], name: str) -> None:
    """Call *attempt*, with why it failed the last time, until it succeeds; FailedTry if it doesn't.

    A failure that may pass is tried again, which is told of what has the *name*.
    """
    failed: FailedTry | None = None
    for pause in (*PAUSE_SECONDS, None):
        try:
            attempt(failed)
            return
        except FailedTry as failure:
            failed = failure
            if failure.again and pause is None:
                failure.reason += f" ({len(PAUSE_SECONDS) + 1} tries)"
            if not failure.again or pause is None:
                raise
            logger.warning("%s: %s; trying again in %.0f s.", name, failure.reason, pause)
        with interrupts.interruptible():
            time.sleep(pause)


def _hint(failure: FailedTry, artifact: Artifact, by_hand: str) -> str:
    return " ".join(filter(None, (failure.hint, f"To upload it by hand, in {artifact.path.parent}: {by_hand}")))
