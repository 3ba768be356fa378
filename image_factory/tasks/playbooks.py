"""Playbooks: ansible-playbook runs on this machine, and works on the booted system by ssh, on a tree by chroot."""

import dataclasses
import json
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..base import command, files, interrupts, scratch
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..configuration.settings import Task
from ..model import Plan

# How a tree is reached that is no booted system.
CONNECTION = "community.general.chroot"
_PROGRAM = "ansible-playbook"
_CHECK_SECONDS = 120.0
_LONGEST_REASON = 300
# What the user has for all playbooks: no setting of theirs, but the roles and collections that they have installed.
_OWN = "~/.ansible"
_CONFIGURATION = "ansible.cfg"

# What Ansible looks for beside a playbook, and has no name of its own for.
_BESIDE = re.compile(
    r"roles|group_vars|host_vars|files|templates|vars|tasks|handlers|library|module_utils|collections|\w+_plugins"
    r"|.*\.ya?ml"
)
# What Python and git write when nothing of it has changed.
_LEFT_OUT = ("__pycache__", ".git")
_MOST_FILES = 100_000
# A larger file is known by its size and by when it was changed.
_LARGEST_READ = 16 << 20


@dataclass(frozen=True)
class Login:
    """How the system is reached: root's sshd at *port* of *host*, by the private *key* and ssh's *options*.

    *temporary* is a directory there, on a tmpfs.
    """

    host: str
    port: int | str
    key: Path
    options: Mapping[str, str]
    temporary: str


def playbook_argv(plan: Plan, task: Task, inventory: Path) -> list[str]:
    """Return the command that carries out *task* on the one host of *inventory*."""
    return [
        _PROGRAM,
        "-i", str(inventory),
        "-e", json.dumps(facts_of(plan)),
        *(["-e", f"@{task.secrets.absolute()}"] if task.secrets else []),
        *task.args,
        str(_playbook(task)),
    ]  # fmt: skip


def facts_of(plan: Plan) -> dict[str, str]:
    """Return the variables that each playbook of *plan* gets."""
    return {"image_factory_image": plan.image, "image_factory_release": plan.settings.release or ""}


def directory_of(task: Task) -> Path:
    """Return the directory of the playbook of *task*."""
    return _playbook(task).parent


def _playbook(task: Task) -> Path:
    assert task.file
    return task.file.absolute()


def with_given(plan: Plan, task: Task) -> Task:
    """Return *task*; a playbook with what tells it, and what it finds beside it now, apart from another one."""
    if task.type != "playbook":
        return task
    return dataclasses.replace(task, given="\n".join(_identity(plan, task)))


def _identity(plan: Plan, task: Task) -> list[str]:
    """Return what tells the playbook of *task*, and all that it finds beside it, apart from another one.

    That is the roles, the files and so on in its directory, other YAML files there, and what its arguments name as
    ``@FILE``; not what is installed for all playbooks.  ConfigurationError if that is too much.
    """
    directory = directory_of(task)
    try:
        names = [name for name in os.listdir(directory) if _BESIDE.fullmatch(name)]
    except OSError:
        # Whoever reads the playbook says why.
        return []
    names += [word[1:] for word in task.args if word.startswith("@")]
    waiting = [(name, directory / name) for name in sorted(names, reverse=True)]
    seen: set[tuple[int, int]] = set()
    found = [repr(facts_of(plan))]
    while waiting:
        interrupts.check()
        name, path = waiting.pop()
        if len(found) > _MOST_FILES:
            raise ConfigurationError(
                f"[{plan.image}] task {task.name}: {directory} has more than {_MOST_FILES} files for it.",
                hint="Give the playbook a directory of its own.",
            )
        try:
            status = path.stat()
            if not stat.S_ISDIR(status.st_mode):
                found.append(f"{name!r} {_known_by(path, status)}")
            elif (status.st_dev, status.st_ino) not in seen:
                # A link may lead to where it lies.
                seen.add((status.st_dev, status.st_ino))
                inside = sorted(set(os.listdir(path)).difference(_LEFT_OUT), reverse=True)
                waiting += [(f"{name}/{each}", path / each) for each in inside]
        except OSError as error:
            found.append(f"{name!r} {error.strerror}")
    return found


def _known_by(path: Path, status: os.stat_result) -> str:
    if not stat.S_ISREG(status.st_mode):
        return "no file"
    if status.st_size > _LARGEST_READ:
        return f"{status.st_size} {status.st_mtime_ns}"
    return f"{status.st_mode & 0o111} {files.digest_of(path)}"


def _host_of(login: Login) -> dict[str, object]:
    """Return the variables of Ansible's for the host that *login* reaches."""
    options = " ".join(f"-o {shlex.quote(f'{name}={value}')}" for name, value in login.options.items())
    return {
        "ansible_host": login.host,
        "ansible_port": login.port,
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(login.key),
        "ansible_ssh_common_args": f"-F none {options}",
    }


def environment_of(task: Task, directory: Path, temporary: str) -> dict[str, str]:
    """Return the environment of ansible-playbook, which has its files in *directory*.

    No configuration of the user's, nor one beside the playbook, changes whom it trusts or what it runs.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_") and name != "SSH_AUTH_SOCK"
    }
    own = Path(_OWN).expanduser()
    return {
        **kept,
        "LC_ALL": "C.UTF-8",
        "ANSIBLE_CONFIG": str(directory / _CONFIGURATION),
        "ANSIBLE_HOME": str(directory),
        "ANSIBLE_LOCAL_TEMP": str(directory),
        "ANSIBLE_COLLECTIONS_PATH": f"{own}/collections:/usr/share/ansible/collections",
        "ANSIBLE_ROLES_PATH": f"{own}/roles:/usr/share/ansible/roles:/etc/ansible/roles",
        "ANSIBLE_HOST_KEY_CHECKING": "True",
        "ANSIBLE_NOCOLOR": "True",
        "ANSIBLE_NOCOWS": "True",
        "ANSIBLE_RETRY_FILES_ENABLED": "False",
        # Arguments of modules may have secrets, and the journal is on the disk.
        "ANSIBLE_NO_TARGET_SYSLOG": "True",
        "ANSIBLE_PIPELINING": "True",
        "ANSIBLE_REMOTE_TMP": temporary,
        # No connection is left when it ends.
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=no",
        **dict(task.environment),
    }


@contextmanager
def prepared(
    plan: Plan, task: Task, host: Mapping[str, object], temporary: str
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Give an inventory, whose one host has the variables *host*, and the environment of ansible-playbook."""
    with scratch.directory() as directory:
        (directory / _CONFIGURATION).touch()
        inventory = directory / "inventory.json"
        # JSON is YAML.
        inventory.write_text(json.dumps({"all": {"hosts": {plan.image: host}}}, indent=1), encoding="utf-8")
        yield inventory, environment_of(task, directory, temporary)


def run_playbook(
    plan: Plan, task: Task, login: Login, timeout: float | None, watch: Callable[[], None] | None = None
) -> None:
    """Carry out *task*; BuildError if it fails, or takes more than *timeout* seconds."""
    with prepared(plan, task, _host_of(login), login.temporary) as (inventory, environment):
        command.run(
            playbook_argv(plan, task, inventory),
            cwd=directory_of(task),
            env=environment,
            timeout=timeout,
            watch=watch,
        )


def check_playbooks(plan: Plan) -> None:
    """Raise ConfigurationError for a playbook of *plan* that ansible-playbook does not understand."""
    for task in plan.tasks:
        if task.type == "playbook":
            _check(plan, task)


def _check(plan: Plan, task: Task) -> None:
    with prepared(plan, task, {}, "/tmp") as (inventory, environment):
        argv = [*playbook_argv(plan, task, inventory), "--syntax-check"]
        try:
            command.run(argv, cwd=directory_of(task), env=environment, timeout=_CHECK_SECONDS, quiet=True)
        except CommandError as error:
            raise ConfigurationError(
                f"[{plan.image}] task {task.name}: {_PROGRAM} does not take {task.file}: {_reason(error.last_lines)}",
                hint=error.hint,
            ) from error
        except BuildError as error:
            raise ConfigurationError(f"[{plan.image}] task {task.name}: {error.message}") from error


def check_connection(plan: Plan) -> None:
    """Raise ConfigurationError unless Ansible has what CONNECTION names, if a playbook of *plan* needs it."""
    task = next((task for task in plan.tasks if task.type == "playbook"), None)
    if task is None:
        return
    with prepared(plan, task, {}, "/tmp") as (_, environment):
        try:
            command.run(
                ["ansible-doc", "--type", "connection", CONNECTION], env=environment, timeout=_CHECK_SECONDS, quiet=True
            )
        except BuildError as error:
            raise ConfigurationError(
                f"[{plan.image}] task {task.name}: Ansible has no {CONNECTION}, which a playbook in a tree needs.",
                hint="Install it: apt-get install ansible. Or set tasks-via = guest.",
            ) from error


def _reason(lines: Sequence[str]) -> str:
    """Return the error among the *lines* that it prints, in one; they end with a part of the playbook."""
    begins = [number for number, line in enumerate(lines) if re.match(r"ERROR!|\[ERROR\]", line)]
    # What YAML says of itself comes after what JSON says of it.
    begins += [number for number, line in enumerate(lines) if line.startswith("Syntax Error")]
    text = " ".join(" ".join(lines[begins[-1] :] if begins else lines).split())
    return text.partition(", but may be elsewhere")[0][:_LONGEST_REASON] or "it says nothing"
