"""Names: one text for one thing, and nothing but the documented error for every other text."""

from __future__ import annotations

import contextlib

import base58
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.wire import peer, private_key

from moehive.protocol.errors import FalseClaim, ManifestError
from moehive.protocol.ids import ExpertKey, is_hash, peer_id_of, public_key_of, verify_signature

raw_keys = st.binary(min_size=32, max_size=32)


@given(raw_keys)
def test_peer_ids_round_trip(key: bytes) -> None:
    name = peer_id_of(key)
    assert name.startswith("12D3KooW")
    assert public_key_of(name) == key


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (bytes(32), "12D3KooW9pNAk8aiBuGVQtWRdbkLmo5qVL3e2h5UxbN2Nz9ttwiw"),
        (bytes(range(32)), "12D3KooW9pP4Seg3kZYhySpuVjn1RPdQBsUFZKiFxGMGQN5MeL6A"),
        (b"\xff" * 32, "12D3KooWT3gYEvLJyx1FyyHqrmvdy1tMjpgxmu9aSeKMEuafQtyC"),
    ],
)
def test_peer_ids_are_those_of_libp2p(key: bytes, name: str) -> None:
    """Names from py-libp2p 0.8.1: `ID.from_pubkey(Ed25519PublicKey.from_bytes(key))`."""
    assert peer_id_of(key) == name
    assert public_key_of(name) == key


@given(st.text(max_size=70))
@example("")
@example("1" * 64)
@example("z" * 64)
@example("z" * 65)
@example("\ud800")
def test_any_other_text_is_a_false_claim(text: str) -> None:
    with pytest.raises(FalseClaim):
        public_key_of(text)


@pytest.mark.parametrize("change", [lambda p: p + " ", lambda p: p + "\n", lambda p: " " + p, lambda p: "1" + p])
def test_a_key_has_one_name_only(change: object) -> None:
    """Otherwise a banned peer returns under another name."""
    assert callable(change)
    with pytest.raises(FalseClaim):
        public_key_of(change(peer(1)))


@given(st.binary(max_size=44))
def test_other_multihashes_are_refused(raw: bytes) -> None:
    with pytest.raises(FalseClaim):
        public_key_of(base58.b58encode(raw).decode())


@given(raw_keys, st.binary(max_size=80), st.binary(max_size=20))
def test_random_signatures_of_random_keys_are_refused(key: bytes, signature: bytes, message: bytes) -> None:
    with pytest.raises(FalseClaim):
        verify_signature(peer_id_of(key), signature, message)


def test_signatures() -> None:
    signature = private_key(1).sign(b"message")
    verify_signature(peer(1), signature, b"message")
    for name, sig, message in [
        (peer(2), signature, b"message"),
        (peer(1), signature, b"massage"),
        (peer(1), signature[:-1], b"message"),
        (peer(1), signature + b"\0", b"message"),
    ]:
        with pytest.raises(FalseClaim) as caught:
            verify_signature(name, sig, message)
        assert caught.value.peer == ""  # whoever forged it, it was not the peer that is named


def test_a_malleable_signature_is_refused() -> None:
    """s + group order verifies too where a library does not check: the same record with two texts."""
    order = 2**252 + 27742317777372353535851937790883648493
    signature = private_key(1).sign(b"message")
    s = int.from_bytes(signature[32:], "little") + order
    with pytest.raises(FalseClaim):
        verify_signature(peer(1), signature[:32] + s.to_bytes(32, "little"), b"message")


@given(st.integers(0, 999_999_999), st.integers(0, 999_999_999))
def test_expert_keys_round_trip(layer: int, expert: int) -> None:
    key = ExpertKey(layer, expert)
    assert ExpertKey.parse(str(key)) == key


@given(st.text("0123456789_-+ \n٣", max_size=8))
@example("01_2")
@example("1_02")
@example("1_2\n")
@example("1\u0663_2")
@example("1_2_3")
@example("-1_2")
@example("1_" + "9" * 10)
def test_an_expert_key_has_one_text_only(text: str) -> None:
    with contextlib.suppress(ManifestError):
        assert str(ExpertKey.parse(text)) == text


def test_hash_texts() -> None:
    assert is_hash("0123456789abcdef" * 4)
    for text in ("", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", " " + "a" * 64, "\u0661" * 64):
        assert not is_hash(text)
