"""What peers say to each other: the messages of the three protocols, with every bound.

    /moehive/peer/1.0.0     who holds what, how busy         GetInventory -> Inventory, GetLoad -> Load,
                                                             GetDemand -> Demand
    /moehive/shard/1.0.0    bytes of stored objects          GetChunkList -> ChunkHashes, GetChunks -> Chunk...,
                                                             GetHave -> Have, OpenBulk -> BulkOffer
    /moehive/expert/1.0.0   run experts on rows of tensors   RunExperts -> ExpertsDone,
                                                             OpenBulk -> BulkOffer

Every stream begins with Hello -> Welcome (or Refused); see `session`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from . import limits
from .codec import Message, blob, boolean, hash_text, integer, integers, number, one_of, text, texts, wire
from .errors import ProtocolViolation
from .ids import ExpertKey, ModelId, ShardHash
from .manifest import ITEM_SIZE

MAX_EXPERTS = 1024  # experts of one layer in one request
MAX_DEMAND = 1024  # experts in one answer about what is asked for
MAX_ROWS = 1 << 20  # tokens in one request; the payload limit is reached long before
PROOF_BYTES = 32
FINGERPRINT_BYTES = 32  # SHA-256 of a certificate's DER form
TENSOR_DTYPES = ("F32", "BF16", "F16")


# --- every stream -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(Message):
    """First frame of whoever opened the stream: proof of belonging to the swarm (see `proofs.Admission`)."""

    KIND: ClassVar[int] = 1
    agent: str = wire(text(64))
    proof: bytes = wire(blob(PROOF_BYTES, PROOF_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome(Message):
    """Answer to Hello, with the other side's own proof."""

    KIND: ClassVar[int] = 2
    agent: str = wire(text(64))
    proof: bytes = wire(blob(PROOF_BYTES, PROOF_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Message):
    """No, with a reason. Request id 0 refuses the stream itself."""

    KIND: ClassVar[int] = 3
    code: int = wire(integer(0, 255))  # RefusalCode; an unknown code is read as INTERNAL
    detail: str = wire(text(limits.MAX_DETAIL_CHARS))
    retry_after: float = wire(number(0.0, limits.MAX_DEADLINE))  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Message):
    """The answer to this request is no longer wanted. Not answered."""

    KIND: ClassVar[int] = 4


# --- /moehive/peer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GetInventory(Message):
    """Ask for the peer's own signed announcement, fresher than the table's."""

    KIND: ClassVar[int] = 16
    model: ModelId = wire(hash_text)  # noqa: RUF009 - `wire` declares a field


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory(Message):
    """The payload is a signed record (see `inventory`)."""

    KIND: ClassVar[int] = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class GetLoad(Message):
    """Ask how busy the peer is."""

    KIND: ClassVar[int] = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(Message):
    """How busy: work waiting, and work done since the peer started."""

    KIND: ClassVar[int] = 19
    queued_requests: int = wire(integer(0, 1 << 32))
    expected_wait: float = wire(number(0.0, limits.MAX_DEADLINE))  # seconds
    rows_done: int = wire(integer(0, 1 << 62))  # (token, expert) rows
    bytes_sent: int = wire(integer(0, 1 << 62))  # of shards


@dataclass(frozen=True, slots=True, kw_only=True)
class GetDemand(Message):
    """Ask which of its experts the peer is asked for most."""

    KIND: ClassVar[int] = 20
    model: ModelId = wire(hash_text)  # noqa: RUF009 - `wire` declares a field


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand(Message):
    """What the peer was asked for lately, the most first: entry by entry a layer, an expert, its rows in an hour."""

    KIND: ClassVar[int] = 21
    layers: tuple[int, ...] = wire(integers(0, 1 << 16, MAX_DEMAND))
    experts: tuple[int, ...] = wire(integers(0, 1 << 16, MAX_DEMAND))
    hourly: tuple[int, ...] = wire(integers(0, 1 << 40, MAX_DEMAND))

    def rates(self) -> dict[ExpertKey, float]:
        """Rows per second of each expert. Raises ProtocolViolation where the lists do not fit together."""
        if not len(self.layers) == len(self.experts) == len(self.hourly):
            raise ProtocolViolation("Demand: as many layers, experts and rates are expected")
        keys = map(ExpertKey, self.layers, self.experts)
        return {key: rows / 3600 for key, rows in zip(keys, self.hourly, strict=True)}


# --- /moehive/shard -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GetChunkList(Message):
    """Ask for the chunk hashes of an object: a shard, an asset, or a manifest (whose hash is the model id)."""

    KIND: ClassVar[int] = 32
    hash: ShardHash = wire(hash_text)  # noqa: RUF009 - `wire` declares a field


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkHashes(Message):
    """The payload is the chunk hashes; with `size` they give the object's hash."""

    KIND: ClassVar[int] = 33
    size: int = wire(integer(0, limits.MAX_SHARD_BYTES))


@dataclass(frozen=True, slots=True, kw_only=True)
class GetChunks(Message):
    """Ask for `count` chunks from `first` on."""

    KIND: ClassVar[int] = 34
    hash: ShardHash = wire(hash_text)  # noqa: RUF009 - `wire` declares a field
    first: int = wire(integer(0, limits.MAX_SHARD_BYTES >> 20))
    count: int = wire(integer(1, limits.MAX_CHUNKS_PER_REQUEST))

    @property
    def max_replies(self) -> int:
        """One for each chunk."""
        return self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk(Message):
    """One chunk; the payload is its bytes. All but the last of a request carry the MORE flag."""

    KIND: ClassVar[int] = 35
    index: int = wire(integer(0, limits.MAX_SHARD_BYTES >> 20))


@dataclass(frozen=True, slots=True, kw_only=True)
class GetHave(Message):
    """Ask which chunks of an object the peer can send now: it may be downloading it itself."""

    KIND: ClassVar[int] = 36
    hash: ShardHash = wire(hash_text)  # noqa: RUF009 - `wire` declares a field


@dataclass(frozen=True, slots=True, kw_only=True)
class Have(Message):
    """The payload is a bitmap of the chunks (see `bits`); none where the object is complete."""

    KIND: ClassVar[int] = 37
    size: int = wire(integer(0, limits.MAX_SHARD_BYTES))
    complete: bool = wire(boolean)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenBulk(Message):
    """Ask for a TLS connection of one's own for this protocol: bytes then do not queue in front of activations, and
    activations do not pass through two daemons."""

    KIND: ClassVar[int] = 38


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkOffer(Message):
    """Where to connect with TLS, whom to find there, and what to show: good for one connection, soon.

    That connection speaks the protocol that the offer was asked for over, from Hello on; the token stands in Hello as
    the proof (see `proofs`). No addresses: this peer takes no connections.
    """

    KIND: ClassVar[int] = 39
    addresses: tuple[str, ...] = wire(texts(limits.MAX_ADDRESS_CHARS, limits.MAX_ADDRESSES))  # /ip4/1.2.3.4/tcp/5
    fingerprint: bytes = wire(blob(FINGERPRINT_BYTES, FINGERPRINT_BYTES))
    token: bytes = wire(blob(PROOF_BYTES, PROOF_BYTES))
    lifetime: float = wire(number(0.0, limits.MAX_DEADLINE))  # seconds in which the token must be shown


# --- /moehive/expert ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunExperts(Message):
    """Run some experts of one layer on some tokens.

    Payload, in this order, with R = sum(counts):
        hidden        [tokens, hidden]  dtype
        token index   [R]               int32, which token each row of each expert is; experts in the order given
        weights       [R]               weights_dtype, only in the `sum` form

    Answer forms: `sum` gives one row per token, the weighted sum over these experts, accumulated in fp32 in ascending
    expert order; `rows` gives the R unweighted expert outputs, for a caller that wants transformers' order of addition.
    """

    KIND: ClassVar[int] = 48
    model: ModelId = wire(hash_text)  # noqa: RUF009 - `wire` declares a field
    layer: int = wire(integer(0, 1 << 16))
    tokens: int = wire(integer(1, MAX_ROWS))
    hidden: int = wire(integer(1, 1 << 20))
    dtype: str = wire(one_of(*TENSOR_DTYPES))
    weights_dtype: str = wire(one_of(*TENSOR_DTYPES))
    form: str = wire(one_of("sum", "rows"))
    experts: tuple[int, ...] = wire(integers(0, 1 << 16, MAX_EXPERTS))
    counts: tuple[int, ...] = wire(integers(1, MAX_ROWS, MAX_EXPERTS))
    deadline: float = wire(number(0.0, limits.MAX_DEADLINE))  # seconds from receipt

    @property
    def rows(self) -> int:
        """R: (token, expert) pairs."""
        return sum(self.counts)

    @property
    def request_bytes(self) -> int:
        """Size of the payload that belongs to these fields."""
        weights = self.rows * ITEM_SIZE[self.weights_dtype] if self.form == "sum" else 0
        return self.tokens * self.hidden * ITEM_SIZE[self.dtype] + 4 * self.rows + weights

    @property
    def answer_rows(self) -> int:
        """Rows of the answer."""
        return self.tokens if self.form == "sum" else self.rows

    @property
    def answer_bytes(self) -> int:
        """Size of the answer's payload."""
        return self.answer_rows * self.hidden * ITEM_SIZE[self.dtype]

    def check(self, payload_bytes: int) -> None:
        """Raise ProtocolViolation where fields and payload contradict each other or the answer would be too large."""
        if not self.experts or len(self.experts) != len(self.counts) or max(self.counts) > self.tokens:
            raise ProtocolViolation("RunExperts: experts, counts and tokens do not fit each other")
        if list(self.experts) != sorted(set(self.experts)):
            raise ProtocolViolation("RunExperts: experts must be distinct and ascending")
        if self.request_bytes != payload_bytes:
            raise ProtocolViolation(f"RunExperts: payload of {payload_bytes} bytes, {self.request_bytes} are declared")
        if self.answer_bytes > limits.MAX_PAYLOAD_BYTES:
            raise ProtocolViolation(
                f"RunExperts: the answer of {self.answer_bytes} bytes is over the limit; send fewer rows"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsDone(Message):
    """The payload is [answer_rows, hidden] in the request's dtype."""

    KIND: ClassVar[int] = 49
    waited: float = wire(number(0.0, limits.MAX_DEADLINE))  # seconds in the queue
    computed: float = wire(number(0.0, limits.MAX_DEADLINE))  # seconds of computation of the batch it was part of


# --- protocols ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProtocolSpec:
    """One protocol: its libp2p name, and which messages answer which."""

    name: str
    answers: Mapping[type[Message], type[Message]]
    max_request_payload: int
    max_reply_payload: int


PEER = ProtocolSpec(
    "/moehive/peer/1.0.0",
    {GetInventory: Inventory, GetLoad: Load, GetDemand: Demand},
    0,
    limits.MAX_RECORD_BYTES,
)
SHARD = ProtocolSpec(
    "/moehive/shard/1.0.0",
    {GetChunkList: ChunkHashes, GetChunks: Chunk, GetHave: Have, OpenBulk: BulkOffer},
    0,
    max(1 << 20, limits.MAX_SHARD_BYTES >> 15),
)
EXPERT = ProtocolSpec(
    "/moehive/expert/1.0.0",
    {RunExperts: ExpertsDone, OpenBulk: BulkOffer},
    limits.MAX_PAYLOAD_BYTES,
    limits.MAX_PAYLOAD_BYTES,
)
