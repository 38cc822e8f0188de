from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.errors import ConfigError
from moehive.protocol.units import format_enough, format_size, parse_rate, parse_size


@pytest.mark.parametrize(("text", "rate"), [("50MB/s", 50 * 10**6), (" 1.5 MiB/s ", 3 << 19), ("4096", 4096)])
def test_rates_are_read(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "/s", "50MB/min", "50Mbit/s", "50MB/s/s", "50MB / s"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write for example"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("12B", 12),
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        (" 20 GB ", 20 * 10**9),
        ("1.5 MiB", 3 << 19),
        ("0.1kB", 100),
        ("0.0001KiB", 0),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1", "4G", "4 Gib/s", "1e9", "1_000", "4  GiB", ".5GiB", "٣GiB", "9" * 18 + "PiB", "nan", "4GiBs"],
)
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="4GiB"):
        parse_size(text)


@given(st.text(max_size=30))
def test_any_text_gives_a_size_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (7 << 29, "3.5 GiB"),
    ],
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 55))
def test_what_is_written_reads_back_within_its_precision(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= 0.05 * size + 1
    assert not format_size(size).startswith("1024.0")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.0KiB"),
        (1025, "1.1KiB"),
        (788800, "770.4KiB"),
        ((1 << 20) - 1, "1.0MiB"),
        (7 << 29, "3.5GiB"),
    ],
)
def test_sizes_to_type_back_are_written(size: int, text: str) -> None:
    assert format_enough(size) == text


@given(st.integers(0, 1 << 55))
def test_what_is_typed_back_is_enough_and_hardly_more(size: int) -> None:
    assert size <= parse_size(format_enough(size)) <= 1.1 * size
    assert not format_enough(size).startswith("1024.0")
