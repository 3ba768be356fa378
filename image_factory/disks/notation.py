"""Layouts as diskimage-builder writes them down, in YAML: read, checked, and turned into a scheme."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from ..base.errors import ConfigurationError
from . import layouts
from .layouts import APPLIANCE, EXT, EXTENT, LVM, MIB, SWAP, Filesystem, Group, Piece, Scheme, Wanted

# What each module lies on, and its keys; all have a name and a base.
_BASES = {
    "local_loop": (),
    "partitioning": ("local_loop",),
    "partition": ("partitioning",),
    LVM: ("partition",),
    "pv": ("partition",),
    "vg": ("pv",),
    "lv": ("vg",),
    "mkfs": ("local_loop", "partition", "lv"),
    "mount": ("mkfs",),
    "fstab": ("mount",),
}
_KEYS = {
    "local_loop": (),
    "partitioning": ("label", "align", "partitions"),
    "partition": ("size", "type", "flags"),
    LVM: ("pvs", "vgs", "lvs"),
    "pv": ("options",),
    "vg": ("options",),
    "lv": ("size", "extents", "options", "type", "thin-pool"),
    "mkfs": ("type", "label", "uuid", "opts"),
    "mount": ("mount_point",),
    "fstab": ("options", "dump-freq", "fsck-passno"),
}
# Modules that are entries of a list, by the key of another that has it.
_ENTRIES = {"partitions": "partition", "pvs": "pv", "vgs": "vg", "lvs": "lv"}
# Those that have a name of their own, that may lie on several others, or beside others on the same one.
_NAMED = ("local_loop", "partition", LVM, "pv", "vg", "lv")
_SPREAD = (LVM, "vg")
_BESIDE = ("partition", LVM, "lv")
_IMAGE = "image0"
_ROOT = "mkfs_root"

_FILESYSTEMS = (*EXT, *APPLIANCE, "vfat", SWAP)
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"

# Codes of sgdisk, for the types that layouts have.
_GPT_TYPES = {
    "0700": "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7",
    "4100": "9E1A2D38-C612-4316-AA26-8B49521E5A8B",
    "8200": "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F",
    "8300": "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
    "8302": "933AC7E1-2EB4-4F13-B844-0E14E2AEF915",
    "8304": layouts.ROOTS["x86_64"],
    "8305": layouts.ROOTS["aarch64"],
    "8E00": "E6D6D379-F507-44C2-A23C-238F2A3DF928",
    "EF00": layouts.ESP,
    "EF02": layouts.BIOS_BOOT,
}
_UUID = "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"

# What LVM keeps for itself: no volume is called so, and no group as what is in /dev of all systems.
_OF_LVM = "snapshot.*|pvmove.*|.*_([ctv]data|[ct]meta|w?corig|iorig|vorigin|mimage|mlog|pmspare|rimage|rmeta).*"
_DEVICES = (
    "block|bus|char|console|core|cpu|disk|dri|fd|full|fuse|hpet|hwrng|input|kmsg|kvm|log|loop.*|mapper|mem|mqueue|net|null|"
    "nvme.*|nvram|port|ptmx|pts|random|rtc.*|s[gr][0-9]+|(s|v|h|xv)d[a-z]+[0-9]*|shm|snapshot|snd|std(in|out|err)|tty.*|"
    "uinput|urandom|vcs.*|vfio|vhost.*|zero|(dm-|md|ram)[0-9]+"
)
# device-mapper has room for so much.
_LONGEST_DEVICE = 126
# Options of LVM's programs that say what is so anyway: nothing is there that they could ask for.
_IDLE_OPTIONS = "--force|-ff?|--yes|-y"

# The short units are decimal there.
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("", 1000), ("B", 1000), ("iB", 1024))
}

# The library comes without types.
Node = Any


@dataclass
class _Module:
    """A node of a layout: its *kind*, *name* and *bases*, and the *nodes* of its other keys, by name."""

    kind: str
    line: int
    name: str
    bases: tuple[str, ...]
    nodes: dict[str, Node] = field(default_factory=dict)


class _Reader:
    """What is read of the layout that is called *path*; errors name file, line and key."""

    def __init__(self, path: Path | str, root: Filesystem) -> None:
        self._path = path
        self._root = root
        self._modules: dict[str, _Module] = {}

    def error(self, line: int, text: str, hint: str | None = None) -> ConfigurationError:
        """Return the error that *text* is wrong on *line*."""
        return ConfigurationError(f"{self._path}, line {line}: {text}.", hint=hint)

    def _wrong(self, module: _Module, key: str, text: str, hint: str | None = None) -> ConfigurationError:
        node = module.nodes.get(key)
        return self.error(_line(node) if node else module.line, f"{key}: {text}", hint)

    def scheme(self, text: str) -> Scheme:
        """Return the partitions that the layout *text* has."""
        try:
            document = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise self.error(line, f"it is no well-formed YAML: {error.problem}") from error
        except yaml.YAMLError as error:
            raise self.error(1, f"it is no well-formed YAML: {' '.join(str(error).split())}") from error
        if not isinstance(document, yaml.SequenceNode):
            raise self.error(1, "a layout is a list of modules", hint=f"It has {', '.join(_listed(_BASES))}.")
        for entry in document.value:
            self._read_entry(entry, None)
        self._check_bases()
        return self._assembled()

    def _read_entry(self, entry: Node, parent: _Module | None) -> None:
        for key, value in self._pairs(entry, "a module is a mapping"):
            self._read_module(key.value, _line(key), value, parent)

    def _pairs(self, node: Node, what: str) -> list[tuple[yaml.ScalarNode, Node]]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(_line(node), what)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error(_line(key), "a key is a word")
            if key.value in seen:
                raise self.error(_line(key), f"{key.value}: it is there twice")
            seen.add(key.value)
        return list(node.value)

    def _read_module(self, kind: str, line: int, node: Node, parent: _Module | None) -> None:
        """Take the module *kind* of *node*, and those that are nested in it."""
        if kind not in _listed(_BASES):
            raise self.error(line, f"{kind}: there is no such module", hint=f"There are {', '.join(_listed(_BASES))}.")
        self._take(kind, line, self._pairs(node, f"{kind}: it has no keys"), parent)

    def _take(self, kind: str, line: int, pairs: list[tuple[yaml.ScalarNode, Node]], parent: _Module | None) -> None:
        values = {key.value: value for key, value in pairs}
        module = _Module(kind, line, "", (parent.name,) if parent else ())
        if "base" in values:
            several = kind in _SPREAD and isinstance(values["base"], yaml.SequenceNode)
            bases = values["base"].value if several else [values["base"]]
            module.bases = tuple(dict.fromkeys(self._word(node, "base", _NAME) for node in bases))
        name = "_".join([kind, *module.bases])
        if "name" in values:
            name = self._word(values["name"], "name", _NAME)
        elif kind in _NAMED:
            raise self.error(line, f"{kind}: it lacks a name")
        if kind not in ("local_loop", LVM) and not module.bases:
            raise self.error(line, f"{kind}: it lacks a base")
        module.name = name
        if name in self._modules:
            raise self.error(line, f"{name}: line {self._modules[name].line} has this name, too")
        self._modules[name] = module
        for key, value in pairs:
            if key.value in _KEYS[kind]:
                module.nodes[key.value] = value
            elif key.value in _listed(_BASES):
                self._read_module(key.value, _line(key), value, module)
            elif key.value not in ("name", "base"):
                known = ", ".join(("name", "base", *_KEYS[kind]))
                raise self.error(_line(key), f"{key.value}: {kind} has no such key", hint=f"It has {known}.")
        for key in (key for key in _KEYS[kind] if key in _ENTRIES):
            entries, each = module.nodes.get(key), _ENTRIES[key]
            if not isinstance(entries, yaml.SequenceNode) or not entries.value:
                raise self._wrong(module, key, f"it is no list of {each}s")
            for entry in entries.value:
                pairs = self._pairs(entry, f"a {each} is a mapping")
                self._take(each, _line(entry), pairs, None if kind == LVM else module)

    def _check_bases(self) -> None:
        for module in self._modules.values():
            if module.kind == "local_loop":
                if module.name != _IMAGE or module.bases:
                    raise self.error(module.line, f"local_loop: there is one disk, and its name is {_IMAGE}")
                continue
            for name in module.bases:
                self._check_base(module, name)

    def _check_base(self, module: _Module, name: str) -> None:
        base = self._modules.get(name)
        if base is None:
            raise self.error(module.line, f"base: {module.kind} {module.name} lies on {name}, which is nowhere")
        if base.kind not in _BASES[module.kind]:
            raise self.error(
                module.line,
                f"base: {module.kind} {module.name} lies on {base.name}, which is a {base.kind}",
                hint=f"It can lie on a {' or a '.join(_BASES[module.kind])}.",
            )
        others = [one for one in self._on(base) if one.kind not in _BESIDE and one is not module]
        if module.kind not in _BESIDE and others and others[0].line <= module.line:
            raise self.error(module.line, f"base: {others[0].name} of line {others[0].line} lies on {base.name}, too")

    def _on(self, base: _Module) -> list[_Module]:
        return [module for module in self._modules.values() if base.name in module.bases]

    def _of(self, kind: str) -> Iterator[_Module]:
        return (module for module in self._modules.values() if module.kind == kind)

    def _assembled(self) -> Scheme:
        if _IMAGE not in self._modules:
            raise self.error(1, f"local_loop: the layout has no disk {_IMAGE}")
        points: dict[str, int] = {}
        labels: dict[str, int] = {}
        filesystems = {module.bases[0]: self._filesystem(module, points, labels) for module in self._of("mkfs")}
        if "/" not in points:
            raise self.error(1, "mount: no filesystem has the mount_point /, so there is no root")
        tables = list(self._of("partitioning"))
        if not tables:
            return Scheme("", (Wanted("root", "", filesystem=filesystems[_IMAGE]),))
        label = self._value(tables[0], "label", "gpt|mbr", "gpt or mbr")
        align = self._size(tables[0], "align", "1MiB")
        if not isinstance(align, int) or align % MIB:
            raise self._wrong(tables[0], "align", "it is no multiple of 1 MiB")
        wanted = tuple(self._wanted(each, label, filesystems.get(each.name)) for each in self._of("partition"))
        if label == "mbr":
            self._check_order(wanted)
        groups = tuple(self._group(each, filesystems) for each in self._of("vg"))
        for each in self._of("pv"):
            self._check_options(each)
            if not self._on(each):
                raise self.error(each.line, f"pvs: {each.name} is in none of the vgs")
        return Scheme("gpt" if label == "gpt" else "dos", wanted, align, groups)

    def _group(self, module: _Module, filesystems: dict[str, Filesystem]) -> Group:
        """Return the group of LVM that *module* asks for, with its volumes."""
        if re.fullmatch(_DEVICES, module.name):
            raise self._wrong(module, "name", f"LVM takes {module.name} for no name of a group, as it is one in /dev")
        self._check_options(module)
        on = tuple((self._modules[name].bases[0], name) for name in module.bases)
        volumes = tuple(self._volume(each, module, filesystems.get(each.name)) for each in self._on(module))
        return Group(module.name, on, volumes, f"{self._path}, line {module.line}")

    def _volume(self, module: _Module, group: _Module, filesystem: Filesystem | None) -> Wanted:
        """Return the volume of *group* that *module* asks for."""
        for key in ("type", "thin-pool"):
            if key in module.nodes:
                raise self._wrong(
                    module,
                    key,
                    "volumes of thin pools can't be made",
                    hint=f"Leave it out: {module.name} is a plain one.",
                )
        self._check_options(module)
        if re.fullmatch(_OF_LVM, module.name):
            raise self._wrong(module, "name", f"LVM keeps names such as {module.name} for itself")
        where = f"{self._path}, line {module.line}"
        wanted = Wanted(module.name, "", filesystem=filesystem, where=where)
        device = Piece(module.name, 0, "", 0, 0, group=group.name).device
        if len(device.rpartition("/")[2]) > _LONGEST_DEVICE:
            raise self._wrong(module, "name", f"with {group.name} it is longer than LVM takes it")
        sizes = [key for key in ("size", "extents") if key in module.nodes]
        if len(sizes) != 1:
            raise self.error(module.line, f"size: {module.name} has {'it and extents' if sizes else 'no size'}")
        if sizes == ["extents"]:
            return self._in_extents(module, wanted)
        size = self._size(module, "size", "")
        if not isinstance(size, int):
            raise self._wrong(module, "size", "a volume has no share", hint="Write extents, such as 50%VG or 100%FREE.")
        if size < EXTENT:
            raise self._wrong(module, "size", "it is less than an extent of 4 MiB")
        return replace(wanted, size=size // EXTENT * EXTENT)

    def _in_extents(self, module: _Module, wanted: Wanted) -> Wanted:
        """Return *wanted* with the size that *module* gives in extents."""
        accepted = "a number of extents, or a share such as 50%VG or 100%FREE"
        number, percent, of = self._value(module, "extents", "[1-9][0-9]*(%(VG|FREE))?", accepted).partition("%")
        if not percent:
            return replace(wanted, size=int(number) * EXTENT)
        if int(number) > 100:
            raise self._wrong(module, "extents", f"{number}% is no share of a group")
        return replace(wanted, size=Fraction(int(number), 100), of_all=of == "VG")

    def _check_options(self, module: _Module) -> None:
        node = module.nodes.get("options")
        if node is None:
            return
        if not isinstance(node, yaml.SequenceNode):
            raise self._wrong(module, "options", "it is no list of words")
        for each in node.value:
            self._word(each, "options", _IDLE_OPTIONS, "--force and --yes")

    def _check_order(self, wanted: tuple[Wanted, ...]) -> None:
        lines = [module.line for module in self._of("partition")]
        for line, each, before in zip(lines[1:], wanted[1:], wanted, strict=False):
            if before.logical and not each.logical:
                raise self.error(line, f"flags: {each.name} is primary, and {before.name} before it is not")
        primary = [line for line, each in zip(lines, wanted, strict=True) if not each.logical]
        # Those that are not take one more.
        if len(primary) > (4 if len(primary) == len(wanted) else 3):
            raise self.error(primary[-1], "flags: mbr has room for four primary partitions, or three and logical ones")

    def _wanted(self, module: _Module, label: str, filesystem: Filesystem | None) -> Wanted:
        """Return the partition that *module* asks for."""
        where = f"{self._path}, line {module.line}"
        if "size" not in module.nodes:
            raise self.error(module.line, f"size: {module.name} lacks it")
        size = self._size(module, "size", "")
        flags = self._flags(module)
        if label == "mbr":
            kind = self._value(module, "type", "(0[xX])?[0-9A-Fa-f]{1,2}", "a byte such as 0x83", "83").lower()
            kind = f"{int(kind, 16):x}"
            return Wanted(module.name, kind, size, filesystem, "boot" in flags, "primary" not in flags, where)
        if "primary" in flags:
            raise self._wrong(module, "flags", "primary is a flag of mbr")
        code = self._value(module, "type", f"[0-9A-Fa-f]{{4}}|{_UUID}", "a code of sgdisk such as 8300", "8300").upper()
        if len(code) == 4 and code not in _GPT_TYPES:
            raise self._wrong(
                module, "type", f"{code} is not known", hint=f"Write a UUID, or one of {', '.join(_GPT_TYPES)}."
            )
        return Wanted(module.name, _GPT_TYPES.get(code, code), size, filesystem, where=where)

    def _flags(self, module: _Module) -> list[str]:
        node = module.nodes.get("flags")
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            raise self._wrong(module, "flags", "it is no list of boot and primary")
        return [self._word(each, "flags", "boot|primary", "boot or primary") for each in node.value]

    def _filesystem(self, module: _Module, points: dict[str, int], labels: dict[str, int]) -> Filesystem:
        """Return the filesystem of *module*; *points* and *labels* are those of the others, with their lines."""
        is_root = module.name == _ROOT
        root = self._root
        kind = self._value(
            module, "type", "|".join(_FILESYSTEMS), ", ".join(_FILESYSTEMS), root.kind if is_root else None
        )
        label = self._value(module, "label", "[ -.0-~]*", "a text without slashes", root.label if is_root else "")
        if kind == "vfat":
            label = label.upper()
        if len(label) > layouts.LABELS[kind]:
            raise self._wrong(module, "label", f"{kind} has labels of at most {layouts.LABELS[kind]} characters")
        if label in labels:
            raise self._wrong(module, "label", f"the filesystem of line {labels[label]} has it, too")
        if label:
            labels[label] = module.line
        form = "[0-9A-Fa-f]{4}-?[0-9A-Fa-f]{4}" if kind == "vfat" else _UUID
        uuid = self._value(module, "uuid", form, "a UUID, of vfat eight hexadecimal digits", "").lower()
        options = tuple(self._value(module, "opts", ".*", "words", "").split())
        mount = next(iter(self._on(module)), None)
        if kind == SWAP or mount is None:
            point = None
        else:
            point = self._point(mount, points)
        fstab = next(iter(self._on(mount)), None) if mount else None
        found = Filesystem(module.name, kind, point, label, uuid, options or (root.options if is_root else ()))
        return self._mounted(found, fstab)

    def _point(self, mount: _Module, points: dict[str, int]) -> str:
        text = self._value(mount, "mount_point", r"/([A-Za-z0-9._@+-]+(/[A-Za-z0-9._@+-]+)*)?", "a path from /")
        if text in points:
            raise self._wrong(mount, "mount_point", f"the mount of line {points[text]} has {text}, too")
        if {".", ".."} & {*text.split("/")}:
            raise self._wrong(mount, "mount_point", "it has no . and .. in it")
        points[text] = mount.line
        return text

    def _mounted(self, found: Filesystem, fstab: _Module | None) -> Filesystem:
        """Return the filesystem *found* with what *fstab* says of it."""
        usual = layouts.root_options(found.kind) if found.point == "/" else "sw" if found.kind == SWAP else "defaults"
        order = layouts.order_of(found.kind, found.point)
        if fstab is None:
            options, dump = usual, 0
        else:
            options = self._value(fstab, "options", r"\S+", "mount options without blanks", usual)
            dump = int(self._value(fstab, "dump-freq", "[0-9]", "a digit", "0"))
            order = int(self._value(fstab, "fsck-passno", "[0-9]", "a digit", str(order)))
        return Filesystem(
            found.name, found.kind, found.point, found.label, found.uuid, found.options, options, dump, order
        )

    def _value(self, module: _Module, key: str, form: str, accepted: str, default: str | None = None) -> str:
        """Return the text of *key*, which the regular expression *form* matches, as *accepted* says."""
        if key not in module.nodes:
            if default is None:
                raise self.error(module.line, f"{key}: {module.kind} {module.name} lacks it", hint=f"It is {accepted}.")
            return default
        return self._word(module.nodes[key], key, form, accepted)

    def _word(self, node: Node, key: str, form: str, accepted: str = "letters, digits and . _ -") -> str:
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        if text is None or not re.fullmatch(form, text):
            shown = repr(text) if text is not None else "it"
            raise self.error(_line(node), f"{key}: {shown} is not accepted, only {accepted}")
        return str(text)

    def _size(self, module: _Module, key: str, default: str) -> int | Fraction:
        """Return the bytes of *key*, or a share of what is left."""
        accepted = "a size such as 550MiB or 2GB, or a share such as 100%"
        text = self._value(module, key, r"[0-9]+(\.[0-9]+)? ?(%|[A-Za-z]*)", accepted, default)
        unit = text.lstrip("0123456789.").lstrip()
        number = text.removesuffix(unit).rstrip()
        if unit == "%":
            share = Fraction(number) / 100
            if not 0 < share <= 1:
                raise self._wrong(module, key, f"{text} is no share of what is left")
            return share
        if unit not in _UNITS:
            raise self._wrong(module, key, f"{unit} is no unit", hint=f"There are {', '.join(filter(None, _UNITS))}.")
        size = int(Fraction(number) * _UNITS[unit])
        if size < MIB:
            raise self._wrong(module, key, f"{text} is less than 1 MiB")
        return size


def _line(node: Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def _listed(names: dict[str, Callable[..., object]] | dict[str, tuple[str, ...]]) -> list[str]:
    """Return the *names* of modules that a layout has: what is an entry of one is none."""
    return [name for name in names if name not in _ENTRIES.values()]


def read(path: Path, root: Filesystem) -> Scheme:
    """Return the layout at *path*; where it is silent of the filesystem mkfs_root, that is as *root*.

    ConfigurationError names file, line and key of what is wrong.
    """
    return parse(read_text(path), path, root)


def read_text(path: Path) -> str:
    """Return what the file of a layout at *path* has; ConfigurationError if it can't be read."""
    try:
        # A pipe or a device may have no end.
        if path.exists() and not path.is_file():
            raise ConfigurationError(f"The layout {path} is not a file.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"The layout {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8.") from error
    except ValueError as error:
        raise ConfigurationError(f"{str(path)!r} is no path of a layout: {error}.") from error


def parse(text: str, where: Path | str, root: Filesystem) -> Scheme:
    """Return the layout *text*, as ``read`` does; errors call it *where*."""
    return _Reader(where, root).scheme(text)
