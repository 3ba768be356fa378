"""The command line, as a user meets it: output, exit status, and one clear line for each mistake."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema
import pytest

from image_factory import __version__
from image_factory.machines.arch import default_arch, default_firmware

from ..conftest import PATIENCE

pytestmark = pytest.mark.usefixtures("machine")

REPOSITORY = Path(__file__).resolve().parents[2]
LIST_SCHEMA = json.loads((REPOSITORY / "data/image-list.schema.json").read_text())
NOBODY = 65534
LONG_NAME = "a" * 300

CONFIGURATION = """
[x]
linux = linux
initrd = initrd

[Debian-12]
linux = linux
initrd = initrd
image-size = 1G

[nothing]
append = quiet
[half]
linux = linux
[remote]
linux = http://127.0.0.1:9/linux
initrd = initrd
[answers]
linux = linux
initrd = initrd
preseed = answer.cfg
kickstart = answer.cfg
[no-file]
linux = absent
initrd = initrd
[no-answer]
linux = linux
initrd = initrd
preseed = absent.cfg
[no-keyring]
linux = linux
initrd = initrd
image-size = 1M
keyring = absent.gpg
[no-keys]
source = bootstrap
bootstrap = answer.cfg
keyring = absent.gpg
[directory]
linux = .
initrd = initrd
[bad-size]
linux = linux
initrd = initrd
image-size = -1G
[bad-vnc]
linux = linux
initrd = initrd
vnc = localhost:port
[unknown-variable]
linux = ${mirror}/linux
initrd = initrd
[circle]
linux = ${there}
there = ${linux}
initrd = initrd
[loop]
linux = linux
initrd = initrd
mount-via = loop
[guestfs]
linux = linux
initrd = initrd
mount-via = guestfs
virt-type = qemu

[up-absent]
linux = linux
initrd = initrd
upload_destinations = absent
[up-no-type]
linux = linux
initrd = initrd
upload_destinations = no-type
[no-type]
upload_target = /srv
[up-no-target]
linux = linux
initrd = initrd
upload_destinations = no-target
[no-target]
upload_type = rsync
[up-bad-type]
linux = linux
initrd = initrd
upload_destinations = bad-type
[bad-type]
upload_type = ftp
upload_target = /srv

[no-command]
linux = linux
initrd = initrd
post-build-command = no-such-command --now
[two-lines]
linux = linux
initrd = initrd
preseed = first
  second

[x y]
linux = linux
initrd = initrd
[-x]
linux = linux
initrd = initrd
"""


@dataclass
class Place:
    """The home and current directory of a run."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)

    def argv(self, *arguments: str) -> list[str]:
        return ["/usr/bin/python3", str(REPOSITORY / "image-factory"), *arguments]

    def variables(self) -> dict[str, str]:
        defaults = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.path),
            "LANG": "C.UTF-8",
            "IMAGE_FACTORY_CONFIG": str(self.path / "own.conf"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return defaults | self.environment

    def run(self, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*before, *self.argv(*arguments)],
            env=self.variables(),
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def files(self) -> list[Path]:
        return sorted(self.path.rglob("*"))

    def refused(self, *arguments: str, before: tuple[str, ...] = ()) -> tuple[str, str]:
        """Return error and hint of a command line that is refused before anything is created."""
        existing = self.files()
        done = self.run(*arguments, before=before)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert self.files() == existing
        lines = done.stderr.splitlines()
        while lines and re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ image-factory \[\d+\] INFO: ", lines[0]):
            del lines[0]
        assert lines[0].startswith("image-factory: error: "), done.stderr
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("image-factory: hint: ")), done.stderr
        hint = lines[1].removeprefix("image-factory: hint: ") if lines[1:] else ""
        return lines[0].removeprefix("image-factory: error: "), hint


def fill(directory: Path) -> None:
    (directory / "own.conf").write_text(CONFIGURATION)
    for name in ("linux", "initrd"):
        (directory / name).write_text("a file\n")
    (directory / "answer.cfg").write_text("d-i debian-installer/exit/poweroff boolean true\n")


@pytest.fixture
def place() -> Iterator[Place]:
    """A place that QEMU of the system's libvirt can get into, unlike tmp_path."""
    with tempfile.TemporaryDirectory(prefix="image-factory-test.", dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        fill(directory)
        yield Place(directory)


# Arguments, and what the error has to name.
REFUSED: dict[str, tuple[list[str], str]] = {
    "no image": ([], "No image is named."),
    "empty image": ([""], "No image is named."),
    "unknown image": (["debian-12"], "No image 'debian-12' is configured"),
    "no such image": (["zzz"], "No image 'zzz' is configured"),
    "the defaults": (["DEFAULT"], "No image 'DEFAULT' is configured"),
    "no installer": (["nothing"], "[nothing] lacks 'linux' and 'initrd'."),
    "no initrd": (["half"], "[half] lacks 'initrd'."),
    "two answer files": (["answers"], "[answers] has 'preseed' and 'kickstart'."),
    "no kernel file": (["no-file"], "[no-file] linux: absent is not there."),
    "no answer file": (["no-answer"], "[no-answer] preseed: absent.cfg is not there."),
    "no keyring": (["no-keyring"], "[no-keyring] keyring: absent.gpg is not there."),
    "no keyring of packages": (["no-keys"], "[no-keys] keyring: absent.gpg is not there."),
    "directory for a kernel": (["directory"], "[directory] linux: . is not a file."),
    "size in the file": (["bad-size"], "[bad-size] image-size: '-1G' is not accepted, only a size above zero"),
    "size -1G": (["x", "--image-size=-1G"], "--image-size: '-1G' is not accepted, only a size above zero"),
    "size -1G, apart": (["x", "--image-size", "-1G"], "--image-size"),
    "size 0": (["x", "--image-size", "0"], "--image-size: '0' is not accepted"),
    "size G": (["x", "--image-size", "G"], "--image-size: 'G' is not accepted"),
    "size without a unit": (["x", "--image-size", "2"], "--image-size: '2' is not accepted, only a size of at least"),
    "size 1e9": (["x", "--image-size", "1e9"], "--image-size: '1e9' is not accepted"),
    "size 2 GX": (["x", "--image-size", "2 GX"], "--image-size: '2 GX' is not accepted"),
    "empty size": (["x", "--image-size", ""], "--image-size: '' is not accepted"),
    "huge size": (["x", "--image-size", "9" * 5000], "--image-size: '999"),
    "format": (["x", "-f", "zip"], "--format: 'zip' is not accepted, only raw or qcow2"),
    "one format of two": (["x", "--format", "raw,zip"], "--format: 'raw,zip' is not accepted"),
    "one name of two formats": (
        ["x", "--format", "vhd,vhd-dynamic"],
        "[x] format: vhd and vhd-dynamic have the same file name, x-",
    ),
    "MAC": (["x", "--mac", "52:54:00:12:34"], "--mac: '52:54:00:12:34' is not accepted, only a unicast MAC"),
    "multicast MAC": (["x", "--mac", "01:54:00:12:34:56"], "--mac: '01:54:00:12:34:56' is not accepted"),
    "vnc": (["bad-vnc"], "[bad-vnc] vnc: 'localhost:port' is not accepted, only HOST:DISPLAY"),
    "upload section": (["up-absent"], "[up-absent] upload-destinations: there is no section [absent]."),
    "upload type": (["up-no-type"], "[no-type] lacks 'upload_type'."),
    "upload target": (["up-no-target"], "[no-target] lacks 'upload_target'."),
    "unknown upload type": (["up-bad-type"], "[bad-type] upload-type: 'ftp' is not accepted, only rsync"),
    "unknown variable": (["unknown-variable"], "[unknown-variable] linux: ${mirror} is not defined."),
    "circle": (["circle"], "[circle] linux: its ${...} go round in a circle."),
    "name with a slash": (["a/b"], "'a/b' is no image name."),
    "name with dots": ([".."], "'..' is no image name."),
    "name with a blank": (["x y"], "'x y' is no image name."),
    "name with a dash": (["--", "-x"], "'-x' is no image name."),
    "name with a line break": (["x\ny"], "'x\\ny' is no image name."),
    "long name": ([LONG_NAME], "is no image name."),
    "post-build command": (["no-command"], "Missing programs: no-such-command."),
    "space": (["x", "--image-size", "7E"], "free, the disk may grow to 7.0 EiB."),
    "output is a file": (["x", "--image-size", "1M", "-o", "linux"], "[x] output-dir: "),
    "output below a file": (["x", "--image-size", "1M", "-o", "linux/a"], "linux is not a directory."),
    "cache is a file": (["remote", "--image-size", "1M", "-c", "linux"], "[remote] cache-dir: "),
    "empty output": (["x", "-o", ""], "--output-dir: '' is not accepted"),
    "empty log file": (["x", "--log-filename", ""], "--log-filename: '' is not accepted"),
    "value with a line break": (["two-lines"], "[two-lines] preseed: a value of several lines is not accepted"),
    "unknown flag": (["x", "--colour"], "There is no option --colour."),
    "an image twice": (["x", "Debian-12", "x"], "x is named twice."),
    "an empty image among others": (["x", ""], "'' is no image name."),
    "a path among images": (["x", "../x"], "'../x' is no image name."),
    "one bad image of two": (["x", "half", "--image-size", "1M"], "half: [half] lacks 'initrd'."),
    "two bad images of three": (
        ["half", "x", "zzz", "--image-size", "1M"],
        "half: [half] lacks 'initrd'. It is the URI of the netboot initrd. zzz: No image 'zzz' is configured",
    ),
    "the same of two": (["no-command", "x", "--image-size", "7E", "Debian-12"], "x, Debian-12: "),
    "one log file of two": (
        ["x", "--image-size", "1M", "--log-file", "--log-filename", "a.log", "Debian-12"],
        "Debian-12: It would log into ",
    ),
    "shell of two": (["x", "Debian-12", "--shell-on-error"], "--shell-on-error is for one image."),
    "keys of two": (["x", "Debian-12", "--keys"], "--keys is for one image."),
    "keys of none": (["--keys"], "No image is named."),
    "keys of an unknown image": (["--keys", "zzz"], "No image 'zzz' is configured"),
    "configuration of two": (["x", "Debian-12", "--show-config"], "--show-config is for one image."),
    "configuration of an unknown image": (["--show-config", "zzz"], "No image 'zzz' is configured"),
    "answers of two": (["x", "Debian-12", "--show-answers"], "--show-answers is for one image."),
    "flag without its value": (["x", "-f"], "Argument -f/--format: expected one argument."),
    "no value to set": (["x", "--set", "ram"], "Argument --set: 'ram' is not KEY=VALUE."),
    "no key to set": (["x", "--set", " =2G"], "Argument --set: ' =2G' is not KEY=VALUE."),
    "bad value to set": (["x", "--set", "ram=2 GX"], "[x] ram: '2 GX' is not accepted"),
    "set where no image is built": (["--list", "--set", "ram=2G"], "--set is for images, --list knows none."),
    "escape sequence": (["x", "--\x1b[2Jcolour"], "There is no option --colour."),
}


@pytest.mark.parametrize("row", REFUSED)
@pytest.mark.parametrize("mode", [(), ("--check",), ("--dry-run",)], ids=["build", "check", "dry-run"])
def test_refused(place: Place, row: str, mode: tuple[str, ...]) -> None:
    arguments, named = REFUSED[row]
    error, _ = place.refused(*mode, *arguments)
    assert named in error
    assert len(error) < 6000


@pytest.mark.parametrize(
    ("flags", "move"),
    [
        (("--image-size", "2"), "2 is 2 bytes. Did you mean 2G?"),
        (("--format", "qcow"), "Did you mean qcow2?"),
        (("--chek", "--ouput-dir=x"), "Did you mean --check and --output-dir?"),
        (("--format", "raw,vhd-dynmic"), "Did you mean vhd-dynamic?"),
    ],
)
def test_near_values_are_in_the_hint(place: Place, flags: tuple[str, str], move: str) -> None:
    assert place.refused("x", *flags)[1] == move


def test_near_names_are_in_the_hint(place: Place) -> None:
    assert place.refused("debian-12")[1] == "Did you mean Debian-12? 'image-factory --list' lists them all."


# What is built all the same, but not as it was meant; each with the line that says so.
DOUBTS = {
    "misspelt key": ("pakages = nginx", "[y] pakages: nothing uses this key. Did you mean packages?"),
    "singular": ("package = nginx", "[y] package: nothing uses this key. Did you mean packages?"),
    "misspelt setting": ("image_sise = 3G", "[y] image-sise: nothing uses this key. Did you mean image-size?"),
    "key beside an own answer file": (
        "preseed = answer.cfg\npackages = nginx",
        "[y] packages: nothing uses this key, as answer.cfg is no template.",
    ),
    "processors": ("cores = 200", "[y] cores: 200 are more than the "),
    "memory": ("ram = 900T", "[y] ram: 900.0 TiB is more than the "),
    "kernel of another architecture": (
        "linux = a/installer-arm64/linux\narch = amd64",
        "[y] linux: a/installer-arm64/linux is of aarch64 by its name, but arch is x86_64.",
    ),
    "kernel of an architecture that is not supported": (
        "linux = a/installer-riscv64/linux\narch = amd64",
        "[y] linux: a/installer-riscv64/linux is of riscv64 by its name, but arch is x86_64. Name that of x86_64.",
    ),
    "system of 64 bits": (
        "linux = a/installer-amd64/linux\narch = i386",
        "[y] linux: a/installer-amd64/linux is of 64 bits by its name, but arch is i386.",
    ),
    "console of another architecture": (
        "append = console=ttyAMA0\narch = amd64",
        "[y] append: x86_64 has no console ttyAMA0. Write console=ttyS0.",
    ),
    "sealing without it": ("seal_skip = logs\nseal = no", "[y] seal-skip does nothing without seal = yes."),
}


@pytest.mark.parametrize(("text", "warning"), DOUBTS.values(), ids=DOUBTS)
def test_doubts(place: Place, text: str, warning: str) -> None:
    shipped = (REPOSITORY / "data/image-factory.conf").read_text()
    own = f"[y]\nbased_on = Debian-13-server\nimage_size = 2G\nlinux = linux\ninitrd = initrd\n{text}\n"
    own = own.replace("linux = linux\n", "") if "\nlinux = a/" in own else own
    (place.path / "own.conf").write_text(shipped + own)
    for name in ("amd64", "arm64", "riscv64"):
        (place.path / f"a/installer-{name}").mkdir(parents=True)
        (place.path / f"a/installer-{name}/linux").touch()
    done = place.run("--check", "y")
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" WARNING: ")[2] for line in done.stderr.splitlines() if " WARNING: " in line]
    count = "a warning" if len(lines) == 1 else f"{len(lines)} warnings"
    assert done.stdout == f"y can be built, with {count}.\n"
    assert [line for line in lines if line.startswith(warning)]


def test_several_with_doubts(place: Place) -> None:
    with (place.path / "own.conf").open("a") as file:
        file.write("[y]\nlinux = linux\ninitrd = initrd\ncolour = red\nlog_filename = a\n")
    done = place.run("--check", "y", "Debian-12", "--image-size", "1M")
    assert done.stdout == "y can be built, with 2 warnings.\nDebian-12 can be built.\n", done.stderr
    assert "[y] log-filename does nothing without log-file = yes." in done.stderr
    # A flag is one of all images.
    done = place.run("--check", "x", "--image-size", "1M", "--log-filename", "a")
    assert "WARNING: --log-filename does nothing without log-file = yes." in done.stderr


def test_keys(place: Place) -> None:
    existing = place.files()
    done = place.run("--keys", "x", "--image-size", "3G")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("[x]\n\n# Variables of its values:\n")
    sentence = "size of the disk (of an existing image: its own), or fit, as small as a tree lets it"
    assert f"\n# {sentence}\n# Accepted: a size" in done.stdout
    assert "\nimage-size = 3G\n" in done.stdout
    assert place.files() == existing


FILES: dict[str, tuple[bytes, str]] = {
    "syntax": (b"[x]\nlinux\n", "own.conf (named by IMAGE_FACTORY_CONFIG), line 2 is neither a [section]"),
    "no section": (b"linux = /l\n", "line 1 comes before any [section]."),
    "duplicate key": (b"[x]\nimage_size = 1\nimage-size = 2\n", "line 3: [x] has 'image-size' twice."),
    "duplicate section": (b"[x]\n[x]\n", "line 2: section [x] is there twice."),
    "not UTF-8": (b"[x]\nappend = \xe9\n", "line 2: byte 0xe9 is not UTF-8."),
}


@pytest.mark.parametrize("row", FILES)
@pytest.mark.parametrize("arguments", [("x",), ("--list",), ("x", "--check")])
def test_bad_file_is_refused(place: Place, row: str, arguments: tuple[str, ...]) -> None:
    content, named = FILES[row]
    (place.path / "own.conf").write_bytes(content)
    assert named in place.refused(*arguments)[0]


def test_missing_configuration_file(place: Place) -> None:
    (place.path / "own.conf").unlink()
    assert place.refused("x")[0].endswith("(named by IMAGE_FACTORY_CONFIG): No such file or directory.")


# What the machine lacks.

PACKAGES = {
    "qemu-img": "qemu-utils",
    "virsh": "libvirt-clients",
    "virt-install": "virtinst",
    "qemu-system-x86_64": "qemu-system-x86",
    "cpio": "cpio",
    "rsync": "rsync",
    "xorriso": "xorriso",
    "fallocate": "util-linux",
}


@pytest.mark.parametrize("missing", [*([name] for name in PACKAGES), list(PACKAGES)], ids="+".join)
def test_missing_program_is_named_with_its_package(place: Place, missing: list[str]) -> None:
    (place.path / "own.conf").write_text(
        "[x]\nlinux = linux\ninitrd = initrd\nimage-size = 1M\npreseed = answer.cfg\nupload_destinations = up\n"
        "installer_image = linux\n[up]\nupload_type = rsync\nupload_target = /srv\n"
    )
    programs = place.path / "bin"
    programs.mkdir()
    for name in PACKAGES.keys() - set(missing):
        found = shutil.which(name)
        assert found
        (programs / name).symlink_to(found)
    place.environment["PATH"] = str(programs)
    error, hint = place.refused("x")
    # They are named in the order in which a build needs them.
    assert error.startswith("Missing programs: ")
    assert sorted(error.removeprefix("Missing programs: ").removesuffix(".").split(", ")) == sorted(missing)
    assert hint == f"Install them: apt-get install {' '.join(sorted(PACKAGES[name] for name in missing))}"


@pytest.fixture
def small(place: Place) -> Iterator[Path]:
    """A filesystem of 4 MiB."""
    path = place.path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_not_enough_space(place: Place, small: Path) -> None:
    error, hint = place.refused("x", "-o", "small/images", "--image-size", "5M")
    assert error == f"{small}/images has 4.0 MiB free, the disk may grow to 5.0 MiB."
    assert "--output-dir" in hint
    assert place.run("x", "--check", "-o", "small/images", "--image-size", "3M").returncode == 0


def test_directory_that_qemu_can_not_enter(place: Place) -> None:
    (place.path / "closed").mkdir(mode=0o700)
    error, _ = place.refused("x", "--image-size", "1M", "-o", "closed/images")
    assert error.endswith(f", can't enter {place.path}/closed.")


WITHOUT_LIBVIRT = 'mount -t tmpfs tmpfs /run/libvirt && exec "$@"'


def test_libvirt_not_reachable(place: Place) -> None:
    before = ("unshare", "--mount", "sh", "-c", WITHOUT_LIBVIRT, "sh")
    error, hint = place.refused("x", "--image-size", "1M", before=before)
    assert error.startswith("libvirt is not reachable at qemu:///system: ")
    assert "No such file or directory" in error
    assert hint == "Start it: systemctl start libvirtd (package libvirt-daemon-system)."


@contextmanager
def bound(place: Place, *before: str, option: str = "--no-allow-other") -> Iterator[Path]:
    """Have a filesystem of FUSE at a directory in *place*, which a command after *before* has mounted."""
    directories = place.path / "behind", place.path / "fuse"
    for directory in directories:
        subprocess.run([*before, "mkdir", directory], check=True)
    subprocess.run([*before, "bindfs", option, *directories], check=True)
    try:
        yield directories[1]
    finally:
        subprocess.run([*before, "fusermount3", "-u", directories[1]], check=True)


def test_fuse_of_root_s(place: Place) -> None:
    with bound(place) as directory:
        error, hint = place.refused("x", "--check", "--image-size", "1M", "-o", "fuse/new")
        assert error == (
            f"QEMU, which libvirt runs as user libvirt-qemu, can't enter {directory}: it is fuse without allow_other."
        )
        assert "--output-dir" in hint


def test_fuse_that_root_lets_all_into(place: Place) -> None:
    """The helper mounts images there: root answers for it."""
    with bound(place, option="--resolve-symlinks") as directory:
        done = place.run("x", "--check", "--image-size", "1M", "-o", str(directory))
        assert (done.returncode, done.stdout) == (0, "x can be built.\n"), done.stderr
        assert "mount-via = loop is chosen: root may" in done.stderr


def test_fuse_of_an_ordinary_user_s(ordinary: Place) -> None:
    with bound(ordinary, "/usr/sbin/runuser", "-u", "nobody", "--") as directory:
        why = f"{directory} is on fuse, which a user has mounted: the helper mounts no image from there."
        # Root can't even look into it, so the files are not compared.
        done = ordinary.run("loop", "--check", "--image-size", "1M", "-o", "fuse")
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            f"image-factory: error: {why}",
            "image-factory: hint: Build in another directory with --output-dir, or set mount-via to guestfs or auto.",
        ]
        done = ordinary.run("x", "--check", "--image-size", "1M", "-o", "fuse/new")
        assert f"mount-via = guestfs is chosen: {directory}/new is on fuse, which a user has mounted" in done.stderr


def test_root_builds_where_another_user_can_exchange_its_files(place: Place) -> None:
    done = place.run("x", "--check", "--image-size", "1M", "-o", "images")
    assert (done.returncode, "others can exchange" in done.stderr) == (0, False), done.stderr
    (place.path / "images").mkdir()
    shutil.chown(place.path / "images", NOBODY)
    done = place.run("x", "--check", "--image-size", "1M", "-o", "images/new")
    assert done.returncode == 0
    assert f"others can exchange what it works on: {place.path}/images belongs to nobody.\n" in done.stderr


# An ordinary user.


@pytest.fixture
def ordinary() -> Iterator[Place]:
    """A place of user nobody's, with a copy of the program, as the checkout may not be readable for others."""
    directory = Path(tempfile.mkdtemp(prefix="image-factory-test.", dir="/var/tmp"))
    try:
        directory.chmod(0o755)
        for name in ("image_factory", "data"):
            shutil.copytree(REPOSITORY / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("image-factory", "image-factory-sudo-helper"):
            shutil.copy(REPOSITORY / name, directory)
        subprocess.run(["chmod", "-R", "u=rwX,go=rX", directory], check=True)
        home = directory / "home"
        home.mkdir()
        shutil.chown(home, NOBODY)
        fill(home)
        yield _Ordinary(home)
    finally:
        shutil.rmtree(directory)


class _Ordinary(Place):
    def argv(self, *arguments: str) -> list[str]:
        program = self.path.parent / "image-factory"
        # runuser sets HOME to the one of the list of users.
        user = ["/usr/sbin/runuser", "-u", "nobody", "--", "env", f"HOME={self.path}"]
        return [*user, "/usr/bin/python3", str(program), *arguments]


@pytest.mark.parametrize(
    "flags", [("-o", "closed"), ("-o", "closed/new"), ("-c", "closed/cache"), ("-o", "/")], ids=str
)
def test_directory_not_writable(ordinary: Place, flags: tuple[str, str]) -> None:
    (ordinary.path / "closed").mkdir()
    error, hint = ordinary.refused("remote", "--image-size", "1M", *flags)
    key = "output-dir" if flags[0] == "-o" else "cache-dir"
    where = ordinary.path / "closed" if flags[1] != "/" else "/"
    assert error == f"[remote] {key}: {where} is not writable."
    assert hint == "Give another with a flag; see --help."


def test_cache_that_is_not_needed_need_not_be_writable(ordinary: Place) -> None:
    (ordinary.path / "closed").mkdir()
    done = ordinary.run("x", "--image-size", "1M", "-c", "closed/cache", "--check")
    assert "closed" not in done.stderr


def test_log_file_not_writable(ordinary: Place) -> None:
    (ordinary.path / "closed").mkdir()
    error, _ = ordinary.refused("x", "--image-size", "1M", "--log-file", "--log-filename", "closed/x.log")
    assert error == f"[x] log-filename: {ordinary.path}/closed is not writable."


@pytest.mark.parametrize(("image", "key", "name"), [("x", "linux", "linux"), ("no-answer", "preseed", "absent.cfg")])
def test_file_not_readable(ordinary: Place, image: str, key: str, name: str) -> None:
    (ordinary.path / name).touch()
    (ordinary.path / name).chmod(0)
    error, _ = ordinary.refused(image, "--image-size", "1M")
    assert error == f"[{image}] {key}: {name} can't be read: Permission denied."


def test_helper_that_can_not_be_run_as_root(ordinary: Place) -> None:
    error, hint = ordinary.refused("loop", "--image-size", "1M")
    assert error.startswith("image-factory-sudo-helper can't be run as root: ")
    helper = ordinary.path.parent / "image-factory-sudo-helper"
    assert hint == f"Allow it with a line in /etc/sudoers.d: nobody ALL = NOPASSWD: {helper}"


def test_auto_takes_guestfs_where_the_helper_can_not_be_run_as_root(ordinary: Place) -> None:
    """The log says which and why, and the commands are those of guestfish."""
    done = ordinary.run("x", "--image-size", "1M", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "INFO: mount-via = guestfs is chosen: image-factory-sudo-helper can't be run as root: " in done.stderr
    assert re.search(r"[^.]\. Allow it with a line in /etc/sudoers.d: ", done.stderr)
    assert "\nguestfish\n" in done.stdout
    assert "sudo" not in done.stdout


def test_auto_takes_loop_for_root(place: Place) -> None:
    done = place.run("x", "--image-size", "1M", "--dry-run")
    assert "INFO: mount-via = loop is chosen: " in done.stderr
    assert "image-factory-sudo-helper mount-image " in done.stdout
    assert "guestfish" not in place.run("loop", "--image-size", "1M", "--dry-run").stdout


def test_dry_run_with_guestfs(place: Place) -> None:
    disk = place.path / ".image-factory-guestfs/disk.raw"
    steps = place.run("guestfs", "--image-size", "1M", "--installer-logs", "--dry-run").stdout
    begin, end = steps.index("# Reading"), steps.index("# Naming")
    assert (
        steps[begin:end]
        == f"""\
# Reading the partition table
sfdisk --json {disk}
blkid -p -o export -O OFFSET -S SIZE {disk}
# Mounting the filesystems
guestfish
#   add {disk} format:raw discard:besteffort cachemode:unsafe
#   run
#   mkmountpoint /partition-N
#   mount-options noatime DEVICE /partition-N
# Showing installer logs
#   pread /partition-N/root/install.log*
#   pread /partition-N/var/log/anaconda*
#   pread /partition-N/var/log/installer/syslog
#   pread /partition-N/var/log/installer/status
#   pread /partition-N/var/log/YaST2/y2log
#   pread /partition-N/var/adm/autoinstall/logs
# Removing installer logs
#   rm-rf /partition-N/root/anaconda-ks.cfg
#   rm-rf /partition-N/root/original-ks.cfg
#   rm-rf /partition-N/root/install.log*
#   rm-rf /partition-N/var/log/anaconda*
#   rm-rf /partition-N/var/log/installer
#   rm-rf /partition-N/var/log/YaST2
#   rm-rf /partition-N/var/lib/YaST2
#   rm-rf /partition-N/var/adm/autoinstall
#   rm-rf /partition-N/var/log/agama-installation
# Freeing unused blocks
fallocate --punch-hole --length 4096 {disk.parent}/appliance-file
#   sync
#   -fstrim /partition-N
# Zeroing logical volumes
#   zerofree VOLUME
#   mkswap VOLUME
# Unmounting
#   umount-all
#   shutdown
# Zeroing unused blocks
zerofree '{disk}?offset=OFFSET'
# Zeroing swap space
fallocate --punch-hole --offset OFFSET --length SIZE {disk}
"""
    )


# What works.


def test_version(place: Place) -> None:
    done = place.run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"image-factory {__version__}\n", "")


def test_help_names_each_option_of_the_manual(place: Place) -> None:
    done = place.run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    options = """-h --version -c --cache-dir -f --format --image-size --mac --installer-logs --no-installer-logs
        --log-file --no-log-file --log-filename -o --output-dir --list --check --dry-run --cleanup IMAGE --debug"""
    assert set(options.split()) <= set(re.findall(r"(?<![\w-])(?:-{1,2}[a-z-]+|IMAGE)", done.stdout))
    assert place.run("-h").stdout == done.stdout


def test_list(place: Place) -> None:
    (place.path / "own.conf").write_text("[b]\nlinux = /l\n[up]\nupload_type = rsync\n[a]\ninstaller_image = /i\n")
    done = place.run("--list")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()] == [
        [name, "-", "-", default_arch(), default_firmware(default_arch())] for name in "ba"
    ]


def test_list_in_columns(place: Place) -> None:
    """One bad image does not hide the others, and what is in a file does not get on a terminal as it is."""
    (place.path / "own.conf").write_text(
        "[DEFAULT]\ninstaller_image = /i\narch = amd64\n"
        "[CentOS-Stream-10]\ndistribution = CentOS Stream\nrelease = 10\nfirmware = hybrid\n"
        "[bad]\ndistribution = ${absent}\nrelease = a\x1b[31m\n   b\narch = vax\npreseed = /a\nyast = /b\nram = x\n"
    )
    done = place.run("--list")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "CentOS-Stream-10  CentOS Stream  10   x86_64  hybrid\nbad               -              a b  -       -\n"
    )


def test_list_in_json(place: Place) -> None:
    """One bad image does not hide the others; all keeps to the schema."""
    (place.path / "own.conf").write_text(
        "[DEFAULT]\ninstaller_image = /i\narch = amd64\n"
        "[CentOS-Stream-10]\ndistribution = CentOS Stream\nrelease = 10\nfirmware = hybrid\nformat = raw, qcow2\n"
        "ram = 2G\ncores = 2\ntest-boot = yes\nvirt-type = kvm\ninstall-timeout = none\n"
        "[child]\nbased-on = CentOS-Stream-10\nrelease = a\x1b[31m\u00e9\nimage-size = 1G\n"
        "[bad]\ndistribution = ${absent}\narch = vax\nram = x\nformat = iso\npreseed = /a\nyast = /b\n"
        "[up]\nupload_type = rsync\n"
    )
    done = place.run("--list-json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    jsonschema.Draft202012Validator(LIST_SCHEMA).validate(found)
    stream = {
        "name": "CentOS-Stream-10",
        "distribution": "CentOS Stream",
        "release": "10",
        "arch": "x86_64",
        "firmware": "hybrid",
        "format": ["raw", "qcow2"],
        "virt_type": "kvm",
        "cores": 2,
        "ram": 2 << 30,
        "image_size": 2 << 30,
        "install_timeout": None,
        "test_boot": True,
        "based_on": None,
    }
    child = {"name": "child", "release": "a\x1b[31m\u00e9", "image_size": 1 << 30, "based_on": "CentOS-Stream-10"}
    unknown = dict.fromkeys(("distribution", "release", "arch", "firmware", "ram", "based_on"))
    usual = {"virt_type": "auto", "cores": 1, "image_size": 2 << 30, "install_timeout": None, "test_boot": False}
    assert found == [stream, stream | child, {"name": "bad", "format": [], **unknown, **usual}]
    # No terminal obeys it.
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout


def test_list_in_json_of_the_shipped_images(place: Place) -> None:
    (place.path / "own.conf").unlink()
    place.environment["IMAGE_FACTORY_CONFIG"] = ""
    found = json.loads(place.run("--list-json").stdout)
    jsonschema.Draft202012Validator(LIST_SCHEMA).validate(found)
    names = [line.split()[0] for line in place.run("--list").stdout.splitlines()]
    assert [image["name"] for image in found] == names
    assert all(image["arch"] and image["firmware"] and image["format"] for image in found)


def test_schema_of_the_list_describes_all_and_no_more() -> None:
    jsonschema.Draft202012Validator.check_schema(LIST_SCHEMA)
    described = LIST_SCHEMA["items"]
    assert list(described["properties"]) == described["required"]
    assert all(text["description"].endswith(".") for text in described["properties"].values())


def test_list_of_no_images(place: Place) -> None:
    (place.path / "own.conf").write_text("")
    done = place.run("--list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_list_of_the_shipped_images(place: Place) -> None:
    (place.path / "own.conf").unlink()
    place.environment["IMAGE_FACTORY_CONFIG"] = ""
    done = place.run("--list")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["Debian-13-server"] == ["Debian", "13", "x86_64", "bios"]
    assert rows["Rocky-10-minimal"] == ["Rocky", "Linux", "10", "x86_64", "bios"]
    assert rows["openSUSE-Tumbleweed-server"] == ["openSUSE", "Tumbleweed", "-", "x86_64", "bios"]
    assert not [row for row in rows.values() if row[0] == "-"]


def test_check(place: Place) -> None:
    existing = place.files()
    done = place.run("x", "--check", "--image-size", "1M")
    assert (done.returncode, done.stdout) == (0, "x can be built.\n")
    assert "error" not in done.stderr
    assert place.files() == existing


def test_check_of_several(place: Place) -> None:
    done = place.run("x", "--check", "Debian-12")
    assert (done.returncode, done.stdout) == (0, "x can be built.\nDebian-12 can be built.\n")


def test_dry_run_of_several(place: Place) -> None:
    done = place.run("x", "Debian-12", "--dry-run", "--image-size", "1M")
    assert done.returncode == 0, done.stderr
    first, _, second = done.stdout.partition("# Debian-12:\n")
    assert first == "# x:\n" + place.run("x", "--dry-run", "--image-size", "1M").stdout
    assert second == place.run("Debian-12", "--dry-run", "--image-size", "1M").stdout


@pytest.mark.parametrize("record", ["-", "records", "x"])
def test_records_of_several_go_into_a_directory(place: Place, record: str) -> None:
    error, hint = place.refused("x", "Debian-12", "--json", record)
    assert error == f"--json: with several images it names a directory, which {record} is not."
    assert hint == "The record of each is IMAGE.json there."


def test_older_records_of_several_are_gone_when_they_are_refused(place: Place) -> None:
    (place.path / "records").mkdir()
    for name in ("x", "half", "other"):
        (place.path / f"records/{name}.json").write_text("{}")
    done = place.run("x", "half", "--json", "records", "--image-size", "1M")
    assert done.returncode == 2
    assert [path.name for path in (place.path / "records").iterdir()] == ["other.json"]


def test_image_from_the_environment(place: Place) -> None:
    place.environment["IMAGE"] = "Debian-12"
    assert place.run("--check").stdout == "Debian-12 can be built.\n"
    assert place.run("--check", "x", "--image-size", "1M").stdout == "x can be built.\n"
    place.environment["IMAGE"] = "zzz"
    assert place.refused()[0].startswith("No image 'zzz' is configured")
    place.environment["IMAGE"] = ""
    assert place.refused()[0] == "No image is named."


def test_flags_win_over_the_file_in_both_directions(place: Place) -> None:
    with (place.path / "own.conf").open("a") as file:
        file.write("[logs]\nlinux = linux\ninitrd = initrd\nimage-size = 1M\ninstaller-logs = yes\nformat = qcow2\n")
    assert "# Showing installer logs" in place.run("logs", "--dry-run").stdout
    shown = place.run("logs", "--dry-run", "--no-installer-logs", "-f", "raw", "--mac", "52:54:00:00:00:01").stdout
    assert "# Showing installer logs" not in shown
    assert "qcow2" not in shown
    assert ".raw\n" in shown
    assert ",mac=52:54:00:00:00:01 " in shown


def test_what_is_set_wins_over_the_file(place: Place) -> None:
    with (place.path / "own.conf").open("a") as file:
        file.write("[given]\nlinux = ${where}\nwhere = absent\ninitrd = initrd\nimage-size = 1M\ncores@x86_64 = 3\n")
    given = ("--set", "where=linux", "--set", "image_size=1G", "--set", "image-size=2M", "--set", "cores=5")
    shown = place.run("given", "--dry-run", *given, "--set", "mac=52:54:00:00:00:01").stdout
    assert "--vcpus 5" in shown
    assert ",mac=52:54:00:00:00:01 " in shown
    # It is taken as it is.
    assert "\nlinux = $${mirror}\n" in place.run("given", "--keys", *given, "--set", "linux=${mirror}").stdout
    assert re.fullmatch("given can .*\nx can .*\n", place.run("given", "x", "--check", *given).stdout)
    assert "# Flags\nwhere = linux\nimage-size = 2M\ncores = 5\n" in place.run("given", "--show-config", *given).stdout
    assert "[given] rma" in place.run("given", "--check", *given, "--set", "rma=1G").stderr


def test_debug_shows_the_traceback(place: Place) -> None:
    done = place.run("zzz", "--debug")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any("image_factory/configuration/files.py" in line for line in lines)
    assert lines[-2].startswith("image-factory: error: No image 'zzz'")


def test_path_that_is_no_text(place: Place) -> None:
    error, _ = place.refused("x", "--dry-run", "--image-size", "1M", "-o", os.fsdecode(b"caf\xe9"))
    assert error == f"[x] output-dir: virt-install can't use {place.path}/caf\\udce9."
    error, _ = place.refused("x", "--check", "--image-size", "1M", "-o", "a\nb")
    assert error == f"[x] output-dir: virt-install can't use {place.path}/a b."


@pytest.mark.parametrize("arguments", ["--list", "--list-json", "--help", "--version"])
def test_reader_that_has_gone(place: Place, arguments: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        done = subprocess.run(
            place.argv(arguments), env=place.variables(), stdout=stdout, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_error_without_a_reader(place: Place) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stderr:
        assert subprocess.run(place.argv("zzz", "--debug"), env=place.variables(), stderr=stderr).returncode == 2


UNWRITTEN = [
    ("--list", "The list"),
    ("--list-json", "The list"),
    ("--help", "The output"),
    ("--version", "The output"),
    ("shown --image-size 1M --show-answers", "The answer file"),
    ("x --image-size 1M --check", "The output"),
    ("x --image-size 1M --dry-run", "The output"),
    ("x Debian-12 --image-size 1M --check", "The output"),
    ("x Debian-12 --image-size 1M --dry-run", "The output"),
]


@pytest.mark.parametrize(
    ("redirection", "reason"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")]
)
@pytest.mark.parametrize(("arguments", "what"), UNWRITTEN)
def test_stdout_that_takes_nothing(place: Place, arguments: str, what: str, redirection: str, reason: str) -> None:
    (place.path / "shown.cfg").write_text("d-i x/y string z\n")
    with (place.path / "own.conf").open("a") as file:
        file.write("[shown]\nlinux = linux\ninitrd = initrd\npreseed = shown.cfg\n")
    done = place.run(before=("sh", "-c", f'exec "$@" $0 --quiet {redirection}', arguments))
    assert done.returncode == 1
    assert done.stderr == f"image-factory: error: {what} can't be written to stdout: {reason}.\n"


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "| true"])
def test_clean_up_goes_on_where_it_can_t_say_what_it_removes(place: Place, redirection: str) -> None:
    for name in ("a", "b", "c"):
        (place.path / f".image-factory-{name}").mkdir(mode=0o700)
    place.run("--cleanup", "--quiet", before=("bash", "-c", f'"$0" "$@" {redirection}'))
    assert list(place.path.glob(".image-factory-*")) == []


def test_record_of_a_build_on_a_closed_stdout(place: Place) -> None:
    """It is known before there is a build."""
    done = place.run("x", "--image-size", "1M", "--json", "-", before=("sh", "-c", 'exec "$0" "$@" >&-'))
    assert (done.returncode, done.stderr) == (2, "image-factory: error: --json -: stdout is closed.\n")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_in_the_checks(place: Place, signum: signal.Signals, status: int) -> None:
    programs = place.path / "bin"
    programs.mkdir()
    # A libvirt that never answers.
    (programs / "virsh").write_text("#!/bin/sh\necho there >&2\nexec sleep 600\n")
    (programs / "virsh").chmod(0o755)
    place.environment["PATH"] = f"{programs}:/usr/bin:/bin"
    with subprocess.Popen(
        place.argv("x", "--check", "--image-size", "1M"),
        env=place.variables(),
        cwd=place.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.endswith("virsh: there\n"):
                break
        process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stdout) == (status, "")
    assert stderr == f"image-factory: error: Stopped by {signum.name}.\n"


# Builds in Jenkins' console, which is no terminal.  Programs on PATH stand for libvirt, and install nothing.

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ image-factory \[\d+\] (?:INFO|WARNING|ERROR): .+")
VIRT_INSTALL = """#!/bin/sh
printf 'Starting install...\\r\\033[2KRetrieving 10%%\\rRetrieving 20%%\\n\\007bell\\n'
case $* in
*image-factory-hangs-*) exec sleep 600 ;;
esac
echo 'ERROR    There is no \\033[31msuch thing'
exit 1
"""


@pytest.fixture
def job(place: Place) -> Place:
    programs = place.path / "bin"
    programs.mkdir()
    (programs / "virsh").write_text("#!/bin/sh\n")
    (programs / "virt-install").write_text(VIRT_INSTALL)
    for program in programs.iterdir():
        program.chmod(0o755)
    place.environment["PATH"] = f"{programs}:/usr/bin:/bin"
    with (place.path / "own.conf").open("a") as file:
        for name in ("a", "b", "hangs"):
            file.write(f"[{name}]\nlinux = linux\ninitrd = initrd\nimage-size = 1M\nvirt-type = qemu\n")
    return place


def console(job: Place, *arguments: str) -> tuple[int, list[str]]:
    """Run with both outputs in one pipe; return the status, and the lines, which have no control characters."""
    done = subprocess.run(
        job.argv(*arguments),
        env=job.variables(),
        cwd=job.path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
    )
    text = done.stdout.decode()
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text) is None
    return done.returncode, text.splitlines()


REASON = "virt-install failed with status 1: ERROR    There is no such thing"


def test_console_of_a_job(job: Place) -> None:
    """A line for each step, in full; the reason of the failure and what to do are the last of all."""
    status, lines = console(job, "a", "--max-parallel", "none")
    assert status == 1
    assert lines[-2] == f"image-factory: error: {REASON}"
    assert lines[-1].startswith("image-factory: hint: The command was: virt-install ")
    assert [line for line in lines[:-2] if not LINE.fullmatch(line)] == []
    messages = [line.partition("INFO: ")[2] for line in lines]
    assert {"Creating the disk ...", "Caching the installer ...", "Installing ...", "virt-install: ?bell"} <= {
        *messages
    }
    assert "virt-install: Retrieving 20%" in messages


def test_console_of_a_job_with_several_images(job: Place) -> None:
    (job.path / "records").mkdir()
    status, lines = console(job, "a", "b", "--json", "records", "--max-parallel", "none")
    assert status == 1
    assert lines[-1] == f"image-factory: error: 2 of 2 images failed: a: {REASON}; b: {REASON}."
    summary = lines.index("Images:")
    ends = [re.sub(r"^ +[0-9.]+  ", "", line) for line in lines[summary + 1 : -1]]
    assert ends[0] == f"a: failed: {REASON}"
    assert ends[1].strip().startswith("The command was: virt-install ")
    assert ends[2] == f"b: failed: {REASON}"
    assert ends[4:] == ["in all"]
    for image in "ab":
        own = [line.removeprefix(f"{image}: ") for line in lines[:summary] if line.startswith(f"{image}: ")]
        assert own[-2] == f"image-factory: error: {REASON}"
        assert [line for line in own[:-2] if not LINE.fullmatch(line)] == []
        record = json.loads((job.path / f"records/{image}.json").read_text())
        assert (record["image"], record["failure"]["message"]) == (image, REASON)
    assert [line for line in lines[:summary] if line[:3] not in ("a: ", "b: ")] == []
    # The checks that the command makes of all before are not shown twice.
    assert sum("mount-via = loop is chosen" in line for line in lines) == 2
    assert not list(job.path.glob(".image-factory*"))


def test_quiet_job_with_several_images(job: Place) -> None:
    status, lines = console(job, "a", "b", "--quiet", "--max-parallel", "none")
    assert status == 1
    assert not any(" INFO: " in line for line in lines)
    assert lines[-1].startswith("image-factory: error: 2 of 2 images failed: ")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_with_several_images(job: Place, signum: signal.Signals, status: int) -> None:
    with subprocess.Popen(
        job.argv("a", "hangs", "b", "--max-parallel", "none"),
        env=job.variables(),
        cwd=job.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("hangs: ") and "virt-install: ?bell" in line:
                break
        process.send_signal(signum)
        lines = process.communicate(timeout=PATIENCE)[0].splitlines()
    assert process.returncode == status
    assert lines[-1] == f"image-factory: error: Stopped by {signum.name}."
    ends = [re.sub(r"^ +[0-9. ]+  ", "", line) for line in lines[lines.index("Images:") + 1 : -1]]
    assert f"hangs: failed: Stopped by {signum.name}." in ends
    assert any(end.strip() == "b: not begun" for end in ends)
    assert not list(job.path.glob(".image-factory*"))


@pytest.mark.parametrize("images", ["a", "ab"])
def test_builds_whose_reader_has_gone(job: Place, images: str) -> None:
    """They go on."""
    (job.path / "records").mkdir()
    record = "records" if images[1:] else "records/a.json"
    with subprocess.Popen(
        job.argv(*images, "--json", record, "--max-parallel", "none"),
        env=job.variables(),
        cwd=job.path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) == 1
    for image in images:
        assert json.loads((job.path / f"records/{image}.json").read_text())["failure"]["message"] == REASON


@pytest.fixture
def installation() -> Iterator[socket.socket]:
    """What an installation is to others on this machine, of a user who is not in the list of users."""
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(f"\0image-factory/installation/1024/1/4000000000/{secrets.token_hex(4)}".encode())
        yield held


def test_build_that_waits_for_its_turn(job: Place, installation: socket.socket) -> None:
    """It says so, has no machine and no space, and goes on when the other has ended."""
    with subprocess.Popen(
        job.argv("a", "--max-parallel", "1"),
        env=job.variables(),
        cwd=job.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "max-parallel = 1." in line:
                break
        assert lines[-2].endswith("INFO: Waiting for other installations ...\n")
        assert "user 4000000000" in lines[-1]
        work = job.path / ".image-factory-a"
        assert not (work / "vm-name").exists()
        assert (work / "disk.raw").stat().st_blocks * 512 <= 4096
        installation.close()
        rest = process.communicate(timeout=PATIENCE)[0]
    assert "INFO: Waiting for other installations: done in " in rest
    assert f"image-factory: error: {REASON}\n" in rest


def test_checks_do_not_wait(job: Place, installation: socket.socket) -> None:
    assert installation
    for mode in ("--check", "--dry-run"):
        done = job.run("a", mode, "--max-parallel", "1")
        assert (done.returncode, "Waiting" in done.stdout + done.stderr) == (0, False)
