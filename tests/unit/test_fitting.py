"""What targets need inside of a system: the files of one that lacks something name it, and what to add."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from image_factory import pipeline
from image_factory.base.errors import BuildError, ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.finishing import fitting
from image_factory.model import Build, Disk, Entry
from image_factory.parts import State
from image_factory.system.tree import Branch, Tree

from .. import cpio
from .test_tree import Filesystem, volume

DRIVERS = "hv_vmbus hv_storvsc nvme virtio_pci virtio_blk virtio_scsi vmw_pvscsi ahci megaraid_sas mpt3sas"
CARDS = "hv_netvsc ena virtio_net gve vmxnet3 e1000e igb ixgbe tg3 bnxt_en mlx5_core"
PROGRAMS = "cloud-init growpart waagent vmtoolsd qemu-ga sshd sudo grub-install efibootmgr"
TARGETS = "azure, aws, gce, openstack, vmware, proxmox, hyperv, libvirt, vagrant, maas, drp, ironic, kubevirt"


class Looked(Filesystem):
    """A filesystem in which a path of any depth is looked for."""

    def look(self, paths: Sequence[str]) -> list[Entry]:
        found = [Entry(path, "file") for path in paths if path in self.files]
        below = [path for path in paths if any(name.startswith(f"{path}/") for name in self.files)]
        return [*found, *(Entry(path, "directory") for path in below)]


def initramfs(modules: str) -> str:
    files = {f"lib/modules/6.1/kernel/{name}.ko": b"" for name in modules.split()}
    return cpio.archive(files).decode("latin-1")


def system(**changes: str | None) -> dict[str, str]:
    """Return the files of a system that has what all need; *changes* are by paths with ``__`` for a slash."""
    modules = [f"kernel/{name}.ko.xz: kernel/other.ko\n" for name in f"{DRIVERS} {CARDS}".split()]
    files = {
        "etc/fstab": "/dev/vda1 / ext4 defaults 0 1\n# /dev/vda2 none swap sw 0 0\n",
        "etc/passwd": "root:x:0:0::/root:/bin/sh\nvagrant:x:1000:1000::/home/vagrant:/bin/sh\n",
        "var/lib/dpkg/status": "",
        "boot/grub/grub.cfg": "\tlinux /boot/vmlinuz-6.1 root=UUID=1 ro console=tty0 console=ttyS0,115200n8\n",
        "usr/lib/modules/6.1/modules.dep": "".join(modules),
        "usr/lib/modules/6.1/modules.builtin": "kernel/drivers/virtio/virtio_pci.ko\n",
        "boot/initrd.img-6.1": initramfs(DRIVERS.replace("virtio_pci ", "")),
        "usr/lib/grub/i386-pc/modinfo.sh": "",
        "usr/lib/grub/x86_64-efi/modinfo.sh": "",
        # What a removed kernel has left.
        "usr/lib/modules/5.10/x": "",
        **{f"usr/bin/{name}": "" for name in PROGRAMS.split()},
    }
    for key, text in changes.items():
        path = key.replace("__", "/")
        files.pop(path, None)
        if text is not None:
            files[path] = text
    return files


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Build]:
    def build(target: str, **settings: str) -> Build:
        lines = "".join(f"{key.replace('_', '-')} = {text}\n" for key, text in {"target": target, **settings}.items())
        path = tmp_path / "x.conf"
        path.write_text(f"[x]\nlinux = /l\ninitrd = /i\noutput-dir = {tmp_path}\n{lines}")
        plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(path)}), "x", {})
        return Build(plan, tmp_path, "x")

    return build


def fit(build: Build, files: dict[str, str], *, size: int = 1 << 30, swap: bool = False) -> Filesystem:
    """Check the system with *files*; return its filesystem."""
    filesystem = Looked(volume(1), files)
    volumes = (filesystem.volume, *([volume(2, "swap")] if swap else []))
    tree = Tree((Branch(filesystem, "", ""),), (filesystem,), volumes)
    with build.disk_path.open("wb") as file:
        file.truncate(size)
    [step] = fitting.steps(build)
    step.run(State(build, Disk(build.disk_path), tree))
    return filesystem


def test_a_system_that_has_all(build: Callable[..., Build], tmp_path: Path) -> None:
    filesystem = fit(build(TARGETS), system())
    # curtin's directory is made.
    assert filesystem.files["curtin"] == ""
    assert {path.name for path in tmp_path.iterdir()} == {"x.conf", "disk.raw"}
    assert "curtin" not in fit(build("azure"), system()).files


def test_no_targets_no_step(build: Callable[..., Build]) -> None:
    assert [*fitting.steps(build(""))] == []
    assert [*fitting.steps(build("wsl"))] != []


@pytest.mark.parametrize(
    ("target", "changes", "message", "hint"),
    [
        ("azure", {"usr__bin__cloud-init": None, "usr__bin__waagent": None},
         "azure: the system has no cloud-init or waagent.", "Add to packages: cloud-init or waagent."),
        ("azure", {"usr__bin__cloud-init": None, "usr__bin__waagent": None, "var__lib__dpkg__status": None},
         "azure: the system has no cloud-init or waagent.",
         "Add to packages: cloud-init or WALinuxAgent or python-azure-agent."),
        ("azure", {"boot__initrd.img-6.1": initramfs("hv_vmbus")},
         "azure: the initramfs of 6.1 has no hv_storvsc.",
         "Add to /etc/initramfs-tools/modules, and run update-initramfs: hv_storvsc."),
        ("azure", {"boot__initrd.img-6.1": initramfs("hv_vmbus"), "var__lib__dpkg__status": None},
         "azure: the initramfs of 6.1 has no hv_storvsc.",
         "Add to packages: dracut-config-generic, or have dracut add_drivers: hv_storvsc."),
        ("vmware", {"usr__lib__modules__6.1__modules.dep": "kernel/vmxnet3.ko:\n"},
         "vmware: the kernel 6.1 has no vmw_pvscsi.",
         "Have the distribution's usual kernel in its place: Debian's linux-image-ARCH is one."),
        ("drp, azure, maas",
         {"usr__bin__growpart": None, "usr__lib__modules__6.1__modules.dep": "kernel/hv_netvsc.ko:"},
         "drp, maas: the system has no growpart, the kernel 6.1 has no ahci nvme megaraid_sas mpt3sas e1000e igb ixgbe "
         "tg3 bnxt_en mlx5_core; azure: the kernel 6.1 has no hv_vmbus hv_storvsc.",
         "Add to packages: cloud-guest-utils. "
         "Have the distribution's usual kernel in its place: Debian's linux-image-ARCH is one."),
        ("vmware", {"usr__lib__modules__6.1__modules.dep": None},
         "vmware: the system has no kernel.", "Add a kernel to packages."),
        ("aws", {"boot__grub__grub.cfg": "linux /boot/vmlinuz ro console=ttyS01\n"},
         "aws: the kernel is not started with console=ttyS0.",
         "Add to the kernel arguments of the system: console=ttyS0."),
        ("drp", {"boot__grub__grub.cfg": "linux /boot/vmlinuz ro console=ttyS0\n"},
         "drp: with console=ttyS0 alone a machine's screen stays empty.",
         "Add to the kernel arguments of the system, before the others: console=tty0."),
        ("drp", {"usr__lib__grub__i386-pc__modinfo.sh": None},
         "drp: the system has no usr/lib/grub/i386-pc/modinfo.sh or usr/share/grub2/i386-pc/modinfo.sh.",
         "Add to packages: grub-pc-bin."),
        ("drp", {"curtin": "a file"}, "drp: /curtin is no directory.", "Have /curtin be an empty directory."),
        ("azure", {"etc__fstab": "/dev/sda2 none swap sw 0 0\n"},
         "azure: there is swap on /dev/sda2.", "Have the answer file make none."),
        ("vagrant", {"etc__passwd": "vagrants:x:1:1::/:/bin/sh\n"},
         "vagrant: there is no user vagrant.", "Have a task make the user vagrant."),
        ("ironic", {"etc__cloud__cloud.cfg.d__90.cfg": "datasource_list: [ NoCloud,\n  Ec2 ]\n"},
         "ironic: cloud-init does not look for ConfigDrive.",
         "Add ConfigDrive to datasource_list in /etc/cloud/cloud.cfg.d, or take the list out."),
        ("aws, azure", {"usr__bin__growpart": None, "etc__fstab": "/dev/sda2 none swap sw 0 0\n"},
         "aws: the system has no growpart; azure: there is swap on /dev/sda2.",
         "Add to packages: cloud-guest-utils. Have the answer file make none."),
    ],
)  # fmt: skip
def test_what_is_missing_is_told(
    build: Callable[..., Build], target: str, changes: dict[str, str | None], message: str, hint: str
) -> None:
    made = build(target)
    with pytest.raises(BuildError) as caught:
        fit(made, system(**changes))
    assert caught.value.message == f"[x] target {message}"
    assert caught.value.hint == hint
    assert not (made.directory / "initramfs").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"etc__cloud__cloud.cfg.d__1.cfg": "datasource_list: [ NoCloud ]\n",
         "etc__cloud__cloud.cfg.d__2.cfg": "datasource_list:\n  - None\n  - Azure # here\n"},
        {"etc__cloud__cloud.cfg.d__1.cfg": "# datasource_list: [ NoCloud ]\n"},
        {"boot__grub__grub.cfg": "set x\n", "boot__loader__entries__a.conf": "options ro console=ttyS0\n"},
        {"boot__grub__grub.cfg": None, "boot__grub2__grubenv": "# GRUB\nkernelopts=ro console=ttyS0\n"},
        {"boot__grub__grub.cfg": None, "etc__kernel__cmdline": "console=ttyS0 quiet\n"},
        {"usr__bin__cloud-init": None},
        # All that it needs is in the kernel.
        {"usr__lib__modules__6.1__modules.builtin": "kernel/a/hv-vmbus.ko\nkernel/a/hv_storvsc.ko\n",
         "boot__initrd.img-6.1": initramfs("none")},
    ],
)  # fmt: skip
def test_what_azure_takes_all_the_same(build: Callable[..., Build], changes: dict[str, str | None]) -> None:
    fit(build("azure"), system(**changes))


def test_swap_on_a_partition_and_a_disk_that_is_too_large(build: Callable[..., Build]) -> None:
    with pytest.raises(BuildError) as caught:
        fit(build("azure"), system(), size=1 << 40, swap=True)
    assert caught.value.message == (
        "[x] target azure: azure has disks of 1023 GiB at most, and this one has 1099511627776 bytes, "
        "there is swap on partition 2."
    )


def test_boot_packages_are_for_formats_of_the_tree(build: Callable[..., Build]) -> None:
    files = system(**{"usr__bin__grub-install": None, "usr__bin__efibootmgr": None})
    fit(build("drp", format="raw.gz"), files)
    with pytest.raises(BuildError, match="no grub-install or grub2-install, the system has no efibootmgr"):
        fit(build("drp", format="raw.gz, tgz"), files)


def test_an_initramfs_that_is_not_there_is_a_warning(
    build: Callable[..., Build], caplog: pytest.LogCaptureFixture
) -> None:
    fit(build("azure"), system(**{"boot__initrd.img-6.1": None}))
    assert "Kernel 6.1 has no initramfs at /boot/initrd.img-6.1, " in caplog.text
    with pytest.raises(BuildError, match=r"^/boot/initrd\.img-6\.1: initramfs has at byte 0 what is no initramfs"):
        fit(build("azure"), system(**{"boot__initrd.img-6.1": "x"}))


RECIPE = "packages: cloud-init cloud-guest-utils openssh-server sudo\nkernel: console=ttyS0\n"


@pytest.mark.parametrize(
    ("recipe", "keys", "message", "hint"),
    [
        (RECIPE, "target = azure, aws, vagrant", "", ""),
        (RECIPE, "target = proxmox, vmware", "proxmox: the recipe has no qemu-ga; vmware: the recipe has no vmtoolsd.",
         "Add to packages: qemu-guest-agent. Add to packages: open-vm-tools."),
        (RECIPE.replace("ttyS0", "tty0"), "target = gce", "gce: the recipe has no kernel argument console=ttyS0.",
         "Add to the kernel arguments of the system: console=ttyS0."),
        (RECIPE.replace("ttyS0", "tty0"), "target = gce\nappend = a --- console=ttyS0", "", ""),
        (RECIPE.replace("sudo", "sudo-ldap"), "target = vagrant", "vagrant: the recipe has no sudo.",
         "Add to packages: sudo."),
        # What else they bring is not known.
        ("", "target = azure\ntasks = ./a.sh", "", ""),
        ("", "target = azure\ntasks-after-cleaning = ./a.sh", "", ""),
        ("", "target = azure\ncopy = a:/b", "", ""),
        ("", "target = wsl", "", ""),
        ("", "", "", ""),
    ],
)  # fmt: skip
def test_what_the_recipe_tells(tmp_path: Path, recipe: str, keys: str, message: str, hint: str) -> None:
    (tmp_path / "answers.cfg").write_text(f"#\n{recipe}")
    text = f"[x]\nlinux = /l\ninitrd = /i\noutput-dir = {tmp_path}\npreseed = {tmp_path}/answers.cfg\n{keys}\n"
    (tmp_path / "x.conf").write_text(text)
    plan = pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(tmp_path / "x.conf")}), "x", {})
    if not message:
        fitting.check(plan)
        return
    with pytest.raises(ConfigurationError) as caught:
        fitting.check(plan)
    assert (caught.value.message, caught.value.hint) == (f"[x] target {message}", hint)
