"""Release what was acquired, on every way out, so that no failure is lost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import ImageFactoryError, Interrupted
from .log import logger


@contextmanager
def released(release: Callable[[], None]) -> Iterator[None]:
    """Call *release* on the way out.

    If it fails it raises; with an error in flight, which is the one to be told, it's logged and noted
    on that.
    """
    try:
        yield
    except BaseException as error:
        try:
            _release(release)
        except (ImageFactoryError, OSError) as release_error:
            logger.error("%s", release_error)
            error.add_note(str(release_error))
        raise
    _release(release)


def _release(release: Callable[[], None]) -> None:
    try:
        release()
    except Interrupted:
        # The signal has stopped it half-way.  Later signals are ignored, so this one is not disturbed.
        release()
        raise
