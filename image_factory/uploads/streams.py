"""What Incus reads of a server of images, simplestreams, made of the index that is there.

The form is that of Incus' shared/simplestreams/products.go: of each version the file that describes it, with
fingerprints, and what is to be run.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from ..base import files
from ..model import Artifact

# Incus looks there, below the URL that it is given.
DIRECTORY = "streams/v1"
PRODUCTS, INDEX = "images.json", "index.json"
# What ours are known by: Incus reads whatever is named here.
_OURS = "image-factory"
_METADATA, _METADATA_TYPE = "incus", "incus.tar.xz"
# By format: what Incus calls such a file, and the key of the fingerprint that the image has with it.
_ROOTS = {
    "squashfs": ("squashfs", "combined_squashfs_sha256"),
    "tar.xz": ("root.tar.xz", "combined_rootxz_sha256"),
    "qcow2": ("disk-kvm.img", "combined_disk-kvm-img_sha256"),
}
NEEDED = f"{_METADATA} and one of {', '.join(_ROOTS)}"

Image = dict[str, Any]


def can_have(formats: Sequence[str]) -> bool:
    """Return whether files of these *formats* are something that Incus can run."""
    return _METADATA in formats and not _ROOTS.keys().isdisjoint(formats)


def fingerprints(artifact: Artifact, artifacts: Sequence[Artifact]) -> dict[str, str]:
    """Return by format Incus' fingerprints of *artifact* with the others, if it is what describes them.

    Incus takes the SHA-256 of both files, one after the other.
    """
    if artifact.format != _METADATA:
        return {}
    roots = [root for root in artifacts if root.format in _ROOTS]
    return {root.format: files.digest_of_joined([artifact.path, root.path]) for root in roots}


def made_of(images: Sequence[Image]) -> dict[str, bytes]:
    """Return by their names the files that say what Incus can have of the *images* of an index, the newest first."""
    found: dict[str, dict[str, Any]] = {}
    taken = set()
    numbers: defaultdict[tuple[str, str], int] = defaultdict(int)
    versions = []
    # An image of the same day comes after what was there before it, and so has Incus its version.
    for image in reversed(images):
        if items := _items(image):
            numbers[image["name"], image["date"]] += 1
            number = numbers[image["name"], image["date"]]
            date = image["date"].replace("-", "")
            versions.append((image, date if number == 1 else f"{date}_{number:02}", items))
    for image, version, items in reversed(versions):
        words = [str(image.get(key) or "") for key in ("distribution", "release", "architecture", "name")]
        system, release, architecture, name = words
        product = found.setdefault(
            ":".join(words),
            {
                # Those who ask for the name get the newest, whichever release that is of.
                "aliases": "" if (name, architecture) in taken else name,
                "arch": architecture,
                "os": system,
                "release": release,
                "release_title": release,
                "variant": name,
                "versions": {},
            },
        )
        taken.add((name, architecture))
        product["versions"][version] = {"items": items}
    own = {"datatype": "image-downloads", "format": "products:1.0"}
    entry = {**own, "path": f"{DIRECTORY}/{PRODUCTS}", "products": [*found]}
    documents = {
        PRODUCTS: {"content_id": _OURS, **own, "products": found},
        INDEX: {"format": "index:1.0", "index": {_OURS: entry}},
    }
    return {name: (json.dumps(document, indent=2) + "\n").encode("ascii") for name, document in documents.items()}


def _items(image: Image) -> dict[str, dict[str, Any]]:
    """Return the files of *image* that Incus wants, by what it calls them; none unless it can have them.

    Others write the index too, and what Incus can't use must not keep it from the rest.
    """
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", image["date"]):
            return {}
        return dict(_found_items(image["files"]))
    except (TypeError, KeyError, AttributeError):
        return {}


def _found_items(found: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    by_format = {each["format"]: each for each in found}
    known = by_format.get(_METADATA, {}).get("fingerprints", {})
    roots = [name for name in _ROOTS if name in known and name in by_format]
    if not roots:
        return
    own = {_ROOTS[name][1]: _checked(known[name], str) for name in roots}
    yield _METADATA_TYPE, _item(_METADATA_TYPE, by_format[_METADATA]) | own
    for name in roots:
        yield _ROOTS[name][0], _item(_ROOTS[name][0], by_format[name])


def _item(kind: str, file: dict[str, Any]) -> dict[str, Any]:
    found = {key: _checked(file[key], type_) for key, type_ in {"path": str, "size": int, "sha256": str}.items()}
    return {"ftype": kind, **found}


def _checked(value: Any, kind: type) -> Any:
    """Return *value*; TypeError unless it is of *kind*, without which Incus reads nothing of the whole file."""
    if type(value) is not kind:
        raise TypeError
    return value


def is_own(name: str, data: bytes) -> bool:
    """Return whether the file *name* with *data* is one that was made here, and may be replaced."""
    try:
        document = json.loads(data)
        return bool(document["content_id"] == _OURS if name == PRODUCTS else [*document["index"]] == [_OURS])
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
