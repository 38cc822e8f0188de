"""What a user chooses about a KV cache, and the budgets that follow from it and from the machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, get_args

from moehive.protocol.errors import ConfigError
from moehive.swarm.memory import detect_memory
from moehive.swarm.paths import Paths

if TYPE_CHECKING:
    import torch

KvMode = Literal["full", "spill", "window", "fp8", "int8"]
KV_MODES: Final[tuple[KvMode, ...]] = get_args(KvMode)
LOSSLESS: Final[frozenset[KvMode]] = frozenset({"full", "spill", "window"})

DEFAULT_WINDOW: Final = 4096  # tokens
DEFAULT_PREFILL_CHUNK: Final = 512  # tokens
_MOST_DISK: Final = 64 << 30  # bytes, where the user names no budget


@dataclass(frozen=True, slots=True)
class KvOptions:
    """How keys and values are kept while a model generates. Every mode but `full` bounds the memory that they take.

    Lossless, attention over every token, results equal to `full` bit for bit:
      full    transformers' own cache: everything in the model's memory, without a bound.
      spill   working memory is used up to `budget`; the oldest tokens then go to host memory and on to disk.
      window  the newest `window` tokens of each layer stay in working memory, everything older is spilled at once.

    Approximate, attention over every token, whose stored keys and values are rounded (`logit_error` measures it):
      fp8     like spill, with stored blocks as float8 (e4m3) and a scale for each token and head.
      int8    like spill, with stored blocks as 8-bit integers and a scale for each token and head.

    Layers whose cache is bounded by the model itself (sliding windows, linear attention) keep transformers' own cache.
    So does the index that the layers of DeepSeek-V3.2 and GLM's sparse models have beside their keys, which does grow.
    Neither counts in the budgets.
    """

    mode: KvMode = "full"
    budget: int | None = None
    """Bytes of working memory, on the model's device: at least one layer's keys and values, better two. Default: a
    quarter of what is free."""

    host: int | None = None
    """Bytes of host memory below that. Default: none where the model computes on the processor, whose memory it is; a
    quarter of what is free beside an accelerator."""

    disk: int | None = None
    """Bytes of disk below that. Default: half of what is free, at most 64 GiB."""

    window: int | None = None
    """Newest tokens that stay in working memory, in mode window only. Default: 4096."""

    directory: Path | None = None
    """Where the disk part lies, in files without a name that vanish with the process. A real disk: what is in memory
    (tmpfs) would not bound anything. Default: the cache directory of `moehive paths`."""

    prefill_chunk: int | None = None
    """Tokens of a prompt that `generate` reads at a time, which bounds the memory of activations. Default: 512; in mode
    full the whole prompt. Equal results need equal chunks: like any batch size, they change the last bits."""

    block_tokens: int | None = None
    """Tokens of one stored block; fewer are kept as they are. Default: 64 to 2048, for blocks of about 256 KiB."""

    def __post_init__(self) -> None:
        """Raise ConfigError for what contradicts itself."""
        if self.mode not in KV_MODES:
            raise ConfigError(f"KV cache mode {self.mode!r} is not known; choose one of {', '.join(KV_MODES)}")
        if self.mode == "full" and (self.budget, self.host, self.disk, self.directory) != (None,) * 4:
            raise ConfigError("a full KV cache has no budget: choose a mode that spills, such as spill")
        if self.window is not None and self.mode != "window":
            raise ConfigError(f"a window of {self.window} tokens means something in mode window only")
        for least, names in ((1, ("budget", "window", "prefill_chunk", "block_tokens")), (0, ("host", "disk"))):
            for name in names:
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ConfigError(f"{name} of a KV cache: {value} is less than {least}")

    @property
    def lossless(self) -> bool:
        """Whether results equal those of a full cache bit for bit."""
        return self.mode in LOSSLESS

    @property
    def chunk(self) -> int | None:
        """Tokens of a prompt that are read at a time; None: all of them."""
        if self.prefill_chunk is None and self.mode != "full":
            return DEFAULT_PREFILL_CHUNK
        return self.prefill_chunk


@dataclass(frozen=True, slots=True)
class KvBudgets:
    """What a cache may use. Bytes and tokens."""

    device: int
    host: int
    disk: int
    directory: Path
    block_tokens: int | None = None  # None: see plan.block_length
    window: int | None = None  # None: as much as fits
    max_tokens: int | None = None  # the length it will reach, where that is known: refused before the first token


def budgets_of(
    options: KvOptions, device: torch.device, max_tokens: int | None, environment: Mapping[str, str] = os.environ
) -> KvBudgets:
    """Options with their defaults from this machine, now."""
    on_cpu = device.type == "cpu"
    directory = options.directory or Paths.of(environment).cache / "kv"
    window = DEFAULT_WINDOW if options.window is None else options.window
    return KvBudgets(
        device=_free_memory(device) // 4 if options.budget is None else options.budget,
        host=options.host if options.host is not None else 0 if on_cpu else detect_memory().room // 4,
        disk=min(_MOST_DISK, _free_disk(directory) // 2) if options.disk is None else options.disk,
        directory=directory,
        block_tokens=options.block_tokens,
        window=window if options.mode == "window" else None,
        max_tokens=max_tokens,
    )


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        import torch  # not at the top: the command line reads the options before it needs torch

        return int(torch.cuda.mem_get_info(device)[0])
    return detect_memory().room


def _free_disk(directory: Path) -> int:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
