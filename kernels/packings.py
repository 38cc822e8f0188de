"""The packings of published checkpoints, as weight matrices in the one layout of formats.py.

Each function takes the tensors of one projection under their meaning in the checkpoint and returns a matrix; nothing is
requantised, every code and scale stays as it was published. Views where the bytes lie right already.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .formats import MXFP4_GROUP, WeightFormat, WeightMatrix, unpack_nibbles

PER_WORD: Final = 8  # values of 4 bits in an int32
_BAND: Final = 1 << 17  # words turned at a time: 512 KiB
_AWQ_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # where AWQ's interleaved columns 0, 2, 4, 6, 1, 3, 5, 7 have to go


def fp8_block_matrix(weight: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> WeightMatrix:
    """DeepSeek-V3, Kimi-K2: `weight` [N, K] float8_e4m3fn, `weight_scale_inv` per block (it multiplies).

    The block size is asked for, not guessed from the shapes: the last block of a side may be cut, so only the
    configuration knows it. Raises ValueError for scales of another grid.
    """
    return WeightMatrix(WeightFormat.FP8_BLOCK, weight, scale_inv.float(), block=block)


def mxfp4_matrix(blocks: Tensor, scales: Tensor) -> WeightMatrix:
    """GPT-OSS: `blocks` uint8 [N, K / 32, 16], two values per byte, low half first; `scales` uint8 [N, K / 32].

    Raises ValueError where they do not fit each other.
    """
    if blocks.ndim != 3 or blocks.dtype != torch.uint8 or blocks.shape[2] != MXFP4_GROUP // 2:
        raise ValueError(f"MXFP4 needs blocks uint8 [out, in / 32, 16], not {blocks.dtype} {tuple(blocks.shape)}")
    return WeightMatrix(WeightFormat.MXFP4, blocks.flatten(1), scales, block=(1, MXFP4_GROUP))


def compressed_tensors_matrix(
    weight_packed: Tensor, weight_scale: Tensor, columns: int, group: int | None, zero_point: Tensor | None = None
) -> WeightMatrix:
    """compressed-tensors "pack-quantized", 4 bits: int32 [N, ceil(K / 8)], low bits first, value + 8.

    Kimi-K2-Thinking is published so. `columns` is K, from `weight_shape`. `weight_scale` [N, ceil(K / group)]; `group`
    None: one scale for a row. `zero_point` is packed along N: int32 [ceil(N / 8), ceil(K / group)]. Widened to the
    scales' dtype, the values are those of compressed-tensors 0.20 (pack_quantized/helpers.py `unpack_from_int32`,
    forward_helpers.py `_dequantize`); it rounds to that dtype first for every other one, too, which is not done here.
    Raises ValueError where they do not fit each other, and for an odd K.
    """
    _check_words(weight_packed, "weight_packed")
    if zero_point is not None:
        _check_words(zero_point, "weight_zero_point")
    if columns % 2 or -(-columns // PER_WORD) != weight_packed.shape[1]:
        raise ValueError(f"weight_packed {tuple(weight_packed.shape)} for {columns} columns")
    data = weight_packed.contiguous().view(torch.uint8)[:, : columns // 2]  # little endian: low bits are low columns
    zero = None if zero_point is None else _turned(_unpack(zero_point.t(), data.shape[0]))  # [N, G]
    return _int4_matrix(data, weight_scale, zero, group)


def awq_matrix(qweight: Tensor, qzeros: Tensor, scales: Tensor, group: int | None) -> WeightMatrix:
    """AWQ, "gemm" version: qweight int32 [K, N / 8], qzeros int32 [K / group, N / 8], scales [K / group, N].

    The eight columns of a word are interleaved: 0, 2, 4, 6, 1, 3, 5, 7. `group` None: one scale for a column. Raises
    ValueError where they do not fit each other.
    """
    _check_turned(qweight, scales)
    zeros = _unpack(qzeros)[:, _awq_columns(qzeros)]  # [K / g, N]
    return _int4_matrix(_awq_data(qweight), _turned(scales), _turned(zeros), group)


def gptq_matrix(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    group: int | None,
    g_idx: Tensor | None = None,
    *,
    zeros_minus_one: bool = True,
) -> WeightMatrix:
    """GPTQ: qweight int32 [K / 8, N], low bits first along K; qzeros int32 [K / group, N / 8]; scales [K / group, N].

    Zero points are stored minus one, modulo 16 (`checkpoint_format: "gptq"`); `zeros_minus_one=False` for "gptq_v2".
    `g_idx` [K] says each input's group. Raises ValueError where they do not fit each other, and for inputs in
    another order than their groups (desc_act): those need the expert's input permuted, which no kernel here does.
    """
    _check_turned(qweight, scales)
    columns = qweight.shape[0] * PER_WORD
    if g_idx is not None:
        _check_order(g_idx, columns, min(group or columns, columns))
    zeros = _unpack(qzeros, scales.shape[-1])  # [K / g, N]
    if zeros_minus_one:
        zeros = (zeros + 1) & 0xF
    data = _turned(qweight).view(torch.uint8)  # [N, K / 2]
    return _int4_matrix(data, _turned(scales), _turned(zeros), group)


def _int4_matrix(data: Tensor, scale: Tensor, zero: Tensor | None, group: int | None) -> WeightMatrix:
    return WeightMatrix(WeightFormat.INT4_GROUP, data, scale, zero, block=(1, group or 2 * data.shape[1]))


def _check_words(words: Tensor, name: str) -> None:
    if words.ndim != 2 or words.dtype != torch.int32:
        raise ValueError(f"{name} is {words.dtype} {tuple(words.shape)}, not an int32 matrix")


def _check_order(g_idx: Tensor, columns: int, group: int) -> None:
    if g_idx.shape != (columns,):
        raise ValueError(f"g_idx {tuple(g_idx.shape)} for {columns} inputs")
    if not torch.equal(g_idx.int().cpu(), torch.arange(columns, dtype=torch.int32) // group):
        raise ValueError("GPTQ with desc_act (inputs ordered by activation) is not supported: quantise without it")


def _check_turned(qweight: Tensor, scales: Tensor) -> None:
    _check_words(qweight, "qweight")
    if scales.ndim != 2 or not qweight.numel():
        raise ValueError(f"qweight {tuple(qweight.shape)} and scales {tuple(scales.shape)} are no matrices")


def _unpack(words: Tensor, columns: int | None = None) -> Tensor:
    """int32 [R, C] as uint8 [R, 8 C], low bits first; the first `columns` of them."""
    _check_words(words, "a packed tensor")
    codes = unpack_nibbles(_own(words).view(torch.uint8))  # [R, 8 C]
    if columns is not None and not columns <= codes.shape[1] < columns + PER_WORD:
        raise ValueError(f"{tuple(words.shape)} words for {columns} columns")
    return codes if columns is None else codes[:, :columns]


def _awq_data(qweight: Tensor) -> Tensor:
    """int32 [K, N / 8] as uint8 [N, K / 2], in bands that stay in the cache. Two inputs are taken as one int64."""
    columns, words = qweight.shape
    if columns % 2:
        raise ValueError(f"{columns} columns of 4 bits do not fill bytes")
    data = torch.empty(words, PER_WORD, columns // 2, dtype=torch.uint8, device=qweight.device)
    step = max(_BAND // columns, 1)
    for first in range(0, words, step):
        pairs = _turned(qweight[:, first : first + step]).view(torch.int64)  # [step, K / 2]
        for row, nibble in enumerate(_AWQ_ORDER):
            high = pairs.bitwise_right_shift(28 + 4 * nibble).bitwise_and_(0xF0)
            data[first : first + step, row] = pairs.bitwise_right_shift(4 * nibble).bitwise_and_(0xF).bitwise_or_(high)
    return data.flatten(0, 1)


def _turned(matrix: Tensor) -> Tensor:
    """[R, C] as [C, R], in memory of its own: a view would keep a whole shard."""
    return _own(matrix.t())


def _own(matrix: Tensor) -> Tensor:
    """A copy without gaps. Of a matrix that is one row or column `contiguous` makes none, and leaves it odd strides."""
    return matrix.clone(memory_format=torch.contiguous_format)


def _awq_columns(words: Tensor) -> Tensor:
    """For each column of the matrix its place among the unpacked ones."""
    word = torch.arange(words.shape[1], device=words.device)[:, None] * PER_WORD
    return (word + torch.tensor(_AWQ_ORDER, device=words.device)).flatten()
