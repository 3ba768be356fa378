"""The configuration files: INI text, read and merged, and the values in it."""

import codecs
import configparser
import contextlib
import copy
import dataclasses
import difflib
import math
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..base import events
from ..base.errors import ConfigurationError
from ..base.files import find_data_dir
from ..machines.arch import ARCHITECTURES, FIRMWARES, default_arch, default_firmware, is_arch
from ..outputs import OUTPUTS, targets
from ..outputs.targets import TARGETS
from ..sources import SOURCES
from ..tasks import KINDS as TASKS
from ..uploads import UPLOADS
from .parsers import FIT, any_of, one_of, parse_arch, parse_command, parse_path, some_of
from .settings import (
    NAME_TEMPLATES,
    NAME_VARIABLES,
    Declaration,
    Destination,
    ImageSettings,
    Task,
    TaskSettings,
    UploadSettings,
    declarations,
)

SYSTEM_FILE = Path("/etc/image-factory.conf")
USER_FILE = Path("~/.config/image-factory.conf")
FILE_VARIABLE = "IMAGE_FACTORY_CONFIG"
# What --list shows of an image beside its name.
LISTED_KEYS = ("distribution", "release", "arch", "firmware")
# And what --list-json tells.
DESCRIBED_KEYS = (*LISTED_KEYS, "format", "virt-type", "cores", "ram", "image-size", "install-timeout", "test-boot")

COMMAND_KEY = re.compile(r"post-upload-command[0-9]{0,9}")

_NEEDED_OF_UPLOADS = ("upload-type", "upload-target")
_KEYS_OF_ALL_UPLOADS = (*_NEEDED_OF_UPLOADS, "upload-args", "upload-formats")

# The settings that name entries of a table of kinds.
_KINDS: dict[str, tuple[Callable[..., Callable[[str], Any]], Collection[str]]] = {
    "source": (one_of, SOURCES),
    "target": (any_of, TARGETS),
    "format": (some_of, OUTPUTS),
    "upload-type": (one_of, UPLOADS),
    "upload-formats": (some_of, OUTPUTS),
    "task-type": (one_of, TASKS),
}


def declared(kind: type[Any]) -> Iterator[tuple[str, Declaration]]:
    """Give the key and the declaration of each setting of *kind*, with the names that the tables of kinds have."""
    for key, declaration in declarations(kind):
        yield key, declaration.accepting(*_KINDS[key]) if key in _KINDS else declaration


def normal_key(key: str) -> str:
    """Return *key* as it is known here, whatever its case and whether it has dashes or underscores."""
    return key.lower().replace("_", "-")


class Variables(Mapping[str, str]):
    """The texts of all keys of an image, own variables included, by key with underscores.

    A text is made when it is asked for, and ConfigurationError says what is wrong with it.
    """

    def __init__(self, keys: Iterable[str], text: Callable[[str], str]) -> None:
        """Take *text*, which gives the text of one of *keys*."""
        self._keys = {key.replace("-", "_"): key for key in keys}
        self._text = text

    def __getitem__(self, name: str) -> str:
        """Return the text of the key *name*."""
        return self._text(self._keys[name])

    def __contains__(self, name: object) -> bool:
        """Return whether there is a key *name*, without its text."""
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        """Give the keys."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Return how many keys there are."""
        return len(self._keys)


class Origin(NamedTuple):
    """Where the text of a key comes from: ``flag``, ``target``, ``default``, or ``file``, the only one with a place."""

    kind: str
    section: str | None = None
    path: Path | None = None
    line: int | None = None


class _Parser(configparser.RawConfigParser):
    """A parser of files, whose keys it knows by ``normal_key``."""

    def optionxform(self, optionstr: str) -> str:
        """Return the key *optionstr* as it is known here."""
        return normal_key(optionstr)


class _LineNumbers(_Parser):
    """A parser that knows on which line each key is written; a section of defaults is one like the others."""

    def __init__(self, lines: Iterable[str]) -> None:
        super().__init__(default_section="")
        self._lines = lines
        self._line = 0
        self._found: list[int] = []
        self.read_file(self._counted())
        # Keys were read in the order in which they are kept.
        keys = ((section, key) for section in self.sections() for key in self[section])
        self.of_keys = dict(zip(keys, tuple(self._found), strict=True))

    def _counted(self) -> Iterator[str]:
        for line in self._lines:
            self._line += 1
            yield line

    def optionxform(self, optionstr: str) -> str:
        """Return the key *optionstr* as it is known here, and note the line that has just been read."""
        self._found.append(self._line)
        return super().optionxform(optionstr)


class _Interpolating(_Parser, configparser.ConfigParser):
    """A parser that fills in ``${variables}``."""


class Configuration:
    """The configuration files, read and merged; values are parsed when they are asked for."""

    def __init__(self, environment: Mapping[str, str], given: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """Read the files that apply; ConfigurationError if one can't be read.

        *given* has texts for keys of sections, by the sections' names: they win over those of the files.
        """
        self._begin()
        if environment.get(FILE_VARIABLE):
            self.files.append(Path(environment[FILE_VARIABLE]))
            self._read(self.files[0], f" (named by {FILE_VARIABLE})")
        else:
            shipped = find_data_dir() / "image-factory.conf"
            candidates = [shipped, SYSTEM_FILE, Path(os.path.expanduser(USER_FILE))]
            self.files += [path for path in candidates if os.path.lexists(path)]
            for path in self.files:
                self._read(path)
                if path == shipped:
                    self.written.clear()
        for section, texts in (given or {}).items():
            if self._parser.has_section(section):
                self._give(section, texts)
        self._fill_all()

    @classmethod
    def without_files(cls, section: str, texts: Mapping[str, str]) -> "Configuration":
        """Return a configuration whose only section is *section*, with *texts* for its keys."""
        configuration = cls.__new__(cls)
        configuration._begin()
        configuration._parser.add_section(section)
        configuration._give(section, texts)
        configuration._fill_all()
        return configuration

    def _begin(self) -> None:
        self._parser = _Interpolating(
            defaults={"data-dir": str(find_data_dir()).replace("$", "$$")},
            interpolation=configparser.ExtendedInterpolation(),
        )
        # The keys of each section in the files of the user, which are to be warned of if nothing uses them.
        self.written: dict[str, set[str]] = {}
        self._lines: dict[tuple[str, str], tuple[Path, int]] = {}
        self._given: set[tuple[str, str]] = set()
        self.files: list[Path] = []
        # The sections as they are written, without what they are based on.
        self.own: dict[str, dict[str, str]] = {}
        # Of the other sections nothing is wrong: whoever asks for one of these is told.
        self._broken: dict[str, ConfigurationError] = {}

    def _give(self, section: str, texts: Mapping[str, str]) -> None:
        """Have *section* have *texts*, as they are, for its keys, whatever the architecture."""
        self._forget_architectures(section, map(normal_key, texts))
        for key, text in texts.items():
            self._parser.set(section, key, text.replace("$", "$$"))
        self.written.setdefault(section, set()).update(map(normal_key, texts))
        self._given |= {(section, normal_key(key)) for key in texts}

    def _fill_all(self) -> None:
        self.own = {section: dict(self._own_texts(section)) for section in self._parser.sections()}
        for section in self._parser.sections():
            try:
                self._fill(section)
            except ConfigurationError as error:
                self._broken[section] = error

    def _read(self, path: Path, named: str = "") -> None:
        where = f"{path}{named}"
        try:
            data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
            events.tell(events.InputUsed("configuration", str(path), path))
            # Without their ends, lines look better in messages.
            lines = data.decode().split("\n")
            self._note_keys(path, lines)
            self._parser.read_file(lines, str(path))
        except OSError as error:
            raise ConfigurationError(f"Can't read the configuration {where}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ConfigurationError(
                f"{where}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8.",
                hint=f"Convert it: iconv -f latin1 -t utf-8 {shlex.quote(str(path))}",
            ) from error
        except configparser.DuplicateSectionError as error:
            raise ConfigurationError(
                f"{where}, line {error.lineno}: section [{error.section}] is there twice."
            ) from error
        except configparser.DuplicateOptionError as error:
            raise ConfigurationError(
                f"{where}, line {error.lineno}: [{error.section}] has {error.option!r} twice.",
                hint="'-' and '_' are the same in keys.",
            ) from error
        except configparser.MissingSectionHeaderError as error:
            # The line itself is not shown: this may be an answer file, with passwords in it.
            raise ConfigurationError(f"{where}, line {error.lineno} comes before any [section].") from error
        except configparser.ParsingError as error:
            line, _ = error.errors[0]
            raise ConfigurationError(f"{where}, line {line} is neither a [section] nor KEY = VALUE.") from error
        except configparser.Error as error:
            raise ConfigurationError(f"{where}: {' '.join(str(error).split())}") from error

    def _note_keys(self, path: Path, lines: list[str]) -> None:
        parser = _LineNumbers(lines)
        self._lines |= {key: (path, line) for key, line in parser.of_keys.items()}
        for section in parser.sections():
            self.written.setdefault(section, set()).update(parser.options(section))
            self._forget_architectures(section, parser.options(section))

    def _forget_architectures(self, section: str, keys: Iterable[str]) -> None:
        """Take the texts of files before for an architecture out of *section*, where this one has *keys* for any."""
        is_default = section == self._parser.default_section
        if is_default or self._parser.has_section(section):
            texts = self._parser.defaults() if is_default else self._own_texts(section)
            plain = set(keys)
            for key in [key for key in texts if key.partition("@")[0] in plain and names_arch(key)]:
                self._parser.remove_option(section, key)

    def bases(self, section: str) -> list[str]:
        """Return *section* and those that it is based on, the nearest first."""
        seen = [section]
        while based_on := self.own[seen[-1]].get("based-on", "").strip():
            if based_on not in self._parser.sections():
                raise ConfigurationError(
                    f"[{seen[-1]}] based-on: there is no section [{based_on}].", hint=self._suggestion(based_on)
                )
            if based_on in seen:
                raise ConfigurationError(
                    f"[{section}] based-on: {' -> '.join([*seen, based_on])} goes round in a circle."
                )
            seen.append(based_on)
        return seen

    def _fill(self, section: str) -> None:
        """Give *section* the keys that it lacks of the section that it is based on, as they are written there.

        A key with ``@ARCH`` behind it stands for the one without where that is the section's architecture.
        """
        levels = [self.own[name] for name in reversed(self.bases(section))]
        texts = self._own_texts(section)
        # Not by set(), which refuses what is to be refused when it is used, with a better message.
        for level in levels:
            texts.update(level)
        arch = self.arch(section)
        texts.clear()
        texts.update(_of_arch(self._parser.defaults(), arch))
        for level in levels:
            texts.update({**level, **_of_arch(level, arch)})

    def arch(self, section: str) -> str:
        """Return the architecture of *section*, empty if it is none."""
        try:
            return parse_arch(self._text(section, "arch")) if "arch" in self._parser[section] else default_arch()
        except (ConfigurationError, ValueError):
            # The image itself is refused, with a message.
            return ""

    def _own_texts(self, section: str) -> dict[str, str]:
        """Return the keys of *section* as they are written, without those of DEFAULT."""
        # configparser gives them out only together with those of DEFAULT.
        texts: dict[str, str] = self._parser._sections[section]  # type: ignore[attr-defined]
        return texts

    @property
    def default_section(self) -> str:
        """The name of the section whose keys all others have."""
        return self._parser.default_section

    @property
    def defaults(self) -> Mapping[str, str]:
        """The keys of that section, as they are written."""
        return self._parser.defaults()

    def texts(self, section: str) -> dict[str, str]:
        """Return all keys that *section* has, as they are written; none if there is no such section."""
        if section not in self._parser:
            return {}
        return {key: self._parser.get(section, key, raw=True) for key in self._parser[section]}

    def images(self) -> list[str]:
        """Return the names of the configured images, in the order of the files."""
        return [
            name
            for name, section in self._parser.items()
            if name != self._parser.default_section
            and "upload-type" not in section
            and (name in self._broken or any(key in section for source in SOURCES.values() for key in source.keys))
        ]

    def descriptions(self) -> list[dict[str, Any]]:
        """Return what there is to say of each configured image to machines; None where it is not known, or wrong."""
        return [
            {"name": name}
            | {key.replace("-", "_"): self._described(name, key) for key in DESCRIBED_KEYS}
            | {"based_on": self._own_texts(name).get("based-on", "").strip() or None}
            for name in self.images()
        ]

    def _described(self, name: str, key: str) -> Any:
        try:
            value = self._value(name, key, dict(declared(ImageSettings))[key], {})
            if key == "firmware" and (arch := self._described(name, "arch")):
                return value or self._usual_firmware(name, arch) or None
            # JSON has no infinity.
            return None if value == math.inf else value
        except ConfigurationError:
            # Whoever builds the image is told; the others are to be listed all the same.
            return () if key == "format" else None

    def summary(self, name: str) -> list[str]:
        """Return what there is to say of image *name*, by LISTED_KEYS; empty where it is not known, or wrong."""
        known = dict(declared(ImageSettings))
        found: dict[str, str] = {}
        for key in LISTED_KEYS:
            try:
                value = self._value(name, key, known[key], {})
            except ConfigurationError:
                # Whoever builds the image is told; the others are to be listed all the same.
                found[key] = ""
                continue
            if key == "firmware" and found["arch"]:
                value = value or self._usual_firmware(name, found["arch"])
            found[key] = value or ""
        return list(found.values())

    def image(self, name: str, flags: Mapping[str, str]) -> ImageSettings:
        """Return the settings of image *name*; *flags* (key -> text) win over the files."""
        self.check_image(name)
        values = self._values(name, ImageSettings, flags)
        values["firmware"] = values["firmware"] or self._usual_firmware(name, values["arch"])
        settings = ImageSettings(**values)
        self._check_source(name, settings.source)
        if settings.image_size == FIT and not SOURCES[settings.source].fits:
            fitting = " or ".join(key for key, source in SOURCES.items() if source.fits)
            raise ConfigurationError(
                f"[{name}] image-size = fit is only for source = {fitting}.", hint="Set a size such as 4G."
            )
        SOURCES[settings.source].check_settings(name, settings)
        targets.check(name, settings)
        return settings

    def setting(self, section: str, key: str) -> Any:
        """Return the value of the setting *key* of images in *section*, perhaps the one of defaults, or its default."""
        return self._value(section, key, dict(declared(ImageSettings))[key], {})

    def _usual_firmware(self, name: str, arch: str) -> str:
        """Return the firmware of image *name* when nothing is said of it: a layout may be named as one."""
        source = SOURCES.get(self.texts(name).get("source", "").strip())
        layout = self._value(name, "layout", dict(declared(ImageSettings))["layout"], {})
        return layout if source and source.fits and layout in FIRMWARES else default_firmware(arch)

    def _check_source(self, name: str, chosen: str) -> None:
        """Raise ConfigurationError if *name* has what another source than the *chosen* one is made of, and no more."""
        keys = self._parser[name]
        if any(key in keys for key in SOURCES[chosen].keys):
            return
        for other, source in SOURCES.items():
            for key in source.keys:
                if key in keys and "source" not in keys:
                    raise ConfigurationError(f"[{name}] has {key!r} and no 'source'.", hint=f"Add source = {other}")

    def check_image(self, name: str) -> None:
        """Raise ConfigurationError unless there is an image *name*."""
        if name not in self._parser or name == self._parser.default_section:
            raise ConfigurationError(
                f"No image {name!r} is configured in {', '.join(map(str, self.files)) or 'any file'}.",
                hint=self._suggestion(name),
            )
        if name in self._broken:
            raise self._broken[name]

    def variables(self, name: str, flags: Mapping[str, str]) -> Variables:
        """Return the texts of the keys of image *name*, for its answer file: flags, files and defaults."""
        defaults = {key: self._default_text(name, key, each) for key, each in declared(ImageSettings)}
        given = {key: text for key, text in defaults.items() if text is not None and key not in self._parser[name]}
        set_by_targets = {key: self._text_of_targets(name, key, flags) for key in targets.KEYS}
        given |= {key: text for key, text in set_by_targets.items() if text is not None}
        given |= flags
        keys = dict.fromkeys([*given, *self._parser[name]])
        return Variables(keys, lambda key: given[key] if key in given else self._text(name, key))

    def origin(self, name: str, key: str, flags: Mapping[str, str]) -> Origin:
        """Return where the text of *key* of image *name* comes from."""
        if key in flags:
            return Origin("flag")
        if self._text_of_targets(name, key, flags) is not None:
            return Origin("target")
        arch = self.arch(name)
        for section in (*self.bases(name), self.default_section):
            texts = self.defaults if section == self.default_section else self.own[section]
            # The one for an architecture wins over the one for all.
            for written in sorted(texts, key=names_arch, reverse=True):
                if written == key and (section, key) in self._given:
                    return Origin("flag")
                if (section, written) in self._lines and (written == key or key in _of_arch({written: ""}, arch)):
                    return Origin("file", section, *self._lines[section, written])
        return Origin("default")

    def destination(self, section: str, image_file: str, *, named_by: str) -> Destination:
        """Return upload destination *section* with ``${image}`` standing for *image_file*.

        *named_by* is the image whose settings name it, for the error.
        """
        if section not in self._parser or section == self._parser.default_section:
            raise ConfigurationError(
                f"[{named_by}] upload-destinations: there is no section [{section}].",
                hint=f"Add a section [{section}] with upload_type and upload_target.",
            )
        if section in self._broken:
            raise self._broken[section]
        for key, declaration in declared(UploadSettings):
            if key in _NEEDED_OF_UPLOADS and key not in self._parser[section]:
                raise ConfigurationError(
                    f"[{section}] lacks '{key.replace('-', '_')}'. It is the {declaration.help}.",
                    hint=f"[{section}] is an upload destination of [{named_by}].",
                )
        with_image = self._defining(section, "image", image_file)
        settings = self._taken(section, UploadSettings(**with_image._values(section, UploadSettings, {})))
        keys = sorted(filter(COMMAND_KEY.fullmatch, self._parser[section]), key=_command_number)
        commands = tuple(with_image._parse(section, key, parse_command) for key in keys)
        return Destination(
            section,
            settings.upload_type,
            settings.upload_target,
            settings.upload_args,
            commands,
            settings.upload_formats,
            settings.upload_method,
            settings.upload_headers,
            settings.upload_credentials,
            settings.upload_tls,
            settings.upload_verify,
            settings.upload_index,
            settings.upload_keep,
        )

    def _taken(self, section: str, settings: UploadSettings) -> UploadSettings:
        """Return *settings* without those that its type of uploads does not take; none of them is in *section* itself.

        Those of the default section are for other destinations.
        """
        taken = (*_KEYS_OF_ALL_UPLOADS, *UPLOADS[settings.upload_type].KEYS)
        others = {key: declaration for key, declaration in declarations(UploadSettings) if key not in taken}
        for key in others:
            if key in self.own.get(section, {}):
                takers = [name for name, upload in UPLOADS.items() if key in upload.KEYS]
                raise ConfigurationError(
                    f"[{section}] {key}: uploads of the type {settings.upload_type} have no such key.",
                    hint=f"Remove it. These have it: {', '.join(takers)}.",
                )
        values = {key.replace("-", "_"): _default_value(declaration) for key, declaration in others.items()}
        return dataclasses.replace(settings, **values)

    def task(self, name: str, key: str, *, named_by: str) -> Task:
        """Return the task *name* of the setting *key* of image *named_by*: a path if it has a slash, else a section."""
        if "/" in name:
            path = parse_path(name)
            return Task(path.name, "", _type_of(path), path)
        if name not in self._parser or name == self._parser.default_section:
            near = difflib.get_close_matches(name, self._parser.sections(), n=1, cutoff=0.6)
            raise ConfigurationError(
                f"[{named_by}] {key}: there is no section [{name}].",
                hint=f"Did you mean {near[0]}?" if near else f"A file is a path with a slash: ./{name}",
            )
        if name in self._broken:
            raise self._broken[name]
        found = TaskSettings(**self._values(name, TaskSettings, {}))
        kind = found.task_type or (_type_of(found.task_file) if found.task_file else None)
        kind = kind or next((kind for kind, each in TASKS.items() if each.key in self._parser[name]), None)
        if kind is None or TASKS[kind].key not in self._parser[name]:
            needed = [TASKS[kind].key] if kind else dict.fromkeys(each.key for each in TASKS.values())
            raise ConfigurationError(
                f"[{name}] lacks '{' or '.join(needed)}'.", hint=f"[{name}] is a task of [{named_by}]."
            )
        return Task(
            name,
            name,
            kind,
            found.task_file,
            found.task_packages,
            found.task_command or "",
            found.task_args,
            found.task_environment,
            found.task_secrets,
            math.inf if found.task_timeout is None else found.task_timeout,
            found.task_retries,
            found.task_reboot == "after",
            found.task_allow_failure,
            found.task_copy,
        )

    def _defining(self, section: str, key: str, text: str) -> "Configuration":
        """Return a copy in which ``${key}`` is *text* in *section*, and where it takes texts from others."""
        copied = copy.deepcopy(self)
        for name in (section, self._parser.default_section):
            copied._parser.set(name, key, text.replace("$", "$$"))
        return copied

    def _suggestion(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.images(), n=3, cutoff=0.5)
        if near:
            return f"Did you mean {' or '.join(near)}? 'image-factory --list' lists them all."
        return "'image-factory --list' lists the configured images."

    def source(self, name: str) -> str:
        """Return what makes the disk of section *name*; the default if it does not name it well."""
        known = dict(declared(ImageSettings))["source"]
        try:
            found: str = self._value(name, "source", known, {})
        except ConfigurationError:
            # Whoever builds the image is told.
            found = known.default_text() or ""
        return found

    def answer_file(self, name: str) -> Path | None:
        """Return the answer file of section *name*, None if it has none or does not name it well."""
        known = dict(declared(ImageSettings))
        for key in SOURCES[self.source(name)].answer_files:
            if key in self._parser[name]:
                with contextlib.suppress(ConfigurationError):
                    path: Path = self._value(name, key, known[key], {})
                    return path
        return None

    def _values(self, section: str, kind: type[Any], flags: Mapping[str, str]) -> dict[str, Any]:
        return {
            key.replace("-", "_"): self._value(section, key, declaration, flags) for key, declaration in declared(kind)
        }

    def _value(self, section: str, key: str, declaration: Declaration, flags: Mapping[str, str]) -> Any:
        if key in flags:
            return _parsed(f"{declaration.flags[-1]}", flags[key], declaration.parse)
        default = self._text_of_targets(section, key, flags)
        if default is None and key in self._parser[section]:
            return self._parse(section, key, declaration.parse)
        if default is None:
            default = self._default_text(section, key, declaration)
        return None if default is None else declaration.parse(default)

    def _text_of_targets(self, section: str, key: str, flags: Mapping[str, str]) -> str | None:
        """Return what the targets of *section* set *key* to; None if they don't, or what is nearer than they are does.

        What a section is based on says what is usual there, and a target in the section, or a flag, wins over that.
        """
        if key not in targets.KEYS:
            return None
        names = self._value(section, "target", dict(declared(ImageSettings))["target"], flags)
        is_nearer = self._distance(section, key, flags) <= self._distance(section, "target", flags)
        return None if is_nearer and key in self._parser[section] else targets.default(names, key)

    def _distance(self, section: str, key: str, flags: Mapping[str, str]) -> int:
        """Return how far from *section* the text of *key* comes: 0 from a flag, 1 from the section itself."""
        bases = self.bases(section)
        own = [{name.partition("@")[0] for name in self.own[base]} for base in bases]
        found = (number for number, keys in enumerate(own, 1) if key in keys)
        return 0 if key in flags else next(found, len(bases) + 1)

    def _default_text(self, section: str, key: str, declaration: Declaration) -> str | None:
        """Return the default of the setting *key* of *section*, whose source may have one of its own."""
        source = SOURCES.get(self.texts(section).get("source", "").strip())
        return source.defaults[key] if source and key in source.defaults else declaration.default_text()

    def _parse(self, section: str, key: str, parse: Callable[[str], Any]) -> Any:
        text = self._text(section, key)
        # An autoinstall file that is taken for a configuration begins with that key, and has secrets below it.
        is_file = any(key in source.answer_files for source in SOURCES.values())
        shown = "a value of several lines" if is_file and "\n" in text.strip() else None
        return _parsed(f"[{section}] {key}", text, parse, shown)

    def _text(self, section: str, key: str) -> str:
        where = f"[{section}] {key}"
        try:
            # What only a build knows stays as it is.
            variables = {name: f"$${{{name}}}" for name in NAME_VARIABLES} if key in NAME_TEMPLATES else None
            return self._parser.get(section, key, vars=variables)
        except configparser.InterpolationMissingOptionError as error:
            # Of a value over several lines, where a brace is missing.
            name = " ".join(error.reference.split())
            raise ConfigurationError(
                f"{where}: ${{{name}}} is not defined.",
                hint=f"Define {name} in [{section}] or [DEFAULT]; a dollar sign itself is written $$.",
            ) from error
        except configparser.InterpolationDepthError as error:
            raise ConfigurationError(f"{where}: its ${{...}} go round in a circle.") from error
        except configparser.InterpolationSyntaxError as error:
            raw = self._parser.get(section, key, raw=True)
            # Nobody is to find the hash of a password in a log.
            shown = "what is there" if re.search(r"\$[0-9a-z]{1,4}\$", raw) else repr(raw)
            raise ConfigurationError(
                f"{where}: {shown} has a '$' that begins no ${{...}}.",
                hint="Write $$ for a dollar sign.",
            ) from error


def _of_arch(texts: Mapping[str, str], arch: str) -> dict[str, str]:
    """Return the *texts* whose keys are for *arch*, by the keys that they stand for."""
    parts = ((key.rpartition("@"), text) for key, text in texts.items() if "@" in key)
    return {key: text for (key, _, suffix), text in parts if is_arch(suffix, arch)}


def names_arch(key: str) -> bool:
    """Return whether *key* has ``@ARCH`` behind it, and is of an architecture."""
    return any(is_arch(key.partition("@")[2], arch) for arch in ARCHITECTURES)


def _type_of(path: Path) -> str:
    """Return the type of the task that the file at *path* is, by its name."""
    return "playbook" if path.suffix in (".yml", ".yaml") else "script"


def _default_value(declaration: Declaration) -> Any:
    default = declaration.default_text()
    return None if default is None else declaration.parse(default)


def _command_number(key: str) -> int:
    """Return which of the commands after an upload *key* is: the one without a number is the first."""
    return int(key.removeprefix("post-upload-command") or -1)


def _parsed(where: str, text: str, parse: Callable[[str], Any], shown: str | None = None) -> Any:
    """Return the value of *text*; the error has *shown* in its place, if that is given."""
    try:
        value = parse(text)
        # No program takes it in an argument.
        if "\0" in text:
            raise ValueError("text without NUL characters")
        return value
    except ValueError as error:
        accepted, *hints = error.args
        raise ConfigurationError(
            f"{where}: {shown or repr(text)} is not accepted, only {accepted}.", hint=hints[0] if hints else None
        ) from error
