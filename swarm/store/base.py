"""What every holder of objects offers, whether it is the store, a converted directory, or one over the other.

An object is a shard, an asset or a manifest, named by its root hash (protocol/chunks.py). The rule for all sources:
bytes that leave are verified against that name on their way out; an object that fails is taken out of view at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from moehive.protocol.chunks import ChunkList
from moehive.protocol.errors import DiskFull, StorageError
from moehive.protocol.ids import ShardHash
from moehive.protocol.units import format_size


class ObjectSource(Protocol):
    """Whole, verified objects on this machine's disk. Methods block on the disk and may be called from any thread."""

    def path(self, object_hash: ShardHash) -> Path | None:
        """The object's file; None where it is not held. Never a file that is still being written. Never raises."""

    def chunk_list(self, object_hash: ShardHash) -> ChunkList:
        """The object's chunk hashes, taken from its bytes (the first call reads the whole file).

        Raises NotHeld, StorageError; CorruptShard where the bytes are not the object, which is then out of view.
        """

    def read_range(self, object_hash: ShardHash, offset: int, length: int) -> bytes:
        """Verified bytes of an object.

        Ranges on chunk boundaries cost one read and one hash. Raises ValueError for a range outside the object, and
        what `chunk_list` raises.
        """

    def quarantine(self, object_hash: ShardHash) -> None:
        """Take an object out of view: its bytes were found wrong. `path` gives None from now on."""


class NotHeld(StorageError):
    """The object is not on this machine."""

    def __init__(self, object_hash: ShardHash) -> None:
        super().__init__(f"object {object_hash} is not held here")
        self.object_hash = object_hash


class DiskBudgetFull(DiskFull):
    """The store's budget has no room for something; nothing was written of it. `short` bytes have to go."""

    def __init__(self, root: Path, what: str, *, needed: int, used: int, budget: int) -> None:
        super().__init__(
            f"store {root}: the disk budget is {format_size(budget)}, {format_size(used)} are used, and {what} "
            f"need {format_size(needed)} more; raise the budget (--disk), or make room (moehive store prune --help)"
        )
        self.needed = needed  # bytes
        self.used = used
        self.budget = budget
        self.short = used + needed - budget


class PartialBusy(StorageError):
    """Another thread or process is downloading this object into the same store: wait until it appears."""

    retryable = True

    def __init__(self, object_hash: ShardHash) -> None:
        super().__init__(f"object {object_hash} is being written by another download; wait for it to finish")
        self.object_hash = object_hash


class WrongBytes(ValueError):
    """The bytes offered are not what their hash says. Nothing was written; whoever supplied them is to blame."""
