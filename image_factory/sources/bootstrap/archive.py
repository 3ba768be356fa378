"""What archives of Debian's kind have now of some packages: apt is asked, and nothing is installed."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...base import scratch
from ...base.errors import BuildError, CommandError
from ...inside import namespaces
from ...inside.namespaces import Namespaces
from ...model import Build, Plan
from . import bootstrap_argv, failures, packages, recipe

_SOURCE = re.compile(
    r"deb(?: \[(?:[^]]* )?signed-by=(?P<keyring>/usr/share/keyrings/[^] ]+)(?: [^]]*)?\]| \[[^]]*\])? (?P<rest>https?://.+)"
)
# Directories for that are of this user and of those that only namespaces have.
PREFIX = "image-factory-archive."
_NAMES, _OFFERED = "names", "offered"
_SECONDS = 900.0

# $3 is the working directory.  The status is that of a failure: mmdebstrap ends here.
_LOOK = f"""\
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG xargs --arg-file="$3/{_NAMES}" apt-cache policy >"$3/unfinished"
mv "$3/unfinished" "$3/{_OFFERED}"
exit 1
"""
# Of a system that another program has made nothing else is known.
_ANY = recipe.Recipe("", "minbase", (), (), recommends=True, debconf="", script="", proxy="")


@dataclass(frozen=True)
class Offered:
    """The versions of a package that archives have, the newest first, and the one that apt would install."""

    candidate: str
    versions: tuple[str, ...]


def offered(plan: Plan, sources: Sequence[str], names: Sequence[str]) -> dict[str, Offered]:
    """Return what the archives have of the packages *names*, by their names; of what they don't have, nothing.

    A name may have an architecture.  The archives are those of *sources*, lines of sources.list; of a plan that
    bootstraps they are its own.  BuildError if they can't be asked.
    """
    left = recipe.read(plan) if plan.settings.source == "bootstrap" else _of(sources)
    errors = list[BuildError]()
    while True:
        try:
            return _pinned(left, parsed(_asked(plan, left, names)))
        except failures.MirrorError as error:
            errors.append(error)
            others = None if plan.settings.offline else left.without(error.uri)
            if others is None:
                raise failures.together(errors) from error
            left = others


def _of(sources: Sequence[str]) -> recipe.Recipe:
    """Return a recipe that has the *sources*; BuildError if there is none."""
    found = [line for line in map(_believed, sources) if recipe.suite_of(line)]
    if not found:
        raise BuildError("The sources of its packages are not known.")
    return dataclasses.replace(_ANY, suite=recipe.suite_of(found[0]), sources=tuple((line,) for line in found))


def _believed(line: str) -> str:
    """Return the *line* of sources that a system has, as far as it may be used here; else nothing.

    The system is not trusted: apt is not to read files of this machine, nor to take what nobody has signed.
    """
    match = _SOURCE.fullmatch(line)
    if not match:
        return ""
    keyring = match["keyring"]
    is_here = keyring and ".." not in keyring and Path(keyring).is_file()
    return f"deb {f'[signed-by={keyring}] ' if is_here else ''}{match['rest']}"


def _asked(plan: Plan, wanted: recipe.Recipe, names: Sequence[str]) -> str:
    """Return what apt says of the packages *names* when it has the lists of the first mirrors of *wanted*."""
    with scratch.directory(PREFIX, namespaces.remove, large=True) as directory:
        # apt has a user of its own for what comes from the network.
        directory.chmod(0o711)
        build = Build(plan, directory, "")
        (directory / _NAMES).write_text("".join(f"{name}\n" for name in names), encoding="ascii")
        for name, text in packages.looking_scripts(plan, _LOOK).items():
            (directory / name).write_text(text, encoding="utf-8")
        packages.prepare(plan)
        with namespaces.entered(directory, as_root=plan.as_root) as inside:
            return _run(inside, build, wanted)


def _run(inside: Namespaces, build: Build, wanted: recipe.Recipe) -> str:
    printed = failures.Printed()
    tree = build.directory / "tree"
    try:
        inside.run(
            *bootstrap_argv(build, wanted, tree, wanted.lines),
            timeout=_SECONDS,
            progress=printed.take,
            variables={"TMPDIR": str(build.directory)},
            quiet=True,
        )
    except CommandError as error:
        found = build.directory / _OFFERED
        if not found.is_file():
            raise failures.explained(list(printed.lines), lambda name: []) from error
        return found.read_text(encoding="utf-8", errors="replace")
    raise BuildError("mmdebstrap has not asked apt.")


def remove_left() -> Iterator[Path]:
    """Remove the directories that killed builds of this user have left; give each."""
    return scratch.remove_left(PREFIX, namespaces.remove)


def parsed(text: str) -> dict[str, Offered]:
    """Return what ``apt-cache policy`` has said in *text*, by the names as it writes them."""
    found = {}
    for part in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        name, _, rest = part.partition(":\n")
        candidate = re.search(r"^  Candidate: (\S+)$", rest, re.MULTILINE)
        versions = re.findall(r"^ (?:\*\*\*|   ) (\S+) -?[0-9]+$", rest, re.MULTILINE)
        if candidate and versions:
            found[name] = Offered(candidate[1], tuple(versions))
    return found


def _pinned(wanted: recipe.Recipe, found: Mapping[str, Offered]) -> dict[str, Offered]:
    """Return *found* with the versions that *wanted* names as candidates, as long as they are there."""
    named = dict(word.split("=", 1) for word in wanted.packages if "=" in word)
    return {
        name: Offered(named[name], each.versions) if named.get(name) in each.versions else each
        for name, each in found.items()
    }
