"""Tasks in a guest: its steps on a disk, with a machine that is none, and with a login that is this machine's shell.

QEMU is a program that says what a guest's unit says; the overlay, the seed, the keys and the disk are real.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from image_factory import checkpoint, pipeline
from image_factory.base import command, log
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.checks.testboot.machine import monitor_argv
from image_factory.configuration.files import Configuration
from image_factory.model import Build, Disk, Plan
from image_factory.parts import State, carry_out, show
from image_factory.tasks import guest, layers, playbooks

from ..conftest import REPOSITORY, wait_for

MIB = 1 << 20
PART = 1 << 16

# What a guest's unit says, each time the file ``boot`` says so; an sshd's banner; the end when ``off`` is there.
QEMU = """\
#!{python} -I
import itertools, json, os, pathlib, socket, subprocess, sys, threading, time
here = pathlib.Path({here!r})
words = " ".join(sys.argv)
path = [word.partition("path=")[2] for word in sys.argv if word.startswith("pipe,")]
# As QEMU, which waits for nobody.
console, report, monitor = (os.fdopen(os.open(each + ".out", os.O_RDWR), "wb", buffering=0) for each in path)
overlay = [word.partition('"filename": "')[2].partition('"')[0] for word in sys.argv if "overlay-0.qcow2" in word][0]
subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 0x41 0 64k", overlay], check=True)
def obey():
    added = {{}}
    for line in os.fdopen(os.open(path[2] + ".in", os.O_RDWR), "rb"):
        said = json.loads(line)
        given = said["arguments"]
        if said["execute"] == "blockdev-add":
            added[given["node-name"]] = given
        if said["execute"] == "blockdev-snapshot":
            file = "json:" + json.dumps(added[given["overlay"]])
            place = 64 * (1 + len(added))
            subprocess.run(["qemu-io", "-c", f"write -q -P 0x42 {{place}}k 64k", file], check=True)
        refused = (here / "refuse").exists() and said["execute"] == "blockdev-snapshot"
        answer = {{"error": {{"class": "GenericError", "desc": "no"}}}} if refused else {{"return": {{}}}}
        monitor.write(b'{{"event":"RTC_CHANGE"}}\\n' + json.dumps(answer).encode() + b"\\n")
threading.Thread(target=obey, daemon=True).start()
port = int(words.partition("hostfwd=tcp:127.0.0.1:")[2].partition("-")[0])
server = socket.create_server(("127.0.0.1", port))
def greet():
    while True:
        connection, _ = server.accept()
        connection.send(b"SSH-2.0-x\\r\\n")
        connection.close()
threading.Thread(target=greet, daemon=True).start()
(here / "argv").write_text(words)
(here / "boot").write_text("")
for number in itertools.count():
    if (here / "boot").exists():
        (here / "boot").unlink()
        report.write(b'{{"stage":"started"}}\\n')
        if not (here / "stuck").exists():
            report.write((here / "report").read_bytes())
    if (here / "console").exists():
        console.write((here / "console").read_bytes())
        (here / "console").unlink()
    if (here / "off").exists():
        sys.exit(0)
    time.sleep(0.05)
"""
SSH = """\
#!/bin/sh
[ -e {here}/no-login ] && {{ echo "Connection refused" >&2; exit 255; }}
for last; do :; done
exec sh -c "$last"
"""
# Of the guest: its directory, and what is removed there, are not this machine's.
APART = """\
#!/bin/sh
for last; do :; done
case $last in *"systemctl poweroff") exec {here}/../bin/systemctl poweroff ;; esac
exec sh -c "$(printf %s "$last" | sed "s#/run/image-factory-tasks.d#{here}#g")"
"""
COMMIT = """\
#!/bin/sh
[ "$1" = commit ] && [ -e {here}/slow ] && {{ touch {here}/commits; exec sleep 8; }}
exec {real} "$@"
"""
SYSTEMCTL = """\
#!/bin/sh
case $1 in
poweroff) touch {here}/off ;;
reboot) touch {here}/boot; exit 255 ;;
is-system-running) cat {here}/state ;;
esac
"""
UP = '{"stage":"finished","sshd":"L3Vzci9zYmluL3NzaGQK"}\n'


class Scene(NamedTuple):
    """A build with a disk, and the directory of what its guest does."""

    directory: Path
    here: Path

    def plan(self, text: str, keys: str = "") -> Plan:
        """Return the plan of a build with *tasks*, whose sections are in *text*."""
        names = ", ".join(re.findall(r"^\[(.*)\]$", text, re.MULTILINE))
        (self.directory / "x.conf").write_text(
            "[x]\nsource = image\nsource-image = /disk.raw\nvirt-type = qemu\nmount-via = guestfs\nseal = yes\n"
            f"ram = 128M\ntasks = {names}\n{keys}\n{text}\n"
        )
        configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(self.directory / "x.conf")})
        return pipeline.make_plan(configuration, "x", {"output-dir": str(self.directory)})

    def state(self, text: str, keys: str = "") -> State:
        """Return the state of a build whose disk is installed."""
        plan = self.plan(text, keys)
        build = Build(plan, plan.work_path, "vm")
        build.directory.mkdir(exist_ok=True)
        build.disk_path.write_bytes(bytes(MIB))
        return State(build, Disk(build.disk_path))


def run(state: State, *, writes: bool = True) -> State:
    """Carry out the tasks, and write what they have done to the disk."""
    (stage,) = [stage for stage in pipeline.STAGES if stage.name == "tasks"]
    state = pipeline._gone_through(state, stage)
    return carry_out(state, guest.writing_steps(state.build)) if writes else state


def layers_of(state: State) -> list[Path]:
    return sorted(layers.all_in(state.build.directory))


def again(state: State, plan: Plan | None = None) -> State:
    """Return the state of a build that goes on from that of *state*."""
    return State(dataclasses.replace(state.build, plan=plan or state.build.plan, resumed=True), state.disk)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Scene:
    caplog.set_level("INFO", "image-factory")
    here = tmp_path / "here"
    here.mkdir()
    (here / "report").write_text(UP)
    (here / "state").write_text("running\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"qemu-system-x86_64": QEMU, "ssh": SSH, "systemctl": SYSTEMCTL}.items():
        path = programs / name
        path.write_text(text.format(python=sys.executable, here=str(here)))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(guest, "_DIRECTORY", str(tmp_path))
    # What is removed is the guest's.
    monkeypatch.setattr(guest, "_LEAVING", "systemctl poweroff")
    monkeypatch.setattr("image_factory.tasks.running._BROKEN_SECONDS", 3.0)
    return Scene(tmp_path, here)


def sections(**commands: str) -> str:
    """Return sections of tasks, each with the lines that it has after its type."""
    return "\n".join(f"[{name}]\ntask-type = command\ntask-command = {text}" for name, text in commands.items())


def cases(state: State) -> list[tuple[str | None, list[str]]]:
    """Return the tests of the JUnit document, each with the kinds of its elements."""
    root = ElementTree.parse(state.build.plan.junit_path).getroot()
    (suite,) = root.findall("testsuite")
    assert suite.get("name") == "x tasks"
    return [(case.get("name"), [element.tag for element in case]) for case in suite.findall("testcase")]


def test_what_tasks_have_done_is_written_when_all_are_done(scene: Scene) -> None:
    """In one boot; nothing is left in the working directory but the disk."""
    log = scene.directory / "log"
    state = scene.state(sections(one=f"echo one >>{log}", two=f"echo two >>{log}", three="true\ntask-reboot = after"))
    state = run(state)
    assert log.read_text() == "one\ntwo\n"
    assert [(task.name, task.outcome) for task in state.tasks] == [
        ("one", "passed"),
        ("two", "passed"),
        ("three", "passed"),
    ]
    # The overlay of the boot, none where the first task was done, and one after each task.
    written = b"A" * PART + bytes(PART) + b"B" * 3 * PART
    assert state.build.disk_path.read_bytes() == written.ljust(MIB, b"\0")
    assert [path.name for path in state.build.directory.iterdir()] == ["disk.raw"]
    assert cases(state) == [("one", []), ("two", []), ("three", [])]
    argv = (scene.here / "argv").read_text()
    assert "-no-reboot" not in argv
    assert re.search(r"hostfwd=tcp:127\.0\.0\.1:\d+-:22022 ", argv)


def test_files_that_a_task_copies(scene: Scene) -> None:
    """After what the task before it has made; a dry run shows which."""
    target = scene.directory / "target"
    (scene.directory / "motd").write_text("mine\n")
    copy = f"\n[files]\ntask-copy = {scene.directory}/motd:{target}/there/:7:8:0640\n"
    state = scene.state(sections(one=f"mkdir {target}") + copy)
    [commands] = [shown.commands for shown in show(state, guest.steps(state.build)) if shown.name == "Task files"]
    assert [argv[0] for argv in commands][:2] == ["#", "ssh"]
    run(state)
    status = (target / "there/motd").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (7, 8, 0o640)
    (scene.here / "off").unlink()
    error = failing(scene, sections(one=f"touch {target}/file") + copy.replace("there/", "file/x"))
    assert error.message.endswith(f"{target}/file of the image is no directory.")


def test_without_network_the_login_is_there(scene: Scene) -> None:
    """QEMU's own network is restricted, but for the forwarded port."""
    run(scene.state(sections(one="true"), "tasks-network = no"))
    assert re.search(r"hostfwd=tcp:127\.0\.0\.1:\d+-:22022,restrict=on ", (scene.here / "argv").read_text())


def failing(scene: Scene, text: str, keys: str = "") -> BuildError:
    """Have tasks fail; return how.  The disk is as it was, and nothing else is left."""
    state = scene.state(text, keys)
    with pytest.raises(BuildError) as caught:
        run(state)
    assert state.build.disk_path.read_bytes() == bytes(MIB)
    assert [path for path in state.build.directory.iterdir() if path not in layers_of(state)] == [state.build.disk_path]
    return caught.value


def test_a_task_that_fails(scene: Scene) -> None:
    error = failing(scene, sections(one="true", two="echo broken; exit 7", three=f"touch {scene.directory}/three"))
    assert error.message == "Task two failed with status 7: broken."
    assert not (scene.directory / "three").exists()
    root = ElementTree.parse(scene.plan("").junit_path).getroot()
    assert [len(list(case)) for case in root.iter("testcase")] == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("touch HERE/off; sleep 9", "Task one failed: the guest is lost: it went off."),
        ("touch HERE/stuck HERE/boot; sleep 9", "Task one failed: the guest is lost: it rebooted."),
        ("touch HERE/boot", "After task one the guest is lost: it rebooted."),
        ("echo stopping >HERE/state", "After task one the guest goes off or reboots by itself."),
        ("touch HERE/no-login", "After task one nobody can log in: Connection refused."),
        ("echo no connection; exit 255", "Task one failed: the connection to the system broke: no connection."),
        (
            "echo 'Kernel panic - not syncing: x' >HERE/console; sleep 9",
            "Task one failed: the guest is lost: its kernel panicked: x.",
        ),
    ],
)
def test_a_task_that_takes_the_guest_away(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    """Whether it may fail or not."""
    if "boot" in text and "stuck" not in text:
        text = f"touch {scene.here}/stuck; {text}; sleep 0.5"
    work = f"{text.replace('HERE', str(scene.here))}\ntask-allow-failure = yes\ntask-retries = 2"
    if "exit 255" in text:
        work = work.replace("exit 255", f"touch {scene.here}/no-login; exit 255")
    error = failing(scene, sections(one=work, two=f"touch {scene.directory}/two"))
    assert error.message == message
    assert not (scene.directory / "two").exists()


def test_a_system_that_does_not_come_up_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "time_limit", lambda settings, virt_type: 2.0)
    error = failing(scene, sections(one=f"touch {scene.here}/stuck\ntask-reboot = after"))
    assert error.message.startswith("After the reboot of task one: The system did not come up for its tasks: ")


def test_a_system_without_sshd(scene: Scene) -> None:
    (scene.here / "report").write_text('{"stage":"finished","sshd":""}\n')
    error = failing(scene, sections(one="true"))
    assert error.message == "The system has no sshd, by which its tasks are run."
    assert error.hint and "tasks-via = namespace" in error.hint


def test_a_system_that_does_not_go_off(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "_LEAVING", "true")
    monkeypatch.setattr(guest, "time_limit", lambda settings, virt_type: 2.0)
    assert failing(scene, sections(one="true")).message == "The guest did not go off within 2 s after its tasks."


def test_a_full_disk_of_this_machine(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU would stop the guest without a word."""
    monkeypatch.setattr(guest, "_LEAST_FREE", 1 << 62)
    assert "free" in failing(scene, sections(one="sleep 9")).message


def test_a_shell_where_a_task_failed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the guest, while it runs; the disk's own shell would show nothing of it."""
    asked: list[list[str]] = []
    monkeypatch.setattr(command, "interact", lambda argv: asked.append(argv))
    state = dataclasses.replace(scene.state(sections(one="exit 1")), attended=True)
    with pytest.raises(BuildError) as caught:
        run(state)
    assert caught.value.attended
    assert [argv[:2] for argv in asked] == [["ssh", "-t"]]


def test_what_was_not_written_whole_is_written_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no task runs again; when tasks have changed meanwhile, the disk is of no use."""
    text = sections(one=f"echo one >>{scene.directory}/log")
    state = scene.state(text)
    found = begun(state)
    run(state, writes=False)
    found.reach(checkpoint.Reached.TASKED)
    with monkeypatch.context() as patched, pytest.raises(BuildError, match="killed"):
        patched.setattr(guest, "_write_argv", lambda build, layers: ["sh", "-c", "echo killed; exit 1"])
        carry_out(state, guest.writing_steps(state.build))
    with pytest.raises(ConfigurationError, match="tasks changed since they were carried out"):
        checkpoint.resumed(scene.plan(sections(one="other")), state.build.directory)
    assert checkpoint.resumed(scene.plan(text), state.build.directory).stage is checkpoint.Reached.TASKED
    state = again(state)
    carry_out(state, guest.writing_steps(state.build))
    assert (scene.directory / "log").read_text() == "one\n"
    assert state.build.disk_path.read_bytes().rstrip(b"\0") == b"A" * PART + bytes(PART) + b"B" * PART
    assert layers_of(state) == []


def test_tasks_may_change_until_the_disk_has_what_they_did(scene: Scene) -> None:
    state = scene.state(sections(one="true"))
    found = begun(state)
    other = scene.plan(sections(one="false"))
    assert checkpoint.resumed(other, state.build.directory).stage is checkpoint.Reached.INSTALLED
    run(state, writes=False)
    found.reach(checkpoint.Reached.TASKED)
    assert checkpoint.resumed(other, state.build.directory).stage is checkpoint.Reached.APPLIED
    carry_out(state, guest.writing_steps(state.build))
    with pytest.raises(ConfigurationError, match="tasks changed since they were carried out"):
        checkpoint.resumed(other, state.build.directory)


def begun(state: State) -> checkpoint.Checkpoint:
    """Return the checkpoint of a build whose disk is installed."""
    return checkpoint.begin(state.build, checkpoint.InputsUsed())


def test_a_build_goes_on_at_the_task_that_failed(scene: Scene) -> None:
    """With those before it as they are: the disk is the same as if none had failed."""
    log, works = scene.directory / "log", scene.directory / "works"
    text = sections(
        **{name: f"echo {name} >>{log}" for name in ("one", "two")},
        three=f"echo three >>{log}; [ -e {works} ]",
        four=f"echo four >>{log}",
    )
    state = scene.state(text)
    with pytest.raises(BuildError, match="Task three failed"):
        run(state)
    assert len(layers_of(state)) == 2
    works.touch()
    names = [shown.name for shown in show(state, guest.steps(again(state).build))]
    assert names == ["Booting for tasks", "Task three", "Task four", "Shutting down"]
    done = run(again(state))
    assert log.read_text().split() == ["one", "two", "three", "three", "four"]
    assert layers_of(state) == []
    # The second boot's overlay has again what the first one's had; two more follow after its tasks.
    written = b"A" * PART + bytes(PART) + b"B" * 2 * PART
    assert done.build.disk_path.read_bytes() == written.ljust(MIB, b"\0")
    assert [path.name for path in state.build.directory.iterdir()] == ["disk.raw"]


@pytest.mark.parametrize(
    ("change", "kept"),
    {
        "nothing": ("", 3),
        "the last": ("task-command = false three", 2),
        "arguments": ("task-args = x", 2),
        "environment": ("task-environment = A=1", 2),
        "reboot": ("task-reboot = after", 2),
        "network": ("tasks-network = no", 0),
        "the first": ("first", 0),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_change_leaves(scene: Scene, change: str, kept: tuple[str, int]) -> None:
    key, number = kept
    commands = {"one": "true one", "two": "true two", "three": "true three"}
    state = scene.state(sections(**commands))
    run(state, writes=False)
    assert len(layers_of(state)) == 4
    if change == "the first":
        commands["one"] = "true first"
    text = sections(**commands)
    if change == "the last":
        text = text.replace("true three", "false three")
    elif key.startswith("task-"):
        text += f"\n{key}"
    other = again(state, scene.plan(text, key if key.startswith("tasks-") else ""))
    found = layers.Layers(other.build)
    assert len(found.kept()) == number
    assert [task.name for _, task in found.left()] == ["one", "two", "three"][number:]
    assert found.done_path.exists() == (change == "nothing")


def test_secrets_are_part_of_what_a_layer_is(scene: Scene) -> None:
    secrets = scene.directory / "secrets"
    secrets.write_text("TOKEN=one-of-the-task\n")
    secrets.chmod(0o600)
    state = scene.state(sections(one="true", two=f"true\ntask-secrets = {secrets}"))
    run(state, writes=False)
    secrets.write_text("TOKEN=two-of-the-task\n")
    assert len(layers.Layers(again(state).build).kept()) == 1


def test_a_task_that_is_changed_while_it_runs(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """What was done is no layer of the task that there is now."""
    script = scene.directory / "script"
    script.write_text("#!/bin/sh\necho '# other' >>SCRIPT\n".replace("SCRIPT", str(script)))
    state = scene.state(f"[one]\ntask-file = {script}\n{sections(two='true')}")
    run(state, writes=False)
    assert "Tasks were changed while the build carried them out" in caplog.text
    assert layers.Layers(again(state).build).kept() == []


def test_a_build_stops_after_a_task(scene: Scene) -> None:
    """The guest is thrown away: what it has done is in the layers."""
    log = scene.directory / "log"
    state = scene.state(sections(**{name: f"echo {name} >>{log}" for name in ("one", "two", "three")}))
    found = begun(state)
    stopping = dataclasses.replace(state.build, until_task="task:two")
    done = pipeline._carried_out(dataclasses.replace(state, build=stopping), found, "task:two")
    assert (log.read_text(), len(layers_of(state))) == ("one\ntwo\n", 2)
    assert (done.artifacts, found.stage) == ((), checkpoint.Reached.APPLIED)
    assert state.build.disk_path.read_bytes() == bytes(MIB)
    assert [*guest.steps(dataclasses.replace(stopping, resumed=True))] == []
    run(again(state))
    assert log.read_text() == "one\ntwo\nthree\n"


def test_a_monitor_of_a_machine_that_has_ended(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "monitor.in")
    with pytest.raises(BuildError, match="the machine has ended"):
        guest.Monitor(tmp_path / "monitor", lambda: None)


def test_layers_of_a_running_qemu(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has what was written until then, and the disk what was written in all of them."""
    state = scene.state(sections(one="true", two="true", three="true"))
    work = guest._TaskGuest(state.build, layers.Layers(state.build))
    machine = work.machine
    machine.directory.mkdir()
    command.run(guest.overlay_argv(machine))
    node = json.dumps(guest.block_node(guest.DISK_NODE, "qcow2", str(machine.overlay)))
    argv = [
        "/usr/bin/qemu-system-x86_64", "-S", "-machine", "q35", "-nodefaults", "-display", "none", "-blockdev", node,
        "-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=disk,id=disk", *monitor_argv(machine),
    ]  # fmt: skip
    with guest.pipes(machine), command.background(argv, scene.directory / "log") as ended:
        wait_for(lambda: ended() is not None or is_read(machine.pipe("monitor")), "QEMU to listen")
        work._monitor = guest.Monitor(machine.pipe("monitor"), lambda: None)
        work._monitor.tell("qmp_capabilities")
        monkeypatch.setattr(work, "_watch", lambda: None)
        for count in range(1, 5):
            for place in (count, 8):
                line = f'qemu-io -d disk "write -P {count} {place * 64}k 64k"'
                work._monitor.tell("human-monitor-command", **{"command-line": line})
            if count < 4:
                work._keep(count)
        work._monitor.tell("quit")
        wait_for(lambda: ended() is not None, "QEMU to end")
        work._monitor.close()
    for count, path in enumerate([*layers.Layers(again(state).build).kept(), work.machine.overlay], 1):
        raw = scene.directory / "raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True)
        written = bytes(PART) + b"".join(bytes([number]) * PART for number in range(1, count + 1))
        assert raw.read_bytes() == (written.ljust(8 * PART, b"\0") + bytes([count]) * PART).ljust(MIB, b"\0")


def is_read(pipe: Path) -> bool:
    """Whether someone reads from *pipe*."""
    try:
        os.close(os.open(f"{pipe}.in", os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_a_layer_that_qemu_refuses(scene: Scene) -> None:
    (scene.here / "refuse").touch()
    error = failing(scene, sections(one="true"))
    assert error.message == "QEMU refuses to blockdev-snapshot: no"


def test_a_dry_run_shows_what_is_done(scene: Scene) -> None:
    state = scene.state(sections(one="true", two="true\ntask-reboot = after"))
    names = [shown.name for shown in show(state, [*guest.steps(state.build), *guest.writing_steps(state.build)])]
    assert names == ["Booting for tasks", "Task one", "Task two", "Shutting down", "Writing what tasks have done"]
    assert [*guest.steps(scene.state("").build)] == []


def test_secrets_of_tasks_are_hidden(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """In each record of the log, and in JUnit."""
    secrets = scene.directory / "secrets"
    secrets.write_text("TOKEN=hunter22-of-the-task\n")
    secrets.chmod(0o600)
    state = scene.state(sections(one=f'cat "$$TASK_SECRETS"; exit 1\ntask-secrets = {secrets}'))
    with pytest.raises(BuildError, match=r"failed with status 1: TOKEN=\*\*\*\.$"):
        run(state)
    assert "hunter22" not in "".join(map(log.printable, caplog.messages))
    assert "hunter22" not in state.build.plan.junit_path.read_text()


PLAYBOOK = "- hosts: all\n  gather_facts: no\n  tasks: [{command: 'true'}]\n"


def playbook(scene: Scene, text: str, keys: str = "") -> Plan:
    (scene.directory / "play.yml").write_text(text)
    return scene.plan(f"[play]\ntask-type = playbook\ntask-file = {scene.directory}/play.yml\n{keys}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- hosts: all\n  tasks: [{\n", "Syntax Error while loading YAML.*line [23]"),
        ("- hosts: all\n  roles: [nowhere]\n", "the role 'nowhere' was not found"),
        ("- hosts: all\n  tasks: [{no_such_module: {}}]\n", "no_such_module"),
        ("- hosts: all\n  tasks: [{no.such.module: {}}]\n", r"no\.such\.module"),
    ],
)
def test_a_playbook_that_can_not_be_carried_out(scene: Scene, text: str, message: str) -> None:
    """Is found before the build."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        guest.check(playbook(scene, text))
    assert "\n" not in caught.value.message
    guest.check(playbook(scene, PLAYBOOK))


def test_settings_of_the_user_change_no_playbook(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment, nor a configuration in the home directory or beside the playbook."""
    monkeypatch.setenv("ANSIBLE_HOST_KEY_CHECKING", "False")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/nowhere")
    monkeypatch.setenv("HOME", str(scene.directory))
    for name in ("ansible.cfg", ".ansible.cfg"):
        (scene.directory / name).write_text("[defaults]\nhost_key_checking = False\ninventory = /nowhere\n")
    plan = playbook(scene, PLAYBOOK)
    environment = playbooks.environment_of(plan.tasks[0], scene.here, "/run/x")
    (scene.here / "ansible.cfg").touch()
    assert "SSH_AUTH_SOCK" not in environment
    shown = subprocess.run(
        ["ansible-config", "dump", "--only-changed"],
        env=environment, cwd=scene.directory, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert re.search(r"^HOST_KEY_CHECKING\(env: ANSIBLE_HOST_KEY_CHECKING\) = True$", shown, re.MULTILINE)
    assert "/nowhere" not in shown


def test_a_guest_without_python(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    playbook(scene, PLAYBOOK)
    text = f"[play]\ntask-type = playbook\ntask-file = {scene.directory}/play.yml"
    monkeypatch.setattr(guest, "_PYTHON", "echo none >&2; exit 1")
    error = failing(scene, text)
    assert error.message == "Task play can't be run: the system has no Python, which a playbook needs (none)."


@pytest.mark.parametrize(
    ("place", "number"),
    [("task", signal.SIGINT), ("task", signal.SIGKILL), ("commit", signal.SIGTERM), ("commit", signal.SIGKILL)],
)
def test_an_end_meanwhile(scene: Scene, place: str, number: signal.Signals) -> None:
    """The disk is as it was, or is written again; nothing runs on, and --resume does what is left."""
    programs = scene.directory / "bin"
    real = shutil.which("qemu-img", path="/usr/bin:/bin")
    for name, script in {"ssh": APART, "qemu-img": COMMIT}.items():
        (programs / name).write_text(script.format(here=scene.here, real=real))
        (programs / name).chmod(0o755)
    text = sections(
        one=f"echo one >>{scene.directory}/log; touch {scene.here}/begun; [ ! -e {scene.here}/wait ] || exec sleep 8"
    )
    state = scene.state(text)
    plan, disk = state.build.plan, state.build.disk_path
    checkpoint.Checkpoint(
        state.build.directory, checkpoint.inputs_of(plan), checkpoint.outputs_of(plan), plan.date.isoformat(), "qemu",
        [], Path("/proc/sys/kernel/random/boot_id").read_text(),
    ).write()  # fmt: skip
    until = {"task": "tasks", "commit": "clean"}[place]
    argv = [REPOSITORY / "image-factory", "--resume", "--until", until, "--output-dir", scene.directory, "x"]
    environment = {**os.environ, "IMAGE_FACTORY_CONFIG": str(scene.directory / "x.conf")}
    (scene.here / {"task": "wait", "commit": "slow"}[place]).touch()
    sign = scene.here / {"task": "begun", "commit": "commits"}[place]
    with (
        (scene.directory / "stderr").open("wb") as stderr,
        subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stderr=stderr) as process,
    ):
        wait_for(lambda: sign.exists() or process.poll() is not None, "the task, or what it has done, to be written")
        process.send_signal(number)
        status = process.wait(60)
    assert status == (-9 if number == signal.SIGKILL else 128 + number), (scene.directory / "stderr").read_text()
    assert disk.read_bytes() == bytes(MIB)

    wait_for(lambda: str(scene.directory) not in command_lines(), "all programs to end")
    for name in ("wait", "slow", "begun", "off"):
        (scene.here / name).unlink(missing_ok=True)
    (scene.directory / "log").write_text("")
    # Its name may go.
    written = disk.open("rb")
    done = subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (scene.directory / "log").read_text() == ("one\n" if place == "task" else "")
    if place == "task":
        assert done.returncode == 0, done.stderr
        assert layers.are_unwritten(state.build.directory)
        assert disk.read_bytes() == bytes(MIB)
        assert {path for path in state.build.directory.iterdir() if path not in layers_of(state)} == {
            disk,
            state.build.directory / "checkpoint.json",
        }
    else:
        # There is no system on it to be cleaned.
        assert done.returncode == 1, done.stderr
        assert written.read()[:PART] == b"A" * PART
        assert not state.build.directory.exists()
    written.close()


def command_lines() -> str:
    """Return the command lines of all other processes."""
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
