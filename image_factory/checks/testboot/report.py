"""The guest's report in a test boot: the script that writes it, and the checks of what it says.

The guest is not trusted: its report has a limited length, and nothing in it is used unless it has the form
that it must have.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...base.events import BootCheck
from ...base.log import printable
from ...base.units import format_size
from ...finishing import firstboot
from ...machines.devices import SECURE_BOOT, TPM

PORT = "org.image-factory.report"
UNIT = "image-factory-report"
_DESCRIPTION = "Report of the test boot"
# The user that the NoCloud seed asks for.
USER = "image-factory"

# Bytes of a report: it is at most some dozen facts of 64 KiB each, in base64.
LONGEST_LINE = 2 << 20
_LONGEST_SHOWN = 200

# Facts are in base64, as no shell can write JSON's strings.  systemd starts the script as a unit of the
# kind ``simple``, whose own job is done at once: else the system would be "starting" as long as the script waits.
# Asking again and again would take a tenth of the time of a guest that is emulated; systemd before 240 does not wait.
# Facility 0 leaves out what systemd writes to the kernel's log.
# A guest without cloud-init, which has no user from the seed, gets one here.
BEGINNING = f"""\
export LC_ALL=C
port=/dev/virtio-ports/{PORT}
until [ -c "$port" ]; do sleep 1; done
exec >"$port" 2>/dev/null
fact() {{
    name=$1; shift
    printf ',"%s":"%s"' "$name" "$("$@" 2>/dev/null | head -c 65536 | base64 | tr -d '\\n')"
}}
echo '{{"stage":"started"}}'
"""
UNTIL_UP = """\
while :; do
    state=$(timeout 10 systemctl is-system-running --wait)
    [ "$state" ] || state=$(systemctl is-system-running)
    [ "$state" = initializing ] || [ "$state" = starting ] || break
    printf '{"stage":"starting"'
    fact jobs systemctl list-jobs --no-legend --no-pager
    echo '}'
    sleep 2
done
"""
_USER = """\
partitions() {
    for entry in /sys/class/block/*/partition; do
        device=$(readlink -f "${entry%%/partition}")
        echo "${device##*/} $(basename "${device%%/*}") $(cat "$device/start") $(cat "$device/size")"
    done
}
if ! command -v cloud-init >/dev/null; then
    useradd -m -s /bin/sh -p '*' %(user)s
    home=$(getent passwd %(user)s | cut -d: -f6)
    mkdir -m 700 "$home/.ssh"
    echo '%(key)s' >"$home/.ssh/authorized_keys"
    chown -R %(user)s: "$home/.ssh"
    echo '%(user)s ALL=(ALL) NOPASSWD:ALL' >/etc/sudoers.d/%(user)s
fi
"""
_FIRST_BOOT = f"""\
fact first-boot-left ls -d {" ".join(f"/{path}" for path in (firstboot.DIRECTORY, *firstboot.unit_paths()))}
fact first-boot-log journalctl -b -o cat --no-pager -n 20 _SYSTEMD_UNIT={firstboot.SERVICE}
"""
_REPORT = f"""\
printf '{{"stage":"finished"'
{_FIRST_BOOT}\
fact state echo "$state"
fact failed systemctl list-units --state=failed --plain --no-legend --no-pager
fact machine-id cat /etc/machine-id
fact host-keys sh -c 'cat /etc/ssh/ssh_host_*_key.pub'
fact addresses ip -o addr show scope global
fact routes sh -c 'ip -4 route show default; ip -6 route show default'
fact root df -Pk /
fact root-device findmnt -n -o SOURCE /
fact partitions partitions
fact growpart command -v growpart
fact has-cloud-init command -v cloud-init
fact cloud-init cat /run/cloud-init/result.json
fact sshd sh -c 'command -v sshd || ls /usr/sbin/sshd'
fact secure-boot od -An -tu1 -j4 /sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c
fact tpm cat /sys/class/tpm/tpm0/tpm_version_major
fact kernel journalctl -b -p err -o cat --no-pager _TRANSPORT=kernel SYSLOG_FACILITY=0
fact journal journalctl -b -p warning -n 60 -o short-monotonic --no-pager
echo '}}'
"""


def started_by(script: str, unit: str) -> str:
    """Return the shell's command that runs *script* as *unit*; it has no quotes, backslashes, dollars or per cent."""
    path = f"/run/{unit}"
    return f"echo {base64.b64encode(script.encode()).decode()} | base64 -d >{path} && exec /bin/sh {path}"


def unit_credentials(script: str, unit: str, description: str) -> dict[str, str]:
    """Return the credentials of the system, by name, with which systemd 256 and later have *script* as *unit*.

    See systemd.system-credentials(7): systemd.extra-unit.*, systemd.unit-dropin.*.
    """
    command = started_by(script, unit)
    return {
        f"systemd.extra-unit.{unit}.service": (
            f"[Unit]\nDescription={description}\n[Service]\nExecStart=/bin/sh -c '{command}'\n"
        ),
        "systemd.unit-dropin.multi-user.target": f"[Unit]\nWants={unit}.service\n",
    }


def boot_command(script: str, unit: str, description: str) -> list[str]:
    """Return the command with which cloud-init has *script* run as *unit*, where there is none of that name yet."""
    options = f"--quiet --no-block --unit={unit} '--description={description}'"
    start = f"systemd-run {options} /bin/sh -c '{started_by(script, unit)}' || :"
    return ["sh", "-c", start]


def _script(public_key: str) -> str:
    return BEGINNING + _USER % {"user": USER, "key": public_key} + UNTIL_UP + _REPORT


def credentials(public_key: str) -> dict[str, str]:
    """Return the credentials of the system with which systemd 256 and later have the unit."""
    return unit_credentials(_script(public_key), UNIT, _DESCRIPTION)


def seed_files(public_key: str, instance: str) -> dict[str, str]:
    """Return the files of the NoCloud seed, by name: a user with *public_key*, and the unit where there is none yet."""
    user = {
        "name": USER,
        "shell": "/bin/sh",
        "lock_passwd": True,
        "sudo": "ALL=(ALL) NOPASSWD:ALL",
        "ssh_authorized_keys": [public_key],
    }
    data = {"users": ["default", user], "bootcmd": [boot_command(_script(public_key), UNIT, _DESCRIPTION)]}
    return {
        # JSON is YAML.
        "user-data": f"#cloud-config\n{json.dumps(data, indent=1)}\n",
        "meta-data": f"instance-id: {instance}\nlocal-hostname: {instance}\n",
    }


@dataclass(frozen=True)
class Message:
    """What the guest says: the *stage* that it is at, and facts by name."""

    stage: str
    facts: dict[str, str]

    def fact(self, name: str) -> str:
        """Return the fact *name*, empty if there is none."""
        return self.facts.get(name, "").strip()

    def lines(self, name: str) -> list[str]:
        """Return the lines of the fact *name*, fit to be shown."""
        return [printable(line).strip()[:_LONGEST_SHOWN] for line in self.fact(name).splitlines() if line.strip()]

    @property
    def failed_units(self) -> list[str]:
        """The names of the units that failed."""
        return [line.split()[0] for line in self.lines("failed")]

    @property
    def machine_id(self) -> str | None:
        """The machine's identity, None if it is none."""
        found = self.fact("machine-id")
        return found if re.fullmatch("[0-9a-f]{32}", found) and set(found) != {"0"} else None

    @property
    def host_keys(self) -> list[str]:
        """The public keys of sshd: kind and base64, as known_hosts has them."""
        found = re.findall(r"^([a-z0-9@.-]+ [A-Za-z0-9+/]+={0,2})(?:\s|$)", self.fact("host-keys"), re.MULTILINE)
        return [key for key in found if _fingerprint(key)]

    @property
    def fingerprints(self) -> list[str]:
        """The fingerprints of those, as ssh-keygen(1) shows them."""
        return [fingerprint for fingerprint in map(_fingerprint, self.host_keys) if fingerprint]


def _fingerprint(key: str) -> str | None:
    try:
        digest = hashlib.sha256(base64.b64decode(key.split()[1], validate=True)).digest()
    except binascii.Error:
        return None
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def parse(line: bytes) -> Message:
    """Return what *line* says; ValueError, with its beginning, if it is not what the script writes."""
    try:
        document = json.loads(line)
        stage = document.pop("stage")
        if not isinstance(stage, str) or not all(isinstance(value, str) for value in document.values()):
            raise TypeError
        facts = {
            name: base64.b64decode(value, validate=True).decode("utf-8", errors="replace")
            for name, value in document.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        shown = printable(line[:60].decode("utf-8", errors="replace"))
        raise ValueError(shown) from None
    return Message(stage, facts)


@dataclass(frozen=True)
class Subject:
    """What is known of the image that reports: the size of its disk, and of the *larger* one that it was booted on.

    *allowed* are regular expressions of errors in the kernel's log.  *first_boot* is whether it has scripts for that.
    *in_memory* is whether it has no disk, *secure_boot* whether its firmware starts only what is signed, and *tpm*
    whether it has a TPM 2.0.
    """

    disk_size: int
    larger_size: int
    allowed: Sequence[str] = ()
    first_boot: bool = False
    in_memory: bool = False
    secure_boot: bool = False
    tpm: bool = False


def passed(name: str) -> BootCheck:
    """Return the check *name* as passed."""
    return BootCheck(name, "passed")


def judged(name: str, problem: str) -> BootCheck:
    """Return the check *name* as failed with *problem*, as passed if that is empty."""
    return BootCheck(name, "failed", problem) if problem else passed(name)


def skipped(name: str, reason: str) -> BootCheck:
    """Return the check *name* as skipped for *reason*."""
    return BootCheck(name, "skipped", reason)


def checks_of(report: Message, subject: Subject) -> list[BootCheck]:
    """Return what the *report* of a guest that is up says of each check, the gravest ones first."""
    return [
        _root_space(report, subject),
        judged("sshd-installed", "" if report.fact("sshd") else "sshd is not installed"),
        judged("network", _why_no_network(report)),
        judged("units", _why_degraded(report)),
        _cloud_init(report),
        _first_boot(report, subject),
        judged("machine-id", "" if report.machine_id else "its machine-id is none"),
        judged("host-keys", "" if report.host_keys else "it has no SSH host keys"),
        _root_size(report, subject),
        judged("kernel-log", _kernel_errors(report, subject.allowed)),
        *([judged(SECURE_BOOT, _why_insecure(report))] if subject.secure_boot else []),
        *([judged(TPM, "" if report.fact("tpm") == "2" else "its kernel knows no TPM 2.0")] if subject.tpm else []),
    ]


def identity_checks(report: Message, others: Sequence[Message]) -> list[BootCheck]:
    """Return the checks that *report* shares no identity with the boots of *others*."""
    if not others:
        return []
    same_id = any(report.machine_id == other.machine_id for other in others)
    same_keys = any(set(report.fingerprints) & set(other.fingerprints) for other in others)
    return [
        judged("machine-id-new", "two boots have the same machine-id" if same_id else ""),
        judged("host-keys-new", "two boots have the same SSH host keys" if same_keys else ""),
    ]


def _root_kib(report: Message) -> tuple[int, int, int] | None:
    """Return what df says of the root filesystem: size, used, available."""
    match = re.search(r"\s([0-9]{1,18})\s+([0-9]{1,18})\s+([0-9]{1,18})\s+\S+\s+/$", report.fact("root"), re.MULTILINE)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def _root_space(report: Message, subject: Subject) -> BootCheck:
    name = "root-space"
    if subject.in_memory:
        return skipped(name, "its root is in memory")
    root = _root_kib(report)
    if root is None:
        return judged(name, "the size of its root filesystem is unknown")
    _, used, available = root
    size = format_size(subject.disk_size)
    # Compare with the image's own disk: the filesystem has grown since.
    if available == 0 or used << 10 > subject.disk_size * 0.95:
        return judged(name, f"its root filesystem is full: {format_size(used << 10)} of a disk of {size}")
    return passed(name)


def _why_no_network(report: Message) -> str:
    # QEMU's forwarded port reaches a guest by IPv4 only.
    if not re.search(r"\binet [0-9]", report.fact("addresses")):
        return "it has no network: no card has an IPv4 address"
    return "" if report.fact("routes") else "it has no network: there is no default route"


def _why_degraded(report: Message) -> str:
    state = printable(report.fact("state"))[:_LONGEST_SHOWN]
    units = report.failed_units
    if units:
        return f"{', '.join(units)} failed"
    return "" if state == "running" else f"its state is {state or 'unknown'}"


def _cloud_init(report: Message) -> BootCheck:
    name = "cloud-init"
    if not report.fact("has-cloud-init"):
        return skipped(name, "it is not installed")
    try:
        told = json.loads(report.fact("cloud-init"))["v1"]
        source, errors = str(told["datasource"]), list(told["errors"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return judged(name, "cloud-init did not run to its end")
    if errors:
        return judged(name, f"cloud-init failed: {printable(' '.join(str(errors[0]).split()))[:_LONGEST_SHOWN]}")
    if not source.startswith("DataSourceNoCloud"):
        return judged(name, f"cloud-init did not take the NoCloud seed: {printable(source)[:_LONGEST_SHOWN]}")
    return passed(name)


def _first_boot(report: Message, subject: Subject) -> BootCheck:
    name = "first-boot"
    if not subject.first_boot:
        return skipped(name, "the image has no scripts for it")
    if not report.fact("first-boot-left"):
        return passed(name)
    said = report.lines("first-boot-log")
    return judged(name, f"its first-boot scripts did not succeed{': ' if said else ''}{' / '.join(said[-3:])}")


def _root_size(report: Message, subject: Subject) -> BootCheck:
    """Return whether the root filesystem fills the larger disk, if the image claims that it will."""
    name = "root-size"
    if subject.in_memory:
        return skipped(name, "its root is in memory")
    if not report.fact("growpart"):
        return skipped(name, "the image has no growpart")
    device = report.fact("root-device").partition("[")[0].removeprefix("/dev/")
    partitions = [line.split() for line in report.lines("partitions")]
    found = [words for words in partitions if len(words) == 4 and all(map(str.isdecimal, words[2:]))]
    roots = [words for words in found if words[0] == device]
    if not roots:
        return skipped(name, "the root filesystem is not on a partition of its own")
    _, disk, start, _ = roots[0]
    if any(words[1] == disk and int(words[2]) > int(start) for words in found):
        return skipped(name, "the root's partition is not the last one of the disk")
    root = _root_kib(report)
    # The larger disk is twice the size, of which a filesystem keeps less than a quarter to itself.
    if root is None or root[0] << 10 < (subject.larger_size - int(start) * 512) * 3 // 4:
        size = "unknown" if root is None else format_size(root[0] << 10)
        return judged(name, f"its root filesystem did not grow: {size} on a disk of {format_size(subject.larger_size)}")
    return passed(name)


def _why_insecure(report: Message) -> str:
    return "" if report.fact("secure-boot") == "1" else "its kernel was not booted securely"


def _kernel_errors(report: Message, allowed: Sequence[str]) -> str:
    found = [line for line in report.lines("kernel") if not any(re.search(pattern, line) for pattern in allowed)]
    if not found:
        return ""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"its kernel logged an error: {found[0]}{more}"
