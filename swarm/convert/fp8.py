"""The one change that a conversion makes to weights: fp8 in blocks becomes bf16, for the skeleton only."""

from __future__ import annotations

import torch


def dequantize_band(weight: bytearray, scales: bytearray, *, columns: int, width: int) -> memoryview:
    """bf16 bytes of a band of rows that share one row of scales.

    `weight` is float8_e4m3fn [rows, columns]; `scales` is fp32 [ceil(columns / width)], one per block of `width`
    columns, the last of which may be cut. Each value is multiplied in fp32 and rounded once, to nearest even.
    """
    values = torch.frombuffer(weight, dtype=torch.float8_e4m3fn).view(-1, columns)  # [rows, columns]
    factors = torch.frombuffer(scales, dtype=torch.float32).repeat_interleave(width)[:columns]  # [columns]
    product = (values.float() * factors).to(torch.bfloat16)  # [rows, columns]
    return product.view(torch.uint8).flatten().numpy().data
