"""The tier in an accelerator's memory: slots of equal size, filled through staging memory by copies beside the compute.

The rules of a tier (one load in flight per key, joined by all who wait; leases; the byte budget; the policy; a budget
that shrinks where memory ends) are `RamTier`'s. What is added is that the device runs behind the threads that command
it: a lease is given as soon as the copy was ordered, and what computes waits for the copy on the device; a slot is
written anew only after all that was ordered while it was leased is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from contextlib import ExitStack
from threading import get_ident
from types import TracebackType
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor

from .accelerator import Accelerator, Event
from .leases import Lease
from .lfru import Lfru
from .loading import LOADERS
from .policy import Place, Uses
from .ram import RamTier
from .staging import Staging, StagingBuffers
from .stats import TierStats

K = TypeVar("K", bound=Hashable)

SLAB: Final = 256 << 20  # bytes that are asked for at once: one by one, the allocator's rounding would be uncounted
UPLOADS: Final = 2  # newcomers of one layer and step that may take other layers' slots (llama.cpp PR 27861)


class Slot:
    """Device memory for one entry. `index` stays the same for as long as the tier lives."""

    __slots__ = ("_lock", "_reads", "index", "memory", "taker")

    def __init__(self, index: int, memory: Tensor) -> None:
        self.index = index
        self.memory = memory  # uint8 [slot bytes]
        self.taker: Hashable = None  # the key that it was last taken for
        self._reads: list[Event] = []  # of leases that ended
        self._lock = threading.Lock()

    def read(self, event: Event) -> None:
        """`event` ends something that reads the slot."""
        with self._lock:
            self._reads = [*(one for one in self._reads if not one.query()), event]

    @property
    def reads(self) -> Sequence[Event]:
        """What has to be waited for before the slot is written to."""
        return self._reads


class SlotPool:
    """Slots of `slot_bytes` each, at most `most` of them, allocated in slabs when they are needed. Thread-safe."""

    def __init__(self, accelerator: Accelerator, slot_bytes: int, most: int) -> None:
        self._accelerator = accelerator
        self._slot_bytes = slot_bytes
        self._most = most
        self._free: list[Slot] = []
        self._lock = threading.Lock()
        self.slots: list[Slot] = []

    @property
    def allocated_bytes(self) -> int:
        """Of device memory."""
        return len(self.slots) * self._slot_bytes

    def take(self, key: Hashable) -> Slot:
        """A free slot, for `key`. Raises torch.OutOfMemoryError where the device has none, and nothing is changed."""
        with self._lock:
            if not self._free:
                self._grow()
            self._free[-1].taker = key
            return self._free.pop()

    def recover(self, used: Collection[Slot], loading: Collection[Hashable]) -> None:
        """Get back what was neither free, nor is `used`, nor was taken for one of `loading`: lost by an interrupt."""
        with self._lock:
            busy = {slot for slot in self.slots if slot.taker in loading}.difference(self._free).union(used)
            self._free = [slot for slot in self.slots if slot not in busy]

    def give(self, slot: Slot) -> None:
        """It is free again, though what was enqueued may still read it."""
        with self._lock:
            self._free.append(slot)

    def _grow(self) -> None:
        count = min(self._most - len(self.slots), max(1, SLAB // self._slot_bytes))
        assert count > 0, "more entries than slots"
        try:
            memory = self._accelerator.allocate(count * self._slot_bytes)
        except torch.OutOfMemoryError:  # the last slots may still have room one by one
            memory, count = self._accelerator.allocate(self._slot_bytes), 1
        slab = memory.view(count, self._slot_bytes)  # [slots, bytes]
        first = len(self.slots)
        fresh = [Slot(first + row, slab[row]) for row in range(count)]
        self.slots += fresh
        self._free += fresh[::-1]


class Upload:
    """What a slot was filled with: an entry of the tier."""

    __slots__ = ("ready", "slot", "staging")

    def __init__(self, slot: Slot, ready: Event, staging: Staging) -> None:
        self.slot = slot
        self.ready = ready
        self.staging = staging


class DeviceTier(Generic[K]):
    """Entries of `slot_bytes` each in the memory of `accelerator`, using at most `budget_bytes` of it.

    `pack` writes an entry's bytes to host memory, uint8 [slot_bytes]; it is called on threads of the tier. `place` is
    the policy's: a key's layer and number. Besides the budget it uses host memory, `staging_bytes` at most: uploads
    that find none of it free wait for others.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        budget_bytes: int,
        slot_bytes: int,
        pack: Callable[[K, Tensor], None],
        *,
        place: Place[K],
        top_k: int,
        loaders: int = LOADERS,
        out_of_memory: Callable[[Exception], bool] = lambda error: isinstance(error, torch.OutOfMemoryError),
    ) -> None:
        self.slot_bytes = slot_bytes
        self._accelerator = accelerator
        self._pack = pack
        self._staging = StagingBuffers(accelerator, slot_bytes, loaders + 1)  # one is whose who waits for an upload
        self._pool = SlotPool(accelerator, slot_bytes, budget_bytes // slot_bytes)
        self._tier: RamTier[K, Upload] = RamTier(
            budget_bytes,
            self._upload,
            room=lambda _: slot_bytes,
            size=lambda _: slot_bytes,
            policy=Lfru(place, top_k=top_k, uploads=UPLOADS),
            group=lambda key: place(key)[0],
            name="VRAM",
            loaders=loaders,
            out_of_memory=out_of_memory,
            dropped=lambda upload: self._pool.give(upload.slot),
            arrive=self._arrive,
        )

    def close(self) -> None:
        """Wait for what was begun; nothing is loaded ahead afterwards."""
        self._tier.close()
        for slot in self._pool.slots:
            for event in slot.reads:
                event.synchronize()

    def note(self, uses: Uses[K]) -> Sequence[K]:
        """Say what a layer's call is about to use; returns what is absent, of which nothing begins to load by this.

        What is resident is spared by later uploads until it was used.
        """
        missing = self._tier.note(uses, ahead=False)
        self.spare(uses.layer, [key for key in uses.rows if key not in missing])
        return missing

    def spare(self, layer: int, keys: Sequence[K]) -> None:
        """Let these, and no others of `layer`, stay where anything else can leave, until they were used."""
        self._tier.want(layer, keys)

    def begin(self, layer: int, keys: Iterable[K]) -> Sequence[K]:
        """See RamTier.begin."""
        return self._tier.begin(layer, keys)

    def begin_one(self, key: K, ended: Callable[[], None]) -> bool:
        """See RamTier.begin_one."""
        return self._tier.begin_one(key, ended)

    def lease(self, key: K) -> DeviceLease[K]:
        """An entry's slot for the length of a `with`, loaded where it is absent; see RamTier.lease for the errors.

        What the thread enqueues inside finds the entry's bytes there, also where it runs long after the `with`.
        """
        return DeviceLease(self._accelerator, self._tier.lease(key))

    def try_lease(self, key: K) -> DeviceLease[K] | None:
        """The same for a resident entry; None where it is absent. To be entered, once."""
        lease = self._tier.try_lease(key)
        return None if lease is None else DeviceLease(self._accelerator, lease)

    def abandon(self, error: BaseException) -> None:
        """See RamTier.abandon. What the thread has enqueued may still read the slots that it used."""
        event = self._accelerator.record()
        for slot in self._pool.slots:
            slot.read(event)
        self._tier.abandon(error)
        self._staging.recover(get_ident())
        self._tier.look(lambda uploads, loading: self._pool.recover({one.slot for one in uploads}, loading))

    def keys(self) -> Sequence[K]:
        """What is resident now."""
        return self._tier.keys()

    @property
    def staging_bytes(self) -> int:
        """Host memory that uploads use at most."""
        return self._staging.most_bytes

    @property
    def upload_seconds(self) -> float:
        """From the order of an upload to its end, smoothed; 0 before the first."""
        return self._tier.load_seconds

    @property
    def budget_bytes(self) -> int:
        """The budget, which is lower than what was given where the device had less."""
        return self._tier.budget_bytes

    @property
    def allocated_bytes(self) -> int:
        """Device memory taken so far; at most the budget that was given."""
        return self._pool.allocated_bytes

    @property
    def stats(self) -> TierStats:
        """A snapshot. A miss is a use that had to be uploaded, or computed elsewhere; a load is an upload."""
        return self._tier.stats

    # --- loading --------------------------------------------------------------------------------------------------

    def _upload(self, key: K) -> Upload:
        with ExitStack() as undo:  # a slot that is not given back after a failure is lost for good
            staging, memory = self._staging.take()
            undo.callback(self._staging.give, staging)
            slot = self._pool.take(key)
            undo.callback(self._pool.give, slot)
            self._pack(key, memory)
            staging.copied = ready = self._accelerator.copy(slot.memory, memory, slot.reads)
            undo.pop_all()
            return Upload(slot, ready, staging)

    def _arrive(self, upload: Upload) -> None:
        """On the thread that loads: its staging memory is free when the copy is over."""
        upload.ready.synchronize()
        self._staging.give(upload.staging)


class DeviceLease(Generic[K]):
    """One use of one slot."""

    __slots__ = ("_accelerator", "_lease", "_slot")

    def __init__(self, accelerator: Accelerator, lease: Lease[K, Upload]) -> None:
        self._accelerator = accelerator
        self._lease = lease

    def __enter__(self) -> Slot:
        """Raises what RamTier.lease says."""
        upload = self._lease.__enter__()
        self._slot = upload.slot
        self._accelerator.wait(upload.ready)
        return upload.slot

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._slot.read(self._accelerator.record())
        finally:
            self._lease.__exit__(kind, error, trace)
