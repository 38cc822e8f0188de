"""Decoding, exhaustively: every code of every format is the value that kernels/formats.py says, bit for bit."""

from __future__ import annotations

import pytest
import torch
from support.random_experts import KINDS, random_matrix

pytest.importorskip("triton")
from support.decoding import decode

from moehive.kernels.formats import WeightFormat, WeightMatrix

pytestmark = pytest.mark.interpreted

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Both columns of each byte, the low half first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()


def test_mxfp4_every_byte_under_every_exponent() -> None:
    """Up to 2 ** 124: beyond, fp32 has no numbers for all of them; and down to subnormal ones."""
    exponents = torch.arange(0, 252, dtype=torch.uint8)
    data = ALL_BYTES.view(16, 16).repeat(252, 1)  # 16 rows of 32 columns have all bytes
    scale = exponents.repeat_interleave(16)[:, None]
    matrix = WeightMatrix(WeightFormat.MXFP4, data, scale, block=(1, 32))
    wanted = E2M1[nibbles(data)] * torch.exp2(scale.double() - 127)
    found = decode(matrix, torch.float32, inner=32)
    assert torch.equal(found, wanted.float())
    assert torch.equal(found.double(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("zero", [True, False])
def test_int4_every_nibble_with_every_zero_point(zero: bool, dtype: torch.dtype) -> None:
    """Scales of fp16 are multiplied in fp16 where that is computed with: rounded once all the same."""
    points = torch.arange(16, dtype=torch.uint8)[:, None].repeat(1, 8) if zero else None
    data = ALL_BYTES.view(1, 256)[:, :128].repeat(16, 1) if zero else ALL_BYTES.view(16, 16).repeat(1, 8)
    scale = (torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) + 0.5).half()
    matrix = WeightMatrix(WeightFormat.INT4_GROUP, data, scale, points, block=(1, 32))
    shift = points.double().repeat_interleave(32, 1) if points is not None else 8.0
    wanted = (nibbles(data).double() - shift) * scale.double().repeat_interleave(32, 1)
    for inner in (32, 64, 256):
        assert torch.equal(decode(matrix, dtype, inner=inner), wanted.to(dtype))


def test_scales_wider_than_the_arithmetic_are_not_rounded_first() -> None:
    matrix, wanted = random_matrix(KINDS["int4-group-g64"], 16, 128, torch.Generator().manual_seed(0), torch.clone)
    assert torch.equal(decode(matrix, torch.float16), wanted.half())


@pytest.mark.parametrize("hardware", [True, False])
def test_e4m3_every_code(hardware: bool) -> None:
    data = ALL_BYTES.view(torch.float8_e4m3fn).view(8, 32)
    matrix = WeightMatrix(WeightFormat.FP8_BLOCK, data, torch.full((1, 1), 0.75), block=(128, 128))
    found, wanted = decode(matrix, torch.float32, hardware_fp8=hardware), data.double() * 0.75
    numbers = ~wanted.isnan()
    assert torch.equal(found.double()[numbers], wanted[numbers])
    if not hardware:  # the interpreter reads NaN as 480, which the GPU does not
        assert found[~numbers].isnan().all()
        assert numbers.sum() == 254


def test_int8_is_left_unscaled_and_plain_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    int8, _ = random_matrix(KINDS["int8-channel"], 5, 70, generator, torch.clone)
    plain, _ = random_matrix(KINDS["plain-float32"], 5, 70, generator, torch.clone)
    assert torch.equal(decode(int8, torch.float32), int8.data.float())
    assert torch.equal(decode(plain, torch.float32), plain.data)
