"""Have a finished disk tell nothing of when it was finished: for builds that come out the same each time."""

from collections.abc import Iterator

from ..configuration.settings import BOOTSTRAP_KEY
from ..disks import reproducible
from ..model import Build, Plan, Volume
from ..parts import State, Step, doing


def steps(build: Build) -> Iterator[Step]:
    """Give the step on the disk, which is mounted no more."""
    date = build.plan.source_date if _is_reproducible(build.plan) else None
    if date is None:
        return
    shown = reproducible.settle_argvs(build.disk_path, "OFFSET", build.directory, date)
    yield Step("Resetting times", doing(lambda state: reset_times(state, date)), shown)


def _is_reproducible(plan: Plan) -> bool:
    # What others make differs in more than times.
    return plan.settings.source == BOOTSTRAP_KEY


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    return [*reproducible.PROGRAMS] if _is_reproducible(plan) and plan.source_date is not None else []


def reset_times(state: State, date: int) -> None:
    """Give the ext4 filesystems of the disk the times that they would have if they were made at *date*."""
    for volume in filter(_is_settled, state.volumes):
        assert volume.partition is not None
        reproducible.settle(state.disk.path, volume.partition.offset, state.build.directory, date)


def _is_settled(volume: Volume) -> bool:
    return volume.filesystem == "ext4" and volume.partition is not None
