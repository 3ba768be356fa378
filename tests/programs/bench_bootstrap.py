"""Measure an image that is made from packages against mmdebstrap, mke2fs and diskimage-builder.

make bench runs it; pytest does not collect it by itself.
"""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import chown
from statistics import median

import pytest

from image_factory.base import command
from image_factory.inside.namespaces import holding_argv

from ..conftest import REPOSITORY, User, run

GOAL_TIMES_OF_MMDEBSTRAP = 1.35
GOAL_TIMES_OF_MKE2FS = 1.5
GOAL_FASTER_THAN_BUILDER = 3
GOAL_OWN_MEMORY = 64 << 20
REPEATS = 3
SAMPLE_SECONDS = 0.05
SMALL = 1 << 20

# Where the Makefile has diskimage-builder.
BUILDER = REPOSITORY / "build/diskimage-builder/bin"
# The nearest equal: its smallest Debian, with the packages that the recipe names.
BUILDER_ARGV = [str(BUILDER / "disk-image-create"), "-a", "amd64", "-t", "tar", "-o", "reference"]
BUILDER_ELEMENT = "debian-minimal"
BUILDER_VARIABLES = {
    "DIB_RELEASE": "trixie",
    "DIB_PYTHON_VERSION": "3",
    "DIB_DEBIAN_SECURITY_MIRROR": "http://deb.debian.org/debian-security",
}

IMAGE = "Debian-13-cloud-bench"
# diskimage-builder has a tree of its base in its cache, too.
CACHED = "Debian-13-cloud-bench-cached"
# In the place of the test boot, which is no part of what the others do.
CONFIGURATION = f"""
[{IMAGE}]
based_on = Debian-13-cloud
test_boot = no
cache-dir = {{cache}}
virt-type = qemu

[{CACHED}]
based_on = {IMAGE}
cache-tree = yes
"""


@dataclass
class Bench:
    """An ordinary user's directory with a configuration, and a warm cache of packages after the first build."""

    user: User
    directory: Path
    # The peak of the program's own memory, in bytes.
    memory: int = 0
    # Small files that the build has in its working directory for a while: answers, hooks.
    files: dict[Path, bytes] = field(default_factory=dict)

    def build(self, *flags: str, image: str = IMAGE) -> tuple[float, str]:
        """Build the image; return the seconds that it took, and the log."""
        configuration = str(self.directory / "image-factory.conf")
        argv = self.user.argv(self.user.program, *flags, image, IMAGE_FACTORY_CONFIG=configuration)
        start = time.monotonic()
        with (self.directory / "log").open("wb") as log:
            process = subprocess.Popen(argv, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            while process.poll() is None:
                self.memory = max(self.memory, own_memory(process.pid))
                self.look()
                time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - start
        said = (self.directory / "log").read_text(errors="replace")
        assert process.returncode == 0, said[-4000:]
        return seconds, said

    def look(self) -> None:
        """Remember the small files in the working directory, which may go at any time."""
        with suppress(OSError):
            for path in (self.directory / f".image-factory-{IMAGE}").iterdir():
                if path.is_file() and path.stat().st_size < SMALL:
                    self.files[path] = path.read_bytes()

    def restore(self) -> None:
        """Put those back that are gone."""
        for path, data in self.files.items():
            if not path.exists():
                path.write_bytes(data)
                chown(path, self.user.name)


@pytest.fixture
def bench(users: dict[str, User]) -> Iterator[Bench]:
    directory = users["a"].directory("bench")
    shipped = (REPOSITORY / "data/image-factory.conf").read_text(encoding="utf-8")
    shipped = shipped.replace("${data_dir}", str(REPOSITORY / "data"))
    (directory / "image-factory.conf").write_text(shipped + CONFIGURATION.format(cache=directory / "cache"))
    yield Bench(users["a"], directory)
    run("rm", "-rf", directory)


def own_memory(pid: int) -> int:
    """Return the peak of the memory of the process that *pid*, runuser, has started, 0 where it is gone."""
    try:
        [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        status = Path(f"/proc/{child}/status").read_text(encoding="ascii")
    except (OSError, ValueError):
        return 0
    found = re.search(r"^VmHWM:\s+([0-9]+) kB$", status, re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def bootstrap_argv(said: str, target: Path) -> list[str]:
    """Return the mmdebstrap of the build that has *said* so, which writes a tar to *target*.

    Its hooks belong to the user, who is root in namespaces as the build has them, and not in mmdebstrap's own.
    """
    line = next(line for line in said.splitlines() if " Running: nsenter " in line and " mmdebstrap " in line)
    words = shlex.split(line.partition(" Running: ")[2])
    words = words[words.index("mmdebstrap") :]
    tree = next(word for word in words if word.endswith("/tree/root"))
    words = [{tree: str(target), "--format=directory": "--format=tar"}.get(word, word) for word in words]
    *namespaces, _, _, _ = holding_argv(as_root=False)
    return [*namespaces, *words]


def step_seconds(said: str, name: str) -> float:
    """Return the seconds of the step *name* in the log."""
    found = re.search(rf"INFO: {name}: done in ([0-9.]+) s$", said, re.MULTILINE)
    assert found, name
    return float(found[1])


def measured(argv: list[str], directory: Path) -> float:
    """Run *argv* in *directory*; return the seconds that it took."""
    start = time.monotonic()
    run(*argv, cwd=directory)
    return time.monotonic() - start


def mke2fs_seconds(tar: Path, directory: Path) -> float:
    """Return the seconds of mke2fs with the tree of *tar*, which is in memory."""
    tree = directory / "plain"
    tree.mkdir()
    run("mount", "-t", "tmpfs", "tree", tree)
    try:
        run("tar", "--extract", "--file", tar, "--directory", tree)
        return measured(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), "plain.raw", "3G"], directory)
    finally:
        run("umount", tree)
        tree.rmdir()
        (directory / "plain.raw").unlink(missing_ok=True)


def packages_of(said: str) -> str:
    """Return the packages that the mmdebstrap of the build that has *said* so installs, with commas."""
    found = re.search(r" --include=(\S+)", said)
    assert found
    return found[1]


def builder_seconds(packages: str, directory: Path) -> float:
    """Return the seconds of diskimage-builder, whose caches are in *directory*, with *packages*."""
    # It runs sudo itself, and is run by a user or by root alike.
    variables = {**os.environ, **BUILDER_VARIABLES, "HOME": str(directory), "TMPDIR": str(directory)}
    variables["PATH"] = os.pathsep.join([str(BUILDER), command.search_path()])
    start = time.monotonic()
    run(*BUILDER_ARGV, "-p", packages, BUILDER_ELEMENT, cwd=directory, env=variables)
    return time.monotonic() - start


def test_diskimage_builder(bench: Bench) -> None:
    """All caches are warm after the first run of each; one more is enough, as it takes minutes."""
    _, said = bench.build(image=CACHED)
    packages = packages_of(said)
    builder_seconds(packages, bench.directory)
    ours, _ = bench.build(image=CACHED)
    theirs = builder_seconds(packages, bench.directory)
    times = theirs / ours
    print(
        f"\nDebian-13-cloud, sealed, audited, qcow2: {ours:.0f} s; diskimage-builder to a tar: {theirs:.0f} s; "
        f"{times:.2f} times, goal {GOAL_FASTER_THAN_BUILDER}"
    )
    assert times >= GOAL_FASTER_THAN_BUILDER


def test_image_from_packages(bench: Bench) -> None:
    bench.build()
    ours, alone, disk, plain = [], [], [], []
    for _ in range(REPEATS):
        first, said = bench.build("--until", "install")
        bench.restore()
        argv = bench.user.argv(*bootstrap_argv(said, bench.directory / "tree.tar"), PATH=command.search_path())
        alone.append(measured(argv, bench.directory))
        second, _ = bench.build("--resume")
        ours.append(first + second)
        disk.append(step_seconds(said, "Installing the boot loader") + step_seconds(said, "Making the disk"))
        plain.append(mke2fs_seconds(bench.directory / "tree.tar", bench.directory))
    times = median(ours) / median(alone)
    copies = median(disk) / median(plain)
    print(
        f"\nDebian-13-cloud, sealed, audited, qcow2: {median(ours):.0f} s; mmdebstrap alone to a tar: "
        f"{median(alone):.0f} s; {times:.2f} times, goal {GOAL_TIMES_OF_MMDEBSTRAP}\n"
        f"tree to bootable disk: {median(disk):.1f} s; mke2fs -d alone: {median(plain):.1f} s; "
        f"{copies:.2f} times, goal {GOAL_TIMES_OF_MKE2FS}\n"
        f"own memory: {bench.memory >> 20} MiB, goal below {GOAL_OWN_MEMORY >> 20} MiB"
    )
    assert bench.memory < GOAL_OWN_MEMORY
    assert times <= GOAL_TIMES_OF_MMDEBSTRAP
    assert copies <= GOAL_TIMES_OF_MKE2FS
