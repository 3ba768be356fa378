"""virt-install's command line, and how an installation ends."""

import datetime
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from image_factory.base.errors import BuildError
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
