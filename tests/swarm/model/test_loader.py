"""What a manifest says of an expert is looked at before it takes memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.checkpoints import Checkpoints

from moehive.protocol.errors import ManifestError
from moehive.protocol.manifest import Manifest
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.store.directory import ConvertedDirectory


def test_indices_for_more_inputs_than_an_expert_has_are_refused_before_they_are_made(checkpoints: Checkpoints) -> None:
    """A manifest may say that there are 4 Gi of them: a plan of its experts' forms would take 32 GiB for each."""
    directory = ConvertedDirectory(checkpoints.converted("mixtral_gptq"))
    manifest = directory.manifest
    name = next(name for name in manifest.tensors if name.endswith("w1.g_idx"))
    entry = manifest.tensors[name]
    shards = list(manifest.shards)
    shards[entry.shard] = replace(shards[entry.shard], size=1 << 20)
    tensors = {**manifest.tensors, name: replace(entry, shape=(1000,), size=4000)}
    changed = replace(manifest, shards=tuple(shards), tensors=tensors)
    with pytest.raises(ManifestError, match=r"w1.g_idx \(1000,\) has more inputs than any matrix"):
        _ = ExpertLoader(Manifest.from_bytes(changed.to_bytes()), directory).forms
