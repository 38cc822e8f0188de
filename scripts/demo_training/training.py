"""The training loop: schedule, optimizer, and the weights of the best evaluation."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .measure import Evaluation, evaluate
from .model import Shape, Trainee
from .text import TOKENS_PER_STEP, Corpus, batches


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
    layers: int = Shape.layers
    experts: int = Shape.experts
    top_k: int = Shape.top_k
    expert_hidden: int = Shape.expert_hidden

    @property
    def shape(self) -> Shape:
        """Of the network to train."""
        return Shape(self.layers, self.experts, self.top_k, self.expert_hidden)


@dataclass(frozen=True)
class TrainingRecord:
    """How a training run went."""

    steps: int
    best_step: int
    tokens: int
    seconds: float
    history: list[tuple[int, Evaluation]]  # (step, held-out evaluation after it)


def learning_rate_factor(progress: float, warmup: float = 0.05, floor: float = 0.02) -> float:
    """Return the share of the peak learning rate at `progress` in [0, 1]: linear warmup, then cosine."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return floor + (1 - floor) * cosine


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and none on norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=True)


def train_step(trainee: Trainee, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], rate: float) -> float:
    """Do one update at learning rate `rate` and return its loss."""
    model = trainee.model
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = trainee.loss(*batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    trainee.after_step()
    return loss.item()


@dataclass
class Best:
    """The best evaluation so far, with the weights it was made on."""

    weights: dict[str, Tensor]
    loss: float = math.inf
    step: int = 0
    misses: int = 0  # evaluations since

    def offer(self, model: nn.Module, loss: float, step: int) -> None:
        """Keep the weights if `loss` is the lowest yet."""
        if loss >= self.loss:
            self.misses += 1
            return
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.loss, self.step, self.misses = loss, step, 0


def train(trainee: Trainee, corpus: Corpus, options: Options) -> TrainingRecord:
    """Train `trainee` and leave in it the weights with the lowest held-out loss."""
    optimizer = make_optimizer(trainee.model, options)
    stream = batches(corpus.train_ids, torch.Generator().manual_seed(options.seed))
    best, step, progress, started = Best(weights={}), 0, 0.0, time.monotonic()
    history: list[tuple[int, Evaluation]] = []
    while progress < 1 and best.misses < options.patience:
        loss = train_step(trainee, optimizer, next(stream), options.learning_rate * learning_rate_factor(progress))
        step += 1
        elapsed = time.monotonic() - started
        progress = elapsed / (60 * options.minutes) if options.minutes else step / options.steps
        if step % options.eval_every == 0 or progress >= 1:
            held_out = evaluate(trainee, corpus)
            best.offer(trainee.model, held_out.loss, step)
            history.append((step, held_out))
            report(step, elapsed, loss, held_out)
    trainee.model.load_state_dict(best.weights)
    return TrainingRecord(step, best.step, step * TOKENS_PER_STEP, time.monotonic() - started, history)


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
