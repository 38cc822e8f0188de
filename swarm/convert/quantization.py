"""How a checkpoint is quantised, by its config.json; every scheme without a rule here is refused with its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moehive.protocol.errors import CheckpointError, UnsupportedModel
from moehive.protocol.manifest import Quantization

FP8_BLOCK = "fp8-block"
MXFP4 = "mxfp4"


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """The scheme of the experts' weights; None for plain floating point. Raises UnsupportedModel, CheckpointError."""
    settings = config.get("quantization_config", config.get("compression_config"))
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise CheckpointError("config.json: quantization_config is not an object")
    method = settings.get("quant_method")
    if method == "mxfp4":
        return Quantization(MXFP4)
    if method == "fp8":
        return Quantization(FP8_BLOCK, _block(settings))
    if method == "moehive":
        raise UnsupportedModel("this directory is a moehive conversion already")
    raise UnsupportedModel(
        f"quantization {method!r} is not supported: moehive reads bf16, fp16, fp32, fp8 in blocks and mxfp4"
    )


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise UnsupportedModel("fp8 with static activation scales is not supported")
    block = settings.get("weight_block_size")
    if block is None:
        raise UnsupportedModel("fp8 without weight_block_size (one scale per tensor) is not supported")
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise CheckpointError(f"config.json: weight_block_size is {block!r}, two positive integers are expected")
    return block[0], block[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of an fp8 weight [R, C]: the last block of a side may be cut."""
    return tuple(-(-side // step) for side, step in zip(shape, block, strict=True))
