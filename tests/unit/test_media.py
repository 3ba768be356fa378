"""Package sources on an installation medium, in every form that package managers read."""

import subprocess
from pathlib import Path

import pytest

from image_factory.finishing.seal import media
from image_factory.finishing.seal.actions import System
from image_factory.finishing.seal.operations import OPERATIONS

ONE = "etc/apt/sources.list"
DEB822 = "etc/apt/sources.list.d/x.sources"
DNF = "etc/yum.repos.d/x.repo"
ZYPP = "etc/zypp/repos.d/x.repo"


def without(path: str, text: str, *mounted: str) -> str:
    return media.without_media(path, text.encode(), mounted).decode()


MEDIA = [
    "cdrom:[Debian GNU/Linux 13.2.0 _Trixie_ - Official amd64 DVD Binary-1 with firmware 20251115-09:14]/",
    "cdrom:/",
    "CDROM:[x]/",
    "file:///cdrom",
    "file:/cdrom/",
    "file:/media/cdrom",
    "file:///media/apt/",
    "file:///media/user/Debian%20DVD",
    "copy:/media/cdrom0",
    "file:/run/live/medium",
    "file:///lib/live/mount/medium",
    "FILE:///cdrom",
    "file://localhost/cdrom",
    "file:////cdrom//",
    "file:/%63drom",
    "file:///run/install/repo/BaseOS",
    "file:///run/install/sources/mount-0000-cdrom/AppStream",
    "file:///mnt",
    "/run/install/repo",
    "cd:/?devices=/dev/disk/by-id/ata-QEMU_DVD-ROM_QM00001",
    "cd:///",
    "dvd:///?devices=/dev/sr0",
    "iso:/?iso=leap.iso&url=hd:/?device=/dev/sda1",
    "hd:/install?device=/dev/disk/by-label/Install-SUSE-x86_64",
    "dir:/run/initramfs/live/install",
    "dir:///mnt/install",
    "media://1234567890.123456#1",
]
OTHERS = [
    "http://deb.debian.org/debian",
    "https://cdrom.example.com/media/cdrom",
    "mirror+file:/etc/apt/mirrors.txt",
    "file:/srv/mirror",
    "file:///usr/share/cdrom",
    "file:///cdroms",
    "file:/var/www/media",
    "dir:/srv/media",
    "ftp://x/mnt",
    "tor+http://x/run",
]


@pytest.mark.parametrize("uri", MEDIA)
def test_every_spelling_of_a_medium(uri: str) -> None:
    assert media.is_medium(uri)
    for line in (f"deb {uri} x main\n", f"#deb {uri} x main\n", f" # deb-src [ arch=amd64 trusted=yes ] {uri} x\n"):
        assert without(ONE, f"{line}deb http://x/ y main\n") == "deb http://x/ y main\n"
        assert without(ONE, f"# about\n{line}") == ""
    stanza = f"Types: deb\nURIs: {uri}\nSuites: x\n"
    other = "Types: deb\nURIs: http://x/ \nSuites: x\n"
    assert without(DEB822, stanza) == ""
    assert without(DEB822, f"{stanza}\n{other}") == other
    assert without(DEB822, f"{other}\n# the medium\nEnabled: no\n{stanza.replace('URIs: ', 'uris:')}") == f"{other}\n"
    for path in (DNF, ZYPP):
        section = f"[medium]\nname=x\nenabled=0\nbaseurl={uri}\ngpgcheck=1\n"
        assert without(path, section) == ""
        assert without(path, f"[a]\nbaseurl=http://x/\n{section}[b]\nbaseurl=http://y/\n") == (
            "[a]\nbaseurl=http://x/\n[b]\nbaseurl=http://y/\n"
        )


@pytest.mark.parametrize("uri", OTHERS)
def test_other_sources_stay(uri: str) -> None:
    for path, text in (
        (ONE, f"deb {uri} x main\n# deb cdrom\n"),
        (DEB822, f"Types: deb\nURIs: {uri}\nSuites: x\n"),
        (DNF, f"[x]\nbaseurl={uri}\n\n# cdrom:\n"),
        (ZYPP, f"[x]\nbaseurl = {uri}\n"),
    ):
        assert without(path, text) == text


def test_several_uris_of_one_source() -> None:
    stanza = "# a\nTypes: deb\nURIs: file:///cdrom\n# between\n http://a/ cdrom:[b c d]/\n\thttp://b/\nSuites: x\n"
    assert without(DEB822, stanza) == "# a\nTypes: deb\nURIs: http://a/ http://b/\nSuites: x\n"
    section = "[x]\nbaseurl=file:///run/install/repo,\n  http://a/ http://b/\nenabled=1\n"
    assert without(DNF, section) == "[x]\nbaseurl=http://a/ http://b/\nenabled=1\n"
    section = "[x]\nmirrorlist=http://a/\nbaseurl=\n cd:/\n"
    assert without(DNF, section) == "[x]\nmirrorlist=http://a/\n"
    assert without("etc/apk/repositories", "/media/cdrom/apks\nhttp://a/v3\n#/media/usb/apks\n") == "http://a/v3\n"
    assert without("etc/zypp/services.d/x.service", "[x]\nurl = dvd:/\n") == ""


def test_what_the_system_mounts_itself_stays() -> None:
    text = "[x]\nbaseurl=file:///mnt/repo/os\n"
    assert without(DNF, text) == ""
    assert without(DNF, text, "", "mnt/repo") == text
    assert without(DNF, text, "mnt/rep") == ""


def test_bytes_that_are_no_text() -> None:
    data = b"# \xff\xfe\r\ndeb cdrom:[\xff]/ x main\r\ndeb http://x/ y \xe9\r\n"
    assert media.without_media(ONE, data) == b"# \xff\xfe\r\ndeb http://x/ y \xe9\r\n"


def test_apt_takes_what_is_left(tmp_path: Path) -> None:
    """apt itself updates its lists from the files that are left, and could not before."""
    parts, repository, state = tmp_path / "parts", tmp_path / "repository", tmp_path / "state"
    for directory in (parts, repository, state / "lists/partial", state / "cache"):
        directory.mkdir(parents=True)
    (repository / "Packages").touch()
    files = {
        "a.sources": f"Types: deb\nURIs: cdrom:/ file:{repository}\nSuites: ./\nTrusted: yes\n\n"
        "Types: deb\nURIs: file:///cdrom\nSuites: x\nComponents: main\n",
        "b.list": f"deb [trusted=yes] file:/cdrom x main\ndeb [trusted=yes] file:{repository} ./\n",
    }
    options = [
        f"-oDir::Etc::SourceParts={parts}",
        "-oDir::Etc::SourceList=/dev/null",
        f"-oDir::State={state}",
        f"-oDir::Cache={state}/cache",
        "-oAPT::Sandbox::User=root",
    ]

    def updates() -> bool:
        return subprocess.run(["apt-get", "update", "-q", *options], capture_output=True).returncode == 0

    for name, text in files.items():
        (parts / name).write_text(text)
    assert not updates()
    for name, text in files.items():
        left = without(f"etc/apt/sources.list.d/{name}", text)
        assert str(repository) in left
        (parts / name).write_text(left)
    assert updates()


def test_sealing_forgets_media() -> None:
    """A file of sources that has no others goes, and what apt knows of the CDs."""
    cdrom = "etc/apt/sources.list.d/cdrom.sources"
    files = {
        "etc/fstab": b"UUID=1 / ext4 defaults 0 1\nUUID=2 /mnt/repo ext4 defaults 0 2\n"
        b"/dev/sr0 /mnt/cd iso9660 ro 0 0\n"
        b"UUID=2025-11-15-09-14-00-00 /cdrom iso9660 ro 0 0\n/srv/x.iso /media/x iso9660 loop 0 0\n",
        cdrom: b"Types: deb\nURIs: file:///cdrom\nSuites: noble\n",
        DNF: b"[a]\nbaseurl=file:///mnt/repo\n[b]\nbaseurl=file:///mnt/cd\n",
    }
    [operation] = [found for found in OPERATIONS if found.name == "installation-media"]
    actions = operation.actions(System(files, dict.fromkeys(files, "file"), (), ()))
    assert cdrom in actions.remove
    assert "var/lib/apt/cdroms.list*" in actions.remove
    assert actions.write == {
        "etc/fstab": b"UUID=1 / ext4 defaults 0 1\nUUID=2 /mnt/repo ext4 defaults 0 2\n"
        b"/srv/x.iso /media/x iso9660 loop 0 0\n",
        DNF: b"[a]\nbaseurl=file:///mnt/repo\n",
    }
