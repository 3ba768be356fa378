"""Targets: what they set, what wins over them, and what they refuse."""

from collections.abc import Callable
from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.configuration.settings import ImageSettings
from image_factory.machines.arch import ARCHITECTURES, FIRMWARES
from image_factory.outputs import OUTPUTS, targets
from image_factory.outputs.targets import TARGETS

Read = Callable[[str], Configuration]
BASE = "[base]\nlinux = /l\ninitrd = /i\nformat = qcow2\ncompression = zstd\n"


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return what reads a configuration file with a text."""

    def read(text: str) -> Configuration:
        path = tmp_path / "x.conf"
        path.write_text(text)
        return Configuration({"IMAGE_FACTORY_CONFIG": str(path)})

    return read


def error_of(action: Callable[[], object]) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        action()
    return caught.value


def test_the_table_names_what_there_is() -> None:
    assert len(TARGETS) >= 14
    for target in TARGETS.values():
        assert {name for value in target.taken("format") for name in value.split("+")} <= {*OUTPUTS}
        assert set(target.architectures) <= {*ARCHITECTURES}
        assert target.title
        assert target.largest is None or target.largest > 1 << 30
        known = {"title", "architectures", "largest", *targets.KEYS, *targets.NEEDS, *targets.FLAGS}
        translated = [f"firmware.{each}" for each in FIRMWARES] + [f"arch.{each}" for each in ARCHITECTURES]
        made = [f"{name}.{each}" for name in ("format", "import") for each in OUTPUTS]
        # A word of a command stays one.
        assert all(len(target.texts.get(key, "x").split()) == 1 for key in (*translated, *made[: len(OUTPUTS)]))
        known |= {"import", *translated, *made, *(f"import.{each}" for each in FIRMWARES)}
        assert {key.partition("@")[0] for key in target.texts} <= known
        assert {key.partition("@")[2] for key in target.texts} <= {"", *ARCHITECTURES}
        assert {target.texts.get(key) for key in targets.FLAGS} <= {None, "yes"}
        assert targets.default([target.name], "compression") in (None, "zlib")
        for key in ("needs", "tree-needs"):
            needs = [need for arch in ARCHITECTURES for need in target.needs(key, arch)]
            # What a user is told to install.
            assert all(any(targets.packages(word) for word in need.split("|")) for need in needs)


@pytest.mark.parametrize(
    ("section", "flags", "formats", "compression"),
    [
        ("target = azure", {}, ("vhd",), "zstd"),
        # Formats add up, and what several take the same is made once.
        ("target = azure, openstack, proxmox, libvirt", {}, ("vhd", "qcow2"), "zlib"),
        # What it is based on gives way, what stands beside it or comes later does not.
        ("target = openstack\nformat = raw", {}, ("raw",), "zlib"),
        ("target = openstack\nformat = raw, tgz", {}, ("raw", "tgz"), "zlib"),
        ("target = openstack\ncompression = none", {}, ("qcow2",), "none"),
        ("target = openstack", {"format": "raw"}, ("raw",), "zlib"),
        ("target = incus", {}, ("squashfs", "incus"), "zlib"),
        # A machine in place of a container.
        ("target = incus\nformat = qcow2, incus", {}, ("qcow2", "incus"), "zlib"),
        ("format = raw", {"target": "openstack"}, ("qcow2",), "zlib"),
        ("target = openstack", {"target": "maas"}, ("tgz",), "zstd"),
        ("target = openstack", {"target": ""}, ("qcow2",), "zstd"),
        ("target =", {}, ("qcow2",), "zstd"),
        # The compression of a format that this target does not get is nothing to it.
        ("target = kubevirt\nformat = raw, qcow2\ncompression = none", {}, ("raw", "qcow2"), "none"),
        ("target = kubevirt\nformat = raw\ncompression = zstd", {}, ("raw",), "zstd"),
    ],
)
def test_what_is_nearer_wins(
    read: Read, section: str, flags: dict[str, str], formats: tuple[str, ...], compression: str
) -> None:
    found = read(f"{BASE}[x]\nbased-on = base\n{section}\n").image("x", flags)
    assert (found.format, found.compression) == (formats, compression)


def test_a_target_of_the_base_is_further_than_the_section(read: Read) -> None:
    text = "[base]\nlinux = /l\ninitrd = /i\ntarget = openstack\n[x]\nbased-on = base\n"
    assert read(text).image("x", {}).format == ("qcow2",)
    assert read(f"{text}format = raw\n").image("x", {}).format == ("raw",)
    # A key for the architecture stands for the one without.
    assert read(f"{text}arch = aarch64\nformat@aarch64 = raw\n").image("x", {}).format == ("raw",)
    assert read(f"[DEFAULT]\nformat = vdi\n{text}").image("x", {}).format == ("qcow2",)
    everywhere = "[DEFAULT]\ntarget = openstack\n[x]\nlinux = /l\ninitrd = /i\n"
    assert read(everywhere).image("x", {}).format == ("qcow2",)
    assert read(f"{everywhere}format = raw\n").image("x", {}).format == ("raw",)


def test_templates_and_lists_have_what_the_target_sets(read: Read) -> None:
    configuration = read(f"{BASE}[x]\nbased-on = base\ntarget = azure, openstack\n")
    variables = configuration.variables("x", {})
    assert (variables["format"], variables["compression"]) == ("vhd, qcow2", "zlib")
    assert configuration.variables("x", {"format": "raw"})["format"] == "raw"
    [listed] = [each for each in configuration.descriptions() if each["name"] == "x"]
    assert listed["format"] == ("vhd", "qcow2")


@pytest.mark.parametrize(
    ("section", "message", "hint"),
    [
        (
            "target = azur",
            "[x] target: 'azur' is not accepted, only azure or aws",
            "Did you mean azure?",
        ),
        (
            "target = azure\nformat = qcow2, vhd-dynamic",
            "[x] target: azure (Microsoft Azure) takes none of format = qcow2, vhd-dynamic.",
            "Add one to format, or take format out: it takes vhd.",
        ),
        (
            "target = incus\nformat = squashfs, qcow2",
            "[x] target: incus (Incus) takes none of format = squashfs, qcow2.",
            "Add one to format, or take format out: it takes squashfs+incus or qcow2+incus.",
        ),
        (
            "target = kubevirt\ncompression = zstd",
            "[x] target: kubevirt (KubeVirt) does not take compression = zstd.",
            "Set compression = zlib or none, or take it out.",
        ),
        (
            "target = vmware\narch = aarch64",
            "[x] target: vmware (VMware vSphere) has no aarch64.",
            "It has x86_64.",
        ),
    ],
)
def test_what_a_target_refuses(read: Read, section: str, message: str, hint: str) -> None:
    configuration = read(f"{BASE}[x]\nbased-on = base\n{section}\n")
    error = error_of(lambda: configuration.image("x", {}))
    assert error.message.startswith(message)
    assert error.hint == hint


def test_a_disk_that_is_too_large_for_a_target(read: Read, tmp_path: Path) -> None:
    configuration = read(f"{BASE}[x]\nbased-on = base\ntarget = azure\nimage-size = 1T\noutput-dir = {tmp_path}\n")
    plan = pipeline.make_plan(configuration, "x", {})
    error = error_of(lambda: targets.check_size(plan))
    assert error.message == "[x] target: azure has disks of 1023 GiB at most, and this one has 1099511627776 bytes."
    assert error.hint == "Set another image-size."
    targets.check_size(pipeline.make_plan(configuration, "x", {"image-size": "1023G"}))


def test_values_that_targets_do_not_share(monkeypatch: pytest.MonkeyPatch, read: Read) -> None:
    """No two of the table are like that today."""
    monkeypatch.setattr(
        targets,
        "TARGETS",
        {
            name: targets.Target(name, {"title": name.upper(), "format": "qcow2", "compression": value})
            for name, value in (("a", "zlib"), ("b", "none"))
        },
    )
    assert targets.default(["a", "b"], "compression") == "zlib"
    settings = read(BASE).image("base", {})
    both = ImageSettings(**{**settings.__dict__, "target": ("a", "b"), "compression": "zlib"})
    assert error_of(lambda: targets.check("x", both)).message == "[x] target: b (B) does not take compression = zlib."
