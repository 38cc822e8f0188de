"""How a checkpoint is quantised, by its config.json; every scheme without a rule here is refused with its name.

Owns which tensors a quantised weight consists of, and their shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from moehive.protocol.errors import CheckpointError, UnsupportedModel
from moehive.protocol.manifest import Quantization, QuantMethod

FLOATS = ("BF16", "F16", "F32")
_INTEGERS = ("I32", "I64")
_MXFP4_GROUP = 32  # values that share a scale; two to a byte
PER_WORD = 8  # values of 4 bits in an int32
_READ = "bf16, fp16, fp32, fp8 in blocks, mxfp4, and 4 bits in groups of compressed-tensors, AWQ and GPTQ"
_ELSE = "quantise it so, or convert the checkpoint that it was made of"
INT4 = (QuantMethod.INT4_PACKED, QuantMethod.INT4_AWQ, QuantMethod.INT4_GPTQ, QuantMethod.INT4_GPTQ_V2)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What config.json says of the weights that are quantised."""

    quantization: Quantization
    zero_points: bool = False  # INT4_PACKED: whether a weight has some


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor that a weight is stored as: its shape, and the dtypes that it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the experts' weights; None for plain floating point. Raises UnsupportedModel, CheckpointError."""
    settings = config.get("quantization_config", config.get("compression_config"))
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise CheckpointError("config.json: quantization_config is not an object")
    method = settings.get("quant_method")
    if method == "mxfp4":
        return Scheme(Quantization(QuantMethod.MXFP4))
    if method == "fp8":
        return Scheme(Quantization(QuantMethod.FP8_BLOCK, _block(settings)))
    if method == "compressed-tensors":
        return _pack_quantized(settings)
    if method == "awq":
        return _awq(settings)
    if method == "gptq":
        return _gptq(settings)
    if method == "moehive":
        raise UnsupportedModel("this directory is a moehive conversion already")
    raise UnsupportedModel(f"quantization {method!r} is not supported: moehive reads {_READ}")


def stored_weight(shape: tuple[int, int], scheme: Scheme | None, *, transposed: bool) -> dict[str, Stored]:
    """The tensors of a weight [out, in] by their kind, which is how their names end. `transposed`: plain ones are.

    Raises UnsupportedModel where the two do not go together.
    """
    rows, columns = shape
    if scheme is None:
        return {"weight": Stored(shape[::-1] if transposed else shape, FLOATS)}
    if scheme.quantization.method is QuantMethod.MXFP4:
        groups = -(-columns // _MXFP4_GROUP)
        return {
            "blocks": Stored((rows, groups, _MXFP4_GROUP // 2), ("U8",)),
            "scales": Stored((rows, groups), ("U8",)),
        }
    block = scheme.quantization.block
    assert block is not None, scheme
    grid = scale_shape(shape, block)
    if scheme.quantization.method is QuantMethod.FP8_BLOCK:
        return {"weight": Stored(shape, ("F8_E4M3",)), "weight_scale_inv": Stored(grid, ("F32",))}
    if transposed:
        raise UnsupportedModel("4-bit weights in a model whose experts are transposed are not supported")
    return _stored_int4(shape, scheme, grid)


def _stored_int4(shape: tuple[int, int], scheme: Scheme, grid: tuple[int, ...]) -> dict[str, Stored]:
    (rows, columns), method = shape, scheme.quantization.method
    if method is not QuantMethod.INT4_PACKED:  # the other way round
        if rows % PER_WORD or columns % PER_WORD:
            raise UnsupportedModel(
                f"weights {list(shape)} in 4 bits of {method} are not supported: both sides have to be multiples of 8"
            )
        words, indices = (columns, rows // PER_WORD), {}
        if method is not QuantMethod.INT4_AWQ:
            words, indices = (columns // PER_WORD, rows), {"g_idx": Stored((columns,), ("I32",))}
        return {
            "qweight": Stored(words, ("I32",)),
            "qzeros": Stored((grid[1], rows // PER_WORD), ("I32",)),
            "scales": Stored(grid[::-1], FLOATS),
            **indices,
        }
    stored = {
        "weight_packed": Stored((rows, -(-columns // PER_WORD)), ("I32",)),
        "weight_scale": Stored(grid, FLOATS),
        "weight_shape": Stored((2,), _INTEGERS),
    }
    if scheme.zero_points:
        stored["weight_zero_point"] = Stored((-(-rows // PER_WORD), grid[1]), ("I32",))
    return stored


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a weight [R, C] with one for each block: the last block of a side may be cut."""
    return tuple(-(-side // step) for side, step in zip(shape, block, strict=True))


# --- fp8 ----------------------------------------------------------------------------------------------------------


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise UnsupportedModel("fp8 with static activation scales is not supported")
    block = settings.get("weight_block_size")
    if block is None:
        raise UnsupportedModel("fp8 without weight_block_size (one scale per tensor) is not supported")
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise CheckpointError(f"config.json: weight_block_size is {block!r}, two positive integers are expected")
    return block[0], block[1]


# --- compressed-tensors -------------------------------------------------------------------------------------------


def _pack_quantized(settings: Mapping[str, Any]) -> Scheme:
    """compressed-tensors "pack-quantized" (its PackedQuantizationCompressor): weights of 4 bits in groups of columns.

    Which weights are quantised is seen from their tensors, so `targets` and `ignore` are not looked at.
    """
    if (form := settings.get("format")) != "pack-quantized":
        _refuse_compressed(f"in the format {form!r}")
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.get(key):
            _refuse_compressed(f"with a {key}")
    sparsity = settings.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        _refuse_compressed("with a sparsity_config")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CheckpointError("config.json: quantization_config has no config_groups")
    if len(groups) != 1:
        _refuse_compressed(f"with {len(groups)} config_groups")
    (group,) = groups.values()
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            _refuse_compressed(f"with quantised {key}")
    return _packed_weights(group.get("weights"))


def _packed_weights(weights: Any) -> Scheme:
    """From the arguments of one group. Absent ones have the library's defaults."""
    if not isinstance(weights, Mapping):
        raise CheckpointError("config.json: a group of quantization_config does not say how its weights are quantised")
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if (bits, kind) != (4, "int"):
        _refuse_compressed(f"of {bits} bits of type {kind!r}")
    width, strategy = weights.get("group_size"), weights.get("strategy")
    if (strategy or "group") != "group" or width in (None, -1):
        _refuse_compressed(f"with strategy {strategy!r} and group_size {width!r}")
    if type(width) is not int or width < 1:
        raise CheckpointError(f"config.json: group_size is {width!r}, a positive integer is expected")
    if weights.get("dynamic"):
        _refuse_compressed("with dynamic weights")
    if (order := weights.get("actorder")) not in (None, False, "weight", "static"):  # those do not change the tensors
        _refuse_compressed(f"with actorder {order!r}")
    return Scheme(Quantization(QuantMethod.INT4_PACKED, (1, width)), not weights.get("symmetric", True))


def _refuse_compressed(what: str) -> NoReturn:
    raise UnsupportedModel(
        f"compressed-tensors {what} is not supported: moehive reads weights of 4 bits in groups, alone and in the "
        f"order of their inputs; {_ELSE}"
    )


# --- AWQ and GPTQ -------------------------------------------------------------------------------------------------


def _awq(settings: Mapping[str, Any]) -> Scheme:
    """AutoAWQ's settings. Which weights are quantised is seen from their tensors."""
    form = str(settings.get("version", settings.get("format", "gemm"))).lower()
    if form != "gemm":
        raise UnsupportedModel(f"AWQ in the version {form!r} is not supported: moehive reads gemm; {_ELSE}")
    if not settings.get("zero_point", True):
        raise UnsupportedModel(f"AWQ without zero points is not supported; {_ELSE}")
    return Scheme(Quantization(QuantMethod.INT4_AWQ, _group(settings, "AWQ")))


def _gptq(settings: Mapping[str, Any]) -> Scheme:
    """AutoGPTQ's and GPTQModel's settings. Which weights are quantised is seen from their tensors."""
    form = str(settings.get("checkpoint_format", settings.get("format", "gptq")))
    methods = {"gptq": QuantMethod.INT4_GPTQ, "gptq_v2": QuantMethod.INT4_GPTQ_V2}
    if form not in methods:
        raise UnsupportedModel(f"GPTQ in the format {form!r} is not supported: moehive reads gptq, gptq_v2; {_ELSE}")
    if settings.get("desc_act"):
        raise UnsupportedModel(f"GPTQ with desc_act (inputs ordered by activation) is not supported; {_ELSE}")
    return Scheme(Quantization(methods[form], _group(settings, "GPTQ")))


def _group(settings: Mapping[str, Any], what: str) -> tuple[int, int]:
    """The block of 4-bit weights."""
    bits, width = settings.get("bits", 4), settings.get("group_size", 128)
    if bits != 4:
        raise UnsupportedModel(f"{what} of {bits!r} bits is not supported: moehive reads 4; {_ELSE}")
    if width == -1:
        raise UnsupportedModel(f"{what} with one scale for a whole row (group_size -1) is not supported; {_ELSE}")
    if type(width) is not int or width < 1:
        raise CheckpointError(f"config.json: group_size is {width!r}, a positive integer is expected")
    return 1, width
