"""From stored tensors to computable weights: equal values, and no copy that is not needed."""

import pytest
import torch
from torch import Tensor

from moehive.kernels.canonical import canonical_weights, stored_matrices
from moehive.kernels.dequantize import dequantize
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec
from moehive.kernels.packings import fp8_block_matrix, mxfp4_matrix

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
        dequantize(fp8_block_matrix(tensors[f"{n}.weight"], scales[f"{n}.weight_scale_inv"], (12, 12)), BF16)
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
    with pytest.raises(ValueError, match=r"not \[2I, H\] and"):  # 32 inputs of down where gate_up gives 16
        canonical_weights(tensors, spec, BF16)
    rows = 64
    tensors["gate_up_proj_blocks"] = torch.zeros(rows, 1, 16, dtype=torch.uint8)
    tensors["gate_up_proj_scales"] = torch.full((rows, 1), 127, dtype=torch.uint8)
    tensors["gate_up_proj_bias"] = torch.cat((tensors["gate_up_proj_bias"],) * 2)
    weights = canonical_weights(tensors, spec, BF16)
    matrix = mxfp4_matrix(tensors["down_proj_blocks"], tensors["down_proj_scales"])
    assert torch.equal(weights.down, dequantize(matrix, BF16).t())
    assert weights.down.is_contiguous()
    assert weights.down_bias is not None
    assert torch.equal(weights.down_bias, tensors["down_proj_bias"])
    assert tensors["down_proj_bias"].untyped_storage().data_ptr() not in addresses(weights)


@pytest.mark.parametrize(
    ("change", "spec", "message"),
    [
        ({"up_proj.weight": None}, PLAIN, "'up_proj.weight' is missing"),
        ({"extra.weight": torch.zeros(1)}, PLAIN, r"unknown tensors in an expert: \['extra.weight'\]"),
        ({"gate_proj.bias": torch.zeros(INNER)}, PLAIN, "have a bias and some do not"),
        ({"down_proj.weight": torch.zeros(HIDDEN, INNER + 1)}, PLAIN, r"not \[2I, H\] and"),
        ({"up_proj.weight": torch.zeros(INNER, HIDDEN + 1)}, PLAIN, "not two matrices of one shape"),
        ({"down_proj.weight": torch.zeros(HIDDEN)}, PLAIN, "are not matrices of floating point"),
        ({}, TRANSPOSED, "the model's experts are transposed"),
    ],
)
def test_tensors_that_make_no_expert_are_refused(change: dict[str, Tensor | None], spec: FfnSpec, message: str) -> None:
    tensors = {name: t for name, t in (projections() | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        canonical_weights(tensors, spec, BF16)


# --- kept as they are stored ------------------------------------------------------------------------------------------


def fp8_expert(inner: int, block: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in {"gate_proj": (inner, HIDDEN), "up_proj": (inner, HIDDEN), "down_proj": (HIDDEN, inner)}.items():
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        grid = [-(-side // step) for side, step in zip(shape, block, strict=True)]
        tensors[f"{name}.weight_scale_inv"] = torch.rand(grid, generator=generator) + 0.5
    return tensors


def int4_expert(group: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
        words = torch.randint(-(2**31), 2**31, (shape[0], shape[1] // 8), generator=generator)
        tensors[f"{name}.weight_packed"] = words.to(torch.int32)
        tensors[f"{name}.weight_scale"] = torch.rand(shape[0], shape[1] // group, generator=generator).to(BF16)
        tensors[f"{name}.weight_shape"] = torch.tensor(shape)
    return tensors


def mxfp4_expert() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = one_buffer({"gate_up_proj_bias": (64,), "down_proj_bias": (HIDDEN,)})
    for name, (rows, columns) in {"gate_up_proj": (64, HIDDEN), "down_proj": (HIDDEN, 32)}.items():
        size = (rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(120, 130, size, dtype=torch.uint8, generator=generator)
    return tensors


@pytest.mark.parametrize(
    ("tensors", "spec", "block"),
    [
        pytest.param(projections(), PLAIN, None, id="plain"),
        pytest.param(one_buffer(FUSED), TRANSPOSED, None, id="transposed"),
        pytest.param(fp8_expert(24, (8, 8)), PLAIN, (8, 8), id="fp8"),
        pytest.param(fp8_expert(20, (8, 16)), PLAIN, (8, 16), id="fp8, gate ends within a block"),
        pytest.param(int4_expert(8), PLAIN, (1, 8), id="int4"),
        pytest.param(mxfp4_expert(), TRANSPOSED, None, id="mxfp4"),
    ],
)
def test_a_stored_expert_has_the_values_of_the_widened_one(
    tensors: dict[str, Tensor], spec: FfnSpec, block: tuple[int, int] | None
) -> None:
    stored = stored_matrices(tensors, spec, block=block)
    wide = canonical_weights(tensors, spec, F32, block=block).matrices(spec)
    assert torch.equal(dequantize(stored.gate_up, F32), wide.gate_up.data)
    assert torch.equal(dequantize(stored.down, F32), wide.down.data)
    for kept, widened in ((stored.gate_up_bias, wide.gate_up_bias), (stored.down_bias, wide.down_bias)):
        assert (kept is None) == (widened is None)
        assert kept is None or torch.equal(kept.float(), widened)


def test_a_stored_expert_is_made_of_views() -> None:
    tensors = projections()
    stored = stored_matrices(tensors, PLAIN)
    assert stored.gate_up.data.data_ptr() == tensors["gate_proj.weight"].data_ptr()
    assert stored.down.data.data_ptr() == tensors["down_proj.weight"].data_ptr()
    quantised = mxfp4_expert()
    assert stored_matrices(quantised, TRANSPOSED).down.data.data_ptr() == quantised["down_proj_blocks"].data_ptr()


def test_a_stored_expert_takes_the_bytes_of_the_checkpoint() -> None:
    tensors = int4_expert(8)
    shapes = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("shape"))
    assert stored_matrices(tensors, PLAIN, block=(1, 8)).nbytes == sum(t.nbytes for t in tensors.values()) - shapes


def test_4_bit_tensors_that_do_not_fit_are_refused() -> None:
    tensors = int4_expert(8)
    with pytest.raises(ValueError, match="block size was not given"):
        stored_matrices(tensors, PLAIN)
    with pytest.raises(ValueError, match="need scales"):
        stored_matrices(tensors, PLAIN, block=(1, 16))
    tensors["gate_proj.weight_shape"] = torch.tensor([INNER + 1, HIDDEN])
    with pytest.raises(ValueError, match=r"of a weight \[17, 32\]"):
        stored_matrices(tensors, PLAIN, block=(1, 8))


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("shape", torch.tensor(16), "not two integers"),
        ("shape", torch.tensor([16]), "not two integers"),
        ("shape", torch.tensor([16.0, 32.0]), "not two integers"),
        ("packed", torch.tensor(0, dtype=torch.int32), r"weight_packed \(\) of a weight"),
    ],
)
def test_parts_of_a_4_bit_weight_that_are_no_such_parts_are_refused(kind: str, part: Tensor, message: str) -> None:
    tensors = int4_expert(8) | {f"up_proj.weight_{kind}": part}
    with pytest.raises(ValueError, match=message):
        stored_matrices(tensors, PLAIN, block=(1, 8))
