"""What there is to say of elements before any of them runs, for people."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from . import hooks
from .hooks import File
from .image import Image
from .resolve import Element

_LEAST_WIDTH = 20


def listing(known: Mapping[str, Element]) -> str:
    """Return the elements that are *known* by directory, each with what its README says first."""
    width = max(map(len, known), default=0)
    parts = []
    for directory in dict.fromkeys(element.path.parent for element in known.values()):
        here = sorted((name, element) for name, element in known.items() if element.path.parent == directory)
        rows = [(f"  {name:{width}}", element.summary or "-") for name, element in here]
        parts.append(f"{directory}:\n{_columns(rows)}")
    return "\n".join(parts)


def readme(element: Element) -> str:
    """Return what there is to read of *element*: where it is, what it needs and provides, its README."""
    lines = [f"{element.name}: {element.path}"]
    for what, names in (("needs", element.needs), ("provides", element.provides)):
        if names:
            lines.append(f"{what} {', '.join(sorted(names))}")
    return "\n".join([*lines, "", element.readme.strip() or "It has no README."]) + "\n"


def explanation(image: Image) -> str:
    """Return the elements of *image* with why each is one, and the scripts of their hooks in the order of a build."""
    found = image.hooks
    parts = [
        "Elements:\n" + _columns((f"  {each.element.name}", each.why, _place(each.element)) for each in image.elements)
    ]
    if sourced := hooks.sourced(found):
        parts.append(f"{hooks.ENVIRONMENT}, before each phase:\n{_scripts(sourced)}")
    for phase in hooks.phases(image.packages):
        where = "in the system" if phase.inside else "on this machine"
        if phase == hooks.EXTRA_PACKAGES:
            parts.append(f"{phase.directory}, {where}:\n  {hooks.packages_command(image.packages)}\n")
        elif scripts := hooks.scripts(found, phase.directory, image.types):
            parts.append(f"{phase.directory}, {where}:\n{_scripts(scripts)}")
    if left := hooks.left_out(found):
        parts.append("Never run:\n" + _columns((f"  {name}", file.element, reason) for name, reason, file in left))
    return "\n".join(parts)


def _place(element: Element) -> str:
    return "made by the build" if element.texts else str(element.path.parent)


def _scripts(scripts: Iterable[tuple[str, File]]) -> str:
    return _columns((f"  {name}", file.element) for name, file in scripts)


def _columns(rows: Iterable[Sequence[str]]) -> str:
    """Return *rows* as lines whose columns stand below each other; the last one is as long as the terminal lets it."""
    rows = [*rows]
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    room = max(shutil.get_terminal_size((1000, 24)).columns - sum(widths) - 2 * len(widths), _LEAST_WIDTH)
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, textwrap.shorten(row[-1], room, placeholder=" ...")]).rstrip())
    return "".join(f"{line}\n" for line in lines)
