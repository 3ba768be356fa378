"""Runs the phases of an image's elements in the namespaces of its build, where all else of the machine is read-only."""

import contextlib
import dataclasses
import os
import re
import shutil
import stat
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ..base import command, files, locks, terminal
from ..base.errors import BuildError, CommandError
from ..base.log import logger
from ..disks import attaching, standing
from ..disks.layouts import Layout
from ..disks.making import Inside
from ..inside.namespaces import Namespaces, entering_argv
from ..model import Build
from . import breaks, contract, hooks, layout, scripts, system
from .contract import Told
from .hooks import ENVIRONMENT, Phase
from .image import Image

# Scripts take what is after the last dot of the tree's path for the name of the build, as source-repositories does.
_TOP = "build.elements"
_CACHE = "elements"
_BLOCK_DEVICE = "block-device.d"
_LAST = "cleanup.d"
# In the build's directory: the names of the files that scripts have made beside the image.
BESIDE = "beside"
_INSTALL_TYPE = "11-dib-install-type.bash"
_PACKAGES_SCRIPT = f"{hooks.EXTRA_PACKAGES.directory}/50-extra-packages"
_PROGRAMS = {"prepare": scripts.PREPARE, "phase": scripts.PHASE, "tree": scripts.TREE}
_BEGUN = re.compile(r"dib-run-parts (?:Running|Sourcing) (?P<path>.+)")
_OWN_LINE = "dib-run-parts "
_LINES = 5
# By this file in the tree, by diskimage-builder's convention.
_EXPECTED = "tmp/dib-test-should-fail"
# Whether the element that has apt keeps packages in the cache.
_APT_CACHE = "DIB_APT_LOCAL_CACHE"
_LOCKED = "Could not get lock"
_READ_ONLY, _FULL = "Read-only file system", "No space left on device"
# What root may do to the kernel and the network of this machine, and scripts may not: nothing takes it back.
_WITHOUT = (
    "audit_control", "block_suspend", "net_admin", "sys_boot", "sys_module", "sys_pacct", "sys_rawio", "sys_time",
    "syslog", "wake_alarm",
)  # fmt: skip
# Of the machine's own /tmp and /var/tmp, scripts on this machine see what these URIs, or paths, name.
_URI = re.compile("^(?:unix|file)://(?=/)")
_TEMPORARY = re.compile(r"(?:/var)?/tmp/[^\s'\"`:,;()]+")

PROGRAMS = ("bash", "chroot", "find", "mount", "setpriv", "sort", "truncate", "umount")


def tree_of(build: Build) -> Path:
    """Return where *build* has the tree that its elements make."""
    return build.directory / _TOP / "mnt"


def beside(directory: Path) -> list[Path]:
    """Return the files that elements have made beside the image, in the working directory *directory*."""
    listed = directory / BESIDE
    names = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    return [directory / name for name in names]


def told(build: Build, disk: Layout | layout.Mounted) -> Told:
    """Return what the elements of *build*, which has *disk*, are told."""
    known = layout.Mounted.of(disk) if isinstance(disk, Layout) else disk
    settings = build.plan.settings
    return Told(
        build.plan.base_name,
        ",".join(settings.format),
        build.directory / _TOP,
        settings.cache_dir.absolute() / _CACHE,
        settings.offline,
        known.kind,
        known.variables,
        known.size,
    )


class ExpectedError(BuildError):
    """A script has failed and says that it was to, as tests of elements do."""


class _Output:
    """What a phase prints: the script that runs, and its last lines."""

    def __init__(self) -> None:
        self.script: Path | None = None
        self.lines: deque[str] = deque(maxlen=_LINES)
        self.names_device = False

    def take(self, line: str) -> None:
        """Take *line*, which goes to the log."""
        if match := _BEGUN.fullmatch(line.rstrip()):
            self.script = Path(match["path"])
            self.lines.clear()
        elif line.strip() and not line.startswith(_OWN_LINE) and scripts.LEFT not in line:
            self.lines.append(line.strip())
            self.names_device = self.names_device or "IMAGE_BLOCK_DEVICE=" in line


class Engine:
    """The elements *image* of *build*, in namespaces that are given to each call but where a command is only shown."""

    def __init__(self, build: Build, image: Image, disk: Layout | layout.Mounted, proxy: str = "") -> None:
        # What brings packages is that of the system, unless the user says otherwise.
        proxies = {name: proxy for name in ("http_proxy", "https_proxy") if proxy}
        self._build, self._image = build, dataclasses.replace(image, given={**proxies, **image.given})
        self._told = told(build, disk)
        self._devices: Mapping[str, str] = {}
        self._written = contract.written_places(image.given, self._told)
        self._breaks = breaks.read(os.environ)
        self.phases = hooks.phases(image.packages)

    @contextlib.contextmanager
    def holding_packages(self) -> Iterator[None]:
        """Have apt's packages in the cache for this build alone inside: if another one has them, it keeps none there.

        apt does not wait for others who use its directory, and two of them can't share it.
        """
        given = self._image.given
        if system.PACKAGERS["deb"] not in self._image.names or _APT_CACHE in given:
            yield
            return
        cache = Path(contract.cache_places(given, self._told)["DIB_IMAGE_CACHE"]).resolve()
        cache.mkdir(parents=True, exist_ok=True)
        descriptor = locks.lock(cache)
        if descriptor is None:
            holder = locks.by_whom(cache)
            logger.info("Another build%s has the packages of apt in %s: this one fetches its own.", holder, cache)
            self._image = dataclasses.replace(self._image, given={**given, _APT_CACHE: "0"})
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def merge(self) -> None:
        """Write the merged hooks, and what scripts find beside them."""
        top = self._told.top
        for name in ("hooks", "bin", "lib", "tmp", "image", "mnt", "run", "beside"):
            (top / name).mkdir(parents=True)
        top.chmod(0o755)
        self._told.tree.chmod(0o755)
        for name, file in self._image.hooks.items():
            target = self._told.hooks / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.text is None:
                shutil.copy2(file.path, target, follow_symlinks=False)
            else:
                _put(target, file.text)
        for each in self._image.elements:
            for name, text in each.element.texts.items():
                _put(top / each.element.path / name, text)
        _put(self._told.hooks / "dib-run-parts", scripts.RUN_PARTS, 0o755)
        if self._image.packages:
            command_line = hooks.packages_command(self._image.packages)
            _put(self._told.hooks / _PACKAGES_SCRIPT, f"#!/bin/bash\nexec {command_line}\n", 0o755)
        for name, text in scripts.LIBRARY.items():
            _put(top / "lib" / name, text)
        restricted = "no" if self._build.plan.as_root else "yes"
        _put(top / "bin/sudo", scripts.SUDO.replace("RESTRICTED", restricted), 0o755)
        _put(top / "bin/dib-python-exec", scripts.PYTHON.format(stub=top / "lib/stub", python=sys.executable), 0o755)
        for name, text in _PROGRAMS.items():
            _put(top / "run" / name, text)
        for place in self._written:
            Path(place).mkdir(parents=True, exist_ok=True)

    def keep_mounted(self, places: Sequence[Path]) -> None:
        """Have what of a disk is mounted at *places* of the tree stay there, unlike what scripts mount."""
        _put(self._mounted, "".join(f"{place}\n" for place in places))

    def prepare_argv(self) -> list[str]:
        """Return the command that has the machine read-only, but for what this build writes to."""
        return ["bash", self._program("prepare"), *self._writable(), "--", *self._readable()]

    def _writable(self) -> Mapping[str, None]:
        return dict.fromkeys([str(self._told.top), str(self._build.directory), *self._written])

    def _readable(self) -> Mapping[str, None]:
        elements = [str(each.element.path) for each in self._image.elements if not each.element.texts]
        named = filter(_is_hidden, (_URI.sub("", value) for value in self._image.given.values()))
        return dict.fromkeys([*elements, *map(str, self._image.directories), os.getcwd(), *named])

    def prepare(self, inside: Namespaces) -> None:
        """Have the machine read-only."""
        inside.run(*self.prepare_argv())

    def attach_argvs(self, disk: Layout) -> list[list[str]]:
        """Return the commands that mount the filesystems of the *disk* in the place of the tree that it was made of."""
        attaching_argv = attaching.attach_argv(self._build.disk_path, self._told.tree, self._mounted, disk)
        return [self._on_tree("close"), attaching_argv]

    def attach(self, inside: Namespaces, disk: Layout) -> None:
        """Mount the filesystems of the *disk* in the place of the tree: what follows is done to them."""
        close, attach = self.attach_argvs(disk)
        inside.run(*close)
        try:
            name = inside.run(*attach, capture=True).strip()
        except CommandError as error:
            raise BuildError(
                f"The disk can't be attached: {error.said}.",
                hint="Elements that work on a disk need loop devices, which a container may lack.",
            ) from error
        self._devices = layout.devices(attaching.devices(name, disk))
        self._told = dataclasses.replace(self._told, image_size=disk.size)

    def stand_commands(self, disk: Layout) -> list[Inside]:
        """Return the commands that have files stand for the devices of *disk*, which no user can have."""
        return standing.commands(self._told.tree, self._told.top, disk)

    def stand(self, disk: Layout) -> None:
        """Tell scripts of the files that stand for the devices of *disk*."""
        self._devices = layout.devices(attaching.devices(standing.NAME, disk))

    def take_argv(self) -> list[str]:
        """Return the command that has all be in the tree again, with nothing in it of what stood for devices."""
        return standing.take_argv(self._told.tree, self._told.top)

    def copy_loader(self, disk: Layout) -> None:
        """Copy the boot loader to *disk* from what has stood for it."""
        standing.copy_loader(standing.disk_of(self._told.top), self._build.disk_path, disk)

    def detach_argv(self) -> list[str]:
        """Return the command that unmounts the disk, with which its devices go."""
        return self._on_tree("detach")

    def detach(self, inside: Namespaces) -> None:
        """Unmount the disk, with which its devices go."""
        inside.run(*self.detach_argv())

    def scripts(self, phase: Phase) -> list[str]:
        """Return a line on each script of *phase*, in their order."""
        if phase == hooks.EXTRA_PACKAGES:
            return [hooks.packages_command(self._image.packages)]
        found = hooks.scripts(self._image.hooks, phase.directory, self._image.types)
        return [f"{phase.directory}/{name} of the element {file.element}" for name, file in found]

    def phase_argvs(self, phase: Phase) -> list[list[str]]:
        """Return the commands of *phase*: those that prepare the tree for it, then its own, then those after it."""
        before, after = _AROUND.get(phase.directory, ((), ()))
        return [*map(self._on_tree, before), self._own_argv(phase, inside=phase.inside), *map(self._on_tree, after)]

    def run(self, inside: Namespaces, phase: Phase, *, attended: bool) -> None:
        """Run *phase*; BuildError names the script that fails, and its element.

        If it is *attended*, or the user wants that, there is a shell then.
        """
        if phase.directory == "extra-data.d":
            # By now the place can be a link to another one of this machine, which is read-only inside.
            text = scripts.INSTALL_TYPE.format(default=self._image.types[""])
            place = self._told.hooks / ENVIRONMENT
            inside.run("mkdir", "-p", str(place), quiet=True)
            inside.run("tee", str(place / _INSTALL_TYPE), stdin=text.encode(), quiet=True, capture=True)
        before, after = _AROUND.get(phase.directory, ((), ()))
        for what in before:
            self._prepare_tree(inside, phase, what)
        if self._breaks.before(phase):
            self._stop(inside, phase, f"before {phase.directory}")
        try:
            self._run_scripts(inside, phase)
        except BuildError as error:
            if attended or self._breaks.after_error:
                error.attended = True
                logger.error("%s", error.message)
                self._stop(inside, phase, f"where {phase.directory} has failed", then="ends")
            if self._is_expected(inside):
                raise ExpectedError(error.message, hint=error.hint) from error
            raise
        if self._breaks.after(phase):
            self._stop(inside, phase, f"after {phase.directory}")
        for what in after:
            self._prepare_tree(inside, phase, what)
        if phase.directory == _LAST:
            self._keep(inside)

    def _keep(self, inside: Namespaces) -> None:
        """Keep what scripts have made beside the image in the build's directory, from which it is published."""
        # A link would lead to another place of this machine.
        made = [] if self._told.beside.is_symlink() else sorted(self._told.beside.iterdir())
        if not made:
            return
        # They may be of any owner of the namespaces.
        inside.run("chown", "-hR", "0:0", str(self._told.beside))
        inside.run("chmod", "-R", "u=rwX,go=rX", str(self._told.beside))
        kept = []
        for path in made:
            if path.is_symlink() or not path.is_file() or not path.name.startswith(f"{self._told.image_name}."):
                logger.warning("%s, which a script has made beside the image, is not kept.", path.name)
            else:
                files.move(path, self._build.directory / path.name)
                kept.append(path.name)
        files.replace(self._build.directory / BESIDE, "".join(f"{name}\n" for name in kept).encode())

    def _is_expected(self, inside: Namespaces) -> bool:
        """Return whether the script that has failed has said that it would."""
        return os.path.lexists(f"/proc/{inside.pid}/root{self._told.tree}/{_EXPECTED}")

    def _stop(self, inside: Namespaces, phase: Phase, where: str, then: str = "goes on") -> None:
        """Open a shell where scripts of *phase* run, or run the user's command there; its status doesn't matter."""
        own = self._own_argv(phase, self._breaks.command, inside=phase.inside and not self._breaks.outside)
        argv = entering_argv(inside.pid, *own, as_root=inside.as_root)
        if terminal.is_attended():
            logger.warning("A shell is opened %s; the build %s when you leave it.", where, then)
            command.interact(argv, env=self._environment(phase))
        elif not self._breaks.needs_terminal:
            logger.warning("break_cmd is run %s; the build %s then.", where, then)
            with contextlib.suppress(CommandError):
                command.run(argv, env=self._environment(phase), umask=0o022)

    def _own_argv(self, phase: Phase, *command_line: str, inside: bool) -> list[str]:
        """Return the command that runs the scripts of *phase*, or a *command_line* in their place."""
        where = "inside" if inside else "machine"
        less = ",".join(f"-{name}" for name in _WITHOUT)
        program = self._program("phase")
        return ["setpriv", f"--bounding-set={less}", "bash", program, phase.directory, where, *command_line]

    def _run_scripts(self, inside: Namespaces, phase: Phase) -> None:
        output = _Output()
        limit = self._build.plan.settings.element_timeout
        try:
            command.run(
                entering_argv(inside.pid, *self._own_argv(phase, inside=phase.inside), as_root=inside.as_root),
                env=self._environment(phase),
                umask=0o022,
                timeout=limit,
                progress=output.take,
            )
        except CommandError as error:
            raise self._failure(phase, output, error.reason, error.said) from error
        except BuildError as error:
            raise self._failure(phase, output, f"did not end within {limit:.0f} s", error.said) from error
        if phase.directory == _BLOCK_DEVICE and output.names_device:
            raise BuildError(
                f"A script of {_BLOCK_DEVICE} has made a disk, as elements did of old.",
                hint="Leave its element out: 'layout' says how the disk is laid out.",
            )

    def _failure(self, phase: Phase, output: _Output, how: str, said: str) -> BuildError:
        if output.script is None:
            return BuildError(f"{phase.directory} can't be run: {said}")
        name = f"{output.script.parent.name}/{output.script.name}"
        last = output.lines[-1] if output.lines else ""
        what = f"{name} of {self._owner(name)} {how}"
        if any(_READ_ONLY in line for line in output.lines):
            hint = (
                "Elements write to their tree, to $TMPDIR, /tmp, $DIB_IMAGE_CACHE and $TMP_HOOKS_PATH; all else of "
                "this machine is read-only for them"
            )
        elif any(_LOCKED in line for line in output.lines):
            hint = "Another program uses the same DIB_IMAGE_CACHE: build when it has ended, or set another directory"
        elif not phase.inside and (path := self._unseen(output.lines)):
            hint = (
                f"Scripts have a /tmp and a /var/tmp of their own, without {path}: have it elsewhere, or let a "
                "variable, as DIB_REPOLOCATION_NAME is one, be that path"
            )
        elif any(_FULL in line for line in output.lines):
            hint = "Free some space, set a larger image-size, or make the tree elsewhere: work-in-memory, output-dir"
        else:
            hint = "The log has all that it has printed"
        return BuildError(f"{what}: {last}" if last else f"{what}, and said nothing.", hint=f"{hint}.")

    def _unseen(self, lines: Iterable[str]) -> str | None:
        """Return a path of this machine's own /tmp or /var/tmp that is in *lines*, and that scripts don't see."""
        seen = [*self._writable(), *self._readable()]
        for found in (match[0] for line in lines for match in _TEMPORARY.finditer(line)):
            path = os.path.normpath(found)
            if os.path.lexists(path) and not any(Path(path).is_relative_to(place) for place in seen):
                return path
        return None

    def _owner(self, name: str) -> str:
        """Return what the script *name* of the hooks is of, an element mostly; install-types makes links."""
        if name == _PACKAGES_SCRIPT:
            return "the setting extra-packages"
        path = self._told.hooks / name
        if name not in self._image.hooks and path.is_symlink():
            name = f"{name.partition('/')[0]}/{os.readlink(path)}"
        file = self._image.hooks.get(name)
        return f"the element {file.element}" if file else "no element"

    def _environment(self, phase: Phase) -> Mapping[str, str]:
        given = self._image.given
        paths = [str(self._told.top / "bin"), given.get("PATH", os.defpath), "/usr/local/sbin:/usr/sbin:/sbin"]
        path = {
            "PATH": ":".join(paths),
            "ARCH": self._image.architecture,
            "ELEMENTS_PATH": ":".join(map(str, self._image.directories)),
            "CALLER_DIRECTORY": os.getcwd(),
        }
        elements = {each.element.name: self._told.top / each.element.path for each in self._image.elements}
        return contract.environment(phase.directory, given, self._told, elements, path, self._devices)

    def _prepare_tree(self, inside: Namespaces, phase: Phase, what: str) -> None:
        try:
            inside.run(*self._on_tree(what))
        except CommandError as error:
            raise BuildError(f"{phase.directory}: {error.said}.", hint=error.hint) from error

    def _on_tree(self, what: str) -> list[str]:
        return ["bash", self._program("tree"), str(self._told.tree), str(self._told.top), what]

    @property
    def _mounted(self) -> Path:
        """Where it is said what of a disk is mounted, a line each."""
        return self._told.top / "run/mounted"

    def _program(self, name: str) -> str:
        return str(self._told.top / "run" / name)


# What is done to the tree before a phase, and after it.
_AROUND: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "root.d": ((), ("check", "open")),
    "post-root.d": ((), ("close",)),
    "pre-finalise.d": (("again",), ()),
    "cleanup.d": ((), ("finish",)),
}


def _is_hidden(path: str) -> bool:
    """Return whether scripts don't see the file, directory or socket *path* of this machine unless it is named."""
    if not path.startswith(("/tmp/", "/var/tmp/")):
        with contextlib.suppress(OSError, ValueError):
            return path.startswith("/") and stat.S_ISSOCK(os.stat(path).st_mode)
        return False
    # No socket of an agent can be opened.
    is_there = os.path.realpath(path) == path and (os.path.isfile(path) or os.path.isdir(path))
    return is_there and os.access(path, os.R_OK)


def _put(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
