"""AWQ and GPTQ turned into compressed-tensors' packing: the same values, in the tensors that `canonical` takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import int4
from torch import Tensor

from moehive.kernels.packings import compressed_tensors_matrix
from moehive.kernels.repacking import TurnedPacking, repacked

AWQ, GPTQ, GPTQ_V2 = TurnedPacking
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))


def numbers(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], zero points and scales [N, K / 32]."""
    generator = torch.Generator().manual_seed(seed)
    grid = rows, columns // int4.GROUP
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    zeros = torch.randint(0, 16, grid, generator=generator)
    return codes, zeros, (torch.rand(grid, generator=generator) + 0.5).half()


def stored(packing: TurnedPacking, codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """As the publishers' tools write it."""
    if packing is AWQ:
        return int4.awq(codes, zeros, scales)
    return int4.gptq(codes, zeros, scales, minus_one=packing is GPTQ)


@given(st.sampled_from(TurnedPacking), SIZES, st.integers(0, 99))
def test_the_tensors_are_those_of_compressed_tensors(packing: TurnedPacking, sizes: tuple[int, int], seed: int) -> None:
    codes, zeros, scales = numbers(8 * sizes[0], 32 * sizes[1], seed)
    parts = {f"up_proj.{kind}": part for kind, part in stored(packing, codes, zeros, scales).items()}
    bias = torch.ones(3)
    found = repacked({**parts, "up_proj.bias": bias}, packing, int4.GROUP)
    assert found.pop("up_proj.bias") is bias
    wanted = {
        "up_proj.weight_packed": int4.pack(codes),
        "up_proj.weight_scale": scales,
        "up_proj.weight_shape": torch.tensor(codes.shape),
        "up_proj.weight_zero_point": int4.pack(zeros.t()).t(),
    }
    assert set(found) == set(wanted)
    for name, part in wanted.items():
        assert found[name].dtype == part.dtype
        assert torch.equal(found[name], part), name
    packed, scale, zero = (found[f"up_proj.weight_{kind}"] for kind in ("packed", "scale", "zero_point"))
    compressed_tensors_matrix(packed, scale, codes.shape[1], int4.GROUP, zero)


def test_a_wide_awq_matrix_is_turned_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moehive.kernels.packings._BAND", 32 * 2)  # two words of columns at a time
    codes, zeros, scales = numbers(40, 32, 1)
    found = repacked({f"w1.{kind}": part for kind, part in int4.awq(codes, zeros, scales).items()}, AWQ, 32)
    assert torch.equal(found["w1.weight_packed"], int4.pack(codes))


def test_gptq_without_group_indices_is_in_order() -> None:
    parts = int4.gptq(*numbers(8, 64, 0))
    del parts["g_idx"]
    assert "w1.weight_packed" in repacked({f"w1.{kind}": part for kind, part in parts.items()}, GPTQ, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("scales"), "w1 has no scales"),
        (lambda parts: parts.pop("qzeros"), "w1 has no qzeros"),
        (lambda parts: parts.update(g_idx=parts["g_idx"].flip(0)), "desc_act"),
        (lambda parts: parts.update(qweight=parts["qweight"].long()), "int32"),
        (lambda parts: parts.update(scales=parts["scales"].flatten()), "no matrices"),
        (lambda parts: parts.update(qweight=parts["qweight"][:0]), "no matrices"),
        (lambda parts: parts.update(qzeros=parts["qzeros"].flatten()), "int32 matrix"),
        (lambda parts: parts.update(qzeros=parts["qzeros"][:1]), "zeros"),
        (lambda parts: parts.update(g_idx=parts["g_idx"][:-1]), "for 64 inputs"),
        (lambda parts: parts.update({kind: parts[kind][:, :4] for kind in ("qweight", "scales")}), "multiples of 8"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message: str) -> None:
    parts = int4.gptq(*numbers(8, 64, 0))
    change(parts)
    with pytest.raises(ValueError, match=message):
        repacked({f"w1.{kind}": part for kind, part in parts.items()}, GPTQ, 32)


def test_inputs_that_fill_no_words_are_refused() -> None:
    parts = int4.awq(*numbers(8, 32, 0))
    parts["qweight"] = parts["qweight"][:12]
    with pytest.raises(ValueError, match=r"\(8, 12\), whose sides are no multiples of 8"):
        repacked({f"w1.{kind}": part for kind, part in parts.items()}, AWQ, 32)


@pytest.mark.parametrize("group", [1 << 32, 1 << 40, 1 << 62])
def test_a_group_wider_than_any_matrix_is_no_overflow(group: int) -> None:
    parts = int4.gptq(*numbers(8, 32, 0))
    assert "w1.weight_packed" in repacked({f"w1.{kind}": part for kind, part in parts.items()}, GPTQ, group)
