"""What was acquired is released on every way out, and no failure is lost."""

import signal

import pytest

from image_factory.base.cleanup import released
from image_factory.base.errors import BuildError, Interrupted


def test_release_that_a_signal_stops_is_done_again() -> None:
    calls = []

    def release() -> None:
        calls.append(None)
        if len(calls) == 1:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted), released(release):
        pass
    assert len(calls) == 2


def test_release_that_fails_is_noted_on_the_error_in_flight() -> None:
    def release() -> None:
        raise BuildError("it is busy")

    with pytest.raises(ZeroDivisionError) as raised, released(release):
        raise ZeroDivisionError
    assert raised.value.__notes__ == ["it is busy"]


def test_release_that_fails_raises() -> None:
    def release() -> None:
        raise OSError

    with pytest.raises(OSError), released(release):
        pass
