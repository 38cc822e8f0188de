"""Tokens per second of the demo model: three node processes on this machine against the same model in this process.

    python scripts/bench/demo.py [--tokens 48] [--rounds 4] [--json FILE]

Greedy text from one prompt, prompt included in the time, in fp32 and bf16:

    transformers   the checkpoint, `eager` experts, all in this process
    moehive local  the converted directory, experts from this machine's files through the RAM tier
    swarm, sum     no expert here: each layer asks the nodes, which answer with one row per token
    swarm, rows    the same, with every expert's row: transformers' own bits

The tokens of each are compared: in fp32 all four must agree, in bf16 all but `sum`, which rounds differently. One
machine computes for all: this shows what the network costs, not what more machines would bring.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import Rounds, arguments, conditions, p50, print_head, print_table, repeat, write_json
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from moehive.node.demo import bundled_checkpoint
from moehive.node.demo.processes import NodeGroup
from moehive.node.demo.shares import share_experts, spec_of
from moehive.node.text.generation import Generated, continue_text
from moehive.node.text.sampling import Sampling
from moehive.swarm import join, open_local
from moehive.swarm.client import Swarm
from moehive.swarm.convert import convert
from moehive.swarm.store.directory import ConvertedDirectory

PROMPT = "ROMEO:\nWhat light is this"
NODES = 3
PLAIN, LOCAL, SUM, ROWS = "transformers", "moehive local", "swarm, sum", "swarm, rows"


def main() -> None:
    """Start the nodes, generate with each model in turn, print."""
    parser = arguments(__doc__, rounds=4)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    facts = conditions(
        swarm=f"{NODES} nodes, each with a third of the experts and one more",
        work=f"{options.tokens} greedy tokens after a prompt of {len(PROMPT)} characters",
        threads="1 for computing in every process; client, nodes and their daemons share the machine",
    )
    results: dict[str, Rounds] = {}
    with bundled_checkpoint() as source, tempfile.TemporaryDirectory() as directory:
        converted = Path(directory) / "converted"
        convert(source, converted)
        manifest = ConvertedDirectory(converted).manifest
        facts["model"] = f"{manifest.model.num_experts} experts in each of {len(manifest.model.moe_layers)} layers"
        with running_swarm(converted, manifest.model.num_experts, Path(directory)) as swarm:
            for dtype in (torch.float32, torch.bfloat16):
                models = load_models(source, converted, swarm, dtype)
                once = partial(generate_all, models, options.tokens)
                check_tokens(once(), dtype)  # and every expert is loaded, every connection open
                results[str(dtype).removeprefix("torch.")] = repeat(options.rounds, once)
    report(facts, results, len(manifest.model.moe_layers), options.tokens)
    seconds = {name: [seconds_of(each) for each in rounds.results] for name, rounds in results.items()}
    write_json(options.json, facts, {"seconds": seconds, "noise": {name: str(each) for name, each in results.items()}})


@contextmanager
def running_swarm(converted: Path, experts: int, directory: Path) -> Iterator[Swarm]:
    """Three node processes, and a client of theirs that has a cache of its own."""
    with NodeGroup(directory, converted) as group:
        shares = [spec_of(share) for share in share_experts(experts, NODES)]
        ticket = group.start(shares[0], None).wait_until_ready().ticket
        for node in [group.start(share, ticket) for share in shares[1:]]:
            node.wait_until_ready()
        with join(ticket, cache=directory / "cache") as swarm:
            yield swarm


def load_models(source: Path, converted: Path, swarm: Swarm, dtype: torch.dtype) -> Mapping[str, tuple[Any, Any]]:
    """Model and tokenizer by name."""
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, experts_implementation="eager")
    local, tokenizer = open_local(converted, dtype=dtype)
    return {
        PLAIN: (plain, tokenizer),
        LOCAL: (local, tokenizer),
        SUM: swarm.load(converted, dtype=dtype, answers="sum"),
        ROWS: swarm.load(converted, dtype=dtype, answers="rows"),
    }


def generate_all(models: Mapping[str, tuple[Any, Any]], tokens: int) -> dict[str, Generated]:
    """The same text from each model, one after the other."""
    sampling = Sampling(max_tokens=tokens, seed=0, temperature=0)
    return {
        name: continue_text(model, tokenizer, PROMPT, sampling, lambda _: None)
        for name, (model, tokenizer) in models.items()
    }


def check_tokens(made: Mapping[str, Generated], dtype: torch.dtype) -> None:
    """Nobody is fast by being wrong."""
    exact = [LOCAL, ROWS] if dtype is torch.bfloat16 else [LOCAL, ROWS, SUM]
    for name in exact:
        if made[name].tokens != made[PLAIN].tokens:
            raise SystemExit(f"{name} generates other tokens than transformers in {dtype}")


def seconds_of(made: Mapping[str, Generated]) -> dict[str, float]:
    """Of one round, by name."""
    return {name: each.seconds for name, each in made.items()}


def report(facts: dict[str, object], results: Mapping[str, Rounds], layers: int, tokens: int) -> None:
    """One table for both dtypes."""
    print_head(f"Demo model: {NODES} node processes against one process", facts)
    rows = []
    for dtype, rounds in results.items():
        for name in (PLAIN, LOCAL, SUM, ROWS):
            made: list[dict[str, Generated]] = rounds.results
            speed = p50([each[name].tokens_per_second for each in made])
            against = [p50([each[other].seconds / each[name].seconds for each in made]) for other in (PLAIN, LOCAL)]
            extra = p50([each[name].seconds - each[LOCAL].seconds for each in made]) / (tokens * layers)
            rows.append((f"{dtype}, {name}", speed, *against, extra * 1e6))
    columns = ("", "tokens/s", "of transformers", "of local", "us more per layer call")
    print_table(columns, rows)
    for dtype, rounds in results.items():
        print(f"{dtype}: {rounds}")
    print(flush=True)


if __name__ == "__main__":
    main()
