"""How installers get their answer files: in the initrd, or on a seed disk that they look for."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...base import command
from ...base.errors import ConfigurationError, reason_of
from ...base.log import logger
from ...configuration.settings import ImageSettings
from ...model import Build, Given, Plan
from ...parts import Step, doing
from .. import answers


@dataclass(frozen=True)
class Delivery:
    """What an installer needs to find its answer file.

    *argument* is of the kernel, ``{name}`` in it the file's name.  *label* is that of the seed disk, empty
    where the file is put into the initrd.  *name* is the file's name on the seed disk, ``{suffix}`` in it
    the suffix of the file's own; *others* are more files there, each of one line.  *boot_files* are the
    kernel and the initrd on the installer's ISO, ``{arch}`` the architecture, where virt-install may not
    know them.  *further* is what the names of further files have to end with, any of which the installer's
    system takes over from the initrd.
    """

    argument: str
    label: str = ""
    name: str = ""
    others: tuple[tuple[str, str], ...] = ()
    boot_files: tuple[str, str] | None = None
    further: tuple[str, ...] = ("",)


# By the key of the answer file.  An initrd's root is gone once Subiquity or Agama run.  Theirs are from
# https://canonical-subiquity.readthedocs-hosted.com/en/latest/howto/autoinstall-quickstart.html
# (cloud-init takes a disk with this label by itself, if it has meta-data too; without the argument the
# installer asks before it touches the disk) and https://agama-project.github.io/docs/user/unattended
# (the suffix tells JSON, Jsonnet and AutoYaST's XML apart).
DELIVERIES = {
    "preseed": Delivery("preseed/url=file:///{name}"),
    # Of the initrd's root, the hook anaconda-copy-ks of dracut saves these.
    "kickstart": Delivery("inst.ks=file:///{name}", further=("cfg", "ks")),
    "yast": Delivery("autoyast=file:///{name}"),
    "autoinstall": Delivery(
        "autoinstall",
        label="CIDATA",
        name="user-data",
        others=(("meta-data", "instance-id: image-factory"),),
        boot_files=("casper/vmlinuz", "casper/initrd"),
    ),
    "agama": Delivery(
        "inst.auto=label://OEMDRV/{name}",
        label="OEMDRV",
        name="autoinst{suffix}",
        boot_files=("boot/{arch}/loader/linux", "boot/{arch}/loader/initrd"),
    ),
}


# Scripts that an installer writes to the system as they stand there, by the key of the answer file.  The other
# formats have them indented or on one line, so that they are another text there.
_SCRIPTS = {
    "kickstart": re.compile(rb"^%(?:pre|post|pre-install|onerror|traceback|addon|include)\b.*?^%end\b", re.M | re.S),
    "yast": re.compile(rb"<!\[CDATA\[.*?\]\]>|<file_contents>.*?</file_contents>", re.S),
}


def chosen(settings: ImageSettings) -> Delivery | None:
    """Return how the answer file of *settings* is delivered, None if there is none."""
    return DELIVERIES[settings.answer_file_key] if settings.answer_file_key else None


def name_of(settings: ImageSettings) -> str:
    """Return the name by which the installer knows the answer file, which there is."""
    delivery, answer_file = chosen(settings), settings.answer_file
    assert delivery is not None
    assert answer_file is not None
    own = answers.installer_name(answer_file)
    return delivery.name.format(suffix=Path(own).suffix) or own


def kernel_argument(settings: ImageSettings) -> str:
    """Return what the installer's kernel is told of the answer file, empty if there is none."""
    delivery = chosen(settings)
    return delivery.argument.format(name=name_of(settings)) if delivery else ""


def boot_files(settings: ImageSettings) -> tuple[str, ...]:
    """Return where kernel and initrd are on the installer's ISO, nothing if virt-install finds them."""
    delivery = chosen(settings)
    return tuple(path.format(arch=settings.arch) for path in (delivery and delivery.boot_files) or ())


def programs(settings: ImageSettings) -> list[str]:
    """Return the programs that the delivery needs."""
    delivery = chosen(settings)
    if delivery is None:
        return []
    # virt-install injects with cpio, which its Debian package doesn't depend on.
    return ["xorriso"] if delivery.label else ["cpio"]


def is_made(settings: ImageSettings) -> bool:
    """Return whether the installer gets something else than the answer file, which there is, as it is."""
    delivery, answer_file = chosen(settings), settings.answer_file
    assert delivery is not None
    assert answer_file is not None
    return bool(delivery.label or settings.answer_files) or answers.is_changed(answer_file)


def copy_path(build: Build) -> Path:
    """Return where the copy of the answer file is that the installer gets, in a directory without others."""
    return build.directory / "answers" / name_of(build.plan.settings)


def check(plan: Plan) -> None:
    """Raise ConfigurationError if a further file can't be given to the installer under its name."""
    settings = plan.settings
    delivery, where = chosen(settings), f"[{plan.image}] answer-files"
    taken = {name_of(settings), *(name for name, _ in delivery.others)} if delivery else set()
    for file in settings.answer_files:
        if delivery is None:
            raise ConfigurationError(f"{where}: there is no answer file that they belong to.", hint="Name it, too.")
        if answers.is_template(file.path):
            raise ConfigurationError(
                f"{where}: {file.path} would not be rendered.",
                hint="Only the answer file is, and what it includes.",
            )
        if file.name in taken:
            raise ConfigurationError(f"{where}: the installer would get two files with the name {file.name}.")
        for other in taken:
            if file.name.startswith(f"{other}/") or other.startswith(f"{file.name}/"):
                raise ConfigurationError(
                    f"{where}: {min(file.name, other)} can't be a file and a directory with others in it.",
                    hint="Give one of them another name, as in PATH:NAME.",
                )
        if not delivery.label and "/" in file.name:
            raise ConfigurationError(
                f"{where}: {file.name} can't be in a directory: virt-install puts files into the initrd's root only.",
                hint=f"Give it a name there, {file.path}:{Path(file.name).name}, and use that in the answer file.",
            )
        if not file.name.endswith(delivery.further):
            raise ConfigurationError(
                f"{where}: the installer loses {file.name} when it leaves its initrd.",
                hint=f"It keeps what ends in {' or '.join(delivery.further)}: give it such a name.",
            )
        taken.add(file.name)


def copies(build: Build) -> list[Path]:
    """Return the copies of the answer file and of the further files."""
    copy = copy_path(build)
    return [copy, *(copy.parent / file.name for file in build.plan.settings.answer_files)]


def write_further(build: Build) -> list[tuple[Path, Path]]:
    """Write the copies of the further files, as they are, beside that of the answer file; return file and copy."""
    written = []
    for file in build.plan.settings.answer_files:
        copy = copy_path(build).parent / file.name
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            answers.write_private(copy, file.path.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"[{build.plan.image}] answer-files: {reason_of(error)}.") from error
        written.append((file.path, copy))
    return written


def further_contents(build: Build) -> list[bytes]:
    """Return what the installer got as further files; a user's own file may be another one by now, or gone."""
    found = []
    for file in build.plan.settings.answer_files:
        copy = copy_path(build).parent / file.name
        try:
            found.append((copy if copy.exists() else file.path).read_bytes())
        except OSError as error:
            logger.warning("answer-files: nothing of %s is looked for: %s.", file.path, reason_of(error))
    return found


def given(build: Build) -> Given:
    """Return what the installer got; the user's own files may be others by now."""
    settings = build.plan.settings
    delivery = chosen(settings)
    if delivery is None:
        return Given()
    copy = copy_path(build)
    data = copy.read_bytes() if copy.exists() else answers.content(build.plan)
    script = _SCRIPTS.get(settings.answer_file_key or "")
    return Given(
        name_of(settings),
        tuple(script.split(data)) if script else (data,),
        # Further files may be scripts that belong on the disk, so no part of them is among the pieces.
        b"\n".join([data, *further_contents(build)]),
        tuple(text for _, text in delivery.others),
    )


def write_copy(build: Build) -> Path:
    """Write what the installer gets in place of the answer file, and what belongs to it; return its path.

    It is written anew also where it isn't rendered: the copies of a copy get its mode.
    """
    copy = copy_path(build)
    copy.parent.mkdir(mode=0o700)
    answers.write(build.plan, copy)
    for path, text in _others(build):
        path.write_text(f"{text}\n", encoding="utf-8")
    return copy


def _others(build: Build) -> list[tuple[Path, str]]:
    delivery = chosen(build.plan.settings)
    return [(copy_path(build).with_name(name), text) for name, text in delivery.others] if delivery else []


def seed_path(build: Build) -> Path | None:
    """Return where the seed disk is, None if the delivery needs none.

    It is beside the disk and not beside the answer file: QEMU of the system's libvirt can't get there.
    """
    delivery = chosen(build.plan.settings)
    return build.directory / "seed.iso" if delivery and delivery.label else None


def seed_argv(build: Build) -> list[str]:
    """Return the command that makes the seed disk, an ISO 9660 filesystem with the copies' directory in it."""
    delivery = chosen(build.plan.settings)
    assert delivery is not None
    return [
        "xorriso",
        "-report_about", "WARNING",
        "-outdev", f"stdio:{seed_path(build)}",
        "-volid", delivery.label,
        "-joliet", "on",
        "-map", str(copy_path(build).parent), "/",
        "-commit",
    ]  # fmt: skip


def seed_steps(build: Build) -> Iterator[Step]:
    """Give the step that makes the seed disk, if the delivery needs one."""
    if seed_path(build):
        written = [["#", "write", str(path)] for path, _ in _others(build)]
        make = doing(lambda state: _make_seed(state.build))
        yield Step("Making the seed disk", make, [*written, seed_argv(build)])


def _make_seed(build: Build) -> None:
    command.run(seed_argv(build), umask=0o077)


def by_hand_argvs(build: Build) -> list[list[str]]:
    """Return the commands by which a person makes what the installer gets; none if the user's own file will do."""
    settings = build.plan.settings
    if settings.answer_file is None or not is_made(settings):
        return []
    copy = copy_path(build)
    show = f"image-factory --show-answers {shlex.quote(build.plan.image)}"
    argvs = [
        ["mkdir", "-m", "700", str(copy.parent)],
        ["sh", "-c", f"umask 077; {show} > {shlex.quote(str(copy))}"],
        *(["sh", "-c", f"echo {shlex.quote(text)} > {shlex.quote(str(path))}"] for path, text in _others(build)),
        *(
            ["install", "-D", "-m", "600", str(file.path.absolute()), str(copy.parent / file.name)]
            for file in settings.answer_files
        ),
    ]
    if seed_path(build):
        argvs.append(["sh", "-c", f"umask 077; {shlex.join(seed_argv(build))}"])
    return argvs


def remove_seed(build: Build) -> None:
    """Remove the seed disk, which has the answer file's secrets, if there is one."""
    path = seed_path(build)
    if path:
        path.unlink(missing_ok=True)
