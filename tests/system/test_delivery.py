"""How answer files are delivered: names, kernel arguments, and seed disks made by the real program."""

import dataclasses
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from image_factory import checkpoint, pipeline
from image_factory.base import events
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.configuration.parsers import parse_answer_files, parse_source
from image_factory.model import Build
from image_factory.parts import Group, Step, carry_out, doing
from image_factory.sources import installer
from image_factory.sources.installer import delivery, virt_install

from ..conftest import shown, state_of

REPOSITORY = Path(__file__).resolve().parents[2]

SECRET = "hunter2"


def make_build(directory: Path, key: str, name: str, text: str = SECRET, extra: str = "") -> Build:
    """Return a build, with its working directory, of an image whose answer file *key* is *name* with *text*."""
    (directory / name).write_text(text)
    configuration = directory / "image-factory.conf"
    configuration.write_text(f"[x]\nlinux = /l\ninitrd = /i\n{key} = {directory}/{name}\n{extra}")
    plan = pipeline.make_plan(
        Configuration({"IMAGE_FACTORY_CONFIG": str(configuration)}), "x", {"output-dir": str(directory)}
    )
    build = Build(plan, plan.work_path, "MACHINE")
    build.directory.mkdir()
    return build


def install(build: Build, instead: Callable[[], object]) -> None:
    """Do what comes before and after the installation, and *instead* of that."""
    *_, turn = installer.steps(build)
    assert isinstance(turn, Group)
    group = turn.steps[-1]
    assert isinstance(group, Group)
    *before, last = group.steps
    assert isinstance(last, Step)
    assert last.name == "Installing"
    carry_out(
        state_of(build), [dataclasses.replace(group, steps=[*before, Step(last.name, doing(lambda _: instead()))])]
    )


# key, the user's file -> its name for the installer, the kernel's argument, the label of the seed disk
DELIVERED = {
    "preseed": ("a.cfg.j2", "a.cfg", "preseed/url=file:///a.cfg", ""),
    "kickstart": ("a.ks", "a.ks", "inst.ks=file:///a.ks", ""),
    "yast": ("a.xml", "a.xml", "autoyast=file:///a.xml", ""),
    "autoinstall": ("a.yaml.j2", "user-data", "autoinstall", "CIDATA"),
    "agama": ("a.json.j2", "autoinst.json", "inst.auto=label://OEMDRV/autoinst.json", "OEMDRV"),
    "agama in Jsonnet": ("a.jsonnet", "autoinst.jsonnet", "inst.auto=label://OEMDRV/autoinst.jsonnet", "OEMDRV"),
    "agama in XML": ("a.xml", "autoinst.xml", "inst.auto=label://OEMDRV/autoinst.xml", "OEMDRV"),
}


@pytest.mark.parametrize(("case", "name", "delivered", "argument", "label"), [(k, *v) for k, v in DELIVERED.items()])
def test_what_the_installer_is_told(
    tmp_path: Path, case: str, name: str, delivered: str, argument: str, label: str
) -> None:
    build = make_build(tmp_path, case.split()[0], name, extra="append = quiet")
    assert virt_install.kernel_arguments(build.plan.settings) == f"{argument} quiet"
    assert delivery.copy_path(build) == build.directory / "answers" / delivered
    argv = virt_install.virt_install_argv(build, ["--location", "L"], "kvm")
    seed = f"path={build.directory}/seed.iso,device=cdrom,format=raw"
    assert argv[-2:] == (
        ["--disk", seed] if label else ["--initrd-inject", str(build.directory / "answers" / delivered)]
    )
    assert ("xorriso" in installer.programs(build.plan)) == bool(label)
    assert ("cpio" in installer.programs(build.plan)) == (not label)


def test_every_key_has_a_delivery() -> None:
    assert {case.split()[0] for case in DELIVERED} == set(delivery.DELIVERIES)


def test_no_answer_file(tmp_path: Path) -> None:
    build = make_build(tmp_path, "preseed", "a")
    (tmp_path / "image-factory.conf").write_text("[x]\nlinux = /l\ninitrd = /i\n")
    plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "image-factory.conf")}), "x", {})
    build = Build(plan, build.directory, "MACHINE")
    assert virt_install.kernel_arguments(plan.settings) == ""
    found: list[Path] = []
    install(build, lambda: found.extend(build.directory.iterdir()))
    assert found == []


@pytest.mark.parametrize(
    ("key", "files"),
    [
        ("autoinstall", {"user-data": SECRET, "meta-data": "instance-id: image-factory\n"}),
        ("agama", {"autoinst.json": SECRET}),
    ],
)
def test_seed_disk(tmp_path: Path, key: str, files: dict[str, str]) -> None:
    build = make_build(tmp_path, key, "a.json")
    delivery.write_copy(build)
    seed = build.directory / "seed.iso"

    def look() -> None:
        assert stat.S_IMODE(seed.stat().st_mode) == 0o600
        assert read_seed(seed, tmp_path / "read") == files
        assert label_of(seed) == delivery.DELIVERIES[key].label
        # Joliet's names, beside Rock Ridge's.
        assert all(name.encode("utf-16-be") in seed.read_bytes() for name in files)

    install(build, look)
    assert not seed.exists()


def read_seed(seed: Path, target: Path) -> dict[str, str]:
    argv = ["xorriso", "-osirrox", "on", "-indev", seed, "-extract", "/", target]
    subprocess.run(argv, capture_output=True, check=True)
    found = {path.name: path.read_text() for path in target.iterdir()}
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in target.iterdir()} <= {0, 0o044}
    return found


def label_of(seed: Path) -> str:
    done = subprocess.run(["blkid", "-o", "value", "-s", "LABEL", seed], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_path_with_odd_characters(tmp_path: Path) -> None:
    """They are taken as they are: no pattern, no option, no separator."""
    directory = tmp_path / "out,put *=[x]\\y 'z"
    directory.mkdir()
    build = make_build(directory, "autoinstall", "a.yaml")
    delivery.write_copy(build)
    install(build, lambda: read_seed(build.directory / "seed.iso", tmp_path / "read"))
    assert {path.name for path in (tmp_path / "read").iterdir()} == {"user-data", "meta-data"}


def test_further_files_in_the_initrd(tmp_path: Path) -> None:
    """Each is put there, as a copy that others can't read."""
    (tmp_path / "b.ks").write_bytes(b"{{ b }}\r\n")
    (tmp_path / "c").write_text(SECRET)
    build = make_build(tmp_path, "kickstart", "a.ks", extra=f"answer-files = {tmp_path}/b.ks, {tmp_path}/c:d.cfg")
    delivery.check(build.plan)
    answers = build.directory / "answers"
    argv = virt_install.virt_install_argv(build, ["--location", "L"], "kvm")
    assert argv[-6:] == [
        word for name in ("a.ks", "b.ks", "d.cfg") for word in ("--initrd-inject", f"{answers}/{name}")
    ]
    delivery.write_copy(build)
    assert delivery.write_further(build) == [(tmp_path / "b.ks", answers / "b.ks"), (tmp_path / "c", answers / "d.cfg")]
    assert (answers / "b.ks").read_bytes() == b"{{ b }}\r\n"
    assert {stat.S_IMODE(path.stat().st_mode) for path in answers.iterdir()} == {0o600}
    assert ["#", "copy", f"{tmp_path}/c", "->", f"{answers}/d.cfg"] in shown(build, installer.steps(build))[
        "Caching the installer"
    ]


def test_further_files_on_the_seed_disk(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("b")
    build = make_build(tmp_path, "autoinstall", "a.yaml", extra=f"answer-files = {tmp_path}/b:scripts/b.sh")
    delivery.check(build.plan)
    delivery.write_copy(build)
    delivery.write_further(build)
    argv = ["xorriso", "-osirrox", "on", "-indev", build.directory / "seed.iso", "-extract", "/", tmp_path / "read"]
    install(build, lambda: subprocess.run(argv, capture_output=True, check=True))
    assert (tmp_path / "read/scripts/b.sh").read_text() == "b"
    # A person makes the same.
    commands = delivery.by_hand_argvs(build)
    assert ["install", "-D", "-m", "600", f"{tmp_path}/b", f"{build.directory}/answers/scripts/b.sh"] in commands


# answer file's key, the further files, what is wrong with them
REFUSED = {
    "no answer file": ("osinfo", "{d}/b", "there is no answer file that they belong to"),
    "template": ("preseed", "{d}/b.j2", "b.j2 would not be rendered"),
    "twice": ("preseed", "{d}/b, {d}/c:b", "two files with the name b"),
    "answer file's name": ("preseed", "{d}/b:a.ks", "two files with the name a.ks"),
    "name of the seed's own": ("autoinstall", "{d}/b:meta-data", "two files with the name meta-data"),
    "directory in the initrd": ("preseed", "{d}/b:c/b", "c/b can't be in a directory"),
    "directory of another": ("autoinstall", "{d}/b:a, {d}/c:a/b", "a can't be a file and a directory"),
    "directory of another, later": ("autoinstall", "{d}/b:a/b/c, {d}/c:a", "a can't be a file and a directory"),
    "directory of the seed's own": ("autoinstall", "{d}/b:user-data/b", "user-data can't be a file and a directory"),
    "lost by Anaconda": ("kickstart", "{d}/b", "the installer loses b when it leaves its initrd"),
    "not there": ("preseed", "{d}/absent", "absent is not there"),
}


@pytest.mark.parametrize(("key", "files", "message"), REFUSED.values(), ids=REFUSED)
def test_further_files_that_are_refused(tmp_path: Path, key: str, files: str, message: str) -> None:
    for name in ("b", "b.j2", "c", "linux"):
        (tmp_path / name).touch()
    answers = "#cloud-config\nautoinstall: {version: 1}\n" if key == "autoinstall" else "d-i a/b string c\n"
    build = make_build(tmp_path, key, "a.ks", answers, extra=f"answer-files = {files.format(d=tmp_path)}")
    linux = parse_source(f"{tmp_path}/linux")
    settings = dataclasses.replace(build.plan.settings, linux=linux, initrd=linux)
    with pytest.raises(ConfigurationError) as caught:
        installer.check(dataclasses.replace(build.plan, settings=settings))
    assert caught.value.message.startswith("[x] answer-files: ")
    assert message in caught.value.message


@pytest.mark.parametrize("text", ["/", "b:/c", "b:../c", "b:c//d", "b:c d", "b:.c"])
def test_names_that_further_files_can_not_have(text: str) -> None:
    with pytest.raises(ValueError, match="PATH or PATH:NAME"):
        parse_answer_files(text)


@pytest.mark.parametrize("error", [BuildError("x"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_seed_disk_goes_when_the_installation_fails(tmp_path: Path, error: BaseException) -> None:
    build = make_build(tmp_path, "agama", "a.json")
    delivery.write_copy(build)

    def fail() -> None:
        assert (build.directory / "seed.iso").exists()
        raise error

    with pytest.raises(type(error)):
        install(build, fail)
    assert [path.name for path in build.directory.iterdir()] == ["answers"]


def test_seed_disk_that_can_not_be_made(tmp_path: Path) -> None:
    build = make_build(tmp_path, "agama", "a.json")
    with pytest.raises(BuildError, match="xorriso failed"):
        install(build, lambda: pytest.fail("there is nothing to put on it"))
    assert list(build.directory.iterdir()) == []


def test_seed_disk_that_can_not_be_removed(tmp_path: Path) -> None:
    build = make_build(tmp_path, "agama", "a.json")
    delivery.write_copy(build)

    def replace() -> None:
        (build.directory / "seed.iso").unlink()
        (build.directory / "seed.iso").mkdir()

    with pytest.raises(OSError, match=r"seed\.iso"):
        install(build, replace)


@pytest.mark.parametrize("name", ["a", "a.yaml", "a.j2", "a.json.yaml", "json"])
def test_agama_knows_its_files_by_the_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"\[x\] agama: .* only a path that ends in \.json, "):
        make_build(tmp_path, "agama", name)


@pytest.mark.parametrize(
    ("key", "name", "boot_files"),
    [
        ("autoinstall", "a.yaml", "kernel=casper/vmlinuz,initrd=casper/initrd"),
        ("agama", "a.json", "kernel=boot/x86_64/loader/linux,initrd=boot/x86_64/loader/initrd"),
        ("preseed", "a.cfg", ""),
    ],
)
def test_boot_files_of_an_iso(tmp_path: Path, key: str, name: str, boot_files: str) -> None:
    build = make_build(tmp_path, key, name, extra="installer_image = /media/x.iso\narch = x86_64")
    [argv] = [argv for argv in shown(build, installer.steps(build))["Installing"] if argv[0] == "virt-install"]
    location = argv[argv.index("--location") + 1]
    assert location == ",".join(filter(None, (f"{build.directory}/installer.iso", boot_files)))


def test_dry_run(tmp_path: Path) -> None:
    build = make_build(tmp_path, "autoinstall", "a.yaml.j2")
    steps = shown(build, installer.steps(build))
    answers = build.directory / "answers"
    assert ["#", "render", str(tmp_path / "a.yaml.j2"), "->", str(answers / "user-data")] in steps[
        "Caching the installer"
    ]
    assert steps["Making the seed disk"] == [["#", "write", str(answers / "meta-data")], delivery.seed_argv(build)]
    assert list(steps).index("Making the seed disk") == list(steps).index("Installing") - 1


def test_dry_run_without_a_seed_disk(tmp_path: Path) -> None:
    build = make_build(tmp_path, "preseed", "a")
    assert "Making the seed disk" not in shown(build, installer.steps(build))
    assert list(delivery.seed_steps(build)) == []


def test_checkpoint(tmp_path: Path) -> None:
    """The answer file counts as the others do."""
    build = make_build(tmp_path, "autoinstall", "a.yaml")
    before = checkpoint.inputs_of(build.plan)
    assert checkpoint.inputs_of(build.plan, [events.InputUsed("autoinstall", "", delivery.write_copy(build))]) == before
    (tmp_path / "a.yaml").write_text("other")
    changed = checkpoint.inputs_of(build.plan)
    assert [key for key in before if before[key] != changed[key]] == ["autoinstall"]


@pytest.mark.parametrize(("key", "name"), [("autoinstall", "a.yaml"), ("agama", "a.json.j2")])
def test_repeating_by_hand(tmp_path: Path, key: str, name: str) -> None:
    """The commands make the same seed disk, which others can't read."""
    build = make_build(tmp_path, key, name)
    delivery.write_copy(build)
    files: dict[str, str] = {}
    install(build, lambda: files.update(read_seed(build.directory / "seed.iso", tmp_path / "read")))
    (tmp_path / "image-factory").symlink_to(REPOSITORY / "image-factory")
    *commands, _pool, installing = virt_install.by_hand_argvs(build, ["--location", "L"], "kvm")
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "IMAGE_FACTORY_CONFIG": str(tmp_path / "image-factory.conf"),
        "HOME": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for argv in commands:
        subprocess.run(argv, env=environment, check=True, capture_output=True, umask=0o022)
    seed = tmp_path / "x-by-hand/seed.iso"
    assert f"path={seed},device=cdrom,format=raw" in installing
    assert read_seed(seed, tmp_path / "by-hand") == files
    assert label_of(seed) == delivery.DELIVERIES[key].label
    assert SECRET not in str(commands)
    for path in (seed, tmp_path / "x-by-hand/answers"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
