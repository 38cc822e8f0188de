"""How many bytes each tier may use where nobody says: from what the machine has, what its control groups allow, and
what is free. Pure; swarm/memory.py reads the facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moehive.protocol.units import format_size

MOST_DISK: Final = 20 << 30  # of fetched experts, unless somebody says more
_SPARE_VIDEO: Final = 1 << 30  # activations, the libraries' own work space
_FULL: Final = 0.9  # share of a place's free bytes that is taken at most
_SHARES: Final = 8  # of a RAM budget that are compared
_LEAST_STORED: Final = 4  # experts: threads that load hold one each


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One accelerator's memory, in bytes."""

    name: str
    total: int
    free: int
    unified: bool = False  # it computes in the machine's own memory (Apple, Jetson, GB10): there is no copy to make


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Bytes. `available` is what can be taken without swapping."""

    total: int
    available: int
    limit: int | None = None  # of the control group with the least room, this process' own or one above it
    limit_used: int = 0  # what counts against that limit, without page cache that the kernel would give back
    limit_group: str = ""  # that group's directory
    far: int = 0  # of `available`, in NUMA nodes without processors: a GH200's video memory, or memory behind CXL
    devices: Sequence[DeviceFacts] = ()

    @property
    def near(self) -> int:
        """Bytes available next to the processors."""
        return max(0, self.available - self.far)

    @property
    def room(self) -> int:
        """Bytes this process can still take before it swaps or is killed."""
        if self.limit is None:
            return self.near
        return min(self.near, max(0, self.limit - self.limit_used))

    @property
    def unified(self) -> bool:
        """Whether an accelerator computes in the memory of the machine."""
        return any(device.unified for device in self.devices)


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """Bytes of the place where fetched objects are kept."""

    free: int
    held: int = 0  # by the store already


@dataclass(frozen=True, slots=True)
class Budget:
    """One tier's bytes, and why so many."""

    tier: str
    bytes: int
    reason: str


def plan_budgets(memory: MemoryFacts, disk: DiskFacts) -> tuple[Budget, ...]:
    """Video memory of each accelerator, RAM, disk: from the fastest to the slowest."""
    return (*(video_budget(device) for device in memory.devices), ram_budget(memory), disk_budget(disk))


def video_budget(device: DeviceFacts) -> Budget:
    """For experts on `device`, asked once the dense part is there: what is free but for activations."""
    tier = f"vram {device.name}"
    if device.unified:
        return Budget(tier, 0, "shares the machine's memory: experts in the RAM tier need no copy here")
    spare = max(_SPARE_VIDEO, round(device.free * (1 - _FULL)))
    size = max(0, device.free - spare)
    return Budget(tier, size, f"{format_size(device.free)} free, less {format_size(spare)} for activations")


def ram_budget(memory: MemoryFacts) -> Budget:
    """Half of the room there is.

    The other half is for the dense part, the KV cache, activations and the page cache that reading shards lives on;
    none of them is known yet when the tier is made.
    """
    if memory.limit is not None and memory.room < memory.near:
        why = (
            f"{format_size(memory.limit)} in control group {memory.limit_group}, {format_size(memory.room)} of it left"
        )
    else:
        why = f"{format_size(memory.near)} of {format_size(memory.total)} are available"
    if memory.far:
        why += f", without {format_size(memory.far)} in nodes without processors"
    if memory.unified:
        why += ", shared with the accelerator"
    return Budget("ram", memory.room // 2, f"half of the room: {why}; the rest for the dense part and the KV cache")


def disk_budget(disk: DiskFacts) -> Budget:
    """What the store holds and nine tenths of what is free, at most MOST_DISK."""
    there = disk.held + int(disk.free * _FULL)
    if there < MOST_DISK:
        return Budget("disk", there, f"{format_size(disk.held)} are held, {format_size(disk.free)} free, a tenth stays")
    return Budget("disk", MOST_DISK, f"the usual; {format_size(disk.free)} are free")


def least_ram(expert_bytes: int, top_k: int) -> int:
    """Bytes below which a tier would load a token's experts over and over."""
    return least_experts(top_k) * expert_bytes


def least_experts(top_k: int) -> int:
    """Those of two layers of one token, and one in flight."""
    return 2 * top_k + 1


@dataclass(frozen=True, slots=True)
class ExpertForms:
    """The experts that are used together, in the two forms that memory can hold them in."""

    count: int
    stored: int  # bytes of one as it is stored
    widened: int  # bytes of one as it is computed with
    making: int  # bytes beside these while one is made straight from the disk
    floor: int  # experts that the second form must have room for, whatever the first takes
    read: float  # seconds to read one from the disk, verified
    widen: float  # seconds to make the second form of the first


def stays_widened(budget: int, forms: ExpertForms) -> bool:
    """Whether every expert is made ready once and stays, so that what making it ready costs does not matter.

    What the last one is made of must fit beside all of them: else another would leave for it, and come back.
    """
    return forms.count * forms.widened + forms.making <= budget


def bytes_as_stored(budget: int, forms: ExpertForms, *, always: bool = False) -> int:
    """How much of a RAM budget holds experts as they are stored; the rest holds them as they are computed with.

    0 where all of them fit as they are computed with. Else what costs a use the least time, if the most used x of
    all experts have 1 - (1 - x)^2 of the uses: one that is absent from the rest is widened, and one that is absent
    from both is read before. `always`: as many as possible, because they are wanted in that form.
    """
    most = min(forms.count * forms.stored, budget - forms.floor * forms.widened)
    if forms.stored >= forms.widened or most < _LEAST_STORED * forms.stored:
        return 0
    if always:
        return most

    def cost(share: int) -> float:
        left = budget - (share or forms.making)  # of what is held as stored, one is made without reading
        widened = min(1.0, left / (forms.count * forms.widened))
        here = max(widened, share / (forms.count * forms.stored))
        return (1 - widened) ** 2 * forms.widen + (1 - here) ** 2 * forms.read

    shares = [most * step // _SHARES for step in range(1, _SHARES + 1)]
    return min((0, *(share for share in shares if share >= _LEAST_STORED * forms.stored)), key=cost)
