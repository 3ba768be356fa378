"""Private keys that the audit finds in files, and those of packages that it lets pass."""

import fnmatch
import hashlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from image_factory import pipeline
from image_factory.base import interrupts
from image_factory.base.errors import BuildError, Interrupted
from image_factory.checks import audit, keys
from image_factory.checks.audit import Finding
from image_factory.checks.leftovers import Asked
from image_factory.configuration.files import Configuration
from image_factory.model import Build, Disk, Entry
from image_factory.system import mounts, partitions
from image_factory.system.tree import Tree

from ..conftest import REPOSITORY, run
from ..unit.test_leftovers import Directory


def put_java_stores(directory: Path) -> None:
    """Make key stores: of a private key, of a certificate, and of both with the certificate first."""
    for kind, line in (
        ("key-jceks", "-genkeypair -keyalg EC -dname CN=x -keypass abcdef -alias k -storetype jceks"),
        ("key-jks", "-genkeypair -keyalg EC -dname CN=x -keypass abcdef -alias k -storetype jks"),
        ("other-jks", "-importcert -file other-certificate.pem -alias a -storetype jks"),
        ("key-both", "-importcert -file other-certificate.pem -alias a"),
    ):
        if kind == "key-both":
            shutil.copy(directory / "key-jks", directory / kind)
        arguments = [*line.split(), "-storepass", "abcdef", "-noprompt", "-keystore", kind]
        subprocess.run(["keytool", *arguments], cwd=directory, check=True, capture_output=True)
    assert (directory / "key-both").read_bytes()[12:16] == b"\0\0\0\2"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys, certificates and public keys, as programs write them."""
    directory = tmp_path_factory.mktemp("keys")
    commands = """
        genrsa -traditional -out key-rsa.pem 2048
        genrsa -aes128 -traditional -passout pass:abcd -out key-encrypted-rsa.pem 2048
        genpkey -algorithm RSA -out key-pkcs8.pem
        pkcs8 -topk8 -in key-rsa.pem -passout pass:abcd -out key-encrypted.pem
        ecparam -name prime256v1 -genkey -out key-ec.pem
        genpkey -algorithm ED25519 -out key-ed25519.pem
        dsaparam -genkey -out key-dsa.pem 1024
        pkey -in key-rsa.pem -outform DER -out key-pkcs8.der
        rsa -in key-rsa.pem -traditional -outform DER -out key-rsa.der
        ec -in key-ec.pem -outform DER -out key-ec.der
        pkey -in key-ed25519.pem -outform DER -out key-ed25519.der
        pkcs8 -topk8 -in key-rsa.pem -passout pass:abcd -outform DER -out key-encrypted.der
        req -x509 -new -key key-rsa.pem -subj /CN=x -out other-certificate.pem
        x509 -in other-certificate.pem -outform DER -out other-certificate.der
        pkey -in key-rsa.pem -pubout -out other-public.pem
        pkey -in key-rsa.pem -pubout -outform DER -out other-public.der
        pkcs12 -export -inkey key-rsa.pem -in other-certificate.pem -passout pass:abcd -out key-store.p12
    """
    for line in commands.strip().splitlines():
        subprocess.run(["openssl", *line.split()], cwd=directory, check=True, capture_output=True)
    for kind in ("ed25519", "ecdsa"):
        run("ssh-keygen", "-q", "-t", kind, "-N", "", "-f", directory / f"key-ssh-{kind}")
        (directory / f"key-ssh-{kind}.pub").rename(directory / f"other-ssh-{kind}.pub")
    pem = (directory / "key-pkcs8.pem").read_text()
    certificate = (directory / "other-certificate.pem").read_text()
    encrypted = (directory / "key-encrypted-rsa.pem").read_text()
    quoted = pem.replace("\n", "\\n")
    texts = {
        "key-encrypted-rsa.json": encrypted.replace("\n", "\\n"),
        "key-encrypted-crlf": encrypted.replace("\n", "\r\n"),
        "key-after-certificate": f"subject=x\n{certificate}{pem}",
        "key-crlf": pem.replace("\n", "\r\n"),
        "key-service-account.json": f'{{"private_key": "{quoted}"}}',
        "key-cloud-config": "ssh_keys:\n  rsa_private: |\n" + "".join(f"    {line}\n" for line in pem.splitlines()),
        "other-source.py": 'MARK = "-----BEGIN PRIVATE KEY-----"\nif MARK + "\\n" in text: pass\n',
        "other-manual": "-----BEGIN RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----\n",
        "other-empty": "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
        "key-pgp.asc": "-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2\n\nlQOYBGXK1n0BCADN+2rPPKZLxOmWv5ZT\n",
        # As update-mime-database writes it.
        "other-magic": "[50:application/pgp-keys]\n>0=\0%-----BEGIN PGP PRIVATE KEY BLOCK-----\n[50:application/x-t]\n",
    }
    for name, text in texts.items():
        (directory / name).write_text(text, newline="")
    put_java_stores(directory)
    return directory


def test_each_form_of_a_key(made: Path) -> None:
    found = {path.name: keys.has_private_key(path.read_bytes()) for path in made.iterdir()}
    assert found == {name: name.startswith("key-") for name in found}
    assert len(found) > 25
    der = (made / "key-rsa.der").read_bytes()
    assert not keys.has_private_key(der + b"x")
    assert not keys.has_private_key(der[:-1])


# What would take hours if it was gone over from each place to the end.
LONG = {
    "ends of lines": (b"-----BEGIN PRIVATE KEY-----", b"\n"),
    "headers": (b"", b"A: -----BEGIN PRIVATE KEY-----\n"),
    "headers of a DOS file": (b"", b"A: -----BEGIN PRIVATE KEY-----\r\n \r\n"),
    "headers of OpenPGP": (b"", b"A: -----BEGIN PGP PRIVATE KEY BLOCK-----\n"),
    "a long header": (b"-----BEGIN PRIVATE KEY-----\nA: ", b"A: "),
    "a long name": (b"-----BEGIN ", b"A"),
    "names": (b"", b"-----BEGIN A "),
    "backslashes": (b"-----BEGIN PRIVATE KEY-----", b"\\"),
}


@pytest.mark.parametrize(("before", "repeated"), LONG.values(), ids=LONG)
def test_long_files_are_gone_over_once(before: bytes, repeated: bytes) -> None:
    assert not keys.has_private_key((before + repeated * (1 << 20))[: 1 << 20])


@dataclass
class Files:
    """What a ``Tree`` tells of the files below *top*."""

    top: Path

    def key_files(self) -> dict[str, bytes]:
        files = sorted(path for path in self.top.rglob("*") if path.is_file())
        return {str(path.relative_to(self.top)): path.read_bytes() for path in files}

    def entries(self, patterns: Sequence[str]) -> list[Entry]:
        return [Entry(path, "file") for path in self.key_files() if any(fnmatch.fnmatchcase(path, p) for p in patterns)]

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        return {entry.path: (self.top / entry.path).read_bytes() for entry in self.entries(patterns)}

    def load(self, path: str, most: int, offset: int = 0) -> bytes | None:
        return (self.top / path).read_bytes()[offset:][:most] if (self.top / path).is_file() else None


def put(top: Path, path: str, data: bytes) -> None:
    (top / path).parent.mkdir(parents=True, exist_ok=True)
    (top / path).write_bytes(data)


def test_files_of_packages_pass(made: Path, tmp_path: Path) -> None:
    """By their digest; one that was changed does not, nor one that is not listed."""
    top, data, other = tmp_path / "top", (made / "key-rsa.pem").read_bytes(), (made / "key-ec.pem").read_bytes()
    put(top, "usr/lib/python3/dist-packages/x/test/key.pem", data)
    put(top, "usr/lib/python3/dist-packages/x/test/changed.pem", data + b"\n")
    put(top, "usr/lib/python3/dist-packages/x/__pycache__/t.cpython-313.pyc", data + b"x")
    # A layer's key passes, and is none to the search in bytes either.
    layer = (made / "key-dsa.pem").read_bytes()
    put(top, "var/lib/docker/overlay2/0/diff/key.pem", layer)
    put(top, "etc/ssl/private/own.key", other)
    digest = hashlib.md5(data).hexdigest()
    put(
        top, "var/lib/dpkg/info/python3-x.md5sums", f"{digest}  usr/lib/python3/dist-packages/x/test/key.pem\n".encode()
    )
    found, known = keys.search(cast(Tree, Files(top)), tmp_path)
    assert sorted(found) == ["etc/ssl/private/own.key", "usr/lib/python3/dist-packages/x/test/changed.pem"]
    assert sorted(known) == sorted([data, data + b"\n", data + b"x", layer, other])


def test_keys_that_another_check_has_found_are_told_once(made: Path, tmp_path: Path) -> None:
    put(tmp_path, "etc/ssh/ssh_host_ed25519_key", (made / "key-ssh-ed25519").read_bytes())
    put(tmp_path, "etc/ssh/odd key", (made / "key-ssh-ecdsa").read_bytes())
    before = [Finding("ssh-host-keys", "/etc/ssh/ssh_host_ed25519_key is an ssh host key")]
    found, known = audit.audit_keys(cast(Tree, Files(tmp_path)), tmp_path, before)
    assert found == [Finding("private-keys", "/etc/ssh/odd key has a private key")]
    assert len(known) == 2


def test_keys_of_gnupg(tmp_path: Path) -> None:
    """They are in a form of its own, which gpg writes."""
    home = tmp_path / "home/me/.gnupg"
    home.mkdir(mode=0o700, parents=True)
    for line in ("--batch --passphrase abcd --quick-generate-key me@example.com ed25519", ""):
        program = ["gpg", "--homedir", home, "--quiet", "--pinentry-mode", "loopback"] if line else ["gpgconf"]
        run(*program, *(line.split() or ["--homedir", home, "--kill", "all"]))
    put(tmp_path, "etc/pacman.d/gnupg/secring.gpg", b"")
    put(tmp_path, "etc/pacman.d/gnupg/private-keys-v1.d/0.key", b"(11:private-key")
    checks = [check for check in audit.CHECKS if check.name == "private-keys"]
    found = audit.audit_files(Directory(tmp_path), Asked(), checks)
    paths = list(tmp_path.rglob("*.key"))
    assert len(paths) == 2
    assert sorted(found, key=lambda finding: finding.what) == [
        Finding("private-keys", f"/{path.relative_to(tmp_path)} has a private key of GnuPG") for path in sorted(paths)
    ]


def test_a_signal_ends_the_search(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(data: bytes) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError

    put(tmp_path, "etc/key.pem", (made / "key-rsa.pem").read_bytes())
    monkeypatch.setattr(keys, "has_private_key", stopped)
    with interrupts.handled(), pytest.raises(Interrupted):
        audit.audit_keys(cast(Tree, Files(tmp_path)), tmp_path, [])


def test_what_is_too_much_can_be_left_out(tmp_path: Path) -> None:
    class TooMany(Files):
        def key_files(self) -> dict[str, bytes]:
            raise BuildError("It is too much.")

    with pytest.raises(BuildError) as caught:
        audit.audit_keys(cast(Tree, TooMany(tmp_path)), tmp_path, [])
    assert caught.value.hint == "'audit-skip = private-keys' leaves this check out."


# In a real filesystem, both ways.


@pytest.mark.parametrize("way", ["loop", "guestfs"])
def test_keys_on_a_disk(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The files are named; what is left of a removed one is found at the beginning of its block, and only that."""
    monkeypatch.setattr("sys.argv", [str(REPOSITORY / "image-factory")])
    top = tmp_path / "top"
    put(top, "etc/os-release", b"ID=x\n")
    put(top, "etc/own app/key with 'quotes'.pem", (made / "key-rsa.pem").read_bytes())
    put(top, "srv/x/store.P12", (made / "key-store.p12").read_bytes())
    put(top, "etc/odd/key[1].pem", (made / "key-ec.pem").read_bytes())
    put(top, "etc/odd/c .p12", (made / "key-store.p12").read_bytes())
    put(top, "etc/odd/a\nb.pem", (made / "key-ed25519.pem").read_bytes())
    put(top, "usr/share/x/test.pem", (made / "key-ssh-ed25519").read_bytes())
    put(top, "usr/share/x/gone.pem", (made / "key-pkcs8.pem").read_bytes())
    put(top, "usr/share/x/public.der", (made / "other-public.der").read_bytes())
    (top / "usr/share/x/link.pem").symlink_to("test.pem")
    # As a library that has one to test itself with, in one of its sectors that is no block of ext4.
    put(top, "usr/lib/libx.so", b"\x7fELF".ljust(512, b"x") + (made / "key-pkcs8.pem").read_bytes() + bytes(2 << 20))
    digest = hashlib.md5((made / "key-ssh-ed25519").read_bytes()).hexdigest()
    put(top, "var/lib/dpkg/info/x.md5sums", f"{digest}  usr/share/x/test.pem\n".encode())
    configuration = tmp_path / "own.conf"
    configuration.write_text(f"[x]\nlinux = /l\ninitrd = /i\noutput-dir = {tmp_path}\nmount-via = {way}\n")
    plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}), "x", {})
    build = Build(plan, tmp_path, "none")
    disk = Disk(tmp_path / "disk.raw")
    run("truncate", "-s", "34M", disk.path)
    subprocess.run(["sfdisk", "--quiet", disk.path], input="label: gpt\nstart=1MiB\n", text=True, check=True)
    run("mke2fs", "-q", "-t", "ext4", "-d", top, "-E", "offset=1048576", disk.path, "32M")
    run("debugfs", "-w", "-R", "rm usr/share/x/gone.pem", f"{disk.path}?offset=1048576")
    with mounts.WAYS[way].mounted(build, disk, partitions.read_volumes(disk.path)) as tree:
        found, known = audit.audit_keys(tree, tmp_path, [])
        blocks = audit.blocks_of(tree)
    assert sorted(finding.what for finding in found) == [
        "/etc/odd/a?b.pem has a private key",
        "/etc/odd/c .p12 has a private key",
        "/etc/odd/key[1].pem has a private key",
        "/etc/own app/key with 'quotes'.pem has a private key",
        "/srv/x/store.P12 has a private key",
    ]
    checks = [check for check in audit.CHECKS if check.name in ("private-keys", "ssh-host-keys")]
    [at] = audit.audit_bytes(disk.path, audit.Secrets(), checks, known, blocks)[-1:]
    assert re.fullmatch(r"a private key, or what is left of one, is at byte \d+ of the disk \(partition 1\)", at.what)
    [at] = audit.audit_bytes(disk.path, audit.Secrets(), checks, known)[-1:]
    assert at.what.endswith(" and in 1 more place")
    whole = audit.audit_bytes(disk.path, audit.Secrets(), checks)
    assert {finding.check for finding in whole} == {"private-keys", "ssh-host-keys"}
