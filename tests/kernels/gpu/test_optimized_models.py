"""What `optimize` runs for a model on a GPU, under the interpreter, on transformers' own experts modules."""

from __future__ import annotations

import pytest
import torch
from support.families import build_model

pytest.importorskip("triton")
from moehive.swarm.model import optimize as module
from moehive.swarm.model.mathematics import ffn_of
from moehive.swarm.model.seats import experts_modules

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_the_kernels_compute_what_the_module_computes(family: str) -> None:
    model = build_model(family, "float32")
    [experts, *_] = experts_modules(model).values()
    kernels = module._Kernels(experts, ffn_of(experts))
    run = module._on_gpu(kernels._experts(), kernels._spec, kernels.load, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 64, generator=generator)
    scores, index = torch.rand(5, 8, generator=generator).topk(2)
    wanted = type(experts).forward.__wrapped__(experts, hidden, index, scores)
    assert (run(hidden, index, scores) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert sum(kernels.load.statistics().counts) == index.numel()
