"""Trees of earlier builds in the cache: one is taken where no package has changed since, nor what is asked for.

apt has verified the lists of the archives by then, as for any build; one that has expired it refuses.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ... import __version__
from ...base import files
from ...inside.namespaces import Namespaces
from ...model import Build, Plan
from . import recipe

PROGRAMS = ("tar", "zstd", "sha256sum")

_NAME, _FOUND = "tree-name", "tree-found"
# One that no build has taken for so long is removed.
_UNUSED_SECONDS = 14 * 24 * 3600

# Ends mmdebstrap where the cache $2 has a tree of these packages, and of $5, what is asked for.  $3 is the working
# directory, SUMS has the digest of each package of the lists.
FIND = f"""\
[ -z "${{5-}}" ] || {{
    tree=$2/tree-$5-$(sha256sum <"$3/SUMS" | cut -c -32).tar.zst
    echo "$tree" >"$3/{_NAME}"
    [ ! -f "$tree" ] || {{
        : >"$3/{_FOUND}"
        echo "No package has changed: the tree of an earlier build is taken, and mmdebstrap ends here."
        exit 1
    }}
}}
"""

_KINDS = ("--acls", "--xattrs", "--xattrs-include=*", "--numeric-owner")


def asked_for(plan: Plan, wanted: recipe.Recipe) -> str:
    """Return a digest of all that makes the tree another one, but for the packages; empty if none is kept."""
    if not plan.settings.cache_tree:
        return ""
    settings = plan.settings
    told = [__version__, dataclasses.asdict(wanted), recipe.architecture(plan), settings.verify, str(settings.keyring)]
    return hashlib.sha256(json.dumps([*told, plan.source_date, plan.as_root]).encode()).hexdigest()[:32]


def is_found(build: Build) -> bool:
    """Return whether the cache has a tree of what this build would install."""
    return (build.directory / _FOUND).exists()


def forget(build: Build) -> None:
    """Remove the tree that was found, which is of no use."""
    (build.directory / _FOUND).unlink()
    _path(build).unlink(missing_ok=True)


def _path(build: Build) -> Path:
    return Path((build.directory / _NAME).read_text(encoding="utf-8").removesuffix("\n"))


def has_place(build: Build) -> bool:
    """Return whether the tree of this build can be kept: the cache is believed."""
    return (build.directory / _NAME).exists()


def taking_argvs(tree: Path, kept: Path | str) -> list[list[str]]:
    """Return the commands that make *tree* of the one that is *kept*."""
    extracting = ["tar", "--extract", "--use-compress-program=zstd", *_KINDS]
    return [
        ["mkdir", str(tree)],
        [*extracting, "--same-owner", "--preserve-permissions", f"--directory={tree}", f"--file={kept}"],
    ]


def keeping_argv(tree: Path, kept: Path | str) -> list[str]:
    """Return the command that writes *tree* to the file *kept*."""
    compressing = "--use-compress-program=zstd -1 --threads=0"
    return ["tar", "--create", compressing, *_KINDS, "--sparse", f"--directory={tree}", f"--file={kept}", "."]


def take(inside: Namespaces, build: Build, tree: Path) -> None:
    """Make *tree* of the one that was found; BuildError if it can't be read."""
    path = _path(build)
    for argv in taking_argvs(tree, path):
        inside.run(*argv)
    # Another build may have put a newer one in its place meanwhile.
    with suppress(FileNotFoundError):
        os.utime(path)


def keep(inside: Namespaces, build: Build, tree: Path) -> None:
    """Have *tree* in the cache, in the place of older ones of the same; BuildError or OSError if that fails."""
    path = _path(build)
    # It has the passwords that the system has.
    with files.staged(path, mode=0o600) as unfinished:
        inside.run(*keeping_argv(tree, unfinished))
    same = path.name.rpartition("-")[0]
    for other in _all_in(path.parent):
        is_old = other.name.startswith(f"{same}-") or other.stat().st_mtime < time.time() - _UNUSED_SECONDS
        if other != path and is_old:
            other.unlink(missing_ok=True)


def _all_in(cache: Path) -> Sequence[Path]:
    return [*cache.glob("tree-*.tar.zst")]
