"""Quantisers: every value goes to a nearest one that the format has, and what is representable stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moehive.kernels.dequantize import dequantize
from moehive.kernels.formats import E2M1_MAGNITUDES, WeightMatrix
from moehive.kernels.quantize import (
    quantize_fp8_block,
    quantize_int4_group,
    quantize_int8_channel,
    quantize_mxfp4,
)

QUANTIZERS: dict[str, Callable[[Tensor], WeightMatrix]] = {
    "fp8": lambda weight: quantize_fp8_block(weight, (16, 16)),
    "int8": quantize_int8_channel,
    "int4": lambda weight: quantize_int4_group(weight, 32),
    "int4 zeros": lambda weight: quantize_int4_group(weight, 32, zero_points=True),
    "mxfp4": quantize_mxfp4,
}
# Half the widest step where the largest magnitude is 1. The scale of mxfp4 is a power of two: 1 may end at 0.75.
WORST = {"fp8": 16 / 448, "int8": 0.5 / 127, "int4": 0.5 / 7, "int4 zeros": 1 / 15, "mxfp4": 0.25}


@pytest.mark.parametrize("name", QUANTIZERS)
@given(
    rows=st.integers(1, 40), groups=st.integers(1, 3), seed=st.integers(0, 99), size=st.sampled_from([1e-3, 1.0, 50])
)
def test_values_come_back_within_half_a_step(name: str, rows: int, groups: int, seed: int, size: float) -> None:
    weight = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)) * size
    found = dequantize(QUANTIZERS[name](weight), torch.float32)
    assert found.shape == weight.shape
    step = WORST[name] * weight.abs().amax() * 1.0001
    assert (found - weight).abs().amax() <= step


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_was_quantised_once_is_quantised_to_itself(name: str) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    once = dequantize(QUANTIZERS[name](weight), torch.float32)
    twice = dequantize(QUANTIZERS[name](once), torch.float32)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_zeros_stay_zeros(name: str) -> None:
    assert not dequantize(QUANTIZERS[name](torch.zeros(16, 32)), torch.float32).any()


def test_mxfp4_takes_the_nearest_and_in_the_middle_the_even_code() -> None:
    values = torch.linspace(-6.0, 6.0, 4 * 12 * 8 + 1)[:384].reshape(-1, 32)  # steps of 1/32: every middle is met
    values[:, 0] = 6.0  # the same exponent for every group
    found = dequantize(quantize_mxfp4(values), torch.float32)
    for value, chosen in zip(values.flatten().tolist(), found.flatten().tolist(), strict=True):
        distance = {code: abs(abs(value) - magnitude) for code, magnitude in enumerate(E2M1_MAGNITUDES)}
        nearest = [code for code in distance if distance[code] == min(distance.values())]
        assert abs(chosen) in [E2M1_MAGNITUDES[code] for code in nearest]
        assert len(nearest) == 1 or E2M1_MAGNITUDES.index(abs(chosen)) % 2 == 0
        assert chosen == 0 or (chosen < 0) == (value < 0)


def test_groups_that_do_not_fill_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="48 columns in groups of 32"):
        quantize_mxfp4(torch.zeros(2, 48))
    with pytest.raises(ValueError, match="48 columns in groups of 32"):
        quantize_int4_group(torch.zeros(2, 48), 32)
