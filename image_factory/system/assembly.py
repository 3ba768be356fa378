"""Put an installed system together from the filesystems of a disk: which one is its root, and what belongs where.

All of the disk is published with it, so what else is a system there, or a snapshot of one, is told too.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..base import files
from ..base.cleanup import released
from ..base.errors import BuildError, NoSystemError
from ..base.log import logger
from ..model import READ_ONLY_NAME, Filesystem, LogicalVolumes, Subvolume, Volume
from . import fstab, partitions
from .privileged import takes_top
from .tree import Branch, Snapshot, Tree, Unreached

# What the log calls the steps that mount a system and unmount it, whatever the way.
MOUNTING = "Mounting the filesystems"
UNMOUNTING = "Unmounting"

# Of a guest's text in a message.
_LONGEST_QUOTE = 100

# So many subvolumes of a filesystem are looked into.
_SUBVOLUMES = 256

# Container programs keep images in subvolumes and snapshots there, as they keep them in directories elsewhere.
_CONTAINERS = re.compile(r"(?:^|/)(?:lib|share)/(?:containers|docker|incus|lxc|lxd|machines|portables)/")

# Where ostree keeps systems: what there is of a root lies deeper.
_OSTREE = ("ostree/deploy", "ostree/repo")

_FSTAB = "etc/fstab"
_UNITS = "etc/systemd/system/*.mount"
MOUNT_LISTS = (_FSTAB, _UNITS)

# Types of partitions that systemd-gpt-auto-generator(8) mounts without a line in fstab.  Firmware reads the
# system partition in any case.
_SYSTEM_PARTITIONS = ("C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "ef")
_DISCOVERED = {
    "BC13C2FF-59E6-4262-A352-B275FD6F7172": "boot",
    "4D21B016-B534-45C2-A9FB-5C16E091FD2D": "var",
    "933AC7E1-2EB4-4F13-B844-0E14E2AEF915": "home",
    "3B8F8425-20E0-4F3B-907F-1A25A76F98E8": "srv",
    "7EC6F557-3BC5-4ACA-B293-16EF5DF639D1": "var/tmp",
}

_SUPPORTED = "Have the answer file put it on ext4, xfs, btrfs or FAT, on a partition or LVM without encryption or RAID."


@dataclass(frozen=True)
class _Disk:
    """What is known of a disk: see assemble."""

    filesystems: Sequence[Filesystem]
    volumes: Sequence[Volume]
    failures: Mapping[str, BuildError]

    def mounted(self, volume: Volume) -> Filesystem | None:
        return next((found for found in self.filesystems if found.volume.name == volume.name), None)


def assemble(
    filesystems: Sequence[Filesystem],
    volumes: Sequence[Volume],
    failures: Mapping[str, BuildError],
    logical: LogicalVolumes | None = None,
) -> Tree:
    """Return the system on *filesystems*: the root is the one that its own fstab names, which tells of the rest.

    *failures* are the reasons why filesystems are not mounted, by the names of their *volumes*: one of
    them is raised if the system needs that filesystem.  NoSystemError if there is no root, BuildError if it can't be
    told which one it is.
    """
    disk = _Disk(filesystems, volumes, failures)
    candidates = [branch for filesystem in filesystems for branch in _roots_of(filesystem)]
    if not candidates:
        raise _no_root(disk)
    root, entries = _choose(disk, candidates)
    _say(root)
    branches, unreached = _places(disk, root, entries)
    deepest_first = sorted(branches.values(), key=lambda branch: len(branch.point), reverse=True)
    for place in sorted(unreached.values(), key=lambda place: place.point):
        logger.warning("%s", place.error.message)
    tree = Tree(
        tuple(deepest_first),
        tuple(filesystems),
        tuple(volumes),
        logical,
        tuple(sorted(unreached.values(), key=lambda place: len(place.point), reverse=True)),
    )
    return _with_copies(tree, candidates)


@contextmanager
def writable(tree: Tree, directory: Path) -> Iterator[None]:
    """Have the system's subvolumes writable inside, and those read-only again that were, as of openSUSE MicroOS.

    A file in the working *directory* names them meanwhile: a build that goes on after a killed one, with whatever
    way to mount, makes them read-only at its end.
    """
    record = directory / READ_ONLY_NAME
    known: list[list[str]] = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    changed: dict[tuple[str, str], Filesystem] = {}
    for branch in tree.branches:
        filesystem, top = branch.filesystem, branch.top
        is_read_only = any(found.path == top and found.read_only for found in filesystem.subvolumes)
        if is_read_only or [filesystem.volume.name, top] in known:
            changed[filesystem.volume.name, top] = filesystem
    if changed:
        files.replace(record, json.dumps(list(changed)).encode())
    with ExitStack() as stack:
        for (_, top), filesystem in changed.items():
            logger.info("Subvolume %s is read-only, and made writable for a while.", top or "/")
            stack.enter_context(released(partial(filesystem.set_read_only, top, True)))
            filesystem.set_read_only(top, False)
        yield
    record.unlink(missing_ok=True)


# The root


def _roots_of(filesystem: Filesystem) -> list[Branch]:
    """Return the directories of *filesystem* that look like a root, the default one first."""
    if filesystem.volume.filesystem not in partitions.ROOT_FILESYSTEMS:
        return []
    tops = [path for path in _tops(filesystem) if not _CONTAINERS.search(path)]
    patterns = {f"{top}/{mark}".lstrip("/"): top for top in tops for mark in partitions.ROOT_MARKS}
    found = {patterns[entry.path] for entry in filesystem.entries(list(patterns)) if entry.path in patterns}
    return [Branch(filesystem, top, "") for top in tops if top in found]


def _tops(filesystem: Filesystem) -> list[str]:
    """Return the directories of *filesystem* that can be mounted."""
    return [found.path for found in filesystem.subvolumes[:_SUBVOLUMES] if takes_top(found.path)] or [""]


def _no_root(disk: _Disk) -> BuildError:
    """Return the error that the disk has no root."""
    for volume in disk.volumes:
        if volume.filesystem in partitions.ROOT_FILESYSTEMS and volume.name in disk.failures:
            return disk.failures[volume.name]
    for filesystem in disk.filesystems:
        if filesystem.entries([f"{top}/{mark}".lstrip("/") for top in _tops(filesystem) for mark in _OSTREE]):
            return NoSystemError(
                f"The system on {filesystem.volume.name} is one of ostree or bootc, which is not supported.",
                hint="Have the answer file install packages.",
            )
    return partitions.no_root(disk.volumes)


def _choose(disk: _Disk, candidates: Sequence[Branch]) -> tuple[Branch, list[fstab.Entry]]:
    """Return the one of *candidates* that is the root, and what it mounts; BuildError if that can't be told."""
    # A snapshot of LVM has the fstab, the UUID and the label of what it is of.
    candidates = [found for found in candidates if found.filesystem.volume.origin is None] or candidates
    every = _entries_of(candidates)
    named = [_names_itself(disk, found, entries) for found, entries in zip(candidates, every, strict=True)]
    for answer in (True, None):
        group = [candidate for candidate, itself in zip(candidates, named, strict=True) if itself is answer]
        default = [candidate for candidate in group if _is_default(candidate)]
        chosen = group if len(group) == 1 else default
        if len(chosen) == 1:
            return chosen[0], every[candidates.index(chosen[0])]
        if group:
            raise BuildError(
                f"The disk has several root filesystems, and nothing tells which one is meant: {_listed(group)}.",
                hint="Have one of them on it, which its own /etc/fstab names for /.",
            )
    for entry in (entry for entries in every for entry in entries if not entry.point):
        volume = fstab.find(entry.spec, disk.volumes)
        if volume is not None and volume.name in disk.failures:
            raise disk.failures[volume.name]
    raise BuildError(
        f"No root filesystem is the one that its own /etc/fstab names for /: {_listed(candidates)}.",
        hint="Have the /etc/fstab of the root filesystem name that itself.",
    )


def _names_itself(disk: _Disk, candidate: Branch, entries: Sequence[fstab.Entry]) -> bool | None:
    """Return whether *entries*, of the fstab of *candidate*, name that for the root, None if they don't tell."""
    entry = next((entry for entry in reversed(entries) if not entry.point), None)
    found = fstab.find_all(entry.spec, disk.volumes) if entry else []
    if entry is None or not found:
        return None
    if candidate.filesystem.volume not in found:
        return False
    top = _top_of(entry, candidate.filesystem)
    return None if top is None else top == candidate.top


def _is_default(candidate: Branch) -> bool:
    return candidate.top == _default(candidate.filesystem)


def _default(filesystem: Filesystem) -> str:
    """Return what of *filesystem* is mounted where nothing is named."""
    return filesystem.subvolumes[0].path if filesystem.subvolumes else ""


def _entries_of(roots: Sequence[Branch]) -> list[list[fstab.Entry]]:
    """Return what each of *roots* mounts by the administrator's own units of systemd and by its fstab.

    A filesystem is asked once.
    """
    asked = {root.filesystem.volume.name: root.filesystem for root in roots}
    files = {
        name: filesystem.read(
            [root.inner(pattern) for root in roots if root.filesystem is filesystem for pattern in MOUNT_LISTS]
        )
        for name, filesystem in asked.items()
    }
    found = []
    for root in roots:
        if root.inner(_FSTAB) not in files[root.filesystem.volume.name]:
            _check_no_fstab(root)
        texts = {path: data.decode(errors="replace") for path, data in files[root.filesystem.volume.name].items()}
        directory = root.inner(_UNITS).rpartition("/")[0]
        units = [fstab.parse_unit(texts[path]) for path in sorted(texts) if path.rpartition("/")[0] == directory]
        found.append([*filter(None, units), *fstab.parse(texts.get(root.inner(_FSTAB), ""))])
    return found


def _check_no_fstab(root: Branch) -> None:
    """Raise BuildError if the fstab of *root* was not read because it is too long: what it names would be missed."""
    if any(entry.kind == "file" for entry in root.filesystem.entries([root.inner(_FSTAB)])):
        raise BuildError(f"The /etc/fstab of {_place_of(root)} is too long to be read.")


def _top_of(entry: fstab.Entry, filesystem: Filesystem) -> str | None:
    """Return the directory of *filesystem* that *entry* mounts, None if it can't be told."""
    if filesystem.volume.filesystem != "btrfs":
        return ""
    path, number = entry.option("subvol"), entry.option("subvolid")
    if path is None and number is None:
        return _default(filesystem)
    if path is None:
        # 0 is the top, too.
        wanted = "5" if number == "0" else number
        path = next((found.path for found in filesystem.subvolumes if str(found.number) == wanted), None)
    top = None if path is None else path.strip("/")
    return top if top is not None and takes_top(top) else None


def _listed(branches: Sequence[Branch]) -> str:
    return ", ".join(map(_place_of, branches))


def _place_of(branch: Branch) -> str:
    return branch.filesystem.volume.name + (f" (subvolume {_quoted(branch.top)[0]})" if branch.top else "")


# What is mounted where


def _places(disk: _Disk, root: Branch, every: Sequence[fstab.Entry]) -> tuple[dict[str, Branch], dict[str, Unreached]]:
    """Return what the system has below its *root* by the mount points, as *every* entry has it: reached or not."""
    branches, unreached = {"": root}, dict[str, Unreached]()
    # The root is the one that was found.
    entries = [entry for entry in every if entry.point]
    for entry in entries:
        if entry.bound is None:
            place = _place(disk, entry)
            _put(place, branches, unreached)
    for place in _discovered(disk, root, branches, unreached):
        _put(place, branches, unreached)
    for entry in entries:
        if entry.bound is not None:
            for place in _bound(entry, branches, unreached):
                _put(place, branches, unreached)
    return branches, unreached


def _put(place: Branch | Unreached | None, branches: dict[str, Branch], unreached: dict[str, Unreached]) -> None:
    """Have *place* be what is at its point: the last one wins."""
    if isinstance(place, Branch):
        branches[place.point] = place
        unreached.pop(place.point, None)
        _say(place)
    elif place is not None:
        unreached[place.point] = place
        branches.pop(place.point, None)


def _place(disk: _Disk, entry: fstab.Entry) -> Branch | Unreached | None:
    """Return what *entry* mounts, None if it is not on the disk."""
    if entry.kind == "overlay":
        return _unreached(entry.point, "it is an overlay of directories")
    volume = fstab.find(entry.spec, disk.volumes)
    if volume is not None:
        return _at(disk, volume, entry.point, entry)
    spec, point = _quoted(entry.spec, entry.point)
    if entry.file:
        return _unreached(entry.point, f"it is in the file {spec}")
    if entry.is_of_this_disk():
        container = next((found for found in disk.volumes if found.filesystem in partitions.CONTAINERS), None)
        if container:
            what = partitions.CONTAINERS[container.filesystem or ""]
            return _unreached(entry.point, f"{spec} seems to be in {container.name}, which is {what}")
        logger.warning("The disk has no %s, which its fstab names for %s.", spec, point)
    return None


def _at(disk: _Disk, volume: Volume, point: str, entry: fstab.Entry | None = None) -> Branch | Unreached | None:
    """Return what *volume* is at *point*, None if it has no such subvolume."""
    filesystem = disk.mounted(volume)
    if filesystem is not None:
        top = _default(filesystem) if entry is None else _top_of(entry, filesystem)
        if top is None or not takes_top(top):
            return _unreached(point, f"its subvolume of {volume.name} is unknown, or has an odd name")
        if filesystem.subvolumes and top not in {found.path for found in filesystem.subvolumes}:
            names = _quoted(top, point)
            logger.warning("%s has no subvolume %s, which its fstab names for /%s.", volume.name, *names)
            return None
        return Branch(filesystem, top, point)
    if volume.name in disk.failures:
        # The system does not start without what is on a filesystem of Linux' own.
        if volume.filesystem in partitions.ROOT_FILESYSTEMS:
            raise disk.failures[volume.name]
        reason = disk.failures[volume.name]
        return _unreached(point, reason.message.rstrip("."), reason.hint)
    if volume.filesystem in partitions.CONTAINERS:
        return _unreached(point, f"{volume.name} is {partitions.CONTAINERS[volume.filesystem]}")
    kind = volume.filesystem or "no known filesystem"
    return _unreached(point, f"{volume.name} has {kind}, which is not supported")


def _unreached(point: str, reason: str, hint: str | None = None) -> Unreached:
    return Unreached(
        point, BuildError(f"/{_quoted(point)[0]} can't be looked into: {reason}.", hint=hint or _SUPPORTED)
    )


def _discovered(
    disk: _Disk, root: Branch, branches: Mapping[str, Branch], unreached: Mapping[str, Unreached]
) -> Iterator[Branch | Unreached]:
    """Give what the types of the partitions say, where fstab says nothing."""
    used = {branch.filesystem.volume.name for branch in branches.values()}
    for volume in disk.volumes:
        kind = (volume.part_type or "").upper()
        is_esp = kind in (name.upper() for name in _SYSTEM_PARTITIONS)
        point = "efi" if is_esp else _DISCOVERED.get(kind)
        if point is None or volume.filesystem is None or volume.name in used or {point} & {*branches, *unreached}:
            continue
        if is_esp and {"boot/efi", "boot"} & set(unreached):
            # One of them is it.
            continue
        if is_esp or not root.filesystem.entries([f"{root.inner(point)}/*"]):
            place = _at(disk, volume, point)
            if place is not None:
                yield place


def _bound(
    entry: fstab.Entry, branches: Mapping[str, Branch], unreached: Mapping[str, Unreached]
) -> list[Branch | Unreached]:
    """Return what *entry* shows a second time: of what is mounted deeper, too, if it is recursive."""
    source = entry.bound or ""
    every: list[Branch | Unreached] = [*branches.values(), *unreached.values()]
    place = max((place for place in every if place.has(source)), key=lambda place: len(place.point))
    if isinstance(place, Unreached):
        return [dataclasses.replace(place, point=entry.point)]
    top = place.inner(source)
    found: list[Branch | Unreached] = [Branch(place.filesystem, top, entry.point)]
    if source != place.point:
        kind = next((found.kind for found in place.filesystem.entries([top])), None) if takes_top(top) else "other"
        if kind is None:
            logger.warning("The system has no /%s, which its fstab names for %s.", *_quoted(source, entry.point))
            return []
        if kind != "directory":
            found = [_unreached(entry.point, f"/{_quoted(source)[0]} is no directory, or has an odd name")]
    _say(*(place for place in found if isinstance(place, Branch)))
    if "rbind" in entry.options:
        for deeper in every:
            if deeper.point not in ("", source, entry.point) and _is_in(deeper.point, source):
                inside = f"{entry.point}/{deeper.point.removeprefix(source).lstrip('/')}"
                found.append(dataclasses.replace(deeper, point=inside))
    return found


# What else is there


def _with_copies(tree: Tree, candidates: Sequence[Branch]) -> Tree:
    """Return *tree* with the other systems on its disk, the snapshots, and what its mounts hide; they are told."""
    phrases = [f"{found.name} is a snapshot of {found.origin}" for found in tree.volumes if found.origin is not None]
    snapshots: list[Snapshot] = []
    for filesystem in tree.filesystems:
        used = {branch.top for branch in tree.branches if branch.filesystem is filesystem}
        roots = [found.top for found in candidates if found.filesystem is filesystem and found.top not in used]
        phrases += _copies_on(filesystem, used, roots)
        snapshots += _removable(filesystem, used)
    phrases += _hidden(tree.branches)
    for phrase in phrases:
        logger.warning("The disk has more than the system: %s.", phrase)
    return dataclasses.replace(tree, copies=tuple(phrases), snapshots=tuple(snapshots))


def _copies_on(filesystem: Filesystem, used: set[str], roots: Sequence[str]) -> list[str]:
    """Return phrases for what is beside the system on *filesystem*, of which it has *used*: *roots* are others."""
    volume = filesystem.volume
    if volume.origin is not None:
        return []
    if not filesystem.subvolumes:
        return [f"{volume.name} has a system of its own"] if roots else []
    phrases = []
    for found in filesystem.subvolumes:
        name = f"subvolume {_quoted(found.path)[0]} of {volume.name}" if found.path else volume.name
        outside = not any(_is_in(found.path, top) for top in used)
        if found.path in used or _CONTAINERS.search(found.path):
            continue
        if found.source:
            phrases.append(f"{name} is a snapshot")
        elif found.path in roots:
            phrases.append(f"{name} has a system of its own")
        elif outside and not takes_top(found.path):
            phrases.append(f"{name} has an odd name, and can't be looked into")
    if len(filesystem.subvolumes) > _SUBVOLUMES:
        phrases.append(f"of the subvolumes of {volume.name} only {_SUBVOLUMES} are looked into")
    return phrases


def _hidden(branches: Sequence[Branch]) -> list[str]:
    """Return phrases for files below the mount points of *branches*, which the system itself does not see."""
    phrases = []
    for parent in branches:
        inside = [
            branch
            for branch in branches
            if branch.point
            and parent is next(other for other in branches if other.point != branch.point and other.has(branch.point))
        ]
        # What is bound to its own place hides nothing.
        tops = {
            parent.inner(branch.point): branch.point
            for branch in inside
            if (branch.filesystem, branch.top) != (parent.filesystem, parent.inner(branch.point))
        }
        tops = {top: point for top, point in tops.items() if takes_top(top)}
        entries = parent.filesystem.entries([f"{top}/*" for top in tops]) if tops else []
        directories = [entry.path for entry in entries if entry.kind == "directory" and takes_top(entry.path)]
        looked_into, others = directories[:_SUBVOLUMES], directories[_SUBVOLUMES:]
        deeper = parent.filesystem.entries([f"{path}/*" for path in looked_into]) if looked_into else []
        # Installers leave empty mount points, one in another, but not so many.
        files = [*others, *(entry.path for entry in (*entries, *deeper) if entry.kind != "directory")]
        found = [point for top, point in tops.items() if any(_is_in(path, top) for path in files)]
        phrases += [f"/{point} on {_place_of(parent)} has files below what is mounted there" for point in sorted(found)]
    return phrases


def _removable(filesystem: Filesystem, used: set[str]) -> list[Snapshot]:
    """Return the snapshots of what is *used* of *filesystem*, those of snapshots, and what that is a snapshot of.

    A subvolume that another one lies in that is to stay is none of them.
    """
    subvolumes = [found for found in filesystem.subvolumes if not _CONTAINERS.search(found.path)]
    own = [
        found
        for found in subvolumes
        if found.path in used or (not found.source and any(_is_in(found.path, top) for top in used))
    ]
    related = {uuid for found in own for uuid in _uuids(found)}
    while more := {uuid for found in subvolumes if _uuids(found) & related for uuid in _uuids(found)} - related:
        related |= more
    default = _default(filesystem)
    gone = [
        found.path
        for found in subvolumes
        if _uuids(found) & related and found not in own and found.path not in ("", default) and takes_top(found.path)
    ]
    kept = [found.path for found in filesystem.subvolumes if found.path not in gone]
    return [Snapshot(filesystem, path) for path in gone if not any(_is_in(other, path) for other in (*kept, *used))]


def _uuids(subvolume: Subvolume) -> set[str]:
    return {uuid for uuid in (subvolume.uuid, subvolume.source) if uuid}


def _is_in(path: str, directory: str) -> bool:
    return not directory or path == directory or path.startswith(f"{directory}/")


def _say(*branches: Branch) -> None:
    for branch in branches:
        [point] = _quoted(branch.point)
        volume = branch.filesystem.volume
        place = f", {'subvolume' if volume.filesystem == 'btrfs' else 'directory'} {branch.top}" if branch.top else ""
        logger.info("/%s is on %s (%s%s).", point, volume.name, volume.filesystem, place)


def _quoted(*texts: str) -> list[str]:
    return [text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..." for text in texts]
