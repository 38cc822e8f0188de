"""4-bit weights to floating point, for the skeleton only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moehive.kernels.dequantize import dequantize
from moehive.kernels.formats import WeightMatrix
from moehive.kernels.packings import compressed_tensors_matrix
from moehive.kernels.repacking import repacked
from moehive.protocol.errors import CheckpointError
from moehive.protocol.manifest import Quantization
from moehive.protocol.safetensors_header import TensorSpec
from moehive.swarm.model.tensors import TORCH_DTYPE, TURNED_PACKING


def packed_matrix(name: str, quantization: Quantization, parts: Sequence[tuple[TensorSpec, bytearray]]) -> WeightMatrix:
    """The weight [out, in] called `name`, of its tensors by their kinds. Raises CheckpointError."""
    tensors = {
        f"_.{spec.name}": torch.frombuffer(data, dtype=TORCH_DTYPE[spec.dtype]).view(spec.shape) for spec, data in parts
    }
    assert quantization.block is not None, quantization
    turned, group = TURNED_PACKING.get(quantization.method), quantization.block[1]
    try:
        if turned is not None:
            tensors = repacked(tensors, turned, group)
        packed, scale, shape = (tensors[f"_.weight_{kind}"] for kind in ("packed", "scale", "shape"))
        matrix = compressed_tensors_matrix(packed, scale, int(shape[1]), group, tensors.get("_.weight_zero_point"))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    if shape.tolist() != list(matrix.shape):
        raise CheckpointError(f"{name}: weight_shape is {shape.tolist()}, that of the packed values {matrix.shape}")
    return matrix


def widened_rows(matrix: WeightMatrix, spec: TensorSpec, start: int, stop: int) -> memoryview:
    """The bytes of rows [start, stop) in the dtype of `spec`: each value computed in fp32 and rounded once."""
    rows = dequantize(matrix.rows(start, stop), TORCH_DTYPE[spec.dtype])  # [rows, in]
    return rows.view(torch.uint8).flatten().numpy().data
