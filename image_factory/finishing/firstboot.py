"""Have each clone of the image run the user's scripts once, as root, when it starts for the first time."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..base import events
from ..base.errors import BuildError, ConfigurationError
from ..base.log import logger
from ..configuration.settings import ImageSettings
from ..model import Build, Plan
from ..parts import Step, on_tree
from ..sources import answers
from ..system.rehearsal import Call
from ..system.tree import Tree
from . import copying
from .copying import Item
from .seal.identity import UNITS, unit_files

KEY = "first-boot"

# What is in the image until the scripts have succeeded.
_PARENT = "var/lib/image-factory"
DIRECTORY = f"{_PARENT}/first-boot"
SERVICE = "image-factory-first-boot.service"

_SYSTEMD = ("usr/lib/systemd/systemd", "lib/systemd/systemd")
_LARGEST = 1 << 20
# Where env(1) looks for programs.
_SEARCHED = ("usr/bin", "bin", "usr/sbin", "sbin", "usr/local/bin", "usr/local/sbin")
_SHEBANG = re.compile(rb"#![ \t]*(/[^\s\0]+)(?:[ \t]+([^\r\n]*))?(?:\n|$)")


def check(plan: Plan) -> None:
    """Raise ConfigurationError unless all scripts can be read, and say what runs them."""
    for path in plan.settings.first_boot:
        _script(plan, path)


def identity(plan: Plan) -> list[str]:
    """Return what tells the scripts apart from others; what can't be read is left out."""
    try:
        return [repr((path.name, _script(plan, path))) for path in plan.settings.first_boot]
    except ConfigurationError:
        return []


def steps(build: Build) -> Iterator[Step]:
    """Give the step on the mounted system, if there are scripts."""
    scripts = build.plan.settings.first_boot
    if scripts:
        told = [
            ["#", f"{path} to /{target}"] for path, target in zip(scripts, targets(build.plan.settings), strict=True)
        ]
        calls = (Call("look"), Call("remove", (DIRECTORY,)), Call("put"))
        yield Step("Installing first-boot scripts", on_tree(install), told, calls=calls, rehearsed=False)


def paths(settings: ImageSettings) -> list[str]:
    """Return all files and directories in the image that are for its scripts, if it has some."""
    return [*unit_paths(), _PARENT, DIRECTORY, *targets(settings)] if settings.first_boot else []


def unit_paths() -> list[str]:
    """Return the files of the unit."""
    return [*unit_files(SERVICE, "")]


def targets(settings: ImageSettings) -> list[str]:
    """Return where the scripts are in the image."""
    names = [answers.installer_name(path) for path in settings.first_boot]
    return [f"{DIRECTORY}/{number:02d}-{name}" for number, name in enumerate(names, 1)]


def install(build: Build, tree: Tree) -> None:
    """Put the scripts and their unit into the system *tree*, in place of those that are there."""
    plan = build.plan
    where = f"[{plan.image}] {KEY}"
    if not tree.look(_SYSTEMD):
        raise BuildError(
            f"{where}: the image has no systemd, which would run the scripts.", hint=f"Take {KEY} out of the section."
        )
    scripts = [_script(plan, path) for path in plan.settings.first_boot]
    for path, script in zip(plan.settings.first_boot, scripts, strict=True):
        _check_interpreter(tree, f"{where}: {path}", script)
    # Those of an image that was made of another one, or of the build that is resumed.
    tree.remove([DIRECTORY])
    items = [Item(_PARENT, "directory"), Item(DIRECTORY, "directory", 0o700)]
    items += [
        Item(target, "file", 0o700, data=script) for target, script in zip(targets(plan.settings), scripts, strict=True)
    ]
    units = unit_files(SERVICE, UNIT_TEXT)
    copying.put(build, tree, [*items, *(Item(path, "file", 0o644, data=data) for path, data in units.items())], KEY)
    for path, target in zip(plan.settings.first_boot, targets(plan.settings), strict=True):
        logger.info("Made /%s of %s", target, path)
        events.tell(events.InputUsed(KEY, str(path), path))


def _script(plan: Plan, path: Path) -> bytes:
    """Return the script at *path*, rendered if it is a template; ConfigurationError if nothing would run it."""
    named = answers.Named(plan, KEY, path)
    if not os.path.isfile(path):
        raise ConfigurationError(f"{named.where()} is no file.")
    if path.stat().st_size > _LARGEST:
        raise ConfigurationError(f"{named.where()} is longer than 1 MiB.", hint="Have copy bring what it needs.")
    data = named.read(path)
    if answers.is_template(path):
        data = answers.rendered(named, data)
    if not _SHEBANG.match(data):
        hint = "Begin it with a line such as #!/bin/sh."
        if b"\r\n" in data[:1024]:
            hint = "It has Windows' ends of lines: take them out."
        raise ConfigurationError(f"{named.where()}: its first line doesn't say what runs it.", hint=hint)
    return data


def _check_interpreter(tree: Tree, where: str, script: bytes) -> None:
    """Raise BuildError if the system *tree* has not what the first line of *script* names."""
    match = _SHEBANG.match(script)
    assert match is not None
    program = match[1].decode(errors="surrogateescape")
    words = (match[2] or b"").decode(errors="surrogateescape").split()
    places = [program.strip("/"), f"usr{program}"]
    named = [word for word in words if not word.startswith("-") and not {"=", "/"} & {*word}]
    if program.endswith("/env") and named:
        program = named[0]
        places = [f"{top}/{program}" for top in _SEARCHED]
    known = tree.look(list(dict.fromkeys(path for place in places for path in _with_parents(place))))
    # What is behind another link than that of /bin, for which /usr/bin is looked at, can't be told.
    is_open = any(
        known[path].kind == "link"
        for place in places
        for path in _with_parents(place)[:-1]
        if path in known and path not in _SEARCHED
    )
    if not is_open and not any(place in known for place in places):
        raise BuildError(
            f"{where}: the image has no {program}, which would run it.", hint="Install it, or use /bin/sh."
        )


def _with_parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]


UNIT_TEXT = f"""\
# Written by image-factory.  A script goes when it has succeeded, and this unit with the last one.
[Unit]
Description=First-boot scripts of the image
RequiresMountsFor=/{DIRECTORY}
Wants=network-online.target
After=network-online.target
# And so before anyone is asked for a login.
Before=systemd-user-sessions.service

[Service]
Type=oneshot
# A script that hangs is not to keep people out for ever.
TimeoutStartSec=30min
Environment=HOME=/root
ExecStart=/bin/sh -euc 'for script in /{DIRECTORY}/*; do \\
    [ -f "$$script" ] || continue; echo "Running $$script"; "$$script"; rm "$$script"; done'
ExecStart=/bin/sh -euc 'rm -rf /{DIRECTORY}; rm -f {" ".join(f"/{path}" for path in unit_paths())}; \\
    rmdir /{_PARENT} /{UNITS}/multi-user.target.d 2>/dev/null || :'
"""
