"""What transformers calls for each MoE layer of a swarm model: local experts here, the others at their holders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

import torch
from torch import Tensor

from moehive.kernels.routing import Assignment, group_by_expert

from .caller import ExpertCaller
from .combine import combine_parts
from .request import LayerInput, Part


class LocalRows(Protocol):
    """Computes experts that are on this machine."""

    def holds(self, layer: int, expert: int) -> bool:
        """Whether this expert can be computed here."""

    def rows(self, layer: int, hidden: Tensor, assignment: Assignment) -> Tensor:
        """The unweighted outputs [R, H] of one expert for hidden [T, H]."""


StartSoon = Callable[..., "Future[list[Part]]"]  # start an async function on the event loop of another thread


class SwarmExperts:
    """The experts backend of a model whose experts are in the swarm. Called from any thread but the event loop's."""

    def __init__(
        self,
        caller: ExpertCaller,
        start_soon: StartSoon,
        num_experts: int,
        *,
        form: str,
        local: LocalRows | None = None,
    ) -> None:
        self._caller = caller
        self._start_soon = start_soon
        self._num_experts = num_experts
        self._form = form
        self._local = local
        self._last_layer = 0

    def run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H]. Raises ExpertUnavailable."""
        call = LayerInput(layer, hidden.detach().to("cpu").contiguous(), top_k_weights.detach().to("cpu"), self._form)
        assignments = group_by_expert(top_k_index.to("cpu"), self._num_experts)
        here = [a for a in assignments if self._local is not None and self._local.holds(layer, a.expert)]
        held = {assignment.expert for assignment in here}
        away = [assignment for assignment in assignments if assignment.expert not in held]
        self._count(layer)
        answers = self._start_soon(self._caller.run, call, away) if away else None
        parts = self._compute_here(call, here)  # while the peers compute theirs
        if answers is not None:
            parts += answers.result()
        if not parts:
            return torch.zeros_like(hidden)
        return combine_parts(call, parts).to(hidden.device)

    def _count(self, layer: int) -> None:
        stats = self._caller.stats
        stats.passes += layer <= self._last_layer or not stats.passes
        stats.layer_calls += 1
        self._last_layer = layer

    def _compute_here(self, call: LayerInput, assignments: Sequence[Assignment]) -> list[Part]:
        parts = []
        for assignment in assignments:
            assert self._local is not None
            rows = self._local.rows(call.layer, call.hidden, assignment)  # [R, H]
            self._caller.stats.local_rows += rows.shape[0]
            if call.form == "sum":
                rows = rows * call.top_k_weights[assignment.token, assignment.position, None]  # [R, H]
                parts.append(Part((assignment,), assignment.token, rows))
            else:
                parts.append(Part((assignment,), None, rows))
        return parts
