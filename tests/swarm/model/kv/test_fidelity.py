"""What a KV cache changes in the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.families import build_model
from transformers import DynamicCache

from moehive.protocol.errors import ConfigError
from moehive.swarm.model.kv.cache import kv_cache
from moehive.swarm.model.kv.fidelity import LogitError, logit_error


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("qwen3_next", "float32")  # one layer with a growing cache, so that errors do not pile up


def text(length: int) -> torch.Tensor:
    return torch.randint(3, 250, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["spill", "window"])
def test_lossless_modes_change_nothing(model: Any, options: Any, mode: str) -> None:
    assert logit_error(model, text(50), options(mode), piece=10) == LogitError(50, 80, 0.0, 0.0, 0.0, 1.0)


def test_eight_bits_change_a_little_and_float8_more(model: Any, options: Any) -> None:
    integer, floating = (logit_error(model, text(50), options(mode), piece=10) for mode in ("int8", "fp8"))
    assert 0 < integer.relative < floating.relative < 0.1
    assert 0 < integer.kl < floating.kl < 0.1
    assert integer.largest > 0
    assert integer.agreement > 0.9


def test_only_positions_that_read_stored_blocks_count(model: Any, options: Any) -> None:
    assert logit_error(model, text(8), options("int8"), piece=4).positions == 0
    assert logit_error(model, text(9), options("int8"), piece=4).positions == 2  # one block of 8 tokens, two sequences
    assert logit_error(model, text(30), options("int8", block_tokens=20), piece=7).positions == 2 * 9


def test_it_is_the_difference_of_the_logits(model: Any, options: Any) -> None:
    ids = text(16)[:1]
    with torch.inference_mode():
        caches = DynamicCache(config=model.config), kv_cache(model, options("fp8"))
        for cache in caches:
            model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
        wanted, found = (
            model(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True).logits.double() for cache in caches
        )
    error = logit_error(model, ids, options("fp8"), piece=8)
    assert error.largest == float((found - wanted).abs().max())
    spread = (wanted - wanted.mean(-1, keepdim=True)).square().mean().sqrt()
    assert error.relative == pytest.approx(float((found - wanted).square().mean().sqrt() / spread), rel=1e-6)
    kl = torch.nn.functional.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    assert error.kl == pytest.approx(float(kl.sum(-1).mean()), rel=1e-6)
    assert error.positions == 8


def test_an_empty_text_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="no text"):
        logit_error(model, text(0), "fp8")
