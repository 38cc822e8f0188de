"""Train the bundled demo model: a small Qwen3-MoE that writes Shakespeare's English.

The script needs only a plain text file and a processor; the bundled model was made with

    python scripts/train_demo_model.py --text shakespeare.txt --out node/demo/model

It trains a byte-level BPE tokenizer, then the network, and keeps the weights of the evaluation
with the lowest held-out loss. The folder it writes holds bf16 weights under the tensor names
used on the model hub, the tokenizer, the configuration and a model card whose numbers are
measured on the weights as saved.

With `--steps` a run is a function of the text, the seed and the library versions. With
`--minutes` the schedule follows the clock instead, so two runs differ.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from demo_training.card import write_card
from demo_training.model import Shape, Trainee, count_parameters, layer_config, model_config, save
from demo_training.text import load_corpus
from demo_training.training import Options, train
from transformers import Qwen3MoeForCausalLM, set_seed


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled Qwen3-MoE demo model on a text file.")
    parser.add_argument("--text", type=Path, required=True, help="training text, UTF-8")
    parser.add_argument("--out", type=Path, default=Path("node/demo/model"), help="folder to write (replaced whole)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=4000, help="optimizer steps of the schedule")
    length.add_argument("--minutes", type=float, help="length of the schedule by the clock, instead of --steps")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="decay of every matrix")
    parser.add_argument("--patience", type=int, default=5, help="stop after this many evaluations without a new best")
    parser.add_argument("--eval-every", type=int, default=200, help="steps between held-out evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    shape = parser.add_argument_group("shape", "of other models than the bundled one")
    shape.add_argument("--layers", type=int, default=Shape.layers)
    shape.add_argument("--experts", type=int, default=Shape.experts, help="of each layer")
    shape.add_argument("--top-k", type=int, default=Shape.top_k, help="experts that a token uses in each layer")
    shape.add_argument("--expert-hidden", type=int, default=Shape.expert_hidden, help="inner size of an expert")
    return Options(**vars(parser.parse_args()))


def replace_folder(new: Path, target: Path) -> None:
    """Put `new` in the place of `target` by renaming, so that no half-written model is ever seen."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Train, save, measure, and only then replace the output folder."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    set_seed(options.seed)
    tokenizer, corpus = load_corpus(options.text)
    model = Qwen3MoeForCausalLM(model_config(options.shape))
    total, active = count_parameters(model)
    print(f"{total:,} parameters, {active:,} active per token; {len(corpus.train_ids):,} training tokens")
    trainee = Trainee(model, layer_config(model.config))
    record = train(trainee, corpus, options)

    folder = options.out.with_name(f".{options.out.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    save(trainee.export(), tokenizer, folder)
    held_out = write_card(folder, corpus, record, options)
    unused = int((held_out.expert_shares == 0).sum())
    if unused:
        raise SystemExit(f"{unused} experts are never used; {options.out} is left as it was")
    replace_folder(folder, options.out)
    print(f"wrote {options.out}: held-out loss {held_out.loss:.4f} nats per token")


if __name__ == "__main__":
    main()
