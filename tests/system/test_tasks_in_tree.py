"""Tasks in a tree that is bootstrapped from a small archive, by root and by a user who may run nothing as root."""

import hashlib
import re
from pathlib import Path

import pytest

from ..bootstrap_scene import BUILD, WORK, Place, new_place
from ..conftest import User, run
from ..integration.test_dry_run import announced, logged
from ..integration.test_resume import in_terminal
from ..small_archive import Archive
from .test_bootstrap import in_disk, plain

SECRET = "correct-horse-battery"

# What a task sees goes to files of the system.
LOOK = """\
#!/bin/sh
set -e
env | sort >/srv/environment
echo "$@" >/srv/arguments
id -u >/srv/user
umask >>/srv/user
cat /proc/mounts >/srv/mounts
ps >/srv/processes
cat "$TASK_SECRETS" | tr a-z n-za-m >/srv/secrets
cat "$TASK_SECRETS"
/usr/sbin/policy-rc.d || echo "policy $?" >/srv/policy
cat /etc/resolv.conf >/srv/names
echo here >/etc/resolv.conf
for name in null zero full random urandom tty ptmx stdout; do [ -e /dev/$name ]; done
echo x >/tmp/x; echo x >/run/x; echo x >/dev/shm/x; echo x >/dev/null
! echo 1 >/proc/sys/kernel/panic_on_oops
hostname >/srv/hostname || cat /proc/sys/kernel/hostname >/srv/hostname
printf '\\033[31mred\\033[0m \\033]0;title\\007\\n'
"""
# What it leaves running, mounted and open.
LEAVE = """\
mkdir /srv/mounted && mount -t tmpfs left /srv/mounted
sleep 471105 &
(while :; do sleep 0.1; : >>/srv/log; done) &
start-stop-daemon -S -b -x /bin/sleep -- 471105
"""
LEFT = "ps >/srv/after; cat /proc/mounts >>/srv/after; ls -A /run /tmp /dev/shm >/srv/empty"


@pytest.fixture(params=["root", "c"])
def place(request: pytest.FixtureRequest, users: dict[str, User], small_archive: Archive) -> Place:
    """A place of root, and one of the user who has no sudo rule."""
    return new_place(users[request.param], small_archive)


@pytest.fixture
def user_place(users: dict[str, User], small_archive: Archive) -> Place:
    return new_place(users["c"], small_archive)


def write(place: Place, name: str, text: str, mode: int = 0o644) -> Path:
    path = place.directory / name
    path.write_text(text)
    path.chmod(mode)
    run("chown", place.user.name, path)
    return path


def configure(place: Place, tasks: str, sections: str = "", **keys: str) -> None:
    place.configure(tasks=tasks, **keys)
    with (place.directory / "image-factory.conf").open("a") as file:
        file.write(sections)


def in_tree(place: Place, path: str) -> str:
    return in_disk(place.out / WORK / "disk.raw", f"cat {path}")


def task(name: str, command: str, **keys: str) -> str:
    """Return the section of a task that runs *command*."""
    values = {"task-command": command.strip().replace("\n", "\n  ").replace("$", "$$")} | keys
    return f"\n[{name}]\n" + "".join(f"{key.replace('_', '-')} = {value}\n" for key, value in values.items())


def said(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("image-factory: ")]


def test_what_a_task_sees_and_leaves(place: Place) -> None:
    """Each is in a place of its own, nothing of the user's is there, and nothing of what it leaves."""
    write(place, "look.sh", LOOK)
    write(place, "secrets", f"TOKEN={SECRET}\n", 0o600)
    look = (
        "\n[look]\ntask-file = ./look.sh\ntask-args = one 'two words'\ntask-environment = COLOUR='dark red'\n"
        "task-secrets = ./secrets\n"
    )
    configure(place, "look, leave, left", look + task("leave", LEAVE) + task("left", LEFT))
    place.recipe(proxy="http://127.0.0.1:9")
    shown = announced(place.run("--dry-run", *BUILD).stdout)
    log = place.run(*BUILD, SECRET_OF_THE_USER="x", TMPDIR=str(place.directory)).stderr
    environment = dict(line.split("=", 1) for line in in_tree(place, "/srv/environment").splitlines())
    assert environment.pop("TASK_SECRETS").startswith("/run/")
    # Shells count themselves.
    environment = {name: value for name, value in environment.items() if name not in ("SHLVL", "OLDPWD")}
    assert environment == {
        "COLOUR": "dark red", "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root", "LC_ALL": "C.UTF-8",
        "LOGNAME": "root", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PWD": "/",
        "SHELL": "/bin/sh", "TERM": "dumb", "USER": "root", "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }  # fmt: skip
    assert in_tree(place, "/srv/arguments") == "one two words\n"
    assert in_tree(place, "/srv/user") == "0\n0022\n"
    assert in_tree(place, "/srv/hostname") == "localhost\n"
    assert in_tree(place, "/srv/policy") == "policy 101\n"
    assert in_tree(place, "/srv/names") == Path("/etc/resolv.conf").read_text()
    assert in_tree(place, "/etc/resolv.conf") == in_tree(place, "/srv/names")
    points = {line.split()[1] for line in in_tree(place, "/srv/mounts").splitlines()}
    assert {"/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/run", "/tmp"} <= points
    assert "sleep" not in in_tree(place, "/srv/processes")
    # What the task before has left.
    after = in_tree(place, "/srv/after")
    assert "sleep" not in after and "/srv/mounted" not in after and "/proc" in after
    assert in_tree(place, "/srv/empty").split() == ["/dev/shm:", "/run:", "image-factory-task", "lock", "/tmp:"]
    for path in ("/usr/sbin/policy-rc.d", "/run", "/tmp", "/dev"):
        listed = in_disk(place.out / WORK / "disk.raw", f"ls -p {path}")
        assert [name for line in listed.splitlines() if (name := line.split("/")[5:6]) not in ([], ["."], [".."])] == []
    check_log(place, log)
    steps = [name for name, _ in shown]
    assert steps[:5] == ["Bootstrapping", "Keeping the tree", "Task look", "Task leave", "Task left"]
    for name, commands in logged(log)[1:5]:
        [(_, expected)] = [each for each in shown if each[0] == name]
        assert [*map(plain, commands)] == [*map(plain, expected)]


def check_log(place: Place, log: str) -> None:
    """A secret, and what a terminal obeys, are not shown; the secret is nowhere on the disk."""
    assert SECRET.translate(str.maketrans({})) not in log and "\033" not in log
    assert "nsenter: TOKEN=***" in log and "nsenter: red" in log
    assert in_tree(place, "/srv/secrets").strip().endswith("pbeerpg-ubefr-onggrel")
    assert SECRET.encode() not in (place.out / WORK / "disk.raw").read_bytes()
    for path in (place.out / WORK).iterdir():
        assert SECRET not in path.read_bytes().decode(errors="replace"), path


def assert_resumable(place: Place) -> None:
    """Nothing is left of a build but what --resume needs."""
    assert place.left() == [str(place.out / WORK)]
    assert {path.name.split("-")[0] for path in (place.out / WORK).iterdir()} == {"checkpoint.json", "layer"}


# What is wrong of a task; what the error says.
BAD = {
    "fails": (task("bad", "echo reason >&2; exit 7"), r"Task bad failed with status 7: reason\."),
    "hangs": (
        task("bad", "sleep 471105 & sleep 471105", task_timeout="1s"),
        r"Task bad did not end within 1 s\.",
    ),
    "powers off": (
        task("bad", "kill -9 1; kill -TERM 1; busybox reboot -f; sleep 471105", task_timeout="1s"),
        "Task bad ",
    ),
    "fills its memory": (
        task("bad", "dd if=/dev/zero of=/tmp/x bs=1M count=1100 2>&1 | grep left && exit 1"),
        r"Task bad failed .*No space left",
    ),
    "no interpreter": (task("bad", "exec /usr/bin/nosuch"), r"Task bad failed with status 127: .*not found"),
    "no network": (
        task("bad", "[ $(grep -c : /proc/net/dev) = 1 ] && [ ! -s /etc/x ] && echo only lo && exit 9"),
        "Task bad failed with status 9: only lo",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_task(user_place: Place, name: str) -> None:
    """It is told in a line, and nothing is left."""
    section, message = BAD[name]
    configure(user_place, "bad", section, tasks_network="no" if name == "no network" else "yes")
    done = user_place.run(check=False)
    assert done.returncode == 1, done.stderr
    assert re.match(f"image-factory: error: {message}", said(done.stderr)[0]), said(done.stderr)
    assert len(said(done.stderr)) == 2
    _, results = sorted(user_place.out.iterdir())
    assert results.name.endswith(".junit.xml") and 'name="bad"' in results.read_text()
    assert "471105" not in run("ps", "-eo", "args").stdout.replace("kill -9", "")
    assert_resumable(user_place)


def test_tries_and_much_output(user_place: Place) -> None:
    """A try begins with nothing of the one before; one may fail; 100 MB of output are no reason to fail."""
    again = "ps | grep -q [4]71105 && exit 8; sleep 471105 & echo again >>/srv/tries; [ $(grep -c . /srv/tries) = 3 ]"
    configure(
        user_place,
        "again, may, much",
        task("again", again, task_retries="2")
        + task("may", "exit 5", task_allow_failure="yes")
        + task("much", "yes 2>/dev/null | head -c 1 || :; head -c 100000000 /dev/zero | tr '\\0' 'x'; echo; echo end"),
    )
    done = user_place.run()
    assert in_tree(user_place, "/srv/tries") == "again\n" * 3
    assert done.stderr.count("It is tried again.") == 2
    assert "Task may failed with status 5. It may fail." in done.stderr
    assert len(done.stderr) < 20_000_000


@pytest.mark.parametrize("path", ["/run", "/etc/resolv.conf", "/usr/sbin/policy-rc.d"])
def test_no_link_of_a_tree_is_followed_out_of_it(user_place: Place, path: str) -> None:
    outside = user_place.directory / "outside"
    outside.mkdir()
    user_place.recipe(script=f"rm -rf {path}; ln -s ../../../../../../../../../../..{outside} {path}")
    configure(user_place, "x", task("x", "echo x >/srv/x"))
    done = user_place.run(check=False)
    assert done.returncode == 1, done.stderr
    reason = f"a symbolic link of the tree leads out of it, to {outside}."
    assert said(done.stderr)[0] == f"image-factory: error: Task x could not be put into the system: {reason}"
    assert list(outside.iterdir()) == []
    assert_resumable(user_place)


def test_copies_in_the_order_of_the_tasks(place: Place) -> None:
    """With owners that a task before has made; no link of the tree leads out of it, which has names of its own."""
    write(place, "motd.j2", "of {{ arch }}\n")
    before = "echo 'web:x:33:33::/:/bin/false' >>/etc/passwd; mkdir /srv/there; ln -s srv/there /opt"
    after = "cat /opt/motd >/srv/seen; stat -c '%u:%g %a' /opt/motd >>/srv/seen"
    files = "\n[files]\ntask-copy = ./motd.j2:/opt/:web:daemon:0640\n  ./motd.j2:/etc/resolv.conf\n"
    configure(place, "before, files, after", task("before", before) + files + task("after", after))
    [(_, shown)] = [step for step in announced(place.run("--dry-run", *BUILD).stdout) if step[0] == "Task files"]
    log = place.run(*BUILD).stderr
    assert in_tree(place, "/srv/seen") == "of x86_64\n33:1 640\n"
    assert in_tree(place, "/etc/resolv.conf") == "of x86_64\n"
    [(_, done)] = [step for step in logged(log) if step[0] == "Task files"]
    assert [*map(plain, done)] == [plain(argv) for argv in shown if argv[0] != "#"]
    outside = place.directory / "outside"
    outside.mkdir()
    out = f"ln -s ../../../../../../../../../../..{outside} /srv/out"
    configure(place, "before, files", task("before", out) + "\n[files]\ntask-copy = ./motd.j2:/srv/out/x\n")
    done_badly = place.run(check=False)
    message = (
        r"error: Task files can't be run: \[small\] task files: /srv/out of the image is a link that leads out of it\."
    )
    assert re.search(message, said(done_badly.stderr)[0]), said(done_badly.stderr)
    assert [*outside.iterdir()] == []
    assert_resumable(place)


def test_a_user_whom_the_system_has_not(users: dict[str, User], small_archive: Archive) -> None:
    """Packages bring users, so that nothing is known before; but then no work is lost."""
    place = new_place(users["root"], small_archive)
    write(place, "motd", "mine\n")
    configure(place, "", copy="./motd:/etc/motd:nobody-there:root")
    place.run("--check", "small")
    done = place.run("--until", "clean", "small", check=False)
    assert done.returncode == 1, done.stderr
    error, hint = said(done.stderr)
    assert error == "image-factory: error: [small] copy: the image has no user nobody-there."
    assert "Name one of /etc/passwd of the image, or its number; 'image-factory --resume small' goes on here" in hint
    configure(place, "", copy="./motd:/etc/motd:1234:root")
    log = place.run("--resume", "--until", "clean", "small").stderr
    assert "Bootstrapping" not in log
    assert in_tree(place, "/etc/motd") == "mine\n"


def test_link_of_names_into_run(user_place: Place) -> None:
    """As a service has it; it stays as it is."""
    user_place.recipe(script="rm -f /etc/resolv.conf; ln -s ../run/some/service/names /etc/resolv.conf")
    configure(user_place, "x", task("x", "cat /etc/resolv.conf >/srv/names"))
    user_place.run()
    assert in_tree(user_place, "/srv/names") == Path("/etc/resolv.conf").read_text()
    assert "../run/some/service/names" in in_disk(user_place.out / WORK / "disk.raw", "stat /etc/resolv.conf")


def test_resuming_knows_the_tasks(user_place: Place) -> None:
    """A task that has changed, in its script or in its secrets, makes another disk; its timeout does not."""
    write(user_place, "work.sh", "#!/bin/sh\necho one >/srv/work\n")
    secrets = write(user_place, "secrets", "PASSWORD=one-one-one\n", 0o600)
    section = "\n[work]\ntask-file = ./work.sh\ntask-secrets = ./secrets\n"
    configure(user_place, "work", section)
    user_place.run()

    def first_steps() -> list[str]:
        shown = announced(user_place.run("--resume", "--dry-run", "small").stdout)
        return [name for name, _ in shown][:2]

    changed = ["Restoring the tree", "Task work"]
    secrets.write_text("PASSWORD=two-two-two\n")
    assert first_steps() == changed
    secrets.write_text("PASSWORD=one-one-one\n")
    configure(user_place, "work", f"{section}task-timeout = 5m\n")
    assert "Task work" not in first_steps()
    write(user_place, "work.sh", "#!/bin/sh\necho two >/srv/work\n")
    assert first_steps() == changed
    user_place.run("--resume", *BUILD)
    assert in_tree(user_place, "/srv/work") == "two\n"
    # What the tree is made from is another matter.
    user_place.recipe(script="true")
    done = user_place.run("--resume", "--dry-run", "small", check=False)
    assert "bootstrap changed since the disk was installed" in said(done.stderr)[0]


# What two tasks make of a tree, and take from it again.
MAKE = """
mkdir -p /srv/kept /srv/gone/below /srv/moved /srv/file-later
echo one >/srv/kept/one; echo two >'/srv/kept/a name
with a line'; chmod 4711 /srv/kept/one; chown 12:34 /srv/kept/one
ln /srv/kept/one /srv/kept/other; ln -s nowhere /srv/kept/link; mkfifo -m 600 /srv/kept/pipe
dd if=/dev/zero of=/srv/kept/sparse bs=1 count=1 seek=5000000 2>/dev/null
echo below >/srv/gone/below/it; echo moved >/srv/moved/it; echo x >/srv/directory-later
"""
CHANGE = """
rm -r /srv/gone /srv/file-later /srv/directory-later; mv /srv/moved /srv/there
echo file >/srv/file-later; mkdir -m 2750 /srv/directory-later
chmod 600 /srv/kept/other; chown 56:78 /srv/kept; echo again >>/srv/there/it; rm /srv/kept/link
"""


def test_a_build_goes_on_at_the_task_that_failed(place: Place) -> None:
    """No task before it runs again, and the disk is bit for bit the one of a build in which none has failed."""
    sections = task("make", MAKE) + task("change", CHANGE) + "\n[last]\ntask-file = ./last.sh\n"
    write(place, "last.sh", "#!/bin/sh\necho >>/srv/tries\n")
    configure(place, "make, change, last", sections)
    dated = {"SOURCE_DATE_EPOCH": "1700000000"}
    place.run(*BUILD, **dated)
    disk = place.out / WORK / "disk.raw"
    whole = hashlib.sha256(disk.read_bytes()).hexdigest()
    assert in_tree(place, "/srv/there/it") == "moved\nagain\n"
    write(place, "last.sh", "#!/bin/sh\necho half >/srv/half; exit 3\n")
    done = place.run(*BUILD, check=False, **dated)
    assert said(done.stderr)[0] == "image-factory: error: Task last failed with status 3."
    assert "'image-factory --resume small' goes on here" in said(done.stderr)[1]
    assert not disk.exists()
    write(place, "last.sh", "#!/bin/sh\necho >>/srv/tries\n")
    shown = announced(place.run("--resume", "--dry-run", *BUILD, **dated).stdout)
    done = place.run("--resume", *BUILD, **dated)
    steps = ["Restoring the tree", "Task last", "Installing the boot loader", "Making the disk"]
    assert [name for name, _ in shown] == [name for name, _ in logged(done.stderr)] == steps
    assert hashlib.sha256(disk.read_bytes()).hexdigest() == whole
    assert place.left() == [str(place.out / WORK)]
    place.run("--cleanup", "--output-dir", str(place.out))
    assert place.left() == []


def test_a_build_stops_after_a_task(user_place: Place) -> None:
    """And goes on there: what is kept is all that the next one needs."""
    sections = "".join(task(name, f"echo {name} >>/srv/log") for name in ("one", "two", "three"))
    configure(user_place, "one, two, three", sections)
    stopping = ("--until", "task:two", "small")
    assert [name for name, _ in announced(user_place.run("--dry-run", *stopping).stdout)] == [
        "Bootstrapping", "Keeping the tree", "Task one", "Task two",
    ]  # fmt: skip
    done = user_place.run(*stopping)
    assert done.stdout.endswith("Stopped after task:two. 'image-factory --resume small' goes on.\n")
    assert not (user_place.out / WORK / "disk.raw").exists()
    done = user_place.run("--resume", *stopping)
    assert [name for name, _ in logged(done.stderr)] == ["Restoring the tree"]
    user_place.run("--resume", *BUILD)
    assert in_tree(user_place, "/srv/log") == "one\ntwo\nthree\n"
    done = user_place.run("--until", "task:four", "small", check=False)
    assert done.returncode == 2
    assert said(done.stderr) == [
        "image-factory: error: --until task:four: small has no such task before cleaning.",
        "image-factory: hint: It has task:one, task:two, task:three.",
    ]


PLAYBOOK = """\
- hosts: all
  gather_facts: false
  tasks:
    - raw: echo {{ image_factory_image }} {{ token }} | tr a-z n-za-m >/srv/facts; env >/srv/environment
"""


def test_playbook(place: Place) -> None:
    """It is run on this machine, with what the user has for it, and works in the tree, which has nothing of the user's.

    One of raw commands needs no Python of the system.
    """
    write(place, "play.yml", PLAYBOOK)
    write(place, "secrets", f"token: {SECRET}\n", 0o600)
    configure(place, "play", "\n[play]\ntask-file = ./play.yml\ntask-secrets = ./secrets\n")
    place.recipe(script="echo >/usr/bin/python3; chmod 755 /usr/bin/python3")
    [(_, shown)] = [step for step in announced(place.run("--dry-run", *BUILD).stdout) if step[0] == "Task play"]
    log = place.run(*BUILD, OF_THE_USER="x").stderr
    assert in_tree(place, "/srv/facts") == "fznyy pbeerpg-ubefr-onggrel\n"
    environment = in_tree(place, "/srv/environment")
    assert "HOME=/root\n" in environment and "OF_THE_USER" not in environment and "ANSIBLE" not in environment
    assert "ansible" not in in_disk(place.out / WORK / "disk.raw", "ls -p /root")
    [(_, done)] = [step for step in logged(log) if step[0] == "Task play"]
    assert [re.sub(r"\S+/inventory.json", "INVENTORY", plain(argv)) for argv in done] == [*map(plain, shown)]
    assert SECRET not in log
    assert place.left() == [str(place.out / WORK)]


def test_system_without_python(user_place: Place) -> None:
    write(user_place, "play.yml", PLAYBOOK)
    configure(user_place, "./play.yml")
    done = user_place.run(check=False)
    assert said(done.stderr)[0].startswith(
        "image-factory: error: Task play.yml can't be run: the system has no python3, which a playbook needs"
    )


def test_shell_where_a_task_failed(user_place: Place) -> None:
    """It sees what the task saw; the build fails as it did."""
    # What a person would type.
    user_place.recipe(
        script="echo 'cat /srv/state; id -u; tail -c 20 /usr/sbin/policy-rc.d' >/usr/bin/bash; chmod 755 /usr/bin/bash"
    )
    configure(user_place, "bad", task("bad", "echo half >/srv/state; exit 7"))
    status, shown = in_terminal(user_place.argv("--shell-on-error", *BUILD), user_place.directory)
    assert status == 1
    assert re.search(r"^half\r\n0\r\n#!/bin/sh\r\nexit 101\r$", shown, re.MULTILINE), shown
    assert "A shell is opened in the tree; the build ends when you leave it." in shown
    assert "error: Task bad failed with status 7." in shown
    assert_resumable(user_place)


# What can be known before a build of the section of a task: the error, and the hint.
REFUSED = {
    "no reboot": (task("x", "true", task_reboot="after"), "nothing reboots in a tree", "tasks-via = guest"),
    "no connection": ("\n[x]\ntask-file = ./play.yml\n", "Ansible has no community.general.chroot", "ansible. Or"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_the_build(user_place: Place, name: str) -> None:
    section, message, hint = REFUSED[name]
    write(user_place, "play.yml", PLAYBOOK)
    configure(user_place, "x", section)
    programs = user_place.directory / "programs"
    programs.mkdir()
    (programs / "ansible-doc").write_text("#!/bin/sh\nexit 1\n")
    (programs / "ansible-doc").chmod(0o755)
    done = user_place.run("--check", "small", check=False, PATH=f"{programs}:/usr/bin:/bin")
    assert done.returncode == 2, done.stderr
    assert message in said(done.stderr)[0]
    assert hint in said(done.stderr)[1]
