"""Make a disk of a system that is there: of a running machine, that ssh reaches, of a directory, or of a tar."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ...base import events
from ...base.cleanup import released
from ...base.errors import BuildError, CommandError, ConfigurationError
from ...base.files import check_readable
from ...base.log import logger
from ...base.units import format_size
from ...configuration.parsers import Origin
from ...configuration.settings import Dependent, ImageSettings
from ...disks import bounds, making
from ...elements import applying
from ...inside import namespaces
from ...machines import arch
from ...model import Build, Plan
from ...parts import Group, State, Step, carry_out, doing
from .. import bootstrap
from ..bootstrap import recipe
from ..kind import BESIDE_FIT, DiskSource, idle_beside
from . import generic, hosts, streams

_KEY = "capture-from"
_TREE = "tree"
# Nobody of this machine has them.
_NOBODY = "65534"


def check_settings(name: str, settings: ImageSettings) -> None:
    """Raise ConfigurationError unless *settings* name what to capture, and a disk that it can be put on."""
    if settings.capture_from is None:
        raise ConfigurationError(
            f"[{name}] has source = capture and no 'capture-from'.",
            hint="It is ssh://USER@HOST, or the path of a directory or a tar.",
        )
    bootstrap.check_disk_settings(name, settings)


def _origin(plan: Plan) -> Origin:
    assert plan.settings.capture_from is not None
    return plan.settings.capture_from


def identity(plan: Plan, used: Sequence[events.InputUsed] = ()) -> dict[str, str]:
    """Return a digest of each setting that makes the disk another one; of a tar its state counts."""
    origin = _origin(plan)
    texts = {
        _KEY: repr((str(origin), _state(origin.path))).encode(),
        "capture-mounts": repr(plan.settings.capture_mounts).encode(),
        **bootstrap.disk_identity_texts(plan, bootstrap.layout_of(plan)),
    }
    return {key: hashlib.sha256(data).hexdigest() for key, data in texts.items()}


def _state(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path and path.is_file() else None
    except OSError:
        status = None
    return (status.st_size, status.st_mtime_ns) if status else None


def programs(plan: Plan) -> list[str]:
    """Return the programs that it needs."""
    ssh = hosts.PROGRAMS if _origin(plan).path is None else ()
    inside = namespaces.programs(as_root=plan.as_root)
    return [*ssh, *streams.PROGRAMS, "od", *inside, *making.programs(bootstrap.layout_of(plan))]


def check(plan: Plan) -> None:
    """Raise ConfigurationError if the system can't be read, or the disk can't have it."""
    path = _origin(plan).path
    where = f"[{plan.image}] {_KEY}"
    if path is not None and path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise ConfigurationError(f"{where}: {path} is not readable.", hint="Build as a user who may read it.")
        if plan.work_path.resolve().is_relative_to(path.resolve()):
            raise ConfigurationError(
                f"{where}: the output directory is in {path}, so that the image would be captured too.",
                hint="Build elsewhere with --output-dir.",
            )
    elif path is not None:
        check_readable(where, path)
    if plan.settings.capture_mounts and path is not None:
        raise ConfigurationError(
            f"[{plan.image}] capture-mounts: {path} is no running machine.", hint="Leave it out: all of it is taken."
        )
    bootstrap.check_paths(plan)
    bootstrap.check_architecture(plan)
    bootstrap.check_layout(plan, bootstrap.layout_of(plan), str(plan.settings.layout))


def check_here(plan: Plan) -> None:
    """Raise ConfigurationError unless programs of the system run here, in namespaces."""
    if recipe.architecture(plan) != arch.ARCHITECTURES[arch.default_arch()].debian:
        bootstrap.check_emulation(plan)
    namespaces.check(as_root=plan.as_root)
    bootstrap.check_appliance(bootstrap.layout_of(plan).scheme)


class _Capture:
    """What the steps tell each other."""

    def __init__(self, build: Build) -> None:
        self._inside: namespaces.Namespaces | None = None
        plan = build.plan
        self._origin = _origin(plan)
        self._disk = bootstrap.layout_of(plan, bootstrap.new_identity(plan, identity(plan)))
        self._top = build.directory / _TREE
        self._kept: list[str] = []

    @property
    def tree(self) -> Path:
        """The root of the system."""
        return self._top / "root"

    def _part(self, number: int) -> Path:
        """Return where what is mounted in the system is unpacked: apart, where no link of the system's leads away."""
        return self._top / str(number)

    def entered(self, state: State, steps: Sequence[Step | Group]) -> State:
        """Carry out *steps* with namespaces, with which all that they have mounted goes."""
        build = state.build
        with released(partial(namespaces.remove, self._top)):
            self._top.mkdir()
            self._top.chmod(0o755)
            with namespaces.entered(build.directory, as_root=build.plan.as_root) as self._inside:
                return carry_out(state, steps)

    def place_argvs(self) -> list[list[str]]:
        """Return the commands that make the place for the tree, in which no device is one."""
        top = str(self._top)
        return [
            ["mount", "--bind", top, top],
            ["mount", "-o", "remount,bind,nodev,nosuid", top],
            ["mkdir", "-m", "755", str(self.tree)],
        ]

    def capture(self, state: State) -> None:
        """Have the system in the tree."""
        assert self._inside is not None
        path = self._origin.path
        events.tell(events.InputUsed(_KEY, str(self._origin), path if path and path.is_file() else None))
        for argv in self.place_argvs():
            self._inside.run(*argv)
        if path is None:
            self._capture_host(state.build)
        elif path.is_dir():
            self._copy_directory(path)
        else:
            self._unpack(path)
        found = generic.architecture(self._inside, self.tree, str(self._origin))
        _check_architecture(state.build.plan, self._origin, found)

    def _unpack(self, path: Path) -> None:
        assert self._inside is not None
        said, failed = streams.Said(), None
        try:
            self._inside.run(*streams.unpacking_argv(self.tree, str(path.absolute())), progress=said.unpacked)
        except CommandError as error:
            failed = error
        said.check(None, failed, str(path), str(path))
        said.tell()

    def _copy_directory(self, path: Path) -> None:
        assert self._inside is not None
        top = str(path.absolute())
        owner = self._inside.run("stat", "-c", "%u", top, capture=True, quiet=True).strip()
        if not self._inside.as_root and owner == _NOBODY:
            raise BuildError(
                f"{path} has owners that an ordinary user can't have in an image.", hint="Build as root, as it does."
            )
        reading = namespaces.entering_argv(self._inside.pid, *streams.reading_argv(top), as_root=self._inside.as_root)
        said = streams.Said()
        self._stream(reading, self.tree, said)
        said.tell()
        if said.elsewhere:
            logger.warning("Other filesystems are mounted there, and are left out: %s.", streams.named(said.elsewhere))

    def _stream(
        self, reading: Sequence[str], target: Path, said: streams.Said, progress: Callable[[int], None] | None = None
    ) -> None:
        """Have in *target* what the command *reading* prints; *progress* is told how many bytes have come."""
        assert self._inside is not None

        def follow(line: str) -> bool:
            if progress and (size := streams.progress(line)):
                progress(size)
            return said.follow(line)

        errors = self._inside.read(reading, *streams.unpacking_argv(target), take=said.take, follow=follow)
        source = next((error for error in errors if error.argv == [*reading]), None)
        target_error = next((error for error in errors if error is not source), None)
        if source and self._origin.path is None:
            said.check_end(target_error, str(self._origin))
            if source.status not in streams.READ or said.is_silent:
                raise hosts.explained(self._origin, source)
        said.check(source, target_error, str(self._origin), str(self._origin))

    def _capture_host(self, build: Build) -> None:
        assert self._inside is not None
        origin = self._origin
        host = hosts.ask(origin)
        _check_architecture(build.plan, origin, host.architecture)
        mounts = hosts.chosen(origin, host, build.plan.settings.capture_mounts)
        logger.info("What is captured: %s.", ", ".join(f"{mount.point} ({mount.kind})" for mount in mounts))
        size, free = hosts.used(origin, mounts), shutil.disk_usage(build.directory).free
        if size > free:
            raise BuildError(
                f"{origin} has {format_size(size)} in its filesystems, and {format_size(free)} are free here.",
                hint="Build elsewhere with --output-dir, or name less in capture-mounts.",
            )
        said, meter, came = streams.Said(), events.Meter(), [0] * len(mounts)

        def progress(number: int, count: int) -> None:
            came[number] = count
            meter.at(sum(came), size)

        for number, mount in enumerate(mounts):
            reading = hosts.argv(origin, *streams.reading_argv(mount.point, mount.point, host.swap))
            part = self._part(number) if number else self.tree
            if number:
                self._inside.run("mkdir", "-m", "755", str(part))
            self._stream(reading, part, said, partial(progress, number))
            for words in self._placing(mount.point, part) if number else []:
                self._inside.run(*words)
        said.tell()
        points = [mount.point for mount in host.mounts]
        if left := [point for point in said.elsewhere if point not in points]:
            logger.warning("Subvolumes of their own are left out: %s.", streams.named(left))

    def _placing(self, point: str, part: Path) -> list[tuple[str, ...]]:
        """Return the commands that put what is in *part* at *point* of the tree."""
        target = str(making.place(self.tree, point))
        return [bounds.check_argv(self.tree, [target]), ("mv", "--no-target-directory", str(part), target)]

    def make_generic(self, state: State) -> None:
        """Have the system start on other machines."""
        assert self._inside is not None
        generic.check_loader(self._inside, self.tree, self._disk)
        self._kept = generic.kept_lines(self._inside, self.tree, self._disk)
        generic.make(self._inside, self.tree, self._disk)

    def install_loader(self, state: State) -> None:
        """Install the boot loader."""
        assert self._inside is not None
        keeping = [generic.keep_command(self.tree, self._kept)] if self._kept else []
        for each in [*bootstrap.loader_commands(state.build, self.tree, self._disk), *keeping]:
            try:
                self._inside.run(*each.words, stdin=each.text.encode())
            except CommandError as error:
                raise BuildError(f"The boot loader can't be installed: {error.said}.", hint=error.hint) from error

    def make_disk(self, state: State) -> None:
        """Make the disk of the tree."""
        assert self._inside is not None
        layout = self._disk
        if not layout.size:
            layout = making.fitted(self._inside, self.tree, state.build, layout)
        making.make_disk(self._inside, self.tree, state.build, layout)

    def _capture_argvs(self, build: Build) -> list[list[str]]:
        origin, path = self._origin, self._origin.path
        shown = applying.shown(build, *self.place_argvs())
        if path is None:
            reading = hosts.argv(origin, *streams.reading_argv("MOUNT", "MOUNT"))
            return [*shown, hosts.ask_argv(origin), reading, *applying.shown(build, streams.unpacking_argv(self.tree))]
        if path.is_dir():
            argvs = [streams.reading_argv(str(path.absolute())), streams.unpacking_argv(self.tree)]
        else:
            argvs = [streams.unpacking_argv(self.tree, str(path.absolute()))]
        return [*shown, *applying.shown(build, *argvs)]

    def steps(self, build: Build) -> Iterator[Step]:
        """Give the steps that make the disk of *build*."""
        tree, layout = self.tree, bootstrap.layout_of(build.plan)
        holding = namespaces.holding_argv(as_root=build.plan.as_root)
        yield Step("Capturing the system", doing(self.capture), [holding, *self._capture_argvs(build)])
        making_generic = [each.words for each in generic.commands(tree, layout)]
        yield Step(
            "Freeing the system from its machine",
            doing(self.make_generic),
            applying.shown(build, generic.look_argv(tree), *making_generic),
        )
        loader = [each.words for each in bootstrap.loader_commands(build, tree, layout)]
        yield Step("Installing the boot loader", doing(self.install_loader), applying.shown(build, *loader))
        yield Step("Making the disk", doing(self.make_disk), making.disk_argvs(tree, build, layout))


def _check_architecture(plan: Plan, origin: Origin, found: str) -> None:
    """Raise BuildError unless the system of *origin*, which is of the architecture *found*, can be on the disk."""
    name = arch.debian_arch(found, arch.NAMES.get(found, "")) if found in arch.NAMES else found
    if name != recipe.architecture(plan):
        known = next((each.name for each in arch.ARCHITECTURES.values() if each.debian == name), name)
        can_be_made = name == "i386" or known in arch.ARCHITECTURES
        hint = f"Set arch = {known}." if can_be_made else "No disk can be made of it here."
        raise BuildError(
            f"The system of {origin} is one of {name}, and arch is {recipe.architecture(plan)}.", hint=hint
        )


def steps(build: Build) -> Iterator[Step | Group]:
    """Give the steps that make the disk."""
    work = _Capture(build)
    yield Group([*work.steps(build)], work.entered)


_DEPENDENT: Dependent = {
    **idle_beside("capture"),
    **BESIDE_FIT,
}

SOURCE = DiskSource(
    keys=(_KEY,),
    check_settings=check_settings,
    identity=identity,
    steps=steps,
    programs=programs,
    check=check,
    disk_size=bootstrap.disk_size,
    downloads=lambda plan: False,
    remote=lambda plan: [],
    files=lambda plan: None,
    # How large it is the system says, and that nothing of it may be cloned as it is nobody has to say.
    defaults={"image-size": "fit", "extra-size": "512M", "seal": "yes", "audit": "yes"},
    dependent=_DEPENDENT,
    fits=True,
    check_here=check_here,
)
