"""What sealing does to a system that was lived in."""

import re

import pytest
import yaml

from image_factory.finishing.seal.actions import Actions, System
from image_factory.finishing.seal.captured import CAPTURED


def actions(name: str, files: dict[str, bytes], homes: tuple[str, ...] = (), **kinds: str) -> Actions:
    """Return what the operation *name* does to a system that has *files*."""
    [operation] = [found for found in CAPTURED if found.name == name]
    found = {path.replace("__", "/"): kind for path, kind in kinds.items()}
    return operation.actions(System(files, dict.fromkeys(files, "file") | found, homes, ()))


def test_accounts_are_locked() -> None:
    shadow = b"root:$y$j9T$abc:19000:0:99999:7:::\nann::19000::::::\nbin:*:1::::::\nbob:!$6$x:1::::::\n+::\n"
    written = actions("passwords", {"etc/shadow": shadow}).write
    assert written == {
        "etc/shadow": b"root:!:19000:0:99999:7:::\nann:!:19000::::::\nbin:*:1::::::\nbob:!$6$x:1::::::\n+::\n"
    }
    locked = {"etc/shadow": written["etc/shadow"], "etc/gshadow": b"adm:*::\n"}
    assert actions("passwords", locked).write == {}


def test_homes_lose_keys_and_traces() -> None:
    removed = actions("user-keys", {}, ("root", "home/ann", "home/o'dd")).remove
    assert "root/.ssh/id_*" in removed and "home/ann/.ssh/authorized_keys*" in removed
    assert not any("o'dd" in path for path in removed)
    assert "home/ann/.cache/*" in actions("user-traces", {}, ("home/ann",)).remove


def test_name_goes() -> None:
    hosts = b"127.0.0.1 localhost\n127.0.1.1 web.example.com web\n10.0.0.7 webmail\n10.0.0.8 web\n::1 localhost\n"
    files = {"etc/hostname": b"web\n", "etc/hosts": hosts, "etc/mailname": b"web.example.com\n"}
    assert actions("host-name", files).write == {
        "etc/hostname": b"localhost\n",
        "etc/mailname": b"localhost\n",
        "etc/hosts": b"127.0.0.1 localhost\n10.0.0.7 webmail\n::1 localhost\n",
    }
    assert actions("host-name", {"etc/hostname": b"localhost\n", "etc/hosts": b"127.0.0.1 localhost\n"}).write == {}


INTERFACES = """\
auto lo
iface lo inet loopback
# the first
auto ens3
iface ens3 inet static
    address 10.0.0.7/24
    # a gateway
    gateway 10.0.0.1
    dns-nameservers 10.0.0.1
    mtu 9000
iface ens3 inet6 static
    address fd00::7/64
iface ens4 inet dhcp
    metric 5
"""
ASKING = """\
auto lo
iface lo inet loopback
# the first
auto ens3
iface ens3 inet dhcp
    # a gateway
    mtu 9000
iface ens3 inet6 auto
iface ens4 inet dhcp
    metric 5
"""
NETWORK = "[Match]\nName=ens*\n[Network]\nAddress=10.0.0.7/24\nDNS=10.0.0.1\nLLDP=yes\n[Route]\nGateway=10.0.0.1\n"
NETPLAN = """\
network:
  version: 2
  ethernets:
    ens3: {addresses: [10.0.0.7/24], routes: [{to: default, via: 10.0.0.1}], mtu: 9000}
    ens4: {match: {macaddress: "52:54:00:12:34:56"}, set-name: lan}
    ens5: {dhcp4: true}
"""


def test_addresses_are_asked_for() -> None:
    files = {
        "etc/network/interfaces": INTERFACES.encode(),
        "etc/systemd/network/10.network": NETWORK.encode(),
        "etc/systemd/network/20.network": b"[Network]\nDHCP=ipv4\n",
        "etc/netplan/x.yaml": NETPLAN.encode(),
        "etc/netplan/y.yaml": b"network: [",
        "etc/dhcpcd.conf": b"hostname\nstatic ip_address=10.0.0.7/24\nstatic routers=10.0.0.1\npersistent\n",
    }
    written = actions("static-addresses", files).write
    assert written.keys() == {*files} - {"etc/systemd/network/20.network", "etc/netplan/y.yaml"}
    assert written["etc/network/interfaces"].decode() == ASKING
    assert written["etc/systemd/network/10.network"] == b"[Match]\nName=ens*\n[Network]\nDHCP=yes\nLLDP=yes\n"
    assert written["etc/dhcpcd.conf"] == b"hostname\npersistent\n"
    found = yaml.safe_load(written["etc/netplan/x.yaml"])["network"]["ethernets"]
    assert found == {
        "ens3": {"mtu": 9000, "dhcp4": True},
        "ens4": {"match": {"name": "e*"}, "set-name": "lan", "dhcp4": True},
        "ens5": {"dhcp4": True},
    }
    again = actions("static-addresses", files | written)
    assert again.write == {}


@pytest.mark.parametrize("data", [b"a: &a [*a]", b"network: {e: {x: 1}}", b"\xff", b"network:\n  e: [", b"[" * 5000])
def test_odd_netplan_stays(data: bytes) -> None:
    assert actions("static-addresses", {"etc/netplan/x.yaml": data}).write == {}


def test_disks_of_the_machine_are_forgotten() -> None:
    files = {"etc/mdadm/mdadm.conf": b"MAILADDR root\nARRAY /dev/md0 UUID=1:2\n"}
    done = actions("disk-keys", files)
    assert done.write == {"etc/mdadm/mdadm.conf": b"MAILADDR root\n"}
    assert "etc/crypttab" in done.empty


def test_crontabs_go_where_they_lie() -> None:
    """Debian has a directory between, which stays."""
    done = actions(
        "cron-spools", {"var/spool/cron/root": b"", "var/spool/cron/-x": b""}, var__spool__cron__crontabs="directory"
    )
    assert "var/spool/cron/root" in done.remove
    assert not {"var/spool/cron/crontabs", "var/spool/cron/-x"} & {*done.remove}


def test_each_operation_does_something() -> None:
    for operation in CAPTURED:
        assert operation.removed or operation.emptied or operation.plan
        assert re.fullmatch("[a-z-]+", operation.name)
