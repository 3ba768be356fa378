"""What is read of an installed system: this machine's dpkg, databases that rpm makes, and damaged ones."""

import hashlib
import json
import logging
import shutil
import sqlite3
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from image_factory.base.errors import BuildError
from image_factory.system import inventory, rpmdb
from image_factory.system.inventory import Package, Read

SPEC = """Name: {name}
Version: {version}
Release: 2.fc44
{more}
Summary: a package
License: {license}
BuildArch: noarch
%description
A package.
%files
"""


def reader(root: Path) -> Read:
    """Give the files below *root* as a guest's are given: without links."""

    def read(path: str, most: int, offset: int = 0, /) -> bytes | None:
        found = root / path
        if found.resolve() != root.resolve() / path or not found.is_file():
            return None
        with found.open("rb") as file:
            file.seek(offset)
            return file.read(most)

    return read


def files(**named: str) -> Read:
    """Give the files that are *named*, with ``__`` for a slash and ``_`` for a dash."""
    return having({name.replace("__", "/").replace("_", "-"): text.encode() for name, text in named.items()})


def having(by_path: Mapping[str, bytes]) -> Read:
    def read(path: str, most: int, offset: int = 0, /) -> bytes | None:
        data = by_path.get(path)
        return None if data is None else data[offset:][:most]

    return read


def status(*stanzas: str) -> Read:
    return files(var__lib__dpkg__status="\n\n".join(stanzas) + "\n")


def stanza(name: str = "a", version: str = "1", state: str = "install ok installed", more: str = "") -> str:
    return f"Package: {name}\nStatus: {state}\nArchitecture: amd64\nVersion: {version}{more}"


# dpkg.


def test_packages_are_those_that_dpkg_lists(tmp_path: Path) -> None:
    found = inventory.read_packages(reader(Path("/")), tmp_path / "x")
    form = "${db:Status-Abbrev}\t${Package}\t${Version}\t${Architecture}\t${source:Package}\n"
    lines = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
    rows = [line.split("\t") for line in lines.splitlines()]
    wanted = {tuple(row[1:]) for row in rows if row[0].strip() not in ("rc", "un")}
    assert {(found.name, found.version, found.architecture, found.source) for found in found} == wanted
    assert list(found) == sorted(found, key=lambda package: (package.name, package.architecture))
    by_name = {package.name: package for package in found}
    assert "GPL-2+" in (by_name["dpkg"].licenses or ())
    # The first has a link for a directory: the file is that of the source.
    assert by_name["libstdc++6"].licenses == by_name["gcc-12-base"].licenses


def test_system_that_has_a_name() -> None:
    read = files(etc__os_release='ID=debian\nVERSION_ID="13"\nPRETTY_NAME="Debian \x1b[31m13"\nHOME_URL=x\nID_LIKE="\n')
    assert inventory.read_os(read) == {"id": "debian", "version_id": "13", "pretty_name": "Debian 13"}
    assert inventory.read_os(files(usr__lib__os_release="ID='x'\nVERSION_ID='1 2'")) == {"id": "x"}
    assert inventory.read_os(files(etc__os_release="ID=Ünï\nVERSION_ID='\n=\nID")) == {}
    assert inventory.read_os(files()) == {}


@pytest.mark.parametrize(
    ("text", "found", "said"),
    [
        (
            'ID="openEuler"\nVERSION_ID="V10"\n',
            {"id": "openeuler", "version_id": "v10"},
            ["ID is openEuler there, and is taken as openeuler", "VERSION_ID is V10 there, and is taken as v10"],
        ),
        ("  ID=Arch\r\nVERSION_ID=24.03\r\n", {"id": "arch", "version_id": "24.03"}, ["is taken as arch"]),
        ("ID=ol\\d\nVERSION_ID='9'.\"5\"\n", {"id": "old", "version_id": "9.5"}, []),
        ("ID=a b\nVERSION_ID='1\n", {}, ["ID is a b, which os-release(5) does not allow", "VERSION_ID has a quote"]),
        ('ID=""\nPRETTY_NAME="openEuler V10 (SP1)"\n', {"pretty_name": "openEuler V10 (SP1)"}, []),
    ],
)
def test_odd_names_are_told(
    caplog: pytest.LogCaptureFixture, text: str, found: dict[str, str], said: list[str]
) -> None:
    """Nothing of it is changed or left out without a word."""
    caplog.set_level(logging.INFO)
    assert inventory.read_os(files(etc__os_release=text)) == found
    assert len(caplog.messages) == len(said)
    for words, message in zip(said, caplog.messages, strict=True):
        assert message.startswith("/etc/os-release: ")
        assert words in message


@pytest.mark.parametrize(
    ("state", "listed"),
    [
        ("install ok installed", True),
        ("hold ok installed", True),
        ("install ok triggers-pending", True),
        ("install ok unpacked", True),
        ("deinstall ok config-files", False),
        ("purge ok not-installed", False),
        ("install reinstreq half-installed", False),
        ("", False),
    ],
)
def test_states_of_packages(tmp_path: Path, state: str, listed: bool) -> None:
    assert bool(inventory.read_packages(status(stanza(state=state)), tmp_path)) is listed


@pytest.mark.parametrize(
    "bad",
    [
        stanza("\x1b[2Jname"),
        stanza("../../../etc/shadow"),
        stanza("a b"),
        stanza("x" * 300),
        stanza("päckchen"),
        stanza("-rf"),
        stanza(""),
        stanza(version="1\x1b[31m"),
        stanza(version=""),
        stanza(version="1 2"),
        stanza(more="\nSource: ../../x"),
        stanza().replace("amd64", "a/b"),
        "Status: install ok installed",
    ],
)
def test_hostile_entries_are_left_out(tmp_path: Path, bad: str, caplog: pytest.LogCaptureFixture) -> None:
    found = inventory.read_packages(status(stanza("good"), bad), tmp_path)
    assert [package.name for package in found] == ["good"]
    assert caplog.messages == ["1 entries of the package database are no packages."]


def test_package_that_is_there_twice_is_listed_once(tmp_path: Path) -> None:
    found = inventory.read_packages(status(stanza(), stanza(more="\nSource: b"), stanza(version="2")), tmp_path)
    assert [(package.name, package.version) for package in found] == [("a", "1"), ("a", "2")]


def test_long_lines_take_no_time(tmp_path: Path) -> None:
    text = stanza(more="\nX: " + " " * 5_000_000 + "x\n") + " " * 5_000_000
    assert len(inventory.read_packages(status(text), tmp_path)) == 1
    assert inventory.read_licenses(b"Format: x\nLicense:" + b" \t" * 400_000 + b"\nLicense: MIT\n") == ("MIT",)


def test_system_without_packages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert inventory.read_packages(files(), tmp_path) == ()
    assert caplog.messages == ["No packages are listed: the system has neither dpkg's database nor rpm's."]


@pytest.mark.parametrize(
    ("text", "licenses"),
    [
        ("Format: x\n\nFiles: *\nLicense: MIT\n\nFiles: a\nLicense:  GPL-2+ or X \n text\n", ("GPL-2+ or X", "MIT")),
        ("\nFormat-Specification: x\n\nLicense: BSD\n", ("BSD",)),
        ("Format: x\nLicense:\n the text\n", None),
        ("It is free.\nLicense: MIT\n", None),
        ("Format: x\nLicense: \x1b[31mred\x07\n", ("red?",)),
        ("Format: x\nLicense: " + "x" * 999 + "\n", ("x" * 200,)),
        ("", None),
    ],
)  # fmt: skip
def test_licenses_in_a_copyright_file(text: str, licenses: tuple[str, ...] | None) -> None:
    assert inventory.read_licenses(text.encode()) == licenses


def test_licenses_have_an_end() -> None:
    text = "Format: x\n" + "".join(f"License: L{number}\n" for number in range(5000))
    assert len(inventory.read_licenses(text.encode()) or ()) == 100
    assert inventory.read_licenses(b"Format: x\nLicense: \xff\xfe\n") == ("\ufffd\ufffd",)


def test_kernels() -> None:
    names = ["linux-image-6.12.48+deb13-amd64", "linux-image-amd64", "linux-image-6.1.0-1-amd64-dbg", "kernel-core"]
    names += ["kernel-default", "kernel-headers", "kernel", "linux-headers-6.12"]
    packages = tuple(Package("deb", name, "1", "amd64", name, None) for name in names)
    assert [line.split()[0] for line in inventory.Inventory({}, packages, {}).kernels] == [names[0], *names[3:5]]


# rpm.


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that the program rpm has made, of two versions of a package and one with an epoch."""
    directory = tmp_path_factory.mktemp("rpm")
    specs = [
        ("bash", "5.2.26", "", "GPL-3.0-or-later"),
        ("kernel-core", "6.17.1", "", "GPL-2.0-only"),
        ("kernel-core", "6.17.2", "", "GPL-2.0-only"),
        ("dbus", "1.16", "Epoch: 1", "(GPL-2.0-or-later OR AFL-2.1) AND\tMIT"),
    ]
    for number, (name, version, more, text) in enumerate(specs):
        spec = directory / f"{number}.spec"
        spec.write_text(SPEC.format(name=name, version=version, more=more, license=text))
        rpm("rpmbuild", "-bb", "--quiet", "--define", f"_topdir {directory}", str(spec))
    found = directory / "root/usr/lib/sysimage/rpm"
    found.mkdir(parents=True)
    packages = sorted(map(str, directory.glob("RPMS/noarch/*.rpm")))
    options = ["--dbpath", str(found), "--define", "_db_backend sqlite", "--justdb", "--nodeps", "--ignoreos"]
    rpm("rpm", *options, "--install", *packages)
    return found


def rpm(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout


def test_digests_of_files(tmp_path: Path, database: Path) -> None:
    """Those of the files of a package that rpm has, and of no others."""
    spec = tmp_path / "x.spec"
    text = SPEC.format(name="keys", version="1", more="", license="MIT")
    files = "/usr/share/keys/a.pem\n%ghost /etc/b.pem\n"
    install = "%install\nmkdir -p %{buildroot}/usr/share/keys\nprintf key >%{buildroot}/usr/share/keys/a.pem\n"
    spec.write_text(f"{text.replace('%files', f'{install}%files')}{files}")
    rpm("rpmbuild", "-bb", "--quiet", "--define", f"_topdir {tmp_path}", str(spec))
    copy = tmp_path / "root/usr/lib/sysimage/rpm"
    shutil.copytree(database, copy)
    [package] = map(str, tmp_path.glob("RPMS/noarch/*.rpm"))
    options = ["--dbpath", str(copy), "--define", "_db_backend sqlite", "--justdb", "--nodeps", "--ignoreos"]
    rpm("rpm", *options, "--install", package)
    digests = {hashlib.new(name, b"key").hexdigest() for name in ("md5", "sha1", "sha256", "sha512")}
    with inventory.rpm_database(reader(tmp_path / "root"), tmp_path) as found:
        assert found is not None
        assert len(rpmdb.known_digests(found, digests | {"0" * 64})) == 1
        assert rpmdb.known_digests(found, {"0" * 64}) == set()
    with inventory.rpm_database(having({}), tmp_path) as found:
        assert found is None


def test_packages_are_those_that_rpm_lists(database: Path, tmp_path: Path) -> None:
    found = inventory.read_packages(reader(database.parents[3]), tmp_path)
    form = "%{NAME}\\t%|EPOCH?{%{EPOCH}:}|%{VERSION}-%{RELEASE}\\t%{ARCH}\\n"
    wanted = rpm("rpm", "--dbpath", str(database), "--query", "--all", "--queryformat", form).splitlines()
    assert sorted("\t".join((package.name, package.version, package.architecture)) for package in found) == sorted(
        wanted
    )
    assert len(found) == 4
    dbus = next(package for package in found if package.name == "dbus")
    licenses = ("(GPL-2.0-or-later OR AFL-2.1) AND MIT",)
    assert dbus == Package("rpm", "dbus", "1:1.16-2.fc44", "noarch", "dbus", licenses)
    assert list(tmp_path.iterdir()) == []


def test_database_whose_log_was_not_written_back(database: Path, tmp_path: Path) -> None:
    """A guest that was switched off leaves what it wrote last in SQLite's log."""
    copy = tmp_path / "copy/var/lib/rpm"
    shutil.copytree(database, copy)
    script = (
        "import sqlite3, os; c = sqlite3.connect('rpmdb.sqlite'); c.execute('PRAGMA journal_mode=WAL');"
        "c.execute('DELETE FROM Packages WHERE hnum = 1'); c.commit(); os._exit(0)"
    )
    subprocess.run(["python3", "-c", script], cwd=copy, check=True)
    assert (copy / "rpmdb.sqlite-wal").stat().st_size
    found = inventory.read_packages(reader(tmp_path / "copy"), tmp_path)
    assert len(found) == 3


def ndb(blobs: list[bytes]) -> bytes:
    """Return a database of rpm's form ndb, which Debian's rpm doesn't write."""
    head = bytearray(4096)
    struct.pack_into("<4sIIII", head, 0, b"RpmP", 0, 1, 1, len(blobs) + 1)
    body = b""
    for number, blob in enumerate(blobs, 1):
        # An adler32, which nobody reads here.
        whole = (
            struct.pack("<4sIII", b"BlbS", number, 1, len(blob)) + blob + struct.pack("<II4s", 0, len(blob), b"BlbE")
        )
        whole += bytes(-len(whole) % 16)
        # With a free slot between two.
        block = (len(head) + len(body)) // 16
        struct.pack_into("<4sIII", head, 32 * number, b"Slot", number, block, len(whole) // 16)
        struct.pack_into("<4sIII", head, 32 * number + 16, b"Slot", 0, 0, 0)
        body += whole
    return bytes(head) + body


def copied(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def blobs_of(database: Path) -> list[bytes]:
    with sqlite3.connect(database / "rpmdb.sqlite") as connection:
        return [blob for (blob,) in connection.execute("SELECT blob FROM Packages")]


def test_form_of_opensuse(database: Path, tmp_path: Path) -> None:
    files = {"usr/lib/sysimage/rpm/Packages.db": ndb(blobs_of(database))}
    same = inventory.read_packages(reader(database.parents[3]), tmp_path)
    assert inventory.read_packages(having(files), tmp_path) == same
    # More slots than the file is long.
    huge = files["usr/lib/sysimage/rpm/Packages.db"]
    files["usr/lib/sysimage/rpm/Packages.db"] = huge[:12] + b"\xff\xff\xff\xff" + huge[16:]
    assert inventory.read_packages(having(files), tmp_path) == same


DAMAGES: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("another form", lambda data: b"x" * len(data)),
    ("cut off in a blob", lambda data: data[:4200]),
    ("cut off in its head", lambda data: data[:10]),
    ("a block that is not there", lambda data: data[:40] + b"\xff\xff\xff\xff" + data[44:]),
    ("a huge blob", lambda data: data[:4108] + b"\xff\xff\xff\xff" + data[4112:]),
    ("a header of many entries", lambda data: data[:4112] + b"\xff\xff\xff\xff" + data[4116:]),
    ("an offset that is not there", lambda data: data[:4112] + struct.pack(">6I", 1, 4, 1003, 4, 999, 1) + data[4136:]),
]  # fmt: skip


@pytest.mark.parametrize("damage", [change for _, change in DAMAGES], ids=[name for name, _ in DAMAGES])
def test_damaged_database_of_opensuse(database: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(BuildError, match="rpm database is damaged") as caught:
        rpmdb.read(copied(tmp_path / rpmdb.NDB, damage(ndb(blobs_of(database)))))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("data", [b"x" * 5000, b"SQLite format 3\0" + bytes(4096), b"\0"])
def test_damaged_database(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BuildError, match="rpm database is damaged"):
        inventory.read_packages(having({f"var/lib/rpm/{rpmdb.SQLITE}": data}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_query_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table may be a view that never ends."""
    with sqlite3.connect(tmp_path / "evil") as connection:
        connection.execute(
            "CREATE VIEW Packages AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
            "SELECT zeroblob(1) AS blob FROM n WHERE i < 0"
        )
    monkeypatch.setattr(rpmdb, "_SECONDS", 1.0)
    with pytest.raises(BuildError, match="rpm database did not end within 1 s"):
        rpmdb.read(tmp_path / "evil")


def test_older_database(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert inventory.read_packages(having({"var/lib/rpm/Packages": b"\0"}), tmp_path) == ()
    assert "The packages of rpm are not listed" in caplog.messages[0]


def test_hostile_header_of_rpm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = b"a\x1b[31m\nb\0" + b"1\0" + b"noarch\0"
    entries = [(1000, 6, 0), (1001, 6, 9), (1002, 6, 9), (1022, 6, 11)]
    blob = struct.pack(">II", len(entries), len(store)) + b"".join(
        struct.pack(">IIII", tag, kind, offset, 1) for tag, kind, offset in entries
    )
    with caplog.at_level(logging.WARNING):
        files = {"var/lib/rpm/Packages.db": ndb([blob + store])}
        assert inventory.read_packages(having(files), tmp_path) == ()
    assert caplog.messages == ["1 entries of the package database are no packages."]


def test_what_is_taken_is_json(tmp_path: Path) -> None:
    json.dumps([vars(found) for found in inventory.read_packages(status(stanza()), tmp_path)])
