"""virt-install's command line, the probe of KVM and the console's log."""

import datetime
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.configuration.settings import ImageSettings
from image_factory.model import Build, Plan
from image_factory.sources.installer import virt_install
from image_factory.sources.installer.watch import Limits

BASE = """[image]
linux = /netboot/linux
initrd = /netboot/initrd.gz
"""


def settings(tmp_path: Path, text: str) -> ImageSettings:
    path = tmp_path / "image-factory.conf"
    path.write_text(BASE + text)
    return Configuration({"IMAGE_FACTORY_CONFIG": str(path)}).image("image", {})


def plan(tmp_path: Path, text: str = "", output_dir: Path = Path("/output")) -> Plan:
    return Plan("image", settings(tmp_path, text), datetime.date(2026, 1, 2), output_dir, {})


def argv(tmp_path: Path, text: str = "", virt_type: str = "qemu", directory: str = "/output/.work") -> list[str]:
    return virt_install.virt_install_argv(
        Build(plan(tmp_path, text), Path(directory), "vm"), ["--location", "LOCATION"], virt_type
    )


GOLDEN = """virt-install
--connect qemu:///system
--name vm
--virt-type qemu
--cpu mode=maximum
--vcpus 1
--memory 1024
--osinfo detect=on,require=off
--disk path=/output/.work/disk.raw,bus=virtio,format=raw,cache=unsafe,discard=unmap,error_policy=report
--network user,model=virtio
--graphics none
--channel none
--console pty,target_type=serial,log.file=/output/.work/console.log
--noautoconsole
--wait -1
--noreboot
--location LOCATION
--extra-args 
"""  # noqa: W291

UEFI = "firmware=efi,firmware.feature0.name=secure-boot,firmware.feature0.enabled=no,nvram=/output/.work/nvram.fd"


def as_lines(words: list[str]) -> str:
    """Return an option and its value on one line."""
    lines: list[str] = []
    for word in words:
        if not lines or word.startswith("--") or " " in lines[-1] or not lines[-1].startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines) + "\n"


def test_defaults(tmp_path: Path) -> None:
    assert as_lines(argv(tmp_path)) == GOLDEN


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("cores = 4\nram = 2.5G", ["--vcpus 4", "--memory 2560"]),
        ("mac = 52:54:00:AB:cd:ef", ["--network user,model=virtio,mac=52:54:00:ab:cd:ef"]),
        ("network = bridge=br0", ["--network bridge=br0"]),
        ("vnc = localhost:13", ["--graphics vnc,port=5913,listen=localhost"]),
        ("vnc = :0", ["--graphics vnc,port=5900"]),
        ("vnc = 127.0.0.1", ["--graphics vnc,port=-1,listen=127.0.0.1"]),
        ("vnc = [::1]:1", ["--graphics vnc,port=5901,listen=::1"]),
        ("osinfo = debian12", ["--osinfo debian12"]),
        ("cpu = EPYC", ["--cpu EPYC"]),
        ("firmware = uefi", ["--machine q35", f"--boot {UEFI}"]),
        ("firmware = hybrid", ["--machine q35", f"--boot {UEFI}"]),
        ("arch = aarch64", ["--arch aarch64", "--machine virt", f"--boot {UEFI}"]),
        (
            "preseed = /a/p.cfg\nappend = quiet",
            ["--extra-args preseed/url=file:///p.cfg quiet", "--initrd-inject /output/.work/answers/p.cfg"],
        ),
        ("kickstart = /a/k.ks", ["--extra-args inst.ks=file:///k.ks", "--initrd-inject /output/.work/answers/k.ks"]),
        ("yast = /a/y.xml", ["--extra-args autoyast=file:///y.xml", "--initrd-inject /output/.work/answers/y.xml"]),
    ],
)
def test_settings_in_the_command(tmp_path: Path, text: str, lines: list[str]) -> None:
    found = as_lines(argv(tmp_path, text)).splitlines()
    assert [line for line in lines if line not in found] == []


def test_kvm(tmp_path: Path) -> None:
    lines = as_lines(argv(tmp_path, virt_type="kvm")).splitlines()
    assert "--virt-type kvm" in lines
    assert "--cpu host-passthrough" in lines


FIRMWARE = """{"interface-types": ["uefi"], "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}]}"""


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("arch = aarch64\nfirmware = bios", "[image] firmware: aarch64 has no bios.", "Use uefi."),
        ("arch = aarch64\nfirmware = hybrid", "[image] firmware: aarch64 has no hybrid.", "Use uefi."),
        (
            "arch = aarch64",
            "[image] firmware = uefi: this machine has no UEFI for aarch64.",
            "Install it: apt-get install qemu-efi-aarch64",
        ),
        ("firmware = uefi\narch = x86_64\nvirt-type = kvm", None, None),
        ("firmware = hybrid", None, None),
        ("", None, None),
    ],
)
def test_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str | None, hint: str | None
) -> None:
    """The others are what QEMU's packages or a user may have there, and libvirt doesn't read."""
    for name, content in {"10-bad.json": "{", "20-list.json": "[1]", "60-good.json": FIRMWARE}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "30-directory.json").mkdir()
    monkeypatch.setattr(virt_install, "_FIRMWARE_DIRECTORIES", (tmp_path / "none", tmp_path))
    if message is None:
        virt_install.check_machine(plan(tmp_path, text))
        return
    with pytest.raises(ConfigurationError) as caught:
        virt_install.check_machine(plan(tmp_path, text))
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_no_uefi_for_hybrid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virt_install, "_FIRMWARE_DIRECTORIES", (tmp_path,))
    with pytest.raises(ConfigurationError) as caught:
        virt_install.check_machine(plan(tmp_path, "firmware = hybrid"))
    assert caught.value.hint == "Install it: apt-get install ovmf"


def test_kvm_of_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^\[image\] virt-type: KVM runs no aarch64 on x86_64\.$"):
        virt_install.check_machine(plan(tmp_path, "arch = aarch64\nvirt-type = kvm"))
    assert not virt_install.has_to_probe(plan(tmp_path, "arch = aarch64").settings)
    assert virt_install.has_to_probe(plan(tmp_path).settings)
    assert virt_install.probed_virt_type(plan(tmp_path), None) == "qemu"


@pytest.mark.parametrize("character", "&<>'\"")
def test_output_directory_that_virt_install_cannot_use(tmp_path: Path, character: str) -> None:
    with pytest.raises(ConfigurationError, match="virt-install can't use /var/tmp/"):
        virt_install.check_output_dir(plan(tmp_path, output_dir=Path(f"/var/tmp/{character}")))


def test_paths_with_commas_and_backslashes(tmp_path: Path) -> None:
    """virt-install splits options at commas, but not in double quotes; its own parser is asked."""
    directory = "/out,put x \\y"
    words = argv(tmp_path, directory=directory)
    disk = words[words.index("--disk") + 1]
    done = run_virtinst_parser(disk)
    assert done["path"] == f"{directory}/disk.raw"
    assert done["cache"] == "unsafe"


def run_virtinst_parser(option: str) -> dict[str, Any]:
    import sys

    sys.path.append("/usr/share/virt-manager")
    try:
        from virtinst import cli
    finally:
        sys.path.pop()
    parsed: dict[str, Any] = cli.parse_optstr_tuples(option)
    return dict(parsed)


@pytest.mark.parametrize(
    ("text", "virt_type", "expected"),
    [
        ("", "kvm", (7200, 600)),
        ("", "qemu", (28800, 1800)),
        ("install-timeout = 1h\nstall-timeout = 5m", "qemu", (3600, 300)),
        ("install-timeout = none", "kvm", (math.inf, 600)),
    ],
)
def test_time_limits_know_emulation(tmp_path: Path, text: str, virt_type: str, expected: tuple[float, float]) -> None:
    assert virt_install.limits(settings(tmp_path, text), virt_type) == Limits(*expected)


class TestProbe:
    """Where no KVM works, a stand-in for QEMU on PATH tells what the probe makes of its output."""

    @pytest.fixture
    def qemu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        device = tmp_path / "kvm"
        device.touch()
        monkeypatch.setattr(virt_install, "KVM_DEVICE", device)
        monkeypatch.setattr(virt_install, "PROBE_SECONDS", 0.5)
        program = tmp_path / "bin/qemu-system-x86_64"
        program.parent.mkdir()
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        return program

    def write(self, program: Path, script: str) -> None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def test_kernel_that_prints(self, qemu: Path, tmp_path: Path) -> None:
        self.write(qemu, f'echo "$@" > {tmp_path}/argv; echo "Linux version 6.1"; exec sleep 60')
        assert virt_install.why_not_kvm(Path("/netboot/linux"), "x86_64") is None
        words = (tmp_path / "argv").read_text()
        assert "-accel kvm" in words
        assert "-kernel /netboot/linux" in words

    @pytest.mark.parametrize("script", ["exec sleep 60", "echo SeaBIOS; exec sleep 60", "echo could not; exit 1"])
    def test_kernel_that_does_not(self, qemu: Path, script: str) -> None:
        self.write(qemu, script)
        assert (
            virt_install.why_not_kvm(Path("/netboot/linux"), "x86_64")
            == "the installer's kernel printed nothing under it within 0 s"
        )

    def test_no_kernel(self, qemu: Path) -> None:
        assert virt_install.why_not_kvm(None, "x86_64") == "there is no kernel to probe it with"

    def test_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(virt_install, "KVM_DEVICE", Path("/dev/none"))
        assert virt_install.why_not_kvm(Path("/netboot/linux"), "x86_64") == "/dev/none: No such file or directory"

    @pytest.mark.parametrize("chosen", ["kvm", "qemu"])
    def test_settings_decide(self, tmp_path: Path, chosen: str) -> None:
        assert not virt_install.has_to_probe(plan(tmp_path, f"virt-type = {chosen}").settings)


@pytest.mark.parametrize(
    ("uid", "gid", "mode", "may"),
    [
        (0, 0, 0o660, False),
        (0, 0, 0o664, False),
        (0, 0, 0o666, True),
        (0, "kvm", 0o660, True),
        (0, "kvm", 0o606, False),
        (0, "kvm", 0o640, False),
        ("libvirt-qemu", 0, 0o600, True),
        ("libvirt-qemu", "kvm", 0o066, False),
    ],
)
def test_kvm_that_the_qemu_of_libvirt_may_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int | str, gid: int | str, mode: int, may: bool
) -> None:
    device = tmp_path / "kvm"
    device.touch()
    shutil.chown(device, uid, gid)
    device.chmod(mode)
    monkeypatch.setattr(virt_install, "KVM_DEVICE", device)
    reasons = [virt_install.why_libvirt_has_no_kvm(None, "x86_64", as_root=as_root) for as_root in (True, False)]
    other = "there is no kernel to probe it with"
    assert reasons == [
        other if may else f"{device}: libvirt-qemu, as whom libvirt runs QEMU, may not open it",
        other,
    ]


SLOW = r"libvirt takes [0-9]+ s for each query of what QEMU can do, .*: rm /"


@pytest.mark.parametrize(
    ("text", "at_least", "device", "status", "calls", "warning"),
    [
        # The second one tells: the first may have come just after libvirtd's start.
        ("", 0, True, 0, 2, SLOW),
        ("", 1000, True, 0, 1, None),
        ("", 0, False, 0, 0, None),
        ("virt-type = qemu", 0, True, 0, 0, None),
        ("", 0, True, 1, 1, "libvirt does not say what QEMU can do: error: it is gone"),
    ],
)
def test_check_of_a_slow_libvirt(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    text: str,
    at_least: float,
    device: bool,
    status: int,
    calls: int,
    warning: str | None,
) -> None:
    monkeypatch.setattr(virt_install, "KVM_DEVICE", tmp_path / ("image-factory.conf" if device else "none"))
    monkeypatch.setattr(virt_install, "_SLOW_QUERY_SECONDS", at_least)
    program = tmp_path / "bin/virsh"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\necho "error: it is gone" >&2\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    (tmp_path / "calls").touch()
    virt_install.warn_of_slow_libvirt(plan(tmp_path, text))
    assert (tmp_path / "calls").read_text() == "--connect qemu:///system capabilities\n" * calls
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (warning is not None)
    assert not warning or re.match(warning, warnings[0])


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"10%\r20%\r30%\n", ["30%"]),
        (b"\x1b[2J\x1b[1;31mred\x1b[0m \x07bell\n\n\n", ["red ?bell"]),
        (b"\xff\xfe\n", ["\ufffd\ufffd"]),
        (b"\x00" * 100_000, ["?" * 4096] * 16),
        (b"a question\r\x1b[22A\x1b[M\x1b[22B<Yes>\x1b[5;70H<No>", ["a question", "<Yes>", "<No>"]),
        (b"".join(b"line %d\n" % number for number in range(100)), [f"line {number}" for number in range(60, 100)]),
    ],
)
def test_console_tail(tmp_path: Path, data: bytes, lines: list[str]) -> None:
    console = tmp_path / "console.log"
    console.write_bytes(data)
    assert virt_install.console_tail(console) == lines


def test_console_tail_of_no_log(tmp_path: Path) -> None:
    assert virt_install.console_tail(tmp_path / "none") == []


IN_USE = "ERROR    internal error: ... -vnc 127.0.0.1:0: Failed to bind socket: Address already in use"


@pytest.mark.parametrize(
    ("vnc", "said", "calls"),
    [("localhost", IN_USE, 3), ("localhost:1", IN_USE, 1), ("localhost", "ERROR    no such thing", 1)],
)
def test_display_that_another_user_has_just_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vnc: str, said: str, calls: int
) -> None:
    """It is picked by libvirt, each user's for itself; programs on PATH stand for it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script = f"""#!/bin/sh
echo >>{tmp_path}/calls
[ $(wc -l <{tmp_path}/calls) = 3 ] || {{ echo '{said}'; exit 1; }}
"""
    (programs / "virt-install").write_text(script)
    (programs / "virsh").write_text('#!/bin/sh\n[ "$3" != domstate ] || echo "shut off (shutdown)"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    build = Build(plan(tmp_path, f"vnc = {vnc}\n", tmp_path), tmp_path / "work", "vm")
    build.directory.mkdir()
    if calls == 3:
        virt_install.install(build, virt_install.Media((), ()))
    else:
        with pytest.raises(BuildError, match=said.partition(":")[0]):
            virt_install.install(build, virt_install.Media((), ()))
    assert (tmp_path / "calls").read_text() == "\n" * calls
    assert not build.vm_record.exists()


OFF = "[    6.776042] reboot: Power down\r\n"
LOGGED = "char device redirected\n2026-11-29 16:50:07.676+0000: shutting down, reason=%s\n"


@pytest.mark.parametrize(
    ("state", "console", "logged", "in_order"),
    [
        ("shut off (shutdown)", "", "", True),
        *((f"shut off ({reason})", OFF, "", True) for reason in ("unknown", "crashed", "daemon", "failed")),
        ("shut off (unknown)", "reboot: Power down\n", "", True),
        ("shut off (unknown)", "[   99.123456] Power down.\r\n", "", True),
        ("shut off (unknown)", "[   12.345678] reboot: Restarting system\r\n", "", True),
        ("shut off (unknown)", "", LOGGED % "shutdown", True),
        # Nothing tells of a good end.
        ("shut off (unknown)", "", "", False),
        ("shut off (unknown)", "[   99.000000] Linux version 6.1\r\n", LOGGED % "crashed", False),
        ("shut off (unknown)", "", LOGGED % "destroyed", False),
        ("shut off (crashed)", f"{OFF}[    0.000000] Linux version 6.1\r\n", "", False),
        ("shut off (unknown)", "echo reboot: Power down\r\n", "", False),
        ("shut off (unknown)", "[    6.776042] reboot: System halted\r\n", "", False),
        # libvirt knows better.
        ("shut off (destroyed)", OFF, "", False),
        ("shut off (saved)", OFF, "", False),
        ("running (booted)", OFF, LOGGED % "shutdown", False),
        ("paused (I/O error)", OFF, "", False),
    ],
)
def test_end_of_which_libvirt_does_not_know_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, console: str, logged: str, in_order: bool
) -> None:
    monkeypatch.setattr(virt_install, "_LOG_SECONDS", 0)
    monkeypatch.setattr(virt_install, "_log_of", lambda _: tmp_path / "vm.log")
    (tmp_path / "vm.log").write_text(logged)
    build = Build(plan(tmp_path), tmp_path, "vm")
    build.console_path.write_text(f"Linux\r\n{console}")
    assert virt_install.powered_off(build, state) is in_order


def test_end_that_is_logged_late(tmp_path: Path) -> None:
    """As virtlogd does it."""
    build = Build(plan(tmp_path), tmp_path, "vm")
    with subprocess.Popen(["sh", "-c", f"sleep 0.3; echo 'reboot: Power down' > {build.console_path}"]):
        assert virt_install.powered_off(build, "shut off (unknown)")


def test_output_directory_that_qemu_cannot_enter(tmp_path: Path) -> None:
    """pytest's directories are their owner's alone, as root's home is."""
    with pytest.raises(ConfigurationError, match=r"user libvirt-qemu, can't enter /"):
        virt_install.check_output_dir(plan(tmp_path, output_dir=tmp_path))
    virt_install.check_output_dir(plan(tmp_path, output_dir=Path("/var/tmp")))
