"""The tests themselves: what they rest on, whatever the hour."""

import datetime
import re
import time

import pytest

from ..conftest import REPOSITORY, TODAY, User, run, young_day
from ..fault_table import ALL, CHECKED, pairs


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


def test_cells_that_make_check_has_cover_the_table() -> None:
    """Each step and each fault for each user, and each class of faults at each step; and none of them for nothing."""
    assert set(CHECKED) < set(ALL)
    assert set().union(*map(pairs, CHECKED)) == set().union(*map(pairs, ALL))
    for cell in CHECKED:
        assert pairs(cell) - set().union(*(pairs(other) for other in CHECKED if other != cell)), cell


def test_unit_tests_run_as_an_ordinary_user(users: dict[str, User]) -> None:
    """Nothing is made ready for them, and they say of others what those need."""
    pytest_of = ("/usr/bin/python3", "-B", "-m", "pytest", "-p", "no:cacheprovider", "-q")
    directory = users["c"].directory("unit")
    done = users["c"].run(*pytest_of, "--basetemp", directory / "base", "tests/unit/test_units.py", cwd=REPOSITORY)
    assert re.search(r"^[0-9]+ passed", done.stdout, re.MULTILINE)
    done = users["c"].run(*pytest_of, "tests/system/test_suite.py", cwd=REPOSITORY, check=False)
    assert done.returncode == 2
    assert "they run as root: make check." in done.stdout
