"""A `ChunkChannel` over one TLS connection.

Two threads receive and hand on; requests and their ends belong to the event loop. It never waits for the network, and
the threads never for it.
"""

from __future__ import annotations

import asyncio
import threading
import time

from moehive.protocol import limits
from moehive.protocol.chunks import ChunkList
from moehive.protocol.codec import Message
from moehive.protocol.errors import PeerError, PeerTimeout, PeerUnreachable
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.messages import SHARD, ChunkHashes, GetChunkList, GetChunks, GetHave, Have
from moehive.protocol.proofs import ShownToken
from moehive.protocol.session import ClientSession, Opened
from moehive.swarm.transfer.background import start_thread
from moehive.swarm.transfer.channel import Deliver
from moehive.swarm.transfer.replies import ExpectedChunks, read_chunk_list, read_have

from .delivery import ChunkRequest, Delivery
from .link import TlsLink
from .receiving import Question, Receiver

_THREADS = 2  # one receives while the other one hands on
_READ_SIZE = 4 << 10  # of the greeting
_CLOSE_TIMEOUT = 5.0  # seconds; a thread that is stuck in the disk is left to itself


class TlsChannel:
    """See `channel.ChunkChannel`. Made by `open`."""

    def __init__(self, link: TlsLink, session: ClientSession) -> None:
        self._link = link
        self._session = session
        self._slots = asyncio.Semaphore(limits.MAX_REQUESTS_IN_FLIGHT)
        self._delivery = Delivery()
        self._receiver = Receiver(link, session, self._delivery, asyncio.get_running_loop(), self._slots.release)
        self._threads: list[threading.Thread] = []

    @classmethod
    async def open(cls, link: TlsLink, token: bytes, agent: str) -> TlsChannel:
        """Show the token, and start. Owns `link` from now on. Raises PeerError. Cancel it to give up."""
        session = ClientSession(SHARD, ShownToken(token, link.peer), agent)
        try:
            link.send(b"".join(session.send_hello()))
            await _await_welcome(link, session)
        except BaseException:
            link.close()
            raise
        channel = cls(link, session)
        link.start_blocking()
        channel._threads = [start_thread(channel._receiver.run, f"bulk from {link.peer[-6:]}") for _ in range(_THREADS)]
        return channel

    @property
    def peer(self) -> PeerId:
        """See `ChunkChannel`."""
        return self._link.peer

    @property
    def broken(self) -> PeerError | None:
        """See `ChunkChannel`."""
        return self._receiver.broken

    async def chunk_list(self, object_hash: ShardHash, *, timeout: float) -> ChunkList:
        """See `ChunkChannel`."""
        reply, payload = await self._ask(GetChunkList(hash=object_hash), timeout)
        assert isinstance(reply, ChunkHashes)
        return read_chunk_list(reply, payload, object_hash, self.peer)

    async def have(self, object_hash: ShardHash, *, timeout: float) -> frozenset[int] | None:
        """See `ChunkChannel`."""
        reply, payload = await self._ask(GetHave(hash=object_hash), timeout)
        assert isinstance(reply, Have)
        return read_have(reply, payload, self.peer)

    async def get_chunks(
        self, object_hash: ShardHash, first: int, count: int, deliver: Deliver, *, timeout: float
    ) -> None:
        """See `ChunkChannel`."""
        await self._take_slot(timeout)
        request = ChunkRequest(asyncio.get_running_loop().create_future(), deliver, ExpectedChunks(first, count))
        request_id = self._receiver.begin(GetChunks(hash=object_hash, first=first, count=count), request)
        try:
            await self._while_it_moves(request, timeout)
            request.done.result()
        finally:
            self._receiver.withdraw(request_id)  # nothing, where the peer has finished
            if not request.done.done():
                self._delivery.withdraw(request)
                await _outlast_cancellation(request.done)
            del request  # the error that it keeps has a traceback, which holds this frame

    async def close(self) -> None:
        """See `ChunkChannel`."""
        self._link.shut()
        await asyncio.to_thread(self._join)

    # --- parts ----------------------------------------------------------------------------------------------------

    async def _ask(self, message: Message, timeout: float) -> tuple[Message, bytearray]:
        deadline = time.monotonic() + timeout
        await self._take_slot(timeout)
        question = Question(asyncio.get_running_loop().create_future())
        request_id = self._receiver.begin(message, question)
        try:
            await asyncio.wait((question.done,), timeout=deadline - time.monotonic())
            if not question.done.done():
                raise PeerTimeout(f"no answer within {timeout:.1f} s", peer=self.peer)
            return question.done.result()
        finally:
            self._receiver.withdraw(request_id)
            del question  # the error that it keeps has a traceback, which holds this frame

    async def _take_slot(self, timeout: float) -> None:
        """Given back when the peer has finished with the request: a cancelled one counts until it confirms."""
        try:
            async with asyncio.timeout(timeout):
                await self._slots.acquire()
        except TimeoutError as error:
            reason = f"{limits.MAX_REQUESTS_IN_FLIGHT} requests are unanswered after {timeout:.1f} s"
            raise PeerTimeout(reason, peer=self.peer) from error

    async def _while_it_moves(self, request: ChunkRequest, timeout: float) -> None:
        while not request.done.done():
            left = max(request.moved, self._delivery.moved) + timeout - time.monotonic()
            if left <= 0:
                raise PeerTimeout(f"no chunk within {timeout:.1f} s", peer=self.peer)
            await asyncio.wait((request.done,), timeout=left)

    def _join(self) -> None:
        deadline = time.monotonic() + _CLOSE_TIMEOUT
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))


async def _await_welcome(link: TlsLink, session: ClientSession) -> None:
    while True:
        for event in session.receive(await link.read(_READ_SIZE)):
            if isinstance(event, Opened):
                return
            raise PeerUnreachable("closed the connection instead of taking the token", peer=link.peer)


async def _outlast_cancellation(future: asyncio.Future[None]) -> None:
    """Wait for what comes soon, and be cancelled only then."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
