"""Answer files are secrets: what they say is shown nowhere, and no copy of them stays.

The log of the console and whole builds that succeed are in integration/test_build.py.
"""

import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..conftest import User, run
from .test_fetch import File, Server, server

__all__ = ["server"]

pytestmark = pytest.mark.usefixtures("machine")

PASSWORD = f"pa55-{secrets.token_hex(12)}"
# What a configuration names, so what may be shown; each in the form of its installer.
ANSWERS = {
    "preseed": f"d-i passwd/root-password password {PASSWORD}\n",
    "kickstart": f"rootpw --plaintext {PASSWORD}\n",
    "yast": f"<profile><user_password>{PASSWORD}</user_password></profile>\n",
    "autoinstall": f"#cloud-config\nautoinstall:\n  identity:\n    password: {PASSWORD}\n",
}
# virt-install's own log, what it leaves in its scratch directory, libvirt's logs and machines.
KEPT_BY_OTHERS = ("/var/lib/libvirt/boot", "/var/log/libvirt", "/etc/libvirt/qemu", "/run/libvirt/qemu")

TOP = """
[x]
linux = linux
initrd = initrd
image-size = 1M
ram = 64M
virt-type = qemu
max-parallel = none
"""


@dataclass
class Site:
    """Where one user builds, with an answer file that only the user can read."""

    user: User
    directory: Path

    @property
    def answer_file(self) -> Path:
        return self.directory / "answers.cfg"

    def write(self, key: str = "preseed", extra: str = "") -> None:
        self.answer_file.write_text(ANSWERS[key])
        self.answer_file.chmod(0o600)
        run("chown", self.user.name, self.answer_file)
        (self.directory / "own.conf").write_text(f"{TOP}{key} = {self.answer_file}\n{extra}")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the program and check that it doesn't show the password."""
        variables = {"IMAGE_FACTORY_CONFIG": str(self.directory / "own.conf"), **environment}
        argv = self.user.argv(self.user.program, "x", *arguments, **variables)
        done = run(*argv, check=False, cwd=self.directory)
        assert PASSWORD not in done.stdout + done.stderr
        assert "Internal error" not in done.stderr
        return done

    def copies(self) -> list[str]:
        """Return the files that have the password, and what virt-install has left; the answer file is gone."""
        # What programs keep in a home has a dot; other tests' images are in it, too, and take minutes to read.
        places = [self.directory, f"{self.user.home}/.[!.]*", "/tmp/image-factory.*", *KEPT_BY_OTHERS]
        found = [str(path) for place in places for path in Path("/").glob(str(place).lstrip("/"))]
        # What is in an initrd is compressed.
        listed = run("grep", "-rlsaF", "-e", PASSWORD, *found, check=False).stdout.splitlines()
        initrds = run("find", *found, "-name", "virtinst-*", check=False).stdout.splitlines()
        return [*listed, *initrds]


@pytest.fixture(params=["root", "a"])
def site(request: pytest.FixtureRequest, users: dict[str, User]) -> Iterator[Site]:
    user = users[request.param]
    directory = user.directory(re.sub(r"[^a-z]+", "-", request.node.name)[:24] + os.urandom(2).hex())
    for name in ("linux", "initrd"):
        (directory / name).write_text("no kernel\n")
    found = Site(user, directory)
    yield found
    found.answer_file.unlink(missing_ok=True)
    assert found.copies() == []


@pytest.mark.parametrize("key", ANSWERS)
@pytest.mark.parametrize("flags", [["--check"], ["--dry-run"], ["--dry-run", "--debug"], ["--list"]], ids=" ".join)
def test_nothing_is_shown_before_a_build(site: Site, key: str, flags: list[str]) -> None:
    site.write(key)
    done = site.run(*flags)
    assert done.returncode == 0, done.stderr
    # The file is named: the commands are exact.
    assert (str(site.answer_file) in done.stdout) == ("--dry-run" in flags)


MISTAKES = {
    "the answer file twice": "kickstart = answers.cfg\n",
    "the answer file for a kernel": "installer_image = /dev/null\n",
    "a variable that is not there": "append = ${absent}\n",
    "a bad size": "cores = none\n",
    "the answer file for a directory": "output-dir = answers.cfg\n",
    # The cache matters only where something is fetched.
    "the answer file for the cache": "cache-dir = answers.cfg\nlinux = http://127.0.0.1:9/linux\n",
    "an upload that is not there": "upload_destinations = absent\n",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_do_not_show_it(site: Site, mistake: str) -> None:
    site.write(extra=MISTAKES[mistake])
    done = site.run("--debug")
    assert done.returncode == 2
    assert "image-factory: error: " in done.stderr


@pytest.mark.parametrize("section", ["", "[x]\n"])
def test_autoinstall_file_for_the_configuration(site: Site, section: str) -> None:
    """With a section it is one, with the key autoinstall."""
    site.write("autoinstall")
    site.answer_file.write_text(section + ANSWERS["autoinstall"])
    done = site.run("--check", IMAGE_FACTORY_CONFIG=str(site.answer_file))
    assert done.returncode == 2
    expected = "[x] autoinstall: a value of several lines is not accepted" if section else "line 2 comes before any"
    assert expected in done.stderr


@pytest.mark.parametrize("key", [key for key in ANSWERS if key != "autoinstall"])
@pytest.mark.parametrize("section", ["", "[x]\n"])
def test_answer_file_for_the_configuration(site: Site, key: str, section: str) -> None:
    site.write(key)
    site.answer_file.write_text(section + ANSWERS[key])
    done = site.run("--check", IMAGE_FACTORY_CONFIG=str(site.answer_file))
    assert done.returncode == 2
    assert f"{site.answer_file} (named by IMAGE_FACTORY_CONFIG), line {2 if section else 1} " in done.stderr


@pytest.mark.parametrize("flag", ["--check", "--dry-run", "--debug"])
def test_answer_file_of_someone_else(users: dict[str, User], flag: str) -> None:
    user = users["a"]
    site = Site(user, user.directory(f"foreign{os.urandom(2).hex()}"))
    for name in ("linux", "initrd"):
        (site.directory / name).touch()
    site.write()
    run("chown", "root", site.answer_file)
    done = site.run(flag)
    assert done.returncode == 2
    assert f"[x] preseed: {site.answer_file} can't be read: Permission denied." in done.stderr
    site.answer_file.unlink()


def log_file(site: Site) -> str:
    (path,) = site.directory.glob("*-[0-9][0-9].log")
    return path.read_text()


def test_build_that_virt_install_refuses(site: Site) -> None:
    """It ends before the answer file is copied."""
    site.write(extra="network = no-such-option=1\n")
    done = site.run("--log-file", "--debug")
    assert done.returncode == 1
    assert "image-factory: error: virt-install failed" in done.stderr
    assert PASSWORD not in log_file(site)


@pytest.mark.parametrize("key", ["preseed", "autoinstall"])
def test_build_whose_kernel_is_none(site: Site, key: str) -> None:
    """The answer file is in virt-install's copy of the initrd, or on the seed disk, when QEMU refuses the kernel."""
    site.write(key)
    done = site.run("--log-file", "--debug")
    assert done.returncode == 1, done.stderr
    assert "image-factory: error: " in done.stderr
    assert PASSWORD not in log_file(site)


def test_copies_are_private(site: Site) -> None:
    """At the moment that virt-install runs cpio all copies are there, those of a file that all may read, too."""
    site.write()
    site.answer_file.chmod(0o644)
    programs = site.directory / "bin"
    programs.mkdir()
    seen = site.directory / "seen"
    (programs / "cpio").write_text(
        f"#!/bin/sh\n{{ umask; find {site.directory}/.image-factory-x .. -type f -printf '%m %P\\n'; }} >{seen}\n"
        'exec /usr/bin/cpio "$@"\n'
    )
    (programs / "cpio").chmod(0o755)
    run("chown", site.user.name, site.directory)
    site.run(PATH=f"{programs}:/usr/bin:/bin")
    umask, *files = seen.read_text().splitlines()
    assert umask == "0077"
    found = {re.sub(r"(tmp|virtinst-)\w+", r"\1X", name) for name in files if not name.endswith("vm-name")}
    copies = {"answers/answers.cfg", "tmpX/answers.cfg", "virtinst-X-initrd", "virtinst-X-linux"}
    assert found == {f"600 {name}" for name in {*copies, "disk.raw"}}


# Logins and tokens of URIs.


def test_uris_are_shown_and_kept_without_their_secrets(site: Site, server: Server) -> None:
    """Neither by what is printed nor by what is written, whether the download succeeds or fails."""
    server.script = File(b"no kernel\n")
    login = f"me:{PASSWORD}@"
    there = server.uri(f"/netboot/linux?token={PASSWORD}&x=1").replace("//", f"//{login}")
    missing = f"http://{login}127.0.0.1:1/initrd?X-Amz-Signature={PASSWORD}"
    site.write(
        extra=f"linux = {there}\ncache-dir = {site.directory}/cache\nverify = none\n"
        "upload_destinations = up\nmanifest = yes\n"
        f"[y]\nbased-on = x\ninitrd = {missing} rsync://{login}127.0.0.1:1/pub/initrd\n"
        f"[up]\nupload_type = rsync\nupload_target = rsync://{login}127.0.0.1:1/up\n"
        f"upload_args = --rsh 'sshpass -p {PASSWORD} ssh'\n"
    )
    configuration = site.directory / "own.conf"
    # The second of two keys is an error.
    configuration.write_text(configuration.read_text().replace("linux = linux\n", ""))
    program = site.directory / "bin/sshpass"
    program.parent.mkdir()
    program.symlink_to("/bin/true")
    path = f"{program.parent}:/usr/bin:/bin"
    builds = [("x", "--json=x.json"), ("y", "--json=y.json")]
    for image, flag in [("x", "--check"), ("x", "--dry-run"), ("x", "--list-json"), *builds]:
        argv = site.user.argv(
            site.user.program, image, flag, *(["--log-file", "--debug"] if "json=" in flag else []),
            IMAGE_FACTORY_CONFIG=str(configuration), PATH=path,
        )  # fmt: skip
        done = run(*argv, check=False, cwd=site.directory)
        assert PASSWORD not in done.stdout + done.stderr
        assert "Internal error" not in done.stderr
        assert done.returncode == ("json=" in flag), done.stderr
    assert "127.0.0.1:1/initrd?X-Amz-Signature=***" in done.stderr
    assert (site.directory / "cache/x/linux").exists() and (site.directory / "x.json").exists()
    assert server.requests
    found = run("grep", "-rlF", "-e", PASSWORD, site.user.home, check=False).stdout.splitlines()
    assert set(found) == {str(configuration), str(site.answer_file)}
    configuration.unlink()


# Logins of uploads.


def test_login_of_an_upload_is_shown_nowhere(site: Site) -> None:
    """The dry run's commands name its file; who else could read that is refused before a build."""
    login = site.directory / "login"
    login.write_text(f"machine files.example.com login me password {PASSWORD}\n")
    login.chmod(0o600)
    run("chown", site.user.name, login)
    site.write(
        extra="upload_destinations = web\n[web]\nupload_type = http\nupload_target = https://files.example.com/\n"
        f"upload-credentials = {login}\n"
    )
    done = site.run("--check")
    assert done.returncode == 0, done.stderr
    done = site.run("--dry-run")
    assert done.returncode == 0, done.stderr
    [command] = [line for line in done.stdout.splitlines() if " --upload-file x-" in line and ".raw " in line]
    assert f" --netrc-file {login} " in command
    login.chmod(0o640)
    done = site.run("--check")
    assert done.returncode == 2
    assert f"[web] upload-credentials: others may read {login}." in done.stderr
    login.unlink()
    done = site.run()
    assert done.returncode == 2
    assert f"[web] upload-credentials: {login} is not there." in done.stderr
