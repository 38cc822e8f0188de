"""What a client fetches follows the prompt at hand, not the sessions before it."""

from __future__ import annotations

from typing import Any, cast

import torch

from moehive.kernels.routing import group_by_expert
from moehive.swarm.dispatch.resident import ResidentExperts
from moehive.swarm.dispatch.weights import SwarmWeights
from moehive.swarm.model.loader import ExpertLoader
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.store.directory import ConvertedDirectory

LAYER = 0


def test_a_prompt_outweighs_many_tokens_of_earlier_sessions(mixtral: ConvertedDirectory) -> None:
    loader = ExpertLoader(mixtral.manifest, mixtral)

    class Weights:
        nbytes = staticmethod(loader.nbytes)

    tier = WeightsTier(loader, 2 * loader.nbytes(torch.float32))
    weights = cast(SwarmWeights, cast(Any, Weights()))
    resident = ResidentExperts(mixtral.manifest, weights, tier)
    resident.expect(1000)

    def saw(tokens: int, *experts: int, waited: float = 0.0) -> None:
        assignments = group_by_expert(torch.tensor([experts] * tokens), mixtral.manifest.model.num_experts)
        resident.saw(LAYER, assignments, tokens, torch.float32, waited)

    saw(600, 0, 1)
    for _ in range(4):
        saw(1, 0, 1, waited=0.01)
    assert {key.expert for key in resident.worth_fetching()} == {0, 1}
    saw(64, 2, 3)
    assert {key.expert for key in resident.worth_fetching()} == {2, 3}
