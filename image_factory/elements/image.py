"""The elements of one image, ready to be run or explained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..base import log
from ..base.errors import ConfigurationError
from ..configuration.settings import ImageSettings
from . import contract, hooks, resolve, system
from .hooks import Hooks
from .resolve import Resolved


@dataclass(frozen=True)
class Image:
    """What the elements of an image are, each with why, and the *hooks* that are merged of them.

    *directories* are where elements were looked for, *architecture* is Debian's name.  *given* are the variables of the
    user, and perhaps secrets among them.  *packages* are installed beside those of the elements.
    """

    elements: tuple[Resolved, ...]
    hooks: Hooks
    directories: tuple[Path, ...]
    architecture: str
    given: Mapping[str, str] = field(repr=False)
    packages: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The names of its elements."""
        return [each.element.name for each in self.elements]

    @property
    def types(self) -> dict[str, str]:
        """The install types that are asked for."""
        return hooks.install_types(self.given)


def read(
    name: str,
    settings: ImageSettings,
    variables: Mapping[str, str],
    architecture: str,
    environment: Mapping[str, str],
    packages: str | None = None,
) -> Image:
    """Return the elements of image *name*; ConfigurationError says what is wrong with them.

    *variables* are the keys of its section with underscores, *environment* is what image-factory was called with.
    *packages* is the kind of those that the system has, where that is seen; else it is that of the distribution.
    """
    if not settings.elements:
        raise ConfigurationError(f"[{name}] has no elements.", hint="The key 'elements' names them.")
    given = contract.given(variables, settings.element_environment, environment)
    log.hide(contract.secrets(given, environment))
    directories = resolve.search_path(settings.elements_path, environment)
    known = resolve.find(directories)
    has_system = settings.source != "elements"
    asked = resolve.wanted(settings.elements, architecture, with_base=not settings.skip_base, with_disk=not has_system)
    kind = packages or system.packages_of(variables.get("distribution", ""))
    there = system.element("deb" if settings.source == "bootstrap" else kind, known)
    elements = resolve.resolve(asked, known, Resolved(there, f"source = {settings.source}") if has_system else None)
    merged = hooks.merge(each.element for each in elements)
    return Image(tuple(elements), merged, tuple(directories), architecture, given, settings.extra_packages)
