"""Make a disk of an existing image: a file of this machine, or one that is downloaded and verified."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...base import command, events
from ...base.errors import ConfigurationError
from ...base.files import check_readable
from ...base.log import masked
from ...base.units import parse_percentage
from ...configuration.parsers import Source
from ...configuration.settings import ImageSettings
from ...downloads import fetch, verify
from ...machines import kvm
from ...model import Build, Plan
from ...parts import State, Step, doing
from ...system import appliance
from ..kind import DiskSource, idle_beside
from . import formats, growing, opening, unpacking

_KEYS = ("source-image",)


def check_settings(name: str, settings: ImageSettings) -> None:
    """Raise ConfigurationError unless *settings* name an image."""
    if settings.source_image is None:
        raise ConfigurationError(
            f"[{name}] has source = image and no 'source-image'.", hint="It is the path or the URI of a disk image."
        )


def _source(plan: Plan) -> Source:
    assert plan.settings.source_image is not None
    return plan.settings.source_image


def identity(plan: Plan, used: Sequence[events.InputUsed] = ()) -> dict[str, str]:
    """Return a digest of each setting that makes the disk another one; of a local image its state counts."""
    source = _source(plan)
    texts = {"source-image": repr((source.uri, _state(source.path))), "image-size": str(plan.settings.image_size)}
    return {key: hashlib.sha256(text.encode()).hexdigest() for key, text in texts.items()}


def _state(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path else None
    except OSError:
        status = None
    return (status.st_size, status.st_mtime_ns) if status else None


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs, as far as the image is known."""
    source = _source(plan)
    names = ["qemu-img", *verify.programs(plan.settings, [source])]
    if source.by_rsync:
        names.append("rsync")
    if compression := _compression(source):
        names += ["prlimit", compression.program]
    if plan.settings.image_size:
        names += appliance.programs(plan)
    return names


def _compression(source: Source) -> unpacking.Compression | None:
    """Return how *source* is compressed, which only its name tells before it is fetched."""
    if source.path is not None and os.path.isfile(source.path):
        return unpacking.compression_of(source.path)
    return unpacking.compression_named(source.name)


def downloads(plan: Plan) -> bool:
    """Whether a build of *plan* brings the image into the cache."""
    return _source(plan).path is None and not plan.settings.offline


def remote(plan: Plan) -> list[tuple[str, str, bool]]:
    """Return the setting and the URIs of the image."""
    return [("source-image", uri, True) for uri in _source(plan).uris] if downloads(plan) else []


def check(plan: Plan) -> None:
    """Raise ConfigurationError if the image can't be read, is unfit or too large, or is to be cached and isn't."""
    source = _source(plan)
    where = f"[{plan.image}] source-image"
    if source.path is None and not source.name:
        raise ConfigurationError(f"{where}: {source.uri} names no file.")
    if source.path is not None:
        _check_local(plan, where, source.path)
    if plan.settings.image_size:
        appliance.check(plan)
    verify.Verifier(plan).check_cache({"source-image": source})


def _check_local(plan: Plan, where: str, path: Path) -> None:
    check_readable(where, path)
    try:
        found = None if unpacking.is_packed(path) else formats.format_of(path)
    except OSError as error:
        raise ConfigurationError(f"{where}: {path} can't be read: {error.strerror}.") from error
    except formats.UnfitError as error:
        raise ConfigurationError(f"{where}: {error.message}", hint=error.hint) from error
    size = plan.settings.image_size
    if found and size and size < found.size:
        known = growing.too_small(plan.image, size, found.size)
        raise ConfigurationError(known.message, hint=known.hint)


def disk_size(plan: Plan) -> int:
    """Return the bytes that the disk may grow to, 0 where that is not known yet."""
    path = _source(plan).path
    known = formats.format_of(path).size if path and not unpacking.is_packed(path) else 0
    return plan.settings.image_size or known


def _own(build: Build) -> Path:
    """Return the name of the image in the working directory, which no other build touches."""
    return build.directory / "source"


def steps(build: Build) -> Iterator[Step]:
    """Give the steps that make the disk."""
    own, settings = _own(build), build.plan.settings
    yield Step("Caching the source image", _cache, _fetches(build))
    compression = _compression(_source(build.plan))
    packed = own.with_name(own.name + compression.suffix) if compression else own
    yield Step(
        unpacking.STEP,
        doing(lambda state: unpacking.unpack(_own(state.build))),
        [unpacking.unpack_argv(compression, packed, "SIZE")] if compression else [],
        when=lambda state: unpacking.is_packed(_own(state.build)),
    )
    driver = _driver(build.plan)
    commands = [convert_argv(build, driver)]
    if driver in opening.CHECKED or driver == _UNKNOWN:
        commands.insert(0, opening.check_argv(own, driver))
    yield Step("Copying the source image", doing(_copy), commands)
    if _needs_machine(build.plan) and kvm.has_to_probe(settings.virt_type, settings.arch):
        yield Step("Probing KVM", _probe, [kvm.probe_argv(Path("KERNEL"), settings.arch)])
    if settings.image_size:
        yield Step(growing.STEP, doing(_grow), growing.commands(build))


_UNKNOWN = "FORMAT"


def _driver(plan: Plan) -> str:
    path = _source(plan).path
    return _UNKNOWN if path is None or unpacking.is_packed(path) else formats.format_of(path).driver


def _fetches(build: Build) -> list[list[str]]:
    """Return the commands that bring the image."""
    source = _source(build.plan)
    if source.path is not None or build.plan.settings.offline:
        return []
    target = build.plan.cache_dir / source.name
    return [fetch.command_of(uri, target) for uri in source.uris]


def _cache(state: State) -> State:
    build = state.build
    source, own = _source(build.plan), _own(state.build)
    verifier = verify.Verifier(build.plan)
    with verifier.locked([source]):
        found = verifier.fetch("source-image", source)
        path = found.path.absolute()
        events.tell(events.InputUsed("source-image", masked(found.uri), path, found.verified_by))
        if source.path is None:
            fetch.take(path, own)
        else:
            opening.take(path, own)
    return _with_virt_type(state, "kvm" if build.plan.settings.virt_type == "kvm" else "qemu")


def convert_argv(build: Build, driver: str) -> list[str]:
    """Return the command that makes the disk of the image."""
    return [
        "qemu-img", "convert",
        "-f", driver,
        "-O", "raw",
        "-p",
        "-m", "16",
        "-W",
        str(_own(build)),
        str(build.disk_path),
    ]  # fmt: skip


def _copy(state: State) -> None:
    build = state.build
    # Its name in the working directory says nothing to anyone.
    driver = opening.checked(_own(build), masked(_source(build.plan).uri)).driver
    # Others get through the working directory of root's builds.
    command.run(convert_argv(build, driver), umask=0o077, progress=parse_percentage)
    os.unlink(_own(build))


def _needs_machine(plan: Plan) -> bool:
    """Whether the build starts a virtual machine: for the test boot, or libguestfs' appliance."""
    settings = plan.settings
    return settings.test_boot or settings.mount_via == "guestfs" or settings.image_size is not None


def _probe(state: State) -> State:
    """Find out what virtual machines can use; QEMU is run by the build itself, not by libvirt."""
    virt_type = kvm.probed_virt_type(kvm.kernel_here(), state.build.plan.settings.arch, as_root=False)
    return _with_virt_type(state, virt_type)


def _with_virt_type(state: State, virt_type: str) -> State:
    events.tell(events.VirtTypeChosen(virt_type))
    return dataclasses.replace(state, build=dataclasses.replace(state.build, virt_type=virt_type))


def _grow(state: State) -> None:
    size = state.build.plan.settings.image_size
    assert size
    growing.grow(state.build, state.disk, size)


SOURCE = DiskSource(
    keys=_KEYS,
    check_settings=check_settings,
    identity=identity,
    steps=steps,
    programs=programs,
    check=check,
    disk_size=disk_size,
    downloads=downloads,
    remote=remote,
    files=lambda plan: {"source-image": _source(plan)},
    # Without it the disk has the size of the image.
    defaults={"image-size": None},
    dependent=idle_beside("image"),
)
