"""The checks of a test boot that need the guest's sshd: whether it answers, a login, and the user's script."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from ...base import command, interrupts
from ...base.errors import BuildError, CommandError
from ...base.events import BootCheck
from ...base.units import format_duration
from .machine import HOST, Machine, time_limit
from .report import USER, Message, judged, passed, skipped

_BANNER_SECONDS = 30.0
_LOGIN_SECONDS = {"kvm": 60.0, "qemu": 180.0}
LOGIN = "true"
RUN_SCRIPT = "f=$(mktemp) && cat >$f && chmod 700 $f && exec $f"


def ssh_options(machine: Machine) -> dict[str, str]:
    """Return the options of ssh that the machine's login needs, of which it asks for nothing."""
    return {
        "BatchMode": "yes",
        "ConnectTimeout": "60",
        "GlobalKnownHostsFile": "/dev/null",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "PasswordAuthentication": "no",
        # Host keys are known: the guest's report has them.
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": f'"{machine.known_hosts}"',
    }


def ssh_argv(
    machine: Machine, port: int | str, remote: str, user: str = USER, options: Mapping[str, str] | None = None
) -> list[str]:
    """Return the command that logs in as *user* with the machine's key, and runs *remote*; *options* are further ones.

    The user is the seed's if nothing is said.
    """
    all_options = ssh_options(machine) | dict(options or {})
    return [
        "ssh",
        "-F", "none",
        "-i", str(machine.key),
        "-p", str(port),
        *(word for name, value in all_options.items() for word in ("-o", f"{name}={value}")),
        f"{user}@{HOST}",
        remote,
    ]  # fmt: skip


def login_checks(
    machine: Machine, look: Callable[[], None], port: int, message: Message, checks: Sequence[BootCheck]
) -> Iterator[BootCheck]:
    """Give the checks that need sshd; *look*, which reads the guests' pipes, is called each second."""
    settings = machine.build.plan.settings
    names = ("sshd", "login", *(["test-script"] if settings.test_script else []))
    gone = [check.name for check in checks if check.outcome == "failed" and check.name in ("sshd-installed", "network")]
    if gone:
        yield from (skipped(name, f"{gone[0]} failed") for name in names)
        return
    problem = why_no_sshd(look, port)
    yield judged("sshd", problem)
    if problem:
        yield from (skipped(name, "sshd failed") for name in names[1:])
        return
    lines = [f"[{HOST}]:{port} {key}\n" for key in message.host_keys]
    machine.known_hosts.write_text("".join(lines), encoding="ascii")
    login_seconds = _LOGIN_SECONDS[machine.virt_type]
    try:
        command.run(ssh_argv(machine, port, LOGIN), timeout=login_seconds, watch=look)
    except BuildError as error:
        yield judged("login", f"nobody can log in with the key of the seed's user: {error.said}")
        yield from (skipped(name, "login failed") for name in names[2:])
        return
    yield passed("login")
    if settings.test_script:
        limit = time_limit(settings, machine.virt_type)
        try:
            command.run(ssh_argv(machine, port, RUN_SCRIPT), stdin=settings.test_script, timeout=limit, watch=look)
        except CommandError as error:
            said = f": {error.last_line}" if error.last_line else ""
            yield judged("test-script", f"{settings.test_script.name} failed with status {error.status}{said}")
        except BuildError:
            yield judged("test-script", f"{settings.test_script.name} did not end within {format_duration(limit)}")
        else:
            yield passed("test-script")


def why_no_sshd(look: Callable[[], None], port: int) -> str:
    """Return why no sshd answers at *port*, empty if one does."""
    deadline = time.monotonic() + _BANNER_SECONDS
    with interrupts.interruptible():
        while time.monotonic() < deadline:
            look()
            # QEMU accepts the connection itself, and ends it if nothing in the guest listens.
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), 5.0) as connection:
                if connection.recv(64).startswith(b"SSH-2.0"):
                    return ""
            time.sleep(0.5)
    return "no sshd answers"
