"""Which of torch's kernels multiplies rows by a plain matrix of their dtype fastest, by the rows and the size.

Few rows are bound by reading the weights, many by arithmetic, and no kernel is best at both on every processor. The
numbers below were measured with scripts/bench/cpu_experts.py; what they choose is equal within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeAlias

import torch
from torch import Tensor

from .processor import Processor, this_processor

Product: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]  # x [R, K], weight [N, K], out [R, N]: out = x @ weight.T

_DOT_ROWS: Final = 5  # up to which half-precision dot products are faster than widening, where those are all there is
_EMULATED_ROWS: Final = 15  # the same where oneDNN computes bf16 with the instructions of fp32
_JIT_ROWS: Final = range(4, 7)  # for which oneDNN's linear layer beats torch's product where bf16 has no instructions
_LARGE: Final = 1 << 19  # elements from which oneDNN multiplies fp32 faster than MKL
_MKL_ROWS: Final = 3  # up to which MKL multiplies fp32 faster than oneDNN with AVX-512, on its maker's processors
_BANDS: Final = 16  # into which a matrix is cut for MKL's product of batches, which shares them among threads
_BANDED_ROWS: Final = 3  # up to which that is the fastest on other makers' processors
_BANDED: Final = 1 << 22  # elements, up to which it is
_BANDED_SMALL_ROWS: Final = 8  # the same for matrices that are too small for oneDNN


def plain_product(x: Tensor, weight: Tensor) -> Product | None:
    """The fastest product of x [R, K] and weight [N, K] of one dtype; None: widening the weights to fp32 is faster."""
    return _remembered(x.dtype, x.shape[0], weight.shape, weight.is_contiguous(), torch.get_num_threads() > 1)


def is_plain_fastest(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing is faster than torch's own product of x [R, K] and a plain weight [N, K]."""
    return weight.dtype == x.dtype and plain_product(x, weight) is _matrix_product


@lru_cache(maxsize=4096)
def _remembered(
    dtype: torch.dtype, rows: int, shape: tuple[int, int], contiguous: bool, threaded: bool
) -> Product | None:
    """A product of few rows takes no longer than a handful of questions."""
    return choose_product(dtype, rows, shape, this_processor(), contiguous=contiguous, threaded=threaded)


def choose_product(
    dtype: torch.dtype, rows: int, shape: tuple[int, int], processor: Processor, *, contiguous: bool, threaded: bool
) -> Product | None:
    """The fastest product on `processor` of `rows` and a weight of `shape` (N, K); None: widen the weights to fp32.

    contiguous: the weight is. threaded: more than one thread computes.
    """
    if dtype == torch.float32:
        return _choose_fp32(rows, shape, processor, threaded) if contiguous else _matrix_product
    emulated = dtype == torch.bfloat16 and processor.emulates_bf16
    if rows > (_EMULATED_ROWS if emulated else _DOT_ROWS) and not processor.has_fast_products(dtype):
        return None
    if emulated and contiguous and rows == 1:
        return _vector_product  # at the memory's speed; torch's matrix product of one row is not
    if emulated and contiguous and rows in _JIT_ROWS and shape[0] * shape[1] >= _LARGE and processor.onednn:
        return _onednn_product
    return _matrix_product


def _choose_fp32(rows: int, shape: tuple[int, int], processor: Processor, threaded: bool) -> Product:
    if not (processor.mkl and processor.onednn):
        return _matrix_product  # whichever there is, torch uses
    size = shape[0] * shape[1]
    if not processor.intel and threaded:  # MKL's product of one matrix keeps few rows to one thread there
        limit = _BANDED_SMALL_ROWS if size < _LARGE else _BANDED_ROWS
        if 0 < rows <= limit and size <= _BANDED and shape[0] % _BANDS == 0:
            return _banded_product
    elif processor.intel and processor.avx512 and rows <= _MKL_ROWS:
        return _matrix_product
    return _onednn_product if size >= _LARGE else _matrix_product


def _matrix_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.mm(x, weight.t(), out=out)


def _vector_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.mv(weight, x[0], out=out[0])


def _onednn_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    out.copy_(torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], ""))


def _banded_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    bands = weight.view(_BANDS, -1, weight.shape[1]).transpose(1, 2)  # [B, K, N / B]
    products = torch.bmm(x.expand(_BANDS, -1, -1), bands)  # [B, R, N / B]
    out.view(x.shape[0], _BANDS, -1).copy_(products.transpose(0, 1))
