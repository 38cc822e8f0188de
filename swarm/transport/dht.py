"""The table of announcements on hivemind's DHT node, run in our own loop on our own daemon (no process is forked).

hivemind's caches are off: an announcement that was withdrawn or renewed is seen at the next `get`. Whatever a peer
sends is checked twice, when it asks us to store it and when we read it; hivemind itself refuses nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import msgpack

from moehive.protocol.errors import PeerUnreachable, TransportError
from moehive.protocol.ids import PeerId

from .base import Record
from .daemon import Daemon
from .engine import import_hivemind
from .records import RecordValidator, checked_record

logger = logging.getLogger(__name__)

_RPC_TIMEOUT = 3.0  # seconds a peer may take to answer one call; a lookup makes several
_BOOTSTRAP_TIMEOUT = 1.0  # seconds for the rest of them after the first bootstrap peer has answered
_LOOKUP_TIMEOUT = 15.0
_LEAVE_TIMEOUT = 2.0
_MAX_FAILED = 1024  # peers that did not answer, whose failures are counted


class Table:
    """A peer of the table; an async context manager on a running daemon."""

    def __init__(
        self,
        daemon: Daemon,
        *,
        bootstrap: Sequence[PeerId],
        client_only: bool,
        validator: RecordValidator | None,
        clock: Callable[[], float],
    ) -> None:
        self._daemon = daemon
        self._bootstrap = tuple(bootstrap)
        self._client_only = client_only
        self._validator = _StorageGuard(validator, clock)
        self._clock = clock
        self._p2p: Any = None
        self._node: Any = None

    async def __aenter__(self) -> Self:
        hivemind = import_hivemind()
        address = hivemind.utils.multiaddr.Multiaddr(self._daemon.control_address)
        self._p2p = await hivemind.p2p.P2P.replicate(address)
        try:
            self._node = await hivemind.dht.node.DHTNode.create(
                p2p=self._p2p,
                initial_peers=[f"/p2p/{peer}" for peer in self._bootstrap],
                client_mode=self._client_only,
                wait_timeout=_RPC_TIMEOUT,
                bootstrap_timeout=_BOOTSTRAP_TIMEOUT,
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                record_validator=self._validator,
                strict=False,  # a peer with a wrong clock is no reason not to join; it is logged
            )
        except RuntimeError as error:
            await self._leave()
            raise PeerUnreachable(f"connected, but no answer from the table: {error}") from error
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._node.is_alive = False
        try:
            if self._daemon.alive:  # otherwise hivemind would wait for an answer for ever
                async with asyncio.timeout(_LEAVE_TIMEOUT):
                    await self._node.shutdown()
        except TimeoutError:
            logger.debug("left the table while p2pd did not answer")
        finally:
            await self._leave()

    async def put(self, key: bytes, subkey: str, record: Record) -> bool:
        """See `base.Transport`. False also for what is not newer than the record that is there."""
        assert checked_record(subkey, record.value, record.expires, math.inf) is not None, (subkey, len(record.value))
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT):
                stored = await self._node.store(
                    key, record.value, record.expires, subkey=subkey, exclude_self=self._client_only
                )
        except TimeoutError:
            return False
        return bool(stored)

    async def get(self, key: bytes) -> Mapping[str, Record]:
        """See `base.Transport`. Raises TransportError when the search does not end."""
        self._forget_failures()
        try:
            async with asyncio.timeout(_LOOKUP_TIMEOUT):
                # latest: without it the search ends at the first peer that has some of the subkeys
                found = await self._node.get(key, latest=True)
        except TimeoutError as error:
            raise TransportError(f"no answer from the table within {_LOOKUP_TIMEOUT:.0f} s") from error
        if found is None or not isinstance(found.value, dict):
            return {}
        now = self._clock()
        records = {
            subkey: checked_record(subkey, item.value, item.expiration_time, now)
            for subkey, item in found.value.items()
        }
        return {subkey: record for subkey, record in records.items() if record is not None and record.expires > now}

    def _forget_failures(self) -> None:
        """hivemind counts them for good, and names of peers that never were cost a stranger nothing."""
        if len(self._node.blacklist.ban_counter) > _MAX_FAILED:
            self._node.blacklist.clear()

    async def _leave(self) -> None:
        """End hivemind's calls and tasks, which it starts and forgets."""
        control = self._p2p._client.control
        for _ in range(20):  # a call that fails may be followed by another one, to the next peer
            pending = [call for call in control._pending_calls.values() if not call.done()]
            if not pending:
                break
            for call in pending:
                call.set_exception(import_hivemind().p2p.P2PDaemonError("this peer is leaving"))
            await asyncio.sleep(0)
        await self._p2p.shutdown()
        await asyncio.gather(control._read_task, control._write_task, return_exceptions=True)


def _scalar(packed: bytes) -> Any:
    """A text or bytes. Raises ValueError for a container: nested ones claim gigabytes with a few bytes."""
    return msgpack.unpackb(packed, max_array_len=0, max_map_len=0, max_ext_len=0)


class _StorageGuard:
    """What hivemind asks before it stores or believes a record (the interface of its RecordValidatorBase)."""

    def __init__(self, validator: RecordValidator | None, clock: Callable[[], float]) -> None:
        self._validator = validator
        self._clock = clock

    def validate(self, record: Any) -> bool:
        """`record`: a DHTRecord, its subkey and value in msgpack."""
        try:
            subkey, value = _scalar(record.subkey), _scalar(record.value)
        except (ValueError, msgpack.UnpackException):
            return False
        checked = checked_record(subkey, value, record.expiration_time, self._clock())
        if checked is None:
            return False
        return self._validator is None or self._validator(record.key, subkey, checked)

    def sign_value(self, record: Any) -> bytes:
        """Our records carry their signatures inside."""
        return bytes(record.value)

    def strip_value(self, record: Any) -> bytes:
        """Our records carry their signatures inside."""
        return bytes(record.value)
