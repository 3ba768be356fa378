"""Show and remove what the installers leave behind."""

from collections.abc import Iterator

from ..base import interrupts
from ..base.log import logger
from ..model import Build
from ..parts import Step, on_tree
from ..system.tree import Tree

# Paths below the root; the last part may have ``*``.
INSTALLER_LOGS = (
    # Anaconda (Fedora, Enterprise Linux)
    "root/anaconda-ks.cfg",
    "root/original-ks.cfg",
    "root/install.log*",
    "var/log/anaconda*",
    # Debian installer, Subiquity
    "var/log/installer",
    # YaST (openSUSE)
    "var/log/YaST2",
    "var/lib/YaST2",
    "var/adm/autoinstall",
    # Agama (openSUSE): its scripts, which may have secrets, among them
    "var/log/agama-installation",
)

# Of these, what a reader of the log wants to see: no answer files, which hold password hashes, and
# no databases.
SHOWN_LOGS = (
    "root/install.log*",
    "var/log/anaconda*",
    "var/log/installer/syslog",
    "var/log/installer/status",
    "var/log/YaST2/y2log",
    "var/adm/autoinstall/logs",
)


def steps(build: Build) -> Iterator[Step]:
    """Give the steps on the mounted system."""
    if build.plan.settings.installer_logs:
        yield Step("Showing installer logs", on_tree(show_installer_logs))
    yield Step("Removing installer logs", on_tree(remove_installer_logs))


def show_installer_logs(build: Build, tree: Tree) -> None:
    """Print the installer's logs into the log."""
    with interrupts.interruptible():
        for line in tree.show(SHOWN_LOGS).splitlines():
            logger.info("| %s", line)


def remove_installer_logs(build: Build, tree: Tree) -> None:
    """Remove the installer's logs."""
    for gone in tree.remove(INSTALLER_LOGS):
        interrupts.check()
        logger.info("Removed /%s", gone.path)
