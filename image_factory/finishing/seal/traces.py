"""Plans for what the build has left in a system: snapshots, network, histories, logs, installation media, proxies."""

import re
from collections.abc import Iterable

from ...base.log import logger
from ...system import fstab
from ...system.privileged import takes_directory
from ...system.registrations import is_of
from . import apt, media
from .actions import Actions, System, is_home
from .identity import CLOUD_INIT

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
LOGIN_RECORDS = ("btmp", "faillog", "lastlog", "tallylog", "wtmp", "wtmp.db")
_LOGS_OF_OTHERS = ("cloud-init*", "journal", "btmp?*", "wtmp?*", *LOGIN_RECORDS)


def remove_snapshots(system: System) -> Actions:
    """Remove the snapshots of *system* that can be removed."""
    return Actions(snapshots=system.snapshots)


def remove_network_profiles(system: System) -> Actions:
    """Remove ifcfg files, but for the loopback's, and netplan's where cloud-init writes new ones."""
    directory = "etc/sysconfig/network-scripts"
    names = [name for name in system.below(directory) if re.fullmatch(r"ifcfg-(?!lo$)[A-Za-z0-9._@-]+", name)]
    return Actions(remove=[*(f"{directory}/{name}" for name in names), *_netplan(system)])


def _netplan(system: System) -> list[str]:
    # Nothing but cloud-init would write new ones.
    if CLOUD_INIT not in system.kinds:
        return []
    return [f"etc/netplan/{name}" for name in ("00-installer-config*.yaml", "01-netcfg.yaml", "50-cloud-init.yaml")]


def remove_resolv_conf(system: System) -> Actions:
    """Remove resolv.conf unless it is a link."""
    return Actions(remove=["etc/resolv.conf"] if system.kinds.get("etc/resolv.conf") == "file" else [])


def remove_histories(system: System) -> Actions:
    """Remove histories from the home directories; warn of those that the helper can't be given."""
    for home in system.homes:
        if not is_home(home):
            logger.warning("The histories in /%s stay: its name is an odd one.", home)
    return Actions(remove=[f"{home}/{name}" for home in filter(is_home, system.homes) for name in _HISTORIES])


def empty_logs(system: System) -> Actions:
    """Empty logs, and remove rotated ones; those of other operations stay."""
    names = [name for name in system.below("var/log") if not is_of(name, _LOGS_OF_OTHERS)]
    directories = [name for name in names if system.kinds.get(f"var/log/{name}") == "directory"]
    rotated = [name for name in names if name not in directories and is_of(name, _ROTATED)]
    below = [f"{name}/{old}" for name in directories if takes_directory(name, 1) for old in _ROTATED]
    empty = ["var/log/*"]
    if not {"cloud-init", "journal", "login-records"} <= set(system.chosen):
        # Name each log, odd ones by a pattern, as those of an operation that is not chosen stay.
        every = [path for path in system.kinds if path.startswith("var/log/") and path.count("/") == 2]
        others = [path for path in every if not is_of(path.rpartition("/")[2], _LOGS_OF_OTHERS)]
        empty = [re.sub(r"[^A-Za-z0-9._@+~/-]|(?<=log/)[.+~-]", "*", path) for path in others]
    return Actions(remove=[f"var/log/{name}" for name in (*rotated, *below)], empty=empty)


# Lines of configuration

_DURING_INSTALLATION = re.compile(rb"#.* was on /dev/\S+ during (?:curtin )?installation\s*")
_OPTICAL = re.compile(
    rb"(?:/dev/(?:sr[0-9]+|cdrom[0-9]*|dvd[0-9]*)\s.*"
    # ISO 9660 and UDF have the date of their creation where other filesystems have a UUID.
    rb"|UUID=[0-9]{4}(?:-[0-9]{2}){6}\s+\S+\s+(?:udf|iso9660)[\s,].*)"
)


def forget_media(system: System) -> Actions:
    """Take installation media out of fstab and of the package sources."""
    actions = Actions()
    _drop_lines(system, actions, ["etc/fstab"], _DURING_INSTALLATION, _OPTICAL, keep=True)
    table = actions.write.get("etc/fstab", system.files.get("etc/fstab", b""))
    mounted = [entry.point for entry in fstab.parse(table.decode(errors="replace"))]
    for path, data in system.files.items():
        if is_of(path, media.FILES):
            _rewrite(actions, path, data, media.without_media(path, data, mounted))
    return actions


DNF_FILES = (
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

# Match plain values only: other lines are logic of the script, as in openSUSE's, which reads /etc/sysconfig/proxy.
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


def forget_proxy(system: System) -> Actions:
    """Take proxies out of the configuration of package managers, shells, wget and curl."""
    actions = Actions()

    def files(*patterns: str) -> list[str]:
        return [path for path in system.files if is_of(path, patterns)]

    def in_homes(name: str) -> list[str]:
        return [path for path in system.files if path.rpartition("/")[2] == name]

    for path in files("etc/apt/apt.conf", "etc/apt/apt.conf.d/*"):
        _rewrite(actions, path, system.files[path], apt.without_proxies(system.files[path]))
    _drop_lines(system, actions, files(*DNF_FILES), _DNF_PROXY)
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


def _rewrite(actions: Actions, path: str, data: bytes, text: bytes) -> None:
    """Have *text* in the file *path* in place of *data*; without any the file goes."""
    if not text and data:
        actions.remove.append(path)
    elif text != data:
        actions.write[path] = text


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
