"""Judge images that others have made: what must not be cloned, what is in them, and what differs between two."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from . import foreign, pipeline, workspace
from .base import command, events, files
from .base.cleanup import released
from .base.errors import BuildError, ConfigurationError
from .base.events import BootCheck
from .base.units import format_size
from .checks import audit
from .finishing import manifest
from .model import MANIFEST_SUFFIX, SBOM_SUFFIX, Artifact, Build, Disk, Plan
from .outputs import raw_copy_argv
from .parts import Group, State, Step, carry_out, doing, mounted, on_tree
from .system import mounts
from .system.inventory import Inventory, take_inventory, taken
from .told import junit

Tell = Callable[[str], None]


class DifferError(BuildError):
    """Two images are not the same."""


@contextmanager
def _looked_into(plan: Plan, path: Path) -> Iterator[tuple[Build, Artifact]]:
    """Give the image at *path* as ``foreign.opened`` does; that it can't be looked into is an error of its own."""
    try:
        with foreign.opened(plan, path) as (build, artifact):
            yield build, artifact
    except audit.FoundError:
        raise
    except BuildError as error:
        # The steps of builds say so of the disk, of which they have one alone.
        message = error.message if plan.image in error.message else f"{path}: {error.message}"
        raise ConfigurationError(message, hint=error.hint) from error


def _mountable(build: Build, artifact: Artifact) -> tuple[Build, Artifact]:
    """Return *build* and *artifact*, of a tree a disk; ConfigurationError if it can't be mounted here."""
    build, disk = foreign.laid(build, artifact)
    command.require(mounts.programs(build.plan))
    mounts.check(build.plan)
    return build, disk


class _Audited:
    """An observer that keeps what the audit has found."""

    event: events.Audited | None = None

    def notice(self, event: events.Event) -> None:
        """Keep it."""
        if isinstance(event, events.Audited):
            self.event = event


def audit_image(plan: Plan, path: Path, tell: Tell) -> None:
    """Audit the image at *path*, *tell* what is found and write that as JUnit; audit.FoundError if it is something."""
    pipeline.check_output_dir(plan)
    start, kept = time.monotonic(), _Audited()
    with _looked_into(plan, path) as (build, artifact), events.observed(kept):
        build, disk = _mountable(build, artifact)
        state = State(build, Disk(build.disk_path), artifacts=(disk,))
        try:
            carry_out(state, [audit.looking(build, [disk], foreign=True)])
        except audit.FoundError as error:
            # What that is was told already.
            error.message, error.hint = f"{plan.image} has what must not be cloned.", _moves(kept.event)
            raise
        finally:
            if kept.event:
                _tell_findings(plan, kept.event, time.monotonic() - start, tell)


# Of what these find some may be meant to be there, and keys of --set say what.
_MEANT = {"passwords": "root-password-hash", "authorized-keys": "authorized-keys"}


def _moves(found: events.Audited | None) -> str:
    """Return what can be done about what was *found*."""
    names = list(dict.fromkeys(check for check, _ in found.findings)) if found else []
    moves = [f"--set {_MEANT[name]}=... says which is meant to be there" for name in names if name in _MEANT]
    if not {*names} <= {*_MEANT}:
        moves.insert(0, "'image-factory --seal' takes most of it away")
    return f"{', '.join(moves)}, --set audit-skip={','.join(names)} leaves checks out."


def _tell_findings(plan: Plan, found: events.Audited, seconds: float, tell: Tell) -> None:
    said: dict[str, list[str]] = {name: [] for name in found.checks}
    for check, what in found.findings:
        said[check].append(what)
    checks = [BootCheck(name, "failed" if said[name] else "passed", "; ".join(said[name])) for name in found.checks]
    text = ""
    if found.unsearched:
        text = (
            "Nothing is known of how it was made, such as its answer file and its proxies: in its bytes nothing was "
            f"searched for by {', '.join(found.unsearched)}."
        )
    _put(plan, junit.document_of_checks(f"{plan.image} audit", plan.image, checks, seconds, text))
    count = len(found.findings)
    tell(f"{plan.image}: the audit has found {count or 'nothing'}{_things(count)}.")
    width = max(map(len, found.checks), default=0)
    for check, what in found.findings:
        tell(f"  {check:<{width}}  {what}")
    if text:
        tell(text)


def _things(count: int) -> str:
    return {0: "", 1: " thing"}.get(count, " things")


def _put(plan: Plan, document: bytes) -> None:
    workspace.make_output_dir(plan)
    junit.put(plan, document)


# What is in an image.


def _inventory_of(build: Build, disk: Artifact) -> Inventory:
    """Return what is in the system on *disk*."""
    copy = build.directory / "copy.raw"
    argv = raw_copy_argv(disk, copy)
    with released(partial(copy.unlink, missing_ok=True)):
        steps: list[Step | Group] = [
            # Others get through the working directory of root's builds.
            Step(f"Copying {disk.path.name}", doing(lambda state: _run(argv)), [argv]),
            mounted([Step("Listing packages", on_tree(take_inventory))], lambda build: copy),
        ]
        carry_out(State(build, Disk(copy)), steps)
    found = taken(build)
    assert found is not None
    return found


def _run(argv: Sequence[str]) -> None:
    command.run(argv, umask=0o077)


def _document_of(plan: Plan, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest of the image at *path*, and its SBOM."""
    with _looked_into(plan, path) as (build, artifact):
        inventory = _inventory_of(*_mountable(build, artifact))
        found = dataclasses.replace(artifact, path=path, sha256=files.digest_of(path))
        return manifest.manifest(plan, inventory, found, None), manifest.sbom(plan, inventory, found)


def describe_image(plan: Plan, path: Path, tell: Tell) -> None:
    """Write the manifest and the SBOM of the image at *path* to the output directory, and *tell* what they say."""
    pipeline.check_output_dir(plan)
    document, sbom = _document_of(plan, path)
    workspace.make_output_dir(plan)
    tell(f"{plan.image}:")
    for name, text in _summary(document):
        tell(f"  {name:<12}  {text}")
    for name, suffix, each in (("manifest", MANIFEST_SUFFIX, document), ("SBOM", SBOM_SUFFIX, sbom)):
        target = plan.output_dir / f"{plan.image}{suffix}"
        # In ASCII no control character reaches a terminal.
        files.replace(target, (json.dumps(each, indent=2) + "\n").encode("ascii"))
        tell(f"  {name:<12}  {target}")


def _summary(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "system", document["os"].get("pretty_name", "not known")
    for kernel in document["kernels"]:
        yield "kernel", kernel
    yield "packages", str(len(document["packages"]))
    yield "installed", format_size(sum(document["directories"].values()))
    yield "SHA-256", document["artifact"]["sha256"]


# What differs between two.


def compare_images(plans: Sequence[Plan], paths: Sequence[Path], tell: Tell) -> None:
    """Compare the packages of two images, or manifests, and *tell* what differs; DifferError if something does.

    The results are written as JUnit, by the name of the second one.
    """
    start = time.monotonic()
    documents = [manifest.read(path) for path in paths]
    pipeline.check_output_dir(plans[1])
    before, after = (
        document or _document_of(plan, path)[0] for plan, path, document in zip(plans, paths, documents, strict=True)
    )
    difference = manifest.compare(before, after, plans[0].image)
    events.tell(events.Compared(difference))
    changes: Mapping[str, Sequence[Mapping[str, str]]] = difference["packages"]
    checks = [
        BootCheck(f"packages-{kind}", "failed" if found else "passed", "; ".join(map(_change, found)))
        for kind, found in changes.items()
    ]
    name = f"{plans[1].image} compared with {plans[0].image}"
    _put(plans[1], junit.document_of_checks(name, plans[1].image, checks, time.monotonic() - start))
    for line in manifest.difference_lines(difference):
        tell(line)
    if any(changes.values()):
        raise DifferError(f"{os.fspath(paths[0])} and {os.fspath(paths[1])} have not the same packages.")
    tell(f"{plans[0].image} and {plans[1].image} have the same packages.")


def _change(package: Mapping[str, str]) -> str:
    version = package.get("version") or f"{package['before']} -> {package['after']}"
    return f"{package['name']}.{package['architecture']} {version}"


# A copy without what must not be cloned.


@contextmanager
def sealing(path: Path, given: Mapping[str, str], flags: Mapping[str, str]) -> Iterator[Plan]:
    """Give the plan of a build that makes a sealed copy of the image at *path*, in its format if nothing else is given.

    *given* and *flags* are texts of settings by key.  ConfigurationError if the file can't be opened, or has no disk.
    """
    flag, settings = "--seal", {"seal": "yes"}
    with foreign.opened(foreign.plan_of(flag, path, settings, given, {}), path) as (_, artifact):
        if artifact.format == foreign.TREE:
            raise ConfigurationError(f"{flag}: {path} is a tar of a system's files, no disk.")
        # What is in place of a link is another user's to choose.
        disk = Path(os.path.realpath(artifact.path))
        own = {"format": artifact.format, "image-name": "${image}-${date}", **given}
        yield foreign.plan_of(flag, disk, settings, own, flags, name=foreign.stem_of(path))
