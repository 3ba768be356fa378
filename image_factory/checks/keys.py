"""Private keys in the files of an installed system, but for those that are in a package as they are: test data.

A package's file is known by its digest in the database of dpkg or rpm, wherever it lies.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from ..base import interrupts
from ..system import inventory, rpmdb
from ..system.tree import Tree

# So many lists of files the helper reads at once, which are some KiB each.
_LISTS_AT_ONCE = 100

_DPKG_LISTS = "var/lib/dpkg/info/*.md5sums"

# Layers of containers are other systems; compiled files have what their sources have.
_OTHERS = re.compile(r"var/lib/(?:docker|containers|containerd)/.*|.*\.py[co]")

# Whatever a file has a lot of, each beginning is followed for some KiB at most, and on one way only.
_SPACE = rb"(?:\s|\\++[rn]){1,80}+"
# What is encrypted has headers.
_HEADERS = rb"(?:[A-Za-z-]{1,40}+: [^\r\n\\]{0,200}+" + _SPACE + rb"){0,8}+"
_PEM = re.compile(
    rb"-----BEGIN (?:[A-Z0-9]++ ){0,4}PRIVATE KEY-----" + _SPACE + _HEADERS + rb"[A-Za-z0-9+/=]{16}",
)
# The first line alone is in the database of shared-mime-info, which no package has the digest of.
_PGP = re.compile(
    rb"-----BEGIN PGP PRIVATE KEY BLOCK-----\r?\n"
    rb"(?:[A-Za-z-]{1,40}+: [^\r\n]{0,200}+\r?\n){0,8}+(?:[ \t]{0,80}+\r?\n)?[A-Za-z0-9+/=]{16}"
)
# Java's key stores, JKS and JCEKS, and the ciphers that they have private keys in.
_JAVA_STORES = (b"\xfe\xed\xfe\xed", b"\xce\xce\xce\xce")
_JAVA_CIPHERS = (b"\x06\x0a\x2b\x06\x01\x04\x01\x2a\x02\x11\x01\x01", b"\x06\x09\x2b\x06\x01\x04\x01\x2a\x02\x13\x01")
# How PKCS #8, PKCS #1, SEC 1, PKCS #12 and PKCS #8 that is encrypted go on: a version and what follows it, but for
# the last, which has the name of the encryption there.
_DER_BODY = re.compile(
    rb"\x02\x01(?:[\x00\x01]\x30|\x00\x02|\x01\x04[\x10-\x48]|\x03\x30)|\x30.\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x05",
    re.DOTALL,
)


def has_private_key(data: bytes) -> bool:
    """Return whether the file *data* is or has a private key, in PEM, DER, PKCS #12, JKS, JCEKS or armoured OpenPGP."""
    return bool(_PEM.search(data) or _PGP.search(data)) or _is_java_store(data) or _is_der(data)


def _is_java_store(data: bytes) -> bool:
    """Return whether *data* is a key store of Java's with a private key among its entries."""
    return data.startswith(_JAVA_STORES) and any(cipher in data for cipher in _JAVA_CIPHERS)


def _is_der(data: bytes) -> bool:
    """Return whether *data* is one sequence of ASN.1, of exactly its length, that a private key begins like."""
    if data[:1] != b"\x30" or len(data) < 16:
        return False
    count = data[1] & 0x7F if data[1] & 0x80 else 0
    length = int.from_bytes(data[2 : 2 + count]) if count else data[1]
    return count <= 4 and len(data) == 2 + count + length and bool(_DER_BODY.match(data, 2 + count))


def search(tree: Tree, directory: Path) -> tuple[list[str], list[bytes]]:
    """Return the files of *tree* with private keys that are no package's, and the contents of all that have some.

    *directory*, for copies, is there.
    """
    found = _having_keys(tree.key_files())
    # What is passed by its path is none to the search in bytes either.
    own = {path: data for path, data in found.items() if not _OTHERS.fullmatch(path)}
    digests = {path: _digests(data) for path, data in own.items()}
    known = _known(tree, directory, {digest for each in digests.values() for digest in each}) if own else set()
    return [path for path in own if not digests[path] & known], list(found.values())


def _having_keys(files: Mapping[str, bytes]) -> dict[str, bytes]:
    # Nothing is made that a signal could leave behind.
    with interrupts.interruptible():
        return {path: data for path, data in files.items() if has_private_key(data)}


def _pattern(path: str) -> str:
    """Return a pattern for *path*, whatever is in its name, that the helper takes."""
    directory, _, name = path.rpartition("/")
    return f"{directory}/{re.sub(r'^[-+~]|[^A-Za-z0-9._@+~-]', '*', name)}"


def _digests(data: bytes) -> set[str]:
    # What dpkg has, and what rpm has had over the years.
    return {hashlib.new(name, data, usedforsecurity=False).hexdigest() for name in ("md5", "sha1", "sha256", "sha512")}


def _known(tree: Tree, directory: Path, wanted: set[str]) -> set[str]:
    """Return which of the digests *wanted* the databases of packages have."""
    lists = [entry.path for entry in tree.entries([_DPKG_LISTS])]
    found = set()
    for start in range(0, len(lists), _LISTS_AT_ONCE):
        texts: Mapping[str, bytes] = tree.read([_pattern(path) for path in lists[start:][:_LISTS_AT_ONCE]])
        found |= {
            line[:32].decode("ascii", "replace") for text in texts.values() for line in text.splitlines()
        } & wanted
    with inventory.rpm_database(tree.load, directory) as database:
        return found | (rpmdb.known_digests(database, wanted) if database else set())
