"""From the numbers of the balance study's runs to a page and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import Qwen3MoeConfig

from .measure import CAPACITY_FACTOR
from .plot import Chart, Curve, svg
from .text import CONTEXT_LENGTH, TOKENS_PER_STEP

LIMIT = 1.25  # load-balance coefficient that a balanced layer stays below
_NOT_CAUSAL = "expert-choice"

COLUMNS = (
    "scheme", "seeds", "load balance, worst layer", "load balance, mean of layers", "over capacity",
    "dropped in training", "dropped on held-out text", "held-out loss", "against the best", "against *none*",
)  # fmt: skip
TUNING_COLUMNS = ("scheme and value", "load balance, worst layer", "held-out loss", "against the best")

PAGE = """\
# What balancing does

A router that is left alone sends most tokens to a few experts. The load-balance coefficient, 1 + standard
deviation / mean of the experts' counts, says how unevenly (1 is even); the loss on held-out text says what it costs to
prevent it. `moehive.kernels.nn` has four ways. This is what each did to a small model, from the same initial weights
and on the same batches:

![load balance and loss while training](balance.svg)

{header}
{rows}

{verdict}

Figures are means over the seeds, with the range over the seeds in brackets. Load and loss are those of the whole
held-out text after the last step; nothing was stopped early or chosen. *Over capacity* is the share of the choices that
would have been dropped, had every expert taken at most {factor:g} times an even share of each window of {window}
tokens. *Dropped* is what the scheme itself left without any expert: *none*, *auxiliary* and *loss-free* have no
capacity and drop nothing. *Against the best* compares with the best causal scheme, *against none* with no balancing, on
the seeds that both have.

* *none*: the two experts with the highest softmax probability, nothing else.
* *auxiliary*: plus the load-balancing loss of Switch Transformers in every layer, coefficient {auxiliary:g} (the loss
  is 1 at even load).
* *loss-free*: sigmoid scores and DeepSeek-V3's bias on the choice, which moves by {rate:g} after each step.
* *switch*: one expert per token, hence half the expert computation of the others; auxiliary loss with coefficient
  {switch:g} (not tuned), capacity factor {capacity:g} while training and 2 on held-out text, jitter 0.01.
* *expert-choice*: every expert takes a quarter of the tokens of a call. It is even by construction, and not causal:
  whether a token is taken depends on later ones, in training and on the held-out text. Its loss is not that of a model
  that could generate text, and does not count as the best.

**The model**: Qwen3-MoE, {layers} layers, hidden size {hidden}, {experts} experts of {expert_hidden} per layer, top-2
(but for *switch*), vocabulary {vocabulary}. **Training**: {steps:,} steps of {batch:,} tokens of tiny shakespeare (as
the demo model: AdamW, peak rate 0.003, cosine schedule). Differences in loss between the first three schemes are about
as large as those between seeds.

## How the coefficients were chosen

By one run for each of these candidates with seed {tuned}, which the table above does not use:

{tuning_header}
{tuning_rows}

The paper's rate, 0.001, is for runs a hundred times as long.

```
python scripts/balance_study.py --text shakespeare.txt --out build/balance --steps {steps} --tune
python scripts/balance_study.py --text shakespeare.txt --out build/balance --steps {steps}
python scripts/balance_study.py --out build/balance --report docs
```

The bundled demo model was trained with *auxiliary* (`scripts/train_demo_model.py`, which uses the same layers).
"""


@dataclass(frozen=True)
class Scheme:
    """All runs of one scheme."""

    name: str
    runs: Sequence[dict[str, Any]]

    @property
    def causal(self) -> bool:
        """Whether its loss is that of a language model."""
        return self.name != _NOT_CAUSAL

    def last(self, figure: Callable[[dict[str, Any]], float]) -> list[float]:
        """A figure of the last evaluation of every run."""
        return [figure(run["history"][-1]) for run in self.runs]

    def curve(self, figure: Callable[[dict[str, Any]], float]) -> Curve:
        """The mean over the seeds of a figure, by step."""
        evaluations = zip(*(run["history"] for run in self.runs), strict=True)
        return [(found[0]["step"], mean(figure(one) for one in found)) for found in evaluations]


def worst_layer(evaluation: dict[str, Any]) -> float:
    """The highest load-balance coefficient of a layer."""
    return max(evaluation["balance"])


def mean_layer(evaluation: dict[str, Any]) -> float:
    """The mean load-balance coefficient of the layers."""
    return mean(evaluation["balance"])


def held_out_loss(evaluation: dict[str, Any]) -> float:
    """Nats per token."""
    return float(evaluation["loss"])


def held_out_dropped(evaluation: dict[str, Any]) -> float:
    """Share of the tokens, in percent."""
    return 100 * float(evaluation["dropped"])


def over_capacity(evaluation: dict[str, Any]) -> float:
    """Share of the choices, in percent."""
    return 100 * float(evaluation["over_capacity"])


def read_schemes(folder: Path, names: Sequence[str]) -> list[Scheme]:
    """Every scheme's runs. Raises SystemExit where some are missing or differ in their steps."""
    schemes = [
        Scheme(name, [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]) for name in names
    ]
    lengths = {run["steps"] for scheme in schemes for run in scheme.runs}
    if len(lengths) != 1 or not all(scheme.runs for scheme in schemes):
        raise SystemExit(f"{folder} needs runs of {', '.join(names)}, all of the same number of steps")
    return schemes


def write_report(folder: Path, target: Path, config: Qwen3MoeConfig, names: Sequence[str]) -> None:
    """Write balance.md and balance.svg into `target`."""
    schemes = read_schemes(folder, names)
    by_name = {scheme.name: scheme for scheme in schemes}
    tuning = folder / "tuning"
    candidates = read_schemes(tuning, sorted({path.stem.rpartition("-")[0] for path in tuning.glob("*.json")}))
    page = PAGE.format(
        header=_header(COLUMNS),
        rows="\n".join(_row(scheme, by_name["none"], _best(schemes)) for scheme in schemes),
        verdict=_verdict(by_name, _best(schemes)),
        factor=CAPACITY_FACTOR,
        window=CONTEXT_LENGTH,
        tuned=candidates[0].runs[0]["seed"],
        tuning_header=_header(TUNING_COLUMNS),
        tuning_rows="\n".join(_tuning_row(scheme, _best(candidates)) for scheme in candidates),
        auxiliary=by_name["auxiliary"].runs[0]["settings"]["balance_coefficient"],
        rate=by_name["loss-free"].runs[0]["settings"]["bias_update_rate"],
        switch=by_name["switch"].runs[0]["settings"]["balance_coefficient"],
        capacity=by_name["switch"].runs[0]["settings"]["capacity_factor"],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        experts=config.num_experts,
        expert_hidden=config.moe_intermediate_size,
        vocabulary=config.vocab_size,
        steps=schemes[0].runs[0]["steps"],
        batch=TOKENS_PER_STEP,
    )
    (target / "balance.md").write_text(page, encoding="utf-8")
    (target / "balance.svg").write_text(_plot(schemes), encoding="utf-8")


def _header(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}"


def _best(schemes: Sequence[Scheme]) -> Scheme:
    return min((scheme for scheme in schemes if scheme.causal), key=lambda scheme: mean(scheme.last(held_out_loss)))


def _excess(scheme: Scheme, other: Scheme) -> float:
    """How much higher the mean loss is, in percent, on the seeds that both have; SystemExit where they have none."""
    found, wanted = ({run["seed"]: held_out_loss(run["history"][-1]) for run in one.runs} for one in (scheme, other))
    seeds = found.keys() & wanted.keys()
    if not seeds:
        raise SystemExit(f"{scheme.name} and {other.name} have no seed in common")
    return 100 * (mean(found[seed] for seed in seeds) / mean(wanted[seed] for seed in seeds) - 1)


def _row(scheme: Scheme, none: Scheme, best: Scheme) -> str:
    dropped = [100 * run["training_dropped"] for run in scheme.runs]
    cells = [
        scheme.name,
        ", ".join(str(run["seed"]) for run in scheme.runs),
        _spread(scheme.last(worst_layer), 2),
        f"{mean(scheme.last(mean_layer)):.2f}",
        f"{mean(scheme.last(over_capacity)):.1f} %",
        f"{mean(dropped):.1f} %",
        f"{mean(scheme.last(held_out_dropped)):.1f} %",
        _spread(scheme.last(held_out_loss), 3),
        f"{_excess(scheme, best):+.2f} %" if scheme.causal else "not causal",
        f"{_excess(scheme, none):+.2f} %",
    ]
    return f"| {' | '.join(cells)} |"


def _tuning_row(candidate: Scheme, best: Scheme) -> str:
    (balance,), (loss,) = candidate.last(worst_layer), candidate.last(held_out_loss)
    return f"| {candidate.name} | {balance:.2f} | {loss:.3f} | {_excess(candidate, best):+.2f} % |"


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _verdict(schemes: dict[str, Scheme], best: Scheme) -> str:
    """One sentence on the two schemes that a causal model would choose between."""
    parts = []
    for name in ("auxiliary", "loss-free"):
        worst = max(schemes[name].last(worst_layer))
        side = "below" if worst < LIMIT else "not below"
        loss = _excess(schemes[name], best)
        parts.append(f"*{name}* ends {side} {LIMIT:g} in every layer and seed (worst {worst:.2f}), {loss:.2f} % above")
    return " the best loss; ".join(parts) + " the best loss."


def _plot(schemes: Sequence[Scheme]) -> str:
    balance = {scheme.name: scheme.curve(worst_layer) for scheme in schemes}
    loss = {scheme.name: scheme.curve(held_out_loss) for scheme in schemes}
    lowest = min(y for curve in loss.values() for _, y in curve)
    return svg(
        [
            Chart("load balance of the worst layer (1 is even)", "step", balance, 1.0, 3.0, LIMIT),
            Chart("held-out loss, nats per token", "step", loss, lowest // 0.1 / 10, lowest // 0.1 / 10 + 1.2),
        ]
    )
