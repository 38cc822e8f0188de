"""Several tokens, or several requests, in one pass over a real swarm: the same text in fewer round trips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import Checkpoints
from support.generation import TOKENS, generate, prompt, reference_tokens
from support.processes import Nodes, eventually
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from moehive.swarm.client import Swarm, join

pytestmark = pytest.mark.swarm

FAMILY = "qwen3_moe"


@pytest.fixture(scope="module")
def wanted(checkpoints: Checkpoints) -> list[int]:
    """The reference's tokens."""
    return reference_tokens(checkpoints.reference(FAMILY))


@pytest.fixture
def swarm(nodes: Nodes, checkpoints: Checkpoints, cache: Path) -> Iterator[tuple[Swarm, str]]:
    """A joined swarm of two nodes, and the model's id."""
    first, _ = nodes.swarm(checkpoints.converted(FAMILY), "*:0-3", "*:4-7")
    with join(first.ticket, cache=cache) as joined:
        yield joined, str(first.ready()["modelId"])


def trips_of(swarm: Swarm, model_id: str) -> int:
    return swarm.stats(model_id).round_trips


def test_a_draft_model_saves_round_trips_and_changes_no_token(
    swarm: tuple[Swarm, str], checkpoints: Checkpoints, wanted: list[int]
) -> None:
    joined, model_id = swarm
    model, _ = joined.load(model_id, dtype=torch.float32)
    assert generate(model) == wanted
    plain = trips_of(joined, model_id)
    draft: Any = AutoModelForCausalLM.from_pretrained(checkpoints.reference(FAMILY), dtype=torch.float32)
    draft.generation_config.update(
        num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    ids = prompt()
    tokens = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        assistant_model=draft,
    )
    assert tokens[0, ids.shape[1] :].tolist() == wanted
    assert (trips_of(joined, model_id) - plain) * 3 <= plain  # a perfect draft of five


def test_several_requests_share_their_passes(swarm: tuple[Swarm, str], wanted: list[int]) -> None:
    joined, model_id = swarm
    model, _ = joined.load(model_id, dtype=torch.float32)
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)  # by default: what fits into free memory
    prompts = [prompt(seed)[0].tolist() for seed in (7, 8, 9)]
    alone = [model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist() for ids in prompts]  # type: ignore[operator]
    assert alone[0] == wanted
    before = trips_of(joined, model_id)
    together = model.generate_batch(  # type: ignore[operator]
        inputs=prompts, generation_config=config, continuous_batching_config=batching
    )
    assert [list(output.generated_tokens) for output in together.values()] == alone
    # Three requests in little more than the passes of one.
    assert (trips_of(joined, model_id) - before) * 2 <= before


@pytest.mark.parametrize("vram", [None, 64 << 20])
def test_experts_that_pay_are_kept_and_outlive_the_swarm(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int], vram: int | None
) -> None:
    """Also where they are kept on a device: the processor stands for it."""
    first, second = nodes.swarm(checkpoints.converted(FAMILY), "*:0-3", "*:4-7")
    model_id = str(first.ready()["modelId"])
    with join(first.ticket, cache=cache) as joined:
        model, _ = joined.load(model_id, dtype=torch.float32, ram=64 << 20, device="cpu", vram=vram)

        def all_here() -> bool:
            before = trips_of(joined, model_id)
            assert generate(model) == wanted
            return trips_of(joined, model_id) == before

        assert eventually(all_here, timeout=60)
        first.kill()
        second.kill()
        assert generate(model) == wanted
        stats = joined.device_stats(model_id)
        assert (stats is None) == (vram is None)
        assert stats is None or stats.hits > 0


def test_what_nobody_computes_is_fetched_and_computed_here(
    nodes: Nodes, checkpoints: Checkpoints, cache: Path, wanted: list[int]
) -> None:
    """A node that holds nothing to compute with still has every byte."""
    node = nodes.start(checkpoints.converted(FAMILY), "--experts", "none")
    with join(node.ticket, cache=cache) as joined:
        model, _ = joined.load(str(node.ready()["modelId"]), dtype=torch.float32)
        assert generate(model) == wanted
        assert joined.stats(str(node.ready()["modelId"])).round_trips == 0
