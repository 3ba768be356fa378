"""Make a disk of a tree that a package manager bootstraps: Debian and Ubuntu, by mmdebstrap."""

import dataclasses
import difflib
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ...base import command, events
from ...base.cleanup import released
from ...base.errors import BuildError, CommandError, ConfigurationError
from ...base.log import logger
from ...base.memory import free_memory
from ...base.units import format_size
from ...configuration.parsers import FIT
from ...configuration.settings import BOOTSTRAP_KEY, Dependent, ImageSettings, Task
from ...disks import bounds, layouts, making, notation
from ...inside import namespaces
from ...machines import arch
from ...machines.arch import FIRMWARES
from ...model import Build, Plan
from ...parts import Group, State, Step, carry_out, doing
from ...system import appliance
from ...tasks import namespace, running
from .. import answers
from ..kind import DiskSource, idle_beside
from . import failures, packages, recipe

# What a tree on a tmpfs must leave to others.
_SPARE_MEMORY = 1 << 30
# A tree may have so much where the disk has no size yet.
_USUAL_TREE = 4 << 30

# Of a root; the first where nothing is said.
_FILESYSTEMS = ("ext4", "xfs", "btrfs")

_TREE = "tree"
_COPY = "bootstrap.yaml"
_DEBCONF, _SCRIPT = "debconf", "script"
# apt and dpkg-deb take a quote, a backslash and a line break for their own, mtools a variable.
_UNFIT = re.compile(r"[\"\\$\x00-\x1f]")
# What a system's files have: an owner, a mode that gives rights, a capability (one that ping has); they are executed.
_PROBE = """\
import os, shutil, subprocess, sys
probe = f"{sys.argv[1]}/probe"
shutil.copy("/bin/true", probe)
try:
    for what, call in {
        "another owner": lambda: os.chown(probe, 1, 1),
        "a mode": lambda: os.chmod(probe, 0o4755),
        "a capability": lambda: os.setxattr(probe, "security.capability", b"\\1\\0\\0\\2\\0\\40".ljust(20, b"\\0")),
        "a program": lambda: subprocess.run([probe], check=True),
    }.items():
        try:
            call()
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"{what}: {getattr(error, 'strerror', None) or error}")
finally:
    os.unlink(probe)
"""
# $1 is the tree.
_NAMES = 'sed -n "s/^Package: //p" "$1"/var/lib/apt/lists/*_Packages'
_SECONDS = 4 * 3600.0


def _filesystem(settings: ImageSettings) -> str:
    return settings.filesystem or _FILESYSTEMS[0]


def check_settings(name: str, settings: ImageSettings) -> None:
    """Raise ConfigurationError unless *settings* name what to bootstrap."""
    if settings.bootstrap is None:
        raise ConfigurationError(
            f"[{name}] has source = bootstrap and no 'bootstrap'.", hint="It is the path of what is to be installed."
        )
    if _filesystem(settings) not in _FILESYSTEMS:
        raise ConfigurationError(
            f"[{name}] filesystem: {settings.filesystem!r} is not accepted, only {', '.join(_FILESYSTEMS)}.",
            hint=f"'image-factory --keys {name}' lists all keys.",
        )
    if settings.layout in FIRMWARES and settings.layout != settings.firmware:
        raise ConfigurationError(
            f"[{name}] has layout = {settings.layout} and firmware = {settings.firmware}.",
            hint="Leave one of them out: the layout has what the firmware boots.",
        )


def _is_foreign(plan: Plan) -> bool:
    return recipe.architecture(plan) != arch.ARCHITECTURES[arch.default_arch()].debian


def check_architecture(plan: Plan) -> None:
    """Raise ConfigurationError if no disk is made of the architecture, or none that boots as it is to."""
    settings, name = plan.settings, recipe.architecture(plan)
    if settings.layout == "filesystem":
        return
    if not arch.ARCHITECTURES[settings.arch].machines:
        raise ConfigurationError(
            f"[{plan.image}] arch: a tree of {name} can be made, and no disk that boots.",
            hint="Set layout = filesystem. Disks of amd64, i386 and arm64 boot.",
        )
    accepted = ["bios"] if name == "i386" else [*arch.ARCHITECTURES[settings.arch].machines]
    if settings.firmware not in accepted:
        raise ConfigurationError(
            f"[{plan.image}] firmware: {name} has no {settings.firmware}.", hint=f"Use {' or '.join(accepted)}."
        )


def check_emulation(plan: Plan) -> None:
    """Raise ConfigurationError unless this machine runs programs of the tree's architecture."""
    name = recipe.architecture(plan)
    try:
        command.run(emulation_argv(name), quiet=True)
    except BuildError as error:
        raise ConfigurationError(
            f"[{plan.image}] arch: this machine runs no programs of {name}.",
            hint="Install what emulates them, and registers it as binfmt_misc(5): apt-get install qemu-user-static",
        ) from error


def emulation_argv(name: str) -> list[str]:
    """Return the command that fails unless this machine runs programs of the architecture *name* of Debian's."""
    return ["arch-test", name]


def layout_of(plan: Plan, identity: layouts.Identity = layouts.UNKNOWN) -> layouts.Layout:
    """Return how the disk is laid out, with *identity*; ConfigurationError says what is wrong with a user's layout."""
    settings = plan.settings
    # The machine of a 32-bit system is the 64-bit one.
    system = "i386" if recipe.architecture(plan) == "i386" else settings.arch
    root = layouts.root_of(_filesystem(settings), settings.root_label or "", settings.mkfs_options)
    if isinstance(settings.layout, Path):
        scheme = notation.read(settings.layout, root)
    else:
        scheme = layouts.scheme(settings.layout or settings.firmware, system, root)
    firmware = settings.firmware if scheme.table else None
    return layouts.Layout(scheme, firmware, system, disk_size(plan), identity, plan.source_date)


def check_layout(plan: Plan) -> None:
    """Raise ConfigurationError if the layout is wrong, or the disk can't have it."""
    layout = layout_of(plan)
    if not layout.firmware and plan.settings.test_boot:
        raise ConfigurationError(
            f"[{plan.image}] test-boot = yes: a filesystem without a partition table has no boot loader.",
            hint="Set test-boot = no, or another layout.",
        )
    if layout.firmware:
        layouts.check_firmware(layout.scheme, layout.firmware, f"The layout {plan.settings.layout}")
    if not layout.size and not layout.scheme.can_fit:
        raise ConfigurationError(
            f"[{plan.image}] image-size = fit: the layout has no ext4 root that comes last and gets all that is left.",
            hint="Set a size such as 4G, or have the root be the last partition, of size 100%.",
        )
    most = layouts.LABELS[_filesystem(plan.settings)]
    if len(plan.settings.root_label or "") > most:
        raise ConfigurationError(
            f"[{plan.image}] root-label: {_filesystem(plan.settings)} has labels of at most {most} characters.",
            hint="Choose a shorter one.",
        )
    # What does not fit is told.
    _ = layout.pieces


def identity(plan: Plan, used: Sequence[events.InputUsed] = ()) -> dict[str, str]:
    """Return a digest of each setting that makes the disk another one."""
    texts = {BOOTSTRAP_KEY: answers.content(plan), "image-size": str(plan.settings.image_size).encode()}
    settings = plan.settings
    texts["arch"] = recipe.architecture(plan).encode()
    texts["firmware"] = settings.firmware.encode()
    # The file of a layout may have changed.
    texts["layout"] = repr(layout_of(plan).scheme).encode()
    texts["extra-size"] = str(settings.extra_size).encode()
    texts |= namespace.identity(plan)
    return {key: hashlib.sha256(data).hexdigest() for key, data in texts.items()}


def original(plan: Plan, used: events.InputUsed) -> events.InputUsed | None:
    """Return the input *used* of a build that is resumed; what a template became is gone."""
    path = plan.settings.bootstrap
    assert path
    return dataclasses.replace(used, path=None if answers.is_template(path) else path)


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    foreign = ["arch-test"] if _is_foreign(plan) else []
    inside = [*namespaces.programs(as_root=plan.as_root), *namespace.programs(plan)]
    return ["mmdebstrap", *foreign, *inside, *making.programs(layout_of(plan))]


def remote(plan: Plan) -> list[tuple[str, str, bool]]:
    """Return the lists of the archives that packages come from, or the proxy that brings them."""
    wanted = recipe.read(plan)
    if plan.settings.offline:
        return []
    if wanted.proxy:
        return [(BOOTSTRAP_KEY, wanted.proxy, False)]
    return [(BOOTSTRAP_KEY, uri, True) for uri in recipe.lists(wanted) if uri.startswith(("http:", "https:"))]


def check(plan: Plan) -> None:
    """Raise ConfigurationError if the recipe, the layout, or the path that the tree would have, is wrong."""
    packages.check(plan, recipe.read(plan))
    if match := _UNFIT.search(str(plan.work_path)):
        raise ConfigurationError(
            f"[{plan.image}] output-dir: {str(plan.output_dir)!r} has {match[0]!r} in it, as no path of a tree may.",
            hint="apt, dpkg-deb or mtools take it for something else: build elsewhere with --output-dir.",
        )
    check_architecture(plan)
    check_layout(plan)


def check_here(plan: Plan) -> None:
    """Raise ConfigurationError unless there are namespaces here, and memory where the tree has to be in it."""
    if _is_foreign(plan):
        check_emulation(plan)
    namespaces.check(as_root=plan.as_root)
    check_memory(plan)
    kinds = [each.kind for each in layout_of(plan).scheme.filesystems if each.kind in layouts.APPLIANCE]
    if kinds:
        appliance.check_kernel(f"The filesystem {kinds[0]}")


def disk_size(plan: Plan) -> int:
    """Return the bytes that the disk may grow to, 0 if it is as small as the tree lets it."""
    return plan.settings.image_size or 0


def _tree(build: Build) -> Path:
    return build.directory / _TREE


def memory_argv(build: Build) -> list[str]:
    """Return the command that gives the tree memory, which goes with the namespaces: all that has to be free."""
    options = f"mode=755,size={needed_memory(build.plan)}"
    return ["mount", "-t", "tmpfs", "-o", options, "tree", str(_tree(build))]


def bootstrap_argv(build: Build, wanted: recipe.Recipe, tree: Path) -> list[str]:
    """Return the command that makes the tree: in namespaces, where this user is root."""
    # Hooks are lines of shell.
    debconf, script = (shlex.quote(str(build.directory / name)) for name in (_DEBCONF, _SCRIPT))
    take, keep = packages.hooks(build, wanted)
    options = [f'APT::Install-Recommends "{str(wanted.recommends).lower()}"', 'Acquire::Languages "none"']
    if wanted.proxy:
        options += [f'Acquire::http::Proxy "{wanted.proxy}"', f'Acquire::https::Proxy "{wanted.proxy}"']
    settings = build.plan.settings
    if settings.verify == "none":
        options += ['Acquire::AllowInsecureRepositories "true"', 'APT::Get::AllowUnauthenticated "true"']
    return [
        *packages.programs(build.plan),
        "mmdebstrap",
        "--mode=unshare",
        *packages.options(build.plan),
        *([f"--keyring={settings.keyring}"] if settings.keyring else []),
        f"--variant={wanted.variant}",
        # The kernel opens the emulator when it is registered, so that no tree needs a file of it; mmdebstrap looks
        # for binfmt_misc where namespaces have none mounted.
        *(
            [f"--architectures={recipe.architecture(build.plan)}", "--skip=check/qemu"]
            if _is_foreign(build.plan)
            else []
        ),
        "--format=directory",
        *(f"--aptopt={option}" for option in options),
        # What is made is thrown away if the machine crashes.
        "--dpkgopt=force-unsafe-io",
        "--skip=essential/unlink",
        f"--setup-hook={take}",
        f'--essential-hook=chroot "$1" debconf-set-selections <{debconf}',
        f'--customize-hook=chroot "$1" sh -e <{script}',
        f"--customize-hook={keep}",
        *([f"--include={','.join(wanted.packages)}"] if wanted.packages else []),
        wanted.suite,
        str(tree),
        *wanted.sources,
    ]


def _disk_identity(plan: Plan) -> layouts.Identity:
    """Return a new identity of the disk, or with a date the one that all disks of this configuration have."""
    if plan.source_date is None:
        return layouts.random_identity()
    asked = {**identity(plan), "image": plan.image, "date": plan.source_date}
    return layouts.derived_identity(json.dumps(asked, sort_keys=True))


class _Bootstrap:
    """What the steps of a bootstrap tell each other."""

    def __init__(self, plan: Plan, wanted: recipe.Recipe) -> None:
        self._inside: namespaces.Namespaces | None = None
        self._wanted = wanted
        self._disk = layout_of(plan, _disk_identity(plan))

    def entered(self, state: State, steps: Sequence[Step | Group]) -> State:
        """Carry out *steps* with namespaces, with which all that they have mounted goes."""
        build = state.build
        tree = _tree(build)
        with released(partial(namespaces.remove, tree)):
            tree.mkdir()
            tree.chmod(0o755)
            with namespaces.entered(build.directory, as_root=build.plan.as_root) as self._inside:
                return carry_out(state, steps)

    def bootstrap(self, state: State) -> None:
        assert self._inside is not None
        build = state.build
        copy = build.directory / _COPY
        answers.write(build.plan, copy)
        events.tell(events.InputUsed(BOOTSTRAP_KEY, str(build.plan.settings.bootstrap), copy))
        texts = {_DEBCONF: self._wanted.debconf, _SCRIPT: self._wanted.script} | packages.scripts(build.plan)
        for name, text in texts.items():
            answers.write_private(build.directory / name, text.encode())
        packages.prepare(build.plan)
        # Others may have taken it since the build began.
        check_memory(build.plan)
        if in_memory(build.plan):
            self._inside.run(*memory_argv(build))
        else:
            self._check_filesystem(build)
        printed = failures.Printed()
        try:
            self._inside.run(
                *bootstrap_argv(build, self._wanted, self._root(build)),
                timeout=_SECONDS,
                progress=printed.take,
                # Where it keeps what it needs for a moment: with it goes what it leaves when it is killed.
                variables={"TMPDIR": str(build.directory)},
            )
        except CommandError as error:
            reason = failures.explained(list(printed.lines), partial(self._near, build))
            if build.plan.settings.offline:
                reason.add_hint("With --offline only what earlier builds have cached can be had")
            raise reason from error

    def _root(self, build: Build) -> Path:
        return _tree(build) / "root"

    def _check_filesystem(self, build: Build) -> None:
        """Raise BuildError unless the filesystem of the working directory can have the files of a system."""
        assert self._inside is not None
        try:
            self._inside.run(sys.executable, "-I", "-c", _PROBE, str(_tree(build)), quiet=True)
        except CommandError as error:
            raise BuildError(
                f"The filesystem of {build.plan.output_dir} can't have the files of a system: {error.said}.",
                hint="Set work-in-memory = yes, or build on ext4, xfs or btrfs, mounted without noexec: --output-dir.",
            ) from error

    def _near(self, build: Build, name: str) -> list[str]:
        """Return names like *name* of packages that the archive has."""
        assert self._inside is not None
        try:
            text = self._inside.run("sh", "-c", _NAMES, "sh", str(self._root(build)), capture=True, quiet=True)
        except BuildError:
            return []
        # Of tens of thousands, which takes a while.
        near = {other for other in text.split() if other[:1] == name[:1] and abs(len(other) - len(name)) <= 4}
        return difflib.get_close_matches(name, sorted(near), n=3, cutoff=0.75)

    def carry_out(self, task: Task, state: State) -> None:
        assert self._inside is not None
        place = self._place(state.build, self._inside.pid)
        place.prepare()
        try:
            running.run_task(task, place.place)
        except BuildError as error:
            if state.attended:
                error.attended = True
                logger.error("%s", error.message)
                logger.error("A shell is opened in the tree; the build ends when you leave it.")
                place.look()
            raise

    def _place(self, build: Build, pid: int | str) -> namespace.InTree:
        return namespace.InTree(build, self._root(build), pid, self._wanted.proxy)

    def task_steps(self, build: Build) -> Iterator[Step]:
        """Give the steps of the tasks that run in the tree."""
        place = self._place(build, "PID")
        for task in namespace.tasks(build.plan):
            yield Step(f"Task {task.name}", doing(partial(self.carry_out, task)), place.commands(task))

    def install_loader(self, state: State) -> None:
        assert self._inside is not None
        making.check_tools(self._inside, self._root(state.build), self._disk)
        for each in _loader_commands(state.build, self._disk):
            try:
                self._inside.run(*each.words, stdin=each.text.encode())
            except CommandError as error:
                raise BuildError(f"The boot loader can't be installed: {error.said}.", hint=error.hint) from error

    def make_disk(self, state: State) -> None:
        assert self._inside is not None
        build, tree = state.build, self._root(state.build)
        layout = self._disk
        if not layout.size:
            layout = making.fitted(self._inside, tree, build, layout, build.plan.settings.extra_size or 0)
        making.make_disk(self._inside, tree, build, layout)


def in_memory(plan: Plan) -> bool:
    """Return whether the tree is made in memory."""
    wish = plan.settings.work_in_memory
    return wish == "yes" or (wish == "auto" and free_memory() >= needed_memory(plan))


def check_memory(plan: Plan) -> None:
    """Raise ConfigurationError if the tree has to be made in memory, and too little is free."""
    free, needed = free_memory(), needed_memory(plan)
    if plan.settings.work_in_memory == "yes" and free < needed:
        raise ConfigurationError(
            f"{format_size(free)} of memory are free, and a tree in memory needs {format_size(needed)}.",
            hint="Set work-in-memory = auto, which takes the disk then, or a smaller image-size.",
        )


def needed_memory(plan: Plan) -> int:
    """Return the bytes that have to be free for a tree in memory: as many as the disk has, and some more."""
    return (disk_size(plan) or _USUAL_TREE) + _SPARE_MEMORY


def _loader_commands(build: Build, layout: layouts.Layout) -> list[making.Inside]:
    root = _tree(build) / "root"
    parts = making.parts(root, layout)
    # These are copied next, by programs of this machine.
    last = [making.Inside(bounds.check_argv(root, parts))] if parts else []
    return [*bounds.guarded(root, making.loader_commands(root, build.directory, layout)), *last]


def steps(build: Build) -> Iterator[Step | Group]:
    """Give the steps that make the disk."""
    wanted = recipe.read(build.plan)
    work = _Bootstrap(build.plan, wanted)
    tree = _tree(build) / "root"
    as_root = build.plan.as_root
    layout = layout_of(build.plan)

    def shown(*commands: Sequence[str]) -> list[list[str]]:
        return [namespaces.entering_argv("PID", *words, as_root=as_root) for words in commands]

    loader = [each.words for each in _loader_commands(build, layout)]
    holding = namespaces.holding_argv(as_root=as_root)
    memory = [memory_argv(build)] if in_memory(build.plan) else []
    bootstrapping = shown(*memory, bootstrap_argv(build, wanted, tree))
    inside = [
        Step("Bootstrapping", doing(work.bootstrap), [holding, *bootstrapping]),
        *work.task_steps(build),
        Step("Installing the boot loader", doing(work.install_loader), shown(*loader)),
        Step("Making the disk", doing(work.make_disk), making.disk_argvs(tree, build, layout)),
    ]
    yield Group(inside, work.entered)


_DEPENDENT: Dependent = {
    **idle_beside("bootstrap"),
    "extra-size": ("image-size = fit", lambda settings: settings.image_size == FIT),
}

SOURCE = DiskSource(
    keys=(BOOTSTRAP_KEY,),
    check_settings=check_settings,
    identity=identity,
    steps=steps,
    programs=programs,
    check=check,
    disk_size=disk_size,
    downloads=lambda plan: not plan.settings.offline,
    remote=remote,
    dependent=_DEPENDENT,
    fits=True,
    original=original,
    check_here=check_here,
    answer_files=(BOOTSTRAP_KEY,),
    template_keys=answers.keys_asked_for,
    declared_keys=answers.declared_keys,
    answers_of=answers.content,
)
