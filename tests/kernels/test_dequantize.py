"""Dequantisation against float64 values made from the codes one by one, and against transformers where it is right."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.random_experts import KINDS, Kind, random_matrix
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moehive.kernels import dequantize as module
from moehive.kernels.dequantize import dequantize, e4m3_values, row_bands
from moehive.kernels.formats import WeightFormat, WeightMatrix
from moehive.kernels.packings import fp8_block_matrix, mxfp4_matrix

DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def fp8_weight(rows: int, columns: int, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).mul(100).to(torch.float8_e4m3fn)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    return weight, torch.rand(grid, generator=generator) + 0.1


@given(st.sampled_from(sorted(KINDS)), st.integers(1, 40), st.integers(1, 20), st.integers(0, 99))
def test_every_format_equals_the_float64_values_rounded_once(kind: str, rows: int, eights: int, seed: int) -> None:
    matrix, values = random_matrix(
        KINDS[kind], rows, 8 * eights, torch.Generator().manual_seed(seed), lambda tensor: tensor
    )
    found = dequantize(matrix, torch.float32)
    # two factors of at most 24 bits have an exact product in float64, so the only rounding is the last one
    assert torch.equal(found, values.float())
    assert torch.equal(dequantize(matrix, torch.bfloat16), values.float().bfloat16())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain-float32"])
def test_bands_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, values = random_matrix(KINDS[kind], 300, 264, torch.Generator().manual_seed(1), lambda tensor: tensor)
    monkeypatch.setattr(module, "_BAND", 264)
    out = torch.full((300, 264), float("nan"))
    assert dequantize(matrix, torch.float32, out=out) is out
    assert torch.equal(out, values.float())


def test_bands_are_whole_blocks_and_cover_every_row() -> None:
    matrix = WeightMatrix(WeightFormat.FP8_BLOCK, *fp8_weight(300, 64, (128, 128)), block=(128, 128))
    assert list(row_bands(matrix, 1)) == [(0, 128), (128, 256), (256, 300)]
    assert list(row_bands(matrix, 1 << 30)) == [(0, 300)]
    with pytest.raises(ValueError, match="row 64 lies within a block of 128"):
        matrix.rows(64, 128)


def test_plain_weights_of_the_dtype_are_not_copied() -> None:
    weight = torch.ones(2, 2)
    assert dequantize(WeightMatrix(WeightFormat.PLAIN, weight), torch.float32) is weight
    assert dequantize(WeightMatrix(WeightFormat.PLAIN, weight), torch.bfloat16).dtype == torch.bfloat16


def test_every_e4m3_code_is_what_torch_makes_of_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found, wanted = e4m3_values(codes), codes.float()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert int(wanted.isnan().sum()) == 2
    assert torch.equal(found.nan_to_num(nan=0.0).view(torch.int32), wanted.nan_to_num(nan=0.0).view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_equals_transformers_where_blocks_are_whole(dtype: torch.dtype) -> None:
    weight, scale = fp8_weight(32, 48, (16, 16))
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scale, dtype)
    assert torch.equal(dequantize(fp8_block_matrix(weight, scale, (16, 16)), dtype), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_equals_transformers_for_every_byte_and_scale(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(4, 4, 16).repeat(16, 1, 1)  # [64, 4, 16]
    scales = torch.arange(256, dtype=torch.uint8).view(64, 4)  # also those that overflow and underflow
    wanted = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0].t()  # [64, 128]
    found = dequantize(mxfp4_matrix(blocks, scales), dtype)
    assert torch.equal(found.nan_to_num(nan=-77.0), wanted.nan_to_num(nan=-77.0))


def test_a_matrix_of_no_rows() -> None:
    kind = Kind(WeightFormat.MXFP4, group=32)
    matrix, _ = random_matrix(kind, 1, 64, torch.Generator().manual_seed(0), lambda tensor: tensor)
    assert dequantize(matrix.rows(0, 0), torch.float32).shape == (0, 64)
