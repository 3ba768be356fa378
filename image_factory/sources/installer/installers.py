"""What the installers print: their phases, and what means that nothing more will come of it.

The patterns are of what they print on a serial console.  Debian's are checked against recordings of the
real installer (tests/data/consoles), the others are from the installers' sources and from logs that
people have published.
"""

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Failure:
    """Something on the console that ends an installation.

    *pattern* is searched for in each line; *message* is a sentence for the user, *hint* the likely cause
    with the key to change.  A *question* ends it only when it is the last thing that is printed.  Of one
    that is *titled* the message has the title of the dialogue too.  One that is not *certain* does not
    count when the guest powers off by itself: what is printed then may be said in passing.
    """

    pattern: str
    message: str
    hint: str
    question: bool = False
    titled: bool = False
    certain: bool = True


@dataclass(frozen=True)
class Installer:
    """An installer: *phases* are patterns of lines with the phase that they begin.

    Of *failures* that are seen together the first one counts: it says the most.
    """

    name: str
    phases: tuple[tuple[str, str], ...]
    failures: tuple[Failure, ...]
    # Live systems, which Subiquity and Agama run in, show a login prompt of their own.
    shows_login: bool = False


# What the kernel says last when the machine is to be switched off by hand, whatever its log level, perhaps behind what
# a program has left in the line.
HALTED = re.compile(
    r"^(?:.*\[ *[0-9]+\.[0-9]+\](?:\[ *[CT][0-9]+\])? )?(?:reboot: )?"
    r"(?:System halted\.?|Power off not available: System halted instead)$"
)
# A message of the kernel may come behind it.
LOGIN_PROMPT = re.compile(r"^[\w.-]+ login:(?: \[ *[0-9]+\.[0-9]+\].*)?$")
# The kernel's banner, with the time that it has at its start.
KERNEL_BANNER = re.compile(r"^(?:\[ *0\.0+\] )?Linux version [0-9]")

# By the key of the answer file: what has the machine powered off at the end.
POWER_OFF = {
    "preseed": "'d-i debian-installer/exit/poweroff boolean true' in the preseed file",
    "kickstart": "'poweroff' in the Kickstart file",
    "yast": '<halt config:type="boolean">true</halt> in <general><mode> of the profile',
    "autoinstall": "'shutdown: poweroff' in the autoinstall file",
    "agama": "inst.finish=poweroff in append",
    None: "what has the installer power off in append",
}

_CONSOLE = "The console log has its words."
_ANSWERS = "The answer file lacks an answer, or has one that the installer does not take; the console log shows which."

STAND_IN = Installer(
    "stand-in",
    (
        ("^stand-in: started", "Starting the installer"),
        ("^stand-in: partitioning", "Partitioning"),
        ("^stand-in: formatting", "Formatting"),
        ("^stand-in: writing the system", "Installing the system"),
        ("^stand-in: writing the payload", "Installing software"),
        ("^stand-in: unmounting", "Finishing the installation"),
    ),
    (
        Failure("^stand-in: error: ", "The stand-in installer has failed.", "The console log says why."),
        Failure(
            r"^stand-in: .*\[[0-9]-[0-9]\]: *$",
            "The installer waits for an answer.",
            _ANSWERS,
            question=True,
            titled=True,
        ),
    ),
)

DEBIAN = Installer(
    "Debian installer",
    (
        ("Configuring the network|Detecting network hardware", "Configuring the network"),
        ("Checking the .* archive mirror", "Checking the mirror"),
        ("Loading additional components|Downloading installer components", "Loading installer components"),
        ("Setting up the clock|Setting the clock", "Setting the clock"),
        ("Starting up the partitioner|Guided partitioning|Detecting disks and all other hardware", "Partitioning"),
        ("Partitions formatting|Formatting partitions", "Formatting"),
        ("Installing the base system", "Installing the base system"),
        ("Configuring apt(?!-)", "Configuring apt"),
        ("Select(ing)? and install(ing)? software", "Installing software"),
        ("Installing GRUB|Install(ing)? the GRUB boot loader", "Installing the boot loader"),
        ("Finishing the installation", "Finishing the installation"),
    ),
    (
        Failure(
            "Failed to partition the selected disk|too small to be automatically partitioned|No space left on device",
            "The disk is too small for what is to be installed.",
            "Set a larger image-size.",
        ),
        Failure(
            "No kernel modules were found",
            "The installer's kernel and the mirror's modules are of different versions.",
            "linux and initrd are older than what the mirror has: take those of the current release.",
        ),
        Failure(
            "Bad archive mirror|failed to download a file from the mirror|Downloading a file failed|Download problem|"
            "Failed (getting|to get) (the )?[Rr]elease|Couldn't download|mirror does not (seem to )?support|"
            "mirror .* is either not available",
            "A download from the mirror has failed.",
            "The mirror can't be reached, is broken or lacks a file: try again, or set another mirror in the answer "
            "file or in append.",
        ),
        Failure(
            "Network autoconfiguration failed|No network interfaces detected",
            "The guest's network can't be configured.",
            "See whether network gives it DHCP.",
        ),
        Failure(
            "not enough memory|insufficient memory|Low memory",
            "The installation machine has too little memory.",
            "Set a larger ram: Debian's installer needs 768 MiB, with 1G there is some to spare.",
        ),
        Failure(
            "Debootstrap Error|Failed to install the base system|[Bb]ase system installation (error|into .* failed)|"
            "Unable to install ",
            "Debian's base system can't be installed.",
            "Most often a package could not be downloaded: see whether the mirror is complete, and try again.",
        ),
        Failure(
            "Failed to run preseeded command",
            "A command of the answer file has failed.",
            "See preseed/late_command and preseed/early_command there; the console log has the command.",
        ),
        Failure("Installation step failed|installation step failed", "A step of the installer has failed.", _ANSWERS),
        Failure("!! ERROR: ", "The installer has stopped with an error.", _CONSOLE, titled=True),
        Failure(
            "^Prompt: .*|<Go Back>|<Yes> +<No>|<Continue>|to continue\\.?\\]?$",
            "The installer waits for an answer.",
            _ANSWERS,
            question=True,
            titled=True,
        ),
    ),
)

ANACONDA = Installer(
    "Anaconda",
    (
        ("^Starting installer, one moment", "Starting the installer"),
        ("^anaconda .* started", "Starting the installer"),
        ("^Setting up the installation environment", "Preparing the installation"),
        ("^Creating (disklabel|ext4|xfs|btrfs|swap|biosboot|efi|lvmpv) on ", "Partitioning"),
        ("^Running pre-installation (scripts|tasks)", "Preparing the installation"),
        ("^Downloading (packages|[0-9]+ RPMs)", "Downloading packages"),
        ("^(Starting package installation process|Preparing transaction)", "Installing packages"),
        (r"^Installing \S+ \([0-9]+/[0-9]+\)", "Installing packages"),
        (r"^(Configuring|Verifying) \S+ \([0-9]+/[0-9]+\)", "Configuring packages"),
        ("^Installing boot loader", "Installing the boot loader"),
        ("^Performing post-installation setup tasks", "Configuring the system"),
        ("^Configuring installed system", "Configuring the system"),
        ("^Generating initramfs", "Generating the initramfs"),
        ("^Running post-installation scripts", "Running post-installation scripts"),
        ("^Installation complete", "Finishing the installation"),
    ),
    (
        Failure(
            "Not enough space in file systems",
            "The disk is too small for the software that is to be installed.",
            "Set a larger image-size, or install less.",
        ),
        Failure(
            "The following problem occurred on line|There was a problem reading from line",
            "The Kickstart file has an error.",
            "The console log names the line; ksvalidator, of the package pykickstart, checks such files.",
        ),
        Failure(
            "(Error|Failed) setting up (the )?(base )?(software )?(repository|source)|Payload setup error|"
            "Cannot (download|retrieve) repository",
            "A download from the installation source has failed.",
            "See whether inst.repo and url name a tree that this release has, and whether the guest reaches it.",
        ),
        Failure(
            "(The following|Some) (group or module|packages?|packages, groups or modules).* (is|are) (missing|broken)|"
            "storage configuration failed",
            "The Kickstart file asks for what can't be had.",
            "The console log says what.",
        ),
        Failure(
            "Non interactive installation failed|The installation was stopped due to an error",
            "Anaconda has stopped with an error.",
            "The console log says which.",
        ),
        Failure(
            # With status 0 it is through.
            r"Pane is dead(?! \(status 0)",
            "Anaconda has died.",
            "It mostly does so for want of memory: ram = 4G is what its second stage needs from the network.",
            certain=False,
        ),
        Failure(
            "Please make a selection from the above|Please respond 'yes' or 'no'|Press ENTER to (continue|quit)",
            "The installer waits for an answer.",
            _ANSWERS,
            question=True,
            titled=True,
        ),
    ),
)

SUBIQUITY = Installer(
    "Subiquity",
    (
        ("subiquity/Network", "Configuring the network"),
        ("subiquity/Install/install/configure_apt", "Configuring apt"),
        ("stage-partitioning|curtin install partitioning step", "Partitioning"),
        ("stage-extract|curtin install extract step", "Copying the system"),
        ("stage-curthooks|curtin install curthooks step", "Configuring the system"),
        ("installing (kernel|missing packages)", "Installing software"),
        ("subiquity/(Install/install/)?postinstall|postinstall/install_", "Installing software"),
        ("run_unattended_upgrades|unattended-upgrades", "Installing updates"),
        ("subiquity/Late/run", "Running late commands"),
        ("subiquity/Shutdown", "Finishing the installation"),
    ),
    (
        Failure(
            "install_fail|An error occurred[.] Press enter|top level error",
            "Ubuntu's installer has failed.",
            "The console log says what failed.",
        ),
        Failure(
            "Malformed autoinstall|autoinstall.* (validation|failed to validate)",
            "The autoinstall file has an error.",
            "The console log says what it is.",
        ),
        Failure(
            "Continue with autoinstall[?]|Please enter the full path|\\(yes\\|no\\)",
            "The installer waits for an answer.",
            "Name the answer file with autoinstall, or add that word to append.",
            question=True,
            titled=True,
        ),
    ),
    shows_login=True,
)

AUTOYAST = Installer(
    "AutoYaST",
    (
        ("^Loading Installation System|Loading Installation System \\(", "Loading the installer"),
        ("[Ss]tarting (hardware|USB)", "Starting the installer"),
        ("Starting YaST|starting yast|Starting Installer", "Starting the installer"),
        ("Preparing disks|Creating partition|Formatting partition", "Partitioning"),
        ("Installing Packages|Installing \\S+ \\(.* remaining", "Installing packages"),
        ("Performing Installation|Perform Installation", "Installing packages"),
        ("Save Configuration|Saving configuration|Finishing Basic Installation", "Finishing the installation"),
    ),
    (
        Failure(
            "Could not find the .* (Repository|Installation System)|No repository found",
            "The installation source can't be read.",
            "See whether install= in append names a tree of this release, and whether the guest reaches it.",
        ),
        Failure(
            "(Error|error) (while )?(parsing|reading) the (control|profile|AutoYaST)|profile is not valid",
            "The AutoYaST profile has an error.",
            "The console log says what it is; xmllint checks such files.",
        ),
        Failure(
            "Not enough (disk )?space|not enough free space",
            "The disk is too small for the software that is to be installed.",
            "Set a larger image-size, or install less.",
        ),
        # YaST's own dialogues answer themselves after a while.
        Failure("Main Menu", "The installer waits for an answer.", _ANSWERS, question=True, titled=True),
    ),
)

AGAMA = Installer(
    "Agama",
    (
        ("agama-web-server|Started Agama", "Starting the installer"),
        ("agama-auto|^Probing(?! EDD)|Fetching .* profile", "Reading the answers"),
        ("Preparing disks|Partitioning", "Partitioning"),
        ("Installing software|Installing packages", "Installing packages"),
        ("Configuring the system|Writing ", "Configuring the system"),
    ),
    (
        Failure(
            "agama-auto(install)?[.]service: Failed|agama .*Failed with result",
            "Agama has failed.",
            "The console log says why; an answer file for it is JSON or Jsonnet.",
        ),
    ),
    shows_login=True,
)

# What ends any installation.
COMMON = (
    Failure(
        "Out of memory: |Out of memory and no killable|invoked oom-killer|"
        "Kernel panic - not syncing: (System is deadlocked on memory|Out of memory)",
        "The guest has run out of memory.",
        "Set a larger ram; Anaconda's second stage, for example, needs 4G.",
    ),
    Failure(
        "Kernel panic - not syncing: VFS",
        "The installer's kernel has found no initrd that it can use.",
        "linux and initrd don't belong together, or ram is too small for them.",
    ),
    Failure(
        # Of the code that unpacks it, which has nothing but this to say it with.
        "^-- System halted$",
        "The installer's kernel can't be started.",
        "The console log says why; linux is damaged, is another machine's, or ram is too small.",
    ),
    Failure(
        "Kernel panic - not syncing",
        "The guest's kernel has panicked.",
        "The console log shows where. Often ram is too small, or the CPU lacks what the release needs.",
    ),
    Failure(
        "[Nn]o bootable device",
        "There is nothing to boot from.",
        "See whether linux and initrd, or installer_image, are an installer's.",
    ),
    Failure(
        r"^Traceback \(most recent call last\):",
        "A program of the installer has crashed.",
        "The console log has what it said. Often ram is too small.",
        certain=False,
    ),
    Failure(
        # Of systemd, dracut, initramfs-tools, bash and GRUB.
        r"for maintenance:?$|or press Control-D to continue|^dracut:/#|^\(initramfs\)$|^(ba)?sh-[0-9.]+#$|^grub>",
        "The guest has stopped at an emergency shell.",
        "The console log says why; often it is what append names, or a disk or network that is not there.",
        question=True,
    ),
)

# By the key of the answer file.
_BY_ANSWER_FILE = {
    "preseed": (DEBIAN,),
    "kickstart": (ANACONDA,),
    "yast": (AUTOYAST, AGAMA),
    "autoinstall": (SUBIQUITY,),
    "agama": (AGAMA,),
    None: (DEBIAN, ANACONDA, SUBIQUITY, AUTOYAST, AGAMA),
}


def possible(answer_file_key: str | None) -> tuple[Installer, ...]:
    """Return the installers that take an answer file of this key; all without one."""
    return (STAND_IN, *_BY_ANSWER_FILE[answer_file_key])


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def phase_of(installers: tuple[Installer, ...], line: str) -> str | None:
    """Return the phase that *line* says has begun, or goes on."""
    for installer in installers:
        for pattern, phase in installer.phases:
            if _compiled(pattern).search(line):
                return phase
    return None


def failure_of(installers: tuple[Installer, ...], line: str) -> Failure | None:
    """Return the failure that *line* is a sign of; without *installers*, of those that any guest may have."""
    for failure in failures_of(installers):
        if _compiled(failure.pattern).search(line):
            return failure
    return None


def failures_of(installers: tuple[Installer, ...]) -> tuple[Failure, ...]:
    """Return all failures of *installers*, those that say the most first."""
    own = tuple(failure for installer in installers for failure in installer.failures)
    all_failures = (*own, *COMMON)
    return (*(f for f in all_failures if not f.question), *(f for f in all_failures if f.question))


_PERCENT = re.compile(r"\b([0-9]{1,3})(?:\.[0-9]+)? ?%")
_COUNTER = re.compile(r"\(([0-9]{1,6})/([0-9]{1,6})\)")


def fraction_of(line: str) -> float | None:
    """Return how much is done, from 0 to 1, if *line* says it: the last percentage, or a counter ``(3/10)``."""
    percentages = _PERCENT.findall(line)
    if percentages:
        return min(int(percentages[-1]), 100) / 100
    counters = _COUNTER.findall(line)
    if counters and int(counters[-1][1]) > 0:
        return min(int(counters[-1][0]) / int(counters[-1][1]), 1.0)
    return None
