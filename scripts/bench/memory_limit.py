"""A model several times as large as the memory allowed: the same tokens, within the limit, and how fast.

    python scripts/bench/memory_limit.py [--limit 1024] [--tokens 24] [--json FILE]

A random checkpoint with as many experts in a layer as Qwen3-30B-A3B (128, top 8; each a quarter of its size) is run
in processes of its own under a hard limit of memory (control groups; `_cgroup.py` says what stands in where they cannot
be had): by moehive with the budget that it chooses itself, and by transformers with accelerate's offload to disk. The
reference is plain transformers without a limit. Asked: the reference's tokens, not killed, memory below the limit, at
least 5 times accelerate's tokens per second.

accelerate comes twice: as anybody would call it (`from_pretrained(device_map="auto", offload_folder=...)`), which has
to merge and offload the experts within the limit; and with the experts offloaded beforehand, without a limit, and all
else in memory. Every file is dropped from the page cache before each run, so that what a run reads is charged to it.

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
from _common import (
    arguments,
    conditions,
    drop_from_page_cache,
    leave_cleanly,
    listen_for_noise,
    print_head,
    print_table,
    write_json,
)
from transformers.utils import logging

from moehive.protocol.units import format_size

ACCELERATE, PREPARED = "accelerate", "accelerate, offloaded beforehand"
GOAL = 5.0  # times accelerate's tokens per second
TIMES = 3.0  # the checkpoint against the limit
TIMEOUT = 900.0  # seconds of one process
PROMPT = 8  # tokens


# --- in a process of its own ------------------------------------------------------------------------------------------


def child(who: str, model: str, count: int, threads: int, offload: str, share: int) -> None:
    """Load, generate `count` tokens greedily, and print one line of JSON."""
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

    eager = {"dtype": torch.bfloat16, "experts_implementation": "eager"}
    if who == "moehive":
        from moehive.swarm import open_local

        return open_local(model)[0]
    if who == PREPARED:
        return _dispatched(model, offload)
    if who == ACCELERATE:
        places: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": share}, "offload_folder": offload}
        return AutoModelForCausalLM.from_pretrained(model, **eager, **places)
    loaded = AutoModelForCausalLM.from_pretrained(model, **eager)
    if offload:
        from accelerate.utils import offload_state_dict

        offload_state_dict(offload, loaded.state_dict())
    return loaded


def _dispatched(model: str, offload: str) -> Any:
    """From a folder that has every parameter: experts stay there, all else is read."""
    from accelerate import dispatch_model, init_empty_weights
    from accelerate.utils import OffloadedWeightsLoader, set_module_tensor_to_device
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    loaded.set_experts_implementation("eager")
    weights = OffloadedWeightsLoader(save_folder=offload)
    places = {}
    for name, module in loaded.named_modules():
        if name.endswith(".experts"):
            places[name] = "disk"
        elif ".experts." not in name and (module._parameters or module._buffers):
            places[name] = "cpu"
            for own in (own for own, value in module._parameters.items() if value is not None):
                set_module_tensor_to_device(loaded, f"{name}.{own}", "cpu", value=weights[f"{name}.{own}"])
    return dispatch_model(loaded, places, main_device="cpu", offload_dir=offload).eval()


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
    parser.add_argument("--limit", type=int, default=1024, help="MiB")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--experts", type=int, default=128, help="of each layer; 8 are used for a token")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--accelerate-tokens", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="keep the checkpoint there, and use it again")
    options = parser.parse_args()
    leave_cleanly()
    logging.disable_progress_bar()
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
        offload = Path(temporary) / "offload"
        reference = _plain(source, options.tokens, options.threads, offload)
        runs = {
            who: _run(limit, who, model, tokens, options.threads, folder)
            for who, model, tokens, folder in (
                ("moehive", converted, options.tokens, offload),
                (ACCELERATE, source, options.accelerate_tokens, Path(temporary) / "own"),
                (PREPARED, source, options.accelerate_tokens, offload),
            )
        }
    print_table(COLUMNS, [_row(who, run, reference) for who, run in runs.items()])
    ours = runs["moehive"][0]
    ratios = {
        who: _speed(ours) / _speed(run[0])
        for who, run in runs.items()
        if who != "moehive" and ours.code == run[0].code == 0
    }
    for who, ratio in ratios.items():
        print(f"{ratio:.1f} times the tokens per second of {who}")
    print()
    results = {who: {"foreign": run[1], **asdict(run[0])} for who, run in runs.items()}
    write_json(options.json, facts, {"ratios": ratios, "reference": reference, **results})
    wrong = _faults(ours, reference, limit, size)
    judged = ratios.get(ACCELERATE, ratios.get(PREPARED, GOAL))  # the second where the first was killed
    wrong += [] if judged >= GOAL else [f"{judged:.1f} times accelerate"]
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


def _plain(source: Path, tokens: int, threads: int, offload: Path) -> list[int]:
    """The reference's tokens, without a limit; leaves every parameter in `offload`."""
    command = _command("reference", source, tokens, threads, offload, 0)
    outcome = Limited("none", None, 1 << 40).run(command, timeout=TIMEOUT)
    assert outcome.code == 0, outcome.err
    found: list[int] = json.loads(outcome.out)["tokens"]
    return found


def _run(limit: int, who: str, model: Path, tokens: int, threads: int, offload: Path) -> tuple[Outcome, float]:
    """The outcome, and the share of the machine that others used meanwhile."""
    for directory in (model, offload):
        for file in directory.rglob("*"):
            if file.is_file():
                drop_from_page_cache(file)
    with limited(limit) as where, listen_for_noise() as noise:
        outcome = where.run(_command(who, model, tokens, threads, offload, limit // 4), timeout=TIMEOUT)
    return outcome, noise.foreign


def _command(who: str, model: Path, tokens: int, threads: int, offload: Path, share: int) -> list[str]:
    return [
        sys.executable, __file__, "--child", who, str(model), str(tokens), str(threads), str(offload), str(share)
    ]  # fmt: skip


def _row(name: str, run: tuple[Outcome, float], reference: list[int]) -> list[object]:
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
