"""image-factory-sudo-helper, run for real by ordinary users through sudo.

What each refused call must not do is checked on the outside: victims of root's and of another
user's stay as they were.
"""

import base64
import io
import json
import os
import subprocess
import tarfile
import time
import zlib
from pathlib import Path

import pytest

from ..conftest import PATIENCE, machine_state, run
from ..helper_scene import IMAGE_SIZE, Scene, own_mount, scene

__all__ = ["scene"]

REFUSED: list[tuple[str, list[str | bytes]]] = [
    ("no words", []),
    ("empty word", [""]),
    ("unknown verb", ["rm", "-rf", "<OWN>"]),
    ("verb in capitals", ["UMOUNT", "<MOUNTED>"]),
    ("verb with a blank", ["umount ", "<MOUNTED>"]),
    ("joined words", ["umount <MOUNTED>"]),
    ("umount without argument", ["umount"]),
    ("umount of two", ["umount", "<MOUNTED>", "<MOUNTED>"]),
    ("umount with an option", ["umount", "-l", "<MOUNTED>"]),
    ("umount of the root", ["umount", "/"]),
    ("umount of a system mount", ["umount", "/proc"]),
    ("umount of a directory that is no mount", ["umount", "<OWN>/empty"]),
    ("umount of the directory around the mount", ["umount", "<OWN>"]),
    ("umount of another user's mount", ["umount", "<THEIRS>"]),
    ("umount of what isn't there", ["umount", "/tmp/image-factory.nothing"]),
    ("umount with ..", ["umount", "<OWN>/../<MOUNTED>"]),
    ("umount with a trailing slash", ["umount", "<MOUNTED>/"]),
    ("umount with //", ["umount", "<OWN>//tree"]),
    ("umount with .", ["umount", "<OWN>/./tree"]),
    ("umount with a newline", ["umount", "<MOUNTED>\n"]),
    ("umount relative", ["umount", "tmp/image-factory.x"]),
    ("umount elsewhere", ["umount", "/var/tmp/image-factory.x"]),
    ("umount of another prefix", ["umount", "/tmp/image-factory"]),
    ("umount below a link", ["umount", "<OWN>/link/tree"]),
    ("umount of a very long name", ["umount", "/tmp/image-factory." + "x" * 5000]),
    ("umount not UTF-8", ["umount", b"/tmp/image-factory.\xff\xfe"]),
    ("umount with an escape sequence", ["umount", "/tmp/image-factory.\x1b[2J"]),
    ("mount of no device", ["mount", "/etc/passwd", "<OWN>/empty"]),
    ("mount of another device", ["mount", "/dev/vda", "<OWN>/empty"]),
    ("mount of the control device", ["mount", "/dev/loop-control", "<OWN>/empty"]),
    ("mount of a partition", ["mount", "/dev/loop0p1", "<OWN>/empty"]),
    ("mount with ..", ["mount", "/dev/loop0/../vda", "<OWN>/empty"]),
    ("mount of another user's loop device", ["mount", "<LOOP>", "<OWN>/empty"]),
    ("mount of a free loop device", ["mount", "/dev/loop4242", "<OWN>/empty"]),
    ("mount with options", ["mount", "-o", "suid", "/dev/loop0", "<OWN>/empty"]),
    ("mount with a type", ["mount", "-t", "proc", "proc", "<OWN>/empty"]),
    ("bind mount", ["mount", "--bind", "/etc", "<OWN>/empty"]),
    ("mount elsewhere", ["mount", "/dev/loop0", "/etc"]),
    ("mount without directory", ["mount", "/dev/loop0"]),
    ("image: of another user", ["mount-image", "<THEIR_IMAGE>", "0", "512", "<OWN>/empty"]),
    ("image: of root's", ["mount-image", "<ROOTS>", "0", "512", "<OWN>/empty"]),
    ("image: a device", ["mount-image", "/dev/vda", "0", "512", "<OWN>/empty"]),
    ("image: a directory", ["mount-image", "<OWN>", "0", "512", "<OWN>/empty"]),
    ("image: not there", ["mount-image", "<OWN>/none", "0", "512", "<OWN>/empty"]),
    ("image: empty", ["mount-image", "<OWN>/file", "0", "512", "<OWN>/empty"]),
    ("image: through a link", ["mount-image", "<OWN>/link/shadow", "0", "512", "<OWN>/empty"]),
    ("image: relative", ["mount-image", "image.raw", "0", "512", "<OWN>/empty"]),
    ("image: with ..", ["mount-image", "/tmp/../etc/shadow", "0", "512", "<OWN>/empty"]),
    ("image: with a newline", ["mount-image", "<IMAGE>\n", "0", "512", "<OWN>/empty"]),
    ("image: negative offset", ["mount-image", "<IMAGE>", "-512", "512", "<OWN>/empty"]),
    ("image: odd offset", ["mount-image", "<IMAGE>", "1", "512", "<OWN>/empty"]),
    ("image: hexadecimal offset", ["mount-image", "<IMAGE>", "0x200", "512", "<OWN>/empty"]),
    ("image: no size", ["mount-image", "<IMAGE>", "0", "0", "<OWN>/empty"]),
    ("image: size past the end", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE + 512), "<OWN>/empty"]),
    ("image: offset past the end", ["mount-image", "<IMAGE>", str(IMAGE_SIZE), "512", "<OWN>/empty"]),
    ("image: size that overflows", ["mount-image", "<IMAGE>", "512", "9" * 18, "<OWN>/empty"]),
    ("image: size of many digits", ["mount-image", "<IMAGE>", "512", "9" * 5000, "<OWN>/empty"]),
    ("image: digits of another script", ["mount-image", "<IMAGE>", "\u0660", "512", "<OWN>/empty"]),
    ("image: no filesystem in it", ["mount-image", "<IMAGE>", "8388608", "4194304", "<OWN>/empty"]),
    ("image: a subvolume by its name", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/empty", "subvol=@"]),
    ("image: another subvolume", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/empty", "subvolid=256"]),
    ("image: two options", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/empty", "subvolid=5,exec"]),
    ("image: an option", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/empty", "suid"]),
    ("image: an empty option", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/empty", ""]),
    ("image: an option and a newline", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/empty", "subvolid=5\n"]),
    ("image: more words", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/empty", "subvolid=5", "subvolid=5"]),
    ("image: a subvolume of no btrfs", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/empty", "subvolid=5"]),
    ("image: a subvolume of another user's", ["mount-image", "<THEIR_IMAGE>", "0", "512", "<OWN>/empty", "subvolid=5"]),
    ("directory: not the caller's", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OTHER>/empty"]),
    ("directory: not empty", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/full"]),
    ("directory: mounted on", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<MOUNTED>"]),
    ("directory: in a mount", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<MOUNTED>/etc"]),
    ("directory: a link", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/link"]),
    ("directory: below a link", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/link/ssh"]),
    ("directory: a file", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>/file"]),
    ("directory: /tmp", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "/tmp"]),
    ("directory: seen by others", ["mount-image", "<IMAGE>", "0", str(IMAGE_SIZE), "<OWN>"]),
    ("remove: nothing named", ["remove", "<MOUNTED>"]),
    ("remove: absolute", ["remove", "<MOUNTED>", "/etc/passwd"]),
    ("remove: with ..", ["remove", "<MOUNTED>", "../../etc/passwd"]),
    ("remove: with .. in the middle", ["remove", "<MOUNTED>", "var/../etc"]),
    ("remove: with .. below a subvolume", ["remove", "<MOUNTED>", "@/../etc"]),
    ("remove: with .. at the end", ["remove", "<MOUNTED>", "@/.."]),
    ("remove: a part with .. and more", ["remove", "<MOUNTED>", "..a/etc"]),
    ("remove: . in the middle", ["remove", "<MOUNTED>", "var/./log"]),
    ("remove: a dot at the end", ["remove", "<MOUNTED>", "@/."]),
    ("remove: dots at the end", ["remove", "<MOUNTED>", "etc/..."]),
    ("remove: dots and a star at the end", ["remove", "<MOUNTED>", "etc/..*"]),
    ("remove: nothing between slashes", ["remove", "<MOUNTED>", "@//etc"]),
    ("remove: too deep", ["remove", "<MOUNTED>", "@/" * 26 + "x"]),
    ("show: with .. below a subvolume", ["show", "<MOUNTED>", "@/.snapshots/../../etc"]),
    ("remove: the root", ["remove", "<MOUNTED>", "."]),
    ("remove: one bad among good", ["remove", "<MOUNTED>", "var/log/none", "../x"]),
    ("remove: a pattern in the middle", ["remove", "<MOUNTED>", "*/log"]),
    ("remove: outside of a mount", ["remove", "<OWN>", "file"]),
    ("remove: in another user's mount", ["remove", "<THEIRS>", "root/install.log"]),
    ("remove: below the mount's root", ["remove", "<MOUNTED>/etc", "fstab"]),
    ("list: nothing named", ["list", "<MOUNTED>"]),
    ("list: with ..", ["list", "<MOUNTED>", "../*"]),
    ("list: outside of a mount", ["list", "<OWN>", "*"]),
    ("list: in another user's mount", ["list", "<THEIRS>", "*"]),
    ("list: through a link", ["list", "<OWN>/link", "*"]),
    ("list: a pattern in the middle", ["list", "<MOUNTED>", "*/x"]),
    ("look: a word more", ["look", "<MOUNTED>", "etc"]),
    ("look: outside of a mount", ["look", "<OWN>"]),
    ("look: in another user's mount", ["look", "<THEIRS>"]),
    ("look: the machine's root", ["look", "/"]),
    ("look: through a link", ["look", "<OWN>/link"]),
    ("put: a word more", ["put", "<MOUNTED>", "etc/x"]),
    ("put: outside of a mount", ["put", "<OWN>"]),
    ("put: in another user's mount", ["put", "<THEIRS>"]),
    ("put: the machine's root", ["put", "/"]),
    ("put: below the mount's root", ["put", "<MOUNTED>/etc"]),
    ("put: through a link", ["put", "<OWN>/link"]),
    ("read: nothing named", ["read", "<MOUNTED>"]),
    ("read: with ..", ["read", "<MOUNTED>", "etc/../../shadow"]),
    ("read: absolute", ["read", "<MOUNTED>", "/etc/shadow"]),
    ("read: outside of a mount", ["read", "<OWN>", "file"]),
    ("read: in another user's mount", ["read", "<THEIRS>", "root/install.log"]),
    ("read: through a link", ["read", "<OWN>/link", "shadow"]),
    ("truncate: nothing named", ["truncate", "<MOUNTED>"]),
    ("truncate: with ..", ["truncate", "<MOUNTED>", "../file"]),
    ("truncate: outside of a mount", ["truncate", "<OWN>", "file"]),
    ("truncate: in another user's mount", ["truncate", "<THEIRS>", "root/install.log"]),
    ("truncate: through a link", ["truncate", "<OWN>/link", "shadow"]),
    ("truncate: one bad among good", ["truncate", "<MOUNTED>", "var/log/none", "/etc/shadow"]),
    ("rename: without a name", ["rename", "<MOUNTED>", "etc/fstab"]),
    ("rename: two files", ["rename", "<MOUNTED>", "etc/fstab", "etc/fstab", "x"]),
    ("rename: into another directory", ["rename", "<MOUNTED>", "etc/fstab", "x/fstab"]),
    ("rename: out of it", ["rename", "<MOUNTED>", "etc/fstab", "../fstab"]),
    ("rename: to nothing", ["rename", "<MOUNTED>", "etc/fstab", ""]),
    ("rename: to ..", ["rename", "<MOUNTED>", "etc/fstab", ".."]),
    ("rename: to a pattern", ["rename", "<MOUNTED>", "etc/fstab", "*"]),
    ("rename: a pattern", ["rename", "<MOUNTED>", "etc/*", "x"]),
    ("rename: with ..", ["rename", "<MOUNTED>", "etc/../../x", "y"]),
    ("rename: what isn't there", ["rename", "<MOUNTED>", "etc/none", "x"]),
    ("rename: to what is there", ["rename", "<MOUNTED>", "var/log", "adm"]),
    ("rename: through a link", ["rename", "<MOUNTED>", "var/lib/secret", "x"]),
    ("rename: outside of a mount", ["rename", "<OWN>", "file", "x"]),
    ("rename: in another user's mount", ["rename", "<THEIRS>", "etc/fstab", "x"]),
    ("write: without a file", ["write", "<MOUNTED>", "0644"]),
    ("write: without a mode", ["write", "<MOUNTED>", "etc/fstab"]),
    ("write: two files", ["write", "<MOUNTED>", "0644", "etc/fstab", "etc/x"]),
    ("write: setuid", ["write", "<MOUNTED>", "4755", "etc/x"]),
    ("write: a mode of letters", ["write", "<MOUNTED>", "u+s", "etc/x"]),
    ("write: a mode that is no octal number", ["write", "<MOUNTED>", "0888", "etc/x"]),
    ("write: a long mode", ["write", "<MOUNTED>", "06755", "etc/x"]),
    ("write: a pattern", ["write", "<MOUNTED>", "0644", "etc/*"]),
    ("write: with ..", ["write", "<MOUNTED>", "0644", "../x"]),
    ("write: absolute", ["write", "<MOUNTED>", "0644", "/etc/x"]),
    ("write: a newline", ["write", "<MOUNTED>", "0644", "etc/x\n"]),
    ("write: a directory", ["write", "<MOUNTED>", "0644", "etc"]),
    ("write: a device", ["write", "<MOUNTED>", "0644", "var/log/YaST2/y2log"]),
    ("write: a pipe", ["write", "<MOUNTED>", "0644", "var/log/YaST2/fifo"]),
    ("write: a link", ["write", "<MOUNTED>", "0644", "var/log/installer/status"]),
    ("write: below a link", ["write", "<MOUNTED>", "0644", "var/lib/secret"]),
    ("write: a new file below a link", ["write", "<MOUNTED>", "0644", "var/adm/autoinstall/x/y"]),
    ("write: below a file", ["write", "<MOUNTED>", "0644", "etc/fstab/x"]),
    ("write: outside of a mount", ["write", "<OWN>", "0644", "file"]),
    ("write: in another user's mount", ["write", "<THEIRS>", "0644", "etc/fstab"]),
    ("write: through a link", ["write", "<OWN>/link", "0644", "shadow"]),
    ("set-read-only: without a value", ["set-read-only", "<MOUNTED>"]),
    ("set-read-only: another value", ["set-read-only", "<MOUNTED>", "yes"]),
    ("set-read-only: two subvolumes", ["set-read-only", "<MOUNTED>", "true", "etc", "var"]),
    ("set-read-only: what is no btrfs", ["set-read-only", "<MOUNTED>", "true"]),
    ("set-read-only: a directory of what is no btrfs", ["set-read-only", "<MOUNTED>", "false", "etc"]),
    ("set-read-only: outside of a mount", ["set-read-only", "<OWN>", "false"]),
    ("set-read-only: in another user's mount", ["set-read-only", "<THEIRS>", "false"]),
    ("set-read-only: the machine's root", ["set-read-only", "/", "true"]),
    ("set-read-only: through a link", ["set-read-only", "<OWN>/link", "true"]),
    ("set-read-only: with ..", ["set-read-only", "<MOUNTED>", "true", "../x"]),
    ("show: outside of a mount", ["show", "<OWN>", "file"]),
    ("show: in another user's mount", ["show", "<THEIRS>", "root/install.log"]),
    ("show: through a link", ["show", "<OWN>/link", "shadow"]),
    ("usage: outside of a mount", ["usage", "<OWN>"]),
    ("usage: another user's mount", ["usage", "<THEIRS>"]),
    ("usage: the machine's root", ["usage", "/"]),
    ("usage: through a link", ["usage", "<MOUNTED>", "var/lib"]),
    ("usage: a file", ["usage", "<MOUNTED>", "root/install.log"]),
    ("usage: what isn't there", ["usage", "<MOUNTED>", "none"]),
    ("usage: absolute", ["usage", "<MOUNTED>", "/etc"]),
    ("usage: with ..", ["usage", "<MOUNTED>", "../etc"]),
    ("usage: with .. at the end", ["usage", "<MOUNTED>", "var/.."]),
    ("usage: a pattern", ["usage", "<MOUNTED>", "va*"]),
    ("usage: nothing", ["usage", "<MOUNTED>", ""]),
    ("usage: two directories", ["usage", "<MOUNTED>", "var", "etc"]),
    ("keys: outside of a mount", ["keys", "<OWN>"]),
    ("keys: another user's mount", ["keys", "<THEIRS>"]),
    ("keys: the machine's root", ["keys", "/"]),
    ("keys: through a link", ["keys", "<MOUNTED>", "var/lib"]),
    ("keys: a file", ["keys", "<MOUNTED>", "root/install.log"]),
    ("keys: what isn't there", ["keys", "<MOUNTED>", "none"]),
    ("keys: absolute", ["keys", "<MOUNTED>", "/etc"]),
    ("keys: with ..", ["keys", "<MOUNTED>", "../etc"]),
    ("keys: with .. at the end", ["keys", "<MOUNTED>", "var/.."]),
    ("keys: a pattern", ["keys", "<MOUNTED>", "va*"]),
    ("keys: nothing", ["keys", "<MOUNTED>", ""]),
    ("keys: two directories", ["keys", "<MOUNTED>", "var", "etc"]),
    ("subvolumes: outside of a mount", ["subvolumes", "<OWN>"]),
    ("subvolumes: another user's mount", ["subvolumes", "<THEIRS>"]),
    ("subvolumes: of no btrfs", ["subvolumes", "<MOUNTED>"]),
    ("subvolumes: a path", ["subvolumes", "<MOUNTED>", "etc"]),
    ("delete: nothing named", ["delete-subvolume", "<MOUNTED>"]),
    ("delete: outside of a mount", ["delete-subvolume", "<OWN>", "full"]),
    ("delete: another user's mount", ["delete-subvolume", "<THEIRS>", "etc"]),
    ("delete: of no btrfs", ["delete-subvolume", "<MOUNTED>", "etc"]),
    ("delete: with ..", ["delete-subvolume", "<MOUNTED>", "../etc"]),
    ("delete: absolute", ["delete-subvolume", "<MOUNTED>", "/etc"]),
    ("delete: a pattern", ["delete-subvolume", "<MOUNTED>", "et*"]),
    ("mount-image: read-only first", ["mount-image", "<IMAGE>", "0", "4096", "<OWN>/empty", "read-only", "subvolid=5"]),
    ("mount-image: read-only twice", ["mount-image", "<IMAGE>", "0", "4096", "<OWN>/empty", "read-only", "read-only"]),
    ("mount-image: read-only, of another's", ["mount-image", "<THEIR_IMAGE>", "0", "4096", "<OWN>/empty", "read-only"]),
    ("mount-image: read-only, of root's", ["mount-image", "<ROOTS>", "0", "512", "<OWN>/empty", "read-only"]),
    ("contents: nothing", ["contents"]),
    ("contents: outside of a mount", ["contents", ":<OWN>"]),
    ("contents: another user's mount", ["contents", ":<THEIRS>"]),
    ("contents: another user's mount below", ["contents", ":<MOUNTED>", "etc:<THEIRS>"]),
    ("contents: the machine's root", ["contents", ":/"]),
    ("contents: no root", ["contents", "etc:<MOUNTED>"]),
    ("contents: a directory without a place", ["contents", "<MOUNTED>"]),
    ("contents: two roots", ["contents", ":<MOUNTED>", ":<MOUNTED>:etc"]),
    ("contents: options alone", ["contents", "--exclude=./x"]),
    ("contents: of what isn't there", ["contents", ":<MOUNTED>:none"]),
    ("contents: of a file", ["contents", ":<MOUNTED>:root/install.log"]),
    ("contents: of a link", ["contents", ":<MOUNTED>:var/lib"]),
    ("contents: at what isn't there", ["contents", ":<MOUNTED>", "none:<MOUNTED>"]),
    ("contents: at a file", ["contents", ":<MOUNTED>", "root/install.log:<MOUNTED>"]),
    ("contents: at a link", ["contents", ":<MOUNTED>", "var/adm/autoinstall:<MOUNTED>"]),
    ("contents: below a link", ["contents", ":<MOUNTED>", "var/lib/x:<MOUNTED>"]),
    ("contents: at ..", ["contents", ":<MOUNTED>", "..:<MOUNTED>"]),
    ("contents: with .. in the directory", ["contents", ":<MOUNTED>:../etc"]),
    ("contents: of an absolute directory", ["contents", ":<MOUNTED>:/etc"]),
    ("contents: an option of tar's", ["contents", ":<MOUNTED>", "--checkpoint-action=exec=id"]),
    ("contents: a file of tar's", ["contents", ":<MOUNTED>", "--file=/tmp/x"]),
    ("contents: another program", ["contents", ":<MOUNTED>", "-I", "id"]),
    ("contents: patterns of a file", ["contents", ":<MOUNTED>", "--exclude-from=/etc/shadow"]),
    ("contents: a pattern of all", ["contents", ":<MOUNTED>", "--exclude=*"]),
    ("contents: a pattern with a line", ["contents", ":<MOUNTED>", "--exclude=./x\ny"]),
    ("contents: a time of a file", ["contents", ":<MOUNTED>", "--mtime=/etc/shadow"]),
    ("contents: a file of the machine's", ["contents", ":<MOUNTED>", "/etc/shadow"]),
    ("trim: outside of a mount", ["trim", "<OWN>"]),
    ("trim: another user's mount", ["trim", "<THEIRS>"]),
    ("trim: the machine's root", ["trim", "/"]),
    ("chmod: of a bad mode", ["chmod", "u+s", "<MOUNTED>/etc"]),
    ("chmod: of no mode", ["chmod", "o+", "<MOUNTED>/etc"]),
    ("chmod: of a number", ["chmod", "4777", "<MOUNTED>/etc"]),
    ("chmod: of several modes", ["chmod", "o+r,u+s", "<MOUNTED>/etc"]),
    ("chmod: with another option", ["chmod", "--reference=/etc/passwd", "o+r", "<MOUNTED>/etc"]),
    ("chmod: outside of a mount", ["chmod", "o+rwx", "<OWN>/file"]),
    ("chmod: through a link of the caller's", ["chmod", "-R", "o+rwx", "<OWN>/link"]),
    ("chmod: below a link of the caller's", ["chmod", "o+rwx", "<OWN>/link/shadow"]),
    ("chmod: a link of the guest's", ["chmod", "o+rwx", "<MOUNTED>/var/log/installer/status"]),
    ("chmod: below a link of the guest's", ["chmod", "o+rwx", "<MOUNTED>/var/lib/secret"]),
    ("chmod: recursively below a link of the guest's", ["chmod", "-R", "o+rwx", "<MOUNTED>/var/log/anaconda"]),
    ("chmod: another user's mount", ["chmod", "o+rwx", "<THEIRS>/root"]),
    ("chmod: a device", ["chmod", "o+rwx", "<MOUNTED>/var/log/YaST2/y2log"]),
    ("chmod: with ..", ["chmod", "o+rwx", "<MOUNTED>/../../etc/shadow"]),
    ("version with more", ["version", "x"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words"), REFUSED, ids=[name for name, _ in REFUSED])
def test_refused(scene: Scene, name: str, words: list[str | bytes]) -> None:
    before = scene.outside()
    done = scene.helper(*(scene.fill_in(word) if isinstance(word, str) else word for word in words))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("image-factory-sudo-helper: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.strip().isprintable()
    assert scene.outside() == before


def test_mount_is_harmless(scene: Scene) -> None:
    before = machine_state()
    with own_mount(scene) as point:
        options = run("findmnt", "--noheadings", "--output", "OPTIONS", point).stdout.strip().split(",")
        assert {"nosuid", "nodev", "noexec", "nosymfollow"} <= set(options)
        # No one else gets there, and a setuid shell in it isn't even run.
        assert scene.users["b"].run("ls", point, check=False).returncode != 0
        assert scene.users["a"].run(point / "usr/bin/rootshell", "-c", "id", check=False).returncode != 0
        assert scene.users["a"].run("cat", point / "var/log/YaST2/y2log", check=False).returncode != 0
    assert machine_state() == before


def test_show_and_remove_stay_inside(scene: Scene) -> None:
    outside = scene.outside()
    with own_mount(scene) as point:
        patterns = ("root/install.log*", "var/log/installer", "var/log/anaconda*", "var/lib/secret", "var/log/YaST2")
        done = scene.helper("show", str(point), *patterns, "var/adm/autoinstall", "none/at/all")
        assert done.stdout == (
            "==> /root/install.log <==\nan installer's log\n"
            "==> /var/log/installer/syslog <==\nline one\nline two\n"
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        done = scene.helper("remove", str(point), *patterns, "var/adm/autoinstall")
        assert done.stdout.splitlines() == [
            "1 19 root/install.log", "3 17 var/log/installer", "1 0 var/log/anaconda", "3 0 var/log/YaST2",
            "1 0 var/adm/autoinstall",
        ]  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert sorted(path.name for path in (point / "var").iterdir()) == ["adm", "lib", "log"]
        assert list((point / "var/log").iterdir()) == []
    assert scene.outside() == outside


def test_the_other_operations_stay_inside(scene: Scene) -> None:
    outside = scene.outside()
    with own_mount(scene) as point:
        patterns = ("root/*", "var/*", "var/log/*", "var/lib/secret", "var/log/YaST2/*", "none/at/all")
        done = scene.helper("list", str(point), *patterns)
        assert list(map(json.loads, done.stdout.splitlines())) == [
            ["root/install.log", "file"],
            ["var/adm", "directory"], ["var/lib", "link"], ["var/log", "directory"],
            ["var/log/YaST2", "directory"], ["var/log/anaconda", "link"], ["var/log/installer", "directory"],
            ["var/log/YaST2/fifo", "other"], ["var/log/YaST2/y2log", "other"],
        ]  # fmt: skip
        done = scene.helper("read", str(point), *patterns, "var/log/installer/*")
        assert [json.loads(line)[0] for line in done.stdout.splitlines()] == [
            "root/install.log", "var/log/installer/syslog"
        ]  # fmt: skip
        assert base64.b64decode(json.loads(done.stdout.splitlines()[1])[1]) == b"line one\nline two"
        done = scene.helper("truncate", str(point), *patterns)
        assert done.stdout.splitlines() == ["1 19 root/install.log", "1 17 var/log"]
        assert (done.returncode, done.stderr) == (0, "")
        assert (point / "var/log/installer/syslog").read_bytes() == b""
        assert scene.helper("rename", str(point), "var/log/installer", "x+y~").returncode == 0
        assert scene.helper("rename", str(point), "var/lib", ".lib").returncode == 0
        assert (point / "var/log/x+y~/syslog").exists()
        assert os.readlink(point / "var/.lib") == str(scene.victim.parent)
    assert scene.outside() == outside


def test_write_keeps_what_a_file_is(scene: Scene) -> None:
    with own_mount(scene) as point:
        path = point / "root/install.log"
        os.chown(path, 1234, 4321)
        path.chmod(0o4750)
        for name, value in (("security.selinux", b"system_u:object_r:x_t:s0\0"), ("user.comment", b"text")):
            os.setxattr(path, name, value)
        before = path.stat()
        for data in (b"longer than it was before, by far\n", b"", b"\xff\0\n" * 1000, bytes(1 << 20)):
            assert scene.helper("write", str(point), "0600", "root/install.log", stdin=data).returncode == 0
            assert path.read_bytes() == data
        after = path.stat()
        for key in ("st_ino", "st_mode", "st_uid", "st_gid"):
            assert getattr(before, key) == getattr(after, key)
        assert os.getxattr(path, "security.selinux") == b"system_u:object_r:x_t:s0\0"
        assert os.getxattr(path, "user.comment") == b"text"
        assert scene.helper("write", str(point), "0600", "root/install.log", stdin=bytes((1 << 20) + 1)).returncode == 1
        assert path.read_bytes() == bytes(1 << 20)


def test_write_makes_what_is_not_there(scene: Scene) -> None:
    with own_mount(scene) as point:
        os.setxattr(point / "etc", "security.selinux", b"system_u:object_r:etc_t:s0\0")
        assert scene.helper("write", str(point), "0640", "etc/.a/b.d/c+d", stdin=b"text").returncode == 0
        assert (point / "etc/.a/b.d/c+d").read_bytes() == b"text"
        for name, mode in (("", 0o755), ("b.d", 0o755), ("b.d/c+d", 0o640)):
            status = (point / "etc/.a" / name).stat()
            assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 0, mode)
            assert os.getxattr(point / "etc/.a" / name, "security.selinux") == b"system_u:object_r:etc_t:s0\0"
        assert scene.helper("write", str(point), "0444", "plain", stdin=b"").returncode == 0
        assert os.listxattr(point / "plain") == []


def stream(*items: object) -> bytes:
    """Return the input of put, or of look: JSON for each of *items*, and bytes as they are."""
    return b"".join(item if isinstance(item, bytes) else f"{json.dumps(item)}\n".encode() for item in items)


def test_put_makes_what_stdin_says(scene: Scene) -> None:
    outside = scene.outside()
    with own_mount(scene) as point:
        for name, label in (("etc", b"system_u:object_r:etc_t:s0\0"), ("etc/fstab", b"system_u:object_r:fstab_t:s0\0")):
            os.setxattr(point / name, "security.selinux", label)
        odd = "etc/é \udcff\n-*"
        items = [
            *(["directory", "etc", 0o700, 9, 9], ["directory", odd, 0o2750, 1234, 4321]),
            *(["file", f"{odd}/file", 0o4711, 5, 6, 0, 4], b"one\n", ["file", "etc/fstab", 0o640, 7, 8, 0, 0]),
            *(["file", f"{odd}/file", 0, 0, 0, 4, 4], b"two\n", ["link", "etc/link", "../../../x y", 5, 6]),
            *(["file", "plain", 0o600, 0, 0, 0, 3], b"\n[]"),
        ]
        for _ in range(2):
            done = scene.helper("put", str(point), stdin=stream(*items))
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert (point / odd / "file").read_bytes() == b"one\ntwo\n"
            assert (point / "plain").read_bytes() == b"\n[]"
            assert os.readlink(point / "etc/link") == "../../../x y"
        found = {name: (point / name).lstat() for name in ("etc", odd, f"{odd}/file", "etc/fstab", "etc/link")}
        assert {name: (status.st_uid, status.st_gid, status.st_mode & 0o7777) for name, status in found.items()} == {
            "etc": (0, 0, 0o755), odd: (1234, 4321, 0o2750), f"{odd}/file": (5, 6, 0o4711), "etc/fstab": (7, 8, 0o640),
            "etc/link": (5, 6, 0o777),
        }  # fmt: skip
        labels = {
            name: os.getxattr(point / name, "security.selinux", follow_symlinks=False).decode()[18:-4] for name in found
        }
        assert labels == {name: "fstab_t" if name == "etc/fstab" else "etc_t" for name in found}
        assert os.listxattr(point / "plain") == []
        done = scene.helper("look", str(point), stdin=stream("etc", odd, "none", "etc/none/x", "plain/x", "etc/link"))
        assert [json.loads(line) for line in done.stdout.splitlines()] == [
            ["etc", "directory", ""], [odd, "directory", ""], ["etc/link", "link", "../../../x y"],
        ]  # fmt: skip
    assert scene.outside() == outside


PUT_REFUSED: dict[str, tuple[object, ...]] = {
    "no JSON": (b"x\n",),
    "no list": ("etc/x",),
    "nothing": ([],),
    "a kind alone": (["file"],),
    "an unknown kind": (["device", "x", 0o644, 0, 0],),
    "a kind that is a list": ([["file"], "x", 0o644, 0, 0, 0, 0],),
    "words are missing": (["file", "x", 0o644, 0, 0],),
    "a word more": (["directory", "x", 0o755, 0, 0, 0],),
    "a path that is a number": (["directory", 1, 0o755, 0, 0],),
    "an empty path": (["directory", "", 0o755, 0, 0],),
    "the root": (["directory", ".", 0o755, 0, 0],),
    "..": (["file", "../x", 0o644, 0, 0, 0, 0],),
    ".. in the middle": (["file", "etc/../x", 0o644, 0, 0, 0, 0],),
    ".. at the end": (["link", "etc/..", "x", 0, 0],),
    "absolute": (["file", "/etc/x", 0o644, 0, 0, 0, 0],),
    "a slash at the end": (["directory", "etc/x/", 0o755, 0, 0],),
    "a zero byte": (["file", "etc/x\0y", 0o644, 0, 0, 0, 0],),
    "a long name": (["file", "x" * 256, 0o644, 0, 0, 0, 0],),
    "a deep path": (["file", "/".join("x" * 300), 0o644, 0, 0, 0, 0],),
    "a lone surrogate": (["file", "\ud800", 0o644, 0, 0, 0, 0],),
    "a long line": (["link", "x", "y" * 70_000, 0, 0],),
    "a negative owner": (["directory", "x", 0o755, -1, 0],),
    "no owner": (["directory", "x", 0o755, (1 << 32) - 1, 0],),
    "an owner that is none": (["directory", "x", 0o755, True, 0],),
    "a name of an owner": (["directory", "x", 0o755, "root", 0],),
    "a mode with a type": (["file", "x", 0o100644, 0, 0, 0, 0],),
    "a negative size": (["file", "x", 0o644, 0, 0, 0, -1],),
    "a size of many digits": (b'["file", "x", 420, 0, 0, 0, ' + b"9" * 5000 + b"]\n",),
    "a size that is no number": (b'["file", "x", 420, 0, 0, 0, NaN]\n',),
    "an empty target": (["link", "x", "", 0, 0],),
    "too few bytes": (["file", "x", 0o644, 0, 0, 0, 5], b"four"),
    "no directory": (["file", "none/x", 0o644, 0, 0, 0, 0],),
    "below a file": (["file", "etc/fstab/x", 0o644, 0, 0, 0, 0],),
    "below a link": (["file", "var/lib/secret/x", 0o644, 0, 0, 0, 0],),
    "a new directory below a link": (["directory", "var/adm/autoinstall/x", 0o755, 0, 0],),
    "a file over a link": (["file", "var/lib/secret", 0o644, 0, 0, 0, 0],),
    "the rest of a file over a link": (["file", "var/lib/secret", 0o644, 0, 0, 14, 1], b"x"),
    "a file over a directory": (["file", "etc", 0o644, 0, 0, 0, 0],),
    "a file over a pipe": (["file", "var/log/YaST2/fifo", 0o644, 0, 0, 0, 0],),
    "a file over a device": (["file", "var/log/YaST2/y2log", 0o644, 0, 0, 0, 0],),
    "a link over a file": (["link", "etc/fstab", "x", 0, 0],),
    "a directory over a link": (["directory", "var/lib/secret", 0o755, 0, 0],),
    "the rest of nothing": (["file", "x", 0o644, 0, 0, 5, 1], b"x"),
    "the rest of another file": (["file", "etc/fstab", 0o644, 0, 0, 1 << 40, 1], b"x"),
}


def test_put_refuses_what_it_does_not_know(scene: Scene) -> None:
    outside = scene.outside()
    with own_mount(scene) as point:
        before = {path: path.lstat()[:3] for path in point.rglob("*")}
        for name, items in PUT_REFUSED.items():
            done = scene.helper("put", str(point), stdin=stream(*items))
            assert done.returncode == 1, name
            assert done.stderr.startswith("image-factory-sudo-helper: ") and done.stderr.count("\n") == 1, name
            assert "Traceback" not in done.stderr, name
            # What has too few bytes is there in part.
            (point / "x").unlink(missing_ok=True)
        for line in (b"x\n", b"1\n", stream("../etc"), stream("/etc/passwd"), stream([]), b'"' + b"x" * 70_000):
            assert scene.helper("look", str(point), stdin=line).returncode == 1
        done = scene.helper("look", str(point), stdin=stream("var/lib/secret/file", "var/adm/autoinstall/x"))
        assert (done.returncode, done.stdout) == (0, "")
        assert {path: path.lstat()[:3] for path in point.rglob("*")} == before
    assert scene.outside() == outside


@pytest.mark.parametrize("flag", ["i", "a"])
def test_attributes_do_not_stop_it(scene: Scene, flag: str) -> None:
    with own_mount(scene) as point:
        run("mkdir", "-p", point / "d/e/f")
        for name in ("d/e/f/g", "d/h", "etc/x", "etc/y"):
            (point / name).write_text("text")
        run("chattr", "-R", f"+{flag}", point / "d", point / "etc")
        assert scene.helper("truncate", str(point), "etc/x").stdout == "1 4 etc/x\n"
        assert scene.helper("rename", str(point), "etc/x", "z").returncode == 0
        assert scene.helper("write", str(point), "0644", "etc/y", stdin=b"new").returncode == 0
        run("chattr", f"+{flag}", point / "etc", point / "etc/y")
        items = (["file", "etc/y", 0o644, 0, 0, 0, 3], b"new", ["directory", "etc/new", 0o755, 0, 0])
        assert scene.helper("put", str(point), stdin=stream(*items)).returncode == 0
        run("chattr", f"+{flag}", point / "etc")
        assert scene.helper("write", str(point), "0644", "etc/new/file", stdin=b"new").returncode == 0
        assert scene.helper("remove", str(point), "d/*").stdout == "3 4 d/e\n1 4 d/h\n"
        assert [path.name for path in (point / "d").iterdir()] == []
        assert ((point / "etc/y").read_text(), (point / "etc/z").read_text()) == ("new", "")
        # What was not changed is what it was.
        assert flag in run("lsattr", "-d", point / "etc/fstab").stdout.split()[0]
        run("chattr", "-R", f"-{flag}", point / "etc")


def test_lost_and_found_is_no_one_s(scene: Scene) -> None:
    with own_mount(scene) as point:
        assert "lost+found" not in scene.helper("list", str(point), "*").stdout
        assert scene.helper("remove", str(point), "*").returncode == 0
        assert [path.name for path in point.iterdir()] == ["lost+found"]


def test_trim_frees_blocks(scene: Scene) -> None:
    with own_mount(scene) as point:
        done = scene.helper("trim", str(point))
        assert done.returncode == 0
        assert 1 << 20 < int(done.stdout) < IMAGE_SIZE


def test_keys_are_searched_for(scene: Scene) -> None:
    with own_mount(scene) as point:
        directory = point / "usr/share/k"
        directory.mkdir(parents=True)
        (directory / "a.pem").write_text("text\n-----BEGIN EC PRIVATE KEY-----\n")
        (directory / "b.P12").write_bytes(b"\x30")
        (directory / "long").write_bytes(b"-----BEGIN PRIVATE KEY-----".ljust((1 << 20) + 1))
        (directory / "c.txt").write_text("no key")
        (directory / "link.pem").symlink_to("a.pem")
        done = scene.helper("keys", str(point))
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [path for path, _ in lines] == ["usr/share/k/a.pem", "usr/share/k/b.P12"]
        assert zlib.decompress(base64.b64decode(lines[0][1])) == (directory / "a.pem").read_bytes()
        assert scene.helper("keys", str(point), "usr/share").stdout == done.stdout
        assert scene.helper("keys", str(point), "etc").stdout == ""


def test_contents_are_those_of_the_mounts(scene: Scene) -> None:
    """A second mount is below the first in the tar alone; nothing of the machine's is in it, and it is as it was."""
    before = scene.outside()
    with own_mount(scene) as other:
        words = [f":{scene.mounts['a']}", f"etc:{other}:var/log", "--exclude=./root/install.l*", "--mtime=@3"]
        argv = [*scene.users["a"].argv("sudo", "-n", scene.users["a"].helper), "contents", *words]
        done = subprocess.run(argv, capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, b"")
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            members = {member.name: member for member in archive.getmembers()}
        assert {"./etc/installer/syslog", "./etc/YaST2/fifo", "./var/log/installer/syslog"} <= {*members}
        assert not {"./etc/fstab", "./root/install.log", "./lost+found", "./etc/passwd"} & {*members}
        assert members["./var/lib"].linkname == str(scene.victim.parent) and "./var/lib/secret" not in members
        assert members["./var/log/YaST2/y2log"].ischr() and members["./usr/bin/rootshell"].mode == 0o4755
        assert {member.mtime for member in members.values()} == {3}
        # What is mounted for it is seen by nobody else.
        assert (scene.mounts["a"] / "etc/fstab").exists()
    assert scene.outside() == before


def test_contents_end_with_who_reads_them(scene: Scene) -> None:
    argv = [*scene.users["a"].argv("sudo", "-n", scene.users["a"].helper), "contents", f":{scene.mounts['a']}"]
    with own_mount(scene) as point:
        argv[-1] = f":{point}"
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            process.stdout.close()
            assert process.wait(PATIENCE) == 1
            assert process.stderr is not None
            assert b"nobody waits for it any more" in process.stderr.read()


def test_read_only_mount_changes_nothing(scene: Scene) -> None:
    point, image = scene.directories["a"] / "empty", scene.images["a"].with_name("as-it-is.raw")
    scene.users["a"].run("cp", scene.images["a"], image)
    # What is mounted has a journal, which is played where it can be written.
    assert scene.helper(*scene.mount_words(image, point), "read-only").returncode == 1
    assert run("e2fsck", "-p", image, check=False).returncode in (0, 1)
    scene.users["a"].run("chmod", "400", image)
    before = image.read_bytes()
    assert scene.helper(*scene.mount_words(image, point), "read-only").returncode == 0
    done = scene.helper("remove", str(point), "root/install.log")
    assert (done.returncode, "Read-only file system" in done.stderr) == (1, True)
    assert scene.helper("show", str(point), "root/install.log").stdout
    assert scene.helper("umount", str(point)).returncode == 0
    assert image.read_bytes() == before
    image.unlink()


def test_usage_counts_what_is_inside(scene: Scene) -> None:
    with own_mount(scene) as point:
        data, odd = point / "usr/data", point / "usr" / "a\x1b[31m\nb c"
        data.write_bytes(bytes(range(256)) * 4096)
        os.link(data, point / "var/again")
        (point / "top").write_bytes(b"x" * 8192)
        odd.mkdir()
        (odd / "file").write_bytes(b"x" * 4096)
        os.sync()
        done = scene.helper("usage", str(point))
        assert (done.returncode, done.stderr) == (0, "")
        found = {name: int(size) for size, name in (line.split(" ", 1) for line in done.stdout.splitlines())}
        assert list(found) == ["etc", "lost+found", "root", "usr", "var", "."]
        assert found["."] == 8192
        # As du counts it: what is behind the links is not in it, and a file with two names is once.
        shown = run("du", "--block-size=1", "--max-depth=1", point / "usr", point / "var").stdout
        assert f"{found['usr']}\t{point}/usr\n" in shown
        assert f"{found['var']}\t{point}/var\n" in shown
        done = scene.helper("usage", str(point), "usr")
        size = run("du", "--block-size=1", "--summarize", odd).stdout.split()[0]
        assert done.stdout.splitlines()[0] == f"{size} a?[31m?b c"
        assert [line.split(" ", 1)[1] for line in done.stdout.splitlines()[1:]] == ["bin", "."]


def test_released_forms(scene: Scene) -> None:
    """chmod, mount of a loop device and umount, as the released program called them."""
    user = scene.users["a"]
    image = user.home / "released.raw"
    user.run("cp", scene.images["a"], image)
    # The released program attached it itself, with the rights of group disk.
    device = run("losetup", "--find", "--show", image).stdout.strip()
    point = Path(user.run("mktemp", "-d", "/tmp/image-factory.XXXXXXXX").stdout.strip())
    try:
        assert scene.helper("mount", device, str(point)).returncode == 0
        assert scene.helper("umount", str(point), user="b").returncode == 1
        assert user.run("ls", point / "root", check=False).returncode != 0
        assert scene.helper("chmod", "o+rwx", f"{point}/root").returncode == 0
        user.run("rm", "-f", point / "root/install.log")
        assert scene.helper("chmod", "o-rwx", f"{point}/root").returncode == 0
        assert (point / "root").stat().st_mode & 0o7777 == 0o700
        assert scene.helper("chmod", "-R", "o+rwx", f"{point}/var/log").returncode == 0
        assert (point / "var/log/installer/syslog").stat().st_mode & 0o7 == 0o6 | 0o1
        assert scene.victim.stat().st_mode & 0o7777 == 0o600
        assert scene.helper("chmod", "o-w", f"{point}/var/log/installer/syslog").returncode == 0
        assert scene.helper("umount", str(point)).returncode == 0
        assert not os.path.ismount(point)
    finally:
        run("umount", point, check=False)
        run("losetup", "--detach", device)
        point.rmdir()


def test_loop_device_of_a_file_that_was_swapped(scene: Scene) -> None:
    """A loop device of root's file isn't the caller's when a file of the caller's has taken the name."""
    directory = scene.users["a"].directory("swapped")
    image = directory / "image.raw"
    run("cp", scene.images["a"], image)
    device = run("losetup", "--find", "--show", image).stdout.strip()
    try:
        image.unlink()
        scene.users["a"].run("cp", scene.images["a"], image)
        done = scene.helper("mount", device, str(scene.directories["a"] / "empty"))
        assert done.returncode == 1
        assert "not a regular file of yours" in done.stderr
    finally:
        run("losetup", "--detach", device)


def test_dry_run_prints_only(scene: Scene) -> None:
    """DRYRUN gets through where the sudoers line has SETENV; without it sudo removes it."""
    helper = scene.users["a"].helper
    before = machine_state()
    words = ["umount", str(scene.mounts["a"])]
    done = run("env", "DRYRUN=1", helper, *words)
    assert done.stdout == f"image-factory-sudo-helper: umount {scene.mounts['a']}\n"
    assert run("env", "DRYRUN=1", helper, "umount", "/", check=False).returncode == 1
    assert machine_state() == before


@pytest.mark.parametrize(
    "variable", ["LD_PRELOAD", "BASH_ENV", "ENV", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PATH"]
)
def test_environment_of_the_caller_is_not_used(scene: Scene, variable: str) -> None:
    home = scene.users["a"].home
    trap = home / "trap"
    trap.mkdir(exist_ok=True)
    for name in ("os.py", "contextlib.py", "sitecustomize.py", "usercustomize.py", "startup"):
        (trap / name).write_text(f"open({str(home / 'sprung')!r}, 'w').close()\n")
    done = scene.helper(
        "version", **{variable: str(trap / "startup" if variable.endswith(("ENV", "STARTUP")) else trap)}
    )
    assert done.returncode == 0 or variable == "PATH"
    assert not (home / "sprung").exists()


def test_claimed_uid_is_not_believed(scene: Scene) -> None:
    """SUDO_UID of the caller's environment is overwritten by sudo."""
    done = scene.helper("umount", str(scene.mounts["b"]), SUDO_UID="0", SUDO_GID="0")
    assert done.returncode == 1
    assert os.path.ismount(scene.mounts["b"])


def test_not_through_sudo(scene: Scene) -> None:
    user = scene.users["a"]
    done = user.run(user.helper, "umount", scene.mounts["a"], check=False)
    assert done.returncode == 1
    assert "has to be run as root, through sudo" in done.stderr


def test_closed_descriptors(scene: Scene) -> None:
    """With its standard descriptors closed, what the helper prints doesn't go into the image."""
    user = scene.users["a"]
    with own_mount(scene) as point:
        line = f"exec sudo -n {user.helper} show {point} root/install.log <&- >&- 2>&-"
        user.run("sh", "-c", line, check=False)
    run("e2fsck", "-fn", scene.images["a"])


def test_what_is_mounted_in_the_tree_is_spared(scene: Scene) -> None:
    outside = scene.users["root"].directory("mounted-inside")
    (outside / "file").write_text("root's\n")
    with own_mount(scene) as point:
        run("mount", "--bind", outside, point / "var/log/installer")
        try:
            for words in (
                ("show", str(point), "var"),
                ("list", str(point), "var/log/*"),
                ("read", str(point), "var/log/installer/file"),
                ("rename", str(point), "var/log/installer", "x"),
                ("rename", str(point), "var/log/installer/file", "x"),
                ("truncate", str(point), "var/log/installer/file"),
                ("truncate", str(point), "var/log"),
                ("write", str(point), "0644", "var/log/installer/file"),
                ("write", str(point), "0644", "var/log/installer/new"),
                ("remove", str(point), "var/log"),
                ("chmod", "-R", "o+rwx", f"{point}/var"),
            ):
                done = scene.helper(*words)
                assert (done.returncode, "root's" in done.stdout) == (1, False)
                assert "something else is mounted there" in done.stderr
            assert (outside / "file").read_text() == "root's\n"
            assert (outside / "file").stat().st_mode & 0o7777 == 0o644
        finally:
            run("umount", point / "var/log/installer")


def test_hostile_names_and_depth(scene: Scene) -> None:
    with own_mount(scene) as point:
        (point / "var/log/zz\n\x1b[2Jb").write_text("text\n")
        assert scene.helper("show", str(point), "var/log/zz*").stdout == "==> /var/log/zz??[2Jb <==\ntext\n"
        path = "var/log/zz\n\x1b[2Jb"
        line = scene.helper("read", str(point), "var/log/zz*").stdout
        assert line.count("\n") == 1
        assert line.strip().isprintable()
        assert json.loads(line) == [path, base64.b64encode(b"text\n").decode()]
        assert json.loads(scene.helper("list", str(point), "var/log/zz*").stdout) == [path, "file"]
        assert scene.helper("truncate", str(point), "var/log/zz*").stdout == "1 5 var/log/zz??[2Jb\n"
        assert scene.helper("truncate", str(point), "var/log/zz*").stdout == ""
        assert scene.helper("remove", str(point), "var/log/zz*").stdout == "1 0 var/log/zz??[2Jb\n"
        run("sh", "-c", f"cd {point}/var/log && for n in $(seq 400); do mkdir d && cd d; done")
        for words in (
            ("remove", str(point), "var/log/d"),
            ("truncate", str(point), "var/log/d"),
            ("chmod", "-R", "o+rwx", f"{point}/var/log/d"),
        ):
            done = scene.helper(*words)
            assert done.returncode == 1
            assert "too many levels" in done.stderr


def test_mount_point_is_not_moved_to_a_public_place(scene: Scene) -> None:
    """A namespace where nothing is mounted on it could rename the directory, with what looks like root's files."""
    user, point = scene.users["a"], scene.directories["a"] / "empty"
    elsewhere = user.home / "elsewhere"
    mover = subprocess.Popen(
        user.argv("unshare", "-Urm", "sh", "-c", f"read go; mv {point} {elsewhere}"), stdin=subprocess.PIPE
    )
    time.sleep(0.5)
    with own_mount(scene):
        mover.communicate(b"go\n")
        assert mover.returncode != 0
        assert os.path.ismount(point)
    assert point.owner() == user.name


def test_umount_finishes_the_image_that_a_namespace_holds(scene: Scene) -> None:
    image = scene.images["a"].with_name("copy.raw")
    with own_mount(scene) as point:
        holder = subprocess.Popen(
            scene.users["b"].argv("unshare", "-Urm", "sh", "-c", "read go"), stdin=subprocess.PIPE
        )
        time.sleep(0.5)
        assert scene.helper("remove", str(point), "root/install.log").returncode == 0
        assert scene.helper("umount", str(point)).returncode == 0
        try:
            assert "needs_recovery" not in run("dumpe2fs", "-h", image).stdout
        finally:
            holder.communicate(b"go\n")
        assert scene.helper("mount-image", str(image), "0", str(IMAGE_SIZE), str(point)).returncode == 0


def test_subvolumes_of_btrfs(scene: Scene, tmp_path: Path) -> None:
    """The default one is mounted, or with an argument the top, with the same promise; trim and umount know both."""
    user, point = scene.users["a"], scene.directories["a"] / "empty"
    image, mounted = user.home / "btrfs.raw", tmp_path / "mnt"
    run("truncate", "-s", "128M", image)
    run("mkfs.btrfs", "-q", image)
    mounted.mkdir()
    run("mount", "-o", "loop", image, mounted)
    try:
        run("btrfs", "subvolume", "create", mounted / "@")
        run("btrfs", "subvolume", "create", mounted / "@/.inner")
        (mounted / "@/.inner/file").write_text("text\n")
        (mounted / "@/link").symlink_to("/etc")
        run("btrfs", "subvolume", "set-default", mounted / "@")
    finally:
        run("umount", mounted)
    run("chown", user.name, image)
    words, outside = ["mount-image", str(image), "0", str(128 << 20), str(point)], scene.outside()
    for more, prefix, root in (([], "", "/@"), (["subvolid=5"], "@/", "/")):
        assert scene.helper(*words, *more).returncode == 0
        fields = run("findmnt", "--noheadings", "--output", "FSROOT,OPTIONS", point).stdout.split()
        assert fields[0] == root
        assert {"nosuid", "nodev", "noexec", "nosymfollow"} <= set(fields[1].split(","))
        assert scene.helper("show", str(point), f"{prefix}.inner/file").stdout.endswith(
            f"{prefix}.inner/file <==\ntext\n"
        )
        assert scene.helper("show", str(point), f"{prefix}link/passwd").stdout == ""
        assert scene.helper("trim", str(point), user="b").returncode == 1
        assert int(scene.helper("trim", str(point)).stdout) > 1 << 20
        assert scene.helper("umount", str(point), user="b").returncode == 1
        assert scene.helper("umount", str(point)).returncode == 0
    assert scene.outside() == outside


def test_subvolumes_are_told_and_removed(scene: Scene, tmp_path: Path) -> None:
    """The default one, what is none, and what others lie in stay; what is removed is gone from the blocks, too."""
    user, point = scene.users["a"], scene.directories["a"] / "empty"
    image, mounted = user.home / "snapshots.raw", tmp_path / "mnt"
    run("truncate", "-s", "128M", image)
    run("mkfs.btrfs", "-q", image)
    mounted.mkdir()
    run("mount", "-o", "loop", image, mounted)
    try:
        run("btrfs", "subvolume", "create", mounted / "@")
        (mounted / "@/directory").mkdir()
        (mounted / "@/directory/link").symlink_to("../../before")
        run("btrfs", "subvolume", "create", mounted / "@/directory/inner")
        (mounted / "@/file").write_text("what is in the snapshot alone\n")
        run("btrfs", "subvolume", "snapshot", "-r", mounted / "@", mounted / "before")
        run("btrfs", "subvolume", "snapshot", mounted, mounted / "whole")
        (mounted / "@/file").unlink()
        run("btrfs", "subvolume", "set-default", mounted / "@")
    finally:
        run("umount", mounted)
    run("chown", user.name, image)
    assert scene.helper("mount-image", str(image), "0", str(128 << 20), str(point), "subvolid=5").returncode == 0
    try:
        outside = scene.outside()
        told = [json.loads(line) for line in scene.helper("subvolumes", str(point)).stdout.splitlines()]
        assert [(path, source is not None, frozen) for _, path, _, source, frozen in told] == [
            ("@", False, False),
            ("", False, False),
            ("@/directory/inner", False, False),
            ("before", True, True),
            ("whole", True, False),
        ]
        assert told[1][0] == 5
        assert told[4][3] == told[1][2]
        assert told[3][3] == told[0][2] != told[2][2]
        for name in ("@", "@/directory", "@/directory/link", "none", "@/directory/inner/none"):
            assert scene.helper("delete-subvolume", str(point), name).returncode == 1
        assert scene.helper("delete-subvolume", str(point), "before", user="b").returncode == 1
        assert scene.outside() == outside
        assert b"in the snapshot alone" in image.read_bytes()
        done = scene.helper("delete-subvolume", str(point), "before", "@/directory/inner")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert [json.loads(line)[1] for line in scene.helper("subvolumes", str(point)).stdout.splitlines()] == [
            "@",
            "",
            "whole",
        ]
    finally:
        assert scene.helper("umount", str(point)).returncode == 0
    assert scene.helper("mount-image", str(image), "0", str(128 << 20), str(point), "subvolid=5").returncode == 0
    scene.helper("trim", str(point))
    assert scene.helper("umount", str(point)).returncode == 0
    assert b"in the snapshot alone" not in image.read_bytes()


def test_subvolume_is_made_writable_and_read_only_again(scene: Scene, tmp_path: Path) -> None:
    """A subvolume or what is mounted, and no directory, by the one who has mounted it alone."""
    user, point = scene.users["a"], scene.directories["a"] / "empty"
    image, mounted = user.home / "read-only.raw", tmp_path / "mnt"
    run("truncate", "-s", "128M", image)
    run("mkfs.btrfs", "-q", image)
    mounted.mkdir()
    run("mount", "-o", "loop", image, mounted)
    try:
        run("btrfs", "subvolume", "create", mounted / "@")
        (mounted / "@/etc").mkdir()
        run("btrfs", "subvolume", "set-default", mounted / "@")
        run("btrfs", "property", "set", mounted / "@", "ro", "true")
    finally:
        run("umount", mounted)
    run("chown", user.name, image)
    for more, path in (([], []), (["subvolid=5"], ["@"])):
        assert scene.helper("mount-image", str(image), "0", str(128 << 20), str(point), *more).returncode == 0
        file = "/".join([*path, "etc/new"])
        assert scene.helper("write", str(point), "0644", file).returncode == 1
        assert scene.helper("set-read-only", str(point), "false", *path, user="b").returncode == 1
        assert scene.helper("set-read-only", str(point), "false", *path, "etc").returncode == 1
        assert scene.helper("set-read-only", str(point), "false", *path).returncode == 0
        assert scene.helper("write", str(point), "0644", file).returncode == 0
        assert scene.helper("remove", str(point), file).returncode == 0
        assert scene.helper("set-read-only", str(point), "false", "/".join([*path, "etc"])).returncode == 1
        assert scene.helper("set-read-only", str(point), "true", *path).returncode == 0
        assert scene.helper("write", str(point), "0644", file).returncode == 1
        assert "true" in run("btrfs", "property", "get", "/".join([str(point), *path]), "ro").stdout
        assert scene.helper("umount", str(point)).returncode == 0
