"""The manifest beside an artifact: what is in the image, an SBOM of it, and what has changed since the last build."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import stat
import urllib.parse
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__, naming
from ..base import events
from ..base.log import logger
from ..base.units import format_size
from ..model import MANIFEST_SUFFIX, SBOM_SUFFIX, Artifact, Build, Plan
from ..parts import Group, Shown, State, Step, mounted, on_tree
from ..system.inventory import Inventory, Package, take_inventory, taken

SCHEMA_VERSION = 1

_CYCLONEDX = "1.6"
# For version 5 UUIDs (RFC 9562): the same image has the same serial number.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:image-factory:sbom")
# Of a manifest of an earlier build.
_LARGEST = 64 << 20
# So many packages of a kind are named in the summary.
_NAMED = 40


def listing_steps(build: Build) -> Iterator[Step]:
    """Give the step on the mounted system that a manifest needs, if one is wanted."""
    if build.plan.settings.manifest:
        yield Step("Listing packages", on_tree(take_inventory))


def late_steps(build: Build) -> Iterator[Group]:
    """Give what lists the packages where no manifest was wanted yet when the disk was cleaned, and one is now."""
    if not build.plan.settings.manifest:
        return
    group = mounted([*listing_steps(build)], lambda build: build.disk_path)

    def shown(state: State, steps: Sequence[Step | Group]) -> list[Shown]:
        return group.shown(state, steps) if is_needed(state) else []

    def is_needed(state: State) -> bool:
        return not state.cleans and not taken(state.build)

    yield dataclasses.replace(group, shown=shown, when=is_needed)


def steps(build: Build) -> Iterator[Step]:
    """Give the step that writes manifests, if they are wanted."""

    def run(state: State) -> State:
        return dataclasses.replace(state, artifacts=tuple(add_manifests(state.build, state.artifacts)))

    if build.plan.settings.manifest:
        yield Step("Writing manifests", run)


def add_manifests(build: Build, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Write a manifest and an SBOM beside each of *artifacts*, and return these with them."""
    inventory = taken(build)
    assert inventory is not None
    sizes = {artifact.format: artifact.path.stat().st_blocks * 512 for artifact in artifacts}
    difference = find_difference(build.plan, inventory, sizes)
    found = []
    for artifact in artifacts:
        texts = {
            MANIFEST_SUFFIX: manifest(build.plan, inventory, artifact, difference),
            SBOM_SUFFIX: sbom(build.plan, inventory, artifact),
        }
        written = tuple(_write(artifact.path, suffix, document) for suffix, document in texts.items())
        found.append(dataclasses.replace(artifact, companions=(*artifact.companions, *written)))
    for line in difference_lines(difference):
        logger.info("%s", line)
    return found


def named(plan: Plan, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return *artifacts* with the names of what add_manifests will write, for --dry-run."""
    suffixes = (MANIFEST_SUFFIX, SBOM_SUFFIX) if plan.settings.manifest else ()
    return [
        dataclasses.replace(
            artifact, companions=(*artifact.companions, *((artifact.path.name + suffix, "") for suffix in suffixes))
        )
        for artifact in artifacts
    ]


def _write(beside: Path, suffix: str, document: dict[str, Any]) -> tuple[str, str]:
    """Write *document*; return the file's name and its SHA-256."""
    path = beside.with_name(beside.name + suffix)
    # In ASCII no control character reaches a terminal.
    data = (json.dumps(document, indent=2) + "\n").encode("ascii")
    path.write_bytes(data)
    return path.name, hashlib.sha256(data).hexdigest()


def manifest(plan: Plan, inventory: Inventory, artifact: Artifact, difference: dict[str, Any] | None) -> dict[str, Any]:
    """Return the manifest of *artifact*, which data/manifest.schema.json describes."""
    status = artifact.path.stat()
    return {
        "schema_version": SCHEMA_VERSION,
        "program": "image-factory",
        "version": __version__,
        "image": plan.image,
        "date": plan.date.isoformat(),
        "artifact": {
            "name": artifact.path.name,
            "format": artifact.format,
            "size": status.st_size,
            "size_on_disk": status.st_blocks * 512,
            "virtual_size": artifact.virtual_size,
            "sha256": artifact.sha256,
        },
        "architecture": plan.settings.arch,
        "os": dict(inventory.os),
        "kernels": inventory.kernels,
        "directories": dict(inventory.directories),
        "sources": [*inventory.sources],
        "packages": [dataclasses.asdict(package) for package in inventory.packages],
        "difference": difference,
    }


# The SBOM.  It is made here, as Debian 12 has no library for it; what is written is the same on all machines.


def sbom(plan: Plan, inventory: Inventory, artifact: Artifact) -> dict[str, Any]:
    """Return the software bill of materials of *artifact* in the form of CycloneDX."""
    assert artifact.sha256 is not None
    system = inventory.os.get("id", "linux")
    return {
        "bomFormat": "CycloneDX",
        "specVersion": _CYCLONEDX,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, f'{artifact.path.name} {artifact.sha256}')}",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "image-factory", "version": __version__}]},
            "component": {
                "type": "file",
                "bom-ref": artifact.path.name,
                "name": plan.image,
                "version": plan.date.isoformat(),
                "hashes": [{"alg": "SHA-256", "content": artifact.sha256}],
            },
        },
        "components": [
            {
                "type": "operating-system",
                "bom-ref": "operating-system",
                "name": system,
                "version": inventory.os.get("version_id", ""),
                "description": inventory.os.get("pretty_name", ""),
            },
            *(_component(package, inventory.os) for package in inventory.packages),
        ],
    }


def _component(package: Package, system: Mapping[str, str]) -> dict[str, Any]:
    purl = package_url(package, system)
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": purl,
        "name": package.name,
        "version": package.version,
        "purl": purl,
    }
    if package.licenses:
        # By name: dpkg's and rpm's names are not always those of SPDX.
        component["licenses"] = [{"license": {"name": name}} for name in package.licenses]
    return component


def package_url(package: Package, system: Mapping[str, str]) -> str:
    """Return the package URL of *package*, by which scanners know it (ECMA-427)."""
    distribution = system.get("id", "linux")
    epoch, colon, version = package.version.rpartition(":")
    qualifiers = {
        "arch": package.architecture,
        "distro": "-".join(filter(None, (distribution, system.get("version_id", "")))),
        **({"epoch": epoch} if colon and package.kind == "rpm" else {}),
        **({"upstream": package.source} if package.source != package.name else {}),
    }
    shown = version if package.kind == "rpm" else package.version
    words = "&".join(f"{key}={_quoted(value)}" for key, value in qualifiers.items())
    return f"pkg:{package.kind}/{_quoted(distribution.lower())}/{_quoted(package.name)}@{_quoted(shown)}?{words}"


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe=":")


# The difference to the build before.


def find_difference(plan: Plan, inventory: Inventory, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """Return what differs from the newest build of this image in the output directory, None if there is none.

    *sizes* are the bytes on disk of the artifacts by their formats.  A build of the same day is the one
    that is about to be replaced.
    """
    previous = _previous(plan)
    if not previous:
        return None
    before = next(iter(previous.values()))
    now = [dataclasses.asdict(package) for package in inventory.packages]
    return {
        "previous": f"{plan.image}-{before['date']}",
        "packages": compare_packages(before["packages"], now),
        "directories": {"before": sum(before["directories"].values()), "after": sum(inventory.directories.values())},
        "artifacts": [
            {"format": name, "before": previous[name]["artifact"]["size_on_disk"], "after": size}
            for name, size in sizes.items()
            if name in previous
        ],
    }


def compare_packages(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the packages that were *added* and *removed*, and those with another version.

    Of a package that is installed in several versions, as kernels are, each is one of its own.
    """
    old, new = _versions(before), _versions(after)
    changed, added, removed = [], [], []
    for key in sorted({*old, *new}):
        gone, come = sorted(old[key] - new[key]), sorted(new[key] - old[key])
        about = {"name": key[0], "architecture": key[1]}
        if len(gone) == len(come) == 1:
            changed.append({**about, "before": gone[0], "after": come[0]})
            continue
        added += [{**about, "version": version} for version in come]
        removed += [{**about, "version": version} for version in gone]
    return {"added": added, "removed": removed, "changed": changed}


def compare(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what differs between the manifests *before*, that of *name*, and *after*, in the form of a manifest."""
    old, new = before["artifact"], after["artifact"]
    sizes = [{"format": new["format"], "before": old["size_on_disk"], "after": new["size_on_disk"]}]
    return {
        "previous": name,
        "packages": compare_packages(before["packages"], after["packages"]),
        "directories": {"before": sum(before["directories"].values()), "after": sum(after["directories"].values())},
        "artifacts": sizes if old["format"] == new["format"] else [],
    }


def read(path: Path) -> dict[str, Any] | None:
    """Return the manifest at *path*, None if it is none that can be compared."""
    try:
        with path.open("rb") as file:
            if file.read(1) != b"{":
                return None
            file.seek(0)
            document = json.loads(file.read(_LARGEST))
        _check(document, document["date"].replace("-", ""))
        return dict(document) if isinstance(document["artifact"]["format"], str) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _versions(packages: Iterable[Mapping[str, Any]]) -> defaultdict[tuple[str, str], set[str]]:
    found = defaultdict(set)
    for package in packages:
        found[package["name"], package["architecture"]].add(package["version"])
    return found


def _previous(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the manifests of the newest build before by their formats, nothing if there are none to use."""
    today = plan.date.isoformat().replace("-", "")
    for date, paths in naming.builds(plan, rf"\.[a-z0-9.]+{re.escape(MANIFEST_SUFFIX)}"):
        if date[: len(today)] > today:
            continue
        documents = [read_of(path, plan, date) for path in paths]
        usable = {str(document["artifact"]["format"]): document for document in documents if document}
        if usable:
            return usable
    return {}


def read_of(path: Path, plan: Plan, date: str) -> dict[str, Any] | None:
    """Return the manifest at *path* of a build of *plan*'s image, None and a warning if it is not one of ours.

    *date* are the digits of the time in its name, if there are some.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("it is not a regular file")
            with open(descriptor, "rb", closefd=False) as file:
                document = json.loads(file.read(_LARGEST))
        finally:
            os.close(descriptor)
        if document["image"] != plan.image:
            # Where images are named otherwise, those of all may have names of this form.
            return None
        _check(document, date or document["date"].replace("-", ""))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        logger.warning("%s is not a manifest that this build can be compared with.", path)
        return None
    return dict(document)


def _check(document: Any, date: str) -> None:
    """Raise ValueError, TypeError or KeyError unless *document* has what is compared."""
    texts = [package[key] for package in document["packages"] for key in ("name", "architecture", "version")]
    numbers = [document["artifact"]["size_on_disk"], *document["directories"].values()]
    if document["schema_version"] != SCHEMA_VERSION or document["date"].replace("-", "") != date[:8]:
        raise ValueError("another version, or another build's")
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("another form")


def tell_difference(artifacts: Sequence[Artifact]) -> None:
    """Tell observers of the difference that the manifests of the published *artifacts* have."""
    for artifact in artifacts:
        path = artifact.path.with_name(artifact.path.name + MANIFEST_SUFFIX)
        if path in artifact.others:
            # The user's commands may have taken it elsewhere, when the build is resumed.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                found = json.loads(path.read_bytes()).get("difference")
                if found:
                    events.tell(events.Compared(found))
            return


def difference_lines(difference: Mapping[str, Any] | None) -> list[str]:
    """Return *difference* for people, nothing if there is none."""
    if difference is None:
        return []
    packages = difference["packages"]
    counts = ", ".join(f"{len(packages[kind])} {kind}" for kind in ("added", "removed", "changed"))
    lines = [f"Changes since {difference['previous']}:", f"  packages      {counts}"]
    lines += _named("+", (f"{_name(entry)} {entry['version']}" for entry in packages["added"]))
    lines += _named("-", (f"{_name(entry)} {entry['version']}" for entry in packages["removed"]))
    lines += _named("*", (f"{_name(entry)} {entry['before']} -> {entry['after']}" for entry in packages["changed"]))
    # The sizes of one of the two are not known where it is 0.
    if all(difference["directories"].values()):
        lines.append(f"  installed     {_change(difference['directories'])}")
    lines += [f"  {entry['format']:<12}  {_change(entry)}" for entry in difference["artifacts"]]
    return lines


def _name(entry: Mapping[str, Any]) -> str:
    architecture = entry["architecture"]
    return str(entry["name"]) if architecture in ("all", "noarch") else f"{entry['name']}.{architecture}"


def _named(sign: str, texts: Iterable[str]) -> Iterator[str]:
    found = list(texts)
    yield from (f"    {sign} {text}" for text in found[:_NAMED])
    if len(found) > _NAMED:
        yield f"    {sign} and {len(found) - _NAMED} more, see the manifest"


def _change(sizes: Mapping[str, int]) -> str:
    before, after = sizes["before"], sizes["after"]
    sign = "-" if after < before else "+"
    return f"{format_size(before)} -> {format_size(after)} ({sign}{format_size(abs(after - before))})"
