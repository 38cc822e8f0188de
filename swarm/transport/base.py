"""What moehive needs from a network: authenticated byte streams between peers, and a table of expiring records.

Three implementations: `hivemind` (the go-libp2p daemon and hivemind's DHT node), `memory` (tests: deterministic, with
faults that can be switched on). Nothing above this module knows which one it runs on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from moehive.protocol.ids import PeerId

Buffer = bytes | bytearray | memoryview


def joined_head(buffers: Iterable[Buffer], limit: int) -> list[memoryview]:
    """`buffers`, the first two joined as far as `limit` bytes go: a header of its own costs everybody on its way."""
    views = [view for buffer in buffers if (view := memoryview(buffer).cast("B"))]
    if len(views) < 2 or len(views[0]) >= limit:
        return views
    taken = limit - len(views[0])
    head = memoryview(b"".join((views[0], views[1][:taken])))
    return [head, *filter(None, (views[1][taken:], *views[2:]))]


class Stream(Protocol):
    """A reliable, ordered, authenticated byte stream to one peer.

    The end of a stream says nothing about completeness: the daemon behind it can lose the tail when the sender closes
    first. Whoever reads counts bytes, and the receiver of the last byte closes first.
    """

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""

    async def read(self, limit: int) -> bytes:
        """Some bytes, at most `limit`; b"" when the other side has closed. Raises PeerUnreachable when it breaks."""

    async def write(self, *buffers: Buffer) -> None:
        """Send all of `buffers` in order, whole between those of other tasks; returns below the high-water mark.

        After a write that was cancelled the stream is good for closing only. Raises PeerUnreachable.
        """

    async def close(self) -> None:
        """Close both directions; never raises, may be called twice, returns within a second."""


@dataclass(frozen=True, slots=True)
class Record:
    """One announcement as the table returned it: unverified bytes."""

    value: bytes
    expires: float  # seconds since the epoch


Handler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """A peer's connection to the network; an async context manager that connects on entry and leaves on exit."""

    @property
    def peer(self) -> PeerId:
        """Our own id."""

    @property
    def addresses(self) -> Sequence[str]:
        """Multiaddrs under which others can dial us, each ending in /p2p/<our id>."""

    async def open(self, peer: PeerId, protocol: str, addresses: Sequence[str] = ()) -> Stream:
        """A new stream to `peer`; `addresses` are hints for dialling. Raises PeerUnreachable."""

    async def serve(self, protocol: str, handler: Handler) -> None:
        """Call `handler` in a task of its own for every stream that others open, and close it when that returns."""

    async def stop_serving(self, protocol: str) -> None:
        """Accept no more streams of `protocol`; running handlers go on."""

    async def put(self, key: bytes, subkey: str, record: Record) -> bool:
        """Store `record` under (key, subkey) until it expires; False when no peer took it."""

    async def get(self, key: bytes) -> Mapping[str, Record]:
        """The live records under `key`, by subkey. Values come from strangers: verify them."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
