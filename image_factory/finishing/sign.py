"""Sign what is published: one detached OpenPGP signature of the checksums of all files, by gpg."""

import contextlib
import dataclasses
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..base import command, files, scratch
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..base.log import logger, step
from ..downloads import verify
from ..model import SIGNATURE_SUFFIX, SUMS_SUFFIX, Artifact, Build, Plan

STEP = "Signing"

# Short: the path of the agent's socket below it has an end at 107 bytes.
_HOME_PREFIX = "image-factory-gpg."
# A smart card takes its time.
_SECONDS = 120.0
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


@dataclass(frozen=True)
class _Key:
    """A secret key that can be used, and the options of gpg with which it is found."""

    fingerprint: str
    options: tuple[str, ...]


def programs(plan: Plan) -> list[str]:
    """Return the programs that signing needs, none if nothing is to be signed."""
    return ["gpg", "gpg-agent", "gpgconf", "gpgv"] if plan.settings.sign_key else []


def check(plan: Plan) -> None:
    """Raise ConfigurationError unless the key of *plan* signs, which it is asked for now."""
    if not plan.settings.sign_key:
        return
    try:
        with scratch.directory() as directory, _key(plan) as key:
            sums = directory / "sums"
            sums.touch()
            _sign(key, sums, quiet=True)
    except BuildError as error:
        raise ConfigurationError(f"[{plan.image}] sign-key: {error.message}", hint=error.hint) from error


def sign_all(build: Build, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Write the checksums of *artifacts* and all that belongs to them, sign these, and return them with both files.

    Nothing is done without a ``sign-key``; BuildError if it doesn't sign.
    """
    if not build.plan.settings.sign_key:
        return list(artifacts)
    with step(STEP):
        sums = build.directory / f"{build.plan.base_name}{SUMS_SUFFIX}"
        sums.write_text(_sums(artifacts), encoding="utf-8")
        try:
            with _key(build.plan) as key:
                signature = _sign(key, sums)
        except BuildError as error:
            raise BuildError(f"{sums.name} can't be signed: {error.message}", hint=error.hint) from error
        logger.info("%s is signed with key %s.", sums.name, key.fingerprint)
    written = tuple((path.name, files.digest_of(path)) for path in (sums, signature))
    return [dataclasses.replace(found, companions=(*found.companions, *written)) for found in artifacts]


def named(plan: Plan, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return *artifacts* with the names of what sign_all will write, for --dry-run."""
    sums = f"{plan.base_name}{SUMS_SUFFIX}"
    names = ((sums, ""), (f"{sums}{SIGNATURE_SUFFIX}", "")) if plan.settings.sign_key else ()
    return [dataclasses.replace(found, companions=(*found.companions, *names)) for found in artifacts]


def _sums(artifacts: Sequence[Artifact]) -> str:
    lines = []
    for artifact in artifacts:
        checksum = artifact.checksum_path
        of_checksum = (checksum.name, files.digest_of(checksum))
        pairs = [(artifact.path.name, artifact.sha256), of_checksum, *artifact.companions]
        lines += [f"{digest}  {name}\n" for name, digest in pairs]
    return "".join(lines)


def describe(build: Build) -> list[tuple[str, list[list[str]]]]:
    """Return the step with its commands, if there is something to sign."""
    name = build.plan.settings.sign_key
    if not name:
        return []
    sums = build.directory / f"{build.plan.base_name}{SUMS_SUFFIX}"
    if "/" not in name:
        return [(STEP, [sign_argv((), name, sums)])]
    options = ("--homedir", str(scratch.PARENT / f"{_HOME_PREFIX}XXXXXXXX"))
    return [(STEP, [import_argv(options, Path(name)), sign_argv(options, "FINGERPRINT", sums)])]


def sign_argv(options: Sequence[str], key: str, sums: Path) -> list[str]:
    """Return the command that signs *sums*, and never asks for a passphrase."""
    return [
        *_GPG,
        *options,
        "--pinentry-mode", "error",
        "--digest-algo", "SHA512",
        "--local-user", key,
        "--armor",
        "--output", str(_signature(sums)),
        "--detach-sign", str(sums),
    ]  # fmt: skip


def import_argv(options: Sequence[str], file: Path) -> list[str]:
    """Return the command that imports the key *file*."""
    return [*_GPG, *options, "--pinentry-mode", "error", "--import", str(file)]


def _signature(sums: Path) -> Path:
    return sums.with_name(f"{sums.name}{SIGNATURE_SUFFIX}")


def _sign(key: _Key, sums: Path, *, quiet: bool = False) -> Path:
    """Sign *sums*, verify that with the public key alone, and return the signature's path."""
    signature = _signature(sums)
    # gpg would ask whether to write over it; it is there when a build is resumed.
    signature.unlink(missing_ok=True)
    try:
        command.run(sign_argv(key.options, key.fingerprint, sums), quiet=quiet, timeout=_SECONDS)
    except CommandError as error:
        raise _refused(error, key.fingerprint) from error
    public = sums.with_name(f"{sums.name}.keyring")
    export = [*_GPG, *key.options, "--armor", "--export", key.fingerprint]
    try:
        public.write_text(command.run(export, capture=True, quiet=quiet, timeout=_SECONDS), encoding="ascii")
        try:
            verify.check_signature(public, sums.read_bytes(), signature.read_bytes(), sums.name)
        except BuildError as error:
            # Its hint is about mirrors.
            raise BuildError(error.message, hint=_LOOK) from error
    finally:
        public.unlink(missing_ok=True)
    return signature


def _refused(error: CommandError, name: str) -> BuildError:
    """Return the error that says in one line why gpg didn't sign."""
    reasons = [match[1] for line in error.last_lines if (match := re.fullmatch(r"gpg: signing failed: (.*)", line))]
    reason = reasons[-1] if reasons else error.said.removeprefix("gpg: ")
    return BuildError(f"gpg can't sign with {name}: {reason}.", hint=_HINTS.get(reason, _LOOK))


@contextmanager
def _key(plan: Plan) -> Iterator[_Key]:
    """Give the secret key that the ``sign-key`` of *plan* names; BuildError if there is none that can be used."""
    name = plan.settings.sign_key
    assert name is not None
    if "/" not in name:
        yield _Key(_find([], name, name), ())
        return
    file = Path(name)
    _check_file(file)
    with scratch.directory(_HOME_PREFIX, _remove_home) as home:
        options = ["--homedir", str(home)]
        try:
            command.run(import_argv(options, file), quiet=True, timeout=_SECONDS)
        except CommandError as error:
            raise BuildError(
                f"gpg can't read the key file {file}.", hint="gpg --export-secret-keys makes one."
            ) from error
        yield _Key(_find(options, None, f"the key file {file}"), tuple(options))


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
    return scratch.remove_left(_HOME_PREFIX, _remove_home)
