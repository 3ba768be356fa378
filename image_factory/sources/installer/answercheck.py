"""What can be told of an answer file before an installer reads it: that none will take it, and how it ends.

It is read as the installer gets it.  Messages have no text of it but names: of files, sections and keys.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from ...base.errors import ConfigurationError
from ...base.log import logger
from ...model import Plan
from .. import answers
from . import delivery
from .installers import POWER_OFF

_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Finding:
    """Something about an answer file: *text* is a sentence without its end, *line* counts from 1, 0 for the whole.

    One that is *fatal* ends any installation.  *hint* is the next move.
    """

    line: int
    text: str
    hint: str
    fatal: bool = False


@dataclass(frozen=True)
class _Answers:
    """What an installer gets: *data* of the file *path*, and the names of the files beside it."""

    plan: Plan
    path: Path
    data: bytes
    names: frozenset[str]

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


def check(plan: Plan) -> None:
    """Raise ConfigurationError if no installer takes the answer file of *plan*."""
    fatal = [(message, finding) for message, finding in _found(plan) if finding.fatal]
    if fatal:
        shown = "; ".join(message for message, _ in fatal[:_SHOWN_ERRORS])
        more = f"; and {len(fatal) - _SHOWN_ERRORS} more" if len(fatal) > _SHOWN_ERRORS else ""
        raise ConfigurationError(f"{shown}{more}.", hint=fatal[0][1].hint)


def warn(plan: Plan) -> None:
    """Log what is doubtful about the answer file of *plan*."""
    path = plan.settings.answer_file
    if path and not answers.is_template(path) and answers.is_changed(path):
        logger.warning(
            "%s has a byte order mark or Windows' ends of lines; the installer gets it without.", answers.where(plan)
        )
    for message, finding in _found(plan):
        if not finding.fatal:
            hint = finding.hint.replace("{}", POWER_OFF[plan.settings.answer_file_key])
            logger.warning("%s. %s", message, hint)


def _found(plan: Plan) -> list[tuple[str, Finding]]:
    """Return what is found in the answer file and what belongs to it, with messages; nothing if there is none."""
    key, path = plan.settings.answer_file_key, plan.settings.answer_file
    if key is None or path is None:
        return []
    names = frozenset({delivery.name_of(plan.settings), *(file.name for file in plan.settings.answer_files)})
    given = _Answers(plan, path, answers.content(plan), names)
    findings = _judged(given, _of(key, given))
    parts = {
        file.name: _Answers(plan, file.path, _content(plan, file.path), names) for file in plan.settings.answer_files
    }
    read = _kickstart_parts(given, parts) if key == "kickstart" else set()
    for name, part in parts.items():
        findings += _judged(part, _of_part(part, is_kickstart=name in read))
    return findings


def _content(plan: Plan, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"[{plan.image}] answer-files: {path} can't be read: {error.strerror}.") from error


def _judged(given: _Answers, findings: Iterator[Finding]) -> list[tuple[str, Finding]]:
    """Return *findings* with their messages, in the order of the lines."""
    where = answers.where(given.plan, given.path)
    rendered = " of what it becomes" if answers.is_template(given.path) else ""
    return [
        (f"{where}{f', line {found.line}{rendered}' if found.line else ''}: {found.text}", found)
        for found in sorted(findings, key=lambda found: found.line)
    ]


def _of(key: str, given: _Answers) -> Iterator[Finding]:
    """Give what is found in the answer file itself."""
    if not given.data.strip():
        yield Finding(0, "it is empty", "See whether it is the right file; --show-answers prints it.", fatal=True)
        return
    yield from _encoding(given, fatal=key != "preseed")
    yield from _CHECKS[key](given)


def _of_part(given: _Answers, *, is_kickstart: bool) -> Iterator[Finding]:
    """Give what is found in a further file, which may be for anything unless it *is_kickstart*."""
    if b"\r\n" in given.data:
        yield Finding(
            given.data.count(b"\n", 0, given.data.index(b"\r\n")) + 1,
            "the line ends as in Windows, and the installer gets it so",
            "Scripts fail with that: convert it with dos2unix.",
        )
    if is_kickstart:
        yield from _sections(given)
        yield from _kickstart_includes(given, is_part=True)


def _encoding(given: _Answers, *, fatal: bool) -> Iterator[Finding]:
    """Give where a text is not UTF-8; XML may say another encoding, and its parser knows."""
    if given.data.lstrip()[:1] == b"<":
        return
    try:
        given.data.decode()
        line = given.data.count(b"\n", 0, given.data.index(b"\0")) + 1 if b"\0" in given.data else 0
    except UnicodeDecodeError as error:
        line = given.data.count(b"\n", 0, error.start) + 1
    if line:
        yield Finding(line, "it is not UTF-8", "Convert it, as with iconv -f latin1 -t utf-8.", fatal=fatal)


def _absent(line: int, name: str, what: str = "includes") -> Finding:
    hint = "Give the file to the installer with answer-files"
    # virt-install puts files into the root of an initrd, and nowhere else.
    last = name.rpartition("/")[2]
    if what == "includes" and name.removeprefix("file://").lstrip("/") != last:
        hint += f", where it lies beside the answer file, so that its name here is {last}"
    return Finding(line, f"it {what} {name}, which the installer will not find", f"{hint}.", fatal=True)


def _unsupported(line: int, what: str) -> Finding:
    return Finding(
        line,
        f"it asks for {what}, which is not supported",
        "Systems have their root on ext4, xfs or btrfs, and their packages installed into it.",
        fatal=True,
    )


# Roots that no image can be finished of; the names that installers have for them.
_NO_ROOTS = re.compile(r"(?:bcachefs|f2fs|jfs|nilfs2|reiserfs|zfs\w*)", re.IGNORECASE)


# Debian's installer.

_ANSWER = "An answer is OWNER QUESTION TYPE VALUE, such as 'd-i debian-installer/locale string C.UTF-8'."
_PRESEED = re.compile(r"\s*(\S+)\s+(\S+)\s+(\S+)(?:\s(.*))?", re.DOTALL)
# Of debconf-devel(7), and the flag that debconf-set-selections(1) takes in place of one.
_TYPES = frozenset({"string", "boolean", "select", "multiselect", "note", "text", "password", "title", "error", "seen"})
# What runs a command may bring files with it.
_PRESEED_COMMANDS = ("preseed/early_command", "preseed/include_command", "partman/early_command")


# Answers that the kernel's command line gives.
_BOOT_ANSWER = re.compile(r"(?<!\S)(?:[\w-]+:)?([\w-]+(?:/[\w-]+)+)\??=(\S*)")


def _preseed(given: _Answers) -> Iterator[Finding]:
    found: dict[str, str] = {}
    bad: list[int] = []
    included: list[tuple[int, str]] = []
    for line, text in _joined(given.text):
        match = _PRESEED.fullmatch(text)
        if not match or match[3] not in _TYPES:
            bad.append(line)
            continue
        question, value = match[2], (match[4] or "").strip()
        found[question] = value
        if question in ("preseed/include", "preseed/run"):
            included += [(line, name) for name in value.split()]
        yield from _preseed_filesystems(line, question, value)
    if not found:
        yield Finding(0, "it has no answer", f"See whether it is the right file. {_ANSWER}", fatal=True)
        return
    if bad:
        others = f" (and {len(bad) - 1} more such line{'s' if len(bad) > 2 else ''})" if len(bad) > 1 else ""
        yield Finding(bad[0], f"it is no answer{others}", _ANSWER)
    found |= dict(_BOOT_ANSWER.findall(given.plan.settings.append))
    makes_files = any(command in found for command in _PRESEED_COMMANDS)
    for line, name in included:
        # What lies deeper is the installer's own, or on its medium.
        deep = re.match(r"(?:file://)?/.*[^/]/", name)
        if not deep and _is_absent(given, name, makes_files=makes_files):
            yield _absent(line, name)
    yield from _preseed_end(found)


def _preseed_end(found: dict[str, str]) -> Iterator[Finding]:
    if _says(found, "debian-installer/exit/poweroff"):
        return
    if _says(found, "debian-installer/exit/halt"):
        yield _end("halts the machine")
    elif not found.keys() & {"finish-install/reboot_in_progress", "preseed/include", "preseed/include_command"}:
        yield _end("does not say how the installation ends: the installer asks then")


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """Give the entries of a preseed file, which may go on after a backslash, with the line that each begins in."""
    begun, entry = 0, ""
    for line, part in enumerate(text.splitlines(), 1):
        if not entry and (not part.strip() or part.lstrip().startswith("#")):
            continue
        begun = begun if entry else line
        entry += part.removesuffix("\\")
        if not part.endswith("\\"):
            yield begun, entry
            entry = ""
    if entry.strip():
        yield begun, entry


def _says(found: dict[str, str], question: str) -> bool:
    return found.get(question) == "true"


def _preseed_filesystems(line: int, question: str, value: str) -> Iterator[Finding]:
    if question == "partman/default_filesystem" and _NO_ROOTS.fullmatch(value):
        yield _unsupported(line, f"a root on {value}")
    if question.endswith("/expert_recipe"):
        # A recipe has the parts of a partition in any order; a dot ends it.
        for partition in re.split(r"\s\.(?=\s|$)", value):
            kind = re.search(r"\bfilesystem\{\s*(\S+)\s*\}", partition)
            if kind and _NO_ROOTS.fullmatch(kind[1]) and re.search(r"\bmountpoint\{\s*/\s*\}", partition):
                yield _unsupported(line, f"a root on {kind[1]}")


def _is_absent(given: _Answers, name: str, *, makes_files: bool) -> bool:
    """Return whether the installer looks for the file *name* in vain, as far as that can be known.

    What another server has is not looked for, nor what a command of the answer file may have brought.
    """
    local = _local(name)
    return ":" not in local and local not in given.names and not makes_files


def _local(name: str) -> str:
    """Return the name of the further file that *name*, a path or a URL, means to the installer."""
    return name.removeprefix("file://").removeprefix("./").lstrip("/")


def _end(text: str, *, line: int = 0, hint: str = "Have {}.") -> Finding:
    return Finding(line, f"it {text}", hint)


# Anaconda.

_SECTIONS = (
    "%addon",
    "%anaconda",
    "%certificate",
    "%onerror",
    "%packages",
    "%post",
    "%pre",
    "%pre-install",
    "%traceback",
)
_ENDS = ("poweroff", "shutdown", "reboot", "halt")
_OSTREE = {"ostreesetup": "ostree", "ostreecontainer": "ostree", "bootc": "bootc"}


def _kickstart(given: _Answers) -> Iterator[Finding]:
    yield from _sections(given)
    yield from _kickstart_includes(given)
    commands = list(_kickstart_commands(given.text))
    for line, words in commands:
        if words[0] in _OSTREE:
            yield _unsupported(line, f"a system of {_OSTREE[words[0]]}")
        yield from _kickstart_filesystems(line, words)
    if not commands and not re.search(r"^\s*%", given.text, re.MULTILINE):
        yield Finding(0, "it has no command", "See whether it is the right file.", fatal=True)
        return
    # Others may be in what it includes, which the commands before an installation can make.
    includes = re.search(r"^\s*%(include|ksappend)\b", given.text, re.MULTILINE)
    ends = [(line, words) for line, words in commands if words[0] in _ENDS]
    if not ends and not includes:
        yield _end("does not say how the installation ends: Anaconda halts the machine then")
    for line, words in ends[-1:]:
        if words[0] == "halt":
            yield _end("halts the machine", line=line)
        elif words[0] == "reboot" and "--kexec" in words:
            yield _end("starts the installed system in the machine of the installation", line=line)


def _kickstart_commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """Give the commands outside of sections: line and words."""
    inside = False
    for line, part in enumerate(text.splitlines(), 1):
        words = part.split("#", 1)[0].split()
        if not words:
            continue
        if words[0] in _SECTIONS or words[0] == "%end":
            inside = words[0] != "%end"
        elif not inside and not words[0].startswith("%"):
            yield line, words


def _kickstart_filesystems(line: int, words: list[str]) -> Iterator[Finding]:
    match = re.search(r"--fstype[= ]\"?(\w+)", " ".join(words))
    is_root = words[0] == "autopart" or (words[0] in ("part", "partition", "logvol", "btrfs") and "/" in words[1:])
    if match and is_root and _NO_ROOTS.fullmatch(match[1]):
        yield _unsupported(line, f"a root on {match[1]}")


def _sections(given: _Answers) -> Iterator[Finding]:
    """Give sections that are unknown, or have no end."""
    begun, name = 0, ""
    for line, part in enumerate(given.text.splitlines(), 1):
        word = part.split()[0] if part.split() else ""
        if word == "%end":
            if not name:
                yield Finding(line, "%end ends no section", "Remove it, or write the section's name above.", fatal=True)
            name = ""
        elif word in _SECTIONS:
            if name:
                yield _without_end(begun, name)
            begun, name = line, word
        elif word.startswith("%") and not name and word not in ("%include", "%ksappend"):
            known = ", ".join(_SECTIONS)
            yield Finding(line, "there is no such section", f"Anaconda knows {known}.", fatal=True)
    if name:
        yield _without_end(begun, name)


def _without_end(line: int, name: str) -> Finding:
    return Finding(line, f"the section {name} has no %end", "Write %end in a line of its own below it.", fatal=True)


# What makes files before they are included: commands, also in another file.
_MAKES_FILES = re.compile(
    r"^\s*%(?:pre\b|(?:include|ksappend)\s+[\"']?(?!/(?:tmp|run|var)/)\S)",
    re.MULTILINE,
)


def _kickstart_included(text: str) -> Iterator[tuple[int, str, bool]]:
    """Give what *text* includes: line, name, and whether that is in a section."""
    inside = False
    for line, part in enumerate(text.splitlines(), 1):
        words = part.split()
        if words and (words[0] in _SECTIONS or words[0] == "%end"):
            inside = words[0] != "%end"
        elif len(words) > 1 and words[0] in ("%include", "%ksappend"):
            yield line, words[1].strip("'\""), inside


def _kickstart_parts(given: _Answers, parts: dict[str, _Answers]) -> set[str]:
    """Return the names of those *parts* that are read as *given* is, which or one of which includes them."""
    found: dict[str, None] = {}
    waiting = [given]
    for part in waiting:
        names = [_local(name) for _, name, inside in _kickstart_included(part.text) if not inside]
        new = dict.fromkeys(name for name in names if name in parts and name not in found)
        found |= new
        waiting += [parts[name] for name in new]
    return set(found)


def _kickstart_includes(given: _Answers, *, is_part: bool = False) -> Iterator[Finding]:
    # The commands may be in whatever includes a part.
    makes_files = is_part or bool(_MAKES_FILES.search(given.text))
    for line, name, _ in _kickstart_included(given.text):
        # What lies deeper is the installer's own, or of a disk that it has mounted, as its medium is.
        deep = name.startswith("/") and name.count("/") > 1
        made = name.startswith(("/tmp/", "/run/", "/var/")) and not name.startswith("/run/install/")
        if (made or not deep) and _is_absent(given, name, makes_files=makes_files and made):
            yield _absent(line, name)


# Subiquity.

_CLOUD_CONFIG = re.compile(r"#cloud-config\b(?!-)", re.IGNORECASE)


def _autoinstall(given: _Answers) -> Iterator[Finding]:
    # cloud-init looks at what it begins with, in small letters and without the blanks.
    lines = given.text.lstrip().splitlines()
    first = next(iter(lines), "")
    if re.match(r"#include|Content-Type:|MIME-Version:|#cloud-config-archive", first, re.IGNORECASE):
        # cloud-init knows more forms, which are its own concern.
        return
    if re.match("## *template: *jinja", first):
        first = next(iter(lines[1:]), "")
        if _CLOUD_CONFIG.match(first):
            return
    if not _CLOUD_CONFIG.match(first):
        yield Finding(
            1,
            "the first line is not #cloud-config, so that cloud-init passes over it",
            "Have that alone in the first line.",
            fatal=True,
        )
    try:
        document = yaml.safe_load(given.text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        yield _malformed(mark.line + 1 if mark else 0, "YAML", "yamllint")
        return
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        yield _malformed(0, "YAML", "yamllint")
        return
    if not isinstance(document, dict) or not isinstance(document.get("autoinstall"), dict):
        yield Finding(
            0,
            "it has no key 'autoinstall' with keys below it",
            "Have all that the installer is to know there.",
            fatal=True,
        )
        return
    yield from _subiquity(document["autoinstall"])


def _subiquity(wanted: dict[Any, Any]) -> Iterator[Finding]:
    if wanted.get("interactive-sections"):
        yield _end("has interactive-sections, where the installer waits for answers", hint="Remove them.")
    if wanted.get("shutdown", "poweroff") not in ("poweroff", "reboot"):
        yield _end("has another value of shutdown than poweroff and reboot")
    storage = wanted.get("storage")
    if not isinstance(storage, dict):
        return
    layout = storage.get("layout")
    if isinstance(layout, dict) and layout.get("name") == "zfs":
        yield _unsupported(0, "a root on zfs")
    config = storage.get("config")
    actions = [action for action in config if isinstance(action, dict)] if isinstance(config, list) else []
    formats = {str(action.get("id")): str(action.get("fstype")) for action in actions if action.get("type") == "format"}
    for action in actions:
        kind = formats.get(str(action.get("device")), "")
        is_root = action.get("type") == "mount" and action.get("path") == "/"
        if (is_root and _NO_ROOTS.fullmatch(kind)) or (action.get("type") == "zfs"):
            yield _unsupported(0, f"a root on {kind or 'zfs'}")


def _malformed(line: int, language: str, checker: str) -> Finding:
    return Finding(line, f"it is no well-formed {language} there", f"{checker} says more.", fatal=True)


# YaST.


def _yast(given: _Answers) -> Iterator[Finding]:
    if given.path.name.removesuffix(answers.TEMPLATE_SUFFIX).endswith(".erb"):
        # AutoYaST renders it itself.
        return
    try:
        # No parser of Python fetches what an entity or a document type names.
        root = ElementTree.fromstring(given.data)
    except ElementTree.ParseError as error:
        yield _malformed(error.position[0], "XML", "xmllint --noout")
        return
    except (ValueError, LookupError):
        yield _malformed(1, "XML", "xmllint --noout")
        return
    for element in root.iter():
        # Their namespace says nothing.
        element.tag = str(element.tag).rpartition("}")[2]
    if root.tag != "profile":
        yield Finding(0, "its outermost element is not <profile>", "AutoYaST looks for that.")
        return
    for element in root.iter():
        name = (element.text or "").strip()
        if element.tag in ("location", "file_location") and re.match("(file|relurl)://", name):
            local = re.sub("^(file|relurl):/*", "", name)
            if local not in given.names and ("/" not in local or name.startswith("relurl")):
                yield _absent(0, name, "names")
    for partition in root.iter("partition"):
        kind = (partition.findtext("filesystem") or "").strip()
        if (partition.findtext("mount") or "").strip() == "/" and _NO_ROOTS.fullmatch(kind):
            yield _unsupported(0, f"a root on {kind}")
    yield from _yast_end(root)


def _yast_end(root: ElementTree.Element) -> Iterator[Finding]:
    def says(name: str) -> str:
        return (root.findtext(f"general/mode/{name}") or "").strip()

    if says("confirm") != "false":
        yield _end(
            "has the installer wait for a confirmation",
            hint='Have <confirm config:type="boolean">false</confirm> in <general><mode>.',
        )
    if says("halt") != "true" and says("final_halt") != "true":
        yield _end("does not say how the installation ends: the installed system is started then")


# Agama.


def _agama(given: _Answers) -> Iterator[Finding]:
    name = given.path.name.removesuffix(answers.TEMPLATE_SUFFIX)
    if name.endswith(".xml"):
        try:
            ElementTree.fromstring(given.data)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            yield _malformed(getattr(error, "position", (1, 0))[0], "XML", "xmllint --noout")
    elif name.endswith(".json"):
        try:
            document = json.loads(given.text)
        except json.JSONDecodeError as error:
            yield _malformed(error.lineno, "JSON", "jq")
            return
        except (ValueError, RecursionError):
            yield _malformed(0, "JSON", "jq")
            return
        if not isinstance(document, dict):
            yield Finding(0, "it is no object of JSON", "It begins with { and ends with }.", fatal=True)
        yield from _agama_files(given)
        yield from _agama_filesystems(document)
    finish = re.findall(r"\binst\.finish=(\S*)", given.plan.settings.append)
    if finish and finish[-1] == "halt":
        yield _end("is used with inst.finish=halt, which halts the machine")
    elif finish and finish[-1] == "stop":
        yield _end("is used with inst.finish=stop, after which the installer goes on for ever")


def _agama_files(given: _Answers) -> Iterator[Finding]:
    label = delivery.DELIVERIES["agama"].label
    for line, part in enumerate(given.text.splitlines(), 1):
        for name in re.findall(rf'"label://{label}/+([^"\\]+)"', part):
            if name not in given.names:
                yield _absent(line, name, "names")


def _agama_filesystems(value: Any) -> Iterator[Finding]:
    """Give roots that are not supported, wherever in the storage section they are."""
    if isinstance(value, dict):
        kind = value.get("type")
        kind = next(iter(kind), "") if isinstance(kind, dict) else kind
        if value.get("path") == "/" and isinstance(kind, str) and _NO_ROOTS.fullmatch(kind):
            yield _unsupported(0, f"a root on {kind}")
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _agama_filesystems(part)


_CHECKS: dict[str, Callable[[_Answers], Iterator[Finding]]] = {
    "preseed": _preseed,
    "kickstart": _kickstart,
    "yast": _yast,
    "autoinstall": _autoinstall,
    "agama": _agama,
}
