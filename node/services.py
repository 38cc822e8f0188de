"""What a node answers: the handlers of the three protocols. They check, refuse with a reason, or hand on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from moehive.protocol import limits
from moehive.protocol.codec import Message
from moehive.protocol.errors import RefusalCode
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import (
    BulkOffer,
    ExpertsDone,
    GetDemand,
    GetInventory,
    GetLoad,
    Inventory,
    Load,
    OpenBulk,
    RunExperts,
)
from moehive.swarm.dispatch.request import tensor_bytes
from moehive.swarm.rpc.server import Refusal, Reply
from moehive.swarm.transfer.supply import Shelf, answers
from moehive.swarm.transfer.uploads import Uploads

from .compute import Work
from .demand import DemandMeter
from .holdings import Holdings
from .worker import ComputeWorker


class ExpertService:
    """/moehive/expert: runs experts that this node holds, and tells `uploads`, which make way for that."""

    def __init__(
        self,
        holdings: Holdings,
        worker: ComputeWorker,
        uploads: Uploads | None = None,
        offer: Callable[[PeerId], BulkOffer] | None = None,
        demand: DemandMeter | None = None,
    ) -> None:
        self._holdings = holdings
        self._worker = worker
        self._uploads = uploads or Uploads()
        self._demand = demand or DemandMeter()
        self._offer = offer  # of a direct connection
        self._leaving = False
        self._answering = 0  # requests that were accepted and whose answer is not written yet
        self._answered = asyncio.Event()

    def refuse_more(self) -> None:
        """Refuse requests from now on: this node leaves."""
        self._leaving = True

    async def drain(self) -> None:
        """Return when everything that was accepted is answered, the answers written."""
        while self._answering:
            self._answered.clear()
            await self._answered.wait()

    def gate(self, peer: PeerId, message: Message, payload_bytes: int) -> Refusal | None:
        """A request that would not be queued is refused where it arrives: see `rpc.server.Gate`."""
        if self._leaving or not isinstance(message, RunExperts):
            return None
        return self._worker.refusal(message, payload_bytes, peer)

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        """Answer RunExperts or OpenBulk."""
        if isinstance(message, OpenBulk):
            if self._offer is None:
                raise Refusal(RefusalCode.BUSY, "no direct connections here", retry_after=limits.MAX_DEADLINE)
            await reply(self._offer(peer))
            return
        assert isinstance(message, RunExperts)
        started = time.monotonic()
        self._uploads.asked(peer)
        self._answering += 1
        try:
            await self._run(peer, message, payload, reply)
            self._uploads.served(message.rows, time.monotonic() - started)
        finally:
            self._answering -= 1
            self._answered.set()

    async def _run(self, peer: PeerId, message: RunExperts, payload: bytearray, reply: Reply) -> None:
        message.check(len(payload))
        self._check_held(message)
        try:
            work = Work.parse(message, payload)
        except ValueError as error:
            raise Refusal(RefusalCode.BAD_REQUEST, str(error)) from error
        self._demand.asked(message.layer, message.experts, message.counts)
        result = await self._worker.submit(work, len(payload), peer)
        waited, computed = (min(seconds, limits.MAX_DEADLINE) for seconds in (result.waited, result.computed))
        done = ExpertsDone(waited=waited, computed=computed)
        await reply(done, (tensor_bytes(result.output),))

    def _check_held(self, message: RunExperts) -> None:
        manifest = self._holdings.manifest
        if self._leaving:
            raise Refusal(RefusalCode.SHUTTING_DOWN)
        if message.model != manifest.model_id:
            raise Refusal(RefusalCode.UNKNOWN_MODEL, f"this node serves model {manifest.model_id}")
        absent = [expert for expert in message.experts if not self._holdings.holds(message.layer, expert)]
        if absent:
            raise Refusal(RefusalCode.NOT_HELD, f"experts {absent[:8]} of layer {message.layer} are not held here")
        if message.hidden != manifest.model.hidden_size:
            raise Refusal(RefusalCode.BAD_REQUEST, f"the model's hidden size is {manifest.model.hidden_size}")
        if message.rows > message.tokens * manifest.model.top_k:
            raise Refusal(RefusalCode.BAD_REQUEST, f"a token has at most {manifest.model.top_k} experts in this model")


class ShardService:
    """/moehive/shard: bytes of objects that this node holds, and the offer of a faster way to them."""

    def __init__(self, shelf: Shelf, uploads: Uploads, offer: Callable[[PeerId], BulkOffer]) -> None:
        self._shelf = shelf
        self._uploads = uploads
        self._offer = offer

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        """Answer one request of the protocol: each answer has a turn of its own."""
        if isinstance(message, OpenBulk):
            await reply(self._offer(peer))
            return
        coming, more = answers(self._shelf, message), True
        while more:
            async with self._uploads.turn(peer):
                answer = await asyncio.to_thread(next, coming)
                await reply(answer.message, (answer.payload,), more=answer.more)
            self._uploads.sent(answer)
            more = answer.more


class PeerService:
    """/moehive/peer: what this node holds and how busy it is."""

    def __init__(
        self,
        holdings: Holdings,
        worker: ComputeWorker,
        uploads: Uploads,
        record: Callable[[], bytes],
        demand: DemandMeter | None = None,
    ) -> None:
        self._holdings = holdings
        self._worker = worker
        self._uploads = uploads
        self._record = record  # the signed announcement as of now
        self._demand = demand or DemandMeter()

    async def __call__(self, peer: PeerId, message: Message, payload: bytearray, reply: Reply) -> None:
        """Answer GetInventory, GetDemand or GetLoad."""
        if isinstance(message, GetInventory | GetDemand) and message.model != self._holdings.manifest.model_id:
            raise Refusal(RefusalCode.UNKNOWN_MODEL)
        if isinstance(message, GetInventory):
            await reply(Inventory(), (self._record(),))
        elif isinstance(message, GetDemand):
            await reply(self._demand.message())
        else:
            assert isinstance(message, GetLoad)
            await reply(self._load())

    def _load(self) -> Load:
        facts = self._worker.facts
        return Load(
            queued_requests=facts.requests,
            expected_wait=min(facts.expected_wait, limits.MAX_DEADLINE),  # all that the field holds
            rows_done=self._worker.rows_done,
            bytes_sent=self._uploads.bytes_sent,
        )
