"""`moehive store`: what is held, whether it is intact, and making room without losing a last copy."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import Manifest
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory


@pytest.fixture
def manifest(converted: Path) -> Manifest:
    return ConvertedDirectory(converted).manifest


@pytest.fixture
def store(home: Path, converted: Path, manifest: Manifest) -> ContentStore:
    """The user's store, with the manifest, the dense part and three experts of the model "demo"."""
    store = ContentStore(home / "cache" / "store", 1 << 30)
    store.put(manifest.to_bytes())
    for shard in (*manifest.skeleton, *(manifest.experts[ExpertKey(0, expert)] for expert in range(3))):
        store.put(converted / shard.file)
    return store


def read(outcome: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(outcome.out)
    return answer


def damage(store: ContentStore, manifest: Manifest) -> str:
    shard = manifest.experts[ExpertKey(0, 1)]
    path = store.path(shard.hash)
    assert path is not None
    path.write_bytes(bytes(shard.size))
    return shard.file


# --- ls ---------------------------------------------------------------------------------------------------------------


def test_an_empty_store(moehive):
    outcome = moehive("store", "ls")
    assert (outcome.code, outcome.out) == (0, "  the store is empty\n")
    assert read(moehive("store", "ls", "--json"))["models"] == []


def test_models_are_listed_with_what_is_there(moehive, store, manifest):
    store.keeping.pin(manifest.model_id)
    with store.keeping.use([manifest.experts[ExpertKey(0, 0)].hash]):
        text, answer = moehive("store", "ls").out, read(moehive("store", "ls", "--json"))
    (model,) = answer["models"]
    assert all(part in text for part in ("demo", "3 of 48", "pinned, in use", "now", manifest.model_id))
    assert (model["experts"], model["expertsTotal"], model["skeleton"], model["complete"]) == (3, 48, True, False)
    assert (model["pinned"], model["inUse"]) == (True, True)
    assert model["bytes"] == answer["objectBytes"] == sum(store.objects().values())
    assert len(answer["objects"]) == len(store.objects())


def test_objects_are_listed_by_their_files(moehive, store, manifest):
    text = moehive("store", "ls", "--objects").out
    assert "demo/experts/00000/00002.safetensors" in text
    assert "demo/manifest.json" in text


def test_what_belongs_to_no_model_and_what_is_unfinished_shows(moehive, store):
    store.put(b"a stranger")
    (store.root / "partial" / ("ab" * 32 + ".part")).write_bytes(b"half")
    text = moehive("store", "ls").out
    assert "(of no known model)" in text
    assert "(unfinished downloads)" in text


# --- verify -----------------------------------------------------------------------------------------------------------


def test_an_intact_store(moehive, store):
    outcome = moehive("store", "verify")
    assert outcome.code == 0
    assert "all intact" in outcome.out
    assert read(moehive("store", "verify", "--json"))["damaged"] == {}


def test_a_damaged_object_is_named_and_taken_out_of_view(moehive, store, manifest):
    file = damage(store, manifest)
    outcome = moehive("store", "verify")
    assert outcome.code == 1
    assert "1 damaged" in outcome.out
    assert f"demo/{file}" in outcome.out
    assert not ContentStore(store.root, 1 << 30).has(manifest.experts[ExpertKey(0, 1)].hash)
    assert moehive("store", "verify").code == 0, "it is out of view now"


def test_a_damaged_manifest_is_named(moehive, store, manifest):
    path = store.path(manifest.model_id)
    path.write_bytes(path.read_bytes()[:-1])
    assert moehive("store", "verify", "--json").code == 1


def test_only_some_models(moehive, store, manifest):
    store.put(b"a stranger")
    everything, one = (read(moehive("store", "verify", *name, "--json"))["objects"] for name in ((), ("demo",)))
    assert one == everything - 1


# --- prune ------------------------------------------------------------------------------------------------------------


def test_nothing_goes_that_may_be_the_last_copy(moehive, store):
    before = dict(store.objects())
    outcome = moehive("store", "prune")
    assert outcome.code == 1
    assert f"kept {len(before)} objects" in outcome.out
    assert "not known whether another peer has it" in outcome.out
    assert "--join TICKET asks the swarm" in outcome.err
    assert store.objects() == before


def test_force_lets_everything_go_but_what_is_pinned_or_in_use(moehive, store, manifest):
    used = manifest.experts[ExpertKey(0, 2)].hash
    with store.keeping.use([used]):
        outcome = moehive("store", "prune", "--force", "--json")
    assert outcome.code == 0
    assert store.objects().keys() == {used, manifest.model_id}, "the manifest tells what the other one is"
    assert {reason: kept["objects"] for reason, kept in read(outcome)["kept"].items()} == {"IN_USE": 1, "NEEDED": 1}
    assert read(outcome)["freedBytes"] > 0


def test_a_pinned_model_stays(moehive, store, manifest):
    before = dict(store.objects())
    assert moehive("store", "pin", "demo").code == 0
    assert moehive("store", "prune", "--force").code == 0
    assert store.objects() == before
    assert moehive("store", "unpin", manifest.model_id).code == 0
    assert moehive("store", "unpin", manifest.model_id).code == 2
    assert moehive("store", "prune", "--force").code == 0
    assert not store.objects()


def test_a_dry_run_deletes_nothing(moehive, store):
    before = dict(store.objects())
    outcome = moehive("store", "prune", "--force", "--dry-run")
    assert f"would delete {len(before)} objects" in outcome.out
    assert store.objects() == before


def test_the_oldest_goes_until_the_store_is_small_enough(moehive, store, manifest):
    for age, key in enumerate(store.objects()):
        os.utime(store.path(key), (1e9 + age, 1e9 + age))
    oldest = next(key for key in store.objects() if key != manifest.model_id)  # which goes last of all
    others = {key: size for key, size in store.objects().items() if key != oldest}
    assert moehive("store", "prune", "--keep", sum(others.values()), "--force").code == 0
    assert store.objects() == others


def test_a_size_that_cannot_be_reached_is_a_failure(moehive, store):
    moehive("store", "pin", "demo")
    outcome = moehive("store", "prune", "--keep", "1KiB", "--force")
    assert outcome.code == 1
    assert "pinned" in outcome.out


def test_what_another_model_needs_too_stays(moehive, store, manifest):
    twin = Manifest(replace(manifest.model, name="twin"), manifest.shards, manifest.tensors)
    store.put(twin.to_bytes())
    assert moehive("store", "prune", "twin", "--force").code == 0
    assert not store.has(twin.model_id)
    assert store.has(manifest.model_id)
    assert store.has(manifest.skeleton[0].hash)


def test_where_it_is_not_known_what_a_pinned_model_needs_nothing_goes(moehive, store, manifest):
    moehive("store", "pin", "demo")
    store.delete(manifest.model_id)
    before = dict(store.objects())
    outcome = moehive("store", "prune", "--force")
    assert outcome.code == 1
    assert "nothing was deleted" in outcome.err
    assert store.objects() == before


@pytest.mark.parametrize("command", ["verify", "prune", "pin"])
def test_a_model_that_is_not_there(moehive, store, command):
    outcome = moehive("store", command, "nothing")
    assert outcome.code == 2
    assert "moehive store ls" in outcome.err


def test_a_bad_ticket_is_refused_before_anything_is_looked_at(moehive, store):
    assert moehive("store", "prune", "--join", "nonsense").code == 2
