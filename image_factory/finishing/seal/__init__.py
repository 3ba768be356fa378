"""Seal an image, so that it can be cloned: what makes one machine of it goes, and what the build has left.

``OPERATIONS`` is the one table of what is done; the manual's list is checked against it.  A system is
looked at once, before anything changes, then all changes are made in a few calls: through sudo and in
the appliance a call is what takes time.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...base import events, interrupts
from ...base.errors import ConfigurationError
from ...base.log import logger
from ...base.units import format_size
from ...configuration.settings import ImageSettings
from ...model import Build, Change, Plan
from ...parts import Step, on_tree
from ...system import fstab, registrations
from ...system.privileged import takes_directory, takes_name
from ...system.registrations import DROPBEAR, KEYS, REGISTRATIONS, Key, is_of, program
from ...system.rehearsal import Call
from ...system.tree import Tree
from . import apt, media

STEP = "Sealing"

# The name that kernel-install(8) looks for, too, where entries have no machine ID.  It is a lower one
# than any ID to the boot loaders, which boot the highest.
ENTRY_TOKEN = "Default"

KEYS_UNIT = "image-factory-ssh-host-keys.service"
ENTRIES_UNIT = "image-factory-boot-entries.service"
_UNITS = "etc/systemd/system"

_MACHINE_ID = re.compile(rb"[0-9a-f]{32}")
_HOME_LEVELS = 8

# What holds boot-loader entries.
_BOOT_ROOTS = ("boot", "boot/efi", "efi")
_GRUB_ENVIRONMENTS = (
    "boot/grub/grubenv",
    "boot/grub2/grubenv",
    *(f"boot/efi/EFI/{name}/grubenv" for name in ("almalinux", "centos", "fedora", "redhat", "rocky")),
)

# Whatever makes SSH host keys when the system starts.
_KEY_MAKERS = (
    # Fedora, Enterprise Linux
    "usr/lib/systemd/system/sshd-keygen@.service",
    # Debian since 13
    "usr/lib/systemd/system/sshd-keygen.service",
    # Arch
    "usr/lib/systemd/system/sshdgenkeys.service",
    # openSUSE, where sshd.service runs it
    *program("sshd-gen-keys-start"),
    # an administrator's own, as people name it
    "etc/systemd/system/sshd-keygen@.service",
    "etc/systemd/system/sshd-keygen.service",
    "etc/systemd/system/ssh-keygen.service",
    "etc/systemd/system/regenerate_ssh_host_keys.service",
)
_SSHD = program("sshd")
_CLOUD_INIT = "usr/bin/cloud-init"
_CLOUD_INIT_DISABLED = "etc/cloud/cloud-init.disabled"

# So many patterns are given to the helper at once: the arguments of a program have a limit.
_AT_ONCE = 2000

# Directories that people's homes are not in, though /etc/passwd says so of system users.
_NO_HOMES = ("", "bin", "dev", "nonexistent", "proc", "run", "sbin", "sys", "usr")

_HISTORIES = (
    ".ash_history",
    ".bash_history",
    ".history",
    ".lesshst",
    ".local/share/fish/fish_history",
    ".local/share/nano/search_history",
    ".mysql_history",
    ".node_repl_history",
    ".psql_history",
    ".python_history",
    ".rediscli_history",
    ".sh_history",
    ".sqlite_history",
    ".viminfo",
    ".wget-hsts",
    ".zhistory",
    ".zsh_history",
)

_ROTATED = ("*.gz", "*.xz", "*.bz2", "*.zst", "*.old", "*.0", "*.1", "*.2", "*.3", "*.4", "*-20*")
_LOGIN_RECORDS = ("btmp", "faillog", "lastlog", "tallylog", "wtmp", "wtmp.db")
_LOGS_OF_OTHERS = ("cloud-init*", "journal", "btmp?*", "wtmp?*", *_LOGIN_RECORDS)


@dataclass(frozen=True)
class System:
    """What sealing looks at, as it was before any change.

    *files* are the contents of those that operations read, *kinds* what those are that they look at.
    *homes* are the directories of people, *chosen* the names of the operations, *snapshots* those of the system
    that can be removed.
    """

    files: Mapping[str, bytes]
    kinds: Mapping[str, str]
    homes: tuple[str, ...]
    chosen: tuple[str, ...]
    snapshots: tuple[str, ...] = ()

    @property
    def machine_id(self) -> bytes | None:
        """The machine ID of the build, None if the system has none."""
        for path in ("etc/machine-id", "var/lib/dbus/machine-id"):
            text = self.files.get(path, b"").strip()
            if _MACHINE_ID.fullmatch(text):
                return text
        return None

    def below(self, directory: str) -> list[str]:
        """Return the names in *directory* that are known; odd ones, which no program makes, are left out."""
        split = [path.rpartition("/") for path in (*self.kinds, *self.files)]
        return sorted({name for parent, _, name in split if parent == directory and takes_name(name)})


@dataclass
class Actions:
    """What an operation does: patterns to remove and to empty, files to write, paths to rename, snapshots that go."""

    remove: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    write: dict[str, bytes] = field(default_factory=dict)
    rename: dict[str, str] = field(default_factory=dict)
    snapshots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """A part of sealing: *help* is its sentence in the manual.

    *removed* and *emptied* are patterns; of files that are emptied owner, mode and label stay.
    *plan* says what else is to be done, by what is in the files *read*, and *in_homes* below each home
    directory, and by what is *looked_at*.
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


# What the operations plan


def _remove_snapshots(system: System) -> Actions:
    return Actions(snapshots=system.snapshots)


def _reset_machine_id(system: System) -> Actions:
    # machine-id(5): the file stays, as /etc may be read-only at the first boot.
    actions = Actions()
    kind = system.kinds.get("etc/machine-id")
    if kind == "link":
        actions.remove.append("etc/machine-id")
    if kind == "link" or (kind == "file" and system.files.get("etc/machine-id") != b"uninitialized\n"):
        actions.write["etc/machine-id"] = b"uninitialized\n"
    # systemd takes the ID from there where /etc has none.
    if system.kinds.get("var/lib/dbus/machine-id") == "file":
        actions.remove.append("var/lib/dbus/machine-id")
    return actions


def _rename_boot_entries(system: System) -> Actions:
    actions = Actions()
    if system.machine_id is None:
        return actions
    old = system.machine_id.decode()
    for root in _BOOT_ROOTS:
        for name in system.below(f"{root}/loader/entries"):
            path = f"{root}/loader/entries/{name}"
            text = _entry_without(old, system.files.get(path, b""))
            if path in system.files and text != system.files[path]:
                actions.write[path] = text
        loader = f"{root}/loader/loader.conf"
        if old.encode() in system.files.get(loader, b""):
            actions.write[loader] = system.files[loader].replace(old.encode(), ENTRY_TOKEN.encode())
        for directory in (f"{root}/loader/entries", root, f"{root}/EFI/Linux"):
            for name in system.below(directory):
                if old in name:
                    actions.rename[f"{directory}/{name}"] = name.replace(old, ENTRY_TOKEN)
    path = "etc/kernel/cmdline"
    if old.encode() in system.files.get(path, b""):
        actions.write[path] = _entry_without(old, system.files[path])
    for path in _GRUB_ENVIRONMENTS:
        data = system.files.get(path, b"")
        if old.encode() in data:
            # A block of a fixed size, which GRUB pads like this.
            text = data.rstrip(b"#").replace(old.encode(), ENTRY_TOKEN.encode())
            actions.write[path] = text.ljust(len(data), b"#")
    _name_new_entries(system, old, actions)
    return actions


def _entry_without(old: str, data: bytes) -> bytes:
    """Return *data*, an entry or arguments of the kernel, without the machine ID *old*, which systemd would obey."""
    lines = [line for line in data.split(b"\n") if line.split() != [b"machine-id", old.encode()]]
    text = re.sub(rb"(?:^|[ \t]+)systemd\.machine_id=" + old.encode() + rb"(?=\s|$)", b"", b"\n".join(lines))
    return text.replace(old.encode(), ENTRY_TOKEN.encode())


def _name_new_entries(system: System, old: str, actions: Actions) -> None:
    """Have the entries of new kernels named as those that were renamed."""
    token = system.files.get("etc/kernel/entry-token", b"").strip()
    named = any(f"{root}/loader/entries" == path.rpartition("/")[0] for path in actions.rename for root in _BOOT_ROOTS)
    own_directory = any(f"{root}/{old}" in actions.rename for root in _BOOT_ROOTS)
    if not own_directory and any(system.kinds.get(path) == "directory" for path in ("boot/grub", "boot/grub2")):
        # Fedora's 20-grub.install names entries by the machine ID whatever the token is, and grub2-mkconfig knows
        # no others, so the first boot gives these the new one.
        if token == old.encode():
            actions.remove.append("etc/kernel/entry-token")
        if "boot/loader/entries" in {path.rpartition("/")[0] for path in actions.rename}:
            actions.write |= _unit(ENTRIES_UNIT, _ENTRIES_UNIT_TEXT)
    elif named or own_directory or token == old.encode():
        actions.write["etc/kernel/entry-token"] = f"{ENTRY_TOKEN}\n".encode()


_ENTRIES_UNIT_TEXT = f"""\
# Written by image-factory, which has taken the machine ID out of the image.
[Unit]
Description=Name the boot-loader entries of the image by the ID of this machine
RequiresMountsFor=/boot/loader/entries
ConditionPathExistsGlob=/boot/loader/entries/{ENTRY_TOKEN}-*.conf

[Service]
Type=oneshot
ExecStart=/bin/sh -ec 'read -r id </etc/machine-id; cd /boot/loader/entries; \\
    for name in {ENTRY_TOKEN}-*.conf; do mv -n "$$name" "$$id-$${{name#{ENTRY_TOKEN}-}}"; done'
ExecStart=/bin/sh -ec 'read -r id </etc/machine-id; \\
    saved=$$(grub2-editenv - list | sed -n "s/^saved_entry={ENTRY_TOKEN}-//p"); \\
    [ -z "$$saved" ] || grub2-editenv - set "saved_entry=$$id-$$saved"'
"""

_KEYS_UNIT_TEXT = """\
# Written by image-factory: the image has no SSH host keys, and nothing else that makes them.
[Unit]
Description=Make SSH host keys
# Sockets listen before basic.target, which is what units come after by default.
DefaultDependencies=no
After=sysinit.target
Before=ssh.service ssh.socket sshd.service sshd.socket shutdown.target
Conflicts=shutdown.target
ConditionPathExistsGlob=!/etc/ssh/ssh_host_*_key

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A
"""


def _unit(name: str, text: str, target: str = "multi-user.target") -> dict[str, bytes]:
    """Return the files of a unit that is started at each boot, with *target*.

    A drop-in of the target wants it: that takes no link, and no preset of the distribution's undoes it.
    """
    wanted = f"# Written by image-factory.\n[Unit]\nWants={name}\n"
    drop_in = f"{_UNITS}/{target}.d/{name.removesuffix('.service')}.conf"
    return {f"{_UNITS}/{name}": text.encode(), drop_in: wanted.encode()}


_SERVICE_KEY_UNIT = """\
# Written by image-factory, which has taken the key that the package had made out of the image.
[Unit]
Description=Make {missing}
DefaultDependencies=no
# The name of the machine is known then, by cloud-init too, and no service has started.
After=sysinit.target
Before=basic.target shutdown.target
Conflicts=shutdown.target
ConditionPathExists=!{missing}

[Service]
Type=oneshot
Environment=DEBIAN_FRONTEND=noninteractive
{user}{commands}
"""


def _remove_service_keys(system: System) -> Actions:
    actions = Actions()
    for key in KEYS:
        if not any(maker in system.kinds for maker in key.makers):
            continue
        actions.remove += key.removed
        actions.write |= _unit_of(system, key)
    return actions


def _unit_of(system: System, key: Key) -> dict[str, bytes]:
    """Return the unit that makes *key* anew, where the system has it now and a program for that."""
    is_made = key.commands and any(maker in system.kinds for maker in key.makers)
    if not is_made or not any(is_of(path, key.removed) for path in system.kinds):
        return {}
    return _unit(key.unit, unit_text(key), "basic.target")


def unit_text(key: Key) -> str:
    """Return the unit that makes *key* anew."""
    user = f"User={key.user}\n" if key.user else ""
    commands = "\n".join(f"ExecStart={command}" for command in key.commands)
    return _SERVICE_KEY_UNIT.format(missing=key.missing, user=user, commands=commands)


def _unregister(system: System) -> Actions:
    actions = Actions(remove=[_askable(path) for path in registrations.of_suse(system.files)])
    for path, data in system.files.items():
        if is_of(path, [registrations.WIREGUARD]) and registrations.has_wireguard_key(data):
            actions.remove.append(_askable(path))
        elif path.endswith(registrations.CONTAINER_AUTHS):
            text = registrations.without_auths(data)
            if text is not None:
                actions.write[path] = text
    return actions


def _askable(path: str) -> str:
    """Return a pattern for *path* that the helper takes, whatever is in its name."""
    directory, _, name = path.rpartition("/")
    return f"{directory}/{re.sub(r'^[-+~]|[^A-Za-z0-9._@+~-]', '*', name)}"


def _have_keys_made(system: System) -> Actions:
    actions = Actions(write=_unit_of(system, DROPBEAR))
    if not any(path in system.kinds for path in _SSHD) or any(_makes_keys(system, path) for path in _KEY_MAKERS):
        return actions
    disabled = _CLOUD_INIT_DISABLED in system.kinds and "cloud-init-config" not in system.chosen
    if _CLOUD_INIT not in system.kinds or disabled:
        actions.write |= _unit(KEYS_UNIT, _KEYS_UNIT_TEXT)
    return actions


def _makes_keys(system: System, path: str) -> bool:
    # Debian's does it at the first boot alone, which there is with a new machine ID.
    only_once = b"ConditionFirstBoot=yes" in system.files.get(path, b"")
    return path in system.kinds and ("machine-id" in system.chosen or not only_once)


def _remove_netplan(system: System) -> Actions:
    # Without cloud-init nothing would write another.
    if _CLOUD_INIT not in system.kinds:
        return Actions()
    names = ("00-installer-config*.yaml", "01-netcfg.yaml", "50-cloud-init.yaml")
    return Actions(remove=[f"etc/netplan/{name}" for name in names])


def _remove_network_profiles(system: System) -> Actions:
    directory = "etc/sysconfig/network-scripts"
    names = [name for name in system.below(directory) if re.fullmatch(r"ifcfg-(?!lo$)[A-Za-z0-9._@-]+", name)]
    return Actions(remove=[f"{directory}/{name}" for name in names])


def _remove_resolv_conf(system: System) -> Actions:
    return Actions(remove=["etc/resolv.conf"] if system.kinds.get("etc/resolv.conf") == "file" else [])


def _reset_iscsi_name(system: System) -> Actions:
    path = "etc/iscsi/initiatorname.iscsi"
    # Debian's iscsid makes a name where the file says so, and does not start without the file.
    if "usr/lib/open-iscsi/startup-checks.sh" not in system.kinds:
        return Actions(remove=[path])
    wanted = b"GenerateName=yes\n"
    return Actions(write={path: wanted} if system.files.get(path, wanted) != wanted else {})


def _remove_histories(system: System) -> Actions:
    for home in system.homes:
        if not _is_home(home):
            logger.warning("The histories in /%s stay: its name is an odd one.", home)
    return Actions(remove=[f"{home}/{name}" for home in filter(_is_home, system.homes) for name in _HISTORIES])


def _empty_logs(system: System) -> Actions:
    names = [name for name in system.below("var/log") if not is_of(name, _LOGS_OF_OTHERS)]
    directories = [name for name in names if system.kinds.get(f"var/log/{name}") == "directory"]
    rotated = [name for name in names if name not in directories and is_of(name, _ROTATED)]
    below = [f"{name}/{old}" for name in directories if takes_directory(name, 1) for old in _ROTATED]
    empty = ["var/log/*"]
    if not {"cloud-init", "journal", "login-records"} <= set(system.chosen):
        # The logs of an operation that is not chosen stay, so the others are named, odd ones by a pattern.
        every = [path for path in system.kinds if path.startswith("var/log/") and path.count("/") == 2]
        others = [path for path in every if not is_of(path.rpartition("/")[2], _LOGS_OF_OTHERS)]
        empty = [re.sub(r"[^A-Za-z0-9._@+~/-]|(?<=log/)[.+~-]", "*", path) for path in others]
    return Actions(remove=[f"var/log/{name}" for name in (*rotated, *below)], empty=empty)


_DURING_INSTALLATION = re.compile(rb"#.* was on /dev/\S+ during (?:curtin )?installation\s*")
_OPTICAL = re.compile(
    rb"(?:/dev/(?:sr[0-9]+|cdrom[0-9]*|dvd[0-9]*)\s.*"
    # By its date of creation, where others have a UUID.
    rb"|UUID=[0-9]{4}(?:-[0-9]{2}){6}\s+\S+\s+(?:udf|iso9660)[\s,].*)"
)


def _forget_media(system: System) -> Actions:
    actions = Actions()
    _drop_lines(system, actions, ["etc/fstab"], _DURING_INSTALLATION, _OPTICAL, keep=True)
    table = actions.write.get("etc/fstab", system.files.get("etc/fstab", b""))
    mounted = [entry.point for entry in fstab.parse(table.decode(errors="replace"))]
    for path, data in system.files.items():
        if is_of(path, media.FILES):
            _rewrite(actions, path, data, media.without_media(path, data, mounted))
    return actions


def _rewrite(actions: Actions, path: str, data: bytes, text: bytes) -> None:
    """Have *text* in the file *path* in place of *data*; without any the file goes."""
    if not text and data:
        actions.remove.append(path)
    elif text != data:
        actions.write[path] = text


_DNF_FILES = (
    "etc/distro.repos.d/*.repo",
    "etc/dnf/dnf.conf",
    "etc/dnf/libdnf5.conf.d/*.conf",
    "etc/yum.conf",
    "etc/yum.repos.d/*.repo",
    "etc/zypp/repos.d/*.repo",
)
_DNF_PROXY = re.compile(rb"proxy(?:_username|_password|_auth_method)?\s*[=:](?!\s*_none_\s*$).*", re.IGNORECASE)
_VARIABLE = rb"(?:https?|ftp|rsync|gopher|socks|all|no)_proxy"
_ENVIRONMENT_PROXY = re.compile(rb"\s*(?:export\s+)?" + _VARIABLE + rb"\s*=.*", re.IGNORECASE)
_WGET_PROXY = re.compile(
    rb"\s*(?:" + _VARIABLE + rb"|(?:https?|ftp|no)-?proxy|proxy[_-]?(?:user|password))\s*=.*", re.IGNORECASE
)
# Plain values alone: other lines belong to the logic of a script, as openSUSE's, which reads its sysconfig.
_SCRIPT_PROXY = re.compile(
    rb"(?:(?:export\s+)?(?:" + _VARIABLE + rb"=[^\s$`;&|()]*\s*)+(?:;\s*export(?:\s+\w+)+\s*)?;?"
    rb"|setenv\s+" + _VARIABLE + rb"\s+[^\s$`;&|()]*;?|export(?:\s+" + _VARIABLE + rb")+)\s*",
    re.IGNORECASE,
)
_CURL_PROXY = re.compile(rb"\s*(?:-*proxy(?:-user)?(?:\s|=|:)|-[xU]).*")
_SYSCONFIG_PROXY = re.compile(rb"^((?:HTTPS?|FTP|GOPHER|SOCKS5?)_(?:PROXY|SERVER))=.*$", re.MULTILINE)
_RHSM_PROXY = re.compile(
    rb"^(proxy_(?:hostname|port|user|password)[ \t]*[=:])[ \t]*\S.*$", re.MULTILINE | re.IGNORECASE
)


def _forget_proxy(system: System) -> Actions:
    actions = Actions()

    def files(*patterns: str) -> list[str]:
        return [path for path in system.files if is_of(path, patterns)]

    def in_homes(name: str) -> list[str]:
        return [path for path in system.files if path.rpartition("/")[2] == name]

    for path in files("etc/apt/apt.conf", "etc/apt/apt.conf.d/*"):
        _rewrite(actions, path, system.files[path], apt.without_proxies(system.files[path]))
    _drop_lines(system, actions, files(*_DNF_FILES), _DNF_PROXY)
    _drop_lines(system, actions, ["etc/environment"], _ENVIRONMENT_PROXY, keep=True)
    _drop_lines(system, actions, ["etc/wgetrc"], _WGET_PROXY, keep=True)
    _drop_lines(system, actions, in_homes(".wgetrc"), _WGET_PROXY)
    _drop_lines(system, actions, files("etc/profile.d/*"), _SCRIPT_PROXY)
    _drop_lines(system, actions, in_homes(".curlrc"), _CURL_PROXY)
    path = "etc/sysconfig/proxy"
    if path in system.files:
        text = re.sub(rb"^PROXY_ENABLED=.*$", b'PROXY_ENABLED="no"', system.files[path], flags=re.MULTILINE)
        _rewrite(actions, path, system.files[path], _SYSCONFIG_PROXY.sub(rb'\1=""', text))
    path = "etc/rhsm/rhsm.conf"
    if path in system.files:
        _rewrite(actions, path, system.files[path], _RHSM_PROXY.sub(rb"\1", system.files[path]))
    return actions


def _drop_lines(
    system: System, actions: Actions, paths: Iterable[str], *lines: re.Pattern[bytes], keep: bool = False
) -> None:
    """Have those of *paths* written without *lines*; one with no other lines goes, unless it is to *keep*."""
    for path in paths:
        data = system.files.get(path, b"")
        left = [line for line in data.split(b"\n") if not any(pattern.fullmatch(line) for pattern in lines)]
        text = b"\n".join(left)
        if text == data:
            continue
        if text.strip() or keep:
            actions.write[path] = text
        else:
            actions.remove.append(path)


# The table

OPERATIONS = (
    Operation(
        "snapshots",
        "Snapshots of the system's subvolumes of btrfs go, such as those of snapper, Timeshift and installers, and "
        "what the system's own are snapshots of. What *fstab* names and the default subvolume stay.",
        plan=_remove_snapshots,
    ),
    Operation(
        "machine-id",
        "*/etc/machine-id* becomes *uninitialized*, so that systemd makes a new one at the first boot, and "
        "*/var/lib/dbus/machine-id* goes unless it is a link.",
        read=("etc/machine-id", "var/lib/dbus/machine-id"),
        looked_at=("etc/machine-id", "var/lib/dbus/machine-id"),
        plan=_reset_machine_id,
    ),
    Operation(
        "boot-entries",
        "Boot-loader entries, kernels and directories that are named by the old machine ID get the name *Default* in "
        "its place, also in *grubenv*, *loader.conf* and */etc/kernel*; where grub keeps the entries, a "
        "unit names them by the new ID at the first boot.",
        read=(
            *(f"{root}/loader/entries/*.conf" for root in _BOOT_ROOTS),
            *(f"{root}/loader/loader.conf" for root in _BOOT_ROOTS),
            *_GRUB_ENVIRONMENTS,
            "etc/kernel/cmdline",
            "etc/kernel/entry-token",
            "etc/machine-id",
            "var/lib/dbus/machine-id",
        ),
        looked_at=tuple(f"{root}/{name}" for root in _BOOT_ROOTS for name in ("*", "EFI/Linux/*", "loader/entries/*")),
        plan=_rename_boot_entries,
    ),
    Operation(
        "ssh-host-keys",
        "SSH host keys go, and where nothing in the image makes new ones (cloud-init, sshd-keygen) a unit is added "
        "that does it before sshd starts, or Dropbear.",
        removed=("etc/ssh/ssh_host_*key*", *DROPBEAR.removed),
        read=_KEY_MAKERS,
        looked_at=(
            *(*_SSHD, *_KEY_MAKERS, _CLOUD_INIT, _CLOUD_INIT_DISABLED),
            *(*DROPBEAR.makers, *DROPBEAR.removed),
        ),
        plan=_have_keys_made,
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
            _CLOUD_INIT_DISABLED,
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
            *(f"{root}/loader/random-seed" for root in _BOOT_ROOTS),
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
        looked_at=("etc/sysconfig/network-scripts/*", _CLOUD_INIT),
        plan=lambda system: Actions(remove=[*_remove_network_profiles(system).remove, *_remove_netplan(system).remove]),
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
        plan=_remove_resolv_conf,
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
        plan=_reset_iscsi_name,
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
        plan=_unregister,
    ),
    Operation(
        "service-keys",
        "Keys that packages made when they were installed go where each clone makes its own: those of ssl-cert, "
        "BIND and MUNGE, and of Postfix and sendmail on Fedora and its like, by a unit that is added and runs before "
        "the services, those of Apache, Dovecot and unbound on Fedora and its like, CUPS, Cockpit, MySQL and fwupd by "
        "themselves, those of DKMS with the next module.",
        looked_at=tuple(path for key in KEYS for path in (*key.makers, *key.removed)),
        plan=_remove_service_keys,
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
            *_DNF_FILES,
            "etc/sysconfig/proxy",
            "etc/rhsm/rhsm.conf",
            "etc/environment",
            "etc/wgetrc",
            "etc/profile.d/*",
        ),
        in_homes=(".curlrc", ".wgetrc"),
        plan=_forget_proxy,
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
        plan=_forget_media,
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
        plan=_remove_histories,
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
        emptied=(*(f"var/log/{name}" for name in _LOGIN_RECORDS), "var/lib/wtmpdb/wtmp.db", "var/lib/lastlog/*"),
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
        plan=_empty_logs,
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


def check(plan: Plan) -> None:
    """Raise ConfigurationError if the keys of *plan* name an operation that there is none of."""
    known = [operation.name for operation in OPERATIONS]
    for key, names in (("seal-only", plan.settings.seal_only), ("seal-skip", plan.settings.seal_skip)):
        for name in names:
            if name not in known:
                raise ConfigurationError(
                    f"[{plan.image}] {key}: {name!r} is not accepted, only operations of sealing.",
                    hint=f"They are {', '.join(known)}.",
                )


def operations(settings: ImageSettings) -> list[Operation]:
    """Return the operations that *settings* choose, in the order of the table; none without ``seal``."""
    if not settings.seal:
        return []
    return [
        operation
        for operation in OPERATIONS
        if (not settings.seal_only or operation.name in settings.seal_only) and operation.name not in settings.seal_skip
    ]


def steps(build: Build) -> Iterator[Step]:
    """Give the step on the mounted system, if it is wanted."""
    if operations(build.plan.settings):
        # What is rewritten, and which name is another one then, only the system tells.
        told = (Call("write", ("FILE", "MODE")), Call("rename", ("FILE", "NAME")))
        yield Step(STEP, on_tree(seal), calls=told)


def seal(build: Build, tree: Tree) -> None:
    """Take from the system *tree* what a clone must not have; log and tell what it was."""
    chosen = operations(build.plan.settings)
    # Looking changes nothing, so a signal may come at any point.
    with interrupts.interruptible():
        system = look_at(tree, chosen)
        planned = {operation.name: operation.actions(system) for operation in chosen}
    removed, emptied = _carry_out(tree, list(planned.values()))
    for operation in chosen:
        actions = planned[operation.name]
        _tell(operation.name, actions, _taken(removed, actions.remove), _taken(emptied, actions.empty), system)


def look_at(tree: Tree, chosen: Sequence[Operation]) -> System:
    """Return what the operations *chosen* want to know of the system *tree*."""
    kinds = {entry.path: entry.kind for entry in tree.entries(_looked_at(chosen))}
    files = tree.read(_read(chosen))
    homes = _homes(files.get("etc/passwd", b""), kinds)
    below = _read_in_homes(chosen, filter(_is_home, homes))
    for start in range(0, len(below), _AT_ONCE):
        files |= tree.read(below[start:][:_AT_ONCE])
    snapshots = tuple(snapshot.name for snapshot in tree.snapshots)
    return System(files, kinds, homes, tuple(found.name for found in chosen), snapshots)


def _looked_at(chosen: Sequence[Operation]) -> list[str]:
    # The homes are for all.
    return [*dict.fromkeys(pattern for operation in chosen for pattern in operation.looked_at), "home/*"]


def _read(chosen: Sequence[Operation]) -> list[str]:
    return [*dict.fromkeys(pattern for operation in chosen for pattern in operation.read), "etc/passwd"]


def _read_in_homes(chosen: Sequence[Operation], homes: Iterable[str]) -> list[str]:
    names = dict.fromkeys(name for operation in chosen for name in operation.in_homes)
    return [f"{home}/{name}" for home in homes for name in names]


def _homes(passwd: bytes, kinds: Mapping[str, str]) -> tuple[str, ...]:
    """Return the home directories that *passwd* names, and those in /home."""
    named = [
        line.split(":")[5].strip("/") for line in passwd.decode(errors="replace").split("\n") if line.count(":") == 6
    ]
    found = [
        "root",
        *named,
        *(path for path, kind in kinds.items() if path.startswith("home/") and kind == "directory"),
    ]
    return tuple(dict.fromkeys(home for home in found if home.partition("/")[0] not in _NO_HOMES))


def _is_home(path: str) -> bool:
    return takes_directory(path, _HOME_LEVELS)


def _carry_out(tree: Tree, planned: Sequence[Actions]) -> tuple[list[Change], list[Change]]:
    """Carry out all of *planned*; return what was removed and what was emptied."""
    # Units first: of what they make nothing is there when a build that fails here is resumed.
    units = {path: data for actions in planned for path, data in actions.write.items() if path.startswith(f"{_UNITS}/")}
    for path, data in units.items():
        tree.write(path, data, 0o644)
    remove = list(dict.fromkeys(pattern for actions in planned for pattern in actions.remove))
    empty = list(dict.fromkeys(pattern for actions in planned for pattern in actions.empty))
    if any(actions.snapshots for actions in planned):
        tree.delete_snapshots()
    removed = [gone for start in range(0, len(remove), _AT_ONCE) for gone in tree.remove(remove[start:][:_AT_ONCE])]
    emptied = [gone for start in range(0, len(empty), _AT_ONCE) for gone in tree.truncate(empty[start:][:_AT_ONCE])]
    # The machine ID last: a build that fails here and is resumed needs it again.
    for actions in reversed(planned):
        for path, data in actions.write.items():
            # Another operation may have done away with the file.
            if path not in units and (path not in remove or path in actions.remove):
                tree.write(path, data, 0o444 if path == "etc/machine-id" else 0o644)
        for path, name in actions.rename.items():
            tree.rename(path, name)
    return removed, emptied


def _taken(changes: list[Change], patterns: Sequence[str]) -> list[Change]:
    """Take those that *patterns* match from the list *changes*."""
    taken: list[Change] = []
    others: list[Change] = []
    for change in changes:
        interrupts.check()
        (taken if is_of(change.path, patterns) else others).append(change)
    changes[:] = others
    return taken


def _tell(name: str, actions: Actions, removed: Sequence[Change], emptied: Sequence[Change], system: System) -> None:
    """Log and tell what operation *name* did."""
    for verb, changes in (("Removed", removed), ("Emptied", emptied)):
        for change in changes:
            interrupts.check()
            logger.info("%s /%s", verb, change.path)
    for snapshot in actions.snapshots:
        logger.info("Removed %s", snapshot)
    for path in actions.write:
        logger.info("%s /%s", "Changed" if path in system.files else "Made", path)
    for path, new in actions.rename.items():
        logger.info("Renamed /%s to %s", path, new)
    shorter = [len(system.files.get(path, b"")) - len(data) for path, data in actions.write.items()]
    files = sum(change.files for change in (*removed, *emptied))
    size = sum(change.size for change in (*removed, *emptied)) + sum(less for less in shorter if less > 0)
    changed = len(actions.write) + len(actions.rename)
    count = len(actions.snapshots)
    told = [f"{count} {'snapshot' if count == 1 else 'snapshots'}"] if count else []
    told += [f"{files} {'file' if files == 1 else 'files'}"] if files else []
    told += [format_size(size)] if files or size else []
    told += [f"{changed} changed"] if changed else []
    logger.info("%s: %s: %s", STEP, name, ", ".join(told) or "nothing")
    events.tell(events.Sealed(name, files + count, size, changed))
