"""The Debian package: built, compared, looked at; tests/programs/package-check uses it on clean systems."""

import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_factory import __version__
from image_factory.base.command import PACKAGES
from image_factory.configuration import files
from image_factory.configuration.files import Configuration

from ..conftest import REPOSITORY, copy_checkout, run

DEBIAN = REPOSITORY / "debian"
DEB = f"image-factory_{__version__}_all.deb"
SHARED = "usr/share/image-factory"
# What a build could take over from its surroundings: directory, umask, time zone, language, user's variables.
SURROUNDINGS = {
    "one": (0o022, {"TZ": "UTC", "LC_ALL": "C.UTF-8", "HOME": "/root"}),
    "another/place": (0o077, {"TZ": "Pacific/Apia", "LC_ALL": "C", "HOME": "/nonexistent", "USER": "someone"}),
}
CONTENTS = {
    "etc/image-factory.conf",
    "usr/bin/image-factory",
    "usr/bin/image-factory-sudo-helper",
    "usr/share/bash-completion/completions/image-factory",
    "usr/share/doc/image-factory/NEWS.Debian.gz",
    "usr/share/doc/image-factory/NEWS.md.gz",
    "usr/share/doc/image-factory/README.md.gz",
    "usr/share/doc/image-factory/changelog.gz",
    "usr/share/doc/image-factory/copyright",
    "usr/share/doc/image-factory/examples/Jenkinsfile",
    "usr/share/doc/image-factory/examples/image-factory.yaml",
    "usr/share/doc/image-factory/examples/sudoers",
    "usr/share/image-factory/disk-image-create",
    "usr/share/lintian/overrides/image-factory",
    "usr/share/man/man1/image-factory-sudo-helper.1.gz",
    "usr/share/man/man1/image-factory.1.gz",
    # Where the modules are compiled again when Python changes.
    "usr/share/python3/runtime.d/image-factory.rtupdate",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The directories with what two builds in different surroundings have made."""
    directories = []
    for name, (umask, environment) in SURROUNDINGS.items():
        directory = tmp_path_factory.mktemp("debian") / name
        # dpkg-source puts its name into the tarball.
        source = directory / "image-factory"
        copy_checkout(source)
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        argv = ["env", "-i", f"PATH={path}", *(f"{key}={value}" for key, value in environment.items())]
        run(*argv, "dpkg-buildpackage", "-us", "-uc", cwd=source, umask=umask)
        directories.append(directory)
    yield directories


def fields(paragraph: int) -> dict[str, str]:
    """Return the fields of the source (0) or the binary package (1)."""
    text = (DEBIAN / "control").read_text().split("\n\n")[paragraph]
    return dict(re.findall(r"^(\S+?):\s*(.*(?:\n .*)*)", text, re.MULTILINE))


def packages(field: str) -> set[str]:
    words = re.split(r"[,|]", fields(1)[field])
    return {word.split()[0] for word in words if word.strip() and "$" not in word}


def test_builds_are_identical(built: list[Path]) -> None:
    for name in (DEB, f"image-factory_{__version__}.tar.xz"):
        # It says what differs.
        run("diffoscope", *(directory / name for directory in built))


def test_lintian(built: list[Path]) -> None:
    argv = ("lintian", "--allow-root", "--pedantic", "--fail-on", "error,warning,info,pedantic")
    assert run(*argv, *built[0].glob("*.changes")).stdout == ""


def test_each_override_is_explained() -> None:
    for path in (DEBIAN / "image-factory.lintian-overrides", DEBIAN / "source/lintian-overrides"):
        lines = path.read_text().splitlines()
        assert lines
        for before, line in zip(["", *lines], lines, strict=False):
            assert line.startswith("#") or before.startswith("#")


def test_contents(built: list[Path], tmp_path: Path) -> None:
    archive = tmp_path / "data.tar"
    run("sh", "-c", 'dpkg-deb --fsys-tarfile "$1" >"$2"', "sh", built[0] / DEB, archive)
    with tarfile.open(archive) as data:
        members = {member.name.removeprefix("./"): member for member in data if not member.isdir()}
        helper = data.extractfile(members["usr/bin/image-factory-sudo-helper"])
        assert helper is not None
        # The package's tools may write the first line of a program anew.
        assert helper.read() == (REPOSITORY / "image-factory-sudo-helper").read_bytes()
    modules = {f"{SHARED}/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.glob("image_factory/**/*.py")}
    recipes = {f"{SHARED}/{path.name}" for path in (REPOSITORY / "data").iterdir()}
    assert members.keys() == CONTENTS | modules | recipes
    for name, member in members.items():
        assert (member.uid, member.gid) == (0, 0)
        is_program = "/bin/" in name or name.endswith((".rtupdate", "/disk-image-create"))
        assert stat.S_IMODE(member.mode) == (0o755 if is_program else 0o644), name
    listed = run("dpkg-deb", "--info", built[0] / DEB, "conffiles").stdout
    assert listed == "/etc/image-factory.conf\n"


def test_versions() -> None:
    assert run("dpkg-parsechangelog", "-l", DEBIAN / "changelog", "-S", "Version").stdout == f"{__version__}\n"
    first = (DEBIAN / "NEWS").read_text().splitlines()[0]
    assert first.startswith("image-factory (")
    assert (REPOSITORY / "NEWS.md").read_text().startswith(f"# image-factory {__version__}")


def test_each_program_comes_with_a_package() -> None:
    """What image-factory tells the user to install is known to the package."""
    related = packages("Depends") | packages("Recommends") | packages("Suggests")
    # No Debian is without these.
    everywhere = {"bash", "coreutils", "dash", "diffutils", "findutils", "gzip", "hostname", "mount", "tar"}
    assert set(PACKAGES.values()) - everywhere - {"util-linux"} <= related


def test_readme_and_make_check_have_the_dependencies() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    command = re.search(
        r"^    apt-get install --no-install-recommends (python3-httplib2(?:.*\\\n)*.*)", readme, re.MULTILINE
    )
    assert command is not None
    # The first alternative brings what else there is of libvirt.
    parts = {"libvirt-daemon", "libvirt-daemon-driver-qemu", "libvirt-daemon-driver-storage"}
    needed = packages("Depends") - {"python3"} - parts
    # Which of the recommended ones a user needs is told beside it.
    assert set(command[1].replace("\\", "").split()) - {"sudo"} == needed
    installed = re.findall(r"[a-z0-9.+-]+", (REPOSITORY / "tests/install-packages").read_text())
    assert needed <= {*installed, "debian-archive-keyring"}


def test_the_example_configuration_changes_nothing() -> None:
    lines = (DEBIAN / "image-factory.conf").read_text().splitlines()
    assert all(not line or line.startswith("#") for line in lines)


def test_the_example_configuration_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DEBIAN / "image-factory.conf").read_text()
    path = tmp_path / "image-factory.conf"
    path.write_text(re.sub(r"^#(?! )", "", text, flags=re.MULTILINE))
    monkeypatch.setattr(files, "SYSTEM_FILE", path)
    monkeypatch.setenv("HOME", str(tmp_path))
    configuration = Configuration({})
    assert path in configuration.files
    image = configuration.image("Debian-13-server-de", {})
    assert image.upload_destinations == ("images",)
    assert "locale" in configuration.variables("Debian-13-server-de", {})
    assert configuration.destination("images", "x.qcow2", named_by="x").target.startswith("jenkins@")


def test_the_documented_rule() -> None:
    path = DEBIAN / "sudoers"
    assert "parsed OK" in run("visudo", "-c", "-f", path).stdout
    rule = path.read_text().splitlines()[-1]
    for page in ("README.md", "image-factory-sudo-helper.1.md"):
        assert rule in map(str.strip, (REPOSITORY / page).read_text().splitlines())
