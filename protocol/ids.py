"""Names of things: experts, models, shards, peers.

A peer id is the libp2p text form of an Ed25519 public key: base58 of an identity multihash around the protobuf
`PublicKey` message (libp2p specification, peer-ids). Because the key is inlined, the id alone verifies a signature.
The ten lines here replace importing a whole network stack into a package that must have none; a test holds them
equal to py-libp2p's answer.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NewType

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from .errors import ConfigError, FalseClaim, ManifestError

PeerId = NewType("PeerId", str)
ModelId = NewType("ModelId", str)  # 64 hexadecimal digits: root hash of the canonical manifest
ShardHash = NewType("ShardHash", str)  # 64 hexadecimal digits: root hash of a shard's bytes

HASH_HEX = re.compile(r"[0-9a-f]{64}")
_EXPERT_KEY = re.compile(r"(0|[1-9][0-9]{0,8})_(0|[1-9][0-9]{0,8})")
# identity multihash (0x00, length 0x24) of protobuf {1: KeyType.Ed25519 = 1, 2: 32 bytes}
_ED25519_PREFIX = bytes.fromhex("002408011220")
_PEER_ID_MAX_CHARS = 64


class ExpertKey(NamedTuple):
    """One routed expert: decoder layer and index within it. Text form: `<layer>_<expert>`."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"{self.layer}_{self.expert}"

    @classmethod
    def parse(cls, text: str) -> ExpertKey:
        """Read `<layer>_<expert>`. Raises ManifestError."""
        match = _EXPERT_KEY.fullmatch(text)
        if match is None:
            raise ManifestError(f"expertKey {text!r} is not of the form '<layer>_<expert>'")
        return cls(int(match[1]), int(match[2]))


def is_hash(text: str) -> bool:
    """Whether `text` is the text form of a model id or shard hash."""
    return HASH_HEX.fullmatch(text) is not None


def parse_model_id(text: str) -> ModelId:
    """Read a model id from somebody's hand. Raises ConfigError."""
    if not is_hash(text):
        raise ConfigError(f"{text!r} is not a model id (64 hexadecimal digits); a node prints it when it starts")
    return ModelId(text)


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a raw 32-byte Ed25519 public key."""
    assert len(public_key) == 32, len(public_key)
    return PeerId(base58.b58encode(_ED25519_PREFIX + public_key).decode())


def public_key_of(peer: str) -> bytes:
    """The raw 32-byte Ed25519 public key inlined in a peer id. Raises FalseClaim for any other kind of id."""
    if len(peer) > _PEER_ID_MAX_CHARS:
        raise FalseClaim(f"peer id of {len(peer)} characters")
    try:
        raw = base58.b58decode(peer)
    except ValueError as error:
        raise FalseClaim(f"peer id {peer!r} is not base58") from error
    if len(raw) != len(_ED25519_PREFIX) + 32 or not raw.startswith(_ED25519_PREFIX):
        raise FalseClaim(f"peer id {peer!r} is not an Ed25519 key")
    key = raw[len(_ED25519_PREFIX) :]
    if peer_id_of(key) != peer:  # b58decode ignores trailing white space: one key would have many names
        raise FalseClaim(f"peer id {peer!r} is not in canonical form")
    return key


def verify_signature(peer: str, signature: bytes, message: bytes) -> None:
    """Raise FalseClaim unless `signature` is `peer`'s own over `message`.

    The error blames nobody: whoever forged the signature, it was not the peer that is named.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key_of(peer)).verify(signature, message)
    except InvalidSignature as error:
        raise FalseClaim(f"the signature is not {peer}'s") from error
