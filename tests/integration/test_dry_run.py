"""A dry run shows what the build does: each step that is logged, and each command, with all keys of a recipe on.

The images that are booted, which takes minutes and a system that boots, are those of test_testboot.py.
"""

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from image_factory import checkpoint, pipeline
from image_factory.configuration.files import Configuration
from image_factory.parts import Group, Steps, always

from ..conftest import User, left_behind, run

pytestmark = pytest.mark.usefixtures("machine")

# Of which user, and by which way.
CELLS = [("root", "loop"), ("a", "loop"), ("root", "guestfs"), ("c", "guestfs")]


def make_key(user: User, directory: Path) -> Path:
    """Return a key to sign with, made in *directory*."""
    key, home = directory / "key.asc", directory / "gnupg"
    user.run("mkdir", "-m", "700", home)
    gpg = ["gpg", "--homedir", home, "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]
    user.run(*gpg, "--quick-generate-key", "a <a@example.com>")
    user.run("sh", "-c", f"umask 077; {shlex.join(map(str, gpg))} --export-secret-keys --armor >{key}")
    user.run("gpgconf", "--homedir", home, "--kill", "all")
    return key


def all_keys(user: User, directory: Path, key: Path) -> str:
    """Return the lines that have all be done of the build in *directory* but test boots, a section among them."""
    return f"""\
installer-logs = yes
seal = yes
audit = yes
manifest = yes
provenance = yes
sign-key = {key}
copy = {directory}/script:/srv/new/
keep-raw = yes
log-file = yes
upload_destinations = here
post-build-command = sh -c 'echo built'
[here]
upload_type = rsync
upload_target = {directory}/upload/
post-upload-command = stat ${{image}}
upload-index = yes
"""


@dataclass
class Place:
    """A build of an image with all keys, as *user*."""

    user: User
    directory: Path
    stand_in: Path
    mount_via: str
    key: Path

    @property
    def configuration(self) -> Path:
        return self.directory / "image-factory.conf"

    def configure(self, *boots: str) -> None:
        """Write the configuration; *boots* are lines for test boots."""
        (self.directory / "answers.cfg").write_text("d-i netcfg/get_hostname string golden\n")
        (self.directory / "script").write_text("#!/bin/sh\ntrue\n")
        lines = "\n".join(boots)
        self.configuration.write_text(f"""
[stand-in]
linux = {self.stand_in}/linux
initrd = {self.stand_in}/initrd.gz
preseed = {self.directory}/answers.cfg
append = console=ttyS0 no_timer_check
image-size = 512M
ram = 512M
virt-type = qemu
max-parallel = none
mount-via = {self.mount_via}
format = qcow2
{lines}
{all_keys(self.user, self.directory, self.key)}
""")

    def run(self, *flags: str) -> str:
        """Run image-factory; return what it prints and logs."""
        variables = {"IMAGE_FACTORY_CONFIG": str(self.configuration), "SSH_AUTH_SOCK": ""}
        argv = self.user.argv(self.user.program, *flags, "stand-in", **variables)
        done = run(*argv, cwd=self.directory)
        return done.stdout if "--dry-run" in flags else done.stderr


def sometimes(configuration: Path, image: str) -> set[str]:
    """Return the steps of *image* that only some disks need."""
    texts = Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)})
    plan = pipeline.make_plan(texts, image, {"output-dir": str(configuration.parent)})
    found = set()

    def look(steps: Steps) -> None:
        for item in steps:
            if isinstance(item, Group):
                look(item.steps)
            elif item.when is not always:
                found.add(item.name)

    build = pipeline.Build(plan, plan.work_path, "x")
    for stage in pipeline.STAGES:
        look(pipeline.steps_of(stage, build))
    return found


@pytest.fixture(params=CELLS, ids=lambda cell: "-".join(map(str, cell)))
def place(request: pytest.FixtureRequest, users: dict[str, User], stand_in: Path) -> Iterator[Place]:
    name, mount_via = request.param
    user = users[name]
    directory = user.directory(f"dry-{mount_via}-{os.urandom(2).hex()}")
    made = Place(user, directory, stand_in, mount_via, make_key(user, directory))
    user.run("mkdir", directory / "upload")
    made.configure()
    yield made
    assert left_behind(made.user, made.directory) == []
    shutil.rmtree(made.directory)


def whole(lines: list[str]) -> Iterator[str]:
    """Give *lines*, with those that a command's argument goes on in as one."""
    kept = ""
    for line in lines:
        kept = f"{kept}\n{line}" if kept else line
        is_command = " INFO: Running: " in kept or not re.match("# |[0-9]{4}-", kept)
        if is_command and "'" in kept:
            try:
                shlex.split(kept)
            except ValueError:
                continue
        yield kept
        kept = ""


def announced(printed: str) -> list[tuple[str, list[list[str]]]]:
    """Return the steps that a dry run has printed, in their order, each with its commands."""
    steps: list[tuple[str, list[list[str]]]] = []
    for line in whole(printed.splitlines()):
        if line.startswith("# "):
            if not line.startswith("#   "):
                steps.append((line[2:], []))
        else:
            steps[-1][1].append(normal(shlex.split(line)))
    return steps


def logged(log: str) -> list[tuple[str, list[list[str]]]]:
    """Return the steps that a build has logged, in the order of their beginnings, each with its commands."""
    steps: list[tuple[str, list[list[str]]]] = []
    # Programs print lines with three dots, too.
    names = set(re.findall(r" INFO: (.*): done in [0-9.]+ s$", log, re.MULTILINE))
    for line in whole(log.splitlines()):
        text = line.partition(" INFO: ")[2]
        if (match := re.fullmatch(r"(.*) \.\.\.", text)) and match[1] in names:
            steps.append((match[1], []))
        elif text.startswith("Running: ") and steps:
            steps[-1][1].append(normal(shlex.split(text.removeprefix("Running: "))))
    return steps


def normal(argv: list[str]) -> list[str]:
    """Replace what a dry run can't know."""
    text = "\0".join(argv)
    for pattern, replacement in (
        (r"/tmp/image-factory\.[^/\0]+/", "/tmp/image-factory.XXXXXXXX/"),
        (r"/tmp/image-factory-scratch\.[^/\0]+/", "DIRECTORY/"),
        (r"image-factory-gpg\.[^/\0]+", "image-factory-gpg.XXXXXXXX"),
        (r"(image-factory-(?:stand-in|golden))-[0-9a-f]{8}\b", "\\1-XXXXXXXX"),
        (r"(\.raw)\0[0-9]+\0[0-9]+\0/tmp", "\\1\0OFFSET\0SIZE\0/tmp"),
        (r"-O\0[0-9]+\0-S\0[0-9]+", "-O\0OFFSET\0-S\0SIZE"),
        (r"/partition-[0-9]+\b", "/partition-N"),
        (r"\?offset=[0-9]+", "?offset=OFFSET"),
        (r"(--offset)\0[0-9]+\0(--length)\0[0-9]+", "\\1\0OFFSET\0\\2\0SIZE"),
        (r"\b[0-9A-F]{40}\b", "FINGERPRINT"),
        (r"\b02(:[0-9a-f]{2}){5}", "02:XX:XX:XX:XX:XX"),
        (r"hostfwd=tcp:127\.0\.0\.1:[0-9]+-", "hostfwd=tcp:127.0.0.1:PORT-"),
        (r"-p\0[0-9]+\0", "-p\0PORT\0"),
    ):
        text = re.sub(pattern, replacement, text)
    return text.split("\0")


def compare(configuration: Path, image: str, printed: str, log: str) -> None:
    """Fail unless a dry run has *printed* what the build of *image* has logged."""
    shown, done = announced(printed), logged(log)
    perhaps = sometimes(configuration, image)
    names = [name for name, _ in done]
    assert [name for name, _ in shown if name not in perhaps or name in names] == names
    left = iter(shown)
    for name, commands in done:
        wanted = next(found for step, found in left if step == name)
        # Some are run for each partition, what writes a FILE only where there is one to be written, and files that were
        # found are read.
        found, expected = {*map(str, commands)}, {*map(str, wanted)}
        looks = {str(argv) for argv in commands if name.startswith("Auditing") and {"list", "read"} & {*argv}}
        assert expected - {text for text in expected if "'FILE'" in text} | looks == found, name


def test_each_step_and_each_command_is_in_the_dry_run(place: Place) -> None:
    printed = place.run("--dry-run")
    until = place.run("--dry-run", "--until", "install")
    assert printed.startswith(until)
    compare(place.configuration, "stand-in", until, place.run("--until", "install"))
    place.configure("test-boot = yes", f"test-script = {place.directory}/script")
    booting = place.run("--dry-run", "--resume")
    assert place.run("--dry-run") == until + booting
    assert "\n# Booting " in booting
    place.configure()
    rest = place.run("--dry-run", "--resume")
    assert printed == until + rest
    compare(place.configuration, "stand-in", rest, place.run("--resume"))
    assert not (place.directory / checkpoint.FILE_NAME).exists()
