"""Permanent seeds as sources of the download engine: each stands among the peers, under a name that no peer has."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from moehive.protocol.chunks import CHUNK_SIZE, ChunkList, chunk_count, chunk_range
from moehive.protocol.errors import (
    IntegrityError,
    LocalError,
    PeerError,
    PeerRefused,
    PeerUnreachable,
    RefusalCode,
    SeedChanged,
    SeedError,
)
from moehive.protocol.ids import PeerId, ShardHash
from moehive.protocol.manifest import Manifest
from moehive.swarm.log import get_logger
from moehive.swarm.threads import to_its_end
from moehive.swarm.transfer.channel import ChunkChannel, Deliver, OpenChannel
from moehive.swarm.transfer.sources import Source, Sources

from .base import Seed, SeedName
from .opening import open_seed

READ_AT_ONCE = 4  # chunks; the first of them is not to be long in coming
_log = get_logger(__name__)


class Seeds:
    """The permanent seeds of a member. Used on the event loop; `close` gives their files up."""

    def __init__(self) -> None:
        self._seeds: dict[PeerId, _Entry] = {}

    def add(self, name: SeedName, manifest: Manifest) -> None:
        """A seed for one model; naming it again changes nothing. It is opened when it is needed."""
        peer = PeerId(f"seed {name.text} of {manifest.model.name} {manifest.model_id[:8]}")
        self._seeds.setdefault(peer, _Entry(name, manifest))

    async def open_nearby(self) -> list[SeedError]:
        """Open those on this machine now: whoever named the wrong directory wants to know. Why some are of no use."""
        errors = []
        for peer, entry in list(self._seeds.items()):
            try:
                if entry.nearby:
                    await to_its_end(entry.open)
            except SeedError as error:
                errors.append(error)
                del self._seeds[peer]
        return errors

    def sources(self, object_hash: ShardHash) -> Sources:
        """The seeds that may have an object. Those that are far away are asked only for what nobody else has."""
        return {
            peer: Source(last_resort=not entry.nearby)
            for peer, entry in self._seeds.items()
            if entry.offers(object_hash)
        }

    def channels(self, carrier: OpenChannel) -> OpenChannel:
        """`carrier`, which opens channels to peers, for seeds too."""

        async def open_channel(peer: PeerId, addresses: Sequence[str]) -> ChunkChannel:
            entry = self._seeds.get(peer)
            if entry is None:
                return await carrier(peer, addresses)
            try:
                return SeedChannel(peer, await to_its_end(entry.open), entry.sizes)
            except SeedChanged as error:
                _log.error("seed is of no use", reason=str(error))
                del self._seeds[peer]
                raise _peer_error(error, peer) from error
            except LocalError as error:
                raise _peer_error(error, peer) from error

        return open_channel

    def close(self) -> None:
        """Close what was opened."""
        for entry in self._seeds.values():
            entry.close()


class _Entry:
    """A seed that is opened when it is first needed, in whichever thread needs it."""

    def __init__(self, name: SeedName, manifest: Manifest) -> None:
        self.sizes = {shard.hash: shard.size for shard in manifest.shards}
        self._name = name
        self._manifest = manifest
        self._seed: Seed | None = None
        self._lock = threading.Lock()

    @property
    def nearby(self) -> bool:
        """Whether it lies on this machine."""
        return self._name.directory is not None

    def open(self) -> Seed:
        with self._lock:
            if self._seed is None:
                self._seed = open_seed(self._name, self._manifest)
            return self._seed

    def offers(self, object_hash: ShardHash) -> bool:
        return object_hash in self.sizes and (self._seed is None or self._seed.offers(object_hash))

    def close(self) -> None:
        if self._seed is not None:
            self._seed.close()


class SeedChannel:
    """A ChunkChannel to a seed. Reading blocks in threads; each slice is read to its end."""

    broken: PeerError | None = None

    def __init__(self, peer: PeerId, seed: Seed, sizes: dict[ShardHash, int]) -> None:
        self.peer = peer
        self._seed = seed
        self._sizes = sizes

    async def chunk_list(self, object_hash: ShardHash, *, timeout: float) -> ChunkList:
        """See ChunkChannel. The seed reads the whole object for it, however long that takes."""
        try:
            return await to_its_end(self._seed.chunk_list, object_hash)
        except SeedError as error:
            raise _peer_error(error, self.peer) from error

    async def have(self, object_hash: ShardHash, *, timeout: float) -> frozenset[int] | None:
        """See ChunkChannel."""
        return None if self._seed.offers(object_hash) else frozenset()

    async def get_chunks(
        self, object_hash: ShardHash, first: int, count: int, deliver: Deliver, *, timeout: float
    ) -> None:
        """See ChunkChannel."""
        size = self._sizes[object_hash]
        if first + count > chunk_count(size):
            raise PeerRefused(RefusalCode.BAD_REQUEST, f"the object has {chunk_count(size)} chunks", peer=self.peer)
        try:
            for start in range(first, first + count, READ_AT_ONCE):
                stop = min(start + READ_AT_ONCE, first + count)
                end = sum(chunk_range(stop - 1, size))
                data = await to_its_end(
                    self._seed.read_range, object_hash, start * CHUNK_SIZE, end - start * CHUNK_SIZE
                )
                with memoryview(data) as view:
                    for index in range(start, stop):
                        at = (index - start) * CHUNK_SIZE
                        await to_its_end(deliver, index, view[at : at + CHUNK_SIZE])
        except SeedError as error:
            raise _peer_error(error, self.peer) from error
        except IntegrityError as error:  # a seed does not lie: its files are others than they were
            raise _peer_error(self._seed.refute(object_hash), self.peer) from error

    async def close(self) -> None:
        """See ChunkChannel."""


def _peer_error(error: LocalError, peer: PeerId) -> PeerError:
    """What is wrong with a seed in the words of the engine: changed for good, or perhaps back in a moment."""
    if isinstance(error, SeedChanged):
        return PeerRefused(RefusalCode.NOT_HELD, str(error), peer=peer)
    return PeerUnreachable(str(error), peer=peer)
