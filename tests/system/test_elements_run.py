"""Elements that run: a system of a few of this machine's programs, what each phase sees, and what goes wrong."""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ..conftest import REPOSITORY, User, run, wait_for

CONFIGURATION = """\
[x]
source = elements
elements = system {elements}
elements-path = {place}/elements
skip-base = yes
layout = filesystem
image-size = 256M
format = tar
cache-dir = {place}/cache
output-dir = {place}/out
mount-via = loop
DIB_NOTE = of the section
DIB_DEV_USER_PASSWORD = secret-471105
element-environment = OTHER='a b'
{keys}
"""
# A tree in which bash runs.
SYSTEM = """\
set -eu
mkdir -p proc sys dev run tmp etc root usr/bin usr/sbin usr/lib usr/lib64 var/log var/tmp usr/local/bin
for name in bin sbin lib lib64; do ln -s usr/$name $name; done
for program in bash basename dirname cat sort mkdir id env touch ls mount umount rm sleep head sh chmod ln base64 \
    timeout; do
    path=$(readlink -f "$(command -v $program)")
    cp "$path" usr/bin/$program
    for library in $(ldd "$path" | grep -o '/[^ ]*'); do
        cp -Ln --parents "$library" .
    done
done
echo ID=small >etc/os-release
echo log >var/log/some.log
echo log >root/install.log
echo of the system >etc/resolv.conf
echo hidden >.dotfile
"""
# What a script of a phase sees.
LOOK = """\
set -u
out={out}/$(basename "$(dirname "$0")")
mkdir -p "$out"
env -0 | sort -z >"$out/environment"
declare -F >"$out/functions"
echo "$PWD" "$(id -u)" >"$out/place"
while read -r _ _ _ _ path options _; do echo "$path $options"; done </proc/self/mountinfo >"$out/mounts"
ls -A "$(dirname "$0")/.." >"$out/hooks"
ls -A "${{TMP_MOUNT_PATH:-/}}" >"$out/tree" 2>&1 || :
"""
PHASES = ("root", "extra-data", "pre-install", "install", "post-install", "post-root", "block-device", "pre-finalise")
ON_MACHINE = ("root", "extra-data", "post-root", "block-device", "pre-finalise", "cleanup")
INSIDE = ("pre-install", "install", "post-install", "finalise")


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


class Place:
    """A directory with elements, a cache and an output directory."""

    def __init__(self, path: Path, system: Path) -> None:
        self.path, self.out, self.cache = path, path / "out", path / "cache"
        self.out.mkdir()
        own = {"IMAGE_FACTORY_CONFIG": str(path / "conf"), "PYTHONPATH": "/of/the/caller", "OWN": "of the caller"}
        self.environment = {"PATH": os.environ["PATH"], "HOME": "/home/of-the-caller", **own}
        run("cp", "--archive", system, path / "tree")
        # Scripts begin where the program was called.
        script(
            path / "elements/system/root.d/10-system", 'sudo cp --archive --no-preserve=ownership tree/. "$TARGET_ROOT"'
        )
        (path / "elements/system/element-provides").write_text("operating-system\n", encoding="utf-8")

    def element(self, name: str, **scripts: str) -> None:
        """Make the element *name* with a script for each phase: ``install="lines"``."""
        for phase, text in scripts.items():
            script(self.path / f"elements/{name}/{phase.replace('_', '-')}.d/50-{name}", text)

    def command(self, elements: str, *arguments: str, keys: str = "") -> list[str]:
        text = CONFIGURATION.format(elements=elements, place=self.path, keys=keys)
        (self.path / "conf").write_text(text, encoding="utf-8")
        return [sys.executable, str(REPOSITORY / "image-factory"), *arguments, "x"]

    def build(self, elements: str, *arguments: str, keys: str = "", status: int = 0) -> str:
        argv = self.command(elements, *arguments, keys=keys)
        done = run(*argv, env=self.environment, cwd=self.path, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def fails(self, elements: str, keys: str = "") -> str:
        """Return what a build of *elements* says last; nothing of it is left."""
        said = self.build(elements, keys=keys, status=1)
        assert os.listdir(self.out) == []
        assert "Traceback" not in said
        assert str(self.out) not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        return said.partition("image-factory: error: ")[2]

    def names(self) -> dict[str, tarfile.TarInfo]:
        [path] = self.out.glob("*.tar")
        with tarfile.open(path) as file:
            return {member.name: member for member in file}

    def text(self, name: str) -> str:
        [path] = self.out.glob("*.tar")
        with tarfile.open(path) as file:
            found = file.extractfile(name)
            assert found
            return found.read().decode()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of a few of this machine's programs."""
    directory = tmp_path_factory.mktemp("system")
    directory.chmod(0o755)
    run("bash", "-c", SYSTEM, cwd=directory)
    return directory


@pytest.fixture
def place(tmp_path: Path, system: Path) -> Place:
    return Place(tmp_path, system)


def variables(path: Path) -> dict[str, str]:
    entries = (entry.partition("=") for entry in path.read_text(encoding="utf-8").split("\0") if entry)
    return {name: value for name, _, value in entries}


def test_what_each_phase_sees(place: Place) -> None:
    machine, inside = place.cache / "elements/seen", Path("/var/tmp/seen")
    for phases, out in ((ON_MACHINE, machine), (INSIDE, inside)):
        place.element("look", **{phase: LOOK.format(out=out) for phase in phases})
    place.element("look2", cleanup=f'cp -r "$TARGET_ROOT/var/tmp/seen/." {machine}; rm -r "$TARGET_ROOT/var/tmp/seen"')
    (place.path / "elements/look/environment.d").mkdir()
    environment_file = place.path / "elements/look/environment.d/10-look"
    environment_file.write_text("export FROM_FILE=here:$target_dir\nNOT_EXPORTED=1\n", encoding="utf-8")
    place.build("look look2", keys="work-in-memory = yes")
    seen = {phase: variables(machine / f"{phase}.d/environment") for phase in (*ON_MACHINE, *INSIDE)}
    for phase, found in seen.items():
        assert found["DIB_NOTE"] == "of the section" and found["OTHER"] == "a b" and found["OWN"] == "of the caller"
        assert found["FROM_FILE"].endswith(f"/{phase}.d") and "NOT_EXPORTED" not in found
        assert {"_LIB", "DIB_PYTHON_EXEC", "TMP_BUILD_DIR", "TMP_HOOKS_PATH", "DIB_IMAGE_CACHE", "ARCH"} <= found.keys()
        assert found["DIB_OFFLINE"] == "" and found["DIB_DEBUG_TRACE"] == "0" and "/x-" in found["IMAGE_NAME"]
        assert found["TMP_MOUNT_PATH"].rpartition(".")[2].count("/") == 1
        assert sorted(found["IMAGE_ELEMENT"].split()) == ["look", "look2", "system"]
        assert ("TARGET_ROOT" in found) == (phase in ("root", "cleanup"))
        assert ("DIB_DEFAULT_INSTALLTYPE" in found) == (phase != "root")
        late = phase in ("block-device", "pre-finalise", "finalise", "cleanup")
        assert found.get("DIB_IMAGE_SIZE") == (str(256 << 10) if late else None)
        assert "secret-471105" not in found["DIB_ENV"] and "DIB_NOTE='of the section'" in found["DIB_ENV"]
        assert not set(found) & {"CALLER_DIRECTORY", "OLDPWD"}
        mounts = dict(line.rsplit(" ", 1) for line in (machine / f"{phase}.d/mounts").read_text().splitlines())
        functions = (machine / f"{phase}.d/functions").read_text(encoding="utf-8")
        words = (machine / f"{phase}.d/place").read_text(encoding="utf-8").split()
        if phase in INSIDE:
            assert found["HOME"] == "/root" and "TMPDIR" not in found and "PYTHONPATH" not in found
            assert found["PATH"] == "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            assert words == ["/", "0"]
            assert mounts["/tmp/in_target.d"].startswith("ro") and mounts["/sys"].startswith("ro")
            assert {"/proc", "/dev", "/dev/pts"} <= mounts.keys() and "/run" not in mounts
        else:
            assert found["HOME"] == "/home/of-the-caller" and found["TMPDIR"].startswith(str(place.out))
            assert "die" in functions and "get_image_element_array" in functions
            assert words == [str(place.path), "0"]
            assert mounts["/"].startswith("ro")
            tree = found["TMP_MOUNT_PATH"]
            assert tree in mounts
            assert any(path.startswith(f"{tree}/") for path in mounts) == (phase not in ("root", "block-device"))
    assert "dib-run-parts" in (machine / "install.d/hooks").read_text().splitlines()
    # What is not of the build is not in the image.
    names = place.names()
    assert "./.dotfile" in names and not any(
        name.startswith(("./dev/", "./proc/", "./sys/", "./tmp/")) for name in names
    )
    assert place.text("./etc/resolv.conf") == "of the system\n" and "./etc/resolv.conf.ORIG" not in names
    assert names["./var/log/some.log"].size == 0 and "./root/install.log" not in names
    # Nothing of the machine was changed, and nothing is left.
    assert sorted(path.name for path in place.out.iterdir()) == sorted(
        [f"{next(place.out.glob('*.tar')).name}", f"{next(place.out.glob('*.tar')).name}.sha256sum"]
    )
    assert str(place.out) not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")


def test_order_and_filter(place: Place) -> None:
    directory = place.path / "elements/order/install.d"
    for name in [
        "Upper-1",
        "z-nonum",
        "1_under",
        "09-b",
        "9-a",
        "010-d",
        "10-a",
        "100-e",
        "20.dot",
        "30-noexec",
        "sub/01-a",
    ]:
        script(directory / name, f"echo {name} >>/var/order; cd /; export LEAK=1; [ ! -e /tmp/in_target.d/x ]")
    script(directory / "49-check", '[ -z "${LEAK-}" ] && ! touch /tmp/in_target.d/x 2>/dev/null')
    (directory / "30-noexec").chmod(0o644)
    (directory / "70-link").symlink_to("10-a")
    place.build("order")
    expected = "Upper-1 z-nonum 1_under 09-b 9-a 010-d 10-a 10-a 100-e"
    assert place.text("./var/order").split() == expected.split()
    listed = place.build("order", "--explain-elements")
    assert re.findall(r"^  (\S+)  +order$", listed, re.MULTILINE) == (
        ["Upper-1", "z-nonum", "1_under", "09-b", "9-a", "010-d", "10-a", "49-check", "70-link", "100-e"]
    )
    shown = place.build("order", "--dry-run")
    assert "# Running install.d\n" in shown and "#   install.d/9-a of the element order\n" in shown


INSTALL_PACKAGES = """\
cat >/usr/local/bin/install-packages <<'END'
#!/bin/bash
[ "$*" != none ] || { echo "there is no package none"; exit 100; }
echo "$@" "${FROM_FILE-}" >>/var/order
END
chmod 755 /usr/local/bin/install-packages
echo install >>/var/order
"""


def test_extra_packages(place: Place) -> None:
    place.element("work", install=INSTALL_PACKAGES, post_install="echo post-install >>/var/order")
    place.build("work", keys="extra-packages = jq, 'g++'")
    assert place.text("./var/order").splitlines() == ["install", "jq g++ ", "post-install"]
    shown = place.build("work", "--dry-run", keys="extra-packages = jq 'a b'")
    assert "# Running extra-packages.d\n#   install-packages jq 'a b'\n" in shown
    listed = place.build("work", "--explain-elements", keys="extra-packages = jq")
    assert "extra-packages.d, in the system:\n  install-packages jq\n\npost-install.d" in listed


def test_extra_packages_that_fail(place: Place) -> None:
    place.element("work", install=INSTALL_PACKAGES)
    said = place.fails("work", keys="extra-packages = none")
    assert said.startswith("extra-packages.d/50-extra-packages of the setting extra-packages failed with status 100: ")
    assert "there is no package none" in said
    assert "failed with status 127" in place.fails("", keys="extra-packages = jq")


def test_sudo_and_the_library(place: Place) -> None:
    place.element(
        "use",
        extra_data="""\
set -eu
cd "$TMPDIR"
export MINE=1
[ "$(sudo env | grep -c MINE)" = 0 ] || [ "$(sudo sh -c 'echo ${MINE-none}')" = none ]
[ "$(sudo -E sh -c 'echo $MINE')" = 1 ]
[ "$(sudo A=b sh -c 'echo $A$HOME')" = b/root ]
sudo -H -n -- true
! sudo -u nobody true
$DIB_PYTHON_EXEC -c 'import yaml; from diskimage_builder import logging_config; logging_config.setup()'
eval declare -A elements=\\($(get_image_element_array)\\)
[ -d "${elements[use]}/extra-data.d" ]
source $_LIB/common-functions
sudo mount $(mount_dev_pts_options) -t devpts none $TMP_MOUNT_PATH/dev/pts
umount $TMP_MOUNT_PATH/dev/pts
mkdir -p over boot
mount -t tmpfs over over
mkdir -p over/below
mount -t tmpfs over over/below
unmount_dir $PWD/over
mountpoint over && ! mountpoint over/below
touch boot/vmlinuz-6.1.0-2-amd64 boot/vmlinuz-6.1.0-10-amd64 boot/initrd.img-6.1.0-10-amd64
source $_LIB/img-functions
TARGET_ROOT=$PWD
select_boot_kernel_initrd
[ $KERNEL = vmlinuz-6.1.0-10-amd64 ] && [ $RAMDISK = initrd.img-6.1.0-10-amd64 ] && [ $BOOTDIR = $PWD/boot ]
[ "$(bash $_LIB/dib-run-parts --list $(dirname $0))" = "$0" ]
[ "$(bash -c 'die all is lost' 2>&1)" = "ERROR: all is lost" ]
[ -s "$DIB_NAMED" ] && ! echo x 2>/dev/null >>"$DIB_NAMED"
""",
    )
    script(place.path / "named/file", "")
    agent = socket.socket(socket.AF_UNIX)
    agent.bind(f"/tmp/image-factory-{os.getpid()}.agent")
    place.environment["SSH_AUTH_SOCK"] = agent.getsockname()
    with agent:
        place.build("use", keys=f"DIB_NAMED = {place.path}/named/file")
    os.unlink(place.environment["SSH_AUTH_SOCK"])
    assert (place.path / "named/file").read_text(encoding="utf-8") == "#!/bin/bash\n\n"


# What goes wrong: the scripts of an element, and what the error says.
FAILURES: dict[str, tuple[dict[str, str], Sequence[str]]] = {
    "on this machine": (
        {"extra_data": "echo this one fails >&2; exit 7"},
        ["extra-data.d/50-bad of the element bad failed with status 7: this one fails"],
    ),
    "inside": (
        {"install": "echo first; sleep 60 & echo this one fails; exit 3"},
        ["install.d/50-bad of the element bad failed with status 3: this one fails"],
    ),
    "without a word": ({"finalise": "exit 1"}, ["finalise.d/50-bad of the element bad failed with status 1, and said"]),
    "writes to this machine": (
        {"root": "echo x >PLACE/precious/was-here"},
        [
            "root.d/50-bad of the element bad failed",
            "/precious/was-here: Read-only file system",
            "is read-only",
        ],
    ),
    "removes all": (
        {"root": "rm -rf PLACE/precious"},
        ["root.d/50-bad of the element bad failed", "Read-only file system"],
    ),
    "makes no system": (
        {"root": 'find "$TARGET_ROOT" -mindepth 1 -delete'},
        ["no script of root.d has made a system"],
    ),
    "makes a disk": (
        {"block_device": "echo IMAGE_BLOCK_DEVICE=/dev/loop0"},
        ["A script of block-device.d has made a disk", "'layout' says how"],
    ),
    "links to this machine": (
        {"root": 'ln -s PLACE/precious "$TMP_HOOKS_PATH/environment.d"'},
        ["11-dib-install-type.bash", "Read-only file system"],
    ),
    "unmounts all": (
        {"root": "umount --recursive --lazy /; exit 5"},
        ["root.d/50-bad of the element bad failed with status 5"],
    ),
    "unmounts its tree": (
        {"install": "umount -l /tmp/in_target.d /proc /sys /dev; umount -l /proc; exit 6"},
        ["install.d/50-bad of the element bad failed with status 6"],
    ),
    "mounts over all": (
        {"root": "mount -t tmpfs over / && mount -t tmpfs over PLACE && exit 8"},
        ["root.d/50-bad of the element bad failed with status 8"],
    ),
    "mounts over the system": (
        {"install": "mount -t tmpfs over /; mkdir /gone; exit 9"},
        ["install.d/50-bad of the element bad failed with status 9"],
    ),
    "deletes the system": (
        {"install": "rm -rf --no-preserve-root / ; exit 4"},
        ["install.d/50-bad of the element bad failed with status 4"],
    ),
    "deletes the hooks": (
        {"extra_data": 'rm -r "$TMP_HOOKS_PATH"'},
        ["pre-install.d can't be run: a script has removed the hooks"],
    ),
    "deletes the system at last": (
        {"finalise": "rm -rf --no-preserve-root /; exit 0"},
        ["cleanup.d: scripts have left nothing of the system."],
    ),
    "covers the system": (
        {"cleanup": 'mount -t tmpfs over "$TMP_MOUNT_PATH"'},
        ["cleanup.d: a script has unmounted or replaced the tree of the system"],
    ),
    "fills the disk": (
        {"install": "mkdir /srv && mount -t tmpfs -o size=64k full /srv\ncat /usr/bin/bash >/srv/full"},
        ["install.d/50-bad of the element bad failed with status 1", "No space left on device", "hint: Free some"],
    ),
    "kills all": (
        {"install": "kill -KILL -1; sleep 60"},
        ["install.d/50-bad of the element bad was killed by SIGKILL, and said nothing."],
    ),
    "has no interpreter": (
        {"pre_install": "exit 0"},
        ["pre-install.d/50-bad of the element bad failed with status 127"],
    ),
}


def test_packages_that_another_build_has(place: Place) -> None:
    """This build keeps none in the cache; unless the user says otherwise, who is told why apt fails."""
    place.element("dpkg", root='echo "packages: ${DIB_APT_LOCAL_CACHE-in the cache}"')
    (place.cache / "elements").mkdir(parents=True)
    descriptor = os.open(place.cache / "elements", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    said = place.build("dpkg")
    assert re.search(rf"Another build \(process {os.getpid()} of root\) has the packages of apt in {place.cache}", said)
    assert "packages: 0" in said
    place.element("dpkg", install="echo 'E: Could not get lock /var/cache/apt/archives/lock.'; exit 100")
    said = place.build("dpkg", keys="DIB_APT_LOCAL_CACHE = 1", status=1)
    assert "hint: Another program uses the same DIB_IMAGE_CACHE" in said
    os.close(descriptor)
    assert "packages: in the cache" in place.build("dpkg", status=1)


@pytest.mark.parametrize("what", FAILURES)
def test_what_fails(place: Place, what: str) -> None:
    scripts, expected = FAILURES[what]
    precious = place.path / "precious"
    script(precious / "file", "")
    place.element("bad", **{phase: text.replace("PLACE", str(place.path)) for phase, text in scripts.items()})
    if what == "has no interpreter":
        path = place.path / "elements/bad/pre-install.d/50-bad"
        path.write_text("#!/usr/bin/lost\n", encoding="utf-8")
    said = place.fails("bad")
    for text in expected:
        assert text in said
    assert os.listdir(precious) == ["file"]


def test_what_is_hidden_of_this_machine(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Unless a variable names it."""
    path = tmp_path_factory.mktemp("repository") / "file"
    path.write_text("of the machine\n", encoding="utf-8")
    place.element("look", extra_data=f"cat '{path}'", install="cat /tmp/lost")
    said = place.fails("look")
    assert f"extra-data.d/50-look of the element look failed with status 1: cat: {path}: No such file" in said
    assert f"hint: Scripts have a /tmp and a /var/tmp of their own, without {path}: have it elsewhere" in said
    said = place.fails("look", keys=f"DIB_REPOLOCATION_look = file://{path}")
    assert "install.d/50-look of the element look failed" in said and "hint: The log has" in said


@pytest.mark.parametrize(
    ("text", "said"), [("echo is not set: $LOST", ""), ("exit 0", ": exit is not for environment.d, return is\n")]
)
def test_environment_file_that_fails(place: Place, text: str, said: str) -> None:
    path = place.path / "elements/bad/environment.d/10-bad"
    path.parent.mkdir(parents=True)
    path.write_text(f"{text}\n", encoding="utf-8")
    assert f"environment.d/10-bad of the element bad failed with status 1{said}" in place.fails("bad")


def test_environment_file_that_has_names_of_ours(place: Place) -> None:
    path = place.path / "elements/good/environment.d/10-good"
    path.parent.mkdir(parents=True)
    path.write_text("scripts=mine\ntrap 'echo mine ends' EXIT\nreturn 0\n", encoding="utf-8")
    place.element("good", install="echo has run")
    said = place.build("good")
    assert "nsenter: has run" in said and "nsenter: mine ends" in said


def test_secrets_are_not_to_be_seen(place: Place) -> None:
    secrets = [f"hunter-47110{number}" for number in range(4)]
    place.element(
        "tell",
        extra_data="""\
set -x
[ "$DIB_X_PASS" = hunter-471100 ] && [ "$DIB_X_TOKEN" = hunter-471103 ]
echo "$DIB_ENV" >>"$TMP_MOUNT_PATH/etc/variables"
env
exit $DIB_STATUS""",
    )
    keys = f"""\
DIB_X_PASS = {secrets[0]}
DIB_APIKEY = {secrets[1]}
DIB_PIP_INDEX = https://me:{secrets[2]}@pypi.example/simple
DIB_X_TOKEN = {secrets[3]}
log-file = yes
DIB_STATUS = """
    shown = [
        place.build("tell", *words, keys=f"{keys}0")
        for words in (["--json", str(place.out / "record")], ["--dry-run"], ["--explain-elements"])
    ]
    assert "DIB_X_PASS=***" in shown[0]
    told = place.text("./etc/variables")
    assert "DIB_PIP_INDEX='https://***@pypi.example/simple'" in told and "DIB_STATUS=0" in told
    shown.append(place.build("tell", keys=f"{keys}3", status=1))
    shown += [told, *(path.read_text(encoding="utf-8", errors="replace") for path in place.out.iterdir())]
    assert len(shown) > 6
    assert not [secret for secret in secrets for text in shown if secret in text]


def test_script_that_hangs(place: Place) -> None:
    script(place.path / "elements/system/root.d/10-system", "echo waits; sleep 471105")
    said = place.fails("", keys="element-timeout = 10s")
    assert said.startswith("root.d/10-system of the element system did not end within 10 s: waits")
    assert not running("471105")


def running(word: str) -> bool:
    return subprocess.run(["pgrep", "-f", f"sleep {word}"], capture_output=True, check=False).returncode == 0


def test_what_scripts_leave(place: Place) -> None:
    place.element(
        "leave",
        root='mkdir "$TARGET_ROOT/mnt"; mount -t tmpfs left "$TARGET_ROOT/mnt"; touch "$TARGET_ROOT/mnt/left"',
        install="sleep 471106 </dev/null >/dev/null 2>&1 &\nmkdir /srv; mount -t tmpfs left /srv; touch /srv/left",
        pre_finalise='[ ! -e "$TMP_MOUNT_PATH/srv/left" ] && [ ! -e "$TMP_MOUNT_PATH/mnt/left" ]',
    )
    said = place.build("leave")
    assert "install.d has left these running, which end now: sleep" in said
    assert not running("471106")
    assert {"./srv", "./mnt"} <= place.names().keys() and "./srv/left" not in place.names()


def test_names_that_an_element_makes_stay(place: Place) -> None:
    place.element("names", install="rm /etc/resolv.conf; ln -s ../run/names /etc/resolv.conf")
    place.build("names")
    assert place.names()["./etc/resolv.conf"].linkname == "../run/names"
    assert "./etc/resolv.conf.ORIG" not in place.names()


def test_file_that_an_element_makes_immutable(place: Place) -> None:
    text = 'echo mine >"$TMP_MOUNT_PATH/etc/resolv.conf"; chattr +i "$TMP_MOUNT_PATH/etc/resolv.conf"'
    place.element("names", cleanup=text)
    place.build("names")
    assert place.text("./etc/resolv.conf") == "mine\n" and "./etc/resolv.conf.ORIG" not in place.names()
    assert not [path for path in place.out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_is_ended(place: Place, number: signal.Signals) -> None:
    place.element(
        "wait",
        root='cd "$TARGET_ROOT" && mkdir mnt && mount -t tmpfs x mnt && touch fixed && chattr +i fixed',
        install="sleep 471107",
    )
    argv = place.command("wait")
    process = subprocess.Popen(
        argv, cwd=place.path, env=place.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: running("471107"), "the script of install.d")
    finally:
        process.send_signal(number)
        process.wait()
    wait_for(lambda: not running("471107"), "its end")
    assert str(place.out) not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    if number == signal.SIGKILL:
        run(sys.executable, REPOSITORY / "image-factory", "--cleanup", "-o", place.out, env=place.environment)
    assert os.listdir(place.out) == []


# What scripts that were written for root do, and what the kernel refuses to an ordinary user's.
FOR_ROOT = """\
set -eu
place=$TMP_MOUNT_PATH/there
sudo mkdir "$place"
sudo mount -o ro -t sysfs none "$place" && [ -d "$place/kernel" ] && sudo umount -f "$place"
sudo mount --bind /dev "$place" && [ -c "$place/null" ] && sudo umount -fl "$place"
[ ! -c "$place/null" ] && sudo rmdir "$place"
sudo chown 12:34 "$TMP_MOUNT_PATH/etc/os-release"
sudo chroot "$TMP_MOUNT_PATH" bash -c 'echo >/dev/null; [ "$HOME" = /root ]'
touch "$HOME/was-here" || :
"""


def test_an_ordinary_user(users: dict[str, User], system: Path) -> None:
    user = users["c"]
    place = Place(user.directory("elements"), system)
    for directory in (place.out, place.cache):
        directory.mkdir(exist_ok=True)
        shutil.chown(directory, user.name)
    place.element(
        "root", extra_data=FOR_ROOT, install="echo of the system >/srv-file; [ $(id -u) = 0 ]", cleanup=RAMDISK
    )
    (place.path / "elements/lost+found").mkdir(mode=0o700)
    place.command("root")
    text = (place.path / "conf").read_text(encoding="utf-8")
    text = text.replace("format = tar", "format = raw").replace("mount-via = loop", "mount-via = fuse")
    (place.path / "conf").write_text(text, encoding="utf-8")
    argv = user.argv(user.program, "x", IMAGE_FACTORY_CONFIG=str(place.path / "conf"))
    done = run(*argv, cwd=place.path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [disk] = place.out.glob("*.raw")
    assert re.search(r"User: +12 +Group: +34\b", run("debugfs", "-R", "stat /etc/os-release", disk).stdout)
    assert "Type:" not in run("debugfs", "-R", "stat /dev/null", disk).stdout
    assert run("debugfs", "-R", "cat /srv-file", disk).stdout == "of the system\n"
    assert not (user.home / "was-here").exists()
    [kernel] = place.out.glob("x-*.kernel")
    assert (kernel.owner(), kernel.read_text(encoding="utf-8")) == (user.name, "kernel\n")
    assert "srv-file" in ramdisk_names(place)


# What makes a ramdisk of the system beside the image, in the way of those that Ironic boots.
RAMDISK = """\
set -eu -o pipefail
source "$_LIB/img-functions"
image=$(readlink -f "$IMAGE_NAME")
cd "$TARGET_ROOT"
mkdir boot
for name in vmlinuz-6.9 vmlinuz-6.12; do echo kernel >boot/$name; echo initrd >boot/initrd.img-${name#*-}; done
sudo find . -xdev -path './proc/*' -prune -o -print | sudo cpio -o -H newc --quiet | gzip >"$image.initramfs"
select_boot_kernel_initrd "$TARGET_ROOT"
[ "$KERNEL $RAMDISK" = "vmlinuz-6.12 initrd.img-6.12" ]
sudo cp "$BOOTDIR/$KERNEL" "$image.kernel"
# No user of the machine is one of the namespaces.
sudo chown 1:1 "$image.kernel"
sudo chmod 600 "$image.kernel"
rm -r boot
"""


def ramdisk_names(place: Place) -> list[str]:
    [path] = place.out.glob("x-*.initramfs")
    return run("bash", "-c", f"gzip -dc {path} | cpio -t --quiet").stdout.splitlines()


def test_files_beside_the_image_are_published_with_it(place: Place) -> None:
    """All or none; here the ramdisk of an element, with another one that says that no image is needed beside it."""
    place.element("no-final-image")
    (place.path / "elements/no-final-image").mkdir()
    place.element("ramdisk", cleanup=RAMDISK + 'ln -s /etc/passwd "$image.link"; echo 1 >"${image%/*}/other"\n')
    said = place.build("no-final-image ramdisk", "--until", "install")
    for name in ("link", "other"):
        assert re.search(rf"WARNING: \S*{name}, which a script has made beside the image, is not kept\.", said)
    assert [*place.out.glob("x-*")] == []
    [kernel] = place.out.glob(".image-factory-x/x-*.kernel")
    in_the_way = place.out / kernel.name
    in_the_way.mkdir()
    assert f"{kernel.name}: Is a directory" in place.build("no-final-image ramdisk", "--resume", status=1)
    assert [*place.out.glob("x-*")] == [in_the_way]
    in_the_way.rmdir()
    place.build("no-final-image ramdisk", "--resume")
    assert sorted(path.suffix for path in place.out.iterdir()) == [".initramfs", ".kernel", ".sha256sum", ".tar"]
    assert {"etc/os-release", "usr/bin/bash"} <= {*ramdisk_names(place)}
    assert f"{next(place.out.glob('*.kernel')).stat().st_mode & 0o7777:o}" == "644"


def task(command: str) -> str:
    return f"tasks = work\n[work]\ntask-command = {command}"


def test_tasks_in_the_tree(place: Place) -> None:
    """One that fails is begun again with what elements have made."""
    place.element("count", install="echo more >>/var/count; mount -t tmpfs left /srv || :")
    command = "cat /var/count >/var/seen; touch /tmp/x /etc/resolv.conf"
    shown = place.build("count", "--dry-run", keys=task(command))
    names = re.findall("^# ([A-Z].*)$", shown, re.MULTILINE)
    assert names[11:15] == ["Keeping the tree", "Task work", "Installing the boot loader", "Making the disk"]
    said = place.build("count", keys=task(f"{command}; exit 3"), status=1)
    assert "error: Task work failed with status 3." in said and "--resume x' goes on here" in said
    assert str(place.out) not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    [work] = place.out.glob(".*")
    assert sorted(path.name.partition("-")[0] for path in work.iterdir()) == ["checkpoint.json", "layer"]
    resumed = place.build("count", "--resume", keys=task(command))
    assert "Restoring the tree ..." in resumed and "Running root.d ..." not in resumed
    assert place.text("./var/seen") == "more\n" and place.text("./etc/resolv.conf") == "of the system\n"
    assert "./.dotfile" in place.names() and "./tmp/x" not in place.names()


def work(place: Place) -> None:
    """Make the script of a task, and an element that works on a disk."""
    script(place.path / "work.sh", "")
    place.element("bootloader", root="true")


@pytest.mark.parametrize(
    ("prepare", "elements", "keys", "message"),
    [
        (lambda place: None, "gone", "", "There is no element 'gone' (named)."),
        (lambda place: place.element("vm", root="true"), "vm", "", "There is no element 'block-device-mbr'"),
        (lambda place: place.element("lvm", root="true"), "lvm", "", "elements: lvm (named) works on a disk"),
        (lambda place: place.element("system2", root="true"), "system2", "filesystem = zfs", "filesystem: 'zfs'"),
        (work, "", "tasks = ./work.sh\ntasks-via = guest", "this layout has no boot loader."),
        (
            work,
            "bootloader",
            "tasks = ./work.sh\ntasks-via = namespace\nDIB_BLOCK_DEVICE = mbr",
            "there is no tree after them.",
        ),
    ],
)
def test_what_is_refused(
    place: Place, prepare: Callable[[Place], None], elements: str, keys: str, message: str
) -> None:
    prepare(place)
    assert message in place.build(elements, "--check", keys=keys, status=2)


@pytest.mark.parametrize("wish", ["yes", "no"])
def test_tree_in_memory(place: Place, wish: str) -> None:
    """As much as the disk may take, and 1 GiB."""
    shown = place.build("", "--dry-run", keys=f"work-in-memory = {wish}")
    assert (f" mount -t tmpfs -o mode=755,size={1280 << 20} tree " in shown) == (wish == "yes")


def test_settings_that_do_nothing_elsewhere(place: Place) -> None:
    said = place.build("", "--check", keys="cache-tree = yes")
    assert "cache-tree does nothing without source = bootstrap." in said
    assert "DIB_" not in said and "dib-" not in said
