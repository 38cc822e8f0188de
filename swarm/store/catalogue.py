"""Which models a store's objects belong to, read from the manifests among them: nothing else knows or has to.

A manifest is recognised by its first bytes, then verified and parsed. Both are remembered: objects never change.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from moehive.protocol.errors import ManifestError, StorageError
from moehive.protocol.ids import ModelId, ShardHash
from moehive.protocol.limits import MAX_MANIFEST_BYTES
from moehive.protocol.manifest import MANIFEST_NAME, MANIFEST_START, Manifest
from moehive.swarm.policy.eviction import ObjectFacts, Rank

from .base import NotHeld
from .content import ContentStore
from .filesystem import LOCAL, FileSystem, storage_errors
from .keeping import Kept

Copies = Mapping[ShardHash, int]  # peers that hold an object; an object that is not there could not be asked for


@dataclass(frozen=True)
class Catalogue:
    """What a store holds, at one moment."""

    models: Mapping[ModelId, Manifest]  # whose manifests are held
    objects: Mapping[ShardHash, int]  # bytes
    partials: Mapping[ShardHash, int]
    last_used: Mapping[ShardHash, float]  # of objects and partials; seconds since the epoch
    kept: Kept
    unreadable: Mapping[ShardHash, str]  # what looks like a manifest and is none: why

    @cached_property
    def members(self) -> Mapping[ModelId, frozenset[ShardHash]]:
        """The objects that each model consists of, held or not."""
        return {
            model: frozenset((ShardHash(model), *(shard.hash for shard in manifest.shards)))
            for model, manifest in self.models.items()
        }

    @cached_property
    def foundations(self) -> frozenset[ShardHash]:
        """Dense parts of models of which something is in use."""
        out: set[ShardHash] = set()
        for model, manifest in self.models.items():
            if any(member in self.kept.in_use for member in self.members[model]):
                out.update(shard.hash for shard in manifest.skeleton)
        return frozenset(out)

    @cached_property
    def dependants(self) -> Mapping[ShardHash, frozenset[ShardHash]]:
        """By manifest, the objects here of which only it tells what they are; what several models share, the first."""
        left = {*self.objects, *self.partials} - {ShardHash(model) for model in self.models}
        out: dict[ShardHash, frozenset[ShardHash]] = {}
        for model in sorted(self.models):
            out[ShardHash(model)] = self.members[model] & left
            left -= self.members[model]
        return out

    @cached_property
    def claimed(self) -> frozenset[ShardHash]:
        """The objects that some model is known to consist of."""
        return frozenset().union(*self.members.values())

    def name_of(self, object_hash: ShardHash) -> str:
        """What people call an object: a model and a file of it."""
        return self._names.get(object_hash, f"object {object_hash}")

    @cached_property
    def _names(self) -> Mapping[ShardHash, str]:
        names = {}
        for model, manifest in self.models.items():
            names[ShardHash(model)] = f"{manifest.model.name}/{MANIFEST_NAME}"
            names.update((shard.hash, f"{manifest.model.name}/{shard.file}") for shard in manifest.shards)
        return names

    def is_pinned(self, object_hash: ShardHash) -> bool:
        """Whether a pinned model may need an object: one of which nothing is known may need any that nobody claims."""
        known = [self.members[model] for model in self.kept.pins if model in self.members]
        if len(known) < len(self.kept.pins) and object_hash not in self.claimed:
            return True
        return any(object_hash in members for members in known)

    def facts(self, copies: Copies) -> list[ObjectFacts]:
        """Every object and every abandoned download, for the eviction policy."""
        held = [self._facts(key, size, copies) for key, size in self.objects.items()]
        return held + [self._facts(key, size, copies, Rank.PARTIAL) for key, size in self.partials.items()]

    def _facts(self, key: ShardHash, size: int, copies: Copies, rank: Rank | None = None) -> ObjectFacts:
        return ObjectFacts(
            hash=key,
            size=size,
            last_used=self.last_used.get(key, 0.0),
            rank=self._rank(key) if rank is None else rank,
            pinned=self.is_pinned(key),
            in_use=key in self.kept.in_use,
            copies=copies.get(key),
            dependants=self.dependants.get(key, frozenset()) if rank is None else frozenset(),
        )

    def _rank(self, key: ShardHash) -> Rank:
        if key in self.dependants:
            return Rank.MANIFEST
        return Rank.FOUNDATION if key in self.foundations else Rank.SHARD


class Cataloguer:
    """Takes catalogues of one store. Blocks on the disk; thread-safe."""

    def __init__(self, store: ContentStore, *, fs: FileSystem = LOCAL) -> None:
        self._store = store
        self._fs = fs
        self._known: dict[ShardHash, Manifest | None] = {}  # None: not a manifest
        self._lock = threading.Lock()

    def take(self) -> Catalogue:
        """The catalogue now. Raises StorageError."""
        store = self._store
        objects, partials, kept = store.objects(), store.partials(), store.keeping.now()
        unreadable: dict[ShardHash, str] = {}
        models = {}
        with self._lock:
            for key in objects:
                try:
                    manifest = self._manifest(key, objects[key])
                except NotHeld:  # deleted since
                    continue
                except (ManifestError, StorageError) as error:
                    unreadable[key] = str(error)
                else:
                    if manifest is not None:
                        models[manifest.model_id] = manifest
            self._known = {key: manifest for key, manifest in self._known.items() if key in objects}
        last_used = {key: store.keeping.last_used(key) for key in (*objects, *partials)}
        return Catalogue(models, objects, partials, last_used, kept, unreadable)

    def _manifest(self, key: ShardHash, size: int) -> Manifest | None:
        if key not in self._known:
            manifest = None
            if size <= MAX_MANIFEST_BYTES and self._starts_as_manifest(key):
                manifest = Manifest.from_bytes(self._store.read(key))
            self._known[key] = manifest
        return self._known[key]

    def _starts_as_manifest(self, key: ShardHash) -> bool:
        path = self._store.path(key)
        if path is None:
            raise NotHeld(key)
        with storage_errors("read", path):
            fd = self._fs.open_read(path)
            try:
                return self._fs.pread(fd, len(MANIFEST_START), 0) == MANIFEST_START
            finally:
                self._fs.close(fd)
