"""What a template's keys may be: a table in the template says it, and each value is checked against it.

The table is a comment of the template that begins with the word ``keys``, a line for each key::

    {# keys
    filesystem | ext4 | ext4, xfs, btrfs | filesystem of the root
    #}

These are its name, its default, what is accepted, and what it is.  Accepted are words and names of FORMS,
with commas, or ``at least SIZE``.  A line for ``NAME@ARCH`` counts in place of that of NAME on that architecture.
An empty value is accepted where the default is empty.
"""

import base64
import binascii
import contextlib
import difflib
import locale
import os
import re
import struct
import urllib.parse
import zoneinfo
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from ..base.units import parse_size
from ..configuration.parsers import parse_boolean
from ..machines.arch import is_arch


@dataclass(frozen=True)
class Form:
    """A kind of values: what they are, for people, and *read*, which gives the text that a template gets.

    *read* raises ValueError, with the next move if it knows one.  What is *secret* is never shown.  A *word*
    is a single value.
    """

    accepted: str
    read: Callable[[str], str]
    secret: bool = False
    word: bool = False


@dataclass(frozen=True)
class Key:
    """A line of the table."""

    name: str
    default: str
    forms: tuple[Form, ...]
    help: str

    @property
    def accepted(self) -> str:
        """What it may be, for people."""
        texts = [form.accepted for form in self.forms]
        return " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))

    @property
    def secret(self) -> bool:
        """Whether a value must not be shown."""
        return any(form.secret for form in self.forms)

    def read(self, text: str) -> str:
        """Return what the template gets for *text*; ValueError, with the next move if one is known, refuses it."""
        text = text.strip()
        if not text and not self.default:
            return ""
        hints = []
        for form in self.forms:
            try:
                return form.read(text)
            except ValueError as error:
                hints.append(str(error))
        near = _near(text, [form.accepted for form in self.forms if form.word])
        raise ValueError(next(filter(None, (*hints, near)), ""))


def _near(text: str, known: Iterable[str]) -> str:
    """Return the question whether one of *known* was meant, empty if none is near to *text*."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(text.lower(), names, n=2, cutoff=0.6)
    return f"Did you mean {' or '.join(names[name] for name in near)}?" if near else ""


def _matching(pattern: str, text: str, hint: str = "") -> str:
    if not re.fullmatch(pattern, text):
        raise ValueError(hint)
    return text


def _among(names: Callable[[], Iterable[str]], text: str) -> str:
    known = names()
    if text not in known:
        raise ValueError(_near(text, known))
    return text


def _word(word: str, text: str) -> str:
    if text.lower() != word.lower():
        raise ValueError
    return word


def _boolean(text: str) -> str:
    try:
        return "yes" if parse_boolean(text) else "no"
    except ValueError:
        raise ValueError from None


@cache
def _locales() -> frozenset[str]:
    """The languages with countries that glibc has a locale for, as Python knows them and this machine's glibc."""
    names = list(locale.locale_alias.values())
    with contextlib.suppress(OSError, UnicodeDecodeError):
        names += Path("/usr/share/i18n/SUPPORTED").read_text(encoding="utf-8").splitlines()
    found = {re.split("[.@ ]", name)[0] for name in names}
    return frozenset(name for name in found if re.fullmatch("[a-z]{2,3}_[A-Z]{2}", name))


def _locale(text: str) -> str:
    name, dot, rest = text.partition(".")
    if name in _locales() and dot and re.fullmatch(r"UTF-8(@[a-z]+)?", rest):
        return text
    # Python knows many names of languages: deutsch, german and de_DE@euro are de_DE.ISO8859-1.
    meant = re.split("[.@]", locale.normalize(text))[0]
    if meant in _locales():
        raise ValueError(f"Did you mean {meant}.UTF-8?")
    raise ValueError(_near(text, {f"{name}.UTF-8" for name in _locales()}))


@cache
def _timezones() -> frozenset[str]:
    """The time zones of this machine's tzdata, with the older names that Debian 13 has in another package."""
    found = zoneinfo.available_timezones() - {"localtime", "posixrules"}
    try:
        lines = Path("/usr/share/zoneinfo/tzdata.zi").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    for words in map(str.split, lines):
        if words[0] in ("L", "Z"):
            found.add(words[2 if words[0] == "L" else 1])
    return frozenset(found)


def _timezone(text: str) -> str:
    known = _timezones()
    # A machine without tzdata knows none.
    if text in known or (not known and re.fullmatch(r"UTC|[A-Z][A-Za-z_]+(/[A-Z][A-Za-z0-9_+-]+){1,2}", text)):
        return text
    cities = [name for name in sorted(known) if name.rpartition("/")[2].lower() == text.lower().replace(" ", "_")]
    raise ValueError(f"Did you mean {cities[0]}?" if cities else _near(text, known))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of keyboard-configuration, which Debian's installer asks with.
_DEBIAN_KEYBOARDS = _words("""
    us al ara es(ast) bd by in(ben) be dz(la) ba br gb bg bg(phonetic) mm ca ca(multi) es(cat) cn hr cz dk nl
    us(dvorak) bt epo ee et fi fr(latin9) fr ge de gr in(guj) in(jhelum) il in hu is ie it jp in(kan) kz kh kg
    kr(kr104) tr(ku_f) tr(ku) la latam lv lt mk in(mal) np no(smi) no ir ph pl pt in(guru) ro ru rs pk(snd) lk
    sk si es se ch(fr) ch tj in(tam) in(tel) th cn(tib) tr(f) tr ua cn(ug) vn
""")
# Of xkeyboard-config.
_XKB_LAYOUTS = _words("""
    us af al am ara at au az ba bd be bg br brai bt bw by ca cd ch cm cn cz de dk dz ee epo es et fi fo fr gb ge
    gh gn gr hr hu id ie il in iq ir is it jp jv ke kg kh kr kz la latam lk lt lv ma mao md me mk ml mm mn mt mv
    my ng nl no np nz ph pk pl pt ro rs ru se si sk sn sy tg th tj tm tr tw tz ua uz vn za
""")
# Older names of kbd, beside those that are made of XKB's.
_CONSOLE_KEYMAPS = _words("""
    uk uk-utf cf croat dvorak il-heb it2 jp106 la-latin1 lt.baltic pl1 pl2 hu101 ru-utf sg sg-latin1
    sg-latin1-lk450 slovene sr-cy sv-latin1 trf trq ua-utf us-acentos mk-utf by bg_bds-utf8 bg_pho-utf8 khmer
    korean arabic
""")
# The aliases of YaST's keyboards.rb.
_YAST_KEYBOARDS = _words("""
    english-us english-uk german german-deadkey german-ch french french-ch french-ca cn-latin1 spanish
    spanish-lat spanish-lat-cp850 spanish-ast italian persian portugese portugese-br portugese-br-usa greek
    dutch danish norwegian swedish finnish czech czech-qwerty slovak slovak-qwerty slovene hungarian polish
    russian serbian estonian lithuanian turkish croatian japanese belgian dvorak dvp icelandic ukrainian khmer
    korean arabic tajik taiwanese chinese romanian us-int french-afnor
""")


def _console_keyboard(text: str) -> str:
    layout, dash, variant = text.partition("-")
    if layout in _XKB_LAYOUTS and re.fullmatch("[a-z0-9_-]+" if dash else "", variant):
        return text
    return _among(lambda: _CONSOLE_KEYMAPS | _XKB_LAYOUTS, text)


def _url(schemes: tuple[str, ...], text: str) -> str:
    # What is left has no meaning in a shell, a preseed or a Kickstart file.
    if not re.fullmatch(r"[A-Za-z0-9._~:/\[\]@!%+,=?-]+", text):
        raise ValueError("Write other characters than letters, digits and . _ ~ : / @ ! + , = ? - as %XX.")
    try:
        parts = urllib.parse.urlsplit(text)
        wrong = parts.scheme not in schemes or not parts.hostname or parts.port == 0
    except ValueError:
        # Its text may show a password.
        wrong = True
    if wrong:
        raise ValueError
    return text


def _urls(text: str) -> str:
    if len(words := [word.rstrip(",") for word in text.split()]) < 2:
        raise ValueError
    return " ".join(dict.fromkeys(_url(("http", "https"), word) for word in words))


_HASHES = re.compile(
    r"\$6\$(rounds=[0-9]{4,9}\$)?[./0-9A-Za-z]{1,16}\$[./0-9A-Za-z]{86}"
    r"|\$5\$(rounds=[0-9]{4,9}\$)?[./0-9A-Za-z]{1,16}\$[./0-9A-Za-z]{43}"
    r"|\$g?y\$[./0-9A-Za-z]{1,16}\$[./0-9A-Za-z]{1,86}\$[./0-9A-Za-z]{43}"
    r"|\$7\$[./0-9A-Za-z]{11,97}\$[./0-9A-Za-z]{43}"
    r"|\$2[abxy]\$[0-9]{2}\$[./0-9A-Za-z]{53}"
    r"|\$1\$[./0-9A-Za-z]{1,8}\$[./0-9A-Za-z]{22}"
)


def _crypt_hash(text: str) -> str:
    if not _HASHES.fullmatch(text):
        raise ValueError("Make one: openssl passwd -6. In a configuration each of its dollar signs is written $$.")
    return text


_KEY_TYPES = (
    "ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(?:256|384|521)|sk-ssh-ed25519@openssh[.]com|"
    "sk-ecdsa-sha2-nistp256@openssh[.]com|ssh-dss"
)
# Options come first, whose names begin with a letter: other words have a meaning where a recipe writes the line, such
# as %include in Kickstart.  A comment comes last.
_PUBLIC_KEY = re.compile(rf"(?:[A-Za-z]\S*.*\s)?({_KEY_TYPES})\s+([A-Za-z0-9+/]+=*)(?:\s.*)?")


def _public_key(line: str) -> str:
    match = _PUBLIC_KEY.fullmatch(line) if line.isprintable() else None
    try:
        data = base64.b64decode(match[2], validate=True) if match else b""
        # Fields with their lengths before them, of which the type is the first.
        fields, rest = [], data
        while rest:
            (length,) = struct.unpack_from(">I", rest)
            fields.append(rest[4 : 4 + length])
            if len(fields[-1]) < length:
                raise ValueError
            rest = rest[4 + length :]
        if match is None or len(fields) < 2 or fields[0].decode() != match[1]:
            raise ValueError
    except (binascii.Error, struct.error, ValueError):
        raise ValueError("One of its lines is not a whole public key, nor the path of a file with one.") from None
    return line


def _key_file(line: str) -> list[str]:
    path = Path(os.path.expanduser(line))
    try:
        text = path.read_bytes()[: 1 << 20].decode()
    except OSError as error:
        raise ValueError(f"{line} can't be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        text = ""
    if "PRIVATE KEY" in text:
        raise ValueError(f"{line} is a private key. Name the file of the public one, {line}.pub.")
    lines = [entry.strip() for entry in text.splitlines() if entry.strip() and not entry.lstrip().startswith("#")]
    try:
        return [_public_key(entry) for entry in lines if lines]
    except ValueError:
        raise ValueError(f"{line} is no file of public keys.") from None


def _public_keys(text: str) -> str:
    """Return the lines of *text*; a line that is a path stands for the lines of that file."""
    keys: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if "PRIVATE KEY" in line:
            raise ValueError("That is a private key. Give the public one, or the path of its file.")
        path = re.match(r"~|/|[.]{1,2}/", line) or (line.endswith(".pub") and not re.search(r"\s", line))
        found = _key_file(line) if path else [_public_key(line)]
        if not found:
            raise ValueError(f"{line} is empty.")
        keys += found
    return "\n".join(keys)


def _packages(pattern: str, text: str) -> str:
    for name in text.split():
        if not re.fullmatch(pattern, name):
            raise ValueError("Write blanks between them, no commas." if "," in name else f"{name!a} is none.")
    return " ".join(text.split())


def _kernel_arguments(text: str) -> str:
    # Boot loaders' configuration is read by shells.
    return _matching(r"[A-Za-z0-9 !#%()*+,./:<=>?@\[\]^_{|}~-]+", " ".join(text.split()))


def _text(text: str) -> str:
    if not text.isprintable():
        raise ValueError("Write it in one line.")
    return text


def _at_least(size: int, text: str) -> str:
    try:
        if parse_size(text) < size:
            raise ValueError
    except ValueError:
        raise ValueError from None
    return text


FORMS = {
    "text": Form("any text of one line", _text),
    "word": Form("a word of letters, digits and . _ + -", partial(_matching, r"[A-Za-z0-9][A-Za-z0-9._+-]*")),
    "words": Form(
        "words of letters, digits and . _ + - with blanks between them",
        partial(_matching, r"[A-Za-z0-9][A-Za-z0-9._+-]*( +[A-Za-z0-9][A-Za-z0-9._+-]*)*"),
    ),
    "boolean": Form("yes or no", _boolean),
    "locale": Form("a locale of glibc with UTF-8 such as de_DE.UTF-8", _locale),
    "timezone": Form("a time zone such as Europe/Berlin", _timezone),
    "debian-keyboard": Form(
        "a keymap of Debian's installer such as us, de or ch(fr)", partial(_among, lambda: _DEBIAN_KEYBOARDS)
    ),
    "xkb-keyboard": Form("a layout of XKB such as us or de", partial(_among, lambda: _XKB_LAYOUTS)),
    "console-keyboard": Form("a keymap of the console such as us, de or de-nodeadkeys", _console_keyboard),
    "yast-keyboard": Form("a keyboard of YaST such as english-us or german", partial(_among, lambda: _YAST_KEYBOARDS)),
    "url": Form("a URL that begins with http:// or https://", partial(_url, ("http", "https"))),
    "urls": Form("several, mirrors, with blanks or line breaks between them", _urls),
    "rsync-url": Form("one that begins with rsync://", partial(_url, ("rsync",))),
    "crypt-hash": Form("a hash of crypt(5)", _crypt_hash, secret=True),
    "public-keys": Form(
        "public keys as in authorized_keys, or paths of files with them, one a line", _public_keys, secret=True
    ),
    "debian-packages": Form(
        "names of packages with blanks between them",
        partial(_packages, r"[a-z0-9][a-z0-9+.-]*(:[a-z0-9]+)?([=/][A-Za-z0-9.+:~-]+)?\^?"),
    ),
    "rpm-packages": Form(
        "names of packages with blanks between them", partial(_packages, r"[A-Za-z0-9_][A-Za-z0-9_+.:~-]*")
    ),
    "kickstart-packages": Form(
        "names of packages and @groups with blanks between them",
        partial(_packages, r"-?(@\^?)?[A-Za-z0-9_][A-Za-z0-9_+.*:/~-]*"),
    ),
    "kernel-arguments": Form("kernel arguments without quotes, $ and backslashes", _kernel_arguments),
}


def _form(text: str) -> Form:
    if match := re.fullmatch(r"at least (.*)", text):
        return Form(text, partial(_at_least, parse_size(match[1])))
    return FORMS.get(text) or Form(text, partial(_word, text), word=True)


_TABLE = re.compile(r"\{#[-+]?\s*keys[ \t]*\n(.*?)[-+]?#\}", re.DOTALL)


def declared(source: str, arch: str) -> dict[str, Key]:
    """Return the keys of the table in the template *source*, by name with dashes; none if it has no table.

    ValueError has the number of a line of *source* that is wrong.
    """
    match = _TABLE.search(source)
    found: dict[str, Key] = {}
    special: dict[str, Key] = {}
    first = source.count("\n", 0, match.start(1)) + 1 if match else 0
    for number, line in enumerate(match[1].splitlines() if match else [], first):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("|")]
        try:
            name, default, values, text = cells
            name, _, suffix = name.lower().replace("_", "-").partition("@")
            key = Key(name, default, tuple(_form(value.strip()) for value in values.split(",")), text)
            key.read(default)
        except ValueError:
            raise ValueError(number) from None
        if not suffix:
            found[name] = key
        elif is_arch(suffix, arch):
            special[name] = key
    return found | special
