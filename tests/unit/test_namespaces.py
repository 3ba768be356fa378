"""Namespaces that can't be had: what forbids them is named."""

from pathlib import Path

import pytest

from image_factory.base.errors import ConfigurationError
from image_factory.inside import namespaces


@pytest.fixture
def refusing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose kernel gives no user namespace, and where settings are files in the directory that is given."""
    (tmp_path / "unshare").write_text(
        "#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n"
    )
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(namespaces, "_has_range", lambda line, user: True)
    ranges = tmp_path / "ranges"
    ranges.write_text("x:1:65536\n")
    monkeypatch.setattr(namespaces, "_RANGES", (ranges,))
    settings = {}
    for path, values in namespaces._SETTINGS.items():
        own = tmp_path / "proc/sys" / path.relative_to("/proc/sys")
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(f"{values[1]}\n")
        settings[own] = values
    monkeypatch.setattr(namespaces, "_SETTINGS", settings)
    monkeypatch.setattr(namespaces, "_setting_name", lambda path: ".".join(path.relative_to(tmp_path).parts[2:]))
    return tmp_path / "proc/sys"


@pytest.mark.parametrize(
    ("setting", "forbids", "allows"),
    [
        ("user.max_user_namespaces", "0", "15000"),
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ],
)
def test_setting_that_forbids_them(refusing: Path, setting: str, forbids: str, allows: str) -> None:
    (refusing / setting.replace(".", "/")).write_text(f"{forbids}\n")
    with pytest.raises(ConfigurationError, match=f"no user namespace, as sysctl {setting} forbids it") as caught:
        namespaces.check(as_root=False)
    assert caught.value.hint is not None and f"sudo sysctl {setting}={allows};" in caught.value.hint


def test_other_reason(refusing: Path) -> None:
    with pytest.raises(ConfigurationError, match="no user namespace: unshare: unshare failed: Operation not permitted"):
        namespaces.check(as_root=False)


def test_root_needs_none(refusing: Path) -> None:
    namespaces.check(as_root=True)
