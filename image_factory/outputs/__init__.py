"""What a disk is turned into: each format is a row of a table."""

import dataclasses
import json
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..base import command
from ..base.errors import BuildError, ConfigurationError
from ..base.units import parse_percentage
from ..configuration.parsers import FIT
from ..disks.layouts import MIB
from ..model import Artifact, Build, Plan
from ..parts import State, Step, Steps, mounted
from ..sources import SOURCES
from ..system import mounts
from . import incus, packed, qemu, trees
from .kind import Output, run_commands
from .raw import RAW

_UNITS = {1 << 20: "MiB", 1 << 30: "GiB"}

# All that has to know a format reads it here.
OUTPUTS: dict[str, Output] = {"raw": RAW, **qemu.OUTPUTS, **packed.OUTPUTS, **trees.OUTPUTS, **incus.OUTPUTS}


def formats(plan: Plan) -> list[str]:
    """Return the formats of the artifacts of *plan* in their order: raw too if it is to be kept."""
    wanted = plan.settings.format
    return [*wanted, *(["raw"] if plan.settings.keep_raw and "raw" not in wanted else [])]


def file_name(plan: Plan, name: str) -> str:
    """Return the name of the artifact of *plan* in the format *name*."""
    return plan.file_name(OUTPUTS[name].suffix)


def planned(plan: Plan, directory: Path) -> list[Artifact]:
    """Return the artifacts that *plan* will have in *directory*, of 0 bytes where the size is not known."""
    settings = plan.settings
    return [
        Artifact(directory / file_name(plan, name), name, settings.image_size or 0, name in settings.format)
        for name in formats(plan)
    ]


def check_names(plan: Plan) -> None:
    """Raise ConfigurationError if two artifacts of *plan* have the same file name."""
    seen: dict[str, str] = {}
    for name in formats(plan):
        other = seen.setdefault(file_name(plan, name), name)
        if other != name:
            raise ConfigurationError(
                f"[{plan.image}] format: {other} and {name} have the same file name, {file_name(plan, name)}.",
                hint=f"Have one of them made in a section that is based-on = {plan.image}.",
            )


def check(plan: Plan) -> None:
    """Raise ConfigurationError if a format of *plan* is of no use alone, or the system's files can't be read for it."""
    wanted = formats(plan)
    for name in wanted:
        beside = OUTPUTS[name].beside
        if beside and not {*beside} & {*wanted}:
            raise ConfigurationError(
                f"[{plan.image}] format: {name} only says what an image is, and goes with the image itself.",
                hint=f"Have one of {', '.join(beside)} made, too: format = {beside[-1]}, {name}",
            )
    if any(OUTPUTS[name].made_from == "tree" for name in wanted):
        mounts.reading_way(plan)


def check_sizes(plan: Plan) -> None:
    """Raise ConfigurationError if it is known now that the disk of *plan* has a size that a format can't have."""
    for name in _made(plan):
        unfit = _unfit(name, SOURCES[plan.settings.source].disk_size(plan))
        if not unfit and plan.settings.image_size == FIT and OUTPUTS[name].unit > MIB:
            unfit = f"{name} has disks of whole {_UNITS[OUTPUTS[name].unit]}, which image-size = fit makes none of."
        if unfit:
            raise ConfigurationError(f"[{plan.image}] format: {unfit}", hint="Set another image-size.")


def _unfit(name: str, size: int) -> str:
    """Return why no disk of *size* bytes can be in the format *name*, empty if one can."""
    output = OUTPUTS[name]
    if output.largest is not None and size > output.largest:
        return f"{name} has disks of {output.largest >> 30} GiB at most, and this one has {size} bytes."
    if size % output.unit:
        return f"{name} has disks of whole {_UNITS[output.unit]}, and this one has {size} bytes."
    return ""


def programs(plan: Plan) -> list[str]:
    """Return the programs that make the artifacts of *plan*."""
    return [program for name in _made(plan) for program in OUTPUTS[name].programs]


def _made(plan: Plan) -> list[str]:
    """Return the formats that are made for *plan* in the order in which they are, those that others pack among them."""
    wanted = formats(plan)
    packed = [OUTPUTS[name].packs for name in wanted if OUTPUTS[name].packs]
    # The raw image is the disk itself, and none can be written after it.
    return sorted(dict.fromkeys([*wanted, *packed]), key=lambda name: (OUTPUTS[name].takes_disk, OUTPUTS[name].packs))


def steps(build: Build) -> Steps:
    """Give the steps that write the artifacts: those of the tree first, as the raw disk may be an artifact then."""
    of_tree = [name for name in _made(build.plan) if OUTPUTS[name].made_from == "tree"]
    if of_tree:
        commands = [argv for name in of_tree for argv in _commands(build, name)]
        commands += [trees.LIST_ARGV] if build.plan.settings.manifest_text else []
        step = Step(
            f"Packing {', '.join(of_tree)}",
            partial(_pack, of_tree),
            commands,
            calls=[trees.call(build.plan)],
            rehearsed=False,
        )
        yield mounted([step], lambda build: build.disk_path, read_only=True)
    side_by_side = [name for name in _made(build.plan) if _is_apart(OUTPUTS[name])]
    if len(side_by_side) > 1:
        commands = [argv for name in side_by_side for argv in _commands(build, name)]
        yield Step(f"Making {', '.join(side_by_side)}", partial(_write_together, side_by_side), commands)
    else:
        side_by_side = []
    for name in _made(build.plan):
        if name not in (*of_tree, *side_by_side):
            yield Step(OUTPUTS[name].step, partial(_write, name), _commands(build, name))


def _is_apart(output: Output) -> bool:
    """Return whether one command makes *output* of the disk, and of nothing else that is made of it."""
    return output.made_from == "disk" and output.write is run_commands and not output.packs


def _write_together(names: Sequence[str], state: State) -> State:
    """Make the artifacts of the formats *names* side by side.

    Several programs for them, such as gzip and qemu-img for a VMDK, have work for one processor only.
    """
    for name in names:
        _check_size(name, state)
    command.together([argv for name in names for argv in _commands(state.build, name)], progress=parse_percentage)
    for name in names:
        state = _finished(name, state)
    return state


def _check_size(name: str, state: State) -> None:
    # What was not known before: the size of an image that is downloaded, or of a disk that fits.
    unfit = _unfit(name, state.disk.path.stat().st_size)
    if unfit:
        raise BuildError(f"{file_name(state.build.plan, name)} can't be made: {unfit}", hint="Set an image-size.")


def _write(name: str, state: State) -> State:
    _check_size(name, state)
    OUTPUTS[name].write(OUTPUTS[name], state, state.build.directory / file_name(state.build.plan, name))
    return _finished(name, state)


def _finished(name: str, state: State) -> State:
    """Return *state* with the artifact of the format *name*, which its program has made."""
    plan, output = state.build.plan, OUTPUTS[name]
    path, size = state.build.directory / file_name(plan, name), state.disk.path.stat().st_size
    if plan.source_date is not None:
        output.settle(path, plan.source_date)
    order = formats(plan)
    if output.packs and output.packs not in order and name == _last_packer(plan, output.packs):
        (state.build.directory / file_name(plan, output.packs)).unlink()
    if name not in order:
        return state
    return _with(state, Artifact(path, name, size, name in plan.settings.format))


def _with(state: State, *made: Artifact) -> State:
    order = formats(state.build.plan)
    written = sorted([*state.artifacts, *made], key=lambda one: order.index(one.format))
    return dataclasses.replace(state, artifacts=tuple(written))


def _commands(build: Build, name: str) -> Sequence[Sequence[str]]:
    return OUTPUTS[name].commands(build, build.directory / file_name(build.plan, name))


def _pack(names: Sequence[str], state: State) -> State:
    """Make the artifacts of the formats *names* of the mounted system."""
    plan, size = state.build.plan, state.disk.path.stat().st_size
    paths = {name: state.build.directory / file_name(plan, name) for name in names}
    trees.pack(paths, state)
    return _with(state, *(Artifact(path, name, size, name in plan.settings.format) for name, path in paths.items()))


def _last_packer(plan: Plan, packed: str) -> str:
    return [name for name in _made(plan) if OUTPUTS[name].packs == packed][-1]


# What was made is read again.


def disk_of(build: Build, size: int = 0) -> Artifact:
    """Return the disk itself, of *size* bytes, for who looks at artifacts where none of them can be opened."""
    return Artifact(build.disk_path, "raw", size, upload=False)


def opened(artifact: Artifact) -> str:
    """Return by which name QEMU's programs open *artifact*, as the driver that the table says."""
    output = OUTPUTS[artifact.format]
    if not output.packs:
        return str(artifact.path)
    found: dict[str, object] = {"offset": "OFFSET", "size": "SIZE"}
    # A dry run shows what is not there yet.
    if artifact.path.exists():
        try:
            with tarfile.open(artifact.path, "r:") as archive:
                member = archive.getmembers()[-1]
        except (OSError, tarfile.TarError) as error:
            raise BuildError(f"{artifact.path.name} is not what was made: {error}") from error
        found = {"offset": member.offset_data, "size": -(-member.size // 512) * 512}
    place = {"driver": "raw", **found, "file": {"driver": "file", "filename": str(artifact.path)}}
    return f"json:{json.dumps({'driver': output.driver, 'file': place})}"


def raw_copy_argv(artifact: Artifact, copy: Path) -> list[str]:
    """Return the command that writes what a guest would see of *artifact* to the file *copy*, which is sparse."""
    output = OUTPUTS[artifact.format]
    if output.driver:
        # ``-m``, ``-W``: as when it was made, several processors have something to do.
        ways = ["-m", "16", "-W", "-f", output.driver, "-O", "raw"]
        return ["qemu-img", "convert", *ways, opened(artifact), str(copy)]
    return _unpacked(artifact, copy, 'dd of="$to" bs=64K iflag=fullblock conv=sparse status=none')


def compare_argv(artifact: Artifact, copy: Path) -> list[str]:
    """Return the command whose status is 1 if a guest would see something else of *artifact* than is in *copy*."""
    output = OUTPUTS[artifact.format]
    if output.driver:
        return ["qemu-img", "compare", "-f", "raw", "-F", output.driver, str(copy), opened(artifact)]
    return _unpacked(artifact, copy, 'cmp - "$to"')


def _unpacked(artifact: Artifact, copy: Path, reader: str) -> list[str]:
    # bash, as what ends with an error in the middle of a pipe has to be seen.
    script = f'from=$1 to=$2; shift 2; "$@" <"$from" | {reader}'
    words = OUTPUTS[artifact.format].unpacking
    return ["bash", "-o", "pipefail", "-c", script, "bash", str(artifact.path), str(copy), *words]
