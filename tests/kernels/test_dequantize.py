"""Dequantisation against transformers' own, and against one multiplication per element where theirs is wrong."""

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moehive.kernels.dequantize import dequantize_fp8_block, dequantize_mxfp4

DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def fp8_weight(rows: int, columns: int, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).mul(100).to(torch.float8_e4m3fn)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    return weight, torch.rand(grid, generator=generator) + 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_equals_transformers_where_blocks_are_whole(dtype: torch.dtype) -> None:
    weight, scale = fp8_weight(32, 48, (16, 16))
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
    assert torch.equal(dequantize_fp8_block(weight, scale, (16, 16), dtype), wanted)


@pytest.mark.parametrize("block", [(16, 16), (128, 128), (16, 32)])
@pytest.mark.parametrize("shape", [(40, 33), (1, 1), (16, 16), (17, 5)])
def test_fp8_with_cut_blocks(shape: tuple[int, int], block: tuple[int, int]) -> None:
    weight, scale = fp8_weight(*shape, block)
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    wanted = (weight.float() * scale[rows][:, columns]).bfloat16()
    out = torch.full(shape, float("nan"), dtype=torch.bfloat16)
    assert dequantize_fp8_block(weight, scale, block, torch.bfloat16, out=out) is out
    assert torch.equal(out, wanted)


def test_fp8_refuses_a_scale_grid_of_another_block_size() -> None:
    weight, scale = fp8_weight(144, 64, (128, 128))  # two rows of scales, which 144 / 2 would take for blocks of 72
    with pytest.raises(ValueError, match=r"needs scales \(9, 4\), not \(2, 1\)"):
        dequantize_fp8_block(weight, scale, (16, 16), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_equals_transformers_for_every_byte_and_scale(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(4, 4, 16).repeat(16, 1, 1)  # [64, 4, 16]
    scales = torch.arange(256, dtype=torch.uint8).view(64, 4)  # also those that overflow and underflow
    wanted = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0]  # [128, 64]
    found = dequantize_mxfp4(blocks, scales, dtype)
    assert found.is_contiguous()
    assert torch.equal(found.nan_to_num(nan=-77.0), wanted.nan_to_num(nan=-77.0))


def test_mxfp4_refuses_shapes_that_do_not_fit() -> None:
    blocks, scales = torch.zeros(8, 4, 16, dtype=torch.uint8), torch.zeros(8, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="MXFP4 needs uint8 blocks"):
        dequantize_mxfp4(blocks, scales, torch.bfloat16)
    with pytest.raises(ValueError, match="MXFP4 needs uint8 blocks"):
        dequantize_mxfp4(blocks.float(), blocks[..., 0], torch.bfloat16)
