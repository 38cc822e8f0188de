"""From an offer to a channel: all its addresses at once, and the token for the one that proves to be the peer."""

from __future__ import annotations

import asyncio

from moehive.protocol.errors import PeerUnreachable
from moehive.protocol.ids import PeerId
from moehive.protocol.messages import BulkOffer
from moehive.swarm.transport.addresses import host_and_port

from .channel import TlsChannel
from .link import TlsLink


async def dial(offer: BulkOffer, peer: PeerId, agent: str) -> TlsChannel:
    """A channel to `peer`. Raises PeerError. It has no deadline of its own: cancel it to give up.

    The addresses are the peer's word. Whoever is there instead of it gets a TLS greeting from us and nothing else.
    """
    return await TlsChannel.open(await _first_link(offer, peer), offer.token, agent)


async def _first_link(offer: BulkOffer, peer: PeerId) -> TlsLink:
    targets = [found for found in map(host_and_port, offer.addresses) if found is not None]
    pending = {asyncio.create_task(TlsLink.connect(*target, offer.fingerprint, peer)) for target in targets}
    reasons = []
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            attempt = done.pop()  # others that have ended come with the next turn
            pending.discard(attempt)
            try:
                return attempt.result()
            except PeerUnreachable as error:  # which the task keeps, while the traceback holds this frame and the task
                reasons.append(error.with_traceback(None).reason)
    finally:
        for attempt in pending:
            attempt.cancel()
            attempt.add_done_callback(_close_link)
    raise PeerUnreachable("; ".join(reasons) or "it names no address that can be dialled", peer=peer)


def _close_link(attempt: asyncio.Task[TlsLink]) -> None:
    """Of an attempt that came too late."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()
