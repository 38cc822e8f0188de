"""Tiny random checkpoints of every supported family, as they lie on the Hugging Face hub: names, dtypes, extra files.

Importing this module costs nothing; torch and transformers are imported by the functions. Every checkpoint is seeded
(the same call writes the same tensors), small (under 3 MiB), and not degenerate: routers, biases, attention sinks and
block scales all differ from their initial values, so that a swapped expert or a dropped bias changes the logits.

    save_checkpoint("qwen3_moe", tmp_path / "src")                      # one model.safetensors
    save_checkpoint("qwen3_moe", tmp_path / "src", max_shard_size="64KB")   # several files and an index
    save_bf16_twin(tmp_path / "src", tmp_path / "twin")                 # an FP8 checkpoint, dequantised
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any

from support import int4
from support.family_configs import COMMON, CONFIGS, EXTRA_CONFIGS

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]

FP8_BLOCK = (128, 128)
_FP8_MAX = 448.0  # largest float8_e4m3fn

FAMILIES: tuple[str, ...] = tuple(CONFIGS)
EXTRA_FAMILIES: tuple[str, ...] = tuple(EXTRA_CONFIGS)
INT4: tuple[str, ...] = ("kimi_k2_int4", "qwen3_moe_int4", "qwen3_moe_awq", "mixtral_gptq")
QUANTIZED: tuple[str, ...] = ("gpt_oss_mxfp4", "deepseek_v3_fp8", *INT4)  # FP8 keeps bf16 for all that is not FP8
DISTINCT: tuple[str, ...] = tuple(name for name in FAMILIES if name not in INT4)  # before they are quantised
PLAIN: tuple[str, ...] = tuple(name for name in FAMILIES if name not in QUANTIZED)

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def build_config(name: str, **overrides: Any) -> Any:
    """The transformers configuration of a family; `overrides` replace its arguments."""
    import transformers

    kind, arguments = {**CONFIGS, **EXTRA_CONFIGS}[name]
    config = getattr(transformers, kind)(**{**COMMON, **arguments, **overrides})
    config.initializer_range = 0.2  # at the default 0.02 every token gets nearly the same logits
    return config


def build_model(name: str, dtype: torch.dtype | str = "bfloat16", *, seed: int = 0, **overrides: Any) -> Any:
    """A seeded random model of a family, in evaluation mode. Quantised families come unquantised."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(build_config(name, **overrides)).to(_torch_dtype(dtype)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            scale = _noise_scale(key)
            if scale and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return model


def save_checkpoint(
    name: str,
    directory: Path,
    dtype: torch.dtype | str = "bfloat16",
    *,
    seed: int = 0,
    max_shard_size: str | int = "1GB",
    tokenizer: bool = True,
    mtp: bool = False,
    **overrides: Any,
) -> Path:
    """Write one family's tiny checkpoint to `directory` (created) in the hub's form, and return it.

    `max_shard_size` below the model's size ("64KB", or bytes) gives several safetensors files and an index. `dtype` is
    that of the floating tensors; for `deepseek_v3_fp8` it is bf16 whatever is asked. `mtp` appends a
    multi-token-prediction layer as DeepSeek and GLM publish it. `overrides` replace configuration arguments.
    """
    dtype = "bfloat16" if name == "deepseek_v3_fp8" else dtype
    model = build_model(name, dtype, seed=seed, **overrides)
    directory.mkdir(parents=True, exist_ok=True)
    quantize = _QUANTIZE.get(name)
    model.save_pretrained(directory, max_shard_size="1GB" if quantize or mtp else max_shard_size)
    if quantize or mtp:
        tensors = load_tensors(directory)
        if mtp:
            tensors.update(_mtp_layer(tensors, model.config.num_hidden_layers))
            edit_config(directory, num_nextn_predict_layers=1)
        write_tensors(directory, quantize(tensors, seed) if quantize else tensors, max_shard_size)
    if name in _FINISH:
        _FINISH[name](directory)
    if tokenizer:
        save_tokenizer(directory)
        if name.startswith("kimi_k2"):
            _finish_kimi_tokenizer(directory)
    return directory


def save_bf16_twin(source: Path, destination: Path) -> Path:
    """Write what an FP8 checkpoint means in bf16: each weight times its block's scale, rounded once."""
    import torch

    tensors = load_tensors(source)
    plain: Tensors = {}
    for key, tensor in tensors.items():
        if key.endswith("_scale_inv"):
            continue
        scale = tensors.get(f"{key}_scale_inv")
        plain[key] = (
            tensor if scale is None else (tensor.float() * spread_scale(scale, tensor.shape)).to(torch.bfloat16)
        )
    destination.mkdir(parents=True, exist_ok=True)
    write_tensors(destination, plain)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            (destination / file.name).write_bytes(file.read_bytes())
    edit_config(destination, quantization_config=None)
    return destination


def spread_scale(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int] = FP8_BLOCK) -> torch.Tensor:
    """Block scales [ceil(R/b0), ceil(C/b1)] as one factor per weight [R, C]; the last block of a side may be cut."""
    rows, columns = shape
    return scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def save_int4_twin(source: Path, destination: Path) -> Path:
    """Write what an INT4 checkpoint means, its experts in fp32, for transformers' native class."""
    copytree(source, destination)
    write_tensors(destination, int4.exact(load_tensors(source)))
    edit_config(destination, quantization_config=None, auto_map=None)
    if json.loads((destination / "config.json").read_text())["model_type"] == "kimi_k2":
        edit_config(destination, model_type="deepseek_v3")
    return destination


# --- files --------------------------------------------------------------------------------------------------------


def load_tensors(directory: Path) -> Tensors:
    """Every tensor of a checkpoint, by its name on disk, read with the safetensors library."""
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def write_tensors(directory: Path, tensors: Mapping[str, torch.Tensor], max_shard_size: str | int = "1GB") -> None:
    """Replace the checkpoint's safetensors files, split as the hub's are, with an index where there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    for stale in (*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")):
        stale.unlink()
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in names}, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def edit_config(directory: Path, **values: Any) -> None:
    """Set keys of config.json; a value of None removes the key."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in values or value is not None}))


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: every text has one encoding, ids below VOCAB_SIZE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*specials, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    pad, bos, eos = specials
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


# --- what the hub's checkpoints have and transformers does not write -----------------------------------------------


def _to_fp8(tensors: Tensors, seed: int) -> Tensors:
    """Linear weights as float8_e4m3fn with a scale per block, experts and dense part alike (DeepSeek-V3)."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        is_linear = key.endswith("_proj.weight") or "kv_a_proj_with_mqa" in key
        if is_linear:
            out[key], out[f"{key}_scale_inv"] = _fp8_blocks(tensor)
        else:
            out[key] = tensor
    return out


def _fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    rows, columns = weight.shape
    grid = (-(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1]))
    padded = torch.zeros(grid[0] * FP8_BLOCK[0], grid[1] * FP8_BLOCK[1])
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(grid[0], FP8_BLOCK[0], grid[1], FP8_BLOCK[1])
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / _FP8_MAX  # [rows/128, columns/128]
    quantized = (blocks / scale[:, None, :, None]).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return quantized.view(padded.shape)[:rows, :columns].contiguous(), scale


def _to_mxfp4(tensors: Tensors, seed: int) -> Tensors:
    """GPT-OSS's fused experts as random 4-bit blocks: [E, in, out] becomes blocks [E, out, in/32, 16] and scales."""
    import torch

    generator = torch.Generator().manual_seed(seed + 2)
    out: Tensors = {}
    for key, tensor in tensors.items():
        if not key.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            out[key] = tensor
            continue
        experts, rows, columns = tensor.shape
        groups = (experts, columns, rows // 32)
        out[f"{key}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8, generator=generator)
        out[f"{key}_scales"] = torch.randint(121, 125, groups, dtype=torch.uint8, generator=generator)
    return out


def _to_int4(tensors: Tensors, seed: int) -> Tensors:
    return int4.pack_experts(tensors)


def _to_awq(tensors: Tensors, seed: int) -> Tensors:
    return int4.pack_turned(tensors, int4.awq)


def _to_gptq(tensors: Tensors, seed: int) -> Tensors:
    return int4.pack_turned(tensors, int4.gptq)


def _mtp_layer(tensors: Tensors, layers: int) -> Tensors:
    """A multi-token-prediction layer: the last decoder layer's tensors under the next number, and its own."""
    last, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    extra = {key.replace(last, new): value.flip(0) for key, value in tensors.items() if last in key}
    norm, embedding = tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
    own = {
        "enorm.weight": norm,
        "hnorm.weight": norm,
        "shared_head.norm.weight": norm,
        "eh_proj.weight": embedding[: norm.shape[0]].repeat(1, 2),
        "embed_tokens.weight": embedding,
        "shared_head.head.weight": embedding,
    }
    return extra | {new + key: value.clone() for key, value in own.items()}


def _finish_fp8(directory: Path) -> None:
    edit_config(
        directory,
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(FP8_BLOCK),
        },
    )


def _finish_mxfp4(directory: Path) -> None:
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(directory, quantization_config={"modules_to_not_convert": skipped, "quant_method": "mxfp4"})
    (directory / "original").mkdir()  # the hub's second copy of the weights: not named in any index, never to be read
    (directory / "original" / "model.safetensors").write_bytes(b"not a safetensors file")


_TRAP = "raise RuntimeError('remote code of a checkpoint was executed')\n"


def _finish_kimi(directory: Path) -> None:
    """Remote code that must neither run nor travel."""
    remote = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    remote |= {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    edit_config(directory, model_type="kimi_k2", architectures=["DeepseekV3ForCausalLM"], auto_map=remote)
    for module in ("configuration_deepseek.py", "modeling_deepseek.py", "tokenization_kimi.py"):
        (directory / module).write_text(_TRAP)


def _finish_kimi_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    settings["tokenizer_class"] = "TikTokenTokenizer"
    path.write_text(json.dumps(settings))


def _finish_int4(directory: Path) -> None:
    edit_config(directory, quantization_config=int4.CONFIG)


def _finish_awq(directory: Path) -> None:
    edit_config(directory, quantization_config=int4.AWQ_CONFIG)


def _finish_gptq(directory: Path) -> None:
    edit_config(directory, quantization_config=int4.GPTQ_CONFIG)


def _finish_kimi_int4(directory: Path) -> None:
    _finish_kimi(directory)
    _finish_int4(directory)


_QUANTIZE: dict[str, Callable[[Tensors, int], Tensors]] = {
    "deepseek_v3_fp8": _to_fp8,
    "gpt_oss_mxfp4": _to_mxfp4,
    "kimi_k2_int4": _to_int4,
    "qwen3_moe_int4": _to_int4,
    "qwen3_moe_awq": _to_awq,
    "mixtral_gptq": _to_gptq,
}
_FINISH: dict[str, Callable[[Path], None]] = {
    "deepseek_v3_fp8": _finish_fp8,
    "gpt_oss_mxfp4": _finish_mxfp4,
    "kimi_k2": _finish_kimi,
    "kimi_k2_int4": _finish_kimi_int4,
    "qwen3_moe_int4": _finish_int4,
    "qwen3_moe_awq": _finish_awq,
    "mixtral_gptq": _finish_gptq,
}


def _noise_scale(key: str) -> float:
    """Standard deviation of the noise that replaces a tensor; 0 leaves it as initialised."""
    if key.endswith(("router.weight", "gate.weight")):
        return 0.3
    return 0.1 if key.endswith("bias") or "sinks" in key else 0.0


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    import torch

    found = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert isinstance(found, torch.dtype)
    return found
