"""Routers are found in every family, and compute what the model's own do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.checkpoints import Checkpoints
from torch import nn

from moehive.protocol.errors import UnsupportedModel
from moehive.swarm import open_local
from moehive.swarm.prefetch.fitting import by_routers, states_of
from moehive.swarm.prefetch.predictors import Point, ranking
from moehive.swarm.prefetch.routers import routers_of
from moehive.swarm.trace.recording import Recorder


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_routers_logits_rank_the_experts_that_the_model_uses(family: str, checkpoints: Checkpoints) -> None:
    model, _ = open_local(checkpoints.converted(family), dtype=torch.float32)
    recorder = Recorder(model, samples=16)
    with recorder.listening(), torch.inference_mode():
        model(input_ids=torch.arange(16)[None])  # type: ignore[operator]
    states, experts = states_of(recorder.trace(family))
    routers = routers_of(model)
    predictor = by_routers(routers, experts.shape[2])
    agree = []
    for column, router in enumerate(routers.values()):
        logits = router.logits(states.inputs[:, column].astype(np.float32))
        chosen = np.sort(ranking(logits, experts.shape[2]))
        agree.append((chosen == np.sort(experts[:, column])).all(axis=1).mean())
    assert min(agree) > 0.9  # recorded states are rounded to float16
    assert set(predictor.maps) >= {(Point.ENTRY, layer) for layer in routers}


def test_a_layer_without_a_router_is_said() -> None:
    class Experts(nn.Module):
        num_experts = 4

    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].mlp = Experts()
    from moehive.swarm.prefetch.routers import _router

    with pytest.raises(UnsupportedModel, match="router of layer 0"):
        _router(0, model.layers[0], model.layers[0].mlp)
