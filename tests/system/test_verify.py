"""Downloads that can be trusted: real servers that fail in all the ways of mirrors, real signatures."""

import datetime
import gzip
import hashlib
import lzma
import os
import random
import re
import shutil
import ssl
import subprocess
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from email.utils import format_datetime
from functools import partial
from pathlib import Path

import httplib2
import pytest

from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.files import FILE_VARIABLE, Configuration
from image_factory.downloads import fetch, verify
from image_factory.model import Plan
from image_factory.sources import installer

from .test_fetch import File, Handler, RsyncDaemon, Server, redirect, rsync, status

__all__ = ["rsync"]

KERNEL = "6.12.43+deb13-amd64"
IMAGES = "dists/trixie/main/installer-amd64/current/images"
LINUX = f"{IMAGES}/netboot/debian-installer/amd64/linux"
INITRD = f"{IMAGES}/netboot/debian-installer/amd64/initrd.gz"
OLD = b"what a build before has left\n"
PORTAL = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n"


def bz_image(version: str) -> bytes:
    """Return what begins like an x86 kernel of *version*, and comes in more than one part."""
    image = bytearray(random.Random(version).randbytes(2500))
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x300).to_bytes(2, "little")
    image[0x500:0x540] = f"{version} (debian-kernel@lists.debian.org)".encode().ljust(64, b"\0")
    return bytes(image)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Keys.


class Keys:
    """Throw-away keys: ``good``, ``other``, which is in no keyring, and ``expired``."""

    def __init__(self, directory: Path) -> None:
        self.home = directory / "g"
        self.home.mkdir(mode=0o700)
        for name in ("good", "other"):
            self._gpg("--quick-generate-key", name, "ed25519", "sign", "never")
        self._gpg("--faked-system-time=20200101T000000!", "--quick-generate-key", "expired", "ed25519", "sign", "1d")
        self.keyring = directory / "keys.gpg"
        self.keyring.write_bytes(self._gpg("--export", "good", "expired"))
        listed = self._gpg("--with-colons", "--list-keys", "good").decode()
        self.fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))
        self.armoured = directory / "keys.asc"
        self.armoured.write_bytes(self._gpg("--armor", "--export", "good", "expired"))

    def _gpg(self, *arguments: str, data: bytes = b"") -> bytes:
        argv = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", "--yes", "--pinentry-mode", "loopback"]
        argv += ["--passphrase", "", *arguments]
        return subprocess.run(argv, input=data, capture_output=True, check=True).stdout

    def sign(self, data: bytes, *names: str, how: str = "--clearsign") -> bytes:
        names = names or ("good",)
        users = [word for name in names for word in ("--local-user", name)]
        then = ["--faked-system-time=20200101T010000!"] if "expired" in names else []
        return self._gpg(*then, *users, how, data=data)

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", self.home, "--kill", "all"], check=False, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keys]:
    found = Keys(tmp_path_factory.mktemp("k"))
    try:
        yield found
    finally:
        found.close()


# Mirrors.


class Mirror(Server):
    """A mirror of what is in *files*: contents, or scripts that answer in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, bytes | Callable[[Handler], None]] = {}
        self.script = self._answer

    def _answer(self, request: Handler) -> None:
        found = self.files.get(request.path.removeprefix("/debian/"), status(404))
        (File(found, etag=f'"{sha256(found)}"') if isinstance(found, bytes) else found)(request)

    def asked(self) -> list[str]:
        return [request.path.removeprefix("/debian/") for request in self.requests]

    def debian(self, path: str = LINUX) -> str:
        return self.uri(f"/debian/{path}")


class Archive:
    """A Debian archive with an installer; what it has is changed before it is put on a mirror."""

    def __init__(self, keys: Keys, kernel: str = KERNEL) -> None:
        self.keys = keys
        self.linux = bz_image(kernel)
        self.initrd = gzip.compress(b"initrd of " + kernel.encode(), mtime=0)
        self.components = kernel
        self.date = datetime.datetime(2026, 1, 10, 10, 0, tzinfo=datetime.UTC)
        self.fields = {"Origin": "Debian", "Suite": "stable", "Codename": "trixie"}
        self.signers: tuple[str, ...] = ("good",)

    def files(self) -> dict[str, bytes | Callable[[Handler], None]]:
        names = {"linux": self.linux, "initrd.gz": self.initrd}
        base = "./netboot/debian-installer/amd64/"
        sums = "".join(f"{sha256(data)}  {base}{name}\n" for name, data in names.items()).encode()
        packages = lzma.compress(f"Package: ext4-modules\nKernel-Version: {self.components}\n\n".encode())
        listed = {
            "main/installer-amd64/current/images/SHA256SUMS": sums,
            "main/installer-amd64/20250803/images/SHA256SUMS": sums,
            "main/debian-installer/binary-amd64/Packages.xz": packages,
        }
        fields = {"Date": format_datetime(self.date).replace("+0000", "UTC")} | self.fields
        lines = [*(f"{name}: {value}" for name, value in fields.items()), "MD5Sum:"]
        lines += [f" {'0' * 32} {len(data)} {path}" for path, data in listed.items()]
        lines += ["SHA256:", *(f" {sha256(data)} {len(data):>8} {path}" for path, data in listed.items())]
        text = "\n".join(lines).encode() + b"\n"
        return {
            "dists/trixie/InRelease": self.keys.sign(text, *self.signers),
            **{f"dists/trixie/{path}": data for path, data in listed.items()},
            LINUX: self.linux,
            INITRD: self.initrd,
            LINUX.replace("current", "20250803"): self.linux,
        }


@pytest.fixture
def mirrors() -> Iterator[tuple[Mirror, Mirror]]:
    with ExitStack() as stack:
        found = (stack.enter_context(Mirror()), stack.enter_context(Mirror()))
        for mirror in found:
            thread = threading.Thread(target=mirror.serve_forever, args=(0.02,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(mirror.shutdown)
        yield found


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PAUSE_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(fetch, "_PART_SIZE", 1000)
    monkeypatch.setattr(fetch, "_TIMEOUT_SECONDS", 10.0)


class Builder:
    """An image whose installer is to be fetched."""

    def __init__(self, directory: Path, keyring: Path | None) -> None:
        self.directory = directory
        self.keyring = keyring

    @property
    def cache(self) -> Path:
        return self.directory / "cache/x"

    def plan(self, linux: str, **keys: str) -> Plan:
        keys = {"linux": linux, "initrd": "/initrd", "cache_dir": str(self.directory / "cache")} | keys
        if self.keyring:
            keys = {"keyring": str(self.keyring)} | keys
        path = self.directory / "x.conf"
        path.write_text("[x]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()))
        settings = Configuration({FILE_VARIABLE: str(path)}).image("x", {})
        return Plan("x", settings, datetime.date(2026, 1, 11), self.directory, {})

    def fetch(self, linux: str, **keys: str) -> str:
        """Fetch the kernel as a build does; return where it came from."""
        plan = self.plan(linux, **keys)
        assert plan.settings.linux
        verifier = verify.Verifier(plan)
        verifier.check_cache({"linux": plan.settings.linux})
        with verifier.locked([plan.settings.linux]):
            self.fetched = verifier.fetch("linux", plan.settings.linux)
        if plan.settings.linux.path is None:
            verifier.check_modules(self.fetched.uri, self.fetched.path)
        return self.fetched.uri

    def files(self) -> dict[str, bytes]:
        """Return what is in the cache, but for what is known of it."""
        if not self.cache.is_dir():
            return {}
        return {path.name: path.read_bytes() for path in self.cache.iterdir() if not path.name.startswith(".")}

    def left(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.is_dir() else []

    def fails(self, linux: str, **keys: str) -> BuildError | ConfigurationError:
        with pytest.raises((BuildError, ConfigurationError)) as caught:
            self.fetch(linux, **keys)
        assert "\n" not in caught.value.message + (caught.value.hint or "")
        return caught.value


@pytest.fixture
def builder(tmp_path: Path, keys: Keys) -> Builder:
    return Builder(tmp_path, keys.keyring)


# What a mirror can do wrong.


def break_off(request: Handler) -> None:
    request.send_response(200)
    request.send_header("content-length", "2500")
    request.end_headers()
    request.wfile.write(b"only this")
    request.break_off()


def reset(request: Handler) -> None:
    request.break_off(reset=True)


def silent_truncation(request: Handler) -> None:
    """Without a length: HTTP itself can't tell."""
    request.send_response(200)
    request.send_header("connection", "close")
    request.end_headers()
    request.wfile.write(bz_image(KERNEL)[:1200])
    request.close_connection = True


def stall(request: Handler) -> None:
    request.send_response(200)
    request.send_header("content-length", "2500")
    request.end_headers()
    request.wfile.flush()
    request.connection.settimeout(3)
    with suppress(OSError):
        request.connection.recv(1)
    request.close_connection = True


Break = Callable[[Mirror, Archive], None]


def put(path: str, what: bytes | Callable[[Handler], None]) -> Break:
    return lambda mirror, archive: mirror.files.__setitem__(path, what)


def corrupted(path: str, at: int = 1800) -> Break:
    def apply(mirror: Mirror, archive: Archive) -> None:
        data = bytearray(mirror.files[path])
        data[min(at, len(data) - 2)] ^= 1
        mirror.files[path] = bytes(data)

    return apply


def absent(path: str) -> Break:
    return lambda mirror, archive: mirror.files.__delitem__(path) if path in mirror.files else None


def published(**changes: object) -> Break:
    """Return the fault of an archive that is whole in itself, but is not the one that is wanted."""

    def apply(mirror: Mirror, archive: Archive) -> None:
        for name, value in changes.items():
            setattr(archive, name, value)
        mirror.files = archive.files()

    return apply


def unsigned(mirror: Mirror, archive: Archive) -> None:
    text = mirror.files[RELEASE]
    assert isinstance(text, bytes)
    mirror.files[RELEASE] = text.split(b"\n\n", 1)[1].split(b"-----BEGIN")[0]


def text_before_the_signed_one(mirror: Mirror, archive: Archive) -> None:
    """A list of the attacker's in front of the genuine one, for a reader who doesn't look where it begins."""
    evil = b"changed by somebody" * 100
    sums = f"{sha256(evil)}  ./netboot/debian-installer/amd64/linux\n".encode()
    genuine = mirror.files[RELEASE]
    assert isinstance(genuine, bytes)
    lines = f"Suite: trixie\nDate: Sat, 10 Jan 2026 10:00:00 UTC\nSHA256:\n {sha256(sums)} 1 {SUMS_LISTED}\n\n"
    mirror.files |= {RELEASE: lines.encode() + genuine, SUMS: sums, LINUX: evil}


def half_updated(mirror: Mirror, archive: Archive) -> None:
    """The release is of today, the installer still the one of yesterday."""
    newer = Archive(archive.keys, "6.12.48+deb13-amd64").files()
    mirror.files[RELEASE] = newer[RELEASE]


def kernel_of_yesterday(mirror: Mirror, archive: Archive) -> None:
    mirror.files[LINUX] = bz_image("6.12.41+deb13-amd64")


RELEASE = "dists/trixie/InRelease"
SUMS = f"{IMAGES}/SHA256SUMS"
SUMS_LISTED = "main/installer-amd64/current/images/SHA256SUMS"
DAY = datetime.timedelta(days=1)
OUT_OF_DATE = {"Codename": "trixie", "Valid-Until": "Sat, 17 Jan 2026 10:00:00 UTC"}

FAULTS: dict[str, tuple[Break, str]] = {
    "kernel: breaks off": (put(LINUX, break_off), "9 of 2500 bytes|IncompleteRead"),
    "kernel: connection reset": (put(LINUX, reset), r"\(3 tries\)"),
    "kernel: stalls": (put(LINUX, stall), r"(?i)timed? ?out.*\(3 tries\)"),
    "kernel: truncated": (put(LINUX, bz_image(KERNEL)[:-1]), "expected SHA-256"),
    "kernel: truncated without a length": (put(LINUX, silent_truncation), "expected SHA-256"),
    "kernel: a bit has changed": (corrupted(LINUX), "expected SHA-256"),
    "kernel: a byte too much": (put(LINUX, bz_image(KERNEL) + b"x"), "expected SHA-256"),
    "kernel: empty": (put(LINUX, b""), "the file there is empty"),
    "kernel: 403": (put(LINUX, status(403)), "the server says 403"),
    "kernel: 404": (absent(LINUX), "the server says 404"),
    "kernel: 429": (put(LINUX, status(429)), r"the server says 429 .*\(3 tries\)"),
    "kernel: 500": (put(LINUX, status(500)), r"the server says 500 .*\(3 tries\)"),
    "kernel: 503": (put(LINUX, status(503)), r"the server says 503 .*\(3 tries\)"),
    "kernel: redirected without end": (put(LINUX, redirect(f"/debian/{LINUX}")), "more than 5 redirections"),
    "kernel: redirected to a file": (put(LINUX, redirect("file:///etc/passwd")), "redirects to file:"),
    "kernel: redirected to a portal": (put(LINUX, redirect("/debian/portal")), "a web page came"),
    "kernel: portal": (put(LINUX, PORTAL), "a web page came"),
    "kernel: of yesterday": (kernel_of_yesterday, "expected SHA-256"),
    "list: 404": (absent(SUMS), "the server says 404"),
    "list: 500": (put(SUMS, status(500)), "the server says 500"),
    "list: a bit has changed": (corrupted(SUMS, 3), "is not what .*InRelease lists: expected SHA-256"),
    "list: breaks off": (put(SUMS, break_off), r"Can't fetch .*SHA256SUMS"),
    "list: portal": (put(SUMS, PORTAL), "a web page came"),
    "mirror half updated": (half_updated, "is not what .*InRelease lists: expected SHA-256"),
    "release: 404": (absent(RELEASE), "InRelease: the server says 404"),
    "release: 429": (put(RELEASE, status(429)), "the server says 429"),
    "release: portal": (put(RELEASE, PORTAL), "a web page came"),
    "release: a bit has changed": (corrupted(RELEASE, 100), "is not what key [0-9A-F]+ has signed"),
    "release: truncated": (put(RELEASE, b"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\nOrigin"), "not accepted"),
    "release: no signature": (unsigned, "there is no signature"),
    "release: unknown key": (published(signers=("other",)), "key [0-9A-F]+ is not in the keyring"),
    "release: expired key": (published(signers=("expired",)), "key [0-9A-F]+ has expired"),
    "release: text before the signed one": (text_before_the_signed_one, "not accepted|is not what"),
    "release: of another suite": (published(fields={"Codename": "bookworm"}), "is that of bookworm, not of trixie"),
    "release: no longer valid": (published(fields=OUT_OF_DATE), "was valid until 2026-01-17"),
    "release: no date": (published(fields={"Codename": "trixie", "Date": "soon"}), "no date that can be read"),
    "release: does not list the installer": (
        lambda mirror, archive: mirror.files.__setitem__(
            RELEASE, archive.keys.sign(b"Codename: trixie\nDate: Sat, 10 Jan 2026 10:00:00 UTC\nSHA256:\n")
        ),
        "InRelease does not list main/installer-amd64",
    ),
}


@pytest.mark.parametrize("before", ["empty cache", "full cache"])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault(
    mirrors: tuple[Mirror, Mirror],
    builder: Builder,
    keys: Keys,
    fault: str,
    before: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is refused with the cache as it was; with a second mirror it does no harm."""
    if fault == "kernel: stalls":
        monkeypatch.setattr(fetch, "_TIMEOUT_SECONDS", 1.0)
    bad, good = mirrors
    good.files = Archive(keys).files()
    bad.files = Archive(keys).files() | {"portal": PORTAL}
    apply, message = FAULTS[fault]
    apply(bad, Archive(keys))
    kept = {}
    if before == "full cache":
        kept = {"linux": OLD}
        builder.cache.mkdir(parents=True)
        (builder.cache / "linux").write_bytes(OLD)
    error = builder.fails(bad.debian())
    assert_matches(message, error.message)
    assert bad.uri("") in error.message
    assert builder.files() == kept
    assert builder.left() == sorted(kept)
    assert builder.fetch(f"{bad.debian()} {good.debian()}") == good.debian()
    assert builder.files() == {"linux": bz_image(KERNEL)}


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def test_mismatch_names_file_expected_and_found(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    mirror, _ = mirrors
    mirror.files = Archive(keys).files() | {LINUX: b"something else"}
    message = builder.fails(mirror.debian()).message
    expected = f"expected SHA-256 {sha256(bz_image(KERNEL))}, found {sha256(b'something else')}."
    assert message == f"{mirror.debian()} is not what {mirror.debian(SUMS)} lists: {expected}"


def test_all_mirrors_are_named_when_none_is_good(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    first, second = mirrors
    first.files = Archive(keys).files() | {LINUX: b"bad"}
    message = builder.fails(f"{first.debian()}, {second.debian()}").message
    assert message.startswith("No mirror gives linux: ")
    assert first.debian() in message
    assert second.debian(RELEASE) in message


def test_which_mirror_served_is_noted(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = mirrors
    second.files = Archive(keys).files()
    caplog.set_level("INFO")
    builder.fetch(f"{first.debian()}\n  {second.debian()}")
    assert f"linux is served by {second.debian()}" in caplog.text
    assert "The next mirror is tried." in caplog.text
    caplog.clear()
    builder.fetch(f"{second.debian()} {first.debian()}")
    assert "is served by" not in caplog.text
    assert "a killed build" not in caplog.text
    assert "linux in the cache is what" in caplog.text


@pytest.mark.parametrize("version", ["current", "20250803"])
def test_debian(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys, version: str) -> None:
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    mirror.files[f"{IMAGES}/SHA256SUMS".replace("current", version)] = mirror.files[SUMS]
    uri = mirror.debian(LINUX.replace("current", version))
    assert builder.fetch(uri, verify="required") == uri
    assert builder.files() == {"linux": bz_image(KERNEL)}
    assert builder.fetched.verified_by == f"InRelease signed by {keys.fingerprint}"


def test_verified_file_in_the_cache_is_not_fetched_again(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys
) -> None:
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    builder.fetch(mirror.debian())
    mirror.requests.clear()
    builder.fetch(mirror.debian())
    assert LINUX not in mirror.asked()


def test_file_that_has_changed_in_the_cache_is_fetched_again(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys
) -> None:
    """Of the same length, with validators by which the server would say that nothing has changed."""
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    builder.fetch(mirror.debian())
    (builder.cache / "linux").write_bytes(bytes(2500))
    builder.fetch(mirror.debian())
    assert builder.files() == {"linux": bz_image(KERNEL)}


@pytest.mark.parametrize("signers", [("other", "good"), ("good", "other"), ("expired", "good")])
def test_one_good_signature_of_several_is_enough(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys, signers: tuple[str, ...]
) -> None:
    """Debian signs with the keys of several releases, and an older machine does not have the newest."""
    text = b"Codename: trixie\n"
    where = "the place"
    if "expired" in signers:
        # Two times of signing can't be faked in one call.
        with pytest.raises(BuildError, match="has expired"):
            verify.check_signature(keys.keyring, keys.sign(text, "expired"), None, where)
    else:
        signed = keys.sign(text, *signers)
        assert verify.check_signature(keys.keyring, signed, None, where) == (text, keys.fingerprint)


def test_armoured_keyring(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    builder.keyring = keys.armoured
    builder.fetch(mirror.debian(), verify="required")


def test_older_release_of_another_mirror_is_refused(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys
) -> None:
    """Kernel from one mirror, initrd from one that is of yesterday: they would not fit."""
    first, second = mirrors
    first.files = Archive(keys).files() | {INITRD: status(404)}
    stale = Archive(keys)
    stale.date -= DAY
    second.files = stale.files()
    plan = builder.plan(f"{first.debian()} {second.debian()}", initrd=f"{first.debian(INITRD)} {second.debian(INITRD)}")
    assert plan.settings.linux and plan.settings.initrd
    verifier = verify.Verifier(plan)
    with verifier.locked([plan.settings.linux]):
        verifier.fetch("linux", plan.settings.linux)
        with pytest.raises(BuildError, match="older than one of 2026-01-10 10:00"):
            verifier.fetch("initrd", plan.settings.initrd)
    assert set(builder.files()) == {"linux"}


def test_mirror_that_was_refused_does_not_bind_the_build_to_its_installer(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys
) -> None:
    broken, good = mirrors
    broken.files = Archive(keys, "6.12.41+deb13-amd64").files() | {LINUX: status(404)}
    good.files = Archive(keys).files()
    assert builder.fetch(f"{broken.debian()} {good.debian()}") == good.debian()


def test_older_release_than_in_a_build_before_is_refused(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys
) -> None:
    """Its signature is good for ever: only who has seen a newer one knows."""
    stale, good = mirrors
    good.files = Archive(keys).files()
    old = Archive(keys, "6.12.41+deb13-amd64")
    old.date -= 30 * DAY
    stale.files = old.files()
    builder.fetch(good.debian())
    error = builder.fails(stale.debian())
    assert "the mirror is out of date" in error.message
    assert builder.files() == {"linux": bz_image(KERNEL)}
    assert builder.fetch(f"{stale.debian()} {good.debian()}") == good.debian()
    remembered = builder.cache / ".trixie.release-date"
    assert str(remembered) in str(error.hint)
    for content in (b"", b"\xff", b"2026-01-10T10:00:00", None):
        remembered.unlink() if content is None else remembered.write_bytes(content)
        builder.fetch(stale.debian())
        assert builder.files() == {"linux": old.linux}


def test_initrd_of_another_installer_is_refused(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    first, second = mirrors
    first.files = Archive(keys).files() | {INITRD: status(404)}
    newer = Archive(keys, "6.12.48+deb13-amd64")
    newer.date += DAY
    second.files = newer.files()
    plan = builder.plan(first.debian(), initrd=f"{first.debian(INITRD)} {second.debian(INITRD)}")
    assert plan.settings.linux and plan.settings.initrd
    verifier = verify.Verifier(plan)
    with verifier.locked([plan.settings.linux]):
        verifier.fetch("linux", plan.settings.linux)
        with pytest.raises(BuildError, match="another version of the installer"):
            verifier.fetch("initrd", plan.settings.initrd)


# The kernel and the archive's installer components.


def test_kernel_older_than_the_components(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    mirror, _ = mirrors
    archive = Archive(keys)
    archive.components = "6.12.48+deb13-amd64"
    mirror.files = archive.files()
    error = builder.fails(mirror.debian())
    assert f"is of kernel {KERNEL}, but the archive's installer components are for 6.12.48+deb13-amd64" in error.message
    assert "current" in str(error.hint)


def test_components_that_are_not_known_are_no_error(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    del mirror.files["dists/trixie/main/debian-installer/binary-amd64/Packages.xz"]
    builder.fetch(mirror.debian())
    assert "modules for the installer's kernel is not known" in caplog.text


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("_UNPACKED_SIZE", 20, "unpacks to more than 20 B, which no such list has"),
        ("_UNPACKING_MEMORY", 1 << 20, "can't be unpacked: Memory usage limit exceeded"),
    ],
)
def test_components_that_unpack_to_too_much(
    mirrors: tuple[Mirror, Mirror],
    builder: Builder,
    keys: Keys,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: int,
    reason: str,
) -> None:
    monkeypatch.setattr(verify, limit, value)
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    builder.fetch(mirror.debian())
    assert reason in caplog.text


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_bomb_takes_no_more_than_the_limit(suffix: str) -> None:
    pack = {".xz": partial(lzma.compress, preset=0), ".gz": partial(gzip.compress, compresslevel=1)}[suffix]
    part = pack(bytes(192 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(BuildError, match=r"^http://h/Packages.* unpacks to more than 64\.0 MiB"):
            verify._unpacked(part, suffix, f"http://h/Packages{suffix}")
        assert tracemalloc.get_traced_memory()[1] < 160 << 20
    finally:
        tracemalloc.stop()
    assert verify._unpacked(pack(b"abc"), suffix, "") == b"abc"
    with pytest.raises(BuildError, match=r"^there can't be unpacked: "):
        verify._unpacked(b"no archive at all", suffix, "there")


@pytest.mark.parametrize("data", [b"", b"\x7fELF", bytes(4096), bz_image("")[:0x210]])
def test_file_that_is_no_kernel_has_no_version(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "linux").write_bytes(data)
    assert verify.kernel_version(tmp_path / "linux") is None


# Pinned checksums, and how strict verify is.


def test_pinned(mirrors: tuple[Mirror, Mirror], builder: Builder) -> None:
    bad, good = mirrors
    bad.files = {"linux": b"changed"}
    good.files = {"linux": b"genuine"}
    uris = f"{bad.debian('linux')} {good.debian('linux')}"
    for strictness in ("auto", "required", "none"):
        assert builder.fetch(uris, linux_sha256=sha256(b"genuine"), verify=strictness) == uris.split()[1]
        shutil.rmtree(builder.cache)
    error = builder.fails(bad.debian("linux"), linux_sha256=sha256(b"genuine"))
    assert "linux-sha256 of [x]" in error.message
    assert builder.left() == []


def test_pinned_local_file(builder: Builder, tmp_path: Path) -> None:
    (tmp_path / "linux").write_bytes(b"genuine")
    builder.fetch(str(tmp_path / "linux"), linux_sha256=sha256(b"genuine"))
    assert builder.fetched.verified_by == "linux-sha256"
    assert "linux-sha256 of [x]" in builder.fails(str(tmp_path / "linux"), linux_sha256=sha256(b"other")).message


def test_unknown_layout(mirrors: tuple[Mirror, Mirror], builder: Builder, caplog: pytest.LogCaptureFixture) -> None:
    mirror, _ = mirrors
    mirror.files = {"linux": b"a kernel"}
    error = builder.fails(mirror.debian("linux"), verify="required")
    assert error.message.endswith("can't be verified: its URI is of no known distribution.")
    assert "linux-sha256" in str(error.hint)
    assert builder.left() == []
    builder.fetch(mirror.debian("linux"))
    assert "is not verified: its URI is of no known distribution" in caplog.text
    caplog.clear()
    builder.fetch(mirror.debian("linux"), verify="none")
    assert "not verified" not in caplog.text


@pytest.mark.parametrize("page", [PORTAL, b"\xef\xbb\xbf\n<HTML lang=en>", b"  <!doctype HTML>"])
@pytest.mark.parametrize("strictness", ["auto", "none"])
def test_web_page_is_never_a_kernel(
    mirrors: tuple[Mirror, Mirror], builder: Builder, page: bytes, strictness: str
) -> None:
    mirror, _ = mirrors
    mirror.files = {"linux": page}
    error = builder.fails(mirror.debian("linux"), verify=strictness)
    assert "a web page came" in error.message
    assert "login" in str(error.hint)
    assert builder.left() == []


def test_none_asks_for_no_list(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    builder.fetch(mirror.debian(), verify="none")
    assert set(mirror.asked()) == {LINUX}


def test_missing_keyring(
    mirrors: tuple[Mirror, Mirror],
    builder: Builder,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reason of this machine's: a warning, unless verification is required."""
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    builder.keyring = None
    monkeypatch.setattr(verify, "KEYRINGS", builder.directory)
    error = builder.fails(mirror.debian(), verify="required")
    assert error.hint == "Install it: apt-get install debian-archive-keyring, or name another with 'keyring'"
    builder.fetch(mirror.debian())
    assert "debian-archive-keyring.gpg is missing" in caplog.text


@pytest.mark.parametrize(("content", "reason"), [(None, "can't be read"), (b"no keys", "not accepted")])
def test_bad_keyring(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys, content: bytes | None, reason: str
) -> None:
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    builder.keyring = builder.directory / "own.gpg"
    if content is not None:
        builder.keyring.write_bytes(content)
    with pytest.raises((BuildError, ConfigurationError), match=reason):
        builder.fetch(mirror.debian())


# Without a network.


def test_offline(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    mirror, _ = mirrors
    mirror.files = Archive(keys).files()
    uri = mirror.debian()
    assert f"lacks linux ({uri})" in builder.fails(uri, offline="yes").message
    builder.fetch(uri)
    mirror.requests.clear()
    for strictness in ("auto", "required", "none"):
        builder.fetch(uri, offline="yes", verify=strictness)
        assert builder.fetched.verified_by == f"InRelease signed by {keys.fingerprint}"
    builder.fetch(uri, offline="yes", linux_sha256=sha256(bz_image(KERNEL)))
    assert builder.fetched.verified_by == "linux-sha256"
    builder.fails(uri, offline="yes", linux_sha256=sha256(b"another"))
    builder.fails(mirror.debian(LINUX.replace("trixie", "forky")), offline="yes")
    (builder.cache / "linux").write_bytes(bytes(2500))
    builder.fails(uri, offline="yes")
    assert mirror.requests == []


def test_offline_names_all_that_is_missing_before_the_build(builder: Builder) -> None:
    plan = builder.plan("http://a.invalid/linux", initrd="http://a.invalid/initrd.gz", offline="yes")
    with pytest.raises(
        ConfigurationError, match=r"linux \(http://a.invalid/linux\), initrd \(http://a.invalid/initrd.gz\)"
    ):
        installer.check(plan)
    assert not builder.cache.exists()


def test_offline_with_what_was_never_verified(mirrors: tuple[Mirror, Mirror], builder: Builder) -> None:
    mirror, _ = mirrors
    mirror.files = {"linux": b"a kernel"}
    builder.fetch(mirror.debian("linux"))
    assert "verify = none" in str(builder.fails(mirror.debian("linux"), offline="yes").hint)
    builder.fetch(mirror.debian("linux"), offline="yes", verify="none")
    assert builder.fetched.verified_by is None


# The other distributions.

OPENSUSE = {
    "openSUSE-Leap-15.6-NET-x86_64-Media.iso": "openSUSE-Leap-15.6-NET-x86_64-Build710.3-Media.iso",
    "openSUSE-Tumbleweed-NET-x86_64-Current.iso": "openSUSE-Tumbleweed-NET-x86_64-Snapshot20260929-Media.iso",
    "Leap-16.0-online-installer-x86_64.install.iso": "Leap-16.0-online-installer-x86_64-Build178.27.install.iso",
}


@pytest.mark.parametrize("named", ["link", "build", "another build", "another product"])
@pytest.mark.parametrize("link", OPENSUSE)
def test_opensuse_iso(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys, link: str, named: str) -> None:
    """A link to the newest build has a list with the name of that; a list of another file says nothing."""
    build = OPENSUSE[link]
    asked = link if named in ("link", "another product") else build
    listed = {"another build": re.sub("(Build|Snapshot)[0-9]", r"\g<1>8", build), "another product": f"X{build}"}
    kind = "sha512" if link.startswith("Leap") else "sha256"
    text = f"{hashlib.new(kind, b'genuine').hexdigest()}  {listed.get(named, build)}\n".encode()
    signature = keys.sign(text, how="--detach-sign")
    mirrors[0].files = {asked: b"genuine", f"{asked}.{kind}": text, f"{asked}.{kind}.asc": signature}
    uri = mirrors[0].debian(asked)
    if named.startswith("another"):
        for strictness in ("auto", "required"):
            assert f"does not list {asked}" in builder.fails(uri, verify=strictness).message
        return
    builder.fetch(uri, verify="required")
    assert builder.fetched.verified_by == f"{asked}.{kind} signed by {keys.fingerprint}"
    builder.fetch(uri, offline="yes")
    mirrors[0].files[asked] = b"changed"
    (builder.cache / asked).unlink()
    algorithm = "SHA-512" if kind == "sha512" else "SHA-256"
    assert f"lists: expected {algorithm} " in builder.fails(uri).message


SUM_LISTS = {
    "ubuntu cloud image": (
        "releases/24.04/release/ubuntu-24.04-server-cloudimg-amd64.img",
        "releases/24.04/release/SHA256SUMS",
        ".gpg",
    ),
    "ubuntu ISO": ("24.04/ubuntu-24.04.3-live-server-amd64.iso", "24.04/SHA256SUMS", ".gpg"),
    "ubuntu netboot": ("24.04/netboot/amd64/linux", "24.04/SHA256SUMS", ".gpg"),
    "debian ISO": ("13.1.0/amd64/iso-cd/debian-13.1.0-amd64-netinst.iso", "13.1.0/amd64/iso-cd/SHA256SUMS", ".sign"),
    "openSUSE ISO": (
        "iso/openSUSE-Leap-15.6-NET-x86_64-Media.iso",
        "iso/openSUSE-Leap-15.6-NET-x86_64-Media.iso.sha256",
        ".asc",
    ),
    "openSUSE tree": ("repo/oss/boot/x86_64/loader/linux", "repo/oss/CHECKSUMS", ".asc"),
}


@pytest.mark.parametrize("armour", ["--detach-sign", "--armor"])
@pytest.mark.parametrize("which", SUM_LISTS)
def test_signed_list(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys, which: str, armour: str) -> None:
    bad, good = mirrors
    path, sums, suffix = SUM_LISTS[which]
    listed = path.removeprefix(sums.rpartition("/")[0] + "/")
    text = f"{sha256(b'other')} *other\n{sha256(b'genuine')} *{listed}\n".encode()
    signature = keys._gpg("--local-user", "good", *dict.fromkeys((armour, "--detach-sign")), data=text)
    good.files = {path: b"genuine", sums: text, sums + suffix: signature}
    assert builder.fetch(good.debian(path), verify="required") == good.debian(path)
    assert builder.fetched.verified_by == f"{sums.rpartition('/')[2]} signed by {keys.fingerprint}"
    shutil.rmtree(builder.cache)
    for fault in (
        {path: b"changed"},
        {sums: text.replace(b"other", b"0ther")},
        {sums + suffix: b""},
        {sums + suffix: PORTAL},
        {sums + suffix: status(404)},
        {sums + suffix: keys.sign(text, "other", how="--detach-sign")},
        {sums + suffix: keys.sign(text, "expired", how="--detach-sign")},
        {sums: status(500)},
    ):
        bad.files = good.files | fault
        builder.fails(bad.debian(path), verify="auto")
        assert builder.left() == []
    assert builder.fetch(f"{bad.debian(path)} {good.debian(path)}") == good.debian(path)


def test_signed_list_without_the_file(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    mirror, _ = mirrors
    text = f"{sha256(b'other')} *other\n".encode()
    signature = keys.sign(text, how="--detach-sign")
    mirror.files = {"24.04/netboot/amd64/linux": b"x", "24.04/SHA256SUMS": text, "24.04/SHA256SUMS.gpg": signature}
    uri = mirror.debian("24.04/netboot/amd64/linux")
    assert "does not list netboot/amd64/linux" in builder.fails(uri, verify="required").message
    builder.fetch(uri)


def test_release_that_has_been_replaced(mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys) -> None:
    """The mirror has the last point release alone."""
    mirror, _ = mirrors
    text = f"{sha256(b'other')} *ubuntu-24.04.4-live-server-amd64.iso\n".encode()
    mirror.files = {"24.04/SHA256SUMS": text, "24.04/SHA256SUMS.gpg": keys.sign(text, how="--detach-sign")}
    error = builder.fails(mirror.debian("24.04/ubuntu-24.04.3-live-server-amd64.iso"))
    assert error.message.endswith("/24.04/SHA256SUMS does not list ubuntu-24.04.3-live-server-amd64.iso.")
    assert error.hint == "It lists ubuntu-24.04.4-live-server-amd64.iso: is that a newer release of it?"


def test_keys_of_opensuse_are_not_known(mirrors: tuple[Mirror, Mirror], builder: Builder) -> None:
    mirror, _ = mirrors
    builder.keyring = None
    error = builder.fails(mirror.debian("iso/openSUSE-Leap-15.6-NET-x86_64-Media.iso"), verify="required")
    assert "'keyring'" in str(error.hint)


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A mirror with https, whose certificate is trusted here."""
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    argv += ["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost"]
    argv += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(argv, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(httplib2, "CA_CERTS", str(tmp_path / "cert.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Mirror() as found:
        found.socket = context.wrap_socket(found.socket, server_side=True)
        thread = threading.Thread(target=found.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield found
        finally:
            found.shutdown()
            thread.join()


TREE = "fedora/linux/releases/43/Everything/x86_64/os"
VMLINUZ = f"{TREE}/images/pxeboot/vmlinuz"


def treeinfo(data: bytes, kind: str = "sha256") -> bytes:
    return f"[general]\nname = Fedora\n[checksums]\nimages/pxeboot/vmlinuz = {kind}:{sha256(data)}\n".encode()


def canonical(secure: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    host = f"https://127.0.0.1:{secure.server_port}/debian/fedora/linux/"
    monkeypatch.setattr(verify, "CANONICAL", ((verify.CANONICAL[0][0], host),))


def test_treeinfo_from_the_canonical_host(
    mirrors: tuple[Mirror, Mirror], secure: Mirror, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror by http has its own .treeinfo, which nobody asks for."""
    canonical(secure, monkeypatch)
    bad, good = mirrors
    secure.files = {f"{TREE}/.treeinfo": treeinfo(b"genuine")}
    bad.files = {VMLINUZ: b"changed", f"{TREE}/.treeinfo": treeinfo(b"changed")}
    good.files = {VMLINUZ: b"genuine"}
    assert "expected SHA-256" in builder.fails(bad.debian(VMLINUZ)).message
    assert builder.left() == []
    uri = builder.fetch(f"{bad.debian(VMLINUZ)} {good.debian(VMLINUZ)}", verify="required")
    assert uri == good.debian(VMLINUZ)
    assert builder.fetched.verified_by == ".treeinfo by https from 127.0.0.1"
    assert f"{TREE}/.treeinfo" not in bad.asked() + good.asked()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (status(404), "the server says 404"),
        (redirect("http://127.0.0.1:1/.treeinfo"), "redirects to http:"),
        (b"[checksums]\nother = sha256:0\n", "does not list images/pxeboot/vmlinuz"),
        (b"\xff\xfe", "can't be read"),
        (b"nonsense", "can't be read"),
        (treeinfo(b"genuine", "md5"), "has no SHA-256"),
        (PORTAL, "a web page came"),
    ],
)
def test_bad_treeinfo(
    mirrors: tuple[Mirror, Mirror],
    secure: Mirror,
    builder: Builder,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | Callable[[Handler], None],
    message: str,
) -> None:
    canonical(secure, monkeypatch)
    secure.files = {f"{TREE}/.treeinfo": content}
    mirrors[0].files = {VMLINUZ: b"genuine"}
    assert message in builder.fails(mirrors[0].debian(VMLINUZ)).message
    assert builder.left() == []


def test_certificate_that_is_not_trusted(
    mirrors: tuple[Mirror, Mirror], secure: Mirror, builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    canonical(secure, monkeypatch)
    monkeypatch.setattr(httplib2, "CA_CERTS", httplib2.certs.where())
    secure.files = {f"{TREE}/.treeinfo": treeinfo(b"genuine")}
    mirrors[0].files = {VMLINUZ: b"genuine"}
    assert "CERTIFICATE_VERIFY_FAILED" in builder.fails(mirrors[0].debian(VMLINUZ)).message


@pytest.mark.parametrize(
    ("mirror", "host"),
    [
        (
            "http://m/pub/fedora/linux/releases/43/Everything/x86_64/os/",
            "https://dl.fedoraproject.org/pub/fedora/linux/",
        ),
        ("http://m/centos-stream/10-stream/BaseOS/x86_64/os/", "https://mirror.stream.centos.org/"),
        ("http://m/rocky/9.6/BaseOS/x86_64/os/", "https://download.rockylinux.org/pub/rocky/"),
        ("http://m/almalinux/10/BaseOS/x86_64/os/", "https://repo.almalinux.org/almalinux/"),
        ("http://m/images/cloud/trixie/daily/latest/", "https://cloud.debian.org/images/cloud/trixie/daily/"),
        ("http://m/f/releases/44/Cloud/x86_64/images/", "https://dl.fedoraproject.org/pub/fedora/linux/releases/44/"),
        ("http://m/centos/9-stream/aarch64/images/", "https://cloud.centos.org/centos/9-stream/"),
        ("http://m/rocky/9/images/x86_64/", "https://download.rockylinux.org/pub/rocky/9/images/"),
        ("http://m/almalinux/9/cloud/x86_64/images/", "https://repo.almalinux.org/almalinux/9/cloud/"),
    ],
)
def test_canonical_hosts(mirror: str, host: str) -> None:
    found = [canonical + match[1] for pattern, canonical in verify.CANONICAL if (match := pattern.fullmatch(mirror))]
    assert len(found) == 1
    assert found[0].startswith(host)
    assert found[0].endswith(mirror.rpartition("/")[0].rpartition("/")[2] + "/")


# Path on a mirror, name of the list, whether that is written with --tag, and the signature of one that is signed:
# "" is one in the list.
CLOUD_IMAGES = [
    ("images/cloud/trixie/latest/debian-13-genericcloud-amd64.qcow2", "SHA512SUMS", False, None),
    ("images/cloud/bookworm/20260101-1234/debian-12-generic-arm64.tar.xz", "SHA512SUMS", False, None),
    (
        "fedora/linux/releases/44/Cloud/x86_64/images/Fedora-Cloud-Base-Generic-44-1.7.x86_64.qcow2",
        "Fedora-Cloud-44-1.7-x86_64-CHECKSUM", True, "",
    ),
    (
        "centos/10-stream/x86_64/images/CentOS-Stream-GenericCloud-10-latest.x86_64.qcow2",
        "CentOS-Stream-GenericCloud-10-latest.x86_64.qcow2.SHA256SUM", True, None,
    ),
    (
        "rocky/9/images/x86_64/Rocky-9-GenericCloud-Base.latest.x86_64.qcow2",
        "Rocky-9-GenericCloud-Base.latest.x86_64.qcow2.CHECKSUM", True, None,
    ),
    (
        "almalinux/10/cloud/x86_64/images/AlmaLinux-10-GenericCloud-latest.x86_64.qcow2",
        "CHECKSUM", False, "CHECKSUM.asc",
    ),
]  # fmt: skip


def listed(path: str, name: str, data: bytes, *, tagged: bool) -> bytes:
    kind = "sha512" if "512" in name else "sha256"
    digest, file = hashlib.new(kind, data).hexdigest(), path.rpartition("/")[2]
    return (f"{kind.upper()} ({file}) = {digest}\n" if tagged else f"{digest}  {file}\n").encode()


@pytest.mark.parametrize(("path", "name", "tagged", "signature"), CLOUD_IMAGES)
def test_cloud_image_by_the_canonical_host(
    mirrors: tuple[Mirror, Mirror],
    secure: Mirror,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    name: str,
    tagged: bool,
    signature: str | None,
) -> None:
    """The list of the mirror itself counts for nothing."""
    bad, good = mirrors
    directory = path.rpartition("/")[0] + "/"
    [inner] = [match[1] for pattern, _ in verify.CANONICAL if (match := pattern.fullmatch(bad.debian(directory)))]
    host = f"https://127.0.0.1:{secure.server_port}/debian/"
    monkeypatch.setattr(verify, "CANONICAL", tuple((pattern, host) for pattern, _ in verify.CANONICAL))
    secure.files = {f"{inner}{name}": listed(path, name, b"genuine", tagged=tagged)}
    bad.files = {path: b"changed", f"{directory}{name}": listed(path, name, b"changed", tagged=tagged)}
    good.files = {path: b"genuine"}
    builder = Builder(tmp_path, None)
    assert "expected SHA-" in builder.fails(bad.debian(path), verify="required").message
    assert builder.left() == []
    assert builder.fetch(f"{bad.debian(path)} {good.debian(path)}", verify="required") == good.debian(path)
    assert builder.fetched.verified_by == f"{name} by https from 127.0.0.1"
    secure.files = {f"{inner}{name}": b"nothing of it\n"}
    assert (
        "does not list" in builder.fails(good.debian(path), verify="required", cache_dir=str(tmp_path / "new")).message
    )


@pytest.mark.parametrize(("path", "name", "tagged", "signature"), [row for row in CLOUD_IMAGES if row[3] is not None])
def test_signed_list_of_cloud_images(
    mirrors: tuple[Mirror, Mirror], builder: Builder, keys: Keys, path: str, name: str, tagged: bool, signature: str
) -> None:
    """With the keys of who signs it, the mirror's own list counts."""
    mirror = mirrors[0]
    where = path.rpartition("/")[0] + "/"

    def publish(signer: str) -> None:
        text = listed(path, name, b"genuine", tagged=tagged)
        mirror.files = {path: b"genuine", f"{where}{name}": text if signature else keys.sign(text, signer)}
        if signature:
            mirror.files[f"{where}{signature}"] = keys.sign(text, signer, how="--detach-sign")

    publish("other")
    assert "The signature of" in builder.fails(mirror.debian(path)).message
    publish("good")
    builder.fetch(mirror.debian(path), verify="required")
    assert builder.fetched.verified_by is not None
    assert f"{name} signed by " in builder.fetched.verified_by


def test_tree_of_an_unknown_distribution(mirrors: tuple[Mirror, Mirror], builder: Builder) -> None:
    uri = mirrors[0].debian("own/os/images/pxeboot/vmlinuz")
    assert "host is not known" in builder.fails(uri, verify="required").message


# By rsync.


def publish(daemon: RsyncDaemon, files: dict[str, bytes | Callable[[Handler], None]]) -> None:
    for path, data in files.items():
        assert isinstance(data, bytes)
        (daemon.root / path).parent.mkdir(parents=True, exist_ok=True)
        (daemon.root / path).write_bytes(data)


def test_rsync(rsync: RsyncDaemon, builder: Builder, keys: Keys) -> None:
    """Lists and file come from the daemon, and are verified like those of a web server."""
    publish(rsync, Archive(keys).files())
    uri = rsync.uri(LINUX)
    assert builder.fetch(uri, verify="required") == uri
    assert builder.files() == {"linux": bz_image(KERNEL)}
    assert (builder.cache / "linux").stat().st_mode & 0o777 == 0o644
    assert builder.left() == [".linux.verification", ".trixie.release-date", "linux"]
    builder.fetch(uri, offline="yes")


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (LINUX, b"changed", "is not what .*SHA256SUMS lists: expected SHA-256"),
        (LINUX, b"", "empty, or no file"),
        (SUMS, b"changed", "is not what .*InRelease lists: expected SHA-256"),
        (RELEASE, b"changed", "there is no signature"),
        (RELEASE, None, "rsync failed with status 23"),
    ],
)
def test_rsync_of_a_bad_mirror(
    mirrors: tuple[Mirror, Mirror],
    rsync: RsyncDaemon,
    builder: Builder,
    keys: Keys,
    path: str,
    content: bytes | None,
    message: str,
) -> None:
    files = Archive(keys).files()
    publish(rsync, files)
    if content is None:
        (rsync.root / path).unlink()
    else:
        (rsync.root / path).write_bytes(content)
    assert_matches(message, builder.fails(rsync.uri(LINUX)).message)
    assert builder.left() == []
    mirrors[0].files = files
    assert builder.fetch(f"{rsync.uri(LINUX)} {mirrors[0].debian()}") == mirrors[0].debian()


def test_rsync_that_has_replaced_the_file_of_a_web_server(
    mirrors: tuple[Mirror, Mirror], rsync: RsyncDaemon, builder: Builder
) -> None:
    """By what is known of the older file, of the same length, the web server would say that nothing has changed."""
    mirrors[0].files = {"linux": b"of the web server"}
    publish(rsync, {"linux": b"of the rsync one!"})
    os.utime(rsync.root / "linux", (0, 0))
    builder.fetch(mirrors[0].debian("linux"))
    builder.fetch(rsync.uri())
    assert builder.files() == {"linux": b"of the rsync one!"}
    builder.fetch(mirrors[0].debian("linux"))
    assert builder.files() == {"linux": b"of the web server"}


# What is refused before the build, and what it needs.


@pytest.mark.parametrize(
    ("keys_of_tree", "message"),
    [
        ({"installer_image": "http://a/os http://b/os"}, "has one URI"),
        ({"installer_image": "http://a/os", "verify": "required"}, "verifies nothing"),
        ({"installer_image": "http://a/os", "offline": "yes"}, "verifies nothing"),
        ({"installer_image": "http://a/os", "installer_image_sha256": "0" * 64}, "has no SHA-256"),
    ],
)
def test_tree_that_virt_install_reads(builder: Builder, keys_of_tree: dict[str, str], message: str) -> None:
    plan = builder.plan("http://a/linux", **keys_of_tree)
    with pytest.raises(ConfigurationError, match=message):
        installer.check(plan)


@pytest.mark.parametrize(
    ("uri", "strictness", "needed"),
    [
        (f"http://a/debian/{LINUX}", "required", ["gpgv"]),
        (f"http://a/debian/{LINUX}", "auto", []),
        ("http://a/own/linux", "required", []),
        (f"http://a/{VMLINUZ}", "required", []),
    ],
)
def test_programs(builder: Builder, uri: str, strictness: str, needed: list[str]) -> None:
    settings = builder.plan(uri, verify=strictness).settings
    assert settings.linux
    assert verify.programs(settings, [settings.linux]) == needed
