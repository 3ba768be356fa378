"""Make a disk with the distribution's own installer, run by virt-install."""

import dataclasses
import hashlib
import os
import platform
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ...base import command, events, files
from ...base.cleanup import released
from ...base.errors import BuildError, ConfigurationError
from ...base.files import check_readable
from ...base.log import logger, masked
from ...configuration.parsers import Source
from ...configuration.settings import ANSWER_FILE_KEYS, Dependent, ImageSettings
from ...downloads import fetch, verify
from ...machines import arch, kvm, libvirt, turns
from ...model import Build, Given, Plan
from ...parts import Group, State, Step, carry_out, doing
from .. import answers, forms
from ..kind import DiskSource, idle_beside
from . import answercheck, delivery, machinecheck, virt_install

_URL = re.compile(r"https?://\S+", re.IGNORECASE)

# These settings name what an installer is made from.
_KEYS = ("linux", "initrd", "installer-image")
_DEPENDENT: Dependent = {
    "linux-sha256": ("linux", lambda settings: not settings.installer_image),
    "initrd-sha256": ("initrd", lambda settings: not settings.installer_image),
    "installer-image-sha256": ("installer-image", lambda settings: bool(settings.installer_image)),
    **idle_beside("installer"),
}


def _named(keys: Sequence[str]) -> str:
    return " and ".join(f"'{key}'" for key in keys)


def check_settings(name: str, settings: ImageSettings) -> None:
    """Raise ConfigurationError unless *settings* name an installer, and one answer file at most."""
    given = [key for key in ANSWER_FILE_KEYS if getattr(settings, key)]
    if len(given) > 1:
        raise ConfigurationError(
            f"[{name}] has {_named(given)}. An image has one answer file.", hint="Remove all but one."
        )
    if settings.installer_image:
        return
    missing = [key for key in ("linux", "initrd") if not getattr(settings, key)]
    if missing:
        what = {
            "linux": "It is the URI of the netboot kernel.",
            "initrd": "It is the URI of the netboot initrd.",
            "linux initrd": "They are the URIs of the netboot kernel and initrd.",
        }[" ".join(missing)]
        raise ConfigurationError(
            f"[{name}] lacks {_named(missing)}. {what}",
            hint="Or name an ISO or an installation tree with 'installer_image'.",
        )


def template_keys(path: Path) -> set[str] | None:
    """Return the keys that the answer file *path*, and what it includes, asks for or declares; None for any key."""
    return answers.keys_asked_for(path)


def declared_keys(path: Path, arch: str) -> dict[str, forms.Key]:
    """Return the keys that the answer file *path*, and what it includes, declares for *arch*, by name."""
    return answers.declared_keys(path, arch)


def answers_of(plan: Plan) -> bytes | None:
    """Return the answer file as the installer gets it, None if there is none."""
    return answers.content(plan) if plan.settings.answer_file else None


def identity(plan: Plan, used: Sequence[events.InputUsed] = ()) -> dict[str, str]:
    """Return a digest of each setting that makes an installed disk another one.

    *used* is what the installer got: the files themselves may have changed since, or be gone.  Without it they are
    made anew, as they would be now.
    """
    settings = plan.settings
    sources = {key: getattr(settings, key.replace("-", "_")) for key in _KEYS}
    texts = {key: source.uri for key, source in sources.items() if source is not None}
    texts |= {"append": settings.append, "image-size": str(settings.image_size)}
    digests = {key: _digest(text.encode()) for key, text in texts.items()}
    key = settings.answer_file_key
    if key:
        copy = next((event.path for event in used if event.key == key), None)
        digests[key] = files.digest_of(copy) if copy else _digest(answers.content(plan))
    if settings.answer_files:
        copies = [event.path for event in used if event.key == "answer-files" and event.path]
        paths = copies or [file.path for file in settings.answer_files]
        names = [file.name for file in settings.answer_files]
        digests["answer-files"] = _digest(repr(list(zip(names, map(_digest_if_there, paths), strict=False))).encode())
    return digests


def original(plan: Plan, used: events.InputUsed) -> events.InputUsed | None:
    """Return the input *used* of a build that is resumed, None if the installer did not get a copy of it.

    The original is as it was, or the build would not be resumed; what a template became is gone.
    """
    if used.key == plan.settings.answer_file_key:
        source = plan.settings.answer_file
        return dataclasses.replace(used, path=None if source is None or answers.is_template(source) else source)
    return dataclasses.replace(used, path=Path(used.origin)) if used.key == "answer-files" else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_if_there(path: Path) -> str:
    try:
        return files.digest_of(path)
    except OSError:
        return ""


def programs(plan: Plan) -> list[str]:
    """Return the programs that the installation needs."""
    names = ["qemu-img", "virsh", "virt-install", arch.ARCHITECTURES[plan.settings.arch].qemu]
    settings = plan.settings
    names += delivery.programs(settings)
    if any(source.by_rsync for source in _sources(settings).values()):
        names.append("rsync")
    if settings.installer_image and not is_tree(settings.installer_image):
        names.append("xorriso")
    return names + verify.programs(settings, _sources(settings).values())


def _sources(settings: ImageSettings) -> dict[str, Source]:
    """Return what the installer is made from, by key: installer_image, else linux and initrd."""
    keys = ("installer_image",) if settings.installer_image else ("linux", "initrd")
    return {key: getattr(settings, key) for key in keys}


def downloads(plan: Plan) -> bool:
    """Return whether a build of *plan* brings files into the cache."""
    settings = plan.settings
    if settings.offline or (settings.installer_image and is_tree(settings.installer_image)):
        return False
    return any(source.path is None for source in _sources(settings).values())


def remote(plan: Plan) -> list[tuple[str, str, bool]]:
    """Return the settings and URIs of what the installer is fetched from, each with whether that is a file."""
    return [
        (key.replace("_", "-"), uri, not (key == "installer_image" and is_tree(source)))
        for key, source in _sources(plan.settings).items()
        if source.path is None and not plan.settings.offline
        for uri in source.uris
    ]


def urls_of_guest(plan: Plan) -> dict[str, str]:
    """Return the URLs that the template of *plan* asks for, by key: mirrors, a proxy."""
    path = plan.settings.answer_file
    asked = answers.keys_asked_for(path) if path else set()
    names = sorted(plan.variables) if asked is None else sorted(asked)
    found = {}
    for name in names:
        try:
            value = plan.variables[name.replace("-", "_")].strip()
        except (KeyError, ConfigurationError):
            continue
        if _URL.fullmatch(value):
            found[name] = value
    return found


def is_tree(source: Source) -> bool:
    """Return whether *source* is an installation tree, which virt-install reads itself, and no ISO file."""
    if source.path is not None:
        return os.path.isdir(source.path)
    return not source.name.lower().endswith(".iso")


def check(plan: Plan) -> None:
    """Raise ConfigurationError if a file that the installer needs can't be read, or is to be cached and isn't."""
    for key, source in _sources(plan.settings).items():
        if key == "installer_image" and is_tree(source):
            _check_tree(plan, source)
        if source.path is not None:
            check_readable(f"[{plan.image}] {key}", source.path, directory=key == "installer_image")
        elif key != "installer_image" and not source.name:
            raise ConfigurationError(f"[{plan.image}] {key}: {source.uri} names no file.")
        elif key == "installer_image" and source.by_rsync and is_tree(source):
            raise ConfigurationError(
                f"[{plan.image}] {key}: virt-install reads no tree by rsync.", hint="Give its http or https URL."
            )
    if plan.settings.answer_file:
        check_readable(f"[{plan.image}] {plan.settings.answer_file_key}", plan.settings.answer_file)
    delivery.check(plan)
    for file in plan.settings.answer_files:
        check_readable(f"[{plan.image}] answer-files", file.path)
    answercheck.check(plan)
    verify.Verifier(plan).check_cache(_sources(plan.settings))


def disk_size(plan: Plan) -> int:
    """Return the bytes that the disk may grow to."""
    assert plan.settings.image_size
    return plan.settings.image_size


def check_machine(plan: Plan) -> None:
    """Raise ConfigurationError if there is no such machine, or not here."""
    machinecheck.check_machine(plan)


def check_here(plan: Plan) -> None:
    """Raise ConfigurationError if libvirt does not answer, or can't use the output directory."""
    machinecheck.check_output_dir(plan)
    libvirt.check()


def warn(plan: Plan) -> None:
    """Warn of what the installer may not like in the answer file."""
    answercheck.warn(plan)


def measure(plan: Plan) -> None:
    """Warn of a libvirt that is slow where KVM does not work."""
    machinecheck.warn_of_slow_libvirt(plan)


def _check_tree(plan: Plan, tree: Source) -> None:
    """Raise ConfigurationError if *tree*, which virt-install reads itself, has to be what it can't be."""
    where = f"[{plan.image}] installer_image"
    if tree.mirrors:
        raise ConfigurationError(f"{where}: an installation tree has one URI, as virt-install reads it itself.")
    if plan.settings.installer_image_sha256:
        raise ConfigurationError(f"{where}: an installation tree has no SHA-256.", hint="Name an ISO file.")
    if tree.path is None and (plan.settings.verify == "required" or plan.settings.offline):
        raise ConfigurationError(
            f"{where}: virt-install fetches an installation tree itself, and verifies nothing.",
            hint="Name the kernel and initrd of the tree with 'linux' and 'initrd'.",
        )


def create_argv(build: Build) -> list[str]:
    """Return the command that makes the empty disk."""
    return ["qemu-img", "create", "-q", "-f", "raw", str(build.disk_path), str(disk_size(build.plan))]


def _netboot(build: Build) -> Path:
    return build.directory / "netboot"


def steps(build: Build) -> Iterator[Step | Group]:
    """Give the steps that make the disk."""
    installation = _Installation()
    yield Step("Creating the disk", doing(_create), [create_argv(build)])
    yield Step("Caching the installer", doing(installation.cache), _fetches(build))
    settings = build.plan.settings
    probes = []
    if kvm.has_to_probe(settings.virt_type, settings.arch):
        probes.append(Step("Probing KVM", installation.probe, [kvm.probe_argv(Path("KERNEL"), settings.arch)]))
    argvs = virt_install.installing_argvs(build, _media(build), _virt_type(settings))
    install = Step("Installing", doing(installation.install), argvs)
    yield Group([*probes, Group([*delivery.seed_steps(build), install], _with_seed)], _in_turn)


def explain(build: Build) -> None:
    """Log the end of the console, where the installer says what has failed."""
    virt_install.log_console(build)


def given(build: Build) -> Given:
    """Return what the installer of *build* got."""
    return delivery.given(build)


def _virt_type(settings: ImageSettings) -> str:
    """Return what virtual machines can use as far as it is known before KVM is probed."""
    if kvm.has_to_probe(settings.virt_type, settings.arch):
        return "VIRT-TYPE"
    return "qemu" if settings.virt_type == "auto" else settings.virt_type


class _Installation:
    """State that the steps of an installation share: the media that are booted, and the installer's kernel."""

    def __init__(self) -> None:
        self._media: virt_install.Media | None = None
        self._kernel: Path | None = None

    def cache(self, state: State) -> None:
        self._media, self._kernel = prepare_installer(state.build)
        _copy_answer_file(state.build)

    def probe(self, state: State) -> State:
        plan = state.build.plan
        return _with_virt_type(state, kvm.probed_virt_type(self._kernel, plan.settings.arch, as_root=plan.as_root))

    def install(self, state: State) -> None:
        assert self._media is not None
        events.tell(events.VirtTypeChosen(state.build.virt_type))
        virt_install.install(state.build, self._media)


def _create(state: State) -> None:
    # Others get through the working directory of root's builds.
    command.run(create_argv(state.build), umask=0o077)


def _in_turn(state: State, steps: Sequence[Step | Group]) -> State:
    """Carry out *steps* when this machine has room; who waits holds up no one, and has done what needs no machine."""
    settings = state.build.plan.settings
    if settings.virt_type == "auto" and not arch.is_host(settings.arch):
        logger.info("KVM runs no %s on %s: it is emulated.", settings.arch, platform.machine())
    with turns.taken(settings.max_parallel, settings.ram, settings.cores):
        return carry_out(_with_virt_type(state, _virt_type(settings)), steps)


def _with_virt_type(state: State, virt_type: str) -> State:
    return dataclasses.replace(state, build=dataclasses.replace(state.build, virt_type=virt_type))


def _with_seed(state: State, steps: Sequence[Step | Group]) -> State:
    with released(partial(delivery.remove_seed, state.build)):
        return carry_out(state, steps)


def _fetches(build: Build) -> list[list[str]]:
    """Return the commands that bring the installer and the answer file."""
    plan = build.plan
    settings = plan.settings
    fetches = []
    for key, source in _sources(settings).items():
        if source.path is not None or (key == "installer_image" and is_tree(source)):
            continue
        target = plan.cache_dir / source.name
        fetches += [fetch.command_of(uri, target) for uri in (() if settings.offline else source.uris)]
    if settings.answer_file:
        copy = delivery.copy_path(build)
        verb = "render" if answers.is_template(settings.answer_file) else "copy"
        fetches.append(["#", verb, str(settings.answer_file), "->", str(copy)])
        fetches += [["#", "copy", str(file.path), "->", str(copy.parent / file.name)] for file in settings.answer_files]
    if settings.installer_image and not is_tree(settings.installer_image) and settings.virt_type == "auto":
        # The build tries one after the other until it finds a kernel.
        fetches += [extract_argv(build, _own_iso(build), kernel) for kernel in _kernels(build)]
    return fetches


def _media(build: Build) -> tuple[str, str]:
    """Return virt-install's arguments for what is booted."""
    image = build.plan.settings.installer_image
    if image is None:
        return _location(build)
    if is_tree(image):
        return "--location", str(image.path or image.uri)
    return _location_of_iso(build, _own_iso(build))


def _location(build: Build) -> tuple[str, str]:
    # The names in one directory of its own are free of what virt-install's option syntax knows.
    return "--location", virt_install.option(str(_netboot(build)), "kernel=linux", "initrd=initrd")


def _own_iso(build: Build) -> Path:
    # virt-install would make a storage pool in a directory without one, and leave it there.
    return build.directory / "installer.iso"


def _location_of_iso(build: Build, iso: Path) -> tuple[str, str]:
    names = zip(("kernel", "initrd"), delivery.boot_files(build.plan.settings), strict=False)
    return "--location", virt_install.option(str(iso), *(f"{key}={name}" for key, name in names))


def prepare_installer(build: Build) -> tuple[virt_install.Media, Path | None]:
    """Return what virt-install boots, and the installer's kernel where it is known."""
    settings = build.plan.settings
    sources = _sources(settings)
    if settings.installer_image and is_tree(settings.installer_image):
        path = settings.installer_image.path
        events.tell(events.InputUsed("installer-image", masked(settings.installer_image.uri), None))
        arguments = "--location", str(path.absolute() if path else settings.installer_image.uri)
        return virt_install.Media(arguments, arguments), _kernel_of_tree(build, path)
    verifier = verify.Verifier(build.plan)
    _netboot(build).mkdir(mode=0o755)
    with verifier.locked(sources.values()):
        if settings.installer_image is None:
            linux, initrd = (_fetch(name, sources[name], verifier, _netboot(build) / name) for name in sources)
            if sources["linux"].path is None:
                verifier.check_modules(linux.uri, linux.path)
            kept = "--install", virt_install.option(f"kernel={linux.path}", f"initrd={initrd.path}")
            return virt_install.Media(_location(build), kept), _netboot(build) / "linux"
        own = _own_iso(build)
        iso = _fetch("installer-image", settings.installer_image, verifier, own)
    return virt_install.Media(_location_of_iso(build, own), _location_of_iso(build, iso.path)), _kernel_of_iso(
        build, own
    )


def _fetch(key: str, source: Source, verifier: verify.Verifier, own: Path) -> fetch.Fetched:
    """Fetch *source*, and make *own* a name of it that no other build touches."""
    found = verifier.fetch(key, source)
    found = dataclasses.replace(found, path=found.path.absolute())
    events.tell(events.InputUsed(key, masked(found.uri), found.path, found.verified_by))
    if source.path is None:
        fetch.take(found.path, own)
    else:
        own.symlink_to(found.path)
    return found


def _copy_answer_file(build: Build) -> None:
    key, source = build.plan.settings.answer_file_key, build.plan.settings.answer_file
    if key and source:
        events.tell(events.InputUsed(key, str(source), delivery.write_copy(build)))
    for path, copy in delivery.write_further(build):
        events.tell(events.InputUsed("answer-files", str(path), copy))


def _kernels(build: Build) -> tuple[str, ...]:
    return arch.ARCHITECTURES[build.plan.settings.arch].installer_kernels


def _kernel_of_tree(build: Build, path: Path | None) -> Path | None:
    if path is None:
        return None
    return next((path / kernel for kernel in _kernels(build) if (path / kernel).is_file()), None)


def _probe_kernel(build: Build) -> Path:
    return build.directory / "probe-kernel"


def extract_argv(build: Build, iso: Path, kernel: str) -> list[str]:
    """Return the command that copies *kernel* out of *iso*."""
    return ["xorriso", "-osirrox", "on", "-indev", str(iso), "-extract", f"/{kernel}", str(_probe_kernel(build))]


def _kernel_of_iso(build: Build, iso: Path) -> Path | None:
    """Copy the kernel of *iso* out of it, for the probe of KVM; None if it isn't found."""
    if build.plan.settings.virt_type != "auto":
        return None
    target = _probe_kernel(build)
    for kernel in _kernels(build):
        try:
            command.run(extract_argv(build, iso, kernel))
        except BuildError:
            continue
        os.chmod(target, 0o600)
        return target
    return None


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
    files=lambda plan: {key.replace("_", "-"): source for key, source in _sources(plan.settings).items()},
    dependent=_DEPENDENT,
    original=original,
    check_machine=check_machine,
    check_here=check_here,
    warn=warn,
    measure=measure,
    explain=explain,
    answer_files=ANSWER_FILE_KEYS,
    template_keys=template_keys,
    declared_keys=declared_keys,
    answers_of=answers_of,
    given=given,
    urls_of_guest=urls_of_guest,
)
