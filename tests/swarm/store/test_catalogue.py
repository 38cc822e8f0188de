"""A store's objects find their models by the manifests among them, and what nobody claims is treated with care."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from moehive.protocol.ids import ExpertKey, ModelId, ShardHash
from moehive.protocol.manifest import MANIFEST_START, Manifest
from moehive.swarm.policy.eviction import Rank
from moehive.swarm.store.catalogue import Catalogue, Cataloguer
from moehive.swarm.store.content import ContentStore
from moehive.swarm.store.directory import ConvertedDirectory

STRANGE = b"not of any model"


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "store", 64 << 20)


@pytest.fixture
def model(mixtral: ConvertedDirectory, store: ContentStore) -> ConvertedDirectory:
    """A model of which the store has the manifest, the skeleton, and one expert; and an object of nobody's."""
    store.put(mixtral.manifest.to_bytes())
    for shard in (*mixtral.manifest.skeleton, mixtral.manifest.experts[ExpertKey(0, 0)]):
        store.put(mixtral.root / shard.file)
    store.put(STRANGE)
    return mixtral


def take(store: ContentStore) -> Catalogue:
    return Cataloguer(store).take()


def strange(catalogue: Catalogue) -> ShardHash:
    (found,) = set(catalogue.objects) - catalogue.claimed
    return found


def test_manifests_are_recognised_among_the_objects(store: ContentStore, model: ConvertedDirectory) -> None:
    assert model.manifest.to_bytes().startswith(MANIFEST_START)
    store.put(MANIFEST_START + b"1048576}, and no more of one")
    catalogue = take(store)
    assert set(catalogue.models) == {model.model_id}
    assert catalogue.models[model.model_id] == model.manifest
    assert len(catalogue.unreadable) == 1
    assert catalogue.members[model.model_id] == {
        ShardHash(model.model_id),
        *(shard.hash for shard in model.manifest.shards),
    }


def test_an_object_is_looked_into_once(
    store: ContentStore, model: ConvertedDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cataloguer = Cataloguer(store)
    first = cataloguer.take()
    monkeypatch.setattr(store, "path", lambda key: pytest.fail("looked at again"))
    assert cataloguer.take() == first


def test_a_damaged_manifest_is_reported_and_out_of_view(store: ContentStore, model: ConvertedDirectory) -> None:
    path = store.path(ShardHash(model.model_id))
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    catalogue = take(store)
    assert catalogue.models == {}
    assert set(catalogue.unreadable) == {model.model_id}
    assert not store.has(ShardHash(model.model_id))


def test_a_pin_keeps_what_the_model_consists_of(store: ContentStore, model: ConvertedDirectory) -> None:
    store.keeping.pin(model.model_id)
    catalogue = take(store)
    assert all(catalogue.is_pinned(member) for member in catalogue.members[model.model_id])
    assert not catalogue.is_pinned(strange(catalogue))


def test_a_pinned_model_without_a_manifest_keeps_what_nobody_claims(
    store: ContentStore, model: ConvertedDirectory
) -> None:
    store.keeping.pin(ModelId("ab" * 32))
    catalogue = take(store)
    assert catalogue.is_pinned(strange(catalogue))
    assert not catalogue.is_pinned(ShardHash(model.model_id))


def test_the_facts_of_every_object(store: ContentStore, model: ConvertedDirectory) -> None:
    expert = model.manifest.experts[ExpertKey(0, 0)].hash
    config = model.manifest.skeleton[0].hash
    path = store.path(config)
    assert path is not None
    os.utime(path, (5.0, 5.0))
    with store.keeping.use([expert]):
        catalogue = take(store)
    facts = {one.hash: one for one in catalogue.facts({expert: 2})}
    assert set(facts) == set(store.objects())
    assert (facts[expert].in_use, facts[expert].copies) == (True, 2)
    assert (facts[config].in_use, facts[config].copies, facts[config].last_used) == (False, None, 5.0)
    skeleton = {shard.hash for shard in model.manifest.skeleton}
    assert {one.hash for one in facts.values() if one.rank is Rank.FOUNDATION} == skeleton
    assert {one.copies for one in facts.values() if one.hash != expert} == {None}
    manifest = facts[ShardHash(model.model_id)]
    assert (manifest.rank, manifest.dependants) == (Rank.MANIFEST, skeleton | {expert})
    ranks = {one.rank for one in take(store).facts({})}
    assert ranks == {Rank.SHARD, Rank.MANIFEST}, "nothing of the model is in use any more"


def test_what_two_models_share_depends_on_one_of_them(store: ContentStore, model: ConvertedDirectory) -> None:
    before = take(store).dependants[ShardHash(model.model_id)]
    twin = Manifest(replace(model.manifest.model, name="twin"), model.manifest.shards, model.manifest.tensors)
    store.put(twin.to_bytes())
    first, second = sorted((ShardHash(model.model_id), ShardHash(twin.model_id)))
    assert take(store).dependants == {first: before, second: frozenset()}
