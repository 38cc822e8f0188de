"""Rounding to a narrower dtype while computing in fp32.

By hand for bf16, because the interpreter truncates where the GPU rounds: after this both store the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """fp32 values rounded to what `dtype` can hold, ties to even, still fp32."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, even.to(tl.float32, bitcast=True), value)  # NaN would overflow into -0
    elif dtype == tl.float16:
        value = value.to(tl.float16).to(tl.float32)
    return value
