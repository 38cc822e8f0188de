"""`moehive trace`: record which experts a model uses, and see what memory policies would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, validators

from moehive.protocol.errors import ConfigError
from moehive.protocol.manifest import MANIFEST_NAME

from .arguments import Flag, NotNegative, Positive
from .loading import quiet_libraries
from .output import counted, say, say_json, table
from .trace_fit import fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moehive.swarm.text.sampling import Sampling
    from moehive.swarm.tiers.replay import Replay
    from moehive.swarm.trace.routing import RoutingTrace
    from moehive.swarm.trace.scoring import Marks, Scores

_POLICIES = {
    "lru": "LRU",
    "lfu": "LFU",
    "lfru": "moehive",
    "fitted": "fitted to the trace",
    "foreseen": "and told the next layer",
    "belady": "Belady (knows the future)",
}

Percents = Annotated[
    tuple[float, ...], Parameter(validator=validators.Number(gt=0, lte=100), metavar="PERCENT", negative="")
]


def record(
    model: Path,
    file: Path,
    /,
    *prompts: str,
    max_tokens: Positive = 128,
    temperature: NotNegative | None = None,
    seed: int = 0,
    samples: Annotated[int, Parameter(validator=validators.Number(gte=0), metavar="N")] = 0,
    json: Flag = False,
) -> None:
    """Continue prompts with a model, and write which experts every token used to a file.

    Parameters
    ----------
    model:
        A directory that `moehive convert` wrote, or a checkpoint's directory that transformers can load.
    file:
        The trace to write. A file of this name is replaced.
    prompts:
        The texts to continue, each for itself. Different kinds of text make a better trace.
    max_tokens:
        Most tokens to generate for each prompt.
    temperature:
        As for `moehive generate`.
    seed:
        Makes what is generated repeatable.
    samples:
        For how many tokens hidden states are kept too; predictors are fitted to them. They take 4 bytes for each
        layer and hidden dimension of a token.
    json:
        Print one JSON object instead of text.
    """
    if not prompts:
        raise ConfigError('there is no prompt: moehive trace record MODEL FILE "Once upon a time" "def main():"')
    from moehive.swarm.text.sampling import Sampling
    from moehive.swarm.trace.files import check_replaceable, write_trace

    check_replaceable(file)
    trace = _heard(model, prompts, Sampling(max_tokens, seed, temperature), samples)
    write_trace(trace, file)
    size = file.stat().st_size
    if json:
        say_json(_trace_json(trace) | {"file": str(file), "bytes": size})
    else:
        say(f"{_describe(trace)}; {size:,} bytes in {file}")


def replay(file: Path, /, *, resident: Percents = (25.0, 50.0), json: Flag = False) -> None:
    """Show how often experts would have been in memory, under several policies and budgets.

    LRU evicts what was used longest ago, LFU what was used least often. Belady's policy knows the future: no policy
    that loads on demand does better. How far the past tells the future is seen from moehive's policy when it is told
    what regressions say that were fitted to the half of the trace that is not at hand, and how far the best of guesses
    would help from the same policy when it knows, besides, what the next layer uses. `layers` is the share of layer
    calls that found all their experts.

    Parameters
    ----------
    file:
        A trace that `moehive trace record` wrote.
    resident:
        Percent of the experts that fit into memory; may be given several times.
    json:
        Print one JSON object instead of a table.
    """
    from moehive.swarm.trace.files import read_trace
    from moehive.swarm.trace.scoring import fits_of, mark, score, slots_of

    trace = read_trace(file)
    fits = fits_of(trace)
    slots = {percent: slots_of(trace, percent / 100) for percent in resident}
    found = [(percent, score(trace, some), mark(trace, some, fits)) for percent, some in slots.items()]
    if json:
        say_json(_trace_json(trace) | {"scores": [_score_json(*each) for each in found]})
        return
    say(_describe(trace))
    for percent, scores, marks in found:
        shares = {name: f"{100 * scores.share(replay):.0f} %" for name, replay in _replays(scores, marks).items()}
        say(
            f"\n{percent:g} % resident: {scores.slots} of {_experts(trace)} experts; moehive's policy closes "
            f"{shares['lfru']} of the gap from LRU to Belady, fitted to the trace {shares['fitted']}, told the next "
            f"layer too {shares['foreseen']}"
        )
        rows = [(_POLICIES[name], *_row(replay)) for name, replay in _replays(scores, marks).items()]
        say(table(("policy", "hits", "layers", "loads", "evictions"), rows))


def trace_app(sort_key: int) -> App:
    """The commands of `moehive trace`; `sort_key` is their place among the others."""
    app = App(
        name="trace",
        help="Record which experts a model uses, and see what memory policies would make of it.",
        help_format="markdown",
        sort_key=sort_key,
    )
    for command in (record, replay, fit):
        app.command(command)
    return app


def load_model(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model and its tokenizer from a converted directory or a checkpoint. Raises ConfigError for neither."""
    if (directory / MANIFEST_NAME).is_file():
        from moehive.swarm import open_local

        return open_local(directory)
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} is neither a converted directory nor a checkpoint")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return model, AutoTokenizer.from_pretrained(directory)


def _heard(directory: Path, prompts: Sequence[str], sampling: Sampling, samples: int) -> RoutingTrace:
    """What a model used while it continued each prompt for itself."""
    quiet_libraries()
    import torch

    from moehive.swarm.text.generation import continue_text
    from moehive.swarm.trace.recording import Recorder

    model, tokenizer = load_model(directory)
    recorder = Recorder(model, samples=samples)
    with recorder.listening(), torch.inference_mode():
        for prompt in prompts:
            recorder.start_session()
            continue_text(model, tokenizer, prompt, sampling, lambda _: None)
    return recorder.trace(directory.resolve().name)


def _experts(trace: RoutingTrace) -> int:
    return len(trace.layers) * trace.num_experts


def _describe(trace: RoutingTrace) -> str:
    return (
        f"{trace.model}: {counted(trace.count, 'token')} in {counted(int(trace.starts.sum()), 'session')}, "
        f"{counted(len(trace.layers), 'layer')} of "
        f"{trace.num_experts} experts, {trace.top_k} used per token"
    )


def _row(found: Replay) -> tuple[str, str, str, str]:
    rates = (f"{100 * found.hit_rate:.1f} %", f"{100 * found.clean_share:.1f} %")
    return *rates, f"{found.misses:,}", f"{found.evictions:,}"


def _trace_json(trace: RoutingTrace) -> dict[str, Any]:
    return {
        "model": trace.model,
        "tokens": trace.count,
        "sessions": int(trace.starts.sum()),
        "layers": list(trace.layers),
        "experts": trace.num_experts,
        "topK": trace.top_k,
        "samples": 0 if trace.samples is None else len(trace.samples.rows),
    }


def _replays(scores: Scores, marks: Marks) -> dict[str, Replay]:
    """All of a budget, in the order of `_POLICIES`."""
    return {name: getattr(scores, name, None) or getattr(marks, name) for name in _POLICIES}


def _score_json(percent: float, scores: Scores, marks: Marks) -> dict[str, Any]:
    policies = {name: _replay_json(replay) for name, replay in _replays(scores, marks).items()}
    closed = {
        "gapClosed": round(scores.closed, 4),
        "gapClosedByFit": round(scores.share(marks.fitted), 4),
        "gapClosedByForesight": round(scores.share(marks.foreseen), 4),
    }
    return {"residentPercent": percent, "slots": scores.slots} | closed | policies


def _replay_json(found: Replay) -> dict[str, Any]:
    rates = {"hitRate": round(found.hit_rate, 4), "cleanShare": round(found.clean_share, 4)}
    return rates | {name.replace("clean_steps", "cleanSteps"): value for name, value in asdict(found).items()}
