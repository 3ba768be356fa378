"""OpenPGP: who has signed something, by gpgv; signing it, by gpg."""

import base64
import binascii
import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import command, scratch
from .errors import BuildError, CommandError, ConfigurationError

# The programs that check_signature needs, those that the user's keys need for that, and those that signing needs.
VERIFIERS = ("gpgv",)
EXPORTERS = ("gpg", *VERIFIERS)
SIGNERS = ("gpg", "gpg-agent", "gpgconf", *VERIFIERS)

# Short: the path of the agent's socket below it has an end at 107 bytes.
HOME_PREFIX = "image-factory-gpg."
# A smart card takes its time.
_SECONDS = 120.0
_GPGV_SECONDS = 60.0
_REMOVAL_TRIES = 20

_GPG = ["gpg", "--batch", "--no-tty"]
_LOOK = "Look at it: gpg --list-secret-keys"
_PASSPHRASE = "gpg-agent doesn't know the key's passphrase: tell it before the build, or take a key without one."
_HINTS = {
    "No pinentry": _PASSPHRASE,
    "No passphrase given": _PASSPHRASE,
    "Bad passphrase": _PASSPHRASE,
    "No secret key": "Import it for the user that builds: gpg --import FILE",
}
# Validities that gpg tells, of keys that sign nothing.
_STATES = {"e": "has expired", "r": "is revoked", "d": "is disabled", "i": "is not valid"}


class SignatureError(BuildError):
    """A signature that is not accepted; *where* it is from, and the *reason*."""

    def __init__(self, where: str, reason: str, *, hint: str | None = None) -> None:
        super().__init__(f"The signature of {where} is not accepted: {reason}.", hint=hint)
        self.reason = reason


# Verifying.


def check_signature(keyring: Path, data: bytes, signature: bytes | None, where: str) -> tuple[bytes, str]:
    """Return what of *data* is signed with a key of *keyring*, by *signature* or one around it; and that key.

    SignatureError, which names *where* it is from, unless one signature is good and its key valid today.
    """
    with scratch.directory() as directory:
        (directory / "signed").write_bytes(data)
        keys = directory / "keys.gpg"
        keys.write_bytes(_binary_keys(keyring))
        # The status lines, and no others, have the answer: the exit status is 0 for an expired key, and 2
        # if of several signatures one is by a key that is not in the keyring.
        argv = ["gpgv", "--status-fd", "1", "--weak-digest", "SHA1", "--keyring", str(keys)]
        if signature is None:
            argv += ["--output", str(directory / "text"), str(directory / "signed")]
        else:
            (directory / "signature").write_bytes(_binary_signature(signature))
            argv += [str(directory / "signature"), str(directory / "signed")]
        lines: list[str] = []

        def keep(line: str) -> None:
            lines.append(line)

        with contextlib.suppress(CommandError):
            command.run(argv, quiet=True, progress=keep, timeout=_GPGV_SECONDS)
        statuses = [line.removeprefix("[GNUPG:] ").split() for line in lines if line.startswith("[GNUPG:] ")]
        key, reason = _good_key(statuses)
        if key is None:
            raise SignatureError(where, reason)
        # What gpgv has read as signed: there may be other text around it.
        return (directory / "text").read_bytes() if signature is None else data, key


def _good_key(statuses: list[list[str]]) -> tuple[str | None, str]:
    """Return the fingerprint of a key with a good signature, None and why not if gpgv's *statuses* have none."""
    faults = []
    good = False
    for words in statuses:
        match words:
            case ["NEWSIG", *_]:
                good = False
            case ["GOODSIG", *_]:
                good = True
            case ["VALIDSIG", key, *others] if good:
                # The last is that of the primary key, by which a key is known.
                return (others[8] if len(others) > 8 else key), ""
            case ["EXPKEYSIG", key, *_]:
                faults.append(f"key {key} has expired")
            case ["REVKEYSIG", key, *_]:
                faults.append(f"key {key} is revoked")
            case ["EXPSIG", key, *_]:
                faults.append(f"the signature by {key} has expired")
            case ["BADSIG", key, *_]:
                faults.append(f"it is not what key {key} has signed")
            case ["NO_PUBKEY", key, *_]:
                faults.append(f"key {key} is not in the keyring")
            case ["NODATA" | "UNEXPECTED", *_]:
                faults.append("there is no signature")
    return None, "; ".join(dict.fromkeys(faults)) or "there is no good signature"


def export_public(file: Path) -> Path | None:
    """Write the public keys that the user's gpg has to *file*, and return it; None if gpg has none."""
    home = Path(os.environ.get("GNUPGHOME") or "~/.gnupg").expanduser()
    # gpg would make one.
    if home.is_dir():
        command.run([*_GPG, "--output", str(file), "--export"], quiet=True, timeout=_SECONDS)
    return file if file.exists() else None


def _binary_keys(keyring: Path) -> bytes:
    """Return the keys of *keyring*, which may be armoured: gpgv reads binary ones only."""
    try:
        data = keyring.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"The keyring {keyring} can't be read: {error.strerror}.") from error
    blocks = re.findall(
        rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(?:[^\r\n]+\r?\n)*\r?\n(.*?)(?:\r?\n=[^\r\n]{4})?\r?\n-----END",
        data,
        re.DOTALL,
    )
    if not blocks:
        return data
    try:
        return b"".join(base64.b64decode(block) for block in blocks)
    except binascii.Error as error:
        raise ConfigurationError(f"The keyring {keyring} has a broken block of keys: {error}.") from error


def _binary_signature(signature: bytes) -> bytes:
    """Return *signature* as it is: gpgv reads both forms, but says nothing at all of an empty one."""
    return signature or b"-\n"


# Signing.


@dataclass(frozen=True)
class SecretKey:
    """A secret key that can be used, and the options of gpg with which it is found."""

    fingerprint: str
    options: tuple[str, ...]


def sign_argv(options: Sequence[str], key: str, file: Path, signature: Path) -> list[str]:
    """Return the command that signs *file*, and never asks for a passphrase."""
    return [
        *_GPG,
        *options,
        "--pinentry-mode", "error",
        "--digest-algo", "SHA512",
        "--local-user", key,
        "--armor",
        "--output", str(signature),
        "--detach-sign", str(file),
    ]  # fmt: skip


def import_argv(options: Sequence[str], file: Path) -> list[str]:
    """Return the command that imports the key *file*."""
    return [*_GPG, *options, "--pinentry-mode", "error", "--import", str(file)]


def export_argv(options: Sequence[str], fingerprint: str) -> list[str]:
    """Return the command that prints the public key of *fingerprint*."""
    return [*_GPG, *options, "--armor", "--export", fingerprint]


def sign(key: SecretKey, file: Path, signature: Path, *, quiet: bool = False) -> None:
    """Write the detached *signature* of *file*, and verify it with the public key alone."""
    # gpg would ask whether to write over it; it is there when a build is resumed.
    signature.unlink(missing_ok=True)
    try:
        command.run(sign_argv(key.options, key.fingerprint, file, signature), quiet=quiet, timeout=_SECONDS)
    except CommandError as error:
        raise _refused(error, key.fingerprint) from error
    public = file.with_name(f"{file.name}.keyring")
    export = export_argv(key.options, key.fingerprint)
    try:
        public.write_text(command.run(export, capture=True, quiet=quiet, timeout=_SECONDS), encoding="ascii")
        try:
            check_signature(public, file.read_bytes(), signature.read_bytes(), file.name)
        except SignatureError as error:
            raise SignatureError(file.name, error.reason, hint=_LOOK) from error
    finally:
        public.unlink(missing_ok=True)


def _refused(error: CommandError, name: str) -> BuildError:
    """Return the error that says in one line why gpg didn't sign."""
    reasons = [match[1] for line in error.last_lines if (match := re.fullmatch(r"gpg: signing failed: (.*)", line))]
    reason = reasons[-1] if reasons else error.said.removeprefix("gpg: ")
    return BuildError(f"gpg can't sign with {name}: {reason}.", hint=_HINTS.get(reason, _LOOK))


@contextmanager
def secret_key(name: str, *, quiet: bool = False) -> Iterator[SecretKey]:
    """Give the secret key *name*, a file's path if it has a slash; BuildError if there is none that can be used."""
    if "/" not in name:
        yield SecretKey(_find([], name, name), ())
        return
    file = Path(name)
    _check_file(file)
    with scratch.directory(HOME_PREFIX, _remove_home) as home:
        options = ["--homedir", str(home)]
        try:
            command.run(import_argv(options, file), quiet=quiet, timeout=_SECONDS)
        except CommandError as error:
            raise BuildError(
                f"gpg can't read the key file {file}.", hint="gpg --export-secret-keys makes one."
            ) from error
        yield SecretKey(_find(options, None, f"the key file {file}"), tuple(options))


def _check_file(file: Path) -> None:
    try:
        status = file.stat()
    except OSError as error:
        raise BuildError(f"The key file {file} can't be read: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode) or not os.access(file, os.R_OK):
        raise BuildError(f"{file} is not a file that can be read.")
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o077:
        raise BuildError(
            f"The key file {file} is not yours alone: mode {stat.S_IMODE(status.st_mode):04o}.",
            hint=f"Make it so: chmod 600 {file}",
        )


def _find(options: Sequence[str], name: str | None, shown: str) -> str:
    """Return the fingerprint of the one secret key that *name* means, of any if it is None."""
    argv = [*_GPG, *options, "--with-colons", "--list-secret-keys", *(["--", name] if name else [])]
    text = ""
    try:
        text = command.run(argv, capture=True, quiet=True, timeout=_SECONDS)
    except CommandError as error:
        # It fails where it finds none, and can't look without its agent.
        agent = next((line for line in error.last_lines if "gpg-agent" in line), None)
        if agent:
            raise BuildError(f"{agent.removesuffix('.')}.", hint="Start it: gpgconf --launch gpg-agent") from error
    found: list[tuple[str, str]] = []
    validity = None
    # gpg's doc/DETAILS: a line for each primary key, and after it one with its fingerprint.
    for fields in (line.split(":") for line in text.splitlines()):
        if fields[0] == "sec":
            validity = fields[1]
        elif fields[0] == "fpr" and validity is not None:
            found.append((validity, fields[9]))
            validity = None
    if not found:
        raise BuildError(f"gpg has no secret key of {shown}.", hint=_HINTS["No secret key"])
    usable = [fingerprint for state, fingerprint in found if state not in _STATES]
    if not usable:
        state, fingerprint = found[0]
        raise BuildError(f"The key {fingerprint} of {shown} {_STATES[state]}.", hint=_LOOK)
    if len(usable) > 1:
        raise BuildError(f"gpg has {len(usable)} keys of {shown}.", hint=f"Name one: {' or '.join(usable[:5])}")
    return usable[0]


def _remove_home(home: Path) -> None:
    for words in (["--kill", "all"], ["--remove-socketdir"]):
        # There may be nothing of the kind, no gpgconf either when a build left it that is long gone.
        with contextlib.suppress(BuildError):
            command.run(["gpgconf", "--homedir", str(home), *words], quiet=True, timeout=_SECONDS)
    for _ in range(_REMOVAL_TRIES):
        # The agent removes its sockets at the same time.
        shutil.rmtree(home, ignore_errors=True)
        if not home.exists():
            return
        time.sleep(0.1)
    raise BuildError(f"{home} can't be removed, and has the key of sign-key in it.", hint="Remove it by hand.")


def remove_left() -> Iterator[Path]:
    """Remove the home directories that killed builds of this user have left; give each."""
    return scratch.remove_left(HOME_PREFIX, _remove_home)
