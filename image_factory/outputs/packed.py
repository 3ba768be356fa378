"""Formats that pack the disk, or an image of it in another format."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..base import files
from ..base.cleanup import released
from ..base.errors import BuildError
from ..model import DISK_NAME, Build
from ..parts import State
from . import qemu
from .kind import Output, run_commands

# What a program prints is the file: of the umask's mode, and with nothing in it of the disk's name and times.
_INTO_FILE = 'from=$1 to=$2; shift 2; exec "$@" <"$from" >"$to"'
# The numbers in a ustar header have 11 octal digits.
_LARGEST_IN_USTAR = 8 << 30


def _compressed(suffix: str, *packing: str, unpacking: Sequence[str]) -> Output:
    def commands(build: Build, path: Path) -> list[list[str]]:
        return [["sh", "-c", _INTO_FILE, "sh", str(build.disk_path), str(path), *packing]]

    name = f"raw.{suffix}"
    programs = ("sh", "bash", "cmp", "dd", packing[0])
    return Output(f"Compressing to {name}", name, commands, programs=programs, unpacking=tuple(unpacking))


def tar_argv(build: Build, path: Path, *words: str) -> list[str]:
    """Return the command that makes a tar of what *words* name, which says nothing of who made it.

    With SOURCE_DATE_EPOCH all times in it are that, and its holes do not depend on the filesystem that the disk is on.
    """
    date = build.plan.source_date
    owner = ["--owner=0", "--group=0", "--numeric-owner", "--mode=0644"]
    dated = [] if date is None else [f"--mtime=@{date}", *(["--hole-detection=raw"] if "--sparse" in words else [])]
    return ["tar", "--create", f"--file={path}", *owner, *dated, *words]


def _disk_in_tar(name: str, *options: str) -> Output:
    """Return a row whose file is a compressed tar of the disk alone."""
    compressed = "--use-compress-program=gzip -n"

    def commands(build: Build, path: Path) -> list[list[str]]:
        return [tar_argv(build, path, *options, compressed, f"--directory={build.directory}", DISK_NAME)]

    programs = ("tar", "gzip", "bash", "cmp", "dd")
    unpacking = ("tar", "--extract", "--gzip", "--to-stdout", "--file=-")
    return Output(f"Packing {name}", name, commands, programs=programs, unpacking=unpacking)


def _member(build: Build, name: str) -> Path:
    """Return the file of the format *name*, which is packed."""
    return build.directory / build.plan.file_name(qemu.OUTPUTS[name].suffix)


# An OVA (DMTF DSP0243): the descriptor, the digests, the disk, in that order, in a ustar.

# What vSphere calls systems since 6.7; what is not here is any other Linux.
_GUESTS = {"Ubuntu": "ubuntu64Guest", "Fedora": "fedora64Guest"}
_OVF = """\
<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
  xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
  xmlns:vmw="http://www.vmware.com/schema/ovf">
  <References>
    <File ovf:href="{disk}" ovf:id="file1" ovf:size="{size}"/>
  </References>
  <DiskSection>
    <Info>Virtual disks</Info>
    <Disk ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte" ovf:diskId="disk1" ovf:fileRef="file1"
      ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <NetworkSection>
    <Info>Networks</Info>
    <Network ovf:name="VM Network">
      <Description>The network of the first card</Description>
    </Network>
  </NetworkSection>
  <VirtualSystem ovf:id="{name}">
    <Info>A virtual machine</Info>
    <Name>{name}</Name>
    <OperatingSystemSection ovf:id="101" vmw:osType="{guest}">
      <Info>The installed system</Info>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware</Info>
      <System>
        <vssd:ElementName>Virtual hardware</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-15</vssd:VirtualSystemType>
      </System>
      <Item>
        <rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits>
        <rasd:Description>Processors</rasd:Description>
        <rasd:ElementName>{cores} processors</rasd:ElementName>
        <rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>{cores}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:Description>Memory</rasd:Description>
        <rasd:ElementName>{memory} MiB of memory</rasd:ElementName>
        <rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>{memory}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:Description>SCSI controller</rasd:Description>
        <rasd:ElementName>SCSI controller 0</rasd:ElementName>
        <rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>VirtualSCSI</rasd:ResourceSubType>
        <rasd:ResourceType>6</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:ElementName>Disk 0</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/disk1</rasd:HostResource>
        <rasd:InstanceID>4</rasd:InstanceID>
        <rasd:Parent>3</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>7</rasd:AddressOnParent>
        <rasd:AutomaticAllocation>true</rasd:AutomaticAllocation>
        <rasd:Connection>VM Network</rasd:Connection>
        <rasd:ElementName>Network adapter 1</rasd:ElementName>
        <rasd:InstanceID>5</rasd:InstanceID>
        <rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType>
        <rasd:ResourceType>10</rasd:ResourceType>
      </Item>
      <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="{firmware}"/>
      <vmw:Config ovf:required="false" vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="false"/>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"""


def ovf(build: Build, disk: Path, capacity: int) -> str:
    """Return the descriptor of a machine with *disk*, a VMDK of *capacity* bytes."""
    settings = build.plan.settings
    return _OVF.format(
        # No name here has a character that XML would mind.
        name=build.plan.image,
        disk=disk.name,
        size=disk.stat().st_size,
        capacity=capacity,
        guest=_GUESTS.get(settings.distribution or "", "other4xLinux64Guest"),
        cores=settings.cores,
        memory=settings.ram >> 20,
        # What can boot with both is to boot with what has a future.
        firmware="bios" if settings.firmware == "bios" else "efi",
    )


def _ova_files(build: Build, path: Path) -> list[Path]:
    """Return descriptor, digests and disk."""
    return [*(path.with_suffix(suffix) for suffix in (".ovf", ".mf")), _member(build, "vmdk")]


def _ova_commands(build: Build, path: Path) -> list[list[str]]:
    names = [found.name for found in _ova_files(build, path)]
    return [tar_argv(build, path, "--format=ustar", f"--directory={build.directory}", *names)]


def _write_ova(output: Output, state: State, path: Path) -> None:
    build = state.build
    descriptor, digests, disk = _ova_files(build, path)
    if disk.stat().st_size >= _LARGEST_IN_USTAR:
        raise BuildError(
            f"{path.name} can't be made: {disk.name} has more than the 8 GiB that there may be in an OVA.",
            hint="Have the vmdk itself made.",
        )
    with released(partial(_remove, descriptor, digests)):
        descriptor.write_text(ovf(build, disk, state.disk.path.stat().st_size), encoding="utf-8")
        lines = [f"SHA256({file.name})= {files.digest_of(file)}\n" for file in (descriptor, disk)]
        digests.write_text("".join(lines), encoding="utf-8")
        run_commands(output, state, path)


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


# A box of vagrant-libvirt.

_VAGRANTFILE = """\
Vagrant.configure("2") do |config|
  config.vm.provider :libvirt do |libvirt|
    libvirt.driver = "kvm"
  end
end
"""
_BOX_FILES = ("metadata.json", "Vagrantfile")


def _box_commands(build: Build, path: Path) -> list[list[str]]:
    disk = _member(build, "qcow2")
    directory = f"--directory={build.directory}"
    words = ["--format=gnu", "--transform=s,^.*[.]qcow2$,box.img,", directory, *_BOX_FILES, disk.name]
    return [tar_argv(build, path, *words)]


def _write_box(output: Output, state: State, path: Path) -> None:
    # Whole GB, and no less than there are.
    size = -(-state.disk.path.stat().st_size // (1 << 30))
    texts = (json.dumps({"provider": "libvirt", "format": "qcow2", "virtual_size": size}) + "\n", _VAGRANTFILE)
    written = [path.with_name(name) for name in _BOX_FILES]
    with released(partial(_remove, *written)):
        for file, text in zip(written, texts, strict=True):
            file.write_text(text, encoding="utf-8")
        run_commands(output, state, path)


def _packing(
    name: str,
    suffix: str,
    packs: str,
    commands: Callable[[Build, Path], Sequence[Sequence[str]]],
    write: Callable[[Output, State, Path], None],
) -> Output:
    member = qemu.OUTPUTS[packs]
    made = Output(f"Packing {name}", suffix, commands, write, programs=("tar", *member.programs), packs=packs)
    return replace(made, driver=member.driver, compresses=member.compresses)


OUTPUTS = {
    "raw.gz": _compressed("gz", "gzip", "--no-name", "--stdout", unpacking=("gzip", "-dc")),
    "raw.xz": _compressed("xz", "xz", "--threads=0", "--stdout", unpacking=("xz", "-dc", "--threads=0")),
    "raw.zst": _compressed("zst", "zstd", "--threads=0", "--quiet", "--stdout", unpacking=("zstd", "-dcq")),
    # curtin pipes all members to the disk: there is one, of the plain kind that all programs read.
    "dd.tgz": _disk_in_tar("dd.tgz", "--format=gnu"),
    # GCE takes nothing but the older GNU format, and disks of whole GiB.
    "gce.tar.gz": replace(_disk_in_tar("gce.tar.gz", "--format=oldgnu", "--sparse"), unit=1 << 30),
    "ova": _packing("ova", "ova", "vmdk", _ova_commands, _write_ova),
    "vagrant": _packing("vagrant", "box", "qcow2", _box_commands, _write_box),
}
