"""Models and experts from a converted directory on this machine.

The public functions of `moehive.swarm` that load something. None of them uses a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moehive.protocol.errors import ConfigError, UnsupportedModel
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import Manifest, ShardEntry, ShardType

from .log import get_logger
from .model.backend import BACKEND, ExpertsBackend, LocalExperts, local_experts
from .model.reading import read_tensors, verify_files
from .model.seats import backend_of, check_active
from .store.directory import ConvertedDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .model.kv.options import KvMode, KvOptions

_log = get_logger(__name__)

# Any of these among the assets means that AutoTokenizer finds a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tiktoken.model", "vocab.json")


def load_expert(source: Path | str, layer: int, expert: int, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """One routed expert's tensors by their names in the checkpoint, verified, from the converted directory `source`.

    `dtype` converts floating-point weights; by default they keep the stored dtype. Quantised weights come as they are
    stored, and a `dtype` for them is refused: the scales would no longer fit.

    Raises ManifestError, StorageError, CorruptShard, and ConfigError for an expert the model does not have.
    """
    directory = ConvertedDirectory(Path(source))
    manifest = directory.manifest
    return converted(read_tensors(directory, manifest, expert_shard(manifest, layer, expert, dtype)), dtype)


def expert_shard(manifest: Manifest, layer: int, expert: int, dtype: torch.dtype | None) -> ShardEntry:
    """The shard of an expert that is to be loaded in `dtype`. Raises ConfigError where that cannot be."""
    shard = manifest.experts.get(ExpertKey(layer, expert))
    if shard is None:
        raise ConfigError(f"{manifest.model.name} has no expert {expert} in layer {layer}")
    if dtype is not None and manifest.model.quantization is not None:
        raise ConfigError(
            f"experts of {manifest.model.name} are stored as {manifest.model.quantization.method}; leave dtype out"
        )
    return shard


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors in `dtype`; None: as they are."""
    return {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}


def open_local(
    directory: Path | str,
    *,
    dtype: torch.dtype | None = None,
    backend: ExpertsBackend | None = None,
    ram: int | None = None,
    device: torch.device | str | None = None,
    vram: int | None = None,
    kv: KvMode | KvOptions = "full",
    prefetch: bool | Path | str = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and the tokenizer of a converted directory; None where it has no tokenizer.

    `dtype` is that of the computation, the checkpoint's own by default. `backend` computes the routed experts; by
    default they are read from `directory`, through a RAM tier of `ram` bytes, by default a part of this machine's
    memory. `device` is where the model computes, by default the processor; experts are then kept in its memory, too, in
    `vram` bytes, by default what is free there, and the processor computes those that do not get there in time.
    `kv` is how `generate` keeps keys and values: see KvOptions; by default as transformers does.
    `prefetch` says whether local experts are loaded before they are needed, where not all of them fit into memory and
    the processor computes; a file that `moehive trace fit` wrote makes for better guesses than the model's own routers.

    Raises ManifestError, StorageError, CorruptShard, UnsupportedModel; ConfigError for a `device` that is not here and
    for `vram` without one; BudgetTooSmall where `ram` or `vram` does not hold what one token needs; TraceError for
    another model's `prefetch` or none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .model.device import accelerator_for, use_device

    accelerator = accelerator_for(device, vram)
    manifest = ConvertedDirectory(Path(directory)).manifest
    # The quantizer verifies all that is loaded, but transformers parses config.json before it asks for a quantizer.
    verify_files(Path(directory), manifest.of_type(ShardType.ASSET))
    chosen = BACKEND.set(partial(local_experts, ram=ram) if backend is None else lambda *_: backend)
    try:
        model = AutoModelForCausalLM.from_pretrained(str(directory), dtype="auto" if dtype is None else dtype)
    finally:
        BACKEND.reset(chosen)
    check_active(model)
    if accelerator is not None:
        use_device(model, accelerator, vram)
    if kv != "full":
        from .model.kv.default import use_kv

        use_kv(model, kv)
    _use_prefetch(model, prefetch)
    return model, AutoTokenizer.from_pretrained(str(directory)) if _has_tokenizer(manifest) else None


def _use_prefetch(model: PreTrainedModel, prefetch: bool | Path | str) -> None:
    local = backend_of(model)
    if prefetch is False or not isinstance(local, LocalExperts):
        return
    from .prefetch.wiring import attach_prefetch

    try:
        attach_prefetch(model, local, predictor=None if prefetch is True else Path(prefetch))
    except UnsupportedModel as error:
        if prefetch is not True:
            raise
        _log.info("there is no prefetch for this model", reason=str(error))


def _has_tokenizer(manifest: Manifest) -> bool:
    return any(shard.file in _TOKENIZER_FILES for shard in manifest.shards)
