"""What is run beside the scripts of elements: programs of shell, and the files that elements expect to find."""

from ..inside import namespaces

# A program of bash in the namespaces of a build.  $1 is its directory; what follows are others that are written to,
# and after "--" those that are read.  All else of the machine is read-only for what runs here.
PREPARE = (
    namespaces.MAKE_PROC
    + namespaces.MAKE_DEVICES
    + r"""
set -eu -o pipefail
build=$1
writable=()
while [ "$1" != -- ]; do writable+=("$1"); shift; done
shift
read_only=("$@")
# A directory comes before those below it, which would be hidden else.
mapfile -d '' -t kept < <(printf '%s\0' "${writable[@]}" "$@" | LC_ALL=C sort -z -u)
# A script that unmounts ours is not to find this machine's, where the kernel lets that be taken away.
umount --recursive --lazy /proc 2>/dev/null || :
make_proc /proc
for place in "${writable[@]}"; do mount --rbind "$place" "$place"; done
# Directories for what lasts no longer than the build, in which what is needed of the machine's is still to be seen.
for scratch in /tmp /var/tmp; do
    held=()
    for place in "${kept[@]}"; do
        case $place in "$scratch"/*) exec {number}<"$place"; held+=("$number" "$place") ;; esac
    done
    mkdir -p -m 1777 "$build/scratch$scratch"
    chmod 1777 "$build/scratch$scratch"
    mount --bind "$build/scratch$scratch" "$scratch"
    set -- ${held[@]+"${held[@]}"}
    while [ $# != 0 ]; do
        # What is there already is of a directory that is to be seen, too.
        if [ -d "/proc/self/fd/$1" ]; then
            mkdir -p "$2"
        elif [ ! -e "$2" ]; then
            mkdir -p "${2%/*}"
            : >"$2"
        fi
        mount --no-canonicalize --rbind "/proc/self/fd/$1" "$2"
        shift 2
    done
done
# Says whether the mount at $1 stays as it is.
stays() {
    local place
    case $1 in /proc|/proc/*|/dev|/dev/*) return 0 ;; esac
    for place in "${writable[@]}"; do
        case $1 in "$place"|"$place"/*) return 0 ;; esac
    done
    for place in ${read_only[@]+"${read_only[@]}"}; do
        [ "$1" != "$place" ] || return 1
    done
    case $1 in /tmp|/tmp/*|/var/tmp|/var/tmp/*) return 0 ;; esac
    return 1
}
while read -r _ _ _ _ place options _; do
    printf -v place %b "${place//\\/\\0}"
    stays "$place" || [ ! -e "$place" ] || mount -o "remount,bind,ro${options#r[ow]}" "$place"
done < <(cat /proc/self/mountinfo)
# Programs of this machine listen at these, and do there what they are told: have none be told anything.
is_named() {
    local place
    for place in ${read_only[@]+"${read_only[@]}"}; do [ ! "$place" -ef "$1" ] || return 0; done
    return 1
}
while read -r _ _ _ _ _ _ _ place; do
    case $place in /*) [ ! -S "$place" ] || is_named "$place" || mount --bind /dev/null "$place" ;; esac
done < <(cat /proc/net/unix)
mkdir "$build/dev"
make_devices "$build/dev"
umount --recursive --lazy /dev 2>/dev/null || :
mount --rbind "$build/dev" /dev
"""
)

# What the log says of processes of a phase that has ended, before their names.
LEFT = "has left these running, which end now:"

# Runs the scripts of phase $1, "inside" the system or on the "machine" as $2 says, and ends what they leave running.
# If there is $3, that is run in their place.
PHASE = r"""
set -eu -o pipefail
phase=$1 place=$2 words=${3-}
export LC_ALL=C
cd "$CALLER_DIRECTORY" 2>/dev/null || cd /
unset CALLER_DIRECTORY OLDPWD
[ -e "$TMP_HOOKS_PATH/dib-run-parts" ] || { echo "a script has removed the hooks, $TMP_HOOKS_PATH" >&2; exit 1; }
status=0
if [ -z "$words" ] && [ ! -d "$TMP_HOOKS_PATH/$phase" ]; then
    echo "No element has scripts of $phase."
elif [ "$place" = machine ]; then
    if [ "$words" ]; then
        bash -c "$words" || status=$?
    else
        bash "$TMP_HOOKS_PATH/dib-run-parts" "$TMP_HOOKS_PATH/$phase" || status=$?
    fi
else
    target=$TMP_MOUNT_PATH/tmp/in_target.d
    mkdir -p "$target"
    mount --bind "$TMP_HOOKS_PATH" "$target"
    mount -o remount,bind,ro "$target"
    env -u TMPDIR -u VIRTUAL_ENV -u PYTHONPATH -u PERL5LIB -u LD_LIBRARY_PATH -u LD_PRELOAD -u PS4 -u OLDPWD \
        HOME=/root USER=root LOGNAME=root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        chroot "$TMP_MOUNT_PATH" \
        sh -c "${words:-/tmp/in_target.d/dib-run-parts /tmp/in_target.d/$phase}" || status=$?
fi
left=
for process in /proc/[0-9]*; do
    number=${process#/proc/}
    [ "$number" != 1 ] && [ "$number" != $$ ] && read -r state <"$process/stat" 2>/dev/null || continue
    case ${state##*) } in Z*) continue ;; esac
    name=${state#*(}
    left="$left ${name%)*}"
done
[ -z "$left" ] || echo "$phase LEFT$left"
kill -9 -1 2>/dev/null || :
if [ "$place" = inside ] && [ -d "$TMP_MOUNT_PATH/tmp/in_target.d" ]; then
    # A script can have unmounted it already.
    target=$TMP_MOUNT_PATH/tmp/in_target.d
    umount "$target" 2>/dev/null || umount -l "$target" 2>/dev/null || :
    rmdir "$target" || [ $status != 0 ] || status=1
fi
exit $status
""".replace("LEFT", LEFT)

# Has the tree $1 of build $2 be one in which programs run, or no more, as the word $3 says.
TREE = (
    namespaces.MAKE_PROC
    + r"""
set -eu -o pipefail
tree=$1 build=$2
# The filesystems of its disk, where that is mounted.
disk=()
[ ! -e "$build/run/mounted" ] || mapfile -t disk <"$build/run/mounted"
is_of_disk() {
    local each
    for each in ${disk[@]+"${disk[@]}"}; do [ "$each" != "$1" ] || return 0; done
    return 1
}
below() {
    local -A seen=()
    while read -r _ _ device root place _; do
        printf -v place %b "${place//\\/\\0}"
        case $place in
        "$tree"/*)
            # What is mounted over a filesystem of the disk comes after it.  That is there once more for each directory
            # around it that is mounted on itself.
            if is_of_disk "$place" && [ "${seen[$place]-$device $root}" = "$device $root" ]; then
                seen[$place]="$device $root"
            else
                printf '%s\0' "$place"
            fi ;;
        esac
    done </proc/self/mountinfo
}
# Takes away all that is mounted in the tree, and sees that it is.
close_tree() {
    local places
    mapfile -d '' -t places < <(below)
    for ((number = ${#places[@]} - 1; number >= 0; number--)); do
        umount "${places[number]}" 2>/dev/null || umount -l "${places[number]}" 2>/dev/null || :
    done
    mapfile -d '' -t places < <(below)
    [ ${#places[@]} = 0 ] || { echo "what is mounted at ${places[0]} can't be unmounted" >&2; exit 1; }
}
open_tree() {
    mkdir -p "$tree/proc" "$tree/sys" "$tree/dev" "$tree/tmp"
    make_proc "$tree/proc"
    if ! mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$tree/sys" 2>/dev/null; then mount --rbind /sys "$tree/sys"; fi
    mount --rbind "$build/dev" "$tree/dev"
}
# Besides what is mounted on.
has_system() {
    find "$tree" -mindepth 1 -maxdepth 1 ! -name tmp ! -name lost+found ! -name proc ! -name sys ! -name dev | grep -q .
}
# Which one is the tree: all could be well done to another one that is there in its place.
remember_tree() { stat --format %d:%i "$tree" >"$build/run/known"; }
check_tree() {
    local known
    known=$(<"$build/run/known")
    [ "$known" = "$(stat --format %d:%i "$tree" 2>/dev/null)" ] || {
        echo "a script has unmounted or replaced the tree of the system, $tree" >&2
        exit 1
    }
    has_system || {
        echo "scripts have left nothing of the system" >&2
        exit 1
    }
}
case $3 in
check)
    has_system || {
        echo "no script of root.d has made a system" >&2
        exit 1
    } ;;
open)
    if [ -d "$tree/etc" ] && [ ! -L "$tree/etc" ]; then
        names=$tree/etc/resolv.conf
        [ ! -e "$names" ] && [ ! -L "$names" ] || mv "$names" "$names.ORIG"
        cat /etc/resolv.conf >"$names" 2>/dev/null || echo nameserver 8.8.8.8 >"$names"
        chmod 644 "$names"
    fi
    remember_tree
    open_tree ;;
again)
    remember_tree
    open_tree ;;
close)
    check_tree
    close_tree ;;
detach)
    close_tree
    for ((number = ${#disk[@]} - 1; number >= 0; number--)); do umount "${disk[number]}"; done
    rm "$build/run/mounted" ;;
finish)
    check_tree
    names=$tree/etc/resolv.conf
    if [ -e "$names" ] || [ -L "$names" ]; then
        if [ -L "$names" ] || lsattr -d "$names" 2>/dev/null | grep -q '^[^ ]*i'; then
            rm -f "$names.ORIG"
        else
            rm -f "$names"
            [ ! -e "$names.ORIG" ] && [ ! -L "$names.ORIG" ] || mv "$names.ORIG" "$names"
        fi
    fi
    close_tree
    [ ! -d "$tree/tmp" ] || find "$tree/tmp" -xdev -mindepth 1 -delete
    [ ! -d "$tree/var/log" ] || find "$tree/var/log" -xdev -type f -size +0 -exec truncate -s 0 {} +
    [ ! -d "$tree/root" ] || find "$tree/root" -xdev -type f -name '*.log' -delete
    # A filesystem of a disk keeps its own.
    [ ${#disk[@]} != 0 ] || rm -rf --one-file-system "$tree/lost+found"
    # Those over which devices were mounted.
    [ ! -d "$tree/dev" ] || find "$tree/dev" -maxdepth 1 -type f -size 0 -delete ;;
esac
"""
)

# The one of this machine, and of the system: all that it needs is there in any.
RUN_PARTS = r"""#!/bin/bash
# Runs the scripts of a directory in the order of their numbers: dib-run-parts [--list] DIRECTORY
set -ue -o pipefail
only_list=
if [ "${1-}" = --list ]; then only_list=yes; shift; fi
target_dir=${1:?a directory of scripts}
target_dir=${target_dir%/}
environment=${target_dir%/*}/environment.d
say() { echo "dib-run-parts $*" >&2; }
mapfile -t _scripts < <(
    for script in "$target_dir"/*; do
        name=${script##*/}
        if [ -f "$script" ] && [ -x "$script" ] && [[ $name =~ ${RUN_PARTS_REGEX:-^[0-9A-Za-z_-]+$} ]]; then
            printf '%s\n' "$name"
        fi
    done | LC_ALL=C sort -n
)
# What it is read from may take a moment longer, and be found as left running.
wait
if [ "$only_list" ]; then
    [ ${#_scripts[@]} = 0 ] || printf "$target_dir/%s\n" "${_scripts[@]}"
    exit 0
fi
mapfile -t sourced < <(
    for file in "$environment"/*; do
        if [ -f "$file" ] && [[ ${file##*/} =~ ^[0-9A-Za-z_.-]+$ ]]; then printf '%s\n' "$file"; fi
    done | LC_ALL=C sort -n
)
wait
# No script of the phase would run, and no word would be said.
sourcing=yes
trap '[ $? != 0 ] || [ -z "$sourcing" ] || { echo "exit is not for environment.d, return is" >&2; exit 1; }' EXIT
for file in ${sourced[@]+"${sourced[@]}"}; do
    say "Sourcing $file"
    source "$file"
done
sourcing=
for name in ${_scripts[@]+"${_scripts[@]}"}; do
    say "Running $target_dir/$name"
    status=0
    "$target_dir/$name" || status=$?
    if [ $status != 0 ]; then
        say "Failed with status $status: $target_dir/$name"
        exit $status
    fi
done
say "Done with $target_dir"
"""

# The first of this name on PATH: who runs scripts here is root already.
SUDO = r"""#!/bin/bash
# Runs a command as sudo does: with -E in this environment, else in one that has root's usual variables alone.
keep=
while [[ ${1-} == -* ]]; do
    case $1 in
    -E|--preserve-env) keep=yes; shift ;;
    -n|-H|-S|-k|-b|--non-interactive|--set-home) shift ;;
    -u|--user) [ "${2-}" = root ] || { echo "sudo: only root is here, not ${2-}" >&2; exit 1; }; shift 2 ;;
    --) shift; break ;;
    *) echo "sudo: this one knows no $1" >&2; exit 1 ;;
    esac
done
given=()
while [[ ${1-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; do given+=("$1"); shift; done
[ $# != 0 ] || { echo "sudo: no command" >&2; exit 1; }
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
if [ RESTRICTED = yes ]; then
    # What the kernel refuses to root of a user namespace, said in the way that it allows.
    case $1 in
    mount)
        place=${*: -1}
        case " $* " in
        *" -t sysfs "*) set -- mount --rbind /sys "$place" ;;
        *" --bind /dev "*|*" --bind /sys "*) set -- mount --rbind "${@: -2:1}" "$place" ;;
        esac ;;
    umount) set -- umount --lazy "${*: -1}" ;;
    chroot)
        # Who makes a tree there gets no device nodes.
        for name in null zero full random urandom tty; do
            [ -d "${2-}/dev" ] && [ ! -c "$2/dev/$name" ] || continue
            [ -e "$2/dev/$name" ] || : >"$2/dev/$name"
            mount --bind "/dev/$name" "$2/dev/$name"
        done ;;
    esac
fi
if [ "$keep" ]; then
    exec env -u PYTHONPATH -u PERL5LIB -u LD_LIBRARY_PATH -u LD_PRELOAD ${given[@]+"${given[@]}"} "$@"
fi
exec env -i HOME=/root USER=root LOGNAME=root SHELL=/bin/bash TERM="${TERM:-dumb}" PATH="$path" \
    LC_ALL="${LC_ALL:-C}" ${given[@]+"${given[@]}"} "$@"
"""

DIE = r"""# Functions that elements call.
die() {
    echo "ERROR: $*" >&2
    exit 1
}
"""

COMMON_FUNCTIONS = (
    DIE
    + r"""
# Prints the options of the devpts that is mounted here, for another one.
mount_dev_pts_options() {
    local options
    options=$(awk '$2 == "/dev/pts" && $3 == "devpts" {found = $4} END {print found}' /proc/mounts)
    echo "${options:+-o $options}"
}

# Unmounts all that is mounted below the directory $1.
unmount_dir() {
    local place
    awk -v top="$1" 'index($2, top "/") == 1 {print $2}' /proc/mounts | tac | while read -r place; do
        umount "$place" || umount -l "$place"
    done
}
"""
)

IMG_FUNCTIONS = r"""# Functions that elements call.

# Finds the newest kernel in boot below $TARGET_ROOT, and its initrd: KERNEL and RAMDISK are their names, BOOTDIR the
# directory.
select_boot_kernel_initrd() {
    local top=${1:-$TARGET_ROOT} file
    BOOTDIR=$top/boot KERNEL='' RAMDISK=''
    while read -r file; do
        KERNEL=$file
    done < <(cd "$BOOTDIR" && find . -maxdepth 1 -type f -regextype posix-extended \
        -regex "./(${DIB_BAREMETAL_KERNEL_PATTERN:-vmlinu[xz]-.*|Image-.*|kernel-.*})" \
        ! -name '*rescue*' -printf '%f\n' | sort -V)
    [ "$KERNEL" ] || { echo "ERROR: there is no kernel in $BOOTDIR" >&2; return 1; }
    local version=${KERNEL#*-}
    for file in ${DIB_BAREMETAL_INITRD_PATTERN:-} "initrd.img-$version" "initramfs-$version.img" "initrd-$version" \
        "initramfs-$version"; do
        [ -e "$BOOTDIR/$file" ] && { RAMDISK=$file; break; }
    done
    [ "$RAMDISK" ] || { echo "ERROR: there is no initrd of $KERNEL in $BOOTDIR" >&2; return 1; }
    export KERNEL RAMDISK BOOTDIR
}
"""

# DIB_PYTHON_EXEC: its package of this name has what scripts import.
PYTHON = """#!/bin/sh
PYTHONPATH={stub} exec {python} "$@"
"""
LOGGING = '''"""The part of diskimage-builder's package that scripts of elements import."""

import logging


def setup():
    """Log as a script of an element does."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
'''

# By their names below the directory _LIB.
LIBRARY = {
    "die": DIE,
    "common-functions": COMMON_FUNCTIONS,
    "img-functions": IMG_FUNCTIONS,
    "common-defaults": "# Nothing is left to be set here.\n",
    "img-defaults": "# Nothing is left to be set here.\n",
    "dib-run-parts": RUN_PARTS,
    "stub/diskimage_builder/__init__.py": "",
    "stub/diskimage_builder/logging_config.py": LOGGING,
}

# In the environment of a phase on this machine.
FUNCTIONS = {
    "die": '() { echo "ERROR: $*" >&2; exit 1; }',
    "_ps4": "() { :; }",
}

INSTALL_TYPE = "export DIB_DEFAULT_INSTALLTYPE=${{DIB_DEFAULT_INSTALLTYPE:-{default}}}\n"
