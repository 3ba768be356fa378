"""What is published is signed by the real gpg, with keys that are made here and thrown away."""

import dataclasses
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_factory.base import locks
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.finishing import sign
from image_factory.model import Artifact, Build, Plan

from ..conftest import shown
from .test_manifest import named, published

ALICE, BOB, LOCKED, OLD, REVOKED = (
    f"{name} <{name}@example.com>" for name in ("alice", "bob", "locked", "old", "gone")
)
PRESET = "/usr/lib/gnupg/gpg-preset-passphrase"


class Keys:
    """A home of gpg with keys, in a place whose path is short enough for the agent's socket."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (home / "gpg-agent.conf").write_text("allow-preset-passphrase\n")
        self.make(ALICE)
        self.make(BOB)
        self.make(LOCKED, passphrase="right")
        self.make(OLD, "--faked-system-time", "20200101T000000", expires="2020-02-01")
        self.make(REVOKED)
        [revocation] = (home / "openpgp-revocs.d").glob(f"{self.fingerprint(REVOKED)}.rev")
        revocation.write_text(revocation.read_text().replace(":-----BEGIN", "-----BEGIN"))
        self.gpg("--import", str(revocation))

    def gpg(self, *words: str, passphrase: str = "", check: bool = True) -> str:
        argv = ["gpg", "--homedir", self.home, "--batch", "--pinentry-mode", "loopback", "--passphrase", passphrase]
        done = subprocess.run([*argv, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def make(self, name: str, *options: str, passphrase: str = "", expires: str = "never") -> None:
        self.gpg(*options, "--quick-gen-key", name, "ed25519", "sign", expires, passphrase=passphrase)

    def field(self, name: str, kind: str) -> str:
        lines = self.gpg("--with-colons", "--with-keygrip", "--list-secret-keys", "--", name).splitlines()
        return next(line.split(":")[9] for line in lines if line.startswith(f"{kind}:"))

    def fingerprint(self, name: str) -> str:
        return self.field(name, "fpr")

    def export(self, file: Path, *names: str, passphrase: str = "") -> Path:
        file.write_text(self.gpg("--armor", "--export-secret-keys", *names, passphrase=passphrase))
        file.chmod(0o600)
        return file

    def stop_agent(self) -> None:
        subprocess.run(["gpgconf", "--homedir", self.home, "--kill", "all"], check=True)


@pytest.fixture(scope="module")
def keys() -> Iterator[Keys]:
    home = Path(
        subprocess.run(
            ["mktemp", "-d", "/tmp/if-test-gpg.XXXX"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    found = None
    try:
        found = Keys(home)
        yield found
    finally:
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False)
        subprocess.run(["gpgconf", "--homedir", home, "--remove-socketdir"], check=False, capture_output=True)
        for _ in range(50):
            subprocess.run(["rm", "-rf", home], check=False)
            if not home.exists():
                break
            time.sleep(0.1)


@pytest.fixture(autouse=True)
def nothing_left(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have gpg's home be the one of the tests, and look for homes and agents of the program's after each."""
    monkeypatch.setenv("GNUPGHOME", str(keys.home))
    yield
    assert not list(Path("/tmp").glob("image-factory-gpg.*"))
    assert not list(Path("/tmp").glob("image-factory-sums.*"))
    agents = subprocess.run(
        ["pgrep", "-af", "gpg-agent.*image-factory-gpg"], capture_output=True, text=True, check=False
    )
    assert agents.stdout == ""


class Place:
    """A build with two published artifacts, as they were before."""

    def __init__(self, path: Path) -> None:
        self.artifacts = published(path)
        self.plan = named(path)

    def with_key(self, key: str | Path) -> Plan:
        return dataclasses.replace(self.plan, settings=dataclasses.replace(self.plan.settings, sign_key=str(key)))

    def signed(self, key: str | Path) -> list[Artifact]:
        # What is signed is in the working directory then.
        return sign.sign_all(Build(self.with_key(key), self.plan.output_dir, "vm"), self.artifacts)

    def refused(self, key: str | Path) -> BuildError:
        """Return the error of a build with *key*; the checks before it have the same."""
        with pytest.raises(ConfigurationError) as caught:
            sign.check(self.with_key(key))
        assert caught.value.message.startswith("[x] sign-key: ")
        with pytest.raises(BuildError) as failed:
            self.signed(key)
        assert caught.value.message.partition("sign-key: ")[2] in failed.value.message
        assert caught.value.hint == failed.value.hint
        assert "\n" not in failed.value.message + (failed.value.hint or "")
        assert not (self.plan.output_dir / "x-2024-02-29.SHA256SUMS.asc").exists()
        return failed.value


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def verify(directory: Path, keys: Keys) -> str:
    """Return whose signature it is, as the user's gpg says, of checksums that are right."""
    return sums_signed_by(directory / "x-2024-02-29.SHA256SUMS", keys)


def sums_signed_by(sums: Path, keys: Keys) -> str:
    argv = ["gpg", "--homedir", keys.home, "--status-fd", "1", "--verify", f"{sums}.asc", sums]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", sums.name], cwd=sums.parent, check=True)
    return next(line.split()[2] for line in done.stdout.splitlines() if line.startswith("[GNUPG:] VALIDSIG"))


def test_all_that_is_published_is_signed(place: Place, keys: Keys) -> None:
    sign.check(place.with_key(ALICE))
    before = place.artifacts
    found = place.signed(ALICE)
    assert verify(place.plan.output_dir, keys) == keys.fingerprint(ALICE)
    names = [line.split()[1] for line in (place.plan.output_dir / "x-2024-02-29.SHA256SUMS").read_text().splitlines()]
    assert names == [path.name for artifact in before for path in (artifact.path, *artifact.others)]
    assert len(names) == 8
    for artifact in found:
        assert [name for name, _ in artifact.companions[2:]] == [
            "x-2024-02-29.SHA256SUMS",
            "x-2024-02-29.SHA256SUMS.asc",
        ]
    text = (place.plan.output_dir / "x-2024-02-29.SHA256SUMS.asc").read_text()
    assert text.startswith("-----BEGIN PGP SIGNATURE-----\n")


@pytest.mark.parametrize("form", ["fingerprint", "address", "file"])
def test_ways_to_name_a_key(place: Place, keys: Keys, tmp_path: Path, form: str) -> None:
    names = {
        "fingerprint": keys.fingerprint(BOB),
        "address": "bob@example.com",
        "file": keys.export(tmp_path / "bob.key", BOB),
    }
    sign.check(place.with_key(names[form]))
    place.signed(names[form])
    assert verify(place.plan.output_dir, keys) == keys.fingerprint(BOB)
    # Once more, as a build that is resumed does it.
    place.signed(names[form])
    assert verify(place.plan.output_dir, keys) == keys.fingerprint(BOB)


def test_key_file_needs_no_home_and_touches_none(
    place: Place, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = keys.export(tmp_path / "alice.key", ALICE)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("GNUPGHOME")
    place.signed(file)
    assert list(home.iterdir()) == []
    assert verify(place.plan.output_dir, keys) == keys.fingerprint(ALICE)
    secret = "".join(file.read_text().splitlines()[2:6])
    assert secret[:40] not in caplog.text


def test_without_a_key_nothing_is_done(place: Place) -> None:
    sign.check(place.plan)
    assert sign.programs(place.plan) == []
    assert list(sign.steps(Build(place.plan, place.plan.work_path, "vm"))) == []


def test_dry_run_shows_the_commands(place: Place) -> None:
    build = Build(place.with_key("/srv/key"), place.plan.work_path, "vm")
    [(name, [import_key, sign_it, export])] = shown(build, sign.steps(build)).items()
    assert name == "Signing"
    assert import_key[-2:] == ["--import", "/srv/key"]
    assert sign_it[-1] == str(build.directory / "x-2024-02-29.SHA256SUMS")
    assert export[-2:] == ["--export", "FINGERPRINT"]
    build = Build(place.with_key(ALICE), place.plan.work_path, "vm")
    [(_, own)] = shown(build, sign.steps(build)).items()
    # With the user's own home, into which nothing is imported.
    sums = Path(sign_it[-1])
    signature = sums.with_name(f"{sums.name}.asc")
    assert own == [sign.sign_argv((), "FINGERPRINT", sums, signature), sign.export_argv((), "FINGERPRINT")]
    names = [name for name, _ in sign.named(build.plan, place.artifacts)[0].companions]
    assert names[2:] == ["x-2024-02-29.SHA256SUMS", "x-2024-02-29.SHA256SUMS.asc"]


# What can't sign: one line at once, and no question.


def test_key_with_a_passphrase_that_no_agent_knows(place: Place, keys: Keys) -> None:
    keys.stop_agent()
    start = time.monotonic()
    error = place.refused(LOCKED)
    assert time.monotonic() - start < 120
    assert error.message.endswith(f"gpg can't sign with {keys.fingerprint(LOCKED)}: No pinentry.")
    assert "doesn't know the key's passphrase" in (error.hint or "")


def test_key_file_with_a_passphrase(place: Place, keys: Keys, tmp_path: Path) -> None:
    error = place.refused(keys.export(tmp_path / "locked.key", LOCKED, passphrase="right"))
    assert error.message.endswith("No pinentry.")


def preset(keys: Keys, passphrase: str) -> None:
    keys.stop_agent()
    subprocess.run(["gpg-connect-agent", "--homedir", keys.home, "/bye"], check=True, capture_output=True)
    argv = [PRESET, "--preset", keys.field(LOCKED, "grp")]
    subprocess.run(argv, input=passphrase, text=True, check=True, env=os.environ | {"GNUPGHOME": str(keys.home)})


def test_agent_that_knows_the_passphrase(place: Place, keys: Keys) -> None:
    preset(keys, "right")
    sign.check(place.with_key(LOCKED))
    place.signed(LOCKED)
    assert verify(place.plan.output_dir, keys) == keys.fingerprint(LOCKED)


def test_agent_that_knows_a_wrong_passphrase(place: Place, keys: Keys) -> None:
    preset(keys, "wrong")
    error = place.refused(LOCKED)
    # The agent forgets it, and would ask.
    assert error.message.endswith(": No pinentry.")
    assert "doesn't know the key's passphrase" in (error.hint or "")


def test_no_agent_can_be_started(place: Place, keys: Keys) -> None:
    keys.stop_agent()
    configuration = keys.home / "gpg.conf"
    configuration.write_text("no-autostart\n")
    try:
        error = place.refused(ALICE)
    finally:
        configuration.unlink()
    print(error.message, error.hint)
    assert "no gpg-agent" in error.message


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (OLD, r"The key [0-9A-F]{40} of old <old@example\.com> has expired\."),
        (REVOKED, r"The key [0-9A-F]{40} of gone <gone@example\.com> is revoked\."),
        ("nobody@example.com", r"gpg has no secret key of nobody@example\.com\."),
        ("--version", r"gpg has no secret key of --version\."),
        ("@example.com", r"gpg has 3 keys of @example\.com\."),
    ],
)
def test_keys_that_can_not_be_used(place: Place, key: str, message: str) -> None:
    assert re.search(f"{message}$", place.refused(key).message)


def test_expired_key_in_a_file(place: Place, keys: Keys, tmp_path: Path) -> None:
    assert place.refused(keys.export(tmp_path / "old.key", OLD)).message.endswith(" has expired.")


def test_several_keys_in_a_file(place: Place, keys: Keys, tmp_path: Path) -> None:
    error = place.refused(keys.export(tmp_path / "both.key", ALICE, BOB))
    assert " has 2 keys of the key file " in error.message
    assert keys.fingerprint(ALICE) in (error.hint or "")


def test_files_that_are_no_keys(place: Place, keys: Keys, tmp_path: Path) -> None:
    public = tmp_path / "public.key"
    public.write_text(keys.gpg("--armor", "--export", ALICE))
    public.chmod(0o600)
    assert "gpg has no secret key of the key file" in place.refused(public).message
    junk = tmp_path / "junk.key"
    junk.write_text("junk\n")
    junk.chmod(0o600)
    assert "gpg can't read the key file" in place.refused(junk).message
    assert "No such file" in place.refused(tmp_path / "none.key").message
    assert "is not a file that can be read" in place.refused(tmp_path).message
    os.mkfifo(tmp_path / "fifo", 0o600)
    assert "is not a file that can be read" in place.refused(tmp_path / "fifo").message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620])
def test_key_file_that_others_can_read(place: Place, keys: Keys, tmp_path: Path, mode: int) -> None:
    file = keys.export(tmp_path / "alice.key", ALICE)
    file.chmod(mode)
    error = place.refused(file)
    assert f"is not yours alone: mode {mode:04o}." in error.message
    assert error.hint == f"Make it so: chmod 600 {file}"


def test_key_file_of_another_user(place: Place, keys: Keys, tmp_path: Path) -> None:
    file = keys.export(tmp_path / "alice.key", ALICE)
    os.chown(file, 65534, 65534)
    assert "is not yours alone" in place.refused(file).message


def test_home_that_a_killed_build_has_left(place: Place, keys: Keys, tmp_path: Path) -> None:
    """It has a key in it; the next build with a key file removes it, and spares what is in use or another's."""
    file = keys.export(tmp_path / "alice.key", ALICE)
    left, used, others = (Path(f"/tmp/image-factory-gpg.{name}") for name in ("left", "used", "others"))
    for path in (left, used, others):
        path.mkdir(mode=0o700)
        (path / "secret").touch()
    os.chown(others, 65534, 65534)
    held = locks.lock(used)
    assert held is not None
    try:
        place.signed(file)
        assert [path.exists() for path in (left, used, others)] == [False, True, True]
    finally:
        os.close(held)
        subprocess.run(["rm", "-r", used, others], check=True)
