"""Where an installed system keeps what makes it known to others, and keys that were made for it alone.

Sealing takes both away and the audit looks for both.  Patterns are paths below the root, whose last part may have
``*``.
"""

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_ROLES = ("admin", "super-admin", "controller-manager", "scheduler", "kubelet", "bootstrap-kubelet")
SUSE_CREDENTIALS = ("etc/zypp/credentials.d/SCCcredentials", "etc/zypp/credentials.d/NCCcredentials")
SUSE_SOURCES = ("etc/zypp/services.d/*.service", "etc/zypp/repos.d/*.repo")
_SUSE_SERVICE = re.compile(rb"^[ \t]*(?:url|baseurl)\s*=.*[?&]credentials=([^&\s]+)", re.M | re.I)
_SUSE_NAME = re.compile(rb"^[ \t]*\[([^\]\s]+)\]", re.M)
_BEATS = ("auditbeat", "filebeat", "heartbeat", "metricbeat", "packetbeat")


@dataclass(frozen=True)
class Registration:
    """A system that is known to *service*: what at *secret* is there must not be cloned.

    *more* goes with it, as it is of no use without, or is made anew; what is *emptied* has to stay as a file.
    """

    service: str
    secret: tuple[str, ...]
    more: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()


# Each service takes a system without these for one that was never registered.
REGISTRATIONS = (
    Registration(
        "Red Hat's subscription management",
        (
            "etc/pki/consumer/*",
            "etc/pki/consumer.old/*",
            "etc/pki/entitlement/*",
            "etc/rhsm/facts/katello.facts",
            "etc/rhsm/facts/uuid.facts",
            "etc/sysconfig/rhn/systemid",
            "var/lib/yggdrasil/client-id",
        ),
        (
            # Made by subscription-manager: it names the entitlement's keys.
            "etc/yum.repos.d/redhat.repo",
            *(f"var/lib/rhsm/{name}/*" for name in ("cache", "facts", "packages", "repo_server_val")),
        ),
    ),
    Registration(
        "Red Hat Insights",
        ("etc/insights-client/machine-id", "etc/redhat-access-insights/machine-id"),
        tuple(f"etc/insights-client/.{name}" for name in ("registered", "unregistered", "lastupload", "cache*")),
    ),
    Registration(
        "Ubuntu Pro",
        ("var/lib/ubuntu-advantage/private/*", "etc/apt/auth.conf.d/90ubuntu-advantage"),
        (
            "var/lib/ubuntu-advantage/machine-token.json",
            "var/lib/ubuntu-advantage/status.json",
            # Without the password they have apt update fail.
            *(
                f"etc/apt/sources.list.d/ubuntu-{name}.*"
                for name in ("esm-*", "fips*", "cc-eal", "cis", "ros*", "realtime*", "anbox*")
            ),
        ),
    ),
    Registration("Landscape", ("var/lib/landscape/client/*.bpickle*",)),
    Registration("SUSE Customer Center", SUSE_CREDENTIALS),
    Registration(
        "Salt",
        tuple(
            f"etc/{name}/{file}"
            for name in ("salt", "venv-salt-minion")
            for file in ("pki/minion/minion.pem", "pki/minion/minion.pub", "minion_id")
        ),
    ),
    Registration(
        "Puppet or OpenVox",
        tuple(
            f"{directory}/ssl/{name}/*"
            for directory in ("etc/puppetlabs/puppet", "var/lib/puppet", "etc/puppet")
            for name in ("private_keys", "private")
        ),
        tuple(f"{directory}/ssl/*" for directory in ("etc/puppetlabs/puppet", "var/lib/puppet", "etc/puppet")),
    ),
    Registration("Chef or Cinc", ("etc/chef/client.pem", "etc/cinc/client.pem")),
    Registration("Kerberos", ("etc/krb5.keytab", "etc/krb5/krb5.keytab", "var/lib/sss/keytabs/*")),
    Registration(
        "a domain",
        ("var/lib/samba/private/secrets.tdb", "var/lib/sss/secrets/*", "var/lib/sss/db/*"),
        ("var/lib/samba/private/netlogon_creds_cli.tdb", "var/lib/sss/mc/*"),
    ),
    Registration("Tailscale", ("var/lib/tailscale/*",)),
    Registration("ZeroTier", ("var/lib/zerotier-one/identity.*", "var/lib/zerotier-one/authtoken.secret")),
    Registration("NetBird", ("etc/netbird/config.json",)),
    Registration(
        "Kubernetes",
        (
            *(f"etc/kubernetes/{role}.conf" for role in _ROLES),
            "etc/kubernetes/pki/*",
            "var/lib/kubelet/pki/*",
            "etc/rancher/node/password",
        ),
    ),
    Registration(
        "Docker's registries and swarm",
        ("etc/docker/key.json", "var/lib/docker/engine-id", "var/lib/docker/swarm/*"),
    ),
    Registration("AWS Systems Manager", ("var/lib/amazon/ssm/registration", "var/lib/amazon/ssm/Vault/*")),
    Registration("Azure", ("var/lib/waagent/*",)),
    Registration("Wazuh or OSSEC", ("var/ossec/etc/client.keys",), emptied=("var/ossec/etc/client.keys",)),
    Registration("Elastic's beats", tuple(f"var/lib/{name}/meta.json" for name in _BEATS)),
    Registration("Netdata", ("var/lib/netdata/registry/netdata.public.unique.id", "var/lib/netdata/cloud.d/*")),
    Registration("Qualys or Tenable", ("etc/qualys/hostid", "etc/tenable_tag")),
    Registration("Consul or Nomad", ("opt/consul/node-id", "opt/nomad/data/client/*-id")),
    Registration("GitLab", ("etc/gitlab-runner/.runner_system_id",)),
)

# Passwords for registries of containers, below a home directory.
CONTAINER_AUTHS = (".docker/config.json", ".config/containers/auth.json")

WIREGUARD = "etc/wireguard/*"
_WIREGUARD_KEY = re.compile(rb"^[ \t]*PrivateKey\s*=\s*[A-Za-z0-9+/]{43}=|\A\s*[A-Za-z0-9+/]{43}=\s*\Z", re.M | re.I)


def has_wireguard_key(data: bytes) -> bool:
    """Return whether *data*, of a file in WireGuard's directory, has a private key (or nothing but a key)."""
    return bool(_WIREGUARD_KEY.search(data))


def without_auths(data: bytes) -> bytes | None:
    """Return Docker's configuration *data* without passwords for registries, None if it has none."""
    try:
        found = json.loads(data)
    except ValueError:
        return None
    if not isinstance(found, dict) or not found.get("auths"):
        return None
    return json.dumps({key: value for key, value in found.items() if key != "auths"}, indent="\t").encode() + b"\n"


def of_suse(files: Mapping[str, bytes]) -> list[str]:
    """Return the paths of *files* that a registration with the SUSE Customer Center has made, and of its credentials.

    Its services need credentials, and their repositories have tokens in their addresses.
    """
    if not any(path in files for path in SUSE_CREDENTIALS):
        return []
    sources = {path: data for path, data in files.items() if is_of(path, SUSE_SOURCES)}
    services = {path: data for path, data in sources.items() if _SUSE_SERVICE.search(data)}
    names = {name for data in services.values() for name in _SUSE_NAME.findall(data)}
    of_them = re.compile(rb"^[ \t]*service\s*=\s*(?:%s)\s*$" % b"|".join(map(re.escape, sorted(names))), re.M)
    repositories = [path for path, data in sources.items() if names and of_them.search(data)]
    credentials = {name for data in services.values() for name in _SUSE_SERVICE.findall(data)}
    named = [name.decode("ascii", "replace").rpartition("/")[2] for name in sorted(credentials)]
    return [*dict.fromkeys([*services, *repositories]), *(f"etc/zypp/credentials.d/{name}" for name in named)]


def is_of(path: str, patterns: Iterable[str]) -> bool:
    """Return whether one of *patterns* matches *path*."""
    directory, _, name = path.rpartition("/")
    split = (pattern.rpartition("/") for pattern in patterns)
    return any(parent == directory and fnmatch.fnmatchcase(name, last) for parent, _, last in split)


def program(name: str) -> tuple[str, ...]:
    """Return the paths that the program *name* may have: usr/sbin is a link on Arch, and Fedora since 42."""
    return f"usr/sbin/{name}", f"usr/bin/{name}"


@dataclass(frozen=True)
class Key:
    """A key that a package made when it was installed: *removed*, where the system has one of *makers*.

    A maker makes it anew by itself, or *commands* are for a unit that does it at the next start where
    *missing*, the absolute path of the key, is not there.  *user* runs them.
    """

    name: str
    removed: tuple[str, ...]
    makers: tuple[str, ...]
    missing: str = ""
    commands: tuple[str, ...] = ()
    user: str = ""

    @property
    def unit(self) -> str:
        """The name of the unit."""
        return f"image-factory-{self.name}.service"


_SYSTEM = "usr/lib/systemd/system"
_DROPBEAR = "/etc/dropbear/dropbear_$${kind}_host_key"

# Debian's service makes none.
DROPBEAR = Key(
    "dropbear-keys",
    ("etc/dropbear/dropbear_*_host_key",),
    program("dropbearkey"),
    "/etc/dropbear/dropbear_rsa_host_key",
    (
        "/bin/sh -ec 'for kind in rsa ecdsa ed25519; do \\\n"
        f"    [ -e {_DROPBEAR} ] || dropbearkey -t $$kind -f {_DROPBEAR}; done'",
    ),
)


def _self_signed(name: str) -> Key:
    """Return the key of Fedora's package *name* and its certificate, which its %post makes with openssl."""
    key, certificate = f"/etc/pki/tls/private/{name}.key", f"/etc/pki/tls/certs/{name}.pem"
    return Key(
        name,
        (key[1:], certificate[1:]),
        program("openssl"),
        key,
        (
            # The key gets its name last: what is broken off begins anew.  A name in a certificate has 64 characters.
            "/bin/sh -ec 'name=$$(uname -n | cut -c1-64); umask 077; \\\n"
            '    openssl req -x509 -newkey rsa:4096 -nodes -sha256 -days 365 -subj "/CN=$${name:-localhost}" \\\n'
            f"        -keyout {key}.new -out {certificate} 2>&1; \\\n"
            f"    chmod 644 {certificate}; mv {key}.new {key}'",
        ),
    )


KEYS = (
    # Debian's certificate for whatever service needs one: Postfix, Dovecot, PostgreSQL, Apache, and more.
    Key(
        "ssl-cert",
        ("etc/ssl/private/ssl-cert-snakeoil.key", "etc/ssl/certs/ssl-cert-snakeoil.pem"),
        program("make-ssl-cert"),
        "/etc/ssl/private/ssl-cert-snakeoil.key",
        (
            # The link is named by the certificate that it led to.
            "/bin/sh -ec 'for link in /etc/ssl/certs/*.[0-9]; do \\\n"
            '    [ "$$(readlink "$$link")" != ssl-cert-snakeoil.pem ] || rm -f "$$link"; done\'',
            "/usr/sbin/make-ssl-cert generate-default-snakeoil",
        ),
    ),
    Key(
        "rndc-key",
        ("etc/bind/rndc.key",),
        program("rndc-confgen"),
        "/etc/bind/rndc.key",
        ("/usr/sbin/rndc-confgen -a -u bind",),
    ),
    Key("named", ("etc/rndc.key",), (f"{_SYSTEM}/named-setup-rndc.service",)),
    Key(
        "munge-key",
        ("etc/munge/munge.key",),
        program("mungekey"),
        "/etc/munge/munge.key",
        ("/usr/sbin/mungekey --create",),
        "munge",
    ),
    Key(
        "httpd",
        ("etc/pki/tls/private/localhost.key", "etc/pki/tls/certs/localhost.crt"),
        (f"{_SYSTEM}/httpd-init.service",),
    ),
    _self_signed("postfix"),
    _self_signed("sendmail"),
    Key(
        "dovecot",
        ("etc/pki/dovecot/private/dovecot.pem", "etc/pki/dovecot/certs/dovecot.pem"),
        (f"{_SYSTEM}/dovecot-init.service",),
    ),
    Key(
        "unbound",
        ("etc/unbound/unbound_*.key", "etc/unbound/unbound_*.pem"),
        (f"{_SYSTEM}/unbound-keygen.service",),
    ),
    Key("cups", ("etc/cups/ssl/*",), program("cupsd")),
    Key("cockpit", ("etc/cockpit/ws-certs.d/0-self-signed*",), ("usr/bin/cockpit-bridge",)),
    # MariaDB, which has the same directory, makes none of them, and has no such file.
    Key(
        "mysql",
        (
            "var/lib/mysql/auto.cnf",
            *(f"var/lib/mysql/{name}{kind}.pem" for name in ("server-", "client-") for kind in ("key", "cert")),
            *(f"var/lib/mysql/{name}.pem" for name in ("ca", "ca-key", "private_key", "public_key")),
        ),
        ("var/lib/mysql/auto.cnf",),
    ),
    Key("fwupd", ("var/lib/fwupd/pki/*",), ("usr/libexec/fwupd/fwupd",)),
    # The certificate stays: the modules that were signed with it can be trusted all the same.
    Key("dkms", ("var/lib/dkms/mok.key", "var/lib/shim-signed/mok/MOK.priv"), program("dkms")),
)

# What sealing writes for them.
UNITS = tuple(key.unit for key in (DROPBEAR, *KEYS) if key.commands)
