"""The shipped recipes: what their templates become, which the checker of each family accepts.

data/recipes/ has what the installers get: `image-factory --show-answers IMAGE` of the shipped configuration, and of
variants of its sections; data/machines/ has the machines that they are installed in, and the kernel's arguments.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from image_factory import pipeline
from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.downloads import verify
from image_factory.machines.arch import ARCHITECTURES, named_architectures
from image_factory.model import Build, Plan
from image_factory.sources import answers, forms, installer

from .. import cloud_init_package
from ..conftest import shown
from .test_virt_install import as_lines

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests/data/recipes"
MACHINES = REPOSITORY / "tests/data/machines"
SHIPPED = REPOSITORY / "data/image-factory.conf"

FIRMWARES = {
    "Debian-13-server": ("uefi", "hybrid"),
    "Fedora-44-server": ("uefi", "hybrid"),
    "Rocky-10-server": ("hybrid",),
    "openSUSE-Leap-15.6-server": ("uefi",),
    "openSUSE-Leap-16.0-server": ("uefi",),
    "Ubuntu-26.04-server": ("uefi", "hybrid"),
    "Debian-13-cloud": ("bios",),
    "Ubuntu-26.04-cloud": ("bios",),
}

# Each key with a value that is not its default, and with what has a meaning somewhere.
ALL_KEYS = r"""
locale = de_DE.UTF-8
timezone = Europe/Berlin
packages = vim curl
mirror = https://mirror.example.com/tree
proxy = http://proxy.example.com:3128
root_password_hash = $$6$$salt$$hash./hash./hash./hash./hash./hash./hash./hash./hash./hash./hash./hash./hash./hash./AB
authorized_keys =
    ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f it's "me" <a\b&c>
    ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAIQCAgYKDhIWGh4iJiouMjY6PkJGSk5SVlpeYmZqbnJ2enw==
filesystem = btrfs
kernel_arguments = quiet console=ttyS0
weak_dependencies = no
keyboard = """
VARIANTS = {
    "Debian-13-server": "de",
    "Fedora-44-server": "de",
    "openSUSE-Leap-15.6-server": "german",
    "Ubuntu-26.04-server": "de",
    "openSUSE-Leap-16.0-server": "de",
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    path = tmp_path_factory.mktemp("recipes") / "image-factory.conf"
    variants = "".join(f"[{name}-all]\nbased_on = {name}{ALL_KEYS}{keyboard}\n" for name, keyboard in VARIANTS.items())
    variants += "".join(
        f"[{name}-{firmware}]\nbased_on = {name}\nfirmware = {firmware}\n"
        for name, firmwares in FIRMWARES.items()
        for firmware in firmwares
    )
    path.write_text(SHIPPED.read_text(encoding="utf-8") + variants, encoding="utf-8")
    configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(path)})
    flags = {"output-dir": "/output", "cache-dir": "/cache"}
    found = {name: pipeline.make_plan(configuration, name, flags) for name in configuration.images()}
    return {name: plan for name, plan in found.items() if plan.settings.source != "image"}


def golden_names(suffix: str = "") -> list[str]:
    return sorted(path.name for path in GOLDEN.iterdir() if path.name.endswith(suffix))


def golden_name(plan: Plan) -> str:
    assert plan.settings.answer_file is not None
    return f"{plan.image}.{answers.installer_name(plan.settings.answer_file)}"


def test_every_recipe_has_a_golden_file(plans: dict[str, Plan]) -> None:
    assert golden_names() == sorted(map(golden_name, plans.values()))


def test_rendered(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        if os.environ.get("UPDATE_GOLDEN"):
            (GOLDEN / golden_name(plan)).write_bytes(answers.content(plan))
        expected = (GOLDEN / golden_name(plan)).read_text(encoding="utf-8")
        assert answers.content(plan).decode() == expected, plan.image


def test_every_recipe_has_a_golden_machine(plans: dict[str, Plan]) -> None:
    installed = [name for name, plan in plans.items() if plan.settings.source == "installer"]
    assert sorted(path.name for path in MACHINES.iterdir()) == sorted(f"{name}.txt" for name in installed)


def test_machines(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        if plan.settings.source != "installer":
            continue
        build = Build(plan, plan.work_path, "MACHINE")
        [argv] = [argv for argv in shown(build, installer.steps(build))["Installing"] if argv[0] == "virt-install"]
        path = MACHINES / f"{plan.image}.txt"
        if os.environ.get("UPDATE_GOLDEN"):
            path.write_text(as_lines(argv), encoding="utf-8")
        assert as_lines(argv) == path.read_text(encoding="utf-8"), plan.image


@pytest.mark.parametrize("name", golden_names(".cfg"))
def test_debconf(name: str) -> None:
    done = subprocess.run(
        ["debconf-set-selections", "--checkonly", GOLDEN / name], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def kickstart_version(name: str) -> str:
    words = name.split("-")
    return f"F{words[1]}" if words[0] == "Fedora" else f"RHEL{words[2 if words[0] == 'CentOS' else 1]}"


@pytest.mark.parametrize("name", golden_names(".ks"))
def test_ksvalidator(name: str) -> None:
    # Debian has no package of it: it is in requirements.txt.
    program = shutil.which("ksvalidator", path=str(REPOSITORY / ".venv/bin"))
    assert program, "ksvalidator is missing: make .venv/bin/ruff"
    version = kickstart_version(name)
    done = subprocess.run([program, "--version", version, GOLDEN / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", golden_names(".xml"))
def test_xmllint(name: str) -> None:
    subprocess.run(["xmllint", "--noout", GOLDEN / name], check=True)


def mapping(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


def list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXT = {"type": "string", "minLength": 1}
FLAG = {"type": "boolean"}

# The part of Subiquity's reference manual that the template uses.
AUTOINSTALL = mapping(
    {
        "version": {"const": 1},
        "locale": TEXT,
        "keyboard": mapping({"layout": TEXT}),
        "timezone": TEXT,
        "source": mapping({"id": {"enum": ["ubuntu-server", "ubuntu-server-minimal"]}}),
        "apt": mapping(
            {
                "geoip": FLAG,
                "fallback": {"const": "abort"},
                "preserve_sources_list": FLAG,
                "primary": list_of(mapping({"arches": list_of(TEXT), "uri": TEXT})),
            }
        ),
        "storage": mapping({"swap": mapping({"size": {"const": 0}}), "config": list_of({"required": ["type", "id"]})}),
        "user-data": mapping({"disable_root": FLAG}),
        "ssh": mapping({"install-server": FLAG, "allow-pw": {"const": False}}),
        "packages": list_of(TEXT),
        "updates": {"const": "all"},
        "late-commands": list_of({"anyOf": [TEXT, list_of(TEXT)]}),
        "shutdown": {"const": "poweroff"},
    },
    proxy=TEXT,
)

# The part of Agama's profile that the template uses.
SCRIPT = mapping({"name": TEXT, "chroot": FLAG, "content": {"type": "string", "pattern": "^#!/bin/bash\n"}})
PARTITION = {
    "oneOf": [
        mapping({"search": {"const": "*"}, "delete": {"const": True}}),
        mapping(
            {
                "filesystem": mapping({"path": TEXT, "type": {"enum": ["xfs", "ext4", "btrfs"]}}),
                "size": mapping({"min": TEXT}),
            }
        ),
    ]
}
AGAMA = mapping(
    {
        "product": mapping({"id": {"enum": ["openSUSE_Leap", "Tumbleweed"]}}),
        "localization": mapping({"language": TEXT, "keyboard": TEXT, "timezone": TEXT}),
        "root": mapping({"password": TEXT, "hashedPassword": {"const": True}}, sshPublicKey=TEXT),
        "software": mapping(
            {"patterns": list_of(TEXT), "packages": list_of(TEXT), "onlyRequired": FLAG},
            extraRepositories=list_of(mapping({"alias": TEXT, "url": TEXT})),
        ),
        "storage": mapping(
            {
                "boot": mapping({"configure": FLAG}),
                "drives": list_of(
                    mapping(
                        {"search": TEXT, "ptableType": {"enum": ["gpt", "msdos"]}, "partitions": list_of(PARTITION)}
                    )
                ),
            }
        ),
        "bootloader": mapping({"timeout": {"type": "integer"}, "extraKernelParams": TEXT}),
        "scripts": mapping({"post": list_of(SCRIPT)}),
    }
)


@pytest.mark.parametrize("name", golden_names(".ubuntu.yaml"))
def test_autoinstall(name: str) -> None:
    text = (GOLDEN / name).read_text(encoding="utf-8")
    assert text.startswith("#cloud-config\n")
    jsonschema.validate(yaml.safe_load(text), mapping({"autoinstall": AUTOINSTALL}))


@pytest.fixture(scope="module")
def cloud_init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules of cloud-init, whose package is not installed: it would set up this machine when that starts."""
    directory = tmp_path_factory.mktemp("cloud-init")
    subprocess.run(["dpkg", "-x", cloud_init_package.path(), directory], check=True)
    return directory / "usr/lib/python3/dist-packages"


@pytest.mark.parametrize("name", golden_names(".ubuntu.yaml"))
def test_cloud_init_schema(name: str, cloud_init: Path, tmp_path: Path) -> None:
    """Of what the installer reads, and of what is in it for the installed system."""
    text = (GOLDEN / name).read_text(encoding="utf-8")
    inner = yaml.safe_load(text)["autoinstall"]["user-data"]
    for data in (text, f"#cloud-config\n{yaml.safe_dump(inner)}"):
        path = tmp_path / "user-data"
        path.write_text(data, encoding="utf-8")
        argv = ["/usr/bin/python3", "-m", "cloudinit.cmd.main", "schema", "--config-file", path]
        done = subprocess.run(argv, env={"PYTHONPATH": str(cloud_init)}, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"Valid cloud-config: {path}\n"), done.stderr


@pytest.mark.parametrize("name", golden_names(".json"))
def test_agama(name: str) -> None:
    jsonschema.validate(json.loads((GOLDEN / name).read_text(encoding="utf-8")), AGAMA)


@pytest.mark.parametrize("name", [name for name in golden_names() if "-all." not in name])
def test_no_recipe_has_a_password(name: str) -> None:
    """Nor the key of someone; those with all keys have both."""
    text = (GOLDEN / name).read_text(encoding="utf-8")
    assert "$6$" not in text
    assert "ssh-" not in text.replace("openssh-", "")


@pytest.mark.parametrize(("section", "name"), [("15.6", "AutoYaST"), ("16.0", "Agama")])
def test_hybrid_where_the_installer_cannot(tmp_path: Path, section: str, name: str) -> None:
    path = tmp_path / "image-factory.conf"
    text = f"[x]\nbased_on = openSUSE-Leap-{section}-server\nfirmware = hybrid\n"
    path.write_text(SHIPPED.read_text(encoding="utf-8") + text, encoding="utf-8")
    plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(path)}), "x", {})
    with pytest.raises(ConfigurationError, match=f"{name} installs a boot loader for bios or uefi, not for both"):
        answers.content(plan)


def test_every_head_says_what_it_installs() -> None:
    for path in (REPOSITORY / "data").glob("*.j2"):
        text = path.read_text(encoding="utf-8")
        assert "What it installs, and why:" in text.partition("#}")[0], path
        # And the table after it what the template asks for.
        for arch in ARCHITECTURES:
            declared = forms.declared(text, arch)
            assert answers.keys_asked_for(path) - {"arch", "debian-arch", "firmware", "refuse"} <= declared.keys(), path
            # A system without an installer has no console's keyboard to be asked for.
            keyboard = set() if "bootstrap" in path.name else {"keyboard"}
            assert keyboard | {"locale", "timezone", "packages", "mirror", "proxy"} <= declared.keys(), path


def test_nothing_in_the_shipped_recipes_is_unused(caplog: pytest.LogCaptureFixture) -> None:
    """They are the user's file here."""
    configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(SHIPPED)})
    for name in configuration.images():
        pipeline.make_plan(configuration, name, {})
    assert caplog.messages == []


CLOUD_IMAGES = {
    "Debian-13": "https://cloud.debian.org/images/cloud/trixie/latest/debian-13-genericcloud-ARCH.qcow2",
    "Debian-12": "https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-genericcloud-ARCH.qcow2",
    "Ubuntu-26.04": "https://cloud-images.ubuntu.com/releases/26.04/release/ubuntu-26.04-server-cloudimg-ARCH.img",
    "Ubuntu-24.04": "https://cloud-images.ubuntu.com/releases/24.04/release/ubuntu-24.04-server-cloudimg-ARCH.img",
    "Fedora-44": "https://download.fedoraproject.org/pub/fedora/linux/releases/44/Cloud/ARCH/images/"
    "Fedora-Cloud-Base-Generic-44-1.7.ARCH.qcow2",
    "Rocky-10": "https://download.rockylinux.org/pub/rocky/10/images/ARCH/Rocky-10-GenericCloud-Base.latest.ARCH.qcow2",
    "Rocky-9": "https://download.rockylinux.org/pub/rocky/9/images/ARCH/Rocky-9-GenericCloud-Base.latest.ARCH.qcow2",
}


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_cloud_images(tmp_path: Path, arch: str) -> None:
    """Each is sealed, audited and booted, and where it is from somebody vouches for it."""
    path = tmp_path / "image-factory.conf"
    variants = "".join(f"[{name}]\nbased_on = {name}-cloud-image\narch = {arch}\n" for name in CLOUD_IMAGES)
    path.write_text(SHIPPED.read_text(encoding="utf-8") + variants, encoding="utf-8")
    configuration = Configuration({"IMAGE_FACTORY_CONFIG": str(path)})
    shipped = [name for name in configuration.images() if name.endswith("-cloud-image")]
    assert shipped == [f"{name}-cloud-image" for name in CLOUD_IMAGES]
    for name, uri in CLOUD_IMAGES.items():
        settings = pipeline.make_plan(configuration, name, {"output-dir": "/output"}).settings
        assert settings.source_image is not None
        debian = {"x86_64": "amd64", "aarch64": "arm64"}[arch]
        expected = uri.replace("ARCH", debian if name.startswith(("Debian", "Ubuntu")) else arch)
        assert settings.source_image.uris == (expected,)
        assert sum(layout.pattern.fullmatch(expected) is not None for layout in verify.LAYOUTS) == 1
        assert (settings.seal, settings.audit, settings.manifest, settings.test_boot) == (True, True, True, True)
        assert settings.image_size is None
        assert settings.firmware in (("hybrid", "uefi") if arch == "x86_64" else ("uefi",))


BY_ARCH = {
    "Debian-13-server": "Debian-13-server-arm64",
    "Fedora-44-server": "Fedora-44-server-arm64",
    "Rocky-10-server": None,
    "openSUSE-Leap-15.6-server": None,
    "openSUSE-Leap-16.0-server": None,
    "openSUSE-Tumbleweed-server": None,
    "Ubuntu-26.04-server": None,
}


@pytest.mark.parametrize("arch", ["aarch64", "arm64"])
@pytest.mark.parametrize(("name", "shipped"), BY_ARCH.items())
def test_arch_alone_makes_the_arm_image(
    tmp_path: Path, plans: dict[str, Plan], name: str, shipped: str | None, arch: str
) -> None:
    path = tmp_path / "image-factory.conf"
    text = f"[x]\nbased_on = {name}\narch = {arch}\n"
    path.write_text(SHIPPED.read_text(encoding="utf-8") + text, encoding="utf-8")
    flags = {"output-dir": "/output", "cache-dir": "/cache"}
    plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(path)}), "x", flags)
    sources = [source.uri for key in ("linux", "initrd", "installer_image") if (source := getattr(plan.settings, key))]
    for source in sources:
        assert named_architectures(source) == {"aarch64"}
    assert named_architectures(plan.settings.append) <= {"aarch64"}
    assert "console=ttyAMA0,115200n8" in plan.settings.append
    assert "ttyS0" not in plan.settings.append
    text = answers.content(plan).decode()
    assert "ttyS0" not in text
    assert not re.search("x86_64(?!-efi)|amd64", text)
    if shipped:
        other = plans[shipped]
        assert text == answers.content(other).decode()
        assert dataclasses.replace(plan.settings, arch="x86_64") == dataclasses.replace(other.settings, arch="x86_64")
    else:
        golden = GOLDEN.parent / "arm" / f"{name}.txt"
        shown = "".join(f"{line}\n" for line in [*sources, plan.settings.append]) + text
        if os.environ.get("UPDATE_GOLDEN"):
            golden.parent.mkdir(exist_ok=True)
            golden.write_text(shown, encoding="utf-8")
        assert shown == golden.read_text(encoding="utf-8")


# What an installer chooses by itself, a recipe names: kernel, boot loader, locales, and the tools of the filesystem.
CHOSEN = {
    "linux-image-amd64", "grub-efi-amd64", "grub-efi-amd64-signed", "shim-signed", "grub-pc-bin", "locales",
    "e2fsprogs", "netplan.io", "systemd-resolved",
}  # fmt: skip


@pytest.mark.parametrize("release", ["13", "12"])
def test_a_debian_of_packages_has_what_the_installer_is_told(plans: dict[str, Plan], release: str) -> None:
    """The rest of both is what Debian itself calls important."""
    told = answers.content(plans[f"Debian-{release}-server"]).decode()
    [line] = re.findall("^d-i pkgsel/include string (.*)$", told, re.MULTILINE)
    plan = plans[f"Debian-{release}-cloud"]
    own = yaml.safe_load(answers.content(plan))
    netplan = {"netplan.io", "systemd-resolved"}
    for name in netplan:
        assert (name in told) == (name in own["packages"].split())
    assert {*line.split()} == {*own["packages"].split()} - CHOSEN
    assert own.get("variant", "important") == "important"
    assert ("purge ifupdown" in told) == ("purge ifupdown" in own["script"])
    for key in ("seal", "audit", "manifest", "test_boot", "format", "ram", "cores"):
        assert getattr(plan.settings, key) == getattr(plans[f"Debian-{release}-server"].settings, key)
