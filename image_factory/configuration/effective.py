"""What is in effect for an image: each key that it has, its text, and where that comes from."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from ..base import log
from ..base.errors import ConfigurationError
from ..sources import SOURCES
from .files import Configuration, Origin, declared
from .settings import ELEMENT_PREFIX, ImageSettings
from .unused import variables_named


class Effective(NamedTuple):
    """A key of an image, with what is wrong with its text in place of that."""

    key: str
    text: str | None
    wrong: str | None
    origin: Origin


def effective(configuration: Configuration, image: str, flags: Mapping[str, str]) -> list[Effective]:
    """Return the keys of *image* that have a text: what is nearest to the image first, defaults last."""
    configuration.check_image(image)
    variables = configuration.variables(image, flags)
    found = [
        _effective(variables, key, default, configuration.origin(image, key, flags))
        for key, default in dict(_keys(configuration, image)).items()
    ]
    sections = [*configuration.bases(image), configuration.default_section]

    def distance(each: Effective) -> tuple[int, int, int]:
        kind, section, _, line = each.origin
        order = ("flag", "file", "target", "default").index(kind)
        return order, sections.index(section) if section else 0, line or 0

    return sorted((each for each in found if each.text or each.wrong), key=distance)


def _keys(configuration: Configuration, image: str) -> Iterator[tuple[str, str]]:
    """Give the keys that *image* may have, and the defaults of those of its template."""
    # What the user has written is shown even if nothing uses it.
    for section in configuration.bases(image):
        yield from ((key.partition("@")[0], "") for key in configuration.own[section])
    yield from ((key, "") for key in configuration.texts(image) if key.startswith(ELEMENT_PREFIX))
    yield from ((key, "") for key in variables_named(configuration, image))
    yield from ((key, "") for key, _ in declared(ImageSettings))
    answer_file = configuration.answer_file(image)
    if answer_file:
        source = SOURCES[configuration.source(image)]
        of_template = source.declared_keys(answer_file, configuration.arch(image))
        yield from ((key.name, key.default) for key in of_template.values())


def _effective(variables: Mapping[str, str], key: str, default: str, origin: Origin) -> Effective:
    try:
        return Effective(key, variables.get(key.replace("-", "_"), default), None, origin)
    except ConfigurationError as error:
        return Effective(key, None, error.message, origin)


def as_text(image: str, found: Sequence[Effective]) -> str:
    """Return what was *found* of *image* for people: a paragraph for each place, with the number of each line."""
    parts = []
    for where, group in groupby(found, key=lambda each: _heading(image, each.origin)):
        rows = list(group)
        width = max(len(str(each.origin.line or "")) for each in rows)
        lines = [f"{each.origin.line or '':>{width}}  {_shown(each)}" if width else _shown(each) for each in rows]
        parts.append("\n".join([f"# {where}", *lines]))
    return "\n\n".join(parts) + "\n"


def _heading(image: str, origin: Origin) -> str:
    if origin.kind == "file":
        return f"{origin.path}, [{origin.section}]"
    return {"flag": "Flags", "target": f"What the target of {image} sets", "default": "Defaults"}[origin.kind]


def _shown(each: Effective) -> str:
    if each.wrong:
        return f"{each.key}: {log.printable(' '.join(each.wrong.split()))}"
    lines = [log.printable(line.strip()) for line in (each.text or "").strip().splitlines()]
    return f"{each.key} = " + "\n    ".join(lines)


def as_data(found: Sequence[Effective]) -> list[dict[str, Any]]:
    """Return what was *found* for JSON."""
    return [
        {
            "key": each.key,
            "value": each.text,
            "error": each.wrong,
            "from": each.origin.kind,
            "file": None if each.origin.path is None else str(each.origin.path),
            "line": each.origin.line,
            "section": each.origin.section,
        }
        for each in found
    ]
