"""What the tests share: this machine made ready, two ordinary users, the installed program."""

import datetime
import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

from image_factory import pipeline
from image_factory.base import log
from image_factory.machines import kvm
from image_factory.model import Artifact, Build, Disk
from image_factory.parts import State, Steps, carry_out, show

from . import small_archive as small_archive_module

REPOSITORY = Path(__file__).resolve().parent.parent


def young_day(now: float) -> str:
    """Return a time zone, as TZ has it, whose day is between one and two hours old at *now*, a time of time.time()."""
    # The sign says how far UTC is, not how far the zone is.
    return f"TEST{int(now // 3600 % 24) - 1:+d}"


# A run ends on the day on which it begins, at whatever hour.
os.environ["TZ"] = young_day(time.time())
time.tzset()
TODAY = datetime.date.today().isoformat()

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

UNIT = REPOSITORY / "tests/unit"
KVM = Path("/dev/kvm")
HIDDEN_KVM = Path("/dev/kvm.off")
# Seconds that a test waits for what has to come; a loaded machine may take its time.
PATIENCE = 180
# What tells two runs of the tests at once from each other, in the names of their users and files: see run-tests.
RUN = os.environ.get("TEST_RUN", "check")
OWN = (f"/if-{RUN}.", "/pytest-of-" if RUN == "check" else f"/pytest-{RUN}/")
# Where several runs at once say which files of tests they have taken.
TAKEN = os.environ.get("TESTS_TAKEN")
SUDOERS = Path(f"/etc/sudoers.d/image-factory-{RUN}")
# Each run that goes on holds it.
RUNS = Path("/run/lock/image-factory-tests")


def pytest_configure(config: pytest.Config) -> None:
    # What the fixtures have made goes away on these too.  A shell's background jobs and nohup ignore
    # some of them, and all that is started here would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


@functools.cache
def is_taken(path: Path) -> bool:
    """Return whether another of several runs at once has taken the tests of the file *path*; else they are ours."""
    if not TAKEN:
        return False
    try:
        (Path(TAKEN) / str(path).replace("/", "-")).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not is_taken(item.path):
        return None
    # The test before has left what it shared with this one, which the next one need not share.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def run(*argv: str | Path, check: bool = True, **keywords: object) -> subprocess.CompletedProcess[str]:
    """Run a program of the test's own; what it prints is shown if it fails."""
    done = subprocess.run(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        **keywords,  # type: ignore[call-overload]
    )
    if check and done.returncode:
        pytest.fail(f"{shlex.join(map(str, argv))} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """A test that runs the program in its own process leaves the log as it was."""
    logger = log.logger
    before = logger.propagate, logger.level, [*logger.handlers]
    yield
    logger.propagate, logger.level, logger.handlers[:] = before


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Call *condition* until it is true; fail after *seconds*, which are given where being quick is a promise."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)


def state_of(build: Build, artifacts: Sequence[Artifact] = ()) -> State:
    """Return the state of *build*, which has *artifacts*."""
    return State(build, Disk(build.disk_path), artifacts=tuple(artifacts))


def steps_of(build: Build, name: str) -> Steps:
    """Return the steps of the stage *name* of *build*."""
    [stage] = [stage for stage in pipeline.STAGES if stage.name == name]
    return pipeline.steps_of(stage, build)


def done_stage(build: Build, name: str) -> State:
    """Carry out the steps of the stage *name* on the disk of *build*; return the state after them."""
    return carry_out(state_of(build), steps_of(build, name))


def shown(build: Build, steps: Steps) -> dict[str, list[list[str]]]:
    """Return the commands of *steps* as a dry run shows them, by the names of the steps."""
    return {name: [[*argv] for argv in commands] for name, commands in show(state_of(build), steps)}


def copy_checkout(directory: Path) -> None:
    """Copy to *directory* what is tracked or will be, without what builds have left in the checkout."""
    # A checkout of another user's is none that root's git reads by itself.
    git = ("git", "-c", f"safe.directory={REPOSITORY}", "-C", REPOSITORY)
    names = run(*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout.split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, directory / name)


@pytest.fixture(scope="session")
def base() -> Iterator[Path]:
    """A directory that all users can enter; its name is short, as libvirt's sockets are below."""
    directory = Path(tempfile.mkdtemp(prefix=f"if-{RUN}.", dir="/var/tmp"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        # A gpg-agent that ends may remove its sockets at the same time, which rm takes as it is.
        run("rm", "-rf", directory)


@pytest.fixture(scope="session")
def stand_in(base: Path) -> Path:
    """The directory with the stand-in installer's linux and initrd.gz."""
    directory = base / "stand-in"
    # Another run would download the same.
    run("flock", REPOSITORY, REPOSITORY / "tests/stand_in/build", directory)
    return directory


@pytest.fixture(scope="session")
def small_archive(base: Path) -> Iterator[small_archive_module.Archive]:
    """An archive from which a small system is bootstrapped in seconds; a test changes only a copy."""
    archive = small_archive_module.Archive.made(base / "small/archive", base / "small")
    try:
        yield archive
    finally:
        archive.close()


@contextmanager
def hidden_kvm(kernel: Path) -> Iterator[None]:
    """Put /dev/kvm out of the way where it is there and useless: libguestfs would take it, libvirt is slow with it."""
    with RUNS.open("w") as runs:
        # The first run decides, others wait for that.
        with suppress(BlockingIOError):
            fcntl.flock(runs, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if KVM.exists() and kvm.why_not_kvm(kernel, "x86_64"):
                KVM.rename(HIDDEN_KVM)
        fcntl.flock(runs, fcntl.LOCK_SH)
        try:
            yield
        finally:
            # The last run shows it again, also one that a killed run has hidden.
            with suppress(BlockingIOError):
                fcntl.flock(runs, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if HIDDEN_KVM.exists() and not KVM.exists():
                    HIDDEN_KVM.rename(KVM)


@contextmanager
def daemon(name: str) -> Iterator[None]:
    """Have the daemon *name* running; if a run of the tests has started it, the last one that needs it ends it."""

    def is_gone() -> bool:
        return run("pgrep", "-x", "-u", "root", name, check=False).returncode != 0

    with Path(f"/run/image-factory-tests-{name}").open("a+") as runs:
        # As with KVM.
        with suppress(BlockingIOError):
            fcntl.flock(runs, fcntl.LOCK_EX | fcntl.LOCK_NB)
            runs.truncate(0)
            if is_gone():
                run(name, "-d")
                print("started here", file=runs, flush=True)
        fcntl.flock(runs, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with suppress(BlockingIOError):
                fcntl.flock(runs, fcntl.LOCK_EX | fcntl.LOCK_NB)
                runs.seek(0)
                if runs.read():
                    run("pkill", "-x", "-u", "root", name, check=False)
                    wait_for(is_gone, f"{name} to end")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run nothing but unit tests without root."""
    for item in items:
        if os.geteuid() != 0 and UNIT not in item.path.parents:
            pytest.exit("These tests make users and mounts, so they run as root: make check.", returncode=2)


@pytest.fixture(scope="session")
def no_useless_kvm(stand_in: Path) -> Iterator[None]:
    with hidden_kvm(stand_in / "linux"):
        yield


@pytest.fixture(scope="session")
def machine(no_useless_kvm: None) -> Iterator[None]:
    """This machine with the system's libvirt running."""
    with daemon("virtlogd"), daemon("libvirtd"):
        yield


@pytest.fixture(scope="session")
def prefix(base: Path) -> Path:
    """Where the program is installed."""
    directory = base / "usr"
    # It makes the manual in the checkout.
    run("flock", REPOSITORY, "make", "-C", REPOSITORY, "install", f"PREFIX={directory}")
    return directory


@dataclass
class User:
    """A user to build as; root has no sudo rule and needs none."""

    name: str
    home: Path
    program: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def is_root(self) -> bool:
        return self.name == "root"

    @property
    def uid(self) -> int:
        return pwd.getpwnam(self.name).pw_uid

    @property
    def helper(self) -> Path:
        return self.program.with_name("image-factory-sudo-helper")

    @property
    def libvirt_uri(self) -> str:
        return "qemu:///system" if self.is_root else "qemu:///session"

    def argv(self, *words: str | Path, **environment: str) -> list[str]:
        """Return the command that runs *words* as this user, with nothing of our environment."""
        variables = {
            "HOME": str(self.home),
            "USER": self.name,
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "TZ": os.environ["TZ"],
            **self.environment,
            **environment,
        }
        return [
            *([] if self.is_root else ["runuser", "-u", self.name, "--"]),
            "env",
            "-i",
            *(f"{key}={value}" for key, value in variables.items()),
            *map(str, words),
        ]

    def run(self, *words: str | Path, check: bool = True, **keywords: object) -> subprocess.CompletedProcess[str]:
        return run(*self.argv(*words), check=check, **{"cwd": self.home, **keywords})

    def build_process(self) -> int:
        """Return the process of the only build of this user."""
        found = run("pgrep", "-u", self.name, "-f", f"^/usr/bin/python3 {self.program}").stdout.split()
        # What it starts has its command line for a moment.
        parents = dict(line.split() for line in run("ps", "-eo", "pid=,ppid=").stdout.splitlines())
        [pid] = [pid for pid in found if parents.get(pid) not in (None, *found)]
        return int(pid)

    def directory(self, name: str) -> Path:
        """Make a directory of this user's in its home."""
        path = self.home / name
        path.mkdir(mode=0o755)
        shutil.chown(path, self.name)
        return path


@pytest.fixture(scope="session")
def users(base: Path, prefix: Path) -> Iterator[dict[str, User]]:
    """Root, and the ordinary users ``a`` and ``b``, who may run the helper as root, and ``c``, who may run nothing."""
    found = {"root": User("root", base / "root", prefix / "bin/image-factory")}
    found["root"].home.mkdir()
    with ExitStack() as stack:
        for letter in ("a", "b", "c"):
            name, home = f"image-factory-{RUN}-{letter}", base / letter
            run("userdel", name, check=False)
            run("useradd", "--no-log-init", "--create-home", "--home-dir", home, "--shell", "/bin/sh", name)
            stack.callback(remove_user, name)
            home.chmod(0o755)
            found[letter] = User(name, home, prefix / "bin/image-factory")
        rules = [f"{found[letter].name} ALL = NOPASSWD: {found[letter].helper}\n" for letter in ("a", "b")]
        SUDOERS.write_text("".join(rules))
        SUDOERS.chmod(0o440)
        stack.callback(SUDOERS.unlink)
        yield found


def remove_user(name: str) -> None:
    """End what *name* runs (its libvirt among that), and remove it."""

    def gone() -> bool:
        run("pkill", "-KILL", "-u", name, check=False)
        return run("pgrep", "-u", name, check=False).returncode != 0

    wait_for(gone, f"the processes of {name} to end")
    # libguestfs keeps its appliance there.
    shutil.rmtree(f"/var/tmp/.guestfs-{pwd.getpwnam(name).pw_uid}", ignore_errors=True)
    run("userdel", name)


def vms(user: User, directory: Path) -> list[str]:
    """Return the virtual machines of *user* that have a disk in *directory*."""
    virsh = ["virsh", "--connect", user.libvirt_uri]
    names = user.run(*virsh, "list", "--all", "--name").stdout.split()
    # Others than the test's may come and go.
    return [name for name in names if str(directory) in user.run(*virsh, "dumpxml", name, check=False).stdout]


@pytest.fixture(scope="module")
def own_helper() -> Iterator[None]:
    """The helper is the one of the checkout; at the end all is as before."""
    before = machine_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(REPOSITORY / "image-factory")])
        yield
    assert machine_state() == before


def machine_state() -> list[str]:
    """Return the loop devices, mounts and directories of this run's builds; those of others come and go."""
    # Another's directory may be about to be mounted on, or removed.
    for _ in range(6):
        state, unsure = _machine_state()
        if not unsure:
            break
        time.sleep(0.5)
    return state


def _machine_state() -> tuple[list[str], bool]:
    """Return the state of this machine, and whether a directory of root's in it may be another run's."""
    loops = run("losetup", "--list", "--raw", "--noheadings", "--output", "NAME,BACK-FILE").stdout.splitlines()
    loops = [line for line in loops if any(name in line for name in OWN)]
    devices = {line.split()[0] for line in loops}
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    mounts = [line for line in mounts if "/tmp/image-factory." in line]
    sources = {line.split()[4]: line.rpartition(" - ")[2].split()[1] for line in mounts}
    found = [path for path in Path("/tmp").glob("image-factory.*") if is_own(path, sources, devices)]
    own_mounts = [line for line in mounts if sources[line.split()[4]] in devices]
    # A link is nobody's place for mounts.
    roots = [path for path in found if whose(path) == 0 and not path.is_symlink()]
    return [*loops, *own_mounts, *map(str, found)], any(is_bare(path, sources) for path in roots)


def whose(path: Path) -> int | None:
    """Return the number of the owner of *path*, None where that has gone."""
    try:
        return path.lstat().st_uid
    except FileNotFoundError:
        return None


def is_bare(directory: Path, sources: dict[str, str]) -> bool:
    """Return whether none of the mount points of *sources* is below *directory*."""
    return not any(point.startswith(f"{directory}/") for point in sources)


def is_own(directory: Path, sources: dict[str, str], devices: set[str]) -> bool:
    """Return whether the *directory* for mounts is of this run: one of its users', or of root's with its *devices*."""
    owner = whose(directory)
    if owner != 0:
        return owner in {each.pw_uid for each in pwd.getpwall() if each.pw_name.startswith(f"image-factory-{RUN}-")}
    return is_bare(directory, sources) or any(
        point.startswith(f"{directory}/") and source in devices for point, source in sources.items()
    )


def left_behind(user: User, directory: Path) -> list[str]:
    """Return what a build of *user* in *directory* should not have left."""
    left = [f"VM {name}" for name in vms(user, directory)]
    left += [f"file {path}" for path in directory.rglob("*") if path.name.startswith(".image-factory")]
    scratch = Path("/var/lib/libvirt/boot") if user.is_root else user.home / ".cache/virt-manager/boot"
    left += [f"file {path}" for path in scratch.glob("virtinst-*")]
    pools = [Path(parent) for parent in ("/etc/libvirt/storage", "/run/libvirt/storage")]
    if not user.is_root:
        pools = [user.home / ".config/libvirt/storage", user.home / ".cache/libvirt/storage/run"]
    files = [path for parent in pools for path in parent.glob("*.xml")]
    left += [f"pool {path}" for path in files if str(directory) in path.read_text()]
    processes = run("ps", "-eo", "args").stdout.splitlines()
    left += [f"process {line}" for line in processes if "qemu-system" in line and str(directory) in line]
    return left


@contextmanager
def imported(path: Path) -> Iterator[ModuleType]:
    """Give the program *path* as a module."""
    loader = importlib.machinery.SourceFileLoader(path.name.replace("-", "_"), str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, loader.name, module)
        patch.setattr(sys, "dont_write_bytecode", True)
        loader.exec_module(module)
        yield module


@pytest.fixture(scope="session")
def helper() -> Iterator[ModuleType]:
    """image-factory-sudo-helper as a module."""
    with imported(REPOSITORY / "image-factory-sudo-helper") as module:
        yield module
