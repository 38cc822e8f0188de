"""How much memory this process may use.

Owns the detection only: the smaller of what the machine has free and what the control group still allows.
"""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP_FILES = (  # (limit, current use), version 2 then version 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
_SHARE = 0.6  # of the free memory: the rest is for the dense part, the KV cache and the page cache


def available_memory(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process can still take before it swaps or is killed."""
    free = int(psutil.virtual_memory().available)
    for limit_name, usage_name in _CGROUP_FILES:
        limit, usage = _number(cgroup_root / limit_name), _number(cgroup_root / usage_name)
        if limit is not None and usage is not None:
            free = min(free, max(limit - usage, 0))
    return free


def default_ram_budget(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes for the RAM tier where the user names none."""
    return int(available_memory(cgroup_root) * _SHARE)


def _number(path: Path) -> int | None:
    """The number in a control group's file; None for "max" or no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
