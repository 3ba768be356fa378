"""Package sources that are on an installation medium: found in the configuration of package managers, and left out.

apt has two forms of them, dnf, yum and zypp sections of one file, apk lines.
"""

import re
import urllib.parse
from collections.abc import Callable, Iterable

FILES = (
    "etc/apk/repositories",
    "etc/apt/sources.list",
    "etc/apt/sources.list.d/*",
    "etc/distro.repos.d/*.repo",
    "etc/yum.conf",
    "etc/yum.repos.d/*.repo",
    "etc/zypp/repos.d/*.repo",
    "etc/zypp/services.d/*.service",
)

# Is told of each URI whether it stays.
Stays = Callable[[str], bool]

_SCHEME = re.compile(r"(?:copy|dir|file):(?://(?:localhost)?(?=/))?(?=/)|(?=/)", re.IGNORECASE)
_MEDIUM = re.compile(r"(?:cdrom|cd|dvd|hd|iso|media):", re.IGNORECASE)
# Where media are mounted: by Debian's installer and live system, Ubuntu's, Anaconda, Agama and people.
_PLACES = ("cdrom", "lib/live/mount", "media", "mnt", "run")

_ONE_LINE = re.compile(r"[\s#]*deb(?:-src)?\s+(?:\[[^\]]*\]\s*)?\"?(\S+).*", re.IGNORECASE)
# The name of a CD, in brackets, may have blanks.
_WORD = re.compile(r"(?:\[[^\]\n]*\]|[^\s,])+")
_FIELD = re.compile(r"uris\s*:(.*)", re.IGNORECASE)
_SECTION = re.compile(r"\s*\[[^\]]*\]\s*")
_LOCATION = re.compile(r"(baseurl|mirrorlist|metalink|url)\s*[=:](.*)", re.IGNORECASE)


def is_medium(uri: str, mounted: Iterable[str] = ()) -> bool:
    """Return whether *uri*, or an absolute path, is on a medium; *mounted* are mount points of the system itself."""
    if _MEDIUM.match(uri):
        return True
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return False
    path = "/".join(filter(None, urllib.parse.unquote(uri[scheme.end() :]).split("/")))
    return _is_below(path, _PLACES) and not _is_below(path, [point for point in mounted if point])


def _is_below(path: str, places: Iterable[str]) -> bool:
    return any(f"{path}/".startswith(f"{place}/") for place in places)


def without_media(path: str, data: bytes, mounted: Iterable[str] = ()) -> bytes:
    """Return the contents *data* of the file *path*, one of FILES, without the sources that are on a medium.

    It is empty if nothing but comments is left.
    """
    points = tuple(mounted)
    # Any byte is a character of this encoding.
    text = data.decode("latin-1")

    def stays(uri: str) -> bool:
        return not is_medium(uri, points)

    if path.startswith("etc/apk/"):
        left = "".join(line for line in text.splitlines(keepends=True) if stays(line.lstrip("# @").strip()))
    elif not path.startswith("etc/apt/"):
        left = _without_sections(text, stays)
    elif path.endswith(".sources"):
        left = _without_stanzas(text, stays)
    else:
        left = "".join(line for line in text.splitlines(keepends=True) if _line_stays(line, stays))
    if left == text:
        return data
    is_left = any(line.strip() and not line.lstrip().startswith("#") for line in left.splitlines())
    return left.encode("latin-1") if is_left else b""


def _line_stays(line: str, stays: Stays) -> bool:
    found = _ONE_LINE.fullmatch(line.rstrip())
    return found is None or stays(found[1])


def _without_stanzas(text: str, stays: Stays) -> str:
    """Return deb822 *text* without the URIs that do not stay, nor stanzas that have no others."""
    kept, stanza = [], list[str]()
    for line in [*text.splitlines(keepends=True), ""]:
        if line.strip():
            stanza.append(line)
            continue
        left = _stanza(stanza, stays)
        # Of a stanza that goes, the empty line goes as well.
        kept += [*left, line] if left or not stanza else []
        stanza = []
    return "".join(kept)


def _stanza(lines: list[str], stays: Stays) -> list[str]:
    """Return the lines of a stanza without what does not stay; none if nothing is left of its URIs."""
    first = next((number for number, line in enumerate(lines) if _FIELD.match(line)), None)
    if first is None:
        return lines
    last, field = first, _FIELD.match(lines[first])
    assert field is not None
    values = [field[1]]
    # Lines that go on begin with a blank, and comments may stand between them.
    for number, line in enumerate(lines[first + 1 :], first + 1):
        if not line.startswith(("#", " ", "\t")):
            break
        values += [] if line.startswith("#") else [line]
        last = number
    words = _WORD.findall(" ".join(values))
    left = [word for word in words if stays(word)]
    if left == words:
        return lines
    return [*lines[:first], f"URIs: {' '.join(left)}\n", *lines[last + 1 :]] if left else []


def _without_sections(text: str, stays: Stays) -> str:
    """Return the sections of *text* but for those that name no place which stays."""
    sections: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if _SECTION.fullmatch(line):
            sections.append([])
        sections[-1].append(line)
    return "".join(line for section in sections for line in _section(section, stays))


def _section(lines: list[str], stays: Stays) -> list[str]:
    kept: list[str] = []
    found = gone = 0
    place: list[str] = []
    for line in [*lines, "\n"]:
        # A line that begins with a blank goes on with the value before it.
        if place and line[:1] in " \t" and line.strip():
            place.append(line)
            continue
        if place:
            left, count = _location(place, stays)
            kept += left
            found, gone = found + bool(left), gone + count
            place = []
        if _LOCATION.match(line):
            place = [line]
        else:
            kept.append(line)
    if not gone:
        return lines
    return kept[:-1] if found else []


def _location(lines: list[str], stays: Stays) -> tuple[list[str], int]:
    """Return the lines of a location without what does not stay, and how much that was."""
    found = _LOCATION.match(lines[0])
    assert found is not None
    words = _WORD.findall(" ".join([found[2], *lines[1:]]))
    left = [word for word in words if stays(word)]
    gone = len(words) - len(left)
    if not gone:
        return lines, 0
    return ([f"{found[1]}={' '.join(left)}\n"] if left else []), gone
