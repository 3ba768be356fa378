"""Sizes and durations as people write them."""

import math
import re
from fractions import Fraction

SIZE_FORMS = "a size above zero such as 2G, 2.5G, 512 MiB, 2 GB or a number of bytes"

_PREFIXES = "KMGTPE"
# qemu-img counts file sizes in a signed 64-bit integer.
_LARGEST = 2**63 - 512


def _factor(unit: str) -> int:
    if unit in ("", "B"):
        return 1
    power = _PREFIXES.index(unit[0].upper()) + 1
    decimal = len(unit) == 2
    return int(1000**power) if decimal else int(1024**power)


def parse_size(text: str) -> int:
    """Return the number of bytes that *text* stands for.

    K, M, G, T, P and E are binary and may be small letters, as qemu-img has them; KiB, MiB, ... are
    binary too; kB, MB, GB, ... are decimal.  Raises ValueError with the accepted forms.
    """
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([kKMGTPE]?B|[kKMGTPE]iB|[kKMGTPEmgtpe]|)", text.strip())
    if not match:
        raise ValueError(SIZE_FORMS)
    number, unit = match.groups()
    size = Fraction(number) * _factor(unit)
    if (unit in ("", "B") and size.denominator != 1) or not 1 <= size <= _LARGEST:
        raise ValueError(SIZE_FORMS)
    return int(size)


def format_size(size: int) -> str:
    """Return *size* in bytes as a person reads it: ``1.2 GiB``."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for prefix in _PREFIXES:
        value /= 1024
        # 1023.96 would be shown as 1024.0.
        if value < 1023.95 or prefix == _PREFIXES[-1]:
            break
    return f"{value:.1f} {prefix}iB"


DURATION_FORMS = "a time above zero such as 90s, 10m, 2h or 1h 30m, or none"

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Return the seconds that *text* stands for; ``none`` is infinity, a number alone has seconds.

    Raises ValueError with the accepted forms.
    """
    text = text.strip().lower()
    if text == "none":
        return math.inf
    match = re.fullmatch(r"[0-9]{1,9}|(?:[0-9]{1,9}d\s*)?(?:[0-9]{1,9}h\s*)?(?:[0-9]{1,9}m\s*)?(?:[0-9]{1,9}s)?", text)
    if not match:
        raise ValueError(DURATION_FORMS)
    parts = re.findall(r"([0-9]+)([dhms]?)", text)
    seconds = sum(int(number) * _SECONDS[unit or "s"] for number, unit in parts)
    if seconds == 0:
        raise ValueError(DURATION_FORMS)
    return float(seconds)


def format_duration(seconds: float) -> str:
    """Return *seconds* as a person reads them: ``1 h 5 min``, ``12 min``, ``40 s``."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def parse_percentage(text: str) -> float | None:
    """Return the fraction in a line of ``qemu-img -p``, None if it is another line."""
    match = re.fullmatch(r"\s*\(([0-9]{1,3}\.[0-9]{2})/100%\)\s*", text)
    return float(match[1]) / 100 if match else None
