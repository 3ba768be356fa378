"""A published tar on an empty disk, as curtin and others that deploy it have it there: partitions, fstab, boot loader.

The boot loader comes from the packages of the tar alone.  The programs of the tree run in namespaces, without a network
and without a right beyond the tree.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...base import command
from ...base.cleanup import released
from ...base.errors import BuildError, CommandError, ConfigurationError
from ...configuration.settings import ImageSettings
from ...disks import bounds, layouts, making
from ...inside import namespaces
from ...inside.namespaces import Namespaces
from ...machines import arch
from ...model import Artifact, Build, Plan
from ...outputs import formats, trees

# Those that are laid on disks; the other formats of the tree are for containers.
TARS = ("tar", "tar.gz", "tgz", "tar.xz", "tar.zst")
# Whose boot loader is installed here; the first where nothing is said.
_DISTRIBUTIONS = (None, "Debian", "Ubuntu")

# The words of curtin (curtin/commands/extract.py), for a file that another program unpacks before.
_EXTRACTING = "--xattrs --xattrs-include=* -Sxpf - --numeric-owner"
# A user's namespaces can't make devices, and a system that boots finds a filesystem of the kernel's on /dev.
_LEFT_OUT = "--anchored --exclude=./dev/?* --exclude=dev/?*"
_UNPACK = f'from=$1 tree=$2; shift 2; set -f; "$@" <"$from" | tar -C "$tree" {_LEFT_OUT} {_EXTRACTING}'

_TAR_ENDS = ("exiting now", "due to previous errors")

# Prints those of the patterns that nothing in the tree $1 matches.
_LACKING = """\
cd "$1" && shift && for pattern; do
    for found in $pattern; do [ -e "$found" ] || [ -L "$found" ] || echo "$pattern"; break; done
done
"""
_DPKG = "var/lib/dpkg/status"
_KERNEL = "boot/vmlinuz-*"
# What a disk for a firmware needs of the tree, and Debian's package that has it.
_LOADERS = {
    "": {"usr/sbin/grub-mkconfig": "grub-common", "usr/bin/grub-mkimage": "grub-common"},
    "bios": {"usr/lib/grub/i386-pc/boot.img": "grub-pc-bin"},
    "uefi": {
        "usr/lib/grub/{kind}/modinfo.sh": "grub-efi-{debian}-bin",
        "usr/lib/grub/{kind}-signed/*.efi.signed": "grub-efi-{debian}-signed",
        "usr/lib/shim/shim*.efi.signed": "shim-signed",
    },
}
_FIRMWARES = {"bios": "BIOS", "uefi": "UEFI"}
# What is free on the root filesystem: logs, and what cloud-init writes.
_FREE = 1 << 30
# bwrap looks for its own processes there.
_PROC = ("mount", "-t", "proc", "proc", "/proc")
_SECONDS = 4 * 3600.0


def _is_known(settings: ImageSettings) -> bool:
    return settings.distribution in _DISTRIBUTIONS and not settings.kickstart and not settings.agama


def laid(plan: Plan, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return those of *artifacts* that are laid on disks."""
    return [found for found in artifacts if found.format in TARS and _is_known(plan.settings)]


def why_not(plan: Plan, artifact: Artifact) -> str:
    """Return why the tar *artifact* is not laid on a disk; empty if it is, or is no tar."""
    if artifact.format not in TARS or _is_known(plan.settings):
        return ""
    return "only a boot loader of Debian's or Ubuntu's packages can be installed here"


def _is_wanted(plan: Plan) -> bool:
    return _is_known(plan.settings) and any(name in TARS for name in formats(plan))


def layout_of(plan: Plan, firmware: str) -> layouts.Layout:
    """Return the disk for *firmware*: GPT with an ESP, or a table of MBR; it gets its size from the tree."""
    root = layouts.root_of("ext4", "", ())
    if firmware == "bios":
        wanted = (layouts.Wanted("root", "83", filesystem=root, bootable=True),)
        scheme = layouts.Scheme("dos", wanted)
    else:
        scheme = layouts.scheme(firmware, plan.settings.arch, root)
    return layouts.Layout(scheme, firmware, plan.settings.arch, 0, extra=_FREE)


def programs(plan: Plan, firmwares: Sequence[str]) -> list[str]:
    """Return the programs that lay the tars of *plan* on disks."""
    if not _is_wanted(plan):
        return []
    foreign = ["arch-test"] if _is_foreign(plan) else []
    making_them = [name for firmware in firmwares for name in making.programs(layout_of(plan, firmware))]
    return [*namespaces.programs(as_root=plan.as_root), "bwrap", "bash", "tar", *foreign, *making_them]


def _is_foreign(plan: Plan) -> bool:
    return not arch.is_host(plan.settings.arch)


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it is known already that the tars of *plan* can't be laid on disks here."""
    if not _is_wanted(plan):
        return
    namespaces.check(as_root=plan.as_root)
    if _is_foreign(plan):
        try:
            command.run(["arch-test", arch.ARCHITECTURES[plan.settings.arch].debian], quiet=True)
        except BuildError as error:
            raise ConfigurationError(
                f"[{plan.image}] test-boot: this machine runs no programs of {plan.settings.arch}, which install the "
                "boot loader of a tar.",
                hint="Install what emulates them: apt-get install qemu-user-static. Or set test-boot = no.",
            ) from error


def confined_argv(tree: Path, *words: str) -> list[str]:
    """Return the command that runs the program *words* of *tree*, which reaches nothing but the tree."""
    # Whoever is root in a mere chroot gets out of it.  With ``--dev-bind`` there are the devices that are in the tree.
    apart = ["--unshare-ipc", "--unshare-net", "--unshare-pid", "--new-session", "--die-with-parent"]
    return ["bwrap", "--dev-bind", str(tree), "/", "--cap-drop", "ALL", *apart, "--chdir", "/", "--", *words]


def unpacking_argv(artifact: Artifact, tree: Path) -> list[str]:
    """Return the command that puts what the tar *artifact* has into the directory *tree*."""
    reading = trees.reading_argv(artifact.format, artifact.path)
    return ["bash", "-o", "pipefail", "-c", _UNPACK, "bash", str(artifact.path), str(tree), *reading]


def unpack(inside: Namespaces, artifact: Artifact, tree: Path) -> None:
    """Put what the tar *artifact* has into the directory *tree*; BuildError says what is wrong with it."""
    try:
        inside.run(*unpacking_argv(artifact, tree), timeout=_SECONDS)
    except CommandError as error:
        # tar ends with words that say nothing.
        said = [line for line in error.last_lines if not line.endswith(_TAR_ENDS)]
        raise BuildError(
            f"{artifact.path.name} can't be unpacked: {said[-1] if said else error.said}.",
            hint="It takes a filesystem for a system's files: build on ext4, xfs or btrfs with --output-dir.",
        ) from error


@dataclasses.dataclass(frozen=True)
class Laying:
    """*artifact* on a disk for *firmware*, in the *directory* of its own."""

    build: Build
    artifact: Artifact
    firmware: str

    @property
    def name(self) -> str:
        """What a log calls it."""
        return f"Laying {self.artifact.path.name} on a disk for {_FIRMWARES[self.firmware]}"

    @property
    def directory(self) -> Path:
        """Where the disk is, and all that it takes to make it."""
        return self.build.directory / f"laid-{self.artifact.format}-{self.firmware}"

    @property
    def disk(self) -> Artifact:
        """The disk, of no size as long as there is none."""
        path = self._build.disk_path
        return Artifact(path, "raw", path.stat().st_size if path.exists() else 0, upload=False)

    @property
    def _build(self) -> Build:
        return dataclasses.replace(self.build, directory=self.directory)

    @property
    def _tree(self) -> Path:
        return self.directory / "tree" / "root"

    def commands(self) -> list[list[str]]:
        """Return the commands as a dry run shows them."""
        as_root = self.build.plan.as_root
        layout = layout_of(self.build.plan, self.firmware)
        inside = [_PROC, unpacking_argv(self.artifact, self._tree), *(each.words for each in self._installing(layout))]
        entered = [namespaces.entering_argv("PID", *words, as_root=as_root) for words in inside]
        made = making.disk_argvs(self._tree, self._build, layout)
        return [namespaces.holding_argv(as_root=as_root), *entered, *made]

    def _installing(self, layout: layouts.Layout) -> Iterator[making.Inside]:
        """Give the commands that put fstab and GRUB into the tree, in the place of those that may be there."""
        tree = self._tree
        old = [tree / "boot/grub" / kind for kind in ("i386-pc", "x86_64-efi", "arm64-efi")]
        esp = str(tree / layouts.ESP_POINT.lstrip("/"))
        # That of the image's own ESP is in the tar; FAT knows no case.
        finding = ("find", esp, "-mindepth", "1", "-maxdepth", "1", "-iname", "EFI", "-exec", "rm", "-rf", "{}", "+")
        commands = [making.Inside(words) for words in (("mkdir", "-p", esp), finding, ("rm", "-rf", *map(str, old)))]
        commands += making.loader_commands(tree, self.directory, layout)
        parts = making.parts(tree, layout)
        last = [making.Inside(bounds.check_argv(tree, parts))] if parts else []
        for each in (*bounds.guarded(tree, commands), *last):
            is_own = each.words[0] == "chroot"
            yield dataclasses.replace(each, words=tuple(confined_argv(tree, *each.words[2:]))) if is_own else each

    def carry_out(self) -> None:
        """Make the disk; BuildError says what the tar lacks for it."""
        build = self.build
        layout = dataclasses.replace(layout_of(build.plan, self.firmware), identity=layouts.random_identity())
        self.directory.mkdir(mode=0o700)
        place = self._tree.parent
        with released(lambda: namespaces.remove(place)):
            self._tree.mkdir(parents=True)
            for path in (place, self._tree):
                path.chmod(0o755)
            with namespaces.entered(self.directory, as_root=build.plan.as_root) as inside:
                inside.run(*_PROC)
                unpack(inside, self.artifact, self._tree)
                self._check(inside, layout)
                self._install(inside, layout)
                fitted = making.fitted(inside, self._tree, self._build, layout)
                making.make_disk(inside, self._tree, self._build, fitted)

    def _install(self, inside: Namespaces, layout: layouts.Layout) -> None:
        for each in self._installing(layout):
            try:
                inside.run(*each.words, stdin=each.text.encode())
            except CommandError as error:
                raise BuildError(
                    f"The boot loader of {self.artifact.path.name} can't be installed: {error.said}.", hint=error.hint
                ) from error

    def _check(self, inside: Namespaces, layout: layouts.Layout) -> None:
        """Raise BuildError if the tree lacks what a system that boots with the firmware has."""
        name = self.artifact.path.name
        if self._lacking(inside, [_DPKG]):
            raise BuildError(
                f"{name} is no system of Debian's or Ubuntu's packages, whose boot loader can be installed here.",
                hint="Set 'distribution' to its name: then the disk is booted, if there is one, in place of the tar.",
            )
        if self._lacking(inside, [_KERNEL]):
            raise BuildError(
                f"{name} has no kernel: there is no /{_KERNEL}.",
                hint="Install one, and have tar-exclude leave /boot in; or set test-boot = no.",
            )
        names = {"kind": making.EFI_KIND[layout.arch], "debian": arch.ARCHITECTURES[layout.arch].debian}
        needed = {
            path.format(**names): package.format(**names)
            for path, package in (_LOADERS[""] | _LOADERS[self.firmware]).items()
        }
        packages = dict.fromkeys(needed[path] for path in self._lacking(inside, list(needed)))
        if packages:
            raise BuildError(
                f"{name} can't boot with {_FIRMWARES[self.firmware]} where it is deployed: it has no "
                f"{', '.join(packages)}.",
                hint="Add to the packages of the system what is missing, or set another firmware.",
            )
        making.check_tools(inside, self._tree, layout)

    def _lacking(self, inside: Namespaces, patterns: Sequence[str]) -> list[str]:
        """Return those of *patterns* that nothing in the tree matches."""
        return inside.run("sh", "-c", _LACKING, "sh", str(self._tree), *patterns, capture=True, quiet=True).split()
