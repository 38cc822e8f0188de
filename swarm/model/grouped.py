"""Experts in slots of a GPU, computed together: one launch for all of a layer's that are there."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moehive.kernels.expert_ffn import FfnSpec
from moehive.kernels.formats import ExpertMatrices
from moehive.kernels.gpu.experts import run_experts
from moehive.kernels.gpu.table import ExpertTable, LayerForm

from .device_call import WeightedRows


class GroupedExperts:
    """The experts of one model that are on `device`. Thread-safe, for threads that compute on one stream."""

    def __init__(self, num_experts: int, top_k: int, spec: FfnSpec, device: torch.device) -> None:
        self._num_experts = num_experts
        self._top_k = top_k
        self._spec = spec
        self._device = device
        # By layer and form; beside a table, the slot of each expert in it.
        self._tables: dict[tuple[int, int], tuple[ExpertTable, dict[int, int]]] = {}
        self._lock = threading.Lock()

    def sum(
        self,
        layer: int,
        form: int,
        hidden: Tensor,
        groups: Sequence[WeightedRows],
        slots: Mapping[int, tuple[int, ExpertMatrices]],
    ) -> Tensor:
        """The weighted sum over the experts of `groups`, all of one form, fp32 [T, H], for hidden [T, H] on the device.

        `slots` has a slot's number and its views for each of these experts; they must not be written to before the
        work enqueued here is done. What the table still says of experts that are not among them is not looked at.
        """
        index, weights = choices(groups, hidden.shape[0], self._top_k, self._num_experts)
        index, weights = index.to(self._device), weights.to(self._device)
        with self._lock:
            table, placed = self._table(layer, form)
            for expert, (slot, matrices) in slots.items():
                if placed.get(expert) != slot:
                    table.put(expert, matrices)
                    placed[expert] = slot
            return run_experts(hidden, index, weights, table, self._spec, dtype=torch.float32)

    def _table(self, layer: int, form: int) -> tuple[ExpertTable, dict[int, int]]:
        found = self._tables.get((layer, form))
        if found is None:
            with torch.inference_mode(False):  # calls outside that mode change it, too
                found = self._tables[layer, form] = ExpertTable(self._num_experts, self._device), {}
        return found


def reads(form: ExpertMatrices) -> bool:
    """Whether the kernels can compute with experts of this form."""
    try:
        LayerForm.of(form)
    except ValueError:
        return False
    return True


def choices(groups: Sequence[WeightedRows], tokens: int, top_k: int, absent: int) -> tuple[Tensor, Tensor]:
    """What each token chose of `groups`: index int64 [T, k] and weights fp32 [T, k]; `absent` fills up.

    k is `top_k`, doubled until all fit, because the kernels are compiled anew for every k.
    """
    token = torch.cat([group.token for group in groups])  # [R]
    counts = torch.tensor([group.token.shape[0] for group in groups])
    expert = torch.tensor([group.expert for group in groups]).repeat_interleave(counts)  # [R]
    weight = torch.cat([group.weight.float() for group in groups])  # [R]
    token, order = torch.sort(token, stable=True)
    chosen = torch.bincount(token, minlength=tokens)  # [T]
    first = chosen.cumsum(0) - chosen  # [T]
    position = torch.arange(token.shape[0]) - first[token]  # [R]
    width, most = top_k, int(chosen.max())
    while width < most:
        width *= 2
    shape = tokens, width
    index, weights = torch.full(shape, absent), torch.zeros(shape)
    index[token, position] = expert[order]
    weights[token, position] = weight[order]
    return index, weights
