"""Converted models against transformers' eager experts on the source checkpoint, bit for bit, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import int4
from support.families import FAMILIES, edit_config, load_tensors, save_checkpoint, save_int4_twin, write_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

import moehive.swarm
from moehive.swarm.convert import convert

STEPS = 8

CASES = [
    pytest.param(family, dtype, id=f"{family}-{str(dtype).removeprefix('torch.')}")
    for family in FAMILIES
    for dtype in (torch.float32, torch.bfloat16)
]


@torch.inference_mode()
def behaviour(model: Any, prompt: Tensor) -> list[Tensor]:
    """Logits of a prefill and of greedy cached steps, with batch 2 and batch 1, and the tokens of `generate`."""
    seen = []
    for ids in (prompt, prompt[:1, :9]):
        answer = model(input_ids=ids, use_cache=True)
        seen.append(answer.logits)
        for _ in range(STEPS):
            token = answer.logits[:, -1:].argmax(-1)
            answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
            seen.append(answer.logits)
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=STEPS, do_sample=False)
    return [*seen, tokens]


def assert_equal(reference: Path, converted: Path, prompt: Tensor, dtype: torch.dtype) -> None:
    plain = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype, experts_implementation="eager")
    model, _ = moehive.swarm.open_local(converted, dtype=dtype)
    # The dense weights are mapped from two files at two alignments, and fp32 GEMV rounds by alignment. That is the
    # files' matter; how our experts lie in memory is ours, and stays as it is.
    for parameter in (*plain.parameters(), *model.parameters()):
        parameter.data = parameter.data.clone()
    wanted, found = behaviour(plain, prompt), behaviour(model, prompt)
    assert [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)] == [True] * len(wanted)
    assert wanted[0].dtype == dtype


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_equal_to_eager_bit_for_bit(checkpoints: Any, prompt: Tensor, family: str, dtype: torch.dtype) -> None:
    assert_equal(checkpoints.reference(family), checkpoints.converted(family), prompt, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_was_left_out_of_quantisation_is_equal_too(
    tmp_path: Path, prompt: Tensor, dtype: torch.dtype
) -> None:
    source = save_checkpoint("qwen3_moe", tmp_path / "source")
    tensors = load_tensors(source)
    first = {key: tensor for key, tensor in tensors.items() if ".layers.0." in key}
    others = {key: tensor for key, tensor in tensors.items() if key not in first}
    write_tensors(source, first | int4.pack_turned(others, int4.awq))
    edit_config(source, quantization_config=int4.AWQ_CONFIG)
    manifest = convert(source, tmp_path / "converted")
    kinds = {key.layer: len(manifest.tensors_of[shard.hash]) for key, shard in manifest.experts.items()}
    assert kinds == {0: 3, 1: 9, 2: 9}
    assert_equal(save_int4_twin(source, tmp_path / "twin"), tmp_path / "converted", prompt, dtype)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_weights_that_are_views_of_their_shard_are_equal_too(tmp_path: Path, prompt: Tensor, family: str) -> None:
    """Stored in fp32, computed in fp32: nothing is copied on the way, so the alignment is that of the file's buffer."""
    source = save_checkpoint(family, tmp_path / "source", "float32")
    convert(source, tmp_path / "converted")
    assert_equal(source, tmp_path / "converted", prompt, torch.float32)
