"""Our kernels in a transformers model that keeps its own experts: `optimize(model)`, and back.

Only the computation of the routed experts changes: router, attention, caches and `generate` stay transformers' own, and
so do the parameters, unless they are packed. Nothing here needs a converted directory or a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from moehive.kernels.cpu.experts import run_experts
from moehive.kernels.cpu.packed import PackedExpert, PackedMatrix, can_pack, pack_expert, unpack
from moehive.kernels.expert_ffn import ExpertWeights, FfnSpec
from moehive.kernels.formats import ExpertMatrices
from moehive.kernels.telemetry import LayerLoad, LoadStatistics
from moehive.protocol.errors import UnsupportedModel

from .mathematics import ffn_of
from .seats import experts_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME: Final = "moehive_kernels"  # of the experts implementation
_STATE: Final = "moehive_kernels_state"  # the attribute of an experts module
_WEIGHTS: Final = ("gate_up_proj", "down_proj")
_BIASES: Final = ("gate_up_proj_bias", "down_proj_bias")

Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, top_k_index, top_k_weights -> [T, H]


def optimize(model: PreTrainedModel, *, pack: bool = False) -> Optimized:
    """Let our kernels compute the routed experts of a transformers Mixture-of-Experts model, in place.

    On CUDA the Triton kernels, elsewhere torch. The results agree with transformers' own within rounding. With
    gradients enabled for anything that takes part, transformers' own eager code runs.

    `pack` (bf16 on a processor with instructions for it) moves the experts' weights into the layout that products read
    fastest: layers of experts take 1.1 to 1.8 times less time (docs/benchmarks.md). The parameters are then empty (on
    the "meta" device) until `restore`: no saving, no gradients. It takes one layer's weights of additional memory while
    it works.

    Returns what undoes it. Raises UnsupportedModel for a model without experts of its own or with mathematics that the
    kernels do not compute, and where packing is not possible; the model is then unchanged.
    """
    modules = experts_modules(model)
    if not modules:
        raise UnsupportedModel(f"{type(model).__name__} has no experts of its own that others may compute")
    if any(hasattr(module, _STATE) for module in modules.values()):
        raise UnsupportedModel("this model is optimised already: restore it first")
    specs = {layer: ffn_of(module) for layer, module in modules.items()}
    if pack:
        _check_packable(modules)
    states = {layer: _Kernels(module, specs[layer]) for layer, module in modules.items()}
    optimized = Optimized(model, states)
    for state in states.values():
        if pack:
            state.pack()
    return optimized


class Optimized:
    """What `optimize` did to a model. As a context manager it restores the model at its end."""

    def __init__(self, model: PreTrainedModel, layers: Mapping[int, _Kernels]) -> None:
        self._model = model
        self._layers = layers
        self._before = model.config._experts_implementation
        for state in layers.values():
            setattr(state.module, _STATE, state)
        model.set_experts_implementation(NAME)

    def statistics(self) -> dict[int, LoadStatistics]:
        """How evenly each layer's experts were chosen since `optimize`, by layer, ascending."""
        return {layer: self._layers[layer].load.statistics() for layer in sorted(self._layers)}

    def restore(self) -> None:
        """Give the model back what it had: its implementation, and its parameters where they were packed."""
        for state in self._layers.values():
            if getattr(state.module, _STATE, None) is state:
                state.unpack()
                delattr(state.module, _STATE)
        if self._model.config._experts_implementation == NAME:
            self._model.set_experts_implementation(self._before)

    def __enter__(self) -> Optimized:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what is computed depends on where the rows go
def run_kernels(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation: hidden [T, H], top_k_index and top_k_weights [T, K] to [T, H]."""
    state: _Kernels = getattr(module, _STATE)
    return state.run(hidden, top_k_index, top_k_weights)


ExpertsInterface.register(NAME, run_kernels)


class _Kernels:
    """What stands on an experts module."""

    def __init__(self, module: nn.Module, spec: FfnSpec) -> None:
        self.module = module
        self.load = LayerLoad(int(module.num_experts))  # type: ignore[arg-type]
        self._spec = spec
        self._run: Run | None = None
        self._made_for: object = None
        self._packed: list[PackedExpert] | None = None
        self._guard: Any = None

    def run(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self._wants_gradients(hidden, top_k_weights):
            if self._packed is not None:
                raise RuntimeError("packed experts have no gradients: call the model in torch.no_grad(), or restore it")
            eager: Tensor = type(self.module).forward.__wrapped__(self.module, hidden, top_k_index, top_k_weights)  # type: ignore[attr-defined]
            return eager
        weights = [getattr(self.module, name) for name in _WEIGHTS]
        made_for = [(weight.data_ptr(), weight.dtype, weight.device) for weight in weights]
        if self._run is None or made_for != self._made_for:  # the model was moved or converted
            self._run, self._made_for = self._make(hidden.device), made_for
        return self._run(hidden, top_k_index, top_k_weights)

    def pack(self) -> None:
        """Move the weights out of the parameters."""
        self._packed = [pack_expert(expert) for expert in self._experts()]
        self._run = None
        for name in _WEIGHTS:
            self._replace(name, torch.empty_like(getattr(self.module, name), device="meta"))
        self._guard = self.module.register_state_dict_pre_hook(_refuse_state_dict)  # type: ignore[no-untyped-call]

    def unpack(self) -> None:
        """Move them back."""
        if self._packed is None:
            return
        self._guard.remove()
        for name, half in zip(_WEIGHTS, ("gate_up", "down"), strict=True):
            weight = torch.empty_like(getattr(self.module, name), device="cpu")  # [E, N, K] or [E, K, N]
            for expert, out in zip(self._packed, weight, strict=True):
                matrix = getattr(expert, half)
                plain = unpack(matrix) if isinstance(matrix, PackedMatrix) else matrix.data
                out.copy_(plain.t() if self._spec.transposed else plain)
            self._replace(name, weight)
        self._packed = self._run = None

    def _wants_gradients(self, *inputs: Tensor) -> bool:
        tensors = (*inputs, *self.module.parameters(recurse=False))
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def _make(self, device: torch.device) -> Run:
        if device.type == "cuda":
            return _on_gpu(self._experts(), self._spec, self.load, device)
        experts = self._experts() if self._packed is None else self._packed
        load, spec = self.load, self._spec

        def run(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            load.count(top_k_index)
            return run_experts(hidden, top_k_index, top_k_weights, experts, spec)

        return run

    def _experts(self) -> list[ExpertMatrices]:
        """Views of the module's parameters, one expert each."""
        parts = [getattr(self.module, name, None) for name in (*_WEIGHTS, *_BIASES)]
        each = zip(*([None] * self.load.num_experts if part is None else part.detach() for part in parts), strict=True)
        return [ExpertWeights(*tensors).matrices(self._spec) for tensors in each]

    def _replace(self, name: str, weight: Tensor) -> None:
        before = getattr(self.module, name)
        setattr(self.module, name, nn.Parameter(weight, requires_grad=before.requires_grad))


def _on_gpu(experts: list[ExpertMatrices], spec: FfnSpec, load: LayerLoad, device: torch.device) -> Run:
    from moehive.kernels.gpu.experts import run_experts as run_on_gpu  # imports triton
    from moehive.kernels.gpu.table import ExpertTable

    table, usage = ExpertTable.of(experts, device), load.on(device)

    def run(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return run_on_gpu(hidden, top_k_index, top_k_weights, table, spec, usage=usage)

    return run


def _check_packable(modules: Mapping[int, nn.Module]) -> None:
    weights = [getattr(module, name) for module in modules.values() for name in _WEIGHTS]
    if not can_pack():
        raise UnsupportedModel("packing is not possible: oneDNN has no bf16 products on this machine")
    if any(weight.dtype != torch.bfloat16 or weight.device.type != "cpu" for weight in weights):
        raise UnsupportedModel("packing is for experts in bf16 on the processor")


def _refuse_state_dict(*_: object) -> None:
    raise RuntimeError("the experts of this model are packed by moehive's optimize: restore it before saving it")
