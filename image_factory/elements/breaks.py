"""Where in the run of its elements a user wants a shell: the variables of diskimage-builder for that."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..base import terminal
from ..base.errors import ConfigurationError
from ..base.log import logger
from . import hooks
from .hooks import Phase

VARIABLE = "break"
_AFTER_ERROR = "after-error"
_SHELL = "exec bash"


@dataclass(frozen=True)
class Breaks:
    """The *places* at which *command* is run, on the terminal if that is a shell; *outside* the system if wanted."""

    places: frozenset[str] = frozenset()
    command: str = _SHELL
    outside: bool = False

    def before(self, phase: Phase) -> bool:
        """Return whether to stop before *phase*."""
        return f"before-{_name(phase)}" in self.places

    def after(self, phase: Phase) -> bool:
        """Return whether to stop when *phase* has gone well."""
        return f"after-{_name(phase)}" in self.places

    @property
    def after_error(self) -> bool:
        """Whether to stop when a phase has failed."""
        return _AFTER_ERROR in self.places

    @property
    def needs_terminal(self) -> bool:
        """Whether what is run is a shell, and no command of the user's."""
        return self.command == _SHELL


def _name(phase: Phase) -> str:
    return phase.directory.removesuffix(".d")


def read(environment: Mapping[str, str]) -> Breaks:
    """Return what the variables in *environment* say; ConfigurationError if they name a place that there is not."""
    phases = hooks.phases(["any"])
    known = [f"{when}-{_name(phase)}" for phase in phases for when in ("before", "after")]
    places = [place.strip() for place in environment.get(VARIABLE, "").split(",") if place.strip()]
    for place in places:
        if place not in (*known, _AFTER_ERROR):
            raise ConfigurationError(
                f"The variable {VARIABLE}: {place!r} is no place in the run of elements.",
                hint=f"These are, with commas: before-PHASE, after-PHASE, {_AFTER_ERROR}; PHASE is "
                f"{', '.join(map(_name, phases[:-1]))} or {_name(phases[-1])}.",
            )
    outside = bool(environment.get("break_outside_target"))
    return Breaks(frozenset(places), environment.get("break_cmd") or _SHELL, outside)


def warn(wanted: Breaks) -> None:
    """Warn that no shell will be opened where one is wanted and there is no terminal."""
    if wanted.places and wanted.needs_terminal and not terminal.is_attended():
        logger.warning("%s=%s opens no shell, as there is no terminal.", VARIABLE, ",".join(sorted(wanted.places)))
