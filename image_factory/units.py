"""Sizes and times as people write them."""

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


def format_seconds(seconds: float) -> str:
    """Return *seconds* roughly, as a person says them: ``48 s``, ``9 min``, ``1 h 20 min``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


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
