"""Upload an image for containers to a registry, with skopeo; verified by the digest that the registry has of it."""

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base import command, scratch
from ..base.errors import BuildError, CommandError, ConfigurationError, command_line
from ..base.files import check_readable
from ..base.log import logger
from ..configuration.settings import Destination
from ..model import Artifact
from . import credentials, tries
from .tries import FailedTry, persist

KEYS: tuple[str, ...] = ("upload-credentials", "upload-tls", "upload-verify")

# What is published of it; the checksum and the manifest beside it are none of a registry's.
_SUFFIX = ".oci.tar"
# As the distribution specification has them.
_TAG = "[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_NAME = "[a-z0-9]+(?:(?:[.]|_{1,2}|-+)[a-z0-9]+)*"
_HOST = r"[A-Za-z0-9.-]+(?::[0-9]{1,5})?|\[[0-9A-Fa-f:]+\](?::[0-9]{1,5})?"
_TARGET = re.compile(rf"(?:{_HOST})(?:/{_NAME})+(?P<tag>:{_TAG})?")
# skopeo has no limit of its own, and a registry that takes less in a second is taken for one that hangs.
_LEAST_BYTES = 100 << 10
_FATAL = re.compile(r'level=fatal msg="(.*)"$')
# A registry answers so for what it has not yet.
_UNKNOWN = re.compile(r"manifest unknown|name unknown|not found|NAME_UNKNOWN")
_LARGEST_INDEX = 1 << 20


@dataclass(frozen=True)
class _Cause:
    """What another try can't cure: the text that tells it, and the user's next move."""

    text: re.Pattern[str]
    hint: str


_CAUSES = (
    _Cause(re.compile(r"unauthorized|denied|getting username and password"), "See upload-credentials."),
    _Cause(re.compile(r"x509: "), "Name a directory with the .crt file of the certificate's CA with upload-tls."),
    _Cause(re.compile(r"HTTP response to HTTPS client"), "It has no TLS: set upload-tls = none, or have it get some."),
)


def programs(destination: Destination) -> list[str]:
    """Return the programs that uploading to *destination* needs here."""
    return ["skopeo"]


def check(destination: Destination, file_name: str) -> None:
    """Raise ConfigurationError unless *destination* is a place of a registry, and *file_name* an image for it."""
    section = destination.section
    if not file_name.endswith(_SUFFIX):
        raise ConfigurationError(
            f"[{section}] upload-type = oci takes images of the format oci, and {file_name} is none.",
            hint="Set upload-formats = oci there, and have oci among the image's formats.",
        )
    match = _TARGET.fullmatch(destination.target)
    if not match:
        raise ConfigurationError(
            f"[{section}] upload-target: {destination.target!r} is no place of a registry.",
            hint="It is HOST/NAME or HOST/NAME:TAG, such as registry.example.com/golden/debian, in small letters.",
        )
    if not match["tag"] and not re.fullmatch(_TAG, _tag(file_name)):
        raise ConfigurationError(
            f"[{section}] upload-target: {_tag(file_name)} is no tag of a registry.", hint="Write one: HOST/NAME:TAG"
        )
    if destination.verify not in (None, "none"):
        raise ConfigurationError(f"[{section}] upload-verify: oci has only none, and the registry's digest without it.")
    if isinstance(destination.tls, Path):
        check_readable(f"[{section}] upload-tls", destination.tls, directory=True)
        if not destination.tls.is_dir():
            raise ConfigurationError(f"[{section}] upload-tls: for oci it is a directory with .crt files, or none.")
    elif destination.tls not in (None, "none"):
        raise ConfigurationError(f"[{section}] upload-tls: for oci it is a directory with .crt files, or none.")
    credentials.check_private(destination)


def _tag(file_name: str) -> str:
    return file_name.removesuffix(_SUFFIX)


def _place(destination: Destination, file_name: str) -> str:
    match = _TARGET.fullmatch(destination.target)
    tag = "" if match and match["tag"] else f":{_tag(file_name)}"
    return f"docker://{destination.target}{tag}"


def _options(destination: Destination, prefix: str) -> list[str]:
    """Return the options of skopeo for the registry, whose names begin with *prefix* where it has two places."""
    found = []
    if destination.credentials:
        # Without a prefix it is that of both.
        found.append(f"--{prefix}authfile={destination.credentials.absolute()}")
    if isinstance(destination.tls, Path):
        found.append(f"--{prefix}cert-dir={destination.tls.absolute()}")
    elif destination.tls == "none":
        found.append(f"--{prefix}tls-verify=false")
    return found


def _copy_argv(destination: Destination, name: str, directory: Path | str | None = None) -> list[str]:
    """Return the command that uploads the file *name*, which is unpacked to *directory* meanwhile."""
    unpacking = [f"--tmpdir={directory}"] if directory else []
    options = ["--preserve-digests", *_options(destination, "dest-"), *destination.arguments]
    return ["skopeo", *unpacking, "copy", *options, f"oci-archive:{name}", _place(destination, name)]


def _digest_argv(destination: Destination, name: str) -> list[str]:
    options = ["--no-tags", "--format={{.Digest}}", *_options(destination, "")]
    return ["skopeo", "inspect", *options, _place(destination, name)]


def commands(destination: Destination, artifact: Artifact) -> list[list[str]]:
    """Return the commands that upload *artifact* and verify it; they run beside the file."""
    verifying = [] if destination.verify == "none" else [_digest_argv(destination, artifact.path.name)]
    return [_copy_argv(destination, artifact.path.name, "DIRECTORY"), *verifying]


def upload(destination: Destination, artifact: Artifact) -> None:
    """Upload *artifact*, and compare the registry's digest; BuildError has the reason and the next move.

    The tag is there when all of the image is.
    """
    name = artifact.path.name
    by_hand = _copy_argv(destination, name)
    seconds = tries.STALL_SECONDS + artifact.path.stat().st_size / _LEAST_BYTES

    def attempt(failed: FailedTry | None) -> None:
        with scratch.directory(large=True) as directory:
            _run(_copy_argv(destination, name, directory), artifact.path.parent, seconds)
        if destination.verify == "none":
            logger.warning("%s is not verified at %s, as upload-verify says.", name, destination.section)
            return
        found = _run(_digest_argv(destination, name), artifact.path.parent, tries.STALL_SECONDS).strip()
        if found != _digest_of(artifact.path):
            raise FailedTry(f"the registry has {found or 'nothing'} there", again=True, damaged=True)
        logger.info("%s is verified at %s: %s", name, destination.section, found)

    persist(destination, artifact, attempt, command_line(by_hand))


def _digest_of(path: Path) -> str:
    """Return the digest of the manifest of the image *path*."""
    with tarfile.open(path, "r:") as archive:
        file = archive.extractfile("index.json")
        assert file is not None
        [own] = json.loads(file.read(_LARGEST_INDEX))["manifests"]
    return str(own["digest"])


def _run(argv: Sequence[str], directory: Path, seconds: float) -> str:
    """Run *argv* in *directory*, and return what it prints; FailedTry says why it has failed."""
    lines: list[str] = []
    try:
        return command.run(argv, capture=True, cwd=directory, timeout=seconds, progress=lines.append)
    except CommandError as error:
        fatal = next((match[1] for line in reversed(lines) if (match := _FATAL.search(line))), "")
        reason = fatal.replace('\\"', '"').strip() or error.message.rstrip(".")
        cause = next((each for each in _CAUSES if each.text.search(reason)), None)
        raise FailedTry(reason, again=cause is None, hint=cause.hint if cause else "") from error
    except BuildError as error:
        raise FailedTry(error.message.rstrip("."), again=True) from error


def probe(destination: Destination, directory: Path) -> bool:
    """Raise BuildError with the reason unless the registry answers, and lets us in; it need not have the image yet."""
    try:
        _run(_digest_argv(destination, f"latest{_SUFFIX}"), directory, tries.PROBE_SECONDS)
    except FailedTry as failed:
        if not _UNKNOWN.search(failed.reason):
            raise BuildError(f"{failed.reason}.", hint=failed.hint or None) from failed
    return True
