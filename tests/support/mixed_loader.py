"""A checkpoint of two forms: FP8 of which every third expert, and all of the last layer, were left in bf16."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch

from moehive.kernels.expert_ffn import ExpertWeights
from moehive.kernels.formats import ExpertMatrices
from moehive.protocol.ids import ExpertKey
from moehive.swarm.model.loader import ExpertLoader, StoredExpert


class MixedLoader(ExpertLoader):
    """Of a directory in FP8: what is said to be in bf16 is widened as it is read."""

    def is_plain(self, key: ExpertKey) -> bool:
        return key.expert % 3 == 0 or key.layer == self.manifest.model.moe_layers[-1]

    def is_view(self, key: ExpertKey, dtype: torch.dtype) -> bool:
        return self.is_plain(key) and dtype == torch.bfloat16

    def stored_room(self, key: ExpertKey) -> int:
        return self.widened_room(torch.bfloat16) if self.is_plain(key) else super().stored_room(key)

    def read(self, key: ExpertKey) -> StoredExpert:
        tensors = super().read(key)
        return self._named(super().widen(key, tensors, torch.bfloat16)) if self.is_plain(key) else tensors

    @cached_property
    def forms(self) -> Mapping[ExpertKey, ExpertMatrices]:
        model, stored = self.manifest.model, super().forms
        shapes = (2 * model.intermediate_size, model.hidden_size), (model.hidden_size, model.intermediate_size)
        blank = ExpertWeights(*(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes))
        plain = self.matrices(next(iter(stored)), self._named(blank))
        return {key: plain if self.is_plain(key) else form for key, form in stored.items()}

    def _named(self, weights: ExpertWeights) -> StoredExpert:
        gate, up = weights.gate_up.chunk(2)
        return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": weights.down}
