"""What a build can leave in an image, each with the operation of sealing that takes it away.

Plain data: the tests of sealing plant it and find it gone, those of the audit find it while it is there.
"""

from dataclasses import dataclass

MACHINE_ID = b"0123456789abcdef0123456789abcdef"
_ID = MACHINE_ID.decode()
_KERNEL = "6.12.43+deb13-amd64"

PROXY = b"http://builder:hunter2@proxy.build.example:3128"


@dataclass(frozen=True)
class Leftover:
    """A file (or another *kind*: ``directory``, ``link``, ``fifo``) at *path*, with *content* or a link's target.

    *after* is its content when it is sealed, None if it is not there any more.  *renamed* is its path
    then, where that is another.  With *attributes* it is immutable (``i``) or append-only (``a``).
    """

    path: str
    operation: str
    content: bytes = b"a secret of the build machine\n"
    kind: str = "file"
    mode: int = 0o644
    after: bytes | None = None
    renamed: str | None = None
    attributes: str = ""


def _entry(text: str) -> bytes:
    return f"title Linux\nversion {_KERNEL}\n{text}\n".encode()


LEFTOVERS = (
    Leftover("etc/machine-id", "machine-id", MACHINE_ID + b"\n", mode=0o444, after=b"uninitialized\n"),
    Leftover("var/lib/dbus/machine-id", "machine-id", MACHINE_ID + b"\n"),
    # As kernel-install makes them on an EFI system partition, or in /boot
    Leftover(
        f"boot/efi/loader/entries/{_ID}-{_KERNEL}.conf",
        "boot-entries",
        _entry(
            f"machine-id {_ID}\noptions root=UUID=1 ro systemd.machine_id={_ID}\nlinux /{_ID}/{_KERNEL}/linux\n"
            f"initrd /{_ID}/{_KERNEL}/initrd.img"
        ),
        after=_entry(
            f"options root=UUID=1 ro\nlinux /Default/{_KERNEL}/linux\ninitrd /Default/{_KERNEL}/initrd.img"
        ),
        renamed=f"boot/efi/loader/entries/Default-{_KERNEL}.conf",
    ),
    Leftover(
        f"boot/efi/{_ID}/{_KERNEL}/linux",
        "boot-entries",
        b"a kernel",
        after=b"a kernel",
        renamed=f"boot/efi/Default/{_KERNEL}/linux",
    ),
    Leftover(
        f"boot/efi/EFI/Linux/{_ID}-{_KERNEL}.efi",
        "boot-entries",
        b"MZ",
        after=b"MZ",
        renamed=f"boot/efi/EFI/Linux/Default-{_KERNEL}.efi",
    ),
    Leftover(
        "boot/efi/loader/loader.conf",
        "boot-entries",
        b"timeout 1\ndefault " + MACHINE_ID + b"-*\n",
        after=b"timeout 1\ndefault Default-*\n",
    ),
    Leftover(
        "etc/kernel/cmdline",
        "boot-entries",
        b"root=x systemd.machine_id=" + MACHINE_ID + b" quiet\n",
        after=b"root=x quiet\n",
    ),
    Leftover("etc/kernel/entry-token", "boot-entries", MACHINE_ID + b"\n", after=b"Default\n"),
    Leftover("boot/grub2/grubenv", "boot-entries",
        (b"# GRUB Environment Block\nsaved_entry=" + MACHINE_ID + b"-6.12\nboot_success=1\n").ljust(1024, b"#"),
        after=b"# GRUB Environment Block\nsaved_entry=Default-6.12\nboot_success=1\n".ljust(1024, b"#")),
    Leftover(
        f"boot/vmlinuz-0-rescue-{_ID}", "boot-entries", b"r", after=b"r", renamed="boot/vmlinuz-0-rescue-Default"
    ),
    Leftover("etc/ssh/ssh_host_ed25519_key", "ssh-host-keys", b"-----BEGIN OPENSSH PRIVATE KEY-----\n", mode=0o600),
    Leftover("etc/ssh/ssh_host_ed25519_key.pub", "ssh-host-keys", b"ssh-ed25519 AAAA root@build\n"),
    Leftover("etc/ssh/ssh_host_rsa_key", "ssh-host-keys", mode=0o600, attributes="i"),
    Leftover("etc/ssh/ssh_host_rsa_key-cert.pub", "ssh-host-keys"),
    Leftover("etc/dropbear/dropbear_rsa_host_key", "ssh-host-keys", mode=0o600),
    Leftover("var/lib/cloud/instances/i-1234/user-data.txt", "cloud-init", b"#cloud-config\npassword: x\n", mode=0o600),
    Leftover("var/lib/cloud/instance", "cloud-init", b"/var/lib/cloud/instances/i-1234", "link"),
    Leftover("var/lib/cloud/seed/nocloud-net/user-data", "cloud-init"),
    Leftover("var/log/cloud-init.log", "cloud-init"),
    Leftover("var/log/cloud-init-output.log", "cloud-init"),
    Leftover("etc/cloud/cloud-init.disabled", "cloud-init-config", b""),
    Leftover("etc/cloud/ds-identify.cfg", "cloud-init-config", b"policy: enabled\n"),
    Leftover("etc/cloud/cloud.cfg.d/99-installer.cfg", "cloud-init-config", b"datasource_list: [None]\n", mode=0o600),
    Leftover("etc/cloud/cloud.cfg.d/20-disable-cc-dpkg-grub.cfg", "cloud-init-config"),
    Leftover("etc/cloud/cloud.cfg.d/subiquity-disable-cloudinit-networking.cfg", "cloud-init-config"),
    Leftover("etc/cloud/cloud.cfg.d/90-installer-network.cfg", "cloud-init-config"),
    Leftover("etc/cloud/cloud.cfg.d/curtin-preserve-sources.cfg", "cloud-init-config"),
    Leftover("var/lib/systemd/random-seed", "random-seed", bytes(range(256)) * 2, mode=0o600),
    Leftover("var/lib/systemd/credential.secret", "random-seed", mode=0o400, attributes="i"),
    Leftover("var/lib/urandom/random-seed", "random-seed"),
    Leftover("boot/efi/loader/random-seed", "random-seed", bytes(32)),
    Leftover("var/lib/dhcp/dhclient.eth0.leases", "network-leases", b"lease { fixed-address 10.0.2.15; }\n"),
    Leftover("var/lib/dhclient/dhclient--eth0.lease", "network-leases"),
    Leftover("var/lib/dhcpcd/duid", "network-leases"),
    Leftover("var/lib/NetworkManager/internal-1-eth0.lease", "network-leases"),
    Leftover("var/lib/NetworkManager/secret_key", "network-leases", mode=0o600),
    Leftover("var/lib/NetworkManager/seen-bssids", "network-leases"),
    Leftover("var/lib/wicked/lease-eth0-dhcp-ipv4.xml", "network-leases"),
    Leftover("etc/NetworkManager/system-connections/Wired connection 1.nmconnection", "network-profiles", mode=0o600),
    Leftover("etc/NetworkManager/system-connections/enp1s0.nmconnection", "network-profiles", mode=0o600),
    Leftover("etc/sysconfig/network-scripts/ifcfg-eth0", "network-profiles", b"HWADDR=52:54:00:12:34:56\n"),
    Leftover("etc/netplan/00-installer-config.yaml", "network-profiles", b"network: {version: 2}\n", mode=0o600),
    Leftover("etc/netplan/50-cloud-init.yaml", "network-profiles", b"network: {version: 2}\n", mode=0o600),
    Leftover("etc/udev/rules.d/70-persistent-net.rules", "udev-rules", b'ATTR{address}=="52:54:00:12:34:56"\n'),
    Leftover("etc/udev/rules.d/70-persistent-cd.rules", "udev-rules"),
    Leftover("etc/resolv.conf", "resolv-conf", b"nameserver 10.0.2.3\n", attributes="i"),
    Leftover("etc/lvm/devices/system.devices", "lvm-devices", b"IDTYPE=sys_wwid\n", mode=0o600),
    Leftover("var/lib/zypp/AnonymousUniqueId", "zypp-id"),
    Leftover("etc/iscsi/initiatorname.iscsi", "storage-ids", b"InitiatorName=iqn.1993-08.org.debian:01:abc\n"),
    Leftover("etc/nvme/hostid", "storage-ids"),
    Leftover("etc/nvme/hostnqn", "storage-ids"),
    *(
        Leftover(path, "registrations", mode=0o600)
        for path in (
            "etc/pki/consumer/key.pem",
            "etc/pki/consumer/cert.pem",
            "etc/pki/entitlement/123456-key.pem",
            "etc/rhsm/facts/uuid.facts",
            "etc/sysconfig/rhn/systemid",
            "etc/yum.repos.d/redhat.repo",
            "var/lib/rhsm/cache/product_status.json",
            "etc/insights-client/machine-id",
            "etc/insights-client/.registered",
            "var/lib/ubuntu-advantage/private/machine-token.json",
            "etc/apt/auth.conf.d/90ubuntu-advantage",
            "etc/apt/sources.list.d/ubuntu-esm-infra.sources",
            "var/lib/landscape/client/broker.bpickle",
            "etc/salt/pki/minion/minion.pem",
            "etc/salt/minion_id",
            "etc/puppetlabs/puppet/ssl/private_keys/build.example.pem",
            "etc/chef/client.pem",
            "etc/krb5.keytab",
            "var/lib/samba/private/secrets.tdb",
            "var/lib/sss/db/cache_example.ldb",
            "var/lib/tailscale/tailscaled.state",
            "var/lib/zerotier-one/identity.secret",
            "etc/netbird/config.json",
            "etc/kubernetes/kubelet.conf",
            "etc/kubernetes/pki/ca.key",
            "var/lib/kubelet/pki/kubelet-client-2026-11-29-09-00-00.pem",
            "etc/docker/key.json",
            "var/lib/docker/swarm/certificates/swarm-node.key",
            "var/lib/amazon/ssm/Vault/Store/RegistrationKey",
            "var/lib/waagent/ovf-env.xml",
            "var/lib/filebeat/meta.json",
            "var/lib/netdata/cloud.d/private.pem",
            "etc/qualys/hostid",
            "opt/nomad/data/client/secret-id",
            "etc/gitlab-runner/.runner_system_id",
        )
    ),
    Leftover("var/ossec/etc/client.keys", "registrations", b"001 build any 0123456789abcdef\n", mode=0o640, after=b""),
    Leftover(
        "etc/zypp/credentials.d/SCCcredentials", "registrations", b"username=SCC_1\npassword=made-up\n", mode=0o600
    ),
    Leftover("etc/zypp/credentials.d/Basesystem_15_SP6", "registrations", b"username=SCC_1\n", mode=0o600),
    Leftover(
        "etc/zypp/services.d/Basesystem.service",
        "registrations",
        b"[Basesystem]\nurl=https://scc.suse.com/access/services/1?credentials=Basesystem_15_SP6\n",
    ),
    Leftover(
        "etc/zypp/repos.d/Basesystem:Pool.repo",
        "registrations",
        b"[Basesystem:Pool]\nbaseurl=https://updates.suse.com/x?token\nservice=Basesystem\n",
    ),
    Leftover("etc/wireguard/wg0.conf", "registrations", b"[Interface]\nPrivateKey = " + b"A" * 43 + b"=\n", mode=0o600),
    Leftover(
        "root/.docker/config.json",
        "registrations",
        b'{"auths": {"registry.example": {"auth": "Ynl0ZXM6aHVudGVyMg=="}}, "psFormat": "x"}',
        mode=0o600,
        after=b'{\n\t"psFormat": "x"\n}\n',
    ),
    Leftover(
        "home/user/.config/containers/auth.json",
        "registrations",
        b'{"auths": {"registry.example": {"auth": "Ynl0ZXM6aHVudGVyMg=="}}}',
        mode=0o600,
        after=b"{}\n",
    ),
    *(
        Leftover(path, "service-keys", mode=0o640)
        for path in (
            "etc/ssl/private/ssl-cert-snakeoil.key",
            "etc/ssl/certs/ssl-cert-snakeoil.pem",
            "etc/bind/rndc.key",
            "etc/rndc.key",
            "etc/munge/munge.key",
            "etc/pki/tls/private/localhost.key",
            "etc/pki/tls/private/postfix.key",
            "etc/pki/tls/certs/postfix.pem",
            "etc/pki/tls/private/sendmail.key",
            "etc/pki/dovecot/private/dovecot.pem",
            "etc/unbound/unbound_server.key",
            "etc/cups/ssl/build.key",
            "etc/cockpit/ws-certs.d/0-self-signed.key",
            "var/lib/mysql/auto.cnf",
            "var/lib/mysql/server-key.pem",
            "var/lib/fwupd/pki/secret.key",
            "var/lib/dkms/mok.key",
        )
    ),
    Leftover("etc/apt/apt.conf", "proxy", b'Acquire::http::Proxy "' + PROXY + b'";\n'),
    Leftover(
        "etc/apt/apt.conf.d/90curtin-aptproxy",
        "proxy",
        b'Acquire::http::Proxy "' + PROXY + b'";\nAcquire::https::Proxy "' + PROXY + b'";\n',
    ),
    Leftover(
        "etc/apt/apt.conf.d/99own",
        "proxy",
        b'APT::Install-Recommends "false";\nAcquire::HTTP::proxy::mirror.example "DIRECT";\n',
        after=b'APT::Install-Recommends "false";\n',
    ),
    Leftover(
        "etc/dnf/dnf.conf",
        "proxy",
        b"[main]\nproxy=" + PROXY + b"\nproxy_password = hunter2\nbest=True\n",
        after=b"[main]\nbest=True\n",
    ),
    Leftover(
        "etc/yum.repos.d/site.repo",
        "proxy",
        b"[site]\nbaseurl=http://x/\nproxy = " + PROXY + b"\n",
        after=b"[site]\nbaseurl=http://x/\n",
    ),
    Leftover(
        "etc/sysconfig/proxy",
        "proxy",
        b'# about\nPROXY_ENABLED="yes"\nHTTP_PROXY="' + PROXY + b'"\nNO_PROXY="localhost"\n',
        after=b'# about\nPROXY_ENABLED="no"\nHTTP_PROXY=""\nNO_PROXY="localhost"\n',
    ),
    Leftover(
        "etc/environment",
        "proxy",
        b"PATH=/usr/bin:/bin\nhttp_proxy=" + PROXY + b"\nexport HTTPS_PROXY=" + PROXY + b"\n",
        after=b"PATH=/usr/bin:/bin\n",
        attributes="i",
    ),
    Leftover(
        "etc/apt/apt.conf.d/98block",
        "proxy",
        b'# about\nAcquire {\n  Retries "3"; // Proxy { "x"; };\n  HTTP { Proxy "' + PROXY + b'"; };\n'
        b'  https::Proxy { mirror.example "DIRECT"; };\n};\nAcquire::ftp::proxy ' + PROXY + b"; APT::Color 0;\n",
        after=b'# about\nAcquire {\n  Retries "3"; // Proxy { "x"; };\n};\n APT::Color 0;\n',
    ),
    Leftover(
        "etc/apt/apt.conf.d/99block", "proxy", b"Acquire { http { /* ; */ Proxy\n" + b'"' + PROXY + b'"; }; }\n'
    ),
    Leftover("etc/dnf/libdnf5.conf.d/50-proxy.conf", "proxy", b"[main]\nproxy: " + PROXY + b"\n", after=b"[main]\n"),
    Leftover(
        "etc/rhsm/rhsm.conf",
        "proxy",
        b"[server]\nproxy_hostname = proxy.build.example\nproxy_port=3128\nproxy_password =hunter2\nno_proxy =\n",
        after=b"[server]\nproxy_hostname =\nproxy_port=\nproxy_password =\nno_proxy =\n",
    ),
    Leftover(
        "etc/profile.d/proxy.sh",
        "proxy",
        b"export http_proxy=" + PROXY + b"\nHTTPS_PROXY='" + PROXY + b"'; export HTTPS_PROXY\n",
    ),
    Leftover("etc/profile.d/proxy.csh", "proxy", b"setenv http_proxy " + PROXY + b"\n"),
    Leftover(
        "etc/wgetrc",
        "proxy",
        b"# http_proxy = x\nhttps_proxy = " + PROXY + b"\nproxy_password = hunter2\ntries = 3\n",
        after=b"# http_proxy = x\ntries = 3\n",
    ),
    Leftover("home/user/.wgetrc", "proxy", b"http-proxy = " + PROXY + b"\n"),
    Leftover("home/user/.curlrc", "proxy", b"-x " + PROXY + b"\nsilent\n", after=b"silent\n"),
    Leftover("root/.curlrc", "proxy", b'--proxy-user "builder:hunter2"\n', mode=0o600),
    Leftover("etc/systemd/system/snapd.service.d/snap_proxy.conf", "proxy", b"[Service]\n"),
    Leftover(
        "etc/fstab",
        "installation-media",
        b"# /etc/fstab\n# / was on /dev/vda1 during installation\nUUID=1 / ext4 defaults 0 1\n"
        b"# /home was on /dev/vda2 during curtin installation\n/dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0\n",
        after=b"# /etc/fstab\nUUID=1 / ext4 defaults 0 1\n",
    ),
    Leftover(
        "etc/apt/sources.list",
        "installation-media",
        b"#deb cdrom:[Debian 13]/ trixie main\ndeb http://deb.debian.org/debian trixie main\n",
        after=b"deb http://deb.debian.org/debian trixie main\n",
    ),
    Leftover(
        "etc/apt/sources.list.d/cdrom.sources", "installation-media", b"Types: deb\nURIs: file:///cdrom\nSuites: x\n"
    ),
    Leftover("etc/apt/apt.conf.d/00trustcdrom", "installation-media", b'APT::Authentication::TrustCDROM "true";\n'),
    Leftover("var/lib/apt/cdroms.list", "installation-media", b'CD::1-2 "Debian GNU/Linux 13";\n'),
    Leftover(
        "etc/yum.repos.d/dvd.repo",
        "installation-media",
        b"[dvd]\nbaseurl=file:///run/install/repo/BaseOS\n[site]\nbaseurl=http://x/\n",
        after=b"[site]\nbaseurl=http://x/\n",
    ),
    Leftover("etc/zypp/repos.d/openSUSE-16.0-0.repo", "installation-media", b"[0]\nbaseurl=cd:/?devices=/dev/sr0\n"),
    Leftover("root/initial-setup-ks.cfg", "installer-files", b"rootpw --iscrypted $6$x\n", mode=0o600),
    Leftover("root/autoinst.xml", "installer-files", b"<profile/>\n", mode=0o600),
    Leftover("etc/install.inf", "installer-files"),
    Leftover("etc/apt/sources.list.curtin.old", "installer-files"),
    Leftover("var/lib/autoinstall/repository/templates/a", "installer-files"),
    Leftover("var/lib/agama/profile.json", "installer-files", mode=0o600),
    Leftover("var/log/agama/y2start.log", "installer-files"),
    Leftover("var/cache/apt/archives/hello_2.10-3_amd64.deb", "package-caches", b"!<arch>\n" * 1000),
    Leftover("var/cache/apt/pkgcache.bin", "package-caches"),
    Leftover("var/lib/apt/lists/deb.debian.org_debian_dists_trixie_InRelease", "package-caches"),
    Leftover("var/lib/dpkg/status-old", "package-caches"),
    Leftover("var/cache/dnf/fedora-1234/repodata/repomd.xml", "package-caches"),
    Leftover("var/cache/libdnf5/fedora-1234/repodata/repomd.xml", "package-caches"),
    Leftover("var/cache/zypp/solv/oss/solv", "package-caches"),
    Leftover("root/.bash_history", "histories", b"mysql -phunter2\n", mode=0o600),
    Leftover("home/user/.bash_history", "histories", mode=0o600),
    Leftover("home/user/.local/share/fish/fish_history", "histories", mode=0o600, attributes="a"),
    Leftover("srv/people/other/.viminfo", "histories", mode=0o600),
    Leftover("etc/passwd-", "account-backups"),
    Leftover("etc/shadow-", "account-backups", b"root:$6$salt$hash:20000:0:99999:7:::\n", mode=0o640),
    Leftover("etc/gshadow-", "account-backups", mode=0o640),
    Leftover("var/backups/shadow.bak", "account-backups", mode=0o600),
    Leftover("etc/security/opasswd", "account-backups", mode=0o600, after=b""),
    Leftover("var/log/wtmp", "login-records", bytes(384), mode=0o664, after=b""),
    Leftover("var/log/btmp", "login-records", bytes(384), mode=0o660, after=b""),
    Leftover("var/log/lastlog", "login-records", bytes(292), mode=0o664, after=b""),
    Leftover("var/log/btmp.1", "login-records"),
    Leftover("var/log/wtmp.db", "login-records", b"SQLite format 3\0", mode=0o660, after=b""),
    Leftover("var/lib/lastlog/lastlog2.db", "login-records", b"SQLite format 3\0", mode=0o660, after=b""),
    Leftover(f"var/log/journal/{_ID}/system.journal", "journal", b"LPKSHHRH" * 100, mode=0o640),
    Leftover("var/log/syslog", "logs", mode=0o640, after=b"", attributes="a"),
    Leftover("var/log/dpkg.log", "logs", after=b""),
    Leftover("var/log/apt/history.log", "logs", after=b""),
    Leftover("var/log/audit/audit.log", "logs", mode=0o600, after=b""),
    Leftover("var/log/with blanks and ä.log", "logs", after=b""),
    Leftover("var/log/syslog.1", "logs"),
    Leftover("var/log/apt/term.log.1.xz", "logs"),
    Leftover("var/log/messages-20261121", "logs"),
    Leftover("var/crash/_usr_bin_x.0.crash", "crash-reports"),
    Leftover("var/lib/systemd/coredump/core.x.0.zst", "crash-reports"),
    Leftover("tmp/.X0-lock", "temporary-files"),
    Leftover("tmp/a b/c", "temporary-files"),
    Leftover("var/tmp/systemd-private-1/tmp/x", "temporary-files", mode=0o600, attributes="i"),
    Leftover("var/tmp/pipe", "temporary-files", b"", "fifo"),
    Leftover("var/tmp/link", "temporary-files", b"/etc/shadow", "link"),
    Leftover("var/mail/root", "mail", b"From cron\n", mode=0o660, after=b""),
    Leftover("root/dead.letter", "mail", mode=0o600),
)  # fmt: skip

# What stays as it is.  Those of ``kind`` link lead out of where they are: what they lead to stays, too.
SURVIVORS = (
    Leftover("root/.ssh/authorized_keys", "", b"ssh-ed25519 AAAA somebody\n", mode=0o600),
    Leftover("home/user/.ssh/authorized_keys", "", b"ssh-ed25519 BBBB user\n", mode=0o600),
    Leftover("home/user/notes.txt", "", b"data\n"),
    Leftover("home/user/.bashrc", "", b"alias l=ls\n"),
    # What makes keys anew that are taken away.
    *(
        Leftover(path, "", b"", mode=0o755)
        for path in (
            "usr/sbin/make-ssl-cert",
            "usr/sbin/rndc-confgen",
            "usr/bin/openssl",
            "usr/sbin/mungekey",
            "usr/lib/systemd/system/named-setup-rndc.service",
            "usr/lib/systemd/system/httpd-init.service",
            "usr/lib/systemd/system/dovecot-init.service",
            "usr/lib/systemd/system/unbound-keygen.service",
            "usr/sbin/cupsd",
            "usr/bin/cockpit-bridge",
            "usr/libexec/fwupd/fwupd",
            "usr/sbin/dkms",
        )
    ),
    Leftover("var/lib/dkms/mok.pub", "", b"a certificate"),
    Leftover("etc/wireguard/peer.pub", "", b"# another machine's\n" + b"B" * 43 + b"=\n"),
    Leftover("etc/zypp/credentials.d/own", "", b"username=me\n", mode=0o600),
    Leftover("etc/zypp/services.d/own.service", "", b"[own]\nurl=https://example.com/\n"),
    Leftover("home/user/.docker/config.json", "", b'{"psFormat": "x"}'),
    Leftover("etc/passwd", "", b"root:x:0:0::/root:/bin/sh\nodd:x:1:1::/srv/people/other:/bin/sh\nno:x:2:2::/:/x\n"),
    Leftover("etc/shadow", "", b"root:*:20000:0:99999:7:::\n", mode=0o640),
    Leftover("etc/ssh/sshd_config", "", b"PermitRootLogin no\n"),
    Leftover("etc/cloud/cloud.cfg", "", b"users: [default]\n"),
    Leftover("etc/cloud/cloud.cfg.d/05_logging.cfg", "", b"output: {}\n"),
    Leftover("etc/sysconfig/network-scripts/ifcfg-lo", "", b"DEVICE=lo\n"),
    Leftover("etc/netplan/60-own.yaml", "", b"network: {version: 2}\n", mode=0o600),
    Leftover("etc/hostname", "", b"debian\n"),
    Leftover("etc/localtime", "", b"/usr/share/zoneinfo/Etc/UTC", "link"),
    Leftover("etc/apt/apt.conf.d/01autoremove", "", b'APT::NeverAutoRemove { "^firmware-linux.*"; };\n'),
    Leftover("etc/yum.repos.d/fedora.repo", "", b"[fedora]\nproxy=_none_\n"),
    Leftover(
        "etc/apt/apt.conf.d/20own", "", b'# Acquire::http::Proxy "x";\nAcquire::http::ProxyAutoDetect "/bin/x";\n'
    ),
    Leftover("etc/profile.d/own.sh", "", b'if x; then\n    http_proxy=x\nfi\nhttps_proxy="$HTTPS_PROXY"\n'),
    Leftover("boot/vmlinuz-6.12.43+deb13-amd64", "", b"a kernel"),
    Leftover("var/lib/dpkg/status", "", b"Package: hello\n"),
    Leftover("var/lib/wtmpdb/wtmp.db", "", b"../../log/wtmp.db", "link"),
    Leftover("var/log/README", "", b"/usr/share/doc/systemd/README.logs", "link"),
    Leftover("usr/bin/cloud-init", "", b"#!/usr/bin/python3\n", mode=0o755),
    Leftover("var/log/linked", "", b"/etc", "link"),
    Leftover("var/log/journal-elsewhere", "", b"/home/user", "link"),
    Leftover("var/spool/mail", "", b"../../etc/ssh", "link"),
    Leftover("var/crash-link", "", b"/home/user", "link"),
)
