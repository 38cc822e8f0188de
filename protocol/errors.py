"""Every error moehive raises, in one tree, split by whose fault it is and whether trying again can help.

    MoehiveError
    ├── PeerError                 a remote peer's fault: ask somebody else
    │   ├── PeerUnreachable       (retryable) cannot connect, or the connection was lost
    │   ├── PeerTimeout           (retryable) no answer before the deadline
    │   ├── PeerRefused           the peer said no, with a reason; retryable where the reason passes with time
    │   ├── ProtocolViolation     the peer broke the protocol: disconnect
    │   │   ├── UnsupportedVersion
    │   │   └── NotAdmitted       it belongs to another swarm
    │   ├── UnusableAnswer        (retryable) the peer computed NaN or infinity: ask somebody else
    │   ├── IntegrityError        the peer sent bytes that do not match their hash: ban
    │   ├── WrongResult           the peer's answer is not what its experts compute, shown by computing it: ban
    │   └── FalseClaim            the peer announced what it does not have, or signed nonsense: ban
    ├── LocalError                this machine's fault
    │   ├── StorageError          a file cannot be read or written
    │   │   ├── DiskFull
    │   │   └── CorruptShard      a local file does not match its hash
    │   ├── SeedError             (retryable) a permanent seed cannot be read
    │   │   └── SeedChanged       (final) its bytes are not those that the model was converted from
    │   ├── BudgetTooSmall        a memory or disk budget cannot hold what was asked
    │   ├── MemoryExhausted       the machine gave less memory than its budget promised
    │   └── TransportError        (retryable) the network engine did not start or stopped
    ├── CallerError               the caller asked for something impossible: exit code 2, never retried
    │   ├── ConfigError           an unknown or malformed setting, flag or argument
    │   ├── TicketError           a join ticket that cannot be read
    │   ├── ManifestError         a manifest that cannot be read or contradicts itself
    │   ├── UnsupportedModel      a model or family moehive cannot run; says which and why
    │   ├── CheckpointError       a source checkpoint that is truncated or inconsistent
    │   ├── TraceError            a routing trace or a predictor that cannot be read, or is of another model
    │   └── DestinationError      an output directory that already holds something else
    └── SwarmError                nobody's single fault: the swarm as a whole cannot do it (retryable)
        ├── ExpertUnavailable     no live peer can run or supply these experts; names layer and experts
        ├── ShardUnavailable      no live peer can supply this shard
        └── ModelUnavailable      nobody in the swarm announces this model

Numbers and names that a caller may act on are attributes; the message is built from them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar


class RefusalCode(enum.IntEnum):
    """Why a peer refuses a request: the one-byte code on the wire."""

    BUSY = 1  # queue full: come back after `retry_after`
    NOT_HELD = 2  # this peer does not hold that shard or expert
    UNKNOWN_MODEL = 3
    BAD_REQUEST = 4  # malformed, over a limit, wrong shape or dtype
    UNSUPPORTED_VERSION = 5
    NOT_ADMITTED = 6  # wrong swarm
    DEADLINE = 7  # cannot answer before the request's deadline
    SHUTTING_DOWN = 8
    INTERNAL = 9  # the peer's own fault; no detail is sent
    CANCELLED = 10  # as the caller asked

    @property
    def passes_with_time(self) -> bool:
        """Whether the same request to the same peer may succeed later."""
        return self in (RefusalCode.BUSY, RefusalCode.DEADLINE, RefusalCode.INTERNAL)


class MoehiveError(Exception):
    """Root of the tree."""

    retryable: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """How errors are pickled and copied. By default the class would be called with the message alone, which most do
        not take: a pool of processes that gets such an error back breaks, or waits for ever.
        """
        return _rebuilt, (type(self), self.args, self.__dict__)


_E = TypeVar("_E", bound=MoehiveError)


def _rebuilt(kind: type[_E], args: tuple[Any, ...], attributes: Mapping[str, Any]) -> _E:
    """An error from what it consists of, past its constructor."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class PeerError(MoehiveError):
    """A remote peer's fault; `peer` is its id (empty where it is not known yet)."""

    def __init__(self, message: str, *, peer: str = "") -> None:
        super().__init__(f"peer {peer}: {message}" if peer else message)
        self.peer = peer
        self.reason = message

    def afresh(self) -> Self:
        """The same error without where it was raised and what caused it: to keep, or to raise to several callers.

        A traceback holds its frames with all that they work on: an error that is kept beside what it ended keeps the
        sockets and buffers of a peer that is gone, in a cycle that only a full garbage collection finds.
        """
        return _rebuilt(type(self), self.args, self.__dict__)


class PeerUnreachable(PeerError):
    """The peer cannot be reached, or the connection to it was lost."""

    retryable = True


class PeerTimeout(PeerError):
    """The peer did not answer before the deadline."""

    retryable = True


class PeerRefused(PeerError):
    """The peer refused, with a reason."""

    def __init__(self, code: RefusalCode, detail: str = "", *, retry_after: float = 0.0, peer: str = "") -> None:
        super().__init__(f"refused: {code.name.lower()}{': ' + detail if detail else ''}", peer=peer)
        self.code = code
        self.detail = detail
        self.retry_after = retry_after  # seconds

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        """Whether the same peer may answer later."""
        return self.code.passes_with_time


class ProtocolViolation(PeerError):
    """The peer broke the protocol; `code` is what it is told before the connection closes."""

    code = RefusalCode.BAD_REQUEST


class UnsupportedVersion(ProtocolViolation):
    """The peer speaks a version of the protocol that this build does not know."""

    code = RefusalCode.UNSUPPORTED_VERSION


class NotAdmitted(ProtocolViolation):
    """The peer did not prove that it belongs to this swarm."""

    code = RefusalCode.NOT_ADMITTED


class UnusableAnswer(PeerError):
    """The peer answered with NaN or infinity: perhaps its hardware, perhaps the model; nobody's lie."""

    retryable = True


class WrongResult(PeerError):
    """The peer's answer is not what its experts compute: shown by computing it from verified weights."""


class IntegrityError(PeerError):
    """The peer sent bytes that do not match their hash."""


class FalseClaim(PeerError):
    """The peer announced what it does not have, or signed something that is not true."""


class LocalError(MoehiveError):
    """This machine's fault."""


class StorageError(LocalError):
    """A file of this machine cannot be read or written."""


class DiskFull(StorageError):
    """The disk, or the disk budget, is full."""


class CorruptShard(StorageError):
    """A file of this machine does not match the hash it is filed under."""


class SeedError(LocalError):
    """A permanent seed, such as the original checkpoint, cannot be read now. The message names it."""

    retryable = True


class SeedChanged(SeedError):
    """A permanent seed holds other bytes than the model was converted from. The message names the file."""

    retryable = False


class BudgetTooSmall(LocalError):
    """A byte budget cannot hold what was asked; `needed` is the smallest that works."""

    def __init__(self, what: str, *, budget: int, needed: int) -> None:
        from .units import format_enough, format_size  # which import this module, for ConfigError

        least = f"{format_enough(needed)} ({needed} bytes)"  # the first can be more by a tenth of its unit
        super().__init__(f"{what}: the budget is {format_size(budget)}; raise it to at least {least}")
        self.budget = budget
        self.needed = needed


class MemoryExhausted(LocalError):
    """The machine gave no memory although the budget had room, also after the budget was lowered."""


class TransportError(LocalError):
    """The network engine did not start, or stopped."""

    retryable = True


class CallerError(MoehiveError):
    """The caller asked for something impossible."""


class ConfigError(CallerError):
    """An unknown or malformed setting, flag or argument."""


class TicketError(CallerError):
    """A join ticket that cannot be read."""


class ManifestError(CallerError):
    """A manifest that cannot be read, or that contradicts itself or its files."""


class UnsupportedModel(CallerError):
    """A model that moehive cannot run; the message says which and why."""


class CheckpointError(CallerError):
    """A source checkpoint that is truncated or inconsistent."""


class TraceError(CallerError):
    """A routing trace or a predictor that cannot be read, or that belongs to another model."""


class DestinationError(CallerError):
    """An output that cannot be what was named: its place holds something else, or is none."""


class SwarmError(MoehiveError):
    """The swarm as a whole cannot do it now."""

    retryable = True


class ExpertUnavailable(SwarmError):
    """No live peer can run or supply these experts of this layer."""

    def __init__(self, layer: int, experts: Sequence[int], detail: str = "") -> None:
        names = ", ".join(str(expert) for expert in experts)
        super().__init__(f"layer {layer}: no live peer for expert(s) {names}{' (' + detail + ')' if detail else ''}")
        self.layer = layer
        self.experts = tuple(experts)


class ShardUnavailable(SwarmError):
    """No live peer can supply this shard."""

    def __init__(self, name: str, detail: str = "") -> None:
        super().__init__(f"shard {name}: no live peer can supply it{' (' + detail + ')' if detail else ''}")
        self.name = name
        self.detail = detail


class ModelUnavailable(SwarmError):
    """Nobody in the swarm announces this model."""

    def __init__(self, model_id: str, detail: str = "") -> None:
        super().__init__(f"model {model_id}: no peer of this swarm announces it{' (' + detail + ')' if detail else ''}")
        self.model_id = model_id
