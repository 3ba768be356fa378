"""The ways to install the program, and its release."""

import ast
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from image_factory import __version__

from ..conftest import REPOSITORY, copy_checkout, run


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("copy")
    copy_checkout(directory)
    return directory


def images(program: Path, *, cwd: Path) -> str:
    return run("env", "-i", f"HOME={cwd}", "PATH=/usr/bin:/bin", program, "--list", cwd=cwd).stdout


def test_from_the_checkout(tmp_path: Path) -> None:
    assert "Debian-13-server " in images(REPOSITORY / "image-factory", cwd=tmp_path)


def test_make_install(copy: Path, tmp_path: Path) -> None:
    run("make", "-C", copy, "install", "PREFIX=/opt/x", f"DESTDIR={tmp_path}/root")
    prefix = tmp_path / "root/opt/x"
    assert (prefix / "share/image-factory/build-record.schema.json").is_file()
    assert "Debian-13-server " in images(prefix / "bin/image-factory", cwd=tmp_path)
    assert run(prefix / "share/image-factory/disk-image-create", "--version").stdout == f"image-factory {__version__}\n"
    helper = prefix / "bin/image-factory-sudo-helper"
    assert helper.read_text().startswith("#!/usr/bin/python3 -I\n")
    assert run(helper, "version").stdout == f"{__version__}\n"
    assert "image-factory" in (prefix / "share/bash-completion/completions/image-factory").read_text()
    for page in ("image-factory.1", "image-factory-sudo-helper.1"):
        assert f"image-factory {__version__}" in (prefix / "share/man/man1" / page).read_text()


def test_pip_install(copy: Path, tmp_path: Path) -> None:
    """Debian's own httplib2, pyparted and rich serve, so that the test needs no registry."""
    run("/usr/bin/python3", "-m", "venv", "--system-site-packages", tmp_path / "venv")
    pip = (tmp_path / "venv/bin/pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, copy)
    assert "Debian-13-server " in images(tmp_path / "venv/bin/image-factory", cwd=tmp_path)
    assert (tmp_path / "venv/share/image-factory/build-record.schema.json").is_file()
    frontend = tmp_path / "venv/share/image-factory/disk-image-create"
    assert run("/usr/bin/python3", frontend, "--version").stdout == f"image-factory {__version__}\n"
    helper = tmp_path / "venv/bin/image-factory-sudo-helper"
    assert helper.read_text().startswith("#!/usr/bin/python3 -I\n")
    assert os.access(helper, os.X_OK)


@pytest.mark.outside
def test_pip_install_of_all_that_is_needed(copy: Path, tmp_path: Path) -> None:
    """Nothing is Debian's but Python itself: pyparted is compiled."""
    run("/usr/bin/python3", "-m", "venv", tmp_path / "venv")
    run(tmp_path / "venv/bin/pip", "install", "--quiet", copy)
    assert "Debian-13-server " in images(tmp_path / "venv/bin/image-factory", cwd=tmp_path)
    python = (tmp_path / "venv/bin/python3", "-I", "-c")
    assert run(*python, "import parted; print(parted.__file__)").stdout.startswith(f"{tmp_path}/venv/")
    # Without, no proxy can be used.
    run(*python, "import httplib2; assert httplib2.socks")


def test_release(copy: Path, tmp_path: Path) -> None:
    """The tarball has the files of the commit, and is the same when it is made again."""
    assert run("make", "-s", "-C", copy, "version").stdout == f"{__version__}\n"
    git = ("git", "-C", copy, "-c", "user.name=x", "-c", "user.email=x@localhost")
    run(*git, "init", "-q")
    run(*git, "add", ".")
    run(*git, "commit", "-q", "-m", "x")
    tarball = copy / f"image-factory-{__version__}.tar.xz"
    made = []
    for _ in range(2):
        run("make", "-C", copy, "dist")
        made.append(tarball.read_bytes())
    assert made[0] == made[1]
    with tarfile.open(tarball) as archive:
        names = archive.getnames()
    for name in ("LICENSE", "README.md", "image_factory/cli.py", "tests/stand_in/build", "data/image-factory.conf"):
        assert f"image-factory-{__version__}/{name}" in names
    run("make", "-C", copy, "clean")
    assert not tarball.exists()


def test_helper_has_the_version() -> None:
    text = (REPOSITORY / "image-factory-sudo-helper").read_text()
    assert re.search(r'^VERSION = "(.+)"$', text, re.MULTILINE).group(1) == __version__  # type: ignore[union-attr]


def test_python_is_debians() -> None:
    """pyparted and libvirt's tools are of Debian's Python, whatever comes first on PATH."""
    assert sys.version_info >= (3, 11)
    assert (REPOSITORY / "image-factory").read_text().startswith("#!/usr/bin/python3\n")


def modules(script: Path) -> dict[Path, set[str]]:
    """Return the Python files of this repository that *script* is made of, each with what it imports."""
    found: dict[Path, set[str]] = {}
    new = [script, *([REPOSITORY / "tests/conftest.py"] if script.suffix else [])]
    while new:
        path = new.pop()
        if path in found:
            continue
        found[path] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                above = ".".join(path.relative_to(REPOSITORY).parent.parts[: -node.level + 1 or None])
                base = ".".join(filter(None, (above if node.level else "", node.module)))
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            for name in names:
                file = REPOSITORY / name.replace(".", "/")
                own = [file.with_suffix(".py"), file / "__init__.py"]
                new += [path for path in own if path.is_file()]
                found[path].add(name.partition(".")[0])
    return found


def packages(target: str, directory: Path) -> set[str]:
    """Return the packages that *target* of the Makefile installs where they are missing."""
    for name in ("dpkg-query", "apt-cache"):
        (directory / name).write_text(f'#!/bin/sh\neval echo \\"\\$$#\\" >>{directory}/asked\necho -n installed\n')
        (directory / name).chmod(0o755)
    run(REPOSITORY / "tests/install-packages", target, env={"PATH": f"{directory}:/usr/bin:/bin"})
    return set((directory / "asked").read_text().split())


@pytest.mark.parametrize(
    ("target", "script", "least"),
    [
        # The demo needs nothing beside the standard library itself.
        ("demo", "tests/programs/demo", 0),
        ("demo", "image-factory", 3),
        ("bench", "tests/programs/bench", 3),
        ("bench", "tests/programs/bench_fleet.py", 2),
    ],
)
def test_target_installs_what_its_scripts_import(target: str, script: str, least: int, tmp_path: Path) -> None:
    """Only those of Debian's packages count that the target names, not what this machine happens to have."""
    imported = (
        set().union(*modules(REPOSITORY / script).values()) - sys.stdlib_module_names - {"image_factory", "tests"}
    )
    wanted = {f"python3-{name.removeprefix('_ped') or 'parted'}" for name in imported}
    assert len(wanted) >= least
    assert wanted - packages(target, tmp_path) == set()


@pytest.mark.parametrize(
    ("target", "missing", "package"),
    [
        ("doc", "pandoc", "pandoc"),
        ("all", "register-python-argcomplete", "python3-argcomplete"),
        ("dist", "git", "git"),
        ("dist", "xz", "xz-utils"),
    ],
)
def test_missing_program(copy: Path, tmp_path: Path, target: str, missing: str, package: str) -> None:
    """It is named with its package; and nothing half is left, which make would take for made the next time."""
    fresh = tmp_path / "fresh"
    shutil.copytree(copy, fresh, ignore=shutil.ignore_patterns("*.tar.xz"))
    for made in (*fresh.glob("*.1"), *fresh.glob("*.bash-completion")):
        made.unlink()
    for program in ("sed", "sh", "pandoc", "git", "xz", "echo", "rm"):
        if program != missing:
            (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    done = run("/usr/bin/make", "-C", fresh, target, check=False, env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert f"make: {missing} is missing: apt-get install {package}\n" in done.stderr
    assert not [*fresh.glob("*.bash-completion"), *fresh.glob("*.tar.xz*")]


def test_release_of_no_repository(copy: Path, tmp_path: Path) -> None:
    """What git refuses makes no empty release."""
    fresh = tmp_path / "fresh"
    shutil.copytree(copy, fresh, ignore=shutil.ignore_patterns(".git", "*.tar.xz"))
    done = run("make", "-C", fresh, "dist", check=False)
    assert done.returncode == 2
    assert not [*fresh.glob("*.tar*")]


def test_jenkinsfile_is_linted_where_something_has_changed(copy: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    shutil.copytree(copy, fresh)
    version = re.search(r"^GROOVY_LINT_VERSION := (\S+)$", (fresh / "Makefile").read_text(), re.MULTILINE)
    assert version
    linter = f".venv/groovy-lint-{version[1]}"

    def is_linted() -> bool:
        return "--files Jenkinsfile" in run("make", "-C", fresh, "--dry-run", "lint-groovy").stdout

    assert is_linted()
    for name in (".venv/bin/ruff", f"{linter}/package.json", f"{linter}/passed"):
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        (fresh / name).touch()
    assert not is_linted()
    for name in ("contrib/jenkins/Jenkinsfile", "contrib/jenkins/.groovylintrc.json", f"{linter}/package.json"):
        before = (fresh / name).stat().st_mtime_ns
        os.utime(fresh / name, ns=(before, before + 3600 * 10**9))
        assert is_linted(), name
        os.utime(fresh / name, ns=(before, before))
        assert not is_linted(), name
    makefile = (fresh / "Makefile").read_text()
    (fresh / "Makefile").write_text(
        makefile.replace(f"GROOVY_LINT_VERSION := {version[1]}", "GROOVY_LINT_VERSION := 0")
    )
    assert is_linted()
