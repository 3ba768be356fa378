"""What Incus has to know of an image: the first file of a split one, beside the tree or the disk."""

import io
import tarfile
import time
from pathlib import Path
from typing import Any

import yaml

from ..model import Build, Plan
from ..parts import State
from .kind import Output

# Incus calls the others as we do (its shared/osarch).
_ARCHITECTURES = {"armhf": "armv7l", "ppc64el": "ppc64le"}
# An instance is to be called what Incus calls it, a copy of one too.
_TEMPLATES = {"/etc/hostname": {"when": ["create", "copy"], "template": "hostname.tpl"}}
_TEXTS = {"hostname.tpl": "{{ instance.name }}\n"}


def metadata(plan: Plan, seconds: int) -> dict[str, Any]:
    """Return what Incus calls the metadata of the image of *plan*, which was made *seconds* after 1970."""
    settings = plan.settings
    architecture = _ARCHITECTURES.get(settings.arch, settings.arch)
    named = [name for name in (settings.distribution, settings.release) if name]
    properties = {
        "architecture": architecture,
        "description": f"{' '.join([*named, architecture])} ({plan.base_name})",
        "name": plan.base_name,
        "os": settings.distribution,
        "release": settings.release,
        "serial": f"{plan.date:%Y%m%d}",
        "variant": plan.image,
    }
    return {
        "architecture": architecture,
        "creation_date": seconds,
        "properties": {key: value for key, value in properties.items() if value},
        "templates": _TEMPLATES,
    }


def _commands(build: Build, path: Path) -> list[list[str]]:
    return []


def _write(output: Output, state: State, path: Path) -> None:
    plan = state.build.plan
    # Incus takes 0 for none.
    seconds = int(time.time()) if plan.source_date is None else max(1, plan.source_date)
    texts = {"metadata.yaml": yaml.safe_dump(metadata(plan, seconds), allow_unicode=True, sort_keys=True)}
    texts |= {f"templates/{name}": text for name, text in _TEXTS.items()}
    # The other presets take memory in proportion to what is not here.
    with tarfile.open(path, "w:xz", format=tarfile.GNU_FORMAT, preset=0) as archive:
        for name, text in texts.items():
            data = text.encode()
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(data), seconds, 0o644
            archive.addfile(member, io.BytesIO(data))


OUTPUTS = {
    "incus": Output(
        "Describing the image for Incus",
        "incus.tar.xz",
        _commands,
        _write,
        made_from="plan",
        beside=("squashfs", "tar.gz", "tgz", "tar.xz", "tar.zst", "tar", "qcow2"),
    )
}
