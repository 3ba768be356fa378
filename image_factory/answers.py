"""The answer file as the installer gets it: a template is rendered, any other file is passed as it is.

Answer files hold secrets, so no message has anything of their contents but the names of keys.
"""

import os
import re
from functools import partial
from pathlib import Path
from typing import NoReturn

from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError, nodes
from jinja2.sandbox import SandboxedEnvironment

from .errors import ConfigurationError
from .model import Plan

TEMPLATE_SUFFIX = ".j2"

# What Jinja2 calls a template that comes from a string, in tracebacks.
_TEMPLATE = "<template>"
_UNKNOWN = re.compile(r"'(\w+)' is undefined")


def is_template(path: Path) -> bool:
    """Return whether the answer file *path* is rendered with the keys of the image's section."""
    return path.name.endswith(TEMPLATE_SUFFIX)


def installer_name(path: Path) -> str:
    """Return the name by which the installer knows the answer file *path*."""
    return path.name.removesuffix(TEMPLATE_SUFFIX)


def content(plan: Plan) -> bytes:
    """Return what the installer gets as the answer file of *plan*, which has one.

    ConfigurationError names the file, the line and, where one is unknown, the key.
    """
    path = plan.settings.answer_file
    assert path is not None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{_where(plan)} can't be read: {error.strerror}.") from error
    return _rendered(plan, data).encode() if is_template(path) else data


def write(plan: Plan, target: Path) -> None:
    """Write what the installer gets to the new file *target*, which only this user can read."""
    data = content(plan)
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _where(plan: Plan) -> str:
    return f"[{plan.image}] {plan.settings.answer_file_key}: {plan.settings.answer_file}"


def _rendered(plan: Plan, data: bytes) -> str:
    """Return the text made from the template *data*.

    None of Jinja2's errors is chained to ours: they quote the template.
    """
    # Sandboxed: a recipe from elsewhere is to write an answer file and nothing else.
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    try:
        source = data.decode()
        names = {node.name for node in environment.parse(source).find_all(nodes.Name)}
        template = environment.from_string(source)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{_where(plan)}, line {line} is not UTF-8.") from None
    except TemplateSyntaxError as error:
        raise ConfigurationError(
            f"{_where(plan)}, line {error.lineno}: Jinja2 doesn't understand the template there.",
            hint="The part in {{ }}, {% %} or {# #} there, or one that is not closed, is wrong.",
        ) from None
    # Only those that it asks for: an error in another is no concern of the template's.
    variables = {name: plan.variables[name] for name in sorted(names) if name in plan.variables}
    # These as they are understood, also where they are not given.
    variables |= {"arch": plan.settings.arch, "firmware": plan.settings.firmware}
    try:
        return template.render(variables, refuse=partial(_refuse, plan))
    except ConfigurationError:
        raise
    except UndefinedError as error:
        raise _unknown(plan, error, names) from None
    except Exception as error:
        # A filter raises whatever it likes.
        raise ConfigurationError(
            f"{_where(plan)}, line {_line(error)}: the template can't be rendered ({type(error).__name__}).",
            hint="A filter or an expression there doesn't take the value that it gets.",
        ) from None


def _refuse(plan: Plan, key: str, reason: str) -> NoReturn:
    """Stop a template, as what *key* says can't be had."""
    raise ConfigurationError(f"{_where(plan)}: {reason}", hint=f"Change {key} in [{plan.image}].")


def _unknown(plan: Plan, error: UndefinedError, names: set[str]) -> ConfigurationError:
    match = _UNKNOWN.fullmatch(error.message or "")
    if not match or match[1] not in names:
        return ConfigurationError(f"{_where(plan)}, line {_line(error)}: a part of a value is not there.")
    key = match[1].replace("_", "-")
    return ConfigurationError(
        f"{_where(plan)}, line {_line(error)}: there is no key '{key}'.",
        hint=f"Define {key} in [{plan.image}] or [DEFAULT], or give it a default in the template.",
    )


def _line(error: BaseException) -> int:
    """Return the line of the template where *error* was raised."""
    line, entry = 0, error.__traceback__
    while entry:
        if entry.tb_frame.f_code.co_filename == _TEMPLATE:
            line = entry.tb_lineno
        entry = entry.tb_next
    return line
