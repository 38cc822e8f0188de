"""The model card: every number in it is measured on the weights as saved."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from moehive.kernels.telemetry import load_balance_coefficient

from .measure import SAMPLE_PROMPT, Evaluation, evaluate, sample
from .model import BALANCE_COEFFICIENT, Trainee, count_parameters, layer_config, load
from .text import CONTEXT_LENGTH, HELD_OUT_SHARE, TOKENS_PER_STEP, WINDOW_LENGTHS, Corpus
from .training import Options, TrainingRecord

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
clipped to norm 1, load-balancing loss (1 at even load) with coefficient {balance:g} computed for every layer by itself,
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
        coefficient = load_balance_coefficient(share)
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
    text = sample(model, tokenizer, options.seed)
    held_out = evaluate(Trainee(model, layer_config(model.config)), corpus)
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
        sample=text,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return held_out
