"""Where the store keeps what: every path rule in one place.

    <root>/objects/<first 2 hex>/<hash>    finished objects: the only names anybody reads. Read-only once they exist
    <root>/partial/<hash>.part             downloads in progress, and objects found corrupt: unverified by definition
    <root>/pins/<model id>                 an empty file for each model that is never evicted
    <root>/uses/<random>                   what one live process uses; means nothing without its lock
    <root>/lock                            cross-process lock and change counter of the budget's ledger

`partial` lies beside `objects`, on the same device by construction, so that completion is one atomic rename. Objects
are spread over 256 directories because Kimi-K2 has 23,040 of them and some file systems and tools slow down in one.
A file's name and its time of modification (when it was last used) are its whole metadata: nothing has to be kept in
step with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moehive.protocol.ids import ModelId, ShardHash, is_hash

_PART = ".part"


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """Path rules below `root`."""

    root: Path

    @property
    def objects(self) -> Path:
        """The directory of the fan-out directories."""
        return self.root / "objects"

    @property
    def partials(self) -> Path:
        """The directory of unverified files."""
        return self.root / "partial"

    @property
    def pins(self) -> Path:
        """The directory of pins."""
        return self.root / "pins"

    @property
    def uses(self) -> Path:
        """The directory of uses."""
        return self.root / "uses"

    @property
    def lock(self) -> Path:
        """The ledger's lock file."""
        return self.root / "lock"

    def object(self, object_hash: ShardHash) -> Path:
        """A finished object's file."""
        assert is_hash(object_hash), object_hash  # names come from peers: never a path of their choosing
        return self.objects / object_hash[:2] / object_hash

    def partial(self, object_hash: ShardHash) -> Path:
        """A download's file."""
        assert is_hash(object_hash), object_hash
        return self.partials / (object_hash + _PART)

    def pin(self, model: ModelId) -> Path:
        """The file that pins a model."""
        assert is_hash(model), model
        return self.pins / model

    @staticmethod
    def object_of(name: str) -> ShardHash | None:
        """The object that a file name below `objects` stands for; None for a stranger's file."""
        return ShardHash(name) if is_hash(name) else None

    @staticmethod
    def partial_of(name: str) -> ShardHash | None:
        """The object that a file name in `partial` stands for; None for a stranger's file."""
        stem = name.removesuffix(_PART)
        return ShardHash(stem) if stem != name and is_hash(stem) else None
