"""Scripts of elements that do harm: none of it is left on this machine, as root and as an ordinary user."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import User, run
from .test_elements_run import Place, script, system, task

__all__ = ["system"]

KEY = 0x471105
# As its own process or in the system, each writes its name if it has come to where it ought not to.
HARM = """\
out() {{ echo "$1" >>"$DIB_IMAGE_CACHE/out"; }}
said() {{ "$@" >/dev/null 2>&1; }}
! said python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect("{socket}")' || out "a service"
python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect("{named}")' || out "none that is named"
said python3 -c 'import ctypes; ctypes.CDLL(None).shmget({key}, 4096, 0o1600)'
mkdir "$TMPDIR/sys"
! said mount -t sysfs sysfs "$TMPDIR/sys" || ! said eval 'echo {key} >"$TMPDIR/sys/class/net/lo/ifalias"' || out network
! said ip link add if{key} type dummy || out "a network device"
for path in "" "$TMP_MOUNT_PATH"; do
    ! said eval 'echo 1 >$path/proc/sys/kernel/core_uses_pid' || out "$path/proc/sys"
    ! said eval 'echo h >$path/proc/sysrq-trigger && [ ! -c $path/proc/sysrq-trigger ]' || out "$path/proc/sysrq"
    ! said eval 'echo x >$path/proc/sys/fs/binfmt_misc/register' || out "$path/binfmt_misc"
    [ -z "$(find $path/dev -type b)" ] || out "$path/dev"
done
! said nsenter -t 1 -m touch {place}/precious/nsenter || out nsenter
! said touch /proc/1/root{place}/precious/root || out /proc/1/root
hostname harm
kill -0 {pid} 2>/dev/null && out "a process of this machine"
# What ours is over; the kernel lets nobody but root unmount that of this machine.
while said umount -l /proc; do :; done
! {is_root} || ! grep -qs pytest /proc/{pid}/cmdline || out "/proc of this machine"
mount -t proc proc /proc
while said umount -l /dev; do :; done
! {is_root} || [ -z "$(find /dev -type b)" ] || out "/dev of this machine"
mount --rbind "$TMP_BUILD_DIR/dev" /dev
"""
# net_admin, sys_module, sys_rawio, sys_pacct, sys_boot, sys_time, audit_control, syslog, wake_alarm, block_suspend
FORBIDDEN = sum(1 << number for number in (12, 16, 17, 20, 22, 25, 30, 34, 35, 36))


@pytest.fixture
def sockets() -> Iterator[list[str]]:
    """The paths of two sockets at which something of this machine listens."""
    listening = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    paths = [f"/run/image-factory-{os.getpid()}-{number}.socket" for number in range(2)]
    for each, path in zip(listening, paths, strict=True):
        each.bind(path)
        os.chmod(path, 0o666)
        each.listen()
    yield paths
    for each, path in zip(listening, paths, strict=True):
        each.close()
        os.unlink(path)


def machine() -> list[str]:
    """Return what of this machine a script could change."""
    paths = ("/proc/sys/kernel/hostname", "/sys/class/net/lo/ifalias")
    return [Path(path).read_text(encoding="utf-8") for path in paths]


@pytest.mark.parametrize("name", ["root", "c"])
def test_nothing_is_done_to_this_machine(
    users: dict[str, User], tmp_path: Path, system: Path, sockets: list[str], name: str
) -> None:
    place = Place(tmp_path if name == "root" else users[name].directory("harm"), system)
    precious = place.path / "precious"
    script(precious / "file", "")
    listening, named = sockets
    is_root = "true" if name == "root" else "false"
    text = HARM.format(socket=listening, named=named, key=KEY, place=place.path, pid=os.getpid(), is_root=is_root)
    place.element("harm", extra_data=text, install='while read -r line; do echo "$line"; done </proc/self/status')
    # A task finds nothing of what they have done to their namespaces.
    look = "read -r name </proc/sys/kernel/hostname; [ $$name = localhost ] && pwd"
    argv = place.command("harm", keys=f"DIB_NAMED = unix://{named}\n{task(look)}")
    conf = place.path / "conf"
    before = machine()
    if name == "root":
        done = run(*argv, env=place.environment, cwd=place.path, check=False)
    else:
        for directory in (place.out, place.cache):
            directory.mkdir(exist_ok=True)
            shutil.chown(directory, users[name].name)
        settings = conf.read_text(encoding="utf-8").replace("format = tar", "format = raw")
        conf.write_text(settings.replace("mount-via = loop", "mount-via = fuse"), encoding="utf-8")
        argv = users[name].argv(users[name].program, "x", IMAGE_FACTORY_CONFIG=str(conf))
        done = run(*argv, cwd=place.path, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    out = place.cache / "elements/out"
    assert not out.exists(), out.read_text(encoding="utf-8")
    assert os.listdir(precious) == ["file"]
    assert "INFO: nsenter: /\n" in said
    assert machine() == before and not Path(f"/sys/class/net/if{KEY}").exists()
    assert str(place.out) not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    assert f" {KEY} " not in Path("/proc/sysvipc/shm").read_text(encoding="utf-8")
    bounding = re.search(r"CapBnd:\s+([0-9a-f]+)", said)
    assert bounding and not int(bounding[1], 16) & FORBIDDEN
    assert not [path for path in place.out.iterdir() if path.name.startswith(".")]
