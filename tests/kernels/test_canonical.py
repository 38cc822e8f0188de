"""From stored tensors to computable weights: equal values, and no copy that is not needed."""

import pytest
import torch
from torch import Tensor

from moehive.kernels.canonical import canonical_weights
from moehive.kernels.dequantize import dequantize_fp8_block, dequantize_mxfp4
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec

HIDDEN, INNER = 32, 16
PLAIN, TRANSPOSED = FfnSpec(), FfnSpec(gate="clamped-interleaved", transposed=True, alpha=1.702, limit=7.0)
BF16, F32 = torch.bfloat16, torch.float32


def one_buffer(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = BF16) -> dict[str, Tensor]:
    """Random tensors behind each other in one storage, as in a shard."""
    generator = torch.Generator().manual_seed(0)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    buffer, start, out = torch.randn(total, generator=generator).to(dtype), 0, {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        out[name] = buffer[start : start + count].view(shape)
        start += count
    return out


def projections(order: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, Tensor]:
    down = {"down_proj", "w2"}
    return one_buffer({f"{name}.weight": (HIDDEN, INNER) if name in down else (INNER, HIDDEN) for name in order})


def addresses(weights: ExpertWeights) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in weights.tensors}


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_projections_are_joined(names: tuple[str, str, str], dtype: torch.dtype) -> None:
    tensors = projections(names)
    gate, up, down = (tensors[f"{name}.weight"] for name in names)
    weights = canonical_weights(tensors, PLAIN, dtype)
    assert torch.equal(weights.gate_up, torch.cat((gate, up)).to(dtype))
    assert torch.equal(weights.down, down.to(dtype))
    assert {tensor.dtype for tensor in weights.tensors} == {dtype}


def test_neighbours_of_the_right_dtype_are_not_copied() -> None:
    tensors = projections()
    weights = canonical_weights(tensors, PLAIN, BF16)
    assert weights.gate_up.data_ptr() == tensors["gate_proj.weight"].data_ptr()
    assert weights.down.data_ptr() == tensors["down_proj.weight"].data_ptr()


@pytest.mark.parametrize("order", [("up_proj", "gate_proj", "down_proj"), ("gate_proj", "down_proj", "up_proj")])
def test_others_are_copied_and_leave_the_shard_behind(order: tuple[str, ...]) -> None:
    tensors = projections(order)
    weights = canonical_weights(tensors, PLAIN, BF16)
    assert torch.equal(weights.gate_up, torch.cat((tensors["gate_proj.weight"], tensors["up_proj.weight"])))
    assert tensors["gate_proj.weight"].untyped_storage().data_ptr() not in addresses(weights)


def test_biases_of_projections() -> None:
    tensors = projections() | one_buffer(
        {"gate_proj.bias": (INNER,), "up_proj.bias": (INNER,), "down_proj.bias": (HIDDEN,)}
    )
    weights = canonical_weights(tensors, PLAIN, F32)
    assert weights.gate_up_bias is not None
    assert weights.down_bias is not None
    assert torch.equal(weights.gate_up_bias, torch.cat((tensors["gate_proj.bias"], tensors["up_proj.bias"])).float())
    assert torch.equal(weights.down_bias, tensors["down_proj.bias"].float())


def test_fp8_blocks() -> None:
    plain = projections()
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in plain.items()}
    scales = {
        f"{name}_scale_inv": torch.rand(-(-t.shape[0] // 12), -(-t.shape[1] // 12)) for name, t in tensors.items()
    }
    weights = canonical_weights(tensors | scales, PLAIN, BF16, block=(12, 12))
    gate, up, down = (
        dequantize_fp8_block(tensors[f"{n}.weight"], scales[f"{n}.weight_scale_inv"], (12, 12), BF16)
        for n in ("gate_proj", "up_proj", "down_proj")
    )
    assert torch.equal(weights.gate_up, torch.cat((gate, up)))
    assert torch.equal(weights.down, down)
    with pytest.raises(ValueError, match="block size was not given"):
        canonical_weights(tensors | scales, PLAIN, BF16)


FUSED = {
    "gate_up_proj": (HIDDEN, 2 * INNER),
    "gate_up_proj_bias": (2 * INNER,),
    "down_proj": (INNER, HIDDEN),
    "down_proj_bias": (HIDDEN,),
}


def test_fused_tensors_are_views() -> None:
    tensors = one_buffer(FUSED)
    weights = canonical_weights(tensors, TRANSPOSED, BF16)
    assert [t.data_ptr() for t in weights.tensors] == [
        tensors[name].data_ptr() for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    ]


def test_mxfp4_and_its_small_biases_let_the_shard_go() -> None:
    tensors = one_buffer({"gate_up_proj_bias": (2 * INNER,), "down_proj_bias": (HIDDEN,)})
    generator = torch.Generator().manual_seed(0)
    for name, (rows, columns) in {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, 32)}.items():
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (rows, columns // 32, 16), dtype=torch.uint8, generator=generator
        )
        tensors[f"{name}_scales"] = torch.randint(
            120, 130, (rows, columns // 32), dtype=torch.uint8, generator=generator
        )
    tensors["down_proj_blocks"] = tensors["down_proj_blocks"][:, :1]
    spec = TRANSPOSED
    with pytest.raises(ValueError, match="do not fit each other"):  # 32 inputs of down where gate_up gives 16
        canonical_weights(tensors, spec, BF16)
    rows = 64
    tensors["gate_up_proj_blocks"] = torch.zeros(rows, 1, 16, dtype=torch.uint8)
    tensors["gate_up_proj_scales"] = torch.full((rows, 1), 127, dtype=torch.uint8)
    tensors["gate_up_proj_bias"] = torch.cat((tensors["gate_up_proj_bias"],) * 2)
    weights = canonical_weights(tensors, spec, BF16)
    assert torch.equal(weights.down, dequantize_mxfp4(tensors["down_proj_blocks"], tensors["down_proj_scales"], BF16))
    assert weights.down_bias is not None
    assert torch.equal(weights.down_bias, tensors["down_proj_bias"])
    assert tensors["down_proj_bias"].untyped_storage().data_ptr() not in addresses(weights)


@pytest.mark.parametrize(
    ("change", "spec", "message"),
    [
        ({"up_proj.weight": None}, PLAIN, "'up_proj.weight' is missing"),
        ({"extra.weight": torch.zeros(1)}, PLAIN, r"unknown tensors in an expert: \['extra.weight'\]"),
        ({"gate_proj.bias": torch.zeros(INNER)}, PLAIN, "have a bias and some do not"),
        ({"down_proj.weight": torch.zeros(HIDDEN, INNER + 1)}, PLAIN, "do not fit each other"),
        ({"up_proj.weight": torch.zeros(INNER, HIDDEN + 1)}, PLAIN, "not two matrices of one shape"),
        ({"down_proj.weight": torch.zeros(HIDDEN)}, PLAIN, "are not matrices"),
        ({}, TRANSPOSED, "the model's experts are transposed"),
    ],
)
def test_tensors_that_make_no_expert_are_refused(change: dict[str, Tensor | None], spec: FfnSpec, message: str) -> None:
    tensors = {name: t for name, t in (projections() | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        canonical_weights(tensors, spec, BF16)
