"""The command line: the only module that prints and exits."""

import argparse
import difflib
import fcntl
import io
import itertools
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from . import (
    __version__,
    changes,
    completion,
    element_tests,
    fleet,
    foreign,
    judging,
    keep,
    naming,
    online,
    pipeline,
    trial,
    workspace,
)
from .base import command, events, interrupts, log, terminal
from .base.cleanup import released
from .base.errors import BuildError, ConfigurationError, ImageFactoryError, command_line, reason_of
from .base.units import format_size
from .checks import published
from .checks.testboot import session
from .configuration import effective
from .configuration.files import Configuration, declared, normal_key
from .configuration.settings import ImageSettings, accepted_by, check_image_name
from .configuration.unused import variables_named
from .elements import breaks, explain, resolve
from .elements import image as elements_of
from .finishing import manifest
from .machines.arch import debian_arch
from .model import Artifact, Plan
from .sources import SOURCES
from .tasks.layers import UNTIL_PREFIX
from .told import estimates, record, witness


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        # What can't be written argparse would leave to Python's exit.
        if file is sys.stdout:
            _say(message)
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(
            f"{message[:1].upper()}{message[1:]}.", hint="'image-factory --help' lists the options."
        )


def _say(text: str, what: str = "The output", *, masked: bool = True) -> None:
    """Write *text*, which is *what*, to stdout now; BuildError if that can't be, OSError if its reader has gone."""
    try:
        sys.stdout.write(log.masked(text) if masked else text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritten(what, error) from error


def _unwritten(what: str, error: OSError) -> BuildError:
    """Return what says that *what* can't be written to stdout, and drop what is yet to be written there."""
    reason = "it is closed" if _is_closed(sys.stdout) else error.strerror
    log.drop_output(sys.stdout)
    return BuildError(f"{what} can't be written to stdout: {reason}.")


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _stop(text: str) -> str:
    """Return *text*, what ``--until`` may be; the plan knows its tasks."""
    if text in pipeline.UNTIL or text.startswith(UNTIL_PREFIX):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of {_listed([*pipeline.UNTIL, f'{UNTIL_PREFIX}NAME'])}")


def _given(text: str) -> tuple[str, str]:
    """Return the key and the text of *text*, what ``--set`` is given."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return normal_key(key.strip()), value


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with a flag for each setting that declares one."""
    parser = _Parser(prog="image-factory", description="Build golden Linux images.")
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="images to build: sections of the configuration (default: the environment's IMAGE)",
    )
    parser.add_argument("--version", action="version", version=f"image-factory {__version__}")
    for key, declaration in declared(ImageSettings):
        if not declaration.flags:
            continue
        default = declaration.default_text()
        shown = f" (default: {default})" if default not in (None, "") else ""
        name = key.replace("-", "_")
        if declaration.metavar is None:
            parser.add_argument(
                *declaration.flags,
                dest=name,
                action=argparse.BooleanOptionalAction,
                default=None,
                help=declaration.help + shown,
            )
        else:
            parser.add_argument(
                *declaration.flags, dest=name, metavar=declaration.metavar, help=declaration.help + shown
            )
    parser.add_argument(
        "--set",
        action="append",
        type=_given,
        default=[],
        metavar="KEY=VALUE",
        help="have KEY be VALUE, as if it stood so in the section of the image; may be given more than once",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="list the configured images, one a line, each with distribution, release, architecture and firmware",
    )
    parser.add_argument(
        "--list-json", action="store_true", help="list the configured images with what is known of them, in JSON"
    )
    parser.add_argument(
        "--list-elements",
        nargs="?",
        const="",
        metavar="NAME",
        help="list the elements that are found, each with its place and the first sentence of its README, "
        "or show the README of element NAME, and stop",
    )
    parser.add_argument(
        "--test-element",
        metavar="NAME",
        help="build the tests that element NAME has in its directory test-elements, say what comes of each, and stop; "
        "NAME/TEST is one of them",
    )
    parser.add_argument(
        "--explain-elements",
        action="store_true",
        help="print the elements of the image, why each is one, and all their scripts in their order, and stop",
    )
    parser.add_argument(
        "--verify",
        metavar="DIR",
        help="say of each file in DIR whether it is what was published there: signatures, checksums, manifests, "
        "provenance; and stop",
    )
    parser.add_argument("--check", action="store_true", help="check all that can be known before a build, and stop")
    parser.add_argument(
        "--online",
        action="store_true",
        help="with --check: ask the servers of downloads, of the guest's mirrors and of uploads whether they serve",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="--check, then print each step with its commands, and stop"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where the last build failed, without a new installation"
    )
    parser.add_argument(
        "--until",
        type=_stop,
        metavar="STEP",
        help=f"stop after {_listed([*pipeline.UNTIL, f'{UNTIL_PREFIX}NAME'])}, to be resumed",
    )
    parser.add_argument(
        "--if-changed",
        action="store_true",
        help="build only if what the image is made of has changed since the last good build, or its packages have",
    )
    parser.add_argument(
        "--shell-on-error", action="store_true", help="when a step fails, open a shell in the mounted disk"
    )
    parser.add_argument(
        "--show-answers",
        action="store_true",
        help="print the answer file as the installer gets it, secrets too, and stop",
    )
    parser.add_argument(
        "--keys",
        action="store_true",
        help="list the keys of the image with what they are, what they may be and their values, secrets too, and stop",
    )
    parser.add_argument(
        "--show-config",
        action="store_true",
        help="print what is in effect for the image, secrets too: each key, its value, and the file and line that "
        "set it, and stop; with --json FILE as JSON",
    )
    parser.add_argument(
        "--test-boot",
        metavar="FILE",
        help="boot FILE, any disk image or tar, on overlays, say what comes of each check, and stop; status 1 if one "
        "has failed",
    )
    parser.add_argument(
        "--run",
        metavar="IMAGE|FILE",
        help="boot the newest build of IMAGE, or the image FILE, on an overlay, open a shell in it by ssh, on the "
        "terminal or for commands from stdin, and throw all of that away when it ends",
    )
    parser.add_argument(
        "--console", action="store_true", help="with --run: give its serial console, in the place of a shell"
    )
    parser.add_argument(
        "--keep-overlay",
        type=Path,
        metavar="FILE",
        help="with --run: make the overlay as FILE, a qcow2, and leave it there",
    )
    parser.add_argument(
        "--audit",
        metavar="FILE",
        help="look whether FILE, any disk image or tar, has what must not be cloned, and stop; status 1 if it has",
    )
    parser.add_argument(
        "--manifest",
        metavar="FILE",
        help="write what is in FILE, any disk image or tar, to FILE.manifest.json, and stop",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar="FILE",
        help="say which packages two disk images, tars or manifests do not have in common; status 1 if any",
    )
    parser.add_argument("--seal", metavar="FILE", help="make a sealed copy of FILE, any disk image")
    parser.add_argument("--cleanup", action="store_true", help="remove what killed builds of yours have left, and stop")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write a record of the build for machines to FILE, of several to IMAGE.json in the directory FILE; "
        "-: to stdout, no summary then",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="show warnings and errors only; the log file has all")
    group.add_argument("-v", "--verbose", action="store_true", help="show all that is logged, and the guest's console")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return parser


def _flag_texts(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the settings that were given as flags, as text that their parsers read."""
    texts = {}
    for key, declaration in declared(ImageSettings):
        value = getattr(arguments, key.replace("-", "_"), None) if declaration.flags else None
        if isinstance(value, bool):
            texts[key] = "yes" if value else "no"
        elif value is not None:
            texts[key] = value
    return texts


def _configuration(arguments: argparse.Namespace, images: Sequence[str]) -> Configuration:
    """Return the configuration, in which *images* have what ``--set`` gives."""
    return Configuration(os.environ, {image: dict(arguments.set) for image in images})


def _print_steps(plan: Plan, arguments: argparse.Namespace) -> None:
    for name, commands in pipeline.described(plan, resume=arguments.resume, until=arguments.until):
        _say(f"# {name}\n")
        for argv in commands:
            _say(f"#   {' '.join(argv[1:])}\n" if argv[0] == "#" else f"{command_line(argv)}\n")


def _show_answers(plan: Plan) -> None:
    # Bytes, as it need not be UTF-8.
    data = SOURCES[plan.settings.source].answers_of(plan)
    if data is None:
        raise ConfigurationError(f"[{plan.image}] has no answer file.")
    try:
        sys.stdout.buffer.write(data)
    except OSError as error:
        raise _unwritten("The answer file", error) from error
    _say("", "The answer file")


def keys_listing(configuration: Configuration, image: str, flags: Mapping[str, str]) -> str:
    """Return the keys of *image* with what they are, what they may be and their values, as a configuration file."""
    configuration.check_image(image)
    variables = configuration.variables(image, flags)
    answer_file = configuration.answer_file(image)
    source = SOURCES[configuration.source(image)]
    of_template = source.declared_keys(answer_file, configuration.arch(image)) if answer_file else {}
    parts = [f"[{image}]"]
    if of_template:
        parts.append(f"# Keys of its answer file {answer_file}:")
    elif answer_file:
        parts.append(f"# {answer_file} is no template that declares keys.")
    for key in of_template.values():
        parts.append(_entry(variables, key.name, key.help, key.accepted, key.default))
    parts.append("# Variables of its values:")
    named = [key for key in variables_named(configuration, image) if key not in of_template]
    parts.append("\n".join(_line(variables, key) for key in named) or "# none")
    parts.append("# Settings of image-factory:")
    for name, declaration in declared(ImageSettings):
        default = declaration.default_text() or ""
        parts.append(_entry(variables, name, declaration.help, accepted_by(declaration), default))
    return "\n\n".join(parts) + "\n"


def _entry(variables: Mapping[str, str], key: str, what: str, accepted: str, default: str) -> str:
    shown = f"; default: {default}" if default else ""
    return f"# {what}\n# Accepted: {accepted}{shown}\n{_line(variables, key, default)}"


def _line(variables: Mapping[str, str], key: str, default: str = "") -> str:
    """Return the line of *key* in a configuration file, behind a # if it is not set."""
    name = key.replace("-", "_")
    try:
        text = variables.get(name, default).strip()
    except ConfigurationError as error:
        return f"# {key}: {_one_line(error.message)}"
    written = "\n    ".join(log.printable(line.strip()) for line in text.replace("$", "$$").splitlines())
    return f"{'' if name in variables or default else '# '}{key} = {written}".rstrip()


def elements_listing(configuration: Configuration, name: str) -> str:
    """Return the elements that images may have, or what there is to read of the one that is *name*."""
    path = configuration.setting(configuration.default_section, "elements-path")
    known = resolve.find(resolve.search_path(path, os.environ))
    if name:
        return explain.readme(resolve.known_as(name, known, "asked for"))
    if not known:
        raise ConfigurationError(
            "There are no elements.",
            hint="Install diskimage-builder, or name directories of elements in elements-path of [DEFAULT].",
        )
    return explain.listing(known)


def elements_explained(configuration: Configuration, image: str, flags: Mapping[str, str]) -> str:
    """Return the elements of *image* with why each is one, and their scripts in the order in which they run."""
    settings = configuration.image(image, flags)
    variables = configuration.variables(image, flags)
    architecture = debian_arch(variables.get("arch", ""), settings.arch)
    found = elements_of.read(image, settings, variables, architecture, os.environ)
    return explain.explanation(found)


def listing(configuration: Configuration) -> str:
    """Return a line for each configured image: its name first, then what is known of it, in columns."""
    rows = [
        [_one_line(text) or "-" for text in (name, *configuration.summary(name))] for name in configuration.images()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def summary(
    artifacts: Sequence[Artifact],
    times: Sequence[events.StepEnded],
    seconds: float,
    difference: Mapping[str, Any] | None = None,
) -> str:
    """Return what was built, what has changed since the build before and how long it took, for people."""
    lines = []
    for artifact in artifacts:
        lines += [
            f"{artifact.path}",
            f"  virtual size  {format_size(artifact.virtual_size)}",
            f"  size on disk  {_size_on_disk(artifact)}",
            f"  SHA-256       {artifact.sha256}",
        ]
    lines += map(_one_line, manifest.difference_lines(difference))
    lines.append("Seconds per step:")
    lines += [f"{step.seconds:8.1f}  {step.name}" for step in times]
    lines.append(f"{seconds:8.1f}  in all")
    return "\n".join(lines)


def _size_on_disk(artifact: Artifact) -> str:
    try:
        return format_size(artifact.path.stat().st_blocks * 512)
    except OSError:
        # The user's own commands may take it elsewhere.
        return "moved away by a command"


@contextmanager
def _recorded(arguments: argparse.Namespace, image: str) -> Iterator[record.Record]:
    """Give the record of a build of *image*, and write it to the file that *arguments* name on the way out."""
    kept = record.Record(image, resumed=arguments.resume, until=arguments.until)
    path = None if arguments.json == "-" else record.prepared(arguments.json)
    if path is None and _is_closed(sys.stdout):
        raise ConfigurationError("--json -: stdout is closed.")

    def write() -> None:
        if path is None:
            _say(kept.text(), "The build record")
        else:
            record.write(path, kept.text())

    with released(write), kept.observing():
        try:
            yield kept
        except BaseException as error:
            kept.fail(error, *_explain(error))
            raise


def _has_display(stream: TextIO | None) -> bool:
    """Whether *stream* is a terminal on which lines can be written over."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


@contextmanager
def _log_file(plan: Plan, *, append: bool) -> Iterator[None]:
    """Log inside also into the file that *plan* has for that, if it has one."""
    with ExitStack() as stack:
        if plan.log_path is not None:
            try:
                workspace.make_output_dir(plan)
                plan.log_path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(log.also_to_file(plan.log_path, append=append))
            except OSError as error:
                raise ConfigurationError(f"Can't write the log file {plan.log_path}: {error.strerror}.") from error
        yield


def _build(plan: Plan, arguments: argparse.Namespace, seen: witness.Witness, *, live: bool) -> None:
    # rich takes longer to import than --list does all its work.
    from .told import display

    with ExitStack() as stack:
        times, differences = events.StepTimes(), events.Differences()
        timeline = estimates.Timeline(plan)
        stack.enter_context(
            events.observed(times, differences, timeline, display.LogLines(timeline, console=arguments.verbose))
        )
        stack.enter_context(_log_file(plan, append=arguments.resume))
        if live:
            stack.enter_context(display.live(plan.image, timeline))
        try:
            artifacts = pipeline.build_image(
                plan,
                resume=arguments.resume,
                until=arguments.until,
                shell_on_error=arguments.shell_on_error,
                witness=seen,
            )
        except Exception as error:
            message, hint, _ = _explain(error)
            for text in filter(None, (message, hint)):
                log.to_files(logging.ERROR, text)
            raise
        if not arguments.until and not arguments.resume:
            timeline.keep()
        text = summary(artifacts, times.ended, timeline.seconds, differences.found)
        if arguments.until:
            text += f"\nStopped after {arguments.until}. 'image-factory --resume {plan.image}' goes on."
        log.to_files(logging.INFO, text)
    if arguments.json != "-" and not _is_closed(sys.stdout):
        _say(f"{text}\n", "The summary")


def _is_mode(arguments: argparse.Namespace, mode: str) -> bool:
    return getattr(arguments, mode) not in (None, False)


def _unknown_options(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> ConfigurationError:
    """Return what says that there are no options *unknown*, and which are near to them."""
    known = re.findall(r"--[a-z][a-z-]*", parser.format_help())
    near = [difflib.get_close_matches(each.partition("=")[0], known, n=1, cutoff=0.7) for each in unknown]
    meant = " and ".join(dict.fromkeys(itertools.chain(*near)))
    return ConfigurationError(
        f"There is no option {' or '.join(unknown)}.",
        hint=f"Did you mean {meant}?" if meant else "'image-factory --help' lists the options.",
    )


def _run(argv: Sequence[str]) -> None:
    parser = make_parser()
    arguments, others = parser.parse_known_args(argv)
    # argparse knows no images after a flag when there are some before it.
    unknown = [other for other in others if other.startswith("-")]
    if unknown:
        raise _unknown_options(parser, unknown)
    images = [*arguments.images, *others] or [os.environ.get("IMAGE") or ""]
    modes = (
        "list", "list_json", "list_elements", "test_element", "explain_elements", "verify", "check", "dry_run",
        "show_answers", "keys", "show_config", "cleanup",
    )  # fmt: skip
    judged = next((mode for mode in _JUDGED if _is_mode(arguments, mode)), None)
    only_checks = any(_is_mode(arguments, mode) for mode in modes)
    for mode in (*modes, "run"):
        if arguments.json is not None and _is_mode(arguments, mode) and mode != "show_config":
            raise ConfigurationError(f"--json is the record of a build, --{mode.replace('_', '-')} makes none.")
    if arguments.if_changed and (only_checks or arguments.resume or arguments.until):
        raise ConfigurationError("--if-changed is for whole builds.", hint="Leave it out, or the other option.")
    # A shell and a display would write over each other, and so would several builds.
    has_shell = arguments.shell_on_error or bool(os.environ.get(breaks.VARIABLE))
    live = not (arguments.quiet or only_checks or has_shell or images[1:]) and _has_display(sys.stderr)
    # The display stands for what is logged below a warning.
    is_short = arguments.quiet or ((live or arguments.verify is not None) and not arguments.verbose)
    log.set_up(logging.WARNING if is_short else logging.INFO)
    if arguments.online and not arguments.check:
        raise ConfigurationError("--online goes with --check.")
    for mode in ("list", "list_json", "list_elements", "test_element", "cleanup"):
        if arguments.set and _is_mode(arguments, mode):
            raise ConfigurationError(f"--set is for images, --{mode.replace('_', '-')} knows none.")
    for option in ("console", "keep_overlay"):
        if _is_mode(arguments, option) and arguments.run is None:
            raise ConfigurationError(f"--{option.replace('_', '-')} goes with --run.")
    if judged:
        _check_alone(arguments, judged, modes)
        with interrupts.handled(), command.reaping():
            _judge(arguments, judged, live=live)
        return
    if arguments.cleanup:
        with interrupts.handled(), command.reaping():
            _clean_up(Path(arguments.output_dir or ".").absolute())
        return
    if arguments.run is not None:
        _check_alone(arguments, "run", modes)
        with interrupts.handled(), command.reaping():
            _try_out(arguments, live=live)
        return
    if arguments.list:
        _say(listing(Configuration(os.environ)), "The list")
        return
    if arguments.list_json:
        _say(f"{json.dumps(Configuration(os.environ).descriptions(), indent=2)}\n", "The list")
        return
    if arguments.list_elements is not None:
        _say(elements_listing(Configuration(os.environ), arguments.list_elements), "The list")
        return
    if arguments.verify is not None:
        _verify(arguments)
        return
    if arguments.test_element is not None:
        _test_element(arguments)
        return
    if arguments.explain_elements and any(images) and not images[1:]:
        explained = elements_explained(_configuration(arguments, images), images[0], _flag_texts(arguments))
        _say(explained, "The explanation")
        return
    if arguments.keys and any(images) and not images[1:]:
        listed = keys_listing(_configuration(arguments, images), images[0], _flag_texts(arguments))
        # What is listed is a configuration, so whole.
        _say(listed, "The list", masked=False)
        return
    if arguments.show_config and any(images) and not images[1:]:
        _show_config(images[0], arguments)
        return
    if not any(images):
        raise ConfigurationError("No image is named.", hint="'image-factory --list' lists the configured images.")
    if images[1:]:
        _check_several(arguments, images)
    if arguments.shell_on_error and not terminal.is_attended():
        raise ConfigurationError("--shell-on-error needs a terminal.", hint="Leave it out in jobs that no one watches.")
    with interrupts.handled(), command.reaping():
        if images[1:]:
            _run_several(arguments, images)
        else:
            _run_one(arguments, images[0], live=live)


def _show_config(image: str, arguments: argparse.Namespace) -> None:
    """Print what is in effect for *image*, or write it to the file of ``--json``."""
    found = effective.effective(_configuration(arguments, [image]), image, _flag_texts(arguments))
    if arguments.json is None:
        # What is listed is a configuration, so whole.
        _say(effective.as_text(image, found), "The list", masked=False)
        return
    text = f"{json.dumps(effective.as_data(found), indent=2)}\n"
    if arguments.json == "-":
        _say(text, "The list", masked=False)
    else:
        record.write(record.prepared(arguments.json), text, "The list")


def _verify(arguments: argparse.Namespace) -> None:
    """Say what is good of what was published in a directory; BuildError if something is not."""
    if arguments.images:
        raise ConfigurationError("--verify is for a directory, not for images.")
    given = dict(arguments.set)
    others = sorted({*given} - {"keyring"})
    if others:
        raise ConfigurationError(f"--verify has no use for {others[0]}.", hint="It knows --set keyring=FILE.")
    keyring = Path(given["keyring"]).expanduser() if given else None
    with interrupts.handled(), command.reaping():
        published.verify(Path(arguments.verify), keyring, lambda line: _say(f"{line}\n"))


def _test_element(arguments: argparse.Namespace) -> None:
    """Run the tests of an element, and say what comes of each; BuildError if one fails."""
    if arguments.images:
        raise ConfigurationError("--test-element is for elements, not for images.")
    with interrupts.handled(), command.reaping():
        element_tests.run(
            Configuration(os.environ), arguments.test_element, _flag_texts(arguments), lambda line: _say(f"{line}\n")
        )


def _try_out(arguments: argparse.Namespace, *, live: bool) -> None:
    """Boot the image that ``--run`` names, and have the user in it."""
    # rich takes longer to import than --list does all its work.
    from .told import display

    has_terminal = os.isatty(0) and os.isatty(1)
    if arguments.console and not has_terminal:
        raise ConfigurationError(
            "--console needs a terminal.", hint="Without it there are shells: they take commands from stdin, too."
        )
    if arguments.keep_overlay:
        session.check(arguments.keep_overlay)
    plan, path = trial.named(arguments.run, os.environ, dict(arguments.set), _flag_texts(arguments))
    timeline = estimates.Timeline(plan)
    with ExitStack() as stack:
        with (
            events.observed(timeline, display.LogLines(timeline, console=arguments.verbose)),
            display.live(path.name, timeline) if live else nullcontext(),
        ):
            build, artifact = stack.enter_context(trial.opened(plan, path))
            found = stack.enter_context(
                session.booted(build, artifact, console=arguments.console, kept=arguments.keep_overlay)
            )
        if arguments.console:
            _say(f"This is the serial console of {path.name}. Ctrl-] ends it, and the machine.\n")
            found.console()
            return
        if has_terminal:
            _say(f"This is a shell in {path.name}, and sudo gives root's. The machine ends with it.\n")
        found.shell()


# Of files that others have made.
_JUDGED = ("audit", "test_boot", "manifest", "compare", "seal")


def _check_alone(arguments: argparse.Namespace, judged: str, modes: Sequence[str]) -> None:
    """Raise ConfigurationError if there is something in *arguments* that makes no sense with the option *judged*."""
    builds = ("check", "dry_run") if judged == "seal" else ()
    others = (*modes, *_JUDGED, "run", "resume", "until", "if_changed", "shell_on_error")
    option = f"--{judged.replace('_', '-')}"
    for mode in others:
        if mode not in (judged, *builds) and _is_mode(arguments, mode):
            raise ConfigurationError(f"--{mode.replace('_', '-')} and {option} do not go together.")
    if arguments.images:
        what = "names the image itself" if judged == "run" else "is for files, not for images"
        raise ConfigurationError(f"{option} {what}.")


def _judge(arguments: argparse.Namespace, mode: str, *, live: bool) -> None:
    """Do what the option *mode* says with a file that others have made, or with two."""
    named = getattr(arguments, mode)
    paths = [Path(each) for each in (named if isinstance(named, list) else [named])]
    given, flags = dict(arguments.set), _flag_texts(arguments)
    if mode == "seal":
        # What is unpacked of the file is there until the build has ended.
        _run_one(
            arguments,
            foreign.stem_of(paths[0]),
            live=live,
            make=lambda stack: stack.enter_context(judging.sealing(paths[0], given, flags)),
        )
        return

    lines: list[str] = []

    def say() -> None:
        if lines and arguments.json != "-" and not _is_closed(sys.stdout):
            _say("".join(f"{log.printable(line)}\n" for line in lines), "What was found")

    settings = {"audit": {"audit": "yes"}, "test_boot": trial.WANTED}.get(mode, {})
    with released(say), ExitStack() as stack:
        name = foreign.name_of(paths[-1])
        kept = stack.enter_context(_recorded(arguments, name)) if arguments.json is not None else None
        plans = [foreign.plan_of(f"--{mode.replace('_', '-')}", path, settings, given, flags) for path in paths]
        if kept:
            kept.plan_made(plans[-1])
        stack.enter_context(_log_file(plans[-1], append=False))
        # rich takes longer to import than --list does all its work.
        from .told import display

        timeline = estimates.Timeline(plans[-1])
        stack.enter_context(events.observed(timeline, display.LogLines(timeline, console=arguments.verbose)))
        if live:
            stack.enter_context(display.live(name, timeline))
        if mode == "audit":
            judging.audit_image(plans[0], paths[0], lines.append)
        elif mode == "test_boot":
            trial.test_boot(plans[0], paths[0], lines.append)
        elif mode == "manifest":
            judging.describe_image(plans[0], paths[0], lines.append)
        else:
            judging.compare_images(plans, paths, lines.append)


def _clean_up(output_dir: Path) -> None:
    """Remove what killed builds have left, and say what it was; all of it, even if that can't be said."""
    failure: Exception | None = None
    for removed in workspace.remove_left(output_dir):
        try:
            _say(f"{removed}\n", "What was removed")
        except (OSError, BuildError) as error:
            log.drop_output(sys.stdout)
            failure = failure or error
    if failure:
        raise failure


def _run_one(
    arguments: argparse.Namespace, image: str, *, live: bool, make: Callable[[ExitStack], Plan] | None = None
) -> None:
    """Do what *arguments* say with *image*, of which *make* gives the plan, else the configuration."""
    resume = arguments.resume
    with ExitStack() as stack:
        # The build record is one of the files.
        made = stack.enter_context(keep.noting())
        seen = witness.Witness()
        stack.enter_context(seen.observing())
        kept = stack.enter_context(_recorded(arguments, image)) if arguments.json is not None else None
        warnings: list[str] = []
        stack.enter_context(log.noting_warnings(warnings))
        if make:
            plan = make(stack)
        else:
            plan = pipeline.make_plan(_configuration(arguments, [image]), image, _flag_texts(arguments), resume=resume)
        if kept:
            kept.plan_made(plan)
        if arguments.show_answers:
            _show_answers(plan)
            return
        plan = pipeline.check_plan(plan, resume=resume, until=arguments.until, builds=not arguments.if_changed)
        if kept:
            kept.plan_checked(plan, pipeline.programs(plan))
        if arguments.dry_run:
            _print_steps(plan, arguments)
        elif arguments.check:
            SOURCES[plan.settings.source].measure(plan)
            if arguments.online:
                online.check(plan)
            _say(f"{_verdict(plan.image, warnings)}\n")
        elif not arguments.if_changed or _has_changed(plan, arguments):
            record_path = None if arguments.json in (None, "-") else Path(arguments.json).absolute()
            made.begin(plan, record_path, resume=resume, wanted=arguments.if_changed)
            settings = changes.settings_of(plan) if made.notes else {}
            _build(plan, arguments, seen, live=live)
            if made.notes and not arguments.until:
                made.origins = changes.origins(plan, settings, seen)


def _has_changed(plan: Plan, arguments: argparse.Namespace) -> bool:
    """Return whether *plan* is to be built, as something has changed since the last build, and say what in a line."""
    found = changes.sought(plan)
    events.tell(found)
    if found.unknown:
        line = f"{plan.image} is built: {'; '.join(found.unknown)}."
    elif found.changed:
        line = f"{plan.image} is built, as this has changed since {found.previous}: {', '.join(found.changed)}."
    else:
        line = f"{plan.image} is not built: nothing has changed since {found.previous}."
    if arguments.json != "-" and not _is_closed(sys.stdout):
        _say(f"{_one_line(line)}\n", "What has changed")
    if found.builds:
        naming.check(plan)
    return found.builds


def _verdict(image: str, warnings: Sequence[str]) -> str:
    """Return the last line of --check."""
    count = {0: "", 1: ", with a warning"}.get(len(warnings), f", with {len(warnings)} warnings")
    return f"{image} can be built{count}."


def _check_several(arguments: argparse.Namespace, images: Sequence[str]) -> None:
    """Raise ConfigurationError if *arguments* make no sense for several *images*."""
    for image in images:
        # They are names of files, too.
        check_image_name(image)
        if images.count(image) > 1:
            raise ConfigurationError(f"{image} is named twice.")
    for mode in ("show_answers", "keys", "show_config", "explain_elements", "shell_on_error"):
        if getattr(arguments, mode):
            raise ConfigurationError(f"--{mode.replace('_', '-')} is for one image.")
    if arguments.json is not None and not Path(arguments.json).is_dir():
        raise ConfigurationError(
            f"--json: with several images it names a directory, which {arguments.json} is not.",
            hint="The record of each is IMAGE.json there.",
        )


def _run_several(arguments: argparse.Namespace, images: Sequence[str]) -> None:
    only_checks = arguments.check or arguments.dry_run
    if arguments.json is not None:
        for image in images:
            record.prepared(_record_path(arguments, image))
    # Each build checks once more what it needs, and logs that: much may change until it begins.
    with nullcontext() if only_checks else log.only(logging.ERROR):
        plans, warnings = _checked_plans(arguments, images)
    if not only_checks:
        _build_several(arguments, images)
        return
    if arguments.check:
        # One image for each source will do, as the machine is the same and measuring takes a while.
        for plan in {plan.settings.source: plan for plan in reversed(plans)}.values():
            with log.noting_warnings(warnings[plan.image]):
                SOURCES[plan.settings.source].measure(plan)
    if arguments.online:
        _check_online(plans)
    for plan in plans:
        if arguments.dry_run:
            _say(f"# {plan.image}:\n")
            _print_steps(plan, arguments)
        else:
            _say(f"{_verdict(plan.image, warnings[plan.image])}\n")


def _check_online(plans: Sequence[Plan]) -> None:
    """Raise ConfigurationError if servers of one of *plans* don't serve, when all are asked."""
    failures = []
    for plan in plans:
        try:
            online.check(plan)
        except ConfigurationError as error:
            failures.append(error.message)
    if failures:
        raise ConfigurationError(" ".join(failures))


def _checked_plans(arguments: argparse.Namespace, images: Sequence[str]) -> tuple[list[Plan], dict[str, list[str]]]:
    """Return the plans of *images*, and what each is warned of; ConfigurationError says what is wrong with any."""
    warnings: dict[str, list[str]] = {image: [] for image in images}
    configuration = _configuration(arguments, images)
    plans: list[Plan] = []
    errors: dict[str, list[str]] = {}
    hints: dict[str, None] = {}
    for image in images:
        try:
            with log.noting_warnings(warnings[image]):
                plan = pipeline.make_plan(configuration, image, _flag_texts(arguments), resume=arguments.resume)
                plan = pipeline.check_plan(
                    plan, resume=arguments.resume, until=arguments.until, builds=not arguments.if_changed
                )
            for other in plans:
                if plan.log_path is not None and plan.log_path == other.log_path:
                    raise ConfigurationError(
                        f"It would log into {plan.log_path}, as {other.image} does.",
                        hint="Leave log-filename out: each image has a log file of its own then.",
                    )
            naming.check_others(plan, plans)
            plans.append(plan)
        except ConfigurationError as error:
            errors.setdefault(error.message, []).append(image)
            hints |= {error.hint: None} if error.hint else {}
    if errors:
        raise ConfigurationError(
            " ".join(f"{', '.join(which)}: {message}" for message, which in errors.items()),
            hint=" ".join(f"{hint.removesuffix('.')}." for hint in hints) or None,
        )
    return plans, warnings


def _record_path(arguments: argparse.Namespace, image: str) -> str:
    return os.path.join(arguments.json, f"{image}.json")


def _build_several(arguments: argparse.Namespace, images: Sequence[str]) -> None:
    start = time.monotonic()
    builds = fleet.Fleet(images, partial(_build_beside, arguments), _show_line)

    def tell() -> None:
        if not _is_closed(sys.stdout):
            _say(f"{fleet_summary(list(builds.outcomes.values()), time.monotonic() - start)}\n", "The summary")

    with released(tell):
        builds.run()
    failed = [(outcome.image, outcome.failure) for outcome in builds.outcomes.values() if outcome.failure]
    if failed:
        reasons = "; ".join(f"{image}: {failure.message.removesuffix('.')}" for image, failure in failed)
        raise BuildError(f"{len(failed)} of {len(images)} images failed: {reasons}.")


def _build_beside(arguments: argparse.Namespace, image: str, send: fleet.Send) -> None:
    """Build *image* in a process of its own, which tells by *send* how it goes on."""
    teller = fleet.Teller(send)
    own = argparse.Namespace(**vars(arguments))
    if own.json is not None:
        own.json = _record_path(arguments, image)
    with events.observed(teller):
        status = _status_of(partial(_run_one, own, image, live=False), debug=own.debug, told=teller.failed)
    if status == 0:
        teller.done()


def _show_line(image: str, on_stderr: bool, line: str) -> None:
    stream = sys.stderr if on_stderr else sys.stdout
    try:
        print(f"{image}: {line}", file=stream, flush=True)
    except OSError as error:
        # A reader that has gone is no reason to end the builds.
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            log.logger.warning("%s", _unwritten("What the builds print", error).message)
        log.drop_output(stream)


def fleet_summary(outcomes: Sequence[fleet.Outcome], seconds: float) -> str:
    """Return what has come of each image, for people."""
    lines = ["Images:"]
    for outcome in outcomes:
        if outcome.seconds is None:
            lines.append(f"{'':8}  {outcome.image}: not begun")
            continue
        failure = outcome.failure
        done = "not built, as nothing has changed" if outcome.is_unchanged else "done"
        how = f"failed: {_one_line(failure.message)}" if failure else done
        lines.append(f"{outcome.seconds:8.1f}  {outcome.image}: {how}")
        if failure and failure.hint:
            lines.append(f"{'':8}  {_one_line(failure.hint)}")
    lines.append(f"{seconds:8.1f}  in all")
    return "\n".join(lines)


def _explain(error: BaseException) -> tuple[str, str | None, int]:
    """Return what *error* says to the user, the next move, and the exit status."""
    if isinstance(error, ImageFactoryError):
        return error.message, error.hint, error.exit_status
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", None, 130
    if isinstance(error, OSError):
        # The disk is full, a directory has gone, ...: no fault of the program's.
        return f"{reason_of(error)}.", None, 1
    return f"Internal error: {type(error).__name__}: {error}", "Run it again with --debug, and report what it shows.", 1


def _one_line(text: str) -> str:
    return log.printable(" ".join(text.splitlines()))


def _set_up_stdout() -> None:
    """Make print work whatever it is given: a path may have bytes that are no text, and stdout may be closed."""
    if sys.stdout is None:
        # What is written there fails, but a file that is opened later is not taken for stdout.
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _is_closed(stream: TextIO) -> bool:
    """Return whether *stream* was closed when the program started."""
    try:
        return fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:
        # Not a file at all, as in a test.
        return False


def _flush_stdout() -> None:
    """Write what print has kept, or drop it where that can't be: Python would complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        log.drop_output(sys.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run image-factory with *argv*; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if completion.VARIABLE in os.environ:
        completion.complete(make_parser())
        # The shell gave no arguments, and IMAGE in the environment would be built.
        return 1
    _set_up_stdout()
    # Whatever the user's own files may be for, no one else is to change an image, its checksum or what it is made of.
    os.umask(os.umask(0o077) | 0o022)
    return _status_of(partial(_run, argv), debug="--debug" in argv)


def _status_of(
    work: Callable[[], int | None], *, debug: bool, told: Callable[[str, str | None], None] | None = None
) -> int:
    """Do *work*, say what goes wrong, and give that to *told*; return the exit status."""
    try:
        work()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader of our output has gone.
        _flush_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    message, hint, status = _explain(failure)
    if told:
        told(message, hint)
    _flush_stdout()
    try:
        if debug:
            # It has what programs have printed.
            print(log.printable("".join(traceback.format_exception(failure))), end="", file=sys.stderr)
        print(f"image-factory: error: {_one_line(message)}", file=sys.stderr)
        if hint:
            print(f"image-factory: hint: {_one_line(hint)}", file=sys.stderr)
    except OSError:
        log.drop_output(sys.stderr)
    return status
