"""Systems that are bootstrapped from a small archive, by root and by a user who may run nothing as root."""

import json
import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from ..bootstrap_scene import BUILD, WORK, Place, new_place
from ..conftest import PATIENCE, User, run
from ..integration.test_dry_run import announced, logged
from ..small_archive import SUITE, Archive, Mirror, closed_port, served


@pytest.fixture(params=["root", "c"])
def place(request: pytest.FixtureRequest, users: dict[str, User], small_archive: Archive) -> Place:
    """A place of root, and one of the user who has no sudo rule."""
    return new_place(users[request.param], small_archive)


def in_disk(disk: Path, request: str) -> str:
    """Return what debugfs answers on the last partition of *disk*, the root filesystem."""
    table = json.loads(run("sfdisk", "--json", disk).stdout)["partitiontable"]
    offset = table["partitions"][-1]["start"] * 512
    return run("debugfs", "-R", request, f"{disk}?offset={offset}").stdout


def test_disk_has_the_tree(place: Place) -> None:
    """With the owners and modes that it had for root of the namespaces; then nothing else is left."""
    script = "echo kept >/srv/file && chown 1000:42 /srv/file && chmod 4750 /srv/file"
    place.archive.add("hello", files={"usr/share/hello": "hello"}, scripts={"postinst": "echo said >/srv/postinst"})
    place.archive.publish()
    place.recipe(packages="hello", script=script)
    place.run()
    work = place.out / WORK
    kept = json.loads((work / "checkpoint.json").read_text())["kept"]
    assert {path.name for path in work.iterdir()} <= set(kept)
    disk = work / "disk.raw"
    assert in_disk(disk, "cat /usr/share/hello") == "hello"
    assert in_disk(disk, "cat /srv/postinst") == "said\n"
    status = in_disk(disk, "stat /srv/file")
    assert "Mode:  04750" in status and "User:  1000   Group:    42" in status, status
    assert "kept" in in_disk(disk, "cat /srv/file")
    assert "User:     0   Group:     0" in in_disk(disk, "stat /etc/passwd")
    assert "vmlinuz" in in_disk(disk, "cat /boot/grub/grub.cfg")
    place.run("--cleanup", "--output-dir", str(place.out))
    assert place.left() == []


@pytest.fixture
def user_place(users: dict[str, User], small_archive: Archive) -> Place:
    return new_place(users["c"], small_archive)


def suite(**keys: object) -> Callable[[Place, Mirror], None]:
    """Return what publishes a suite of its own, and takes that."""

    def prepare(place: Place, mirror: Mirror) -> None:
        place.archive.publish("other", **keys)  # type: ignore[arg-type]
        place.recipe(mirror.uri, suite="other")

    return prepare


def rubbish(path: str) -> Callable[[Place, Mirror], None]:
    """Return what has the mirror send something else for what begins with *path*."""

    def prepare(place: Place, mirror: Mirror) -> None:
        mirror.rubbish[path] = b"<html>Please log in.</html>"
        place.recipe(mirror.uri, packages="hello")

    return prepare


def at(uri: str, **keys: object) -> Callable[[Place, Mirror], None]:
    """Return what takes the recipe from *uri*, in which MIRROR and PORT are the server's and one that nobody has."""

    def prepare(place: Place, mirror: Mirror) -> None:
        place.recipe(uri.replace("MIRROR", mirror.uri).replace("PORT", str(closed_port())), **keys)

    return prepare


def larger(place: Place, mirror: Mirror) -> None:
    """Have a package that does not fit."""
    place.archive.add("large", files={"usr/share/large": "0123456789abcdef" * (3 << 20)})
    place.archive.publish()
    place.recipe(mirror.uri, packages="large")
    place.configure(firmware="bios", image_size="40M")


# What is wrong; what the error says, and what the hint.
BAD: dict[str, tuple[Callable[[Place, Mirror], None], str, str]] = {
    "no such suite": (at("MIRROR", suite="nosuch"), r"http://127\S+ has no suite nosuch\.", "Correct suite or mirror"),
    "no such directory": (at("MIRROR/no/debian"), r"http://127\S+/no/debian has no suite small\.", "Correct suite"),
    "refused": (at("http://127.0.0.1:PORT"), r"\S+InRelease can't be had: .*Connection refused", "when the mirror"),
    "no such host": (
        at("http://no-such-host.invalid/d"),
        r"\S+ can't be had: .*resolv(e|ing) 'no-such-host",
        "when the mirror",
    ),
    "login page": (
        rubbish("/dists/small/InRelease"),
        r"\S+/InRelease is no signed list of an archive",
        "ask for a login",
    ),
    "rubbish in its lists": (rubbish("/dists/small/main"), r"\S+/Packages can't be had: .*unexpected size", "updated"),
    "rubbish as a package": (rubbish("/pool/hello"), r"\S+/pool/hello\S+ can't be had: .*unexpected size", "updated"),
    "expired": (suite(valid=timedelta(days=-2)), r"What \S+other/InRelease lists is expired \(.* 2d", "clock"),
    "wrong key": (suite(key="wrong"), r"http:\S+ other is signed with the key [0-9A-F]{16}, which is in no", "keyring"),
    "not signed": (suite(key=None), r"http://\S+ other is not signed\.", "can't be verified"),
    "no such packages": (
        at("MIRROR", packages="hello helo-there absolutely-nothing"),
        r"The archive has no packages helo-there \(perhaps hello-there\), absolutely-nothing\.",
        "Correct packages",
    ),
    "needs what is not there": (
        at("MIRROR", packages="needy"),
        r"Packages can't be installed together: needy : Depends: absent \(>= 2\)",
        "Correct packages",
    ),
    "package that fails": (
        at("MIRROR", packages="failing"),
        r"The installation of failing failed: failing: no such thing \(.*exit status 3\)\.",
        "The log has all",
    ),
    "script that fails": (at("MIRROR", script="nosuchprogram"), "The recipe's script failed: .*nosuchprogram", "log"),
    "image-size": (larger, "", "image-size"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told_in_a_line(user_place: Place, name: str) -> None:
    """And nothing is left."""
    prepare, message, hint = BAD[name]
    archive = user_place.archive
    archive.add("hello", files={"usr/share/hello": "hello"})
    archive.add("hello-there")
    archive.add("needy", fields={"Depends": "absent (>= 2)"})
    archive.add("failing", scripts={"postinst": "echo 'failing: no such thing' >&2\nexit 3"})
    archive.publish()
    with served(archive) as mirror:
        prepare(user_place, mirror)
        done = user_place.run(check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("image-factory: ")]
    assert done.returncode == 1, done.stderr
    assert re.match(f"image-factory: error: {message}", said[0]), said
    assert re.match(f"image-factory: hint: .*{hint}", said[1]), said
    assert len(said) == 2, said
    assert user_place.left() == []
    assert list(user_place.out.iterdir()) == []


OTHERS = ("rubbish", "wrong", "portal")
# What is wrong with the first mirror, and what is said of it.
FIRST: dict[str, tuple[str, str]] = {
    "refused": ("http://127.0.0.1:PORT", r"http://\S+/InRelease can't be had: .*Connection refused"),
    "no such suite": ("BAD/no/debian", r"\S+/no/debian has no suite small"),
    "login page": ("BAD/portal", r"\S+/portal/dists/small/InRelease is no signed list of an archive"),
    "unknown key": ("BAD/wrong", r"\S+ small is signed with the key \S+"),
    "rubbish as a package": ("BAD/rubbish", r"\S+/rubbish/pool/hello\S+ can't be had: .*unexpected size"),
}


@pytest.mark.parametrize("name", FIRST)
def test_next_mirror_is_tried(user_place: Place, name: str) -> None:
    """The system keeps the one that has served, and builds without a network take what it has sent."""
    archive = user_place.archive
    archive.add("hello", files={"usr/share/hello": "hello"})
    archive.add("other")
    archive.publish()
    for directory in OTHERS:
        shutil.copytree(
            archive.directory,
            archive.directory / directory,
            ignore=lambda _, names: [each for each in names if each in OTHERS],
        )
    uri, said = FIRST[name]
    with served(archive) as bad, served(archive) as good:
        bad.rubbish = {
            "/portal/dists/small/InRelease": b"<html>Log in.</html>",
            "/rubbish/pool/hello": b"<html></html>",
        }
        first = uri.replace("BAD", bad.uri).replace("PORT", str(closed_port()))
        key = "wrong" if name == "unknown key" else "right"
        sources = [archive.source(first, key=key), archive.source(good.uri)]
        user_place.recipe(sources=[sources], packages="hello other", script="cp /etc/apt/sources.list /srv")
        done = user_place.run()
        assert re.search(f"WARNING: {said}.* The next mirror is tried\\.", done.stderr), done.stderr
        assert f"The packages come from {good.uri}/" in done.stderr
        disk = user_place.out / WORK / "disk.raw"
        assert in_disk(disk, "cat /srv/sources.list").split()[2:] == [good.uri, SUITE, "main"]
        assert in_disk(disk, "cat /usr/share/hello") == "hello"
        # What had come from the first one does not come again.
        served_by = {Path(path).name for path in good.asked if path.endswith(".deb")}
        assert ("other_1_amd64.deb" in served_by) == (name != "rubbish as a package")
        user_place.configure(offline="yes")
        good.asked.clear()
        user_place.run()
        assert good.asked == []


def test_no_mirror_serves(user_place: Place) -> None:
    """One line has what is wrong with each."""
    with served(user_place.archive) as mirror:
        places = [f"{mirror.uri}/first", f"{mirror.uri}/second"]
        user_place.recipe(sources=[[user_place.archive.source(uri) for uri in places]])
        done = user_place.run(check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("image-factory: ")]
    reasons = " ".join(f"{uri} has no suite {SUITE}." for uri in places)
    assert said[0] == f"image-factory: error: No mirror gives the packages: {reasons}"
    assert (len(said), done.returncode) == (2, 1)
    assert user_place.left() == []


@pytest.mark.parametrize("recommends", [True, False])
def test_recommended_packages_are_of_those_that_are_asked_for(user_place: Place, recommends: bool) -> None:
    """Not of what each system has: Debian's installer leaves its mail server out, too."""
    archive = user_place.archive
    for name, priority, recommended in (("clock", "important", "mailer"), ("hello", "optional", "greeting")):
        archive.add(name, fields={"Priority": priority, "Recommends": recommended}, files={f"usr/share/{name}": name})
        archive.add(recommended)
    archive.publish()
    user_place.recipe(variant="important", packages="hello", recommends=recommends)
    user_place.run()
    status = in_disk(user_place.out / WORK / "disk.raw", "cat /var/lib/dpkg/status")
    found = {*re.findall("^Package: (.*)$", status, re.MULTILINE)}
    assert found == {"base", "clock", "hello"} | ({"greeting"} if recommends else set())


def test_odd_paths(user_place: Place) -> None:
    """Such as need quotes in a shell."""
    out, cache = (user_place.directory / "a b'c;d`e*" / name for name in ("out", "cache"))
    user_place.recipe(script="echo kept >/srv/file")
    user_place.run("--output-dir", str(out), "--cache-dir", str(cache), *BUILD)
    assert in_disk(out / WORK / "disk.raw", "cat /srv/file") == "kept\n"
    assert [path.name for path in (cache / "packages").iterdir() if path.suffix == ".deb"] == ["base_1_amd64.deb"]


def test_password_of_a_mirror_is_not_shown(user_place: Place) -> None:
    with served(user_place.archive) as mirror:
        user_place.recipe(mirror.uri.replace("://", "://builder:hunter2@"), suite=SUITE, packages="nothing")
        done = user_place.run(check=False)
    assert "The archive has no package nothing" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout


@pytest.mark.parametrize("path", ["/boot", "/boot/grub", "/usr/sbin/grub-probe"])
def test_no_link_of_a_tree_is_followed_out_of_it(user_place: Place, path: str) -> None:
    """The programs that write there, and read, are this machine's; the boot sector of another file is no image's."""
    outside = user_place.directory / "outside"
    outside.mkdir()
    shutil.chown(outside, user_place.user.name)
    script = f"rm -rf {path} && ln -s {outside} {path}"
    if path == "/boot":
        # Late, by a program of the tree.
        text = f"#!/bin/sh\necho >/boot/grub/grub.cfg\nrm -rf /boot/grub\nln -s {outside} /boot/grub\n"
        script = f"printf {shlex.quote(text)} >/usr/sbin/grub-mkconfig"
    user_place.recipe(script=script)
    done = user_place.run(check=False)
    assert done.returncode == 1, done.stderr
    reason = f"The boot loader can't be installed: a symbolic link of the tree leads out of it, to {outside}"
    assert f"image-factory: error: {reason}" in done.stderr
    assert list(outside.iterdir()) == []
    assert user_place.left() == []


def names(place: Place) -> set[str]:
    """Return what the cache has, but for the lists."""
    return {path.name for path in (place.cache / "packages").iterdir() if not path.name.startswith("lists-")}


def test_packages_are_downloaded_once(user_place: Place) -> None:
    """Only what has changed, or is broken in the cache, comes again; then nothing but the cache is needed."""
    archive = user_place.archive
    for name in ("hello", "other"):
        archive.add(name, files={f"usr/share/{name}": "first"})
    archive.publish()
    # No package, and what a killed build has left.
    script = "cp /etc/passwd /var/cache/apt/archives/poison_1_amd64.deb"
    with served(archive) as mirror:
        user_place.recipe(mirror.uri, packages="hello other", script=script)
        user_place.run()
        assert names(user_place) == {"base_1_amd64.deb", "hello_1_amd64.deb", "other_1_amd64.deb"}
        assert sum(path.endswith(".deb") for path in mirror.asked) == 3
        for path in (user_place.cache / "packages").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
        archive.remove("other")
        archive.add("other", version="2", files={"usr/share/other": "second"})
        archive.publish()
        kept = user_place.cache / "packages/hello_1_amd64.deb"
        whole = kept.read_bytes()
        kept.write_bytes(whole[:-9] + b"x" + whole[-8:])
        mirror.asked.clear()
        user_place.run()
        assert [path for path in mirror.asked if path.endswith(".deb")] == [
            "/pool/hello_1_amd64.deb",
            "/pool/other_2_amd64.deb",
        ]
        assert kept.read_bytes() == whole
        mirror.asked.clear()
        user_place.configure(offline="yes")
        user_place.run()
        assert mirror.asked == []
    user_place.run()
    assert in_disk(user_place.out / WORK / "disk.raw", "cat /usr/share/other") == "second"
    (user_place.cache / "packages/other_2_amd64.deb").unlink()
    done = user_place.run(check=False)
    assert re.search(r"error: \S+/pool/other_2_amd64.deb can't be had: .*\n.*hint: .*With --offline only", done.stderr)
    assert done.returncode == 1
    user_place.recipe("http://another.example.com")
    for flags in ((), ("--check", "small")):
        done = user_place.run(*flags, check=False)
        assert done.returncode == 2
        assert f"--offline: {user_place.cache}/packages has no lists of the packages of these sources." in done.stderr


def trees(place: Place) -> list[Path]:
    return [*(place.cache / "packages").glob("tree-*")]


TAKEN = "No package has changed: the tree of an earlier build is taken"


def test_tree_is_taken_while_nothing_has_changed(place: Place) -> None:
    """What it takes is what was made: with links, owners, capabilities; one of other packages or scripts is another."""
    archive = place.archive
    archive.add("hello", files={"usr/share/hello": "first"})
    archive.publish()
    script = "mkdir /srv/a; chown 7:8 /srv/a; chmod 2750 /srv/a; ln -s a /srv/b; ln /etc/passwd /srv/c; date >/srv/d"
    keys = {"packages": "hello", "script": script}
    place.recipe(**keys)
    place.configure(cache_tree="yes")
    place.run()
    disk = place.out / WORK / "disk.raw"
    told = r"Type: \w+ +Mode: +\d+|User: +\d+ +Group: +\d+|Links: \d+| mtime: .*|Fast link dest: .*"

    def seen() -> list[object]:
        files = [in_disk(disk, f"cat {path}") for path in ("/srv/d", "/usr/share/hello")]
        return [*files, *(re.findall(told, in_disk(disk, f"stat /srv/{name}")) for name in "abcd")]

    first = seen()
    [kept] = trees(place)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    os.utime(kept, (0, 0))
    done = place.run()
    assert TAKEN in done.stderr and "Caching the tree" not in done.stderr
    assert seen() == first
    # It counts as new again.
    assert trees(place) == [kept] and kept.stat().st_mtime > 0

    archive.remove("hello")
    archive.add("hello", version="2", files={"usr/share/hello": "second"})
    archive.publish()
    assert TAKEN not in place.run().stderr
    assert in_disk(disk, "cat /usr/share/hello") == "second"
    [newer] = trees(place)
    assert newer != kept

    place.recipe(**keys | {"script": f"{script}; date >/srv/e"})
    assert TAKEN not in place.run().stderr
    assert len(trees(place)) == 2

    # What is no tree is removed, and made anew.
    for path in trees(place):
        path.write_bytes(path.read_bytes()[:1000])
    said = place.run().stderr
    assert "The tree in the cache can't be taken, and is removed: " in said
    assert "Caching the tree: done" in said
    assert in_disk(disk, "cat /usr/share/hello") == "second"
    assert TAKEN in place.run(offline="yes").stderr
    assert place.left() == [str(place.out / WORK)]


def test_tree_that_cannot_be_cached_is_no_failure(user_place: Place) -> None:
    """Where the cache is full there is a warning, and nothing is kept where others can write."""
    cache = user_place.cache / "packages"
    cache.mkdir(parents=True)
    shutil.chown(user_place.cache, user_place.user.name)
    owner = pwd.getpwnam(user_place.user.name).pw_uid
    run("mount", "-t", "tmpfs", "-o", f"mode=755,size=64M,uid={owner}", "small", cache)
    try:
        user_place.run()
        user_place.configure(cache_tree="yes")
        used = sum(path.stat().st_blocks << 9 for path in cache.iterdir())
        run("mount", "-o", f"remount,size={used + (256 << 10)}", cache)
        assert "WARNING: The tree is not kept in the cache: " in user_place.run().stderr
        assert trees(user_place) == []
        run("mount", "-o", "remount,size=64M", cache)
        cache.chmod(0o777)
        assert "Caching the tree" not in user_place.run().stderr
    finally:
        run("umount", cache)
    assert user_place.left() == [str(user_place.out / WORK)]


def test_cache_that_others_can_write_is_not_used(user_place: Place) -> None:
    with served(user_place.archive) as mirror:
        user_place.recipe(mirror.uri)
        user_place.run()
        (user_place.cache / "packages").chmod(0o777)
        mirror.asked.clear()
        done = user_place.run()
        assert f"{user_place.cache}/packages can be written by all users" in done.stderr
        assert [path for path in mirror.asked if path.endswith(".deb")] == ["/pool/base_1_amd64.deb"]
    user_place.configure(offline="yes")
    done = user_place.run(check=False)
    assert (done.returncode, "is not believed" in done.stderr) == (2, True)


def test_builds_at_the_same_moment_share_the_cache(user_place: Place) -> None:
    """Their namespaces may have the same numbers of processes."""
    for name in ("hello", "other"):
        user_place.archive.add(name, files={f"usr/share/{name}": name * 100_000})
    user_place.archive.publish()
    user_place.recipe(packages="hello other")
    builds = [
        subprocess.Popen(
            user_place.argv("--output-dir", str(user_place.directory / name), *BUILD),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=user_place.directory,
        )
        for name in ("one", "two", "three")
    ]  # fmt: skip
    for build in builds:
        _, errors = build.communicate(timeout=PATIENCE)
        assert build.returncode == 0, errors
    for name in ("one", "two", "three"):
        assert in_disk(user_place.directory / name / WORK / "disk.raw", "stat /usr/share/other").count("500000")
    assert names(user_place) == {"base_1_amd64.deb", "hello_1_amd64.deb", "other_1_amd64.deb"}
    for path in (user_place.cache / "packages").glob("*.deb"):
        assert path.read_bytes() == (user_place.archive.directory / "pool" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        (["mount", "-t", "tmpfs", "-o", "size=300m,noexec,mode=777", "x"], "a program: Permission denied"),
        (["bindfs", "--xattr-none", "-o", "allow_other"], "a capability: Operation not supported"),
    ],
    ids=["noexec", "no attributes"],
)
def test_filesystem_that_has_not_all_of_a_system(user_place: Place, mount: list[str], reason: str) -> None:
    """It is said before anything is downloaded."""
    under = user_place.user.run("mktemp", "-d", f"{user_place.directory}/under.XXX").stdout.strip()
    user_place.user.run("mkdir", user_place.out)
    run(*mount, *([under] if mount[0] == "bindfs" else []), user_place.out)
    try:
        with served(user_place.archive) as mirror:
            user_place.recipe(mirror.uri)
            user_place.configure(work_in_memory="no")
            done = user_place.run(check=False)
            assert mirror.asked == []
        assert list(user_place.out.iterdir()) == []
    finally:
        run("umount", user_place.out)
    assert done.returncode == 1
    assert f"error: The filesystem of {user_place.out} can't have the files of a system: {reason}." in done.stderr
    assert user_place.left() == []


def plain(argv: list[str]) -> str:
    """Replace what a dry run can't know of a command: numbers of processes, and what tells a disk from others."""
    text = shlex.join(argv)
    for pattern, replacement in (
        (r"--target=[0-9]+", "--target=PID"),
        (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[A-Z-]+-UUID", "UUID"),
        (r"(?<=-N )[0-9A-Fa-fX]{8}\b|(?<=by-uuid/)[0-9A-FX]{4}-[0-9A-FX]{4}", "SERIAL"),
    ):
        text = re.sub(pattern, replacement, text)
    return text


def test_each_command_is_in_the_dry_run(place: Place) -> None:
    """Those of the steps that make the disk, in their order."""
    shown = announced(place.run("--dry-run", *BUILD).stdout)
    log = place.run(*BUILD).stderr
    done = logged(log)
    # What has the namespaces is started before the first step in them.
    assert f"Running: {shlex.join(shown[0][1].pop(0))}\n" in log
    assert [name for name, _ in done] == ["Bootstrapping", "Installing the boot loader", "Making the disk"]
    for (name, commands), (_, expected) in zip(done, shown, strict=True):
        assert [*map(plain, commands)] == [*map(plain, expected)], name
