"""What a KV cache counts, as a snapshot."""

from __future__ import annotations

from dataclasses import dataclass

from .options import KvMode


@dataclass(frozen=True, slots=True)
class KvStats:
    """A cache since it was made. Bytes and seconds."""

    mode: KvMode
    tokens: int  # of the longest layer that spills
    block_tokens: int  # of a stored block; 0 before the first token
    layers: int  # that spill
    kept_layers: int  # that keep transformers' own cache
    full_bytes: int  # that a full cache would take for the layers that spill
    budget: int
    memory_bytes: int  # in working memory now, the slots for attention included
    memory_peak: int
    host_bytes: int
    host_peak: int
    disk_bytes: int
    disk_peak: int
    spilled_blocks: int  # that left working memory
    written_bytes: int  # to disk
    reloaded_bytes: int  # from host memory and disk
    reload_seconds: float  # putting layers together, mostly while another one computes
    wait_seconds: float  # the part of it that computation waited for
    expected: int  # layers that were there when they were asked for
    unexpected: int  # layers that were not: the first, those after a change of length, all without room for two

    @property
    def stored_tokens(self) -> int:
        """Tokens in blocks; the newest ones are as they came."""
        return self.tokens - self.tokens % max(1, self.block_tokens)

    @property
    def reload_rate(self) -> float:
        """Bytes of stored keys and values per second; 0 before the first."""
        return self.reloaded_bytes / self.reload_seconds if self.reload_seconds else 0.0
