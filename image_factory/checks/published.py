"""Whether what is in a directory is what builds have published there: signatures, checksums, manifests, statements.

Nothing of it is trusted: no link is followed, no name leads out of it, and of each text only so much is read.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..base import command, files, openpgp, scratch
from ..base.errors import BuildError, ConfigurationError, reason_of
from ..base.log import printable
from ..base.units import format_size
from ..finishing import checksum, provenance
from ..model import MANIFEST_SUFFIX, PROVENANCE_SUFFIX, SBOM_SUFFIX, SIGNATURE_SUFFIX, SUMS_SUFFIX

# So many hexadecimal digits has a digest by each.
_ALGORITHMS = {"sha256": 64, "sha512": 128, "md5": 32}
# Of a list or a signature, and of a document.
_LARGEST_LIST = 16 << 20
_LARGEST_DOCUMENT = 64 << 20
_LINE = re.compile(r"(?P<digest>[0-9a-f]{32,128}) [ *](?P<name>[^/\x00-\x1f\x7f]+)")
_SHOWN = 200


class _Fault(Exception):
    """What is wrong, in a line."""


class _Directory:
    """The files of the directory open as *descriptor*, by their names; reading one follows no link."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.names = sorted(os.listdir(descriptor))
        self._digests: dict[tuple[str, str], str] = {}

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """Give a descriptor of the regular file *name*; _Fault if there is none."""
        if name in (".", "..") or "/" in name:
            raise _Fault("is no name of a file here")
        try:
            # O_NONBLOCK: a named pipe would be waited for.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=self._descriptor)
        except FileNotFoundError:
            raise _Fault("is not there") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _Fault("is a link, which is not followed") from None
            raise _Fault(f"can't be read: {error.strerror}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _Fault("is not a regular file")
            most = _most(name)
            if most is not None and status.st_size > most:
                raise _Fault(f"has more than {format_size(most)}, which no such file has")
            yield descriptor
        except OSError as error:
            raise _Fault(f"can't be read: {error.strerror}") from None
        finally:
            os.close(descriptor)

    def digest(self, name: str, algorithm: str = "sha256") -> str:
        """Return the digest of the file *name*, _Fault if it has none."""
        if (name, algorithm) not in self._digests:
            with self._opened(name) as descriptor:
                self._digests[name, algorithm] = files.digest_of(Path(f"/proc/self/fd/{descriptor}"), algorithm)
        return self._digests[name, algorithm]

    def read(self, name: str) -> bytes:
        """Return what is in the file *name*, which is no image; _Fault if it is too long."""
        with self._opened(name) as descriptor, open(descriptor, "rb", closefd=False) as file:
            return file.read(_most(name))


class _Verification:
    """What is found in a directory: the *faults* of each name that was looked at, and which of them are *signed*.

    *notes* are what else is told of a name.
    """

    def __init__(self, directory: _Directory, keyring: Path | None) -> None:
        self._directory, self._keyring = directory, keyring
        self.faults: dict[str, list[str]] = {}
        self.notes: dict[str, str] = {}
        self.signed: set[str] = set()

    def _note(self, name: str, *faults: str) -> None:
        self.faults.setdefault(name, []).extend(faults)

    @contextmanager
    def _of(self, name: str) -> Iterator[None]:
        """Have what is wrong inside be a fault of *name*, which is looked at."""
        self._note(name)
        try:
            yield
        except _Fault as fault:
            self._note(name, str(fault))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            self._note(name, "has not the form of such a file")

    def run(self) -> None:
        """Look at all that is there."""
        for name in self._directory.names:
            if name.endswith(SUMS_SUFFIX):
                self._check_signed(name)
        for name in self._directory.names:
            for algorithm in _ALGORITHMS:
                if name.endswith(checksum.suffix_of(algorithm)):
                    self._check_sum(name, algorithm)
            for suffix, check in _DOCUMENTS.items():
                if name.endswith(suffix):
                    with self._of(name):
                        check(self, name, json.loads(self._directory.read(name)))

    def _check_signed(self, name: str) -> None:
        """Check the list *name* of a build, its signature, and the files that it lists."""
        key = None
        signature = f"{name}{SIGNATURE_SUFFIX}"
        listed: dict[str, str] = {}
        with self._of(name):
            data = self._directory.read(name)
            with self._of(signature):
                key = self._signer(name, data, self._directory.read(signature))
                self.notes[name] = f"signed by {key}"
            listed = self._listed(name, data)
        if key and not self.faults[name]:
            self.signed |= {name, signature, *listed}
        for file, digest in listed.items():
            self._compare(file, digest, name)

    def _signer(self, name: str, data: bytes, signature: bytes) -> str:
        """Return the key that has signed *data*, _Fault if none has that counts."""
        if self._keyring is None:
            raise _Fault("can't be checked: there are no public keys")
        try:
            _, key = openpgp.check_signature(self._keyring, data, signature, name)
        except openpgp.SignatureError as error:
            raise _Fault(f"is not accepted: {error.reason}") from error
        return key

    def _listed(self, name: str, data: bytes, algorithm: str = "sha256") -> dict[str, str]:
        """Return the digests by *algorithm* that the list *name* has in its *data*, by names of files."""
        found: dict[str, str] = {}
        for number, line in enumerate(data.decode("utf-8", "surrogateescape").split("\n"), 1):
            if not line:
                continue
            match = _LINE.fullmatch(line)
            if not match or match["name"] in (".", "..") or len(match["digest"]) != _ALGORITHMS[algorithm]:
                self._note(name, f"line {number} is no checksum of a file here: {_cut(line)}")
            elif found.setdefault(match["name"], match["digest"]) != match["digest"]:
                self._note(name, f"line {number} has another checksum of {match['name']} than one before")
        return found

    def _check_sum(self, name: str, algorithm: str) -> None:
        """Check the file *name* with the checksum of the one beside it."""
        expected = name.removesuffix(checksum.suffix_of(algorithm))
        with self._of(name):
            listed = self._listed(name, self._directory.read(name), algorithm)
            if [*listed] != [expected]:
                raise _Fault(f"has not the checksum of {expected}")
            self._compare(expected, listed[expected], name, algorithm)

    def _compare(self, name: str, digest: object, where: str, algorithm: str = "sha256") -> None:
        """Note whether the file *name* has the *digest* that *where* says."""
        with self._of(name):
            found = self._directory.digest(name, algorithm)
            if found != digest:
                shown = algorithm.upper().replace("SHA", "SHA-")
                raise _Fault(f"is not what {where} says: expected {shown} {str(digest)[:_SHOWN]}, found {found}")

    def check_manifest(self, name: str, document: Any) -> None:
        """Check the manifest *name* against its image."""
        artifact = document["artifact"]
        self._belongs(name, MANIFEST_SUFFIX, artifact["name"])
        self._compare(artifact["name"], artifact["sha256"], name)
        if document["program"] != "image-factory" or not isinstance(document["packages"], list):
            raise ValueError

    def check_sbom(self, name: str, document: Any) -> None:
        """Check the SBOM *name* against its image, and the manifest of that, if there is one."""
        component = document["metadata"]["component"]
        if document["bomFormat"] != "CycloneDX":
            raise ValueError
        self._belongs(name, SBOM_SUFFIX, component["bom-ref"])
        [digest] = [each["content"] for each in component["hashes"] if each["alg"] == "SHA-256"]
        self._compare(component["bom-ref"], digest, name)
        manifest = f"{component['bom-ref']}{MANIFEST_SUFFIX}"
        # One that is no manifest is told as such.
        with suppress(_Fault, ValueError, RecursionError):
            listed = json.loads(self._directory.read(manifest))
            if _packages(document["components"][1:]) != _packages(listed["packages"]):
                self._note(name, f"has not the packages of {manifest}")

    def check_statement(self, name: str, document: Any) -> None:
        """Check the statement *name* against what it is of."""
        if document["_type"] != provenance.STATEMENT or document["predicateType"] != provenance.PREDICATE:
            raise _Fault("is no statement of in-toto and SLSA that is known")
        made = document["subject"]
        if not made:
            raise _Fault("is of nothing")
        for each in (*made, *document["predicate"]["runDetails"]["byproducts"]):
            if not isinstance(each["name"], str):
                raise TypeError
            self._compare(each["name"], each["digest"]["sha256"], name)

    def _belongs(self, name: str, suffix: str, artifact: object) -> None:
        expected = name.removesuffix(suffix)
        if artifact != expected:
            raise _Fault(f"is that of {_cut(artifact)}")


_DOCUMENTS: Mapping[str, Callable[[_Verification, str, Any], None]] = {
    MANIFEST_SUFFIX: _Verification.check_manifest,
    SBOM_SUFFIX: _Verification.check_sbom,
    PROVENANCE_SUFFIX: _Verification.check_statement,
}


def _most(name: str) -> int | None:
    """Return how many bytes the file *name* may have; None for images and all else."""
    if name.endswith(tuple(_DOCUMENTS)):
        return _LARGEST_DOCUMENT
    is_list = name.endswith((SUMS_SUFFIX, SIGNATURE_SUFFIX, *map(checksum.suffix_of, _ALGORITHMS)))
    return _LARGEST_LIST if is_list else None


def _packages(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return sorted((str(each["name"]), str(each["version"])) for each in entries)


def _cut(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def verify(directory: Path, keyring: Path | None, say: Callable[[str], None]) -> None:
    """Say of each file in *directory* whether it is what was published; BuildError in the end if one is not.

    The keys that count are those of *keyring*, else the public keys that the user's gpg has.
    ConfigurationError if *directory* is none that can be read, or has nothing that a build has published.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigurationError(
            f"--verify: {reason_of(error)}.", hint="Name a directory that builds publish in."
        ) from error
    try:
        found = _looked_at(directory, _Directory(descriptor), keyring, say)
    except OSError as error:
        raise ConfigurationError(f"--verify: {directory} can't be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)
    bad = [name for name, faults in found.faults.items() if faults]
    if bad:
        raise BuildError(f"{len(bad)} of {len(found.faults)} files in {directory} are not as they were published.")


def _looked_at(directory: Path, content: _Directory, keyring: Path | None, say: Callable[[str], None]) -> _Verification:
    """Say what there is of each file in *directory*, which has *content*; return what is found."""
    signatures = [name for name in content.names if name.endswith(f"{SUMS_SUFFIX}{SIGNATURE_SUFFIX}")]
    if not signatures:
        say(f"{directory} has no signatures: whether somebody else has changed what is there can't be told.")
    with _keys(keyring if signatures else None, needed=bool(signatures)) as keys:
        found = _Verification(content, keys)
        found.run()
    if not found.faults:
        raise ConfigurationError(f"--verify: {directory} has nothing that image-factory has published.")
    for name in sorted({*content.names, *found.faults}):
        faults = found.faults.get(name)
        if faults:
            say(_line("bad", name, "; ".join(dict.fromkeys(faults))))
        elif faults is None:
            say(_line("unknown", name, "nobody vouches for it"))
        else:
            say(_line("good" if name in found.signed else "unsigned", name, found.notes.get(name, "")))
    return found


def _line(word: str, name: str, what: str) -> str:
    told = f": {' '.join(what.splitlines())}" if what else ""
    return printable(f"{word:<8}  {repr(name)[1:-1]}{told}")


@contextmanager
def _keys(keyring: Path | None, *, needed: bool) -> Iterator[Path | None]:
    """Give the file of the public keys that count, None if there are none, or none are *needed*."""
    if not needed:
        yield None
        return
    if keyring:
        files.check_readable("keyring", keyring)
        command.require(openpgp.VERIFIERS)
        yield keyring
        return
    command.require(openpgp.EXPORTERS)
    with scratch.directory() as directory:
        yield openpgp.export_public(directory / "keys.gpg")
