"""The file beside an image that says how a target gets it: the commands, with the image's own name in them."""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from ..base import files
from ..model import Artifact, Build, Plan
from ..outputs import targets
from ..outputs.targets import Target
from ..parts import State, Step

_VARIABLE = re.compile(r"\$\{([a-z0-9.]+)\}")
_PLAIN = re.compile(r"[A-Za-z0-9._+~@/:-]*")
# Of distributions whose systems MAAS has to know as Red Hat's.
_RED_HAT = ("centos", "rocky", "almalinux", "red", "oracle")


def suffix_of(target: Target) -> str:
    """Return what the name of the file for *target* ends with, after that of the image."""
    return f".{target.name}.txt"


def steps(build: Build) -> Iterator[Step]:
    """Give the step that writes the files, if there are targets."""
    if build.plan.settings.target:
        yield Step("Writing how to import", _write)


def _write(state: State) -> State:
    return dataclasses.replace(state, artifacts=tuple(add_texts(state.build.plan, state.artifacts)))


def add_texts(plan: Plan, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Write a file beside each of *artifacts* that a target takes; return them with these files."""
    found = []
    for artifact in artifacts:
        written = []
        for target in _of(plan, artifact):
            path = artifact.path.with_name(artifact.path.name + suffix_of(target))
            path.write_text(text(plan, target, artifact, artifacts), encoding="utf-8")
            written.append((path.name, files.digest_of(path)))
        found.append(dataclasses.replace(artifact, companions=(*artifact.companions, *written)))
    return found


def named(plan: Plan, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return *artifacts* with the names of what add_texts will write, for --dry-run."""
    return [
        dataclasses.replace(
            artifact,
            companions=(
                *artifact.companions,
                *((artifact.path.name + suffix_of(target), "") for target in _of(plan, artifact)),
            ),
        )
        for artifact in artifacts
    ]


def _of(plan: Plan, artifact: Artifact) -> list[Target]:
    """Return the targets that take *artifact*; of an image of several files it is the first one."""
    return [
        target
        for target in targets.chosen(plan.settings)
        if artifact.format in [names[0] for names in target.wholes(plan.settings.format)]
    ]


def text(plan: Plan, target: Target, artifact: Artifact, artifacts: Sequence[Artifact]) -> str:
    """Return what the file of *target* beside *artifact*, one of *artifacts*, says."""
    values = _values(plan, target, artifact) | {f"file.{each.format}": each.path.name for each in artifacts}
    keys = [f"import.{artifact.format}", f"import.{plan.settings.firmware}", "import"]
    commands = next((target.texts[key] for key in keys if key in target.texts), "")
    parts = [
        [f"{artifact.path.name} is for: {' '.join(targets.sentences(target))}"],
        [f"SHA-256: {artifact.sha256}", f"Size of the disk: {artifact.virtual_size} bytes"],
        [filled(line, values) for line in commands.strip().splitlines()],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def filled(line: str, values: Mapping[str, str]) -> str:
    """Return *line* with *values* for its ``${names}``; a word with one that is empty is left out.

    What stands in capitals is for the reader to replace.
    """
    words = []
    for word in line.split():
        used = [values[name] for name in _VARIABLE.findall(word)]
        if all(used):
            if all(map(_PLAIN.fullmatch, used)):
                words.append(_VARIABLE.sub(lambda match: values[match[1]], word))
            else:
                words.append(shlex.quote(_VARIABLE.sub(lambda match: values[match[1]], word.replace("'", ""))))
    return " ".join(words)


def _values(plan: Plan, target: Target, artifact: Artifact) -> dict[str, str]:
    settings = plan.settings
    distribution = (settings.distribution or "").lower().split(" ")[0]
    release = settings.release or ""
    translated = {"format": artifact.format, "arch": settings.arch, "firmware": settings.firmware}
    return {
        "name": artifact.path.name,
        "image": plan.image,
        "base": plan.base_name,
        # Of lower-case letters, digits and dashes, as clouds and Kubernetes have it.
        "label": re.sub(r"[^a-z0-9]+", "-", plan.base_name.lower()).strip("-")[:63].strip("-"),
        "distribution": distribution,
        "release": release,
        "redhat": f"rhel/{release.split('.')[0]}" if distribution in _RED_HAT and release else "",
        "sha256": artifact.sha256 or "",
        # In which the disk has room.
        "gigabytes": str(-(-artifact.virtual_size // (1 << 30))),
    } | {key: target.texts.get(f"{key}.{value}", value) for key, value in translated.items()}
