"""The answer file as the installer gets it: a template is rendered, in others ends of lines are mended at most.

Answer files hold secrets, so no message has anything of their contents but the names of keys and of files.
"""

import codecs
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from jinja2 import (
    BaseLoader,
    Environment,
    StrictUndefined,
    TemplateNotFound,
    TemplateSyntaxError,
    UndefinedError,
    meta,
    nodes,
)
from jinja2.sandbox import SandboxedEnvironment

from ..base.errors import ConfigurationError
from ..machines.arch import ARCHITECTURES, debian_arch
from ..model import Plan
from . import forms

TEMPLATE_SUFFIX = ".j2"

_UNKNOWN = re.compile(r"'(\w+)' is undefined")


def is_template(path: Path) -> bool:
    """Return whether the answer file *path* is rendered with the keys of the image's section."""
    return path.name.endswith(TEMPLATE_SUFFIX)


def installer_name(path: Path) -> str:
    """Return the name by which the installer knows the answer file *path*."""
    return path.name.removesuffix(TEMPLATE_SUFFIX)


def keys_asked_for(path: Path) -> set[str] | None:
    """Return the keys that the answer file *path*, and what it includes, asks for or declares, with dashes.

    None means any key, as an expression says what is included.  What can't be read or understood asks for
    nothing: whoever renders it is told.
    """
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for _, source, tree in _templates(path):
            with contextlib.suppress(ValueError):
                for arch in ARCHITECTURES:
                    found |= forms.declared(source, arch).keys()
            with contextlib.suppress(TemplateSyntaxError):
                found |= {name.replace("_", "-") for name in meta.find_undeclared_variables(tree)}
            if None in meta.find_referenced_templates(tree):
                return None
    return found


def declared_keys(path: Path, arch: str) -> dict[str, forms.Key]:
    """Return the keys that the answer file *path* and what it includes declare, by name with dashes.

    What the answer file says of a key wins.  There are none if it is no template.
    """
    found: dict[str, forms.Key] = {}
    try:
        for part, source, _ in _templates(path):
            # Those of the answer file come first, in their order.
            found |= {name: key for name, key in _declared(part, source, arch).items() if name not in found}
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {error.strerror}.") from error
    return found


def _declared(path: Path, source: str, arch: str) -> dict[str, forms.Key]:
    try:
        return forms.declared(source, arch)
    except ValueError as error:
        raise ConfigurationError(
            f"{path}, line {error}: that is no line of the table of keys.",
            hint="It has KEY | DEFAULT | WHAT IS ACCEPTED | WHAT IT IS; the default is accepted, or empty.",
        ) from None


def _templates(path: Path) -> Iterator[tuple[Path, str, nodes.Template]]:
    """Give the answer file *path*, if it is a template, and all that it includes: path, text, and what Jinja2 reads.

    What an expression names, or what is not there, is left out; OSError if the answer file can't be read.
    """
    environment = SandboxedEnvironment()
    waiting = [path] if is_template(path) else []
    for part in waiting:
        try:
            source = part.read_bytes().removeprefix(codecs.BOM_UTF8).decode(errors="replace")
        except OSError:
            if part == path:
                raise
            continue
        try:
            tree = environment.parse(source)
        except TemplateSyntaxError:
            # Whoever renders it is told; its table is good all the same.
            tree = environment.parse("")
        yield part, source, tree
        others = (path.parent / name for name in meta.find_referenced_templates(tree) if name)
        waiting += [other for other in dict.fromkeys(others) if other not in waiting]


def content(plan: Plan) -> bytes:
    """Return what the installer gets as the answer file of *plan*, which has one.

    ConfigurationError names the file, the line and, where one is unknown, the key.
    """
    own = _own(plan)
    data = own.read(own.path)
    return rendered(own, data) if is_template(own.path) else mended(data)


def mended(data: bytes) -> bytes:
    """Return *data* with the line ends of Unix and without a byte order mark, if it is UTF-8.

    No installer wants them otherwise, and scripts in an answer file fail with them.
    """
    try:
        data.decode()
    except UnicodeDecodeError:
        return data
    return data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")


def is_changed(path: Path) -> bool:
    """Return whether the installer gets something else than the answer file *path* as it is."""
    if is_template(path):
        return True
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return mended(data) != data


def write(plan: Plan, target: Path) -> None:
    """Write what the installer gets to the new file *target*, which only this user can read."""
    write_private(target, content(plan))


def write_private(target: Path, data: bytes) -> None:
    """Write *data* to the new file *target*, which only this user can read."""
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def where(plan: Plan, path: Path | None = None) -> str:
    """Return how a message names the answer file, or the file *path* that belongs to it."""
    return _own(plan).where(path)


@dataclass(frozen=True)
class Named:
    """The file *path*, which the setting *key* of *plan* names; a template gets the keys of the image's section."""

    plan: Plan
    key: str
    path: Path

    def where(self, path: Path | None = None) -> str:
        """Return how a message names it, or the file *path* that belongs to it."""
        return f"[{self.plan.image}] {self.key}: {path or self.path}"

    def read(self, path: Path) -> bytes:
        """Return the bytes of it, or of the file *path* that belongs to it."""
        try:
            return path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{self.where(path)} can't be read: {error.strerror}.") from error


def _own(plan: Plan) -> Named:
    settings = plan.settings
    assert settings.answer_file is not None and settings.answer_file_key is not None
    return Named(plan, settings.answer_file_key, settings.answer_file)


class _Parts(BaseLoader):
    """Gives Jinja2 the template *named*, whose bytes are *data*, and the files beside it and below."""

    def __init__(self, named: Named, data: bytes) -> None:
        self._named, self._path, self._data = named, named.path, data
        # All that were asked for, as tracebacks name them.
        self.files: dict[str, Path] = {}

    def get_source(self, environment: Environment, template: str) -> tuple[str, str, Callable[[], bool] | None]:
        """Return the text of *template* and its path; TemplateNotFound if it isn't there."""
        path, data = self._path, self._data
        if template != path.name:
            path = self._find(template)
            data = self._named.read(path)
        self.files[str(path)] = path
        try:
            return data.removeprefix(codecs.BOM_UTF8).decode(), str(path), None
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ConfigurationError(f"{self._named.where(path)}, line {line} is not UTF-8.") from None

    def _find(self, template: str) -> Path:
        """Return the path of *template*, which is not the answer file."""
        directory = self._path.parent
        path = directory / template
        # A link could lead anywhere, and what is there would be in the image.
        if not path.resolve().is_relative_to(directory.resolve()):
            raise ConfigurationError(
                f"{self._named.where()}: the template includes {template!r}, which is outside of its directory.",
                hint="A template includes files of its own directory, or below it.",
            )
        if not path.is_file():
            raise TemplateNotFound(template)
        return path


def rendered(named: Named, data: bytes) -> bytes:
    """Return what the template *named*, whose bytes are *data*, becomes.

    ConfigurationError names the file, the line and, where one is unknown, the key.  None of Jinja2's errors is chained
    to it: they quote the template.
    """
    path = named.path
    parts = _Parts(named, data)
    # Sandboxed: a recipe from elsewhere is to write an answer file and nothing else.
    environment = SandboxedEnvironment(
        loader=parts, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    names: set[str] = set()
    try:
        names = _names(named, environment, parts)
        template = environment.get_template(path.name)
        return template.render(_variables(named, names), refuse=partial(_refuse, named)).encode()
    except ConfigurationError:
        raise
    except TemplateSyntaxError as error:
        raise ConfigurationError(
            f"{named.where(Path(error.filename or path))}, line {error.lineno}: Jinja2 doesn't understand the template "
            "there.",
            hint="The part in {{ }}, {% %} or {# #} there, or one that is not closed, is wrong.",
        ) from None
    except TemplateNotFound as error:
        raise ConfigurationError(
            f"{_place(named, parts, error)}: the template includes {error.name!r}, which is not there.",
            hint=f"Put it beside {path}, or below; names are relative to the answer file, in each part of it.",
        ) from None
    except UndefinedError as error:
        raise _unknown(named, parts, error, names) from None
    except Exception as error:
        # A filter raises whatever it likes.
        raise ConfigurationError(
            f"{_place(named, parts, error)}: the template can't be rendered ({type(error).__name__}).",
            hint="A filter or an expression there doesn't take the value that it gets.",
        ) from None


def _variables(named: Named, names: set[str]) -> dict[str, str]:
    """Return the keys that a template with *names* asks for or declares: an error in another is no concern of it."""
    plan = named.plan
    declared = declared_keys(named.path, plan.settings.arch)
    others = (name for name in sorted(names) if name.replace("_", "-") not in declared)
    variables = {name: plan.variables[name] for name in others if name in plan.variables}
    variables |= {key.name.replace("-", "_"): _checked(plan, key) for key in declared.values()}
    # These as they are understood, also where they are not given.
    own = {"arch": plan.settings.arch, "firmware": plan.settings.firmware}
    return variables | own | {"debian_arch": debian_arch(plan.variables.get("arch", ""), plan.settings.arch)}


def _names(named: Named, environment: Environment, parts: _Parts) -> set[str]:
    """Return the names in the template and in all that it includes."""
    plan = named.plan
    names: set[str] = set()
    templates = [named.path.name]
    for template in templates:
        try:
            source, filename, _ = parts.get_source(environment, template)
        except TemplateNotFound:
            # Perhaps it is not asked for in the end.
            continue
        tree = environment.parse(source, template, filename)
        names |= {node.name for node in tree.find_all(nodes.Name)}
        found = list(meta.find_referenced_templates(tree))
        if None in found:
            # An expression says which file, so that any key may be asked for.
            names |= set(filter(partial(_has_value, plan), plan.variables))
        templates += [name for name in dict.fromkeys(found) if name is not None and name not in templates]
    return names


def _has_value(plan: Plan, name: str) -> bool:
    try:
        plan.variables[name]
    except ConfigurationError:
        return False
    return True


def _checked(plan: Plan, key: forms.Key) -> str:
    """Return what the template gets for *key*; ConfigurationError if it may not be what the image says."""
    name = key.name.replace("-", "_")
    if name not in plan.variables:
        return key.default
    text = plan.variables[name]
    try:
        return key.read(text)
    except ValueError as error:
        # A URL may have a password.
        hidden = key.secret or "@" in text or not text.isprintable()
        shown = "what is there" if hidden else repr(text)
        hint = f"{error} " if str(error) else ""
        raise ConfigurationError(
            f"[{plan.image}] {key.name}: {shown} is not accepted, only {key.accepted}.",
            hint=f"{hint}'image-factory --keys {plan.image}' lists all keys.",
        ) from None


def _refuse(named: Named, key: str, reason: str) -> NoReturn:
    """Stop a template, as what *key* says can't be had."""
    raise ConfigurationError(f"{named.where()}: {reason}", hint=f"Change {key} in [{named.plan.image}].")


def _unknown(named: Named, parts: _Parts, error: UndefinedError, names: set[str]) -> ConfigurationError:
    place = _place(named, parts, error)
    match = _UNKNOWN.fullmatch(error.message or "")
    if not match or match[1] not in names:
        return ConfigurationError(f"{place}: a part of a value is not there.")
    key = match[1].replace("_", "-")
    return ConfigurationError(
        f"{place}: there is no key '{key}'.",
        hint=f"Define {key} in [{named.plan.image}] or [DEFAULT], or give it a default in the template.",
    )


def _place(named: Named, parts: _Parts, error: BaseException) -> str:
    """Return how a message names the file and the line where *error* was raised."""
    path, line, entry = None, 0, error.__traceback__
    while entry:
        if entry.tb_frame.f_code.co_filename in parts.files:
            path, line = parts.files[entry.tb_frame.f_code.co_filename], entry.tb_lineno
        entry = entry.tb_next
    return f"{named.where(path)}, line {line}"
