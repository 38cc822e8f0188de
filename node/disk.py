"""How full the store is: looked up now and then in a thread, so that whoever asks never waits for a lock of it."""

from __future__ import annotations

import asyncio

from moehive.protocol.errors import StorageError
from moehive.swarm.log import get_logger
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.ledger import Usage

LOOK_EVERY = 10.0  # seconds
_log = get_logger(__name__)


class DiskWatch:
    """`usage` is what was found last; None before that."""

    def __init__(self, store: ContentStore) -> None:
        self.usage: Usage | None = None
        self._store = store

    async def run(self) -> None:
        """Look for ever. That it cannot be read is logged once, and what was known stays."""
        troubled = False
        while True:
            try:
                self.usage = await asyncio.to_thread(self._store.usage)
                troubled = False
            except StorageError as error:
                if not troubled:
                    _log.warning("cannot tell how full the store is", reason=str(error))
                troubled = True
            await asyncio.sleep(LOOK_EVERY)
