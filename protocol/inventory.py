"""The announcement: which experts of one model a peer holds, signed with the key inside its peer id.

One record per peer and model. It carries its own expiry, which whoever stores or reads it bounds; what it claims is a
claim, and a peer that refuses what it announced has lied (FalseClaim).

Signed bytes: a domain string, then the msgpack map exactly as sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack
from blake3 import blake3

from . import limits
from .codec import blob, boolean, hash_text, integer, integers, number, text, texts, unpack_map
from .errors import FalseClaim, ProtocolViolation
from .ids import ExpertKey, ModelId, PeerId, verify_signature

VERSION = 2  # 2: `loading`
_DOMAIN = b"moehive inventory v2\0"
_SIGNATURE_BYTES = 64
SWARM_TAG_BYTES = 16
_CHECKS = {
    "v": integer(VERSION, VERSION),
    "swarm": blob(SWARM_TAG_BYTES, SWARM_TAG_BYTES),
    "peer": text(64),
    "model": hash_text,
    "issued": number(0, 1e11),
    "expires": number(0, 1e11),
    "addresses": texts(limits.MAX_ADDRESS_CHARS, limits.MAX_ADDRESSES),
    "skeleton": boolean,
    "complete": boolean,
    "loading": boolean,
    "layers": integers(0, 1 << 16, limits.MAX_LIST_ITEMS),
    "experts": integer(0, 1 << 16),
    "bitmap": blob(0, limits.MAX_RECORD_BYTES),
    "rows_per_second": number(0, 1e12),
}


@dataclass(frozen=True, slots=True)
class Inventory:
    """What one peer says that it holds of one model."""

    peer: PeerId
    model: ModelId
    issued: float  # seconds since the epoch
    expires: float
    held: frozenset[ExpertKey]
    skeleton: bool = False  # dense part, shared experts and assets can be fetched here
    complete: bool = False  # every shard of the model can be fetched here, whatever is held to be computed with
    loading: bool = False  # more is being fetched: parts of it may be fetched here already (GetHave tells)
    addresses: tuple[str, ...] = ()
    rows_per_second: float = 0.0  # capacity class: (token, expert) rows; 0 where not known
    swarm: bytes = bytes(SWARM_TAG_BYTES)  # `swarm_tag`: a record of one swarm says nothing in another


def encode_inventory(inventory: Inventory, sign: Callable[[bytes], bytes]) -> bytes:
    """The signed record; `sign` gives an Ed25519 signature with the peer's key."""
    layers = sorted({key.layer for key in inventory.held})
    experts = 1 + max((key.expert for key in inventory.held), default=-1)
    body = msgpack.packb(
        {
            "v": VERSION,
            "swarm": inventory.swarm,
            "peer": inventory.peer,
            "model": inventory.model,
            "issued": inventory.issued,
            "expires": inventory.expires,
            "addresses": list(inventory.addresses),
            "skeleton": inventory.skeleton,
            "complete": inventory.complete,
            "loading": inventory.loading,
            "layers": layers,
            "experts": experts,
            "bitmap": _to_bitmap(inventory.held, layers, experts),
            "rows_per_second": inventory.rows_per_second,
        },
        use_bin_type=True,
    )
    return sign(_DOMAIN + body) + bytes(body)


def decode_inventory(record: bytes, *, now: float) -> Inventory:
    """Read and verify a record at time `now` (seconds since the epoch).

    Raises FalseClaim for a wrong signature, an expired or far-future record, or contradictory contents, and
    ProtocolViolation for bytes that are no record. The error names a peer only where its signature proves its fault:
    anybody can forge a record in another's name, or keep one until it has expired.
    """
    if not _SIGNATURE_BYTES < len(record) <= limits.MAX_RECORD_BYTES:
        raise ProtocolViolation(f"announcement of {len(record)} bytes")
    signature, body = record[:_SIGNATURE_BYTES], record[_SIGNATURE_BYTES:]
    fields = _read_fields(unpack_map(body, limits.MAX_RECORD_BYTES))
    peer = PeerId(fields["peer"])
    verify_signature(peer, signature, _DOMAIN + body)
    _check_times(peer, fields["issued"], fields["expires"], now)
    return Inventory(
        peer=peer,
        model=ModelId(fields["model"]),
        issued=fields["issued"],
        expires=fields["expires"],
        held=frozenset(_from_bitmap(peer, fields["bitmap"], fields["layers"], fields["experts"])),
        skeleton=fields["skeleton"],
        complete=fields["complete"],
        loading=fields["loading"],
        addresses=fields["addresses"],
        rows_per_second=fields["rows_per_second"],
        swarm=fields["swarm"],
    )


def swarm_tag(secret: bytes) -> bytes:
    """Names a swarm in its records without telling its secret."""
    return blake3(b"moehive swarm tag v1", key=secret).digest(length=SWARM_TAG_BYTES)


def directory_key(secret: bytes, model: ModelId, bucket: int = 0) -> bytes:
    """Under which key of the record table a model's announcements lie: unguessable without the swarm's secret."""
    return blake3(f"moehive directory v1\0{model}\0{bucket}".encode(), key=secret).digest()


def _read_fields(fields: dict[Any, Any]) -> dict[str, Any]:
    if fields.keys() != _CHECKS.keys():
        raise ProtocolViolation("announcement with missing or unknown fields")
    try:
        return {name: check(fields[name]) for name, check in _CHECKS.items()}
    except ValueError as error:
        raise ProtocolViolation(f"announcement: {error}") from error


def _check_times(peer: PeerId, issued: float, expires: float, now: float) -> None:
    if expires <= now:
        raise FalseClaim(f"announcement of {peer} expired {now - expires:.0f} s ago")
    if issued > now + limits.MAX_CLOCK_SKEW:
        raise FalseClaim(f"announcement from {issued - now:.0f} s in the future; is a clock wrong?", peer=peer)
    lifetime = expires - issued
    if not 0 < lifetime <= limits.MAX_RECORD_LIFETIME:
        raise FalseClaim(
            f"announcement lives {lifetime:.0f} s; up to {limits.MAX_RECORD_LIFETIME:.0f} s are allowed", peer=peer
        )


def _to_bitmap(held: Iterable[ExpertKey], layers: list[int], experts: int) -> bytes:
    row = {layer: index * experts for index, layer in enumerate(layers)}
    bitmap = bytearray(-(-len(layers) * experts // 8))
    for key in held:
        bit = row[key.layer] + key.expert
        bitmap[bit >> 3] |= 1 << (bit & 7)
    return bytes(bitmap)


def _from_bitmap(peer: PeerId, bitmap: bytes, layers: tuple[int, ...], experts: int) -> Iterator[ExpertKey]:
    fits = len(bitmap) == -(-len(layers) * experts // 8) and (experts == 0) == (not layers)
    if not fits or list(layers) != sorted(set(layers)):
        raise FalseClaim("announcement whose bitmap does not fit its layers", peer=peer)
    for index, byte in enumerate(bitmap):
        while byte:
            bit = (byte & -byte).bit_length() - 1
            byte &= byte - 1
            layer, expert = divmod(index * 8 + bit, experts)
            if layer >= len(layers):
                raise FalseClaim("announcement with padding bits set", peer=peer)
            yield ExpertKey(layers[layer], expert)
