"""Wire material for tests: fixed identities, any valid message, and frames that our encoder would never write."""

from __future__ import annotations

import functools
import itertools
import struct
import tracemalloc
from collections.abc import Callable, Iterable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import strategies as st

from moehive.protocol import limits, messages
from moehive.protocol.codec import Message
from moehive.protocol.ids import PeerId, peer_id_of

SECRET = bytes(range(32))
MODEL = "ab" * 32
ALL_MESSAGES: tuple[type[Message], ...] = (
    messages.Hello,
    messages.Welcome,
    messages.Refused,
    messages.Cancel,
    messages.GetInventory,
    messages.Inventory,
    messages.GetLoad,
    messages.Load,
    messages.GetDemand,
    messages.Demand,
    messages.GetChunkList,
    messages.ChunkHashes,
    messages.GetChunks,
    messages.Chunk,
    messages.GetHave,
    messages.Have,
    messages.OpenBulk,
    messages.BulkOffer,
    messages.RunExperts,
    messages.ExpertsDone,
)


@functools.cache
def private_key(number: int) -> Ed25519PrivateKey:
    """A key that is the same in every run."""
    return Ed25519PrivateKey.from_private_bytes(bytes([number] * 32))


@functools.cache
def peer(number: int) -> PeerId:
    """The id of `private_key(number)`."""
    return peer_id_of(private_key(number).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))


def raw_frame(
    kind: int, meta: bytes = b"\x80", payload: bytes = b"", *, request_id: int = 1, flags: int = 0, version: int = 1
) -> bytes:
    """A frame with any contents, written without the code under test."""
    return struct.pack(">BBHIII", version, kind, flags, request_id, len(meta), len(payload)) + meta + payload


def portions(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """`data` cut at the given places."""
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:stop] for start, stop in itertools.pairwise(places)]


def peak_bytes(action: Callable[[], object]) -> int:
    """Most memory that `action` held at once, beyond what was there before."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- any valid message --------------------------------------------------------------------------------------------

hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)
proofs = st.binary(min_size=32, max_size=32)
seconds = st.floats(0.0, limits.MAX_DEADLINE)


def printable(limit: int) -> st.SearchStrategy[str]:
    """Text that messages may carry."""
    return st.text(st.characters(exclude_categories=["C", "Z"]), max_size=limit)


def _integers(low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(low, high), max_size=8).map(tuple)


_dtypes = st.sampled_from(messages.TENSOR_DTYPES)
_fields: dict[type[Message], dict[str, st.SearchStrategy[object]]] = {
    messages.Hello: {"agent": printable(64), "proof": proofs},
    messages.Welcome: {"agent": printable(64), "proof": proofs},
    messages.Refused: {"code": st.integers(0, 255), "detail": printable(256), "retry_after": seconds},
    messages.Cancel: {},
    messages.GetInventory: {"model": hashes},
    messages.Inventory: {},
    messages.GetLoad: {},
    messages.Load: {
        "queued_requests": st.integers(0, 1 << 32),
        "expected_wait": seconds,
        "rows_done": st.integers(0, 1 << 62),
        "bytes_sent": st.integers(0, 1 << 62),
    },
    messages.GetDemand: {"model": hashes},
    messages.Demand: {
        "layers": _integers(0, 1 << 16),
        "experts": _integers(0, 1 << 16),
        "hourly": _integers(0, 1 << 40),
    },
    messages.GetChunkList: {"hash": hashes},
    messages.ChunkHashes: {"size": st.integers(0, limits.MAX_SHARD_BYTES)},
    messages.GetChunks: {
        "hash": hashes,
        "first": st.integers(0, 1 << 14),
        "count": st.integers(1, limits.MAX_CHUNKS_PER_REQUEST),
    },
    messages.Chunk: {"index": st.integers(0, 1 << 14)},
    messages.GetHave: {"hash": hashes},
    messages.Have: {"size": st.integers(0, limits.MAX_SHARD_BYTES), "complete": st.booleans()},
    messages.OpenBulk: {},
    messages.BulkOffer: {
        "addresses": st.lists(printable(limits.MAX_ADDRESS_CHARS), max_size=limits.MAX_ADDRESSES).map(tuple),
        "fingerprint": proofs,
        "token": proofs,
        "lifetime": seconds,
    },
    messages.RunExperts: {
        "model": hashes,
        "layer": st.integers(0, 1 << 16),
        "tokens": st.integers(1, messages.MAX_ROWS),
        "hidden": st.integers(1, 1 << 20),
        "dtype": _dtypes,
        "weights_dtype": _dtypes,
        "form": st.sampled_from(["sum", "rows"]),
        "experts": _integers(0, 1 << 16),
        "counts": _integers(1, messages.MAX_ROWS),
        "deadline": seconds,
    },
    messages.ExpertsDone: {"waited": seconds, "computed": seconds},
}


def message_of(kind: type[Message]) -> st.SearchStrategy[Message]:
    """Any valid message of a kind."""
    return st.builds(kind, **_fields[kind])


any_message: st.SearchStrategy[Message] = st.sampled_from(ALL_MESSAGES).flatmap(message_of)
