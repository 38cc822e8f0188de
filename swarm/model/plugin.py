"""The transformers plug-in: a quantizer and an experts implementation, both named "moehive".

A converted directory's config.json names them. The quantizer removes the experts' parameters from the meta skeleton
before any weight is read, so that only the dense part is ever allocated; the experts implementation hands each layer's
routed rows to an `ExpertsBackend`. Router, attention, norms, caches and `generate` stay transformers' own.

Importing this module registers both, as plug-ins of transformers do; `import moehive.swarm` sees to it. Without that
import transformers does not know the quantizer and would go on with random experts. It stops because config.json also
says `experts_implementation: moehive`, which it refuses as unknown before it allocates anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from moehive.protocol.errors import ManifestError, UnsupportedModel
from moehive.protocol.manifest import Gate, ModelFacts, ShardType
from moehive.swarm.store.directory import ConvertedDirectory

from .backend import BACKEND
from .loader import spec_of
from .reading import verify_files
from .seats import NAME, SEAT, Seat, attach_backend, check_active, experts_modules, strip

logger = logging.get_logger(__name__)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a backend reads files and talks to peers: a graph that contains it has to break here
def run_experts(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation: hidden [T, H], top_k_index and top_k_weights [T, K] to [T, H]."""
    seat: Seat = getattr(module, SEAT)
    assert seat.backend is not None, "a model is not usable before it is loaded"
    seat.load.count(top_k_index)
    return seat.backend.run(seat.layer, hidden, top_k_index, top_k_weights)


@register_quantization_config(NAME)
class MoehiveConfig(QuantizationConfigMixin):
    """`quantization_config` of a converted directory. Carries nothing: the facts are in the manifest."""

    def __init__(self, quant_method: str = NAME) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # the enum has transformers' own methods only


@register_quantizer(NAME)
class MoehiveQuantizer(HfQuantizer):
    """Loads the dense part of a converted directory, and no expert."""

    requires_calibration = False

    def __init__(self, quantization_config: MoehiveConfig, **kwargs: Any) -> None:
        # The dense part is plain floating point. Called pre-quantised, renamed tensors would keep the stored dtype in
        # transformers 5.8, whatever dtype was asked for.
        super().__init__(quantization_config, **(kwargs | {"pre_quantized": False}))
        self._directory: ConvertedDirectory

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Verify the files that are about to be loaded; take the experts off the skeleton.

        Raises ManifestError, UnsupportedModel, CorruptShard, StorageError.
        """
        self._directory = ConvertedDirectory(_local(model.config.name_or_path))
        facts = self._directory.manifest.model
        _check_named(kwargs.get("checkpoint_files") or [], self._directory)
        model.set_experts_implementation(NAME)  # also over an explicit other one: no other can run without weights
        experts = experts_modules(model)
        if set(experts) != set(facts.moe_layers):
            raise UnsupportedModel(
                f"{type(model).__name__} has routed experts in layers {sorted(experts)}, the manifest in "
                f"{sorted(facts.moe_layers)}"
            )
        for layer, module in experts.items():
            _check_mathematics(module, facts)
            strip(module, layer)
        verify_files(self._directory.root, self._directory.manifest.skeleton)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Give every experts module a backend: over the directory's own files, unless BACKEND says otherwise."""
        attach_backend(model, BACKEND.get()(self._directory.manifest, self._directory, model.dtype))
        check_active(model)
        return model

    def is_serializable(self) -> bool:
        """No: the experts are not in the model. transformers raises ValueError and points to this warning."""
        logger.warning("A moehive model is saved by copying its converted directory: the model has no experts to save.")
        return False

    @property
    def is_trainable(self) -> bool:
        """No: experts are stateless, shared, and named by their hash."""
        return False


ExpertsInterface.register(NAME, run_experts)


def _local(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if not path.is_dir():
        raise ManifestError(f"{name_or_path} is not a directory: a converted model is loaded from its local directory")
    return path


def _check_named(checkpoint_files: list[str], directory: ConvertedDirectory) -> None:
    """What transformers is about to read must be what is verified."""
    shards = directory.manifest.of_type(ShardType.DENSE, ShardType.SHARED)
    known = {(directory.root / shard.file).resolve() for shard in shards}
    for file in checkpoint_files:
        if Path(file).resolve() not in known:
            raise ManifestError(f"{file} is not a dense or shared shard of the manifest; convert the model again")


def _check_mathematics(module: Any, model: ModelFacts) -> None:
    """Refuse experts that do not compute what the manifest says: kernels never call the module's own code."""
    ffn, spec = model.ffn, spec_of(model.ffn)
    own_gate = type(module)._apply_gate.__module__ != ExpertsInterface.__module__
    facts: dict[str, tuple[Any, Any]] = {  # what: (found in the module, said by the manifest)
        "number": (module.num_experts, model.num_experts),
        "gated": (getattr(module, "has_gate", True), True),
        "gate of their own": (own_gate, ffn.gate is not Gate.CONCATENATED),
        "normalised after each expert": (getattr(module, "has_post_expert_norm", False), False),
        "transposed": (module.is_transposed, ffn.transposed),
        "biased": (module.has_bias, ffn.bias),
    }
    if own_gate:
        found_gate = getattr(module, "alpha", None), getattr(module, "limit", None)
        facts["alpha and limit"] = (found_gate, (spec.alpha, spec.limit))
    else:
        facts["activation"] = (type(module.act_fn).__name__, type(ACT2FN[ffn.activation]).__name__)
    for fact, (found, said) in facts.items():
        if found != said:
            raise UnsupportedModel(
                f"experts of {type(module).__name__}, {fact}: {found} in transformers, {said} in the manifest"
            )
