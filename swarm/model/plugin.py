"""The transformers plug-in: a quantizer and an experts implementation, both named "moehive".

A converted directory's config.json names them. The quantizer removes the experts' parameters from the meta skeleton
before any weight is read, so that only the dense part is ever allocated; the experts implementation hands each layer's
routed rows to an `ExpertsBackend`. Router, attention, norms, caches and `generate` stay transformers' own.

Without `import moehive.swarm` transformers does not know the quantizer and would go on with random experts. It stops
because config.json also says `experts_implementation: moehive`, which it refuses as unknown before it allocates
anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from moehive.protocol.errors import ManifestError, UnsupportedModel
from moehive.protocol.manifest import Gate, Manifest, ModelFacts, ShardType
from moehive.swarm.memory import default_ram_budget
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tiers.ram import RamTier

from .backend import ExpertsBackend, LocalExperts, spec_of
from .reading import verify_files

NAME: Final = "moehive"
_SEAT = "moehive_seat"  # attribute of an experts module
_WEIGHT = "gate_up_proj"  # a parameter that every supported experts module has
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

logger = logging.get_logger(__name__)


def register() -> None:
    """Make both names known to transformers. A second call does nothing."""
    if NAME in ExpertsInterface._global_mapping:
        return
    register_quantization_config(NAME)(MoehiveConfig)
    register_quantizer(NAME)(MoehiveQuantizer)
    ExpertsInterface.register(NAME, run_experts)


def attach_backend(model: nn.Module, backend: ExpertsBackend) -> None:
    """Let `backend` compute all routed experts of a model loaded through this plug-in; replaces the one it had."""
    seats = [seat for _, seat in _seats(model)]
    if not seats:
        raise UnsupportedModel("this model was not loaded from a converted directory: it keeps its experts itself")
    for seat in seats:
        seat.backend = backend


def check_active(model: nn.Module) -> None:
    """Raise UnsupportedModel unless every experts module of `model` is served by a backend and holds no weight."""
    implementation = getattr(getattr(model, "config", None), "_experts_implementation", None)
    holding = [name for name, module in model.named_modules() if _is_experts(module)]
    if implementation != NAME or holding or not any(True for _ in _seats(model)):
        raise UnsupportedModel(
            f"moehive is not active in this model (experts implementation {implementation!r}, {len(holding)} modules "
            "with expert weights); import moehive.swarm before loading, and load a converted directory"
        )


@dataclass(slots=True)
class Seat:
    """What an experts module knows of the swarm."""

    layer: int
    backend: ExpertsBackend


@torch.compiler.disable  # a backend reads files and talks to peers: a graph that contains it has to break here
def run_experts(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation: hidden [T, H], top_k_index and top_k_weights [T, K] to [T, H]."""
    seat: Seat = getattr(module, _SEAT)
    return seat.backend.run(seat.layer, hidden, top_k_index, top_k_weights)


class MoehiveConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a converted directory. Carries nothing: the facts are in the manifest."""

    def __init__(self, quant_method: str = NAME) -> None:
        self.quant_method = quant_method


class MoehiveQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads the dense part of a converted directory, and no expert."""

    requires_calibration = False
    _directory: ConvertedDirectory

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Verify the files that are about to be loaded; take the experts off the skeleton.

        Raises ManifestError, UnsupportedModel, CorruptShard, StorageError.
        """
        self._directory = ConvertedDirectory(_directory_of(model.config.name_or_path))
        manifest = self._directory.manifest
        _check_files(kwargs.get("checkpoint_files") or [], self._directory)
        model.set_experts_implementation(NAME)  # also over an explicit other one: no other can run without weights
        experts = {_layer_of(name): module for name, module in model.named_modules() if _is_experts(module)}
        if set(experts) != set(manifest.model.moe_layers):
            raise UnsupportedModel(
                f"{manifest.model.architecture} has routed experts in layers {sorted(experts)}, "
                f"the manifest in {sorted(manifest.model.moe_layers)}"
            )
        for module in experts.values():
            _check_mathematics(module, manifest.model)
            _strip(module)
        verify_files(self._directory.root, manifest.skeleton)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Give every experts module a backend over the directory's own files."""
        backend = LocalExperts(self._directory.manifest, self._directory, RamTier(default_ram_budget()))
        for name, module in model.named_modules():
            if getattr(module, _SEAT, False) is None:
                setattr(module, _SEAT, Seat(_layer_of(name), backend))
        check_active(model)
        return model

    def is_serializable(self) -> bool:
        """No: the experts are not in the model. transformers raises ValueError and points to this warning."""
        logger.warning("A moehive model is saved by copying its converted directory; the experts are not in the model.")
        return False

    @property
    def is_trainable(self) -> bool:
        """No: experts are stateless, shared and verified by their hash."""
        return False


# --- experts modules ------------------------------------------------------------------------------------------------


def _is_experts(module: nn.Module) -> bool:
    """Whether transformers' `@use_experts_implementation` decorates the module, and it still holds weights."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed") and _WEIGHT in module._parameters


def _seats(model: nn.Module) -> Iterator[tuple[str, Seat]]:
    for name, module in model.named_modules():
        seat = getattr(module, _SEAT, None)
        if seat is not None:
            yield name, seat


def _strip(module: nn.Module) -> None:
    for name in list(module._parameters):
        del module._parameters[name]
    # Else the initialisation of what is missing from the checkpoint touches module.gate_up_proj.
    module._is_hf_initialized = True  # type: ignore[assignment]
    setattr(module, _SEAT, None)


def _layer_of(name: str) -> int:
    match = _LAYER.search(name)
    if match is None:
        raise UnsupportedModel(f"experts module {name} is not in a numbered layer")
    return int(match[1])


def _check_mathematics(module: Any, model: ModelFacts) -> None:
    """Refuse experts that do not compute what the manifest says: kernels never call the module's own code."""
    ffn, spec = model.ffn, spec_of(model.ffn)
    own_gate = type(module)._apply_gate.__module__ != ExpertsInterface.__module__
    facts = {
        "gated": (getattr(module, "has_gate", True), True),
        "normalised after each expert": (getattr(module, "has_post_expert_norm", False), False),
        "transposed": (module.is_transposed, ffn.transposed),
        "biased": (module.has_bias, ffn.bias),
        "computed with a gate of their own": (own_gate, ffn.gate is not Gate.CONCATENATED),
        "as many": (module.num_experts, model.num_experts),
    }
    if ffn.gate is Gate.CLAMPED_INTERLEAVED:
        facts["gated with alpha, limit"] = ((module.alpha, module.limit), (spec.alpha, spec.limit))
    for fact, (found, wanted) in facts.items():
        if found != wanted:
            raise UnsupportedModel(f"experts of {type(module).__name__}: {fact}: {found}, the manifest says {wanted}")


# --- files ----------------------------------------------------------------------------------------------------------


def _directory_of(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if not path.is_dir():
        raise ManifestError(f"{name_or_path} is not a directory: a converted model is loaded from its local directory")
    return path


def _check_files(checkpoint_files: list[str], directory: ConvertedDirectory) -> None:
    """What transformers is about to read must be what is verified."""
    manifest: Manifest = directory.manifest
    known = {(directory.root / s.file).resolve() for s in manifest.of_type(ShardType.DENSE, ShardType.SHARED)}
    for file in checkpoint_files:
        if Path(file).resolve() not in known:
            raise ManifestError(f"{file} is not a dense or shared shard of the manifest; convert the model again")
