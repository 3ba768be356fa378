"""The audit: what it knows to be secret, and where on a disk it finds that.

What it finds among files is in test_leftovers.py, the search itself in test_search.py; whole builds are in
integration/test_audit.py.
"""

import base64
import dataclasses
import datetime
import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from image_factory.base import events
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.checks import audit, search
from image_factory.checks.audit import Finding, Secrets
from image_factory.configuration.files import Configuration
from image_factory.model import Artifact, Build, Plan
from image_factory.parts import Group, State, Step, carry_out, doing
from image_factory.sources import answers
from image_factory.sources.installer import delivery

from ..conftest import state_of
from ..unit.test_leftovers import HASH, KEY, OTHER_HASH

M = 1 << 20
PROXY = "http://build:s%3Bcret-pw@proxy.example.com:3128"
REPOSITORY = Path(__file__).resolve().parents[2]


def build_of(directory: Path, text: str, *, name: str = "x", shipped: bool = False) -> Build:
    """Return a build of section *name*, to whose configuration *text* is added."""
    configuration = directory / "image-factory.conf"
    own = "" if shipped else f"[{name}]\nlinux = /l\ninitrd = /i\n"
    base = (REPOSITORY / "data/image-factory.conf").read_text() if shipped else ""
    configuration.write_text(f"{base}{own}{text}\n")
    read = Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)})
    settings, variables = read.image(name, {}), read.variables(name, {})
    nowhere = dict.fromkeys(settings.format, ())
    plan = Plan(name, settings, datetime.date(2026, 1, 31), directory, nowhere, variables)
    plan.work_path.mkdir(exist_ok=True)
    return Build(plan, plan.work_path, "vm")


def needles_of(build: Build, check: str | None = None) -> list[bytes]:
    checks = [row for row in audit.CHECKS if check in (None, row.name)]
    return [needle.data for needle in audit.needles(checks, audit.secrets_of(build)[1])]


# What is asked for, and what is secret.


def test_build_without_an_answer_file(tmp_path: Path) -> None:
    asked, secrets = audit.secrets_of(build_of(tmp_path, ""))
    assert (asked.hashes, asked.keys, asked.answer_name) == (frozenset(), frozenset(), None)
    assert secrets == Secrets()
    assert audit.needles(audit.CHECKS, secrets) == audit.needles(audit.CHECKS[:2], secrets)


@pytest.mark.parametrize("text", ["*", "!", "!locked-and-long-enough", "", "short"])
def test_what_is_no_hash(tmp_path: Path, text: str) -> None:
    asked, secrets = audit.secrets_of(build_of(tmp_path, f"root_password_hash = {text}"))
    assert not asked.hashes
    assert not secrets.hashes


@pytest.mark.parametrize(
    "text",
    [
        "rqXexS6ZhobKA",
        "$1$abcdefgh$abcdefghijklmnopqrstuv",
        "$2b$05$abcdefghijklmnopqrstuuabcdefghijklmnopqrstuvwxyzabcde",
        "$5$rounds=5000$saltsalt$abcdefghijklmnopqrstuvwxyzabcdefghijklmnopq",
        OTHER_HASH,
        HASH,
        "$gy$j9T$abcdefgh$abcdefghijklmnopqrstuvwxyz",
        "$7$CU..../....abcdefgh$abcdefghijklmnopqrstuv",
        "$md5,rounds=904$abcdefgh$$abcdefghijklmnopqrstuv",
    ],
)
def test_hashes_of_all_kinds(tmp_path: Path, text: str) -> None:
    section = f"root-password-hash = {text.replace('$', '$$')}"
    asked, secrets = audit.secrets_of(build_of(tmp_path, section))
    assert asked.hashes == secrets.hashes == {text.encode()}
    if text.startswith("$"):
        # As somebody's own answer file has it.
        (tmp_path / "own.cfg").write_text(f"d-i passwd/user-password-crypted password {text}\nx '{text}'\n")
        asked, _ = audit.secrets_of(build_of(tmp_path, f"preseed = {tmp_path}/own.cfg"))
        assert asked.hashes == {text.encode()}


CREDENTIALS = [
    (f"proxy = {PROXY}", {("build", "s%3Bcret-pw"), ("build", "s;cret-pw")}),
    ("append = mirror/http/proxy=http://me:pw@p:3128 quiet", {("me", "pw")}),
    ("mirror = https://me:pw@mirror.example.com/debian", {("me", "pw")}),
    ("installer_arguments = inst.proxy=socks5://:only@p", {("", "only")}),
    ("proxy-password = s3cret word", {("", "s3cret word")}),
    ("http_proxy_password = s3cret", {("", "s3cret")}),
    ("mirror = https://mirror.example.com:8080/debian", set()),
    ("proxy = http://proxy:3128", set()),
    ("broken = ${not_there}", set()),
    ("root_password = s3cret", set()),
]


@pytest.mark.parametrize(("text", "credentials"), CREDENTIALS)
def test_credentials(tmp_path: Path, text: str, credentials: set[tuple[str, str]]) -> None:
    assert audit.secrets_of(build_of(tmp_path, text))[1].credentials == credentials


def test_credentials_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.ks").write_text("url --url=http://m/x --proxy=http://a:first@p\nurl --url=https://b:$pw@m/\n")
    monkeypatch.setenv("https_proxy", "http://c:third@p")
    secrets = audit.secrets_of(build_of(tmp_path, f"kickstart = {tmp_path}/own.ks"))[1]
    assert secrets.credentials == {("a", "first"), ("c", "third")}


def test_further_files_of_the_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their secrets are the answers' secrets; they themselves may be on the disk."""
    (tmp_path / "own.ks").write_text("%include /part.ks\n")
    (tmp_path / "part.ks").write_text(f"url --url=https://a:first@m/\nuser --password={OTHER_HASH}\n" * 40)
    build = build_of(tmp_path, f"kickstart = {tmp_path}/own.ks\nanswer-files = {tmp_path}/part.ks")
    asked, secrets = audit.secrets_of(build)
    assert secrets.credentials == {("a", "first")}
    assert asked.hashes == secrets.hashes == {OTHER_HASH.encode()}
    assert needles_of(build, "answer-file") == []
    (tmp_path / "part.ks").unlink()
    assert audit.secrets_of(build)[1].credentials == set()
    assert "part.ks is looked for: No such file or directory" in caplog.text


def test_forms_of_credentials(tmp_path: Path) -> None:
    found = needles_of(build_of(tmp_path, f"proxy = {PROXY}"), "proxy-password")
    basic = base64.b64encode(b"build:s;cret-pw").rstrip(b"=")
    assert {b"build:s%3Bcret-pw@", b"build:s;cret-pw@", b"s;cret-pw", basic} <= set(found)
    short = needles_of(build_of(tmp_path, "proxy = http://me:pw@p"), "proxy-password")
    assert short == [b"me:pw@", b"bWU6cHc"]


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    (tmp_path / "own.cfg").write_text(f"d-i hidden/line string {OTHER_HASH}\n" * 3)
    build = build_of(tmp_path, f"preseed = {tmp_path}/own.cfg\nproxy = {PROXY}")
    asked, secrets = audit.secrets_of(build)
    for text in (repr(asked), repr(secrets), repr(audit.needles(audit.CHECKS, secrets))):
        assert not re.search(r"s;cret|s%3B|saltsalt|hidden", text)


def test_the_copy_that_was_used(tmp_path: Path) -> None:
    """The user's own file may be another one when the installation is through."""
    own = tmp_path / "own.cfg"
    own.write_text("d-i the/first string that was used\n" * 3)
    build = build_of(tmp_path, f"preseed = {own}")
    delivery.write_copy(build)
    own.write_text("another")
    assert b"the/first" in needles_of(build, "answer-file")[0]
    delivery.copy_path(build).unlink()
    assert needles_of(build, "answer-file") == []


# Parts of the answer file.

SHIPPED = {
    "preseed": "Debian-13-server",
    "kickstart": "Fedora-44-server",
    "yast": "openSUSE-Leap-15.6-server",
    "autoinstall": "Ubuntu-24.04-server",
    "agama": "openSUSE-Leap-16.0-server",
}


# As long as one of RSA is: type, exponent and modulus, each after its length.
LONG_KEY = base64.b64encode(
    b"".join(len(part).to_bytes(4, "big") + part for part in (b"ssh-rsa", b"\1\0\1", b"\0" + bytes(range(1, 256))))
).decode()


def shipped_build(directory: Path, key: str) -> Build:
    hidden = HASH.replace("$", "$$")
    keys = f"\n    ssh-rsa {LONG_KEY} one@example.com\n    ssh-ed25519 {KEY} two@example.com"
    text = f"[own]\nbased_on = {SHIPPED[key]}\nroot_password_hash = {hidden}\nauthorized_keys = {keys}\nproxy = {PROXY}"
    return build_of(directory, text, name="own", shipped=True)


@pytest.mark.parametrize("key", SHIPPED)
def test_parts_of_shipped_answer_files(tmp_path: Path, key: str) -> None:
    """Each larger part of what the installer gets has one of them, and none is of what the system is to have."""
    build = shipped_build(tmp_path, key)
    assert build.plan.settings.answer_file_key == key
    asked, secrets = audit.secrets_of(build)
    assert HASH.encode() in asked.hashes
    assert asked.keys == {LONG_KEY.encode(), KEY.encode()}
    assert asked.answer_name == delivery.name_of(build.plan.settings)
    data = answers.content(build.plan)
    parts = needles_of(build, "answer-file")
    assert 2 <= len(parts) <= 70
    assert all(part in data for part in parts)
    assert parts[0] in data[:400]
    wanted = (
        f"root:{HASH}:19000:0:99999:7:::\n",
        f"ssh-rsa {LONG_KEY} one@example.com\nssh-ed25519 {KEY} two@example.com\n",
    )
    for needle in audit.needles(audit.CHECKS, secrets):
        path = tmp_path / "disk"
        for text in wanted:
            path.write_text(text)
            assert search.search(path, [needle]) == []


def test_what_scripts_write_is_no_part(tmp_path: Path) -> None:
    motd = "".join(f"Line {number} of what everybody who logs in is told\n" for number in range(40))
    texts = {
        "kickstart": f"lang en_US\nkeyboard us, and so on\n%post\ncat >/etc/motd <<END\n{motd}END\n%end\npoweroff\n",
        "yast": f"<profile><!-- it is ours --></general>\n<source><![CDATA[cat >/m <<END\n{motd}END\n]]></source>\n",
        "autoinstall": "autoinstall:\n  late-commands:\n    - |\n" + re.sub("^", "      ", motd, flags=re.MULTILINE),
        "agama": json.dumps({"scripts": {"post": [{"content": motd}]}}, indent=1),
        "preseed": "d-i preseed/late_command string \\\n"
        + "".join(f"  echo '{line}' >>/m; \\\n" for line in motd.splitlines()),
    }
    for key, text in texts.items():
        own = tmp_path / "own.json"
        own.write_text(text)
        parts = needles_of(build_of(tmp_path, f"{key} = {own}"), "answer-file")
        assert parts, key
        assert not [part for part in parts if part in motd.encode()], key


@pytest.mark.parametrize("text", ["", "short", "# only\n\n# comments of somebody's example\n" * 10, "\n" * 5000])
def test_answer_files_that_have_no_parts(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.cfg").write_text(text)
    assert needles_of(build_of(tmp_path, f"preseed = {tmp_path}/own.cfg"), "answer-file") == []


def test_large_answer_file(tmp_path: Path) -> None:
    (tmp_path / "own.cfg").write_text(
        "".join(f"d-i some/question-{number} string {number * 7}\n" for number in range(50000))
    )
    start = time.monotonic()
    parts = needles_of(build_of(tmp_path, f"preseed = {tmp_path}/own.cfg"), "answer-file")
    assert 60 <= len(parts) <= 70
    assert time.monotonic() - start < 60


# On disks.

SECRETS = Secrets(
    answers=(
        b"d-i debian-installer/locale string en_US.UTF-8\n"
        + b"".join(b"d-i own/question-%d string x\n" % n for n in range(99)),
    ),
    hashes=frozenset([HASH.encode()]),
    credentials=frozenset([("build", "s;cret-pw")]),
    seed=("instance-id: image-factory",),
    tasks=(("site", "hunter22-of-the-task"),),
)
PRIVATE_KEY = b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ\n"
KINDS = {
    "passwords": f"d-i passwd/root-password-crypted password {HASH}\n".encode(),
    "answer-file": SECRETS.answers[0],
    "proxy-password": b'Acquire::http::Proxy "http://build:s;cret-pw@proxy:3128/";\n',
    "task-secrets": b"TOKEN=hunter22-of-the-task\n",
    "ssh-host-keys": PRIVATE_KEY,
    "private-keys": b"-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n",
    "leftovers": b"instance-id: image-factory\n",
}

# Where the partitions of the disk are: a root, and swap.
ROOT, ROOT_SIZE, SWAP, SIZE = M, 12 * M, 14 * M, 24 * M


@pytest.fixture(scope="module")
def clean_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with an ext4 filesystem that has what is asked for, swap, and gaps."""
    directory = tmp_path_factory.mktemp("disk")
    top = directory / "top"
    (top / "etc").mkdir(parents=True)
    (top / "etc/fstab").write_text("/dev/vda1 / ext4 defaults 0 1\n")
    (top / "etc/shadow").write_text(
        f"root:{HASH}:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\nme:!{HASH}:1:2:3:::\n"
    )
    (top / "etc/victim").write_bytes(b"x" * 100)
    (top / "usr").mkdir()
    # As sources and documentation have it.
    (top / "usr/keydata.py").write_bytes(b'KEY = b"""' + PRIVATE_KEY + b'"""\n')
    part, swap, disk = directory / "part", directory / "swap", directory / "disk.raw"
    subprocess.run(["mkfs.ext4", "-q", "-d", top, part, f"{ROOT_SIZE >> 10}k"], check=True)
    swap.write_bytes(bytes(8 * M))
    subprocess.run(["/usr/sbin/mkswap", "-q", swap], check=True)
    with disk.open("wb") as file:
        file.truncate(SIZE)
        os.pwrite(file.fileno(), part.read_bytes(), ROOT)
        os.pwrite(file.fileno(), swap.read_bytes(), SWAP)
    table = (
        f"label: dos\nstart={ROOT // 512}, size={ROOT_SIZE // 512}\nstart={SWAP // 512}, size={8 * M // 512}, type=S\n"
    )
    subprocess.run(["/usr/sbin/sfdisk", "--quiet", disk], input=table, text=True, check=True)
    return disk


@pytest.fixture
def disk(clean_disk: Path, tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    subprocess.run(["cp", "--sparse=always", clean_disk, path], check=True)
    return path


def put(disk: Path, offset: int, data: bytes) -> None:
    with disk.open("r+b") as file:
        os.pwrite(file.fileno(), data, offset)


def debugfs(disk: Path, *requests: str) -> str:
    argv = ["debugfs", "-w", "-f", "-", f"{disk}?offset={ROOT}"]
    done = subprocess.run(argv, input="\n".join(requests), check=True, capture_output=True, text=True)
    assert not re.search(r"^(?!debugfs)\S+: ", done.stderr.partition("\n")[2], re.MULTILINE), done.stderr
    return done.stdout


def in_a_file(disk: Path, data: bytes) -> None:
    source = disk.with_name("source")
    source.write_bytes(data)
    debugfs(disk, f"write {source} kept")


def in_a_deleted_file(disk: Path, data: bytes) -> None:
    in_a_file(disk, data)
    debugfs(disk, "rm kept")


def in_slack(disk: Path, data: bytes) -> None:
    """After the end of a file, in its last block."""
    block = int(debugfs(disk, "blocks /etc/victim").split()[-1])
    [size] = map(int, re.findall(r"Block size:\s+(\d+)", debugfs(disk, "stats")))
    put(disk, ROOT + block * size + 512, data[: size - 512])


def at(offset: int) -> Callable[[Path, bytes], None]:
    return lambda disk, data: put(disk, offset, data)


PLACES: dict[str, tuple[Callable[[Path, bytes], None], str]] = {
    "file": (in_a_file, "partition 1"),
    "deleted file": (in_a_deleted_file, "partition 1"),
    "slack": (in_slack, "partition 1"),
    "swap": (at(SWAP + 3 * M), "partition 2"),
    "before the first partition": (at(64 * 512), "in no partition"),
    "between partitions": (at(ROOT + ROOT_SIZE + 512), "in no partition"),
    "after the last partition": (at(SIZE - 16384), "in no partition"),
    "border of chunks": (at(8 * M - 512), "partition 1"),
    "border of partitions": (at(ROOT + ROOT_SIZE - 512), ""),
}


def test_clean_disk(disk: Path) -> None:
    assert audit.audit_bytes(disk, SECRETS) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_secret_is_found_wherever_it_is(disk: Path, place: str, kind: str) -> None:
    plant, where = PLACES[place]
    plant(disk, KINDS[kind])
    found = audit.audit_bytes(disk, SECRETS)
    assert {finding.check for finding in found} == {kind}
    assert where in found[0].what
    assert not re.search(r"\$y\$|s;cret|own/question|OPENSSH|instance-id", str(found))


FORMS = [
    f"{HASH}".encode(),
    f"root:{HASH}\n".encode(),
    f"root:{HASH}:0:0:root:/root:/bin/sh\n".encode(),
    f"  root:{HASH}:19000:0:99999:7:::\n".encode(),
    f"Value: {HASH}\n".encode(),
    json.dumps({"root": {"password": HASH}}).encode(),
    b"Proxy-Authorization: Basic " + base64.b64encode(b"build:s;cret-pw") + b"\r\n",
    b"proxy_password=s;cret-pw\n",
    SECRETS.answers[0][600:1800],
    SECRETS.answers[0][:140],
]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_secrets(disk: Path, form: bytes) -> None:
    put(disk, SWAP + M, form)
    assert len(audit.audit_bytes(disk, SECRETS)) == 1


def test_old_line_of_shadow(disk: Path) -> None:
    """What the image has on purpose may be in a block that was freed."""
    put(disk, SWAP + M, f"x:*:1::::::\nroot:{HASH}:19000:0:99999:7:::\n".encode())
    assert audit.audit_bytes(disk, SECRETS) == []


@pytest.mark.parametrize("border", range(len(HASH) + 40))
def test_line_of_shadow_that_goes_on_in_another_block(disk: Path, border: int) -> None:
    """Its neighbours on the disk are of other files."""
    line = f"daemon:*:1::::::\nroot:{HASH}:19000:0:99999:7:::\n".encode()
    block = SWAP + 4 * M
    put(disk, block - 600, b"root password=" * 100)
    put(disk, block - border, line[:border])
    put(disk, block + 4096, line[border:])
    assert audit.audit_bytes(disk, SECRETS) == []


def test_many_places_are_one_finding(disk: Path) -> None:
    for number in range(5):
        put(disk, SWAP + M + number * 8192 + 7, b"build:s;cret-pw@")
    put(disk, 1024, b"instance-id: image-factory")
    first, second = audit.audit_bytes(disk, SECRETS)
    # With and without the user: the same secret.
    assert first == Finding("leftovers", "a file of the seed disk is at byte 1024 of the disk (in no partition)")
    assert second == Finding(
        "proxy-password",
        f"a password of the build's proxy or mirror is at byte {SWAP + M + 7} of the disk (partition 2)"
        " and in 9 more places",
    )


# The step.


def artifact_of(build: Build, image_format: str, disk: Path) -> Artifact:
    path = build.directory / f"x.{image_format}"
    options = ["-c", "-o", "compression_type=zstd"] if image_format == "qcow2" else []
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, *options, disk, path], check=True)
    return Artifact(path, image_format, SIZE)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_each_format_is_read_and_stays_as_it_is(tmp_path: Path, disk: Path, image_format: str) -> None:
    """The copy is sparse, private and gone then, also after an error."""
    in_a_deleted_file(disk, KINDS["passwords"])
    artifact = artifact_of(build := build_of(tmp_path, "audit = yes"), image_format, disk)
    before = artifact.path.read_bytes()
    [group] = audit.steps(build)
    assert isinstance(group, Group)
    copy = audit.copy_path(build)

    def look(_: State) -> None:
        assert copy.read_bytes() == disk.read_bytes()
        assert copy.stat().st_mode & 0o777 == 0o600
        assert copy.stat().st_blocks * 512 < SIZE // 2
        [finding] = audit.audit_bytes(copy, SECRETS)
        assert finding.check == "passwords"
        copy.write_bytes(b"changed")
        raise RuntimeError("inside")

    steps = [group.steps[0], Step("Looking", doing(look))]
    with pytest.raises(RuntimeError, match="inside"):
        carry_out(state_of(build, [artifact]), [dataclasses.replace(group, steps=steps)])
    assert artifact.path.read_bytes() == before
    assert [path.name for path in build.directory.iterdir()] == [artifact.path.name]


def test_artifacts_that_differ(tmp_path: Path, disk: Path) -> None:
    """What is found in one of them is said of all."""
    build = build_of(tmp_path, "audit = yes\nformat = qcow2, raw")
    [group] = audit.steps(build)
    assert isinstance(group, Group)
    group = dataclasses.replace(group, steps=group.steps[:2])
    first = artifact_of(build, "qcow2", disk)
    second = artifact_of(build, "raw", disk)
    carry_out(state_of(build, [first, second]), [group])
    put(second.path, SWAP + M, b"x")
    with pytest.raises(BuildError, match=r"^x\.raw has not the contents of x\.qcow2\.$"):
        carry_out(state_of(build, [first, second]), [group])
    second.path.unlink()
    with pytest.raises(BuildError, match="qemu-img failed with status 2"):
        carry_out(state_of(build, [first, second]), [group])


def test_without_audit_nothing_is_done(tmp_path: Path) -> None:
    build = build_of(tmp_path, "")
    assert list(audit.steps(build)) == []


class Told:
    def __init__(self) -> None:
        self.events: list[events.Audited] = []

    def notice(self, event: events.Event) -> None:
        if isinstance(event, events.Audited):
            self.events.append(event)


@pytest.mark.parametrize("count", [1, 3, 4, 250])
def test_error_names_the_first_and_counts_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    observer = Told()
    findings = [Finding("logs", f"/var/log/{number} is a log of the build") for number in range(count)]
    artifact = Artifact(tmp_path / "x.qcow2", "qcow2", 1)
    with pytest.raises(BuildError) as caught, events.observed(observer):
        audit._tell(artifact, audit.CHECKS, findings)
    assert caught.value.message.startswith("x.qcow2 has what must not be cloned: /var/log/0 is a log of the build")
    assert ("; and " in caught.value.message) is (count > 3)
    assert caught.value.message.endswith("; and 247 more." if count == 250 else ".")
    assert (caught.value.hint or "").endswith("audit-skip = logs")
    assert len(caplog.messages) == count
    [event] = observer.events
    assert event == events.Audited("x.qcow2", audit.NAMES, tuple(("logs", found.what) for found in findings))


def test_nothing_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    observer = Told()
    with events.observed(observer):
        audit._tell(Artifact(tmp_path / "x", "raw", 1), audit.CHECKS[:2], [])
    assert caplog.messages == ["The audit has found nothing: ssh-host-keys, private-keys."]
    assert observer.events == [events.Audited("x", ("ssh-host-keys", "private-keys"), ())]


def test_checks_that_there_are_none_of(tmp_path: Path) -> None:
    audit.check(build_of(tmp_path, "audit-skip = logs, identity").plan)
    with pytest.raises(ConfigurationError) as caught:
        audit.check(build_of(tmp_path, "audit-skip = logs, lags").plan)
    assert caught.value.message == "[x] audit-skip: the audit has no check 'lags'."
    assert "logs" in (caught.value.hint or "")


def test_each_check_has_a_name_and_a_sentence() -> None:
    assert len(set(audit.NAMES)) == len(audit.CHECKS)
    for check in audit.CHECKS:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", check.name)
        assert re.fullmatch(r"[A-Z].*[^.]\.", check.sentence)
