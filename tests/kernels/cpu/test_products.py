"""Products over packed and quantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import pytest
import torch
from support.random_experts import KINDS, random_matrix, relative_error

from moehive.kernels.cpu import plain, products
from moehive.kernels.cpu.experts import expert_rows_fast
from moehive.kernels.cpu.packed import (
    PackedMatrix,
    can_pack,
    is_packed,
    pack,
    pack_expert,
    pack_weights,
    packed_product,
    plain_weights,
    unpack,
)
from moehive.kernels.cpu.processor import this_processor
from moehive.kernels.cpu.products import multiply
from moehive.kernels.dequantize import dequantize
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec, expert_ffn
from moehive.kernels.formats import ExpertMatrices, WeightFormat, WeightMatrix

BF16, F32 = torch.bfloat16, torch.float32
needs_packing = pytest.mark.skipif(not can_pack(), reason="oneDNN has no bf16 products on this machine")


def normal(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@contextmanager
def half_precision_products(fast: bool) -> Iterator[None]:
    """A processor that has them, or has not, whatever this one is."""
    processor = replace(this_processor(), bf16_products=fast, fp16_products=fast, bf16_instructions=fast)
    with pytest.MonkeyPatch.context() as patch:
        for module in (plain, products):
            patch.setattr(module, "this_processor", lambda: processor)
        plain._remembered.cache_clear()
        yield
    plain._remembered.cache_clear()


@needs_packing
@pytest.mark.parametrize("shape", [(160, 320), (100, 33), (1, 1), (1536, 1024)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 64])
def test_a_packed_product_is_the_product(shape: tuple[int, int], rows: int) -> None:
    weight, x, bias = normal(*shape), normal(rows, shape[1]), normal(shape[0])
    packed = pack(weight)
    found = packed_product(x, packed, bias)
    wanted = x.double() @ weight.double().t() + bias.double()
    assert (found.shape, found.dtype) == ((rows, shape[0]), BF16)
    assert relative_error(found, wanted) <= 2**-8
    assert packed.nbytes >= weight.nbytes


@needs_packing
@pytest.mark.parametrize("shape", [(160, 320), (100, 33)])
def test_packing_can_be_undone(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    assert torch.equal(unpack(pack(weight)), weight)
    assert torch.equal(unpack(pack(weight.t())), weight.t())


@needs_packing
def test_experts_are_packed_where_it_pays() -> None:
    large, small = WeightMatrix(WeightFormat.PLAIN, normal(256, 128)), WeightMatrix(WeightFormat.PLAIN, normal(16, 8))
    packed = pack_expert(
        ExpertMatrices(large, WeightMatrix(WeightFormat.PLAIN, normal(128, 128)), normal(256, dtype=F32))
    )
    assert isinstance(packed.gate_up, PackedMatrix)
    assert packed.gate_up_bias is not None
    assert packed.gate_up_bias.dtype == BF16
    assert packed.nbytes == 2 * (256 * 128 + 128 * 128 + 256)
    assert isinstance(
        pack_expert(ExpertMatrices(small, WeightMatrix(WeightFormat.PLAIN, normal(8, 8)))).down, WeightMatrix
    )


@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), [(256, 96), (64, 32)], ids=["packed", "too small"])
def test_packed_weights_are_the_weights(hidden: int, inner: int, bias: bool) -> None:
    biases = (normal(2 * inner), normal(hidden)) if bias else (None, None)
    weights = ExpertWeights(normal(2 * inner, hidden), normal(hidden, inner), *biases)
    packed, spec = pack_weights(weights), FfnSpec()
    assert is_packed(packed) == (hidden == 256)
    for one, other in zip(plain_weights(packed).tensors, weights.tensors, strict=True):
        assert torch.equal(one, other)
    for rows in (0, 1, 3, 40):
        x = normal(rows, hidden)
        found, wanted = expert_rows_fast(x, packed, spec), expert_ffn(x, weights, spec)
        assert (found.shape, found.dtype) == (wanted.shape, BF16)
        assert relative_error(found, wanted.double()) <= 2**-6


@pytest.mark.parametrize("inner", [32, 1024], ids=["torch's product", "another"])
def test_rows_are_computed_without_gradients(inner: int) -> None:
    weights, spec, rows = ExpertWeights(normal(2 * inner, 512).float(), normal(512, inner).float()), FfnSpec(), 16
    x = normal(rows, 512, dtype=F32)
    wanted = expert_rows_fast(x, weights, spec)
    found = expert_rows_fast(x.clone().requires_grad_(), weights, spec)
    assert not found.requires_grad
    assert torch.equal(found, wanted)


@needs_packing
@pytest.mark.parametrize(("hidden", "inner"), [(256, 96), (256, 40)], ids=["packed", "down too small"])
def test_packed_weights_do_not_keep_what_they_were_made_of(hidden: int, inner: int) -> None:
    shapes = (2 * inner, hidden), (hidden, inner), (2 * inner,), (hidden,)
    sizes = [prod(shape) for shape in shapes]
    shard = normal(sum(sizes))
    parts = [part.view(shape) for part, shape in zip(torch.split(shard, sizes), shapes, strict=True)]
    packed = pack_weights(ExpertWeights(*parts))
    assert packed.gate_up.is_mkldnn
    kept = {tensor.untyped_storage().data_ptr() for tensor in packed.tensors if not tensor.is_mkldnn}
    assert shard.untyped_storage().data_ptr() not in kept


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [1, 2, 4, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_multiplied(kind: str, rows: int, dtype: torch.dtype) -> None:
    matrix, values = random_matrix(KINDS[kind], 160, 256, torch.Generator().manual_seed(1), lambda tensor: tensor)
    x, bias = normal(rows, 256, dtype=dtype), normal(160, dtype=dtype)
    out = torch.empty(rows, 160, dtype=dtype)
    multiply(x, matrix, bias, out)
    error = relative_error(out, x.double() @ values.t() + bias.double())
    assert error <= (1e-5 if dtype == F32 else 2**-7)


@pytest.mark.parametrize("rows", [1, 5])
def test_large_fp32_matrices_are_multiplied_in_fp32(rows: int) -> None:
    weight, x, out = normal(1024, 1024, dtype=F32), normal(rows, 1024, dtype=F32), torch.empty(rows, 1024)
    multiply(x, WeightMatrix(WeightFormat.PLAIN, weight), None, out)
    assert relative_error(out, x.double() @ weight.double().t()) <= 5e-6  # in bf16: 1e-3


@pytest.mark.parametrize("rows", [1, 3, 5, 9])
def test_large_bf16_matrices_are_multiplied_by_every_kernel(rows: int) -> None:
    weight, x, out = normal(1024, 1024), normal(rows, 1024), torch.empty(rows, 1024, dtype=BF16)
    multiply(x, WeightMatrix(WeightFormat.PLAIN, weight), None, out)
    assert relative_error(out, x.double() @ weight.double().t()) <= 2**-8


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 6, 33])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("kind", ["plain-bfloat16", "plain-float16", "plain-bfloat16-transposed", "int4-group-g32"])
def test_half_precision_with_and_without_fast_products(
    kind: str, dtype: torch.dtype, rows: int, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged bands, columns that are no multiple of anything wide, and a band that ends within a block of rows."""
    monkeypatch.setattr(products, "_BAND", 70 * 96)
    matrix, values = random_matrix(KINDS[kind], 150, 96, torch.Generator().manual_seed(1), lambda tensor: tensor)
    x, bias, out = normal(rows, 96, dtype=dtype), normal(150, dtype=dtype), torch.empty(rows, 150, dtype=dtype)
    with half_precision_products(fast):
        multiply(x, matrix, bias, out)
    assert relative_error(out, x.double() @ values.t() + bias.double()) <= 2**-7


def test_without_fast_products_weights_are_not_rounded() -> None:
    """Widened to fp32, all that is rounded is the sum."""
    matrix, values = random_matrix(KINDS["int4-group-g64"], 64, 128, torch.Generator().manual_seed(1), torch.clone)
    x, out = normal(9, 128), torch.empty(9, 64, dtype=BF16)
    with half_precision_products(False):
        multiply(x, matrix, None, out)
    wanted = x.double() @ values.t()
    assert ((out.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5).all()


def test_a_quantised_matrix_is_never_widened_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, values = random_matrix(KINDS["mxfp4"], 96, 64, torch.Generator().manual_seed(1), lambda tensor: tensor)
    widened = []

    def recording(band: WeightMatrix, dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
        widened.append(band.shape)
        return dequantize(band, dtype, out=out)

    monkeypatch.setattr(products, "_BAND", 10 * 64)
    monkeypatch.setattr(products, "dequantize", recording)
    x, out = normal(3, 64, dtype=F32), torch.empty(3, 96)
    multiply(x, matrix, None, out)
    assert relative_error(out, x.double() @ values.t()) <= 1e-6
    assert widened == [(10, 64)] * 9 + [(6, 64)]
