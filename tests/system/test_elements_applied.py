"""Elements applied to a system that is bootstrapped from a small archive, and to a disk that is there already."""

import re
import shutil
from pathlib import Path

import pytest

from ..bootstrap_scene import BUILD, WORK, Place, new_place
from ..conftest import User, run
from ..integration.test_dry_run import announced, logged
from ..small_archive import Archive
from .test_bootstrap import in_disk, plain
from .test_elements_run import script

# What the generated element tells, and what only the tree can say.
LOOK = """\
set -eu
env | grep -E '^(DISTRO_NAME|DIB_|EFI_BOOT_DIR|IMAGE_ELEMENT=|FS_TYPE|http_proxy)' | sort >"{out}"
"""
TOLD = {
    "DISTRO_NAME": "debian", "DIB_RELEASE": "13", "DIB_INIT_SYSTEM": "sysv", "EFI_BOOT_DIR": "EFI/debian",
    "DIB_PYTHON_VERSION": "3", "DIB_DISTRIBUTION_MIRROR": "http://mirror.example/debian", "FS_TYPE": "ext4",
    "IMAGE_ELEMENT": "image-factory-system look dpkg", "http_proxy": "http://127.0.0.1:9", "DIB_OFFLINE": "",
    "DIB_NOTE": "of the section",
}  # fmt: skip


@pytest.fixture(scope="module")
def archive(small_archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """An archive whose systems have bash, which runs scripts of elements."""
    found = small_archive.copied(tmp_path_factory.mktemp("archive"))
    tree = tmp_path_factory.mktemp("bash") / "tree"
    (tree / "usr/bin").mkdir(parents=True)
    shutil.copy("/bin/bash", tree / "usr/bin/bash")
    # The C library is another package's.
    [library] = re.findall(r"(/lib\S+libtinfo\S+) \(", run("ldd", "/bin/bash").stdout)
    (tree / library[1:]).parent.mkdir(parents=True)
    shutil.copy(library, tree / library[1:])
    found.add("bash", tree=tree, fields={"Essential": "yes", "Priority": "required"})
    found.publish()
    return found


@pytest.fixture(params=["root", "c"])
def place(request: pytest.FixtureRequest, users: dict[str, User], archive: Archive) -> Place:
    """A place of root, and one of the user who has no sudo rule."""
    return new_place(users[request.param], archive)


@pytest.fixture
def user_place(users: dict[str, User], archive: Archive) -> Place:
    return new_place(users["c"], archive)


def configure(place: Place, elements: str = "look", **keys: str) -> None:
    own = {"elements": elements, "elements-path": str(place.directory / "elements"), "skip-base": "yes"}
    place.configure(**own, **keys)


def of_image(place: Place, source: Path) -> None:
    """Have *source* in the place of a bootstrap."""
    known = {
        "source": "image", "source-image": str(source), "format": "raw", "elements": "look", "skip-base": "yes",
        "elements-path": str(place.directory / "elements"), "output-dir": str(place.out),
        "cache-dir": str(place.cache),
    }  # fmt: skip
    lines = [f"{key} = {value}\n" for key, value in known.items()]
    (place.directory / "image-factory.conf").write_text("".join(["[small]\n", *lines]))


def element(place: Place, name: str, **scripts: str) -> None:
    """Make the element *name* with a script for each phase."""
    for phase, text in scripts.items():
        script(place.directory / f"elements/{name}/{phase.replace('_', '-')}.d/50-{name}", text)


def in_tree(place: Place, path: str) -> str:
    return in_disk(place.out / WORK / "disk.raw", f"cat {path}")


def variables(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines())


def test_elements_of_a_bootstrap(place: Place) -> None:
    element(place, "dpkg", root='touch "$TARGET_ROOT/etc/of-dpkg"', cleanup='rm "$TARGET_ROOT/etc/of-dpkg"')
    element(
        place,
        "look",
        root=LOOK.format(out="$TARGET_ROOT/srv/machine"),
        pre_install=LOOK.format(out="/srv/inside") + "[ -e /etc/of-dpkg ]",
        install="[ $(id -u) = 0 ]; chown 12:34 /srv/inside; echo log >/var/log/install.log",
        finalise="echo late >/srv/late; ! echo x >/proc/sys/kernel/panic_on_oops",
    )
    write = "mkdir -p /etc/apt; echo 'deb [trusted=yes] http://mirror.example/debian small main' >/etc/apt/sources.list"
    place.recipe(proxy="http://127.0.0.1:9", script=write)
    configure(place, tasks="task", DIB_NOTE="of the section")
    with (place.directory / "image-factory.conf").open("a") as file:
        file.write("[task]\ntask-command = cp /srv/late /srv/task\n")
    steps = announced(place.run("--dry-run", *BUILD).stdout)
    log = place.run(*BUILD).stderr
    found = {name: variables(in_tree(place, f"/srv/{name}")) for name in ("machine", "inside")}
    for name, told in found.items():
        assert {key: told.get(key) for key in TOLD} == TOLD, name
    assert re.search(r"User: +12 +Group: +34\b", in_disk(place.out / WORK / "disk.raw", "stat /srv/inside"))
    assert in_tree(place, "/srv/task") == "late\n" and in_tree(place, "/var/log/install.log") == ""
    assert "Inode:" not in in_disk(place.out / WORK / "disk.raw", "stat /etc/of-dpkg")
    names = [name for name, _ in steps]
    assert names[:4] == ["Bootstrapping", "Merging elements", "Running root.d", "Running extra-data.d"]
    assert names[12:] == ["Keeping the tree", "Task task", "Installing the boot loader", "Making the disk"]
    done = logged(log)
    assert [name for name, _ in done][: len(names)] == names
    for number in range(1, 12):
        # A comment names each script; namespaces are made before their first step.
        expected = [plain(argv) for argv in steps[number][1] if argv[0] != "#" and "sleep infinity" not in argv[-1]]
        assert [*map(plain, done[number][1])] == expected
    assert any("sleep infinity" in argv[-1] and "--fork" in argv for argv in steps[1][1])


def test_what_fails_and_what_goes_on(user_place: Place) -> None:
    """Of an element that fails nothing is left; a task that fails is begun with what elements have made."""
    place = user_place
    element(place, "look", install="echo more >>/srv/count; exit 7")
    element(place, "other", cleanup='[ ! -e "$TARGET_ROOT/srv/mounted" ]', root='mount -t tmpfs x "$TARGET_ROOT/srv"')
    configure(place, "look other")
    failed = place.run(*BUILD, check=False)
    assert failed.returncode == 1 and "install.d/50-look of the element look failed with status 7" in failed.stderr
    assert place.left() == []
    element(place, "look", install="echo more >>/srv/count")
    configure(place, "look", tasks="task")
    with (place.directory / "image-factory.conf").open("a") as file:
        file.write("[task]\ntask-command = grep -c more /srv/count; exit 3\n")
    assert "Task task failed with status 3: 1" in place.run(*BUILD, check=False).stderr
    text = (place.directory / "image-factory.conf").read_text()
    (place.directory / "image-factory.conf").write_text(text.replace("; exit 3", " >/srv/seen"))
    resumed = place.run("--resume", *BUILD)
    assert "Restoring the tree ..." in resumed.stderr and "Running root.d ..." not in resumed.stderr
    assert in_tree(place, "/srv/seen") == "1\n"
    element(place, "look", install="echo another")
    assert "elements changed since the disk was installed" in place.run("--resume", "small", check=False).stderr


def test_what_is_refused(user_place: Place) -> None:
    place = user_place
    for name, provided in (("system", "operating-system"), ("table", "block-device")):
        element(place, name, root="true")
        (place.directory / f"elements/{name}/element-provides").write_text(f"{provided}\n")
    element(place, "lvm", finalise="true")
    element(place, "vm", finalise="true")
    (place.directory / "elements/vm/element-deps").write_text("block-device\nlvm\n")
    for elements, message in (
        ("system", "The element system (named) provides 'operating-system': already provided by source = bootstrap."),
        ("table", "The element table (named) provides 'block-device': already provided by source = bootstrap."),
        ("lost", "There is no element 'lost' (named)."),
        ("vm", "elements: lvm (needed by vm) works on a disk"),
    ):
        configure(place, elements)
        done = place.run("--check", "small", check=False)
        assert done.returncode == 2 and message in done.stderr and "hint: " in done.stderr
    explained = place.run("--explain-elements", "small", check=False).stdout
    assert "image-factory-system  source = bootstrap; provides operating-system, block-device  made by" in explained
    assert "  00-image-factory-system.bash  image-factory-system" in explained


def test_elements_on_a_disk(users: dict[str, User], archive: Archive) -> None:
    """Root alone has the disk mounted for them; one that fails leaves the disk as it was."""
    place = new_place(users["root"], archive)
    place.run(*BUILD)
    source = place.directory / "source.raw"
    (place.out / WORK / "disk.raw").rename(source)
    element(place, "dpkg", root='[ -e "$TARGET_ROOT/usr/bin/dpkg" ]')
    element(
        place,
        "look",
        root="set -eu\n" + LOOK.format(out="$TARGET_ROOT/srv/machine"),
        install="[ -x /usr/bin/env ] && ln /srv/machine /srv/other; exit 7",
        cleanup='echo late >"$TMP_MOUNT_PATH/srv/late"',
    )
    of_image(place, source)
    steps = announced(place.run("--dry-run", "--until", "elements", "small").stdout)
    failed = place.run("--until", "elements", "small", check=False)
    assert "install.d/50-look of the element look failed with status 7" in failed.stderr
    assert "--resume small' goes on here" in failed.stderr
    disk = place.out / WORK / "disk.raw"
    assert "Inode:" not in in_disk(disk, "stat /srv/machine") and not (disk.parent / "applied.raw").exists()
    assert str(place.out) not in Path("/proc/self/mountinfo").read_text()
    assert not (disk.parent / "mount-point").is_symlink() and not (disk.parent / "elements").exists()
    text = (place.directory / "elements/look/install.d/50-look").read_text()
    script(place.directory / "elements/look/install.d/50-look", text.replace("; exit 7", ""))
    log = place.run("--resume", "--until", "elements", "small").stderr
    assert "Copying the source image ..." not in log
    told = variables(in_tree(place, "/srv/other"))
    expected = {"DISTRO_NAME": "debian", "DIB_ROOT_FSTYPE": "ext4", "IMAGE_ELEMENT": "image-factory-system look dpkg"}
    assert {key: told.get(key) for key in expected} == expected
    assert in_tree(place, "/srv/late") == "late\n"
    announced_names = [name for name, _ in steps]
    first = announced_names.index("Merging elements")
    assert announced_names[first : first + 11] == [name for name, _ in logged(log) if name in announced_names][-12:-1]
    element(place, "look", install="echo another")
    said = place.run("--resume", "small", check=False).stderr
    assert "elements changed since elements were applied to the disk" in said


def test_a_disk_that_is_there_is_for_root(user_place: Place) -> None:
    place = user_place
    element(place, "look", install="true")
    source = place.directory / "source.raw"
    run("qemu-img", "create", "-q", "-f", "qcow2", source, "1M")
    of_image(place, source)
    done = place.run("--check", "small", check=False)
    assert (
        done.returncode == 2 and "already only root can apply them, as this machine's kernel mounts it." in done.stderr
    )
    assert "hint: Build as root, or have tasks in their place." in done.stderr
