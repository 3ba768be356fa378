"""The package cloud-init, of this machine's release, kept in the cache."""

import os
import subprocess
from pathlib import Path

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "image-factory-tests"


def path() -> Path:
    """Return the path of the package, which is downloaded if it is not in the cache."""
    if not list(_CACHE.glob("cloud-init_*.deb")):
        _CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", "cloud-init"], cwd=_CACHE, check=True)
    return max(_CACHE.glob("cloud-init_*.deb"))
