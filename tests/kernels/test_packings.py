"""Published packings, packed here word by word as their sources say, against the values they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moehive.kernels.dequantize import dequantize
from moehive.kernels.packings import (
    awq_matrix,
    compressed_tensors_matrix,
    fp8_block_matrix,
    gptq_matrix,
    mxfp4_matrix,
)

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ, awq/utils/packing_utils.py: the i-th nibble holds column ORDER[i]
STRAIGHT = list(range(8))


def pack(codes: Tensor, order: list[int]) -> Tensor:
    """[R, C] codes as int32 [R, ceil(C / 8)]: nibble i of a word holds its column order[i]."""
    rows, columns = codes.shape
    words = torch.zeros(rows, -(-columns // 8), dtype=torch.int64)
    for row in range(rows):
        for word in range(words.shape[1]):
            for nibble, column in enumerate(order):
                if 8 * word + column < columns:
                    words[row, word] |= int(codes[row, 8 * word + column]) << 4 * nibble
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


class Quantized:
    """Codes [N, K], scales and zero points [N, K / g], and the values [N, K] in float64."""

    def __init__(self, rows: int, groups: int, group: int, seed: int, dtype: torch.dtype = torch.float16) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.codes = torch.randint(0, 16, (rows, groups * group), generator=generator)
        self.zeros = torch.randint(0, 16, (rows, groups), generator=generator)
        self.scales = (torch.rand(rows, groups, generator=generator) + 0.5).to(dtype)
        shift, scale = (part.repeat_interleave(group, 1).double() for part in (self.zeros, self.scales))
        self.values = (self.codes.double() - shift) * scale
        self.symmetric = (self.codes.double() - 8) * scale


SIZES = st.tuples(st.integers(1, 3).map(lambda n: 8 * n), st.integers(1, 3), st.sampled_from([8, 16, 32]))


@given(SIZES, st.integers(0, 99))
def test_awq(sizes: tuple[int, int, int], seed: int) -> None:
    wanted, group = Quantized(*sizes, seed), sizes[2]
    matrix = awq_matrix(
        pack(wanted.codes.t(), AWQ_ORDER), pack(wanted.zeros.t(), AWQ_ORDER), wanted.scales.t().contiguous(), group
    )
    assert torch.equal(dequantize(matrix, torch.float32), wanted.values.float())


@given(SIZES, st.integers(0, 99), st.booleans())
def test_gptq(sizes: tuple[int, int, int], seed: int, minus_one: bool) -> None:
    wanted, group = Quantized(*sizes, seed), sizes[2]
    qweight = pack(wanted.codes, STRAIGHT).t().contiguous()  # [K / 8, N]
    qzeros = pack(((wanted.zeros - 1) % 16 if minus_one else wanted.zeros).t(), STRAIGHT)  # [K / g, N / 8]
    g_idx = torch.arange(wanted.codes.shape[1], dtype=torch.int32) // group
    matrix = gptq_matrix(qweight, qzeros, wanted.scales.t().contiguous(), group, g_idx, zeros_minus_one=minus_one)
    assert torch.equal(dequantize(matrix, torch.float32), wanted.values.float())


def test_gptq_with_inputs_out_of_order_is_refused() -> None:
    wanted = Quantized(8, 2, 8, 0)
    arguments = pack(wanted.codes, STRAIGHT).t(), pack(wanted.zeros.t(), STRAIGHT), wanted.scales.t(), 8
    g_idx = (torch.arange(16, dtype=torch.int32) // 8).flip(0)
    with pytest.raises(ValueError, match="desc_act"):
        gptq_matrix(*arguments, g_idx)


@given(st.integers(1, 20), st.integers(1, 3), st.sampled_from([8, 32]), st.integers(0, 99), st.booleans())
def test_compressed_tensors(rows: int, groups: int, group: int, seed: int, zero_points: bool) -> None:
    wanted = Quantized(rows, groups, group, seed, torch.bfloat16)
    zeros = pack(wanted.zeros.t(), STRAIGHT).t().contiguous() if zero_points else None  # [ceil(N / 8), K / g]
    matrix = compressed_tensors_matrix(pack(wanted.codes, STRAIGHT), wanted.scales, groups * group, group, zeros)
    values = wanted.values if zero_points else wanted.symmetric
    assert torch.equal(dequantize(matrix, torch.float32), values.float())


@given(SIZES, st.integers(0, 99), st.sampled_from([torch.bfloat16, torch.float16]), st.booleans())
def test_compressed_tensors_in_the_scales_dtype_are_what_the_library_computes(
    sizes: tuple[int, int, int], seed: int, dtype: torch.dtype, zero_points: bool
) -> None:
    """compressed-tensors 0.20, quantization/lifecycle/forward_helpers.py, `_dequantize`: signed codes less the zero
    point, times the scale, all in the scale's dtype."""
    wanted, group = Quantized(*sizes, seed, dtype), sizes[2]
    zeros = pack(wanted.zeros.t(), STRAIGHT).t() if zero_points else None
    columns = wanted.codes.shape[1]
    matrix = compressed_tensors_matrix(pack(wanted.codes, STRAIGHT), wanted.scales, columns, group, zeros)
    signed, zero = (wanted.codes - 8).to(dtype), (wanted.zeros - 8).to(dtype) if zero_points else 0 * wanted.scales
    shift, scale = (part.repeat_interleave(group, 1) for part in (zero, wanted.scales))
    assert torch.equal(dequantize(matrix, dtype), (signed - shift) * scale)


def test_compressed_tensors_with_a_last_word_that_is_not_full() -> None:
    wanted = Quantized(3, 1, 12, 0)
    words = pack(wanted.codes, STRAIGHT)  # [3, 2]
    matrix = compressed_tensors_matrix(words, wanted.scales, 12, None)
    assert matrix.shape == (3, 12)
    assert torch.equal(dequantize(matrix, torch.float32), wanted.symmetric.float())
    assert matrix.data.untyped_storage().data_ptr() == words.untyped_storage().data_ptr()  # no byte was moved


WORDS = torch.zeros(8, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compressed_tensors_matrix(WORDS, torch.ones(8, 1), 24, None), "for 24 columns"),
        (lambda: compressed_tensors_matrix(WORDS, torch.ones(8, 1), 15, None), "for 15 columns"),
        (lambda: compressed_tensors_matrix(WORDS.long(), torch.ones(8, 1), 16, None), "not an int32 matrix"),
        (lambda: compressed_tensors_matrix(WORDS, torch.ones(8, 1), 16, 8), r"need scales \(8, 2\)"),
        (lambda: compressed_tensors_matrix(WORDS, torch.ones(8, 1), 16, None, WORDS[:2, :1]), "words for 8 columns"),
        (lambda: compressed_tensors_matrix(WORDS, torch.ones(8, 1), 16, None, WORDS[None]), "weight_zero_point is"),
        (lambda: awq_matrix(WORDS, WORDS[:2], torch.ones(1, 16), 8), r"zeros \(16, 2\)"),
        (lambda: gptq_matrix(WORDS, WORDS[:1], torch.ones(1, 2), None), "words for 2 columns"),
        (
            lambda: fp8_block_matrix(torch.zeros(9, 9).to(torch.float8_e4m3fn), torch.ones(2, 1), (16, 16)),
            "need scales",
        ),
        (lambda: mxfp4_matrix(torch.zeros(8, 4, 16, dtype=torch.uint8), WORDS.byte()), r"need scales \(8, 4\)"),
        (lambda: mxfp4_matrix(torch.zeros(8, 4, 16), WORDS.byte()), "MXFP4 needs blocks uint8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
