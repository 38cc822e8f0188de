"""Which product is chosen on which processor, and that each of them is the product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.random_experts import relative_error

from moehive.kernels.cpu import plain
from moehive.kernels.cpu.plain import choose_product, is_plain_fastest
from moehive.kernels.cpu.processor import Processor, this_processor

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SMALL, MIDDLE, HUGE = (512, 256), (1536, 2048), (14336, 4096)
XEON = Processor(True, True, True, True, bf16_products=True, fp16_products=True, bf16_instructions=True)
ICE_LAKE = replace(XEON, bf16_instructions=False, fp16_products=False)
EPYC = replace(XEON, intel=False)
OLD = replace(EPYC, avx512=False, bf16_products=False, fp16_products=False, bf16_instructions=False)
ARM = replace(OLD, mkl=False)
PROCESSORS = {"xeon": XEON, "ice lake": ICE_LAKE, "epyc": EPYC, "old": OLD, "arm": ARM}


@pytest.mark.parametrize(
    ("machine", "dtype", "rows", "shape", "chosen"),
    [
        ((XEON, True), F32, 1, MIDDLE, "_matrix_product"),
        ((XEON, True), F32, 4, MIDDLE, "_onednn_product"),
        ((XEON, True), F32, 4, SMALL, "_matrix_product"),
        ((EPYC, True), F32, 1, MIDDLE, "_banded_product"),
        ((EPYC, True), F32, 4, MIDDLE, "_onednn_product"),
        ((EPYC, True), F32, 1, HUGE, "_onednn_product"),
        ((EPYC, True), F32, 8, SMALL, "_banded_product"),
        ((EPYC, True), F32, 9, SMALL, "_matrix_product"),
        ((EPYC, True), F32, 1, (1000, 256), "_matrix_product"),
        ((EPYC, False), F32, 1, MIDDLE, "_onednn_product"),
        ((EPYC, False), F32, 1, SMALL, "_matrix_product"),
        ((OLD, True), F32, 1, HUGE, "_onednn_product"),
        ((ARM, True), F32, 1, HUGE, "_matrix_product"),
        ((XEON, True), BF16, 64, MIDDLE, "_matrix_product"),
        ((ICE_LAKE, True), BF16, 1, MIDDLE, "_vector_product"),
        ((ICE_LAKE, True), BF16, 5, MIDDLE, "_onednn_product"),
        ((ICE_LAKE, True), BF16, 15, MIDDLE, "_matrix_product"),
        ((ICE_LAKE, True), BF16, 16, MIDDLE, None),
        ((OLD, True), BF16, 5, MIDDLE, "_matrix_product"),
        ((OLD, True), BF16, 6, MIDDLE, None),
        ((OLD, True), F16, 6, MIDDLE, None),
        ((XEON, True), F16, 6, MIDDLE, "_matrix_product"),
    ],
)
def test_the_choice(
    machine: tuple[Processor, bool], dtype: torch.dtype, rows: int, shape: tuple[int, int], chosen: str | None
) -> None:
    processor, threaded = machine
    product = choose_product(dtype, rows, shape, processor, contiguous=True, threaded=threaded)
    assert (None if product is None else product.__name__) == chosen


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("shape", [(1024, 640), (80, 48), (33, 17)])
@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_chosen_is_the_product(
    dtype: torch.dtype, threaded: bool, shape: tuple[int, int], processor: Processor
) -> None:
    """Also of strided weights, and whatever the instructions of the machine that tests it, where it can compute it."""
    generator = torch.Generator().manual_seed(1)
    for rows in (0, 1, 2, 3, 5, 9, 33):
        x, weight = (torch.randn(n, shape[1], generator=generator).to(dtype) for n in (rows, shape[0]))
        for given in (weight, weight.t().contiguous().t()):
            product = choose_product(dtype, rows, shape, processor, contiguous=given.is_contiguous(), threaded=threaded)
            blocked = product is plain._onednn_product and dtype == BF16
            if product is None or (blocked and not this_processor().bf16_products):
                continue
            out = torch.full((rows, shape[0]), torch.nan, dtype=dtype)
            product(x, given, out)
            assert relative_error(out, x.double() @ weight.double().t()) <= (5e-6 if dtype == F32 else 2**-8)


def test_torchs_own_product_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(4, 2048), torch.zeros(1536, 2048)
    for processor, fastest in ((ARM, True), (EPYC, False)):
        plain._remembered.cache_clear()
        monkeypatch.setattr(plain, "this_processor", lambda processor=processor: processor)
        assert is_plain_fastest(x, weight) == fastest
    assert not is_plain_fastest(x.double(), weight)
    plain._remembered.cache_clear()


def test_this_processor_can_be_described() -> None:
    here = this_processor()
    assert here.has_fast_products(F32)
    assert here.has_fast_products(BF16) <= here.bf16_products
    assert here is this_processor()
