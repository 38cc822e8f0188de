"""What guesses about the next experts are worth: recall, bytes, and the time that they hide on links of several speeds.

    python scripts/bench/prefetch.py --text shakespeare.txt [--model DIR ...] [--json FILE]

For each model (the bundled demo model by default) the first nine tenths of the text give the tokens that predictors are
fitted to, and the last tenth, which the bundled model was not trained on, those that they are measured on, as if they
were decoded one at a time. Those called "learning" adapt as they guess, as they do in a running model and in the
replays. Nothing is timed: links and layers are simulated (swarm/prefetch/replay.py), in units of the time that a layer
takes, half of which is its attention. Recall at k is the share of the experts that tokens use among as many guesses;
with a width, guesses want as many more as it takes, on average, to reach a recall. Wasted bytes are those of guesses
not used, of all that were loaded: with nothing resident, and then with a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import arguments, conditions, print_head, print_table, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from moehive.protocol.ids import ExpertKey
from moehive.swarm.prefetch.fitting import Router, States, by_routers, states_of
from moehive.swarm.prefetch.measure import Usefulness
from moehive.swarm.prefetch.predictors import Point, Predictor, unit
from moehive.swarm.prefetch.replay import Machine, Outcome, replay
from moehive.swarm.prefetch.routers import routers_of
from moehive.swarm.prefetch.scoring import Experts, tokens_recall, width_for
from moehive.swarm.prefetch.training import fit
from moehive.swarm.tiers.lfru import Lfru
from moehive.swarm.trace.recording import Recorder

DEMO = Path(__file__).parents[2] / "node" / "demo" / "model"
WINDOW = 256  # tokens of a session
RECALLS = (0.85, 0.93)
LOADS = (0.25, 1.0, 4.0, 16.0)  # of one expert, in layers' times
RESIDENT = (0.25, 0.5)


@dataclass(frozen=True)
class Recorded:
    """A model's routers, and its tokens to fit to and to measure on."""

    name: str
    layers: tuple[int, ...]
    top_k: int
    num_experts: int
    routers: dict[int, Router]
    fitted_to: States
    states: States
    experts: Experts


def main() -> None:
    """Print the tables."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8")
    parser.add_argument("--model", type=Path, nargs="+", default=[DEMO], help="checkpoint directories")
    parser.add_argument("--fit-tokens", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=4096, help="to measure recall on")
    parser.add_argument("--replayed", type=int, default=1024, help="tokens of each replay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    facts = conditions(fitted_to=f"{options.fit_tokens} tokens", measured_on=f"{options.tokens} tokens")
    print_head("Guesses about the next experts", facts)
    results = {}
    for directory in options.model:
        recorded = record(directory, options.text.read_text(encoding="utf-8"), options.fit_tokens, options.tokens)
        results[recorded.name] = measure(recorded, options.replayed)
    write_json(options.json, facts, results)


def record(directory: Path, text: str, fit_tokens: int, tokens: int) -> Recorded:
    """Run a checkpoint over parts of `text`, in its own dtype."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    cut = text.index("\n", int(len(text) * 0.9)) + 1
    name = "demo" if directory.resolve() == DEMO.resolve() else directory.name
    seen, held_out = (_ids(tokenizer, part, count) for part, count in ((text[:cut], fit_tokens), (text[cut:], tokens)))
    fitted_to, _, trace = _run(model, seen)
    states, experts, _ = _run(model, held_out)
    return Recorded(
        name, trace.layers, trace.top_k, trace.num_experts, dict(routers_of(model)), fitted_to, states, experts
    )


def _ids(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    return torch.tensor(tokenizer(text[: 8 * count], verbose=False)["input_ids"][:count])


@torch.inference_mode()
def _run(model: Any, ids: torch.Tensor) -> tuple[States, Experts, Any]:
    recorder = Recorder(model, samples=len(ids))
    with recorder.listening():
        for start in range(0, len(ids), WINDOW):
            recorder.start_session()
            model(input_ids=ids[None, start : start + WINDOW], use_cache=False)
    trace = recorder.trace(type(model).__name__)
    return *states_of(trace), trace


def measure(recorded: Recorded, replayed: int) -> dict[str, Any]:
    """Everything about one model."""
    shape = f"{len(recorded.layers)} layers of {recorded.num_experts} experts, {recorded.top_k} per token"
    print(f"### {recorded.name}: {shape}\n")
    plain = by_routers(recorded.routers, recorded.top_k)
    fitted = fit(recorded.fitted_to, recorded.layers, recorded.routers, recorded.top_k)
    predictors = {"untrained": plain, "fitted": fitted}
    return {
        "shape": shape,
        "similarity": similarity(recorded),
        "recall": recalls(recorded, predictors),
        "replays": replays(recorded, predictors, replayed),
    }


def similarity(recorded: Recorded) -> list[dict[str, float]]:
    """Cosine of what a layer's router sees (its norm's gain taken off) and the states that guesses are made from."""
    seen = [
        unit(recorded.states.inputs[:, column].astype(np.float32) / recorded.routers[layer].gain)
        for column, layer in enumerate(recorded.layers)
    ]
    rows = []
    for column, layer in enumerate(recorded.layers):
        entry = recorded.states.residuals[:, column].astype(np.float32)
        row = {"layer": layer, "entry": float(np.mean(seen[column] * entry))}
        for point in (Point.BEFORE, Point.EARLIER):
            if column >= point.ahead:
                row[point.name.lower()] = float(np.mean(seen[column] * seen[column - point.ahead]))
        rows.append(row)
    columns = ("layer", "entry", "before", "earlier")
    print("Similarity (cosine) of a router's input to the states that guesses are made from:\n")
    print_table(columns, [[row.get(column) for column in columns] for row in rows])
    return rows


def recalls(recorded: Recorded, predictors: dict[str, Predictor]) -> list[dict[str, Any]]:
    """Recall by width; and width and waste by recall, with nothing resident."""
    rows: list[dict[str, Any]] = []
    for name, predictor in predictors.items():
        for label, routers in ((name, None), (f"{name}, learning", recorded.routers)):
            asked = (predictor, recorded.states, recorded.experts, recorded.layers)
            for found in tokens_recall(*asked, routers):
                reach = [asdict(width_for(*asked, found.point, wanted, routers)) for wanted in RECALLS]
                guessed = found.point.name.lower()
                row = {"predictor": label, "guessed": guessed, "at": found.at, "layers": dict(found.layers)}
                rows.append(row | {"to_reach": reach})
    head = ["predictor", "guessed", "recall at k", "k + 1", "k + 2", "worst layer at k"]
    for wanted in RECALLS:
        head += [f"width for {wanted:.2f}", "wasted"]
    cells = []
    for row in rows:
        reach = [cell for found in row["to_reach"] for cell in (found["width"], f"{found['wasted']:.0%}")]
        cells.append([row["predictor"], row["guessed"], *(f"{at:.3f}" for at in row["at"]),
                      f"{min(at[0] for at in row['layers'].values()):.3f}", *reach])  # fmt: skip
    print_table(head, cells)
    return rows


def replays(recorded: Recorded, predictors: dict[str, Predictor], tokens: int) -> list[dict[str, Any]]:
    """Decoding with a memory, on links of several speeds, without guesses and with them."""
    rows = []
    for share in RESIDENT:
        for load in LOADS:
            plain = _replay(recorded, None, share, load, tokens)
            for name, predictor in predictors.items():
                rows.append(_row(name, share, load, plain, _replay(recorded, predictor, share, load, tokens)))
    print("Replays: time, waiting and loads are of those without guesses.\n")
    shown = [column for column in rows[0] if column != "points"]
    print_table(shown, [[row[column] for column in shown] for row in rows])
    return rows


def _replay(recorded: Recorded, predictor: Predictor | None, share: float, load: float, tokens: int) -> Outcome:
    slots = round(share * len(recorded.layers) * recorded.num_experts)
    slots = max(slots, 2 * recorded.top_k + 1)
    policy: Lfru[ExpertKey] = Lfru(lambda key: (key.layer, key.expert), top_k=recorded.top_k)
    cut = States(recorded.states.inputs[:tokens], recorded.states.residuals[:tokens], recorded.states.starts[:tokens])
    machine = Machine(attention=0.5, experts=0.5, load=lambda _: load, slots=slots)
    return replay(cut, recorded.experts[:tokens], recorded.layers, predictor, policy, machine, routers=recorded.routers)


def _row(name: str, share: float, load: float, plain: Outcome, guessed: Outcome) -> dict[str, Any]:
    found = guessed.usefulness
    return {
        "predictor": name,
        "resident": f"{share:.0%}",
        "load": load,
        "hits without": plain.hit_rate,
        "hits": guessed.hit_rate,
        "time": guessed.seconds / plain.seconds,
        "waiting": guessed.stalled / max(plain.stalled, 1e-9),
        "loads": guessed.loads / max(plain.loads, 1),
        "guessed loads": found.loads,
        "wasted": f"{found.wasted:.1%}",
        "hidden": found.hidden_seconds,
        "switched off": found.switched_off,
        "points": _points(found),
    }


def _points(found: Usefulness) -> dict[str, dict[str, float]]:
    names: Sequence[str] = ("recall_at_k", "recall_at_width", "precision", "width", "guesses")
    return {
        point.name.lower(): {name: getattr(counts, name) for name in names} for point, counts in found.points.items()
    }


if __name__ == "__main__":
    main()
