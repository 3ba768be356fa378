"""One task is carried out in a place, which is this machine here: its tries, its time, its secrets, its end."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from image_factory.base import events, log
from image_factory.base.command import output
from image_factory.base.errors import BuildError
from image_factory.configuration.settings import Task
from image_factory.tasks import digest_of, hidden_in, script_of
from image_factory.tasks.running import Place, PlaceGoneError, run_task

ALLOWED = {"passed", "failed", "allowed"}


class Told:
    """An observer that keeps how tasks ended."""

    def __init__(self) -> None:
        self.found: list[events.TaskEnded] = []

    def notice(self, event: events.Event) -> None:
        """Keep *event* if it is one."""
        if isinstance(event, events.TaskEnded):
            self.found.append(event)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Give a place whose shell is this machine's."""
    return Place(lambda line: ["sh", "-c", line], str(tmp_path / "task"))


@pytest.fixture(autouse=True)
def log_of_its_own(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Have each test see all messages, and hide nothing of another one's."""
    caplog.set_level("INFO", "image-factory")
    monkeypatch.setattr(log, "_hidden", [])


def command(text: str, **changes: object) -> Task:
    """Return a task that runs *text*."""
    return replace(Task("work", "work", "command", command=text), **changes)


def ended(task: Task, place: Place) -> tuple[events.TaskEnded, BuildError | None]:
    """Carry out *task*; return what observers are told, and what is raised."""
    told = Told()
    error = None
    with events.observed(told):
        try:
            run_task(task, place)
        except BuildError as raised:
            error = raised
    (found,) = told.found
    assert found.outcome in ALLOWED
    assert not Path(place.directory).exists()
    return found, error


def test_a_script_gets_its_arguments_environment_and_secrets(tmp_path: Path, place: Place) -> None:
    """All that a task is given is there meanwhile, for root alone, and none of it afterwards."""
    script = tmp_path / "script"
    script.write_text(
        f'#!/bin/sh\n{{ printf "%s\\n" "$@" "$MODE" "$(pwd)" "$(umask)"; cat "$TASK_SECRETS"; '
        f'stat -c %a "$TASK_SECRETS" "$(dirname "$TASK_SECRETS")"; read -r x || echo no input; }} >{tmp_path}/said\n'
    )
    secrets = tmp_path / "secrets"
    secrets.write_text("TOKEN=hunter22hunter\n")
    secrets.chmod(0o600)
    task = Task(
        "./script", "", "script", script, args=("a b", "$(c)"), environment=(("MODE", "x'y"),), secrets=secrets
    )  # fmt: skip
    found, error = ended(task, place)
    assert error is None
    assert (found.name, found.type, found.outcome, found.message) == ("./script", "script", "passed", "")
    assert (tmp_path / "said").read_text().splitlines() == [
        "a b", "$(c)", "x'y", "/", "0022", "TOKEN=hunter22hunter", "600", "700", "no input",
    ]  # fmt: skip


@pytest.mark.parametrize("manager", ["apt-get", "dnf", "zypper"])
def test_packages_are_installed_by_the_manager_that_is_there(tmp_path: Path, manager: str) -> None:
    """Without "--" before their names: dnf 5 does not know it (rpm-software-management/dnf5#700)."""
    program = tmp_path / manager
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    script = script_of(Task("work", "work", "packages", packages=("one", "two")))
    words = ["/bin/sh", "-s", "-", *script.arguments]
    environment = {"PATH": str(tmp_path)}
    done = subprocess.run(words, input=script.content, env=environment, stdout=subprocess.PIPE, check=True)
    assert re.fullmatch(r"(-[-\w]+ |-o [^ ]+ )*install one two", done.stdout.decode().splitlines()[-1])


def test_a_failure_names_task_status_and_last_line(place: Place) -> None:
    """Escape sequences of what it printed reach nobody."""
    found, error = ended(command(r"printf 'one\n\033[31mtwo\033]0;title\007\n'; exit 3"), place)
    assert error is not None
    assert error.message == "Task work failed with status 3: two."
    assert error.hint == "--shell-on-error gives a shell where a task failed."
    assert (found.outcome, found.message) == ("failed", "failed with status 3: two")


@pytest.mark.parametrize(
    ("first", "wanted"),
    [("#!/usr/bin/nosuch -x", "/usr/bin/nosuch"), ("#! /usr/bin/env -S nosuch's x", "nosuch's"), ("#!/bin/sh", "")],
)
def test_a_system_without_what_runs_a_script(tmp_path: Path, place: Place, first: str, wanted: str) -> None:
    """The system would say that it has no such script."""
    script = tmp_path / "script"
    script.write_text(f"{first}\n")
    _, error = ended(Task("work", "", "script", script), place)
    assert (error.message if error else "") == (
        wanted and f"Task work failed with status 127: the system has no {wanted}, which runs it."
    )
    assert not Path(place.directory).exists()


def test_a_failure_that_is_allowed_is_a_warning(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """The build goes on, and says so."""
    found, error = ended(command("exit 4", allow_failure=True), place)
    assert (error, found.outcome, found.message) == (None, "allowed", "failed with status 4")
    assert "Task work failed with status 4. It may fail." in caplog.messages


def test_a_task_is_tried_again(tmp_path: Path, place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """As often as asked, and no more when it succeeds."""
    work = f"echo >>{tmp_path}/tries; [ $(wc -l <{tmp_path}/tries) = 3 ]"
    found, error = ended(command(work, retries=5), place)
    assert (error, found.outcome) == (None, "passed")
    assert (tmp_path / "tries").read_text() == "\n\n\n"
    assert caplog.messages.count("Task work failed with status 1. It is tried again.") == 2
    (tmp_path / "tries").unlink()
    _, error = ended(command(f"echo >>{tmp_path}/tries; exit 1", retries=1), place)
    assert error is not None
    assert (tmp_path / "tries").read_text() == "\n\n"


def test_what_hangs_is_ended_where_it_runs(tmp_path: Path, place: Place) -> None:
    """So that ssh needs no terminal, and nothing of it goes on beside the next try."""
    work = f"echo $$ >>{tmp_path}/pids; sleep 600 & wait"
    found, error = ended(command(work, timeout=1.0, retries=1), place)
    assert error is not None
    assert error.message == "Task work did not end within 1 s."
    assert found.outcome == "failed"
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    assert not any(Path("/proc", pid).exists() for pid in pids)


def test_what_the_place_does_not_end_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A system that answers no more is no reason to wait for ever."""
    monkeypatch.setattr("image_factory.tasks.running.GRACE_SECONDS", 0.5)
    deaf = Place(lambda line: ["sleep", "600"], str(tmp_path / "task"))
    _, error = ended(command("true", timeout=0.5), deaf)
    assert error is not None
    assert error.message == "Task work did not end within 0 s."


def test_a_place_that_is_gone_ends_all(tmp_path: Path, place: Place) -> None:
    """No other try is made, and nothing is passed over."""

    def watch() -> None:
        if (tmp_path / "gone").exists():
            raise PlaceGoneError("the guest went off")

    task = command(f"touch {tmp_path}/gone; sleep 5", retries=3, allow_failure=True)
    told = Told()
    with events.observed(told), pytest.raises(PlaceGoneError, match="the guest went off"):
        run_task(task, replace(place, watch=watch))
    assert [event.outcome for event in told.found] == ["failed"]


def test_what_can_not_be_put_there_is_said(tmp_path: Path) -> None:
    """A full tmpfs, for one."""
    nowhere = Place(lambda line: ["sh", "-c", line], str(tmp_path / "none" / "task"))
    _, error = ended(command("true"), nowhere)
    assert error is not None
    assert error.message.startswith("Task work could not be put into the system: ")
    assert "none/task" in error.message


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """And no traceback."""
    _, error = ended(command("true"), Place(lambda line: ["image-factory-no-such"], str(tmp_path / "task")))
    assert error is not None
    assert error.message.startswith("Task work can't be run: Can't run image-factory-no-such")


def test_secrets_are_shown_by_nobody(tmp_path: Path, place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Neither as a line, nor in a line, nor coloured."""
    secrets = tmp_path / "secrets"
    secrets.write_text('TOKEN="hunter22hunter"\npassphrase-of-a-line\n-----BEGIN KEY-----\n')
    secrets.chmod(0o600)
    work = (
        'cat "$TASK_SECRETS"; TOKEN=$(head -n 1 "$TASK_SECRETS" | cut -d \\" -f 2); printf "x\\033[31m$TOKEN\\n"; '
        'echo "the last: $TOKEN"; exit 1'
    )
    found, error = ended(command(work, secrets=secrets), place)
    assert error is not None
    shown = [log.printable(text) for text in [*caplog.messages, error.message, found.message]]
    assert error.message == "Task work failed with status 1: the last: ***."
    assert not [text[:80] for text in shown if "hunter" in text or "22hunter" in text or "passphrase-of" in text]
    assert any("-----BEGIN KEY-----" in text for text in shown)


def test_a_line_that_is_too_long_is_cut_in_no_secret() -> None:
    """Wherever the secret is in what is read at once."""
    log.hide(["hunter22hunter"])
    for place in range(1, 14):
        lines: list[str] = []
        cut = output.Lines(lines.append)
        cut.feed(b"x" * output.LONGEST_LINE + b"hunter22hunter"[:place])
        cut.feed(b"hunter22hunter"[place:] + b"y" * output.LONGEST_LINE + b"\n")
        assert len(lines) > 1
        assert not [line for line in lines if "hunter" in log.printable(line) or "r22" in log.printable(line)]
        assert log.printable("".join(lines)) == "x" * output.LONGEST_LINE + "***" + "y" * output.LONGEST_LINE


def test_a_gigabyte_fills_no_log(
    place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has the beginning, the error the end; the memory neither whole."""
    monkeypatch.setattr(output, "MOST_LOGGED", 64 << 10)
    _, error = ended(command("head -c 1073741824 /dev/zero | tr '\\0' x; echo; echo end; exit 1"), place)
    assert error is not None
    assert error.message == "Task work failed with status 1: end."
    assert sum(map(len, caplog.messages)) < 1 << 20
    assert any("the log has no more of it" in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("TOKEN=hunter22", ["hunter22"]),
        ("export TOKEN='hunter22'", ["hunter22"]),
        ("token: hunter22", ["hunter22"]),
        ('  "token": "hunter22",', ["hunter22"]),
        ("PIN=1234", ["PIN=1234"]),
        ("QWxhZGRpbg==", ["QWxhZGRpbg=="]),
        ("https://user:pass@host/", ["https://user:pass@host/"]),
        ("database:\n[default]\n-----BEGIN X-----\n\nabc\n", []),
        ("short-one\nmuch-longer-one\n", ["much-longer-one", "short-one"]),
    ],
)
def test_what_of_a_file_of_secrets_is_hidden(text: str, hidden: list[str]) -> None:
    """Values, and lines that are none; not what every such file has."""
    assert hidden_in(text.encode()) == hidden


def test_the_digest_is_of_what_is_done(tmp_path: Path) -> None:
    """Not of secrets, which it would let others guess, and not of how often it is tried."""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    secrets = tmp_path / "secrets"
    secrets.touch(0o600)
    task = Task("a", "a", "script", script)
    same = [replace(task, secrets=secrets), replace(task, retries=3), replace(task, name="b")]
    others = [replace(task, args=("x",)), replace(task, environment=(("A", "b"),)), replace(task, type="playbook")]
    assert {digest_of(each) for each in same} == {digest_of(task)}
    digests = {digest_of(each) for each in [task, *others]}
    script.write_text("#!/bin/sh\nexit\n")
    assert len({digest_of(task), *digests}) == 5
    assert re.fullmatch("[0-9a-f]{64}", digest_of(task))
