"""Publishing a model: how many copies of it the others have come to hold, and when that is enough."""

from __future__ import annotations

import asyncio

from moehive.protocol.errors import TransportError
from moehive.protocol.manifest import Manifest
from moehive.swarm.log import get_logger
from moehive.swarm.member import Member
from moehive.swarm.replicas import full_copies

from .settings import Publishing

LOOK_EVERY = 2.0  # seconds
_log = get_logger(__name__)


async def watch_copies(member: Member, manifest: Manifest, publishing: Publishing, enough: asyncio.Event) -> None:
    """Tell how many copies the others hold whenever that changes; set `enough` when they are as many as are wanted."""
    directory, told = member.directory(manifest.model_id), -1.0
    while True:
        try:
            await directory.refresh()
        except (TimeoutError, TransportError) as error:
            _log.debug("nobody could be asked who holds what", reason=str(error))
        copies = full_copies(manifest, directory.holders, member.transport.peer)
        if copies != told:
            told = copies
            publishing.on_copies(copies)
        if publishing.copies is not None and copies >= publishing.copies:
            _log.info("others hold enough copies", copies=publishing.copies)
            enough.set()
            return
        await asyncio.sleep(LOOK_EVERY)
