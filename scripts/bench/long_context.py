"""A 128K-token context on a KV budget of a 16th of its size, against transformers' full cache.

    python scripts/bench/long_context.py [--context 131072] [--share 16] [--read 256] [--rounds 8] [--json FILE]

A random model with as many layers as Qwen3-30B-A3B and tiny ones (one key-value head of 16 numbers), so that two cores
hold its full cache and attend over it. Attention over 128K x 128K tokens would take those two cores an hour, so the
beginning of the context is random keys and values given to each cache, and only the last `--read` tokens are really
read, in chunks. Every mode runs in a process of its own; they take turns, token by token, with the full cache's tokens
as input, so that a busy machine is busy for all. Memory is the growth of the process' peak resident set.
"""

from __future__ import annotations

import re
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _common import (
    MAX_FOREIGN,
    Child,
    arguments,
    conditions,
    listen_for_noise,
    print_head,
    print_table,
    questions,
    write_json,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3MoeConfig
from transformers.utils import logging

from moehive.protocol.units import format_size
from moehive.swarm.model.kv.cache import kv_cache
from moehive.swarm.model.kv.options import KV_MODES, LOSSLESS, KvOptions

LAYERS, HEAD, VOCABULARY = 48, 16, 512
TOKEN_BYTES = LAYERS * 2 * HEAD * 4  # one key-value head, fp32
CHUNK, SYNTHETIC_CHUNK = 64, 8192
WINDOW_SHARE = 128  # of the context, in window mode


# --- one mode, in a process of its own --------------------------------------------------------------------------------


def serve(pipe: Connection, mode: str, budget: int, context: int, threads: int) -> None:
    """Answer ("fill", layer, tokens), ("read", ids) and ("end",) over `pipe`."""
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    model = tiny_model()
    with torch.inference_mode():
        model(torch.zeros(1, CHUNK, dtype=torch.long))  # all that is allocated once is allocated
        cache = make_cache(model, mode, budget, context)
        before = reset_peak()
        for question in questions(pipe):
            if question[0] == "fill":
                fill(cache, *question[1:])
                pipe.send(None)
            elif question[0] == "read":
                started = time.perf_counter()
                logits = model(question[1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
                pipe.send((time.perf_counter() - started, logits.clone()))
            else:
                stats = None if mode == "full" else asdict(cache.stats())
                pipe.send((peak() - before, stats))


def make_cache(model: Any, mode: Any, budget: int, context: int) -> Any:
    """Transformers' own for `full`."""
    if mode == "full":
        return DynamicCache(config=model.config)
    window = context // WINDOW_SHARE if mode == "window" else None
    return kv_cache(model, KvOptions(mode, budget=budget, window=window), max_tokens=context)


def tiny_model() -> Any:
    """A seeded Qwen3-MoE with LAYERS layers."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=LAYERS, num_attention_heads=1, num_key_value_heads=1, head_dim=HEAD, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=1 << 18, eos_token_id=None,
    )  # fmt: skip
    config.initializer_range = 0.2
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def fill(cache: Any, layer: int, tokens: int) -> None:
    """Give one layer's cache `tokens` tokens, the same to every mode."""
    generator = torch.Generator().manual_seed(layer)
    for start in range(0, tokens, SYNTHETIC_CHUNK):
        shape = (1, 1, min(SYNTHETIC_CHUNK, tokens - start), HEAD)
        cache.update(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), layer)


def reset_peak() -> int:
    """Let the peak of this process' resident set begin now; its size in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


# --- all modes, in turns ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """What one mode did."""

    read_seconds: float = 0.0  # the last --read tokens, in chunks
    step_seconds: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # [V] each
    memory: int = 0
    stats: dict[str, Any] | None = None


def measure(children: dict[str, Child], context: int, read: int, rounds: int) -> dict[str, Seen]:
    """Fill every cache, read, and generate a token in each round."""
    seen = {mode: Seen() for mode in children}
    for layer in range(LAYERS):
        for child in children.values():
            child.ask(("fill", layer, context - read - rounds))
    for chunk in torch.randint(0, VOCABULARY, (1, read), generator=torch.Generator().manual_seed(1)).split(CHUNK, 1):
        for mode, child in children.items():
            seconds, logits = child.ask(("read", chunk))
            seen[mode].read_seconds += seconds
            seen[mode].logits = [logits]  # of the last chunk in the end
    for _ in range(rounds):
        token = seen["full"].logits[-1].argmax().view(1, 1)
        for mode, child in children.items():
            with listen_for_noise() as noise:
                seconds, logits = child.ask(("read", token))
            seen[mode].step_seconds.append(seconds)
            seen[mode].foreign.append(noise.foreign)
            seen[mode].logits.append(logits)
    for mode, child in children.items():
        seen[mode].memory, seen[mode].stats = child.ask(("end",))
    return seen


def row(mode: str, seen: Seen, full: Seen, read: int) -> list[object]:
    """One line of the table."""
    ratios = [theirs / ours for ours, theirs in zip(seen.step_seconds, full.step_seconds, strict=True)]
    errors = [float((a - b).abs().max()) for a, b in zip(seen.logits, full.logits, strict=True)]
    same = sum(bool(a.argmax() == b.argmax()) for a, b in zip(seen.logits, full.logits, strict=True))
    stats = seen.stats or {}
    reload = stats.get("reload_seconds") or 0.0
    return [
        mode,
        "yes" if all(torch.equal(a, b) for a, b in zip(seen.logits, full.logits, strict=True)) else "NO",
        f"{same} of {len(errors)}",
        max(errors),
        1 / statistics.median(seen.step_seconds),
        statistics.median(ratios),
        full.read_seconds / seen.read_seconds,
        format_size(seen.memory),
        format_size(stats["memory_peak"]) if stats else None,
        format_size(stats["disk_peak"]) if stats else None,
        f"{format_size(int(stats['reloaded_bytes'] / reload))}/s" if reload else None,
        stats["wait_seconds"] / reload if reload else None,
    ]


COLUMNS = (
    "cache", "logits equal", "same token", "largest error", "tokens/s", "against full", "reading against full",
    "memory grew by", "of it KV, counted", "KV on disk", "reloaded at", "share waited for",
)  # fmt: skip


def main() -> None:
    """Print the table; end with 1 where a lossless mode was not, or a budget was exceeded."""
    parser = arguments(__doc__, rounds=8)
    parser.add_argument("--context", type=int, default=1 << 17, help="tokens")
    parser.add_argument("--share", type=int, default=16, help="the budget is the full cache's size divided by this")
    parser.add_argument("--read", type=int, default=256, help="tokens that are really read before generating")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    parser.add_argument("--modes", nargs="+", default=[mode for mode in KV_MODES if mode != "full"])
    options = parser.parse_args()
    budget = options.context * TOKEN_BYTES // options.share
    facts = conditions(
        model=f"{LAYERS} layers, 1 key-value head of {HEAD}, fp32: {TOKEN_BYTES} bytes a token",
        context=f"{options.context} tokens, full cache {format_size(options.context * TOKEN_BYTES)}",
        budget=f"{format_size(budget)}, 1/{options.share}; window mode keeps {options.context // WINDOW_SHARE} tokens",
    )
    print_head("long context", facts)
    modes = ["full", *options.modes]
    with ExitStack() as stack:
        children = {
            mode: stack.enter_context(Child(serve, mode, budget, options.context, options.threads)) for mode in modes
        }
        seen = measure(children, options.context, options.read, options.rounds)
    print_table(COLUMNS, [row(mode, seen[mode], seen["full"], options.read) for mode in modes])
    worst = max(share for one in seen.values() for share in one.foreign)
    print(f"others used up to {worst:.0%} of the CPU{'' if worst <= MAX_FOREIGN else '  ** NOISY: do not quote **'}")
    write_json(options.json, facts, {mode: plain(one) for mode, one in seen.items()})
    wrong = [mode for mode in modes if mode in LOSSLESS and not same_logits(seen[mode], seen["full"])]
    wrong += [mode for mode, one in seen.items() if one.stats and one.stats["memory_peak"] > budget]
    if wrong:
        raise SystemExit(f"not as promised: {', '.join(wrong)}")


def same_logits(one: Seen, other: Seen) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


def plain(seen: Seen) -> dict[str, Any]:
    """For JSON, without the logits."""
    return {
        "read_seconds": seen.read_seconds,
        "step_seconds": seen.step_seconds,
        "memory": seen.memory,
        "stats": seen.stats,
    }


if __name__ == "__main__":
    main()
