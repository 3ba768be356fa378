"""Elements against diskimage-builder itself, which the Makefile gets from PyPI: make elements-check."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from image_factory.base.errors import ConfigurationError
from image_factory.base.files import digest_of_stream
from image_factory.elements import hooks, resolve

from ..conftest import REPOSITORY, run

BUILDER = REPOSITORY / "build/diskimage-builder"
SYSTEMS = ("debian-minimal", "ubuntu-minimal", "fedora")
# Reads names on each line, and prints a list: the elements that these lead to, or the name of the error.
ANSWERS = """\
import json, sys
from diskimage_builder import element_dependencies
def answer(names):
    try:
        return sorted(each.name for each in element_dependencies._get_elements(names, sys.argv[1]))
    except Exception as error:
        return type(error).__name__
print(json.dumps([answer(line.split()) for line in sys.stdin]))
"""
# The errors of diskimage-builder, by what ours say.
ERRORS = {
    "There is no element": "MissingElementException",
    "both provide": "AlreadyProvidedException",
    "provides it": "AlreadyProvidedException",
    "No element provides": "MissingOSException",
}


@pytest.fixture(scope="module")
def stock() -> Path:
    found = [*BUILDER.glob("lib/python3*/site-packages/diskimage_builder")]
    assert found, "make elements-check gets diskimage-builder"
    return found[0]


def test_resolution_is_the_same(stock: Path) -> None:
    known = resolve.find([stock / "elements"])
    assert len(known) > 120
    chosen = random.Random(20)
    asked = [[name] for name in sorted(known)]
    asked += [chosen.sample(sorted(known), count) for count in (2, 3, 4, 6) for _ in range(150)]
    asked += [[*names, system] for names in asked for system in SYSTEMS if system not in names]
    argv = [BUILDER / "bin/python", "-c", ANSWERS, stock / "elements"]
    lines = "".join(f"{' '.join(names)}\n" for names in asked)
    done = subprocess.run(argv, input=lines, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    wrong = [
        (names, ours, each) for names, each in zip(asked, theirs, strict=True) if (ours := answer(names, known)) != each
    ]
    assert wrong == []
    assert len({str(each) for each in theirs}) > 500


def answer(names: list[str], known: dict[str, resolve.Element]) -> list[str] | str:
    try:
        return sorted(each.element.name for each in resolve.resolve(dict.fromkeys(names, "named"), known))
    except ConfigurationError as error:
        return next(theirs for ours, theirs in ERRORS.items() if ours in error.message)


def test_the_options_are_the_same(stock: Path) -> None:
    theirs = run(BUILDER / "bin/disk-image-create", "--help").stdout.partition("Environment Variables")[0]
    flags = set(re.findall(r"^    (-[a-z]|--[a-z-]+)", theirs, re.MULTILINE))
    ours = run(REPOSITORY / "contrib/disk-image-create", "--help").stdout
    assert len(flags) > 20
    assert [flag for flag in sorted(flags) if not re.search(rf"^  (?:-., )?{flag}\b", ours, re.MULTILINE)] == []


@pytest.mark.parametrize("names", ["debian-minimal vm base devuser openssh-server", "fedora base vm", "gentoo base"])
def test_scripts_run_in_the_same_order(stock: Path, tmp_path: Path, names: str) -> None:
    known = resolve.find([stock / "elements"])
    asked = resolve.wanted(names.split(), "amd64", with_base=True)
    merged = hooks.merge(each.element for each in resolve.resolve(asked, known))
    for name, file in merged.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file.path, tmp_path / name, follow_symlinks=False)
    count = 0
    for phase in hooks.PHASES:
        if (tmp_path / phase.directory).is_dir():
            listed = run("bash", stock / "lib/dib-run-parts", "--list", tmp_path / phase.directory).stdout
            theirs = [Path(line).name for line in listed.splitlines()]
            assert [script for script, _ in hooks.scripts(merged, phase.directory)] == theirs
            count += len(theirs)
    assert count > 20


ELEMENTS = "debian-minimal devuser sysprep package-installs"
VARIABLES = {
    "DIB_RELEASE": "bookworm",
    "DIB_PYTHON_VERSION": "3",
    "DIB_DEBIAN_SECURITY_MIRROR": "http://deb.debian.org/debian-security",
}
# What is not the same in two tars, and why.
DIFFERENT = {
    r"dev/.*": "diskimage-builder has the machine's devices in its tar",
    r"run/.*": "the format tar leaves out what is there",
    r"proc|sys": "diskimage-builder leaves out the directories themselves",
    r"lost\+found": "diskimage-builder has it in its tar",
    r"boot/initrd\.img-.*": "it has the times of its files",
    r"etc/dib-manifests/.*": "the name and the variables of the build",
    r"etc/fstab": "the disk's own label or UUID",
    r"etc/iscsi/initiatorname\.iscsi": "it is random",
    r"var/cache/ldconfig/aux-cache": "it has times and numbers of inodes",
}
CONFIGURATION = """\
[ours]
source = elements
elements = {elements}
layout = filesystem
format = tar
image-size = 3G
cache-dir = {place}/cache
output-dir = {place}/out
"""


def contents(path: Path) -> dict[str, tuple[object, ...]]:
    """Return what a tar has: type, mode, owner, target of a link and digest of each name."""
    found = {}
    with tarfile.open(path) as file:
        for member in file:
            data = file.extractfile(member) if member.isfile() or member.islnk() else None
            digest, _ = digest_of_stream(data) if data else ("", 0)
            kind = tarfile.REGTYPE if member.islnk() else member.type
            target = member.linkname if member.issym() else ""
            found[member.name.removeprefix("./")] = (kind, member.mode, member.uid, member.gid, target, digest)
    return found


def test_debian_minimal_is_the_same(stock: Path, tmp_path: Path) -> None:
    place, builder = tmp_path / "ours", tmp_path / "theirs"
    place.mkdir()
    builder.mkdir()
    keys = "".join(f"{name} = {value}\n" for name, value in VARIABLES.items())
    (place / "conf").write_text(CONFIGURATION.format(elements=ELEMENTS, place=place) + keys, encoding="utf-8")
    path = f"{os.environ['PATH']}:{BUILDER / 'bin'}"
    ours = {"PATH": path, "HOME": str(place), "IMAGE_FACTORY_CONFIG": str(place / "conf")}
    theirs = {"PATH": path, "HOME": str(builder), "TMPDIR": str(builder), **VARIABLES}
    began = time.monotonic()
    run(sys.executable, REPOSITORY / "image-factory", "ours", env=ours, cwd=place)
    between = time.monotonic()
    argv = ["disk-image-create", "--no-tmpfs", "-t", "tar", "-o", "theirs", *ELEMENTS.split()]
    run(BUILDER / "bin" / argv[0], *argv[1:], env=theirs, cwd=builder)
    print(f"image-factory {between - began:.0f} s, diskimage-builder {time.monotonic() - between:.0f} s")
    [tar] = (place / "out").glob("*.tar")
    one, other = contents(tar), contents(builder / "theirs.tar")
    different = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    assert sorted(name for name in different if not re.fullmatch("|".join(DIFFERENT), name)) == []
    assert len(one.keys() & other.keys()) > 10000
