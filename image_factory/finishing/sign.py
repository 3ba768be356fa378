"""Sign what is published: one detached OpenPGP signature of the checksums of all files, by gpg."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..base import files, openpgp, scratch
from ..base.errors import BuildError, ConfigurationError
from ..base.log import logger
from ..base.openpgp import HOME_PREFIX, export_argv, import_argv, sign_argv
from ..model import SIGNATURE_SUFFIX, SUMS_SUFFIX, Artifact, Build, Plan
from ..parts import State, Step


def programs(plan: Plan) -> list[str]:
    """Return the programs that signing needs, none if nothing is to be signed."""
    return [*openpgp.SIGNERS] if plan.settings.sign_key else []


def check(plan: Plan) -> None:
    """Raise ConfigurationError unless the key of *plan* signs, which it is asked for now."""
    name = plan.settings.sign_key
    if not name:
        return
    try:
        with scratch.directory() as directory, openpgp.secret_key(name, quiet=True) as key:
            sums = directory / "sums"
            sums.touch()
            openpgp.sign(key, sums, _signature(sums), quiet=True)
    except BuildError as error:
        raise ConfigurationError(f"[{plan.image}] sign-key: {error.message}", hint=error.hint) from error


def steps(build: Build) -> Iterator[Step]:
    """Give the step that signs, if there is a ``sign-key``."""
    name = build.plan.settings.sign_key
    if not name:
        return
    sums = build.directory / f"{build.plan.base_name}{SUMS_SUFFIX}"
    options: tuple[str, ...] = ()
    if "/" in name:
        options = ("--homedir", str(scratch.PARENT / f"{HOME_PREFIX}XXXXXXXX"))
    commands = [sign_argv(options, "FINGERPRINT", sums, _signature(sums)), export_argv(options, "FINGERPRINT")]

    def run(state: State) -> State:
        return dataclasses.replace(state, artifacts=tuple(sign_all(state.build, state.artifacts)))

    yield Step("Signing", run, [import_argv(options, Path(name)), *commands] if options else commands)


def sign_all(build: Build, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Write the checksums of *artifacts* and all that belongs to them, sign these, and return them with both files.

    BuildError if the ``sign-key`` doesn't sign.
    """
    name = build.plan.settings.sign_key
    assert name is not None
    sums = build.directory / f"{build.plan.base_name}{SUMS_SUFFIX}"
    signature = _signature(sums)
    sums.write_text(_sums(artifacts), encoding="utf-8")
    try:
        with openpgp.secret_key(name) as key:
            openpgp.sign(key, sums, signature)
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
    # What belongs to several artifacts is listed once.
    return "".join(dict.fromkeys(lines))


def _signature(sums: Path) -> Path:
    return sums.with_name(f"{sums.name}{SIGNATURE_SUFFIX}")
