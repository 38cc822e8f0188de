"""What a node holds and therefore announces: only objects that were verified on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from moehive.protocol.bits import Bits
from moehive.protocol.chunks import ChunkList
from moehive.protocol.errors import CorruptShard, StorageError
from moehive.protocol.ids import ExpertKey, ShardHash
from moehive.protocol.manifest import Manifest, ShardEntry
from moehive.swarm.log import get_logger
from moehive.swarm.policy.claims import EVERYTHING
from moehive.swarm.store.base import NotHeld, ObjectSource
from moehive.swarm.transfer.partials import Partials

TELL_EVERY = 1.0  # seconds: thousands of shards are not to be announced one by one
T = TypeVar("T")
_log = get_logger(__name__)


class Holdings:
    """The verified part of a model on this machine. Grows while shards arrive, shrinks when one is found corrupt.

    `verify` and the reading methods block and belong into threads; the rest is cheap.
    """

    def __init__(
        self,
        manifest: Manifest,
        source: ObjectSource,
        *,
        on_change: Callable[[], None],
        partials: Partials | None = None,
    ) -> None:
        self.manifest = manifest
        self._source = source
        self._on_change = on_change
        self._partials = partials or Partials()  # what is being downloaded: its verified chunks are supplied too
        self._verified: dict[ShardHash, ShardEntry] = {}  # held: announced and computed with
        self._seed: set[ShardHash] = set()  # beyond that verified, and supplied to others
        self._loading = 0  # passes of fetching that are under way

    @property
    def experts(self) -> frozenset[ExpertKey]:
        """Experts that can be computed and served."""
        return frozenset(shard.expert_key for shard in list(self._verified.values()) if shard.expert_key is not None)

    @property
    def expert_bytes(self) -> int:
        """Bytes of those experts' shards."""
        return sum(shard.size for shard in list(self._verified.values()) if shard.expert_key is not None)

    @property
    def supplied_bytes(self) -> int:
        """Bytes of everything that can be fetched here."""
        return sum(shard.size for shard in self.manifest.shards if self._is_held(shard.hash))

    @property
    def skeleton(self) -> bool:
        """Whether dense part and assets are all here."""
        return all(self._is_held(shard.hash) for shard in self.manifest.skeleton)

    @property
    def complete(self) -> bool:
        """Whether every shard of the model can be fetched here."""
        return all(self._is_held(shard.hash) for shard in self.manifest.shards)

    @property
    def is_loading(self) -> bool:
        """Whether more is being fetched, of which parts may be supplied already."""
        return self._loading > 0

    @contextmanager
    def loading(self) -> Iterator[None]:
        """More is being fetched while the body runs."""
        self._loading += 1
        self._on_change()
        try:
            yield
        finally:
            self._loading -= 1
            self._on_change()

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert can be computed here."""
        shard = self.manifest.experts.get(ExpertKey(layer, expert))
        return shard is not None and shard.hash in self._verified

    def verify(self, shards: Iterable[ShardEntry]) -> None:
        """Hash shards and hold those that are right, telling as it goes; the others are left out, loudly."""
        told = time.monotonic()
        for shard in shards:
            try:
                self._source.chunk_list(shard.hash)
            except NotHeld:
                _log.error("shard is missing: not announced", file=shard.file)
            except StorageError as error:
                _log.error("shard is unusable: not announced", file=shard.file, reason=str(error))
            else:
                self._verified[shard.hash] = shard
            if time.monotonic() - told >= TELL_EVERY:
                self._on_change()
                told = time.monotonic()
        self._on_change()

    def verify_seed(self, verified: Callable[[int], None] = lambda size: None) -> None:
        """Hash every other shard of the model, so that all of it can be supplied; stops at the first that is wrong.

        `verified` is told the size of each one that is right.
        """
        for shard in self.manifest.shards:
            if shard.hash not in self._verified:
                try:
                    self._source.chunk_list(shard.hash)
                except StorageError as error:
                    _log.error("not offered as a seed of the whole model", file=shard.file, reason=str(error))
                    return
                self._seed.add(shard.hash)
            verified(shard.size)
        self._on_change()

    def add(self, shard: ShardEntry) -> None:
        """Hold a shard that was just fetched, hence verified."""
        self._verified[shard.hash] = shard
        self._on_change()

    def leave(self, shards: Iterable[ShardEntry]) -> None:
        """No longer hold shards that others hold: requests that are under way still find their bytes."""
        for shard in shards:
            self._verified.pop(shard.hash, None)
        self._on_change()

    def drop(self, object_hash: ShardHash) -> None:
        """No longer hold an object: it was found corrupt or is gone."""
        shard = self._verified.pop(object_hash, None)
        if shard is not None or object_hash in self._seed:
            self._seed.discard(object_hash)
            _log.error("shard is corrupt or gone: no longer announced", file=shard.file if shard else object_hash)
            self._on_change()

    # --- serving --------------------------------------------------------------------------------------------------

    def chunk_list(self, object_hash: ShardHash) -> ChunkList | None:
        """The chunk list of an object that may be served; None where nothing of it is held."""
        held = self._guarded(object_hash, lambda: self._source.chunk_list(object_hash))
        return held or self._partials.chunk_list(object_hash)

    def have(self, object_hash: ShardHash) -> Bits:
        """Which of an object's chunks may be served now."""
        return EVERYTHING if self._is_held(object_hash) else self._partials.have(object_hash)

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes | None:
        """Verified bytes of an object that may be served; None where they are not held."""
        held = self._guarded(object_hash, lambda: self._source.read_range(object_hash, offset, length))
        return held if held is not None else self._partials.read_range(object_hash, offset, length)

    def _is_held(self, object_hash: ShardHash) -> bool:
        held = object_hash in self._verified or object_hash in self._seed
        return held or object_hash == ShardHash(self.manifest.model_id)

    def _guarded(self, object_hash: ShardHash, read: Callable[[], T]) -> T | None:
        if not self._is_held(object_hash):
            return None
        try:
            return read()
        except (CorruptShard, NotHeld):
            self.drop(object_hash)
            return None
