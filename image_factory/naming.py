"""What the files of a build are called."""

import contextlib
import dataclasses
import datetime
import re
import secrets
import string
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .base.errors import ConfigurationError
from .base.log import logger
from .configuration.settings import NAME_VARIABLES, check_image_name
from .model import Plan
from .outputs import OUTPUTS, file_name, formats

_TEXT_SUFFIX = ".txt"
# What a build of another time may have for a variable.
_OTHERS = {
    "date": "[0-9]{4}-[0-9]{2}-[0-9]{2}",
    "stamp": "[0-9]{8}-[0-9]{6}",
    "ident": "[0-9a-f]{10}",
    "distribution": "[^/]+",
    "release": "[^/]+",
}


def named(plan: Plan, now: datetime.datetime) -> Plan:
    """Return *plan*, which begins *now*, with the names of its files; ConfigurationError if one is none."""
    settings = plan.settings
    values = {
        "image": plan.image,
        "date": plan.date.isoformat(),
        "stamp": f"{now:%Y%m%d-%H%M%S}",
        "ident": secrets.token_hex(5),
        "distribution": settings.distribution,
        "release": settings.release,
        "arch": settings.arch,
    }
    assert values.keys() == {*NAME_VARIABLES}
    name = _made_of(plan, "image-name", settings.image_name, values)
    text = settings.manifest_text and _made_of(plan, "manifest-text", settings.manifest_text, values)
    number = _number(plan, name) if settings.replace == "number" else ""
    return dataclasses.replace(
        plan,
        name=f"{name}{number}",
        text_name=f"{text.removesuffix(_TEXT_SUFFIX)}{number}{_TEXT_SUFFIX}" if text else "",
        ident=values["ident"] or "",
    )


def _made_of(plan: Plan, key: str, template: str, values: Mapping[str, str | None]) -> str:
    """Return the name that *template*, the value of *key*, is with *values*."""
    missing = [name for name, value in values.items() if not value and f"${{{name}}}" in template]
    if missing:
        raise ConfigurationError(f"[{plan.image}] {key} has ${{{missing[0]}}}, and the image lacks '{missing[0]}'.")
    name = _filled(template, {key: value or "" for key, value in values.items()})
    try:
        check_image_name(name)
    except ConfigurationError as error:
        raise ConfigurationError(f"[{plan.image}] {key}: {error.message}", hint=error.hint) from error
    return name


def _filled(template: str, values: Mapping[str, str]) -> str:
    # "Rocky Linux" is the name of a distribution.
    return "-".join(string.Template(template).substitute(values).split())


def _number(plan: Plan, name: str) -> str:
    """Return what is put behind *name*, so that no image of that name is there."""
    number, found = 1, ""
    while any((plan.output_dir / f"{name}{found}.{OUTPUTS[each].suffix}").exists() for each in formats(plan)):
        number += 1
        found = f"-{number}"
    return found


def check(plan: Plan) -> None:
    """Raise ConfigurationError if *plan* would replace an image that it is not to replace; warn where it is to."""
    older = [name for name in (file_name(plan, each) for each in formats(plan)) if (plan.output_dir / name).exists()]
    if older and plan.settings.replace == "no":
        raise ConfigurationError(
            f"[{plan.image}] replace = no, and {plan.output_dir / older[0]} is there already.",
            hint="With 'replace = number' the next one gets a number, with ${stamp} in 'image-name' its time.",
        )
    if older:
        logger.warning("%s of an earlier build will be replaced; see 'replace'.", " and ".join(older))


def check_others(plan: Plan, others: Iterable[Plan]) -> None:
    """Raise ConfigurationError if one of *others* has files of the names that those of *plan* have."""
    for other in others:
        if plan.output_dir != other.output_dir:
            continue
        for key, own, its in (
            ("image-name", plan.base_name, other.base_name),
            ("manifest-text", plan.text_name, other.text_name),
        ):
            if own and own == its:
                raise ConfigurationError(
                    f"Its files would have the names that those of {other.image} have: {own}.",
                    hint=f"Have ${{image}} in '{key}', or another output-dir for each.",
                )


def pattern(plan: Plan) -> str:
    """Return a regular expression of the names of all builds of the image of *plan*, whatever follows them.

    It has the groups ``name`` and ``date``, which is empty where the name has none.
    """
    known = {"image": plan.image, "arch": plan.settings.arch}
    places = {key: f"\0{key}\0" for key in NAME_VARIABLES}
    text = re.escape(_filled(plan.settings.image_name, places))
    dated = next((key for key in ("date", "stamp") if places[key] in text), None)
    if dated:
        # The first one is enough.
        text = text.replace(places[dated], f"(?P<date>{_OTHERS[dated]})", 1)
    for key, place in places.items():
        text = text.replace(place, _OTHERS.get(key) or re.escape(known[key]))
    return f"(?P<name>{text}(?:-[0-9]+)?)" if dated else f"(?P<name>(?P<date>){text}(?:-[0-9]+)?)"


def builds(plan: Plan, ending: str) -> list[tuple[str, list[Path]]]:
    """Return the files of builds of the image of *plan* whose names end as the regular expression *ending* says.

    They are those in the output directory, by their builds, the newest first: the digits of the time in the names,
    empty where they have none, and the paths, sorted.
    """
    wanted = re.compile(f"{pattern(plan)}{ending}")
    found: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)
    with contextlib.suppress(OSError):
        for path in plan.output_dir.iterdir():
            if match := wanted.fullmatch(path.name):
                found[match["date"].replace("-", ""), match["name"]].append(path)
    ordered = sorted(found.items(), key=_newest_last, reverse=True)
    return [(date, sorted(paths)) for (date, _), paths in ordered]


def _newest_last(found: tuple[tuple[str, str], Sequence[Path]]) -> tuple[str, float]:
    """Return what puts builds in order: the time in their names, and then when they were written."""
    (date, _), paths = found
    times = [0.0]
    for path in paths:
        with contextlib.suppress(OSError):
            times.append(path.lstat().st_mtime)
    return date, max(times)
