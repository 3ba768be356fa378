"""Measure formats and an upload against the plain commands.

make bench runs it; pytest does not collect it by itself.  Each contender has its turn in each round, and the ratio is
the median of the rounds', as the speed of a machine drifts.
"""

import dataclasses
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pytest

from image_factory import outputs
from image_factory.finishing import checksum
from image_factory.model import Artifact, Build
from image_factory.parts import carry_out
from image_factory.uploads import http

from ..conftest import REPOSITORY, run, state_of
from ..system.test_contents import build_of
from ..system.test_http_uploads import Nginx, private, running_nginx, up
from ..upload_scene import PASSWORD, USER

__all__ = ["running_nginx"]

GOAL_TIMES_OF_TAR = 1.2
GOAL_TIMES_OF_SLOWEST = 1.25
GOAL_TIMES_OF_CURL = 1.1
# What image-factory has before it begins is measured by the other programs here.
GOAL_GROWTH = 16 << 20
ROUNDS = 3
MIB, GIB = 1 << 20, 1 << 30
DISK_SIZE = 3 * GIB
# The slowest is the one that has work for one processor only.
AT_ONCE, SLOWEST = ("qcow2", "vmdk", "raw.zst"), "vmdk"


@pytest.fixture(autouse=True)
def own_helper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The helper is the one of the checkout, and the process does not grow."""
    monkeypatch.setattr("sys.argv", [str(REPOSITORY / "image-factory")])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    print(f"own process: {growth / MIB:.0f} MiB more than before")
    assert growth < GOAL_GROWTH


@pytest.fixture(scope="module")
def disk(base: Path) -> Path:
    """A disk with files of this machine's, of 1 GiB in all."""
    tree = base / "bench-tree"
    for name in ("usr", "etc"):
        (tree / name).mkdir(parents=True)
    (tree / "etc/fstab").write_text("/dev/vda1 / ext4 defaults 0 1\n")
    left = GIB
    for path in sorted(Path("/usr").rglob("*")):
        if path.is_file() and not path.is_symlink():
            left -= path.stat().st_size
            if left < 0:
                break
            target = tree / path.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            run("cp", path, target) if path.stat().st_size > MIB else target.write_bytes(path.read_bytes())
    path = base / "bench.raw"
    run("truncate", "-s", str(DISK_SIZE), path)
    table = "label: dos\nstart=1MiB, type=83\n"
    subprocess.run(["sfdisk", "--quiet", "--no-tell-kernel", path], input=table, text=True, check=True)
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, "-E", f"offset={MIB}", path, f"{DISK_SIZE // MIB - 1}M")
    return path


def build_on(disk: Path, directory: Path, formats: str) -> Build:
    build = build_of(directory, "loop", formats)
    build.disk_path.symlink_to(disk)
    # The plain commands are not told to repeat themselves either.
    return dataclasses.replace(build, plan=dataclasses.replace(build.plan, source_date=None))


def made(build: Build) -> None:
    for artifact in carry_out(state_of(build), outputs.steps(build)).artifacts:
        artifact.path.unlink()


def seconds(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def compared(what: str, ours: Callable[[], object], plain: Callable[[], object], goal: float) -> None:
    """Have *ours* take at most *goal* times of what *plain* takes."""
    plain()
    rounds = [(seconds(ours), seconds(plain)) for _ in range(ROUNDS)]
    ratio = median(own / other for own, other in rounds)
    load = os.getloadavg()[0]
    print(
        f"\n{what}: {median(own for own, _ in rounds):.1f} s, {median(other for _, other in rounds):.1f} s plain, "
        f"ratio {ratio:.2f} (goal {goal}), load {load:.1f} on {os.cpu_count()} processors"
    )
    assert ratio <= goal


def test_tar_of_a_tree(disk: Path, tmp_path: Path) -> None:
    build = build_on(disk, tmp_path / "build", "tar.zst")
    mount = tmp_path / "mnt"
    mount.mkdir()
    script = f"tar -C {mount} --numeric-owner --acls --selinux --xattrs -cf - . | zstd -T0 -q >{tmp_path}/plain.zst"

    def plain() -> None:
        run("mount", "-o", f"loop,ro,offset={MIB}", disk, mount)
        try:
            run("sh", "-c", script)
        finally:
            run("umount", mount)

    compared("tar.zst of 1 GiB", lambda: made(build), plain, GOAL_TIMES_OF_TAR)


def test_three_formats_at_once(disk: Path, tmp_path: Path) -> None:
    together = build_on(disk, tmp_path / "together", ", ".join(AT_ONCE))
    alone = build_on(disk, tmp_path / "alone", SLOWEST)
    what = f"{', '.join(AT_ONCE)} at once to {SLOWEST} alone"
    compared(what, lambda: made(together), lambda: made(alone), GOAL_TIMES_OF_SLOWEST)


def test_upload(running_nginx: Nginx, disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.raw"
    run("sh", "-c", f"head -c {GIB} /dev/urandom >{path}")
    artifact = checksum.add_sha256(Artifact(path, "raw", GIB))
    login = private(tmp_path / "netrc", f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    target = up(running_nginx.url, credentials=login, tls=running_nginx.certificate, verify="none")
    plain = [
        "curl",
        "-sSf",
        "--netrc-file",
        login,
        "--cacert",
        running_nginx.certificate,
        "-T",
        path,
        running_nginx.url,
    ]
    compared("1 GiB by http", lambda: http.upload(target, artifact), lambda: run(*plain), GOAL_TIMES_OF_CURL)
