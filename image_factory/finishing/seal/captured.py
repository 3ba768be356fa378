"""The operations of sealing for a system that was lived in, which a captured one is; see ``operations``."""

import re
from collections.abc import Callable, Iterable
from functools import partial

import yaml

from ...system.registrations import is_of
from .actions import Actions, System, is_home
from .operations import Operation

_ROOT = "etc/shadow", "etc/gshadow"

# Below a home directory: keys, and what services know the user by.
_OF_USERS = (
    *(f".ssh/{name}" for name in ("id_*", "identity*", "authorized_keys*", "known_hosts*", "*.pem", "*.key")),
    *(f".gnupg/{name}" for name in ("private-keys-v1.d/*", "secring.gpg*", "random_seed", "S.*")),
    ".aws/credentials", ".aws/sso/cache/*", ".azure/*", ".config/gcloud/*", ".kube/config", ".kube/cache/*",
    ".config/gh/hosts.yml", ".config/glab-cli/config.yml", ".config/rclone/rclone.conf", ".config/doctl/config.yaml",
    ".git-credentials", ".config/git/credentials", ".netrc", ".authinfo*", ".pgpass", ".my.cnf", ".mylogin.cnf",
    ".npmrc", ".pypirc", ".gem/credentials", ".cargo/credentials*", ".m2/settings*.xml", ".s3cfg", ".smbcredentials",
    ".vault-token", ".terraform.d/credentials.tfrc.json", ".ansible/galaxy_token", ".pki/nssdb/*", ".krb5/*",
    ".k5login",
    ".local/share/keyrings/*", ".acme.sh/account.conf", ".acme.sh/ca/*", ".config/op/*", ".password-store/*",
    ".mozilla/*", ".thunderbird/*", ".config/google-chrome/*", ".config/chromium/*", ".ecryptfs/*",
)  # fmt: skip
_TRACES_OF_USERS = (
    ".cache/*", ".local/share/Trash/*", ".local/share/recently-used.xbel", ".local/share/containers/*",
    ".local/state/*", ".thumbnails/*", ".recently-used", ".xsession-errors*", ".ICEauthority", ".Xauthority",
    ".sudo_as*",
    "Maildir/*", "mail/*", "mbox", ".forward", ".procmail/*",
)  # fmt: skip


def _in_homes(names: Iterable[str], system: System) -> Actions:
    return Actions(remove=[f"{home}/{name}" for home in filter(is_home, system.homes) for name in names])


def _lock_passwords(system: System) -> Actions:
    """Lock the accounts that have a password, or need none."""
    actions = Actions()
    for path in _ROOT:
        lines = system.files.get(path, b"").split(b"\n")
        _rewrite(actions, system, path, b"\n".join(map(_locked, lines)))
    return actions


def _locked(line: bytes) -> bytes:
    fields = line.split(b":")
    if len(fields) > 3 and not fields[1].startswith((b"!", b"*")):
        fields[1] = b"!"
    return b":".join(fields)


def _rewrite(actions: Actions, system: System, path: str, data: bytes) -> None:
    if path in system.files and data != system.files[path]:
        actions.write[path] = data


def _forget_name(system: System) -> Actions:
    """Take the machine's name out of the files that have it."""
    actions = Actions()
    name = system.files.get("etc/hostname", b"").strip()
    _rewrite(actions, system, "etc/hostname", b"localhost\n")
    _rewrite(actions, system, "etc/mailname", b"localhost\n")
    if name and name != b"localhost":
        word = re.compile(rb"(?<![\w-])" + re.escape(name.partition(b".")[0]) + rb"(?![\w-])")
        lines = system.files.get("etc/hosts", b"").split(b"\n")
        _rewrite(actions, system, "etc/hosts", b"\n".join(line for line in lines if not word.search(line)))
    return actions


# Addresses

_INTERFACES = ("etc/network/interfaces", "etc/network/interfaces.d/*")
_STATIC = re.compile(rb"^(\s*iface\s+\S+\s+)(inet6?)(\s+)static\s*$")
_OF_STATIC = re.compile(
    rb"\s+(?:address|netmask|gateway|broadcast|network|metric|pointopoint|hwaddress|dns-[a-z]+|up\s+ip|post-up\s+ip)\s.*"
)
_ADDRESSES_OF_NETPLAN = ("addresses", "gateway4", "gateway6", "routes", "routing-policy", "nameservers", "macaddress")
_NETWORKD = re.compile(rb"\s*(?:Address|Gateway|DNS|Domains|MACAddress|NTP|DHCP)\s*=.*", re.IGNORECASE)
_OF_MACHINE = re.compile(rb"\s*\[(?:Address|Route|Neighbor|RoutingPolicyRule)\]\s*", re.IGNORECASE)


def _ask_for_addresses(system: System) -> Actions:
    """Have the network's own configuration ask for the addresses that it has been given by hand."""
    actions = Actions()
    forms: list[tuple[tuple[str, ...], Callable[[bytes], bytes]]] = [
        (_INTERFACES, _without_static),
        (("etc/netplan/*",), _netplan_without_addresses),
        (("etc/systemd/network/*",), _networkd_without_addresses),
        (("etc/dhcpcd.conf",), lambda data: re.sub(rb"(?m)^\s*static\s.*\n?", b"", data)),
    ]
    for patterns, change in forms:
        for path, data in system.files.items():
            if is_of(path, patterns):
                _rewrite(actions, system, path, change(data))
    return actions


def _without_static(data: bytes) -> bytes:
    """Return *data*, of interfaces(5), with what asks for addresses in place of them."""
    lines, is_static = [], False
    for line in data.split(b"\n"):
        match = _STATIC.match(line)
        if match:
            is_static = True
            line = match[1] + match[2] + match[3] + (b"auto" if match[2] == b"inet6" else b"dhcp")
        elif re.match(rb"[^\s#]", line):
            is_static = False
        elif is_static and _OF_STATIC.fullmatch(line):
            continue
        lines.append(line)
    return b"\n".join(lines)


def _netplan_without_addresses(data: bytes) -> bytes:
    """Return *data*, a file of netplan, with DHCP in the place of addresses; what is no such file stays."""
    try:
        found = yaml.safe_load(data)
        kinds = [kind for kind in found["network"].values() if isinstance(kind, dict)]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        return data
    changed = False
    for device in (device for kind in kinds for device in kind.values() if isinstance(device, dict)):
        had = [key for key in _ADDRESSES_OF_NETPLAN if device.pop(key, None) is not None]
        match = device.get("match")
        if isinstance(match, dict) and match.pop("macaddress", None) is not None:
            # What is left without a condition matches no more than before.
            had.append("match")
            match.setdefault("name", "e*")
        if had:
            changed = True
            device["dhcp4"] = True
    return yaml.safe_dump(found).encode() if changed else data


def _networkd_without_addresses(data: bytes) -> bytes:
    """Return *data*, a file of systemd-networkd, with DHCP in the place of addresses."""
    if not re.search(rb"(?im)^\s*Address\s*=", data):
        return data
    lines, goes = [], False
    for line in data.split(b"\n"):
        if re.match(rb"\s*\[", line):
            goes = bool(_OF_MACHINE.fullmatch(line))
        if goes or _NETWORKD.fullmatch(line):
            continue
        lines.append(line)
        if re.fullmatch(rb"\s*\[Network\]\s*", line, re.IGNORECASE):
            lines.append(b"DHCP=yes")
    return b"\n".join(lines).rstrip(b"\n") + b"\n"


def _forget_disks(system: System) -> Actions:
    """Take what names disks of the machine, and what opens them."""
    actions = Actions()
    for path in ("etc/mdadm/mdadm.conf", "etc/mdadm.conf"):
        text = re.sub(rb"(?m)^ARRAY\s.*\n?", b"", system.files.get(path, b""))
        _rewrite(actions, system, path, text)
    return actions


def _empty_crontabs(system: System) -> Actions:
    """Remove the users' crontabs, wherever the distribution has them."""
    files = [path for path, kind in system.kinds.items() if kind == "file" and is_of(path, ["var/spool/cron/*"])]
    names = [path for path in files if re.fullmatch(r"[\w@][\w.@+~-]*", path.rpartition("/")[2])]
    return Actions(remove=names)


_POSTFIX = ("active", "bounce", "corrupt", "defer", "deferred", "hold", "incoming", "maildrop", "saved", "trace")
_DATABASES = (
    "mysql", "mysql-files", "mysql-keyring", "postgresql", "pgsql", "mongodb", "mongo", "redis", "valkey", "ldap",
    "influxdb", "elasticsearch", "opensearch", "cassandra", "couchdb", "neo4j", "prometheus", "grafana", "rabbitmq",
    "clickhouse", "etcd", "minio", "vault", "krb5kdc", "zookeeper", "kafka",
)  # fmt: skip
_CONTAINERS = (
    "docker", "containerd", "containers", "kubelet", "rancher", "cni", "lxc", "lxd", "incus", "machines", "portables",
    "libvirt/images", "libvirt/qemu", "buildah",
)  # fmt: skip

CAPTURED = (
    Operation(
        "passwords",
        "Accounts that have a password, or need none, are locked, and so are groups: only keys, and what cloud-init or "
        "a first boot sets, open a clone.",
        read=_ROOT,
        plan=_lock_passwords,
    ),
    Operation(
        "user-keys",
        "Keys, passwords and tokens go from the home directories: those of ssh with what it knows and lets in, GnuPG, "
        "clouds, Kubernetes, git, package registries, databases, mail, browsers and keyrings.",
        plan=partial(_in_homes, _OF_USERS),
    ),
    Operation(
        "user-traces",
        "Caches, waste baskets, mail, containers and traces of sessions go from the home directories.",
        plan=partial(_in_homes, _TRACES_OF_USERS),
    ),
    Operation(
        "tls-keys",
        "Private keys and certificates of TLS go where distributions and ACME's clients keep them: certbot, acme.sh, "
        "lego, dehydrated, Caddy, Traefik. What serves with them needs its own in each clone.",
        removed=(
            "etc/ssl/private/*",
            "etc/pki/tls/private/*",
            *(f"etc/letsencrypt/{name}/*" for name in ("accounts", "archive", "csr", "keys", "live", "renewal")),
            "etc/acme/*",
            "etc/lego/*",
            "etc/dehydrated/accounts/*",
            "etc/dehydrated/certs/*",
            *(
                f"var/lib/{name}/*"
                for name in ("acme", "dehydrated", "lego", "caddy", "traefik", "certmonger/requests")
            ),
            "etc/openvpn/*.key",
            "etc/openvpn/client/*.key",
            "etc/openvpn/server/*.key",
            "etc/ipsec.d/private/*",
            "etc/swanctl/private/*",
            "etc/strongswan/ipsec.d/private/*",
        ),
        emptied=("etc/ipsec.secrets",),
    ),
    Operation(
        "domain",
        "The machine leaves its domain, beside **registrations**: IPA's client, SSSD's configuration, Samba's and "
        "winbind's databases go.",
        removed=(
            "etc/ipa/default.conf",
            "etc/ipa/nssdb/*",
            "var/lib/ipa-client/pki/*",
            "var/lib/ipa-client/sysrestore/*",
            "etc/sssd/sssd.conf",
            "etc/sssd/conf.d/*",
            "etc/sssd/pki/*",
            "var/lib/samba/private/*",
            "var/lib/samba/*.tdb",
            "etc/samba/smbpasswd",
            "etc/krb5kdc/stash",
        ),
    ),
    Operation(
        "agents",
        "What agents of monitoring, of backups, of security and of remote access know the machine by goes, beside "
        "**registrations**.",
        removed=(
            "etc/datadog-agent/auth_token",
            "opt/Elastic/Agent/fleet.enc*",
            "var/lib/elastic-agent/*",
            "etc/zabbix/*.psk",
            "etc/zabbix/*.key",
            "var/lib/cmk-agent/*",
            "opt/CrowdStrike/falconstore*",
            "var/osquery/osquery.db",
            "opt/orbit/*",
            "var/lib/newrelic-infra/*",
            "etc/teamviewer/global.conf",
            "var/lib/anydesk/*",
            "etc/anydesk/*.conf",
            "etc/duo/*.conf",
            "etc/bacula/bconsole.conf",
            "etc/cloudflared/*",
            "etc/vector/keys/*",
            "var/lib/teleport/*",
            "var/lib/fluent-bit/*",
            "var/lib/google/*",
            "etc/machine-info",
            "etc/hostid",
        ),
    ),
    Operation(
        "containers",
        "Containers and virtual machines go, with their images and volumes: those of Docker, containerd, Podman, "
        "Kubernetes, LXC, LXD, Incus, systemd-machined and libvirt.",
        removed=tuple(f"var/lib/{name}/*" for name in _CONTAINERS),
    ),
    Operation(
        "databases",
        "What databases and queues have in */var/lib* goes; a service that makes none by itself needs one in each "
        "clone.",
        removed=tuple(f"var/lib/{name}/*" for name in _DATABASES),
    ),
    Operation(
        "cron-spools",
        "Users' crontabs go, and what at and batch have waiting.",
        removed=(
            "var/spool/cron/crontabs/*",
            "var/spool/cron/tabs/*",
            "var/spool/cron/atjobs/*",
            "var/spool/at/*",
            "var/spool/atjobs/*",
            "var/spool/anacron/*",
        ),
        looked_at=("var/spool/cron/*",),
        plan=_empty_crontabs,
    ),
    Operation(
        "queues",
        "Mail that waits goes from Postfix's queues, and so do jobs of printers.",
        removed=(*(f"var/spool/postfix/{name}/*" for name in _POSTFIX), "var/spool/cups/*", "var/lib/postfix/*"),
    ),
    Operation(
        "host-name",
        "The machine's name becomes *localhost* in */etc/hostname* and */etc/mailname*, and its lines go from "
        "*/etc/hosts*.",
        read=("etc/hostname", "etc/hosts", "etc/mailname"),
        plan=_forget_name,
    ),
    Operation(
        "static-addresses",
        "Addresses that were given by hand go, with their gateways and name servers: *interfaces*, netplan and "
        "systemd-networkd ask DHCP in their place.",
        read=(*_INTERFACES, "etc/netplan/*", "etc/systemd/network/*", "etc/dhcpcd.conf"),
        plan=_ask_for_addresses,
    ),
    Operation(
        "swap-files",
        "Files that are swapped to go, as they have memory of the machine.",
        removed=(
            "swapfile*",
            "swap.img",
            "swap",
            "swap/*",
            "var/swap*",
            "var/cache/swap/*",
            "var/lib/swap/*",
            "mnt/swap*",
        ),
    ),
    Operation(
        "disk-keys",
        "What opens encrypted disks of the machine, and what names its disks, goes: key files where distributions keep "
        "them, arrays of *mdadm.conf*, bindings of multipath, backups of LVM, the caches of ZFS, nodes of iSCSI.",
        removed=(
            "etc/cryptsetup-keys.d/*",
            "etc/keys/*",
            "etc/luks-keys/*",
            "crypto_keyfile.bin",
            "boot/crypto_keyfile.bin",
            "etc/multipath/bindings",
            "etc/multipath/wwids",
            "etc/lvm/archive/*",
            "etc/lvm/backup/*",
            "etc/zfs/zpool.cache",
            "etc/zfs/zfs-list.cache/*",
            "etc/iscsi/nodes/*",
            "etc/iscsi/send_targets/*",
            "var/lib/iscsi/nodes/*",
            "var/lib/iscsi/send_targets/*",
        ),
        emptied=("etc/crypttab",),
        read=("etc/mdadm/mdadm.conf", "etc/mdadm.conf"),
        plan=_forget_disks,
    ),
    Operation(
        "usage",
        "What services have noted of the machine's life goes: leases that it has given as a server, bans, accounting, "
        "statistics, indices of files, paired devices.",
        removed=(
            "var/lib/dhcp/dhcpd*",
            "var/lib/kea/*",
            "var/lib/misc/dnsmasq.leases",
            "var/lib/fail2ban/*",
            "var/account/*",
            "var/lib/sysstat/*",
            "var/lib/plocate/*.db",
            "var/lib/mlocate/*.db",
            "var/lib/bluetooth/*",
            "var/lib/upower/*",
            "var/lib/smartmontools/*",
            "var/lib/AccountsService/users/*",
            "var/lib/logrotate/status",
            "var/lib/systemd/timers/*",
            "var/lib/systemd/linger/*",
            "var/lib/sudo/lectured/*",
            "var/db/sudo/lectured/*",
        ),
    ),
)
