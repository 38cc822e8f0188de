from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moehive.swarm.memory import (
    default_disk_budget,
    default_ram_budget,
    default_vram_budget,
    detect_devices,
    detect_disk,
    detect_memory,
)
from moehive.swarm.policy.budgets import DeviceFacts, MemoryFacts

GIB = 1 << 30
MACHINE = (64 * GIB, 48 * GIB)


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def test_a_machine_without_control_groups_has_only_its_own_memory(tmp_path: Path) -> None:
    assert detect_memory(tmp_path, machine=MACHINE) == MemoryFacts(*MACHINE)


def test_the_tightest_group_of_version_2_on_the_way_up_counts_without_page_cache(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user.slice/job"
    files = {
        "proc/self/cgroup": "0::/user.slice/job",
        f"{group}/memory.max": "max",
        f"{group}/memory.current": 3 * GIB,
        "sys/fs/cgroup/user.slice/memory.max": 8 * GIB,
        "sys/fs/cgroup/user.slice/memory.current": 5 * GIB,
        "sys/fs/cgroup/user.slice/memory.stat": f"anon 7\ninactive_file {2 * GIB}\nfile 9",
    }
    write(tmp_path, files)
    facts = detect_memory(tmp_path, machine=MACHINE)
    assert facts == MemoryFacts(*MACHINE, limit=8 * GIB, limit_used=3 * GIB, limit_group="/sys/fs/cgroup/user.slice")
    write(tmp_path, {f"{group}/memory.max": 4 * GIB})
    assert detect_memory(tmp_path, machine=MACHINE).limit == 4 * GIB
    assert detect_memory(tmp_path, machine=MACHINE).room == GIB


def test_the_tightest_group_is_that_with_the_least_room_not_with_the_lowest_limit(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/all/job"
    files = {
        "proc/self/cgroup": "0::/all/job",
        f"{group}/memory.max": 4 * GIB,
        f"{group}/memory.current": GIB,
        "sys/fs/cgroup/all/memory.max": 8 * GIB,
        "sys/fs/cgroup/all/memory.current": 7 * GIB,
    }
    write(tmp_path, files)
    facts = detect_memory(tmp_path, machine=MACHINE)
    assert (facts.limit_group, facts.room) == ("/sys/fs/cgroup/all", GIB)


@pytest.mark.parametrize("own", ["/", "/docker/0123456789"])
def test_version_1_inside_a_container(tmp_path: Path, own: str) -> None:
    files = {
        "proc/self/cgroup": f"12:cpu,cpuacct:{own}\n4:memory:{own}\n0::{own}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 2 * GIB,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 4}",
    }
    write(tmp_path, files)
    facts = detect_memory(tmp_path, machine=MACHINE)
    group = "/sys/fs/cgroup/memory"
    assert facts == MemoryFacts(*MACHINE, limit=2 * GIB, limit_used=3 * GIB // 4, limit_group=group)
    write(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000})
    assert detect_memory(tmp_path, machine=MACHINE).limit is None


def test_this_machine_has_memory() -> None:
    facts = detect_memory()
    assert 0 < facts.room <= facts.available <= facts.total
    assert default_ram_budget() > 0


def test_memory_in_nodes_without_processors_is_not_ours(tmp_path: Path) -> None:
    """As on a GH200, whose video memory is a NUMA node of the machine's memory."""
    nodes = "sys/devices/system/node"
    files = {
        f"{nodes}/node0/cpulist": "0-71",
        f"{nodes}/node0/meminfo": f"Node 0 MemTotal: {40 << 20} kB\nNode 0 MemFree: {30 << 20} kB",
        f"{nodes}/node1/cpulist": "",
        f"{nodes}/node1/meminfo": f"Node 1 MemTotal: {24 << 20} kB\nNode 1 MemFree: {18 << 20} kB",
    }
    write(tmp_path, files)
    facts = detect_memory(tmp_path, machine=MACHINE)
    assert facts.far == 18 * GIB
    assert facts.room == 30 * GIB


def test_accelerators_are_kept_as_given(tmp_path: Path) -> None:
    device = DeviceFacts("cuda:0 Orin", 64 * GIB, 40 * GIB, unified=True)
    assert detect_memory(tmp_path, machine=MACHINE, devices=[device]).unified


def test_the_disk_of_a_store_that_does_not_exist_yet(tmp_path: Path) -> None:
    store = tmp_path / "cache" / "store"
    assert detect_disk(store).held == 0
    store.mkdir(parents=True)
    (store / "object").write_bytes(bytes(1 << 20))
    facts = detect_disk(store)
    assert facts.held >= 1 << 20
    assert facts.free > 0
    assert 0 < default_disk_budget(store) <= 20 * GIB


def test_accelerators_as_torch_tells_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with memory of its own, a Jetson, and a Mac, in one machine that there is not."""
    cards = [SimpleNamespace(name="H100", is_integrated=0), SimpleNamespace(name="Orin", is_integrated=1)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((70 - index) * GIB, 80 * GIB))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 48 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 8 * GIB)
    assert detect_devices() == [
        DeviceFacts("cuda:0 H100", 80 * GIB, 70 * GIB),
        DeviceFacts("cuda:1 Orin", 80 * GIB, 69 * GIB, unified=True),
        DeviceFacts("mps", 48 * GIB, 40 * GIB, unified=True),
    ]
    assert default_vram_budget(torch.device("cuda", 0)) == 63 * GIB, "a tenth stays for activations"
    assert default_vram_budget(torch.device("cuda", 1)) == 0, "experts in RAM are there already"
