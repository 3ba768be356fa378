"""A disk with Debian on it that boots with BIOS and with UEFI, as an installer would leave it.

It is made by root, by the program itself, with this machine's release and package sources, and kept in the cache.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from image_factory.disks import layouts

# Part of the cached disk's name: another recipe makes another disk.
RECIPE = 9
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "image-factory-golden"
PROGRAM = Path(__file__).resolve().parents[1] / "image-factory"
PACKAGES = (
    "linux-image-cloud-amd64 systemd-sysv udev dbus openssh-server cloud-init cloud-guest-utils fdisk e2fsprogs "
    "ifupdown isc-dhcp-client iproute2 sudo kmod grub-efi-amd64 grub-efi-amd64-signed shim-signed grub-pc-bin"
)

DISK_SIZE = 1536 << 20
ROOT_OFFSET = layouts.scheme("hybrid", "x86_64", layouts.root_of("ext4", "", ())).pieces(DISK_SIZE)[-1].offset
# What an installed system has, and no image may have.  No locale has to be made, one kind of host key is enough, and
# devices may take their time: emulation beside other tests is slow.
SCRIPT = """\
echo 3c1f6e2d9a7b4c5e8f00112233445566 >/etc/machine-id
head -c 512 /dev/zero >/var/lib/systemd/random-seed
echo a session was opened >/var/log/auth.log
echo passwd >/root/.bash_history
printf 'locale: C.UTF-8\\nssh_genkeytypes: [ed25519]\\n' >/etc/cloud/cloud.cfg.d/90-golden.cfg
mkdir -p /etc/systemd/system.conf.d
printf '[Manager]\\nDefaultDeviceTimeoutSec=10min\\n' >/etc/systemd/system.conf.d/slow.conf
echo 'source /etc/network/interfaces.d/*' >/etc/network/interfaces
cat >>/etc/default/grub <<.
GRUB_TIMEOUT=0
GRUB_CMDLINE_LINUX_DEFAULT=
GRUB_CMDLINE_LINUX="no_timer_check console=ttyS0"
.
rm -rf /etc/apt/sources.list.d/* /var/lib/apt/lists/* /usr/share/man
"""
CONFIGURATION = """\
[golden]
source = bootstrap
bootstrap = {directory}/golden.yaml
firmware = hybrid
image-size = {size}
cache-dir = {cache}
"""


def disk() -> Path:
    """Return the disk, which is made if it is not in the cache; it is not to be changed."""
    release = Path("/etc/os-release").read_text(encoding="utf-8")
    match = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', release, re.MULTILINE)
    assert match is not None
    made = CACHE / f"debian-{match[1]}-{RECIPE}.raw"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            made_here = _make(Path(name), match[1])
            # The tests' users read it.
            made_here.chmod(0o644)
            made_here.rename(made)
    return made


def _sources() -> Iterator[str]:
    """Give the lines of this machine's sources.list, whatever notation its files are in."""
    for path in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if path.suffix == ".sources":
            for stanza in re.split(r"\n{2,}", text):
                values = dict(re.findall(r"^([A-Za-z-]+): *(.*)$", stanza, re.MULTILINE))
                for suite in values.get("Suites", "").split():
                    yield f"deb [signed-by={values['Signed-By']}] {values['URIs']} {suite} {values['Components']}"
        else:
            yield from re.findall("^deb .*$", text, re.MULTILINE)


def _make(directory: Path, suite: str) -> Path:
    recipe = {
        "suite": suite,
        "variant": "minbase",
        "sources": [line for line in _sources() if {*line.split()} & {suite, f"{suite}-updates", f"{suite}-security"}],
        "packages": PACKAGES,
        "recommends": False,
        "script": SCRIPT,
    }
    (directory / "golden.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    configuration = directory / "image-factory.conf"
    configuration.write_text(CONFIGURATION.format(directory=directory, size=DISK_SIZE, cache=CACHE), encoding="utf-8")
    environment = {**os.environ, "IMAGE_FACTORY_CONFIG": str(configuration)}
    argv = [PROGRAM, "--until", "install", "--output-dir", directory, "golden"]
    done = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{argv} failed with {done.returncode}: {done.stderr}")
    return directory / ".image-factory-golden/disk.raw"
