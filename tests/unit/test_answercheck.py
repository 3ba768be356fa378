"""What --check tells of answer files: those that no installer takes, their ends, and what they include."""

import logging
from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.model import Plan
from image_factory.sources import installer
from image_factory.sources.installer import answercheck

NAMES = {"preseed": "a.cfg", "kickstart": "a.ks", "yast": "a.xml", "autoinstall": "a.yaml", "agama": "a.json"}
# A healthy file of each.
GOOD = {
    "preseed": "d-i debian-installer/exit/poweroff boolean true\n",
    "kickstart": "text\nautopart\nrootpw --lock\npoweroff\n",
    "yast": (
        '<?xml version="1.0"?>\n<!DOCTYPE profile>\n'
        '<profile xmlns="http://www.suse.com/1.0/yast2ns" xmlns:config="http://www.suse.com/1.0/configns">\n'
        '<general><mode><confirm config:type="boolean">false</confirm>'
        '<halt config:type="boolean">true</halt></mode></general>\n</profile>\n'
    ),
    "autoinstall": "#cloud-config\nautoinstall:\n  version: 1\n  shutdown: poweroff\n",
    "agama": '{"product": {"id": "openSUSE_Leap"}}\n',
}
SECRET = "hunter2"


def make_plan(directory: Path, key: str, data: str | bytes, extra: str = "", name: str = "") -> Plan:
    """Return the plan of an image whose answer file *key* is *data*."""
    path = directory / (name or NAMES[key])
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    (directory / "linux").touch()
    configuration = directory / "image-factory.conf"
    configuration.write_text(
        f"[x]\nlinux = {directory}/linux\ninitrd = {directory}/linux\n{key} = {path}\n{extra.format(d=directory)}\n"
    )
    return pipeline.make_plan(
        Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}), "x", {"output-dir": str(directory)}
    )


@pytest.mark.parametrize("key", GOOD)
def test_nothing_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str) -> None:
    plan = make_plan(tmp_path, key, GOOD[key])
    installer.check(plan)
    answercheck.warn(plan)
    assert caplog.messages == []


# key, file, what is wrong, by file and line
REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    **{f"empty {key}": (key, " \n\n", f"{name}: it is empty.") for key, name in NAMES.items()},
    "only comments": ("preseed", "# nothing\n", "a.cfg: it has no answer."),
    "only a comment": ("kickstart", "# nothing\n", "a.ks: it has no command."),
    "no header": (
        "autoinstall",
        f"# {SECRET}\nautoinstall:\n  version: 1\n",
        "a.yaml, line 1: the first line is not #cloud-config, so that cloud-init passes over it.",
    ),
    "header later": (
        "autoinstall",
        "# site 7\n#cloud-config\nautoinstall: {version: 1}\n",
        "a.yaml, line 1: the first line is",
    ),
    "another header": ("autoinstall", "#cloud-config-x\nautoinstall: {}\n", "a.yaml, line 1: the first line is"),
    "preseed that is none": ("preseed", GOOD["autoinstall"], "a.cfg: it has no answer."),
    "bad YAML": (
        "autoinstall",
        f"#cloud-config\nautoinstall:\n  version: 1\n shutdown: [{SECRET}\n",
        "a.yaml, line 4: it is no well-formed YAML there.",
    ),
    "YAML with a tab": (
        "autoinstall",
        "#cloud-config\nautoinstall:\n\tversion: 1\n",
        "a.yaml, line 3: it is no well-f",
    ),
    "YAML with a bad date": (
        "autoinstall",
        "#cloud-config\nautoinstall: 2026-13-45\n",
        "a.yaml: it is no well-formed Y",
    ),
    "no autoinstall": ("autoinstall", "#cloud-config\nversion: 1\n", "a.yaml: it has no key 'autoinstall' with keys"),
    "a list": ("autoinstall", "#cloud-config\n- autoinstall\n", "a.yaml: it has no key 'autoinstall' with keys"),
    "not UTF-8": ("autoinstall", b"#cloud-config\nautoinstall:\n  a: \xfc\n", "a.yaml, line 3: it is not UTF-8"),
    "UTF-16": ("kickstart", "text\npoweroff\n".encode("utf-16"), "a.ks, line 1: it is not UTF-8"),
    "NUL": ("kickstart", "text\npower\0off\n", "a.ks, line 2: it is not UTF-8"),
    "bad JSON": ("agama", f'{{"a": 1,\n"b": {SECRET}}}', "a.json, line 2: it is no well-formed JSON there."),
    "deep JSON": ("agama", "[" * 100_000, "a.json: it is no well-formed JSON there."),
    "JSON of a list": ("agama", "[]", "a.json: it is no object of JSON."),
    "bad XML": ("yast", f"<profile>\n<a>{SECRET}</b>\n</profile>", "a.xml, line 2: it is no well-formed XML there."),
    "XML of an unknown encoding": ("yast", '<?xml version="1.0" encoding="x"?>\n<profile/>', "a.xml, line 1: it is no"),
    "section without end": (
        "kickstart",
        "text\n%packages\nvim\n%post\necho\n%end\npoweroff\n",
        "a.ks, line 2: the section %packages has no %end.",
    ),
    "last section without end": (
        "kickstart",
        "poweroff\n%post\necho\n",
        "a.ks, line 2: the section %post has no %end.",
    ),
    "end without section": ("kickstart", "poweroff\n%end\n", "a.ks, line 2: %end ends no section."),
    "unknown section": ("kickstart", f"poweroff\n%pots {SECRET}\n", "a.ks, line 2: there is no such section."),
    "two errors": (
        "kickstart",
        "%end\n%post\n",
        "a.ks, line 1: %end ends no section; [x] kickstart: {d}/a.ks, line 2: the section %post has no %end.",
    ),
    # Parts that the installer will not find.
    "included preseed": (
        "preseed",
        "d-i preseed/include string common/locale.cfg\nd-i debian-installer/exit/poweroff boolean true\n",
        "a.cfg, line 1: it includes common/locale.cfg, which the installer will not find.",
    ),
    "run by preseed": (
        "preseed",
        "d-i preseed/run string \\\n  file:///a.sh\n",
        "a.cfg, line 1: it includes file:///a.sh",
    ),
    "included Kickstart": (
        "kickstart",
        "text\n%include /common.ks\npoweroff\n",
        "a.ks, line 2: it includes /common.ks, which the installer will not find.",
    ),
    "in a section": (
        "kickstart",
        "poweroff\n%packages\n%include packages.ks\n%end\n",
        "a.ks, line 3: it includes packa",
    ),
    "appended": ("kickstart", "poweroff\n%ksappend file:///b.ks\n", "a.ks, line 2: it includes file:///b.ks"),
    "nothing makes it": ("kickstart", "poweroff\n%include /tmp/part.ks\n", "a.ks, line 2: it includes /tmp/part.ks"),
    "script of AutoYaST": (
        "yast",
        GOOD["yast"].replace("</profile>", "<scripts><s><location>relurl://b/c.sh</location></s></scripts></profile>"),
        "a.xml: it names relurl://b/c.sh, which the installer will not find.",
    ),
    "script of Agama": ("agama", '{"a":\n {"url": "label://OEMDRV/b.sh"}}', "a.json, line 2: it names b.sh, which"),
    # What no image can be made of.
    "ostree": (
        "kickstart",
        "ostreesetup --osname=x\npoweroff\n",
        "a.ks, line 1: it asks for a system of ostree, which",
    ),
    "ostree container": (
        "kickstart",
        "ostreecontainer --url x\npoweroff\n",
        "a.ks, line 1: it asks for a system of ost",
    ),
    "bootc": ("kickstart", "bootc --source-imgref=x\npoweroff\n", "a.ks, line 1: it asks for a system of bootc, which"),
    "jfs in Kickstart": (
        "kickstart",
        "part / --size 1 --fstype=jfs\npoweroff\n",
        "a.ks, line 1: it asks for a root on j",
    ),
    "f2fs in Kickstart": (
        "kickstart",
        'autopart --fstype "f2fs"\npoweroff\n',
        "a.ks, line 1: it asks for a root on f2",
    ),
    "jfs in preseed": (
        "preseed",
        "d-i partman/default_filesystem string jfs\n",
        "a.cfg, line 1: it asks for a root on j",
    ),
    "jfs in a recipe": (
        "preseed",
        "d-i partman-auto/expert_recipe string x :: 1 1 1 ext4 mountpoint{ /boot } filesystem{ ext4 } . \\\n"
        "  1 1 1 jfs filesystem{ jfs } mountpoint{ / } .\n",
        "a.cfg, line 1: it asks for a root on jfs",
    ),
    "zfs in autoinstall": (
        "autoinstall",
        GOOD["autoinstall"] + "  storage: {layout: {name: zfs}}\n",
        "a.yaml: it asks for a root on zfs",
    ),
    "jfs in autoinstall": (
        "autoinstall",
        GOOD["autoinstall"] + "  storage:\n    config:\n    - {type: format, id: f, fstype: jfs}\n"
        "    - {type: mount, path: /, device: f}\n",
        "a.yaml: it asks for a root on jfs",
    ),
    "f2fs in AutoYaST": (
        "yast",
        GOOD["yast"].replace(
            "</profile>", "<partition><mount>/</mount><filesystem>f2fs</filesystem></partition></profile>"
        ),
        "a.xml: it asks for a root on f2fs",
    ),
    "jfs in Agama": ("agama", '{"filesystem": {"path": "/", "type": "jfs"}}', "a.json: it asks for a root on jfs"),
}


@pytest.mark.parametrize(("key", "data", "message"), REFUSED.values(), ids=REFUSED)
def test_file_that_no_installer_takes(tmp_path: Path, key: str, data: str | bytes, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        installer.check(make_plan(tmp_path, key, data))
    assert caught.value.message.startswith(f"[x] {key}: {tmp_path}/{message.format(d=tmp_path)}")
    assert caught.value.hint
    # They have secrets in them.
    assert SECRET not in f"{caught.value.message}{caught.value.hint}"


# key, file, more of the section, the warning
DOUBTFUL: dict[str, tuple[str, str | bytes, str, str]] = {
    "no end": (
        "kickstart",
        "text\nautopart\n",
        "",
        "Anaconda halts the machine then. Have 'poweroff' in the Kickstart",
    ),
    "end in a section": ("kickstart", "text\n%post\npoweroff\n%end\n", "", "Anaconda halts the machine then."),
    "halt": (
        "kickstart",
        "text\nhalt\n",
        "",
        "a.ks, line 2: it halts the machine. Have 'poweroff' in the Kickstart file.",
    ),
    "the last end": ("kickstart", "poweroff\nhalt\n", "", "a.ks, line 2: it halts the machine."),
    "kexec": (
        "kickstart",
        "reboot --eject --kexec\n",
        "",
        "a.ks, line 1: it starts the installed system in the machine",
    ),
    "no end of preseed": (
        "preseed",
        "d-i a/b string c\n",
        "",
        "does not say how the installation ends: the installer ask",
    ),
    "halt of preseed": ("preseed", "d-i debian-installer/exit/halt boolean true\n", "", "a.cfg: it halts the machine."),
    "no end of AutoYaST": (
        "yast",
        GOOD["yast"].replace("<halt", "<x").replace("/halt", "/x"),
        "",
        "the installed system is",
    ),
    "confirmation": ("yast", GOOD["yast"].replace("confirm", "x"), "", "wait for a confirmation. Have <confirm"),
    "not a profile": ("yast", "<autoinstall/>", "", "outermost element is not <profile>"),
    "interactive": (
        "autoinstall",
        GOOD["autoinstall"] + "  interactive-sections: [network]\n",
        "",
        "waits for answers",
    ),
    "unknown end": ("autoinstall", GOOD["autoinstall"].replace("poweroff", "halt"), "", "another value of shutdown"),
    "halt of Agama": (
        "agama",
        GOOD["agama"],
        "append = inst.finish=halt",
        "halts the machine. Have inst.finish=poweroff",
    ),
    "stop of Agama": ("agama", GOOD["agama"], "append = a inst.finish=stop", "goes on for ever"),
    "no answer": (
        "preseed",
        GOOD["preseed"] + f"d-i passwd/root-password {SECRET}\n",
        "",
        "a.cfg, line 2: it is no answer. An answer is OWNER QUESTION TYPE VALUE",
    ),
    "two that are none": (
        "preseed",
        GOOD["preseed"] + "a\n" * 2,
        "",
        "a.cfg, line 2: it is no answer (and 1 more such l",
    ),
    "no answers": (
        "preseed",
        GOOD["preseed"] + "a\n" * 50,
        "",
        "a.cfg, line 2: it is no answer (and 49 more such lines)",
    ),
    "not UTF-8": (
        "preseed",
        GOOD["preseed"].encode() + b"d-i a/b string \xfc\n",
        "",
        "a.cfg, line 2: it is not UTF-8.",
    ),
    "Windows": ("kickstart", GOOD["kickstart"].replace("\n", "\r\n"), "", "the installer gets it without"),
    "byte order mark": ("autoinstall", "\ufeff" + GOOD["autoinstall"], "", "the installer gets it without"),
    "further file of Windows": (
        "preseed",
        GOOD["preseed"],
        "answer-files = {d}/windows",
        "windows, line 2: the line ends as in Windows, and the installer gets it so.",
    ),
}


@pytest.mark.parametrize(("key", "data", "extra", "warning"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_doubtful_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, data: str | bytes, extra: str, warning: str
) -> None:
    (tmp_path / "windows").write_bytes(b"a\nb\r\n")
    plan = make_plan(tmp_path, key, data, extra)
    installer.check(plan)
    answercheck.warn(plan)
    [message] = caplog.messages
    assert warning in message
    assert message.startswith(f"[x] {key}: {tmp_path}/")
    assert SECRET not in message
    assert caplog.records[0].levelno == logging.WARNING


# key, file, more of the section
ACCEPTED: dict[str, tuple[str, str | bytes, str]] = {
    "reboot": ("kickstart", "reboot --eject\n", ""),
    "made by %pre": ("kickstart", "%include /tmp/part.ks\n%pre\necho >/tmp/part.ks\n%end\npoweroff\n", ""),
    "of the installer": ("kickstart", "poweroff\n%include /usr/share/anaconda/interactive-defaults.ks\n", ""),
    "of a server": ("kickstart", "%include http://example.com/a.ks\n", ""),
    "given Kickstart": ("kickstart", "%include /common.ks\n", "answer-files = {d}/b:common.ks"),
    "given preseed": ("preseed", "d-i preseed/include string b\n", "answer-files = {d}/b"),
    "given by its URL": ("preseed", "d-i preseed/include string file:///b ./b\n", "answer-files = {d}/b"),
    "given to AutoYaST": (
        "yast",
        GOOD["yast"].replace("</profile>", "<s><location>file:///b</location></s></profile>"),
        "answer-files = {d}/b",
    ),
    "given to Agama": ("agama", '{"url": "label://OEMDRV/c/b.sh"}', "answer-files = {d}/b:c/b.sh"),
    "preseed of a server": ("preseed", "d-i preseed/include string http://example.com/a\n", ""),
    "fetched by a command": (
        "preseed",
        "d-i preseed/early_command string wget -O /tmp/a http://x\nd-i preseed/include string /tmp/a\n",
        "",
    ),
    "on the medium": ("kickstart", "%include /run/install/repo/ks/common.ks\n", ""),
    "made by what a server has": ("kickstart", "%include http://h/pre.ks\n%include /tmp/disk.ks\n", ""),
    "made by what is given": ("kickstart", "%include /b.ks\n%include '/tmp/disk.ks'\n", "answer-files = {d}/b:b.ks"),
    "preseed on the medium": (
        "preseed",
        GOOD["preseed"] + "d-i preseed/include string file:///cdrom/simple-cdd/default.preseed /cdrom/x.cfg\n"
        "d-i preseed/run string /lib/foo.sh\n",
        "",
    ),
    "fetched by a later command": (
        "preseed",
        "d-i preseed/include string c.cfg\nd-i preseed/include_command string echo b.cfg\n",
        "",
    ),
    "fetched by a command of the kernel's": (
        "preseed",
        "d-i preseed/include string c.cfg\n",
        "append = preseed/early_command=/a",
    ),
    "end of the kernel's": ("preseed", "d-i a/b string c\n", "append = a debian-installer/exit/poweroff=true"),
    "header with a comment": ("autoinstall", GOOD["autoinstall"].replace("config\n", "config # site 7\n"), ""),
    "header below a blank": ("autoinstall", "\n" + GOOD["autoinstall"], ""),
    "header in large letters": ("autoinstall", GOOD["autoinstall"].replace("cloud-c", "Cloud-C"), ""),
    "reboot of preseed": ("preseed", "d-i finish-install/reboot_in_progress note\n", ""),
    "several lines": ("preseed", "# c\nd-i a/b multiselect \\\n  c, \\\n  d\n" + GOOD["preseed"], ""),
    "other places of jfs": ("kickstart", "part /srv --fstype=jfs\npart / --fstype=xfs\npoweroff\n", ""),
    "template of cloud-init": ("autoinstall", "## template: jinja\n#cloud-config\nautoinstall: {{ v1.a }}\n", ""),
    "several parts": ("autoinstall", "Content-Type: multipart/mixed\n\nx\n", ""),
    **{
        f"storage of {text}": ("autoinstall", GOOD["autoinstall"] + f"  storage: {{config: {text}}}\n", "")
        for text in ("5", "{a: b}", "text", "[5, [x]]")
    },
    "reboot of autoinstall": ("autoinstall", GOOD["autoinstall"].replace("poweroff", "reboot"), ""),
    "Latin-1 in XML": ("yast", b'<?xml version="1.0" encoding="iso-8859-1"?>' + GOOD["yast"][21:].encode("latin1"), ""),
    "script with a percent sign": ("kickstart", "poweroff\n%post\ndate +\\\n%Y\n%end\n", ""),
    "section of an add-on": ("kickstart", "poweroff\n%addon com_redhat_kdump --disable\n%end\n", ""),
}


@pytest.mark.parametrize(("key", "data", "extra"), ACCEPTED.values(), ids=ACCEPTED)
def test_what_installers_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, data: str | bytes, extra: str
) -> None:
    (tmp_path / "b").write_text("reboot\n")
    plan = make_plan(tmp_path, key, data, extra)
    installer.check(plan)
    answercheck.warn(plan)
    assert caplog.messages == []


def test_template_is_read_as_rendered(tmp_path: Path) -> None:
    """The line is that of what it becomes."""
    plan = make_plan(tmp_path, "kickstart", "{# a\ncomment #}\n{{ text }}", "text = poweroff\n  %%post", "a.ks.j2")
    with pytest.raises(ConfigurationError, match=r"a\.ks\.j2, line 2 of what it becomes: there is no such section\."):
        answercheck.check(plan)
    answercheck.check(make_plan(tmp_path, "kickstart", "{% if 0 %}%post{% endif %}poweroff\n", "", "b.ks.j2"))


def test_further_file_of_kickstart(tmp_path: Path) -> None:
    (tmp_path / "b.ks").write_text("%post\n%include /c.ks\n")
    plan = make_plan(tmp_path, "kickstart", "%include /b.ks\n", "answer-files = {d}/b.ks")
    with pytest.raises(ConfigurationError) as caught:
        installer.check(plan)
    assert caught.value.message == (
        f"[x] kickstart: {tmp_path}/b.ks, line 1: the section %post has no %end; "
        f"[x] kickstart: {tmp_path}/b.ks, line 2: it includes /c.ks, which the installer will not find."
    )


OTHER_FILES = {
    "sudoers": ("poweroff\n", "%wheel ALL=(ALL) ALL\n"),
    "comment": ("poweroff\n", "%% comment\n"),
    "fragment of a script": ("poweroff\n%post\n%include /b.cfg\n%end\n", "%end\n%foo\n"),
    "disk by %pre": ("%include /b.cfg\npoweroff\n%pre\necho >/tmp/disk.ks\n%end\n", "%include /tmp/disk.ks\n"),
    "circle": ("%include /b.cfg\npoweroff\n", "%include /b.cfg\n"),
}


@pytest.mark.parametrize(("main", "part"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_further_file_that_is_good(tmp_path: Path, caplog: pytest.LogCaptureFixture, main: str, part: str) -> None:
    """It is Kickstart only where the installer reads it as that."""
    (tmp_path / "b.cfg").write_text(part)
    plan = make_plan(tmp_path, "kickstart", main, "answer-files = {d}/b.cfg")
    installer.check(plan)
    answercheck.warn(plan)
    assert caplog.messages == []


def test_further_file_of_a_further_file(tmp_path: Path) -> None:
    (tmp_path / "b.ks").write_text("%include /c.ks\n")
    (tmp_path / "c.ks").write_text("%post\n")
    plan = make_plan(tmp_path, "kickstart", "%include /b.ks\n", "answer-files = {d}/b.ks, {d}/c.ks")
    with pytest.raises(ConfigurationError, match=r"c\.ks, line 1: the section %post has no %end\.$"):
        installer.check(plan)


def test_include_in_a_directory(tmp_path: Path) -> None:
    """An initrd has none but its own, so that the name has to change."""
    plan = make_plan(tmp_path, "preseed", "d-i preseed/include string common/locale.cfg\n")
    with pytest.raises(ConfigurationError) as caught:
        installer.check(plan)
    assert str(caught.value.hint).endswith("so that its name here is locale.cfg.")


def test_entities_are_no_way_to_other_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    profile = f'<!DOCTYPE profile [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>\n<profile>&x;</profile>'
    with pytest.raises(ConfigurationError) as caught:
        installer.check(make_plan(tmp_path, "yast", profile))
    assert caught.value.message == f"[x] yast: {tmp_path}/a.xml, line 2: it is no well-formed XML there."


def test_many_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"line 5: .*; and 7 more\.$"):
        installer.check(make_plan(tmp_path, "kickstart", "%end\n" * 12))
