"""What of this processor decides which of torch's kernels is fast."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class Processor:
    """Instructions and libraries.

    avx512: the processor has it, and torch uses it. intel: made by the maker of MKL, whose products of a few rows are
    slower than oneDNN's on others, and are not shared among threads. mkl, onednn: torch was built with them.
    bf16_products, fp16_products: oneDNN computes blocked products of these dtypes. bf16_instructions: the processor
    does; else they are those of fp32.
    """

    avx512: bool
    intel: bool
    mkl: bool
    onednn: bool
    bf16_products: bool
    fp16_products: bool
    bf16_instructions: bool

    @property
    def emulates_bf16(self) -> bool:
        """Whether oneDNN computes bf16 with the instructions of fp32: AVX-512 without its bf16 extension."""
        return self.avx512 and not self.bf16_instructions

    def has_fast_products(self, dtype: torch.dtype) -> bool:
        """Whether products of matrices of `dtype` are blocked, at no less than the speed of fp32."""
        if dtype == torch.bfloat16:
            return self.bf16_products and not self.emulates_bf16
        return self.fp16_products if dtype == torch.float16 else True


@lru_cache(maxsize=1)
def this_processor() -> Processor:
    """The one that this process runs on."""
    mkl, onednn = torch.backends.mkl, torch.backends.mkldnn
    has_onednn = bool(onednn.is_available())  # type: ignore[no-untyped-call]
    ops = torch.ops.mkldnn
    describe = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch that is supported
    name = describe().get("cpu_name") if describe else None
    return Processor(
        avx512=torch.backends.cpu.get_cpu_capability() == "AVX512",
        intel="AMD" not in str(name),  # also where torch cannot tell
        mkl=bool(mkl.is_available()),  # type: ignore[no-untyped-call]
        onednn=has_onednn,
        bf16_products=has_onednn and bool(ops._is_mkldnn_bf16_supported()),
        fp16_products=has_onednn and bool(ops._is_mkldnn_fp16_supported()),
        bf16_instructions=torch.cpu._is_avx512_bf16_supported(),
    )
