"""Sizes and times as people write them."""

import pytest

from image_factory.base.units import SIZE_FORMS, format_duration, format_size, parse_size

K, M, G = 1 << 10, 1 << 20, 1 << 30

GOOD = {
    "1": 1,
    "512": 512,
    "512B": 512,
    "1K": K,
    "1k": K,
    "1kB": 1000,
    "1KB": 1000,
    "1KiB": K,
    "2G": 2 * G,
    "2g": 2 * G,
    " 2G ": 2 * G,
    "2.5G": 5 * G // 2,
    "02.50G": 5 * G // 2,
    "512 MiB": 512 * M,
    "512\tMiB": 512 * M,
    "2 GB": 2 * 10**9,
    "2 GiB": 2 * G,
    "0.5K": 512,
    "1.0001K": 1024,
    "3T": 3 << 40,
    "3t": 3 << 40,
    "1TB": 10**12,
    "1P": 1 << 50,
    "7E": 7 << 60,
    "9223372036854775296": 2**63 - 512,
}

BAD = (
    "-1G",
    "+1G",
    "0",
    "0G",
    "0.0",
    "G",
    "1e9",
    "1E9",
    "2 GX",
    "2GiBs",
    "2Gi",
    "2gb",
    "",
    " ",
    "0.0000001K",
    "0.9",
    "1.5",
    "1.5B",
    ".5G",
    "1.G",
    "1,5G",
    "1 0G",
    "1G 1G",
    "0x10",
    "1_000",
    "nan",
    "inf",
    "\u0661G",
    "2G\0",
    "8E",
    "9223372036854775297",
    "9" * 20 + "E",
    "9" * 5000,
    "1." + "0" * 5000 + "G",
)

SHOWN = {
    0: "0 B",
    1: "1 B",
    1023: "1023 B",
    K: "1.0 KiB",
    1536: "1.5 KiB",
    M - 1: "1.0 MiB",
    M: "1.0 MiB",
    2 * G: "2.0 GiB",
    G - 1: "1.0 GiB",
    1288490189: "1.2 GiB",
    1 << 40: "1.0 TiB",
    1 << 60: "1.0 EiB",
    2**63 - 512: "8.0 EiB",
    1 << 70: "1024.0 EiB",
}


@pytest.mark.parametrize(("text", "size"), GOOD.items())
def test_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:20]))
def test_size_is_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert str(caught.value) == SIZE_FORMS


@pytest.mark.parametrize(("size", "text"), SHOWN.items())
def test_size_is_shown(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize("size", [K, 1536, 2 * G, 1 << 40])
def test_what_is_shown_can_be_read(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (540, "9 min"),
        (7140, "119 min"),
        (7200, "2 h"),
        (9600, "2 h 40 min"),
        (1e7, "2777 h 47 min"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
