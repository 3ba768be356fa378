"""What --verify says of a directory: of one that is as it was published, and of all that can be wrong with one."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from image_factory import cli
from image_factory.base import events
from image_factory.finishing import provenance, sign
from image_factory.model import Build
from image_factory.told.witness import Witness

from .test_manifest import named, published
from .test_sign import ALICE, BOB, Keys, keys, nothing_left

__all__ = ["keys", "nothing_left"]

BASE = "x-2024-02-29"
SUMS, RAW, QCOW2 = f"{BASE}.SHA256SUMS", f"{BASE}.raw", f"{BASE}.qcow2"


def made(path: Path, key: str = ALICE) -> Path:
    """Return a directory in which a build has published, signed with *key* if that is one."""
    artifacts = published(path)
    plan = named(path, extra=f"provenance = yes\n{f'sign-key = {key}' if key else ''}\n")
    seen = Witness()
    with seen.observing():
        events.tell(events.StepStarted("Writing the provenance"))
        build = Build(plan, plan.output_dir, "vm")
        artifacts = provenance.add_statement(build, artifacts, seen)
    if key:
        sign.sign_all(build, artifacts)
    shutil.rmtree(plan.work_path, ignore_errors=True)
    (plan.output_dir / f"{BASE}.log").write_text("a log\n")
    return plan.output_dir


@pytest.fixture
def directory(tmp_path: Path, keys: Keys) -> Path:
    return made(tmp_path)


def verified(directory: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str], str]:
    """Return the status, the lines by names with their first word before it, and what is said of errors."""
    capsys.readouterr()
    status = cli.main(["--verify", str(directory), *words])
    said = capsys.readouterr()
    lines = {}
    for line in said.out.splitlines():
        word, _, rest = line.partition("  ")
        name, _, what = rest.strip().partition(": ")
        lines[name] = f"{word.strip()} {what}".strip()
    assert len(said.err.splitlines()) <= 2
    assert "Traceback" not in said.err
    return status, lines, said.err


def test_all_is_good(directory: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, said = verified(directory, capsys)
    assert (status, said) == (0, "")
    assert lines.pop(f"{BASE}.log") == "unknown nobody vouches for it"
    assert lines.pop(SUMS) == f"good signed by {keys.fingerprint(ALICE)}"
    assert sorted(lines) == sorted({*os.listdir(directory)} - {SUMS, f"{BASE}.log"})
    assert {*lines.values()} == {"good"}
    assert len(lines) == 10


def test_keyring_says_whose_signatures_count(
    directory: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ring = tmp_path / "ring.asc"
    for name, expected in ((ALICE, 0), (BOB, 1)):
        ring.write_text(keys.gpg("--armor", "--export", name))
        status, lines, _ = verified(directory, capsys, "--set", f"keyring={ring}")
        assert status == expected
    assert "is not in the keyring" in lines[f"{SUMS}.asc"]
    # Its checksums are right, and it is not known by whom they are.
    assert lines[RAW] == "unsigned"


def test_without_signatures_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = made(tmp_path, "")
    status, lines, _ = verified(directory, capsys)
    assert status == 0
    assert any("has no signatures" in f"{name} {what}" for name, what in lines.items())
    assert lines[RAW] == lines[f"{RAW}.manifest.json"] == lines[f"{BASE}.provenance.json"] == "unsigned"
    (directory / RAW).write_text("another")
    status, lines, said = verified(directory, capsys)
    assert status == 1
    assert f"is not what {RAW}.sha256sum says: expected SHA-256 " in lines[RAW]
    assert "1 of " in said


def test_without_public_keys(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GNUPGHOME", str(tmp_path / "none"))
    status, lines, _ = verified(directory, capsys)
    assert (status, lines[f"{SUMS}.asc"]) == (1, "bad can't be checked: there are no public keys")
    # Looking makes none.
    assert not (tmp_path / "none").exists()


def change(name: str, text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda directory: (directory / name).write_bytes(data)


def edit(name: str, work: Callable[[Any], object]) -> Callable[[Path], object]:
    def run(directory: Path) -> None:
        document = json.loads((directory / name).read_text())
        work(document)
        (directory / name).write_text(json.dumps(document))

    return run


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def run(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return run


def append(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text((directory / name).read_text() + text)


def pop(document: Any) -> None:
    document["components"].pop()


STATEMENT = f"{BASE}.provenance.json"
MANIFEST, SBOM, SUM = f"{RAW}.manifest.json", f"{RAW}.cdx.json", f"{RAW}.sha256sum"
ZEROS = "0" * 64
FAULTS = {
    "image": (change(QCOW2, "x"), QCOW2, f"is not what {SUMS} says"),
    "image is gone": (lambda directory: (directory / QCOW2).unlink(), QCOW2, "is not there"),
    "image is a fifo": (replaced(QCOW2, os.mkfifo), QCOW2, "is not a regular file"),
    "image is a link out": (
        replaced(QCOW2, lambda path: path.symlink_to("/etc/passwd")),
        QCOW2,
        "is a link, which is not followed",
    ),
    "image is a directory": (replaced(QCOW2, os.mkdir), QCOW2, "is not a regular file"),
    "list": (append(SUMS, f"{ZEROS}  {BASE}.log\n"), f"{SUMS}.asc", "it is not what key"),
    "signature": (change(f"{SUMS}.asc", "junk"), f"{SUMS}.asc", "is not accepted: there is no"),
    "empty signature": (change(f"{SUMS}.asc", ""), f"{SUMS}.asc", "is not accepted: there is no"),
    "signature is gone": (lambda directory: (directory / f"{SUMS}.asc").unlink(), f"{SUMS}.asc", "is not there"),
    "name leads out": (append(SUMS, f"{ZEROS}  ../../etc/passwd\n"), SUMS, "line 10 is no checksum of a file here"),
    "name is the directory": (append(SUMS, f"{ZEROS}  ..\n"), SUMS, "line 10 is no checksum of a file here"),
    "absolute name": (append(SUMS, f"{ZEROS}  /etc/passwd\n"), SUMS, "line 10 is no checksum of a file here"),
    "control characters": (append(SUMS, f"{ZEROS}  \x1b[31mred\n"), SUMS, "line 10 is no checksum of a file here"),
    "escaped name": (append(SUMS, f"\\{ZEROS}  a\\nb\n"), SUMS, "line 10 is no checksum of a file here"),
    "two checksums": (append(SUMS, f"{ZEROS}  {RAW}\n"), SUMS, f"line 10 has another checksum of {RAW} than"),
    "no text": (change(SUMS, b"\0\xff" * 500), SUMS, "line 1 is no checksum of a file here"),
    "checksum of another": (change(SUM, f"{ZEROS}  {QCOW2}\n"), SUM, "has not the checksum"),
    "short checksum": (change(SUM, f"{'0' * 32}  {RAW}\n"), SUM, "line 1 is no checksum"),
    "empty checksum": (change(SUM, ""), SUM, "has not the checksum"),
    "manifest is no JSON": (change(MANIFEST, "{"), MANIFEST, "has not the form of such a file"),
    "manifest is deep": (change(MANIFEST, "[" * 100_000), MANIFEST, "has not the form of such a file"),
    "manifest is a list": (change(MANIFEST, "[]"), MANIFEST, "has not the form of such a file"),
    "manifest is huge": (
        lambda directory: os.truncate(directory / MANIFEST, 1 << 40),
        MANIFEST,
        "has more than 64.0 MiB, which no such file has",
    ),
    "manifest of another": (
        edit(MANIFEST, lambda document: document["artifact"].update(name="../../etc/passwd")),
        MANIFEST,
        "is that of '../../etc/passwd'",
    ),
    "manifest's digest": (
        edit(MANIFEST, lambda document: document["artifact"].update(sha256=ZEROS)),
        RAW,
        f"is not what {MANIFEST} says",
    ),
    "SBOM of other packages": (edit(SBOM, pop), SBOM, f"has not the packages of {MANIFEST}"),
    "SBOM of another": (
        edit(SBOM, lambda document: document["metadata"]["component"].update({"bom-ref": QCOW2})),
        SBOM,
        f"is that of '{QCOW2}'",
    ),
    "SBOM without a digest": (
        edit(SBOM, lambda document: document["metadata"]["component"].update(hashes=[])),
        SBOM,
        "has not the form of such a file",
    ),
    "statement's digest": (
        edit(STATEMENT, lambda document: document["subject"][0]["digest"].update(sha256=ZEROS)),
        QCOW2,
        f"is not what {STATEMENT} says",
    ),
    "statement of what leads out": (
        edit(STATEMENT, lambda document: document["subject"][0].update(name="../own.conf")),
        "../own.conf",
        "is no name of a file here",
    ),
    "statement of nothing": (
        edit(STATEMENT, lambda document: document.update(subject=[])),
        STATEMENT,
        "is of nothing",
    ),
    "another statement": (
        edit(STATEMENT, lambda document: document.update(predicateType="https://example.com/")),
        STATEMENT,
        "is no statement of in-toto and SLSA that is known",
    ),
    "statement of no names": (
        edit(STATEMENT, lambda document: document["subject"][0].update(name=1)),
        STATEMENT,
        "has not the form of such a file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_not_good_is_named(directory: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    work, name, reason = FAULTS[case]
    work(directory)
    status, lines, said = verified(directory, capsys)
    assert status == 1
    assert lines[name].startswith("bad ")
    assert reason in lines[name]
    assert " not as they were published." in said


def test_a_list_whose_signature_is_bad_vouches_for_nothing(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "evil.qcow2").write_text("evil")
    digest = hashlib.sha256(b"evil").hexdigest()
    append(SUMS, f"{digest}  evil.qcow2\n")(directory)
    _, lines, _ = verified(directory, capsys)
    assert lines["evil.qcow2"] == lines[RAW] == "unsigned"


def test_names_of_files_can_do_nothing(directory: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    for name in (b"a\nb", b"\x1b[31mred", b"\xff\xfe", b".hidden"):
        Path(os.fsdecode(bytes(directory) + b"/" + name)).touch()
    (directory / "out").symlink_to("/etc")
    os.mkfifo(directory / "fifo")
    assert cli.main(["--verify", str(directory)]) == 0
    out = capfdbinary.readouterr().out
    assert b"\x1b" not in out
    assert rb"unknown   a\nb: nobody vouches for it" in out
    assert all(line.split()[0] in (b"good", b"unknown") for line in out.splitlines())


@pytest.mark.parametrize("name", ["none", "file", "fifo", "empty"])
def test_what_is_no_directory_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").mkdir()
    status, _, said = verified(tmp_path / name, capsys)
    assert status != 0
    assert said.startswith("image-factory: error: --verify: ")
    assert name in said


def test_a_directory_that_can_not_be_read(directory: Path) -> None:
    """Neither it nor a file in it, for a user who may not."""
    directory.chmod(0o700)
    for path in (directory, *directory.parents):
        if path == Path("/tmp"):
            break
        path.chmod(0o755)
    program = Path(cli.__file__).parents[1] / "image-factory"
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "-u", "GNUPGHOME",
            "HOME=/nonexistent", program, "--verify", directory]  # fmt: skip
    directory.chmod(0o700)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode != 0
    assert "Permission denied" in done.stderr
    directory.chmod(0o755)
    (directory / RAW).chmod(0o600)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 1
    assert f"bad       {RAW}: can't be read: Permission denied" in done.stdout


def test_flags_that_make_no_sense(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["x"],
        ["--json", "-"],
        ["--set", f"keyring={tmp_path}/none"],
        ["--set", f"keyring={directory}"],
        ["--set", "keyring="],
        ["--set", "seal=yes"],
    ):
        status, _, said = verified(directory, capsys, *words)
        assert status != 0
        assert len(said.splitlines()) in (1, 2)


def test_all_digests_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = b"image"
    (tmp_path / "a.raw").write_bytes(data)
    for algorithm in ("sha256", "sha512", "md5"):
        digest = hashlib.new(algorithm, data).hexdigest()
        (tmp_path / f"a.raw.{algorithm}sum").write_text(f"{digest}  a.raw\n")
    status, lines, _ = verified(tmp_path, capsys)
    assert status == 0
    for algorithm in ("sha512", "md5"):
        path = tmp_path / f"a.raw.{algorithm}sum"
        before = path.read_text()
        path.write_text(("0" if before[0] == "f" else "f") + before[1:])
        status, lines, _ = verified(tmp_path, capsys)
        assert status == 1
        assert lines["a.raw"].startswith(f"bad is not what a.raw.{algorithm}sum says")
        path.write_text(before)
