"""`moehive doctor`: what is found, what is chosen and why, and an exit code for scripts."""

from __future__ import annotations

import json
import resource

import pytest

from moehive.swarm.identity import Identity


@pytest.fixture(autouse=True)
def enough_files():
    """The tests' own limit may be low; what is said about that is tested elsewhere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_machine_in_order(moehive, home):
    outcome = moehive("doctor")
    assert outcome.code == 0, outcome.out
    for part in ("memory", "control group", "accelerator", "half of the room", "packages", "p2pd", "torch"):
        assert part in outcome.out
    assert not home.exists(), "it only looks"


def test_the_same_for_programs_with_a_model(moehive, converted):
    outcome = moehive("doctor", converted, "--json")
    said = json.loads(outcome.out)
    budgets = {budget["tier"]: budget for budget in said["budgets"]}
    checks = {check["name"]: check for check in said["checks"]}
    assert (outcome.code, said["ok"]) == (0, True)
    assert 0 < budgets["ram"]["bytes"] <= said["memory"]["roomBytes"]
    assert budgets["disk"]["bytes"] > 0
    assert all(budget["reason"] for budget in budgets.values())
    assert checks["model"]["found"].startswith("all 48 experts of demo")
    assert {"torch", "triton", "hivemind", "transformers"} <= set(checks)


def test_what_was_found_is_said_beside_what_was_chosen_and_why():
    """A machine with a card, an accelerator that shares its memory, and a control group."""
    from moehive.node.cli.doctor import describe
    from moehive.swarm.policy.budgets import DeviceFacts, DiskFacts, MemoryFacts, plan_budgets

    gib = 1 << 30
    devices = [DeviceFacts("cuda:0 H100", 80 * gib, 70 * gib), DeviceFacts("mps", 48 * gib, 40 * gib, unified=True)]
    memory = MemoryFacts(
        64 * gib, 40 * gib, limit=30 * gib, limit_used=10 * gib, limit_group="/sys/fs/cgroup/job", devices=devices
    )
    disk = DiskFacts(free=10 * gib, held=gib)
    lines = {
        tuple(line.split(maxsplit=1)) for line in describe(memory, disk, plan_budgets(memory, disk), []).splitlines()
    }
    said = {" ".join(line) for line in lines}
    for part in (
        "memory 64.0 GiB, 40.0 GiB available",
        "control group /sys/fs/cgroup/job: 30.0 GiB, 10.0 GiB used",
        "accelerator cuda:0 H100: 80.0 GiB, 70.0 GiB free",
        "accelerator mps: 48.0 GiB, shares the machine's memory",
        "disk 10.0 GiB free, 1.0 GiB in the store",
        "vram cuda:0 H100 63.0 GiB: 70.0 GiB free, less 7.0 GiB for activations",
        "vram mps 0 B: shares the machine's memory",
        "ram 10.0 GiB: half of the room: 30.0 GiB in control group /sys/fs/cgroup/job, 20.0 GiB of it left",
        "disk 10.0 GiB: 1.0 GiB are held, 10.0 GiB free",
    ):
        assert any(" ".join(part.split()) in " ".join(line.split()) for line in said), part


def test_a_model_is_held_against_every_memory_that_its_experts_may_have(tmp_path, converted):
    from support.families import save_checkpoint

    from moehive.node.cli.doctor import _fit
    from moehive.swarm.convert import convert
    from moehive.swarm.policy.budgets import Budget

    budgets = [Budget("vram cuda:0 H100", 1 << 30, ""), Budget("vram mps", 0, ""), Budget("ram", 1 << 30, "")]
    ram, device = _fit(converted, budgets)
    assert "all 48 experts of demo" in ram.found
    assert (device.name, device.found) == ("vram cuda:0 H100", "48 of 48 experts of demo fit")
    save_checkpoint("gpt_oss_mxfp4", tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "model")
    rams = range(0, 1 << 21, 1 << 15)  # from nothing to more than all
    said = [" ".join(check.found for check in _fit(tmp_path / "model", [Budget("ram", ram, "")])) for ram in rams]
    assert any("fit as they are stored" in found for found in said)
    assert "fit as they are stored" not in said[0] + said[-1]


def test_a_key_that_others_can_read_fails_it(moehive, home):
    Identity.load_or_create(home / "data" / "identity.key")
    assert moehive("doctor", "--json").code == 0
    (home / "data" / "identity.key").chmod(0o644)
    outcome = moehive("doctor")
    assert outcome.code == 1
    assert "WRONG" in outcome.out
    assert f"chmod 600 {home / 'data' / 'identity.key'}" in outcome.out


def test_a_damaged_store_fails_it(moehive, home, converted):
    from moehive.swarm.store.content import ContentStore
    from moehive.swarm.store.directory import ConvertedDirectory

    store = ContentStore(home / "cache" / "store", 1 << 30)
    manifest = ConvertedDirectory(converted).manifest
    store.put(manifest.to_bytes())
    assert moehive("doctor").code == 0
    path = store.path(manifest.model_id)
    path.write_bytes(path.read_bytes()[:-1])
    outcome = moehive("doctor", "--json")
    wrong = [check for check in json.loads(outcome.out)["checks"] if check["state"] == "wrong"]
    assert (outcome.code, [check["name"] for check in wrong]) == (1, ["store"])


def test_what_is_no_model_is_refused(moehive, tmp_path):
    outcome = moehive("doctor", tmp_path)
    assert outcome.code == 2
    assert "neither a converted directory" in outcome.err
