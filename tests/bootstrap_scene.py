"""Places in which tests bootstrap a system from a small archive."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .conftest import PATIENCE, User, run
from .small_archive import SUITE, Archive

WORK = ".image-factory-small"
BUILD = ("--until", "install", "small")


@dataclass
class Place:
    """A directory of a user's to bootstrap in, from *archive*."""

    user: User
    directory: Path
    archive: Archive

    def __post_init__(self) -> None:
        self.out, self.cache = self.directory / "out", self.directory / "cache"
        self.recipe()
        self.configure()

    def recipe(self, uri: str = "", **keys: object) -> None:
        """Write the recipe, whose archive is at *uri*; JSON is YAML."""
        suite = str(keys.get("suite", SUITE))
        source = self.archive.source(uri or f"copy:{self.archive.directory}", suite)
        values = {"suite": suite, "variant": "minbase", "sources": [source]} | keys
        lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())
        (self.directory / "small.yaml").write_text(lines)

    def configure(self, **keys: str) -> None:
        values = {
            "source": "bootstrap",
            "bootstrap": str(self.directory / "small.yaml"),
            "firmware": "hybrid",
            "format": "raw",
            "image-size": "160M",
            "cache-dir": str(self.cache),
            "output-dir": str(self.out),
        } | {key.replace("_", "-"): value for key, value in keys.items()}
        text = "".join(f"{key} = {value}\n" for key, value in values.items())
        (self.directory / "image-factory.conf").write_text(f"[small]\n{text}")

    def argv(self, *words: str, **environment: str) -> list[str]:
        """Return the command that builds, or does what *words* say."""
        configuration = str(self.directory / "image-factory.conf")
        variables = {"IMAGE_FACTORY_CONFIG": configuration} | environment
        return self.user.argv(self.user.program, *(words or BUILD), **variables)

    def run(self, *words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        return run(*self.argv(*words, **environment), check=check, cwd=self.directory, timeout=PATIENCE)

    def left(self) -> list[str]:
        """Return what is there of a build: files, processes and mounts."""
        files = [str(path) for path in self.directory.rglob("*") if path.name.startswith(".")]
        processes = run("ps", "-eo", "args").stdout.splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return [*files, *(line for line in [*processes, *mounts] if f"{self.directory}/" in line)]


def new_place(user: User, archive: Archive) -> Place:
    """Return a place of *user*'s with a copy of *archive*."""
    directory = Path(tempfile.mkdtemp(prefix="bootstrap-", dir=user.home))
    directory.chmod(0o755)
    shutil.chown(directory, user.name)
    # Beside what the build may leave there.
    beside = Path(tempfile.mkdtemp(prefix="archive-", dir=user.home))
    beside.chmod(0o755)
    return Place(user, directory, archive.copied(beside))
