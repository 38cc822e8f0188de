"""Recording a routing trace: a model's experts modules are listened to while it generates.

Works for any model whose routed experts transformers knows as such, loaded from its checkpoint or from a converted
directory; nothing about the computation changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moehive.protocol.errors import TraceError, UnsupportedModel
from moehive.swarm.model.seats import routed_modules

from .routing import HiddenSamples, RoutingTrace

_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")


class Recorder:
    """What was heard. Not thread-safe: one generation at a time.

    `samples` is for how many tokens hidden states are kept as well (the first ones; they take 4 L H bytes each).
    """

    def __init__(self, model: nn.Module, *, samples: int = 0) -> None:
        self._modules: Mapping[int, nn.Module] = dict(sorted(routed_modules(model).items()))
        if not self._modules:
            raise UnsupportedModel(f"{type(model).__name__} has no routed experts that could be recorded")
        self._blocks = {
            int(match[1]): module
            for name, module in model.named_modules()
            if (match := _DECODER_LAYER.search(name)) is not None and int(match[1]) in self._modules
        }
        self._samples = samples
        self._new_session = True
        self._starts: list[bool] = []
        self._experts: dict[int, list[NDArray[np.uint16]]] = {layer: [] for layer in self._modules}
        self._inputs: dict[int, list[NDArray[np.float16]]] = {layer: [] for layer in self._modules}
        self._residuals: dict[int, list[NDArray[np.float16]]] = {layer: [] for layer in self._modules}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record every call of the model in this context."""
        with ExitStack() as hooks:
            for layer, module in self._modules.items():
                hook = self._experts_hook(layer)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for layer, block in self._blocks.items() if self._samples else ():
                hook = self._block_hook(layer)
                hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def start_session(self) -> None:
        """What comes next has nothing to do with what came before: another prompt."""
        self._new_session = True

    def trace(self, model: str) -> RoutingTrace:
        """What was heard so far. Raises TraceError where not every layer computed the same calls."""
        calls = {layer: [len(chosen) for chosen in heard] for layer, heard in self._experts.items()}
        first = next(iter(calls.values()))
        if not first or any(tokens != first for tokens in calls.values()):
            raise TraceError(
                "the layers did not all compute the same tokens: is the generation over, or was there none?"
            )
        by_layer = [np.concatenate(heard) for heard in self._experts.values()]  # L of [N, K]
        return RoutingTrace(
            model=model,
            layers=tuple(self._experts),
            num_experts=int(self._modules[next(iter(self._modules))].num_experts),  # type: ignore[arg-type]
            tokens=np.array(first, dtype=np.int32),
            starts=np.array(self._starts, dtype=np.bool_),
            experts=np.stack(by_layer, axis=1),
            samples=self._hidden() if self._samples else None,
        )

    def _experts_hook(self, layer: int) -> Any:
        first = layer == next(iter(self._modules))

        def heard(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if first:
                self._starts.append(self._new_session)
                self._new_session = False
            chosen = _argument(arguments, named, 1, "top_k_index")  # [T, K]
            self._experts[layer].append(chosen.detach().to("cpu").numpy().astype(np.uint16))
            self._keep(self._inputs[layer], _argument(arguments, named, 0, "hidden_states"))

        return heard

    def _block_hook(self, layer: int) -> Any:
        def heard(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = _argument(arguments, named, 0, "hidden_states").float()
            self._keep(self._residuals[layer], hidden * hidden.square().mean(-1, keepdim=True).add(1e-12).rsqrt())

        return heard

    def _keep(self, kept: list[NDArray[np.float16]], hidden: Tensor) -> None:
        """As many rows of `hidden` [..., H] as are still wanted."""
        left = self._samples - sum(len(rows) for rows in kept)
        if left > 0:
            rows = hidden.detach().reshape(-1, hidden.shape[-1])[:left]
            kept.append(rows.to("cpu", torch.float16).numpy())

    def _hidden(self) -> HiddenSamples:
        inputs, residuals = (
            np.stack([np.concatenate(kept) for kept in heard.values()], axis=1)  # [M, L, H]
            for heard in (self._inputs, self._residuals)
        )
        return HiddenSamples(np.arange(len(inputs), dtype=np.int64), inputs, residuals)


def _argument(arguments: tuple[Any, ...], named: dict[str, Any], position: int, name: str) -> Tensor:
    found: Tensor = arguments[position] if position < len(arguments) else named[name]
    return found
