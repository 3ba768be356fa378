"""The operations of sealing, in the order in which they are told."""

from collections.abc import Callable
from dataclasses import dataclass

from ...system import registrations
from ...system.registrations import DROPBEAR, KEYS, REGISTRATIONS
from . import identity, media, traces
from .actions import Actions, System


@dataclass(frozen=True)
class Operation:
    """A part of sealing, *name* in ``seal-only`` and ``seal-skip``; *help* is its sentence in the manual.

    *removed* and *emptied* are patterns; of files that are emptied owner, mode and label stay.
    *plan* says what else is to be done.  For that it gets the contents of the files *read*, and *in_homes* below each
    home directory, and the kinds of what is *looked_at*.
    """

    name: str
    help: str
    removed: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    in_homes: tuple[str, ...] = ()
    looked_at: tuple[str, ...] = ()
    plan: Callable[[System], Actions] | None = None

    def actions(self, system: System) -> Actions:
        """Return what is to be done to *system*."""
        actions = self.plan(system) if self.plan else Actions()
        actions.remove[:0] = self.removed
        actions.empty[:0] = self.emptied
        return actions


OPERATIONS = (
    Operation(
        "snapshots",
        "Snapshots of the system's subvolumes of btrfs go, such as those of snapper, Timeshift and installers, and "
        "what the system's own are snapshots of. What *fstab* names and the default subvolume stay.",
        plan=traces.remove_snapshots,
    ),
    Operation(
        "machine-id",
        "*/etc/machine-id* becomes *uninitialized*, so that systemd makes a new one at the first boot, and "
        "*/var/lib/dbus/machine-id* goes unless it is a link.",
        read=("etc/machine-id", "var/lib/dbus/machine-id"),
        looked_at=("etc/machine-id", "var/lib/dbus/machine-id"),
        plan=identity.reset_machine_id,
    ),
    Operation(
        "boot-entries",
        "Boot-loader entries, kernels and directories that are named by the old machine ID get the name *Default* in "
        "its place, also in *grubenv*, *loader.conf* and */etc/kernel*; where grub keeps the entries, a "
        "unit names them by the new ID at the first boot.",
        read=(
            *(f"{root}/loader/entries/*.conf" for root in identity.BOOT_ROOTS),
            *(f"{root}/loader/loader.conf" for root in identity.BOOT_ROOTS),
            *identity.GRUB_ENVIRONMENTS,
            "etc/kernel/cmdline",
            "etc/kernel/entry-token",
            "etc/machine-id",
            "var/lib/dbus/machine-id",
        ),
        looked_at=tuple(
            f"{root}/{name}" for root in identity.BOOT_ROOTS for name in ("*", "EFI/Linux/*", "loader/entries/*")
        ),
        plan=identity.rename_boot_entries,
    ),
    Operation(
        "ssh-host-keys",
        "SSH host keys go, and where nothing in the image makes new ones (cloud-init, sshd-keygen) a unit is added "
        "that does it before sshd starts, or Dropbear.",
        removed=("etc/ssh/ssh_host_*key*", *DROPBEAR.removed),
        read=identity.KEY_MAKERS,
        looked_at=(
            *(*identity.SSHD, *identity.KEY_MAKERS, identity.CLOUD_INIT, identity.CLOUD_INIT_DISABLED),
            *(*DROPBEAR.makers, *DROPBEAR.removed),
        ),
        plan=identity.have_keys_made,
    ),
    Operation(
        "cloud-init",
        "cloud-init forgets the instance that it was in the build (*/var/lib/cloud*), and its logs go.",
        removed=("var/lib/cloud/*", "var/log/cloud-init*.log*"),
    ),
    Operation(
        "cloud-init-config",
        "What installers write to keep cloud-init from its data sources or from the network goes, and so does "
        "*cloud-init.disabled*.",
        removed=(
            identity.CLOUD_INIT_DISABLED,
            "etc/cloud/ds-identify.cfg",
            "etc/cloud/cloud.cfg.d/20-disable-cc-dpkg-grub.cfg",
            "etc/cloud/cloud.cfg.d/50-curtin-networking.cfg",
            "etc/cloud/cloud.cfg.d/90-installer-network.cfg",
            "etc/cloud/cloud.cfg.d/99-installer.cfg",
            "etc/cloud/cloud.cfg.d/99-disable-network-config.cfg",
            "etc/cloud/cloud.cfg.d/99-installer-use-networkmanager.cfg",
            "etc/cloud/cloud.cfg.d/curtin-preserve-sources.cfg",
            "etc/cloud/cloud.cfg.d/subiquity-disable-cloudinit-networking.cfg",
        ),
    ),
    Operation(
        "random-seed",
        "The seeds of random numbers go, and the key of systemd's credentials.",
        removed=(
            "var/lib/systemd/random-seed",
            "var/lib/systemd/credential.secret",
            "var/lib/urandom/random-seed",
            "var/lib/misc/random-seed",
            *(f"{root}/loader/random-seed" for root in identity.BOOT_ROOTS),
        ),
    ),
    Operation(
        "network-leases",
        "DHCP leases and DUIDs go, and what NetworkManager remembers of the build machine, its *secret_key* included.",
        removed=(
            "var/lib/dhcp/dhclient*",
            "var/lib/dhclient/*",
            "var/lib/dhcpcd/*",
            "etc/dhcpcd.duid",
            "etc/dhcpcd.secret",
            "var/lib/NetworkManager/*",
            "var/lib/wicked/*",
            "var/lib/systemd/network/*",
        ),
    ),
    Operation(
        "network-profiles",
        "Connection profiles of the build machine go: NetworkManager's, *ifcfg-* files but for the loopback's, and "
        "where cloud-init writes new ones those of netplan.",
        removed=("etc/NetworkManager/system-connections/*",),
        looked_at=("etc/sysconfig/network-scripts/*", identity.CLOUD_INIT),
        plan=traces.remove_network_profiles,
    ),
    Operation(
        "udev-rules",
        "The names that udev gave to the cards and drives of the build machine go (*70-persistent-\\**).",
        removed=("etc/udev/rules.d/70-persistent-*",),
    ),
    Operation(
        "resolv-conf",
        "*/etc/resolv.conf* goes unless it is a link.",
        looked_at=("etc/resolv.conf",),
        plan=traces.remove_resolv_conf,
    ),
    Operation(
        "lvm-devices",
        "The list of disks that LVM may use goes, as it names the build machine's.",
        removed=("etc/lvm/devices/system.devices", "etc/lvm/devices/backup/*"),
    ),
    Operation(
        "zypp-id",
        "The ID by which zypp is counted goes.",
        removed=("var/lib/zypp/AnonymousUniqueId",),
    ),
    Operation(
        "storage-ids",
        "The names by which storage knows the machine go: those of iSCSI and of NVMe.",
        removed=("etc/nvme/hostid", "etc/nvme/hostnqn"),
        read=("etc/iscsi/initiatorname.iscsi",),
        looked_at=("usr/lib/open-iscsi/startup-checks.sh",),
        plan=identity.reset_iscsi_name,
    ),
    Operation(
        "registrations",
        "What makes the machine known to a service goes, so that each clone registers for itself: to "
        + ", ".join(found.service for found in REGISTRATIONS)
        + ", with the package sources that are of no use then. So do passwords for registries of containers in "
        "home directories, and private keys of WireGuard. The token of GitLab's runners, which several may have, "
        "stays in */etc/gitlab-runner/config.toml*.",
        removed=tuple(
            path for found in REGISTRATIONS for path in (*found.secret, *found.more) if path not in found.emptied
        ),
        emptied=tuple(path for found in REGISTRATIONS for path in found.emptied),
        read=(*registrations.SUSE_CREDENTIALS, *registrations.SUSE_SOURCES, registrations.WIREGUARD),
        in_homes=registrations.CONTAINER_AUTHS,
        plan=identity.unregister,
    ),
    Operation(
        "service-keys",
        "Keys that packages made when they were installed go where each clone makes its own: those of ssl-cert, "
        "BIND and MUNGE, and of Postfix and sendmail on Fedora and its like, by a unit that is added and runs before "
        "the services, those of Apache, Dovecot and unbound on Fedora and its like, CUPS, Cockpit, MySQL and fwupd by "
        "themselves, those of DKMS with the next module.",
        looked_at=tuple(path for key in KEYS for path in (*key.makers, *key.removed)),
        plan=identity.remove_service_keys,
    ),
    Operation(
        "proxy",
        "Proxies go from *apt.conf* and *apt.conf.d*, from *dnf.conf*, *libdnf5.conf.d*, *yum.conf* and the package "
        "sources of dnf, yum and zypp, from */etc/sysconfig/proxy*, *rhsm.conf*, */etc/environment*, */etc/wgetrc* and "
        "snapd's drop-in, from *.curlrc* and *.wgetrc* in home directories, and from scripts in */etc/profile.d* where "
        "a line does nothing else. Comments stay.",
        removed=("etc/systemd/system/snapd.service.d/snap_proxy.conf",),
        read=(
            "etc/apt/apt.conf",
            "etc/apt/apt.conf.d/*",
            *traces.DNF_FILES,
            "etc/sysconfig/proxy",
            "etc/rhsm/rhsm.conf",
            "etc/environment",
            "etc/wgetrc",
            "etc/profile.d/*",
        ),
        in_homes=(".curlrc", ".wgetrc"),
        plan=traces.forget_proxy,
    ),
    Operation(
        "installation-media",
        "*fstab* no longer says which disk was what during the installation nor names its CD drive, and its media go "
        "from the package sources of apt, dnf, yum, zypp and apk: *cdrom:*, *cd:*, *hd:* and the like, and files below "
        "*/cdrom*, */media*, */mnt* and */run* that *fstab* does not mount. apt forgets the CDs that it knows.",
        removed=(
            "etc/apt/apt.conf.d/00CDMountPoint",
            "etc/apt/apt.conf.d/00trustcdrom",
            "var/lib/apt/cdroms.list*",
        ),
        read=("etc/fstab", *media.FILES),
        plan=traces.forget_media,
    ),
    Operation(
        "installer-files",
        "What installers leave beside their logs goes: answer files, copies of what they have changed, their state.",
        removed=(
            "root/initial-setup-ks.cfg",
            "root/autoinst.xml",
            "root/inst-sys",
            "root/curtin-install.log",
            "root/curtin-install-cfg.yaml",
            "autoinstall.yaml",
            "etc/install.inf",
            "etc/yast.inf",
            "etc/apt/sources.list.curtin.*",
            "etc/apt/sources.list.d/*.curtin.*",
            "etc/apt/sources.list.d/*.save",
            "etc/apt/sources.list.save",
            "var/lib/autoinstall",
            "var/lib/agama",
            "var/log/agama*",
            "var/log/pbl.log*",
        ),
    ),
    Operation(
        "package-caches",
        "Downloaded packages and package lists go; the package manager downloads the lists anew.",
        removed=(
            "var/cache/apt/archives/*.deb",
            "var/cache/apt/archives/partial/*",
            "var/cache/apt/*.bin",
            "var/lib/apt/lists/*",
            "var/cache/debconf/*-old",
            "var/lib/dpkg/*-old",
            "var/cache/dnf/*",
            "var/cache/libdnf5/*",
            "var/cache/yum/*",
            "var/cache/PackageKit/*",
            "var/cache/zypp/*",
            "var/cache/zypper/*",
        ),
    ),
    Operation(
        "histories",
        "The histories of shells, editors and database clients go from the home directories.",
        plan=traces.remove_histories,
    ),
    Operation(
        "account-backups",
        "The copies of the files of accounts as they were before their last change go, with their password hashes.",
        removed=(
            "etc/passwd-",
            "etc/shadow-",
            "etc/group-",
            "etc/gshadow-",
            "etc/subuid-",
            "etc/subgid-",
            "var/backups/*",
        ),
        emptied=("etc/security/opasswd",),
    ),
    Operation(
        "login-records",
        "The records of logins are emptied.",
        removed=tuple(f"var/log/{name}{old}" for name in ("btmp", "wtmp") for old in (".1", ".*.gz", "-*")),
        # Debian has a link to wtmp.db in /var/log there, which stays.
        emptied=(*(f"var/log/{name}" for name in traces.LOGIN_RECORDS), "var/lib/wtmpdb/wtmp.db", "var/lib/lastlog/*"),
    ),
    Operation(
        "journal",
        "The journals of systemd go; their directory stays, as it has the journal kept on the disk.",
        removed=("var/log/journal/*",),
    ),
    Operation(
        "logs",
        "All files in */var/log* are emptied, as some programs can't make theirs anew, and rotated ones go.",
        looked_at=("var/log/*",),
        plan=traces.empty_logs,
    ),
    Operation(
        "crash-reports",
        "Core dumps and reports of crashes go.",
        removed=("var/crash/*", "var/lib/systemd/coredump/*", "var/spool/abrt/*", "var/lib/apport/coredump/*"),
    ),
    Operation(
        "temporary-files",
        "All in */tmp* and */var/tmp* goes.",
        removed=("tmp/*", "var/tmp/*"),
    ),
    Operation(
        "mail",
        "Mailboxes are emptied, and mail that waits to be sent goes.",
        removed=(
            "root/dead.letter",
            "var/spool/mqueue/*",
            "var/spool/clientmqueue/*",
            "var/spool/exim4/input/*",
            "var/spool/exim4/msglog/*",
        ),
        emptied=("var/mail/*", "var/spool/mail/*"),
    ),
)
