"""Tokens per second with every expert resident, against plain transformers on the same checkpoint.

    python scripts/bench/local.py [--model DIR] [--dtype bfloat16] [--pairs 5] [--json FILE]

Two models: the bundled demo model (or `--model`, a Hugging Face MoE checkpoint), and a random one whose experts have
the shape of Qwen3-30B-A3B's on fewer layers. Our model and each of transformers' implementations take turns within one
run, so that a noisy machine is noisy for both; the ratio is the median over pairs of neighbours, above 1 when moehive
is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.utils import logging

from moehive.swarm import open_local
from moehive.swarm.convert import convert

Clock = Callable[[], float]

DEMO = Path(__file__).parents[2] / "node" / "demo" / "model"
BASELINES = ("eager", "grouped_mm")
DECODE_TOKENS, PREFILL_TOKENS = 24, 192
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; tokens per second are medians, the ratio is a median of ratios."""

    model: str
    phase: str
    baseline: str
    moehive: float
    transformers: float
    ratio: float


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: on a machine with other work, one thread")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = getattr(torch, options.dtype), options.pairs, CLOCKS[options.clock]
    rows: list[Row] = []
    if options.model.exists():
        rows += measure(options.model.name if options.model != DEMO else "demo", options.model, *settings)
    with synthetic(options.layers) as source:
        rows += measure("qwen3-shaped", source, *settings)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


@contextmanager
def synthetic(layers: int) -> Iterator[Path]:
    """A random checkpoint: hidden 2048, experts of 768, top-8, as Qwen3-30B-A3B, but 32 experts and `layers` layers."""
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=2048, intermediate_size=768, moe_intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=32, num_experts_per_tok=8,
        norm_topk_prob=True, eos_token_id=None,
    )  # fmt: skip
    config.initializer_range = 0.2  # spreads the routing
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
        yield Path(directory)


def measure(name: str, source: Path, dtype: torch.dtype, pairs: int, clock: Clock) -> list[Row]:
    """Rows for one checkpoint. Everything runs once before it is timed: experts are then resident."""
    with tempfile.TemporaryDirectory() as directory:
        convert(source, Path(directory) / "converted")
        ours, _ = open_local(Path(directory) / "converted", dtype=dtype)
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        rows = []
        for phase, once in (("decode", decode), ("prefill", prefill)):
            for baseline in BASELINES:
                plain.set_experts_implementation(baseline)
                times = alternate(partial(once, ours, clock), partial(once, plain, clock), pairs)
                tokens = DECODE_TOKENS if phase == "decode" else PREFILL_TOKENS
                rows.append(summary(name, phase, baseline, tokens, times))
    return rows


def alternate(ours: Callable[[], float], theirs: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    """Seconds of each, taking turns; who goes first changes from pair to pair."""
    ours()
    theirs()
    times = []
    for index in range(pairs):
        if index % 2:
            second, first = theirs(), ours()
        else:
            first, second = ours(), theirs()
        times.append((first, second))
    return times


def summary(name: str, phase: str, baseline: str, tokens: int, times: list[tuple[float, float]]) -> Row:
    """Medians of one comparison."""
    ours, theirs = (tokens / statistics.median(side) for side in zip(*times, strict=True))
    return Row(name, phase, baseline, ours, theirs, statistics.median(b / a for a, b in times))


@torch.inference_mode()
def decode(model: Any, clock: Clock) -> float:
    """Seconds for DECODE_TOKENS greedy steps of one sequence after a short prompt."""
    answer = model(input_ids=ids(model, 8), use_cache=True)
    start = clock()
    for _ in range(DECODE_TOKENS):
        token = answer.logits[:, -1:].argmax(-1)
        answer = model(input_ids=token, past_key_values=answer.past_key_values, use_cache=True)
    return clock() - start


@torch.inference_mode()
def prefill(model: Any, clock: Clock) -> float:
    """Seconds for one forward pass over PREFILL_TOKENS."""
    prompt = ids(model, PREFILL_TOKENS)
    start = clock()
    model(input_ids=prompt, use_cache=True)
    return clock() - start


def ids(model: Any, count: int) -> torch.Tensor:
    """A fixed prompt [1, count]."""
    return torch.randint(2, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(count))


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [f"{'model':14} {'phase':8} {'against':11} {'moehive tok/s':>14} {'plain tok/s':>12} {'ratio':>6}"]
    for row in rows:
        name = f"{row.model:14} {row.phase:8} {row.baseline:11}"
        lines.append(f"{name} {row.moehive:14.1f} {row.transformers:12.1f} {row.ratio:6.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
