"""How much memory this process may use: what the machine and its accelerators have, and what control groups allow.

Reads files, psutil and, for accelerators, torch; what follows from it is decided in policy/budgets.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

from .policy.budgets import DeviceFacts, DiskFacts, MemoryFacts, disk_budget, ram_budget, video_budget

if TYPE_CHECKING:
    import torch

_UNLIMITED = 1 << 60  # version 1 says "no limit" with a number near 2**63


def default_ram_budget() -> int:
    """Bytes for the RAM tier where the user names none: see `ram_budget`."""
    return ram_budget(detect_memory()).bytes


def default_disk_budget(store: Path) -> int:
    """Bytes for the store at `store` where the user names none: see `disk_budget`."""
    return disk_budget(detect_disk(store)).bytes


def default_vram_budget(device: torch.device) -> int:
    """Bytes for experts on a GPU, with its index, where the user names none: see `video_budget`."""
    return video_budget(_cuda_device(device.index)).bytes


def detect_memory(
    root: Path = Path("/"), *, machine: tuple[int, int] | None = None, devices: Sequence[DeviceFacts] = ()
) -> MemoryFacts:
    """The facts now, with the accelerators as given: looking at them is slow (`detect_devices`).

    `root` stands for /, `machine` for psutil's total and available bytes.
    """
    if machine is None:
        memory = psutil.virtual_memory()
        machine = int(memory.total), int(memory.available)
    facts = MemoryFacts(*machine, far=_far(root), devices=devices)
    limits = list(_limits(root))
    if not limits:
        return facts
    limit, used, group = min(limits, key=lambda one: one[0] - one[1])
    return replace(facts, limit=limit, limit_used=used, limit_group="/" + str(group.relative_to(root)))


def detect_devices() -> Sequence[DeviceFacts]:
    """The accelerators that torch can use, which it imports."""
    import torch

    devices = [_cuda_device(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        free = max(0, total - torch.mps.driver_allocated_memory())
        devices.append(DeviceFacts("mps", total, free, unified=True))
    return devices


def detect_disk(store: Path) -> DiskFacts:
    """Of the place of a store, which need not exist yet. Raises OSError where it cannot be looked at."""
    existing = next(path for path in (store, *store.absolute().parents) if path.exists())
    held = sum(file.stat().st_blocks * 512 for file in store.rglob("*") if file.is_file())
    return DiskFacts(shutil.disk_usage(existing).free, held)


def _cuda_device(index: int) -> DeviceFacts:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return DeviceFacts(f"cuda:{index} {properties.name}", total, free, unified=bool(properties.is_integrated))


def _far(root: Path) -> int:
    """Free bytes in NUMA nodes without processors."""
    nodes = (root / "sys/devices/system/node").glob("node[0-9]*")
    return sum(_free_of(node) for node in nodes if (node / "cpulist").exists() and not _read(node / "cpulist").strip())


def _free_of(node: Path) -> int:
    for line in _read(node / "meminfo").splitlines():  # "Node 1 MemFree:  123 kB"
        fields = line.split()
        if len(fields) > 3 and fields[2] == "MemFree:" and fields[3].isdigit():
            return int(fields[3]) << 10
    return 0


def _limits(root: Path) -> Iterator[tuple[int, int, Path]]:
    """Limit, use and directory of each limited control group that this process is in, upwards to the root."""
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
                yield limit, max(0, used - _field(group / "memory.stat", names[2])), group


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
