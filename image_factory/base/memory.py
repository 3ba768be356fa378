"""This machine's memory."""

from pathlib import Path

_MEMORY = Path("/proc/meminfo")


def free_memory() -> int:
    """Return the bytes of memory that programs can have without swapping."""
    for line in _MEMORY.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) << 10
    return 0
