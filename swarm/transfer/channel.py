"""What the download engine needs from a way to one peer's bytes, whichever carrier it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from moehive.protocol.chunks import ChunkList
from moehive.protocol.errors import PeerError
from moehive.protocol.ids import PeerId, ShardHash

Deliver = Callable[[int, memoryview], None]  # chunk index, its bytes: valid during the call only


class ChunkChannel(Protocol):
    """An open, authenticated way to one peer that supplies chunks. Its methods are called on the event loop."""

    @property
    def peer(self) -> PeerId:
        """The peer at the other end."""

    @property
    def broken(self) -> PeerError | None:
        """Why the channel is good for nothing any more; None while it works."""

    async def chunk_list(self, object_hash: ShardHash, *, timeout: float) -> ChunkList:
        """The object's chunk hashes, verified against its name. Raises PeerError."""

    async def have(self, object_hash: ShardHash, *, timeout: float) -> frozenset[int] | None:
        """The chunks that the peer can supply now; None for all of them. A claim. Raises PeerError."""

    async def get_chunks(
        self, object_hash: ShardHash, first: int, count: int, deliver: Deliver, *, timeout: float
    ) -> None:
        """Get `count` chunks from `first` on; several calls may run at the same time.

        Calls `deliver` once for each chunk, ascending, in a thread of the carrier's: it blocks (hashing, writing), and
        no two calls of it for the same request overlap. What it raises ends the request and is raised here. `timeout`
        seconds may pass before the first chunk and between two. Cancelling the caller withdraws the request at the
        peer; `deliver` is not called any more once the cancellation is through. Raises PeerError.
        """

    async def close(self) -> None:
        """Give the channel up; requests that are running fail. Never raises, may be called twice."""


OpenChannel = Callable[[PeerId, Sequence[str]], Awaitable[ChunkChannel]]  # peer, its addresses; raises PeerError
