"""A small archive of Debian's kind, from which mmdebstrap makes a system in seconds and without a network.

Its packages are made of programs of this machine; the system boots nowhere, as kernel and boot loader are empty.
"""

import functools
import hashlib
import http.server
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

SUITE = "small"
KEYS = ("right", "wrong")

_APPLETS = (
    "sh awk basename cat chgrp chmod chown chpasswd chroot cmp cp cut date dd df diff dirname du echo egrep expr false "
    "find fgrep grep gzip head id install kill ln ls md5sum mkdir mknod mktemp mount mv od printf ps pwd readlink rm "
    "rmdir sed sleep sort start-stop-daemon stat sync tail tee test touch tr true umount uname uniq wc which xargs"
)
_PROGRAMS = ("dpkg", "dpkg-deb", "dpkg-query", "dpkg-split", "dpkg-trigger", "dpkg-divert", "dpkg-statoverride",
             "tar", "env", "base64", "timeout")  # fmt: skip
_DIRECTORIES = "dev proc sys run tmp root srv etc var/cache var/lib/dpkg var/log/apt usr/bin usr/sbin usr/lib usr/lib64"
_SCRIPTS = {
    "usr/bin/debconf-set-selections": "cat >>/var/cache/debconf",
    "usr/sbin/ldconfig": ":",
    # The configuration of GRUB is what the last word names.
    "usr/sbin/grub-mkconfig": 'for last; do :; done\necho "linux /boot/vmlinuz" >"$last"',
    "usr/sbin/grub-probe": ":",
    "usr/bin/grub-mkimage": 'for word; do case $word in --output=*) head -c 1024 /dev/zero >"${word#*=}" ;; esac; done',
}
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/false\n",
    "etc/group": "root:x:0:\ndaemon:x:1:\nshadow:x:42:\n",
    "etc/shadow": "root:*:20000:0:99999:7:::\n",
    "etc/os-release": 'ID=debian\nVERSION_ID="13"\nPRETTY_NAME="Small"\n',
    "usr/lib/grub/i386-pc/boot.img": "\0" * 512,
    "usr/lib/grub/i386-pc/normal.mod": "a module",
    "usr/lib/grub/x86_64-efi/normal.mod": "a module",
    "usr/lib/shim/shimx64.efi.signed": "shim",
    "usr/lib/shim/mmx64.efi.signed": "mm",
    "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed": "grub",
    "boot/vmlinuz": "a kernel",
    # What a system needs for its filesystem.
    "usr/sbin/mke2fs": "",
}


def _run(*argv: str | Path, **keywords: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        **keywords,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stderr
    return done


class Archive:
    """An archive in *directory*, which is served as it is; what only its making needs is in *beside*."""

    def __init__(self, directory: Path, beside: Path) -> None:
        self.directory, self._beside = directory, beside
        self._pool, self._home = directory / "pool", beside / "gnupg"

    @classmethod
    def made(cls, directory: Path, beside: Path) -> "Archive":
        """Make an archive that has what each system needs."""
        self = cls(directory, beside)
        self._pool.mkdir(parents=True)
        self._home.mkdir(mode=0o700)
        for key in KEYS:
            self._gpg("--passphrase", "", "--quick-generate-key", f"{key}@archive.example", "default", "sign", "never")
            _run("gpg", "--homedir", self._home, "--output", self.keyring(key), "--export", f"{key}@archive.example")
            self.keyring(key).chmod(0o644)
        self._make_base()
        self.publish()
        return self

    def copied(self, directory: Path) -> "Archive":
        """Return a copy in the new *directory*, to be changed."""
        shutil.copytree(self.directory, directory / "archive")
        (directory / "gnupg").symlink_to(self._home)
        return Archive(directory / "archive", directory)

    def close(self) -> None:
        """End what gpg has left running."""
        subprocess.run(["gpgconf", "--homedir", self._home, "--kill", "all"], check=False)

    def keyring(self, key: str = "right") -> Path:
        """Return the file with the public key named *key*."""
        return self.directory / f"{key}.gpg"

    def _gpg(self, *words: str | Path) -> None:
        _run("gpg", "--batch", "--quiet", "--homedir", self._home, "--pinentry-mode", "loopback", *words)

    def _make_base(self) -> None:
        tree = self._beside / "base"
        for name in _DIRECTORIES.split():
            (tree / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (tree / name).symlink_to(f"usr/{name}")
        shutil.copy("/bin/busybox", tree / "usr/bin/busybox")
        for name in _APPLETS.split():
            (tree / "usr/bin" / name).symlink_to("busybox")
        for name in _PROGRAMS:
            program = Path(shutil.which(name) or f"/usr/sbin/{name}").resolve()
            shutil.copy(program, tree / "usr/bin" / name)
            for library in re.findall(r"(/lib\S+) \(", _run("ldd", program).stdout):
                target = tree / library[1:]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, target)
        for name, text in (_FILES | {key: f"#!/bin/sh\n{text}\n" for key, text in _SCRIPTS.items()}).items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755 if name in _SCRIPTS else 0o644)
        self.add("base", tree=tree, fields={"Essential": "yes", "Priority": "required"})

    def add(
        self,
        name: str,
        *,
        version: str = "1",
        tree: Path | None = None,
        files: Mapping[str, str] | None = None,
        scripts: Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> Path:
        """Make a package of *tree*, and of *files* and maintainer's *scripts*; the archive has it once it is published.

        A file whose text begins with ``->`` is a link to what follows.
        """
        tree = tree or self._beside / f"{name}_{version}"
        for path, text in (files or {}).items():
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(text[2:]) if text.startswith("->") else target.write_text(text)
        control = {"Package": name, "Version": version, "Architecture": "amd64", "Maintainer": "tests <t@example.com>"}
        control |= {"Priority": "optional", "Description": "of the tests"} | dict(fields or {})
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text("".join(f"{key}: {value}\n" for key, value in control.items()))
        for script, text in (scripts or {}).items():
            (tree / "DEBIAN" / script).write_text(f"#!/bin/sh\n{text}\n")
            (tree / "DEBIAN" / script).chmod(0o755)
        package = self._pool / f"{name}_{version}_amd64.deb"
        _run("dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", tree, package)
        return package

    def remove(self, name: str) -> None:
        """Remove the packages *name*; the archive has them until it is published."""
        for package in self._pool.glob(f"{name}_*.deb"):
            package.unlink()

    def publish(self, suite: str = SUITE, *, key: str | None = "right", valid: timedelta | None = None) -> None:
        """Write the indices of *suite*, signed with *key*, None for no signature; they are *valid* for so long."""
        entries = []
        for package in sorted(self._pool.glob("*.deb")):
            control = _run("dpkg-deb", "--field", package).stdout
            data = package.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            entries.append(f"{control}Filename: pool/{package.name}\nSize: {len(data)}\nSHA256: {digest}\n")
        text = "\n".join(entries).encode()
        directory = self.directory / "dists" / suite
        (directory / "main/binary-amd64").mkdir(parents=True, exist_ok=True)
        (directory / "main/binary-amd64/Packages").write_bytes(text)
        now = datetime.now(UTC)
        date = "%a, %d %b %Y %H:%M:%S UTC"
        lines = [
            f"Origin: tests\nSuite: {suite}\nCodename: {suite}\nArchitectures: amd64\nComponents: main",
            f"Date: {(now - timedelta(days=3)).strftime(date)}",
            *([f"Valid-Until: {(now + valid).strftime(date)}"] if valid else []),
            f"SHA256:\n {hashlib.sha256(text).hexdigest()} {len(text)} main/binary-amd64/Packages",
        ]
        release, signed = directory / "Release", directory / "InRelease"
        release.write_text("\n".join([*lines, ""]))
        signed.unlink(missing_ok=True)
        if key:
            self._gpg("--local-user", f"{key}@archive.example", "--output", signed, "--clearsign", release)

    def source(self, uri: str, suite: str = SUITE, *, key: str = "right") -> str:
        """Return the line of sources.list for the archive at *uri*, with the key that is believed."""
        return f"deb [signed-by={self.keyring(key)}] {uri} {suite} main"


class Mirror(http.server.ThreadingHTTPServer):
    """A server of an archive that remembers what it was asked for."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(directory)))
        self.asked: list[str] = []
        # The beginnings of paths, and what is sent in their place.
        self.rubbish: dict[str, bytes] = {}

    @property
    def uri(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        for path, data in self.server.rubbish.items():
            if self.path.startswith(path):
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                return
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def served(archive: Archive) -> Iterator[Mirror]:
    """Serve *archive* inside."""
    with Mirror(archive.directory) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def closed_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
