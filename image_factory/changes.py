"""What has changed since the last good build of an image, by digests of what it was made from, and by its packages."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import __version__, checkpoint, keep
from .base import events, files, interrupts, trust
from .base.errors import BuildError, ConfigurationError
from .base.log import step
from .downloads import verify
from .finishing import manifest
from .keep import Made
from .model import MANIFEST_SUFFIX, Plan
from .sources import SOURCES, offered
from .told.witness import Witness

# So many packages are named.
_NAMED = 3
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]*")
_ARCHITECTURE = re.compile(r"[a-z0-9-]+")
# What a guest of QEMU's user network calls the machine that it runs on.
_HOST_OF_GUESTS = "//10.0.2.2"

_SETTINGS, _FILES = "settings", "files"


def settings_of(plan: Plan) -> dict[str, str]:
    """Return a digest of each setting that makes the image another one, with what is in its files, by key.

    Of files that are fetched only their contents count, which are compared for themselves.
    """
    settings = plan.settings
    found = checkpoint.inputs_of(plan) | checkpoint.outputs_of(plan)
    # It has the names of images, and so the date.
    more = {
        "manifest_text": str(settings.manifest_text),
        "arch": settings.arch,
        "firmware": settings.firmware,
        "SOURCE_DATE_EPOCH": str(plan.source_date),
    }
    found |= {key: hashlib.sha256(text.encode()).hexdigest() for key, text in more.items()}
    fetched = SOURCES[settings.source].files(plan) or {}
    kept = {key.replace("_", "-"): digest for key, digest in found.items()}
    return {"image-factory": __version__} | {key: digest for key, digest in kept.items() if key not in fetched}


def origins(plan: Plan, settings: Mapping[str, str], seen: Witness) -> dict[str, dict[str, str]]:
    """Return what later builds compare of that of *plan*, with the digests *settings*, which *seen* has watched."""
    fetched = SOURCES[plan.settings.source].files(plan) or {}
    used = {each.key: each.sha256 for each in seen.inputs() if each.sha256 and each.key in fetched}
    return {_SETTINGS: {**settings}, _FILES: used}


def sought(plan: Plan) -> events.ChangesSought:
    """Return what has changed since the last build of *plan*; what is fetched for that is in the cache then."""
    with step("Looking for changes"):
        last = keep.newest(plan)
        if last is None:
            return events.ChangesSought(None, (), (f"{plan.output_dir} has no record of an earlier build",))
        unknown: list[str] = []
        changed: list[str] = []
        for found in (_of_files_made, _of_settings, _of_fetched, _of_packages):
            try:
                changed += found(plan, last)
            except (BuildError, ConfigurationError) as error:
                unknown.append(error.message.removesuffix("."))
            # More is of no use, and takes a while.
            if changed or unknown:
                break
        return events.ChangesSought(last.build, tuple(changed), tuple(unknown))


def _of_files_made(plan: Plan, last: Made) -> list[str]:
    names = {file.name for file in last.files}
    images = [file for file in last.files if f"{file.name}.sha256sum" in names]
    return [f"{file.name} is not there as it was made" for file in images if not keep.is_there(plan, file)]


def _of_settings(plan: Plan, last: Made) -> list[str]:
    if last.origins is None:
        raise BuildError(f"{last.build} did not end well, or says nothing of what it was made from.")
    before, now = last.origins.get(_SETTINGS, {}), settings_of(plan)
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def _of_fetched(plan: Plan, last: Made) -> list[str]:
    """Return which files that the disk is made from have other contents now; BuildError if they can't be had."""
    before = (last.origins or {}).get(_FILES, {})
    sources = SOURCES[plan.settings.source].files(plan)
    if sources is None:
        raise BuildError(
            f"What a disk is made from is known only once it is made, with source = {plan.settings.source}."
        )
    if not sources:
        return []
    doubt = trust.why_not(plan.cache_dir)
    if doubt and any(source.path is None for source in sources.values()):
        raise BuildError(f"The cache is not used: {doubt}.")
    verifier = verify.Verifier(plan)
    found = []
    for key in sources:
        if key not in before:
            raise BuildError(f"The last build has no digest of what {key} names.")
    with verifier.locked(sources.values()):
        for key, source in sources.items():
            path = verifier.fetch(key, source).path
            try:
                if files.digest_of(path) != before.get(key):
                    found.append(key)
            except OSError as error:
                raise BuildError(f"{path} can't be read: {error.strerror}.") from error
    return found


def _of_packages(plan: Plan, last: Made) -> list[str]:
    """Return which packages of the last build the archives have in other versions; BuildError if that is not known."""
    document = _manifest(plan, last)
    packages = document["packages"]
    others = sorted({str(package.get("kind")) for package in packages} - {"deb"})
    if others:
        raise BuildError(f"Which packages its archives have now is not known: they are {' and '.join(others)}.")
    if not packages:
        return []
    named = [
        (package["name"], package["architecture"], package["version"])
        for package in packages
        if _PACKAGE.fullmatch(package["name"]) and _ARCHITECTURE.fullmatch(package["architecture"])
    ]
    sources = [line.replace(_HOST_OF_GUESTS, "//127.0.0.1") for line in document.get("sources", ())]
    with interrupts.interruptible():
        found = offered(plan, sources, [name if each == "all" else f"{name}:{each}" for name, each, _ in named])
    if not found:
        raise BuildError("The archives have none of its packages.")
    return _shortened([*_newer(named, found)])


def _newer(named: Sequence[tuple[str, str, str]], found: Mapping[str, Any]) -> Iterator[str]:
    for name, architecture, version in named:
        # apt leaves out the architecture that is the system's own.
        each = found.get(f"{name}:{architecture}") or found.get(name)
        # What no archive has is of a task or an element.  The newest may be of a suite that apt does not prefer.
        if each and version not in (each.candidate, each.versions[0]):
            yield f"{name} {version} -> {each.candidate}"


def _shortened(texts: Sequence[str]) -> list[str]:
    left = len(texts) - _NAMED
    return [*texts[:_NAMED], *([f"{left} more package{'s' if left > 1 else ''}"] if left > 0 else [])]


def _manifest(plan: Plan, last: Made) -> dict[str, Any]:
    """Return the manifest of the *last* build; BuildError if there is none of it."""
    for file in last.files:
        if file.name.endswith(MANIFEST_SUFFIX):
            document = manifest.read_of(plan.output_dir / file.name, plan, "")
            if document:
                return document
    raise BuildError(f"{last.build} has no manifest that tells its packages; 'manifest = yes' writes one.")
