"""Seal an image, so that it can be cloned: what makes one machine of it goes, and what the build has left.

``operations.OPERATIONS`` is the table of what is done, and ``captured.CAPTURED`` of what is done beside that to a
system that was lived in; the manual's list is checked against them.  A system is
looked at once, before anything changes, then all changes are made in a few calls: through sudo and in
the appliance a call is what takes time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ...base import events, interrupts
from ...base.errors import ConfigurationError
from ...base.log import logger
from ...base.units import format_size
from ...configuration.settings import ImageSettings
from ...model import Build, Change, Plan
from ...parts import Step, on_tree
from ...system.registrations import is_of
from ...system.rehearsal import Call
from ...system.tree import Tree
from .actions import Actions, System, is_home
from .captured import CAPTURED
from .identity import UNITS
from .operations import OPERATIONS, Operation

STEP = "Sealing"

# Number of patterns in one call of the helper: the arguments of a program have a limit.
_AT_ONCE = 2000

# Directories that people's homes are not in, though /etc/passwd says so of system users.
_NO_HOMES = ("", "bin", "dev", "nonexistent", "proc", "run", "sbin", "sys", "usr")


def check(plan: Plan) -> None:
    """Raise ConfigurationError if the keys of *plan* name an operation that there is none of."""
    known = [operation.name for operation in (*OPERATIONS, *CAPTURED)]
    for key, names in (("seal-only", plan.settings.seal_only), ("seal-skip", plan.settings.seal_skip)):
        for name in names:
            if name not in known:
                raise ConfigurationError(
                    f"[{plan.image}] {key}: {name!r} is not accepted, only operations of sealing.",
                    hint=f"They are {', '.join(known)}.",
                )


def chosen_operations(settings: ImageSettings) -> list[Operation]:
    """Return the operations that *settings* choose, in the order of the tables; none without ``seal``.

    Those for systems that were lived in are of captured ones, or have to be named.
    """
    if not settings.seal:
        return []
    more = CAPTURED if settings.source == "capture" or settings.seal_only else ()
    return [
        operation
        for operation in (*OPERATIONS, *more)
        if (not settings.seal_only or operation.name in settings.seal_only) and operation.name not in settings.seal_skip
    ]


def steps(build: Build) -> Iterator[Step]:
    """Give the step on the mounted system, if it is wanted."""
    if chosen_operations(build.plan.settings):
        # Files and new names are known only when the system is looked at.
        told = (Call("write", ("FILE", "MODE")), Call("rename", ("FILE", "NAME")))
        yield Step(STEP, on_tree(seal), calls=told)


def seal(build: Build, tree: Tree) -> None:
    """Take from the system *tree* what a clone must not have; log and tell what it was."""
    chosen = chosen_operations(build.plan.settings)
    # Looking changes nothing, so a signal may come at any point.
    with interrupts.interruptible():
        system = look_at(tree, chosen)
        planned = {operation.name: operation.actions(system) for operation in chosen}
    removed, emptied = carry_out(tree, list(planned.values()))
    for operation in chosen:
        actions = planned[operation.name]
        _tell(
            operation.name,
            actions,
            take_matching(removed, actions.remove),
            take_matching(emptied, actions.empty),
            system,
        )


def look_at(tree: Tree, chosen: Sequence[Operation]) -> System:
    """Return what the operations *chosen* want to know of the system *tree*."""
    kinds = {entry.path: entry.kind for entry in tree.entries(_looked_at(chosen))}
    files = tree.read(_read(chosen))
    homes = _homes(files.get("etc/passwd", b""), kinds)
    below = _read_in_homes(chosen, filter(is_home, homes))
    for start in range(0, len(below), _AT_ONCE):
        files |= tree.read(below[start:][:_AT_ONCE])
    snapshots = tuple(snapshot.name for snapshot in tree.snapshots)
    return System(files, kinds, homes, tuple(found.name for found in chosen), snapshots)


def _looked_at(chosen: Sequence[Operation]) -> list[str]:
    # Home directories are looked up whatever is chosen.
    return [*dict.fromkeys(pattern for operation in chosen for pattern in operation.looked_at), "home/*"]


def _read(chosen: Sequence[Operation]) -> list[str]:
    return [*dict.fromkeys(pattern for operation in chosen for pattern in operation.read), "etc/passwd"]


def _read_in_homes(chosen: Sequence[Operation], homes: Iterable[str]) -> list[str]:
    names = dict.fromkeys(name for operation in chosen for name in operation.in_homes)
    return [f"{home}/{name}" for home in homes for name in names]


def _homes(passwd: bytes, kinds: Mapping[str, str]) -> tuple[str, ...]:
    """Return the home directories that *passwd* names, and those in /home."""
    named = [
        line.split(":")[5].strip("/") for line in passwd.decode(errors="replace").split("\n") if line.count(":") == 6
    ]
    found = [
        "root",
        *named,
        *(path for path, kind in kinds.items() if path.startswith("home/") and kind == "directory"),
    ]
    return tuple(dict.fromkeys(home for home in found if home.partition("/")[0] not in _NO_HOMES))


def carry_out(tree: Tree, planned: Sequence[Actions]) -> tuple[list[Change], list[Change]]:
    """Carry out all of *planned*; return what was removed and what was emptied."""
    # Write units first: a unit is planned only while the key that it makes is there, and a build that fails here
    # is resumed without the key.
    units = {path: data for actions in planned for path, data in actions.write.items() if path.startswith(f"{UNITS}/")}
    for path, data in units.items():
        tree.write(path, data, 0o644)
    remove = list(dict.fromkeys(pattern for actions in planned for pattern in actions.remove))
    empty = list(dict.fromkeys(pattern for actions in planned for pattern in actions.empty))
    if any(actions.snapshots for actions in planned):
        tree.delete_snapshots()
    removed = [gone for start in range(0, len(remove), _AT_ONCE) for gone in tree.remove(remove[start:][:_AT_ONCE])]
    emptied = [gone for start in range(0, len(empty), _AT_ONCE) for gone in tree.truncate(empty[start:][:_AT_ONCE])]
    # Write the machine ID last: a build that fails here and is resumed needs the old one again.
    for actions in reversed(planned):
        for path, data in actions.write.items():
            # Leave out a file that another operation removes.
            if path not in units and (path not in remove or path in actions.remove):
                tree.write(path, data, 0o444 if path == "etc/machine-id" else 0o644)
        for path, name in actions.rename.items():
            tree.rename(path, name)
    return removed, emptied


def take_matching(changes: list[Change], patterns: Sequence[str]) -> list[Change]:
    """Take those that *patterns* match from the list *changes*."""
    taken: list[Change] = []
    others: list[Change] = []
    for change in changes:
        interrupts.check()
        (taken if is_of(change.path, patterns) else others).append(change)
    changes[:] = others
    return taken


def _tell(name: str, actions: Actions, removed: Sequence[Change], emptied: Sequence[Change], system: System) -> None:
    """Log and tell what operation *name* did."""
    for verb, changes in (("Removed", removed), ("Emptied", emptied)):
        for change in changes:
            interrupts.check()
            logger.info("%s /%s", verb, change.path)
    for snapshot in actions.snapshots:
        logger.info("Removed %s", snapshot)
    for path in actions.write:
        logger.info("%s /%s", "Changed" if path in system.files else "Made", path)
    for path, new in actions.rename.items():
        logger.info("Renamed /%s to %s", path, new)
    shorter = [len(system.files.get(path, b"")) - len(data) for path, data in actions.write.items()]
    files = sum(change.files for change in (*removed, *emptied))
    size = sum(change.size for change in (*removed, *emptied)) + sum(less for less in shorter if less > 0)
    changed = len(actions.write) + len(actions.rename)
    count = len(actions.snapshots)
    told = [f"{count} {'snapshot' if count == 1 else 'snapshots'}"] if count else []
    told += [f"{files} {'file' if files == 1 else 'files'}"] if files else []
    told += [format_size(size)] if files or size else []
    told += [f"{changed} changed"] if changed else []
    logger.info("%s: %s: %s", STEP, name, ", ".join(told) or "nothing")
    events.tell(events.Sealed(name, files + count, size, changed))
