"""What each balancing scheme does to a small model: load-balance coefficient, dropped tokens, held-out loss.

    python scripts/balance_study.py --text shakespeare.txt --out build/balance --tune
    python scripts/balance_study.py --text shakespeare.txt --out build/balance [--steps 600] [--seeds 0 1 2]
    python scripts/balance_study.py --out build/balance --report docs

The first command trains one model per candidate of the two coefficients that were chosen by hand, with a seed that the
second does not use. The second trains one model per scheme and seed, each from the same initial weights on the same
batches. Both keep the numbers of each run in a file of its own, so they can be stopped and continued. The third writes
balance.md and balance.svg from those files. The model is the bundled demo model's architecture, smaller.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from demo_training.balance_report import write_report
from demo_training.measure import Evaluation
from demo_training.model import Trainee, layer_config, model_config
from demo_training.text import load_corpus
from demo_training.training import Options, train
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

from moehive.kernels.nn import Balance, MoEConfig

AUXILIARY_COEFFICIENT = 0.02
BIAS_UPDATE_RATE = 0.003  # the paper's 0.001 is for runs a hundred times as long
TUNED_AUXILIARY = (0.005, 0.02, 0.05)  # candidates for the two
TUNED_RATES = (0.001, 0.003, 0.01)
TUNING_SEED = 9


def study_config() -> Qwen3MoeConfig:
    """The demo model's architecture at a size that a processor core trains in minutes."""
    config = model_config()
    config.hidden_size, config.moe_intermediate_size, config.num_hidden_layers = 64, 64, 4
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    return config


def schemes(config: Qwen3MoeConfig) -> dict[str, MoEConfig]:
    """Every scheme's layer for this network; all but Switch use two experts per token."""
    auxiliary = replace(layer_config(config), balance_coefficient=AUXILIARY_COEFFICIENT)
    plain = replace(auxiliary, balance=Balance.NONE, balance_coefficient=0.0)
    return {
        "none": plain,
        "auxiliary": auxiliary,
        "loss-free": replace(plain, balance=Balance.LOSS_FREE, bias_update_rate=BIAS_UPDATE_RATE),
        "switch": replace(
            auxiliary, balance=Balance.SWITCH, top_k=1, capacity_factor=1.25, eval_capacity_factor=2.0, jitter=0.01
        ),
        "expert-choice": replace(plain, balance=Balance.EXPERT_CHOICE),
    }


def tuning(config: Qwen3MoeConfig) -> dict[str, MoEConfig]:
    """The candidates, and no balancing to compare with."""
    all_schemes = schemes(config)
    auxiliary, loss_free = all_schemes["auxiliary"], all_schemes["loss-free"]
    return {
        "none": all_schemes["none"],
        **{f"auxiliary {value:g}": replace(auxiliary, balance_coefficient=value) for value in TUNED_AUXILIARY},
        **{f"loss-free {value:g}": replace(loss_free, bias_update_rate=value) for value in TUNED_RATES},
    }


def run(layer: MoEConfig, options: Options) -> dict[str, object]:
    """Train one model; the numbers of the run."""
    set_seed(options.seed)
    _, corpus = load_corpus(options.text)
    trainee = Trainee(Qwen3MoeForCausalLM(study_config()), layer)
    set_seed(options.seed)  # jitter draws the same numbers whatever the initialisation drew
    record = train(trainee, corpus, options)
    return {
        "seed": options.seed,
        "steps": record.steps,
        "seconds": record.seconds,
        "settings": asdict(layer) | {"balance": layer.balance.value},
        "training_dropped": trainee.dropped / trainee.tokens,
        "history": [{"step": step, **figures(found)} for step, found in record.history],
    }


def figures(found: Evaluation) -> dict[str, object]:
    """What is kept of an evaluation."""
    return {
        "loss": found.loss,
        "balance": found.balance,
        "dropped": found.dropped,
        "over_capacity": found.over_capacity,
    }


def train_missing(layers: Mapping[str, MoEConfig], folder: Path, seed: int, arguments: argparse.Namespace) -> None:
    """One run per layer, but for those that `folder` has already."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, layer in layers.items():
        target = folder / f"{name}-{seed}.json"
        if target.exists():
            continue
        print(f"--- {name}, seed {seed}", flush=True)
        options = Options(
            text=arguments.text,
            out=folder,
            steps=arguments.steps,
            minutes=None,
            learning_rate=3e-3,
            weight_decay=0.1,
            patience=arguments.steps,  # never stops early
            eval_every=arguments.eval_every,
            seed=seed,
            threads=1,
        )
        target.write_text(json.dumps(run(layer, options), indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="training text, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs' numbers")
    parser.add_argument("--report", type=Path, help="write the table and the plot there, and train nothing")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schemes", nargs="+", default=list(schemes(study_config())))
    parser.add_argument("--tune", action="store_true", help="train the candidates instead")
    arguments = parser.parse_args()
    if arguments.report is None and arguments.text is None:
        parser.error("--text is needed to train")
    return arguments


def main() -> None:
    """Train what is missing, or write the report."""
    arguments = parse_arguments()
    config = study_config()
    if arguments.report is not None:
        write_report(arguments.out, arguments.report, config, arguments.schemes)
        return
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if arguments.tune:
        train_missing(tuning(config), arguments.out / "tuning", TUNING_SEED, arguments)
        return
    layers = {name: layer for name, layer in schemes(config).items() if name in arguments.schemes}
    for seed in arguments.seeds:
        train_missing(layers, arguments.out, seed, arguments)


if __name__ == "__main__":
    main()
