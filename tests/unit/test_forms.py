"""What templates declare of their keys: values that are refused, what is told then, and what can't get into a file."""

import base64
import contextlib
import re
import struct
from pathlib import Path

import pytest

from image_factory import cli, pipeline
from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration, declared
from image_factory.configuration.settings import ImageSettings
from image_factory.machines.arch import ARCHITECTURES
from image_factory.model import Plan
from image_factory.sources import answers, forms

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((REPOSITORY / "data").glob("*.j2"))
PREFIX = "[x]\nbased_on = {}\n"
HASH = f"$6$salt${'a./Z' * 21}ab"
# A recipe for each of the shipped templates.
RECIPES = {
    "debian.bootstrap.yaml.j2": "Debian-13-cloud",
    "debian.cfg.j2": "Debian-13-server",
    "ubuntu.bootstrap.yaml.j2": "Ubuntu-26.04-cloud",
    "el.ks.j2": "Fedora-44-server",
    "leap.xml.j2": "openSUSE-Leap-15.6-server",
    "agama.json.j2": "openSUSE-Leap-16.0-server",
    "ubuntu.yaml.j2": "Ubuntu-26.04-server",
}


def public_key(kind: str = "ssh-ed25519") -> str:
    fields = (kind.encode(), bytes(range(32)))
    data = b"".join(struct.pack(">I", len(part)) + part for part in fields)
    return f"{kind} {base64.b64encode(data).decode()}"


def plan_of(tmp_path: Path, recipe: str, lines: str) -> Plan:
    path = tmp_path / "image-factory.conf"
    shipped = (REPOSITORY / "data/image-factory.conf").read_text(encoding="utf-8")
    path.write_text(f"{shipped}[x]\nbased_on = {recipe}\n{lines}\n", encoding="utf-8")
    return pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(path)}), "x", {})


def refusal(tmp_path: Path, recipe: str, lines: str) -> tuple[str, str]:
    """Return message and hint of the answer file's error."""
    with pytest.raises(ConfigurationError) as caught:
        answers.content(plan_of(tmp_path, recipe, lines))
    # Also that of a URL which is made from the key.
    hint = caught.value.hint or ""
    assert "\n" not in caught.value.message + hint
    return caught.value.message, hint


# Values that make a wrong image, or none; what is told of them, and what helps.
REFUSED = {
    "filesystem": ("filesystem = zfs", "filesystem: 'zfs' is not accepted, only ext4, xfs or btrfs.", "mean xfs?"),
    "locale": ("locale = deutsch", "locale: 'deutsch' is not accepted, only a locale", "Did you mean de_DE.UTF-8?"),
    "locale without encoding": ("locale = de_AT", "locale: 'de_AT' is not", "Did you mean de_AT.UTF-8?"),
    "locale of no country": ("locale = de_XX.UTF-8", "locale: 'de_XX.UTF-8' is not", "Did you mean"),
    "empty locale": ("locale =", "locale: '' is not accepted", "--keys x"),
    "keyboard": ("keyboard = xx", "keyboard: 'xx' is not accepted, only a keymap of Debian's", "--keys x"),
    "keyboard of another installer": ("keyboard = german", "keyboard: 'german' is not", "--keys x"),
    "time zone": ("timezone = Berlin", "timezone: 'Berlin' is not", "Did you mean Europe/Berlin?"),
    "misspelt time zone": ("timezone = Europe/Brelin", "timezone: 'Europe/Brelin' is not", "Europe/Berlin"),
    "password": ("root_password_hash = hunter2", "root-password-hash: what is there is not", "openssl passwd -6"),
    "cut hash": (f"root_password_hash = {HASH[:-1].replace('$', '$$')}", "root-password-hash: what is", "openssl"),
    "absent key file": ("authorized_keys = ~/.ssh/absent.pub", "authorized-keys: what is there is not", "is not there"),
    "cut key": (f"authorized_keys = {public_key()[:-8]}", "authorized-keys: what is there", "whole public key"),
    **{
        f"{words} before a key": (f"authorized_keys = {words} {public_key()}", "authorized-keys:", "whole public key")
        for words in ("%end", "%include http://evil", "<<x", "#", "'", "-x")
    },
    "other type": (f"authorized_keys = {public_key().replace('ssh-ed25519', 'ssh-rsa')}", "authorized-keys:", "whole"),
    "commas": ("packages = vim, curl", "packages: 'vim, curl' is not accepted, only names", "no commas"),
    "package": ("packages = Vim", "packages: 'Vim' is not accepted", "'Vim' is none"),
    "option": ("packages = --purge", "packages: '--purge' is not accepted", "is none"),
    "mirror": ("mirror = mirror.example.com/debian", "mirror: 'mirror.example.com/debian' is not", "--keys x"),
    "proxy": ("proxy = proxy:3128", "proxy: 'proxy:3128' is not accepted, only a URL that begins", "--keys x"),
    "proxy with a password": ("proxy = htp://me:hunter2@proxy", "proxy: what is there is not", "--keys x"),
    "quotes": ("kernel_arguments = a=\"b\"", "kernel-arguments: 'a=\"b\"' is not accepted", "--keys x"),
    "boolean": ("weak_dependencies = maybe", "weak-dependencies: 'maybe' is not accepted, only yes or no", "--keys x"),
    "disk": ("image_size = 512M", "image-size: '512M' is not accepted, only at least 1.5G", "--keys x"),
    "memory": ("ram = 256M", "ram: '256M' is not accepted, only at least 768M", "--keys x"),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, lines: str, message: str, hint: str) -> None:
    told, move = refusal(tmp_path, "Debian-13-server", lines)
    assert told.startswith(f"[x] {message}")
    assert hint.replace("is not there", "can't be read: No such file or directory") in move
    # Neither a password nor what may be one.
    assert "hunter2" not in told + move
    assert HASH[:-1] not in told + move


# A value of each key that no template takes.
ABSURD = {
    "dist": "a b", "release": "a b", "product": "Leap", "source-id": "ubuntu", "appstream-mirror": "x",
    "locale": "deutsch", "keyboard": "xx", "timezone": "Mars/Base", "packages": "a,b", "mirror": "x", "proxy": "x",
    "root-password-hash": "secret", "authorized-keys": "secret", "filesystem": "zfs", "kernel-arguments": "a'b",
    "weak-dependencies": "2", "suite": "a b", "components": "a,b", "security-mirror": "x",
    "image-size": "2M", "ram": "2M",
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_each_key_of_each_template_refuses_something(tmp_path: Path, name: str) -> None:
    assert [path.name for path in TEMPLATES] == sorted(RECIPES)
    for key in answers.declared_keys(REPOSITORY / "data" / name, "x86_64"):
        told, hint = refusal(tmp_path, RECIPES[name], f"{key} = {ABSURD[key]}")
        assert "is not accepted, only " in told, key
        if not told.startswith("[x] linux: "):
            assert told.startswith(f"[x] {key}: "), key
            assert "'image-factory --keys x' lists all keys." in hint


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("text", ["'", '"', "$$x", "`x`", "\\", "a\n  %end", "a\n  'x", "a;b", "<x>", "{{ x }}"])
def test_nothing_gets_out_of_its_value(tmp_path: Path, name: str, text: str) -> None:
    """Of what a shell, a preseed, Kickstart, XML or YAML knows.

    Comments of public keys may have it, see the recipes.
    """
    text = text.replace("$$", "$").replace("\n  ", "\n")
    declared = answers.declared_keys(REPOSITORY / "data" / name, "x86_64")
    for key in declared.keys() - {"authorized-keys"}:
        try:
            read = declared[key].read(text)
        except ValueError:
            continue
        # They are joined, and quoted where they are written.
        assert key == "kernel-arguments"
        assert not set(read) & set("\n'\"\\$`")


ACCEPTED = {
    "locales": ("locale", "C.UTF-8", "C.UTF-8"),
    "modifier": ("locale", "de_DE.UTF-8@euro", "de_DE.UTF-8@euro"),
    "variant of a keyboard": ("keyboard", "ch(fr)", "ch(fr)"),
    "UTC": ("timezone", "UTC", "UTC"),
    "older name": ("timezone", "US/Eastern", "US/Eastern"),
    "capitals": ("filesystem", "XFS", "xfs"),
    "false": ("weak-dependencies", "False", "no"),
    "true": ("weak-dependencies", "1", "yes"),
    "packages over lines": ("packages", "vim\n  a:amd64\n  b1=1.2~bpo+1 std^", "vim a:amd64 b1=1.2~bpo+1 std^"),
    "no packages": ("packages", "", ""),
    "proxy": ("proxy", "http://me:pass%40word@[::1]:3128", "http://me:pass%40word@[::1]:3128"),
    "rsync": ("mirror", "rsync://mirror.example.com/debian", "rsync://mirror.example.com/debian"),
    "SHA-512": ("root-password-hash", HASH, HASH),
    "rounds": ("root-password-hash", HASH.replace("$6$", "$6$rounds=5000$"), HASH.replace("$6$", "$6$rounds=5000$")),
    "yescrypt": ("root-password-hash", f"$y$j9T$salt.$ {'a' * 43}".replace(" ", ""), f"$y$j9T$salt.${'a' * 43}"),
    "bcrypt": ("root-password-hash", f"$2b$12${'a' * 53}", f"$2b$12${'a' * 53}"),
    "keys": (
        "authorized-keys",
        f"{public_key()} a 'b'\n  from=\"*.a\" {public_key('ssh-rsa')}",
        f"{public_key()} a 'b'\nfrom=\"*.a\" {public_key('ssh-rsa')}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("key", "text", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(key: str, text: str, expected: str) -> None:
    assert answers.declared_keys(REPOSITORY / "data/debian.cfg.j2", "x86_64")[key].read(text) == expected


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("kickstart-packages", "@^minimal -plymouth @nginx:1.26/common kernel-* glibc.i686"),
        ("rpm-packages", "libstdc++ python3.11 java_cup"),
        *(("console-keyboard", text) for text in ("us", "de-nodeadkeys", "uk", "sv-latin1", "br-abnt2", "la-latin1")),
        *(("xkb-keyboard", text) for text in ("us", "de", "latam")),
        *(("yast-keyboard", text) for text in ("english-us", "german", "portugese-br")),
    ],
)
def test_what_other_installers_accept(form: str, text: str) -> None:
    assert forms.FORMS[form].read(text) == text


def test_path_of_a_public_key_stands_for_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ssh-copy-id takes it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/id_ed25519.pub").write_text(f"# mine\n\n{public_key()} me@here\n")
    (tmp_path / "team.pub").write_text(f"{public_key('ssh-rsa')} a\n{public_key()} b\n")
    monkeypatch.chdir(tmp_path)
    lines = f"authorized_keys = ~/.ssh/id_ed25519.pub\n  {public_key()} own\n  team.pub"
    text = answers.content(plan_of(tmp_path, "Debian-13-server", lines)).decode()
    keys = [f"{public_key()} me@here", f"{public_key()} own", f"{public_key('ssh-rsa')} a", f"{public_key()} b"]
    assert [line.split("'")[1] for line in text.splitlines() if "authorized_keys; " in line and "echo" in line] == keys


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\n", "is a private key. Name the file of the public one"),
        (b"", "is empty."),
        (b"hello\n", "is no file of public keys."),
        (b"\xff\xfe\x00", "is empty."),
    ],
)
def test_file_that_is_no_public_key(tmp_path: Path, content: bytes, hint: str) -> None:
    (tmp_path / "id").write_bytes(content)
    told, move = refusal(tmp_path, "Debian-13-server", f"authorized_keys = {tmp_path}/id")
    assert told == (
        "[x] authorized-keys: what is there is not accepted, only public keys as in authorized_keys, or paths of files "
        "with them, one a line."
    )
    assert hint in move


def test_private_key_is_not_shown(tmp_path: Path) -> None:
    told, move = refusal(
        tmp_path, "Debian-13-server", "authorized_keys =\n  -----BEGIN OPENSSH PRIVATE KEY-----\n  b3BlbnNzaC1r"
    )
    assert "b3Blb" not in told + move
    assert "private key" in move


@pytest.mark.parametrize("recipe", ["Rocky-10-server", "Alma-9-minimal", "CentOS-Stream-10-server"])
def test_filesystem_that_enterprise_linux_lacks(tmp_path: Path, recipe: str) -> None:
    told, hint = refusal(tmp_path, recipe, "filesystem = btrfs")
    assert told.endswith("el.ks.j2: Enterprise Linux has no btrfs.")
    assert hint == "Change filesystem in [x]."


@pytest.mark.parametrize("present", [True, False])
def test_machine_without_time_zones_and_locales(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    """Nothing leans on what a machine happens to have."""
    monkeypatch.setattr(forms, "_timezones", lambda: frozenset(["Europe/Berlin"] if present else []))
    assert forms.FORMS["timezone"].read("Europe/Berlin") == "Europe/Berlin"
    with pytest.raises(ValueError, match=""):
        forms.FORMS["timezone"].read("Berlin")
    forms._locales.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_keywords: (_ for _ in ()).throw(OSError()))
    try:
        assert forms.FORMS["locale"].read("de_DE.UTF-8") == "de_DE.UTF-8"
    finally:
        forms._locales.cache_clear()


# Tables of users' own templates.

OWN = """\
{# keys
motto        |       | text           | what is shown
colour@arm64 | green | red, green     | another one
colour       | red   | red, green     | its colour
size         |       | at least 1G    | a size
#}
{{ motto }} {{ colour }}
"""


def own_plan(directory: Path, template: str, lines: str = "") -> Plan:
    (directory / "a.cfg.j2").write_text(template)
    path = directory / "own.conf"
    path.write_text(f"[x]\nlinux = /l\ninitrd = /i\narch = x86_64\npreseed = {directory}/a.cfg.j2\n{lines}\n")
    return pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(path)}), "x", {})


def test_own_template_declares_keys(tmp_path: Path) -> None:
    assert answers.content(own_plan(tmp_path, OWN, "motto = a b")) == b"a b red\n"
    assert answers.content(own_plan(tmp_path, OWN, "motto = ä\ncolour = GREEN")) == "ä green\n".encode()
    assert (
        answers.content(own_plan(tmp_path, OWN, "motto =\narch = aarch64".replace("arch", "colour = red\n#")))
        == b" red\n"
    )
    with pytest.raises(ConfigurationError, match=r"^\[x\] colour: 'blue' is not accepted, only red or green\.$"):
        answers.content(own_plan(tmp_path, OWN, "colour = blue"))
    defaults = {arch: answers.declared_keys(tmp_path / "a.cfg.j2", arch)["colour"].default for arch in ARCHITECTURES}
    assert defaults == {**dict.fromkeys(ARCHITECTURES, "red"), "aarch64": "green"}


def test_included_template_declares_keys(tmp_path: Path) -> None:
    """They are applied, enforced and listed as those of the answer file itself, which wins."""
    (tmp_path / "base.j2").write_text(OWN)
    outer = "{# keys\nsize | 2G | at least 2G | another size\n#}\n{% include 'base.j2' %} {{ size }}"
    assert answers.content(own_plan(tmp_path, outer, "motto = a")) == b"a red\n 2G"
    with pytest.raises(ConfigurationError, match=r"^\[x\] colour: 'blue' is not accepted, only red or green\.$"):
        answers.content(own_plan(tmp_path, outer, "colour = blue"))
    with pytest.raises(ConfigurationError, match=r"^\[x\] size: '1G' is not accepted, only at least 2G\.$"):
        answers.content(own_plan(tmp_path, outer, "size = 1G"))
    listed = listing(tmp_path, "", outer)
    assert "# another size\n# Accepted: at least 2G; default: 2G\n" in listed
    assert "# its colour\n# Accepted: red or green; default: red\n" in listed
    (tmp_path / "base.j2").write_text("{# keys\nmotto\n#}")
    with pytest.raises(ConfigurationError, match=r"/base\.j2, line 2: that is no line of the table of keys\.$"):
        answers.content(own_plan(tmp_path, "{% include 'base.j2' %}"))


@pytest.mark.parametrize(
    "line", ["motto", "motto | | text", "a | b | c | d | e", "colour | blue | red, green | x", "a | | at least x | y"]
)
def test_line_that_is_none_of_the_table(tmp_path: Path, line: str) -> None:
    template = f"# a\n\n{{# keys\nb | | text | b\n{line}\n#}}\n"
    with pytest.raises(ConfigurationError, match=r"a\.cfg\.j2, line 5: that is no line of the table of keys\.$"):
        answers.content(own_plan(tmp_path, template))


def test_error_in_a_declared_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^\[x\] motto: \${absent} is not defined\.$"):
        answers.content(own_plan(tmp_path, OWN, "motto = ${absent}"))


# What --keys prints.


def listing(tmp_path: Path, lines: str, template: str = OWN) -> str:
    with contextlib.suppress(ConfigurationError):
        own_plan(tmp_path, template, lines)
    return cli.keys_listing(Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "own.conf")}), "x", {"mac": "a"})


def test_keys_are_listed_with_their_values(tmp_path: Path) -> None:
    text = listing(tmp_path, "motto = 5$$ ${host}\nhost = here\nram = much\ncpu = ${absent}")
    assert text.startswith(
        f"[x]\n\n# Keys of its answer file {tmp_path}/a.cfg.j2:\n\n"
        "# what is shown\n# Accepted: any text of one line\nmotto = 5$$ here\n\n"
        "# its colour\n# Accepted: red or green; default: red\ncolour = red\n\n"
        "# a size\n# Accepted: at least 1G\n# size =\n\n"
        "# Variables of its values:\n\nhost = here\n\n# Settings of image-factory:\n\n"
    )
    # What is wrong is shown too: that is what one asks for.
    assert "\nram = much\n" in text
    assert "\n# cpu: [x] cpu: ${absent} is not defined.\n" in text
    assert "\nmac = a\n" in text
    assert "\n# Accepted: auto, kvm or qemu; default: auto\nvirt-type = auto\n" in text
    assert "\n# Accepted: a whole number from 1 to 9999; default: 1\ncores = 1\n" in text
    for key, declaration in declared(ImageSettings):
        assert f"# {declaration.help}\n# Accepted: " in text, key


def test_listing_is_a_configuration(tmp_path: Path) -> None:
    text = listing(tmp_path, "motto = 5$$\nram = 2G\npost_build_command = a\n  b")
    (tmp_path / "again.conf").write_text(text.replace("mac = a", ""))
    configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "again.conf")})
    assert configuration.image("x", {}).ram == 2 << 30
    assert configuration.image("x", {}).post_build_command == ("a", "b")
    assert configuration.variables("x", {})["motto"] == "5$"


def test_keys_of_every_shipped_recipe() -> None:
    configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(REPOSITORY / "data/image-factory.conf")})
    with_templates = [name for name in configuration.images() if not name.endswith("-cloud-image")]
    assert len(with_templates) > 20
    for name in with_templates:
        listing = cli.keys_listing(configuration, name, {})
        assert re.search("\n# Accepted: (ext4, xfs|xfs, ext4) or btrfs", listing), name


def test_keys_of_a_plain_answer_file(tmp_path: Path) -> None:
    path = tmp_path / "own.conf"
    path.write_text(f"[x]\nlinux = /l\ninitrd = /i\npreseed = {tmp_path}/a.cfg\n")
    text = cli.keys_listing(Configuration({"IMAGE_FACTORY_CONFIG": str(path)}), "x", {})
    assert f"# {tmp_path}/a.cfg is no template that declares keys.\n" in text
    assert "# Variables of its values:\n\n# none\n" in text
