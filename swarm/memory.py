"""How much memory this process may use: what the machine has, and what its control groups allow.

Detection reads files and psutil; the budget is a pure function of what was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

_UNLIMITED = 1 << 60  # version 1 says "no limit" with a number near 2**63


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Bytes. `available` is what can be taken without swapping."""

    total: int
    available: int
    limit: int | None = None  # of the control group with the least room, this process' own or one above it
    limit_used: int = 0  # what counts against that limit, without page cache that the kernel would give back

    @property
    def room(self) -> int:
        """Bytes this process can still take before it swaps or is killed."""
        if self.limit is None:
            return self.available
        return min(self.available, max(0, self.limit - self.limit_used))


def default_ram_budget(facts: MemoryFacts | None = None) -> int:
    """Bytes for the RAM tier where the user names none: half of the room there is (None: on this machine, now).

    The other half is for the dense part, the KV cache, activations and the page cache that reading shards lives on;
    none of them is known yet when the tier is made. A pure function of `facts`.
    """
    return (detect_memory() if facts is None else facts).room // 2


def detect_memory(root: Path = Path("/"), *, machine: tuple[int, int] | None = None) -> MemoryFacts:
    """The facts now. `root` stands for /, `machine` for psutil's total and available bytes."""
    if machine is None:
        memory = psutil.virtual_memory()
        machine = int(memory.total), int(memory.available)
    limits = list(_limits(root))
    if not limits:
        return MemoryFacts(*machine)
    limit, used = min(limits, key=lambda pair: pair[0] - pair[1])
    return MemoryFacts(*machine, limit=limit, limit_used=used)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each limited control group that this process is in, upwards to the root."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        # In a container the path may be the host's, of which only the end, or nothing but the mount point, exists here.
        for path in (PurePosixPath(own.strip()), *PurePosixPath(own.strip()).parents):
            group = mount / str(path).lstrip("/")
            limit, used = _number(group / names[0]), _number(group / names[1])
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit, max(0, used - _field(group / "memory.stat", names[2]))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no control groups, or none of this version
        return ""


def _number(path: Path) -> int | None:
    """The number in a control group's file; None for "max" or no such file."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int:
    """One line of a `name value` file; 0 where it is missing."""
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0
