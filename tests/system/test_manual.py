"""The manual pages, README and NEWS say what the program has."""

import argparse
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import image_factory
from image_factory import cli, pipeline, sources
from image_factory.checks import audit
from image_factory.configuration import files
from image_factory.configuration.files import Configuration
from image_factory.configuration.settings import ImageSettings, TaskSettings, UploadSettings, declarations
from image_factory.finishing.seal.captured import CAPTURED
from image_factory.finishing.seal.operations import OPERATIONS
from image_factory.outputs import OUTPUTS, targets
from image_factory.outputs.targets import TARGETS
from image_factory.sources import forms

REPOSITORY = Path(__file__).resolve().parents[2]
MANUAL = REPOSITORY / "image-factory.1.md"
HELPER_MANUAL = REPOSITORY / "image-factory-sudo-helper.1.md"
README = REPOSITORY / "README.md"


def entries(page: Path, heading: str) -> dict[str, str]:
    """Return the bold words of the terms below *heading* of *page*, with what is said of them."""
    section = re.split(rf"^# {heading}\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    section = re.split(r"^# ", section, flags=re.MULTILINE)[0]
    found = {}
    for term, text in re.findall(r"^(\S.*)\n:   (.*(?:\n    .*)*)", section, re.MULTILINE):
        for words in re.findall(r"\*\*(.+?)\*\*", term):
            found[words.replace("\\", "")] = text
    return found


def options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def ini_examples(page: Path) -> list[str]:
    return re.findall(r"^```ini\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("kind", "heading"),
    [(ImageSettings, "CONFIGURATION"), (UploadSettings, "UPLOAD DESTINATIONS"), (TaskSettings, "TASKS")],
)
def test_each_setting_has_an_entry_with_its_default(kind: type[Any], heading: str) -> None:
    found = entries(MANUAL, heading)
    for key, declaration in declarations(kind):
        assert key in found
        # A default that is computed, the current directory, or none at all is told in words.
        if isinstance(declaration.default, str) and declaration.default not in ("", "."):
            assert f"Default: *{declaration.default}*." in " ".join(found[key].split())


def test_the_manual_has_no_setting_that_is_unknown() -> None:
    known = {key for key, _ in declarations(ImageSettings)}
    assert set(entries(MANUAL, "CONFIGURATION")) == known
    known = {key for key, _ in declarations(UploadSettings)}
    commands = {"post-upload-command", "post-upload-command1", "post-upload-command2"}
    assert set(entries(MANUAL, "UPLOAD DESTINATIONS")) == known | commands


def test_the_manual_has_each_format() -> None:
    assert [*entries(MANUAL, "FORMATS")] == [*OUTPUTS]
    readme = README.read_text(encoding="utf-8")
    assert f"Formats: {', '.join(OUTPUTS)}." in " ".join(readme.split())


def test_the_manual_has_each_target_with_what_the_table_says() -> None:
    found = entries(MANUAL, "TARGETS")
    assert {name: " ".join(text.split()).replace("\\", "") for name, text in found.items()} == {
        target.name: " ".join(targets.sentences(target)) for target in TARGETS.values()
    }
    readme = " ".join(README.read_text(encoding="utf-8").split())
    assert f"for {', '.join([*TARGETS][:-1])} or {[*TARGETS][-1]}" in readme


def test_the_manual_has_the_options_of_the_command_line() -> None:
    assert set(entries(MANUAL, "OPTIONS")) == set(options(cli.make_parser()))


SOURCES = {
    "installer": "linux = {here}/file\ninitrd = {here}/file\nautoinstall = {here}/answers\ntasks = work\n"
    "format = raw, qcow2, raw.zst, ova\n",
    "image": "source = image\nsource-image = {here}/disk.xz\nimage-size = 4G\nformat = qcow2\n",
    "bootstrap": "source = bootstrap\nbootstrap = {here}/tree.yaml\ncache-tree = yes\nfirmware = hybrid\n"
    "format = raw, raw.zst\n",
    "elements": "source = elements\nelements = system\nskip-base = yes\nextra-packages = jq\n"
    "elements-path = {here}/elements\n"
    "format = raw\n",
    "capture": "source = capture\ncapture-from = ssh://root@host\nfirmware = hybrid\nformat = raw\n",
}
# With others the disk is made before all phases have run.
ON_DISK = "source = elements\nelements = system bootloader\nskip-base = yes\nelements-path = {here}/elements\n"
ALL_KEYS = """
[x]
virt-type = auto
mount-via = {way}
installer-logs = yes
seal = yes
keep = 1
copy = {here}/answers:/etc/
first-boot = {here}/answers
audit = yes
manifest = yes
manifest-text = list
provenance = yes
sign-key = {here}/key
test-boot = yes
target = openstack
upload-destinations = here
post-build-command = true
[here]
upload-type = rsync
upload-target = host:/srv
upload-index = simplestreams
upload-keep = 1
[work]
task-type = command
task-command = true
"""


@pytest.mark.parametrize("way", ["loop", "guestfs"])
def test_the_manual_has_each_step_of_a_build_in_its_order(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    (tmp_path / "answers").write_text("#cloud-config\nautoinstall: {}\n")
    (tmp_path / "disk.xz").write_bytes(b"\xfd7zXZ\0")
    (tmp_path / "tree.yaml").write_text("suite: trixie\nsources: [deb http://mirror.example.com trixie main]\n")
    for name in ("system", "bootloader"):
        (tmp_path / "elements" / name).mkdir(parents=True)
    (tmp_path / "elements/system/element-provides").write_text("operating-system\n")
    places = {
        "FILE": r"\S+",
        "FORMATS": r"\S+(?:, \S+)+",
        "FORMAT": r"\S+",
        "NAME": r"\S+",
        "SECTION": r"\S+",
        "FIRMWARE": r"\w+",
    }
    terms = [re.sub("|".join(places), lambda match: places[match[0]], term) for term in entries(MANUAL, "STEPS")]
    found: set[int] = set()
    assert SOURCES.keys() == sources.SOURCES.keys()
    for keys in (*SOURCES.values(), ON_DISK):
        (tmp_path / "x.conf").write_text(ALL_KEYS.replace("[x]\n", f"[x]\n{keys}").format(here=tmp_path, way=way))
        configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "x.conf")})
        plan = pipeline.make_plan(configuration, "x", {"output-dir": str(tmp_path)})
        places_found = []
        for name, _ in pipeline.described(plan):
            matching = [number for number, term in enumerate(terms) if re.fullmatch(term, name)]
            assert len(matching) == 1, f"the manual has not the step {name!r}"
            places_found += matching
        # The audit mounts its copy as the disk was mounted.
        once = list(dict.fromkeys(places_found))
        assert once == sorted(once)
        found |= {*once}
    # What else is logged as a step: a wait, and what --resume looks at.
    others = [term for number, term in enumerate(terms) if number not in found]
    layers = ["Restoring the tree", "Keeping the tree"]
    assert others == [*layers, "Preparing devices", "Waiting for other installations", "Checking the images"]


def test_the_manual_has_each_check_of_the_audit_with_its_sentence() -> None:
    found = entries(MANUAL, "AUDIT")
    assert {name: " ".join(text.split()) for name, text in found.items()} == {
        check.name: check.sentence for check in audit.CHECKS
    }


def test_the_manual_has_each_operation_of_sealing_with_its_sentence() -> None:
    found = entries(MANUAL, "SEALING")
    assert {name: " ".join(text.split()) for name, text in found.items()} == {
        operation.name: operation.help for operation in (*OPERATIONS, *CAPTURED)
    }
    assert all(operation.help.endswith(".") for operation in (*OPERATIONS, *CAPTURED))


def test_the_manual_has_each_form_of_a_template_key() -> None:
    found = entries(MANUAL, "TEMPLATE KEYS")
    assert {name: text.replace("\\", "") for name, text in found.items()} == {
        name: f"{form.accepted[:1].upper()}{form.accepted[1:]}." for name, form in forms.FORMS.items()
    }


def test_readme_and_the_manual_have_keys_that_templates_declare() -> None:
    """README names the usual ones; all of a shipped template are listed by --keys."""
    declared = {
        key for path in (REPOSITORY / "data").glob("*.j2") for key in forms.declared(path.read_text(), "x86_64")
    }
    sentence = re.search(r"The keys\n(.*?) change\s+what a template makes", README.read_text(), re.DOTALL)
    assert sentence is not None
    named = set(re.findall("`([a-z-]+)`", sentence[1]))
    assert len(named) > 8
    assert named <= declared
    assert "--keys IMAGE" in " ".join(README.read_text().split())


def test_the_manual_has_the_exit_statuses() -> None:
    assert set(entries(MANUAL, "EXIT STATUS")) == {"0", "1", "2", "129", "130", "143"}


def test_the_helper_manual_has_each_verb(helper: ModuleType) -> None:
    found = entries(HELPER_MANUAL, "COMMANDS")
    synopsis = HELPER_MANUAL.read_text(encoding="utf-8").partition("# DESCRIPTION")[0]
    for verb in helper.VERBS:
        assert verb.words[0] in found
        assert f"**image-factory-sudo-helper** **{verb.words[0]}**" in synopsis


def test_the_helper_is_of_the_package_version(helper: ModuleType) -> None:
    assert image_factory.__version__ == helper.VERSION


def test_news_begins_with_this_version() -> None:
    news = (REPOSITORY / "NEWS.md").read_text(encoding="utf-8")
    assert news.startswith(f"# image-factory {image_factory.__version__} (")


@pytest.mark.parametrize("page", [MANUAL, HELPER_MANUAL], ids=lambda page: page.name)
def test_a_page_is_shown_without_warnings(page: Path, tmp_path: Path) -> None:
    target = tmp_path / page.stem
    subprocess.run(["pandoc", "--standalone", "--to", "man", page, "--output", target], check=True)
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", target],
        env=os.environ | {"LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "80"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_readme_names_each_target_of_make() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    readme = README.read_text(encoding="utf-8")
    # ``all`` is the target of a plain ``make``.
    for target in set(phony[1].split()) - {"all", ".FORCE"}:
        assert re.search(rf"\bmake {target}\b", readme), f"README doesn't say what 'make {target}' does"


def test_the_readme_has_each_module() -> None:
    table = README.read_text(encoding="utf-8").partition("### Code map")[2].partition("\n### ")[0]
    named = set(re.findall(r"`(\w+\.py)`", table))
    assert named == {path.name for path in (REPOSITORY / "image_factory").rglob("*.py") if path.name != "__init__.py"}


@pytest.mark.parametrize("page", [README, MANUAL, REPOSITORY / "NEWS.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # As they are made of headings where such a page is shown.
    anchors = {
        "#" + re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^):]+)\)", text):
        assert target in anchors or (REPOSITORY / target).exists(), f"{page.name} links to {target}"


def test_the_symptoms_are_in_the_words_of_the_program() -> None:
    files = (REPOSITORY / "image_factory").rglob("*.py")
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    # Literals that go over several lines, and parts that are filled in.
    source = re.sub(r"\"\s+f?\"", "", source)
    source = re.sub(r"\{[^{}]*\}", "...", source.replace("{HELPER}", "image-factory-sudo-helper"))
    source += (REPOSITORY / "contrib/jenkins/Jenkinsfile").read_text(encoding="utf-8")
    trouble = README.read_text(encoding="utf-8").partition("## When something goes wrong")[2].partition("\n## ")[0]
    quoted = [
        text for row in re.findall(r"^\| (.*?) \|", trouble, re.MULTILINE) for text in re.findall(r'"(.*?)"', row)
    ]
    assert len(quoted) > 30
    unknown = [text for text in quoted if any(piece.strip(" '") not in source for piece in text.split("..."))]
    assert unknown == []


def test_there_are_examples_of_configuration() -> None:
    assert len(ini_examples(README)) >= 3
    assert len(ini_examples(MANUAL)) >= 2


@pytest.mark.parametrize(
    "example",
    [*ini_examples(README), *ini_examples(MANUAL)],
    ids=lambda example: example.partition("\n")[0].strip("[]"),
)
def test_an_example_is_a_configuration_that_works(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An example is the user's file, which is read after the shipped one."""
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config/image-factory.conf").write_text(example, encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(files, "SYSTEM_FILE", tmp_path / "not-there.conf")
    configuration = Configuration({})
    for name in re.findall(r"^\[(Debian.*)\]$", example, re.MULTILINE):
        assert name in configuration.images()
    for name in configuration.images():
        pipeline.make_plan(configuration, name, {})
