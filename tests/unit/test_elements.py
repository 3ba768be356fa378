"""Elements: which an image has, what is merged of them, and the order in which their scripts run."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from image_factory.base.errors import ConfigurationError
from image_factory.disks import attaching, layouts
from image_factory.elements import contract, hooks, layout, resolve
from image_factory.elements.image import Image
from image_factory.elements.resolve import Element, Resolved

SYSTEM = "operating-system"


def known(**elements: str) -> dict[str, Element]:
    """Return elements: of each, what it needs and, after a slash, what it provides."""
    found = {}
    for key, text in elements.items():
        needs, _, provides = text.partition("/")
        name = key.replace("_", "-")
        found[name] = Element(name, Path("/elements", name), tuple(provides.split()), tuple(needs.split()))
    return found


def names(asked: str, elements: Mapping[str, Element]) -> list[str]:
    return [each.element.name for each in resolve.resolve(dict.fromkeys(asked.split(), "named"), elements)]


def put(directory: Path, text: str) -> Path:
    """Make the element *directory* with the files of *text*: a name on each line, ``x`` before one to be executed."""
    for line in text.splitlines():
        kind, name = line.split(" ", 1)
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n", encoding="utf-8")
        path.chmod(0o755 if kind == "x" else 0o644)
    return directory


def merged(*directories: Path) -> hooks.Hooks:
    return hooks.merge(Element(directory.name, directory) for directory in directories)


def test_what_is_needed_is_there_with_why() -> None:
    elements = known(os=f"dpkg /{SYSTEM}", dpkg="manifests", manifests="", app="dpkg pkg-map", pkg_map="")
    found = resolve.resolve({"os": "named", "app": "named"}, elements)
    assert [(each.element.name, each.why) for each in found] == [
        ("os", "named; provides operating-system"),
        ("app", "named"),
        ("dpkg", "needed by os"),
        ("pkg-map", "needed by app"),
        ("manifests", "needed by dpkg"),
    ]


def test_what_another_one_provides_is_not_needed() -> None:
    elements = known(os=f"/{SYSTEM}", app="editor", vim="/editor", editor="more", more="")
    assert names("os vim app", elements) == ["os", "vim", "app"]


def test_cycles_are_none() -> None:
    assert names("a", known(a=f"a b/{SYSTEM}", b="c", c="a")) == ["a", "b", "c"]


def test_a_cycle_through_what_they_provide() -> None:
    """Each needs what the other one provides; one that is the other under another name takes its place."""
    elements = known(os=f"/{SYSTEM}", a="y/x", b="x/y", c="d", d="e", e="/c")
    assert names("os a b", elements) == ["os", "a", "b"]
    assert names("os e d", elements) == ["os", "e", "d"]
    with pytest.raises(ConfigurationError) as caught:
        names("os a", elements)
    assert caught.value.message == "There is no element 'y' (needed by a)."
    with pytest.raises(ConfigurationError) as caught:
        names("os c", elements)
    assert caught.value.message == "The element c is named, and e (needed by d) provides it."


def test_an_element_that_is_named_twice_is_one() -> None:
    assert list(resolve.wanted(["a", "a"], "amd64", with_base=False)) == ["a"]


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        ("os gone", "There is no element 'gone' (named).", "'image-factory --list-elements' lists them all."),
        ("os ap", "There is no element 'ap' (named).", "Did you mean app?"),
        ("os broken", "There is no element 'lost' (needed by broken).", "Did you mean os?"),
        ("os blank", "'two words' (needed by blank) is no name of an element.", "one is on a line each"),
        ("app", "No element provides 'operating-system': none of app makes the system.", "These do: os, other."),
        (
            "os app second",
            "The elements os (named) and other (needed by second) both provide 'operating-system'.",
            "Leave one of them out.",
        ),
        ("os editor vim", "The element editor is named, and vim (named) provides it.", "Leave editor out."),
    ],
)
def test_what_can_not_be_resolved(asked: str, message: str, hint: str) -> None:
    elements = known(os=f"/{SYSTEM}", other=f"/{SYSTEM}", app="", broken="lost", second="other", editor="")
    elements |= {"blank": Element("blank", Path("/elements/blank"), (), ("two words",))} | known(vim="/editor")
    with pytest.raises(ConfigurationError) as caught:
        names(asked, elements)
    assert caught.value.message == message
    assert hint in (caught.value.hint or "")


def test_base_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "stock_directories", list)
    with pytest.raises(ConfigurationError, match="The element 'base', which every image has") as caught:
        resolve.resolve(resolve.wanted(["os"], "amd64", with_base=True), known(os=f"/{SYSTEM}"))
    assert "skip-base = yes" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("asked", "architecture", "with_base", "expected"),
    [
        ("vm os", "amd64", True, "base block-device-mbr vm os"),
        ("vm os", "arm64", False, "block-device-efi vm os"),
        ("vm block-device-gpt", "arm64", False, "vm block-device-gpt"),
        ("os base", "amd64", True, "base os"),
    ],
)
def test_what_is_added(asked: str, architecture: str, with_base: bool, expected: str) -> None:
    assert [*resolve.wanted(asked.split(), architecture, with_base=with_base)] == expected.split()


def test_the_first_directory_wins_and_the_real_name_counts(tmp_path: Path) -> None:
    for name in ("one/a", "two/a", "two/b", "elsewhere/c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "one/linked").symlink_to(tmp_path / "elsewhere/c")
    (tmp_path / "one/README").touch()
    (tmp_path / "two/b/element-deps").write_text(" a \n\n  c\n", encoding="utf-8")
    found = resolve.find([tmp_path / "one", tmp_path / "two"])
    assert {name: element.path for name, element in found.items()} == {
        "a": tmp_path / "one/a",
        "b": tmp_path / "two/b",
        "c": tmp_path / "elsewhere/c",
    }
    assert found["b"].needs == ("a", "c")


def test_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, others, prefix = tmp_path / "own", tmp_path / "others", tmp_path / "venv"
    stock = prefix / "lib/python3.11/site-packages/diskimage_builder/elements"
    for directory in (own, others, stock):
        directory.mkdir(parents=True)
    program = put(prefix, "x bin/disk-image-create") / "bin"
    monkeypatch.setenv("PATH", str(program))
    monkeypatch.setattr(resolve, "_DISTRIBUTION", "no such distribution")
    assert resolve.search_path([own], {"ELEMENTS_PATH": f"{others}:{own}:"}) == [own, others, stock]
    # A job that calls ours in its place still has its elements.
    ours = put(tmp_path / "ours", "x disk-image-create")
    (program / "disk-image-create").unlink()
    (program / "disk-image-create").symlink_to(ours / "disk-image-create")
    assert resolve.stock_directories() == [stock]
    with pytest.raises(ConfigurationError, match=r"ELEMENTS_PATH: /nowhere is not a directory\."):
        resolve.search_path([own], {"ELEMENTS_PATH": "/nowhere"})
    with pytest.raises(ConfigurationError, match=r"elements-path: .*/disk-image-create is not a directory\."):
        resolve.search_path([program / "disk-image-create"], {})


def test_order_is_that_of_sort(tmp_path: Path) -> None:
    scripts = "Upper-1 z-nonum 1_under 09-b 9-a 010-d 10-a 10-c 50-x 100-e -5 0-a 00-a a0 _ 99999999999999999999-a"
    directory = put(tmp_path / "a", "\n".join(f"x install.d/{name}" for name in reversed(scripts.split())))
    expected = os.popen(f"cd {directory}/install.d && ls -A | LC_ALL=C sort -n").read().split()
    assert [name for name, _ in hooks.scripts(merged(directory), "install.d")] == expected
    assert expected.index("9-a") < expected.index("010-d") < expected.index("10-a")


def test_what_is_no_script(tmp_path: Path) -> None:
    text = "x install.d/10-a\nx install.d/20.dot\n- install.d/30-noexec\nx install.d/sub/01-a\nx install.d/40 blank"
    directory = put(tmp_path / "a", text)
    (directory / "install.d/70-link").symlink_to("10-a")
    (directory / "install.d/71-lost").symlink_to("nowhere")
    found = merged(directory)
    assert [name for name, _ in hooks.scripts(found, "install.d")] == ["10-a", "70-link"]
    assert {name: why for name, why, _ in hooks.left_out(found)} == {
        "install.d/20.dot": "its name has more than letters, digits, _ and -",
        "install.d/30-noexec": "it is not executable",
        "install.d/40 blank": "its name has more than letters, digits, _ and -",
    }


def test_merging(tmp_path: Path) -> None:
    one = put(tmp_path / "one", "x root.d/1\n- README.rst\n- bin/a\nx tests/x\n- x.pyc\n- static/etc/one\n- pkg-map")
    two = put(tmp_path / "two", "x root.d/2\n- README.rst\n- bin/b\n- static/etc/two\n- __pycache__/x\n- any.thing/x")
    found = merged(one, two)
    assert {name: file.element for name, file in found.items()} == {
        "README.rst": "two", "any.thing/x": "two", "bin/a": "one", "bin/b": "two", "pkg-map": "one",
        "root.d/1": "one", "root.d/2": "two", "static/etc/one": "one", "static/etc/two": "two",
    }  # fmt: skip


def test_merging_by_links(tmp_path: Path) -> None:
    put(tmp_path / "one", "x install.d/1\n- pkg-map")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("install.d", "pkg-map"):
        (two / name).symlink_to(f"../one/{name}")
    for name, target in (("itself", "itself"), ("nowhere", "gone")):
        (two / name).symlink_to(target)
    assert [*merged(two)] == ["install.d/1", "pkg-map"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("x bin/tool", "The elements one and two both have a file bin/tool."),
        ("x bin/tool/more", "bin/tool/more of the element two is in a directory that is a file of one."),
    ],
)
def test_two_elements_with_one_file(tmp_path: Path, second: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        merged(put(tmp_path / "one", "x bin/tool"), put(tmp_path / "two", second))
    assert "rename" in (caught.value.hint or "")


def test_environment_files_are_sorted_by_bytes(tmp_path: Path) -> None:
    text = "- environment.d/9-x\n- environment.d/11-x.bash\n- environment.d/100-x\n- environment.d/1 x"
    found = hooks.sourced(merged(put(tmp_path / "a", text)))
    assert [name for name, _ in found] == ["100-x", "11-x.bash", "9-x"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["70-a", "71-source"]),
        ({"DIB_INSTALLTYPE_my_app": "package"}, ["70-a", "71-package"]),
        ({"DIB_DEFAULT_INSTALLTYPE": "package"}, ["70-a", "71-package"]),
        ({"DIB_DEFAULT_INSTALLTYPE": "package", "DIB_INSTALLTYPE_my_app": "none"}, ["70-a"]),
    ],
)
def test_install_types(tmp_path: Path, environment: dict[str, str], expected: list[str]) -> None:
    text = """\
x install.d/70-a
x install.d/my-app-source-install/71-source
x install.d/my-app-package-install/71-package
- install.d/my-app-source-install/72-data"""
    directories = put(tmp_path / "a", text), put(tmp_path / "install-types", "x extra-data.d/99-types")
    found = hooks.scripts(merged(*directories), "install.d", hooks.install_types(environment))
    assert [name for name, _ in found] == expected
    alone = hooks.scripts(merged(directories[0]), "install.d", hooks.install_types(environment))
    assert [name for name, _ in alone] == ["70-a"]


def test_variables_of_the_user() -> None:
    found = contract.given(
        {"dib_release": " trixie ", "dib_a": "key", "dib_reporef_my_app": "v1", "image": "x"},
        (("DIB_A", "listed"),),
        {"DIB_RELEASE": "b", "C": "d"},
    )
    assert found == {"DIB_RELEASE": "trixie", "DIB_A": "listed", "DIB_REPOREF_my_app": "v1", "C": "d"}


def test_what_nobody_is_to_see() -> None:
    given = {"DIB_A_PASS": "hunter-1", "DIB_APIKEY": "hunter-2", "DIB_AUTH": "hunter-3", "MY_TOKEN": "hunter-4"}
    given |= {"CI_TOKEN": "of the caller", "DIB_PIN_PASSWORD": "1234", "DIB_RELEASE": "trixie", "DIB_KEYRING": "debian"}
    given |= {"DIB_CLOUD_INIT_ALLOW_SSH_PWAUTH": "allowed", "DIB_DEV_USER_PWDLESS_SUDO": "without"}
    assert contract.secrets(given, {"CI_TOKEN": "of the caller"}) == [f"hunter-{number}" for number in range(1, 5)]


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("===\nvm\n===\nSets up a\npartitioned disk. And more.\n", "Sets up a partitioned disk."),
        ("vm\n--\n\nSets it up\n\nMore", "Sets it up"),
        ("# vm\n\nSets it up, e.g.\n", "Sets it up, e.g."),
        (".. note:: x\n\nText", "Text"),
        ("", ""),
    ],
)
def test_summary(tmp_path: Path, text: str, summary: str) -> None:
    (tmp_path / "README.rst").write_text(text, encoding="utf-8")
    assert Element("a", tmp_path).summary == summary


ROOT = layouts.root_of("ext4", "", ())
# As those of diskimage-builder are.
EFI = """\
- local_loop:
    name: image0
- partitioning:
    base: image0
    label: gpt
    partitions:
      - name: ESP
        type: 'EF00'
        size: 550MiB
        mkfs:
          type: vfat
          mount:
            mount_point: /boot/efi
      - name: BSP
        type: 'EF02'
        size: 8MiB
      - name: root
        size: 100%
        mkfs:
          mount:
            mount_point: /
"""


def laid(directory: Path, architecture: str = "amd64", given: Mapping[str, str] | None = None, **files: str) -> Image:
    """Return an image with the element *directory*, which has *files*: of ``default`` block-device-default.yaml."""
    directory.mkdir()
    for name, text in files.items():
        (directory / f"block-device-{name}.yaml").write_text(text, encoding="utf-8")
    element = Element(directory.name, directory)
    return Image((Resolved(element, "named"),), {}, (), architecture, given or {})


def test_layout_of_elements(tmp_path: Path) -> None:
    found = layout.source(laid(tmp_path / "disk", default=EFI))
    assert found
    disk = layouts.Layout(layout.scheme(found, ROOT), None, "x86_64", 4 << 30)
    assert layout.variables(disk) == {
        "DIB_ROOT_LABEL": "cloudimg-rootfs",
        "DIB_ROOT_FSTYPE": "ext4",
        "DIB_BOOT_LABEL": "",
        "DIB_MOUNTPOINTS": "/|/boot/efi",
    }
    assert [each.label for each in disk.scheme.filesystems] == ["MKFS_ESP", "cloudimg-rootfs"]
    argv = attaching.attach_argv(Path("/disk"), Path("/tree"), Path("/record"), disk)
    assert argv[-5:] == ["/disk", "/tree", "/record", "3:ext4:/", "1:vfat:/boot/efi"]
    assert layout.devices(attaching.devices("loop7", disk)) == {
        "IMAGE_BLOCK_DEVICE": "/dev/loop7",
        "IMAGE_BLOCK_DEVICES": " [image0]=/dev/loop7  [ESP]=/dev/loop7p1  [BSP]=/dev/loop7p2  [root]=/dev/loop7p3 ",
    }
    named = layout.scheme(found, layouts.root_of("xfs", "", ()))
    assert [each.label for each in named.filesystems] == ["MKFS_ESP", "img-rootfs"]


def test_which_layout_counts(tmp_path: Path) -> None:
    files = {"default": "of all", "arm64": "of arm64"}
    (tmp_path / "own file.yaml").write_text("of a file", encoding="utf-8")
    given = {"DIB_BLOCK_DEVICE_CONFIG": f"file://{tmp_path}/own file.yaml"}
    texts = [
        layout.source(laid(tmp_path / name, architecture, variables, **each))
        for name, architecture, variables, each in [
            ("a", "amd64", {}, files),
            ("b", "arm64", {}, files),
            ("c", "arm64", given, files),
            ("d", "amd64", {"DIB_BLOCK_DEVICE_CONFIG": "- of a text"}, files),
            ("e", "amd64", {}, {}),
        ]
    ]
    assert [each and each.text for each in texts] == ["of all", "of arm64", "of a file", "- of a text", None]


VOLUMES = """\
- lvm:
    name: lvm
    pvs: [{name: pv, base: root}]
    vgs: [{name: vg, base: [pv]}]
    lvs: [{name: all, base: vg, extents: 100%FREE}]
- mkfs: {base: all, type: ext4, mount: {mount_point: /}}
"""
PLAIN = EFI.replace("        mkfs:\n          mount:\n            mount_point: /\n", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (EFI.replace("100%", "0%"), "block-device-default.yaml, line 18: size: 0% is no share of what is left."),
        ("- local_loop: {name: image0, block_size: 4096}\n", "line 1: block_size: local_loop has no such key."),
        (PLAIN + VOLUMES, "block-device-default.yaml, line 22: elements can't work on a disk with LVM."),
        ("{", "line 1: it is no well-formed YAML"),
    ],
)
def test_layouts_of_elements_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    found = layout.source(laid(tmp_path / "disk", default=text))
    assert found
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        layout.scheme(found, ROOT)


def test_layouts_that_are_refused(tmp_path: Path) -> None:
    found = laid(tmp_path / "disk", default=EFI)
    with pytest.raises(ConfigurationError, match=r"\[x\] layout: the disk is laid out by .*default.yaml already\."):
        layout.check("x", found, "bios")
    layout.check("x", found, None)
    loader = laid(tmp_path / "bootloader")
    with pytest.raises(ConfigurationError, match="bootloader needs to be told what the disk boots from"):
        layout.check("x", loader, "bios")
    (tmp_path / "told").mkdir()
    layout.check("x", laid(tmp_path / "told/bootloader", given={"DIB_BLOCK_DEVICE": "gpt"}), "bios")
    for number, (path, message) in enumerate(
        {
            "/lost.yaml": r"The layout /lost\.yaml can't be read: No such",
            "/dev/zero": "The layout /dev/zero is not a file",
            "/a%00b": "embedded null byte",
        }.items()
    ):
        wrong = laid(tmp_path / str(number), given={"DIB_BLOCK_DEVICE_CONFIG": f"file://{path}"})
        with pytest.raises(ConfigurationError, match=message):
            layout.source(wrong)


def test_what_works_on_a_disk(tmp_path: Path) -> None:
    assert layout.works_on_disk(laid(tmp_path / "disk", default=EFI))
    assert layout.works_on_disk(laid(tmp_path / "bootloader"))
    assert layout.works_on_disk(laid(tmp_path / "own", given={"DIB_BLOCK_DEVICE_CONFIG": EFI}))
    assert not layout.works_on_disk(laid(tmp_path / "plain"))
