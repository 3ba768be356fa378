"""What the audit finds among the files of a system, and what it lets pass."""

import dataclasses
import fnmatch
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from image_factory.checks import audit, leftovers
from image_factory.checks.audit import Finding
from image_factory.checks.leftovers import Asked
from image_factory.finishing import firstboot

from ..leftovers import LEFTOVERS, Leftover

HASH = "$y$j9T$abcdefghijklmnopqrstu1$0123456789abcdefghijklmnopqrstuvwxyzABCDEFG"
OTHER_HASH = "$6$saltsalt$" + "0123456789abcdef" * 5 + "012345"
KEY = "AAAAC3NzaC1lZDI1NTE5AAAAIB0hBfOoKWrFg2N9D2ZlYz5tZ2NvbW1lbnRjb21tZW50"
OTHER_KEY = "AAAAB3NzaC1yc2EAAAADAQABAAABAQC7" + "x" * 100
ID = "0123456789abcdef0123456789abcdef"
ASKED = Asked(frozenset([HASH.encode()]), frozenset([KEY.encode()]), "answers.cfg")
PRIVATE_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n"


@dataclass(frozen=True)
class Entry:
    path: str
    kind: str


@dataclass
class Directory:
    """The ``Files`` below *top*; *asked* has each question's patterns."""

    top: Path
    asked: list[Sequence[str]] = field(default_factory=list)

    def entries(self, patterns: Sequence[str]) -> list[Entry]:
        self.asked.append(patterns)
        return [Entry(shown(path), kind_of(self.top / path)) for path in self._matching(patterns)]

    def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
        self.asked.append(patterns)
        files = [path for path in self._matching(patterns) if kind_of(self.top / path) == "file"]
        return {
            shown(path): (self.top / path).read_bytes() for path in files if (self.top / path).stat().st_size <= 1 << 20
        }

    def _matching(self, patterns: Sequence[str]) -> Iterator[str]:
        for pattern in patterns:
            assert HELPERS_PATTERN.fullmatch(pattern), pattern
            parent, _, name_pattern = pattern.rpartition("/")
            parts = parent.split("/") if parent else []
            kinds = [kind_of(self.top / "/".join(parts[: length + 1])) for length in range(len(parts))]
            if set(kinds) <= {"directory"}:
                names = fnmatch.filter(sorted(os.listdir(self.top / parent)), name_pattern)
                yield from (f"{parent}/{name}".strip("/") for name in names)


HELPERS_PATTERN = re.compile(
    r"(?:\.?[A-Za-z0-9_@][A-Za-z0-9._@-]{0,254}/){0,24}\.?[A-Za-z0-9_@*][A-Za-z0-9._@*-]{0,254}"
)


def shown(path: str) -> str:
    """Return *path* as the helper prints it."""
    return "".join(character if character.isprintable() else "?" for character in path)


def kind_of(path: Path) -> str | None:
    if path.is_symlink():
        return "link"
    if not path.exists():
        return None
    return "file" if path.is_file() else "directory" if path.is_dir() else "other"


Contents = dict[str, str | bytes]

CLEAN: Contents = {
    "etc/machine-id": "uninitialized\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\ndaemon:*:1:1::/usr/sbin:/usr/sbin/nologin\n"
    "me:x:1000:1000:,,,:/home/me:/bin/bash\nsync:!:4:65534::/:/bin/sync\nnobody:x:65534:65534::/nonexistent:\n",
    "etc/shadow": f"root:{HASH}:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\nme:!:19000:0:99999:7:::\n"
    "sshd:!!:19000::::::\nsystemd-network:!*:19000::::::\n",
    "etc/group": "root:x:0:\nadm:*:4:me\nsudo::27:\n",
    "etc/gshadow": "root:*::\nadm:!::me\nsudo:::\n",
    "etc/ssh/sshd_config": "#HostKey /etc/ssh/ssh_host_rsa_key\nHostKey /etc/ssh/ssh_host_ed25519_key\n"
    "AuthorizedKeysFile .ssh/authorized_keys /etc/ssh/people/%u\nPasswordAuthentication no\n",
    "etc/ssh/moduli": "20200101000000 2 6 100 2047 2 C\n",
    "etc/ssh/ssh_config.d/10-x.conf": "Host *\n",
    "root/.ssh/authorized_keys": f"# mine\n\nssh-ed25519 {KEY} me@example.com\n",
    "home/me/.ssh/authorized_keys": f'no-pty,command="echo a b" ssh-ed25519 {KEY}\n',
    "etc/ssh/people/me": f"ssh-ed25519 {KEY}\n",
    "var/log/apt/.keep": "",
    "var/log/lastlog": bytes(292 * 1001),
    "var/log/wtmp": "",
    "etc/default/grub.d/60-image-factory.cfg": "GRUB_CMDLINE_LINUX=quiet\n",
    "etc/iscsi/initiatorname.iscsi": "# It is made at the first start.\nGenerateName=yes\n",
    "etc/cloud/cloud.cfg.d/05_logging.cfg": "x",
    "boot/vmlinuz-6.1.0-42-cloud-amd64": "x",
    "boot/vmlinuz-0-rescue-Default": "x",
    "boot/grub2/grubenv": "# GRUB Environment Block\nsaved_entry=Default-6.12\n".ljust(1024, "#"),
    "etc/kernel/cmdline": "root=UUID=01234567-89ab-cdef-0123-456789abcdef quiet\n",
    "etc/kernel/entry-token": "Default\n",
    "boot/ostree/x-" + "0123456789abcdef" * 4 + "/vmlinuz": "x",
    "boot/loader/entries/debian-6.1.conf": "x",
    "var/lib/dbus/.keep": "",
    "tmp/.keep": "",
    "var/ossec/etc/client.keys": "",
    "root/.docker/config.json": '{"auths": {}, "psFormat": "x"}',
    "home/me/.docker/config.json": "no JSON",
    "etc/wireguard/wg0.conf": "[Peer]\nPublicKey = x\n",
    "etc/zypp/credentials.d/own": "username=me\n",
    "etc/kubernetes/manifests/.keep": "",
    "etc/systemd/system/image-factory-ssl-cert.service": "x",
}


def fill(top: Path, contents: Contents) -> Directory:
    for name, data in contents.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return Directory(top)


def findings(files: leftovers.Files, asked: Asked = ASKED) -> list[Finding]:
    found = audit.audit_files(files, asked)
    for finding in found:
        assert finding.what.isprintable()
        assert len(finding.what) < 300
        assert HASH not in finding.what
        assert OTHER_HASH not in finding.what
    return found


def checks_of(found: Iterable[Finding]) -> set[str]:
    return {finding.check for finding in found}


def test_clean_system(tmp_path: Path) -> None:
    """It has what was asked for: a password of root, and keys."""
    assert findings(fill(tmp_path, CLEAN)) == []


@pytest.mark.parametrize("contents", [{}, {"etc/machine-id": ""}, {"etc/os-release": "ID=x"}])
def test_system_that_has_little(tmp_path: Path, contents: Contents) -> None:
    assert findings(fill(tmp_path, contents)) == []


def shadow(password: str, user: str = "me") -> str:
    return f"daemon:*:19000:0:99999:7:::\n{user}:{password}:19000:0:99999:7:::\n"


def passwd(password: str, home: str = "/home/me", user: str = "me") -> str:
    return f"{user}:{password}:1000:1000::{home}:/bin/sh\n"


# What is planted, by the check that finds it: a file, its contents.
PLANTED: list[tuple[str, str, str | bytes]] = [
    *(
        ("ssh-host-keys", f"etc/ssh/ssh_host_{kind}key{suffix}", "x")
        for kind in ("rsa_", "dsa_", "ecdsa_", "ed25519_", "xmss_", "")
        for suffix in ("", ".pub")
    ),
    ("ssh-host-keys", "etc/ssh/ssh_host_rsa_key", ""),
    ("ssh-host-keys", "etc/ssh/ssh_host_rsa_key-cert.pub", "x"),
    ("ssh-host-keys", "etc/ssh/ssh_host_rsa_key.bak", PRIVATE_KEY),
    ("ssh-host-keys", "etc/ssh/ssh_host_ed25519_key~", PRIVATE_KEY),
    ("ssh-host-keys", "etc/ssh/mine", PRIVATE_KEY),
    ("ssh-host-keys", "etc/ssh/old.pem", "-----BEGIN RSA PRIVATE KEY-----\nMIIE"),
    ("ssh-host-keys", "usr/local/etc/ssh/ssh_host_rsa_key", "x"),
    ("ssh-host-keys", "usr/local/etc/ssh_host_rsa_key", "x"),
    ("ssh-host-keys", "usr/etc/ssh/ssh_host_rsa_key", "x"),
    ("ssh-host-keys", "etc/ssh_host_key", "x"),
    ("ssh-host-keys", "etc/dropbear/dropbear_rsa_host_key", "x"),
    ("ssh-host-keys", "etc/dropbear/dropbear_ed25519_host_key", "x"),
    ("ssh-host-keys", "etc/dropbear/initramfs/dropbear_ecdsa_host_key", "x"),
    ("ssh-host-keys", "etc/dropbear-initramfs/dropbear_dss_host_key", "x"),
    ("ssh-host-keys", "etc/tinyssh/sshkeydir/.ed25519.sk", "x"),
    ("ssh-host-keys", "etc/tinyssh/sshkeydir/ed25519.pk", "x"),
    ("machine-id", "etc/machine-id", f"{ID}\n"),
    ("machine-id", "etc/machine-id", ID[:31]),
    ("machine-id", "etc/machine-id", "b" * (2 << 20)),
    ("machine-id", "var/lib/dbus/machine-id", f"{ID}\n"),
    ("machine-id", "etc/kernel/entry-token", f"{ID}\n"),
    ("machine-id", "etc/machine-info", f"PRETTY_HOSTNAME=x\nKERNEL_INSTALL_MACHINE_ID={ID}\n"),
    ("machine-id", f"boot/loader/entries/{ID}-6.1.0.conf", "x"),
    ("machine-id", f"boot/efi/loader/entries/{ID}-6.1.0+3.conf", "x"),
    ("machine-id", f"boot/efi/EFI/Linux/{ID}-6.1.0.efi", "MZ"),
    ("machine-id", f"boot/vmlinuz-0-rescue-{ID}", "x"),
    ("machine-id", "boot/grub2/grubenv", f"# GRUB Environment Block\nsaved_entry={ID}-6.1\n###"),
    ("machine-id", "boot/efi/loader/loader.conf", f"timeout 1\ndefault {ID}-*\n"),
    ("machine-id", "etc/kernel/cmdline", f"root=x systemd.machine_id={ID} quiet\n"),
    ("machine-id", f"boot/{ID}/6.1.0/linux", "x"),
    ("machine-id", f"efi/{ID}/6.1.0/linux", "x"),
    ("machine-id", f"var/log/journal/{ID}/.keep", ""),
    ("machine-id", f"var/log/journal/{ID}.other/.keep", ""),
    ("passwords", "etc/shadow", shadow(OTHER_HASH)),
    ("passwords", "etc/shadow", shadow(OTHER_HASH, "root")),
    ("passwords", "etc/shadow", shadow(OTHER_HASH).rstrip("\n")),
    ("passwords", "etc/shadow", shadow(OTHER_HASH).replace("\n", "\r\n")),
    ("passwords", "etc/shadow", shadow(f"  {OTHER_HASH}")),
    ("passwords", "etc/shadow", shadow(f"{HASH}x")),
    ("passwords", "etc/shadow", shadow("rqXexS6ZhobKA")),
    ("passwords", "etc/shadow", shadow("_J9..K0AyUubDrfOgO4s")),
    ("passwords", "etc/shadow", shadow("$1$saltsalt$abcdefghijklmnopqrstuv")),
    ("passwords", "etc/shadow", shadow("x")),
    ("passwords", "etc/shadow", shadow("")),
    ("passwords", "etc/shadow", "me:\n"),
    ("passwords", "etc/shadow", f"me:{OTHER_HASH}"),
    ("passwords", "etc/shadow", shadow(OTHER_HASH, "\x1b[2J\n")),
    ("passwords", "etc/shadow", b"m\xff\xfee:" + OTHER_HASH.encode() + b":::::::\n"),
    ("passwords", "etc/shadow", "a:*:::::::\n" * 200000),
    ("passwords", "etc/shadow-of today", shadow(OTHER_HASH)),
    ("passwords", "etc/shadow-", shadow(OTHER_HASH)),
    ("passwords", "etc/shadow.bak", shadow(OTHER_HASH)),
    ("passwords", "etc/shadow~", shadow(OTHER_HASH)),
    ("passwords", "etc/shadow.dpkg-old", shadow(OTHER_HASH)),
    ("passwords", "etc/shadow+", shadow(OTHER_HASH)),
    ("passwords", "var/backups/shadow.bak", shadow(OTHER_HASH)),
    ("passwords", "var/lib/extrausers/shadow", shadow(OTHER_HASH)),
    ("passwords", "etc/gshadow", f"sudo:{OTHER_HASH}::\n"),
    ("passwords", "etc/gshadow-", f"sudo:{OTHER_HASH}::\n"),
    ("passwords", "var/backups/gshadow.bak", f"sudo:{OTHER_HASH}::\n"),
    ("passwords", "etc/group", f"sudo:{OTHER_HASH}:27:\n"),
    ("passwords", "etc/passwd", passwd("")),
    ("passwords", "etc/passwd", passwd(OTHER_HASH)),
    ("passwords", "etc/passwd", passwd(HASH)),
    ("passwords", "etc/passwd", passwd(f"!{HASH}")),
    ("passwords", "etc/passwd-", passwd(OTHER_HASH)),
    ("passwords", "var/backups/passwd.bak", passwd(OTHER_HASH)),
    ("passwords", "usr/etc/passwd", passwd(OTHER_HASH)),
    ("passwords", "etc/security/opasswd", f"me:1000:1:{OTHER_HASH}\n"),
    ("authorized-keys", "root/.ssh/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "root/.ssh/authorized_keys", f"ssh-rsa {KEY}\nssh-rsa {OTHER_KEY} x"),
    ("authorized-keys", "root/.ssh/authorized_keys", f"ssh-rsa {OTHER_KEY} {KEY}\n"),
    ("authorized-keys", "root/.ssh/authorized_keys", f'command="a {KEY} b" ssh-rsa {OTHER_KEY}\n'),
    ("authorized-keys", "root/.ssh/authorized_keys", f"ssh-ed25519 {KEY[:-4]}\n"),
    ("authorized-keys", "root/.ssh/authorized_keys", "no key that anybody knows\n"),
    ("authorized-keys", "root/.ssh/authorized_keys", f"ssh-rsa {KEY}\n" * 20000),
    ("authorized-keys", "root/.ssh/authorized_keys2", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "root/.ssh/authorized_keys.old", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "home/me/.ssh/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "home/gone/.ssh/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "var/home/you/.ssh/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "var/roothome/.ssh/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "home/m\u00fcller/.ssh/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "nonexistent/.ssh/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", ".ssh/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "etc/skel/.ssh/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "etc/ssh/people/root", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "etc/ssh/authorized_keys.d/me", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "etc/ssh/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "etc/dropbear/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("authorized-keys", "etc/dropbear/initramfs/authorized_keys", f"ssh-rsa {OTHER_KEY}\n"),
    ("answer-file", "root/anaconda-ks.cfg", "rootpw --lock\n"),
    ("answer-file", "root/original-ks.cfg", "rootpw --lock\n"),
    ("answer-file", "preseed.cfg", "d-i x\n"),
    ("answer-file", "answers.cfg", "d-i x\n"),
    ("answer-file", "tmp/answers.cfg", "d-i x\n"),
    ("answer-file", "home/me/answers.cfg", "d-i x\n"),
    ("answer-file", "var/log/answers.cfg", "d-i x\n"),
    ("answer-file", "var/log/installer/autoinstall-user-data", "x"),
    ("answer-file", "var/log/installer/cdebconf/questions.dat", "x"),
    ("answer-file", "var/adm/autoinstall/cache/installedSystem.xml", "x"),
    ("answer-file", "var/lib/YaST2/autoinst.xml", "x"),
    ("answer-file", "autoinst.json", "{}"),
    ("answer-file", "var/lib/cloud/seed/nocloud/user-data", "#cloud-config\n"),
    ("answer-file", "etc/cloud/cloud.cfg.d/99-installer.cfg", "datasource_list: [None]\n"),
    ("logs", "var/log/installer/syslog", "x"),
    ("logs", "var/log/installer/initial-status.gz", b"\x1f\x8b"),
    ("logs", "var/log/anaconda/anaconda.log", "x"),
    ("logs", "var/log/YaST2/y2log", "x"),
    ("logs", "var/log/agama-installation/logs/agama.log", "x"),
    ("logs", "var/log/apt/history.log", "x"),
    ("logs", "var/log/dpkg.log", "x"),
    ("logs", "var/log/zypp/history", "x"),
    ("logs", "var/log/dnf5.log.1", "x"),
    ("logs", "var/log/cloud-init-output.log", "x"),
    ("logs", "var/log/wtmp", bytes(4) + b"x"),
    ("logs", f"var/log/journal/{ID}/system.journal", "x"),
    ("logs", "root/install.log.syslog", "x"),
    ("logs", "root/ks-post.log", "x"),
    ("logs", "tmp/build.log", "x"),
    ("identity", "var/lib/systemd/random-seed", b"x" * 512),
    ("identity", "var/lib/systemd/credential.secret", "x"),
    ("identity", "var/lib/NetworkManager/secret_key", "x"),
    ("identity", "var/lib/NetworkManager/internal-1-eth0.lease", "x"),
    ("identity", "var/lib/dhcp/dhclient.eth0.leases", "x"),
    ("identity", "var/lib/cloud/instances/i-1/user-data.txt", "x"),
    ("identity", "var/lib/zypp/AnonymousUniqueId", "x"),
    ("identity", "etc/iscsi/initiatorname.iscsi", "InitiatorName=iqn.1993-08.org.debian:01:ab\n"),
    ("identity", "boot/efi/loader/random-seed", "x" * 32),
    ("identity", "etc/nvme/hostid", "x"),
    ("identity", "etc/lvm/devices/system.devices", "IDTYPE=sys_wwid"),
    ("identity", "etc/udev/rules.d/70-persistent-net.rules", "x"),
    ("identity", "etc/ssl/private/ssl-cert-snakeoil.key", "x"),
    ("identity", "etc/munge/munge.key", b"\x01" * 128),
    ("registrations", "etc/pki/entitlement/1-key.pem", "x"),
    ("registrations", "etc/krb5.keytab", b"\x05\x02"),
    ("registrations", "var/ossec/etc/client.keys", "001 a any b\n"),
    ("registrations", "home/me/.docker/config.json", '{"auths": {"x": {"auth": "Yg=="}}}'),
    ("registrations", "root/.config/containers/auth.json", '{"auths": {"x": {}}}'),
    ("registrations", "etc/wireguard/wg0.conf", f"[Interface]\nprivatekey={'A' * 43}=\n"),
    ("registrations", "etc/wireguard/key", f"{'A' * 43}=\n"),
    ("leftovers", "image-factory.3f2a/x", "x"),
    ("leftovers", "tmp/.image-factory-Debian-13-server", "x"),
    ("leftovers", "root/image-factory-sudo-helper", "x"),
    ("leftovers", "etc/systemd/system/image-factory-test-boot.service", "x"),
    ("leftovers", "home/me/image_factory.log", "x"),
    ("leftovers", "var/lib/image-factory/report", "x"),
]


def test_there_are_enough_kinds() -> None:
    assert len({(check, name) for check, name, _ in PLANTED}) >= 100
    # What the others look for takes a whole tree: test_keys and test_assembly_mounted plant it.
    with_files = {check.name for check in audit.CHECKS} - {"proxy-password", "private-keys", "copies", "task-secrets"}
    assert {check for check, _, _ in PLANTED} == with_files


@pytest.mark.parametrize(("check", "name", "data"), PLANTED, ids=lambda value: str(value)[:40].encode("unicode_escape"))
def test_what_is_planted_is_found(tmp_path: Path, check: str, name: str, data: str | bytes) -> None:
    found = findings(fill(tmp_path, CLEAN | {name: data}))
    assert check in checks_of(found)
    directory = name.split("/")[0]
    assert any(directory in finding.what for finding in found if finding.check == check)
    # Of what is in the logs the journal's directory is named by a machine-id, and answer files may lie there.
    assert checks_of(found) <= {check, "logs", "machine-id"} or check == "logs"


# What of sealing's leftovers has neither identity nor secret; proxies are found by their password, as bytes.
NOT_LOOKED_FOR = (
    "network-profiles", "resolv-conf", "proxy", "installation-media", "package-caches", "histories", "login-records",
    "crash-reports", "temporary-files", "mail", "cloud-init.disabled", "ds-identify.cfg", "20-disable", "subiquity",
    "90-installer", "curtin", "loader/random-seed", "redhat.repo", "var/lib/rhsm", ".registered", "ubuntu-esm",
    "Basesystem", "passwd-", "gshadow-", "shadow.bak",
)  # fmt: skip
OF_SEALING = [
    leftover
    for leftover in LEFTOVERS
    if leftover.kind == "file" and not any(word in f"{leftover.operation} {leftover.path}" for word in NOT_LOOKED_FOR)
]


def test_there_are_enough_kinds_of_sealing() -> None:
    assert len(OF_SEALING) >= 40


@pytest.mark.parametrize("leftover", OF_SEALING, ids=lambda leftover: leftover.path)
def test_what_sealing_would_take_away_is_found(tmp_path: Path, leftover: Leftover) -> None:
    found = findings(fill(tmp_path, CLEAN | {leftover.path: leftover.content}))
    assert any(f"/{leftover.path.split('/')[0]}" in finding.what for finding in found)


LINKED = [
    ("passwords", "etc/shadow"),
    ("passwords", "etc/passwd"),
    ("authorized-keys", "root/.ssh/authorized_keys"),
]


@pytest.mark.parametrize(("check", "name"), LINKED)
@pytest.mark.parametrize("kind", ["link", "pipe", "dangling"])
def test_what_is_behind_a_link_is_not_trusted(tmp_path: Path, check: str, name: str, kind: str) -> None:
    files = fill(tmp_path, CLEAN)
    path = tmp_path / name
    path.rename(path.with_name("elsewhere"))
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("elsewhere" if kind == "link" else "/nowhere")
    [finding] = findings(files)
    assert finding.check == check
    assert finding.what.startswith(f"/{name} is no regular file")


def test_links_that_belong_there(tmp_path: Path) -> None:
    files = fill(tmp_path, CLEAN)
    (tmp_path / "var/lib/dbus/machine-id").symlink_to("/etc/machine-id")
    (tmp_path / "var/log/README").symlink_to("../../usr/share/doc/systemd/README.logs")
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "etc/ssh/authorized_keys.d").mkdir()
    assert findings(files) == []


@pytest.mark.parametrize(
    ("asked", "contents"),
    [
        (Asked(), {"etc/shadow": shadow(HASH)}),
        (Asked(frozenset([OTHER_HASH.encode()])), {"etc/shadow": shadow(HASH)}),
        (Asked(), {"root/.ssh/authorized_keys": f"ssh-ed25519 {KEY}\n"}),
    ],
)
def test_what_is_asked_for_passes_only_then(tmp_path: Path, asked: Asked, contents: Contents) -> None:
    files = fill(tmp_path, contents)
    assert findings(files) == []
    assert len(findings(files, asked)) == 1


def test_first_boot_scripts_pass_and_nothing_beside_them(tmp_path: Path) -> None:
    own = dict.fromkeys(firstboot.unit_paths())
    own |= {f"{firstboot.DIRECTORY}/{name}": None for name in ("01-a.sh", "02-b.sh")}
    files = fill(tmp_path, CLEAN | dict.fromkeys(own, "x"))
    asked = dataclasses.replace(ASKED, own=frozenset([*own, "var/lib/image-factory", firstboot.DIRECTORY]))
    assert findings(files, asked) == []
    # Those of an image that was made of another one.
    assert [finding.what for finding in findings(files, ASKED)] == [
        "/etc/systemd/system/image-factory-first-boot.service is a leftover of image-factory",
        "/var/lib/image-factory is a leftover of image-factory",
    ]
    for path in ("var/lib/image-factory/x", f"{firstboot.DIRECTORY}/03-c.sh", f"{firstboot.DIRECTORY}/.01-a.sh"):
        (tmp_path / path).touch()
        [finding] = findings(files, asked)
        assert finding.what == f"/{path} is a leftover of image-factory"
        (tmp_path / path).unlink()


def test_keys_that_sshd_is_told_of(tmp_path: Path) -> None:
    config = (
        'HOSTKEY="/var/x/key"\nhostcertificate /var/x/cert.pub\nAuthorizedKeysFile none /var/x/%u/keys%% %h/k own/k\n'
    )
    contents: Contents = {
        "etc/ssh/sshd_config.d/50-x.conf": config,
        "var/x/key": "x",
        "var/x/cert.pub": "x",
        "var/x/me/keys%": f"ssh-rsa {OTHER_KEY}\n",
        "home/me/k": f"ssh-rsa {OTHER_KEY}\n",
        "home/me/own/k": f"ssh-rsa {OTHER_KEY}\nssh-rsa {OTHER_KEY}\n",
    }
    assert {finding.what for finding in findings(fill(tmp_path, CLEAN | contents))} == {
        "/var/x/key is an ssh host key",
        "/var/x/cert.pub is an ssh host key",
        "/home/me/own/k has 2 keys that nobody asked for",
        "/home/me/k has 1 key that nobody asked for",
        "/var/x/me/keys% has 1 key that nobody asked for",
    }


def test_checks_that_are_left_out(tmp_path: Path) -> None:
    files = fill(tmp_path, CLEAN | {"var/log/dpkg.log": "x", "etc/machine-id": ID})
    assert checks_of(findings(files)) == {"logs", "machine-id"}
    checks = [check for check in audit.CHECKS if check.name != "logs"]
    assert checks_of(audit.audit_files(files, ASKED, checks)) == {"machine-id"}


# A guest that means no good.


def many_logs(top: Path) -> None:
    for number in range(1500):
        (top / f"var/log/x{number}").write_text("x")


def many_names(top: Path) -> None:
    for number in range(3000):
        (top / "etc/ssh" / f"ssh_host_{number}_key{'x' * 200}").touch()


def many_users(top: Path) -> None:
    (top / "etc/passwd").write_text("".join(passwd("x", f"/home/u{number}") for number in range(20000)))


def deep(top: Path) -> None:
    path = top / "var/log"
    for _ in range(200):
        path /= "x"
        path.mkdir()
    (path / "log").write_text("x")
    (top / "var/log/y").write_text("x")


def odd_names(top: Path) -> None:
    (top / "etc/ssh/ssh_host_a_key\x1b[2J\n\u202e").touch()
    (top / os.fsdecode(b"etc/ssh/ssh_host_b_key\xff\xfe")).touch()
    (top / os.fsdecode(b"home/\xff")).mkdir()
    (top / "home/a\nb").mkdir()


def odd_files(top: Path) -> None:
    (top / "etc/passwd").write_bytes(os.urandom(100_000) + b"\na:x:1:1::/../../etc:\nb:x::::\n:::::::::\n::x::::\n")
    (top / "etc/ssh/sshd_config").write_bytes(b"HostKey\nHostKey ../../x\nHostKey " + b"\xff/" * 3000 + b"\n")


@pytest.mark.parametrize("spoil", [many_logs, many_names, many_users, deep, odd_names, odd_files])
def test_hostile_guest(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Something is found, in time, and with a limit."""
    files = fill(tmp_path, CLEAN)
    spoil(tmp_path)
    start = time.monotonic()
    found = findings(files)
    assert 1 <= len(found) <= 3 * leftovers.MOST
    assert time.monotonic() - start < 60
    assert len(files.asked) < 1000


def test_names_that_are_paths() -> None:
    """A filesystem that is damaged can have any."""

    class Damaged:
        def entries(self, patterns: Sequence[str]) -> list[Entry]:
            names = ["..", ".", "", "a/../../b", "etc", "ssh_host_a/b_key", "passwd", "shadow"]
            kinds = ["directory", "file", "link", "x"]
            return [Entry(pattern.replace("*", name), kind) for pattern in patterns for name in names for kind in kinds]

        def read(self, patterns: Sequence[str]) -> dict[str, bytes]:
            assert not {"..", ".", ""} & set("/".join(patterns).split("/"))
            return {}

    findings(Damaged())


def test_questions_are_few(tmp_path: Path) -> None:
    files = fill(tmp_path, CLEAN)
    findings(files)
    assert len(files.asked) < 40


@pytest.mark.parametrize("maker", [None, "usr/sbin/cupsd", "usr/bin/cupsd"])
def test_keys_that_sealing_leaves(tmp_path: Path, maker: str | None) -> None:
    """A key goes only where another is made: why it is still there is said."""
    contents: Contents = {"etc/cups/ssl/build.key": "x"} | ({maker: "x"} if maker else {})
    [found] = findings(fill(tmp_path, contents))
    told = "/etc/cups/ssl/build.key belongs to one machine"
    assert found == Finding("identity", told if maker else f"{told}, and nothing here makes another")
