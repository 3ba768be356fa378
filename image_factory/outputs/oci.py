"""An image for containers, as a tar of an OCI image layout: the whole tree is its one layer."""

import datetime
import hashlib
import json
import shutil
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..base import command, files
from ..base.cleanup import released
from ..base.errors import BuildError
from ..model import Build

# Of the image specification 1.0, which skopeo, podman, umoci and registries read.
_MEDIA = "application/vnd.oci.image"
# What Go calls the architectures.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armhf": "arm", "ppc64el": "ppc64le"}
_BLOBS = "blobs/sha256"
# A description has less.
_LARGEST = 1 << 20


def layer_path(path: Path) -> Path:
    """Return where the layer of the image *path* is while it is made."""
    return path.with_name(f"{path.name}.layer")


def digest_path(path: Path) -> Path:
    """Return where the digest of the layer's tar is while the image *path* is made."""
    return path.with_name(f"{path.name}.digest")


def _layout_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.layout")


def assembling_argv(build: Build, path: Path) -> list[str]:
    """Return the command that makes the tar *path* of a layout."""
    return archiving_argv(build, path, _layout_path(path), "oci-layout", "index.json", "blobs")


def archiving_argv(build: Build, path: Path, directory: Path, *names: str) -> list[str]:
    """Return the command that makes the tar *path* of *names* in *directory*, which says nothing of who made it."""
    date = build.plan.source_date
    dated = [] if date is None else [f"--mtime=@{date}"]
    owner = ["--owner=0", "--group=0", "--numeric-owner", "--mode=u=rwX,go=rX"]
    words = [*owner, *dated, "--sort=name", "--format=gnu", f"--directory={directory}"]
    return ["tar", "--create", f"--file={path}", *words, *names]


def assemble(build: Build, path: Path) -> None:
    """Make the image *path* of its layer and of the digest of that, which are gone then."""
    layout = _layout_path(path)
    blobs = layout / _BLOBS
    with (
        released(partial(shutil.rmtree, layout, ignore_errors=True)),
        released(partial(layer_path(path).unlink, missing_ok=True)),
        released(partial(digest_path(path).unlink, missing_ok=True)),
    ):
        blobs.mkdir(parents=True)
        tar_digest = digest_path(path).read_text(encoding="ascii").split()[0]
        layer = _descriptor("layer.v1.tar+gzip", files.digest_of(layer_path(path)), layer_path(path).stat().st_size)
        files.move(layer_path(path), layout / _place(layer))
        seconds = time.time() if build.plan.source_date is None else build.plan.source_date
        made = f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
        config = {
            "created": made,
            "architecture": _ARCHITECTURES[build.plan.settings.arch],
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{tar_digest}"]},
            "history": [{"created": made, "created_by": "image-factory"}],
        }
        kind = f"{_MEDIA}.manifest.v1+json"
        described = _written(layout, "config.v1+json", config)
        manifest = {"schemaVersion": 2, "mediaType": kind, "config": described, "layers": [layer]}
        own = _written(layout, "manifest.v1+json", manifest)
        own["annotations"] = {"org.opencontainers.image.ref.name": build.plan.image}
        (layout / "index.json").write_bytes(_encoded({"schemaVersion": 2, "manifests": [own]}))
        (layout / "oci-layout").write_bytes(_encoded({"imageLayoutVersion": "1.0.0"}))
        command.run(assembling_argv(build, path))


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": f"{_MEDIA}.{kind}", "digest": f"sha256:{digest}", "size": size}


def _place(descriptor: dict[str, Any]) -> str:
    """Return where in a layout the blob of *descriptor* is."""
    return f"{_BLOBS}/{descriptor['digest'].removeprefix('sha256:')}"


def _encoded(document: object) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


def _written(layout: Path, kind: str, document: object) -> dict[str, Any]:
    """Write *document* as a blob; return its descriptor."""
    data = _encoded(document)
    found = _descriptor(kind, hashlib.sha256(data).hexdigest(), len(data))
    (layout / _place(found)).write_bytes(data)
    return found


def reading_argv(path: Path) -> list[str]:
    """Return the command that turns the image *path*, which it reads from stdin, into the tar of its layer.

    BuildError unless each part of it has the digest and the size that the others say.
    """
    place = "LAYER"
    # A dry run shows what is not there yet.
    if path.exists():
        try:
            with tarfile.open(path, "r:") as archive:
                [own] = _document(archive, "index.json")["manifests"]
                manifest = _document(archive, _place(own))
                [layer] = manifest["layers"]
                for described in (own, manifest["config"], layer):
                    _check(archive, described)
                place = _place(layer)
        except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
            raise BuildError(f"{path.name} is not what was made: {error}") from error
    script = 'tar -xOf - "$0" | gzip -dc'
    return ["bash", "-o", "pipefail", "-c", script, place]


def _document(archive: tarfile.TarFile, name: str) -> dict[str, Any]:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file")
    found = json.loads(file.read(_LARGEST))
    if not isinstance(found, dict):
        raise TypeError(f"{name} has no object")
    return found


def _check(archive: tarfile.TarFile, described: dict[str, Any]) -> None:
    name = _place(described)
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file")
    digest, size = files.digest_of_stream(file)
    if (f"sha256:{digest}", size) != (described["digest"], described["size"]):
        raise ValueError(f"{name} has other bytes than its name says")
