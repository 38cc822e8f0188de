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
import hashlib
import itertools
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # special tokens come first in the vocabulary
VOCABULARY_SIZE = 1024
HELD_OUT_SHARE = 0.1
CONTEXT_LENGTH = 512  # tokens of the longest training window, and of every held-out window
WINDOW_LENGTHS = (256, 256, 512)  # of successive epochs: short windows train faster
TOKENS_PER_STEP = 1024
BALANCE_COEFFICIENT = 0.01
INITIALIZER_RANGE = 0.06  # near 1 / sqrt(hidden size); with the usual 0.02 a model this small learns far more slowly
SAMPLE_PROMPT = "ROMEO:"
SAMPLE_TOKENS = 200


@dataclass(frozen=True)
class Options:
    """What the command line decides."""

    text: Path
    out: Path
    steps: int
    minutes: float | None
    learning_rate: float
    weight_decay: float
    patience: int
    eval_every: int
    seed: int
    threads: int


@dataclass(frozen=True)
class Corpus:
    """The text as token ids, split once into a training part and a held-out part."""

    train_ids: Tensor  # [N_train]
    held_out_ids: Tensor  # [N_held_out]
    held_out_characters: int  # characters of every held-out token but the first, which is never predicted
    characters: int
    sha256: str


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss and routing statistics."""

    loss: float  # nats per token
    bits_per_character: float
    expert_shares: Tensor  # [L, E], every row sums to 1


@dataclass(frozen=True)
class TrainingRecord:
    """How a training run went."""

    steps: int
    best_step: int
    tokens: int
    seconds: float


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
    return Options(**vars(parser.parse_args()))


# ---------------------------------------------------------------------------------------------
# Text and tokenizer
# ---------------------------------------------------------------------------------------------


def split_text(text: str) -> tuple[str, str]:
    """Cut the last tenth off as held-out text, at a line start."""
    cut = text.index("\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 1
    return text[:cut], text[cut:]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE, so that every string can be encoded and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Return the token ids of a long text, `[N]`."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids, dtype=torch.long)


def load_corpus(path: Path) -> tuple[PreTrainedTokenizerFast, Corpus]:
    """Read the text, train the tokenizer on its training part and encode both parts."""
    text = path.read_text(encoding="utf-8")
    train_text, held_out_text = split_text(text)
    tokenizer = train_tokenizer(train_text)
    held_out_ids = encode(tokenizer, held_out_text)
    corpus = Corpus(
        train_ids=encode(tokenizer, train_text),
        held_out_ids=held_out_ids,
        held_out_characters=len(held_out_text) - len(str(tokenizer.decode(held_out_ids[:1]))),
        characters=len(text),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    return tokenizer, corpus


def batches(ids: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `(inputs, targets)`, each `[B, T]`, for ever.

    Every epoch cuts the text at a new random offset and shuffles the windows.
    """
    for length in itertools.cycle(WINDOW_LENGTHS):
        batch_size = TOKENS_PER_STEP // length
        offset = int(torch.randint(length, (1,), generator=generator))
        windows = ids[offset:].unfold(0, length + 1, length)  # [W, T + 1]
        order = torch.randperm(windows.shape[0], generator=generator)
        for chosen in order.split(batch_size):
            if len(chosen) == batch_size:
                yield windows[chosen, :-1], windows[chosen, 1:]


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


def model_config() -> Qwen3MoeConfig:
    """Return the architecture: 6 layers of 8 experts, of which every token uses 2."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=160,
        intermediate_size=320,  # of a dense feed-forward layer, which this model has none of
        moe_intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        initializer_range=INITIALIZER_RANGE,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_COEFFICIENT,
        output_router_logits=False,  # asked for by argument while training
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def generation_config() -> GenerationConfig:
    """Return the recommended sampling settings.

    There is no repetition penalty: it would also change greedy decoding, which then would no longer
    be the plain argmax of the logits.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=40,
        max_new_tokens=200,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )


def count_parameters(model: Qwen3MoeForCausalLM) -> tuple[int, int]:
    """Return how many parameters there are, and how many of them one token uses."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_hidden_layers * (config.num_experts - config.num_experts_per_tok) * expert
    return total, total - idle


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Return the load-balancing loss of Switch Transformer, averaged over the layers.

    `router_logits` holds one `[N, E]` per layer. An even load gives `top_k`. The loss that
    transformers computes adds the layers up first, so that an expert starved in one layer and
    overloaded in another looks balanced; here every layer has to be balanced by itself.
    """
    probabilities = torch.stack(router_logits).softmax(dim=-1)  # [L, N, E]
    experts = probabilities.shape[-1]
    chosen = probabilities.topk(top_k, dim=-1).indices  # [L, N, K]
    load = F.one_hot(chosen, experts).sum(dim=2).float().mean(dim=1)  # [L, E], picks per token
    return experts * (load * probabilities.mean(dim=1)).sum(dim=-1).mean()


def training_loss(model: Qwen3MoeForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return cross-entropy plus load balancing for `inputs` and `targets`, both `[B, T]`."""
    output = model(input_ids=inputs, use_cache=False, output_router_logits=True)
    cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())  # logits [B, T, V]
    balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
    return cross_entropy + BALANCE_COEFFICIENT * balance


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, corpus: Corpus) -> Evaluation:
    """Measure loss and routing on the whole held-out text, in windows that do not overlap."""
    model.eval()
    ids = corpus.held_out_ids
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    picks = torch.zeros(model.config.num_hidden_layers, experts)  # [L, E]
    nats = 0.0
    for start in range(0, len(ids) - 1, CONTEXT_LENGTH):
        window = ids[start : start + CONTEXT_LENGTH + 1]  # [T + 1]
        output = model(input_ids=window[None, :-1], use_cache=False, output_router_logits=True)
        nats += F.cross_entropy(output.logits[0], window[1:], reduction="sum").item()  # logits [1, T, V]
        chosen = torch.stack(output.router_logits).topk(top_k, dim=-1).indices  # [L, T, K]
        picks += F.one_hot(chosen, experts).sum(dim=(1, 2))
    return Evaluation(
        loss=nats / (len(ids) - 1),
        bits_per_character=nats / math.log(2) / corpus.held_out_characters,
        expert_shares=picks / picks.sum(dim=-1, keepdim=True),
    )


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def learning_rate_factor(progress: float, warmup: float = 0.05, floor: float = 0.02) -> float:
    """Return the share of the peak learning rate at `progress` in [0, 1]: linear warmup, then cosine."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return floor + (1 - floor) * cosine


def make_optimizer(model: Qwen3MoeForCausalLM, options: Options) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and none on norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=True)


def train_step(
    model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], rate: float
) -> float:
    """Do one update at learning rate `rate` and return its loss."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = training_loss(model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


@dataclass
class Best:
    """The best evaluation so far, with the weights it was made on."""

    weights: dict[str, Tensor]
    loss: float = math.inf
    step: int = 0
    misses: int = 0  # evaluations since

    def offer(self, model: Qwen3MoeForCausalLM, loss: float, step: int) -> None:
        """Keep the weights if `loss` is the lowest yet."""
        if loss >= self.loss:
            self.misses += 1
            return
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.loss, self.step, self.misses = loss, step, 0


def train(model: Qwen3MoeForCausalLM, corpus: Corpus, options: Options) -> TrainingRecord:
    """Train `model` and leave in it the weights with the lowest held-out loss."""
    optimizer = make_optimizer(model, options)
    stream = batches(corpus.train_ids, torch.Generator().manual_seed(options.seed))
    best, step, progress, started = Best(weights={}), 0, 0.0, time.monotonic()
    while progress < 1 and best.misses < options.patience:
        loss = train_step(model, optimizer, next(stream), options.learning_rate * learning_rate_factor(progress))
        step += 1
        elapsed = time.monotonic() - started
        progress = elapsed / (60 * options.minutes) if options.minutes else step / options.steps
        if step % options.eval_every == 0 or progress >= 1:
            held_out = evaluate(model, corpus)
            best.offer(model, held_out.loss, step)
            report(step, elapsed, loss, held_out)
    model.load_state_dict(best.weights)
    return TrainingRecord(step, best.step, step * TOKENS_PER_STEP, time.monotonic() - started)


def report(step: int, elapsed: float, loss: float, held_out: Evaluation) -> None:
    """Print one line of progress."""
    speed = step * TOKENS_PER_STEP / elapsed
    shares = held_out.expert_shares
    print(
        f"step {step:5d}  {elapsed:6.0f} s  {speed:6.0f} tokens/s  training loss {loss:.3f}  "
        f"held-out {held_out.loss:.4f} ({held_out.bits_per_character:.3f} bits per character)  "
        f"expert shares {shares.min():.3f} to {shares.max():.3f}",
        flush=True,
    )


# ---------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer into `folder`."""
    model.to(torch.bfloat16)
    model.generation_config = generation_config()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner only
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]:
    """Read a saved folder back the way its users do, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return cast(Qwen3MoeForCausalLM, model), cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(folder))


def sample(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """Write a text from the sample prompt with the recommended settings."""
    set_seed(seed)
    inputs = tokenizer(SAMPLE_PROMPT, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS)  # [1, T]
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


def replace_folder(new: Path, target: Path) -> None:
    """Put `new` in the place of `target` by renaming, so that no half-written model is ever seen."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------
# Model card
# ---------------------------------------------------------------------------------------------

CARD = """\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- mixture-of-experts
- qwen3_moe
---

# Demo model: Shakespeare in {total_millions:.1f} million parameters

A very small Qwen3-MoE language model that writes text in the manner of Shakespeare's plays. It
exists so that a swarm can be shown and tested on any computer without a download.

`scripts/train_demo_model.py` trained it and wrote this card; the results and the sample come from
the weights as saved.

## Architecture

| | |
|---|---|
| Parameters | {total:,} in total, {active:,} active per token |
| Layers | {layers}, each with {experts} experts of which every token uses {top_k} |
| Hidden size | {hidden} (experts: {expert_hidden}) |
| Attention | {heads} query heads and {kv_heads} key-value heads of size {head_dim} |
| Vocabulary | {vocabulary:,} tokens, byte-level BPE |
| Context | {context} tokens |
| Weights | bf16, input and output embeddings tied |

## Results on held-out text

| | |
|---|---|
| Loss | {loss:.3f} nats per token |
| Loss | {bits:.3f} bits per character |
| Unused experts | {unused} of {expert_count} |

Share of the tokens' choices that went to the least and the most used expert of each layer (an
even load is {even:.3f}), experts never chosen, and the load-balance coefficient, 1 + standard
deviation / mean of the load (an even load is 1):

| Layer | Least | Most | Unused | Load-balance coefficient |
|---|---|---|---|---|
{layer_rows}

The checkpoint was chosen by its loss on the same held-out text, so the loss is slightly
optimistic for other text.

## Data

The works of Shakespeare, which are in the public domain, in the selection known as "tiny
shakespeare": {characters:,} characters (SHA-256 `{sha256}`).
The first {train_percent:.0f} % ({train_tokens:,} tokens) trained the tokenizer and the model; the
rest ({held_out_tokens:,} tokens) is the held-out text.

## Training

{tokens_millions:.1f} million tokens ({epochs:.1f} passes over the training text) in {minutes:.0f} minutes on {threads}
({speed:,.0f} tokens per second including evaluation). {steps:,} steps of
{batch:,} tokens in windows of {windows}, on a schedule of {schedule} that ends early
when the held-out loss no longer falls; the weights kept are those after step {best_step:,}. AdamW in float32,
peak learning rate {learning_rate:g}, weight decay {weight_decay:g}, linear warmup and cosine decay, gradients
clipped to norm 1, load-balancing loss with coefficient {balance:g} computed for every layer by itself,
seed {seed}.

## Intended use and limitations

For demonstrations and tests. The model knows nothing but these plays: it follows no instructions,
answers no questions, and its sentences have the sound of Shakespeare but little sense. It never
saw a text end, so it writes until it reaches the limit it is given. Nor did it ever see more than
{context} tokens at once, so expect less of it beyond them. Greedy decoding works but soon repeats
itself; `generation_config.json` therefore recommends sampling (temperature {temperature:g}, top-k
{sampling_top_k}).

## Sample

Written from the prompt `{prompt}` with the recommended settings, first attempt (seed {seed}):

```text
{sample}
```

## Licence

Apache-2.0
"""


def layer_rows(shares: Tensor) -> str:
    """Return the table rows of the routing statistics of `shares`, `[L, E]`."""
    rows = []
    for layer, share in enumerate(shares):
        coefficient = 1 + share.std(unbiased=False) / share.mean()
        rows.append(f"| {layer} | {share.min():.3f} | {share.max():.3f} | {(share == 0).sum()} | {coefficient:.3f} |")
    return "\n".join(rows)


def architecture_facts(model: Qwen3MoeForCausalLM) -> dict[str, object]:
    """Return what the card says about the network."""
    config = model.config
    total, active = count_parameters(model)
    return {
        "total": total,
        "total_millions": total / 1e6,
        "active": active,
        "layers": config.num_hidden_layers,
        "experts": config.num_experts,
        "expert_count": config.num_hidden_layers * config.num_experts,
        "top_k": config.num_experts_per_tok,
        "hidden": config.hidden_size,
        "expert_hidden": config.moe_intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": CONTEXT_LENGTH,
        "even": 1 / config.num_experts,
    }


def training_facts(corpus: Corpus, record: TrainingRecord, options: Options) -> dict[str, object]:
    """Return what the card says about the data and the run."""
    return {
        "characters": corpus.characters,
        "sha256": corpus.sha256,
        "train_percent": 100 * (1 - HELD_OUT_SHARE),
        "train_tokens": len(corpus.train_ids),
        "held_out_tokens": len(corpus.held_out_ids),
        "tokens_millions": record.tokens / 1e6,
        "epochs": record.tokens / len(corpus.train_ids),
        "minutes": record.seconds / 60,
        "speed": record.tokens / record.seconds,
        "threads": "one processor core" if options.threads == 1 else f"{options.threads} processor cores",
        "steps": record.steps,
        "best_step": record.best_step,
        "schedule": f"{options.minutes:g} minutes" if options.minutes else f"{options.steps:,} steps",
        "batch": TOKENS_PER_STEP,
        "windows": " or ".join(str(length) for length in sorted(set(WINDOW_LENGTHS))),
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "balance": BALANCE_COEFFICIENT,
        "seed": options.seed,
    }


def write_card(folder: Path, corpus: Corpus, record: TrainingRecord, options: Options) -> Evaluation:
    """Measure the model saved in `folder` and write its README.md there."""
    model, tokenizer = load(folder)
    held_out = evaluate(model, corpus)
    card = CARD.format(
        **architecture_facts(model),
        **training_facts(corpus, record, options),
        loss=held_out.loss,
        bits=held_out.bits_per_character,
        unused=int((held_out.expert_shares == 0).sum()),
        layer_rows=layer_rows(held_out.expert_shares),
        temperature=model.generation_config.temperature,
        sampling_top_k=model.generation_config.top_k,
        prompt=SAMPLE_PROMPT,
        sample=sample(model, tokenizer, options.seed),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return held_out


def main() -> None:
    """Train, save, measure, and only then replace the output folder."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    set_seed(options.seed)
    tokenizer, corpus = load_corpus(options.text)
    model = Qwen3MoeForCausalLM(model_config())
    total, active = count_parameters(model)
    print(f"{total:,} parameters, {active:,} active per token; {len(corpus.train_ids):,} training tokens")
    record = train(model, corpus, options)

    folder = options.out.with_name(f".{options.out.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    save(model, tokenizer, folder)
    held_out = write_card(folder, corpus, record, options)
    unused = int((held_out.expert_shares == 0).sum())
    if unused:
        raise SystemExit(f"{unused} experts are never used; {options.out} is left as it was")
    replace_folder(folder, options.out)
    print(f"wrote {options.out}: held-out loss {held_out.loss:.4f} nats per token")


if __name__ == "__main__":
    main()
