"""Commands on a tree that stay in it: programs of this machine follow a tree's symbolic links from their own root."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from .making import Inside

# $1 is the tree, the others are paths in it, which need not be there yet.
CHECK = """\
tree=$(realpath -e "$1") && shift && realpath -m "$@" | while read -r found; do
    case $found in
    "$tree"/*) ;;
    *) echo "a symbolic link of the tree leads out of it, to $found" >&2 && exit 1 ;;
    esac
done
"""


def check_argv(tree: Path, paths: Iterable[str]) -> tuple[str, ...]:
    """Return the command that fails where one of *paths* of *tree* leads out of it."""
    return ("sh", "-c", CHECK, "sh", str(tree), *paths)


def guarded(tree: Path, commands: Sequence[Inside]) -> list[Inside]:
    """Return *commands* with what fails where a path of *tree* in them leads out of it: before them all, and again
    after each program of the tree itself, which may have made a link.
    """
    found: list[Inside] = []
    rest = [*commands]
    while rest:
        end = next((number for number, each in enumerate(rest, 1) if each.words[0] == "chroot"), len(rest))
        paths = dict.fromkeys(_paths(tree, rest))
        if paths:
            found.append(Inside(check_argv(tree, paths)))
        found += rest[:end]
        del rest[:end]
    return found


def _paths(tree: Path, commands: Iterable[Inside]) -> Iterable[str]:
    return (word for each in commands for word in each.words if word.startswith(f"{tree}/"))
