"""What a table of experts accepts, and what it holds on to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.random_experts import KINDS, random_expert

pytest.importorskip("triton")
from moehive.kernels.formats import ExpertMatrices, WeightFormat
from moehive.kernels.gpu.table import ExpertTable, LayerForm

CPU = torch.device("cpu")


def expert(name: str = "plain-bfloat16", hidden: int = 64, inner: int = 32, *, bias: bool = False) -> ExpertMatrices:
    return random_expert(KINDS[name], hidden, inner, torch.Generator().manual_seed(0), bias=bias).matrices


def test_addresses_are_those_of_the_parts() -> None:
    one = expert("int4-group-g32-zero", bias=True)
    table = ExpertTable(2, CPU)
    table.put(1, one)
    for found, matrix, bias in ((table.gate_up, one.gate_up, one.gate_up_bias), (table.down, one.down, one.down_bias)):
        parts = (matrix.data, matrix.scale, matrix.zero, bias)
        assert found.tolist() == [[0, part.data_ptr()] for part in parts if part is not None]
    assert table.expert_map is not None
    assert table.expert_map.tolist() == [-1, 1]
    assert list(table) == [None, one]
    assert table.present == 1


def test_it_keeps_what_it_has_and_lets_go_of_what_it_has_not() -> None:
    one = expert()
    gone = weakref.ref(one.gate_up.data)
    table = ExpertTable.of([one, None], CPU)
    del one
    gc.collect()
    assert gone() is not None
    table.remove(0)
    gc.collect()
    assert gone() is None
    table.remove(0)


def test_a_transposed_matrix_is_seen_by_its_strides() -> None:
    form = LayerForm.of(expert("plain-bfloat16-transposed"))
    assert form.gate_up.transposed
    assert (form.gate_up.shape, form.gate_up.stride) == ((64, 64), 64)
    assert not LayerForm.of(expert()).down.transposed


Change = Callable[[ExpertMatrices], ExpertMatrices]


def down_data(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda e: replace(e, down=replace(e.down, data=change(e.down.data)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("plain-bfloat16", down_data(lambda t: t[:, ::2]), "rows or columns must be contiguous"),
        ("plain-bfloat16", down_data(lambda t: torch.empty(t.numel() + 1).bfloat16()[1:].view(t.shape)), "clone"),
        ("plain-bfloat16", down_data(lambda t: t[:, :16]), r"are not \[2I, H\] and \[H, I\]"),
        ("mxfp4", down_data(lambda t: t.t().contiguous().t()), "must not be transposed"),
        ("int4-group-g32", down_data(lambda t: t[:, :14]), "28 columns, not a multiple of 8"),
        ("fp8-block", lambda e: replace(e, down=replace(e.down, block=(128, 48))), "groups of 48 columns"),
        ("int4-group-g32-zero", lambda e: replace(e, gate_up=replace(e.gate_up, zero=e.gate_up.zero.t())), "zero"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused(name: str, change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertTable(1, CPU).put(0, change(expert(name)))


@pytest.mark.parametrize("other", [expert("plain-float16"), expert(inner=48), expert(bias=True), expert("fp8-block")])
def test_one_form_for_all(other: ExpertMatrices) -> None:
    table = ExpertTable.of([expert(), None], CPU)
    with pytest.raises(ValueError, match="expert 1 has the form"):
        table.put(1, other)
    assert other.gate_up.format in WeightFormat
    assert table[1] is None
