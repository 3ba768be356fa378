"""See to it that a finished system has inside what its targets need: drivers, agents, arguments of the kernel."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..base import interrupts
from ..base.errors import BuildError, ConfigurationError
from ..base.log import logger
from ..model import Build, Plan
from ..outputs import OUTPUTS, targets
from ..outputs.targets import Target
from ..parts import State, Step, tree_of
from ..sources import SOURCES
from ..system import partitions
from ..system.kernels import Kernel, kernels
from ..system.rehearsal import Call
from ..system.tree import Tree
from . import copying
from .copying import Item

KEY = "target"
_CURTIN, _DPKG = "curtin", "var/lib/dpkg/status"

_PLACES = ("usr/bin", "usr/sbin", "bin", "sbin", "usr/local/bin", "usr/local/sbin")
_BOOT_FILES = (
    "boot/grub/grub.cfg", "boot/grub2/grub.cfg", "boot/grub2/grubenv", "boot/loader/entries/*.conf",
    "boot/efi/loader/entries/*.conf", "etc/kernel/cmdline",
)  # fmt: skip
_ARGUMENTS = re.compile(r"^\s*(?:linux\w*|options|kernelopts)\b[ \t=](.*)$", re.MULTILINE)
# What cloud-init is configured by.
CLOUD_FILES = ("etc/cloud/cloud.cfg", "etc/cloud/cloud.cfg.d/*.cfg")
_DATASOURCES = re.compile(r"^datasource_list:\s*(\[[^\]]*\]|(?:\n\s*-[^\n]*)+)", re.MULTILINE)
_LONGEST_TEXT = 1 << 20


# Before the build.


def programs(plan: Plan) -> list[str]:
    """Return the programs that reading an initramfs needs: one of lz4 is rare, and is asked for when it is there."""
    arch = plan.settings.arch
    reads = any(target.needs(key, arch) for target in targets.chosen(plan.settings) for key in ("initramfs", "modules"))
    return ["dd", "gzip", "xz", "zstd"] if reads else []


def check(plan: Plan) -> None:
    """Raise ConfigurationError if what the recipe of *plan* says tells now that a target will lack something.

    Nothing is known where tasks or copies bring more, or there is no recipe.
    """
    settings = plan.settings
    if not settings.target or plan.tasks or plan.late_tasks or settings.copy or settings.elements:
        return
    recipe = SOURCES[settings.source].answers_of(plan)
    if recipe is None:
        return
    text = f"{recipe.decode(errors='replace')}\n{settings.append}"
    missing = _Missing()
    for target in targets.chosen(settings):
        for need in target.needs("needs", settings.arch):
            packages = [name for word in need.split("|") for name in targets.packages(word)]
            if packages and not any(re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text) for name in packages):
                missing.note(target, f"the recipe has no {_or(need)}", f"Add to packages: {_or('|'.join(packages))}.")
        for argument in target.needs("kernel-arguments", settings.arch):
            if argument not in text:
                hint = f"Add to the kernel arguments of the system: {argument}."
                missing.note(target, f"the recipe has no kernel argument {argument}", hint)
    if missing.found:
        raise ConfigurationError(f"[{plan.image}] {missing.message}", hint=missing.hint)


def _or(words: str) -> str:
    return " or ".join(dict.fromkeys(words.split("|")))


@dataclass
class _Missing:
    """What targets lack, each with what is to be done."""

    found: list[tuple[Target, str]] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def note(self, target: Target, what: str, hint: str) -> None:
        self.found.append((target, what))
        self.hints.append(hint)

    @property
    def message(self) -> str:
        """What is missing, by target; those that lack the same are named together."""
        lacking: dict[str, list[str]] = {}
        for target, what in self.found:
            lacking.setdefault(what, []).append(target.name)
        parts: dict[str, list[str]] = {}
        for what, names in lacking.items():
            parts.setdefault(", ".join(names), []).append(what)
        sentences = [f"{names}: {', '.join(found)}" for names, found in parts.items()]
        return f"{KEY} {'; '.join(sentences)}."

    @property
    def hint(self) -> str:
        """What is to be done, each once."""
        return " ".join(dict.fromkeys(self.hints))


# In the finished system.


def steps(build: Build) -> Iterator[Step]:
    """Give the step on the mounted system, if there are targets."""
    if build.plan.settings.target:
        told = [
            ["#", f"{target.name}: {' '.join(targets.sentences(target)[1:])}"]
            for target in targets.chosen(build.plan.settings)
        ]
        calls = (Call("look"), Call("read", (*_BOOT_FILES,)), Call("put"))
        yield Step("Checking what the targets need", _fit, told, calls=calls, rehearsed=False)


def _fit(state: State) -> State:
    """Raise BuildError, after all has been looked at, unless the mounted system has what its targets need."""
    build, tree = state.build, tree_of(state)
    wanted = targets.chosen(build.plan.settings)
    missing = _Missing()
    size = state.disk.path.stat().st_size
    # Reading changes nothing, so a signal may come at any point.
    with interrupts.interruptible():
        system = _System(build, tree)
        for target in wanted:
            unfit = targets.too_large(target, size)
            if unfit:
                missing.note(target, unfit.rstrip("."), "Set another image-size.")
            _check(target, system, missing)
    if missing.found:
        raise BuildError(f"[{build.plan.image}] {missing.message}", hint=missing.hint)
    if system.curtin is None and any(target.says("curtin") for target in wanted):
        # curtin takes the filesystem that has it for the root; empty, it says that curtin's own hooks are to run.
        copying.put(build, tree, [Item(_CURTIN, "directory")], KEY)
    logger.info("The system has what %s needs.", " and ".join(build.plan.settings.target))
    return state


class _System:
    """What is known of a mounted system, read when it is asked for."""

    def __init__(self, build: Build, tree: Tree) -> None:
        self.build, self.tree = build, tree
        arch = build.plan.settings.arch
        wanted = targets.chosen(build.plan.settings)
        needs = [need for target in wanted for key in ("needs", "tree-needs") for need in target.needs(key, arch)]
        paths = [_DPKG, _CURTIN, *(path for need in needs for path in _paths(need))]
        # Each look may be a process of its own.
        self._there = tree.look(list(dict.fromkeys(paths)))

    @functools.cached_property
    def kernels(self) -> list[Kernel]:
        """Its kernels."""
        return [*kernels(self.tree, self.build.directory)]

    @property
    def is_rpm(self) -> bool:
        """Whether its packages are of rpm's kind."""
        return _DPKG not in self._there

    @property
    def curtin(self) -> str | None:
        """What /curtin is, None if it is not there."""
        found = self._there.get(_CURTIN)
        return found.kind if found else None

    def has(self, need: str) -> bool:
        """Return whether one of the programs and paths of *need* is there."""
        return any(path in self._there for path in _paths(need))

    @functools.cached_property
    def arguments(self) -> list[str]:
        """The words that boot loaders give the kernel."""
        texts = self.tree.read(_BOOT_FILES)
        found: list[str] = []
        for path, data in texts.items():
            text = data.decode(errors="replace")
            for line in [text] if path == "etc/kernel/cmdline" else _ARGUMENTS.findall(text):
                found += line.split()
        return found

    @functools.cached_property
    def datasources(self) -> list[str] | None:
        """What cloud-init asks, None if it asks all."""
        return datasources(self.tree.read(CLOUD_FILES))

    @functools.cached_property
    def swap(self) -> str | None:
        """What is swap space, None if nothing is."""
        text = (self.tree.load("etc/fstab", _LONGEST_TEXT) or b"").decode(errors="replace")
        lines = (line.split() for line in text.splitlines() if not line.lstrip().startswith("#"))
        in_fstab = next((words[0] for words in lines if len(words) > 2 and words[2] == "swap"), None)
        on_disk = (volume.name for volume in self.tree.volumes if volume.filesystem == partitions.SWAP)
        return next(on_disk, in_fstab)

    def has_user(self, name: str) -> bool:
        """Return whether there is a user *name*."""
        text = (self.tree.load("etc/passwd", _LONGEST_TEXT) or b"").decode(errors="replace")
        return any(line.startswith(f"{name}:") for line in text.splitlines())


def datasources(files: Mapping[str, bytes]) -> list[str] | None:
    """Return what cloud-init asks by *files*, those of CLOUD_FILES that there are; None if it asks all."""
    found = None
    for _, data in sorted(files.items()):
        for match in _DATASOURCES.findall(re.sub(r"#.*", "", data.decode(errors="replace"))):
            found = re.findall(r"\w+", match)
    return found


def _paths(need: str) -> list[str]:
    """Return where the programs and files of *need* may be."""
    words = need.split("|")
    return [path for word in words for path in ([word] if "/" in word else [f"{top}/{word}" for top in _PLACES])]


def _check(target: Target, system: _System, missing: _Missing) -> None:
    """Note what the *system* lacks for *target*."""
    plan = system.build.plan
    arch = plan.settings.arch
    made = target.made_of(plan.settings.format)
    needs = target.needs("needs", arch)
    if any(OUTPUTS[name].made_from == "tree" for name in made):
        needs += target.needs("tree-needs", arch)
    for need in needs:
        if not system.has(need):
            packages = [targets.packages(word)[system.is_rpm :] for word in need.split("|")]
            named = "|".join(name for names in packages for name in (names if system.is_rpm else names[:1]))
            hint = f"Add to packages: {_or(named)}." if named else f"Have a task or copy make /{need.split('|')[0]}."
            missing.note(target, f"the system has no {_or(need)}", hint)
    _check_modules(target, system, missing)
    asked_for = target.needs("kernel-arguments", arch)
    arguments = system.arguments if asked_for or target.says("screen") else []
    for argument in asked_for:
        if not any(word == argument or word.startswith(f"{argument},") for word in arguments):
            hint = f"Add to the kernel arguments of the system: {argument}."
            missing.note(target, f"the kernel is not started with {argument}", hint)
    consoles = [word for word in arguments if word.startswith("console=")]
    if target.says("screen") and consoles and "console=tty0" not in consoles:
        hint = "Add to the kernel arguments of the system, before the others: console=tty0."
        missing.note(target, f"with {' '.join(dict.fromkeys(consoles))} alone a machine's screen stays empty", hint)
    if target.says("no-swap") and (swap := system.swap):
        missing.note(target, f"there is swap on {swap}", "Have the answer file make none.")
    for name in target.needs("users", arch):
        if not system.has_user(name):
            missing.note(target, f"there is no user {name}", f"Have a task make the user {name}.")
    sources = target.needs("datasource", arch)
    asked = system.datasources if sources else None
    if asked is not None and not {*sources} & {*asked}:
        name = sources[0]
        hint = f"Add {name} to datasource_list in /etc/cloud/cloud.cfg.d, or take the list out."
        missing.note(target, f"cloud-init does not look for {name}", hint)
    if target.says("curtin") and system.curtin not in (None, "directory"):
        missing.note(target, f"/{_CURTIN} is no directory", f"Have /{_CURTIN} be an empty directory.")


def _check_modules(target: Target, system: _System, missing: _Missing) -> None:
    arch = system.build.plan.settings.arch
    early, late = target.needs("initramfs", arch), target.needs("modules", arch)
    if not early and not late:
        return
    if not system.kernels:
        missing.note(target, "the system has no kernel", "Add a kernel to packages.")
    for kernel in system.kernels:
        if lacking := kernel.lacking((*early, *late)):
            usual = "kernel-modules, on SUSE kernel-default" if system.is_rpm else "Debian's linux-image-ARCH is one"
            hint = f"Have the distribution's usual kernel in its place: {usual}."
            missing.note(target, f"the kernel {kernel.version} has no {' '.join(lacking)}", hint)
        if absent := kernel.absent_early(early):
            if system.is_rpm:
                hint = f"Add to packages: dracut-config-generic, or have dracut add_drivers: {' '.join(absent)}."
            else:
                hint = f"Add to /etc/initramfs-tools/modules, and run update-initramfs: {' '.join(absent)}."
            missing.note(target, f"the initramfs of {kernel.version} has no {' '.join(absent)}", hint)
