"""A system that is captured in tests: small, of Debian's kind, and lived in."""

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .conftest import PATIENCE, User, run, wait_for
from .small_archive import Archive

WORK = ".image-factory-small"
# Beside what the archive's package has.
_HOST_PROGRAMS = ("findmnt", "df", "head", "id")
_FILES = {
    "etc/fstab": "UUID=0815 / ext4 defaults 0 1\nUUID=4711 /home ext4 defaults 0 2\nUUID=12 none swap sw 0 0\n"
    "nas:/data /data nfs defaults 0 0\ntmpfs /srv/scratch tmpfs size=1M 0 0\n",
    "etc/crypttab": "root UUID=0816 none luks\n",
    "etc/default/grub": 'GRUB_CMDLINE_LINUX="quiet resume=UUID=12 nosplash"\n',
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "srv/data": "lived in\n",
    "tmp/scrap": "scrap\n",
    "run/pid": "1\n",
    "boot/grub/i386-pc/normal.mod": "an old module",
    "home/ann/notes": "notes\n",
}


def make_system(archive: Archive, tree: Path) -> None:
    """Make the system in *tree*, all of it root's but for a home."""
    [package] = (archive.directory / "pool").glob("base_*.deb")
    run("dpkg-deb", "--extract", package, tree)
    for name, text in _FILES.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tree / "home/ann").chmod(0o700)
    (tree / "boot/vmlinuz-1.0").write_text("a kernel")
    (tree / "lib/modules/1.0").mkdir(parents=True)
    maker = tree / "usr/sbin/mkinitramfs"
    maker.write_text('#!/bin/sh\ncat /etc/initramfs-tools/conf.d/* /etc/fstab >"$2"\necho "$3" >>"$2"\n')
    maker.chmod(0o755)
    (tree / "etc/initramfs-tools/conf.d").mkdir(parents=True)
    (tree / "etc/initramfs-tools/conf.d/resume").write_text("RESUME=UUID=12\n")


def add_program(tree: Path, name: str, as_name: str = "") -> None:
    """Copy the program *name* of this machine, and its libraries, into *tree*, perhaps by another name."""
    program = Path(shutil.which(name) or f"/usr/sbin/{name}").resolve()
    target = tree / "usr/bin" / (as_name or name)
    target.unlink(missing_ok=True)
    shutil.copy(program, target)
    for library in re.findall(r"(/lib\S+) \(", run("ldd", program).stdout):
        place = tree / library[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            shutil.copy(library, place)


@dataclass
class Scene:
    """A directory of a user's to build in."""

    user: User
    directory: Path

    def __post_init__(self) -> None:
        self.out = self.directory / "out"

    def configure(self, origin: object, **keys: str) -> None:
        """Write the configuration that captures *origin*."""
        values = {
            "source": "capture",
            "capture-from": str(origin),
            "firmware": "hybrid",
            "format": "raw",
            "cache-dir": str(self.directory / "cache"),
            "output-dir": str(self.out),
        } | {key.replace("_", "-"): value for key, value in keys.items()}
        text = "".join(f"{key} = {value}\n" for key, value in values.items())
        (self.directory / "image-factory.conf").write_text(f"[small]\n{text}")

    def argv(self, *words: str) -> list[str]:
        """Return the command that builds, or does what *words* say."""
        variables = {
            "IMAGE_FACTORY_CONFIG": str(self.directory / "image-factory.conf"),
            "PATH": f"{self.directory}/bin:/usr/local/bin:/usr/bin:/bin",
        }
        return self.user.argv(self.user.program, *(words or ("--until", "install", "small")), **variables)

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*self.argv(*words), check=check, cwd=self.directory, timeout=3 * PATIENCE)

    def fail(self) -> list[str]:
        """Build, which fails and leaves nothing; return what is told of it, error and hint."""
        done = self.run(check=False)
        said = [line for line in done.stderr.splitlines() if line.startswith("image-factory: ")]
        assert done.returncode in (1, 2), done.stderr
        assert [line.split(": ")[1] for line in said] == ["error", "hint"], done.stderr
        assert self.left() == []
        return [line.split(": ", 2)[2] for line in said]

    @property
    def disk(self) -> Path:
        """The disk that was made."""
        return self.out / WORK / "disk.raw"

    def left(self) -> list[str]:
        """Return what is there of a build that has failed: files, processes and mounts."""
        files = [str(path) for path in self.directory.rglob(".image-factory*")]
        processes = run("ps", "-eo", "args").stdout.splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return [*files, *(line for line in [*processes, *mounts] if f"{self.directory}/" in line)]

    def own(self, path: Path) -> None:
        """Have *path* and all below it be the user's."""
        for each in (path, *path.rglob("*")):
            os.chown(each, self.user.uid, self.user.uid, follow_symlinks=False)


# Shows sshd's sessions the tree $1 as a machine's root, with a disk of its own $2 at /home and memory at /data.
_MACHINE = """\
set -e
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
mount -t tmpfs dev "$1/dev"
: >"$1/dev/null"
mount --bind /dev/null "$1/dev/null"
mount -t sysfs sysfs "$1/sys"
mount -o loop "$2" "$1/home"
mkdir -p "$1/data"
mount -t tmpfs data "$1/data"
echo memory >"$1/data/file"
exec /usr/sbin/sshd -D -e -f "$3"
"""


@dataclass
class Machine:
    """A machine whose root is *tree*, which ssh reaches at *port*; *directory* has keys and the client's files."""

    tree: Path
    directory: Path
    port: int

    @property
    def origin(self) -> str:
        """Where it is."""
        return f"ssh://root@127.0.0.1:{self.port}"

    def program(self, name: str, text: str) -> None:
        """Have the machine run the lines *text* of shell in the place of its program *name*."""
        path = self.tree / "usr/bin" / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def know(self, scene: Scene, key: str = "host") -> None:
        """Have the user of *scene* know the machine by *key*, and log in."""
        (scene.directory / "bin").mkdir(exist_ok=True)
        known = (self.directory / f"{key}.pub").read_text() if key else ""
        files = {
            "known": f"[127.0.0.1]:{self.port} {known}" if key else "",
            "key": (self.directory / "user").read_text(),
            "config": f"IdentityFile {scene.directory}/key\nIdentitiesOnly yes\nUserKnownHostsFile "
            f"{scene.directory}/known\nGlobalKnownHostsFile /dev/null\n",
            "bin/ssh": f'#!/bin/sh\nexec /usr/bin/ssh -F {scene.directory}/config "$@"\n',
        }
        for name, text in files.items():
            path = scene.directory / name
            path.write_text(text)
            path.chmod(0o755 if name == "bin/ssh" else 0o600)
            shutil.chown(path, scene.user.name)


@contextmanager
def running(archive: Archive, directory: Path) -> Iterator[Machine]:
    """Have a machine run that was lived in."""
    tree, home = directory / "machine", directory / "home.ext4"
    make_system(archive, tree)
    for name in _HOST_PROGRAMS:
        add_program(tree, name)
    # busybox' own shell takes what busybox has for any program.
    add_program(tree, "dash", "sh")
    run("mke2fs", "-q", "-t", "ext4", "-d", tree / "home", home, "16M")
    shutil.rmtree(tree / "home/ann")
    for name in ("host", "other", "user"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = directory / "session"
    command.write_text(f'#!/bin/sh\nexec chroot {tree} /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n')
    command.chmod(0o755)
    (directory / "user.pub").chmod(0o644)
    configuration = directory / "sshd_config"
    configuration.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {directory}/user.pub\nPermitRootLogin yes\nForceCommand {command}\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    argv = ["unshare", "--mount", "sh", "-c", _MACHINE, "sh", tree, home, configuration]
    with (directory / "sshd.log").open("w") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            wait_for(lambda: "listening" in (directory / "sshd.log").read_text() or process.poll(), "sshd")
            assert process.poll() is None, (directory / "sshd.log").read_text()
            yield Machine(tree, directory, port)
        finally:
            process.kill()


def new_scene(user: User) -> Scene:
    """Return a place of *user*'s."""
    directory = Path(tempfile.mkdtemp(prefix="capture-", dir=user.home))
    directory.chmod(0o755)
    shutil.chown(directory, user.name)
    return Scene(user, directory)
