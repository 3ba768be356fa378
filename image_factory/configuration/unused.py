"""Keys and sections of the user's files that do nothing, each with what was perhaps meant."""

import contextlib
import difflib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..finishing import copying
from ..outputs import OUTPUTS
from ..sources import SOURCES
from ..sources.answers import keys_asked_for
from .files import COMMAND_KEY, Configuration, names_arch, normal_key
from .parsers import parse_copies, parse_scripts, split_list
from .settings import ELEMENT_PREFIX, Dependent, ImageSettings, TaskSettings, UploadSettings, declarations

# The keys of no source.
_DEPENDENT: Dependent = {
    "test-boot-timeout": ("test-boot = yes", lambda settings: settings.test_boot),
    "test-boot-matrix": ("test-boot = yes", lambda settings: settings.test_boot),
    "kernel-errors-allowed": ("test-boot = yes", lambda settings: settings.test_boot),
    "audit-skip": ("audit = yes", lambda settings: settings.audit),
    "seal-only": ("seal = yes", lambda settings: settings.seal),
    "seal-skip": ("seal = yes", lambda settings: settings.seal),
    "log-filename": ("log-file = yes", lambda settings: settings.log_file),
    "keyring": ("verify = auto or required", lambda settings: settings.verify != "none"),
    **{
        key: ("elements", lambda settings: bool(settings.elements))
        for key in ("elements-path", "element-environment", "element-timeout", "skip-base", "extra-packages")
    },
    "tar-exclude": (
        f"format = {' or '.join(name for name, output in OUTPUTS.items() if output.made_from == 'tree')}",
        lambda settings: any(OUTPUTS[name].made_from == "tree" for name in settings.format),
    ),
    "compression": (
        f"format = {' or '.join(name for name, output in OUTPUTS.items() if output.compresses)}",
        lambda settings: any(OUTPUTS[name].compresses for name in settings.format),
    ),
}

_TASK_KEYS = ("tasks", "tasks-after-cleaning")


def unused_keys(
    configuration: Configuration, image: str, destinations: Iterable[str], tasks: Iterable[str] = ()
) -> list[str]:
    """Return a sentence on each key of the user's files that nothing uses of *image*, *destinations* and *tasks*."""
    answers = _answers(configuration, image)
    template = _asked_for(configuration, image)
    settings = {key for key, _ in declarations(ImageSettings)} | {"based-on"}
    if "elements" in configuration.texts(image):
        settings |= {key for key in configuration.texts(image) if key.startswith(ELEMENT_PREFIX)}
    used = settings | (template or set()) | _references(configuration, image)
    sentences = []
    for section in configuration.bases(image) if template is not None else ():
        others = used
        if section != image and template and _unused(configuration, section, used):
            # The section is an image itself, and this one has another template.
            its_own = _asked_for(configuration, section)
            others = used | _references(configuration, section) | (its_own or set())
        sentences += [_unused_key(section, key, used, answers.path) for key in _unused(configuration, section, others)]
    for section in dict.fromkeys(destinations):
        known = {key for key, _ in declarations(UploadSettings)} | _references(configuration, section)
        unused = [key for key in _unused(configuration, section, known) if not COMMAND_KEY.fullmatch(key)]
        sentences += [_unused_key(section, key, known) for key in unused]
    for section in dict.fromkeys(tasks):
        known = {key for key, _ in declarations(TaskSettings)} | _references(configuration, section)
        sentences += [_unused_key(section, key, known) for key in _unused(configuration, section, known)]
    return sentences + _unused_defaults(configuration) + _unused_sections(configuration, image)


def idle_keys(configuration: Configuration, image: str, settings: ImageSettings, flags: Iterable[str]) -> list[str]:
    """Return a sentence on each key of *flags* and the user's files that does nothing beside *settings*."""
    sentences = []
    for key, (needed, is_there) in (_DEPENDENT | SOURCES[settings.source].dependent).items():
        if is_there(settings):
            continue
        written = [section for section in configuration.bases(image) if key in configuration.written.get(section, ())]
        if key in flags or written:
            where = f"--{key}" if key in flags else f"[{written[0]}] {key}"
            sentences.append(f"{where} does nothing without {needed}.")
    return sentences


class _Answers(NamedTuple):
    """The answer file of a section, if it has one, and the source that it is of."""

    source: str
    path: Path | None


def _answers(configuration: Configuration, section: str) -> _Answers:
    return _Answers(configuration.source(section), configuration.answer_file(section))


def _asked_for(configuration: Configuration, section: str) -> set[str] | None:
    """Return the keys that the templates of *section* ask for, with dashes; None for any key."""
    answers = _answers(configuration, section)
    found = [SOURCES[answers.source].template_keys(answers.path)] if answers.path else []
    found += [keys_asked_for(path) for path in _other_templates(configuration, section)]
    keys: set[str] = set()
    for each in found:
        if each is None:
            return None
        keys |= each
    return keys


def _other_templates(configuration: Configuration, section: str) -> list[Path]:
    """Return the templates that are no answer files; what is not understood names none."""
    texts = configuration.texts(section)
    with contextlib.suppress(ValueError, OSError):
        copies, scripts = parse_copies(texts.get("copy", "")), parse_scripts(texts.get("first-boot", ""))
        names = [name for key in _TASK_KEYS for name in split_list(texts.get(key, "")) if name in configuration.own]
        tasks = [parse_copies(configuration.texts(name).get("task-copy", "")) for name in names]
        return [*copying.templates(itertools.chain(copies, *tasks)), *scripts]
    return []


def variables_named(configuration: Configuration, image: str) -> list[str]:
    """Return the variables that the values of *image* name, in their order."""
    known = {key for key, _ in declarations(ImageSettings)} | {"based-on", "data-dir"}
    return [key for key in configuration.texts(image) if key in _references(configuration, image) - known]


def _unused(configuration: Configuration, section: str, used: set[str]) -> list[str]:
    """Return the keys of *section* in the user's files that are not among *used*, in their order."""
    order = configuration.defaults if section == configuration.default_section else configuration.own[section]
    return [
        key
        for key in order
        if key in configuration.written.get(section, ())
        and not (key in used or (key.partition("@")[0] in used and names_arch(key)))
    ]


def _unused_defaults(configuration: Configuration) -> list[str]:
    section = configuration.default_section
    used = {key for kind in (ImageSettings, UploadSettings, TaskSettings) for key, _ in declarations(kind)} | {
        "data-dir"
    }
    for texts in (configuration.defaults, *configuration.own.values()):
        used |= {normal_key(key or name) for text in texts.values() for name, _, key in _references_in(text)}
    unused = [key for key in _unused(configuration, section, used) if not COMMAND_KEY.fullmatch(key)]
    if not unused:
        return []
    if any("elements" in configuration.texts(name) for name in configuration.images()):
        used |= {key for key in unused if key.startswith(ELEMENT_PREFIX)}
    # Templates of all images may ask for a key of [DEFAULT].
    for name in configuration.images():
        keys = _asked_for(configuration, name)
        if keys is None:
            return []
        used |= keys
    return [_unused_key(section, key, used) for key in unused if key not in used]


def _unused_sections(configuration: Configuration, image: str) -> list[str]:
    """Return a sentence on each section that nothing uses and whose name is near to that of *image*."""
    used = {*configuration.images(), configuration.default_section}
    used |= {section for section in configuration.own if "upload-type" in configuration.texts(section)}
    for texts in configuration.own.values():
        listed = (split_list(texts.get(key, "")) for key in ("upload-destinations", *_TASK_KEYS))
        used |= {texts.get("based-on", "").strip(), *itertools.chain.from_iterable(listed)}
        used |= {section for text in texts.values() for section, colon, _ in _references_in(text) if colon}
    unused = [section for section in configuration.written if section not in used]
    return [
        f"[{section}]: nothing uses this section, as it has no {' or '.join(SOURCES)}. Did you mean [{image}]?"
        for section in difflib.get_close_matches(image, unused, n=3, cutoff=0.85)
    ]


def _references(configuration: Configuration, section: str) -> set[str]:
    """Return the keys of *section* that a ``${}`` of the configuration names."""
    merged = [*configuration.texts(section).values()]
    # A key for another architecture may be the only one that names a key.
    merged += [
        text for texts in (configuration.defaults, configuration.own.get(section, {})) for text in texts.values()
    ]
    found = {normal_key(name) for text in merged for name, colon, _ in _references_in(text) if not colon}
    everywhere = [configuration.defaults, *configuration.own.values()]
    return found | {
        normal_key(key)
        for texts in everywhere
        for text in texts.values()
        for name, _, key in _references_in(text)
        if name == section and key
    }


def _references_in(text: str) -> list[tuple[str, str, str]]:
    """Return what the ``${}`` of *text* name, parted at the colon: ``(key, "", "")`` or ``(section, ":", key)``."""
    return [name.partition(":") for name in re.findall(r"\$\{([^}]+)\}", text.replace("$$", ""))]


def _unused_key(section: str, key: str, used: Iterable[str], plain: Path | None = None) -> str:
    """Return a sentence on *key*, which nothing uses; *plain* is the answer file that is no template."""
    near = difflib.get_close_matches(key.partition("@")[0], sorted(used), n=1, cutoff=0.75)
    if near:
        return f"[{section}] {key}: nothing uses this key. Did you mean {near[0]}?"
    if plain and not plain.name.endswith(".j2"):
        return (
            f"[{section}] {key}: nothing uses this key, as {plain} is no template. "
            f"Write it into the answer file, or call that {plain.name}.j2 and use the key there."
        )
    return f"[{section}] {key}: nothing uses this key. Remove it, or name it in a value: ${{{key}}}."
