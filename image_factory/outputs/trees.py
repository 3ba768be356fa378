"""Formats of the tree: what the system's files are, and no disk."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base import command
from ..base.errors import BuildError, CommandError
from ..model import Build, Plan
from ..parts import State, tree_of
from ..system import privileged
from ..system.rehearsal import Call
from ..system.tree import Tree
from . import netboot, oci
from .kind import Output

Argv = Sequence[str]


def _processors() -> int:
    # With one alone they write in another form.
    return max(2, len(os.sched_getaffinity(0)))


def _pigz() -> Argv:
    return ["pigz", "--no-name", "--no-time", "--processes", str(_processors()), "--stdout"]


def _nothing(build: Build, path: Path) -> None:
    pass


def _any_tree(plan: Plan, tree: Tree) -> None:
    pass


@dataclass(frozen=True)
class _Packing:
    """How a file is made of the tar of the tree, and read again.

    *sinks* are the files into which the tar goes, each with the programs before it; *finish* makes the artifact of
    them, by the commands *finishing*.  *reading* is the command that turns the artifact, its stdin, into a tar again;
    of that and the tree's the audit compares what each of *views* prints: a command, too.  *check* raises BuildError
    for a tree that the format can't have.
    """

    sinks: Callable[[Path], Sequence[tuple[Path, Sequence[Argv]]]]
    reading: Callable[[Path], Argv]
    finish: Callable[[Build, Path], None] = _nothing
    finishing: Callable[[Build, Path], Sequence[Argv]] = lambda build, path: []
    views: tuple[str, ...] = ("cat",)
    check: Callable[[Plan, Tree], None] = _any_tree


def _filtered(filters: Callable[[], Sequence[Argv]], reading: str) -> _Packing:
    return _Packing(lambda path: [(path, filters())], lambda path: reading.split())


def _squashfs_sinks(path: Path) -> list[tuple[Path, Sequence[Argv]]]:
    # It opens the file by its name, and prints nothing.
    words = ["tar2sqfs", "--quiet", "--force", "--no-skip", "--compressor", "zstd", "--num-jobs", str(_processors())]
    return [(path, [[*words, str(path)]])]


def _oci_sinks(path: Path) -> list[tuple[Path, Sequence[Argv]]]:
    return [(oci.layer_path(path), [_pigz()]), (oci.digest_path(path), [["sha256sum"]])]


_WSL_FILE, _RESOLVER = "etc/wsl-distribution.conf", "etc/resolv.conf"


def _check_wsl(plan: Plan, tree: Tree) -> None:
    """Raise BuildError unless *tree* has what WSL installs by, and not what it makes itself."""
    if not tree.entries([_WSL_FILE]):
        raise BuildError(
            f"The system has no /{_WSL_FILE}, which the format wsl needs.",
            hint=f"Have it copied: copy = wsl-distribution.conf:/{_WSL_FILE}",
        )
    if tree.entries([_RESOLVER]) and _RESOLVER not in plan.settings.tar_exclude:
        raise BuildError(
            f"The system has /{_RESOLVER}, which WSL writes itself.", hint=f"Leave it out: tar-exclude = /{_RESOLVER}"
        )


# The entries of a tar, and the contents of all of its files.
_ENTRIES = "tar -tvv --numeric-owner --xattrs --utc -f -"
_CONTENTS = "tar -xOf -"
# What a ramdisk has of its own, and no attributes.
_PLAIN_ENTRIES = "tar -tvv --numeric-owner --utc -f -"
_NOT_OWN = " ".join(f"--exclude={name}" for name in netboot.OWN)
_GZIP = _filtered(lambda: [_pigz()], "gzip -dc")
# curtin and MAAS know tar, gzip and xz, Eikon zstd too.
_PACKINGS = {
    "tar": _filtered(list, "cat"),
    "tar.gz": _GZIP,
    "tgz": _GZIP,
    "tar.xz": _filtered(lambda: [["xz", f"--threads={_processors()}", "--stdout"]], "xz -dc --threads=0"),
    "tar.zst": _filtered(lambda: [["zstd", "--threads=0", "--quiet", "--stdout"]], "zstd -dcq"),
    "squashfs": _Packing(
        _squashfs_sinks,
        lambda path: ["sqfs2tar", "--root-becomes", ".", "--no-skip", "/dev/stdin"],
        views=(_ENTRIES, _CONTENTS),
    ),
    "oci": _Packing(_oci_sinks, oci.reading_argv, oci.assemble, lambda build, path: [oci.assembling_argv(build, path)]),
    "wsl": _Packing(lambda path: [(path, [_pigz()])], lambda path: ["gzip", "-dc"], check=_check_wsl),
    "netboot": _Packing(
        lambda path: [(netboot.tree_path(path), [])],
        netboot.reading_argv,
        lambda build, path: netboot.assemble(build, path, _pigz()),
        lambda build, path: netboot.commands(build, path, _pigz()),
        views=tuple(f"{view} {_NOT_OWN}" for view in (_PLAIN_ENTRIES, _CONTENTS)),
    ),
}
# A path a line; what would be none stands as \\n and the like.
LIST_ARGV: Argv = ["tar", "--list", "--quoting-style=escape", "--file=-"]
_PROGRAMS = {
    "tar": (),
    "tar.xz": ("xz",),
    "tar.zst": ("zstd",),
    "squashfs": ("tar2sqfs", "sqfs2tar"),
    "oci": ("pigz", "gzip", "sha256sum"),
    "netboot": ("pigz", "gzip", "bsdtar"),
}
_SUFFIXES = {"oci": "oci.tar", "netboot": "netboot.tar"}


def _row(name: str, packing: _Packing) -> Output:
    def commands(build: Build, path: Path) -> list[Argv]:
        filters = [argv for _, each in packing.sinks(path) for argv in each]
        return [*filters, *packing.finishing(build, path)]

    programs = ("tar", "bash", "cmp", *_PROGRAMS.get(name, ("pigz", "gzip")))
    return Output(f"Packing {name}", _SUFFIXES.get(name, name), commands, programs=programs, made_from="tree")


OUTPUTS = {name: _row(name, packing) for name, packing in _PACKINGS.items()}


def tar_options(plan: Plan) -> list[str]:
    """Return the options of tar that the settings of *plan* ask for."""
    date = [] if plan.source_date is None else [f"--mtime=@{plan.source_date}"]
    return [*(f"--exclude=./{pattern}" for pattern in plan.settings.tar_exclude), *date]


def call(plan: Plan) -> Call:
    """Return the call on the mounted system that reads all of it."""
    return Call("contents", tuple(tar_options(plan)))


def list_path(build: Build) -> Path:
    """Return where the list of the files of the tree is while a build runs that asks for it."""
    return build.directory / "files.txt"


def pack(targets: dict[str, Path], state: State) -> None:
    """Make the files *targets*, by their formats, of the system that is mounted, which is read once for all."""
    tree, build = tree_of(state), state.build
    for name in targets:
        _PACKINGS[name].check(build.plan, tree)
    sinks = [sink for name, path in targets.items() for sink in _PACKINGS[name].sinks(path)]
    if build.plan.settings.manifest_text:
        sinks.append((list_path(build), [LIST_ARGV]))
    with tree.contents(tar_options(build.plan)) as argv, privileged.refusal_told():
        command.flow(argv, sinks, env=privileged.environment())
    for name, path in targets.items():
        _PACKINGS[name].finish(build, path)


def reading_argv(name: str, path: Path) -> list[str]:
    """Return the command that turns the file *path* of the format *name*, its stdin, into a tar."""
    return [*_PACKINGS[name].reading(path)]


def comparing(name: str, path: Path) -> list[list[str]]:
    """Return the commands that read a tar, and fail with status 1 if the file *path* of format *name* has another one.

    What turns the file into a tar is to come to a good end, too.
    """
    script = 'exec 3<&0; from=$1 view=$2; shift 2; "$@" <"$from" | $view | cmp - <($view <&3)'
    words = reading_argv(name, path)
    return [["bash", "-o", "pipefail", "-c", script, "bash", str(path), view, *words] for view in _PACKINGS[name].views]


def compare(artifacts: Sequence[tuple[str, Path]], state: State) -> None:
    """Raise BuildError unless each of *artifacts* has the files of the system that is mounted, and nothing else."""
    commands = [(argv, path) for name, path in artifacts for argv in comparing(name, path)]
    sinks = [(Path(os.devnull), [argv]) for argv, _ in commands]
    with tree_of(state).contents(tar_options(state.build.plan)) as source, privileged.refusal_told():
        try:
            command.flow(source, sinks, env=privileged.environment())
        except CommandError as error:
            path = next((path for argv, path in commands if argv == error.argv), None)
            if path is None:
                raise
            raise BuildError(f"{path.name} has not the files of the disk: {error.said}") from error
