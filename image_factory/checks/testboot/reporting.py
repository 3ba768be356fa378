"""Whether a finished system can report from its test boot: one that can't would be waited for until the limit."""

import re
from collections.abc import Iterator

from ...base import interrupts
from ...base.errors import BuildError
from ...finishing.fitting import CLOUD_FILES, datasources
from ...finishing.seal.identity import CLOUD_INIT_DISABLED
from ...model import Build
from ...parts import Step, on_tree
from ...system.rehearsal import Call
from ...system.tree import Tree

# The first systemd that takes the unit which reports from the machine's SMBIOS.
_TAKES_UNITS = 256
_SYSTEMD = ("usr/lib/systemd/systemd", "lib/systemd/systemd")
_CLOUD_INIT = ("usr/bin/cloud-init", "usr/local/bin/cloud-init")
# Where distributions have the library that has the version of systemd in its name; Debian below the architecture's.
_LIBRARIES = ("usr/lib/systemd", "lib/systemd", "usr/lib64/systemd", "usr/lib/{arch}-linux-gnu/systemd")
_LIBRARY = re.compile(r"libsystemd-shared-([0-9]{1,4})\b.*\.so")
_SEED = "NoCloud"


def steps(build: Build) -> Iterator[Step]:
    """Give the step on the mounted system, if there will be a test boot."""
    if build.plan.settings.test_boot:
        calls = (Call("look"), Call("read", CLOUD_FILES), Call("entries", _libraries(build)))
        yield Step("Checking what the test boot needs", on_tree(_check), calls=calls, rehearsed=False)


def _libraries(build: Build) -> tuple[str, ...]:
    return tuple(f"{place.format(arch=build.plan.settings.arch)}/libsystemd-shared-*.so" for place in _LIBRARIES)


def _check(build: Build, tree: Tree) -> None:
    """Raise BuildError if it is known that the system *tree* can't report."""
    with interrupts.interruptible():
        there = tree.look([*_SYSTEMD, *_CLOUD_INIT, CLOUD_INIT_DISABLED])
        asked = datasources(tree.read(CLOUD_FILES))
        names = [entry.path.rpartition("/")[2] for entry in tree.entries(_libraries(build))]
    versions = [int(match[1]) for name in names if (match := _LIBRARY.fullmatch(name))]
    why = f"[{build.plan.image}] test-boot: the system can't report: it has"
    if not there.keys() & {*_SYSTEMD}:
        raise BuildError(f"{why} no systemd.", hint="Set test-boot = no.")
    if not versions or max(versions) >= _TAKES_UNITS:
        return
    why = f"{why} systemd {max(versions)}, which leaves that to cloud-init, and"
    if not there.keys() & {*_CLOUD_INIT}:
        raise BuildError(f"{why} no cloud-init.", hint=f"Install cloud-init in it, or systemd {_TAKES_UNITS} or later.")
    if CLOUD_INIT_DISABLED in there:
        raise BuildError(f"{why} /{CLOUD_INIT_DISABLED}.", hint="Remove that file; seal = yes does.")
    if asked is not None and _SEED not in asked:
        raise BuildError(
            f"{why} one that looks for {', '.join(asked)} alone.",
            hint=f"Add {_SEED} to datasource_list in /etc/cloud/cloud.cfg.d, or take the list out.",
        )
