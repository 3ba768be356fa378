"""Recipes of what is bootstrapped: each mistake is told with file, line and key."""

from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.base.errors import ConfigurationError
from image_factory.configuration import files
from image_factory.model import Plan
from image_factory.sources import SOURCES
from image_factory.sources.bootstrap import recipe

from ..conftest import REPOSITORY

LISTED = "sources:\n- deb http://mirror.example.com/debian trixie main\n"
GOOD = f"suite: trixie\n{LISTED}"


def make_plan(directory: Path, text: str | bytes) -> Plan:
    data = text.encode() if isinstance(text, str) else text
    (directory / "own.yaml").write_bytes(data)
    path = directory / "own.conf"
    path.write_text(f"[x]\nsource = bootstrap\nbootstrap = {directory}/own.yaml\nimage-size = 3G\n")
    configuration = files.Configuration({files.FILE_VARIABLE: str(path)})
    return pipeline.make_plan(configuration, "x", {"output-dir": str(directory)})


MISTAKES: dict[str, tuple[str | bytes, str]] = {
    "no YAML": (f"{GOOD}packages: [a\n", ", line 5: it is no well-formed YAML: "),
    "control character": ("suite: a\0b\n", ": it is no well-formed YAML: "),
    "too deep": ("[" * 5000, ": it is no well-formed YAML: too many lists"),
    "not UTF-8": (b"suite: \xff\n", " is not UTF-8."),
    "a list": ("- suite\n", " has no keys and values."),
    "nothing": ("", " has no keys and values."),
    "no suite": (LISTED, " lacks suite."),
    "nothing that is needed": ("script: x\n", " lacks suite and sources."),
    "no sources": ("suite: trixie\nsources: []\n", " lacks sources."),
    "unknown key": (f"{GOOD}package: x\n", ", line 4: 'package' is no key of it."),
    "key that is a list": (f"{GOOD}? [a, b]\n: c\n", ", line 4: "),
    "twice": (f"{GOOD}suite: sid\n", ", line 4: suite is there twice."),
    "suite that is an option": (f"suite: --help\n{LISTED}", ", line 1: suite is not accepted, only the name of one."),
    "suite that is a list": (f"suite: [a]\n{LISTED}", ", line 1: suite is not accepted"),
    "variant": (
        f"{GOOD}variant: custom\n",
        ", line 4: variant is not accepted, only minbase or important or standard.",
    ),
    "sources that is a text": ("suite: a\nsources: deb http://x a main\n", ", line 2: sources is not accepted, only a"),
    "mirror that is none": ("suite: a\nsources:\n- deb http://x a main\n- [x]\n", ", line 4: sources is not accepted"),
    "no mirrors": ("suite: a\nsources:\n- []\n", ", line 3: sources is not accepted"),
    "mirrors of mirrors": ("suite: a\nsources:\n- - [deb http://x a main]\n", ", line 3: sources is not accepted"),
    "itself": ("suite: a\nsources: &a\n- *a\n", ", line 2: sources is not accepted"),
    # mmdebstrap would read a file.
    "source that is a path": ("suite: a\nsources:\n- /etc/passwd\n", ", line 3: sources is not accepted"),
    "source without a suite": ("suite: a\nsources: [deb http://x]\n", ", line 2: sources is not accepted"),
    "source of two lines": ('suite: a\nsources: ["deb http://x a main\\ndeb y"]\n', ", line 2: sources is not"),
    # apt would run what it says, outside of the tree.
    "package that is an option": (
        f"{GOOD}packages: vim -oDpkg::Pre-Invoke::=id\n",
        ", line 4: packages is not accepted",
    ),
    "package that is a file": (f"{GOOD}packages: /tmp/x.deb\n", ", line 4: packages is not accepted"),
    "packages with a comma": (f"{GOOD}packages: a,b\n", ", line 4: packages is not accepted"),
    "recommends": (f"{GOOD}recommends: perhaps\n", ", line 4: recommends is not accepted, only true or false."),
    "proxy with a quote": (f'{GOOD}proxy: \'http://x";Dpkg::Pre-Invoke {{"id";}};//\'\n', ", line 4: proxy is not"),
    "script": (f"{GOOD}script: [a]\n", ", line 4: script is not accepted, only a text."),
    "odd tag": (f"{GOOD}script: !!timestamp x\nrecommends: !!bool [x]\n", ", line 5: recommends is not accepted"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told(name: str, tmp_path: Path) -> None:
    text, message = MISTAKES[name]
    with pytest.raises(ConfigurationError) as caught:
        recipe.read(make_plan(tmp_path, text))
    assert f"{tmp_path}/own.yaml{message}" in caught.value.message
    assert "\n" not in caught.value.message


def test_what_is_accepted(tmp_path: Path) -> None:
    text = (
        "suite: 13.1\nsources: ['deb [signed-by=/k.gpg] copy:/a/b ./', 'deb-src http://x a main  contrib']\n"
        "packages: >\n  vim g++-12 libc6:i386\n  linux=6.1~rc1+b1 bash/sid\nrecommends: no\nproxy:\nvariant: minbase\n"
        "script: |\n  true\n"
    )
    found = recipe.read(make_plan(tmp_path, text))
    assert found.suite == "13.1"
    assert found.lines == ("deb [signed-by=/k.gpg] copy:/a/b ./", "deb-src http://x a main  contrib")
    assert found.packages == ("vim", "g++-12", "libc6:i386", "linux=6.1~rc1+b1", "bash/sid")
    assert (found.recommends, found.proxy, found.script) == (False, "", "true\n")


MIRRORS = """\
suite: a
sources:
- [deb http://u:p@x/d a main, deb http://y/d a main, deb http://x/d/e a main]
- - deb http://x/d/ a-updates main
  - deb http://y/d a-updates main
- [deb http://x/s a main, deb http://y/s a main]
"""


def test_mirrors_are_given_up_one_by_one(tmp_path: Path) -> None:
    """Of each source that has the same one: the one whose URI, as apt prints it, is the longest that fits."""
    every = recipe.read(make_plan(tmp_path, MIRRORS))
    assert every.lines == ("deb http://u:p@x/d a main", "deb http://x/d/ a-updates main", "deb http://x/s a main")
    left = every.without("http://x/d/dists/a/InRelease")
    assert left and left.lines == ("deb http://y/d a main", "deb http://y/d a-updates main", "deb http://x/s a main")
    assert recipe.mirrors(left.lines) == ["http://y/d/", "http://x/s/"]
    last = left.without("http://x/s")
    assert last and last.lines[2] == "deb http://y/s a main"
    # The second source has none left then.
    assert last.without("http://y/d") is None
    assert every.without("http://x/data") is every.without("http://proxy:3128") is None


def test_keys_name_several_mirrors(tmp_path: Path) -> None:
    """Each source of the shipped recipes is asked for at each of them, as --online does."""
    shipped = (REPOSITORY / "data/image-factory.conf").read_text(encoding="utf-8")
    path = tmp_path / "own.conf"
    for name, suite in {"Debian-13-cloud": "trixie", "Ubuntu-26.04-cloud": "resolute"}.items():
        keys = "mirror = http://a/d http://b/d,\n  http://a/d\nsecurity-mirror = https://s/d\n  https://t/d\n"
        path.write_text(f"{shipped}[x]\nbased_on = {name}\n{keys}", encoding="utf-8")
        plan = pipeline.make_plan(files.Configuration({files.FILE_VARIABLE: str(path)}), "x", {})
        found = recipe.read(plan)
        components = found.lines[0].partition(f" {suite} ")[2]
        assert found.sources == tuple(
            tuple(f"deb {uri} {suite}{pocket} {components}" for uri in uris)
            for pocket, uris in {
                "": ("http://a/d", "http://b/d"),
                "-updates": ("http://a/d", "http://b/d"),
                "-security": ("https://s/d", "https://t/d"),
            }.items()
        )
        assert len(SOURCES["bootstrap"].remote(plan)) == 6
    path.write_text(f"{shipped}[x]\nbased_on = Debian-13-cloud\nmirror = http://a/d ftp://b/d\n", encoding="utf-8")
    plan = pipeline.make_plan(files.Configuration({files.FILE_VARIABLE: str(path)}), "x", {})
    with pytest.raises(ConfigurationError, match=r"mirror: 'http://a/d ftp://b/d' is not accepted, only a URL .* or"):
        recipe.read(plan)


@pytest.mark.parametrize("character", ['"', "\\", "$", "\n"])
def test_path_that_a_program_reads_otherwise(character: str, tmp_path: Path) -> None:
    plan = make_plan(tmp_path, GOOD)
    directory = tmp_path / f"a{character}b"
    configuration = files.Configuration({files.FILE_VARIABLE: str(tmp_path / "own.conf")})
    plan = pipeline.make_plan(configuration, "x", {"output-dir": str(directory)})
    with pytest.raises(ConfigurationError, match=r"output-dir: .* in it, as no path of a tree may"):
        pipeline.check_plan(plan)


KEYS = "weak-dependencies = no\nproxy = http://proxy.example:3128\npackages = g++-12 vim\nkernel-arguments = a=b c"


@pytest.mark.parametrize("lines", ["", KEYS], ids=["as shipped", "with keys"])
@pytest.mark.parametrize("name", ["Debian-13-cloud", "Debian-12-cloud", "Ubuntu-26.04-cloud"])
def test_shipped_recipes(tmp_path: Path, name: str, lines: str) -> None:
    """What Secure Boot needs is there whether or not packages are installed that others recommend."""
    path = tmp_path / "own.conf"
    shipped = (REPOSITORY / "data/image-factory.conf").read_text(encoding="utf-8")
    path.write_text(f"{shipped}[x]\nbased_on = {name}\nfirmware = hybrid\n{lines}\n", encoding="utf-8")
    found = recipe.read(pipeline.make_plan(files.Configuration({files.FILE_VARIABLE: str(path)}), "x", {}))
    assert {"grub-efi-amd64", "grub-efi-amd64-signed", "shim-signed", "grub-pc-bin"} <= set(found.packages)
    assert found.recommends == (not lines)


def test_what_is_asked_with_online(tmp_path: Path) -> None:
    """The lists of each archive that another machine has; behind a proxy only that."""
    sources = (
        "'deb [a=b] http://x.example/d/ sid main', deb-src https://y/d sid a, deb http://z ./, 'deb copy:/a sid b'"
    )
    text = f"suite: sid\nsources: [{sources}]\n"
    found = SOURCES["bootstrap"].remote(make_plan(tmp_path, text))
    assert found == [
        ("bootstrap", "http://x.example/d/dists/sid/InRelease", True),
        ("bootstrap", "https://y/d/dists/sid/InRelease", True),
        ("bootstrap", "http://z/./InRelease", True),
    ]
    found = SOURCES["bootstrap"].remote(make_plan(tmp_path, f"{text}proxy: http://p.example:1\n"))
    assert found == [("bootstrap", "http://p.example:1", False)]
