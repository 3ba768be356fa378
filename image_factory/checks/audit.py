"""Look whether an artifact has what must not be cloned, whatever the other steps have done to its disk."""

import base64
import itertools
import logging
import os
import re
import types
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from .. import tasks
from ..base import command, events, interrupts
from ..base.cleanup import released
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..base.log import logger
from ..base.units import format_size
from ..finishing import firstboot
from ..model import Artifact, Build, Partition, Plan
from ..outputs import OUTPUTS, compare_argv, disk_of, planned, raw_copy_argv, trees
from ..parts import Group, State, Step, carry_out, doing, mounted, on_tree
from ..sources import SOURCES
from ..system import partitions
from ..system.tree import Tree
from . import keys, leftovers, search
from .leftovers import Asked, Files, Look
from .search import Hit, Needle

# So many findings are in the error; the log has all.
_TOLD = 3

# So many places that only a person can judge are named.
_UNJUDGED = 40

# Parts of the answer file are searched for: of so many bytes, one in so many, and about so many at most.
_PART = 128
_PART_EVERY = 512
_PARTS = 64
_SHORTEST_PART = 32

# A shorter password is a word that any text may have.
_SHORTEST_PASSWORD = 8


class FoundError(BuildError):
    """An image has what must not be cloned."""


@dataclass(frozen=True)
class Secrets:
    """The secrets of a build, of which its image is to have none: *answers* are pieces of the answer file.

    *credentials* are users and passwords of proxies and mirrors, the user empty where there is none.
    *seed* are the texts of the seed disk's other files, *tasks* those of the secrets of tasks, each with its task.
    """

    answers: tuple[bytes, ...] = field(default=(), repr=False)
    hashes: frozenset[bytes] = field(default=frozenset(), repr=False)
    credentials: frozenset[tuple[str, str]] = field(default=frozenset(), repr=False)
    seed: tuple[str, ...] = field(default=(), repr=False)
    tasks: tuple[tuple[str, str], ...] = field(default=(), repr=False)


def _no_files(look: Look, asked: Asked) -> leftovers.Found:
    return ()


def _no_needles(secrets: Secrets) -> Iterable[tuple[str, bytes]]:
    return ()


@dataclass(frozen=True)
class Check:
    """Something that the audit looks for: *sentence* says what, for the manual.

    *find* looks at the files of the system, and the bytes that *needles* gives, each with what they are,
    are searched for on the whole disk.
    """

    name: str
    sentence: str
    find: leftovers.Find = _no_files
    needles: Callable[[Secrets], Iterable[tuple[str, bytes]]] = _no_needles


@dataclass(frozen=True)
class Finding:
    """What *check* has found, as a phrase that names the place."""

    check: str
    what: str


# What is searched for.

# crypt(5).
_HASH = re.compile(rb"\$(?:1|2[abxy]?|5|6|7|y|gy|sha1|md5)[$,][./0-9A-Za-z,=+$-]{10,}")

# In a URL: not what a template or a shell puts there.
_CREDENTIALS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^\s/:@\"'<>{}$]*):([^\s/@\"'<>{}$]+)@")

_PASSWORD_KEY = re.compile(r"(?:.*_)?(?:proxy|mirror)(?:_.*)?_(?:pass|passwd|password)")

# Keys that say what is meant to be on an image, or is not to be there.
_READ = re.compile(r"root-password-hash|authorized-keys|(?:.*-)?(?:proxy|mirror)(?:-.*)?")

# Passwords and keys that are asked for.
_BLOB = re.compile(rb"AAAA[0-9A-Za-z+/]{16,}={0,3}")
_WANTED_TEXT = re.compile(_BLOB.pattern + b"|" + _HASH.pattern)

# The line before and after the password, or what is in this block of it.  Of a file that btrfs has in its
# metadata, the byte before is zero.
_SHADOW_BEFORE = re.compile(rb"(?:^|[\n\0])[a-z0-9_.-]{0,32}\$?:!{0,2}\Z|^\Z", re.IGNORECASE)
_SHADOW_AFTER = re.compile(rb"(?::[0-9]*){0,3}\Z|:[0-9]*:[0-9]*:[0-9]*:")

# ssh-keygen(1) writes "openssh-key-v1\0" in base64 after it.
_PRIVATE_KEY = b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA"
_PEM_BEGINS = tuple(
    f"-----BEGIN {kind}PRIVATE KEY-----\n".encode() for kind in ("", "RSA ", "EC ", "DSA ", "ENCRYPTED ")
)
_SECTOR = 512

# The check that looks into all files.
KEYS = "private-keys"


def _parts_of_answers(secrets: Secrets) -> Iterator[tuple[str, bytes]]:
    """Give parts of the answer file that are nowhere else, as no installer writes them to the system as they are."""
    every = max(_PART_EVERY, sum(map(len, secrets.answers)) // _PARTS)
    for piece in itertools.chain.from_iterable(map(_WANTED_TEXT.split, secrets.answers)):
        start = 0
        while start < len(piece):
            part = piece[start : start + _PART].strip(b"\n").rstrip()
            # Others' files have the same comments.
            lines = [line.strip() for line in part.split(b"\n")]
            if len(part) >= _SHORTEST_PART and not all(line[:1] == b"#" or not line for line in lines):
                yield "a part of the answer file", part
            # From the beginning of a line: later in a long one it may be what the system has in a file.
            start = piece.find(b"\n", start + every - 1) + 1 or len(piece)


def _hashes(secrets: Secrets) -> Iterator[tuple[str, bytes]]:
    for data in sorted(secrets.hashes):
        yield "the hash of a password, elsewhere than in a line of /etc/shadow,", data


def _passwords(secrets: Secrets) -> Iterator[tuple[str, bytes]]:
    for user, password in sorted(secrets.credentials):
        pair = f"{user}:{password}"
        if user:
            yield _CREDENTIAL, f"{pair}@".encode()
            # HTTP's own form, RFC 7617.
            yield _CREDENTIAL, base64.b64encode(pair.encode()).rstrip(b"=")
        if len(password) >= _SHORTEST_PASSWORD:
            yield _CREDENTIAL, password.encode()


_CREDENTIAL = "a password of the build's proxy or mirror"


def _private_keys(secrets: Secrets) -> Iterator[tuple[str, bytes]]:
    yield "a file with a private ssh key, or what is left of one,", _PRIVATE_KEY


def _pem_keys(secrets: Secrets) -> Iterator[tuple[str, bytes]]:
    for begin in _PEM_BEGINS:
        yield "a private key, or what is left of one,", begin


def _seeds(secrets: Secrets) -> Iterator[tuple[str, bytes]]:
    for text in secrets.seed:
        yield "a file of the seed disk", text.encode()


def _task_secrets(secrets: Secrets) -> Iterator[tuple[str, bytes]]:
    for name, text in secrets.tasks:
        yield f"a secret of task {name}", text.encode()


# In this order they are made and told.
CHECKS = (
    Check(
        "ssh-host-keys",
        "A key of an ssh server: a file where OpenSSH, Dropbear or TinySSH keep them or *sshd_config* names one, or "
        "the beginning of a private key at the beginning of a block of the disk.",
        leftovers.host_keys,
        _private_keys,
    ),
    Check(
        KEYS,
        "A private key in any file of at most 1 MiB, in PEM (RSA, EC, DSA, PKCS #8, OpenSSH, or encrypted) or armoured "
        "OpenPGP, and in files that are named like one (*.der*, *.p12*, *.jks* and the like) in DER, PKCS #12, JKS or "
        "JCEKS, unless the database of dpkg or rpm has the file as it is; the keys of GnuPG in home directories, and "
        "pacman's; and the beginning of a key in PEM at the beginning of a block of the disk that is in no file.",
        leftovers.gnupg_keys,
        _pem_keys,
    ),
    Check(
        "machine-id",
        "A machine-id other than *uninitialized*, for systemd or D-Bus, and kernels, boot-loader entries and journals "
        "that are named by one.",
        leftovers.machine_ids,
    ),
    Check(
        "passwords",
        "A password in */etc/shadow*, */etc/passwd*, their like and their copies that is neither "
        "**root-password-hash** nor in the answer file, an account that needs none, and a hash of the answer file "
        "anywhere on the disk but in a line of */etc/shadow*.",
        leftovers.passwords,
        _hashes,
    ),
    Check(
        "authorized-keys",
        "A key that opens an account and is neither among **authorized-keys** nor in the answer file.",
        leftovers.authorized_keys,
    ),
    Check(
        "answer-file",
        "An answer file where installers leave it, or a larger part of this build's anywhere on the disk.",
        leftovers.answer_files,
        _parts_of_answers,
    ),
    Check(
        "proxy-password",
        "The password of a proxy or a mirror, from URLs of the section, of the answer file and of the environment, and "
        "from keys such as *proxy-password*, anywhere on the disk; one of less than 8 characters only together with "
        "its user.",
        needles=_passwords,
    ),
    Check(
        "task-secrets",
        "What a file of **task-secrets** has, anywhere on the disk: its values and its lines, but for those of less "
        "than 6 characters.",
        needles=_task_secrets,
    ),
    Check(
        "logs",
        "A log of the installer, or of the system while the image was built: a file in */var/log* that is not empty.",
        leftovers.logs,
    ),
    Check(
        "identity",
        "What else must be different on each machine: random seed, secrets of systemd and NetworkManager, leases, "
        "cloud-init's instances, names for iSCSI and NVMe, the disks and network cards of the build machine, keys that "
        "packages made when they were installed.",
        leftovers.identities,
    ),
    Check(
        "registrations",
        "What makes the machine known to a service, as sealing's operation of this name has them, a password for a "
        "registry of containers in a home directory, and a private key of WireGuard.",
        leftovers.registered,
    ),
    Check(
        "copies",
        "What else on the disk has a system or was one: snapshots of btrfs and LVM, subvolumes, partitions and logical "
        "volumes with a root of their own, and files below what is mounted on them.",
    ),
    Check(
        "leftovers",
        "A file with image-factory's name, and the text of the seed disk's files anywhere on the disk.",
        leftovers.own_files,
        _seeds,
    ),
)
NAMES = tuple(check.name for check in CHECKS)


def check(plan: Plan) -> None:
    """Raise ConfigurationError unless the audit knows what *plan* leaves out of it."""
    unknown = [name for name in plan.settings.audit_skip if name not in NAMES]
    if unknown:
        raise ConfigurationError(
            f"[{plan.image}] audit-skip: the audit has no check {', '.join(map(repr, unknown))}.",
            hint=f"It has {', '.join(NAMES)}.",
        )


def reads(key: str) -> bool:
    """Return whether the audit has a use for *key*, which has dashes and is no setting."""
    return bool(_READ.fullmatch(key))


def programs(plan: Plan) -> list[str]:
    """Return the programs that the audit of *plan* needs."""
    return ["qemu-img"] if plan.settings.audit else []


def _checks(plan: Plan) -> list[Check]:
    return [check for check in CHECKS if check.name not in plan.settings.audit_skip]


# What was asked for, and what is secret.


def secrets_of(build: Build) -> tuple[Asked, Secrets]:
    """Return what the user of *build* asked for, and what is not to be on its image."""
    plan = build.plan
    given = SOURCES[plan.settings.source].given(build)
    texts = {key: text for key in plan.variables if (text := _text(plan, key))}
    hashes = set(_HASH.findall(given.contents))
    own_hash = texts.get("root_password_hash", "").strip().encode()
    # A star or an exclamation mark is none.
    if len(own_hash) >= 13 and own_hash[:1] not in b"*!":
        hashes.add(own_hash)
    keys = {*leftovers.blobs(texts.get("authorized_keys", "").encode()), *_BLOB.findall(given.contents)}
    environment = urllib.request.getproxies_environment()
    credentials = {
        pair
        for text in (*texts.values(), *environment.values(), given.contents.decode("utf-8", "replace"))
        for pair in _pairs(text)
    }
    credentials |= {("", text.strip()) for key, text in texts.items() if _PASSWORD_KEY.fullmatch(key)}
    return (
        Asked(frozenset(hashes), frozenset(keys), given.name, frozenset(firstboot.paths(plan.settings))),
        Secrets(given.pieces, frozenset(hashes), frozenset(credentials), given.marks, _secrets_of_tasks(plan)),
    )


def _secrets_of_tasks(plan: Plan) -> tuple[tuple[str, str], ...]:
    return tuple(
        (task.name, text)
        for task in (*plan.tasks, *plan.late_tasks)
        for text in tasks.hidden_in(tasks.secrets_of(task))
    )


def _text(plan: Plan, key: str) -> str:
    try:
        return plan.variables[key]
    except ConfigurationError:
        # A variable that nothing has used.
        return ""


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """Give the users and passwords of the URLs in *text*, also as they are without the URL's escapes."""
    for pair in _CREDENTIALS.findall(text):
        yield pair
        yield urllib.parse.unquote(pair[0]), urllib.parse.unquote(pair[1])


def needles(checks: Iterable[Check], secrets: Secrets) -> list[Needle]:
    """Return what *checks* search for."""
    found = []
    for check in checks:
        for what, data in dict.fromkeys(check.needles(secrets)):
            alignment = _SECTOR if data in (_PRIVATE_KEY, *_PEM_BEGINS) else 1
            is_wanted = _is_in_shadow if data in secrets.hashes else None
            found.append(Needle(check.name, what, data, alignment, is_wanted))
    return found


def _is_in_shadow(offset: int, before: bytes, data: bytes, after: bytes) -> bool:
    """Return whether a hash is where shadow(5) has it: that it is there was asked for."""
    start, end = offset % _SECTOR, (offset + len(data)) % _SECTOR
    # The block before may be of another file.
    before, after = before[max(0, len(before) - start) :], after[: (_SECTOR - end) % _SECTOR]
    return bool(_SHADOW_BEFORE.search(before) and _SHADOW_AFTER.match(after))


# The audit.


def audit_files(files: Files, asked: Asked, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """Return what *checks* find among *files* that was not *asked* for."""
    # Looking changes nothing, so a signal may come at any point.
    with interrupts.interruptible():
        look = Look(files, leftovers.DIRECTORIES)
        return [
            Finding(check.name, what)
            for check in checks
            for what in itertools.islice(check.find(look, asked), leftovers.MOST)
        ]


def audit_keys(tree: Tree, directory: Path, found: Sequence[Finding]) -> tuple[list[Finding], list[bytes]]:
    """Return the private keys in files of *tree* that are not among what is *found*, and the contents of all.

    *directory* is for files of its own.
    """
    try:
        paths, known = keys.search(tree, directory)
    except BuildError as error:
        # A system may have more than can be looked into, which nobody can change who builds it.
        error.add_hint(f"'audit-skip = {KEYS}' leaves this check out.")
        raise
    names = [f"/{leftovers.quoted(path)}" for path in paths]
    told = [name for name in names if any(finding.what.startswith(f"{name} ") for finding in found)]
    new = [Finding(KEYS, f"{name} has a private key") for name in names if name not in told]
    return new[: leftovers.MOST], known


# Bytes of the blocks of filesystems, in which each file begins with one, by their partitions.
Blocks = Mapping[Partition, int]


def blocks_of(tree: Tree) -> Blocks:
    """Return the blocks of the filesystems of *tree*; a FAT has its clusters behind tables of any size."""
    return {
        found.volume.partition: found.block_size()
        for found in tree.filesystems
        if found.volume.partition and found.volume.filesystem in partitions.ROOT_FILESYSTEMS
    }


def audit_bytes(
    disk: Path,
    secrets: Secrets,
    checks: Iterable[Check] = CHECKS,
    known: Sequence[bytes] = (),
    blocks: Blocks = types.MappingProxyType({}),
) -> list[Finding]:
    """Return what *checks* find on the raw *disk*, in whatever files or between them.

    Private keys are not told of that *known*, the contents of files, have at a block's beginning.  Those in the middle
    of one of *blocks* are a part of something else, such as a library that tests itself.
    """
    return describe_hits(disk, search.search(disk, needles(checks, secrets)), known, blocks)


def describe_hits(
    disk: Path, hits: Sequence[Hit], known: Sequence[bytes] = (), blocks: Blocks = types.MappingProxyType({})
) -> list[Finding]:
    """Return the findings that *hits* on the raw *disk* are."""
    hits = [hit for hit in hits if not _is_in_block(hit, blocks) and not _is_in_file(disk, hit, known)]
    on_disk = partitions.read_partitions(disk) if hits else []
    found: dict[tuple[str, str, Partition | None], list[int]] = {}
    for hit in hits:
        place = _partition_of(hit.offset, on_disk)
        found.setdefault((hit.needle.check, hit.needle.what, place), []).append(hit.offset)
    return [
        Finding(check, f"{what} is at byte {offsets[0]} of the disk ({_named(place)}){_and_more(len(offsets) - 1)}")
        for (check, what, place), offsets in found.items()
    ]


def _is_key(hit: Hit) -> bool:
    return hit.needle.data in (_PRIVATE_KEY, *_PEM_BEGINS)


def _is_in_block(hit: Hit, blocks: Blocks) -> bool:
    """Return whether *hit* is a private key in the middle of one of *blocks*, where no file begins."""
    place = _partition_of(hit.offset, [*blocks])
    return _is_key(hit) and place is not None and (hit.offset - place.offset) % blocks[place] != 0


def _is_in_file(disk: Path, hit: Hit, known: Sequence[bytes]) -> bool:
    """Return whether *hit* is a private key with which a file of *known* contents begins."""
    if not _is_key(hit):
        return False
    with disk.open("rb") as file:
        block = os.pread(file.fileno(), _SECTOR, hit.offset)
    return any(data.startswith(block.rstrip(b"\0")) for data in known)


def _partition_of(offset: int, partitions: Sequence[Partition]) -> Partition | None:
    inside = (found for found in partitions if found.offset <= offset < found.offset + found.size)
    return next(inside, None)


def _named(partition: Partition | None) -> str:
    return f"partition {partition.number}" if partition else "in no partition"


def _and_more(count: int) -> str:
    return f" and in {count} more place{'s' * (count > 1)}" if count else ""


def copy_path(build: Build) -> Path:
    """Return where the copy is that is looked into."""
    return build.directory / "audit.raw"


class _Audit:
    """The audit of the artifacts of a build, of which each has what the first one has, or of an image of others."""

    def __init__(self, plan: Plan, *, foreign: bool) -> None:
        self._foreign = foreign
        self._checks = _checks(plan)
        self._hits: list[Hit] = []
        self._findings: list[Finding] = []
        self._known: list[bytes] = []
        self._blocks: Blocks = {}

    def reopened(self, state: State, steps: Sequence[Step | Group]) -> State:
        """Carry out *steps* with a raw copy of what a guest would see, which nothing that mounts it can change."""
        copy = copy_path(state.build)
        with released(partial(copy.unlink, missing_ok=True)):
            state = carry_out(state, steps)
            self._findings += describe_hits(copy, self._hits, self._known, self._blocks)
        order = sorted(self._findings, key=lambda found: NAMES.index(found.check))
        artifact, *_ = _audited(state.build, state.artifacts)
        unsearched = self._unsearched(state.build) if self._foreign else ()
        # Who looks at an image of others is told in another form.
        _tell(artifact, self._checks, order, unsearched, logging.INFO if self._foreign else logging.ERROR)
        return state

    def _unsearched(self, build: Build) -> tuple[str, ...]:
        """Return the checks that search for what only those who have made an image know, and have nothing of that."""
        _, secrets = secrets_of(build)
        able = [check for check in self._checks if check.needles is not _no_needles]
        return tuple(check.name for check in able if not needles([check], secrets))

    def search(self, state: State) -> None:
        """Search the copy's bytes: before it is mounted, as what is in a journal would be written."""
        copy = copy_path(state.build)
        _, secrets = secrets_of(state.build)
        size = copy.stat().st_blocks * 512
        self._hits = search.search(copy, needles(self._checks, secrets))
        logger.info("Searched %s of data.", format_size(size))

    def look(self, build: Build, tree: Tree) -> None:
        """Look at the files of the copy, which is mounted."""
        asked, _ = secrets_of(build)
        self._blocks = blocks_of(tree)
        self._findings = audit_files(tree, asked, self._checks)
        self._findings += [
            Finding(check.name, what) for check in self._checks if check.name == "copies" for what in tree.copies
        ]
        if build.plan.settings.source == "capture":
            _tell_unjudged(tree)
        if any(check.name == KEYS for check in self._checks):
            more, self._known = audit_keys(tree, build.directory, self._findings)
            self._findings += more


def _tell_unjudged(tree: Tree) -> None:
    """Warn of what in a system that was lived in only a person can judge."""
    with interrupts.interruptible():
        found = [f"/{leftovers.quoted(path)}" for path in leftovers.unjudged(Look(tree, leftovers.UNJUDGED))]
    if found:
        more = f" and {len(found) - _UNJUDGED} more" if len(found) > _UNJUDGED else ""
        logger.warning("Look yourself at what the audit can't judge: %s%s.", ", ".join(found[:_UNJUDGED]), more)


def steps(build: Build) -> Iterator[Step | Group]:
    """Give the steps of the audit, if it is wanted."""
    plan = build.plan
    if not plan.settings.audit:
        return
    yield looking(build, _audited(build, planned(plan, build.directory)))
    trees_made = _of_tree(planned(plan, build.directory))
    if trees_made:
        names = ", ".join(found.path.name for found in trees_made)
        commands = [argv for found in trees_made for argv in trees.comparing(found.format, found.path)]
        compared = Step(
            f"Comparing {names}", doing(_compare_trees), commands, calls=[trees.call(plan)], rehearsed=False
        )
        yield mounted([compared], lambda build: build.disk_path, read_only=True)


def looking(build: Build, artifacts: Sequence[Artifact], *, foreign: bool = False) -> Group:
    """Return the steps that look into the first of *artifacts*, and compare the others with it.

    Of a *foreign* one nothing is known but its bytes.  FoundError if there is something.
    """
    artifact, *others = artifacts
    copy = copy_path(build)
    audit = _Audit(build.plan, foreign=foreign)
    name = artifact.path.name
    inside: list[Step | Group] = [
        Step(f"Reopening {name}", doing(_reopen), [raw_copy_argv(artifact, copy)]),
        *(
            Step(f"Comparing {other.path.name}", doing(partial(_compare, number)), [compare_argv(other, copy)])
            for number, other in enumerate(others, 1)
        ),
        Step(f"Searching {name}", doing(audit.search)),
        mounted([Step(f"Auditing {name}", on_tree(audit.look))], copy_path),
    ]
    return Group(inside, audit.reopened)


def _of_tree(artifacts: Sequence[Artifact]) -> list[Artifact]:
    return [found for found in artifacts if OUTPUTS[found.format].made_from == "tree"]


def _compare_trees(state: State) -> None:
    trees.compare([(artifact.format, artifact.path) for artifact in _of_tree(state.artifacts)], state)


def _audited(build: Build, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return those of *artifacts* that have the disk; where there is none, what they were made from."""
    return [found for found in artifacts if OUTPUTS[found.format].made_from == "disk"] or [disk_of(build)]


def _reopen(state: State) -> None:
    artifact, *_ = _audited(state.build, state.artifacts)
    # Others get through the working directory of root's builds.
    command.run(raw_copy_argv(artifact, copy_path(state.build)), umask=0o077)


def _compare(number: int, state: State) -> None:
    artifacts = _audited(state.build, state.artifacts)
    artifact, other = artifacts[0], artifacts[number]
    try:
        command.run(compare_argv(other, copy_path(state.build)))
    except CommandError as error:
        if error.status != 1:
            raise
        raise BuildError(f"{other.path.name} has not the contents of {artifact.path.name}.") from error


def _tell(
    artifact: Artifact,
    checks: Sequence[Check],
    findings: Sequence[Finding],
    unsearched: tuple[str, ...] = (),
    level: int = logging.ERROR,
) -> None:
    """Tell what was found; FoundError if it is something."""
    names = [check.name for check in checks]
    told_of = tuple((found.check, found.what) for found in findings)
    events.tell(events.Audited(artifact.path.name, tuple(names), told_of, unsearched))
    if not findings:
        logger.info("The audit has found nothing: %s.", ", ".join(names))
        return
    for found in findings:
        logger.log(level, "Audit, %s: %s.", found.check, found.what)
    told = "; ".join(found.what for found in findings[:_TOLD])
    more = f"; and {len(findings) - _TOLD} more" if len(findings) > _TOLD else ""
    failed = ", ".join(dict.fromkeys(found.check for found in findings))
    raise FoundError(
        f"{artifact.path.name} has what must not be cloned: {told}{more}.",
        hint=f"Have it removed while the image is built, or leave the check out: audit-skip = {failed}",
    )
