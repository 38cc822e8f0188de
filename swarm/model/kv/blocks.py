"""Which block of which layer is where: on the device, in host memory, on disk.

A layer's blocks are numbered by age. Its oldest are on disk, those after them in host memory, its newest on the device;
they move down when a tier is full and never up again (see `plan`). The disk tier is one file for each layer, appended
to, so that a layer's blocks are read in one go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moehive.protocol.errors import DiskFull
from moehive.protocol.units import format_size

from .layout import Pair
from .memory import Account, BufferPool, view_bytes
from .plan import KvPlan, next_to_spill
from .scratch import ScratchFile


class Destination(Protocol):
    """Where a layer's blocks are put together."""

    def parts(self, count: int) -> list[memoryview] | None:
        """Host memory that the first `count` blocks go to as they are, in order; None where they cannot."""

    def put(self, first: int, blocks: Tensor) -> None:
        """Take in blocks number `first` and those after it, [m, nbytes] uint8."""


@dataclass(slots=True)
class _Shelf:
    """One layer's blocks."""

    nbytes: int = 0  # of each
    on_disk: int = 0
    in_host: deque[Tensor] = field(default_factory=deque)
    on_device: deque[Tensor] = field(default_factory=deque)
    file: ScratchFile | None = None

    def __len__(self) -> int:
        return self.on_disk + len(self.in_host) + len(self.on_device)


@dataclass(slots=True)
class BlockCounts:
    """What moved so far."""

    spilled_blocks: int = 0  # that left the device
    written_bytes: int = 0  # to disk
    reloaded_bytes: int = 0  # from host memory and disk


class BlockStore:
    """The blocks of all layers. Not thread-safe: who loads in another thread changes nothing meanwhile."""

    def __init__(self, layers: int, device: BufferPool, host: BufferPool, disk: Account, directory: Path) -> None:
        self.counts = BlockCounts()
        self._shelves = [_Shelf() for _ in range(layers)]
        self._device = device
        self._host = host
        self._disk = disk
        self._directory = directory
        self._device_bytes = 0
        self._plan = KvPlan(slots=0, slot=0, resident=0, window=None, transit=0)
        # A file is read into host memory: on a CPU that is the device's own
        self._staging = device if device.device.type == "cpu" else host

    def count(self, layer: int) -> int:
        """Blocks of one layer."""
        return len(self._shelves[layer])

    def follow(self, plan: KvPlan) -> None:
        """Keep from now on what the plan lets stay on the device. Raises DiskFull, StorageError."""
        self._plan = plan
        if self._staging is self._host:  # here, because nothing may move while a layer is read
            self._free_in_host(self._transit)
        self._shrink()
        self._device.drop_spare()

    def append(self, layer: int, nbytes: int, fill: Callable[[Tensor], None]) -> None:
        """Add a block of `nbytes`, as all of this layer's are, which `fill` writes. Raises DiskFull, StorageError."""
        shelf = self._shelves[layer]
        assert nbytes == shelf.nbytes or not len(shelf), "the blocks of a layer are of one size"
        shelf.nbytes = nbytes
        block = self._device.take(nbytes)
        fill(block)
        shelf.on_device.append(block)
        self._device_bytes += nbytes
        self._shrink()

    def load(self, layer: int, into: Destination) -> None:
        """Put a layer's blocks together. Raises StorageError."""
        shelf = self._shelves[layer]
        if shelf.on_disk:
            self._load_from_disk(shelf, into)
        for index, block in enumerate(chain(shelf.in_host, shelf.on_device), shelf.on_disk):
            into.put(index, block[None])
        self.counts.reloaded_bytes += (shelf.on_disk + len(shelf.in_host)) * shelf.nbytes

    def look_at(self, layer: int, index: int, look: Callable[[Tensor], None]) -> None:
        """Call `look` with block number `index`, which is valid during the call only. Raises StorageError."""
        shelf = self._shelves[layer]
        if index < shelf.on_disk:
            with self._staged(shelf, index) as blocks:
                look(blocks[0])
        else:
            look([*shelf.in_host, *shelf.on_device][index - shelf.on_disk])

    def truncate(self, layer: int, count: int) -> None:
        """Keep the `count` oldest blocks of a layer. Raises StorageError."""
        shelf = self._shelves[layer]
        while len(shelf) > count and shelf.on_device:
            self._device.give(shelf.on_device.pop())
            self._device_bytes -= shelf.nbytes
        while len(shelf) > count and shelf.in_host:
            self._host.give(shelf.in_host.pop())
        if len(shelf) > count:
            assert shelf.file is not None
            shelf.file.truncate(count * shelf.nbytes)
            self._disk.give((shelf.on_disk - count) * shelf.nbytes)
            shelf.on_disk = count

    def rewrite(
        self, layer: int, nbytes: int, unpack: Callable[[Tensor], Pair], pack: Callable[[Pair, Tensor], None]
    ) -> None:
        """Replace each block of a layer by one of `nbytes`, which `pack` writes from what `unpack` read of the old one.

        On disk both exist until the end. Raises DiskFull, StorageError; the layer's blocks are then lost.
        """
        old, self._shelves[layer] = self._shelves[layer], _Shelf()
        try:
            for index in range(old.on_disk):
                with self._staged(old, index) as blocks:
                    content = unpack(blocks[0])
                self.append(layer, nbytes, partial(pack, content))
            while old.in_host:
                content = unpack(old.in_host[0])
                self._host.give(old.in_host.popleft())
                self.append(layer, nbytes, partial(pack, content))
            while old.on_device:
                content = unpack(old.on_device[0])
                self._take_from_device(old)
                self.append(layer, nbytes, partial(pack, content))
        finally:
            self._drop(old)

    def _drop(self, shelf: _Shelf) -> None:
        """Give back all that a layer's blocks take."""
        while shelf.on_device:
            self._take_from_device(shelf)
        while shelf.in_host:
            self._host.give(shelf.in_host.popleft())
        if shelf.file is not None:
            shelf.file.close()
            self._disk.give(shelf.on_disk * shelf.nbytes)

    def close(self) -> None:
        """Give back files and spare buffers. The layers are empty by then."""
        assert not any(map(len, self._shelves))
        for shelf in self._shelves:
            if shelf.file is not None:
                shelf.file.close()
        self._shelves = [_Shelf() for _ in self._shelves]
        for pool in (self._device, self._host):
            pool.drop_spare()

    # --- moving down ----------------------------------------------------------------------------------------------

    def _shrink(self) -> None:
        while True:
            tier = [(shelf.on_disk + len(shelf.in_host), len(shelf.on_device)) for shelf in self._shelves]
            layer = next_to_spill(tier, over=self._device_bytes > self._plan.resident, window=self._plan.window)
            if layer is None:
                return
            self._leave_device(self._shelves[layer])

    def _leave_device(self, shelf: _Shelf) -> None:
        block = shelf.on_device[0]
        if self._make_room_in_host(shelf.nbytes):
            copy = self._host.take(shelf.nbytes)
            shelf.in_host.append(copy.copy_(block))
        elif block.device.type == "cpu":
            self._write(shelf, block)
        else:
            self._free_in_host(shelf.nbytes)
            copy = self._host.take(shelf.nbytes)
            try:
                self._write(shelf, copy.copy_(block))
            finally:
                self._host.give(copy)
        self._take_from_device(shelf)
        self.counts.spilled_blocks += 1

    def _take_from_device(self, shelf: _Shelf) -> None:
        self._device.give(shelf.on_device.popleft())
        self._device_bytes -= shelf.nbytes

    def _make_room_in_host(self, nbytes: int) -> bool:
        """Whether a block of `nbytes` can stay in host memory, after older ones left it where that was needed."""
        reserve = max(self._transit, nbytes) if self._staging is self._host else 0  # for blocks read from disk
        return nbytes + reserve <= self._host.account.limit and self._free_in_host(nbytes + reserve)

    def _free_in_host(self, nbytes: int) -> bool:
        """Write the oldest blocks in host memory to disk until `nbytes` are free; whether they are.

        They are not where a layer that is being rewritten fills it: its new blocks then go straight to disk.
        """
        while True:
            tier = [(shelf.on_disk, len(shelf.in_host)) for shelf in self._shelves]
            layer = next_to_spill(tier, over=self._host.room < nbytes)
            if layer is None:
                return self._host.room >= nbytes
            shelf = self._shelves[layer]
            self._write(shelf, shelf.in_host[0])
            self._host.give(shelf.in_host.popleft())

    @property
    def _transit(self) -> int:
        """Bytes that blocks on their way from disk may take at a time."""
        return min(self._plan.transit, self._staging.account.limit)

    def _write(self, shelf: _Shelf, block: Tensor) -> None:
        """Append to the layer's file. The caller takes the block from where it was."""
        if self._disk.used + shelf.nbytes > self._disk.limit:
            raise DiskFull(
                f"the KV cache's disk budget of {format_size(self._disk.limit)} is full; raise it (--kv-disk), or the "
                "budgets of memory above it"
            )
        if shelf.file is None:
            shelf.file = ScratchFile(self._directory)
        shelf.file.write(view_bytes(block), shelf.on_disk * shelf.nbytes)
        self._disk.take(shelf.nbytes)
        shelf.on_disk += 1
        self.counts.written_bytes += shelf.nbytes

    # --- reading --------------------------------------------------------------------------------------------------

    def _load_from_disk(self, shelf: _Shelf, into: Destination) -> None:
        parts = into.parts(shelf.on_disk)
        if parts is not None:
            assert shelf.file is not None
            shelf.file.read_into(parts, 0)
            return
        several = max(1, self._transit // shelf.nbytes)
        for first in range(0, shelf.on_disk, several):
            with self._staged(shelf, first, min(several, shelf.on_disk - first), room=several) as blocks:
                into.put(first, blocks)

    @contextmanager
    def _staged(self, shelf: _Shelf, first: int, count: int = 1, *, room: int = 1) -> Iterator[Tensor]:
        """Blocks [count, nbytes] from disk, in a buffer that has room for `room` of them."""
        assert shelf.file is not None
        buffer = self._staging.take(room * shelf.nbytes)
        try:
            wanted = buffer[: count * shelf.nbytes]
            shelf.file.read_into([view_bytes(wanted)], first * shelf.nbytes)
            yield wanted.view(count, shelf.nbytes)
        finally:
            self._staging.give(buffer)
