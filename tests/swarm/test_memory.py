from pathlib import Path

import pytest

from moehive.swarm.memory import MemoryFacts, default_ram_budget, detect_memory

GIB = 1 << 30
MACHINE = (64 * GIB, 48 * GIB)


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def test_the_budget_is_half_of_the_room() -> None:
    assert default_ram_budget(MemoryFacts(total=64, available=40)) == 20
    assert default_ram_budget(MemoryFacts(total=64, available=40, limit=30, limit_used=10)) == 10
    assert default_ram_budget(MemoryFacts(total=64, available=4, limit=30, limit_used=10)) == 2
    assert default_ram_budget(MemoryFacts(total=64, available=40, limit=30, limit_used=31)) == 0


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
    assert facts == MemoryFacts(*MACHINE, limit=8 * GIB, limit_used=3 * GIB)
    write(tmp_path, {f"{group}/memory.max": 4 * GIB})
    assert detect_memory(tmp_path, machine=MACHINE).limit == 4 * GIB
    assert detect_memory(tmp_path, machine=MACHINE).room == GIB


@pytest.mark.parametrize("own", ["/", "/docker/0123456789"])
def test_version_1_inside_a_container(tmp_path: Path, own: str) -> None:
    files = {
        "proc/self/cgroup": f"12:cpu,cpuacct:{own}\n4:memory:{own}\n0::{own}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 2 * GIB,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
        "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 4}",
    }
    write(tmp_path, files)
    assert detect_memory(tmp_path, machine=MACHINE) == MemoryFacts(*MACHINE, limit=2 * GIB, limit_used=3 * GIB // 4)
    write(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000})
    assert detect_memory(tmp_path, machine=MACHINE).limit is None


def test_this_machine_has_memory() -> None:
    facts = detect_memory()
    assert 0 < facts.room <= facts.available <= facts.total
    assert default_ram_budget() > 0
