"""What is in effect for an image, and where each key comes from."""

from pathlib import Path

import pytest

from image_factory.base.errors import ConfigurationError
from image_factory.configuration.effective import as_data, as_text, effective
from image_factory.configuration.files import Configuration

FILE = """\
[DEFAULT]
host = here

[base]
linux = /l
initrd = /i
ram = 1G
ram@x86_64 = 2G
ram@aarch64 = 3G
cores = 7

[x]
based_on = base
preseed = /${host}
  more
arch = x86_64

# Of no use.
pakages = nginx
cpu = ${absent}
cores = 2
"""


def configuration(tmp_path: Path, text: str = FILE) -> Configuration:
    (tmp_path / "own.conf").write_text(text)
    return Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "own.conf")})


def test_text(tmp_path: Path) -> None:
    text = as_text("x", effective(configuration(tmp_path), "x", {"mac": "a"}))
    path = tmp_path / "own.conf"
    assert text.startswith(
        "# Flags\nmac = a\n\n"
        f"# {path}, [x]\n"
        "13  based-on = base\n14  preseed = /here\n    more\n16  arch = x86_64\n19  pakages = nginx\n"
        "20  cpu: [x] cpu: ${absent} is not defined.\n21  cores = 2\n\n"
        f"# {path}, [base]\n5  linux = /l\n6  initrd = /i\n8  ram = 2G\n\n"
        f"# {path}, [DEFAULT]\n2  host = here\n\n"
        "# Defaults\nsource = installer\n"
    )
    assert "\nram" not in text.partition("# Defaults")[2]


def test_data(tmp_path: Path) -> None:
    found = as_data(effective(configuration(tmp_path), "x", {}))
    path = str(tmp_path / "own.conf")
    by_key = {each["key"]: each for each in found}
    assert len(by_key) == len(found)
    assert by_key["ram"] == {
        "key": "ram", "value": "2G", "error": None, "from": "file", "file": path, "line": 8, "section": "base",
    }  # fmt: skip
    assert by_key["cpu"]["error"] == "[x] cpu: ${absent} is not defined."
    assert by_key["source"]["from"] == "default"
    assert by_key["source"]["line"] is None


def test_target(tmp_path: Path) -> None:
    found = effective(configuration(tmp_path, FILE + "target = azure\n"), "x", {})
    of_target = [each.key for each in found if each.origin.kind == "target"]
    assert "format" in of_target
    assert "# What the target of x sets\n" in as_text("x", found)
    flagged = effective(configuration(tmp_path, FILE + "target = azure\n"), "x", {"format": "raw"})
    assert next(each.origin.kind for each in flagged if each.key == "format") == "flag"


def test_later_file_has_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = configuration(tmp_path, FILE)
    (tmp_path / "later.conf").write_text("[x]\n\ncores = 3\n")
    found._read(tmp_path / "later.conf")
    origin = found.origin("x", "cores", {})
    assert (origin.path, origin.line) == (tmp_path / "later.conf", 3)


def test_unknown_image(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No image 'y' is configured"):
        effective(configuration(tmp_path), "y", {})
