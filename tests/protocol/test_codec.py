"""The codec: valid messages survive, everything else is a ProtocolViolation, and small inputs stay small."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.wire import ALL_MESSAGES, any_message, peak_bytes

from moehive.protocol import limits
from moehive.protocol.codec import (
    Check,
    Message,
    blob,
    boolean,
    decode,
    encode,
    hash_text,
    integer,
    integers,
    number,
    one_of,
    text,
    texts,
    unpack_map,
)
from moehive.protocol.errors import ProtocolViolation
from moehive.protocol.messages import Cancel, Hello, Load

HELLO = {"agent": "x", "proof": bytes(32)}
json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.binary(), inner, max_size=4),
    max_leaves=8,
)


@given(any_message)
def test_round_trip(message: Message) -> None:
    assert decode(type(message), encode(message)) == message


@given(st.sampled_from(ALL_MESSAGES), st.binary(max_size=100))
def test_random_bytes_are_read_or_refused(kind: type[Message], data: bytes) -> None:
    with contextlib.suppress(ProtocolViolation):
        decode(kind, data)


@given(any_message, st.data())
def test_perturbed_bytes_are_read_or_refused(message: Message, data: st.DataObject) -> None:
    meta = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        meta[data.draw(st.integers(0, len(meta) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolViolation):
        decode(type(message), bytes(meta))


@given(any_message, st.data())
def test_truncated_bytes_and_tails_are_refused(message: Message, data: st.DataObject) -> None:
    meta = encode(message)
    with pytest.raises(ProtocolViolation):
        decode(type(message), meta[: data.draw(st.integers(0, len(meta) - 1))])
    with pytest.raises(ProtocolViolation):
        decode(type(message), meta + data.draw(st.binary(min_size=1, max_size=4)))


@given(st.sampled_from(ALL_MESSAGES), st.data())
def test_a_field_of_any_other_type_is_read_or_refused(kind: type[Message], data: st.DataObject) -> None:
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    fields = {name: data.draw(json_like) for name in names}
    with contextlib.suppress(ProtocolViolation):
        decode(kind, msgpack.packb(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"agent": "x"},
        {},
        HELLO | {"extra": 1},
        {"agent": "x", b"proof": bytes(32)},
        HELLO | {"proof": bytes(31)},
        HELLO | {"proof": "x" * 32},
        HELLO | {"agent": "x" * 65},
        HELLO | {"agent": b"x"},
        HELLO | {"agent": "\x1b[2J"},
        HELLO | {"agent": None},
    ],
)
def test_wrong_fields_are_refused(fields: dict[Any, Any]) -> None:
    assert decode(Hello, msgpack.packb(HELLO)).agent == "x"
    with pytest.raises(ProtocolViolation):
        decode(Hello, msgpack.packb(fields))


def test_an_error_does_not_repeat_what_the_peer_sent() -> None:
    meta = msgpack.packb({f"\x1b[31m{i}" + "y" * 2000: 0 for i in range(30)})
    with pytest.raises(ProtocolViolation) as caught:
        decode(Hello, meta)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


# --- msgpack ------------------------------------------------------------------------------------------------------

_NAME, _PROOF = msgpack.packb("agent"), msgpack.packb("proof") + msgpack.packb(bytes(32))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x90", id="a list"),
        pytest.param(b"\xc1", id="the reserved byte"),
        pytest.param(b"\x81\x01\x01", id="an integer as key"),
        pytest.param(b"\x81\xcb\x7f\xf8" + bytes(6) + b"\x01", id="nan as key"),
        pytest.param(b"\x81\xc0\x01", id="nil as key"),
        pytest.param(b"\x81\x90\x01", id="a list as key"),
        pytest.param(b"\x81\x80\x01", id="a map as key"),
        pytest.param(b"\x81\xd6\xff" + bytes(4) + b"\x01", id="a timestamp as key"),
        pytest.param(b"\x81\xa1a\xd6\xff" + bytes(4), id="a timestamp"),
        pytest.param(b"\x81\xa1a\xd4\x05x", id="an extension type"),
        pytest.param(b"\x82\xa1a\x01\xa1a\x01", id="a key twice"),
        pytest.param(b"\x81\xa1a\x82\xa1b\x01\xa1b\x02", id="a key twice further in"),
        pytest.param(b"\x81\xa1a\xa1\xff", id="text that is not UTF-8"),
        pytest.param(b"\x81\xa1a\xa3\xed\xa0\x80", id="a surrogate"),
        pytest.param(b"\x80\x80", id="two maps"),
        pytest.param(b"\x81\xc4\x01a\x01", id="bytes as key"),
        pytest.param(b"\x81\xa1a\x81\xa1b\x01", id="a map in a map"),
        pytest.param(b"\x81\xa1a\x91\x91\x01", id="a list in a list"),
        pytest.param(b"\x81\xa1a\x91\x81\xa1b\x01", id="a map in a list"),
        pytest.param(b"\x81\xa1a", id="a name without a value"),
        pytest.param(b"\x81\xa1a\x92\x01", id="a list that is too short"),
    ],
)
def test_msgpack_that_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        unpack_map(data, 1000)


def test_the_same_message_with_a_repeated_field_is_refused() -> None:
    once = b"\x82" + _NAME + b"\xa1x" + _PROOF
    assert decode(Hello, once) == Hello(agent="x", proof=bytes(32))
    with pytest.raises(ProtocolViolation):
        decode(Hello, b"\x83" + _NAME + b"\xa1y" + once[1:])


def test_the_byte_limit() -> None:
    data = msgpack.packb({"a": bytes(10)})
    assert unpack_map(data, len(data)) == {"a": bytes(10)}
    with pytest.raises(ProtocolViolation):
        unpack_map(data, len(data) - 1)


def test_the_item_limits() -> None:
    items, names = limits.MAX_LIST_ITEMS, [str(i) for i in range(limits.MAX_MAP_ITEMS + 1)]
    assert unpack_map(msgpack.packb({"a": [0] * items}), 1 << 16)
    assert unpack_map(msgpack.packb(dict.fromkeys(names[:-1])), 1 << 16)
    for value in ({"a": [0] * (items + 1)}, dict.fromkeys(names)):
        with pytest.raises(ProtocolViolation):
            unpack_map(msgpack.packb(value), 1 << 16)


@pytest.mark.parametrize("count", [0, 1, 15, 16, limits.MAX_LIST_ITEMS])
def test_lists_in_every_encoding(count: int) -> None:
    items = bytes(count)
    encodings = [b"\xdd" + struct.pack(">I", count), b"\xdc" + struct.pack(">H", count)]
    for mark in encodings + ([bytes([0x90 | count])] if count < 16 else []):
        assert unpack_map(b"\x82\xa1a" + mark + items + b"\xa1b\x01", 1 << 16) == {"a": list(items), "b": 1}


def test_an_empty_input_allocates_little() -> None:
    def attack() -> None:
        with pytest.raises(ProtocolViolation):
            unpack_map(b"", 1000)

    assert peak_bytes(attack) < 100_000


@pytest.mark.parametrize(
    "claim",
    [
        pytest.param(b"\xdb\xff\xff\xff\xff", id="text"),
        pytest.param(b"\xc6\xff\xff\xff\xff", id="bytes"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="list"),
        pytest.param(b"\xdd" + struct.pack(">I", limits.MAX_LIST_ITEMS), id="list at the limit"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="map"),
        pytest.param(b"\xdf" + struct.pack(">I", limits.MAX_MAP_ITEMS), id="map at the limit"),
        pytest.param(b"\xc9\xff\xff\xff\xff\x05", id="extension"),
    ],
)
@pytest.mark.parametrize("pad", [0, limits.MAX_META_BYTES])
def test_declared_lengths_allocate_little(claim: bytes, pad: int) -> None:
    data = (b"\x81\xa1a" + claim).ljust(pad, b"\x00")

    def attack() -> None:
        with pytest.raises(ProtocolViolation):
            unpack_map(data, limits.MAX_META_BYTES)

    assert peak_bytes(attack) < 6 * limits.MAX_META_BYTES


@pytest.mark.parametrize("count", [limits.MAX_LIST_ITEMS, 0xFF00, 10_000])
@pytest.mark.parametrize("depth", [100, 500, 1000, 20_000])
def test_nested_claims_stay_bounded(count: int, depth: int) -> None:
    data = (b"\x81\xa1a" + (b"\xdc" + struct.pack(">H", count)) * depth).ljust(limits.MAX_META_BYTES, b"\x00")

    def attack() -> None:
        with pytest.raises(ProtocolViolation):
            unpack_map(data, limits.MAX_META_BYTES)

    assert peak_bytes(attack) < 3 * limits.MAX_META_BYTES


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa0"])
def test_deep_nesting_is_refused(opener: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        unpack_map(opener * 20_000 + b"\x00", limits.MAX_META_BYTES)


# --- checks -------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (integer(1, 5), [1, 5], [0, 6, True, 1.0, "1", None, -(1 << 63), NAN]),
        (integers(0, 3, 2), [[], [0, 3]], [[0, 1, 2], [4], [True], (0, 1), "01", None, [[0]]]),
        (number(0.0, 5.0), [0, 5, 0.0, 5.0, -0.0], [NAN, INF, -INF, -1, 5.1, True, "1", None, 1 << 64]),
        (text(3), ["", "abc", "äöü"], ["abcd", b"abc", None, 1, "a\n", "\x1b[m", "\u202e", "\ud800"]),
        (texts(3, 2), [[], ["abc", ""]], [["a", "b", "c"], ["abcd"], "abc", [1], ["\r"], None]),
        (one_of("sum", "rows"), ["sum", "rows"], ["", "SUM", b"sum", None, 0]),
        (blob(2, 3), [b"ab", b"abc"], [b"a", b"abcd", "ab", None]),
        (hash_text, ["0" * 64], ["0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n", b"0" * 64, "\u0660" * 64, 0]),
        (boolean, [True, False], [0, 1, "true", None]),
    ],
)
def test_checks(check: Check, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert check(value) == (tuple(value) if isinstance(value, list) else value)
    for value in bad:
        with pytest.raises(ValueError, match="expected"):
            check(value)


def test_numbers_are_floats_however_they_were_written() -> None:
    fields = {"queued_requests": 1, "expected_wait": 2, "rows_done": 3, "bytes_sent": 4}
    load = decode(Load, msgpack.packb(fields))
    assert type(load.expected_wait) is float
    assert load == decode(Load, msgpack.packb(fields | {"expected_wait": 2.0}))


def test_the_empty_message() -> None:
    assert encode(Cancel()) == b"\x80"
    assert decode(Cancel, b"\x80") == Cancel()
