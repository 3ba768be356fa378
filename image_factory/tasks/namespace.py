"""Tasks in a tree that is no disk yet: in the namespaces of its build, for an ordinary user too, and with no boot."""

import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ..base import command, files
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..configuration.settings import Task
from ..disks import bounds
from ..inside.namespaces import MAKE_DEVICES, entering_argv
from ..model import Build, Plan
from . import KINDS, WITH_TREES, playbooks, timeout_argv
from . import place as place_of
from . import programs as programs_of_tasks
from .copies import InSystem, putting, told
from .layers import digests
from .running import GRACE_SECONDS, Place, script_argv

_SCRIPT = "task-in-tree"
DIRECTORY = "/run/image-factory-task"
_TEMPORARY = "/run/ansible"
_LISTING = "layers.listing"

# Nothing of the user's: also proxies are those of the recipe.
_ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "USER=root",
    "LOGNAME=root",
    "SHELL=/bin/sh",
    "TERM=dumb",
    "LC_ALL=C.UTF-8",
    "DEBIAN_FRONTEND=noninteractive",
)

# A script of shell: $1 is the tree, $2 whether there is a network, the rest is the command to run.  Its shell is the
# first process of a pid namespace and has a mount namespace: what a task leaves running or mounted ends with it.
RUN = (
    """\
set -e
trap '[ "$ready" ] || exit 125' EXIT
within() (
"""
    + bounds.CHECK
    + ")\n"
    + MAKE_DEVICES
    + """\
tree=$1 network=$2
shift 2
umask 022
# Shows the file $1 at $2, which is made if it is not there.
show() {
    within "$tree" "$2"
    [ -e "$2" ] || : >"$2"
    mount --bind "$1" "$2"
}
# Takes the mount at $1 away, and what was made for it.
hide() {
    umount -l "$1" 2>/dev/null && within "$tree" "$1" || return 0
    [ -s "$1" ] || rm -f "$1"
}
within "$tree" "$tree/proc" "$tree/sys" "$tree/dev" "$tree/run" "$tree/tmp"
mount -t proc -o nosuid,nodev,noexec proc "$tree/proc"
# Those of the machine, which root of the machine could change.
mount --bind "$tree/proc/sys" "$tree/proc/sys"
mount -o remount,bind,ro,nosuid,nodev,noexec "$tree/proc/sys"
[ ! -e "$tree/proc/sysrq-trigger" ] || mount --bind /dev/null "$tree/proc/sysrq-trigger"
# Who has no network namespace gets no sysfs of their own, and then the directories of cgroups may be theirs.
if ! mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$tree/sys" 2>/dev/null; then
    mount --rbind /sys "$tree/sys"
    [ ! -d "$tree/sys/fs/cgroup" ] || mount -t tmpfs -o ro,size=0 cgroup "$tree/sys/fs/cgroup"
fi
make_devices "$tree/dev"
mount -t tmpfs -o nosuid,nodev,mode=755,size=256M run "$tree/run"
mkdir -m 1777 "$tree/run/lock"
mount -t tmpfs -o nosuid,nodev,mode=1777,size=1G tmp "$tree/tmp"
# Packages ask it whether they may start their services.
printf '#!/bin/sh\\nexit 101\\n' >"$tree/dev/file"
chmod 755 "$tree/dev/file"
show "$tree/dev/file" "$tree/usr/sbin/policy-rc.d"
rm "$tree/dev/file"
names=$tree/etc/resolv.conf
if [ "$network" = yes ] && [ -e /etc/resolv.conf ]; then
    within "$tree" "$tree/etc"
    if [ -L "$names" ]; then
        link=$(readlink "$names")
        case $link in
        /*) names=$tree$link ;;
        *) names=$tree/etc/$link ;;
        esac
        within "$tree" "$names"
        # What a service makes when the system runs.
        case $(realpath -m "$names") in
        "$(realpath "$tree")"/run/*) mkdir -p "$(dirname "$(realpath -m "$names")")" ;;
        esac
    fi
    # A copy, which the task may change.
    cat /etc/resolv.conf >"$tree/dev/file"
    show "$tree/dev/file" "$names"
    rm "$tree/dev/file"
fi
[ "$network" = yes ] || ! command -v ip >/dev/null || ip link set lo up
ready=yes
status=0
"$@" || status=$?
kill -9 -1 2>/dev/null || :
hide "$tree/usr/sbin/policy-rc.d"
hide "$names"
exit $status
"""
)


class InTree:
    """The *tree* of *build* as a place for tasks, in the namespaces of process *pid*.

    *proxy* is the URI of one that brings packages, *copy* copies what a task names into a system.
    """

    def __init__(
        self,
        build: Build,
        tree: Path,
        pid: int | str,
        proxy: str | None,
        copy: Callable[[Build, InSystem, Task], None],
    ) -> None:
        self._build, self._tree, self._pid, self._copy_into = build, tree, pid, copy
        self._proxies = [f"{name}={proxy}" for name in ("http_proxy", "https_proxy") if proxy]
        self.place = Place(self._shell, DIRECTORY, own={"playbook": self._playbook, "copy": self._copy})

    def prepare(self) -> None:
        """Write to the build's directory what the commands need."""
        files.replace(self._build.directory / _SCRIPT, RUN.encode(), mode=0o600)
        chroot = shlex.join(["env", "-i", *_ENVIRONMENT, *self._proxies, "chroot"])
        files.replace(self._chroot, f'#!/bin/sh\nexec {chroot} "$@"\n'.encode(), mode=0o700)

    def commands(self, task: Task) -> list[list[str]]:
        """Return the commands that carry out *task*."""
        if KINDS[task.type].script:
            return [script_argv(task, self.place)]
        if task.type == "copy":
            return [*told(task.copies), [*self._apart_from_network(putting(DIRECTORY))]]
        return [self._playbook_argv(task, Path("INVENTORY"), None if math.isinf(task.timeout) else task.timeout)]

    def look(self) -> None:
        """Let the user look into the tree, as a task sees it."""
        terminal = f"TERM={os.environ.get('TERM', 'dumb')}"
        command.interact(
            self._shell(f"cd; export {shlex.quote(terminal)}; command -v bash >/dev/null && exec bash; exec sh")
        )

    @property
    def _chroot(self) -> Path:
        return self._build.directory / "task-chroot"

    def _shell(self, line: str) -> Sequence[str]:
        return self._entering(*chroot_argv(str(self._tree), line, self._proxies))

    def _apart_from_network(self, line: str) -> Sequence[str]:
        return self._entering(*chroot_argv(str(self._tree), line), network=False)

    def _entering(self, *words: str, network: bool | None = None) -> list[str]:
        apart = _apart(self._build, self._tree, has_network(self._build.plan) if network is None else network)
        return entering_argv(self._pid, *apart, *words, as_root=self._build.plan.as_root)

    def _copy(self, task: Task, limit: float | None) -> None:
        # Where a network is, the tree has this machine's resolv.conf in place of its own.
        self._copy_into(self._build, InSystem(self._apart_from_network, DIRECTORY, limit=limit), task)

    def _playbook(self, task: Task, limit: float | None) -> None:
        try:
            command.run(self._shell("command -v python3 >/dev/null"), quiet=True)
        except CommandError as error:
            raise BuildError(f"the system has no python3, which a playbook needs ({error.said})") from error
        host = {
            "ansible_connection": playbooks.CONNECTION,
            "ansible_host": str(self._tree),
            # ansible-playbook has the user's environment, in which it finds its own; what it runs in the tree has not.
            "ansible_chroot_exe": str(self._chroot),
        }
        with playbooks.prepared(self._build.plan, task, host, _TEMPORARY) as (inventory, environment):
            command.run(
                self._playbook_argv(task, inventory, limit),
                cwd=playbooks.directory_of(task),
                env=environment | {"PATH": command.search_path()},
                timeout=None if limit is None else limit + GRACE_SECONDS,
            )

    def _playbook_argv(self, task: Task, inventory: Path, limit: float | None) -> list[str]:
        argv = playbooks.playbook_argv(self._build.plan, task, inventory)
        return self._entering(*timeout_argv(limit), *argv)


def chroot_argv(tree: str, line: str, proxies: Sequence[str] = ()) -> list[str]:
    """Return the command that runs *line* of shell in *tree*, with nothing of the user's environment."""
    return ["env", "-i", *_ENVIRONMENT, *proxies, "chroot", tree, "sh", "-c", line]


def has_network(plan: Plan) -> bool:
    """Return whether tasks may use the network."""
    return plan.settings.tasks_network and not plan.settings.offline


def _apart(build: Build, tree: Path, network: bool) -> list[str]:
    """Return the command that runs another one for *tree*, which all that is left of it ends with."""
    kinds = ["--mount", "--pid", "--uts", "--ipc", *([] if network else ["--net"])]
    # unshare heeds no SIGTERM while its child runs.
    ends = ["setpriv", "--pdeathsig=KILL", "unshare", *kinds, "--fork", "--kill-child"]
    return [*ends, "sh", str(build.directory / _SCRIPT), str(tree), "yes" if network else "no"]


def tasks(plan: Plan) -> tuple[Task, ...]:
    """Return the tasks of *plan* that run in its tree."""
    return plan.tasks if place_of(plan) == "namespace" else ()


def programs(plan: Plan) -> list[str]:
    """Return the programs that the tasks of *plan* in its tree need."""
    return ["setpriv", "tar", "unshare", *programs_of_tasks(plan)] if tasks(plan) else []


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it is known that the tasks of *plan* can't be carried out in a tree."""
    if not tasks(plan):
        return
    if plan.settings.source not in WITH_TREES:
        raise ConfigurationError(
            f"[{plan.image}] tasks-via = namespace: only source = {' and '.join(WITH_TREES)} have a tree.",
            hint="Set tasks-via = guest.",
        )
    for task in plan.tasks:
        if task.reboot:
            raise ConfigurationError(
                f"[{plan.image}] task {task.name}: nothing reboots in a tree.",
                hint="Leave task-reboot out, or set tasks-via = guest.",
            )
    playbooks.check_playbooks(plan)
    playbooks.check_connection(plan)


def keeping_argv(build: Build, tree: Path, layer: Path) -> list[str]:
    """Return the command that writes to *layer* what has changed in *tree* since the layer before, all for the first.

    It has the metadata of all that, and the names of what is left in each directory.
    """
    # tar keeps in the file of its listing what the tree had when it last looked, and takes what has changed since.
    listing = f"--listed-incremental={build.directory / _LISTING}"
    kinds = ["--acls", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--sparse"]
    return ["tar", "--create", listing, *kinds, f"--directory={tree}", f"--file={layer}", "."]


def restoring_argvs(build: Build, tree: Path, layers: Sequence[Path]) -> list[list[str]]:
    """Return the commands that make *tree* as it was when the last of *layers* was kept."""
    kinds = ["--acls", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "--preserve-permissions"]
    extracting = ["tar", "--extract", "--listed-incremental=/dev/null", *kinds, f"--directory={tree}"]
    return [
        ["mkdir", "-p", str(tree)],
        *([*extracting, f"--file={layer}"] for layer in layers),
        # To nowhere tar reads no file: it looks, as for the next layer.
        keeping_argv(build, tree, Path("/dev/null")),
    ]


def identity(plan: Plan) -> dict[str, bytes]:
    """Return what the tasks of *plan* in its tree make of it, by the key that has them."""
    return {"tasks": digests(plan)[-1].encode()} if tasks(plan) else {}
