"""What the tests of image-factory-sudo-helper share: two users with mounted images, and what is not theirs."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import PATIENCE, User, machine_state, run

IMAGE_SIZE = 16 << 20
# In the tables below: directories of user a and of user b, a mounted image of each, a file of root's.
WORDS = ("OWN", "OTHER", "MOUNTED", "THEIRS", "IMAGE", "THEIR_IMAGE", "ROOTS", "LOOP")


@dataclass
class Scene:
    """Two users who build: each has an image, mounted in a directory of its own."""

    users: dict[str, User]
    directories: dict[str, Path]
    images: dict[str, Path]
    mounts: dict[str, Path]
    victim: Path

    def helper(
        self, *words: str | bytes, user: str = "a", stdin: bytes = b"", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the helper through sudo as *user*."""
        own = self.users[user]
        argv: list[str | bytes] = [*own.argv("sudo", "-n", own.helper, **environment), *words]
        done = subprocess.run(argv, input=stdin, capture_output=True, cwd=own.home, timeout=PATIENCE)
        texts = (output.decode(errors="replace") for output in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(done.args, done.returncode, *texts)

    def mount_words(self, image: Path, point: Path) -> list[str]:
        return ["mount-image", str(image), "0", str(IMAGE_SIZE), str(point)]

    def fill_in(self, word: str) -> str:
        loop = run("findmnt", "--noheadings", "--output", "SOURCE", self.mounts["b"]).stdout.strip()
        values = {
            "OWN": self.directories["a"],
            "OTHER": self.directories["b"],
            "MOUNTED": self.mounts["a"],
            "THEIRS": self.mounts["b"],
            "IMAGE": self.images["a"],
            "THEIR_IMAGE": self.images["b"],
            "ROOTS": self.victim,
            "LOOP": loop,
        }
        for name in WORDS:
            word = word.replace(f"<{name}>", str(values[name]))
        return word

    def outside(self) -> list[str]:
        """Return what must not change: victims with modes, owners, times, and all mounts and loop devices."""
        paths = [self.victim.parent, self.images["b"], self.directories["b"]]
        listing = run("find", *paths, "-xdev", "-printf", "%p %m %U %G %s %T@ %l\n").stdout
        # Another run's users come and go in it.
        listing += run("find", "/etc/shadow", "-printf", "%p %m %U %G %l\n").stdout
        inside = run("find", self.mounts["b"], "-printf", "%p %m %U %s %T@ %l\n").stdout
        return [listing, inside, *machine_state()]


def make_image(user: User, name: str, tree: Path) -> Path:
    image = user.home / name
    run("truncate", "-s", str(IMAGE_SIZE), image)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image)
    run("chown", user.name, image)
    return image


@pytest.fixture(scope="module")
def scene(users: dict[str, User], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The guest's tree has links, a device, a setuid file and a socket where logs belong."""
    tree = tmp_path_factory.mktemp("tree")
    victim = users["root"].home / "victims" / "secret"
    victim.parent.mkdir(exist_ok=True)
    victim.write_text("root's secret\n")
    victim.chmod(0o600)
    for path in ("etc", "root", "var/log/installer", "var/log/YaST2", "var/adm", "usr/bin"):
        (tree / path).mkdir(parents=True, exist_ok=True)
    (tree / "root").chmod(0o700)
    (tree / "etc/fstab").write_text("")
    (tree / "root/install.log").write_text("an installer's log\n")
    (tree / "var/log/installer/syslog").write_text("line one\nline two")
    (tree / "var/log/installer/status").symlink_to(victim)
    (tree / "var/log/anaconda").symlink_to(victim.parent)
    (tree / "var/lib").symlink_to(victim.parent)
    (tree / "var/adm/autoinstall").symlink_to("/etc")
    os.mknod(tree / "var/log/YaST2/y2log", 0o666 | 0o020000, os.makedev(1, 5))
    os.mkfifo(tree / "var/log/YaST2/fifo")
    (tree / "usr/bin/rootshell").write_bytes(Path("/bin/dash").read_bytes())
    (tree / "usr/bin/rootshell").chmod(0o4755)
    images = {name: make_image(users[name], "image.raw", tree) for name in "ab"}
    directories = {}
    for name in "ab":
        directories[name] = Path(users[name].run("mktemp", "-d", "/tmp/image-factory.XXXXXXXX").stdout.strip())
        users[name].run("mkdir", "-m", "700", directories[name] / "tree", directories[name] / "empty")
        users[name].run("touch", directories[name] / "file")
        users[name].run("mkdir", directories[name] / "full", directories[name] / "full/x")
        users[name].run("ln", "-s", "/etc", directories[name] / "link")
    found = Scene(users, directories, images, {name: directories[name] / "tree" for name in "ab"}, victim)
    try:
        for name in "ab":
            done = found.helper(
                "mount-image", str(images[name]), "0", str(IMAGE_SIZE), str(found.mounts[name]), user=name
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        yield found
    finally:
        for name in "ab":
            run("umount", found.mounts[name], check=False)
            run("rm", "-r", directories[name])


@contextmanager
def own_mount(scene: Scene) -> Iterator[Path]:
    """Give a second mount of user a's, of a fresh copy of the image."""
    point = scene.directories["a"] / "empty"
    image = scene.images["a"].with_name("copy.raw")
    scene.users["a"].run("cp", scene.images["a"], image)
    done = scene.helper("mount-image", str(image), "0", str(IMAGE_SIZE), str(point))
    assert (done.returncode, done.stderr) == (0, "")
    try:
        yield point
    finally:
        done = scene.helper("umount", str(point))
        assert (done.returncode, done.stderr) == (0, "")
        image.unlink()
