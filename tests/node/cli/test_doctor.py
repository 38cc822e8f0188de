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
