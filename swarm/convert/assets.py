"""The small files of a converted directory: config.json and tokenizer, rewritten where they would run remote code.

Only names of a fixed list travel: a checkpoint's Python files, images, optimizer states and second copies of its
weights do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moehive.protocol.errors import CheckpointError
from moehive.protocol.manifest import ShardType, is_safe_path

from .families import Family
from .layout import PlannedFile, Span, weight_map
from .source import CONFIG_NAME, INDEX_NAME, read_object

QUANT_METHOD = "moehive"  # the quantizer that the plug-in registers with transformers
_TOKENIZER_CONFIG = "tokenizer_config.json"
_FAST_TOKENIZER = "tokenizer.json"
_NATIVE_TOKENIZER = "PreTrainedTokenizerFast"
_COPIED = (
    "generation_config.json", _FAST_TOKENIZER, "tokenizer.model", "tokenizer.model.v3", "tiktoken.model", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "README.md", "LICENSE", "LICENSE.txt",
    "LICENSE.md", "LICENSE-MODEL", "NOTICE", "NOTICE.txt", "USE_POLICY.md", "USAGE_POLICY",
)  # fmt: skip
_NEEDS_CODE = "the tokenizer needs the checkpoint's own Python code, which is not copied; add a tokenizer.json"
_COPIED_PATTERN = "additional_chat_templates/*.jinja"
SMALL_FILES = (CONFIG_NAME, INDEX_NAME, _TOKENIZER_CONFIG, *_COPIED, _COPIED_PATTERN)  # all that planning reads whole


def plan_assets(
    directory: Path, config: Mapping[str, Any], family: Family, dense: Iterable[PlannedFile]
) -> tuple[list[PlannedFile], list[str]]:
    """The asset files, and notes for the user. Reads small JSON files and file sizes. Raises CheckpointError."""
    notes: list[str] = []
    files = [_written(CONFIG_NAME, native_config(config, family)), _written(INDEX_NAME, index_of(dense))]
    if (directory / _TOKENIZER_CONFIG).exists():
        settings = read_object(directory / _TOKENIZER_CONFIG)
        has_fast = (directory / _FAST_TOKENIZER).exists()
        files.append(_written(_TOKENIZER_CONFIG, native_tokenizer(settings, has_fast=has_fast)))
        if "auto_map" in settings and not has_fast:
            notes.append(
                "the tokenizer needs the checkpoint's own Python code, which is not copied; add a tokenizer.json"
            )
    copied = [directory / name for name in _COPIED] + sorted(directory.glob(_COPIED_PATTERN))
    for path in copied:
        name = path.relative_to(directory).as_posix()
        if path.is_file() and is_safe_path(name):
            files.append(_copied(path, name))
    return sorted(files, key=lambda file: file.file), notes


def native_config(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """config.json as transformers' native class reads it, without remote code, with our quantizer."""
    dropped = ("auto_map", "quantization_config", "compression_config", "custom_pipelines")
    out = {key: value for key, value in config.items() if key not in dropped}
    out["model_type"] = family.native_type or config["model_type"]
    out["architectures"] = [family.architecture]
    out["quantization_config"] = {"quant_method": QUANT_METHOD}
    # Without our plug-in transformers passes over an unknown quantizer to random experts; this name it refuses.
    out["experts_implementation"] = QUANT_METHOD
    return out


def native_tokenizer(settings: Mapping[str, Any], *, has_fast: bool) -> dict[str, Any]:
    """tokenizer_config.json without remote code; with a tokenizer.json the class need not be its own."""
    out = {key: value for key, value in settings.items() if key != "auto_map"}
    if "auto_map" in settings and has_fast:
        out["tokenizer_class"] = _NATIVE_TOKENIZER
    return out


def index_of(dense: Iterable[PlannedFile]) -> dict[str, Any]:
    """model.safetensors.index.json over the skeleton: what `from_pretrained` is to read."""
    loaded = [file for file in dense if file.group is None]
    size = sum(piece.spec.size for file in loaded for piece in file.pieces)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map(loaded).items()))}


def _written(name: str, document: Mapping[str, Any]) -> PlannedFile:
    content = json.dumps(document, indent=2).encode() + b"\n"
    return PlannedFile(name, ShardType.ASSET, len(content), content=content)


def _copied(path: Path, name: str) -> PlannedFile:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return PlannedFile(name, ShardType.ASSET, size, original=Span(name, 0, size))
