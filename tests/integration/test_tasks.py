"""Tasks in a real guest, one boot for all, as an ordinary user; and what that boot leaves on the disk."""

import json
import re
from pathlib import Path

from .. import golden
from ..conftest import run
from .test_testboot import Scene, golden_disk, scene

__all__ = ["golden_disk", "scene"]

# In the guest; its own shell expands what has two dollar signs.
TASKS = """\
tasks = packages, secret, daemon, files, fails, {here}/play.yml
tasks-network = no
[packages]
task-type = packages
task-packages = sudo
[secret]
task-type = command
task-command = cat "$$TASK_SECRETS"; printf '\\033[31mred\\n'; printf '%s' "$$MODE" >/etc/made-by-task
task-environment = MODE=golden
task-secrets = {here}/secrets
[daemon]
task-type = command
task-command = mount -t tmpfs own /mnt; setsid sleep 999 >/dev/null 2>&1 & systemctl is-system-running
[files]
task-copy = {here}/made-by-copy.j2:/etc/
    {here}/made-by-copy.j2:/srv/here/motd:www-data:adm:0640
[fails]
task-type = command
task-command = echo broken; exit 3
task-allow-failure = yes
"""
PLAYBOOK = """\
- hosts: all
  gather_facts: no
  tasks:
    - copy: {content: "{{ image_factory_image }}", dest: /etc/made-by-playbook, mode: "0640"}
"""
FILES = {
    "play.yml": PLAYBOOK, "secrets": "word: hunter22-of-the-task\n", "made-by-copy.j2": "of {{ firmware }}\n"
}  # fmt: skip
# All that a boot with tasks changes on the disk: each path with its reason.
CHANGED = {
    r"etc/made-by-(task|playbook|copy)|srv/here(/motd)?": "the tasks themselves",
    r"etc/machine-id|var/lib/dbus/machine-id": "systemd, at the first boot; sealing",
    r"tmp/\.(ICE|X11|XIM|font)-unix": "systemd-tmpfiles; sealing",
    r"var/lib/cloud(/(handlers|instances|scripts|scripts/[a-z-]+|seed))?": "cloud-init's directories, which are empty",
    r"var/lib/systemd/(linger|timers(/stamp-.*)?)": "systemd's own state",
    r"var/lib/systemd/random-seed": "systemd, at its end; sealing",
    r"var/log/journal/.*|var/log/(wtmp|lastlog)": "the journal and the login; sealing",
    r"var/lib/apt/.*|var/lib/dpkg/(lock.*|triggers/Lock)|var/cache/apt/.*|var/log/apt/.*": "apt-get; sealing",
}
# A layer is what a machine leaves that loses its power: its journal is played first.
LISTING = """\
qemu-img convert -f qcow2 -O raw "$1" "$3"
mount -o loop,offset="$2" "$3" /mnt && cd /mnt
find . -xdev -type f -printf '%P\\t%m %U:%G ' -exec md5sum -- {} \\; -o -printf '%P\\t%m %U:%G %l\\n'
"""


def listing(layer: Path, copy: Path) -> dict[str, str]:
    """Return what is on the root filesystem of *layer*, whose raw *copy* is made and removed, by path."""
    text = run("unshare", "--mount", "sh", "-ec", LISTING, "sh", layer, golden.ROOT_OFFSET, copy).stdout
    copy.unlink()
    return dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)


def test_tasks_in_a_guest(scene: Scene) -> None:
    """All kinds of them; those that are hostile are no harm, and nothing of the login is on the disk."""
    here = scene.directory
    for name, text in FILES.items():
        (here / name).write_text(text)
        run("chown", scene.user.name, here / name)
    (here / "secrets").chmod(0o600)
    scene.install(TASKS.format(here=here))
    done = scene.run("--until", "tasks", "--json", "record.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((here / "record.json").read_text())
    outcomes = " ".join(task["outcome"] for task in record["tasks"])
    assert outcomes == "passed passed passed passed allowed passed"
    assert [step["name"] for step in record["steps"]].count("Booting for tasks") == 1
    for text in (done.stderr, (here / "record.json").read_text(), scene.results.read_text()):
        assert "hunter22" not in text
        assert "\033" not in text
    assert "ssh: word: ***" in done.stderr
    # The disk is as it was; what was written in the guest is in the layers, in the order of their tasks.
    *kept, last = sorted(scene.work.glob("layer-*"), key=lambda path: path.stat().st_mtime_ns)
    assert (len(kept), last.name.endswith("-done.qcow2")) == (6, True)
    copy = here / "copy.raw"
    second = listing(kept[1], copy)
    assert ("etc/made-by-task" in second, "etc/made-by-copy" in second) == (True, False)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", scene.disk, here / "installed.qcow2")
    before, after = listing(here / "installed.qcow2", copy), listing(last, copy)
    assert len(before) > 10000
    changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
    assert {"etc/made-by-task", "etc/made-by-playbook", "etc/machine-id"} <= changed
    assert after["etc/made-by-playbook"].startswith("640 0:0 ")
    assert (after["etc/made-by-copy"][:8], after["srv/here/motd"][:9]) == ("644 0:0 ", "640 33:4 ")
    assert sorted(path for path in changed if not re.fullmatch("|".join(CHANGED), path)) == []
