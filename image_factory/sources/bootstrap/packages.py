"""The cache of packages, which builds share: what it has is taken only if a signed list names its digest."""

import hashlib
import os
import shlex
from pathlib import Path

from ...base import trust
from ...base.errors import ConfigurationError
from ...base.log import logger
from ...model import Build, Plan
from . import recipe, trees

# Beside the packages are the lists of each set of sources, for builds without a network.
_SUMS, _TAKEN = "package-sums", "packages-taken"
_BELIEVED = "Name another with --cache-dir, which belongs to you and where nobody else can write."

# $1 is the tree, $2 the cache ("" for none), $3 the working directory, $4 the file with the lists.
_UPDATE = """\
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get update --error-on=any
[ -z "$2" ] || {
    kept=$(mktemp "$2/.keep.XXXXXX")
    tar --exclude=./partial --exclude=./lock --create --file="$kept" --directory="$1/var/lib/apt/lists" . \
        --directory="$1/etc/apt" sources.list
    chmod 644 "$kept"
    mv "$kept" "$4"
}
"""
# The mirror that served is in the names of its lists.
_UNPACK = """\
tar --directory="$1/var/lib/apt/lists" --extract --file="$4"
[ ! -e "$1/var/lib/apt/lists/sources.list" ] || mv "$1/var/lib/apt/lists/sources.list" "$1/etc/apt/sources.list"
"""
# No program of the tree has run yet, which could change what the digests are compared with.
_LIST = f"""\
/usr/lib/apt/apt-helper cat-file "$1"/var/lib/apt/lists/*_Packages* | sed -n 's/^SHA256: //p' >"$3/{_SUMS}"
: >"$3/{_TAKEN}"
[ -n "$2" ] || exit 0
"""
_TAKE = f"""\
mkdir -p "$1/var/cache/apt/archives/partial"
cd "$2"
find . -maxdepth 1 -type f -name '*.deb' -exec sha256sum {{}} + |
    awk 'NR == FNR {{ known[$1]; next }} $1 in known {{ print $2 }}' "$3/{_SUMS}" - >"$3/{_TAKEN}"
xargs --no-run-if-empty --arg-file="$3/{_TAKEN}" cp --target-directory="$1/var/cache/apt/archives"
# What builds that were killed have left here; those that run need no hour for a package.
find . -maxdepth 1 -type f \\( -name '.keep.*' -o -name '.image-factory.*' \\) -mmin +60 -delete
"""
# Another build may keep the same at this moment, and a program of the tree may have put something else here.
_KEEP = f"""\
[ -n "$2" ] || exit 0
cd "$1/var/cache/apt/archives"
find . -maxdepth 1 -type f -name '*.deb' | grep --invert-match --line-regexp --fixed-strings --file="$3/{_TAKEN}" |
    xargs --no-run-if-empty sha256sum |
    awk 'NR == FNR {{ known[$1]; next }} $1 in known {{ print $2 }}' "$3/{_SUMS}" - |
    while read -r package; do
        kept=$(mktemp "$2/.keep.XXXXXX")
        cp "$package" "$kept"
        chmod 644 "$kept"
        mv "$kept" "$2/$package"
    done
"""


def directory(plan: Plan) -> Path:
    """Return where packages are kept for later builds of any image."""
    # What a link leads to: who could change the link could choose another directory after it was looked at.
    return Path(os.path.realpath(plan.settings.cache_dir)) / "packages"


def _lists(plan: Plan, wanted: recipe.Recipe) -> Path:
    """Return the file with the lists of the sources of *wanted*, from whichever mirrors."""
    every = [line for mirrors in wanted.sources for line in mirrors]
    text = "\n".join([recipe.architecture(plan), plan.settings.verify, str(plan.settings.keyring), *every])
    return directory(plan) / f"lists-{hashlib.sha256(text.encode()).hexdigest()[:16]}.tar"


def check(plan: Plan, wanted: recipe.Recipe) -> None:
    """Warn if the cache is not used; ConfigurationError if a build without a network needs it, and lacks the lists."""
    doubt = trust.why_not(directory(plan))
    lists = _lists(plan, wanted)
    if not plan.settings.offline:
        if doubt:
            logger.warning("The cache is not used, all is downloaded for this build alone: %s. %s", doubt, _BELIEVED)
        return
    if doubt:
        raise ConfigurationError(f"--offline: what is in {directory(plan)} is not believed: {doubt}.", hint=_BELIEVED)
    if not trust.own(lists):
        raise ConfigurationError(
            f"--offline: {directory(plan)} has no lists of the packages of these sources.",
            hint="Build once without --offline, with the same sources and the same cache.",
        )


def programs(plan: Plan) -> list[str]:
    """Return what begins the command that installs packages: without a network where none is to be used."""
    return ["unshare", "--net", "--"] if plan.settings.offline else []


def options(plan: Plan) -> list[str]:
    """Return mmdebstrap's options for lists that are taken from the cache."""
    return ["--skip=update"] if plan.settings.offline else []


def scripts(plan: Plan) -> dict[str, str]:
    """Return the scripts that take packages from the cache, and keep them there, by their names."""
    offline = plan.settings.offline
    take = [_UNPACK if offline else _UPDATE, _LIST, trees.FIND.replace("SUMS", _SUMS), _TAKE]
    return {"take-packages": "".join(take), "keep-packages": "" if offline else _KEEP}


def looking_scripts(plan: Plan, look: str) -> dict[str, str]:
    """Return the scripts that only *look* at the lists, once they are there, by their names."""
    take, keep = scripts(plan)
    return {take: (_UNPACK if plan.settings.offline else _UPDATE) + look, keep: ""}


def hooks(build: Build, wanted: recipe.Recipe) -> tuple[str, str]:
    """Return the lines of shell that run the scripts: before packages are installed, and after that."""
    plan = build.plan
    cache = "" if trust.why_not(directory(plan)) else str(directory(plan))
    asked_for = trees.asked_for(plan, wanted)
    words = shlex.join([cache, str(build.directory), str(_lists(plan, wanted)), *([asked_for] if asked_for else [])])
    take, keep = (shlex.quote(str(build.directory / name)) for name in scripts(plan))
    return f'sh -e {take} "$1" {words}', f'sh -e {keep} "$1" {words}'


def prepare(plan: Plan) -> None:
    """Make the directory of the cache; OSError where that can't be."""
    if not plan.settings.offline:
        trust.make(directory(plan))
