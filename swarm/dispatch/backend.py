"""What transformers calls for each MoE layer of a swarm model: local experts here, the others at their holders."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack

import torch
from torch import Tensor

from moehive.kernels.expert_ffn import ExpertWeights
from moehive.kernels.routing import Assignment, group_by_expert
from moehive.protocol.errors import TransportError

from .caller import ExpertCaller
from .combine import combine_parts
from .request import LayerInput, Part
from .resident import ResidentExperts

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
        resident: ResidentExperts | None = None,
    ) -> None:
        self._caller = caller
        self._start_soon = start_soon
        self._num_experts = num_experts
        self._form = form
        self._resident = resident
        self._last_layer = 0

    def run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, H], top_k_index [T, K], top_k_weights [T, K] -> [T, H].

        Raises ExpertUnavailable; TransportError or ConfigError where the swarm is left meanwhile, or was before.
        """
        try:
            return self._run(layer, hidden, top_k_index, top_k_weights)
        except BaseException as error:
            if self._resident is not None:
                self._resident.abandon(error)
            raise

    def _run(self, layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        call = LayerInput(layer, hidden.detach().to("cpu").contiguous(), top_k_weights.detach().to("cpu"), self._form)
        assignments = group_by_expert(top_k_index.to("cpu"), self._num_experts)
        self._count(layer)
        with ExitStack() as leases:
            here = self._lease(call, assignments, leases)
            away = [assignment for assignment in assignments if assignment.expert not in here]
            answers = self._start_soon(self._caller.run, call, away) if away else None
            parts = self._compute(call, assignments, here)  # while the peers compute theirs
        started = time.monotonic()
        if answers is not None:
            parts += _wait_for(answers)
        if self._resident is not None:
            waited = time.monotonic() - started if away else 0.0
            self._resident.saw(layer, assignments, hidden.shape[0], hidden.dtype, waited)
        if not parts:
            return torch.zeros_like(hidden)
        return combine_parts(call, parts).to(hidden.device)

    def _lease(
        self, call: LayerInput, assignments: Sequence[Assignment], leases: ExitStack
    ) -> dict[int, ExpertWeights]:
        """The weights of the chosen experts that are resident here."""
        if self._resident is None:
            return {}
        self._resident.begin(call.layer, assignments, call.hidden.shape[0], call.hidden.dtype)
        here: dict[int, ExpertWeights] = {}
        for assignment in assignments:  # one by one: what was leased and not entered would never be released
            lease = self._resident.lease(call.layer, assignment.expert, call.hidden.dtype)
            if lease is not None:
                here[assignment.expert] = leases.enter_context(lease)
        return here

    def _compute(
        self, call: LayerInput, assignments: Sequence[Assignment], here: Mapping[int, ExpertWeights]
    ) -> list[Part]:
        parts: list[Part] = []
        for assignment in assignments:
            if assignment.expert in here:
                assert self._resident is not None
                parts.append(self._resident.part(call, assignment, here[assignment.expert]))
                self._caller.stats.local_rows += assignment.token.shape[0]
        return parts

    def _count(self, layer: int) -> None:
        stats = self._caller.stats
        stats.passes += layer <= self._last_layer or not stats.passes
        stats.layer_calls += 1
        self._last_layer = layer


def _wait_for(answers: Future[list[Part]]) -> list[Part]:
    try:
        return answers.result()
    except CancelledError as error:
        raise TransportError("the swarm was left while its peers were asked for experts") from error
