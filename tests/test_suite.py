"""The tests themselves: what they rest on, whatever the hour."""

import datetime
import time

import pytest

from .conftest import TODAY, User, run, young_day


@pytest.mark.parametrize("hour", range(24))
def test_run_does_not_go_over_midnight(hour: int) -> None:
    now = 1_767_225_600 + 3600 * hour + 3599
    assert (
        run("date", "--date", f"@{now}", "+%H:%M", env={"TZ": young_day(now), "PATH": "/usr/bin"}).stdout == "01:59\n"
    )


def test_all_have_the_day_of_the_run(users: dict[str, User]) -> None:
    assert datetime.date.today().isoformat() == TODAY
    for user in users.values():
        assert user.run("date", "+%z %F").stdout == time.strftime(f"%z {TODAY}\n")
