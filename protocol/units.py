"""Sizes and rates in bytes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from .errors import ConfigError

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})", re.ASCII)
_MAX_SIZE = 1 << 62
_BINARY = ("KiB", "MiB", "GiB", "TiB", "PiB")


def parse_size(text: str) -> int:
    """Bytes of "4GiB", "1.5 GiB", "20GB" or "4096"; a fraction of a byte is cut off. Raises ConfigError.

    Binary (KiB, MiB, GiB, TiB, PiB) and decimal (kB to PB) units in any case. "4G" is refused: it means either.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise ConfigError(f"size {text!r} is not understood; write for example 4GiB, 500MB or a number of bytes")
    size = int(Fraction(match[1]) * unit)
    if size > _MAX_SIZE:
        raise ConfigError(f"size {text!r} is larger than any machine; write for example 4GiB")
    return size


def parse_rate(text: str) -> int:
    """Bytes per second of "50MB/s" or "50MB", in the units of `parse_size`. Raises ConfigError."""
    return parse_size(text.strip().removesuffix("/s"))


def format_size(size: int) -> str:
    """A size for people, in binary units with one decimal: "3.5 GiB"; exact below 1 KiB: "12 B"."""
    value, unit = float(size), "B"
    for larger in _BINARY:
        if abs(value) < 1023.95:  # what would round to 1024.0 is 1.0 of the next unit
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def format_enough(size: int) -> str:
    """At least `size` bytes as an option takes them, in binary units with one decimal rounded up: "3.6GiB"; exact below
    1 KiB: "12B".
    """
    tenths, unit = 10 * size, "B"
    for larger in _BINARY:
        if tenths < 10240:  # what would round to 1024.0 is 1.0 of the next unit
            break
        tenths, unit = -(-tenths // 1024), larger
    return f"{size}B" if unit == "B" else f"{tenths // 10}.{tenths % 10}{unit}"
