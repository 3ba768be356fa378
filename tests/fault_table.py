"""The table of faults: what can strike at which step of a build, and which of that make check tries.

Plain data: test_faults.py has the tests, see there.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .conftest import TODAY

IMAGE = f"stand-in-{TODAY}.qcow2"

# Outputs of other kinds, in builds that make all of these formats.
FORMATS = ("qcow2", "raw.zst", "ova", "squashfs", "oci")
OUTPUTS = {
    "tree": ("Packing squashfs, oci", "tar2sqfs *"),
    "assemble": ("Packing squashfs, oci", "tar --create *oci-layout*"),
    "compress": ("Making qcow2, raw.zst, vmdk", "zstd *"),
    "pack": ("Packing ova", "tar --create *.ovf *"),
}
# Each step: the name that the log has, the call of a program in it (a pattern of sh), or an event in Python
# with a pattern of its arguments.
PROGRAMS = {
    "create": ("Creating the disk", "qemu-img create*"),
    "cache": ("Caching the installer", "rsync*rsync://*"),
    "install": ("Installing", "virt-install *"),
    "read": ("Reading the partition table", "blkid *"),
    "mount": ("Mounting the filesystems", "* mount-image *"),
    "remove": ("Removing installer logs", "* remove *"),
    "seal": ("Sealing", "* truncate *"),
    "copy": ("Copying files", "* put *"),
    "free": ("Freeing unused blocks", "* trim *"),
    "unmount": ("Unmounting", "* umount *"),
    "zero": ("Zeroing unused blocks", "zerofree *"),
    "convert": ("Converting to qcow2", "qemu-img convert*"),
    "reopen": (f"Reopening {IMAGE}", "qemu-img convert *audit.raw"),
    "upload": (f"Uploading {IMAGE} to up", "rsync *.sha256sum *"),
    "post-build": ("Running the post-build command", "notify *"),
    **OUTPUTS,
}
EVENTS = {
    "checksum": (f"Checksumming {IMAGE}", "open", "*.qcow2 r*"),
    "publish": ("Publishing", "os.rename", "*.qcow2 *.qcow2 *"),
}
# Those of a build whose source is no installer.
BOOTSTRAP = {
    "bootstrap": "Bootstrapping",
    "task": "Task work.sh",
    "loader": "Installing the boot loader",
    "layout": "Making the disk",
}
# Those of tasks in a guest, whose QEMU is none: see test_guest_faults.py.
GUEST = {
    "guest-boot": "Booting for tasks",
    "guest-task": "Task two",
    "guest-off": "Shutting down",
    "guest-write": "Writing what tasks have done",
}
# The phases of elements: what strikes at one does as much at any.
PHASES = (
    "root", "extra-data", "pre-install", "install", "post-install", "post-root", "block-device", "pre-finalise",
    "finalise", "cleanup",
)  # fmt: skip
ELEMENTS = {f"element-{phase}": f"Running {phase}.d" for phase in PHASES}
_FIRST = ["create", "cache", "cache-http", *list(PROGRAMS)[:12], *OUTPUTS, "checksum", "reopen", "publish"]
ORDER = list(dict.fromkeys([*_FIRST, *PROGRAMS, *BOOTSTRAP, *GUEST, *ELEMENTS]))

SIGNALS = {"INT": 130, "TERM": 143, "HUP": 129, "KILL": -9}
AT_PROGRAMS = [
    "fails", "missing", "hangs", *(f"signal-{name}" for name in SIGNALS), "killed-group", "killed-while-hanging",
    "killed-child", "full", "descriptors", "clock-back",
]  # fmt: skip
AT_EVENTS = ["fails", *(f"signal-{name}" for name in SIGNALS), "killed-group", "full", "descriptors", "clock-back"]
KILLED = ("signal-KILL", "killed-group", "killed-while-hanging")
STALE = ["stale-files", "stale-closed", "stale-mount-point", "stale-machine"]
# In the middle of an HTTP download; one that ``breaks`` once goes on there, one that breaks ``always`` is tried again.
AT_DOWNLOADS = [
    *(f"signal-{name}" for name in SIGNALS), "killed-group", "full", "descriptors", "clock-back", "second", "breaks",
    "breaks-always",
]  # fmt: skip
AT_BOOTSTRAP = ["fails", *(f"signal-{name}" for name in SIGNALS), "killed-group", "killed-child", "full"]
AT_OUTPUTS = AT_BOOTSTRAP
AT_GUEST = {
    step: [*AT_BOOTSTRAP] if step != "guest-off" else [*AT_BOOTSTRAP[1:-1]] for step in GUEST
}  # fmt: skip
# What is in the place of the working directory; ``lock-stopped``: a build that has been stopped holds its lock.
LOCKS = ["lock-of-another", "lock-is-link", "lock-is-file", "lock-stopped"]
# The real installer and its machine.
REAL = ["signal-TERM", "signal-KILL", "killed-child", "killed-machine", "libvirt-killed", "libvirt-gone"]


@dataclass(frozen=True)
class Cell:
    step: str
    fault: str
    user: str
    real: bool = False

    def __str__(self) -> str:
        return f"{self.user}-{self.step}-{self.fault}{'-real' if self.real else ''}"


def cells() -> Iterator[Cell]:
    for user in ("root", "a"):
        for step in ORDER:
            if step in OUTPUTS:
                yield from (Cell(step, fault, user) for fault in AT_OUTPUTS)
            elif step in PROGRAMS:
                yield from (Cell(step, fault, user) for fault in AT_PROGRAMS)
                yield Cell(step, "second", user)
            elif step in EVENTS:
                yield from (Cell(step, fault, user) for fault in AT_EVENTS)
        yield from (Cell("cache-http", fault, user) for fault in AT_DOWNLOADS)
        yield Cell("unmount", "fails-always", user)
        yield from (Cell("start", fault, user) for fault in [*STALE, *LOCKS])
        yield from (Cell("install", fault, user, real=True) for fault in REAL)
    for user in ("root", "c"):
        yield from (Cell(step, fault, user) for step in (*BOOTSTRAP, *ELEMENTS) for fault in AT_BOOTSTRAP)
    yield from (Cell(step, fault, "root") for step in GUEST for fault in AT_GUEST[step])


# What the faults do to a build, whatever the step.
CLASSES = {
    "a program fails": ("fails", "fails-always", "missing", "killed-child", "breaks-always", "killed-machine",
                        "libvirt-killed", "libvirt-gone"),
    "told to stop": ("hangs", "signal-INT", "signal-TERM", "signal-HUP"),
    "killed": KILLED,
    "goes on, or has not enough": ("full", "descriptors", "clock-back", "second", "breaks"),
    "left by a killed build": STALE,
    "not its directory": LOCKS,
}  # fmt: skip


def class_of(fault: str) -> str:
    """Return the one of CLASSES that *fault* is in."""
    return next(name for name, faults in CLASSES.items() if fault in faults)


def pairs(cell: Cell) -> set[tuple[str, ...]]:
    """Return what *cell* covers: its step by the user, its fault by the user, its step by the class of the fault."""
    step = f"{cell.step}-real" if cell.real else "element" if cell.step in ELEMENTS else cell.step
    return {
        ("step and user", step, cell.user),
        ("fault and user", cell.fault, cell.user),
        ("step and class", step, class_of(cell.fault)),
    }


def covering(cells: Iterable[Cell]) -> list[Cell]:
    """Return few of *cells* that cover all pairs of all of them, in their order."""
    rest = list(cells)
    chosen: list[Cell] = []
    while wanted := set().union(*map(pairs, rest)) - set().union(*map(pairs, chosen)):
        # The real installer takes longest; each fault has its turn.
        faults = Counter(cell.fault for cell in chosen)
        phases = Counter(cell.step for cell in chosen if cell.step in ELEMENTS)
        best = max(
            rest,
            key=lambda cell: (len(pairs(cell) & wanted), not cell.real, -faults[cell.fault], -phases[cell.step]),
        )
        chosen.append(best)
        rest.remove(best)
    # What later ones cover too.
    for cell in list(chosen):
        others = set().union(*(pairs(other) for other in chosen if other != cell))
        if pairs(cell) <= others:
            chosen.remove(cell)
    return [cell for cell in cells if cell in chosen]


ALL = list(cells())
CHECKED = covering(ALL)
