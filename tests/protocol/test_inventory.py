"""Announcements: what was signed comes back, everything else is refused, and only proven liars are named."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.wire import MODEL, hashes, peak_bytes, peer, printable, private_key

from moehive.protocol import limits
from moehive.protocol.errors import FalseClaim, MoehiveError, ProtocolViolation
from moehive.protocol.ids import ExpertKey, ModelId
from moehive.protocol.inventory import Inventory, decode_inventory, directory_key, encode_inventory

NOW = 1_800_000_000.0
DOMAIN = b"moehive inventory v2\0"
BODY: dict[str, Any] = {
    "v": 2,
    "swarm": bytes(16),
    "peer": peer(1),
    "model": MODEL,
    "issued": NOW,
    "expires": NOW + 90,
    "addresses": ["/ip4/127.0.0.1/tcp/1"],
    "skeleton": True,
    "complete": False,
    "loading": True,
    "layers": [0, 2],
    "experts": 3,
    "bitmap": bytes([0b00_101_001]),
    "rows_per_second": 10.0,
}


def signed(body: bytes, *, key: int = 1) -> bytes:
    """A record around any body, signed without the code under test."""
    return private_key(key).sign(DOMAIN + body) + body


def record(*, key: int = 1, **changes: Any) -> bytes:
    return signed(msgpack.packb(BODY | changes), key=key)


expert_keys = st.builds(ExpertKey, st.integers(0, 60), st.integers(0, 40))
inventories = st.builds(
    Inventory,
    peer=st.just(peer(1)),
    model=hashes,
    issued=st.just(NOW),
    expires=st.floats(NOW + 1, NOW + limits.MAX_RECORD_LIFETIME),
    held=st.frozensets(expert_keys, max_size=60),
    skeleton=st.booleans(),
    complete=st.booleans(),
    loading=st.booleans(),
    addresses=st.lists(printable(60), max_size=limits.MAX_ADDRESSES).map(tuple),
    rows_per_second=st.floats(0, 1e12),
    swarm=st.binary(min_size=16, max_size=16),
)


@given(inventories)
def test_round_trip(inventory: Inventory) -> None:
    assert decode_inventory(encode_inventory(inventory, private_key(1).sign), now=NOW) == inventory


def test_read_by_hand() -> None:
    inventory = decode_inventory(record(), now=NOW)
    assert inventory.held == {(0, 0), (2, 0), (2, 2)}
    assert inventory.skeleton
    assert inventory.addresses == ("/ip4/127.0.0.1/tcp/1",)


def test_a_node_that_holds_all_of_the_largest_layout_fits() -> None:
    held = frozenset(ExpertKey(layer, expert) for layer in range(512) for expert in range(192))
    inventory = Inventory(peer(1), ModelId(MODEL), NOW, NOW + 60, held)
    encoded = encode_inventory(inventory, private_key(1).sign)
    assert len(encoded) <= limits.MAX_RECORD_BYTES
    assert decode_inventory(encoded, now=NOW).held == held


# --- bytes --------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((ProtocolViolation, FalseClaim)):
        decode_inventory(data, now=NOW)
    with pytest.raises((ProtocolViolation, FalseClaim)):
        decode_inventory(signed(data), now=NOW)


@given(st.data())
def test_any_altered_byte_is_refused_and_nobody_is_blamed(data: st.DataObject) -> None:
    altered = bytearray(record())
    altered[data.draw(st.integers(0, len(altered) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises((ProtocolViolation, FalseClaim)) as caught:
        decode_inventory(bytes(altered), now=NOW)
    assert caught.value.peer == ""


@given(st.data())
def test_truncated_records_are_refused(data: st.DataObject) -> None:
    whole = record()
    with pytest.raises(ProtocolViolation):
        decode_inventory(whole[: data.draw(st.integers(0, len(whole) - 1))], now=NOW)


@given(st.sampled_from(sorted(BODY)), st.none() | st.booleans() | st.integers(-5, 1 << 63) | st.floats() | st.text())
def test_a_signed_field_of_any_value_is_read_or_refused(name: str, value: object) -> None:
    with contextlib.suppress(ProtocolViolation, FalseClaim):
        decode_inventory(signed(msgpack.packb(BODY | {name: value})), now=NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 1},
        {"v": 3},
        {"model": "x"},
        {"issued": "now"},
        {"issued": math.nan},
        {"expires": math.nan},
        {"expires": math.inf},
        {"expires": -1.0},
        {"addresses": ["a"] * (limits.MAX_ADDRESSES + 1)},
        {"addresses": ["a" * (limits.MAX_ADDRESS_CHARS + 1)]},
        {"addresses": ["\x1b[2J"]},
        {"skeleton": 1},
        {"complete": 1},
        {"loading": 1},
        {"layers": [-1]},
        {"layers": [True]},
        {"layers": list(range(5000))},
        {"experts": -1},
        {"experts": 1 << 17},
        {"bitmap": "x"},
        {"rows_per_second": math.inf},
        {"rows_per_second": -1.0},
        {"unknown": 1},
    ],
)
def test_malformed_fields_are_a_violation(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        decode_inventory(record(**changes), now=NOW)


def test_a_missing_field_is_a_violation() -> None:
    for name in BODY:
        body = {key: value for key, value in BODY.items() if key != name}
        with pytest.raises(ProtocolViolation):
            decode_inventory(signed(msgpack.packb(body)), now=NOW)


def test_a_repeated_field_is_a_violation() -> None:
    body = msgpack.packb(BODY)
    twice = bytes([body[0] + 1]) + body[1:] + msgpack.packb("experts") + msgpack.packb(3)
    with pytest.raises(ProtocolViolation):
        decode_inventory(signed(twice), now=NOW)


def test_a_record_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(ProtocolViolation, match="bytes"):
        decode_inventory(bytes(limits.MAX_RECORD_BYTES + 1), now=NOW)


# --- signatures ---------------------------------------------------------------------------------------------------


def test_the_signature_of_another_peer_blames_nobody() -> None:
    """Anybody can write a record in the name of a peer that they want banned."""
    with pytest.raises(FalseClaim) as caught:
        decode_inventory(record(key=2), now=NOW)
    assert caught.value.peer == ""


@pytest.mark.parametrize("signature", [bytes(64), b"\xff" * 64])
def test_no_signature(signature: bytes) -> None:
    with pytest.raises(FalseClaim):
        decode_inventory(signature + msgpack.packb(BODY), now=NOW)


def test_a_signature_made_for_something_else() -> None:
    body = msgpack.packb(BODY)
    with pytest.raises(FalseClaim):
        decode_inventory(private_key(1).sign(body) + body, now=NOW)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # an RSA key's hash
        "16Uiu2HAkxV6aqZJ9tiPqPwvLkpaqoyvLtMuwmmPGUyn8JEMaP4EB",  # secp256k1
        peer(1) + " ",
        peer(1) + "\n",
        "é",
        "0OIl",
    ],
)
def test_other_peer_ids_are_refused(name: str) -> None:
    with pytest.raises((FalseClaim, ProtocolViolation)) as caught:
        decode_inventory(record(peer=name), now=NOW)
    assert caught.value.peer == ""


# --- times --------------------------------------------------------------------------------------------------------

SKEW, LIFE = limits.MAX_CLOCK_SKEW, limits.MAX_RECORD_LIFETIME


@pytest.mark.parametrize(
    ("issued", "expires"),
    [(0, 1), (-LIFE + 1, 1), (0, LIFE), (SKEW, SKEW + 1), (SKEW, SKEW + LIFE)],
)
def test_times_that_are_accepted(issued: float, expires: float) -> None:
    assert decode_inventory(record(issued=NOW + issued, expires=NOW + expires), now=NOW).peer == peer(1)


@pytest.mark.parametrize("expires", [0, -1, -1e6])
def test_an_expired_record_blames_nobody(expires: float) -> None:
    """It was true once: whoever kept it, or our clock, is at fault."""
    with pytest.raises(FalseClaim, match="expired") as caught:
        decode_inventory(record(issued=NOW + expires - 60, expires=NOW + expires), now=NOW)
    assert caught.value.peer == ""


@pytest.mark.parametrize(
    ("issued", "expires", "complaint"),
    [
        (SKEW + 1, SKEW + 2, "future"),
        (1e9, 1e9 + 60, "future"),
        (0, LIFE + 1, "lives"),
        (0, 1e9, "lives"),
        (-LIFE, 1, "lives"),
        (-NOW, 60, "lives"),
        (50, 50, "lives"),
        (50, 10, "lives"),
    ],
)
def test_impossible_times_blame_the_signer(issued: float, expires: float, complaint: str) -> None:
    with pytest.raises(FalseClaim, match=complaint) as caught:
        decode_inventory(record(issued=NOW + issued, expires=NOW + expires), now=NOW)
    assert caught.value.peer == peer(1)


# --- bitmap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"bitmap": bytes([0b01_101_001])}, id="padding"),
        pytest.param({"bitmap": bytes([0b10_000_000])}, id="only padding"),
        pytest.param({"bitmap": b""}, id="too short"),
        pytest.param({"bitmap": bytes(2)}, id="too long"),
        pytest.param({"layers": [2, 0]}, id="descending layers"),
        pytest.param({"layers": [2, 2]}, id="a layer twice"),
        pytest.param({"layers": [], "bitmap": bytes(1)}, id="bits of no layer"),
        pytest.param({"experts": 0, "bitmap": bytes(1)}, id="bits of no expert"),
        pytest.param({"experts": 0, "bitmap": b""}, id="layers without experts"),
        pytest.param({"layers": [], "bitmap": b""}, id="experts without layers"),
        pytest.param({"experts": 1 << 16}, id="far more experts than bits"),
        pytest.param({"layers": list(range(4096)), "experts": 1 << 16}, id="the largest claim"),
    ],
)
def test_contradictory_bitmaps_blame_the_signer(changes: dict[str, Any]) -> None:
    with pytest.raises(FalseClaim) as caught:
        decode_inventory(record(**changes), now=NOW)
    assert caught.value.peer == peer(1)


def test_nothing_held_is_a_valid_announcement() -> None:
    assert decode_inventory(record(layers=[], experts=0, bitmap=b""), now=NOW).held == frozenset()


def test_a_huge_claim_costs_no_more_than_its_bytes() -> None:
    claim = record(layers=list(range(4096)), experts=1 << 16, bitmap=bytes(100))

    def attack() -> None:
        with pytest.raises(MoehiveError):
            decode_inventory(claim, now=NOW)

    assert peak_bytes(attack) < 64 * len(claim)


def test_a_full_bitmap_costs_a_bounded_multiple_of_its_bytes() -> None:
    full = record(layers=list(range(32)), experts=512, bitmap=b"\xff" * 2048)
    assert peak_bytes(lambda: decode_inventory(full, now=NOW)) < 8 * 2048 * 256  # an ExpertKey and its slot in the set


# --- the table ----------------------------------------------------------------------------------------------------


def test_directory_keys_differ_by_secret_model_and_bucket() -> None:
    keys = {
        directory_key(secret, ModelId(model), bucket)
        for secret in (bytes(32), bytes(31) + b"\1")
        for model in ("a" * 64, "b" * 64)
        for bucket in (0, 1)
    }
    assert len(keys) == 8
