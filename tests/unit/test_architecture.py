"""The layout of the program: imports point downwards only, and some things have one place."""

import ast
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "image_factory"
HELPER = REPOSITORY / "image-factory-sudo-helper"

# From top to bottom: a package, and its modules.  A module may import those after it.
LAYERS = [
    ("", "cli completion online element_tests trial judging foreign pipeline fleet workspace publish changes keep"),
    ("configuration", "effective unused files"),
    ("tasks", "guest"),
    ("checks.testboot", "session __init__ laying login guest matrix monitor machine ramdisk report reporting"),
    ("checks", "published audit keys search leftovers"),
    ("", "checkpoint"),
    ("finishing", "sign provenance manifest listing shrink settling clean checksum firstboot fitting importing"),
    ("finishing.seal", "__init__ captured operations traces identity media apt actions"),
    ("", "naming"),
    ("outputs", "targets __init__ packed qemu trees incus netboot oci raw kind"),
    ("elements", "explain"),
    ("sources", "__init__ elements"),
    ("sources.capture", "__init__ generic hosts streams"),
    ("sources.image", "__init__ growing unpacking opening formats"),
    ("sources.bootstrap", "archive __init__ failures packages trees recipe"),
    ("sources", "tree_tasks"),
    ("sources.installer", "__init__ answercheck machinecheck virt_install watch delivery installers"),
    ("elements", "on_disk applying engine breaks layout image contract hooks system resolve scripts"),
    ("uploads", "index streams __init__ rsync drp http rclone oci command curl credentials tries"),
    ("tasks", "offline"),
    ("finishing", "copying"),
    ("sources", "kind answers forms"),
    ("tasks", "namespace running layers playbooks copies __init__"),
    ("told", "witness record display estimates junit"),
    ("", "parts"),
    ("disks", "bounds standing attaching making filesystems notation grub layouts reproducible"),
    (
        "system",
        "mounts fuse loop appliance rehearsal assembly inventory kernels tree rpmdb partitions fstab privileged "
        "registrations initramfs",
    ),
    ("downloads", "verify fetch"),
    ("inside", "namespaces"),
    ("", "model"),
    # What the parts of a build need of the configuration, and no more: the files are above the tables of kinds.
    ("configuration", "settings parsers"),
    ("machines", "kvm libvirt firmware turns console arch devices"),
    ("base", "openpgp scratch"),
    ("base.command", "__init__ apart conversations pipelines programs children output installed"),
    ("base", "files cleanup locks interrupts log events units errors trust fuse memory terminal"),
    # The version.
    ("", "__init__"),
]


def module_name(path: Path) -> str:
    """Return the name of the module below the package: ``sources.installer``, ``""`` for the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def nodes(name: str) -> list[ast.AST]:
    """Return all that module *name* consists of."""
    return [*ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"), str(MODULES[name])))]


@functools.cache
def imports(name: str) -> list[str]:
    """Return the absolute names of what module *name* imports, wherever it does."""
    return [*_imports(name)]


def _imports(name: str) -> Iterator[str]:
    path = MODULES[name]
    package = ["image_factory", *(name.split(".") if name else [])]
    if path.name != "__init__.py":
        package.pop()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # A module of a package, or a name in a module.
                inner = f"{source}.{alias.name}".removeprefix("image_factory.")
                yield f"image_factory.{inner}" if inner in MODULES else source


def own_imports(name: str) -> set[str]:
    """Return the modules of the package that *name* imports."""
    names = {found for found in imports(name) if found.split(".")[0] == "image_factory"}
    return {found.removeprefix("image_factory").removeprefix(".") for found in names}


LISTED = [
    f"{package}.{name}".removesuffix("__init__").strip(".") for package, names in LAYERS for name in names.split()
]


def test_every_module_has_one_place() -> None:
    # What only says what a package is for imports nothing.
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py" and not [*imports(name)]}
    assert sorted(LISTED) == sorted(MODULES.keys() - packages | {""})


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name: str) -> None:
    assert own_imports(name) <= MODULES.keys()
    below = LISTED[LISTED.index(name) + 1 :] if name in LISTED else []
    assert own_imports(name) <= {*below}


def test_only_the_table_of_sources_knows_one() -> None:
    """All else reaches a source by the functions of its protocol."""
    found = {
        name: {each for each in own_imports(name) if each.startswith("sources.")}
        for name in MODULES
        if not name.startswith("sources.")
    }
    assert {name: each for name, each in found.items() if each} == {
        "sources": {
            "sources.bootstrap",
            "sources.bootstrap.archive",
            "sources.capture",
            "sources.elements",
            "sources.image",
            "sources.installer",
            "sources.kind",
        },
        # What images there are is said once, whoever opens one.
        "foreign": {"sources.image.formats", "sources.image.opening", "sources.image.unpacking"},
        # Their templates are rendered as answer files are, whatever the source is.
        "configuration.unused": {"sources.answers"},
        "finishing.copying": {"sources.answers"},
        "finishing.firstboot": {"sources.answers"},
    }


def test_what_is_read_as_imports() -> None:
    """The tests above would find nothing wrong if nothing was found."""
    assert {"pipeline", "configuration.files", "base.log", "base.interrupts", ""} <= own_imports("cli")
    assert {"base.command", "downloads.fetch", "sources.installer.virt_install"} <= own_imports("sources.installer")
    assert "sources.installer" in own_imports("sources")
    assert "subprocess" in imports("base.command.children")


@pytest.mark.parametrize("name", MODULES)
def test_only_command_starts_programs(name: str) -> None:
    if name.startswith("base.command."):
        return
    found = {found.split(".")[0] for found in imports(name)}
    assert not found & {"subprocess", "pty", "multiprocessing", "asyncio", "ctypes"}
    starters = ("system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile")
    for node in nodes(name):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in starters and not node.attr.startswith(("exec", "spawn")), f"line {node.lineno}"


def test_each_process_is_started_in_one_place() -> None:
    """What differs between programs is said in the arguments of one function."""
    starting = {"Popen", "Process", "call", "check_call", "check_output", "getoutput", "run"}
    known = ("subprocess.", "multiprocessing.", ".Process")

    def starts(called: str, _: ast.Call) -> bool:
        return called.rpartition(".")[2] in starting and called.startswith(known)

    assert places(starts) == {"base.command.children"}
    found = sorted(called for called, node in calls("base.command.children") if starts(called, node))
    assert found == [".Process", "subprocess.Popen"]


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Give what module *name* calls, as the last two parts of its name: ``os.replace``, ``.replace``."""
    for node in nodes(name):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            yield f"{of}.{node.func.attr}", node


def places(of: Callable[[str, ast.Call], bool]) -> set[str]:
    """Return the modules with a call that *of* is true for."""
    return {name for name in MODULES for called, node in calls(name) if of(called, node)}


def replaces_a_file(called: str, node: ast.Call) -> bool:
    if called in ("os.replace", "os.rename", "os.renames", "shutil.move", "tempfile.mkstemp"):
        return True
    # Those of a path take one argument, those of a text, a date and a dataclass others.
    is_of_path = called.rpartition(".")[2] in ("replace", "rename") and len(node.args) == 1 and not node.keywords
    return is_of_path or (called.startswith("tempfile.") and called.endswith("File"))


def digests_a_file(called: str, node: ast.Call) -> bool:
    if called == "hashlib.file_digest":
        return True
    if not called.startswith("hashlib."):
        return False
    # One without data is fed with what is read; ``hashlib.new`` has the name of the algorithm first.
    inside = [part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)]
    return len(node.args) == (called == "hashlib.new") or bool({"read", "read_bytes"} & {*inside})


@pytest.mark.parametrize("of", [replaces_a_file, digests_a_file])
def test_files_are_replaced_and_digested_in_one_module(of: Callable[[str, ast.Call], bool]) -> None:
    assert places(of) == {"base.files"}


def test_names_that_the_helper_takes_are_in_one_module() -> None:
    first = "[A-Za-z0-9_@]"
    found = {name: MODULES[name].read_text(encoding="utf-8").count(first) for name in MODULES}
    # Those of directories, and those of the last part.
    assert {name: count for name, count in found.items() if count} == {"system.privileged": 2}
    assert HELPER.read_text(encoding="utf-8").count(first) == 2


def test_last_words_of_a_failed_program_are_taken_in_one_module() -> None:
    def is_end_of_lines(node: ast.AST) -> bool:
        return isinstance(node, ast.Subscript) and "last_lines" in ast.dump(node.value)

    assert {name for name in MODULES if any(map(is_end_of_lines, nodes(name)))} == {"base.errors"}


def test_gpg_is_run_in_one_module() -> None:
    """The list of the packages that have it names it, too."""
    programs = {"gpg", "gpgv", "gpgconf", "gpg-agent"}
    found = {name: {node.value for node in nodes(name) if isinstance(node, ast.Constant)} for name in MODULES}
    assert {name for name, texts in found.items() if texts & programs} == {"base.openpgp", "base.command.installed"}
    assert programs <= found["base.openpgp"]


def uses_of_the_terminal(name: str) -> list[str]:
    """Return where module *name* prints, writes to stdout or exits."""
    found = []
    for node in nodes(name):
        if isinstance(node, ast.Name) and node.id in ("print", "input", "exit", "quit", "SystemExit"):
            found.append(f"{node.id} in line {node.lineno}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            whole = f"{node.value.id}.{node.attr}"
            if whole in ("sys.exit", "sys.stdout", "os._exit", "os.abort"):
                found.append(f"{whole} in line {node.lineno}")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_only_cli_prints_and_exits(name: str) -> None:
    if name == "cli":
        assert uses_of_the_terminal(name)
    else:
        assert uses_of_the_terminal(name) == []


def test_packages_beside_the_standard_library() -> None:
    names = {found.split(".")[0] for name in MODULES for found in imports(name)}
    needed = {"httplib2", "jinja2", "parted", "_ped", "rich", "yaml"}
    assert names - sys.stdlib_module_names == {"image_factory", "argcomplete", *needed}


def test_helper_stands_alone() -> None:
    text = HELPER.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "#!/usr/bin/python3 -I"
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported
    assert imported <= sys.stdlib_module_names
