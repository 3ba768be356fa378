"""Make a disk of a tree that a package manager bootstraps: Debian and Ubuntu, by mmdebstrap."""

import dataclasses
import difflib
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from ...base import command, events
from ...base.cleanup import released
from ...base.errors import BuildError, CommandError, ConfigurationError
from ...base.log import logger
from ...base.memory import free_memory
from ...base.units import format_size
from ...configuration.parsers import FIT
from ...configuration.settings import BOOTSTRAP_KEY, Dependent, ImageSettings
from ...disks import bounds, layouts, making, notation
from ...elements import applying
from ...inside import namespaces
from ...machines import arch
from ...machines.arch import FIRMWARES
from ...model import Build, Plan
from ...parts import Group, State, Step, carry_out, doing
from ...system import appliance
from ...tasks import namespace
from .. import answers
from ..kind import BESIDE_FIT, DiskSource, idle_beside
from ..tree_tasks import TreeTasks
from . import failures, packages, recipe, trees

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
# apt, which runs outside of the tree, has programs of the tree install packages; mmdebstrap does the same.
_INSIDE_TREE = ("Dir::Bin::dpkg=env", "DPkg::Options::=--unset=TMPDIR", "DPkg::Options::=dpkg")
# $1 is the tree.
_NAMES = 'sed -n "s/^Package: //p" "$1"/var/lib/apt/lists/*_Packages'
_SECONDS = 4 * 3600.0


def filesystem_of(settings: ImageSettings) -> str:
    """Return the kind of the root filesystem."""
    return settings.filesystem or _FILESYSTEMS[0]


def check_settings(name: str, settings: ImageSettings) -> None:
    """Raise ConfigurationError unless *settings* name what to bootstrap."""
    if settings.bootstrap is None:
        raise ConfigurationError(
            f"[{name}] has source = bootstrap and no 'bootstrap'.", hint="It is the path of what is to be installed."
        )
    check_disk_settings(name, settings)


def check_disk_settings(name: str, settings: ImageSettings) -> None:
    """Raise ConfigurationError unless *settings* name a disk that a tree can be put on."""
    if filesystem_of(settings) not in _FILESYSTEMS:
        raise ConfigurationError(
            f"[{name}] filesystem: {settings.filesystem!r} is not accepted, only {', '.join(_FILESYSTEMS)}.",
            hint=f"'image-factory --keys {name}' lists all keys.",
        )
    if settings.layout in FIRMWARES and settings.layout != settings.firmware:
        raise ConfigurationError(
            f"[{name}] has layout = {settings.layout} and firmware = {settings.firmware}.",
            hint=f"Have firmware = {settings.layout}, and no layout: then the layout is that of the firmware.",
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


def layout_of(
    plan: Plan, identity: layouts.Identity = layouts.UNKNOWN, scheme: layouts.Scheme | None = None
) -> layouts.Layout:
    """Return how the disk is laid out, with *identity*; ConfigurationError says what is wrong with a user's layout.

    A *scheme* takes the place of the one that the settings have.
    """
    settings = plan.settings
    # The machine of a 32-bit system is the 64-bit one.
    system = "i386" if recipe.architecture(plan) == "i386" else settings.arch
    root = layouts.root_of(filesystem_of(settings), settings.root_label or "", settings.mkfs_options)
    scheme = scheme or _scheme(settings, system, root)
    firmware = settings.firmware if scheme.table else None
    extra = (settings.extra_size or 0) if settings.image_size == FIT else None
    return layouts.Layout(scheme, firmware, system, disk_size(plan), identity, plan.source_date, extra)


def _scheme(settings: ImageSettings, system: str, root: layouts.Filesystem) -> layouts.Scheme:
    if isinstance(settings.layout, Path):
        return notation.read(settings.layout, root)
    return layouts.scheme(settings.layout or settings.firmware, system, root)


def check_layout(plan: Plan, layout: layouts.Layout, where: str) -> None:
    """Raise ConfigurationError if *layout*, which *where* says, is wrong, or the disk can't have it."""
    # A netboot image boots without a disk, and without a loader in it.
    of_disk = plan.settings.format != ("netboot",) or plan.settings.keep_raw
    if not layout.firmware and plan.settings.test_boot and of_disk:
        raise ConfigurationError(
            f"[{plan.image}] test-boot = yes: a filesystem without a partition table has no boot loader.",
            hint="Set test-boot = no, another layout, or netboot as the only format.",
        )
    if layout.firmware:
        layouts.check_firmware(layout.scheme, layout.firmware, f"The layout {where}")
    if layout.scheme.groups and plan.settings.mount_via in ("loop", "fuse") and not plan.guestfs_allowed:
        raise ConfigurationError(
            f"[{plan.image}] mount-via = {plan.settings.mount_via} can't reach a disk with LVM, which {where} has.",
            hint="Set mount-via to guestfs or auto.",
        )
    most = layouts.LABELS[filesystem_of(plan.settings)]
    if len(plan.settings.root_label or "") > most:
        raise ConfigurationError(
            f"[{plan.image}] root-label: {filesystem_of(plan.settings)} has labels of at most {most} characters.",
            hint="Choose a shorter one.",
        )
    # What does not fit is told.
    _ = layout.places


def identity(plan: Plan, used: Sequence[events.InputUsed] = ()) -> dict[str, str]:
    """Return a digest of each setting that makes the disk another one."""
    made = applying.identity(plan) | namespace.identity(plan)
    texts = {BOOTSTRAP_KEY: answers.content(plan)} | disk_identity_texts(plan, layout_of(plan)) | made
    return {key: hashlib.sha256(data).hexdigest() for key, data in texts.items()}


def disk_identity_texts(plan: Plan, layout: layouts.Layout) -> dict[str, bytes]:
    """Return each setting of the disk with *layout* that a tree is put on, by key."""
    settings = plan.settings
    return {
        "image-size": str(settings.image_size).encode(),
        "arch": recipe.architecture(plan).encode(),
        "firmware": settings.firmware.encode(),
        # The file of a layout may have changed.
        "layout": repr(layout.scheme).encode(),
        "extra-size": str(settings.extra_size).encode(),
    }


def original(plan: Plan, used: events.InputUsed) -> events.InputUsed | None:
    """Return the input *used* of a build that is resumed; what a template became is gone."""
    path = plan.settings.bootstrap
    assert path
    return dataclasses.replace(used, path=None if answers.is_template(path) else path)


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    foreign = ["arch-test"] if _is_foreign(plan) else []
    inside = [*namespaces.programs(as_root=plan.as_root), *applying.programs(plan), *namespace.programs(plan)]
    keeping = trees.PROGRAMS if plan.settings.cache_tree else ()
    return ["mmdebstrap", *foreign, *inside, *keeping, *making.programs(layout_of(plan))]


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
    applying.check(plan)
    check_paths(plan)
    check_architecture(plan)
    check_layout(plan, layout_of(plan), str(plan.settings.layout))


def check_paths(plan: Plan) -> None:
    """Raise ConfigurationError if no tree can be where this one would be."""
    if match := _UNFIT.search(str(plan.work_path)):
        raise ConfigurationError(
            f"[{plan.image}] output-dir: {str(plan.output_dir)!r} has {match[0]!r} in it, as no path of a tree may.",
            hint="apt, dpkg-deb or mtools take it for something else: build elsewhere with --output-dir.",
        )


def check_here(plan: Plan) -> None:
    """Raise ConfigurationError unless there are namespaces here, and memory where the tree has to be in it."""
    if _is_foreign(plan):
        check_emulation(plan)
    namespaces.check(as_root=plan.as_root)
    check_memory(plan)
    check_appliance(layout_of(plan).scheme)


def check_appliance(scheme: layouts.Scheme) -> None:
    """Raise ConfigurationError unless libguestfs' appliance has a kernel, if *scheme* needs it."""
    kinds = [f"The filesystem {each.kind}" for each in scheme.filesystems if each.kind in layouts.APPLIANCE]
    if scheme.groups:
        kinds.append("A layout with LVM")
    if kinds:
        appliance.check_kernel(kinds[0])


def disk_size(plan: Plan) -> int:
    """Return the bytes that the disk may grow to, 0 if it is as small as the tree lets it."""
    return plan.settings.image_size or 0


def _tree(build: Build) -> Path:
    return build.directory / _TREE


def memory_argv(plan: Plan, tree: Path) -> list[str]:
    """Return the command that gives *tree* memory, which goes with the namespaces: all that has to be free."""
    options = f"mode=755,size={needed_memory(plan)}"
    return ["mount", "-t", "tmpfs", "-o", options, "tree", str(tree)]


def bootstrap_argv(build: Build, wanted: recipe.Recipe, tree: Path, sources: Sequence[str] = ()) -> list[str]:
    """Return the command that makes the tree: in namespaces, where this user is root.

    It takes packages from *sources*, by default the first mirrors.
    """
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
        *([f"--essential-hook={base}"] if (base := _base_line(build.plan, wanted)) else []),
        f'--customize-hook=chroot "$1" sh -e <{script}',
        f"--customize-hook={keep}",
        *([f"--include={','.join(wanted.packages)}"] if wanted.packages else []),
        wanted.suite,
        str(tree),
        *(sources or wanted.lines),
    ]


def _base_line(plan: Plan, wanted: recipe.Recipe) -> str:
    """Return the line of shell that installs what each system of the variant has, without what that recommends.

    Debian's installer does so: by itself such a system has no mail server.
    """
    kinds = ",".join(f"?priority({priority})" for priority in recipe.PRIORITIES[wanted.variant])
    # mmdebstrap alone has the same.
    if not kinds or not wanted.recommends:
        return ""
    suite = f"?or(?archive(^{wanted.suite}$),?codename(^{wanted.suite}$))"
    found = f"?narrow({suite},?architecture({recipe.architecture(plan)}),?and(?or({kinds}),?not(?essential)))"
    options = ["APT::Install-Recommends=false", *_INSIDE_TREE]
    words = shlex.join(["apt-get", "--yes", *(word for option in options for word in ("-o", option))])
    return f'APT_CONFIG=$MMDEBSTRAP_APT_CONFIG {words} -o DPkg::Chroot-Directory="$1" install {shlex.quote(found)}'


def new_identity(plan: Plan, found: Mapping[str, str]) -> layouts.Identity:
    """Return a new identity of the disk, or with a date the one that all disks of the settings *found* have."""
    if plan.source_date is None:
        return layouts.random_identity()
    asked = {**found, "image": plan.image, "date": plan.source_date}
    return layouts.derived_identity(json.dumps(asked, sort_keys=True))


class _Bootstrap:
    """What the steps of a bootstrap tell each other."""

    def __init__(self, plan: Plan, wanted: recipe.Recipe) -> None:
        self._inside: namespaces.Namespaces | None = None
        self._wanted = wanted
        self._disk = layout_of(plan, new_identity(plan, identity(plan)))

    def entered(self, state: State, steps: Sequence[Step | Group]) -> State:
        """Carry out *steps* with namespaces, with which all that they have mounted goes."""
        build = state.build
        tree = _tree(build)
        with released(partial(namespaces.remove, tree)):
            tree.mkdir()
            tree.chmod(0o755)
            with namespaces.entered(build.directory, as_root=build.plan.as_root) as self._inside:
                return carry_out(state, steps)

    def outer(self) -> namespaces.Namespaces:
        """Return those of the tree."""
        assert self._inside is not None
        return self._inside

    def bootstrap(self, state: State) -> None:
        assert self._inside is not None
        build = state.build
        self._begin(build)
        texts = {_DEBCONF: self._wanted.debconf, _SCRIPT: self._wanted.script} | packages.scripts(build.plan)
        for name, text in texts.items():
            answers.write_private(build.directory / name, text.encode())
        packages.prepare(build.plan)
        self._install_from_mirrors(build)

    def _install_from_mirrors(self, build: Build) -> None:
        """Install the packages: whatever a mirror does not give comes from the next one of its source."""
        left, errors = self._wanted, list[BuildError]()
        while True:
            try:
                self._install(build, left.lines)
            except failures.MirrorError as error:
                errors.append(error)
                # Without a network there is but what one of them has served.
                others = None if build.plan.settings.offline else left.without(error.uri)
                if others is None:
                    raise failures.together(errors) from error
                logger.warning("%s The next mirror is tried.", error.message)
                left = others
                self._keep_packages(build)
            else:
                if left.sources != tuple((line,) for line in left.lines) or errors:
                    logger.info("The packages come from %s", " and ".join(recipe.mirrors(left.lines)))
                return

    def _install(self, build: Build, sources: Sequence[str]) -> None:
        """Install the packages of *sources*; BuildError says in a line what is wrong."""
        assert self._inside is not None
        printed = failures.Printed()
        try:
            self._inside.run(
                *bootstrap_argv(build, self._wanted, self._root(build), sources),
                timeout=_SECONDS,
                progress=printed.take,
                # Where it keeps what it needs for a moment: with it goes what it leaves when it is killed.
                variables={"TMPDIR": str(build.directory)},
            )
        except CommandError as error:
            if trees.is_found(build):
                self._take(build, sources)
                return
            reason = failures.explained(list(printed.lines), partial(self._near, build))
            if build.plan.settings.offline:
                reason.add_hint("With --offline only what earlier builds have cached can be had")
            raise reason from error

    def _take(self, build: Build, sources: Sequence[str]) -> None:
        """Take the tree of an earlier build; of what is no such tree the packages are installed after all."""
        assert self._inside is not None
        self._remove_root(build)
        try:
            trees.take(self._inside, build, self._root(build))
        except CommandError as error:
            logger.warning("The tree in the cache can't be taken, and is removed: %s.", error.said)
            trees.forget(build)
            self._remove_root(build)
            self._install(build, sources)

    def _keep_packages(self, build: Build) -> None:
        """Remove a tree that has not all packages; those that have come need not come again."""
        assert self._inside is not None
        _, keep = packages.hooks(build, self._wanted)
        self._inside.run("sh", "-c", f'[ ! -d "$1/var/cache/apt/archives" ] || {keep}', "sh", str(self._root(build)))
        self._remove_root(build)

    def _remove_root(self, build: Build) -> None:
        assert self._inside is not None
        self._inside.run("rm", "--recursive", "--force", "--one-file-system", str(self._root(build)))

    def cache(self, state: State) -> None:
        """Keep the tree for later builds of the same; one that can't be kept is no failure of this one."""
        assert self._inside is not None
        try:
            trees.keep(self._inside, state.build, self._root(state.build))
        except (BuildError, OSError) as error:
            logger.warning("The tree is not kept in the cache: %s", error)

    def is_new(self, state: State) -> bool:
        """Return whether this build has installed the packages itself, and the tree can be kept."""
        return trees.has_place(state.build) and not trees.is_found(state.build)

    def _begin(self, build: Build) -> None:
        """Give the tree its place, and say what it is made from."""
        assert self._inside is not None
        copy = build.directory / _COPY
        answers.write(build.plan, copy)
        events.tell(events.InputUsed(BOOTSTRAP_KEY, str(build.plan.settings.bootstrap), copy))
        # Others may have taken it since the build began.
        check_memory(build.plan)
        if in_memory(build.plan):
            self._inside.run(*memory_argv(build.plan, _tree(build)))
        else:
            self._check_filesystem(build)

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

    def restore(self, tasks: TreeTasks, state: State) -> None:
        self._begin(state.build)
        tasks.restore()

    def install_loader(self, state: State) -> None:
        assert self._inside is not None
        making.check_tools(self._inside, self._root(state.build), self._disk)
        for each in loader_commands(state.build, self._root(state.build), self._disk):
            try:
                self._inside.run(*each.words, stdin=each.text.encode())
            except CommandError as error:
                raise BuildError(f"The boot loader can't be installed: {error.said}.", hint=error.hint) from error

    def make_disk(self, state: State) -> None:
        assert self._inside is not None
        build, tree = state.build, self._root(state.build)
        layout = self._disk
        if not layout.size:
            layout = making.fitted(self._inside, tree, build, layout)
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


def loader_commands(build: Build, root: Path, layout: layouts.Layout) -> list[making.Inside]:
    """Return what installs the boot loader of *layout* in the tree at *root*."""
    parts = making.parts(root, layout)
    # These are copied next, by programs of this machine.
    last = [making.Inside(bounds.check_argv(root, parts))] if parts else []
    return [*bounds.guarded(root, making.loader_commands(root, build.directory, layout)), *last]


def steps(build: Build) -> Iterator[Step | Group]:
    """Give the steps that make the disk."""
    wanted = recipe.read(build.plan)
    work = _Bootstrap(build.plan, wanted)
    tree = _tree(build) / "root"
    layout = layout_of(build.plan)
    tasks = TreeTasks(build, tree, wanted.proxy, work.outer)
    inside: list[Step | Group]
    beginning = [memory_argv(build.plan, _tree(build))] if in_memory(build.plan) else []
    holding = namespaces.holding_argv(as_root=build.plan.as_root)
    if tasks.kept:
        beginning += tasks.restoring_argvs()
        restoring = doing(partial(work.restore, tasks))
        inside = [Step("Restoring the tree", restoring, [holding, *applying.shown(build, *beginning)])]
    else:
        beginning.append(bootstrap_argv(build, wanted, tree))
        inside = [Step("Bootstrapping", doing(work.bootstrap), [holding, *applying.shown(build, *beginning)])]
        if build.plan.settings.cache_tree:
            caching = applying.shown(build, trees.keeping_argv(tree, packages.directory(build.plan) / "XXXXXXXX"))
            inside.append(Step("Caching the tree", doing(work.cache), caching, when=work.is_new))
        inside += applying.steps(build, tree, layout, wanted.proxy, work.outer)
    inside += tasks.steps()
    if not build.until_task:
        loader = [each.words for each in loader_commands(build, tree, layout)]
        inside += [
            Step("Installing the boot loader", doing(work.install_loader), applying.shown(build, *loader)),
            Step("Making the disk", doing(work.make_disk), making.disk_argvs(tree, build, layout)),
        ]
    yield Group(inside, work.entered)


_DEPENDENT: Dependent = {
    **idle_beside("bootstrap"),
    **BESIDE_FIT,
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
