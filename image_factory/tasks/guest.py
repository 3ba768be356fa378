"""Tasks in the booted guest: each on an overlay over what is done, all written to the disk when they are through.

The guest is the test boot's, with another unit: an sshd of its own, for root alone, whose files are on a tmpfs.
"""

import base64
import dataclasses
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from ..base import command, events, files, interrupts
from ..base.cleanup import released
from ..base.errors import BuildError, CommandError, ConfigurationError
from ..base.log import logger
from ..base.units import format_duration, format_size
from ..checks.testboot.guest import Guest, PortTakenError
from ..checks.testboot.login import ssh_argv, ssh_options, why_no_sshd
from ..checks.testboot.machine import (
    DISK_NODE,
    HOST,
    MONITOR,
    Machine,
    Purpose,
    block_node,
    firmware_for,
    free_port,
    key_argv,
    other_mac,
    overlay_argv,
    pipes,
    prepared,
    qemu_argv,
    seed_argv,
    time_limit,
)
from ..checks.testboot.matrix import firmwares
from ..checks.testboot.monitor import Monitor
from ..checks.testboot.report import BEGINNING, UNTIL_UP, boot_command, unit_credentials
from ..configuration.settings import Task
from ..finishing import copying
from ..machines import arch
from ..model import Artifact, Build, Plan
from ..parts import Group, State, Step, Steps, carry_out, doing
from . import KINDS, place
from . import programs as programs_of_tasks
from .copies import InSystem, putting, told
from .layers import Layers
from .playbooks import Login, check_playbooks, playbook_argv, run_playbook
from .running import Place, PlaceGoneError, run_task, script_argv

_UNIT = "image-factory-tasks"
_DESCRIPTION = "Login for tasks"
_DIRECTORY = f"/run/{_UNIT}.d"
# Another than that of the system's own sshd, which tasks may start anew.
_PORT = 22022
_PORT_TRIES = 5
_LOGIN_SECONDS = {"kvm": 60.0, "qemu": 180.0}
_SHOWN_LINES = 40
# QEMU stops a guest whose disk can't be written.
_LEAST_FREE = 16 << 20

# /run of Debian is mounted noexec, and its timers would have the package manager to themselves.  SELinux knows no sshd
# but that of the system, and has a login of no other; files get their labels in spite of it.  QEMU's network has the
# one address, which its DHCP gives too.
_SCRIPT = """\
cd /
umask 077
place=%(directory)s
mkdir -p $place && mount -t tmpfs -o mode=700,nosuid,nodev image-factory $place
echo '%(host_key)s' | base64 -d >$place/host-key
echo '%(key)s' >$place/keys
cat >$place/configuration <<.
Port %(port)s
HostKey $place/host-key
AuthorizedKeysFile $place/keys
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM yes
UseDNS no
PrintMotd no
PidFile none
Subsystem sftp internal-sftp
.
setenforce 0
systemctl stop apt-daily.timer apt-daily-upgrade.timer
sshd=$(command -v sshd || ls /usr/sbin/sshd)
mkdir -p -m 755 /run/sshd
[ "$sshd" ] && "$sshd" -D -f $place/configuration >/dev/null &
has_address() { ip -4 -o addr show scope global | grep -q inet; }
for second in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    has_address && break
    sleep 2
done
if ! has_address; then
    for card in /sys/class/net/*/device; do
        card=${card%%/device}
        card=${card##*/}
        ip link set "$card" up
        ip addr add 10.0.2.15/24 dev "$card"
        ip route add default via 10.0.2.2
        # It knows of no card that it has not seen set up, and is asked whatever resolv.conf says.
        resolvectl dns "$card" 10.0.2.3
        resolvectl domain "$card" '~.'
        break
    done
fi
if ! grep -q '^nameserver' /etc/resolv.conf; then
    echo nameserver 10.0.2.3 >$place/resolv.conf
    chmod 644 $place/resolv.conf
    file=$(readlink -m /etc/resolv.conf)
    case $file in
    /run/*) mkdir -p -m 755 "${file%%/*}" && (umask 022; cat $place/resolv.conf >"$file") ;;
    *)
        [ -e "$file" ] || { : >"$file" && echo "$file" >$place/made; }
        mount --bind $place/resolv.conf "$file"
        ;;
    esac
fi
command -v firewall-cmd && firewall-cmd --add-port %(port)s/tcp >&2
"""
_REPORT = """\
printf '{"stage":"finished"'
fact sshd echo "$sshd"
fact state echo "$state"
echo '}'
wait
"""
_STOPPING = '[ "$(systemctl is-system-running)" != stopping ]'
_PYTHON = "command -v python3 || ls /usr/libexec/platform-python"
# What cloud-init has of the seed, and what the unit has made where the system had nothing.
_LEAVING = (
    "rm -rf /var/lib/cloud/instance /var/lib/cloud/instances/image-factory-* /var/lib/cloud/data /var/lib/cloud/sem"
    " /var/log/cloud-init.log /var/log/cloud-init-output.log;"
    f" if [ -s {_DIRECTORY}/made ]; then file=$(cat {_DIRECTORY}/made); umount $file; rm -f $file; fi;"
    " systemctl poweroff"
)
_REBOOTING = "systemctl reboot"
# A layer is what a disk is when its machine loses power then.
_SETTLING = "sync"
_NO_LOGIN = (
    "It needs sshd, and cloud-init or systemd 256; tasks-via = namespace and tasks-after-cleaning do without a boot."
)
# A guest that is emulated may be silent for long.
_KEPT_ALIVE = {"ServerAliveInterval": "30", "ServerAliveCountMax": "20"}


def _given(machine: Machine) -> tuple[dict[str, str], dict[str, str]]:
    host_key = _host_key(machine)
    command.run([*key_argv(machine)[:-1], str(host_key)])
    kind, public = host_key.with_suffix(".pub").read_text(encoding="ascii").split()[:2]
    # The port is known when QEMU is started.
    (machine.directory / "host-key.known").write_text(f"{kind} {public}", encoding="ascii")
    values = {
        "directory": _DIRECTORY,
        "host_key": base64.b64encode(host_key.read_bytes()).decode(),
        "key": machine.public_key,
        "port": _PORT,
    }
    script = BEGINNING + _SCRIPT % values + UNTIL_UP + _REPORT
    # cloud-init is to do nothing but start the unit: no user, no host name, no host keys, no network of its own.
    data = {
        "bootcmd": [boot_command(script, _UNIT, _DESCRIPTION)],
        "cloud_init_modules": ["bootcmd"],
        "cloud_config_modules": [],
        "cloud_final_modules": [],
        "users": [],
        "preserve_hostname": True,
        "ssh_deletekeys": False,
    }
    seed = {
        "user-data": f"#cloud-config\n{json.dumps(data, indent=1)}\n",
        "meta-data": f"instance-id: image-factory-{secrets.token_hex(4)}\n",
        "network-config": "config: disabled\n",
    }
    return seed, unit_credentials(script, _UNIT, _DESCRIPTION) | _NETWORK


# Without a configuration networkd would wait two minutes for an address.  Any of the system's own comes before it.
_NETWORK = {"network.network.95-image-factory": "[Match]\nType=ether\n[Network]\nDHCP=yes\n"}
_PURPOSE = Purpose("tasks", 1, _PORT, _given, reboots=True, monitored=True, credentials=3)


def _host_key(machine: Machine) -> Path:
    return machine.directory / "host-key"


def programs(plan: Plan) -> list[str]:
    """Return the programs that the tasks of *plan* need in a guest."""
    if not _wanted(plan):
        return []
    qemu = arch.ARCHITECTURES[plan.settings.arch].qemu
    return [qemu, "qemu-img", "ssh", "ssh-keygen", "xorriso", *programs_of_tasks(plan)]


def check(plan: Plan) -> None:
    """Raise ConfigurationError if it is known that the tasks of *plan* can't be carried out in a guest."""
    if not _wanted(plan):
        return
    settings = plan.settings
    if settings.arch not in arch.BOOTABLE:
        raise ConfigurationError(f"[{plan.image}] tasks: nothing boots {settings.arch} here.")
    if _firmware(plan) == "uefi":
        firmware_for(settings.arch)
    check_playbooks(plan)
    if not settings.seal:
        logger.warning(
            "[%s] tasks: without 'seal = yes' the image has the machine-id and the logs of the boot for its tasks.",
            plan.image,
        )


def steps(build: Build) -> Iterator[Step | Group]:
    """Give the steps of the tasks before cleaning, if they run in the guest."""
    plan = build.plan
    if not _wanted(plan):
        return
    layers = Layers(build)
    left = layers.left()
    if build.resumed and (not left if build.until_task else layers.done_path.exists()):
        return
    guest = _TaskGuest(build, layers)
    machine = guest.machine
    booting = [
        overlay_argv(machine),
        key_argv(machine),
        [*key_argv(machine)[:-1], str(_host_key(machine))],
        seed_argv(machine),
        qemu_argv(machine, "02:XX:XX:XX:XX:XX", "PORT"),
    ]
    inside = [
        Step("Booting for tasks", doing(guest.boot), booting),
        *(
            Step(f"Task {task.name}", doing(partial(guest.task, task, count)), guest.commands(task, count))
            for count, task in left
        ),
    ]
    if not build.until_task:
        inside.append(Step("Shutting down", doing(guest.shut_down), [guest.ssh(_LEAVING)]))
    yield Group(inside, guest.run)


def writing_steps(build: Build) -> Iterator[Step]:
    """Give the step that writes to the disk what all tasks have done, in a build that has got through them."""
    if _wanted(build.plan):
        layers = Layers(build)
        yield Step(
            "Writing what tasks have done",
            doing(partial(_write, layers)),
            [_write_argv(build, layers)],
            when=lambda state: layers.done_path.exists() or layers.writing_path.exists(),
        )


def _wanted(plan: Plan) -> bool:
    return bool(plan.tasks) and place(plan) == "guest"


def _firmware(plan: Plan) -> str:
    return firmwares(plan.settings)[0]


def _write_argv(build: Build, layers: Layers) -> list[str]:
    # ``-d``: the layers stay whole, so that an end meanwhile is no harm.
    return ["qemu-img", "commit", "-q", "-d", "-b", str(build.disk_path), "-f", "qcow2", str(layers.writing_path)]


def _write(layers: Layers, state: State) -> None:
    """Write the layers to the disk; what was not written whole is written again by --resume."""
    if layers.done_path.exists():
        files.move(layers.done_path, layers.writing_path)
    command.run(_write_argv(state.build, layers))
    # While it is there, the others are needed.
    layers.writing_path.unlink()
    layers.remove([])


def _machine(build: Build, layers: Sequence[Path] = ()) -> Machine:
    disk = build.disk_path
    size = disk.stat().st_size if disk.exists() else 0
    artifact = Artifact(layers[-1], "qcow2", size) if layers else Artifact(disk, "raw", size)
    restricted = not build.plan.settings.tasks_network
    return Machine(build, artifact, _firmware(build.plan), build.virt_type, 1, _PURPOSE, restricted)


class _TaskGuest:
    """The guest in which the tasks of *build* run one after the other."""

    def __init__(self, build: Build, layers: Layers) -> None:
        self._layers = layers
        self.machine = _machine(build, layers.kept())
        self._build, self._plan = build, build.plan
        self._node = DISK_NODE
        self._monitor: Monitor | None = None
        self._port: int | str = "PORT"
        self._guest: Guest | None = None
        self._make_guest: Callable[[Machine], Guest] | None = None
        self._stack = ExitStack()

    def run(self, state: State, steps: Steps) -> State:
        """Carry out *steps*; the guest is gone afterwards, and with it what is not to be kept."""
        # Those of tasks that have changed.
        self._layers.remove(self._layers.kept())
        with released(self._end):
            try:
                return carry_out(state, steps)
            except BuildError as error:
                self._explain()
                if state.attended and self._guest and not isinstance(error, PlaceGoneError):
                    error.attended = True
                    self._look(error)
                raise

    def _end(self) -> None:
        self._stack.close()

    def _explain(self) -> None:
        for line in [*self._guest.lines][-_SHOWN_LINES:] if self._guest else []:
            logger.error("console: %s", line)

    def _look(self, error: BuildError) -> None:
        """Let the user look at the guest in which a task has failed."""
        logger.error("%s", error.message)
        logger.error("A shell is opened in the guest; the build ends when you leave it.")
        argv = self.ssh("cd; exec ${SHELL:-/bin/sh} -l")
        command.interact([argv[0], "-t", *argv[1:]])

    def ssh(self, remote: str) -> list[str]:
        """Return the command that runs *remote* as root in the guest."""
        return ssh_argv(self.machine, self._port, remote, "root", _KEPT_ALIVE)

    @property
    def _place(self) -> Place:
        own = {"playbook": self._playbook, "copy": self._copy}
        return Place(self.ssh, f"{_DIRECTORY}/task", self._watch, own)

    def commands(self, task: Task, count: int) -> list[list[str]]:
        """Return the commands that carry out *task*, with which *count* are done."""
        if KINDS[task.type].script:
            argv = [script_argv(task, self._place)]
        elif task.type == "copy":
            argv = [*told(task.copies), self.ssh(putting(self._place.directory))]
        else:
            argv = [playbook_argv(self._plan, task, Path("INVENTORY"))]
        keeping = [self.ssh(_SETTLING), self._next_argv(count)]
        return [*argv, *([self.ssh(_REBOOTING)] if task.reboot else []), *keeping]

    def boot(self, state: State) -> None:
        """Start the guest, and wait until the system is up."""
        for _ in range(_PORT_TRIES):
            with ExitStack() as stack, suppress(PortTakenError):
                machine = self.machine
                stack.enter_context(prepared(machine))
                console, report = stack.enter_context(pipes(machine))
                self._port = free_port()
                known = (machine.directory / "host-key.known").read_text(encoding="ascii")
                machine.known_hosts.write_text(f"[{HOST}]:{self._port} {known}\n", encoding="ascii")
                argv = qemu_argv(machine, other_mac(), self._port)
                ended = stack.enter_context(command.background(argv, machine.directory / "qemu.log"))
                self._make_guest = partial(Guest, ended=ended, console=console, report=report)
                self._guest = self._make_guest(machine)
                self._wait_until_up()
                self._monitor = Monitor(machine.pipe(MONITOR), self._watch)
                stack.callback(self._monitor.close)
                self._monitor.tell("qmp_capabilities")
                self._stack = stack.pop_all()
                return
        raise BuildError(f"No port of {HOST} could be had for the machine.", hint="Try again.")

    def _wait_until_up(self) -> None:
        guest = self._guest
        assert guest
        try:
            problem = guest.wait_for_report(self._limit, self._look_at_space)
        except PlaceGoneError as error:
            problem = error.message
        if problem:
            # One that says why it does not come up has no need of another way.
            hint = _NO_LOGIN if "report" in problem else "The log has the last lines of its console."
            raise BuildError(f"The system did not come up for its tasks: {problem}.", hint=hint)
        if guest.message and not guest.message.fact("sshd"):
            raise BuildError("The system has no sshd, by which its tasks are run.", hint=_NO_LOGIN)
        problem = why_no_sshd(guest.look, int(self._port))
        if problem:
            raise BuildError(f"The system came up, but for its tasks {problem}.", hint=_NO_LOGIN)

    @property
    def _limit(self) -> float:
        return time_limit(self._plan.settings, self.machine.virt_type)

    def _watch(self, why_lost: Callable[[Guest], str] = Guest.lost) -> None:
        assert self._guest
        self._guest.look()
        problem = why_lost(self._guest)
        if problem:
            raise PlaceGoneError(f"the guest is lost: {problem}")
        self._look_at_space()

    def _look_at_space(self) -> None:
        # QEMU stops the guest where this disk is full.
        if shutil.disk_usage(self.machine.directory).free < _LEAST_FREE:
            raise PlaceGoneError(f"{self.machine.directory} has less than {format_size(_LEAST_FREE)} free")

    def task(self, task: Task, count: int, state: State) -> None:
        """Carry out *task*, see whether the guest is there afterwards, and keep what the *count* tasks have done."""
        run_task(task, self._place)
        self._see_it_is_there(task)
        if task.reboot:
            self._reboot(task)
        if self._layers.is_sure(count):
            self._keep(count)

    def _next_argv(self, count: int) -> list[str]:
        # The layer has its name only when QEMU writes to the next overlay.
        below = ["-u", "-F", "qcow2", "-b", str(self._layers.path(count))]
        size = str(self.machine.larger_size or "SIZE")
        return ["qemu-img", "create", "-q", "-f", "qcow2", *below, str(self._machine_after(count).overlay), size]

    def _machine_after(self, count: int) -> Machine:
        return dataclasses.replace(self.machine, layers=count)

    def _keep(self, count: int) -> None:
        """Keep the overlay as a layer, and give QEMU another one over it, while the guest runs."""
        assert self._monitor
        try:
            command.run(self.ssh(_SETTLING), quiet=True, timeout=self._limit, watch=self._watch)
        except CommandError as error:
            raise PlaceGoneError(f"The guest's disk can't be settled: {error.said}.") from error
        command.run(self._next_argv(count))
        full, self.machine = self.machine.overlay, self._machine_after(count)
        node = f"{DISK_NODE}-{count}"
        self._monitor.tell("blockdev-add", **block_node(node, "qcow2", str(self.machine.overlay)), backing=None)
        self._monitor.tell("blockdev-snapshot", node=self._node, overlay=node)
        self._node = node
        # Its other name stays: QEMU has opened it by that once more, to read it only.
        os.link(full, self._layers.path(count))

    def _see_it_is_there(self, task: Task) -> None:
        try:
            self._said(_STOPPING)
        except PlaceGoneError as error:
            raise PlaceGoneError(f"After task {task.name} {error.message}.") from error
        except CommandError as error:
            why = "the guest goes off or reboots by itself" if error.status == 1 else f"nobody can log in: {error.said}"
            raise PlaceGoneError(f"After task {task.name} {why}.", hint="'task-reboot = after' reboots it.") from error
        except BuildError as error:
            raise PlaceGoneError(f"After task {task.name} the guest answers no more: {error.message}.") from error

    def _said(self, remote: str) -> str:
        seconds = _LOGIN_SECONDS[self.machine.virt_type]
        return command.run(self.ssh(remote), capture=True, quiet=True, timeout=seconds, watch=self._watch)

    def _reboot(self, task: Task) -> None:
        assert self._make_guest
        # What it reports may come before ssh notices.
        guest = self._guest = self._make_guest(self.machine)
        with suppress(BuildError):
            seconds = _LOGIN_SECONDS[self.machine.virt_type]
            command.run(self.ssh(_REBOOTING), quiet=True, timeout=seconds, watch=guest.look)
        try:
            self._wait_until_up()
        except BuildError as error:
            raise PlaceGoneError(f"After the reboot of task {task.name}: {error.message}", hint=error.hint) from error

    def _copy(self, task: Task, timeout: float | None) -> None:
        copying.copy_task(self._build, InSystem(self.ssh, self._place.directory, self._watch, timeout), task)

    def _playbook(self, task: Task, timeout: float | None) -> None:
        try:
            self._said(_PYTHON)
        except CommandError as error:
            raise BuildError(f"the system has no Python, which a playbook needs ({error.said})") from error
        login = Login(HOST, self._port, self.machine.key, ssh_options(self.machine), f"{_DIRECTORY}/ansible")
        # It may reboot the system, and wait for it: so only a machine that has ended is lost.
        run_playbook(self._plan, task, login, timeout, partial(self._watch, Guest.off))
        assert self._make_guest
        self._guest = self._make_guest(self.machine)

    def shut_down(self, state: State) -> None:
        """Have the guest go off in good order, and keep its overlay as what is to be written to the disk."""
        guest = self._guest
        assert guest
        with suppress(CommandError):
            command.run(self.ssh(_LEAVING), timeout=_LOGIN_SECONDS[self.machine.virt_type], watch=guest.look)
        deadline = time.monotonic() + self._limit
        with interrupts.interruptible():
            while not guest.off():
                guest.look()
                events.tell(events.TimePassed())
                if time.monotonic() >= deadline:
                    raise BuildError(f"The guest did not go off within {format_duration(self._limit)} after its tasks.")
                time.sleep(1.0)
        if guest.off() != Guest.WENT_OFF:
            raise BuildError(f"The guest was lost when it was to go off: {guest.off()}.")
        files.move(self.machine.overlay, self._layers.done_path)
