"""A model several times as large as the memory allowed: the same tokens, within the limit, and how fast.

    python scripts/bench/memory_limit.py [--limit 768] [--tokens 24] [--json FILE]

A random checkpoint with as many experts in a layer as Qwen3-30B-A3B (128, top 8; each a quarter of its size) is run
in processes of its own under a hard limit of memory (control groups; `_cgroup.py` says what stands in where they cannot
be had): by moehive with the budget that it chooses itself, and by transformers with accelerate's offload to disk. The
reference is plain transformers without a limit. Asked: the reference's tokens, not killed, memory below the limit, at
least 5 times accelerate's tokens per second.

"Peak" is what the control group counted. The kernel lets page cache fill whatever is free below the limit, so reading
files brings it near the limit however little the process needs; "without page cache" is what it needs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _cgroup import Limited, Outcome, limited
from _common import arguments, conditions, leave_cleanly, listen_for_noise, print_head, print_table, write_json

from moehive.protocol.units import format_size

GOAL = 5.0  # times accelerate's tokens per second
TIMES = 3.0  # the checkpoint against the limit
TIMEOUT = 900.0  # seconds of one process
PROMPT = 8  # tokens


# --- in a process of its own ------------------------------------------------------------------------------------------


def child(who: str, model: str, count: int, threads: int, offload: str, share: int) -> None:
    """Load, generate `count` tokens greedily, and print one line of JSON."""
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()
    loaded = _load(who, model, offload, share)
    ready = time.perf_counter()
    tokens, seconds = _generate(loaded, count)
    said: dict[str, Any] = {"tokens": tokens, "seconds": seconds, "load": ready - started}
    if who == "moehive":
        from moehive.swarm.model.seats import tier_statistics
        from moehive.swarm.telemetry.report import tier_json

        stats = tier_statistics(loaded)
        assert stats is not None
        said["experts"] = tier_json(stats, "disk")
    print(json.dumps(said))


def _load(who: str, model: str, offload: str, share: int) -> Any:
    from transformers import AutoModelForCausalLM

    if who == "moehive":
        from moehive.swarm import open_local

        return open_local(model)[0]
    if who == "accelerate":
        return AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": share}, offload_folder=offload,
            experts_implementation="eager",
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, experts_implementation="eager")


@torch.inference_mode()
def _generate(model: Any, count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens after a fixed prompt, and the seconds of each but the first, which reads the prompt."""
    from _moe import prompt

    answer = model(input_ids=prompt(model.config.vocab_size, PROMPT), use_cache=True)
    tokens, seconds = [int(answer.logits[0, -1].argmax())], []
    while len(tokens) < count:
        start = time.perf_counter()
        step = torch.tensor([tokens[-1:]])
        answer = model(input_ids=step, past_key_values=answer.past_key_values, use_cache=True)
        tokens.append(int(answer.logits[0, -1].argmax()))
        seconds.append(time.perf_counter() - start)
    return tokens, seconds


# --- the comparison ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Print the table; end with 1 where something asked for was not reached."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--limit", type=int, default=768, help="MiB")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128, help="of each layer; 8 are used for a token")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--accelerate-tokens", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="keep the checkpoint there, and use it again")
    options = parser.parse_args()
    leave_cleanly()
    limit = options.limit << 20
    with tempfile.TemporaryDirectory() as temporary:
        place = options.directory or Path(temporary)
        source, converted = _prepare(place, options.layers, options.experts)
        size = sum(file.stat().st_size for file in source.iterdir())
        with limited(limit) as where:
            kind = where.kind
        facts = conditions(
            checkpoint=f"{format_size(size)}: {options.layers} layers of {options.experts} experts, top 8, bf16",
            limit=f"{format_size(limit)} ({size / limit:.1f} times less), {kind}; no swap",
            threads=options.threads,
        )
        print_head("memory limit", facts)
        reference = _plain(source, options.tokens, options.threads)
        ours = _run(limit, "moehive", converted, options.tokens, options.threads, temporary)
        theirs = _run(limit, "accelerate", source, options.accelerate_tokens, options.threads, temporary)
    rows = [_row(name, one, reference, limit) for name, one in (("moehive", ours), ("accelerate", theirs))]
    print_table(COLUMNS, rows)
    ratio = _speed(ours[0]) / _speed(theirs[0]) if ours[0].code == theirs[0].code == 0 else None
    if ratio is not None:
        print(f"{ratio:.1f} times accelerate's tokens per second ({GOAL:g} are asked)\n")
    results = {name: {"foreign": one[1], **asdict(one[0])} for name, one in (("moehive", ours), ("accelerate", theirs))}
    write_json(options.json, facts, {"ratio": ratio, "reference": reference, **results})
    wrong = _faults(ours[0], reference, limit, size)
    wrong += [] if ratio is None or ratio >= GOAL else [f"{ratio:.1f} times accelerate"]
    if wrong:
        raise SystemExit(f"not as asked: {', '.join(wrong)}")


COLUMNS = (
    "", "ended", "reference's tokens", "tokens/s", "load s", "peak", "without page cache", "limit reached",
    "experts hit", "read per token", "others' CPU",
)  # fmt: skip


def _prepare(place: Path, layers: int, experts: int) -> tuple[Path, Path]:
    from _moe import qwen3_shaped

    from moehive.swarm.convert import convert

    source, converted = place / "source", place / "converted"
    if not (source / "config.json").exists():
        qwen3_shaped(source, layers=layers, experts=experts, hidden=1024, inner=384)
    convert(source, converted)
    return source, converted


def _plain(source: Path, tokens: int, threads: int) -> list[int]:
    """The reference's tokens, without a limit."""
    outcome = Limited("none", None, 1 << 40).run(
        _command("reference", source, tokens, threads, source, 0), timeout=TIMEOUT
    )
    assert outcome.code == 0, outcome.err
    found: list[int] = json.loads(outcome.out)["tokens"]
    return found


def _run(limit: int, who: str, model: Path, tokens: int, threads: int, temporary: str) -> tuple[Outcome, float]:
    """The outcome, and the share of the machine that others used meanwhile."""
    command = _command(who, model, tokens, threads, Path(temporary) / "offload", limit // 4)
    with limited(limit) as where, listen_for_noise() as noise:
        outcome = where.run(command, timeout=TIMEOUT)
    return outcome, noise.foreign


def _command(who: str, model: Path, tokens: int, threads: int, offload: Path, share: int) -> list[str]:
    return [
        sys.executable, __file__, "--child", who, str(model), str(tokens), str(threads), str(offload), str(share)
    ]  # fmt: skip


def _row(name: str, run: tuple[Outcome, float], reference: list[int], limit: int) -> list[object]:
    outcome, foreign = run
    usage = outcome.usage
    peaks = [format_size(usage.charged), format_size(usage.anonymous), usage.pressed]
    if outcome.code:
        ended = f"signal {-outcome.code}" if outcome.code < 0 else f"code {outcome.code}"
        return [name, ended, None, None, None, *peaks, None, None, f"{foreign:.0%}"]
    said = json.loads(outcome.out)
    same = said["tokens"] == reference[: len(said["tokens"])]
    hits = moved = None
    if "experts" in said:
        ram, disk = said["experts"]["tiers"]
        hits, moved = f"{ram['hitRate']:.1%}", format_size(round(disk["movedBytes"] / len(said["tokens"])))
    speed = _speed(outcome)
    return [name, "well", "yes" if same else "NO", speed, said["load"], *peaks, hits, moved, f"{foreign:.0%}"]


def _speed(outcome: Outcome) -> float:
    """Tokens per second after the prompt, by the median step."""
    seconds = sorted(json.loads(outcome.out)["seconds"])
    return float(1 / seconds[len(seconds) // 2])


def _faults(outcome: Outcome, reference: list[int], limit: int, size: int) -> list[str]:
    faults = [] if size >= TIMES * limit else [f"the checkpoint is only {size / limit:.1f} times the limit"]
    if outcome.code:
        return [*faults, f"ended with {outcome.code}: {outcome.err[-2000:]}"]
    if json.loads(outcome.out)["tokens"] != reference:
        faults.append("other tokens than the reference's")
    if max(outcome.usage.charged, outcome.usage.anonymous) > limit:
        faults.append("more memory than the limit")
    return faults


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        who, model, count, threads, offload, share = sys.argv[2:]
        child(who, model, int(count), int(threads), offload, int(share))
    else:
        main()
