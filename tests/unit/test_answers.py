"""Answer files: templates, what they are made from, and what is told of their errors."""

import datetime
import stat
from pathlib import Path

import pytest

from image_factory import checkpoint, cli, pipeline
from image_factory.base import events
from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.model import Build, Plan
from image_factory.sources import answers, installer
from image_factory.sources.installer import delivery, virt_install

from ..conftest import shown

SECRET = "$6$salt$hunter2"


def make_plan(
    directory: Path, template: str | bytes, extra: str = "", name: str = "a.cfg.j2", flags: dict[str, str] | None = None
) -> Plan:
    """Return the plan of an image with the answer file *template* and the lines *extra* in its section."""
    path = directory / name
    path.write_bytes(template if isinstance(template, bytes) else template.encode())
    (directory / "linux").touch()
    configuration = directory / "image-factory.conf"
    configuration.write_text(
        f"[DEFAULT]\nshared = all\n[x]\nlinux = {directory}/linux\ninitrd = {directory}/linux\n"
        f"preseed = {path}\n{extra}"
    )
    return pipeline.make_plan(
        Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}),
        "x",
        {"output-dir": str(directory), **(flags or {})},
    )


def rendered(directory: Path, template: str, extra: str = "", **flags: str) -> str:
    return answers.content(make_plan(directory, template, extra, flags=flags)).decode()


KEYS = {
    "own": ("{{ name }}", "name = value", "value"),
    "dash": ("{{ my_name }}", "my-name = value", "value"),
    "underscore": ("{{ my_name }}", "my_name = value", "value"),
    "upper case": ("{{ my_name }}", "My-Name = value", "value"),
    "references": ("{{ a }}", "a = <${b}>\nb = $$5", "<$5>"),
    "of DEFAULT": ("{{ shared }}", "", "all"),
    "of image-factory": ("{{ image_size }}", "image-size = 3G", "3G"),
    "default of image-factory": ("{{ ram }}", "", "1G"),
    "several lines": (
        "{% for key in keys.strip().splitlines() %}[{{ key }}]{% endfor %}",
        "keys =\n  a b\n  c",
        "[a b][c]",
    ),
    "machine": ("{{ arch }} {{ firmware }}", "arch = amd64", "x86_64 bios"),
    "firmware": ("{{ firmware }}", "firmware = UEFI", "uefi"),
    "not there, with a default": ("{{ name | default('x') }}", "", "x"),
    "not there, looked for": ("{% if name is defined %}x{% endif %}.", "", "."),
    "default that is set": ("{% set name = name | default('x') %}{{ name }}", "name = y", "y"),
    "error in a key that is not asked for": ("x", "broken = ${absent}", "x"),
    "no quoting": ("{{ name }}", "name = <&\"'>", "<&\"'>"),
    "lines of statements": ("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "", "a\n  b\nc\n"),
    "not ASCII": ("{{ name }} ü", "name = ö", "ö ü"),
}


@pytest.mark.parametrize(("template", "extra", "expected"), KEYS.values(), ids=KEYS)
def test_keys(tmp_path: Path, template: str, extra: str, expected: str) -> None:
    assert rendered(tmp_path, template, extra) == expected


def test_flags_win(tmp_path: Path) -> None:
    assert rendered(tmp_path, "{{ image_size }}", "image-size = 3G", **{"image-size": "4G"}) == "4G"


ERRORS: dict[str, tuple[str | bytes, str, str]] = {
    "unknown key": (f"{SECRET}\n\n{{{{ my_name }}}}", "", "line 3: there is no key 'my-name'."),
    "unknown key in a loop": ("\n{% for a in b %}{% endfor %}", "", "line 2: there is no key 'b'."),
    "part of a value": (f"{SECRET}\n{{{{ shared.{SECRET[3:7]} }}}}", "", "line 2: a part of a value is not there."),
    "secret as a part": ("{{ {}['hunter2'] }}", "", "line 1: a part of a value is not there."),
    "not closed": (f"\n{{{{ '{SECRET}'", "", "line 2: Jinja2 doesn't understand the template there."),
    "unknown tag": ("a\n{% hunter2 %}", "", "line 2: Jinja2 doesn't understand the template there."),
    "unknown filter": ("a\n{{ shared | hunter2 }}", "", "line 2: Jinja2 doesn't understand the template there."),
    "wrong value": (f"\n\n{{{{ '{SECRET}' + 1 }}}}", "", "line 3: the template can't be rendered (TypeError)."),
    "another template": ("a\n{% include 'b' %}", "", "line 2: the template includes 'b', which is not there."),
    "way out of the sandbox": (
        "{{ ''.__class__.__mro__ }}",
        "",
        "line 1: the template can't be rendered (SecurityError).",
    ),
    "huge": ("{{ range(10 ** 9) }}", "", "line 1: the template can't be rendered (OverflowError)."),
    "not UTF-8": (b"\nhunter2\xff", "", "line 2 is not UTF-8."),
}


@pytest.mark.parametrize(("template", "extra", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(tmp_path: Path, template: str | bytes, extra: str, message: str) -> None:
    """They name file, line and key, and show nothing of the answer file."""
    plan = make_plan(tmp_path, template, extra)
    with pytest.raises(ConfigurationError) as caught:
        installer.check(plan)
    separator = ", " if message.startswith("line") else " "
    assert caught.value.message == f"[x] preseed: {tmp_path}/a.cfg.j2{separator}{message}"
    assert "hunter2" not in f"{caught.value.message}{caught.value.hint}"
    assert caught.value.__suppress_context__


def test_parts_of_a_template(tmp_path: Path) -> None:
    """They know the keys, and what the template has set; their names are those of its directory."""
    (tmp_path / "parts/more").mkdir(parents=True)
    (tmp_path / "parts/a.j2").write_text("{{ word }} {{ own }}\n{% include 'parts/more/b' %}")
    (tmp_path / "parts/more/b").write_bytes(b"\xef\xbb\xbfb {{ other }}\r\n")
    (tmp_path / "parts/macros.j2").write_text("{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}")
    text = (
        "{% set word = 'set' %}\n{% from 'parts/macros.j2' import twice %}\n{% include 'parts/a.j2' %}\n"
        "{{ twice(own) }}{% include 'absent' ignore missing %}\n"
        "{% include 'parts/' ~ name ~ '.j2' %}"
    )
    assert rendered(tmp_path, text, "own = O\nother = <${own}>\nname = a\nbroken = ${absent}") == (
        "set O\nb <O>\nOOset O\nb <O>\n"
    )


PARTS = {
    "unknown key": ("x\n{{ my_name }}", "part, line 2: there is no key 'my-name'."),
    "wrong": ("\n\n{% hunter2 %}", "part, line 3: Jinja2 doesn't understand the template there."),
    "not UTF-8": (b"hunter2\xff", "part, line 1 is not UTF-8."),
    "not there": ("\n{% include 'c' %}", "part, line 2: the template includes 'c', which is not there."),
    "itself": ("{% include 'part' %}", "part, line 1: the template can't be rendered (RecursionError)."),
    "up": (
        "{% include 'dir/../../b' %}",
        "a.cfg.j2: the template includes 'dir/../../b', which is outside of its directory.",
    ),
    "absolute": (
        "{% include '/etc/shadow' %}",
        "a.cfg.j2: the template includes '/etc/shadow', which is outside of its directory.",
    ),
    "link": ("{% include 'link' %}", "a.cfg.j2: the template includes 'link', which is outside of its directory."),
    "directory": ("{% include 'dir' %}", "part, line 1: the template includes 'dir', which is not there."),
}


@pytest.mark.parametrize(("part", "message"), PARTS.values(), ids=PARTS)
def test_errors_of_parts(tmp_path: Path, part: str | bytes, message: str) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("/etc/shadow")
    (tmp_path / "part").write_bytes(part if isinstance(part, bytes) else part.encode())
    plan = make_plan(tmp_path, "a\n{% include 'part' %}")
    with pytest.raises(ConfigurationError) as caught:
        installer.check(plan)
    assert caught.value.message == f"[x] preseed: {tmp_path}/{message}"


def test_refusal(tmp_path: Path) -> None:
    plan = make_plan(
        tmp_path, "{% if firmware == 'uefi' %}{{ refuse('firmware', 'too new.') }}{% endif %}", "firmware=uefi"
    )
    with pytest.raises(ConfigurationError) as caught:
        installer.check(plan)
    assert caught.value.message == f"[x] preseed: {tmp_path}/a.cfg.j2: too new."
    assert caught.value.hint == "Change firmware in [x]."


def test_error_in_a_key(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "{{ name }}", "name = ${absent}")
    with pytest.raises(ConfigurationError, match=r"^\[x\] name: \${absent} is not defined\.$"):
        installer.check(plan)


def test_file_that_can_not_be_read(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "")
    (tmp_path / "a.cfg.j2").unlink()
    with pytest.raises(ConfigurationError, match=r"a\.cfg\.j2 can't be read: No such file or directory\.$"):
        answers.content(plan)


MENDED = {
    "as it is": (b"{{ absent }} \r\t\n", b"{{ absent }} \r\t\n"),
    "Windows": (b"\xef\xbb\xbfa \xc3\xbc\r\n\r\nb", b"a \xc3\xbc\n\nb"),
    "not UTF-8": (b"\xff\r\n", b"\xff\r\n"),
}


@pytest.mark.parametrize(("data", "expected"), MENDED.values(), ids=MENDED)
def test_other_files_are_mended_only(tmp_path: Path, data: bytes, expected: bytes) -> None:
    plan = make_plan(tmp_path, data, name="a.cfg")
    assert answers.content(plan) == expected
    # Where a person repeats it by hand, the same is used.
    assert delivery.is_made(plan.settings) == (data != expected)


def test_plan_shows_no_variables(tmp_path: Path) -> None:
    assert "hunter2" not in repr(make_plan(tmp_path, "", "root-password-hash = hunter2"))


def build_of(plan: Plan) -> Build:
    return Build(plan, plan.output_dir / "work", "vm")


@pytest.mark.parametrize(("name", "verb"), [("a.cfg.j2", "render"), ("a.cfg", "copy")])
def test_what_the_installer_gets(tmp_path: Path, name: str, verb: str) -> None:
    plan = make_plan(tmp_path, "{{ shared }}", name=name)
    build = build_of(plan)
    build.directory.mkdir()
    installer._copy_answer_file(build)
    copy = build.directory / "answers/a.cfg"
    assert copy.read_text() == ("all" if verb == "render" else "{{ shared }}")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert virt_install.kernel_arguments(plan.settings) == "preseed/url=file:///a.cfg"
    words = virt_install.virt_install_argv(build, ["--location", "LOCATION"], "TYPE")
    assert words[words.index("--initrd-inject") + 1] == str(copy)
    commands = shown(build, installer.steps(build))["Caching the installer"]
    assert ["#", verb, str(tmp_path / name), "->", str(copy)] in commands


def test_link_in_place_of_the_copy(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "new")
    (tmp_path / "other").write_text("old")
    (tmp_path / "copy").symlink_to(tmp_path / "other")
    with pytest.raises(FileExistsError):
        answers.write(plan, tmp_path / "copy")
    assert (tmp_path / "other").read_text() == "old"


def test_checkpoint_has_the_rendered_file(tmp_path: Path) -> None:
    """What counts is what the installer got, whether the template or a key makes the difference."""
    plan = make_plan(tmp_path, "{{ name }}", "name = a")
    before = checkpoint.inputs_of(plan)
    (tmp_path / "copy").write_text("a")
    assert checkpoint.inputs_of(plan, [events.InputUsed("preseed", "", tmp_path / "copy")]) == before
    assert checkpoint.inputs_of(make_plan(tmp_path, "{% if name %}{{ name }}{% endif %}", "name = a")) == before
    changed = checkpoint.inputs_of(make_plan(tmp_path, "{{ name }}", "name = b"))
    assert [key for key in before if before[key] != changed[key]] == ["preseed"]


def test_checkpoint_names_no_template_as_what_was_used(tmp_path: Path) -> None:
    """A record has digests of what the installer got, and a template is not that."""
    plan = make_plan(tmp_path, "{{ shared }}")
    used = [("preseed", str(plan.settings.answer_file), str(tmp_path / "copy"), [1, 2], None)]
    today = datetime.date(2026, 1, 2).isoformat()
    found = checkpoint.Checkpoint(tmp_path, {}, {}, today, "TYPE", used, "boot")
    assert [event.path for event in found.inputs_used(plan)] == [None]


def test_show_answers(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    cli._show_answers(make_plan(tmp_path, "{{ shared }} ü\n"))
    assert capfdbinary.readouterr().out == "all ü\n".encode()


def test_show_answers_of_an_image_without(tmp_path: Path) -> None:
    (tmp_path / "own.conf").write_text("[x]\nlinux = /l\ninitrd = /i\n")
    plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "own.conf")}), "x", {})
    with pytest.raises(ConfigurationError, match=r"^\[x\] has no answer file\.$"):
        cli._show_answers(plan)


@pytest.mark.parametrize(("name", "made"), [("a.cfg.j2", True), ("a.cfg", False)])
def test_repeating_by_hand(tmp_path: Path, name: str, made: bool) -> None:
    """What a template became is gone by then."""
    plan = make_plan(tmp_path, "", name=name)
    commands = virt_install.by_hand_argvs(build_of(plan), ["--location", "LOCATION"], "TYPE")
    copy = tmp_path / "x-by-hand/answers/a.cfg"
    injected = commands[-1][commands[-1].index("--initrd-inject") + 1]
    assert injected == str(copy if made else tmp_path / name)
    assert (["sh", "-c", f"umask 077; image-factory --show-answers x > {copy}"] in commands) == made
