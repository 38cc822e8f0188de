"""The oracle against arithmetic that is itself tested against transformers."""

from __future__ import annotations

import pytest
import torch
from support.random_experts import (
    CLAMPED,
    KINDS,
    Expert,
    expert_oracle,
    layer_oracle,
    random_expert,
    random_matrix,
    relative_error,
)

from moehive.kernels.dequantize import dequantize_fp8_block, dequantize_mxfp4
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn


def test_fp8_values() -> None:
    matrix, values = random_matrix(KINDS["fp8-block"], 150, 300, torch.Generator().manual_seed(0), torch.clone)
    assert matrix.scale is not None
    assert torch.equal(dequantize_fp8_block(matrix.data, matrix.scale, (128, 128), torch.float32), values.float())


def test_mxfp4_values() -> None:
    matrix, values = random_matrix(KINDS["mxfp4"], 8, 64, torch.Generator().manual_seed(0), torch.clone)
    assert matrix.scale is not None
    found = dequantize_mxfp4(matrix.data.view(8, 2, 16), matrix.scale, torch.float32)
    assert torch.equal(found.t(), values.float())


@pytest.mark.parametrize("spec", [FfnSpec(), FfnSpec(activation="gelu"), CLAMPED], ids=["silu", "gelu", "clamped"])
def test_experts(spec: FfnSpec) -> None:
    expert = random_expert(KINDS["plain-float32"], 64, 32, torch.Generator().manual_seed(0), bias=True)
    parts = expert.matrices
    weights = ExpertWeights(parts.gate_up.data, parts.down.data, parts.gate_up_bias, parts.down_bias)
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert relative_error(expert_ffn(rows, weights, spec), expert_oracle(rows.double(), expert, spec)) < 1e-6


def test_layers_leave_out_what_is_not_there() -> None:
    generator = torch.Generator().manual_seed(0)
    experts: list[Expert | None] = [random_expert(KINDS["plain-float32"], 64, 32, generator), None]
    hidden = torch.randn(2, 64, generator=generator)
    index, weights = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.5, 9.0], [9.0, 9.0]])
    found = layer_oracle(hidden, index, weights, experts, FfnSpec())
    assert experts[0] is not None
    assert torch.equal(found[:1], 0.5 * expert_oracle(hidden[:1].double(), experts[0], FfnSpec()))
    assert not found[1].any()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_outputs_have_the_size_of_inputs(kind: object) -> None:
    """Else errors of one part would hide behind another."""
    expert = random_expert(kind, 256, 128, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    for matrix, columns in ((expert.gate_up, 256), (expert.down, 128)):
        assert 0.5 < matrix.std() * columns**0.5 < 2.5
