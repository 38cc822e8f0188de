"""The options of a KV cache on the command line, and what is printed about one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moehive.protocol.units import format_size
from moehive.swarm.model.kv.options import KvMode, KvOptions

from .arguments import Positive, Size
from .output import counted

if TYPE_CHECKING:
    from moehive.swarm.model.kv.fidelity import LogitError
    from moehive.swarm.model.kv.stats import KvStats


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class KvFlags:
    """How keys and values are kept."""

    mode: Annotated[KvMode, Parameter(name="--kv")] = "full"
    """How keys and values are kept. full: in memory, without a bound. spill: in memory up to --kv-budget, the oldest
    then on disk; the same text. window: only the newest --kv-window tokens in memory, all older ones on disk; the same
    text. fp8, int8: like spill, and rounded to 8 bits: approximate, and `moehive generate` says by how
    much."""

    kv_budget: Size | None = None
    """Memory for keys and values, at least for one whole layer, better for two. By default a quarter of what is
    free."""

    kv_disk: Size | None = None
    """Disk for keys and values. By default half of what is free, at most 64 GiB."""

    kv_window: Positive | None = None
    """Newest tokens that stay in memory with --kv window. By default 4096."""

    prefill_chunk: Positive | None = None
    """Tokens of the prompt that are read at a time, which bounds memory. By default 512, and with --kv full all. The
    same text needs the same chunks."""

    @property
    def options(self) -> KvOptions:
        """Raises ConfigError for what contradicts itself."""
        return KvOptions(
            self.mode,
            budget=self.kv_budget,
            disk=self.kv_disk,
            window=self.kv_window,
            prefill_chunk=self.prefill_chunk,
        )


def kv_lines(kv: KvStats, error: LogitError | None) -> list[str]:
    """For people: where keys and values were, and what an approximate cache changed."""
    if kv.layers == 0:
        return [f"KV cache ({kv.mode}): no layer of this model keeps every token, so there was nothing to spill"]
    lines = [
        f"KV cache ({kv.mode}): {counted(kv.tokens, 'token')} in {counted(kv.layers, 'layer')}, "
        f"{format_size(kv.full_bytes)} in full; "
        f"at most {format_size(kv.memory_peak)} in memory, {format_size(kv.disk_peak)} on disk"
    ]
    if kv.reloaded_bytes:
        lines.append(
            f"  read back {format_size(kv.reloaded_bytes)} at {format_size(int(kv.reload_rate))}/s; waited for "
            f"{kv.wait_seconds:.2f} s of {kv.reload_seconds:.2f} s"
        )
    if error is not None:
        lines.append(f"  approximate: {_difference(error)}")
    return lines


def kv_json(kv: KvStats, error: LogitError | None) -> dict[str, Any]:
    """For programs. Seconds and bytes."""
    return {
        "mode": kv.mode,
        "tokens": kv.tokens,
        "layers": kv.layers,
        "fullBytes": kv.full_bytes,
        "memoryPeakBytes": kv.memory_peak,
        "hostPeakBytes": kv.host_peak,
        "diskPeakBytes": kv.disk_peak,
        "spilledBlocks": kv.spilled_blocks,
        "reloadedBytes": kv.reloaded_bytes,
        "reloadSeconds": round(kv.reload_seconds, 4),
        "waitSeconds": round(kv.wait_seconds, 4),
        "logitError": None if error is None else asdict(error),
    }


def _difference(error: LogitError) -> str:
    if error.positions == 0:
        return f"the {error.tokens} tokens are too few to be rounded"
    return (
        f"logits differ by up to {error.largest:.3g} ({error.relative:.2%} of their spread), "
        f"{error.agreement:.1%} have the same likeliest token; measured on {error.positions} tokens"
    )
