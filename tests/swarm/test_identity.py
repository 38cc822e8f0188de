"""Identities: stored safely, created once, and the same to every libp2p implementation."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.protocol.errors import ConfigError, FalseClaim, StorageError
from moehive.protocol.ids import peer_id_of, public_key_of, verify_signature
from moehive.swarm.identity import Identity

seeds = st.binary(min_size=32, max_size=32)


@given(seeds)
def test_signature_is_bound_to_peer_and_message(seed: bytes) -> None:
    identity = Identity.from_seed(seed)
    assert public_key_of(identity.peer) == identity.public_key
    signature = identity.sign(b"message")
    verify_signature(identity.peer, signature, b"message")
    for peer, forged, message in [
        (identity.peer, signature, b"another message"),
        (identity.peer, bytes([signature[0] ^ 1]) + signature[1:], b"message"),
        (Identity.ephemeral().peer, signature, b"message"),
    ]:
        with pytest.raises(FalseClaim):
            verify_signature(peer, forged, message)


@given(seeds)
def test_stored_form_round_trips(seed: bytes) -> None:
    identity = Identity.from_seed(seed)
    assert Identity.from_libp2p(identity.to_libp2p()) == identity


@given(st.binary(max_size=100))
def test_other_bytes_are_no_key(data: bytes) -> None:
    with pytest.raises(ConfigError):
        Identity.from_libp2p(data)


def test_key_whose_halves_differ_is_refused() -> None:
    data = bytearray(Identity.ephemeral().to_libp2p())
    data[-1] ^= 1
    with pytest.raises(ConfigError, match="do not belong together"):
        Identity.from_libp2p(bytes(data))


def test_secret_is_not_printed() -> None:
    identity = Identity.ephemeral()
    assert repr(identity.seed) not in repr(identity)


def test_created_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "config" / "identity.key"
    identity = Identity.load_or_create(path)
    assert Identity.load_or_create(path) == identity
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["identity.key"]


def test_concurrent_first_starts_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        identities = list(pool.map(lambda _: Identity.load_or_create(tmp_path / "identity.key"), range(8)))
    assert len(set(identities)) == 1
    assert os.listdir(tmp_path) == ["identity.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        Identity.load_or_create(path)


def test_broken_file_is_named_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(b"not a key")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=str(path)):
        Identity.load_or_create(path)
    assert path.read_bytes() == b"not a key"


def test_what_is_no_key_is_not_to_be_made_private(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Everybody is to read this")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="not an Ed25519 libp2p private key") as refused:
        Identity.load_or_create(path)
    assert "chmod" not in str(refused.value)


def test_what_can_be_no_file_is_the_callers_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "identity.key", tmp_path):
        with pytest.raises(ConfigError, match="is no file"):
            Identity.load_or_create(path)


def test_unusable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "key")
    with pytest.raises(StorageError, match=r"cannot (read|write) the identity"):
        Identity.load_or_create(tmp_path / "gone")


def test_agrees_with_py_libp2p() -> None:
    """In a process of its own: py-libp2p takes 1.5 s to import and changes logging."""
    script = """
from moehive.swarm.transport.engine import import_libp2p
import_libp2p()
from libp2p.crypto.ed25519 import Ed25519PrivateKey, create_new_key_pair
from libp2p.crypto.pb.crypto_pb2 import KeyType, PrivateKey
from libp2p.peer.id import ID
from moehive.protocol.ids import peer_id_of, public_key_of, verify_signature
from moehive.swarm.identity import Identity

for seed in (bytes(32), bytes(range(32)), bytes([255] * 32)):
    ours, theirs = Identity.from_seed(seed), create_new_key_pair(seed)
    assert ours.public_key == theirs.public_key.to_bytes()
    assert ours.peer == ID.from_pubkey(theirs.public_key).to_string() == peer_id_of(theirs.public_key.to_bytes())
    assert public_key_of(ID.from_pubkey(theirs.public_key).to_base58()) == theirs.public_key.to_bytes()
    assert theirs.public_key.verify(b"m", ours.sign(b"m"))
    verify_signature(ours.peer, theirs.private_key.sign(b"m"), b"m")
    message = PrivateKey(key_type=KeyType.Ed25519, data=theirs.private_key.to_bytes() + theirs.public_key.to_bytes())
    assert ours.to_libp2p() == message.SerializeToString()
print("agreed")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "agreed\n", done.stderr


@given(seeds)
def test_ids_start_like_ed25519_ids(seed: bytes) -> None:
    assert peer_id_of(Identity.from_seed(seed).public_key).startswith("12D3KooW")
