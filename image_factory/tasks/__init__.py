"""Tasks: a user's own work in a system, before or after it is cleaned.

A task is a script that root runs in the system, whatever its type; but for a playbook and for copying, which this
machine does.
"""

import base64
import hashlib
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..base import log
from ..base.errors import ConfigurationError
from ..configuration.settings import Task
from ..model import Plan

# Sources that make a tree.
WITH_TREES = ("bootstrap", "elements")
# A secret of fewer characters is a word that any output may have.
_SHORTEST_SECRET = 6
_LARGEST_FILE = 4 << 20

# Of a shell's variables, and of YAML's and JSON's mappings.
_ASSIGNMENT = re.compile(r"""\s*(?:export\s+)?["']?[A-Za-z_][\w.-]*["']?\s*(?:=|:\s)\s*(?P<value>.*?),?\s*""")
# Of a section, a mapping, a key in PEM: many files that have no secret have the same line.
_HEADING = re.compile(r"-----.*|\[.*\]|[\w.\"'-]+:")

# By the package manager that the system has.
_PACKAGES = """\
#!/bin/sh
set -e
if command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    # The system's own timers may have it.
    apt-get -q -o DPkg::Lock::Timeout=600 update
    exec apt-get -q -y -o DPkg::Lock::Timeout=600 install "$@"
elif command -v dnf >/dev/null; then
    exec dnf -q -y install "$@"
elif command -v zypper >/dev/null; then
    exec zypper -q --non-interactive install "$@"
fi
echo "the system has none of apt-get, dnf and zypper" >&2
exit 1
"""


@dataclass(frozen=True)
class Script:
    """What root runs in the system: *content*, whose first line names its interpreter, with *arguments*.

    *secrets* is a file that is there meanwhile, at the path that the variable TASK_SECRETS has.
    """

    content: bytes
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Kind:
    """A type of tasks: the key that says what is to be done, and how that becomes a script.

    *script* is None where this machine carries out the task.
    """

    key: str
    script: Callable[[Task], Script] | None


def _file_script(task: Task) -> Script:
    assert task.file
    return Script(_read(task, "task-file", task.file), task.args)


def _packages_script(task: Task) -> Script:
    return Script(_PACKAGES.encode(), task.packages)


def _command_script(task: Task) -> Script:
    return Script(f"#!/bin/sh\nset -e\n{task.command}\n".encode(), task.args)


KINDS = {
    "script": Kind("task-file", _file_script),
    "packages": Kind("task-packages", _packages_script),
    "command": Kind("task-command", _command_script),
    "playbook": Kind("task-file", None),
    "copy": Kind("task-copy", None),
}


def script_of(task: Task) -> Script:
    """Return the script of *task*, whose kind has one, with all that it gets."""
    make = KINDS[task.type].script
    assert make
    found = make(task)
    return Script(found.content, found.arguments, dict(task.environment), secrets_of(task))


def secrets_of(task: Task) -> bytes:
    """Return the file of secrets of *task*, empty if it has none; from here on nothing shows what is secret of it."""
    if not task.secrets:
        return b""
    secrets = _read(task, "task-secrets", task.secrets)
    log.hide(hidden_in(secrets))
    return secrets


def hidden_in(secrets: bytes) -> list[str]:
    """Return the texts in a file of *secrets* that nobody is to see, the longest first.

    They are the values of ``NAME=VALUE`` and ``NAME: VALUE``, and all other lines but headings.
    """
    found = set()
    for line in secrets.decode("utf-8", errors="replace").splitlines():
        match = _ASSIGNMENT.fullmatch(line)
        value = match["value"].strip("'\"") if match else ""
        text = value if len(value) >= _SHORTEST_SECRET else line.strip()
        if len(text) >= _SHORTEST_SECRET and not _HEADING.fullmatch(text):
            found.add(text)
    return sorted(found, key=len, reverse=True)


def digest_of(task: Task) -> str:
    """Return the SHA-256 of what *task* does: of its type, script, arguments, environment and reboot.

    Its secrets are not in it: a digest that others may read lets them try passwords.
    """
    content = _read(task, "task-file", task.file) if task.file else b""
    lists = [*task.packages, "", *task.args, "", *map("=".join, task.environment)]
    parts = [task.type, task.command, str(task.reboot), *lists, task.given]
    return hashlib.sha256("\0".join(parts).encode() + b"\0" + content).hexdigest()


def digest_with_secrets(tasks: Iterable[Task]) -> str:
    """Return the SHA-256 of what *tasks* do, and of their secrets: nobody else is to read it."""
    parts = [f"{digest_of(task)} {hashlib.sha256(secrets_of(task)).hexdigest()}" for task in tasks]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def timeout_argv(timeout: float | None) -> list[str]:
    """Return the command that ends another one after *timeout* seconds, nothing if that is None."""
    return [] if timeout is None else ["timeout", "-k", "10", f"{timeout:.0f}"]


def payload(script: Script) -> bytes:
    """Return what ``receiving`` reads on its stdin."""
    return b"\n".join([base64.b64encode(script.content), base64.b64encode(script.secrets), b""])


def receiving(script: Script, directory: str, timeout: float | None = None) -> str:
    """Return the line of shell that runs *script*, whose ``payload`` it reads, as root in the system.

    *directory*, where it puts it, is on a tmpfs, and root's alone.  After *timeout* seconds the system ends it, with
    status 124; 125 says that it could not be put there.
    """
    words = [f"{name}={value}" for name, value in script.environment.items()]
    if script.secrets:
        words.append(f"TASK_SECRETS={directory}/secrets")
    # The system's own clock ends it: what is started by ssh goes on when ssh is killed.
    limit = timeout_argv(timeout)
    wanted = _interpreter(script)
    return (
        # The kernel would say that the script itself is not there.
        f"command -v {wanted} >/dev/null || {{ echo the system has no {wanted}, which runs it >&2; exit 127; }};"
        # What a try whose connection broke has left is no reason to fail.
        f" umask 077; rm -rf {directory}; mkdir {directory} && read -r task && read -r secrets"
        f" && echo $task | base64 -d >{directory}/task && echo $secrets | base64 -d >{directory}/secrets"
        f" && chmod 700 {directory}/task || exit 125; unset task secrets; umask 022; cd /;"
        f" {shlex.join([*limit, 'env', *words, f'{directory}/task', *script.arguments])} </dev/null;"
        f" status=$?; rm -rf {directory}; exit $status"
    )


def _interpreter(script: Script) -> str:
    """Return, as a word of the shell's, the program that the first line of *script* names, itself or after env."""
    first = script.content.partition(b"\n")[0].decode(errors="surrogateescape")
    program, *words = first.removeprefix("#!").split() or [""]
    named = [word for word in words if not word.startswith("-") and "=" not in word]
    # Only env looks where a PATH of the task's own leads.
    return shlex.quote(named[0] if program.endswith("/env") and named and "PATH" not in script.environment else program)


def place(plan: Plan) -> str:
    """Return where the tasks before cleaning run: ``guest`` or ``namespace``."""
    settings = plan.settings
    if settings.tasks_via != "auto":
        return settings.tasks_via
    # Of elements the disk may be theirs by then, unless it has no boot loader at all.
    in_tree = settings.source == "bootstrap" or (settings.source in WITH_TREES and settings.layout == "filesystem")
    return "namespace" if in_tree else "guest"


def programs(plan: Plan) -> list[str]:
    """Return the programs that the playbooks of *plan* need."""
    return ["ansible-playbook"] if any(task.type == "playbook" for task in plan.tasks) else []


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it is known that a task of *plan* can't be carried out."""
    for task in (*plan.tasks, *plan.late_tasks):
        secrets_of(task)
        if KINDS[task.type].script:
            _check_script(task, script_of(task))
        elif task.type == "playbook":
            _read(task, "task-file", task.file)
    for task in plan.late_tasks:
        if task.type == "playbook":
            raise ConfigurationError(
                f"[{plan.image}] tasks-after-cleaning: {task.name} is a playbook, and these run without network.",
                hint="Move it to tasks.",
            )


def _check_script(task: Task, script: Script) -> None:
    if not re.match(rb"#! ?/", script.content):
        raise ConfigurationError(
            f"{_where(task, 'task-file')}: the first line of {task.file} does not say what runs it.",
            hint="Begin it with #!/bin/sh",
        )


def _read(task: Task, key: str, path: Path | None) -> bytes:
    assert path
    where = _where(task, key)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigurationError(f"{where}: {path} is not a file.")
            if key == "task-secrets" and status.st_mode & 0o077:
                raise ConfigurationError(
                    f"{where}: others than its owner can read {path}.", hint=f"chmod 600 {shlex.quote(str(path))}"
                )
            if status.st_size > _LARGEST_FILE:
                raise ConfigurationError(f"{where}: {path} has more than {_LARGEST_FILE >> 20} MiB.")
            return file.read()
    except OSError as error:
        raise ConfigurationError(f"{where}: {path} can't be read: {error.strerror}.") from error


def _where(task: Task, key: str) -> str:
    return f"[{task.section}] {key}" if task.section else f"tasks: {task.name}"
