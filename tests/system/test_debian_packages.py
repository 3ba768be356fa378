"""The packages of a Debian that is bootstrapped, and of one that the installer makes: what differs, and why.

apt resolves both from the lists of the mirror.  What the installer chooses by itself is what the scripts of its
components install on a machine of QEMU's.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.configuration import files
from image_factory.model import Plan
from image_factory.sources import answers
from image_factory.sources.bootstrap import recipe

from ..conftest import REPOSITORY

MIRROR = "http://deb.debian.org/debian"

# What asks for a package: a component of the installer, with the packages that come with what they recommend.
ASKED_BY = {
    "base-installer": "busybox zstd initramfs-tools linux-image-amd64",
    "console-setup": "keyboard-configuration console-setup",
    "hw-detect": "udev pciutils usbutils qemu-guest-agent",
    "localechooser": "locales",
    "partman-ext3": "e2fsprogs",
    "pkgsel": "laptop-detect tasksel",
    "grub-installer": "os-prober grub-pc",
}
# And without.
ASKED_ALONE_BY = {"rootskel": "installation-report"}

# Why packages are only where the installer was; names of those that come along are there, too.
INSTALLER_ALONE = {
    "A keyboard and a font for a console that somebody sits at; clouds have a serial one.": (
        "console-setup console-setup-linux kbd keyboard-configuration xkb-data"
    ),
    "The installer notes what the machine has that it runs on; another machine has other hardware.": (
        "laptop-detect libpci3 libusb-1.0-0 pci.ids pciutils usbutils"
    ),
    "It reports on itself; sealing removes the logs.": "installation-report",
}
# The same, since Debian 13: before, each system has them.
INSTALLER_ALONE_SINCE = {"13": {"It asks for tasks with this; none is chosen.": "tasksel tasksel-data"}, "12": {}}
# Why they are only where it was not.
BOOTSTRAP_ALONE = {
    "13": {
        "In the installer names of servers have to be known to the end: it takes nothing that these recommend.": (
            "libnss-myhostname libnss-resolve"
        ),
        "The same: netplan recommends them for its messages.": (
            "python3-linkify-it python3-markdown-it python3-mdurl python3-pygments python3-rich python3-uc-micro"
        ),
    },
    "12": {},
}


@dataclass(frozen=True)
class Apt:
    """apt with lists of its own, on a system that has no package; *directory* is its."""

    directory: Path

    @classmethod
    def updated(cls, directory: Path, sources: list[str]) -> "Apt":
        for name in ("lists/partial", "cache/archives/partial", "parts"):
            (directory / name).mkdir(parents=True)
        (directory / "none").touch()
        (directory / "sources.list").write_text("".join(f"{line}\n" for line in sources))
        self = cls(directory)
        self.run("apt-get", "none", "update", "--error-on=any")
        return self

    def run(self, program: str, status: str, *words: str) -> str:
        own = {
            "Dir::Etc::sourcelist": "sources.list", "Dir::Etc::sourceparts": "parts", "Dir::Etc::main": "none",
            "Dir::Etc::parts": "parts", "Dir::Etc::preferencesparts": "parts", "Dir::State": "",
            "Dir::State::lists": "lists", "Dir::State::status": status, "Dir::Cache": "cache",
        }  # fmt: skip
        options = [f"{key}={self.directory / name}" for key, name in own.items()]
        options += ["APT::Architecture=amd64", "APT::Architectures=amd64", "APT::Sandbox::User=root"]
        argv = [program, *(word for option in options for word in ("-o", option)), "-o", "Acquire::Languages=none"]
        done = subprocess.run([*argv, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def installed(self, status: str, packages: str, *, recommends: bool) -> set[str]:
        """Return what comes when *packages* are installed on a system with *status*."""
        option = f"APT::Install-Recommends={str(recommends).lower()}"
        text = self.run("apt-get", status, "-s", "-o", option, "install", *packages.split())
        return set(re.findall(r"^Inst (\S+)", text, re.MULTILINE))

    def base(self, variant: str) -> set[str]:
        """Return what each system of *variant* has, and note it as the status ``base``."""
        priorities = "|".join(recipe.PRIORITIES[variant])
        stanzas = self.run("apt-cache", "none", "dumpavail").split("\n\n")
        pattern = re.compile(rf"^(?:Essential: yes|Priority: (?:{priorities}))$", re.MULTILINE)
        names = " ".join(stanza.split("\n", 1)[0].split()[1] for stanza in stanzas if pattern.search(stanza))
        found = self.installed("none", names, recommends=False)
        text = self.run("apt-cache", "none", "show", "--no-all-versions", *found)
        (self.directory / "base").write_text(re.sub("(?m)^(Package: .*)$", r"\1\nStatus: install ok installed", text))
        return found


def plan_of(directory: Path, section: str) -> Plan:
    path = directory / f"{section}.conf"
    shipped = (REPOSITORY / "data/image-factory.conf").read_text(encoding="utf-8")
    path.write_text(f"{shipped}[x]\nbased_on = {section}\nfirmware = bios\n", encoding="utf-8")
    return pipeline.make_plan(files.Configuration({files.FILE_VARIABLE: str(path)}), "x", {})


def without_purged(found: set[str], text: str) -> set[str]:
    """Return *found* without what *text*, a script, purges."""
    return found - {*re.findall(r"purge (\S+)", text)}


@pytest.mark.outside
@pytest.mark.parametrize("release", ["13", "12"])
def test_two_debians(tmp_path: Path, release: str) -> None:
    bootstrapped = recipe.read(plan_of(tmp_path, f"Debian-{release}-cloud"))
    assert MIRROR in bootstrapped.lines[0] and shutil.which("apt-get")
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    apt = Apt.updated(tmp_path, [line.replace("deb ", f"deb [signed-by={keyring}] ") for line in bootstrapped.lines])
    base = apt.base(bootstrapped.variant)
    packages = apt.installed("base", " ".join(bootstrapped.packages), recommends=bootstrapped.recommends)
    cloud = without_purged(base | packages, bootstrapped.script)

    told = answers.content(plan_of(tmp_path, f"Debian-{release}-server")).decode()
    [included] = re.findall("^d-i pkgsel/include string (.*)$", told, re.MULTILINE)
    late = " ".join(re.findall(r"--no-install-recommends install ([^&]*)", told))
    asked = apt.installed("base", " ".join([*ASKED_BY.values(), included]), recommends=True)
    alone = apt.installed("base", " ".join([*ASKED_ALONE_BY.values(), *sorted(asked), late]), recommends=False)
    server = without_purged(base | asked | alone, told)

    reasons = INSTALLER_ALONE | INSTALLER_ALONE_SINCE[release]
    assert sorted(server - cloud) == sorted(" ".join(reasons.values()).split())
    assert sorted(cloud - server) == sorted(" ".join(BOOTSTRAP_ALONE[release].values()).split())
    assert len(server & cloud) > 200
