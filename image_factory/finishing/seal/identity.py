"""Plans for what makes one machine of a system: its ID and all that is named by it, its keys, its registrations."""

import re

from ...system import registrations
from ...system.registrations import DROPBEAR, KEYS, Key, is_of, program
from .actions import Actions, System

# kernel-install(8) looks for this name, too, where entries have no machine ID.  Boot loaders boot the highest
# name, and to them this one is lower than any ID.
ENTRY_TOKEN = "Default"

KEYS_UNIT = "image-factory-ssh-host-keys.service"
ENTRIES_UNIT = "image-factory-boot-entries.service"
UNITS = "etc/systemd/system"

# Directories that hold boot-loader entries.
BOOT_ROOTS = ("boot", "boot/efi", "efi")
GRUB_ENVIRONMENTS = (
    "boot/grub/grubenv",
    "boot/grub2/grubenv",
    *(f"boot/efi/EFI/{name}/grubenv" for name in ("almalinux", "centos", "fedora", "redhat", "rocky")),
)

# Files of what makes SSH host keys when the system starts.
KEY_MAKERS = (
    # Fedora, Enterprise Linux
    "usr/lib/systemd/system/sshd-keygen@.service",
    # Debian since 13
    "usr/lib/systemd/system/sshd-keygen.service",
    # Arch
    "usr/lib/systemd/system/sshdgenkeys.service",
    # openSUSE, where sshd.service runs it
    *program("sshd-gen-keys-start"),
    # an administrator's own, as people name it
    "etc/systemd/system/sshd-keygen@.service",
    "etc/systemd/system/sshd-keygen.service",
    "etc/systemd/system/ssh-keygen.service",
    "etc/systemd/system/regenerate_ssh_host_keys.service",
)
SSHD = program("sshd")
CLOUD_INIT = "usr/bin/cloud-init"
CLOUD_INIT_DISABLED = "etc/cloud/cloud-init.disabled"


def reset_machine_id(system: System) -> Actions:
    """Have systemd make a machine ID at the first boot."""
    # Keep the file, as machine-id(5) says: /etc may be read-only at the first boot.
    actions = Actions()
    kind = system.kinds.get("etc/machine-id")
    if kind == "link":
        actions.remove.append("etc/machine-id")
    if kind == "link" or (kind == "file" and system.files.get("etc/machine-id") != b"uninitialized\n"):
        actions.write["etc/machine-id"] = b"uninitialized\n"
    # systemd takes the ID from there where /etc has none.
    if system.kinds.get("var/lib/dbus/machine-id") == "file":
        actions.remove.append("var/lib/dbus/machine-id")
    return actions


def reset_iscsi_name(system: System) -> Actions:
    """Have Debian's iscsid make a new name; elsewhere remove the file."""
    path = "etc/iscsi/initiatorname.iscsi"
    # Debian's iscsid makes a name where the file says so, and does not start without the file.
    if "usr/lib/open-iscsi/startup-checks.sh" not in system.kinds:
        return Actions(remove=[path])
    wanted = b"GenerateName=yes\n"
    return Actions(write={path: wanted} if system.files.get(path, wanted) != wanted else {})


def unregister(system: System) -> Actions:
    """Take out registrations that the contents of files show: SUSE's, passwords of registries, keys of WireGuard."""
    actions = Actions(remove=[_askable(path) for path in registrations.of_suse(system.files)])
    for path, data in system.files.items():
        if is_of(path, [registrations.WIREGUARD]) and registrations.has_wireguard_key(data):
            actions.remove.append(_askable(path))
        elif path.endswith(registrations.CONTAINER_AUTHS):
            text = registrations.without_auths(data)
            if text is not None:
                actions.write[path] = text
    return actions


def _askable(path: str) -> str:
    """Return a pattern for *path* that the helper takes, whatever is in its name."""
    directory, _, name = path.rpartition("/")
    return f"{directory}/{re.sub(r'^[-+~]|[^A-Za-z0-9._@+~-]', '*', name)}"


# Boot-loader entries


def rename_boot_entries(system: System) -> Actions:
    """Put ENTRY_TOKEN in the place of the machine ID, in the boot loaders' files and in their names."""
    actions = Actions()
    if system.machine_id is None:
        return actions
    old = system.machine_id.decode()
    for root in BOOT_ROOTS:
        for name in system.below(f"{root}/loader/entries"):
            path = f"{root}/loader/entries/{name}"
            text = _entry_without(old, system.files.get(path, b""))
            if path in system.files and text != system.files[path]:
                actions.write[path] = text
        loader = f"{root}/loader/loader.conf"
        if old.encode() in system.files.get(loader, b""):
            actions.write[loader] = system.files[loader].replace(old.encode(), ENTRY_TOKEN.encode())
        for directory in (f"{root}/loader/entries", root, f"{root}/EFI/Linux"):
            for name in system.below(directory):
                if old in name:
                    actions.rename[f"{directory}/{name}"] = name.replace(old, ENTRY_TOKEN)
    path = "etc/kernel/cmdline"
    if old.encode() in system.files.get(path, b""):
        actions.write[path] = _entry_without(old, system.files[path])
    for path in GRUB_ENVIRONMENTS:
        data = system.files.get(path, b"")
        if old.encode() in data:
            # GRUB pads its block, which has a fixed size, with these.
            text = data.rstrip(b"#").replace(old.encode(), ENTRY_TOKEN.encode())
            actions.write[path] = text.ljust(len(data), b"#")
    _name_new_entries(system, old, actions)
    return actions


def _entry_without(old: str, data: bytes) -> bytes:
    """Return *data*, an entry or arguments of the kernel, without the machine ID *old*, which systemd would obey."""
    lines = [line for line in data.split(b"\n") if line.split() != [b"machine-id", old.encode()]]
    text = re.sub(rb"(?:^|[ \t]+)systemd\.machine_id=" + old.encode() + rb"(?=\s|$)", b"", b"\n".join(lines))
    return text.replace(old.encode(), ENTRY_TOKEN.encode())


def _name_new_entries(system: System, old: str, actions: Actions) -> None:
    """Have the entries of new kernels named as those that were renamed."""
    token = system.files.get("etc/kernel/entry-token", b"").strip()
    named = any(f"{root}/loader/entries" == path.rpartition("/")[0] for path in actions.rename for root in BOOT_ROOTS)
    own_directory = any(f"{root}/{old}" in actions.rename for root in BOOT_ROOTS)
    if not own_directory and any(system.kinds.get(path) == "directory" for path in ("boot/grub", "boot/grub2")):
        # Fedora's 20-grub.install names entries by the machine ID whatever the token is, and grub2-mkconfig knows
        # no other entries, so the first boot names them by the new ID.
        if token == old.encode():
            actions.remove.append("etc/kernel/entry-token")
        if "boot/loader/entries" in {path.rpartition("/")[0] for path in actions.rename}:
            actions.write |= unit_files(ENTRIES_UNIT, ENTRIES_UNIT_TEXT)
    elif named or own_directory or token == old.encode():
        actions.write["etc/kernel/entry-token"] = f"{ENTRY_TOKEN}\n".encode()


# Keys


def have_keys_made(system: System) -> Actions:
    """Add the units that make SSH host keys, where nothing else in *system* does."""
    actions = Actions(write=unit_of(system, DROPBEAR))
    if not any(path in system.kinds for path in SSHD) or any(_makes_keys(system, path) for path in KEY_MAKERS):
        return actions
    disabled = CLOUD_INIT_DISABLED in system.kinds and "cloud-init-config" not in system.chosen
    if CLOUD_INIT not in system.kinds or disabled:
        actions.write |= unit_files(KEYS_UNIT, KEYS_UNIT_TEXT)
    return actions


def _makes_keys(system: System, path: str) -> bool:
    # Debian's unit makes keys at the first boot only, and there is a first boot only with a new machine ID.
    only_once = b"ConditionFirstBoot=yes" in system.files.get(path, b"")
    return path in system.kinds and ("machine-id" in system.chosen or not only_once)


def remove_service_keys(system: System) -> Actions:
    """Remove the keys of services that each clone makes anew, and add the units that do it."""
    actions = Actions()
    for key in KEYS:
        if not any(maker in system.kinds for maker in key.makers):
            continue
        actions.remove += key.removed
        actions.write |= unit_of(system, key)
    return actions


def unit_of(system: System, key: Key) -> dict[str, bytes]:
    """Return the unit that makes *key* anew, where the system has it now and a program for that."""
    is_made = key.commands and any(maker in system.kinds for maker in key.makers)
    if not is_made or not any(is_of(path, key.removed) for path in system.kinds):
        return {}
    return unit_files(key.unit, unit_text(key), "basic.target")


def unit_text(key: Key) -> str:
    """Return the unit that makes *key* anew."""
    user = f"User={key.user}\n" if key.user else ""
    commands = "\n".join(f"ExecStart={command}" for command in key.commands)
    return _SERVICE_KEY_UNIT.format(missing=key.missing, user=user, commands=commands)


# Units


def unit_files(name: str, text: str, target: str = "multi-user.target") -> dict[str, bytes]:
    """Return the files of a unit that is started at each boot, with *target*.

    A drop-in of the target wants it: that takes no link, and no preset of the distribution's undoes it.
    """
    wanted = f"# Written by image-factory.\n[Unit]\nWants={name}\n"
    drop_in = f"{UNITS}/{target}.d/{name.removesuffix('.service')}.conf"
    return {f"{UNITS}/{name}": text.encode(), drop_in: wanted.encode()}


ENTRIES_UNIT_TEXT = f"""\
# Written by image-factory, which has taken the machine ID out of the image.
[Unit]
Description=Name the boot-loader entries of the image by the ID of this machine
RequiresMountsFor=/boot/loader/entries
ConditionPathExistsGlob=/boot/loader/entries/{ENTRY_TOKEN}-*.conf

[Service]
Type=oneshot
ExecStart=/bin/sh -ec 'read -r id </etc/machine-id; cd /boot/loader/entries; \\
    for name in {ENTRY_TOKEN}-*.conf; do mv -n "$$name" "$$id-$${{name#{ENTRY_TOKEN}-}}"; done'
ExecStart=/bin/sh -ec 'read -r id </etc/machine-id; \\
    saved=$$(grub2-editenv - list | sed -n "s/^saved_entry={ENTRY_TOKEN}-//p"); \\
    [ -z "$$saved" ] || grub2-editenv - set "saved_entry=$$id-$$saved"'
"""

KEYS_UNIT_TEXT = """\
# Written by image-factory: the image has no SSH host keys, and nothing else that makes them.
[Unit]
Description=Make SSH host keys
# Sockets listen before basic.target, which is what units come after by default.
DefaultDependencies=no
After=sysinit.target
Before=ssh.service ssh.socket sshd.service sshd.socket shutdown.target
Conflicts=shutdown.target
ConditionPathExistsGlob=!/etc/ssh/ssh_host_*_key

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A
"""

_SERVICE_KEY_UNIT = """\
# Written by image-factory, which has taken the key that the package had made out of the image.
[Unit]
Description=Make {missing}
DefaultDependencies=no
# The name of the machine is known then, by cloud-init too, and no service has started.
After=sysinit.target
Before=basic.target shutdown.target
Conflicts=shutdown.target
ConditionPathExists=!{missing}

[Service]
Type=oneshot
Environment=DEBIAN_FRONTEND=noninteractive
{user}{commands}
"""
